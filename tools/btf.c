/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <linux/btf.h>

#include "btf.h"

/* vmlinux with all of its debug information */
#define FILE_MAX (2ull << 30)
/* Structures in structures, arrays of typedefs of ... */
#define DEPTH_MAX 16

struct btf {
	uint8_t *data;
	const uint8_t *types;
	const char *strings;
	uint32_t string_size;
	uint32_t *starts;	/* of type i + 1, from types on */
	uint32_t count;
};

static struct btf_type get_type(const struct btf *btf, uint32_t id)
{
	struct btf_type type = { 0 };

	if (id && id <= btf->count)
		memcpy(&type, btf->types + btf->starts[id - 1], sizeof(type));

	return type;
}

static const char *get_name(const struct btf *btf, uint32_t offset)
{
	return offset < btf->string_size ? btf->strings + offset : "";
}

/* What follows the struct btf_type */
static bool extra_size(const struct btf_type *type, size_t *size)
{
	size_t count = BTF_INFO_VLEN(type->info);

	switch (BTF_INFO_KIND(type->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		*size = 4;
		return true;
	case BTF_KIND_ARRAY:
		*size = sizeof(struct btf_array);
		return true;
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		*size = count * sizeof(struct btf_member);
		return true;
	case BTF_KIND_ENUM:
	case BTF_KIND_FUNC_PROTO:
		*size = count * 8;
		return true;
	case BTF_KIND_DATASEC:
	case BTF_KIND_ENUM64:
		*size = count * 12;
		return true;
	case BTF_KIND_PTR:
	case BTF_KIND_FWD:
	case BTF_KIND_TYPEDEF:
	case BTF_KIND_VOLATILE:
	case BTF_KIND_CONST:
	case BTF_KIND_RESTRICT:
	case BTF_KIND_FUNC:
	case BTF_KIND_FLOAT:
	case BTF_KIND_TYPE_TAG:
		*size = 0;
		return true;
	}

	return false;
}

static bool index_types(struct btf *btf, size_t size, char *error,
			size_t error_size)
{
	uint32_t capacity = 0;
	size_t at = 0, extra;

	while (at < size) {
		struct btf_type type;

		if (size - at < sizeof(type)) {
			snprintf(error, error_size, "BTF: the last type is cut");
			return false;
		}
		memcpy(&type, btf->types + at, sizeof(type));
		if (!extra_size(&type, &extra)) {
			snprintf(error, error_size, "BTF: type %u is of unknown kind %u",
				 btf->count + 1, BTF_INFO_KIND(type.info));
			return false;
		}
		if (size - at - sizeof(type) < extra) {
			snprintf(error, error_size, "BTF: the last type is cut");
			return false;
		}
		if (btf->count == capacity) {
			uint32_t *bigger;

			capacity = capacity ? 2 * capacity : 1024;
			bigger = realloc(btf->starts, capacity * sizeof(*bigger));
			if (!bigger) {
				snprintf(error, error_size, "out of memory");
				return false;
			}
			btf->starts = bigger;
		}
		btf->starts[btf->count++] = at;
		at += sizeof(type) + extra;
	}

	return true;
}

struct btf *btf_new(uint8_t *data, size_t size, char *error, size_t error_size)
{
	struct btf *btf = calloc(1, sizeof(*btf));
	struct btf_header header;
	size_t left;

	if (!btf) {
		free(data);
		snprintf(error, error_size, "out of memory");
		return NULL;
	}
	btf->data = data;
	if (size < sizeof(header) || size > BTF_MAX)
		goto bad;
	memcpy(&header, data, sizeof(header));
	if (header.magic != BTF_MAGIC || header.version != BTF_VERSION ||
	    header.hdr_len < sizeof(header) || header.hdr_len > size)
		goto bad;
	left = size - header.hdr_len;
	if (header.type_off % 4 || header.type_off > left ||
	    header.type_len > left - header.type_off ||
	    header.str_off > left || header.str_len > left - header.str_off)
		goto bad;
	btf->types = data + header.hdr_len + header.type_off;
	btf->strings = (const char *)data + header.hdr_len + header.str_off;
	btf->string_size = header.str_len;
	/* so that every string in there ends */
	if (!btf->string_size || btf->strings[btf->string_size - 1])
		goto bad;
	if (!index_types(btf, header.type_len, error, error_size)) {
		btf_free(btf);
		return NULL;
	}

	return btf;
bad:
	snprintf(error, error_size, "no BTF (type information of a kernel)");
	btf_free(btf);

	return NULL;
}

void btf_free(struct btf *btf)
{
	if (!btf)
		return;
	free(btf->data);
	free(btf->starts);
	free(btf);
}

/* ------------------------------------------------------------------------ */

static uint8_t *read_part(FILE *file, uint64_t offset, size_t size)
{
	uint8_t *data = malloc(size + 1);

	if (data && (fseeko(file, offset, SEEK_SET) ||
		     fread(data, 1, size, file) != size)) {
		free(data);
		data = NULL;
	}

	return data;
}

/* Where the section .BTF is in an ELF file */
static bool find_section(FILE *file, uint64_t file_size, uint64_t *offset,
			 uint64_t *size)
{
	char *names = NULL;
	bool found = false;
	Elf64_Shdr *sections = NULL, *strings;
	Elf64_Ehdr *elf;
	unsigned int i;

	elf = (Elf64_Ehdr *)read_part(file, 0, sizeof(*elf));
	if (!elf || memcmp(elf->e_ident, ELFMAG, SELFMAG) ||
	    elf->e_ident[EI_CLASS] != ELFCLASS64 ||
	    elf->e_shentsize != sizeof(Elf64_Shdr) ||
	    elf->e_shstrndx >= elf->e_shnum || elf->e_shoff > file_size)
		goto out;
	sections = (Elf64_Shdr *)read_part(file, elf->e_shoff,
					   elf->e_shnum * sizeof(*sections));
	if (!sections)
		goto out;
	strings = &sections[elf->e_shstrndx];
	if (strings->sh_offset > file_size || strings->sh_size > 1 << 20)
		goto out;
	names = (char *)read_part(file, strings->sh_offset, strings->sh_size);
	if (!names)
		goto out;
	names[strings->sh_size] = 0;
	for (i = 0; i < elf->e_shnum && !found; i++) {
		if (sections[i].sh_name >= strings->sh_size ||
		    strcmp(names + sections[i].sh_name, ".BTF"))
			continue;
		*offset = sections[i].sh_offset;
		*size = sections[i].sh_size;
		found = *offset <= file_size && *size <= file_size - *offset;
	}
out:
	free(names);
	free(sections);
	free(elf);

	return found;
}

struct btf *btf_load(const char *path, char *error, size_t error_size)
{
	FILE *file = fopen(path, "re");
	uint64_t offset = 0, size, file_size;
	uint8_t *data = NULL, *magic = NULL;
	struct btf *btf = NULL;
	char why[128];

	if (!file || fseeko(file, 0, SEEK_END)) {
		snprintf(error, error_size, "%s: %s", path, strerror(errno));
		goto out;
	}
	size = file_size = ftello(file);
	if (file_size > FILE_MAX || !(magic = read_part(file, 0, SELFMAG))) {
		snprintf(error, error_size, "%s: neither vmlinux nor BTF", path);
		goto out;
	}
	if (!memcmp(magic, ELFMAG, SELFMAG) &&
	    !find_section(file, file_size, &offset, &size)) {
		snprintf(error, error_size, "%s: has no section .BTF", path);
		goto out;
	}
	if (size <= BTF_MAX)
		data = read_part(file, offset, size);
	if (!data) {
		snprintf(error, error_size, "%s: cannot be read", path);
		goto out;
	}
	btf = btf_new(data, size, why, sizeof(why));
	if (!btf)
		snprintf(error, error_size, "%s: %s", path, why);
out:
	free(magic);
	if (file)
		fclose(file);

	return btf;
}

/* ------------------------------------------------------------------------ */

static uint32_t find_structure(const struct btf *btf, const char *name)
{
	uint32_t id;

	for (id = 1; id <= btf->count; id++) {
		struct btf_type type = get_type(btf, id);

		if (BTF_INFO_KIND(type.info) == BTF_KIND_STRUCT &&
		    !strcmp(get_name(btf, type.name_off), name))
			return id;
	}

	return 0;
}

uint32_t btf_size(const struct btf *btf, const char *structure)
{
	return get_type(btf, find_structure(btf, structure)).size;
}

static uint32_t size_of(const struct btf *btf, uint32_t id)
{
	uint64_t factor = 1;
	int depth;

	for (depth = 0; depth < DEPTH_MAX; depth++) {
		struct btf_type type = get_type(btf, id);
		struct btf_array array;

		switch (BTF_INFO_KIND(type.info)) {
		case BTF_KIND_PTR:
			factor *= 8;
			return factor > UINT32_MAX ? 0 : factor;
		case BTF_KIND_INT:
		case BTF_KIND_STRUCT:
		case BTF_KIND_UNION:
		case BTF_KIND_ENUM:
		case BTF_KIND_ENUM64:
		case BTF_KIND_FLOAT:
			factor *= type.size;
			return factor > UINT32_MAX ? 0 : factor;
		case BTF_KIND_ARRAY:
			memcpy(&array, btf->types + btf->starts[id - 1] +
			       sizeof(type), sizeof(array));
			factor *= array.nelems;
			if (factor > UINT32_MAX)
				return 0;
			id = array.type;
			break;
		case BTF_KIND_TYPEDEF:
		case BTF_KIND_CONST:
		case BTF_KIND_VOLATILE:
		case BTF_KIND_RESTRICT:
		case BTF_KIND_TYPE_TAG:
			id = type.type;
			break;
		default:
			return 0;
		}
	}

	return 0;
}

/*
 * budget: of structures to look into, for a file made to have us look into
 * millions
 */
static bool find_in(const struct btf *btf, uint32_t id, const char *name,
		    unsigned int depth, unsigned int *budget, uint64_t base,
		    struct btf_field *found)
{
	struct btf_type type = get_type(btf, id);
	unsigned int kind = BTF_INFO_KIND(type.info), i;
	bool has_bits = BTF_INFO_KFLAG(type.info);

	if ((kind != BTF_KIND_STRUCT && kind != BTF_KIND_UNION) || !depth ||
	    !*budget)
		return false;
	--*budget;
	for (i = 0; i < BTF_INFO_VLEN(type.info); i++) {
		struct btf_member member;
		uint32_t bit;

		memcpy(&member, btf->types + btf->starts[id - 1] +
		       sizeof(type) + i * sizeof(member), sizeof(member));
		bit = has_bits ? BTF_MEMBER_BIT_OFFSET(member.offset) :
				 member.offset;
		if (!*get_name(btf, member.name_off)) {
			if (find_in(btf, member.type, name, depth - 1, budget,
				    base + bit / 8, found))
				return true;
		} else if (!strcmp(get_name(btf, member.name_off), name)) {
			if ((has_bits && BTF_MEMBER_BITFIELD_SIZE(member.offset)) ||
			    bit % 8 || base + bit / 8 > UINT32_MAX)
				return false;
			found->offset = base + bit / 8;
			found->size = size_of(btf, member.type);
			return true;
		}
	}

	return false;
}

bool btf_find_member(const struct btf *btf, const char *structure,
		     const char *member, struct btf_field *found)
{
	unsigned int budget = 4096;

	return find_in(btf, find_structure(btf, structure), member, DEPTH_MAX,
		       &budget, 0, found);
}
