#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Every way in which a guest can stop, with every kind of tool: run in the AMD host by tests/test_gate.py; by hand:

    tests/host/run amd -- tests/host/gate.py NAME…

Each combination of a way and a tool is a line of the matrix that the tests leave in build/host/matrix.md.
"""
import contextlib
import functools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import fault
import scenarios
from inside import (BUILD, DIR, GET_VERSION, HMP, HOT, PAUSE_VCPU, QMP, SOCKET, WRITE_PHYSICAL, Guest, QMPError, RawTool,
                    wait_until)
from scenarios import Pulse, code, cont, expect, info, same_memory, wait_state

SCENARIOS = {}
scenario = functools.partial(scenarios.scenario, into=SCENARIOS)
LONG = bool(os.environ.get("KVMI_LONG"))
DEADLINE = 1500         # ms: what a tool gets that does not leave
SLOW = 0.7              # s: what a slow tool takes

COLD = fault.COLD[:3]   # functions that a guest of ours never calls: no vCPU waits at a breakpoint there

# The numbers of linux/kvmi.h that only this needs
VCPU_EVENT, PAUSE, CRASH = 1, 1, 2


def plant(raw, places):
    """Write an INT3 to each."""
    for gpa in places:
        error, _ = raw.command(WRITE_PHYSICAL, struct.pack("=QHHI", gpa, 1, 0, 0) + fault.INT3)
        assert error == 0, f"writing to {gpa:#x} gave {error}"


# --- the tools --------------------------------------------------------------------------------------------------------


class Tool:
    """A kind of tool: how it comes, what it does while it is waited for, and how the session should end."""
    name = outcome = None   # of its session; several are possible ones, None: there is no session to end
    least, most = 0, DEADLINE / 1000 - 0.1      # s: how long it may take to end the session
    planted = False         # it has breakpoints in the guest
    restored = None         # how many bytes KVM has to put back, if that is known

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

    def follow(self, target):
        """The guest runs on elsewhere: is it there, too?"""
        wait_state(target, "connecting")

    def places(self, names):
        """Where these functions lie in the guest's physical memory"""
        start = self.g.text()[0]
        return [start + o for o in scenarios.breakpoint_offsets(self.g, names)]


class NoTool(Tool):
    name = "none"


class Prompt(Tool):
    """kvmi watch, with breakpoints in functions that the guest calls all the time"""
    name, outcome, planted, options = "prompt", "clean", True, ()
    breaks, hits = HOT, 3

    def __enter__(self):
        self.watch = scenarios.hook(self.g, *self.breaks, hits=self.hits, options=self.options)
        self.mark = self.watch.mark()
        return self

    def __exit__(self, *exc):
        self.watch.kill()

    def follow(self, target):
        wait_state(target, "hooked")
        self.watch.event("planted", since=self.mark, timeout=60)
        if self.hits:
            self.watch.event("hit", since=self.watch.mark(), count=3, timeout=60)


class Hung(Prompt):
    """Hangs before it is asked to leave"""
    name, outcome = "hung", "forced"
    least, most = DEADLINE / 1000 - 0.1, DEADLINE / 1000 + 2

    def __enter__(self):
        super().__enter__()
        self.watch.signal(signal.SIGSTOP)
        if self.hits:
            self.both_wait()
        return self

    def both_wait(self):
        """Each vCPU has an event open, or will have at once: what they count stands still."""
        seen = []

        def still():
            seen.append(self.g.calls()[0])
            return len(seen) > 3 and len(set(seen[-4:])) == 1
        wait_until(still, 20, "the guest to stand still, with a tool that hangs", pause=0.15)

    def follow(self, target):
        self.watch.signal(signal.SIGCONT)
        super().follow(target)


class Aside(Hung):
    """Hangs with breakpoints where the guest doesn't come by: no vCPU waits for it"""
    name = "hung, vCPUs free"
    breaks, hits, restored = COLD, 0, len(COLD)     # what it could not take out, KVM has


class Slow(Hung):
    """Takes its time, but leaves"""
    name, outcome = "slow", "clean"
    least, most = SLOW - 0.2, DEADLINE / 1000 - 0.1

    def during(self, mark):
        self.unhooking(mark)
        threading.Timer(SLOW, self.watch.signal, [signal.SIGCONT]).start()


class Killed(Hung):
    """Dies while it is waited for: what it has planted, KVM takes out"""
    name, outcome = "killed", "disconnected"
    least, most = 0, DEADLINE / 1000 - 0.1

    def during(self, mark):
        self.unhooking(mark)
        self.watch.kill()

    def follow(self, target):
        Tool.follow(self, target)


class HungAsked(Tool):
    """Hangs when it has heard that it is to leave"""
    name, outcome, planted, step, restored = "hung when asked", "forced", True, "asked", len(fault.COLD)
    least, most = Hung.least, Hung.most

    def __enter__(self):
        mark = self.g.qmp.mark()
        self.process = fault.Process(self.places(HOT), self.places(fault.COLD), self.step, "hung")
        wait_until(lambda: self.process.told(b"r"), 40, "the tool to plant its breakpoints")
        wait_state(self.g, "hooked", mark)
        return self

    def __exit__(self, *exc):
        self.process.__exit__(*exc)


class HungRemoving(HungAsked):
    """… when it has taken out every other breakpoint"""
    name, step, restored = "hung, half of it removed", "removing", len(fault.COLD) // 2


class Deaf(Tool):
    """Not subscribed to the event that asks it to leave; it has breakpoints, too"""
    name, outcome, most = "deaf", "not-subscribed", 1
    planted, restored = True, len(COLD)

    def __enter__(self):
        self.raw = RawTool()
        mark = self.g.qmp.mark()
        self.raw.accept().answer()
        wait_state(self.g, "hooked", mark)
        plant(self.raw, self.places(COLD))
        return self

    def follow(self, target):
        self.raw.accept().answer()
        wait_state(target, "hooked")

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

    def follow(self, target):
        self.thread.join(20)
        super().follow(target)

    def __exit__(self, *exc):
        if hasattr(self, "thread"):
            self.thread.join(20)
            assert self.commands > 20, f"only {self.commands} commands were answered"
        super().__exit__()


ALL = (NoTool, Prompt, Slow, Hung, Killed, Deaf, Chatty)
FEW = (Prompt, Hung)
LATE = (HungAsked, HungRemoving)
# For ways that wait as others do, or take longer
USUAL = ALL if LONG else (NoTool, *FEW)
FEWER = ALL if LONG else FEW
# What a tool does while it is waited for makes no difference to a way that doesn't wait. One that hangs must not keep vCPUs from running
# if it is the guest that does it.
CUT = (NoTool, Prompt, Aside, Deaf)


# --- the ways ---------------------------------------------------------------------------------------------------------


