/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One connection to one VM: breakpoints in, hits, breakpoints out.
 *
 * Rules that keep the guest alive:
 *
 *  - A breakpoint is in memory only while the event is enabled on all vCPUs.
 *  - Nothing is left behind.  To take the breakpoints out, all vCPUs are
 *    paused; each then has an open event, either the PAUSE or the hit that it
 *    had before.  With all bytes back, hits are answered by RETRY, which runs
 *    the instruction that is there now.  Only when all PAUSE events have been
 *    answered too, so that no hit can be on its way, the connection is closed.
 *  - To execute an instruction that is under a breakpoint, its byte has to be
 *    put back for a moment; all other vCPUs are paused meanwhile.
 *  - A byte is put back only if the INT3 is still there: the guest may have
 *    rewritten its code.
 */

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "output.h"
#include "watch.h"

#define INT3 0xcc

/* A VM that is gone ends the connection: this is for one that is stuck */
#define COMMAND_TIMEOUT_MS 10000
#define HANDSHAKE_TIMEOUT_MS 10000
/* For all vCPUs to stop or to go on; below QEMU's deadline for unhooking (5 s) */
#define STOP_TIMEOUT_MS 3000
/* For one instruction */
#define STEP_TIMEOUT_MS 3000
/* When taking out took longer, there is no time to have a second look */
#define VERIFY_UNTIL_MS 2500
#define KERNEL_POLL_MS 200
#define KERNEL_RETRY_MS 5000
#define SUMMARY_US 1000000
/* How many breakpoint-out lines before only a count is printed */
#define FEW 16
/* Pages that are handled at once */
#define CHUNK 256
/* Breakpoints that are planted while the guest stands still */
#define SLICE 1024

struct vcpu {
	bool enabled;			/* BREAKPOINT is */
	bool fix_registers;		/* open->state is not what the vCPU has */
	struct kvmi_vm_event *open;	/* not answered yet */
	unsigned int pauses_due;	/* PAUSE events that will come */
};

struct session {
	struct watch *watch;
	struct kvmi_vm *vm;
	struct vm_record *record;
	struct insn_decoder *decoder;

	struct vcpu *vcpus;
	unsigned int vcpu_count;
	bool holding;		/* do not answer PAUSE events */

	bool planted;
	bool unhook;		/* KVMI_EV_UNHOOK came */
	int64_t unhook_ts;
	bool lost;		/* the connection is gone */
	struct kvmi_error error;	/* why */

	char waiting_for[256];	/* what was said last about the kernel */
	uint64_t foreign;	/* INT3s of the guest itself */
	int64_t summary_ts;
};

