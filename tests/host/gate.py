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
import threading
import time
from pathlib import Path

import scenarios
from inside import DIR, GET_VERSION, HMP, HOT, QMP, Guest, Late, QMPError, RawTool, Watch, wait_until
from scenarios import Pulse, code, cont, expect, info, same_memory, wait_state

SCENARIOS = {}
scenario = functools.partial(scenarios.scenario, into=SCENARIOS)
DEADLINE = 1500         # ms: what a tool gets that does not leave
SLOW = 0.7              # s: what a slow tool takes


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
    name, outcome, planted = "prompt", "clean", True

    def __enter__(self):
        self.watch = scenarios.hook(self.g, *HOT, hits=3)
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


class Slow(Hung):
    """Takes its time, but leaves"""
    name, outcome = "slow", "clean"
    least, most = SLOW - 0.2, DEADLINE / 1000 - 0.1

    def during(self, mark):
        threading.Timer(SLOW, self.watch.signal, [signal.SIGCONT]).start()


class Killed(Hung):
    """Dies while it is waited for"""
    name, outcome = "killed", "clean"
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


# --- the ways ---------------------------------------------------------------------------------------------------------


class Way:
    """A way to stop. As it is written here: a QMP command that returns when it is done, and a guest that runs on."""
    name = action = None
    waits = True                # is the tool waited for?
    stops = False               # is the guest stopped afterwards?

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
            same_memory(self.before, code(self.g), f"stopped by {self.name}")

    def after(self):
        """Have the guest run again."""
        if self.stops:
            self.g.qmp.execute("cont")


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
                if way.waits:
                    assert tool.least <= ms / 1000 <= tool.most, f"{ms} ms: {tool.least} to {tool.most} s were expected"
                # Once, unless the guest runs on already and the tool has come and gone again
                assert len(ends) == 1 or not way.stops, ends
                if way.waits and tool_class in (Slow, Hung):
                    assert "unhooking" in pulse.states, pulse.states
            assert max(pulse.ms) < 2000, f"QMP took {max(pulse.ms):.0f} ms to answer"
            way.check(tool)
        way.after()
        g.wait_alive()
        if tool.planted:
            wait_state(g, "connecting")
            same_memory(before, code(g), f"running again after {way.name}, the tool gone")
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


class BackgroundSnapshot(MigrateFile):
    name, capabilities, stops = "background snapshot", ("background-snapshot",), False


@scenario(timeout=200)
def gate_migrate_to_file(g):
    """Migration to a file, with all kinds of tools."""
    combine(g, MigrateFile, ALL)


@scenario()
def gate_background_snapshot(g):
    """A background snapshot: the guest runs on, but the tool comes back only when it is complete."""
    combine(g, BackgroundSnapshot, (NoTool, Prompt))


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
    cont(g)


if __name__ == "__main__":
    scenarios.main(SCENARIOS)