class Way:
    """A way to stop. As it is written here: a QMP command that returns when it is done, and a guest that runs on."""
    name = action = None
    waits = True                # is the tool waited for?
    stops = False               # is the guest stopped afterwards?
    patches = False             # does the guest's kernel patch itself on this way?
    lag = 0                     # s: how late the host was at worst meanwhile

    def __init__(self, g, before):
        self.g, self.before = g, before

    def arm(self):
        """The tool is there, and this is about to begin."""

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
            places = scenarios.breakpoint_offsets(self.g, HOT + fault.COLD)
            assert [now[p] for p in places] == [self.before[p] for p in places], f"{what}: a breakpoint is left"
        else:
            same_memory(self.before, now, what)


def record(*cells):
    print("MATRIX\t" + "\t".join(str(c) for c in cells), flush=True)


def record_end(way, tool, end, took=None):
    """end: KVMI_UNHOOKED's data"""
    record(way, tool, end["outcome"], f"{end['duration'] / 1000:.0f}", "–" if took is None else f"{took * 1000:.0f}", "–")


def combine(g, way_class, tools, options=None):
    """One way with several tools."""
    before = code(g)
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    for tool_class in tools:
        print(f"--- {way_class.name}, {tool_class.name}", flush=True)
        way = way_class(g, before)
        with tool_class(g) as tool:
            way.arm()
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
                if tool.restored is not None:
                    assert end["restored"] == tool.restored, end
                if way.waits:
                    most = tool.most + 4 * pulse.lag
                    assert tool.least <= ms / 1000 <= most, f"{ms} ms: {tool.least} to {most} s were expected"
                # Once, unless the guest runs on already and the tool has come and gone again
                assert len(ends) == 1 or not way.stops, ends
                if way.waits and tool_class in (Slow, Hung):
                    assert "unhooking" in pulse.states, pulse.states
            pulse.check()
            way.lag = pulse.lag
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
        {"capability": c, "state": c == "events" or c in names}
        for c in ("events", "multifd", "postcopy-ram", "background-snapshot", "return-path")])


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
        self.mark = self.g.qmp.mark()
        self.g.qmp.execute("migrate", uri=self.uri)

    def done(self):
        return migrate_status(self.g) in ("completed", "failed", "cancelled")

    def check_resumed(self, tool):
        """The migration went on as soon as the tool had gone: not when it looked, which it would every 250 ms."""
        if tool.outcome is None or tool.outcome == "not-subscribed":
            return
        begin = self.g.qmp.event("KVMI_STATE_CHANGED", since=self.mark, state="unhooking")["us"]
        # The event comes later than what it tells of
        unhooked = begin + self.g.qmp.event("KVMI_UNHOOKED", since=self.mark)["data"]["duration"]
        late = (self.g.qmp.event("MIGRATION", since=self.mark, status="active")["us"] - unhooked) / 1000
        print(f"resumed {late:.1f} ms after the guest was let go")
        assert late < 100 + 4000 * self.lag, f"resumed only {late} ms after the guest was let go"

    def check(self, tool):
        g = self.g
        assert migrate_status(g) == "completed", g.qmp.execute("query-migrate")
        self.check_resumed(tool)
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
        self.mark = self.g.qmp.mark()
        self.g.qmp.execute("migrate", uri="fd:saved")


class BackgroundSnapshot(MigrateFile):
    name, capabilities, stops = "background snapshot", ("background-snapshot",), False


@scenario(timeout=200)
def gate_migrate_to_file(g):
    """Migration to a file, with all kinds of tools."""
    combine(g, MigrateFile, (*ALL, *LATE) if LONG else ALL)


@scenario()
def gate_migrate_to_fd(g):
    """Migration to a file that is open already."""
    combine(g, MigrateFd, USUAL)


@scenario(timeout=300 if LONG else 120)
def gate_background_snapshot(g):
    """A background snapshot: the guest runs on, but the tool comes back only when it is complete."""
    combine(g, BackgroundSnapshot, ALL if LONG else (Prompt,))


class MigrateLive(MigrateFile):
    """To a second QEMU with an object of its own; the tool leaves on the source and comes back on the target."""
    name, uri = "migrate live, pre-copy", "unix:/run/migration"

    def arm(self):
        # Not earlier: it connects to the tool, and waits there for its turn
        self.target = Target(self.uri, kvmi=True, capabilities=self.capabilities)

    def check(self, tool):
        g, t = self.g, self.target.guest
        assert migrate_status(g) == "completed", g.qmp.execute("query-migrate")
        self.check_resumed(tool)
        states = [e["data"]["state"] for e in g.qmp.events[self.mark:] if e["event"] == "KVMI_STATE_CHANGED"]
        asked = tool.outcome not in (None, "not-subscribed")
        assert states == ["unhooking"] * asked + ["unhooked"], f"on the source: {states}"
        self.target.loaded()
        same_code_in_target(self.before, g, t, "the paused target")
        # The tool is let in there as soon as the guest runs.
        assert info(t)["state"] == "unhooked", info(t)
        t.qmp.execute("cont")
        tool.follow(t)
        t.wait_alive()
        t.kill()            # The guest of the source is the same one, and the one we go on with

class MigrateMultifd(MigrateLive):
    name, capabilities = "migrate live, multifd", ("multifd",)


class MigratePostcopy(MigrateLive):
    name, capabilities = "migrate live, postcopy-ram", ("postcopy-ram",)

    def begin(self):
        super().begin()
        # as soon as it is active
        self.g.qmp.execute("migrate-start-postcopy")

    def check(self, tool):
        self.g.qmp.event("MIGRATION", since=self.mark, status="postcopy-active")
        super().check(tool)


@scenario(timeout=300 if LONG else 120)
def gate_migrate_live(g):
    """Pre-copy: the tool leaves on the source and comes back on the target."""
    combine(g, MigrateLive, ALL if LONG else (Prompt,))


@scenario(timeout=300 if LONG else 120)
def gate_migrate_multifd(g):
    """Likewise with several channels."""
    combine(g, MigrateMultifd, ALL if LONG else (Prompt,))


@scenario(timeout=300 if LONG else 120)
def gate_migrate_postcopy(g):
    """Likewise with post-copy."""
    combine(g, MigratePostcopy, ALL if LONG else (Prompt,))


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
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        expect("clean", end)
        record_end("migrate, cancelled", Slow.name, end, took)
        wait_state(g, "hooked", mark)
        assert g.qmp.execute("query-status")["running"]
    with Prompt(g) as tool:
        mark, tool_mark = g.qmp.mark(), tool.watch.mark()
        g.qmp.execute("migrate", uri="exec:exit 1")
        wait_until(lambda: migrate_status(g) == "failed", 30, "the migration to fail")
        record_end("migrate, failed", tool.name, g.qmp.event("KVMI_UNHOOKED", since=mark, action="migrate", outcome="clean")["data"])
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
        tool.watch.event("hit", since=tool_mark, count=3, timeout=60)
        g.wait_alive()
        # and once more, which works
        mark = g.qmp.mark()
        g.qmp.execute("migrate", uri="exec:cat >/dev/null")
        wait_until(lambda: migrate_status(g) == "completed", 60, "the migration")
        end = g.qmp.event("KVMI_UNHOOKED", since=mark, action="migrate")["data"]
        expect("clean", end)
        record_end("migrate, tried again", tool.name, end)
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


