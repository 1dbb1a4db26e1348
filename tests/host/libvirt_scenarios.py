#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios with the real libvirtd: run in the AMD host, one a process, by tests/test_libvirt.py; by hand:

    tests/host/run amd -- tests/host/libvirt_scenarios.py [--libvirt FOLDER] [--profiles FOLDER] NAME…

--libvirt: with the libvirt that scripts/fetch-libvirt has put there, in place of the machine's.
--profiles: AppArmor's profiles for the machine's, from scripts/fetch-libvirt --profiles; one scenario needs them.

They share libvirtd and one domain, as those of scenarios.py share a guest. Each operation with a kind of tool is a line of the
matrix that the tests leave in build/host/libvirt.md.
"""
import contextlib
import difflib
import fcntl
import json
import mmap
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from gate import Aside, record
from inside import BUILD, HOT, PATIENT_MS, QMP, Guest, Watch, patience, symbols, wait_until
from scenarios import breakpoint_offsets, code, hook, info, same_memory, wait_state
from virsh import DEADLINE, FROM, Domain, Libvirtd, VirshError, use_libvirt

SCENARIOS = {}
PROFILES = Path("/")
# What QEMU waits for the tool at; the tool is cut off at the rest.
WAITS = {"stop", "save", "migrate", "suspend"}
# The kinds of tool
EACH = ("none", "prompt", "slow", "hung")
SLOW = 1                # s: what a slow tool takes to leave
LINGER = Path("/run/linger")        # from where it knows that
PATIENCE = 3            # s: silence-timeout-ms where the guest itself has to hear what it is asked for


def scenario(timeout=300, **options):
    """options: for Domain.xml(); such a domain is not shared. kvmi=None: no domain at all."""
    def add(function):
        function.timeout, function.options = 2 * timeout, options
        SCENARIOS[function.__name__] = function
        return function
    return add


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tool(d, breaks=HOT, hits=20, options=()):
    """The tool, with breakpoints planted and hit."""
    with hook(d, *breaks, hits=hits, options=("--linger", str(LINGER), *options)) as w:
        yield w
        mark = d.qmp.mark()
        w.signal(signal.SIGINT)
        w.finish()
        wait_state(d, "connecting", mark)
    d.wait_alive()


def set_deadline(d, seconds=DEADLINE):
    d.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=seconds * 1000)


def set_patience(d, ms):
    """How long the tool may be silent while the guest waits for it."""
    d.qmp.execute("qom-set", path="/objects/kvmi0", property="silence-timeout-ms", value=ms)


def hooked_again(d, w, told, hits=5):
    """The tool is back, and its breakpoints are."""
    w.event("planted", since=told, timeout=60)
    if hits:
        w.event("hit", since=max(i for i, e in enumerate(w.said) if e["event"] == "planted"), count=hits, timeout=60)
    wait_until(lambda: info(d)["state"] == "hooked", 20, "query-kvmi to say hooked")


def last_words(qmp):
    """What a QEMU that is about to end, or has ended, still has to say."""
    try:
        qmp.pump(lambda: qmp.lines.ended, 20, "QEMU's end")
    except OSError:
        pass


class Lag(threading.Thread):
    """How late this host wakes us up at worst while something goes on, and how long it takes for a piece of work: it may be as late
    and as slow for others."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seconds, self.work, self.ended = 0, [], threading.Event()
        self.start()

    def run(self):
        while not self.ended.is_set():
            begin = time.monotonic()
            time.sleep(0.1)
            woken = time.monotonic()
            sum(range(5000))
            self.seconds = max(self.seconds, woken - begin - 0.1)
            self.work.append(time.monotonic() - woken)

    def end(self):
        self.ended.set()
        self.join()
        return self.seconds


class Watched:
    """An operation with a tool that is prompt, slow, hung, or not there (w is None): what it takes, and what the tool and QEMU say of it.

    neighbour: if the tool hangs, it hangs for as long as with the deadline that users have, and another domain is watched meanwhile."""
    usual = {}      # {operation: (s, s for a piece of work)}: without a tool

    def __init__(self, d, operation, behaviour, w, neighbour=False):
        self.d, self.operation, self.behaviour, self.w = d, operation, behaviour, w
        self.deadline, self.neighbour = DEADLINE, neighbour and behaviour == "hung"

    def then(self, operation):
        """What follows, with the same tool."""
        return Watched(self.d, operation, self.behaviour, self.w)

    def __enter__(self):
        self.qmp = self.d.qmp
        self.beside = contextlib.ExitStack()
        if self.neighbour:
            self.deadline = 5
            set_deadline(self.d, self.deadline)
            self.beside.enter_context(Neighbour(self.d.libvirtd))
        self.mark = self.qmp.mark()
        if self.w:
            self.told = self.w.mark()
        if self.behaviour == "slow":
            LINGER.write_text(str(SLOW * 1000))
        if self.behaviour == "hung":
            self.w.signal(signal.SIGSTOP)
        self.lag = Lag()
        self.begin = time.monotonic()
        return self

    def __exit__(self, *exc):
        self.took = time.monotonic() - self.begin
        self.late = self.lag.end()
        self.work = sum(self.lag.work) / len(self.lag.work)
        LINGER.unlink(missing_ok=True)
        if self.behaviour == "hung":
            self.w.signal(signal.SIGCONT)
        self.beside.__exit__(*exc)

    def check(self, action, ended=False, more=0):
        """The tool was asked to leave in order, once, and what that took, which is all that it adds to the operation, was within the
        deadline. action: what QEMU calls it; None: the tool isn't there at first. ended: that QEMU is gone. more: s that the guest
        stood still for before it could hear what it was asked for."""
        unhooks = []
        if ended:
            last_words(self.qmp)
        elif action:
            self.qmp.execute("query-status")       # what it said before has arrived
        if action:
            unhooks = [e["data"] for e in self.qmp.events[self.mark:] if e["event"] == "KVMI_UNHOOKED"]
        print(f"{self.operation}, {self.behaviour} tool: {self.took:.1f} s, host {self.late:.2f} s late, {self.work * 1000:.1f} ms for work; "
              f"{unhooks}", flush=True)
        if action == "reset":
            del unhooks[1:]     # a firmware may reset once more
        if self.behaviour == "none":
            self.usual[self.operation] = self.took, self.work
        expected = [] if self.behaviour == "none" or not action else [action]
        assert [u["action"] for u in unhooks] == expected, f"not the orderly unhooks for {self.operation}: {unhooks}, not {expected}"
        if not ended and self.neighbour:
            set_deadline(self.d)
        outcome, waited = "–", 0
        if unhooks:
            outcome, waited = unhooks[0]["outcome"], unhooks[0]["duration"] / 1000000
            self.check_unhook(action, outcome, waited)
        usual, work = self.usual[self.operation]
        most = 2 * usual * max(1, self.work / work) + 3 + more + 4 * self.late
        assert self.took - waited < most, f"{self.took:.1f} s, and {waited:.1f} s of them for the tool: without one it is {usual:.1f} s"
        if action or self.behaviour != "slow":      # what is slow is how it leaves
            record(self.operation, self.behaviour, outcome, f"{waited * 1000:.0f}", f"{self.took * 1000:.0f}", f"{usual * 1000:.0f}")

    def check_unhook(self, action, outcome, waited):
        waits = action in WAITS
        expected = "clean" if waits and self.behaviour != "hung" else "forced"
        assert outcome == expected, f"expected the outcome {expected}, not {outcome} after {waited:.3f} s"
        least = {"slow": SLOW, "hung": self.deadline}.get(self.behaviour, 0) if waits else 0
        most = (self.deadline if waits else 0) + 2 + 4 * self.late
        assert 0.95 * least <= waited <= most, f"{waited:.3f} s: {least} to {most:.1f} s were expected"
        self.w.event("closed", since=self.told, timeout=20)
        said = [(e["event"], e.get("reason")) for e in self.w.said[self.told:] if e["event"] in ("notified", "clean", "closed")]
        if outcome == "clean":
            assert said[:3] == [("notified", "unhook"), ("clean", None), ("closed", "unhook")], said

    def again(self, hits=5):
        """The guest runs, and is hooked as before."""
        if self.w:
            hooked_again(self.d, self.w, self.told, hits)
        else:
            self.d.wait_alive(400)


def each_tool(d, operation, **options):
    """A Watched for each kind of tool; the first is for the time that the operation takes without one."""
    yield Watched(d, operation, EACH[0], None, **options)
    with tool(d) as w:
        for behaviour in EACH[1:]:
            yield Watched(d, operation, behaviour, w, **options)


def pristine(path, before):
    """The file holds the guest's memory, and the watched functions in it begin with what the kernel has there."""
    s = symbols()
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name in HOT:
            offset = s[name] - s["_text"]
            body, first = before[offset + 1:offset + 48], before[offset]
            found, at = [], data.find(body)
            while at >= 0:
                found.append(data[at - 1])
                at = data.find(body, at + 1)
            assert found, f"{name} is not in {path}: this check proves nothing"
            assert all(byte == first for byte in found), f"{path} has {[hex(b) for b in found]} at the start of {name}, not {first:#x}"


