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
"  -s, --socket PATH      listen on this unix socket\n"
"  -p, --physical         ADDRESS is a guest-physical one\n"
"  -c, --vcpu N           use the page tables of vCPU N (default: 0)\n"
"  -m, --system-map FILE  the kernel's System.map, for symbols; without it they\n"
"                         are read from the guest's memory\n"
"  -o, --output FILE      write the bytes as they are to FILE\n"
"  -k, --key-file FILE    the secret that the key= property of QEMU's kvmi\n"
"                         object stands for\n"
"  -t, --timeout SEC      wait no longer than that for a VM (default: for ever)\n"
"  -h, --help             print this\n";

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
		{ "socket", required_argument, NULL, 's' },
		{ "physical", no_argument, NULL, 'p' },
		{ "vcpu", required_argument, NULL, 'c' },
		{ "system-map", required_argument, NULL, 'm' },
		{ "output", required_argument, NULL, 'o' },
		{ "key-file", required_argument, NULL, 'k' },
		{ "timeout", required_argument, NULL, 't' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	struct one_vm_options common = { 0 };
	const char *map_path = NULL, *output_path = NULL, *where;
	uint64_t number, address = 0, length, done;
	struct symbols *map = NULL;
	struct guest guest = { 0 };
	struct kvmi_vm *vm = NULL;
	unsigned int vcpu = 0;
	bool physical = false;
	uint8_t *data = NULL;
	struct kvmi_error err;
	FILE *output = NULL;
	int option, result = EXIT_PROBLEM;
	char text[512];

	while ((option = getopt_long(argc, argv, "s:pc:m:o:k:t:h", options,
				     NULL)) >= 0) {
		switch (option) {
		case 's':
			common.socket = optarg;
			break;
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
		case 'm':
			map_path = optarg;
			break;
		case 'o':
			output_path = optarg;
			break;
		case 'k':
			common.key_file = optarg;
			break;
		case 't':
			if (parse_number(optarg, 1, 1000000, &number)) {
				complain("--timeout wants seconds");
				return EXIT_USAGE;
			}
			common.timeout_s = number;
			break;
		case 'h':
			fputs(help, stdout);
			return EXIT_OK;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind + 2 != argc || !common.socket) {
		complain("usage: kvmi read --socket PATH ADDRESS|SYMBOL LENGTH; see kvmi read --help");
		return EXIT_USAGE;
	}
	where = argv[optind];
	if (parse_number(argv[optind + 1], 1, MOST_BYTES, &length)) {
		complain("%s: not a number of bytes", argv[optind + 1]);
		return EXIT_USAGE;
	}
	if (isdigit((unsigned char)where[0])) {
		if (parse_number(where, 0, UINT64_MAX, &address)) {
			complain("%s: not an address", where);
			return EXIT_USAGE;
		}
	} else if (physical) {
		complain("--physical wants an address, not a symbol");
		return EXIT_USAGE;
	}
	if (map_path) {
		map = symbols_load(map_path, text, sizeof(text));
		if (!map) {
			complain("%s", text);
			return EXIT_PROBLEM;
		}
	}
	if (output_path) {
		output = fopen(output_path, "we");
		if (!output) {
			complain("%s: %s", output_path, strerror(errno));
			goto out;
		}
	}

	vm = wait_for_vm(&common, KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL) |
			 (physical ? 0 : KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS)),
			 0);
	if (!vm)
		goto out;
	if (!isdigit((unsigned char)where[0])) {
		enum guest_result found = guest_find_kernel(&guest, vm, map,
							    text, sizeof(text),
							    &err);

		if (found == GUEST_FAILED)
			complain("%s", err.message);
		else if (found != GUEST_FOUND)
			complain("%s", text);
		if (found != GUEST_FOUND)
			goto out;
		if (!guest_resolve(&guest, map, where, false, &address, text,
				   sizeof(text))) {
			complain("%s", text);
			goto out;
		}
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
	if (fflush(stdout))
		result = EXIT_PROBLEM;
	kvmi_vm_close(vm);
	guest_forget(&guest);
	symbols_free(map);
	free(data);

	return result;
}
