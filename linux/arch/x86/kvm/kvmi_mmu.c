// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection on x86: what the guest may do with its memory
 *
 * The tool takes rights off pages.  kvm_introspection.page_access remembers
 * which, by guest frame, so that memory slots may come and go.
 *
 * What is allowed is done by the guest itself as far as the hardware can tell
 * it from what is not; what EPT or NPT can't express (no read but write, and
 * with NPT all that is without read) isn't mapped at all.  Whatever faults is
 * emulated: the emulator asks before each access.  If there is something that
 * the tool shall know, the event is raised.  When the tool just lets the guest
 * go on, so does the emulator; for anything else the emulation is given up,
 * and the instruction is emulated again, with this access granted, when the
 * run loop comes to that.  Hence the events of an instruction come in the
 * order of its accesses, one for each page and kind of access.
 *
 * The emulator doesn't know all instructions, and it can't deliver an
 * interrupt or an exception.  The event says so then (KVMI_PF_NOT_EMULATED),
 * and to go on takes the restriction off the page.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>
#include <linux/xarray.h>

#include "../../../virt/kvm/introspection/kvmi_int.h"
#include "kvm_emulate.h"
#include "mmu.h"
#include "mmu/mmu_internal.h"
#include "mmu/spte.h"
#include "smm.h"
#include "x86.h"

#define ACCESS_ALL \
	(KVMI_PAGE_ACCESS_R | KVMI_PAGE_ACCESS_W | KVMI_PAGE_ACCESS_X)

/*
 * An entry of the table has the rights that were taken off 16 pages, 3 bits
 * for each: some 9 bytes for 16 neighbours that are restricted, and never
 * more than about half a byte for a page of the guest.
 */
#define PAGES_PER_ENTRY 16
#define BITS_PER_PAGE   3

static unsigned int kvmi_entry_shift(gfn_t gfn)
{
	return gfn % PAGES_PER_ENTRY * BITS_PER_PAGE;
}

/* All rights, when there is nobody who could be told */
static u8 kvmi_page_access(struct kvm_introspection *kvmi, gfn_t gfn)
{
	void *entry;

	if (xa_empty(&kvmi->page_access) ||
	    !kvmi_session_alive(atomic_read(&kvmi->session)))
		return ACCESS_ALL;

	entry = xa_load(&kvmi->page_access, gfn / PAGES_PER_ENTRY);
	if (!entry)
		return ACCESS_ALL;

	return ACCESS_ALL & ~(xa_to_value(entry) >> kvmi_entry_shift(gfn));
}

/* Returns 1 if rights were taken off, 0 if not */
static int kvmi_store_page_access(struct kvm_introspection *kvmi, gfn_t gfn,
				  u8 access)
{
	unsigned long index = gfn / PAGES_PER_ENTRY, bits;
	unsigned int shift = kvmi_entry_shift(gfn);
	void *entry = xa_load(&kvmi->page_access, index), *old;
	u8 before;

	for (;;) {
		bits = entry ? xa_to_value(entry) : 0;
		before = bits >> shift & ACCESS_ALL;
		bits &= ~((unsigned long)ACCESS_ALL << shift);
		bits |= (unsigned long)(ACCESS_ALL & ~access) << shift;

		old = xa_cmpxchg(&kvmi->page_access, index, entry,
				 bits ? xa_mk_value(bits) : NULL,
				 GFP_KERNEL_ACCOUNT);
		if (xa_is_err(old))
			return -KVM_ENOMEM;
		if (old == entry)
			break;
		entry = old;
	}

	return !!(~access & ~before & ACCESS_ALL);
}

/*
 * The guest's mappings of these pages go, so that those which take their place
 * have the rights that are left; where rights come back, the guest's next
 * fault sees to it.
 */
