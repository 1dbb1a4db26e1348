/*
 * KVM introspection: the kvmi object
 *
 * Connects the VM to an introspection tool.  The chardev connects to the
 * tool; the two shake hands; then KVM gets the socket and speaks with the
 * tool by itself, and QEMU no longer reads from it, it only watches for the
 * hang-up.
 *
 * Before the guest stops, the tool is asked to leave it, which it confirms by
 * closing the socket: see system/stop-gate.h.  Whatever happens, KVM is told
 * to let go (UNHOOK) before vCPUs are paused.
 *
 * Everything is done in the main loop or with the BQL held, but for the QMP
 * commands that work out-of-band: kvmi_lock protects what they read and write.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <poll.h>
#include <linux/kvm.h>
#include "chardev/char-fe.h"
#include "chardev/char-socket.h"
#include "crypto/hash.h"
#include "crypto/secret.h"
#include "hw/i386/e820_memory_layout.h"
#include "io/channel-socket.h"
#include "migration/misc.h"
#include "migration/vmstate.h"
#include "qapi/clone-visitor.h"
#include "qapi/error.h"
#include "qapi/qapi-builtin-visit.h"
#include "qapi/qapi-commands-kvmi.h"
#include "qapi/qapi-events-kvmi.h"
#include "qapi/qapi-types-qom.h"
#include "qapi/qapi-visit-kvmi.h"
#include "qapi/qmp/qerror.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/sockets.h"
#include "qemu/timer.h"
#include "qom/object_interfaces.h"
#include "system/kvm.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "system/stop-gate.h"
#include "system/system.h"
#include "kvmi-kvm.h"
#include "kvmi-proto.h"
#include "trace.h"

#define TYPE_KVMI "kvmi"
OBJECT_DECLARE_SIMPLE_TYPE(KVMIObject, KVMI)

#define HANDSHAKE_TIMEOUT_MS 10000
#define UNHOOK_TIMEOUT_MS 5000
#define SILENCE_TIMEOUT_MS 30000

struct KVMIObject {
    Object parent;

    /* Properties */
    char *chardev;
    char *key;
    uint32_t handshake_timeout_ms;
    uint32_t unhook_timeout_ms;
    uint32_t silence_timeout_ms;    /* 0: none */
    KvmiAllowed commands;
    KvmiAllowed events;
    bool migrate_start_time;
    KvmiOnShutdown on_shutdown;
    KvmiAuth auth;

    /* Fixed when the object is complete */
    bool complete;
    char *id;
    char *peer;
    uint32_t version;
    uint8_t cookie_hash[KVMI_COOKIE_LEN];
    uint8_t *secret;            /* of auth=hmac */
    size_t secret_len;

    bool deleting;              /* deleted, but the tool is still leaving */
    int64_t start_time;         /* of the guest, Unix time */

    CharBackend chr;
    QIOChannelSocket *sioc;     /* a connection that is still good for use */
    KvmiHello hello;
    KvmiAnswerReader reader;

    KvmiState state;
    int64_t since_us;
    QEMUTimer *deadline;        /* of the handshake or of the tool's leaving */
    uint32_t deadline_ms;       /* what it was set to */
    QEMUTimer *silence;         /* while hooked: does the tool hang? */
    QEMUTimer *postcopy;        /* until all of the memory has come */
    QEMUBH *bh;

    StopGuard guard;
    VMChangeStateEntry *vmstate;
    Notifier suspend;
    Notifier wakeup;

    /* The unhook that is under way */
    KvmiAction action;
    int64_t begin_us;

    /* What was asked for by kvmi-unhook and kvmi-hook */
    bool detached;              /* no session is wanted */
    bool unhook_requested;
    bool has_unhook_ms;
    uint32_t unhook_ms;

    /* What query-kvmi tells */
    uint64_t sessions;
    uint64_t unhooks[KVMI_OUTCOME__MAX];
    bool has_last_unhook;
    KvmiUnhook last_unhook;
    bool untold;                /* no event has told of last_unhook yet */
    char *last_error;
    int64_t reports_since_us;   /* kvmi_report() */
    unsigned int reports;
};

static QemuMutex kvmi_lock;
static KVMIObject *the_kvmi;

static const KvmiAction kvmi_actions[STOP_ACTION__MAX] = {
    [STOP_ACTION_STOP] = KVMI_ACTION_STOP,
    [STOP_ACTION_DEBUG] = KVMI_ACTION_DEBUG,
    [STOP_ACTION_SAVE] = KVMI_ACTION_SAVE,
    [STOP_ACTION_LOAD] = KVMI_ACTION_LOAD,
    [STOP_ACTION_MIGRATE] = KVMI_ACTION_MIGRATE,
    [STOP_ACTION_SUSPEND] = KVMI_ACTION_SUSPEND,
    [STOP_ACTION_RESET] = KVMI_ACTION_RESET,
    [STOP_ACTION_SHUTDOWN] = KVMI_ACTION_SHUTDOWN,
    [STOP_ACTION_GUEST_PANIC] = KVMI_ACTION_GUEST_PANIC,
    [STOP_ACTION_IO_ERROR] = KVMI_ACTION_IO_ERROR,
    [STOP_ACTION_INTERNAL_ERROR] = KVMI_ACTION_INTERNAL_ERROR,
    [STOP_ACTION_WATCHDOG] = KVMI_ACTION_WATCHDOG,
    [STOP_ACTION_OTHER] = KVMI_ACTION_OTHER,
};

/* It may hang silence_timeout_ms from now at the earliest */
static void kvmi_watch_silence(KVMIObject *s, uint64_t silence_ms)
{
    if (s->state == KVMI_STATE_HOOKED && s->silence_timeout_ms) {
        timer_mod(s->silence, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                              s->silence_timeout_ms - silence_ms);
    } else {
        timer_del(s->silence);
    }
}

/* The one place where the state changes */
static void kvmi_change_state(KVMIObject *s, KvmiState state)
{
    assert(kvmi_state_change_valid(s->state, state));

    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        s->state = state;
        s->since_us = g_get_real_time();
    }
    trace_kvmi_state(s->id, KvmiState_str(state));
    kvmi_watch_silence(s, 0);
}

