/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "linux.h"

/* A list that changed while it was read */
#define ATTEMPTS 10
/* How much of a structure is read at once; task_struct has some 10 KiB */
#define SPAN_MAX 32768
#define BTF_STEP (256 * 1024)

static bool fail(struct linux_reader *reader, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

static bool fail(struct linux_reader *reader, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vsnprintf(reader->error, sizeof(reader->error), format, args);
	va_end(args);

	return false;
}

static bool is_interrupted(const struct linux_reader *reader)
{
	const struct guest *guest = reader->guest;

	return guest->interrupted && guest->interrupted(guest->context);
}

static bool read_at(struct linux_reader *reader, uint64_t gva, void *data,
		    size_t size)
{
	uint64_t offset = gva - reader->direct_map;
	enum kvmi_status status;
	struct kvmi_error err;

	/* most that the kernel allocates is there: no page tables to walk */
	if (reader->direct_map && gva >= reader->direct_map &&
	    offset < reader->memory_end && size <= reader->memory_end - offset)
		status = kvmi_vm_read_physical(reader->guest->vm, offset, data,
					       size, &err);
	else
		status = guest_read(reader->guest, gva, data, size, &err);
	if (status != KVMI_OK)
		return fail(reader, "0x%" PRIx64 ": %s", gva, err.message);

	return true;
}

static uint64_t address_of(const struct linux_reader *reader, const char *name)
{
	uint64_t address = symbols_address(guest_symbols(reader->guest,
							 reader->map), name);

	return address ? address + reader->guest->offset : 0;
}

static bool read_btf(struct linux_reader *reader)
{
	uint64_t start = address_of(reader, "__start_BTF");
	uint64_t end = address_of(reader, "__stop_BTF"), done;
	char why[128];
	uint8_t *data;

	if (!start || end <= start)
		return fail(reader, "this kernel has no BTF in its memory: use --btf");
	if (end - start > BTF_MAX)
		return fail(reader, "the guest's BTF has %" PRIu64 " bytes, which cannot be",
			    end - start);
	data = malloc(end - start);
	if (!data)
		return fail(reader, "out of memory");
	for (done = 0; done < end - start; done += BTF_STEP) {
		uint64_t size = end - start - done;

		if (is_interrupted(reader)) {
			free(data);
			return fail(reader, "interrupted");
		}
		if (!read_at(reader, start + done, data + done,
			     size < BTF_STEP ? size : BTF_STEP)) {
			free(data);
			return false;
		}
	}
	reader->btf = btf_new(data, end - start, why, sizeof(why));

	return reader->btf || fail(reader, "the guest's memory: %s", why);
}

bool linux_start(struct linux_reader *reader, struct guest *guest,
		 const struct symbols *map, const char *btf_path)
{
	const struct kvmi_vm_hello *hello = kvmi_vm_get_hello(guest->vm);
	uint64_t address, base;

	memset(reader, 0, sizeof(*reader));
	reader->guest = guest;
	reader->map = map;

	reader->memory_end = hello->max_gpa;
	address = address_of(reader, "page_offset_base");
	if (address && read_at(reader, address, &base, sizeof(base)) &&
	    base >> 56 == 0xff && !(base & ((1ULL << 30) - 1)))
		reader->direct_map = base;

	if (!btf_path)
		return read_btf(reader);
	reader->btf = btf_load(btf_path, reader->error, sizeof(reader->error));

	return reader->btf;
}

void linux_end(struct linux_reader *reader)
{
	btf_free(reader->btf);
	reader->btf = NULL;
}

/* ------------------------------------------------------------------------
 * Structures
 */

static bool member(struct linux_reader *reader, const char *structure,
		   const char *name, uint32_t size, struct btf_field *found)
{
	if (!btf_find_member(reader->btf, structure, name, found))
		return fail(reader, "the kernel's BTF has no %s.%s: is it that of this kernel?",
			    structure, name);
	if (size && found->size != size)
		return fail(reader, "%s.%s has %u bytes, which is not understood",
			    structure, name, found->size);

	return true;
}

/* The part of a structure that has the members one wants */
struct span {
	uint32_t from;
	uint32_t size;
	uint8_t *data;
};

static bool span_new(struct linux_reader *reader, struct span *span,
		     const struct btf_field *const *fields, size_t count)
{
	uint64_t to = 0;
	size_t i;

	span->from = UINT32_MAX;
	for (i = 0; i < count; i++) {
		uint64_t end = (uint64_t)fields[i]->offset + fields[i]->size;

		if (!fields[i]->size)
			continue;
		if (fields[i]->offset < span->from)
			span->from = fields[i]->offset;
		if (end > to)
			to = end;
	}
	if (to <= span->from || to - span->from > SPAN_MAX)
		return fail(reader, "the kernel's BTF makes no sense");
	span->size = to - span->from;
	span->data = malloc(span->size);

	return span->data || fail(reader, "out of memory");
}

/* field is one of those given to span_new(), size at most its size */
static void get(const struct span *span, const struct btf_field *field,
		void *value, size_t size)
{
	memcpy(value, span->data + field->offset - span->from, size);
}

static uint64_t get64(const struct span *span, const struct btf_field *field)
{
	uint64_t value;

	get(span, field, &value, sizeof(value));

	return value;
}

static uint32_t get32(const struct span *span, const struct btf_field *field)
{
	uint32_t value;

	get(span, field, &value, sizeof(value));

	return value;
}

/* struct list_head */
struct list {
	uint64_t next;
	uint64_t prev;
};

static struct list get_list(const struct span *span,
			    const struct btf_field *field)
{
	struct list list;

	get(span, field, &list, sizeof(list));

	return list;
}

/* ------------------------------------------------------------------------
 * Tasks
 */

struct task_layout {
	struct btf_field tasks, thread_node, signal, pid, tgid, real_parent;
	struct btf_field cred, flags, state, exit_state, mm, comm;
	struct btf_field thread_head;	/* in signal_struct */
	struct btf_field uid;		/* in cred */
	struct btf_field pgd;		/* in mm_struct */
	struct span span;
};

static bool task_layout(struct linux_reader *reader, struct task_layout *layout)
{
	const struct btf_field *const fields[] = {
		&layout->tasks, &layout->thread_node, &layout->signal,
		&layout->pid, &layout->tgid, &layout->real_parent,
		&layout->cred, &layout->flags, &layout->state,
		&layout->exit_state, &layout->mm, &layout->comm,
	};

	memset(layout, 0, sizeof(*layout));
	if (!member(reader, "task_struct", "tasks", 16, &layout->tasks) ||
	    !member(reader, "task_struct", "thread_node", 16,
		    &layout->thread_node) ||
	    !member(reader, "task_struct", "signal", 8, &layout->signal) ||
	    !member(reader, "task_struct", "pid", 4, &layout->pid) ||
	    !member(reader, "task_struct", "tgid", 4, &layout->tgid) ||
	    !member(reader, "task_struct", "real_parent", 8,
		    &layout->real_parent) ||
	    !member(reader, "task_struct", "cred", 8, &layout->cred) ||
	    !member(reader, "task_struct", "flags", 4, &layout->flags) ||
	    !member(reader, "task_struct", "exit_state", 4,
		    &layout->exit_state) ||
	    !member(reader, "task_struct", "mm", 8, &layout->mm) ||
	    !member(reader, "task_struct", "comm", 16, &layout->comm) ||
	    !member(reader, "signal_struct", "thread_head", 16,
		    &layout->thread_head) ||
	    !member(reader, "cred", "uid", 4, &layout->uid) ||
	    !member(reader, "mm_struct", "pgd", 8, &layout->pgd))
		return false;
	/* its name before 5.14 */
	if (!btf_find_member(reader->btf, "task_struct", "__state",
			     &layout->state) &&
	    !member(reader, "task_struct", "state", 8, &layout->state))
		return false;
	if (layout->state.size < 4)
		return fail(reader, "task_struct.__state is not understood");

	return span_new(reader, &layout->span, fields,
			sizeof(fields) / sizeof(fields[0]));
}

static char state_letter(uint32_t state, uint32_t exit_state)
{
	if (exit_state & 0x20)
		return 'Z';
	if (exit_state)
		return 'X';
	if (state & 1)
		return 'S';
	if ((state & 0x402) == 0x402)
		return 'I';
	if (state & 2)
		return 'D';
	if (state & 4)
		return 'T';
	if (state & 8)
		return 't';
	if (state & 0x40)
		return 'P';

	/* or about to: as the kernel itself calls it */
	return 'R';
}

struct task_list {
	struct linux_task *tasks;
	size_t count;
	size_t capacity;
	uint64_t last_cred;	/* processes of a user share them */
	uint32_t last_uid;
};

/* Reads the task into layout->span and appends it */
static bool add_task(struct linux_reader *reader, struct task_layout *layout,
		     struct task_list *list, uint64_t address)
{
	struct span *span = &layout->span;
	struct linux_task *task;
	uint64_t cred, mm, pgd;

	if (list->count == LINUX_TASKS_MAX)
		return fail(reader, "the guest's list of tasks has more than %d: it is broken",
			    LINUX_TASKS_MAX);
	if (is_interrupted(reader))
		return fail(reader, "interrupted");
	if (list->count == list->capacity) {
		size_t capacity = list->capacity ? 2 * list->capacity : 256;

		task = realloc(list->tasks, capacity * sizeof(*task));
		if (!task)
			return fail(reader, "out of memory");
		list->tasks = task;
		list->capacity = capacity;
	}
	if (!read_at(reader, address + span->from, span->data, span->size))
		return false;

	task = &list->tasks[list->count];
	memset(task, 0, sizeof(*task));
	task->address = address;
	task->parent = get64(span, &layout->real_parent);
	task->pid = get32(span, &layout->pid);
	task->tgid = get32(span, &layout->tgid);
	task->flags = get32(span, &layout->flags);
	task->state = state_letter(get32(span, &layout->state),
				   get32(span, &layout->exit_state));
	get(span, &layout->comm, task->comm, 16);

	cred = get64(span, &layout->cred);
	if (cred != list->last_cred || !list->count) {
		if (!read_at(reader, cred + layout->uid.offset,
			     &list->last_uid, sizeof(list->last_uid)))
			return false;
		list->last_cred = cred;
	}
	task->uid = list->last_uid;

	mm = get64(span, &layout->mm);
	if (mm) {
		if (!read_at(reader, mm + layout->pgd.offset, &pgd, sizeof(pgd)))
			return false;
		if (reader->direct_map && pgd >= reader->direct_map)
			task->cr3 = pgd - reader->direct_map;
	}
	list->count++;

	return true;
}

/* The other threads of the process whose leader is in layout->span */
static bool add_threads(struct linux_reader *reader, struct task_layout *layout,
			struct task_list *list, uint64_t leader)
{
	uint64_t head = get64(&layout->span, &layout->signal) +
			layout->thread_head.offset;
	uint64_t prev = head, node;
	struct list ends;

	if (!read_at(reader, head, &ends, sizeof(ends)))
		return false;
	for (node = ends.next; node != head;) {
		uint64_t address = node - layout->thread_node.offset;
		struct list here;

		if (address == leader) {
			if (!read_at(reader, node, &here, sizeof(here)))
				return false;
		} else {
			if (!add_task(reader, layout, list, address))
				return false;
			here = get_list(&layout->span, &layout->thread_node);
		}
		if (here.prev != prev)
			return fail(reader, "a list of threads changed while it was read");
		prev = node;
		node = here.next;
	}

	return true;
}

/*
 * A list that is in order has each element's prev at the one before: one that
 * has not changed under our hands, and any that is a circle without its head.
 */
static bool walk_tasks(struct linux_reader *reader, struct task_layout *layout,
		       uint64_t head, bool threads, struct task_list *list)
{
	uint64_t prev = head, node;
	struct list here;

	if (!read_at(reader, head, &here, sizeof(here)))
		return false;
	for (node = here.next; node != head; node = here.next) {
		uint64_t address = node - layout->tasks.offset;

		if (!add_task(reader, layout, list, address))
			return false;
		here = get_list(&layout->span, &layout->tasks);
		if (here.prev != prev)
			return fail(reader, "the list of tasks changed while it was read, or is broken");
		if (threads && !add_threads(reader, layout, list, address))
			return false;
		prev = node;
	}

	return true;
}

static int by_address(const void *left, const void *right)
{
	const struct linux_task *a = left, *b = right;

	return a->address < b->address ? -1 : a->address > b->address;
}

static int by_pid(const void *left, const void *right)
{
	const struct linux_task *a = left, *b = right;

	if (a->tgid != b->tgid)
		return a->tgid < b->tgid ? -1 : 1;

	return a->pid < b->pid ? -1 : a->pid > b->pid;
}

static void find_parents(struct linux_task *tasks, size_t count)
{
	size_t i;

	qsort(tasks, count, sizeof(*tasks), by_address);
	for (i = 0; i < count; i++) {
		struct linux_task key = { .address = tasks[i].parent }, *parent;

		parent = bsearch(&key, tasks, count, sizeof(*tasks), by_address);
		if (parent)
			tasks[i].ppid = parent->tgid;
	}
	qsort(tasks, count, sizeof(*tasks), by_pid);
}

bool linux_tasks(struct linux_reader *reader, bool threads,
		 struct linux_task **tasks, size_t *count)
{
	uint64_t init = address_of(reader, "init_task");
	struct task_list list = { 0 };
	struct task_layout layout;
	bool good = false;
	int attempt;

	if (!init)
		return fail(reader, "there is no init_task among the kernel's symbols");
	if (!task_layout(reader, &layout))
		return false;
	for (attempt = 0; attempt < ATTEMPTS && !good; attempt++) {
		if (is_interrupted(reader))
			break;
		list.count = 0;
		good = walk_tasks(reader, &layout, init + layout.tasks.offset,
				  threads, &list);
		if (list.count == LINUX_TASKS_MAX)
			break;
	}
	free(layout.span.data);
	if (!good) {
		free(list.tasks);
		return false;
	}
	find_parents(list.tasks, list.count);
	*tasks = list.tasks;
	*count = list.count;

	return true;
}

/* ------------------------------------------------------------------------
 * Modules
 */

struct module_layout {
	struct btf_field state, list, name, refcnt;
	/* since 6.4 an array of struct module_memory, before that two layouts */
	struct btf_field mem, core;
	struct btf_field base, size;	/* in the elements */
	uint32_t element;
	struct span span;
};

static bool module_layout(struct linux_reader *reader,
			  struct module_layout *layout)
{
	const struct btf_field *const fields[] = {
		&layout->state, &layout->list, &layout->name, &layout->refcnt,
		&layout->mem, &layout->core,
	};
	const char *element = "module_memory";

	memset(layout, 0, sizeof(*layout));
	if (!member(reader, "module", "state", 4, &layout->state) ||
	    !member(reader, "module", "list", 16, &layout->list) ||
	    !member(reader, "module", "name", 56, &layout->name))
		return false;
	/* only with CONFIG_MODULE_UNLOAD */
	btf_find_member(reader->btf, "module", "refcnt", &layout->refcnt);
	if (!btf_find_member(reader->btf, "module", "mem", &layout->mem)) {
		element = "module_layout";
		if (!member(reader, "module", "core_layout", 0, &layout->core))
			return false;
		layout->mem = layout->core;
	}
	layout->element = btf_size(reader->btf, element);
	if (!member(reader, element, "base", 8, &layout->base) ||
	    !member(reader, element, "size", 4, &layout->size))
		return false;
	if (!layout->element || layout->element > layout->mem.size ||
	    layout->base.offset > layout->element - 8 ||
	    layout->size.offset > layout->element - 4)
		return fail(reader, "struct %s is not understood", element);

	return span_new(reader, &layout->span, fields,
			sizeof(fields) / sizeof(fields[0]));
}

static void get_module(const struct module_layout *layout, uint64_t address,
		       struct linux_module *module)
{
	static const char *const states[] = {
		"live", "coming", "going", "unformed"
	};
	const struct span *span = &layout->span;
	uint32_t state = get32(span, &layout->state), i;
	const uint8_t *mem = span->data + layout->mem.offset - span->from;

	memset(module, 0, sizeof(*module));
	module->address = address;
	module->state = state < 4 ? states[state] : "?";
	get(span, &layout->name, module->name, 56);
	/* a module has one reference to itself */
	module->references = layout->refcnt.size == 4 ?
		(int32_t)get32(span, &layout->refcnt) - 1 : -1;
	for (i = 0; i + layout->element <= layout->mem.size;
	     i += layout->element) {
		uint64_t base;
		uint32_t size;

		memcpy(&base, mem + i + layout->base.offset, sizeof(base));
		memcpy(&size, mem + i + layout->size.offset, sizeof(size));
		/* the first is the code, and init sections are gone */
		if (!module->base)
			module->base = base;
		if (base)
			module->size += size;
	}
}

static bool walk_modules(struct linux_reader *reader,
			 struct module_layout *layout, uint64_t head,
			 struct linux_module *modules, size_t *count)
{
	struct span *span = &layout->span;
	uint64_t prev = head, node;
	struct list here;

	*count = 0;
	if (!read_at(reader, head, &here, sizeof(here)))
		return false;
	for (node = here.next; node != head; node = here.next) {
		uint64_t address = node - layout->list.offset;

		if (*count == LINUX_MODULES_MAX)
			return fail(reader, "the guest's list of modules has more than %d: it is broken",
				    LINUX_MODULES_MAX);
		if (is_interrupted(reader))
			return fail(reader, "interrupted");
		if (!read_at(reader, address + span->from, span->data,
			     span->size))
			return false;
		get_module(layout, address, &modules[(*count)++]);
		here = get_list(span, &layout->list);
		if (here.prev != prev)
			return fail(reader, "the list of modules changed while it was read, or is broken");
		prev = node;
	}

	return true;
}

bool linux_modules(struct linux_reader *reader, struct linux_module **modules,
		   size_t *count)
{
	uint64_t head = address_of(reader, "modules");
	struct module_layout layout;
	bool good = false;
	int attempt;

	if (!head)
		return fail(reader, "there is no (single) list 'modules' among the kernel's symbols");
	if (!module_layout(reader, &layout))
		return false;
	*modules = calloc(LINUX_MODULES_MAX, sizeof(**modules));
	if (!*modules)
		fail(reader, "out of memory");
	for (attempt = 0; *modules && attempt < ATTEMPTS && !good; attempt++) {
		good = walk_modules(reader, &layout, head, *modules, count);
		if (is_interrupted(reader) || *count == LINUX_MODULES_MAX)
			break;
	}
	free(layout.span.data);
	if (!good)
		free(*modules);

	return good;
}
