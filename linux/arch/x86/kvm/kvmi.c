// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: what is particular to x86
 *
 * All of it runs in the vCPU's thread, with the vCPU loaded, but for
 * kvmi_arch_vcpu_started().
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>

#include "../../../virt/kvm/introspection/kvmi_int.h"
#include "cpuid.h"
#include "kvm_cache_regs.h"
#include "x86.h"

/* In the order of struct kvm_regs */
static const u8 kvmi_gprs[] = {
	VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX,
	VCPU_REGS_RSI, VCPU_REGS_RDI, VCPU_REGS_RSP, VCPU_REGS_RBP,
	VCPU_REGS_R8, VCPU_REGS_R9, VCPU_REGS_R10, VCPU_REGS_R11,
	VCPU_REGS_R12, VCPU_REGS_R13, VCPU_REGS_R14, VCPU_REGS_R15,
};

bool kvmi_arch_vcpu_started(struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->arch.mp_state) != KVM_MP_STATE_UNINITIALIZED;
}

/*
 * KVM_GET_REGS and KVM_GET_SREGS load and put the vCPU, which is loaded
 * already.
 */
static void kvmi_get_regs(struct kvm_vcpu *vcpu, struct kvm_regs *regs)
{
	int i;

	BUILD_BUG_ON(offsetof(struct kvm_regs, rip) != 16 * sizeof(u64));

	for (i = 0; i < ARRAY_SIZE(kvmi_gprs); i++)
		((u64 *)regs)[i] = kvm_register_read_raw(vcpu, kvmi_gprs[i]);
	regs->rip = kvm_rip_read(vcpu);
	regs->rflags = kvm_get_rflags(vcpu);
}

static void kvmi_get_sregs(struct kvm_vcpu *vcpu, struct kvm_sregs *sregs)
{
	struct desc_ptr dt;

	kvm_get_segment(vcpu, &sregs->cs, VCPU_SREG_CS);
	kvm_get_segment(vcpu, &sregs->ds, VCPU_SREG_DS);
	kvm_get_segment(vcpu, &sregs->es, VCPU_SREG_ES);
	kvm_get_segment(vcpu, &sregs->fs, VCPU_SREG_FS);
	kvm_get_segment(vcpu, &sregs->gs, VCPU_SREG_GS);
	kvm_get_segment(vcpu, &sregs->ss, VCPU_SREG_SS);
	kvm_get_segment(vcpu, &sregs->tr, VCPU_SREG_TR);
	kvm_get_segment(vcpu, &sregs->ldt, VCPU_SREG_LDTR);

	kvm_x86_call(get_gdt)(vcpu, &dt);
	sregs->gdt.limit = dt.size;
	sregs->gdt.base = dt.address;
	kvm_x86_call(get_idt)(vcpu, &dt);
	sregs->idt.limit = dt.size;
	sregs->idt.base = dt.address;

	sregs->cr0 = kvm_read_cr0(vcpu);
	sregs->cr2 = vcpu->arch.cr2;
	sregs->cr3 = kvm_read_cr3(vcpu);
	sregs->cr4 = kvm_read_cr4(vcpu);
	sregs->cr8 = kvm_get_cr8(vcpu);
	sregs->efer = vcpu->arch.efer;
	sregs->apic_base = vcpu->arch.apic_base;

	if (vcpu->arch.interrupt.injected && !vcpu->arch.interrupt.soft)
		__set_bit(vcpu->arch.interrupt.nr,
			  (unsigned long *)sregs->interrupt_bitmap);
}

static u8 kvmi_get_mode(struct kvm_vcpu *vcpu, const struct kvm_sregs *sregs)
{
	if (is_long_mode(vcpu) && sregs->cs.l)
		return 8;
	if (is_protmode(vcpu) && sregs->cs.db)
		return 4;
	return 2;
}

static void kvmi_get_msr(struct kvm_vcpu *vcpu, u32 index, __u64 *data)
{
	u64 val = 0;

	__kvm_get_msr(vcpu, index, &val, true);
	*data = val;
}

/* The memory at arch is zeroed */
void kvmi_arch_get_event_state(struct kvm_vcpu *vcpu,
			       struct kvmi_vcpu_event_arch *arch)
{
	kvmi_get_regs(vcpu, &arch->regs);
	kvmi_get_sregs(vcpu, &arch->sregs);
	arch->mode = kvmi_get_mode(vcpu, &arch->sregs);