static int kvmi_ioctl(KVMIObject *s, unsigned long request, void *arg)
{
    int ret = kvmi_kvm_ioctl(request, arg);

    trace_kvmi_ioctl(s->id, request & 0xff, ret);
    return ret;
}

static KvmiReason kvmi_reason(uint32_t reason)
{
    switch (reason) {
    case KVM_INTROSPECTION_END_UNHOOK:
        return KVMI_REASON_UNHOOK;
    case KVM_INTROSPECTION_END_CLOSED:
        return KVMI_REASON_CLOSED;
    case KVM_INTROSPECTION_END_PROTOCOL:
        return KVMI_REASON_PROTOCOL;
    case KVM_INTROSPECTION_END_UNREAD:
        return KVMI_REASON_UNREAD;
    case KVM_INTROSPECTION_END_KILLED:
        return KVMI_REASON_KILLED;
    default:
        return KVMI_REASON_UNKNOWN;
    }
}

/* This connection won't be used any more.  The chardev makes another one. */
static void kvmi_drop_connection(KVMIObject *s)
{
    QIOChannelSocket *sioc = g_steal_pointer(&s->sioc);

    if (sioc) {
        /* The chardev sees the hang-up in its own time */
        qio_channel_shutdown(QIO_CHANNEL(sioc), QIO_CHANNEL_SHUTDOWN_BOTH,
                             NULL);
        object_unref(OBJECT(sioc));
    }
}

/*
 * What comes after an UNHOOK but need not make a stop any longer: the events,
 * and the connection's end
 */
static void kvmi_tell_unhooked(KVMIObject *s)
{
    KvmiUnhook *unhook = &s->last_unhook;

    if (!s->untold) {
        return;
    }
    s->untold = false;

    kvmi_drop_connection(s);
    qapi_event_send_kvmi_state_changed(s->id, KVMI_STATE_UNHOOKED);
    qapi_event_send_kvmi_unhooked(s->id, unhook->action, unhook->outcome,
                                  unhook->duration, unhook->has_restored,
                                  unhook->restored, unhook->has_reason,
                                  unhook->reason);
}

static void kvmi_set_state(KVMIObject *s, KvmiState state)
{
    kvmi_tell_unhooked(s);
    kvmi_change_state(s, state);
    qapi_event_send_kvmi_state_changed(s->id, state);
}

#define KVMI_REPORTS_PER_MINUTE 10

/*
 * Remember why there is no session, and say it, but not again and again: not
 * either if it is something else each time
 */
static void kvmi_report(KVMIObject *s, Error *err)
{
    const char *text = error_get_pretty(err);
    bool news = g_strcmp0(s->last_error, text);
    int64_t now = g_get_monotonic_time();

    trace_kvmi_error(s->id, text);
    if (news) {
        WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
            g_free(s->last_error);
            s->last_error = g_strdup(text);
        }
        if (now - s->reports_since_us >= 60 * G_USEC_PER_SEC) {
            s->reports_since_us = now;
            s->reports = 0;
        }
    }
    if (news && s->reports < KVMI_REPORTS_PER_MINUTE) {
        s->reports++;
        warn_reportf_err(err, "kvmi: ");
    } else {
        error_free(err);
    }
}

static void kvmi_set_deadline(KVMIObject *s, uint32_t ms)
{
    s->deadline_ms = ms;
    timer_mod(s->deadline, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms);
}

static bool kvmi_hung_up(KVMIObject *s)
{
    struct pollfd pfd = { .fd = s->sioc->fd };

    return poll(&pfd, 1, 0) == 1 && (pfd.revents & POLLHUP);
}

/*
 * KVM
 */

/*
 * Is there KVM introspection?  Returns its version, or 0.
 */
static uint32_t kvmi_version(Error **errp)
{
    int version;

    if (!kvm_enabled()) {
        error_setg(errp, "kvmi needs KVM: add -accel kvm");
        return 0;
    }

    version = kvmi_kvm_version();
    if (version > 0) {
        return version;
    }
    if (kvmi_kvm_ioctl(KVM_INTROSPECTION_UNHOOK, NULL) == -EPERM) {
        error_setg(errp, "introspection is turned off in the host's KVM: load"
                   " the module kvm with introspection=1, or boot with"
                   " kvm.introspection=1");
    } else {
        error_setg(errp, "the host's KVM is built without introspection"
                   " (CONFIG_KVM_INTROSPECTION)");
    }
    return 0;
}

static bool kvmi_allow(KVMIObject *s, unsigned long request,
                       const KvmiAllowed *allowed, Error **errp)
{
    struct kvm_introspection_feature feature = { .allow = 1, .id = -1 };
    int id, ret = 0;

    if (allowed->all) {
        ret = kvmi_ioctl(s, request, &feature);
    } else {
        for (id = 0; id < 64 && !ret; id++) {
            if (allowed->ids & (1ULL << id)) {
                feature.id = id;
                ret = kvmi_ioctl(s, request, &feature);
            }
        }
    }
    if (ret) {
        error_setg_errno(errp, -ret, "KVM refuses to allow %s %d",
                         request == KVM_INTROSPECTION_COMMAND ? "command"
                                                              : "event",
                         feature.id);
    }
    return !ret;
}

static bool kvmi_hook(KVMIObject *s, Error **errp)
{
    struct kvm_introspection_hook hook = { .fd = s->sioc->fd };
    int ret;

    memcpy(hook.uuid, qemu_uuid.data, sizeof(hook.uuid));
    ret = kvmi_ioctl(s, KVM_INTROSPECTION_HOOK, &hook);
    if (ret) {
        error_setg_errno(errp, -ret, "KVM refuses the connection");
        return false;
    }
    if (!kvmi_allow(s, KVM_INTROSPECTION_COMMAND, &s->commands, errp) ||
        !kvmi_allow(s, KVM_INTROSPECTION_EVENT, &s->events, errp)) {
        kvmi_ioctl(s, KVM_INTROSPECTION_UNHOOK, NULL);
        return false;
    }
    return true;
}

/*
 * The end of a session
 */

static void kvmi_begin(KVMIObject *s, KvmiAction action)
{
    trace_kvmi_gate_begin(s->id, KvmiAction_str(action));
    s->action = action;
    s->begin_us = g_get_monotonic_time();
}

