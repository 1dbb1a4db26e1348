/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi events, kvmi stat: what vCPUs do, each or in numbers */

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run.h"

#define MSRS_MAX 64
#define ACCESSES_MAX 64
/* Pages of all --access together */
#define PAGES_MAX 65536
#define EVENT_IDS 20
/* Commands with which stat measures, each second */
#define PROBES 8

#define WHAT_HELP \
"      --cr N             writes of CR0, CR3 (switches of address spaces) or CR4\n" \
"      --msr N            writes of this MSR (0x...); up to 64 times\n" \
"  -a, --access WHERE[,LENGTH]=ACCESS\n" \
"                         accesses other than ACCESS (r, w, x, none: together, as\n" \
"                         rx) to the pages of WHERE, a SYMBOL, SYMBOL+OFFSET or\n" \
"                         address of the kernel, or phys:ADDRESS; up to 64 times.\n" \
"                         KVM emulates them, which is slow\n" \
"      --descriptors      loads and stores of GDTR, IDTR, LDTR and TR\n" \
"      --xsetbv           changes of XCR0\n" \
"      --hypercalls       the guest's calls for the tool\n"

static const char events_help[] =
"Usage: kvmi events --socket PATH [OPTION]...\n"
"\n"
"Waits for VMs (any number of them) and prints what their vCPUs do, of what the\n"
"options ask for.  When a VM is about to be paused, saved or migrated, all is\n"
"switched off before; it is switched on again when the VM is back.\n"
"\n"
"Options:\n"
WHAT_HELP
"  -n, --count N          end after N events\n"
RUN_OPTIONS_HELP
"\n"
"JSON: every object has \"ts\" (microseconds since 1970), \"event\" and, but for the\n"
"first, \"vm\" and \"uuid\".\n"
"  listening, connected, ready, closed, problem: as in kvmi watch\n"
"  watching    pages: all is switched on\n"
"  cr          cr, old, new          msr         msr, old, new\n"
"  pf          access, gva, gpa, symbol          xsetbv      xcr, old, new\n"
"  descriptor  register, write       hypercall\n"
"              these have vcpu, rip, by (function at rip), cr3, user, too\n"
"  clean       events: all is switched off\n";

static const char stat_help[] =
"Usage: kvmi stat --socket PATH [OPTION]...\n"
"\n"
"Waits for VMs (any number of them) and prints each second, for each of them: how\n"
"many events of what the options ask for there were, how long vCPUs waited for\n"
"this program's answer, and how long commands took to be answered: by KVM, and by\n"
"vCPU 0.  Without options about events, commands only.\n"
"\n"
"Options:\n"
WHAT_HELP
"  -n, --count N          end after N seconds\n"
RUN_OPTIONS_HELP
"\n"
"JSON: \"stat\" with interval_us; command and vcpu_command{least_us, mean_us,\n"
"most_us}; events[{event, count, mean_us, most_us}]; listening, connected, ready,\n"
"closed, problem as in kvmi watch.\n";

struct access {
	char *where;
	uint64_t length;
	uint8_t access;
};

struct options {
	bool stat;
	bool cr[5];
	uint32_t msrs[MSRS_MAX];
	size_t msr_count;
	struct access accesses[ACCESSES_MAX];
	size_t access_count;
	bool descriptors, xsetbv, hypercalls;
	uint64_t count;
};

struct tally {
	uint64_t count;
	uint64_t total_us;
	uint64_t most_us;
};

struct watching {
	struct kvmi_page_access *pages;
	size_t page_count;
	bool again;		/* a page has lost its restriction */
	uint64_t events;
	struct tally tallies[EVENT_IDS];	/* since the last second */
};

/* ------------------------------------------------------------------------
 * On and off
 */

static bool wants(const struct options *o, unsigned int id)
{
	switch (id) {
	case KVMI_EV_CR:
		return o->cr[0] || o->cr[3] || o->cr[4];
	case KVMI_EV_MSR:
		return o->msr_count;
	case KVMI_EV_PF:
		return o->access_count;
	case KVMI_EV_DESCRIPTOR:
		return o->descriptors;
	case KVMI_EV_XSETBV:
		return o->xsetbv;
	case KVMI_EV_HYPERCALL:
		return o->hypercalls;
	}

	return false;
}

static enum kvmi_status switch_on(struct run_vm *rv, unsigned int vcpu,
				  struct kvmi_error *err)
{
	const struct options *o = rv->run->options;
	enum kvmi_status status = KVMI_OK;
	unsigned int i;

