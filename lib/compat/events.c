/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Events and their answers; leaving the guest as it was */

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "compat.h"

/* All of it: below QEMU's deadline, 5 s.  Until all vCPUs have stopped. */
#define LEAVE_MS 4000
#define STOP_MS 3000

static const struct {
	int older;
	int newer;
} ids[] = {
	{ KVMI_EVENT_UNHOOK, KVMI_EV_UNHOOK },
	{ KVMI_EVENT_CR, KVMI_EV_CR },
	{ KVMI_EVENT_MSR, KVMI_EV_MSR },
	{ KVMI_EVENT_XSETBV, KVMI_EV_XSETBV },
	{ KVMI_EVENT_BREAKPOINT, KVMI_EV_BREAKPOINT },
	{ KVMI_EVENT_HYPERCALL, KVMI_EV_HYPERCALL },
	{ KVMI_EVENT_PF, KVMI_EV_PF },
	{ KVMI_EVENT_TRAP, KVMI_EV_TRAP },
	{ KVMI_EVENT_DESCRIPTOR, KVMI_EV_DESCRIPTOR },
	{ KVMI_EVENT_PAUSE_VCPU, KVMI_EV_PAUSE },
	{ KVMI_EVENT_SINGLESTEP, KVMI_EV_SINGLESTEP },
};

int event_id(int older)
{
	size_t i;

	for (i = 0; i < sizeof(ids) / sizeof(ids[0]); i++)
		if (ids[i].older == older)
			return ids[i].newer;

	return -1;
}

static int older_id(int newer)
{
	size_t i;

	for (i = 0; i < sizeof(ids) / sizeof(ids[0]); i++)
		if (ids[i].newer == newer)
			return ids[i].older;

	return -1;
}

static void on_unhook(struct kvmi_vm *vm, void *context);

struct dom *dom_new(struct kvmi_vm *vm, enum kvmi_status *status,
		    struct kvmi_error *err)
{
	struct dom *dom = calloc(1, sizeof(*dom));

	if (!dom)
		return NULL;
	dom->vm = vm;
	dom->pid = getpid();
	atomic_store(&dom->seen, now_ms());
	dom->last = &dom->first;
	pthread_mutex_init(&dom->lock, NULL);
	pthread_mutex_init(&dom->request, NULL);
	*status = kvmi_vm_on_unhook(vm, on_unhook, dom, err);

	return dom;
}

void dom_lock(struct dom *dom)
{
	pthread_mutex_lock(&dom->lock);
}

void dom_unlock(struct dom *dom)
{
	char text[sizeof(dom->complaint)];
	kvmi_log_level level = dom->level;

	memcpy(text, dom->complaint, sizeof(text));
	dom->complaint[0] = 0;
	pthread_mutex_unlock(&dom->lock);
	if (text[0])
		complain(level, "%s", text);
}

void dom_complain(struct dom *dom, kvmi_log_level level, const char *format, ...)
{
	va_list args;

	if (dom->complaint[0] || atomic_load(&dom->leaving))
		return;
	va_start(args, format);
	vsnprintf(dom->complaint, sizeof(dom->complaint), format, args);
	va_end(args);
	dom->level = level;
}

static void drop_events(struct dom *dom)
{
	struct kvmi_dom_event *event;

	while ((event = dom->first)) {
		dom->first = event->next;
		free(event);
	}
	dom->last = &dom->first;
	dom->queued = 0;
}

void dom_free(struct dom *dom)
{
	kvmi_vm_close(dom->vm);
	drop_events(dom);
	free(dom->vcpus);
	free(dom->planted);
	/* the locks are left: in a child nobody may be able to unlock them */
	free(dom);
}

struct vcpu *dom_vcpu(struct dom *dom, unsigned int vcpu)
{
	if (vcpu >= dom->vcpu_count) {
		size_t count = vcpu + 16;
		struct vcpu *vcpus = realloc(dom->vcpus, count * sizeof(*vcpus));

		if (!vcpus)
			return NULL;
		memset(vcpus + dom->vcpu_count, 0,
		       (count - dom->vcpu_count) * sizeof(*vcpus));
		dom->vcpus = vcpus;
		dom->vcpu_count = count;
	}

