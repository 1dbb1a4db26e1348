/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi trace: what a vCPU executes, instruction by instruction */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvmi.h"
#include "output.h"

#define INT3 0xcc
#define STEPS_MAX 10000000
#define VCPUS_MAX 4096
/* For one step, and for vCPUs to answer; below QEMU's deadline (5 s) */
#define STEP_TIMEOUT_MS 3000
#define DRAIN_TIMEOUT_MS 3000

static const char help[] =
"Usage: kvmi trace --socket PATH [OPTION]...\n"
"\n"
"Waits for a VM with a Linux kernel, lets one vCPU execute N instructions one by\n"
"one, prints in which functions they are, and lets the VM go.  Other vCPUs run on.\n"
"Interrupts are held back meanwhile, so a vCPU that halts ends the trace.\n"
"\n"
"Options:\n"
"  -f, --from WHERE       begin when a vCPU comes to this SYMBOL, SYMBOL+OFFSET, or\n"
"                         address in the kernel's code (0x...), where an\n"
"                         instruction begins; default: at once\n"
"  -c, --vcpu N           this vCPU (default: 0); not with --from\n"
"  -n, --steps N          so many (default: 1000)\n"
"  -a, --all              print each instruction's address, not only the functions\n"
ONE_VM_JSON_HELP ONE_VM_MAP_HELP ONE_VM_TIMEOUT_HELP ONE_VM_SOCKET_HELP
"\n"
"JSON: \"begin\" with vcpu, and for each step \"step\" with n, both with address,\n"
"symbol, cr3, user (in user space); \"end\" with steps, reason (\"done\", \"halted\",\n"
"\"unhook\", \"interrupted\").  --timeout holds for the wait for --from, too.\n";

struct trace {
	struct one_vm one;
	const char *from;
	int vcpu;		/* -1: the first that comes to from */
	uint64_t steps;
	bool all;

	struct kvmi_vm *vm;
	unsigned int vcpu_count;
	uint64_t gva, gpa;	/* of the breakpoint */
	uint8_t original;
	bool planted;
	bool unhook;
	bool lost;

	char function[128];	/* what is not printed yet */
	uint64_t function_steps;
	uint64_t done;
};

static bool check(struct trace *t, enum kvmi_status status,
		  const struct kvmi_error *err)
{
	if (status == KVMI_OK)
		return true;
	if (status == KVMI_ERR_CLOSED || status == KVMI_ERR_PROTOCOL ||
	    status == KVMI_ERR_SYSTEM)
		t->lost = true;
	complain("%s", err->message);

	return false;
}

static bool is_ending(const struct trace *t)
{
	return t->unhook || t->lost || tool_interrupted();
}

/* The next event that is for us, or NULL.  The caller frees it. */
static struct kvmi_vm_event *next_event(struct trace *t, int64_t deadline)
{
	struct kvmi_vm_event *event;
	struct kvmi_error err;
	enum kvmi_status status;

	while (!t->lost) {
		int64_t left = deadline - now_ms();

		/* to see a signal, too */
		status = kvmi_vm_wait_event(t->vm, left < 0 ? 0 :
					    left > 200 ? 200 : left, &event,
					    &err);
		if (status == KVMI_ERR_NOTHING) {
			if (left <= 200 || is_ending(t))
				return NULL;
			continue;
		}
		if (!check(t, status, &err))
			return NULL;
		if (event->id != KVMI_EV_UNHOOK)
			return event;
		t->unhook = true;
		kvmi_vm_event_free(event);
		return NULL;
	}

	return NULL;
}

/* Answers and frees */
static void answer(struct trace *t, struct kvmi_vm_event *event,
		   enum kvmi_action action)
{
	struct kvmi_error err;

	check(t, kvmi_vm_reply(t->vm, event, action, &err), &err);
	kvmi_vm_event_free(event);
}

static bool is_ours(const struct trace *t, const struct kvmi_vm_event *event)
{
	return event->id == KVMI_EV_BREAKPOINT &&
	       event->state.regs.rip == t->gva;
}

/* ------------------------------------------------------------------------
 * The breakpoint to begin at
 */

