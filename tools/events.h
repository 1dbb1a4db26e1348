/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef EVENTS_H
#define EVENTS_H

#include <getopt.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvmi/kvmi.h>

#include "guest.h"
#include "output.h"

/* What vCPUs do, breakpoints aside: what kvmi watch and kvmi stat are asked for */

#define EVENT_IDS 20
#define MSRS_MAX 64
#define ACCESSES_MAX 64

struct access {
	char *where;
	uint64_t length;
	uint8_t access;		/* KVMI_PAGE_* that give no event */
};

struct events {
	bool cr[5];
	uint32_t msrs[MSRS_MAX];
	size_t msr_count;
	struct access accesses[ACCESSES_MAX];
	size_t access_count;
	bool descriptors, xsetbv, hypercalls;
};

/* The options, for getopt_long() */
enum {
	OPTION_CR = 512, OPTION_MSR, OPTION_DESCRIPTORS, OPTION_XSETBV,
	OPTION_HYPERCALLS,
};

#define EVENTS_SHORT "a:"
#define EVENTS_OPTIONS \
	{ "cr", required_argument, NULL, OPTION_CR }, \
	{ "msr", required_argument, NULL, OPTION_MSR }, \
	{ "access", required_argument, NULL, 'a' }, \
	{ "descriptors", no_argument, NULL, OPTION_DESCRIPTORS }, \
	{ "xsetbv", no_argument, NULL, OPTION_XSETBV }, \
	{ "hypercalls", no_argument, NULL, OPTION_HYPERCALLS }
#define EVENTS_HELP \
"      --cr 0|3|4         writes of CR0, CR3 (switches of address spaces) or CR4\n" \
"      --msr N            writes of this MSR (0x...); up to 64 times\n" \
"  -a, --access WHERE[,LENGTH]=ACCESS\n" \
"                         accesses other than ACCESS (r, w, x, none: together, as\n" \
"                         rx) to the pages of WHERE, a SYMBOL, SYMBOL+OFFSET or\n" \
"                         address of the kernel, or phys:ADDRESS; up to 64 times.\n" \
"                         KVM emulates them, which is slow\n" \
"      --descriptors      loads and stores of GDTR, IDTR, LDTR and TR\n" \
"      --xsetbv           changes of XCR0\n" \
"      --hypercalls       the guest's calls for the tool\n"

/*
 * Takes an option that getopt_long() returned; false: it is none of these.
 * *result: -1, or the exit status with which to end.
 */
bool events_option(struct events *e, int option, int *result);

bool events_want(const struct events *e, unsigned int id);
/* All of them, and the commands that they need: KVMI_SET()s, 0 if nothing was asked for */
uint64_t events_ids(const struct events *e);
uint64_t events_commands(const struct events *e);
/* Some of them are where a symbol says */
bool events_need_kernel(const struct events *e);

/* All that is asked for of a vCPU, or of KVMI_ALL_VCPUS */
enum kvmi_status events_control(const struct events *e, struct kvmi_vm *vm,
				unsigned int vcpu, bool enable,
				struct kvmi_error *err);

/* The pages of all --access; the caller frees them */
enum kvmi_status events_pages(const struct events *e, struct guest *guest,
			      const struct symbols *map,
			      struct kvmi_page_access **pages, size_t *count,
			      struct kvmi_error *err);

/* In words, and into a line of JSON that was started */
void events_describe(const struct kvmi_vm_event *event,
		     const struct guest *guest, const struct symbols *map,
		     struct line *line, char *text, size_t size);

#endif
