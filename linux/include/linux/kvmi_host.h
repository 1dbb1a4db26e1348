/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __KVMI_HOST_H
#define __KVMI_HOST_H

/* What the rest of KVM needs to know of the introspection subsystem */

#include <linux/kvm_host.h>

#ifdef CONFIG_KVM_INTROSPECTION

int kvmi_check_extension(void);
int kvmi_vm_ioctl(struct kvm *kvm, unsigned int ioctl, void __user *argp);
void kvmi_vm_destroy(struct kvm *kvm);
void kvmi_vcpu_destroy(struct kvm_vcpu *vcpu);

int kvmi_vcpu_handle_request(struct kvm_vcpu *vcpu);

bool kvmi_intercepts_bp(struct kvm_vcpu *vcpu);
bool kvmi_owns_bp(struct kvm_vcpu *vcpu);
bool kvmi_handle_bp(struct kvm_vcpu *vcpu, u8 insn_len);

static inline bool kvmi_vcpu_requested(struct kvm_vcpu *vcpu)
{
	return kvm_test_request(KVM_REQ_INTROSPECTION, vcpu);
}

#else

static inline int kvmi_check_extension(void)
{
	return 0;
}

static inline void kvmi_vm_destroy(struct kvm *kvm)
{
}

static inline void kvmi_vcpu_destroy(struct kvm_vcpu *vcpu)
{
}

static inline int kvmi_vcpu_handle_request(struct kvm_vcpu *vcpu)
{
	return 1;
}

static inline bool kvmi_intercepts_bp(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline bool kvmi_owns_bp(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline bool kvmi_handle_bp(struct kvm_vcpu *vcpu, u8 insn_len)
{
	return false;
}

static inline bool kvmi_vcpu_requested(struct kvm_vcpu *vcpu)
{
	return false;
}

#endif /* CONFIG_KVM_INTROSPECTION */

#endif