class Neighbour:
    """Another domain: virsh asks it all the time, and it must answer as if nothing went on beside it."""

    def __init__(self, libvirtd):
        self.d = Domain(libvirtd, "neighbour")
        self.took, self.trouble = [], None

    def ask(self):
        try:
            while not self.ended.is_set():
                begin = time.monotonic()
                state = self.d.virsh("domstats", "--state", timeout=20)
                self.took.append(time.monotonic() - begin)
                assert "state.state=3" in state, state      # paused: it has nothing to run, and takes no time
                time.sleep(0.2)     # virsh takes it, for this host
        except BaseException as e:
            self.trouble = e

    def __enter__(self):
        self.d.remove()
        self.d.define(kvmi=False)
        self.d.create_disk()
        self.d.virsh("start", "--paused")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.ask)
        self.thread.start()
        self.lag = Lag()
        return self

    def __exit__(self, *exc):
        self.ended.set()
        self.thread.join(30)
        late = self.lag.end()
        self.d.remove()
        if exc[0] is None:
            assert self.trouble is None, f"the other domain was disturbed: {self.trouble}"
            usual, slowest = usual_and_slowest(self.took)
            print(f"the other domain answered {len(self.took)} times, after {usual:.1f} s, the slowest after {slowest:.1f} s")
            # One that waited for the tool beside it would take the deadline of 5 s longer
            assert slowest < usual + 4.5 + late, "the other domain had to wait"


def usual_and_slowest(took):
    """The slowest is none of the usual ones, however few there are."""
    *others, slowest = sorted(took)
    return statistics.median(others or [0]), slowest


# --- scenarios --------------------------------------------------------------------------------------------------------


@scenario()
def libvirt_suspend_resume(d):
    """virsh suspend waits for the tool; no breakpoint is left in the paused guest; virsh resume brings them back, and waits for
    nobody."""
    before = code(d)
    for o in each_tool(d, "suspend"):
        with o:
            d.virsh("suspend")
        o.check("stop")
        assert d.state() == "paused"
        same_memory(before, code(d), "suspended")
        with o.then("resume") as resume:
            d.virsh("resume")
        resume.check(None)
        resume.again()


@scenario()
def libvirt_suspend_default_deadline(d):
    """With the deadline that users have, 5 s, a hung tool delays virsh suspend, but no virsh of another domain, and other
    commands for the same domain wait for their turn; so does kvmi libvirt status."""
    with tool(d) as w, Neighbour(d.libvirtd):
        set_deadline(d, 5)
        w.signal(signal.SIGSTOP)
        told, lag = w.mark(), Lag()
        begin = time.monotonic()
        suspend = d.begin("suspend")
        time.sleep(1)
        stats = d.begin("domstats", "--balloon", "--vcpu")
        status = kvmi_libvirt("status")
        took = time.monotonic() - begin
        suspend.result()
        stats.result()
        all_took, late = time.monotonic() - begin, lag.end()
        assert d.name in status and "neighbour" in status, status
        assert took < 5 + 5 + 4 * late, f"kvmi libvirt status was there after {took:.1f} s"
        assert 4.9 < all_took < 25 + late, f"{all_took:.1f} s"
        w.signal(signal.SIGCONT)
        w.event("closed", since=told)
        told = w.mark()
        d.virsh("resume")
        hooked_again(d, w, told)
        set_deadline(d)


@scenario(timeout=400)
def libvirt_save_restore(d):
    """virsh save: no breakpoint in the file, and a tool again after virsh restore."""
    before = code(d)
    saved = d.dir / "saved"
    for o in each_tool(d, "save", neighbour=True):
        with o:
            d.virsh("save", saved)
        o.check("stop", ended=True)
        pristine(saved, before)
        with o.then("restore") as restore:
            d.libvirtd.virsh("restore", saved)
        restore.check(None)
        d.booted()
        restore.again()
        saved.unlink()


@scenario(timeout=400)
def libvirt_managedsave(d):
    """virsh managedsave, and virsh start from it."""
    before = code(d)
    for o in each_tool(d, "managedsave"):
        with o:
            d.virsh("managedsave")
        o.check("stop", ended=True)
        pristine(f"/var/lib/libvirt/qemu/save/{d.name}.save", before)
        with o.then("start, managed save") as start:
            d.virsh("start")
        start.check(None)
        d.booted()
        start.again()


@scenario()
def libvirt_snapshot_internal(d):
    """A snapshot with memory inside the disk image: what libvirt saves is without breakpoints."""
    before = code(d)
    for o in each_tool(d, "snapshot-create-as, internal", neighbour=True):
        with o:
            d.virsh("snapshot-create-as", o.behaviour)
        o.check("stop")
        o.again()
        pristine(d.disk, before)
        d.virsh("snapshot-delete", o.behaviour)


@scenario(timeout=400)
def libvirt_snapshot_revert(d):
    """Back to such a snapshot, for which libvirt starts QEMU anew: nothing waits for the tool, which is back when the guest runs."""
    d.virsh("snapshot-create-as", "before")
    for o in each_tool(d, "snapshot-revert, internal"):
        d.another()
        with o:
            d.virsh("snapshot-revert", "before")
        o.check("shutdown", ended=True)
        d.booted()
        o.again()
    d.virsh("snapshot-delete", "before")


def external_snapshot(d, operation, action, *options, **more):
    before = code(d)
    memory, overlay = d.dir / "snapshot.memory", d.dir / "overlay.qcow2"
    for o in each_tool(d, operation, **more):
        with o:
            d.virsh("snapshot-create-as", "outside", "--memspec", f"file={memory},snapshot=external", "--diskspec",
                    f"vda,snapshot=external,file={overlay}", *options)
        o.check(action)
        o.again()
        pristine(memory, before)
        d.virsh("blockcommit", "vda", "--active", "--pivot")
        d.virsh("snapshot-delete", "outside", "--metadata")
        memory.unlink()
        overlay.unlink()


@scenario()
def libvirt_snapshot_external(d):
    """A snapshot with memory in a file of its own."""
    external_snapshot(d, "snapshot-create-as, external", "stop")


@scenario()
def libvirt_snapshot_external_live(d):
    """With --live, the guest runs while its memory is written."""
    external_snapshot(d, "snapshot-create-as --live", "migrate", "--live", neighbour=True)


@scenario(kvmi=True)
def libvirt_snapshot_external_revert(d):
    """Back to a snapshot with memory in a file of its own: libvirt 9 can't, which nobody notices; later ones start QEMU anew."""
    d.virsh("snapshot-create-as", "outside", "--memspec", f"file={d.dir}/snapshot.memory,snapshot=external", "--diskspec",
            f"vda,snapshot=external,file={d.dir}/overlay.qcow2")
    if d.libvirtd.version() < 11:
        with tool(d) as w:
            told = w.mark()
            try:
                d.virsh("snapshot-revert", "outside")
            except VirshError as e:
                assert "revert to external snapshot not supported yet" in str(e), e
            else:
                raise AssertionError("libvirt 9 has reverted to an external snapshot")
            w.event("hit", since=told, count=20, timeout=60)
        return
    for o in each_tool(d, "snapshot-revert, external"):
        d.another()
        with o:
            d.virsh("snapshot-revert", "outside")
        o.check("shutdown", ended=True)
        d.booted()
        o.again()


def dump(d, operation, action, *options, **more):
    before = code(d)
    path = d.dir / "core"
    for o in each_tool(d, operation, **more):
        with o:
            d.virsh("dump", path, *options)
        o.check(action)
        o.again()
        pristine(path, before)
        path.unlink()


@scenario(timeout=400)
def libvirt_dump(d):
    """virsh dump, while the guest stands still or runs: no breakpoint is in it."""
    dump(d, "dump", "stop")
    dump(d, "dump --live", "migrate", "--live")


@scenario(timeout=400)
def libvirt_dump_memory_only(d):
    """The same by QEMU's dump-guest-memory."""
    dump(d, "dump --memory-only", "stop", "--memory-only", neighbour=True)
    dump(d, "dump --memory-only --live", "save", "--memory-only", "--live")


@scenario(timeout=700)
def libvirt_dump_crash(d):
    """virsh dump --crash ends the domain after the dump."""
    before = code(d)
    path = d.dir / "core"
    for o in each_tool(d, "dump --crash"):
        with o:
            d.virsh("dump", path, "--crash", "--memory-only")
        o.check("stop", ended=True)
        pristine(path, before)
        path.unlink()
        assert d.state() == "shut off"
        d.boot()
        o.again()
        # The kernel is in another place now, and some of its code says so; what is below the breakpoints is the same
        now = bytearray(code(d))
        for place in breakpoint_offsets(d, HOT):
            now[place] = before[place]
        before = bytes(now)


@scenario(timeout=400)
def libvirt_reset(d):
    """virsh reset: nothing waits, a hung tool neither; the new kernel is hooked."""
    for o in each_tool(d, "reset"):
        d.another()
        with o:
            d.virsh("reset")
        o.check("reset")
        d.rebooted()
        o.again()


