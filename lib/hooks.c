/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Breakpoints and page restrictions; see kvmi/hooks.h for the rules.
 *
 *  - Nothing is left behind.  To take everything out, all vCPUs are paused; each
 *    then has an open event, either the PAUSE or the hit that it had before.
 *    With all bytes back, hits are answered by RETRY, which runs the instruction
 *    that is there now.  Only when all PAUSE events have been answered too, no
 *    hit can be on its way.
 *  - To execute an instruction that is under a breakpoint, the vCPU finds INT3s
 *    at all places where it can come to next.  Where these cannot be told, it
 *    is single-stepped, if KVM can do that.
 */

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <kvmi/hooks.h>

#include "insn.h"
#include "internal.h"

#define INT3 0xcc
#define PAGE_SIZE 4096ULL

/* Tests have less patience */
#ifndef STOP_TIMEOUT_MS
/* For all vCPUs to stop or to go on; below QEMU's deadline for unhooking (5 s) */
#define STOP_TIMEOUT_MS 3000
/* For one instruction */
#define STEP_TIMEOUT_MS 3000
#endif
#ifndef LEAVE_MS
/* For all of it, once UNHOOK has come */
#define LEAVE_MS 4500
#endif
/* When taking out took longer, there is no time to have a second look */
#define VERIFY_UNTIL_MS 2500
/* Pages that one instruction has freed: more than most can touch */
#define FREED_MAX 8
/* Pages that are handled at once */
#define CHUNK 256
/* Breakpoints that are planted while the guest stands still */
#define SLICE 1024
/* How often to look for vCPUs that have started */
#define LOOK_MS 1000

struct kvmi_hook {
	void *cookie;
	uint64_t gva;
	uint64_t gpa;
	struct insn insn;	/* what was (and will be) there */
	bool ready;		/* it can be planted */
	bool planted;
	bool changing;		/* its byte is being written */
	bool leftover;		/* connection lost while planted: the INT3 may
				   still be there */
	bool retired;		/* taken out for good in this guest */
	bool going;		/* taken out, to be removed */
	bool hot;		/* has been in since it was known that no vCPU
				   is at it */
};

struct vcpu {
	bool enabled;			/* BREAKPOINT is */
	bool pf_enabled;
	bool stepping;			/* SINGLESTEP is ours */
	bool fix_registers;		/* open->state is not what the vCPU has */
	struct kvmi_vm_event *open;	/* not answered yet */
	unsigned int pauses_due;	/* PAUSE events that will come */
};

struct kvmi_hooks {
	struct kvmi_hooks_callbacks callbacks;
	void *context;
	struct insn_decoder *decoder;

	struct kvmi_hook **list;	/* by gpa */
	size_t list_count;
	size_t list_capacity;

	struct kvmi_page_access *pages;	/* restricted */
	size_t page_count;
	/* those without a restriction until a step is made; may be > FREED_MAX */
	uint64_t freed[FREED_MAX];
	unsigned int freed_count;

	struct kvmi_paging paging;	/* levels 0: not told */

	/* while attached */
	struct kvmi_vm *vm;
	struct kvmi_walker *walker;
	struct vcpu *vcpus;
	unsigned int vcpu_count;
	bool can_step;
	bool pf_wanted;		/* all vCPUs have been asked for PF */
	bool holding;		/* do not answer PAUSE events */
	int64_t stop_deadline;	/* of the last hold() */
	bool unhook;		/* KVMI_EV_UNHOOK came */
	int64_t unhook_ms;
	bool lost;		/* the connection is gone */
	struct kvmi_error error;	/* why */
	uint64_t foreign;	/* INT3s of the guest itself */
};

