/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Finding one's way in a Linux guest */

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest.h"

#define MSR_LSTAR 0xc0000082

#define PTE_PRESENT (1ULL << 0)
#define PTE_WRITE (1ULL << 1)
#define PTE_LARGE (1ULL << 7)
#define PTE_ADDRESS 0x000ffffffffff000ULL

/* Where x86-64 Linux has its own image: the last 2 GiB */
#define KERNEL_IMAGE 0xffffffff80000000ULL
#define LINK_ADDRESS 0xffffffff81000000ULL	/* of _text, nearly always */
#define LARGE_PAGE (2ULL << 20)

/* How much of the image to read in search of its symbol table */
#define IMAGE_MAX (96ULL << 20)
#define IMAGE_STEP (1ULL << 20)

#define SYSTEM_RUNNING 3	/* enum system_states */

enum kvmi_status guest_translate(struct kvmi_vm *vm, uint64_t cr3,
				 bool five_levels, uint64_t gva, uint64_t *gpa,
				 bool *writable, struct kvmi_error *err)
{
	uint64_t table = cr3 & PTE_ADDRESS;
	bool write = true;
	int shift;

	for (shift = five_levels ? 48 : 39; ; shift -= 9) {
		uint64_t entry;
		enum kvmi_status status;

		status = kvmi_vm_read_physical(vm, table +
					       8 * (gva >> shift & 511),
					       &entry, sizeof(entry), err);
		if (status != KVMI_OK && status != KVMI_ERR_NOT_FOUND)
			return status;
		if (status != KVMI_OK || !(entry & PTE_PRESENT)) {
			if (err) {
				memset(err, 0, sizeof(*err));
				err->status = KVMI_ERR_UNMAPPED;
				snprintf(err->message, sizeof(err->message),
					 "the guest has nothing mapped at 0x%" PRIx64,
					 gva);
			}
			return KVMI_ERR_UNMAPPED;
		}
		write = write && (entry & PTE_WRITE);
		if (shift == 12 || (shift <= 30 && (entry & PTE_LARGE))) {
			uint64_t mask = (1ULL << shift) - 1;

			*gpa = (entry & PTE_ADDRESS & ~mask) | (gva & mask);
			if (writable)
				*writable = write;
			return KVMI_OK;
		}
		table = entry & PTE_ADDRESS;
	}
}

enum kvmi_status guest_kernel_gpa(struct guest *guest, uint64_t gva,
				  uint64_t *gpa, struct kvmi_error *err)
{
	/* The image lies in one piece in physical memory */
	if (guest->linear && gva >= guest->text_start && gva < guest->text_end) {
		*gpa = gva - guest->linear;
		return KVMI_OK;
	}

	return guest_translate(guest->vm, guest->cr3, guest->five_levels, gva,
			       gpa, NULL, err);
}

enum kvmi_status guest_read(struct guest *guest, uint64_t gva, void *data,
			    size_t size, struct kvmi_error *err)
{
	while (size) {
		size_t part = PAGE_SIZE - gva % PAGE_SIZE;
		enum kvmi_status status;
		uint64_t gpa, last;

		/* much of the image, which is in large pages: all in one go */
		if (gva >= KERNEL_IMAGE && size > part)
			part = LARGE_PAGE - gva % LARGE_PAGE;
		if (part > size)
			part = size;
		status = guest_kernel_gpa(guest, gva, &gpa, err);
		if (status == KVMI_OK && part > PAGE_SIZE) {
			status = guest_kernel_gpa(guest, gva + part - 1, &last,
						  err);
			if (status == KVMI_ERR_UNMAPPED ||
			    (status == KVMI_OK && last - gpa != part - 1)) {
				part = PAGE_SIZE - gva % PAGE_SIZE;
				status = KVMI_OK;
			}
		}
		if (status == KVMI_OK) {
			struct kvmi_memory_op op = {
				.gpa = gpa, .data = data, .size = part,
			};

			status = kvmi_vm_read_many(guest->vm, &op, 1, err);
		}
		if (status != KVMI_OK)
			return status;
		gva += part;
		data = (char *)data + part;
		size -= part;
	}

	return KVMI_OK;
}

