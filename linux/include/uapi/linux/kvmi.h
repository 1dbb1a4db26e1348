/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
#ifndef _UAPI__LINUX_KVMI_H
#define _UAPI__LINUX_KVMI_H

/*
 * The protocol between KVM and an introspection tool.
 *
 * All numbers are in host byte order and naturally aligned.  Padding is zero,
 * in both directions.  See Documentation/virt/kvm/kvmi.rst.
 */

#include <linux/types.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <asm/kvmi.h>

#define KVMI_VERSION 0x00000001

/* The largest value of kvmi_msg_hdr.size */
#define KVMI_MAX_MSG_SIZE (2 * 4096 - sizeof(struct kvmi_msg_hdr))

/*
 * VM messages are even, vCPU messages are odd.  The same rule holds, in an id
 * space of its own, for events.
 */
#define KVMI_VM_MESSAGE_ID(id)   ((id) << 1)
#define KVMI_VCPU_MESSAGE_ID(id) (((id) << 1) | 1)
#define KVMI_VM_EVENT_ID(id)     ((id) << 1)
#define KVMI_VCPU_EVENT_ID(id)   (((id) << 1) | 1)

enum {
	KVMI_VM_EVENT = KVMI_VM_MESSAGE_ID(0),

	KVMI_GET_VERSION           = KVMI_VM_MESSAGE_ID(1),
	KVMI_VM_CHECK_COMMAND      = KVMI_VM_MESSAGE_ID(2),
	KVMI_VM_CHECK_EVENT        = KVMI_VM_MESSAGE_ID(3),
	KVMI_VM_GET_INFO           = KVMI_VM_MESSAGE_ID(4),
	KVMI_VM_CONTROL_EVENTS     = KVMI_VM_MESSAGE_ID(5),
	KVMI_VM_READ_PHYSICAL      = KVMI_VM_MESSAGE_ID(6),
	KVMI_VM_WRITE_PHYSICAL     = KVMI_VM_MESSAGE_ID(7),
	KVMI_VM_PAUSE_VCPU         = KVMI_VM_MESSAGE_ID(8),
	KVMI_VM_CONTROL_CLEANUP    = KVMI_VM_MESSAGE_ID(9),
	KVMI_VM_SET_PAGE_ACCESS    = KVMI_VM_MESSAGE_ID(10),

	/* Not in version 12; announced in kvmi_features */
	KVMI_VM_GET_PAGE_ACCESS    = KVMI_VM_MESSAGE_ID(16),
	KVMI_VM_GET_MAX_GFN        = KVMI_VM_MESSAGE_ID(17),

	KVMI_NEXT_VM_MESSAGE
};

enum {
	KVMI_VCPU_EVENT = KVMI_VCPU_MESSAGE_ID(0),

	KVMI_VCPU_GET_INFO           = KVMI_VCPU_MESSAGE_ID(1),
	KVMI_VCPU_CONTROL_EVENTS     = KVMI_VCPU_MESSAGE_ID(2),
	KVMI_VCPU_GET_REGISTERS      = KVMI_VCPU_MESSAGE_ID(3),
	KVMI_VCPU_SET_REGISTERS      = KVMI_VCPU_MESSAGE_ID(4),
	KVMI_VCPU_GET_CPUID          = KVMI_VCPU_MESSAGE_ID(5),
	KVMI_VCPU_CONTROL_CR         = KVMI_VCPU_MESSAGE_ID(6),
	KVMI_VCPU_INJECT_EXCEPTION   = KVMI_VCPU_MESSAGE_ID(7),
	KVMI_VCPU_GET_XCR            = KVMI_VCPU_MESSAGE_ID(8),
	KVMI_VCPU_GET_XSAVE          = KVMI_VCPU_MESSAGE_ID(9),
	KVMI_VCPU_SET_XSAVE          = KVMI_VCPU_MESSAGE_ID(10),
	KVMI_VCPU_GET_MTRR_TYPE      = KVMI_VCPU_MESSAGE_ID(11),
	KVMI_VCPU_CONTROL_MSR        = KVMI_VCPU_MESSAGE_ID(12),
	KVMI_VCPU_CONTROL_SINGLESTEP = KVMI_VCPU_MESSAGE_ID(13),
	KVMI_VCPU_TRANSLATE_GVA      = KVMI_VCPU_MESSAGE_ID(14),

