/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef BTF_MAKER_H
#define BTF_MAKER_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include <glib.h>
#include <linux/btf.h>

/* Makes BTF by hand.  Types are counted from 1, as they are added. */

struct maker {
	GByteArray *types;
	GString *strings;
};

G_GNUC_UNUSED static void add(struct maker *m, const char *name, unsigned int kind,
		unsigned int vlen, bool bits, uint32_t size_or_type)
{
	struct btf_type type = {
		.name_off = name ? m->strings->len : 0,
		.info = kind << 24 | vlen | (bits ? 1u << 31 : 0),
		.size = size_or_type,
	};

	if (name)
		g_string_append_len(m->strings, name, strlen(name) + 1);
	g_byte_array_append(m->types, (uint8_t *)&type, sizeof(type));
}

static void add_member(struct maker *m, const char *name, uint32_t type,
		       uint32_t offset)
{
	struct btf_member member = {
		.name_off = name ? m->strings->len : 0,
		.type = type, .offset = offset,
	};

	if (name)
		g_string_append_len(m->strings, name, strlen(name) + 1);
	g_byte_array_append(m->types, (uint8_t *)&member, sizeof(member));
}

static struct maker maker_new(void)
{
	struct maker m = { g_byte_array_new(), g_string_new("") };

	g_string_append_len(m.strings, "", 1);

	return m;
}

/* Frees the maker */
static GByteArray *maker_end(struct maker *m)
{
	struct btf_header header = {
		.magic = BTF_MAGIC, .version = BTF_VERSION,
		.hdr_len = sizeof(header),
		.type_len = m->types->len, .str_off = m->types->len,
		.str_len = m->strings->len,
	};
	GByteArray *all = g_byte_array_new();

	g_byte_array_append(all, (uint8_t *)&header, sizeof(header));
	g_byte_array_append(all, m->types->data, m->types->len);
	g_byte_array_append(all, (uint8_t *)m->strings->str, m->strings->len);
	g_byte_array_free(m->types, TRUE);
	g_string_free(m->strings, TRUE);

	return all;
}

#endif
