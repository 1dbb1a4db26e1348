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

struct kvm_page_fault;
struct x86_emulate_ctxt;

bool kvmi_maps_execonly(void);
unsigned int __kvmi_pte_access(struct kvm *kvm,
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
bool __kvmi_emulation_ended(struct kvm_vcpu *vcpu,
			    const struct x86_emulate_ctxt *ctxt, int r);

static inline unsigned int
kvmi_pte_access(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn,
		int level, unsigned int pte_access)
{
	if (likely(!kvm->kvmi))
		return pte_access;

	return __kvmi_pte_access(kvm, slot, gfn, level, pte_access);
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

static inline bool kvmi_emulation_ended(struct kvm_vcpu *vcpu,
					const struct x86_emulate_ctxt *ctxt,
					int r)
{
	return unlikely(vcpu->kvmi) && __kvmi_emulation_ended(vcpu, ctxt, r);
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

struct kvm_page_fault;
struct x86_emulate_ctxt;

static inline bool kvmi_maps_execonly(void)
{
	return false;
}

static inline unsigned int
kvmi_pte_access(struct kvm *kvm, const struct kvm_memory_slot *slot, gfn_t gfn,
		int level, unsigned int pte_access)
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

static inline bool kvmi_emulation_ended(struct kvm_vcpu *vcpu,
					const struct x86_emulate_ctxt *ctxt,
					int r)
{
	return false;
}

#endif /* CONFIG_KVM_INTROSPECTION */

#endif
