/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The reader of a kernel's types */

#include <string.h>

#include <elf.h>
#include <glib.h>
#include <glib/gstdio.h>

#include "btf.h"
#include "btf-maker.h"

/*
 * struct task {			// 64 bytes
 *	int flags;
 *	const counter_t counter;	// a typedef of struct { int; }
 *	union { struct list list; struct task *next; };		// at 16
 *	char comm[16];			// at 32
 *	int bit : 1;			// at 48
 * };
 */
static GByteArray *make(void)
{
	struct btf_array array = { .type = 2, .index_type = 1, .nelems = 16 };
	struct maker m = maker_new();
	uint32_t word = 0;

	add(&m, "int", BTF_KIND_INT, 0, false, 4);			/* 1 */
	g_byte_array_append(m.types, (uint8_t *)&word, 4);
	add(&m, "char", BTF_KIND_INT, 0, false, 1);			/* 2 */
	g_byte_array_append(m.types, (uint8_t *)&word, 4);
	add(&m, NULL, BTF_KIND_ARRAY, 0, false, 0);			/* 3 */
	g_byte_array_append(m.types, (uint8_t *)&array, sizeof(array));
	add(&m, NULL, BTF_KIND_PTR, 0, false, 11);			/* 4 */
	add(&m, "list", BTF_KIND_STRUCT, 2, false, 16);			/* 5 */
	add_member(&m, "next", 4, 0);
	add_member(&m, "prev", 4, 64);
	add(&m, "counter", BTF_KIND_STRUCT, 1, false, 4);		/* 6 */
	add_member(&m, "value", 1, 0);
	add(&m, "counter_t", BTF_KIND_TYPEDEF, 0, false, 6);		/* 7 */
	add(&m, NULL, BTF_KIND_CONST, 0, false, 7);			/* 8 */
	add(&m, NULL, BTF_KIND_UNION, 2, false, 16);			/* 9 */
	add_member(&m, "list", 5, 0);
	add_member(&m, "link", 4, 0);
	add(&m, "task", BTF_KIND_FWD, 0, false, 0);			/* 10 */
	add(&m, "task", BTF_KIND_STRUCT, 5, true, 64);			/* 11 */
	add_member(&m, "flags", 1, 0);
	add_member(&m, "counter", 8, 4 * 8);
	add_member(&m, NULL, 9, 16 * 8);
	add_member(&m, "comm", 3, 32 * 8);
	add_member(&m, "bit", 1, 1 << 24 | 48 * 8);
	/* one that has itself inside, which no compiler makes */
	add(&m, "loop", BTF_KIND_STRUCT, 2, false, 8);			/* 12 */
	add_member(&m, NULL, 12, 0);
	add_member(&m, NULL, 12, 0);
	add(&m, "loop_t", BTF_KIND_TYPEDEF, 0, false, 13);		/* 13 */
	add(&m, "user", BTF_KIND_STRUCT, 1, false, 8);			/* 14 */
	add_member(&m, "loop", 13, 0);

	return maker_end(&m);
}

/* In memory of its own size: an address sanitizer sees any step beyond */
static struct btf *parse(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);
	char error[256] = "";
	struct btf *btf;

	memcpy(copy, data, size);
	btf = btf_new(copy, size, error, sizeof(error));
	g_assert_true(btf || *error);

	return btf;
}

static void check(const struct btf *btf, const char *structure,
		  const char *member, uint32_t offset, uint32_t size)
{
	struct btf_field field;

	g_assert_true(btf_find_member(btf, structure, member, &field));
	g_assert_cmpint(field.offset, ==, offset);
	g_assert_cmpint(field.size, ==, size);
}

