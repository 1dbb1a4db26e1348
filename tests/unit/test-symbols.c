/* SPDX-License-Identifier: GPL-2.0-or-later */
/* System.map and the kernel's own symbol table */

#include <string.h>

#include <glib.h>
#include <glib/gstdio.h>

#include "symbols.h"

static struct symbols *load(const char *text, char *error)
{
	g_autofree char *name = NULL;
	struct symbols *symbols;
	int fd = g_file_open_tmp("kvmi-XXXXXX", &name, NULL);

	g_assert_cmpint(fd, >=, 0);
	g_close(fd, NULL);
	g_assert_true(g_file_set_contents(name, text, -1, NULL));
	symbols = symbols_load(name, error, 512);
	g_unlink(name);

	return symbols;
}

static GString *many(unsigned int count, uint64_t base)
{
	GString *text = g_string_new("");
	unsigned int i;

	for (i = 0; i < count; i++)
		g_string_append_printf(text, "%016" G_GINT64_MODIFIER
				       "x t function_%u\n", base + 16 * i, i);

	return text;
}

static void test_map(void)
{
	GString *text = many(2000, 0xffffffff81000000);
	const struct symbol *symbol;
	struct symbols *symbols;
	char error[512];

	g_string_append(text, "ffffffff81100000 T twice\n"
			"ffffffff81200000 t twice\n"
			"ffffffffc0000000 t in_module\t[module]\n"
			"0000000000000000 A zero\n"
			"ffffffff81300000 D data\n");
	symbols = load(text->str, error);
	g_assert_nonnull(symbols);
	g_assert_cmpint(symbols_count(symbols), ==, 2005);
	g_assert_cmpint(symbols_find(symbols, "function_7", &symbol), ==, 1);
	g_assert_cmphex(symbol->address, ==, 0xffffffff81000070);
	g_assert_cmpint(symbol->type, ==, 't');
	g_assert_cmpint(symbols_find(symbols, "twice", &symbol), ==, 2);
	g_assert_cmpint(symbols_find(symbols, "function_", NULL), ==, 0);
	g_assert_cmpint(symbols_find(symbols, "in_module", &symbol), ==, 1);
	g_assert_cmphex(symbols_address(symbols, "data"), ==,
			0xffffffff81300000);
	g_assert_cmphex(symbols_address(symbols, "twice"), ==, 0);
	g_assert_cmphex(symbols_address(symbols, "none"), ==, 0);
	g_assert_cmpstr(symbols_at(symbols, 0xffffffff8100007f)->name, ==,
			"function_7");
	g_assert_cmpstr(symbols_at(symbols, 5)->name, ==, "zero");
	g_assert_null(symbols_get(symbols, 2005));
	symbols_free(symbols);
	g_string_free(text, true);
}

static void refused(const char *text, const char *expected)
{
	char error[512] = "";

	g_assert_null(load(text, error));
	g_test_message("%s", error);
	g_assert_nonnull(strstr(error, expected));
}

static void test_bad_maps(void)
{
	GString *zero = g_string_new("");
	unsigned int i;
	char error[512];

	for (i = 0; i < 2000; i++)
		g_string_append_printf(zero, "0000000000000000 t f%u\n", i);

	refused("", "symbols");
	refused("ffffffff81000000 T _text\n", "only 1 symbols");
	refused("hello\n", "line 1");
	refused("ffffffff81000000 T _text\n\n", "line 2");
	refused("ffffffff81000000T_text\n", "line 1");
	refused("ffffffff81000000 T \n", "line 1");
	refused("\177ELF\1\2\3", "line 1");
	refused("ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n",
		"placeholder");
	refused(zero->str, "kptr_restrict");
	g_assert_null(symbols_load("/nonexistent/map", error, sizeof(error)));
	g_assert_nonnull(strstr(error, "No such file"));
	g_string_free(zero, true);
}

/* ------------------------------------------------------------------------
 * A table as scripts/kallsyms of the kernel makes it, only that the tokens are
 * the characters themselves and a few pairs
 */

#define BASE 0xffffffff9a000000ULL
#define COUNT 1500

static void align(GByteArray *image)
{
	static const uint8_t zeroes[8];

	g_byte_array_append(image, zeroes, -image->len & 7);
}

static void append32(GByteArray *image, uint32_t value)
{
	g_byte_array_append(image, (uint8_t *)&value, 4);
}

