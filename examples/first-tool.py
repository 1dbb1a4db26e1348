#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first tool once more, in Python: shows the next ten changes of the address space, and who is running.

    first-tool.py /run/kvmi.sock
"""
import sys

import kvmi

COMMANDS = ["vm-get-info", "vm-control-events", "vm-read-physical", "vcpu-control-events", "vcpu-control-cr", "vcpu-translate-gva"]

if len(sys.argv) != 2:
    sys.exit(__doc__)
with kvmi.Listener(sys.argv[1]) as listener, listener.accept() as vm:      # QEMU connects to us
    vm.connect(COMMANDS, ["unhook", "cr"])
    vm.control_events(kvmi.EV_UNHOOK, True)
    for vcpu in range(vm.get_vcpu_count()):
        vm.vcpu_control_events(vcpu, kvmi.EV_CR, True)
        vm.vcpu_control_cr(vcpu, 3, True)
    left = 10
    for event in vm.events(timeout=10):
        if event.id == kvmi.EV_UNHOOK:
            break               # nothing to take out: just go
        code = vm.vcpu_read_virtual(event.vcpu, event.state.regs.rip, 3).hex()
        event.reply()
        print(f"vCPU {event.vcpu}: CR3 {event.cr.old_value:#x} -> {event.cr.new_value:#x} by {code} at {event.state.regs.rip:#x}", flush=True)
        left -= 1
        if not left:
            break
# the connection is closed: KVM undoes what was asked for
