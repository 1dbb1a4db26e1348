#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios: run in the AMD host, one a process, by tests/test_scenarios.py; by hand:

    tests/host/run amd -- tests/host/scenarios.py NAME…

They share one guest, to save time. Each begins with the guest running, a kvmi object with the options it asked for and no
tool; whatever it leaves behind is put right, or the guest replaced, before the next one.
"""
import os
import re
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

from inside import (BUILD, CHECK_COMMAND, DIR, EPERM, GET_REGISTERS, GET_VERSION, HMP, HOT, PATIENT_MS, QMP, READ_PHYSICAL,
                    SOCKET, VM_GET_INFO, WRITE_PHYSICAL, Guest, Late, QMPError, RawTool, Tool, Watch, json_lines, kvmi, patience, symbols, wait_until)

SCENARIOS = {}


def scenario(timeout=120, object_options=None, fresh=False, guest=True, machine=None, into=SCENARIOS):
    """timeout: seconds, a boot of the guest included, on an idle machine (others get twice as much). fresh: wants a guest
    that has never been hooked. guest=False: wants none, and leaves a host that is good for nothing more."""
    def add(function):
        function.timeout, function.object_options, function.fresh, function.guest = 2 * timeout, object_options or {}, fresh, guest
        function.machine = machine
        into[function.__name__] = function
        return function
    return add


# --- helpers ----------------------------------------------------------------------------------------------------------


def info(g):
    return g.qmp.execute("query-kvmi")


def wait_state(g, state, since=0, timeout=20):
    """The object gets to the state, or is there already."""
    if info(g)["state"] != state:
        try:
            g.qmp.event("KVMI_STATE_CHANGED", since=since, timeout=timeout, state=state)
        except Late as e:
            raise Late(f"{e}; query-kvmi: {info(g)}") from None


def hook(g, *breaks, hits=20, options=()):
    """A proper tool, hooked, with its breakpoints planted and hit."""
    mark = g.qmp.mark()
    w = Watch(*breaks, options=options)
    try:
        w.event("planted" if breaks else "ready", timeout=40)
        if breaks and hits:
            w.event("hit", count=hits, timeout=40)
    except Late:
        w.kill()
        raise
    wait_state(g, "hooked", mark)
    return w


def assert_unhooked_first(trace):
    """The order is the point of it all: out of the guest first, then paused."""
    order = re.findall(r":(kvmi_unhook|vm_state_notify running 0)\b", trace)
    assert order == ["kvmi_unhook", "vm_state_notify running 0"], f"{order} in QEMU's trace:\n{trace}"


def stop(g, timeout=20):
    """QMP stop, as it should go when a tool is hooked; returns KVMI_UNHOOKED's data."""
    info(g)                     # events of an earlier tool come before its answer
    mark, traced = g.qmp.mark(), g.trace.stat().st_size
    g.qmp.execute("stop", timeout=timeout)
    order = [e["event"] for e in g.qmp.events[mark:]]
    assert "KVMI_UNHOOKED" in order, f"no KVMI_UNHOOKED before the answer to stop: {order}"
    stopped = g.qmp.event("STOP", since=mark)
    assert_unhooked_first(g.trace.read_text(errors="replace")[traced:])
    assert g.qmp.execute("query-status")["status"] == "paused"
    assert info(g)["state"] == "unhooked", info(g)
    data = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
    assert data["action"] == "stop", data
    return data, stopped


def expect(outcome, data):
    """outcome: or several that are possible"""
    possible = (outcome,) if isinstance(outcome, str) else outcome
    assert data["outcome"] in possible, f"expected the outcome {' or '.join(possible)}, got {data}"


def cont(g):
    g.qmp.execute("cont")
    g.wait_alive()


def same_memory(before, after, what):
    """The guest kernel's code is byte for byte what it was."""
    if before != after:
        where = [i for i in range(len(before)) if before[i] != after[i]]
        shown = ", ".join(f"+{i:#x}: {before[i]:02x} -> {after[i]:02x}" for i in where[:16])
        raise AssertionError(f"{what}: {len(where)} bytes of the kernel's code changed: {shown}")


def code(g):
    start, end, _ = g.text()
    return g.dump(start, end)


def breakpoint_offsets(g, names):
    """Where the breakpoints lie in a dump of the kernel's code."""
    s = symbols()
    return [s[n] - s["_text"] for n in names]


class Pulse:
    """Asks query-kvmi out of band over and over while something else goes on, and keeps how long each answer took."""

    def __init__(self, g):
        self.g, self.ms, self.states = g, [], []
        self.lag = 0            # s: how late the host woke us up at worst; it may have been as late for others

    def beat(self):
        start = time.monotonic()
        self.states.append(self.g.qmp.execute("query-kvmi", oob=True, timeout=5)["state"])
        end = time.monotonic()
        self.ms.append((end - start) * 1000)
        time.sleep(0.05)            # a pulse, not a load
        self.lag = max(self.lag, time.monotonic() - end - 0.05)

    def until(self, check, timeout, what):
        end = time.monotonic() + patience(timeout)
        while not check():
            assert time.monotonic() < end, f"waited {patience(timeout)} s in vain for {what}"
            self.beat()

    def check(self):
        """QMP answered all the time: no answer waited for the tool, whose deadline is longer than this."""
        assert max(self.ms) < 1000 + 4000 * self.lag, f"QMP took {max(self.ms):.0f} ms to answer, in a host that is {self.lag * 1000:.0f} ms late"

    def tell(self, label):
        print(f"{label}: {len(self.ms)} out-of-band answers, the slowest after {max(self.ms):.1f} ms")


# --- scenarios --------------------------------------------------------------------------------------------------------


@scenario(fresh=True)
def guest_runs_unhooked(g):
    """A guest on our modules that nobody introspects: it boots and runs, and the object just waits for a tool."""
    i = info(g)
    assert (i["state"], i["sessions"]) == ("connecting", 0), i
    g.wait_alive()


@scenario()
def guest_runs_without_object(g):
    """No kvmi object at all: stop and cont are what they always were."""
    remove_object(g)
    mark = g.qmp.mark()
    g.qmp.execute("stop")
    cont(g)
    kinds = [e["event"] for e in g.qmp.events[mark:]]
    assert kinds == ["STOP", "RESUME"], kinds
    try:
        info(g)
    except QMPError:
        return
    raise AssertionError("query-kvmi answered without an object")


@scenario()
def watch_counts_hits(g):
    """The tool finds the kernel by itself; each call of the hot functions, on either vCPU, is one hit, and returns what it should."""
    with hook(g, *HOT) as w:
        ready = w.event("ready")
        # What the tool found out must be what the guest's own kernel says.
        offset = ready["offset"] if isinstance(ready["offset"], int) else int(ready["offset"], 16)
        assert offset == g.text()[2] - symbols()["_text"], f"_text is at {g.text()[2]:#x}; the tool said {ready}"
        first = g.calls()[0]
        wait_until(lambda: w.pump(0.05) is None or g.calls()[0] > first, 20, "the guest's counter")
        first, mark = g.calls()[0], w.mark()
        wait_until(lambda: w.pump(0.05) is None or g.calls()[0] >= first + 200, 60, "200 rounds of the guest's program")
        last, end = g.calls()[0], w.mark()
        hits = [e for e in w.said[mark:end] if e["event"] == "hit"]
        expected = 2 * (last - first)       # two functions a round
        print(f"{last - first} rounds of the guest's program, {len(hits)} hits")
        assert 0.6 * expected <= len(hits) <= 1.5 * expected, f"{len(hits)} hits for {expected} calls"
        # A tool that goes to sleep with hits in its hands stands still until its next summary, and the guest with it.
        late = sum(b["ts"] - a["ts"] > 600000 for a, b in zip(hits, hits[1:]))
        assert late * 20 < len(hits), f"{late} of {len(hits)} hits came more than 0.6 s after the one before"
        assert {e["vcpu"] for e in hits} == {0, 1}, "hits on one vCPU only"
        assert {e["symbol"] for e in hits} == set(HOT), "hits of one symbol only"
        w.signal(signal.SIGINT)
        w.finish()
    g.wait_alive()


