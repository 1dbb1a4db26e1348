/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Guests that do what an introspection tool may be told of, and what might
 * disturb it: in no good order, with their own tables and code as targets.
 *
 * A program is a row of snippets.  EBP has the address of the next one, and all
 * exceptions and interrupts go there, so that it doesn't matter what fails.
 */
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#include "fuzz.h"

/* In a block */
#define IDT_AT     0x6000
#define HANDLER_AT 0x7000
#define SYSCALL_AT 0x7200
#define GDT_AT     0x7400
#define TSS_AT     0x7800
#define RSM_AT     0x8000
#define STACK_AT   0xf000

/* In the GDT; SYSRET wants three of them in a row */
#define SEL_CODE64 0x08
#define SEL_DATA   0x10
#define SEL_CODE32 0x18
#define SEL_USER   0x20
#define SEL_TSS    0x38
#define SEL_LDT    0x48
#define GDT_SIZE   0x58

enum { EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI };

struct code {
    const struct guest_cpu *cpu;
    struct rng *rng;
    uint8_t *start, *at;
    uint32_t address;               /* of start, as the guest sees it */
};

static void emit(struct code *c, const uint8_t *bytes, size_t size)
{
    memcpy(c->at, bytes, size);
    c->at += size;
}

#define E(c, ...) \
    emit(c, (const uint8_t[]){ __VA_ARGS__ }, sizeof((const uint8_t[]){ __VA_ARGS__ }))

static void emit32(struct code *c, uint32_t val)
{
    emit(c, (uint8_t *)&val, sizeof(val));
}

/* What follows has operands of 32 bits */
static void op32(struct code *c)
{
    if (c->cpu->mode == GUEST_16) {
        E(c, 0x66);
    }
}

static void mov(struct code *c, unsigned int reg, uint32_t val)
{
    op32(c);
    E(c, 0xb8 + reg);
    emit32(c, val);
}

/* What follows has [EBX] as its operand, which becomes that address */
static void memory(struct code *c, uint32_t address)
{
    mov(c, EBX, address);
    if (c->cpu->mode == GUEST_16) {
        E(c, 0x64, 0x67);           /* FS is flat */
    }
}

static uint8_t modrm(struct code *c)
{
    return below(c->rng, 8) << 3 | EBX;
}

uint32_t guest_address(struct rng *r)
{
    switch (below(r, 16)) {
    case 0:
        return PT_ADDR + below(r, PT_END - PT_ADDR);
    case 1:
        return BLOCK(below(r, MAX_VCPUS)) + below(r, BLOCK_SIZE);
    case 2:
        return EXTRA_ADDR + below(r, EXTRA_SIZE);
    case 3:
        return GAP_ADDR + below(r, 0x10000);
    case 4:
        return 0xfee00000 + below(r, 0x400);
    case 5:
        return DATA_ADDR + below(r, 0x100) * 4096u + 4096 - below(r, 16);
    case 6:
        return BLOCK(below(r, MAX_VCPUS)) + CODE_SIZE + below(r, 0x1a00);
    case 7:
        return one_in(r, 4) ? (uint32_t)rnd(r) : below(r, 0x10000);
    default:
        return DATA_ADDR + below(r, DATA_END - DATA_ADDR);
    }
}

static const uint32_t msrs[] = {
    0x10,                           /* TSC */
    0x1b,                           /* APIC base */
    0x174, 0x175, 0x176,            /* SYSENTER */
    0x1d9, 0x277, 0x200, 0x201, 0x250, 0x2ff,
    0x4b564d00, 0x4b564d01, 0x4b564d02, 0x4b564d04,
    0x6e0, 0x830, 0x80b, 0xda0,
    0xc0000080,                     /* EFER */
    0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084,
    0xc0000100, 0xc0000101, 0xc0000102, 0xc0000103,
    0xc0010015, 0xc0010114, 0xc0010117,
};

