/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A fuzzer of KVM introspection: a hostile tool, a clumsy device manager and a
 * hostile guest at once, in the real kernel.
 *
 * Each round is a VM in a process of its own.  Its main thread is the tool and
 * the device manager; each vCPU has a thread.  What they do comes from the seed
 * and the round's number; how their threads meet doesn't.  The parent watches:
 * whoever waits longer than allowed is named with its kernel stack.
 */
#include <cpuid.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/kvm.h>
#include <linux/kvmi.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

#ifndef KVM_INTROSPECTION_STATUS
struct kvm_introspection_hook {
    int32_t fd;
    uint32_t padding;
    uint8_t uuid[16];
};
struct kvm_introspection_feature {
    uint32_t allow;
    int32_t id;
};
struct kvm_introspection_status {
    uint32_t hooked, reason;
    uint64_t restored, events, commands, silence, padding[3];
};
#define KVM_INTROSPECTION_HOOK      _IOW(KVMIO, 0xc8, struct kvm_introspection_hook)
#define KVM_INTROSPECTION_UNHOOK    _IO(KVMIO, 0xc9)
#define KVM_INTROSPECTION_COMMAND   _IOW(KVMIO, 0xca, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_EVENT     _IOW(KVMIO, 0xcb, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_PREUNHOOK _IO(KVMIO, 0xcc)
#define KVM_INTROSPECTION_STATUS    _IOR(KVMIO, 0xcd, struct kvm_introspection_status)
#endif

#define STEPS       500             /* of the tool, in each round */
#define DEFAULT_S   60
#define MAX_IDS     36
#define MAX_REASONS 7
#define MAX_EXITS   64
#define INT3        0xcc
#define BACKLOG     65536
#define FIRST_SEQ   0x40000000u     /* events count from 1 */

/* What commands are answered with; index 0 is success */
static const struct {
    int err;
    const char *name;
} outcomes[] = {
    { 0, "ok" }, { -KVM_EPERM, "EPERM" }, { -KVM_EINVAL, "EINVAL" }, { -KVM_ENOSYS, "ENOSYS" },
    { -KVM_EAGAIN, "EAGAIN" }, { -KVM_EBUSY, "EBUSY" }, { -KVM_ENOMEM, "ENOMEM" }, { -KVM_ENOENT, "ENOENT" },
    { -KVM_EOPNOTSUPP, "EOPNOTSUPP" }, { -KVM_E2BIG, "E2BIG" },
};
#define OUTCOMES (sizeof(outcomes) / sizeof(outcomes[0]))

static const char *const commands[MAX_IDS] = {
    [KVMI_GET_VERSION] = "GET_VERSION",
    [KVMI_VM_CHECK_COMMAND] = "VM_CHECK_COMMAND",
    [KVMI_VM_CHECK_EVENT] = "VM_CHECK_EVENT",
    [KVMI_VM_GET_INFO] = "VM_GET_INFO",
    [KVMI_VM_CONTROL_EVENTS] = "VM_CONTROL_EVENTS",
    [KVMI_VM_READ_PHYSICAL] = "VM_READ_PHYSICAL",
    [KVMI_VM_WRITE_PHYSICAL] = "VM_WRITE_PHYSICAL",
    [KVMI_VM_PAUSE_VCPU] = "VM_PAUSE_VCPU",
    [KVMI_VM_CONTROL_CLEANUP] = "VM_CONTROL_CLEANUP",
    [KVMI_VM_SET_PAGE_ACCESS] = "VM_SET_PAGE_ACCESS",
    [KVMI_VM_GET_PAGE_ACCESS] = "VM_GET_PAGE_ACCESS",
    [KVMI_VM_GET_MAX_GFN] = "VM_GET_MAX_GFN",
    [KVMI_VCPU_GET_INFO] = "VCPU_GET_INFO",
    [KVMI_VCPU_CONTROL_EVENTS] = "VCPU_CONTROL_EVENTS",
    [KVMI_VCPU_GET_REGISTERS] = "VCPU_GET_REGISTERS",
    [KVMI_VCPU_SET_REGISTERS] = "VCPU_SET_REGISTERS",
    [KVMI_VCPU_GET_CPUID] = "VCPU_GET_CPUID",
    [KVMI_VCPU_CONTROL_CR] = "VCPU_CONTROL_CR",
    [KVMI_VCPU_INJECT_EXCEPTION] = "VCPU_INJECT_EXCEPTION",
    [KVMI_VCPU_GET_XCR] = "VCPU_GET_XCR",
    [KVMI_VCPU_GET_XSAVE] = "VCPU_GET_XSAVE",
    [KVMI_VCPU_SET_XSAVE] = "VCPU_SET_XSAVE",
    [KVMI_VCPU_GET_MTRR_TYPE] = "VCPU_GET_MTRR_TYPE",
    [KVMI_VCPU_CONTROL_MSR] = "VCPU_CONTROL_MSR",
    [KVMI_VCPU_CONTROL_SINGLESTEP] = "VCPU_CONTROL_SINGLESTEP",
    [KVMI_VCPU_TRANSLATE_GVA] = "VCPU_TRANSLATE_GVA",
    [KVMI_VCPU_SET_SREGS] = "VCPU_SET_SREGS",
    [KVMI_VCPU_SET_MSRS] = "VCPU_SET_MSRS",
};

static const struct {
    const char *name;
    uint8_t data, reply;            /* sizes */
} events[KVMI_NEXT_VCPU_EVENT] = {
    [KVMI_VM_EVENT_UNHOOK] = { "UNHOOK", 0, 0 },
    [KVMI_VCPU_EVENT_PAUSE] = { "PAUSE", 0, 0 },
    [KVMI_VCPU_EVENT_HYPERCALL] = { "HYPERCALL", 0, 0 },
    [KVMI_VCPU_EVENT_BREAKPOINT] = { "BREAKPOINT", sizeof(struct kvmi_vcpu_event_breakpoint), 0 },
    [KVMI_VCPU_EVENT_CR] = { "CR", sizeof(struct kvmi_vcpu_event_cr), 8 },
    [KVMI_VCPU_EVENT_TRAP] = { "TRAP", sizeof(struct kvmi_vcpu_event_trap), 0 },
    [KVMI_VCPU_EVENT_XSETBV] = { "XSETBV", sizeof(struct kvmi_vcpu_event_xsetbv), 0 },
    [KVMI_VCPU_EVENT_DESCRIPTOR] = { "DESCRIPTOR", sizeof(struct kvmi_vcpu_event_descriptor), 0 },
    [KVMI_VCPU_EVENT_MSR] = { "MSR", sizeof(struct kvmi_vcpu_event_msr), 8 },
    [KVMI_VCPU_EVENT_PF] = { "PF", sizeof(struct kvmi_vcpu_event_pf), 0 },
    [KVMI_VCPU_EVENT_SINGLESTEP] = { "SINGLESTEP", sizeof(struct kvmi_vcpu_event_singlestep), 0 },
};

static const char *const reasons[MAX_REASONS] = {
    "(none)", "unhooked", "closed", "protocol", "unread", "no memory", "killed",
};

struct event_msg {
    struct kvmi_msg_hdr hdr;
    struct kvmi_event_hdr ev;
    struct kvmi_vcpu_event common;
    union {
        struct kvmi_vcpu_event_breakpoint bp;
        struct kvmi_vcpu_event_pf pf;
        struct kvmi_vcpu_event_cr cr;
        struct kvmi_vcpu_event_msr msr;
        struct kvmi_vcpu_event_xsetbv xsetbv;
        struct kvmi_vcpu_event_descriptor desc;
        struct kvmi_vcpu_event_trap trap;
        struct kvmi_vcpu_event_singlestep step;
    };
};

struct msg {
    struct kvmi_msg_hdr hdr;
    uint8_t body[65536];
};

/*
 * What all processes know.  busy: what a thread is doing that must come to an
 * end, and since when; the last one is the main thread's.
 */
static struct shared {
    struct busy {
        _Atomic uint64_t since;
        const char *volatile what;
    } busy[MAX_VCPUS + 1];
    char failed[512];
    unsigned int step;
    uint64_t sent[MAX_IDS + 1], answered[MAX_IDS + 1][OUTCOMES];
    uint64_t seen[KVMI_NEXT_VCPU_EVENT], replied[KVMI_NEXT_VCPU_EVENT];
    uint64_t sessions, ended[MAX_REASONS], restored, broken, vms, resets;
    uint64_t exits[MAX_EXITS], run_errors[MAX_EXITS];   /* by reason, by errno */
} *shared;

static struct {
    uint64_t seed, round;
    unsigned int bound_s;
    bool hook, nested, verbose;
} opt = { .bound_s = 20, .hook = true };

/* One round */
static struct rng rng;
static int kvm_fd, vm_fd;
static uint8_t *mem, *extra;
static unsigned int nr_vcpus;
static bool irqchip, ring;
static bool dead;                   /* KVM has given the VM up: its SMM state was nonsense */

static struct vcpu {
    struct guest_cpu cpu;
    struct rng rng;                 /* its thread's */
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    _Atomic uint32_t jobs;
    _Atomic bool stop;

    /* The tool's view */
    bool open;
    unsigned int late;              /* steps till it answers */
    struct event_msg event;
} vcpus[MAX_VCPUS];

static struct {
    int fd, kvm_end;
    bool torn;                      /* what is a message can't be told any more */
    bool closed;
    unsigned int wrong;             /* replies to events that KVM may refuse */
    unsigned int deaf;              /* steps for which it doesn't read */
    uint32_t seq, last_vm_seq;
    uint8_t in[2 * (KVMI_MAX_MSG_SIZE + 8)], out[BACKLOG];
    size_t in_size, out_size;
    struct {
        uint32_t seq;
        uint16_t id;
        uint32_t size;              /* of the data, if there is no error */
    } wanted[8192];
    uint8_t planted[QUIET_SIZE];
    struct kvm_xsave xsave;
} tool = { .fd = -1, .kvm_end = -1 };

