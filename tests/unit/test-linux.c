/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Lists of a Linux guest, good ones and bad ones, in memory made by hand */

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <glib.h>
#include <glib/gstdio.h>

#include "btf-maker.h"
#include "linux.h"

#define MEMORY 0x100000
#define DIRECT 0xff11000000000000ULL
#define IMAGE 0xffffffff81000000ULL
#define IMAGE_GPA 0x80000
#define IMAGE_SIZE 0x80000
#define BTF_AT 0x40000		/* in the image */
/* Beyond memory: tasks without end */
#define ENDLESS 0xffa0000000000000ULL

#define INIT_TASK (IMAGE + 0x1000)
#define MODULES (IMAGE + 0x2000)

static uint8_t memory[MEMORY];
static unsigned long reads;

enum { TASK = 0x100, MODULE = 0x200 };
/* in task_struct */
enum {
	STATE = 0x18, FLAGS = 0x2c, TASKS = 0x40, MM = 0x50, EXIT_STATE = 0x58,
	PID = 0x60, TGID = 0x64, PARENT = 0x68, NODE = 0x70, CRED = 0x80,
	COMM = 0x88, SIGNAL = 0x98,
};

static uint8_t *at(uint64_t gva, size_t size)
{
	if (gva >= IMAGE && gva - IMAGE <= IMAGE_SIZE - size)
		return memory + IMAGE_GPA + (gva - IMAGE);
	if (gva >= DIRECT && gva - DIRECT <= MEMORY - size)
		return memory + (gva - DIRECT);

	return NULL;
}

static void put(uint64_t gva, uint64_t value, size_t size)
{
	memcpy(at(gva, size), &value, size);
}

/* What of the tool and the library the code under test uses */

enum kvmi_status kvmi_vm_read_physical(struct kvmi_vm *vm, uint64_t gpa,
				       void *data, size_t size,
				       struct kvmi_error *err)
{
	(void)vm;
	reads++;
	if (gpa > MEMORY || size > MEMORY - gpa) {
		snprintf(err->message, sizeof(err->message), "no memory");
		return KVMI_ERR_NOT_FOUND;
	}
	memcpy(data, memory + gpa, size);

	return KVMI_OK;
}

enum kvmi_status guest_read(struct guest *guest, uint64_t gva, void *data,
			    size_t size, struct kvmi_error *err)
{
	(void)guest;
	reads++;
	if (gva >= ENDLESS && gva < ENDLESS + (1ULL << 40)) {
		/* a task at each multiple of TASK, with the fields read in one go */
		uint64_t task = (gva - STATE) & ~(TASK - 1ULL);
		uint64_t next = task + TASK + TASKS, prev = task - TASK + TASKS;
		uint64_t cred = DIRECT + 0x5000;

		memset(data, 0, size);
		if (size < CRED + 8 - STATE)
			return KVMI_OK;
		if (task == ENDLESS)
			prev = INIT_TASK + TASKS;
		memcpy((uint8_t *)data + TASKS - STATE, &next, 8);
		memcpy((uint8_t *)data + TASKS - STATE + 8, &prev, 8);
		memcpy((uint8_t *)data + CRED - STATE, &cred, 8);
		return KVMI_OK;
	}
	if (!at(gva, size)) {
		snprintf(err->message, sizeof(err->message), "nothing there");
		return KVMI_ERR_UNMAPPED;
	}
	memcpy(data, at(gva, size), size);

	return KVMI_OK;
}

const struct symbols *guest_symbols(const struct guest *guest,
				    const struct symbols *map)
{
	(void)guest;

	return map;
}

const struct kvmi_vm_hello *kvmi_vm_get_hello(const struct kvmi_vm *vm)
{
	static const struct kvmi_vm_hello hello = { .max_gpa = MEMORY };

	(void)vm;

	return &hello;
}

/* ------------------------------------------------------------------------ */