static bool plant(struct trace *t)
{
	static const uint8_t int3 = INT3;
	struct kvmi_error err;
	char text[512];
	unsigned int i;

	if (!guest_resolve(&t->one.guest, t->one.map, t->from, true, &t->gva,
			   text, sizeof(text))) {
		complain("%s", text);
		return false;
	}
	for (i = 0; i < t->vcpu_count; i++) {
		enum kvmi_status status;

		status = kvmi_vcpu_control_events(t->vm, i, KVMI_EV_BREAKPOINT,
						  true, &err);
		if (status == KVMI_ERR_NOT_STARTED)
			continue;
		if (!check(t, status, &err))
			return false;
	}
	if (!check(t, guest_kernel_gpa(&t->one.guest, t->gva, &t->gpa, &err),
		   &err) ||
	    !check(t, kvmi_vm_read_physical(t->vm, t->gpa, &t->original, 1,
					    &err), &err))
		return false;
	if (t->original == INT3) {
		complain("%s: there is a breakpoint (INT3) already", t->from);
		return false;
	}
	t->planted = check(t, kvmi_vm_write_physical(t->vm, t->gpa, &int3, 1,
						     &err), &err);

	return t->planted;
}

/*
 * Takes the breakpoint out.  Other vCPUs may have hit it: each is paused, so
 * that all hits come before its PAUSE event, and hits are retried, with what is
 * there now.  except: a vCPU that waits for an answer anyway, or -1.
 */
static void take_out(struct trace *t, int except)
{
	int64_t deadline = now_ms() + DRAIN_TIMEOUT_MS;
	enum kvmi_status *statuses;
	struct kvmi_error err;
	size_t count = 0, due = 0, i;
	bool unhook = t->unhook;
	uint16_t *vcpus;

	if (!t->planted || t->lost)
		return;
	if (!check(t, kvmi_vm_write_physical(t->vm, t->gpa, &t->original, 1,
					     &err), &err))
		return;
	t->planted = false;

	vcpus = calloc(t->vcpu_count + 1, sizeof(*vcpus));
	statuses = calloc(t->vcpu_count + 1, sizeof(*statuses));
	if (!vcpus || !statuses) {
		complain("out of memory");
		goto out;
	}
	for (i = 0; i < t->vcpu_count; i++)
		if ((int)i != except)
			vcpus[count++] = i;
	kvmi_vm_pause_vcpus(t->vm, vcpus, count, false, statuses, &err);
	for (i = 0; i < count; i++)
		due += statuses[i] == KVMI_OK;
	while (due && !t->lost) {
		struct kvmi_vm_event *event = next_event(t, deadline);

		if (!event) {
			/* QEMU's wish to leave, or the user's, is no reason */
			if (now_ms() < deadline)
				continue;
			complain("%zu vCPUs did not answer in time", due);
			break;
		}
		due -= event->id == KVMI_EV_PAUSE;
		answer(t, event, is_ours(t, event) ? KVMI_ACTION_RETRY :
						     KVMI_ACTION_CONTINUE);
	}
	for (i = 0; i < t->vcpu_count && !t->lost; i++)
		kvmi_vcpu_control_events(t->vm, i, KVMI_EV_BREAKPOINT, false,
					 NULL);
	t->unhook = t->unhook || unhook;
out:
	free(vcpus);
	free(statuses);
}

/* The event with which it begins, or NULL */
static struct kvmi_vm_event *wait_for_hit(struct trace *t)
{
	struct kvmi_vm_event *event;

	for (;;) {
		int64_t deadline = t->one.end_ms ? t->one.end_ms :
						   now_ms() + 60000;

		event = next_event(t, deadline);
		if (!event) {
			if (is_ending(t))
				return NULL;
			if (t->one.end_ms && now_ms() >= t->one.end_ms) {
				complain("%s was not reached in time", t->from);
				return NULL;
			}
			continue;
		}
		if (!is_ours(t, event)) {
			answer(t, event, KVMI_ACTION_CONTINUE);
			continue;
		}
		return event;
	}
}

static struct kvmi_vm_event *wait_for_pause(struct trace *t)
{
	struct kvmi_vm_event *event;
	struct kvmi_error err;

	if (!check(t, kvmi_vm_pause_vcpu(t->vm, t->vcpu, false, &err), &err))
		return NULL;
	event = next_event(t, now_ms() + STEP_TIMEOUT_MS);
	if (!event && !is_ending(t))
		complain("vCPU %d did not answer in time", t->vcpu);

