// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: what a vCPU does for the tool, in its own thread
 */
#include <linux/slab.h>

#include "kvmi_int.h"
#include "trace.h"

/* Makes the vCPU's thread look at its queue, soon and wherever it is */
void kvmi_vcpu_wake(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv;

	/* Pairs with kvmi_vcpu_get(); a vCPU without state has no queue */
	kv = smp_load_acquire(&vcpu->kvmi);
	if (!kv)
		return;

	/* It is reading the socket, and looks at its queue next */
	if (vcpu == kvm_get_running_vcpu())
		return;

	/* It looks before it goes on if it waits for the tool already */
	if (wq_has_sleeper(&kv->wq)) {
		wake_up(&kv->wq);
		return;
	}

	/*
	 * A halted vCPU stays halted, for the guest; UNBLOCK only takes its
	 * thread out of the wait.  This order, as vcpu_run() clears UNBLOCK.
	 */
	kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	kvm_make_request(KVM_REQ_UNBLOCK, vcpu);
	kvm_vcpu_kick(vcpu);
}

static void kvmi_add_job(struct kvm_vcpu_introspection *kv,
			 struct kvmi_job *job, const struct kvmi_msg_hdr *hdr,
			 const void *body)
{
	lockdep_assert_held(&kv->lock);

	job->hdr = *hdr;
	memcpy(job->body, body, hdr->size);
	list_add_tail(&job->link, &kv->jobs);
	kv->nr_jobs++;
}

/* The reply is the vCPU's own: there is one at a time, and it can't be refused */
static void kvmi_free_job(struct kvmi_job *job)
{
	if (job->hdr.id != KVMI_VCPU_EVENT)
		kfree(job);
}

int kvmi_vcpu_queue(struct kvm_vcpu *vcpu, const struct kvmi_msg_hdr *hdr,
		    const void *body)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	struct kvmi_job *job;
	int err = 0;

	job = kmalloc(struct_size(job, body, hdr->size), GFP_KERNEL_ACCOUNT);
	if (!job)
		return -KVM_ENOMEM;

	spin_lock(&kv->lock);
	if (kv->nr_jobs < KVMI_MAX_JOBS)
		kvmi_add_job(kv, job, hdr, body);
	else
		err = -KVM_EBUSY;
	spin_unlock(&kv->lock);

	if (err) {
		kfree(job);
		return err;
	}

	kvmi_vcpu_wake(vcpu);
	return 0;
}

#define CONTINUE BIT(KVMI_EVENT_ACTION_CONTINUE)
#define RETRY    BIT(KVMI_EVENT_ACTION_RETRY)
#define CRASH    BIT(KVMI_EVENT_ACTION_CRASH)

struct kvmi_event_type {
	u8 actions;		/* 0: there is no such event */
	u8 reply_size;		/* what follows kvmi_vcpu_event_reply */
	bool commanded;		/* made by a command, not by CONTROL_EVENTS */
};

static const struct kvmi_event_type kvmi_event_types[KVMI_NUM_EVENTS] = {
	[KVMI_VCPU_EVENT_PAUSE] = {
		.actions = CONTINUE | CRASH,
		.commanded = true,
	},
	[KVMI_VCPU_EVENT_BREAKPOINT] = {
		.actions = CONTINUE | RETRY | CRASH,
	},
	[KVMI_VCPU_EVENT_HYPERCALL] = {
		.actions = CONTINUE | CRASH,
	},
	[KVMI_VCPU_EVENT_CR] = {
		.actions = CONTINUE | CRASH,
		.reply_size = sizeof(struct kvmi_vcpu_event_cr_reply),
	},
	[KVMI_VCPU_EVENT_XSETBV] = {
		.actions = CONTINUE | CRASH,
	},
	[KVMI_VCPU_EVENT_DESCRIPTOR] = {
		.actions = CONTINUE | RETRY | CRASH,
	},
	[KVMI_VCPU_EVENT_MSR] = {
		.actions = CONTINUE | CRASH,
		.reply_size = sizeof(struct kvmi_vcpu_event_msr_reply),
	},
	[KVMI_VCPU_EVENT_PF] = {
		.actions = CONTINUE | RETRY | CRASH,
	},
	[KVMI_VCPU_EVENT_TRAP] = {
		.actions = CONTINUE | CRASH,
		.commanded = true,
	},
	[KVMI_VCPU_EVENT_SINGLESTEP] = {
		.actions = CONTINUE | CRASH,
		.commanded = true,
	},
};