/*
 * Did a tool that hung up when it was asked to leave do it in order?  UNHOOK as
 * the reason is a close that QEMU has seen before KVM.
 */
static bool kvmi_left_in_order(const KvmiUnhook *unhook)
{
    return !unhook->restored &&
           (!unhook->has_reason || unhook->reason == KVMI_REASON_CLOSED ||
            unhook->reason == KVMI_REASON_UNHOOK);
}

/* KVM lets go of the guest.  Every session ends here. */
static void kvmi_unhook(KVMIObject *s, KvmiOutcome outcome)
{
    bool waited = s->state == KVMI_STATE_UNHOOKING;
    KvmiUnhook unhook = { .action = s->action, .outcome = outcome };
    struct kvm_introspection_status status = { };
    int ret;

    timer_del(s->deadline);
    ret = kvmi_ioctl(s, KVM_INTROSPECTION_UNHOOK, NULL);
    unhook.duration = g_get_monotonic_time() - s->begin_us;
    trace_kvmi_unhook(s->id, ret);
    if (kvmi_ioctl(s, KVM_INTROSPECTION_STATUS, &status) == 0) {
        unhook.has_restored = true;
        unhook.restored = status.restored;
        unhook.has_reason = true;
        unhook.reason = kvmi_reason(status.reason);
    }
    if (outcome == KVMI_OUTCOME_CLEAN && !kvmi_left_in_order(&unhook)) {
        unhook.outcome = KVMI_OUTCOME_DISCONNECTED;
    }
    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        s->unhooks[unhook.outcome]++;
        s->last_unhook = unhook;
        s->has_last_unhook = true;
    }
    trace_kvmi_gate_end(s->id, KvmiAction_str(unhook.action),
                        KvmiOutcome_str(unhook.outcome), unhook.duration);

    kvmi_change_state(s, KVMI_STATE_UNHOOKED);
    s->untold = true;
    qemu_bh_schedule(s->bh);
    if (waited) {
        /* What has waited comes first, the BH tells afterwards */
        stop_gate_release(&s->guard);
    } else {
        kvmi_tell_unhooked(s);
    }
}

/* Ask the tool to leave.  True if the guest has to run on for that. */
static bool kvmi_ask(KVMIObject *s, KvmiAction action)
{
    int ret;

    kvmi_begin(s, action);
    ret = kvmi_ioctl(s, KVM_INTROSPECTION_PREUNHOOK, NULL);
    trace_kvmi_preunhook(s->id, ret);
    if (ret) {
        kvmi_unhook(s, s->sioc && !kvmi_hung_up(s)
                       ? KVMI_OUTCOME_NOT_SUBSCRIBED
                       : KVMI_OUTCOME_DISCONNECTED);
        return false;
    }

    kvmi_set_state(s, KVMI_STATE_UNHOOKING);
    kvmi_set_deadline(s, s->unhook_timeout_ms);
    return true;
}

static void kvmi_stop_handshake(KVMIObject *s)
{
    timer_del(s->deadline);
    kvmi_drop_connection(s);
    kvmi_set_state(s, KVMI_STATE_CONNECTING);
}

static void kvmi_cut_off(KVMIObject *s, KvmiAction action)
{
    switch (s->state) {
    case KVMI_STATE_HANDSHAKE:
        kvmi_stop_handshake(s);
        break;
    case KVMI_STATE_HOOKED:
        kvmi_begin(s, action);
        kvmi_unhook(s, KVMI_OUTCOME_FORCED);
        break;
    case KVMI_STATE_UNHOOKING:
        s->action = action;
        kvmi_unhook(s, KVMI_OUTCOME_FORCED);
        /* It may be QEMU's end, without another BH */
        kvmi_tell_unhooked(s);
        break;
    default:
        break;
    }
}

static void kvmi_cut(StopGuard *guard, StopAction action)
{
    kvmi_cut_off(container_of(guard, KVMIObject, guard), kvmi_actions[action]);
}

static bool kvmi_announce(StopGuard *guard, StopAction action)
{
    KVMIObject *s = container_of(guard, KVMIObject, guard);

    if (action == STOP_ACTION_SHUTDOWN &&
        s->on_shutdown == KVMI_ON_SHUTDOWN_CUT) {
        kvmi_cut(guard, action);
        return false;
    }

    switch (s->state) {
    case KVMI_STATE_HANDSHAKE:
        kvmi_stop_handshake(s);
        break;
    case KVMI_STATE_HOOKED:
        return kvmi_ask(s, kvmi_actions[action]);
    case KVMI_STATE_UNHOOKING:
        return true;
    default:
        break;
    }
    /* The gate may stay closed for a while: nobody is wanted meanwhile */
    qemu_bh_schedule(s->bh);
    return false;
}

/*
 * The beginning of a session
 */

static void kvmi_fail(KVMIObject *s, Error *err)
{
    kvmi_report(s, err);
    /* The chardev may have found out first */
    if (s->state == KVMI_STATE_HANDSHAKE) {
        kvmi_stop_handshake(s);
    }
}

static uint64_t kvmi_max_gpa(void)
{
    uint64_t address, length, end = 0;
    int i, n = e820_get_table(NULL);

    for (i = 0; i < n; i++) {
        if (e820_get_entry(i, E820_RAM, &address, &length)) {
            end = MAX(end, address + length);
        }
    }
    return end;
}

static bool kvmi_send(KVMIObject *s, const void *buf, size_t len, Error **errp)
{
    if (qemu_chr_fe_write(&s->chr, buf, len) != len) {
        error_setg(errp, "can't send the handshake to the tool");
        return false;
    }
    return true;
}

static void kvmi_start_handshake(KVMIObject *s)
{
    Error *err = NULL;

    kvmi_set_state(s, KVMI_STATE_HANDSHAKE);
    kvmi_set_deadline(s, s->handshake_timeout_ms);
    kvmi_answer_start(&s->reader);

    kvmi_hello_init(&s->hello, &qemu_uuid, qemu_name, s->start_time,
                    kvmi_max_gpa());
    if ((s->auth == KVMI_AUTH_HMAC && !kvmi_hello_hmac(&s->hello, &err)) ||
        !kvmi_send(s, &s->hello, s->hello.struct_size, &err)) {
        kvmi_fail(s, err);
    }
}

