/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The journal: what it adds to a write of the tool, when it is empty and when it
 * is nearly full, the memory that it takes, and how long the guest stands still
 * when KVM takes back the breakpoints of a tool that was killed.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/wait.h>

#include "guest.h"
#include "tool.h"

#define MEMORY_GPA  0x100000000ull
#define WRITES      2000
#define BREAKPOINTS 10000
#define ENTRIES     65536
#define FULL        60000
#define TIMEOUT_S   280

static uint8_t *memory;

static void write_byte(int tool, uint64_t offset, uint8_t byte, uint16_t flags)
{
    struct {
        struct kvmi_vm_write_physical req;
        uint8_t data[8];
    } msg = {
        .req = { .gpa = MEMORY_GPA + offset, .size = 1, .flags = flags },
        .data = { byte },
    };

    command(tool, KVMI_VM_WRITE_PHYSICAL, &msg, sizeof(msg.req) + 1);
}

/* In turns, so that nothing else that changes meanwhile counts */
static void compare_writes(int tool, double *with, double *without)
{
    static uint64_t ns[2][WRITES];

    for (unsigned int i = 0; i < 2 * WRITES; i++) {
        uint64_t start = now_ns();

        write_byte(tool, i, 0xcc, i % 2 ? 0 : KVMI_WRITE_KEEP);
        ns[i % 2][i / 2] = now_ns() - start;
    }
    *without = lower_quartile(ns[0], WRITES);
    *with = lower_quartile(ns[1], WRITES);
}

/* Of one write that is remembered, beginning at this one */
static double time_writes(int tool, unsigned int first)
{
    static uint64_t ns[WRITES];

    for (unsigned int i = 0; i < WRITES; i++) {
        uint64_t start = now_ns();

        write_byte(tool, first + i, 0xcc, 0);
        ns[i] = now_ns() - start;
    }
    return lower_quartile(ns, WRITES);
}

/* Of the allocations that are on a process's account */
static double slab_bytes(void)
{
    FILE *f = fopen("/proc/slabinfo", "r");
    unsigned long active, total, size;
    double bytes = 0;
    char line[256];

    if (!f) {
        err(1, "/proc/slabinfo");
    }
    while (fgets(line, sizeof(line), f)) {
        if (sscanf(line, "kmalloc-cg-%*s %lu %lu %lu", &active, &total,
                   &size) == 3) {
            bytes += (double)total * size;
        }
    }
    fclose(f);
    return bytes;
}

static void *run(void *arg)
{
    struct guest *g = arg;

    ioctl(g->vcpu, KVM_RUN, 0);
    return NULL;
}

static atomic_bool over;

/* The longest time without progress of the guest */
static void *watch(void *arg)
{
    volatile uint16_t *counter = arg;
    uint64_t longest = 0, last = now_ns(), now;
    uint16_t before = *counter;

    while (!over) {
        now = now_ns();
        if (*counter != before) {
            if (now - last > longest) {
                longest = now - last;
            }
            before = *counter;
            last = now;
        }
    }
    return (void *)longest;
}

/* A tool in a process of its own, with its breakpoints planted; it goes when it is killed */
static pid_t start_tool(int tool)
{
    int ready[2];
    char byte;
    pid_t pid;

    if (pipe(ready)) {
        err(1, "pipe");
    }
    pid = fork();
    if (pid < 0) {
        err(1, "fork");
    }
    if (!pid) {
        for (unsigned int i = 0; i < BREAKPOINTS; i++) {
            write_byte(tool, i * 8, 0xcc, 0);
        }
        if (write(ready[1], "", 1) != 1) {
            err(1, "pipe");
        }
        for (;;) {
            pause();
        }
    }
    close(tool);
    close(ready[1]);
    if (read(ready[0], &byte, 1) != 1) {
        errx(1, "the tool ended");
    }
    close(ready[0]);
    return pid;
}

int main(void)
{
    /* 1: incw 0x1800; jmp 1b */
    static const uint8_t code[] = { 0xff, 0x06, 0x00, 0x18, 0xeb, 0xfa };
    struct kvm_userspace_memory_region region = {
        .slot = 1,
        .guest_phys_addr = MEMORY_GPA,
        .memory_size = 2 * ENTRIES,
    };
    double with, without, before, bytes, empty, full;
    pthread_t vcpu, watcher;
    uint64_t start, restore;
    struct guest g;
    void *longest;
    pid_t pid;
    int tool;

    alarm(TIMEOUT_S);
    guest_create(&g, code, sizeof(code));
    memory = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        err(1, "mmap");
    }
    region.userspace_addr = (uintptr_t)memory;
    if (ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &region)) {
        err(1, "KVM_SET_USER_MEMORY_REGION");
    }

    tool = tool_hook(&g);
    compare_writes(tool, &with, &without);

    before = slab_bytes();
    for (unsigned int i = 2 * WRITES; i < ENTRIES + WRITES; i++) {
        write_byte(tool, i, 0xcc, 0);
    }
    bytes = (slab_bytes() - before) / (ENTRIES - WRITES);
    ioctl(g.vm, KVM_INTROSPECTION_UNHOOK, 0);
    close(tool);

    memset(memory, 0, region.memory_size);
    tool = tool_hook(&g);
    empty = time_writes(tool, 0);
    for (unsigned int i = WRITES; i < FULL; i++) {
        write_byte(tool, i, 0xcc, 0);
    }
    full = time_writes(tool, FULL);
    ioctl(g.vm, KVM_INTROSPECTION_UNHOOK, 0);
    close(tool);

    memset(memory, 0, region.memory_size);
    pid = start_tool(tool_hook(&g));
    guest_start(&g, 0);
    if (pthread_create(&vcpu, NULL, run, &g) ||
        pthread_create(&watcher, NULL, watch, g.memory + 0x800)) {
        err(1, "pthread_create");
    }
    usleep(200000);
    start = now_ns();
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    ioctl(g.vm, KVM_INTROSPECTION_UNHOOK, 0);
    restore = now_ns() - start;
    usleep(100000);
    over = true;
    pthread_join(watcher, &longest);
    for (unsigned int i = 0; i < region.memory_size; i++) {
        if (memory[i]) {
            errx(1, "byte %u was not put back", i);
        }
    }

    printf("{\"with_ns\": %g, \"without_ns\": %g, \"empty_ns\": %g, \"full_ns\": %g, \"entries\": %d, "
           "\"bytes_per_entry\": %g, \"breakpoints\": %d, "
           "\"restore_ms\": %g, \"stall_ms\": %g}\n", with, without, empty, full, FULL, bytes,
           BREAKPOINTS, restore / 1e6, (uintptr_t)longest / 1e6);
    return 0;
}
