// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection on AMD: single-stepping
 *
 * With RFLAGS.TF, which is the guest's, too.  So it is only set while the guest
 * runs: nothing outside of svm_vcpu_run() knows of it.  What the guest does
 * with RFLAGS in one instruction is intercepted:
 *
 *  - PUSHF and POPF are emulated.
 *  - Exceptions and INT n would save TF.  They are made KVM's, which injects
 *    them without TF.  The step then ends when the event has been delivered,
 *    before the handler's first instruction, with an exit that is forced.
 *  - SYSCALL would save TF and drop it.  EFER.SCE is cleared, so that it is a
 *    #UD, on which it is emulated.
 *  - SYSRET traps if TF is set in what it loads.  It is a #UD as well, and then
 *    done by the CPU with TF in R11.
 *  - IRET loads TF and traps if TF was set before.  It is intercepted, and
 *    then done by the CPU, after which TF is as the guest wants it.
 *
 * After MOV SS and POP SS the CPU doesn't trap, but after what follows.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>
#include <asm/debugreg.h>
#include <asm/insn.h>

#include "kvm_cache_regs.h"
#include "svm.h"
#include "x86.h"

/* Those that the guest may raise, but #DF: KVM makes that of two others */
#define STEP_EXCEPTIONS							\
	(BIT(DE_VECTOR) | BIT(DB_VECTOR) | BIT(BP_VECTOR) |		\
	 BIT(OF_VECTOR) | BIT(BR_VECTOR) | BIT(UD_VECTOR) |		\
	 BIT(NM_VECTOR) | BIT(TS_VECTOR) | BIT(NP_VECTOR) |		\
	 BIT(SS_VECTOR) | BIT(GP_VECTOR) | BIT(PF_VECTOR) |		\
	 BIT(MF_VECTOR) | BIT(AC_VECTOR) | BIT(XM_VECTOR))

/* The last thing before VMRUN but for what doesn't concern TF */
void __svm_step_begin(struct kvm_vcpu *vcpu, bool *force_immediate_exit)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct vmcb_control_area *control = &svm->vmcb->control;
	struct vmcb_save_area *save = &svm->vmcb->save;
	struct svm_kvmi_step *step = &svm->step;
	unsigned long exceptions = STEP_EXCEPTIONS;
	int i;

	/* Somebody has moved the vCPU away from it */
	if (step->rip != save->rip) {
		step->iret = false;
		step->sysret = false;
	}

	step->armed = true;
	/* The CPU would deliver it by itself, and save TF */
	step->vnmi = control->int_ctl & V_NMI_PENDING_MASK;
	control->int_ctl &= ~V_NMI_PENDING_MASK;
	step->trap = !(control->event_inj & SVM_EVTINJ_VALID);
	step->rip = save->rip;
	step->tf = save->rflags & X86_EFLAGS_TF;
	step->guest_tf = kvm_get_rflags(vcpu) & X86_EFLAGS_TF;
	step->r11_tf = vcpu->arch.regs[VCPU_REGS_R11] & X86_EFLAGS_TF;
	step->dr6_bs = vcpu->arch.dr6 & DR6_BS;
	step->efer = save->efer;
	step->dbgctl = save->dbgctl;
	memcpy(step->intercepts, control->intercepts,
	       sizeof(step->intercepts));

	for_each_set_bit(i, &exceptions, 32)
		vmcb_set_intercept(control, INTERCEPT_EXCEPTION_OFFSET + i);
	vmcb_mark_dirty(svm->vmcb, VMCB_INTERCEPTS);

	/* Delivered as without a step, and then a forced exit is the trap */
	if (!step->trap) {
		*force_immediate_exit = true;
		return;
	}

	save->rflags |= X86_EFLAGS_TF;

	vmcb_set_intercept(control, INTERCEPT_PUSHF);
	vmcb_set_intercept(control, INTERCEPT_POPF);
	vmcb_set_intercept(control, INTERCEPT_INTn);
	vmcb_set_intercept(control, INTERCEPT_ICEBP);
	if (step->iret)
		vmcb_clr_intercept(control, INTERCEPT_IRET);
	else
		vmcb_set_intercept(control, INTERCEPT_IRET);

	if (step->sysret)
		vcpu->arch.regs[VCPU_REGS_R11] |= X86_EFLAGS_TF;
	else
		save->efer &= ~EFER_SCE;
	vmcb_mark_dirty(svm->vmcb, VMCB_CR);

	/* TF means branches only with BTF */
	save->dbgctl &= ~DEBUGCTLMSR_BTF;
	vmcb_mark_dirty(svm->vmcb, VMCB_LBR);
}