int kvmi_arch_set_page_access(struct kvm_introspection *kvmi,
			      const struct kvmi_page_access_entry *entries,
			      unsigned int count)
{
	gfn_t gfn, start = 0, end = 0;
	int i, idx, ret, err = 0;

	if (!tdp_enabled)
		return -KVM_EOPNOTSUPP;

	idx = srcu_read_lock(&kvmi->kvm->srcu);
	for (i = 0; i < count; i++) {
		gfn = gpa_to_gfn(entries[i].gpa);

		if (entries[i].access & ~ACCESS_ALL ||
		    memchr_inv(entries[i].padding, 0,
			       sizeof(entries[i].padding)) ||
		    !kvm_is_visible_gfn(kvmi->kvm, gfn))
			ret = -KVM_EINVAL;
		else
			ret = kvmi_store_page_access(kvmi, gfn,
						     entries[i].access);
		if (ret < 0 && !err)
			err = ret;
		if (ret <= 0)
			continue;

		if (start < end && gfn == end) {
			end++;
			continue;
		}
		if (start < end)
			kvm_zap_gfn_range(kvmi->kvm, start, end);
		start = gfn;
		end = gfn + 1;
	}

	if (start < end)
		kvm_zap_gfn_range(kvmi->kvm, start, end);

	srcu_read_unlock(&kvmi->kvm->srcu, idx);
	return err;
}

u8 kvmi_arch_get_page_access(struct kvm_introspection *kvmi, gfn_t gfn)
{
	return kvmi_page_access(kvmi, gfn);
}

/* SMM's memory, and what KVM has put there for itself, is not restricted */
static bool kvmi_restricts_slot(const struct kvm_memory_slot *slot)
{
	return slot && !slot->as_id && slot->id < KVM_USER_MEM_SLOTS &&
	       !(slot->flags & KVM_MEMSLOT_INVALID);
}

/* As in make_spte(): EPT that can have a page executed but not read */
bool kvmi_maps_execonly(void)
{
	return !(shadow_present_mask & PT_PRESENT_MASK);
}

/* What of a page's rights the page table can give to the guest */
static u8 kvmi_mapped_access(struct kvm_introspection *kvmi, gfn_t gfn)
{
	u8 access = kvmi_page_access(kvmi, gfn);

	if (access & KVMI_PAGE_ACCESS_R)
		return access;

	if (access == KVMI_PAGE_ACCESS_X && kvmi_maps_execonly())
		return access;

	return 0;
}

/* A nested guest, which has mappings of its own, isn't restricted */
unsigned int __kvmi_pte_access(struct kvm_vcpu *vcpu,
			       const struct kvm_memory_slot *slot, gfn_t gfn,
			       int level, unsigned int pte_access)
{
	u8 access;

	if (level > PG_LEVEL_4K || is_guest_mode(vcpu) ||
	    !kvmi_restricts_slot(slot))
		return pte_access;

	access = kvmi_mapped_access(vcpu->kvm->kvmi, gfn);
	if (!(access & KVMI_PAGE_ACCESS_R))
		pte_access &= ~ACC_USER_MASK;
	if (!(access & KVMI_PAGE_ACCESS_W))
		pte_access &= ~ACC_WRITE_MASK;
	if (!(access & KVMI_PAGE_ACCESS_X))
		pte_access &= ~ACC_EXEC_MASK;

	return pte_access;
}

/* A mapping has the same rights everywhere */
int __kvmi_max_mapping_level(struct kvm *kvm,
			     const struct kvm_memory_slot *slot, gfn_t gfn,
			     int max_level)
{
	struct xarray *xa = &kvm->kvmi->page_access;
	unsigned long first, last;

	if (xa_empty(xa) || !kvmi_restricts_slot(slot))
		return max_level;

	for (; max_level > PG_LEVEL_4K; max_level--) {
		first = gfn_round_for_level(gfn, max_level) / PAGES_PER_ENTRY;
		last = first + KVM_PAGES_PER_HPAGE(max_level) /
			       PAGES_PER_ENTRY - 1;
		if (!xa_find(xa, &first, last, XA_PRESENT))
			break;
	}

	return max_level;
}

static u8 kvmi_fault_access(const struct kvm_page_fault *fault)
{
	if (fault->exec)
		return KVMI_PAGE_ACCESS_X;

	return fault->write ? KVMI_PAGE_ACCESS_W : KVMI_PAGE_ACCESS_R;
}

/* Called with mmu_lock held, which the tool's change takes after it is made */
bool __kvmi_page_fault_denied(struct kvm_vcpu *vcpu,
			      const struct kvm_page_fault *fault)
{
	return !is_guest_mode(vcpu) && kvmi_restricts_slot(fault->slot) &&
	       !(kvmi_mapped_access(vcpu->kvm->kvmi, fault->gfn) &
		 kvmi_fault_access(fault));
}