static uint64_t now_ms(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000ull + ts.tv_nsec / 1000000;
}

static void __attribute__((format(printf, 1, 2), noreturn)) fail(const char *fmt, ...)
{
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(shared->failed, sizeof(shared->failed), fmt, ap);
    va_end(ap);
    _exit(3);
}

static void begin(unsigned int who, const char *what)
{
    shared->busy[who].what = what;
    shared->busy[who].since = now_ms();
}

static void end(unsigned int who)
{
    shared->busy[who].since = 0;
}

static int vm_ioctl_named(unsigned long request, const void *arg, const char *name)
{
    int r;

    begin(MAX_VCPUS, name);
    r = ioctl(vm_fd, request, arg);
    end(MAX_VCPUS);
    return r;
}
#define vm_ioctl(request, arg) vm_ioctl_named(request, arg, #request)

static int vcpu_ioctl_named(struct vcpu *v, unsigned long request, const void *arg, const char *name)
{
    int r;

    begin(v->cpu.index, name);
    r = ioctl(v->fd, request, arg);
    end(v->cpu.index);
    return r;
}
#define vcpu_ioctl(v, request, arg) vcpu_ioctl_named(v, request, arg, #request)

static bool is_zero(const void *p, size_t size)
{
    const uint8_t *b = p;

    while (size && !*b) {
        b++;
        size--;
    }
    return !size;
}

/* The vCPUs' threads */

enum {
    JOB_REGS, JOB_SREGS, JOB_EVENTS, JOB_DEBUG, JOB_NMI, JOB_INTERRUPT, JOB_SMI, JOB_MSR, JOB_MP_STATE,
    JOB_RESET, JOB_SLEEP, JOB_READ, JOB_XSAVE, JOB_NESTED, JOB_WAKE, NR_JOBS
};

static void on_signal(int sig)
{
    (void)sig;
}

static void reset(struct vcpu *v)
{
    struct kvm_mp_state mp = { .mp_state = KVM_MP_STATE_RUNNABLE };
    struct kvm_vcpu_events ev = { };

    __atomic_fetch_add(&shared->resets, 1, __ATOMIC_RELAXED);
    guest_write_program(mem, &v->cpu, &v->rng);
    if (one_in(&v->rng, 2)) {
        guest_write_page_tables(mem);
    }
    if (!vcpu_ioctl(v, KVM_GET_VCPU_EVENTS, &ev)) {
        memset(&ev.exception, 0, sizeof(ev.exception));
        memset(&ev.interrupt, 0, sizeof(ev.interrupt));
        memset(&ev.nmi, 0, sizeof(ev.nmi));
        ev.triple_fault.pending = 0;
        ev.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
        vcpu_ioctl(v, KVM_SET_VCPU_EVENTS, &ev);
    }
    if (irqchip) {
        vcpu_ioctl(v, KVM_SET_MP_STATE, &mp);
    }
    begin(v->cpu.index, "KVM_SET_SREGS, KVM_SET_REGS");
    guest_reset(v->fd, &v->cpu);
    end(v->cpu.index);
}

static void job_sregs(struct vcpu *v)
{
    struct kvm_sregs sregs;
    struct rng *r = &v->rng;

    if (vcpu_ioctl(v, KVM_GET_SREGS, &sregs)) {
        return;
    }
    switch (below(r, 6)) {
    case 0:
        sregs.cr0 ^= 1ull << below(r, 32);
        break;
    case 1:
        sregs.cr4 ^= 1ull << below(r, 32);
        break;
    case 2:
        sregs.cr3 = guest_address(r) & ~0xfffu;
        break;
    case 3:
        sregs.efer ^= 1ull << below(r, 16);
        break;
    case 4:
        sregs.cs.base ^= 0x1000;
        break;
    default:
        sregs.idt.base = guest_address(r);
    }
    sregs.tr.type = TR_TYPE(&v->cpu);
    vcpu_ioctl(v, KVM_SET_SREGS, &sregs);
}

static void job_events(struct vcpu *v)
{
    struct kvm_vcpu_events ev;
    struct rng *r = &v->rng;

    if (vcpu_ioctl(v, KVM_GET_VCPU_EVENTS, &ev)) {
        return;
    }
    switch (below(r, 3)) {
    case 0:
        ev.exception.injected = one_in(r, 2);
        ev.exception.nr = below(r, 32);
        ev.exception.has_error_code = one_in(r, 2);
        break;
    case 1:
        ev.nmi.pending = 1;
        ev.nmi.masked = one_in(r, 2);
        ev.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
        break;
    default:
        ev.interrupt.injected = one_in(r, 2);
        ev.interrupt.nr = below(r, 256);
        ev.interrupt.shadow = one_in(r, 2);
        ev.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    }
    vcpu_ioctl(v, KVM_SET_VCPU_EVENTS, &ev);
}

static void job_read(struct vcpu *v)
{
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_xsave xsave;
    struct kvm_lapic_state lapic;
    struct kvm_debugregs dr;
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[8];
    } msr = { .head.nmsrs = 8 };
    struct kvm_translation tr = { .linear_address = guest_address(&v->rng) };

    for (int i = 0; i < 8; i++) {
        msr.entries[i].index = guest_msr(&v->rng);
    }
    vcpu_ioctl(v, KVM_GET_REGS, &regs);
    vcpu_ioctl(v, KVM_GET_SREGS, &sregs);
    vcpu_ioctl(v, KVM_GET_XSAVE, &xsave);
    vcpu_ioctl(v, KVM_GET_LAPIC, &lapic);
    vcpu_ioctl(v, KVM_GET_MSRS, &msr);
    vcpu_ioctl(v, KVM_TRANSLATE, &tr);
    vcpu_ioctl(v, KVM_GET_DEBUGREGS, &dr);
    if (one_in(&v->rng, 4)) {
        vcpu_ioctl(v, KVM_SET_DEBUGREGS, &dr);
    }
}

static void job_nested(struct vcpu *v)
{
    static __thread union {
        struct kvm_nested_state state;
        uint8_t bytes[32768];
    } nested;

    nested.state.size = sizeof(nested);
    if (!vcpu_ioctl(v, KVM_GET_NESTED_STATE, &nested)) {
        if (one_in(&v->rng, 2)) {
            struct kvm_nested_state none = { .size = sizeof(none), .format = nested.state.format, .flags = 0x100 };

            if (none.format == KVM_STATE_NESTED_FORMAT_VMX) {
                none.flags = 0;
                none.hdr.vmx.vmxon_pa = none.hdr.vmx.vmcs12_pa = ~0ull;
            }
            vcpu_ioctl(v, KVM_SET_NESTED_STATE, &none);
        } else {
            vcpu_ioctl(v, KVM_SET_NESTED_STATE, &nested);
        }
    }
}

static void do_job(struct vcpu *v, unsigned int job)
{
    static const uint32_t debug[] = {
        0, 0, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP, KVM_GUESTDBG_USE_HW_BP,
        KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_INJECT_BP,
    };
    struct rng *r = &v->rng;
    struct kvm_regs regs;
    struct kvm_guest_debug dbg = { };
    struct kvm_interrupt irq = { .irq = below(r, 256) };
    struct kvm_mp_state mp = { .mp_state = one_in(r, 8) ? KVM_MP_STATE_UNINITIALIZED :
                                           one_in(r, 3) ? KVM_MP_STATE_HALTED : KVM_MP_STATE_RUNNABLE };
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[1];
    } msr = { .head.nmsrs = 1, .entries = { { .index = guest_msr(r), .data = rnd(r) } } };
    struct kvm_xsave xsave;

    switch (job) {
    case JOB_REGS:
        if (!vcpu_ioctl(v, KVM_GET_REGS, &regs)) {
            if (one_in(r, 2)) {
                regs.rip = regs.rbp;
            } else {
                regs.rflags ^= 1u << below(r, 22);
            }
            vcpu_ioctl(v, KVM_SET_REGS, &regs);
        }
        break;
    case JOB_SREGS:
        job_sregs(v);
        break;
    case JOB_EVENTS:
        job_events(v);
        break;
    case JOB_DEBUG:
        dbg.control = PICK(r, debug);
        if (dbg.control) {
            dbg.control |= KVM_GUESTDBG_ENABLE;
        }
        dbg.arch.debugreg[0] = guest_address(r);
        dbg.arch.debugreg[7] = 0x403 | below(r, 16) << 16;
        vcpu_ioctl(v, KVM_SET_GUEST_DEBUG, &dbg);
        break;
    case JOB_NMI:
        vcpu_ioctl(v, KVM_NMI, 0);
        break;
    case JOB_INTERRUPT:
        vcpu_ioctl(v, KVM_INTERRUPT, &irq);
        break;
    case JOB_SMI:
        vcpu_ioctl(v, KVM_SMI, 0);
        break;
    case JOB_MSR:
        vcpu_ioctl(v, KVM_SET_MSRS, &msr);
        break;
    case JOB_MP_STATE:
        vcpu_ioctl(v, KVM_SET_MP_STATE, &mp);
        break;
    case JOB_RESET:
        reset(v);
        break;
    case JOB_SLEEP:                 /* as a VM that is paused */
        usleep(below(r, 20000));
        break;
    case JOB_READ:
        job_read(v);
        break;
    case JOB_XSAVE:
        if (!vcpu_ioctl(v, KVM_GET_XSAVE, &xsave)) {
            ((uint8_t *)&xsave)[below(r, 576)] ^= 1 << below(r, 8);
            vcpu_ioctl(v, KVM_SET_XSAVE, &xsave);
        }
        break;
    case JOB_WAKE:                  /* nobody else ends its HLT */
        if (!vcpu_ioctl(v, KVM_GET_MP_STATE, &mp) && mp.mp_state != KVM_MP_STATE_RUNNABLE) {
            mp.mp_state = KVM_MP_STATE_RUNNABLE;
            vcpu_ioctl(v, KVM_SET_MP_STATE, &mp);
        }
        break;
    case JOB_NESTED:
        if (v->cpu.nested) {
            job_nested(v);
        }
        break;
    }
}