static void problem(struct kvmi_hooks *h, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
static void hook_problem(struct kvmi_hooks *h, struct kvmi_hook *hook,
			 enum kvmi_hook_problem kind, const char *format, ...)
	__attribute__((format(printf, 4, 5)));

static void say(struct kvmi_hooks *h, struct kvmi_hook *hook,
		enum kvmi_hook_problem kind, const char *format, va_list args)
{
	char text[400];

	vsnprintf(text, sizeof(text), format, args);
	if (h->callbacks.problem)
		h->callbacks.problem(hook, kind, text, h->context);
}

static void problem(struct kvmi_hooks *h, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(h, NULL, KVMI_HOOK_GENERAL, format, args);
	va_end(args);
}

static void hook_problem(struct kvmi_hooks *h, struct kvmi_hook *hook,
			 enum kvmi_hook_problem kind, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	say(h, hook, kind, format, args);
	va_end(args);
}

/* ------------------------------------------------------------------------
 * Events
 */

/* Remembers that the connection is gone */
static bool is_lost(struct kvmi_hooks *h, enum kvmi_status status,
		    const struct kvmi_error *err)
{
	if (status == KVMI_ERR_CLOSED || status == KVMI_ERR_PROTOCOL ||
	    status == KVMI_ERR_SYSTEM) {
		if (!h->lost)
			h->error = *err;
		h->lost = true;
	}

	return h->lost;
}

static bool is_leaving(const struct kvmi_hooks *h)
{
	return h->unhook || h->lost;
}

/* There is something more urgent than whatever goes on */
static bool is_stopping(struct kvmi_hooks *h)
{
	return is_leaving(h) || (h->callbacks.interrupted &&
				 h->callbacks.interrupted(h->context));
}

/* Answers the open event of a vCPU */
static void answer(struct kvmi_hooks *h, unsigned int vcpu, enum kvmi_action action,
		   const struct kvm_regs *regs)
{
	struct vcpu *v = &h->vcpus[vcpu];
	struct kvmi_vm_event *event = v->open;
	struct kvmi_error err;
	enum kvmi_status status;

	if (!event)
		return;
	if (!regs && v->fix_registers)
		regs = &event->state.regs;
	v->open = NULL;
	v->fix_registers = false;
	status = regs ?
		kvmi_vm_reply_with_registers(h->vm, event, action, regs, &err) :
		kvmi_vm_reply(h->vm, event, action, &err);
	kvmi_vm_event_free(event);
	if (status != KVMI_OK && !is_lost(h, status, &err))
		problem(h, "vCPU %u: %s", vcpu, err.message);
}

static bool more_vcpus(struct kvmi_hooks *h, unsigned int count)
{
	struct vcpu *vcpus;

	if (count <= h->vcpu_count)
		return true;
	vcpus = realloc(h->vcpus, count * sizeof(*vcpus));
	if (!vcpus)
		return false;
	memset(vcpus + h->vcpu_count, 0,
	       (count - h->vcpu_count) * sizeof(*vcpus));
	h->vcpus = vcpus;
	h->vcpu_count = count;

	return true;
}


static bool is_restricted(const struct kvmi_hooks *h, uint64_t gpa)
{
	size_t i;

	for (i = 0; i < h->page_count; i++)
		if (h->pages[i].gpa / PAGE_SIZE == gpa / PAGE_SIZE)
			return true;

	return false;
}

static bool is_ours(const struct kvmi_hooks *h, const struct vcpu *v,
		    const struct kvmi_vm_event *event)
{
	return event->id == KVMI_EV_BREAKPOINT ||
	       (event->id == KVMI_EV_PAUSE && v->pauses_due) ||
	       (event->id == KVMI_EV_SINGLESTEP && v->stepping) ||
	       (event->id == KVMI_EV_PF && is_restricted(h, event->pf.gpa));
}

static void note_unhook(struct kvmi_hooks *h)
{
	if (!h->unhook)
		h->unhook_ms = now_ms();
	h->unhook = true;
}

static void take_event(struct kvmi_hooks *h, struct kvmi_vm_event *event)
{
	unsigned int vcpu = event->vcpu;
	struct vcpu *v;

	if (event->id == KVMI_EV_UNHOOK) {
		note_unhook(h);
		kvmi_vm_event_free(event);
		return;
	}
	if (!more_vcpus(h, vcpu + 1)) {
		kvmi_vm_reply(h->vm, event, KVMI_ACTION_CONTINUE, NULL);
		kvmi_vm_event_free(event);
		return;
	}
	v = &h->vcpus[vcpu];
	if (!is_ours(h, v, event) && h->callbacks.event) {
		h->callbacks.event(event, h->context);
		return;
	}

	/* at most one at a time: the connection sees to that */
	v->open = event;
	if (event->id == KVMI_EV_BREAKPOINT || event->id == KVMI_EV_PF)
		return;
	/* else it is of a step that was given up: nobody waits for it */
	if (event->id == KVMI_EV_SINGLESTEP && v->stepping)
		return;
	if (event->id == KVMI_EV_PAUSE) {
		if (v->pauses_due)
			v->pauses_due--;
		if (h->holding)
			return;
	}
	answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
}

static void take_events(struct kvmi_hooks *h)
{
	struct kvmi_vm_event *event;

	while ((event = kvmi_vm_next_event(h->vm)))
		take_event(h, event);
	/* it is not among the events if the tool has a function for it */
	if (vm_unhook_came(h->vm))
		note_unhook(h);
}

/* One event, or until the deadline; false if there was none */
static bool wait_event(struct kvmi_hooks *h, int64_t deadline)
{
	int64_t left = deadline - now_ms();
	struct kvmi_vm_event *event;
	struct kvmi_error err;
	enum kvmi_status status;

	if (h->lost || left <= 0)
		return false;
	status = vm_wait_event(h->vm, left > 60000 ? 60000 : left, h->unhook,
			       &event, &err);
	if (status == KVMI_ERR_NOTHING && !h->unhook && vm_unhook_came(h->vm)) {
		note_unhook(h);
		return true;
	}
	if (status != KVMI_OK) {
		is_lost(h, status, &err);
		return false;
	}
	take_event(h, event);

	return true;
}

/* ------------------------------------------------------------------------
 * Holding vCPUs
 */

/* It has an open event: one of ours, or one that the tool will answer */
static bool stands_still(const struct kvmi_hooks *h, unsigned int vcpu)
{
	return h->vcpus[vcpu].open || vm_has_open_event(h->vm, vcpu);
}

/* Once UNHOOK has come there has to be time for what comes afterwards, too */
static int64_t stop_deadline(const struct kvmi_hooks *h)
{
	int64_t ms = STOP_TIMEOUT_MS, now = now_ms();
	int64_t left = h->unhook_ms + LEAVE_MS - now;

	if (h->unhook && left * 2 / 3 < ms)
		ms = left > 0 ? left * 2 / 3 : 0;

	return now + ms;
}

/*
 * Makes sure that no vCPU but `except' (-1: none) executes guest code, until
 * release().  Their events may still be on their way.
 */
static bool hold(struct kvmi_hooks *h, int except)
{
	enum kvmi_status *status = NULL, all = KVMI_OK;
	uint16_t *list = NULL;
	struct kvmi_error err;
	size_t count = 0, i;

	take_events(h);
	h->holding = true;
	h->stop_deadline = stop_deadline(h);

	list = calloc(h->vcpu_count, sizeof(*list));
	status = calloc(h->vcpu_count, sizeof(*status));
	if (list && status) {
		for (i = 0; i < h->vcpu_count; i++) {
			/*
			 * With an open event it stands still already; if a
			 * PAUSE is due it will not run before that.
			 */
			if ((int)i == except || !h->vcpus[i].enabled ||
			    stands_still(h, i) || h->vcpus[i].pauses_due)
				continue;
			list[count++] = i;
		}
		all = vm_pause_vcpus(h->vm, list, count, true,
				     h->stop_deadline, status, &err);
		for (i = 0; i < count; i++)
			if (status[i] == KVMI_OK ||
			    status[i] == KVMI_ERR_TIMEOUT)
				h->vcpus[list[i]].pauses_due++;
		if (all != KVMI_OK && !is_lost(h, all, &err))
			problem(h, "%s", err.message);
	} else {
		all = KVMI_ERR_SYSTEM;
	}
	free(list);
	free(status);
	take_events(h);

	return all == KVMI_OK;
}

static void release(struct kvmi_hooks *h)
{
	unsigned int i;

	h->holding = false;
	for (i = 0; i < h->vcpu_count; i++)
		if (h->vcpus[i].open && h->vcpus[i].open->id == KVMI_EV_PAUSE)
			answer(h, i, KVMI_ACTION_CONTINUE, NULL);
}

/* After hold(): until all events that stop them are here */
static bool wait_all_stopped(struct kvmi_hooks *h)
{
	unsigned int i;

	do {
		take_events(h);
		for (i = 0; i < h->vcpu_count; i++)
			if (h->vcpus[i].enabled && !stands_still(h, i))
				break;
		if (i == h->vcpu_count)
			return true;
	} while (wait_event(h, h->stop_deadline));

	return false;
}

/* ------------------------------------------------------------------------
 * Putting breakpoints in and out
 */

/* Where in the list the first one at or behind gpa is */
static size_t place_of(const struct kvmi_hooks *h, uint64_t gpa)
{
	size_t low = 0, high = h->list_count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (h->list[middle]->gpa < gpa)
			low = middle + 1;
		else
			high = middle;
	}

	return low;
}

/* Ours, if it has been looked at: else the INT3 is the guest's */
static bool may_be_in(const struct kvmi_hook *bp)
{
	return bp->ready || bp->leftover;
}

static struct kvmi_hook *hook_of(const struct kvmi_hooks *h,
				 const struct kvmi_vm_event *event)
{
	uint64_t gpa = event->breakpoint.gpa;
	size_t i = place_of(h, gpa);

	if (gpa != UINT64_MAX)
		return i < h->list_count && h->list[i]->gpa == gpa &&
		       may_be_in(h->list[i]) ? h->list[i] : NULL;
	for (i = 0; i < h->list_count; i++)
		if (h->list[i]->gva == event->state.regs.rip &&
		    may_be_in(h->list[i]))
			return h->list[i];

	return NULL;
}

/* Breakpoints of one page that are next to each other in the list */
struct span {
	size_t first;
	size_t count;
	uint64_t gpa;
	uint32_t size;
};

/*
 * Cuts list[from, count) into spans, `most' at the most; returns how many.
 * single: one for each breakpoint, so that only their bytes are written.
 */
static size_t make_spans(struct kvmi_hook **list, size_t from, size_t count,
			 bool single, struct span *spans, size_t most)
{
	size_t i, used = 0;

	for (i = from; i < count; i++) {
		struct span *last = used ? &spans[used - 1] : NULL;
		uint64_t gpa = list[i]->gpa;

		if (last && !single &&
		    gpa / PAGE_SIZE == last->gpa / PAGE_SIZE) {
			last->count++;
			last->size = gpa - last->gpa + 1;
			continue;
		}
		if (used == most)
			break;
		spans[used++] = (struct span){ i, 1, gpa, 1 };
	}

	return used;
}

/* Sets the first byte of an instruction, if it is `from' now */
static bool change_byte(struct kvmi_hooks *h, uint64_t gpa, uint8_t from,
			uint8_t to, bool *was)
{
	enum kvmi_status status;
	struct kvmi_error err;
	uint8_t byte;

	*was = false;
	status = kvmi_vm_read_physical(h->vm, gpa, &byte, 1, &err);
	if (status == KVMI_OK && byte != from)
		return true;
	if (status == KVMI_OK)
		status = kvmi_vm_write_physical(h->vm, gpa, &to, 1, &err);
	if (status == KVMI_OK) {
		*was = true;
		return true;
	}
	if (!is_lost(h, status, &err))
		problem(h, "0x%" PRIx64 ": %s", gpa, err.message);

	return false;
}

