/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "symbols.h"

/* A real kernel has more than that */
#define PLAUSIBLE_COUNT 1000

struct symbols {
	struct symbol *list;	/* by address, after symbols_sort() */
	/* chains of those whose names have the same hash, by address, too */
	uint32_t *heads;
	uint32_t *next;
	uint32_t mask;
	size_t count;
	size_t capacity;
	/* names, in chunks that do not move */
	char *chunk;
	size_t chunk_left;
	char **chunks;
	size_t chunk_count;
};

#define CHUNK_SIZE (256 * 1024)

struct symbols *symbols_new(void)
{
	return calloc(1, sizeof(struct symbols));
}

void symbols_free(struct symbols *symbols)
{
	size_t i;

	if (!symbols)
		return;
	for (i = 0; i < symbols->chunk_count; i++)
		free(symbols->chunks[i]);
	free(symbols->chunks);
	free(symbols->list);
	free(symbols->heads);
	free(symbols->next);
	free(symbols);
}

int symbols_add(struct symbols *symbols, uint64_t address, char type,
		const char *name, size_t name_length)
{
	if (name_length >= CHUNK_SIZE)
		return -1;
	if (symbols->chunk_left <= name_length) {
		char **chunks = realloc(symbols->chunks,
					(symbols->chunk_count + 1) *
					sizeof(*chunks));

		if (!chunks)
			return -1;
		symbols->chunks = chunks;
		symbols->chunk = malloc(CHUNK_SIZE);
		if (!symbols->chunk) {
			symbols->chunk_left = 0;
			return -1;
		}
		chunks[symbols->chunk_count++] = symbols->chunk;
		symbols->chunk_left = CHUNK_SIZE;
	}
	if (symbols->count == symbols->capacity) {
		size_t capacity = 2 * symbols->capacity + 1024;
		struct symbol *list = realloc(symbols->list,
					      capacity * sizeof(*list));

		if (!list)
			return -1;
		symbols->list = list;
		symbols->capacity = capacity;
	}

	memcpy(symbols->chunk, name, name_length);
	symbols->chunk[name_length] = 0;
	symbols->list[symbols->count++] = (struct symbol){
		.address = address, .type = type, .name = symbols->chunk,
	};
	symbols->chunk += name_length + 1;
	symbols->chunk_left -= name_length + 1;

	return 0;
}

static int compare_addresses(const void *left, const void *right)
{
	const struct symbol *a = left, *b = right;

	return (a->address > b->address) - (a->address < b->address);
}

static uint32_t hash(const char *name)
{
	uint32_t h = 5381;

	while (*name)
		h = 33 * h + (unsigned char)*name++;

	return h;
}

#define CHAIN_END UINT32_MAX

/* A kernel has some 200 000 symbols, in order as a rule; a tool that starts does hardly anything else */
int symbols_sort(struct symbols *symbols)
{
	size_t heads = 1, i;

	for (i = 1; i < symbols->count; i++)
		if (symbols->list[i - 1].address > symbols->list[i].address)
			break;
	if (i < symbols->count)
		qsort(symbols->list, symbols->count, sizeof(struct symbol),
		      compare_addresses);

	while (heads < symbols->count)
		heads *= 2;
	free(symbols->heads);
	free(symbols->next);
	symbols->heads = malloc(heads * sizeof(uint32_t));
	symbols->next = malloc(symbols->count * sizeof(uint32_t) + 1);
	if (!symbols->heads || !symbols->next)
		return -1;
	symbols->mask = heads - 1;
	memset(symbols->heads, 0xff, heads * sizeof(uint32_t));
	for (i = symbols->count; i--; ) {
		uint32_t *head = &symbols->heads[hash(symbols->list[i].name) &
						 symbols->mask];

		symbols->next[i] = *head;
		*head = i;
	}

	return 0;
}

size_t symbols_count(const struct symbols *symbols)
{
	return symbols->count;
}

