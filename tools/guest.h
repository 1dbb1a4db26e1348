/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvmi/kvmi.h>

#include "symbols.h"

#define PAGE_SIZE 4096ULL

/* The Linux kernel in a VM */
struct guest {
	struct kvmi_vm *vm;
	/* NULL, or: is there something more urgent than reading symbols? */
	bool (*interrupted)(void *context);
	void *context;

	uint64_t cr3;		/* with the kernel's page tables */
	bool five_levels;

	struct symbols *symbols;
	bool own_symbols;	/* at the addresses they have in this guest */
	int64_t offset;		/* address here - address in symbols or map */
	int64_t kaslr;		/* address here - address as linked */
	char banner[192];	/* "Linux version ..." */

	/* Kernel image: virtual - physical; 0 until known */
	uint64_t linear;
	uint64_t text_start;
	uint64_t text_end;
};

/* Why the kernel was not found; ask again later after GUEST_NOT_YET */
enum guest_result {
	GUEST_FOUND,
	GUEST_NOT_YET,	/* still booting */
	GUEST_UNKNOWN,	/* no kernel this tool can deal with */
	GUEST_FAILED,	/* see err */
};

/*
 * Finds kernel and KASLR offset, from the registers of vCPU 0.
 * map: NULL, or the symbols of the kernel as it was linked.
 * On GUEST_FOUND the kernel has booted as far as to run programs.
 * text says what is missing otherwise.
 */
enum guest_result guest_find_kernel(struct guest *guest, struct kvmi_vm *vm,
				    const struct symbols *map, char *text,
				    size_t text_size, struct kvmi_error *err);
/* Frees what it knows; vm and interrupted() stay */
void guest_forget(struct guest *guest);

const struct symbols *guest_symbols(const struct guest *guest,
				    const struct symbols *map);

/*
 * Walks the guest's page tables.  KVMI_ERR_UNMAPPED if there is nothing;
 * writable may be NULL.
 */
enum kvmi_status guest_translate(struct kvmi_vm *vm, uint64_t cr3,
				 bool five_levels, uint64_t gva, uint64_t *gpa,
				 bool *writable, struct kvmi_error *err);
/* The same in the kernel's own tables, with less work for the kernel's image */
enum kvmi_status guest_kernel_gpa(struct guest *guest, uint64_t gva,
				  uint64_t *gpa, struct kvmi_error *err);
enum kvmi_status guest_read(struct guest *guest, uint64_t gva, void *data,
			    size_t size, struct kvmi_error *err);

/*
 * SYMBOL, SYMBOL+OFFSET or an address as it is in the guest (0x...).
 * code: it has to be in the kernel's code.
 */
bool guest_resolve(const struct guest *guest, const struct symbols *map,
		   const char *text, bool code, uint64_t *address,
		   char *error, size_t error_size);

/* FUNCTION+0x1f for an address in the kernel's image, else the address */
void guest_describe(const struct guest *guest, const struct symbols *map,
		    uint64_t address, char *text, size_t size);

#endif
