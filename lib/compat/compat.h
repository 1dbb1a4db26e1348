/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef COMPAT_H
#define COMPAT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

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

struct dom {
	struct kvmi_vm *vm;
	atomic_bool disconnected;

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
	bool wants_unhook;		/* the tool sees UNHOOK by itself */
	bool unhook;			/* it came */
	atomic_bool leaving;		/* no more events for the tool */
	uint32_t unhook_seq;
	bool ctx_data;			/* it has been said that there is none */
	kvmi_log_level level;		/* of... */
	char complaint[256];		/* ...what is to be said; "": nothing */
};

/* compat.c */
void complain(kvmi_log_level level, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
/* 0, or -1 and errno; complains */
int result(struct dom *dom, enum kvmi_status status,
	   const struct kvmi_error *err);
int fails(int number);

/* events.c */
struct dom *dom_new(struct kvmi_vm *vm);
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