/*
 * Exchanges the bytes of list: INT3s to what was there (out), or the other way
 * round.  held: all vCPUs stand still, thus a page can be written at once, with
 * all that is between the breakpoints.  Each ->planted tells the outcome.
 */
static void exchange(struct kvmi_hooks *h, struct kvmi_hook **list, size_t count,
		     bool out, bool held)
{
	struct kvmi_memory_op ops[CHUNK];
	struct span spans[CHUNK];
	uint8_t *buffer = malloc(CHUNK * PAGE_SIZE);
	size_t from = 0, i, j;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!buffer) {
		problem(h, "out of memory");
		return;
	}
	while (from < count && !h->lost) {
		size_t used = make_spans(list, from, count, !held, spans, CHUNK);
		size_t writes = 0;

		from = spans[used - 1].first + spans[used - 1].count;
		for (i = 0; i < used; i++)
			ops[i] = (struct kvmi_memory_op){
				.gpa = spans[i].gpa, .size = spans[i].size,
				.data = buffer + i * PAGE_SIZE,
			};
		status = kvmi_vm_read_many(h->vm, ops, used, &err);
		if (status != KVMI_OK && !is_lost(h, status, &err))
			problem(h, "reading code: %s", err.message);

		for (i = 0; i < used; i++) {
			bool write = false;

			if (ops[i].status != KVMI_OK)
				continue;
			for (j = 0; j < spans[i].count; j++) {
				struct kvmi_hook *bp = list[spans[i].first + j];
				uint8_t original = bp->insn.bytes[0];
				uint8_t *byte = (uint8_t *)ops[i].data +
						(bp->gpa - spans[i].gpa);

				bp->changing = *byte == (out ? INT3 : original);
				if (bp->changing) {
					*byte = out ? original : INT3;
					write = true;
				} else if (out) {
					/* the guest has rewritten it */
					bp->planted = bp->leftover = false;
				} else if (*byte == INT3 && bp->leftover) {
					/* ours, from the last connection */
					bp->planted = bp->hot = true;
				}
			}
			if (write) {
				ops[writes] = ops[i];
				spans[writes++] = spans[i];
			}
		}

		status = kvmi_vm_write_many(h->vm, ops, writes, &err);
		if (status != KVMI_OK && !is_lost(h, status, &err))
			problem(h, "writing code: %s", err.message);
		for (i = 0; i < writes; i++) {
			bool done = ops[i].status == KVMI_OK;

			for (j = 0; j < spans[i].count; j++) {
				struct kvmi_hook *bp = list[spans[i].first + j];

				if (!bp->changing)
					continue;
				/* If in doubt, it is there and has to go */
				bp->planted = !(out && done);
				bp->hot |= bp->planted;
				if (done)
					bp->leftover = false;
			}
		}
	}
	free(buffer);
}

/* Reads memory to make sure that no INT3 of ours is left; how many are */
static size_t count_left(struct kvmi_hooks *h, struct kvmi_hook **list,
			 size_t count, bool held)
{
	struct kvmi_memory_op ops[CHUNK];
	struct span spans[CHUNK];
	uint8_t *buffer = malloc(CHUNK * PAGE_SIZE);
	size_t from = 0, left = 0, i, j;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!buffer)
		return count;
	while (from < count) {
		size_t used = make_spans(list, from,
					 count, !held, spans,
					 CHUNK);

		from = spans[used - 1].first + spans[used - 1].count;
		for (i = 0; i < used; i++)
			ops[i] = (struct kvmi_memory_op){
				.gpa = spans[i].gpa, .size = spans[i].size,
				.data = buffer + i * PAGE_SIZE,
			};
		status = kvmi_vm_read_many(h->vm, ops, used, &err);
		if (status != KVMI_OK)
			is_lost(h, status, &err);
		for (i = 0; i < used; i++)
			for (j = 0; j < spans[i].count; j++) {
				struct kvmi_hook *bp =
					list[spans[i].first + j];
				const uint8_t *bytes = ops[i].data;

				if (ops[i].status != KVMI_OK ||
				    bytes[bp->gpa - spans[i].gpa] == INT3)
					left++;
			}
	}
	free(buffer);

	return left;
}

/* The rest of an instruction, on the next page, which can be anywhere */
static bool read_rest(struct kvmi_hooks *h, uint64_t gva, uint8_t *bytes,
		      size_t size)
{
	enum kvmi_status status;
	struct kvmi_error err;

	status = h->paging.levels ?
		kvmi_walker_read(h->walker, &h->paging, gva, bytes, size, &err) :
		kvmi_vcpu_read_virtual(h->vm, 0, gva, bytes, size, &err);
	if (status != KVMI_OK)
		is_lost(h, status, &err);

	return status == KVMI_OK;
}

/* What the guest has at the breakpoint: bytes, size of them */
static bool prepare(struct kvmi_hooks *h, struct kvmi_hook *bp, uint8_t *bytes,
		    size_t size, char *why, size_t why_size)
{
	if (size < INSN_MAX &&
	    read_rest(h, bp->gva + size, bytes + size, INSN_MAX - size))
		size = INSN_MAX;
	if (bytes[0] == INT3) {
		if (!bp->leftover && !bp->planted) {
			snprintf(why, why_size,
				 "there is an INT3 already, which is not ours");
			return false;
		}
		bytes[0] = bp->insn.bytes[0];
	} else {
		bp->leftover = bp->planted = false;
	}

	if (insn_decode(h->decoder, bytes, size, &bp->insn)) {
		snprintf(why, why_size, "there is no valid instruction");
		return false;
	}
	if (bp->insn.kind == INSN_REFUSE && !h->can_step) {
		snprintf(why, why_size, "cannot get over '%s': %s",
			 bp->insn.text, bp->insn.why);
		return false;
	}

	return true;
}

/* ------------------------------------------------------------------------
 * Pages
 */

static void note_freed(struct kvmi_hooks *h, uint64_t gpa)
{
	if (h->freed_count < FREED_MAX)
		h->freed[h->freed_count] = gpa;
	if (h->freed_count <= FREED_MAX)
		h->freed_count++;
}

/* Tells of an access; what comes of it is left to KVM */
static void tell_page(struct kvmi_hooks *h, unsigned int vcpu)
{
	struct kvmi_vm_event *event = h->vcpus[vcpu].open;
	enum kvmi_action action = KVMI_ACTION_CONTINUE;

	if (h->callbacks.page)
		action = h->callbacks.page(event, h->context);
	if (action == KVMI_ACTION_CONTINUE && event->pf.not_emulated)
		note_freed(h, event->pf.gpa);
	answer(h, vcpu, action, NULL);
}

/* The pages that were freed get their restrictions again */
static void restrict_again(struct kvmi_hooks *h)
{
	struct kvmi_page_access some[FREED_MAX];
	const struct kvmi_page_access *pages = some;
	enum kvmi_status status;
	struct kvmi_error err;
	size_t count = 0, i;
	unsigned int j;

	if (!h->freed_count)
		return;
	if (h->freed_count > FREED_MAX) {
		pages = h->pages;
		count = h->page_count;
	} else {
		for (i = 0; i < h->page_count && count < FREED_MAX; i++)
			for (j = 0; j < h->freed_count; j++)
				if (h->pages[i].gpa / PAGE_SIZE ==
				    h->freed[j] / PAGE_SIZE) {
					some[count++] = h->pages[i];
					break;
				}
	}
	h->freed_count = 0;
	status = kvmi_vm_set_page_access(h->vm, pages, count, &err);
	if (status != KVMI_OK && !is_lost(h, status, &err))
		problem(h, "pages that are not restricted any more: %s",
			err.message);
}

