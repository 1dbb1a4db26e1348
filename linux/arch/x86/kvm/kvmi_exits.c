// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection on x86: the instructions that it intercepts, and the
 * state that they are about
 *
 * An instruction that raises an event is not done by the exit handler, nor by
 * the emulator, but when the event is answered, with no entry of the guest in
 * between.  Nothing is raised for nested guests, nor if KVM doesn't see the
 * guest's registers.
 */
#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>
#include <linux/slab.h>
#include <asm/fpu/api.h>
#include <asm/fpu/xcr.h>
#include <asm/mtrr.h>

#include "../../../virt/kvm/introspection/kvmi_int.h"
#include "cpuid.h"
#include "kvm_cache_regs.h"
#include "kvm_emulate.h"
#include "x86.h"

/* Commands */

KVMI_ARCH_VCPU_CMD(get_cpuid)
{
	const struct kvmi_vcpu_get_cpuid *get = req;
	struct kvmi_vcpu_get_cpuid_reply *cpuid = rpl;
	struct kvm_cpuid_entry2 *entry;

	entry = kvm_find_cpuid_entry_index(vcpu, get->function, get->index);
	if (!entry)
		return -KVM_ENOENT;

	cpuid->eax = entry->eax;
	cpuid->ebx = entry->ebx;
	cpuid->ecx = entry->ecx;
	cpuid->edx = entry->edx;

	*rpl_size = sizeof(*cpuid);
	return 0;
}

KVMI_ARCH_VCPU_CMD(get_xcr)
{
	const struct kvmi_vcpu_get_xcr *get = req;
	struct kvmi_vcpu_get_xcr_reply *xcr = rpl;

	if (memchr_inv(get->padding, 0, sizeof(get->padding)))
		return -KVM_EINVAL;
	if (get->xcr != XCR_XFEATURE_ENABLED_MASK)
		return -KVM_EINVAL;

	xcr->value = vcpu->arch.xcr0;

	*rpl_size = sizeof(*xcr);
	return 0;
}

/*
 * False if there is no such thing as the guest's FPU state in the layout of
 * struct kvm_xsave: it is encrypted, or too large.
 */
static bool kvmi_has_xsave(struct kvm_vcpu *vcpu)
{
	return !fpstate_is_confidential(&vcpu->arch.guest_fpu) &&
	       vcpu->arch.guest_fpu.uabi_size <= sizeof(struct kvm_xsave);
}

/*
 * In KVM_RUN the guest's FPU is the thread's, and some of it may be in the
 * registers.
 */
static void kvmi_put_guest_fpu(struct kvm_vcpu *vcpu)
{
	fpu_swap_kvm_fpstate(&vcpu->arch.guest_fpu, false);
}

static void kvmi_load_guest_fpu(struct kvm_vcpu *vcpu)
{
	fpu_swap_kvm_fpstate(&vcpu->arch.guest_fpu, true);
}

KVMI_ARCH_VCPU_CMD(get_xsave)
{
	struct kvmi_vcpu_get_xsave_reply *get = rpl;

	if (!kvmi_has_xsave(vcpu))
		return -KVM_EOPNOTSUPP;

	memset(get, 0, sizeof(*get));
	kvmi_put_guest_fpu(vcpu);
	fpu_copy_guest_fpstate_to_uabi(&vcpu->arch.guest_fpu,
				       get->xsave.region,
				       sizeof(get->xsave.region),
				       vcpu->arch.guest_supported_xcr0 |
				       XFEATURE_MASK_FPSSE,
				       vcpu->arch.pkru);
	kvmi_load_guest_fpu(vcpu);

	*rpl_size = sizeof(*get);
	return 0;
}