	for (i = 0; i < EVENT_IDS && status == KVMI_OK; i++)
		if (wants(o, i))
			status = kvmi_vcpu_control_events(rv->vm, vcpu, i, true,
							  err);
	for (i = 0; i < 5 && status == KVMI_OK; i++)
		if (o->cr[i])
			status = kvmi_vcpu_control_cr(rv->vm, vcpu, i, true, err);
	for (i = 0; i < o->msr_count && status == KVMI_OK; i++)
		status = kvmi_vcpu_control_msr(rv->vm, vcpu, o->msrs[i], true,
					       err);

	return status;
}

static bool add_pages(struct run_vm *rv, const struct access *a)
{
	struct watching *w = rv->data;
	uint64_t address, gva, gpa;
	bool physical = !strncmp(a->where, "phys:", 5);
	struct kvmi_error err;
	char text[512];

	if (physical) {
		if (parse_number(a->where + 5, 0, UINT64_MAX, &address)) {
			run_problem(rv, "%s: not an address", a->where);
			return false;
		}
	} else if (!guest_resolve(&rv->guest, rv->run->one.map, a->where, false,
				  &address, text, sizeof(text))) {
		run_problem(rv, "%s", text);
		return false;
	}
	for (gva = address & ~(PAGE_SIZE - 1);
	     gva - (address & ~(PAGE_SIZE - 1)) <
	     address % PAGE_SIZE + a->length; gva += PAGE_SIZE) {
		enum kvmi_status status = KVMI_OK;

		gpa = gva;
		if (!physical)
			status = guest_kernel_gpa(&rv->guest, gva, &gpa, &err);
		if (status != KVMI_OK) {
			if (!run_lost(rv, status))
				run_problem(rv, "%s: %s", a->where, err.message);
			return false;
		}
		if (w->page_count == PAGES_MAX) {
			run_problem(rv, "more than %d pages", PAGES_MAX);
			return false;
		}
		w->pages[w->page_count++] = (struct kvmi_page_access){
			gpa, a->access,
		};
	}

	return true;
}

static bool restrict_pages(struct run_vm *rv)
{
	struct watching *w = rv->data;
	struct kvmi_error err;
	enum kvmi_status status;

	status = kvmi_vm_set_page_access(rv->vm, w->pages, w->page_count, &err);
	if (status != KVMI_OK && !run_lost(rv, status))
		run_problem(rv, "%s", err.message);

	return status == KVMI_OK;
}

static bool begin(struct run_vm *rv)
{
	const struct options *o = rv->run->options;
	struct watching *w = rv->data;
	struct line line;
	size_t i;

	if (o->access_count) {
		w->pages = calloc(PAGES_MAX, sizeof(*w->pages));
		if (!w->pages) {
			run_problem(rv, "out of memory");
			return false;
		}
		for (i = 0; i < o->access_count; i++)
			if (!add_pages(rv, &o->accesses[i]))
				return false;
		if (!restrict_pages(rv))
			return false;
	}
	if (rv->run->one.json) {
		run_line(rv, &line, "watching");
		json_number(&line, "pages", w->page_count);
		json_end(&line, false);
	}

	return true;
}

/*
 * Events that were on their way are answered as the others are; KVM lets vCPUs
 * go that have one open when the connection ends.
 */
static void switch_off(struct run_vm *rv)
{
	const struct options *o = rv->run->options;
	struct watching *w = rv->data;
	struct line line;
	unsigned int i, j;
	size_t k;

	for (k = 0; k < w->page_count; k++)
		w->pages[k].access = KVMI_PAGE_RWX;
	if (w->page_count)
		restrict_pages(rv);
	for (i = 0; i < rv->vcpu_count && !rv->lost; i++) {
		/* it has to answer our commands, not wait for us */
		run_events(rv);
		for (j = 0; j < 5; j++)
			if (o->cr[j])
				kvmi_vcpu_control_cr(rv->vm, i, j, false, NULL);
		for (j = 0; j < o->msr_count; j++)
			kvmi_vcpu_control_msr(rv->vm, i, o->msrs[j], false, NULL);
		for (j = 0; j < EVENT_IDS; j++)
			if (wants(o, j))
				kvmi_vcpu_control_events(rv->vm, i, j, false,
							 NULL);
	}
	if (rv->lost)
		return;
	if (rv->run->one.json) {
		run_line(rv, &line, "clean");
		json_number(&line, "events", w->events);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: %" PRIu64 " events", rv->label,
		      w->events);
	}
}

/* ------------------------------------------------------------------------
 * Events
 */

