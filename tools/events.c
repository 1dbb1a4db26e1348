/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "kvmi.h"

/* Pages of all --access together */
#define PAGES_MAX 65536

/* ------------------------------------------------------------------------
 * Options
 */

/* WHERE[,LENGTH]=ACCESS */
static int parse_access(struct events *e, char *text)
{
	struct access *a = &e->accesses[e->access_count];
	char *equals = strrchr(text, '='), *comma, *at;

	if (e->access_count == ACCESSES_MAX || !equals)
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
	e->access_count++;

	return 0;
}

bool events_option(struct events *e, int option, int *result)
{
	uint64_t number;

	*result = -1;
	switch (option) {
	case OPTION_CR:
		if (parse_number(optarg, 0, 4, &number) || number == 1 ||
		    number == 2) {
			complain("--cr wants 0, 3 or 4");
			*result = EXIT_USAGE;
			break;
		}
		e->cr[number] = true;
		break;
	case OPTION_MSR:
		if (e->msr_count == MSRS_MAX ||
		    parse_number(optarg, 0, UINT32_MAX, &number)) {
			complain("--msr wants a number, at most %d times",
				 MSRS_MAX);
			*result = EXIT_USAGE;
			break;
		}
		e->msrs[e->msr_count++] = number;
		break;
	case 'a':
		if (parse_access(e, optarg)) {
			complain("--access wants WHERE[,LENGTH]=ACCESS, as jiffies=r; at most %d times",
				 ACCESSES_MAX);
			*result = EXIT_USAGE;
		}
		break;
	case OPTION_DESCRIPTORS:
		e->descriptors = true;
		break;
	case OPTION_XSETBV:
		e->xsetbv = true;
		break;
	case OPTION_HYPERCALLS:
		e->hypercalls = true;
		break;
	default:
		return false;
	}

	return true;
}

bool events_want(const struct events *e, unsigned int id)
{
	switch (id) {
	case KVMI_EV_CR:
		return e->cr[0] || e->cr[3] || e->cr[4];
	case KVMI_EV_MSR:
		return e->msr_count;
	case KVMI_EV_PF:
		return e->access_count;
	case KVMI_EV_DESCRIPTOR:
		return e->descriptors;
	case KVMI_EV_XSETBV:
		return e->xsetbv;
	case KVMI_EV_HYPERCALL:
		return e->hypercalls;
	}

	return false;
}

uint64_t events_ids(const struct events *e)
{
	uint64_t ids = 0;
	unsigned int i;

	for (i = 0; i < EVENT_IDS; i++)
		if (events_want(e, i))
			ids |= KVMI_SET(i);

	return ids;
}

uint64_t events_commands(const struct events *e)
{
	uint64_t commands = 0;

	if (events_ids(e))
		commands |= KVMI_SET(KVMI_CMD_VM_GET_INFO) |
			    KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS);
	if (events_want(e, KVMI_EV_CR))
		commands |= KVMI_SET(KVMI_CMD_VCPU_CONTROL_CR);
	if (events_want(e, KVMI_EV_MSR))
		commands |= KVMI_SET(KVMI_CMD_VCPU_CONTROL_MSR);
	if (events_want(e, KVMI_EV_PF))
		commands |= KVMI_SET(KVMI_CMD_VM_SET_PAGE_ACCESS);

	return commands;
}

static bool is_physical(const struct access *a)
{
	return !strncmp(a->where, "phys:", 5);
}

bool events_need_kernel(const struct events *e)
{
	size_t i;

	for (i = 0; i < e->access_count; i++)
		if (!is_physical(&e->accesses[i]))
			return true;

	return false;
}

/* ------------------------------------------------------------------------
 * On and off
 */

