/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _ASM_X86_KVMI_HOST_H
#define _ASM_X86_KVMI_HOST_H

#include <linux/types.h>

/* Single-stepping */
struct kvmi_step {
	bool on;		/* the tool wants it */
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
	struct kvmi_step step;
	struct kvmi_exception exception;
};

#endif /* _ASM_X86_KVMI_HOST_H */
