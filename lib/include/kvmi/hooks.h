/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Breakpoints and page restrictions that come and go with the VM's life.
 *
 *	hooks = kvmi_hooks_new(&callbacks, context, &err);
 *	kvmi_hooks_add(hooks, gva, gpa, cookie, &hook, &err);
 *	...
 *	for each connection, after kvmi_vm_connect():
 *		kvmi_hooks_run(hooks, vm, stop_fd, &err);
 *		kvmi_vm_close(vm);
 *
 * or, in an event loop of your own:
 *
 *		kvmi_hooks_attach(hooks, vm, &err);
 *		kvmi_hooks_plant(hooks, &result, &err);
 *		while (!kvmi_hooks_is_leaving(hooks)) {
 *			... poll kvmi_vm_fd(vm) for kvmi_vm_poll_events(vm) ...
 *			kvmi_vm_process(vm, &err);
 *			kvmi_hooks_dispatch(hooks);
 *		}
 *		kvmi_hooks_take_out(hooks, &result, &err);
 *		kvmi_hooks_detach(hooks);
 *		kvmi_vm_close(vm);
 *
 * Rules that keep the guest alive, all of them seen to here:
 *  - A breakpoint is in memory only while its event is enabled on all vCPUs
 *    that run.
 *  - To execute an instruction that is under a breakpoint, its byte is put back
 *    for a moment; all other vCPUs stand still meanwhile, so no hit is lost.
 *    Most instructions don't have to be executed: their effect is had by
 *    setting registers.
 *  - A byte is put back only if the INT3 is still there: the guest may have
 *    rewritten its code.
 *  - To take everything out, all vCPUs are stopped; hits that are on their way
 *    are answered so that the guest runs what is there then.
 *
 * THREADS.  One set of hooks and the vm it is attached to belong to one thread
 * at a time; callbacks are called in it, within a call of a kvmi_hooks_*
 * function.  They may call kvmi_vm_* and kvmi_vcpu_* functions to read and
 * write, but none of kvmi_hooks_* unless it is said here, and must leave
 * kvmi_vm_next_event() and kvmi_vm_wait_event() alone: all events are received
 * by the hooks.
 */
#ifndef KVMI_HOOKS_H
#define KVMI_HOOKS_H

#include <kvmi/kvmi.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmi_hooks;
struct kvmi_hook;	/* a breakpoint */

/* What kvmi_hooks_callbacks.problem is about */
enum kvmi_hook_problem {
	KVMI_HOOK_GENERAL = 0,	/* hook is NULL */
	KVMI_HOOK_REFUSED = 1,	/* it cannot be planted where it is */
	KVMI_HOOK_RETIRED = 2,	/* taken out: the guest could not go on */
};

/* Each may be NULL */
struct kvmi_hooks_callbacks {
	/*
	 * A vCPU has come to the breakpoint; it stands still, event has its
	 * registers.  It goes on when this returns.  kvmi_hook_*() may be
	 * called.
	 */
	void (*hit)(struct kvmi_hook *hook, const struct kvmi_vm_event *event,
		    void *context);
	/*
	 * The guest is about to do what a restriction forbids.  CONTINUE lets
	 * this access pass, and only this one (as it does if there is no
	 * callback); RETRY and CRASH are KVM's.
	 */
	enum kvmi_action (*page)(const struct kvmi_vm_event *event,
				 void *context);
	/*
	 * Any other event of a vCPU, PAUSE events that were asked for by others
	 * included; to be answered, at once or later, but before
	 * kvmi_hooks_take_out(), and freed.  Without a callback they are
	 * answered by CONTINUE.
	 */
	void (*event)(struct kvmi_vm_event *event, void *context);
	/* In words: what went wrong and what comes of it */
	void (*problem)(struct kvmi_hook *hook, enum kvmi_hook_problem kind,
			const char *text, void *context);
	/* Is there something more urgent? Asked while many are planted. */
	bool (*interrupted)(void *context);
};

/* Returns NULL on failure.  callbacks is copied. */
struct kvmi_hooks *kvmi_hooks_new(const struct kvmi_hooks_callbacks *callbacks,
				  void *context, struct kvmi_error *err);
/* Must be detached */
void kvmi_hooks_free(struct kvmi_hooks *hooks);

/*
 * A breakpoint on the instruction at gva, which lies at gpa: 64-bit code, the
 * kernel's.  It is planted by the next kvmi_hooks_plant().
 * KVMI_ERR_BUSY: there is one at this place already, which *hook then is.
 */
enum kvmi_status kvmi_hooks_add(struct kvmi_hooks *hooks, uint64_t gva,
				uint64_t gpa, void *cookie,
				struct kvmi_hook **hook, struct kvmi_error *err);
/*
 * Takes it out first, if it is in; on failure it stays in the set.
 * KVMI_ERR_BUSY: it is out, but vCPUs that may be at it have not answered; to
 * be tried again.  Until then it is not planted, or only after the next
 * kvmi_hooks_attach().
 */
enum kvmi_status kvmi_hooks_remove(struct kvmi_hooks *hooks,
				   struct kvmi_hook *hook,
				   struct kvmi_error *err);
/* In another boot of the VM, its memory has nothing of what was there */
void kvmi_hooks_forget(struct kvmi_hooks *hooks);

