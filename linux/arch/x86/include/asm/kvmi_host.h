/* SPDX-License-Identifier: GPL-2.0 */
#ifndef _ASM_X86_KVMI_HOST_H
#define _ASM_X86_KVMI_HOST_H

/* What a vCPU has of introspection that is particular to x86 */
struct kvmi_vcpu_arch {
	bool intercept_bp;
};

#endif /* _ASM_X86_KVMI_HOST_H */