static void test_members(void)
{
	g_autoptr(GByteArray) data = make();
	struct btf *btf = parse(data->data, data->len);
	struct btf_field field;

	g_assert_nonnull(btf);
	check(btf, "task", "flags", 0, 4);
	check(btf, "task", "counter", 4, 4);
	check(btf, "task", "list", 16, 16);
	check(btf, "task", "link", 16, 8);
	check(btf, "task", "comm", 32, 16);
	check(btf, "list", "prev", 8, 8);
	g_assert_cmpint(btf_size(btf, "task"), ==, 64);
	g_assert_cmpint(btf_size(btf, "nothing"), ==, 0);
	g_assert_false(btf_find_member(btf, "task", "bit", &field));
	g_assert_false(btf_find_member(btf, "task", "next", &field));
	g_assert_false(btf_find_member(btf, "nothing", "flags", &field));
	/* those that could go on for ever */
	g_assert_false(btf_find_member(btf, "loop", "flags", &field));
	check(btf, "user", "loop", 0, 0);
	btf_free(btf);
}

/* Cut anywhere, with any bit changed: an error or an answer, nothing worse */
static void test_broken(void)
{
	static const char *const names[] = {
		"task", "list", "loop", "user", "counter", ""
	};
	g_autoptr(GByteArray) data = make();
	struct btf_field field;
	struct btf *btf;
	size_t i, j, k;

	for (i = 0; i < data->len; i++) {
		btf = parse(data->data, i);
		g_assert_null(btf);
	}
	for (i = 0; i < data->len; i++) {
		for (j = 1; j < 256; j *= 2) {
			data->data[i] ^= j;
			btf = parse(data->data, data->len);
			for (k = 0; btf && k < G_N_ELEMENTS(names); k++) {
				btf_find_member(btf, names[k], "comm", &field);
				btf_find_member(btf, names[k], "loop", &field);
				btf_size(btf, names[k]);
			}
			btf_free(btf);
			data->data[i] ^= j;
		}
	}
}

static void test_file(void)
{
	static const char names[] = "\0.text\0.BTF\0.shstrtab";
	g_autoptr(GByteArray) data = make(), elf = g_byte_array_new();
	g_autofree char *name = NULL;
	int fd = g_file_open_tmp("kvmi-XXXXXX", &name, NULL);
	Elf64_Ehdr header = {
		.e_ident = { 0x7f, 'E', 'L', 'F', ELFCLASS64 },
		.e_shentsize = sizeof(Elf64_Shdr), .e_shnum = 3,
		.e_shstrndx = 2,
	};
	Elf64_Shdr sections[3] = {
		{ 0 },
		{ .sh_name = 7, .sh_offset = sizeof(header),
		  .sh_size = data->len },
		{ .sh_name = 12, .sh_offset = sizeof(header) + data->len,
		  .sh_size = sizeof(names) },
	};
	struct btf *btf;
	char error[512];

	g_assert_cmpint(fd, >=, 0);
	g_close(fd, NULL);

	g_file_set_contents(name, (char *)data->data, data->len, NULL);
	btf = btf_load(name, error, sizeof(error));
	g_assert_nonnull(btf);
	check(btf, "task", "comm", 32, 16);
	btf_free(btf);

	header.e_shoff = sizeof(header) + data->len + sizeof(names);
	g_byte_array_append(elf, (uint8_t *)&header, sizeof(header));
	g_byte_array_append(elf, data->data, data->len);
	g_byte_array_append(elf, (uint8_t *)names, sizeof(names));
	g_byte_array_append(elf, (uint8_t *)sections, sizeof(sections));
	g_file_set_contents(name, (char *)elf->data, elf->len, NULL);
	btf = btf_load(name, error, sizeof(error));
	g_assert_nonnull(btf);
	check(btf, "task", "comm", 32, 16);
	btf_free(btf);

	/* a section that ends beyond the file */
	g_file_set_contents(name, (char *)elf->data, elf->len - 1, NULL);
	g_assert_null(btf_load(name, error, sizeof(error)));
	g_file_set_contents(name, "", 0, NULL);
	g_assert_null(btf_load(name, error, sizeof(error)));
	g_assert_nonnull(strstr(error, "neither vmlinux nor BTF"));
	g_unlink(name);
	g_assert_null(btf_load(name, error, sizeof(error)));
	g_assert_nonnull(strstr(error, "No such file"));
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/btf/members", test_members);
	g_test_add_func("/btf/broken", test_broken);
	g_test_add_func("/btf/file", test_file);

	return g_test_run();
}