bool kvmi_vcpu_event_known(u16 id)
{
	return id < ARRAY_SIZE(kvmi_event_types) &&
	       kvmi_event_types[id].actions;
}

/*
 * Returns -EPROTO for a reply that nobody waits for or that doesn't fit the
 * event: the tool and KVM no longer agree on what the guest does.  Any error
 * ends the session.
 */
int kvmi_vcpu_queue_reply(struct kvm_vcpu *vcpu,
			  const struct kvmi_msg_hdr *hdr, const void *body)
{
	const struct kvmi_vcpu_event_reply *rpl =
		body + sizeof(struct kvmi_vcpu_hdr);
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	const struct kvmi_event_type *type;
	struct kvmi_event *ev = &kv->ev;
	int err = 0;

	if (hdr->size < sizeof(struct kvmi_vcpu_hdr) + sizeof(*rpl) ||
	    hdr->size > KVMI_MAX_EVENT_REPLY)
		return -EPROTO;
	if (rpl->padding1 || rpl->padding2)
		return -EPROTO;

	spin_lock(&kv->lock);
	type = &kvmi_event_types[ev->id];
	if (!kvmi_vcpu_in_session(vcpu) ||
	    !ev->open || !ev->sent || ev->answered || ev->seq != hdr->seq ||
	    hdr->size != sizeof(struct kvmi_vcpu_hdr) + sizeof(*rpl) +
			 type->reply_size ||
	    rpl->action > KVMI_EVENT_ACTION_CRASH ||
	    !(type->actions & BIT(rpl->action))) {
		err = -EPROTO;
	} else {
		/* Behind the commands that came before it */
		ev->answered = true;
		kvmi_add_job(kv, kv->reply, hdr, body);
	}
	spin_unlock(&kv->lock);

	if (!err)
		kvmi_vcpu_wake(vcpu);

	return err;
}

/* Returns, if asked to wait, when the vCPU can't run guest code any more */
int kvmi_vcpu_pause(struct kvm_vcpu *vcpu, bool wait)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	unsigned long *mask = NULL;
	int err = 0;

	if (wait) {
		mask = bitmap_zalloc(KVM_MAX_VCPUS, GFP_KERNEL_ACCOUNT);
		if (!mask)
			return -KVM_ENOMEM;
		__set_bit(vcpu->vcpu_idx, mask);
	}

	spin_lock(&kv->lock);
	if (kv->pauses < KVMI_MAX_PAUSES)
		kv->pauses++;
	else
		err = -KVM_EBUSY;
	spin_unlock(&kv->lock);

	if (!err) {
		kvmi_vcpu_wake(vcpu);
		if (wait)
			kvm_make_vcpus_request_mask(vcpu->kvm,
						    KVM_REQ_INTROSPECTION |
						    KVM_REQUEST_WAIT, mask);
	}

	bitmap_free(mask);
	return err;
}

static void kvmi_free_jobs(struct list_head *jobs)
{
	struct kvmi_job *job, *next;

	list_for_each_entry_safe(job, next, jobs, link)
		kvmi_free_job(job);
}

/*
 * A session has ended: empties the queue, unless another one has begun and it
 * is that one's.  But what the tool has said last of an event counts, with the
 * commands before it: stay until the vCPU has done as it was told.
 */
void kvmi_vcpu_drop_queue(struct kvm_vcpu *vcpu)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	struct kvmi_job *job, *next;
	bool keep;
	LIST_HEAD(drop);

	spin_lock(&kv->lock);
	if (kvmi_session_alive(atomic_read(&kvmi->session)))
		goto out_unlock;

	kv->pauses = 0;
	keep = kv->ev.answered;
	list_for_each_entry_safe(job, next, &kv->jobs, link) {
		if (!keep) {
			list_move_tail(&job->link, &drop);
			kv->nr_jobs--;
		} else if (job->hdr.id == KVMI_VCPU_EVENT) {
			keep = false;
		}
	}

