/*
 * The gate in front of every stop of the guest
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/aio.h"
#include "qemu/bitops.h"
#include "qemu/coroutine.h"
#include "qemu/main-loop.h"
#include "system/runstate.h"
#include "system/stop-gate.h"
#include "system/system.h"
#include "trace.h"

typedef enum StopPolicy {
    STOP_CUT,           /* no time: the guards let go at once */
    STOP_WAIT,          /* the guest runs until the guards are ready */
} StopPolicy;

typedef struct StopTransition {
    const char *name;
    StopPolicy policy;
    bool holds;             /* keeps the gate closed until stop_gate_leave() */
    bool user;              /* the user wants a pause: cont is the contrary */
    bool first;             /* its waiters are called before all others */
    uint32_t moot_by;       /* actions that make it pointless */
} StopTransition;

static const StopTransition transitions[STOP_ACTION__MAX] = {
    [STOP_ACTION_STOP]           = { "stop",           STOP_WAIT,
                                     .user = true },
    [STOP_ACTION_DEBUG]          = { "debug",          STOP_WAIT,
                                     .user = true },
    [STOP_ACTION_SAVE]           = { "save",           STOP_WAIT,
                                     .moot_by = BIT(STOP_ACTION_SHUTDOWN) },
    [STOP_ACTION_LOAD]           = { "load",           STOP_CUT },
    [STOP_ACTION_MIGRATE]        = { "migrate",        STOP_WAIT,
                                     .holds = true },
    /* Else a snapshot would have a guest in it that waits for it for ever */
    [STOP_ACTION_SUSPEND]        = { "suspend",        STOP_WAIT,
                                     .first = true,
                                     .moot_by = BIT(STOP_ACTION_LOAD) |
                                                BIT(STOP_ACTION_RESET) |
                                                BIT(STOP_ACTION_SHUTDOWN) },
    [STOP_ACTION_RESET]          = { "reset",          STOP_CUT },
    [STOP_ACTION_SHUTDOWN]       = { "shutdown",       STOP_WAIT },
    [STOP_ACTION_GUEST_PANIC]    = { "guest-panic",    STOP_CUT },
    [STOP_ACTION_IO_ERROR]       = { "io-error",       STOP_CUT },
    [STOP_ACTION_INTERNAL_ERROR] = { "internal-error", STOP_CUT },
    [STOP_ACTION_WATCHDOG]       = { "watchdog",       STOP_CUT },
    [STOP_ACTION_OTHER]          = { "other",          STOP_CUT },
};

static QLIST_HEAD(, StopGuard) guards = QLIST_HEAD_INITIALIZER(guards);
static QTAILQ_HEAD(, StopWaiter) waiters = QTAILQ_HEAD_INITIALIZER(waiters);
static unsigned int holders;

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

static bool is_ready(StopWaiter *waiter)
{
    return waiter->state == STOP_WAITER_READY ||
           waiter->state == STOP_WAITER_CANCELLED;
}

static void tell_open(void)
{
    StopGuard *guard;

    if (!stop_gate_closed()) {
        QLIST_FOREACH(guard, &guards, next) {
            guard->open(guard);
        }
    }
}

/* The next waiter to call, or NULL */
static StopWaiter *next_ready(void)
{
    StopWaiter *waiter, *ready = NULL;

    QTAILQ_FOREACH(waiter, &waiters, next) {
        if (is_ready(waiter)) {
            if (transitions[waiter->action].first) {
                return waiter;
            }
            ready = ready ?: waiter;
        }
    }
    return ready;
}

/*
 * Waiters are called from here only.  Whoever released or cancelled them may
 * be deep inside something else, such as a reset; and once out of the queue, a
 * waiter may do what it likes with the gate.
 */
static void call_waiters_bh(void *opaque)
{
    bool busy = anybody_busy();
    StopWaiter *waiter;

    QTAILQ_FOREACH(waiter, &waiters, next) {
        if (!busy && waiter->state == STOP_WAITER_WAITING) {
            waiter->state = STOP_WAITER_READY;
        }
    }

    /* One that enters now has to wait for the next time */
    while ((waiter = next_ready())) {
        bool cancelled = waiter->state == STOP_WAITER_CANCELLED;

        QTAILQ_REMOVE(&waiters, waiter, next);
        waiter->state = STOP_WAITER_IDLE;
        waiter->done(waiter, cancelled);
    }

    tell_open();
}