/* ------------------------------------------------------------------------
 * Hits
 */

/* The memory of a vCPU with an open event */
struct memory_context {
	struct kvmi_hooks *h;
	const struct kvmi_registers *state;
};

static bool walk(struct memory_context *context, uint64_t gva, uint64_t *gpa,
		 bool *writable)
{
	struct kvmi_translation found;
	struct kvmi_paging paging;
	enum kvmi_status status;
	struct kvmi_error err;

	status = kvmi_paging_of(context->state, &paging, &err);
	if (status == KVMI_OK)
		status = kvmi_walker_translate(context->h->walker, &paging, gva,
					       &found, &err);
	if (status != KVMI_OK) {
		is_lost(context->h, status, &err);
		return false;
	}
	*gpa = found.gpa;
	if (writable)
		*writable = found.writable;

	return true;
}

static int memory_access(struct memory_context *context, uint64_t gva,
			 uint8_t *data, size_t size, bool write)
{
	while (size) {
		size_t part = PAGE_SIZE - gva % PAGE_SIZE;
		enum kvmi_status status;
		struct kvmi_error err;
		uint64_t gpa;

		if (part > size)
			part = size;
		if (!walk(context, gva, &gpa, NULL))
			return -1;
		status = write ?
			kvmi_vm_write_physical(context->h->vm, gpa, data, part,
					       &err) :
			kvmi_vm_read_physical(context->h->vm, gpa, data, part,
					      &err);
		if (status != KVMI_OK) {
			is_lost(context->h, status, &err);
			return -1;
		}
		gva += part;
		data += part;
		size -= part;
	}

	return 0;
}

static int memory_read(void *context, uint64_t gva, void *data, size_t size)
{
	return memory_access(context, gva, data, size, false);
}

static int memory_write(void *context, uint64_t gva, const void *data,
			size_t size)
{
	return memory_access(context, gva, (uint8_t *)data, size, true);
}

static int memory_check(void *context, uint64_t gva, size_t size, bool write)
{
	uint64_t last = (gva + size - 1) / PAGE_SIZE, page;

	for (page = gva / PAGE_SIZE; page <= last; page++) {
		bool writable;
		uint64_t gpa;

		if (!walk(context, page * PAGE_SIZE, &gpa, &writable) ||
		    (write && !writable))
			return -1;
	}

	return 0;
}

/* It cannot be got over: the guest is better off without it */
static void retire(struct kvmi_hooks *h, struct kvmi_hook *bp, const char *why)
{
	bool was;

	if (bp->planted && change_byte(h, bp->gpa, INT3, bp->insn.bytes[0],
				       &was))
		bp->planted = false;
	bp->retired = true;
	hook_problem(h, bp, KVMI_HOOK_RETIRED, "cannot get over '%s': %s",
		     bp->insn.text, why);
}

struct landing {
	uint64_t gva;
	uint64_t gpa;
	uint8_t original;
	bool planted;
};

static void tell_hit(struct kvmi_hooks *h, struct kvmi_hook *bp,
		     const struct kvmi_vm_event *event)
{
	if (h->callbacks.hit)
		h->callbacks.hit(bp, event, h->context);
}

/* The places where the vCPU may come to */
static bool plant_landings(struct kvmi_hooks *h, struct memory_context *context,
			   struct landing *landings, unsigned int count,
			   const char **why)
{
	struct kvmi_error err;
	unsigned int i;

	for (i = 0; i < count; i++) {
		struct landing *to = &landings[i];
		uint8_t int3 = INT3;
		enum kvmi_status status;

		*why = "what comes next is not in memory";
		if (!walk(context, to->gva, &to->gpa, NULL))
			return false;
		status = kvmi_vm_read_physical(h->vm, to->gpa, &to->original, 1,
					       &err);
		/* an INT3, ours or not, will stop the vCPU as well */
		if (status == KVMI_OK && to->original == INT3)
			continue;
		if (status == KVMI_OK)
			status = kvmi_vm_write_physical(h->vm, to->gpa, &int3,
							1, &err);
		if (status != KVMI_OK) {
			is_lost(h, status, &err);
			return false;
		}
		to->planted = true;
	}

	return true;
}

static void remove_landings(struct kvmi_hooks *h, struct landing *landings,
			    unsigned int count)
{
	unsigned int i;
	bool was;

	for (i = 0; i < count; i++)
		if (landings[i].planted) {
			change_byte(h, landings[i].gpa, INT3,
				    landings[i].original, &was);
			landings[i].planted = false;
		}
}

/*
 * Waits for the vCPU to come to one of the landings.  Another of our
 * breakpoints can come first, in the handler of an NMI; and the instruction can
 * touch restricted pages, those that this frees are left so.
 */
static bool wait_landed(struct kvmi_hooks *h, unsigned int vcpu,
			const struct landing *landings, unsigned int count)
{
	int64_t deadline = now_ms() + STEP_TIMEOUT_MS;
	unsigned int i;

	for (;;) {
		struct memory_context context;
		struct insn_memory memory = {
			memory_read, memory_write, memory_check, &context,
		};
		struct kvmi_hook *bp;
		struct kvm_regs regs;
		struct vcpu *v;

		/* an event of a vCPU that is new moves the array */
		while (!h->vcpus[vcpu].open)
			if (!wait_event(h, deadline))
				return false;
		v = &h->vcpus[vcpu];
		if (v->open->id == KVMI_EV_PAUSE) {
			/* asked for while it was held by its last hit */
			answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
			continue;
		}
		if (v->open->id == KVMI_EV_PF) {
			tell_page(h, vcpu);
			continue;
		}
		if (v->open->id != KVMI_EV_BREAKPOINT) {
			/* the others are held already */
			answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
			continue;
		}
		for (i = 0; i < count; i++)
			if (landings[i].gva == v->open->state.regs.rip)
				return true;

		bp = hook_of(h, v->open);
		if (!bp) {
			h->foreign++;
			answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
			continue;
		}
		tell_hit(h, bp, v->open);
		context = (struct memory_context){ h, &v->open->state };
		regs = v->open->state.regs;
		if (insn_emulate(h->decoder, &bp->insn, &regs, &memory)) {
			retire(h, bp, "it was hit while stepping");
			answer(h, vcpu, KVMI_ACTION_RETRY, NULL);
		} else {
			answer(h, vcpu, KVMI_ACTION_RETRY, &regs);
		}
	}
}

/*
 * Lets the vCPU make one step; pages that this frees are left so.  Its
 * SINGLESTEP event is open then, or (false) whatever it is at, if anything.
 */
static bool one_step(struct kvmi_hooks *h, unsigned int vcpu,
		     enum kvmi_action action)
{
	int64_t deadline = now_ms() + STEP_TIMEOUT_MS;
	enum kvmi_status status;
	struct kvmi_error err;
	bool done = false;

	h->vcpus[vcpu].stepping = true;
	status = kvmi_vcpu_control_singlestep(h->vm, vcpu, true, &err);
	if (status == KVMI_OK) {
		answer(h, vcpu, action, NULL);
		do {
			struct kvmi_vm_event *event = h->vcpus[vcpu].open;

			if (event && event->id == KVMI_EV_PAUSE) {
				/* asked for while it was held by its last hit */
				answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
				continue;
			}
			if (event && event->id == KVMI_EV_PF) {
				tell_page(h, vcpu);
				continue;
			}
			done = event && event->id == KVMI_EV_SINGLESTEP;
			if (event)
				break;
		} while (wait_event(h, deadline));
		status = kvmi_vcpu_control_singlestep(h->vm, vcpu, false, &err);
	}
	if (status != KVMI_OK && !is_lost(h, status, &err))
		problem(h, "vCPU %u: %s", vcpu, err.message);
	h->vcpus[vcpu].stepping = false;

