/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi stat: what vCPUs do, in numbers */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "events.h"
#include "run.h"

/* Commands with which it measures, each second */
#define PROBES 8

static const char stat_help[] =
"Usage: kvmi stat --socket PATH [OPTION]...\n"
"\n"
"Waits for VMs (any number of them) and prints each second, for each of them: how\n"
"many events of what the options ask for there were, how long vCPUs waited for\n"
"this program's answer, and how long commands took to be answered: by KVM, and by\n"
"vCPU 0.  Without options about events, commands only.\n"
"\n"
"Options:\n"
EVENTS_HELP
"  -n, --count N          end after N seconds\n"
RUN_OPTIONS_HELP
"\n"
"JSON: \"stat\" with interval_us; command and vcpu_command{least_us, mean_us,\n"
"most_us}; events[{event, count, mean_us, most_us}]; listening, connected, ready,\n"
"closed, problem as in kvmi watch.\n";

struct options {
	struct events events;
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
	struct tally tallies[EVENT_IDS];	/* since the last second */
};

/* ------------------------------------------------------------------------
 * On and off
 */

static enum kvmi_status switch_on(struct run_vm *rv, unsigned int vcpu,
				  struct kvmi_error *err)
{
	const struct options *o = rv->run->options;

	return events_control(&o->events, rv->vm, vcpu, true, err);
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
	enum kvmi_status status;
	struct kvmi_error err;

	if (!o->events.access_count)
		return true;
	status = events_pages(&o->events, &rv->guest, rv->run->one.map,
			      &w->pages, &w->page_count, &err);
	if (status != KVMI_OK) {
		if (!run_lost(rv, status))
			run_problem(rv, "%s", err.message);
		return false;
	}

	return restrict_pages(rv);
}

/*
 * Events that were on their way are answered as the others are; KVM lets vCPUs
 * go that have one open when the connection ends.
 */
static void switch_off(struct run_vm *rv)
{
	const struct options *o = rv->run->options;
	struct watching *w = rv->data;
	unsigned int i;
	size_t k;

	for (k = 0; k < w->page_count; k++)
		w->pages[k].access = KVMI_PAGE_RWX;
	if (w->page_count)
		restrict_pages(rv);
	for (i = 0; i < rv->vcpu_count && !rv->lost; i++) {
		/* it has to answer our commands, not wait for us */
		run_events(rv);
		events_control(&o->events, rv->vm, i, false, NULL);
	}
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
	if (!events_want(&o->events, event->id))
		return;
	if (event->id == KVMI_EV_PF && event->pf.not_emulated)
		w->again = true;

	tally = &w->tallies[event->id];
	tally->count++;
	tally->total_us += took;
	if (took > (int64_t)tally->most_us)
		tally->most_us = took;
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

		if (!events_want(&o->events, i))
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

int stat_main(int argc, char **argv)
{
	static const struct option list[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_JSON_OPTIONS,
		EVENTS_OPTIONS,
		{ "count", required_argument, NULL, 'n' },
		{ 0 },
	};
	struct run_ops ops = {
		.name = "stat",
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
	struct options o = { 0 };
	struct run run = { .ops = &ops, .options = &o };
	int option, result;

	while ((option = getopt_long(argc, argv, "n:" EVENTS_SHORT ONE_VM_SOCKET
				     ONE_VM_MAP ONE_VM_JSON, list, NULL)) >= 0) {
		if (option == 'n') {
			if (parse_number(optarg, 1, UINT64_MAX, &o.count)) {
				complain("--count wants a number above 0");
				return EXIT_USAGE;
			}
			continue;
		}
		if (!events_option(&o.events, option, &result))
			result = one_vm_option(&run.one, option, stat_help);
		if (result >= 0)
			return result;
	}
	ops.events = events_ids(&o.events);
	ops.commands |= events_commands(&o.events);
	ops.kernel = events_need_kernel(&o.events);
	result = one_vm_options_end(&run.one, ops.name, argc - optind, 0);

	return result >= 0 ? result : run_main(&run);
}
