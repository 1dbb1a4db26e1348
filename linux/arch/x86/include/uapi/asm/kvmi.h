/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
#ifndef _UAPI_ASM_X86_KVMI_H
#define _UAPI_ASM_X86_KVMI_H

/* The part of the protocol of linux/kvmi.h that is particular to x86 */

#include <linux/types.h>
#include <asm/kvm.h>

/* The state of the vCPU, sent with each of its events; 536 bytes */
struct kvmi_vcpu_event_arch {
	__u8 mode;		/* width of code in bytes: 2, 4 or 8 */
	__u8 padding[7];
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct {
		__u64 sysenter_cs;
		__u64 sysenter_esp;
		__u64 sysenter_eip;
		__u64 efer;
		__u64 star;
		__u64 lstar;
		__u64 cstar;
		__u64 pat;
		__u64 shadow_gs;
	} msrs;
};

/* KVMI_VCPU_GET_INFO */
struct kvmi_vcpu_get_info_reply {
	__u64 tsc_speed;	/* Hz; 0 if the host can't scale the TSC */
};

/* KVMI_VCPU_GET_REGISTERS */
struct kvmi_vcpu_get_registers {
	__u16 nmsrs;
	__u16 padding1;
	__u32 padding2;
	__u32 msrs_idx[];
};

struct kvmi_vcpu_get_registers_reply {
	__u32 mode;
	__u32 padding;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_msrs msrs;
};

/* KVMI_VCPU_SET_SREGS; 312 bytes */
struct kvmi_vcpu_set_sregs {
	struct kvm_sregs sregs;
};

/* KVMI_VCPU_SET_MSRS */
struct kvmi_vcpu_set_msrs {
	__u32 nmsrs;
	__u32 padding;
	struct kvm_msr_entry entries[];
};

struct kvmi_vcpu_set_msrs_reply {
	__u32 nmsrs;		/* how many were written */
	__u32 padding;
};

/* KVMI_VCPU_EVENT_BREAKPOINT */
struct kvmi_vcpu_event_breakpoint {
	__u64 gpa;		/* of the INT3; all ones: not mapped */
	__u8 insn_len;
	__u8 padding[7];
};

/*
 * KVMI_VCPU_EVENT_HYPERCALL: RAX (EAX) is the first; RDI (EBX) is the second,
 * RSI (ECX) is 0.
 */
#define KVM_HC_XEN_HVM_OP                        34
#define KVM_HC_XEN_HVM_OP_GUEST_REQUEST_VM_EVENT 24

/* KVMI_VCPU_GET_CPUID */
struct kvmi_vcpu_get_cpuid {
	__u32 function;
	__u32 index;
};

struct kvmi_vcpu_get_cpuid_reply {
	__u32 eax;
	__u32 ebx;
	__u32 ecx;
	__u32 edx;
};

/* KVMI_VCPU_CONTROL_CR */
struct kvmi_vcpu_control_cr {
	__u8 cr;		/* 0, 3 or 4 */
	__u8 enable;
	__u16 padding1;
	__u32 padding2;
};

/* KVMI_VCPU_EVENT_CR */
struct kvmi_vcpu_event_cr {
	__u8 cr;
	__u8 padding[7];
	__u64 old_value;
	__u64 new_value;
};

struct kvmi_vcpu_event_cr_reply {
	__u64 new_val;		/* what is written */
};

/* KVMI_VCPU_INJECT_EXCEPTION */
struct kvmi_vcpu_inject_exception {
	__u8 nr;
	__u8 padding1;
	__u16 padding2;
	__u32 error_code;
	__u64 address;		/* CR2, for #PF */
};

/* KVMI_VCPU_EVENT_TRAP */
struct kvmi_vcpu_event_trap {
	__u8 nr;
	__u8 padding1;
	__u16 padding2;
	__u32 error_code;
	__u64 address;
};

/* KVMI_VCPU_GET_XCR */
struct kvmi_vcpu_get_xcr {
	__u8 xcr;		/* 0 */
	__u8 padding[7];
};

struct kvmi_vcpu_get_xcr_reply {
	__u64 value;
};

/* KVMI_VCPU_EVENT_XSETBV */
struct kvmi_vcpu_event_xsetbv {
	__u8 xcr;
	__u8 padding[7];
	__u64 old_value;
	__u64 new_value;
};

/* KVMI_VCPU_GET_XSAVE; 4096 bytes */
struct kvmi_vcpu_get_xsave_reply {
	struct kvm_xsave xsave;
};

/* KVMI_VCPU_SET_XSAVE */
struct kvmi_vcpu_set_xsave {
	struct kvm_xsave xsave;
};

/* KVMI_VCPU_GET_MTRR_TYPE */
struct kvmi_vcpu_get_mtrr_type {
	__u64 gpa;
};

struct kvmi_vcpu_get_mtrr_type_reply {
	__u8 type;
	__u8 padding[7];
};

/* KVMI_VCPU_EVENT_DESCRIPTOR */
#define KVMI_DESC_IDTR 1
#define KVMI_DESC_GDTR 2
#define KVMI_DESC_LDTR 3
#define KVMI_DESC_TR   4

struct kvmi_vcpu_event_descriptor {
	__u8 descriptor;	/* KVMI_DESC_* */
	__u8 write;		/* 1: it is loaded, 0: it is stored */
	__u8 padding[6];
};

/* KVMI_VCPU_CONTROL_MSR */
struct kvmi_vcpu_control_msr {
	__u8 enable;
	__u8 padding1;
	__u16 padding2;
	__u32 msr;
};

/* KVMI_VCPU_EVENT_MSR */
struct kvmi_vcpu_event_msr {
	__u32 msr;
	__u32 padding;
	__u64 old_value;
	__u64 new_value;
};

struct kvmi_vcpu_event_msr_reply {
	__u64 new_val;		/* what is written */
};

#endif /* _UAPI_ASM_X86_KVMI_H */