static void handle_exit(struct vcpu *v, int err)
{
    struct kvm_run *run = v->run;

    if (err == EIO) {
        v->stop = dead = true;
    }
    if (err) {
        __atomic_fetch_add(&shared->run_errors[err % MAX_EXITS], 1, __ATOMIC_RELAXED);
        if (err != EINTR && err != EAGAIN && err != EIO) {
            reset(v);
        }
        return;
    }
    __atomic_fetch_add(&shared->exits[run->exit_reason % MAX_EXITS], 1, __ATOMIC_RELAXED);
    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        if (run->io.direction == KVM_EXIT_IO_IN) {
            memset((uint8_t *)run + run->io.data_offset, rnd(&v->rng), run->io.size * run->io.count);
        }
        break;
    case KVM_EXIT_MMIO:
        if (!run->mmio.is_write) {
            memset(run->mmio.data, rnd(&v->rng), sizeof(run->mmio.data));
        }
        break;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        run->msr.data = rnd(&v->rng);
        run->msr.error = one_in(&v->rng, 3);
        break;
    case KVM_EXIT_SHUTDOWN:
    case KVM_EXIT_FAIL_ENTRY:
    case KVM_EXIT_INTERNAL_ERROR:
    case KVM_EXIT_SYSTEM_EVENT:
        reset(v);
        break;
    default:
        break;
    }
}

static void *vcpu_thread(void *arg)
{
    struct vcpu *v = arg;
    uint32_t jobs;
    int r;

    while (!v->stop) {
        jobs = __atomic_exchange_n(&v->jobs, 0, __ATOMIC_SEQ_CST);
        v->run->immediate_exit = 0;
        if (v->stop) {
            break;
        }
        for (unsigned int i = 0; jobs && i < NR_JOBS; i++) {
            if (jobs & 1u << i) {
                do_job(v, i);
            }
        }
        if (__atomic_load_n(&v->jobs, __ATOMIC_SEQ_CST) & 1u << 31) {
            v->run->immediate_exit = 1;
        }

        r = ioctl(v->fd, KVM_RUN, 0) ? errno : 0;
        end(v->cpu.index);          /* since it was kicked */
        handle_exit(v, r);
    }
    end(v->cpu.index);
    return NULL;
}

/* Bit 31 says that it was kicked, in case the signal comes before KVM_RUN */
static void kick(struct vcpu *v, uint32_t jobs)
{
    __atomic_fetch_or(&v->jobs, jobs | 1u << 31, __ATOMIC_SEQ_CST);
    v->run->immediate_exit = 1;
    if (!shared->busy[v->cpu.index].since) {
        begin(v->cpu.index, "KVM_RUN, kicked");
    }
    pthread_kill(v->thread, SIGUSR1);
}

/* Building the VM */

static void set_slot(unsigned int slot, uint32_t gpa, uint32_t size, void *hva, uint32_t flags)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)hva,
    };

    vm_ioctl(KVM_SET_USER_MEMORY_REGION, &region);
}

static void set_cpuid(struct vcpu *v)
{
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = { .head.nent = 256 };

    if (ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, &cpuid)) {
        fail("KVM_GET_SUPPORTED_CPUID: %s", strerror(errno));
    }
    for (unsigned int i = 0; i < cpuid.head.nent; i++) {
        struct kvm_cpuid_entry2 *e = &cpuid.entries[i];

        if (e->function == 1) {
            v->cpu.xsave = e->ecx & 1u << 26;
            if (!v->cpu.nested) {
                e->ecx &= ~(1u << 5);
            }
        } else if (e->function == 0x80000001 && !v->cpu.nested) {
            e->ecx &= ~(1u << 2);
        } else if (!e->function) {
            v->cpu.intel = e->ebx == signature_INTEL_ebx;
        }
    }
    if (ioctl(v->fd, KVM_SET_CPUID2, &cpuid)) {
        fail("KVM_SET_CPUID2: %s", strerror(errno));
    }
}

static void enable_cap(uint32_t cap, uint64_t arg)
{
    struct kvm_enable_cap c = { .cap = cap, .args = { arg } };

    vm_ioctl(KVM_ENABLE_CAP, &c);
}

static void deny_msrs(void)
{
    static uint8_t bitmap[0x2000 / 8];
    struct kvm_msr_filter filter = {
        .flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
        .ranges = { { .flags = KVM_MSR_FILTER_WRITE, .base = 0xc0000000, .nmsrs = 0x1000, .bitmap = bitmap } },
    };

    for (size_t i = 0; i < sizeof(bitmap); i++) {
        bitmap[i] = rnd(&rng);
    }
    vm_ioctl(KVM_X86_SET_MSR_FILTER, &filter);
}

static void create_vcpu(unsigned int i, bool nested)
{
    static const enum guest_mode modes[] = { GUEST_64, GUEST_64, GUEST_64, GUEST_32, GUEST_16 };
    struct vcpu *v = &vcpus[i];

    v->cpu.index = i;
    v->cpu.mode = i == 0 ? GUEST_64 : i == 1 ? GUEST_16 : PICK(&rng, modes);
    v->cpu.nested = nested;
    v->rng.state = rnd(&rng);
    v->fd = vm_ioctl(KVM_CREATE_VCPU, (void *)(uintptr_t)i);
    if (v->fd < 0) {
        fail("KVM_CREATE_VCPU: %s", strerror(errno));
    }
    v->run = mmap(NULL, ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    if (v->run == MAP_FAILED) {
        fail("mmap of the vCPU: %s", strerror(errno));
    }
    set_cpuid(v);
    /* One may wait for the INIT that never comes */
    if (!irqchip || i < 2 || !one_in(&rng, 4)) {
        reset(v);
    }
    if (pthread_create(&v->thread, NULL, vcpu_thread, v)) {
        fail("pthread_create");
    }
    nr_vcpus = i + 1;
}

static void *memory_of(size_t size)
{
    /* Aligned, so that it can be huge pages */
    uint8_t *p = mmap(NULL, size + 0x200000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED) {
        fail("mmap: %s", strerror(errno));
    }
    p = (uint8_t *)(((uintptr_t)p + 0x1fffff) & ~0x1fffffull);
    madvise(p, size, MADV_HUGEPAGE);
    return p;
}

static void create_vm(void)
{
    struct kvm_pit_config pit = { };
    bool nested = opt.nested && one_in(&rng, 2);

    kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vm_fd = kvm_fd < 0 ? -1 : ioctl(kvm_fd, KVM_CREATE_VM, 0);
    if (vm_fd < 0) {
        fail("/dev/kvm, KVM_CREATE_VM: %s", strerror(errno));
    }
    __atomic_fetch_add(&shared->vms, 1, __ATOMIC_RELAXED);
    vm_ioctl(KVM_SET_TSS_ADDR, (void *)0xfffbd000);
    if (one_in(&rng, 16)) {
        ring = true;
        enable_cap(KVM_CAP_DIRTY_LOG_RING, 65536);
    }
    if (one_in(&rng, 4)) {
        enable_cap(KVM_CAP_EXCEPTION_PAYLOAD, 1);
    }
    if (one_in(&rng, 4)) {
        enable_cap(KVM_CAP_X86_USER_SPACE_MSR, below(&rng, 8));
        deny_msrs();
    }
    switch (below(&rng, 3)) {
    case 0:
        irqchip = !vm_ioctl(KVM_CREATE_IRQCHIP, 0);
        if (one_in(&rng, 2)) {
            vm_ioctl(KVM_CREATE_PIT2, &pit);
        }
        break;
    case 1:
        enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24);
        irqchip = true;
        break;
    }

    mem = memory_of(MEM_SIZE);
    extra = memory_of(EXTRA_SIZE);
    guest_init_memory(mem, &rng);
    memset(mem + QUIET_ADDR, 0x90, QUIET_SIZE);
    memset(extra, 0x90, EXTRA_SIZE);
    set_slot(0, 0, MEM_SIZE, mem, 0);
    set_slot(1, EXTRA_ADDR, EXTRA_SIZE, extra, 0);

    for (unsigned int i = 0, n = 2 + below(&rng, 2); i < n; i++) {
        create_vcpu(i, nested);
    }
}

/* The tool: what comes */

static void check_padding(const struct event_msg *m)
{
    const struct kvmi_vcpu_event_arch *arch = &m->common.arch;
    const struct kvm_segment *seg = &arch->sregs.cs;

    if (!is_zero(m->ev.padding, sizeof(m->ev.padding)) || m->common.padding ||
        !is_zero(arch->padding, sizeof(arch->padding)) ||
        !is_zero(arch->sregs.gdt.padding, 6) || !is_zero(arch->sregs.idt.padding, 6)) {
        fail("event %u has padding that is not zero", m->ev.event);
    }
    for (int i = 0; i < 8; i++) {   /* CS to LDT */
        if (seg[i].padding) {
            fail("event %u: segment %d has padding that is not zero", m->ev.event, i);
        }
    }
    switch (m->ev.event) {
    case KVMI_VCPU_EVENT_BREAKPOINT:
        if (!is_zero(m->bp.padding, 7)) {
            fail("BREAKPOINT has padding that is not zero");
        }
        break;
    case KVMI_VCPU_EVENT_PF:
        if (m->pf.padding2 || m->pf.padding3 || m->pf.flags & ~KVMI_PF_NOT_EMULATED ||
            (m->pf.access != 1 && m->pf.access != 2 && m->pf.access != 4)) {
            fail("PF has padding, or access %u, flags %u", m->pf.access, m->pf.flags);
        }
        break;
    case KVMI_VCPU_EVENT_CR:
        if (!is_zero(m->cr.padding, 7) || (m->cr.cr != 0 && m->cr.cr != 3 && m->cr.cr != 4)) {
            fail("CR has padding, or CR%u", m->cr.cr);
        }
        break;
    case KVMI_VCPU_EVENT_MSR:
        if (m->msr.padding) {
            fail("MSR has padding that is not zero");
        }
        break;
    case KVMI_VCPU_EVENT_XSETBV:
        if (!is_zero(m->xsetbv.padding, 7) || m->xsetbv.xcr) {
            fail("XSETBV has padding, or XCR%u", m->xsetbv.xcr);
        }
        break;
    case KVMI_VCPU_EVENT_DESCRIPTOR:
        if (!is_zero(m->desc.padding, 6) || m->desc.write > 1 || m->desc.descriptor - 1u > 3) {
            fail("DESCRIPTOR has padding, or is %u, %u", m->desc.descriptor, m->desc.write);
        }
        break;
    case KVMI_VCPU_EVENT_TRAP:
        if (m->trap.padding1 || m->trap.padding2) {
            fail("TRAP has padding that is not zero");
        }
        break;
    case KVMI_VCPU_EVENT_SINGLESTEP:
        if (!is_zero(m->step.padding, 7) || m->step.failed > 1) {
            fail("SINGLESTEP has padding that is not zero");
        }
        break;
    }
}