@scenario()
def watch_syscalls(g):
    """System calls by name, with what the program gave them; then all there are, named by the guest's own table."""
    calls = {"sched_get_priority_max": 146, "getppid": 110}     # asm/unistd_64.h
    with Watch(options=[o for name in calls for o in ("--syscall", name)]) as w:
        hits = [w.event("hit", count=10, timeout=60, symbol=f"__x64_sys_{name}") for name in calls]
        found = {h["syscall"]["name"]: h["syscall"] for h in hits}
        assert {n: c["number"] for n, c in found.items()} == calls, found
        # the guest asks for SCHED_FIFO, which is 1
        assert int(found["sched_get_priority_max"]["arguments"][0], 16) == 1 and len(found["getppid"]["arguments"]) == 6, found
        w.signal(signal.SIGINT)
        w.finish()
    with Watch(options=["--syscalls"]) as w:
        w.event("hit", count=60, timeout=60)
        seen = {e["syscall"]["number"]: e["syscall"]["name"] for e in w.said if e["event"] == "hit"}
        print(seen)
        assert seen.items() >= {(number, name) for name, number in calls.items()} and len(seen) > 2, seen
        w.signal(signal.SIGINT)
        w.finish()
    g.wait_alive()


@scenario()
def watch_finds_symbols_by_itself(g):
    """Without --system-map the tool reads the symbols from the guest's memory."""
    with Watch(HOT[0], system_map=False) as w:
        w.event("hit", count=5, timeout=80, symbol=HOT[0])
        w.signal(signal.SIGINT)
        assert w.finish() == 0
    g.wait_alive()


@scenario(timeout=240)
def watch_two_guests(g):
    """Two VMs at one socket: each has its breakpoints and hits, and one that is stopped does not hold up the other."""
    second = Guest(folder=Path("/run/second"))
    try:
        second.start(extra=("-name", "second", "-uuid", "6b766d69-0000-4000-8000-000000000002"))
        before = {"guest": code(g), "second": code(second)}
        with Watch(*HOT) as w:
            for name in before:
                w.event("planted", vm=name, timeout=60)
                w.event("hit", vm=name, count=20, timeout=60)
            assert {e["uuid"][-1] for e in w.said if e.get("vm") == "guest"} == {"1"}, "lines of the one say the other's UUID"
            for name, guest in (("guest", g), ("second", second)):
                offset = int(w.event("ready", vm=name)["offset"], 16)
                assert offset == guest.text()[2] - symbols()["_text"], f"{name}: {offset:#x}, {guest.text()}"
            mark = w.mark()
            expect("clean", stop(g)[0])
            w.event("closed", since=mark, vm="guest")
            same_memory(before["guest"], code(g), "paused, another VM being watched")
            mark = w.mark()
            w.event("hit", since=mark, vm="second", count=20, timeout=60)
            assert not [e for e in w.said[mark:] if e.get("vm") == "guest" and e["event"] == "hit"], "hits in a VM that is paused"
            cont(g)
            mark = w.mark()
            for name in before:
                w.event("hit", since=mark, vm=name, count=5, timeout=60)
            w.signal(signal.SIGINT)
            assert w.finish() == 0
            assert {e["vm"] for e in w.said if e["event"] == "closed" and e["reason"] == "stop"} == set(before)
        for name, guest in (("guest", g), ("second", second)):
            guest.wait_alive()
            same_memory(before[name], code(guest), f"{name}, after Ctrl-C")
    finally:
        second.kill()


@scenario()
def stop_prompt_tool(g):
    """The main job: QMP stop waits until the tool has taken its breakpoints out; none is left; cont brings the hits back."""
    before = code(g)
    with hook(g, *HOT) as w:
        with_breakpoints = code(g)
        planted = breakpoint_offsets(g, HOT)
        # The dump sees breakpoints when they are there: without this the rest would prove nothing.
        assert all(with_breakpoints[o] == 0xcc for o in planted), "the breakpoints do not show in a dump"
        mark = w.mark()
        data, stopped = stop(g)
        expect("clean", data)
        assert data["duration"] < 4500000, f"clean, but not promptly: {data}"
        after = code(g)
        assert not any(after[o] == 0xcc for o in planted), "a breakpoint is left in the paused guest"
        same_memory(before, after, "paused after a clean unhook")
        closed = w.event("closed", since=mark)
        assert closed["ts"] <= stopped["us"], "the VM was paused before the tool had closed"
        mark = w.mark()
        state_mark = g.qmp.mark()
        cont(g)
        w.event("hit", since=mark, count=20, timeout=60)
        wait_state(g, "hooked", state_mark)
        assert g.calls()[1] == 0
        print(f"clean after {data['duration']} µs")
        w.signal(signal.SIGINT)
        w.finish()
        g.wait_alive()


@scenario()
def stop_by_hmp(g):
    """The human monitor's stop goes through the same gate."""
    before = code(g)
    with hook(g, *HOT) as w:
        mark, traced = g.qmp.mark(), g.trace.stat().st_size
        g.hmp("stop")
        g.qmp.event("STOP", since=mark)
        assert_unhooked_first(g.trace.read_text(errors="replace")[traced:])
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        same_memory(before, code(g), "paused by HMP")
        mark = w.mark()
        cont(g)
        w.event("hit", since=mark, timeout=60)
        w.signal(signal.SIGINT)
        w.finish()


@scenario()
def stop_many_times(g):
    """Ten stops and conts in a row with breakpoints planted: nothing wears out, nothing is left, the guest never notices."""
    before = code(g)
    with hook(g, *HOT) as w:
        for n in range(10):
            expect("clean", stop(g)[0])
            mark = w.mark()
            state_mark = g.qmp.mark()
            g.qmp.execute("cont")
            w.event("hit", since=mark, count=3, timeout=60)
            wait_state(g, "hooked", state_mark)
        w.signal(signal.SIGINT)
        w.finish()
    g.wait_alive()
    same_memory(before, code(g), "after ten stops")
    i = info(g)
    assert i["unhooks"]["forced"] == 0, i


@scenario()
def stop_hung_tool(g):
    """A tool that does not answer: the guest runs on and QMP answers until the deadline, then it is cut off and the VM is paused."""
    with hook(g) as w:
        w.signal(signal.SIGSTOP)
        mark = g.qmp.mark()
        calls = g.calls()[0]
        pulse = Pulse(g)
        begin = time.monotonic()
        number = g.qmp.send("stop")
        pulse.until(lambda: number in g.qmp.replies, 20, "the answer to stop")
        took = time.monotonic() - begin
        pulse.tell("while the tool hung")
        data = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        expect("forced", data)
        assert 4.9 <= data["duration"] / 1e6 and took < 10 + 4 * pulse.lag, f"the deadline is 5 s; it took {took:.1f} s: {data}"
        assert pulse.states.count("unhooking") > 10, f"states seen meanwhile: {pulse.states}"
        pulse.check()
        assert g.calls()[0] > calls, "the guest stood still while the tool was waited for"
        assert g.qmp.execute("query-status")["status"] == "paused"
        state_mark = g.qmp.mark()
        cont(g)
        # The tool wakes up, sees that its connection has gone, and is ready for the next one.
        w.signal(signal.SIGCONT)
        wait_state(g, "hooked", state_mark)


