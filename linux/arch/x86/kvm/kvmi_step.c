// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection on x86: single-stepping and injected exceptions
 *
 * All of it runs in the vCPU's thread, with the vCPU loaded, but for the
 * question whether a vCPU keeps APICv off.
 */
#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>
#include <asm/text-patching.h>

#include "../../../virt/kvm/introspection/kvmi_int.h"
#include "kvm_cache_regs.h"
#include "x86.h"

#define INTO_INSN_OPCODE 0xce

/*
 * Those that every CPU can deliver: an entry to the guest with a vector that
 * isn't an exception's fails.
 */
#define KVMI_EXCEPTIONS							\
	(BIT(DE_VECTOR) | BIT(DB_VECTOR) | BIT(BP_VECTOR) |		\
	 BIT(OF_VECTOR) | BIT(BR_VECTOR) | BIT(UD_VECTOR) |		\
	 BIT(NM_VECTOR) | BIT(DF_VECTOR) | BIT(TS_VECTOR) |		\
	 BIT(NP_VECTOR) | BIT(SS_VECTOR) | BIT(GP_VECTOR) |		\
	 BIT(PF_VECTOR) | BIT(MF_VECTOR) | BIT(AC_VECTOR) |		\
	 BIT(MC_VECTOR) | BIT(XM_VECTOR))

static bool kvmi_has_singlestep;

void kvmi_set_has_singlestep(bool has)
{
	kvmi_has_singlestep = has;
}
EXPORT_SYMBOL_GPL(kvmi_set_has_singlestep);

bool kvmi_arch_has_singlestep(void)
{
	return kvmi_has_singlestep;
}

/*
 * What the CPU injects by itself can't be held back, so it is not let from the
 * first step to the end of the session.  Not just for each step, as that is
 * work for all vCPUs.
 */
static void kvmi_step_inhibit_apicv(struct kvm_vcpu *vcpu, bool inhibit)
{
	struct kvm *kvm = vcpu->kvm;
	unsigned long i;

	if (vcpu->kvmi->arch.step.no_apicv == inhibit)
		return;

	WRITE_ONCE(vcpu->kvmi->arch.step.no_apicv, inhibit);
	if (!enable_apicv)
		return;

	down_write(&kvm->arch.apicv_update_lock);
	inhibit = false;
	kvm_for_each_vcpu(i, vcpu, kvm)
		if ((vcpu->guest_debug & KVM_GUESTDBG_BLOCKIRQ) ||
		    kvmi_step_inhibits_apicv(vcpu))
			inhibit = true;
	__kvm_set_or_clear_apicv_inhibit(kvm, APICV_INHIBIT_REASON_BLOCKIRQ,
					 inhibit);
	up_write(&kvm->arch.apicv_update_lock);
}

bool __kvmi_step_inhibits_apicv(struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->kvmi->arch.step.no_apicv);
}

/*
 * False for what a session that has ended has left behind, which the vCPU
 * removes when it next runs.
 */
bool __kvmi_step_owned(struct kvm_vcpu *vcpu)
{
	return vcpu->kvmi_steps && kvmi_vcpu_in_session(vcpu);
}

int kvmi_arch_control_singlestep(struct kvm_vcpu *vcpu, bool enable)
{
	struct kvmi_step *step = &vcpu->kvmi->arch.step;

	if (!kvmi_has_singlestep || vcpu->arch.guest_state_protected)
		return -KVM_EOPNOTSUPP;
	if (enable && (vcpu->guest_debug & KVM_GUESTDBG_SINGLESTEP))
		return -KVM_EBUSY;

	if (enable) {
		kvmi_step_inhibit_apicv(vcpu, true);
	} else {
		step->begun = false;
		step->halted = false;
		/* For the interrupts that have been held back */
		kvm_make_request(KVM_REQ_EVENT, vcpu);
	}
	vcpu->kvmi_steps = enable;
	/* An interrupt is what ends the HLT that it is in */
	if (enable && vcpu->arch.mp_state == KVM_MP_STATE_HALTED)
		step->halted = true;

	return 0;
}

/*
 * An interrupt would take the step to its handler, and from there the guest
 * back to where it was, so that interrupts at a high rate would leave it no
 * progress.  Only a halted guest gets one: nothing else ends a HLT.
 */
