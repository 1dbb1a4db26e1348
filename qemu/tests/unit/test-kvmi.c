/*
 * Tests of the kvmi object and of the stop gate, without KVM
 *
 * The object is the real one, and so are its chardev and the sockets; KVM and
 * the VM are replaced by what is below.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/un.h>
#include <linux/kvm.h>
#include <linux/kvmi.h>
#include "chardev/char.h"
#include "chardev/char-socket.h"
#include "crypto/hash.h"
#include "crypto/init.h"
#include "hw/i386/e820_memory_layout.h"
#include "io/channel-socket.h"
#include "migration/misc.h"
#include "migration/vmstate.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-kvmi.h"
#include "qapi/qobject-input-visitor.h"
#include "qapi/util.h"
#include "qemu/bswap.h"
#include "qemu/config-file.h"
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/sockets.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "qom/object.h"
#include "qom/object_interfaces.h"
#include "system/kvm.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "system/stop-gate.h"
#include "system/system.h"
#include "target/i386/kvm/kvmi-kvm.h"
#include "target/i386/kvm/kvmi-proto.h"

/*
 * KVM
 */

bool kvm_allowed = true;

static struct {
    int version;            /* what CHECK_EXTENSION says */
    int off_errno;          /* what UNHOOK says if there is no KVMI */
    int hook_errno;
    int preunhook_errno;
    int refused_command;    /* if not 0 */
    int fd;                 /* the tool's socket, while hooked */
    uint64_t commands, events;
    int hooks, preunhooks, unhooks;
    bool has_status;
    struct kvm_introspection_status status;
} fake_kvm;

int kvmi_kvm_version(void)
{
    return fake_kvm.version;
}

static void fake_allow(uint64_t *ids, struct kvm_introspection_feature *feature)
{
    g_assert_cmpint(fake_kvm.fd, >=, 0);
    g_assert_cmpuint(feature->allow, ==, 1);
    *ids |= feature->id == -1 ? UINT64_MAX : 1ULL << feature->id;
}

int kvmi_kvm_ioctl(unsigned long request, void *arg)
{
    struct kvm_introspection_hook *hook;

    switch (request) {
    case KVM_INTROSPECTION_HOOK:
        hook = arg;
        g_assert_cmpuint(hook->padding, ==, 0);
        g_assert_cmpint(fake_kvm.fd, ==, -1);
        if (fake_kvm.hook_errno) {
            return -fake_kvm.hook_errno;
        }
        fake_kvm.fd = dup(hook->fd);
        fake_kvm.commands = fake_kvm.events = 0;
        fake_kvm.hooks++;
        return 0;
    case KVM_INTROSPECTION_COMMAND:
        if (fake_kvm.refused_command &&
            ((struct kvm_introspection_feature *)arg)->id ==
            fake_kvm.refused_command) {
            return -EINVAL;
        }
        fake_allow(&fake_kvm.commands, arg);
        return 0;
    case KVM_INTROSPECTION_EVENT:
        fake_allow(&fake_kvm.events, arg);
        return 0;
    case KVM_INTROSPECTION_PREUNHOOK:
        g_assert_cmpint(fake_kvm.fd, >=, 0);
        fake_kvm.preunhooks++;
        return -fake_kvm.preunhook_errno;
    case KVM_INTROSPECTION_UNHOOK:
        if (!fake_kvm.version) {
            return -fake_kvm.off_errno;
        }
        if (fake_kvm.fd >= 0) {
            shutdown(fake_kvm.fd, SHUT_RDWR);
            close(fake_kvm.fd);
            fake_kvm.fd = -1;
            fake_kvm.unhooks++;
        }
        return 0;
    case KVM_INTROSPECTION_STATUS:
        if (!fake_kvm.has_status) {
            return -ENOTTY;
        }
        *(struct kvm_introspection_status *)arg = fake_kvm.status;
        return 0;
    default:
        g_assert_not_reached();
    }
}

/*
 * The VM
 */

static bool vm_running;
static VMChangeStateHandler *vm_handler;
static void *vm_handler_opaque;
static QEMUResetHandler *vm_reset_handler;
static void *vm_reset_opaque;

bool runstate_is_running(void)
{
    return vm_running;
}

static bool inmigrate;
int autostart = 1;

bool runstate_check(RunState state)
{
    g_assert_cmpint(state, ==, RUN_STATE_INMIGRATE);
    return inmigrate;
}

int vm_stop(RunState state)
{
    if (vm_running) {
        stop_gate_cut(stop_action_of(state));
        vm_running = false;
        if (vm_handler) {
            vm_handler(vm_handler_opaque, false, state);
        }
    }
    return 0;
}

static void vm_run(void)
{
    vm_running = true;
    if (vm_handler) {
        vm_handler(vm_handler_opaque, true, RUN_STATE_RUNNING);
    }
}

VMChangeStateEntry *qemu_add_vm_change_state_handler(VMChangeStateHandler *cb,
                                                     void *opaque)
{
    vm_handler = cb;
    vm_handler_opaque = opaque;
    return NULL;
}

void qemu_del_vm_change_state_handler(VMChangeStateEntry *e)
{
    vm_handler = NULL;
}

void qemu_register_suspend_notifier(Notifier *notifier)
{
    qemu_register_wakeup_notifier(notifier);
}

void qemu_register_wakeup_notifier(Notifier *notifier)
{
    /* An entry of some list, so that it can be removed */
    static NotifierList list = NOTIFIER_LIST_INITIALIZER(list);

    notifier_list_add(&list, notifier);
}

void qemu_register_reset_nosnapshotload(QEMUResetHandler *func, void *opaque)
{
    vm_reset_handler = func;
    vm_reset_opaque = opaque;
}

void qemu_unregister_reset(QEMUResetHandler *func, void *opaque)
{
    vm_reset_handler = NULL;
}

int e820_get_table(struct e820_entry **table)
{
    return 3;
}

bool e820_get_entry(int index, uint32_t type, uint64_t *address,
                    uint64_t *length)
{
    static const struct e820_entry table[] = {
        { 0x0, 0xc0000000, E820_RAM },
        { 0x100000000, 0x40000000, E820_RAM },
        { 0x8000000000, 0x1000, E820_RESERVED },
    };

    if (table[index].type != type) {
        return false;
    }
    *address = table[index].address;
    *length = table[index].length;
    return true;
}

/* The object's state is never really saved here */
const VMStateInfo vmstate_info_int64 = { .name = "int64" };

static int vmstates;

int vmstate_register_with_alias_id(VMStateIf *obj, uint32_t instance_id,
                                   const VMStateDescription *vmsd, void *base,
                                   int alias_id, int required_for_version,
                                   Error **errp)
{
    g_assert_cmpstr(vmsd->name, ==, "kvmi");
    vmstates++;
    return 0;
}

void vmstate_unregister(VMStateIf *obj, const VMStateDescription *vmsd,
                        void *opaque)
{
    vmstates--;
}

bool vmstate_check_only_migratable(const VMStateDescription *vmsd)
{
    return true;
}

static bool migrating;

bool migration_is_running(void)
{
    return migrating;
}

static bool incoming_postcopy;

bool migration_in_incoming_postcopy(void)
{
    return incoming_postcopy;
}

const char *qemu_name = "the guest";
QemuUUID qemu_uuid;

/* What QEMU says on its standard error */
static GString *said;

int error_vprintf(const char *fmt, va_list ap)
{
    va_list again;

    va_copy(again, ap);
    g_string_append_vprintf(said, fmt, again);
    va_end(again);
    return vfprintf(stderr, fmt, ap);
}

int error_vprintf_unless_qmp(const char *fmt, va_list ap)
{
    return error_vprintf(fmt, ap);
}

/*
 * The handshake
 */

static void test_hello(void)
{
    KvmiHello hello;
    QemuUUID uuid;
    char name[100];

    memset(&uuid, 0x5a, sizeof(uuid));
    memset(name, 'n', sizeof(name) - 1);
    name[99] = 0;

    kvmi_hello_init(&hello, &uuid, name, 1234567890123, 0x123456789000);
    g_assert_cmpuint(ldl_he_p(&hello), ==, 104);
    g_assert_cmpmem((char *)&hello + 4, 16, uuid.data, 16);
    g_assert_cmpuint(ldl_he_p((char *)&hello + 20), ==, 0);
    g_assert_cmpuint(ldq_he_p((char *)&hello + 24), ==, 1234567890123);
    g_assert_cmpmem((char *)&hello + 32, 63, name, 63);
    g_assert_cmpint(*((char *)&hello + 95), ==, 0);
    g_assert_cmphex(ldq_he_p((char *)&hello + 96), ==, 0x123456789000);

    kvmi_hello_init(&hello, &uuid, NULL, 0, 0);
    g_assert_cmpstr((char *)&hello + 32, ==, "");
}

/* Feed @len bytes in pieces of at most @piece.  Returns what was consumed. */
static size_t feed(KvmiAnswerReader *reader, const uint8_t *buf, size_t len,
                   size_t piece, Error **errp)
{
    size_t done = 0, wanted;

    kvmi_answer_start(reader);
    while ((wanted = kvmi_answer_wanted(reader)) && done < len) {
        size_t n = MIN(MIN(wanted, piece), len - done);

        if (!kvmi_answer_feed(reader, buf + done, n, errp)) {
            break;
        }
        done += n;
    }
    return done;
}