	return event;
}

/* ------------------------------------------------------------------------
 * Steps
 */

static void print_function(struct trace *t)
{
	if (t->function_steps)
		human(0, true, "%8" PRIu64 "  %s", t->function_steps,
		      t->function);
	t->function_steps = 0;
}

static void print_step(struct trace *t, const struct kvmi_vm_event *event,
		       bool first)
{
	uint64_t rip = event->state.regs.rip;
	bool user = event->state.sregs.ss.dpl == 3;
	char symbol[128], *plus;
	struct line line;

	guest_describe(&t->one.guest, t->one.map, rip, symbol, sizeof(symbol));
	if (t->one.json) {
		json_start(&line, now_us(), first ? "begin" : "step");
		if (first)
			json_number(&line, "vcpu", event->vcpu);
		else
			json_number(&line, "n", t->done);
		json_hex(&line, "address", rip);
		json_string(&line, "symbol", symbol);
		json_hex(&line, "cr3", event->state.sregs.cr3);
		json_bool(&line, "user", user);
		json_end(&line, true);
		return;
	}
	if (first)
		human(0, true, "vCPU %u, from %s on, rsp 0x%" PRIx64 ", cr3 0x%" PRIx64 ":",
		      event->vcpu, symbol, (uint64_t)event->state.regs.rsp,
		      (uint64_t)event->state.sregs.cr3);
	if (t->all) {
		human(0, true, "%8" PRIu64 "  %016" PRIx64 "  %s", t->done, rip,
		      symbol);
		return;
	}
	plus = strchr(symbol, '+');
	if (plus)
		*plus = 0;
	else if (user)
		strcpy(symbol, "(user space)");
	else if (symbol[0] == '0')
		strcpy(symbol, "(outside of the kernel's image)");
	if (strcmp(symbol, t->function)) {
		print_function(t);
		strcpy(t->function, symbol);
	}
	t->function_steps++;
}

/* event: of the vCPU that is to be followed; takes it over */
static const char *follow(struct trace *t, struct kvmi_vm_event *event,
			  enum kvmi_action action)
{
	unsigned int vcpu = event->vcpu;
	const char *reason = "done";
	struct kvmi_error err;
	bool stepping;

	print_step(t, event, true);
	stepping = check(t, kvmi_vcpu_control_singlestep(t->vm, vcpu, true,
							 &err), &err);
	if (!stepping)
		reason = NULL;
	answer(t, event, action);
	event = NULL;
	while (stepping && t->done < t->steps) {
		event = next_event(t, now_ms() + STEP_TIMEOUT_MS);
		if (!event || is_ending(t)) {
			reason = t->lost ? NULL : t->unhook ? "unhook" :
				 tool_interrupted() ? "interrupted" : "halted";
			break;
		}
		if (event->id == KVMI_EV_SINGLESTEP && event->vcpu == vcpu) {
			if (event->singlestep.failed) {
				complain("the step after %" PRIu64 " others failed",
					 t->done);
				reason = NULL;
				break;
			}
			t->done++;
			print_step(t, event, false);
			if (t->done == t->steps)
				break;
		}
		answer(t, event, KVMI_ACTION_CONTINUE);
		event = NULL;
	}
	/* before the answer, so that there is no other step */
	if (stepping && !t->lost)
		check(t, kvmi_vcpu_control_singlestep(t->vm, vcpu, false, &err),
		      &err);
	if (event)
		answer(t, event, KVMI_ACTION_CONTINUE);

	return reason;
}