uint32_t guest_msr(struct rng *r)
{
    switch (below(r, 16)) {
    case 0:
        return below(r, 0x2000);
    case 1:
        return 0xc0000000 + below(r, 0x2000);
    case 2:
        return rnd(r);
    case 3 ... 7:
        return 0x174 + below(r, 3);
    default:
        return PICK(r, msrs);
    }
}

static void write_cr(struct code *c, unsigned int cr)
{
    static const uint8_t cr0_bits[] = { 1, 2, 3, 5, 16, 18, 29, 30 };
    static const uint8_t cr4_bits[] = { 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 16, 17, 18, 20, 21 };
    uint8_t bit = cr ? PICK(c->rng, cr4_bits) : PICK(c->rng, cr0_bits);

    if (one_in(c->rng, 16)) {
        bit = below(c->rng, 32);
    }
    if (cr == 3 && one_in(c->rng, 2)) {
        mov(c, EAX, one_in(c->rng, 8) ? (uint32_t)rnd(c->rng) : PT_ADDR + (bit & 0x18));
        E(c, 0x0f, 0x22, 0xd8);
        return;
    }
    E(c, 0x0f, 0x20, 0xc0 | cr << 3);
    for (int i = 0; i < 2; i++) {   /* and back */
        op32(c);
        E(c, 0x0f, 0xba, 0xf8, cr == 3 ? 3 : bit);
        E(c, 0x0f, 0x22, 0xc0 | cr << 3);
    }
}

static void hypercall(struct code *c)
{
    bool vmcall = c->cpu->intel != one_in(c->rng, 8);

    mov(c, EAX, one_in(c->rng, 8) ? below(c->rng, 16) : 34);
    mov(c, EDI, 24);
    mov(c, ESI, 0);
    mov(c, EBX, 24);
    mov(c, ECX, one_in(c->rng, 16));
    E(c, 0x0f, 0x01, vmcall ? 0xc1 : 0xd9);
}

static void write_msr(struct code *c)
{
    mov(c, ECX, guest_msr(c->rng));
    if (one_in(c->rng, 2)) {
        mov(c, EAX, rnd(c->rng));
        mov(c, EDX, one_in(c->rng, 4) ? rnd(c->rng) : 0);
    } else {                        /* another value that may be valid */
        E(c, 0x0f, 0x32);
        op32(c);
        E(c, 0x83, 0xf0, 1 << below(c->rng, 7));
    }
    E(c, 0x0f, 0x30);
}

static void descriptor(struct code *c)
{
    uint8_t which = below(c->rng, 4);
    uint32_t at = guest_address(c->rng);

    if (one_in(c->rng, 2)) {        /* SGDT, SIDT; LGDT, LIDT */
        memory(c, at);
        E(c, 0x0f, 0x01, (which & 1) << 3 | EBX);
        if (which & 2) {
            memory(c, at);
            E(c, 0x0f, 0x01, ((which & 1) + 2) << 3 | EBX);
        }
        return;
    }
    if (which >= 2) {               /* LLDT, LTR */
        mov(c, EAX, one_in(c->rng, 4) ? rnd(c->rng) & 0xff : which == 2 ? SEL_LDT : SEL_TSS);
        E(c, 0x0f, 0x00, 0xc0 | which << 3);
    } else if (one_in(c->rng, 2)) { /* SLDT, STR */
        E(c, 0x0f, 0x00, 0xc0 | which << 3);
    } else {
        memory(c, at);
        E(c, 0x0f, 0x00, which << 3 | EBX);
    }
}

