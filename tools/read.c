/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest.h"
#include "kvmi.h"
#include "output.h"

#define MOST_BYTES (1ULL << 40)
#define PIECE (256 * 1024)

static const char help[] =
"Usage: kvmi read --socket PATH [OPTION]... ADDRESS|SYMBOL[+OFFSET] LENGTH\n"
"\n"
"Waits for a VM and prints LENGTH bytes of its memory.  A symbol is one of the\n"
"guest's Linux kernel.\n"
"\n"
"Options:\n"
"  -p, --physical         ADDRESS is a guest-physical one\n"
"  -c, --vcpu N           use the page tables of vCPU N (default: 0)\n"
"  -o, --output FILE      write the bytes as they are to FILE\n"
ONE_VM_MAP_HELP ONE_VM_TIMEOUT_HELP ONE_VM_SOCKET_HELP;

static void dump(uint64_t address, const uint8_t *data, size_t size)
{
	size_t i, j;

	for (i = 0; i < size; i += 16) {
		printf("%016" PRIx64 " ", address + i);
		for (j = i; j < i + 16; j++) {
			if (j % 8 == 0)
				putchar(' ');
			if (j < size)
				printf("%02x ", data[j]);
			else
				printf("   ");
		}
		printf(" |");
		for (j = i; j < i + 16 && j < size; j++)
			putchar(data[j] >= 0x20 && data[j] < 0x7f ? data[j] :
								    '.');
		printf("|\n");
	}
}

/* Through the page tables of vCPU, or of the kernel it is in */
static enum kvmi_status read_virtual(struct kvmi_vm *vm, unsigned int vcpu,
				     uint64_t gva, uint8_t *data, size_t size,
				     struct kvmi_error *err)
{
	struct kvmi_registers state;
	enum kvmi_status status;
	uint64_t cr3;
	bool five;

	status = kvmi_vcpu_get_registers(vm, vcpu, &state, NULL, NULL, 0, err);
	if (status != KVMI_OK)
		return status;
	if (!(state.sregs.cr0 >> 31) || !(state.sregs.efer >> 10 & 1))
		/* not in 64-bit mode: KVM knows better than we do */
		return kvmi_vcpu_read_virtual(vm, vcpu, gva, data, size, err);

	cr3 = state.sregs.cr3 & ~(PAGE_SIZE - 1);
	five = state.sregs.cr4 >> 12 & 1;
	while (size) {
		size_t part = PAGE_SIZE - gva % PAGE_SIZE;
		uint64_t gpa;

		if (part > size)
			part = size;
		status = guest_translate(vm, cr3, five, gva, &gpa, NULL, err);
		/* with page-table isolation, see guest_find_kernel() */
		if (status == KVMI_ERR_UNMAPPED && gva >> 63 &&
		    (cr3 & PAGE_SIZE))
			status = guest_translate(vm, cr3 & ~PAGE_SIZE, five,
						 gva, &gpa, NULL, err);
		if (status == KVMI_OK)
			status = kvmi_vm_read_physical(vm, gpa, data, part, err);
		if (status != KVMI_OK)
			return status;
		gva += part;
		data += part;
		size -= part;
	}

	return KVMI_OK;
}

int read_main(int argc, char **argv)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_TIMEOUT_OPTIONS, ONE_VM_MAP_OPTIONS,
		{ "physical", no_argument, NULL, 'p' },
		{ "vcpu", required_argument, NULL, 'c' },
		{ "output", required_argument, NULL, 'o' },
		{ 0 },
	};
	struct one_vm one = { 0 };
	const char *output_path = NULL, *where;
	uint64_t number, address = 0, length, done;
	struct kvmi_vm *vm;
	unsigned int vcpu = 0;
	bool physical = false;
	uint8_t *data = NULL;
	struct kvmi_error err;
	FILE *output = NULL;
	int option, result;
	char text[512];

	while ((option = getopt_long(argc, argv, "pc:o:" ONE_VM_SOCKET ONE_VM_TIMEOUT
				     ONE_VM_MAP, options, NULL)) >= 0) {
		switch (option) {
		case 'p':
			physical = true;
			break;
		case 'c':
			if (parse_number(optarg, 0, 65535, &number)) {
				complain("--vcpu wants the number of a vCPU");
				return EXIT_USAGE;
			}
			vcpu = number;
			break;
		case 'o':
			output_path = optarg;
			break;
		default:
			result = one_vm_option(&one, option, help);
			if (result >= 0)
				return result;
		}
	}
	result = one_vm_options_end(&one, "read", argc - optind, 2);
	if (result >= 0)
		return result;
	result = EXIT_USAGE;
	where = argv[optind];
	if (parse_number(argv[optind + 1], 1, MOST_BYTES, &length)) {
		complain("%s: not a number of bytes", argv[optind + 1]);
		goto out;
	}
	if (isdigit((unsigned char)where[0])) {
		if (parse_number(where, 0, UINT64_MAX, &address)) {
			complain("%s: not an address", where);
			goto out;
		}
	} else if (physical) {
		complain("--physical wants an address, not a symbol");
		goto out;
	}
	result = EXIT_PROBLEM;
	if (output_path) {
		output = fopen(output_path, "we");
		if (!output) {
			complain("%s: %s", output_path, strerror(errno));
			goto out;
		}
	}

	result = one_vm_connect(&one, KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL) |
				(physical ? 0 :
				 KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS)), 0);
	if (result == EXIT_OK && !isdigit((unsigned char)where[0]))
		result = one_vm_find_kernel(&one);
	if (result != EXIT_OK)
		goto out;
	result = EXIT_PROBLEM;
	vm = one.vm;
	if (!isdigit((unsigned char)where[0]) &&
	    !guest_resolve(&one.guest, one.map, where, false, &address, text,
			   sizeof(text))) {
		complain("%s", text);
		goto out;
	}

	data = malloc(PIECE);
	if (!data) {
		complain("out of memory");
		goto out;
	}
	for (done = 0; done < length;) {
		size_t part = length - done < PIECE ? length - done : PIECE;
		enum kvmi_status status = physical ?
			kvmi_vm_read_physical(vm, address + done, data, part,
					      &err) :
			read_virtual(vm, vcpu, address + done, data, part,
				     &err);

		if (status != KVMI_OK) {
			complain("0x%" PRIx64 ": %s", address + done,
				 err.message);
			goto out;
		}
		if (output && fwrite(data, 1, part, output) != part) {
			complain("%s: %s", output_path, strerror(errno));
			goto out;
		}
		if (!output)
			dump(address + done, data, part);
		done += part;
	}
	result = EXIT_OK;
out:
	if (output && fclose(output) && result == EXIT_OK) {
		complain("%s: %s", output_path, strerror(errno));
		result = EXIT_PROBLEM;
	}
	one_vm_close(&one);
	free(data);

	return result;
}