def powered_off(d, o, *command):
    """What the guest itself has to hear of: it stands still until the hung tool is cut off."""
    hung = o.behaviour == "hung"
    if hung:
        set_patience(d, PATIENCE * 1000)
    with o:
        d.virsh(*command, "--mode", "acpi")
        if command[0] == "reboot":
            d.qmp.event("RESET", since=o.mark, timeout=20)
        else:
            wait_until(lambda: d.state() == "shut off", 20, "the guest to power off")
    o.check("silence" if hung else "shutdown", ended=command[0] == "shutdown", more=PATIENCE if hung else 0)


@scenario(timeout=400)
def libvirt_reboot(d):
    """virsh reboot, by the guest's power button: it powers off, and libvirt has QEMU start it again."""
    for o in each_tool(d, "reboot"):
        d.another()
        powered_off(d, o, "reboot")
        set_patience(d, PATIENT_MS)
        d.rebooted()
        o.again()


@scenario(timeout=700)
def libvirt_shutdown_start(d):
    """virsh shutdown, by the guest's power button."""
    for o in each_tool(d, "shutdown"):
        powered_off(d, o, "shutdown")
        d.boot()
        o.again()


@scenario(timeout=700)
def libvirt_destroy_start(d):
    """virsh destroy waits for nobody, and virsh start does not, either: the tool may come later."""
    for o in each_tool(d, "destroy"):
        with o:
            d.virsh("destroy")
        o.check("shutdown", ended=True)
        d.another()
        with o.then("start") as start:
            d.virsh("start")
        start.check(None)
        d.booted()
        start.again()


@scenario(timeout=600)
def libvirt_dompmsuspend_wakeup(d):
    """virsh dompmsuspend and dompmwakeup: the guest suspends to RAM."""
    before = code(d)
    for behaviour in EACH:
        if behaviour != "none":
            # libvirt takes no second one of this guest: its agent is too small for that
            d.virsh("destroy")
            d.boot()
        # A tool that hangs, where the guest doesn't come by: it has to run to hear of it
        breaks, hits = (Aside.breaks, 0) if behaviour == "hung" else (HOT, 20)
        with contextlib.nullcontext() if behaviour == "none" else tool(d, breaks, hits) as w:
            with Watched(d, "dompmsuspend", behaviour, w) as o:
                d.virsh("dompmsuspend", "mem")
                d.qmp.event("SUSPEND", since=o.mark, timeout=20)
            o.check("suspend")
            after = code(d)         # (which the kernel itself changes: that it runs on one CPU, and suspends)
            places = breakpoint_offsets(d, breaks)
            assert [after[p] for p in places] == [before[p] for p in places], "a breakpoint sleeps, too"
            assert d.state() == "pmsuspended"
            with o.then("dompmwakeup") as wakeup:
                d.virsh("dompmwakeup")
            wakeup.check(None)
            wait_until(lambda: d.output().rstrip().rfind("guest: woke up") >= 0, 30, "the guest to wake up")
            wakeup.again(min(hits, 5))


@scenario(kvmi=True)
def libvirt_blockcopy(d):
    """A job of the block layer goes on beside the tool, and beside a suspend that waits for it."""
    fill_disk(d)
    for o in each_tool(d, "suspend, blockcopy"):
        copy = d.dir / f"copy-{o.behaviour}.qcow2"
        # in small portions, or it looks as if nothing went on
        d.virsh("blockcopy", "vda", copy, "--transient-job", "--bandwidth", "1", "--buf-size", "1048576")
        at = [copied(d)]
        with o:
            d.virsh("suspend")
        o.check("stop")
        at.append(further(d, at[-1]))
        d.virsh("resume")
        o.again()
        at.append(further(d, at[-1]))
        print(f"copied: {at}")
        assert at[-1] < 100, "the copy is complete: this proves nothing"
        if o.behaviour == "slow":
            d.virsh("blockjob", "vda", "--bandwidth", "1000")
            wait_until(lambda: copied(d) == 100, 60, "the copy to be complete")
            d.virsh("blockjob", "vda", "--pivot")
            assert str(copy) in d.virsh("domblklist")
        else:
            d.virsh("blockjob", "vda", "--abort")
        wait_until(lambda: "Block Copy" not in d.virsh("blockjob", "vda"), 20, "the copy's end")
    d.wait_alive()


def fill_disk(d):
    """A disk with so much on it that who copies it is not done in a moment."""
    d.virsh("destroy")
    d.create_disk(filled=60)
    d.boot()


def copied(d):
    """How much of the disk, in percent."""
    said = d.virsh("blockjob", "vda")
    found = re.search(r"Block Copy: \[ *([\d.]+) *%\]", said)
    assert found, f"no copy goes on: {said}"
    return float(found[1])


def further(d, percent):
    wait_until(lambda: copied(d) > percent, 20, f"the copy to go on, at {percent} %")
    return copied(d)


@scenario(kvmi=True)
def libvirt_backup(d):
    """A backup goes on beside the tool and beside a suspend that waits for it, and has what the disk had."""
    fill_disk(d)
    xml, export = d.dir / "backup.xml", d.dir / "nbd"
    # Who asks for the backup reads it: it lasts until it is ended
    xml.write_text(f"<domainbackup mode='pull'><server transport='unix' socket='{export}'/><disks><disk name='vda' backup='yes' type='file'>"
                   f"<scratch file='{d.dir}/scratch.qcow2'/></disk></disks></domainbackup>")
    for o in each_tool(d, "suspend, backup"):
        d.virsh("backup-begin", xml)
        assert "Backup" in d.virsh("domjobinfo")
        reader = subprocess.Popen([str(BUILD / "qemu/bin/qemu-img"), "convert", "-r", "10M", f"nbd+unix:///vda?socket={export}", "-O", "raw",
                                   str(d.dir / "backup")], stdin=subprocess.DEVNULL)
        with o:
            d.virsh("suspend")
        o.check("stop")
        assert "Backup" in d.virsh("domjobinfo")
        d.virsh("resume")
        o.again()
        assert reader.wait(patience(60)) == 0, "the backup could not be read"
        assert (d.dir / "backup").read_bytes()[:60 << 20] == b"\x5a" * (60 << 20), "the backup is not what was on the disk"
        assert "Backup" in d.virsh("domjobinfo")
        d.virsh("domjobabort")
        wait_until(lambda: "None" in d.virsh("domjobinfo"), 20, "the backup's end")


@contextlib.contextmanager
def second_host(d):
    """Another libvirtd; the domain has to come home from there."""
    home, two = d.libvirtd, Libvirtd("two").start()
    try:
        yield two
    finally:
        if d.libvirtd is not home:
            d.remove()
        two.stop()


@scenario(timeout=600)
def libvirt_migrate(d):
    """Live migration between two libvirtd, with a tool on both ends: asked to leave before the first page is sent; the other one is let in
    when the guest runs there."""
    before, home = code(d), d.libvirtd
    with second_host(d) as two, contextlib.ExitStack() as stack:
        there = None
        for o in each_tool(d, "migrate --live", neighbour=True):
            if o.w and not there:
                there = stack.enter_context(Watch(*HOT, options=("--socket", str(two.socket))))
            told = there.mark() if there else 0
            with o:
                d.migrate(two, "--live", "--suspend").result()
            o.check("migrate", ended=True)
            d.moved(paused=True)
            same_memory(before, code(d), "on the other host")
            d.virsh("resume")
            if there:
                hooked_again(d, there, told)
                assert not [e for e in o.w.said[o.told:o.w.mark()] if e["event"] == "connected"], "the tool of the first host is there, too"
            d.wait_alive(400)
            d.migrate(home, "--live").result()
            d.moved()
            o.again()


def there_and_back(d, operation, *options, meanwhile=lambda o: None):
    """To a host with a tool of its own; the first time there is none on both, and the guest just runs."""
    before, home = code(d), d.libvirtd
    with second_host(d) as two, contextlib.ExitStack() as stack:
        there = None
        for o in each_tool(d, operation):
            if o.w and not there:
                there = stack.enter_context(Watch(*HOT, options=("--socket", str(two.socket))))
            told = there.mark() if there else 0
            with o:
                job = d.migrate(two, *options)
                meanwhile(o)
                job.result()
            o.check("migrate", ended=True)
            d.moved()
            if there:
                hooked_again(d, there, told)
                told = there.mark()
                d.virsh("suspend")
                there.event("closed", since=told, reason="unhook", timeout=20)
            else:
                assert info(d)["sessions"] == 0, info(d)
            same_memory(before, code(d), "on the other host")
            if there:
                d.virsh("resume")
                hooked_again(d, there, told)
            d.migrate(home, "--live").result()
            d.moved()
            o.again()


@scenario(timeout=600)
def libvirt_migrate_p2p(d):
    """A migration that one libvirtd does by itself with the other one; the tool there gets in when the guest runs."""
    there_and_back(d, "migrate --p2p", "--live", "--p2p")


