#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Tools that fail, at each step of their life, and what that costs a guest: run in the AMD host by tests/test_fault.py; by hand:

    [KVMI_LONG=1] tests/host/run amd -- tests/host/fault.py NAME…

A scenario is something that happens to the guest meanwhile; in each, a tool gets to a step and fails there in some way. Each combination
is a line of the matrix that the tests leave in build/host/faults.md. Without KVMI_LONG only some of them are run.
"""
import functools
import os
import signal
import struct
import sys
import time
import traceback

import scenarios
from inside import (EPERM, EVENT_UNHOOK, PAUSE_VCPU, READ_PHYSICAL, VM_CONTROL_EVENTS, WRITE_PHYSICAL, HOT, RawTool,
                    wait_until)
from scenarios import Pulse, breakpoint_offsets, code, same_memory, wait_state

SCENARIOS = {}
scenario = functools.partial(scenarios.scenario, into=SCENARIOS)
LONG = bool(os.environ.get("KVMI_LONG"))
DEADLINE = 500      # ms, for a tool to leave
VCPUS = 2

# The numbers of linux/kvmi.h that only this needs
VCPU_EVENT, SET_PAGE_ACCESS, CONTROL_EVENTS, CONTROL_CR, INJECT, CONTROL_MSR, CONTROL_SINGLESTEP = 1, 20, 5, 13, 15, 25, 27
PAUSE, BREAKPOINT, CR, TRAP, MSR, PF, SINGLESTEP = 1, 5, 7, 9, 15, 17, 19
MSRS = (0x6e0, 0xc0000102)      # TSC_DEADLINE, KERNEL_GS_BASE: a Linux guest writes one or the other all the time
DB_VECTOR = 1
CONTINUE, ACCESS_RW = 0, 3
INT3 = b"\xcc"


# --- the tool ---------------------------------------------------------------------------------------------------------


class Tool(RawTool):
    """Gets to a step of its life; hot and cold: where functions lie that the guest calls all the time, or hardly ever."""

    def __init__(self, hot, cold, ready):
        super().__init__()
        self.hot, self.cold, self.ready = hot, cold, ready

    def good(self, ident, payload):
        error, data = self.command(ident, payload)
        assert not error, f"command {ident} gave {error}"
        return data

    def good_for_all(self, ident, payload):
        for vcpu in range(VCPUS):
            self.good(ident, struct.pack("=HHI", vcpu, 0, 0) + payload)

    def write(self, gpa, data):
        self.good(WRITE_PHYSICAL, struct.pack("=QHHI", gpa, len(data), 0, 0) + data)

    def plant(self, places):
        found = []
        for gpa in places:
            found.append(self.good(READ_PHYSICAL, struct.pack("=QHHI", gpa, 1, 0, 0)))
            self.write(gpa, INT3)
        return found

    def hook(self):
        self.accept().answer()
        while self.command(VM_CONTROL_EVENTS, struct.pack("=HBBI", EVENT_UNHOOK, 1, 0, 0))[0] == EPERM:
            time.sleep(0.005)       # QEMU allows things when it has hooked
        self.under = self.plant(self.cold)

    def enable(self, event):
        self.good_for_all(CONTROL_EVENTS, struct.pack("=HBBI", event, 1, 0, 0))

    def event(self, wanted):
        """(vcpu, seq, RIP) of the next event of this kind"""
        while True:
            ident, seq, data = self.message()
            if ident == VCPU_EVENT and struct.unpack_from("=H", data)[0] == wanted:
                return struct.unpack_from("=H", data, 10)[0], seq, struct.unpack_from("=Q", data, 152)[0]

    # The steps

    def in_handshake(self):
        self.accept()
        self.ready()

    def idle(self):
        self.hook()
        self.ready()

    def in_command(self):
        self.hook()
        self.sock.sendall(struct.pack("=HHI", WRITE_PHYSICAL, 17, 1000) + b"\0" * 7)
        self.ready()

    def in_breakpoint(self):
        self.hook()
        self.enable(BREAKPOINT)
        for gpa in self.hot:
            # Not command(): the first event may come before the reply
            self.sock.sendall(struct.pack("=HHIQHHI", WRITE_PHYSICAL, 17, 1000, gpa, 1, 0, 0) + INT3)
        self.event(BREAKPOINT)
        self.ready()

    def in_pause(self):
        self.hook()
        self.sock.sendall(struct.pack("=HHIHBBI", PAUSE_VCPU, 8, 1000, 0, 0, 0, 0))
        event = self.event(PAUSE)
        self.ready()
        return event

    def enable_and_meet(self, event):
        # Not command(): the first event may come before the reply
        for vcpu in range(VCPUS):
            self.sock.sendall(struct.pack("=HHIHHIHBBI", CONTROL_EVENTS, 16, 1000, vcpu, 0, 0, event, 1, 0, 0))
        self.event(event)
        self.ready()

    def in_cr(self):
        self.hook()
        self.good_for_all(CONTROL_CR, struct.pack("=BBHI", 3, 1, 0, 0))
        self.enable_and_meet(CR)

    def in_msr(self):
        self.hook()
        for msr in MSRS:
            self.good_for_all(CONTROL_MSR, struct.pack("=BBHI", 1, 0, 0, msr))
        self.enable_and_meet(MSR)

    def in_pf(self):
        self.hook()
        self.enable(PF)
        self.sock.sendall(struct.pack("=HHIHHIQB7x", SET_PAGE_ACCESS, 24, 1000, 1, 0, 0, self.hot[0], ACCESS_RW))
        self.event(PF)
        self.ready()

    def end_pause(self, vcpu, seq):
        self.sock.sendall(struct.pack("=HHIHHIBBHI", VCPU_EVENT, 16, seq, vcpu, 0, 0, CONTINUE, PAUSE, 0, 0))

    def in_trap(self):
        # A #DB of no reason, which is nothing to a kernel; but it would kill a program
        self.hook()
        rip = 0
        while not rip >> 63:
            self.sock.sendall(struct.pack("=HHIHBBI", PAUSE_VCPU, 8, 1000, 0, 0, 0, 0))
            vcpu, seq, rip = self.event(PAUSE)
            if rip >> 63:
                self.good(INJECT, struct.pack("=HHIBBHIQ", vcpu, 0, 0, DB_VECTOR, 0, 0, 0, 0))
            self.end_pause(vcpu, seq)
        self.event(TRAP)
        self.ready()

    def in_singlestep(self):
        ready, self.ready = self.ready, lambda: None
        vcpu, seq, _ = self.in_pause()
        self.good(CONTROL_SINGLESTEP, struct.pack("=HHIB7x", vcpu, 0, 0, 1))
        self.end_pause(vcpu, seq)
        self.event(SINGLESTEP)
        ready()

    def asked(self):
        self.hook()
        self.ready()
        self.await_unhook()

    def removing(self):
        self.asked()
        for gpa, byte in list(zip(self.cold, self.under))[::2]:
            self.write(gpa, byte)

    # How it fails there

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def hung(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def gone(self):
        self.close()

    def garbage(self):
        self.sock.sendall(b"\xff" * 4096)


STEPS = ("in_handshake", "idle", "in_command", "in_breakpoint", "in_pause", "in_cr", "in_msr", "in_pf", "in_trap", "in_singlestep",
         "asked", "removing")
WHEN_ASKED = ("asked", "removing")
FAULTS = ("killed", "hung", "gone", "garbage")


class Process:
    """A tool in a process of its own, so that it can be killed and stopped."""

    def __init__(self, hot, cold, step, fault):
        self.step = step
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.alarm(100)
                tool = Tool(hot, cold, lambda: os.write(writer, b"r"))
                os.write(writer, b"l")
                getattr(tool, step)()
                getattr(tool, fault)()
                os.write(writer, b"f")
                signal.pause()
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(writer)
        self.reader, self.said = reader, b""
        os.set_blocking(reader, False)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.reader)

    def told(self, what):
        try:
            self.said += os.read(self.reader, 100)
        except BlockingIOError:
            pass
        return what in self.said

    def failed(self):
        """It is dead, stopped, or says that it has done it."""
        state = open(f"/proc/{self.pid}/stat").read().rpartition(")")[2].split()[0]
        return state in "ZT" or self.told(b"f")


# --- what happens to the guest ------------------------------------------------------------------------------------------


class Nothing:
    """The guest just runs."""
    name, asks, all = "nothing", False, True

    def begin(self, g):
        pass

    def done(self, g):
        return True

    def after(self, g):
        pass


class Stop(Nothing):
    name, asks, stops = "stop", True, True

    def begin(self, g):
        self.number = g.qmp.send("stop")

    def done(self, g):
        return self.number in g.qmp.replies

    def after(self, g):
        g.qmp.result(self.number, 1)
        assert g.qmp.execute("query-status")["status"] == "paused"
        g.qmp.execute("cont")


class Migrate(Nothing):
    """To nowhere; that what arrives is clean is for gate.py to see."""
    name, asks, all = "migrate", True, False

    def begin(self, g):
        g.qmp.execute("migrate", uri="exec:cat >/dev/null")

    def done(self, g):
        return g.qmp.execute("query-migrate").get("status") in ("completed", "failed", "cancelled")

    def after(self, g):
        assert g.qmp.execute("query-migrate")["status"] == "completed"
        g.qmp.execute("cont")


class Savevm(Nothing):
    name, asks, all = "savevm", True, False

    def begin(self, g):
        g.qmp.execute("snapshot-save", **{"job-id": "save", "tag": "fault", "vmstate": "disk", "devices": ["disk"]})

    def done(self, g):
        return g.qmp.execute("query-jobs")[0]["status"] == "concluded"

    def after(self, g):
        job = g.qmp.execute("query-jobs")[0]
        assert "error" not in job, job
        g.qmp.execute("job-dismiss", id="save")
        g.qmp.execute("snapshot-delete", **{"job-id": "delete", "tag": "fault", "devices": ["disk"]})
        wait_until(lambda: g.qmp.execute("query-jobs")[0]["status"] == "concluded", 20, "the snapshot to go")
        g.qmp.execute("job-dismiss", id="delete")


class Reset(Nothing):
    name, asks, all = "reset", False, False

    def begin(self, g):
        g.qmp.execute("set-action", reboot="reset")
        self.boots = g.output().count("text-physical")
        g.qmp.execute("system_reset")

    def after(self, g):
        wait_until(lambda: g.output().count("text-physical") > self.boots, 60, "the guest to boot again")


class Quit(Nothing):
    name, asks, all = "quit", False, False

    def begin(self, g):
        self.pid = int((g.dir / "pid").read_text())
        g.qmp.send("quit")

    def done(self, g):
        try:
            return not open(f"/proc/{self.pid}/cmdline").read()
        except FileNotFoundError:
            return True

    def after(self, g):
        g.start()


def cells(way):
    """Which of the combinations to go through."""
    steps = [s for s in STEPS if way.asks or s not in WHEN_ASKED]
    if LONG:
        return [(s, f) for s in steps for f in FAULTS]
    if way.all:         # each step with half of the faults
        return [(s, f) for i, s in enumerate(steps) for j, f in enumerate(FAULTS) if (i + j) % 2 == way.asks]
    if way.asks:        # each step, each fault more than once
        return [(s, FAULTS[(i + len(way.name)) % 4]) for i, s in enumerate(steps)]
    return [("idle", "hung"), ("in_breakpoint", "hung"), ("in_pf", "killed"), ("in_command", "garbage")]


COLD = ("__x64_sys_swapon", "__x64_sys_acct", "__x64_sys_quotactl", "__x64_sys_delete_module", "__x64_sys_kexec_load", "__x64_sys_sethostname")


def fds(g):
    return len(os.listdir(f"/proc/{(g.dir / 'pid').read_text().strip()}/fd"))


def go_through(g, way_class):
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    before = code(g)
    for step, fault in cells(way_class):
        print(f"--- {way_class.name}: {fault} {step}", flush=True)
        way = way_class()
        start, _, _ = g.text()
        hot, cold = ([start + o for o in breakpoint_offsets(g, names)] for names in (HOT, COLD))
        wait_state(g, "connecting")
        many, mark = fds(g), g.qmp.mark()
        with Process(hot, cold, step, fault) as tool:
            wait_until(lambda: tool.told(b"r"), 40, "the tool to get there", pause=0.005)
            if step not in WHEN_ASKED:
                wait_until(tool.failed, 20, "the tool to fail", pause=0.005)
            begin, pulse = time.monotonic(), Pulse(g)
            way.begin(g)
            if way_class is Quit:
                wait_until(lambda: way.done(g), 20, "QEMU to quit")
            else:
                pulse.beat()
                pulse.until(lambda: way.done(g), DEADLINE / 1000 + 20, f"{way.name} to end, with a tool that was {fault} {step}")
            took = (time.monotonic() - begin) * 1000
            if way_class is Nothing and fault == "hung":
                # Nobody cuts it off; the user does
                os.kill(tool.pid, signal.SIGKILL)
            if way_class is Stop:
                same_memory(before, code(g), "stopped")
            way.after(g)
        if way_class not in (Reset, Quit):
            g.wait_alive()
            wait_state(g, "connecting")
            same_memory(before, code(g), "afterwards")
            wait_until(lambda: fds(g) <= many, 10, "QEMU to close its files")
        else:
            g.wait_alive(60)
            before = code(g)
            if way_class is Quit:
                g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
        ends = [e["data"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_UNHOOKED"] if way_class is not Quit else []
        assert len(ends) == (step != "in_handshake") or way_class is Quit, ends
        outcome = ends[0]["outcome"] if ends else "–"
        if step in WHEN_ASKED:
            assert outcome == ("forced" if fault == "hung" else "disconnected"), ends
        slowest = f"{max(pulse.ms):.0f}" if pulse.ms else "–"
        print("MATRIX\t" + "\t".join((way.name, step.replace("_", " "), fault, outcome, f"{took:.0f}", slowest)), flush=True)


@scenario(timeout=400)
def fault_running(g):
    """The tool fails while the guest just runs."""
    go_through(g, Nothing)


@scenario(timeout=400)
def fault_stop(g):
    """… when the guest is paused"""
    go_through(g, Stop)


@scenario(timeout=600 if LONG else 200)
def fault_migrate(g):
    """… when the guest is migrated"""
    go_through(g, Migrate)


@scenario(timeout=600 if LONG else 200)
def fault_savevm(g):
    """… when a snapshot is made"""
    go_through(g, Savevm)


@scenario(timeout=1200 if LONG else 200)
def fault_reset(g):
    """… when the guest is reset"""
    go_through(g, Reset)
    g.spoilt = True


@scenario(timeout=1200 if LONG else 200)
def fault_quit(g):
    """… when QEMU quits"""
    go_through(g, Quit)


INTEL = {}


@scenario(timeout=1500, into=INTEL)
def intel_fault_running(g):
    """On the Intel host: the tool fails while the guest just runs."""
    go_through(g, Nothing)


@scenario(timeout=1500, into=INTEL)
def intel_fault_stop(g):
    """… when the guest is paused there"""
    go_through(g, Stop)


if __name__ == "__main__":
    scenarios.main({**SCENARIOS, **INTEL} if sys.argv[1:] else SCENARIOS)
