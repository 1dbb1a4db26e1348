#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints in Python: shows the calls of functions of a Linux guest's kernel, until Ctrl-C; lets the VM be paused meanwhile.

    breakpoints.py /run/kvmi.sock System.map FUNCTION...
"""
import signal
import sys
import threading

import kvmi

COMMANDS = ["vm-get-info", "vm-control-events", "vm-read-physical", "vm-write-physical", "vm-pause-vcpu", "vcpu-control-events",
            "vcpu-get-registers", "vcpu-set-registers"]
LSTAR = 0xc0000082


def hit(hook, event):
    regs = event.state.regs
    print(f"vCPU {event.vcpu}: {hook.cookie} (rdi {regs.rdi:#x}, rsi {regs.rsi:#x}), {hook.text}", flush=True)


def problem(hook, kind, text):
    print(text, file=sys.stderr)


def add_all(hooks, vm):
    """Where they are in this boot of the guest: LSTAR has the address of the kernel's entry."""
    state, (entry,) = vm.vcpu_get_registers(0, msrs=[LSTAR])
    paging = kvmi.paging_of(state)
    paging.cr3 &= ~0x1fff           # the kernel's half, if the guest isolates page tables
    with kvmi.Walker(vm) as walker:
        for function in functions:
            gva = (symbols[function] - symbols["entry_SYSCALL_64"] + entry) % (1 << 64)
            hooks.add(gva, walker.translate(paging, gva).gpa, function)
    hooks.look_for_vcpus()


def watch(vm):
    """Until the VM is about to be paused. Whatever happens, nothing is left in the guest."""
    boot = bytes(vm.hello.uuid), vm.hello.start_time
    hooks = known.get(boot) or kvmi.Hooks(hit=hit, problem=problem)
    hooks.attach(vm)                # enables the events of those that it knows already
    try:
        if boot not in known:
            add_all(hooks, vm)
            known.clear()           # in another boot, memory has nothing of what was there
            known[boot] = hooks
        print(f"{hooks.plant().in_} breakpoints planted", flush=True)
        while not hooks.is_leaving() and not stop.is_set():
            if not hooks.dispatch():
                vm.wait(timeout=1)
        if hooks.is_asked_to_leave():
            print("the VM is about to be paused", flush=True)
    finally:
        if not hooks.is_lost():
            hooks.take_out()
        hooks.detach()


if len(sys.argv) < 4:
    sys.exit(__doc__)
path, system_map, *functions = sys.argv[1:]
symbols = {name: int(address, 16) for address, _, name in map(str.split, open(system_map))}
known = {}
# No KeyboardInterrupt: one that is raised as the library calls hit() would be lost
stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())
with kvmi.Listener(path) as listener:
    while not stop.is_set():
        try:
            vm = listener.accept(timeout=1)         # again, when the VM runs again
            if vm:
                with vm:
                    vm.connect(COMMANDS, ["unhook", "pause", "breakpoint"])
                    watch(vm)
        except kvmi.Error as e:
            print(e, file=sys.stderr)