@scenario(timeout=900 if LONG else 300, guest=False)
def gate_migrate_stock(_):
    """To stock QEMU and back: the stream is the same with the object as without it; with other machines' types, too."""
    stock = BUILD / "qemu-stock/bin/qemu-system-x86_64"
    for machine in (None, "pc-q35-9.2", "pc-i440fx-9.2") if LONG else (None,):
        machine = {"machine": machine} if machine else {}
        expected = saved(stock, False, machine)
        print(f"in the stream: {', '.join(d['name'] for d in expected['devices'])}")
        for kvmi in (False, True):
            assert saved(Guest().qemu, kvmi, machine) == expected, f"another stream than that of stock QEMU, kvmi={kvmi}"
        migrate_stock(stock, machine)


def saved(qemu, kvmi, machine):
    """What the stream of a guest that has yet to run consists of: its sections, their versions and fields, as it says itself at its end"""
    g = Guest(Path("/run/saved"), qemu)
    g.start(kvmi=kvmi, extra=("-S",), alive=False, **machine)
    g.qmp.execute("migrate", uri="file:/run/saved/stream")
    wait_until(lambda: migrate_status(g) in ("completed", "failed"), 60, "the guest to be saved")
    g.kill()
    stream = Path("/run/saved/stream").read_bytes()
    # as QEMU's scripts/analyze-migration.py finds it
    return json.loads(stream[stream.index(b"{", stream.rindex(b"\0")):])


def migrate_stock(stock, machine):
    there, back = Guest(Path("/run/stock")), Guest(Path("/run/back"))
    g = Guest().start(**machine)
    started = []
    try:
        for name, source, target, qemu, kvmi in (("there", g, there, stock, False), ("back", there, back, g.qemu, True)):
            target.qemu = qemu
            target.start(kvmi=kvmi, extra=("-S", "-incoming", "defer"), alive=False, **machine)
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
            print(f"migrated {name}: {machine} {target.qmp.execute('query-version')}")
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


@scenario(timeout=200)
def gate_migrate_start_time_live(g):
    """To a target that does not know of the start time: the migration fails, the guest runs on here and is hooked again. If only the target
    does, the guest gets the time at which it came there."""
    uri, capabilities = "unix:/run/migration", ("return-path",)
    scenarios.remove_object(g)
    g.qmp.execute("object-add", **g.kvmi_options(migrate_start_time=True))
    before = code(g)
    with Prompt(g) as tool:
        with Target(uri, capabilities=capabilities) as target:
            set_capabilities(g, *capabilities)
            mark = g.qmp.mark()
            g.qmp.execute("migrate", uri=uri)
            wait_until(lambda: migrate_status(g) in ("failed", "completed"), 60, "the migration to fail")
            print(g.qmp.execute("query-migrate"))
            assert migrate_status(g) == "failed"
            wait_until(lambda: "'kvmi'" in (target.guest.dir / "stderr").read_text(), 20, "the target's error")
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark, action="migrate")["data"])
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
        assert g.qmp.execute("query-status")["running"]
        tool.watch.event("hit", since=tool.watch.mark(), count=3, timeout=60)
        g.wait_alive()
    scenarios.remove_object(g)
    wait_until(lambda: not has_object(g), 10, "the object to go")
    g.qmp.execute("object-add", **g.kvmi_options())
    started = hello(g)
    time.sleep(1.1)         # the start time counts seconds
    with Target(uri, capabilities=capabilities, extra=("-object", "kvmi,id=k,chardev=tool,migrate-start-time=on")) as target:
        g.qmp.execute("migrate", uri=uri)
        wait_until(lambda: migrate_status(g) in ("failed", "completed"), 60, "the migration")
        assert migrate_status(g) == "completed", g.qmp.execute("query-migrate")
        target.loaded()
        same_code_in_target(before, g, target.guest, "the target")
        # or it may be the source that connects, and is silent
        scenarios.remove_object(g)
        g.qmp.execute("chardev-remove", id="tool")
        target.guest.qmp.execute("cont")
        there = hello(target.guest)
        assert there > started, f"started at {started}, on the target at {there}"
        target.guest.wait_alive()
    add_chardev(g)
    cont(g)


def has_object(g):
    try:
        return info(g)
    except QMPError:
        return None


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


class GDB:
    """A debugger, as far as this needs one. QEMU stops the guest when it connects."""

    def __init__(self, g):
        path = f"{DIR}/gdb"
        if not os.path.exists(path):
            g.hmp(f"gdbserver unix:{path},server=on,wait=off")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self.got = b""

    def send(self, packet):
        self.sock.sendall(b"+$%s#%02x" % (packet, sum(packet) % 256))

    def heard(self, what):
        try:
            self.got += self.sock.recv(4096)
        except BlockingIOError:
            pass
        return what in self.got

    def ask(self, packet, answer):
        self.got = b""
        self.send(packet)
        wait_until(lambda: self.heard(answer), 20, f"gdb's answer to {packet}")

    def go_on(self):
        self.got = b""
        self.send(b"c")

    def detach(self, g):
        self.send(b"D")
        wait_until(lambda: g.qmp.execute("query-status")["running"], 10, "the guest to run when gdb is detached")
        self.sock.close()


class Debugger(Way):
    """A debugger connects and asks why the guest has stopped."""
    name, action, stops = "gdb", "debug", True

    def begin(self):
        self.gdb = GDB(self.g)
        self.gdb.send(b"?")

    def done(self):
        return self.gdb.heard(b"$T")

    def check(self, tool):
        assert self.g.qmp.execute("query-status")["status"] == "paused"
        same_memory(self.before, code(self.g), "stopped by a debugger")

    def after(self):
        self.gdb.detach(self.g)


class Interrupt(Debugger):
    """A debugger that lets the guest run interrupts it."""
    name = "gdb, ^C"

    def __init__(self, g, before):
        super().__init__(g, before)
        self.gdb = GDB(g)
        self.gdb.ask(b"?", b"$T")
        self.prepare()
        self.gdb.go_on()
        g.wait_alive()

    def prepare(self):
        pass

    def begin(self):
        self.gdb.sock.sendall(b"\x03")


class DebuggerBreakpoint(Interrupt):
    """The guest runs into a breakpoint of the debugger's, which can't wait."""
    name, waits = "gdb, breakpoint", False

    def prepare(self):
        # in what the guest calls only when it is told to; one of the CPU's own, so that the guest's code is the same with it
        function = self.g.text()[2] + scenarios.breakpoint_offsets(self.g, ["__x64_sys_getdents64"])[0]
        self.place = b"1,%x,1" % function
        self.gdb.ask(b"Z" + self.place, b"$OK")

    def begin(self):
        self.said = len(self.g.output())
        self.g.tell("list processes")

    def check(self, tool):
        assert self.g.qmp.execute("query-status")["status"] == "debug"
        same_memory(self.before, code(self.g), "stopped by a debugger's breakpoint")

    def after(self):
        self.gdb.ask(b"z" + self.place, b"$OK")
        super().after()
        wait_until(lambda: "guest: that was all\n" in self.g.output()[self.said:], 60, "the guest to have listed its processes")