const struct symbols *guest_symbols(const struct guest *guest,
				    const struct symbols *map)
{
	return guest->symbols ? guest->symbols : map;
}

static uint64_t address_of(const struct guest *guest, const struct symbols *map,
			   const char *name)
{
	uint64_t address = symbols_address(guest_symbols(guest, map), name);

	return address ? address + guest->offset : 0;
}

/* The image as far as needed, from the code at `text' upwards */
static enum guest_result read_own_symbols(struct guest *guest, uint64_t text,
					  char *why, size_t why_size,
					  struct kvmi_error *err)
{
	uint64_t base = text & ~(LARGE_PAGE - 1), gpa;
	enum guest_result result = GUEST_UNKNOWN;
	size_t size = 0, scanned = 0;
	enum kvmi_status status;
	uint8_t *image = NULL;
	int found = 0;

	status = guest_translate(guest->vm, guest->cr3, guest->five_levels,
				 base, &gpa, NULL, err);
	if (status == KVMI_ERR_UNMAPPED) {
		snprintf(why, why_size, "%s", "the kernel's code is not mapped");
		return GUEST_NOT_YET;
	}
	if (status != KVMI_OK)
		return GUEST_FAILED;

	image = malloc(IMAGE_MAX);
	while (image && size < IMAGE_MAX && !found) {
		struct kvmi_memory_op op = {
			.gpa = gpa + size, .data = image + size,
			.size = IMAGE_STEP,
		};

		if (guest->interrupted && guest->interrupted(guest->context)) {
			snprintf(why, why_size, "interrupted");
			free(image);
			return GUEST_NOT_YET;
		}
		status = kvmi_vm_read_many(guest->vm, &op, 1, err);
		if (status == KVMI_ERR_NOT_FOUND)
			break;	/* end of memory */
		if (status != KVMI_OK) {
			free(image);
			return GUEST_FAILED;
		}
		size += IMAGE_STEP;
		found = kallsyms_find(image, size, base, text, &scanned,
				      &guest->symbols);
	}
	free(image);
	if (found == 1) {
		guest->own_symbols = true;
		result = GUEST_FOUND;
	} else if (!image || found < 0) {
		snprintf(why, why_size, "out of memory");
	} else {
		snprintf(why, why_size,
			 "this kernel has no symbol table (KALLSYMS) that is understood: use --system-map");
	}

	return result;
}