static void add_array(struct maker *m, uint32_t type, uint32_t count)
{
	struct btf_array array = { .type = type, .index_type = 1, .nelems = count };

	add(m, NULL, BTF_KIND_ARRAY, 0, false, 0);
	g_byte_array_append(m->types, (uint8_t *)&array, sizeof(array));
}

static GByteArray *make_btf(void)
{
	struct maker m = maker_new();
	uint32_t word = 0;

	add(&m, "int", BTF_KIND_INT, 0, false, 4);		/* 1 */
	g_byte_array_append(m.types, (uint8_t *)&word, 4);
	add(&m, "char", BTF_KIND_INT, 0, false, 1);		/* 2 */
	g_byte_array_append(m.types, (uint8_t *)&word, 4);
	add_array(&m, 2, 16);					/* 3 */
	add_array(&m, 2, 56);					/* 4 */
	add(&m, NULL, BTF_KIND_PTR, 0, false, 0);		/* 5 */
	add(&m, "list_head", BTF_KIND_STRUCT, 2, false, 16);	/* 6 */
	add_member(&m, "next", 5, 0);
	add_member(&m, "prev", 5, 64);
	add(&m, "task_struct", BTF_KIND_STRUCT, 12, false, TASK);	/* 7 */
	add_member(&m, "__state", 1, 8 * STATE);
	add_member(&m, "flags", 1, 8 * FLAGS);
	add_member(&m, "tasks", 6, 8 * TASKS);
	add_member(&m, "mm", 5, 8 * MM);
	add_member(&m, "exit_state", 1, 8 * EXIT_STATE);
	add_member(&m, "pid", 1, 8 * PID);
	add_member(&m, "tgid", 1, 8 * TGID);
	add_member(&m, "real_parent", 5, 8 * PARENT);
	add_member(&m, "thread_node", 6, 8 * NODE);
	add_member(&m, "cred", 5, 8 * CRED);
	add_member(&m, "comm", 3, 8 * COMM);
	add_member(&m, "signal", 5, 8 * SIGNAL);
	add(&m, "signal_struct", BTF_KIND_STRUCT, 1, false, 0x20);
	add_member(&m, "thread_head", 6, 8 * 0x10);
	add(&m, "cred", BTF_KIND_STRUCT, 1, false, 0x20);
	add_member(&m, "uid", 1, 8 * 8);
	add(&m, "mm_struct", BTF_KIND_STRUCT, 1, false, 0x20);
	add_member(&m, "pgd", 5, 8 * 0x18);
	add(&m, "module_memory", BTF_KIND_STRUCT, 2, false, 16);	/* 11 */
	add_member(&m, "base", 5, 0);
	add_member(&m, "size", 1, 64);
	add_array(&m, 11, 2);						/* 12 */
	add(&m, "module", BTF_KIND_STRUCT, 5, false, MODULE);
	add_member(&m, "state", 1, 0);
	add_member(&m, "list", 6, 8 * 8);
	add_member(&m, "name", 4, 8 * 24);
	add_member(&m, "mem", 12, 8 * 0x60);
	add_member(&m, "refcnt", 1, 8 * 0x100);

	return maker_end(&m);
}

static void link_list(uint64_t head, const uint64_t *nodes, size_t count)
{
	size_t i;

	for (i = 0; i <= count; i++) {
		uint64_t here = i ? nodes[i - 1] : head;
		uint64_t next = i < count ? nodes[i] : head;

		put(here, next, 8);
		put(next + 8, here, 8);
	}
}

static void put_task(uint64_t task, int pid, int tgid, uint64_t parent,
		     const char *comm)
{
	put(task + PID, pid, 4);
	put(task + TGID, tgid, 4);
	put(task + PARENT, parent, 8);
	put(task + STATE, 1, 4);
	put(task + CRED, DIRECT + 0x5000, 8);
	memcpy(at(task + COMM, 16), comm, strlen(comm));
}