static void test_answer(void)
{
    static const size_t sizes[] = {
        24, 25, 28, 95, 96, 97, 4096, KVMI_ANSWER_MAX
    };
    static const size_t pieces[] = { 1, 3, 4, 23, 24, 4096, SIZE_MAX };
    g_autofree uint8_t *buf = g_malloc0(KVMI_ANSWER_MAX + 100);
    KvmiAnswerReader reader;
    int i, j;

    for (i = 0; i < ARRAY_SIZE(sizes); i++) {
        stl_he_p(buf, sizes[i]);
        memset(buf + 4, 0xa5, KVMI_COOKIE_LEN);
        for (j = 0; j < ARRAY_SIZE(pieces); j++) {
            /* There is more, but that is for KVM */
            g_assert_cmpuint(feed(&reader, buf, KVMI_ANSWER_MAX + 100,
                                  pieces[j], &error_abort), ==, sizes[i]);
            g_assert_cmpuint(kvmi_answer_wanted(&reader), ==, 0);
            g_assert_cmpmem(reader.answer.cookie_hash, KVMI_COOKIE_LEN,
                            buf + 4, KVMI_COOKIE_LEN);

            /* One byte short */
            feed(&reader, buf, sizes[i] - 1, pieces[j], &error_abort);
            g_assert_cmpuint(kvmi_answer_wanted(&reader), ==, 1);
        }
    }
}

static void test_answer_hostile(void)
{
    static const uint32_t sizes[] = {
        0, 1, 4, 23, KVMI_ANSWER_MAX + 1, 0x7fffffff, 0x80000000, UINT32_MAX
    };
    uint8_t buf[64] = { };
    KvmiAnswerReader reader;
    int i;

    for (i = 0; i < ARRAY_SIZE(sizes); i++) {
        Error *err = NULL;

        stl_he_p(buf, sizes[i]);
        feed(&reader, buf, sizeof(buf), 1, &err);
        error_free_or_abort(&err);
        feed(&reader, buf, sizeof(buf), SIZE_MAX, &err);
        error_free_or_abort(&err);
    }
}

static void test_answer_too_much(void)
{
    uint8_t buf[KVMI_ANSWER_LEN + 1] = { };
    KvmiAnswerReader reader;
    Error *err = NULL;

    stl_he_p(buf, KVMI_ANSWER_LEN);
    kvmi_answer_start(&reader);
    g_assert_false(kvmi_answer_feed(&reader, buf, 5, &err));
    error_free_or_abort(&err);
    kvmi_answer_start(&reader);
    g_assert_true(kvmi_answer_feed(&reader, buf, 4, &error_abort));
    g_assert_false(kvmi_answer_feed(&reader, buf + 4, 21, &err));
    error_free_or_abort(&err);
}

static void test_cookie(void)
{
    uint8_t a[KVMI_COOKIE_LEN] = { }, b[KVMI_COOKIE_LEN] = { };
    int i;

    g_assert_true(kvmi_cookie_equal(a, b));
    for (i = 0; i < KVMI_COOKIE_LEN * 8; i++) {
        b[i / 8] ^= 1 << i % 8;
        g_assert_false(kvmi_cookie_equal(a, b));
        b[i / 8] ^= 1 << i % 8;
    }
}

/* A tool's side of auth=hmac, by other means than QEMU's */
static void tool_hmac(const char *key, const char *label, const void *hello,
                      const void *answer, size_t answer_len, uint8_t mac[32])
{
    GHmac *hmac = g_hmac_new(G_CHECKSUM_SHA256, (const void *)key,
                             strlen(key));
    char padded[16] = { };
    gsize len = 32;

    memcpy(padded, label, strlen(label));
    g_hmac_update(hmac, (const void *)padded, sizeof(padded));
    g_hmac_update(hmac, hello, 144);
    g_hmac_update(hmac, answer, answer_len);
    g_hmac_get_digest(hmac, mac, &len);
    g_assert_cmpint(len, ==, 32);
    g_hmac_unref(hmac);
}

static void answer_hmac(KvmiAnswer *answer, const char *key,
                        const KvmiHello *hello)
{
    memset(answer, 0, sizeof(*answer));
    answer->struct_size = 96;
    answer->auth = 1;
    memset(answer->nonce, 0x77, sizeof(answer->nonce));
    tool_hmac(key, "kvmi-hmac-tool", hello, answer, 64, answer->proof);
}

static void test_hmac(void)
{
    const uint8_t *key = (const uint8_t *)"secret";
    KvmiHello hello, hello2;
    KvmiAnswer answer, good;
    KvmiProof proof;
    uint8_t expected[32];
    Error *err = NULL;
    int i;

    kvmi_hello_init(&hello, &(QemuUUID) { }, "x", 1, 2);
    hello2 = hello;
    g_assert_true(kvmi_hello_hmac(&hello, &error_abort));
    g_assert_true(kvmi_hello_hmac(&hello2, &error_abort));
    g_assert_cmpuint(hello.struct_size, ==, 144);
    g_assert_cmpuint(hello.auth, ==, 1);
    g_assert_cmpint(memcmp(hello.nonce, hello2.nonce, 32), !=, 0);

    answer_hmac(&good, "secret", &hello);
    g_assert_true(kvmi_hmac_check(&hello, &good, key, 6, &proof,
                                  &error_abort));
    g_assert_cmpuint(proof.struct_size, ==, 40);
    tool_hmac("secret", "kvmi-hmac-qemu", &hello, &good, 96, expected);
    g_assert_cmpmem(proof.proof, 32, expected, 32);

    /* Any changed bit */
    for (i = 0; i < 96 * 8; i++) {
        answer = good;
        ((uint8_t *)&answer)[i / 8] ^= 1 << i % 8;
        g_assert_false(kvmi_hmac_check(&hello, &answer, key, 6, &proof, &err));
        error_free_or_abort(&err);
    }
    /* Another key; the answer to another hello; QEMU's own proof */
    g_assert_false(kvmi_hmac_check(&hello, &good, key, 5, &proof, &err));
    error_free_or_abort(&err);
    g_assert_false(kvmi_hmac_check(&hello2, &good, key, 6, &proof, &err));
    error_free_or_abort(&err);
    answer = good;
    tool_hmac("secret", "kvmi-hmac-qemu", &hello, &answer, 64, answer.proof);
    g_assert_false(kvmi_hmac_check(&hello, &answer, key, 6, &proof, &err));
    error_free_or_abort(&err);

    /* The legacy cookie is no way around it */
    answer = good;
    answer.struct_size = 24;
    g_assert_false(kvmi_hmac_check(&hello, &answer, key, 6, &proof, &err));
    g_assert_nonnull(strstr(error_get_pretty(err), "auth=hmac"));
    error_free_or_abort(&err);
}

/*
 * Names and states
 */

static strList *str_list(const char *comma_separated)
{
    g_auto(GStrv) words = g_strsplit(comma_separated, ",", 0);
    strList *list = NULL, **tail = &list;
    char **word;

    for (word = words; *word; word++) {
        QAPI_LIST_APPEND(tail, g_strdup(*word));
    }
    return list;
}

static char *joined(strList *list)
{
    GString *s = g_string_new(NULL);
    strList *e;

    for (e = list; e; e = e->next) {
        g_string_append_printf(s, "%s%s", s->len ? "," : "", e->value);
    }
    qapi_free_strList(list);
    return g_string_free(s, false);
}

static bool parse(KvmiAllowed *allowed, KvmiIdSpace space, const char *words,
                  Error **errp)
{
    strList *list = str_list(words);
    bool ok = kvmi_allowed_parse(allowed, space, list, errp);

    qapi_free_strList(list);
    return ok;
}

static void test_allowed(void)
{
    static const char *const bad_commands[] = {
        "foo", "0", "1", "-1", "63", "4294967298", " ", "2x", "GET-VERSION",
        "vm-get-info,nonsense", "unhook", "vmx-*", "?",
    };
    KvmiAllowed allowed = { .all = true };
    g_autofree char *all = NULL, *some = NULL, *none = NULL, *events = NULL;
    g_autofree char *wild = NULL;
    int i;

    all = joined(kvmi_allowed_names(&allowed, KVMI_COMMANDS));
    g_assert_nonnull(strstr(all, "vcpu-translate-gva"));

    for (i = 0; i < ARRAY_SIZE(bad_commands); i++) {
        Error *err = NULL;

        g_assert_false(parse(&allowed, KVMI_COMMANDS, bad_commands[i], &err));
        g_assert_nonnull(strstr(error_get_pretty(err), "vm-get-info"));
        error_free_or_abort(&err);
        g_assert_true(allowed.all);
    }

    parse(&allowed, KVMI_COMMANDS, "vm-get-info,12,0x5,vm-get-info",
          &error_abort);
    g_assert_false(allowed.all);
    g_assert_cmphex(allowed.ids, ==, 1 << KVMI_VM_GET_INFO |
                                     1 << KVMI_VM_READ_PHYSICAL |
                                     1 << KVMI_VCPU_CONTROL_EVENTS);
    some = joined(kvmi_allowed_names(&allowed, KVMI_COMMANDS));
    g_assert_cmpstr(some, ==, "get-version,vm-check-command,vm-check-event,"
                    "vm-get-info,vm-read-physical,vcpu-control-events");

    g_assert_true(kvmi_allowed_parse(&allowed, KVMI_COMMANDS, NULL,
                                     &error_abort));
    g_assert_cmphex(allowed.ids, ==, 0);
    none = joined(kvmi_allowed_names(&allowed, KVMI_COMMANDS));
    g_assert_cmpstr(none, ==, "get-version,vm-check-command,vm-check-event");

    parse(&allowed, KVMI_COMMANDS, "vm-*-physical,vcpu-?et-xsave",
          &error_abort);
    g_assert_false(allowed.all);
    wild = joined(kvmi_allowed_names(&allowed, KVMI_COMMANDS));
    g_assert_cmpstr(wild, ==, "get-version,vm-check-command,vm-check-event,"
                    "vm-read-physical,vm-write-physical,vcpu-get-xsave,"
                    "vcpu-set-xsave");
    parse(&allowed, KVMI_COMMANDS, "vm-get-info,*", &error_abort);
    g_assert_true(allowed.all);

    parse(&allowed, KVMI_EVENTS, "0,breakpoint,pause", &error_abort);
    g_assert_cmphex(allowed.ids, ==, 1 << KVMI_VM_EVENT_UNHOOK |
                                     1 << KVMI_VCPU_EVENT_PAUSE |
                                     1 << KVMI_VCPU_EVENT_BREAKPOINT);
    events = joined(kvmi_allowed_names(&allowed, KVMI_EVENTS));
    g_assert_cmpstr(events, ==, "unhook,pause,breakpoint");
}