out_unlock:
	spin_unlock(&kv->lock);
	kvmi_free_jobs(&drop);
}

/* For how long (in jiffies) it has waited for the tool's answer */
unsigned long kvmi_vcpu_waiting(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv;
	unsigned long waiting = 0;

	/* Pairs with kvmi_vcpu_get() */
	kv = smp_load_acquire(&vcpu->kvmi);
	if (!kv)
		return 0;

	spin_lock(&kv->lock);
	if (kvmi_vcpu_in_session(vcpu) &&
	    kv->ev.open && kv->ev.sent && !kv->ev.answered)
		waiting = jiffies - kv->ev.since;
	spin_unlock(&kv->lock);

	return waiting;
}

/* The vCPU is going away, and its thread is gone */
void kvmi_vcpu_free(struct kvm_vcpu_introspection *kv)
{
	kvmi_free_jobs(&kv->jobs);
	kvmi_arch_vcpu_free(&kv->arch);
	kfree(kv->reply);
	kfree(kv->out.msg);
	kfree(kv);
}

/*
 * The rest runs in the vCPU's thread, with vcpu->mutex held and the vCPU
 * loaded.
 */

static int kvmi_vcpu_get_info(struct kvm_vcpu *vcpu, const void *req,
			      size_t req_size, void *_rpl, size_t *rpl_size)
{
	struct kvmi_vcpu_get_info_reply *rpl = _rpl;

	rpl->tsc_speed = kvmi_arch_tsc_speed(vcpu);

	*rpl_size = sizeof(*rpl);
	return 0;
}

static int kvmi_vcpu_control_events(struct kvm_vcpu *vcpu, const void *_req,
				    size_t req_size, void *rpl,
				    size_t *rpl_size)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	const struct kvmi_vcpu_control_events *req = _req;
	int err = 0;

	if (req->padding1 || req->padding2 || req->enable > 1)
		return -KVM_EINVAL;
	if (!kvmi_vcpu_event_known(req->event_id))
		return -KVM_EINVAL;
	if (!test_bit(req->event_id, kvmi->event_allow))
		return -KVM_EPERM;

	if (req->event_id == KVMI_VCPU_EVENT_BREAKPOINT)
		err = kvmi_arch_control_bp(vcpu, req->enable);
	else if (req->event_id == KVMI_VCPU_EVENT_DESCRIPTOR)
		err = kvmi_arch_control_desc(vcpu, req->enable);
	if (!err)
		assign_bit(req->event_id, vcpu->kvmi->events, req->enable);

	return err;
}

static int kvmi_vcpu_get_registers(struct kvm_vcpu *vcpu, const void *req,
				   size_t req_size, void *rpl,
				   size_t *rpl_size)
{
	return kvmi_arch_get_registers(vcpu, req, req_size, rpl, rpl_size);
}

static int kvmi_vcpu_set_registers(struct kvm_vcpu *vcpu, const void *req,
				   size_t req_size, void *rpl,
				   size_t *rpl_size)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;

	if (!kv->ev.open)
		return -KVM_EOPNOTSUPP;

	memcpy(&kv->regs, req, sizeof(kv->regs));
	kv->regs_pending = true;
	return 0;
}

static int kvmi_vcpu_translate_gva(struct kvm_vcpu *vcpu, const void *_req,
				   size_t req_size, void *_rpl,
				   size_t *rpl_size)
{
	const struct kvmi_vcpu_translate_gva *req = _req;
	struct kvmi_vcpu_translate_gva_reply *rpl = _rpl;

	rpl->gpa = kvmi_arch_translate_gva(vcpu, req->gva);

	*rpl_size = sizeof(*rpl);
	return 0;
}