static void access_memory(struct code *c)
{
    memory(c, guest_address(c->rng));
    switch (below(c->rng, 14)) {
    case 0 ... 2:
        E(c, 0x8b, modrm(c));
        break;
    case 3 ... 5:
        E(c, 0x89, modrm(c));
        break;
    case 6:
        E(c, 0x01, modrm(c));
        break;
    case 7:
        E(c, 0xf0, 0x0f, 0xc1, modrm(c));
        break;
    case 8:
        E(c, 0x0f, 0xc7, 1 << 3 | EBX);         /* CMPXCHG8B */
        break;
    case 9:
        E(c, 0x0f, 0x28, modrm(c));             /* MOVAPS */
        break;
    case 10:
        E(c, 0x0f, 0x29, modrm(c));
        break;
    case 11:
        E(c, 0x66, 0x0f, 0xfc, modrm(c));       /* PADDB, not emulated */
        break;
    case 12:
        E(c, 0xff, 6 << 3 | EBX);               /* PUSH */
        break;
    default:
        E(c, 0xc6, EBX, 0xcc);                  /* somebody's INT3? */
    }
}

static void access_string(struct code *c)
{
    static const uint8_t ops[] = { 0xa4, 0xa5, 0xa6, 0xaa, 0xab, 0xac, 0xae, 0x6c, 0x6e };

    mov(c, ESI, guest_address(c->rng));
    mov(c, EDI, guest_address(c->rng));
    mov(c, ECX, below(c->rng, one_in(c->rng, 8) ? 5000 : 40));
    mov(c, EDX, 0x80);
    if (c->cpu->mode == GUEST_16) {
        E(c, 0x67, 0x64);
    }
    E(c, one_in(c->rng, 4) ? 0xf2 : 0xf3, PICK(c->rng, ops));
}

static void page_table(struct code *c)
{
    static const uint32_t flags[] = { 0x7, 0x7, 0x5, 0x3, 0x67, 0x0, 0x107, 0x87, 0xff7 };
    uint32_t page = one_in(c->rng, 16) ? (uint32_t)rnd(c->rng) & ~0xfffu : DATA_ADDR + below(c->rng, 256) * 4096u;
    uint32_t at = PT_ADDR + 0x3000 + (256 + below(c->rng, 256)) * 8;

    memory(c, one_in(c->rng, 24) ? PT_ADDR + below(c->rng, 0x5000) : at);
    op32(c);
    E(c, 0xc7, EBX);
    emit32(c, page | PICK(c->rng, flags));
    if (one_in(c->rng, 2)) {
        memory(c, DATA_ADDR + below(c->rng, 256) * 4096u);
        E(c, 0x0f, 0x01, 7 << 3 | EBX);         /* INVLPG */
    }
}

static void call_data(struct code *c)
{
    if (c->cpu->mode == GUEST_16) {
        E(c, 0xb8, 0x00, 0x90, 0xff, 0xd0);     /* its own block */
        return;
    }
    mov(c, EAX, DATA_ADDR + below(c->rng, 256) * 4096u);
    E(c, 0xff, 0xd0);
}

static void exception(struct code *c)
{
    switch (below(c->rng, 10)) {
    case 0:
        E(c, 0xcc);
        break;
    case 1:
        E(c, 0xcd, one_in(c->rng, 2) ? 3 : below(c->rng, 256));
        break;
    case 2:
        E(c, 0x0f, 0x0b);
        break;
    case 3:
        E(c, 0x31, 0xd2, 0x31, 0xc9, 0xf7, 0xf1);       /* divides by 0 */
        break;
    case 4:
        E(c, 0xf1);
        break;
    case 5:
        E(c, 0xce);
        break;
    case 6:
        E(c, 0x9c, 0x9d);
        break;
    case 7:                         /* POPF with TF, and maybe IF */
        E(c, 0x68, 0x02, one_in(c->rng, 2) ? 0x03 : 0x01);
        if (c->cpu->mode != GUEST_16) {
            E(c, 0, 0);
        }
        E(c, 0x9d, 0x90, 0x0f, 0xa2, 0x90);
        break;
    case 8:
        E(c, 0xcf);
        break;
    default:                        /* MOV SS and what follows it */
        E(c, 0x8c, 0xd0, 0x8e, 0xd0, one_in(c->rng, 2) ? 0xcc : 0xf4);
    }
}