	/* Not in version 12; announced in kvmi_features */
	KVMI_VCPU_SET_SREGS          = KVMI_VCPU_MESSAGE_ID(15),
	KVMI_VCPU_SET_MSRS           = KVMI_VCPU_MESSAGE_ID(16),

	KVMI_NEXT_VCPU_MESSAGE
};

enum {
	KVMI_VM_EVENT_UNHOOK = KVMI_VM_EVENT_ID(0),

	KVMI_NEXT_VM_EVENT
};

enum {
	KVMI_VCPU_EVENT_PAUSE      = KVMI_VCPU_EVENT_ID(0),
	KVMI_VCPU_EVENT_HYPERCALL  = KVMI_VCPU_EVENT_ID(1),
	KVMI_VCPU_EVENT_BREAKPOINT = KVMI_VCPU_EVENT_ID(2),
	KVMI_VCPU_EVENT_CR         = KVMI_VCPU_EVENT_ID(3),
	KVMI_VCPU_EVENT_TRAP       = KVMI_VCPU_EVENT_ID(4),
	KVMI_VCPU_EVENT_XSETBV     = KVMI_VCPU_EVENT_ID(5),
	KVMI_VCPU_EVENT_DESCRIPTOR = KVMI_VCPU_EVENT_ID(6),
	KVMI_VCPU_EVENT_MSR        = KVMI_VCPU_EVENT_ID(7),
	KVMI_VCPU_EVENT_PF         = KVMI_VCPU_EVENT_ID(8),
	KVMI_VCPU_EVENT_SINGLESTEP = KVMI_VCPU_EVENT_ID(9),

	KVMI_NEXT_VCPU_EVENT
};

#define KVMI_EVENT_ACTION_CONTINUE 0
#define KVMI_EVENT_ACTION_RETRY    1
#define KVMI_EVENT_ACTION_CRASH    2

/*
 * Errors on the wire are negative KVM_E* numbers; those that
 * linux/kvm_para.h lacks are equal to the errno of that name.
 */
#ifndef KVM_ENOENT
#define KVM_ENOENT 2
#endif
#ifndef KVM_EAGAIN
#define KVM_EAGAIN 11
#endif
#ifndef KVM_ENOMEM
#define KVM_ENOMEM 12
#endif
#ifndef KVM_EBUSY
#define KVM_EBUSY 16
#endif
#ifndef KVM_E2BIG
#define KVM_E2BIG 7
#endif

/* Starts every message; 8 bytes */
struct kvmi_msg_hdr {
	__u16 id;
	__u16 size;		/* bytes that follow this structure */
	__u32 seq;
};

/* Starts every command reply; 8 bytes */
struct kvmi_error_code {
	__s32 err;		/* 0 or a negative KVM_E* */
	__u32 padding;
};

/* Starts every vCPU command and every event reply; 8 bytes */
struct kvmi_vcpu_hdr {
	__u16 vcpu;		/* index of the vCPU, in order of creation */
	__u16 padding1;
	__u32 padding2;
};

/* Starts every event; 8 bytes */
struct kvmi_event_hdr {
	__u16 event;
	__u16 padding[3];
};

/* Follows kvmi_event_hdr in every vCPU event */
struct kvmi_vcpu_event {
	__u16 size;		/* event data begins that far from here */
	__u16 vcpu;
	__u32 padding;
	struct kvmi_vcpu_event_arch arch;
};

/* Follows kvmi_vcpu_hdr in every event reply; 8 bytes */
struct kvmi_vcpu_event_reply {
	__u8 action;		/* KVMI_EVENT_ACTION_* */
	__u8 event;
	__u16 padding1;
	__u32 padding2;
};

/* KVMI_GET_VERSION */
struct kvmi_features {
	__u8 singlestep;
	__u8 get_page_access;	/* KVMI_VM_GET_PAGE_ACCESS */
	__u8 get_max_gfn;	/* KVMI_VM_GET_MAX_GFN */
	__u8 journal;		/* KVMI_WRITE_* */
	__u8 set_sregs;		/* KVMI_VCPU_SET_SREGS */
	__u8 set_msrs;		/* KVMI_VCPU_SET_MSRS */
	__u8 padding[2];
};

struct kvmi_get_version_reply {
	__u32 version;		/* KVMI_VERSION */
	__u32 max_msg_size;	/* KVMI_MAX_MSG_SIZE */
	struct kvmi_features features;
};

/* KVMI_VM_CHECK_COMMAND */
struct kvmi_vm_check_command {
	__u16 id;
	__u16 padding1;
	__u32 padding2;
};