static void test_states(void)
{
    int from, to, n = 0;

    for (from = 0; from < KVMI_STATE__MAX; from++) {
        g_assert_false(kvmi_state_change_valid(from, from));
        for (to = 0; to < KVMI_STATE__MAX; to++) {
            n += kvmi_state_change_valid(from, to);
        }
    }
    g_assert_cmpint(n, ==, 8);
    /* KVM is told to let go of every session */
    g_assert_false(kvmi_state_change_valid(KVMI_STATE_HOOKED,
                                           KVMI_STATE_CONNECTING));
    g_assert_false(kvmi_state_change_valid(KVMI_STATE_UNHOOKING,
                                           KVMI_STATE_HOOKED));
}

/*
 * The gate
 */

typedef struct TestGuard {
    StopGuard guard;
    bool wants_time;
    int announced, cuts, opened;
    StopAction last;
} TestGuard;

static bool guard_announce(StopGuard *guard, StopAction action)
{
    TestGuard *g = container_of(guard, TestGuard, guard);

    g->announced++;
    g->last = action;
    return g->wants_time;
}

static void guard_cut(StopGuard *guard, StopAction action)
{
    TestGuard *g = container_of(guard, TestGuard, guard);

    g->cuts++;
    g->last = action;
    if (guard->busy) {
        stop_gate_release(guard);
    }
}

static void guard_cont(StopGuard *guard)
{
}

static void guard_open(StopGuard *guard)
{
    g_assert_false(stop_gate_closed());
    container_of(guard, TestGuard, guard)->opened++;
}

typedef struct TestWaiter {
    StopWaiter waiter;
    int called, cancelled;
} TestWaiter;

static void waiter_done(StopWaiter *waiter, bool cancelled)
{
    TestWaiter *w = container_of(waiter, TestWaiter, waiter);

    w->called++;
    w->cancelled += cancelled;
}

static void run_events(void)
{
    int i;

    for (i = 0; i < 10; i++) {
        main_loop_wait(true);
    }
}

static TestGuard new_guard(bool wants_time)
{
    return (TestGuard) {
        .guard = {
            .announce = guard_announce,
            .cut = guard_cut,
            .open = guard_open,
            .cont = guard_cont,
        },
        .wants_time = wants_time,
    };
}

static TestWaiter new_waiter(void)
{
    return (TestWaiter) { .waiter.done = waiter_done };
}

static void test_gate_open(void)
{
    TestGuard g = new_guard(false);
    TestWaiter w = new_waiter();

    /* Nobody there */
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    /* Somebody, with nothing to do */
    stop_gate_add(&g.guard);
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    g_assert_cmpint(g.announced, ==, 1);
    g_assert_false(stop_gate_closed());
    run_events();
    g_assert_cmpint(w.called, ==, 0);
    stop_gate_remove(&g.guard);
}

static void test_gate_wait(void)
{
    TestGuard g1 = new_guard(true), g2 = new_guard(true);
    TestWaiter w1 = new_waiter(), w2 = new_waiter();

    stop_gate_add(&g1.guard);
    stop_gate_add(&g2.guard);
    g_assert_false(stop_gate_enter(&w1.waiter, STOP_ACTION_STOP));
    g_assert_false(stop_gate_enter(&w2.waiter, STOP_ACTION_STOP));
    g_assert_true(stop_gate_closed());
    /* Asked for each */
    g_assert_cmpint(g1.announced, ==, 2);
    g_assert_cmpint(g2.announced, ==, 2);

    stop_gate_release(&g1.guard);
    run_events();
    g_assert_cmpint(w1.called, ==, 0);

    stop_gate_release(&g2.guard);
    /* Not from within */
    g_assert_cmpint(w1.called, ==, 0);
    run_events();
    g_assert_cmpint(w1.called, ==, 1);
    g_assert_cmpint(w2.called, ==, 1);
    g_assert_cmpint(w1.cancelled + w2.cancelled, ==, 0);
    g_assert_false(stop_gate_closed());
    stop_gate_remove(&g1.guard);
    stop_gate_remove(&g2.guard);
}

static void test_gate_cut(void)
{
    static const StopAction wait[] = {
        STOP_ACTION_STOP, STOP_ACTION_DEBUG, STOP_ACTION_SAVE,
        STOP_ACTION_MIGRATE, STOP_ACTION_SUSPEND, STOP_ACTION_SHUTDOWN
    };
    TestGuard g = new_guard(true);
    TestWaiter w = new_waiter();
    bool waits[STOP_ACTION__MAX] = { };
    StopAction action;
    int i;

    for (i = 0; i < ARRAY_SIZE(wait); i++) {
        waits[wait[i]] = true;
    }

    stop_gate_add(&g.guard);
    for (action = 0; action < STOP_ACTION__MAX; action++) {
        g_assert_nonnull(stop_action_str(action));
        g.cuts = g.announced = 0;
        if (waits[action]) {
            g_assert_false(stop_gate_enter(&w.waiter, action));
            g_assert_cmpint(g.announced, ==, 1);
            stop_gate_release(&g.guard);
            stop_gate_leave(&w.waiter);
            g_assert_cmpint(g.cuts, ==, 0);
        } else {
            g_assert_true(stop_gate_enter(&w.waiter, action));
            g_assert_cmpint(g.announced, ==, 0);
            g_assert_cmpint(g.cuts, ==, 1);
            g_assert_cmpint(g.last, ==, action);
        }
    }
    run_events();
    g_assert_cmpint(w.called, ==, 0);

    /* In the middle of a wait */
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    stop_gate_cut(STOP_ACTION_IO_ERROR);
    run_events();
    g_assert_cmpint(w.called, ==, 1);
    g_assert_cmpint(w.cancelled, ==, 0);
    stop_gate_remove(&g.guard);
}

static void test_gate_hold(void)
{
    TestGuard g = new_guard(true);
    TestWaiter w = new_waiter(), stop = new_waiter();

    stop_gate_add(&g.guard);
    /* Leaving without having entered does nothing */
    stop_gate_leave(&w.waiter);
    g_assert_cmpint(g.opened, ==, 0);

    /* Closed for as long as it takes, though the wait is over */
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    stop_gate_release(&g.guard);
    run_events();
    g_assert_cmpint(w.called, ==, 1);
    g_assert_true(stop_gate_closed());
    g_assert_cmpint(g.opened, ==, 0);
    /* Not what cont is about */
    stop_gate_cancel();
    run_events();
    g_assert_true(stop_gate_closed());

    /* A stop in between */
    g.wants_time = false;
    g_assert_true(stop_gate_enter(&stop.waiter, STOP_ACTION_STOP));
    g_assert_true(stop_gate_closed());

    stop_gate_leave(&w.waiter);
    g_assert_false(stop_gate_closed());
    g_assert_cmpint(g.opened, ==, 1);
    stop_gate_leave(&w.waiter);
    g_assert_cmpint(g.opened, ==, 1);

    /* Nothing to wait for, but closed all the same */
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    g_assert_true(stop_gate_closed());
    stop_gate_leave(&w.waiter);
    g_assert_false(stop_gate_closed());
    g_assert_cmpint(g.opened, ==, 2);

    /* Given up during the wait, while a stop waits, too */
    g.wants_time = true;
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    g_assert_false(stop_gate_enter(&stop.waiter, STOP_ACTION_STOP));
    stop_gate_leave(&w.waiter);
    g_assert_true(stop_gate_closed());
    g_assert_cmpint(g.opened, ==, 2);
    stop_gate_release(&g.guard);
    run_events();
    g_assert_cmpint(w.called, ==, 1);
    g_assert_cmpint(stop.called, ==, 1);
    g_assert_cmpint(g.opened, ==, 3);
    stop_gate_remove(&g.guard);
}

static void test_gate_cancel(void)
{
    TestGuard g = new_guard(true);
    TestWaiter w1 = new_waiter(), w2 = new_waiter();

    stop_gate_cancel();

    stop_gate_add(&g.guard);
    g_assert_false(stop_gate_enter(&w1.waiter, STOP_ACTION_STOP));
    stop_gate_cancel();
    g_assert_false(stop_gate_closed());
    /* The guard is still at it: who comes now, waits */
    g_assert_false(stop_gate_enter(&w2.waiter, STOP_ACTION_STOP));
    run_events();
    g_assert_cmpint(w1.cancelled, ==, 1);
    g_assert_cmpint(w2.called, ==, 0);

    stop_gate_release(&g.guard);
    run_events();
    g_assert_cmpint(w2.called, ==, 1);
    g_assert_cmpint(w2.cancelled, ==, 0);
    g_assert_cmpint(w1.called, ==, 1);
    stop_gate_remove(&g.guard);
}