static bool kvmi_authenticate(KVMIObject *s, Error **errp)
{
    KvmiProof proof;

    if (!s->key) {
        return true;
    }
    if (s->auth == KVMI_AUTH_HMAC) {
        return kvmi_hmac_check(&s->hello, &s->reader.answer, s->secret,
                               s->secret_len, &proof, errp) &&
               kvmi_send(s, &proof, sizeof(proof), errp);
    }
    if (!kvmi_cookie_equal(s->reader.answer.cookie_hash, s->cookie_hash)) {
        error_setg(errp, "the tool has the wrong key (or none): its answer"
                   " does not match secret '%s'", s->key);
        return false;
    }
    return true;
}

static void kvmi_finish_handshake(KVMIObject *s)
{
    Error *err = NULL;

    timer_del(s->deadline);
    if (!kvmi_authenticate(s, &err) || !kvmi_hook(s, &err)) {
        kvmi_fail(s, err);
        return;
    }

    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        s->sessions++;
        g_clear_pointer(&s->last_error, g_free);
    }
    kvmi_set_state(s, KVMI_STATE_HOOKED);
}

/* How often to look whether the rest of the memory has come */
#define KVMI_POSTCOPY_POLL_MS 200

/* Look for a session if the guest runs and goes on running. */
static void kvmi_update(KVMIObject *s)
{
    bool wanted = s->complete && !s->deleting && runstate_is_running() &&
                  !stop_gate_closed();

    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        wanted = wanted && !s->detached;
    }

    /*
     * Whoever reads memory for the tool may have to wait until it has come,
     * and UNHOOK for them: if the source is lost meanwhile, for ever.
     */
    if (wanted && migration_in_incoming_postcopy()) {
        wanted = false;
        timer_mod(s->postcopy, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                               KVMI_POSTCOPY_POLL_MS);
    }

    if (wanted && s->state == KVMI_STATE_UNHOOKED) {
        kvmi_set_state(s, KVMI_STATE_CONNECTING);
    }
    if (wanted && s->state == KVMI_STATE_CONNECTING && s->sioc) {
        kvmi_start_handshake(s);
    }
    if (!wanted && s->state == KVMI_STATE_HANDSHAKE) {
        kvmi_stop_handshake(s);
    }
    if (!wanted && s->state == KVMI_STATE_CONNECTING) {
        kvmi_set_state(s, KVMI_STATE_UNHOOKED);
    }
}

/*
 * The chardev
 */

/*
 * Nothing is ever read but the tool's answer: the rest is for KVM.  Without
 * anything to read, the chardev only watches for the hang-up.
 */
static int kvmi_can_read(void *opaque)
{
    KVMIObject *s = opaque;

    if (s->state != KVMI_STATE_HANDSHAKE || !s->sioc) {
        return 0;
    }
    return MIN(kvmi_answer_wanted(&s->reader), 4096);
}

static void kvmi_read(void *opaque, const uint8_t *buf, int size)
{
    KVMIObject *s = opaque;
    Error *err = NULL;

    if (s->state != KVMI_STATE_HANDSHAKE || !s->sioc) {
        /* The handshake was stopped after the chardev had asked how much */
        return;
    }
    if (!kvmi_answer_feed(&s->reader, buf, size, &err)) {
        kvmi_fail(s, err);
    } else if (!kvmi_answer_wanted(&s->reader)) {
        kvmi_finish_handshake(s);
    }
}

static void kvmi_opened(KVMIObject *s)
{
    SocketChardev *sock = SOCKET_CHARDEV(s->chr.chr);

    trace_kvmi_connected(s->id, s->peer);
    kvmi_tell_unhooked(s);
    kvmi_drop_connection(s);
    s->sioc = QIO_CHANNEL_SOCKET(object_ref(OBJECT(sock->sioc)));
    if (kvmi_hung_up(s)) {
        /* What another kvmi object has left; the chardev will notice, too */
        kvmi_drop_connection(s);
    }
    kvmi_update(s);
}

static void kvmi_closed(KVMIObject *s)
{
    Error *err = NULL;

    trace_kvmi_hangup(s->id, KvmiState_str(s->state));

    switch (s->state) {
    case KVMI_STATE_HANDSHAKE:
        error_setg(&err, "the tool closed the connection during the"
                   " handshake");
        kvmi_fail(s, err);
        break;
    case KVMI_STATE_HOOKED:
        kvmi_begin(s, KVMI_ACTION_NONE);
        kvmi_unhook(s, KVMI_OUTCOME_DISCONNECTED);
        break;
    case KVMI_STATE_UNHOOKING:
        kvmi_unhook(s, KVMI_OUTCOME_CLEAN);
        break;
    default:
        kvmi_drop_connection(s);
        break;
    }
}

static void kvmi_chr_event(void *opaque, QEMUChrEvent event)
{
    switch (event) {
    case CHR_EVENT_OPENED:
        kvmi_opened(opaque);
        break;
    case CHR_EVENT_CLOSED:
        kvmi_closed(opaque);
        break;
    default:
        break;
    }
}

static bool kvmi_check_chardev(KVMIObject *s, Chardev *chr, Error **errp)
{
    SocketChardev *sock;

    if (!object_dynamic_cast(OBJECT(chr), TYPE_CHARDEV_SOCKET)) {
        error_setg(errp, "chardev '%s' is not a socket", s->chardev);
        return false;
    }
    sock = SOCKET_CHARDEV(chr);
    if (sock->addr->type != SOCKET_ADDRESS_TYPE_UNIX &&
        sock->addr->type != SOCKET_ADDRESS_TYPE_VSOCK) {
        error_setg(errp, "chardev '%s' is neither a unix nor a vsock socket",
                   s->chardev);
        return false;
    }
    if (sock->tls_creds || sock->is_telnet || sock->is_tn3270 ||
        sock->is_websock) {
        error_setg(errp, "chardev '%s' is not a plain socket: KVM can't do"
                   " TLS, telnet or websocket", s->chardev);
        return false;
    }
    if (sock->is_listen) {
        error_setg(errp, "chardev '%s' is a server, but it is the tool that"
                   " listens: use server=off", s->chardev);
        return false;
    }
    if (!sock->reconnect_time_ms) {
        error_setg(errp, "chardev '%s' doesn't reconnect: add reconnect-ms="
                   "1000 or the like", s->chardev);
        return false;
    }
    return true;
}

