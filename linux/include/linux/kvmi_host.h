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

void kvmi_set_has_singlestep(bool has);
bool __kvmi_step_begin(struct kvm_vcpu *vcpu);
void __kvmi_step_done(struct kvm_vcpu *vcpu);
void __kvmi_step_moved(struct kvm_vcpu *vcpu, unsigned long ip);
bool __kvmi_step_owned(struct kvm_vcpu *vcpu);
bool __kvmi_step_holds_interrupts(struct kvm_vcpu *vcpu);
bool __kvmi_step_inhibits_apicv(struct kvm_vcpu *vcpu);
void __kvmi_exception_queue(struct kvm_vcpu *vcpu);
void __kvmi_exception_injected(struct kvm_vcpu *vcpu, bool *immediate_exit);
bool __kvmi_exception_as_fault(struct kvm_vcpu *vcpu);

/* The guest is entered next; shall it only do one step? */
static inline bool kvmi_step_begin(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi) && __kvmi_step_begin(vcpu);
}

static inline void kvmi_step_done(struct kvm_vcpu *vcpu)
{
	if (unlikely(vcpu->kvmi))
		__kvmi_step_done(vcpu);
}

static inline void kvmi_step_moved(struct kvm_vcpu *vcpu, unsigned long ip)
{
	if (unlikely(vcpu->kvmi))
		__kvmi_step_moved(vcpu, ip);
}

static inline bool kvmi_step_owned(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi) && __kvmi_step_owned(vcpu);
}

static inline bool kvmi_step_holds_interrupts(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi) && __kvmi_step_holds_interrupts(vcpu);
}

static inline bool kvmi_step_inhibits_apicv(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi) && __kvmi_step_inhibits_apicv(vcpu);
}

/* Before and after KVM chooses what to inject */
static inline void kvmi_exception_queue(struct kvm_vcpu *vcpu)
{
	if (unlikely(vcpu->kvmi))
		__kvmi_exception_queue(vcpu);
}

static inline void kvmi_exception_injected(struct kvm_vcpu *vcpu,
					   bool *immediate_exit)
{
	if (unlikely(vcpu->kvmi))
		__kvmi_exception_injected(vcpu, immediate_exit);
}

/* A #BP or #OF that leaves RIP alone, as no instruction has made it */
static inline bool kvmi_exception_as_fault(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi) && __kvmi_exception_as_fault(vcpu);
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

static inline void kvmi_set_has_singlestep(bool has)
{
}

static inline bool kvmi_step_begin(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline void kvmi_step_done(struct kvm_vcpu *vcpu)
{
}

static inline void kvmi_step_moved(struct kvm_vcpu *vcpu, unsigned long ip)
{
}

static inline bool kvmi_step_owned(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline bool kvmi_step_holds_interrupts(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline bool kvmi_step_inhibits_apicv(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline void kvmi_exception_queue(struct kvm_vcpu *vcpu)
{
}

static inline void kvmi_exception_injected(struct kvm_vcpu *vcpu,
					   bool *immediate_exit)
{
}

static inline bool kvmi_exception_as_fault(struct kvm_vcpu *vcpu)
{
	return false;
}

#endif /* CONFIG_KVM_INTROSPECTION */

#endif