/*
 * A reply to an event that names no vCPU is refused, and that looks like an
 * event but for its size.  The event stays open.
 */
static void on_refusal(const struct kvmi_msg_hdr *hdr)
{
    const struct kvmi_error_code *ec = (const void *)(hdr + 1);

    if (ec->padding || (ec->err != -KVM_EINVAL && ec->err != -KVM_EAGAIN) || (!tool.wrong && !tool.torn)) {
        fail("the reply to event 0x%x is refused with %d, padding 0x%x", hdr->seq, ec->err, ec->padding);
    }
    for (unsigned int i = 0; i < nr_vcpus; i++) {
        if (vcpus[i].event.hdr.seq == hdr->seq) {
            vcpus[i].open = true;
        }
    }
}

static void on_event(const struct event_msg *m)
{
    unsigned int id = m->ev.event;
    struct vcpu *v;

    if (m->hdr.id == KVMI_VCPU_EVENT && m->hdr.size == sizeof(struct kvmi_error_code)) {
        on_refusal(&m->hdr);
        return;
    }
    if (m->hdr.id == KVMI_VM_EVENT) {
        if (m->hdr.size != sizeof(m->ev) || id != KVMI_VM_EVENT_UNHOOK || !is_zero(m->ev.padding, 6)) {
            fail("an event of the VM has id %u, size %u", id, m->hdr.size);
        }
        shared->seen[id]++;
        return;
    }
    if (m->hdr.size < sizeof(m->ev) + sizeof(m->common) || id >= KVMI_NEXT_VCPU_EVENT || !(id & 1) || !events[id].name ||
        m->hdr.size != sizeof(m->ev) + sizeof(m->common) + events[id].data || m->common.size != sizeof(m->common)) {
        fail("an event of a vCPU has id %u, size %u", id, m->hdr.size);
    }
    if (m->common.vcpu >= nr_vcpus) {
        fail("event %u is from vCPU %u, of %u", id, m->common.vcpu, nr_vcpus);
    }
    check_padding(m);
    v = &vcpus[m->common.vcpu];
    if (v->open && !tool.torn) {
        fail("vCPU %u sends event %u while event %u is open", v->cpu.index, id, v->event.ev.event);
    }
    shared->seen[id]++;
    v->open = true;
    memcpy(&v->event, m, sizeof(m->hdr) + m->hdr.size);
    v->late = one_in(&rng, 12) ? below(&rng, 30) : 0;
}

static void check_reply(uint16_t id, const uint8_t *data, size_t size)
{
    const struct kvmi_vcpu_get_registers_reply *regs = (const void *)data;
    bool ok = true;

    switch (id) {
    case KVMI_GET_VERSION:
        ok = is_zero(((const struct kvmi_get_version_reply *)data)->features.padding,
                     sizeof(((const struct kvmi_get_version_reply *)data)->features.padding));
        break;
    case KVMI_VM_GET_INFO:
        ok = is_zero(data + 4, size - 4);
        break;
    case KVMI_VM_GET_PAGE_ACCESS:
    case KVMI_VCPU_GET_MTRR_TYPE:
        ok = is_zero(data + 1, size - 1);
        break;
    case KVMI_VCPU_GET_REGISTERS:
        ok = !regs->padding && !regs->msrs.pad && (regs->mode == 2 || regs->mode == 4 || regs->mode == 8);
        for (unsigned int i = 0; i < regs->msrs.nmsrs; i++) {
            ok &= !regs->msrs.entries[i].reserved;
        }
        for (int i = 0; i < 8; i++) {
            ok &= !(&regs->sregs.cs)[i].padding;
        }
        ok &= is_zero(regs->sregs.gdt.padding, 6) && is_zero(regs->sregs.idt.padding, 6);
        break;
    case KVMI_VCPU_SET_MSRS:
        ok = is_zero(data + 4, 4);
        break;
    case KVMI_VCPU_GET_XSAVE:
        memcpy(&tool.xsave, data, sizeof(tool.xsave));
        break;
    }
    if (!ok) {
        fail("the reply to command %u has padding that is not zero", id);
    }
}

static void on_reply(const struct kvmi_msg_hdr *hdr)
{
    const struct kvmi_error_code *ec = (const void *)(hdr + 1);
    __typeof__(tool.wanted[0]) *w = &tool.wanted[hdr->seq % 8192];
    unsigned int i;

    if (hdr->size < sizeof(*ec) || ec->padding) {
        fail("the reply to command %u has size %u, padding 0x%x", hdr->id, hdr->size, ec->padding);
    }
    for (i = 0; i < OUTCOMES && outcomes[i].err != ec->err; i++) {
    }
    if (i == OUTCOMES) {
        fail("command %u is answered with %d", hdr->id, ec->err);
    }
    if (ec->err && hdr->size != sizeof(*ec)) {
        fail("the reply to command %u has error %d and size %u", hdr->id, ec->err, hdr->size);
    }
    if (tool.torn) {
        return;
    }
    if (hdr->id == KVMI_VCPU_EVENT && tool.wrong && w->seq != hdr->seq) {
        return;                     /* on_refusal()'s, but for a wrong seq */
    }
    if (!w->seq || w->seq != hdr->seq || w->id != hdr->id) {
        fail("a reply to command %u, seq 0x%x, that was not sent or has been answered", hdr->id, hdr->seq);
    }
    if (!ec->err && hdr->size != sizeof(*ec) + w->size) {
        fail("the reply to command %u has size %u", hdr->id, hdr->size);
    }
    if (!(hdr->id & 1)) {
        if ((int32_t)(hdr->seq - tool.last_vm_seq) < 0) {
            fail("the reply to command %u, seq 0x%x, comes after that to 0x%x", hdr->id, hdr->seq, tool.last_vm_seq);
        }
        tool.last_vm_seq = hdr->seq;
    }
    w->seq = 0;
    if (hdr->id == KVMI_VCPU_EVENT) {
        return;
    }
    shared->answered[hdr->id < MAX_IDS ? hdr->id : MAX_IDS][i]++;
    if (!ec->err) {
        check_reply(hdr->id, (const uint8_t *)(ec + 1), hdr->size - sizeof(*ec));
    }
}

/* Whole messages have come: false when there will be no more */
static bool take_messages(void)
{
    const struct kvmi_msg_hdr *hdr;
    size_t at = 0;
    ssize_t n;

    n = recv(tool.fd, tool.in + tool.in_size, sizeof(tool.in) - tool.in_size, MSG_DONTWAIT);
    if (n <= 0) {
        return n < 0 && (errno == EAGAIN || errno == EINTR);
    }
    tool.in_size += n;
    while (tool.in_size - at >= sizeof(*hdr)) {
        _Alignas(8) struct msg m;

        memcpy(&m.hdr, tool.in + at, sizeof(m.hdr));
        if (m.hdr.size > KVMI_MAX_MSG_SIZE) {
            fail("message %u has size %u", m.hdr.id, m.hdr.size);
        }
        if (tool.in_size - at < sizeof(m.hdr) + m.hdr.size) {
            break;
        }
        memcpy(&m, tool.in + at, sizeof(m.hdr) + m.hdr.size);
        at += sizeof(m.hdr) + m.hdr.size;
        if (tool.torn && m.hdr.size == sizeof(struct kvmi_error_code)) {
            continue;               /* a reply to what nobody knows to have sent */
        }
        if (m.hdr.id <= KVMI_VCPU_EVENT && m.hdr.seq < FIRST_SEQ) {
            on_event((void *)&m);
        } else {
            on_reply(&m.hdr);
        }
    }
    tool.in_size -= at;
    memmove(tool.in, tool.in + at, tool.in_size);
    return true;
}

/* The tool: what it sends */

static void flush_out(void)
{
    size_t size = tool.out_size;
    ssize_t n;

    if (!size) {
        return;
    }
    if (one_in(&rng, 12)) {         /* torn */
        size = 1 + below(&rng, size);
    }
    n = send(tool.fd, tool.out, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) {
        tool.out_size -= n;
        memmove(tool.out, tool.out + n, tool.out_size);
    }
}

static bool put(const void *data, size_t size)
{
    if (tool.out_size + size > sizeof(tool.out)) {
        return false;               /* KVM doesn't read, for the tool doesn't */
    }
    memcpy(tool.out + tool.out_size, data, size);
    tool.out_size += size;
    return true;
}

static uint16_t some_vcpu(void)
{
    return one_in(&rng, 40) ? rnd(&rng) : below(&rng, nr_vcpus);
}