/* What makes a stop pointless, and what doesn't */
static void test_gate_moot(void)
{
    static const struct {
        StopAction waiting, now;
        bool cancelled;
    } cases[] = {
        { STOP_ACTION_STOP, STOP_ACTION_RESET, false },
        { STOP_ACTION_STOP, STOP_ACTION_SHUTDOWN, false },
        { STOP_ACTION_SAVE, STOP_ACTION_RESET, false },
        { STOP_ACTION_SAVE, STOP_ACTION_SHUTDOWN, true },
        { STOP_ACTION_SUSPEND, STOP_ACTION_STOP, false },
        { STOP_ACTION_SUSPEND, STOP_ACTION_RESET, true },
        { STOP_ACTION_SUSPEND, STOP_ACTION_LOAD, true },
        { STOP_ACTION_SUSPEND, STOP_ACTION_SHUTDOWN, true },
        { STOP_ACTION_SHUTDOWN, STOP_ACTION_SHUTDOWN, false },
    };
    TestGuard g = new_guard(true);
    int i;

    stop_gate_add(&g.guard);
    for (i = 0; i < ARRAY_SIZE(cases); i++) {
        TestWaiter w = new_waiter();

        g_assert_false(stop_gate_enter(&w.waiter, cases[i].waiting));
        stop_gate_cut(cases[i].now);
        run_events();
        g_assert_cmpint(w.called, ==, 1);
        g_assert_cmpint(w.cancelled, ==, cases[i].cancelled);
        g_assert_false(stop_gate_closed());
    }
    stop_gate_remove(&g.guard);
}

typedef struct OrderedWaiter {
    StopWaiter waiter;
    int place;
} OrderedWaiter;

static int places;

static void ordered_done(StopWaiter *waiter, bool cancelled)
{
    g_assert_false(cancelled);
    container_of(waiter, OrderedWaiter, waiter)->place = ++places;
}

/* A snapshot must not have in it a guest that is just about to suspend */
static void test_gate_order(void)
{
    static const StopAction actions[] = {
        STOP_ACTION_SAVE, STOP_ACTION_STOP, STOP_ACTION_SUSPEND,
        STOP_ACTION_MIGRATE,
    };
    static const int order[] = { 2, 3, 1, 4 };
    TestGuard g = new_guard(true);
    OrderedWaiter w[ARRAY_SIZE(actions)] = { };
    int i;

    stop_gate_add(&g.guard);
    for (i = 0; i < ARRAY_SIZE(actions); i++) {
        w[i].waiter.done = ordered_done;
        g_assert_false(stop_gate_enter(&w[i].waiter, actions[i]));
    }
    stop_gate_release(&g.guard);
    run_events();
    for (i = 0; i < ARRAY_SIZE(actions); i++) {
        g_assert_cmpint(w[i].place, ==, order[i]);
        stop_gate_leave(&w[i].waiter);
    }
    stop_gate_remove(&g.guard);
}

typedef struct GateFunc {
    int called, cancelled;
} GateFunc;

static void gate_func(void *opaque, bool cancelled)
{
    GateFunc *f = opaque;

    g_assert_false(qemu_in_coroutine());
    f->called++;
    f->cancelled += cancelled;
}

static void coroutine_fn gate_co(void *opaque)
{
    GateFunc *f = opaque;
    int called = f->called;

    stop_gate_co_run(STOP_ACTION_SAVE, gate_func, f);
    g_assert_true(qemu_in_coroutine());
    g_assert_cmpint(f->called, ==, called + 1);
    f->called = 100;
}

static void test_gate_run(void)
{
    TestGuard g = new_guard(true);
    GateFunc f = { };

    g_assert_false(stop_gate_guarded());
    stop_gate_run(STOP_ACTION_DEBUG, gate_func, &f);
    g_assert_cmpint(f.called, ==, 1);

    stop_gate_add(&g.guard);
    g_assert_true(stop_gate_guarded());
    stop_gate_run(STOP_ACTION_DEBUG, gate_func, &f);
    g_assert_cmpint(f.called, ==, 1);
    stop_gate_cancel();
    run_events();
    g_assert_cmpint(f.called, ==, 2);
    g_assert_cmpint(f.cancelled, ==, 1);

    qemu_coroutine_enter(qemu_coroutine_create(gate_co, &f));
    run_events();
    g_assert_cmpint(f.called, ==, 2);
    stop_gate_release(&g.guard);
    run_events();
    g_assert_cmpint(f.called, ==, 100);
    g_assert_cmpint(f.cancelled, ==, 1);
    stop_gate_remove(&g.guard);
}

/* The menu's pause */
static void test_gate_pause(void)
{
    TestGuard g = new_guard(false);

    stop_gate_add(&g.guard);
    vm_running = true;
    stop_gate_pause();
    g_assert_false(vm_running);
    g_assert_cmpint(g.announced, ==, 1);

    /* What comes in is not to be interrupted, but not to run afterwards */
    inmigrate = true;
    vm_running = true;
    stop_gate_pause();
    g_assert_true(vm_running);
    g_assert_cmpint(g.announced, ==, 1);
    g_assert_cmpint(autostart, ==, 0);
    inmigrate = false;
    autostart = 1;
    stop_gate_remove(&g.guard);
}

static void test_gate_remove(void)
{
    TestGuard g = new_guard(true);
    TestWaiter w = new_waiter();

    stop_gate_add(&g.guard);
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    stop_gate_remove(&g.guard);
    run_events();
    g_assert_cmpint(w.called, ==, 1);
    g_assert_cmpint(w.cancelled, ==, 0);
}

/*
 * The object.  The tool is played by this thread: the main loop runs until
 * what is expected has come true.
 */

static char *tmpdir, *sock_path;
static int listen_fd = -1;
static Chardev *chr;

#define until(condition)                                                \
    do {                                                                \
        int64_t end = g_get_monotonic_time() + 20 * G_USEC_PER_SEC;     \
        while (!(condition)) {                                          \
            g_assert_cmpint(g_get_monotonic_time(), <, end);            \
            main_loop_wait(true);                                       \
            g_usleep(500);                                              \
        }                                                               \
    } while (0)

static Object *add_object(const char *id, Error **errp, ...)
{
    Object *obj;
    va_list ap;

    va_start(ap, errp);
    obj = object_new_with_propv("kvmi", object_get_objects_root(), id, errp,
                                ap);
    va_end(ap);
    return obj;
}

static KvmiInfo *query(void)
{
    return qmp_query_kvmi(&error_abort);
}

static KvmiState state(void)
{
    KvmiInfo *info = query();
    KvmiState s = info->state;

    qapi_free_KvmiInfo(info);
    return s;
}

static void check_unhook(KvmiAction action, KvmiOutcome outcome)
{
    KvmiInfo *info = query();

    g_assert_nonnull(info->last_unhook);
    g_assert_cmpstr(KvmiAction_str(info->last_unhook->action), ==,
                    KvmiAction_str(action));
    g_assert_cmpstr(KvmiOutcome_str(info->last_unhook->outcome), ==,
                    KvmiOutcome_str(outcome));
    g_assert_cmpint(info->last_unhook->duration, >=, 0);
    g_assert_cmpint(info->last_unhook->duration, <, 20 * G_USEC_PER_SEC);
    qapi_free_KvmiInfo(info);
    g_assert_cmpint(fake_kvm.fd, ==, -1);
}

static void check_error(const char *part)
{
    KvmiInfo *info = query();

    g_assert_nonnull(info->last_error);
    g_assert_nonnull(strstr(info->last_error, part));
    qapi_free_KvmiInfo(info);
}

static int tool_accept(void)
{
    struct pollfd pfd = { .fd = listen_fd, .events = POLLIN };

    until(poll(&pfd, 1, 0) == 1);
    return accept(listen_fd, NULL, NULL);
}

static ssize_t tool_recv(int fd, void *buf, size_t len)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };

    until(poll(&pfd, 1, 0) == 1);
    return recv(fd, buf, len, 0);
}

static void tool_send(int fd, const void *buf, size_t len)
{
    g_assert_cmpint(send(fd, buf, len, MSG_NOSIGNAL), ==, len);
}

/* Accept and shake hands; the answer is followed by "command" */
static int tool_connect(void)
{
    int fd = tool_accept();
    struct {
        KvmiAnswer answer;
        char more[7];
    } buf = { .answer.struct_size = sizeof(KvmiAnswer), .more = "command" };
    KvmiHello hello;

    g_assert_cmpint(tool_recv(fd, &hello, sizeof(hello)), ==, 104);
    g_assert_cmpuint(hello.struct_size, ==, 104);
    g_assert_cmpstr(hello.name, ==, "the guest");
    g_assert_cmphex(hello.max_gpa, ==, 0x140000000);
    g_assert_cmpint(hello.start_time - g_get_real_time() / G_USEC_PER_SEC, >=,
                    -60);
    tool_send(fd, &buf, offsetof(typeof(buf), more) + sizeof(buf.more));
    until(state() == KVMI_STATE_HOOKED);
    return fd;
}

static bool tool_sees_eof(int fd)
{
    char c;

    return recv(fd, &c, 1, MSG_DONTWAIT) == 0;
}

/* A chardev that is just connecting goes only after that */
static void del_chardev(Chardev *old)
{
    object_ref(OBJECT(old));
    object_unparent(OBJECT(old));
    until(OBJECT(old)->ref == 1);
    object_unref(OBJECT(old));
}

static void setup(void)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    g_autofree char *spec = NULL;

    memset(&fake_kvm, 0, sizeof(fake_kvm));
    fake_kvm.version = 1;
    fake_kvm.fd = -1;
    kvm_allowed = true;
    vm_running = true;
    g_string_truncate(said, 0);

    tmpdir = g_dir_make_tmp("test-kvmi-XXXXXX", NULL);
    sock_path = g_strdup_printf("%s/tool", tmpdir);
    pstrcpy(addr.sun_path, sizeof(addr.sun_path), sock_path);
    listen_fd = socket(AF_UNIX, SOCK_STREAM, 0);
    g_assert_cmpint(bind(listen_fd, (void *)&addr, sizeof(addr)), ==, 0);
    g_assert_cmpint(listen(listen_fd, 5), ==, 0);

    spec = g_strdup_printf("unix:%s,reconnect-ms=5", sock_path);
    chr = qemu_chr_new("chr", spec, NULL);
    g_assert_nonnull(chr);
}