static void describe(struct run_vm *rv, const struct kvmi_vm_event *event,
		     struct line *line, char *text, size_t size)
{
	static const char *const descriptors[] = {
		"?", "IDTR", "GDTR", "LDTR", "TR"
	};
	char symbol[128] = "";
	const char *name;

	switch (event->id) {
	case KVMI_EV_CR:
		snprintf(text, size, "CR%u 0x%" PRIx64 " -> 0x%" PRIx64,
			 event->cr.cr, event->cr.old_value, event->cr.new_value);
		json_number(line, "cr", event->cr.cr);
		json_hex(line, "old", event->cr.old_value);
		json_hex(line, "new", event->cr.new_value);
		break;
	case KVMI_EV_MSR:
		snprintf(text, size, "MSR 0x%x 0x%" PRIx64 " -> 0x%" PRIx64,
			 event->msr.msr, event->msr.old_value,
			 event->msr.new_value);
		json_hex(line, "msr", event->msr.msr);
		json_hex(line, "old", event->msr.old_value);
		json_hex(line, "new", event->msr.new_value);
		break;
	case KVMI_EV_PF:
		name = event->pf.access & KVMI_PAGE_W ? "write" :
		       event->pf.access & KVMI_PAGE_X ? "execute" : "read";
		guest_describe(&rv->guest, rv->run->one.map, event->pf.gva,
			       symbol, sizeof(symbol));
		snprintf(text, size, "%s %s (physical 0x%" PRIx64 ")", name,
			 event->pf.gva == ~0ULL ? "?" : symbol, event->pf.gpa);
		json_string(line, "access", name);
		json_hex(line, "gva", event->pf.gva);
		json_hex(line, "gpa", event->pf.gpa);
		json_string(line, "symbol", symbol);
		break;
	case KVMI_EV_XSETBV:
		snprintf(text, size, "XCR%u 0x%" PRIx64 " -> 0x%" PRIx64,
			 event->xsetbv.xcr, event->xsetbv.old_value,
			 event->xsetbv.new_value);
		json_number(line, "xcr", event->xsetbv.xcr);
		json_hex(line, "old", event->xsetbv.old_value);
		json_hex(line, "new", event->xsetbv.new_value);
		break;
	case KVMI_EV_DESCRIPTOR:
		name = descriptors[event->descriptor.descriptor < 5 ?
				   event->descriptor.descriptor : 0];
		snprintf(text, size, "%s %s", name,
			 event->descriptor.write ? "loaded" : "stored");
		json_string(line, "register", name);
		json_bool(line, "write", event->descriptor.write);
		break;
	default:
		snprintf(text, size, "%s", kvmi_event_name(event->id));
	}
}

static void tell(struct run_vm *rv, const struct kvmi_vm_event *event)
{
	bool user = event->state.sregs.ss.dpl == 3;
	char text[320], by[128];
	struct line line;

	run_line(rv, &line, kvmi_event_name(event->id));
	describe(rv, event, &line, text, sizeof(text));
	guest_describe(&rv->guest, rv->run->one.map, event->state.regs.rip, by,
		       sizeof(by));
	if (!rv->run->one.json) {
		human(now_us(), true, "%s: vCPU %u: %s, by %s%s, cr3 0x%" PRIx64,
		      rv->label, event->vcpu, text, by,
		      user ? " in user space" : "",
		      (uint64_t)event->state.sregs.cr3);
		return;
	}
	json_number(&line, "vcpu", event->vcpu);
	json_hex(&line, "rip", event->state.regs.rip);
	json_string(&line, "by", by);
	json_hex(&line, "cr3", event->state.sregs.cr3);
	json_bool(&line, "user", user);
	json_end(&line, true);
}

static void on_event(struct run_vm *rv, struct kvmi_vm_event *event)
{
	const struct options *o = rv->run->options;
	int64_t start = now_us(), took;
	struct watching *w = rv->data;
	struct kvmi_error err;
	enum kvmi_status status;
	struct tally *tally;

	status = kvmi_vm_reply(rv->vm, event, KVMI_ACTION_CONTINUE, &err);
	if (status != KVMI_OK && !run_lost(rv, status))
		run_problem(rv, "%s", err.message);
	took = now_us() - start;
	if (!wants(o, event->id))
		return;
	if (event->id == KVMI_EV_PF && event->pf.not_emulated)
		w->again = true;

	w->events++;
	tally = &w->tallies[event->id];
	tally->count++;
	tally->total_us += took;
	if (took > (int64_t)tally->most_us)
		tally->most_us = took;
	if (o->stat)
		return;
	tell(rv, event);
	if (o->count && atomic_fetch_add(&rv->run->count, 1) + 1 >= o->count)
		run_stop(rv->run);
}

