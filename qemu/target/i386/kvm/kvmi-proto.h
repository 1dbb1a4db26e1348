/*
 * KVM introspection: handshake, names of commands and events, states
 *
 * Nothing here needs KVM or a VM.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef TARGET_I386_KVM_KVMI_PROTO_H
#define TARGET_I386_KVM_KVMI_PROTO_H

#include "qapi/qapi-types-kvmi.h"
#include "qemu/uuid.h"

#define KVMI_COOKIE_LEN 20      /* SHA-1 */

/*
 * The handshake, on the socket that KVM gets afterwards.  QEMU speaks first.
 * All numbers are in host byte order.
 */
typedef struct KvmiHello {
    uint32_t struct_size;
    uint8_t uuid[16];
    uint32_t padding;
    int64_t start_time;         /* Unix time of the guest's start or reset */
    char name[64];              /* NUL-terminated */
    uint64_t max_gpa;           /* end of the highest RAM */
} KvmiHello;

typedef struct KvmiAnswer {
    uint32_t struct_size;       /* may be larger than this structure */
    uint8_t cookie_hash[KVMI_COOKIE_LEN];
} KvmiAnswer;

QEMU_BUILD_BUG_ON(sizeof(KvmiHello) != 104);
QEMU_BUILD_BUG_ON(sizeof(KvmiAnswer) != 24);

/* What a later version of a tool may add to its answer has an end */
#define KVMI_ANSWER_MAX (64 * 1024)

void kvmi_hello_init(KvmiHello *hello, const QemuUUID *uuid, const char *name,
                     int64_t start_time, uint64_t max_gpa);

/* Collects an answer that comes in pieces */
typedef struct KvmiAnswerReader {
    KvmiAnswer answer;
    size_t received;            /* bytes so far, including those ignored */
} KvmiAnswerReader;

void kvmi_answer_start(KvmiAnswerReader *reader);

/*
 * How many bytes to read next: never a byte beyond the answer, as KVM reads
 * what follows.  0: the answer is complete.
 */
size_t kvmi_answer_wanted(const KvmiAnswerReader *reader);

/* @len is at most what was wanted.  False: not an answer. */
bool kvmi_answer_feed(KvmiAnswerReader *reader, const void *buf, size_t len,
                      Error **errp);

/* In constant time */
bool kvmi_cookie_equal(const uint8_t a[KVMI_COOKIE_LEN],
                       const uint8_t b[KVMI_COOKIE_LEN]);

/* A list of commands or events that tools may use */
typedef struct KvmiAllowed {
    bool all;
    uint64_t ids;
} KvmiAllowed;

typedef enum KvmiIdSpace {
    KVMI_COMMANDS,
    KVMI_EVENTS,
} KvmiIdSpace;

/* @list holds names or numbers */
bool kvmi_allowed_parse(KvmiAllowed *allowed, KvmiIdSpace space,
                        const strList *list, Error **errp);
/* The names, including those of commands that can't be forbidden */
strList *kvmi_allowed_names(const KvmiAllowed *allowed, KvmiIdSpace space);

bool kvmi_state_change_valid(KvmiState from, KvmiState to);

#endif