struct symbols *symbols_load(const char *path, char *error, size_t error_size)
{
	struct symbols *symbols = NULL;
	unsigned long number = 0;
	bool all_zero = true;
	size_t capacity = 0;
	char *line = NULL;
	ssize_t length;
	FILE *file;

	file = fopen(path, "re");
	if (!file) {
		snprintf(error, error_size, "%s: %s", path, strerror(errno));
		return NULL;
	}
	symbols = symbols_new();
	if (!symbols)
		goto no_memory;

	errno = 0;
	while ((length = getline(&line, &capacity, file)) >= 0) {
		uint64_t address = 0;
		const char *name;
		char *end = line;
		char type;

		number++;
		if (length && line[length - 1] == '\n')
			line[--length] = 0;
		/* "ffffffff81000000 T _stext", maybe with a module's name */
		for (; isxdigit((unsigned char)*end); end++)
			address = address << 4 | ((*end & 0xf) + (*end > '9' ? 9 : 0));
		if (end == line || end[0] != ' ' || !end[1] || end[2] != ' ')
			goto no_map;
		type = end[1];
		name = end + 3;
		if (number == 1 && strstr(name, "The real System.map is in")) {
			snprintf(error, error_size,
				 "%s is only a placeholder; leave it out, the symbols are in the guest's memory, too",
				 path);
			goto failed;
		}
		length = strcspn(name, " \t\r");
		if (!length)
			goto no_map;
		if (address)
			all_zero = false;
		if (symbols_add(symbols, address, type, name, length))
			goto no_memory;
		errno = 0;
	}
	if (ferror(file)) {
		snprintf(error, error_size, "%s: %s", path, strerror(errno));
		goto failed;
	}
	if (symbols->count && all_zero) {
		snprintf(error, error_size,
			 "%s: all addresses are 0; /proc/kallsyms must be read by root, with kernel.kptr_restrict=0 or 1",
			 path);
		goto failed;
	}
	if (symbols->count < PLAUSIBLE_COUNT) {
		snprintf(error, error_size,
			 "%s has only %zu symbols; this is not the System.map of a whole kernel",
			 path, symbols->count);
		goto failed;
	}
	if (symbols_sort(symbols))
		goto no_memory;
	free(line);
	fclose(file);

	return symbols;

no_map:
	snprintf(error, error_size,
		 "%s, line %lu: not a line of a System.map (\"ffffffff81000000 T name\")",
		 path, number);
	goto failed;
no_memory:
	snprintf(error, error_size, "%s: out of memory", path);
failed:
	free(line);
	fclose(file);
	symbols_free(symbols);

	return NULL;
}

size_t symbols_find(const struct symbols *symbols, const char *name,
		    const struct symbol **found)
{
	size_t count = 0;
	uint32_t i;

	if (!symbols->heads)
		return 0;
	for (i = symbols->heads[hash(name) & symbols->mask]; i != CHAIN_END;
	     i = symbols->next[i]) {
		if (strcmp(symbols->list[i].name, name))
			continue;
		if (!count++ && found)
			*found = &symbols->list[i];
	}

	return count;
}

uint64_t symbols_address(const struct symbols *symbols, const char *name)
{
	const struct symbol *symbol;

	return symbols_find(symbols, name, &symbol) == 1 ? symbol->address : 0;
}

const struct symbol *symbols_at(const struct symbols *symbols, uint64_t address)
{
	size_t low = 0, high = symbols->count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (symbols->list[middle].address <= address)
			low = middle + 1;
		else
			high = middle;
	}

	return low ? &symbols->list[low - 1] : NULL;
}

const struct symbol *symbols_get(const struct symbols *symbols, size_t index)
{
	return index < symbols->count ? &symbols->list[index] : NULL;
}

/* ------------------------------------------------------------------------
 * The kernel's own table
 *
 * It lies in .rodata, each part aligned to 8 bytes, in this order:
 *
 *	num_syms	u32
 *	names		num_syms times: length (1 or 2 bytes), that many tokens;
 *			the first character is the type
 *	markers		u32 for each 256 symbols: where they begin in names
 *	token_table	256 strings
 *	token_index	256 times u16: where they begin in token_table
 *	offsets		num_syms times s32
 *	relative_base	u64
 *
 * Characters that are used in names stand for themselves, so the strings for
 * '0' to '9' are a pattern that can be searched for.
 */