@scenario()
def gate_gdb_interrupts(g):
    """What a debugger sends in one piece with its ^C is for the stopped guest, too: it is answered when the tool was waited for."""
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    way = Interrupt(g, None)
    with Hung(g) as tool:
        mark, gdb = g.qmp.mark(), way.gdb
        gdb.got = b""
        gdb.sock.sendall(b"\x03$qAttached#8f")
        tool.unhooking(mark)
        wait_until(lambda: gdb.heard(b"+$1#31") and b"$T" in gdb.got, 20, f"the answers to ^C and to what came with it: {gdb.got}")
        expect("forced", g.qmp.event("KVMI_UNHOOKED", since=mark, action="debug")["data"])
        assert g.qmp.execute("query-status")["status"] == "paused"
        # A command that it gives to QEMU's monitor is done, and has told its errors, when gdb is told so
        gdb.ask(b"qRcmd," + b"dump-guest-memory /dev/full".hex().encode(), b"$OK")
        said = b"".join(bytes.fromhex(o.decode()) for o in re.findall(rb"\$O([0-9a-f]+)#", gdb.got.partition(b"$OK")[0]))
        assert b"failed to write" in said, gdb.got
        way.after()
    g.wait_alive()


@scenario(timeout=200)
def gate_stop(g):
    """QMP's stop, with all kinds of tools."""
    combine(g, Stop, (*ALL, *LATE))


INTEL = {}


@scenario(timeout=900, into=INTEL)
def intel_stop(g):
    """On the Intel host: QMP's stop with a tool that leaves, and with one that hangs."""
    combine(g, Stop, (NoTool, *FEW))


@scenario(timeout=1500, into=INTEL)
def intel_migrate_to_file(g):
    """On the Intel host: what is saved there is clean."""
    combine(g, MigrateFile, (Prompt, Aside))


@scenario(timeout=1500, into=INTEL)
def intel_dump(g):
    """On the Intel host: so is what is dumped."""
    combine(g, Dump, (Prompt, Aside))


@scenario(timeout=1500, into=INTEL)
def intel_panic(g):
    """On the Intel host: what can't wait leaves the guest clean, too."""
    g.qmp.execute("set-action", panic="pause")
    combine(g, Panic, (Prompt, Aside))


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
    # The libraries' own tests, which skip it where there is no loopback
    for test, case in (("test-libkvmi", "/lib/vsock"), ("test-compat", "/compat/vsock")):
        said = subprocess.run([BUILD / "tests/unit" / test, "-p", case], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=60,
                              text=True).stdout
        assert f"ok 1 {case}\n" in said, said


@scenario(timeout=400 if LONG else 200)
def gate_stop_by_others(g):
    """The human monitor's stop, and a debugger's."""
    combine(g, HumanStop, FEWER)
    combine(g, Debugger, USUAL)
    combine(g, Interrupt, ALL if LONG else (Prompt,))
    combine(g, DebuggerBreakpoint, CUT if LONG else (Prompt, Aside))


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


@scenario(timeout=300 if LONG else 200)
def gate_savevm(g):
    """An internal snapshot by HMP's savevm."""
    combine(g, Savevm, (*ALL, *LATE) if LONG else USUAL)


@scenario(timeout=300 if LONG else 120)
def gate_snapshot_save(g):
    """An internal snapshot by QMP's job."""
    combine(g, SnapshotSave, (*ALL, *LATE) if LONG else FEW)


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
    combine(g, Dump, (*USUAL, *LATE))


@scenario(timeout=300 if LONG else 120)
def gate_dump_otherwise(g):
    """Detached, and by HMP."""
    combine(g, DumpDetached, (*ALL, *LATE) if LONG else FEW)
    combine(g, DumpHuman, FEWER)
    # and errors get to the monitor
    said = g.qmp.execute("human-monitor-command", command_line="dump-guest-memory /nowhere/elf")
    assert "/nowhere/elf" in said, said


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
        record_end("savevm, its client gone, and stop", Slow.name, ends[0])
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
        record_end("dump-guest-memory, cont meanwhile", Slow.name, g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        human.sock.close()
        assert g.qmp.execute("query-status")["running"]
    assert g.qmp.execute("human-monitor-command", command_line="delvm snap") == ""


@contextlib.contextmanager
def waiting(g, begin):
    """begin() makes something wait for a tool that hangs. Yields (mark, tool) meanwhile; the tool has to be woken up, see end_of_wait()."""
    with Hung(g) as tool:
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=30000)
        mark = g.qmp.mark()
        begin()
        tool.unhooking(mark)
        yield mark, tool
        wait_state(g, "hooked", mark)


def end_of_wait(g, mark, tool, action):
    """The tool wakes up and leaves: it is a slow one, then. Returns KVMI_UNHOOKED's data."""
    tool.watch.signal(signal.SIGCONT)
    end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
    assert (end["action"], end["outcome"]) == (action, "clean"), end
    return end


def kinds(g, mark):
    return [e["event"] for e in g.qmp.events[mark:]]


@scenario(timeout=200)
def gate_cont_meanwhile(g):
    """cont while something waits: it is the contrary of a debugger's stop, which is forgotten; not of a migration or a snapshot."""
    before = code(g)
    way = MigrateFile(g, before)
    with waiting(g, way.begin) as (mark, tool):
        g.hmp("cont")
        record_end("migrate, cont meanwhile", Slow.name, end_of_wait(g, mark, tool, "migrate"))
        wait_until(way.done, 30, "the migration")
        assert migrate_status(g) == "completed", migrate_status(g)
        same_memory(before, code(g), "migrated, with a cont meanwhile")
        os.unlink(f"{DIR}/saved")
        cont(g)
    way = SnapshotSave(g, before)
    with waiting(g, way.begin) as (mark, tool):
        g.hmp("cont")
        record_end("snapshot-save, cont meanwhile", Slow.name, end_of_wait(g, mark, tool, "save"))
        wait_until(way.done, 30, "the snapshot")
        way.check(tool)
    debugger = []
    with waiting(g, lambda: debugger.append(GDB(g))) as (mark, tool):
        g.hmp("cont")
        record_end("gdb, cont meanwhile", Slow.name, end_of_wait(g, mark, tool, "debug"))
        wait_state(g, "hooked", mark)
        g.wait_alive()
        assert g.qmp.execute("query-status")["running"] and "STOP" not in kinds(g, mark), kinds(g, mark)
    # and it can stop the guest still; QEMU may want to hear first that the last one's last answer has arrived
    debugger[0].sock.sendall(b"+")
    debugger[0].ask(b"?", b"$T")
    debugger[0].detach(g)