@scenario(timeout=600)
def libvirt_migrate_postcopy(d):
    """A migration that becomes a post-copy one: the rest of the memory follows the guest, and the tool there is in again."""
    def switch(o):
        memory_sent(d)
        d.virsh("migrate-postcopy")
        o.qmp.event("MIGRATION", since=o.mark, status="postcopy-active")

    # so slow that it does not end before
    there_and_back(d, "migrate --postcopy", "--live", "--postcopy", "--bandwidth", "2", meanwhile=switch)


@scenario(timeout=500, kvmi=None)
def libvirt_migrate_enabled(d):
    """A domain that kvmi libvirt enable has set up, with its secret: hooked on the one host and then on the other, without another
    word."""
    d.define(kvmi=False)
    d.create_disk()
    home, disk = d.libvirtd, files()
    kvmi_libvirt("enable", d.name)
    socket, key = places(d)
    options = ("--mode", "0660", "--key-file", key)
    with (second_host(d) as two, Watch(*HOT, options=("--socket", socket, *options)) as here,
          Watch(*HOT, options=("--socket", str(two.dir / "kvmi" / Path(socket).name), *options)) as there):
        d.boot()
        here.event("hit", count=5, timeout=60)
        told = here.mark()
        d.migrate(two, "--live").result()
        here.event("closed", since=told, reason="unhook", timeout=20)
        d.moved()
        there.event("hit", count=5, timeout=60)
        assert not [e for e in here.said[told:] if e["event"] == "connected"], "the tool of the first host is there, too"
        wait_until(lambda: info(d)["state"] == "hooked", 20, "query-kvmi to say hooked")
        s = json.loads(kvmi_libvirt("--connect", two.uri, "status", "--json", d.name))
        assert (s["state"], s["socket"], s["kvmi"]["authenticated"]) == ("hooked", socket, True), s
        told, told_there = here.mark(), there.mark()
        d.migrate(home, "--live").result()
        there.event("closed", since=told_there, reason="unhook", timeout=20)
        d.moved()
        here.event("hit", since=told, count=5, timeout=60)
    kvmi_libvirt("disable", d.name)
    assert files() == disk
    d.remove()


def memory_sent(d):
    wait_until(lambda: re.search(r"Memory processed: +[1-9]", d.virsh("domjobinfo")), 40, "memory to be sent")


@scenario(timeout=400)
def libvirt_migrate_abort(d):
    """virsh domjobabort: while the tool is waited for, and later. The guest runs on where it is, and is hooked again."""
    with second_host(d) as two:
        migrate_and_abort(d, two, "none", None)
        d.wait_alive()
        assert d.state() == "running"
        with tool(d) as w:
            set_deadline(d, 60)
            for behaviour in "hung", "slow":
                told = w.mark()
                migrate_and_abort(d, two, behaviour, w)
                hooked_again(d, w, told)
            set_deadline(d)
            told = w.mark()
            migrate_and_abort(d, two, "prompt", w)
            hooked_again(d, w, told)
            assert d.state() == "running"


def migrate_and_abort(d, two, behaviour, w):
    """Begins, and aborts, a migration: of a hung or slow tool while it is waited for, else while memory is copied. It ends at once; the tool
    is let go when it has left."""
    mark = d.qmp.mark()
    if behaviour == "hung":
        w.signal(signal.SIGSTOP)
    if behaviour == "slow":
        LINGER.write_text("8000")
    waited_for = behaviour in ("hung", "slow")
    job = d.migrate(two, "--live", *(() if waited_for else ("--bandwidth", "1")))
    if waited_for:
        d.qmp.event("KVMI_STATE_CHANGED", since=mark, timeout=40, state="unhooking")
    else:
        memory_sent(d)
        assert info(d)["state"] != "hooked", "hooked while its memory is copied"
    lag, begin = Lag(), time.monotonic()
    d.virsh("domjobabort")
    try:
        job.result()
    except VirshError as e:
        assert "abort" in str(e) or "cancel" in str(e), e
    else:
        raise AssertionError("the migration was not aborted")
    took, late = time.monotonic() - begin, lag.end()
    d.qmp.execute("query-status")       # what it said before has arrived
    unhooked = [e for e in d.qmp.events[mark:] if e["event"] == "KVMI_UNHOOKED"]
    assert not unhooked or not waited_for, f"aborted after the tool had left: {unhooked}"
    LINGER.unlink(missing_ok=True)
    outcome, waited = "–", 0
    if w:
        w.signal(signal.SIGCONT)
        end = d.qmp.event("KVMI_UNHOOKED", since=mark, timeout=20)["data"]
        assert (end["action"], end["outcome"]) == ("migrate", "clean"), end
        outcome, waited = end["outcome"], end["duration"] / 1000
    assert took < 20 + 4 * late, f"the migration was aborted after {took:.1f} s"
    record("migrate, then domjobabort", behaviour, outcome, f"{waited:.0f}", f"{took * 1000:.0f}", "–")


# --- kvmi libvirt -----------------------------------------------------------------------------------------------------


def begin_kvmi_libvirt(*words, **environment):
    return subprocess.Popen([str(BUILD / "tools/kvmi"), "libvirt", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=dict(os.environ, LD_LIBRARY_PATH=str(BUILD / "lib"), **environment))


def kvmi_libvirt(*words, fails=False, **environment):
    with begin_kvmi_libvirt(*words, **environment) as process:
        said, _ = process.communicate(timeout=90)
    print(f"$ kvmi libvirt {' '.join(words)}\n{said}", end="", flush=True)
    assert (process.returncode != 0) == fails, f"status {process.returncode}"
    return said


def kvmi_status(name):
    return json.loads(kvmi_libvirt("status", "--json", name))


def files():
    """What enable may leave on the host."""
    places = [Path("/etc/kvmi/keys"), Path("/etc/apparmor.d/local")]
    return {str(p): (p.read_bytes(), p.stat().st_mode) for place in places for p in place.rglob("*") if p.is_file()}


def places(d):
    """Where the domain's tool listens, and its secret."""
    uuid = d.virsh("domuuid").strip()
    return f"/run/kvmi/libvirt-{uuid}.sock", f"/etc/kvmi/keys/libvirt-{uuid}.key"


@scenario(kvmi=False)
def libvirt_enable_live(d):
    """kvmi libvirt enable on a running domain: the tool gets in at once and, without another word, after the next start.
    disable gives back the XML as it was."""
    def dumpxml():
        return d.virsh("dumpxml", "--inactive", "--security-info")

    def tool_at_work(w, told=0):
        w.event("hit", since=told, count=5, timeout=60)
        s = kvmi_status(d.name)
        assert (s["state"], s["kvmi"]["authenticated"]) == ("hooked", True), s

    before, disk = dumpxml(), files()
    socket, key = places(d)
    assert kvmi_status(d.name)["state"] == "off"
    assert kvmi_libvirt("disable", d.name) == f"{d.name} was not enabled\n"
    said = kvmi_libvirt("enable", d.name)
    assert "no restart is needed" in said and f"kvmi watch --socket {socket} --mode 0660 --key-file {key}" in said, said
    assert "kvmi0" in dumpxml()
    assert os.stat(key).st_mode & 0o777 == 0o400 and os.stat("/run/kvmi").st_mode & 0o7777 == 0o2750
    options = ["--socket", socket, "--key-file", key, "--mode", "0660"]
    with Watch(*HOT, options=options) as w:
        tool_at_work(w)
        told = w.mark()
        kvmi_libvirt("enable", d.name)      # once more: the same
        tool_at_work(w, told)
    assert "--mutual" in kvmi_libvirt("enable", d.name, "--mutual")
    with Watch(*HOT, options=[*options, "--mutual"]) as w:
        tool_at_work(w)
        s = kvmi_status(d.name)
        assert s["auth"] == s["kvmi"]["auth"] == "hmac", s
        # Seeing it: the event, as often as it takes for virsh to listen
        listener = d.begin("qemu-monitor-event", "--event", "KVMI_UNHOOKED", "--timeout", "100")
        while listener.process.poll() is None:
            told = w.mark()
            d.virsh("suspend")
            w.event("closed", since=told, reason="unhook")
            told = w.mark()
            d.virsh("resume")
            tool_at_work(w, told)
        said = listener.result()
        print(said)
        assert '"action":"stop"' in said and '"outcome":"clean"' in said, said
        told = w.mark()
        d.virsh("suspend")
        w.event("closed", since=told, reason="unhook")
        # One line for each domain, for people and for programs
        other = Domain(d.libvirtd, "other")
        other.define(kvmi=False)
        lines = kvmi_libvirt("status").splitlines()
        assert len(lines) == 2 and re.fullmatch("other +off +-", lines[1]), lines
        assert re.fullmatch(rf"{d.name} +unhooked +unix:{socket}  last: stop, clean, [0-9.]+ ms", lines[0]), lines
        both = [json.loads(line) for line in kvmi_libvirt("status", "--json").splitlines()]
        assert [(s["domain"], s["state"], s["enabled"]) for s in both] == [(d.name, "unhooked", True), ("other", "off", False)], both
        other.remove()
        d.virsh("destroy")
        assert kvmi_status(d.name)["state"] == "shut-off"
        told = w.mark()
        d.boot()
        tool_at_work(w, told)
        # Enabled, but not in the running QEMU
        told = w.mark()
        d.qmp.execute("object-del", id="kvmi0")
        w.event("closed", since=told, timeout=20)
        wait_until(lambda: kvmi_status(d.name)["state"] == "restart", 20, "the object to be gone")
        assert re.fullmatch(rf"{d.name} +restart +unix:{socket}\n", kvmi_libvirt("status", d.name))
        # with another object in it that isn't ours
        d.qmp.execute("chardev-add", id="mine", backend={"type": "socket", "data": {
            "addr": {"type": "unix", "data": {"path": "/run/mine.sock"}}, "server": False, "reconnect-ms": 1000}})
        d.qmp.execute("object-add", **{"qom-type": "kvmi", "id": "mine", "chardev": "mine"})
        said = kvmi_libvirt("enable", d.name, "--mutual")
        assert "takes it only when it is shut down and started again: it has a kvmi object already" in said, said
        d.qmp.execute("object-del", id="mine")
        wait_until(lambda: kvmi_status(d.name)["state"] == "restart", 20, "that object to be gone")
        assert "no restart is needed" in kvmi_libvirt("enable", d.name, "--mutual")
        tool_at_work(w, told)
        # With a tool that does not leave, nothing is taken from under the domain, and later all of it
        d.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=100000)
        d.qmp.execute("qom-set", path="/objects/kvmi0", property="silence-timeout-ms", value=0)
        enabled, told = dumpxml(), w.mark()
        w.signal(signal.SIGSTOP)
        assert "still has the object" in kvmi_libvirt("disable", d.name, fails=True)
        assert dumpxml() == enabled and Path(key).exists()
        w.signal(signal.SIGCONT)
        w.event("closed", since=told, timeout=20)
        kvmi_libvirt("disable", d.name)
    assert kvmi_status(d.name)["state"] == "off"
    assert dumpxml() == before, f"the XML is not what it was:\n{before}\n{dumpxml()}"
    assert files() == disk, f"left on the host: {set(files()) ^ set(disk)}"
    d.wait_alive()


