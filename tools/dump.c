/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi dump: guest memory to a file */

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/procfs.h>
#include <sys/stat.h>
#include <unistd.h>

#undef PAGE_SIZE		/* of <sys/user.h> */
#include "kvmi.h"
#include "output.h"

/* What is read at once: so many pages */
#define CHUNK 256
#define CHUNK_SIZE (CHUNK * PAGE_SIZE)
/* Where there is no memory, one page in so many is tried */
#define HOLE_STEP 16
/* Parts with memory; a PC has some ten */
#define PARTS_MAX 1000
/* What QEMU says is not believed beyond that */
#define MEMORY_MAX (1ULL << 46)
#define VCPUS_MAX 4096
#define MSR_KERNEL_GS_BASE 0xc0000102

static const char help[] =
"Usage: kvmi dump --socket PATH [OPTION]... FILE\n"
"\n"
"Waits for a VM, writes its memory to FILE and lets it go.  It runs on meanwhile,\n"
"unless --pause is given.  Pages that are zero or not there take no room in FILE.\n"
"Until it is complete it is called FILE.part; what is not completed is deleted.\n"
"\n"
"Options:\n"
"  -F, --format elf|raw   elf: a core file as QEMU's dump-guest-memory makes it,\n"
"                         with the registers of the vCPUs, for crash and gdb\n"
"                         (default); raw: nothing but memory, what is at address\n"
"                         A of the range is at offset A - START of FILE\n"
"  -r, --range START,LENGTH\n"
"                         only this part, in guest-physical bytes\n"
"  -q, --quiet            do not tell how far it is\n"
ONE_VM_PAUSE_HELP ONE_VM_TIMEOUT_HELP ONE_VM_SOCKET_HELP;

struct part {
	uint64_t start;
	uint64_t end;
};

struct dump {
	struct one_vm one;
	bool raw;
	bool quiet;
	const char *path;	/* of what is being written */
	int fd;
	uint64_t start;
	uint64_t end;
	uint64_t header_size;	/* memory begins there in the file */
	struct part *parts;
	size_t part_count;
	uint8_t *buffer;
	struct kvmi_memory_op ops[CHUNK];
};

static bool write_at(struct dump *dump, const void *data, size_t size,
		     uint64_t offset)
{
	while (size) {
		ssize_t done = pwrite(dump->fd, data, size, offset);

		if (done < 0 && errno == EINTR && !tool_interrupted())
			continue;
		if (done <= 0) {
			complain("%s: %s", dump->path, strerror(errno));
			return false;
		}
		data = (const char *)data + done;
		size -= done;
		offset += done;
	}

	return true;
}

/* ------------------------------------------------------------------------
 * ELF
 */

/* The note that QEMU puts beside NT_PRSTATUS; crash(8) finds KASLR by it */
struct qemu_segment {
	uint32_t selector;
	uint32_t limit;
	uint32_t flags;
	uint32_t pad;
	uint64_t base;
};

struct qemu_cpu_state {
	uint32_t version;
	uint32_t size;
	uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t rip, rflags;
	struct qemu_segment cs, ds, es, fs, gs, ss;
	struct qemu_segment ldt, tr, gdt, idt;
	uint64_t cr[5];
	uint64_t kernel_gs_base;
};

/* In a file all parts of a note are aligned to 4 bytes, not to 8 */
struct notes {
	struct {
		Elf64_Nhdr header;
		char name[8];
		struct elf_prstatus status;
	} __attribute__((packed, aligned(4))) core;
	struct {
		Elf64_Nhdr header;
		char name[8];
		struct qemu_cpu_state state;
	} __attribute__((packed, aligned(4))) qemu;
} __attribute__((packed, aligned(4)));

static struct qemu_segment to_qemu(const struct kvm_segment *s)
{
	return (struct qemu_segment){
		.selector = s->selector, .limit = s->limit, .base = s->base,
		.flags = s->type << 8 | s->s << 12 | s->dpl << 13 |
			 s->present << 15 | s->avl << 20 | s->l << 21 |
			 s->db << 22 | s->g << 23,
	};
}