static void teardown(void)
{
    Error *err = NULL;

    g_assert_null(qmp_query_kvmi(&err));
    error_free_or_abort(&err);
    g_assert_false(stop_gate_closed());
    g_assert_null(vm_handler);
    g_assert_null(vm_reset_handler);
    g_assert_cmpint(vmstates, ==, 0);

    /* Nobody uses it any more */
    del_chardev(chr);
    close(listen_fd);
    unlink(sock_path);
    rmdir(tmpdir);
    g_free(sock_path);
    g_free(tmpdir);
}

static void test_object_errors(void)
{
    struct {
        const char *spec, *part;
    } chardevs[] = {
        { "null", "not a socket" },
        { "tcp:127.0.0.1:1,reconnect-ms=1000", "neither a unix" },
        { "unix:%s,reconnect-ms=1000,telnet=on", "not a plain" },
        { "unix:%s.server,server=on,wait=off,websocket=on", "not a plain" },
        { "unix:%s.server,server=on,wait=off", "is a server" },
        { "unix:%s", "doesn't reconnect" },
    };
    static const struct {
        const char *opts, *part;
    } vsocks[] = {
        { "socket,id=bad,cid=2,reconnect-ms=1", "no port" },
        { "socket,id=bad,cid=2,port=1,path=x,reconnect-ms=1", "'cid'" },
        { "socket,id=bad,cid=2,port=1,host=x,reconnect-ms=1", "'cid'" },
    };
    g_autofree char *spec = NULL;
    Chardev *other;
    QemuOpts *opts;
    Error *err = NULL;
    Object *obj;
    int i;

#define EXPECT(part)                                            \
    do {                                                        \
        g_assert_nonnull(err);                                  \
        g_test_message("%s", error_get_pretty(err));            \
        g_assert_nonnull(strstr(error_get_pretty(err), part));  \
        error_free_or_abort(&err);                              \
    } while (0)

    setup();

    add_object("k", &err, NULL);
    EXPECT("chardev");
    add_object("k", &err, "chardev", "nosuch", NULL);
    EXPECT("'nosuch' not found");
    add_object("k", &err, "chardev", "chr", "key", "nosuch", NULL);
    EXPECT("nosuch");

    for (i = 0; i < ARRAY_SIZE(chardevs); i++) {
        g_autofree char *name = g_strdup_printf(chardevs[i].spec, sock_path);

        other = qemu_chr_new("other", name, NULL);
        g_assert_nonnull(other);
        add_object("k", &err, "chardev", "other", NULL);
        EXPECT(chardevs[i].part);
        del_chardev(other);
    }

    /* The older spelling of reconnect-ms does, too */
    spec = g_strdup_printf("unix:%s,reconnect=1", sock_path);
    other = qemu_chr_new("other", spec, NULL);
    g_assert_nonnull(other);
    obj = add_object("k", &error_abort, "chardev", "other", NULL);
    object_unparent(obj);
    del_chardev(other);

    /* vsock on the command line; nobody need be there */
    opts = qemu_opts_parse_noisily(&qemu_chardev_opts, "socket,id=vs,cid=2,"
                                   "port=4050,reconnect-ms=1000", true);
    other = qemu_chr_new_from_opts(opts, NULL, &error_abort);
    qemu_opts_del(opts);
    g_assert_cmpint(SOCKET_CHARDEV(other)->addr->type, ==,
                    SOCKET_ADDRESS_TYPE_VSOCK);
    g_assert_cmpstr(SOCKET_CHARDEV(other)->addr->u.vsock.cid, ==, "2");
    g_assert_cmpstr(SOCKET_CHARDEV(other)->addr->u.vsock.port, ==, "4050");
    obj = add_object("k", &error_abort, "chardev", "vs", NULL);
    object_unparent(obj);
    del_chardev(other);
    for (i = 0; i < ARRAY_SIZE(vsocks); i++) {
        opts = qemu_opts_parse_noisily(&qemu_chardev_opts, vsocks[i].opts,
                                       true);
        g_assert_null(qemu_chr_new_from_opts(opts, NULL, &err));
        qemu_opts_del(opts);
        EXPECT(vsocks[i].part);
    }

    /* As made with TLS, which this QEMU may be built without */
    SOCKET_CHARDEV(chr)->tls_creds = (QCryptoTLSCreds *)chr;
    add_object("k", &err, "chardev", "chr", NULL);
    EXPECT("not a plain");
    SOCKET_CHARDEV(chr)->tls_creds = NULL;

    kvm_allowed = false;
    add_object("k", &err, "chardev", "chr", NULL);
    EXPECT("-accel kvm");
    kvm_allowed = true;

    fake_kvm.version = 0;
    fake_kvm.off_errno = ENOTTY;
    add_object("k", &err, "chardev", "chr", NULL);
    EXPECT("CONFIG_KVM_INTROSPECTION");
    fake_kvm.off_errno = EPERM;
    add_object("k", &err, "chardev", "chr", NULL);
    EXPECT("introspection=1");
    fake_kvm.version = 2;
    add_object("k", &err, "chardev", "chr", NULL);
    EXPECT("version 2");
    fake_kvm.version = 1;

    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    add_object("k2", &err, "chardev", "chr", NULL);
    EXPECT("already a kvmi object, 'k'");
    object_property_set_str(obj, "chardev", "other", &err);
    EXPECT("chardev");
    object_property_set_uint(obj, "unhook-timeout-ms", 17, &error_abort);
    g_assert_cmpuint(object_property_get_uint(obj, "unhook-timeout-ms", NULL),
                     ==, 17);
    g_assert_cmpuint(object_property_get_uint(obj, "handshake-timeout-ms",
                                              NULL), ==, 10000);
    object_unparent(obj);
    teardown();
#undef EXPECT
}

static void test_object_session(void)
{
    TestWaiter w = new_waiter();
    char buf[100];
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    g_assert_cmpint(state(), ==, KVMI_STATE_CONNECTING);
    fd = tool_connect();
    g_assert_cmpint(fake_kvm.hooks, ==, 1);
    g_assert_cmphex(fake_kvm.commands, ==, UINT64_MAX);
    g_assert_cmphex(fake_kvm.events, ==, UINT64_MAX);

    /* What follows the answer is left to KVM, now and later */
    tool_send(fd, "more", 4);
    run_events();
    g_assert_cmpint(recv(fake_kvm.fd, buf, sizeof(buf), 0), ==, 11);
    g_assert_cmpmem(buf, 11, "commandmore", 11);

    /* The guest stops */
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    g_assert_cmpint(fake_kvm.preunhooks, ==, 1);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKING);
    run_events();
    g_assert_cmpint(w.called, ==, 0);
    close(fd);
    until(w.called);
    g_assert_cmpint(fake_kvm.unhooks, ==, 1);
    check_unhook(KVMI_ACTION_STOP, KVMI_OUTCOME_CLEAN);
    vm_stop(RUN_STATE_PAUSED);
    run_events();
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);

    /* Connected perhaps, but silent while the guest is stopped */
    fd = tool_accept();
    g_usleep(50000);
    run_events();
    g_assert_cmpint(recv(fd, buf, 1, MSG_DONTWAIT), ==, -1);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);

    /* And on again */
    vm_run();
    g_assert_cmpint(tool_recv(fd, buf, 4), ==, 4);
    g_assert_cmpint(state(), ==, KVMI_STATE_HANDSHAKE);
    close(fd);
    until(state() != KVMI_STATE_HANDSHAKE);
    check_error("closed the connection");
    fd = tool_connect();
    g_assert_cmpint(fake_kvm.hooks, ==, 2);

    object_unparent(obj);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKING);
    close(fd);
    until(fake_kvm.unhooks == 2);
    run_events();
    teardown();
}

static void test_object_allowed(void)
{
    QDict *props;
    Object *obj;
    Visitor *v;
    int fd;

    setup();
    props = qdict_from_jsonf_nofail("{ 'chardev': 'chr',"
                                    "  'commands': [ 'vm-get-info', '10' ],"
                                    "  'events': [ 'unhook' ] }");
    v = qobject_input_visitor_new(QOBJECT(props));
    obj = user_creatable_add_type("kvmi", "k", props, v, &error_abort);
    object_unref(obj);
    visit_free(v);
    qobject_unref(props);

    fd = tool_connect();
    g_assert_cmphex(fake_kvm.commands, ==,
                    1 << KVMI_VM_GET_INFO | 1 << KVMI_VM_CONTROL_EVENTS);
    g_assert_cmphex(fake_kvm.events, ==, 1 << KVMI_VM_EVENT_UNHOOK);
    close(fd);
    until(state() != KVMI_STATE_HOOKED);
    check_unhook(KVMI_ACTION_NONE, KVMI_OUTCOME_DISCONNECTED);
    object_unparent(obj);
    teardown();
}

/* The name of what KVM doesn't know */
static void test_object_refused(void)
{
    KvmiAnswer answer = { .struct_size = KVMI_ANSWER_LEN };
    Object *obj;
    QDict *props;
    Visitor *v;
    int fd;

    setup();
    fake_kvm.refused_command = KVMI_VM_CONTROL_EVENTS;
    props = qdict_from_jsonf_nofail("{ 'chardev': 'chr',"
                                    "  'commands': [ '8', '10', '12' ] }");
    v = qobject_input_visitor_new(QOBJECT(props));
    obj = user_creatable_add_type("kvmi", "k", props, v, &error_abort);
    object_unref(obj);
    visit_free(v);
    qobject_unref(props);

    fd = tool_accept();
    tool_send(fd, &answer, KVMI_ANSWER_LEN);
    until(tool_sees_eof(fd));
    close(fd);
    check_error("command 10");
    g_assert_cmpint(fake_kvm.fd, ==, -1);
    object_unparent(obj);
    teardown();
}

