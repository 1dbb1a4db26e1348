/*
 * KVM introspection: all that the kvmi object needs of KVM
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/kvm.h>
#include "system/kvm.h"
#include "kvmi-kvm.h"

int kvmi_kvm_ioctl(unsigned long request, void *arg)
{
    return kvm_vm_ioctl(kvm_state, request, arg);
}

int kvmi_kvm_version(void)
{
    return kvm_vm_check_extension(kvm_state, KVM_CAP_INTROSPECTION);
}