/* init (1), kthreadd (2), and a child of init's with two threads (10, 11) */
static const uint64_t tasks[] = {
	DIRECT + 0x10000, DIRECT + 0x10100, DIRECT + 0x10200,
};
#define THREAD (DIRECT + 0x10300)

static struct symbols *map;
static struct guest guest;
static struct linux_reader reader;

static void set_up(void)
{
	uint64_t nodes[3], modules[2] = { DIRECT + 0x20008, DIRECT + 0x20208 };
	uint64_t threads[2] = { tasks[2] + NODE, THREAD + NODE };
	g_autoptr(GByteArray) btf = make_btf();
	size_t i;

	memset(memory, 0, sizeof(memory));
	map = symbols_new();
	symbols_add(map, INIT_TASK, 'D', "init_task", 9);
	symbols_add(map, MODULES, 'D', "modules", 7);
	symbols_add(map, IMAGE, 'D', "page_offset_base", 16);
	symbols_add(map, IMAGE + BTF_AT, 'R', "__start_BTF", 11);
	symbols_add(map, IMAGE + BTF_AT + btf->len, 'R', "__stop_BTF", 10);
	symbols_sort(map);
	put(IMAGE, DIRECT, 8);
	memcpy(at(IMAGE + BTF_AT, btf->len), btf->data, btf->len);

	put(DIRECT + 0x5008, 1000, 4);				/* cred.uid */
	put(DIRECT + 0x6018, DIRECT + 0x7000, 8);		/* mm.pgd */
	for (i = 0; i < 3; i++) {
		nodes[i] = tasks[i] + TASKS;
		put(tasks[i] + SIGNAL, DIRECT + 0x8000 + 0x100 * i, 8);
		if (i < 2)
			link_list(DIRECT + 0x8010 + 0x100 * i,
				  (uint64_t []){ tasks[i] + NODE }, 1);
	}
	put_task(tasks[0], 1, 1, INIT_TASK, "init");
	put_task(tasks[1], 2, 2, INIT_TASK, "kthreadd");
	put_task(tasks[2], 10, 10, tasks[0], "sixteen-letters!");
	put_task(THREAD, 11, 10, tasks[0], "thread");
	put(tasks[2] + MM, DIRECT + 0x6000, 8);
	put(tasks[1] + STATE, 0x402, 4);
	link_list(INIT_TASK + TASKS, nodes, 3);
	link_list(DIRECT + 0x8210, threads, 2);

	memcpy(at(DIRECT + 0x20018, 8), "evdev", 5);
	memcpy(at(DIRECT + 0x20218, 8), "button", 6);
	put(DIRECT + 0x20060, 0xffffffffc0001000, 8);
	put(DIRECT + 0x20068, 4096, 4);
	put(DIRECT + 0x20078, 999, 4);		/* of memory that is gone */
	put(DIRECT + 0x20100, 3, 4);
	put(DIRECT + 0x20200, 2, 4);		/* going */
	link_list(MODULES, modules, 2);

	g_assert_true(linux_start(&reader, &guest, map, NULL));
	reads = 0;
}

static void tear_down(void)
{
	linux_end(&reader);
	symbols_free(map);
}

static void test_tasks(void)
{
	struct linux_task *list;
	size_t count;

	set_up();
	g_assert_true(linux_tasks(&reader, false, &list, &count));
	g_assert_cmpint(count, ==, 3);
	g_assert_cmpint(list[0].pid, ==, 1);
	g_assert_cmpint(list[0].ppid, ==, 0);
	g_assert_cmpint(list[0].state, ==, 'S');
	g_assert_cmpint(list[0].uid, ==, 1000);
	g_assert_cmpint(list[1].state, ==, 'I');
	g_assert_cmpint(list[2].ppid, ==, 1);
	g_assert_cmphex(list[2].cr3, ==, 0x7000);
	g_assert_cmphex(list[1].cr3, ==, 0);
	g_assert_cmpstr(list[2].comm, ==, "sixteen-letters!");
	free(list);
	g_assert_true(linux_tasks(&reader, true, &list, &count));
	g_assert_cmpint(count, ==, 4);
	g_assert_cmpint(list[3].pid, ==, 11);
	g_assert_cmpint(list[3].tgid, ==, 10);
	g_assert_cmpstr(list[3].comm, ==, "thread");
	free(list);
	tear_down();
}