static int kvmi_vcpu_inject_exception(struct kvm_vcpu *vcpu, const void *_req,
				      size_t req_size, void *rpl,
				      size_t *rpl_size)
{
	const struct kvmi_vcpu_inject_exception *req = _req;

	if (!test_bit(KVMI_VCPU_EVENT_TRAP, vcpu->kvm->kvmi->event_allow))
		return -KVM_EPERM;
	if (req->padding1 || req->padding2)
		return -KVM_EINVAL;

	return kvmi_arch_inject_exception(vcpu, req);
}

static int kvmi_vcpu_control_singlestep(struct kvm_vcpu *vcpu,
					const void *_req, size_t req_size,
					void *rpl, size_t *rpl_size)
{
	const struct kvmi_vcpu_control_singlestep *req = _req;

	if (!test_bit(KVMI_VCPU_EVENT_SINGLESTEP,
		      vcpu->kvm->kvmi->event_allow))
		return -KVM_EPERM;
	if (memchr_inv(req->padding, 0, sizeof(req->padding)) ||
	    req->enable > 1)
		return -KVM_EINVAL;

	return kvmi_arch_control_singlestep(vcpu, req->enable);
}

/*
 * A command's handler returns 0 or a negative KVM_E*; the request, counted
 * from behind kvmi_vcpu_hdr, has at least the size that the table gives.  rpl
 * has room for KVMI_MAX_REPLY_SIZE bytes, is not initialised, and *rpl_size is
 * 0.
 */
struct kvmi_vcpu_cmd {
	int (*handler)(struct kvm_vcpu *vcpu, const void *req, size_t req_size,
		       void *rpl, size_t *rpl_size);
	size_t min_size;
};

#define KVMI_VCPU_CMD(_id, _handler, _size) \
	[_id] = { .handler = (_handler), .min_size = (_size) }

static const struct kvmi_vcpu_cmd kvmi_vcpu_cmds[] = {
	KVMI_VCPU_CMD(KVMI_VCPU_GET_INFO, kvmi_vcpu_get_info, 0),
	KVMI_VCPU_CMD(KVMI_VCPU_CONTROL_EVENTS, kvmi_vcpu_control_events,
		      sizeof(struct kvmi_vcpu_control_events)),
	KVMI_VCPU_CMD(KVMI_VCPU_GET_REGISTERS, kvmi_vcpu_get_registers,
		      sizeof(struct kvmi_vcpu_get_registers)),
	KVMI_VCPU_CMD(KVMI_VCPU_SET_REGISTERS, kvmi_vcpu_set_registers,
		      sizeof(struct kvm_regs)),
	KVMI_VCPU_CMD(KVMI_VCPU_TRANSLATE_GVA, kvmi_vcpu_translate_gva,
		      sizeof(struct kvmi_vcpu_translate_gva)),
	KVMI_VCPU_CMD(KVMI_VCPU_SET_SREGS, kvmi_arch_set_sregs,
		      sizeof(struct kvmi_vcpu_set_sregs)),
	KVMI_VCPU_CMD(KVMI_VCPU_SET_MSRS, kvmi_arch_set_msrs,
		      sizeof(struct kvmi_vcpu_set_msrs)),
	KVMI_VCPU_CMD(KVMI_VCPU_GET_CPUID, kvmi_arch_get_cpuid,
		      sizeof(struct kvmi_vcpu_get_cpuid)),
	KVMI_VCPU_CMD(KVMI_VCPU_GET_XCR, kvmi_arch_get_xcr,
		      sizeof(struct kvmi_vcpu_get_xcr)),
	KVMI_VCPU_CMD(KVMI_VCPU_GET_XSAVE, kvmi_arch_get_xsave, 0),
	KVMI_VCPU_CMD(KVMI_VCPU_SET_XSAVE, kvmi_arch_set_xsave,
		      sizeof(struct kvmi_vcpu_set_xsave)),
	KVMI_VCPU_CMD(KVMI_VCPU_GET_MTRR_TYPE, kvmi_arch_get_mtrr_type,
		      sizeof(struct kvmi_vcpu_get_mtrr_type)),
	KVMI_VCPU_CMD(KVMI_VCPU_CONTROL_CR, kvmi_arch_control_cr,
		      sizeof(struct kvmi_vcpu_control_cr)),
	KVMI_VCPU_CMD(KVMI_VCPU_CONTROL_MSR, kvmi_arch_control_msr,
		      sizeof(struct kvmi_vcpu_control_msr)),

	KVMI_VCPU_CMD(KVMI_VCPU_INJECT_EXCEPTION, kvmi_vcpu_inject_exception,
		      sizeof(struct kvmi_vcpu_inject_exception)),
	KVMI_VCPU_CMD(KVMI_VCPU_CONTROL_SINGLESTEP,
		      kvmi_vcpu_control_singlestep,
		      sizeof(struct kvmi_vcpu_control_singlestep)),
};