bool __kvmi_step_holds_interrupts(struct kvm_vcpu *vcpu)
{
	return __kvmi_step_owned(vcpu) && !vcpu->kvmi->arch.step.halted &&
	       !is_guest_mode(vcpu);
}

/* With interrupts disabled, so late that nothing but a step can come of it */
bool __kvmi_step_begin(struct kvm_vcpu *vcpu)
{
	struct kvmi_step *step = &vcpu->kvmi->arch.step;

	/* A guest's guest is none of the tool's business */
	if (!__kvmi_step_owned(vcpu) || is_guest_mode(vcpu) ||
	    vcpu->arch.guest_state_protected)
		return false;

	step->begun = true;
	step->done = false;
	step->moved = false;
	step->halted = false;
	step->ip = kvm_get_linear_rip(vcpu);
	step->halt_exits = vcpu->stat.halt_exits;

	/* Whatever the exit is, see before the next entry what has become */
	kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return true;
}
EXPORT_SYMBOL_GPL(__kvmi_step_begin);

/* The CPU has trapped after the step */
void __kvmi_step_done(struct kvm_vcpu *vcpu)
{
	vcpu->kvmi->arch.step.done = true;
}
EXPORT_SYMBOL_GPL(__kvmi_step_done);

/* Not the guest, but userspace or a reset is about to set RIP */
void __kvmi_step_moved(struct kvm_vcpu *vcpu, unsigned long ip)
{
	if (ip != kvm_rip_read(vcpu))
		vcpu->kvmi->arch.step.moved = true;
}

/*
 * When an instruction or the delivery of an exception has been completed, by
 * the CPU or by KVM, tells the tool.  What has been interrupted by something
 * between KVM and the CPU is begun again.
 */
void kvmi_arch_report_step(struct kvm_vcpu *vcpu)
{
	struct kvmi_step *step = &vcpu->kvmi->arch.step;
	struct kvmi_vcpu_event_singlestep data = {};
	bool done;

	if (!step->begun || is_guest_mode(vcpu))
		return;

	done = step->done;
	if (!done && kvm_get_linear_rip(vcpu) != step->ip)
		done = !kvm_event_needs_reinjection(vcpu);
	data.failed = !step->done && step->moved;

	step->begun = false;
	if (!done && !step->moved)
		return;
	if (!kvmi_vcpu_raise(vcpu, KVMI_VCPU_EVENT_SINGLESTEP, &data,
			     sizeof(data)))
		return;

	step->halted = vcpu->stat.halt_exits != step->halt_exits;
	if (step->halted)
		kvm_make_request(KVM_REQ_EVENT, vcpu);
}

int kvmi_arch_inject_exception(struct kvm_vcpu *vcpu,
			       const struct kvmi_vcpu_inject_exception *req)
{
	struct kvmi_exception *ex = &vcpu->kvmi->arch.exception;

	if (req->nr > 31 || !(KVMI_EXCEPTIONS & BIT(req->nr)))
		return -KVM_EINVAL;
	if (vcpu->arch.guest_state_protected)
		return -KVM_EOPNOTSUPP;
	if (ex->state != KVMI_EXCEPTION_NONE || vcpu->kvmi_steps ||
	    is_guest_mode(vcpu))
		return -KVM_EBUSY;

	ex->state = KVMI_EXCEPTION_WAITS;
	ex->nr = req->nr;
	ex->error_code = req->error_code;
	ex->address = req->address;

	/* Makes the vCPU look for what it has to inject */
	kvm_make_request(KVM_REQ_EVENT, vcpu);
	return 0;
}

static bool kvmi_is_next_insn(struct kvm_vcpu *vcpu, u8 opcode)
{
	struct x86_exception e;
	u8 insn;

	return kvm_read_guest_virt(vcpu, kvm_get_linear_rip(vcpu), &insn,
				   sizeof(insn), &e) == X86EMUL_CONTINUE &&
	       insn == opcode;
}

static void kvmi_queue_exception(struct kvm_vcpu *vcpu,
				 struct kvmi_exception *ex)
{
	struct x86_exception fault = {
		.vector = PF_VECTOR,
		.error_code_valid = true,
		.error_code = ex->error_code,
		.address = ex->address,
	};

	switch (ex->nr) {
	case PF_VECTOR:
		kvm_inject_page_fault(vcpu, &fault, false);
		return;
	case BP_VECTOR:
		ex->as_fault = !kvmi_is_next_insn(vcpu, INT3_INSN_OPCODE);
		break;
	case OF_VECTOR:
		ex->as_fault = !kvmi_is_next_insn(vcpu, INTO_INSN_OPCODE);
		break;
	}
	vcpu->arch.event_exit_inst_len = 1;