static void fails(bool threads, const char *why)
{
	struct linux_task *list;
	size_t count;

	g_assert_false(linux_tasks(&reader, threads, &list, &count));
	g_test_message("%s (%lu reads)", reader.error, reads);
	g_assert_nonnull(strstr(reader.error, why));
	tear_down();
}

static void test_bad_tasks(void)
{
	/* a circle without its head */
	set_up();
	put(tasks[2] + TASKS, tasks[0] + TASKS, 8);
	fails(false, "broken");
	g_assert_cmpint(reads, <, 200);

	/* a task that follows itself, and says that it precedes itself */
	set_up();
	put(tasks[1] + TASKS, tasks[1] + TASKS, 8);
	put(tasks[1] + TASKS + 8, tasks[1] + TASKS, 8);
	fails(false, "broken");
	g_assert_cmpint(reads, <, 200);

	/* out of memory, and to nowhere */
	set_up();
	put(tasks[1] + TASKS, DIRECT + MEMORY - 0x20, 8);
	fails(false, "nothing there");
	set_up();
	put(tasks[1] + TASKS, 0, 8);
	fails(false, "nothing there");
	set_up();
	put(tasks[1] + CRED, 0x1234, 8);
	fails(false, "0x123c");

	/* threads in a circle */
	set_up();
	put(THREAD + NODE, tasks[2] + NODE, 8);
	fails(true, "changed");

	/* without end, each element in order */
	set_up();
	put(INIT_TASK + TASKS, ENDLESS + TASKS, 8);
	fails(false, "more than");
	g_assert_cmpint(reads, <=, 2 * LINUX_TASKS_MAX + 10);
}

static void test_modules(void)
{
	struct linux_module *list;
	size_t count;

	set_up();
	g_assert_true(linux_modules(&reader, &list, &count));
	g_assert_cmpint(count, ==, 2);
	g_assert_cmpstr(list[0].name, ==, "evdev");
	g_assert_cmphex(list[0].base, ==, 0xffffffffc0001000);
	g_assert_cmpint(list[0].size, ==, 4096);
	g_assert_cmpint(list[0].references, ==, 2);
	g_assert_cmpstr(list[0].state, ==, "live");
	g_assert_cmpstr(list[1].state, ==, "going");
	free(list);
	put(DIRECT + 0x20208, DIRECT + 0x20008, 8);
	g_assert_false(linux_modules(&reader, &list, &count));
	g_assert_nonnull(strstr(reader.error, "broken"));
	tear_down();
}

/* BTF that does not have what is needed */
static void test_btf(void)
{
	char *name;

	set_up();
	name = memmem(memory, MEMORY, "real_parent", 11);
	name[0] = 'R';
	linux_end(&reader);
	g_assert_true(linux_start(&reader, &guest, map, NULL));
	fails(false, "task_struct.real_parent");

	set_up();
	linux_end(&reader);
	memory[IMAGE_GPA + BTF_AT] ^= 1;
	g_assert_false(linux_start(&reader, &guest, map, NULL));
	g_assert_nonnull(strstr(reader.error, "no BTF"));
	tear_down();
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/linux/tasks", test_tasks);
	g_test_add_func("/linux/bad-tasks", test_bad_tasks);
	g_test_add_func("/linux/modules", test_modules);
	g_test_add_func("/linux/btf", test_btf);

	return g_test_run();
}
