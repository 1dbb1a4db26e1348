/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One connection to one VM: breakpoints in, hits, breakpoints out.  The hard part
 * of it is the library's: see kvmi/hooks.h.
 */

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvmi.h"
#include "output.h"
#include "watch.h"

/*
 * A VM that is gone ends the connection: this is for one that is stuck.  Below
 * QEMU's deadline for unhooking (5 s).
 */
#define COMMAND_TIMEOUT_MS 4000
#define HANDSHAKE_TIMEOUT_MS 10000
#define KERNEL_POLL_MS 200
#define KERNEL_RETRY_MS 5000
#define SUMMARY_US 1000000
/* Less than what kvmi_hooks_take_out() takes for too long to verify */
#define LINGER_MAX_MS 10000u
/* How many breakpoint-out lines before only a count is printed */
#define FEW 16

struct session {
	struct watch *watch;
	struct kvmi_vm *vm;
	struct vm_record *record;
	struct kvmi_hooks *hooks;	/* the record's */

	bool planted;
	bool *vcpu_done;	/* has its events enabled */
	unsigned int vcpu_count;
	int64_t unhook_ts;	/* 0: not asked to leave */
	bool lost;		/* the connection is gone */
	struct kvmi_error error;	/* why */

	char waiting_for[256];	/* what was said last about the kernel */
	int64_t summary_ts;
};

static bool wants_breakpoints(const struct watch *watch)
{
	return watch->spec_count || watch->spread;
}

/* Breakpoints or pages */
static bool wants_hooks(const struct watch *watch)
{
	return wants_breakpoints(watch) || watch->events.access_count;
}

static bool wants_kernel(const struct watch *watch)
{
	return wants_breakpoints(watch) || events_need_kernel(&watch->events) ||
	       (watch->map && events_ids(&watch->events));
}

static bool wants_anything(const struct watch *watch)
{
	return wants_breakpoints(watch) || events_ids(&watch->events);
}

/* ------------------------------------------------------------------------
 * Output
 */

static void start_line(struct session *s, struct line *line, int64_t ts,
		       const char *event)
{
	char uuid[37];
	int i, at = 0;

	for (i = 0; i < 16; i++)
		at += sprintf(uuid + at, "%s%02x",
			      i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
			      s->record->uuid[i]);
	json_start(line, ts, event);
	json_string(line, "vm", s->record->label);
	json_string(line, "uuid", uuid);
}

static bool is_lost(struct session *s, enum kvmi_status status,
		    const struct kvmi_error *err);
static void problem(struct session *s, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static void problem(struct session *s, const char *format, ...)
{
	char text[512];
	struct line line;
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);

	atomic_store(&s->watch->problem, true);
	complain("%s: %s", s->record ? s->record->label : "a VM", text);
	if (s->watch->json && s->record) {
		start_line(s, &line, now_us(), "problem");
		json_string(&line, "message", text);
		json_end(&line, false);
	}
}

/* The kernel's struct pt_regs: what the program had in its registers */
struct pt_regs {
	uint64_t r15, r14, r13, r12, rbp, rbx;
	uint64_t r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
	uint64_t orig_rax;	/* the number */
};

struct call {
	bool known;
	int number;
	char name[64];		/* "": not known */
	uint64_t arguments[6];
};

/* The guest itself says which function has that number */
static void name_call(struct session *s, struct call *call)
{
	static const char prefix[] = "__x64_sys_";
	const struct vm_record *record = s->record;
	const struct symbol *symbol;
	uint64_t address;

	if (!record->syscall_table || call->number < 0 ||
	    call->number >= SYSCALLS_MAX)
		return;
	address = record->syscall_table[call->number] - record->guest.offset;
	symbol = symbols_at(guest_symbols(&record->guest, s->watch->map), address);
	if (symbol && symbol->address == address &&
	    !strncmp(symbol->name, prefix, sizeof(prefix) - 1))
		snprintf(call->name, sizeof(call->name), "%s",
			 symbol->name + sizeof(prefix) - 1);
}

/* Both functions that --syscall puts a breakpoint on have pt_regs in RDI */
static struct call get_call(struct session *s, unsigned int vcpu,
			    const struct kvm_regs *regs)
{
	struct call call = { 0 };
	struct pt_regs program;
	enum kvmi_status status;
	struct kvmi_error err;

	status = kvmi_vcpu_read_virtual(s->vm, vcpu, regs->rdi, &program,
					sizeof(program), &err);
	if (status != KVMI_OK) {
		if (!is_lost(s, status, &err))
			problem(s, "the arguments of a system call: %s",
				err.message);
		return call;
	}
	call = (struct call){
		.known = true, .number = program.orig_rax,
		.arguments = { program.rdi, program.rsi, program.rdx,
			       program.r10, program.r8, program.r9 },
	};
	name_call(s, &call);

	return call;
}

