#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios with the real libvirtd: run in the AMD host, one a process, by tests/test_libvirt.py; by hand:

    tests/host/run amd -- tests/host/libvirt_scenarios.py [--libvirt FOLDER] NAME…

--libvirt: with the libvirt that scripts/fetch-libvirt has put there, in place of the machine's.

They share libvirtd and one domain, as those of scenarios.py share a guest.
"""
import contextlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

from inside import BUILD, HOT, QMP, Guest, Watch, symbols, wait_until
from scenarios import breakpoint_offsets, code, hook, info, same_memory, wait_state
from virsh import Domain, Libvirtd, VirshError, use_libvirt

SCENARIOS = {}
# What QEMU waits for the tool at; the tool is cut off at the rest.
WAITS = {"stop", "save", "migrate", "suspend"}
# How long a hung tool is waited for here, s; suspend and resume keep the default of 5.
DEADLINE = 2


def scenario(timeout=300, **options):
    """options: for Domain.xml(); such a domain is not shared. kvmi=None: no domain at all."""
    def add(function):
        function.timeout, function.options = 2 * timeout, options
        SCENARIOS[function.__name__] = function
        return function
    return add


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tool(d, *options):
    """The tool, with breakpoints planted and hit."""
    with hook(d, *HOT) as w:
        set_deadline(d)
        yield w
        mark = d.qmp.mark()
        w.signal(signal.SIGINT)
        w.finish()
        wait_state(d, "connecting", mark)
    d.wait_alive()


def set_deadline(d, seconds=DEADLINE):
    d.qmp.execute("qom-set", path="/objects/kvmi0", property="unhook-timeout-ms", value=seconds * 1000)


def set_patience(d, seconds):
    """How long the tool may be silent while the guest waits for it."""
    d.qmp.execute("qom-set", path="/objects/kvmi0", property="silence-timeout-ms", value=seconds * 1000)


def hooked_again(d, w, told, hits=5):
    """The tool is back, and its breakpoints are."""
    w.event("planted", since=told, timeout=60)
    w.event("hit", since=max(i for i, e in enumerate(w.said) if e["event"] == "planted"), count=hits, timeout=60)
    wait_until(lambda: info(d)["state"] == "hooked", 20, "query-kvmi to say hooked")


def last_words(qmp):
    """What a QEMU that is about to end, or has ended, still has to say."""
    try:
        qmp.pump(lambda: qmp.lines.ended, 20, "QEMU's end")
    except OSError:
        pass


class Watched:
    """What the tool and QEMU say of one operation, for a tool that is prompt, slow, hung, or not there (w is None)."""

    def __init__(self, d, w, behaviour="prompt"):
        self.d, self.w, self.behaviour = d, w if behaviour != "none" else None, behaviour
        self.qmp = d.qmp

    def __enter__(self):
        self.mark = self.qmp.mark()
        if self.w:
            self.told = self.w.mark()
        if self.behaviour in ("slow", "hung"):
            self.w.signal(signal.SIGSTOP)
        self.waker = None
        if self.behaviour == "slow":
            self.waker = threading.Timer(1, self.w.signal, [signal.SIGCONT])
            self.waker.start()
        self.begin = time.monotonic()
        return self

    def __exit__(self, *exc):
        self.took = time.monotonic() - self.begin
        if self.waker:
            self.waker.join()
        if self.behaviour == "hung":
            self.w.signal(signal.SIGCONT)

    def check(self, action, ended=False):
        """The tool was asked to leave in order, once, and what that took, which is all that it adds to the operation, was within the
        deadline. ended: that QEMU is gone."""
        if ended:
            last_words(self.qmp)
        else:
            self.qmp.execute("query-status")       # what it said before has arrived
        unhooks = [e["data"] for e in self.qmp.events[self.mark:] if e["event"] == "KVMI_UNHOOKED"]
        print(f"{action}, {self.behaviour} tool: {self.took:.1f} s; {unhooks}", flush=True)
        if self.behaviour == "none":
            assert not unhooks, unhooks
            return
        if action == "reset":
            del unhooks[1:]     # a firmware may reset once more
        assert [u["action"] for u in unhooks] == [action], f"not one orderly unhook for {action}: {unhooks}"
        assert unhooks[0]["duration"] < (DEADLINE + 3) * 1000000, unhooks
        outcome = "clean" if action in WAITS and self.behaviour != "hung" else "forced"
        assert unhooks[0]["outcome"] == outcome, f"expected the outcome {outcome}: {unhooks}"
        self.w.event("closed", since=self.told, timeout=20)
        said = [(e["event"], e.get("reason")) for e in self.w.said[self.told:] if e["event"] in ("notified", "clean", "closed")]
        if outcome == "clean":
            assert said[:3] == [("notified", "unhook"), ("clean", None), ("closed", "unhook")], said


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
        return self

    def __exit__(self, *exc):
        self.ended.set()
        self.thread.join(30)
        self.d.remove()
        if exc[0] is None:
            assert self.trouble is None, f"the other domain was disturbed: {self.trouble}"
            print(f"the other domain answered {len(self.took)} times, the slowest after {max(self.took):.1f} s")
            assert max(self.took) < 4.5, "the other domain had to wait"


# --- scenarios --------------------------------------------------------------------------------------------------------


@scenario()
def libvirt_suspend_resume(d):
    """virsh suspend waits for the tool; no breakpoint is left in the paused guest; virsh resume brings them back."""
    before = code(d)
    with tool(d) as w:
        for behaviour in ("prompt", "slow", "hung"):
            with Watched(d, w, behaviour) as o:
                d.virsh("suspend")
            o.check("stop")
            assert d.state() == "paused"
            same_memory(before, code(d), "suspended")
            told = w.mark()
            d.virsh("resume")
            hooked_again(d, w, told)
    with Watched(d, None, "none") as o:
        d.virsh("suspend")
    o.check("stop")
    d.virsh("resume")
    d.wait_alive()


@scenario()
def libvirt_suspend_default_deadline(d):
    """With the deadline that users have, 5 s, a hung tool delays virsh suspend, but no virsh of another domain, and a second
    command for the same domain waits for its turn."""
    with tool(d) as w, Neighbour(d.libvirtd):
        set_deadline(d, 5)
        w.signal(signal.SIGSTOP)
        told = w.mark()
        begin = time.monotonic()
        suspend = d.begin("suspend")
        time.sleep(1)
        stats = d.begin("domstats", "--balloon", "--vcpu")
        suspend.result()
        stats.result()
        took = time.monotonic() - begin
        assert 4.9 < took < 25, f"{took:.1f} s"
        w.signal(signal.SIGCONT)
        w.event("closed", since=told)
        told = w.mark()
        d.virsh("resume")
        hooked_again(d, w, told)


@scenario()
def libvirt_save_restore(d):
    """virsh save: no breakpoint in the file, and a tool again after virsh restore."""
    before = code(d)
    saved = d.dir / "saved"
    with tool(d) as w:
        for behaviour in ("prompt", "slow", "hung"):
            with Watched(d, w, behaviour) as o:
                d.virsh("save", saved)
            o.check("stop", ended=True)
            pristine(saved, before)
            told = w.mark()
            d.libvirtd.virsh("restore", saved)
            d.booted()
            hooked_again(d, w, told)
            set_deadline(d)
    with Watched(d, None, "none") as o:
        d.virsh("save", saved)
    o.check("stop", ended=True)
    d.libvirtd.virsh("restore", saved)
    d.booted()
    saved.unlink()


@scenario()
def libvirt_managedsave(d):
    """virsh managedsave, and virsh start from it."""
    before = code(d)
    with tool(d) as w:
        for behaviour in ("prompt", "hung"):
            with Watched(d, w, behaviour) as o:
                d.virsh("managedsave")
            o.check("stop", ended=True)
            pristine(f"/var/lib/libvirt/qemu/save/{d.name}.save", before)
            told = w.mark()
            d.virsh("start")
            d.booted()
            hooked_again(d, w, told)
            set_deadline(d)


@scenario()
def libvirt_snapshot_internal(d):
    """A snapshot with memory inside the disk image, and back to it: what libvirt saves is without breakpoints."""
    before = code(d)
    with tool(d) as w:
        for behaviour in ("prompt", "hung"):
            with Watched(d, w, behaviour) as o:
                told = w.mark()
                d.virsh("snapshot-create-as", behaviour)
            o.check("stop")
            hooked_again(d, w, told)
            pristine(d.disk, before)
        told = w.mark()
        d.another()
        d.virsh("snapshot-revert", "prompt")        # libvirt 9 does it by a new QEMU, later ones need not
        d.booted()
        hooked_again(d, w, told)
    for name in ("prompt", "hung"):
        d.virsh("snapshot-delete", name)


@scenario()
def libvirt_snapshot_external(d):
    """A snapshot with memory in a file of its own; with --live, the guest runs while its memory is written."""
    before = code(d)
    memory = d.dir / "snapshot.memory"
    with tool(d) as w:
        for behaviour, live in (("prompt", ()), ("hung", ()), ("prompt", ("--live",)), ("hung", ("--live",))):
            if live and "migrate" not in WAITS:
                continue
            with Watched(d, w, behaviour) as o:
                told = w.mark()
                d.virsh("snapshot-create-as", "outside", "--memspec", f"file={memory},snapshot=external", "--diskspec",
                        f"vda,snapshot=external,file={d.dir}/overlay.qcow2", *live)
            o.check("migrate" if live else "stop")
            hooked_again(d, w, told)
            pristine(memory, before)
            d.virsh("blockcommit", "vda", "--active", "--pivot")
            d.virsh("snapshot-delete", "outside", "--metadata")
            memory.unlink()
            (d.dir / "overlay.qcow2").unlink()


@scenario()
def libvirt_dump(d):
    """virsh dump in its forms; none has a breakpoint in it."""
    before = code(d)
    path = d.dir / "core"
    with tool(d) as w:
        for behaviour, options, action in (("prompt", ["--memory-only"], "stop"), ("hung", ["--memory-only"], "stop"),
                                           ("prompt", [], "stop"),
                                           ("prompt", ["--memory-only", "--live"], "save"), ("hung", ["--memory-only", "--live"], "save"),
                                           ("prompt", ["--live"], "migrate"), ("hung", ["--live"], "migrate")):
            if action == "migrate" and action not in WAITS:
                continue
            with Watched(d, w, behaviour) as o:
                told = w.mark()
                d.virsh("dump", path, *options)
            o.check(action)
            hooked_again(d, w, told)
            pristine(path, before)
            path.unlink()


@scenario()
def libvirt_dump_crash(d):
    """virsh dump --crash ends the domain after the dump."""
    before = code(d)
    path = d.dir / "core"
    with tool(d) as w:
        with Watched(d, w) as o:
            d.virsh("dump", path, "--crash", "--memory-only")
        o.check("stop", ended=True)
        pristine(path, before)
        path.unlink()
        assert d.state() == "shut off"
        told = w.mark()
        d.boot()
        hooked_again(d, w, told)


@scenario()
def libvirt_reset(d):
    """virsh reset: nothing waits, a hung tool neither; the new kernel is hooked."""
    with tool(d) as w:
        for behaviour in ("prompt", "hung"):
            d.another()
            with Watched(d, w, behaviour) as o:
                d.virsh("reset")
            o.check("reset")
            d.rebooted()
            hooked_again(d, w, o.told)


@scenario()
def libvirt_reboot_shutdown_start(d):
    """virsh reboot and shutdown, by the guest's power button."""
    with tool(d) as w:
        d.another()
        with Watched(d, w) as o:
            d.virsh("reboot", "--mode", "acpi")
            d.qmp.event("RESET", since=o.mark, timeout=20)
        assert [e["data"] for e in d.qmp.events[o.mark:] if e["event"] == "KVMI_UNHOOKED"]
        d.rebooted()
        hooked_again(d, w, o.told)
        for behaviour in ("prompt", "hung"):
            # The guest has to hear of it, and stands still until the hung tool is cut off
            set_patience(d, 3)
            with Watched(d, w, behaviour) as o:
                d.virsh("shutdown", "--mode", "acpi")
                wait_until(lambda: d.state() == "shut off", 20, "the guest to power off")
            o.check("shutdown" if behaviour == "prompt" else "silence", ended=True)
            told = w.mark()
            d.boot()
            hooked_again(d, w, told)
            set_deadline(d)


