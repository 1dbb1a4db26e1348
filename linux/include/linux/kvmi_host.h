/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __KVMI_HOST_H
#define __KVMI_HOST_H

/* What the rest of KVM needs to know of the introspection subsystem */

#include <linux/kvm_host.h>
#include <uapi/linux/kvmi.h>

#ifdef CONFIG_KVM_INTROSPECTION

int kvmi_check_extension(void);
int kvmi_vm_ioctl(struct kvm *kvm, unsigned int ioctl, void __user *argp);
void kvmi_exit(void);
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

struct kvm_page_fault;
struct x86_emulate_ctxt;

bool kvmi_maps_execonly(void);
unsigned int __kvmi_pte_access(struct kvm_vcpu *vcpu,
			       const struct kvm_memory_slot *slot, gfn_t gfn,
			       int level, unsigned int pte_access);
int __kvmi_max_mapping_level(struct kvm *kvm,
			     const struct kvm_memory_slot *slot, gfn_t gfn,
			     int max_level);
int __kvmi_page_fault(struct kvm_vcpu *vcpu,
		      const struct kvm_page_fault *fault);
bool __kvmi_page_fault_denied(struct kvm_vcpu *vcpu,
			      const struct kvm_page_fault *fault);
bool __kvmi_emulator_access(struct kvm_vcpu *vcpu, gva_t gva, gpa_t gpa,
			    u64 pfec);
bool __kvmi_emulator_access_std(struct kvm_vcpu *vcpu, gva_t gva,
				unsigned int bytes, u64 pfec);
void __kvmi_set_injecting(struct kvm_vcpu *vcpu, bool injecting);
bool __kvmi_emulation_ended(struct kvm_vcpu *vcpu,
			    const struct x86_emulate_ctxt *ctxt, int r);

static inline unsigned int
kvmi_pte_access(struct kvm_vcpu *vcpu, const struct kvm_memory_slot *slot,
		gfn_t gfn, int level, unsigned int pte_access)
{
	if (likely(!vcpu->kvm->kvmi))
		return pte_access;

	return __kvmi_pte_access(vcpu, slot, gfn, level, pte_access);
}

static inline int kvmi_max_mapping_level(struct kvm *kvm,
					 const struct kvm_memory_slot *slot,
					 gfn_t gfn, int max_level)
{
	if (likely(!kvm->kvmi))
		return max_level;

	return __kvmi_max_mapping_level(kvm, slot, gfn, max_level);
}

static inline int kvmi_page_fault(struct kvm_vcpu *vcpu,
				  const struct kvm_page_fault *fault)
{
	return likely(!vcpu->kvm->kvmi) ? 0 : __kvmi_page_fault(vcpu, fault);
}

static inline bool kvmi_page_fault_denied(struct kvm_vcpu *vcpu,
					  const struct kvm_page_fault *fault)
{
	return unlikely(vcpu->kvm->kvmi) &&
	       __kvmi_page_fault_denied(vcpu, fault);
}

static inline bool kvmi_emulator_access(struct kvm_vcpu *vcpu, gva_t gva,
					gpa_t gpa, u64 pfec)
{
	return unlikely(vcpu->kvmi) &&
	       __kvmi_emulator_access(vcpu, gva, gpa, pfec);
}

static inline bool kvmi_emulator_access_std(struct kvm_vcpu *vcpu, gva_t gva,
					    unsigned int bytes, u64 pfec)
{
	return unlikely(vcpu->kvmi) &&
	       __kvmi_emulator_access_std(vcpu, gva, bytes, pfec);
}

static inline void kvmi_set_injecting(struct kvm_vcpu *vcpu, bool injecting)
{
	if (unlikely(vcpu->kvmi))
		__kvmi_set_injecting(vcpu, injecting);
}

static inline bool kvmi_emulation_ended(struct kvm_vcpu *vcpu,
					const struct x86_emulate_ctxt *ctxt,
					int r)
{
	return unlikely(vcpu->kvmi) && __kvmi_emulation_ended(vcpu, ctxt, r);
}

void kvmi_set_has_singlestep(bool has);
bool __kvmi_step_begin(struct kvm_vcpu *vcpu);
void __kvmi_step_done(struct kvm_vcpu *vcpu);
void __kvmi_step_moved(struct kvm_vcpu *vcpu, unsigned long ip);
void __kvmi_regs_set(struct kvm_vcpu *vcpu, const struct kvm_regs *regs);
bool __kvmi_step_owned(struct kvm_vcpu *vcpu);
bool __kvmi_step_holds_interrupts(struct kvm_vcpu *vcpu);
bool __kvmi_step_inhibits_apicv(struct kvm_vcpu *vcpu);
void __kvmi_exception_queue(struct kvm_vcpu *vcpu);
void __kvmi_exception_injected(struct kvm_vcpu *vcpu, bool *immediate_exit);
bool __kvmi_exception_as_fault(struct kvm_vcpu *vcpu);

/* The guest is entered next; shall it only do one step? */
static inline bool kvmi_step_begin(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi_steps) && __kvmi_step_begin(vcpu);
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

/* Called before userspace sets them */
static inline void kvmi_regs_set(struct kvm_vcpu *vcpu,
				 const struct kvm_regs *regs)
{
	if (unlikely(vcpu->kvmi))
		__kvmi_regs_set(vcpu, regs);
}

static inline bool kvmi_step_owned(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi_steps) && __kvmi_step_owned(vcpu);
}

