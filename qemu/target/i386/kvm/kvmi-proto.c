/*
 * KVM introspection: handshake, names of commands and events, states
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <linux/kvmi.h>
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
    hello->struct_size = sizeof(*hello);
    memcpy(hello->uuid, uuid->data, sizeof(hello->uuid));
    hello->start_time = start_time;
    pstrcpy(hello->name, sizeof(hello->name), name ?: "");
    hello->max_gpa = max_gpa;
}

void kvmi_answer_start(KvmiAnswerReader *reader)
{
    memset(reader, 0, sizeof(*reader));
}

size_t kvmi_answer_wanted(const KvmiAnswerReader *reader)
{
    size_t end = sizeof(reader->answer.struct_size);

    /* The size first; the answer as we know it; then what we don't know */
    if (reader->received >= end) {
        end = sizeof(reader->answer);
    }
    if (reader->received >= end) {
        end = reader->answer.struct_size;
    }
    return end - reader->received;
}

bool kvmi_answer_feed(KvmiAnswerReader *reader, const void *buf, size_t len,
                      Error **errp)
{
    assert(len <= kvmi_answer_wanted(reader));

    if (reader->received < sizeof(reader->answer)) {
        memcpy((uint8_t *)&reader->answer + reader->received, buf, len);
    }
    reader->received += len;

    if (reader->received == sizeof(reader->answer.struct_size) &&
        (reader->answer.struct_size < sizeof(reader->answer) ||
         reader->answer.struct_size > KVMI_ANSWER_MAX)) {
        error_setg(errp, "the tool's answer claims to be %" PRIu32 " bytes"
                   " long: not a KVMI tool, or one of another version",
                   reader->answer.struct_size);
        return false;
    }
    return true;
}

bool kvmi_cookie_equal(const uint8_t a[KVMI_COOKIE_LEN],
                       const uint8_t b[KVMI_COOKIE_LEN])
{
    volatile uint8_t diff = 0; /* volatile: no early exit by the compiler */
    int i;

    for (i = 0; i < KVMI_COOKIE_LEN; i++) {
        diff |= a[i] ^ b[i];
    }
    return !diff;
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
        const KvmiId *entry = find_id(ids_of(space), list->value);

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