@scenario(object_options={"unhook_timeout_ms": 800})
def stop_deadline_is_an_option(g):
    """unhook-timeout-ms is respected, and can be changed while the VM runs."""
    with hook(g) as w:
        w.signal(signal.SIGSTOP)
        data, _ = stop(g)
        expect("forced", data)
        assert 0.75 <= data["duration"] / 1e6 < 4, data      # not the 5 s of who says nothing
        cont(g)
        mark = g.qmp.mark()
        told = w.mark()
        w.signal(signal.SIGCONT)
        wait_state(g, "hooked", mark)
        w.event("ready", since=told, timeout=20)    # has asked to be told of the next stop
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=2000)
        w.signal(signal.SIGSTOP)
        data, _ = stop(g)
        expect("forced", data)
        assert 1.9 <= data["duration"] / 1e6 < 4.9, data
        cont(g)


@scenario()
def silent_tool(g):
    """A tool that hangs with an event open is not for ever in the guest's way, even if nobody stops the guest."""
    before = code(g)
    with hook(g, *HOT) as w:
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="silence-timeout-ms", value=2000)
        # One that answers may be hooked for as long as it likes
        time.sleep(3)
        assert info(g)["state"] == "hooked", info(g)

        mark, told, begin = g.qmp.mark(), w.mark(), time.monotonic()
        w.signal(signal.SIGSTOP)
        data = g.qmp.event("KVMI_UNHOOKED", since=mark, timeout=20)["data"]
        expect("forced", data)
        assert data["action"] == "silence" and data["restored"] == len(HOT), data
        assert time.monotonic() - begin > 1.9
        g.wait_alive()
        same_memory(before, code(g), "after a tool that hung")

        w.signal(signal.SIGCONT)
        w.event("closed", since=told, timeout=20)
        w.event("planted", since=told, timeout=60)
        w.event("hit", since=told, timeout=60)
        g.qmp.execute("qom-set", path="/objects/kvmi0", property="silence-timeout-ms", value=PATIENT_MS)


@scenario()
def tool_killed_during_stop(g):
    """The tool dies while it is waited for: no need to wait for the deadline."""
    with hook(g) as w:
        w.signal(signal.SIGSTOP)
        mark = g.qmp.mark()
        number = g.qmp.send("stop")
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="unhooking")
        w.kill()
        g.qmp.result(number, 4, "the answer to stop, well before the deadline")
        data = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        assert data["outcome"] in ("clean", "disconnected") and data["duration"] < 4500000, data
        cont(g)


@scenario()
def tool_killed_while_hooked(g):
    """The tool dies: KVM and QEMU let go by themselves, a stop after that waits for nobody, and a new tool gets in at once."""
    w = hook(g)
    mark = g.qmp.mark()
    w.kill()
    expect("disconnected", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
    wait_state(g, "connecting", mark)
    mark = g.qmp.mark()
    g.qmp.execute("stop", timeout=4)
    assert "KVMI_UNHOOKED" not in [e["event"] for e in g.qmp.events[mark:]]
    cont(g)
    with hook(g, *HOT) as w:        # HOOK right after UNHOOK: EEXIST would show here
        w.signal(signal.SIGINT)
        w.finish()


@scenario()
def tool_killed_with_breakpoints(g):
    """The tool dies with breakpoints in hot functions, and with vCPUs waiting at them: KVM takes them out, the guest runs on."""
    before = code(g)
    for _ in range(3):
        w = hook(g, *HOT)
        mark = g.qmp.mark()
        w.kill()
        expect("disconnected", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        same_memory(before, code(g), "after the tool was killed")
        g.wait_alive()


@scenario()
def stop_hung_tool_with_breakpoints(g):
    """The tool hangs with breakpoints in hot functions: after the deadline the paused guest has none of them, and it runs on."""
    before = code(g)
    with hook(g, *HOT) as w:
        w.signal(signal.SIGSTOP)
        data, _ = stop(g)
        expect("forced", data)
        same_memory(before, code(g), "paused after the deadline")
        mark = g.qmp.mark()
        cont(g)
        w.signal(signal.SIGCONT)
        wait_state(g, "hooked", mark)
        stop(g)
        same_memory(before, code(g), "stopped again, with the tool awake")
        cont(g)


@scenario()
def stop_without_tool(g):
    """Nobody connected: stop is immediate, and a tool that comes while the VM is paused gets in when it runs, not before."""
    mark = g.qmp.mark()
    g.qmp.execute("stop", timeout=4)
    assert "KVMI_UNHOOKED" not in [e["event"] for e in g.qmp.events[mark:]]
    assert info(g)["state"] == "unhooked", info(g)
    with Watch() as w:
        # Ten times the chardev's reconnect interval: if a stopped VM connected, it would have by now.
        w.pump(1)
        assert info(g)["state"] == "unhooked", info(g)
        mark = g.qmp.mark()
        g.qmp.execute("cont")
        wait_state(g, "hooked", mark)
        w.event("ready")


@scenario()
def stop_tool_not_subscribed(g):
    """A tool that does not listen to the UNHOOK event is cut off at once: waiting for it would be in vain."""
    with RawTool() as tool:
        mark = g.qmp.mark()
        tool.accept().answer()
        wait_state(g, "hooked", mark)
        error, _ = tool.command(GET_VERSION)
        assert error == 0
        data, _ = stop(g, timeout=4)
        expect("not-subscribed", data)
        assert data["duration"] < 4500000, data
        assert tool.closed(), "the tool's connection is still open"
        cont(g)


@scenario()
def stop_tool_that_chatters(g):
    """A tool that was told to leave, and goes on sending commands instead: the deadline holds."""
    with RawTool() as tool:
        mark = g.qmp.mark()
        tool.accept().answer()
        wait_state(g, "hooked", mark)
        tool.subscribe_unhook()
        number = g.qmp.send("stop")
        tool.await_unhook()
        commands = 0
        try:
            while True:
                tool.command(GET_VERSION)
                commands += 1
        except (EOFError, ConnectionError):
            pass
        g.qmp.result(number, 10, "the answer to stop")
        data = g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]
        expect("forced", data)
        assert commands > 100, f"only {commands} commands were answered until the deadline"
        print(f"{commands} commands answered before the deadline")
        cont(g)


@scenario()
def stop_during_handshake(g):
    """A stop while a tool has not answered the handshake yet: nobody to wait for."""
    with RawTool() as tool:
        mark = g.qmp.mark()
        tool.accept()
        wait_state(g, "handshake", mark)
        g.qmp.execute("stop", timeout=4)
        assert g.qmp.execute("query-status")["status"] == "paused"
        assert tool.closed(), "the connection outlives the stop"
        cont(g)


@scenario(object_options={"handshake_timeout_ms": 700})
def handshake_deadline(g):
    """A tool that never answers the handshake is dropped, and the next one gets its chance."""
    with RawTool() as tool:
        tool.accept()
        assert tool.closed(5), "still connected after the handshake's deadline"
        mark = g.qmp.mark()
        tool.accept().answer()
        wait_state(g, "hooked", mark)
        assert tool.command(GET_VERSION)[0] == 0


@scenario()
def cont_during_the_wait(g):
    """Someone wants the VM to run while another's stop still waits for the tool: that stop fails, and the VM has never stopped."""
    with hook(g) as w:
        w.signal(signal.SIGSTOP)
        mark = g.qmp.mark()
        number = g.qmp.send("stop")
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="unhooking")
        g.hmp("cont", 10)
        w.signal(signal.SIGCONT)
        try:
            g.qmp.result(number, 20, "an answer to stop")
        except QMPError as e:
            print(f"stop answered: {e}")
        else:
            raise AssertionError("stop succeeded, with a cont meanwhile")
        wait_state(g, "hooked", mark)
        g.wait_alive()
        assert g.qmp.execute("query-status")["running"]
        kinds = [e["event"] for e in g.qmp.events[mark:]]
        assert "STOP" not in kinds, kinds


