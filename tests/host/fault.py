#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Tools that fail, at each step of their life, and what that costs a guest: run in the AMD host by tests/test_fault.py; by hand:

    [KVMI_LONG=1] tests/host/run amd -- tests/host/fault.py NAME…

A scenario is something that happens to the guest meanwhile; in each, a tool gets to a step and fails there in some way. Each combination
is a line of the matrix that the tests leave in build/host/faults.md. Without KVMI_LONG only some of them are run.
"""
import functools
import os
import re
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import scenarios
from inside import (EPERM, EVENT_UNHOOK, PAUSE_VCPU, READ_PHYSICAL, VM_CONTROL_EVENTS, WRITE_PHYSICAL, HOT, RawTool,
                    wait_until)
from scenarios import Pulse, breakpoint_offsets, code, hook, info, same_memory, wait_state

SCENARIOS = {}
scenario = functools.partial(scenarios.scenario, into=SCENARIOS)
LONG = bool(os.environ.get("KVMI_LONG"))
DEADLINE = 500      # ms, for a tool to leave
VCPUS = 2

# The numbers of linux/kvmi.h that only this needs
VCPU_EVENT, SET_PAGE_ACCESS, CONTROL_EVENTS, CONTROL_CR, INJECT, CONTROL_MSR, CONTROL_SINGLESTEP = 1, 20, 5, 13, 15, 25, 27
PAUSE, HYPERCALL, BREAKPOINT, CR, TRAP, XSETBV, DESCRIPTOR, MSR, PF, SINGLESTEP = 1, 3, 5, 7, 9, 11, 13, 15, 17, 19
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

    def enable_and_meet(self, event, vcpus=range(VCPUS)):
        # Not command(): the first event may come before the reply
        for vcpu in vcpus:
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

    def in_hypercall(self):
        self.hook()
        self.enable_and_meet(HYPERCALL)

    def in_descriptor(self):
        self.hook()
        self.enable_and_meet(DESCRIPTOR)

    def in_xsetbv(self):
        # Of a guest that boots; its second CPU isn't up yet
        self.hook()
        self.enable_and_meet(XSETBV, vcpus=(0,))

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
         "in_hypercall", "in_descriptor", "in_xsetbv", "asked", "removing")
WHEN_ASKED = ("asked", "removing")
FAULTS = ("killed", "hung", "gone", "garbage")


class KernelLog:
    """What the host's kernel has logged from now on."""
    # KVM's own, about MSRs that it doesn't know, whenever a guest boots
    HARMLESS = re.compile(r"Unhandled (WR|RD)MSR|ignored (wr|rd)msr")
    # Others warn of how slow the host is
    KVM = re.compile(r"kvm|SVM|VMX")
    ENDED = re.compile(r"introspection of process \d+ ended: (.*); (\d+) bytes? restored")
    REASONS = {"unhooked": "unhook", "the tool closed the socket": "closed", "the tool broke the protocol": "protocol",
               "the tool didn't read": "unread", "killed": "killed"}

    def __init__(self):
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self.fd, 0, os.SEEK_END)
        self.lines = []

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.read()
        os.close(self.fd)
        if not kind:
            errors = [text for level, text in self.lines
                      if (level <= 3 or level == 4 and self.KVM.match(text)) and not self.HARMLESS.search(text)]
            assert not errors, f"the host's kernel complained: {errors}"

    def read(self):
        """[(level, text)]; lines of userspace are not the kernel's."""
        while True:
            try:
                head, _, text = os.read(self.fd, 8192).decode(errors="replace").partition(";")
            except BlockingIOError:
                return self.lines
            except BrokenPipeError:
                raise AssertionError("the host's kernel logged more than its buffer holds") from None
            priority = int(head.split(",")[0])
            if priority < 8:
                self.lines.append((priority, text.split("\n")[0]))

    def ends(self):
        """[reason] of the sessions that have ended since the last call."""
        found = [self.REASONS[m[1]] for _, text in self.read() if (m := self.ENDED.search(text))]
        self.lines = [line for line in self.lines if not self.ENDED.search(line[1])]
        return found


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
    ends = False        # QEMU ends
    lasts = False       # takes its time without a tool, too

    def begin(self, g):
        pass

    def done(self, g):
        return True

    def after(self, g):
        pass