static void test_object_slow(void)
{
    TestWaiter w = new_waiter();
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr",
                     "unhook-timeout-ms", "50", NULL);

    /* Too slow */
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    until(w.called);
    check_unhook(KVMI_ACTION_STOP, KVMI_OUTCOME_FORCED);
    g_assert_nonnull(strstr(said->str, "within 50 ms"));
    until(tool_sees_eof(fd));
    close(fd);

    /* Not interested */
    fake_kvm.preunhook_errno = ENOENT;
    fd = tool_connect();
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    check_unhook(KVMI_ACTION_STOP, KVMI_OUTCOME_NOT_SUBSCRIBED);
    g_assert_true(tool_sees_eof(fd));
    close(fd);

    /* Gone, though QEMU hasn't noticed yet */
    fd = tool_connect();
    close(fd);
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    check_unhook(KVMI_ACTION_STOP, KVMI_OUTCOME_DISCONNECTED);

    object_unparent(obj);
    teardown();
}

/* A tool that keeps the guest waiting and says nothing */
static void test_object_silence(void)
{
    Object *obj;
    int64_t later;
    int fd;

    setup();
    fake_kvm.has_status = true;
    obj = add_object("k", &error_abort, "chardev", "chr",
                     "silence-timeout-ms", "50", NULL);
    fd = tool_connect();

    /* This is soon enough */
    fake_kvm.status.silence = 49;
    later = g_get_monotonic_time() + 200000;
    until(g_get_monotonic_time() > later);
    g_assert_cmpint(state(), ==, KVMI_STATE_HOOKED);

    fake_kvm.status.silence = 50;
    until(state() != KVMI_STATE_HOOKED);
    check_unhook(KVMI_ACTION_SILENCE, KVMI_OUTCOME_FORCED);
    until(tool_sees_eof(fd));
    close(fd);

    /* As long as it likes; and the limit may change meanwhile */
    object_property_set_uint(obj, "silence-timeout-ms", 0, &error_abort);
    fd = tool_connect();
    later = g_get_monotonic_time() + 200000;
    until(g_get_monotonic_time() > later);
    g_assert_cmpint(state(), ==, KVMI_STATE_HOOKED);
    object_property_set_uint(obj, "silence-timeout-ms", 40, &error_abort);
    until(state() != KVMI_STATE_HOOKED);
    check_unhook(KVMI_ACTION_SILENCE, KVMI_OUTCOME_FORCED);
    close(fd);

    fake_kvm.has_status = false;
    fake_kvm.status.silence = 0;
    object_unparent(obj);
    teardown();
}

static void test_object_cut(void)
{
    TestWaiter w = new_waiter();
    Object *obj;
    int fd, n;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);

    /* While hooked */
    fd = tool_connect();
    stop_gate_cut(STOP_ACTION_RESET);
    check_unhook(KVMI_ACTION_RESET, KVMI_OUTCOME_FORCED);
    g_assert_cmpint(fake_kvm.preunhooks, ==, 0);
    g_assert_true(tool_sees_eof(fd));
    close(fd);

    /* While the tool leaves */
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    vm_stop(RUN_STATE_IO_ERROR);
    check_unhook(KVMI_ACTION_IO_ERROR, KVMI_OUTCOME_FORCED);
    until(w.called);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);
    close(fd);

    /* During the handshake: nothing to unhook */
    vm_run();
    fd = tool_accept();
    until(state() == KVMI_STATE_HANDSHAKE);
    n = fake_kvm.unhooks;
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    vm_stop(RUN_STATE_PAUSED);
    until(state() == KVMI_STATE_UNHOOKED);
    g_assert_cmpint(fake_kvm.unhooks, ==, n);
    close(fd);

    object_unparent(obj);
    teardown();
}

/* All that can't wait; see also test_gate_cut() */
static void test_object_cuts(void)
{
    static const struct {
        RunState state;
        KvmiAction action;
    } cuts[] = {
        { RUN_STATE_DEBUG, KVMI_ACTION_DEBUG },
        { RUN_STATE_GUEST_PANICKED, KVMI_ACTION_GUEST_PANIC },
        { RUN_STATE_INTERNAL_ERROR, KVMI_ACTION_INTERNAL_ERROR },
        { RUN_STATE_IO_ERROR, KVMI_ACTION_IO_ERROR },
        { RUN_STATE_PAUSED, KVMI_ACTION_OTHER },
        { RUN_STATE_RESTORE_VM, KVMI_ACTION_LOAD },
        { RUN_STATE_SAVE_VM, KVMI_ACTION_SAVE },
        { RUN_STATE_SHUTDOWN, KVMI_ACTION_SHUTDOWN },
        { RUN_STATE_WATCHDOG, KVMI_ACTION_WATCHDOG },
    };
    Object *obj;
    int fd, i;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    for (i = 0; i < ARRAY_SIZE(cuts); i++) {
        fd = tool_connect();
        vm_stop(cuts[i].state);
        check_unhook(cuts[i].action, KVMI_OUTCOME_FORCED);
        g_assert_true(tool_sees_eof(fd));
        close(fd);
        vm_run();
    }
    g_assert_cmpint(fake_kvm.preunhooks, ==, 0);
    object_unparent(obj);
    teardown();
}

static void test_object_shutdown(void)
{
    TestWaiter w = new_waiter(), shutdown = new_waiter();
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_connect();
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_SHUTDOWN));
    check_unhook(KVMI_ACTION_SHUTDOWN, KVMI_OUTCOME_FORCED);
    g_assert_cmpint(fake_kvm.preunhooks, ==, 0);
    close(fd);

    /* Also if something else waits already */
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    g_assert_true(stop_gate_enter(&shutdown.waiter, STOP_ACTION_SHUTDOWN));
    check_unhook(KVMI_ACTION_SHUTDOWN, KVMI_OUTCOME_FORCED);
    until(w.called);
    w.called = 0;
    close(fd);

    object_property_set_str(obj, "on-shutdown", "announce", &error_abort);
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_SHUTDOWN));
    close(fd);
    until(w.called);
    check_unhook(KVMI_ACTION_SHUTDOWN, KVMI_OUTCOME_CLEAN);
    object_unparent(obj);
    teardown();
}

static void test_object_cancel(void)
{
    TestWaiter w = new_waiter();
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    stop_gate_cancel();
    until(w.cancelled);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKING);
    close(fd);
    fd = tool_connect();
    g_assert_cmpint(fake_kvm.hooks, ==, 2);
    g_assert_cmpint(fake_kvm.unhooks, ==, 1);
    close(fd);
    until(fake_kvm.fd == -1);
    object_unparent(obj);
    teardown();
}

static void test_object_migrate(void)
{
    TestWaiter w = new_waiter();
    Error *err = NULL;
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr",
                     "migrate-start-time", "on", NULL);
    g_assert_cmpint(vmstates, ==, 1);
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    close(fd);
    until(w.called);
    check_unhook(KVMI_ACTION_MIGRATE, KVMI_OUTCOME_CLEAN);

    /* The guest runs, but there is no session until the migration ends */
    fd = tool_accept();
    run_events();
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);
    vm_stop(RUN_STATE_PAUSED);
    vm_run();
    run_events();
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);
    stop_gate_leave(&w.waiter);
    until(state() == KVMI_STATE_HANDSHAKE);
    close(fd);
    fd = tool_connect();
    g_assert_cmpint(fake_kvm.hooks, ==, 2);

    /* Cancelled while the tool leaves */
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    stop_gate_leave(&w.waiter);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKING);
    close(fd);
    fd = tool_connect();
    g_assert_cmpint(w.called, ==, 1);
    g_assert_cmpint(fake_kvm.hooks, ==, 3);
    close(fd);
    until(fake_kvm.fd == -1);

    /* What migrates must neither go nor come meanwhile */
    migrating = true;
    g_assert_false(user_creatable_can_be_deleted(USER_CREATABLE(obj)));
    migrating = false;
    incoming_postcopy = true;
    g_assert_false(user_creatable_can_be_deleted(USER_CREATABLE(obj)));
    incoming_postcopy = false;
    inmigrate = true;
    g_assert_false(user_creatable_can_be_deleted(USER_CREATABLE(obj)));
    inmigrate = false;
    g_assert_true(user_creatable_can_be_deleted(USER_CREATABLE(obj)));
    object_unparent(obj);
    g_assert_cmpint(vmstates, ==, 0);
    incoming_postcopy = true;
    add_object("k", &err, "chardev", "chr", "migrate-start-time", "on", NULL);
    error_free_or_abort(&err);
    incoming_postcopy = false;
    g_assert_cmpint(vmstates, ==, 0);

    /* Without the start time there is nothing of it in the stream */
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    g_assert_cmpint(vmstates, ==, 0);
    migrating = inmigrate = true;
    g_assert_true(user_creatable_can_be_deleted(USER_CREATABLE(obj)));
    migrating = inmigrate = false;
    object_unparent(obj);
    teardown();
}

/* Without a tool, migration needn't wait, but nobody is looked for meanwhile */
static void test_object_migrate_alone(void)
{
    TestWaiter w = new_waiter();
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_accept();
    until(state() == KVMI_STATE_HANDSHAKE);
    /* Nobody comes who would make it look at the gate */
    shutdown(listen_fd, SHUT_RDWR);
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    until(state() == KVMI_STATE_UNHOOKED);
    stop_gate_leave(&w.waiter);
    until(state() == KVMI_STATE_CONNECTING);
    g_assert_true(stop_gate_enter(&w.waiter, STOP_ACTION_MIGRATE));
    until(state() == KVMI_STATE_UNHOOKED);
    stop_gate_leave(&w.waiter);
    close(fd);
    object_unparent(obj);
    teardown();
}

/* The guest runs here already, but the tool could read what has yet to come */
static void test_object_incoming_postcopy(void)
{
    Object *obj;
    int fd;

    setup();
    incoming_postcopy = true;
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_accept();
    run_events();
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);
    incoming_postcopy = false;
    until(state() == KVMI_STATE_HANDSHAKE);
    close(fd);
    fd = tool_connect();
    close(fd);
    until(fake_kvm.fd == -1);
    object_unparent(obj);
    teardown();
}

