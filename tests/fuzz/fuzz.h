/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Random numbers that a seed decides (SplitMix64) */
struct rng {
    uint64_t state;
};

static inline uint64_t rnd(struct rng *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15ull;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static inline uint32_t below(struct rng *r, uint32_t n)
{
    return (rnd(r) >> 32) * n >> 32;
}

static inline bool one_in(struct rng *r, uint32_t n)
{
    return !below(r, n);
}

#define PICK(r, array) ((array)[below(r, sizeof(array) / sizeof((array)[0]))])

/*
 * The guest's memory: page tables, then a block for each vCPU with its code,
 * tables and stack, then what the guest plays with, and a part that it leaves
 * alone.  Behind a gap there is a slot that comes and goes.
 */
#define MAX_VCPUS   4
#define MEM_SIZE    0x400000u
#define PT_ADDR     0x1000u         /* PML4, PDPT, PD, PT, PD */
#define PT_END      0x6000u
#define VMCB_ADDR   0x8000u         /* a page for each vCPU */
#define BLOCK(vcpu) (0x10000u * ((vcpu) + 1))
#define BLOCK_SIZE  0x10000u
#define CODE_SIZE   0x6000u
#define DATA_ADDR   0x100000u
#define DATA_END    0x200000u
#define QUIET_ADDR  0x200000u
#define QUIET_SIZE  0x10000u
#define EXTRA_ADDR  0x800000u
#define EXTRA_SIZE  0x200000u
#define GAP_ADDR    0x600000u

enum guest_mode { GUEST_64, GUEST_32, GUEST_16 };

struct guest_cpu {
    unsigned int index;
    enum guest_mode mode;
    bool nested, xsave, intel;
};

/* QEMU's TCG, as an AMD host, gives up if a TSS of 32 bits is in use and says that it is busy */
#define TR_TYPE(cpu) ((cpu)->intel ? 0xb : 0x9)

/* An address that means something to the guest */
uint32_t guest_address(struct rng *r);
uint32_t guest_msr(struct rng *r);
void guest_init_memory(uint8_t *mem, struct rng *r);
void guest_write_page_tables(uint8_t *mem);
void guest_write_program(uint8_t *mem, const struct guest_cpu *cpu, struct rng *r);
/* The registers for the program's beginning; < 0 if KVM doesn't take them */
int guest_reset(int fd, const struct guest_cpu *cpu);

#endif