/* ------------------------------------------------------------------------
 * Numbers
 */

struct probe {
	int64_t least, most, total;
};

static bool probe(struct run_vm *rv, bool vcpu, struct probe *p)
{
	struct kvmi_registers state;
	unsigned int i, count;
	struct kvmi_error err;
	enum kvmi_status status;

	*p = (struct probe){ .least = INT64_MAX };
	for (i = 0; i < PROBES; i++) {
		int64_t start = now_us(), took;

		status = vcpu ? kvmi_vcpu_get_registers(rv->vm, 0, &state, NULL,
							NULL, 0, &err) :
			 kvmi_vm_get_vcpu_count(rv->vm, &count, &err);
		took = now_us() - start;
		if (status == KVMI_ERR_NOT_STARTED)
			return false;
		if (status != KVMI_OK) {
			if (!run_lost(rv, status))
				run_problem(rv, "%s", err.message);
			return false;
		}
		p->total += took;
		if (took < p->least)
			p->least = took;
		if (took > p->most)
			p->most = took;
		/* they must not wait for the next probe */
		run_events(rv);
	}

	return true;
}

static void json_probe(struct line *line, const char *name,
		       const struct probe *p)
{
	json_open(line, name, '{');
	json_number(line, "least_us", p->least);
	json_number(line, "mean_us", p->total / PROBES);
	json_number(line, "most_us", p->most);
	json_close(line, '}');
}

static void second(struct run_vm *rv, int64_t us)
{
	const struct options *o = rv->run->options;
	struct watching *w = rv->data;
	struct probe command, vcpu_command;
	bool good, vcpu_good;
	struct line line;
	unsigned int i;

	if (w->again) {
		w->again = false;
		restrict_pages(rv);
	}
	if (!o->stat)
		return;
	good = probe(rv, false, &command);
	vcpu_good = probe(rv, true, &vcpu_command);
	if (rv->run->one.json) {
		run_line(rv, &line, "stat");
		json_number(&line, "interval_us", us);
		if (good)
			json_probe(&line, "command", &command);
		if (vcpu_good)
			json_probe(&line, "vcpu_command", &vcpu_command);
		json_open(&line, "events", '[');
	} else if (good && vcpu_good) {
		human(now_us(), true, "%s: command %" PRId64 "/%" PRId64 "/%" PRId64 " us (least/mean/most), vCPU command %" PRId64 "/%" PRId64 "/%" PRId64 " us",
		      rv->label, command.least, command.total / PROBES,
		      command.most, vcpu_command.least,
		      vcpu_command.total / PROBES, vcpu_command.most);
	}
	for (i = 0; i < EVENT_IDS; i++) {
		struct tally *t = &w->tallies[i];
		uint64_t mean = t->count ? t->total_us / t->count : 0;

		if (!wants(o, i))
			continue;
		if (rv->run->one.json) {
			json_open(&line, NULL, '{');
			json_string(&line, "event", kvmi_event_name(i));
			json_number(&line, "count", t->count);
			json_number(&line, "mean_us", mean);
			json_number(&line, "most_us", t->most_us);
			json_close(&line, '}');
		} else {
			human(0, true, "    %-12s %10.1f/s, answered in %" PRIu64 "/%" PRIu64 " us (mean/most)",
			      kvmi_event_name(i), t->count * 1e6 / (us ? us : 1),
			      mean, t->most_us);
		}
		*t = (struct tally){ 0 };
	}
	if (rv->run->one.json) {
		json_close(&line, ']');
		json_end(&line, true);
	}
	if (o->count && atomic_fetch_add(&rv->run->count, 1) + 1 >= o->count)
		run_stop(rv->run);
}

static void free_data(struct run_vm *rv)
{
	struct watching *w = rv->data;

	free(w->pages);
}

/* ------------------------------------------------------------------------ */

/* WHERE[,LENGTH]=ACCESS */
static int parse_access(struct options *o, char *text)
{
	struct access *a = &o->accesses[o->access_count];
	char *equals = strrchr(text, '='), *comma, *at;

	if (o->access_count == ACCESSES_MAX || !equals)
		return -1;
	*equals = 0;
	a->access = 0;
	for (at = equals + 1; strcmp(equals + 1, "none") && *at; at++) {
		if (!strchr("rwx", *at))
			return -1;
		a->access |= *at == 'r' ? KVMI_PAGE_R : *at == 'w' ?
			     KVMI_PAGE_W : KVMI_PAGE_X;
	}
	a->length = 1;
	comma = strrchr(text, ',');
	if (comma) {
		*comma++ = 0;
		if (parse_number(comma, 1, PAGES_MAX * PAGE_SIZE, &a->length))
			return -1;
	}
	a->where = text;
	if (!*text || !equals[1])
		return -1;
	o->access_count++;

	return 0;
}