static void make_notes(struct notes *notes, unsigned int vcpu,
		       const struct kvmi_registers *state, uint64_t gs_base)
{
	const struct kvm_sregs *s = &state->sregs;
	const struct kvm_regs *r = &state->regs;
	/* as in struct user_regs_struct */
	const uint64_t registers[] = {
		r->r15, r->r14, r->r13, r->r12, r->rbp, r->rbx, r->r11, r->r10,
		r->r9, r->r8, r->rax, r->rcx, r->rdx, r->rsi, r->rdi, -1ULL,
		r->rip, s->cs.selector, r->rflags, r->rsp, s->ss.selector,
		s->fs.base, s->gs.base, s->ds.selector, s->es.selector,
		s->fs.selector, s->gs.selector,
	};

	_Static_assert(sizeof(registers) == sizeof(notes->core.status.pr_reg),
		       "the registers of a core file");
	memset(notes, 0, sizeof(*notes));
	notes->core.header = (Elf64_Nhdr){ 5, sizeof(notes->core.status),
					   NT_PRSTATUS };
	strcpy(notes->core.name, "CORE");
	notes->core.status.pr_pid = vcpu + 1;
	memcpy(notes->core.status.pr_reg, registers, sizeof(registers));

	notes->qemu.header = (Elf64_Nhdr){ 5, sizeof(notes->qemu.state), 0 };
	strcpy(notes->qemu.name, "QEMU");
	notes->qemu.state = (struct qemu_cpu_state){
		.version = 1, .size = sizeof(notes->qemu.state),
		.rax = r->rax, .rbx = r->rbx, .rcx = r->rcx, .rdx = r->rdx,
		.rsi = r->rsi, .rdi = r->rdi, .rsp = r->rsp, .rbp = r->rbp,
		.r8 = r->r8, .r9 = r->r9, .r10 = r->r10, .r11 = r->r11,
		.r12 = r->r12, .r13 = r->r13, .r14 = r->r14, .r15 = r->r15,
		.rip = r->rip, .rflags = r->rflags,
		.cs = to_qemu(&s->cs), .ds = to_qemu(&s->ds),
		.es = to_qemu(&s->es), .fs = to_qemu(&s->fs),
		.gs = to_qemu(&s->gs), .ss = to_qemu(&s->ss),
		.ldt = to_qemu(&s->ldt), .tr = to_qemu(&s->tr),
		.gdt = { .limit = s->gdt.limit, .base = s->gdt.base },
		.idt = { .limit = s->idt.limit, .base = s->idt.base },
		.cr = { s->cr0, 0, s->cr2, s->cr3, s->cr4 },
		.kernel_gs_base = gs_base,
	};
}

/* Registers, before memory: as close to each other as can be */
static struct notes *get_notes(struct dump *dump, unsigned int *count)
{
	static const uint32_t msr = MSR_KERNEL_GS_BASE;
	struct kvmi_registers state;
	struct notes *notes = NULL;
	unsigned int vcpus, i;
	struct kvmi_error err;
	uint64_t gs_base;

	*count = 0;
	if (kvmi_vm_get_vcpu_count(dump->one.vm, &vcpus, &err) != KVMI_OK) {
		complain("%s", err.message);
		return NULL;
	}
	if (vcpus > VCPUS_MAX)
		vcpus = VCPUS_MAX;
	notes = calloc(vcpus + 1, sizeof(*notes));
	if (!notes) {
		complain("out of memory");
		return NULL;
	}
	for (i = 0; i < vcpus; i++) {
		enum kvmi_status status;

		status = kvmi_vcpu_get_registers(dump->one.vm, i, &state, &msr,
						 &gs_base, 1, &err);
		if (status == KVMI_ERR_NOT_STARTED)
			continue;
		if (status != KVMI_OK) {
			complain("vCPU %u: %s", i, err.message);
			free(notes);
			return NULL;
		}
		make_notes(&notes[(*count)++], i, &state, gs_base);
	}