static uint32_t reply_size(const struct msg *m)
{
    const struct kvmi_vm_read_physical *rd = (const void *)m->body;
    const struct kvmi_vcpu_get_registers *regs = (const void *)(m->body + 8);

    switch (m->hdr.id) {
    case KVMI_GET_VERSION:
        return sizeof(struct kvmi_get_version_reply);
    case KVMI_VM_GET_INFO:
        return sizeof(struct kvmi_vm_get_info_reply);
    case KVMI_VM_READ_PHYSICAL:
        return rd->size;
    case KVMI_VM_GET_PAGE_ACCESS:
    case KVMI_VM_GET_MAX_GFN:
    case KVMI_VCPU_GET_INFO:
    case KVMI_VCPU_GET_XCR:
    case KVMI_VCPU_GET_MTRR_TYPE:
    case KVMI_VCPU_TRANSLATE_GVA:
    case KVMI_VCPU_SET_MSRS:
        return 8;
    case KVMI_VCPU_GET_REGISTERS:
        return sizeof(struct kvmi_vcpu_get_registers_reply) + regs->nmsrs * sizeof(struct kvm_msr_entry);
    case KVMI_VCPU_GET_CPUID:
        return sizeof(struct kvmi_vcpu_get_cpuid_reply);
    case KVMI_VCPU_GET_XSAVE:
        return sizeof(struct kvmi_vcpu_get_xsave_reply);
    default:
        return 0;
    }
}

/*
 * Remembers what must come back, and which INT3s must not stay.  An INT3 that
 * the tool keeps, or that it has put over one that it keeps, may stay.
 */
static void note(const struct msg *m)
{
    const struct kvmi_vm_write_physical *wr = (const void *)m->body;
    __typeof__(tool.wanted[0]) *w = &tool.wanted[m->hdr.seq % 8192];

    if (m->hdr.id == KVMI_VCPU_EVENT) {
        tool.wrong++;
    }
    if (m->hdr.seq >= FIRST_SEQ) {
        w->seq = m->hdr.seq;
        w->id = m->hdr.id;
        w->size = reply_size(m);
    }
    if (m->hdr.id != KVMI_VCPU_EVENT) {
        shared->sent[m->hdr.id < MAX_IDS ? m->hdr.id : MAX_IDS]++;
    }
    if (m->hdr.id != KVMI_VM_WRITE_PHYSICAL || m->hdr.size < sizeof(*wr)) {
        return;
    }
    for (uint32_t i = 0; i < wr->size && i < 4096; i++) {
        uint64_t at = wr->gpa + i - QUIET_ADDR;

        if (at < QUIET_SIZE && wr->flags & KVMI_WRITE_KEEP) {
            tool.planted[at] = 2;
        } else if (at < QUIET_SIZE && tool.planted[at] != 2) {
            tool.planted[at] = 1;
        }
    }
}

static uint64_t some_gpa(void)
{
    switch (below(&rng, 24)) {
    case 0:
        return rnd(&rng);
    case 1:
        return rnd(&rng) >> below(&rng, 64);
    default:
        return guest_address(&rng);
    }
}

static size_t vm_write(struct kvmi_vm_write_physical *wr)
{
    unsigned int left;

    wr->size = 1 + below(&rng, 4);
    wr->flags = one_in(&rng, 6) ? KVMI_WRITE_JOURNAL : one_in(&rng, 16) ? KVMI_WRITE_KEEP : 0;
    switch (below(&rng, 4)) {
    case 0:                         /* where it will be looked for */
        wr->gpa = QUIET_ADDR + below(&rng, QUIET_SIZE);
        break;
    case 1:                         /* where it will be hit */
        wr->gpa = BLOCK(below(&rng, nr_vcpus)) + below(&rng, 0x200);
        wr->size = 1;
        break;
    case 2:
        wr->gpa = EXTRA_ADDR + below(&rng, EXTRA_SIZE);
        wr->size = 1 + below(&rng, 4096);
        break;
    default:
        wr->gpa = some_gpa();
    }
    left = 4096 - wr->gpa % 4096;
    if (wr->size > left) {
        wr->size = left;
    }
    for (unsigned int i = 0; i < wr->size; i++) {
        wr->data[i] = one_in(&rng, 8) ? rnd(&rng) : INT3;
    }
    return sizeof(*wr) + wr->size;
}

static size_t vm_page_access(struct kvmi_vm_set_page_access *req)
{
    static const uint8_t access[] = { 7, 7, 7, 7, 5, 5, 5, 3, 1, 4, 6, 2, 0 };

    req->count = one_in(&rng, 30) ? below(&rng, 512) : 1 + below(&rng, 8);
    for (unsigned int i = 0; i < req->count; i++) {
        uint64_t gpa = one_in(&rng, 4) ? some_gpa() : DATA_ADDR + below(&rng, 256) * 4096u;

        if (one_in(&rng, 200)) {
            gpa = QUIET_ADDR;
        }
        req->entries[i] = (struct kvmi_page_access_entry){ .gpa = gpa, .access = PICK(&rng, access) };
        /* Slow: all that the guest does is emulated then */
        if (gpa < DATA_ADDR && !one_in(&rng, 6)) {
            req->entries[i].access = 7;
        }
    }
    return sizeof(*req) + req->count * sizeof(req->entries[0]);
}

static size_t vm_request(uint16_t id, void *req)
{
    struct kvmi_vm_check_command *check = req;
    struct kvmi_vm_control_events *ctl = req;
    struct kvmi_vm_read_physical *rd = req;
    struct kvmi_vm_pause_vcpu *pause = req;

    switch (id) {
    case KVMI_VM_CHECK_COMMAND:
    case KVMI_VM_CHECK_EVENT:
        check->id = one_in(&rng, 8) ? rnd(&rng) : below(&rng, MAX_IDS);
        return sizeof(*check);
    case KVMI_VM_CONTROL_EVENTS:
        ctl->event_id = one_in(&rng, 8) ? below(&rng, 70) : KVMI_VM_EVENT_UNHOOK;
        ctl->enable = !one_in(&rng, 8);
        return sizeof(*ctl);
    case KVMI_VM_READ_PHYSICAL:
        rd->gpa = some_gpa();
        rd->size = 1 + below(&rng, 4096 - rd->gpa % 4096);
        return sizeof(*rd);
    case KVMI_VM_WRITE_PHYSICAL:
        return vm_write(req);
    case KVMI_VM_PAUSE_VCPU:
        pause->vcpu = some_vcpu();
        pause->wait = one_in(&rng, 3);
        return sizeof(*pause);
    case KVMI_VM_CONTROL_CLEANUP:
        *(uint8_t *)req = !one_in(&rng, 4);
        return sizeof(struct kvmi_vm_control_cleanup);
    case KVMI_VM_SET_PAGE_ACCESS:
        return vm_page_access(req);
    case KVMI_VM_GET_PAGE_ACCESS:
        *(uint64_t *)req = some_gpa();
        return sizeof(struct kvmi_vm_get_page_access);
    default:
        return 0;
    }
}

static size_t vcpu_sregs(struct kvm_sregs *sregs, unsigned int vcpu)
{
    struct kvm_segment tr;

    if (vcpu < nr_vcpus) {
        *sregs = vcpus[vcpu].event.common.arch.sregs;
    }
    tr = sregs->tr;
    switch (below(&rng, 8)) {
    case 0:
        ((uint8_t *)sregs)[below(&rng, sizeof(*sregs))] ^= 1 << below(&rng, 8);
        break;
    case 1:
        sregs->cr0 ^= 1ull << below(&rng, 32);
        break;
    case 2:
        sregs->cr4 ^= 1ull << below(&rng, 32);
        break;
    case 3:
        sregs->efer ^= 1ull << below(&rng, 16);
        break;
    case 4:
        sregs->cr3 = some_gpa();
        break;
    case 5:
        sregs->apic_base ^= 1ull << below(&rng, 16);
        break;
    case 6:
        sregs->interrupt_bitmap[below(&rng, 4)] ^= 1ull << below(&rng, 64);
        break;
    }
    /* QEMU's TCG gives up if that is nonsense */
    sregs->tr = tr;
    sregs->tr.type = TR_TYPE(&vcpus[0].cpu);
    return sizeof(*sregs);
}

static size_t vcpu_msrs(struct kvmi_vcpu_set_msrs *req)
{
    req->nmsrs = one_in(&rng, 16) ? below(&rng, 600) : below(&rng, 4);
    for (unsigned int i = 0; i < req->nmsrs && i < 500; i++) {
        req->entries[i].index = guest_msr(&rng);
        req->entries[i].data = rnd(&rng) >> below(&rng, 64);
    }
    if (req->nmsrs >= 500) {
        return sizeof(*req);
    }
    return sizeof(*req) + req->nmsrs * sizeof(req->entries[0]);
}