static inline bool kvmi_step_holds_interrupts(struct kvm_vcpu *vcpu)
{
	return unlikely(vcpu->kvmi_steps) && __kvmi_step_holds_interrupts(vcpu);
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

static inline void kvmi_exit(void)
{
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

struct kvm_page_fault;
struct x86_emulate_ctxt;

static inline bool kvmi_maps_execonly(void)
{
	return false;
}

static inline unsigned int
kvmi_pte_access(struct kvm_vcpu *vcpu, const struct kvm_memory_slot *slot,
		gfn_t gfn, int level, unsigned int pte_access)
{
	return pte_access;
}

static inline int kvmi_max_mapping_level(struct kvm *kvm,
					 const struct kvm_memory_slot *slot,
					 gfn_t gfn, int max_level)
{
	return max_level;
}

static inline int kvmi_page_fault(struct kvm_vcpu *vcpu,
				  const struct kvm_page_fault *fault)
{
	return 0;
}

static inline bool kvmi_page_fault_denied(struct kvm_vcpu *vcpu,
					  const struct kvm_page_fault *fault)
{
	return false;
}

static inline bool kvmi_emulator_access(struct kvm_vcpu *vcpu, gva_t gva,
					gpa_t gpa, u64 pfec)
{
	return false;
}

static inline bool kvmi_emulator_access_std(struct kvm_vcpu *vcpu, gva_t gva,
					    unsigned int bytes, u64 pfec)
{
	return false;
}

static inline void kvmi_set_injecting(struct kvm_vcpu *vcpu, bool injecting)
{
}

static inline bool kvmi_emulation_ended(struct kvm_vcpu *vcpu,
					const struct x86_emulate_ctxt *ctxt,
					int r)
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

static inline void kvmi_regs_set(struct kvm_vcpu *vcpu,
				 const struct kvm_regs *regs)
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

/* Intercepted instructions */

struct x86_instruction_info;

bool __kvmi_intercepts_cr(struct kvm_vcpu *vcpu, unsigned int cr);
bool __kvmi_intercepts_msr(struct kvm_vcpu *vcpu, u32 msr);
bool __kvmi_intercepts_desc(struct kvm_vcpu *vcpu);
bool __kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr, unsigned long val);
bool __kvmi_wrmsr(struct kvm_vcpu *vcpu, u32 *msr, u64 *data);
bool __kvmi_hypercall(struct kvm_vcpu *vcpu);
bool __kvmi_xsetbv(struct kvm_vcpu *vcpu, u64 old_xcr0);
bool __kvmi_descriptor_access(struct kvm_vcpu *vcpu, u8 desc, bool write);
bool __kvmi_checks_emulation(struct kvm_vcpu *vcpu);
int kvmi_check_emulation(struct kvm_vcpu *vcpu,
			 struct x86_instruction_info *info, int stage);
void __kvmi_emulated_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
			      unsigned long *val);
void __kvmi_emulated_wrmsr(struct kvm_vcpu *vcpu, u32 *msr, u64 *data);

static inline bool kvmi_present(struct kvm_vcpu *vcpu)
{
#ifdef CONFIG_KVM_INTROSPECTION
	return unlikely(vcpu->kvmi);
#else
	return false;
#endif
}

/* Shall the guest's writes be intercepted, whatever KVM itself needs? */
static inline bool kvmi_intercepts_cr(struct kvm_vcpu *vcpu, unsigned int cr)
{
	return kvmi_present(vcpu) && __kvmi_intercepts_cr(vcpu, cr);
}

static inline bool kvmi_intercepts_msr(struct kvm_vcpu *vcpu, u32 msr)
{
	return kvmi_present(vcpu) && __kvmi_intercepts_msr(vcpu, msr);
}

static inline bool kvmi_intercepts_desc(struct kvm_vcpu *vcpu)
{
	return kvmi_present(vcpu) && __kvmi_intercepts_desc(vcpu);
}

/*
 * If these return true, an event has been raised: the exit handler returns 1
 * and has not done the instruction, which is completed with the event.
 */
static inline bool kvmi_cr_write(struct kvm_vcpu *vcpu, unsigned int cr,
				 unsigned long val)
{
	return kvmi_present(vcpu) && __kvmi_cr_write(vcpu, cr, val);
}

/* May change what is written */
static inline bool kvmi_wrmsr(struct kvm_vcpu *vcpu, u32 *msr, u64 *data)
{
	return kvmi_present(vcpu) && __kvmi_wrmsr(vcpu, msr, data);
}

static inline bool kvmi_hypercall(struct kvm_vcpu *vcpu)
{
	return kvmi_present(vcpu) && __kvmi_hypercall(vcpu);
}

/* XCR0 has been set, but the instruction not been skipped */
static inline bool kvmi_xsetbv(struct kvm_vcpu *vcpu, u64 old_xcr0)
{
	return kvmi_present(vcpu) && __kvmi_xsetbv(vcpu, old_xcr0);
}

static inline bool kvmi_descriptor_access(struct kvm_vcpu *vcpu, u8 desc,
					  bool write)
{
	return kvmi_present(vcpu) &&
	       __kvmi_descriptor_access(vcpu, desc, write);
}

/*
 * The instruction emulator asks before it executes an instruction, and gets
 * the values to write when it does.
 */
static inline bool kvmi_checks_emulation(struct kvm_vcpu *vcpu)
{
	return kvmi_present(vcpu) && __kvmi_checks_emulation(vcpu);
}

static inline void kvmi_emulated_cr_write(struct kvm_vcpu *vcpu,
					  unsigned int cr, unsigned long *val)
{
	if (kvmi_present(vcpu))
		__kvmi_emulated_cr_write(vcpu, cr, val);
}

static inline void kvmi_emulated_wrmsr(struct kvm_vcpu *vcpu, u32 *msr,
				       u64 *data)
{
	if (kvmi_present(vcpu))
		__kvmi_emulated_wrmsr(vcpu, msr, data);
}

#endif