	return &dom->vcpus[vcpu];
}

void dom_pause_asked(struct dom *dom, unsigned int vcpu, int by)
{
	struct vcpu *v;

	dom_lock(dom);
	v = dom_vcpu(dom, vcpu);
	if (v && (by > 0 || v->pauses_due))
		v->pauses_due += by;
	dom_unlock(dom);
}

/* ------------------------------------------------------------------------
 * In
 */

static struct kvmi_dom_event *translate(const struct kvmi_vm_event *event)
{
	struct kvmi_dom_event *older = calloc(1, sizeof(*older));
	struct kvmi_event *common;
	size_t size = 0;

	if (!older)
		return NULL;
	older->seq = event->seq;
	common = &older->event.common;
	common->size = sizeof(*common);
	common->vcpu = event->vcpu;
	common->event = older_id(event->id);
	common->arch.mode = event->state.mode;
	common->arch.regs = event->state.regs;
	common->arch.sregs = event->state.sregs;
	common->arch.msrs.sysenter_cs = event->msrs.sysenter_cs;
	common->arch.msrs.sysenter_esp = event->msrs.sysenter_esp;
	common->arch.msrs.sysenter_eip = event->msrs.sysenter_eip;
	common->arch.msrs.efer = event->msrs.efer;
	common->arch.msrs.star = event->msrs.star;
	common->arch.msrs.lstar = event->msrs.lstar;
	common->arch.msrs.cstar = event->msrs.cstar;
	common->arch.msrs.pat = event->msrs.pat;
	common->arch.msrs.shadow_gs = event->msrs.shadow_gs;

	switch (event->id) {
	case KVMI_EV_CR:
		older->event.cr.cr = event->cr.cr;
		older->event.cr.old_value = event->cr.old_value;
		older->event.cr.new_value = event->cr.new_value;
		size = sizeof(older->event.cr);
		break;
	case KVMI_EV_XSETBV:
		/* has no name in the union; as it was on the wire */
		older->event.cr.cr = event->xsetbv.xcr;
		older->event.cr.old_value = event->xsetbv.old_value;
		older->event.cr.new_value = event->xsetbv.new_value;
		size = sizeof(older->event.cr);
		break;
	case KVMI_EV_MSR:
		older->event.msr.msr = event->msr.msr;
		older->event.msr.old_value = event->msr.old_value;
		older->event.msr.new_value = event->msr.new_value;
		size = sizeof(older->event.msr);
		break;
	case KVMI_EV_BREAKPOINT:
		older->event.breakpoint.gpa = event->breakpoint.gpa;
		older->event.breakpoint.insn_len = event->breakpoint.insn_len;
		size = sizeof(older->event.breakpoint);
		break;
	case KVMI_EV_PF:
		older->event.page_fault.gva = event->pf.gva;
		older->event.page_fault.gpa = event->pf.gpa;
		older->event.page_fault.access = event->pf.access;
		size = sizeof(older->event.page_fault);
		break;
	case KVMI_EV_TRAP:
		older->event.trap.vector = event->trap.vector;
		older->event.trap.error_code = event->trap.error_code;
		older->event.trap.cr2 = event->trap.address;
		size = sizeof(older->event.trap);
		break;
	case KVMI_EV_DESCRIPTOR:
		older->event.desc.descriptor = event->descriptor.descriptor;
		older->event.desc.write = event->descriptor.write;
		size = sizeof(older->event.desc);
		break;
	case KVMI_EV_SINGLESTEP:
		older->event.ss.failed = event->singlestep.failed;
		size = sizeof(older->event.ss);
		break;
	default:
		break;
	}
	memcpy(older->buf, common, sizeof(*common));
	memcpy(older->buf + sizeof(*common), &older->event.cr, size);

	return older;
}

static void queue(struct dom *dom, const struct kvmi_vm_event *event)
{
	struct kvmi_dom_event *older;

	if (dom->leaving)
		return;
	older = translate(event);
	if (!older) {
		dom_complain(dom, KVMI_LOG_LEVEL_ERROR,
			     "out of memory: an event of vCPU %u is lost, which hangs now",
			     event->vcpu);
		return;
	}
	*dom->last = older;
	dom->last = (struct kvmi_dom_event **)&older->next;
	dom->queued++;
}