	return done;
}

/* With all other vCPUs held.  false: nothing has changed, or see *why */
static bool step_over_by_trap(struct kvmi_hooks *h, unsigned int vcpu,
			      struct kvmi_hook *bp, const char **why)
{
	bool was, done;

	if (!change_byte(h, bp->gpa, INT3, bp->insn.bytes[0], &was))
		return false;
	if (!was) {
		/* the guest has rewritten it: whatever is there now is right */
		bp->planted = false;
		answer(h, vcpu, KVMI_ACTION_RETRY, NULL);
		return true;
	}
	done = one_step(h, vcpu, KVMI_ACTION_RETRY);
	restrict_again(h);
	if (done)
		change_byte(h, bp->gpa, bp->insn.bytes[0], INT3, &was);
	bp->planted = done && was;
	if (!done) {
		*why = "the vCPU did not make a step";
		return false;
	}
	answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);

	return true;
}

/* Lets the vCPU execute what is under the breakpoint, alone and uninterrupted */
static void step_over(struct kvmi_hooks *h, unsigned int vcpu,
		      struct kvmi_hook *bp)
{
	struct kvmi_vm_event *event = h->vcpus[vcpu].open;
	struct kvmi_registers state = event->state;
	struct memory_context context = { h, &state };
	struct insn_memory memory = {
		memory_read, memory_write, memory_check, &context,
	};
	struct landing landings[2] = { { 0 } };
	uint64_t flag = state.regs.rflags & RFLAGS_IF, next[2];
	const char *why = "the other vCPUs cannot be stopped";
	unsigned int count = 0, i;
	struct kvm_regs regs;
	bool was = false;

	if (!hold(h, vcpu))
		goto failed;
	/* with the registers as the vCPU should have them */
	if (bp->insn.kind == INSN_REFUSE ||
	    insn_next(h->decoder, &bp->insn, &state, &memory, next, &count,
		      &why)) {
		if (bp->insn.kind == INSN_REFUSE)
			why = bp->insn.why;
		if (h->can_step && step_over_by_trap(h, vcpu, bp, &why)) {
			release(h);
			return;
		}
		goto failed;
	}
	for (i = 0; i < count; i++) {
		why = "it goes to itself";
		if (next[i] == state.regs.rip)
			goto failed;
		landings[i].gva = next[i];
	}

	if (!plant_landings(h, &context, landings, count, &why))
		goto failed;
	why = "its byte cannot be put back";
	if (!change_byte(h, bp->gpa, INT3, bp->insn.bytes[0], &was))
		goto failed;
	if (!was) {
		/* the guest has rewritten it: whatever is there now is right */
		bp->planted = false;
		remove_landings(h, landings, count);
		answer(h, vcpu, KVMI_ACTION_RETRY, NULL);
		release(h);
		return;
	}

	regs = state.regs;
	regs.rflags &= ~RFLAGS_IF;
	answer(h, vcpu, KVMI_ACTION_RETRY, &regs);
	if (!wait_landed(h, vcpu, landings, count)) {
		/* Where is it?  Take it from there, without the breakpoint. */
		struct vcpu *v = &h->vcpus[vcpu];
		struct kvmi_error err;
		int64_t deadline = now_ms() + STEP_TIMEOUT_MS;

		if (!v->open && !v->pauses_due && !h->lost &&
		    kvmi_vm_pause_vcpu(h->vm, vcpu, true, &err) == KVMI_OK)
			v->pauses_due++;
		while (!h->vcpus[vcpu].open && wait_event(h, deadline))
			;
		remove_landings(h, landings, count);
		restrict_again(h);
		bp->planted = false;
		event = h->vcpus[vcpu].open;
		if (event) {
			uint64_t rip = event->state.regs.rip;

			/*
			 * RIP cannot be changed at a PAUSE, the flag can.  If
			 * it is in a handler, its flag is right as it is.
			 */
			for (i = 0; i < count; i++)
				if (rip == landings[i].gva)
					break;
			if (i < count || rip == state.regs.rip) {
				event->state.regs.rflags |= flag;
				h->vcpus[vcpu].fix_registers = true;
			}
			answer(h, vcpu, event->id == KVMI_EV_BREAKPOINT ?
			       KVMI_ACTION_RETRY : KVMI_ACTION_CONTINUE, NULL);
		}
		release(h);
		retire(h, bp, "the vCPU did not come to the next instruction");
		return;
	}

	remove_landings(h, landings, count);
	restrict_again(h);
	if (!bp->retired) {
		change_byte(h, bp->gpa, bp->insn.bytes[0], INT3, &was);
		bp->planted = was;
	}
	event = h->vcpus[vcpu].open;
	event->state.regs.rflags |= flag;
	h->vcpus[vcpu].fix_registers = true;
	/*
	 * If it has come to another breakpoint (or an INT3 of the guest), that
	 * is a hit like any other; the event stays open.
	 */
	for (i = 0; i < count; i++)
		if (landings[i].gva == event->state.regs.rip &&
		    landings[i].original != INT3)
			answer(h, vcpu, KVMI_ACTION_RETRY, NULL);
	release(h);
	return;

failed:
	remove_landings(h, landings, count);
	retire(h, bp, why);
	event = h->vcpus[vcpu].open;
	if (event && event->id == KVMI_EV_BREAKPOINT)
		answer(h, vcpu, KVMI_ACTION_RETRY, NULL);
	release(h);
}

/*
 * An access to a restricted page.  CONTINUE lets KVM do it in the guest's place;
 * where it can't, the vCPU does it, alone.
 */
static void handle_page(struct kvmi_hooks *h, unsigned int vcpu)
{
	struct kvmi_vm_event *event = h->vcpus[vcpu].open;
	struct kvmi_page_access page = { event->pf.gpa, KVMI_PAGE_RWX };
	enum kvmi_action action = KVMI_ACTION_CONTINUE;
	uint32_t seq = event->seq;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!event->pf.not_emulated) {
		tell_page(h, vcpu);
		return;
	}
	if (h->callbacks.page)
		action = h->callbacks.page(event, h->context);
	if (action != KVMI_ACTION_CONTINUE) {
		answer(h, vcpu, action, NULL);
		return;
	}

	note_freed(h, page.gpa);
	if (h->can_step && hold(h, vcpu)) {
		status = kvmi_vm_set_page_access(h->vm, &page, 1, &err);
		if (status == KVMI_OK)
			one_step(h, vcpu, KVMI_ACTION_RETRY);
		else if (!is_lost(h, status, &err))
			problem(h, "0x%" PRIx64 ": %s", page.gpa, err.message);
	}
	/* It could not be stepped.  This frees the page, for a moment at least. */
	event = h->vcpus[vcpu].open;
	if (event && event->id == KVMI_EV_PF && event->seq == seq)
		answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
	/* if it is back too early, it comes again */
	restrict_again(h);
	event = h->vcpus[vcpu].open;
	if (event && event->id == KVMI_EV_SINGLESTEP)
		answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
	release(h);
}

static void handle_hit(struct kvmi_hooks *h, unsigned int vcpu)
{
	struct kvmi_vm_event *event = h->vcpus[vcpu].open;
	struct kvmi_hook *bp = hook_of(h, event);
	struct kvmi_registers state = event->state;
	struct memory_context context = { h, &state };
	struct insn_memory memory = {
		memory_read, memory_write, memory_check, &context,
	};
	struct kvm_regs regs = state.regs;

	if (!bp || state.mode != 8) {
		h->foreign++;
		answer(h, vcpu, KVMI_ACTION_CONTINUE, NULL);
		return;
	}
	if (!bp->planted && !bp->leftover) {
		/* it was on its way when the byte was put back */
		answer(h, vcpu, KVMI_ACTION_RETRY, NULL);
		return;
	}

	tell_hit(h, bp, event);
	/* the callback may have written to memory, but not to the event */
	if (bp->insn.kind == INSN_EMULATE &&
	    !insn_emulate(h->decoder, &bp->insn, &regs, &memory))
		answer(h, vcpu, KVMI_ACTION_RETRY, &regs);
	else
		step_over(h, vcpu, bp);
}

