/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _ASM_X86_KVMI_HOST_H
#define _ASM_X86_KVMI_HOST_H

#include <linux/bitmap.h>
#include <linux/types.h>
#include <asm/text-patching.h>

/* What a tool writes over an instruction to be told */
#define KVMI_BREAKPOINT_BYTE INT3_INSN_OPCODE

/* MSRs 0..0x1fff and 0xc0000000..0xc0001fff */
#define KVMI_NUM_MSRS 0x2000

struct kvmi_msr_map {
	DECLARE_BITMAP(low, KVMI_NUM_MSRS);
	DECLARE_BITMAP(high, KVMI_NUM_MSRS);
};

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

/* Single-stepping */
struct kvmi_step {
	bool no_apicv;		/* was on, in this session */
	bool begun;		/* the guest has been entered to do a step */
	bool done;		/* the CPU says so */
	bool moved;		/* userspace or a reset was faster */
	bool halted;		/* the step was a HLT: an interrupt ends it */
	unsigned long ip;	/* linear; where the step began */
	u64 halt_exits;
};

enum kvmi_exception_state {
	KVMI_EXCEPTION_NONE,
	KVMI_EXCEPTION_WAITS,	/* for the next chance to be injected */
	KVMI_EXCEPTION_DUE,	/* what is injected next is reported */
};

/* The exception that the tool injects */
struct kvmi_exception {
	enum kvmi_exception_state state;
	bool reported;		/* what is being injected has had its event */
	bool as_fault;		/* no INT3 or INTO makes this #BP or #OF */
	u8 nr;
	u32 error_code;
	u64 address;
};

/* What a vCPU has of introspection that is particular to x86 */
struct kvmi_vcpu_arch {
	bool intercept_bp;
	struct kvmi_pf pf;
	bool injecting;		/* KVM does for the guest what its CPU would */

	u8 intercept_crs;		/* a bit for each CR */
	bool intercept_desc;
	struct kvmi_msr_map *intercept_msrs;	/* NULL: never needed */

	/* The instruction that the open event is about */
	unsigned long rip;
	bool emulated;			/* the emulator has come to it */
	bool cr3_noflush;
	/* While it is completed: the id of the event, and what is written */
	u16 completing;
	u32 target;			/* the number of the CR or the MSR */
	u64 value;
	struct kvmi_step step;
	struct kvmi_exception exception;
};

#endif /* _ASM_X86_KVMI_HOST_H */