@scenario(timeout=200)
def gate_two_at_once(g):
    """A migration and something else wait for the same tool, which is asked once: each gets what it wanted, or is told that it can't be."""
    before = code(g)

    def migrated(other):
        wait_until(lambda: migrate_status(g) == "completed", 60, "the migration")
        assert kinds(g, mark).count("KVMI_UNHOOKED") == 1, kinds(g, mark)
        same_memory(before, code(g), f"migrated, with {other} meanwhile")
        with Target(f"file:{DIR}/saved") as target:
            target.loaded()
            same_code_in_target(before, g, target.guest, f"the migration, with {other} meanwhile")
        os.unlink(f"{DIR}/saved")

    migrate = MigrateFile(g, before)
    with waiting(g, migrate.begin) as (mark, tool):
        number = g.qmp.send("stop")
        record_end("migrate and stop", Slow.name, end_of_wait(g, mark, tool, "migrate"))
        g.qmp.result(number, 20, "the answer to stop")
        migrated("stop")
        assert kinds(g, mark).count("STOP") == 1, kinds(g, mark)
        cont(g)
    with waiting(g, migrate.begin) as (mark, tool):
        number = g.qmp.send("human-monitor-command", command_line="savevm snap")
        record_end("migrate and savevm", Slow.name, end_of_wait(g, mark, tool, "migrate"))
        answer = g.qmp.result(number, 20, "the answer to savevm")
        assert "migration" in answer, answer
        assert "no snapshot" in g.qmp.execute("human-monitor-command", command_line="info snapshots")
        migrated("savevm")
        cont(g)
    dump = Dump(g, before)
    with waiting(g, dump.begin) as (mark, tool):
        human = HMP()
        human.send(f"migrate -d file:{DIR}/saved")
        human.prompt("migrate")
        human.sock.close()
        record_end("dump-guest-memory and migrate", Slow.name, end_of_wait(g, mark, tool, "save"))
        try:
            g.qmp.result(dump.number, 20, "the answer to dump-guest-memory")
            raise AssertionError("dumped in the middle of a migration")
        except QMPError as e:
            print(e)
        migrated("dump-guest-memory")
        cont(g)


@scenario(timeout=120)
def gate_client_gone(g):
    """Who asked for a dump hangs up while it waits: it is made all the same. A debugger does: the guest is stopped; it can be continued."""
    before = code(g)
    way = Dump(g, before)

    def begin():
        other = QMP(DIR / "qmp2")
        other.send("dump-guest-memory", paging=False, protocol=f"file:{way.file}")
        others.append(other)
    others = []
    with waiting(g, begin) as (mark, tool):
        others[0].close()
        record_end("dump-guest-memory, its client gone", Slow.name, end_of_wait(g, mark, tool, "save"))
        g.qmp.event("DUMP_COMPLETED", since=mark)
        start, end, _ = g.text()
        same_memory(before, dumped(way.file, start, end), "the dump")
        os.unlink(way.file)
        g.wait_alive()
    debugger = []
    with waiting(g, lambda: debugger.append(GDB(g))) as (mark, tool):
        debugger[0].sock.close()
        record_end("gdb, gone", Slow.name, end_of_wait(g, mark, tool, "debug"))
        g.qmp.event("STOP", since=mark)
        same_memory(before, code(g), "stopped by a debugger that has gone")
        cont(g)


@scenario(timeout=200)
def gate_other_monitors(g):
    """While an in-band command waits, those of its own monitor come after it; other monitors, QMP or HMP, and out-of-band commands don't wait."""
    other = QMP(DIR / "qmp2")
    dump = Dump(g, code(g))
    for command, arguments, action in (("stop", {}, "stop"), ("human-monitor-command", {"command_line": "savevm snap"}, "save"),
                                       ("dump-guest-memory", {"paging": False, "protocol": f"file:{dump.file}"}, "save")):
        sent = []
        with waiting(g, lambda: sent.append(g.qmp.send(command, **arguments))) as (mark, tool):
            sent += [g.qmp.send("query-status") for _ in range(3)]
            assert other.execute("query-status")["running"]
            assert other.execute("query-kvmi")["state"] == "unhooking"
            assert other.execute("human-monitor-command", command_line="info status").startswith("VM status: running")
            g.hmp("info status")
            for monitor in (g.qmp, other):
                assert monitor.execute("query-kvmi", oob=True)["state"] == "unhooking"
            # one that waits, too, and another behind it
            sent_there = [other.send(c) for c in ("stop", "query-status")]
            time.sleep(0.3)
            g.qmp.execute("query-kvmi", oob=True)
            other.execute("query-kvmi", oob=True)
            assert not [n for n in sent if n in g.qmp.replies], f"answered before {command}"
            assert not [n for n in sent_there if n in other.replies], "answered before stop"
            end_of_wait(g, mark, tool, action)
            for n in sent:
                g.qmp.result(n)
            assert [n for n in g.qmp.replies if n in sent] == sent, g.qmp.replies
            other.result(sent_there[0])
            assert other.result(sent_there[1])["status"] == "paused"
            cont(g)
    g.hmp("delvm snap")
    os.unlink(dump.file)
    with waiting(g, lambda: sent.append(g.qmp.send("stop"))) as (mark, tool):
        other.execute("cont")
        end_of_wait(g, mark, tool, "stop")
        try:
            g.qmp.result(sent[-1])
            raise AssertionError("stopped, against the last word")
        except QMPError as e:
            assert "run on" in str(e), e
        assert g.qmp.execute("query-status")["running"]
    # Its monitor takes commands again
    for _ in range(20):
        g.qmp.execute("query-name")
    other.close()


# --- what can't wait --------------------------------------------------------------------------------------------------


class Load(Human):
    """Return to a snapshot while a tool is there"""
    name, action, waits, line = "loadvm", "load", False, "loadvm snap"

    def check(self, tool):
        super().check(tool)
        tool.follow(self.g)


class SnapshotLoad(SnapshotSave):
    name, action, waits = "snapshot-load", "load", False

    def begin(self):
        SnapshotSave.serial += 1
        self.job = f"load{self.serial}"
        self.g.qmp.execute("snapshot-load", job_id=self.job, tag="snap", vmstate="disk", devices=["disk"])

    def check(self, tool):
        assert "error" not in self.state(), self.state()
        self.g.qmp.execute("job-dismiss", id=self.job)
        tool.follow(self.g)


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
        combine(g, way, CUT)
    assert g.qmp.execute("human-monitor-command", command_line="savevm snap", timeout=30) == ""
    for way in (Load, SnapshotLoad):
        combine(g, way, (NoTool, *FEW, Deaf) if LONG else FEW)
    with Prompt(g) as tool:
        # Deleting one is nobody's business
        mark = g.qmp.mark()
        g.qmp.execute("snapshot-delete", job_id="delete", tag="snap", devices=["disk"])
        wait_until(lambda: g.qmp.execute("query-jobs")[0]["status"] == "concluded", 20, "the snapshot to go")
        assert "error" not in g.qmp.execute("query-jobs")[0], g.qmp.execute("query-jobs")
        g.qmp.execute("job-dismiss", id="delete")
        assert info(g)["state"] == "hooked" and not [e for e in g.qmp.events[mark:] if e["event"].startswith("KVMI")], g.qmp.events[mark:]
        record("snapshot-delete", tool.name, "–", 0, "–", "–")