	arch->msrs.efer = vcpu->arch.efer;
	arch->msrs.pat = vcpu->arch.pat;
	kvmi_get_msr(vcpu, MSR_IA32_SYSENTER_CS, &arch->msrs.sysenter_cs);
	kvmi_get_msr(vcpu, MSR_IA32_SYSENTER_ESP, &arch->msrs.sysenter_esp);
	kvmi_get_msr(vcpu, MSR_IA32_SYSENTER_EIP, &arch->msrs.sysenter_eip);
	kvmi_get_msr(vcpu, MSR_STAR, &arch->msrs.star);
	kvmi_get_msr(vcpu, MSR_LSTAR, &arch->msrs.lstar);
	kvmi_get_msr(vcpu, MSR_CSTAR, &arch->msrs.cstar);
	kvmi_get_msr(vcpu, MSR_KERNEL_GS_BASE, &arch->msrs.shadow_gs);
}

/* Unlike KVM_SET_REGS, leaves a pending exception alone */
void kvmi_arch_set_regs(struct kvm_vcpu *vcpu, const struct kvm_regs *regs)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(kvmi_gprs); i++)
		kvm_register_write_raw(vcpu, kvmi_gprs[i],
				       ((const u64 *)regs)[i]);
	kvm_rip_write(vcpu, regs->rip);
	kvm_set_rflags(vcpu, regs->rflags | X86_EFLAGS_FIXED);
	/* A step that is under way goes on from there */
	vcpu->kvmi->arch.step.ip = kvm_get_linear_rip(vcpu);

	vcpu->arch.emulate_regs_need_sync_from_vcpu = true;
	vcpu->arch.emulate_regs_need_sync_to_vcpu = false;

	kvm_make_request(KVM_REQ_EVENT, vcpu);
}

/* Many a VMM sets after each pause what it has got: that is no move */
void __kvmi_regs_set(struct kvm_vcpu *vcpu, const struct kvm_regs *regs)
{
	struct kvm_regs old;

	kvmi_get_regs(vcpu, &old);
	if (memcmp(&old, regs, sizeof(old)))
		vcpu->kvmi->ev.moved = true;
	__kvmi_step_moved(vcpu, regs->rip);
}

/* At once, as the guest may write there too; returns 1 if it isn't old */
int kvmi_arch_replace_byte(u8 __user *ptr, u8 old, u8 new)
{
	return __try_cmpxchg_user(ptr, &old, new, efault);
}

bool kvmi_intercepts_bp(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;

	return kv && kv->arch.intercept_bp;
}
EXPORT_SYMBOL_GPL(kvmi_intercepts_bp);

/*
 * False for what a session that has ended has left behind, which the vCPU
 * removes when it next runs.
 */
bool kvmi_owns_bp(struct kvm_vcpu *vcpu)
{
	return kvmi_intercepts_bp(vcpu) && kvmi_vcpu_in_session(vcpu);
}

/* #BP is either the tool's or, for guest debugging, userspace's */
int kvmi_arch_control_bp(struct kvm_vcpu *vcpu, bool enable)
{
	if (enable && (vcpu->guest_debug & KVM_GUESTDBG_USE_SW_BP))
		return -KVM_EBUSY;

	if (vcpu->kvmi->arch.intercept_bp != enable) {
		vcpu->kvmi->arch.intercept_bp = enable;
		kvm_x86_call(update_exception_bitmap)(vcpu);
	}

	return 0;
}

/* The tool may have taken the INT3 out meanwhile, or KVM, for the tool */
static void kvmi_inject_bp(struct kvm_vcpu *vcpu)
{
	gpa_t gpa = kvmi_arch_translate_gva(vcpu, kvm_get_linear_rip(vcpu));
	u8 insn;

	if (gpa == INVALID_GPA ||
	    kvm_vcpu_read_guest(vcpu, gpa, &insn, sizeof(insn)) ||
	    insn == KVMI_BREAKPOINT_BYTE)
		kvm_queue_exception(vcpu, BP_VECTOR);
}

/* Returns true if the #BP has been dealt with, and the vCPU runs on */
bool kvmi_handle_bp(struct kvm_vcpu *vcpu, u8 insn_len)
{
	struct kvmi_vcpu_event_breakpoint data = { .insn_len = insn_len };

	if (!vcpu->kvmi || (vcpu->guest_debug & KVM_GUESTDBG_USE_SW_BP))
		return false;

	data.gpa = kvmi_arch_translate_gva(vcpu, kvm_get_linear_rip(vcpu));
	if (!kvmi_vcpu_raise(vcpu, KVMI_VCPU_EVENT_BREAKPOINT, &data,
			     sizeof(data))) {
		kvmi_journal_restore(vcpu->kvm->kvmi, false);
		kvmi_inject_bp(vcpu);
	}

	return true;
}
EXPORT_SYMBOL_GPL(kvmi_handle_bp);