/* What belongs to an earlier exit, hence to another access, doesn't count */
static struct kvmi_pf *kvmi_this_pf(struct kvm_vcpu *vcpu)
{
	struct kvmi_pf *pf = &vcpu->kvmi->arch.pf;

	if (pf->exits != vcpu->stat.exits) {
		pf->exits = vcpu->stat.exits;
		pf->faulted = false;
		pf->nr_granted = 0;
	}

	return pf;
}

static void kvmi_lift_restriction(struct kvm *kvm, gpa_t gpa)
{
	kvmi_store_page_access(kvm->kvmi, gpa_to_gfn(gpa), ACCESS_ALL);
}

/* The guest must go on even if nobody on this vCPU wants to know of it */
static void kvmi_raise_unemulated(struct kvm_vcpu *vcpu,
				  const struct kvmi_pf *pf)
{
	const struct kvmi_vcpu_event_pf data = {
		.gva = ~0ul,
		.gpa = pf->gpa,
		.access = pf->access,
		.flags = KVMI_PF_NOT_EMULATED,
	};

	if (kvmi_vcpu_raise(vcpu, KVMI_VCPU_EVENT_PF, &data, sizeof(data)))
		return;

	pr_warn_ratelimited("introspection: no longer restricted, as an access can't be emulated: gpa 0x%llx\n",
			    pf->gpa);
	kvmi_lift_restriction(vcpu->kvm, pf->gpa);
}

/* Returns RET_PF_CONTINUE if the fault isn't the tool's business */
int __kvmi_page_fault(struct kvm_vcpu *vcpu, const struct kvm_page_fault *fault)
{
	struct kvmi_pf *pf;

	if (!__kvmi_page_fault_denied(vcpu, fault))
		return RET_PF_CONTINUE;
	if (fault->prefetch)
		return RET_PF_EMULATE;
	if (!kvmi_vcpu_get(vcpu))
		return -ENOMEM;

	pf = kvmi_this_pf(vcpu);
	pf->faulted = true;
	pf->gpa = fault->addr;
	pf->access = kvmi_fault_access(fault);

	/* It wasn't the instruction that faulted */
	if (kvm_event_needs_reinjection(vcpu)) {
		kvmi_raise_unemulated(vcpu, pf);
		return RET_PF_RETRY;
	}

	return RET_PF_EMULATE;
}

/*
 * The emulator has ended with r.  Returns true if that is so because of the
 * tool, and the vCPU runs on: its event is open, or the emulator doesn't know
 * the instruction, which the guest would do by itself but for the tool.
 */
bool __kvmi_emulation_ended(struct kvm_vcpu *vcpu,
			    const struct x86_emulate_ctxt *ctxt, int r)
{
	struct kvmi_pf *pf = kvmi_this_pf(vcpu);
	bool unknown;

	if (vcpu->kvmi->ev.open)
		return true;

	/*
	 * The instruction is over, unless there is more of it or userspace has
	 * to do a part.  Another one has to ask for itself, even if KVM
	 * emulates it without an exit in between.
	 */
	if (r != EMULATION_RESTART && !vcpu->mmio_needed &&
	    !vcpu->arch.pio.count && !vcpu->arch.complete_userspace_io)
		pf->nr_granted = 0;

	/* Many that it doesn't know look undefined to it */
	if (ctxt->have_exception)
		unknown = ctxt->exception.vector == UD_VECTOR;
	else
		unknown = r == EMULATION_FAILED;
	if (!unknown || !pf->faulted)
		return false;

	kvmi_raise_unemulated(vcpu, pf);
	return true;
}

static bool kvmi_granted(const struct kvmi_pf *pf, gfn_t gfn, u8 access)
{
	int i;

	for (i = 0; i < pf->nr_granted; i++) {
		if (pf->granted[i].gfn == gfn &&
		    pf->granted[i].access == access)
			return true;
	}

	return false;
}

static void kvmi_grant(struct kvmi_pf *pf, gfn_t gfn, u8 access)
{
	/* Unheard of, but then the guest makes these accesses once more */
	if (pf->nr_granted == ARRAY_SIZE(pf->granted))
		pf->nr_granted = 0;
	pf->granted[pf->nr_granted].gfn = gfn;
	pf->granted[pf->nr_granted].access = access;
	pf->nr_granted++;
}

