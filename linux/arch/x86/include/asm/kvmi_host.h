/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _ASM_X86_KVMI_HOST_H
#define _ASM_X86_KVMI_HOST_H

#include <linux/types.h>
#include <asm/text-patching.h>

/* What a tool writes over an instruction to be told */
#define KVMI_BREAKPOINT_BYTE INT3_INSN_OPCODE

/* The access to a restricted page that is being dealt with */
struct kvmi_pf {
	u64 exits;		/* since which the rest holds: stat.exits */
	bool faulted;
	u8 access;
	u64 gpa;

	/* What the tool has let pass of the instruction's accesses */
	unsigned int nr_granted;
	struct {
		u64 gfn;
		u8 access;
	} granted[16];
};

/* What a vCPU has of introspection that is particular to x86 */
struct kvmi_vcpu_arch {
	bool intercept_bp;
	struct kvmi_pf pf;
};

#endif /* _ASM_X86_KVMI_HOST_H */