static int events_or_stat(int argc, char **argv, bool stat)
{
	enum {
		OPTION_CR = 256, OPTION_MSR, OPTION_DESCRIPTORS,
		OPTION_XSETBV, OPTION_HYPERCALLS,
	};
	static const struct option list[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_JSON_OPTIONS,
		{ "cr", required_argument, NULL, OPTION_CR },
		{ "msr", required_argument, NULL, OPTION_MSR },
		{ "access", required_argument, NULL, 'a' },
		{ "descriptors", no_argument, NULL, OPTION_DESCRIPTORS },
		{ "xsetbv", no_argument, NULL, OPTION_XSETBV },
		{ "hypercalls", no_argument, NULL, OPTION_HYPERCALLS },
		{ "count", required_argument, NULL, 'n' },
		{ 0 },
	};
	struct run_ops ops = {
		.name = stat ? "stat" : "events",
		.commands = KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS) |
			    KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS),
		.data_size = sizeof(struct watching),
		.vcpu = switch_on,
		.begin = begin,
		.event = on_event,
		.second = second,
		.end = switch_off,
		.free = free_data,
	};
	struct options o = { .stat = stat };
	struct run run = { .ops = &ops, .options = &o };
	const char *help = stat ? stat_help : events_help;
	bool anything = stat;
	int option, result;
	uint64_t number;
	unsigned int i;

	while ((option = getopt_long(argc, argv, "a:n:" ONE_VM_SOCKET ONE_VM_MAP
				     ONE_VM_JSON, list, NULL)) >= 0) {
		switch (option) {
		case OPTION_CR:
			if (parse_number(optarg, 0, 4, &number) ||
			    number == 1 || number == 2) {
				complain("--cr wants 0, 3 or 4");
				return EXIT_USAGE;
			}
			o.cr[number] = true;
			break;
		case OPTION_MSR:
			if (o.msr_count == MSRS_MAX ||
			    parse_number(optarg, 0, UINT32_MAX, &number)) {
				complain("--msr wants a number, at most %d times",
					 MSRS_MAX);
				return EXIT_USAGE;
			}
			o.msrs[o.msr_count++] = number;
			break;
		case 'a':
			if (parse_access(&o, optarg)) {
				complain("--access wants WHERE[,LENGTH]=ACCESS, as jiffies=r; at most %d times",
					 ACCESSES_MAX);
				return EXIT_USAGE;
			}
			break;
		case OPTION_DESCRIPTORS:
			o.descriptors = true;
			break;
		case OPTION_XSETBV:
			o.xsetbv = true;
			break;
		case OPTION_HYPERCALLS:
			o.hypercalls = true;
			break;
		case 'n':
			if (parse_number(optarg, 1, UINT64_MAX, &o.count)) {
				complain("--count wants a number above 0");
				return EXIT_USAGE;
			}
			break;
		default:
			result = one_vm_option(&run.one, option, help);
			if (result >= 0)
				return result;
		}
	}
	for (i = 0; i < EVENT_IDS; i++) {
		if (!wants(&o, i))
			continue;
		anything = true;
		ops.events |= KVMI_SET(i);
	}
	if (!anything) {
		complain("nothing to watch for; see kvmi events --help");
		return EXIT_USAGE;
	}
	if (wants(&o, KVMI_EV_CR))
		ops.commands |= KVMI_SET(KVMI_CMD_VCPU_CONTROL_CR);
	if (wants(&o, KVMI_EV_MSR))
		ops.commands |= KVMI_SET(KVMI_CMD_VCPU_CONTROL_MSR);
	if (wants(&o, KVMI_EV_PF))
		ops.commands |= KVMI_SET(KVMI_CMD_VM_SET_PAGE_ACCESS);
	/* symbols: where they are needed, or asked for */
	ops.kernel = run.one.map_path != NULL;
	for (i = 0; i < o.access_count; i++)
		if (strncmp(o.accesses[i].where, "phys:", 5))
			ops.kernel = true;
	result = one_vm_options_end(&run.one, ops.name, argc - optind, 0);

	return result >= 0 ? result : run_main(&run);
}

int events_main(int argc, char **argv)
{
	return events_or_stat(argc, argv, false);
}

int stat_main(int argc, char **argv)
{
	return events_or_stat(argc, argv, true);
}
