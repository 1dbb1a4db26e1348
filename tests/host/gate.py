#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way in which a guest can stop, with every kind of tool: run in the AMD host by tests/test_gate.py; by hand:

    tests/host/run amd -- tests/host/gate.py NAME…

Each combination of a way and a tool is a line of the matrix that the tests leave in build/host/matrix.md.
"""
import functools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import scenarios
from inside import (BUILD, DIR, GET_VERSION, HMP, HOT, PAUSE_VCPU, QMP, SOCKET, WRITE_PHYSICAL, Guest, QMPError, RawTool,
                    wait_until)
from scenarios import Pulse, code, cont, expect, info, same_memory, wait_state

SCENARIOS = {}
scenario = functools.partial(scenarios.scenario, into=SCENARIOS)
LONG = bool(os.environ.get("KVMI_LONG"))
DEADLINE = 1500         # ms: what a tool gets that does not leave
SLOW = 0.7              # s: what a slow tool takes

# The numbers of linux/kvmi.h that only this needs
VCPU_EVENT, PAUSE, CRASH = 1, 1, 2


# --- the tools --------------------------------------------------------------------------------------------------------


class Tool:
    """A kind of tool: how it comes, what it does while it is waited for, and how the session should end."""
    outcome = None          # None: there is no session to end
    least, most = 0, DEADLINE / 1000 - 0.1      # s: how long it may take to end the session
    planted = False         # it has breakpoints in the guest

    def __init__(self, g):
        self.g = g

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def during(self, mark):
        """What it does when the way has begun."""

    def unhooking(self, mark):
        self.g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="unhooking")


class NoTool(Tool):
    name = "none"


class Prompt(Tool):
    """kvmi watch, with breakpoints in functions that the guest calls all the time"""
    name, outcome, planted, options = "prompt", "clean", True, ()
    breaks, hits = HOT, 3

    def __enter__(self):
        self.watch = scenarios.hook(self.g, *self.breaks, hits=self.hits, options=self.options)
        return self

    def __exit__(self, *exc):
        self.watch.kill()


class Hung(Prompt):
    """Hangs before it is asked to leave"""
    name, outcome = "hung", "forced"
    least, most = DEADLINE / 1000 - 0.1, DEADLINE / 1000 + 2

    def __enter__(self):
        super().__enter__()
        self.watch.signal(signal.SIGSTOP)
        return self


class Aside(Hung):
    """Hangs with breakpoints where the guest doesn't come by: no vCPU waits for it"""
    name = "hung, vCPUs free"
    breaks, hits = ("kernel_halt", "kernel_power_off", "emergency_restart"), 0


class Slow(Hung):
    """Takes its time, but leaves"""
    name, outcome = "slow", "clean"
    least, most = SLOW - 0.2, DEADLINE / 1000 - 0.1

    def during(self, mark):
        threading.Timer(SLOW, self.watch.signal, [signal.SIGCONT]).start()


class Killed(Hung):
    """Dies while it is waited for: what it has planted, KVM takes out"""
    name, outcome = "killed", "disconnected"
    least, most = 0, DEADLINE / 1000 - 0.1

    def during(self, mark):
        self.unhooking(mark)
        self.watch.kill()


class Deaf(Tool):
    """Not subscribed to the event that asks it to leave"""
    name, outcome, most = "deaf", "not-subscribed", 1

    def __enter__(self):
        self.raw = RawTool()
        mark = self.g.qmp.mark()
        self.raw.accept().answer()
        wait_state(self.g, "hooked", mark)
        return self

    def __exit__(self, *exc):
        self.raw.__exit__()


class Chatty(Deaf):
    """Hears that it is to leave, and goes on sending commands"""
    name, outcome = "chatty", "forced"
    least, most = Hung.least, Hung.most

    def __enter__(self):
        super().__enter__()
        self.raw.subscribe_unhook()
        self.commands = 0
        return self

    def chatter(self):
        try:
            self.raw.await_unhook(120)
            while True:
                self.raw.command(GET_VERSION)
                self.commands += 1
        except OSError:         # EOF is the end that should come
            pass
        except EOFError:
            pass

    def during(self, mark):
        self.thread = threading.Thread(target=self.chatter)
        self.thread.start()

    def __exit__(self, *exc):
        if hasattr(self, "thread"):
            self.thread.join(20)
            assert self.commands > 20, f"only {self.commands} commands were answered"
        super().__exit__()


ALL = (NoTool, Prompt, Slow, Hung, Killed, Deaf, Chatty)
FEW = (Prompt, Hung)
# For ways that wait as others do, and take longer
USUAL = ALL if LONG else (NoTool, *FEW)


# --- the ways ---------------------------------------------------------------------------------------------------------


class Way:
    """A way to stop. As it is written here: a QMP command that returns when it is done, and a guest that runs on."""
    name = action = None
    waits = True                # is the tool waited for?
    stops = False               # is the guest stopped afterwards?
    patches = False             # does the guest's kernel patch itself on this way?

    def __init__(self, g, before):
        self.g, self.before = g, before

    def begin(self):
        self.number = self.g.qmp.send(*self.command[:1], **self.command[1])

    def done(self):
        return self.number in self.g.qmp.replies

    def check(self, tool):
        """It succeeded, and what it made has no breakpoints in it."""
        self.g.qmp.result(self.number, 1)
        if self.stops:
            self.same_code(code(self.g), f"stopped by {self.name}")

    def after(self):
        """Have the guest run again."""
        if self.stops:
            self.g.qmp.execute("cont")

    def same_code(self, now, what):
        if self.patches:
            places = scenarios.breakpoint_offsets(self.g, HOT + Aside.breaks)
            assert [now[p] for p in places] == [self.before[p] for p in places], f"{what}: a breakpoint is left"
        else:
            same_memory(self.before, now, what)


def record(*cells):
    print("MATRIX\t" + "\t".join(str(c) for c in cells), flush=True)