bool kvmi_vcpu_command_known(u16 id)
{
	return id < ARRAY_SIZE(kvmi_vcpu_cmds) && kvmi_vcpu_cmds[id].handler;
}

/*
 * Has userspace moved the vCPU while the event was open?  The tool speaks of
 * another state then, such as the one before a snapshot was loaded.
 */
static bool kvmi_event_moot(struct kvm_vcpu *vcpu)
{
	struct kvmi_event *ev = &vcpu->kvmi->ev;

	return ev->open && (ev->moved || kvmi_arch_linear_ip(vcpu) != ev->ip);
}

static void kvmi_event_over(struct kvm_vcpu *vcpu, int action)
{
	struct kvmi_event *ev = &vcpu->kvmi->ev;

	lockdep_assert_held(&vcpu->kvmi->lock);

	ev->open = false;
	ev->answered = false;
	trace_kvmi_event_done(vcpu, ev->id, ev->seq, action);
}

/*
 * Lets go of the open event.  rpl is NULL if the tool has gone without an
 * answer: what the vCPU wanted to do then goes the way it goes without a tool.
 * Returns 0 if the vCPU must leave to userspace, 1 if it goes on.
 */
static int kvmi_event_close(struct kvm_vcpu *vcpu,
			    const struct kvmi_vcpu_event_reply *rpl)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	struct kvmi_event ev = kv->ev;
	bool moot = kvmi_event_moot(vcpu);

	if (rpl && kv->regs_pending && !moot)
		kvmi_arch_set_regs(vcpu, &kv->regs);
	kv->regs_pending = false;

	spin_lock(&kv->lock);
	kvmi_event_over(vcpu, rpl ? rpl->action : -1);
	spin_unlock(&kv->lock);

	if (moot)
		return 1;

	if (rpl && rpl->action == KVMI_EVENT_ACTION_CRASH) {
		vcpu->run->exit_reason = KVM_EXIT_SYSTEM_EVENT;
		vcpu->run->system_event.type = KVM_SYSTEM_EVENT_CRASH;
		vcpu->run->system_event.ndata = 0;
		return 0;
	}

	if (rpl && rpl->action == KVMI_EVENT_ACTION_RETRY)
		return 1;

	return kvmi_arch_event_done(vcpu, &ev, rpl ? rpl + 1 : NULL);
}

/* Takes what the tool has said last of the event out of the queue */
static void kvmi_take_answer(struct kvm_vcpu_introspection *kv,
			     struct list_head *taken)
{
	struct kvmi_job *job, *next;

	lockdep_assert_held(&kv->lock);

	list_for_each_entry_safe(job, next, &kv->jobs, link) {
		list_move_tail(&job->link, taken);
		kv->nr_jobs--;
		if (job->hdr.id == KVMI_VCPU_EVENT)
			break;
	}
	kv->ev.answered = false;
}

