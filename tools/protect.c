/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi protect: tells who writes to the code of a running Linux kernel */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "run.h"

#define LARGE_PAGE (2ULL << 20)
/* A kernel's code and constants: 1 GiB would be all of its image */
#define PAGES_MAX 262144
#define IGNORE_MAX 64

static const char help[] =
"Usage: kvmi protect --socket PATH [OPTION]...\n"
"\n"
"Takes from the kernels of running Linux guests the right to write to their own\n"
"code (r-x), and to write to or execute their constants (r--), and tells of each\n"
"attempt.  The attempt itself succeeds: this watches, and does not hinder.  A\n"
"kernel that rewrites its code by itself (static keys, ftrace, kprobes, BPF) is\n"
"told of, too, mostly by text_poke_memcpy().  What devices write is not seen.\n"
"\n"
"When a VM is about to be paused, saved or migrated all is undone before; it is\n"
"done again when the VM is back.  Ctrl-C undoes it as well.\n"
"\n"
"Options:\n"
"      --text             the kernel's code only\n"
"      --rodata           the constants only\n"
"  -i, --ignore FUNCTION  do not tell what this function does (only count it); can\n"
"                         be given up to 64 times\n"
"  -n, --count N          end after N violations\n"
"      --show N           print the first N violations of a connection, then only\n"
"                         numbers once a second (default: 20); JSON has all\n"
RUN_OPTIONS_HELP
"\n"
"JSON: every object has \"ts\" (microseconds since 1970), \"event\" and, but for the\n"
"first, \"vm\" and \"uuid\".\n"
"  listening, connected, ready, closed, problem: as in kvmi watch\n"
"  protected   text, rodata: pages; duration_us\n"
"  violation   vcpu, access (\"write\", \"execute\"), area (\"text\", \"rodata\"),\n"
"              address, symbol, gpa, by (function at rip), rip, cr3, user (from\n"
"              user space), registers{}\n"
"  summary     violations, ignored: each second in which there were some\n"
"  clean       pages, duration_us: all restrictions are off\n";

struct options {
	bool text;
	bool rodata;
	uint64_t count;
	uint64_t show;
	const char *ignore[IGNORE_MAX];
	size_t ignore_count;
};

struct area {
	const char *name;
	uint64_t start;
	uint64_t end;
	uint8_t access;
	size_t pages;
};

struct protect {
	struct area areas[2];
	size_t area_count;
	struct kvmi_page_access *pages;
	size_t page_count;
	bool active;
	bool again;		/* a page has lost its restriction */
	uint64_t violations, ignored;
	uint64_t told_violations, told_ignored;	/* as of the last summary */
};

/* ------------------------------------------------------------------------
 * Which pages
 */

static bool add_page(struct protect *p, uint64_t gpa, uint8_t access)
{
	if (p->page_count == PAGES_MAX)
		return false;
	p->pages[p->page_count++] = (struct kvmi_page_access){ gpa, access };

	return true;
}

/* Large pages, as a kernel's image has them, are looked up only twice */
static bool add_block(struct run_vm *rv, uint64_t start, uint64_t end,
		      uint8_t access, struct kvmi_error *err)
{
	struct protect *p = rv->data;
	struct guest *guest = &rv->guest;
	uint64_t first, last, gva, gpa;
	enum kvmi_status status;

	status = guest_translate(rv->vm, guest->cr3, guest->five_levels, start,
				 &first, NULL, err);
	if (status == KVMI_OK)
		status = guest_translate(rv->vm, guest->cr3, guest->five_levels,
					 end - PAGE_SIZE, &last, NULL, err);
	for (gva = start; gva < end && status == KVMI_OK; gva += PAGE_SIZE) {
		if (last - first == end - PAGE_SIZE - start)
			gpa = first + (gva - start);
		else
			status = guest_translate(rv->vm, guest->cr3,
						 guest->five_levels, gva, &gpa,
						 NULL, err);
		if (status == KVMI_OK && !add_page(p, gpa, access)) {
			run_problem(rv, "the kernel's image is too large to be true");
			return false;
		}
	}
	if (status != KVMI_OK && !run_lost(rv, status))
		run_problem(rv, "%s", err->message);

	return status == KVMI_OK;
}

