/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KVMI_TOOL_H
#define KVMI_TOOL_H

#include <stdbool.h>
#include <stdint.h>

#include <kvmi/kvmi.h>

/* Exit statuses */
#define EXIT_OK 0
#define EXIT_PROBLEM 1	/* something failed; it was said on standard error */
#define EXIT_USAGE 2

int watch_main(int argc, char **argv);
int info_main(int argc, char **argv);
int read_main(int argc, char **argv);

/* -1 unless text is a number in [least, most] */
int parse_number(const char *text, uint64_t least, uint64_t most,
		 uint64_t *value);

/* What the commands that talk to one VM have in common */
struct one_vm_options {
	const char *socket;
	const char *key_file;
	unsigned int timeout_s;
};

/* Complains by itself */
struct kvmi_listener *start_listening(const char *socket, const char *key_file,
				      unsigned int mode);
/* Waits for a VM, not longer than timeout_s (0: for ever), and connects */
struct kvmi_vm *wait_for_vm(const struct one_vm_options *options,
			    uint64_t commands, uint64_t events);

void format_uuid(const uint8_t uuid[16], char text[37]);

#endif