static void debug_registers(struct code *c)
{
    uint8_t dr = below(c->rng, 4);

    mov(c, EAX, guest_address(c->rng));
    E(c, 0x0f, 0x23, 0xc0 | dr << 3);
    mov(c, EAX, one_in(c->rng, 3) ? 0x400 : 0x400 | 3 << (dr * 2) | below(c->rng, 16) << (16 + dr * 4));
    E(c, 0x0f, 0x23, 0xf8);
}

static void nested(struct code *c)
{
    static const uint8_t ops[] = { 0xd8, 0xd8, 0xd8, 0xda, 0xdb, 0xdc, 0xdd, 0xdf };

    mov(c, EAX, one_in(c->rng, 8) ? guest_address(c->rng) : VMCB_ADDR + c->cpu->index * 4096u);
    mov(c, ECX, below(c->rng, 4));
    E(c, 0x0f, 0x01, PICK(c->rng, ops));
}

static void random_bytes(struct code *c)
{
    for (int i = 2 + below(c->rng, 12); i; i--) {
        E(c, rnd(c->rng));
    }
}

static void snippet(struct code *c)
{
    switch (below(c->rng, 32)) {
    case 0 ... 1:
        write_cr(c, 0);
        break;
    case 2 ... 3:
        write_cr(c, 3);
        break;
    case 4 ... 5:
        write_cr(c, 4);
        break;
    case 6:
        mov(c, EAX, below(c->rng, 16));
        E(c, 0x0f, 0x01, 0xf0);     /* LMSW */
        E(c, 0x0f, 0x06);           /* CLTS */
        break;
    case 7 ... 8:
        write_msr(c);
        break;
    case 9 ... 10:
        descriptor(c);
        break;
    case 11 ... 12:
        hypercall(c);
        break;
    case 13:
        mov(c, ECX, one_in(c->rng, 16));
        mov(c, EDX, 0);
        mov(c, EAX, one_in(c->rng, 8) ? (uint32_t)rnd(c->rng) : 1 | below(c->rng, 8));
        E(c, 0x0f, 0x01, 0xd1);     /* XSETBV */
        break;
    case 14 ... 17:
        access_memory(c);
        break;
    case 18 ... 19:
        access_string(c);
        break;
    case 20:
        page_table(c);
        break;
    case 21:
        call_data(c);
        break;
    case 22 ... 24:
        exception(c);
        break;
    case 25:
        if (one_in(c->rng, 2)) {
            E(c, 0xfb);             /* STI */
        }
        E(c, 0xf4);                 /* HLT */
        break;
    case 26:
        if (one_in(c->rng, 2)) {
            E(c, 0xe4 | below(c->rng, 2) << 1, 0x80);
        } else {
            E(c, 0xec | below(c->rng, 2) << 1);
        }
        break;
    case 27:
        if (c->cpu->mode != GUEST_64) {
            E(c, 0x0f, 0x34);       /* QEMU's TCG gives up in user mode, see TR_TYPE */
        } else if (one_in(c->rng, 4)) {
            E(c, 0x48, 0x0f, 0x07);
        } else {
            E(c, 0x0f, 0x05);
        }
        break;
    case 28:
        E(c, 0x0f, 0xa2);
        break;
    case 29:
        debug_registers(c);
        break;
    case 30:
        if (c->cpu->nested) {
            nested(c);
            break;
        }
        /* fall through */
    default:
        random_bytes(c);
    }
}

