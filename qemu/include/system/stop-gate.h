/*
 * The gate in front of every stop of the guest
 *
 * Whoever works on a running guest from outside may have something to take
 * out of it before it stops, and needs its vCPUs running to do so.  By the
 * time a VM change state handler is called, vCPUs are paused: too late.  A
 * StopGuard is told earlier.
 *
 * How much earlier depends on what stops the guest.  A user who asked for it
 * can wait a little: the caller enters the gate, the guest runs on, and the
 * caller is called back when all guards are ready.  A guest that panicked
 * can't: guards have to let go of it at once.  The table in stop-gate.c says
 * which is which.
 *
 * All functions need the BQL.  None of them blocks.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef SYSTEM_STOP_GATE_H
#define SYSTEM_STOP_GATE_H

#include "qapi/qapi-types-run-state.h"
#include "qemu/coroutine.h"
#include "qemu/queue.h"

/* What stops the guest */
typedef enum StopAction {
    STOP_ACTION_STOP,           /* QMP and HMP stop, user interface */
    STOP_ACTION_DEBUG,          /* debugger */
    STOP_ACTION_SAVE,           /* snapshot, memory dump */
    STOP_ACTION_LOAD,           /* return to a snapshot */
    STOP_ACTION_MIGRATE,        /* migration, at its set-up */
    STOP_ACTION_SUSPEND,        /* the guest goes to S3 */
    STOP_ACTION_RESET,          /* any reset */
    STOP_ACTION_SHUTDOWN,       /* power off, quit */
    STOP_ACTION_GUEST_PANIC,
    STOP_ACTION_IO_ERROR,
    STOP_ACTION_INTERNAL_ERROR,
    STOP_ACTION_WATCHDOG,
    STOP_ACTION_OTHER,
    STOP_ACTION__MAX
} StopAction;

typedef struct StopGuard StopGuard;
struct StopGuard {
    /*
     * The guest is about to stop.  True: not yet, please; the guard then
     * calls stop_gate_release() when it is ready, within a bounded time.
     * This can come again before that, for something else that stops the
     * guest.
     */
    bool (*announce)(StopGuard *guard, StopAction action);

    /* The guest stops now: let go of it, without blocking. */
    void (*cut)(StopGuard *guard, StopAction action);

    /*
     * Nobody is about to stop the guest any more.  If it runs, the guard can
     * go back to its work.  Not called when the guest runs again.
     */
    void (*open)(StopGuard *guard);

    /* The user wants the guest to run. */
    void (*cont)(StopGuard *guard);

    /* private */
    bool busy;
    QLIST_ENTRY(StopGuard) next;
};

typedef enum StopWaiterState {
    STOP_WAITER_IDLE,           /* not in the queue */
    STOP_WAITER_WAITING,
    STOP_WAITER_READY,          /* done() is about to be called */
    STOP_WAITER_CANCELLED,      /* likewise */
} StopWaiterState;

/* Set to 0, but for @done */
typedef struct StopWaiter StopWaiter;
struct StopWaiter {
    /*
     * The guest may stop.  Or, if @cancelled, it is not to: the user wants it
     * to run on, or it was reset or shut down meanwhile.  Called in the main
     * loop, outside coroutines.
     */
    void (*done)(StopWaiter *waiter, bool cancelled);

    /* private */
    StopAction action;
    StopWaiterState state;
    bool holds;
    QTAILQ_ENTRY(StopWaiter) next;
};

void stop_gate_add(StopGuard *guard);
void stop_gate_remove(StopGuard *guard);

/* @guard, which was busy, is ready for the guest to stop. */
void stop_gate_release(StopGuard *guard);

/*
 * Tell the guards that @action is about to stop the guest.  True: it may go
 * on at once.  False: @waiter is called back.
 */
bool stop_gate_enter(StopWaiter *waiter, StopAction action);

/*
 * @waiter, if it waits, doesn't want to any longer, and isn't called back.  If
 * it keeps the gate closed, as migration does from its beginning to its end,
 * it no longer does.
 */
void stop_gate_leave(StopWaiter *waiter);

/* Tell the guards that @action stops the guest now. */
void stop_gate_cut(StopAction action);

/* The user wants the guest to run on: who waits to pause it needn't. */
void stop_gate_cancel(void);

/* Is somebody about to stop the guest, be it in a while? */
bool stop_gate_closed(void);

/*
 * Is there any guard?  If not, entering the gate does nothing.
 */
bool stop_gate_guarded(void);

/* Like StopWaiter.done() */
typedef void StopGateFunc(void *opaque, bool cancelled);

/* Enter the gate and call @func when the guards are ready, maybe at once. */
void stop_gate_run(StopAction action, StopGateFunc *func, void *opaque);

/*
 * Likewise, from a coroutine: it goes on when @func has returned.  @func, which
 * probably stops the guest, runs outside coroutines: vm_stop() isn't made for
 * them.
 */
void coroutine_fn stop_gate_co_run(StopAction action, StopGateFunc *func,
                                   void *opaque);

/* Pause the guest, once the guards are ready; for who needs no answer. */
void stop_gate_pause(void);

StopAction stop_action_of(RunState state);
const char *stop_action_str(StopAction action);

#endif