static void show_call(struct line *line, const struct call *call)
{
	unsigned int i;

	json_open(line, "syscall", '{');
	if (call->name[0])
		json_string(line, "name", call->name);
	json_number(line, "number", call->number);
	json_open(line, "arguments", '[');
	for (i = 0; i < 6; i++)
		json_hex(line, NULL, call->arguments[i]);
	json_close(line, ']');
	json_close(line, '}');
}

static void show_hit(struct session *s, struct breakpoint *bp, int64_t ts,
		     unsigned int vcpu, const struct kvmi_registers *state)
{
	const struct kvm_regs *regs = &state->regs;
	struct call call = { 0 };
	struct line line;

	if (s->watch->quiet ||
	    (!s->watch->json && bp->shown >= s->watch->show_hits))
		return;
	if (bp->syscall)
		call = get_call(s, vcpu, regs);
	if (!s->watch->json) {
		const uint64_t *a = call.arguments;

		bp->shown++;
		if (call.known)
			human(ts, true,
			      "%s: %s (%d), vCPU %u: %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 " %" PRIx64 ", cr3 %llx",
			      s->record->label,
			      call.name[0] ? call.name : "system call",
			      call.number, vcpu, a[0], a[1], a[2], a[3], a[4],
			      a[5], state->sregs.cr3);
		else
			human(ts, true,
		      "%s: %s, vCPU %u: rdi %llx rsi %llx rdx %llx rcx %llx r8 %llx r9 %llx rax %llx rsp %llx cr3 %llx",
		      s->record->label, bp->name, vcpu, regs->rdi, regs->rsi,
		      regs->rdx, regs->rcx, regs->r8, regs->r9, regs->rax,
		      regs->rsp, state->sregs.cr3);
		if (bp->shown == s->watch->show_hits)
			human(0, true, "                 %s: further hits of %s are only counted (see --show)",
			      s->record->label, bp->name);
		return;
	}

	start_line(s, &line, ts, "hit");
	json_number(&line, "vcpu", vcpu);
	json_string(&line, "symbol", bp->name);
	json_hex(&line, "address", bp->gva);
	json_number(&line, "hits", bp->hits);
	json_open(&line, "registers", '{');
	json_hex(&line, "rax", regs->rax);
	json_hex(&line, "rbx", regs->rbx);
	json_hex(&line, "rcx", regs->rcx);
	json_hex(&line, "rdx", regs->rdx);
	json_hex(&line, "rsi", regs->rsi);
	json_hex(&line, "rdi", regs->rdi);
	json_hex(&line, "rsp", regs->rsp);
	json_hex(&line, "rbp", regs->rbp);
	json_hex(&line, "r8", regs->r8);
	json_hex(&line, "r9", regs->r9);
	json_hex(&line, "r10", regs->r10);
	json_hex(&line, "r11", regs->r11);
	json_hex(&line, "r12", regs->r12);
	json_hex(&line, "r13", regs->r13);
	json_hex(&line, "r14", regs->r14);
	json_hex(&line, "r15", regs->r15);
	json_hex(&line, "rip", regs->rip);
	json_hex(&line, "rflags", regs->rflags);
	json_hex(&line, "cr3", state->sregs.cr3);
	json_close(&line, '}');
	if (call.known)
		show_call(&line, &call);
	json_end(&line, true);
}

static void show_summary(struct session *s, bool last)
{
	struct vm_record *record = s->record;
	int64_t ts = now_us(), interval = ts - s->summary_ts;
	char text[1024] = "";
	size_t i, length = 0, listed = 0, more = 0;
	uint64_t total = 0;
	struct line line;

	if (interval < SUMMARY_US && !last)
		return;
	s->summary_ts = ts;
	if (s->watch->quiet)
		return;

	if (s->watch->json) {
		start_line(s, &line, ts, "summary");
		json_number(&line, "interval_us", interval);
		json_number(&line, "foreign",
			    kvmi_hooks_foreign(s->hooks));
		json_open(&line, "breakpoints", '[');
	}
	/* in words, the kinds of events come first */
	for (i = 0; i < EVENT_IDS; i++) {
		struct seen *seen = &record->events[i];

		if (seen->count == seen->reported)
			continue;
		total += seen->count - seen->reported;
		length += snprintf(text + length, sizeof(text) - length,
				   "%s%s +%" PRIu64 " = %" PRIu64,
				   length ? ", " : "", kvmi_event_name(i),
				   seen->count - seen->reported, seen->count);
	}
	for (i = 0; i < record->breakpoint_count; i++) {
		struct breakpoint *bp = &record->breakpoints[i];
		uint64_t new = bp->hits - bp->reported;

		if (!new)
			continue;
		bp->reported = bp->hits;
		total += new;
		if (listed++ >= FEW) {
			more++;
			continue;
		}
		if (s->watch->json) {
			json_open(&line, NULL, '{');
			json_string(&line, "symbol", bp->name);
			json_number(&line, "hits", bp->hits);
			json_number(&line, "new", new);
			json_close(&line, '}');
		} else if (length < sizeof(text)) {
			length += snprintf(text + length, sizeof(text) - length,
					   "%s%s +%" PRIu64 " = %" PRIu64,
					   length ? ", " : "", bp->name, new,
					   bp->hits);
		}
	}
	if (!total)
		return;
	if (s->watch->json) {
		json_close(&line, ']');
		json_open(&line, "events", '[');
	}
	for (i = 0; i < EVENT_IDS; i++) {
		struct seen *seen = &record->events[i];
		uint64_t new = seen->count - seen->reported;

		seen->reported = seen->count;
		if (!new || !s->watch->json)
			continue;
		json_open(&line, NULL, '{');
		json_string(&line, "event", kvmi_event_name(i));
		json_number(&line, "count", seen->count);
		json_number(&line, "new", new);
		json_close(&line, '}');
	}
	if (s->watch->json) {
		json_close(&line, ']');
		json_end(&line, true);
	} else {
		human(ts, true, "%s: %" PRIu64 "%s in %.1f s: %s%s",
		      record->label, total, wants_breakpoints(s->watch) ?
		      " hits" : "", interval / 1e6, text, more ? ", ..." : "");
	}
}