/* Puts away what belongs to a session that has ended */
static int kvmi_vcpu_follow_session(struct kvm_vcpu *vcpu)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	int session = atomic_read_acquire(&kvmi->session);
	bool answered, cleanup;
	LIST_HEAD(drop);

	if (kv->session == session)
		return 1;

	/* Its last word is in the queue already, or it comes too late */
	spin_lock(&kv->lock);
	if (kv->ev.answered && kvmi_event_moot(vcpu))
		kvmi_take_answer(kv, &drop);
	answered = kv->ev.answered;
	if (!answered)
		kv->ev.sent = false;
	spin_unlock(&kv->lock);
	kvmi_free_jobs(&drop);
	if (answered)
		return 1;

	/* Before this vCPU no longer intercepts what would hit it */
	kvmi_journal_restore(kvmi, false);

	cleanup = !test_bit(kvmi_cleanup_bit(kv->session), &kvmi->no_cleanup);
	/* As it was the last one's event, the next one can't answer it */
	WRITE_ONCE(kv->session, session);
	kv->out.size = 0;
	bitmap_zero(kv->events, KVMI_NUM_EVENTS);
	kvmi_arch_session_over(vcpu);
	if (cleanup)
		kvmi_arch_cleanup(vcpu);

	return kv->ev.open ? kvmi_event_close(vcpu, NULL) : 1;
}

/* Has it been told something by the session that is alive? */
bool kvmi_vcpu_in_session(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	int session = atomic_read(&vcpu->kvm->kvmi->session);

	return kv && kvmi_session_alive(session) &&
	       READ_ONCE(kv->session) == session;
}

/* Returns false if the tool doesn't want to know of it */
static bool kvmi_event_open(struct kvm_vcpu *vcpu, u16 id, const void *data,
			    size_t size)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;

	if (!kvmi_vcpu_in_session(vcpu))
		return false;
	if (!kvmi_event_types[id].commanded && !test_bit(id, kv->events))
		return false;
	if (WARN_ON_ONCE(kv->ev.open || size > sizeof(kv->ev.data)))
		return false;

	kv->ev.ip = kvmi_arch_linear_ip(vcpu);
	kv->ev.moved = false;
	kv->ev.data_size = size;
	memcpy(kv->ev.data, data, size);

	spin_lock(&kv->lock);
	kv->ev.id = id;
	kv->ev.open = true;
	kv->ev.sent = false;
	kv->ev.answered = false;
	spin_unlock(&kv->lock);

	return true;
}

/*
 * The vCPU has reached something that the tool wants to know of.  Returns
 * false if it does not; else the vCPU's next pass through the run loop sends
 * the event and waits for the reply.
 */
bool kvmi_vcpu_raise(struct kvm_vcpu *vcpu, u16 id, const void *data,
		     size_t size)
{
	if (!kvmi_event_open(vcpu, id, data, size))
		return false;

	kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return true;
}

static void kvmi_event_prepare(struct kvm_vcpu *vcpu)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	struct {
		struct kvmi_msg_hdr hdr;
		struct kvmi_event_hdr ev;
		struct kvmi_vcpu_event common;
		u8 data[];
	} *msg = kv->out.msg;
	u32 seq = atomic64_inc_return(&kvmi->nr_events);

	memset(msg, 0, sizeof(*msg));
	msg->ev.event = kv->ev.id;
	msg->common.size = sizeof(msg->common);
	msg->common.vcpu = vcpu->vcpu_idx;
	kvmi_arch_get_event_state(vcpu, &msg->common.arch);

	memcpy(msg->data, kv->ev.data, kv->ev.data_size);

	kv->out.size = sizeof(*msg) + kv->ev.data_size;
	msg->hdr.id = KVMI_VCPU_EVENT;
	msg->hdr.seq = seq;
	msg->hdr.size = kv->out.size - sizeof(msg->hdr);

	/* From here on the reply may come */
	spin_lock(&kv->lock);
	kv->ev.seq = seq;
	kv->ev.since = jiffies;
	kv->ev.sent = true;
	spin_unlock(&kv->lock);

	trace_kvmi_event(vcpu, kv->ev.id, seq, kv->ev.ip);
}

static void kvmi_run_command(struct kvm_vcpu *vcpu, const struct kvmi_job *job)
{
	const struct kvmi_vcpu_cmd *cmd = &kvmi_vcpu_cmds[job->hdr.id];
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	size_t req_size = job->hdr.size - sizeof(struct kvmi_vcpu_hdr);
	size_t rpl_size = 0;
	int ec = -KVM_EINVAL;

	if (req_size >= cmd->min_size)
		ec = cmd->handler(vcpu,
				  job->body + sizeof(struct kvmi_vcpu_hdr),
				  req_size, kvmi_out_reply(&kv->out),
				  &rpl_size);

	kvmi_out_reply_done(&kv->out, &job->hdr, ec, rpl_size);
}

