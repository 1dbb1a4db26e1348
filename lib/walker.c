/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The guest's page tables */

#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define PAGE_SIZE 4096

#define CR0_PG (1ULL << 31)
#define CR4_LA57 (1ULL << 12)
#define EFER_LMA (1ULL << 10)

#define PTE_PRESENT (1ULL << 0)
#define PTE_WRITE (1ULL << 1)
#define PTE_USER (1ULL << 2)
#define PTE_LARGE (1ULL << 7)
#define PTE_NX (1ULL << 63)
#define PTE_ADDRESS 0x000ffffffffff000ULL

struct cached {
	uint64_t gpa;		/* all ones: nothing */
	uint64_t entries[PAGE_SIZE / 8];
};

struct kvmi_walker {
	struct kvmi_vm *vm;
	pthread_mutex_t lock;	/* the cache */
	struct cached *cache;	/* each page has one place */
	size_t cache_pages;
	uint64_t generation;	/* what was read before does not count any more */
};

enum kvmi_status kvmi_paging_of(const struct kvmi_registers *state,
				struct kvmi_paging *paging,
				struct kvmi_error *err)
{
	if (!state || !paging)
		return fail(err, KVMI_ERR_ARGUMENT, "no state, or no paging");
	if (!(state->sregs.cr0 & CR0_PG) || !(state->sregs.efer & EFER_LMA))
		return fail(err, KVMI_ERR_NOT_SUPPORTED,
			    "the vCPU is not in long mode; kvmi_vcpu_translate() can do it");
	*paging = (struct kvmi_paging){
		.cr3 = state->sregs.cr3,
		.levels = state->sregs.cr4 & CR4_LA57 ? 5 : 4,
	};

	return KVMI_OK;
}

struct kvmi_walker *kvmi_walker_new(struct kvmi_vm *vm, size_t cache_pages,
				    struct kvmi_error *err)
{
	struct kvmi_walker *walker;

	if (!vm) {
		fail(err, KVMI_ERR_ARGUMENT, "no vm");
		return NULL;
	}
	walker = calloc(1, sizeof(*walker));
	if (walker && cache_pages)
		walker->cache = calloc(cache_pages, sizeof(*walker->cache));
	if (!walker || (cache_pages && !walker->cache)) {
		free(walker);
		no_memory(err);
		return NULL;
	}
	walker->vm = vm;
	walker->cache_pages = cache_pages;
	pthread_mutex_init(&walker->lock, NULL);
	kvmi_walker_forget(walker);

	return walker;
}

void kvmi_walker_free(struct kvmi_walker *walker)
{
	if (!walker)
		return;
	pthread_mutex_destroy(&walker->lock);
	free(walker->cache);
	free(walker);
}

void kvmi_walker_forget(struct kvmi_walker *walker)
{
	size_t i;

	if (!walker)
		return;
	pthread_mutex_lock(&walker->lock);
	walker->generation++;
	for (i = 0; i < walker->cache_pages; i++)
		walker->cache[i].gpa = UINT64_MAX;
	pthread_mutex_unlock(&walker->lock);
}

static enum kvmi_status read_entry(struct kvmi_walker *walker, uint64_t table,
				   unsigned int index, uint64_t *entry,
				   struct kvmi_error *err)
{
	uint64_t page[PAGE_SIZE / 8], generation;
	enum kvmi_status status;
	struct cached *cached;
	bool found;

	if (!walker->cache_pages)
		return kvmi_vm_read_physical(walker->vm, table + 8 * index,
					     entry, sizeof(*entry), err);

	cached = &walker->cache[table / PAGE_SIZE % walker->cache_pages];
	pthread_mutex_lock(&walker->lock);
	generation = walker->generation;
	found = cached->gpa == table;
	if (found)
		*entry = cached->entries[index];
	pthread_mutex_unlock(&walker->lock);
	if (found)
		return KVMI_OK;