/* KVMI_VM_CHECK_EVENT */
struct kvmi_vm_check_event {
	__u16 id;
	__u16 padding1;
	__u32 padding2;
};

/* KVMI_VM_GET_INFO */
struct kvmi_vm_get_info_reply {
	__u32 vcpu_count;
	__u32 padding[3];
};

/* KVMI_VM_CONTROL_EVENTS */
struct kvmi_vm_control_events {
	__u16 event_id;
	__u8 enable;
	__u8 padding1;
	__u32 padding2;
};

/* KVMI_VM_READ_PHYSICAL; the reply is `size' bytes */
struct kvmi_vm_read_physical {
	__u64 gpa;
	__u16 size;		/* at least 1; the range is inside one page */
	__u16 padding1;
	__u32 padding2;
};

/*
 * KVMI_VM_WRITE_PHYSICAL
 *
 * When the session ends, KVM takes back the INT3s that are there still; with
 * KVMI_WRITE_JOURNAL, all of the write; with KVMI_WRITE_KEEP, nothing of it.
 */
#define KVMI_WRITE_JOURNAL (1 << 0)
#define KVMI_WRITE_KEEP    (1 << 1)

struct kvmi_vm_write_physical {
	__u64 gpa;
	__u16 size;		/* at least 1; the range is inside one page */
	__u16 flags;		/* KVMI_WRITE_* */
	__u32 padding2;
	__u8 data[];
};

/* KVMI_VM_PAUSE_VCPU */
struct kvmi_vm_pause_vcpu {
	__u16 vcpu;
	__u8 wait;
	__u8 padding1;
	__u32 padding2;
};

/* KVMI_VM_CONTROL_CLEANUP */
struct kvmi_vm_control_cleanup {
	__u8 enable;
	__u8 padding[7];
};

/* KVMI_VCPU_CONTROL_EVENTS */
struct kvmi_vcpu_control_events {
	__u16 event_id;
	__u8 enable;
	__u8 padding1;
	__u32 padding2;
};

/*
 * KVMI_VM_SET_PAGE_ACCESS: what the guest may do without notice with the page
 * at gpa (the offset in the page is ignored)
 */
#define KVMI_PAGE_ACCESS_R (1 << 0)
#define KVMI_PAGE_ACCESS_W (1 << 1)
#define KVMI_PAGE_ACCESS_X (1 << 2)

struct kvmi_page_access_entry {
	__u64 gpa;
	__u8 access;		/* KVMI_PAGE_ACCESS_* */
	__u8 padding[7];
};

struct kvmi_vm_set_page_access {
	__u16 count;
	__u16 padding1;
	__u32 padding2;
	struct kvmi_page_access_entry entries[];
};

/* KVMI_VCPU_CONTROL_SINGLESTEP */
struct kvmi_vcpu_control_singlestep {
	__u8 enable;
	__u8 padding[7];
};

/* KVMI_VCPU_EVENT_SINGLESTEP */
struct kvmi_vcpu_event_singlestep {
	__u8 failed;
	__u8 padding[7];
};

/* KVMI_VM_GET_PAGE_ACCESS */
struct kvmi_vm_get_page_access {
	__u64 gpa;
};

struct kvmi_vm_get_page_access_reply {
	__u8 access;		/* KVMI_PAGE_ACCESS_* */
	__u8 padding[7];
};

/* KVMI_VM_GET_MAX_GFN */
struct kvmi_vm_get_max_gfn_reply {
	__u64 gfn;		/* the highest that has memory */
};

/*
 * KVMI_VCPU_EVENT_PF
 *
 * KVMI_PF_NOT_EMULATED: KVM can't do this access for the guest.  To continue
 * takes the restriction off the page.
 */
#define KVMI_PF_NOT_EMULATED (1 << 0)

struct kvmi_vcpu_event_pf {
	__u64 gva;		/* all ones: not known */
	__u64 gpa;
	__u8 access;		/* the one KVMI_PAGE_ACCESS_* that is needed */
	__u8 flags;		/* KVMI_PF_* */
	__u16 padding2;
	__u32 padding3;
};

/* KVMI_VCPU_TRANSLATE_GVA */
struct kvmi_vcpu_translate_gva {
	__u64 gva;
};

struct kvmi_vcpu_translate_gva_reply {
	__u64 gpa;		/* all ones: not mapped */
};

#endif /* _UAPI__LINUX_KVMI_H */
