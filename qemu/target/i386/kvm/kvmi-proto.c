/*
 * KVM introspection: handshake, names of commands and events, states
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/kvmi.h>
#include "crypto/hmac.h"
#include "crypto/random.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qemu/cutils.h"
#include "kvmi-proto.h"

typedef struct KvmiId {
    const char *name;
    uint16_t id;
    bool always;        /* can't be forbidden */
} KvmiId;

/* The names of linux/kvmi.h in lower case, without KVMI_ */
static const KvmiId commands[] = {
    { "get-version",             KVMI_GET_VERSION, true },
    { "vm-check-command",        KVMI_VM_CHECK_COMMAND, true },
    { "vm-check-event",          KVMI_VM_CHECK_EVENT, true },
    { "vm-get-info",             KVMI_VM_GET_INFO },
    { "vm-control-events",       KVMI_VM_CONTROL_EVENTS },
    { "vm-read-physical",        KVMI_VM_READ_PHYSICAL },
    { "vm-write-physical",       KVMI_VM_WRITE_PHYSICAL },
    { "vm-pause-vcpu",           KVMI_VM_PAUSE_VCPU },
    { "vm-control-cleanup",      KVMI_VM_CONTROL_CLEANUP },
    { "vm-set-page-access",      KVMI_VM_SET_PAGE_ACCESS },
    { "vm-get-page-access",      KVMI_VM_GET_PAGE_ACCESS },
    { "vm-get-max-gfn",          KVMI_VM_GET_MAX_GFN },
    { "vcpu-get-info",           KVMI_VCPU_GET_INFO },
    { "vcpu-control-events",     KVMI_VCPU_CONTROL_EVENTS },
    { "vcpu-get-registers",      KVMI_VCPU_GET_REGISTERS },
    { "vcpu-set-registers",      KVMI_VCPU_SET_REGISTERS },
    { "vcpu-get-cpuid",          KVMI_VCPU_GET_CPUID },
    { "vcpu-control-cr",         KVMI_VCPU_CONTROL_CR },
    { "vcpu-inject-exception",   KVMI_VCPU_INJECT_EXCEPTION },
    { "vcpu-get-xcr",            KVMI_VCPU_GET_XCR },
    { "vcpu-get-xsave",          KVMI_VCPU_GET_XSAVE },
    { "vcpu-set-xsave",          KVMI_VCPU_SET_XSAVE },
    { "vcpu-get-mtrr-type",      KVMI_VCPU_GET_MTRR_TYPE },
    { "vcpu-control-msr",        KVMI_VCPU_CONTROL_MSR },
    { "vcpu-control-singlestep", KVMI_VCPU_CONTROL_SINGLESTEP },
    { "vcpu-translate-gva",      KVMI_VCPU_TRANSLATE_GVA },
    { "vcpu-set-sregs",          KVMI_VCPU_SET_SREGS },
    { "vcpu-set-msrs",           KVMI_VCPU_SET_MSRS },
    { }
};

/* Likewise, without KVMI_VM_EVENT_ and KVMI_VCPU_EVENT_ */
static const KvmiId events[] = {
    { "unhook",     KVMI_VM_EVENT_UNHOOK },
    { "pause",      KVMI_VCPU_EVENT_PAUSE },
    { "hypercall",  KVMI_VCPU_EVENT_HYPERCALL },
    { "breakpoint", KVMI_VCPU_EVENT_BREAKPOINT },
    { "cr",         KVMI_VCPU_EVENT_CR },
    { "trap",       KVMI_VCPU_EVENT_TRAP },
    { "xsetbv",     KVMI_VCPU_EVENT_XSETBV },
    { "descriptor", KVMI_VCPU_EVENT_DESCRIPTOR },
    { "msr",        KVMI_VCPU_EVENT_MSR },
    { "pf",         KVMI_VCPU_EVENT_PF },
    { "singlestep", KVMI_VCPU_EVENT_SINGLESTEP },
    { }
};

static const KvmiId *ids_of(KvmiIdSpace space)
{
    return space == KVMI_COMMANDS ? commands : events;
}

