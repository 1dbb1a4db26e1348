/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef BTF_H
#define BTF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * A kernel's types (BTF), which say where a structure has its members.
 *
 * Why not libbpf: it takes BTF from a kernel that it trusts, whereas this is
 * read from the memory of a guest.  All that is needed is small.
 */

/* More than any kernel has: 5 MiB is usual */
#define BTF_MAX (32u << 20)

struct btf;

struct btf_field {
	uint32_t offset;	/* in bytes */
	uint32_t size;		/* in bytes; of all elements of an array */
};

/* Copies nothing: data is free()d by btf_free(), and on failure at once */
struct btf *btf_new(uint8_t *data, size_t size, char *error, size_t error_size);
/* vmlinux (ELF with a section .BTF) or plain BTF */
struct btf *btf_load(const char *path, char *error, size_t error_size);
void btf_free(struct btf *btf);

/* 0 if there is no such structure */
uint32_t btf_size(const struct btf *btf, const char *structure);
/*
 * Also those of unnamed structures and unions inside.  false if there is no
 * such member, or if it is a bit-field.
 */
bool btf_find_member(const struct btf *btf, const char *structure,
		     const char *member, struct btf_field *found);

#endif