KVMI_ARCH_VCPU_CMD(set_xsave)
{
	union fpregs_state *xstate;
	int err;

	if (!kvmi_has_xsave(vcpu))
		return -KVM_EOPNOTSUPP;

	xstate = kmemdup(req, sizeof(struct kvm_xsave), GFP_KERNEL_ACCOUNT);
	if (!xstate)
		return -KVM_ENOMEM;

	kvmi_put_guest_fpu(vcpu);
	/* As KVM_SET_XSAVE does it */
	xstate->xsave.header.xfeatures &= ~vcpu->arch.guest_fpu.fpstate->xfd;
	err = fpu_copy_uabi_to_guest_fpstate(&vcpu->arch.guest_fpu, xstate,
					     kvm_caps.supported_xcr0,
					     &vcpu->arch.pkru);
	kvmi_load_guest_fpu(vcpu);

	kfree(xstate);
	return err ? -KVM_EINVAL : 0;
}

#define KVMI_MTRR_FIXED_ENABLED BIT(10)
#define KVMI_MTRR_ENABLED       BIT(11)
#define KVMI_MTRR_VALID         BIT(11)

static bool kvmi_mtrr_fixed(const struct kvm_mtrr *mtrr, u64 gpa, u8 *type)
{
	const u64 *regs;
	unsigned int i;

	if (gpa < 0x80000) {
		regs = &mtrr->fixed_64k;
		i = gpa / 0x10000;
	} else if (gpa < 0xc0000) {
		regs = mtrr->fixed_16k;
		i = (gpa - 0x80000) / 0x4000;
	} else if (gpa < 0x100000) {
		regs = mtrr->fixed_4k;
		i = (gpa - 0xc0000) / 0x1000;
	} else {
		return false;
	}

	*type = regs[i / 8] >> (i % 8 * 8);
	return true;
}

static u8 kvmi_mtrr_type(struct kvm_vcpu *vcpu, u64 gpa)
{
	const struct kvm_mtrr *mtrr = &vcpu->arch.mtrr_state;
	u64 base, mask;
	int type = -1;
	u8 t;
	int i;

	if (!guest_cpuid_has(vcpu, X86_FEATURE_MTRR))
		return MTRR_TYPE_WRBACK;
	if (!(mtrr->deftype & KVMI_MTRR_ENABLED))
		return MTRR_TYPE_UNCACHABLE;
	if ((mtrr->deftype & KVMI_MTRR_FIXED_ENABLED) &&
	    kvmi_mtrr_fixed(mtrr, gpa, &t))
		return t;

	for (i = 0; i < KVM_NR_VAR_MTRR; i++) {
		base = mtrr->var[2 * i];
		mask = mtrr->var[2 * i + 1];
		if (!(mask & KVMI_MTRR_VALID) ||
		    (gpa ^ base) & mask & PAGE_MASK)
			continue;

		t = base;
		/* UC over all, WT over WB; the rest is undefined: UC */
		if (type < 0 || type == t)
			type = t;
		else if ((type == MTRR_TYPE_WRTHROUGH &&
			  t == MTRR_TYPE_WRBACK) ||
			 (type == MTRR_TYPE_WRBACK &&
			  t == MTRR_TYPE_WRTHROUGH))
			type = MTRR_TYPE_WRTHROUGH;
		else
			return MTRR_TYPE_UNCACHABLE;
	}

	return type < 0 ? (u8)mtrr->deftype : type;
}

KVMI_ARCH_VCPU_CMD(get_mtrr_type)
{
	const struct kvmi_vcpu_get_mtrr_type *get = req;
	struct kvmi_vcpu_get_mtrr_type_reply *mtrr = rpl;

	memset(mtrr, 0, sizeof(*mtrr));
	mtrr->type = kvmi_mtrr_type(vcpu, get->gpa);

	*rpl_size = sizeof(*mtrr);
	return 0;
}

/* What is intercepted */

bool __kvmi_intercepts_cr(struct kvm_vcpu *vcpu, unsigned int cr)
{
	return vcpu->kvmi->arch.intercept_crs & BIT(cr);
}
EXPORT_SYMBOL_GPL(__kvmi_intercepts_cr);

static bool kvmi_msr_in_map(u32 msr)
{
	return msr < KVMI_NUM_MSRS || msr - 0xc0000000 < KVMI_NUM_MSRS;
}