	if (x86_exception_has_error_code(ex->nr))
		kvm_queue_exception_e(vcpu, ex->nr, ex->error_code);
	else
		kvm_queue_exception(vcpu, ex->nr);
}

/*
 * If something else is about to be injected, the guest gets that instead, and
 * so does the tool.  But not twice: what it has been told of must be out of
 * the way first.
 */
void __kvmi_exception_queue(struct kvm_vcpu *vcpu)
{
	struct kvmi_exception *ex = &vcpu->kvmi->arch.exception;
	bool busy = kvm_is_exception_pending(vcpu) ||
		    kvm_event_needs_reinjection(vcpu);

	if (!busy) {
		ex->reported = false;
		ex->as_fault = false;
	}

	/* Userspace has taken away what was on its way */
	if (!busy && ex->state == KVMI_EXCEPTION_DUE)
		ex->state = KVMI_EXCEPTION_WAITS;

	if (ex->state != KVMI_EXCEPTION_WAITS || (busy && ex->reported) ||
	    is_guest_mode(vcpu) || !kvmi_vcpu_in_session(vcpu))
		return;

	ex->state = KVMI_EXCEPTION_DUE;
	if (!busy)
		kvmi_queue_exception(vcpu, ex);
}

/* Is one on its way?  The vCPU has nothing else to do first. */
bool kvmi_arch_exception_due(struct kvm_vcpu *vcpu)
{
	struct kvmi_exception *ex = &vcpu->kvmi->arch.exception;

	/*
	 * It is what ends a HLT.  At once: if userspace takes it away while the
	 * vCPU is still halted, nothing would make the vCPU look for it again,
	 * nor for the pauses that wait for its event.
	 */
	if (vcpu->arch.mp_state == KVM_MP_STATE_HALTED) {
		__kvmi_exception_queue(vcpu);
		if (ex->state == KVMI_EXCEPTION_DUE) {
			vcpu->arch.pv.pv_unhalted = false;
			vcpu->arch.mp_state = KVM_MP_STATE_RUNNABLE;
			vcpu->arch.apf.halted = false;
		}
	}

	return ex->state != KVMI_EXCEPTION_NONE;
}

void __kvmi_exception_injected(struct kvm_vcpu *vcpu, bool *immediate_exit)
{
	struct kvmi_exception *ex = &vcpu->kvmi->arch.exception;
	struct kvmi_vcpu_event_trap data = { .address = vcpu->arch.cr2 };

	/* Once it has been delivered, __kvmi_exception_queue() shall know */
	if (ex->reported)
		*immediate_exit = true;
	if (ex->state != KVMI_EXCEPTION_DUE)
		return;

	if (vcpu->arch.exception.injected) {
		data.nr = vcpu->arch.exception.vector;
		if (vcpu->arch.exception.has_error_code)
			data.error_code = vcpu->arch.exception.error_code;
	} else if (vcpu->arch.nmi_injected) {
		data.nr = NMI_VECTOR;
	} else if (vcpu->arch.interrupt.injected) {
		data.nr = vcpu->arch.interrupt.nr;
	} else {
		ex->state = KVMI_EXCEPTION_WAITS;
		return;
	}

	/* The entry is given up for the event; the injection is done again */
	ex->state = KVMI_EXCEPTION_NONE;
	ex->reported = true;
	kvmi_vcpu_raise(vcpu, KVMI_VCPU_EVENT_TRAP, &data, sizeof(data));
}

bool __kvmi_exception_as_fault(struct kvm_vcpu *vcpu)
{
	return vcpu->kvmi->arch.exception.as_fault;
}
EXPORT_SYMBOL_GPL(__kvmi_exception_as_fault);

/* What goes on when the tool is away would do nobody any good */
void kvmi_arch_session_over(struct kvm_vcpu *vcpu)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	arch->exception.state = KVMI_EXCEPTION_NONE;
	vcpu->kvmi_steps = false;
	arch->step.begun = false;
	arch->step.halted = false;
	kvmi_step_inhibit_apicv(vcpu, false);
	/* For the interrupts that have been held back */
	kvm_make_request(KVM_REQ_EVENT, vcpu);
}