@scenario()
def libvirt_destroy_start(d):
    """virsh destroy waits for nobody, and virsh start does not, either: the tool may come later."""
    with tool(d) as w:
        for behaviour in ("prompt", "hung"):
            with Watched(d, w, behaviour) as o:
                begin = time.monotonic()
                d.virsh("destroy")
                assert time.monotonic() - begin < 30
                if behaviour == "hung":
                    d.boot()
            told = w.mark()
            if behaviour == "prompt":
                d.boot()
            hooked_again(d, w, told)


@scenario()
def libvirt_dompmsuspend_wakeup(d):
    """virsh dompmsuspend and dompmwakeup: the guest suspends to RAM."""
    before = code(d)
    with tool(d) as w:
        for behaviour in ("prompt",):        # libvirt takes no second one of this guest: its agent is too small for that
            with Watched(d, w, behaviour) as o:
                d.virsh("dompmsuspend", "mem")
                d.qmp.event("SUSPEND", since=o.mark, timeout=20)
            o.check("suspend")
            after = code(d)         # (which the kernel itself changes: that it runs on one CPU, and suspends)
            assert [after[o] for o in breakpoint_offsets(d, HOT)] == [before[o] for o in breakpoint_offsets(d, HOT)], "a breakpoint sleeps, too"
            assert d.state() == "pmsuspended"
            told = w.mark()
            d.virsh("dompmwakeup")
            wait_until(lambda: d.output().rstrip().rfind("guest: woke up") >= 0, 30, "the guest to wake up")
            hooked_again(d, w, told)


