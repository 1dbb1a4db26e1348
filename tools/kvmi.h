/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef KVMI_TOOL_H
#define KVMI_TOOL_H

#include <getopt.h>
#include <stdbool.h>
#include <stdint.h>

#include <kvmi/kvmi.h>

#include "guest.h"

/* Exit statuses; the man page tells users */
#define EXIT_OK 0
#define EXIT_PROBLEM 1	/* something failed; it was said on standard error */
#define EXIT_USAGE 2
#define EXIT_NO_VM 3	/* none connected, or was ready, within --timeout */

int watch_main(int argc, char **argv);
int info_main(int argc, char **argv);
int read_main(int argc, char **argv);
int ps_main(int argc, char **argv);
int modules_main(int argc, char **argv);
int doctor_main(int argc, char **argv);
int dump_main(int argc, char **argv);
int stat_main(int argc, char **argv);
int trace_main(int argc, char **argv);
int protect_main(int argc, char **argv);
int libvirt_main(int argc, char **argv);	/* if built with libvirt */

/* -1 unless text is a number in [least, most] */
int parse_number(const char *text, uint64_t least, uint64_t most,
		 uint64_t *value);

void format_uuid(const uint8_t uuid[16], char text[37]);

/* Where VMs connect, from the command line */
struct where {
	const char *socket;
	const char *key_file;	/* NULL: no key */
	unsigned int mode;	/* 0: the library's default */
	bool mutual;		/* only QEMUs that know the key */
};

/* Complains by itself */
struct kvmi_listener *start_listening(const struct where *where);

/* ------------------------------------------------------------------------
 * What the commands that look at one VM and go have in common
 */

struct one_vm {
	/* from the command line */
	struct where where;
	const char *map_path;
	const char *btf_path;
	unsigned int timeout_s;	/* 0: wait for ever */
	bool json;
	bool pause;

	/* then */
	struct kvmi_vm *vm;
	struct symbols *map;
	struct guest guest;
	int64_t end_ms;
};

/*
 * The options in struct one_vm, for getopt_long(): each command takes those it
 * has a use for.
 */
#define ONE_VM_SOCKET "s:k:h"
#define ONE_VM_SOCKET_OPTIONS \
	{ "socket", required_argument, NULL, 's' }, \
	{ "mode", required_argument, NULL, 'M' }, \
	{ "key-file", required_argument, NULL, 'k' }, \
	{ "mutual", no_argument, NULL, 'A' }, \
	{ "help", no_argument, NULL, 'h' }
#define ONE_VM_TIMEOUT "t:"
#define ONE_VM_TIMEOUT_OPTIONS { "timeout", required_argument, NULL, 't' }
#define ONE_VM_MAP "m:"
#define ONE_VM_MAP_OPTIONS { "system-map", required_argument, NULL, 'm' }
#define ONE_VM_BTF "b:"
#define ONE_VM_BTF_OPTIONS { "btf", required_argument, NULL, 'b' }
#define ONE_VM_JSON "j"
#define ONE_VM_JSON_OPTIONS { "json", no_argument, NULL, 'j' }
#define ONE_VM_PAUSE "P"
#define ONE_VM_PAUSE_OPTIONS { "pause", no_argument, NULL, 'P' }

/* The same for --help */
#define ONE_VM_SOCKET_HELP \
"  -s, --socket PATH      listen on this unix socket, or on vsock:PORT\n" \
"      --mode OCTAL       permissions of the socket (default: 0600)\n" \
"  -k, --key-file FILE    the secret that the key= property of QEMU's kvmi\n" \
"                         object stands for\n" \
"      --mutual           only VMs whose QEMU proves that it knows the secret:\n" \
"                         with auth=hmac\n" \
"  -h, --help             print this\n"
#define ONE_VM_TIMEOUT_HELP \
"  -t, --timeout SEC      wait no longer than that for a VM (default: for ever)\n"
#define ONE_VM_MAP_HELP \
"  -m, --system-map FILE  the kernel's System.map, for symbols; without it they\n" \
"                         are read from the guest's memory\n"
#define ONE_VM_BTF_HELP \
"  -b, --btf FILE         the kernel's types: its vmlinux, or a copy of its\n" \
"                         /sys/kernel/btf/vmlinux; without it they are read from\n" \
"                         the guest's memory\n"
#define ONE_VM_JSON_HELP \
"  -j, --json             print one JSON object a line\n"
#define ONE_VM_PAUSE_HELP \
"  -P, --pause            hold all vCPUs meanwhile\n"

/*
 * Takes an option that getopt_long() returned.  -1: go on; else the exit
 * status with which to end, EXIT_OK after --help.
 */
int one_vm_option(struct one_vm *one, int option, const char *help);
/* After the last one, with what is left over of the arguments.  Likewise. */
int one_vm_options_end(struct one_vm *one, const char *command,
		       unsigned int arguments, unsigned int wanted);

/*
 * Waits for a VM and connects, with handlers for SIGINT and SIGTERM.
 * Complains and returns an exit status, EXIT_OK if one->vm is there.
 */
int one_vm_connect(struct one_vm *one, uint64_t commands, uint64_t events);
/* Waits until the guest's kernel is found, for one->guest */
int one_vm_find_kernel(struct one_vm *one);
/* Holds all vCPUs until the connection ends */
int one_vm_pause(struct one_vm *one);
void one_vm_close(struct one_vm *one);

/* Commands and events for the latter two */
#define ONE_VM_KERNEL_COMMANDS (KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL) | \
				KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS))
#define ONE_VM_PAUSE_COMMANDS (KVMI_SET(KVMI_CMD_VM_GET_INFO) | \
			       KVMI_SET(KVMI_CMD_VM_PAUSE_VCPU))

/* SIGINT or SIGTERM has come */
bool tool_interrupted(void);
/* Monotonic */
int64_t now_ms(void);

#endif