static void handle_all(struct kvmi_hooks *h)
{
	unsigned int i;

	for (i = 0; i < h->vcpu_count && !h->lost; i++) {
		if (!h->vcpus[i].open)
			continue;
		if (h->vcpus[i].open->id == KVMI_EV_BREAKPOINT)
			handle_hit(h, i);
		else if (h->vcpus[i].open->id == KVMI_EV_PF)
			handle_page(h, i);
	}
}

/*
 * Looks at the code at each breakpoint of list, which is sorted.  Keeps those
 * that can be planted; returns how many.
 */
static size_t prepare_all(struct kvmi_hooks *h, struct kvmi_hook **list,
			  size_t count)
{
	struct kvmi_memory_op ops[CHUNK];
	struct span spans[CHUNK];
	uint8_t *buffer = malloc(CHUNK * PAGE_SIZE);
	size_t from = 0, kept = 0, i, j;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!buffer) {
		problem(h, "out of memory");
		return 0;
	}
	while (from < count && !is_stopping(h)) {
		size_t used = make_spans(list, from, count, false, spans, CHUNK);

		from = spans[used - 1].first + spans[used - 1].count;
		for (i = 0; i < used; i++) {
			uint64_t in_page = PAGE_SIZE - spans[i].gpa % PAGE_SIZE;
			uint32_t size = spans[i].size + INSN_MAX - 1;

			ops[i] = (struct kvmi_memory_op){
				.gpa = spans[i].gpa,
				.data = buffer + i * PAGE_SIZE,
				.size = size < in_page ? size : in_page,
			};
		}
		status = kvmi_vm_read_many(h->vm, ops, used, &err);
		if (status != KVMI_OK)
			is_lost(h, status, &err);
		take_events(h);

		for (i = 0; i < used && !h->lost; i++)
			for (j = 0; j < spans[i].count; j++) {
				struct kvmi_hook *bp = list[spans[i].first + j];
				size_t at = bp->gpa - spans[i].gpa;
				size_t size = ops[i].size - at;
				char why[200] = "it cannot be read";
				uint8_t bytes[INSN_MAX];
				bool good = ops[i].status == KVMI_OK;

				if (size > INSN_MAX)
					size = INSN_MAX;
				memcpy(bytes, (uint8_t *)ops[i].data + at, size);
				good = good && prepare(h, bp, bytes, size, why,
						       sizeof(why));
				if (!good && !is_leaving(h))
					hook_problem(h, bp, KVMI_HOOK_REFUSED,
						     "%s", why);
				bp->ready = good;
				/* never more than have been looked at */
				if (good)
					list[kept++] = bp;
			}
	}
	free(buffer);

	return kept;
}

/* ------------------------------------------------------------------------
 * For users: the set
 */

struct kvmi_hooks *kvmi_hooks_new(const struct kvmi_hooks_callbacks *callbacks,
				  void *context, struct kvmi_error *err)
{
	struct kvmi_hooks *h = calloc(1, sizeof(*h));

	if (h)
		h->decoder = insn_decoder_new();
	if (!h || !h->decoder) {
		free(h);
		no_memory(err);
		return NULL;
	}
	if (callbacks)
		h->callbacks = *callbacks;
	h->context = context;

	return h;
}

void kvmi_hooks_free(struct kvmi_hooks *h)
{
	size_t i;

	if (!h)
		return;
	for (i = 0; i < h->list_count; i++)
		free(h->list[i]);
	free(h->list);
	free(h->pages);
	insn_decoder_free(h->decoder);
	free(h);
}

enum kvmi_status kvmi_hooks_add(struct kvmi_hooks *h, uint64_t gva,
				uint64_t gpa, void *cookie,
				struct kvmi_hook **hook, struct kvmi_error *err)
{
	struct kvmi_hook *new;
	size_t place;

	if (!h || !hook)
		return fail(err, KVMI_ERR_ARGUMENT, "no hooks");
	place = place_of(h, gpa);
	if (place < h->list_count && h->list[place]->gpa == gpa) {
		*hook = h->list[place];
		return fail(err, KVMI_ERR_BUSY,
			    "there is a breakpoint at 0x%" PRIx64 " already",
			    gva);
	}

	if (h->list_count == h->list_capacity) {
		size_t capacity = 2 * h->list_capacity + 16;
		struct kvmi_hook **list = realloc(h->list,
						  capacity * sizeof(*list));

		if (!list)
			return no_memory(err);
		h->list = list;
		h->list_capacity = capacity;
	}
	new = calloc(1, sizeof(*new));
	if (!new)
		return no_memory(err);
	new->gva = gva;
	new->gpa = gpa;
	new->cookie = cookie;
	memmove(&h->list[place + 1], &h->list[place],
		(h->list_count - place) * sizeof(*h->list));
	h->list[place] = new;
	h->list_count++;
	*hook = new;

	return KVMI_OK;
}

/*
 * A hit that is on its way when it is forgotten whose it is becomes a #BP in the
 * guest.  So each vCPU is asked once more, and hits of this one are answered,
 * even if UNHOOK has come meanwhile.
 */
static bool let_hits_go(struct kvmi_hooks *h, const struct kvmi_hook *hook)
{
	unsigned int i;
	bool all;

	hold(h, -1);
	all = wait_all_stopped(h) || h->lost;
	for (i = 0; i < h->vcpu_count; i++) {
		const struct kvmi_vm_event *event = h->vcpus[i].open;

		if (event && event->id == KVMI_EV_BREAKPOINT &&
		    hook_of(h, event) == hook)
			answer(h, i, KVMI_ACTION_RETRY, NULL);
	}
	release(h);
	if (!is_leaving(h))
		handle_all(h);

	return all;
}

enum kvmi_status kvmi_hooks_remove(struct kvmi_hooks *h, struct kvmi_hook *hook,
				   struct kvmi_error *err)
{
	size_t place;
	bool was;

	if (!h || !hook)
		return fail(err, KVMI_ERR_ARGUMENT, "no hooks or no hook");
	if (h->vm && (hook->hot || hook->leftover)) {
		if ((hook->planted || hook->leftover) &&
		    !change_byte(h, hook->gpa, INT3, hook->insn.bytes[0], &was))
			return fail(err, KVMI_ERR_CLOSED,
				    "the breakpoint could not be taken out");
		hook->planted = hook->leftover = false;
		hook->going = true;
		if (!let_hits_go(h, hook))
			return fail(err, KVMI_ERR_BUSY,
				    "the breakpoint is out, but not all vCPUs have stopped within %d ms: one may be at it; try again",
				    STOP_TIMEOUT_MS);
	}
	place = place_of(h, hook->gpa);
	memmove(&h->list[place], &h->list[place + 1],
		(--h->list_count - place) * sizeof(*h->list));
	free(hook);

	return KVMI_OK;
}

void kvmi_hooks_forget(struct kvmi_hooks *h)
{
	size_t i;

	if (!h)
		return;
	for (i = 0; i < h->list_count; i++) {
		h->list[i]->planted = h->list[i]->leftover = false;
		h->list[i]->retired = h->list[i]->ready = false;
	}
}

void *kvmi_hook_cookie(const struct kvmi_hook *hook)
{
	return hook->cookie;
}