@scenario()
def libvirt_blockcopy_backup(d):
    """Jobs of the block layer go on beside the tool, and beside a suspend that waits for it."""
    copy = d.dir / "copy.qcow2"
    xml = d.dir / "backup.xml"
    xml.write_text(f"<domainbackup mode='push'><disks><disk name='vda' type='file'><target file='{d.dir}/backup.qcow2'/>"
                   "<driver type='qcow2'/></disk></disks></domainbackup>")
    with tool(d) as w:
        told = w.mark()
        d.virsh("blockcopy", "vda", copy, "--transient-job", "--wait", "--finish")
        d.virsh("backup-begin", xml)
        with Watched(d, w, "slow") as o:
            d.virsh("suspend")
        o.check("stop")
        wait_until(lambda: "None" in d.virsh("domjobinfo"), 30, "the backup's end")
        assert "Completed" in d.virsh("domjobinfo", "--completed")
        told = w.mark()
        d.virsh("resume")
        hooked_again(d, w, told)
        copy.unlink()
        (d.dir / "backup.qcow2").unlink()


@scenario()
def libvirt_migrate(d):
    """Live migration between two libvirtd and back, the tool on both ends: asked to leave before the first page is sent, back on
    the other side."""
    before, home, two = code(d), d.libvirtd, Libvirtd("two").start()
    try:
        with tool(d) as w:
            for behaviour, to, options in (("prompt", two, ["--live"]), ("hung", home, ["--live"]),
                                           ("prompt", two, ["--live", "--p2p"]),
                                           ("prompt", home, ["--live", "--postcopy", "--postcopy-after-precopy"])):
                with Watched(d, w, behaviour) as o:
                    d.migrate(to, *options).result()
                o.check("migrate", ended=True)
                told = o.told
                d.moved()
                hooked_again(d, w, told)
                set_deadline(d)
        same_memory(before, code(d), "after four migrations")
    finally:
        if d.libvirtd is not home:
            d.remove()
        two.stop()