static int64_t now_ms(void)
{
	return now_us() / 1000;
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

static void show_hit(struct session *s, struct breakpoint *bp, int64_t ts,
		     unsigned int vcpu, const struct kvmi_registers *state)
{
	const struct kvm_regs *regs = &state->regs;
	struct line line;

	if (s->watch->quiet)
		return;
	if (!s->watch->json) {
		if (bp->shown >= s->watch->show_hits)
			return;
		bp->shown++;
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
		json_number(&line, "foreign", s->foreign);
		json_open(&line, "breakpoints", '[');
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
		json_end(&line, true);
	} else {
		human(ts, true, "%s: %" PRIu64 " hits in %.1f s: %s%s",
		      record->label, total, interval / 1e6, text,
		      more ? ", ..." : "");
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

	return s->lost;
}

/* There is something more urgent than whatever goes on */
static bool is_stopping(struct session *s)
{
	return s->unhook || s->lost || atomic_load(&s->watch->stopping);
}

/* Answers the open event of a vCPU */
static void answer(struct session *s, unsigned int vcpu, enum kvmi_action action,
		   const struct kvm_regs *regs)
{
	struct vcpu *v = &s->vcpus[vcpu];
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
		kvmi_vm_reply_with_registers(s->vm, event, action, regs, &err) :
		kvmi_vm_reply(s->vm, event, action, &err);
	kvmi_vm_event_free(event);
	if (status != KVMI_OK && !is_lost(s, status, &err))
		problem(s, "vCPU %u: %s", vcpu, err.message);
}

static bool more_vcpus(struct session *s, unsigned int count)
{
	struct vcpu *vcpus;

	if (count <= s->vcpu_count)
		return true;
	vcpus = realloc(s->vcpus, count * sizeof(*vcpus));
	if (!vcpus)
		return false;
	memset(vcpus + s->vcpu_count, 0,
	       (count - s->vcpu_count) * sizeof(*vcpus));
	s->vcpus = vcpus;
	s->vcpu_count = count;

	return true;
}

static void take_event(struct session *s, struct kvmi_vm_event *event)
{
	unsigned int vcpu = event->vcpu;

	if (event->id == KVMI_EV_UNHOOK) {
		if (!s->unhook)
			s->unhook_ts = now_us();
		s->unhook = true;
		kvmi_vm_event_free(event);
		return;
	}
	if (!more_vcpus(s, vcpu + 1)) {
		kvmi_vm_reply(s->vm, event, KVMI_ACTION_CONTINUE, NULL);
		kvmi_vm_event_free(event);
		return;
	}

	/* at most one at a time: the library sees to that */
	s->vcpus[vcpu].open = event;
	if (event->id == KVMI_EV_BREAKPOINT)
		return;
	if (event->id == KVMI_EV_PAUSE) {
		if (s->vcpus[vcpu].pauses_due)
			s->vcpus[vcpu].pauses_due--;
		if (s->holding)
			return;
	}
	answer(s, vcpu, KVMI_ACTION_CONTINUE, NULL);
}

static void take_events(struct session *s)
{
	struct kvmi_vm_event *event;

	while ((event = kvmi_vm_next_event(s->vm)))
		take_event(s, event);
}

/* One event, or until the deadline; false if there was none */
static bool wait_event(struct session *s, int64_t deadline)
{
	int64_t left = deadline - now_ms();
	struct kvmi_vm_event *event;
	struct kvmi_error err;
	enum kvmi_status status;

	if (s->lost || left <= 0)
		return false;
	status = kvmi_vm_wait_event(s->vm, left > 60000 ? 60000 : left, &event,
				    &err);
	if (status != KVMI_OK) {
		is_lost(s, status, &err);
		return false;
	}
	take_event(s, event);

	return true;
}

/* ------------------------------------------------------------------------
 * Holding vCPUs
 */

/*
 * Makes sure that no vCPU but `except' (-1: none) executes guest code, until
 * release().  Their events may still be on their way.
 */
static bool hold(struct session *s, int except)
{
	enum kvmi_status *status = NULL, all = KVMI_OK;
	uint16_t *list = NULL;
	struct kvmi_error err;
	size_t count = 0, i;

	take_events(s);
	s->holding = true;

	list = calloc(s->vcpu_count, sizeof(*list));
	status = calloc(s->vcpu_count, sizeof(*status));
	if (list && status) {
		for (i = 0; i < s->vcpu_count; i++) {
			/*
			 * With an open event it stands still already; if a
			 * PAUSE is due it will not run before that.
			 */
			if ((int)i == except || !s->vcpus[i].enabled ||
			    s->vcpus[i].open || s->vcpus[i].pauses_due)
				continue;
			list[count++] = i;
		}
		all = kvmi_vm_pause_vcpus(s->vm, list, count, true, status,
					  &err);
		for (i = 0; i < count; i++)
			if (status[i] == KVMI_OK ||
			    status[i] == KVMI_ERR_TIMEOUT)
				s->vcpus[list[i]].pauses_due++;
		if (all != KVMI_OK && !is_lost(s, all, &err))
			problem(s, "%s", err.message);
	} else {
		all = KVMI_ERR_SYSTEM;
	}
	free(list);
	free(status);
	take_events(s);

	return all == KVMI_OK;
}

static void release(struct session *s)
{
	unsigned int i;

	s->holding = false;
	for (i = 0; i < s->vcpu_count; i++)
		if (s->vcpus[i].open && s->vcpus[i].open->id == KVMI_EV_PAUSE)
			answer(s, i, KVMI_ACTION_CONTINUE, NULL);
}

/* After hold(): until all events that stop them are here */
static bool wait_all_stopped(struct session *s)
{
	int64_t deadline = now_ms() + STOP_TIMEOUT_MS;
	unsigned int i;

	do {
		take_events(s);
		for (i = 0; i < s->vcpu_count; i++)
			if (s->vcpus[i].enabled && !s->vcpus[i].open)
				break;
		if (i == s->vcpu_count)
			return true;
	} while (wait_event(s, deadline));

	return false;
}

/* ------------------------------------------------------------------------
 * Putting breakpoints in and out
 */

static int by_gpa(const void *left, const void *right)
{
	const struct breakpoint *a = *(struct breakpoint *const *)left;
	const struct breakpoint *b = *(struct breakpoint *const *)right;

	return (a->gpa > b->gpa) - (a->gpa < b->gpa);
}

static struct breakpoint *find_breakpoint(const struct vm_record *record,
					  uint64_t gpa)
{
	size_t low = 0, high = record->planted_count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (record->planted[middle]->gpa < gpa)
			low = middle + 1;
		else
			high = middle;
	}

	return low < record->planted_count &&
	       record->planted[low]->gpa == gpa ? record->planted[low] : NULL;
}

static struct breakpoint *breakpoint_of(const struct vm_record *record,
					const struct kvmi_vm_event *event)
{
	struct breakpoint *bp = NULL;
	size_t i;

	if (event->breakpoint.gpa != UINT64_MAX)
		return find_breakpoint(record, event->breakpoint.gpa);
	for (i = 0; i < record->planted_count && !bp; i++)
		if (record->planted[i]->gva == event->state.regs.rip)
			bp = record->planted[i];

	return bp;
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
static size_t make_spans(struct breakpoint **list, size_t from, size_t count,
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
static bool change_byte(struct session *s, uint64_t gpa, uint8_t from,
			uint8_t to, bool *was)
{
	enum kvmi_status status;
	struct kvmi_error err;
	uint8_t byte;

	*was = false;
	status = kvmi_vm_read_physical(s->vm, gpa, &byte, 1, &err);
	if (status == KVMI_OK && byte != from)
		return true;
	if (status == KVMI_OK)
		status = kvmi_vm_write_physical(s->vm, gpa, &to, 1, &err);
	if (status == KVMI_OK) {
		*was = true;
		return true;
	}
	if (!is_lost(s, status, &err))
		problem(s, "0x%" PRIx64 ": %s", gpa, err.message);

	return false;
}

/*
 * Exchanges the bytes of list: INT3s to what was there (out), or the other way
 * round.  held: all vCPUs stand still, thus a page can be written at once, with
 * all that is between the breakpoints.  Each ->planted tells the outcome.
 */
static void exchange(struct session *s, struct breakpoint **list, size_t count,
		     bool out, bool held)
{
	struct kvmi_memory_op ops[CHUNK];
	struct span spans[CHUNK];
	uint8_t *buffer = malloc(CHUNK * PAGE_SIZE);
	size_t from = 0, i, j;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!buffer) {
		problem(s, "out of memory");
		return;
	}
	while (from < count && !s->lost) {
		size_t used = make_spans(list, from, count, !held, spans, CHUNK);
		size_t writes = 0;

		from = spans[used - 1].first + spans[used - 1].count;
		for (i = 0; i < used; i++)
			ops[i] = (struct kvmi_memory_op){
				.gpa = spans[i].gpa, .size = spans[i].size,
				.data = buffer + i * PAGE_SIZE,
			};
		status = kvmi_vm_read_many(s->vm, ops, used, &err);
		if (status != KVMI_OK && !is_lost(s, status, &err))
			problem(s, "reading code: %s", err.message);

		for (i = 0; i < used; i++) {
			bool write = false;

			if (ops[i].status != KVMI_OK)
				continue;
			for (j = 0; j < spans[i].count; j++) {
				struct breakpoint *bp = list[spans[i].first + j];
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
					bp->planted = true;
				}
			}
			if (write) {
				ops[writes] = ops[i];
				spans[writes++] = spans[i];
			}
		}

		status = kvmi_vm_write_many(s->vm, ops, writes, &err);
		if (status != KVMI_OK && !is_lost(s, status, &err))
			problem(s, "writing code: %s", err.message);
		for (i = 0; i < writes; i++) {
			bool done = ops[i].status == KVMI_OK;

			for (j = 0; j < spans[i].count; j++) {
				struct breakpoint *bp = list[spans[i].first + j];

				if (!bp->changing)
					continue;
				/* If in doubt, it is there and has to go */
				bp->planted = !(out && done);
				if (done)
					bp->leftover = false;
			}
		}
	}
	free(buffer);
}

/* Reads memory to make sure that no INT3 of ours is left; how many are */
static size_t count_left(struct session *s, bool held)
{
	struct vm_record *record = s->record;
	struct kvmi_memory_op ops[CHUNK];
	struct span spans[CHUNK];
	uint8_t *buffer = malloc(CHUNK * PAGE_SIZE);
	size_t from = 0, left = 0, i, j;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!buffer)
		return record->planted_count;
	while (from < record->planted_count) {
		size_t used = make_spans(record->planted, from,
					 record->planted_count, !held, spans,
					 CHUNK);

		from = spans[used - 1].first + spans[used - 1].count;
		for (i = 0; i < used; i++)
			ops[i] = (struct kvmi_memory_op){
				.gpa = spans[i].gpa, .size = spans[i].size,
				.data = buffer + i * PAGE_SIZE,
			};
		status = kvmi_vm_read_many(s->vm, ops, used, &err);
		if (status != KVMI_OK)
			is_lost(s, status, &err);
		for (i = 0; i < used; i++)
			for (j = 0; j < spans[i].count; j++) {
				struct breakpoint *bp =
					record->planted[spans[i].first + j];
				const uint8_t *bytes = ops[i].data;

				if (ops[i].status != KVMI_OK ||
				    bytes[bp->gpa - spans[i].gpa] == INT3)
					left++;
			}
	}
	free(buffer);

	return left;
}

