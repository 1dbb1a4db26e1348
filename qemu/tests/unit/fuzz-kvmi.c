/*
 * Fuzzer of what kvmi-proto.c makes of strangers' bytes: the answer to the
 * handshake, in all pieces, and the names of commands and events
 *
 * Built as it is, it plays inputs made from a seed: fuzz-kvmi [SEED [ROUNDS]].
 * With clang's -fsanitize=fuzzer and -DKVMI_LIBFUZZER it is a libFuzzer target.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qemu/cutils.h"
#include "target/i386/kvm/kvmi-proto.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The first byte says in which pieces the rest comes; as kvmi_read() does it */
static void fuzz_answer(const uint8_t *data, size_t size)
{
    /* On the heap, alone, where the sanitizer sees a byte too much */
    g_autofree KvmiAnswerReader *reader = g_new(KvmiAnswerReader, 1);
    size_t done = 0, chunk = 1 + data[0], wanted;
    static const uint8_t key[] = "key";
    KvmiAnswer answer = { };
    KvmiHello hello = { };
    KvmiProof proof;
    uint32_t claimed;

    data++;
    size--;
    kvmi_answer_start(reader);
    while ((wanted = kvmi_answer_wanted(reader))) {
        size_t n = MIN(MIN(wanted, chunk), size - done);
        g_autofree uint8_t *piece = g_memdup2(data + done, n);
        Error *err = NULL;
        bool ok;

        g_assert_cmpuint(wanted, <=, KVMI_ANSWER_MAX);
        if (!n) {
            return;                     /* the rest never comes */
        }
        ok = kvmi_answer_feed(reader, piece, n, &err);
        done += n;
        g_assert_cmpuint(reader->received, ==, done);
        if (!ok) {
            memcpy(&claimed, data, sizeof(claimed));
            g_assert(claimed < KVMI_ANSWER_LEN || claimed > KVMI_ANSWER_MAX);
            g_assert_nonnull(error_get_pretty(err));
            error_free(err);
            return;
        }
        g_assert_null(err);
    }

    /* Complete, to the byte, and what was sent */
    memcpy(&claimed, data, sizeof(claimed));
    memcpy(&answer, data, MIN(sizeof(answer), claimed));
    g_assert_cmpuint(done, ==, claimed);
    g_assert_cmpmem(&reader->answer, sizeof(answer), &answer, sizeof(answer));
    kvmi_cookie_equal(reader->answer.cookie_hash, answer.cookie_hash);
    /* Nobody guesses the proof */
    g_assert(!kvmi_hmac_check(&hello, &reader->answer, key, sizeof(key),
                              &proof, NULL));
}

/* Lines of text as a list of names */
static void fuzz_allowed(KvmiIdSpace space, const uint8_t *data, size_t size)
{
    g_autofree char *text = g_strndup((const char *)data, size);
    g_auto(GStrv) lines = g_strsplit(text, "\n", 0);
    g_autoptr(strList) list = NULL;
    strList **tail = &list;
    KvmiAllowed allowed = { .ids = 0x5a };
    Error *err = NULL;
    char **line;

    for (line = lines; *line; line++) {
        QAPI_LIST_APPEND(tail, g_strdup(*line));
    }
    if (kvmi_allowed_parse(&allowed, space, list, &err)) {
        g_autoptr(strList) names = kvmi_allowed_names(&allowed, space);
        KvmiAllowed again;

        g_assert_null(err);
        /* What it says is what it understands, and the same */
        g_assert(kvmi_allowed_parse(&again, space, names, &error_abort));
        g_assert_cmphex(again.ids & allowed.ids, ==, allowed.ids);
    } else {
        g_assert_nonnull(err);
        g_assert_cmphex(allowed.ids, ==, 0x5a);
        error_free(err);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) {
        return 0;
    }
    switch (data[0] % 4) {
    case 0:
        fuzz_allowed(KVMI_COMMANDS, data + 1, size - 1);
        break;
    case 1:
        fuzz_allowed(KVMI_EVENTS, data + 1, size - 1);
        break;
    default:
        fuzz_answer(data + 1, size - 1);
    }
    return 0;
}

#ifndef KVMI_LIBFUZZER
/* An answer whose size is mostly near a limit, followed by what is KVM's */
static size_t make_answer(GRand *r, uint8_t *buf)
{
    static const uint32_t limits[] = {
        0, 4, KVMI_ANSWER_LEN, sizeof(KvmiAnswer), 4096, KVMI_ANSWER_MAX,
        INT32_MAX, UINT32_MAX
    };
    uint32_t size = limits[g_rand_int_range(r, 0, ARRAY_SIZE(limits))];

    size += g_rand_int_range(r, -3, 4);
    memcpy(buf, &size, sizeof(size));
    if (g_rand_boolean(r) && size <= KVMI_ANSWER_MAX + 3) {
        return MAX(size, 1) + g_rand_int_range(r, 0, 20);
    }
    return g_rand_int_range(r, 1, 64);
}

static size_t make_names(GRand *r, KvmiIdSpace space, uint8_t *buf)
{
    static const KvmiAllowed all = { .all = true };
    g_autoptr(strList) names = kvmi_allowed_names(&all, space);
    g_autoptr(GString) text = g_string_new(NULL);
    int n = g_rand_int_range(r, 1, 6);

    while (n--) {
        if (g_rand_int_range(r, 0, 3)) {
            strList *name = names;
            int i;

            for (i = g_rand_int_range(r, 0, 40); i && name->next; i--) {
                name = name->next;
            }
            g_string_append(text, name->value);
        } else {
            g_string_append_printf(text, g_rand_boolean(r) ? "%d" : "0x%x",
                                   g_rand_int_range(r, -3, 70));
        }
        if (n) {
            g_string_append_c(text, '\n');
        }
    }
    memcpy(buf, text->str, text->len);
    return text->len;
}

int main(int argc, char **argv)
{
    g_autofree uint8_t *buf = g_malloc(KVMI_ANSWER_MAX + 64);
    unsigned long i, rounds = 100000;
    unsigned int seed = 1;
    GRand *r;

    if ((argc > 1 && qemu_strtoui(argv[1], NULL, 0, &seed)) ||
        (argc > 2 && qemu_strtoul(argv[2], NULL, 0, &rounds))) {
        fprintf(stderr, "usage: fuzz-kvmi [SEED [ROUNDS]]\n");
        return 2;
    }
    r = g_rand_new_with_seed(seed);
    for (i = 0; i < rounds; i++) {
        g_autofree uint8_t *exact = NULL;
        size_t size, k;
        int flips;

        for (k = 0; k < 64; k++) {
            buf[k] = g_rand_int(r);
        }
        if (buf[0] % 4 < 2) {
            size = 1 + make_names(r, buf[0] % 4, buf + 1);
        } else {
            size = 2 + make_answer(r, buf + 2);
        }
        for (flips = g_rand_int_range(r, -2, 3); flips > 0; flips--) {
            buf[g_rand_int_range(r, 1, size)] ^=
                1 << g_rand_int_range(r, 0, 8);
        }
        exact = g_memdup2(buf, size);
        LLVMFuzzerTestOneInput(exact, size);
    }
    g_rand_free(r);
    printf("%lu inputs from seed %u: ok\n", rounds, seed);
    return 0;
}
#endif