def combine(g, way_class, tools, options=None):
    """One way with several tools."""
    before = code(g)
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    for tool_class in tools:
        print(f"--- {way_class.name}, {tool_class.name}", flush=True)
        way = way_class(g, before)
        with tool_class(g) as tool:
            mark, pulse, begin = g.qmp.mark(), Pulse(g), time.monotonic()
            way.begin()
            if way.waits:
                tool.during(mark)
            pulse.until(way.done, 60, f"{way.name} to end, with a tool that is {tool.name}")
            took = time.monotonic() - begin
            pulse.beat()        # and with it, what QMP had to tell so far
            ends = [e["data"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_UNHOOKED"]
            if tool.outcome is None:
                assert not ends, ends
                outcome, ms = "–", 0
            else:
                assert ends, f"no KVMI_UNHOOKED: {[e['event'] for e in g.qmp.events[mark:]]}"
                end, ms = ends[0], ends[0]["duration"] / 1000
                assert end["action"] == way.action, end
                outcome = end["outcome"]
                expect(tool.outcome if way.waits else "forced", end)
                if tool_class is Aside:
                    # what it could not take out, KVM has
                    assert end["restored"] == len(tool.breaks), end
                if way.waits:
                    most = tool.most + 4 * pulse.lag
                    assert tool.least <= ms / 1000 <= most, f"{ms} ms: {tool.least} to {most} s were expected"
                # Once, unless the guest runs on already and the tool has come and gone again
                assert len(ends) == 1 or not way.stops, ends
                if way.waits and tool_class in (Slow, Hung):
                    assert "unhooking" in pulse.states, pulse.states
            pulse.check()
            way.check(tool)
        way.after()
        g.wait_alive()
        if tool.planted:
            wait_state(g, "connecting")
            way.same_code(code(g), f"running again after {way.name}, the tool gone")
        record(way.name, tool.name, outcome, f"{ms:.0f}", f"{took * 1000:.0f}", f"{max(pulse.ms):.0f}")


# --- migration --------------------------------------------------------------------------------------------------------


class Target:
    """A second QEMU that migrates in and stays paused."""

    def __init__(self, uri, kvmi=False, capabilities=(), extra=()):
        self.guest = Guest(Path("/run/target"))
        self.guest.start(kvmi=kvmi, extra=("-S", "-incoming", "defer", *extra), alive=False)
        set_capabilities(self.guest, *capabilities)
        self.guest.qmp.execute("migrate-incoming", uri=uri)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.guest.kill()

    def loaded(self, timeout=60):
        wait_until(lambda: self.guest.qmp.execute("query-migrate").get("status") in ("completed", "failed"), timeout, "the target to have loaded")
        assert self.guest.qmp.execute("query-migrate")["status"] == "completed"
        # Paused, as -S says
        return self


def set_capabilities(g, *names):
    g.qmp.execute("migrate-set-capabilities", capabilities=[
        {"capability": c, "state": c in names} for c in ("events", "multifd", "postcopy-ram", "background-snapshot")])


def migrate_status(g):
    return g.qmp.execute("query-migrate").get("status")


def same_code_in_target(before, g, target, what):
    """The target has the guest of g: it must have its code, too."""
    start, end, _ = g.text()
    same_memory(before, target.dump(start, end), what)


class MigrateFile(Way):
    """Pre-copy to a file, as for a managed save of a running guest; the file is loaded and looked at."""
    name, action = "migrate to a file", "migrate"
    stops = True
    uri, capabilities = f"file:{DIR}/saved", ()

    def begin(self):
        set_capabilities(self.g, *self.capabilities)
        self.g.qmp.execute("migrate", uri=self.uri)

    def done(self):
        return migrate_status(self.g) in ("completed", "failed", "cancelled")

    def check(self, tool):
        g = self.g
        assert migrate_status(g) == "completed", g.qmp.execute("query-migrate")
        if self.stops:
            same_memory(self.before, code(g), f"migrated: {self.name}")
        if tool.planted:
            with Target(self.uri) as target:
                target.loaded()
                same_code_in_target(self.before, g, target.guest, "loaded from the file")
        os.unlink(f"{DIR}/saved")


class MigrateFd(MigrateFile):
    """Likewise, to a file that the management has opened, as libvirt does it."""
    name = "migrate to an fd"

    def begin(self):
        with open(f"{DIR}/saved", "wb") as f:
            self.g.qmp.result(self.g.qmp.send("getfd", fds=[f.fileno()], fdname="saved"))
        set_capabilities(self.g)
        self.g.qmp.execute("migrate", uri="fd:saved")


class BackgroundSnapshot(MigrateFile):
    name, capabilities, stops = "background snapshot", ("background-snapshot",), False


@scenario(timeout=200)
def gate_migrate_to_file(g):
    """Migration to a file, with all kinds of tools."""
    combine(g, MigrateFile, ALL)


@scenario()
def gate_migrate_to_fd(g):
    """Migration to a file that is open already."""
    combine(g, MigrateFd, (NoTool, Prompt, Hung))


@scenario()
def gate_background_snapshot(g):
    """A background snapshot: the guest runs on, but the tool comes back only when it is complete."""
    combine(g, BackgroundSnapshot, (Prompt,))


def live(g, *capabilities):
    """Migrate to a second QEMU with the tool following; returns the time that it took."""
    before = code(g)
    name = " ".join(capabilities) or "pre-copy"
    uri = "unix:/run/migration"
    with Prompt(g) as tool, Target(uri, kvmi=True, capabilities=capabilities) as target:
        t = target.guest
        set_capabilities(g, *capabilities)
        mark, tool_mark, pulse, begin = g.qmp.mark(), tool.watch.mark(), Pulse(g), time.monotonic()
        g.qmp.execute("migrate", uri=uri)
        if "postcopy-ram" in capabilities:
            wait_until(lambda: migrate_status(g) in ("active", "postcopy-active", "completed"), 20, "the migration to begin")
            g.qmp.execute("migrate-start-postcopy")
        pulse.until(lambda: migrate_status(g) in ("completed", "failed"), 60, "the migration to end")
        took = time.monotonic() - begin
        assert migrate_status(g) == "completed", g.qmp.execute("query-migrate")
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        expect("clean", end)
        assert end["action"] == "migrate", end
        states = [e["data"]["state"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_STATE_CHANGED"]
        assert states == ["unhooking", "unhooked"], f"on the source: {states}"
        target.loaded()
        same_code_in_target(before, g, t, "the paused target")
        # The tool is let in there as soon as the guest runs.
        assert info(t)["state"] == "unhooked", info(t)
        t.qmp.execute("cont")
        wait_state(t, "hooked")
        tool.watch.event("hit", since=tool_mark, count=5, timeout=60)
        t.wait_alive()
        record(f"migrate live, {name}", tool.name, end["outcome"], f"{end['duration'] / 1000:.0f}", f"{took * 1000:.0f}", f"{max(pulse.ms):.0f}")
    # The guest of the source is the same one, and the one we go on with
    cont(g)
    same_memory(before, code(g), "back on the source")


@scenario()
def gate_migrate_live(g):
    """Pre-copy: the tool leaves on the source and comes back on the target."""
    live(g)


@scenario()
def gate_migrate_multifd(g):
    """Likewise with several channels."""
    live(g, "multifd")


@scenario()
def gate_migrate_postcopy(g):
    """Likewise with post-copy."""
    live(g, "postcopy-ram")


@scenario()
def gate_migrate_cancelled(g):
    """A migration cancelled while the tool is waited for ends at once, and the tool is let in again; so after one that failed."""
    with Hung(g) as tool:
        set_capabilities(g)
        mark = g.qmp.mark()
        g.qmp.execute("migrate", uri=f"file:{DIR}/saved")
        wait_until(lambda: migrate_status(g) == "wait-unplug", 5, "the state wait-unplug")
        begin = time.monotonic()
        g.qmp.execute("migrate_cancel")
        wait_until(lambda: migrate_status(g) == "cancelled", 5, "the end of the migration", pause=0.01)
        took = time.monotonic() - begin
        assert took < 1, f"the migration was cancelled after {took:.2f} s"
        tool.watch.signal(signal.SIGCONT)
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        wait_state(g, "hooked", mark)
        assert g.qmp.execute("query-status")["running"]
    with Prompt(g) as tool:
        mark, tool_mark = g.qmp.mark(), tool.watch.mark()
        g.qmp.execute("migrate", uri="exec:exit 1")
        wait_until(lambda: migrate_status(g) == "failed", 30, "the migration to fail")
        g.qmp.event("KVMI_UNHOOKED", since=mark, action="migrate", outcome="clean")
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
        tool.watch.event("hit", since=tool_mark, count=3, timeout=60)
        g.wait_alive()
        # and once more, which works
        mark = g.qmp.mark()
        g.qmp.execute("migrate", uri="exec:cat >/dev/null")
        wait_until(lambda: migrate_status(g) == "completed", 60, "the migration")
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark, action="migrate")["data"])
        cont(g)


@scenario()
def gate_migrate_target_only(g):
    """Only the target has an object: the guest is hooked there, when it runs."""
    scenarios.remove_object(g)
    g.qmp.execute("chardev-remove", id="tool")
    set_capabilities(g)
    g.qmp.execute("migrate", uri=f"file:{DIR}/saved")
    wait_until(lambda: migrate_status(g) == "completed", 30, "the migration")
    with Target(f"file:{DIR}/saved", kvmi=True) as target, RawTool() as tool:
        target.loaded()
        assert info(target.guest)["state"] == "unhooked", info(target.guest)
        target.guest.qmp.execute("cont")
        tool.accept().answer()
        wait_state(target.guest, "hooked")
        target.guest.wait_alive()
    add_chardev(g)
    cont(g)


@scenario(timeout=300, guest=False)
def gate_migrate_stock(_):
    """To stock QEMU and back: the stream is the same with the object as without it."""
    stock, there, back = BUILD / "qemu-stock/bin/qemu-system-x86_64", Guest(Path("/run/stock")), Guest(Path("/run/back"))
    g = Guest().start()
    started = []
    try:
        for name, source, target, qemu, kvmi in (("there", g, there, stock, False), ("back", there, back, g.qemu, True)):
            target.qemu = qemu
            target.start(kvmi=kvmi, extra=("-S", "-incoming", "defer"), alive=False)
            started.append(target)
            with Prompt(g) if source is g else NoTool(g) as tool:
                for side in (source, target):
                    set_capabilities(side)
                target.qmp.execute("migrate-incoming", uri=f"unix:/run/migrate-{name}")
                source.qmp.execute("migrate", uri=f"unix:/run/migrate-{name}")
                wait_until(lambda: migrate_status(source) in ("completed", "failed"), 60, "the migration")
                assert migrate_status(source) == "completed", source.qmp.execute("query-migrate")
                wait_until(lambda: migrate_status(target) in ("completed", "failed"), 60, "the target")
                assert migrate_status(target) == "completed", (target.dir / "stderr").read_text()
                if tool.planted:
                    tool.watch.signal(signal.SIGTERM)
            target.qmp.execute("cont")
            target.wait_alive()
            print(f"migrated {name}: {target.qmp.execute('query-version')}")
    finally:
        for guest in (g, *started):
            guest.kill()


@scenario()
def gate_stop_then_migrate(g):
    """What libvirt does for save and managed save: the tool is waited for once, at the stop."""
    before = code(g)
    with Prompt(g):
        mark = g.qmp.mark()
        expect("clean", scenarios.stop(g)[0])
        set_capabilities(g)
        g.qmp.execute("migrate", uri=f"file:{DIR}/saved")
        wait_until(lambda: migrate_status(g) == "completed", 30, "the migration")
        seen = [(e["event"], e["data"]) for e in g.qmp.events[mark:] if e["event"] in ("KVMI_UNHOOKED", "KVMI_STATE_CHANGED")]
        assert len(seen) == 3, seen         # unhooking, KVMI_UNHOOKED, unhooked
        statuses = [e["data"]["status"] for e in g.qmp.events[mark:] if e["event"] == "MIGRATION"]
        assert "wait-unplug" not in statuses, statuses
    with Target(f"file:{DIR}/saved") as target:
        target.loaded()
        same_code_in_target(before, g, target.guest, "loaded from the file")
    cont(g)


def add_chardev(g):
    g.qmp.execute("chardev-add", id="tool", backend={"type": "socket", "data": {
        "addr": {"type": "unix", "data": {"path": str(SOCKET)}}, "server": False, "reconnect-ms": 100}})


def hello(g):
    """Start time that a tool is told."""
    with RawTool() as tool:
        tool.accept()
        return tool.start_time


@scenario()
def gate_migrate_start_time(g):
    """The start time travels if both sides have migrate-start-time=on; if only the source has it, the target says so and the guest runs on."""
    uri = f"file:{DIR}/saved"
    scenarios.remove_object(g)
    g.qmp.execute("object-add", **g.kvmi_options(migrate_start_time=True))
    started = hello(g)
    set_capabilities(g)
    time.sleep(1.1)         # the start time counts seconds
    g.qmp.execute("migrate", uri=uri)
    wait_until(lambda: migrate_status(g) == "completed", 30, "the migration")
    # or it would be the source, which has stopped, that connects
    scenarios.remove_object(g)
    g.qmp.execute("chardev-remove", id="tool")
    with Target(uri, extra=("-object", "kvmi,id=k,chardev=tool,migrate-start-time=on")) as target:
        target.loaded()
        target.guest.qmp.execute("cont")
        there = hello(target.guest)
        assert there == started, f"started at {started}, on the target at {there}"
    target = Guest(Path("/run/target"))
    target.start(kvmi=False, extra=("-S", "-incoming", uri), alive=False)
    try:
        wait_until(lambda: "'kvmi'" in (target.dir / "stderr").read_text(), 20, "the target's error")
    finally:
        target.kill()
    print((target.dir / "stderr").read_text())
    add_chardev(g)
    cont(g)


# --- pause, debugger --------------------------------------------------------------------------------------------------


class Stop(Way):
    name, action, stops = "stop (QMP)", "stop", True
    command = ("stop", {})


class Human(Way):
    """A command of the human monitor, as libvirt gives them: through QMP"""

    def begin(self):
        self.number = self.g.qmp.send("human-monitor-command", command_line=self.line)

    def check(self, tool):
        assert self.g.qmp.result(self.number, 1) == "", self.g.qmp.replies[self.number]
        super().check(tool)


class HumanStop(Human):
    name, action, stops, line = "stop (HMP)", "stop", True, "stop"


class Debugger(Way):
    """A debugger connects and asks why the guest has stopped."""
    name, action, stops = "gdb", "debug", True

    def begin(self):
        path = f"{DIR}/gdb"
        if not os.path.exists(path):
            self.g.hmp(f"gdbserver unix:{path},server=on,wait=off")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.sendall(b"$?#3f")
        self.sock.setblocking(False)
        self.got = b""

    def done(self):
        try:
            self.got += self.sock.recv(4096)
        except BlockingIOError:
            pass
        return b"$T" in self.got

    def check(self, tool):
        assert self.g.qmp.execute("query-status")["status"] == "paused"
        same_memory(self.before, code(self.g), "stopped by a debugger")

    def after(self):
        self.sock.setblocking(True)
        self.sock.sendall(b"+$D#44")
        wait_until(lambda: self.g.qmp.execute("query-status")["running"], 10, "the guest to run when gdb is detached")
        self.sock.close()


@scenario()
def gate_gdb_interrupts(g):
    """What a debugger sends in one piece with its ^C is for the stopped guest, too: it is answered when the tool was waited for."""
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    gdb = Debugger(g, None)
    gdb.begin()
    wait_until(gdb.done, 10, "gdb's stop")
    gdb.sock.sendall(b"+$c#63")
    wait_until(lambda: g.qmp.execute("query-status")["running"], 10, "the guest to run on")
    with Hung(g) as tool:
        mark = g.qmp.mark()
        gdb.sock.sendall(b"\x03$qAttached#8f")
        tool.unhooking(mark)
        gdb.got = b""
        wait_until(lambda: gdb.done() and b"+$1#31" in gdb.got, 20, f"the answers to ^C and to what came with it: {gdb.got}")
        expect("forced", g.qmp.event("KVMI_UNHOOKED", since=mark, action="debug")["data"])
        assert g.qmp.execute("query-status")["status"] == "paused"
        gdb.after()
    g.wait_alive()


@scenario(timeout=200)
def gate_stop(g):
    """QMP's stop, with all kinds of tools."""
    combine(g, Stop, ALL)


INTEL = {}


@scenario(timeout=900, into=INTEL)
def intel_stop(g):
    """On the Intel host: QMP's stop with a tool that leaves, and with one that hangs."""
    combine(g, Stop, (NoTool, *FEW))


VSOCK = "5000"


class OnVsock(Prompt):
    name, options = "prompt, on vsock", ("--socket", f"vsock:{VSOCK}")


class HungOnVsock(Hung):
    name, options = "hung, on vsock", OnVsock.options


class KilledOnVsock(Killed):
    name, options = "killed, on vsock", OnVsock.options


@scenario()
def gate_vsock(g):
    """The tool listens on vsock, as it would in a VM of its own: the kernel's loopback stands for that."""
    for m in ("vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"):
        if not os.path.exists(f"/sys/module/{m}"):
            subprocess.run(["insmod", BUILD / f"linux/stock/{m}.ko"], check=True, timeout=20)
    scenarios.remove_object(g)
    g.qmp.execute("chardev-add", id="vsock", backend={"type": "socket", "data": {
        "addr": {"type": "vsock", "data": {"cid": "1", "port": VSOCK}}, "server": False, "reconnect-ms": 100}})
    g.qmp.execute("object-add", **g.kvmi_options(chardev="vsock"))
    assert info(g)["peer"] == f"vsock:1:{VSOCK}", info(g)
    combine(g, Stop, (OnVsock, HungOnVsock, KilledOnVsock))
    scenarios.remove_object(g)
    g.qmp.execute("chardev-remove", id="vsock")


@scenario(timeout=150)
def gate_stop_by_others(g):
    """The human monitor's stop, and a debugger's."""
    combine(g, HumanStop, (Prompt,))
    combine(g, Debugger, (NoTool, *FEW))


# --- snapshots and dumps ----------------------------------------------------------------------------------------------


class Savevm(Human):
    """An internal snapshot; it is loaded to look at it, which cuts off whoever is there."""
    name, action, line = "savevm", "save", "savevm snap"

    def check(self, tool):
        super().check(tool)
        if tool.planted:
            g = self.g
            g.qmp.execute("stop")
            assert g.qmp.execute("human-monitor-command", command_line="loadvm snap", timeout=60) == ""
            same_memory(self.before, code(g), "the snapshot")
            g.qmp.execute("cont")
        assert self.g.qmp.execute("human-monitor-command", command_line="delvm snap") == ""


class SnapshotSave(Savevm):
    name = "snapshot-save"
    serial = 0

    def begin(self):
        SnapshotSave.serial += 1
        self.job = f"save{self.serial}"
        self.g.qmp.execute("snapshot-save", job_id=self.job, tag="snap", vmstate="disk", devices=["disk"])

    def state(self):
        return next(j for j in self.g.qmp.execute("query-jobs") if j["id"] == self.job)

    def done(self):
        return self.state()["status"] == "concluded"

    def check(self, tool):
        assert "error" not in self.state(), self.state()
        self.g.qmp.execute("job-dismiss", id=self.job)
        self.number = self.g.qmp.send("human-monitor-command", command_line="")
        self.g.qmp.result(self.number)
        super().check(tool)


def dumped(path, start, end):
    """The guest's memory from start to end in an ELF dump."""
    with open(path, "rb") as f:
        head = f.read(64)
        offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        for i in range(count):
            f.seek(offset + i * size)
            kind, _, where, _, physical, length = struct.unpack("<IIQQQQ", f.read(40))
            if kind == 1 and physical <= start and end <= physical + length:
                f.seek(where + start - physical)
                return f.read(end - start)
    raise AssertionError("the dump does not have the kernel's code")


class Dump(Way):
    name, action, file, detach = "dump-guest-memory", "save", f"{DIR}/elf", False

    def begin(self):
        self.mark = self.g.qmp.mark()
        self.number = self.g.qmp.send("dump-guest-memory", paging=False, protocol=f"file:{self.file}", detach=self.detach)

    def done(self):
        return self.number in self.g.qmp.replies and any(e["event"] == "DUMP_COMPLETED" for e in self.g.qmp.events[self.mark:])

    def check(self, tool):
        super().check(tool)
        assert self.g.qmp.execute("query-dump")["status"] == "completed"
        start, end, _ = self.g.text()
        same_memory(self.before, dumped(self.file, start, end), "the dump")
        os.unlink(self.file)


class DumpDetached(Dump):
    name, detach = "dump-guest-memory, detached", True


class DumpHuman(Dump, Human):
    name, line = "dump-guest-memory (HMP)", f"dump-guest-memory {Dump.file}"

    def begin(self):
        self.mark = self.g.qmp.mark()
        Human.begin(self)


@scenario(timeout=200)
def gate_savevm(g):
    """An internal snapshot by HMP's savevm."""
    combine(g, Savevm, USUAL)


@scenario(timeout=120)
def gate_snapshot_save(g):
    """An internal snapshot by QMP's job."""
    combine(g, SnapshotSave, FEW)


@scenario(timeout=120)
def gate_snapshot_save_cancelled(g):
    """The job can be cancelled while it waits, and then nothing is saved; the guest has not even stopped."""
    with Hung(g) as tool:
        mark = g.qmp.mark()
        way = SnapshotSave(g, None)
        way.begin()
        tool.unhooking(mark)
        g.qmp.execute("job-cancel", id=way.job)
        wait_until(way.done, 1, "the job to end", pause=0.01)
        assert way.state().get("error"), way.state()
        g.qmp.execute("job-dismiss", id=way.job)
        tool.watch.signal(signal.SIGCONT)
        wait_state(g, "hooked", mark)
        kinds = [e["event"] for e in g.qmp.events[mark:]]
        assert "STOP" not in kinds, kinds
        assert "no snapshot" in g.qmp.execute("human-monitor-command", command_line="info snapshots")


@scenario(timeout=200)
def gate_dump(g):
    """dump-guest-memory: the guest runs on until the tool has left, stops for the dump, and the tool comes back."""
    combine(g, Dump, USUAL)


@scenario(timeout=120)
def gate_dump_otherwise(g):
    """Detached, and by HMP."""
    combine(g, DumpDetached, FEW)
    combine(g, DumpHuman, (Prompt,))


@scenario(timeout=120)
def gate_several_at_once(g):
    """While a snapshot waits: a stop, a cont, a dump, and the client that asked for the snapshot leaves. Each gets what it wanted."""
    before = code(g)
    with Hung(g) as tool:
        mark, human, other = g.qmp.mark(), HMP(), QMP(DIR / "qmp2")
        other.send("human-monitor-command", command_line="savevm snap")
        tool.unhooking(mark)
        human.send("stop")
        other.close()
        time.sleep(0.3)
        g.qmp.execute("query-kvmi", oob=True)
        tool.watch.signal(signal.SIGCONT)
        human.prompt("stop")
        assert g.qmp.execute("query-status")["status"] == "paused"
        ends = [e["data"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_UNHOOKED"]
        assert [e["outcome"] for e in ends] == ["clean"], ends
        same_memory(before, code(g), "after savevm and stop")
        assert "snap" in g.qmp.execute("human-monitor-command", command_line="info snapshots")
        cont(g)
        wait_state(g, "hooked", mark)
        # cont isn't the contrary of a dump: it is made, and the guest runs on
        tool.watch.signal(signal.SIGSTOP)
        mark = g.qmp.mark()
        way = Dump(g, before)
        way.begin()
        tool.unhooking(mark)
        human.send("cont")
        human.prompt("cont")
        tool.watch.signal(signal.SIGCONT)
        wait_until(lambda: g.qmp.execute("query-kvmi", oob=True) and way.done(), 30, "the dump")
        way.check(tool)
        human.sock.close()
        assert g.qmp.execute("query-status")["running"]
    assert g.qmp.execute("human-monitor-command", command_line="delvm snap") == ""


# --- what can't wait --------------------------------------------------------------------------------------------------


class Load(Human):
    """Return to a snapshot while a tool is there"""
    name, action, waits, line = "loadvm", "load", False, "loadvm snap"


class SnapshotLoad(SnapshotSave):
    name, action, waits = "snapshot-load", "load", False

    def begin(self):
        SnapshotSave.serial += 1
        self.job = f"load{self.serial}"
        self.g.qmp.execute("snapshot-load", job_id=self.job, tag="snap", vmstate="disk", devices=["disk"])

    def check(self, tool):
        assert "error" not in self.state(), self.state()
        self.g.qmp.execute("job-dismiss", id=self.job)


class FromInside(Way):
    """Something that happens in the guest stops it. Not with a tool that hangs with hot breakpoints: the vCPUs wait for it then."""
    waits, stops = False, True

    def begin(self):
        self.mark = self.g.qmp.mark()
        self.g.tell(self.what)

    def done(self):
        return any(e["event"] == "STOP" for e in self.g.qmp.events[self.mark:])

    def check(self, tool):
        assert self.g.qmp.execute("query-status")["status"] == self.status
        self.same_code(code(self.g), f"stopped by {self.name}")


class Panic(FromInside):
    name, action, status, what = "guest panic", "guest-panic", "guest-panicked", "out 505 1"


class Watchdog(FromInside):
    name, action, status, what = "watchdog", "watchdog", "watchdog", "out 443 f"


@scenario(timeout=300)
def gate_cut(g):
    """What can't wait cuts the tool off at once, and leaves the guest clean all the same; the tool is back when the guest runs."""
    g.qmp.execute("set-action", panic="pause", watchdog="pause")
    for way in (Panic, Watchdog):
        combine(g, way, (Prompt, Aside, Deaf))
    assert g.qmp.execute("human-monitor-command", command_line="savevm snap", timeout=30) == ""
    for way in (Load, SnapshotLoad):
        combine(g, way, FEW)
    with Prompt(g) as tool:
        mark, tool_mark = g.qmp.mark(), tool.watch.mark()
        assert g.qmp.execute("human-monitor-command", command_line="loadvm snap", timeout=30) == ""
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
        tool.watch.event("hit", since=tool_mark, count=3, timeout=60)
        # Deleting one is nobody's business
        mark = g.qmp.mark()
        g.qmp.execute("snapshot-delete", job_id="delete", tag="snap", devices=["disk"])
        wait_until(lambda: g.qmp.execute("query-jobs")[0]["status"] == "concluded", 20, "the snapshot to go")
        assert "error" not in g.qmp.execute("query-jobs")[0], g.qmp.execute("query-jobs")
        g.qmp.execute("job-dismiss", id="delete")
        assert info(g)["state"] == "hooked" and not [e for e in g.qmp.events[mark:] if e["event"].startswith("KVMI")], g.qmp.events[mark:]


def used(store):
    """Bytes of a file system that are in use"""
    s = os.statvfs(store)
    return (s.f_blocks - s.f_bavail) * s.f_frsize


def resize(store, size):
    return subprocess.run(["mount", "-o", f"remount,size={size}", store], stderr=subprocess.DEVNULL, timeout=20).returncode == 0


class DiskFull(FromInside):
    """The guest writes to a disk whose file has no room to grow; it goes on when there is some."""
    name, action, status, store = "I/O error", "io-error", "io-error", Path("/run/store")
    patches = True              # in its network's code

    def begin(self):
        self.mark = self.g.qmp.mark()
        # as large as it is, which the guest's next writes exceed
        wait_until(lambda: resize(self.store, used(self.store) + (64 << 10)), 10, "the file system to be full", pause=0)

    def check(self, tool):
        super().check(tool)
        self.g.qmp.event("BLOCK_IO_ERROR", since=self.mark, action="stop", nospace=True)

    def after(self):
        assert resize(self.store, 1 << 30)
        wrote = self.g.wrote()[0]
        self.g.qmp.execute("cont")
        wait_until(lambda: self.g.wrote()[0] > wrote, 30, "the guest to write on")


def echo(qemu, here):
    """The other end of a network: sends back what it gets."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(here)

    def loop():
        while True:
            try:
                sock.sendto(sock.recv(2048), qemu)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                pass
    threading.Thread(target=loop, daemon=True).start()


@scenario(timeout=300, guest=False)
def gate_disk_and_network(_):
    """A guest that writes to its disk and talks on its network, in a QEMU in the sandbox that libvirt gives it. Neither stands still while a
    tool is waited for; a disk that fills up stops the guest at once."""
    store = DiskFull.store
    store.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={1 << 30}", "store", store], check=True, timeout=20)
    echo(f"{store}/qemu", f"{store}/echo")
    (store / "data").touch()
    os.truncate(store / "data", 4 << 30)
    g = Guest().start(extra=(
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-blockdev", f"raw,node-name=data,file.driver=file,file.filename={store}/data", "-device", "virtio-blk-device,drive=data",
        "-netdev", f"dgram,id=net,local.type=unix,local.path={store}/qemu,remote.type=unix,remote.path={store}/echo",
        "-device", "virtio-net-device,netdev=net"))
    status = Path(f"/proc/{int((DIR / 'pid').read_text())}/status").read_text()
    assert "\nSeccomp:\t2\n" in status, status
    g.ask("write", "writes")
    g.ask("echo", "echoes")
    # The network code patches itself, at first most of all
    wait_until(lambda: g.wrote()[0] and g.echoes()[0] > 20, 30, "the guest to write and to hear its echo")
    before = code(g)
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=4000)
    with Aside(g) as tool:
        mark, number, pulse, did = g.qmp.mark(), g.qmp.send("stop"), Pulse(g), []
        tool.unhooking(mark)

        def stopped():
            did.append((g.wrote()[0], g.echoes()[0]))
            return number in g.qmp.replies
        pulse.until(stopped, 20, "the answer to stop")
        pulse.check()
        expect("forced", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        for what, counts in zip(("blocks written", "echoes heard"), zip(*did)):
            print(f"{what} while the tool was waited for: {counts[-1] - counts[0]}, as told {len(set(counts))} times")
            assert len(set(counts)) > 2, f"{what}: {counts}"
        DiskFull(g, before).same_code(code(g), "paused after the deadline")
        cont(g)
    combine(g, DiskFull, (NoTool, Prompt, Aside, Deaf))
    assert g.wrote()[1] == 0, f"{g.wrote()[1]} writes failed in the guest"
    g.kill()
    subprocess.run(["umount", "-l", store], check=True, timeout=20)


def wild_bios():
    """A BIOS for a whole guest: waits for a byte on the serial line, and then runs off to where there is no memory."""
    start = bytes((0xba, 0xfd, 0x03,                                # mov $0x3fd, %dx: the line's status
                   0xec, 0xa8, 0x01,                                # again: in %dx, %al; test $1, %al
                   0x74, 0xfb,                                      # jz again
                   0x66, 0x2e, 0x0f, 0x01, 0x16, 0x50, 0x00,        # lgdtl %cs:0x50
                   0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0,  # mov %cr0, %eax; or $1, %al; mov %eax, %cr0
                   0x66, 0xea, 0x00, 0x00, 0x00, 0xd0, 0x08, 0x00)) # ljmpl $8, $0xd0000000
    table = struct.pack("<QQ", 0, 0x00cf9a000000ffff)               # at 0x40: all is code
    rom = start.ljust(0x40, b"\xf4") + table + struct.pack("<HI", len(table) - 1, 0xffff0040)
    rom = rom.ljust(0xfff0, b"\xf4") + bytes((0xe9, 0x0d, 0x00))    # the reset vector: jmp to the start
    path = Path("/run/wild.bios")
    path.write_bytes(rom.ljust(0x10000, b"\xf4"))
    return path


@scenario(guest=False)
def gate_internal_error(_):
    """KVM can't run the guest any more: paused at once, its memory is clean."""
    place = 0x8000
    g = Guest().start(machine="q35", vcpus=1, alive=False, extra=("-bios", wild_bios()))
    with RawTool() as tool:
        tool.accept().answer()
        wait_state(g, "hooked")
        before = g.dump(place, place + 16)
        assert tool.command(WRITE_PHYSICAL, struct.pack("=QHHI", place, 1, 0, 0) + b"\xcc")[0] == 0
        assert g.dump(place, place + 16) != before
        mark, begin = g.qmp.mark(), time.monotonic()
        g.tell("x")
        g.qmp.event("STOP", since=mark)
        took = time.monotonic() - begin
        assert g.qmp.execute("query-status")["status"] == "internal-error"
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        expect("forced", end)
        assert (end["action"], end["restored"]) == ("internal-error", 1), end
        assert g.dump(place, place + 16) == before, "a breakpoint is left"
        record("internal error", "raw", end["outcome"], f"{end['duration'] / 1000:.0f}", f"{took * 1000:.0f}", "–")
        try:
            g.qmp.execute("cont")
            raise AssertionError("the guest runs on after an internal error")
        except QMPError as e:
            print(e)
    g.kill()


@scenario()
def gate_crash(g):
    """The tool answers that the guest has crashed: paused as if it had panicked, and it can be continued."""
    before = code(g)
    g.qmp.execute("set-action", panic="pause")
    with RawTool() as tool:
        tool.accept().answer()
        wait_state(g, "hooked")
        places = [g.text()[0] + o for o in scenarios.breakpoint_offsets(g, Aside.breaks)]
        for gpa in places:
            assert tool.command(WRITE_PHYSICAL, struct.pack("=QHHI", gpa, 1, 0, 0) + b"\xcc")[0] == 0
        mark = g.qmp.mark()
        tool.sock.sendall(struct.pack("=HHIHBBI", PAUSE_VCPU, 8, 1000, 0, 0, 0, 0))
        while True:
            ident, seq, data = tool.message()
            if ident == VCPU_EVENT and struct.unpack_from("=H", data)[0] == PAUSE:
                break
        vcpu, = struct.unpack_from("=H", data, 10)
        tool.sock.sendall(struct.pack("=HHIHHIBBHI", VCPU_EVENT, 16, seq, vcpu, 0, 0, CRASH, PAUSE, 0, 0))
        g.qmp.event("STOP", since=mark)
        assert g.qmp.execute("query-status")["status"] == "guest-panicked"
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        expect("forced", end)
        assert (end["action"], end["restored"]) == ("guest-panic", len(places)), end
        same_memory(before, code(g), "stopped by the tool")
        record("the tool's CRASH", "raw", end["outcome"], f"{end['duration'] / 1000:.0f}", "–", "–")
        mark = g.qmp.mark()
        cont(g)
        tool.accept().answer()
        wait_state(g, "hooked", mark)


class Reset(Way):
    name, action, waits, command = "system_reset", "reset", False, ("system_reset", {})

    def done(self):
        return any(e["event"] == "RESET" for e in self.g.qmp.events)


@scenario(timeout=600, fresh=True)
def gate_reset(g):
    """A reset cuts the tool off; it is let in again, and told another start time. So for one that the guest asks for (by a triple fault),
    and for the watchdog's."""
    g.qmp.execute("set-action", reboot="reset", watchdog="reset")
    with RawTool() as tool:
        tool.accept().answer()
        wait_state(g, "hooked")
        started = tool.start_time
        for why in ("system_reset", "reboot", "watchdog"):
            time.sleep(1.1)         # the start time counts seconds
            mark, boots, begin = g.qmp.mark(), g.output().count("text-physical"), time.monotonic()
            if why != "system_reset":
                g.tell({"reboot": "reboot", "watchdog": Watchdog.what}[why])
            else:
                g.qmp.execute("system_reset")
            g.qmp.event("RESET", since=mark)
            took = time.monotonic() - begin
            end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
            assert (end["action"], end["outcome"]) == ("reset", "forced"), end
            tool.accept().answer()
            g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
            assert tool.start_time > started, (tool.start_time, started)
            started = tool.start_time
            wait_until(lambda: g.output().count("text-physical") > boots, 240, "the guest to boot again")
            g.wait_alive(240)
            record(f"reset ({why})", "raw", end["outcome"], f"{end['duration'] / 1000:.0f}", f"{took * 1000:.0f}", "–")


@scenario(timeout=600, fresh=True)
def gate_shutdown(g):
    """Powered off, the guest is cut off; with on-shutdown=announce, the tool is asked to leave, within its deadline."""
    g.qmp.execute("set-action", shutdown="pause", reboot="reset")
    for mode, outcome in (("cut", "forced"), ("announce", "clean")):
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="on-shutdown", value=mode)
        with Prompt(g) as tool:
            mark, boots, begin = g.qmp.mark(), g.output().count("text-physical"), time.monotonic()
            g.tell("power off")
            g.qmp.event("SHUTDOWN", since=mark)
            took = time.monotonic() - begin
            end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
            assert (end["action"], end["outcome"]) == ("shutdown", outcome), end
            g.qmp.event("STOP", since=mark)
            left = [o for o in scenarios.breakpoint_offsets(g, HOT) if code(g)[o] == 0xcc]
            assert not left, "breakpoints are left"
            record(f"power off, on-shutdown={mode}", tool.name, outcome, f"{end['duration'] / 1000:.0f}", f"{took * 1000:.0f}", "–")
        g.qmp.execute("system_reset")
        g.qmp.execute("cont")
        wait_until(lambda: g.output().count("text-physical") > boots, 240, "the guest to boot again")
        g.wait_alive(240)
    # Quit and SIGTERM, which the tool delays for as long as it is given
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    for again in (False, True):
        if again:
            g.start()
            g.qmp.execute("qom-set", path="/objects/kvmi0", property="on-shutdown", value="announce")
        with Hung(g) as tool:
            pid, mark, begin = int((DIR / "pid").read_text()), g.qmp.mark(), time.monotonic()
            os.kill(pid, signal.SIGTERM)
            tool.unhooking(mark)
            if again:
                g.qmp.send("quit")
            g.qmp.event("SHUTDOWN", since=mark)
            took = time.monotonic() - begin
            wait_until(lambda: not os.path.exists(f"/proc/{pid}/cmdline") or not Path(f"/proc/{pid}/cmdline").read_bytes(), 20, "QEMU's end")
            if again:
                assert took < 1, f"quit on top of SIGTERM took {took} s: 5 s are the deadline"
            else:
                assert DEADLINE / 1000 - 0.1 < took < DEADLINE / 1000 + 2, took
            record("SIGTERM, on-shutdown=announce" + (", then quit" if again else ""), tool.name, "forced", "–", f"{took * 1000:.0f}", "–")
    g.spoilt = True


@scenario(timeout=120)
def gate_quit_while_others_wait(g):
    """QEMU ends while a snapshot job, a dump and a stop wait for a tool that hangs: nothing of that holds it up."""
    with Hung(g) as tool:
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=60000)
        pid, mark, human, other = int((DIR / "pid").read_text()), g.qmp.mark(), HMP(), QMP(DIR / "qmp2")
        g.qmp.execute("snapshot-save", job_id="save", tag="snap", vmstate="disk", devices=["disk"])
        tool.unhooking(mark)
        human.send(f"dump-guest-memory {DIR}/elf")
        other.send("stop")
        time.sleep(0.3)
        begin = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}/cmdline") or not Path(f"/proc/{pid}/cmdline").read_bytes(), 10, "QEMU's end")
        print(f"QEMU was gone after {time.monotonic() - begin:.1f} s")
    g.spoilt = True


# --- suspend to RAM ---------------------------------------------------------------------------------------------------


class Suspend(Way):
    name, action, patches = "suspend to RAM", "suspend", True

    def begin(self):
        self.mark = self.g.qmp.mark()
        self.g.tell("suspend")

    def done(self):
        return any(e["event"] == "SUSPEND" for e in self.g.qmp.events[self.mark:])

    def check(self, tool):
        assert self.g.qmp.execute("query-status")["status"] == "suspended"
        assert info(self.g)["state"] == "unhooked", info(self.g)
        self.same_code(code(self.g), "suspended")

    def after(self):
        self.g.qmp.execute("system_wakeup")


@scenario(timeout=600, machine="q35")
def gate_suspend(g):
    """The guest suspends to RAM and wakes up, with the object and no tool."""
    # Once only: this guest's serial line is deaf when it has woken up
    combine(g, Suspend, (NoTool,))
    g.spoilt = True


@scenario(timeout=600, machine="q35")
def gate_suspend_with_tool(g):
    """… with a tool, which is asked to leave first and comes back when the guest has woken up."""
    combine(g, Suspend, (Prompt,))
    g.spoilt = True


@scenario(timeout=600, machine="q35")
def gate_suspend_with_hung_tool(g):
    """… or doesn't leave, and is cut off."""
    combine(g, Suspend, (Aside,))
    g.spoilt = True


# --- by command, and QEMU's other options -----------------------------------------------------------------------------


@scenario()
def gate_kvmi_unhook(g):
    """kvmi-unhook empties a running guest until kvmi-hook or cont, and cuts a wait short, out of band; info kvmi tells."""
    before = code(g)
    with Prompt(g) as tool:
        for back in ("kvmi-hook", "cont"):
            mark, tool_mark = g.qmp.mark(), tool.watch.mark()
            g.qmp.execute("kvmi-unhook")
            end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
            assert (end["action"], end["outcome"], end["restored"]) == ("unhook", "clean", 0), end
            tool.watch.event("closed", since=tool_mark)
            assert g.qmp.execute("query-status")["running"] and info(g)["detached"]
            same_memory(before, code(g), "running, unhooked by command")
            g.wait_alive()
            assert info(g)["state"] == "unhooked", info(g)
            assert "kept away" in g.qmp.execute("human-monitor-command", command_line="info kvmi")
            tool_mark = tool.watch.mark()
            g.qmp.execute(back)
            tool.watch.event("hit", since=tool_mark, count=3, timeout=60)
            record(f"kvmi-unhook, {back}", tool.name, end["outcome"], f"{end['duration'] / 1000:.0f}", "–", "–")
        # A wait that is cut short
        tool.watch.signal(signal.SIGSTOP)
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=60000)
        mark = g.qmp.mark()
        number = g.qmp.send("stop")
        tool.unhooking(mark)
        g.qmp.execute("kvmi-unhook", oob=True)
        g.qmp.result(number, 5, "the answer to a stop that was cut short")
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        assert (end["action"], end["outcome"], end["reason"]) == ("stop", "forced", "unhook"), end
        # KVM has put back what the tool could not
        assert end["restored"] == len(HOT), end
        same_memory(before, code(g), "stopped, the wait cut short")
        text = g.qmp.execute("human-monitor-command", command_line="info kvmi")
        assert "forced by stop" in text and f"{len(HOT)} bytes restored" in text, text
        print(text)
        cont(g)