/* Right after the exit from a step, and the one after that */
void __svm_step_end(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct vmcb_control_area *control = &svm->vmcb->control;
	struct vmcb_save_area *save = &svm->vmcb->save;
	struct svm_kvmi_step *step = &svm->step;
	bool moved = save->rip != step->rip;

	step->ended = step->armed;
	step->sysret_tried = step->armed && step->sysret;
	if (!step->armed) {
		step->iret = false;
		step->sysret = false;
		return;
	}

	step->armed = false;
	control->int_ctl |= step->vnmi;
	memcpy(control->intercepts, step->intercepts,
	       sizeof(step->intercepts));
	vmcb_mark_dirty(svm->vmcb, VMCB_INTERCEPTS);
	if (!step->trap)
		return;

	if (step->iret && moved) {
		/* TF is what the guest has loaded */
	} else if (step->sysret && moved) {
		if (!step->r11_tf)
			save->rflags &= ~X86_EFLAGS_TF;
	} else {
		save->rflags &= ~X86_EFLAGS_TF;
		save->rflags |= step->tf;
	}

	if (step->sysret && !step->r11_tf)
		vcpu->arch.regs[VCPU_REGS_R11] &= ~X86_EFLAGS_TF;
	step->iret = false;
	step->sysret = false;

	save->efer |= step->efer & EFER_SCE;
	vmcb_mark_dirty(svm->vmcb, VMCB_CR);
	save->dbgctl |= step->dbgctl & DEBUGCTLMSR_BTF;
	vmcb_mark_dirty(svm->vmcb, VMCB_LBR);
}

static bool svm_step_was_intercepted(struct vcpu_svm *svm, int bit)
{
	return test_bit(bit, (unsigned long *)svm->step.intercepts);
}

/*
 * The bytes that can be executed at RIP; the rest is zero.  That is more than
 * can be read: protection keys are for data only.
 */
static void svm_step_fetch(struct kvm_vcpu *vcpu, u8 *insn, int size)
{
	unsigned long ip = kvm_get_linear_rip(vcpu);
	struct kvm_mmu *mmu = vcpu->arch.walk_mmu;
	u64 access = PFERR_FETCH_MASK;
	struct x86_exception e;
	gpa_t gpa;
	int i;

	if (to_svm(vcpu)->vmcb->save.cpl == 3)
		access |= PFERR_USER_MASK;

	memset(insn, 0, size);
	for (i = 0; i < size; i++) {
		gpa = mmu->gva_to_gpa(vcpu, mmu, ip + i, access, &e);
		if (gpa == INVALID_GPA ||
		    kvm_vcpu_read_guest(vcpu, gpa, insn + i, 1))
			return;
	}
}

/* Returns the handler's number if somebody else has to know of the #DB */
static int svm_step_db(struct kvm_vcpu *vcpu)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct svm_kvmi_step *step = &svm->step;
	u64 payload = svm->vmcb->save.dr6 ^ DR6_ACTIVE_LOW;

	if (step->trap && (payload & DR6_BS)) {
		kvmi_step_done(vcpu);
		if (!step->guest_tf) {
			payload &= ~DR6_BS;
			if (!step->dr6_bs)
				vcpu->arch.dr6 &= ~DR6_BS;
			svm->vmcb->save.dr6 = payload ^ DR6_ACTIVE_LOW;
			vmcb_mark_dirty(svm->vmcb, VMCB_DR);
		}
	}

	if (payload)
		return svm_invoke_exit_handler(vcpu, SVM_EXIT_EXCP_BASE +
						     DB_VECTOR);

	if (svm->nmi_singlestep) {
		disable_nmi_singlestep(svm);
		kvm_make_request(KVM_REQ_EVENT, vcpu);
	}
	return 1;
}

