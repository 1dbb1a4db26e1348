/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kvmi.h"
#include "output.h"

static const char help[] =
"Usage: kvmi info --socket PATH [OPTION]...\n"
"\n"
"Waits for a VM, prints what it says of itself, what it allows and the main\n"
"registers of its vCPUs, then lets it go.\n"
"\n"
"Options:\n"
ONE_VM_TIMEOUT_HELP ONE_VM_SOCKET_HELP;

static void print_allowed(struct kvmi_vm *vm, bool events)
{
	enum kvmi_status (*check)(struct kvmi_vm *vm, unsigned int id,
				  struct kvmi_error *err) =
		events ? kvmi_vm_check_event : kvmi_vm_check_command;
	static const char *const titles[] = {
		"allowed", "not allowed", "not in this KVM"
	};
	unsigned int id, kind;

	for (kind = 0; kind < 3; kind++) {
		bool first = true;

		for (id = 0; id < 64; id++) {
			const char *name = events ? kvmi_event_name(id) :
						    kvmi_command_name(id);
			enum kvmi_status status;

			if (!name)
				continue;
			status = check(vm, id, NULL);
			if (status != (kind == 0 ? KVMI_OK :
				       kind == 1 ? KVMI_ERR_NOT_ALLOWED :
						   KVMI_ERR_NOT_FOUND))
				continue;
			if (first)
				printf("%s, %s:\n ", events ? "Events" :
				       "Commands", titles[kind]);
			first = false;
			printf(" %s", name);
		}
		if (!first)
			printf("\n");
	}
}

static void print_vcpu(struct kvmi_vm *vm, unsigned int vcpu)
{
	struct kvmi_registers state;
	struct kvmi_error err;
	enum kvmi_status status;

	status = kvmi_vcpu_get_registers(vm, vcpu, &state, NULL, NULL, 0, &err);
	if (status != KVMI_OK) {
		printf("vCPU %u: %s\n", vcpu, err.message);
		return;
	}
	printf("vCPU %u: rip 0x%016" PRIx64 "  rsp 0x%016" PRIx64
	       "  cr3 0x%012" PRIx64 "  rflags 0x%06" PRIx64 "  %u-bit code, ring %u\n",
	       vcpu, (uint64_t)state.regs.rip, (uint64_t)state.regs.rsp,
	       (uint64_t)state.sregs.cr3, (uint64_t)state.regs.rflags,
	       8 * state.mode, state.sregs.ss.dpl);
}

int info_main(int argc, char **argv)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_TIMEOUT_OPTIONS,
		{ 0 },
	};
	const struct kvmi_vm_version *version;
	const struct kvmi_vm_hello *hello;
	struct one_vm one = { 0 };
	unsigned int count, vcpu;
	char uuid[37], when[64], name[65];
	struct kvmi_error err;
	struct kvmi_vm *vm;
	enum kvmi_status status;
	struct tm parts;
	time_t start;
	int option, result;
	size_t i;

	while ((option = getopt_long(argc, argv, ONE_VM_SOCKET ONE_VM_TIMEOUT, options,
				     NULL)) >= 0) {
		result = one_vm_option(&one, option, help);
		if (result >= 0)
			return result;
	}
	result = one_vm_options_end(&one, "info", argc - optind, 0);
	if (result >= 0)
		return result;

	result = one_vm_connect(&one, KVMI_SET(KVMI_CMD_VM_GET_INFO),
				KVMI_SET(KVMI_EV_UNHOOK));
	if (result != EXIT_OK)
		return result;
	vm = one.vm;

	hello = kvmi_vm_get_hello(vm);
	version = kvmi_vm_get_version(vm);
	format_uuid(hello->uuid, uuid);
	start = hello->start_time;
	if (!localtime_r(&start, &parts) ||
	    !strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S %z", &parts))
		strcpy(when, "?");
	snprintf(name, sizeof(name), "%s", hello->name);
	for (i = 0; name[i]; i++)
		if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f)
			name[i] = '?';

	printf("Name: %s\n", name[0] ? name : "(none)");
	printf("UUID: %s\n", uuid);
	printf("Started or last reset: %s\n", when);
	if (hello->max_gpa)
		printf("Memory ends at: 0x%" PRIx64 " (%" PRIu64 " MiB)\n",
		       hello->max_gpa, hello->max_gpa >> 20);
	printf("Protocol version: %u, messages up to %u bytes\n",
	       version->version, version->max_message);
	printf("Single-stepping by KVM: %s\n", version->singlestep ? "yes" : "no");
	print_allowed(vm, false);
	print_allowed(vm, true);

	status = kvmi_vm_get_vcpu_count(vm, &count, &err);
	if (status != KVMI_OK) {
		complain("%s", err.message);
		one_vm_close(&one);
		return EXIT_PROBLEM;
	}
	printf("vCPUs: %u\n", count);
	for (vcpu = 0; vcpu < count; vcpu++)
		print_vcpu(vm, vcpu);
	one_vm_close(&one);

	return EXIT_OK;
}