static GByteArray *make_table(bool per_cpu, unsigned int long_name)
{
	GByteArray *image = g_byte_array_new();
	GByteArray *markers = g_byte_array_new();
	uint16_t index[256];
	uint64_t base = BASE;
	unsigned int i, start, off;

	/* something before it, which looks a bit like it */
	for (i = 0; i < 5000; i++)
		g_byte_array_append(image, (uint8_t *)"code", 4);
	g_byte_array_append(image, (uint8_t *)"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0x", 21);
	align(image);

	append32(image, COUNT);
	align(image);
	start = image->len;
	for (i = 0; i < COUNT; i++) {
		g_autofree char *name = i == 0 ? g_strdup("T_stext") :
			i == COUNT - 1 ? g_strdup("T_etext") :
			i == 9 ? g_strdup_printf("t%0*d", long_name, 0) :
			g_strdup_printf("tfunction_%u", i);
		size_t length = strlen(name);
		uint8_t sizes[2] = { (length & 0x7f) | 0x80, length >> 7 };

		if (i % 256 == 0)
			append32(markers, image->len - start);
		if (length > 0x7f) {
			g_byte_array_append(image, sizes, 2);
		} else {
			sizes[0] = length;
			g_byte_array_append(image, sizes, 1);
		}
		g_byte_array_append(image, (uint8_t *)name, length);
	}
	align(image);
	g_byte_array_append(image, markers->data, markers->len);
	align(image);
	for (i = off = 0; i < 256; i++) {
		char token[4] = { i, 0 };

		/* what no name uses stands for pairs */
		if (i < '0' || i >= 0x7f)
			strcpy(token, "zz");
		index[i] = off;
		off += strlen(token) + 1;
		g_byte_array_append(image, (uint8_t *)token, strlen(token) + 1);
	}
	align(image);
	g_byte_array_append(image, (uint8_t *)index, sizeof(index));
	align(image);
	for (i = 0; i < COUNT; i++)
		append32(image, per_cpu ? (i == 5 ? 0x42 : -1 - 64 * i) :
					  64 * i);
	align(image);
	g_byte_array_append(image, (uint8_t *)&base, 8);
	g_byte_array_append(image, (uint8_t *)"and more", 8);
	g_byte_array_unref(markers);

	return image;
}

static void check_table(bool per_cpu, unsigned int long_name)
{
	GByteArray *image = make_table(per_cpu, long_name);
	struct symbols *symbols = NULL;
	const struct symbol *symbol;
	size_t scanned = 0;

	g_assert_cmpint(kallsyms_find(image->data, image->len, BASE - 0x100,
				      BASE + 0x40, &scanned, &symbols), ==, 1);
	g_assert_cmpint(symbols_count(symbols), ==, COUNT);
	g_assert_cmphex(symbols_address(symbols, "_stext"), ==, BASE);
	g_assert_cmphex(symbols_address(symbols, "function_77"), ==,
			BASE + 64 * 77);
	g_assert_cmpint(symbols_find(symbols, "function_5", &symbol), ==, 1);
	g_assert_cmphex(symbol->address, ==, per_cpu ? 0x42 : BASE + 64 * 5);
	symbols_free(symbols);
	g_byte_array_unref(image);
}

static void test_kallsyms(void)
{
	check_table(false, 10);
	check_table(true, 10);
	/* lengths of two bytes */
	check_table(true, 0x7e);
	check_table(true, 0x7f);
	check_table(true, 400);
}

/* It comes in pieces */
static void test_kallsyms_growing(void)
{
	GByteArray *image = make_table(true, 10);
	struct symbols *symbols = NULL;
	size_t scanned = 0, size;
	int found = 0;

	for (size = 0; size <= image->len && !found; size += 777) {
		/* so that a sanitizer sees reading beyond the end */
		g_autofree uint8_t *copy = g_memdup2(image->data, size);

		found = kallsyms_find(copy, size, BASE - 0x100, BASE + 0x40,
				      &scanned, &symbols);
	}
	if (!found)
		found = kallsyms_find(image->data, image->len, BASE - 0x100,
				      BASE + 0x40, &scanned, &symbols);
	g_assert_cmpint(found, ==, 1);
	symbols_free(symbols);
	g_byte_array_unref(image);
}

/* A guest may put anything there */
static void test_kallsyms_broken(void)
{
	GByteArray *image = make_table(true, 300);
	unsigned int i;

	for (i = 0; i < 3000; i++) {
		g_autofree uint8_t *copy = g_memdup2(image->data, image->len);
		struct symbols *symbols = NULL;
		size_t scanned = 0, j;
		int result;

		for (j = 0; j < 3; j++)
			copy[g_test_rand_int_range(20000, image->len)] =
				g_test_rand_int();
		result = kallsyms_find(copy, image->len, BASE - 0x100,
				       BASE + 0x40, &scanned, &symbols);
		g_assert_cmpint(result, >=, 0);
		if (result)
			symbols_free(symbols);
		g_assert_cmpint(scanned, <=, image->len);
	}
	/* cut at the end */
	for (i = 20000; i < image->len; i += 97) {
		g_autofree uint8_t *copy = g_memdup2(image->data, i);
		struct symbols *symbols = NULL;
		size_t scanned = 0;

		if (kallsyms_find(copy, i, BASE - 0x100, BASE + 0x40, &scanned,
				  &symbols) == 1)
			symbols_free(symbols);
	}
	g_byte_array_unref(image);
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/symbols/map", test_map);
	g_test_add_func("/symbols/bad-maps", test_bad_maps);
	g_test_add_func("/symbols/kallsyms", test_kallsyms);
	g_test_add_func("/symbols/kallsyms-growing", test_kallsyms_growing);
	g_test_add_func("/symbols/kallsyms-broken", test_kallsyms_broken);

	return g_test_run();
}
