/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The older view of the introspection protocol, for programs written for it;
 * see libkvmi.h.  It is not what goes over the wire.
 * The guard is the kernel header's: only one of the two can be included.
 */
#ifndef _UAPI__LINUX_KVMI_H
#define _UAPI__LINUX_KVMI_H

#include <linux/kernel.h>
#include <linux/types.h>
#include <asm/kvmi.h>

#define KVMI_VERSION 0x00000001

#define KVMI_EVENT_REPLY            0
#define KVMI_EVENT                  1
#define KVMI_GET_VERSION            2
#define KVMI_CHECK_COMMAND          3
#define KVMI_CHECK_EVENT            4
#define KVMI_GET_GUEST_INFO         5
#define KVMI_GET_VCPU_INFO          6
#define KVMI_PAUSE_VCPU             7
#define KVMI_CONTROL_VM_EVENTS      8
#define KVMI_CONTROL_EVENTS         9
#define KVMI_CONTROL_CR             10
#define KVMI_CONTROL_MSR            11
#define KVMI_CONTROL_VE             12
#define KVMI_GET_REGISTERS          13
#define KVMI_SET_REGISTERS          14
#define KVMI_GET_CPUID              15
#define KVMI_GET_XSAVE              16
#define KVMI_READ_PHYSICAL          17
#define KVMI_WRITE_PHYSICAL         18
#define KVMI_INJECT_EXCEPTION       19
#define KVMI_GET_PAGE_ACCESS        20
#define KVMI_SET_PAGE_ACCESS        21
#define KVMI_GET_MAP_TOKEN          22
#define KVMI_GET_MTRR_TYPE          23
#define KVMI_CONTROL_SPP            24
#define KVMI_GET_PAGE_WRITE_BITMAP  25
#define KVMI_SET_PAGE_WRITE_BITMAP  26
#define KVMI_CONTROL_CMD_RESPONSE   27
#define KVMI_SET_VE_INFO_PAGE       28
#define KVMI_GET_MAX_GFN            29
#define KVMI_GET_NEXT_AVAILABLE_GFN 31
#define KVMI_SWITCH_EPT_VIEW        32
#define KVMI_DISABLE_VE             33
#define KVMI_GET_EPT_VIEW           34
#define KVMI_VCPU_TRANSLATE_GVA     35
#define KVMI_CONTROL_EPT_VIEW       36
#define KVMI_VCPU_GET_XCR           37
#define KVMI_VCPU_SET_XSAVE         38
#define KVMI_QUERY_PHYSICAL         39
#define KVMI_VCPU_ALLOC_GFN         41
#define KVMI_VCPU_FREE_GFN          42
#define KVMI_CREATE_EPT_VIEW        43
#define KVMI_DESTROY_EPT_VIEW       44
#define KVMI_VCPU_CHANGE_GFN        60
#define KVMI_VCPU_CONTROL_SINGLESTEP 63
#define KVM_NUM_MESSAGES            64

#define KVMI_EVENT_UNHOOK      0
#define KVMI_EVENT_CR          1
#define KVMI_EVENT_MSR         2
#define KVMI_EVENT_XSETBV      3
#define KVMI_EVENT_BREAKPOINT  4
#define KVMI_EVENT_HYPERCALL   5
#define KVMI_EVENT_PF          6
#define KVMI_EVENT_TRAP        7
#define KVMI_EVENT_DESCRIPTOR  8
#define KVMI_EVENT_CREATE_VCPU 9
#define KVMI_EVENT_PAUSE_VCPU  10
#define KVMI_EVENT_SINGLESTEP  11
#define KVMI_EVENT_CPUID       13
#define KVMI_NUM_EVENTS        14

#define KVMI_EVENT_ACTION_CONTINUE 0
#define KVMI_EVENT_ACTION_RETRY    1
#define KVMI_EVENT_ACTION_CRASH    2

#define KVMI_PAGE_ACCESS_R   (1 << 0)
#define KVMI_PAGE_ACCESS_W   (1 << 1)
#define KVMI_PAGE_ACCESS_X   (1 << 2)
#define KVMI_PAGE_ACCESS_SVE (1 << 3)

#define KVMI_MSG_SIZE (4096 * 2 - sizeof(struct kvmi_msg_hdr))

struct kvmi_msg_hdr {
	__u16 id;
	__u16 size;
	__u32 seq;
};

struct kvmi_error_code {
	__s32 err;
	__u32 padding;
};

struct kvmi_features {
	__u8 spp;
	__u8 vmfunc;
	__u8 eptp;
	__u8 ve;
	__u8 padding[4];
};

struct kvmi_vcpu_hdr {
	__u16 vcpu;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_event {
	__u16 size;
	__u16 vcpu;
	__u8 event;
	__u8 padding[3];
	struct kvmi_event_arch arch;
};

struct kvmi_event_reply {
	__u8 action;
	__u8 event;
	__u16 padding1;
	__u32 padding2;
};

struct kvmi_event_pf {
	__u64 gva;
	__u64 gpa;
	__u8 access;
	__u8 padding1;
	__u16 view;		/* 0 */
	__u32 padding2;
};

/* Nothing in here has an effect: a page fault is answered by its action */
struct kvmi_event_pf_reply {
	__u64 ctx_addr;
	__u32 ctx_size;
	__u8 singlestep;
	__u8 rep_complete;
	__u16 padding;
	__u8 ctx_data[256];
};

struct kvmi_event_singlestep {
	__u8 failed;
	__u8 padding[7];
};

struct kvmi_page_access_entry {
	__u64 gpa;
	__u8 access;
	__u8 padding1;
	__u16 padding2;
	__u32 padding3;
};

#endif /* _UAPI__LINUX_KVMI_H */
