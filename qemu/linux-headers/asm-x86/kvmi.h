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

/* KVMI_VCPU_EVENT_BREAKPOINT */
struct kvmi_vcpu_event_breakpoint {
	__u64 gpa;		/* of the INT3; all ones: not mapped */
	__u8 insn_len;
	__u8 padding[7];
};

#endif /* _UAPI_ASM_X86_KVMI_H */