uint64_t kvmi_hook_gva(const struct kvmi_hook *hook)
{
	return hook->gva;
}

uint64_t kvmi_hook_gpa(const struct kvmi_hook *hook)
{
	return hook->gpa;
}

bool kvmi_hook_is_in(const struct kvmi_hook *hook)
{
	return hook->planted;
}

bool kvmi_hook_is_retired(const struct kvmi_hook *hook)
{
	return hook->retired;
}

uint8_t kvmi_hook_original(const struct kvmi_hook *hook)
{
	return hook->insn.bytes[0];
}

const char *kvmi_hook_text(const struct kvmi_hook *hook)
{
	return hook->insn.text;
}

enum kvmi_status kvmi_hooks_restrict(struct kvmi_hooks *h, uint64_t gpa,
				     unsigned int access,
				     struct kvmi_error *err)
{
	struct kvmi_page_access page = { gpa & ~(PAGE_SIZE - 1), access };
	struct kvmi_page_access *pages;
	enum kvmi_status status;
	size_t i;

	if (!h || access > KVMI_PAGE_RWX)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no hooks, or not a set of KVMI_PAGE_*");
	for (i = 0; i < h->page_count; i++)
		if (h->pages[i].gpa == page.gpa)
			break;
	if (access == KVMI_PAGE_RWX && i < h->page_count) {
		h->pages[i] = h->pages[--h->page_count];
	} else if (i < h->page_count) {
		h->pages[i] = page;
	} else if (access != KVMI_PAGE_RWX) {
		pages = realloc(h->pages, (i + 1) * sizeof(*pages));
		if (!pages)
			return no_memory(err);
		h->pages = pages;
		h->pages[h->page_count++] = page;
	}

	if (!h->vm)
		return KVMI_OK;
	if (access != KVMI_PAGE_RWX && !h->pf_wanted) {
		status = kvmi_hooks_look_for_vcpus(h, err);
		if (status != KVMI_OK)
			return status;
	}

	return kvmi_vm_set_page_access(h->vm, &page, 1, err);
}

void kvmi_hooks_set_paging(struct kvmi_hooks *h,
			   const struct kvmi_paging *paging)
{
	if (h)
		h->paging = paging ? *paging : (struct kvmi_paging){ 0 };
}

/* ------------------------------------------------------------------------
 * For users: a connection
 */

/* An event, unless it is already */
static enum kvmi_status enable(struct kvmi_hooks *h, unsigned int vcpu,
			       unsigned int id, struct kvmi_error *err)
{
	struct vcpu *v = &h->vcpus[vcpu];
	enum kvmi_status status;

	if (id == KVMI_EV_PF ? v->pf_enabled : v->enabled)
		return KVMI_OK;
	status = kvmi_vcpu_control_events(h->vm, vcpu, id, true, err);
	if (status != KVMI_OK)
		return status;
	if (id == KVMI_EV_PF)
		v->pf_enabled = true;
	else
		v->enabled = true;

	return KVMI_OK;
}

enum kvmi_status kvmi_hooks_look_for_vcpus(struct kvmi_hooks *h,
					   struct kvmi_error *err)
{
	enum kvmi_status status, first = KVMI_OK;
	struct kvmi_error local;
	unsigned int count, i;

	if (!h || !h->vm)
		return fail(err, KVMI_ERR_ARGUMENT, "not attached");
	status = kvmi_vm_get_vcpu_count(h->vm, &count, &local);
	if (status != KVMI_OK) {
		is_lost(h, status, &local);
		if (err)
			*err = local;
		return status;
	}
	if (!more_vcpus(h, count))
		return no_memory(err);
	if (h->page_count)
		h->pf_wanted = true;
	for (i = 0; i < count && !is_leaving(h); i++) {
		status = enable(h, i, KVMI_EV_BREAKPOINT, &local);
		if (status == KVMI_OK && h->pf_wanted)
			status = enable(h, i, KVMI_EV_PF, &local);
		take_events(h);
		if (status == KVMI_OK || status == KVMI_ERR_NOT_STARTED)
			continue;
		is_lost(h, status, &local);
		if (first == KVMI_OK) {
			first = status;
			if (err)
				*err = local;
		}
		/* the others would be as slow */
		if (status == KVMI_ERR_TIMEOUT)
			break;
	}

	return first;
}

enum kvmi_status kvmi_hooks_attach(struct kvmi_hooks *h, struct kvmi_vm *vm,
				   struct kvmi_error *err)
{
	enum kvmi_status status;
	struct kvmi_error local;

	if (!h || !vm || h->vm)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no hooks, no vm, or attached already");
	h->walker = kvmi_walker_new(vm, 0, err);
	if (!h->walker)
		return KVMI_ERR_SYSTEM;
	h->vm = vm;
	h->unhook = h->lost = h->holding = h->pf_wanted = false;
	h->foreign = 0;
	h->freed_count = 0;
	h->can_step = kvmi_vm_get_version(vm)->singlestep &&
		kvmi_vm_check_command(vm, KVMI_CMD_VCPU_CONTROL_SINGLESTEP,
				      NULL) == KVMI_OK &&
		kvmi_vm_check_event(vm, KVMI_EV_SINGLESTEP, NULL) == KVMI_OK;

	status = kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, true, &local);
	if (status != KVMI_OK)
		is_lost(h, status, &local);
	else if (h->list_count || h->page_count)
		status = kvmi_hooks_look_for_vcpus(h, &local);
	if (status != KVMI_OK && err)
		*err = local;

	return status;
}

unsigned int kvmi_hooks_vcpus(const struct kvmi_hooks *h)
{
	unsigned int count = 0, i;

	for (i = 0; h && i < h->vcpu_count; i++)
		count += h->vcpus[i].enabled;

	return count;
}

bool kvmi_hooks_is_leaving(const struct kvmi_hooks *h)
{
	return is_leaving(h);
}

bool kvmi_hooks_is_asked_to_leave(const struct kvmi_hooks *h)
{
	return h->unhook;
}

bool kvmi_hooks_is_lost(const struct kvmi_hooks *h, struct kvmi_error *err)
{
	if (h->lost && err)
		*err = h->error;

	return h->lost;
}

uint64_t kvmi_hooks_foreign(const struct kvmi_hooks *h)
{
	return h->foreign;
}

bool kvmi_hooks_dispatch(struct kvmi_hooks *h)
{
	unsigned int i;

	if (!h || !h->vm)
		return false;
	take_events(h);
	if (is_leaving(h))
		return false;
	handle_all(h);
	/* handling may have queued more */
	take_events(h);
	for (i = 0; i < h->vcpu_count; i++)
		if (h->vcpus[i].open &&
		    (h->vcpus[i].open->id == KVMI_EV_BREAKPOINT ||
		     h->vcpus[i].open->id == KVMI_EV_PF))
			return !h->lost;

	return false;
}

enum kvmi_status kvmi_hooks_plant(struct kvmi_hooks *h,
				  struct kvmi_hooks_result *result,
				  struct kvmi_error *err)
{
	struct kvmi_hooks_result local = { .held = true };
	enum kvmi_status status = KVMI_OK;
	struct kvmi_hook **list;
	size_t count = 0, left, i;

	if (!result)
		result = &local;
	*result = local;
	if (!h || !h->vm)
		return fail(err, KVMI_ERR_ARGUMENT, "not attached");
	list = calloc(h->list_count + 1, sizeof(*list));
	if (!list)
		return no_memory(err);
	for (i = 0; i < h->list_count; i++)
		if (!h->list[i]->planted && !h->list[i]->retired &&
		    !h->list[i]->going)
			list[count++] = h->list[i];
	count = prepare_all(h, list, count);
	result->wanted = count;

