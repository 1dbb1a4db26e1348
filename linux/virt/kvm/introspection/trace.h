/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvmi

#if !defined(_TRACE_KVMI_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_KVMI_H

#include <linux/kvm_host.h>
#include <linux/tracepoint.h>

TRACE_DEFINE_ENUM(KVM_INTROSPECTION_END_NONE);
TRACE_DEFINE_ENUM(KVM_INTROSPECTION_END_UNHOOK);
TRACE_DEFINE_ENUM(KVM_INTROSPECTION_END_CLOSED);
TRACE_DEFINE_ENUM(KVM_INTROSPECTION_END_PROTOCOL);
TRACE_DEFINE_ENUM(KVM_INTROSPECTION_END_UNREAD);
TRACE_DEFINE_ENUM(KVM_INTROSPECTION_END_KILLED);

#define kvmi_show_end(reason)						\
	__print_symbolic(reason,					\
		{ KVM_INTROSPECTION_END_NONE, "none" },			\
		{ KVM_INTROSPECTION_END_UNHOOK, "unhook" },		\
		{ KVM_INTROSPECTION_END_CLOSED, "closed" },		\
		{ KVM_INTROSPECTION_END_PROTOCOL, "protocol" },		\
		{ KVM_INTROSPECTION_END_UNREAD, "unread" },		\
		{ KVM_INTROSPECTION_END_KILLED, "killed" })

TRACE_EVENT(kvmi_hook,
	TP_PROTO(struct kvm *kvm),
	TP_ARGS(kvm),

	TP_STRUCT__entry(
		__field(pid_t, vm)
	),

	TP_fast_assign(
		__entry->vm = kvm->userspace_pid;
	),

	TP_printk("vm %d", __entry->vm)
);

TRACE_EVENT(kvmi_session_end,
	TP_PROTO(struct kvm *kvm, u32 reason),
	TP_ARGS(kvm, reason),

	TP_STRUCT__entry(
		__field(pid_t, vm)
		__field(u32, reason)
	),

	TP_fast_assign(
		__entry->vm = kvm->userspace_pid;
		__entry->reason = reason;
	),

	TP_printk("vm %d reason %s", __entry->vm,
		  kvmi_show_end(__entry->reason))
);

TRACE_EVENT(kvmi_preunhook,
	TP_PROTO(struct kvm *kvm, int err),
	TP_ARGS(kvm, err),

	TP_STRUCT__entry(
		__field(pid_t, vm)
		__field(int, err)
	),

	TP_fast_assign(
		__entry->vm = kvm->userspace_pid;
		__entry->err = err;
	),

	TP_printk("vm %d error %d", __entry->vm, __entry->err)
);

TRACE_EVENT(kvmi_unhook,
	TP_PROTO(struct kvm *kvm, u32 reason, unsigned int restored),
	TP_ARGS(kvm, reason, restored),

	TP_STRUCT__entry(
		__field(pid_t, vm)
		__field(u32, reason)
		__field(unsigned int, restored)
	),

	TP_fast_assign(
		__entry->vm = kvm->userspace_pid;
		__entry->reason = reason;
		__entry->restored = restored;
	),

	TP_printk("vm %d reason %s restored %u", __entry->vm,
		  kvmi_show_end(__entry->reason), __entry->restored)
);

TRACE_EVENT(kvmi_command,
	TP_PROTO(struct kvm *kvm, u16 id, u32 seq, u16 size),
	TP_ARGS(kvm, id, seq, size),

	TP_STRUCT__entry(
		__field(pid_t, vm)
		__field(u32, seq)
		__field(u16, id)
		__field(u16, size)
	),

	TP_fast_assign(
		__entry->vm = kvm->userspace_pid;
		__entry->seq = seq;
		__entry->id = id;
		__entry->size = size;
	),

	TP_printk("vm %d id %u seq %u size %u", __entry->vm, __entry->id,
		  __entry->seq, __entry->size)
);

TRACE_EVENT(kvmi_event,
	TP_PROTO(struct kvm_vcpu *vcpu, u16 id, u32 seq, unsigned long ip),
	TP_ARGS(vcpu, id, seq, ip),

	TP_STRUCT__entry(
		__field(unsigned long, ip)
		__field(int, vcpu)
		__field(u32, seq)
		__field(u16, id)
	),

	TP_fast_assign(
		__entry->ip = ip;
		__entry->vcpu = vcpu->vcpu_id;
		__entry->seq = seq;
		__entry->id = id;
	),

	TP_printk("vcpu %d id %u seq %u ip 0x%lx", __entry->vcpu, __entry->id,
		  __entry->seq, __entry->ip)
);

TRACE_EVENT(kvmi_event_done,
	TP_PROTO(struct kvm_vcpu *vcpu, u16 id, u32 seq, int action),
	TP_ARGS(vcpu, id, seq, action),

	TP_STRUCT__entry(
		__field(int, vcpu)
		__field(int, action)
		__field(u32, seq)
		__field(u16, id)
	),

	TP_fast_assign(
		__entry->vcpu = vcpu->vcpu_id;
		__entry->action = action;
		__entry->seq = seq;
		__entry->id = id;
	),

	TP_printk("vcpu %d id %u seq %u action %s", __entry->vcpu,
		  __entry->id, __entry->seq,
		  __print_symbolic(__entry->action,
			{ -1, "none" },
			{ KVMI_EVENT_ACTION_CONTINUE, "continue" },
			{ KVMI_EVENT_ACTION_RETRY, "retry" },
			{ KVMI_EVENT_ACTION_CRASH, "crash" }))
);

TRACE_EVENT(kvmi_restore,
	TP_PROTO(struct kvm *kvm, u64 gpa, u8 before, bool restored),
	TP_ARGS(kvm, gpa, before, restored),

	TP_STRUCT__entry(
		__field(u64, gpa)
		__field(pid_t, vm)
		__field(u8, before)
		__field(bool, restored)
	),

	TP_fast_assign(
		__entry->gpa = gpa;
		__entry->vm = kvm->userspace_pid;
		__entry->before = before;
		__entry->restored = restored;
	),

	TP_printk("vm %d gpa 0x%llx byte 0x%x %s", __entry->vm, __entry->gpa,
		  __entry->before,
		  __entry->restored ? "restored" : "left alone")
);

#endif /* _TRACE_KVMI_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH ../../virt/kvm/introspection
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace

#include <trace/define_trace.h>