/* The half of the map, and the bit in it, of an MSR that is in there */
static unsigned long *kvmi_msr_bit(struct kvmi_msr_map *map, u32 msr,
				   unsigned int *bit)
{
	*bit = msr % KVMI_NUM_MSRS;

	return msr < KVMI_NUM_MSRS ? map->low : map->high;
}

bool __kvmi_intercepts_msr(struct kvm_vcpu *vcpu, u32 msr)
{
	struct kvmi_msr_map *map = vcpu->kvmi->arch.intercept_msrs;
	unsigned long *bits;
	unsigned int bit;

	if (!map || !kvmi_msr_in_map(msr))
		return false;
	bits = kvmi_msr_bit(map, msr, &bit);

	return test_bit(bit, bits);
}
EXPORT_SYMBOL_GPL(__kvmi_intercepts_msr);

bool __kvmi_intercepts_desc(struct kvm_vcpu *vcpu)
{
	return vcpu->kvmi->arch.intercept_desc;
}
EXPORT_SYMBOL_GPL(__kvmi_intercepts_desc);

KVMI_ARCH_VCPU_CMD(control_cr)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;
	const struct kvmi_vcpu_control_cr *ctl = req;
	u8 crs = arch->intercept_crs;

	if (ctl->padding1 || ctl->padding2 || ctl->enable > 1)
		return -KVM_EINVAL;
	if (ctl->cr != 0 && ctl->cr != 3 && ctl->cr != 4)
		return -KVM_EINVAL;

	if (ctl->enable)
		crs |= BIT(ctl->cr);
	else
		crs &= ~BIT(ctl->cr);
	if (crs == arch->intercept_crs)
		return 0;

	arch->intercept_crs = crs;
	kvm_x86_call(update_introspection)(vcpu);
	return 0;
}

static void kvmi_update_msrs(struct kvm_vcpu *vcpu)
{
	/* All MSRs that KVM may let the guest write by itself... */
	kvm_x86_call(msr_filter_changed)(vcpu);
	/* ...but those that a filter can't have */
	kvm_x86_call(update_introspection)(vcpu);
}

KVMI_ARCH_VCPU_CMD(control_msr)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;
	const struct kvmi_vcpu_control_msr *ctl = req;
	struct kvmi_msr_map *map = arch->intercept_msrs;
	unsigned long *bits;
	unsigned int bit;

	if (ctl->padding1 || ctl->padding2 || ctl->enable > 1)
		return -KVM_EINVAL;
	if (!kvmi_msr_in_map(ctl->msr))
		return -KVM_EINVAL;
	if (ctl->enable &&
	    !kvm_msr_allowed(vcpu, ctl->msr, KVM_MSR_FILTER_WRITE))
		return -KVM_EPERM;

	if (!map) {
		if (!ctl->enable)
			return 0;
		map = kzalloc(sizeof(*map), GFP_KERNEL_ACCOUNT);
		if (!map)
			return -KVM_ENOMEM;
		arch->intercept_msrs = map;
	}

	bits = kvmi_msr_bit(map, ctl->msr, &bit);
	if (test_bit(bit, bits) == ctl->enable)
		return 0;

	__assign_bit(bit, bits, ctl->enable);
	kvmi_update_msrs(vcpu);
	return 0;
}

int kvmi_arch_control_desc(struct kvm_vcpu *vcpu, bool enable)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	if (arch->intercept_desc == enable)
		return 0;

	arch->intercept_desc = enable;
	if (kvm_x86_call(update_introspection)(vcpu) && enable) {
		arch->intercept_desc = false;
		return -KVM_EOPNOTSUPP;
	}

	return 0;
}

void kvmi_arch_exits_cleanup(struct kvm_vcpu *vcpu)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;
	struct kvmi_msr_map *map = arch->intercept_msrs;

	if (!arch->intercept_crs && !arch->intercept_desc && !map)
		return;

	arch->intercept_crs = 0;
	arch->intercept_desc = false;
	arch->intercept_msrs = NULL;
	kfree(map);
	kvmi_update_msrs(vcpu);
}