@scenario(timeout=300)
def gate_panic_actions(g):
    """A panic that does not stop the guest is none of the tool's business; one that ends QEMU cuts it off."""
    for action in ("none", "shutdown", "exit-failure") if LONG else ("none", "shutdown"):
        if g.spoilt:
            g.start()
        g.qmp.execute("set-action", panic=action)
        with Prompt(g) as tool:
            pid, mark, tool_mark, begin = int((DIR / "pid").read_text()), g.qmp.mark(), tool.watch.mark(), time.monotonic()
            g.tell(Panic.what)
            g.qmp.event("GUEST_PANICKED", since=mark, action="run" if action == "none" else "poweroff")
            if action == "none":
                g.wait_alive()
                tool.watch.event("hit", since=tool_mark, count=3, timeout=60)
                assert info(g)["state"] == "hooked" and kinds(g, mark) == ["GUEST_PANICKED"], kinds(g, mark)
                record("guest panic, action none", tool.name, "–", 0, "–", "–")
                continue
            g.spoilt = True
            end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
            expect("forced", end)
            wait_until(lambda: ended(pid), 20, "QEMU's end")
            tool.watch.event("closed", since=tool_mark)
            record_end(f"guest panic, action {action}", tool.name, end, time.monotonic() - begin)


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
    combine(g, DiskFull, CUT)
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
    """KVM can't run the guest any more: paused at once, its memory is clean; also with a tool that would leave if it was asked, and with
    one that hangs."""
    place = 0x8000
    for kind in ("raw", "raw, subscribed", "raw, hung"):
        g = Guest().start(machine="q35", vcpus=1, alive=False, extra=("-bios", wild_bios()))
        before = g.dump(place, place + 16)
        with RawTool() if kind != "raw, hung" else fault.Process([], [place], "idle", "hung") as tool:
            if kind == "raw, hung":
                wait_until(tool.failed, 40, "the tool to hang")
            else:
                tool.accept().answer()
                wait_state(g, "hooked")
                if kind == "raw, subscribed":
                    tool.subscribe_unhook()
                plant(tool, [place])
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
            record_end("internal error", kind, end, took)
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
        places = Tool(g).places(COLD)
        plant(tool, places)
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
        record_end("the tool's answer CRASH", "raw", end)
        mark = g.qmp.mark()
        cont(g)
        tool.accept().answer()
        wait_state(g, "hooked", mark)


class Reset(Way):
    """The guest boots again, with its kernel elsewhere; what the reset has left in its memory is looked at before that."""
    name, action, waits = "reset (system_reset)", "reset", False

    def __init__(self, g, _):
        super().__init__(g, code(g))        # it boots each time

    def begin(self):
        self.mark, self.boots, self.text = self.g.qmp.mark(), self.g.output().count("text-physical"), self.g.text()
        self.g.qmp.execute("system_reset")

    def done(self):
        return any(e["event"] == "RESET" for e in self.g.qmp.events[self.mark:])

    def check(self, tool):
        self.g.qmp.execute("stop")
        start, end, _ = self.text
        places = scenarios.breakpoint_offsets(self.g, HOT + fault.COLD)
        now = self.g.dump(start, end)
        left = [p for p in places if now[p] != self.before[p]]
        print(f"after the reset, {sum(a != b for a, b in zip(self.before, now))} bytes differ")
        assert not left, f"after the reset: {left}"

    def after(self):
        self.g.qmp.execute("cont")
        booted(self.g, self.boots)
        self.before = code(self.g)


def booted(g, boots):
    """It has booted again: boots is how often it had before."""
    wait_until(lambda: g.output().count("text-physical") > boots, 240, "the guest to boot again")
    g.wait_alive(240)


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
            booted(g, boots)
            record_end(f"reset ({why})", "raw", end, took)
    # The vCPUs have to come out of the events that they wait in
    combine(g, Reset, (*CUT, Hung) if LONG else (Hung,))


