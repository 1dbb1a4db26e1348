/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the commands that look at one VM and go have in common */

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvmi.h"
#include "output.h"
#include "silent.h"

#define KERNEL_POLL_MS 200

static volatile sig_atomic_t interrupted;

static void on_signal(int signal)
{
	(void)signal;
	interrupted = 1;
}

bool tool_interrupted(void)
{
	return interrupted;
}

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);

	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

int one_vm_option(struct one_vm *one, int option, const char *help)
{
	uint64_t number;
	char *end;

	switch (option) {
	case 'M':
		one->where.mode = strtoul(optarg, &end, 8);
		if (*end || !one->where.mode ||
		    one->where.mode > 0777) {
			complain("--mode wants an octal number from 1 to 0777");
			return EXIT_USAGE;
		}
		return -1;
	case 's':
		one->where.socket = optarg;
		return -1;
	case 'k':
		one->where.key_file = optarg;
		return -1;
	case 'A':
		one->where.mutual = true;
		return -1;
	case 't':
		if (parse_number(optarg, 1, 1000000, &number)) {
			complain("--timeout wants seconds");
			return EXIT_USAGE;
		}
		one->timeout_s = number;
		return -1;
	case 'm':
		one->map_path = optarg;
		return -1;
	case 'b':
		one->btf_path = optarg;
		return -1;
	case 'j':
		one->json = true;
		return -1;
	case 'P':
		one->pause = true;
		return -1;
	case 'h':
		fputs(help, stdout);
		return EXIT_OK;
	default:
		return EXIT_USAGE;
	}
}

int one_vm_options_end(struct one_vm *one, const char *command,
		       unsigned int arguments, unsigned int wanted)
{
	char text[512];

	if (arguments != wanted || !one->where.socket) {
		complain("%s; see kvmi %s --help", !one->where.socket ?
			 "--socket PATH is missing" : arguments > wanted ?
			 "too many arguments" : "arguments are missing",
			 command);
		return EXIT_USAGE;
	}
	if (one->map_path) {
		one->map = symbols_load(one->map_path, text, sizeof(text));
		if (!one->map) {
			complain("%s", text);
			return EXIT_PROBLEM;
		}
	}

	return -1;
}

int one_vm_connect(struct one_vm *one, uint64_t commands, uint64_t events)
{
	/* no SA_RESTART: poll() ends */
	struct sigaction action = { .sa_handler = on_signal };
	struct silent silent = { .listener = start_listening(&one->where) };
	int result = EXIT_PROBLEM;
	struct kvmi_error err;
	enum kvmi_status status;

	if (!silent.listener)
		return EXIT_PROBLEM;

	sigaction(SIGINT, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	if (one->timeout_s)
		one->end_ms = now_ms() + 1000LL * one->timeout_s;

	while (!interrupted) {
		struct pollfd fds[SILENT_FDS];
		struct kvmi_vm *vm = NULL;

		if (one->end_ms && now_ms() >= one->end_ms) {
			complain(silent.count ? "a VM has connected to %s, but it is paused" :
				 "no VM has connected to %s",
				 one->where.socket);
			result = EXIT_NO_VM;
			break;
		}
		if (poll(fds, silent_fds(&silent, fds), 500) <= 0)
			continue;
		status = silent_take(&silent, fds, &vm, &err);
		if (status == KVMI_ERR_NOTHING)
			continue;
		if (status == KVMI_OK)
			status = kvmi_vm_connect(vm, commands, events, &err);
		/* not allowed: maybe they can do without */
		if (status == KVMI_OK || status == KVMI_ERR_NOT_ALLOWED) {
			one->vm = vm;
			result = EXIT_OK;
			break;
		}
		complain("%s", err.message);
		kvmi_vm_close(vm);
		/* none of these will be better with the next connection */
		if (status == KVMI_ERR_SYSTEM || status == KVMI_ERR_AUTH ||
		    status == KVMI_ERR_VERSION)
			break;
	}
	silent_free(&silent);

	return result;
}

static bool is_interrupted(void *unused)
{
	(void)unused;

	return interrupted;
}

int one_vm_find_kernel(struct one_vm *one)
{
	char text[512], said[512] = "";
	struct kvmi_error err;

	one->guest.interrupted = is_interrupted;
	while (!interrupted) {
		switch (guest_find_kernel(&one->guest, one->vm, one->map, text,
					  sizeof(text), &err)) {
		case GUEST_FOUND:
			return EXIT_OK;
		case GUEST_FAILED:
			complain("%s", err.message);
			return EXIT_PROBLEM;
		case GUEST_UNKNOWN:
			complain("%s", text);
			return EXIT_PROBLEM;
		case GUEST_NOT_YET:
			break;
		}
		if (one->end_ms && now_ms() >= one->end_ms) {
			complain("%s", text);
			return EXIT_NO_VM;
		}
		if (strcmp(said, text)) {
			complain("waiting: %s", text);
			strcpy(said, text);
		}
		poll(NULL, 0, KERNEL_POLL_MS);
	}

	return EXIT_PROBLEM;
}

int one_vm_pause(struct one_vm *one)
{
	enum kvmi_status *statuses;
	struct kvmi_error err;
	int result = EXIT_PROBLEM;
	unsigned int count, i;
	uint16_t *vcpus;

	if (kvmi_vm_get_vcpu_count(one->vm, &count, &err) != KVMI_OK) {
		complain("%s", err.message);
		return EXIT_PROBLEM;
	}
	vcpus = calloc(count + 1, sizeof(*vcpus));
	statuses = calloc(count + 1, sizeof(*statuses));
	if (!vcpus || !statuses) {
		complain("out of memory");
		goto out;
	}
	for (i = 0; i < count; i++)
		vcpus[i] = i;
	/* Their events are never answered: the end of the connection does it */
	kvmi_vm_pause_vcpus(one->vm, vcpus, count, true, statuses, &err);
	for (i = 0; i < count; i++)
		if (statuses[i] != KVMI_OK &&
		    statuses[i] != KVMI_ERR_NOT_STARTED) {
			complain("vCPU %u cannot be paused: %s", i, err.message);
			goto out;
		}
	result = EXIT_OK;
out:
	free(vcpus);
	free(statuses);

	return result;
}

void one_vm_close(struct one_vm *one)
{
	kvmi_vm_close(one->vm);
	one->vm = NULL;
	guest_forget(&one->guest);
	symbols_free(one->map);
	one->map = NULL;
}