/*
 * Other callbacks
 */

static void kvmi_deadline(void *opaque)
{
    KVMIObject *s = opaque;
    Error *err = NULL;

    switch (s->state) {
    case KVMI_STATE_HANDSHAKE:
        error_setg(&err, "the tool did not answer the handshake within"
                   " %" PRIu32 " ms (handshake-timeout-ms)", s->deadline_ms);
        kvmi_fail(s, err);
        break;
    case KVMI_STATE_UNHOOKING:
        warn_report("kvmi: the tool did not leave the guest within %" PRIu32
                    " ms (unhook-timeout-ms, or what kvmi-unhook asked for):"
                    " cut off", s->deadline_ms);
        kvmi_unhook(s, KVMI_OUTCOME_FORCED);
        break;
    default:
        break;
    }
}

/*
 * A tool that hangs with an event open keeps a vCPU from running.  The guest
 * must not need somebody who stops it to be rid of that.
 */
static void kvmi_check_silence(void *opaque)
{
    KVMIObject *s = opaque;
    struct kvm_introspection_status status = { };

    kvmi_ioctl(s, KVM_INTROSPECTION_STATUS, &status);
    if (status.silence < s->silence_timeout_ms) {
        kvmi_watch_silence(s, status.silence);
        return;
    }
    warn_report("kvmi: the tool has kept the guest waiting for %" PRIu64
                " ms without a word (silence-timeout-ms): cut off",
                (uint64_t)status.silence);
    kvmi_cut_off(s, KVMI_ACTION_SILENCE);
}

static void kvmi_finish_deletion(KVMIObject *s)
{
    if (s != the_kvmi) {
        return;
    }
    kvmi_tell_unhooked(s);
    kvmi_drop_connection(s);
    qemu_chr_fe_deinit(&s->chr, false);
    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        the_kvmi = NULL;
    }
    object_unref(OBJECT(s));
}

/* Do what kvmi-unhook has asked for */
static void kvmi_obey(KVMIObject *s)
{
    bool requested, has_ms;
    uint32_t ms;

    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        requested = s->unhook_requested;
        has_ms = s->has_unhook_ms;
        ms = s->unhook_ms;
        s->unhook_requested = false;
    }
    if (!requested) {
        return;
    }

    switch (s->state) {
    case KVMI_STATE_HOOKED:
        if (has_ms && !ms) {
            kvmi_cut_off(s, KVMI_ACTION_UNHOOK);
        } else if (kvmi_ask(s, KVMI_ACTION_UNHOOK)) {
            s->guard.busy = true;
            if (has_ms) {
                kvmi_set_deadline(s, ms);
            }
        }
        break;
    case KVMI_STATE_UNHOOKING:
        /* It is being waited for: cut that short */
        if (!has_ms || !ms) {
            kvmi_unhook(s, KVMI_OUTCOME_FORCED);
        } else if (qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms <
                   timer_expire_time_ns(s->deadline) / SCALE_MS) {
            kvmi_set_deadline(s, ms);
        }
        break;
    default:
        break;
    }
}

/* What can't be done inside a callback of the chardev or of a stop */
static void kvmi_bh(void *opaque)
{
    KVMIObject *s = opaque;

    kvmi_tell_unhooked(s);
    kvmi_obey(s);
    if (!s->deleting) {
        kvmi_update(s);
    } else if (s->state == KVMI_STATE_UNHOOKED) {
        kvmi_finish_deletion(s);
    }
}

static void kvmi_attach(KVMIObject *s)
{
    s->detached = false;
    qemu_bh_schedule(s->bh);
}

static void kvmi_cont(StopGuard *guard)
{
    QEMU_LOCK_GUARD(&kvmi_lock);
    kvmi_attach(container_of(guard, KVMIObject, guard));
}

static void kvmi_open(StopGuard *guard)
{
    qemu_bh_schedule(container_of(guard, KVMIObject, guard)->bh);
}

/*
 * When the guest stops, the gate has done what was urgent.  The rest need not
 * make the stop any longer.
 */
static void kvmi_vm_state_change(void *opaque, bool running, RunState state)
{
    KVMIObject *s = opaque;

    qemu_bh_schedule(s->bh);
}

static void kvmi_suspend(Notifier *notifier, void *data)
{
    qemu_bh_schedule(container_of(notifier, KVMIObject, suspend)->bh);
}

static void kvmi_wakeup(Notifier *notifier, void *data)
{
    qemu_bh_schedule(container_of(notifier, KVMIObject, wakeup)->bh);
}

static void kvmi_reset(void *opaque)
{
    KVMIObject *s = opaque;

    s->start_time = g_get_real_time() / G_USEC_PER_SEC;
}

/*
 * Only if it is asked for: with it, the target must have an object that
 * expects it.
 */
static const VMStateDescription vmstate_kvmi = {
    .name = "kvmi",
    .version_id = 1,
    .minimum_version_id = 1,
    .fields = (const VMStateField[]) {
        VMSTATE_INT64(start_time, KVMIObject),
        VMSTATE_END_OF_LIST()
    },
};

/*
 * The object
 */

/* Nothing of a key stays in the heap */
static void kvmi_forget(uint8_t *key, size_t len)
{
    if (key) {
        explicit_bzero(key, len);
        g_free(key);
    }
}

static bool kvmi_load_key(KVMIObject *s, Error **errp)
{
    g_autofree uint8_t *hash = NULL;
    size_t cookie_len, hash_len;
    uint8_t *cookie;
    int ret;

    if (!s->key) {
        if (s->auth == KVMI_AUTH_HMAC) {
            error_setg(errp, "auth=hmac needs a key: the id of a secret"
                       " object");
            return false;
        }
        return true;
    }
    if (qcrypto_secret_lookup(s->key, &cookie, &cookie_len, errp) < 0) {
        return false;
    }
    if (s->auth == KVMI_AUTH_HMAC) {
        s->secret = cookie;
        s->secret_len = cookie_len;
        return true;
    }
    ret = qcrypto_hash_bytes(QCRYPTO_HASH_ALGO_SHA1, (char *)cookie, cookie_len,
                             &hash, &hash_len, errp);
    kvmi_forget(cookie, cookie_len);
    if (ret < 0) {
        return false;
    }
    assert(hash_len == KVMI_COOKIE_LEN);
    memcpy(s->cookie_hash, hash, hash_len);
    return true;
}