static size_t vcpu_request(uint16_t id, unsigned int vcpu, void *req)
{
    static const uint8_t crs[] = { 0, 3, 4 };
    struct kvmi_vcpu_control_events *ctl = req;
    struct kvmi_vcpu_get_registers *get = req;
    struct kvmi_vcpu_inject_exception *inject = req;
    struct kvmi_vcpu_control_msr *msr = req;
    struct kvm_regs *regs = req;
    uint8_t *bytes = req;

    switch (id) {
    case KVMI_VCPU_CONTROL_EVENTS:
        ctl->event_id = one_in(&rng, 16) ? rnd(&rng) : KVMI_VCPU_EVENT_ID(below(&rng, 10));
        ctl->enable = !one_in(&rng, 6);
        return sizeof(*ctl);
    case KVMI_VCPU_GET_REGISTERS:
        get->nmsrs = one_in(&rng, 16) ? below(&rng, 600) : below(&rng, 4);
        for (unsigned int i = 0; i < get->nmsrs; i++) {
            get->msrs_idx[i] = one_in(&rng, 8) ? guest_msr(&rng) : 0xc0000080 + below(&rng, 5);
        }
        return sizeof(*get) + get->nmsrs * 4;
    case KVMI_VCPU_SET_REGISTERS:
        if (vcpu < nr_vcpus) {
            *regs = vcpus[vcpu].event.common.arch.regs;
        }
        switch (below(&rng, 8)) {
        case 0:
            ((uint64_t *)regs)[below(&rng, 18)] = rnd(&rng) >> below(&rng, 64);
            break;
        case 1:
            regs->rflags ^= 1u << below(&rng, 22);
            break;
        default:
            regs->rip += below(&rng, 4);
        }
        return sizeof(*regs);
    case KVMI_VCPU_SET_SREGS:
        return vcpu_sregs(req, vcpu);
    case KVMI_VCPU_SET_MSRS:
        return vcpu_msrs(req);
    case KVMI_VCPU_GET_CPUID:
        ((uint32_t *)req)[0] = (one_in(&rng, 3) ? 0x80000000 : 0) + below(&rng, 0x20);
        ((uint32_t *)req)[1] = below(&rng, 4);
        return sizeof(struct kvmi_vcpu_get_cpuid);
    case KVMI_VCPU_CONTROL_CR:
        bytes[0] = one_in(&rng, 16) ? rnd(&rng) : PICK(&rng, crs);
        bytes[1] = !one_in(&rng, 4);
        return sizeof(struct kvmi_vcpu_control_cr);
    case KVMI_VCPU_INJECT_EXCEPTION:
        inject->nr = one_in(&rng, 16) ? rnd(&rng) : below(&rng, 20);
        inject->error_code = one_in(&rng, 4) ? rnd(&rng) : below(&rng, 16);
        inject->address = some_gpa();
        return sizeof(*inject);
    case KVMI_VCPU_GET_XCR:
        bytes[0] = one_in(&rng, 8);
        return sizeof(struct kvmi_vcpu_get_xcr);
    case KVMI_VCPU_SET_XSAVE:
        memcpy(req, &tool.xsave, sizeof(tool.xsave));
        if (one_in(&rng, 2)) {
            bytes[below(&rng, 1024)] ^= 1 << below(&rng, 8);
        }
        return sizeof(struct kvmi_vcpu_set_xsave);
    case KVMI_VCPU_CONTROL_MSR:
        msr->msr = guest_msr(&rng);
        msr->enable = !one_in(&rng, 4);
        return sizeof(*msr);
    case KVMI_VCPU_CONTROL_SINGLESTEP:
        bytes[0] = one_in(&rng, 3);
        return sizeof(struct kvmi_vcpu_control_singlestep);
    case KVMI_VCPU_GET_MTRR_TYPE:
    case KVMI_VCPU_TRANSLATE_GVA:
        *(uint64_t *)req = some_gpa();
        return 8;
    default:
        return 0;
    }
}

/* Right in form, or not quite */
static void mutate(struct msg *m, size_t *size)
{
    switch (below(&rng, 6)) {
    case 0:                         /* too long */
        memset(m->body + m->hdr.size, rnd(&rng), 64);
        m->hdr.size += 1 + below(&rng, 64);
        break;
    case 1:                         /* too short */
        m->hdr.size = below(&rng, m->hdr.size + 1);
        break;
    case 2:
        m->hdr.id = one_in(&rng, 2) ? rnd(&rng) : below(&rng, MAX_IDS + 4);
        break;
    default:
        for (unsigned int i = 1 + below(&rng, 3); i && m->hdr.size; i--) {
            m->body[below(&rng, m->hdr.size > 32 ? 32 : m->hdr.size)] ^= 1 << below(&rng, 8);
        }
    }
    *size = sizeof(m->hdr) + m->hdr.size;
    /* The stream is out of step from here on, or too much at once */
    if (one_in(&rng, 200)) {
        m->hdr.size = rnd(&rng);
        tool.torn = true;
    }
}

static void send_command(uint16_t id, unsigned int vcpu, bool fuzz)
{
    static struct msg m;
    size_t size;

    memset(&m, 0, sizeof(m.hdr) + KVMI_MAX_MSG_SIZE);
    m.hdr.id = id;
    m.hdr.seq = tool.seq++;
    if (id & 1) {
        ((struct kvmi_vcpu_hdr *)m.body)->vcpu = vcpu;
        m.hdr.size = 8 + vcpu_request(id, vcpu, m.body + 8);
    } else {
        m.hdr.size = vm_request(id, m.body);
    }
    size = sizeof(m.hdr) + m.hdr.size;
    if (fuzz && one_in(&rng, 8)) {
        mutate(&m, &size);
    }
    if (put(&m, size)) {
        note(&m);
    }
}

static void send_any_command(void)
{
    uint16_t id;

    do {
        id = below(&rng, MAX_IDS);
    } while (!commands[id]);
    /* These take what others live on */
    if ((id == KVMI_VCPU_CONTROL_SINGLESTEP || id == KVMI_VCPU_INJECT_EXCEPTION) && one_in(&rng, 2)) {
        id = KVMI_VM_WRITE_PHYSICAL;
    }
    send_command(id, some_vcpu(), true);
}

static uint8_t some_action(const struct vcpu *v)
{
    switch (v->event.ev.event) {
    case KVMI_VCPU_EVENT_BREAKPOINT:
    case KVMI_VCPU_EVENT_PF:
    case KVMI_VCPU_EVENT_DESCRIPTOR:
        if (one_in(&rng, 3)) {
            return KVMI_EVENT_ACTION_RETRY;
        }
        break;
    }
    return one_in(&rng, 100) ? KVMI_EVENT_ACTION_CRASH : KVMI_EVENT_ACTION_CONTINUE;
}

static void answer(struct vcpu *v)
{
    unsigned int id = v->event.ev.event;
    struct {
        struct kvmi_msg_hdr hdr;
        struct kvmi_vcpu_hdr vcpu;
        struct kvmi_vcpu_event_reply rpl;
        uint64_t val;
    } m = {
        .hdr = { .id = KVMI_VCPU_EVENT, .size = 16 + events[id].reply, .seq = v->event.hdr.seq },
        .vcpu.vcpu = v->cpu.index,
        .rpl = { .action = some_action(v), .event = id },
        .val = id == KVMI_VCPU_EVENT_CR ? v->event.cr.new_value : v->event.msr.new_value,
    };

    if (one_in(&rng, 16)) {
        m.val = id == KVMI_VCPU_EVENT_CR ? v->event.cr.old_value : v->event.msr.old_value;
    } else if (one_in(&rng, 16)) {
        m.val ^= 1ull << below(&rng, 64);
    }
    if (one_in(&rng, 400)) {        /* wrong: the session should end */
        ((uint8_t *)&m)[below(&rng, 24)] ^= 1 << below(&rng, 8);
        tool.wrong++;
        if (m.hdr.size > sizeof(m) - sizeof(m.hdr) || m.hdr.id != KVMI_VCPU_EVENT) {
            tool.torn = true;
        }
        if (m.hdr.size > sizeof(m) - sizeof(m.hdr)) {
            m.hdr.size = sizeof(m) - sizeof(m.hdr);
        }
    }
    if (!put(&m, sizeof(m.hdr) + m.hdr.size)) {
        return;
    }
    if (one_in(&rng, 600)) {        /* twice */
        put(&m, sizeof(m.hdr) + m.hdr.size);
    }
    shared->replied[id]++;
    v->open = false;
}

static void answer_events(void)
{
    for (unsigned int i = 0; i < nr_vcpus; i++) {
        struct vcpu *v = &vcpus[i];

        if (!v->open) {
            continue;
        }
        if (v->late) {
            v->late--;
            if (one_in(&rng, 8)) {
                send_command(one_in(&rng, 3) ? KVMI_VCPU_SET_SREGS : KVMI_VCPU_SET_REGISTERS, i, true);
            }
            continue;
        }
        if (one_in(&rng, 6)) {
            send_command(KVMI_VCPU_SET_REGISTERS, i, false);
        }
        /* It shall not spend its time with steps */
        if (v->event.ev.event == KVMI_VCPU_EVENT_SINGLESTEP && one_in(&rng, 12)) {
            static struct msg m = { .hdr = { .id = KVMI_VCPU_CONTROL_SINGLESTEP, .size = 16 } };

            m.hdr.seq = tool.seq++;
            m.body[0] = i;
            if (put(&m, 24)) {
                note(&m);
            }
        }
        answer(v);
    }
}

/* Sessions */

static void check_status(bool unhooked)
{
    struct kvm_introspection_status st;

    memset(&st, 0xff, sizeof(st));
    if (vm_ioctl(KVM_INTROSPECTION_STATUS, &st)) {
        if (errno == EIO) {
            dead = true;
            return;
        }
        fail("KVM_INTROSPECTION_STATUS: %s", strerror(errno));
    }
    if (st.hooked > !unhooked || st.reason >= MAX_REASONS || !is_zero(st.padding, sizeof(st.padding)) ||
        (unhooked && (!st.reason || st.silence))) {
        fail("KVM_INTROSPECTION_STATUS: hooked %u, reason %u", st.hooked, st.reason);
    }
    if (unhooked) {
        shared->ended[st.reason]++;
        shared->restored += st.restored;
    }
}