enum guest_result guest_find_kernel(struct guest *guest, struct kvmi_vm *vm,
				    const struct symbols *map, char *text,
				    size_t text_size, struct kvmi_error *err)
{
	static const uint32_t msr = MSR_LSTAR;
	struct kvmi_registers state;
	enum guest_result result;
	enum kvmi_status status;
	uint64_t lstar, address, first, last;
	uint32_t running = 0;
	char *end;

	guest->vm = vm;
	guest->linear = 0;
	status = kvmi_vcpu_get_registers(vm, 0, &state, &msr, &lstar, 1, err);
	if (status == KVMI_ERR_NOT_STARTED) {
		snprintf(text, text_size, "the VM has not started");
		return GUEST_NOT_YET;
	}
	if (status != KVMI_OK)
		return GUEST_FAILED;
	if (lstar < KERNEL_IMAGE || !(state.sregs.cr0 >> 31)) {
		snprintf(text, text_size,
			 "no 64-bit Linux kernel is running (yet)");
		return GUEST_NOT_YET;
	}

	/* Symbols that were read before, if it is still the same kernel */
	if (guest->symbols &&
	    symbols_address(guest->symbols, "entry_SYSCALL_64") != lstar)
		guest_forget(guest);

	/*
	 * In user space a kernel with page-table isolation uses tables that
	 * lack nearly all of the kernel; the others are in the page before.
	 */
	guest->cr3 = state.sregs.cr3 & PTE_ADDRESS;
	guest->five_levels = state.sregs.cr4 >> 12 & 1;
	if (guest->cr3 & PAGE_SIZE) {
		uint64_t probe = (lstar & ~(LARGE_PAGE - 1)) + LARGE_PAGE, gpa;

		status = guest_translate(vm, guest->cr3, guest->five_levels,
					 probe, &gpa, NULL, err);
		if (status == KVMI_ERR_UNMAPPED) {
			status = guest_translate(vm, guest->cr3 & ~PAGE_SIZE,
						 guest->five_levels, probe,
						 &gpa, NULL, err);
			if (status == KVMI_OK)
				guest->cr3 &= ~PAGE_SIZE;
		}
		if (status != KVMI_OK && status != KVMI_ERR_UNMAPPED)
			return GUEST_FAILED;
	}

	if (map) {
		address = symbols_address(map, "entry_SYSCALL_64");
		if (!address) {
			snprintf(text, text_size,
				 "the map has no entry_SYSCALL_64: is it that of a 64-bit x86 kernel?");
			return GUEST_UNKNOWN;
		}
		guest->offset = lstar - address;
		if (guest->offset % (int64_t)LARGE_PAGE || guest->offset < 0) {
			snprintf(text, text_size,
				 "the map is not that of this guest's kernel (entry_SYSCALL_64 is at 0x%" PRIx64 ", the map says 0x%" PRIx64 ")",
				 lstar, address);
			return GUEST_UNKNOWN;
		}
	} else if (!guest->symbols) {
		result = read_own_symbols(guest, lstar, text, text_size, err);
		if (result != GUEST_FOUND)
			return result;
		if (symbols_address(guest->symbols, "entry_SYSCALL_64") !=
		    lstar) {
			symbols_free(guest->symbols);
			guest->symbols = NULL;
			snprintf(text, text_size,
				 "the kernel's symbol table does not fit the kernel");
			return GUEST_NOT_YET;
		}
	}

	/* A second opinion, which also names the kernel */
	address = address_of(guest, map, "linux_banner");
	memset(guest->banner, 0, sizeof(guest->banner));
	status = address ? guest_read(guest, address, guest->banner,
				      sizeof(guest->banner) - 1, err) :
			   KVMI_ERR_UNMAPPED;
	if (status != KVMI_OK && status != KVMI_ERR_UNMAPPED &&
	    status != KVMI_ERR_NOT_FOUND)
		return GUEST_FAILED;
	if (strncmp(guest->banner, "Linux version ", 14)) {
		guest->banner[0] = 0;
		snprintf(text, text_size,
			 "the map is not that of this guest's kernel (no \"Linux version\" at linux_banner)");
		return map ? GUEST_UNKNOWN : GUEST_NOT_YET;
	}
	end = strchr(guest->banner, '\n');
	if (end)
		*end = 0;

	/*
	 * While it boots it rewrites its own code (alternatives, ftrace) and
	 * throws parts of it away: wait until that is over.
	 */
	address = address_of(guest, map, "system_state");
	if (address) {
		status = guest_read(guest, address, &running, sizeof(running),
				    err);
		if (status != KVMI_OK)
			return GUEST_FAILED;
		if (running < SYSTEM_RUNNING) {
			snprintf(text, text_size, "the guest's kernel is booting");
			return GUEST_NOT_YET;
		}
	}

	guest->text_start = address_of(guest, map, "_stext");
	guest->text_end = address_of(guest, map, "_etext");
	if (!guest->text_start || guest->text_end <= guest->text_start) {
		snprintf(text, text_size,
			 "neither _stext nor _etext among the symbols");
		return GUEST_UNKNOWN;
	}
	guest->kaslr = guest->offset;
	if (guest->own_symbols)
		guest->kaslr = address_of(guest, map, "_text") - LINK_ADDRESS;

	/* Is the image in one piece?  It has always been; but check. */
	status = guest_translate(vm, guest->cr3, guest->five_levels,
				 guest->text_start, &first, NULL, err);
	if (status == KVMI_OK)
		status = guest_translate(vm, guest->cr3, guest->five_levels,
					 guest->text_end - 1, &last, NULL, err);
	if (status != KVMI_OK)
		return GUEST_FAILED;
	if (last - first == guest->text_end - 1 - guest->text_start)
		guest->linear = guest->text_start - first;

	return GUEST_FOUND;
}