/*
 * Migration, in either direction, uses what is registered without a lock.  Not
 * about an incoming one as long as the guest doesn't run.
 */
static bool kvmi_migrating(void)
{
    return migration_is_running() || migration_in_incoming_postcopy();
}

static void kvmi_complete(UserCreatable *uc, Error **errp)
{
    KVMIObject *s = KVMI(uc);
    Chardev *chr;

    if (!s->chardev) {
        error_setg(errp, QERR_MISSING_PARAMETER, "chardev");
        return;
    }
    if (the_kvmi && !the_kvmi->deleting) {
        error_setg(errp, "there is already a kvmi object, '%s'", the_kvmi->id);
        return;
    }

    s->version = kvmi_version(errp);
    if (!s->version) {
        return;
    }
    if (s->version != 1) {
        error_setg(errp, "the host's KVM speaks version %" PRIu32
                   " of KVMI, this QEMU version 1", s->version);
        return;
    }
    if (!kvmi_load_key(s, errp)) {
        return;
    }

    chr = qemu_chr_find(s->chardev);
    if (!chr) {
        error_setg(errp, "chardev '%s' not found", s->chardev);
        return;
    }
    if (!kvmi_check_chardev(s, chr, errp)) {
        return;
    }
    if (s->migrate_start_time && kvmi_migrating()) {
        error_setg(errp, "can't add a kvmi object with migrate-start-time=on"
                   " during a migration: wait for its end");
        return;
    }
    if (the_kvmi) {
        /* It has waited long enough for its tool, and may have the chardev */
        kvmi_cut_off(the_kvmi, KVMI_ACTION_OBJECT_DEL);
        kvmi_finish_deletion(the_kvmi);
    }
    if (!qemu_chr_fe_init(&s->chr, chr, errp)) {
        return;
    }

    s->id = g_strdup(object_get_canonical_path_component(OBJECT(s)));
    s->peer = socket_uri(SOCKET_CHARDEV(chr)->addr);
    s->since_us = g_get_real_time();
    s->start_time = s->since_us / G_USEC_PER_SEC;
    s->deadline = timer_new_ms(QEMU_CLOCK_REALTIME, kvmi_deadline, s);
    s->silence = timer_new_ms(QEMU_CLOCK_REALTIME, kvmi_check_silence, s);
    s->postcopy = timer_new_ms(QEMU_CLOCK_REALTIME, kvmi_bh, s);
    /* Not in qemu_get_aio_context(): it can wait until the guest has stopped */
    s->bh = aio_bh_new(iohandler_get_aio_context(), kvmi_bh, s);
    s->guard.announce = kvmi_announce;
    s->guard.cut = kvmi_cut;
    s->guard.open = kvmi_open;
    s->guard.cont = kvmi_cont;
    stop_gate_add(&s->guard);
    s->vmstate = qemu_add_vm_change_state_handler(kvmi_vm_state_change, s);
    s->suspend.notify = kvmi_suspend;
    qemu_register_suspend_notifier(&s->suspend);
    s->wakeup.notify = kvmi_wakeup;
    qemu_register_wakeup_notifier(&s->wakeup);
    qemu_register_reset_nosnapshotload(kvmi_reset, s);
    if (s->migrate_start_time) {
        vmstate_register_any(NULL, &vmstate_kvmi, s);
    }
    s->complete = true;
    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        the_kvmi = s;
    }

    kvmi_update(s);
    qemu_chr_fe_set_handlers(&s->chr, kvmi_can_read, kvmi_read, kvmi_chr_event,
                             NULL, s, NULL, true);
}

static bool kvmi_can_be_deleted(UserCreatable *uc)
{
    return !KVMI(uc)->migrate_start_time ||
           !(kvmi_migrating() || runstate_check(RUN_STATE_INMIGRATE));
}

/*
 * The object goes, but it lives on until the tool has left the guest: nobody
 * may wait here.
 */
static void kvmi_unparent(Object *obj)
{
    KVMIObject *s = KVMI(obj);

    if (!s->complete) {
        return;
    }
    object_ref(obj);
    s->deleting = true;
    if (s->migrate_start_time) {
        vmstate_unregister(NULL, &vmstate_kvmi, s);
    }
    kvmi_update(s);
    if (s->state == KVMI_STATE_HOOKED) {
        s->guard.busy = kvmi_ask(s, KVMI_ACTION_OBJECT_DEL);
    }
    if (s->state == KVMI_STATE_UNHOOKED) {
        kvmi_finish_deletion(s);
    }
}

static void kvmi_init(Object *obj)
{
    KVMIObject *s = KVMI(obj);

    s->state = KVMI_STATE_UNHOOKED;
    s->handshake_timeout_ms = HANDSHAKE_TIMEOUT_MS;
    s->unhook_timeout_ms = UNHOOK_TIMEOUT_MS;
    s->silence_timeout_ms = SILENCE_TIMEOUT_MS;
    s->commands.all = true;
    s->events.all = true;
}

static void kvmi_finalize(Object *obj)
{
    KVMIObject *s = KVMI(obj);

    if (s->complete) {
        qemu_unregister_reset(kvmi_reset, s);
        notifier_remove(&s->wakeup);
        notifier_remove(&s->suspend);
        qemu_del_vm_change_state_handler(s->vmstate);
        stop_gate_remove(&s->guard);
        qemu_bh_delete(s->bh);
        timer_free(s->postcopy);
        timer_free(s->silence);
        timer_free(s->deadline);
    }
    g_free(s->chardev);
    g_free(s->key);
    kvmi_forget(s->secret, s->secret_len);
    g_free(s->id);
    g_free(s->peer);
    g_free(s->last_error);
}

static bool kvmi_may_set(KVMIObject *s, const char *name, Error **errp)
{
    if (s->complete) {
        error_setg(errp, "property '%s' can't be changed any more", name);
    }
    return !s->complete;
}

