#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Scenarios with the real libvirtd: run in the AMD host, one a process, by tests/test_libvirt.py; by hand:

    tests/host/run amd -- tests/host/libvirt_scenarios.py NAME…

They share libvirtd and one domain, as those of scenarios.py share a guest.
"""
import sys
import time
import signal
import traceback
from pathlib import Path

from inside import HOT, Guest, Late, Watch, wait_until
from scenarios import breakpoint_offsets, code, expect, hook, info, same_memory, wait_state
from virsh import Domain, Libvirtd, VirshError

SCENARIOS = {}


def scenario(timeout=180):
    def add(function):
        function.timeout = timeout
        SCENARIOS[function.__name__] = function
        return function
    return add


@scenario()
def libvirt_suspend_resume(d):
    before = code(d)
    with hook(d, *HOT) as w:
        mark, told = d.qmp.mark(), w.mark()
        start = time.monotonic()
        d.virsh("suspend")
        took = time.monotonic() - start
        assert d.state() == "paused"
        expect("clean", d.qmp.event("KVMI_UNHOOKED", since=mark)["data"])
        same_memory(before, code(d), "suspended")
        w.event("closed", since=told, reason="unhook")
        told = w.mark()
        d.virsh("resume")
        w.event("hit", since=told, count=10)
        print(f"suspended in {took:.1f} s")
        w.signal(signal.SIGINT)
        w.finish()
    d.wait_alive()


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
        if marker.exists() and d.alive():
            marker.unlink()
        else:
            d.start()
        function(d)
        marker.touch()
    except BaseException as e:
        traceback.print_exc()
        print("--- libvirtd's log, last lines ---")
        print("\n".join(libvirtd.log().splitlines()[-30:]))
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
    names = sys.argv[1:] or list(SCENARIOS)
    failed = []
    for name in names:
        start = time.monotonic()
        bad = run(name)
        print(f"{'FAIL' if bad else 'pass'} {name} {time.monotonic() - start:.1f} s", flush=True)
        failed += [name] if bad else []
    sys.exit(1 if failed else 0)