#define TOKENS 256
#define MAX_TOKEN_TABLE 8192
#define MAX_SYMBOLS (4 * 1024 * 1024)
#define MAX_NAME 1024

static uint16_t get16(const uint8_t *from)
{
	uint16_t value;

	memcpy(&value, from, sizeof(value));

	return value;
}

static uint32_t get32(const uint8_t *from)
{
	uint32_t value;

	memcpy(&value, from, sizeof(value));

	return value;
}

static uint64_t get64(const uint8_t *from)
{
	uint64_t value;

	memcpy(&value, from, sizeof(value));

	return value;
}

static size_t align8(size_t offset)
{
	return (offset + 7) & ~(size_t)7;
}

struct table {
	const uint8_t *image;
	size_t size;
	size_t names;
	size_t names_end;	/* = markers */
	size_t marker_count;
	size_t tokens;
	size_t index;
	size_t offsets;
	uint32_t count;
};

/*
 * digits is where "0" is.  1: a token table and its index are there; 0: no;
 * -1: the image ends too early.
 */
static int find_tokens(struct table *table, size_t digits)
{
	const uint8_t *image = table->image;
	size_t end = digits, i;

	/* from '0' on to the end of the table */
	for (i = '0'; i < TOKENS; i++) {
		const uint8_t *zero;

		if (end >= table->size)
			return -1;
		zero = memchr(image + end, 0, table->size - end);
		if (!zero)
			return -1;
		end = zero - image + 1;
		if (end - digits > MAX_TOKEN_TABLE)
			return 0;
	}
	table->index = align8(end);
	if (table->index + 2 * TOKENS > table->size)
		return -1;

	if (get16(image + table->index) != 0 ||
	    get16(image + table->index + 2 * '0') > digits)
		return 0;
	table->tokens = digits - get16(image + table->index + 2 * '0');
	for (i = 0; i < TOKENS; i++) {
		size_t begin = table->tokens + get16(image + table->index + 2 * i);
		size_t next = i + 1 < TOKENS ? table->tokens +
			get16(image + table->index + 2 * (i + 1)) : end;

		if (begin >= next || next > end ||
		    strnlen((const char *)image + begin, next - begin) + 1 !=
		    next - begin)
			return 0;
	}

	return 1;
}

/* The markers end where the tokens begin; they rise from 0 */
static bool find_markers(struct table *table)
{
	size_t at = table->tokens;
	uint32_t above;

	table->marker_count = 0;
	if (at % 8 || at < 16)
		return false;
	at -= 4;
	if (!get32(table->image + at))	/* filled up to 8 bytes */
		at -= 4;
	above = UINT32_MAX;
	for (;;) {
		uint32_t marker = get32(table->image + at);

		/* 256 names have at least two bytes each */
		if (marker >= above ||
		    (above != UINT32_MAX && above - marker < 512))
			return false;
		table->marker_count++;
		if (!marker)
			break;
		if (at < 4 || table->marker_count > MAX_SYMBOLS / 256)
			return false;
		above = marker;
		at -= 4;
	}
	table->names_end = at;

	return at % 8 == 0;
}

/* Where the name after that at `at' begins; 0 if out of bounds */
static size_t skip_name(const struct table *table, size_t at)
{
	size_t length;

	if (at >= table->names_end)
		return 0;
	length = table->image[at++];
	if (length & 0x80) {
		if (at >= table->names_end)
			return 0;
		length = (length & 0x7f) | (size_t)table->image[at++] << 7;
	}
	at += length;

	return length && at <= table->names_end ? at : 0;
}

/*
 * The names end, but for the alignment, where the markers begin; the last
 * marker tells about how long they are.
 */