/* ------------------------------------------------------------------------
 * Events
 */

/* Remembers that the connection is gone */
static bool is_lost(struct session *s, enum kvmi_status status,
		    const struct kvmi_error *err)
{
	if (status == KVMI_ERR_CLOSED || status == KVMI_ERR_PROTOCOL ||
	    status == KVMI_ERR_SYSTEM) {
		if (!s->lost)
			s->error = *err;
		s->lost = true;
	}
	/* or the library has seen it first */
	if (!s->lost)
		s->lost = kvmi_hooks_is_lost(s->hooks, &s->error);

	return s->lost;
}

/* There is something more urgent than whatever goes on */
static bool is_stopping(struct session *s)
{
	if (!s->unhook_ts && kvmi_hooks_is_asked_to_leave(s->hooks))
		s->unhook_ts = now_us();

	return s->unhook_ts || is_lost(s, KVMI_OK, NULL) ||
	       atomic_load(&s->watch->stopping);
}

static void count_one(struct session *s, uint64_t *hits)
{
	uint64_t all = atomic_fetch_add(&s->watch->hits, 1) + 1;

	++*hits;
	if (s->watch->count && all == s->watch->count)
		watch_stop(s->watch);
}

static void on_hit(struct kvmi_hook *hook, const struct kvmi_vm_event *event,
		   void *context)
{
	struct vm_record *record = context;
	struct breakpoint *bp = kvmi_hook_cookie(hook);

	count_one(record->session, &bp->hits);
	show_hit(record->session, bp, now_us(), event->vcpu, &event->state);
}

static void show_event(struct session *s, const struct kvmi_vm_event *event)
{
	struct seen *seen = &s->record->events[event->id];
	char text[640];
	struct line line;

	count_one(s, &seen->count);
	if (s->watch->quiet ||
	    (!s->watch->json && seen->shown >= s->watch->show_hits))
		return;
	start_line(s, &line, now_us(), kvmi_event_name(event->id));
	events_describe(event, &s->record->guest, s->watch->map, &line, text,
			sizeof(text));
	if (s->watch->json) {
		json_end(&line, true);
		return;
	}
	human(now_us(), true, "%s: vCPU %u: %s", s->record->label, event->vcpu,
	      text);
	if (++seen->shown == s->watch->show_hits)
		human(0, true, "                 %s: further events of the kind %s are only counted (see --show)",
		      s->record->label, kvmi_event_name(event->id));
}

static enum kvmi_action on_page(const struct kvmi_vm_event *event, void *context)
{
	struct vm_record *record = context;

	show_event(record->session, event);

	return KVMI_ACTION_CONTINUE;
}

static void on_event(struct kvmi_vm_event *event, void *context)
{
	struct vm_record *record = context;
	struct session *s = record->session;
	enum kvmi_status status;
	struct kvmi_error err;

	if (events_want(&s->watch->events, event->id))
		show_event(s, event);
	status = kvmi_vm_reply(s->vm, event, KVMI_ACTION_CONTINUE, &err);
	if (status != KVMI_OK && !is_lost(s, status, &err))
		problem(s, "vCPU %u: %s", event->vcpu, err.message);
	kvmi_vm_event_free(event);
}

static void on_problem(struct kvmi_hook *hook, enum kvmi_hook_problem kind,
		       const char *text, void *context)
{
	struct vm_record *record = context;
	struct breakpoint *bp = hook ? kvmi_hook_cookie(hook) : NULL;

	if (!bp) {
		problem(record->session, "%s", text);
	} else if (kind == KVMI_HOOK_RETIRED) {
		problem(record->session, "breakpoint %s taken out: %s",
			bp->name, text);
	} else {
		if (!bp->complained)
			problem(record->session, "no breakpoint at %s: %s",
				bp->name, text);
		bp->complained = true;
	}
}