void kvmi_arch_vcpu_free(struct kvmi_vcpu_arch *arch)
{
	kfree(arch->intercept_msrs);
}

/* Events */

static bool kvmi_exits_raise(struct kvm_vcpu *vcpu, u16 id, const void *data,
			     size_t size, bool emulated)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	if (is_guest_mode(vcpu) || vcpu->arch.guest_state_protected ||
	    arch->completing)
		return false;

	/* The emulator may be called again before the run loop comes by */
	if (vcpu->kvmi->ev.open)
		return true;

	if (!kvmi_vcpu_raise(vcpu, id, data, size))
		return false;

	arch->rip = kvm_rip_read(vcpu);
	arch->emulated = emulated;
	/* Ends loops that emulate one instruction after the other */
	if (emulated)
		kvm_make_request(KVM_REQ_EVENT, vcpu);

	return true;
}

static bool kvmi_cr_raise(struct kvm_vcpu *vcpu, unsigned int cr,
			  unsigned long val, bool emulated)
{
	struct kvmi_vcpu_event_cr data = { .cr = cr };
	bool noflush = false;

	if (!__kvmi_intercepts_cr(vcpu, cr))
		return false;

	switch (cr) {
	case 0:
		data.old_value = kvm_read_cr0(vcpu);
		val |= X86_CR0_ET;
		val &= ~(CR0_RESERVED_BITS & U32_MAX);
		break;
	case 3:
		data.old_value = kvm_read_cr3(vcpu);
		if (kvm_is_cr4_bit_set(vcpu, X86_CR4_PCIDE)) {
			noflush = val & X86_CR3_PCID_NOFLUSH;
			val &= ~X86_CR3_PCID_NOFLUSH;
		}
		break;
	default:
		data.old_value = kvm_read_cr4(vcpu);
		break;
	}

	data.new_value = val;
	if (data.new_value == data.old_value)
		return false;
	if (!kvmi_exits_raise(vcpu, KVMI_VCPU_EVENT_CR, &data, sizeof(data),
			      emulated))
		return false;

	vcpu->kvmi->arch.cr3_noflush = noflush;
	return true;
}

bool __kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr, unsigned long val)
{
	return kvmi_cr_raise(vcpu, cr, val, false);
}
EXPORT_SYMBOL_GPL(__kvmi_cr_write);

static bool kvmi_msr_raise(struct kvm_vcpu *vcpu, u32 msr, u64 val,
			   bool emulated)
{
	struct kvmi_vcpu_event_msr data = { .msr = msr, .new_value = val };
	u64 old;

	if (!__kvmi_intercepts_msr(vcpu, msr) ||
	    !kvm_msr_allowed(vcpu, msr, KVM_MSR_FILTER_WRITE))
		return false;

	/* An MSR that can't be read may have been changed */
	if (!__kvm_get_msr(vcpu, msr, &old, false)) {
		if (old == val)
			return false;
		data.old_value = old;
	}

	return kvmi_exits_raise(vcpu, KVMI_VCPU_EVENT_MSR, &data, sizeof(data),
				emulated);
}

bool __kvmi_wrmsr(struct kvm_vcpu *vcpu, u32 *msr, u64 *data)
{
	__kvmi_emulated_wrmsr(vcpu, msr, data);
	return kvmi_msr_raise(vcpu, *msr, *data, false);
}

bool __kvmi_hypercall(struct kvm_vcpu *vcpu)
{
	bool match;

	if (vcpu->arch.guest_state_protected)
		return false;

	if (is_64_bit_hypercall(vcpu))
		match = kvm_rax_read(vcpu) == KVM_HC_XEN_HVM_OP &&
			kvm_rdi_read(vcpu) ==
			KVM_HC_XEN_HVM_OP_GUEST_REQUEST_VM_EVENT &&
			!kvm_rsi_read(vcpu);
	else
		match = (u32)kvm_rax_read(vcpu) == KVM_HC_XEN_HVM_OP &&
			(u32)kvm_rbx_read(vcpu) ==
			KVM_HC_XEN_HVM_OP_GUEST_REQUEST_VM_EVENT &&
			!(u32)kvm_rcx_read(vcpu);

	return match && kvmi_exits_raise(vcpu, KVMI_VCPU_EVENT_HYPERCALL, NULL,
					 0, false);
}