@scenario(kvmi=None)
def libvirt_enable_vsock(d):
    """A tool on vsock: of a domain that is shut off, and after the next start, too; for a running one, in place of a unix socket.
    disable leaves nothing."""
    for m in ("vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"):
        if not os.path.exists(f"/sys/module/{m}"):
            subprocess.run(["insmod", BUILD / f"linux/stock/{m}.ko"], check=True, timeout=20)
    d.define(kvmi=False)
    d.create_disk()
    abstraction, local = Path("/etc/apparmor.d/abstractions/libvirt-qemu"), Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")
    abstraction.write_text("  include if exists <local/abstractions/libvirt-qemu>\n")
    secret, old = d.dir / "secret", d.dir / "old-qemu"
    secret.write_text("the tool's secret")
    old.write_text(f"#!/bin/sh\ncase $* in -help) echo 'no such option'; exit;; esac\nexec {d.emulator} \"$@\"\n")
    old.chmod(0o755)
    options = ["--socket", "vsock:5000", "--key-file", str(secret)]
    d.libvirtd.virsh("define", changed(d, "", ""))      # as libvirt itself writes it
    before, disk = d.virsh("dumpxml", "--inactive"), files()

    def status():
        return kvmi_libvirt("status", d.name), kvmi_status(d.name)["socket"]

    try:
        for wrong in ("1", "1:", ":1", "a:1", "1:5000:2", "-1:5000", "1:+5", "4294967296:1", "1:4294967296", "1:5000,server=on"):
            assert "--vsock wants CID:PORT" in kvmi_libvirt("enable", d.name, f"--vsock={wrong}", fails=True), wrong
        assert "cannot connect to a vsock" in kvmi_libvirt("enable", d.name, "--vsock", "1:5000", "--emulator", str(old), fails=True)
        assert d.virsh("dumpxml", "--inactive") == before and files() == disk
        said = kvmi_libvirt("enable", d.name, "--vsock", "1:5000", "--key-file", str(secret), "--emulator", str(d.emulator))
        socket, key = places(d)
        assert "takes effect when it is started" in said and f"kvmi watch --socket vsock:5000 --key-file {key}" in said, said
        rules = local.read_text()
        assert "network vsock stream," in rules and "@{profile_name}.key" in rules and ".sock" not in rules, rules
        line, where = status()
        assert re.fullmatch(rf"{d.name} +shut-off +vsock:1:5000\n", line) and where == "vsock:1:5000", (line, where)
        with Watch(*HOT, options=options) as w:
            d.boot()
            w.event("hit", count=5, timeout=60)
            line, where = status()
            assert re.fullmatch(rf"{d.name} +hooked +vsock:1:5000\n", line) and where == "vsock:1:5000", (line, where)
            told = w.mark()
            d.virsh("destroy")
            d.boot()
            w.event("hit", since=told, count=5, timeout=60)
        assert "no restart is needed" in kvmi_libvirt("enable", d.name, "--key-file", str(secret))
        assert "vsock" not in local.read_text() and status()[1] == socket
        assert "no restart is needed" in kvmi_libvirt("enable", d.name, "--vsock", "1:5000")
        with Watch(*HOT, options=options) as w:
            w.event("hit", count=5, timeout=60)
            kvmi_libvirt("disable", d.name)
        same_xml(d.virsh("dumpxml", "--inactive"), before)
        assert files() == disk, set(files()) ^ set(disk)
    finally:
        abstraction.unlink()
    d.remove()


@scenario()
def libvirt_enable_by_hand(d):
    """A kvmi object that somebody made by hand, with the id that enable's has, stays his."""
    before, disk = d.virsh("dumpxml", "--inactive"), files()
    assert kvmi_status(d.name)["state"] == "connecting"
    assert kvmi_libvirt("disable", d.name) == f"{d.name} was not enabled\n"
    assert "it has a KVMI object already" in kvmi_libvirt("enable", d.name, fails=True)
    assert "it has a KVMI object already" in kvmi_libvirt("enable", d.name, "--vsock", "1:5000", fails=True)
    assert info(d)["chardev"] == "tool" and d.virsh("dumpxml", "--inactive") == before and files() == disk
    with tool(d):
        pass


@scenario(kvmi=False)
def libvirt_enable_saved(d):
    """Managed save images and snapshots keep an XML of their own: with the object after disable, without it after enable. The
    first still find what they need, of the second one is told."""
    disk = files()
    _, key = places(d)
    d.virsh("managedsave")
    said = kvmi_libvirt("enable", d.name)
    assert "goes on from its managed save image" in said and "takes effect when it is started" not in said, said
    d.virsh("start")
    d.booted()
    assert kvmi_status(d.name)["state"] == "restart"
    assert "no restart is needed" in kvmi_libvirt("enable", d.name)
    # (an object that was added to the running domain isn't in the XML that is saved with it)
    d.virsh("destroy")
    d.boot()
    d.virsh("managedsave")
    said = kvmi_libvirt("disable", d.name)
    assert "still has it in its managed save image" in said and Path(key).exists(), said
    d.virsh("start")
    d.booted()
    assert kvmi_status(d.name)["state"] == "connecting"
    kvmi_libvirt("disable", d.name)
    assert files() == disk and kvmi_status(d.name)["state"] == "off"
    # (as long as this QEMU runs, it is in what libvirt takes for its XML)
    d.virsh("destroy")
    d.boot()
    d.virsh("snapshot-create-as", "without")
    assert "has 1 snapshot without the object" in kvmi_libvirt("enable", d.name)
    d.virsh("snapshot-create-as", "with")
    assert "still has it in 1 snapshot:" in kvmi_libvirt("disable", d.name)
    d.virsh("snapshot-revert", "with")
    d.booted()
    d.virsh("snapshot-delete", "with")
    kvmi_libvirt("disable", d.name)
    assert files() == disk
    d.virsh("snapshot-delete", "without")


