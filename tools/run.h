/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef RUN_H
#define RUN_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "guest.h"
#include "kvmi.h"
#include "output.h"

/*
 * For commands that stay with VMs: any number of them, a thread for each.
 * What the command has put into a VM is taken out before the VM is paused, and
 * put in again when it is back.
 */

struct run;

/* A connection.  Only its thread uses it. */
struct run_vm {
	struct run *run;
	struct kvmi_vm *vm;
	struct guest guest;	/* if run_ops.kernel */
	char label[65];
	char uuid[37];
	unsigned int vcpu_count;
	bool *vcpu_done;	/* run_ops.vcpu() has worked */
	void *data;		/* the command's, zero at first */
	bool lost;		/* the connection is gone */
	bool failed;		/* give up this VM */
};

struct run_ops {
	const char *name;
	uint64_t commands;	/* besides those that this needs itself */
	uint64_t events;
	size_t data_size;
	bool kernel;		/* wait for the guest's kernel, before begin() */
	/* For each vCPU, before begin(); later for those that come later */
	enum kvmi_status (*vcpu)(struct run_vm *rv, unsigned int vcpu,
				 struct kvmi_error *err);
	/* Complains by itself if it returns false */
	bool (*begin)(struct run_vm *rv);
	/* Has to answer */
	void (*event)(struct run_vm *rv, struct kvmi_vm_event *event);
	void (*second)(struct run_vm *rv, int64_t us);	/* since the last */
	/*
	 * After begin(): take everything out.  Events may still come, also
	 * while it runs: they go to event().  Not called if the VM is lost.
	 */
	void (*end)(struct run_vm *rv);
	void (*free)(struct run_vm *rv);	/* data */
};

struct run {
	const struct run_ops *ops;
	struct one_vm one;	/* options */
	void *options;		/* of the command */

	int stop_fd;
	atomic_bool stopping;
	atomic_bool problem;
	atomic_uint_fast64_t count;	/* the command's */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned int sessions;
};

/* The options of struct one_vm that go with this */
#define RUN_OPTIONS_HELP \
"  -j, --json             print one JSON object a line\n" \
"  -m, --system-map FILE  the System.map of the guests' kernel; without it each\n" \
"                         guest's symbols are read from its own memory\n" \
ONE_VM_SOCKET_HELP

/* run->ops, one and options are set; returns the exit status */
int run_main(struct run *run);
/* Ends all, from any thread */
void run_stop(struct run *run);

/* Is rv->lost because of this? */
bool run_lost(struct run_vm *rv, enum kvmi_status status);
/* Handles what has come; false if there was nothing */
bool run_events(struct run_vm *rv);
/* Has QEMU asked to leave, or the user? */
bool run_leaving(const struct run_vm *rv);

void run_line(struct run_vm *rv, struct line *line, const char *event);
void run_registers(struct line *line, const struct kvm_regs *regs);
void run_problem(struct run_vm *rv, const char *format, ...)
	__attribute__((format(printf, 2, 3)));

#endif