/* What the guest has at the breakpoint: bytes, size of them */
static bool prepare(struct session *s, struct breakpoint *bp, uint8_t *bytes,
		    size_t size, char *why, size_t why_size)
{
	struct guest *guest = &s->record->guest;
	struct kvmi_error err;

	/* the rest is on another page, which can be anywhere */
	if (size < INSN_MAX &&
	    guest_read(guest, bp->gva + size, bytes + size, INSN_MAX - size,
		       &err) == KVMI_OK)
		size = INSN_MAX;
	if (bytes[0] == INT3) {
		if (!bp->leftover) {
			snprintf(why, why_size,
				 "there is an INT3 already, which is not ours");
			return false;
		}
		bytes[0] = bp->insn.bytes[0];
	} else {
		bp->leftover = false;
	}

	if (insn_decode(s->decoder, bytes, size, &bp->insn)) {
		snprintf(why, why_size, "there is no valid instruction");
		return false;
	}
	if (bp->insn.kind == INSN_REFUSE) {
		snprintf(why, why_size, "cannot get over '%s': %s",
			 bp->insn.text, bp->insn.why);
		return false;
	}

	return true;
}

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

/* ------------------------------------------------------------------------
 * Hits
 */

/* The memory of a vCPU with an open event */
struct memory_context {
	struct session *s;
	const struct kvmi_registers *state;
};