	return notes;
}

/* Everything before the memory; PARTS_MAX is such that it fits */
static uint64_t elf_header_size(unsigned int notes)
{
	uint64_t size = sizeof(Elf64_Ehdr) +
			(PARTS_MAX + 1) * sizeof(Elf64_Phdr) +
			notes * sizeof(struct notes);

	return (size + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
}

static bool write_elf(struct dump *dump, const struct notes *notes,
		      unsigned int note_count)
{
	uint64_t notes_at = sizeof(Elf64_Ehdr) +
			    (PARTS_MAX + 1) * sizeof(Elf64_Phdr);
	Elf64_Ehdr header = {
		.e_ident = { ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64,
			     ELFDATA2LSB, EV_CURRENT },
		.e_type = ET_CORE, .e_machine = EM_X86_64,
		.e_version = EV_CURRENT, .e_phoff = sizeof(header),
		.e_ehsize = sizeof(header), .e_phentsize = sizeof(Elf64_Phdr),
		.e_phnum = dump->part_count + 1,
	};
	Elf64_Phdr *programs = calloc(dump->part_count + 1, sizeof(*programs));
	bool good;
	size_t i;

	if (!programs) {
		complain("out of memory");
		return false;
	}
	programs[0] = (Elf64_Phdr){
		.p_type = PT_NOTE, .p_offset = notes_at,
		.p_filesz = note_count * sizeof(*notes),
		.p_memsz = note_count * sizeof(*notes),
	};
	for (i = 0; i < dump->part_count; i++) {
		const struct part *part = &dump->parts[i];

		programs[i + 1] = (Elf64_Phdr){
			.p_type = PT_LOAD, .p_paddr = part->start,
			.p_offset = dump->header_size + part->start - dump->start,
			.p_filesz = part->end - part->start,
			.p_memsz = part->end - part->start,
		};
	}
	good = write_at(dump, &header, sizeof(header), 0) &&
	       write_at(dump, programs, header.e_phnum * sizeof(*programs),
			sizeof(header)) &&
	       write_at(dump, notes, note_count * sizeof(*notes), notes_at);
	free(programs);

	return good;
}

/* ------------------------------------------------------------------------
 * Memory
 */

static bool add_part(struct dump *dump, uint64_t start, uint64_t end)
{
	if (dump->part_count && dump->parts[dump->part_count - 1].end == start) {
		dump->parts[dump->part_count - 1].end = end;
		return true;
	}
	if (dump->part_count == PARTS_MAX) {
		complain("the VM's memory is in more than %d parts: use --format raw or --range",
			 PARTS_MAX);
		return dump->raw;
	}
	dump->parts[dump->part_count++] = (struct part){ start, end };

	return true;
}

/* Reads count pages from gpa on, one in step.  -1: failed; else how many. */
static int read_pages(struct dump *dump, uint64_t gpa, unsigned int count,
		      unsigned int step)
{
	struct kvmi_error err;
	enum kvmi_status status;
	unsigned int i, n = 0;
	int found = 0;

	for (i = 0; i < count; i += step)
		dump->ops[n++] = (struct kvmi_memory_op){
			.gpa = gpa + i * PAGE_SIZE, .size = PAGE_SIZE,
			.data = dump->buffer + i * PAGE_SIZE,
		};
	status = kvmi_vm_read_many(dump->one.vm, dump->ops, n, &err);
	for (i = 0; i < n; i++)
		found += dump->ops[i].status == KVMI_OK;
	if (status == KVMI_OK)
		return found;
	for (i = 0; i < n; i++) {
		if (dump->ops[i].status == KVMI_OK ||
		    dump->ops[i].status == KVMI_ERR_NOT_FOUND)
			continue;
		complain("at 0x%" PRIx64 ": %s%s", dump->ops[i].gpa,
			 err.message, status == KVMI_ERR_CLOSED ?
			 " (is the VM being paused, saved or migrated?)" : "");
		return -1;
	}

	return found;
}

static bool is_zero(const uint8_t *page)
{
	return !page[0] && !memcmp(page, page + 1, PAGE_SIZE - 1);
}

/* Runs of pages that are there and not zero go out in one piece */
static bool write_pages(struct dump *dump, uint64_t gpa, unsigned int count)
{
	uint64_t to = dump->header_size + gpa - dump->start;
	unsigned int i, first = 0;

	for (i = 0; i <= count; i++) {
		const uint8_t *page = dump->buffer + i * PAGE_SIZE;
		bool there = i < count && dump->ops[i].status == KVMI_OK;

		if (there && !add_part(dump, gpa + i * PAGE_SIZE,
				       gpa + (i + 1) * PAGE_SIZE))
			return false;
		if (there && !is_zero(page))
			continue;
		if (i > first && !write_at(dump, dump->buffer +
					   first * PAGE_SIZE,
					   (i - first) * PAGE_SIZE,
					   to + first * PAGE_SIZE))
			return false;
		first = i + 1;
	}

	return true;
}

static bool copy_memory(struct dump *dump)
{
	uint64_t first = dump->start & ~(PAGE_SIZE - 1), gpa;
	uint64_t last = (dump->end + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
	int64_t begin = now_ms(), told = begin, now;
	bool hole = false;

	for (gpa = first; gpa < last; gpa += CHUNK_SIZE) {
		unsigned int count = (last - gpa) / PAGE_SIZE < CHUNK ?
				     (last - gpa) / PAGE_SIZE : CHUNK;
		int found = 0;

		if (tool_interrupted()) {
			complain("interrupted");
			return false;
		}
		if (hole)
			found = read_pages(dump, gpa, count, HOLE_STEP);
		if (found < 0)
			return false;
		if (!hole || found) {
			found = read_pages(dump, gpa, count, 1);
			if (found < 0 || !write_pages(dump, gpa, count))
				return false;
			hole = !found;
		}

		now = now_ms();
		if (!dump->quiet && now - told >= 1000) {
			told = now;
			complain("%" PRIu64 " of %" PRIu64 " MiB after %" PRId64 " s",
				 (gpa - first) >> 20, (last - first) >> 20,
				 (now - begin) / 1000);
		}
	}
	if (!dump->part_count) {
		complain("there is no memory from 0x%" PRIx64 " to 0x%" PRIx64,
			 dump->start, dump->end - 1);
		return false;
	}

	return true;
}

/* ------------------------------------------------------------------------ */

static bool find_end(struct dump *dump)
{
	struct kvmi_error err;
	uint64_t gfn, end;

	if (kvmi_vm_get_max_gfn(dump->one.vm, &gfn, &err) == KVMI_OK)
		end = (gfn + 1) * PAGE_SIZE;
	else
		end = kvmi_vm_get_hello(dump->one.vm)->max_gpa;
	if (!end || end > MEMORY_MAX) {
		complain("it is not known where the VM's memory ends: use --range");
		return false;
	}
	dump->end = end;

	return true;
}

static bool make_dump(struct dump *dump)
{
	struct notes *notes = NULL;
	unsigned int count = 0;
	bool good = false;
	uint64_t end;

	if (!dump->end && !find_end(dump))
		return false;
	if (!dump->raw) {
		notes = get_notes(dump, &count);
		if (!notes)
			return false;
		dump->header_size = elf_header_size(count);
	}
	dump->buffer = malloc(CHUNK_SIZE);
	dump->parts = calloc(PARTS_MAX, sizeof(*dump->parts));
	if (!dump->buffer || !dump->parts) {
		complain("out of memory");
		goto out;
	}
	if (!copy_memory(dump))
		goto out;
	end = dump->raw ? dump->end :
	      dump->parts[dump->part_count - 1].end;
	if (!dump->raw && !write_elf(dump, notes, count))
		goto out;
	if (ftruncate(dump->fd, dump->header_size + end - dump->start)) {
		complain("%s: %s", dump->path, strerror(errno));
		goto out;
	}
	good = true;
out:
	free(notes);
	free(dump->buffer);
	free(dump->parts);

	return good;
}

static int parse_range(struct dump *dump, const char *text)
{
	char start[64], *comma;
	uint64_t length;

	snprintf(start, sizeof(start), "%s", text);
	comma = strchr(start, ',');
	if (comma)
		*comma++ = 0;
	/* whole pages, so that nothing has to be cut */
	if (!comma || parse_number(start, 0, MEMORY_MAX, &dump->start) ||
	    parse_number(comma, 1, MEMORY_MAX, &length) ||
	    (dump->start | length) % PAGE_SIZE) {
		complain("--range wants START,LENGTH, both in whole pages of 4096 bytes");
		return -1;
	}
	dump->end = dump->start + length;

	return 0;
}

int dump_main(int argc, char **argv)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_TIMEOUT_OPTIONS, ONE_VM_PAUSE_OPTIONS,
		{ "format", required_argument, NULL, 'F' },
		{ "range", required_argument, NULL, 'r' },
		{ "quiet", no_argument, NULL, 'q' },
		{ 0 },
	};
	struct dump dump = { .fd = -1 };
	struct stat info;
	int option, result;
	char *part;

	while ((option = getopt_long(argc, argv, "F:r:q" ONE_VM_SOCKET ONE_VM_TIMEOUT
				     ONE_VM_PAUSE, options, NULL)) >= 0) {
		switch (option) {
		case 'F':
			dump.raw = !strcmp(optarg, "raw");
			if (!dump.raw && strcmp(optarg, "elf")) {
				complain("--format is elf or raw");
				return EXIT_USAGE;
			}
			break;
		case 'r':
			if (parse_range(&dump, optarg))
				return EXIT_USAGE;
			break;
		case 'q':
			dump.quiet = true;
			break;
		default:
			result = one_vm_option(&dump.one, option, help);
			if (result >= 0)
				return result;
		}
	}
	result = one_vm_options_end(&dump.one, "dump", argc - optind, 1);
	if (result >= 0)
		return result;

	/* Memory holds secrets: nobody else's business */
	if (asprintf(&part, "%s.part", argv[optind]) < 0) {
		complain("out of memory");
		return EXIT_PROBLEM;
	}
	dump.path = part;
	if (!stat(argv[optind], &info) && !S_ISREG(info.st_mode)) {
		complain("%s: not a regular file", argv[optind]);
		free(part);
		return EXIT_PROBLEM;
	}
	dump.fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW |
		       O_CLOEXEC, 0600);
	if (dump.fd < 0) {
		complain("%s: %s", part, strerror(errno));
		free(part);
		return EXIT_PROBLEM;
	}
	result = one_vm_connect(&dump.one, KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL) |
				(dump.raw ? 0 : KVMI_SET(KVMI_CMD_VM_GET_INFO) |
				 KVMI_SET(KVMI_CMD_VCPU_GET_REGISTERS)) |
				(dump.one.pause ? ONE_VM_PAUSE_COMMANDS : 0),
				dump.one.pause ? KVMI_SET(KVMI_EV_PAUSE) : 0);
	if (result == EXIT_OK && dump.one.pause)
		result = one_vm_pause(&dump.one);
	if (result == EXIT_OK && !make_dump(&dump))
		result = EXIT_PROBLEM;
	one_vm_close(&dump.one);
	if (close(dump.fd) && result == EXIT_OK) {
		complain("%s: %s", part, strerror(errno));
		result = EXIT_PROBLEM;
	}
	if (result == EXIT_OK && rename(part, argv[optind])) {
		complain("%s: %s", argv[optind], strerror(errno));
		result = EXIT_PROBLEM;
	}
	if (result != EXIT_OK)
		unlink(part);
	free(part);

	return result;
}