/*
 * A far call loads CS before it pushes the old one; the tool is to see the
 * guest as it was before the instruction.
 */
static bool kvmi_half_done(const struct x86_emulate_ctxt *ctxt)
{
	return ctxt->b == 0x9a ||
	       (ctxt->b == 0xff && (ctxt->modrm >> 3 & 7) == 3);
}

static noinline bool kvmi_ask_access(struct kvm_vcpu *vcpu, gva_t gva,
				     gpa_t gpa, u64 pfec, bool at_once)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvmi_vcpu_event_pf data = {
		.gva = gva,
		.gpa = gpa,
	};
	gfn_t gfn = gpa_to_gfn(gpa);

	if (is_guest_mode(vcpu) || is_smm(vcpu) || vcpu->kvmi->arch.injecting)
		return false;

	/* The emulator may be called again before the run loop comes by */
	if (vcpu->kvmi->ev.open)
		return true;

	if (pfec & PFERR_FETCH_MASK)
		data.access = KVMI_PAGE_ACCESS_X;
	else if (pfec & PFERR_WRITE_MASK)
		data.access = KVMI_PAGE_ACCESS_W;
	else
		data.access = KVMI_PAGE_ACCESS_R;

	if (kvmi_page_access(kvmi, gfn) & data.access ||
	    kvmi_granted(kvmi_this_pf(vcpu), gfn, data.access) ||
	    !kvm_vcpu_is_visible_gfn(vcpu, gfn))
		return false;

	if (!at_once)
		return kvmi_vcpu_raise(vcpu, KVMI_VCPU_EVENT_PF, &data,
				       sizeof(data));

	if (kvmi_vcpu_ask(vcpu, KVMI_VCPU_EVENT_PF, &data, sizeof(data)))
		return true;

	kvmi_grant(kvmi_this_pf(vcpu), gfn, data.access);
	return false;
}

/* Returns true if the tool must be asked first, so this isn't to be done now */
bool __kvmi_emulator_access(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa,
			    u64 pfec)
{
	/* Apart from the rest, as it is so often all there is to do */
	return !xa_empty(&vcpu->kvm->kvmi->page_access) &&
	       kvmi_ask_access(vcpu, gva, gpa, pfec,
			       !kvmi_half_done(vcpu->arch.emulate_ctxt));
}

/*
 * KVM switches tasks for the guest and, without unrestricted guest, delivers
 * the interrupts of real mode.  That can't be given up half-way, so nobody is
 * asked.
 */
void __kvmi_set_injecting(struct kvm_vcpu *vcpu, bool injecting)
{
	vcpu->kvmi->arch.injecting = injecting;
}

/* For what the CPU does by itself, e.g. with descriptors */
bool __kvmi_emulator_access_std(struct kvm_vcpu *vcpu, gva_t gva,
				unsigned int bytes, u64 pfec)
{
	struct kvm_mmu *mmu = vcpu->arch.walk_mmu;
	struct x86_exception e;
	unsigned int part;
	gpa_t gpa;

	if (xa_empty(&vcpu->kvm->kvmi->page_access))
		return false;

	for (; bytes; bytes -= part, gva += part) {
		part = min_t(unsigned int, bytes,
			     PAGE_SIZE - offset_in_page(gva));

		gpa = mmu->gva_to_gpa(vcpu, mmu, gva, pfec, &e);
		if (gpa == INVALID_GPA)
			return false;
		if (kvmi_ask_access(vcpu, gva, gpa, pfec, false))
			return true;
	}

	return false;
}

int kvmi_pf_done(struct kvm_vcpu *vcpu, const struct kvmi_event *ev,
		 bool abandoned)
{
	const struct kvmi_vcpu_event_pf *data = (const void *)ev->data;

	/* Nothing is restricted any more */
	if (abandoned)
		return 1;

	if (data->flags & KVMI_PF_NOT_EMULATED) {
		kvmi_lift_restriction(vcpu->kvm, data->gpa);
		return 1;
	}

	kvmi_grant(kvmi_this_pf(vcpu), gpa_to_gfn(data->gpa), data->access);
	return kvm_emulate_instruction(vcpu, 0);
}