static char *kvmi_get_chardev(Object *obj, Error **errp)
{
    return g_strdup(KVMI(obj)->chardev);
}

static void kvmi_set_chardev(Object *obj, const char *value, Error **errp)
{
    KVMIObject *s = KVMI(obj);

    if (kvmi_may_set(s, "chardev", errp)) {
        g_free(s->chardev);
        s->chardev = g_strdup(value);
    }
}

static char *kvmi_get_key(Object *obj, Error **errp)
{
    return g_strdup(KVMI(obj)->key);
}

static void kvmi_set_key(Object *obj, const char *value, Error **errp)
{
    KVMIObject *s = KVMI(obj);

    if (kvmi_may_set(s, "key", errp)) {
        g_free(s->key);
        s->key = g_strdup(value);
    }
}

/* Timeouts can be changed at any time; the next wait takes them. */
static void kvmi_get_ms(Object *obj, Visitor *v, const char *name,
                        void *opaque, Error **errp)
{
    uint32_t value = *(uint32_t *)((char *)obj + (uintptr_t)opaque);

    visit_type_uint32(v, name, &value, errp);
}

static void kvmi_set_ms(Object *obj, Visitor *v, const char *name,
                        void *opaque, Error **errp)
{
    KVMIObject *s = KVMI(obj);
    uint32_t value;

    if (!visit_type_uint32(v, name, &value, errp)) {
        return;
    }
    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        *(uint32_t *)((char *)obj + (uintptr_t)opaque) = value;
    }
    if (s->complete) {
        kvmi_watch_silence(s, 0);
    }
}

static void kvmi_get_allowed(Object *obj, Visitor *v, const char *name,
                             void *opaque, Error **errp)
{
    KVMIObject *s = KVMI(obj);
    KvmiIdSpace space = (uintptr_t)opaque;
    strList *list = kvmi_allowed_names(space == KVMI_COMMANDS ? &s->commands
                                                              : &s->events,
                                       space);

    visit_type_strList(v, name, &list, errp);
    qapi_free_strList(list);
}

static void kvmi_set_allowed(Object *obj, Visitor *v, const char *name,
                             void *opaque, Error **errp)
{
    KVMIObject *s = KVMI(obj);
    KvmiIdSpace space = (uintptr_t)opaque;
    strList *list = NULL;

    if (kvmi_may_set(s, name, errp) &&
        visit_type_strList(v, name, &list, errp)) {
        kvmi_allowed_parse(space == KVMI_COMMANDS ? &s->commands : &s->events,
                           space, list, errp);
        qapi_free_strList(list);
    }
}

static bool kvmi_get_migrate_start_time(Object *obj, Error **errp)
{
    return KVMI(obj)->migrate_start_time;
}

static void kvmi_set_migrate_start_time(Object *obj, bool value, Error **errp)
{
    KVMIObject *s = KVMI(obj);

    if (kvmi_may_set(s, "migrate-start-time", errp)) {
        s->migrate_start_time = value;
    }
}

static int kvmi_get_auth(Object *obj, Error **errp)
{
    return KVMI(obj)->auth;
}

static void kvmi_set_auth(Object *obj, int value, Error **errp)
{
    KVMIObject *s = KVMI(obj);

    if (kvmi_may_set(s, "auth", errp)) {
        s->auth = value;
    }
}

static int kvmi_get_on_shutdown(Object *obj, Error **errp)
{
    return KVMI(obj)->on_shutdown;
}

/* Can be changed at any time, too */
static void kvmi_set_on_shutdown(Object *obj, int value, Error **errp)
{
    KVMI(obj)->on_shutdown = value;
}

static void kvmi_class_init(ObjectClass *oc, void *data)
{
    UserCreatableClass *ucc = USER_CREATABLE_CLASS(oc);

    ucc->complete = kvmi_complete;
    ucc->can_be_deleted = kvmi_can_be_deleted;
    oc->unparent = kvmi_unparent;

    object_class_property_add_str(oc, "chardev",
                                  kvmi_get_chardev, kvmi_set_chardev);
    object_class_property_set_description(oc, "chardev",
        "client socket (unix, vsock) that connects to the tool");
    object_class_property_add_str(oc, "key", kvmi_get_key, kvmi_set_key);
    object_class_property_set_description(oc, "key",
        "id of the secret that the tool has to know");
    object_class_property_add(oc, "handshake-timeout-ms", "uint32",
        kvmi_get_ms, kvmi_set_ms, NULL,
        (void *)offsetof(KVMIObject, handshake_timeout_ms));
    object_class_property_set_description(oc, "handshake-timeout-ms",
        "how long a tool may take to answer");
    object_class_property_add(oc, "unhook-timeout-ms", "uint32",
        kvmi_get_ms, kvmi_set_ms, NULL,
        (void *)offsetof(KVMIObject, unhook_timeout_ms));
    object_class_property_set_description(oc, "unhook-timeout-ms",
        "how long a tool may take to leave the guest before it stops");
    object_class_property_add(oc, "silence-timeout-ms", "uint32",
        kvmi_get_ms, kvmi_set_ms, NULL,
        (void *)offsetof(KVMIObject, silence_timeout_ms));
    object_class_property_set_description(oc, "silence-timeout-ms",
        "how long a tool may keep the guest waiting without a word");
    object_class_property_add(oc, "commands", "strList",
        kvmi_get_allowed, kvmi_set_allowed, NULL, (void *)KVMI_COMMANDS);
    object_class_property_set_description(oc, "commands",
        "commands that tools may use, by name, pattern or number");
    object_class_property_add(oc, "events", "strList",
        kvmi_get_allowed, kvmi_set_allowed, NULL, (void *)KVMI_EVENTS);
    object_class_property_set_description(oc, "events",
        "events that tools may use, by name, pattern or number");
    object_class_property_add_bool(oc, "migrate-start-time",
        kvmi_get_migrate_start_time, kvmi_set_migrate_start_time);
    object_class_property_set_description(oc, "migrate-start-time",
        "the guest's start time is migrated (the target needs it, too)");
    object_class_property_add_enum(oc, "auth", "KvmiAuth",
        &KvmiAuth_lookup, kvmi_get_auth, kvmi_set_auth);
    object_class_property_set_description(oc, "auth",
        "how a tool proves that it knows the key");
    object_class_property_add_enum(oc, "on-shutdown", "KvmiOnShutdown",
        &KvmiOnShutdown_lookup, kvmi_get_on_shutdown, kvmi_set_on_shutdown);
    object_class_property_set_description(oc, "on-shutdown",
        "what tools get when the guest shuts down");
}

