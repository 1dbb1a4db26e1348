/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __SVM_KVMI_STEP_H
#define __SVM_KVMI_STEP_H

/* Single-stepping for introspection */

#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>
#include <asm/svm.h>

int svm_invoke_exit_handler(struct kvm_vcpu *vcpu, u64 exit_code);

#ifdef CONFIG_KVM_INTROSPECTION

struct svm_kvmi_step {
	bool armed;		/* the guest is entered to do a step */
	bool ended;		/* the exit is from there */
	bool trap;		/* TF is set for it */
	bool iret;		/* the next instruction is an IRET */
	bool sysret;		/* or a SYSRET */
	bool sysret_tried;	/* the exit is from there */

	/* As it was before the entry */
	u64 rip;
	u64 tf;
	u64 guest_tf;		/* what the guest knows of it */
	u64 r11_tf;
	u64 dr6_bs;
	u64 efer;
	u64 dbgctl;
	u32 vnmi;		/* V_NMI_PENDING, held back */
	u32 intercepts[MAX_INTERCEPT];
};

void __svm_step_begin(struct kvm_vcpu *vcpu, bool *force_immediate_exit);
void __svm_step_end(struct kvm_vcpu *vcpu);
int __svm_step_handle_exit(struct kvm_vcpu *vcpu, u32 exit_code);

static inline void svm_step_begin(struct kvm_vcpu *vcpu,
				  bool *force_immediate_exit)
{
	if (kvmi_step_begin(vcpu))
		__svm_step_begin(vcpu, force_immediate_exit);
}

static inline void svm_step_end(struct kvm_vcpu *vcpu,
				const struct svm_kvmi_step *step)
{
	if (unlikely(step->armed || step->ended))
		__svm_step_end(vcpu);
}

static inline int svm_step_handle_exit(struct kvm_vcpu *vcpu,
				       const struct svm_kvmi_step *step,
				       u32 exit_code)
{
	if (unlikely(step->ended))
		return __svm_step_handle_exit(vcpu, exit_code);

	return svm_invoke_exit_handler(vcpu, exit_code);
}

#else

struct svm_kvmi_step {
};

static inline void svm_step_begin(struct kvm_vcpu *vcpu,
				  bool *force_immediate_exit)
{
}

static inline void svm_step_end(struct kvm_vcpu *vcpu,
				const struct svm_kvmi_step *step)
{
}

static inline int svm_step_handle_exit(struct kvm_vcpu *vcpu,
				       const struct svm_kvmi_step *step,
				       u32 exit_code)
{
	return svm_invoke_exit_handler(vcpu, exit_code);
}

#endif /* CONFIG_KVM_INTROSPECTION */

#endif