static bool walk(struct memory_context *context, uint64_t gva, uint64_t *gpa,
		 bool *writable)
{
	const struct kvm_sregs *sregs = &context->state->sregs;
	struct kvmi_error err;
	enum kvmi_status status;

	status = guest_translate(context->s->vm, sregs->cr3,
				 sregs->cr4 >> 12 & 1, gva, gpa, writable, &err);
	if (status != KVMI_OK)
		is_lost(context->s, status, &err);

	return status == KVMI_OK;
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
			kvmi_vm_write_physical(context->s->vm, gpa, data, part,
					       &err) :
			kvmi_vm_read_physical(context->s->vm, gpa, data, part,
					      &err);
		if (status != KVMI_OK) {
			is_lost(context->s, status, &err);
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
static void retire(struct session *s, struct breakpoint *bp, const char *why)
{
	bool was;

	if (bp->planted && change_byte(s, bp->gpa, INT3, bp->insn.bytes[0],
				       &was))
		bp->planted = false;
	bp->retired = true;
	problem(s, "breakpoint %s taken out: cannot get over '%s': %s",
		bp->name, bp->insn.text, why);
}

static void count_hit(struct session *s, struct breakpoint *bp)
{
	uint64_t hits = atomic_fetch_add(&s->watch->hits, 1) + 1;

	bp->hits++;
	if (s->watch->count && hits == s->watch->count)
		watch_stop(s->watch);
}

struct landing {
	uint64_t gva;
	uint64_t gpa;
	uint8_t original;
	bool planted;
};

/* The places where the vCPU may come to */
static bool plant_landings(struct session *s, struct memory_context *context,
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
		status = kvmi_vm_read_physical(s->vm, to->gpa, &to->original, 1,
					       &err);
		/* an INT3, ours or not, will stop the vCPU as well */
		if (status == KVMI_OK && to->original == INT3)
			continue;
		if (status == KVMI_OK)
			status = kvmi_vm_write_physical(s->vm, to->gpa, &int3,
							1, &err);
		if (status != KVMI_OK) {
			is_lost(s, status, &err);
			return false;
		}
		to->planted = true;
	}

	return true;
}

static void remove_landings(struct session *s, struct landing *landings,
			    unsigned int count)
{
	unsigned int i;
	bool was;

	for (i = 0; i < count; i++)
		if (landings[i].planted) {
			change_byte(s, landings[i].gpa, INT3,
				    landings[i].original, &was);
			landings[i].planted = false;
		}
}

/*
 * Waits for the vCPU to come to one of the landings.  Another of our
 * breakpoints can come first, in the handler of an NMI.
 */
static bool wait_landed(struct session *s, unsigned int vcpu,
			const struct landing *landings, unsigned int count)
{
	int64_t deadline = now_ms() + STEP_TIMEOUT_MS;
	struct vcpu *v = &s->vcpus[vcpu];
	unsigned int i;

	for (;;) {
		struct memory_context context;
		struct insn_memory memory = {
			memory_read, memory_write, memory_check, &context,
		};
		struct breakpoint *bp;
		struct kvm_regs regs;

		while (!v->open)
			if (!wait_event(s, deadline))
				return false;
		/* the array may have moved */
		v = &s->vcpus[vcpu];
		if (v->open->id == KVMI_EV_PAUSE) {
			/* asked for while it was held by its last hit */
			answer(s, vcpu, KVMI_ACTION_CONTINUE, NULL);
			continue;
		}
		for (i = 0; i < count; i++)
			if (landings[i].gva == v->open->state.regs.rip)
				return true;

		bp = breakpoint_of(s->record, v->open);
		if (!bp) {
			s->foreign++;
			answer(s, vcpu, KVMI_ACTION_CONTINUE, NULL);
			continue;
		}
		count_hit(s, bp);
		context = (struct memory_context){ s, &v->open->state };
		regs = v->open->state.regs;
		if (insn_emulate(s->decoder, &bp->insn, &regs, &memory)) {
			retire(s, bp, "it was hit while stepping");
			answer(s, vcpu, KVMI_ACTION_RETRY, NULL);
		} else {
			answer(s, vcpu, KVMI_ACTION_RETRY, &regs);
		}
	}
}

/* Lets the vCPU execute what is under the breakpoint, alone and uninterrupted */
static void step_over(struct session *s, unsigned int vcpu,
		      struct breakpoint *bp)
{
	struct kvmi_vm_event *event = s->vcpus[vcpu].open;
	struct kvmi_registers state = event->state;
	struct memory_context context = { s, &state };
	struct insn_memory memory = {
		memory_read, memory_write, memory_check, &context,
	};
	struct landing landings[2] = { { 0 } };
	uint64_t flag = state.regs.rflags & RFLAGS_IF, next[2];
	const char *why = "the other vCPUs cannot be stopped";
	unsigned int count = 0, i;
	struct kvm_regs regs;
	bool was = false;

	if (!hold(s, vcpu))
		goto failed;
	/* with the registers as the vCPU should have them */
	if (insn_next(s->decoder, &bp->insn, &state, &memory, next, &count,
		      &why))
		goto failed;
	for (i = 0; i < count; i++) {
		why = "it goes to itself";
		if (next[i] == state.regs.rip)
			goto failed;
		landings[i].gva = next[i];
	}

	if (!plant_landings(s, &context, landings, count, &why))
		goto failed;
	why = "its byte cannot be put back";
	if (!change_byte(s, bp->gpa, INT3, bp->insn.bytes[0], &was))
		goto failed;
	if (!was) {
		/* the guest has rewritten it: whatever is there now is right */
		bp->planted = false;
		remove_landings(s, landings, count);
		answer(s, vcpu, KVMI_ACTION_RETRY, NULL);
		release(s);
		return;
	}

	regs = state.regs;
	regs.rflags &= ~RFLAGS_IF;
	answer(s, vcpu, KVMI_ACTION_RETRY, &regs);
	if (!wait_landed(s, vcpu, landings, count)) {
		/* Where is it?  Take it from there, without the breakpoint. */
		struct vcpu *v = &s->vcpus[vcpu];
		struct kvmi_error err;
		int64_t deadline = now_ms() + STEP_TIMEOUT_MS;

		if (!v->open && !v->pauses_due && !s->lost &&
		    kvmi_vm_pause_vcpu(s->vm, vcpu, true, &err) == KVMI_OK)
			v->pauses_due++;
		while (!s->vcpus[vcpu].open && wait_event(s, deadline))
			;
		remove_landings(s, landings, count);
		bp->planted = false;
		event = s->vcpus[vcpu].open;
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
				s->vcpus[vcpu].fix_registers = true;
			}
			answer(s, vcpu, event->id == KVMI_EV_BREAKPOINT ?
			       KVMI_ACTION_RETRY : KVMI_ACTION_CONTINUE, NULL);
		}
		release(s);
		retire(s, bp, "the vCPU did not come to the next instruction");
		return;
	}

	remove_landings(s, landings, count);
	if (!bp->retired) {
		change_byte(s, bp->gpa, bp->insn.bytes[0], INT3, &was);
		bp->planted = was;
	}
	event = s->vcpus[vcpu].open;
	event->state.regs.rflags |= flag;
	s->vcpus[vcpu].fix_registers = true;
	/*
	 * If it has come to another breakpoint (or an INT3 of the guest), that
	 * is a hit like any other; the event stays open.
	 */
	for (i = 0; i < count; i++)
		if (landings[i].gva == event->state.regs.rip &&
		    landings[i].original != INT3)
			answer(s, vcpu, KVMI_ACTION_RETRY, NULL);
	release(s);
	return;