static bool add_area(struct run_vm *rv, const char *name, const char *from,
		     const char *to, uint8_t access)
{
	const struct symbols *symbols = guest_symbols(&rv->guest,
						      rv->run->one.map);
	uint64_t start = symbols_address(symbols, from);
	uint64_t end = symbols_address(symbols, to), gva, next;
	struct protect *p = rv->data;
	size_t before = p->page_count;
	struct kvmi_error err;

	if (!start || end <= start) {
		run_problem(rv, "neither %s nor %s among the kernel's symbols",
			    from, to);
		return false;
	}
	/* as the kernel does it itself, see mark_rodata_ro() */
	start = (start + rv->guest.offset) & ~(PAGE_SIZE - 1);
	end = (end + rv->guest.offset + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
	for (gva = start; gva < end; gva = next) {
		next = (gva & ~(LARGE_PAGE - 1)) + LARGE_PAGE;
		if (next > end)
			next = end;
		if (!add_block(rv, gva, next, access, &err))
			return false;
	}
	p->areas[p->area_count++] = (struct area){
		name, start, end, access, p->page_count - before,
	};

	return true;
}

/* ------------------------------------------------------------------------ */

static enum kvmi_status enable(struct run_vm *rv, unsigned int vcpu,
			       struct kvmi_error *err)
{
	return kvmi_vcpu_control_events(rv->vm, vcpu, KVMI_EV_PF, true, err);
}

static bool restrict_pages(struct run_vm *rv)
{
	struct protect *p = rv->data;
	struct kvmi_error err;
	enum kvmi_status status;

	status = kvmi_vm_set_page_access(rv->vm, p->pages, p->page_count, &err);
	if (status != KVMI_OK && !run_lost(rv, status))
		run_problem(rv, "%s", err.message);

	return status == KVMI_OK;
}

static bool begin(struct run_vm *rv)
{
	const struct options *options = rv->run->options;
	struct protect *p = rv->data;
	int64_t start = now_us();
	size_t text, rodata;
	struct line line;

	p->pages = calloc(PAGES_MAX, sizeof(*p->pages));
	if (!p->pages) {
		run_problem(rv, "out of memory");
		return false;
	}
	if (options->text && !add_area(rv, "text", "_stext", "_etext",
				       KVMI_PAGE_R | KVMI_PAGE_X))
		return false;
	text = p->page_count;
	if (options->rodata && !add_area(rv, "rodata", "__start_rodata",
					 "__end_rodata", KVMI_PAGE_R))
		return false;
	rodata = p->page_count - text;
	p->active = true;
	if (!restrict_pages(rv))
		return false;
	if (rv->run->one.json) {
		run_line(rv, &line, "protected");
		json_number(&line, "text", text);
		json_number(&line, "rodata", rodata);
		json_number(&line, "duration_us", now_us() - start);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: protected %zu pages of code and %zu of constants of %.60s",
		      rv->label, text, rodata, rv->guest.banner);
	}

	return true;
}

static const struct area *area_of(const struct protect *p, uint64_t gva)
{
	size_t i;

	for (i = 0; i < p->area_count; i++)
		if (gva >= p->areas[i].start && gva < p->areas[i].end)
			return &p->areas[i];

	return NULL;
}

/* The kernel writes its code through another mapping: go by physical memory */
static uint64_t image_address(const struct protect *p, uint64_t gpa,
			      const struct area **area)
{
	size_t i, j, at = 0;

	for (i = 0; i < p->area_count; i++)
		for (j = 0; j < p->areas[i].pages; j++, at++)
			if (p->pages[at].gpa == (gpa & ~(PAGE_SIZE - 1))) {
				*area = &p->areas[i];
				return p->areas[i].start + j * PAGE_SIZE +
				       gpa % PAGE_SIZE;
			}
	*area = NULL;

	return gpa;
}

static bool is_ignored(const struct options *options, const char *by)
{
	size_t i, length = strcspn(by, "+");

	for (i = 0; i < options->ignore_count; i++)
		if (strlen(options->ignore[i]) == length &&
		    !memcmp(options->ignore[i], by, length))
			return true;

	return false;
}

static void tell(struct run_vm *rv, const struct kvmi_vm_event *event)
{
	const struct options *options = rv->run->options;
	const struct kvmi_ev_pf *pf = &event->pf;
	const char *access = pf->access & KVMI_PAGE_W ? "write" :
			     pf->access & KVMI_PAGE_X ? "execute" : "read";
	struct protect *p = rv->data;
	char by[128], symbol[128];
	const struct area *area;
	struct line line;
	uint64_t address = pf->gva;

	guest_describe(&rv->guest, rv->run->one.map, event->state.regs.rip, by,
		       sizeof(by));
	if (is_ignored(options, by)) {
		p->ignored++;
		return;
	}
	p->violations++;
	area = area_of(p, address);
	if (!area)
		address = image_address(p, pf->gpa, &area);
	guest_describe(&rv->guest, rv->run->one.map, address, symbol,
		       sizeof(symbol));
	if (rv->run->one.json) {
		run_line(rv, &line, "violation");
		json_number(&line, "vcpu", event->vcpu);
		json_string(&line, "access", access);
		json_string(&line, "area", area ? area->name : "?");
		json_hex(&line, "address", address);
		json_string(&line, "symbol", symbol);
		json_hex(&line, "gpa", pf->gpa);
		json_string(&line, "by", by);
		json_hex(&line, "rip", event->state.regs.rip);
		json_hex(&line, "cr3", event->state.sregs.cr3);
		json_bool(&line, "user", event->state.sregs.ss.dpl == 3);
		run_registers(&line, &event->state.regs);
		json_end(&line, true);
	} else if (p->violations <= options->show) {
		human(now_us(), true, "%s: vCPU %u: %s to %s (%s) by %s, rip 0x%" PRIx64 ", cr3 0x%" PRIx64 "%s",
		      rv->label, event->vcpu, access, symbol,
		      area ? area->name : "?", by,
		      (uint64_t)event->state.regs.rip,
		      (uint64_t)event->state.sregs.cr3,
		      p->violations == options->show ?
		      "; from here on only numbers" : "");
	}
	if (options->count &&
	    atomic_fetch_add(&rv->run->count, 1) + 1 >= options->count)
		run_stop(rv->run);
}

