/*
 * The gate in front of every stop of the guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/aio.h"
#include "qemu/main-loop.h"
#include "system/runstate.h"
#include "system/stop-gate.h"
#include "trace.h"

typedef enum StopPolicy {
    STOP_CUT,           /* no time: the guards let go at once */
    STOP_WAIT,          /* the guest runs until the guards are ready */
} StopPolicy;

typedef struct StopTransition {
    const char *name;
    StopPolicy policy;
} StopTransition;

static const StopTransition transitions[STOP_ACTION__MAX] = {
    [STOP_ACTION_STOP]           = { "stop",           STOP_WAIT },
    [STOP_ACTION_DEBUG]          = { "debug",          STOP_CUT },
    [STOP_ACTION_SAVE]           = { "save",           STOP_CUT },
    [STOP_ACTION_LOAD]           = { "load",           STOP_CUT },
    [STOP_ACTION_MIGRATE]        = { "migrate",        STOP_CUT },
    [STOP_ACTION_SUSPEND]        = { "suspend",        STOP_CUT },
    [STOP_ACTION_RESET]          = { "reset",          STOP_CUT },
    [STOP_ACTION_SHUTDOWN]       = { "shutdown",       STOP_CUT },
    [STOP_ACTION_GUEST_PANIC]    = { "guest-panic",    STOP_CUT },
    [STOP_ACTION_IO_ERROR]       = { "io-error",       STOP_CUT },
    [STOP_ACTION_INTERNAL_ERROR] = { "internal-error", STOP_CUT },
    [STOP_ACTION_WATCHDOG]       = { "watchdog",       STOP_CUT },
    [STOP_ACTION_OTHER]          = { "other",          STOP_CUT },
};

static QLIST_HEAD(, StopGuard) guards = QLIST_HEAD_INITIALIZER(guards);
static QSIMPLEQ_HEAD(, StopWaiter) waiters =
    QSIMPLEQ_HEAD_INITIALIZER(waiters);

/* The reason why the VM stops, as far as the new run state tells it */
StopAction stop_action_of(RunState state)
{
    switch (state) {
    case RUN_STATE_DEBUG:
        return STOP_ACTION_DEBUG;
    case RUN_STATE_SAVE_VM:
        return STOP_ACTION_SAVE;
    case RUN_STATE_RESTORE_VM:
        return STOP_ACTION_LOAD;
    case RUN_STATE_FINISH_MIGRATE:
    case RUN_STATE_COLO:
        return STOP_ACTION_MIGRATE;
    case RUN_STATE_SHUTDOWN:
        return STOP_ACTION_SHUTDOWN;
    case RUN_STATE_GUEST_PANICKED:
        return STOP_ACTION_GUEST_PANIC;
    case RUN_STATE_IO_ERROR:
        return STOP_ACTION_IO_ERROR;
    case RUN_STATE_INTERNAL_ERROR:
        return STOP_ACTION_INTERNAL_ERROR;
    case RUN_STATE_WATCHDOG:
        return STOP_ACTION_WATCHDOG;
    default:
        return STOP_ACTION_OTHER;
    }
}

const char *stop_action_str(StopAction action)
{
    assert(action < STOP_ACTION__MAX);
    return transitions[action].name;
}

static bool anybody_busy(void)
{
    StopGuard *guard;

    QLIST_FOREACH(guard, &guards, next) {
        if (guard->busy) {
            return true;
        }
    }
    return false;
}

/*
 * Waiters are called from here only.  Whoever released or cancelled them may
 * be deep inside something else, such as a reset; and once out of the queue, a
 * waiter may do what it likes with the gate.
 */
static void call_waiters_bh(void *opaque)
{
    QSIMPLEQ_HEAD(, StopWaiter) ready = QSIMPLEQ_HEAD_INITIALIZER(ready);
    QSIMPLEQ_HEAD(, StopWaiter) rest = QSIMPLEQ_HEAD_INITIALIZER(rest);
    bool busy = anybody_busy();
    StopWaiter *waiter;

    while ((waiter = QSIMPLEQ_FIRST(&waiters))) {
        QSIMPLEQ_REMOVE_HEAD(&waiters, next);
        if (busy && !waiter->cancelled) {
            QSIMPLEQ_INSERT_TAIL(&rest, waiter, next);
        } else {
            QSIMPLEQ_INSERT_TAIL(&ready, waiter, next);
        }
    }
    QSIMPLEQ_CONCAT(&waiters, &rest);

    while ((waiter = QSIMPLEQ_FIRST(&ready))) {
        QSIMPLEQ_REMOVE_HEAD(&ready, next);
        waiter->done(waiter, waiter->cancelled);
    }
}

static void schedule_waiters(void)
{
    /* Not in qemu_get_aio_context(): draining block devices runs its BHs */
    if (!QSIMPLEQ_EMPTY(&waiters)) {
        aio_bh_schedule_oneshot(iohandler_get_aio_context(), call_waiters_bh,
                                NULL);
    }
}

void stop_gate_add(StopGuard *guard)
{
    guard->busy = false;
    QLIST_INSERT_HEAD(&guards, guard, next);
}

void stop_gate_remove(StopGuard *guard)
{
    QLIST_REMOVE(guard, next);
    if (!anybody_busy()) {
        schedule_waiters();
    }
}

void stop_gate_release(StopGuard *guard)
{
    guard->busy = false;
    if (!anybody_busy()) {
        schedule_waiters();
    }
}

bool stop_gate_enter(StopWaiter *waiter, StopAction action)
{
    StopGuard *guard, *next;

    assert(action < STOP_ACTION__MAX);
    if (transitions[action].policy == STOP_CUT) {
        stop_gate_cut(action);
        return true;
    }

    QLIST_FOREACH_SAFE(guard, &guards, next, next) {
        if (!guard->busy) {
            guard->busy = guard->announce(guard, action);
        }
    }
    if (!anybody_busy()) {
        return true;
    }

    trace_stop_gate_wait(transitions[action].name);
    waiter->cancelled = false;
    QSIMPLEQ_INSERT_TAIL(&waiters, waiter, next);
    return false;
}

void stop_gate_cut(StopAction action)
{
    StopGuard *guard, *next;

    assert(action < STOP_ACTION__MAX);
    QLIST_FOREACH_SAFE(guard, &guards, next, next) {
        guard->cut(guard, action);
    }
}

void stop_gate_cancel(void)
{
    StopWaiter *waiter;

    QSIMPLEQ_FOREACH(waiter, &waiters, next) {
        trace_stop_gate_cancel();
        waiter->cancelled = true;
    }
    schedule_waiters();
}

bool stop_gate_pending(void)
{
    StopWaiter *waiter;

    QSIMPLEQ_FOREACH(waiter, &waiters, next) {
        if (!waiter->cancelled) {
            return true;
        }
    }
    return false;
}

static void pause_done(StopWaiter *waiter, bool cancelled)
{
    if (!cancelled) {
        vm_stop(RUN_STATE_PAUSED);
    }
    g_free(waiter);
}

void stop_gate_pause(void)
{
    StopWaiter *waiter = g_new0(StopWaiter, 1);

    waiter->done = pause_done;
    if (stop_gate_enter(waiter, STOP_ACTION_STOP)) {
        pause_done(waiter, false);
    }
}