static const TypeInfo kvmi_info = {
    .name = TYPE_KVMI,
    .parent = TYPE_OBJECT,
    .instance_size = sizeof(KVMIObject),
    .instance_init = kvmi_init,
    .instance_finalize = kvmi_finalize,
    .class_init = kvmi_class_init,
    .interfaces = (InterfaceInfo[]) {
        { TYPE_USER_CREATABLE },
        { }
    }
};

/*
 * The name that the object had before it was upstream, and its properties, for
 * existing command lines
 */
#define TYPE_INTROSPECTION "introspection"

static void introspection_get_s(Object *obj, Visitor *v, const char *name,
                                void *opaque, Error **errp)
{
    uint32_t value = *(uint32_t *)((char *)obj + (uintptr_t)opaque) / 1000;

    visit_type_uint32(v, name, &value, errp);
}

static void introspection_set_s(Object *obj, Visitor *v, const char *name,
                                void *opaque, Error **errp)
{
    uint32_t value;

    if (!visit_type_uint32(v, name, &value, errp)) {
        return;
    }
    if (value > UINT32_MAX / 1000) {
        error_setg(errp, "%s: %" PRIu32 " s is too long", name, value);
        return;
    }
    WITH_QEMU_LOCK_GUARD(&kvmi_lock) {
        *(uint32_t *)((char *)obj + (uintptr_t)opaque) = value * 1000;
    }
}

static bool introspection_get_async_unhook(Object *obj, Error **errp)
{
    return true;
}

static void introspection_set_async_unhook(Object *obj, bool value,
                                           Error **errp)
{
    if (!value) {
        warn_report("async_unhook=off has no effect: QEMU never blocks while"
                    " it waits for the tool");
    }
}

static void introspection_class_init(ObjectClass *oc, void *data)
{
    object_class_property_add(oc, "handshake_timeout", "uint32",
        introspection_get_s, introspection_set_s, NULL,
        (void *)offsetof(KVMIObject, handshake_timeout_ms));
    object_class_property_add(oc, "unhook_timeout", "uint32",
        introspection_get_s, introspection_set_s, NULL,
        (void *)offsetof(KVMIObject, unhook_timeout_ms));
    object_class_property_add_bool(oc, "async_unhook",
        introspection_get_async_unhook, introspection_set_async_unhook);
    object_class_property_add(oc, "command", "strList",
        kvmi_get_allowed, kvmi_set_allowed, NULL, (void *)KVMI_COMMANDS);
    object_class_property_add(oc, "event", "strList",
        kvmi_get_allowed, kvmi_set_allowed, NULL, (void *)KVMI_EVENTS);
}

static const TypeInfo introspection_info = {
    .name = TYPE_INTROSPECTION,
    .parent = TYPE_KVMI,
    .class_init = introspection_class_init,
};

static void kvmi_register_types(void)
{
    qemu_mutex_init(&kvmi_lock);
    type_register_static(&kvmi_info);
    type_register_static(&introspection_info);
}

type_init(kvmi_register_types);

/*
 * QMP, out-of-band: without the BQL, in any thread
 */

static KVMIObject *kvmi_find(Error **errp)
{
    if (!the_kvmi) {
        error_set(errp, ERROR_CLASS_DEVICE_NOT_ACTIVE,
                  "There is no kvmi object");
    }
    return the_kvmi;
}

void qmp_kvmi_unhook(bool has_deadline_ms, uint32_t deadline_ms, Error **errp)
{
    QEMU_LOCK_GUARD(&kvmi_lock);
    KVMIObject *s = kvmi_find(errp);

    if (s) {
        s->detached = true;
        s->unhook_requested = true;
        s->has_unhook_ms = has_deadline_ms;
        s->unhook_ms = deadline_ms;
        qemu_bh_schedule(s->bh);
    }
}

void qmp_kvmi_hook(Error **errp)
{
    QEMU_LOCK_GUARD(&kvmi_lock);
    KVMIObject *s = kvmi_find(errp);

    if (s) {
        kvmi_attach(s);
    }
}

KvmiInfo *qmp_query_kvmi(Error **errp)
{
    QEMU_LOCK_GUARD(&kvmi_lock);
    KVMIObject *s = kvmi_find(errp);
    KvmiInfo *info;

    if (!s) {
        return NULL;
    }

    info = g_new0(KvmiInfo, 1);
    info->id = g_strdup(s->id);
    info->state = s->state;
    info->since = s->since_us;
    info->chardev = g_strdup(s->chardev);
    info->peer = g_strdup(s->peer);
    info->authenticated = s->key != NULL;
    info->has_auth = info->authenticated;
    info->auth = s->auth;
    info->detached = s->detached;
    info->protocol_version = s->version;
    info->commands = kvmi_allowed_names(&s->commands, KVMI_COMMANDS);
    info->events = kvmi_allowed_names(&s->events, KVMI_EVENTS);
    info->handshake_timeout_ms = s->handshake_timeout_ms;
    info->unhook_timeout_ms = s->unhook_timeout_ms;
    info->silence_timeout_ms = s->silence_timeout_ms;
    info->sessions = s->sessions;
    info->unhooks = g_new0(KvmiUnhookCounts, 1);
    info->unhooks->clean = s->unhooks[KVMI_OUTCOME_CLEAN];
    info->unhooks->forced = s->unhooks[KVMI_OUTCOME_FORCED];
    info->unhooks->not_subscribed = s->unhooks[KVMI_OUTCOME_NOT_SUBSCRIBED];
    info->unhooks->disconnected = s->unhooks[KVMI_OUTCOME_DISCONNECTED];
    if (s->has_last_unhook) {
        info->last_unhook = QAPI_CLONE(KvmiUnhook, &s->last_unhook);
    }
    info->last_error = g_strdup(s->last_error);
    return info;
}
