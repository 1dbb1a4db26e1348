/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef WATCH_H
#define WATCH_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvmi/hooks.h>
#include <kvmi/kvmi.h>

#include "events.h"
#include "guest.h"
#include "symbols.h"

/*
 * kvmi watch: the main thread listens and catches signals, one thread for each
 * connection talks to KVM.
 */

/* What --break or --syscall says */
struct spec {
	char *where;
	bool syscall;		/* a hit has a system call's arguments */
};

/* More than the x86-64 kernel has */
#define SYSCALLS_MAX 512

struct watch {
	bool json;
	bool quiet;
	unsigned int show_hits;		/* print that many of each breakpoint or kind */
	uint64_t count;			/* stop after so many; 0: don't */
	struct symbols *map;		/* NULL: take the guest's own */
	struct spec *specs;
	size_t spec_count;
	bool syscalls;			/* some are --syscall */
	unsigned int spread;		/* --break-spread */
	struct events events;		/* what else is asked for */
	const char *linger;		/* --linger: a file; or NULL */

	int stop_fd;			/* readable: clean up and end */
	atomic_bool stopping;
	atomic_bool problem;		/* exit status 1 */
	atomic_uint_fast64_t hits;	/* and events */

	pthread_mutex_t lock;		/* all below */
	pthread_cond_t changed;
	struct vm_record *records;
	unsigned int record_count;
	unsigned int sessions;
};

struct breakpoint {
	const char *spec;
	bool syscall;
	char name[80];		/* for output */
	uint64_t gva;
	struct kvmi_hook *hook;	/* NULL: its place is not known */
	bool retired;		/* not for this guest */
	bool complained;
	bool was_in;
	uint64_t hits;
	uint64_t reported;	/* hits as of the last summary */
	unsigned int shown;
};

/* Events of one kind */
struct seen {
	uint64_t count;
	uint64_t reported;	/* as of the last summary */
	unsigned int shown;
};

/* A VM, whether connected or not */
struct vm_record {
	struct vm_record *next;
	bool active;		/* a session has it: only that may use it */
	uint8_t uuid[16];
	int64_t start_time;
	char name[65];
	char label[65];		/* for output */
	struct guest guest;
	uint64_t *syscall_table;	/* the guest's sys_call_table; or NULL */
	struct breakpoint *breakpoints;
	size_t breakpoint_count;
	struct seen events[EVENT_IDS];
	struct kvmi_page_access *pages;	/* of --access; NULL: not known */
	size_t page_count;
	size_t pages_given;	/* to hooks, so far */
	struct kvmi_hooks *hooks;
	struct session *session;	/* while active */
};

/* Makes record->hooks */
bool session_make_hooks(struct vm_record *record);

/* Talks to one VM until the connection ends; takes over vm */
void session_run(struct watch *watch, struct kvmi_vm *vm);

/* Finds or makes the record of a VM; NULL if another session has it */
struct vm_record *record_take(struct watch *watch, struct kvmi_vm *vm);
void record_release(struct watch *watch, struct vm_record *record);

void watch_stop(struct watch *watch);

#endif