/*
 * KVM would take the restriction off the page for good, which tools of that
 * time don't expect: let the vCPU make one step, then put it back.  Other
 * vCPUs can use the page meanwhile.
 */
static void begin_passing(struct dom *dom, struct vcpu *v)
{
	struct kvmi_page_access *page;
	enum kvmi_status status;
	struct kvmi_error err;
	unsigned int i;

	for (i = 0; i < v->passing; i++)
		if (v->passed[i].gpa / 4096 == v->open.pf.gpa / 4096)
			return;
	page = &v->passed[v->passing];
	page->gpa = v->open.pf.gpa;
	status = v->passing == PASSED_MAX ? KVMI_ERR_LIMIT :
		 kvmi_vm_get_page_access(dom->vm, page->gpa, &page->access,
					 &err);
	if (status == KVMI_OK && !v->passing && !v->stepping)
		status = kvmi_vcpu_control_singlestep(dom->vm, v->open.vcpu,
						      true, &err);
	if (status == KVMI_OK)
		v->passing++;
	else
		dom_complain(dom, KVMI_LOG_LEVEL_WARNING,
			     "the page at 0x%llx is not restricted any more: KVM cannot emulate an access, nor step over it (%s)",
			     (unsigned long long)page->gpa,
			     kvmi_status_name(status));
}

/* true: the step is not the tool's */
static bool end_passing(struct dom *dom, struct vcpu *v, unsigned int vcpu)
{
	enum kvmi_status status;
	struct kvmi_error err;

	status = kvmi_vm_set_page_access(dom->vm, v->passed, v->passing, &err);
	v->passing = 0;
	if (status == KVMI_OK && !v->stepping)
		status = kvmi_vcpu_control_singlestep(dom->vm, vcpu, false,
						      &err);
	if (status != KVMI_OK)
		dom_complain(dom, KVMI_LOG_LEVEL_WARNING, "%s", err.message);

	return !v->stepping;
}

/* With the lock.  Once: a peer may send as many as it likes */
static void take_unhook(struct dom *dom)
{
	const struct kvmi_vm_event event = { .id = KVMI_EV_UNHOOK };

	if (!dom->unhook_came && atomic_load(&dom->wants_unhook))
		queue(dom, &event);
	else if (!dom->unhook_came)
		dom->unhook = true;
	dom->unhook_came = true;
}

/* With the lock */
static void take(struct dom *dom, struct kvmi_vm_event *event)
{
	struct vcpu *v;

	/* an event if there is no function for it: QEMU did not allow it then */
	if (event->id == KVMI_EV_UNHOOK) {
		take_unhook(dom);
		kvmi_vm_event_free(event);
		return;
	}

	v = dom_vcpu(dom, event->vcpu);
	/*
	 * KVM sends a TRAP for each injected exception; tools that have not
	 * asked for them don't answer.  The same for what they can't know.
	 */
	if (!v || older_id(event->id) < 0 ||
	    (event->id == KVMI_EV_TRAP && !v->traps)) {
		kvmi_vm_reply(dom->vm, event, KVMI_ACTION_CONTINUE, NULL);
		kvmi_vm_event_free(event);
		return;
	}
	if (event->id == KVMI_EV_SINGLESTEP && v->passing &&
	    end_passing(dom, v, event->vcpu)) {
		kvmi_vm_reply(dom->vm, event, KVMI_ACTION_CONTINUE, NULL);
		kvmi_vm_event_free(event);
		return;
	}
	v->is_open = true;
	v->open = *event;
	if (event->id == KVMI_EV_PAUSE && v->pauses_due)
		v->pauses_due--;
	queue(dom, event);
	kvmi_vm_event_free(event);
}

static void take_all(struct dom *dom)
{
	struct kvmi_vm_event *event;

	while ((event = kvmi_vm_next_event(dom->vm)))
		take(dom, event);
}