static void write_handlers(uint8_t *mem, const struct guest_cpu *cpu)
{
    uint32_t block = BLOCK(cpu->index);
    struct code c = { .cpu = cpu, .at = mem + block + HANDLER_AT };
    uint8_t flags = cpu->index & 1 ? 2 : 0;     /* IF */

    switch (cpu->mode) {
    case GUEST_16:
        mov(&c, ESP, STACK_AT);
        E(&c, 0x68, 0x02, flags);               /* PUSH flags */
        E(&c, 0x0e, 0x55, 0xcf);                /* PUSH CS; PUSH BP; IRET */
        break;
    case GUEST_32:
        mov(&c, EAX, SEL_DATA);
        E(&c, 0x8e, 0xd0, 0x8e, 0xd8, 0x8e, 0xc0);
        mov(&c, ESP, block + STACK_AT);
        E(&c, 0x68, 0x02, flags, 0, 0);
        E(&c, 0x6a, SEL_CODE32, 0x55, 0xcf);
        break;
    case GUEST_64:
        mov(&c, ESP, block + STACK_AT);
        E(&c, 0x6a, SEL_DATA, 0x68);
        emit32(&c, block + STACK_AT);
        E(&c, 0x68, 0x02, flags, 0, 0);
        E(&c, 0x6a, SEL_CODE64, 0x55, 0x48, 0xcf);
        memcpy(mem + block + SYSCALL_AT, mem + block + HANDLER_AT, 64);
        break;
    }
    memcpy(mem + block + RSM_AT, "\x0f\xaa", 2);
    memcpy(mem + block + 0x9000, "\xc3", 1);
}

static void write_idt(uint8_t *mem, const struct guest_cpu *cpu)
{
    uint32_t block = BLOCK(cpu->index), handler = block + HANDLER_AT;
    uint8_t *idt = mem + block + IDT_AT;

    for (uint32_t i = 0; i < 256; i++) {
        uint64_t gate = (handler & 0xffff) | (uint64_t)(handler >> 16) << 48 |
                        (cpu->mode == GUEST_64 ? SEL_CODE64 : SEL_CODE32) << 16 | 0x8eull << 40 |
                        (i % 3 ? 0x60ull << 40 : 0);

        if (cpu->mode == GUEST_16) {
            ((uint32_t *)idt)[i] = HANDLER_AT | block >> 4 << 16;
        } else if (cpu->mode == GUEST_32) {
            ((uint64_t *)idt)[i] = gate;
        } else {
            ((uint64_t *)idt)[2 * i] = gate;
            ((uint64_t *)idt)[2 * i + 1] = 0;
        }
    }
}

static void write_gdt(uint8_t *mem, const struct guest_cpu *cpu)
{
    uint32_t block = BLOCK(cpu->index), tss = block + TSS_AT;
    uint64_t *gdt = (uint64_t *)(mem + block + GDT_AT);

    memset(gdt, 0, GDT_SIZE);
    gdt[SEL_CODE64 / 8] = 0x00af9b000000ffffull;
    gdt[SEL_DATA / 8] = 0x00cf93000000ffffull;
    gdt[SEL_CODE32 / 8] = 0x00cf9b000000ffffull;
    gdt[SEL_USER / 8] = 0x00cffb000000ffffull;
    gdt[SEL_USER / 8 + 1] = 0x00cff3000000ffffull;
    gdt[SEL_USER / 8 + 2] = 0x00affb000000ffffull;
    gdt[SEL_TSS / 8] = 0x67 | (uint64_t)tss << 16 | 0x89ull << 40;
    gdt[SEL_LDT / 8] = 0x0f | (uint64_t)tss << 16 | 0x82ull << 40;

    memset(mem + tss, 0, 0x68);
    *(uint32_t *)(mem + tss + 4) = block + STACK_AT;
    if (cpu->mode == GUEST_32) {
        *(uint32_t *)(mem + tss + 8) = SEL_DATA;
    }
}