static int kvmi_bp_done(struct kvm_vcpu *vcpu, bool abandoned)
{
	if (abandoned)
		kvmi_inject_bp(vcpu);
	else
		kvm_queue_exception(vcpu, BP_VECTOR);

	return 1;
}

/* Undoes what a session that has ended has left behind */
void kvmi_arch_cleanup(struct kvm_vcpu *vcpu)
{
	if (vcpu->kvmi->arch.intercept_bp)
		kvmi_arch_control_bp(vcpu, false);
	kvmi_arch_exits_cleanup(vcpu);
}

unsigned long kvmi_arch_linear_ip(struct kvm_vcpu *vcpu)
{
	return kvm_get_linear_rip(vcpu);
}

/*
 * The guest goes on with what it was doing when the event was raised.  rpl is
 * the data of the reply, or NULL if there will be no reply.  Returns as exit
 * handlers do.
 */
int kvmi_arch_event_done(struct kvm_vcpu *vcpu, const struct kvmi_event *ev,
			 const void *rpl)
{
	switch (ev->id) {
	case KVMI_VCPU_EVENT_BREAKPOINT:
		return kvmi_bp_done(vcpu, !rpl);
	case KVMI_VCPU_EVENT_PF:
		return kvmi_pf_done(vcpu, ev, !rpl);
	case KVMI_VCPU_EVENT_HYPERCALL:
	case KVMI_VCPU_EVENT_CR:
	case KVMI_VCPU_EVENT_XSETBV:
	case KVMI_VCPU_EVENT_DESCRIPTOR:
	case KVMI_VCPU_EVENT_MSR:
		return kvmi_arch_exits_event_done(vcpu, ev, rpl);
	default:
		return 1;
	}
}

u64 kvmi_arch_tsc_speed(struct kvm_vcpu *vcpu)
{
	if (!kvm_caps.has_tsc_control)
		return 0;

	return 1000ull * vcpu->arch.virtual_tsc_khz;
}

int kvmi_arch_get_registers(struct kvm_vcpu *vcpu,
			    const struct kvmi_vcpu_get_registers *req,
			    size_t req_size,
			    struct kvmi_vcpu_get_registers_reply *rpl,
			    size_t *rpl_size)
{
	size_t size = struct_size(rpl, msrs.entries, req->nmsrs);
	struct kvm_msr_entry *entry;
	u64 data;
	int i;

	if (req->padding1 || req->padding2)
		return -KVM_EINVAL;
	if (req_size < struct_size(req, msrs_idx, req->nmsrs))
		return -KVM_EINVAL;
	if (size > KVMI_MAX_REPLY_SIZE)
		return -KVM_EINVAL;

	memset(rpl, 0, size);
	kvmi_get_regs(vcpu, &rpl->regs);
	kvmi_get_sregs(vcpu, &rpl->sregs);
	rpl->mode = kvmi_get_mode(vcpu, &rpl->sregs);

	rpl->msrs.nmsrs = req->nmsrs;
	for (i = 0; i < req->nmsrs; i++) {
		if (kvm_get_msr(vcpu, req->msrs_idx[i], &data))
			return -KVM_EINVAL;
		entry = &rpl->msrs.entries[i];
		entry->index = req->msrs_idx[i];
		entry->data = data;
	}

	*rpl_size = size;
	return 0;
}

/*
 * What the tool sets is set as by the guest's own instructions, with the
 * checks that these make, but without an event.
 */

static int kvmi_set_cr(struct kvm_vcpu *vcpu, int cr,
		       const struct kvm_sregs *sregs)
{
	switch (cr) {
	case 0:
		return kvm_set_cr0(vcpu, sregs->cr0);
	case 3:
		return kvm_set_cr3(vcpu, sregs->cr3);
	default:
		return kvm_set_cr4(vcpu, sregs->cr4);
	}
}

/* All of them, or none */
static bool kvmi_set_crs(struct kvm_vcpu *vcpu, const struct kvm_sregs *sregs,
			 const struct kvm_sregs *old)
{
	static const int paging_on[] = { 4, 3, 0 }, paging_off[] = { 0, 3, 4 };
	const int *order = sregs->cr0 & X86_CR0_PG ? paging_on : paging_off;
	int i;

	for (i = 0; i < ARRAY_SIZE(paging_on); i++) {
		if (!kvmi_set_cr(vcpu, order[i], sregs))
			continue;
		while (i--)
			kvmi_set_cr(vcpu, order[i], old);
		return false;
	}

	return true;
}

