/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The smallest VM that does for a measurement: one page of real-mode code,
 * one vCPU, no devices.
 */
#ifndef BENCH_GUEST_H
#define BENCH_GUEST_H

#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <linux/kvm.h>

#define GUEST_CODE 0x1000

struct guest {
    int kvm, vm, vcpu;
    struct kvm_run *run;
    uint8_t *memory;        /* at GUEST_CODE */
};

static inline void guest_create(struct guest *g, const void *code, size_t size)
{
    struct kvm_userspace_memory_region region = {
        .guest_phys_addr = GUEST_CODE,
        .memory_size = 0x1000,
    };
    struct kvm_sregs sregs;
    int run_size;
    void *mem;

    g->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (g->kvm < 0) {
        err(1, "/dev/kvm");
    }
    g->vm = ioctl(g->kvm, KVM_CREATE_VM, 0);
    if (g->vm < 0) {
        err(1, "KVM_CREATE_VM");
    }

    mem = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
               MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (mem == MAP_FAILED) {
        err(1, "mmap");
    }
    memcpy(mem, code, size);
    g->memory = mem;
    region.userspace_addr = (uintptr_t)mem;
    if (ioctl(g->vm, KVM_SET_USER_MEMORY_REGION, &region)) {
        err(1, "KVM_SET_USER_MEMORY_REGION");
    }

    g->vcpu = ioctl(g->vm, KVM_CREATE_VCPU, 0);
    run_size = ioctl(g->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (g->vcpu < 0 || run_size < 0) {
        err(1, "KVM_CREATE_VCPU");
    }
    g->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED,
                  g->vcpu, 0);
    if (g->run == MAP_FAILED) {
        err(1, "mmap of the vCPU");
    }

    if (ioctl(g->vcpu, KVM_GET_SREGS, &sregs)) {
        err(1, "KVM_GET_SREGS");
    }
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    if (ioctl(g->vcpu, KVM_SET_SREGS, &sregs)) {
        err(1, "KVM_SET_SREGS");
    }
}

/* Runs from the beginning of the code; EBP counts the rounds */
static inline void guest_start(struct guest *g, uint32_t rounds)
{
    struct kvm_regs regs = {
        .rip = GUEST_CODE,
        .rflags = 2,
        .rsp = GUEST_CODE + 0x800,
        .rbp = rounds,
    };

    if (ioctl(g->vcpu, KVM_SET_REGS, &regs)) {
        err(1, "KVM_SET_REGS");
    }
}

static inline uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

static inline int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

/* Sorts; noise only ever adds, so the middle of the lower half is a fair view */
static inline uint64_t lower_quartile(uint64_t *v, size_t n)
{
    qsort(v, n, sizeof(*v), compare_u64);
    return v[n / 4];
}

#endif