failed:
	remove_landings(s, landings, count);
	retire(s, bp, why);
	answer(s, vcpu, KVMI_ACTION_RETRY, NULL);
	release(s);
}

static void handle_hit(struct session *s, unsigned int vcpu)
{
	struct kvmi_vm_event *event = s->vcpus[vcpu].open;
	struct breakpoint *bp = breakpoint_of(s->record, event);
	struct kvmi_registers state = event->state;
	struct memory_context context = { s, &state };
	struct insn_memory memory = {
		memory_read, memory_write, memory_check, &context,
	};
	struct kvm_regs regs = state.regs;
	int64_t ts = now_us();

	if (!bp || state.mode != 8) {
		s->foreign++;
		answer(s, vcpu, KVMI_ACTION_CONTINUE, NULL);
		return;
	}
	if (!bp->planted) {
		/* it was on its way when the byte was put back */
		answer(s, vcpu, KVMI_ACTION_RETRY, NULL);
		return;
	}

	count_hit(s, bp);
	if (bp->insn.kind == INSN_EMULATE &&
	    !insn_emulate(s->decoder, &bp->insn, &regs, &memory))
		answer(s, vcpu, KVMI_ACTION_RETRY, &regs);
	else
		step_over(s, vcpu, bp);
	show_hit(s, bp, ts, vcpu, &state);
}

static void handle_hits(struct session *s)
{
	unsigned int i;

	for (i = 0; i < s->vcpu_count && !s->lost; i++)
		if (s->vcpus[i].open && s->vcpus[i].open->id == KVMI_EV_BREAKPOINT)
			handle_hit(s, i);
}

/*
 * Looks at the code at each breakpoint of list, which is sorted.  Keeps those
 * that can be planted; returns how many.
 */
static size_t prepare_all(struct session *s, struct breakpoint **list,
			  size_t count)
{
	struct kvmi_memory_op ops[CHUNK];
	struct span spans[CHUNK];
	uint8_t *buffer = malloc(CHUNK * PAGE_SIZE);
	size_t from = 0, kept = 0, i, j;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!buffer) {
		problem(s, "out of memory");
		return 0;
	}
	while (from < count && !is_stopping(s)) {
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
		status = kvmi_vm_read_many(s->vm, ops, used, &err);
		if (status != KVMI_OK)
			is_lost(s, status, &err);
		take_events(s);

		for (i = 0; i < used && !s->lost; i++)
			for (j = 0; j < spans[i].count; j++) {
				struct breakpoint *bp = list[spans[i].first + j];
				size_t at = bp->gpa - spans[i].gpa;
				size_t size = ops[i].size - at;
				char why[200] = "it cannot be read";
				uint8_t bytes[INSN_MAX];
				bool good = ops[i].status == KVMI_OK;

				if (size > INSN_MAX)
					size = INSN_MAX;
				memcpy(bytes, (uint8_t *)ops[i].data + at, size);
				good = good && prepare(s, bp, bytes, size, why,
						       sizeof(why));
				if (!good && !bp->complained)
					problem(s, "no breakpoint at %s: %s",
						bp->name, why);
				bp->complained = !good;
				/* never more than have been looked at */
				if (good)
					list[kept++] = bp;
			}
	}
	free(buffer);

	return kept;
}