static bool on_interrupted(void *context)
{
	struct vm_record *record = context;

	return is_stopping(record->session);
}

static bool is_interrupted(void *context)
{
	struct session *s = context;

	kvmi_hooks_dispatch(s->hooks);

	return is_stopping(s);
}

bool session_make_hooks(struct vm_record *record)
{
	static const struct kvmi_hooks_callbacks callbacks = {
		.hit = on_hit, .page = on_page, .event = on_event,
		.problem = on_problem, .interrupted = on_interrupted,
	};

	record->hooks = kvmi_hooks_new(&callbacks, record, NULL);

	return record->hooks;
}

/* ------------------------------------------------------------------------
 * Breakpoints
 */

static void name_breakpoint(struct session *s, struct breakpoint *bp)
{
	const struct guest *guest = &s->record->guest;
	const struct symbol *symbol;

	if (bp->spec && !(bp->spec[0] >= '0' && bp->spec[0] <= '9'))
		return;
	symbol = symbols_at(guest_symbols(guest, s->watch->map),
			    bp->gva - guest->offset);
	if (symbol && bp->gva >= guest->text_start && bp->gva < guest->text_end)
		snprintf(bp->name, sizeof(bp->name), "%.60s+0x%" PRIx64,
			 symbol->name, bp->gva - guest->offset - symbol->address);
	else
		snprintf(bp->name, sizeof(bp->name), "0x%" PRIx64, bp->gva);
}

/*
 * For --break-spread: places in the NOPs in front of functions, evenly over the
 * kernel.  Those that turn out not to be such are left unresolved.
 */
static void spread(struct session *s, struct breakpoint *first, size_t wanted)
{
	struct guest *guest = &s->record->guest;
	const struct symbols *symbols = guest_symbols(guest, s->watch->map);
	uint64_t start = guest->text_start, last = 0, *places;
	size_t size = guest->text_end - start, found = 0, chosen = 0, i;
	enum kvmi_status status;
	struct kvmi_error err;
	uint8_t *text;

	places = calloc(symbols_count(symbols) + 1, sizeof(*places));
	text = malloc(size);
	status = !places || !text ? KVMI_ERR_LIMIT :
		 kvmi_vm_read_physical(s->vm, start - guest->linear, text,
				       size, &err);
	if (!guest->linear || (status != KVMI_OK && !is_lost(s, status, &err))) {
		problem(s, "the kernel's code cannot be read");
		size = 0;
	}
	for (i = 0; i < symbols_count(symbols) && size && !s->lost; i++) {
		const struct symbol *symbol = symbols_get(symbols, i);
		uint64_t place = symbol->address + guest->offset - 8;
		uint32_t bytes;

		if (symbol->address == last || !strchr("tT", symbol->type) ||
		    place < start || place >= start + size - 8)
			continue;
		last = symbol->address;
		/* four times NOP; ours may be there already */
		memcpy(&bytes, text + (place - start), sizeof(bytes));
		if (bytes == 0x90909090 || bytes == 0x909090cc)
			places[found++] = place;
	}
	for (; chosen < wanted && chosen < found; chosen++)
		first[chosen].gva = places[found > wanted ?
					   chosen * found / wanted : chosen];
	if (chosen < wanted && !s->lost)
		problem(s, "the kernel has room for %zu of %zu spread breakpoints",
			chosen, wanted);
	free(text);
	free(places);
}

/* Names are no more than an aid: without the table there are numbers */
static void read_syscall_table(struct session *s)
{
	const size_t size = SYSCALLS_MAX * sizeof(uint64_t);
	struct vm_record *record = s->record;
	enum kvmi_status status;
	struct kvmi_error err;
	uint64_t gva;
	char why[400];

	free(record->syscall_table);
	record->syscall_table = NULL;
	if (!guest_resolve(&record->guest, s->watch->map, "sys_call_table", false,
			   &gva, why, sizeof(why)))
		return;
	record->syscall_table = malloc(size);
	if (!record->syscall_table)
		return;
	status = guest_read(&record->guest, gva, record->syscall_table, size,
			    &err);
	if (status != KVMI_OK) {
		is_lost(s, status, &err);
		free(record->syscall_table);
		record->syscall_table = NULL;
	}
}

