/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SYMBOLS_H
#define SYMBOLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The symbols of a kernel: from System.map, or from its own table (kallsyms) */

struct symbol {
	uint64_t address;
	const char *name;
	char type;		/* as nm has it: T, t, D, ... */
};

struct symbols;

struct symbols *symbols_new(void);
void symbols_free(struct symbols *symbols);
/* -1: out of memory */
int symbols_add(struct symbols *symbols, uint64_t address, char type,
		const char *name, size_t name_length);
/* After the last symbols_add(), before all of the following */
int symbols_sort(struct symbols *symbols);
size_t symbols_count(const struct symbols *symbols);

/* NULL, with the reason in error */
struct symbols *symbols_load(const char *path, char *error, size_t error_size);

/* The number of symbols of that name; the first of them goes to *found */
size_t symbols_find(const struct symbols *symbols, const char *name,
		    const struct symbol **found);
/* The address of the only one of that name; 0 if there is none */
uint64_t symbols_address(const struct symbols *symbols, const char *name);
/* The last one at or below address, NULL if none */
const struct symbol *symbols_at(const struct symbols *symbols,
				uint64_t address);
/* By address */
const struct symbol *symbols_get(const struct symbols *symbols, size_t index);

/*
 * Finds the table a kernel (6.4 or later) has of its own symbols in a part of
 * its image; base is the address of its first byte.  text is an address that
 * is known to be in its code.
 * 1: found; 0: not there, or not all of it, more of the image may help;
 * -1: out of memory.
 */
int kallsyms_find(const uint8_t *image, size_t size, uint64_t base,
		  uint64_t text, size_t *scanned, struct symbols **symbols);

#endif