static void test_object_handshake(void)
{
    static const char cookie[] = "secret";
    g_autofree uint8_t *hash = NULL;
    KvmiAnswer answer = { .struct_size = sizeof(answer) };
    Object *obj, *secret;
    char hello[104];
    size_t len;
    int fd;

    setup();
    secret = object_new_with_props("secret", object_get_objects_root(), "sec",
                                   &error_abort, "data", cookie, NULL);
    obj = add_object("k", &error_abort, "chardev", "chr", "key", "sec",
                     "handshake-timeout-ms", "1000", NULL);

    /* No answer */
    fd = tool_accept();
    g_assert_cmpint(tool_recv(fd, hello, sizeof(hello)), ==, sizeof(hello));
    until(tool_sees_eof(fd));
    check_error("did not answer");
    close(fd);

    /* Half an answer */
    fd = tool_accept();
    tool_send(fd, &answer, 10);
    until(state() == KVMI_STATE_HANDSHAKE);
    until(tool_sees_eof(fd));
    check_error("did not answer");
    close(fd);

    /* The wrong key */
    fd = tool_accept();
    tool_send(fd, &answer, sizeof(answer));
    until(state() == KVMI_STATE_HANDSHAKE);
    until(tool_sees_eof(fd));
    check_error("wrong key");
    close(fd);

    /* Not a tool */
    fd = tool_accept();
    tool_send(fd, "HTTP/1.1", 8);
    until(state() == KVMI_STATE_HANDSHAKE);
    until(tool_sees_eof(fd));
    check_error("not a KVMI tool");
    close(fd);
    g_assert_cmpint(fake_kvm.hooks, ==, 0);

    /* KVM doesn't want */
    fake_kvm.hook_errno = EEXIST;
    qcrypto_hash_bytes(QCRYPTO_HASH_ALGO_SHA1, cookie, strlen(cookie), &hash,
                       &len, &error_abort);
    memcpy(answer.cookie_hash, hash, len);
    fd = tool_accept();
    tool_send(fd, &answer, sizeof(answer));
    until(state() == KVMI_STATE_HANDSHAKE);
    until(tool_sees_eof(fd));
    check_error("KVM refuses");
    close(fd);

    /* All is well */
    fake_kvm.hook_errno = 0;
    fd = tool_accept();
    tool_send(fd, &answer, sizeof(answer));
    until(state() == KVMI_STATE_HOOKED);
    close(fd);
    until(fake_kvm.fd == -1);

    object_unparent(obj);
    object_unparent(secret);
    teardown();
}

static void enter_bh(void *opaque)
{
    g_assert_true(stop_gate_enter(opaque, STOP_ACTION_STOP));
}

/* The answer arrives in the same turn of the main loop as a stop */
static void test_object_handshake_stopped(void)
{
    KvmiAnswer answer = { .struct_size = KVMI_ANSWER_LEN };
    TestWaiter w = new_waiter();
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_accept();
    until(state() == KVMI_STATE_HANDSHAKE);
    run_events();
    tool_send(fd, &answer, KVMI_ANSWER_LEN);
    aio_bh_schedule_oneshot(iohandler_get_aio_context(), enter_bh, &w.waiter);
    main_loop_wait(true);
    g_assert_cmpint(state(), ==, KVMI_STATE_CONNECTING);
    run_events();
    g_assert_cmpint(fake_kvm.hooks, ==, 0);
    close(fd);
    close(tool_connect());
    until(fake_kvm.fd == -1);
    object_unparent(obj);
    teardown();
}

/* Another error each time does not fill QEMU's log */
static void test_object_reports(void)
{
    Object *obj;
    uint32_t i;
    int fd, n = 0;
    char *line;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    for (i = 0; i < 15; i++) {
        g_autofree char *text = g_strdup_printf(" %" PRIu32 " bytes", i);

        fd = tool_accept();
        tool_send(fd, &i, sizeof(i));
        until(tool_sees_eof(fd));
        close(fd);
        check_error(text);
    }
    for (line = said->str; (line = strstr(line, "claims")); line++) {
        n++;
    }
    g_assert_cmpint(n, ==, 10);
    object_unparent(obj);
    teardown();
}

static void test_object_hmac(void)
{
    Object *obj, *secret;
    KvmiHello hello;
    KvmiAnswer answer = { .struct_size = 24 };
    KvmiProof proof;
    uint8_t expected[32];
    Error *err = NULL;
    int fd;

    setup();
    add_object("k", &err, "chardev", "chr", "auth", "hmac", NULL);
    g_assert_nonnull(strstr(error_get_pretty(err), "needs a key"));
    error_free_or_abort(&err);

    secret = object_new_with_props("secret", object_get_objects_root(), "sec",
                                   &error_abort, "data", "secret", NULL);
    obj = add_object("k", &error_abort, "chardev", "chr", "key", "sec",
                     "auth", "hmac", NULL);

    /* A legacy tool, which knows the key */
    fd = tool_accept();
    g_assert_cmpint(tool_recv(fd, &hello, sizeof(hello)), ==, 144);
    g_assert_cmpuint(hello.struct_size, ==, 144);
    tool_send(fd, &answer, 24);
    until(tool_sees_eof(fd));
    check_error("auth=hmac");
    close(fd);

    fd = tool_accept();
    tool_recv(fd, &hello, sizeof(hello));
    answer_hmac(&answer, "secrel", &hello);
    tool_send(fd, &answer, sizeof(answer));
    until(tool_sees_eof(fd));
    check_error("wrong key");
    close(fd);
    g_assert_cmpint(fake_kvm.hooks, ==, 0);

    /* In two pieces, with a command behind it that is KVM's */
    fd = tool_accept();
    tool_recv(fd, &hello, sizeof(hello));
    answer_hmac(&answer, "secret", &hello);
    tool_send(fd, &answer, 30);
    run_events();
    tool_send(fd, (char *)&answer + 30, 66);
    g_assert_cmpint(tool_recv(fd, &proof, sizeof(proof)), ==, 40);
    tool_hmac("secret", "kvmi-hmac-qemu", &hello, &answer, 96, expected);
    g_assert_cmpmem(proof.proof, 32, expected, 32);
    until(state() == KVMI_STATE_HOOKED);
    close(fd);
    until(fake_kvm.fd == -1);

    object_unparent(obj);
    object_unparent(secret);
    teardown();
}

static bool detached(void)
{
    KvmiInfo *info = query();
    bool d = info->detached;

    qapi_free_KvmiInfo(info);
    return d;
}

static void test_object_unhook(void)
{
    TestWaiter w = new_waiter();
    Error *err = NULL;
    Object *obj;
    int fd;

    setup();
    qmp_kvmi_unhook(false, 0, &err);
    error_free_or_abort(&err);
    qmp_kvmi_hook(&err);
    error_free_or_abort(&err);
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);

    /* The tool is asked, and none is let in, until kvmi-hook */
    fd = tool_connect();
    qmp_kvmi_unhook(false, 0, &error_abort);
    until(state() == KVMI_STATE_UNHOOKING);
    close(fd);
    until(state() == KVMI_STATE_UNHOOKED);
    check_unhook(KVMI_ACTION_UNHOOK, KVMI_OUTCOME_CLEAN);
    vm_stop(RUN_STATE_PAUSED);
    vm_run();
    fd = tool_accept();
    run_events();
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);
    g_assert_true(detached());
    qmp_kvmi_hook(&error_abort);
    until(state() == KVMI_STATE_HANDSHAKE);
    g_assert_false(detached());
    close(fd);

    /* At once; and cont lets tools in, too */
    fd = tool_connect();
    qmp_kvmi_unhook(true, 0, &error_abort);
    until(tool_sees_eof(fd));
    check_unhook(KVMI_ACTION_UNHOOK, KVMI_OUTCOME_FORCED);
    close(fd);
    run_events();
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKED);
    stop_gate_cancel();
    fd = tool_connect();

    /* A deadline of its own */
    qmp_kvmi_unhook(true, 50, &error_abort);
    until(state() == KVMI_STATE_UNHOOKED);
    check_unhook(KVMI_ACTION_UNHOOK, KVMI_OUTCOME_FORCED);
    g_assert_nonnull(strstr(said->str, "within 50 ms"));
    close(fd);
    qmp_kvmi_hook(&error_abort);

    /* A wait is cut short, and not made longer */
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    qmp_kvmi_unhook(true, 60000, &error_abort);
    run_events();
    g_assert_cmpint(w.called, ==, 0);
    qmp_kvmi_unhook(true, 60, &error_abort);
    until(w.called);
    check_unhook(KVMI_ACTION_STOP, KVMI_OUTCOME_FORCED);
    g_assert_nonnull(strstr(said->str, "within 60 ms"));
    close(fd);
    qmp_kvmi_hook(&error_abort);
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    qmp_kvmi_unhook(false, 0, &error_abort);
    until(w.called == 2);
    close(fd);

    /* stop during kvmi-unhook */
    qmp_kvmi_hook(&error_abort);
    fd = tool_connect();
    qmp_kvmi_unhook(false, 0, &error_abort);
    until(state() == KVMI_STATE_UNHOOKING);
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    close(fd);
    until(w.called == 3);
    check_unhook(KVMI_ACTION_UNHOOK, KVMI_OUTCOME_CLEAN);
    object_unparent(obj);
    run_events();
    teardown();
}