/* Where they are; all that can be found are in the set then */
static void resolve(struct session *s)
{
	struct vm_record *record = s->record;
	struct guest *guest = &record->guest;
	size_t specs = s->watch->spec_count, i;
	enum kvmi_status status;
	struct kvmi_error err;
	char why[400];

	if (record->breakpoint_count > specs &&
	    !record->breakpoints[specs].gva)
		spread(s, &record->breakpoints[specs],
		       record->breakpoint_count - specs);
	if (s->watch->syscalls)
		read_syscall_table(s);

	for (i = 0; i < record->breakpoint_count && !s->lost; i++) {
		struct breakpoint *bp = &record->breakpoints[i];
		struct kvmi_hook *hook;
		uint64_t gpa;
		bool good;

		if (bp->retired)
			continue;
		if (bp->spec)
			good = guest_resolve(guest, s->watch->map, bp->spec,
					     true, &bp->gva, why, sizeof(why));
		else
			good = bp->gva;
		if (good) {
			name_breakpoint(s, bp);
			status = guest_kernel_gpa(guest, bp->gva, &gpa, &err);
			if (status != KVMI_OK) {
				is_lost(s, status, &err);
				snprintf(why, sizeof(why), "%s: %s", bp->name,
					 err.message);
				good = false;
			}
		}
		if (!good) {
			if (bp->spec && !bp->complained && !s->lost)
				problem(s, "no breakpoint: %s", why);
			bp->complained = true;
			continue;
		}
		if (bp->hook && kvmi_hook_gpa(bp->hook) == gpa)
			continue;
		status = bp->hook ? kvmi_hooks_remove(s->hooks, bp->hook, &err) :
				    KVMI_OK;
		if (status != KVMI_OK) {
			if (!is_lost(s, status, &err))
				problem(s, "%s", err.message);
			continue;
		}
		bp->hook = NULL;
		status = kvmi_hooks_add(s->hooks, bp->gva, gpa, bp, &hook, &err);
		if (status == KVMI_OK) {
			bp->hook = hook;
		} else if (status == KVMI_ERR_BUSY) {
			struct breakpoint *other = kvmi_hook_cookie(hook);

			problem(s, "%s and %s are the same place", other->name,
				bp->name);
			bp->retired = true;
		} else {
			problem(s, "%s: %s", bp->name, err.message);
		}
	}
}

/*
 * The pages of --access, once for each boot.  Comes before vCPUs are looked for:
 * the hooks enable events of pages only if they have some.
 */
static void restrict_pages(struct session *s)
{
	struct vm_record *record = s->record;
	const struct kvmi_page_access *page;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!s->watch->events.access_count)
		return;
	if (!record->pages) {
		status = events_pages(&s->watch->events, &record->guest,
				      s->watch->map, &record->pages,
				      &record->page_count, &err);
		if (status != KVMI_OK && !is_lost(s, status, &err))
			problem(s, "%s", err.message);
	}
	while (record->pages_given < record->page_count && !is_stopping(s)) {
		page = &record->pages[record->pages_given++];
		status = kvmi_hooks_restrict(s->hooks, page->gpa, page->access,
					     &err);
		/* what is no memory is complained about in plant() */
		if (status != KVMI_OK)
			is_lost(s, status, &err);
	}
}

/* All breakpoints into the guest */
static void plant(struct session *s)
{
	struct vm_record *record = s->record;
	struct kvmi_hooks_result result;
	struct kvmi_paging paging = {
		.cr3 = record->guest.cr3,
		.levels = record->guest.five_levels ? 5 : 4,
	};
	int64_t start = now_us();
	enum kvmi_status status;
	struct kvmi_error err;
	struct line line;
	size_t i;

	s->planted = true;
	s->summary_ts = now_us();
	if (!wants_hooks(s->watch))
		return;
	resolve(s);
	kvmi_hooks_set_paging(s->hooks, &paging);
	if (!is_stopping(s)) {
		status = kvmi_hooks_plant(s->hooks, &result, &err);
		if (status != KVMI_OK && !is_lost(s, status, &err))
			problem(s, "%s", err.message);
	}
	s->summary_ts = now_us();
	if (is_stopping(s))
		return;
	for (i = 0; i < record->breakpoint_count; i++) {
		struct breakpoint *bp = &record->breakpoints[i];

		if (bp->hook && kvmi_hook_is_in(bp->hook))
			bp->complained = false;
	}
	if (result.in < result.wanted)
		problem(s, "%zu breakpoints could not be planted: the guest was changing its code",
			result.wanted - result.in);

	if (s->watch->json) {
		start_line(s, &line, now_us(), "planted");
		json_number(&line, "breakpoints", result.in);
		json_number(&line, "pages", record->pages_given);
		json_number(&line, "duration_us", now_us() - start);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: %zu breakpoint%s planted, %zu page%s restricted in %.1f ms",
		      record->label, result.in, result.in == 1 ? "" : "s",
		      record->pages_given, record->pages_given == 1 ? "" : "s",
		      (now_us() - start) / 1e3);
	}
}

/* ------------------------------------------------------------------------
 * The end
 */