/*
 * What was given to kvmi_hooks_add(); whether the breakpoint is in the guest's
 * memory now; whether it was given up (see KVMI_HOOK_RETIRED)
 */
void *kvmi_hook_cookie(const struct kvmi_hook *hook);
uint64_t kvmi_hook_gva(const struct kvmi_hook *hook);
uint64_t kvmi_hook_gpa(const struct kvmi_hook *hook);
bool kvmi_hook_is_in(const struct kvmi_hook *hook);
bool kvmi_hook_is_retired(const struct kvmi_hook *hook);
/* What is, was and will be there; 0x00 before it has been planted */
uint8_t kvmi_hook_original(const struct kvmi_hook *hook);
/* The instruction that it is on, as a disassembler writes it; never NULL */
const char *kvmi_hook_text(const struct kvmi_hook *hook);

/*
 * What the guest may do with the page of gpa without kvmi_hooks_callbacks.page
 * being asked; KVMI_PAGE_RWX: everything.  At once if attached, and again after
 * each kvmi_hooks_plant().
 */
enum kvmi_status kvmi_hooks_restrict(struct kvmi_hooks *hooks, uint64_t gpa,
				     unsigned int access,
				     struct kvmi_error *err);

/*
 * From now on all events of vm are received by hooks.  Enables UNHOOK and, if
 * there is something in the set, what kvmi_hooks_look_for_vcpus() enables.
 * On failure it is attached nevertheless.
 */
enum kvmi_status kvmi_hooks_attach(struct kvmi_hooks *hooks, struct kvmi_vm *vm,
				   struct kvmi_error *err);
/*
 * Enables the events it needs on all vCPUs that have started.  Call it before
 * the first kvmi_hooks_plant(), unless the set was not empty when it was
 * attached, and from time to time for vCPUs that were not there, or had not started,
 * before.  A breakpoint that such a vCPU meets before is the guest's problem.
 */
enum kvmi_status kvmi_hooks_look_for_vcpus(struct kvmi_hooks *hooks,
					   struct kvmi_error *err);
/* How many have the events enabled */
unsigned int kvmi_hooks_vcpus(const struct kvmi_hooks *hooks);

/*
 * For code whose last byte is on another page: where to look for the rest.
 * Without, it is looked for in the tables that vCPU 0 uses.
 */
void kvmi_hooks_set_paging(struct kvmi_hooks *hooks,
			   const struct kvmi_paging *paging);

struct kvmi_hooks_result {
	size_t in;		/* plant: are in now.  take_out: were in */
	size_t wanted;		/* plant: could be in */
	size_t left;		/* take_out: may still be in the guest */
	bool held;		/* all vCPUs stood still meanwhile */
	bool verified;		/* take_out: and seen to be out */
};

/*
 * Puts all in that are not in, the guest standing still for some of them at a
 * time, and restricts the pages.  Ends early, with KVMI_OK, if UNHOOK comes or
 * interrupted() says so.
 */
enum kvmi_status kvmi_hooks_plant(struct kvmi_hooks *hooks,
				  struct kvmi_hooks_result *result,
				  struct kvmi_error *err);

/*
 * Takes what has been received, and handles it.  Does not wait for events, but
 * for the steps that come of them.  true: there is more to be done, don't wait
 * before you call again.
 */
bool kvmi_hooks_dispatch(struct kvmi_hooks *hooks);

/* UNHOOK has come, or the connection is lost */
bool kvmi_hooks_is_leaving(const struct kvmi_hooks *hooks);
/* UNHOOK has come: the VM is about to be paused, saved or moved */
bool kvmi_hooks_is_asked_to_leave(const struct kvmi_hooks *hooks);
/* The connection has gone by itself; err (may be NULL) says why */
bool kvmi_hooks_is_lost(const struct kvmi_hooks *hooks, struct kvmi_error *err);
/* INT3s that are the guest's own, so far */
uint64_t kvmi_hooks_foreign(const struct kvmi_hooks *hooks);

/*
 * Everything out in one go; then no vCPU waits for an answer and no hit is on
 * its way.  The vm can be closed, or hooks be planted again.
 */
enum kvmi_status kvmi_hooks_take_out(struct kvmi_hooks *hooks,
				     struct kvmi_hooks_result *result,
				     struct kvmi_error *err);
/*
 * The end of a connection.  Returns how many may still be in the guest, because
 * they were not taken out or the connection was lost: if they are found there
 * after the next kvmi_hooks_attach(), they are taken for ours.
 */
size_t kvmi_hooks_detach(struct kvmi_hooks *hooks);

/*
 * All of these in one: attaches, plants, handles what comes, and takes all out
 * and detaches when UNHOOK comes, when stop_fd (-1: none) can be read from, or
 * on failure.  Looks for new vCPUs each second, and calls kvmi_vm_dispatch().
 * KVMI_OK: UNHOOK has come (see kvmi_hooks_is_asked_to_leave()), or stop_fd.
 */
enum kvmi_status kvmi_hooks_run(struct kvmi_hooks *hooks, struct kvmi_vm *vm,
				int stop_fd, struct kvmi_error *err);

#ifdef __cplusplus
}
#endif

#endif /* KVMI_HOOKS_H */