@scenario(timeout=300, guest=False)
def gate_started_otherwise(_):
    """-daemonize, -run-with user=, -S, and the object's old name with its old spellings, all at once."""
    g = Guest().start(kvmi=False, alive=False, extra=(
        "-daemonize", "-S", "-run-with", "user=nobody", "-object", "secret,id=cookie,data=open sesame", "-object",
        "introspection,id=kvmi0,chardev=tool,key=cookie,handshake_timeout=7,unhook_timeout=2,async_unhook=on,command=8,command=10,event=0"))
    with RawTool() as tool:
        os.chown(tool.server.getsockname(), 65534, 65534)
        assert info(g)["state"] == "unhooked", info(g)
        g.qmp.execute("cont")
        tool.accept().answer(b"open sesame")
        wait_state(g, "hooked")
        i = info(g)
        assert (i["handshake-timeout-ms"], i["unhook-timeout-ms"], i["events"]) == (7000, 2000, ["unhook"]), i
        assert i["commands"][3:] == ["vm-get-info", "vm-control-events"], i
        tool.subscribe_unhook()
        g.wait_alive(240)
        status = Path(f"/proc/{int((DIR / 'pid').read_text())}/status").read_text()
        assert "\nUid:\t65534\t65534\t" in status, status
        mark = g.qmp.mark()
        number = g.qmp.send("stop")
        tool.await_unhook()
        tool.close()
        g.qmp.result(number)
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        g.qmp.execute("cont")
        tool.accept().answer(b"open sesame")        # and again, as a user who isn't root
        wait_state(g, "hooked", mark)
    g.kill()


CYCLES = 1000 if LONG else 31


@scenario(timeout=60 + CYCLES)
def gate_fds(g):
    """Nothing is left open by sessions that end in whatever way."""
    pid = int((DIR / "pid").read_text())
    counts = []
    with RawTool() as tool:
        for n in range(CYCLES):
            mark = g.qmp.mark()
            tool.accept().answer()
            g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
            if n % 3 == 0:
                g.qmp.execute("stop")
                g.qmp.execute("cont")
            elif n % 3 == 1:
                g.qmp.execute("kvmi-unhook", deadline_ms=0)
                g.qmp.event("KVMI_UNHOOKED", since=mark)
                g.qmp.execute("kvmi-hook")
            tool.close()
            g.qmp.event("KVMI_UNHOOKED", since=mark)
            counts.append(len(os.listdir(f"/proc/{pid}/fd")))
    print(f"files open after each of {CYCLES} sessions: at first {counts[:6]}, in the end {counts[-6:]}")
    # The least: now and then the next connection is there already
    assert min(counts[-6:]) <= min(counts[:6]), counts


if __name__ == "__main__":
    scenarios.main({**SCENARIOS, **INTEL} if sys.argv[1:] else SCENARIOS)
