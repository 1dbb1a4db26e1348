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
#define KVMI_HMAC_LEN 32        /* SHA-256 */
#define KVMI_NONCE_LEN 32

#define KVMI_AUTH_HMAC_SHA256 1

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
    /* KVMI_HELLO_LEN ends here.  With auth=hmac only: */
    uint32_t auth;              /* KVMI_AUTH_HMAC_SHA256 */
    uint32_t padding2;
    uint8_t nonce[KVMI_NONCE_LEN];
} KvmiHello;

typedef struct KvmiAnswer {
    uint32_t struct_size;       /* may be larger than this structure */
    uint8_t cookie_hash[KVMI_COOKIE_LEN];
    /* KVMI_ANSWER_LEN ends here.  With auth=hmac only: */
    uint32_t auth;              /* as in the hello */
    uint32_t padding;
    uint8_t nonce[KVMI_NONCE_LEN];
    uint8_t proof[KVMI_HMAC_LEN];
} KvmiAnswer;

/* With auth=hmac, QEMU has the last word */
typedef struct KvmiProof {
    uint32_t struct_size;
    uint32_t padding;
    uint8_t proof[KVMI_HMAC_LEN];
} KvmiProof;

#define KVMI_HELLO_LEN 104
#define KVMI_ANSWER_LEN 24

QEMU_BUILD_BUG_ON(offsetof(KvmiHello, auth) != KVMI_HELLO_LEN);
QEMU_BUILD_BUG_ON(sizeof(KvmiHello) != 144);
QEMU_BUILD_BUG_ON(offsetof(KvmiAnswer, auth) != KVMI_ANSWER_LEN);
QEMU_BUILD_BUG_ON(sizeof(KvmiAnswer) != 96);
QEMU_BUILD_BUG_ON(sizeof(KvmiProof) != 40);

/* What a later version of a tool may add to its answer has an end */
#define KVMI_ANSWER_MAX (64 * 1024)

/* For auth=cookie; @hello is sent up to its struct_size */
void kvmi_hello_init(KvmiHello *hello, const QemuUUID *uuid, const char *name,
                     int64_t start_time, uint64_t max_gpa);
/* Turns it into one for auth=hmac */
bool kvmi_hello_hmac(KvmiHello *hello, Error **errp);

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

/* False: not an answer, or more of it than was wanted */
bool kvmi_answer_feed(KvmiAnswerReader *reader, const void *buf, size_t len,
                      Error **errp);

/* In constant time */
bool kvmi_cookie_equal(const uint8_t a[KVMI_COOKIE_LEN],
                       const uint8_t b[KVMI_COOKIE_LEN]);

/*
 * auth=hmac: does the tool know the key?  If so, @proof tells it that QEMU
 * does, too.
 */
bool kvmi_hmac_check(const KvmiHello *hello, const KvmiAnswer *answer,
                     const uint8_t *key, size_t key_len, KvmiProof *proof,
                     Error **errp);

/* A list of commands or events that tools may use */
typedef struct KvmiAllowed {
    bool all;
    uint64_t ids;
} KvmiAllowed;

typedef enum KvmiIdSpace {
    KVMI_COMMANDS,
    KVMI_EVENTS,
} KvmiIdSpace;

/* @list holds names, which can have the wild cards * and ?, or numbers */
bool kvmi_allowed_parse(KvmiAllowed *allowed, KvmiIdSpace space,
                        const strList *list, Error **errp);
/* The names, including those of commands that can't be forbidden */
strList *kvmi_allowed_names(const KvmiAllowed *allowed, KvmiIdSpace space);

bool kvmi_state_change_valid(KvmiState from, KvmiState to);

#endif