static void schedule_waiters(void)
{
    /* Not in qemu_get_aio_context(): draining block devices runs its BHs */
    if (!QTAILQ_EMPTY(&waiters)) {
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
    assert(waiter->state == STOP_WAITER_IDLE && !waiter->holds);
    waiter->action = action;
    if (transitions[action].holds) {
        waiter->holds = true;
        holders++;
    }

    if (transitions[action].policy == STOP_CUT) {
        stop_gate_cut(action);
        return true;
    }

    QLIST_FOREACH_SAFE(guard, &guards, next, next) {
        guard->busy = guard->announce(guard, action);
    }
    if (!anybody_busy()) {
        return true;
    }

    trace_stop_gate_wait(transitions[action].name);
    waiter->state = STOP_WAITER_WAITING;
    QTAILQ_INSERT_TAIL(&waiters, waiter, next);
    return false;
}

void stop_gate_leave(StopWaiter *waiter)
{
    if (waiter->state == STOP_WAITER_IDLE && !waiter->holds) {
        return;
    }
    if (waiter->state != STOP_WAITER_IDLE) {
        QTAILQ_REMOVE(&waiters, waiter, next);
        waiter->state = STOP_WAITER_IDLE;
    }
    if (waiter->holds) {
        waiter->holds = false;
        holders--;
    }
    trace_stop_gate_leave(transitions[waiter->action].name);
    tell_open();
}

static void cancel(StopWaiter *waiter)
{
    trace_stop_gate_cancel(transitions[waiter->action].name);
    waiter->state = STOP_WAITER_CANCELLED;
}

void stop_gate_cut(StopAction action)
{
    StopGuard *guard, *next;
    StopWaiter *waiter;

    assert(action < STOP_ACTION__MAX);
    QLIST_FOREACH_SAFE(guard, &guards, next, next) {
        guard->cut(guard, action);
    }
    QTAILQ_FOREACH(waiter, &waiters, next) {
        if (transitions[waiter->action].moot_by & BIT(action)) {
            cancel(waiter);
        }
    }
    schedule_waiters();
}

void stop_gate_cancel(void)
{
    StopGuard *guard;
    StopWaiter *waiter;

    QLIST_FOREACH(guard, &guards, next) {
        guard->cont(guard);
    }
    QTAILQ_FOREACH(waiter, &waiters, next) {
        if (transitions[waiter->action].user) {
            cancel(waiter);
        }
    }
    schedule_waiters();
}

bool stop_gate_closed(void)
{
    StopWaiter *waiter;

    if (holders) {
        return true;
    }
    QTAILQ_FOREACH(waiter, &waiters, next) {
        if (waiter->state != STOP_WAITER_CANCELLED) {
            return true;
        }
    }
    return false;
}

bool stop_gate_guarded(void)
{
    return !QLIST_EMPTY(&guards);
}

typedef struct StopRun {
    StopWaiter waiter;
    StopGateFunc *func;
    void *opaque;
} StopRun;

static void run_done(StopWaiter *waiter, bool cancelled)
{
    StopRun *run = container_of(waiter, StopRun, waiter);

    run->func(run->opaque, cancelled);
    g_free(run);
}

void stop_gate_run(StopAction action, StopGateFunc *func, void *opaque)
{
    StopRun *run = g_new0(StopRun, 1);

    run->waiter.done = run_done;
    run->func = func;
    run->opaque = opaque;
    if (stop_gate_enter(&run->waiter, action)) {
        run_done(&run->waiter, false);
    }
}

typedef struct StopCoRun {
    StopAction action;
    StopGateFunc *func;
    void *opaque;
    Coroutine *co;
} StopCoRun;

static void co_run_done(void *opaque, bool cancelled)
{
    StopCoRun *run = opaque;

    run->func(run->opaque, cancelled);
    /* Not at once: guards tell of what they did before the command ends */
    aio_co_schedule(qemu_coroutine_get_aio_context(run->co), run->co);
}

static void co_run_bh(void *opaque)
{
    StopCoRun *run = opaque;

    stop_gate_run(run->action, co_run_done, run);
}

void coroutine_fn stop_gate_co_run(StopAction action, StopGateFunc *func,
                                   void *opaque)
{
    StopCoRun run = {
        .action = action,
        .func = func,
        .opaque = opaque,
        .co = qemu_coroutine_self(),
    };

    aio_bh_schedule_oneshot(iohandler_get_aio_context(), co_run_bh, &run);
    qemu_coroutine_yield();
}

static void pause_vm(void *opaque, bool cancelled)
{
    if (!cancelled) {
        vm_stop(RUN_STATE_PAUSED);
    }
}

void stop_gate_pause(void)
{
    if (runstate_check(RUN_STATE_INMIGRATE)) {
        /* Nothing to stop yet, as for the command stop */
        autostart = 0;
        return;
    }
    stop_gate_run(STOP_ACTION_STOP, pause_vm, NULL);
}