	/*
	 * Not too many in one go: the guest stands still meanwhile, and may
	 * have to be left at any time.
	 */
	for (i = 0; i < count && !is_stopping(h); i += SLICE) {
		bool held;

		left = count - i;
		hold(h, -1);
		held = wait_all_stopped(h);
		if (!h->lost)
			exchange(h, list + i, left < SLICE ? left : SLICE,
				 false, held);
		release(h);
		handle_all(h);
		take_events(h);
		result->held &= held;
	}
	for (i = 0; i < count; i++)
		result->in += list[i]->planted;
	free(list);

	if (h->page_count && !is_stopping(h))
		status = kvmi_vm_set_page_access(h->vm, h->pages, h->page_count,
						 err);
	if (h->lost) {
		if (err)
			*err = h->error;
		return h->error.status;
	}

	return status;
}

/* Hits that have not been handled yet are hits nevertheless */
static void tell_open_hits(struct kvmi_hooks *h)
{
	unsigned int i;

	for (i = 0; i < h->vcpu_count; i++) {
		struct kvmi_vm_event *event = h->vcpus[i].open;
		struct kvmi_hook *bp;

		if (!event || event->id != KVMI_EV_BREAKPOINT)
			continue;
		bp = hook_of(h, event);
		if (bp && bp->planted)
			tell_hit(h, bp, event);
	}
}

static void let_all_go(struct kvmi_hooks *h)
{
	unsigned int i;

	for (i = 0; i < h->vcpu_count; i++) {
		struct kvmi_vm_event *event = h->vcpus[i].open;

		if (event)
			answer(h, i, event->id == KVMI_EV_BREAKPOINT &&
			       hook_of(h, event) ? KVMI_ACTION_RETRY :
						   KVMI_ACTION_CONTINUE, NULL);
	}
}

enum kvmi_status kvmi_hooks_take_out(struct kvmi_hooks *h,
				     struct kvmi_hooks_result *result,
				     struct kvmi_error *err)
{
	struct kvmi_hooks_result local = { 0 };
	struct kvmi_page_access *pages;
	struct kvmi_hook **list;
	int64_t start, hold_ms, deadline;
	size_t count = 0, i, j;

	if (!result)
		result = &local;
	*result = local;
	if (!h || !h->vm)
		return fail(err, KVMI_ERR_ARGUMENT, "not attached");
	hold_ms = now_ms();
	start = h->unhook ? h->unhook_ms : hold_ms;

	hold(h, -1);
	result->held = wait_all_stopped(h);
	if (!result->held && !h->lost)
		problem(h, "not all vCPUs stopped within %" PRId64 " ms",
			h->stop_deadline - hold_ms);
	tell_open_hits(h);

	list = calloc(h->list_count + 1, sizeof(*list));
	for (i = 0; list && i < h->list_count; i++)
		if (h->list[i]->planted || h->list[i]->leftover)
			list[count++] = h->list[i];
	if (!list)
		problem(h, "out of memory: breakpoints are left to KVM");
	result->in = count;
	exchange(h, list, count, true, result->held);
	for (i = 0; i < count; i++)
		result->left += list[i]->planted;
	pages = calloc(h->page_count + 1, sizeof(*pages));
	if (pages && h->page_count && !h->lost) {
		for (i = 0; i < h->page_count; i++)
			pages[i] = (struct kvmi_page_access){
				h->pages[i].gpa, KVMI_PAGE_RWX,
			};
		kvmi_vm_set_page_access(h->vm, pages, h->page_count, NULL);
	}
	free(pages);
	result->verified = !h->unhook || now_ms() - start < VERIFY_UNTIL_MS;
	if (result->verified && !result->left && count && !h->lost)
		result->left = count_left(h, list, count, result->held);
	free(list);

	let_all_go(h);
	/* the proof that no hit is on its way any more */
	h->holding = false;
	deadline = now_ms() + STOP_TIMEOUT_MS;
	do {
		take_events(h);
		let_all_go(h);
		for (i = 0; i < h->vcpu_count; i++)
			if (h->vcpus[i].pauses_due)
				break;
		if (h->unhook && deadline > h->unhook_ms + LEAVE_MS)
			deadline = h->unhook_ms + LEAVE_MS;
	} while (i < h->vcpu_count && wait_event(h, deadline));
	for (j = 0; result->held && i == h->vcpu_count && j < h->list_count; j++)
		h->list[j]->hot = h->list[j]->planted;

	if (h->lost) {
		if (err)
			*err = h->error;
		return h->error.status;
	}
	if (result->left)
		return fail(err, KVMI_ERR_BUSY,
			    "%zu breakpoints are still in the guest",
			    result->left);

	return KVMI_OK;
}

size_t kvmi_hooks_detach(struct kvmi_hooks *h)
{
	size_t left = 0, i;

	if (!h || !h->vm)
		return 0;
	for (i = 0; i < h->list_count; i++) {
		struct kvmi_hook *hook = h->list[i];

		hook->going = hook->hot = false;
		/* the INT3 may be there when the VM comes back */
		if (hook->planted) {
			hook->planted = false;
			hook->leftover = true;
			left++;
		}
	}
	for (i = 0; i < h->vcpu_count; i++)
		kvmi_vm_event_free(h->vcpus[i].open);
	free(h->vcpus);
	h->vcpus = NULL;
	h->vcpu_count = 0;
	kvmi_walker_free(h->walker);
	h->walker = NULL;
	h->vm = NULL;

	return left;
}

/* Until it is to be left, or stop_fd is readable */
static enum kvmi_status run(struct kvmi_hooks *h, int stop_fd,
			    struct kvmi_error *err)
{
	struct pollfd fds[] = {
		{ kvmi_vm_fd(h->vm), kvmi_vm_poll_events(h->vm), 0 },
		{ stop_fd, POLLIN, 0 },
	};
	int64_t look = now_ms() + LOOK_MS;
	enum kvmi_status status;
	struct kvmi_error local;
	bool more = true;

	while (!is_leaving(h)) {
		int timeout = kvmi_vm_next_timeout(h->vm);
		int64_t left = look - now_ms();

		if (left <= 0) {
			status = kvmi_hooks_look_for_vcpus(h, &local);
			if (status != KVMI_OK && !h->lost)
				problem(h, "%s", local.message);
			left = LOOK_MS;
			look = now_ms() + left;
		}
		if (timeout < 0 || timeout > left)
			timeout = left;
		if (poll(fds, 2, more ? 0 : timeout) < 0 && errno != EINTR)
			return fail_errno(err, errno, "poll");
		if (fds[1].revents)
			break;
		status = kvmi_vm_process(h->vm, &local);
		more = kvmi_hooks_dispatch(h);
		/* what came before the end has been taken */
		if (status != KVMI_OK && status != KVMI_ERR_NOTHING)
			is_lost(h, status, &local);
		kvmi_vm_dispatch(h->vm);
	}
	if (h->lost && err)
		*err = h->error;

	return h->lost ? h->error.status : KVMI_OK;
}

enum kvmi_status kvmi_hooks_run(struct kvmi_hooks *h, struct kvmi_vm *vm,
				int stop_fd, struct kvmi_error *err)
{
	enum kvmi_status status, out;
	struct kvmi_error local;

	status = kvmi_hooks_attach(h, vm, err);
	if (status == KVMI_ERR_ARGUMENT || !h->vm)
		return status;
	if (status == KVMI_OK)
		status = kvmi_hooks_plant(h, NULL, err);
	if (status == KVMI_OK)
		status = run(h, stop_fd, err);
	out = kvmi_hooks_take_out(h, NULL, &local);
	kvmi_hooks_detach(h);
	if (status == KVMI_OK && out != KVMI_OK) {
		status = out;
		if (err)
			*err = local;
	}

	return status;
}