@scenario(timeout=1500 if LONG else 600, fresh=True)
def gate_shutdown(g):
    """Powered off, the guest is cut off; with on-shutdown=announce, the tool is asked to leave, within its deadline."""
    g.qmp.execute("set-action", shutdown="pause", reboot="reset")
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    for mode in ("cut", "announce"):
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="on-shutdown", value=mode)
        for tool_class in CUT if LONG else (Prompt,):
            before = code(g)
            with tool_class(g) as tool:
                mark, boots, begin = g.qmp.mark(), g.output().count("text-physical"), time.monotonic()
                g.tell("power off")
                g.qmp.event("SHUTDOWN", since=mark)
                took = time.monotonic() - begin
                g.qmp.event("STOP", since=mark)
                ends = [e["data"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_UNHOOKED"]
                assert [e["action"] for e in ends] == ["shutdown"] * (tool.outcome is not None), ends
                outcome, ms = "–", "0"
                if ends:
                    expect(tool.outcome if mode == "announce" else "forced", ends[0])
                    assert tool.restored in (None, ends[0]["restored"]), ends[0]
                    outcome, ms = ends[0]["outcome"], f"{ends[0]['duration'] / 1000:.0f}"
                now = code(g)
                left = [o for o in scenarios.breakpoint_offsets(g, HOT + fault.COLD) if now[o] != before[o]]
                assert not left, "breakpoints are left"
                record(f"power off, on-shutdown={mode}", tool.name, outcome, ms, f"{took * 1000:.0f}", "–")
            g.qmp.execute("system_reset")
            g.qmp.execute("cont")
            booted(g, boots)


def ended(pid):
    try:
        return not Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return True


# How QEMU is told to end, with which on-shutdown, the tool, what becomes of that
ENDS = (("SIGTERM", "announce", Hung, "forced"),
        ("SIGTERM, then quit", "announce", Hung, "forced"),
        ("SIGTERM", "cut", Hung, "forced"),
        ("quit", "cut", Hung, "forced"),
        ("quit", "cut", Deaf, "forced"),
        ("quit", "announce", Deaf, "not-subscribed"),
        ("quit", "announce", Prompt, "clean"))


@scenario(timeout=1500 if LONG else 300)
def gate_end_of_qemu(g):
    """Quit and SIGTERM, which the tool delays for as long as it is given, if it is asked to leave at all."""
    for how, mode, tool_class, outcome in ENDS if LONG else ENDS[:2]:
        if g.spoilt:
            g.start()
        g.spoilt = True
        for name, value in (("unhook-timeout-ms", DEADLINE), ("on-shutdown", mode)):
            g.qmp.execute("qom-set", path="/objects/kvmi0", property=name, value=value)
        with tool_class(g) as tool:
            pid, mark, begin = int((DIR / "pid").read_text()), g.qmp.mark(), time.monotonic()
            if how == "quit":
                g.qmp.send("quit")
            else:
                os.kill(pid, signal.SIGTERM)
            if how == "SIGTERM, then quit":
                tool.unhooking(mark)
                g.qmp.send("quit")
            end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
            g.qmp.event("SHUTDOWN", since=mark)
            took = time.monotonic() - begin
            assert end["action"] == "shutdown", end
            expect(outcome, end)
            wait_until(lambda: ended(pid), 20, "QEMU's end")
            if (how, mode, tool_class) == ("SIGTERM", "announce", Hung):
                assert DEADLINE / 1000 - 0.1 < took < DEADLINE / 1000 + 2, took
            else:
                assert took < DEADLINE / 1000 - 0.1, f"it took {took} s: {DEADLINE} ms are the deadline"
            record_end(f"{how}, on-shutdown={mode}", tool.name, end, took)


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
        wait_until(lambda: ended(pid), 10, "QEMU's end")
        print(f"QEMU was gone after {time.monotonic() - begin:.1f} s")
    g.spoilt = True


@scenario(timeout=200)
def gate_stopped_already(g):
    """Of a guest that is stopped, a tool that listens sees nothing, whatever is done to it; it comes when the guest runs."""
    before = code(g)
    g.qmp.execute("set-action", reboot="reset")
    with RawTool() as tool:
        tool.accept().answer()
        wait_state(g, "hooked")
        scenarios.stop(g)
        mark = g.qmp.mark()
        for way in (Stop, Savevm, Dump):
            doing = way(g, before)
            doing.stops = True
            doing.begin()
            g.qmp.pump(doing.done, 30, f"{way.name} of a paused guest")
            doing.check(NoTool(g))
            assert info(g)["state"] == "unhooked" and g.qmp.execute("query-status")["status"] == "paused", way.name
        boots = g.output().count("text-physical")
        if LONG:
            g.qmp.execute("system_reset")
            g.qmp.event("RESET", since=mark)
        # Ten times the chardev's reconnect interval: if a stopped VM connected, it would have by now
        time.sleep(1)
        assert info(g)["state"] == "unhooked", info(g)
        seen = [k for k in kinds(g, mark) if k.startswith("KVMI") or k in ("STOP", "RESUME")]
        assert not seen, seen
        g.qmp.execute("cont")
        tool.accept().answer()
        wait_state(g, "hooked", mark)
        if LONG:
            booted(g, boots)
    g.wait_alive()


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
        self.g.qmp.execute("system_wakeup")
        tool.follow(self.g)


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


class SlowAside(Slow):
    breaks, hits = COLD, 0


class KilledAside(Killed):
    breaks, hits = COLD, 0


@scenario(timeout=1500, guest=False)
def gate_suspend_with_others(_):
    """… or is slow, or dies, or does not listen, or goes on talking. Each with a guest of its own, see above."""
    for tool_class in (SlowAside, KilledAside, Deaf, Chatty):
        g = Guest().start(machine="q35")
        combine(g, Suspend, (tool_class,))
    g.kill()


@scenario(timeout=600, machine="q35")
def gate_suspend_woken(g):
    """What wakes the guest up while it waits for the tool is not lost: it suspends, and wakes up at once."""
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    with Deaf(g) as tool:
        tool.raw.subscribe_unhook()     # hears it, and stays
        mark = g.qmp.mark()
        g.tell("suspend")
        tool.unhooking(mark)
        g.qmp.execute("system_wakeup")
        expect("forced", g.qmp.event("KVMI_UNHOOKED", since=mark, action="suspend")["data"])
        g.qmp.event("SUSPEND", since=mark)
        g.qmp.event("WAKEUP", since=mark)
        assert g.qmp.execute("query-status")["status"] == "running"
    g.wait_alive()
    g.spoilt = True


@scenario(timeout=600, machine="q35")
def gate_suspend_woken_by_clock(g):
    """So if it is an alarm that the guest has set: it goes off while the tool has yet to leave, as the guest did not expect."""
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=120000)
    with Deaf(g) as tool:
        tool.raw.subscribe_unhook()     # hears it, and stays
        mark = g.qmp.mark()
        g.ask("wake up in 15", "wakes up in 15 s")
        alarm = time.monotonic() + 15
        g.tell("suspend")
        tool.unhooking(mark)
        assert time.monotonic() < alarm - 2, "the guest has taken too long to suspend"
        time.sleep(alarm + 2 - time.monotonic())
        assert info(g)["state"] == "unhooking" and "SUSPEND" not in kinds(g, mark), kinds(g, mark)
        tool.raw.close()
        end = g.qmp.event("KVMI_UNHOOKED", since=mark, action="suspend")["data"]
        g.qmp.event("SUSPEND", since=mark)
        g.qmp.event("WAKEUP", since=mark)
        record_end("suspend to RAM, an alarm meanwhile", Killed.name, end)
    g.wait_alive()
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
            record_end(f"kvmi-unhook, {back}", tool.name, end)
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


@scenario(timeout=200)
def gate_object_at_any_time(g):
    """object-add and object-del while the tool has breakpoints, hangs, or is waited for; while the guest is paused, or migrates."""
    before = code(g)

    def add():
        g.qmp.execute("object-add", **g.kvmi_options(unhook_timeout_ms=DEADLINE))

    def gone(mark, action="object-del"):
        end = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        assert end["action"] == action, end
        wait_until(lambda: not has_object(g), 10, "the object to go")
        return end

    # With a tool that leaves, and one that does not
    g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=DEADLINE)
    for tool_class, outcome, restored in ((Prompt, "clean", 0), (Hung, "forced", len(HOT))):
        with tool_class(g):
            mark = g.qmp.mark()
            g.qmp.execute("object-del", id="kvmi0")
            end = gone(mark)
            assert (end["outcome"], end["restored"]) == (outcome, restored), end
            same_memory(before, code(g), f"the object deleted, the tool {tool_class.name}")
            g.wait_alive()
        add()
    # Of a paused guest
    with Prompt(g) as tool:
        g.qmp.execute("stop")
        mark = g.qmp.mark()
        g.qmp.execute("object-del", id="kvmi0")
        assert not has_object(g)
        add()
        assert info(g)["state"] == "unhooked", info(g)
        cont(g)
        wait_state(g, "hooked", mark)
    # While something waits for the tool
    with Hung(g) as tool:
        human, mark = HMP(), g.qmp.mark()
        number = g.qmp.send("stop")
        tool.unhooking(mark)
        human.send("object_del kvmi0")
        human.prompt("object_del")
        human.sock.close()
        g.qmp.result(number, 10, "the answer to stop")
        expect("forced", gone(mark, "stop"))
        assert g.qmp.execute("query-status")["status"] == "paused"
        same_memory(before, code(g), "stopped, the object deleted meanwhile")
        cont(g)
    add()
    way = MigrateFile(g, before)
    with Hung(g) as tool:
        mark = g.qmp.mark()
        way.begin()
        tool.unhooking(mark)
        g.qmp.execute("object-del", id="kvmi0")
        expect("forced", gone(mark, "migrate"))
        wait_until(way.done, 30, "the migration")
        assert migrate_status(g) == "completed"
        same_memory(before, code(g), "migrated, the object deleted meanwhile")
        os.unlink(f"{DIR}/saved")
        cont(g)
    # While the guest migrates: not before the end of that, failed as it has
    with RawTool() as tool:
        g.qmp.execute("migrate", uri="exec:sleep 2")
        wait_until(lambda: migrate_status(g) == "active", 10, "the migration to begin", pause=0.01)
        add()
        time.sleep(0.5)
        assert migrate_status(g) == "active", migrate_status(g)
        assert info(g)["state"] == "unhooked" and g.qmp.execute("query-status")["running"], info(g)
        mark = g.qmp.mark()
        g.qmp.execute("migrate_cancel")
        tool.accept().answer()
        wait_state(g, "hooked", mark)
        # The chardev right behind the object
        mark = g.qmp.mark()
        g.qmp.execute("object-del", id="kvmi0")
        g.qmp.execute("chardev-remove", id="tool")
        expect("not-subscribed", gone(mark))
        assert tool.closed(), "the tool's connection is still open"
        add_chardev(g)
        add()
        tool.accept().answer()
        wait_state(g, "hooked", mark)
    g.wait_alive()


