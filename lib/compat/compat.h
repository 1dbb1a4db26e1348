/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef COMPAT_H
#define COMPAT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include <kvmi/kvmi.h>
#include <libkvmi.h>

#define TIMEOUT_MS 15000
#define INT3 0xcc

/* Pages that one instruction has to do with */
#define PASSED_MAX 6

struct vcpu {
	bool is_open;			/* waits for an answer to... */
	struct kvmi_vm_event open;	/* ...this; id, seq, vcpu and data */
	unsigned int pauses_due;	/* PAUSE events that will come */
	bool breakpoints;		/* the tool has enabled these events */
	bool traps;
	bool stepping;

	/*
	 * It makes one step to get over an access that KVM cannot do in the
	 * guest's place; afterwards these pages have their rights again.
	 */
	unsigned int passing;
	struct kvmi_page_access passed[PASSED_MAX];
};

/* An INT3 of the tool's, and what was there before */
struct planted {
	uint64_t gpa;
	uint8_t original;
};

struct listener;

struct dom {
	struct kvmi_vm *vm;
	atomic_bool disconnected;

	/* For the thread that looks after it while the tool is away; compat.c */
	pid_t pid;		/* that it was made in */
	struct listener *listener;	/* whose thread it is; NULL: nobody's */
	struct dom *next;
	bool looked_after;	/* at this moment */
	bool ended;		/* there is nothing more to be seen */
	atomic_int_fast64_t seen;	/* ms: when the tool called last */

	/* A request that has to do with planted; before lock, if both */
	pthread_mutex_t request;
	struct planted *planted;	/* by gpa */
	size_t planted_count;
	size_t planted_capacity;
	bool left;			/* all has been taken out */

	pthread_mutex_t lock;		/* all below; see dom_lock() */
	struct kvmi_dom_event *first;
	struct kvmi_dom_event **last;
	size_t queued;
	struct vcpu *vcpus;
	size_t vcpu_count;
	atomic_bool wants_unhook;	/* the tool sees UNHOOK by itself */
	bool unhook_came;
	bool unhook;			/* and is ours to deal with */
	atomic_bool leaving;		/* no more events for the tool */
	bool ctx_data;			/* it has been said that there is none */
	kvmi_log_level level;		/* of... */
	char complaint[256];		/* ...what is to be said; "": nothing */
};

static inline int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);

	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* compat.c */
void complain(kvmi_log_level level, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
/* 0, or -1 and errno; complains */
int result(struct dom *dom, enum kvmi_status status,
	   const struct kvmi_error *err);
int fails(int number);

/* events.c */
/* UNHOOK is enabled, if that is allowed: status and err tell */
struct dom *dom_new(struct kvmi_vm *vm, enum kvmi_status *status,
		    struct kvmi_error *err);
/*
 * The tool's log function may call any function: it is called by dom_unlock(),
 * with what dom_complain() was told meanwhile (the first of it).
 */
void dom_lock(struct dom *dom);
void dom_unlock(struct dom *dom);
void dom_complain(struct dom *dom, kvmi_log_level level, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
void dom_free(struct dom *dom);
/* Takes over what the library has received; at the end of each request */
void dom_look(struct dom *dom);
/*
 * The same for a tool that is away: all but UNHOOK is left for it.  false: the
 * connection has ended.
 */
bool dom_look_after(struct dom *dom);
/* Waits for an event to come in, at most ms */
void dom_wait(struct dom *dom, int ms);
/* The older view's number to libkvmi-2's; -1: there is none */
int event_id(int older);
/* Everything of the tool's out, all vCPUs on their way, the connection ended */
void dom_leave(struct dom *dom);
/* Whether a vCPU has an open event, or will have: 1, 0, or -1: no such vCPU */
void dom_pause_asked(struct dom *dom, unsigned int vcpu, int by);
struct vcpu *dom_vcpu(struct dom *dom, unsigned int vcpu);

#endif