static void tell_out(struct session *s, int64_t ts, size_t count)
{
	struct vm_record *record = s->record;
	struct line line;
	size_t i;

	if (count > FEW) {
		start_line(s, &line, ts, "breakpoint-out");
		json_number(&line, "count", count);
		json_end(&line, false);
		return;
	}
	for (i = 0; i < record->breakpoint_count; i++) {
		const struct breakpoint *bp = &record->breakpoints[i];

		if (!bp->hook || !bp->was_in)
			continue;
		start_line(s, &line, ts, "breakpoint-out");
		json_string(&line, "symbol", bp->name);
		json_hex(&line, "address", bp->gva);
		json_hex(&line, "original", kvmi_hook_original(bp->hook));
		json_end(&line, false);
	}
}

/*
 * For --linger: as slow as the file says, in ms; not at all while there is no
 * such file.
 */
static void linger(struct session *s)
{
	unsigned int ms = 0;
	FILE *file;

	if (!s->watch->linger || !s->unhook_ts)
		return;
	file = fopen(s->watch->linger, "r");
	if (!file)
		return;
	if (fscanf(file, "%u", &ms) != 1 || ms > LINGER_MAX_MS)
		problem(s, "%s: not a number up to %u", s->watch->linger,
			LINGER_MAX_MS);
	else
		nanosleep(&(struct timespec){ ms / 1000, ms % 1000 * 1000000 },
			  NULL);
	fclose(file);
}

/*
 * All breakpoints out, all pages free, all vCPUs on their way.  KVM itself
 * switches off what other events were asked for when the connection ends.
 */
static void clean(struct session *s, const char *reason)
{
	struct vm_record *record = s->record;
	int64_t start = s->unhook_ts ? s->unhook_ts : now_us(), ts;
	struct kvmi_hooks_result result;
	enum kvmi_status status;
	struct kvmi_error err;
	struct line line;
	size_t i;

	if (s->watch->json) {
		start_line(s, &line, start, "notified");
		json_string(&line, "reason", reason);
		json_end(&line, false);
	} else {
		human(start, false, "%s: %s", record->label, s->unhook_ts ?
		      "the VM is going to be paused" : "ending");
	}
	linger(s);

	for (i = 0; i < record->breakpoint_count; i++) {
		struct breakpoint *bp = &record->breakpoints[i];

		bp->was_in = bp->hook && kvmi_hook_is_in(bp->hook);
	}
	status = kvmi_hooks_take_out(s->hooks, &result, &err);
	ts = now_us();
	if (s->watch->json)
		tell_out(s, ts, result.in);
	if (status != KVMI_OK) {
		if (!is_lost(s, status, &err))
			problem(s, "%s", err.message);
		return;
	}
	if (s->watch->json) {
		start_line(s, &line, ts, "clean");
		json_number(&line, "breakpoints", result.in);
		json_bool(&line, "verified", result.verified);
		json_bool(&line, "held", result.held);
		json_number(&line, "duration_us", ts - start);
		json_end(&line, false);
	} else {
		human(ts, false, "%s: clean: %zu breakpoint%s out%s in %.1f ms",
		      record->label, result.in, result.in == 1 ? "" : "s",
		      result.verified ? " and verified" : "",
		      (ts - start) / 1e3);
	}
}

static void finish(struct session *s)
{
	struct vm_record *record = s->record;
	const char *reason = s->unhook_ts ? "unhook" : "stop";
	uint64_t hits = 0, events = 0;
	struct line line;
	size_t i, left;
	int64_t ts;

	if (!is_lost(s, KVMI_OK, NULL))
		clean(s, reason);
	left = kvmi_hooks_detach(s->hooks);
	for (i = 0; i < record->breakpoint_count; i++)
		hits += record->breakpoints[i].hits;
	for (i = 0; i < EVENT_IDS; i++)
		events += record->events[i].count;
	show_summary(s, true);

	if (s->lost) {
		/*
		 * Without a notice the VM was reset or has ended, most likely;
		 * else we were too slow.
		 */
		if (left && s->unhook_ts)
			problem(s, "the connection was cut with %zu breakpoints still in the guest",
				left);
		reason = "lost";
	}
	kvmi_vm_close(s->vm);
	s->vm = NULL;
	ts = now_us();
	/* QEMU is waiting for this, and what is left to do here can wait */
	sched_yield();

	if (s->watch->json) {
		start_line(s, &line, ts, "closed");
		json_string(&line, "reason", reason);
		if (s->lost) {
			json_string(&line, "detail", s->error.message);
			json_number(&line, "left", left);
		}
		json_number(&line, "hits", hits);
		json_number(&line, "events", events);
		json_end(&line, false);
	} else if (s->lost) {
		human(ts, false, "%s: connection lost: %s (%zu breakpoints were in the guest; if it comes back with them, they are taken over)",
		      record->label, s->error.message, left);
	} else {
		human(ts, false, "%s: connection closed", record->label);
	}
}

/* ------------------------------------------------------------------------
 * The start
 */

/* Those of vCPUs that have not got them so far */
static enum kvmi_status enable_events(struct session *s, struct kvmi_error *err)
{
	enum kvmi_status status;
	unsigned int count, i;