static void test_object_status(void)
{
    KvmiInfo *info;
    Object *obj;
    int fd;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_connect();
    stop_gate_cut(STOP_ACTION_RESET);
    info = query();
    g_assert_false(info->last_unhook->has_restored);
    g_assert_false(info->last_unhook->has_reason);
    qapi_free_KvmiInfo(info);
    close(fd);

    fake_kvm.has_status = true;
    fake_kvm.status.reason = KVM_INTROSPECTION_END_UNHOOK;
    fake_kvm.status.restored = 17;
    fd = tool_connect();
    stop_gate_cut(STOP_ACTION_RESET);
    info = query();
    g_assert_cmpuint(info->last_unhook->restored, ==, 17);
    g_assert_cmpint(info->last_unhook->reason, ==, KVMI_REASON_UNHOOK);
    qapi_free_KvmiInfo(info);
    close(fd);
    object_unparent(obj);
    teardown();
}

/* Who hangs up when asked to leave hasn't always left in order */
static void test_object_disorder(void)
{
    static const struct {
        uint32_t reason;
        uint64_t restored;
        KvmiOutcome outcome;
    } ends[] = {
        { KVM_INTROSPECTION_END_CLOSED, 0, KVMI_OUTCOME_CLEAN },
        { KVM_INTROSPECTION_END_CLOSED, 1, KVMI_OUTCOME_DISCONNECTED },
        { KVM_INTROSPECTION_END_PROTOCOL, 0, KVMI_OUTCOME_DISCONNECTED },
        { KVM_INTROSPECTION_END_UNREAD, 0, KVMI_OUTCOME_DISCONNECTED },
        /* QEMU was faster than KVM to see it */
        { KVM_INTROSPECTION_END_UNHOOK, 0, KVMI_OUTCOME_CLEAN },
        { KVM_INTROSPECTION_END_UNHOOK, 2, KVMI_OUTCOME_DISCONNECTED },
    };
    Object *obj;
    int fd, i;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fake_kvm.has_status = true;
    for (i = 0; i < ARRAY_SIZE(ends); i++) {
        TestWaiter w = new_waiter();
        KvmiInfo *info;

        fake_kvm.status.reason = ends[i].reason;
        fake_kvm.status.restored = ends[i].restored;
        fd = tool_connect();
        g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
        close(fd);
        until(w.called);
        check_unhook(KVMI_ACTION_STOP, ends[i].outcome);
        /* Complete before the events */
        info = query();
        g_assert_true(info->last_unhook->has_reason);
        g_assert_cmpuint(info->last_unhook->restored, ==, ends[i].restored);
        g_assert_cmpuint(info->unhooks->clean + info->unhooks->disconnected,
                         ==, i + 1);
        qapi_free_KvmiInfo(info);
    }
    object_unparent(obj);
    teardown();
}

/* The old name and spellings */
static void test_object_introspection(void)
{
    Error *err = NULL;
    QDict *props;
    Object *obj;
    Visitor *v;
    int fd;

    setup();
    props = qdict_from_jsonf_nofail("{ 'chardev': 'chr',"
                                    "  'handshake_timeout': 3,"
                                    "  'unhook_timeout': 60,"
                                    "  'async_unhook': true,"
                                    "  'command': [ '8', '10' ],"
                                    "  'event': [ '0' ] }");
    v = qobject_input_visitor_new(QOBJECT(props));
    obj = user_creatable_add_type("introspection", "k", props, v,
                                  &error_abort);
    object_unref(obj);
    visit_free(v);
    qobject_unref(props);

    g_assert_cmpuint(object_property_get_uint(obj, "handshake-timeout-ms",
                                              NULL), ==, 3000);
    g_assert_cmpuint(object_property_get_uint(obj, "unhook-timeout-ms", NULL),
                     ==, 60000);
    g_assert_cmpuint(object_property_get_uint(obj, "unhook_timeout", NULL),
                     ==, 60);
    object_property_set_uint(obj, "unhook_timeout", 5000000, &err);
    error_free_or_abort(&err);
    add_object("k2", &err, "chardev", "chr", NULL);
    error_free_or_abort(&err);
    fd = tool_connect();
    g_assert_cmphex(fake_kvm.commands, ==,
                    1 << KVMI_VM_GET_INFO | 1 << KVMI_VM_CONTROL_EVENTS);
    g_assert_cmphex(fake_kvm.events, ==, 1 << KVMI_VM_EVENT_UNHOOK);
    close(fd);
    until(fake_kvm.fd == -1);
    object_unparent(obj);
    teardown();
}

static void test_object_delete(void)
{
    TestWaiter w = new_waiter();
    Error *err = NULL;
    Object *obj;
    int fd;

    setup();

    /* Another object takes over */
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_connect();
    object_unparent(obj);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKING);
    /* Not one that can't be */
    add_object("k", &err, "chardev", "nosuch", NULL);
    error_free_or_abort(&err);
    add_object("k", &err, "chardev", "chr", "key", "nosuch", NULL);
    error_free_or_abort(&err);
    g_assert_cmpint(state(), ==, KVMI_STATE_UNHOOKING);
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    g_assert_cmpint(fake_kvm.unhooks, ==, 1);
    until(tool_sees_eof(fd));
    close(fd);

    /* Deleted while stop waits for it: both come to an end */
    fd = tool_connect();
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    object_unparent(obj);
    run_events();
    g_assert_cmpint(w.called, ==, 0);
    close(fd);
    until(w.called);
    g_assert_cmpint(w.cancelled, ==, 0);
    g_assert_cmpint(fake_kvm.unhooks, ==, 2);
    run_events();

    /* The other way round */
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    fd = tool_connect();
    object_unparent(obj);
    g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
    close(fd);
    until(w.called == 2);
    g_assert_cmpint(fake_kvm.unhooks, ==, 3);
    run_events();
    teardown();
}

static int count_fds(void)
{
    GDir *dir = g_dir_open("/proc/self/fd", 0, NULL);
    int n = 0;

    while (g_dir_read_name(dir)) {
        n++;
    }
    g_dir_close(dir);
    return n;
}

static void test_object_fds(void)
{
    TestWaiter w = new_waiter();
    int cycles = g_test_slow() ? 1000 : 100;
    int fd, i, before = 0;
    Object *obj;

    setup();
    obj = add_object("k", &error_abort, "chardev", "chr", NULL);
    for (i = 0; i < cycles; i++) {
        fd = tool_connect();
        if (i % 2) {
            g_assert_false(stop_gate_enter(&w.waiter, STOP_ACTION_STOP));
            close(fd);
            until(w.called == i / 2 + 1);
        } else {
            stop_gate_cut(STOP_ACTION_RESET);
            until(tool_sees_eof(fd));
            close(fd);
        }
        if (i == 1) {
            before = count_fds();
        }
    }
    run_events();
    /* The next connection may be there, and not have been at first */
    g_assert_cmpint(count_fds(), <=, before + 1);
    object_unparent(obj);
    teardown();
}

int main(int argc, char **argv)
{
    module_call_init(MODULE_INIT_QOM);
    qemu_add_opts(&qemu_chardev_opts);
    qemu_init_main_loop(&error_abort);
    qcrypto_init(&error_abort);
    socket_init();

    said = g_string_new(NULL);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/kvmi/handshake/hello", test_hello);
    g_test_add_func("/kvmi/handshake/answer", test_answer);
    g_test_add_func("/kvmi/handshake/answer-hostile", test_answer_hostile);
    g_test_add_func("/kvmi/handshake/answer-too-much", test_answer_too_much);
    g_test_add_func("/kvmi/handshake/cookie", test_cookie);
    g_test_add_func("/kvmi/handshake/hmac", test_hmac);
    g_test_add_func("/kvmi/allowed", test_allowed);
    g_test_add_func("/kvmi/states", test_states);
    g_test_add_func("/kvmi/gate/open", test_gate_open);
    g_test_add_func("/kvmi/gate/wait", test_gate_wait);
    g_test_add_func("/kvmi/gate/cut", test_gate_cut);
    g_test_add_func("/kvmi/gate/hold", test_gate_hold);
    g_test_add_func("/kvmi/gate/cancel", test_gate_cancel);
    g_test_add_func("/kvmi/gate/moot", test_gate_moot);
    g_test_add_func("/kvmi/gate/order", test_gate_order);
    g_test_add_func("/kvmi/gate/run", test_gate_run);
    g_test_add_func("/kvmi/gate/pause", test_gate_pause);
    g_test_add_func("/kvmi/gate/remove", test_gate_remove);
    g_test_add_func("/kvmi/object/errors", test_object_errors);
    g_test_add_func("/kvmi/object/session", test_object_session);
    g_test_add_func("/kvmi/object/allowed", test_object_allowed);
    g_test_add_func("/kvmi/object/refused", test_object_refused);
    g_test_add_func("/kvmi/object/slow", test_object_slow);
    g_test_add_func("/kvmi/object/silence", test_object_silence);
    g_test_add_func("/kvmi/object/cut", test_object_cut);
    g_test_add_func("/kvmi/object/cuts", test_object_cuts);
    g_test_add_func("/kvmi/object/shutdown", test_object_shutdown);
    g_test_add_func("/kvmi/object/cancel", test_object_cancel);
    g_test_add_func("/kvmi/object/migrate", test_object_migrate);
    g_test_add_func("/kvmi/object/migrate-alone", test_object_migrate_alone);
    g_test_add_func("/kvmi/object/incoming-postcopy",
                    test_object_incoming_postcopy);
    g_test_add_func("/kvmi/object/handshake", test_object_handshake);
    g_test_add_func("/kvmi/object/handshake-stopped",
                    test_object_handshake_stopped);
    g_test_add_func("/kvmi/object/reports", test_object_reports);
    g_test_add_func("/kvmi/object/hmac", test_object_hmac);
    g_test_add_func("/kvmi/object/unhook", test_object_unhook);
    g_test_add_func("/kvmi/object/status", test_object_status);
    g_test_add_func("/kvmi/object/disorder", test_object_disorder);
    g_test_add_func("/kvmi/object/introspection", test_object_introspection);
    g_test_add_func("/kvmi/object/delete", test_object_delete);
    g_test_add_func("/kvmi/object/fds", test_object_fds);
    return g_test_run();
}