/* All breakpoints into the guest */
static void plant(struct session *s)
{
	struct vm_record *record = s->record;
	struct guest *guest = &record->guest;
	struct breakpoint **list = record->planted;
	size_t specs = s->watch->spec_count, count = 0, left, in = 0, i;
	int64_t start = now_us();
	enum kvmi_status status;
	struct kvmi_error err;
	char why[400];
	struct line line;
	bool held;

	s->planted = true;
	s->summary_ts = now_us();

	if (record->breakpoint_count > specs &&
	    !record->breakpoints[specs].gva)
		spread(s, &record->breakpoints[specs],
		       record->breakpoint_count - specs);

	/* where they are */
	for (i = 0; i < record->breakpoint_count && !s->lost; i++) {
		struct breakpoint *bp = &record->breakpoints[i];
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
		if (bp->gpa != gpa)
			bp->leftover = false;
		bp->gpa = gpa;
		list[count++] = bp;
	}

	qsort(list, count, sizeof(*list), by_gpa);
	count = prepare_all(s, list, count);
	/* the same place twice */
	record->planted_count = 0;
	for (i = 0; i < count; i++) {
		if (i && list[i]->gpa == list[i - 1]->gpa) {
			problem(s, "%s and %s are the same place",
				list[i - 1]->name, list[i]->name);
			list[i]->retired = true;
			continue;
		}
		list[record->planted_count++] = list[i];
	}

	/*
	 * Not too many in one go: the guest stands still meanwhile, and may
	 * have to be left at any time.
	 */
	for (i = 0; i < record->planted_count && !is_stopping(s); i += SLICE) {
		left = record->planted_count - i;
		hold(s, -1);
		held = wait_all_stopped(s);
		if (!s->lost)
			exchange(s, list + i, left < SLICE ? left : SLICE,
				 false, held);
		release(s);
		handle_hits(s);
		take_events(s);
	}
	for (i = 0; i < record->planted_count; i++)
		in += list[i]->planted;
	s->summary_ts = now_us();
	if (is_stopping(s))
		return;
	if (in < record->planted_count)
		problem(s, "%zu breakpoints could not be planted: the guest was changing its code",
			record->planted_count - in);

	if (s->watch->json) {
		start_line(s, &line, now_us(), "planted");
		json_number(&line, "breakpoints", in);
		json_number(&line, "duration_us", now_us() - start);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: %zu breakpoint%s planted in %.1f ms",
		      record->label, in, in == 1 ? "" : "s",
		      (now_us() - start) / 1e3);
	}
}

/* ------------------------------------------------------------------------
 * The end
 */

/* All breakpoints out, all vCPUs on their way */
static void clean(struct session *s, const char *reason)
{
	struct vm_record *record = s->record;
	int64_t start = s->unhook ? s->unhook_ts : now_us(), deadline, ts;
	size_t i, left = 0, count = 0;
	struct line line;
	bool held, verified;

	if (s->watch->json) {
		start_line(s, &line, start, "notified");
		json_string(&line, "reason", reason);
		json_end(&line, false);
	} else {
		human(start, false, "%s: %s", record->label, s->unhook ?
		      "the VM is going to be paused" : "ending");
	}

	hold(s, -1);
	held = wait_all_stopped(s);
	if (!held && !s->lost)
		problem(s, "not all vCPUs stopped within %d ms",
			STOP_TIMEOUT_MS);

	/* hits that were not handled yet are hits nevertheless */
	for (i = 0; i < s->vcpu_count; i++) {
		struct kvmi_vm_event *event = s->vcpus[i].open;
		struct breakpoint *bp;

		if (!event || event->id != KVMI_EV_BREAKPOINT)
			continue;
		bp = breakpoint_of(record, event);
		if (bp && bp->planted) {
			count_hit(s, bp);
			show_hit(s, bp, now_us(), i, &event->state);
		}
	}

	for (i = 0; i < record->planted_count; i++)
		count += record->planted[i]->planted;
	exchange(s, record->planted, record->planted_count, true, held);
	for (i = 0; i < record->planted_count; i++)
		left += record->planted[i]->planted;
	verified = !s->unhook || now_us() - start < VERIFY_UNTIL_MS * 1000;
	if (verified && !left && record->planted_count && !s->lost)
		left = count_left(s, held);
	ts = now_us();

	for (i = 0; i < s->vcpu_count; i++) {
		struct kvmi_vm_event *event = s->vcpus[i].open;

		if (!event)
			continue;
		answer(s, i, event->id != KVMI_EV_BREAKPOINT ||
		       !breakpoint_of(record, event) ? KVMI_ACTION_CONTINUE :
						       KVMI_ACTION_RETRY, NULL);
	}
	/* the proof that no hit is on its way any more */
	s->holding = false;
	deadline = now_ms() + STOP_TIMEOUT_MS;
	do {
		take_events(s);
		for (i = 0; i < s->vcpu_count; i++) {
			struct kvmi_vm_event *event = s->vcpus[i].open;

			if (event)
				answer(s, i, breakpoint_of(record, event) ?
				       KVMI_ACTION_RETRY : KVMI_ACTION_CONTINUE,
				       NULL);
		}
		for (i = 0; i < s->vcpu_count; i++)
			if (s->vcpus[i].pauses_due)
				break;
	} while (i < s->vcpu_count && wait_event(s, deadline));

	if (s->watch->json) {
		for (i = 0; i < record->planted_count && count <= FEW; i++) {
			const struct breakpoint *bp = record->planted[i];

			start_line(s, &line, ts, "breakpoint-out");
			json_string(&line, "symbol", bp->name);
			json_hex(&line, "address", bp->gva);
			json_hex(&line, "original", bp->insn.bytes[0]);
			json_end(&line, false);
		}
		if (count > FEW) {
			start_line(s, &line, ts, "breakpoint-out");
			json_number(&line, "count", count);
			json_end(&line, false);
		}
	}
	if (left || s->lost) {
		if (!s->lost)
			problem(s, "%zu breakpoints are still in the guest",
				left);
		return;
	}
	if (s->watch->json) {
		start_line(s, &line, ts, "clean");
		json_number(&line, "breakpoints", count);
		json_bool(&line, "verified", verified);
		json_bool(&line, "held", held);
		json_number(&line, "duration_us", ts - start);
		json_end(&line, false);
	} else {
		human(ts, false, "%s: clean: %zu breakpoint%s out%s in %.1f ms",
		      record->label, count, count == 1 ? "" : "s",
		      verified ? " and verified" : "", (ts - start) / 1e3);
	}
}

