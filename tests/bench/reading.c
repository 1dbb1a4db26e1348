/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The whole memory of a guest by READ_PHYSICAL: page after page, each waited
 * for; all at once, which the library pipelines; and by memcpy() from the
 * device manager's own mapping.
 */
#include <pthread.h>
#include <stdio.h>

#include <kvmi/kvmi.h>

#include "tool.h"

#define TIMEOUT_S 600
#define MEMORY_GPA 0x100000
#define ROUNDS 3

struct manager {
    struct guest g;
    int fd;
};

/* QEMU's part: greets, and hands the connection to KVM */
static void *hook(void *arg)
{
    struct kvm_introspection_feature all = { .allow = 1, .id = -1 };
    struct manager *m = arg;
    struct kvm_introspection_hook hook = { .fd = m->fd };
    uint32_t hello[26] = { sizeof(hello) };
    uint8_t answer[24];

    write_all(m->fd, hello, sizeof(hello));
    read_all(m->fd, answer, sizeof(answer));
    if (ioctl(m->g.vm, KVM_INTROSPECTION_HOOK, &hook) ||
        ioctl(m->g.vm, KVM_INTROSPECTION_COMMAND, &all) ||
        ioctl(m->g.vm, KVM_INTROSPECTION_EVENT, &all)) {
        err(1, "KVM_INTROSPECTION_HOOK");
    }
    return NULL;
}

static void check(enum kvmi_status status, const struct kvmi_error *error)
{
    if (status != KVMI_OK) {
        errx(1, "%s", error->message);
    }
}

int main(int argc, char **argv)
{
    static const uint8_t code[] = { 0xeb, 0xfe, };
    size_t size = (argc > 1 ? atoi(argv[1]) : 128) * 1048576ul;
    struct kvm_userspace_memory_region region = {
        .slot = 1, .guest_phys_addr = MEMORY_GPA, .memory_size = size,
    };
    uint64_t single[ROUNDS], together[ROUNDS], copied[ROUNDS], start;
    struct kvmi_error error;
    struct manager m = { };
    uint8_t *memory, *copy;
    struct kvmi_vm *vm;
    pthread_t thread;
    int s[2];

    if (!size) {
        errx(2, "usage: reading [MIB]");
    }
    alarm(TIMEOUT_S);
    guest_create(&m.g, code, sizeof(code));
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    copy = mmap(NULL, size, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    region.userspace_addr = (uintptr_t)memory;
    if (memory == MAP_FAILED || copy == MAP_FAILED ||
        ioctl(m.g.vm, KVM_SET_USER_MEMORY_REGION, &region) ||
        socketpair(AF_UNIX, SOCK_STREAM, 0, s)) {
        err(1, "set-up");
    }
    for (size_t i = 0; i < size; i += 8) {
        *(uint64_t *)(memory + i) = i * 0x9e3779b97f4a7c15;
    }
    m.fd = s[0];
    if (pthread_create(&thread, NULL, hook, &m)) {
        errx(1, "pthread_create");
    }
    vm = kvmi_vm_new(s[1], NULL, 0, &error);
    if (!vm) {
        errx(1, "%s", error.message);
    }
    check(kvmi_vm_connect(vm, KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL), 0, &error),
          &error);

    for (int i = 0; i < ROUNDS; i++) {
        start = now_ns();
        for (size_t at = 0; at < size; at += 4096) {
            check(kvmi_vm_read_physical(vm, MEMORY_GPA + at, copy + at, 4096,
                                        &error), &error);
        }
        single[i] = now_ns() - start;
        if (memcmp(memory, copy, size)) {
            errx(1, "what was read is not what is there");
        }
        memset(copy, 0, size);

        start = now_ns();
        check(kvmi_vm_read_physical(vm, MEMORY_GPA, copy, size, &error),
              &error);
        together[i] = now_ns() - start;
        if (memcmp(memory, copy, size)) {
            errx(1, "what was read at once is not what is there");
        }

        start = now_ns();
        memcpy(copy, memory, size);
        __asm__ volatile("" : : "r"(copy) : "memory");
        copied[i] = now_ns() - start;
    }
    printf("{\"bytes\": %zu, \"single_ns\": %.0f, \"together_ns\": %.0f, "
           "\"memcpy_ns\": %.0f}\n", size,
           (double)lower_quartile(single, ROUNDS),
           (double)lower_quartile(together, ROUNDS),
           (double)lower_quartile(copied, ROUNDS));
    fflush(stdout);
    /* The kernel puts it all away */
    _exit(0);
}