static void on_event(struct run_vm *rv, struct kvmi_vm_event *event)
{
	struct protect *p = rv->data;
	struct kvmi_error err;
	enum kvmi_status status;

	if (event->id == KVMI_EV_PF && p->active) {
		tell(rv, event);
		/* KVM lets go of the page, to let the access pass */
		if (event->pf.not_emulated)
			p->again = true;
	}
	status = kvmi_vm_reply(rv->vm, event, KVMI_ACTION_CONTINUE, &err);
	if (status != KVMI_OK && !run_lost(rv, status))
		run_problem(rv, "%s", err.message);
}

static void second(struct run_vm *rv, int64_t us)
{
	const struct options *options = rv->run->options;
	struct protect *p = rv->data;
	struct line line;

	(void)us;
	if (p->again) {
		p->again = false;
		restrict_pages(rv);
	}
	if (p->violations == p->told_violations && p->ignored == p->told_ignored)
		return;
	if (rv->run->one.json) {
		run_line(rv, &line, "summary");
		json_number(&line, "violations", p->violations);
		json_number(&line, "ignored", p->ignored);
		json_end(&line, false);
	} else if (p->violations > options->show) {
		human(now_us(), true, "%s: %" PRIu64 " violations, %" PRIu64 " more were ignored",
		      rv->label, p->violations, p->ignored);
	}
	p->told_violations = p->violations;
	p->told_ignored = p->ignored;
}

static void end(struct run_vm *rv)
{
	struct protect *p = rv->data;
	int64_t start = now_us();
	struct kvmi_error err;
	enum kvmi_status status;
	struct line line;
	size_t i;

	if (!p->active)
		return;
	for (i = 0; i < p->page_count; i++)
		p->pages[i].access = KVMI_PAGE_RWX;
	status = kvmi_vm_set_page_access(rv->vm, p->pages, p->page_count, &err);
	if (status != KVMI_OK) {
		if (!run_lost(rv, status))
			run_problem(rv, "%s; KVM undoes the rest", err.message);
		return;
	}
	p->active = false;
	if (rv->run->one.json) {
		run_line(rv, &line, "clean");
		json_number(&line, "pages", p->page_count);
		json_number(&line, "duration_us", now_us() - start);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: all restrictions are off after %" PRId64 " us; %" PRIu64 " violations, %" PRIu64 " ignored",
		      rv->label, now_us() - start, p->violations, p->ignored);
	}
}

static void free_data(struct run_vm *rv)
{
	struct protect *p = rv->data;

	free(p->pages);
}

int protect_main(int argc, char **argv)
{
	enum { OPTION_TEXT = 256, OPTION_RODATA, OPTION_SHOW };
	static const struct option list[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_JSON_OPTIONS,
		{ "text", no_argument, NULL, OPTION_TEXT },
		{ "rodata", no_argument, NULL, OPTION_RODATA },
		{ "show", required_argument, NULL, OPTION_SHOW },
		{ "ignore", required_argument, NULL, 'i' },
		{ "count", required_argument, NULL, 'n' },
		{ 0 },
	};
	static const struct run_ops ops = {
		.name = "protect",
		.commands = KVMI_SET(KVMI_CMD_VM_SET_PAGE_ACCESS) |
			    KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS),
		.events = KVMI_SET(KVMI_EV_PF),
		.data_size = sizeof(struct protect),
		.kernel = true,
		.vcpu = enable,
		.begin = begin,
		.event = on_event,
		.second = second,
		.end = end,
		.free = free_data,
	};
	struct options options = { .show = 20 };
	struct run run = { .ops = &ops, .options = &options };
	int option, result;

	while ((option = getopt_long(argc, argv, "i:n:" ONE_VM_SOCKET ONE_VM_MAP
				     ONE_VM_JSON, list, NULL)) >= 0) {
		switch (option) {
		case OPTION_TEXT:
			options.text = true;
			break;
		case OPTION_RODATA:
			options.rodata = true;
			break;
		case OPTION_SHOW:
			if (parse_number(optarg, 0, UINT64_MAX, &options.show)) {
				complain("--show wants a number");
				return EXIT_USAGE;
			}
			break;
		case 'i':
			if (options.ignore_count == IGNORE_MAX) {
				complain("--ignore can be given %d times",
					 IGNORE_MAX);
				return EXIT_USAGE;
			}
			options.ignore[options.ignore_count++] = optarg;
			break;
		case 'n':
			if (parse_number(optarg, 1, UINT64_MAX, &options.count)) {
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
	if (!options.text && !options.rodata)
		options.text = options.rodata = true;
	result = one_vm_options_end(&run.one, "protect", argc - optind, 0);

	return result >= 0 ? result : run_main(&run);
}