static void on_unhook(struct kvmi_vm *vm, void *context)
{
	struct dom *dom = context;

	(void)vm;
	dom_lock(dom);
	/* a tool that wants it finds it after what came before */
	if (atomic_load(&dom->wants_unhook))
		take_all(dom);
	take_unhook(dom);
	dom_unlock(dom);
}

static bool is_to_leave(struct dom *dom)
{
	bool leave;

	dom_lock(dom);
	leave = dom->unhook && !dom->leaving;
	dom_unlock(dom);

	return leave;
}

void dom_look(struct dom *dom)
{
	int saved = errno;

	atomic_store(&dom->seen, now_ms());
	dom_lock(dom);
	take_all(dom);
	dom_unlock(dom);
	kvmi_vm_dispatch(dom->vm);
	if (is_to_leave(dom))
		dom_leave(dom);
	errno = saved;
}

/*
 * What is not UNHOOK stays where the tool's next call finds it, and makes
 * kvmi_connection_fd() readable.
 */
bool dom_look_after(struct dom *dom)
{
	enum kvmi_status status = kvmi_vm_process(dom->vm, NULL);

	kvmi_vm_dispatch(dom->vm);
	if (is_to_leave(dom)) {
		dom_leave(dom);
		return false;
	}

	return status == KVMI_OK || status == KVMI_ERR_NOTHING;
}

static enum kvmi_status receive(struct dom *dom, int ms, struct kvmi_error *err)
{
	struct kvmi_vm_event *event;
	enum kvmi_status status;

	atomic_store(&dom->seen, now_ms());
	status = kvmi_vm_wait_event(dom->vm, ms, &event, err);
	atomic_store(&dom->seen, now_ms());
	if (status == KVMI_OK) {
		dom_lock(dom);
		take(dom, event);
		dom_unlock(dom);
	}

	return status;
}

void dom_wait(struct dom *dom, int ms)
{
	receive(dom, ms, NULL);
}

int kvmi_wait_event(void *context, kvmi_timeout_t ms)
{
	int64_t end = ms < 0 ? INT64_MAX : now_ms() + ms;
	struct dom *dom = context;

	for (;;) {
		enum kvmi_status status;
		struct kvmi_error err;
		int64_t left;

		if (kvmi_get_pending_events(dom))
			return 0;
		left = ms < 0 ? 60000 : end - now_ms();
		/* what another thread takes in shows in the queue */
		if (left > 100)
			left = 100;
		status = receive(dom, left < 0 ? 0 : left, &err);
		if (status == KVMI_OK)
			continue;
		if (status != KVMI_ERR_NOTHING)
			return result(dom, status, &err);
		if (ms >= 0 && now_ms() >= end)
			return kvmi_get_pending_events(dom) ? 0 :
							      fails(ETIMEDOUT);
	}
}

int kvmi_pop_event(void *context, struct kvmi_dom_event **event)
{
	struct dom *dom = context;

	dom_look(dom);
	dom_lock(dom);
	*event = dom->first;
	if (*event) {
		dom->first = (*event)->next;
		if (!dom->first)
			dom->last = &dom->first;
		dom->queued--;
		(*event)->next = NULL;
	}
	dom_unlock(dom);

	return *event ? 0 : fails(EAGAIN);
}

size_t kvmi_get_pending_events(void *context)
{
	struct dom *dom = context;
	size_t count;

	dom_look(dom);
	dom_lock(dom);
	count = dom->queued;
	dom_unlock(dom);

	return count;
}

/* ------------------------------------------------------------------------
 * Out
 */

static bool has_ctx_data(const void *data, size_t size)
{
	const size_t start = sizeof(struct kvmi_vcpu_hdr) +
			     sizeof(struct kvmi_event_reply);
	struct kvmi_event_pf_reply pf;

	if (size < start + sizeof(pf))
		return false;
	memcpy(&pf, (const char *)data + start, sizeof(pf));

	return pf.ctx_size;
}