void kvmi_hello_init(KvmiHello *hello, const QemuUUID *uuid, const char *name,
                     int64_t start_time, uint64_t max_gpa)
{
    memset(hello, 0, sizeof(*hello));
    hello->struct_size = KVMI_HELLO_LEN;
    memcpy(hello->uuid, uuid->data, sizeof(hello->uuid));
    hello->start_time = start_time;
    pstrcpy(hello->name, sizeof(hello->name), name ?: "");
    hello->max_gpa = max_gpa;
}

bool kvmi_hello_hmac(KvmiHello *hello, Error **errp)
{
    hello->struct_size = sizeof(*hello);
    hello->auth = KVMI_AUTH_HMAC_SHA256;
    return qcrypto_random_bytes(hello->nonce, sizeof(hello->nonce), errp) == 0;
}

void kvmi_answer_start(KvmiAnswerReader *reader)
{
    memset(reader, 0, sizeof(*reader));
}

size_t kvmi_answer_wanted(const KvmiAnswerReader *reader)
{
    size_t end = sizeof(reader->answer.struct_size);

    if (reader->received >= end) {
        end = reader->answer.struct_size;
    }
    return end - reader->received;
}

bool kvmi_answer_feed(KvmiAnswerReader *reader, const void *buf, size_t len,
                      Error **errp)
{
    if (len > kvmi_answer_wanted(reader)) {
        error_setg(errp, "more of the tool's answer was read than it has");
        return false;
    }

    /* What we don't know is read and ignored */
    if (reader->received < sizeof(reader->answer)) {
        memcpy((uint8_t *)&reader->answer + reader->received, buf,
               MIN(len, sizeof(reader->answer) - reader->received));
    }
    reader->received += len;

    if (reader->received == sizeof(reader->answer.struct_size) &&
        (reader->answer.struct_size < KVMI_ANSWER_LEN ||
         reader->answer.struct_size > KVMI_ANSWER_MAX)) {
        error_setg(errp, "the tool's answer claims to be %" PRIu32 " bytes"
                   " long: not a KVMI tool, or one of another version",
                   reader->answer.struct_size);
        return false;
    }
    return true;
}

static bool secret_equal(const uint8_t *a, const uint8_t *b, size_t len)
{
    volatile uint8_t diff = 0; /* volatile: no early exit by the compiler */
    size_t i;

    for (i = 0; i < len; i++) {
        diff |= a[i] ^ b[i];
    }
    return !diff;
}

bool kvmi_cookie_equal(const uint8_t a[KVMI_COOKIE_LEN],
                       const uint8_t b[KVMI_COOKIE_LEN])
{
    return secret_equal(a, b, KVMI_COOKIE_LEN);
}

/*
 * The MAC of one side: of what was said until then, behind a label, so that
 * neither can be taken for the other.
 */
static bool kvmi_hmac(const uint8_t *key, size_t key_len,
                      const char label[16], const KvmiHello *hello,
                      const KvmiAnswer *answer, size_t answer_len,
                      uint8_t mac[KVMI_HMAC_LEN], Error **errp)
{
    g_autoptr(QCryptoHmac) hmac = qcrypto_hmac_new(QCRYPTO_HASH_ALGO_SHA256,
                                                   key, key_len, errp);
    struct iovec iov[] = {
        { .iov_base = (void *)label, .iov_len = 16 },
        { .iov_base = (void *)hello, .iov_len = sizeof(*hello) },
        { .iov_base = (void *)answer, .iov_len = answer_len },
    };
    g_autofree uint8_t *result = NULL;
    size_t result_len = 0;

    if (!hmac || qcrypto_hmac_bytesv(hmac, iov, ARRAY_SIZE(iov), &result,
                                     &result_len, errp) < 0) {
        return false;
    }
    assert(result_len == KVMI_HMAC_LEN);
    memcpy(mac, result, KVMI_HMAC_LEN);
    return true;
}