@scenario()
def libvirt_migrate_abort(d):
    """virsh domjobabort: while the tool is waited for, and later. The guest runs on where it is, and is hooked again."""
    two = Libvirtd("two").start()
    try:
        with tool(d) as w:
            set_deadline(d, 8)
            w.signal(signal.SIGSTOP)
            told, mark = w.mark(), d.qmp.mark()
            job = d.migrate(two, "--live")
            d.qmp.event("KVMI_STATE_CHANGED", since=mark, timeout=40, state="unhooking")
            d.virsh("domjobabort")
            aborted(job)
            w.signal(signal.SIGCONT)
            hooked_again(d, w, told)

            told, mark = w.mark(), d.qmp.mark()
            job = d.migrate(two, "--live", "--bandwidth", "1")
            d.qmp.event("KVMI_UNHOOKED", since=mark, timeout=40)
            wait_until(lambda: "Data processed" in d.virsh("domjobinfo"), 20, "memory to be sent")
            assert info(d)["state"] != "hooked", "hooked while its memory is copied"
            d.virsh("domjobabort")
            aborted(job)
            hooked_again(d, w, told)
            assert d.state() == "running"
    finally:
        two.stop()


def aborted(job):
    try:
        job.result()
    except VirshError as e:
        assert "abort" in str(e) or "cancel" in str(e), e
    else:
        raise AssertionError("the migration was not aborted")