	/* without the lock: others need not wait for what they don't look for */
	status = kvmi_vm_read_physical(walker->vm, table, page, PAGE_SIZE, err);
	if (status != KVMI_OK)
		return status;
	*entry = page[index];
	pthread_mutex_lock(&walker->lock);
	if (walker->generation == generation) {
		memcpy(cached->entries, page, PAGE_SIZE);
		cached->gpa = table;
	}
	pthread_mutex_unlock(&walker->lock);

	return KVMI_OK;
}

enum kvmi_status kvmi_walker_translate(struct kvmi_walker *walker,
				       const struct kvmi_paging *paging,
				       uint64_t gva,
				       struct kvmi_translation *translation,
				       struct kvmi_error *err)
{
	struct kvmi_translation found = {
		.writable = true, .user = true, .executable = true,
	};
	uint64_t table, mask, entry = 0;
	int shift;

	if (!walker || !paging || !translation)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no walker, no paging or no place for the result");
	if (paging->levels != 4 && paging->levels != 5)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "page tables of %u levels: there are 4 or 5",
			    paging->levels);

	/* what is not canonical is nowhere */
	shift = 9 * paging->levels + 11;
	if (gva >> shift && gva >> shift != UINT64_MAX >> shift)
		goto unmapped;

	table = paging->cr3 & PTE_ADDRESS;
	for (shift = 9 * paging->levels + 3; ; shift -= 9) {
		enum kvmi_status status;

		status = read_entry(walker, table, gva >> shift & 511, &entry,
				    err);
		/* tables that are not in memory map nothing */
		if (status == KVMI_ERR_NOT_FOUND)
			goto unmapped;
		if (status != KVMI_OK)
			return status;
		if (!(entry & PTE_PRESENT))
			goto unmapped;
		found.writable &= !!(entry & PTE_WRITE);
		found.user &= !!(entry & PTE_USER);
		found.executable &= !(entry & PTE_NX);
		if (shift == 12 || (shift <= 30 && (entry & PTE_LARGE)))
			break;
		table = entry & PTE_ADDRESS;
	}
	found.page_size = 1ULL << shift;
	mask = found.page_size - 1;
	found.gpa = (entry & PTE_ADDRESS & ~mask) | (gva & mask);
	*translation = found;

	return KVMI_OK;

unmapped:
	return fail(err, KVMI_ERR_UNMAPPED,
		    "the guest has nothing mapped at 0x%llx",
		    (unsigned long long)gva);
}

static enum kvmi_status read_write(struct kvmi_walker *walker,
				   const struct kvmi_paging *paging,
				   uint64_t gva, void *data, size_t size,
				   bool write, struct kvmi_error *err)
{
	if (!walker || !paging || (size && !data) ||
	    (size && gva + (size - 1) < gva))
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no walker, no paging, no data, or beyond the end of all addresses");

	while (size) {
		struct kvmi_translation found;
		enum kvmi_status status;
		uint64_t part;

		status = kvmi_walker_translate(walker, paging, gva, &found, err);
		if (status != KVMI_OK)
			return status;
		part = found.page_size - gva % found.page_size;
		if (part > size)
			part = size;
		status = write ?
			kvmi_vm_write_physical(walker->vm, found.gpa, data, part,
					       err) :
			kvmi_vm_read_physical(walker->vm, found.gpa, data, part,
					      err);
		if (status != KVMI_OK)
			return status;
		gva += part;
		data = (uint8_t *)data + part;
		size -= part;
	}

	return KVMI_OK;
}

enum kvmi_status kvmi_walker_read(struct kvmi_walker *walker,
				  const struct kvmi_paging *paging,
				  uint64_t gva, void *data, size_t size,
				  struct kvmi_error *err)
{
	return read_write(walker, paging, gva, data, size, false, err);
}

enum kvmi_status kvmi_walker_write(struct kvmi_walker *walker,
				   const struct kvmi_paging *paging,
				   uint64_t gva, const void *data, size_t size,
				   struct kvmi_error *err)
{
	return read_write(walker, paging, gva, (void *)data, size, true, err);
}