	if (!events_ids(&s->watch->events))
		return KVMI_OK;
	status = kvmi_vm_get_vcpu_count(s->vm, &count, err);
	if (status != KVMI_OK)
		return status;
	if (count > s->vcpu_count) {
		bool *done = realloc(s->vcpu_done, count * sizeof(*done));

		if (!done) {
			snprintf(err->message, sizeof(err->message),
				 "out of memory");
			return KVMI_ERR_LIMIT;
		}
		memset(done + s->vcpu_count, 0,
		       (count - s->vcpu_count) * sizeof(*done));
		s->vcpu_done = done;
		s->vcpu_count = count;
	}
	for (i = 0; i < count && !is_stopping(s); i++) {
		if (s->vcpu_done[i])
			continue;
		status = events_control(&s->watch->events, s->vm, i, true, err);
		/* the others wait for answers */
		kvmi_hooks_dispatch(s->hooks);
		if (status == KVMI_OK)
			s->vcpu_done[i] = true;
		else if (status != KVMI_ERR_NOT_STARTED)
			return status;
	}

	return KVMI_OK;
}

/* vCPUs that are there, and have started, since the last time */
static void look_for_vcpus(struct session *s)
{
	enum kvmi_status status = KVMI_OK;
	struct kvmi_error err;

	if (wants_hooks(s->watch))
		status = kvmi_hooks_look_for_vcpus(s->hooks, &err);
	if (status == KVMI_OK)
		status = enable_events(s, &err);
	if (status != KVMI_OK && !is_lost(s, status, &err))
		problem(s, "%s", err.message);
}

static unsigned int count_vcpus(const struct session *s)
{
	unsigned int count = 0, i;

	if (wants_hooks(s->watch))
		return kvmi_hooks_vcpus(s->hooks);
	for (i = 0; i < s->vcpu_count; i++)
		count += s->vcpu_done[i];

	return count;
}

/*
 * Looks for the kernel, if that is needed; plants when it is there.  When to try
 * again, in ms.
 */
static int try_to_plant(struct session *s)
{
	struct guest *guest = &s->record->guest;
	enum guest_result result = GUEST_FOUND;
	struct kvmi_error err;
	char text[256] = "";
	unsigned int vcpus;
	struct line line;

	guest->interrupted = is_interrupted;
	guest->context = s;
	if (wants_kernel(s->watch))
		result = guest_find_kernel(guest, s->vm, s->watch->map, text,
					   sizeof(text), &err);
	kvmi_hooks_dispatch(s->hooks);
	if (result == GUEST_FAILED) {
		if (!is_lost(s, err.status, &err))
			problem(s, "%s", err.message);
		return KERNEL_RETRY_MS;
	}
	if (is_stopping(s))
		return KERNEL_POLL_MS;
	if (result != GUEST_FOUND) {
		if (strcmp(text, s->waiting_for)) {
			snprintf(s->waiting_for, sizeof(s->waiting_for), "%s",
				 text);
			if (result == GUEST_UNKNOWN)
				problem(s, "%s", text);
			else if (!s->watch->json)
				human(now_us(), false, "%s: waiting: %s",
				      s->record->label, text);
		}
		return result == GUEST_UNKNOWN ? KERNEL_RETRY_MS :
						 KERNEL_POLL_MS;
	}

	restrict_pages(s);
	look_for_vcpus(s);
	if (s->lost)
		return KERNEL_POLL_MS;
	vcpus = count_vcpus(s);
	if (!vcpus)
		return KERNEL_RETRY_MS;

	if (s->watch->json) {
		start_line(s, &line, now_us(), "ready");
		if (wants_kernel(s->watch)) {
			json_string(&line, "kernel", guest->banner);
			json_hex(&line, "offset", guest->kaslr);
		}
		json_number(&line, "vcpus", vcpus);
		json_end(&line, false);
	} else if (wants_kernel(s->watch)) {
		human(now_us(), false, "%s: %.100s, moved by 0x%" PRIx64 ", %u vCPU%s",
		      s->record->label, guest->banner, (uint64_t)guest->kaslr,
		      vcpus, vcpus == 1 ? "" : "s");
	} else {
		human(now_us(), false, "%s: %u vCPU%s", s->record->label, vcpus,
		      vcpus == 1 ? "" : "s");
	}
	plant(s);

	return 0;
}

/* Another boot of the VM: what is known of its memory is worth nothing */
static void check_start_time(struct vm_record *record,
			     const struct kvmi_vm_hello *hello)
{
	size_t i;

	if (record->start_time == hello->start_time)
		return;
	record->start_time = hello->start_time;
	guest_forget(&record->guest);
	/* not attached: this sends nothing */
	for (i = 0; i < record->pages_given; i++)
		kvmi_hooks_restrict(record->hooks, record->pages[i].gpa,
				    KVMI_PAGE_RWX, NULL);
	free(record->pages);
	record->pages = NULL;
	record->page_count = record->pages_given = 0;
	for (i = 0; i < record->breakpoint_count; i++) {
		struct breakpoint *bp = &record->breakpoints[i];

		if (bp->hook)
			kvmi_hooks_remove(record->hooks, bp->hook, NULL);
		bp->hook = NULL;
		bp->retired = false;
		bp->complained = false;
		bp->gva = 0;
	}
}