@scenario()
def two_stops_at_once(g):
    """Two more stops while the first waits: all are answered, the tool is told once, the VM is paused once."""
    with hook(g) as w:
        other, human = QMP(DIR / "qmp2"), HMP()
        w.signal(signal.SIGSTOP)
        mark = g.qmp.mark()
        number = g.qmp.send("stop")
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="unhooking")
        human.send("stop")
        second = other.send("stop")
        w.signal(signal.SIGCONT)
        g.qmp.result(number, 20, "the answer to the first stop")
        other.result(second, 20, "the answer to the second stop")
        human.prompt("stop")
        other.close()
        human.sock.close()
        kinds = [e["event"] for e in g.qmp.events[mark:]]
        assert kinds.count("STOP") == 1 and kinds.count("KVMI_UNHOOKED") == 1, kinds
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        cont(g)


@scenario()
def qmp_client_gone_during_the_wait(g):
    """Whoever asked for the stop hangs up while it waits: the VM is paused all the same, and QEMU lives."""
    with hook(g) as w:
        w.signal(signal.SIGSTOP)
        mark = g.qmp.mark()
        other = QMP(DIR / "qmp2")
        other.send("stop")
        g.qmp.event("KVMI_STATE_CHANGED", since=mark, state="unhooking")
        other.close()
        w.signal(signal.SIGCONT)
        g.qmp.event("STOP", since=mark)
        expect("clean", g.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        assert g.qmp.execute("query-status")["status"] == "paused"
        cont(g)


@scenario()
def tool_comes_late(g):
    """The tool may be started long after the VM, and again and again."""
    g.wait_alive()
    for _ in range(3):
        with hook(g, *HOT, hits=3) as w:
            w.signal(signal.SIGINT)
            w.finish()
    g.wait_alive()


@scenario()
def object_added_and_deleted(g):
    """object-del ends the session and frees the VM for another object; object-add hooks a VM that runs already."""
    with hook(g) as w:
        mark, tool_mark = g.qmp.mark(), w.mark()
        g.qmp.execute("object-del", id="kvmi0")
        assert g.qmp.event("KVMI_UNHOOKED", since=mark)["data"]["action"] == "object-del"
        w.event("closed", since=tool_mark)
        mark = g.qmp.mark()
        g.qmp.execute("object-add", **g.kvmi_options())
        wait_state(g, "hooked", mark)
        try:
            g.qmp.execute("object-add", qom_type="kvmi", id="kvmi1", chardev="tool")
        except QMPError as e:
            print(f"a second object: {e}")
        else:
            raise AssertionError("a second object was accepted")


@scenario()
def wrong_key(g):
    """With a key, a tool that does not know it never gets to KVM; one that does, gets in; QEMU says what was wrong."""
    remove_object(g)
    g.qmp.execute("object-add", qom_type="secret", id="cookie", data="open sesame")
    try:
        g.qmp.execute("object-add", **g.kvmi_options(key="cookie"))
        with RawTool() as tool:
            mark = g.qmp.mark()
            tool.accept().answer(b"open barley")
            assert tool.closed(), "a tool with the wrong key stays connected"
            states = [e["data"]["state"] for e in g.qmp.events[mark:] if e["event"] == "KVMI_STATE_CHANGED"]
            assert "hooked" not in states, states
            assert info(g).get("last-error"), info(g)
            print(info(g)["last-error"])
            mark = g.qmp.mark()
            tool.accept().answer(b"open sesame")
            wait_state(g, "hooked", mark)
            assert tool.command(GET_VERSION)[0] == 0
    finally:
        remove_object(g)
        g.qmp.execute("object-del", id="cookie")


@scenario()
def hmac_both_ways(g):
    """With auth=hmac, either side learns whether the other knows the key; a tool that sends the old cookie is refused."""
    remove_object(g)
    g.qmp.execute("object-add", qom_type="secret", id="cookie", data="open sesame")
    try:
        g.qmp.execute("object-add", **g.kvmi_options(key="cookie", auth="hmac"))
        with RawTool() as tool:
            tool.accept().answer(b"open sesame")
            assert tool.closed(), "a tool with a cookie stays connected"
            assert "auth=hmac" in info(g)["last-error"], info(g)
            tool.accept()
            try:
                tool.answer_hmac(b"open barley")
                raise AssertionError("QEMU answers to the wrong key")
            except EOFError:
                assert "wrong key" in info(g)["last-error"], info(g)
            mark = g.qmp.mark()
            tool.accept()
            assert tool.answer_hmac(b"open sesame"), "QEMU's proof is wrong"
            wait_state(g, "hooked", mark)
            assert tool.command(GET_VERSION)[0] == 0
            assert info(g)["auth"] == "hmac", info(g)
    finally:
        remove_object(g)
        g.qmp.execute("object-del", id="cookie")


@scenario(object_options={"commands": ["vm-get-info", "vm-control-events"], "events": ["unhook"]})
def allow_list(g):
    """A command that is not on the list gets EPERM from KVM; those on it, and the three that always are, work."""
    i = info(g)
    assert set(i["commands"]) == {"get-version", "vm-check-command", "vm-check-event", "vm-get-info", "vm-control-events"}, i
    with RawTool() as tool:
        mark = g.qmp.mark()
        tool.accept().answer()
        wait_state(g, "hooked", mark)
        read = struct.pack("=QHHI", 0x1000, 8, 0, 0)
        assert tool.command(READ_PHYSICAL, read)[0] == EPERM
        assert tool.command(WRITE_PHYSICAL, read + bytes(8))[0] == EPERM
        assert tool.command(GET_REGISTERS, bytes(16))[0] == EPERM
        assert tool.command(CHECK_COMMAND, struct.pack("=HHI", READ_PHYSICAL, 0, 0))[0] == EPERM
        error, data = tool.command(VM_GET_INFO)
        assert error == 0 and struct.unpack_from("=I", data)[0] == 2, (error, data)
        tool.subscribe_unhook()


@scenario()
def ctrl_c_leaves_a_clean_guest(g):
    """Ctrl-C on the tool: every breakpoint is out, the guest never noticed."""
    before = code(g)
    with hook(g, *HOT) as w:
        mark = g.qmp.mark()
        w.signal(signal.SIGINT)
        status = w.finish()
        assert status in (0, 130), f"the tool ended with status {status}"
        wait_state(g, "connecting", mark)
        same_memory(before, code(g), "after Ctrl-C")
        g.wait_alive()


@scenario()
def object_errors(g):
    """Options that cannot work are refused, with words that help."""
    remove_object(g)
    for options, words in (({"chardev": "nowhere"}, "nowhere"),
                           ({"chardev": "hmp"}, "server=off"),
                           ({"key": "nokey"}, "nokey"),
                           ({"auth": "hmac"}, "key"),
                           ({"commands": ["vmx-*"]}, "vmx-*"),
                           ({"commands": ["make-coffee"]}, "make-coffee"),
                           ({"events": ["fire"]}, "fire")):
        try:
            g.qmp.execute("object-add", **g.kvmi_options(**options))
        except QMPError as e:
            assert words in str(e), f"{options}: the message does not tell: {e}"
            print(e)
        else:
            raise AssertionError(f"{options} was accepted")
    g.qmp.execute("object-add", **g.kvmi_options())


MAP = ("--system-map", str(BUILD / "linux/System.map"))


@scenario(timeout=240)
def tool_ps_and_modules(g):
    """kvmi ps and kvmi modules say what the guest's own /proc says; the types are read from its memory."""
    told = g.ask("list processes", "that was all")
    # PID (COMM) STATE PPID
    expected = {int(pid): (comm, int(ppid)) for pid, comm, ppid in re.findall(r"process (\d+) \((.*)\) \S (\d+) ", told)}
    assert len(expected) > 20, told
    start = time.monotonic()
    found = {p["pid"]: p for p in json_lines(kvmi("ps", "--json", *MAP)[0])}
    print(f"{len(found)} processes after {time.monotonic() - start:.1f} s")
    # kernel workers come and go, and children of the guest's program
    lasting = {pid: e for pid, e in expected.items() if not e[0].startswith("kworker") and (pid == 1 or e[0] != "init")}
    for pid, (comm, ppid) in lasting.items():
        comm = comm[:15]        # /proc knows the rest of a kernel thread's name
        assert pid in found, f"no process {pid} ({comm}) in {found}"
        assert (found[pid]["comm"], found[pid]["ppid"]) == (comm, ppid), f"{found[pid]} instead of {comm} of {ppid}"
    extra = {p["comm"] for p in found.values() if p["pid"] not in expected and not p["comm"].startswith(("kworker", "init"))}
    assert not extra, f"processes the guest does not know: {extra}"
    init = found[1]
    assert not init["kernel"] and int(init["cr3"], 16) and init["uid"] == 0, init
    assert found[2]["kernel"] and found[2]["cr3"] == "0x0", found[2]
    # the same with what was given, all threads, and nothing moving
    text = kvmi("ps", "--threads", "--pause", *MAP)[0]
    mine = re.findall(r"^ +1 +(\d+) +0 +0 [RSD] +\w+ init$", text, re.M)
    assert len(set(mine)) >= 3, text        # the guest's program has a thread for each CPU, and the first
    assert "[kthreadd]" in text, text

    modules = re.findall(r"module (\w+) (\d+) (\d+) \S+ (\w+) 0x(\w+)", told)
    assert modules, told
    found = [(m["name"], m["size"], m["references"], m["state"], int(m["base"], 16)) for m in json_lines(kvmi("modules", "--json", *MAP)[0])]
    assert found == [(n, int(s), int(r), state.lower(), int(b, 16)) for n, s, r, state, b in modules], f"{found} instead of {modules}"
    # the types alone: the symbols are read from its memory
    s, (start, *_) = symbols(), g.text()
    btf = DIR / "btf"
    btf.write_bytes(g.dump(start + s["__start_BTF"] - s["_text"], start + s["__stop_BTF"] - s["_text"]))
    pids = {p["pid"] for p in json_lines(kvmi("ps", "--json", "--btf", str(btf))[0])}
    assert pids >= set(lasting), f"{set(lasting) - pids} are missing in {pids}"
    again = [m["name"] for m in json_lines(kvmi("modules", "--json", "--btf", str(btf))[0])]
    assert again == [m[0] for m in modules], again
    # types that are not there
    assert "neither vmlinux nor BTF" in kvmi("ps", *MAP, "--btf", "/dev/null", status=1)[1]
    g.wait_alive()


@scenario(timeout=240)
def tool_dump(g):
    """kvmi dump writes what QEMU's own dump has, as it is and as a core file with the registers of both vCPUs; holes are holes."""
    start, end, virtual = g.text()
    start, end = start & ~4095, start + (1 << 20)
    expected = g.dump(start, end)
    path = DIR / "core"
    kvmi("dump", "--pause", "--quiet", "--format", "raw", "--range", f"{start},{end - start}", str(path))
    same_memory(expected, path.read_bytes(), "raw dump")

    # the last MiB of memory, and one behind it
    kvmi("dump", "--pause", "--quiet", "--range", "0xff00000,0x200000", str(path))
    core = path.read_bytes()
    assert core[:4] == b"\x7fELF" and struct.unpack_from("<H", core, 16)[0] == 4, "not a core file"
    count, = struct.unpack_from("<H", core, 56)
    programs = [struct.unpack_from("<IIQQQQQ", core, 64 + 56 * i) for i in range(count)]
    (note, _, at, _, _, size, _), (load, _, offset, _, physical, length, _) = programs
    assert (note, load, physical, length) == (4, 1, 0xff00000, 0x100000), programs
    notes = core[at:at + size]
    assert notes.count(b"CORE\0") == 2 and notes.count(b"QEMU\0") == 2, "registers of two vCPUs"
    g.qmp.execute("stop")
    # most of that memory is idle
    now = g.dump(physical, physical + length)
    same = sum(core[offset + i:offset + i + 4096] == now[i:i + 4096] for i in range(0, length, 4096))
    assert same > 200, f"{same} of 256 pages are what they are in QEMU's dump"
    assert any(now), "there is nothing in that memory"
    cont(g)
    readelf = subprocess.run(["readelf", "-n", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True).stdout.decode(errors="replace")
    assert readelf.count("NT_PRSTATUS") == 2 and "Warning" not in readelf, readelf

    before = path.read_bytes()
    assert "no memory" in kvmi("dump", "--quiet", "--range", "0x20000000,0x100000", str(path), status=1)[1]
    assert path.read_bytes() == before and [p.name for p in DIR.glob("core*")] == ["core"], "an incomplete dump was left behind"
    g.wait_alive()


@scenario(timeout=240)
def tool_protect(g):
    """kvmi protect sees the kernel rewrite its own code, and who did it; not hindered, the guest runs on; a stop finds nothing left."""
    before = code(g)
    with Tool("protect") as t:
        protected = t.event("protected", timeout=40)
        s = symbols()
        pages = {name: (-(-s[end] // 4096) - s[start] // 4096) for name, start, end in (
            ("text", "_stext", "_etext"), ("rodata", "__start_rodata", "__end_rodata"))}
        assert {k: protected[k] for k in pages} == pages, f"{protected} instead of {pages}"
        g.wait_alive()
        t.mark()
        assert not [e for e in t.said if e["event"] == "violation"], "violations in a guest that does nothing of the kind"
        t.signal(signal.SIGINT)
        assert t.finish() == 0
        t.event("clean")
    g.tell("patch")
    with Tool("protect", "--text") as t:
        for _ in range(2):
            mark = t.mark()
            v = t.event("violation", since=mark, count=3, timeout=40)
            assert (v["access"], v["area"], v["user"]) == ("write", "text", False), v
            assert re.match(r"(__)?(text_poke|memcpy)", v["by"]), v
            offset = t.event("ready")["offset"]
            assert v["registers"]["rip"] == v["rip"] and s["_stext"] <= int(v["address"], 16) - int(offset, 16) < s["_etext"], v
            mark = t.mark()
            data, stopped = stop(g)
            expect("clean", data)
            assert t.event("clean", since=mark)["ts"] <= stopped["us"]
            cont(g)
        t.event("violation", since=t.mark(), timeout=40)
        print(f"{len([e for e in t.said if e['event'] == 'violation'])} violations, unhooked after {data['duration']} µs")
    by = v["by"].split("+")[0]
    with Tool("protect", "--text", "--ignore", by) as t:
        t.event("protected", timeout=40)
        summary = t.event("summary", timeout=40)
        assert summary["ignored"] > 0 and summary["violations"] == 0, summary
        t.signal(signal.SIGTERM)
        assert t.finish() == 0
    g.ask("be quiet", "quiet")
    g.wait_alive()
    same_memory(before, code(g), "patched and patched back")


@scenario(timeout=240)
def tool_trace(g):
    """kvmi trace follows a system call from its first instruction on, and a vCPU from wherever it is; nothing is left behind."""
    before = code(g)
    said = json_lines(kvmi("trace", "--json", "--from", HOT[0], "--steps", "150", "--timeout", "60", *MAP)[0])
    steps = [e["symbol"].split("+")[0] for e in said if e["event"] == "step"]
    assert said[0]["event"] == "begin" and said[0]["symbol"] == HOT[0], said[0]
    assert (said[-1]["steps"], said[-1]["reason"], len(steps)) == (150, "done", 150), said[-1]
    # the function, and then what called it
    assert steps[0] == HOT[0] and {"x64_sys_call", "do_syscall_64"} & set(steps), steps
    g.wait_alive()
    same_memory(before, code(g), "after a trace from a breakpoint")
    text = kvmi("trace", "--vcpu", "1", "--steps", "20", *MAP)[0]
    print(text)
    assert re.search(r"^vCPU 1, from ", text) and re.search(r"^\d+ steps: (done|halted)$", text, re.M), text
    assert "vCPUs 0 to 1" in kvmi("trace", "--vcpu", "2", *MAP, status=1)[1]
    # one that is never reached: nothing is left after the wait
    assert "not reached" in kvmi("trace", "--from", "panic", "--timeout", "12", *MAP, status=1)[1]
    same_memory(before, code(g), "after a trace that did not begin")
    g.wait_alive()


# TSC_DEADLINE, and x2APIC's EOI, ICR and TMICT: whatever the guest's timer makes it write
MSRS = ("0x6e0", "0x80b", "0x830", "0x838")


@scenario(timeout=240)
def watch_events(g):
    """kvmi watch with breakpoints, CR3, MSRs and a page at once: all are told of; a stop undoes it before, cont brings it back."""
    before = code(g)
    page = (g.text()[0] + symbols()[HOT[0]] - symbols()["_text"]) >> 12
    # two functions of the guest's program in different pages, else the breakpoint would be in a page that may not be executed
    assert page != (g.text()[0] + symbols()[HOT[1]] - symbols()["_text"]) >> 12
    with Watch(HOT[1], options=["--cr", "3", *(o for m in MSRS for o in ("--msr", m)), "--access", f"{HOT[0]}=r"]) as t:
        mark = 0
        for _ in range(2):
            planted = t.event("planted", since=mark, timeout=40)
            assert (planted["breakpoints"], planted["pages"]) == (1, 1), planted
            cr = t.event("cr", since=mark, timeout=40, cr=3)
            assert cr["old"] == cr["cr3"] and cr["new"] != "0x0" and not cr["user"] and "+0x" in cr["by"], cr
            pf = t.event("pf", since=mark, timeout=40, access="execute")
            assert int(pf["gpa"], 16) >> 12 == page and pf["gva"] == pf["rip"], pf
            t.event("msr", since=mark, timeout=40)
            t.event("hit", since=mark, timeout=40, symbol=HOT[1], count=3)
            summary = t.event("summary", since=mark, timeout=40)
            assert {e["event"] for e in summary["events"]} <= {"cr", "msr", "pf"} and summary["events"][0]["new"] > 0, summary
            mark = t.mark()
            data, stopped = stop(g)
            expect("clean", data)
            assert data["duration"] < 4500000, f"clean, but not promptly: {data}"
            assert t.event("closed", since=mark, reason="unhook")["ts"] <= stopped["us"]
            same_memory(before, code(g), "paused after a clean unhook")
            print({k: sum(e["event"] == k for e in t.said) for k in ("hit", "cr", "msr", "pf")}, f"unhooked after {data['duration']} µs")
            mark = t.mark()
            cont(g)
        t.event("pf", since=mark, timeout=40)
        t.signal(signal.SIGINT)
        assert t.finish() == 0
        assert t.event("closed", reason="stop")["events"] > 0
    g.wait_alive()
    same_memory(before, code(g), "after Ctrl-C")
    # for people; nobody looks for a kernel
    text = kvmi("watch", "--cr", "3", "--count", "7", "--show", "3")[0]
    print(text)
    assert text.count("CR3 0x") == 3 and "cr are only counted" in text and re.search(r"^guest: \d+ events of the kind cr$", text, re.M), text
    assert "Linux" not in text, text
    for options, words in ((("--msr", "0x12345"), "vcpu-control-msr"), (("--access", "phys:0x20000000=r"), "no memory")):
        with Tool("watch", *options, system_map=False) as t:
            assert words in t.event("problem", timeout=40)["message"], t.said
            t.signal(signal.SIGINT)
            assert t.finish() == 1
    g.wait_alive()


@scenario(timeout=240)
def watch_same_page(g):
    """A breakpoint in a page whose execution is an event, too: both are told of, and nothing of either is left."""
    before = code(g)
    with Watch(HOT[0], options=["--access", f"{HOT[0]}=r"]) as t:
        t.event("planted", timeout=40, breakpoints=1, pages=1)
        t.event("hit", timeout=60, count=20, symbol=HOT[0])
        t.event("pf", timeout=60, access="execute", count=20)
        problems = [e for e in t.said if e["event"] == "problem"]
        assert not problems, problems
        data, _ = stop(g)
        expect("clean", data)
        same_memory(before, code(g), "paused after a clean unhook")
        mark = t.mark()
        cont(g)
        t.event("hit", since=mark, timeout=60, count=5)
        t.signal(signal.SIGINT)
        assert t.finish() == 0
    g.wait_alive()
    same_memory(before, code(g), "after Ctrl-C")


@scenario(timeout=240, fresh=True)
def watch_boot(g):
    """From the guest's first instruction on: it loads its descriptor tables and sets XCR0; then it calls the tool."""
    with Tool("watch", "--descriptors", "--xsetbv", "--hypercalls", system_map=False) as t:
        g.start(alive=False)
        for register in ("GDTR", "IDTR", "TR"):
            t.event("descriptor", register=register, write=True, timeout=120)
        xsetbv = t.event("xsetbv", timeout=120)
        assert xsetbv["xcr"] == 0 and int(xsetbv["new"], 16) & 3 == 3 and not xsetbv["user"], xsetbv
        g.wait_alive(400)
        assert t.event("ready")["vcpus"] >= 1
        # a call that is answered returns 0
        g.ask("call", "call returned 0")
        assert t.event("hypercall")["user"]
        print({k: sum(e["event"] == k for e in t.said) for k in ("descriptor", "xsetbv", "hypercall")})
        expect("clean", stop(g)[0])
        cont(g)
        t.signal(signal.SIGINT)
        t.finish()
    # nobody is there: to KVM it is a hypercall of a program, which it refuses
    wait_state(g, "connecting")
    g.ask("call", "call returned -1")


@scenario(timeout=240)
def tool_stat(g):
    """kvmi stat counts events and measures commands."""
    with Tool("stat", "--cr", "3", "--access", f"{HOT[0]}=r", "--count", "3") as t:
        said = t.event("stat", count=2, timeout=40)
        counts = {e["event"]: e["count"] for e in said["events"]}
        assert counts["cr"] > 0 and counts["pf"] > 0, said
        for what in ("command", "vcpu_command"):
            assert 0 < said[what]["least_us"] <= said[what]["mean_us"] <= said[what]["most_us"], said
        assert t.finish() == 0, "--count does not end it"
    g.wait_alive()


def bytes_of(text):
    """What kvmi read has printed"""
    return bytes.fromhex("".join(re.findall(r"^\w{16}  ((?:\w\w +)+) \|", text, re.M)))


@scenario()
def tool_read_and_info(g):
    """kvmi read prints what QEMU finds in memory, by symbol, by address and physically; kvmi info what QEMU said of the VM."""
    start, _, virtual = g.text()
    place, size = symbols()["linux_banner"] - symbols()["_text"], 50
    expected = g.dump(start + place, start + place + size)
    assert expected.startswith(b"Linux version "), expected
    for words in (*MAP, "linux_banner"), (hex(virtual + place),), ("--vcpu", "1", hex(virtual + place)), ("--physical", hex(start + place)):
        text = kvmi("read", *words, str(size))[0]
        assert bytes_of(text) == expected and "|Linux version 6" in text, f"{words}: {text}"
    assert bytes_of(kvmi("read", *MAP, "linux_banner+6", "7")[0]) == b"version"
    # across pages, and more than one line or message
    path = DIR / "read"
    kvmi("read", *MAP, "-o", str(path), "_text+4090", "20000")
    same_memory(g.dump(start + 4090, start + 24090), path.read_bytes(), "read by symbol")
    kvmi("read", "--physical", "-o", str(path), hex(start + 4090), "20000")
    same_memory(g.dump(start + 4090, start + 24090), path.read_bytes(), "read physically")
    for words, error in ((("--physical", "0x20000000", "16"), "no memory"), (("0xffff000000000000", "1"), "0xffff000000000000"),
                         (("--vcpu", "7", hex(virtual), "1"), "vCPU"), ((*MAP, "no_such_symbol", "1"), "no_such_symbol")):
        assert error in kvmi("read", *words, status=1)[1], words

    text = kvmi("info")[0]
    print(text)
    for line in ("Name: guest", "UUID: 6b766d69-0000-4000-8000-000000000001", "Memory ends at: 0x10000000 (256 MiB)", "vCPUs: 2"):
        assert line in text.splitlines(), f"'{line}' is missing:\n{text}"
    assert len(re.findall(r"^vCPU [01]: rip 0x\w{16} ", text, re.M)) == 2 and "not allowed" not in text, text
    remove_object(g)
    g.qmp.execute("object-add", **g.kvmi_options(commands=["vm-get-info"], events=["unhook"]))
    text = kvmi("info")[0]
    allowed, refused = re.findall(r"^Commands, (?:not )?allowed:\n(.*)", text, re.M)
    assert "vm-get-info" in allowed.split() and "vcpu-get-registers" in refused.split() and "read-physical" not in allowed, text
    assert len(re.findall(r"^vCPU [01]: .*not allow", text, re.M)) == 2, text
    g.wait_alive()


def doctor(status, qemu="qemu/bin/qemu-system-x86_64"):
    """What kvmi doctor finds missing in this host"""
    said = json_lines(kvmi("doctor", "--json", "--qemu", str(BUILD / qemu), status=status)[0])
    print(said)
    assert {c["check"] for c in said} >= {"cpu", "modules", "device", "qemu", "socket"}, said
    return [c["check"] for c in said if c["state"] == "missing"]


@scenario()
def tool_doctor(_):
    """kvmi doctor finds nothing wrong with this host, and says of another QEMU that it won't do. See host_without_kvmi for more."""
    assert doctor(0) == []
    assert doctor(1, qemu="qemu/bin/qemu-img") == ["qemu"]
    text = kvmi("doctor", "--qemu", str(BUILD / "qemu/bin/qemu-system-x86_64"))[0]
    print(text)
    assert "introspection is on" in text, text


@scenario(timeout=120)
def quit_while_hooked(g):
    """QEMU ends while a tool is hooked: the tool sees the end, KVM frees the VM."""
    with hook(g, *HOT) as w:
        mark = w.mark()
        g.qmp.send("quit")
        w.event("closed", since=mark)
        assert w.process.poll() is None, "the tool ended with the VM"
    g.spoilt = True


# --- a tool of the older library's, see client.c ----------------------------------------------------------------------


def places(g, names=HOT):
    """Where these functions lie in the guest's physical memory, in words for a command line."""
    start, _, _ = g.text()
    return [hex(start + o) for o in breakpoint_offsets(g, names)]


# In the Intel host this is in an archive at the root, without what is there: no parents[2]
TOP = Path(__file__).resolve().parent.parent.parent


class Program:
    """A program with our libraries, in C or Python, and what it said so far."""

    def __init__(self, *argv, stdin=subprocess.DEVNULL):
        env = dict(os.environ, LD_LIBRARY_PATH=f"{BUILD}/lib/compat:{BUILD}/lib", PYTHONPATH=str(TOP / "lib/python"))
        self.process = subprocess.Popen([str(a) for a in argv], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        env=env)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self.read()
        print(self.text)

    def read(self):
        self.text += (self.process.stdout.read() or b"").decode(errors="replace")
        return self.text

    def said(self, words, timeout=40):
        wait_until(lambda: words in self.read() or self.process.poll() is not None, timeout, f"the client to say '{words}'")
        assert words in self.read(), f"the client ended with status {self.process.returncode}"

    def finish(self, timeout=120):
        status = self.process.wait(patience(timeout))
        self.read()
        assert status == 0, f"the client ended with status {status}"


class Client(Program):
    """tests/host/client, with one of its tests"""

    def __init__(self, test, *words):
        super().__init__(BUILD / "tests/host/client", SOCKET, test, *words)


def client_run(g, test, *words):
    before = code(g)
    with Client(test, *words) as c:
        c.finish()
    g.wait_alive()
    # the guest changes a few places of its code by itself, but no INT3 may stay at ours
    same_memory(before, code(g), f"after the client's test {test}")
    wait_state(g, "connecting")


@scenario()
def client_basics(g):
    """The older library: listening, handshake, pausing, registers, MSRs, XSAVE, CPUID, MTRR, memory, addresses."""
    client_run(g, "basics")


@scenario()
def client_breakpoint(g):
    """The older library: breakpoints in hot functions, stepped over by single-step, on both vCPUs."""
    client_run(g, "breakpoint", *places(g))


@scenario()
def client_registers(g):
    """The older library: the guest's writes of CR3 and of MSRs, let through with the value they had."""
    client_run(g, "registers")


@scenario()
def client_pages(g):
    """The older library: a page of hot code that may not be executed; answers as long as they were then."""
    client_run(g, "pages", *places(g))


@scenario()
def client_step(g):
    """The older library: two hundred single steps of a vCPU."""
    client_run(g, "step")


@scenario()
def client_batch(g):
    """The older library: lists of registers, rights and answers."""
    client_run(g, "batch", *places(g))


@scenario()
def client_inject(g):
    """The older library: an injected exception and its TRAP event."""
    client_run(g, "inject")


@scenario()
def client_close(g):
    """The older library: connections, listeners and forked children are closed in every order, with a hit waiting."""
    client_run(g, "close", *places(g))


@scenario()
def client_unhook(g):
    """A tool that has never heard of UNHOOK: the VM is paused cleanly while its breakpoints are hit, and the tool told to go."""
    before = code(g)
    with Client("unhook", *places(g)) as c:
        c.said("50 hits")
        data, _ = stop(g)
        expect("clean", data)
        assert data["duration"] < 4500000, f"clean, but not promptly: {data}"
        same_memory(before, code(g), "paused, with the older library")
        c.said("the connection has ended")
        cont(g)
        c.said("the guest is back")
        c.said("hits once more")
        c.finish()
    g.wait_alive()
    same_memory(before, code(g), "after the client of the older library")


@scenario()
def client_idle(g):
    """The same, but it is busy with something else: the library leaves without it."""
    before = code(g)
    with Client("idle", *places(g)) as c:
        c.said("busy")
        time.sleep(1)           # and hits that it does not look at
        data, _ = stop(g)
        expect("clean", data)
        assert data["duration"] < 4500000, f"clean, but not promptly: {data}"
        same_memory(before, code(g), "paused, with a tool of the older library's that is busy")
        c.process.send_signal(signal.SIGUSR1)
        c.said("the connection has ended")
        c.finish()
    cont(g)
    same_memory(before, code(g), "after a tool of the older library's that was busy")


@scenario()
def client_libvmi(g):
    """The older library as LibVMI uses it: memory, breakpoints, CR3, MSRs, pages, and unloaded while the guest runs on."""
    before = code(g)
    with Program(BUILD / "tests/host/libvmi-like", SOCKET, "run", *places(g)) as p:
        p.finish()
    g.wait_alive()
    same_memory(before, code(g), "after a tool that uses the library as LibVMI does")
    wait_state(g, "connecting")


@scenario()
def client_libvmi_paused(g):
    """LibVMI has paused all vCPUs, and QMP stops the VM: it is clean, the guest goes on afterwards, and the tool gets it anew."""
    with Program(BUILD / "tests/host/libvmi-like", SOCKET, "paused", *places(g)) as p:
        p.said("paused")
        time.sleep(0.5)         # what is on its way to the console
        calls = g.calls()[0]
        time.sleep(1)
        assert g.calls()[0] == calls, "the guest runs on"
        data, _ = stop(g)
        expect("clean", data)
        assert data["duration"] < 4500000, f"clean, but not promptly: {data}"
        p.said("the connection has ended")
        cont(g)
        p.said("the guest is back")
        p.finish()
    g.wait_alive()


@scenario()
def client_example(g):
    """The first tool of the examples: ten changes of the address space, then it goes by itself."""
    with Program(BUILD / "examples/first-tool", SOCKET) as p:
        p.finish()
    assert p.text.count("CR3 0x") == 10, p.text
    g.wait_alive()


@scenario()
def client_c_breakpoints(g):
    """Breakpoints in C: hit on both vCPUs, out before the VM is paused, back when it runs, out after Enter."""
    before = code(g)
    base = g.text()[2]
    addresses = [f"{base + o:x}" for o in breakpoint_offsets(g, HOT)]
    with Program(BUILD / "examples/breakpoints", SOCKET, *addresses, stdin=subprocess.PIPE) as p:
        for address in addresses:
            for vcpu in range(2):
                p.said(f"vCPU {vcpu}: 0x{address}(0x", 60)
        data, _ = stop(g)
        expect("clean", data)
        same_memory(before, code(g), "paused, with breakpoints from C")
        time.sleep(7)           # longer than the library waits for a handshake
        seen = len(p.read())
        cont(g)
        wait_until(lambda: f": 0x{addresses[0]}(" in p.read()[seen:], 60, "hits after the stop")
        p.process.stdin.write(b"\n")
        p.process.stdin.flush()
        p.finish()
        assert "breakpoints:" not in p.text, p.text
    g.wait_alive()
    same_memory(before, code(g), "after Enter")


@scenario()
def client_python(g):
    """The same in Python. MOV to CR3 is 0f 22 d8...df: it has read the guest's code at RIP."""
    with Program("/usr/bin/python3", TOP / "examples/first-tool.py", SOCKET) as p:
        p.finish()
    assert len(re.findall(r"CR3 0x\w+ -> 0x\w+ by 0f22d[89a-f] at 0xf", p.text)) == 10, p.text
    g.wait_alive()


@scenario()
def client_python_breakpoints(g):
    """Breakpoints in Python: hit on both vCPUs, out before the VM is paused, back when it runs, out after Ctrl-C."""
    before = code(g)
    with Program("/usr/bin/python3", TOP / "examples/breakpoints.py", SOCKET, MAP[1], *HOT) as p:
        for name in HOT:
            for vcpu in range(2):
                p.said(f"vCPU {vcpu}: {name} (rdi 0x", 60)
        assert "2 breakpoints planted" in p.text, p.text
        with_breakpoints = code(g)
        assert all(with_breakpoints[o] == 0xcc for o in breakpoint_offsets(g, HOT)), "the breakpoints do not show in a dump"
        data, _ = stop(g)
        expect("clean", data)
        same_memory(before, code(g), "paused, with breakpoints from Python")
        p.said("the VM is about to be paused")
        seen = len(p.text)
        cont(g)
        wait_until(lambda: HOT[0] in p.read()[seen:], 60, "hits after the stop")
        p.process.send_signal(signal.SIGINT)
        p.finish()
        assert "Traceback" not in p.text, p.text
    g.wait_alive()
    same_memory(before, code(g), "after Ctrl-C")


@scenario()
def client_mutual(g):
    """Both sides know the secret, or one doesn't, or QEMU doesn't ask for it: the tools and libkvmi-2 against the real handshake."""
    right, wrong = Path("/run/secret.right"), Path("/run/secret.wrong")
    right.write_text("open sesame")
    wrong.write_text("open barley")
    _, errors = kvmi("info", "--mutual", "--key-file", str(right), status=1)
    assert "auth=hmac" in errors, errors
    remove_object(g)
    g.qmp.execute("object-add", qom_type="secret", id="cookie", data="open sesame")
    try:
        g.qmp.execute("object-add", **g.kvmi_options(key="cookie", auth="hmac"))
        # QEMU hangs up; what it asks for has to be known
        _, errors = kvmi("info", "--mutual", "--key-file", str(wrong), "--timeout", "3", status=3)
        assert "wrong key" in errors, errors
        _, errors = kvmi("info", "--key-file", str(right), "--timeout", "3", status=1)
        assert "asks for auth=hmac" in errors, errors
        out, _ = kvmi("info", "--mutual", "--key-file", str(right))
        assert "vCPU" in out, out
        with Watch(*HOT, options=["--mutual", "--key-file", str(right)]) as w:
            w.event("hit", count=3, timeout=60)
            w.signal(signal.SIGINT)
            assert w.finish() == 0
    finally:
        remove_object(g)
        g.qmp.execute("object-del", id="cookie")


# --- the host without introspection ------------------------------------------------------------------------------------


@scenario(timeout=120, guest=False)
def host_without_kvmi(_):
    """The modules can be unloaded (nothing of ours holds on to them), and QEMU tells what is missing: the parameter, or KVMI altogether."""
    modules = os.environ["KVMI_MODULES"]

    def load(folder, parameters=()):
        for command in (["rmmod", "kvm-amd"], ["rmmod", "kvm"], ["insmod", f"{folder}/kvm.ko", *parameters], ["insmod", f"{folder}/kvm-amd.ko"]):
            subprocess.run(command, check=True, timeout=30)

    def refusal():
        argv = [BUILD / "qemu/bin/qemu-system-x86_64", "-M", "none", "-accel", "kvm", "-nodefaults", "-display", "none",
                "-chardev", f"socket,id=tool,path={SOCKET},server=off,reconnect-ms=100", "-object", "kvmi,id=kvmi0,chardev=tool"]
        r = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
        print(r.stdout.decode())
        assert r.returncode == 1, f"status {r.returncode}"
        return r.stdout.decode()

    Guest().kill()
    os.kill(int(Path("/run/vm-holder.pid").read_text()), signal.SIGKILL)    # see tests/host/agent
    wait_until(lambda: Path("/sys/module/kvm_amd/refcnt").read_text() == "0\n", 20, "the last user of kvm-amd to go")
    load(modules, ["introspection=0"])
    assert "introspection=1" in refusal()
    assert doctor(1) == ["parameter"]
    load(BUILD / "linux/stock")
    assert "without introspection" in refusal()
    assert doctor(1) == ["modules"]
    # Who comes next gets a new host: see test_scenarios.py.


# --- the runner -------------------------------------------------------------------------------------------------------


def remove_object(g):
    try:
        g.qmp.execute("object-del", id="kvmi0")
    except QMPError:
        pass


def prepare(function):
    """A guest as the scenario wants it."""
    g = Guest()
    marker = DIR / "ready"          # there as long as the guest is fit for the next scenario
    reuse = marker.exists() and not function.fresh and not function.machine and g.alive()
    if reuse:
        marker.unlink()
        remove_object(g)
        g.qmp.execute("object-add", **g.kvmi_options(**function.object_options))
    else:
        g.start(kvmi=not function.object_options, **{"machine": function.machine} if function.machine else {})
        if function.object_options:
            g.qmp.execute("object-add", **g.kvmi_options(**function.object_options))
    g.spoilt = False
    return g, marker


def run(function):
    g = marker = None
    # Out of time: leave by the normal way, which ends the tool.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))
    try:
        if function.guest:
            g, marker = prepare(function)
        function(g)
        if g and not g.spoilt:
            g.hang_up()
            marker.touch()
    except BaseException as e:
        traceback.print_exc()
        g = g or Guest()        # the scenario's own
        print("--- QEMU's trace, last lines ---")
        print("\n".join(g.trace.read_text(errors="replace").splitlines()[-20:]) if g.trace.exists() else "")
        print("--- the guest's console, last lines ---")
        print("\n".join(g.output().splitlines()[-10:]))
        print((DIR / "stderr").read_text() if (DIR / "stderr").exists() else "")
        print("--- the guest's CPUs, twice ---")
        print(g.cpus())
        if not isinstance(e, Exception):
            raise
        return 1
    return 0


def main(found):
    names = sys.argv[1:] or list(found)
    failed = []
    for name in names:
        start = time.monotonic()
        bad = run(found[name])
        print(f"{'FAIL' if bad else 'pass'} {name} {time.monotonic() - start:.1f} s", flush=True)
        failed += [name] if bad else []
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(SCENARIOS)