@scenario(kvmi=None)
def libvirt_enable_offline(d):
    """The same with the domain shut off, an emulator without the object, and a path of the user's own."""
    d.define(kvmi=False)
    d.create_disk()
    other = Path("/run/qemu-without-kvmi")
    other.write_text(f"#!/bin/sh\ncase $* in '-object help') echo 'List of user creatable objects:'; exit;; esac\n"
                     f"exec {BUILD}/qemu/bin/qemu-system-x86_64 \"$@\"\n")
    other.chmod(0o755)
    d.libvirtd.virsh("define", changed(d, f"{BUILD}/qemu/bin/qemu-system-x86_64", str(other)))
    before = d.virsh("dumpxml", "--inactive")
    assert "has no kvmi object" in kvmi_libvirt("enable", d.name, fails=True)
    assert d.virsh("dumpxml", "--inactive") == before
    assert "absolute path" in kvmi_libvirt("enable", d.name, "--socket", "relative", fails=True)
    assert "no domain" in kvmi_libvirt("enable", "nobody", fails=True)
    assert "qemu:///system" in kvmi_libvirt("--connect", "qemu:///session", "enable", d.name, fails=True)
    assert "another host" in kvmi_libvirt("--connect", "qemu+ssh://nowhere/system", "enable", d.name, fails=True)
    assert "--json is for status" in kvmi_libvirt("disable", d.name, "--no-key", fails=True)
    # What could not be started any more
    parameter, off = "/sys/module/kvm/parameters/introspection", d.dir / "off"
    off.write_text("N\n")
    subprocess.run(["mount", "--bind", off, parameter], check=True, timeout=20)
    try:
        assert "turned off" in kvmi_libvirt("enable", d.name, fails=True)
    finally:
        subprocess.run(["umount", parameter], check=True, timeout=20)
    emulated = d.dir / "emulated.xml"
    emulated.write_text(d.xml(kvmi=False).replace("<domain type='kvm'", "<domain type='qemu'").replace(d.name, "emulated").replace("host-passthrough", "maximum"))
    d.libvirtd.virsh("define", emulated)
    assert "only KVM has introspection" in kvmi_libvirt("enable", "emulated", fails=True)
    d.libvirtd.virsh("undefine", "emulated")
    # What libvirt does not take leaves nothing behind
    disk = files()
    Path(f"/etc/libvirt/qemu/{d.name}.xml.new").mkdir()
    assert "does not take the changed XML" in kvmi_libvirt("enable", d.name, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", fails=True)
    Path(f"/etc/libvirt/qemu/{d.name}.xml.new").rmdir()
    assert files() == disk and d.virsh("dumpxml", "--inactive") == before
    # Nor does a change of somebody else's get lost that comes in between
    edits = d.dir / "qemu-edits"
    edits.write_text(f"#!/bin/sh\ncase $* in '-object help') virsh -q -c {d.libvirtd.uri} desc {d.name} --config meanwhile >&2;; esac\n"
                     f"exec {BUILD}/qemu/bin/qemu-system-x86_64 \"$@\"\n")
    edits.chmod(0o755)
    assert "was changed meanwhile: run this again" in kvmi_libvirt("enable", d.name, "--emulator", str(edits), fails=True)
    assert "meanwhile</description>" in d.virsh("dumpxml", "--inactive") and "kvmi0" not in d.virsh("dumpxml", "--inactive") and files() == disk
    d.virsh("desc", "--config", "")
    assert d.virsh("dumpxml", "--inactive") == before
    # A QEMU with a user of its own has to get to its secret and to the tool
    d.libvirtd.virsh("define", changed(d, "</devices>", "</devices><seclabel type='static' model='dac' relabel='no'><label>libvirt-qemu:+1234</label></seclabel>"))
    closed, uuid = d.dir / "closed", d.virsh("domuuid").strip()
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0o700)
    said = kvmi_libvirt("enable", uuid, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", "--socket", f"{closed}/inner/s", fails=True)
    assert f"runs as 64055:1234, which may not search {closed}:" in said and files() == disk, said
    closed.chmod(0o711)
    kvmi_libvirt("enable", uuid, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", "--socket", f"{closed}/inner/s")
    now = os.stat(places(d)[1])
    assert (now.st_uid, now.st_gid) == (64055, 1234), now
    assert "shut-off" in kvmi_libvirt("status", uuid)
    kvmi_libvirt("disable", uuid)
    d.libvirtd.virsh("define", changed(d, "libvirt-qemu:+1234", "nobody-here:+1"))
    assert "'nobody-here:+1', whom this host does not know" in kvmi_libvirt("enable", d.name, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", fails=True)
    d.libvirtd.virsh("define", changed(d, re.search(r" *<seclabel.*</seclabel>\n", d.virsh("dumpxml", "--inactive"), re.S)[0], ""))
    assert d.virsh("dumpxml", "--inactive") == before and files() == disk
    stock = BUILD / "qemu-stock/bin/qemu-system-x86_64"
    if stock.exists():          # in a long run
        enable_in_stock_qemu(d, str(other), str(stock))
    assert d.virsh("dumpxml", "--inactive") == before and files() == disk
    said = kvmi_libvirt("enable", d.name, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", "--socket", f"{d.dir}/a,b.sock", "--no-key")
    assert "when it is started" in said and "AppArmor" not in said, said
    with Watch(*HOT, options=["--socket", f"{d.dir}/a,b.sock"]) as w:
        d.boot()
        w.event("hit", count=5, timeout=60)
        d.virsh("qemu-monitor-command", json.dumps({"execute": "qom-set", "arguments": {"path": "/objects/kvmi0", "property": "on-shutdown", "value": "announce"}}))
        told = w.mark()
        d.virsh("destroy")
        w.event("closed", since=told, reason="unhook")
    kvmi_libvirt("disable", d.name)
    assert d.virsh("dumpxml", "--inactive") == before
    d.remove()


def enable_in_stock_qemu(d, emulator, stock):
    """A domain that runs in a QEMU that has no such object"""
    d.libvirtd.virsh("define", changed(d, emulator, stock))
    d.virsh("start", "--paused")
    said = kvmi_libvirt("enable", d.name, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64")
    assert "takes it only when it is shut down and started again" in said, said
    assert kvmi_status(d.name)["state"] == "restart"
    d.virsh("destroy")
    kvmi_libvirt("disable", d.name)
    d.libvirtd.virsh("define", changed(d, stock, emulator))


def same_xml(now, before):
    assert now == before, "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "before", "now", lineterm=""))


def changed(d, old, new):
    path = d.dir / "changed.xml"
    text = d.virsh("dumpxml", "--inactive")
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@scenario(kvmi=None)
def libvirt_enable_files(d):
    """What is on the host for other domains, and for others than kvmi libvirt: for a copy of an enabled domain, whose XML names
    that one's socket and secret, nothing of it is touched; two at once don't take away each other's rules; and enable that fails leaves
    the rules that a running domain needs."""
    etc = Path("/etc/apparmor.d")
    abstraction, local = etc / "abstractions/libvirt-qemu", etc / "local/abstractions/libvirt-qemu"
    abstraction.write_text("  include if exists <local/abstractions/libvirt-qemu>\n")
    other, crafted, parser = Domain(d.libvirtd, "copy"), Path("/etc/kvmi/x"), Path("/usr/sbin/apparmor_parser")
    hidden = parser.with_name("hidden")
    d.define(kvmi=False)
    try:
        disk = files()
        kvmi_libvirt("enable", d.name)
        _, key = places(d)
        secret, rules, enabled = Path(key).read_text(), local.read_text(), d.virsh("dumpxml", "--inactive")
        other.dir.mkdir(parents=True, exist_ok=True)

        def copied(*changes):
            copy = other.dir / "xml"
            text = re.sub(" *<uuid>.*</uuid>\n", "", enabled).replace(f"<name>{d.name}<", f"<name>{other.name}<")
            for old, new in changes:
                assert old in text
                text = text.replace(old, new)
            copy.write_text(text)
            d.libvirtd.virsh("define", copy)

        def untouched():
            assert Path(key).read_text() == secret and d.virsh("dumpxml", "--inactive") == enabled
            assert [line for line in rules.splitlines() if line not in local.read_text().splitlines()] == [], local.read_text()

        copied()
        assert "of another domain: run kvmi libvirt enable" in kvmi_libvirt("status", other.name)
        kvmi_libvirt("disable", other.name)
        untouched()
        other.virsh("undefine")
        copied()
        assert "it gets its own" in kvmi_libvirt("enable", other.name)
        assert "another domain" not in kvmi_libvirt("status", other.name)
        untouched()
        own = places(other)
        assert own[1] != key and Path(own[1]).read_text() != secret and other.virsh("dumpxml", "--inactive").count(own[0][:-5]) == 1
        kvmi_libvirt("disable", other.name)
        untouched()
        assert local.read_text() == rules and not Path(own[1]).exists()
        # Nor anything else that the XML names
        other.virsh("undefine")
        crafted.write_text("somebody's")
        copied((key, f"/etc/kvmi/keys/../../kvmi/{crafted.name}"))
        kvmi_libvirt("disable", other.name)
        assert crafted.read_text() == "somebody's"
        crafted.unlink()

        # Before it comes to write rules, it does not touch those that a QEMU may need that was started with another XML
        needed = f"  /run/needed rw, # kvmi libvirt, domain {other.virsh('domuuid').strip()}\n"
        local.write_text(rules + needed)
        kvmi_libvirt("enable", other.name, "--key-file", "/nowhere", fails=True)
        assert local.read_text() == rules + needed
        local.write_text(rules)

        # One waits for the other
        with open("/run/kvmi-libvirt.lock") as lock:
            assert os.fstat(lock.fileno()).st_mode & 0o777 == 0o600
            fcntl.flock(lock, fcntl.LOCK_EX)
            with begin_kvmi_libvirt("enable", other.name) as waits:
                time.sleep(2)
                assert waits.poll() is None and not Path(places(other)[1]).exists() and local.read_text() == rules
                fcntl.flock(lock, fcntl.LOCK_UN)
                said, _ = waits.communicate(timeout=60)
        assert waits.returncode == 0, said
        untouched()

        # After it has written some, it puts back those that were there
        rules = local.read_text()
        Path(f"/etc/libvirt/qemu/{d.name}.xml.new").mkdir()
        assert "does not take the changed XML" in kvmi_libvirt("enable", d.name, "--socket", "/run/other.sock", fails=True)
        Path(f"/etc/libvirt/qemu/{d.name}.xml.new").rmdir()
        assert sorted(local.read_text().splitlines()) == sorted(rules.splitlines()), local.read_text()
        untouched()
        kvmi_libvirt("disable", other.name)
        kvmi_libvirt("disable", d.name)
        assert files() == disk

        # AppArmor's parser is found where root does not look for it, and where there is none, nobody loads the rules
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text("  /mistake wrong,\n")
        assert "apparmor_parser -Q" in kvmi_libvirt("enable", d.name, fails=True, PATH="/usr/bin:/bin")
        parser.rename(hidden)
        kvmi_libvirt("enable", d.name)
        kvmi_libvirt("disable", d.name)
        local.unlink()
        assert files() == disk
    finally:
        if hidden.exists():
            hidden.rename(parser)
        abstraction.unlink()
        other.remove()
    d.remove()


@scenario(kvmi=None)
def libvirt_enable_stock_user(_):
    """With QEMU as the user that Debian gives it, in libvirt's mount name space: the rights that enable sets are enough for it to
    reach the tool and to read the secret."""
    libvirtd = Libvirtd("stock", stock=True).start()
    d = Domain(libvirtd, "confined")
    try:
        d.remove()
        d.for_everybody()
        d.define(kvmi=False)
        d.create_disk()
        shutil.chown(d.disk, 64055, 64055)
        home = d.dir / "home"
        home.mkdir(mode=0o700)
        assert f"may not search {home}:" in kvmi_libvirt("--connect", libvirtd.uri, "enable", d.name, "--socket", f"{home}/s", fails=True)
        kvmi_libvirt("--connect", libvirtd.uri, "enable", d.name)
        socket, key = places(d)
        assert (os.stat(key).st_uid, os.stat(key).st_mode & 0o777) == (64055, 0o400), os.stat(key)
        with Watch(*HOT, options=["--socket", socket, "--mode", "0660", "--key-file", key]) as w:
            d.virsh("start")
            assert b"libvirt-qemu" in subprocess.run(["ps", "-C", "qemu-kvmi", "-o", "user:20="], stdout=subprocess.PIPE, timeout=20).stdout
            w.event("hit", count=5, timeout=400)
        kvmi_libvirt("--connect", libvirtd.uri, "disable", d.name)
    finally:
        d.remove()
        libvirtd.stop()


@scenario(kvmi=None)
def libvirt_enable_apparmor(d):
    """The rules that enable writes are what AppArmor takes, and with them a process confined like the domain's QEMU gets to the socket
    and the secret, and nothing else; so QEMU itself, which is hooked and asks the tool to leave. Another domain's QEMU gets to neither
    of them. A profile that is loaded is loaded anew. Debian's profiles include the local files in just this way."""
    d.define(kvmi=False)
    d.create_disk()
    d.virsh("start")
    uuid = d.virsh("domuuid").strip()
    etc = Path("/etc/apparmor.d")
    (etc / "libvirt").mkdir(exist_ok=True)
    profile, stranger = f"libvirt-{uuid}", "libvirt-12345678-1234-1234-1234-123456789abc"
    emulator = Path("/run/emulator")        # what counts for AppArmor is where it leads to
    emulator.symlink_to(BUILD / "qemu/bin/qemu-system-x86_64")
    made = {etc / "abstractions/libvirt-qemu": "  #include <abstractions/base>\n  /usr/** mrix,\n  /run/out/** r,\n"
                                               "  /dev/kvm rw,\n  /run/confined/** rw,\n"
                                               "  include if exists <local/abstractions/libvirt-qemu>\n",
            **{etc / "libvirt" / p: f"#include <tunables/global>\nprofile {p} flags=(attach_disconnected) {{\n"
                                    "  #include <abstractions/libvirt-qemu>\n}\n" for p in (profile, stranger)},
            etc / "usr.sbin.libvirtd": "#include <tunables/global>\nprofile libvirtd /usr/sbin/libvirtd flags=(attach_disconnected) {\n"
                                       "  file,\n  #include <local/usr.sbin.libvirtd>\n}\n",
            etc / "usr.sbin.virtqemud": "#include <tunables/global>\nprofile virtqemud /usr/sbin/virtqemud flags=(attach_disconnected) {\n"
                                        "  file,\n  include if exists <local/usr.sbin.virtqemud>\n}\n"}
    local = etc / "local/abstractions/libvirt-qemu"
    for path, text in made.items():
        path.write_text(text)
        (etc / "local" / path.relative_to(etc)).parent.mkdir(parents=True, exist_ok=True)
    local.write_text("  # somebody else's\n")
    local.chmod(0o640)
    (etc / "local/usr.sbin.libvirtd").write_text("")

    def confined(code, profile):
        return subprocess.run(["aa-exec", "-p", profile, "--", "/usr/bin/python3", "-Ic", code], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)

    def may(what, profile=profile):
        r = confined(what, profile)
        print(what, "->", r.returncode, r.stdout.strip()[-100:])
        assert r.returncode == 0 or "Permission denied" in r.stdout, r.stdout
        return r.returncode == 0

    def confined_qemu():
        """A QEMU with the domain's profile, that wants the secret and the tool; a guest that is nothing but a BIOS will do."""
        folder = Path("/run/confined")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        argv = ["aa-exec", "-p", profile, "--", f"{BUILD}/qemu/bin/qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-m", "64", "-nodefaults",
                "-display", "none", "-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-object", f"secret,id=key,file={key}", "-chardev",
                f"socket,id=tool,path={socket},reconnect-ms=100", "-object", "kvmi,id=kvmi0,chardev=tool,key=key"]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    connect = "import socket; socket.socket(socket.AF_UNIX).connect('{}')"
    socket, key = places(d)
    other = Path("/etc/kvmi/other.key")
    for p in (profile, stranger):
        subprocess.run(["apparmor_parser", "-r", str(etc / "libvirt" / p)], check=True, timeout=60)
    try:
        # A mistake in the file is found before any QEMU needs it
        local.write_text("  # somebody else's\n  /mistake wrong,\n")
        assert "apparmor_parser -Q" in kvmi_libvirt("enable", d.name, fails=True)
        assert "kvmi0" not in d.virsh("dumpxml", "--inactive") and not Path(key).exists()
        assert local.read_text() == "  # somebody else's\n  /mistake wrong,\n", local.read_text()
        local.write_text("  # somebody else's\n")

        kvmi_libvirt("enable", d.name, "--emulator", str(emulator))
        other.write_text("another secret")
        rules = local.read_text()
        assert rules.startswith("  # somebody else's\n") and rules.count(uuid) == 3, rules
        for daemon in ("libvirtd", "virtqemud"):
            assert f'"{emulator.resolve()}" PUx' in (etc / "local" / f"usr.sbin.{daemon}").read_text()
        # The domain next door, with the rules as they are now
        subprocess.run(["apparmor_parser", "-r", str(etc / "libvirt" / stranger)], check=True, timeout=60)
        assert may("open('/dev/null')", stranger) and not may(f"open('{key}')", stranger), "another domain's QEMU could read the secret"
        with Watch(options=["--socket", socket, "--mode", "0660", "--key-file", key]) as w:
            w.event("ready", timeout=60)
            assert may(connect.format(socket)), "the domain's QEMU could not connect to its tool"
            with confined_qemu() as qemu:
                try:
                    qmp = QMP("/run/confined/qmp")
                    assert Path(f"/proc/{qemu.pid}/attr/current").read_text() == f"{profile} (enforce)\n"
                    try:
                        wait_until(lambda: qmp.execute("query-kvmi")["state"] == "hooked", 20, "the confined QEMU to be hooked")
                    except AssertionError as e:
                        raise AssertionError(f"{e}; {qmp.execute('query-kvmi')}") from None
                    w.event("ready", timeout=60, count=2)
                    qmp.execute("stop")
                    assert qmp.event("KVMI_UNHOOKED")["data"]["outcome"] == "clean"
                finally:
                    qemu.kill()
        # (that another socket is out of reach only newer kernels enforce)
        assert may(f"open('{key}').read()"), "the domain's QEMU could not read its secret"
        assert not may(f"open('{other}').read()"), "the profile confines nothing: this proves nothing"
        kept = Path(key).read_text()
        kvmi_libvirt("disable", d.name)
        assert not Path(key).exists()
        Path(key).write_text(kept)
        assert not may(f"open('{key}').read()"), "the rule outlives disable"
        with confined_qemu() as qemu:
            error = qemu.communicate(timeout=60)[1]
            print(error)
            assert qemu.returncode and "Permission denied" in error, "the confined QEMU could still be started"
        Path(key).unlink()
        other.unlink()
        assert local.read_text() == "  # somebody else's\n" and local.stat().st_mode & 0o777 == 0o640
        assert (etc / "local/usr.sbin.libvirtd").read_text() == "" and not (etc / "local/usr.sbin.virtqemud").exists()
        # What enable has made, it removes
        local.unlink()
        kvmi_libvirt("enable", d.name)
        assert local.exists()
        kvmi_libvirt("disable", d.name)
        assert not local.exists()
    finally:
        for p in (profile, stranger):
            subprocess.run(["apparmor_parser", "-R", str(etc / "libvirt" / p)], timeout=60)
        for path in (*made, emulator):
            path.unlink()
        local.unlink(missing_ok=True)
    d.remove()


@scenario(timeout=600, kvmi=None)
def libvirt_apparmor_driver(_):
    """With libvirt's own AppArmor driver, virt-aa-helper, and the profiles of Debian's packages: what enable writes is all that the
    confined QEMU and the confined daemon need."""
    etc = Path("/etc/apparmor.d")
    shutil.copytree((Path(FROM.read_text()) if FROM.exists() else PROFILES) / "etc/apparmor.d", etc, dirs_exist_ok=True)
    profiles = [etc / "usr.sbin.libvirtd", etc / "usr.lib.libvirt.virt-aa-helper"]
    assert profiles[0].exists(), "scripts/fetch-libvirt --profiles says what to give as --profiles"
    # Debian's packages make them, empty
    for name in ("abstractions/libvirt-qemu", "usr.sbin.libvirtd", "usr.lib.libvirt.virt-aa-helper"):
        (etc / "local" / name).parent.mkdir(exist_ok=True)
        (etc / "local" / name).touch()
    subprocess.run(["apparmor_parser", "-r", *profiles], check=True, timeout=120)
    libvirtd = Libvirtd("driver", stock=True, security="apparmor")
    d = Domain(libvirtd, "confined")
    try:
        libvirtd.start()
        pid = int((libvirtd.dir / "libvirtd.pid").read_text())
        assert Path(f"/proc/{pid}/attr/current").read_text() == "libvirtd (enforce)\n"
        d.remove()
        d.for_everybody()
        # Without monitors and traces of the tests' own, which no domain has, and at first with a QEMU where Debian's is
        xml, usual = d.dir / "xml", Path("/usr/bin/qemu-system-x86_64")
        if not usual.exists():
            shutil.copy(d.emulator, usual)
        xml.write_text(re.sub("<qemu:commandline>.*</qemu:commandline>", "", d.xml(kvmi=False), flags=re.S).replace(d.emulator, str(usual)))
        libvirtd.virsh("define", xml)
        d.create_disk()
        shutil.chown(d.disk, 64055, 64055)
        kvmi_libvirt("--connect", libvirtd.uri, "enable", d.name, "--emulator", d.emulator)
        socket, key = places(d)
        uuid = d.virsh("domuuid").strip()
        with Watch(*HOT, options=["--socket", socket, "--mode", "0660", "--key-file", key]) as w:
            d.virsh("start")
            pid = int((libvirtd.dir / f"run/qemu/{d.name}.pid").read_text())
            assert Path(f"/proc/{pid}/attr/current").read_text() == f"libvirt-{uuid} (enforce)\n"
            assert os.readlink(f"/proc/{pid}/exe") == d.emulator and os.stat(f"/proc/{pid}").st_uid == 64055
            w.event("hit", count=5, timeout=400)
            told = w.mark()
            d.virsh("suspend")
            w.event("closed", since=told, reason="unhook")
            last = json.loads(kvmi_libvirt("--connect", libvirtd.uri, "status", "--json", d.name))["kvmi"]["last-unhook"]
            assert (last["action"], last["outcome"]) == ("stop", "clean"), last
            d.virsh("resume")
            w.event("hit", since=told, count=5, timeout=60)
            # Live, in the profile that is loaded
            told = w.mark()
            kvmi_libvirt("--connect", libvirtd.uri, "disable", d.name)
            w.event("closed", since=told, timeout=20)
            assert "no restart is needed" in kvmi_libvirt("--connect", libvirtd.uri, "enable", d.name, "--emulator", d.emulator)
        with Watch(*HOT, options=["--socket", socket, "--mode", "0660", "--key-file", key]) as w:
            w.event("hit", count=5, timeout=100)
        d.virsh("destroy")
        kvmi_libvirt("--connect", libvirtd.uri, "disable", d.name)
        assert all((etc / "local" / n).read_text() == "" for n in ("abstractions/libvirt-qemu", "usr.sbin.libvirtd"))
    finally:
        d.remove()
        libvirtd.stop()
        for profile in profiles:
            subprocess.run(["apparmor_parser", "-R", profile], timeout=60)
        shutil.rmtree(etc / "libvirt")
        for path in (*profiles, etc / "abstractions/libvirt-qemu"):
            path.unlink()


@scenario(kvmi=None)
def libvirt_capabilities(d):
    """libvirt's probe of our QEMU: a domain's capabilities are what they should be, the daemon complains of nothing, and what it
    found out is found out anew when there is another QEMU at that place."""
    libvirtd, cache = d.libvirtd, Path("/var/cache/libvirt/qemu/capabilities")
    libvirtd.stop()
    for old in cache.glob("*.xml"):
        old.unlink()
    (libvirtd.dir / "log").unlink()
    libvirtd.start()
    d.dir.mkdir(parents=True, exist_ok=True)
    emulator = shutil.copy(BUILD / "qemu/bin/qemu-system-x86_64", d.dir / "qemu")

    def probed():
        """The time of change of the QEMU that the daemon knows; None if it knows none."""
        found = [int(re.search(r"<qemuctime>(\d+)<", t)[1]) for t in (p.read_text() for p in cache.glob("*.xml")) if f"<emulator>{emulator}</emulator>" in t]
        assert len(found) < 2, found
        return found[0] if found else None

    mark = len(libvirtd.log())      # (before that it complains of what else this host has not got)
    assert probed() is None
    xml = libvirtd.virsh("domcapabilities", "--emulatorbin", emulator, "--machine", "q35")
    assert f"<path>{emulator}</path>" in xml and "<domain>kvm</domain>" in xml, xml
    assert "mode name='host-passthrough' supported='yes'" in xml, xml
    assert probed() == int(os.stat(emulator).st_ctime)
    time.sleep(1.1)     # it counts seconds
    os.replace(shutil.copy(emulator, d.dir / "newer"), emulator)
    assert probed() != int(os.stat(emulator).st_ctime)
    libvirtd.virsh("domcapabilities", "--emulatorbin", emulator, "--machine", "q35")
    assert probed() == int(os.stat(emulator).st_ctime)
    wrong = [line for line in libvirtd.log()[mark:].splitlines() if ": error :" in line or ": warning :" in line]
    assert not wrong, wrong
    d.remove()


def run(name):
    function = SCENARIOS[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("out of time"))
    libvirtd = Libvirtd()
    d = Domain(libvirtd)
    marker = Path("/run/domains/ready")      # there as long as the domain is fit for the next scenario
    try:
        if not libvirtd.running():
            Guest().kill()                  # of other scenarios: it takes time from this host's CPUs
        libvirtd.start()
        shared = not function.options
        if "kvmi" in function.options and function.options["kvmi"] is None:
            d.remove()                      # it wants none of this
        elif marker.exists() and shared and d.alive():
            marker.unlink()
        else:
            marker.unlink(missing_ok=True)
            d.start(**function.options)
        function(d)
        # What libvirt says when a job is stuck
        for each in Libvirtd.all:
            assert "cannot acquire state change lock" not in each.news(), f"a domain job was stuck: see the log of libvirtd '{each.name}'"
        if shared and d.libvirtd is libvirtd:
            marker.touch()
    except BaseException as e:
        traceback.print_exc()
        print("--- libvirtd's log, last lines ---")
        print("\n".join(libvirtd.log().splitlines()[-10:]))
        print("--- QEMU's trace, last lines ---")
        print("\n".join(d.trace.read_text(errors="replace").splitlines()[-30:]) if d.trace.exists() else "")
        print("--- the guest's console, last lines ---")
        print("\n".join(d.output().splitlines()[-5:]))
        log = Path(f"/var/log/libvirt/qemu/{d.name}.log")
        print("--- libvirt's log of the domain, last lines ---")
        print("\n".join(log.read_text(errors="replace").splitlines()[-10:]) if log.exists() else "")
        if not isinstance(e, Exception):
            raise
        return 1
    return 0


if __name__ == "__main__":
    names = sys.argv[1:]
    while names and names[0] in ("--libvirt", "--profiles"):
        if names[0] == "--libvirt":
            use_libvirt(names[1])
        else:
            PROFILES = Path(names[1])
        names = names[2:]
    names = names or list(SCENARIOS)
    failed = []
    for name in names:
        start = time.monotonic()
        bad = run(name)
        print(f"{'FAIL' if bad else 'pass'} {name} {time.monotonic() - start:.1f} s", flush=True)
        failed += [name] if bad else []
    sys.exit(1 if failed else 0)