void guest_forget(struct guest *guest)
{
	symbols_free(guest->symbols);
	*guest = (struct guest){
		.vm = guest->vm, .interrupted = guest->interrupted,
		.context = guest->context,
	};
}

static bool in_init_section(const struct guest *guest,
			    const struct symbols *map, uint64_t address)
{
	uint64_t start = address_of(guest, map, "__init_begin");
	uint64_t end = address_of(guest, map, "__init_end");

	return start && start <= address && address < end;
}

bool guest_resolve(const struct guest *guest, const struct symbols *map,
		   const char *text, bool code, uint64_t *address,
		   char *error, size_t error_size)
{
	const struct symbols *symbols = guest_symbols(guest, map);
	const struct symbol *symbol = NULL;
	unsigned long long offset = 0;
	char name[512], *plus, *end;
	size_t count, i, length;

	if (isdigit((unsigned char)text[0])) {
		errno = 0;
		*address = strtoull(text, &end, 0);
		if (errno || *end) {
			snprintf(error, error_size, "%s: not an address", text);
			return false;
		}
	} else {
		if (snprintf(name, sizeof(name), "%s", text) >=
		    (int)sizeof(name)) {
			snprintf(error, error_size, "symbol name too long");
			return false;
		}
		plus = strchr(name, '+');
		if (plus) {
			*plus++ = 0;
			errno = 0;
			offset = strtoull(plus, &end, 0);
			if (errno || *end || end == plus ||
			    !isdigit((unsigned char)*plus)) {
				snprintf(error, error_size,
					 "%s: after + a number is expected",
					 text);
				return false;
			}
		}
		count = symbols_find(symbols, name, &symbol);
		if (!count) {
			snprintf(error, error_size,
				 "the kernel has no symbol %s", name);
			return false;
		}
		if (count > 1) {
			length = snprintf(error, error_size,
					  "%s is ambiguous; give one of its %zu addresses:",
					  name, count);
			for (i = 0; i < symbols_count(symbols); i++) {
				const struct symbol *other =
					symbols_get(symbols, i);

				if (length < error_size &&
				    !strcmp(other->name, name))
					length += snprintf(error + length,
							   error_size - length,
							   " 0x%" PRIx64,
							   other->address +
							   guest->offset);
			}
			return false;
		}
		*address = symbol->address + guest->offset + offset;
	}
	if (!code)
		return true;

	if (in_init_section(guest, map, *address)) {
		snprintf(error, error_size,
			 "%s is in the kernel's init section, which is gone after boot",
			 text);
		return false;
	}
	if (symbol && !strchr("tTwW", symbol->type)) {
		snprintf(error, error_size,
			 "%s is not code (type %c)", text, symbol->type);
		return false;
	}
	/* addresses outside of the image can be in modules */
	if (*address < KERNEL_IMAGE ||
	    (symbol && (*address < guest->text_start ||
			*address >= guest->text_end))) {
		snprintf(error, error_size, "%s is not in the kernel's code",
			 text);
		return false;
	}

	return true;
}

void guest_describe(const struct guest *guest, const struct symbols *map,
		    uint64_t address, char *text, size_t size)
{
	const struct symbols *symbols = guest_symbols(guest, map);
	const struct symbol *symbol = NULL;
	uint64_t end = symbols ? address_of(guest, map, "_end") : 0;

	if (guest->text_start && address >= guest->text_start && address < end)
		symbol = symbols_at(symbols, address - guest->offset);
	if (!symbol)
		snprintf(text, size, "0x%" PRIx64, address);
	else if (symbol->address + guest->offset == address)
		snprintf(text, size, "%s", symbol->name);
	else
		snprintf(text, size, "%s+0x%" PRIx64, symbol->name,
			 address - symbol->address - guest->offset);
}