enum kvmi_status events_control(const struct events *e, struct kvmi_vm *vm,
				unsigned int vcpu, bool enable,
				struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;
	size_t i;

	for (i = 0; i < EVENT_IDS && status == KVMI_OK; i++)
		if (events_want(e, i))
			status = kvmi_vcpu_control_events(vm, vcpu, i, enable,
							  err);
	for (i = 0; i < 5 && status == KVMI_OK; i++)
		if (e->cr[i])
			status = kvmi_vcpu_control_cr(vm, vcpu, i, enable, err);
	for (i = 0; i < e->msr_count && status == KVMI_OK; i++)
		status = kvmi_vcpu_control_msr(vm, vcpu, e->msrs[i], enable, err);

	return status;
}

static enum kvmi_status wrong(struct kvmi_error *err, const char *where,
			      const char *what)
{
	*err = (struct kvmi_error){ .status = KVMI_ERR_ARGUMENT };
	snprintf(err->message, sizeof(err->message), "%s%s%s", where,
		 *where ? ": " : "", what);

	return err->status;
}

static enum kvmi_status add_pages(const struct access *a, struct guest *guest,
				  const struct symbols *map,
				  struct kvmi_page_access *pages, size_t *count,
				  struct kvmi_error *err)
{
	uint64_t address, end, gva, gpa;
	enum kvmi_status status;
	char text[200];

	if (is_physical(a)) {
		if (parse_number(a->where + 5, 0, INT64_MAX, &address))
			return wrong(err, a->where, "not an address");
	} else if (!guest_resolve(guest, map, a->where, false, &address, text,
				  sizeof(text))) {
		return wrong(err, "", text);
	}
	end = address + a->length - 1;
	if (end < address)
		return wrong(err, a->where, "there is no memory behind the end");
	for (gva = address & ~(PAGE_SIZE - 1);; gva += PAGE_SIZE) {
		gpa = gva;
		if (!is_physical(a)) {
			status = guest_kernel_gpa(guest, gva, &gpa, err);
			if (status != KVMI_OK)
				return status;
		}
		if (*count == PAGES_MAX)
			return wrong(err, a->where, "more than 65536 pages");
		pages[(*count)++] = (struct kvmi_page_access){ gpa, a->access };
		if (end - gva < PAGE_SIZE)
			return KVMI_OK;
	}
}

enum kvmi_status events_pages(const struct events *e, struct guest *guest,
			      const struct symbols *map,
			      struct kvmi_page_access **pages, size_t *count,
			      struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;
	size_t i;

	*count = 0;
	*pages = calloc(PAGES_MAX, sizeof(**pages));
	if (!*pages)
		return wrong(err, "", "out of memory");
	for (i = 0; i < e->access_count && status == KVMI_OK; i++)
		status = add_pages(&e->accesses[i], guest, map, *pages, count,
				   err);
	if (status != KVMI_OK) {
		free(*pages);
		*pages = NULL;
		*count = 0;
	}

	return status;
}

/* ------------------------------------------------------------------------
 * In words
 */

static void describe_data(const struct kvmi_vm_event *event,
			  const struct guest *guest, const struct symbols *map,
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
		guest_describe(guest, map, event->pf.gva, symbol, sizeof(symbol));
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

void events_describe(const struct kvmi_vm_event *event,
		     const struct guest *guest, const struct symbols *map,
		     struct line *line, char *text, size_t size)
{
	bool user = event->state.sregs.ss.dpl == 3;
	uint64_t cr3 = event->state.sregs.cr3;
	char what[320], by[128];

	describe_data(event, guest, map, line, what, sizeof(what));
	guest_describe(guest, map, event->state.regs.rip, by, sizeof(by));
	snprintf(text, size, "%s, by %s%s, cr3 0x%" PRIx64, what, by,
		 user ? " in user space" : "", cr3);
	json_number(line, "vcpu", event->vcpu);
	json_hex(line, "rip", event->state.regs.rip);
	json_string(line, "by", by);
	json_hex(line, "cr3", cr3);
	json_bool(line, "user", user);
}