/* But not LOCK, with which a SYSRET is undefined */
static bool svm_step_is_prefix(struct kvm_vcpu *vcpu, u8 byte)
{
	switch (byte) {
	case 0x26:
	case 0x2e:
	case 0x36:
	case 0x3e:
	case 0x64 ... 0x67:
	case 0xf2:
	case 0xf3:
		return true;
	case 0x40 ... 0x4f:
		return is_64_bit_mode(vcpu);
	default:
		return false;
	}
}

static bool svm_step_is_sysret(struct kvm_vcpu *vcpu)
{
	u8 insn[MAX_INSN_SIZE];
	int i;

	svm_step_fetch(vcpu, insn, sizeof(insn));
	for (i = 0; i < sizeof(insn) - 2; i++) {
		if (!svm_step_is_prefix(vcpu, insn[i]))
			break;
	}

	return insn[i] == 0x0f && insn[i + 1] == 0x07;
}

static int svm_step_exception(struct kvm_vcpu *vcpu, int vector)
{
	struct vcpu_svm *svm = to_svm(vcpu);
	struct vmcb_control_area *control = &svm->vmcb->control;

	if (vector == DB_VECTOR)
		return svm_step_db(vcpu);

	/* If it is undefined with EFER.SCE, too, it is the guest's #UD */
	if (vector == UD_VECTOR && (svm->step.efer & EFER_SCE) &&
	    svm->step.trap && !svm->step.sysret_tried &&
	    svm_step_is_sysret(vcpu)) {
		svm->step.sysret = true;
		svm->step.rip = kvm_rip_read(vcpu);
		return 1;
	}

	if (svm_step_was_intercepted(svm, INTERCEPT_EXCEPTION_OFFSET +
					  vector) ||
	    (vector == PF_VECTOR && vcpu->arch.apf.host_apf_flags))
		return svm_invoke_exit_handler(vcpu, SVM_EXIT_EXCP_BASE +
						     vector);

	if (vector == PF_VECTOR)
		vcpu->arch.cr2 = control->exit_info_2;
	if (x86_exception_has_error_code(vector))
		kvm_queue_exception_e(vcpu, vector, control->exit_info_1);
	else
		kvm_queue_exception(vcpu, vector);
	return 1;
}

static int svm_step_int(struct kvm_vcpu *vcpu)
{
	u8 insn[MAX_INSN_SIZE];
	int i;

	svm_step_fetch(vcpu, insn, sizeof(insn));
	for (i = 0; i < sizeof(insn) - 1; i++) {
		switch (insn[i]) {
		case 0xcc:
			return svm_step_exception(vcpu, BP_VECTOR);
		case 0xcd:
			kvm_queue_interrupt(vcpu, insn[i + 1], true);
			kvm_make_request(KVM_REQ_EVENT, vcpu);
			return 1;
		case 0xce:
			return svm_step_exception(vcpu, OF_VECTOR);
		}
	}

	/* The guest has changed it in the meantime: see what it is now */
	return 1;
}

int __svm_step_handle_exit(struct kvm_vcpu *vcpu, u32 exit_code)
{
	struct vcpu_svm *svm = to_svm(vcpu);

	switch (exit_code) {
	case SVM_EXIT_EXCP_BASE ... SVM_EXIT_EXCP_BASE + 31:
		return svm_step_exception(vcpu, exit_code - SVM_EXIT_EXCP_BASE);
	case SVM_EXIT_PUSHF:
	case SVM_EXIT_POPF:
		return kvm_emulate_instruction(vcpu, 0);
	case SVM_EXIT_SWINT:
		return svm_step_int(vcpu);
	case SVM_EXIT_ICEBP:
		kvm_queue_exception(vcpu, DB_VECTOR);
		return kvm_skip_emulated_instruction(vcpu);
	case SVM_EXIT_IRET:
		svm->step.iret = true;
		svm->step.rip = kvm_rip_read(vcpu);
		if (!svm_step_was_intercepted(svm, INTERCEPT_IRET))
			return 1;
		break;
	}

	return svm_invoke_exit_handler(vcpu, exit_code);
}