/* Of the 64-bit vCPUs; a nested guest that begins with the program, too */
static void write_vmcb(uint8_t *mem, const struct guest_cpu *cpu, struct rng *r)
{
    uint8_t *vmcb = mem + VMCB_ADDR + cpu->index * 4096u, *save = vmcb + 0x400;
    uint32_t block = BLOCK(cpu->index);
    static const struct { uint16_t at, sel, attr; } segs[] = {
        { 0x00, SEL_DATA, 0xc93 }, { 0x10, SEL_CODE64, 0xa9b }, { 0x20, SEL_DATA, 0xc93 }, { 0x30, SEL_DATA, 0xc93 },
    };

    memset(vmcb, 0, 4096);
    *(uint32_t *)(vmcb + 0x0c) = 1 << 24 | rnd(r);      /* HLT, INTR, ... */
    *(uint32_t *)(vmcb + 0x10) = 1 | rnd(r);            /* VMRUN, ... */
    *(uint32_t *)(vmcb + 0x58) = 1;                     /* ASID */
    if (one_in(r, 2)) {
        *(uint64_t *)(vmcb + 0x90) = 1;                 /* NPT */
        *(uint64_t *)(vmcb + 0xb0) = PT_ADDR;
    }
    for (int i = 0; i < 4; i++) {
        *(uint16_t *)(save + segs[i].at) = segs[i].sel;
        *(uint16_t *)(save + segs[i].at + 2) = segs[i].attr;
        *(uint32_t *)(save + segs[i].at + 4) = ~0u;
    }
    *(uint32_t *)(save + 0x64) = GDT_SIZE - 1;
    *(uint64_t *)(save + 0x68) = block + GDT_AT;
    *(uint32_t *)(save + 0x84) = 0xfff;
    *(uint64_t *)(save + 0x88) = block + IDT_AT;
    *(uint64_t *)(save + 0xd0) = 0x1d01;                /* EFER */
    *(uint64_t *)(save + 0x148) = 0x620;                /* CR4 */
    *(uint64_t *)(save + 0x150) = PT_ADDR;
    *(uint64_t *)(save + 0x158) = 0x80050033;           /* CR0 */
    *(uint64_t *)(save + 0x160) = 0x400;
    *(uint64_t *)(save + 0x168) = 0xffff0ff0;
    *(uint64_t *)(save + 0x170) = 2;
    *(uint64_t *)(save + 0x178) = block;
    *(uint64_t *)(save + 0x1d8) = block + STACK_AT;
    *(uint64_t *)(save + 0x268) = 0x0007040600070406ull;
}

void guest_write_program(uint8_t *mem, const struct guest_cpu *cpu, struct rng *r)
{
    uint32_t block = BLOCK(cpu->index);
    struct code c = {
        .cpu = cpu,
        .rng = r,
        .start = mem + block,
        .at = mem + block,
        .address = cpu->mode == GUEST_16 ? 0 : block,
    };
    unsigned int snippets = 4 + below(r, 120);

    while (snippets-- && c.at < c.start + CODE_SIZE - 512) {
        uint8_t *begin = c.at;
        uint32_t next;

        mov(&c, EBP, 0);
        snippet(&c);
        next = c.address + (c.at - c.start);
        memcpy(begin + 1 + (cpu->mode == GUEST_16), &next, 4);
    }
    /* From the beginning, which all that follows has as its next, too */
    mov(&c, EBP, c.address);
    E(&c, 0x0f, 0xa2);              /* CPUID: an exit in each round */
    mov(&c, EAX, c.address);
    E(&c, 0xff, 0xe0);

    write_handlers(mem, cpu);
    write_idt(mem, cpu);
    write_gdt(mem, cpu);
    write_vmcb(mem, cpu, r);
}

void guest_init_memory(uint8_t *mem, struct rng *r)
{
    /* UD2: nobody slides from one thing to the next */
    for (uint32_t i = 0; i < DATA_ADDR; i += 2) {
        memcpy(mem + i, "\x0f\x0b", 2);
    }
    for (uint32_t i = DATA_ADDR; i < DATA_END; i += 8) {
        *(uint64_t *)(mem + i) = i % 4096 ? rnd(r) : 0xc3;
    }
    guest_write_page_tables(mem);
}

