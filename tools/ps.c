/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi ps, kvmi modules */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvmi.h"
#include "linux.h"
#include "output.h"

#define COMMANDS ONE_VM_KERNEL_COMMANDS
#define OPTIONS ONE_VM_SOCKET ONE_VM_TIMEOUT ONE_VM_MAP ONE_VM_BTF ONE_VM_JSON ONE_VM_PAUSE
#define OPTIONS_HELP ONE_VM_JSON_HELP ONE_VM_PAUSE_HELP ONE_VM_BTF_HELP \
	ONE_VM_MAP_HELP ONE_VM_TIMEOUT_HELP ONE_VM_SOCKET_HELP

static const char ps_help[] =
"Usage: kvmi ps --socket PATH [OPTION]...\n"
"\n"
"Waits for a VM with a Linux kernel (and for that to have booted), lists its\n"
"processes, and lets it go.\n"
"\n"
"Options:\n"
"  -T, --threads          all threads, not only processes\n"
OPTIONS_HELP
"\n"
"JSON: pid, tid (with --threads), ppid, uid, state, comm, kernel (a thread of\n"
"the kernel), cr3, task (the address of its task_struct)\n";

static const char modules_help[] =
"Usage: kvmi modules --socket PATH [OPTION]...\n"
"\n"
"Waits for a VM with a Linux kernel (and for that to have booted), lists the\n"
"kernel's modules, and lets it go.\n"
"\n"
"Options:\n"
OPTIONS_HELP
"\n"
"JSON: name, base, size, references (-1: not known), state, module (the address\n"
"of its struct module)\n";

#define PF_KTHREAD 0x200000

static int start(struct one_vm *one, struct linux_reader *reader)
{
	int result;

	result = one_vm_connect(one, COMMANDS |
				(one->pause ? ONE_VM_PAUSE_COMMANDS : 0),
				one->pause ? KVMI_SET(KVMI_EV_PAUSE) : 0);
	if (result == EXIT_OK)
		result = one_vm_find_kernel(one);
	if (result != EXIT_OK)
		return result;
	if (!linux_start(reader, &one->guest, one->map, one->btf_path)) {
		complain("%s", reader->error);
		return EXIT_PROBLEM;
	}

	/* last: the guest is held no longer than it takes */
	return one->pause ? one_vm_pause(one) : EXIT_OK;
}

static void print_task(const struct linux_task *task, bool threads, bool json)
{
	struct line line;
	char tid[16];

	if (json) {
		json_start(&line, 0, NULL);
		json_number(&line, "pid", task->tgid);
		if (threads)
			json_number(&line, "tid", task->pid);
		json_number(&line, "ppid", task->ppid);
		json_number(&line, "uid", task->uid);
		json_string(&line, "state", (char []){ task->state, 0 });
		json_string(&line, "comm", task->comm);
		json_bool(&line, "kernel", task->flags & PF_KTHREAD);
		json_hex(&line, "cr3", task->cr3);
		json_hex(&line, "task", task->address);
		json_end(&line, false);
		return;
	}
	snprintf(tid, sizeof(tid), threads ? " %7d" : "", task->pid);
	human(0, false, "%7d%s %7d %5u %c %12" PRIx64 " %s%s%s", task->tgid, tid,
	      task->ppid, task->uid, task->state, task->cr3,
	      task->flags & PF_KTHREAD ? "[" : "", task->comm,
	      task->flags & PF_KTHREAD ? "]" : "");
}

int ps_main(int argc, char **argv)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_TIMEOUT_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_BTF_OPTIONS,
		ONE_VM_JSON_OPTIONS, ONE_VM_PAUSE_OPTIONS,
		{ "threads", no_argument, NULL, 'T' },
		{ 0 },
	};
	struct linux_reader reader = { 0 };
	struct linux_task *tasks = NULL;
	struct one_vm one = { 0 };
	bool threads = false;
	size_t count = 0, i;
	int option, result;

	while ((option = getopt_long(argc, argv, "T" OPTIONS, options,
				     NULL)) >= 0) {
		if (option == 'T') {
			threads = true;
			continue;
		}
		result = one_vm_option(&one, option, ps_help);
		if (result >= 0)
			return result;
	}
	result = one_vm_options_end(&one, "ps", argc - optind, 0);
	if (result >= 0)
		return result;

	result = start(&one, &reader);
	if (result == EXIT_OK && !linux_tasks(&reader, threads, &tasks, &count)) {
		complain("%s", reader.error);
		result = EXIT_PROBLEM;
	}
	linux_end(&reader);
	one_vm_close(&one);

	if (result == EXIT_OK && !one.json)
		human(0, false, "    PID%s    PPID   UID S          CR3 COMMAND",
		      threads ? "     TID" : "");
	for (i = 0; i < count; i++)
		print_task(&tasks[i], threads, one.json);
	free(tasks);

	return result;
}

static void print_module(const struct linux_module *module, bool json)
{
	struct line line;

	if (json) {
		json_start(&line, 0, NULL);
		json_string(&line, "name", module->name);
		json_hex(&line, "base", module->base);
		json_number(&line, "size", module->size);
		json_number(&line, "references", module->references);
		json_string(&line, "state", module->state);
		json_hex(&line, "module", module->address);
		json_end(&line, false);
		return;
	}
	human(0, false, "%016" PRIx64 " %9" PRIu64 " %4d %-8s %s", module->base,
	      module->size, module->references, module->state, module->name);
}

int modules_main(int argc, char **argv)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_TIMEOUT_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_BTF_OPTIONS,
		ONE_VM_JSON_OPTIONS, ONE_VM_PAUSE_OPTIONS,
		{ 0 },
	};
	struct linux_module *modules = NULL;
	struct linux_reader reader = { 0 };
	struct one_vm one = { 0 };
	size_t count = 0, i;
	int option, result;

	while ((option = getopt_long(argc, argv, OPTIONS, options, NULL)) >= 0) {
		result = one_vm_option(&one, option, modules_help);
		if (result >= 0)
			return result;
	}
	result = one_vm_options_end(&one, "modules", argc - optind, 0);
	if (result >= 0)
		return result;

	result = start(&one, &reader);
	if (result == EXIT_OK && !linux_modules(&reader, &modules, &count)) {
		complain("%s", reader.error);
		result = EXIT_PROBLEM;
		count = 0;
	}
	linux_end(&reader);
	one_vm_close(&one);

	if (result == EXIT_OK && !one.json)
		human(0, false, "BASE                  SIZE REFS STATE    NAME");
	for (i = 0; i < count; i++)
		print_module(&modules[i], one.json);
	if (result == EXIT_OK)
		free(modules);

	return result;
}
