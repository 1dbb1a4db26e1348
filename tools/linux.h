/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef LINUX_H
#define LINUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "btf.h"
#include "guest.h"

/*
 * What runs in a Linux guest.  Its memory is not trusted: whatever it says,
 * nothing here reads or keeps more than the limits below.
 */
#define LINUX_TASKS_MAX 262144
#define LINUX_MODULES_MAX 4096

struct linux_reader {
	struct guest *guest;
	const struct symbols *map;
	struct btf *btf;
	uint64_t direct_map;	/* where all memory is mapped; 0: not known */
	uint64_t memory_end;
	char error[512];	/* after a failure */
};

struct linux_task {
	uint64_t address;	/* of its task_struct */
	uint64_t parent;	/* likewise */
	int32_t pid;		/* of the thread */
	int32_t tgid;		/* of the process */
	int32_t ppid;		/* 0 if the parent is not in the list */
	uint32_t uid;
	uint32_t flags;		/* PF_* */
	char state;		/* as in /proc/PID/stat */
	uint64_t cr3;		/* 0: none of its own, a kernel thread */
	char comm[17];
};

struct linux_module {
	uint64_t address;	/* of its struct module */
	uint64_t base;
	uint64_t size;		/* of all its memory */
	int32_t references;	/* -1: not known */
	const char *state;
	char name[57];
};

/*
 * After guest_find_kernel().  btf_path: NULL, or where the types are; else they
 * are read from the guest.  false: see error.
 */
bool linux_start(struct linux_reader *reader, struct guest *guest,
		 const struct symbols *map, const char *btf_path);
void linux_end(struct linux_reader *reader);

/*
 * The caller free()s *tasks.  The guest runs on meanwhile, unless its vCPUs are
 * held: a list that changes under our hands is read again, some times.
 */
bool linux_tasks(struct linux_reader *reader, bool threads,
		 struct linux_task **tasks, size_t *count);
bool linux_modules(struct linux_reader *reader, struct linux_module **modules,
		   size_t *count);

#endif