class Stop(Nothing):
    name, asks = "stop", True

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
    name, asks, all, lasts = "migrate", True, False, True

    def begin(self, g):
        g.qmp.execute("migrate", uri="exec:cat >/dev/null")

    def done(self, g):
        return g.qmp.execute("query-migrate").get("status") in ("completed", "failed", "cancelled")

    def after(self, g):
        assert g.qmp.execute("query-migrate")["status"] == "completed"
        g.qmp.execute("cont")


class Savevm(Nothing):
    name, asks, all, lasts = "savevm", True, False, True

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
        self.boots = boots(g)
        g.qmp.execute("system_reset")

    def after(self, g):
        wait_until(lambda: boots(g) > self.boots, 60, "the guest to boot again")


class Quit(Nothing):
    name, asks, all = "quit", False, False
    ends = True

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


class Kill(Quit):
    """QEMU dies without a chance to say goodbye."""
    name = "SIGKILL of QEMU"

    def begin(self, g):
        self.pid = int((g.dir / "pid").read_text())
        os.kill(self.pid, signal.SIGKILL)


FEW = [("idle", "hung"), ("in_pf", "killed"), ("in_breakpoint", "hung"), ("in_command", "garbage")]


def cells(way):
    """Which of the combinations to go through."""
    steps = [s for s in STEPS if way.asks or s not in WHEN_ASKED]
    if LONG:
        return [(s, f) for s in steps for f in FAULTS]
    steps.remove("in_xsetbv")       # takes a boot
    if way.all:         # each step with half of the faults
        return [(s, f) for i, s in enumerate(steps) for j, f in enumerate(FAULTS) if (i + j) % 2 == way.asks] + [("in_xsetbv", FAULTS[way.asks])]
    if way.asks:        # each step, each fault more than once
        return [(s, FAULTS[(i + len(way.name)) % 4]) for i, s in enumerate(steps)]
    return FEW[:2] if way.ends else FEW[2:]     # each takes a boot


COLD = ("__x64_sys_swapon", "__x64_sys_acct", "__x64_sys_quotactl", "__x64_sys_delete_module", "__x64_sys_kexec_load", "__x64_sys_sethostname")


def fds(g):
    return len(os.listdir(f"/proc/{(g.dir / 'pid').read_text().strip()}/fd"))


def boots(g):
    return g.output().count("text-physical")


def reason(way, fault, outcome):
    """What should have ended the session, as KVM sees it."""
    if outcome == "forced" or fault == "hung" and way.ends:
        return "killed" if isinstance(way, Kill) else "unhook"
    return "protocol" if fault == "garbage" else "closed"


def places(g, step):
    """Has the guest do what the step is about; returns where functions lie, see Tool."""
    if step == "in_xsetbv":
        mark = g.qmp.mark()
        g.qmp.execute("set-action", reboot="reset")
        g.qmp.execute("system_reset")
        g.qmp.event("RESET", since=mark)
        return [], []       # nobody knows yet
    if step in ("in_hypercall", "in_descriptor"):
        g.ask("provoke", "provokes")
    start, _, _ = g.text()
    return [[start + o for o in breakpoint_offsets(g, names)] for names in (HOT, COLD)]


def go_through(g, way_class, some=None):
    with KernelLog() as log:
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
        before, usual = code(g), 0
        if way_class.lasts:
            wait_state(g, "connecting")
            way = way_class()
            usual, _ = carry_out(g, way, "without a tool")
            way.after(g)
        for step, fault in some or cells(way_class):
            print(f"--- {way_class.name}: {fault} {step}", flush=True)
            before = one(g, way_class(), step, fault, before, usual, log)


def carry_out(g, way, tool):
    """(milliseconds, the Pulse meanwhile)"""
    begin, pulse = time.monotonic(), Pulse(g)
    way.begin(g)
    if way.ends:
        wait_until(lambda: way.done(g), 20, "QEMU's end", pause=0.005)
    else:
        pulse.beat()
        pulse.until(lambda: way.done(g), DEADLINE / 1000 + 20, f"{way.name} to end, {tool}")
    return (time.monotonic() - begin) * 1000, pulse