static const char *trace(struct trace *t)
{
	struct kvmi_vm_event *event = NULL;
	enum kvmi_action action = KVMI_ACTION_CONTINUE;
	struct kvmi_error err;

	if (!check(t, kvmi_vm_get_vcpu_count(t->vm, &t->vcpu_count, &err), &err))
		return NULL;
	if (t->vcpu_count > VCPUS_MAX)
		t->vcpu_count = VCPUS_MAX;
	if (t->vcpu >= (int)t->vcpu_count) {
		complain("the VM has vCPUs 0 to %u", t->vcpu_count - 1);
		return NULL;
	}
	if (!kvmi_vm_get_version(t->vm)->singlestep) {
		complain("this host's KVM cannot single-step");
		return NULL;
	}
	if (!check(t, kvmi_vm_control_events(t->vm, KVMI_EV_UNHOOK, true, &err),
		   &err))
		return NULL;

	if (!t->from) {
		event = wait_for_pause(t);
	} else {
		if (plant(t))
			event = wait_for_hit(t);
		take_out(t, event ? event->vcpu : -1);
		action = KVMI_ACTION_RETRY;
	}
	if (event && !is_ending(t))
		return follow(t, event, action);
	if (event)
		answer(t, event, action);

	return t->lost ? NULL : t->unhook ? "unhook" :
	       tool_interrupted() ? "interrupted" : NULL;
}

int trace_main(int argc, char **argv)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_TIMEOUT_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_JSON_OPTIONS,
		{ "from", required_argument, NULL, 'f' },
		{ "vcpu", required_argument, NULL, 'c' },
		{ "steps", required_argument, NULL, 'n' },
		{ "all", no_argument, NULL, 'a' },
		{ 0 },
	};
	struct trace t = { .vcpu = -1, .steps = 1000 };
	const char *reason = NULL;
	struct line line;
	uint64_t number;
	int option, result;

	while ((option = getopt_long(argc, argv, "f:c:n:a" ONE_VM_SOCKET ONE_VM_TIMEOUT
				     ONE_VM_MAP ONE_VM_JSON, options,
				     NULL)) >= 0) {
		switch (option) {
		case 'f':
			t.from = optarg;
			break;
		case 'c':
			if (parse_number(optarg, 0, VCPUS_MAX - 1, &number)) {
				complain("--vcpu wants the number of a vCPU");
				return EXIT_USAGE;
			}
			t.vcpu = number;
			break;
		case 'n':
			if (parse_number(optarg, 1, STEPS_MAX, &t.steps)) {
				complain("--steps wants a number from 1 to %d",
					 STEPS_MAX);
				return EXIT_USAGE;
			}
			break;
		case 'a':
			t.all = true;
			break;
		default:
			result = one_vm_option(&t.one, option, help);
			if (result >= 0)
				return result;
		}
	}
	if (t.from && t.vcpu >= 0) {
		complain("--from follows the vCPU that comes first: leave out --vcpu");
		return EXIT_USAGE;
	}
	if (t.vcpu < 0 && !t.from)
		t.vcpu = 0;
	result = one_vm_options_end(&t.one, "trace", argc - optind, 0);
	if (result >= 0)
		return result;

	result = one_vm_connect(&t.one, ONE_VM_KERNEL_COMMANDS |
				ONE_VM_PAUSE_COMMANDS |
				KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS) |
				KVMI_SET(KVMI_CMD_VCPU_CONTROL_SINGLESTEP) |
				(t.from ? KVMI_SET(KVMI_CMD_VM_WRITE_PHYSICAL) |
				 KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS) : 0),
				KVMI_SET(KVMI_EV_UNHOOK) |
				KVMI_SET(KVMI_EV_PAUSE) |
				KVMI_SET(KVMI_EV_SINGLESTEP) |
				(t.from ? KVMI_SET(KVMI_EV_BREAKPOINT) : 0));
	if (result == EXIT_OK)
		result = one_vm_find_kernel(&t.one);
	/* a reader who is slow must not hold the vCPU */
	if (result == EXIT_OK && output_start()) {
		complain("cannot start");
		result = EXIT_PROBLEM;
	}
	if (result == EXIT_OK) {
		t.vm = t.one.vm;
		reason = trace(&t);
		if (reason && t.one.json) {
			json_start(&line, now_us(), "end");
			json_number(&line, "steps", t.done);
			json_string(&line, "reason", reason);
			json_end(&line, false);
		} else if (reason) {
			print_function(&t);
			human(0, false, "%" PRIu64 " steps: %s", t.done, reason);
		}
		result = reason && (!strcmp(reason, "done") ||
				    !strcmp(reason, "halted")) ? EXIT_OK :
								 EXIT_PROBLEM;
	}
	one_vm_close(&t.one);
	if (output_dropped())
		complain("%lu lines of output were dropped because they were not read in time",
			 output_dropped());
	if (!output_end())
		result = EXIT_PROBLEM;

	return result;
}