/*
 * Is what is queued for the session that this vCPU follows?  Who queues for
 * the next one does so after it has begun.
 */
static bool kvmi_queue_is_mine(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;

	lockdep_assert_held(&kv->lock);

	/* The last word of a session that has ended comes before the next's */
	return kv->ev.answered ||
	       atomic_read(&vcpu->kvm->kvmi->session) == kv->session;
}

static struct kvmi_job *kvmi_next_job(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	struct kvmi_job *job = NULL;

	spin_lock(&kv->lock);
	if (kvmi_queue_is_mine(vcpu))
		job = list_first_entry_or_null(&kv->jobs, struct kvmi_job,
					       link);
	if (job) {
		list_del(&job->link);
		kv->nr_jobs--;
	}
	spin_unlock(&kv->lock);

	return job;
}

static bool kvmi_take_pause(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	bool pause;

	spin_lock(&kv->lock);
	pause = kv->pauses > 0 && kvmi_queue_is_mine(vcpu);
	if (pause)
		kv->pauses--;
	spin_unlock(&kv->lock);

	return pause;
}

/*
 * This vCPU is going to read the socket.  It says so before the event is sent:
 * a tool that is quick shall not find that nobody waits.
 */
static void kvmi_vcpu_will_read(struct kvm_vcpu *vcpu)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;

	spin_lock_irq(&kvmi->waiters_lock);
	if (list_empty(&kv->waiter))
		list_add(&kv->waiter, &kvmi->waiters);
	spin_unlock_irq(&kvmi->waiters_lock);
}

static void kvmi_vcpu_wont_read(struct kvm_vcpu *vcpu)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;

	if (list_empty(&kv->waiter))
		return;

	spin_lock_irq(&kvmi->waiters_lock);
	list_del_init(&kv->waiter);
	spin_unlock_irq(&kvmi->waiters_lock);

	kvmi_receive_pass_on(kvmi);
}

/* For as long as the tool likes, so never without a way out by a signal */
static int kvmi_vcpu_wait(struct kvm_vcpu *vcpu)
{
	struct kvm_introspection *kvmi = vcpu->kvm->kvmi;
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	int err;

	kvm_vcpu_srcu_read_unlock(vcpu);

	kvmi_vcpu_will_read(vcpu);
	err = wait_event_interruptible(kv->wq,
				       !list_empty_careful(&kv->jobs) ||
				       atomic_read(&kvmi->session) !=
				       kv->session ||
				       kvmi_may_receive(kvmi));
	if (!err)
		err = kvmi_receive(kvmi, kv);

	kvm_vcpu_srcu_read_lock(vcpu);

	return err ? -EINTR : 0;
}

static int kvmi_vcpu_send(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	int err;

	kvm_vcpu_srcu_read_unlock(vcpu);
	err = kvmi_out_send(vcpu->kvm->kvmi, &kv->out, kv->session);
	kvm_vcpu_srcu_read_lock(vcpu);

	return err == -EINTR ? err : 0;
}

/*
 * Has the tool said that the vCPU may go on, and nothing else?  If not, it is
 * left for the run loop.
 */
static bool kvmi_take_consent(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	const struct kvmi_vcpu_event_reply *rpl;
	struct kvmi_job *job;
	bool consent, more;

	spin_lock(&kv->lock);
	job = list_first_entry_or_null(&kv->jobs, struct kvmi_job, link);
	rpl = job ? (void *)job->body + sizeof(struct kvmi_vcpu_hdr) : NULL;
	consent = kv->ev.answered && job->hdr.id == KVMI_VCPU_EVENT &&
		  rpl->action == KVMI_EVENT_ACTION_CONTINUE;
	if (consent) {
		list_del(&job->link);
		kv->nr_jobs--;
		kvmi_event_over(vcpu, rpl->action);
	}
	/* Who queued it found the vCPU waiting, and made no request */
	more = kv->nr_jobs || kv->pauses;
	spin_unlock(&kv->lock);

	if (!consent || more || !kvmi_vcpu_in_session(vcpu))
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	return consent;
}