@scenario(timeout=300)
def gate_two_guests(g):
    """Two guests and one tool: each has its hits; a stop of one is nothing to the other; if the tool dies, both go on."""
    other = Guest(Path("/run/other"), tool=SOCKET).start(extra=("-uuid", "6b766d69-0000-4000-8000-000000000002"))
    guests, before = (g, other), [code(x) for x in (g, other)]
    try:
        with scenarios.hook(g, *HOT) as tool:
            wait_state(other, "hooked")

            def both(since):
                wait_until(lambda: tool.pump() is None or len({e["uuid"] for e in tool.said[since:] if e["event"] == "hit"}) == 2, 60,
                           "hits in both guests", pause=0.05)
            both(0)
            print({json.dumps({k: v for k, v in e.items() if k not in ("ts", "_at")}) for e in tool.said if e["event"] == "hit"}.pop())
            for n, (one, another) in enumerate((guests, guests[::-1])):
                expect("clean", scenarios.stop(one)[0])
                same_memory(before[n], code(one), "the one that was stopped")
                mark = tool.mark()
                tool.event("hit", since=mark, count=20, timeout=60)
                assert len({e["uuid"] for e in tool.said[mark:] if e["event"] == "hit"}) == 1, "hits in a stopped guest"
                assert info(another)["state"] == "hooked"
                another.wait_alive()
                mark = tool.mark()
                one.qmp.execute("cont")
                both(mark)
            marks = [x.qmp.mark() for x in guests]
            tool.kill()
            for x, mark, code_before in zip(guests, marks, before):
                expect("disconnected", x.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
                x.wait_alive()
                same_memory(code_before, code(x), "after the tool was killed")
    finally:
        other.kill()


@scenario(timeout=120)
def gate_watchdog_actions(g):
    """A watchdog that does not stop the guest is none of the tool's business; one that powers it off ends QEMU."""
    with Prompt(g) as tool:
        for action in ("none", "debug", "inject-nmi", "shutdown"):
            g.qmp.execute("set-action", watchdog=action)
            mark = g.qmp.mark()
            g.tell(Watchdog.what)
            g.qmp.event("WATCHDOG", since=mark, action=action)
            g.wait_alive()
            tool.watch.event("hit", since=tool.watch.mark(), count=3, timeout=60)
            seen = [k for k in kinds(g, mark) if k.startswith("KVMI") or k in ("STOP", "SHUTDOWN")]
            assert not seen and info(g)["state"] == "hooked", (action, seen, info(g))
        g.qmp.execute("set-action", watchdog="poweroff")
        pid, mark = int((DIR / "pid").read_text()), tool.watch.mark()
        g.tell(Watchdog.what)
        wait_until(lambda: ended(pid), 20, "QEMU's end")
        tool.watch.event("closed", since=mark)
        assert tool.watch.process.poll() is None, "the tool ended with the VM"
    g.spoilt = True


CYCLES = 1001 if LONG else 28
KEY = b"open sesame"


def new_object(g, tool):
    g.qmp.execute("object-del", id="kvmi0")
    wait_until(lambda: not has_object(g), 10, "the object to go", pause=0.01)
    tool.forget()
    g.qmp.execute("object-add", **g.kvmi_options(key="cookie"))


def end_of_cycle(g, tool, n, mark):
    """A session ends in one of several ways, or does not come to be."""
    kind = n % 7
    if kind == 0:
        g.qmp.execute("stop")
        g.qmp.execute("cont")
    elif kind == 1:
        g.qmp.execute("kvmi-unhook", deadline_ms=0)
        g.qmp.event("KVMI_UNHOOKED", since=mark)
        g.qmp.execute("kvmi-hook")
    elif kind == 2:
        # from the other side, as in the rest
        tool.close()
    elif kind == 3:
        new_object(g, tool)
    elif kind == 4:
        g.qmp.execute("migrate", uri="exec:sleep 10")
        g.qmp.execute("migrate_cancel")
        wait_until(lambda: migrate_status(g) == "cancelled", 20, "the end of the migration", pause=0.01)
    tool.close()
    g.qmp.event("KVMI_UNHOOKED", since=mark)
    if kind == 5:
        tool.accept().answer(b"open barley")
        assert tool.closed(), "still connected with the wrong key"
    elif kind == 6:
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="handshake-timeout-ms", value=50)
        tool.accept()
        assert tool.closed(), "still connected after the handshake's deadline"
        # It may have connected again already, and be gone before the next answer
        new_object(g, tool)


@scenario(timeout=60 + CYCLES)
def gate_fds(g):
    """Nothing is left open by sessions that end in whatever way."""
    scenarios.remove_object(g)
    g.qmp.execute("object-add", qom_type="secret", id="cookie", data=KEY.decode())
    g.qmp.execute("object-add", **g.kvmi_options(key="cookie"))
    pid = int((DIR / "pid").read_text())
    counts = []
    with RawTool() as tool:
        for n in range(CYCLES):
            mark = g.qmp.mark()
            tool.accept().answer(KEY)
            g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="hooked")
            end_of_cycle(g, tool, n, mark)
            counts.append(len(os.listdir(f"/proc/{pid}/fd")))
    print(f"files open after each of {CYCLES} sessions: at first {counts[:7]}, in the end {counts[-7:]}")
    # The least: now and then the next connection is there already
    assert min(counts[-7:]) <= min(counts[:7]), counts
    scenarios.remove_object(g)
    g.qmp.execute("object-del", id="cookie")


if __name__ == "__main__":
    scenarios.main({**SCENARIOS, **INTEL} if sys.argv[1:] else SCENARIOS)