bool __kvmi_xsetbv(struct kvm_vcpu *vcpu, u64 old_xcr0)
{
	struct kvmi_vcpu_event_xsetbv data = {
		.xcr = XCR_XFEATURE_ENABLED_MASK,
		.old_value = old_xcr0,
		.new_value = vcpu->arch.xcr0,
	};

	return data.old_value != data.new_value &&
	       kvmi_exits_raise(vcpu, KVMI_VCPU_EVENT_XSETBV, &data,
				sizeof(data), false);
}

static bool kvmi_desc_raise(struct kvm_vcpu *vcpu, u8 desc, bool write,
			    bool emulated)
{
	struct kvmi_vcpu_event_descriptor data = {
		.descriptor = desc,
		.write = write,
	};

	return kvmi_exits_raise(vcpu, KVMI_VCPU_EVENT_DESCRIPTOR, &data,
				sizeof(data), emulated);
}

bool __kvmi_descriptor_access(struct kvm_vcpu *vcpu, u8 desc, bool write)
{
	return kvmi_desc_raise(vcpu, desc, write, false);
}
EXPORT_SYMBOL_GPL(__kvmi_descriptor_access);

/* Instructions that come to the emulator */

bool __kvmi_checks_emulation(struct kvm_vcpu *vcpu)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	return !is_guest_mode(vcpu) && !arch->completing &&
	       (arch->intercept_crs || arch->intercept_desc ||
		arch->intercept_msrs);
}

static bool kvmi_check_instruction(struct kvm_vcpu *vcpu,
				   const struct x86_instruction_info *info)
{
	unsigned long cr0;

	switch (info->intercept) {
	case x86_intercept_cr_write:
		return kvmi_cr_raise(vcpu, info->modrm_reg, info->src_val,
				     true);
	case x86_intercept_clts:
		cr0 = kvm_read_cr0_bits(vcpu, ~X86_CR0_TS);
		return kvmi_cr_raise(vcpu, 0, cr0, true);
	case x86_intercept_lmsw:
		cr0 = kvm_read_cr0_bits(vcpu, ~0x0eul);
		return kvmi_cr_raise(vcpu, 0, cr0 | (info->src_val & 0x0f),
				     true);
	case x86_intercept_wrmsr:
		return kvmi_msr_raise(vcpu, kvm_rcx_read(vcpu),
				      kvm_read_edx_eax(vcpu), true);
	case x86_intercept_lidt:
		return kvmi_desc_raise(vcpu, KVMI_DESC_IDTR, true, true);
	case x86_intercept_sidt:
		return kvmi_desc_raise(vcpu, KVMI_DESC_IDTR, false, true);
	case x86_intercept_lgdt:
		return kvmi_desc_raise(vcpu, KVMI_DESC_GDTR, true, true);
	case x86_intercept_sgdt:
		return kvmi_desc_raise(vcpu, KVMI_DESC_GDTR, false, true);
	case x86_intercept_lldt:
		return kvmi_desc_raise(vcpu, KVMI_DESC_LDTR, true, true);
	case x86_intercept_sldt:
		return kvmi_desc_raise(vcpu, KVMI_DESC_LDTR, false, true);
	case x86_intercept_ltr:
		return kvmi_desc_raise(vcpu, KVMI_DESC_TR, true, true);
	case x86_intercept_str:
		return kvmi_desc_raise(vcpu, KVMI_DESC_TR, false, true);
	default:
		return false;
	}
}

/*
 * All that can make the instruction fail has been looked at but the values
 * themselves, and it has not changed anything yet.
 */
int kvmi_check_emulation(struct kvm_vcpu *vcpu,
			 struct x86_instruction_info *info, int stage)
{
	if (stage != X86_ICPT_POST_MEMACCESS)
		return X86EMUL_CONTINUE;