static bool begin(struct session *s)
{
	uint64_t commands = KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS) |
			    events_commands(&s->watch->events);
	uint64_t events = KVMI_SET(KVMI_EV_UNHOOK) |
			  events_ids(&s->watch->events);
	const struct kvmi_vm_hello *hello;
	enum kvmi_status status;
	struct kvmi_error err;
	struct line line;

	if (wants_kernel(s->watch))
		commands |= ONE_VM_KERNEL_COMMANDS;
	if (wants_hooks(s->watch)) {
		commands |= KVMI_SET(KVMI_CMD_VM_GET_INFO) |
			    KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL) |
			    KVMI_SET(KVMI_CMD_VM_WRITE_PHYSICAL) |
			    KVMI_SET(KVMI_CMD_VM_PAUSE_VCPU) |
			    KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS) |
			    KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS) |
			    KVMI_SET(KVMI_CMD_VCPU_SET_REGISTERS);
		events |= KVMI_SET(KVMI_EV_BREAKPOINT) | KVMI_SET(KVMI_EV_PAUSE);
	}

	if (s->watch->syscalls)
		commands |= KVMI_SET(KVMI_CMD_VCPU_TRANSLATE_GVA);

	kvmi_vm_set_timeout(s->vm, HANDSHAKE_TIMEOUT_MS, NULL);
	status = kvmi_vm_connect(s->vm, commands, events, &err);
	kvmi_vm_set_timeout(s->vm, COMMAND_TIMEOUT_MS, NULL);
	/* QEMU tries once in a while: it may have gone before we came */
	if (status == KVMI_ERR_CLOSED)
		return false;
	if (status != KVMI_OK) {
		problem(s, "%s", err.message);
		return false;
	}

	hello = kvmi_vm_get_hello(s->vm);
	s->record = record_take(s->watch, s->vm);
	if (!s->record) {
		problem(s, "'%s' is connected twice; the new connection was closed",
			hello->name);
		return false;
	}
	s->record->session = s;
	s->hooks = s->record->hooks;
	check_start_time(s->record, hello);

	if (s->watch->json) {
		start_line(s, &line, now_us(), "connected");
		json_number(&line, "start_time", hello->start_time);
		json_hex(&line, "max_gpa", hello->max_gpa);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: connected", s->record->label);
	}

	status = kvmi_hooks_attach(s->hooks, s->vm, &err);
	if (status != KVMI_OK && !is_lost(s, status, &err)) {
		problem(s, "without its events nothing is safe: %s",
			err.message);
		kvmi_hooks_detach(s->hooks);
		record_release(s->watch, s->record);
		return false;
	}
	/* else there is more to do before */
	if (!s->lost && s->watch->json && !wants_anything(s->watch)) {
		start_line(s, &line, now_us(), "ready");
		json_end(&line, false);
	}

	return true;
}

void session_run(struct watch *watch, struct kvmi_vm *vm)
{
	struct session s = { .watch = watch, .vm = vm };
	bool wants_to_plant = wants_anything(watch);
	int64_t next_try = 0, next_look = 0, now;

	if (!begin(&s)) {
		kvmi_vm_close(vm);
		return;
	}

	for (;;) {
		struct pollfd poll_fds[2] = {
			{ .fd = kvmi_vm_fd(vm) },
			{ .fd = watch->stop_fd, .events = POLLIN },
		};
		enum kvmi_status status;
		struct kvmi_error err;
		int timeout;
		bool more;

		more = kvmi_hooks_dispatch(s.hooks);
		if (is_stopping(&s))
			break;
		/* don't sleep on hits that came meanwhile */
		if (more)
			continue;

		now = now_ms();
		if (wants_to_plant && !s.planted && now >= next_try) {
			next_try = try_to_plant(&s);
			next_try += now_ms();
			continue;
		}
		if (s.planted && now >= next_look) {
			look_for_vcpus(&s);
			show_summary(&s, false);
			next_look = now_ms() + SUMMARY_US / 1000;
			continue;
		}

		timeout = (s.planted ? next_look : wants_to_plant ? next_try :
			   now + 60000) - now;
		poll_fds[0].events = kvmi_vm_poll_events(vm);
		if (poll(poll_fds, 2, timeout < 0 ? 0 : timeout) < 0 &&
		    errno != EINTR)
			break;
		status = kvmi_vm_process(vm, &err);
		if (status != KVMI_OK) {
			/* events that came before the end of the connection */
			kvmi_hooks_dispatch(s.hooks);
			is_lost(&s, status, &err);
		}
	}

	finish(&s);
	free(s.vcpu_done);
	record_release(watch, s.record);
}