static void finish(struct session *s)
{
	struct vm_record *record = s->record;
	const char *reason = s->unhook ? "unhook" : "stop";
	uint64_t hits = 0;
	struct line line;
	unsigned int vcpu;
	size_t i, left = 0;

	if (!s->lost)
		clean(s, reason);
	for (i = 0; i < record->planted_count; i++) {
		struct breakpoint *bp = record->planted[i];

		/* the INT3 may be there when the VM comes back */
		if (bp->planted) {
			bp->planted = false;
			bp->leftover = true;
			left++;
		}
	}
	for (i = 0; i < record->breakpoint_count; i++)
		hits += record->breakpoints[i].hits;
	show_summary(s, true);

	for (vcpu = 0; vcpu < s->vcpu_count; vcpu++)
		kvmi_vm_event_free(s->vcpus[vcpu].open);
	if (s->lost) {
		/*
		 * Without a notice the VM was reset or has ended, most likely;
		 * else we were too slow.
		 */
		if (left && s->unhook)
			problem(s, "the connection was cut with %zu breakpoints still in the guest",
				left);
		reason = "lost";
	}
	kvmi_vm_close(s->vm);
	s->vm = NULL;

	if (s->watch->json) {
		start_line(s, &line, now_us(), "closed");
		json_string(&line, "reason", reason);
		if (s->lost) {
			json_string(&line, "detail", s->error.message);
			json_number(&line, "left", left);
		}
		json_number(&line, "hits", hits);
		json_end(&line, false);
	} else if (s->lost) {
		human(now_us(), false, "%s: connection lost: %s (%zu breakpoints were in the guest; if it comes back with them, they are taken over)",
		      record->label, s->error.message, left);
	} else {
		human(now_us(), false, "%s: connection closed", record->label);
	}
}

/* ------------------------------------------------------------------------
 * The start
 */

static bool is_interrupted(void *context)
{
	struct session *s = context;

	take_events(s);

	return is_stopping(s);
}

/* The breakpoint event on, for all vCPUs that are there and have started */
static void enable_vcpus(struct session *s)
{
	struct kvmi_error err;
	enum kvmi_status status;
	unsigned int count, i;

	status = kvmi_vm_get_vcpu_count(s->vm, &count, &err);
	if (status != KVMI_OK) {
		if (!is_lost(s, status, &err))
			problem(s, "%s", err.message);
		return;
	}
	if (!more_vcpus(s, count)) {
		problem(s, "out of memory");
		return;
	}
	for (i = 0; i < count && !s->lost; i++) {
		if (s->vcpus[i].enabled)
			continue;
		status = kvmi_vcpu_control_events(s->vm, i, KVMI_EV_BREAKPOINT,
						  true, &err);
		take_events(s);
		if (status == KVMI_OK)
			s->vcpus[i].enabled = true;
		else if (status != KVMI_ERR_NOT_STARTED &&
			 !is_lost(s, status, &err))
			problem(s, "vCPU %u: %s", i, err.message);
	}
}

static bool any_enabled(const struct session *s)
{
	unsigned int i;

	for (i = 0; i < s->vcpu_count; i++)
		if (s->vcpus[i].enabled)
			return true;

	return false;
}