static void kvmi_set_segments(struct kvm_vcpu *vcpu, struct kvm_sregs *sregs)
{
	struct desc_ptr dt;

	dt.size = sregs->idt.limit;
	dt.address = sregs->idt.base;
	kvm_x86_call(set_idt)(vcpu, &dt);
	dt.size = sregs->gdt.limit;
	dt.address = sregs->gdt.base;
	kvm_x86_call(set_gdt)(vcpu, &dt);

	kvm_set_segment(vcpu, &sregs->cs, VCPU_SREG_CS);
	kvm_set_segment(vcpu, &sregs->ds, VCPU_SREG_DS);
	kvm_set_segment(vcpu, &sregs->es, VCPU_SREG_ES);
	kvm_set_segment(vcpu, &sregs->fs, VCPU_SREG_FS);
	kvm_set_segment(vcpu, &sregs->gs, VCPU_SREG_GS);
	kvm_set_segment(vcpu, &sregs->ss, VCPU_SREG_SS);
	kvm_set_segment(vcpu, &sregs->tr, VCPU_SREG_TR);
	kvm_set_segment(vcpu, &sregs->ldt, VCPU_SREG_LDTR);
}

KVMI_ARCH_VCPU_CMD(set_sregs)
{
	const struct kvmi_vcpu_set_sregs *set = req;
	struct kvmi_event *ev = &vcpu->kvmi->ev;
	struct kvm_sregs old = {}, sregs = set->sregs;
	bool moved;

	if (vcpu->arch.guest_state_protected)
		return -KVM_EOPNOTSUPP;
	if (is_guest_mode(vcpu))
		return -KVM_EBUSY;

	kvmi_get_sregs(vcpu, &old);
	if (sregs.efer != old.efer || sregs.apic_base != old.apic_base ||
	    memcmp(sregs.interrupt_bitmap, old.interrupt_bitmap,
		   sizeof(old.interrupt_bitmap)))
		return -KVM_EINVAL;
	if (sregs.cs.l && (sregs.cs.db || !(sregs.efer & EFER_LME) ||
			   !(sregs.cr0 & X86_CR0_PG)))
		return -KVM_EINVAL;
	if (sregs.cr8 != old.cr8 && kvm_set_cr8(vcpu, sregs.cr8))
		return -KVM_EINVAL;
	if (!kvmi_set_crs(vcpu, &sregs, &old)) {
		kvm_set_cr8(vcpu, old.cr8);
		return -KVM_EINVAL;
	}

	moved = kvm_get_linear_rip(vcpu) != ev->ip;
	vcpu->arch.cr2 = sregs.cr2;
	kvmi_set_segments(vcpu, &sregs);
	/* CS may move an instruction, which is none that userspace has moved */
	if (!moved)
		ev->ip = kvm_get_linear_rip(vcpu);
	vcpu->kvmi->arch.step.ip = kvm_get_linear_rip(vcpu);

	kvm_make_request(KVM_REQ_EVENT, vcpu);
	return 0;
}

KVMI_ARCH_VCPU_CMD(set_msrs)
{
	const struct kvmi_vcpu_set_msrs *set = req;
	struct kvmi_vcpu_set_msrs_reply *reply = rpl;
	u32 i;

	if (set->padding || set->nmsrs > KVMI_MAX_MSG_SIZE ||
	    req_size < struct_size(set, entries, set->nmsrs))
		return -KVM_EINVAL;
	if (vcpu->arch.guest_state_protected)
		return -KVM_EOPNOTSUPP;
	if (is_guest_mode(vcpu))
		return -KVM_EBUSY;

	for (i = 0; i < set->nmsrs; i++) {
		if (set->entries[i].reserved)
			return -KVM_EINVAL;
	}
	for (i = 0; i < set->nmsrs; i++) {
		if (kvm_set_msr_with_filter(vcpu, set->entries[i].index,
					    set->entries[i].data))
			break;
	}

	reply->nmsrs = i;
	reply->padding = 0;
	*rpl_size = sizeof(*reply);
	return 0;
}

u64 kvmi_arch_translate_gva(struct kvm_vcpu *vcpu, u64 gva)
{
	return kvm_mmu_gva_to_gpa_system(vcpu, gva, NULL);
}