	return kvmi_check_instruction(vcpu, info) ? X86EMUL_INTERCEPTED :
						    X86EMUL_CONTINUE;
}

void __kvmi_emulated_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
			      unsigned long *val)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	if (arch->completing == KVMI_VCPU_EVENT_CR && arch->target == cr)
		*val = arch->value;
}

void __kvmi_emulated_wrmsr(struct kvm_vcpu *vcpu, u32 *msr, u64 *data)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	if (arch->completing == KVMI_VCPU_EVENT_MSR) {
		*msr = arch->target;
		*data = arch->value;
	}
}

/* The events have been answered */

static int kvmi_cr_done(struct kvm_vcpu *vcpu,
			const struct kvmi_vcpu_event_cr *data,
			const struct kvmi_vcpu_event_cr_reply *rpl)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;
	int err;

	arch->target = data->cr;
	arch->value = rpl ? rpl->new_val : data->new_value;
	if (arch->cr3_noflush && arch->value == data->new_value)
		arch->value |= X86_CR3_PCID_NOFLUSH;
	arch->cr3_noflush = false;

	if (arch->emulated)
		return kvm_emulate_instruction(vcpu, 0);

	switch (data->cr) {
	case 0:
		err = kvm_set_cr0(vcpu, arch->value);
		break;
	case 3:
		err = kvm_set_cr3(vcpu, arch->value);
		break;
	default:
		err = kvm_set_cr4(vcpu, arch->value);
		break;
	}

	return kvm_complete_insn_gp(vcpu, err);
}

static int kvmi_msr_done(struct kvm_vcpu *vcpu,
			 const struct kvmi_vcpu_event_msr *data,
			 const struct kvmi_vcpu_event_msr_reply *rpl)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;

	arch->target = data->msr;
	arch->value = rpl ? rpl->new_val : data->new_value;

	return arch->emulated ? kvm_emulate_instruction(vcpu, 0) :
				kvm_emulate_wrmsr(vcpu);
}

static int kvmi_hypercall_done(struct kvm_vcpu *vcpu, bool abandoned)
{
	/* Nobody has answered: the guest learns that nobody was there */
	if (abandoned)
		return kvm_emulate_hypercall(vcpu);

	kvm_rax_write(vcpu, 0);
	return kvm_skip_emulated_instruction(vcpu);
}

static int kvmi_complete(struct kvm_vcpu *vcpu, const struct kvmi_event *ev,
			 const void *rpl)
{
	switch (ev->id) {
	case KVMI_VCPU_EVENT_HYPERCALL:
		return kvmi_hypercall_done(vcpu, !rpl);
	case KVMI_VCPU_EVENT_CR:
		return kvmi_cr_done(vcpu, (void *)ev->data, rpl);
	case KVMI_VCPU_EVENT_XSETBV:
		return kvm_skip_emulated_instruction(vcpu);
	case KVMI_VCPU_EVENT_DESCRIPTOR:
		return kvm_emulate_instruction(vcpu, 0);
	case KVMI_VCPU_EVENT_MSR:
		return kvmi_msr_done(vcpu, (void *)ev->data, rpl);
	default:
		return 1;
	}
}

int kvmi_arch_exits_event_done(struct kvm_vcpu *vcpu,
			       const struct kvmi_event *ev, const void *rpl)
{
	struct kvmi_vcpu_arch *arch = &vcpu->kvmi->arch;
	unsigned long moved;
	int r;

	/* Userspace has put another state in its place */
	if (is_guest_mode(vcpu))
		return 1;

	/*
	 * If the tool has set RIP, the length of the instruction is added to
	 * that, on all vendors' CPUs.
	 */
	moved = kvm_rip_read(vcpu) - arch->rip;
	if (moved)
		kvm_rip_write(vcpu, arch->rip);

	arch->completing = ev->id;
	r = kvmi_complete(vcpu, ev, rpl);
	arch->completing = 0;

	if (moved)
		kvm_rip_write(vcpu, kvm_rip_read(vcpu) + moved);

	return r;
}