bool kvmi_hmac_check(const KvmiHello *hello, const KvmiAnswer *answer,
                     const uint8_t *key, size_t key_len, KvmiProof *proof,
                     Error **errp)
{
    uint8_t expected[KVMI_HMAC_LEN];

    if (answer->struct_size < sizeof(*answer) ||
        answer->auth != KVMI_AUTH_HMAC_SHA256) {
        error_setg(errp, "the tool doesn't authenticate itself by HMAC, which"
                   " auth=hmac asks for");
        return false;
    }
    if (!kvmi_hmac(key, key_len, "kvmi-hmac-tool\0", hello, answer,
                   offsetof(KvmiAnswer, proof), expected, errp)) {
        return false;
    }
    if (!secret_equal(answer->proof, expected, KVMI_HMAC_LEN)) {
        error_setg(errp, "the tool has the wrong key (or none)");
        return false;
    }

    memset(proof, 0, sizeof(*proof));
    proof->struct_size = sizeof(*proof);
    return kvmi_hmac(key, key_len, "kvmi-hmac-qemu\0", hello, answer,
                     sizeof(*answer), proof->proof, errp);
}

static const KvmiId *find_id(const KvmiId *table, const char *text)
{
    const KvmiId *entry;
    unsigned int number;
    bool is_number = qemu_strtoui(text, NULL, 0, &number) == 0;

    for (entry = table; entry->name; entry++) {
        if (is_number ? entry->id == number : !strcmp(entry->name, text)) {
            return entry;
        }
    }
    return NULL;
}

static uint64_t matching_ids(const KvmiId *table, const char *pattern)
{
    const KvmiId *entry;
    uint64_t ids = 0;

    /* GLib's patterns must be UTF-8, which a command line need not be */
    if (!g_utf8_validate(pattern, -1, NULL)) {
        return 0;
    }

    for (entry = table; entry->name; entry++) {
        if (g_pattern_match_simple(pattern, entry->name)) {
            ids |= 1ULL << entry->id;
        }
    }
    return ids;
}

static void error_unknown_id(Error **errp, KvmiIdSpace space, const char *text)
{
    g_autoptr(GString) names = g_string_new(NULL);
    const KvmiId *entry;

    for (entry = ids_of(space); entry->name; entry++) {
        g_string_append_printf(names, "%s%s (%u)", names->len ? ", " : "",
                               entry->name, entry->id);
    }
    error_setg(errp, "unknown KVMI %s '%s'; known are: %s",
               space == KVMI_COMMANDS ? "command" : "event", text, names->str);
}

bool kvmi_allowed_parse(KvmiAllowed *allowed, KvmiIdSpace space,
                        const strList *list, Error **errp)
{
    KvmiAllowed result = { };

    for (; list; list = list->next) {
        const KvmiId *entry;

        if (g_str_equal(list->value, "*")) {
            /* Also those that only a later KVM knows */
            result.all = true;
            continue;
        }
        if (strpbrk(list->value, "*?")) {
            uint64_t matching = matching_ids(ids_of(space), list->value);

            if (!matching) {
                error_unknown_id(errp, space, list->value);
                return false;
            }
            result.ids |= matching;
            continue;
        }

        entry = find_id(ids_of(space), list->value);
        if (!entry) {
            error_unknown_id(errp, space, list->value);
            return false;
        }
        assert(entry->id < 64);
        result.ids |= 1ULL << entry->id;
    }
    *allowed = result;
    return true;
}

strList *kvmi_allowed_names(const KvmiAllowed *allowed, KvmiIdSpace space)
{
    strList *list = NULL, **tail = &list;
    const KvmiId *entry;

    for (entry = ids_of(space); entry->name; entry++) {
        if (allowed->all || entry->always ||
            (allowed->ids & (1ULL << entry->id))) {
            QAPI_LIST_APPEND(tail, g_strdup(entry->name));
        }
    }
    return list;
}

bool kvmi_state_change_valid(KvmiState from, KvmiState to)
{
#define TO(state) (1u << KVMI_STATE_##state)
    static const unsigned int valid[KVMI_STATE__MAX] = {
        [KVMI_STATE_UNHOOKED] = TO(CONNECTING),
        [KVMI_STATE_CONNECTING] = TO(HANDSHAKE) | TO(UNHOOKED),
        [KVMI_STATE_HANDSHAKE] = TO(HOOKED) | TO(CONNECTING),
        [KVMI_STATE_HOOKED] = TO(UNHOOKING) | TO(UNHOOKED),
        [KVMI_STATE_UNHOOKING] = TO(UNHOOKED),
    };
#undef TO

    return valid[from] & (1u << to);
}