/* Looks for the kernel; plants when it is there.  When to try again, in ms. */
static int try_to_plant(struct session *s)
{
	struct guest *guest = &s->record->guest;
	enum guest_result result;
	struct kvmi_error err;
	char text[256] = "";
	struct line line;

	guest->interrupted = is_interrupted;
	guest->context = s;
	result = guest_find_kernel(guest, s->vm, s->watch->map, text,
				   sizeof(text), &err);
	take_events(s);
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

	enable_vcpus(s);
	if (s->lost)
		return KERNEL_POLL_MS;
	if (!any_enabled(s))
		return KERNEL_RETRY_MS;

	if (s->watch->json) {
		start_line(s, &line, now_us(), "ready");
		json_string(&line, "kernel", guest->banner);
		json_hex(&line, "offset", guest->kaslr);
		json_number(&line, "vcpus", s->vcpu_count);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: %.100s, moved by 0x%" PRIx64 ", %u vCPU%s",
		      s->record->label, guest->banner, (uint64_t)guest->kaslr,
		      s->vcpu_count, s->vcpu_count == 1 ? "" : "s");
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
	for (i = 0; i < record->breakpoint_count; i++) {
		record->breakpoints[i].leftover = false;
		record->breakpoints[i].retired = false;
		record->breakpoints[i].complained = false;
		record->breakpoints[i].gva = 0;
	}
}

static bool wants_breakpoints(const struct watch *watch)
{
	return watch->spec_count || watch->spread;
}

/*
 * QEMU connects to us while the VM is paused, too, but says nothing before it
 * runs.  false: this is the end.
 */
static bool wait_for_handshake(struct session *s)
{
	struct pollfd poll_fds[2] = {
		{ .fd = kvmi_vm_fd(s->vm), .events = POLLIN },
		{ .fd = s->watch->stop_fd, .events = POLLIN },
	};

	while (poll(poll_fds, 2, -1) < 0)
		if (errno != EINTR)
			return false;

	return !poll_fds[1].revents;
}

static bool begin(struct session *s)
{
	uint64_t commands = KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS);
	uint64_t events = KVMI_SET(KVMI_EV_UNHOOK);
	const struct kvmi_vm_hello *hello;
	enum kvmi_status status;
	struct kvmi_error err;
	struct line line;

	if (wants_breakpoints(s->watch)) {
		commands |= KVMI_SET(KVMI_CMD_VM_GET_INFO) |
			    KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL) |
			    KVMI_SET(KVMI_CMD_VM_WRITE_PHYSICAL) |
			    KVMI_SET(KVMI_CMD_VM_PAUSE_VCPU) |
			    KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS) |
			    KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS) |
			    KVMI_SET(KVMI_CMD_VCPU_SET_REGISTERS);
		events |= KVMI_SET(KVMI_EV_BREAKPOINT) | KVMI_SET(KVMI_EV_PAUSE);
	}

	if (!wait_for_handshake(s))
		return false;
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
	check_start_time(s->record, hello);
	s->record->planted_count = 0;

	if (s->watch->json) {
		start_line(s, &line, now_us(), "connected");
		json_number(&line, "start_time", hello->start_time);
		json_hex(&line, "max_gpa", hello->max_gpa);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: connected", s->record->label);
	}

	status = kvmi_vm_control_events(s->vm, KVMI_EV_UNHOOK, true, &err);
	if (status != KVMI_OK && !is_lost(s, status, &err)) {
		problem(s, "without the UNHOOK event nothing is safe: %s",
			err.message);
		record_release(s->watch, s->record);
		return false;
	}
	/* else there is more to do before */
	if (!s->lost && s->watch->json && !wants_breakpoints(s->watch)) {
		start_line(s, &line, now_us(), "ready");
		json_end(&line, false);
	}

	return true;
}

static bool has_hits(const struct session *s)
{
	unsigned int i;

	for (i = 0; i < s->vcpu_count; i++)
		if (s->vcpus[i].open && s->vcpus[i].open->id == KVMI_EV_BREAKPOINT)
			return !s->lost;

	return false;
}

void session_run(struct watch *watch, struct kvmi_vm *vm)
{
	struct session s = { .watch = watch, .vm = vm };
	bool wants_to_plant = wants_breakpoints(watch);
	int64_t next_try = 0, next_look = 0, now;

	s.decoder = insn_decoder_new();
	if (!s.decoder)
		problem(&s, "out of memory");
	if (!s.decoder || !begin(&s)) {
		kvmi_vm_close(vm);
		insn_decoder_free(s.decoder);
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

		take_events(&s);
		if (is_stopping(&s))
			break;
		handle_hits(&s);
		/* handling may have queued more: don't sleep on them */
		take_events(&s);
		if (is_stopping(&s))
			break;
		if (has_hits(&s))
			continue;

		now = now_ms();
		if (wants_to_plant && !s.planted && now >= next_try) {
			next_try = try_to_plant(&s);
			next_try += now_ms();
			continue;
		}
		if (s.planted && now >= next_look) {
			/* vCPUs that were not there at first */
			enable_vcpus(&s);
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
		if (status != KVMI_OK)
			is_lost(&s, status, &err);
	}

	/* events that came before the end of the connection */
	take_events(&s);
	finish(&s);
	record_release(watch, s.record);
	insn_decoder_free(s.decoder);
	free(s.vcpus);
}
