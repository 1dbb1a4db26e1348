/*
 * KVM introspection: all that the kvmi object needs of KVM
 *
 * Apart from the object, for the unit test to put something else here.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TARGET_I386_KVM_KVMI_KVM_H
#define TARGET_I386_KVM_KVMI_KVM_H

/* On the VM.  0, or a negative errno. */
int kvmi_kvm_ioctl(unsigned long request, void *arg);

/* The version of KVMI; 0 if there is none or if it is off */
int kvmi_kvm_version(void);

#endif