static bool find_names(struct table *table)
{
	const uint8_t *image = table->image;
	uint32_t last = get32(image + table->names_end +
			      4 * (table->marker_count - 1));
	size_t least = last + 2 + 8, back;

	for (back = align8(least);
	     back < (size_t)last + 256 * MAX_NAME && back <= table->names_end;
	     back += 8) {
		size_t start = table->names_end - back, at;
		uint32_t count = get32(image + start), i;

		if (get32(image + start + 4) ||
		    (count + 255) / 256 != table->marker_count)
			continue;
		table->names = start + 8;
		table->count = count;

		/* does everything fit? */
		at = table->names;
		for (i = 0; i < count && at; i++) {
			if (i % 256 == 0 &&
			    at - table->names != get32(image + table->names_end +
						       4 * (i / 256)))
				break;
			at = skip_name(table, at);
		}
		if (i == count && at && align8(at) == table->names_end)
			return true;
	}

	return false;
}

static struct symbols *read_table(const struct table *table, bool *no_memory)
{
	const uint8_t *image = table->image;
	uint64_t base = get64(image + align8(table->offsets + 4 * table->count));
	struct symbols *symbols = symbols_new();
	bool per_cpu = false;
	size_t at = table->names;
	uint32_t i;

	if (!symbols)
		goto no_memory;

	/*
	 * Either all offsets are relative to base, or negative ones are (with
	 * the sign changed) and the others are absolute.
	 */
	for (i = 0; i < table->count && !per_cpu; i++)
		per_cpu = get32(image + table->offsets + 4 * i) >> 31;

	for (i = 0; i < table->count; i++) {
		int32_t offset = get32(image + table->offsets + 4 * i);
		size_t next = skip_name(table, at);
		char name[MAX_NAME];
		size_t length = 0;
		uint64_t address;

		at += image[at] & 0x80 ? 2 : 1;
		for (; at < next; at++) {
			const char *token = (const char *)image + table->tokens +
				get16(image + table->index + 2 * image[at]);

			while (*token && length < sizeof(name) - 1)
				name[length++] = *token++;
		}

		if (!per_cpu)
			address = base + (uint32_t)offset;
		else if (offset >= 0)
			address = offset;
		else
			address = base - 1 - offset;
		if (length < 2)
			continue;
		if (symbols_add(symbols, address, name[0], name + 1,
				length - 1))
			goto no_memory;
	}
	if (symbols_sort(symbols))
		goto no_memory;

	return symbols;

no_memory:
	symbols_free(symbols);
	*no_memory = true;

	return NULL;
}

int kallsyms_find(const uint8_t *image, size_t size, uint64_t base,
		  uint64_t text, size_t *scanned, struct symbols **found)
{
	static const uint8_t digits[] = "0\0001\0002\0003\0004\0005\0006\0007\0008\0009";
	struct table table = { .image = image, .size = size };
	bool no_memory = false;
	size_t from = *scanned;

	while (from < size) {
		const uint8_t *hit = memmem(image + from, size - from, digits,
					    sizeof(digits));
		struct symbols *symbols;
		int status;

		if (!hit) {
			/* it may begin in what was seen, end in what comes */
			*scanned = size > sizeof(digits) ?
				   size - sizeof(digits) : 0;
			return 0;
		}
		*scanned = hit - image;
		from = hit - image + 1;

		status = find_tokens(&table, hit - image);
		if (status < 0)
			return 0;	/* have a look again when there is more */
		if (!status || !find_markers(&table) || !find_names(&table))
			continue;
		table.offsets = align8(table.index + 2 * TOKENS);
		if (align8(table.offsets + 4 * (size_t)table.count) + 8 > size)
			return 0;
		symbols = read_table(&table, &no_memory);
		if (no_memory)
			return -1;

		/* The proof: it knows the code that is known to be there */
		if (symbols_count(symbols) >= PLAUSIBLE_COUNT) {
			uint64_t start = symbols_address(symbols, "_stext");
			uint64_t end = symbols_address(symbols, "_etext");

			if (start <= text && text < end && end > base) {
				*found = symbols;
				return 1;
			}
		}
		symbols_free(symbols);
	}
	*scanned = from;

	return 0;
}