/* status and err: of what was sent, if anything */
static int reply(struct dom *dom, unsigned int seq, const void *data,
		 size_t data_size, enum kvmi_status *status,
		 struct kvmi_error *err)
{
	struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_event_reply reply;
		uint64_t value;
	} answer = { 0 };
	struct vcpu *v;

	if (!data || data_size < sizeof(answer) - sizeof(answer.value))
		return fails(EINVAL);
	/* whatever else there is has no effect */
	memcpy(&answer, data,
	       data_size < sizeof(answer) ? data_size : sizeof(answer));

	/* it has none */
	if (answer.reply.event == KVMI_EVENT_UNHOOK && dom->unhook_came)
		return 0;
	if (answer.vcpu.vcpu >= dom->vcpu_count)
		return fails(ENOENT);
	v = &dom->vcpus[answer.vcpu.vcpu];
	if (!v->is_open || v->open.seq != seq)
		return fails(atomic_load(&dom->disconnected) ? ENOTCONN :
							       ENOENT);

	/* the guest sees what is in its memory */
	if (v->open.id == KVMI_EV_PF && has_ctx_data(data, data_size) &&
	    !dom->ctx_data) {
		dom->ctx_data = true;
		dom_complain(dom, KVMI_LOG_LEVEL_WARNING,
			     "KVM takes no data in the answer to a page fault: ctx_size and ctx_data have no effect");
	}
	if (v->open.id == KVMI_EV_PF && v->open.pf.not_emulated &&
	    answer.reply.action == KVMI_EVENT_ACTION_CONTINUE)
		begin_passing(dom, v);

	if ((v->open.id == KVMI_EV_CR || v->open.id == KVMI_EV_MSR) &&
	    data_size >= sizeof(answer))
		*status = kvmi_vm_reply_with_value(dom->vm, &v->open,
						   answer.reply.action,
						   answer.value, err);
	else
		*status = kvmi_vm_reply(dom->vm, &v->open, answer.reply.action,
					err);
	if (*status == KVMI_OK)
		v->is_open = false;

	return 0;
}

int kvmi_reply_event(void *context, unsigned int seq, const void *data,
		     size_t data_size)
{
	enum kvmi_status status = KVMI_OK;
	struct dom *dom = context;
	struct kvmi_error err;
	int ret;

	dom_lock(dom);
	ret = reply(dom, seq, data, data_size, &status, &err);
	dom_unlock(dom);
	if (status != KVMI_OK)
		ret = result(dom, status, &err);
	dom_look(dom);

	return ret;
}

/* ------------------------------------------------------------------------
 * Leaving
 */

/* All that can hit a breakpoint are asked to stop */
static void ask_all(struct dom *dom)
{
	enum kvmi_status *status;
	size_t count = 0, i;
	uint16_t *vcpus;

	/* another thread may hear of more of them */
	dom_lock(dom);
	vcpus = calloc(dom->vcpu_count + 1, sizeof(*vcpus));
	status = calloc(dom->vcpu_count + 1, sizeof(*status));
	for (i = 0; vcpus && status && i < dom->vcpu_count; i++)
		if (dom->vcpus[i].breakpoints && !dom->vcpus[i].is_open &&
		    !dom->vcpus[i].pauses_due) {
			dom->vcpus[i].pauses_due++;
			vcpus[count++] = i;
		}
	dom_unlock(dom);
	if (count) {
		kvmi_vm_pause_vcpus(dom->vm, vcpus, count, true, status, NULL);
		for (i = 0; i < count; i++)
			if (status[i] != KVMI_OK &&
			    status[i] != KVMI_ERR_TIMEOUT)
				dom_pause_asked(dom, vcpus[i], -1);
	}
	free(vcpus);
	free(status);
}

/* Until all that were asked have stopped, or (gone) until none will any more */
static void wait_all(struct dom *dom, bool gone, int64_t end)
{
	enum kvmi_status status;
	size_t i;

	do {
		bool waiting = false;

		dom_lock(dom);
		take_all(dom);
		for (i = 0; i < dom->vcpu_count; i++) {
			struct vcpu *v = &dom->vcpus[i];

			if (v->is_open && gone) {
				kvmi_vm_reply(dom->vm, &v->open,
					      v->open.id == KVMI_EV_BREAKPOINT ?
					      KVMI_ACTION_RETRY :
					      KVMI_ACTION_CONTINUE, NULL);
				v->is_open = false;
			}
			waiting |= v->pauses_due && !v->is_open;
		}
		dom_unlock(dom);
		if (!waiting)
			return;
		/* another thread may take in what we wait for */
		status = receive(dom, 10, NULL);
	} while ((status == KVMI_OK || status == KVMI_ERR_NOTHING) &&
		 now_ms() < end);
}