/*
 * As kvmi_vcpu_raise(), but in the midst of something that would have to be
 * begun anew when the event is answered.  The tool is asked right here, and if
 * it lets the vCPU go on, as most do, false is returned as well.  Whatever else
 * it wants, and all that userspace can see of the wait, is the run loop's.
 */
bool kvmi_vcpu_ask(struct kvm_vcpu *vcpu, u16 id, const void *data, size_t size)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	int err;

	if (!kvmi_event_open(vcpu, id, data, size))
		return false;

	/* If userspace just wants KVM to complete something, it wants it now */
	if (kv->out.size || !vcpu->wants_to_run) {
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
		return true;
	}

	kvmi_event_prepare(vcpu);
	kvmi_vcpu_will_read(vcpu);
	err = kvmi_vcpu_send(vcpu);
	while (!err && list_empty_careful(&kv->jobs) &&
	       kvmi_vcpu_in_session(vcpu))
		err = kvmi_vcpu_wait(vcpu);
	kvmi_vcpu_wont_read(vcpu);

	return !kvmi_take_consent(vcpu);
}

/*
 * Does one thing that the tool wants.  Returns 1 if there was something, 0 if
 * there was nothing, and -EINTR if userspace wants the thread; *r is what
 * KVM_RUN's loop shall do.
 */
static int kvmi_vcpu_step(struct kvm_vcpu *vcpu, int *r)
{
	struct kvm_vcpu_introspection *kv = vcpu->kvmi;
	struct kvmi_job *job;
	int err;

	*r = kvmi_vcpu_follow_session(vcpu);
	if (*r <= 0)
		return 1;

	if (!kvmi_session_alive(kv->session)) {
		kvmi_vcpu_drop_queue(vcpu);
		return 0;
	}

	if (kv->out.size)
		return kvmi_vcpu_send(vcpu) ?: 1;

	if (!kv->ev.open)
		kvmi_arch_report_step(vcpu);

	if (kv->ev.open && !kv->ev.sent) {
		kvmi_event_prepare(vcpu);
		kvmi_vcpu_will_read(vcpu);
		return 1;
	}

	job = kvmi_next_job(vcpu);
	if (job) {
		if (job->hdr.id == KVMI_VCPU_EVENT)
			*r = kvmi_event_close(vcpu, (void *)job->body +
					      sizeof(struct kvmi_vcpu_hdr));
		else
			kvmi_run_command(vcpu, job);
		kvmi_free_job(job);
		return 1;
	}

	if (kv->ev.open) {
		err = kvmi_vcpu_wait(vcpu);
		return err ?: 1;
	}

	/* Its event comes before all others */
	if (kvmi_arch_exception_due(vcpu))
		return 0;

	if (kvmi_take_pause(vcpu)) {
		kvmi_vcpu_raise(vcpu, KVMI_VCPU_EVENT_PAUSE, NULL, 0);
		return 1;
	}

	return 0;
}

/*
 * Called within kvm->srcu read side by KVM_RUN's loop.  Returns 1 to let it
 * go on; else the vCPU leaves to userspace, with the event still open if it
 * was, and takes up the wait where it was when it is run again.
 */
int kvmi_vcpu_handle_request(struct kvm_vcpu *vcpu)
{
	int again, r = 1;

	if (!kvm_check_request(KVM_REQ_INTROSPECTION, vcpu))
		return 1;

	/* Who made the request had found or made it */
	if (WARN_ON_ONCE(!vcpu->kvmi))
		return 1;

	do {
		again = kvmi_vcpu_step(vcpu, &r);
		/* A tool that has something new each time gets no further */
		if (again > 0 && r > 0 && signal_pending(current))
			again = -EINTR;
		cond_resched();
	} while (again > 0 && r > 0);
	kvmi_vcpu_wont_read(vcpu);

	if (again)
		kvm_make_request(KVM_REQ_INTROSPECTION, vcpu);
	if (again < 0) {
		kvm_handle_signal_exit(vcpu);
		return again;
	}

	return r;
}