def one(g, way, step, fault, before, usual, log):
    """One line of the matrix; usual: what it takes without a tool, ms. Returns the kernel's code as it is then."""
    boot = step == "in_xsetbv"
    wait_state(g, "connecting")
    booted = boots(g)
    hot, cold = places(g, step)
    many, mark = fds(g), g.qmp.mark()
    with Process(hot, cold, step, fault) as tool:
        wait_until(lambda: tool.told(b"r"), 40, "the tool to get there", pause=0.005)
        assert not boot or boots(g) == booted, "the guest had booted before the tool was there"
        if step not in WHEN_ASKED:
            wait_until(tool.failed, 20, "the tool to fail", pause=0.005)
        took, pulse = carry_out(g, way, f"with a tool that was {fault} {step}")
        if type(way) is Nothing and fault == "hung":
            # Nobody cuts it off; the user does
            os.kill(tool.pid, signal.SIGKILL)
        bound = 2 * usual + DEADLINE + 2000 + 4000 * pulse.lag
        assert took < bound, f"{way.name} took {took:.0f} ms, of which {bound:.0f} are allowed; without a tool it took {usual:.0f}"
        if isinstance(way, Stop) and not boot:
            same_memory(before, code(g), "stopped")
        way.after(g)
    if boot and not way.ends and not isinstance(way, Reset):
        wait_until(lambda: boots(g) > booted, 60, "the guest to boot")
    if boot or way.ends or isinstance(way, Reset):
        g.wait_alive(60)
        before = code(g)
    if way.ends:
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    else:
        g.wait_alive()
        wait_state(g, "connecting")
        same_memory(before, code(g), "afterwards")
        wait_until(lambda: fds(g) <= many, 10, "QEMU to close its files")

    sessions = int(step != "in_handshake")
    ends, logged = [], []
    if not way.ends:
        ends = [e["data"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_UNHOOKED"]
        assert len(ends) == sessions, ends
    outcome = ends[0]["outcome"] if ends else "–"
    if step in WHEN_ASKED and ends:
        assert outcome == ("forced" if fault == "hung" else "disconnected"), ends
    if sessions:
        wait_until(lambda: logged.extend(log.ends()) or logged, 10, "the session's end in the kernel's log")
    assert logged == [reason(way, fault, outcome)] * sessions and not log.ends(), f"{logged} in the kernel's log; {ends}"
    assert not ends or ends[0]["reason"] == logged[0], f"{ends}, but in the kernel's log: {logged}"
    slowest = f"{max(pulse.ms):.0f}" if pulse.ms else "–"
    print("MATRIX\t" + "\t".join((way.name, step.replace("_", " "), fault, outcome, logged[0] if logged else "–", f"{took:.0f}", slowest)), flush=True)
    return before


@scenario(timeout=1200 if LONG else 400)
def fault_running(g):
    """The tool fails while the guest just runs."""
    go_through(g, Nothing)


@scenario(timeout=1200 if LONG else 400)
def fault_stop(g):
    """… when the guest is paused"""
    go_through(g, Stop)


@scenario(timeout=1200 if LONG else 200)
def fault_migrate(g):
    """… when the guest is migrated"""
    go_through(g, Migrate)


@scenario(timeout=1200 if LONG else 200)
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


@scenario(timeout=1200 if LONG else 200)
def fault_kill(g):
    """… when QEMU is killed"""
    go_through(g, Kill)


# --- other ways to fail, and to see it ------------------------------------------------------------------------------------


@scenario()
def fault_unread(g):
    """A tool that asks and asks, and reads no answer, is cut off; the reason says so."""
    before = code(g)
    with KernelLog() as log:
        mark = g.qmp.mark()
        start, _, _ = g.text()
        with Tool([], [start + o for o in breakpoint_offsets(g, COLD)], None) as tool:
            tool.hook()
            try:
                while True:
                    tool.sock.sendall(struct.pack("=HHIQHHI", READ_PHYSICAL, 16, 1, start, 4096, 0, 0) * 100)
            except (BrokenPipeError, ConnectionResetError):
                pass
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        assert (end["outcome"], end["reason"], end["restored"]) == ("disconnected", "unread", len(COLD)), end
        assert log.ends() == ["unread"]
        same_memory(before, code(g), "afterwards")
        g.wait_alive()


@scenario()
def fault_traced(g):
    """What the kernel's tracepoints and its log say of a session whose tool is killed with an event open."""
    tracing = Path("/sys/kernel/tracing")
    start, _, _ = g.text()
    with KernelLog() as log:
        mark = g.qmp.mark()
        (tracing / "trace").write_text("")
        (tracing / "events/kvmi/enable").write_text("1")
        with Process([], [start + o for o in breakpoint_offsets(g, COLD)], "in_pause", "killed") as tool:
            wait_until(tool.failed, 40, "the tool to fail")
            g.qmp.event("KVMI_UNHOOKED", since=mark)
            # Nobody is hooked any more
            g.qmp.execute("stop")
            g.qmp.execute("cont")
        mark = g.qmp.mark()
        with Process([], [], "asked", "gone") as tool:
            wait_until(lambda: tool.told(b"r"), 40, "the tool to be there")
            g.qmp.execute("stop")
            g.qmp.execute("cont")
            g.qmp.event("KVMI_UNHOOKED", since=mark)
        (tracing / "events/kvmi/enable").write_text("0")
        assert log.ends() == ["closed"] * 2
    said = re.findall(r" (kvmi_\w+): (.*)", (tracing / "trace").read_text())
    vm = f"vm {int((g.dir / 'pid').read_text())}"
    once = [("kvmi_hook", vm), ("kvmi_session_end", f"{vm} reason closed"), ("kvmi_unhook", f"{vm} reason closed restored {len(COLD)}"),
            ("kvmi_hook", vm), ("kvmi_preunhook", f"{vm} error 0"), ("kvmi_session_end", f"{vm} reason closed"),
            ("kvmi_unhook", f"{vm} reason closed restored 0")]
    assert [e for e in said if e[0] in dict(once)] == once, said
    event = next((text for name, text in said if name == "kvmi_event"), "")
    vcpu, seq = re.search(r"^vcpu (\d) id 1 seq (\d+) ip 0x[0-9a-f]+$", event).groups()
    assert ("kvmi_event_done", f"vcpu {vcpu} id 1 seq {seq} action none") in said, said
    restored = [text for name, text in said if name == "kvmi_restore"]
    assert len(restored) == len(COLD) and all(re.fullmatch(rf"{vm} gpa 0x[0-9a-f]+ byte 0x[0-9a-f]+ restored", t) for t in restored), restored
    assert any(name == "kvmi_command" for name, _ in said), said
    g.wait_alive()


@scenario()
def fault_host_suspended(g):
    """The host's processes are frozen, as for its suspension, while a tool hangs with an event open; all go on afterwards."""
    with KernelLog() as log, hook(g, *HOT) as tool:
        mark, sessions = g.qmp.mark(), info(g)["sessions"]
        tool.signal(signal.SIGSTOP)
        wait_until(lambda: stands_still(g), 20, "the guest to stand still")
        Path("/sys/module/suspend/parameters/pm_test_delay").write_text("1")
        Path("/sys/power/pm_test").write_text("freezer")
        try:
            Path("/sys/power/state").write_text("freeze")
        finally:
            Path("/sys/power/pm_test").write_text("none")
        assert any("suspend debug: Waiting" in text for _, text in log.read()), log.lines
        assert stands_still(g), "the guest went on without the tool's answer"
        told = tool.mark()
        tool.signal(signal.SIGCONT)
        tool.event("hit", since=told, count=20, timeout=60)
        i = info(g)
        assert (i["state"], i["sessions"]) == ("hooked", sessions), i
        assert not [e for e in g.qmp.events[mark:] if e["event"].startswith("KVMI_")], g.qmp.events[mark:]
        tool.signal(signal.SIGINT)
        tool.finish()
    g.wait_alive()


def stands_still(g):
    calls = g.calls()[0]
    time.sleep(1)
    return g.calls()[0] == calls


# --- the same where everything takes long: in the Intel host, and in the AMD host with the debug kernel ---------------------


SLOW = {}


@scenario(timeout=3000, into=SLOW)
def slow_fault_running(g):
    """The tool fails while the guest just runs."""
    go_through(g, Nothing)


@scenario(timeout=3000, into=SLOW)
def slow_fault_stop(g):
    """… when the guest is paused"""
    go_through(g, Stop)


@scenario(timeout=1500, into=SLOW)
def slow_fault_migrate(g):
    """… when it is migrated"""
    go_through(g, Migrate, FEW)


@scenario(timeout=1500, into=SLOW)
def slow_fault_savevm(g):
    """… when a snapshot is made"""
    go_through(g, Savevm, FEW)


@scenario(timeout=1500, into=SLOW)
def slow_fault_reset(g):
    """… when it is reset"""
    go_through(g, Reset, FEW[2:])
    g.spoilt = True


@scenario(timeout=1500, into=SLOW)
def slow_fault_quit(g):
    """… when QEMU quits"""
    go_through(g, Quit, FEW[2:])


@scenario(timeout=1500, into=SLOW)
def slow_fault_kill(g):
    """… when QEMU is killed"""
    go_through(g, Kill, FEW[2:])


if __name__ == "__main__":
    scenarios.main({**SCENARIOS, **SLOW} if sys.argv[1:] else SCENARIOS)