void guest_write_page_tables(uint8_t *mem)
{
    uint64_t *pt = (uint64_t *)(mem + PT_ADDR);

    memset(pt, 0, PT_END - PT_ADDR);
    pt[0] = (PT_ADDR + 0x1000) | 7;
    pt[512] = (PT_ADDR + 0x2000) | 7;
    pt[512 + 3] = (PT_ADDR + 0x4000) | 7;
    pt[1024] = (PT_ADDR + 0x3000) | 7;
    for (uint64_t i = 1; i < 8; i++) {
        pt[1024 + i] = i << 21 | 0x87;
    }
    for (uint64_t i = 0; i < 512; i++) {
        pt[1536 + i] = i << 12 | 7;
    }
    /*
     * Code in the very tables that map it keeps QEMU's TCG busy for ever: each
     * walk sets a bit there, and what has been translated must go.
     */
    for (uint64_t i = PT_ADDR / 4096; i < PT_END / 4096; i++) {
        pt[1536 + i] |= 1ull << 63;
    }
    pt[2048 + 0x1f7] = 0xfee00000 | 0x9f;
}

static struct kvm_segment segment(uint16_t sel, uint64_t base, uint8_t type)
{
    return (struct kvm_segment){
        .base = base, .limit = 0xffffffff, .selector = sel, .type = type, .present = 1, .s = 1, .g = 1, .db = 1,
    };
}

int guest_reset(int fd, const struct guest_cpu *cpu)
{
    uint32_t block = BLOCK(cpu->index);
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[2];
    } msr = { .head.nmsrs = 2, .entries = { { .index = 0xc0000081, .data = (uint64_t)SEL_USER << 48 | 8ull << 32 },
                                            { .index = 0xc0000082, .data = block + SYSCALL_AT } } };
    struct kvm_regs regs = { .rflags = 2, .rsp = block + STACK_AT, .rip = block, .rbp = block };
    struct kvm_sregs sregs;

    if (ioctl(fd, KVM_GET_SREGS, &sregs)) {
        return -1;
    }
    memset(sregs.interrupt_bitmap, 0, sizeof(sregs.interrupt_bitmap));
    sregs.cs = segment(SEL_CODE64, 0, 0xb);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(SEL_DATA, 0, 3);
    sregs.gdt.base = block + GDT_AT;
    sregs.gdt.limit = GDT_SIZE - 1;
    sregs.idt.base = block + IDT_AT;
    sregs.idt.limit = 0xfff;
    sregs.tr = (struct kvm_segment){
        .base = block + TSS_AT, .limit = 0x67, .selector = SEL_TSS, .type = TR_TYPE(cpu), .present = 1,
    };
    sregs.ldt = (struct kvm_segment){ .unusable = 1 };
    sregs.cr3 = PT_ADDR;
    sregs.cr8 = 0;

    switch (cpu->mode) {
    case GUEST_64:
        sregs.cs.l = 1;
        sregs.cs.db = 0;
        sregs.cr0 = 0x80050033;
        sregs.cr4 = 0x620 | (cpu->xsave ? 0x40000 : 0);
        sregs.efer = 0xd01 | (cpu->nested && !cpu->intel ? 0x1000 : 0);
        break;
    case GUEST_32:
        sregs.cs.selector = SEL_CODE32;
        sregs.cr0 = 0x31;
        sregs.cr4 = 0x600 | (cpu->xsave ? 0x40000 : 0);
        sregs.efer = 0;
        break;
    case GUEST_16:
        sregs.cs = sregs.ds = sregs.ss = segment(block >> 4, block, 3);
        sregs.cs.limit = sregs.ds.limit = sregs.ss.limit = 0xffff;
        sregs.cs.g = sregs.ds.g = sregs.ss.g = 0;
        sregs.cs.db = sregs.ds.db = sregs.ss.db = 0;
        sregs.cs.type = 0xb;
        sregs.es = sregs.fs = sregs.gs = segment(0, 0, 3);
        sregs.cr0 = 0x30;
        sregs.cr4 = cpu->xsave ? 0x40000 : 0;
        sregs.efer = 0;
        regs.rip = regs.rbp = 0;
        regs.rsp = STACK_AT;
        break;
    }
    if (ioctl(fd, KVM_SET_SREGS, &sregs) || ioctl(fd, KVM_SET_REGS, &regs)) {
        return -1;
    }
    ioctl(fd, KVM_SET_MSRS, &msr);
    return 0;
}