# --- kvmi libvirt -----------------------------------------------------------------------------------------------------


def kvmi_libvirt(*words, fails=False):
    r = subprocess.run([str(BUILD / "tools/kvmi"), "libvirt", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, timeout=90, env=dict(os.environ, LD_LIBRARY_PATH=str(BUILD / "lib")))
    print(f"$ kvmi libvirt {' '.join(words)}\n{r.stdout}", end="", flush=True)
    assert (r.returncode != 0) == fails, f"status {r.returncode}"
    return r.stdout


def kvmi_status(name):
    return json.loads(kvmi_libvirt("status", "--json", name))


def files():
    """What enable may leave on the host."""
    places = [Path("/etc/kvmi/keys"), Path("/etc/apparmor.d/local")]
    return {str(p): p.read_bytes() for place in places for p in place.rglob("*") if p.is_file()}


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
    assert kvmi_status(d.name)["state"] == "off"
    said = kvmi_libvirt("enable", d.name)
    assert "no restart is needed" in said and "/run/kvmi/guest.sock" in said, said
    assert "kvmi0" in dumpxml()
    assert os.stat("/etc/kvmi/keys/guest.key").st_mode & 0o777 == 0o400 and os.stat("/run/kvmi").st_mode & 0o7777 == 0o2750
    options = ["--socket", "/run/kvmi/guest.sock", "--key-file", "/etc/kvmi/keys/guest.key", "--mode", "0660"]
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
        told = w.mark()
        d.virsh("suspend")
        w.event("closed", since=told, reason="unhook")
        kvmi_libvirt("status")
        d.virsh("destroy")
        assert kvmi_status(d.name)["state"] == "shut-off"
        told = w.mark()
        d.boot()
        tool_at_work(w, told)
        told = w.mark()
        kvmi_libvirt("disable", d.name)
        w.event("closed", since=told, timeout=20)
    assert kvmi_status(d.name)["state"] == "off"
    assert dumpxml() == before, f"the XML is not what it was:\n{before}\n{dumpxml()}"
    assert files() == disk, f"left on the host: {set(files()) ^ set(disk)}"
    d.wait_alive()


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
    assert "does not run" in kvmi_libvirt("enable", d.name, "--vsock", "2:1", fails=True)
    assert "no domain" in kvmi_libvirt("enable", "nobody", fails=True)
    said = kvmi_libvirt("enable", d.name, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", "--socket", f"{d.dir}/a,b.sock", "--no-key")
    assert "when it is started" in said, said
    with Watch(*HOT, options=["--socket", f"{d.dir}/a,b.sock"]) as w:
        d.boot()
        w.event("hit", count=5, timeout=60)
    d.virsh("destroy")
    kvmi_libvirt("disable", d.name)
    assert d.virsh("dumpxml", "--inactive") == before
    d.remove()


def changed(d, old, new):
    path = d.dir / "changed.xml"
    text = d.virsh("dumpxml", "--inactive")
    assert old in text
    path.write_text(text.replace(old, new))
    return path


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
        kvmi_libvirt("--connect", libvirtd.uri, "enable", d.name)
        key = os.stat("/etc/kvmi/keys/confined.key")
        assert (key.st_uid, key.st_mode & 0o777) == (64055, 0o400), key
        with Watch(*HOT, options=["--socket", "/run/kvmi/confined.sock", "--mode", "0660", "--key-file", "/etc/kvmi/keys/confined.key"]) as w:
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
    and the secret, and nothing else; so QEMU itself, which is hooked and asks the tool to leave. A profile that is loaded is loaded anew.
    Debian's profiles include the local files in just this way."""
    d.define(kvmi=False)
    d.create_disk()
    d.virsh("start")
    uuid = d.virsh("domuuid").strip()
    etc = Path("/etc/apparmor.d")
    (etc / "libvirt").mkdir(exist_ok=True)
    profile = f"libvirt-{uuid}"
    made = {etc / "abstractions/libvirt-qemu": "  #include <abstractions/base>\n  /usr/** mrix,\n  /run/out/** r,\n"
                                               f"  {BUILD}/qemu/bin/* mrix,\n  /dev/kvm rw,\n  /run/confined/** rw,\n"
                                               "  #include <local/abstractions/libvirt-qemu>\n",
            etc / "libvirt" / profile: f"#include <tunables/global>\nprofile {profile} flags=(attach_disconnected) {{\n"
                                       "  #include <abstractions/libvirt-qemu>\n}\n",
            etc / "usr.sbin.libvirtd": "#include <tunables/global>\nprofile libvirtd /usr/sbin/libvirtd flags=(attach_disconnected) {\n"
                                       "  file,\n  #include <local/usr.sbin.libvirtd>\n}\n"}
    local = etc / "local/abstractions/libvirt-qemu"
    for path, text in made.items():
        path.write_text(text)
        (etc / "local" / path.relative_to(etc)).parent.mkdir(parents=True, exist_ok=True)
    local.write_text("  # somebody else's\n")
    (etc / "local/usr.sbin.libvirtd").write_text("")

    def confined(code):
        return subprocess.run(["aa-exec", "-p", profile, "--", "/usr/bin/python3", "-Ic", code], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)

    def may(what):
        r = confined(what)
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
                "socket,id=tool,path=/run/kvmi/guest.sock,reconnect-ms=100", "-object", "kvmi,id=kvmi0,chardev=tool,key=key"]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    connect = "import socket; socket.socket(socket.AF_UNIX).connect('{}')"
    subprocess.run(["apparmor_parser", "-r", str(etc / "libvirt" / profile)], check=True, timeout=60)
    try:
        key, other = Path("/etc/kvmi/apparmor.key"), Path("/etc/kvmi/other.key")
        kvmi_libvirt("enable", d.name, "--emulator", f"{BUILD}/qemu/bin/qemu-system-x86_64", "--key-file", str(key))
        other.write_text("another secret")
        rules = local.read_text()
        assert rules.startswith("  # somebody else's\n") and rules.count(uuid) == 3, rules
        assert "PUx" in (etc / "local/usr.sbin.libvirtd").read_text()
        with Watch(options=["--socket", "/run/kvmi/guest.sock", "--mode", "0660", "--key-file", str(key)]) as w:
            w.event("ready", timeout=60)
            assert may(connect.format("/run/kvmi/guest.sock")), "the domain's QEMU could not connect to its tool"
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
        kvmi_libvirt("disable", d.name)
        assert key.exists() and not may(f"open('{key}').read()"), "the rule outlives disable"
        with confined_qemu() as qemu:
            error = qemu.communicate(timeout=60)[1]
            print(error)
            assert qemu.returncode == 1 and str(key) in error and "Permission denied" in error, "the confined QEMU could read the secret"
        key.unlink()
        other.unlink()
        assert local.read_text() == "  # somebody else's\n"
    finally:
        subprocess.run(["apparmor_parser", "-R", str(etc / "libvirt" / profile)], timeout=60)
        for path in made:
            path.unlink()
        local.unlink()
    d.remove()


@scenario()
def libvirt_capabilities(d):
    """libvirt's probe of our QEMU: a domain's capabilities are what they should be, and the daemon complains of nothing."""
    mark = len(d.libvirtd.log())
    xml = d.libvirtd.virsh("domcapabilities", "--emulatorbin", f"{BUILD}/qemu/bin/qemu-system-x86_64", "--machine", "q35")
    assert f"<path>{BUILD}/qemu/bin/qemu-system-x86_64</path>" in xml and "<domain>kvm</domain>" in xml, xml
    assert "mode name='host-passthrough' supported='yes'" in xml, xml
    wrong = [line for line in d.libvirtd.log()[mark:].splitlines() if ": error :" in line or ": warning :" in line]
    assert not wrong, wrong


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
        assert "cannot acquire state change lock" not in libvirtd.log(), "a domain job was stuck: see libvirtd's log"
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
    if names[:1] == ["--libvirt"]:
        use_libvirt(names[1])
        names = names[2:]
    names = names or list(SCENARIOS)
    failed = []
    for name in names:
        start = time.monotonic()
        bad = run(name)
        print(f"{'FAIL' if bad else 'pass'} {name} {time.monotonic() - start:.1f} s", flush=True)
        failed += [name] if bad else []
    sys.exit(1 if failed else 0)