static void hook(void)
{
    struct kvm_introspection_feature all = { .allow = 1, .id = -1 };
    struct kvm_introspection_hook h = { };
    int s[2], size = 4096;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s)) {
        fail("socketpair: %s", strerror(errno));
    }
    if (one_in(&rng, 4)) {
        setsockopt(s[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    }
    tool.fd = s[1];
    tool.kvm_end = s[0];
    tool.torn = tool.closed = false;
    tool.deaf = tool.wrong = 0;
    tool.in_size = tool.out_size = 0;
    tool.last_vm_seq = tool.seq;
    memset(tool.wanted, 0, sizeof(tool.wanted));
    for (unsigned int i = 0; i < MAX_VCPUS; i++) {
        vcpus[i].open = false;
    }

    h.fd = s[0];
    for (size_t i = 0; i < sizeof(h.uuid); i++) {
        h.uuid[i] = rnd(&rng);
    }
    if (one_in(&rng, 8)) {          /* something is there already */
        send_any_command();
        flush_out();
    }
    if (vm_ioctl(KVM_INTROSPECTION_HOOK, &h)) {
        if (errno == EIO) {
            dead = true;
            return;
        }
        fail("KVM_INTROSPECTION_HOOK: %s", strerror(errno));
    }
    shared->sessions++;
    if (one_in(&rng, 4)) {          /* QEMU keeps it */
        close(tool.kvm_end);
        tool.kvm_end = -1;
    }
    vm_ioctl(KVM_INTROSPECTION_EVENT, &all);
    vm_ioctl(KVM_INTROSPECTION_COMMAND, &all);

    /* A tool that wants to know everything, mostly */
    if (one_in(&rng, 8)) {
        return;
    }
    send_command(KVMI_VM_CONTROL_EVENTS, 0, false);
    for (unsigned int i = 0; i < nr_vcpus * 24; i++) {
        static const uint16_t set_up[] = { KVMI_VCPU_CONTROL_EVENTS, KVMI_VCPU_CONTROL_EVENTS, KVMI_VCPU_CONTROL_EVENTS,
                                           KVMI_VCPU_CONTROL_CR, KVMI_VCPU_CONTROL_MSR };

        send_command(set_up[i % 5], i / 24, false);
    }
    send_command(KVMI_VM_SET_PAGE_ACCESS, 0, false);
}

static void unhook(void)
{
    bool open_end = !tool.closed && one_in(&rng, 4);

    if (!open_end && !tool.closed && one_in(&rng, 2)) {
        close(tool.fd);
        tool.closed = true;
    }
    if (vm_ioctl(KVM_INTROSPECTION_UNHOOK, 0)) {
        if (errno == EIO) {
            dead = true;
            return;
        }
        fail("KVM_INTROSPECTION_UNHOOK: %s", strerror(errno));
    }
    check_status(true);
    if (dead) {
        return;
    }
    shared->broken += tool.torn;

    for (uint32_t i = 0; i < QUIET_SIZE; i++) {
        if (!tool.torn && tool.planted[i] == 1 && mem[QUIET_ADDR + i] == INT3) {
            fail("an INT3 is left at 0x%x", QUIET_ADDR + i);
        }
    }
    memset(tool.planted, 0, sizeof(tool.planted));
    memset(mem + QUIET_ADDR, 0x90, QUIET_SIZE);

    if (!tool.closed) {
        close(tool.fd);
    }
    if (tool.kvm_end >= 0) {
        close(tool.kvm_end);
    }
    tool.fd = tool.kvm_end = -1;
    /* The next tool starts with the guest as it was meant */
    if (one_in(&rng, 2)) {
        for (unsigned int i = 0; i < nr_vcpus; i++) {
            kick(&vcpus[i], 1u << JOB_RESET);
        }
    }
}

static void send_file(void)
{
    char byte = rnd(&rng);
    struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
    union {
        struct cmsghdr hdr;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = { .hdr = { .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control) };
    int fds[] = { tool.fd, vm_fd, kvm_fd, vcpus[0].fd };
    int fd = PICK(&rng, fds);

    memcpy(CMSG_DATA(&control.hdr), &fd, sizeof(fd));
    sendmsg(tool.fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    tool.torn = true;
}

/* What ends a session, or should */
static void misbehave(void)
{
    struct msg m;

    switch (below(&rng, 7)) {
    case 0:
        for (size_t i = 0; i < sizeof(m) / 16; i++) {
            ((uint64_t *)&m)[i] = rnd(&rng);
        }
        put(&m, below(&rng, 2000));
        tool.torn = true;
        break;
    case 1:
        close(tool.fd);
        tool.closed = true;
        break;
    case 2:
        shutdown(tool.fd, below(&rng, 3));
        break;
    case 3:
        send_file();
        break;
    case 4:
        if (tool.kvm_end >= 0) {
            shutdown(tool.kvm_end, below(&rng, 3));
        }
        break;
    case 5:
        tool.deaf = below(&rng, 300);
        break;
    default:                        /* an answer nobody waits for */
        memset(&m, 0, 32);
        m.hdr = (struct kvmi_msg_hdr){ .id = KVMI_VCPU_EVENT, .size = 16, .seq = rnd(&rng) };
        m.body[0] = some_vcpu();
        tool.wrong++;
        put(&m, 24);
    }
}

static void manage(void)
{
    struct kvm_introspection_feature f = { .allow = !one_in(&rng, 4), .id = (int)below(&rng, MAX_IDS) - 1 };
    struct kvm_introspection_hook h = { .fd = one_in(&rng, 2) ? tool.fd : (int)below(&rng, 30), .padding = one_in(&rng, 4) };
    struct kvm_introspection_feature all = { .allow = 1, .id = -1 };
    bool command = one_in(&rng, 2);

    switch (below(&rng, 8)) {
    case 0 ... 1:
        if (one_in(&rng, 8)) {
            f.id = rnd(&rng);
        }
        vm_ioctl_named(command ? KVM_INTROSPECTION_COMMAND : KVM_INTROSPECTION_EVENT, &f, "KVM_INTROSPECTION_COMMAND/EVENT");
        break;
    case 2 ... 3:                   /* and all is well again */
        vm_ioctl(KVM_INTROSPECTION_COMMAND, &all);
        vm_ioctl(KVM_INTROSPECTION_EVENT, &all);
        break;
    case 4:
        vm_ioctl(KVM_INTROSPECTION_PREUNHOOK, 0);
        break;
    case 5:
        check_status(false);
        break;
    case 6:
        if (!vm_ioctl(KVM_INTROSPECTION_HOOK, &h)) {
            fail("KVM_INTROSPECTION_HOOK: a second time, and it works");
        }
        break;
    default:
        if (one_in(&rng, 4)) {
            unhook();
            if (!dead) {
                hook();
            }
        }
    }
}

static void change_memory(void)
{
    static uint8_t log[MEM_SIZE / 4096 / 8];
    struct kvm_dirty_log get = { .slot = below(&rng, 2), .dirty_bitmap = log };
    uint32_t track = one_in(&rng, 2) ? KVM_MEM_LOG_DIRTY_PAGES : 0;

    switch (below(&rng, 6)) {
    case 0:
        set_slot(0, 0, MEM_SIZE, mem, track);
        break;
    case 1:                         /* gone, and there again */
        set_slot(1, EXTRA_ADDR, 0, extra, 0);
        set_slot(1, EXTRA_ADDR, EXTRA_SIZE, extra, one_in(&rng, 4) ? KVM_MEM_READONLY : track);
        break;
    case 2:                         /* elsewhere */
        set_slot(1, EXTRA_ADDR + 0x400000, EXTRA_SIZE, extra, 0);
        set_slot(1, EXTRA_ADDR, EXTRA_SIZE, extra, 0);
        break;
    case 3:
        set_slot(1, EXTRA_ADDR, EXTRA_SIZE, extra, track);
        break;
    case 4:
        vm_ioctl(KVM_GET_DIRTY_LOG, &get);
        break;
    default:
        begin(MAX_VCPUS, "madvise");
        madvise(one_in(&rng, 2) ? extra : mem + DATA_ADDR, 0x100000, MADV_DONTNEED);
        end(MAX_VCPUS);
    }
}

static void disturb_vcpus(void)
{
    struct vcpu *v = &vcpus[below(&rng, nr_vcpus)];
    unsigned int job;

    switch (below(&rng, 4)) {
    case 0:
        kick(v, 0);
        break;
    case 1:
        pthread_kill(v->thread, SIGUSR1);
        break;
    default:
        job = below(&rng, NR_JOBS);
        /* The guest damages what SMM saves, and KVM gives up then */
        kick(v, 1u << (job == JOB_SMI && !one_in(&rng, 20) ? JOB_RESET : job));
    }
}

static void tool_step(void)
{
    struct pollfd p = { .fd = tool.fd, .events = POLLIN };
    bool alive = true;

    if (tool.deaf) {
        tool.deaf--;
    }
    if (!tool.closed) {
        poll(&p, 1, below(&rng, 3));
        if (!tool.deaf) {
            alive = take_messages();
            answer_events();
        }
    }
    if (tool.closed || !alive) {
        unhook();
        if (!dead) {
            hook();
        }
        return;
    }
    switch (below(&rng, 100)) {
    case 0 ... 69:
        for (unsigned int i = one_in(&rng, 12) ? 40 : 1 + below(&rng, 3); i; i--) {
            send_any_command();
        }
        break;
    case 70:
        if (one_in(&rng, 4)) {
            misbehave();
        }
        break;
    case 71 ... 76:
        manage();
        break;
    case 77 ... 81:
        change_memory();
        break;
    case 82 ... 89:
        disturb_vcpus();
        break;
    case 90:
        if (nr_vcpus < MAX_VCPUS && one_in(&rng, 20)) {
            create_vcpu(nr_vcpus, vcpus[0].cpu.nested);
        }
        break;
    }
    if (!tool.closed && !one_in(&rng, 8)) {
        flush_out();
    }
    if (irqchip && one_in(&rng, 3)) {
        kick(&vcpus[below(&rng, nr_vcpus)], 1u << (one_in(&rng, 2) ? JOB_WAKE : JOB_NMI));
    }
}

/* Until KVM loses patience, as the socket is full */
static void stop_reading(void)
{
    if (tool.closed) {
        return;
    }
    for (unsigned int i = 0; i < 1000; i++) {
        send_command(KVMI_VCPU_GET_XSAVE, 0, false);
        send_command(KVMI_VM_READ_PHYSICAL, 0, false);
        flush_out();
    }
    usleep(6500000);
}

/* The process of one round: does not return */
static void __attribute__((noreturn)) play_round(void)
{
    struct sigaction sa = { .sa_handler = on_signal };
    unsigned int manner, deaf_at = STEPS;

    sigaction(SIGUSR1, &sa, NULL);
    sigaction(SIGALRM, &sa, NULL);
    create_vm();
    tool.seq = FIRST_SEQ;
    if (opt.hook) {
        hook();
        if (one_in(&rng, 20)) {
            deaf_at = below(&rng, STEPS);
        }
    }

    for (unsigned int i = 0; i < STEPS && !dead; i++) {
        shared->step = i;
        if (opt.hook) {
            tool_step();
        } else {
            usleep(1000);
            if (one_in(&rng, 4)) {
                disturb_vcpus();
            }
            if (one_in(&rng, 8)) {
                change_memory();
            }
        }
        if (i == deaf_at) {
            stop_reading();
        }
    }

    manner = below(&rng, 8);
    if (!manner) {
        _exit(0);                   /* all at once */
    }
    if (manner < 4 && opt.hook && !dead) {
        unhook();
    } else {
        usleep(100000);             /* the vCPUs come to wait for a tool that says no more */
    }
    for (unsigned int i = 0; i < nr_vcpus; i++) {
        vcpus[i].stop = true;
        kick(&vcpus[i], 0);
    }
    begin(MAX_VCPUS, "pthread_join");
    for (unsigned int i = 0; i < nr_vcpus; i++) {
        while (pthread_tryjoin_np(vcpus[i].thread, NULL)) {
            vcpus[i].run->immediate_exit = 1;
            pthread_kill(vcpus[i].thread, SIGUSR1);
            usleep(2000);
        }
        close(vcpus[i].fd);
    }
    end(MAX_VCPUS);
    begin(MAX_VCPUS, "exit");
    _exit(0);
}

/* The parent */

static void print_stacks(pid_t pid)
{
    char cmd[256];

    snprintf(cmd, sizeof(cmd), "for t in /proc/%d/task/*; do echo \"$t $(cat $t/comm): $(cat $t/wchan)\"; cat $t/stack; done", pid);
    if (system(cmd)) {
        printf("(no stacks)\n");
    }
}

static bool print_hung(pid_t pid, uint64_t started)
{
    uint64_t now = now_ms();

    for (unsigned int i = 0; i <= MAX_VCPUS; i++) {
        uint64_t since = shared->busy[i].since;

        if (since && now > since + opt.bound_s * 1000) {
            printf("HUNG: %s%.0u does not end: %s, for %u s\n", i < MAX_VCPUS ? "vCPU " : "the main thread",
                   i < MAX_VCPUS ? i : 0, shared->busy[i].what, opt.bound_s);
            print_stacks(pid);
            return true;
        }
    }
    if (now > started + opt.bound_s * 10000) {
        printf("HUNG: the round does not end, step %u\n", shared->step);
        print_stacks(pid);
        return true;
    }
    return false;
}

/* Returns false if something was wrong */
static bool run_round(void)
{
    uint64_t started = now_ms(), kill_at = 0;
    int status, pidfd;
    pid_t pid;

    rng.state = opt.seed ^ opt.round * 0x9e3779b97f4a7c15ull;
    rnd(&rng);
    memset(shared->busy, 0, sizeof(shared->busy));
    shared->failed[0] = 0;
    shared->step = 0;
    if (one_in(&rng, 12)) {
        kill_at = started + 100 + below(&rng, 2000);
    }
    if (opt.verbose) {
        printf("round %llu\n", (unsigned long long)opt.round);
    }
    fflush(stdout);
    pid = fork();
    if (pid < 0) {
        err(1, "fork");
    }
    if (!pid) {
        play_round();
    }
    pidfd = syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0) {
        err(1, "pidfd_open");
    }
    for (;;) {
        struct pollfd p = { .fd = pidfd, .events = POLLIN };

        if (poll(&p, 1, 100) > 0) {
            break;
        }
        if (print_hung(pid, started)) {
            kill(pid, SIGKILL);
            close(pidfd);
            return false;
        }
        if (kill_at && now_ms() > kill_at) {
            kill(pid, SIGKILL);
            kill_at = 0;
            /* From here on it is only its end that may hang */
            memset(shared->busy, 0, sizeof(shared->busy));
            begin(MAX_VCPUS, "its end, after SIGKILL");
        }
    }
    close(pidfd);
    waitpid(pid, &status, 0);
    if (WIFEXITED(status) && !WEXITSTATUS(status)) {
        return true;
    }
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) {
        return true;
    }
    printf("FAILED: %s (step %u, wait status 0x%x)\n", shared->failed[0] ? shared->failed : "the process died", shared->step,
           status);
    return false;
}

static bool print_table(double seconds, bool must_be_complete)
{
    uint64_t sent = 0, seen = 0;
    bool complete = true;

    printf("\n%-24s %9s %9s\n", "command", "sent", "ok");
    for (unsigned int i = 0; i <= MAX_IDS; i++) {
        if (i < MAX_IDS && !commands[i] && !shared->sent[i]) {
            continue;
        }
        printf("%-24s %9llu %9llu", i == MAX_IDS ? "(unknown)" : commands[i] ?: "(unknown)",
               (unsigned long long)shared->sent[i], (unsigned long long)shared->answered[i][0]);
        for (unsigned int j = 1; j < OUTCOMES; j++) {
            if (shared->answered[i][j]) {
                printf("  %s %llu", outcomes[j].name, (unsigned long long)shared->answered[i][j]);
            }
        }
        sent += shared->sent[i];
        if (i < MAX_IDS && commands[i] && !shared->answered[i][0]) {
            printf("  NEVER DONE");
            complete = false;
        }
        printf("\n");
    }
    printf("\n%-24s %9s %9s\n", "event", "seen", "answered");
    for (unsigned int i = 0; i < KVMI_NEXT_VCPU_EVENT; i++) {
        if (!events[i].name) {
            continue;
        }
        printf("%-24s %9llu", events[i].name, (unsigned long long)shared->seen[i]);
        if (i) {
            printf(" %9llu", (unsigned long long)shared->replied[i]);
        }
        seen += shared->seen[i];
        if (!shared->seen[i] || (i && !shared->replied[i])) {
            printf("  NEVER SEEN");
            complete = false;
        }
        printf("\n");
    }
    printf("\nsessions: %llu, out of step: %llu; they ended:", (unsigned long long)shared->sessions, (unsigned long long)shared->broken);
    for (unsigned int i = 1; i < MAX_REASONS; i++) {
        printf(" %s %llu%s", reasons[i], (unsigned long long)shared->ended[i], i < MAX_REASONS - 1 ? "," : "\n");
    }
    printf("bytes restored: %llu; VMs: %llu, vCPUs reset: %llu; exits to userspace by reason:",
           (unsigned long long)shared->restored, (unsigned long long)shared->vms, (unsigned long long)shared->resets);
    for (unsigned int i = 0; i < MAX_EXITS; i++) {
        if (shared->exits[i]) {
            printf(" %u: %llu", i, (unsigned long long)shared->exits[i]);
        }
    }
    printf("; by errno:");
    for (unsigned int i = 0; i < MAX_EXITS; i++) {
        if (shared->run_errors[i]) {
            printf(" %u: %llu", i, (unsigned long long)shared->run_errors[i]);
        }
    }
    printf("\n");
    printf("messages: %llu sent, %llu events, %.0f/min; %.0f s\n", (unsigned long long)sent, (unsigned long long)seen,
           (sent + seen) * 60 / seconds, seconds);
    if (!complete && must_be_complete) {
        printf("FAILED: a command was never carried out, or an event never seen\n");
    }
    return complete || !must_be_complete;
}

static void __attribute__((noreturn)) usage(int status)
{
    fprintf(status ? stderr : stdout,
            "usage: kvmi_fuzz [OPTION...] SEED [SECONDS]\n\n"
            "Plays rounds from SEED for SECONDS (%u), each with a VM, guests, tool and device manager of its own.\n"
            "Of %u seconds or more it demands that all commands and events have been had.\n\n"
            "  --round N    only that one: a failure says which it was (threads meet in other ways each time)\n"
            "  --bound S    what takes longer hangs (%u)\n"
            "  --nested     half of the VMs can have nested guests\n"
            "  --unhooked   no introspection: is it KVM's own fault?\n"
            "  --verbose    says which round is played\n\n"
            "Look at the kernel's log, too. For hours, on the debug kernel:\n\n"
            "  tests/host/run amd --kernel build/linux/debug/bzImage --timeout 7300 -- build/tests/fuzz/kvmi_fuzz 1 7200 --bound 60\n",
            DEFAULT_S, DEFAULT_S, opt.bound_s);
    exit(status);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "round", required_argument, NULL, 'r' }, { "bound", required_argument, NULL, 'b' },
        { "nested", no_argument, NULL, 'n' }, { "unhooked", no_argument, NULL, 'u' },
        { "verbose", no_argument, NULL, 'v' }, { "help", no_argument, NULL, 'h' }, { }
    };
    unsigned int seconds = DEFAULT_S;
    bool ok, only = false;
    uint64_t start;
    int c;

    while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
        switch (c) {
        case 'r':
            opt.round = strtoull(optarg, NULL, 0);
            only = true;
            break;
        case 'b':
            opt.bound_s = atoi(optarg);
            break;
        case 'n':
            opt.nested = true;
            break;
        case 'u':
            opt.hook = false;
            break;
        case 'v':
            opt.verbose = true;
            break;
        case 'h':
            usage(0);
        default:
            usage(2);
        }
    }
    if (optind >= argc || argc - optind > 2 || !opt.bound_s) {
        usage(2);
    }
    opt.seed = strtoull(argv[optind], NULL, 0);
    if (optind + 1 < argc) {
        seconds = atoi(argv[optind + 1]);
    }

    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        err(1, "mmap");
    }
    start = now_ms();
    do {
        ok = run_round();
    } while (ok && !only && ++opt.round && now_ms() - start < seconds * 1000ull);
    if (!ok) {
        printf("play it again: kvmi_fuzz %llu --round %llu%s\n", (unsigned long long)opt.seed, (unsigned long long)opt.round,
               opt.nested ? " --nested" : "");
    }
    ok &= print_table((now_ms() - start) / 1000.0, ok && opt.hook && !only && seconds >= DEFAULT_S);
    return ok ? 0 : 1;
}