static bool restore(struct dom *dom)
{
	size_t count = dom->planted_count, writes = 0, i;
	struct kvmi_memory_op *ops = calloc(count + 1, sizeof(*ops));
	uint8_t *bytes = malloc(count + 1);

	if (!ops || !bytes) {
		free(ops);
		free(bytes);
		return false;
	}
	for (i = 0; i < count; i++)
		ops[i] = (struct kvmi_memory_op){
			.gpa = dom->planted[i].gpa, .size = 1,
			.data = &bytes[i],
		};
	kvmi_vm_read_many(dom->vm, ops, count, NULL);
	for (i = 0; i < count; i++) {
		/* the guest may have written something else */
		if (ops[i].status != KVMI_OK || bytes[i] != INT3)
			continue;
		bytes[i] = dom->planted[i].original;
		ops[writes++] = ops[i];
	}
	if (kvmi_vm_write_many(dom->vm, ops, writes, NULL) == KVMI_OK)
		dom->planted_count = 0;
	free(ops);
	free(bytes);

	return !dom->planted_count;
}

/* The guest goes on as if nothing had been there */
static void answer_all(struct dom *dom)
{
	size_t i;

	for (i = 0; i < dom->vcpu_count; i++) {
		struct vcpu *v = &dom->vcpus[i];
		enum kvmi_action action = KVMI_ACTION_CONTINUE;
		uint8_t byte = 0;

		if (!v->is_open)
			continue;
		/*
		 * An INT3 that is there still is the guest's own.  If that is not
		 * known: what is there now is run, which is right in any case.
		 */
		if (v->open.id == KVMI_EV_BREAKPOINT &&
		    (dom->planted_count ||
		     kvmi_vm_read_physical(dom->vm, v->open.breakpoint.gpa,
					   &byte, 1, NULL) != KVMI_OK ||
		     byte != INT3))
			action = KVMI_ACTION_RETRY;
		kvmi_vm_reply(dom->vm, &v->open, action, NULL);
		v->is_open = false;
	}
}

/* The next commands wait no longer than that, nor for ever */
static void hurry(struct dom *dom, int64_t end)
{
	int64_t left = end - now_ms();

	kvmi_vm_set_timeout(dom->vm, left > 100 ? left : 100, NULL);
}

void dom_leave(struct dom *dom)
{
	int64_t start = now_ms(), end = start + LEAVE_MS;
	bool clean = true;
	size_t count;

	pthread_mutex_lock(&dom->request);
	if (dom->left) {
		pthread_mutex_unlock(&dom->request);
		return;
	}
	dom->left = true;
	count = dom->planted_count;

	dom_lock(dom);
	atomic_store(&dom->leaving, true);
	take_all(dom);
	drop_events(dom);
	dom_unlock(dom);
	/*
	 * With breakpoints in the guest, a hit may be on its way until all
	 * vCPUs have answered once more.
	 */
	if (dom->planted_count) {
		hurry(dom, start + STOP_MS);
		ask_all(dom);
		wait_all(dom, false, start + STOP_MS);
		hurry(dom, end);
		clean = restore(dom);
	}
	hurry(dom, end);
	dom_lock(dom);
	take_all(dom);
	answer_all(dom);
	dom_unlock(dom);
	wait_all(dom, true, end);

	hurry(dom, end);
	kvmi_vm_flush(dom->vm, NULL);
	kvmi_vm_shutdown(dom->vm);
	atomic_store(&dom->disconnected, true);
	pthread_mutex_unlock(&dom->request);
	/* not before: the tool's function may call others */
	complain(KVMI_LOG_LEVEL_WARNING,
		 "%s: the VM is about to be paused, saved or moved: %zu breakpoints %s, connection closed",
		 kvmi_vm_get_hello(dom->vm)->name, count,
		 clean ? "taken out" : "left to KVM");
}
