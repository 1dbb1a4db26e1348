// SPDX-License-Identifier: GPL-2.0-only
/*
 * Tests of KVM introspection: the ioctls as a device manager uses them, the
 * messages as the tool sees them, and the guest, which must notice nothing.
 *
 * The main thread is both the device manager and the tool, the vCPUs have
 * threads of their own.  Nothing waits without a bound.
 */
#include <linux/kvmi.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "kvm_test_harness.h"
#include "apic.h"
#include "kvm_util.h"
#include "processor.h"
#include "svm_util.h"
#include "test_util.h"
#include "ucall_common.h"

/* How long to wait for what must happen, and for what must not */
#define TIMEOUT_MS	10000
#define QUIET_MS	30
/* What "at once" is, on a slow and busy machine */
#define AT_ONCE_MS	2000

/* The limits of struct kvm_vcpu_introspection's queues */
#define MAX_JOBS	128
#define MAX_PAUSES	1002
#define MAX_MSRS	481

#define RFLAGS_IF	BIT(9)
#define IRQ_VECTOR	0x40
#define UNMAPPED_GPA	0x7000000000ull
#define EXTRA_GPA	0x10000000ull
#define EXTRA_SLOT	10

/* Commands that are neither known nor likely to be */
static const u16 unknown_commands[] = {
	KVMI_NEXT_VM_MESSAGE + 40, KVMI_NEXT_VCPU_MESSAGE + 40, 0xfffe,
	0xffff
};

/* Commands that need permission */
static const u16 vm_commands[] = {
	KVMI_VM_GET_INFO, KVMI_VM_CONTROL_EVENTS, KVMI_VM_READ_PHYSICAL,
	KVMI_VM_WRITE_PHYSICAL, KVMI_VM_PAUSE_VCPU, KVMI_VM_CONTROL_CLEANUP,
	KVMI_VM_SET_PAGE_ACCESS, KVMI_VM_GET_PAGE_ACCESS, KVMI_VM_GET_MAX_GFN
};

static const u16 vcpu_commands[] = {
	KVMI_VCPU_GET_INFO, KVMI_VCPU_CONTROL_EVENTS, KVMI_VCPU_GET_REGISTERS,
	KVMI_VCPU_SET_REGISTERS, KVMI_VCPU_TRANSLATE_GVA,
	KVMI_VCPU_GET_CPUID, KVMI_VCPU_CONTROL_CR, KVMI_VCPU_GET_XCR,
	KVMI_VCPU_GET_XSAVE, KVMI_VCPU_SET_XSAVE, KVMI_VCPU_GET_MTRR_TYPE,
	KVMI_VCPU_CONTROL_MSR,
	KVMI_VCPU_INJECT_EXCEPTION, KVMI_VCPU_CONTROL_SINGLESTEP,
	KVMI_VCPU_SET_SREGS, KVMI_VCPU_SET_MSRS
};

static const u16 free_commands[] = {
	KVMI_GET_VERSION, KVMI_VM_CHECK_COMMAND, KVMI_VM_CHECK_EVENT
};

static const u16 known_events[] = {
	KVMI_VM_EVENT_UNHOOK, KVMI_VCPU_EVENT_PAUSE, KVMI_VCPU_EVENT_BREAKPOINT,
	KVMI_VCPU_EVENT_HYPERCALL, KVMI_VCPU_EVENT_CR, KVMI_VCPU_EVENT_XSETBV,
	KVMI_VCPU_EVENT_DESCRIPTOR, KVMI_VCPU_EVENT_MSR, KVMI_VCPU_EVENT_PF,
	KVMI_VCPU_EVENT_TRAP, KVMI_VCPU_EVENT_SINGLESTEP
};

struct msg {
	struct kvmi_msg_hdr hdr;
	u8 body[KVMI_MAX_MSG_SIZE];
};

struct event {
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

#define VM_EVENT_SIZE    sizeof(struct kvmi_event_hdr)
#define VCPU_EVENT_SIZE  (VM_EVENT_SIZE + sizeof(struct kvmi_vcpu_event))
#define EVENT_REPLY_SIZE (sizeof(struct kvmi_vcpu_hdr) + \
			  sizeof(struct kvmi_vcpu_event_reply))

/* The tool's end of the session */
static struct {
	int fd;
	u32 seq;
	/* Events that came while something else was waited for */
	struct event events[8];
	unsigned int nr_events;
} tool = { .fd = -1 };

/*
 * The guests.  Each has a copy of these variables.
 */
static u64 counter;
static u64 traps;
static u64 trap_rip;
static u64 result;
static u64 stop;

extern u8 bp_insn[], bp_next[];

static void guest_count(void)
{
	while (!READ_ONCE(stop))
		WRITE_ONCE(counter, counter + 1);
	GUEST_DONE();
}

static void guest_on_bp(struct ex_regs *regs)
{
	WRITE_ONCE(trap_rip, regs->rip);
	WRITE_ONCE(traps, traps + 1);
}

static noinline void guest_int3(void)
{
	asm volatile("bp_insn: int3\n"
		     "bp_next:" : : : "memory");
}

static void guest_break_once(void)
{
	guest_int3();
	WRITE_ONCE(counter, 1);
	while (!READ_ONCE(stop))
		;
	GUEST_DONE();
}

static void guest_break(void)
{
	while (!READ_ONCE(stop)) {
		guest_int3();
		WRITE_ONCE(counter, counter + 1);
	}
	GUEST_DONE();
}

/* Goes on when somebody sets RBX, after counter has become 1 */
static void guest_wait_rbx(void)
{
	u64 rbx = 0;

	asm volatile("movq $1, %1\n"
		     "1: pause\n"
		     "test %0, %0\n"
		     "jz 1b" : "+b"(rbx), "=m"(counter) : : "cc");
	WRITE_ONCE(result, rbx);
	GUEST_DONE();
}

/* As guest_break_once(), and shows RAX and RBX as they are after the INT3 */
static void guest_break_rax(void)
{
	u64 rax = 1, rbx = 2;

	asm volatile("int3" : "+a"(rax), "+b"(rbx) : : "memory");
	WRITE_ONCE(counter, rbx);
	WRITE_ONCE(result, rax);
	while (!READ_ONCE(stop))
		;
	GUEST_DONE();
}

static void guest_on_irq(struct ex_regs *regs)
{
	x2apic_write_reg(APIC_EOI, 0);
	WRITE_ONCE(traps, traps + 1);
}

static void guest_halt(void)
{
	asm volatile("cli");
	x2apic_enable();
	WRITE_ONCE(counter, 1);
	asm volatile("sti; hlt; cli" : : : "memory");
	WRITE_ONCE(counter, 2);
	GUEST_DONE();
}

/* Does one thing after the other as it is told */
enum {
	OP_NONE,
	OP_CR,
	OP_LMSW,
	OP_CR4_SKIP,
	OP_WRMSR,
	OP_HYPERCALL,
	OP_XSETBV,
	OP_DESC_STORE,
	OP_DESC_LOAD,
	OP_XMM_SET,
	OP_XMM_GET,
};

static u64 op;
static u64 op_target;
static u64 op_arg;
static u64 op_repeat;
static u64 fault;

extern u8 cr4_next[], cr4_skip[];

static void guest_cr(u64 cr, u64 val)
{
	switch (cr) {
	case 0:
		fault = kvm_asm_safe("mov %[val], %%cr0", [val] "r"(val));
		result = get_cr0();
		break;
	case 3:
		fault = kvm_asm_safe("mov %[val], %%cr3", [val] "r"(val));
		result = get_cr3();
		break;
	case 4:
		fault = kvm_asm_safe("mov %[val], %%cr4", [val] "r"(val));
		result = get_cr4();
		break;
	}
}

static noinline void guest_cr4_skip(u64 val)
{
	u64 rbx = 1;

	asm volatile("mov %1, %%cr4\n"
		     "cr4_next: mov $2, %%ebx\n"
		     "cr4_skip: nop" : "+b"(rbx) : "a"(val) : "memory");
	result = rbx;
}

static u64 guest_request(u64 arg)
{
	u64 rax = KVM_HC_XEN_HVM_OP;

	if (host_cpu_is_intel)
		asm volatile("vmcall" : "+a"(rax) :
			     "D"(KVM_HC_XEN_HVM_OP_GUEST_REQUEST_VM_EVENT),
			     "S"(arg) : "memory");
	else
		asm volatile("vmmcall" : "+a"(rax) :
			     "D"(KVM_HC_XEN_HVM_OP_GUEST_REQUEST_VM_EVENT),
			     "S"(arg) : "memory");
	return rax;
}

static void guest_desc_store(u64 desc)
{
	struct desc_ptr dt = {};
	u16 sel = 0;

	switch (desc) {
	case KVMI_DESC_IDTR:
		asm volatile("sidt %0" : "=m"(dt));
		result = dt.address;
		break;
	case KVMI_DESC_GDTR:
		asm volatile("sgdt %0" : "=m"(dt));
		result = dt.address;
		break;
	case KVMI_DESC_LDTR:
		asm volatile("sldt %0" : "=m"(sel));
		result = sel;
		break;
	case KVMI_DESC_TR:
		asm volatile("str %0" : "=m"(sel));
		result = sel;
		break;
	}
}

static struct desc_ptr saved_idt, saved_gdt;
static u16 saved_tr;

/* What it is already */
static void guest_desc_load(u64 desc)
{
	u64 *gdt;

	switch (desc) {
	case KVMI_DESC_IDTR:
		asm volatile("lidt %0" : : "m"(saved_idt));
		break;
	case KVMI_DESC_GDTR:
		asm volatile("lgdt %0" : : "m"(saved_gdt));
		break;
	case KVMI_DESC_LDTR:
		asm volatile("lldt %0" : : "r"((u16)0));
		break;
	case KVMI_DESC_TR:
		/* Not busy any more */
		gdt = (void *)saved_gdt.address;
		gdt[saved_tr / 8] &= ~BIT_ULL(41);
		fault = kvm_asm_safe("ltr %w[sel]", [sel] "r"(saved_tr));
		break;
	}
	result = desc;
}

static void guest_do(u64 what, u64 target, u64 arg)
{
	switch (what) {
	case OP_CR:
		guest_cr(target, arg);
		break;
	case OP_LMSW:
		fault = kvm_asm_safe("lmsw %w[val]", [val] "r"(arg));
		result = get_cr0();
		break;
	case OP_CR4_SKIP:
		guest_cr4_skip(arg);
		break;
	case OP_WRMSR:
		fault = wrmsr_safe(target, arg);
		if (rdmsr_safe(target, &result))
			result = -1ull;
		break;
	case OP_HYPERCALL:
		result = guest_request(arg);
		break;
	case OP_XSETBV:
		fault = xsetbv_safe(target, arg);
		result = xgetbv(0);
		break;
	case OP_DESC_STORE:
		guest_desc_store(target);
		break;
	case OP_DESC_LOAD:
		guest_desc_load(target);
		break;
	case OP_XMM_SET:
		asm volatile("movq %0, %%xmm15" : : "r"(arg));
		break;
	case OP_XMM_GET:
		asm volatile("movq %%xmm15, %0" : "=r"(result));
		break;
	}
}

static void guest_serve(void)
{
	u64 i, what;
	u32 regs[4];

	asm volatile("sidt %0" : "=m"(saved_idt));
	asm volatile("sgdt %0" : "=m"(saved_gdt));
	asm volatile("str %0" : "=m"(saved_tr));
	if (this_cpu_has(X86_FEATURE_XSAVE))
		set_cr4(get_cr4() | X86_CR4_OSXSAVE);
	while (!READ_ONCE(stop)) {
		what = READ_ONCE(op);
		for (i = 0; what && i <= op_repeat; i++)
			guest_do(what, op_target,
				 i & 1 ? op_arg ^ op_repeat : op_arg);
		if (what) {
			WRITE_ONCE(counter, counter + 1);
			WRITE_ONCE(op, OP_NONE);
		}
		__cpuid(0, 0, &regs[0], &regs[1], &regs[2], &regs[3]);
	}
	GUEST_DONE();
}

/* Not in processor.h */
#define HAS_AVX		KVM_X86_CPU_FEATURE(0x1, 0, ECX, 28)

/* Has a number in a register of the FPU, never far from that in memory */
static void guest_count_fpu(void)
{
	bool avx = this_cpu_has(HAS_AVX);
	u32 regs[4];
	u64 i;

	if (avx) {
		set_cr4(get_cr4() | X86_CR4_OSXSAVE);
		xsetbv(0, 7);
	}
	for (i = 1; !READ_ONCE(stop); i++) {
		if (avx)
			asm volatile("vbroadcastsd %0, %%ymm15" : : "m"(i));
		else
			asm volatile("movq %0, %%xmm15" : : "m"(i));
		WRITE_ONCE(counter, i);
		if (!(i % 4096))
			__cpuid(0, 0, &regs[0], &regs[1], &regs[2], &regs[3]);
	}
	GUEST_DONE();
}

/*
 * Guests to be stepped.  Each has a table of where its steps begin, and begins
 * with an INT3 that is not among them.  What is pushed or saved of RFLAGS goes
 * to seen_flags.
 */
#define RFLAGS_TF	BIT(8)
#define INT_VECTOR	0x50

static u64 seen_flags;
static u64 db_rip;
static u64 pf_rip;
static u64 ud_rip;

#define STEPS(name)							\
	"int3\n"							\
	".pushsection kvmi_steps, \"a\"\n"				\
	".balign 8\n"							\
	#name ":\n"							\
	".popsection\n"

#define STEP(insn)							\
	"9:\n"								\
	".pushsection kvmi_steps, \"a\"\n"				\
	".quad 9b\n"							\
	".popsection\n"							\
	insn "\n"

/* Where the last step ends */
#define STEPS_END							\
	STEP("nop")							\
	".pushsection kvmi_steps, \"a\"\n"				\
	".quad 0\n"							\
	".popsection\n"

#define MAX_STEPS	5000

extern const u64 plain_steps[], flags_steps[], rep_steps[], loop_steps[],
		 shadow_steps[], syscall_steps[], pf_steps[], ud_steps[],
		 int3_steps[], int_steps[], tf_steps[], hlt_steps[],
		 sysret_steps[], sysret_prefix_steps[], iret_steps[],
		 execonly_steps[];
extern u8 pf_next[], step_syscall_entry[], step_sysret[], step_sysret_end[],
	  step_sysret_prefix[], step_sysret_prefix_end[], step_execonly[];

static void guest_step_plain(void)
{
	u64 a = 0;

	asm volatile(STEPS(plain_steps)
		     STEP("nop")
		     STEP("mov $5, %%eax")
		     STEP("push %%rax")
		     STEP("pop %0")
		     STEP("xor %%eax, %%eax")
		     STEP("cpuid")
		     STEP("mov $0x1b, %%ecx")
		     STEP("rdmsr")
		     STEP("call 1f")
		     STEP("jmp 2f")
		     "1:\n"
		     "ret\n"
		     "2:\n"
		     STEPS_END
		     : "=&r"(a) : : "eax", "ebx", "ecx", "edx", "memory");
	WRITE_ONCE(result, a);
	GUEST_DONE();
}

/* PUSHF and POPF, also with nothing but an exit in between */
static void guest_step_flags(void)
{
	u64 a, b, c;

	asm volatile(STEPS(flags_steps)
		     STEP("pushfq")
		     STEP("pop %0")
		     STEP("push %0")
		     STEP("popfq")
		     STEP("pushfq")
		     STEP("pop %1")
		     STEP("cli")
		     STEP("pushfw")
		     STEP("popfw")
		     STEP("sti")
		     STEP("pushfq")
		     STEP("popq %2")
		     STEPS_END
		     : "=&r"(a), "=&r"(b), "=&r"(c) : : "memory", "cc");
	WRITE_ONCE(seen_flags, a | b | c);
	WRITE_ONCE(result, (a & b & c) >> 9 & 1);
	GUEST_DONE();
}

static void guest_step_rep(void)
{
	static u8 from[] = "0123456789abcdef", to[16];
	u64 n = sizeof(to), si = (u64)from, di = (u64)to;

	asm volatile(STEPS(rep_steps)
		     STEP("rep movsb")
		     STEPS_END
		     : "+c"(n), "+S"(si), "+D"(di) : : "memory");
	WRITE_ONCE(result, !memcmp(from, to, sizeof(to)));
	GUEST_DONE();
}

static void guest_step_loop(void)
{
	u64 n = 0;

	asm volatile(STEPS(loop_steps)
		     STEP("mov $10, %%ecx")
		     "1:\n"
		     STEP("inc %0")
		     STEP("dec %%ecx")
		     STEP("jnz 1b")
		     STEPS_END
		     : "+r"(n) : : "ecx", "cc");
	WRITE_ONCE(result, n);
	GUEST_DONE();
}

/* Instructions that hold back interrupts, or traps, for one more */
static void guest_step_shadow(void)
{
	asm volatile("cli\n"
		     STEPS(shadow_steps)
		     STEP("sti")
		     STEP("nop")
		     STEP("mov %%ss, %%eax")
		     STEP("mov %%eax, %%ss")
		     STEP("nop")
		     STEP("nop")
		     STEP("push %%rax")
		     STEP("mov %%ss, (%%rsp)")
		     STEP("mov (%%rsp), %%ss")
		     STEP("mov %%rax, %%rcx")
		     STEP("pop %%rax")
		     STEP("cli")
		     STEP("sti")
		     STEP("cpuid")
		     STEPS_END
		     : : : "eax", "ebx", "ecx", "edx", "memory");
	WRITE_ONCE(result, 1);
	GUEST_DONE();
}

static void guest_init_syscall(void *entry)
{
	/* SYSRET: CS 0x1b + 16, SS 0x1b + 8, whatever the GDT says */
	wrmsr(MSR_STAR, (0x18ull << 48) | (0x08ull << 32));
	wrmsr(MSR_LSTAR, (u64)entry);
	wrmsr(MSR_SYSCALL_MASK, 0x47700);
	wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
}

static void guest_step_syscall(void)
{
	u64 flags = 0, entered = 0;

	guest_init_syscall(step_syscall_entry);
	asm volatile(STEPS(syscall_steps)
		     STEP("nop")
		     STEP("syscall")
		     "step_syscall_entry:\n"
		     STEP("mov %%r11, %0")
		     STEP("pushfq")
		     STEP("pop %1")
		     STEP("push %0")
		     STEP("popfq")
		     STEP("nop")
		     STEPS_END
		     : "=&r"(flags), "=&r"(entered) : : "rcx", "r11", "memory");
	WRITE_ONCE(seen_flags, flags | entered);
	WRITE_ONCE(result, (flags & RFLAGS_IF) && !(entered & RFLAGS_IF));
	GUEST_DONE();
}

/* To user mode, two steps there, and back */
#define GUEST_STEP_SYSRET(name, insn)					\
static void guest_step_##name(void)					\
{									\
	u64 flags = 0, sp;						\
									\
	guest_init_syscall(step_##name##_end);				\
	asm volatile("mov %%rsp, %1\n"					\
		     STEPS(name##_steps)				\
		     STEP("lea step_" #name "(%%rip), %%rcx")		\
		     STEP("mov $0x202, %%r11d")				\
		     STEP(insn)						\
		     "step_" #name ":\n"				\
		     STEP("nop")					\
		     STEP("nop")					\
		     STEP("syscall")					\
		     "step_" #name "_end:\n"				\
		     STEP("mov %%r11, %0")				\
		     STEP("push %0")					\
		     STEP("popfq")					\
		     STEPS_END						\
		     : "=&r"(flags), "=&r"(sp) : : "rcx", "r11",	\
		     "memory");						\
	WRITE_ONCE(seen_flags, flags);					\
	WRITE_ONCE(result, flags == 0x202);				\
	GUEST_DONE();							\
}

GUEST_STEP_SYSRET(sysret, "sysretq")
/* CS and 66 mean nothing here, and nor does a REX that isn't the last */
GUEST_STEP_SYSRET(sysret_prefix, ".byte 0x2e, 0x44, 0x66\n sysretq")

static void guest_step_iret(void)
{
	u64 rsp;

	asm volatile(STEPS(iret_steps)
		     STEP("mov %%rsp, %0")
		     STEP("mov %%ss, %%eax")
		     STEP("push %%rax")
		     STEP("push %0")
		     STEP("pushfq")
		     STEP("mov %%cs, %%eax")
		     STEP("push %%rax")
		     STEP("lea 1f(%%rip), %%rax")
		     STEP("push %%rax")
		     STEP("iretq")
		     "1:\n"
		     STEP("pushfq")
		     STEP("pop %%rax")
		     STEP("mov %%rax, seen_flags(%%rip)")
		     STEPS_END
		     : "=&r"(rsp) : : "rax", "memory", "cc");
	WRITE_ONCE(result, 1);
	GUEST_DONE();
}

static void guest_on_pf(struct ex_regs *regs)
{
	WRITE_ONCE(pf_rip, regs->rip);
	WRITE_ONCE(seen_flags, seen_flags | regs->rflags);
	WRITE_ONCE(result, regs->error_code);
	regs->rip = (u64)pf_next;
}

static void guest_step_pf(void)
{
	u64 addr = UNMAPPED_GPA;

	asm volatile(STEPS(pf_steps)
		     STEP("nop")
		     STEP("mov %%rax, (%0)")
		     "pf_next:\n"
		     STEP("nop")
		     STEPS_END
		     : : "r"(addr) : "memory");
	GUEST_DONE();
}

static void guest_on_ud(struct ex_regs *regs)
{
	WRITE_ONCE(ud_rip, regs->rip);
	WRITE_ONCE(seen_flags, seen_flags | regs->rflags);
	regs->rip += 2;
}

static void guest_step_ud(void)
{
	asm volatile(STEPS(ud_steps)
		     STEP("ud2")
		     STEP("nop")
		     STEPS_END
		     : : : "memory");
	GUEST_DONE();
}

static void guest_on_step_bp(struct ex_regs *regs)
{
	WRITE_ONCE(seen_flags, seen_flags | regs->rflags);
	WRITE_ONCE(trap_rip, regs->rip);
	WRITE_ONCE(traps, traps + 1);
}

static void guest_step_int3(void)
{
	asm volatile(STEPS(int3_steps)
		     STEP("nop")
		     STEP("int3")
		     STEP("nop")
		     STEPS_END
		     : : : "memory");
	GUEST_DONE();
}

static void guest_step_int(void)
{
	asm volatile(STEPS(int_steps)
		     STEP("nop")
		     STEP("int $0x50")
		     STEP("nop")
		     STEPS_END
		     : : : "memory");
	GUEST_DONE();
}

/* On a page of which a protection key lets nothing be read */
static void guest_step_execonly(void)
{
	u32 pkru, d;

	set_cr4(get_cr4() | X86_CR4_PKE);
	asm volatile(STEPS(execonly_steps)
		     STEP("wrpkru")
		     "step_execonly:\n"
		     STEP("nop")
		     STEP("int $0x50")
		     STEP("nop")
		     STEPS_END
		     : : "a"(1), "c"(0), "d"(0) : "memory");
	asm volatile("rdpkru" : "=a"(pkru), "=d"(d) : "c"(0));
	WRITE_ONCE(result, pkru);
	GUEST_DONE();
}

static void guest_on_db(struct ex_regs *regs)
{
	u64 dr6;

	asm volatile("mov %%dr6, %0" : "=r"(dr6));
	WRITE_ONCE(db_rip, regs->rip);
	WRITE_ONCE(result, dr6);
	WRITE_ONCE(traps, traps + 1);
	regs->rflags &= ~RFLAGS_TF;
}

/* TF is the guest's, too */
static void guest_step_tf(void)
{
	u64 flags;

	asm volatile(STEPS(tf_steps)
		     STEP("pushfq")
		     STEP("orq $0x100, (%%rsp)")
		     STEP("popfq")
		     STEP("nop")
		     STEP("nop")
		     STEP("pushfq")
		     STEP("pop %0")
		     STEPS_END
		     : "=&r"(flags) : : "memory", "cc");
	WRITE_ONCE(seen_flags, flags);
	GUEST_DONE();
}

static void guest_on_step_irq(struct ex_regs *regs)
{
	WRITE_ONCE(seen_flags, seen_flags | regs->rflags);
	guest_on_irq(regs);
}

static void guest_step_hlt(void)
{
	asm volatile("cli");
	x2apic_enable();
	WRITE_ONCE(counter, 1);
	asm volatile(STEPS(hlt_steps)
		     STEP("nop")
		     STEP("sti")
		     STEP("hlt")
		     STEP("cli")
		     STEP("sti")
		     STEP("nop")
		     STEPS_END
		     : : : "memory");
	WRITE_ONCE(counter, 2);
	GUEST_DONE();
}

#define guest_var(vm, var) \
	((typeof(var) *)addr_gva2hva(vm, (vm_vaddr_t)&(var)))
#define guest_read(vm, var) READ_ONCE(*guest_var(vm, var))
#define guest_write(vm, var, val) WRITE_ONCE(*guest_var(vm, var), val)

#define wait_for(cond)							\
do {									\
	int __ms;							\
									\
	for (__ms = 0; __ms < TIMEOUT_MS && !(cond); __ms++)		\
		usleep(1000);						\
	TEST_ASSERT(cond, "after %d ms still not", TIMEOUT_MS);		\
} while (0)

static u64 now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return timespec_to_ns(ts) / 1000000;
}

#define assert_at_once(call)						\
do {									\
	u64 __start = now_ms();						\
									\
	call;								\
	__start = now_ms() - __start;					\
	TEST_ASSERT(__start < AT_ONCE_MS, "took %lu ms",		\
		    (unsigned long)__start);				\
} while (0)

/*
 * The vCPUs' threads
 */
struct runner {
	struct kvm_vcpu *vcpu;
	pthread_t thread;
	int err;		/* of KVM_RUN, an errno */
	bool done;		/* the guest said so */
};

static void on_signal(int sig)
{
}

/* Runs the vCPU until the guest is done or userspace is wanted */
static void *run_vcpu(void *arg)
{
	struct runner *r = arg;
	struct ucall uc;

	for (;;) {
		if (__vcpu_run(r->vcpu)) {
			r->err = errno;
			return NULL;
		}

		switch (get_ucall(r->vcpu, &uc)) {
		case UCALL_SYNC:
			break;
		case UCALL_DONE:
			r->done = true;
			return NULL;
		case UCALL_ABORT:
			REPORT_GUEST_ASSERT(uc);
		default:
			return NULL;
		}
	}
}

static void start(struct runner *r, struct kvm_vcpu *vcpu)
{
	int err;

	r->vcpu = vcpu;
	r->err = 0;
	r->done = false;
	vcpu->run->immediate_exit = 0;

	err = pthread_create(&r->thread, NULL, run_vcpu, r);
	TEST_ASSERT(!err, "pthread_create: %s", strerror(err));
}

static void join(struct runner *r)
{
	struct timespec ts;
	int err;

	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += TIMEOUT_MS / 1000;
	err = pthread_timedjoin_np(r->thread, NULL, &ts);
	TEST_ASSERT(!err, "vCPU %u has not left KVM_RUN after %d ms",
		    r->vcpu->id, TIMEOUT_MS);
}

static void join_done(struct runner *r)
{
	join(r);
	TEST_ASSERT(r->done,
		    "vCPU %u: KVM_RUN's errno %d (%s), exit reason %s",
		    r->vcpu->id, r->err, strerror(r->err),
		    exit_reason_str(r->vcpu->run->exit_reason));
}

/* Ends those guests that wait to be told */
static void stop_guest(struct runner *r)
{
	guest_write(r->vcpu->vm, stop, 1);
	join_done(r);
}

/* As a device manager does it that wants the vCPU's thread */
static void interrupt(struct runner *r)
{
	WRITE_ONCE(r->vcpu->run->immediate_exit, 1);
	pthread_kill(r->thread, SIGUSR1);
	join(r);
	TEST_ASSERT(!r->done && r->err == EINTR,
		    "a signal made KVM_RUN return %d (%s)", r->err,
		    strerror(r->err));
}

/*
 * The device manager
 */
static int __hook(struct kvm_vm *vm, int fd)
{
	struct kvm_introspection_hook hook = { .fd = fd };

	return __vm_ioctl(vm, KVM_INTROSPECTION_HOOK, &hook);
}

#define assert_ioctl(vm, cmd, arg, err)					\
do {									\
	int __ret = __vm_ioctl(vm, cmd, arg);				\
	int __errno = __ret < 0 ? errno : 0;				\
									\
	TEST_ASSERT(__ret <= 0 && __errno == (err),			\
		    #cmd " returned %d, errno %d (%s), should be %d",	\
		    __ret, __errno, strerror(__errno), err);		\
} while (0)

static void hook_fd(struct kvm_vm *vm, int fd)
{
	int ret = __hook(vm, fd);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_INTROSPECTION_HOOK, ret));
}

static void tool_connected(int fd)
{
	tool.fd = fd;
	tool.seq = 0;
	tool.nr_events = 0;
}

static void make_sockets(int fds[2])
{
	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds),
		    "socketpair: %s", strerror(errno));
}

/* As HOOK leaves it: almost nothing is allowed */
static void hook_sndbuf(struct kvm_vm *vm, int sndbuf)
{
	int fds[2], ret;

	make_sockets(fds);
	if (sndbuf) {
		ret = setsockopt(fds[1], SOL_SOCKET, SO_SNDBUFFORCE, &sndbuf,
				 sizeof(sndbuf));
		TEST_ASSERT(!ret, "SO_SNDBUFFORCE: %s", strerror(errno));
	}
	hook_fd(vm, fds[1]);
	/* KVM has its own reference */
	close(fds[1]);
	tool_connected(fds[0]);
}

static void hook_restricted(struct kvm_vm *vm)
{
	hook_sndbuf(vm, 0);
}

static int __allow(struct kvm_vm *vm, unsigned long cmd, s32 id, u32 allow)
{
	struct kvm_introspection_feature feat = { .allow = allow, .id = id };

	return ioctl(vm->fd, cmd, &feat) ? errno : 0;
}

#define assert_allow(vm, cmd, id, allow, err)				\
do {									\
	int __err = __allow(vm, cmd, id, allow);			\
									\
	TEST_ASSERT(__err == (err),					\
		    #cmd " id %d allow %d: errno %d (%s), should be %d",\
		    (int)(id), (int)(allow), __err, strerror(__err), err); \
} while (0)

#define allow_command(vm, id, allow) \
	assert_allow(vm, KVM_INTROSPECTION_COMMAND, id, allow, 0)
#define allow_event(vm, id, allow) \
	assert_allow(vm, KVM_INTROSPECTION_EVENT, id, allow, 0)

static void allow_all(struct kvm_vm *vm)
{
	allow_command(vm, -1, 1);
	allow_event(vm, -1, 1);
}

static void hook(struct kvm_vm *vm)
{
	hook_restricted(vm);
	allow_all(vm);
}

static void tool_close(void)
{
	close(tool.fd);
	tool.fd = -1;
}

static void unhook(struct kvm_vm *vm)
{
	assert_at_once(assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0));
	if (tool.fd >= 0)
		tool_close();
}

/* With a full journal: takes seconds on an emulated kernel that has KASAN */
static void unhook_full(struct kvm_vm *vm)
{
	assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0);
	tool_close();
}

static struct kvm_introspection_status get_status(struct kvm_vm *vm)
{
	struct kvm_introspection_status status;
	int i;

	memset(&status, 0xff, sizeof(status));
	vm_ioctl(vm, KVM_INTROSPECTION_STATUS, &status);
	for (i = 0; i < ARRAY_SIZE(status.padding); i++)
		TEST_ASSERT_EQ(status.padding[i], 0);
	return status;
}

/*
 * The tool
 */
static bool readable(int ms)
{
	struct pollfd pfd = { .fd = tool.fd, .events = POLLIN };
	int ret;

	do {
		ret = poll(&pfd, 1, ms);
	} while (ret < 0 && errno == EINTR);
	TEST_ASSERT(ret >= 0, "poll: %s", strerror(errno));

	return ret > 0;
}

#define assert_quiet() \
	TEST_ASSERT(!readable(QUIET_MS), "a message (or end) is unexpected")

/* Returns false if the session has been closed */
static bool receive(void *buf, size_t size)
{
	size_t got = 0;
	ssize_t ret;

	while (got < size) {
		TEST_ASSERT(readable(TIMEOUT_MS),
			    "nothing from KVM after %d ms", TIMEOUT_MS);
		ret = recv(tool.fd, buf + got, size - got, 0);
		if (!ret || (ret < 0 && errno == ECONNRESET))
			return false;
		TEST_ASSERT(ret > 0, "recv: %s", strerror(errno));
		got += ret;
	}

	return true;
}

static bool receive_msg(struct msg *msg)
{
	if (!receive(&msg->hdr, sizeof(msg->hdr)))
		return false;
	TEST_ASSERT(msg->hdr.size <= sizeof(msg->body),
		    "message %u has %u bytes", msg->hdr.id, msg->hdr.size);
	return receive(msg->body, msg->hdr.size);
}

/* Whatever may still be on its way */
static void assert_closed(void)
{
	static struct msg msg;

	while (receive_msg(&msg))
		;
}

static void send_bytes(const void *buf, size_t size)
{
	ssize_t ret = send(tool.fd, buf, size, MSG_NOSIGNAL);

	TEST_ASSERT(ret == size, "send: %zd of %zu bytes, %s", ret, size,
		    strerror(errno));
}

static void send_msg_seq(u16 id, u32 seq, const void *body, size_t size)
{
	static struct msg msg;

	msg.hdr.id = id;
	msg.hdr.size = size;
	msg.hdr.seq = seq;
	if (size)
		memcpy(msg.body, body, size);
	send_bytes(&msg, sizeof(msg.hdr) + size);
}

static u32 send_msg(u16 id, const void *body, size_t size)
{
	send_msg_seq(id, ++tool.seq, body, size);
	return tool.seq;
}

/* The seqs of commands and events may be the same */
static bool is_event(const struct msg *msg)
{
	return msg->hdr.id == KVMI_VM_EVENT ||
	       (msg->hdr.id == KVMI_VCPU_EVENT &&
		msg->hdr.size != sizeof(struct kvmi_error_code));
}

static void keep_event(const struct msg *msg)
{
	size_t size = sizeof(msg->hdr) + msg->hdr.size;
	struct event *ev = &tool.events[tool.nr_events];

	TEST_ASSERT(tool.nr_events < ARRAY_SIZE(tool.events),
		    "too many events");
	TEST_ASSERT(size <= sizeof(*ev), "an event of %zu bytes", size);
	tool.nr_events++;

	memset(ev, 0, sizeof(*ev));
	memcpy(ev, msg, size);
}

/* Returns the error in the reply, and keeps the events that precede it */
static int get_reply(u16 id, u32 seq, void *rpl, size_t rpl_size)
{
	static struct msg msg;
	const struct kvmi_error_code *ec = (void *)msg.body;

	for (;;) {
		TEST_ASSERT(receive_msg(&msg),
			    "closed instead of replying to command %u", id);
		if (!is_event(&msg))
			break;
		keep_event(&msg);
	}

	TEST_ASSERT(msg.hdr.id == id && msg.hdr.seq == seq,
		    "the reply is to command %u seq %u, should be %u seq %u",
		    msg.hdr.id, msg.hdr.seq, id, seq);
	TEST_ASSERT(msg.hdr.size >= sizeof(*ec), "a reply of %u bytes",
		    msg.hdr.size);
	TEST_ASSERT(!ec->padding && ec->err <= 0,
		    "error code %d with padding %u", ec->err, ec->padding);
	if (ec->err)
		rpl_size = 0;
	TEST_ASSERT(msg.hdr.size == sizeof(*ec) + rpl_size,
		    "command %u, error %d: a reply of %u bytes, should be %zu",
		    id, ec->err, msg.hdr.size, sizeof(*ec) + rpl_size);
	if (rpl_size)
		memcpy(rpl, ec + 1, rpl_size);

	return ec->err;
}

static int __command(u16 id, const void *req, size_t size, void *rpl,
		     size_t rpl_size)
{
	return get_reply(id, send_msg(id, req, size), rpl, rpl_size);
}

#define command(id, req) __command(id, req, sizeof(*(req)), NULL, 0)

static u32 send_vcpu_msg(u16 id, u16 vcpu, const void *req, size_t size)
{
	static u8 body[KVMI_MAX_MSG_SIZE];
	struct kvmi_vcpu_hdr hdr = { .vcpu = vcpu };

	memcpy(body, &hdr, sizeof(hdr));
	if (size)
		memcpy(body + sizeof(hdr), req, size);
	return send_msg(id, body, sizeof(hdr) + size);
}

static int __vcpu_command(u16 id, u16 vcpu, const void *req, size_t size,
			  void *rpl, size_t rpl_size)
{
	return get_reply(id, send_vcpu_msg(id, vcpu, req, size), rpl, rpl_size);
}

#define vcpu_command(id, vcpu, req) \
	__vcpu_command(id, vcpu, req, sizeof(*(req)), NULL, 0)

#define assert_err(call, err)						\
do {									\
	int __err = (call);						\
									\
	TEST_ASSERT(__err == (err), #call " gives %d, should be %d",	\
		    __err, err);					\
} while (0)

static int get_version(void)
{
	struct kvmi_get_version_reply rpl;

	return __command(KVMI_GET_VERSION, NULL, 0, &rpl, sizeof(rpl));
}

static int check_command(u16 id)
{
	struct kvmi_vm_check_command req = { .id = id };

	return command(KVMI_VM_CHECK_COMMAND, &req);
}

static int check_event(u16 id)
{
	struct kvmi_vm_check_event req = { .id = id };

	return command(KVMI_VM_CHECK_EVENT, &req);
}

static int vm_control_event(u16 id, u8 enable)
{
	struct kvmi_vm_control_events req = {
		.event_id = id,
		.enable = enable,
	};

	return command(KVMI_VM_CONTROL_EVENTS, &req);
}

static int read_physical(u64 gpa, size_t size, void *buf)
{
	struct kvmi_vm_read_physical req = { .gpa = gpa, .size = size };

	return __command(KVMI_VM_READ_PHYSICAL, &req, sizeof(req), buf, size);
}

static int write_physical(u64 gpa, size_t size, const void *buf)
{
	struct {
		struct kvmi_vm_write_physical req;
		u8 data[4096];
	} msg = { .req = { .gpa = gpa, .size = size } };

	memcpy(msg.data, buf, size);
	return __command(KVMI_VM_WRITE_PHYSICAL, &msg, sizeof(msg.req) + size,
			 NULL, 0);
}

static int pause_vcpu(u16 vcpu, u8 wait)
{
	struct kvmi_vm_pause_vcpu req = { .vcpu = vcpu, .wait = wait };

	return command(KVMI_VM_PAUSE_VCPU, &req);
}

static int control_cleanup(u8 enable)
{
	struct kvmi_vm_control_cleanup req = { .enable = enable };

	return command(KVMI_VM_CONTROL_CLEANUP, &req);
}

static int vcpu_get_info(u16 vcpu)
{
	struct kvmi_vcpu_get_info_reply rpl;

	return __vcpu_command(KVMI_VCPU_GET_INFO, vcpu, NULL, 0, &rpl,
			      sizeof(rpl));
}

static int control_event(u16 vcpu, u16 id, u8 enable)
{
	struct kvmi_vcpu_control_events req = {
		.event_id = id,
		.enable = enable,
	};

	return vcpu_command(KVMI_VCPU_CONTROL_EVENTS, vcpu, &req);
}

static int enable_bp(u16 vcpu)
{
	return control_event(vcpu, KVMI_VCPU_EVENT_BREAKPOINT, 1);
}

static int control_msr(u16 vcpu, u32 msr, u8 enable)
{
	struct kvmi_vcpu_control_msr req = { .msr = msr, .enable = enable };

	return vcpu_command(KVMI_VCPU_CONTROL_MSR, vcpu, &req);
}

static int set_page_access_n(const struct kvmi_page_access_entry *entries,
			     unsigned int count)
{
	struct {
		struct kvmi_vm_set_page_access req;
		struct kvmi_page_access_entry entries[511];
	} msg = { .req.count = count };

	memcpy(msg.entries, entries, count * sizeof(*entries));
	return __command(KVMI_VM_SET_PAGE_ACCESS, &msg,
			 sizeof(msg.req) + count * sizeof(*entries), NULL, 0);
}

static int set_page_access(u64 gpa, u8 access)
{
	struct kvmi_page_access_entry entry = { .gpa = gpa, .access = access };

	return set_page_access_n(&entry, 1);
}

struct registers_request {
	struct kvmi_vcpu_get_registers req;
	u32 msrs_idx[MAX_MSRS + 1];
};

struct registers_reply {
	struct kvmi_vcpu_get_registers_reply rpl;
	struct kvm_msr_entry entries[MAX_MSRS + 1];
};

static u32 send_get_registers(u16 vcpu, unsigned int nmsrs, u32 msr)
{
	static struct registers_request req;
	unsigned int i;

	req.req.nmsrs = nmsrs;
	for (i = 0; i < nmsrs; i++)
		req.msrs_idx[i] = msr;

	return send_vcpu_msg(KVMI_VCPU_GET_REGISTERS, vcpu, &req,
			     sizeof(req.req) + nmsrs * sizeof(u32));
}

static int get_registers(u16 vcpu, unsigned int nmsrs, u32 msr,
			 struct registers_reply *rpl)
{
	u32 seq = send_get_registers(vcpu, nmsrs, msr);

	return get_reply(KVMI_VCPU_GET_REGISTERS, seq, rpl,
			 sizeof(rpl->rpl) + nmsrs * sizeof(rpl->entries[0]));
}

static int set_registers(u16 vcpu, const struct kvm_regs *regs)
{
	return vcpu_command(KVMI_VCPU_SET_REGISTERS, vcpu, regs);
}

static u64 translate_gva(u16 vcpu, u64 gva)
{
	struct kvmi_vcpu_translate_gva req = { .gva = gva };
	struct kvmi_vcpu_translate_gva_reply rpl;

	assert_err(__vcpu_command(KVMI_VCPU_TRANSLATE_GVA, vcpu, &req,
				  sizeof(req), &rpl, sizeof(rpl)), 0);
	return rpl.gpa;
}

static void get_any_event(struct event *ev)
{
	static const struct kvmi_event_hdr zero_ev;
	struct kvmi_event_hdr copy;
	static struct msg msg;
	size_t data = 0;

	if (!tool.nr_events) {
		TEST_ASSERT(receive_msg(&msg), "closed instead of an event");
		TEST_ASSERT(is_event(&msg), "message %u instead of an event",
			    msg.hdr.id);
		keep_event(&msg);
	}
	*ev = tool.events[0];
	tool.nr_events--;
	memmove(tool.events, tool.events + 1, tool.nr_events * sizeof(*ev));

	copy = ev->ev;
	copy.event = 0;
	TEST_ASSERT(!memcmp(&copy, &zero_ev, sizeof(copy)),
		    "the event's padding isn't zero");

	if (ev->hdr.id == KVMI_VM_EVENT) {
		TEST_ASSERT_EQ(ev->hdr.size, VM_EVENT_SIZE);
		return;
	}

	switch (ev->ev.event) {
	case KVMI_VCPU_EVENT_BREAKPOINT:
		data = sizeof(ev->bp);
		break;
	case KVMI_VCPU_EVENT_PF:
		data = sizeof(ev->pf);
		break;
	case KVMI_VCPU_EVENT_CR:
		data = sizeof(ev->cr);
		break;
	case KVMI_VCPU_EVENT_MSR:
		data = sizeof(ev->msr);
		break;
	case KVMI_VCPU_EVENT_XSETBV:
		data = sizeof(ev->xsetbv);
		break;
	case KVMI_VCPU_EVENT_DESCRIPTOR:
		data = sizeof(ev->desc);
		break;
	case KVMI_VCPU_EVENT_TRAP:
		data = sizeof(ev->trap);
		break;
	case KVMI_VCPU_EVENT_SINGLESTEP:
		data = sizeof(ev->step);
		break;
	}
	TEST_ASSERT_EQ(ev->hdr.size, VCPU_EVENT_SIZE + data);
	TEST_ASSERT_EQ(ev->common.size, sizeof(ev->common));
	TEST_ASSERT_EQ(ev->common.padding, 0);
}

static void get_event(struct event *ev, u16 id, u16 vcpu)
{
	get_any_event(ev);
	TEST_ASSERT(ev->hdr.id == KVMI_VCPU_EVENT && ev->ev.event == id &&
		    ev->common.vcpu == vcpu,
		    "event %u of vCPU %u (message %u), should be %u of %u",
		    ev->ev.event, ev->common.vcpu, ev->hdr.id, id, vcpu);
}

struct event_reply {
	struct kvmi_vcpu_hdr hdr;
	struct kvmi_vcpu_event_reply rpl;
	u8 excess[8];
};

static void make_event_reply(struct event_reply *rpl, const struct event *ev,
			     u8 action)
{
	memset(rpl, 0, sizeof(*rpl));
	rpl->hdr.vcpu = ev->common.vcpu;
	rpl->rpl.action = action;
	rpl->rpl.event = ev->ev.event;
}

static void send_event_reply(const struct event *ev,
			     const struct event_reply *rpl)
{
	send_msg_seq(KVMI_VCPU_EVENT, ev->hdr.seq, rpl, EVENT_REPLY_SIZE);
}

static void reply(const struct event *ev, u8 action)
{
	struct event_reply rpl;

	make_event_reply(&rpl, ev, action);
	send_event_reply(ev, &rpl);
}

/* For events whose reply says what is to be written */
static void reply_value(const struct event *ev, u8 action, u64 val)
{
	struct event_reply rpl;

	make_event_reply(&rpl, ev, action);
	memcpy(rpl.excess, &val, sizeof(val));
	send_msg_seq(KVMI_VCPU_EVENT, ev->hdr.seq, &rpl, sizeof(rpl));
}

#define reply_continue(ev) reply(ev, KVMI_EVENT_ACTION_CONTINUE)
#define reply_retry(ev) reply(ev, KVMI_EVENT_ACTION_RETRY)
#define reply_crash(ev) reply(ev, KVMI_EVENT_ACTION_CRASH)

/* The guest does what it does when nobody looks */
static void assert_guest_runs(struct kvm_vm *vm)
{
	u64 before = guest_read(vm, counter);

	wait_for(guest_read(vm, counter) != before);
}

static void assert_guest_stands(struct kvm_vm *vm)
{
	u64 before = guest_read(vm, counter);

	usleep(2000);
	TEST_ASSERT_EQ(guest_read(vm, counter), before);
}

static void install_bp_handler(struct kvm_vm *vm)
{
	vm_install_exception_handler(vm, BP_VECTOR, guest_on_bp);
}

/* Starts a guest with an INT3 ahead, up to the event */
static void start_to_bp(struct runner *r, struct kvm_vcpu *vcpu,
			struct event *ev)
{
	u32 seq;

	install_bp_handler(vcpu->vm);
	hook(vcpu->vm);
	seq = send_vcpu_msg(KVMI_VCPU_CONTROL_EVENTS, 0,
			    &(struct kvmi_vcpu_control_events) {
				.event_id = KVMI_VCPU_EVENT_BREAKPOINT,
				.enable = 1,
			    }, sizeof(struct kvmi_vcpu_control_events));
	/* Served before the vCPU runs, in a thread that need not exist yet */
	get_version();
	start(r, vcpu);
	assert_err(get_reply(KVMI_VCPU_CONTROL_EVENTS, seq, NULL, 0), 0);
	get_event(ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
}

static void start_to_pause(struct runner *r, struct kvm_vcpu *vcpu,
			   struct event *ev)
{
	hook(vcpu->vm);
	start(r, vcpu);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(ev, KVMI_VCPU_EVENT_PAUSE, 0);
}

static void start_to_rbx(struct runner *r, struct kvm_vcpu *vcpu,
			 struct event *ev)
{
	hook(vcpu->vm);
	start(r, vcpu);
	wait_for(guest_read(vcpu->vm, counter));
	assert_err(pause_vcpu(0, 0), 0);
	get_event(ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT_EQ(ev->common.arch.regs.rbx, 0);
}

static void send_read_page(struct kvm_vm *vm)
{
	struct kvmi_vm_read_physical req = {
		.gpa = addr_gva2gpa(vm, (vm_vaddr_t)&counter) & PAGE_MASK,
		.size = PAGE_SIZE,
	};

	send_msg(KVMI_VM_READ_PHYSICAL, &req, sizeof(req));
}

/*
 * Asks and asks, but doesn't read, until KVM's receive thread is stuck with
 * its replies.
 */
static void jam(struct kvm_vm *vm)
{
	struct {
		struct kvmi_msg_hdr hdr;
		struct kvmi_vm_read_physical req;
	} msg = {
		.hdr.id = KVMI_VM_READ_PHYSICAL,
		.hdr.size = sizeof(msg.req),
		.req.gpa = addr_gva2gpa(vm, (vm_vaddr_t)&counter) & PAGE_MASK,
		.req.size = PAGE_SIZE,
	};
	int full = 0, i;
	ssize_t ret;

	for (i = 0; full < 10; i++) {
		TEST_ASSERT(i < 20000, "the socket never fills up");
		ret = send(tool.fd, &msg, sizeof(msg),
			   MSG_DONTWAIT | MSG_NOSIGNAL);
		if (ret == sizeof(msg)) {
			full = 0;
			continue;
		}
		TEST_ASSERT(ret < 0 && errno == EAGAIN, "send: %zd, %s", ret,
			    strerror(errno));
		full++;
		usleep(5000);
	}
}

/* Waits until the vCPU's thread is stuck with its replies */
static void wait_stuck(void)
{
	int bytes = 0, before = -1, same = 0, ms;

	for (ms = 0; same < 10; ms += 5) {
		TEST_ASSERT(ms < TIMEOUT_MS, "the socket never fills up");
		TEST_ASSERT(!ioctl(tool.fd, FIONREAD, &bytes), "FIONREAD: %s",
			    strerror(errno));
		same = bytes && bytes == before ? same + 1 : 0;
		before = bytes;
		usleep(5000);
	}
}

/*
 * The cases
 */
static bool introspection_on(void)
{
	return get_kvm_param_bool("introspection");
}

FIXTURE(kvmi) {
	struct kvm_vcpu *vcpu;
};

/*
 * Guests run with interrupts enabled.  None will come, but there are emulated
 * hosts that don't get their own while a guest has them disabled.
 */
static struct kvm_vcpu *enable_interrupts(struct kvm_vcpu *vcpu)
{
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	regs.rflags |= RFLAGS_IF;
	vcpu_regs_set(vcpu, &regs);

	return vcpu;
}

static struct kvm_vcpu *make_vm(void *guest_code)
{
	struct kvm_vcpu *vcpu;

	(void)vm_create_with_one_vcpu(&vcpu, guest_code);
	return enable_interrupts(vcpu);
}

static struct kvm_vcpu *add_vcpu(struct kvm_vcpu *vcpu, void *guest_code)
{
	return enable_interrupts(vm_vcpu_add(vcpu->vm, 1, guest_code));
}

FIXTURE_SETUP(kvmi)
{
	if (!introspection_on())
		SKIP(return, "kvm.introspection is off");
	self->vcpu = make_vm(NULL);
}

FIXTURE_TEARDOWN(kvmi)
{
	kvm_vm_free(self->vcpu->vm);
}

/* HOOK, UNHOOK */

KVM_ONE_VCPU_TEST(kvmi, capability, guest_count)
{
	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_INTROSPECTION), KVMI_VERSION);
	TEST_ASSERT_EQ(vm_check_cap(vcpu->vm, KVM_CAP_INTROSPECTION),
		       KVMI_VERSION);
}

KVM_ONE_VCPU_TEST(kvmi, hook_unhook, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;

	/* Not hooked: nothing to do */
	assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0);

	hook_restricted(vm);
	assert_err(get_version(), 0);
	assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0);
	assert_closed();
	tool_close();
	assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0);

	/* Again, at once */
	hook_restricted(vm);
	assert_err(get_version(), 0);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, hook_error_efault, guest_count)
{
	int ret = ioctl(vcpu->vm->fd, KVM_INTROSPECTION_HOOK, NULL);

	TEST_ASSERT(ret < 0 && errno == EFAULT, "HOOK: %d, errno %d", ret,
		    errno);
}

KVM_ONE_VCPU_TEST(kvmi, hook_error_padding, guest_count)
{
	struct kvm_introspection_hook hook = { .fd = -1, .padding = 1 };

	assert_ioctl(vcpu->vm, KVM_INTROSPECTION_HOOK, &hook, EINVAL);

	/* Tested before the VM's state */
	hook_restricted(vcpu->vm);
	assert_ioctl(vcpu->vm, KVM_INTROSPECTION_HOOK, &hook, EINVAL);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, hook_error_fd, guest_count)
{
	struct kvm_introspection_hook hook = { .fd = -1 };
	struct kvm_vm *vm = vcpu->vm;
	int fds[2];

	assert_ioctl(vm, KVM_INTROSPECTION_HOOK, &hook, EINVAL);

	hook.fd = vm->fd;
	assert_ioctl(vm, KVM_INTROSPECTION_HOOK, &hook, EINVAL);

	/* Messages are read in pieces */
	TEST_ASSERT(!socketpair(AF_UNIX, SOCK_DGRAM, 0, fds), "socketpair");
	hook.fd = fds[0];
	assert_ioctl(vm, KVM_INTROSPECTION_HOOK, &hook, EINVAL);
	close(fds[0]);
	close(fds[1]);

	/* None of it has left a trace */
	hook_restricted(vm);
	assert_err(get_version(), 0);
	assert_ioctl(vm, KVM_INTROSPECTION_HOOK, &hook, EEXIST);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, hook_error_eexist, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	int fds[2];

	make_sockets(fds);
	hook_restricted(vm);
	TEST_ASSERT(__hook(vm, fds[0]) && errno == EEXIST, "errno %d", errno);
	assert_err(get_version(), 0);

	/* The tool has gone, which is not UNHOOK */
	tool_close();
	usleep(QUIET_MS * 1000);
	TEST_ASSERT(__hook(vm, fds[0]) && errno == EEXIST, "errno %d", errno);

	unhook(vm);
	hook_fd(vm, fds[0]);
	tool_connected(fds[1]);
	assert_err(get_version(), 0);
	unhook(vm);
	close(fds[0]);
}

/* A socket without a peer: a session that ends at once */
KVM_ONE_VCPU_TEST(kvmi, hook_unconnected, guest_count)
{
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook_fd(vm, fd);
	allow_all(vm);
	start(&r, vcpu);
	assert_guest_runs(vm);
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, ENOENT);
	unhook(vm);
	stop_guest(&r);
	close(fd);
}

struct hooker {
	struct kvm_vm *vm;
	struct kvm_introspection_hook hook;
};

static int hook_and_exit(void *arg)
{
	struct hooker *hooker = arg;

	_exit(ioctl(hooker->vm->fd, KVM_INTROSPECTION_HOOK, &hooker->hook) ?
	      errno : 0);
}

/* The end comes with the last bytes, before anybody reads */
KVM_ONE_VCPU_TEST(kvmi, hook_closed, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	u32 half_a_header = 0;
	int fds[2];

	make_sockets(fds);
	TEST_ASSERT(write(fds[0], &half_a_header, sizeof(half_a_header)) ==
		    sizeof(half_a_header), "write: %s", strerror(errno));
	close(fds[0]);
	hook_fd(vm, fds[1]);
	wait_for(!get_status(vm).hooked);
	TEST_ASSERT_EQ(get_status(vm).reason, KVM_INTROSPECTION_END_CLOSED);
	unhook(vm);
	close(fds[1]);
}

static void die_with_vm_in_flight(int other)
{
	/* Too large a message, so that what follows it isn't read */
	static struct kvmi_msg_hdr too_large[1024] = {
		{ .id = KVMI_GET_VERSION, .size = -1 },
	};
	struct kvm_vm *vm = vm_create_barebones();
	union {
		struct cmsghdr hdr;
		char space[CMSG_SPACE(2 * sizeof(int))];
	} files = {
		.hdr = { CMSG_LEN(2 * sizeof(int)), SOL_SOCKET, SCM_RIGHTS },
	};
	struct iovec byte = { .iov_base = too_large, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &byte,
		.msg_iovlen = 1,
		.msg_control = &files,
		.msg_controllen = sizeof(files),
	};
	int fds[2];

	make_sockets(fds);
	memcpy(CMSG_DATA(&files.hdr), (int []){ vm->fd, other },
	       2 * sizeof(int));
	TEST_ASSERT(write(fds[0], too_large, sizeof(too_large)) ==
		    sizeof(too_large) && sendmsg(fds[0], &msg, 0) == 1,
		    "send: %s", strerror(errno));
	hook_fd(vm, fds[1]);
	wait_for(!get_status(vm).hooked);
	TEST_ASSERT_EQ(get_status(vm).reason, KVM_INTROSPECTION_END_PROTOCOL);
	_exit(0);
}

/* The VM's own file is in flight in the socket that the VM holds */
KVM_ONE_VCPU_TEST(kvmi, hook_in_flight, guest_count)
{
	struct pollfd other = { .events = POLLIN };
	int fds[2], status;
	pid_t pid;

	make_sockets(fds);
	pid = fork();
	if (!pid)
		die_with_vm_in_flight(fds[0]);
	close(fds[0]);
	TEST_ASSERT(pid > 0 && waitpid(pid, &status, 0) == pid && !status,
		    "status %#x", status);

	/* The other file in flight is closed with the VM's */
	other.fd = fds[1];
	TEST_ASSERT(poll(&other, 1, TIMEOUT_MS) == 1, "the VM is left over");
	close(fds[1]);
}

/* The process that hooked the VM dies, but another one shares its memory */
KVM_ONE_VCPU_TEST(kvmi, hook_again_after_kill, guest_count)
{
	static char stack[16384] __aligned(16);
	struct hooker hooker = { .vm = vcpu->vm };
	int fds[2], status;
	struct runner r;
	pid_t pid;

	start(&r, vcpu);
	make_sockets(fds);
	hooker.hook.fd = fds[1];
	pid = clone(hook_and_exit, stack + sizeof(stack),
		    CLONE_VM | CLONE_FILES | SIGCHLD, &hooker);
	TEST_ASSERT(pid > 0, "clone: %s", strerror(errno));
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status,
		    "status %#x", status);

	wait_for(!get_status(vcpu->vm).hooked);
	TEST_ASSERT_EQ(get_status(vcpu->vm).reason,
		       KVM_INTROSPECTION_END_KILLED);
	close(fds[0]);
	close(fds[1]);

	hook(vcpu->vm);
	assert_err(get_version(), 0);
	assert_err(vcpu_get_info(0), 0);
	unhook(vcpu->vm);
	stop_guest(&r);
}

static void assert_status(struct kvm_vm *vm, u32 hooked, u32 reason, u64 events,
			  u64 commands)
{
	struct kvm_introspection_status status = get_status(vm);

	TEST_ASSERT_EQ(status.hooked, hooked);
	TEST_ASSERT_EQ(status.reason, reason);
	TEST_ASSERT_EQ(status.restored, 0);
	TEST_ASSERT_EQ(status.events, events);
	TEST_ASSERT_EQ(status.commands, commands);
}

static u64 get_silence(struct kvm_vm *vm)
{
	return get_status(vm).silence;
}

KVM_ONE_VCPU_TEST(kvmi, status_silence, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;

	TEST_ASSERT_EQ(get_silence(vm), 0);
	hook(vm);
	start(&r, vcpu);
	/* Nobody waits for it, so it may be as silent as it likes */
	usleep(100000);
	TEST_ASSERT_EQ(get_silence(vm), 0);

	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	usleep(300000);
	TEST_ASSERT(get_silence(vm) >= 200 && get_silence(vm) < 30000,
		    "silence %llu ms", (unsigned long long)get_silence(vm));

	/* It is at work */
	usleep(1000000);
	assert_err(get_version(), 0);
	TEST_ASSERT(get_silence(vm) < 900, "silence %llu ms",
		    (unsigned long long)get_silence(vm));
	reply_continue(&ev);
	wait_for(!get_silence(vm));
	usleep(100000);
	TEST_ASSERT_EQ(get_silence(vm), 0);

	/* And the next one begins from nothing, although it was silent */
	usleep(1000000);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT(get_silence(vm) < 900, "silence %llu ms",
		    (unsigned long long)get_silence(vm));
	usleep(100000);
	unhook(vm);
	TEST_ASSERT_EQ(get_silence(vm), 0);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, status, guest_count)
{
	struct kvmi_msg_hdr bad = { .size = KVMI_MAX_MSG_SIZE + 1 };
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;

	assert_status(vm, 0, KVM_INTROSPECTION_END_NONE, 0, 0);
	assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0);
	assert_status(vm, 0, KVM_INTROSPECTION_END_NONE, 0, 0);
	TEST_ASSERT_EQ(ioctl(vm->fd, KVM_INTROSPECTION_STATUS, NULL), -1);
	TEST_ASSERT_EQ(errno, EFAULT);

	hook(vm);
	assert_status(vm, 1, KVM_INTROSPECTION_END_NONE, 0, 0);
	start(&r, vcpu);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	assert_status(vm, 1, KVM_INTROSPECTION_END_NONE, 1, 1);
	reply_continue(&ev);
	get_version();
	/* A reply to an event is no command */
	assert_status(vm, 1, KVM_INTROSPECTION_END_NONE, 1, 2);
	unhook(vm);
	assert_status(vm, 0, KVM_INTROSPECTION_END_UNHOOK, 1, 2);

	hook(vm);
	assert_status(vm, 1, KVM_INTROSPECTION_END_NONE, 0, 0);
	tool_close();
	wait_for(!get_status(vm).hooked);
	unhook(vm);
	assert_status(vm, 0, KVM_INTROSPECTION_END_CLOSED, 0, 0);

	hook(vm);
	send_bytes(&bad, sizeof(bad));
	assert_closed();
	unhook(vm);
	assert_status(vm, 0, KVM_INTROSPECTION_END_PROTOCOL, 0, 0);

	stop_guest(&r);
}

/* A tool that comes and goes doesn't fill the host's log */
TEST_F(kvmi, status_log_limited)
{
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK), lines = 0, i;
	struct kvm_vm *vm = self->vcpu->vm;
	u64 begin = now_ms();
	char line[8192];
	ssize_t ret;

	if (fd < 0)
		SKIP(return, "no /dev/kmsg");
	lseek(fd, 0, SEEK_END);
	for (i = 0; i < 100; i++) {
		hook_restricted(vm);
		unhook(vm);
	}
	while ((ret = read(fd, line, sizeof(line) - 1)) > 0) {
		line[ret] = 0;
		lines += !!strstr(line, "introspection of process");
	}
	/* Ten each five seconds */
	TEST_ASSERT(lines <= 10 * (2 + (now_ms() - begin) / 5000),
		    "%d lines", lines);
	close(fd);
}

KVM_ONE_VCPU_TEST(kvmi, hook_again_while_running, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	int i;

	start(&r, vcpu);
	for (i = 0; i < 60; i++) {
		hook(vm);
		switch (i % 4) {
		case 0:
			break;
		case 1:
			assert_err(vcpu_get_info(0), 0);
			break;
		case 2:
			assert_err(pause_vcpu(0, 0), 0);
			get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
			TEST_ASSERT_EQ(ev.hdr.seq, 1);
			break;
		case 3:
			/* The reply is lost */
			send_get_registers(0, 0, 0);
			break;
		}
		unhook(vm);
	}
	assert_guest_runs(vm);
	stop_guest(&r);
}

/* What one session leaves undone must not appear in the next */
KVM_ONE_VCPU_TEST(kvmi, hook_starts_afresh, guest_break_once)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev, new_ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	interrupt(&r);

	/* Neither answered nor served */
	assert_err(pause_vcpu(0, 0), 0);
	send_get_registers(0, 0, 0);
	unhook(vm);

	hook_restricted(vm);
	assert_err(check_command(KVMI_VM_GET_INFO), -KVM_EPERM);
	assert_err(check_event(KVMI_VCPU_EVENT_PAUSE), -KVM_EPERM);
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, ENOENT);
	allow_all(vm);

	start(&r, vcpu);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	assert_quiet();

	assert_err(pause_vcpu(0, 0), 0);
	get_event(&new_ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT_EQ(new_ev.hdr.seq, 1);
	reply_continue(&new_ev);

	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, unhook_jammed_receiver, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	jam(vm);
	assert_at_once(assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, 0));
	assert_guest_runs(vm);
	unhook(vm);
	assert_guest_runs(vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, unhook_jammed_vcpu, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	int i;

	hook(vm);
	for (i = 0; i < MAX_JOBS; i++)
		send_get_registers(0, MAX_MSRS, MSR_EFER);
	get_version();
	start(&r, vcpu);
	wait_stuck();
	assert_guest_stands(vm);
	unhook(vm);
	assert_guest_runs(vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, unhook_open_pause, guest_count)
{
	struct runner r;
	struct event ev;

	start_to_pause(&r, vcpu, &ev);
	assert_guest_stands(vcpu->vm);
	unhook(vcpu->vm);
	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, unhook_destroyed_vm, guest_count)
{
	struct kvm_vcpu *other = make_vm(guest_count);
	struct runner r;
	struct event ev;

	hook(other->vm);
	kvm_vm_free(other->vm);
	assert_closed();
	tool_close();

	/* With an event and messages open */
	other = make_vm(guest_count);
	start_to_pause(&r, other, &ev);
	interrupt(&r);
	assert_err(pause_vcpu(0, 0), 0);
	send_get_registers(0, 0, 0);
	get_version();
	kvm_vm_free(other->vm);
	assert_closed();
	tool_close();
}

/* Of all threads of it */
static int wait_for_exit(pid_t pid)
{
	int status, i;

	for (i = 0; i < TIMEOUT_MS; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return status;
		usleep(1000);
	}
	TEST_FAIL("process %d is there still after %d ms", pid, TIMEOUT_MS);
}

/* The device manager is killed, and its thread waits for the tool */
static void test_killed(bool jammed)
{
	int fds[2], sync[2], i;
	struct kvm_vcpu *vcpu;
	struct event ev;
	char c = 0;
	pid_t pid;

	make_sockets(fds);
	make_sockets(sync);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
	if (!pid) {
		vcpu = make_vm(guest_count);
		hook_fd(vcpu->vm, fds[1]);
		allow_all(vcpu->vm);
		close(fds[0]);
		close(fds[1]);
		alarm(2 * TIMEOUT_MS / 1000);
		if (write(sync[1], &c, 1) == 1)
			__vcpu_run(vcpu);
		_exit(1);
	}

	close(fds[1]);
	close(sync[1]);
	TEST_ASSERT_EQ(read(sync[0], &c, 1), 1);
	tool_connected(fds[0]);
	if (jammed) {
		for (i = 0; i < MAX_JOBS; i++)
			send_get_registers(0, MAX_MSRS, MSR_EFER);
		wait_stuck();
	} else {
		assert_err(pause_vcpu(0, 0), 0);
		get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	}

	kill(pid, SIGKILL);
	wait_for_exit(pid);
	assert_closed();
	tool_close();
}

KVM_ONE_VCPU_TEST(kvmi, unhook_killed_waiting, guest_count)
{
	test_killed(false);
}

KVM_ONE_VCPU_TEST(kvmi, unhook_killed_sending, guest_count)
{
	test_killed(true);
}

#define STORM_ROUNDS 500

/*
 * Events, replies and cuts at any moment, and of each kind of thing that KVM
 * has to put away
 */
KVM_ONE_VCPU_TEST(kvmi, unhook_storm, guest_break)
{
	struct kvm_vcpu *vcpu1 = add_vcpu(vcpu, guest_break);
	struct kvm_vm *vm = vcpu->vm;
	struct runner r[2];
	struct event ev;
	u8 int3 = 0xcc, *mem;
	int i, j, delay;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 1, 0);
	mem = addr_gpa2hva(vm, EXTRA_GPA);
	install_bp_handler(vm);
	start(&r[0], vcpu);
	start(&r[1], vcpu1);
	for (i = 0; i < STORM_ROUNDS; i++) {
		hook(vm);
		assert_err(enable_bp(0), 0);
		assert_err(enable_bp(1), 0);
		assert_err(write_physical(EXTRA_GPA, 1, &int3), 0);
		assert_err(set_page_access(EXTRA_GPA, 0), 0);
		assert_err(control_msr(0, MSR_LSTAR, 1), 0);
		for (j = 0; j < i % 5; j++) {
			get_any_event(&ev);
			reply_continue(&ev);
		}
		if (i % 3 == 1)
			assert_err(pause_vcpu(i & 1, 1), 0);
		/* At any point of what follows */
		delay = random() % 300;
		for (j = 0; j < delay; j++)
			asm volatile("pause");
		if (i % 3 == 2)
			tool_close();
		unhook(vm);
		TEST_ASSERT_EQ(mem[0], 0);
	}
	assert_guest_runs(vm);
	guest_write(vm, stop, 1);
	join_done(&r[0]);
	join_done(&r[1]);
}

/* PREUNHOOK and its event */

KVM_ONE_VCPU_TEST(kvmi, preunhook_errors, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;

	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, EFAULT);

	hook(vm);
	/* Not asked for */
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, ENOENT);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 0), 0);
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, ENOENT);
	assert_quiet();

	/* Asked for, but the tool has gone */
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	tool_close();
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, ENOENT);
	unhook(vm);
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, EFAULT);
}

KVM_ONE_VCPU_TEST(kvmi, event_unhook, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	int i;

	hook(vm);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	for (i = 1; i <= 2; i++) {
		assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, 0);
		get_any_event(&ev);
		TEST_ASSERT_EQ(ev.hdr.id, KVMI_VM_EVENT);
		TEST_ASSERT_EQ(ev.ev.event, KVMI_VM_EVENT_UNHOOK);
		TEST_ASSERT_EQ(ev.hdr.seq, i);
	}
	/* The tool can still do whatever it has to */
	assert_err(get_version(), 0);
	unhook(vm);
}

/* What is allowed is only asked when the event is enabled */
KVM_ONE_VCPU_TEST(kvmi, event_unhook_disallowed_late, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;

	hook(vm);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	allow_event(vm, KVMI_VM_EVENT_UNHOOK, 0);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 0), -KVM_EPERM);
	assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, 0);
	get_any_event(&ev);
	TEST_ASSERT_EQ(ev.hdr.id, KVMI_VM_EVENT);
	unhook(vm);
}

/* Never waits for the tool; the event comes when the tool reads again */
KVM_ONE_VCPU_TEST(kvmi, preunhook_jammed, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	static struct msg msg;

	hook(vm);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	jam(vm);
	assert_at_once(assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, 0));
	do {
		TEST_ASSERT(receive_msg(&msg), "closed instead of the event");
	} while (msg.hdr.id != KVMI_VM_EVENT);
	unhook(vm);
}

/* As above, but nobody is about to send something else */
KVM_ONE_VCPU_TEST(kvmi, preunhook_full, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	static struct msg msg;
	struct runner r;
	int i;

	hook(vm);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), 0);
	for (i = 0; i < MAX_JOBS; i++)
		send_get_registers(0, MAX_MSRS, MSR_EFER);
	get_version();
	start(&r, vcpu);
	wait_stuck();
	interrupt(&r);
	assert_at_once(assert_ioctl(vm, KVM_INTROSPECTION_PREUNHOOK, NULL, 0));
	do {
		TEST_ASSERT(receive_msg(&msg), "closed instead of the event");
	} while (msg.hdr.id != KVMI_VM_EVENT);
	unhook(vm);
	start(&r, vcpu);
	stop_guest(&r);
}

/* COMMAND, EVENT */

static void test_allow_errors(struct kvm_vm *vm, unsigned long cmd, int max_id)
{
	int ret = ioctl(vm->fd, cmd, NULL);

	TEST_ASSERT(ret < 0 && errno == EFAULT, "%d, errno %d", ret, errno);
	assert_allow(vm, cmd, -2, 1, EINVAL);
	assert_allow(vm, cmd, max_id + 1, 1, EINVAL);
	assert_allow(vm, cmd, INT_MAX, 1, EINVAL);
	assert_allow(vm, cmd, INT_MIN, 1, EINVAL);
	assert_allow(vm, cmd, -1, 2, EINVAL);
	assert_allow(vm, cmd, 2, -1, EINVAL);
	/* Tested after the arguments */
	assert_allow(vm, cmd, -1, 1, EFAULT);
	assert_allow(vm, cmd, max_id, 0, EFAULT);

	hook_restricted(vm);
	assert_allow(vm, cmd, -2, 1, EINVAL);
	assert_allow(vm, cmd, max_id + 1, 1, EINVAL);
	assert_allow(vm, cmd, -1, 2, EINVAL);
	assert_allow(vm, cmd, max_id, 1, 0);
	assert_allow(vm, cmd, -1, 0, 0);
	/* Also without a tool */
	tool_close();
	usleep(QUIET_MS * 1000);
	assert_allow(vm, cmd, -1, 1, 0);
	unhook(vm);
	assert_allow(vm, cmd, -1, 1, EFAULT);
}

KVM_ONE_VCPU_TEST(kvmi, command_errors, guest_count)
{
	int i;

	test_allow_errors(vcpu->vm, KVM_INTROSPECTION_COMMAND,
			  KVMI_NEXT_VM_MESSAGE - 1);

	hook_restricted(vcpu->vm);
	for (i = 0; i < ARRAY_SIZE(free_commands); i++) {
		assert_allow(vcpu->vm, KVM_INTROSPECTION_COMMAND,
			     free_commands[i], 0, EPERM);
		assert_err(check_command(free_commands[i]), 0);
	}
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, event_errors, guest_count)
{
	test_allow_errors(vcpu->vm, KVM_INTROSPECTION_EVENT,
			  KVMI_NEXT_VCPU_EVENT - 1);
}

static void assert_allowed_commands(const u16 *ids, size_t nr, int err)
{
	int i;

	for (i = 0; i < nr; i++)
		assert_err(check_command(ids[i]), err);
}

static void assert_commands(int err)
{
	assert_allowed_commands(vm_commands, ARRAY_SIZE(vm_commands), err);
	assert_allowed_commands(vcpu_commands, ARRAY_SIZE(vcpu_commands), err);
	assert_allowed_commands(free_commands, ARRAY_SIZE(free_commands), 0);
}

/* By default the tool may only ask what it may do */
KVM_ONE_VCPU_TEST(kvmi, command_allow, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	int i;

	hook_restricted(vm);
	assert_commands(-KVM_EPERM);
	/* Refused whatever they contain */
	for (i = 0; i < ARRAY_SIZE(vm_commands); i++)
		assert_err(__command(vm_commands[i], NULL, 0, NULL, 0),
			   -KVM_EPERM);
	for (i = 0; i < ARRAY_SIZE(vcpu_commands); i++)
		assert_err(__command(vcpu_commands[i], NULL, 0, NULL, 0),
			   -KVM_EPERM);

	for (i = 0; i < ARRAY_SIZE(vm_commands); i++) {
		allow_command(vm, vm_commands[i], 1);
		assert_err(check_command(vm_commands[i]), 0);
		allow_command(vm, vm_commands[i], 0);
		assert_err(check_command(vm_commands[i]), -KVM_EPERM);
	}

	allow_command(vm, -1, 1);
	assert_commands(0);
	allow_command(vm, -1, 0);
	assert_commands(-KVM_EPERM);
	unhook(vm);
}

static void assert_events(int err)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(known_events); i++)
		assert_err(check_event(known_events[i]), err);
}

KVM_ONE_VCPU_TEST(kvmi, event_allow, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	int i;

	hook_restricted(vm);
	allow_command(vm, -1, 1);
	assert_events(-KVM_EPERM);
	for (i = 0; i < ARRAY_SIZE(known_events); i++) {
		allow_event(vm, known_events[i], 1);
		assert_err(check_event(known_events[i]), 0);
		allow_event(vm, known_events[i], 0);
		assert_err(check_event(known_events[i]), -KVM_EPERM);
	}
	allow_event(vm, -1, 1);
	assert_events(0);
	allow_event(vm, -1, 0);
	assert_events(-KVM_EPERM);
	unhook(vm);
}

/* Messages as such */

KVM_ONE_VCPU_TEST(kvmi, message_unknown, guest_count)
{
	const struct kvmi_error_code *ec;
	static struct msg msg;
	int i;

	hook_restricted(vcpu->vm);
	/* An event's id, sent the wrong way; get_reply() would keep it */
	send_msg(KVMI_VM_EVENT, NULL, 0);
	TEST_ASSERT(receive_msg(&msg), "closed");
	TEST_ASSERT_EQ(msg.hdr.id, KVMI_VM_EVENT);
	TEST_ASSERT_EQ(msg.hdr.seq, tool.seq);
	TEST_ASSERT_EQ(msg.hdr.size, sizeof(*ec));
	ec = (void *)msg.body;
	TEST_ASSERT_EQ(ec->err, -KVM_ENOSYS);

	for (i = 0; i < ARRAY_SIZE(unknown_commands); i++)
		assert_err(__command(unknown_commands[i], NULL, 0, NULL, 0),
			   -KVM_ENOSYS);
	allow_all(vcpu->vm);
	for (i = 0; i < ARRAY_SIZE(unknown_commands); i++)
		assert_err(__command(unknown_commands[i], NULL, 0, NULL, 0),
			   -KVM_ENOSYS);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, message_too_short, guest_count)
{
	static const u16 sized[] = {
		KVMI_VM_CHECK_COMMAND, KVMI_VM_CHECK_EVENT,
		KVMI_VM_CONTROL_EVENTS, KVMI_VM_READ_PHYSICAL,
		KVMI_VM_WRITE_PHYSICAL, KVMI_VM_PAUSE_VCPU,
		KVMI_VM_CONTROL_CLEANUP
	};
	static const u8 zeroes[16];
	struct runner r;
	int i;

	hook(vcpu->vm);
	start(&r, vcpu);
	for (i = 0; i < ARRAY_SIZE(sized); i++) {
		assert_err(__command(sized[i], NULL, 0, NULL, 0), -KVM_EINVAL);
		assert_err(__command(sized[i], zeroes, 7, NULL, 0),
			   -KVM_EINVAL);
	}
	/* Without, and with a part of, a vCPU header */
	for (i = 0; i < ARRAY_SIZE(vcpu_commands); i++) {
		assert_err(__command(vcpu_commands[i], NULL, 0, NULL, 0),
			   -KVM_EINVAL);
		assert_err(__command(vcpu_commands[i], zeroes, 7, NULL, 0),
			   -KVM_EINVAL);
		if (vcpu_commands[i] == KVMI_VCPU_GET_INFO ||
		    vcpu_commands[i] == KVMI_VCPU_GET_XSAVE)
			continue;
		assert_err(__command(vcpu_commands[i], zeroes, 8, NULL, 0),
			   -KVM_EINVAL);
		assert_err(__command(vcpu_commands[i], zeroes, 15, NULL, 0),
			   -KVM_EINVAL);
	}
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* Room for later versions */
KVM_ONE_VCPU_TEST(kvmi, message_longest, guest_count)
{
	static u8 body[KVMI_MAX_MSG_SIZE];
	struct kvmi_get_version_reply rpl;

	TEST_ASSERT_EQ(KVMI_MAX_MSG_SIZE, 8184);
	hook_restricted(vcpu->vm);
	memset(body, 0xff, sizeof(body));
	assert_err(__command(KVMI_GET_VERSION, body, sizeof(body), &rpl,
			     sizeof(rpl)), 0);
	assert_err(get_version(), 0);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, message_oversize_closes, guest_count)
{
	struct kvmi_msg_hdr hdr = {
		.id = KVMI_GET_VERSION,
		.size = KVMI_MAX_MSG_SIZE + 1,
	};

	hook(vcpu->vm);
	send_bytes(&hdr, sizeof(hdr));
	assert_closed();
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, message_in_pieces, guest_count)
{
	struct kvmi_vm_check_command req = { .id = KVMI_GET_VERSION };
	struct kvmi_msg_hdr hdr = {
		.id = KVMI_VM_CHECK_COMMAND,
		.size = sizeof(req),
		.seq = 0xfffffff0,
	};
	u8 bytes[sizeof(hdr) + sizeof(req)];
	int i;

	hook(vcpu->vm);
	memcpy(bytes, &hdr, sizeof(hdr));
	memcpy(bytes + sizeof(hdr), &req, sizeof(req));
	for (i = 0; i < sizeof(bytes); i++) {
		send_bytes(&bytes[i], 1);
		usleep(500);
	}
	assert_err(get_reply(hdr.id, hdr.seq, NULL, 0), 0);

	/* An end in the middle */
	send_bytes(bytes, sizeof(bytes) - 1);
	shutdown(tool.fd, SHUT_WR);
	assert_closed();
	unhook(vcpu->vm);
}

/* Three threads send at once, through a socket that takes little at a time */
KVM_ONE_VCPU_TEST(kvmi, message_not_torn, guest_count)
{
	struct kvm_vcpu *vcpu1 = add_vcpu(vcpu, guest_count);
	int i, n = 12, got[3] = {};
	struct kvm_vm *vm = vcpu->vm;
	static struct msg msg;
	struct runner r[2];
	size_t size;

	hook_sndbuf(vm, 1);
	allow_all(vm);
	for (i = 0; i < n; i++) {
		send_get_registers(0, MAX_MSRS, MSR_EFER);
		send_get_registers(1, MAX_MSRS, MSR_EFER);
	}
	for (i = 0; i < n; i++)
		send_read_page(vm);
	start(&r[0], vcpu);
	start(&r[1], vcpu1);

	for (i = 0; i < 3 * n; i++) {
		TEST_ASSERT(receive_msg(&msg), "closed");
		size = sizeof(struct kvmi_error_code);
		if (msg.hdr.id == KVMI_VM_READ_PHYSICAL) {
			size += PAGE_SIZE;
			TEST_ASSERT_EQ(msg.hdr.seq, 2 * n + ++got[2]);
		} else {
			TEST_ASSERT_EQ(msg.hdr.id, KVMI_VCPU_GET_REGISTERS);
			size += sizeof(struct kvmi_vcpu_get_registers_reply) +
				MAX_MSRS * sizeof(struct kvm_msr_entry);
			/* In order, for each of them */
			if (msg.hdr.seq & 1)
				TEST_ASSERT_EQ(msg.hdr.seq, 2 * got[0]++ + 1);
			else
				TEST_ASSERT_EQ(msg.hdr.seq, 2 * ++got[1]);
		}
		TEST_ASSERT_EQ(msg.hdr.size, size);
	}
	assert_quiet();

	guest_write(vm, stop, 1);
	join_done(&r[0]);
	join_done(&r[1]);
	unhook(vm);
}

/* GET_VERSION, CHECK_COMMAND, CHECK_EVENT, GET_INFO */

KVM_ONE_VCPU_TEST(kvmi, get_version, guest_count)
{
	struct kvmi_get_version_reply rpl;
	u8 zeroes[sizeof(rpl.features.padding)] = {};

	hook_restricted(vcpu->vm);
	assert_err(__command(KVMI_GET_VERSION, NULL, 0, &rpl, sizeof(rpl)), 0);
	TEST_ASSERT_EQ(rpl.version, KVMI_VERSION);
	TEST_ASSERT_EQ(rpl.max_msg_size, KVMI_MAX_MSG_SIZE);
	TEST_ASSERT(rpl.features.singlestep <= 1, "singlestep is %u",
		    rpl.features.singlestep);
	TEST_ASSERT(!memcmp(rpl.features.padding, zeroes, sizeof(zeroes)),
		    "the features' padding isn't zero");
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_check_command, guest_count)
{
	struct kvmi_vm_check_command req = { .id = KVMI_GET_VERSION };
	int i;

	hook_restricted(vcpu->vm);
	assert_err(command(KVMI_VM_CHECK_COMMAND, &req), 0);
	req.padding1 = 1;
	assert_err(command(KVMI_VM_CHECK_COMMAND, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(command(KVMI_VM_CHECK_COMMAND, &req), -KVM_EINVAL);

	allow_all(vcpu->vm);
	for (i = 0; i < ARRAY_SIZE(unknown_commands); i++)
		assert_err(check_command(unknown_commands[i]), -KVM_ENOENT);
	/* The events' own ids are not commands */
	assert_err(check_command(KVMI_VM_EVENT), -KVM_ENOENT);
	assert_err(check_command(KVMI_VCPU_EVENT), -KVM_ENOENT);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_check_event, guest_count)
{
	static const u16 unknown[] = { 2, 4, 6, KVMI_NEXT_VCPU_EVENT + 41,
				       0xfffe, 0xffff };
	struct kvmi_vm_check_event req = { .id = KVMI_VCPU_EVENT_PAUSE };
	int i;

	hook(vcpu->vm);
	assert_err(command(KVMI_VM_CHECK_EVENT, &req), 0);
	req.padding1 = 1;
	assert_err(command(KVMI_VM_CHECK_EVENT, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(command(KVMI_VM_CHECK_EVENT, &req), -KVM_EINVAL);
	for (i = 0; i < ARRAY_SIZE(unknown); i++)
		assert_err(check_event(unknown[i]), -KVM_ENOENT);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_get_info, guest_count)
{
	struct kvmi_vm_get_info_reply rpl;

	hook(vcpu->vm);
	memset(&rpl, 0xff, sizeof(rpl));
	assert_err(__command(KVMI_VM_GET_INFO, NULL, 0, &rpl, sizeof(rpl)), 0);
	TEST_ASSERT_EQ(rpl.vcpu_count, 1);
	TEST_ASSERT(!rpl.padding[0] && !rpl.padding[1] && !rpl.padding[2],
		    "the padding isn't zero");
	add_vcpu(vcpu, guest_count);
	assert_err(__command(KVMI_VM_GET_INFO, NULL, 0, &rpl, sizeof(rpl)), 0);
	TEST_ASSERT_EQ(rpl.vcpu_count, 2);
	unhook(vcpu->vm);
}

/* VM_CONTROL_EVENTS; what it does is in event_unhook and preunhook_errors */

KVM_ONE_VCPU_TEST(kvmi, vm_control_events_errors, guest_count)
{
	struct kvmi_vm_control_events req = { .enable = 1 };

	hook(vcpu->vm);
	req.padding1 = 1;
	assert_err(command(KVMI_VM_CONTROL_EVENTS, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(command(KVMI_VM_CONTROL_EVENTS, &req), -KVM_EINVAL);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 2), -KVM_EINVAL);
	assert_err(vm_control_event(2, 1), -KVM_EINVAL);
	assert_err(vm_control_event(KVMI_VCPU_EVENT_PAUSE, 1), -KVM_EINVAL);
	assert_err(vm_control_event(0xffff, 1), -KVM_EINVAL);

	allow_event(vcpu->vm, KVMI_VM_EVENT_UNHOOK, 0);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 1), -KVM_EPERM);
	assert_err(vm_control_event(KVMI_VM_EVENT_UNHOOK, 2), -KVM_EINVAL);
	assert_ioctl(vcpu->vm, KVM_INTROSPECTION_PREUNHOOK, NULL, ENOENT);
	unhook(vcpu->vm);
}

/* VM_READ_PHYSICAL, VM_WRITE_PHYSICAL */

static u8 *add_extra_memory(struct kvm_vm *vm, u32 flags)
{
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 1, flags);
	return addr_gpa2hva(vm, EXTRA_GPA);
}

static void fill(u8 *buf)
{
	int i;

	for (i = 0; i < PAGE_SIZE; i++)
		buf[i] = i * 7 + 1;
}

KVM_ONE_VCPU_TEST(kvmi, vm_read_physical, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	u8 *mem = add_extra_memory(vm, 0);
	u8 buf[PAGE_SIZE];

	hook(vm);
	/* Not touched yet */
	assert_err(read_physical(EXTRA_GPA, 1, buf), 0);
	TEST_ASSERT_EQ(buf[0], 0);
	fill(mem);
	assert_err(read_physical(EXTRA_GPA, PAGE_SIZE, buf), 0);
	TEST_ASSERT(!memcmp(mem, buf, PAGE_SIZE), "the page differs");
	assert_err(read_physical(EXTRA_GPA + PAGE_SIZE - 3, 3, buf), 0);
	TEST_ASSERT(!memcmp(mem + PAGE_SIZE - 3, buf, 3), "its end differs");
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_read_physical_errors, guest_count)
{
	struct kvmi_vm_read_physical req = { .gpa = EXTRA_GPA, .size = 1 };
	struct kvm_vm *vm = vcpu->vm;
	u8 buf[PAGE_SIZE];

	add_extra_memory(vm, 0);
	hook(vm);
	req.padding1 = 1;
	assert_err(command(KVMI_VM_READ_PHYSICAL, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(command(KVMI_VM_READ_PHYSICAL, &req), -KVM_EINVAL);
	assert_err(read_physical(EXTRA_GPA, 0, buf), -KVM_EINVAL);
	assert_err(read_physical(EXTRA_GPA + 1, PAGE_SIZE, buf), -KVM_EINVAL);
	assert_err(read_physical(EXTRA_GPA + PAGE_SIZE - 1, 2, buf),
		   -KVM_EINVAL);
	assert_err(read_physical(EXTRA_GPA, 0xffff, buf), -KVM_EINVAL);
	assert_err(read_physical(EXTRA_GPA + PAGE_SIZE, 1, buf), -KVM_ENOENT);
	assert_err(read_physical(UNMAPPED_GPA, 1, buf), -KVM_ENOENT);
	assert_err(read_physical(-1ull, 1, buf), -KVM_ENOENT);
	assert_err(get_version(), 0);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_write_physical, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	u8 *mem = add_extra_memory(vm, 0);
	u8 buf[PAGE_SIZE];

	hook(vm);
	fill(buf);
	assert_err(write_physical(EXTRA_GPA, PAGE_SIZE, buf), 0);
	TEST_ASSERT(!memcmp(mem, buf, PAGE_SIZE), "the page differs");
	buf[0] = 0xcc;
	assert_err(write_physical(EXTRA_GPA + PAGE_SIZE - 1, 1, buf), 0);
	TEST_ASSERT_EQ(mem[PAGE_SIZE - 1], 0xcc);
	TEST_ASSERT_EQ(mem[PAGE_SIZE - 2], buf[PAGE_SIZE - 2]);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_write_physical_errors, guest_count)
{
	struct {
		struct kvmi_vm_write_physical req;
		u8 data[2];
	} req = { .req = { .gpa = EXTRA_GPA, .size = 2 }, .data = { 1, 2 } };
	struct kvm_vm *vm = vcpu->vm;
	u8 *mem = add_extra_memory(vm, 0);
	u8 buf[PAGE_SIZE];

	hook(vm);
	req.req.flags = 4;
	assert_err(command(KVMI_VM_WRITE_PHYSICAL, &req), -KVM_EINVAL);
	req.req.flags = 0;
	req.req.padding2 = 1;
	assert_err(command(KVMI_VM_WRITE_PHYSICAL, &req), -KVM_EINVAL);

	fill(buf);
	assert_err(write_physical(EXTRA_GPA, 0, buf), -KVM_EINVAL);
	assert_err(write_physical(EXTRA_GPA + 1, PAGE_SIZE, buf), -KVM_EINVAL);
	assert_err(write_physical(EXTRA_GPA + PAGE_SIZE - 1, 2, buf),
		   -KVM_EINVAL);
	assert_err(write_physical(EXTRA_GPA + PAGE_SIZE, 1, buf), -KVM_ENOENT);
	assert_err(write_physical(UNMAPPED_GPA, 1, buf), -KVM_ENOENT);
	assert_err(write_physical(-1ull, 1, buf), -KVM_ENOENT);

	/* Less data than it says */
	req.req.padding2 = 0;
	assert_err(__command(KVMI_VM_WRITE_PHYSICAL, &req,
			     sizeof(req.req) + 1, NULL, 0), -KVM_EINVAL);
	TEST_ASSERT(!mem[0] && !mem[1] && !mem[PAGE_SIZE - 1],
		    "an error, and yet something has been written");
	unhook(vm);
}

/* What the guest may read the tool may read, and not more than that */
KVM_ONE_VCPU_TEST(kvmi, vm_write_physical_read_only, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	u8 *mem = add_extra_memory(vm, KVM_MEM_READONLY);
	u8 byte;

	*mem = 0x5a;
	hook(vm);
	assert_err(read_physical(EXTRA_GPA, 1, &byte), 0);
	TEST_ASSERT_EQ(byte, 0x5a);
	assert_err(write_physical(EXTRA_GPA, 1, "x"), -KVM_ENOENT);
	TEST_ASSERT_EQ(*mem, 0x5a);
	unhook(vm);
}

/* Or a migration would lose it */
KVM_ONE_VCPU_TEST(kvmi, vm_write_physical_dirty_log, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 log = 0;

	add_extra_memory(vm, KVM_MEM_LOG_DIRTY_PAGES);
	hook(vm);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &log);
	TEST_ASSERT_EQ(log, 0);
	assert_err(write_physical(EXTRA_GPA, 1, "x"), 0);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &log);
	TEST_ASSERT_EQ(log, 1);
	unhook(vm);
}

/* The ring of no vCPU would do */
TEST_F(kvmi, vm_write_physical_dirty_ring)
{
	u64 gpa = EXTRA_GPA + 16 * PAGE_SIZE;
	struct kvm_vm *vm;

	if (!kvm_has_cap(KVM_CAP_DIRTY_LOG_RING))
		SKIP(return, "no dirty ring");
	vm = vm_create_barebones();
	vm_enable_dirty_ring(vm, 1 << 16);
	add_extra_memory(vm, KVM_MEM_LOG_DIRTY_PAGES);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, gpa,
				    EXTRA_SLOT + 1, 1, 0);
	hook(vm);
	assert_err(write_physical(EXTRA_GPA, 1, "x"), -KVM_EOPNOTSUPP);
	assert_err(write_physical(gpa, 1, "x"), 0);
	vm_mem_region_set_flags(vm, EXTRA_SLOT, 0);
	assert_err(write_physical(EXTRA_GPA, 1, "x"), 0);
	unhook(vm);
	kvm_vm_free(vm);
}

/* VM_PAUSE_VCPU and its event */

KVM_ONE_VCPU_TEST(kvmi, vm_pause_vcpu_errors, guest_count)
{
	struct kvmi_vm_pause_vcpu req = {};
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	req.padding1 = 1;
	assert_err(command(KVMI_VM_PAUSE_VCPU, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(command(KVMI_VM_PAUSE_VCPU, &req), -KVM_EINVAL);
	assert_err(pause_vcpu(0, 2), -KVM_EINVAL);
	assert_err(pause_vcpu(1, 0), -KVM_EINVAL);
	assert_err(pause_vcpu(0xffff, 1), -KVM_EINVAL);

	allow_event(vcpu->vm, KVMI_VCPU_EVENT_PAUSE, 0);
	assert_err(pause_vcpu(0, 0), -KVM_EPERM);
	assert_err(pause_vcpu(1, 0), -KVM_EPERM);
	assert_err(pause_vcpu(0, 2), -KVM_EINVAL);
	assert_quiet();
	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, event_pause, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	static struct registers_reply regs;
	struct event ev;
	struct runner r;

	start_to_pause(&r, vcpu, &ev);
	TEST_ASSERT_EQ(ev.hdr.seq, 1);
	assert_guest_stands(vm);

	/* The state of the vCPU, the same both ways */
	TEST_ASSERT_EQ(ev.common.arch.mode, 8);
	assert_err(get_registers(0, 1, MSR_STAR, &regs), 0);
	TEST_ASSERT_EQ(regs.rpl.mode, 8);
	TEST_ASSERT(!memcmp(&ev.common.arch.regs, &regs.rpl.regs,
			    sizeof(regs.rpl.regs)), "the registers differ");
	TEST_ASSERT(!memcmp(&ev.common.arch.sregs, &regs.rpl.sregs,
			    sizeof(regs.rpl.sregs)), "the sregs differ");
	TEST_ASSERT_EQ(ev.common.arch.msrs.efer, regs.rpl.sregs.efer);
	TEST_ASSERT_EQ(ev.common.arch.msrs.star, regs.entries[0].data);

	reply_continue(&ev);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* One event for each, whatever the vCPU does meanwhile */
KVM_ONE_VCPU_TEST(kvmi, event_pause_each, guest_count)
{
	struct event ev;
	struct runner r;
	int i;

	start_to_pause(&r, vcpu, &ev);
	for (i = 0; i < 3; i++)
		assert_err(pause_vcpu(0, i & 1), 0);
	assert_quiet();
	for (i = 0; i < 3; i++) {
		reply_continue(&ev);
		get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
		TEST_ASSERT_EQ(ev.hdr.seq, i + 2);
		assert_guest_stands(vcpu->vm);
	}
	reply_continue(&ev);
	assert_guest_runs(vcpu->vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_pause_vcpu_wait, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	hook(vm);
	start(&r, vcpu);
	for (i = 0; i < 30; i++) {
		assert_guest_runs(vm);
		assert_err(pause_vcpu(0, 1), 0);
		assert_guest_stands(vm);
		get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
		assert_guest_stands(vm);
		reply_continue(&ev);
	}
	stop_guest(&r);
	unhook(vm);
}

/* The reply at once, the event when the vCPU is run */
KVM_ONE_VCPU_TEST(kvmi, vm_pause_vcpu_stopped, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	hook(vm);
	assert_at_once(assert_err(pause_vcpu(0, 1), 0));
	assert_at_once(assert_err(pause_vcpu(0, 0), 0));
	assert_quiet();
	start(&r, vcpu);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT_EQ(guest_read(vm, counter), 0);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT_EQ(guest_read(vm, counter), 0);
	reply_continue(&ev);
	stop_guest(&r);
	unhook(vm);
}

/* Sends them ahead: a thousand round trips would take their time */
static void fill_pauses(unsigned int nr)
{
	struct kvmi_vm_pause_vcpu req = {};
	unsigned int i, j, n;
	u32 seqs[50];

	for (i = 0; i < nr; i += n) {
		n = nr - i < ARRAY_SIZE(seqs) ? nr - i : ARRAY_SIZE(seqs);
		for (j = 0; j < n; j++)
			seqs[j] = send_msg(KVMI_VM_PAUSE_VCPU, &req,
					   sizeof(req));
		for (j = 0; j < n; j++)
			assert_err(get_reply(KVMI_VM_PAUSE_VCPU, seqs[j], NULL,
					     0), 0);
	}
	assert_err(pause_vcpu(0, 0), -KVM_EBUSY);
	assert_err(pause_vcpu(0, 1), -KVM_EBUSY);
}

KVM_ONE_VCPU_TEST(kvmi, vm_pause_vcpu_cap, guest_count)
{
	const unsigned int some = 20;
	struct event ev;
	struct runner r;
	int i;

	hook(vcpu->vm);
	fill_pauses(MAX_PAUSES);
	start(&r, vcpu);
	for (i = 0; i < some; i++) {
		get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
		if (i < some - 1)
			reply_continue(&ev);
	}
	/* The one that is open doesn't count */
	fill_pauses(some);
	unhook(vcpu->vm);

	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
}

static void start_to_halt(struct runner *r, struct kvm_vcpu *vcpu)
{
	vm_install_exception_handler(vcpu->vm, IRQ_VECTOR, guest_on_irq);
	hook(vcpu->vm);
	start(r, vcpu);
	wait_for(guest_read(vcpu->vm, counter));
	usleep(QUIET_MS * 1000);
}

static void assert_halted(struct kvm_vm *vm)
{
	usleep(2000);
	TEST_ASSERT(guest_read(vm, counter) == 1 && !guest_read(vm, traps),
		    "HLT has ended, without an interrupt");
}

static void send_irq(struct kvm_vm *vm)
{
	struct kvm_msi msi = {
		.address_lo = APIC_DEFAULT_GPA,
		.data = IRQ_VECTOR,
	};
	int ret = __vm_ioctl(vm, KVM_SIGNAL_MSI, &msi);

	TEST_ASSERT(ret == 1, KVM_IOCTL_ERROR(KVM_SIGNAL_MSI, ret));
}

KVM_ONE_VCPU_TEST(kvmi, vm_pause_vcpu_halted, guest_halt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	start_to_halt(&r, vcpu);
	for (i = 0; i < 3; i++) {
		assert_err(pause_vcpu(0, i & 1), 0);
		get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
		assert_halted(vm);
		reply_continue(&ev);
		assert_halted(vm);
	}
	send_irq(vm);
	join_done(&r);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	unhook(vm);
}

/* The interrupt comes during the pause, and is not lost */
KVM_ONE_VCPU_TEST(kvmi, vm_pause_vcpu_halted_irq, guest_halt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_halt(&r, vcpu);
	assert_err(pause_vcpu(0, 1), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	send_irq(vm);
	assert_halted(vm);
	reply_continue(&ev);
	join_done(&r);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	unhook(vm);
}

/* Commands, the end of the session and a signal don't wake the guest either */
KVM_ONE_VCPU_TEST(kvmi, vcpu_command_halted, guest_halt)
{
	static struct registers_reply before, after;
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	start_to_halt(&r, vcpu);
	assert_err(get_registers(0, 0, 0, &before), 0);
	for (i = 0; i < 5; i++)
		assert_err(vcpu_get_info(0), 0);
	assert_err(get_registers(0, 0, 0, &after), 0);
	TEST_ASSERT_EQ(before.rpl.regs.rip, after.rpl.regs.rip);
	assert_halted(vm);

	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	interrupt(&r);
	start(&r, vcpu);
	assert_halted(vm);
	unhook(vm);
	assert_halted(vm);
	send_irq(vm);
	join_done(&r);
}

/* CONTROL_CLEANUP; the number of exits shows whether #BP is intercepted */

static u64 get_exits(int fd)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *descs, *desc;
	u64 exits = 0;
	int i;

	read_stats_header(fd, &header);
	descs = read_stats_descriptors(fd, &header);
	for (i = 0; i < header.num_desc; i++) {
		desc = get_stats_descriptor(descs, i, &header);
		if (!strcmp(desc->name, "exits"))
			read_stat_data(fd, &header, desc, &exits, 1);
	}
	free(descs);
	TEST_ASSERT(exits, "no exits, or no statistics");
	return exits;
}

static void test_cleanup(struct kvm_vcpu *vcpu, bool cleanup)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 exits, bps;
	struct event ev;
	struct runner r;
	int stats;

	/* Not while the vCPU runs */
	stats = vcpu_get_stats_fd(vcpu);

	install_bp_handler(vm);
	hook(vm);
	start(&r, vcpu);
	if (!cleanup)
		assert_err(control_cleanup(0), 0);
	assert_err(enable_bp(0), 0);
	unhook(vm);

	/* In any case, the guest has its INT3s for itself */
	assert_guest_runs(vm);
	bps = guest_read(vm, traps);
	exits = get_exits(stats);
	wait_for(guest_read(vm, traps) >= bps + 1000);
	exits = get_exits(stats) - exits;
	bps = guest_read(vm, traps) - bps;
	close(stats);
	if (cleanup)
		TEST_ASSERT(exits < bps / 2, "%lu #BPs with %lu exits", bps,
			    exits);
	else
		TEST_ASSERT(exits > bps / 2, "%lu #BPs with %lu exits", bps,
			    exits);

	/* The next session takes over what the last one left */
	hook(vm);
	assert_err(enable_bp(0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0), 0);
	reply_continue(&ev);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_control_cleanup_default, guest_break)
{
	test_cleanup(vcpu, true);
}

KVM_ONE_VCPU_TEST(kvmi, vm_control_cleanup_off, guest_break)
{
	test_cleanup(vcpu, false);
}

/* It is for the session that says so, not for what the last one has left */
KVM_ONE_VCPU_TEST(kvmi, vm_control_cleanup_of_last, guest_break)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	u64 exits, bps;
	int stats;

	stats = vcpu_get_stats_fd(vcpu);
	install_bp_handler(vm);
	hook(vm);
	start(&r, vcpu);
	assert_err(enable_bp(0), 0);
	interrupt(&r);
	unhook(vm);

	hook(vm);
	assert_err(control_cleanup(0), 0);
	start(&r, vcpu);
	assert_guest_runs(vm);
	bps = guest_read(vm, traps);
	exits = get_exits(stats);
	wait_for(guest_read(vm, traps) >= bps + 1000);
	exits = get_exits(stats) - exits;
	bps = guest_read(vm, traps) - bps;
	TEST_ASSERT(exits < bps / 2, "%lu #BPs with %lu exits", bps, exits);
	close(stats);
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vm_control_cleanup_errors, guest_count)
{
	struct kvmi_vm_control_cleanup req = {};
	int i;

	hook(vcpu->vm);
	for (i = 0; i < sizeof(req.padding); i++) {
		req.padding[i] = 1;
		assert_err(command(KVMI_VM_CONTROL_CLEANUP, &req),
			   -KVM_EINVAL);
		req.padding[i] = 0;
	}
	assert_err(control_cleanup(2), -KVM_EINVAL);
	assert_err(control_cleanup(1), 0);
	assert_err(control_cleanup(0), 0);
	unhook(vcpu->vm);
}

/* vCPU commands */

KVM_ONE_VCPU_TEST(kvmi, vcpu_command_errors, guest_count)
{
	struct kvmi_vcpu_hdr hdr = {};
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	hdr.padding1 = 1;
	assert_err(command(KVMI_VCPU_GET_INFO, &hdr), -KVM_EINVAL);
	hdr.padding1 = 0;
	hdr.padding2 = 1;
	assert_err(command(KVMI_VCPU_GET_INFO, &hdr), -KVM_EINVAL);
	assert_err(vcpu_get_info(1), -KVM_EINVAL);
	assert_err(vcpu_get_info(0xffff), -KVM_EINVAL);
	assert_err(vcpu_get_info(0), 0);
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* Served when the vCPU is run, in order, and before a pause */
KVM_ONE_VCPU_TEST(kvmi, vcpu_command_stopped, guest_count)
{
	struct kvmi_vcpu_get_info_reply info;
	static struct registers_reply regs;
	struct event ev;
	struct runner r;
	u32 seq[2];

	hook(vcpu->vm);
	assert_err(pause_vcpu(0, 0), 0);
	seq[0] = send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, NULL, 0);
	seq[1] = send_get_registers(0, 0, 0);
	/* VM commands need no vCPU */
	assert_err(get_version(), 0);
	assert_quiet();

	start(&r, vcpu);
	assert_err(get_reply(KVMI_VCPU_GET_INFO, seq[0], &info, sizeof(info)),
		   0);
	assert_err(get_reply(KVMI_VCPU_GET_REGISTERS, seq[1], &regs,
			     sizeof(regs.rpl)), 0);
	TEST_ASSERT_EQ(tool.nr_events, 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	assert_err(vcpu_get_info(0), 0);
	reply_continue(&ev);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_command_cap, guest_count)
{
	struct kvmi_vcpu_get_info_reply info;
	struct runner r;
	u32 first;
	int i;

	hook(vcpu->vm);
	first = send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, NULL, 0);
	for (i = 1; i < MAX_JOBS; i++)
		send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, NULL, 0);
	assert_err(vcpu_get_info(0), -KVM_EBUSY);
	assert_err(vcpu_get_info(0), -KVM_EBUSY);
	start(&r, vcpu);
	for (i = 0; i < MAX_JOBS; i++)
		assert_err(get_reply(KVMI_VCPU_GET_INFO, first + i, &info,
				     sizeof(info)), 0);
	assert_err(vcpu_get_info(0), 0);
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* With the queue full, the event can still be answered */
KVM_ONE_VCPU_TEST(kvmi, vcpu_command_cap_reply, guest_count)
{
	struct kvmi_vcpu_get_info_reply info;
	struct event ev;
	struct runner r;
	u32 first;
	int i;

	start_to_pause(&r, vcpu, &ev);
	interrupt(&r);
	first = send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, NULL, 0);
	for (i = 1; i < MAX_JOBS; i++)
		send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, NULL, 0);
	assert_err(vcpu_get_info(0), -KVM_EBUSY);
	reply_continue(&ev);
	assert_err(get_version(), 0);
	start(&r, vcpu);
	for (i = 0; i < MAX_JOBS; i++)
		assert_err(get_reply(KVMI_VCPU_GET_INFO, first + i, &info,
				     sizeof(info)), 0);
	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* An AP that waits for INIT and SIPI has nothing to show, but can be paused */
KVM_ONE_VCPU_TEST(kvmi, vcpu_command_not_started, guest_count)
{
	struct kvm_mp_state mp_state = { KVM_MP_STATE_UNINITIALIZED };
	struct kvm_vcpu *ap = add_vcpu(vcpu, guest_count);
	struct event ev;
	struct runner r;

	vcpu_mp_state_set(ap, &mp_state);
	hook(vcpu->vm);
	assert_err(vcpu_get_info(1), -KVM_EAGAIN);
	assert_err(enable_bp(1), -KVM_EAGAIN);
	assert_err(pause_vcpu(1, 1), 0);
	assert_quiet();

	/* The vCPU doesn't run now, so there's nothing to wait for */
	start(&r, ap);
	usleep(QUIET_MS * 1000);
	assert_err(pause_vcpu(1, 1), 0);
	assert_quiet();
	WRITE_ONCE(ap->run->immediate_exit, 1);
	pthread_kill(r.thread, SIGUSR1);
	join(&r);
	TEST_ASSERT(r.err == EINTR || r.err == EAGAIN, "KVM_RUN: %d (%s)",
		    r.err, strerror(r.err));

	mp_state.mp_state = KVM_MP_STATE_RUNNABLE;
	vcpu_mp_state_set(ap, &mp_state);
	start(&r, ap);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 1);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, counter), 0);
	assert_err(vcpu_get_info(1), 0);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 1);
	reply_continue(&ev);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_created_late, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_vcpu *late;
	struct event ev;
	struct runner r;

	install_bp_handler(vm);
	hook(vm);
	assert_err(pause_vcpu(1, 0), -KVM_EINVAL);
	late = add_vcpu(vcpu, guest_break);
	assert_err(pause_vcpu(1, 0), 0);
	start(&r, late);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 1);
	assert_err(enable_bp(1), 0);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 1);
	unhook(vm);
	assert_guest_runs(vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_info, guest_count)
{
	struct kvmi_vcpu_get_info_reply rpl;
	struct runner r;
	u64 speed = 0;

	if (kvm_has_cap(KVM_CAP_TSC_CONTROL))
		speed = 1000ull * __vcpu_ioctl(vcpu, KVM_GET_TSC_KHZ, NULL);

	hook(vcpu->vm);
	start(&r, vcpu);
	assert_err(__vcpu_command(KVMI_VCPU_GET_INFO, 0, NULL, 0, &rpl,
				  sizeof(rpl)), 0);
	TEST_ASSERT_EQ(rpl.tsc_speed, speed);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_control_events, guest_break)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	install_bp_handler(vm);
	hook(vm);
	start(&r, vcpu);
	assert_guest_runs(vm);
	assert_quiet();
	for (i = 0; i < 3; i++) {
		/* Twice is as good as once */
		assert_err(enable_bp(0), 0);
		assert_err(enable_bp(0), 0);
		get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
		assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0), 0);
		assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0), 0);
		reply_continue(&ev);
		assert_guest_runs(vm);
		assert_quiet();
	}
	/* Allowed, but not for CONTROL_EVENTS to decide */
	assert_err(control_event(0, KVMI_VCPU_EVENT_PAUSE, 1), 0);
	assert_err(control_event(0, KVMI_VCPU_EVENT_PAUSE, 0), 0);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	reply_continue(&ev);
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_control_events_errors, guest_count)
{
	struct kvmi_vcpu_control_events req = {
		.event_id = KVMI_VCPU_EVENT_BREAKPOINT,
		.enable = 1,
	};
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	req.padding1 = 1;
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_EVENTS, 0, &req),
		   -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_EVENTS, 0, &req),
		   -KVM_EINVAL);
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 2),
		   -KVM_EINVAL);
	assert_err(control_event(0, KVMI_VM_EVENT_UNHOOK, 1), -KVM_EINVAL);
	assert_err(control_event(0, 2, 1), -KVM_EINVAL);
	assert_err(control_event(0, KVMI_NEXT_VCPU_EVENT + 41, 1),
		   -KVM_EINVAL);
	assert_err(control_event(0, 0xffff, 1), -KVM_EINVAL);

	allow_event(vm, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	assert_err(enable_bp(0), -KVM_EPERM);
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0),
		   -KVM_EPERM);
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 2),
		   -KVM_EINVAL);
	stop_guest(&r);
	unhook(vm);
}

/* Disallowed when it is on: it stays on, and can't be switched off */
KVM_ONE_VCPU_TEST(kvmi, vcpu_control_events_disallowed_late, guest_break)
{
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	allow_event(vcpu->vm, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0),
		   -KVM_EPERM);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	unhook(vcpu->vm);
	stop_guest(&r);
}

/* On one vCPU, not on the other */
KVM_ONE_VCPU_TEST(kvmi, vcpu_control_events_per_vcpu, guest_break)
{
	struct kvm_vcpu *vcpu1 = add_vcpu(vcpu, guest_break);
	struct kvm_vm *vm = vcpu->vm;
	struct runner r[2];
	struct event ev;

	install_bp_handler(vm);
	hook(vm);
	start(&r[0], vcpu);
	start(&r[1], vcpu1);
	assert_err(enable_bp(1), 0);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 1);
	assert_guest_runs(vm);
	assert_quiet();
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 1);
	unhook(vm);
	guest_write(vm, stop, 1);
	join_done(&r[0]);
	join_done(&r[1]);
}

/* Guest debugging: #BP is either the tool's or userspace's */

static int set_sw_bp(struct kvm_vcpu *vcpu, bool enable)
{
	struct kvm_guest_debug debug = {};

	if (enable)
		debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
	return __vcpu_ioctl(vcpu, KVM_SET_GUEST_DEBUG, &debug) ? errno : 0;
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_control_events_guest_debug, guest_count)
{
	struct kvm_guest_debug step = {
		.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP,
	};
	struct runner r;

	hook(vcpu->vm);
	assert_err(set_sw_bp(vcpu, true), 0);
	start(&r, vcpu);
	assert_err(enable_bp(0), -KVM_EBUSY);
	interrupt(&r);
	assert_err(set_sw_bp(vcpu, false), 0);
	start(&r, vcpu);
	assert_err(enable_bp(0), 0);
	interrupt(&r);
	assert_err(set_sw_bp(vcpu, true), EBUSY);
	/* Other kinds of debugging are nobody's loss */
	vcpu_guest_debug_set(vcpu, &step);
	assert_err(set_sw_bp(vcpu, false), 0);
	start(&r, vcpu);
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0), 0);
	interrupt(&r);
	assert_err(set_sw_bp(vcpu, true), 0);
	unhook(vcpu->vm);
}

/* A VM that is stopped, unhooked and then debugged */
KVM_ONE_VCPU_TEST(kvmi, unhook_stopped_guest_debug, guest_count)
{
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	assert_err(enable_bp(0), 0);
	interrupt(&r);
	unhook(vcpu->vm);
	assert_err(set_sw_bp(vcpu, true), 0);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_registers, guest_wait_rbx)
{
	static struct registers_reply rpl;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start_to_rbx(&r, vcpu, &ev);
	assert_err(get_registers(0, 0, 0, &rpl), 0);
	TEST_ASSERT_EQ(rpl.rpl.mode, 8);
	TEST_ASSERT_EQ(rpl.rpl.padding, 0);
	TEST_ASSERT_EQ(rpl.rpl.msrs.nmsrs, 0);
	TEST_ASSERT_EQ(rpl.rpl.msrs.pad, 0);

	/* The same that userspace gets */
	interrupt(&r);
	vcpu_regs_get(vcpu, &regs);
	vcpu_sregs_get(vcpu, &sregs);
	TEST_ASSERT(!memcmp(&regs, &rpl.rpl.regs, sizeof(regs)),
		    "the registers differ");
	TEST_ASSERT(!memcmp(&sregs, &rpl.rpl.sregs, sizeof(sregs)),
		    "the sregs differ");
	regs.rbx = 1;
	vcpu_regs_set(vcpu, &regs);
	start(&r, vcpu);
	reply_continue(&ev);
	join_done(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_registers_msrs, guest_count)
{
	static struct registers_reply rpl;
	struct runner r;
	int i;

	/* The reply's size, 8168 bytes, and not one MSR more */
	kvm_static_assert(sizeof(struct kvmi_error_code) +
			  sizeof(rpl.rpl) + MAX_MSRS * 16 <= KVMI_MAX_MSG_SIZE);
	kvm_static_assert(sizeof(struct kvmi_error_code) + sizeof(rpl.rpl) +
			  (MAX_MSRS + 1) * 16 > KVMI_MAX_MSG_SIZE);

	hook(vcpu->vm);
	start(&r, vcpu);
	assert_err(get_registers(0, MAX_MSRS, MSR_EFER, &rpl), 0);
	TEST_ASSERT_EQ(rpl.rpl.msrs.nmsrs, MAX_MSRS);
	TEST_ASSERT_EQ(rpl.rpl.msrs.pad, 0);
	for (i = 0; i < MAX_MSRS; i++) {
		TEST_ASSERT_EQ(rpl.entries[i].index, MSR_EFER);
		TEST_ASSERT_EQ(rpl.entries[i].reserved, 0);
		TEST_ASSERT_EQ(rpl.entries[i].data, rpl.rpl.sregs.efer);
	}
	assert_err(get_registers(0, MAX_MSRS + 1, MSR_EFER, &rpl),
		   -KVM_EINVAL);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_registers_errors, guest_count)
{
	static struct registers_reply rpl;
	struct kvmi_vcpu_get_registers req = {};
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	req.padding1 = 1;
	assert_err(vcpu_command(KVMI_VCPU_GET_REGISTERS, 0, &req),
		   -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(vcpu_command(KVMI_VCPU_GET_REGISTERS, 0, &req),
		   -KVM_EINVAL);
	/* A list that is shorter than it says */
	req.padding2 = 0;
	req.nmsrs = 1;
	assert_err(vcpu_command(KVMI_VCPU_GET_REGISTERS, 0, &req),
		   -KVM_EINVAL);
	req.nmsrs = 0xffff;
	assert_err(vcpu_command(KVMI_VCPU_GET_REGISTERS, 0, &req),
		   -KVM_EINVAL);
	/* No such MSR */
	assert_err(get_registers(0, 3, 0x474f4f00, &rpl), -KVM_EINVAL);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_set_registers, guest_wait_rbx)
{
	static struct registers_reply rpl;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start_to_rbx(&r, vcpu, &ev);
	regs = ev.common.arch.regs;
	regs.rbx = 0x1111;
	assert_err(set_registers(0, &regs), 0);
	/* The last one wins, and only with the reply */
	regs.rbx = 0x2222;
	assert_err(set_registers(0, &regs), 0);
	assert_err(get_registers(0, 0, 0, &rpl), 0);
	TEST_ASSERT(!memcmp(&rpl.rpl.regs, &ev.common.arch.regs,
			    sizeof(regs)), "set before the reply");
	reply_continue(&ev);
	join_done(&r);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 0x2222);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_set_registers_errors, guest_wait_rbx)
{
	struct kvm_regs regs = { .rbx = 1 };
	struct event ev;
	struct runner r;

	start_to_rbx(&r, vcpu, &ev);
	assert_err(__vcpu_command(KVMI_VCPU_SET_REGISTERS, 0, &regs,
				  sizeof(regs) - 1, NULL, 0), -KVM_EINVAL);
	reply_continue(&ev);
	/* Nothing of it, and nothing when no event is open */
	assert_err(set_registers(0, &regs), -KVM_EOPNOTSUPP);

	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT_EQ(ev.common.arch.regs.rbx, 0);
	regs = ev.common.arch.regs;
	regs.rbx = 1;
	assert_err(set_registers(0, &regs), 0);
	reply_continue(&ev);
	join_done(&r);
	unhook(vcpu->vm);
}

/* Not with the end of the session */
KVM_ONE_VCPU_TEST(kvmi, vcpu_set_registers_abandoned, guest_wait_rbx)
{
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start_to_rbx(&r, vcpu, &ev);
	regs = ev.common.arch.regs;
	regs.rbx = 0x1111;
	assert_err(set_registers(0, &regs), 0);
	unhook(vcpu->vm);

	hook(vcpu->vm);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	TEST_ASSERT_EQ(ev.common.arch.regs.rbx, 0);
	regs = ev.common.arch.regs;
	regs.rbx = 0x2222;
	assert_err(set_registers(0, &regs), 0);
	reply_continue(&ev);
	join_done(&r);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 0x2222);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_translate_gva, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	vm_vaddr_t gva = (vm_vaddr_t)&counter;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	TEST_ASSERT_EQ(translate_gva(0, gva), addr_gva2gpa(vm, gva));
	gva = (vm_vaddr_t)bp_insn;
	TEST_ASSERT_EQ(translate_gva(0, gva), addr_gva2gpa(vm, gva));
	TEST_ASSERT_EQ(translate_gva(0, 0x7f0000000000ull), -1ull);
	/* Not canonical */
	TEST_ASSERT_EQ(translate_gva(0, 1ull << 62), -1ull);
	stop_guest(&r);
	unhook(vm);
}

/* The breakpoint event */

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint, guest_break_once)
{
	static const u8 zeroes[7];
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	TEST_ASSERT_EQ(ev.common.arch.regs.rip, (u64)bp_insn);
	TEST_ASSERT_EQ(ev.bp.gpa, addr_gva2gpa(vm, (vm_vaddr_t)bp_insn));
	TEST_ASSERT_EQ(ev.bp.insn_len, 1);
	TEST_ASSERT(!memcmp(ev.bp.padding, zeroes, sizeof(zeroes)),
		    "the padding isn't zero");
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	TEST_ASSERT_EQ(guest_read(vm, counter), 0);

	/* CONTINUE: it is the guest's own */
	reply_continue(&ev);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), (u64)bp_next);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* RETRY with the INT3 in place: the same again */
KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_retry, guest_break_once)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	start_to_bp(&r, vcpu, &ev);
	for (i = 0; i < 3; i++) {
		reply_retry(&ev);
		get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
		TEST_ASSERT_EQ(ev.common.arch.regs.rip, (u64)bp_insn);
		TEST_ASSERT_EQ(ev.hdr.seq, i + 2);
	}
	/* Without it, the guest notices nothing */
	assert_err(write_physical(ev.bp.gpa, 1, "\x90"), 0);
	reply_retry(&ev);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_retry_rip, guest_break_rax)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	regs = ev.common.arch.regs;
	regs.rip++;
	regs.rax = 0xabcdef0123456789;
	regs.rbx = -1;
	assert_err(set_registers(0, &regs), 0);
	reply_retry(&ev);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, result), regs.rax);
	TEST_ASSERT_EQ(guest_read(vm, counter), regs.rbx);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* Set registers don't cancel the exception */
KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_continue_regs, guest_break_rax)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	regs = ev.common.arch.regs;
	regs.rax = 0x1234;
	assert_err(set_registers(0, &regs), 0);
	reply_continue(&ev);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, result), 0x1234);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip),
		       ev.common.arch.regs.rip + 1);
	stop_guest(&r);
	unhook(vm);
}

/* A breakpoint of the tool's, put into running code and taken out again */
KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_planted, guest_break)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 gpa = addr_gva2gpa(vm, (vm_vaddr_t)bp_insn);
	struct event ev;
	struct runner r;
	int i;

	install_bp_handler(vm);
	/* The instruction that the guest has of its own */
	*(u8 *)addr_gva2hva(vm, (vm_vaddr_t)bp_insn) = 0x90;
	hook(vm);
	start(&r, vcpu);
	assert_err(enable_bp(0), 0);
	for (i = 0; i < 5; i++) {
		assert_guest_runs(vm);
		/* Emulated hosts may miss code that changes as it runs */
		assert_err(pause_vcpu(0, 1), 0);
		get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
		assert_err(write_physical(gpa, 1, "\xcc"), 0);
		reply_continue(&ev);
		get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
		assert_guest_stands(vm);
		assert_err(write_physical(gpa, 1, "\x90"), 0);
		reply_retry(&ev);
	}
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	unhook(vm);
}

/* The session ends with the event open */
static void test_abandoned(struct kvm_vcpu *vcpu, bool taken_out, bool tool_end)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	if (taken_out)
		assert_err(write_physical(ev.bp.gpa, 1, "\x90"), 0);
	if (tool_end)
		tool_close();
	else
		unhook(vm);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), taken_out ? 0 : 1);
	if (!taken_out)
		TEST_ASSERT_EQ(guest_read(vm, trap_rip), (u64)bp_next);
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_tool_gone, guest_break_once)
{
	test_abandoned(vcpu, false, true);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_tool_gone_clean, guest_break_once)
{
	test_abandoned(vcpu, true, true);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_unhook, guest_break_once)
{
	test_abandoned(vcpu, false, false);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_unhook_clean, guest_break_once)
{
	test_abandoned(vcpu, true, false);
}

/* The tool has answered before the session ended: that counts */
static void test_answered(struct kvm_vcpu *vcpu, bool tool_end, bool hook_again)
{
	struct kvmi_vcpu_get_info_reply info;
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;
	u32 seq;

	start_to_bp(&r, vcpu, &ev);
	regs = ev.common.arch.regs;
	regs.rip++;
	regs.rax = 0x1234;
	assert_err(set_registers(0, &regs), 0);
	/* The reply is in the queue when the session ends */
	interrupt(&r);
	reply_retry(&ev);
	assert_err(get_version(), 0);
	if (tool_end) {
		tool_close();
		usleep(QUIET_MS * 1000);
	} else {
		unhook(vm);
	}
	if (hook_again) {
		hook(vm);
		seq = send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, NULL, 0);
		assert_err(get_version(), 0);
	}
	start(&r, vcpu);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	TEST_ASSERT_EQ(guest_read(vm, result), regs.rax);
	if (hook_again) {
		assert_err(get_reply(KVMI_VCPU_GET_INFO, seq, &info,
				     sizeof(info)), 0);
		assert_quiet();
	}
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_reply_and_gone, guest_break_rax)
{
	test_answered(vcpu, true, false);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_reply_and_unhook, guest_break_rax)
{
	test_answered(vcpu, false, false);
}

KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_reply_and_hook, guest_break_rax)
{
	test_answered(vcpu, false, true);
}

/* No event from then on */
KVM_ONE_VCPU_TEST(kvmi, event_breakpoint_no_tool, guest_break)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	int i;

	install_bp_handler(vm);
	hook(vm);
	start(&r, vcpu);
	assert_err(enable_bp(0), 0);
	tool_close();
	for (i = 0; i < 3; i++)
		assert_guest_runs(vm);
	unhook(vm);
	stop_guest(&r);
	TEST_ASSERT(guest_read(vm, traps) == guest_read(vm, counter),
		    "%lu INT3s, %lu #BPs", guest_read(vm, counter),
		    guest_read(vm, traps));
}

KVM_ONE_VCPU_TEST(kvmi, event_two_vcpus, guest_break)
{
	struct kvm_vcpu *vcpu1 = add_vcpu(vcpu, guest_break);
	struct kvm_vm *vm = vcpu->vm;
	struct event ev[2], next;
	struct runner r[2];
	int i;

	install_bp_handler(vm);
	hook(vm);
	start(&r[0], vcpu);
	start(&r[1], vcpu1);
	assert_err(enable_bp(0), 0);
	assert_err(enable_bp(1), 0);
	get_any_event(&ev[0]);
	get_any_event(&ev[1]);
	for (i = 0; i < 10; i++) {
		/* Both are open */
		TEST_ASSERT(ev[0].common.vcpu != ev[1].common.vcpu,
			    "two events of vCPU %u", ev[0].common.vcpu);
		TEST_ASSERT(ev[0].hdr.seq != ev[1].hdr.seq, "one seq, twice");
		assert_guest_stands(vm);
		/* The later one first */
		reply_continue(&ev[1]);
		get_any_event(&next);
		TEST_ASSERT_EQ(next.common.vcpu, ev[1].common.vcpu);
		ev[1] = ev[0];
		ev[0] = next;
	}
	unhook(vm);
	guest_write(vm, stop, 1);
	join_done(&r[0]);
	join_done(&r[1]);
}

/* Event replies */

enum bad_reply {
	BAD_SEQ, BAD_ACTION, BAD_ACTION_FOR_EVENT, BAD_PADDING1, BAD_PADDING2,
	TOO_SHORT, TOO_LONG, EMPTY, OTHER_VCPU, TWICE, NOT_WAITING
};

/* The session ends, the guest goes on */
static void test_bad_reply(struct kvm_vcpu *vcpu, enum bad_reply bad)
{
	struct kvm_vcpu *vcpu1 = add_vcpu(vcpu, guest_count);
	size_t size = EVENT_REPLY_SIZE;
	struct kvm_vm *vm = vcpu->vm;
	struct event_reply rpl;
	struct runner r[2];
	struct event ev;
	u32 seq;

	start_to_pause(&r[0], vcpu, &ev);
	start(&r[1], vcpu1);
	assert_err(vcpu_get_info(1), 0);
	make_event_reply(&rpl, &ev, KVMI_EVENT_ACTION_CONTINUE);
	seq = ev.hdr.seq;

	switch (bad) {
	case BAD_SEQ:
		seq++;
		break;
	case BAD_ACTION:
		rpl.rpl.action = KVMI_EVENT_ACTION_CRASH + 1;
		break;
	case BAD_ACTION_FOR_EVENT:
		rpl.rpl.action = KVMI_EVENT_ACTION_RETRY;
		break;
	case BAD_PADDING1:
		rpl.rpl.padding1 = 1;
		break;
	case BAD_PADDING2:
		rpl.rpl.padding2 = 1;
		break;
	case TOO_SHORT:
		size--;
		break;
	case TOO_LONG:
		size++;
		break;
	case EMPTY:
		size = 0;
		break;
	case OTHER_VCPU:
		rpl.hdr.vcpu = 1;
		break;
	case TWICE:
		send_event_reply(&ev, &rpl);
		break;
	case NOT_WAITING:
		send_event_reply(&ev, &rpl);
		assert_guest_runs(vm);
		assert_err(vcpu_get_info(0), 0);
		break;
	}
	send_msg_seq(KVMI_VCPU_EVENT, seq, &rpl, size);
	assert_closed();
	assert_guest_runs(vm);
	TEST_ASSERT(__hook(vm, tool.fd) && errno == EEXIST, "errno %d", errno);
	unhook(vm);
	guest_write(vm, stop, 1);
	join_done(&r[0]);
	join_done(&r[1]);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_bad_seq, guest_count)
{
	test_bad_reply(vcpu, BAD_SEQ);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_bad_action, guest_count)
{
	test_bad_reply(vcpu, BAD_ACTION);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_pause_retry, guest_count)
{
	test_bad_reply(vcpu, BAD_ACTION_FOR_EVENT);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_bad_padding1, guest_count)
{
	test_bad_reply(vcpu, BAD_PADDING1);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_bad_padding2, guest_count)
{
	test_bad_reply(vcpu, BAD_PADDING2);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_too_short, guest_count)
{
	test_bad_reply(vcpu, TOO_SHORT);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_too_long, guest_count)
{
	test_bad_reply(vcpu, TOO_LONG);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_empty, guest_count)
{
	test_bad_reply(vcpu, EMPTY);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_other_vcpu, guest_count)
{
	test_bad_reply(vcpu, OTHER_VCPU);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_twice, guest_count)
{
	test_bad_reply(vcpu, TWICE);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_not_waiting, guest_count)
{
	test_bad_reply(vcpu, NOT_WAITING);
}

/* Errors in the vCPU header are told, and the vCPU waits on */
KVM_ONE_VCPU_TEST(kvmi, event_reply_bad_vcpu, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event_reply rpl;
	struct event ev;
	struct runner r;

	start_to_pause(&r, vcpu, &ev);
	make_event_reply(&rpl, &ev, KVMI_EVENT_ACTION_CONTINUE);
	rpl.hdr.vcpu = 1;
	send_event_reply(&ev, &rpl);
	assert_err(get_reply(KVMI_VCPU_EVENT, ev.hdr.seq, NULL, 0),
		   -KVM_EINVAL);
	rpl.hdr.vcpu = 0;
	rpl.hdr.padding1 = 1;
	send_event_reply(&ev, &rpl);
	assert_err(get_reply(KVMI_VCPU_EVENT, ev.hdr.seq, NULL, 0),
		   -KVM_EINVAL);
	rpl.hdr.padding1 = 0;
	rpl.hdr.padding2 = 1;
	send_event_reply(&ev, &rpl);
	assert_err(get_reply(KVMI_VCPU_EVENT, ev.hdr.seq, NULL, 0),
		   -KVM_EINVAL);
	assert_guest_stands(vm);
	reply_continue(&ev);
	assert_guest_runs(vm);
	stop_guest(&r);
	unhook(vm);
}

static void assert_crashed(struct runner *r)
{
	struct kvm_run *run = r->vcpu->run;

	join(r);
	TEST_ASSERT(!r->err && !r->done, "KVM_RUN: errno %d, %s", r->err,
		    r->done ? "the guest is done" : "");
	TEST_ASSERT_KVM_EXIT_REASON(r->vcpu, KVM_EXIT_SYSTEM_EVENT);
	TEST_ASSERT_EQ(run->system_event.type, KVM_SYSTEM_EVENT_CRASH);
	TEST_ASSERT_EQ(run->system_event.ndata, 0);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_crash_pause, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_pause(&r, vcpu, &ev);
	reply_crash(&ev);
	assert_crashed(&r);
	/* If userspace makes it go on, it goes on */
	start(&r, vcpu);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, event_reply_crash_breakpoint, guest_break_once)
{
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	reply_crash(&ev);
	assert_crashed(&r);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, counter), 0);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, traps), 0);
	unhook(vcpu->vm);
}

/* Signals: userspace gets its thread back whatever the tool does */

KVM_ONE_VCPU_TEST(kvmi, signal_open_pause, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	start_to_pause(&r, vcpu, &ev);
	for (i = 0; i < 3; i++) {
		interrupt(&r);
		assert_quiet();
		start(&r, vcpu);
		assert_guest_stands(vm);
		/* Neither gone nor sent again */
		assert_quiet();
		assert_err(vcpu_get_info(0), 0);
	}
	reply_continue(&ev);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* The reply comes while the vCPU isn't run */
KVM_ONE_VCPU_TEST(kvmi, signal_open_breakpoint, guest_break_once)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	interrupt(&r);
	reply_continue(&ev);
	assert_err(get_version(), 0);
	assert_quiet();
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	start(&r, vcpu);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* Userspace moves the vCPU on while the event is open: no #BP there */
KVM_ONE_VCPU_TEST(kvmi, signal_moved_breakpoint, guest_break_once)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	interrupt(&r);
	vcpu_regs_get(vcpu, &regs);
	TEST_ASSERT_EQ(regs.rip, (u64)bp_insn);
	regs.rip++;
	vcpu_regs_set(vcpu, &regs);
	start(&r, vcpu);
	reply_continue(&ev);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	stop_guest(&r);
	unhook(vm);
}

/*
 * The tool has set registers and replied, but userspace sets others before the
 * vCPU has seen that: as it does when it loads a snapshot, whose state the tool
 * knows nothing of.  Returns the number of the command that was sent.
 */
static u32 start_to_late_registers(struct runner *r, struct kvm_vcpu *vcpu)
{
	struct kvm_regs regs;
	struct event ev;
	u32 seq;

	start_to_bp(r, vcpu, &ev);
	interrupt(r);
	regs = ev.common.arch.regs;
	regs.rip++;
	regs.rax = 0x1111;
	regs.rbx = 0x1111;
	seq = send_vcpu_msg(KVMI_VCPU_SET_REGISTERS, 0, &regs, sizeof(regs));
	reply_retry(&ev);
	assert_err(get_version(), 0);
	/* Not even RIP need differ */
	vcpu_regs_get(vcpu, &regs);
	regs.rbx = 0x2222;
	vcpu_regs_set(vcpu, &regs);
	return seq;
}

KVM_ONE_VCPU_TEST(kvmi, signal_late_registers, guest_break_rax)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	u32 seq;

	seq = start_to_late_registers(&r, vcpu);
	start(&r, vcpu);
	assert_err(get_reply(KVMI_VCPU_SET_REGISTERS, seq, NULL, 0), 0);
	/* The breakpoint is met again, as from where userspace has put it */
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	TEST_ASSERT_EQ(ev.common.arch.regs.rbx, 0x2222);
	reply_continue(&ev);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, result), 1);
	TEST_ASSERT_EQ(guest_read(vm, counter), 0x2222);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* What a VMM does after each pause is no other state */
KVM_ONE_VCPU_TEST(kvmi, signal_same_registers, guest_break_rax)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs, set;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	interrupt(&r);
	vcpu_regs_get(vcpu, &regs);
	vcpu_regs_set(vcpu, &regs);
	start(&r, vcpu);
	set = ev.common.arch.regs;
	set.rip++;
	set.rax = 0x1111;
	assert_err(set_registers(0, &set), 0);
	reply_retry(&ev);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, result), 0x1111);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* signal_late_registers with the session's end: no command comes late, either */
KVM_ONE_VCPU_TEST(kvmi, signal_late_registers_abandoned, guest_break_rax)
{
	struct kvmi_vcpu_control_events req = {
		.event_id = KVMI_VCPU_EVENT_BREAKPOINT,
		.enable = 1,
	};
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	start_to_late_registers(&r, vcpu);
	unhook(vm);
	hook(vm);
	start(&r, vcpu);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, result), 1);
	TEST_ASSERT_EQ(guest_read(vm, counter), 0x2222);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	/* The new session gets its answers, and no others */
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_EVENTS, 0, &req), 0);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* An event is answered by the tool that it was sent to */
KVM_ONE_VCPU_TEST(kvmi, signal_reply_of_next_session, guest_break_rax)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	interrupt(&r);
	unhook(vm);
	hook(vm);
	reply_retry(&ev);
	wait_for(!get_status(vm).hooked);
	TEST_ASSERT_EQ(get_status(vm).reason, KVM_INTROSPECTION_END_PROTOCOL);
	unhook(vm);
	start(&r, vcpu);
	wait_for(guest_read(vm, result));
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	stop_guest(&r);
}

/* In the middle of sending: nothing is lost, doubled or torn */
KVM_ONE_VCPU_TEST(kvmi, signal_sending, guest_count)
{
	static struct registers_reply rpl;
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	u32 first;
	int i;

	hook(vm);
	first = send_get_registers(0, MAX_MSRS, MSR_EFER);
	for (i = 1; i < MAX_JOBS; i++)
		send_get_registers(0, MAX_MSRS, MSR_EFER);
	start(&r, vcpu);
	wait_stuck();
	for (i = 0; i < 3; i++) {
		interrupt(&r);
		start(&r, vcpu);
	}
	assert_guest_stands(vm);
	for (i = 0; i < MAX_JOBS; i++)
		assert_err(get_reply(KVMI_VCPU_GET_REGISTERS, first + i, &rpl,
				     sizeof(rpl.rpl) + MAX_MSRS *
				     sizeof(rpl.entries[0])), 0);
	assert_quiet();
	assert_guest_runs(vm);
	stop_guest(&r);
	unhook(vm);
}

/* A part of a message is out and the tool doesn't read: the session goes */
KVM_ONE_VCPU_TEST(kvmi, signal_sending_torn, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook_sndbuf(vm, 1);
	allow_all(vm);
	send_get_registers(0, MAX_MSRS, MSR_EFER);
	start(&r, vcpu);
	wait_stuck();
	assert_at_once(interrupt(&r));
	assert_closed();
	start(&r, vcpu);
	assert_guest_runs(vm);
	stop_guest(&r);
	unhook(vm);
}

/* Another thread is stuck in the socket */
KVM_ONE_VCPU_TEST(kvmi, signal_jammed, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	static struct msg msg;
	struct runner r;
	int events = 0;

	hook(vm);
	start(&r, vcpu);
	assert_err(vcpu_get_info(0), 0);
	send_msg(KVMI_VM_PAUSE_VCPU, &(struct kvmi_vm_pause_vcpu) {},
		 sizeof(struct kvmi_vm_pause_vcpu));
	jam(vm);
	assert_guest_stands(vm);
	interrupt(&r);
	start(&r, vcpu);

	/* Its event, once, among the rest */
	while (readable(10 * QUIET_MS)) {
		TEST_ASSERT(receive_msg(&msg), "closed");
		events += msg.hdr.id == KVMI_VCPU_EVENT;
	}
	TEST_ASSERT_EQ(events, 1);
	unhook(vm);
	assert_guest_runs(vm);
	stop_guest(&r);
}

/* A tool that doesn't read: the session goes, and takes nobody with it */
static void assert_unread(struct kvm_vm *vm)
{
	u64 begin = now_ms();

	while (get_status(vm).hooked)
		TEST_ASSERT(now_ms() - begin < TIMEOUT_MS,
			    "the session lives on after %d ms", TIMEOUT_MS);
	TEST_ASSERT_EQ(get_status(vm).reason, KVM_INTROSPECTION_END_UNREAD);
}

KVM_ONE_VCPU_TEST(kvmi, unread_replies, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	jam(vm);
	assert_guest_runs(vm);
	assert_unread(vm);
	assert_guest_runs(vm);
	unhook(vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, unread_vcpu_replies, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	int i;

	hook(vm);
	for (i = 0; i < MAX_JOBS; i++)
		send_get_registers(0, MAX_MSRS, MSR_EFER);
	get_version();
	start(&r, vcpu);
	wait_stuck();
	assert_guest_stands(vm);
	assert_unread(vm);
	assert_guest_runs(vm);
	unhook(vm);
	stop_guest(&r);
}

/* Nor does one that takes a part of a message now and then */
KVM_ONE_VCPU_TEST(kvmi, unread_little_by_little, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	u8 buf[2304];
	int i;

	/* Room for two of the four parts of a message, a buf each */
	hook_sndbuf(vm, 1);
	allow_all(vm);
	for (i = 0; i < MAX_JOBS; i++)
		send_get_registers(0, MAX_MSRS, MSR_EFER);
	get_version();
	start(&r, vcpu);
	wait_stuck();
	for (i = 0; get_status(vm).hooked; i++) {
		TEST_ASSERT(i < 5, "the session lives on");
		usleep(3000 * 1000);
		recv(tool.fd, buf, sizeof(buf), MSG_DONTWAIT);
	}
	TEST_ASSERT_EQ(get_status(vm).reason, KVM_INTROSPECTION_END_UNREAD);
	assert_guest_runs(vm);
	unhook(vm);
	stop_guest(&r);
}

/* The time counts from when the socket became full, signals or not */
KVM_ONE_VCPU_TEST(kvmi, unread_signals, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	int i;

	hook(vm);
	for (i = 0; i < MAX_JOBS; i++)
		send_get_registers(0, MAX_MSRS, MSR_EFER);
	get_version();
	start(&r, vcpu);
	wait_stuck();
	for (i = 0; get_status(vm).hooked; i++) {
		TEST_ASSERT(i < TIMEOUT_MS / 500, "the session lives on");
		usleep(500 * 1000);
		if (get_status(vm).hooked) {
			interrupt(&r);
			start(&r, vcpu);
		}
	}
	TEST_ASSERT_EQ(get_status(vm).reason, KVM_INTROSPECTION_END_UNREAD);
	assert_guest_runs(vm);
	unhook(vm);
	stop_guest(&r);
}

/* A tool that always has something to say */
static u8 flood_buf[16384];

static void *flood(void *unused)
{
	while (send(tool.fd, flood_buf, sizeof(flood_buf), MSG_NOSIGNAL) > 0)
		;
	return NULL;
}

static void *drain(void *unused)
{
	static u8 buf[65536];

	while (recv(tool.fd, buf, sizeof(buf), 0) > 0)
		;
	return NULL;
}

/* Keeps the vCPU, or whoever reads the socket, busy */
static void test_flood(struct kvm_vcpu *vcpu, u16 id)
{
	struct {
		struct kvmi_msg_hdr hdr;
		struct kvmi_vcpu_hdr vcpu;
	} msg = { .hdr.id = id, .hdr.size = sizeof(msg.vcpu) };
	struct kvm_vm *vm = vcpu->vm;
	pthread_t sender, reader;
	struct runner r;
	struct event ev;
	unsigned int i;

	for (i = 0; i < sizeof(flood_buf) / sizeof(msg); i++)
		memcpy(flood_buf + i * sizeof(msg), &msg, sizeof(msg));

	/* Nobody ever waits for room in the socket */
	hook_sndbuf(vm, 256 << 20);
	allow_all(vm);
	start(&r, vcpu);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);

	TEST_ASSERT(!pthread_create(&sender, NULL, flood, NULL) &&
		    !pthread_create(&reader, NULL, drain, NULL),
		    "pthread_create");
	for (i = 0; i < 5; i++) {
		usleep(100 * 1000);
		assert_at_once(interrupt(&r));
		start(&r, vcpu);
	}
	TEST_ASSERT(get_status(vm).commands > 100, "that was no flood");
	assert_at_once(assert_ioctl(vm, KVM_INTROSPECTION_UNHOOK, NULL, 0));
	pthread_join(sender, NULL);
	pthread_join(reader, NULL);
	assert_guest_runs(vm);
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, flood_vm_commands, guest_count)
{
	test_flood(vcpu, KVMI_GET_VERSION);
}

KVM_ONE_VCPU_TEST(kvmi, flood_vcpu_commands, guest_count)
{
	test_flood(vcpu, KVMI_VCPU_GET_INFO);
}

static void send_file(int fd)
{
	struct kvmi_msg_hdr hdr = { .id = KVMI_GET_VERSION };
	struct iovec iov = { .iov_base = &hdr, .iov_len = sizeof(hdr) };
	union {
		struct cmsghdr cmsg;
		u8 space[CMSG_SPACE(sizeof(int))];
	} control = { .cmsg = {
		.cmsg_len = CMSG_LEN(sizeof(int)),
		.cmsg_level = SOL_SOCKET,
		.cmsg_type = SCM_RIGHTS,
	} };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};

	memcpy(CMSG_DATA(&control.cmsg), &fd, sizeof(int));
	TEST_ASSERT_EQ(sendmsg(tool.fd, &msg, MSG_NOSIGNAL), sizeof(hdr));
}

/* Nobody has asked for files.  They are closed at once. */
KVM_ONE_VCPU_TEST(kvmi, message_with_file, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct pollfd other = {};
	struct runner r;
	struct event ev;
	int fds[2], i;

	for (i = 0; i < 2; i++) {
		/* The second time, it is the vCPU that reads the socket */
		if (i)
			start_to_pause(&r, vcpu, &ev);
		else
			hook(vm);
		TEST_ASSERT(!pipe(fds), "pipe: %s", strerror(errno));
		other.fd = fds[0];
		send_file(fds[1]);
		close(fds[1]);
		assert_closed();
		TEST_ASSERT_EQ(get_status(vm).reason,
			       KVM_INTROSPECTION_END_PROTOCOL);
		TEST_ASSERT(poll(&other, 1, AT_ONCE_MS) == 1 &&
			    other.revents & POLLHUP, "KVM holds the file");
		close(fds[0]);
		unhook(vm);
	}
	/* The vCPU's thread has closed it outside KVM_RUN */
	join(&r);
	TEST_ASSERT_EQ(r.err, EINTR);
	start(&r, vcpu);
	stop_guest(&r);
}

/*
 * Sends a file whose closing takes an hour if nobody prevents it.  Nobody must
 * read it before it is closed here, or this would be the one to wait.
 */
static int send_lingering_file(void)
{
	struct sockaddr_in addr = {
		.sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	struct linger linger = { .l_onoff = 1, .l_linger = 3600 };
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	socklen_t size = sizeof(addr);
	int fd, listener, peer;
	char buf[4096] = {};

	listener = socket(AF_INET, SOCK_STREAM, 0);
	fd = socket(AF_INET, SOCK_STREAM, 0);
	TEST_ASSERT(!ioctl(fd, SIOCSIFFLAGS, &lo) &&
		    !bind(listener, (void *)&addr, size) &&
		    !getsockname(listener, (void *)&addr, &size) &&
		    !listen(listener, 1) &&
		    !connect(fd, (void *)&addr, size),
		    "TCP: %s", strerror(errno));
	peer = accept(listener, NULL, NULL);
	TEST_ASSERT(peer >= 0, "accept: %s", strerror(errno));
	close(listener);
	while (send(fd, buf, sizeof(buf), MSG_DONTWAIT) > 0)
		;
	TEST_ASSERT(!setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger,
				sizeof(linger)),
		    "SO_LINGER: %s", strerror(errno));
	send_file(fd);
	close(fd);

	return peer;
}

KVM_ONE_VCPU_TEST(kvmi, message_with_lingering_file, guest_count)
{
	/* Too large a message, so that what follows it isn't read */
	static struct kvmi_msg_hdr too_large[1024] = {
		{ .id = KVMI_GET_VERSION, .size = -1 },
	};
	struct kvm_vm *vm = vcpu->vm;
	int fds[2], peers[3], i;
	struct runner r;
	struct event ev;

	/* The receive thread gets it; or nobody, before UNHOOK */
	start(&r, vcpu);
	for (i = 0; i < 2; i++) {
		make_sockets(fds);
		tool_connected(fds[0]);
		if (i)
			send_bytes(too_large, sizeof(too_large));
		peers[i] = send_lingering_file();
		hook_fd(vm, fds[1]);
		assert_closed();
		unhook(vm);
		assert_at_once(close(fds[1]));
	}

	/* A vCPU that waits, when it gets rid of its replies */
	hook_sndbuf(vm, 1);
	allow_all(vm);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	for (i = 0; i < 100; i++)
		send_msg(KVMI_GET_VERSION, NULL, 0);
	wait_stuck();
	peers[2] = send_lingering_file();
	assert_closed();
	unhook(vm);
	join(&r);
	TEST_ASSERT_EQ(r.err, EINTR);
	start(&r, vcpu);
	assert_guest_runs(vm);

	hook(vm);
	assert_err(get_version(), 0);
	assert_err(vcpu_get_info(0), 0);
	unhook(vm);
	stop_guest(&r);
	for (i = 0; i < ARRAY_SIZE(peers); i++)
		close(peers[i]);
}

static unsigned int count_threads(void)
{
	struct stat st;

	TEST_ASSERT(!stat("/proc/self/task", &st), "no /proc/self/task");
	return st.st_nlink - 2;
}

static void leave_vm_to_receiver(void)
{
	struct kvm_vm *vm = vm_create_barebones();
	int i;

	hook_sndbuf(vm, 1);
	for (i = 0; i < 100; i++)
		send_msg(KVMI_GET_VERSION, NULL, 0);
	wait_stuck();
	/* KVM reads it when nobody else has the VM any more */
	send_file(vm->fd);
	close(vm->fd);
	TEST_ASSERT_EQ(count_threads(), 2);
	assert_closed();
	wait_for(count_threads() == 1);
	_exit(0);
}

/* The last to let go of the VM is the VM's own receive thread */
KVM_ONE_VCPU_TEST(kvmi, message_with_last_file, guest_count)
{
	pid_t pid = fork();
	int status;

	TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
	if (!pid)
		leave_vm_to_receiver();
	status = wait_for_exit(pid);
	TEST_ASSERT(!status, "status %#x", status);
}

/* The journal */

extern u8 journal_insn[];

static void guest_journal(void)
{
	while (!READ_ONCE(stop)) {
		asm volatile("journal_insn: nopl 0x11223344(%%rax)" : : :
			     "memory");
		WRITE_ONCE(counter, counter + 1);
		/* There are emulated hosts that want it to exit */
		cpuid(0, &(u32){0}, &(u32){0}, &(u32){0}, &(u32){0});
	}
	GUEST_DONE();
}

static int write_flags(u64 gpa, const void *buf, u16 size, u16 flags)
{
	struct {
		struct kvmi_vm_write_physical req;
		u8 data[4096];
	} msg = { .req = { .gpa = gpa, .size = size, .flags = flags } };

	memcpy(msg.data, buf, size);
	return __command(KVMI_VM_WRITE_PHYSICAL, &msg, sizeof(msg.req) + size,
			 NULL, 0);
}

/* Plants an INT3 and waits for its hit */
static void start_to_journal(struct runner *r, struct kvm_vcpu *vcpu,
			     struct event *ev)
{
	struct kvm_vm *vm = vcpu->vm;
	u8 int3 = 0xcc;

	install_bp_handler(vm);
	hook(vm);
	start(r, vcpu);
	assert_err(enable_bp(0), 0);
	assert_err(write_physical(addr_gva2gpa(vm, (vm_vaddr_t)journal_insn),
				  1, &int3), 0);
	get_event(ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	TEST_ASSERT_EQ(ev->common.arch.regs.rip, (u64)journal_insn);
}

/* The guest hasn't noticed */
static void end_of_journal(struct runner *r)
{
	struct kvm_vm *vm = r->vcpu->vm;

	assert_guest_runs(vm);
	TEST_ASSERT_EQ(*guest_var(vm, journal_insn[0]), 0x0f);
	stop_guest(r);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
}

KVM_ONE_VCPU_TEST(kvmi, journal_tool_gone, guest_journal)
{
	struct runner r;
	struct event ev;

	start_to_journal(&r, vcpu, &ev);
	tool_close();
	assert_guest_runs(vcpu->vm);
	unhook(vcpu->vm);
	end_of_journal(&r);
}

KVM_ONE_VCPU_TEST(kvmi, journal_unhook, guest_journal)
{
	struct runner r;
	struct event ev;

	start_to_journal(&r, vcpu, &ev);
	assert_ioctl(vcpu->vm, KVM_INTROSPECTION_UNHOOK, NULL, 0);
	/* At once */
	TEST_ASSERT_EQ(*guest_var(vcpu->vm, journal_insn[0]), 0x0f);
	unhook(vcpu->vm);
	end_of_journal(&r);
}

/* Answered, but with the INT3 still there */
KVM_ONE_VCPU_TEST(kvmi, journal_answered, guest_journal)
{
	struct runner r;
	struct event ev;

	start_to_journal(&r, vcpu, &ev);
	reply_retry(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	reply_retry(&ev);
	tool_close();
	assert_guest_runs(vcpu->vm);
	unhook(vcpu->vm);
	end_of_journal(&r);
}

/* With a vCPU that is outside KVM_RUN, the event open */
KVM_ONE_VCPU_TEST(kvmi, journal_vcpu_away, guest_journal)
{
	struct runner r;
	struct event ev;

	start_to_journal(&r, vcpu, &ev);
	interrupt(&r);
	unhook(vcpu->vm);
	TEST_ASSERT_EQ(*guest_var(vcpu->vm, journal_insn[0]), 0x0f);
	start(&r, vcpu);
	end_of_journal(&r);
}

/* What is restored, and what is not; the vCPU doesn't run */
KVM_ONE_VCPU_TEST(kvmi, journal_bytes, guest_journal)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 gva = vm_vaddr_alloc_page(vm), gpa = addr_gva2gpa(vm, gva);
	u8 *page = addr_gva2hva(vm, gva);
	u8 buf[16];
	int i;

	for (i = 0; i < 256; i++)
		page[i] = i;
	page[0xcc - 1] = 0;
	hook(vm);

	/* An INT3 among others; one that was there; twice */
	memset(buf, 0x90, sizeof(buf));
	buf[3] = 0xcc;
	assert_err(write_physical(gpa, 8, buf), 0);
	buf[0] = 0xcc;
	assert_err(write_physical(gpa + 0xcc, 1, buf), 0);
	assert_err(write_physical(gpa + 0x10, 1, buf), 0);
	assert_err(write_physical(gpa + 0x10, 1, buf), 0);

	/* Put back by the tool, replaced by the tool, and by the guest */
	assert_err(write_physical(gpa + 0x20, 1, buf), 0);
	assert_err(write_physical(gpa + 0x20, 1, (u8[]) { 0x20 }), 0);
	assert_err(write_physical(gpa + 0x21, 1, buf), 0);
	assert_err(write_physical(gpa + 0x21, 1, (u8[]) { 0x99 }), 0);
	assert_err(write_physical(gpa + 0x22, 1, buf), 0);
	page[0x22] = 0x98;

	/* The guest has replaced what the tool then overwrites again */
	assert_err(write_physical(gpa + 0x23, 1, buf), 0);
	page[0x23] = 0x97;
	assert_err(write_physical(gpa + 0x23, 1, buf), 0);

	/* Flags */
	assert_err(write_flags(gpa + 0x30, buf, 1, KVMI_WRITE_KEEP), 0);
	memset(buf, 0x55, sizeof(buf));
	assert_err(write_flags(gpa + 0x40, buf, 8, KVMI_WRITE_JOURNAL), 0);
	assert_err(write_flags(gpa + 0x50, buf, 8, KVMI_WRITE_JOURNAL), 0);
	assert_err(write_flags(gpa + 0x54, buf, 4, KVMI_WRITE_KEEP), 0);
	memset(buf, 0x66, sizeof(buf));
	assert_err(write_flags(gpa + 0x60, buf, 4, KVMI_WRITE_JOURNAL), 0);
	memset(buf, 0x77, sizeof(buf));
	assert_err(write_flags(gpa + 0x62, buf, 4, KVMI_WRITE_JOURNAL), 0);
	assert_err(write_flags(gpa, buf, 1, 3), -KVM_EINVAL);
	assert_err(write_flags(gpa, buf, 1, 4), -KVM_EINVAL);
	assert_err(write_flags(gpa, buf, 1, 0x8000), -KVM_EINVAL);

	TEST_ASSERT_EQ(get_status(vm).restored, 0);
	unhook(vm);
	TEST_ASSERT_EQ(get_status(vm).restored, 21);

	for (i = 0; i < 8; i++)
		TEST_ASSERT_EQ(page[i], i == 3 ? 3 : 0x90);
	TEST_ASSERT_EQ(page[0xcc], 0xcc);
	TEST_ASSERT_EQ(page[0x10], 0x10);
	TEST_ASSERT_EQ(page[0x20], 0x20);
	TEST_ASSERT_EQ(page[0x21], 0x99);
	TEST_ASSERT_EQ(page[0x22], 0x98);
	TEST_ASSERT_EQ(page[0x23], 0x97);
	TEST_ASSERT_EQ(page[0x30], 0xcc);
	for (i = 0; i < 8; i++)
		TEST_ASSERT_EQ(page[0x40 + i], 0x40 + i);
	for (i = 0; i < 8; i++)
		TEST_ASSERT_EQ(page[0x50 + i], i < 4 ? 0x50 + i : 0x55);
	for (i = 0; i < 6; i++)
		TEST_ASSERT_EQ(page[0x60 + i], 0x60 + i);

	/* The next session knows nothing of it */
	page[0x10] = 0xcc;
	hook(vm);
	unhook(vm);
	TEST_ASSERT_EQ(page[0x10], 0xcc);
}

KVM_ONE_VCPU_TEST(kvmi, journal_full, guest_journal)
{
	const unsigned int pages = 65536 / PAGE_SIZE;
	struct kvm_vm *vm = vcpu->vm;
	static u8 buf[4096];
	unsigned int i;
	u8 *mem;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, pages + 1, 0);
	mem = addr_gpa2hva(vm, EXTRA_GPA);
	memset(buf, 0xcc, sizeof(buf));
	hook(vm);
	for (i = 0; i < pages; i++)
		assert_err(write_physical(EXTRA_GPA + i * PAGE_SIZE, PAGE_SIZE,
					  buf), 0);
	assert_err(write_physical(EXTRA_GPA + pages * PAGE_SIZE, 1, buf),
		   -KVM_E2BIG);
	TEST_ASSERT_EQ(mem[pages * PAGE_SIZE], 0);

	/* What needs no room is done still, and makes some */
	assert_err(write_physical(EXTRA_GPA, 1, buf), 0);
	buf[0] = 0;
	assert_err(write_physical(EXTRA_GPA, 1, buf), 0);
	buf[0] = 0xcc;
	/* What is refused takes none */
	assert_err(write_physical(EXTRA_GPA + pages * PAGE_SIZE + 16, 2, buf),
		   -KVM_E2BIG);
	assert_err(write_physical(EXTRA_GPA + pages * PAGE_SIZE, 1, buf), 0);

	unhook_full(vm);
	for (i = 0; i < (pages + 1) * PAGE_SIZE; i++)
		TEST_ASSERT(!mem[i], "byte %u is %#x", i, mem[i]);
}

KVM_ONE_VCPU_TEST(kvmi, journal_memory_gone, guest_journal)
{
	struct kvm_vm *vm = vcpu->vm;
	u8 int3 = 0xcc;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 2, 0);
	hook(vm);
	assert_err(write_physical(EXTRA_GPA, 1, &int3), 0);
	vm_mem_region_delete(vm, EXTRA_SLOT);
	unhook(vm);
}

/*
 * The slot is away when the session ends, as it is for a moment when a device
 * manager changes it, and back for UNHOOK, with these flags; or the memory
 * can't be written to
 */
static void test_journal_later(struct kvm_vcpu *vcpu, bool away, u32 flags)
{
	struct kvm_vm *vm = vcpu->vm;
	u8 int3 = 0xcc, *mem;
	struct runner r;

	mem = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap: %s", strerror(errno));
	vm_set_user_memory_region(vm, EXTRA_SLOT, 0, EXTRA_GPA, PAGE_SIZE, mem);
	hook(vm);
	start(&r, vcpu);
	assert_err(write_physical(EXTRA_GPA, 1, &int3), 0);

	if (away)
		vm_set_user_memory_region(vm, EXTRA_SLOT, 0, EXTRA_GPA, 0,
					  NULL);
	else
		mprotect(mem, PAGE_SIZE, PROT_READ);
	tool_close();
	wait_for(!get_status(vm).hooked);
	/* Whoever looks for something to restore has done so */
	usleep(QUIET_MS * 1000);
	TEST_ASSERT_EQ(get_status(vm).restored, 0);
	if (away)
		vm_set_user_memory_region(vm, EXTRA_SLOT, flags, EXTRA_GPA,
					  PAGE_SIZE, mem);
	else
		mprotect(mem, PAGE_SIZE, PROT_READ | PROT_WRITE);
	unhook(vm);
	TEST_ASSERT_EQ(get_status(vm).restored, 1);
	TEST_ASSERT_EQ(mem[0], 0);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, journal_slot_away, guest_count)
{
	test_journal_later(vcpu, true, 0);
}

/* The guest can't write it any more, but runs into the INT3 */
KVM_ONE_VCPU_TEST(kvmi, journal_slot_read_only, guest_count)
{
	test_journal_later(vcpu, true, KVM_MEM_READONLY);
}

KVM_ONE_VCPU_TEST(kvmi, journal_protected, guest_count)
{
	test_journal_later(vcpu, false, 0);
}

#define KILL_ROUNDS	50

/* The device manager dies, and its memory doesn't */
TEST_F_TIMEOUT(kvmi, journal_killed, 120)
{
	int fds[2], sync[2], i;
	struct kvm_vm *vm;
	u8 int3 = 0xcc;
	pid_t pid;
	u8 *mem;
	char c;

	mem = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap: %s", strerror(errno));

	for (i = 0; i < KILL_ROUNDS; i++) {
		make_sockets(fds);
		make_sockets(sync);
		pid = fork();
		TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
		if (!pid) {
			vm = vm_create_barebones();
			vm_set_user_memory_region(vm, EXTRA_SLOT, 0, EXTRA_GPA,
						  PAGE_SIZE, mem);
			hook_fd(vm, fds[1]);
			allow_all(vm);
			close(fds[0]);
			if (write(sync[1], &c, 1) == 1)
				read(sync[1], &c, 1);
			_exit(0);
		}
		close(fds[1]);
		TEST_ASSERT_EQ(read(sync[0], &c, 1), 1);
		tool_connected(fds[0]);
		assert_err(write_physical(EXTRA_GPA, 1, &int3), 0);
		TEST_ASSERT_EQ(mem[0], int3);

		/* By its own hand, or not */
		if (i & 1)
			TEST_ASSERT_EQ(write(sync[0], &c, 1), 1);
		else
			kill(pid, SIGKILL);
		wait_for_exit(pid);
		TEST_ASSERT(!mem[0], "the INT3 is left, round %d", i);
		tool_close();
		close(sync[0]);
		close(sync[1]);
	}
	munmap(mem, PAGE_SIZE);
}

/* The last to hold the VM has other memory */
TEST_F(kvmi, journal_other_process)
{
	struct kvm_vm *vm = vm_create_barebones();
	u8 int3 = 0xcc, *mem;
	int sync[2];
	pid_t pid;
	char c = 0;

	mem = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mem != MAP_FAILED, "mmap: %s", strerror(errno));
	vm_set_user_memory_region(vm, EXTRA_SLOT, 0, EXTRA_GPA, PAGE_SIZE, mem);
	hook(vm);
	assert_err(write_physical(EXTRA_GPA, 1, &int3), 0);

	make_sockets(sync);
	pid = fork();
	TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
	if (!pid) {
		read(sync[1], &c, 1);
		_exit(0);
	}
	close(vm->fd);
	TEST_ASSERT_EQ(mem[0], int3);
	TEST_ASSERT_EQ(write(sync[0], &c, 1), 1);
	wait_for_exit(pid);
	TEST_ASSERT_EQ(mem[0], 0);
	assert_closed();
	tool_close();
	close(sync[0]);
	close(sync[1]);
	munmap(mem, PAGE_SIZE);
}

static bool is_resident(void *mem)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	u64 entry;

	TEST_ASSERT(fd >= 0, "pagemap: %s", strerror(errno));
	TEST_ASSERT(pread(fd, &entry, sizeof(entry),
			  (unsigned long)mem / PAGE_SIZE * sizeof(entry)) ==
		    sizeof(entry), "pagemap: %s", strerror(errno));
	close(fd);
	return entry >> 63;
}

static bool have_swap(void)
{
	FILE *f = fopen("/proc/swaps", "r");
	char line[256];
	int lines = 0;

	while (f && fgets(line, sizeof(line), f))
		lines++;
	if (f)
		fclose(f);
	return lines > 1;
}

/* Also empties the CPUs' own lists of pages */
static void compact_memory(void)
{
	int fd = open("/proc/sys/vm/compact_memory", O_WRONLY);

	TEST_ASSERT(fd >= 0 && write(fd, "1", 1) == 1, "compact_memory: %s",
		    strerror(errno));
	close(fd);
}

TEST_F(kvmi, journal_swapped)
{
	struct kvm_vm *vm = self->vcpu->vm;
	u8 int3 = 0xcc, *mem;
	u64 bitmap = 0;
	int i;

	if (!have_swap())
		SKIP(return, "no swap here");

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 4, KVM_MEM_LOG_DIRTY_PAGES);
	mem = addr_gpa2hva(vm, EXTRA_GPA);
	memset(mem, 0x11, 4 * PAGE_SIZE);
	hook(vm);
	assert_err(write_physical(EXTRA_GPA + PAGE_SIZE, 1, &int3), 0);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);

	/* Another CPU may have the page on a list of its own until compaction */
	for (i = 0; i < 100 && is_resident(mem + PAGE_SIZE); i++) {
		if (i % 10 == 9)
			compact_memory();
		TEST_ASSERT(!madvise(mem, 4 * PAGE_SIZE, MADV_PAGEOUT),
			    "madvise: %s", strerror(errno));
		usleep(10 * 1000);
	}
	TEST_ASSERT(!is_resident(mem + PAGE_SIZE), "it won't be swapped");

	tool_close();
	unhook(vm);
	TEST_ASSERT_EQ(get_status(vm).restored, 1);
	TEST_ASSERT_EQ(mem[PAGE_SIZE], 0x11);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 2);
}

/* Memory that is seen twice, discarded or moved between write and end */
KVM_ONE_VCPU_TEST(kvmi, journal_memory_changed, guest_journal)
{
	const u64 alias = EXTRA_GPA + 16 * PAGE_SIZE;
	struct kvm_vm *vm = vcpu->vm;
	u8 int3 = 0xcc, zero = 0, *mem;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 4, 0);
	mem = addr_gpa2hva(vm, EXTRA_GPA);
	vm_set_user_memory_region(vm, EXTRA_SLOT + 1, 0, alias, 4 * PAGE_SIZE,
				  mem);
	hook(vm);

	/* By another address: put back, written once more, or not at all */
	assert_err(write_physical(EXTRA_GPA, 1, &int3), 0);
	assert_err(write_physical(alias, 1, &zero), 0);
	assert_err(write_physical(EXTRA_GPA + 1, 1, &int3), 0);
	assert_err(write_physical(alias + 1, 1, &int3), 0);
	assert_err(write_physical(alias + 2, 1, &int3), 0);

	/* As a balloon does it; and the guest has used the page again */
	assert_err(write_physical(EXTRA_GPA + PAGE_SIZE, 1, &int3), 0);
	assert_err(write_physical(EXTRA_GPA + 2 * PAGE_SIZE, 1, &int3), 0);
	TEST_ASSERT(!madvise(mem + PAGE_SIZE, 2 * PAGE_SIZE, MADV_DONTNEED),
		    "madvise: %s", strerror(errno));
	mem[2 * PAGE_SIZE] = 0x55;

	/* Seen at the alias only, when the first slot has moved */
	assert_err(write_physical(alias + 3 * PAGE_SIZE, 1, &int3), 0);
	assert_err(write_physical(EXTRA_GPA + 3 * PAGE_SIZE + 1, 1, &int3), 0);
	vm_mem_region_move(vm, EXTRA_SLOT, EXTRA_GPA + 64 * PAGE_SIZE);

	unhook(vm);
	TEST_ASSERT_EQ(get_status(vm).restored, 2);
	TEST_ASSERT_EQ(mem[0], 0);
	TEST_ASSERT_EQ(mem[1], 0xcc);
	TEST_ASSERT_EQ(mem[2], 0);
	TEST_ASSERT_EQ(mem[PAGE_SIZE], 0);
	TEST_ASSERT_EQ(mem[2 * PAGE_SIZE], 0x55);
	TEST_ASSERT_EQ(mem[3 * PAGE_SIZE], 0);
	TEST_ASSERT_EQ(mem[3 * PAGE_SIZE + 1], 0xcc);
}

/* Live migration takes what is restored with it */
KVM_ONE_VCPU_TEST(kvmi, journal_dirty_log, guest_journal)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 bitmap = 0;
	u8 int3 = 0xcc;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 4, KVM_MEM_LOG_DIRTY_PAGES);
	hook(vm);
	assert_err(write_physical(EXTRA_GPA + 2 * PAGE_SIZE, 1, &int3), 0);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 4);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 0);
	unhook(vm);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 4);
}

/* As QEMU has it: read and cleared one by one */
KVM_ONE_VCPU_TEST(kvmi, journal_dirty_log_manual, guest_journal)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 bitmap = 0;
	u8 int3 = 0xcc;

	vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 64, KVM_MEM_LOG_DIRTY_PAGES);
	hook(vm);
	assert_err(write_physical(EXTRA_GPA + 2 * PAGE_SIZE, 1, &int3), 0);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 4);
	kvm_vm_clear_dirty_log(vm, EXTRA_SLOT, &bitmap, 0, 64);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 0);
	unhook(vm);
	kvm_vm_get_dirty_log(vm, EXTRA_SLOT, &bitmap);
	TEST_ASSERT_EQ(bitmap, 4);
}

/* Intercepted instructions */

static int control_cr(u16 vcpu, u8 cr, u8 enable)
{
	struct kvmi_vcpu_control_cr req = { .cr = cr, .enable = enable };

	return vcpu_command(KVMI_VCPU_CONTROL_CR, vcpu, &req);
}

static int set_sregs(u16 vcpu, const struct kvm_sregs *sregs)
{
	return __vcpu_command(KVMI_VCPU_SET_SREGS, vcpu, sregs, sizeof(*sregs),
			      NULL, 0);
}

static void assert_sregs(const struct kvm_sregs *sregs)
{
	static struct registers_reply rpl;

	assert_err(get_registers(0, 0, 0, &rpl), 0);
	TEST_ASSERT(!memcmp(&rpl.rpl.sregs, sregs, sizeof(*sregs)),
		    "the vCPU has other registers");
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_set_sregs, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	static struct registers_reply rpl;
	struct kvm_sregs sregs, old, is;
	struct event ev;
	struct runner r;

	start_to_pause(&r, vcpu, &ev);
	assert_err(set_sregs(0, &ev.common.arch.sregs), 0);
	/* VMX marks segments as accessed */
	assert_err(get_registers(0, 0, 0, &rpl), 0);
	old = rpl.rpl.sregs;
	sregs = old;
	TEST_ASSERT_EQ(old.cr4, ev.common.arch.sregs.cr4);
	TEST_ASSERT_EQ(old.cs.base, ev.common.arch.sregs.cs.base);

	/* Another table of the same pages */
	sregs.cr3 = vm_alloc_page_table(vm);
	memcpy(addr_gpa2hva(vm, sregs.cr3), addr_gpa2hva(vm, old.cr3),
	       PAGE_SIZE);
	sregs.cr0 ^= X86_CR0_MP;
	sregs.cr2 = 0x123456000;
	sregs.cr4 ^= X86_CR4_TSD;
	sregs.cr8 = 5;
	sregs.fs.base = 0x1234;
	sregs.gdt.limit ^= 0x1000;
	assert_err(set_sregs(0, &sregs), 0);
	assert_sregs(&sregs);
	reply_continue(&ev);
	assert_guest_runs(vm);

	/* Without an event, of any kind */
	assert_err(control_cr(0, 3, 1), 0);
	assert_err(control_event(0, KVMI_VCPU_EVENT_CR, 1), 0);
	sregs.cr3 = old.cr3;
	assert_err(set_sregs(0, &sregs), 0);
	assert_sregs(&sregs);
	assert_quiet();
	assert_guest_runs(vm);

	stop_guest(&r);
	vcpu_sregs_get(vcpu, &is);
	TEST_ASSERT_EQ(is.cr3, sregs.cr3);
	TEST_ASSERT_EQ(is.cr4, sregs.cr4);
	TEST_ASSERT_EQ(is.fs.base, sregs.fs.base);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_set_sregs_errors, guest_count)
{
	struct kvm_sregs sregs, old;
	struct event ev;
	struct runner r;

#define assert_bad(change)						\
do {									\
	sregs = old;							\
	/* Not this either, then */					\
	sregs.cr8 = 3;							\
	sregs.cr4 ^= X86_CR4_TSD;					\
	change;								\
	assert_err(set_sregs(0, &sregs), -KVM_EINVAL);			\
	assert_sregs(&old);						\
} while (0)

	start_to_pause(&r, vcpu, &ev);
	old = ev.common.arch.sregs;
	assert_bad(sregs.efer ^= EFER_SCE);
	assert_bad(sregs.apic_base ^= 0x1000);
	assert_bad(sregs.interrupt_bitmap[1] = 1);
	assert_bad(sregs.cr0 &= ~X86_CR0_PG);
	assert_bad(sregs.cr0 &= ~X86_CR0_PE);
	assert_bad(sregs.cr3 |= 1ull << 60);
	assert_bad(sregs.cr4 |= 1ull << 31);
	assert_bad(sregs.cr4 &= ~X86_CR4_PAE);
	assert_bad(sregs.cr8 = 16);
	assert_bad(sregs.cs.db = 1);
	assert_err(__vcpu_command(KVMI_VCPU_SET_SREGS, 0, &old,
				  sizeof(old) - 1, NULL, 0), -KVM_EINVAL);
	reply_continue(&ev);
	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
	unhook(vcpu->vm);
}

#define MANY_MSRS	510

struct set_msrs {
	struct kvmi_vcpu_set_msrs req;
	struct kvm_msr_entry entries[MANY_MSRS];
};

static int set_msrs(struct set_msrs *set, u32 *done)
{
	struct kvmi_vcpu_set_msrs_reply rpl = {};
	int err;

	err = __vcpu_command(KVMI_VCPU_SET_MSRS, 0, set, sizeof(set->req) +
			     set->req.nmsrs * sizeof(set->entries[0]), &rpl,
			     sizeof(rpl));
	TEST_ASSERT_EQ(rpl.padding, 0);
	*done = rpl.nmsrs;
	return err;
}

static u64 get_msr(u32 index)
{
	static struct registers_reply rpl;

	assert_err(get_registers(0, 1, index, &rpl), 0);
	return rpl.rpl.msrs.entries[0].data;
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_set_msrs, guest_count)
{
	static struct set_msrs set = {
		.req.nmsrs = 4,
		.entries = {
			{ .index = MSR_LSTAR, .data = 0x1000 },
			{ .index = MSR_KERNEL_GS_BASE, .data = 0x2000 },
			/* Not canonical */
			{ .index = MSR_LSTAR, .data = 1ull << 63 },
			{ .index = MSR_STAR, .data = 0x3000 },
		},
	};
	u64 star;
	struct runner r;
	unsigned int i;
	u32 done;

	hook(vcpu->vm);
	start(&r, vcpu);
	/* Without an event */
	assert_err(control_msr(0, MSR_LSTAR, 1), 0);
	assert_err(control_event(0, KVMI_VCPU_EVENT_MSR, 1), 0);
	star = get_msr(MSR_STAR);
	assert_err(set_msrs(&set, &done), 0);
	TEST_ASSERT_EQ(done, 2);
	TEST_ASSERT_EQ(get_msr(MSR_LSTAR), 0x1000);
	TEST_ASSERT_EQ(get_msr(MSR_KERNEL_GS_BASE), 0x2000);
	TEST_ASSERT_EQ(get_msr(MSR_STAR), star);
	assert_quiet();

	set.req.nmsrs = 0;
	assert_err(set_msrs(&set, &done), 0);
	TEST_ASSERT_EQ(done, 0);

	for (i = 0; i < MANY_MSRS; i++) {
		set.entries[i].index = MSR_LSTAR;
		set.entries[i].data = i;
	}
	set.req.nmsrs = MANY_MSRS;
	assert_err(set_msrs(&set, &done), 0);
	TEST_ASSERT_EQ(done, MANY_MSRS);
	TEST_ASSERT_EQ(get_msr(MSR_LSTAR), MANY_MSRS - 1);

	/* Errors, without a write before them */
	set.req.nmsrs = 2;
	set.req.padding = 1;
	assert_err(set_msrs(&set, &done), -KVM_EINVAL);
	set.req.padding = 0;
	set.entries[1].reserved = 1;
	assert_err(set_msrs(&set, &done), -KVM_EINVAL);
	set.entries[1].reserved = 0;
	assert_err(__vcpu_command(KVMI_VCPU_SET_MSRS, 0, &set,
				  sizeof(set.req) + 2 * 16 - 1, NULL, 0),
		   -KVM_EINVAL);
	set.req.nmsrs = ~0u;
	assert_err(__vcpu_command(KVMI_VCPU_SET_MSRS, 0, &set,
				  sizeof(set.req) + 2 * 16, NULL, 0),
		   -KVM_EINVAL);
	TEST_ASSERT_EQ(get_msr(MSR_LSTAR), MANY_MSRS - 1);
	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* What userspace doesn't let the guest write, the tool can't write either */
KVM_ONE_VCPU_TEST(kvmi, vcpu_set_msrs_filtered, guest_count)
{
	static struct set_msrs set = {
		.req.nmsrs = 1,
		.entries[0] = { .index = MSR_LSTAR, .data = 0x1000 },
	};
	u8 denied = 0;
	struct kvm_msr_filter filter = {
		.flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
		.ranges[0] = {
			.flags = KVM_MSR_FILTER_WRITE,
			.nmsrs = 1,
			.base = MSR_LSTAR,
			.bitmap = &denied,
		},
	};
	struct runner r;
	u32 done;

	vm_enable_cap(vcpu->vm, KVM_CAP_X86_USER_SPACE_MSR,
		      KVM_MSR_EXIT_REASON_FILTER);
	vm_ioctl(vcpu->vm, KVM_X86_SET_MSR_FILTER, &filter);
	hook(vcpu->vm);
	start(&r, vcpu);
	assert_err(set_msrs(&set, &done), 0);
	TEST_ASSERT_EQ(done, 0);
	TEST_ASSERT_EQ(get_msr(MSR_LSTAR), 0);
	stop_guest(&r);
	unhook(vcpu->vm);
}

static void begin_op(struct kvm_vm *vm, u64 what, u64 target, u64 arg,
		     u64 repeat)
{
	guest_write(vm, fault, 0);
	guest_write(vm, result, 0);
	guest_write(vm, op_target, target);
	guest_write(vm, op_arg, arg);
	guest_write(vm, op_repeat, repeat);
	guest_write(vm, op, what);
}

static u64 end_op(struct kvm_vm *vm)
{
	wait_for(guest_read(vm, op) == OP_NONE);
	return guest_read(vm, result);
}

static u64 do_op(struct kvm_vm *vm, u64 what, u64 target, u64 arg)
{
	begin_op(vm, what, target, arg, 0);
	return end_op(vm);
}

/* Asserts that there is no event, too: it would not return */
#define assert_op(vm, what, target, arg, res)				\
do {									\
	TEST_ASSERT_EQ(do_op(vm, what, target, arg), (u64)(res));	\
	TEST_ASSERT_EQ(guest_read(vm, fault), 0);			\
} while (0)

/* An instruction that changes something from one value to another */
struct insn {
	u16 event;
	u64 op;
	u64 target;
	u64 old;
	u64 new;
};

#define CR_INSN(cr, bit) { KVMI_VCPU_EVENT_CR, OP_CR, cr, 0, bit }
#define MSR_INSN(msr, old, new)						\
	{ KVMI_VCPU_EVENT_MSR, OP_WRMSR, msr, old, new }

static const struct insn insns[] = {
	CR_INSN(0, X86_CR0_WP),
	CR_INSN(3, BIT(3)),
	CR_INSN(4, X86_CR4_DE),		/* the guest's own on Intel */
	CR_INSN(4, X86_CR4_UMIP),
	MSR_INSN(MSR_KERNEL_GS_BASE, 0x1000, 0x2000),
	MSR_INSN(MSR_FS_BASE, 0x1000, 0x2000),
	MSR_INSN(MSR_IA32_SYSENTER_CS, 8, 16),
	MSR_INSN(MSR_IA32_CR_PAT, 0x0007040600070406, 0x0007040600070400),
	MSR_INSN(MSR_LSTAR, 0x1000, 0x2000),
	{ KVMI_VCPU_EVENT_XSETBV, OP_XSETBV, 0, 1, 3 },
	{ KVMI_VCPU_EVENT_HYPERCALL, OP_HYPERCALL, 0, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_LOAD, KVMI_DESC_IDTR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_LOAD, KVMI_DESC_GDTR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_LOAD, KVMI_DESC_LDTR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_LOAD, KVMI_DESC_TR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_STORE, KVMI_DESC_IDTR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_STORE, KVMI_DESC_GDTR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_STORE, KVMI_DESC_LDTR, 0, 0 },
	{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_STORE, KVMI_DESC_TR, 0, 0 },
};

/* Completes old and new, and sets the guest up; false: can't be tested */
static bool prepare_insn(struct kvm_vm *vm, struct insn *insn)
{
	u64 cr, saved;

	switch (insn->op) {
	case OP_CR:
		if (insn->new == X86_CR4_UMIP && !kvm_cpu_has(X86_FEATURE_UMIP))
			return false;
		/* Writes 0: fails, but tells the value; CR3 must be valid */
		if (insn->target == 3) {
			cr = vm->pgd;
		} else {
			cr = do_op(vm, OP_CR, insn->target, insn->target ?
				   0 : X86_CR0_PG);
			TEST_ASSERT_EQ(guest_read(vm, fault), GP_VECTOR);
			/* As it is from the first write on */
			if (!insn->target)
				cr |= X86_CR0_ET;
		}
		insn->old = cr & ~insn->new;
		insn->new |= cr;
		break;
	case OP_XSETBV:
		if (!kvm_cpu_has(X86_FEATURE_XSAVE))
			return false;
		break;
	case OP_DESC_LOAD:
		insn->old = insn->target;
		insn->new = insn->target;
		return true;
	case OP_DESC_STORE:
		saved = do_op(vm, insn->op, insn->target, 0);
		insn->old = saved;
		insn->new = saved;
		return true;
	case OP_HYPERCALL:
		insn->old = -KVM_ENOSYS;
		return true;
	}
	assert_op(vm, insn->op, insn->target, insn->old, insn->old);
	return true;
}

static void control_insn(struct insn *insn, u8 enable)
{
	if (insn->event == KVMI_VCPU_EVENT_CR)
		assert_err(control_cr(0, insn->target, enable), 0);
	if (insn->event == KVMI_VCPU_EVENT_MSR)
		assert_err(control_msr(0, insn->target, enable), 0);
}

static void enable_insn(struct insn *insn, u8 enable)
{
	assert_err(control_event(0, insn->event, enable), 0);
	control_insn(insn, enable);
}

static void begin_insn(struct kvm_vm *vm, struct insn *insn)
{
	begin_op(vm, insn->op, insn->target,
		 insn->op == OP_HYPERCALL ? 0 : insn->new, 0);
}

static void end_insn(struct kvm_vm *vm, u64 res)
{
	TEST_ASSERT_EQ(end_op(vm), res);
	TEST_ASSERT_EQ(guest_read(vm, fault), 0);
}

/* To the same state as before begin_insn() */
static void undo_insn(struct kvm_vm *vm, struct insn *insn)
{
	if (insn->op != OP_HYPERCALL)
		assert_op(vm, insn->op, insn->target, insn->old, insn->old);
}

static void get_insn_event(struct kvm_vm *vm, struct insn *insn,
			   struct event *ev)
{
	u64 old, new;

	get_event(ev, insn->event, 0);
	TEST_ASSERT_EQ(guest_read(vm, op), insn->op);
	switch (insn->event) {
	case KVMI_VCPU_EVENT_CR:
		TEST_ASSERT_EQ(ev->cr.cr, insn->target);
		old = ev->cr.old_value;
		new = ev->cr.new_value;
		break;
	case KVMI_VCPU_EVENT_MSR:
		TEST_ASSERT_EQ(ev->msr.msr, insn->target);
		TEST_ASSERT_EQ(ev->msr.padding, 0);
		old = ev->msr.old_value;
		new = ev->msr.new_value;
		break;
	case KVMI_VCPU_EVENT_XSETBV:
		TEST_ASSERT_EQ(ev->xsetbv.xcr, 0);
		old = ev->xsetbv.old_value;
		new = ev->xsetbv.new_value;
		break;
	case KVMI_VCPU_EVENT_DESCRIPTOR:
		TEST_ASSERT_EQ(ev->desc.descriptor, insn->target);
		TEST_ASSERT_EQ(ev->desc.write, insn->op == OP_DESC_LOAD);
		return;
	default:
		return;
	}
	TEST_ASSERT_EQ(old, insn->old);
	TEST_ASSERT_EQ(new, insn->new);
}

static bool has_value(const struct insn *insn)
{
	return insn->event == KVMI_VCPU_EVENT_CR ||
	       insn->event == KVMI_VCPU_EVENT_MSR;
}

static void continue_insn(const struct event *ev, const struct insn *insn)
{
	if (has_value(insn))
		reply_value(ev, KVMI_EVENT_ACTION_CONTINUE, insn->new);
	else
		reply_continue(ev);
}

typedef void (*insn_test_t)(struct runner *r, struct insn *insn);

/* In one session each */
static void for_each_insn(struct kvm_vcpu *vcpu, insn_test_t test)
{
	struct kvm_vm *vm = vcpu->vm;
	struct insn insn;
	struct runner r;
	int i;

	start(&r, vcpu);
	for (i = 0; i < ARRAY_SIZE(insns); i++) {
		insn = insns[i];
		pr_debug("event %u op %lu target %lx\n", insn.event,
			 (unsigned long)insn.op, (unsigned long)insn.target);
		hook(vm);
		if (prepare_insn(vm, &insn))
			test(&r, &insn);
		unhook(vm);
	}
	stop_guest(&r);
}

static void test_insn(struct runner *r, struct insn *insn)
{
	struct kvm_vm *vm = r->vcpu->vm;
	struct event ev;

	/* One without the other is nothing */
	if (has_value(insn)) {
		assert_err(control_event(0, insn->event, 1), 0);
		begin_insn(vm, insn);
		end_insn(vm, insn->new);
		undo_insn(vm, insn);
		assert_err(control_event(0, insn->event, 0), 0);
		control_insn(insn, 1);
		begin_insn(vm, insn);
		end_insn(vm, insn->new);
		undo_insn(vm, insn);
	}

	enable_insn(insn, 1);
	/* Nothing changes */
	if (insn->old != insn->new && insn->op != OP_HYPERCALL)
		undo_insn(vm, insn);

	begin_insn(vm, insn);
	get_insn_event(vm, insn, &ev);
	assert_quiet();
	continue_insn(&ev, insn);
	end_insn(vm, insn->new);

	/* Back, with an event */
	if (has_value(insn)) {
		begin_op(vm, insn->op, insn->target, insn->old, 0);
		get_event(&ev, insn->event, 0);
		/* Refused */
		reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, insn->new);
		end_insn(vm, insn->new);
		begin_op(vm, insn->op, insn->target, insn->old, 0);
		get_event(&ev, insn->event, 0);
		reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, insn->old);
		end_insn(vm, insn->old);
	}

	/* The guest gets what is wrong with the tool's value */
	if (insn->op == OP_CR && insn->target != 3) {
		begin_insn(vm, insn);
		get_insn_event(vm, insn, &ev);
		reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, BIT_ULL(40));
		TEST_ASSERT_EQ(end_op(vm), insn->old);
		TEST_ASSERT_EQ(guest_read(vm, fault), GP_VECTOR);
	}

	enable_insn(insn, 0);
	if (insn->op == OP_XSETBV)
		undo_insn(vm, insn);
	begin_insn(vm, insn);
	end_insn(vm, insn->op == OP_HYPERCALL ? insn->old : insn->new);
	undo_insn(vm, insn);
	assert_quiet();
}

KVM_ONE_VCPU_TEST(kvmi, event_insn, guest_serve)
{
	for_each_insn(vcpu, test_insn);
}

static void test_insn_retry(struct runner *r, struct insn *insn)
{
	struct kvm_vm *vm = r->vcpu->vm;
	struct event ev;
	u64 rip;

	if (insn->event != KVMI_VCPU_EVENT_DESCRIPTOR)
		return;

	enable_insn(insn, 1);
	begin_insn(vm, insn);
	get_insn_event(vm, insn, &ev);
	rip = ev.common.arch.regs.rip;
	reply_retry(&ev);
	get_insn_event(vm, insn, &ev);
	TEST_ASSERT_EQ(ev.common.arch.regs.rip, rip);
	enable_insn(insn, 0);
	reply_retry(&ev);
	end_insn(vm, insn->new);
}

KVM_ONE_VCPU_TEST(kvmi, event_insn_retry, guest_serve)
{
	for_each_insn(vcpu, test_insn_retry);
}

static void test_insn_crash(struct runner *r, struct insn *insn)
{
	struct kvm_vm *vm = r->vcpu->vm;
	struct event ev;

	enable_insn(insn, 1);
	begin_insn(vm, insn);
	get_insn_event(vm, insn, &ev);
	if (has_value(insn))
		reply_value(&ev, KVMI_EVENT_ACTION_CRASH, insn->new);
	else
		reply_crash(&ev);
	assert_crashed(r);

	/* It has not been done; XSETBV has */
	start(r, r->vcpu);
	if (insn->op != OP_XSETBV) {
		get_insn_event(vm, insn, &ev);
		continue_insn(&ev, insn);
	}
	end_insn(vm, insn->new);
	enable_insn(insn, 0);
	undo_insn(vm, insn);
}

KVM_ONE_VCPU_TEST(kvmi, event_insn_crash, guest_serve)
{
	for_each_insn(vcpu, test_insn_crash);
}

/* The tool goes: the guest does what it wanted, and what it does next */
static void test_insn_gone(struct runner *r, struct insn *insn)
{
	struct kvm_vm *vm = r->vcpu->vm;
	struct event ev;

	enable_insn(insn, 1);
	begin_insn(vm, insn);
	get_insn_event(vm, insn, &ev);
	tool_close();
	end_insn(vm, insn->op == OP_HYPERCALL ? insn->old : insn->new);
	undo_insn(vm, insn);
	begin_insn(vm, insn);
	end_insn(vm, insn->op == OP_HYPERCALL ? insn->old : insn->new);
	undo_insn(vm, insn);
}

KVM_ONE_VCPU_TEST(kvmi, event_insn_tool_gone, guest_serve)
{
	for_each_insn(vcpu, test_insn_gone);
}

/* A signal in between is not noticed */
static void test_insn_signal(struct runner *r, struct insn *insn)
{
	struct kvm_vm *vm = r->vcpu->vm;
	struct event ev;

	enable_insn(insn, 1);
	begin_insn(vm, insn);
	get_insn_event(vm, insn, &ev);
	interrupt(r);
	start(r, r->vcpu);
	assert_quiet();
	continue_insn(&ev, insn);
	end_insn(vm, insn->new);
	enable_insn(insn, 0);
	undo_insn(vm, insn);
}

KVM_ONE_VCPU_TEST(kvmi, event_insn_signal, guest_serve)
{
	for_each_insn(vcpu, test_insn_signal);
}

static u64 insn_exits(struct kvm_vm *vm, int stats, struct insn *insn)
{
	u64 exits = get_exits(stats);

	begin_op(vm, insn->op, insn->target, insn->new,
		 insn->new ^ insn->old ?: 1000);
	end_op(vm);
	return get_exits(stats) - exits;
}

/* The interception goes with the session, unless it is told to stay */
static void test_insn_cleanup(struct kvm_vcpu *vcpu, bool cleanup)
{
	/* Those that KVM does not intercept for itself */
	struct insn tested[] = {
		{ KVMI_VCPU_EVENT_CR, OP_CR, 3, 0, 1000 },
		MSR_INSN(MSR_KERNEL_GS_BASE, 0x1000, 0x1000 ^ 1000),
		{ KVMI_VCPU_EVENT_DESCRIPTOR, OP_DESC_STORE, KVMI_DESC_IDTR,
		  0, 0 },
	};
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	int stats, i;
	u64 exits;

	tested[0].old = vm->pgd;
	tested[0].new = vm->pgd;
	/* Not while the vCPU runs */
	stats = vcpu_get_stats_fd(vcpu);
	start(&r, vcpu);
	do_op(vm, OP_XMM_GET, 0, 0);
	for (i = 0; i < ARRAY_SIZE(tested); i++) {
		/* The same value: no event, but exits */
		bool desc = tested[i].event == KVMI_VCPU_EVENT_DESCRIPTOR;

		exits = insn_exits(vm, stats, &tested[i]);
		TEST_ASSERT(exits < 500, "case %d: %lu exits without a tool", i,
			    (unsigned long)exits);
		hook(vm);
		if (!cleanup)
			assert_err(control_cleanup(0), 0);
		enable_insn(&tested[i], 1);
		if (!desc) {
			assert_err(control_event(0, tested[i].event, 0), 0);
			exits = insn_exits(vm, stats, &tested[i]);
			TEST_ASSERT(exits > 900, "case %d: %lu exits", i,
				    (unsigned long)exits);
		}
		unhook(vm);
		exits = insn_exits(vm, stats, &tested[i]);
		TEST_ASSERT(cleanup ? exits < 500 : exits > 900,
			    "case %d: %lu exits afterwards", i,
			    (unsigned long)exits);
		if (!cleanup) {
			/* Nor is it forgotten how to end that */
			hook(vm);
			enable_insn(&tested[i], 0);
			unhook(vm);
			exits = insn_exits(vm, stats, &tested[i]);
			TEST_ASSERT(exits < 500, "case %d: %lu exits at last",
				    i, (unsigned long)exits);
		}
	}
	close(stats);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, event_insn_cleanup, guest_serve)
{
	test_insn_cleanup(vcpu, true);
}

KVM_ONE_VCPU_TEST(kvmi, event_insn_cleanup_off, guest_serve)
{
	test_insn_cleanup(vcpu, false);
}

/* A reply without its value, or with one too many, ends the session */
KVM_ONE_VCPU_TEST(kvmi, event_insn_bad_reply, guest_serve)
{
	struct insn msr = MSR_INSN(MSR_KERNEL_GS_BASE, 0x1000, 0x2000);
	struct insn cr = CR_INSN(4, X86_CR4_DE);
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start(&r, vcpu);
	hook(vm);
	TEST_ASSERT(prepare_insn(vm, &msr) && prepare_insn(vm, &cr), "insns");
	enable_insn(&msr, 1);
	begin_insn(vm, &msr);
	get_insn_event(vm, &msr, &ev);
	reply_continue(&ev);
	assert_closed();
	end_insn(vm, msr.new);
	unhook(vm);

	hook(vm);
	enable_insn(&cr, 1);
	begin_insn(vm, &cr);
	get_insn_event(vm, &cr, &ev);
	reply_value(&ev, KVMI_EVENT_ACTION_RETRY, cr.new);
	assert_closed();
	end_insn(vm, cr.new);
	unhook(vm);

	hook(vm);
	assert_err(control_event(0, KVMI_VCPU_EVENT_HYPERCALL, 1), 0);
	begin_op(vm, OP_HYPERCALL, 0, 0, 0);
	get_event(&ev, KVMI_VCPU_EVENT_HYPERCALL, 0);
	reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, 0);
	assert_closed();
	end_insn(vm, -KVM_ENOSYS);
	unhook(vm);
	stop_guest(&r);
}

/* Registers that the tool sets; the instruction is stepped over all the same */
KVM_ONE_VCPU_TEST(kvmi, event_cr_set_rip, guest_serve)
{
	struct insn insn = CR_INSN(4, X86_CR4_DE);
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;

	start(&r, vcpu);
	hook(vm);
	TEST_ASSERT(prepare_insn(vm, &insn), "CR4.DE");
	enable_insn(&insn, 1);
	begin_op(vm, OP_CR4_SKIP, 0, insn.new, 0);
	get_event(&ev, KVMI_VCPU_EVENT_CR, 0);
	TEST_ASSERT_EQ(ev.common.arch.regs.rip + 3, (u64)cr4_next);
	reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, insn.old);
	end_insn(vm, 2);

	begin_op(vm, OP_CR4_SKIP, 0, insn.new, 0);
	get_event(&ev, KVMI_VCPU_EVENT_CR, 0);
	regs = ev.common.arch.regs;
	regs.rip += cr4_skip - cr4_next;
	regs.rbx = 7;
	/* Not the one that is written */
	regs.rax = 0;
	assert_err(set_registers(0, &regs), 0);
	reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, insn.old);
	end_insn(vm, 7);
	unhook(vm);
	assert_op(vm, OP_CR, 4, insn.old, insn.old);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, event_cr_lmsw, guest_serve)
{
	struct kvm_vm *vm = vcpu->vm;
	struct insn insn = CR_INSN(0, X86_CR0_EM);
	struct event ev;
	struct runner r;

	start(&r, vcpu);
	hook(vm);
	TEST_ASSERT(prepare_insn(vm, &insn), "CR0.EM");
	enable_insn(&insn, 1);
	begin_op(vm, OP_LMSW, 0, insn.new & 0xf, 0);
	get_event(&ev, KVMI_VCPU_EVENT_CR, 0);
	TEST_ASSERT_EQ(ev.cr.cr, 0);
	TEST_ASSERT_EQ(ev.cr.old_value, insn.old);
	TEST_ASSERT_EQ(ev.cr.new_value, insn.new);
	reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, insn.old);
	end_insn(vm, insn.old);
	unhook(vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_control_cr_errors, guest_serve)
{
	struct kvmi_vcpu_control_cr req = { .cr = 4, .enable = 1 };
	struct runner r;
	int i;

	hook(vcpu->vm);
	start(&r, vcpu);
	req.padding1 = 1;
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_CR, 0, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_CR, 0, &req), -KVM_EINVAL);
	assert_err(control_cr(0, 4, 2), -KVM_EINVAL);
	for (i = 0; i < 256; i++)
		assert_err(control_cr(0, i, 0),
			   i == 0 || i == 3 || i == 4 ? 0 : -KVM_EINVAL);
	/* Twice is not an error */
	assert_err(control_cr(0, 3, 1), 0);
	assert_err(control_cr(0, 3, 1), 0);
	assert_err(control_cr(0, 3, 0), 0);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_control_msr_errors, guest_serve)
{
	struct kvmi_vcpu_control_msr req = { .msr = 0x10, .enable = 1 };
	u64 bitmap = ~BIT_ULL(2);
	struct kvm_msr_filter filter = {
		.flags = KVM_MSR_FILTER_DEFAULT_ALLOW,
		.ranges[0] = {
			.flags = KVM_MSR_FILTER_WRITE,
			.base = MSR_IA32_SYSENTER_CS - 2,
			.nmsrs = 3,
			.bitmap = (u8 *)&bitmap,
		},
	};
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	req.padding1 = 1;
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_MSR, 0, &req), -KVM_EINVAL);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(vcpu_command(KVMI_VCPU_CONTROL_MSR, 0, &req), -KVM_EINVAL);
	assert_err(control_msr(0, 0, 2), -KVM_EINVAL);
	assert_err(control_msr(0, 0x2000, 1), -KVM_EINVAL);
	assert_err(control_msr(0, 0x2000, 0), -KVM_EINVAL);
	assert_err(control_msr(0, 0xbfffffff, 1), -KVM_EINVAL);
	assert_err(control_msr(0, 0xc0002000, 1), -KVM_EINVAL);
	assert_err(control_msr(0, 0xffffffff, 1), -KVM_EINVAL);
	/* Before the first is enabled, too */
	assert_err(control_msr(0, 0, 0), 0);
	assert_err(control_msr(0, 0x1fff, 1), 0);
	assert_err(control_msr(0, 0xc0000000, 1), 0);
	assert_err(control_msr(0, 0xc0001fff, 1), 0);
	assert_err(control_msr(0, 0xc0001fff, 1), 0);
	assert_err(control_msr(0, 0xc0001fff, 0), 0);

	vm_ioctl(vm, KVM_X86_SET_MSR_FILTER, &filter);
	assert_err(control_msr(0, MSR_IA32_SYSENTER_CS, 1), -KVM_EPERM);
	assert_err(control_msr(0, MSR_IA32_SYSENTER_CS, 0), 0);
	assert_err(control_msr(0, MSR_IA32_SYSENTER_CS - 1, 1), 0);
	stop_guest(&r);
	unhook(vm);
}

/* MSRs that KVM writes on a fast path */
KVM_ONE_VCPU_TEST(kvmi, event_msr_x2apic, guest_serve)
{
	static const u32 msrs[] = { 0x808 /* TPR */, 0x830 /* ICR */ };
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	u64 val;
	int i;

	start(&r, vcpu);
	val = 0xfee00000 | MSR_IA32_APICBASE_ENABLE | MSR_IA32_APICBASE_BSP |
	      X2APIC_ENABLE;
	assert_op(vm, OP_WRMSR, MSR_IA32_APICBASE, val, val);
	hook(vm);
	assert_err(control_event(0, KVMI_VCPU_EVENT_MSR, 1), 0);
	for (i = 0; i < ARRAY_SIZE(msrs); i++) {
		/* To nobody: logical, no destination */
		val = msrs[i] == 0x830 ? 0x840 : 0x10;
		assert_err(control_msr(0, msrs[i], 1), 0);
		begin_op(vm, OP_WRMSR, msrs[i], val, 0);
		get_event(&ev, KVMI_VCPU_EVENT_MSR, 0);
		TEST_ASSERT_EQ(ev.msr.msr, msrs[i]);
		TEST_ASSERT_EQ(ev.msr.new_value, val);
		reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, val);
		end_insn(vm, val);
		assert_err(control_msr(0, msrs[i], 0), 0);
		val ^= msrs[i] == 0x830 ? 0x100 : 0x30;
		assert_op(vm, OP_WRMSR, msrs[i], val, val);
	}
	stop_guest(&r);
	unhook(vm);
}

/* Userspace, which wants MSRs that KVM lacks, gets what the tool has said */
KVM_ONE_VCPU_TEST(kvmi, event_msr_user_space, guest_serve)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	vm_enable_cap(vm, KVM_CAP_X86_USER_SPACE_MSR,
		      KVM_MSR_EXIT_REASON_UNKNOWN);
	hook(vm);
	start(&r, vcpu);
	assert_err(control_event(0, KVMI_VCPU_EVENT_MSR, 1), 0);
	assert_err(control_msr(0, 0x1ffe, 1), 0);
	begin_op(vm, OP_WRMSR, 0x1ffe, 5, 0);
	get_event(&ev, KVMI_VCPU_EVENT_MSR, 0);
	TEST_ASSERT_EQ(ev.msr.old_value, 0);
	TEST_ASSERT_EQ(ev.msr.new_value, 5);
	reply_value(&ev, KVMI_EVENT_ACTION_CONTINUE, 6);
	join(&r);
	TEST_ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_X86_WRMSR);
	TEST_ASSERT_EQ(vcpu->run->msr.index, 0x1ffe);
	TEST_ASSERT_EQ(vcpu->run->msr.data, 6);

	/* It is read back */
	start(&r, vcpu);
	join(&r);
	TEST_ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_X86_RDMSR);
	vcpu->run->msr.data = 6;
	start(&r, vcpu);
	end_insn(vm, 6);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* Another function of the same hypercall */
KVM_ONE_VCPU_TEST(kvmi, event_hypercall_other, guest_serve)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	assert_err(control_event(0, KVMI_VCPU_EVENT_HYPERCALL, 1), 0);
	assert_op(vm, OP_HYPERCALL, 0, 1, -KVM_ENOSYS);
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_cpuid, guest_serve)
{
	struct kvmi_vcpu_get_cpuid_reply rpl;
	struct kvm_cpuid_entry2 *entry;
	struct kvmi_vcpu_get_cpuid req;
	struct runner r;
	int i;

	hook(vcpu->vm);
	start(&r, vcpu);
	for (i = 0; i < vcpu->cpuid->nent; i++) {
		entry = &vcpu->cpuid->entries[i];
		req.function = entry->function;
		req.index = entry->index;
		assert_err(__vcpu_command(KVMI_VCPU_GET_CPUID, 0, &req,
					  sizeof(req), &rpl, sizeof(rpl)), 0);
		/* KVM follows the guest in these */
		if (req.function == 1 || req.function == 7 ||
		    req.function == 0xd)
			continue;
		TEST_ASSERT(rpl.eax == entry->eax && rpl.ebx == entry->ebx &&
			    rpl.ecx == entry->ecx && rpl.edx == entry->edx,
			    "leaf %x %x", req.function, req.index);
	}
	req.function = 0x3fffffff;
	req.index = 0;
	assert_err(vcpu_command(KVMI_VCPU_GET_CPUID, 0, &req), -KVM_ENOENT);
	stop_guest(&r);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_xcr, guest_serve)
{
	struct kvmi_vcpu_get_xcr req = {};
	struct kvmi_vcpu_get_xcr_reply rpl;
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	if (kvm_cpu_has(X86_FEATURE_XSAVE))
		assert_op(vm, OP_XSETBV, 0, 3, 3);
	assert_err(__vcpu_command(KVMI_VCPU_GET_XCR, 0, &req, sizeof(req),
				  &rpl, sizeof(rpl)), 0);
	if (kvm_cpu_has(X86_FEATURE_XSAVE))
		TEST_ASSERT_EQ(rpl.value, 3);
	req.xcr = 1;
	assert_err(vcpu_command(KVMI_VCPU_GET_XCR, 0, &req), -KVM_EINVAL);
	req.xcr = 0;
	req.padding[6] = 1;
	assert_err(vcpu_command(KVMI_VCPU_GET_XCR, 0, &req), -KVM_EINVAL);
	stop_guest(&r);
	unhook(vm);
}

/*
 * XMM15 in the FXSAVE area, XSTATE_BV and XCOMP_BV behind it, and what YMM15
 * has more than XMM15
 */
#define XMM15(xsave)    (*(u64 *)((u8 *)(xsave) + 400))
#define YMM15_HIGH(xsave) (*(u64 *)((u8 *)(xsave) + 816))
#define XSTATE_BV(xsave) (*(u64 *)((u8 *)(xsave) + 512))
#define XCOMP_BV(xsave)  (*(u64 *)((u8 *)(xsave) + 520))

/*
 * What is in the CPU counts, not what it was when the vCPU's thread slept last.
 * On a host with more than one CPU it hasn't slept.
 */
KVM_ONE_VCPU_TEST(kvmi, vcpu_get_xsave_live, guest_count_fpu)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_xsave xsave;
	struct event ev;
	struct runner r;
	u64 before, xmm;
	int i;

	hook(vm);
	start(&r, vcpu);
	assert_guest_runs(vm);
	for (i = 0; i < 50; i++) {
		before = guest_read(vm, counter);
		/* Now and then with an event, in which the vCPU waits */
		if (i % 10 == 9) {
			assert_err(pause_vcpu(0, 0), 0);
			get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
		}
		assert_err(__vcpu_command(KVMI_VCPU_GET_XSAVE, 0, NULL, 0,
					  &xsave, sizeof(xsave)), 0);
		if (i % 10 == 9)
			reply_continue(&ev);
		xmm = XMM15(&xsave);
		TEST_ASSERT(xmm >= before, "0x%lx, should be 0x%lx or more",
			    (unsigned long)xmm, (unsigned long)before);
		if (kvm_cpu_has(HAS_AVX))
			TEST_ASSERT_EQ(YMM15_HIGH(&xsave), xmm);
		/* It runs on while nobody asks */
		wait_for(guest_read(vm, counter) > xmm);
	}
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_xsave, guest_serve)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_xsave xsave, old;
	struct runner r;
	u64 saved;

	hook(vm);
	start(&r, vcpu);
	do_op(vm, OP_XMM_SET, 0, 0x1122334455667788);
	assert_err(__vcpu_command(KVMI_VCPU_GET_XSAVE, 0, NULL, 0, &xsave,
				  sizeof(xsave)), 0);
	TEST_ASSERT_EQ(XMM15(&xsave), 0x1122334455667788);
	assert_op(vm, OP_XMM_GET, 0, 0, 0x1122334455667788);

	XMM15(&xsave) = 0x99;
	assert_err(vcpu_command(KVMI_VCPU_SET_XSAVE, 0, &xsave), 0);
	assert_op(vm, OP_XMM_GET, 0, 0, 0x99);

	/* Refused as a whole */
	old = xsave;
	XMM15(&xsave) = 0x98;
	if (kvm_cpu_has(X86_FEATURE_XSAVE)) {
		saved = XSTATE_BV(&xsave);
		XSTATE_BV(&xsave) |= BIT_ULL(62);
		assert_err(vcpu_command(KVMI_VCPU_SET_XSAVE, 0, &xsave),
			   -KVM_EINVAL);
		XSTATE_BV(&xsave) = saved;
		XCOMP_BV(&xsave) = 1;
		assert_err(vcpu_command(KVMI_VCPU_SET_XSAVE, 0, &xsave),
			   -KVM_EINVAL);
		XCOMP_BV(&xsave) = 0;
	}
	/* MXCSR */
	xsave.region[6] = -1u;
	assert_err(vcpu_command(KVMI_VCPU_SET_XSAVE, 0, &xsave), -KVM_EINVAL);
	assert_err(__vcpu_command(KVMI_VCPU_SET_XSAVE, 0, &xsave,
				  sizeof(xsave) - 1, NULL, 0), -KVM_EINVAL);
	assert_op(vm, OP_XMM_GET, 0, 0, 0x99);

	/* As userspace has it */
	stop_guest(&r);
	unhook(vm);
	vcpu_xsave_get(vcpu, &xsave);
	TEST_ASSERT_EQ(XMM15(&xsave), XMM15(&old));
}

static u8 get_mtrr_type(u64 gpa)
{
	struct kvmi_vcpu_get_mtrr_type req = { .gpa = gpa };
	struct kvmi_vcpu_get_mtrr_type_reply rpl;
	static const u8 zeroes[7];

	assert_err(__vcpu_command(KVMI_VCPU_GET_MTRR_TYPE, 0, &req, sizeof(req),
				  &rpl, sizeof(rpl)), 0);
	TEST_ASSERT(!memcmp(rpl.padding, zeroes, sizeof(zeroes)), "padding");
	return rpl.type;
}

KVM_ONE_VCPU_TEST(kvmi, vcpu_get_mtrr_type, guest_serve)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;

	vcpu_set_msr(vcpu, 0x250, 0x0606060606060506);	/* 64 KiB each */
	vcpu_set_msr(vcpu, 0x259, 0x0000000000000001);	/* from 640 KiB on */
	vcpu_set_msr(vcpu, 0x26f, 0x0400000000000000);	/* to 1 MiB */
	/* 2 MiB of WB at 16 MiB, its second half WT, the last page UC */
	vcpu_set_msr(vcpu, 0x200, 0x1000006);
	vcpu_set_msr(vcpu, 0x201, 0xfffe00800);
	vcpu_set_msr(vcpu, 0x202, 0x1100004);
	vcpu_set_msr(vcpu, 0x203, 0xffff00800);
	vcpu_set_msr(vcpu, 0x204, 0x11ff000);
	vcpu_set_msr(vcpu, 0x205, 0xffffff800);
	/* Not valid */
	vcpu_set_msr(vcpu, 0x206, 0x2000006);
	vcpu_set_msr(vcpu, 0x207, 0xfffe00000);
	vcpu_set_msr(vcpu, 0x2ff, 0xc01);
	hook(vm);
	start(&r, vcpu);
	TEST_ASSERT_EQ(get_mtrr_type(0), 6);
	TEST_ASSERT_EQ(get_mtrr_type(0x10000), 5);
	TEST_ASSERT_EQ(get_mtrr_type(0x1ffff), 5);
	TEST_ASSERT_EQ(get_mtrr_type(0x20000), 6);
	TEST_ASSERT_EQ(get_mtrr_type(0xa0000), 1);
	TEST_ASSERT_EQ(get_mtrr_type(0xa4000), 0);
	TEST_ASSERT_EQ(get_mtrr_type(0xfffff), 4);
	TEST_ASSERT_EQ(get_mtrr_type(0x100000), 1);
	TEST_ASSERT_EQ(get_mtrr_type(0x1000000), 6);
	TEST_ASSERT_EQ(get_mtrr_type(0x1100000), 4);
	TEST_ASSERT_EQ(get_mtrr_type(0x11fefff), 4);
	TEST_ASSERT_EQ(get_mtrr_type(0x11ff000), 0);
	TEST_ASSERT_EQ(get_mtrr_type(0x1200000), 1);
	TEST_ASSERT_EQ(get_mtrr_type(0x2000000), 1);
	interrupt(&r);
	vcpu_set_msr(vcpu, 0x2ff, 0x801);
	start(&r, vcpu);
	TEST_ASSERT_EQ(get_mtrr_type(0x10000), 1);
	interrupt(&r);
	vcpu_set_msr(vcpu, 0x2ff, 0x401);
	start(&r, vcpu);
	TEST_ASSERT_EQ(get_mtrr_type(0x1000000), 0);
	stop_guest(&r);
	unhook(vm);
}

/* Single-step and injected exceptions */

/* Page access */

#define ACCESS_R   KVMI_PAGE_ACCESS_R
#define ACCESS_W   KVMI_PAGE_ACCESS_W
#define ACCESS_X   KVMI_PAGE_ACCESS_X
#define ACCESS_ALL (ACCESS_R | ACCESS_W | ACCESS_X)
#define NR_PAGES   4

enum access_op {
	DO_NONE, DO_READ, DO_WRITE, DO_EXEC, DO_ADD, DO_CMPXCHG, DO_XCHG16,
	DO_CROSS, DO_MOVS, DO_PUSH, DO_SSE, DO_INT, DO_DONE
};

static u64 order;
static u64 target;	/* gva of NR_PAGES pages */
static u64 other;

/* Does with its pages what it is told */
static void guest_access(void)
{
	u64 op, src, dst, len, rsp;

	for (;;) {
		op = READ_ONCE(order);
		switch (op) {
		case DO_NONE:
			/* There are emulated hosts that want it to exit */
			cpuid(0, &(u32){0}, &(u32){0}, &(u32){0}, &(u32){0});
			continue;
		case DO_READ:
			WRITE_ONCE(result, READ_ONCE(*(u64 *)target));
			break;
		case DO_WRITE:
			WRITE_ONCE(*(u64 *)target, 0x77);
			break;
		case DO_EXEC:
			((void (*)(void))target)();
			break;
		case DO_ADD:
			asm volatile("lock addq $5, (%0)" : : "r"(target)
				     : "memory", "cc");
			break;
		case DO_CMPXCHG:
			src = 0;
			asm volatile("lock cmpxchgq %2, (%1)" : "+a"(src)
				     : "r"(target), "r"(9ul) : "memory", "cc");
			break;
		case DO_XCHG16:
			asm volatile("lock cmpxchg16b (%0)" : : "r"(target),
				     "a"(0ul), "d"(0ul), "b"(3ul), "c"(4ul)
				     : "memory", "cc");
			break;
		case DO_CROSS:
			WRITE_ONCE(*(u64 *)(target + PAGE_SIZE - 4),
				   0x1122334455667788);
			break;
		case DO_MOVS:
			src = other;
			dst = target + PAGE_SIZE - 64;
			len = 128;
			asm volatile("rep movsb" : "+S"(src), "+D"(dst),
				     "+c"(len) : : "memory");
			break;
		case DO_PUSH:
			/* Reads one page and writes another */
			rsp = target + 0x100;
			src = other;
			asm volatile("xchg %0, %%rsp\n"
				     "pushq (%1)\n"
				     "xchg %0, %%rsp" : "+r"(rsp) : "r"(src)
				     : "memory");
			WRITE_ONCE(result, rsp);
			break;
		case DO_SSE:
			/* Not known to KVM's emulator */
			asm volatile("pxor %%xmm0, %%xmm0\n"
				     "paddd (%1), %%xmm0\n"
				     "movq %%xmm0, %0" : "=r"(src)
				     : "r"(target) : "xmm0", "memory");
			WRITE_ONCE(result, src);
			break;
		case DO_INT:
			asm volatile("int $0x40" : : : "memory");
			break;
		case DO_DONE:
			GUEST_DONE();
		}
		WRITE_ONCE(counter, counter + 1);
		WRITE_ONCE(order, DO_NONE);
	}
}

static int get_page_access(u64 gpa, u8 *access)
{
	struct kvmi_vm_get_page_access req = { .gpa = gpa };
	struct kvmi_vm_get_page_access_reply rpl = {};
	int err;

	err = __command(KVMI_VM_GET_PAGE_ACCESS, &req, sizeof(req), &rpl,
			sizeof(rpl));
	*access = rpl.access;
	return err;
}

static void assert_page_access(u64 gpa, u8 access)
{
	u8 is;

	assert_err(get_page_access(gpa, &is), 0);
	TEST_ASSERT_EQ(is, access);
}

static void give_order(struct kvm_vm *vm, enum access_op op)
{
	guest_write(vm, order, op);
}

static void wait_order(struct kvm_vm *vm)
{
	wait_for(guest_read(vm, order) == DO_NONE);
	TEST_ASSERT(!tool.nr_events && !readable(0), "an event too many");
}

static void get_pf(struct event *ev, u64 gva, u64 gpa, u8 access)
{
	get_event(ev, KVMI_VCPU_EVENT_PF, 0);
	TEST_ASSERT(ev->pf.gva == gva && ev->pf.gpa == gpa &&
		    ev->pf.access == access && !ev->pf.flags,
		    "PF event gva %llx gpa %llx access %u flags %u, should be %lx %lx %u 0",
		    ev->pf.gva, ev->pf.gpa, ev->pf.access, ev->pf.flags, gva,
		    gpa, access);
	TEST_ASSERT(!ev->pf.padding2 && !ev->pf.padding3, "padding");
}

static void pass_pf(u64 gva, u64 gpa, u8 access)
{
	struct event ev;

	get_pf(&ev, gva, gpa, access);
	reply_continue(&ev);
}

/* Starts guest_access() with its pages mapped and used; returns target's gpa */
static u64 start_access(struct runner *r, struct kvm_vcpu *vcpu, u64 *gva)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 gpa;

	*gva = vm_vaddr_alloc_pages(vm, NR_PAGES);
	gpa = addr_gva2gpa(vm, *gva);
	TEST_ASSERT_EQ(addr_gva2gpa(vm, *gva + PAGE_SIZE), gpa + PAGE_SIZE);
	*(u8 *)addr_gva2hva(vm, *gva) = 0xc3;	/* RET */
	guest_write(vm, target, *gva);
	guest_write(vm, other, *gva + 3 * PAGE_SIZE);

	hook(vm);
	start(r, vcpu);
	assert_err(control_event(0, KVMI_VCPU_EVENT_PF, 1), 0);
	give_order(vm, DO_CROSS);
	wait_order(vm);

	return gpa;
}

static void stop_access(struct runner *r)
{
	give_order(r->vcpu->vm, DO_DONE);
	join_done(r);
}

KVM_ONE_VCPU_TEST(kvmi, page_access_errors, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvmi_page_access_entry e[3] = {};
	struct kvmi_vm_set_page_access req = {};
	struct runner r;
	u64 gva, gpa;
	u8 access;

	gpa = start_access(&r, vcpu, &gva);

	req.padding1 = 1;
	assert_err(command(KVMI_VM_SET_PAGE_ACCESS, &req), -KVM_EINVAL);
	req = (struct kvmi_vm_set_page_access) { .padding2 = 1 };
	assert_err(command(KVMI_VM_SET_PAGE_ACCESS, &req), -KVM_EINVAL);
	req = (struct kvmi_vm_set_page_access) { .count = 1 };
	assert_err(command(KVMI_VM_SET_PAGE_ACCESS, &req), -KVM_EINVAL);
	req = (struct kvmi_vm_set_page_access) { .count = 0xffff };
	assert_err(command(KVMI_VM_SET_PAGE_ACCESS, &req), -KVM_EINVAL);
	assert_err(__command(KVMI_VM_SET_PAGE_ACCESS, &req, 4, NULL, 0),
		   -KVM_EINVAL);
	req.count = 0;
	assert_err(command(KVMI_VM_SET_PAGE_ACCESS, &req), 0);

	assert_err(set_page_access(UNMAPPED_GPA, ACCESS_R), -KVM_EINVAL);
	assert_err(set_page_access(-1ull, ACCESS_R), -KVM_EINVAL);
	assert_err(set_page_access(gpa, ACCESS_ALL + 1), -KVM_EINVAL);
	assert_err(set_page_access(gpa, 0x80), -KVM_EINVAL);
	e[0].padding[6] = 1;
	e[0].gpa = gpa;
	assert_err(set_page_access_n(e, 1), -KVM_EINVAL);
	assert_page_access(gpa, ACCESS_ALL);

	/* The others are done nevertheless */
	memset(e, 0, sizeof(e));
	e[0].gpa = gpa + 5;
	e[0].access = ACCESS_R;
	e[1].gpa = UNMAPPED_GPA;
	e[2].gpa = gpa + PAGE_SIZE;
	e[2].access = ACCESS_X | ACCESS_R;
	assert_err(set_page_access_n(e, 3), -KVM_EINVAL);
	assert_page_access(gpa, ACCESS_R);
	assert_page_access(gpa + PAGE_SIZE - 1, ACCESS_R);
	assert_page_access(gpa + PAGE_SIZE, ACCESS_R | ACCESS_X);
	assert_page_access(gpa + 2 * PAGE_SIZE, ACCESS_ALL);
	assert_page_access(gpa - PAGE_SIZE, ACCESS_ALL);

	assert_err(get_page_access(UNMAPPED_GPA, &access), -KVM_ENOENT);
	assert_err(__command(KVMI_VM_GET_PAGE_ACCESS, &gpa, 7, NULL, 0),
		   -KVM_EINVAL);

	unhook(vm);
	stop_access(&r);
}

KVM_ONE_VCPU_TEST(kvmi, page_access_max_gfn, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvmi_vm_get_max_gfn_reply rpl;
	u64 top = EXTRA_GPA / PAGE_SIZE + 3;

	hook(vm);
	assert_err(__command(KVMI_VM_GET_MAX_GFN, NULL, 0, &rpl, sizeof(rpl)),
		   0);
	TEST_ASSERT(rpl.gfn && rpl.gfn < top, "gfn %llx", rpl.gfn);

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, 4, 0);
	assert_err(__command(KVMI_VM_GET_MAX_GFN, NULL, 0, &rpl, sizeof(rpl)),
		   0);
	TEST_ASSERT_EQ(rpl.gfn, top);
	unhook(vm);
}

/* Each set of rights with each access, of a page that is mapped */
KVM_ONE_VCPU_TEST(kvmi, page_access_matrix, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	static const struct {
		enum access_op op;
		u8 access;
	} ops[] = {
		{ DO_READ, ACCESS_R }, { DO_WRITE, ACCESS_W },
		{ DO_EXEC, ACCESS_X }
	};
	u8 *page, access, i;
	struct runner r;
	struct event ev;
	u64 gva, gpa;

	gpa = start_access(&r, vcpu, &gva);
	page = addr_gva2hva(vm, gva);

	for (access = 0; access <= ACCESS_ALL; access++) {
		/* With all rights on first, so that it is mapped */
		assert_err(set_page_access(gpa, ACCESS_ALL), 0);
		give_order(vm, DO_WRITE);
		wait_order(vm);
		WRITE_ONCE(*(u64 *)page, 0xc3);

		assert_err(set_page_access(gpa, access), 0);
		for (i = 0; i < ARRAY_SIZE(ops); i++) {
			WRITE_ONCE(*(u64 *)page, 0xc3);
			guest_write(vm, result, 0);
			give_order(vm, ops[i].op);
			if (!(access & ops[i].access)) {
				get_pf(&ev, gva, gpa, ops[i].access);
				TEST_ASSERT_EQ(READ_ONCE(*(u64 *)page), 0xc3);
				reply_continue(&ev);
			}
			wait_order(vm);
			if (ops[i].op == DO_READ)
				TEST_ASSERT_EQ(guest_read(vm, result), 0xc3);
			if (ops[i].op == DO_WRITE)
				TEST_ASSERT_EQ(READ_ONCE(*(u64 *)page), 0x77);
		}
		assert_page_access(gpa, access);
	}

	unhook(vm);
	stop_access(&r);
}

/* The accesses of one instruction, in their order, each once */
KVM_ONE_VCPU_TEST(kvmi, page_access_instructions, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	u64 gva, gpa, *page;

	gpa = start_access(&r, vcpu, &gva);
	page = addr_gva2hva(vm, gva);
	assert_err(set_page_access(gpa, 0), 0);
	assert_err(set_page_access(gpa + PAGE_SIZE, ACCESS_R), 0);
	assert_err(set_page_access(gpa + 3 * PAGE_SIZE, ACCESS_W), 0);

	*page = 1;
	give_order(vm, DO_ADD);
	pass_pf(gva, gpa, ACCESS_R);
	pass_pf(gva, gpa, ACCESS_W);
	wait_order(vm);
	TEST_ASSERT_EQ(*page, 6);

	*page = 0;
	give_order(vm, DO_CMPXCHG);
	pass_pf(gva, gpa, ACCESS_R);
	pass_pf(gva, gpa, ACCESS_W);
	wait_order(vm);
	TEST_ASSERT_EQ(*page, 9);

	give_order(vm, DO_CROSS);
	pass_pf(gva + PAGE_SIZE - 4, gpa + PAGE_SIZE - 4, ACCESS_W);
	pass_pf(gva + PAGE_SIZE, gpa + PAGE_SIZE, ACCESS_W);
	wait_order(vm);
	TEST_ASSERT_EQ(*(u64 *)((u8 *)page + PAGE_SIZE - 4),
		       0x1122334455667788);

	memset((u8 *)page + 3 * PAGE_SIZE, 0x42, 128);
	give_order(vm, DO_MOVS);
	pass_pf(gva + 3 * PAGE_SIZE, gpa + 3 * PAGE_SIZE, ACCESS_R);
	pass_pf(gva + PAGE_SIZE - 64, gpa + PAGE_SIZE - 64, ACCESS_W);
	get_pf(&ev, gva + PAGE_SIZE, gpa + PAGE_SIZE, ACCESS_W);
	/* In the middle of it */
	TEST_ASSERT_EQ(ev.common.arch.regs.rcx, 64);
	reply_continue(&ev);
	wait_order(vm);
	TEST_ASSERT(!memcmp((u8 *)page + PAGE_SIZE - 64,
			    (u8 *)page + 3 * PAGE_SIZE, 128), "not copied");

	give_order(vm, DO_PUSH);
	pass_pf(gva + 3 * PAGE_SIZE, gpa + 3 * PAGE_SIZE, ACCESS_R);
	pass_pf(gva + 0xf8, gpa + 0xf8, ACCESS_W);
	wait_order(vm);
	TEST_ASSERT_EQ(page[0xf8 / 8], 0x4242424242424242);
	TEST_ASSERT_EQ(guest_read(vm, result), gva + 0xf8);

	unhook(vm);
	stop_access(&r);
}

KVM_ONE_VCPU_TEST(kvmi, page_access_retry, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	u64 gva, gpa, *page;

	gpa = start_access(&r, vcpu, &gva);
	page = addr_gva2hva(vm, gva);
	assert_err(set_page_access(gpa, ACCESS_R | ACCESS_X), 0);

	/* It faults again and again until the tool gives way */
	*page = 1;
	give_order(vm, DO_ADD);
	get_pf(&ev, gva, gpa, ACCESS_W);
	reply_retry(&ev);
	get_pf(&ev, gva, gpa, ACCESS_W);
	TEST_ASSERT_EQ(*page, 1);
	assert_err(set_page_access(gpa, ACCESS_ALL), 0);
	reply_retry(&ev);
	wait_order(vm);
	TEST_ASSERT_EQ(*page, 6);

	/* What it was granted for one instruction it has to ask for again */
	assert_err(set_page_access(gpa, 0), 0);
	give_order(vm, DO_ADD);
	pass_pf(gva, gpa, ACCESS_R);
	get_pf(&ev, gva, gpa, ACCESS_W);
	reply_retry(&ev);
	pass_pf(gva, gpa, ACCESS_R);
	pass_pf(gva, gpa, ACCESS_W);
	wait_order(vm);
	TEST_ASSERT_EQ(*page, 11);

	/* Skipped by the tool */
	assert_err(set_page_access(gpa, ACCESS_R), 0);
	*page = 0xc3;
	give_order(vm, DO_EXEC);
	get_pf(&ev, gva, gpa, ACCESS_X);
	ev.common.arch.regs.rip =
		*(u64 *)addr_gva2hva(vm, ev.common.arch.regs.rsp);
	ev.common.arch.regs.rsp += 8;
	assert_err(set_registers(0, &ev.common.arch.regs), 0);
	reply_retry(&ev);
	wait_order(vm);

	unhook(vm);
	stop_access(&r);
}

KVM_ONE_VCPU_TEST(kvmi, page_access_crash, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	u64 gva, gpa;

	gpa = start_access(&r, vcpu, &gva);
	assert_err(set_page_access(gpa, ACCESS_R), 0);
	give_order(vm, DO_WRITE);
	get_pf(&ev, gva, gpa, ACCESS_W);
	reply_crash(&ev);
	join(&r);
	TEST_ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_SYSTEM_EVENT);
	TEST_ASSERT_EQ(vcpu->run->system_event.type, KVM_SYSTEM_EVENT_CRASH);
	unhook(vm);
}

/* ENDBR64, with which kernels begin their functions, is a NOP to the emulator */
KVM_ONE_VCPU_TEST(kvmi, page_access_endbr, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	u64 gva, gpa;

	gpa = start_access(&r, vcpu, &gva);
	*(u64 *)addr_gva2hva(vm, gva) = 0xc3fa1e0ff3;
	assert_err(set_page_access(gpa, ACCESS_R), 0);
	give_order(vm, DO_EXEC);
	pass_pf(gva, gpa, ACCESS_X);
	pass_pf(gva + 4, gpa + 4, ACCESS_X);
	wait_order(vm);
	assert_page_access(gpa, ACCESS_R);

	unhook(vm);
	stop_access(&r);
}

/* What the emulator can't do is told, and then the page is open */
KVM_ONE_VCPU_TEST(kvmi, page_access_not_emulated, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	u64 gva, gpa;

	gpa = start_access(&r, vcpu, &gva);
	*(u64 *)addr_gva2hva(vm, gva) = 0x123456789;
	assert_err(set_page_access(gpa, ACCESS_X), 0);
	give_order(vm, DO_SSE);
	get_event(&ev, KVMI_VCPU_EVENT_PF, 0);
	TEST_ASSERT_EQ(ev.pf.gva, ~0ull);
	TEST_ASSERT_EQ(ev.pf.gpa, gpa);
	TEST_ASSERT_EQ(ev.pf.access, ACCESS_R);
	TEST_ASSERT_EQ(ev.pf.flags, KVMI_PF_NOT_EMULATED);
	reply_retry(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_PF, 0);
	TEST_ASSERT_EQ(ev.pf.flags, KVMI_PF_NOT_EMULATED);
	assert_page_access(gpa, ACCESS_X);
	reply_continue(&ev);
	wait_order(vm);
	TEST_ASSERT_EQ(guest_read(vm, result), 0x123456789);
	assert_page_access(gpa, ACCESS_ALL);

	unhook(vm);
	stop_access(&r);
}

/* An interrupt can't be delivered by the emulator either */
KVM_ONE_VCPU_TEST(kvmi, page_access_idt, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	u64 gva, gpa;
	int i;

	vm_install_exception_handler(vm, IRQ_VECTOR, guest_on_bp);
	start_access(&r, vcpu, &gva);
	assert_err(pause_vcpu(0, 1), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	gpa = translate_gva(0, ev.common.arch.sregs.idt.base);
	reply_continue(&ev);

	assert_err(set_page_access(gpa, ACCESS_W | ACCESS_X), 0);
	give_order(vm, DO_INT);
	/* INT n itself may be emulated or not; the guest notices nothing */
	for (i = 0; i < 10 && guest_read(vm, order) != DO_NONE; i++) {
		if (!tool.nr_events && !readable(QUIET_MS))
			continue;
		get_event(&ev, KVMI_VCPU_EVENT_PF, 0);
		TEST_ASSERT_EQ(ev.pf.gpa & PAGE_MASK, gpa & PAGE_MASK);
		TEST_ASSERT_EQ(ev.pf.access, ACCESS_R);
		reply_continue(&ev);
	}
	wait_order(vm);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);

	unhook(vm);
	stop_access(&r);
}

/*
 * Two tasks in 32-bit mode without paging, in a page each: this code, the GDT
 * and the tasks' TSSs.  The first one calls the other by JMP and CALL, and
 * comes back by JMP and IRET.  What they count must survive.
 */
#define TASK_GDT	1
#define TASK_TSS(n)	(2 + (n))
#define TASK_PAGES	4
#define TASK_CS		0x08
#define TASK_DS		0x10
#define TASK_SEL(n)	(0x18 + 8 * (n))
#define TASK_SWITCHES	5

/* Of its registers, from offset 32 on */
#define TSS_EIP		(32 / 4)
#define TSS_EFLAGS	(36 / 4)
#define TSS_EAX		(40 / 4)
#define TSS_ES		(72 / 4)
#define TSS_SIZE	104

extern u8 tasks[], task1[], tasks_end[];

asm(".pushsection .rodata\n"
	".code32\n"
	"tasks: ljmp $0x20, $0\n"
	"incl %eax\n"
	"lcall $0x20, $0\n"
	"incl %eax\n"
	"loop tasks\n"
	"hlt\n"
	"task1: incl %eax\n"
	"ljmp $0x18, $0\n"
	"incl %eax\n"
	"iret\n"
	"jmp task1\n"
	"tasks_end:\n"
	".code64\n"
	".popsection\n");

static void set_descriptor(u64 *desc, u32 base, u32 limit, u64 flags)
{
	*desc = (limit & 0xffff) | (base & 0xffffffull) << 16 | flags << 40 |
		(limit >> 16 & 0xfull) << 48 | (base >> 24 & 0xffull) << 56;
}

static struct kvm_segment flat_segment(u16 selector, u8 type)
{
	return (struct kvm_segment) {
		.limit = -1, .selector = selector, .type = type, .present = 1,
		.db = 1, .s = 1, .g = 1,
	};
}

static struct kvm_vcpu *make_tasks(void)
{
	struct kvm_vm *vm = vm_create_barebones();
	struct kvm_vcpu *vcpu = __vm_vcpu_add(vm, 0);
	struct kvm_sregs sregs;
	struct kvm_regs regs = {
		.rcx = TASK_SWITCHES,
		.rflags = RFLAGS_IF | 2,
	};
	u64 *gdt;
	u32 *tss;
	int i;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, 0, 0, TASK_PAGES,
				    0);
	memcpy(addr_gpa2hva(vm, 0), tasks, tasks_end - tasks);
	gdt = addr_gpa2hva(vm, TASK_GDT * PAGE_SIZE);
	set_descriptor(gdt + TASK_CS / 8, 0, -1, 0xc09b);
	set_descriptor(gdt + TASK_DS / 8, 0, -1, 0xc093);
	for (i = 0; i < 2; i++)
		/* Available, and busy */
		set_descriptor(gdt + TASK_SEL(i) / 8, TASK_TSS(i) * PAGE_SIZE,
			       TSS_SIZE - 1, i ? 0x89 : 0x8b);
	tss = addr_gpa2hva(vm, TASK_TSS(1) * PAGE_SIZE);
	tss[TSS_EIP] = task1 - tasks;
	tss[TSS_EFLAGS] = RFLAGS_IF | 2;
	for (i = 0; i < 4; i++)
		tss[TSS_ES + i] = i == 1 ? TASK_CS : TASK_DS;

	vcpu_init_cpuid(vcpu, kvm_get_supported_cpuid());
	vcpu_sregs_get(vcpu, &sregs);
	sregs.cr0 = X86_CR0_PE | X86_CR0_ET | X86_CR0_NE;
	sregs.cs = flat_segment(TASK_CS, 0xb);
	sregs.ds = flat_segment(TASK_DS, 3);
	sregs.es = sregs.ds;
	sregs.ss = sregs.ds;
	sregs.fs = sregs.ds;
	sregs.gs = sregs.ds;
	sregs.tr = (struct kvm_segment) {
		.base = TASK_TSS(0) * PAGE_SIZE, .limit = TSS_SIZE - 1,
		.selector = TASK_SEL(0), .type = 0xb, .present = 1,
	};
	sregs.gdt.base = TASK_GDT * PAGE_SIZE;
	sregs.gdt.limit = TASK_SEL(2) - 1;
	vcpu_sregs_set(vcpu, &sregs);
	vcpu_regs_set(vcpu, &regs);

	return vcpu;
}

static void test_task_switch(u8 gdt, u8 tss0, u8 tss1)
{
	struct kvm_vcpu *vcpu = make_tasks();
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct runner r;
	struct event ev;
	u32 seq, *tss;
	int i;

	hook(vm);
	assert_err(set_page_access(TASK_GDT * PAGE_SIZE, gdt), 0);
	assert_err(set_page_access(TASK_TSS(0) * PAGE_SIZE, tss0), 0);
	assert_err(set_page_access(TASK_TSS(1) * PAGE_SIZE, tss1), 0);
	seq = send_vcpu_msg(KVMI_VCPU_CONTROL_EVENTS, 0,
			    &(struct kvmi_vcpu_control_events) {
				.event_id = KVMI_VCPU_EVENT_PF,
				.enable = 1,
			    }, sizeof(struct kvmi_vcpu_control_events));
	get_version();
	start(&r, vcpu);
	assert_err(get_reply(KVMI_VCPU_CONTROL_EVENTS, seq, NULL, 0), 0);

	/* The CPU may make accesses of its own, with or without events */
	for (i = 0; pthread_tryjoin_np(r.thread, NULL); i++) {
		TEST_ASSERT(i < TIMEOUT_MS / QUIET_MS, "the guest hangs");
		if (!tool.nr_events && !readable(QUIET_MS))
			continue;
		get_event(&ev, KVMI_VCPU_EVENT_PF, 0);
		reply_continue(&ev);
	}
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_HLT);
	vcpu_regs_get(vcpu, &regs);
	TEST_ASSERT_EQ(regs.rax, 2 * TASK_SWITCHES);
	TEST_ASSERT_EQ(regs.rcx, 0);
	tss = addr_gpa2hva(vm, TASK_TSS(1) * PAGE_SIZE);
	TEST_ASSERT_EQ(tss[TSS_EAX], 2 * TASK_SWITCHES);
	unhook(vm);
	kvm_vm_free(vm);
}

TEST_F(kvmi, page_access_task_switch)
{
	u8 no_w = ACCESS_R | ACCESS_X;

	test_task_switch(ACCESS_ALL, ACCESS_ALL, ACCESS_ALL);
	test_task_switch(no_w, no_w, no_w);
	test_task_switch(ACCESS_ALL, no_w, 0);
	test_task_switch(0, 0, 0);
}

/* Nobody is told of what nobody wants to know */
KVM_ONE_VCPU_TEST(kvmi, page_access_event_off, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	u64 gva, gpa, *page;

	gpa = start_access(&r, vcpu, &gva);
	page = addr_gva2hva(vm, gva);
	assert_err(set_page_access(gpa, 0), 0);
	assert_err(control_event(0, KVMI_VCPU_EVENT_PF, 0), 0);

	give_order(vm, DO_WRITE);
	wait_order(vm);
	TEST_ASSERT_EQ(*page, 0x77);
	assert_page_access(gpa, 0);

	give_order(vm, DO_SSE);
	wait_order(vm);
	TEST_ASSERT_EQ(guest_read(vm, result), 0x77);

	unhook(vm);
	stop_access(&r);
}

/* When the session ends, the guest has all its rights, the open access too */
KVM_ONE_VCPU_TEST(kvmi, page_access_session_end, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	struct event ev;
	u64 gva, gpa, *page;

	gpa = start_access(&r, vcpu, &gva);
	page = addr_gva2hva(vm, gva);
	assert_err(set_page_access(gpa, 0), 0);
	give_order(vm, DO_WRITE);
	get_pf(&ev, gva, gpa, ACCESS_W);
	tool_close();
	wait_for(guest_read(vm, order) == DO_NONE);
	TEST_ASSERT_EQ(*page, 0x77);
	give_order(vm, DO_SSE);
	wait_for(guest_read(vm, order) == DO_NONE);
	unhook(vm);

	hook(vm);
	assert_page_access(gpa, ACCESS_ALL);
	assert_err(control_event(0, KVMI_VCPU_EVENT_PF, 1), 0);
	give_order(vm, DO_ADD);
	wait_order(vm);
	unhook(vm);
	stop_access(&r);
}

/* A restriction belongs to the guest's address, whatever lies there */
KVM_ONE_VCPU_TEST(kvmi, page_access_memslot, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 gva = 0x40000000, *hva;
	struct runner r;
	struct event ev;
	u64 old_gva;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, NR_PAGES, 0);
	virt_map(vm, gva, EXTRA_GPA, NR_PAGES);
	start_access(&r, vcpu, &old_gva);
	guest_write(vm, target, gva);
	give_order(vm, DO_WRITE);
	wait_order(vm);
	assert_err(set_page_access(EXTRA_GPA, ACCESS_R), 0);

	/* Away and back, and replaced by another */
	vm_mem_region_move(vm, EXTRA_SLOT, EXTRA_GPA + 0x100000);
	vm_mem_region_move(vm, EXTRA_SLOT, EXTRA_GPA);
	assert_page_access(EXTRA_GPA, ACCESS_R);
	give_order(vm, DO_WRITE);
	pass_pf(gva, EXTRA_GPA, ACCESS_W);
	wait_order(vm);

	vm_mem_region_delete(vm, EXTRA_SLOT);
	assert_err(set_page_access(EXTRA_GPA, 0), -KVM_EINVAL);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, NR_PAGES, 0);
	hva = addr_gpa2hva(vm, EXTRA_GPA);
	give_order(vm, DO_WRITE);
	get_pf(&ev, gva, EXTRA_GPA, ACCESS_W);
	TEST_ASSERT_EQ(*hva, 0);
	reply_continue(&ev);
	wait_order(vm);
	TEST_ASSERT_EQ(*hva, 0x77);

	unhook(vm);
	stop_access(&r);
}

/* The tool's own writes, and userspace's, are not restricted */
KVM_ONE_VCPU_TEST(kvmi, page_access_not_the_tools, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	struct runner r;
	u64 gva, gpa, val = 5;

	gpa = start_access(&r, vcpu, &gva);
	assert_err(set_page_access(gpa, 0), 0);
	assert_err(write_physical(gpa, sizeof(val), &val), 0);
	val = 0;
	assert_err(read_physical(gpa, sizeof(val), &val), 0);
	TEST_ASSERT_EQ(val, 5);
	unhook(vm);
	stop_access(&r);
}

static void nested_access(void)
{
	WRITE_ONCE(*(u64 *)target, 0x99);
	asm volatile("vmmcall");
}

static void guest_nested(struct svm_test_data *svm)
{
	static u64 stack[64];

	WRITE_ONCE(*(u64 *)target, 1);
	generic_svm_setup(svm, nested_access, &stack[ARRAY_SIZE(stack)]);
	run_guest(svm->vmcb, svm->vmcb_gpa);
	WRITE_ONCE(result, svm->vmcb->control.exit_code);
	WRITE_ONCE(*(u64 *)target, 2);
	GUEST_DONE();
}

/* The guest's guests are their own, and the guest is restricted again after */
KVM_ONE_VCPU_TEST(kvmi, page_access_nested, guest_nested)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 gva, gpa, svm_gva, *page;
	struct runner r;
	struct event ev;
	u32 seq;

	if (!kvm_cpu_has(X86_FEATURE_SVM)) {
		print_skip("no nested SVM");
		return;
	}

	gva = vm_vaddr_alloc_page(vm);
	gpa = addr_gva2gpa(vm, gva);
	page = addr_gva2hva(vm, gva);
	guest_write(vm, target, gva);
	vcpu_alloc_svm(vm, &svm_gva);
	vcpu_args_set(vcpu, 1, svm_gva);

	hook(vm);
	assert_err(set_page_access(gpa, ACCESS_R), 0);
	seq = send_vcpu_msg(KVMI_VCPU_CONTROL_EVENTS, 0,
		      &(struct kvmi_vcpu_control_events) {
			.event_id = KVMI_VCPU_EVENT_PF,
			.enable = 1,
		      }, sizeof(struct kvmi_vcpu_control_events));
	get_version();
	start(&r, vcpu);
	assert_err(get_reply(KVMI_VCPU_CONTROL_EVENTS, seq, NULL, 0), 0);
	pass_pf(gva, gpa, ACCESS_W);
	get_pf(&ev, gva, gpa, ACCESS_W);
	TEST_ASSERT_EQ(*page, 0x99);
	TEST_ASSERT_EQ(guest_read(vm, result), SVM_EXIT_VMMCALL);
	reply_continue(&ev);
	join_done(&r);
	TEST_ASSERT_EQ(*page, 2);
	unhook(vm);
}

/* Inside a huge page, which must come back to be one mapping as it was */
KVM_ONE_VCPU_TEST(kvmi, page_access_huge, guest_access)
{
	struct kvm_vm *vm = vcpu->vm;
	const u64 huge = 2ul << 20, gpa = 0x40000000, gva = 0x80000000;
	struct runner r;
	u64 old_gva;
	int i;

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS_THP, gpa,
				    EXTRA_SLOT, huge / PAGE_SIZE, 0);
	virt_map(vm, gva, gpa, huge / PAGE_SIZE);
	memset(addr_gpa2hva(vm, gpa), 1, huge);
	start_access(&r, vcpu, &old_gva);
	guest_write(vm, target, gva);
	give_order(vm, DO_WRITE);
	wait_order(vm);
	if (!vm_get_stat(vm, "pages_2m")) {
		unhook(vm);
		stop_access(&r);
		print_skip("the host has no huge page to give");
		return;
	}

	for (i = 0; i < 3; i++) {
		assert_err(set_page_access(gpa + PAGE_SIZE, ACCESS_R), 0);
		TEST_ASSERT_EQ(vm_get_stat(vm, "pages_2m"), 0);
		/* The neighbour is free */
		give_order(vm, DO_WRITE);
		wait_order(vm);
		TEST_ASSERT_EQ(vm_get_stat(vm, "pages_2m"), 0);
		give_order(vm, DO_CROSS);
		pass_pf(gva + PAGE_SIZE, gpa + PAGE_SIZE, ACCESS_W);
		wait_order(vm);
		assert_err(set_page_access(gpa + PAGE_SIZE, ACCESS_ALL), 0);
	}

	unhook(vm);
	stop_access(&r);
}

/* The module parameter is off */

/* Single-stepping */

/* On Intel it needs the monitor trap flag, which emulated CPUs may lack */
static bool host_has_singlestep(void)
{
	char line[4096];
	bool has = host_cpu_is_amd;
	FILE *f;

	f = fopen("/proc/cpuinfo", "r");
	TEST_ASSERT(f, "/proc/cpuinfo: %s", strerror(errno));
	while (!has && fgets(line, sizeof(line), f))
		has = !strncmp(line, "vmx flags", 9) && strstr(line, " mtf");
	fclose(f);

	return has;
}

FIXTURE(kvmi_step) {
	struct kvm_vcpu *vcpu;
};

FIXTURE_SETUP(kvmi_step)
{
	if (!introspection_on())
		SKIP(return, "kvm.introspection is off");
	if (!host_has_singlestep())
		SKIP(return, "the CPU has no monitor trap flag");
	self->vcpu = make_vm(NULL);
}

FIXTURE_TEARDOWN(kvmi_step)
{
	kvm_vm_free(self->vcpu->vm);
}

static int control_singlestep(u16 vcpu, u8 enable)
{
	struct kvmi_vcpu_control_singlestep req = { .enable = enable };

	return vcpu_command(KVMI_VCPU_CONTROL_SINGLESTEP, vcpu, &req);
}

KVM_ONE_VCPU_TEST(kvmi, singlestep_supported, guest_count)
{
	struct kvmi_get_version_reply rpl;
	bool has = host_has_singlestep();
	struct runner r;

	hook(vcpu->vm);
	assert_err(__command(KVMI_GET_VERSION, NULL, 0, &rpl, sizeof(rpl)), 0);
	TEST_ASSERT_EQ(rpl.features.singlestep, has);
	start(&r, vcpu);
	if (!has)
		assert_err(control_singlestep(0, 1), -KVM_EOPNOTSUPP);
	assert_err(control_singlestep(0, 0), has ? 0 : -KVM_EOPNOTSUPP);
	stop_guest(&r);
	unhook(vcpu->vm);
}

static void set_rip(const struct event *ev, u64 rip)
{
	struct kvm_regs regs = ev->common.arch.regs;

	regs.rip = rip;
	assert_err(set_registers(ev->common.vcpu, &regs), 0);
}

static void get_step(struct event *ev)
{
	get_event(ev, KVMI_VCPU_EVENT_SINGLESTEP, 0);
	TEST_ASSERT_EQ(ev->step.failed, 0);
}

/* Up to the INT3 ahead of the steps, which begin with the reply */
static void start_to_step(struct runner *r, struct kvm_vcpu *vcpu,
			  struct event *ev, const u64 *steps)
{
	start_to_bp(r, vcpu, ev);
	TEST_ASSERT_EQ(ev->common.arch.regs.rip, steps[0] - 1);
	assert_err(control_singlestep(0, 1), 0);
	set_rip(ev, steps[0]);
	reply_retry(ev);
}

static void assert_no_tf(const struct event *ev)
{
	TEST_ASSERT(!(ev->common.arch.regs.rflags & RFLAGS_TF),
		    "TF shows at 0x%llx",
		    (unsigned long long)ev->common.arch.regs.rip);
}

#define STEPS_REPEAT	BIT(0)	/* an instruction may take several steps */
#define STEPS_SKIP	BIT(1)	/* a step may be two instructions */
#define STEPS_OUTSIDE	BIT(2)	/* to handlers, and back to any step */

static int find_step(const u64 *steps, u64 rip)
{
	int i;

	for (i = 0; steps[i]; i++)
		if (steps[i] == rip)
			return i;

	return -1;
}

/* Returns the number of events, of which the last is still open */
static int follow_steps(struct event *ev, const u64 *steps, int how)
{
	int pos = 0, next, n;
	u64 rip;

	for (n = 1; n < MAX_STEPS; n++) {
		get_step(ev);
		if (!(how & STEPS_OUTSIDE))
			assert_no_tf(ev);
		rip = ev->common.arch.regs.rip;
		next = find_step(steps, rip);
		if (next < 0) {
			TEST_ASSERT(how & STEPS_OUTSIDE,
				    "a step from 0x%llx to 0x%llx",
				    (unsigned long long)steps[pos],
				    (unsigned long long)rip);
		} else {
			TEST_ASSERT(next == pos + 1 ||
				    (how & STEPS_OUTSIDE) ||
				    ((how & STEPS_REPEAT) && next <= pos) ||
				    ((how & STEPS_SKIP) && next == pos + 2),
				    "from step %d to %d", pos, next);
			pos = next;
			if (!steps[pos + 1])
				return n;
		}
		reply_continue(ev);
	}

	TEST_FAIL("no end of steps");
	return 0;
}

static void end_steps(struct runner *r, struct event *ev)
{
	assert_err(control_singlestep(0, 0), 0);
	reply_continue(ev);
	join_done(r);
	TEST_ASSERT(!(guest_read(r->vcpu->vm, seen_flags) & RFLAGS_TF),
		    "the guest has seen TF: 0x%lx",
		    (unsigned long)guest_read(r->vcpu->vm, seen_flags));
	unhook(r->vcpu->vm);
}

static int test_steps(struct kvm_vcpu *vcpu, const u64 *steps, int how)
{
	struct event ev;
	struct runner r;
	int n;

	start_to_step(&r, vcpu, &ev, steps);
	n = follow_steps(&ev, steps, how);
	end_steps(&r, &ev);

	return n;
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_plain, guest_step_plain)
{
	/* RET is not in the table, as it is between CALL and JMP */
	test_steps(vcpu, plain_steps, STEPS_OUTSIDE);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 5);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_flags, guest_step_flags)
{
	test_steps(vcpu, flags_steps, STEPS_SKIP);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_rep, guest_step_rep)
{
	int n = test_steps(vcpu, rep_steps, STEPS_REPEAT);

	TEST_ASSERT(n <= 17, "%d steps", n);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_loop, guest_step_loop)
{
	TEST_ASSERT_EQ(test_steps(vcpu, loop_steps, STEPS_REPEAT), 31);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 10);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_shadow, guest_step_shadow)
{
	test_steps(vcpu, shadow_steps, STEPS_SKIP);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_syscall, guest_step_syscall)
{
	test_steps(vcpu, syscall_steps, 0);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

static void make_user_page(struct kvm_vm *vm, u64 gva)
{
	int level;

	for (level = PG_LEVEL_4K; level <= PG_LEVEL_512G; level++) {
		int l = level;

		*__vm_get_page_table_entry(vm, gva, &l) |= PTE_USER_MASK;
	}
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_sysret, guest_step_sysret)
{
	make_user_page(vcpu->vm, (u64)step_sysret);
	make_user_page(vcpu->vm, (u64)step_sysret_end);
	test_steps(vcpu, sysret_steps, 0);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_sysret_prefix, guest_step_sysret_prefix)
{
	make_user_page(vcpu->vm, (u64)step_sysret_prefix);
	make_user_page(vcpu->vm, (u64)step_sysret_prefix_end);
	test_steps(vcpu, sysret_prefix_steps, 0);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_iret, guest_step_iret)
{
	test_steps(vcpu, iret_steps, 0);
	TEST_ASSERT_EQ(guest_read(vcpu->vm, result), 1);
}

/* An exception is a step, up to the handler */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_pf, guest_step_pf)
{
	struct kvm_vm *vm = vcpu->vm;

	vm_install_exception_handler(vm, PF_VECTOR, guest_on_pf);
	TEST_ASSERT(test_steps(vcpu, pf_steps, STEPS_OUTSIDE) > 20,
		    "the handler has not been stepped");
	TEST_ASSERT_EQ(guest_read(vm, pf_rip), pf_steps[1]);
	TEST_ASSERT_EQ(guest_read(vm, result), PFERR_WRITE_MASK);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_ud, guest_step_ud)
{
	struct kvm_vm *vm = vcpu->vm;

	vm_install_exception_handler(vm, UD_VECTOR, guest_on_ud);
	TEST_ASSERT(test_steps(vcpu, ud_steps, STEPS_OUTSIDE) > 20,
		    "the handler has not been stepped");
	TEST_ASSERT_EQ(guest_read(vm, ud_rip), ud_steps[0]);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_int3, guest_step_int3)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_step(&r, vcpu, &ev, int3_steps);
	vm_install_exception_handler(vm, BP_VECTOR, guest_on_step_bp);
	get_step(&ev);
	/* Not intercepted any more: the guest's */
	assert_err(control_event(0, KVMI_VCPU_EVENT_BREAKPOINT, 0), 0);
	reply_continue(&ev);
	TEST_ASSERT(follow_steps(&ev, int3_steps, STEPS_OUTSIDE) > 20,
		    "the handler has not been stepped");
	end_steps(&r, &ev);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), int3_steps[2]);
}

/* A step to a breakpoint makes its event, and with CONTINUE a #BP */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_breakpoint, guest_step_int3)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_step(&r, vcpu, &ev, int3_steps);
	vm_install_exception_handler(vm, BP_VECTOR, guest_on_step_bp);
	get_step(&ev);
	TEST_ASSERT_EQ(ev.common.arch.regs.rip, int3_steps[1]);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
	assert_no_tf(&ev);
	reply_continue(&ev);
	follow_steps(&ev, int3_steps, STEPS_OUTSIDE);
	end_steps(&r, &ev);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), int3_steps[2]);
}

/* What tools do: the original byte, a step, and the INT3 again */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_over_breakpoint, guest_break)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 gpa = addr_gva2gpa(vm, (vm_vaddr_t)bp_insn);
	struct event ev;
	struct runner r;
	u64 before;
	int i;

	start_to_bp(&r, vcpu, &ev);
	for (i = 0; i < 5; i++) {
		before = guest_read(vm, counter);
		assert_err(write_physical(gpa, 1, "\x90"), 0);
		assert_err(control_singlestep(0, 1), 0);
		reply_retry(&ev);
		get_step(&ev);
		TEST_ASSERT_EQ(ev.common.arch.regs.rip, (u64)bp_next);
		assert_no_tf(&ev);
		TEST_ASSERT_EQ(guest_read(vm, counter), before);
		assert_err(write_physical(gpa, 1, "\xcc"), 0);
		assert_err(control_singlestep(0, 0), 0);
		reply_continue(&ev);
		get_event(&ev, KVMI_VCPU_EVENT_BREAKPOINT, 0);
		TEST_ASSERT_EQ(guest_read(vm, counter), before + 1);
	}
	unhook(vm);
	stop_guest(&r);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_int, guest_step_int)
{
	struct kvm_vm *vm = vcpu->vm;

	vm_install_exception_handler(vm, INT_VECTOR, guest_on_step_bp);
	TEST_ASSERT(test_steps(vcpu, int_steps, STEPS_OUTSIDE) > 20,
		    "the handler has not been stepped");
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), int_steps[2]);
}

/* Where KVM could not see which INT it is if it read it as data */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_int_execonly, guest_step_execonly)
{
	struct kvm_vm *vm = vcpu->vm;

	if (!kvm_cpu_has(X86_FEATURE_PKU)) {
		print_skip("no protection keys");
		return;
	}

	make_user_page(vm, (u64)step_execonly);
	vm_install_exception_handler(vm, INT_VECTOR, guest_on_step_bp);
	TEST_ASSERT(test_steps(vcpu, execonly_steps, STEPS_OUTSIDE) > 20,
		    "the handler has not been stepped");
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), execonly_steps[3]);
	TEST_ASSERT_EQ(guest_read(vm, result), 1);
}

/* The guest's own single-stepping goes on */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_guest_tf, guest_step_tf)
{
	struct kvm_vm *vm = vcpu->vm;

	vm_install_exception_handler(vm, DB_VECTOR, guest_on_db);
	test_steps(vcpu, tf_steps, STEPS_OUTSIDE);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, db_rip), tf_steps[4]);
	TEST_ASSERT(guest_read(vm, result) & BIT(14), "DR6 is 0x%lx",
		    (unsigned long)guest_read(vm, result));
}

/* An interrupt waits until the steps are over, and comes once */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_irq, guest_step_hlt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	vm_install_exception_handler(vm, IRQ_VECTOR, guest_on_step_irq);
	start_to_step(&r, vcpu, &ev, hlt_steps);
	get_step(&ev);
	send_irq(vm);
	/* STI and HLT, which ends with the interrupt */
	for (i = 2; i <= 3; i++) {
		reply_continue(&ev);
		get_step(&ev);
		TEST_ASSERT_EQ(ev.common.arch.regs.rip, hlt_steps[i]);
		TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	}
	reply_continue(&ev);
	follow_steps(&ev, hlt_steps, STEPS_OUTSIDE);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	/* Now one that nothing waits for */
	send_irq(vm);
	assert_quiet();
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	end_steps(&r, &ev);
	TEST_ASSERT_EQ(guest_read(vm, traps), 2);
}

/* Held back with interrupts enabled, even for many steps */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_irq_held, guest_step_hlt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	vm_install_exception_handler(vm, IRQ_VECTOR, guest_on_step_irq);
	start_to_step(&r, vcpu, &ev, hlt_steps);
	for (i = 1; i <= 2; i++) {
		get_step(&ev);
		TEST_ASSERT_EQ(ev.common.arch.regs.rip, hlt_steps[i]);
		if (i == 1)
			reply_continue(&ev);
	}
	/* Over the HLT, in the shadow of STI */
	set_rip(&ev, hlt_steps[5]);
	send_irq(vm);
	reply_continue(&ev);
	get_step(&ev);
	TEST_ASSERT_EQ(ev.common.arch.regs.rip, hlt_steps[6]);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	end_steps(&r, &ev);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
}

/* The HLT is over, the guest still halted */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_halted, guest_step_hlt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	vm_install_exception_handler(vm, IRQ_VECTOR, guest_on_step_irq);
	start_to_step(&r, vcpu, &ev, hlt_steps);
	for (i = 1; i <= 3; i++) {
		get_step(&ev);
		TEST_ASSERT_EQ(ev.common.arch.regs.rip, hlt_steps[i]);
		reply_continue(&ev);
	}
	assert_quiet();
	assert_halted(vm);
	send_irq(vm);
	/* To the handler, which has not run yet */
	get_step(&ev);
	TEST_ASSERT(find_step(hlt_steps, ev.common.arch.regs.rip) < 0,
		    "the interrupt has not been taken");
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	reply_continue(&ev);
	follow_steps(&ev, hlt_steps, STEPS_OUTSIDE);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	end_steps(&r, &ev);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_errors, guest_count)
{
	struct kvmi_vcpu_control_singlestep req = { .enable = 1 };
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	hook(vm);
	start(&r, vcpu);
	assert_err(control_singlestep(0, 2), -KVM_EINVAL);
	for (i = 0; i < ARRAY_SIZE(req.padding); i++) {
		req.padding[i] = 1;
		assert_err(vcpu_command(KVMI_VCPU_CONTROL_SINGLESTEP, 0, &req),
			   -KVM_EINVAL);
		req.padding[i] = 0;
	}
	assert_err(__vcpu_command(KVMI_VCPU_CONTROL_SINGLESTEP, 0, &req,
				  sizeof(req) - 1, NULL, 0), -KVM_EINVAL);
	allow_event(vm, KVMI_VCPU_EVENT_SINGLESTEP, 0);
	assert_err(control_singlestep(0, 0), -KVM_EPERM);
	assert_err(control_singlestep(0, 1), -KVM_EPERM);
	/* Tested before the padding */
	assert_err(control_singlestep(0, 2), -KVM_EPERM);
	allow_event(vm, KVMI_VCPU_EVENT_SINGLESTEP, 1);
	assert_quiet();

	/* CONTROL_EVENTS has nothing to do with it */
	assert_err(control_event(0, KVMI_VCPU_EVENT_SINGLESTEP, 1), 0);
	assert_quiet();
	assert_err(control_event(0, KVMI_VCPU_EVENT_SINGLESTEP, 0), 0);

	/* Twice is fine, either way */
	assert_err(control_singlestep(0, 0), 0);
	assert_err(control_singlestep(0, 1), 0);
	get_step(&ev);
	assert_err(control_singlestep(0, 1), 0);
	reply_continue(&ev);
	get_step(&ev);
	assert_err(control_singlestep(0, 0), 0);
	assert_err(control_singlestep(0, 0), 0);
	reply_continue(&ev);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

static int set_step_debug(struct kvm_vcpu *vcpu, bool enable)
{
	struct kvm_guest_debug debug = {};

	if (enable)
		debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
	return __vcpu_ioctl(vcpu, KVM_SET_GUEST_DEBUG, &debug) ? errno : 0;
}

/* A vCPU is stepped by the tool or by userspace */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_guest_debug, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	u32 seq;

	hook(vm);
	assert_err(set_step_debug(vcpu, true), 0);
	seq = send_vcpu_msg(KVMI_VCPU_CONTROL_SINGLESTEP, 0,
			    &(struct kvmi_vcpu_control_singlestep) {
				.enable = 1,
			    }, sizeof(struct kvmi_vcpu_control_singlestep));
	get_version();
	start(&r, vcpu);
	assert_err(get_reply(KVMI_VCPU_CONTROL_SINGLESTEP, seq, NULL, 0),
		   -KVM_EBUSY);
	join(&r);
	TEST_ASSERT_EQ(vcpu->run->exit_reason, KVM_EXIT_DEBUG);
	assert_err(set_step_debug(vcpu, false), 0);

	start(&r, vcpu);
	assert_err(control_singlestep(0, 1), 0);
	get_step(&ev);
	interrupt(&r);
	assert_err(set_step_debug(vcpu, true), EBUSY);
	unhook(vm);
	assert_err(set_step_debug(vcpu, true), 0);
	assert_err(set_step_debug(vcpu, false), 0);
	start(&r, vcpu);
	assert_guest_runs(vm);
	stop_guest(&r);
}

/* With and without the clean-up of what else there is */
static void test_step_abandoned(struct kvm_vcpu *vcpu, u8 cleanup, bool open)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	hook(vm);
	start(&r, vcpu);
	assert_err(control_cleanup(cleanup), 0);
	assert_err(control_singlestep(0, 1), 0);
	get_step(&ev);
	if (!open) {
		reply_continue(&ev);
		get_step(&ev);
		reply_continue(&ev);
	}
	tool_close();
	assert_guest_runs(vm);
	unhook(vm);
	assert_guest_runs(vm);
	/* The next session knows nothing of it */
	hook(vm);
	assert_err(vcpu_get_info(0), 0);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_tool_gone, guest_count)
{
	test_step_abandoned(vcpu, 1, true);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_tool_gone_no_cleanup, guest_count)
{
	test_step_abandoned(vcpu, 0, true);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_tool_gone_between, guest_count)
{
	test_step_abandoned(vcpu, 0, false);
}

/* The interrupt that has been held back survives the session */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_tool_gone_irq, guest_step_hlt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	vm_install_exception_handler(vm, IRQ_VECTOR, guest_on_step_irq);
	start_to_step(&r, vcpu, &ev, hlt_steps);
	get_step(&ev);
	set_rip(&ev, hlt_steps[4]);
	reply_continue(&ev);
	get_step(&ev);
	send_irq(vm);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	unhook(vm);
	join_done(&r);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT(!(guest_read(vm, seen_flags) & RFLAGS_TF),
		    "the guest has seen TF");
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_crash, guest_count)
{
	struct event ev;
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	assert_err(control_singlestep(0, 1), 0);
	get_step(&ev);
	reply_crash(&ev);
	join(&r);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_SYSTEM_EVENT);
	unhook(vcpu->vm);
}

KVM_ONE_VCPU_TEST(kvmi_step, singlestep_retry_closes, guest_count)
{
	struct event ev;
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	assert_err(control_singlestep(0, 1), 0);
	get_step(&ev);
	reply_retry(&ev);
	assert_closed();
	assert_guest_runs(vcpu->vm);
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* The vCPU's thread is taken away between steps and while they are told */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_signals, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct kvm_regs regs;
	struct event ev;
	struct runner r;
	int i;

	hook(vm);
	start(&r, vcpu);
	assert_err(control_singlestep(0, 1), 0);
	for (i = 0; i < 5; i++) {
		get_step(&ev);
		interrupt(&r);
		vcpu_regs_get(vcpu, &regs);
		TEST_ASSERT_EQ(regs.rip, ev.common.arch.regs.rip);
		TEST_ASSERT(!(regs.rflags & RFLAGS_TF), "TF in KVM_GET_REGS");
		start(&r, vcpu);
		reply_continue(&ev);
	}
	get_step(&ev);
	assert_err(control_singlestep(0, 0), 0);
	reply_continue(&ev);
	stop_guest(&r);
	unhook(vm);
}

/* A vCPU that nobody steps goes on, and is not told of */
KVM_ONE_VCPU_TEST(kvmi_step, singlestep_per_vcpu, guest_count)
{
	struct kvm_vcpu *vcpu1 = add_vcpu(vcpu, guest_count);
	struct kvm_vm *vm = vcpu->vm;
	struct runner r[2];
	struct event ev;

	hook(vm);
	start(&r[0], vcpu);
	start(&r[1], vcpu1);
	assert_err(control_singlestep(1, 1), 0);
	get_event(&ev, KVMI_VCPU_EVENT_SINGLESTEP, 1);
	assert_guest_runs(vm);
	assert_quiet();
	unhook(vm);
	guest_write(vm, stop, 1);
	join_done(&r[0]);
	join_done(&r[1]);
}

/* Injected exceptions */

static int inject(u16 vcpu, u8 nr, u32 error_code, u64 address)
{
	struct kvmi_vcpu_inject_exception req = {
		.nr = nr,
		.error_code = error_code,
		.address = address,
	};

	return vcpu_command(KVMI_VCPU_INJECT_EXCEPTION, vcpu, &req);
}

static void get_trap(struct event *ev, u8 nr, u32 error_code)
{
	get_event(ev, KVMI_VCPU_EVENT_TRAP, 0);
	TEST_ASSERT(ev->trap.nr == nr && ev->trap.error_code == error_code,
		    "vector %u, error code %u, should be %u, %u", ev->trap.nr,
		    ev->trap.error_code, nr, error_code);
	TEST_ASSERT(!ev->trap.padding1 && !ev->trap.padding2,
		    "the padding isn't zero");
}

static u64 injected_cr2;

static void guest_on_injected(struct ex_regs *regs)
{
	asm volatile("mov %%cr2, %0" : "=r"(injected_cr2));
	WRITE_ONCE(seen_flags, regs->error_code);
	WRITE_ONCE(result, regs->vector);
	WRITE_ONCE(trap_rip, regs->rip);
	WRITE_ONCE(traps, traps + 1);
}

static void test_inject(struct kvm_vcpu *vcpu, struct runner *r, u8 nr,
			u32 error_code, bool has_error)
{
	struct kvm_vm *vm = vcpu->vm;
	u64 before = guest_read(vm, traps);
	struct event ev;
	u64 rip;

	vm_install_exception_handler(vm, nr, guest_on_injected);
	assert_err(pause_vcpu(0, 0), 0);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	rip = ev.common.arch.regs.rip;
	assert_err(inject(0, nr, error_code, 0x123456000), 0);
	reply_continue(&ev);
	get_trap(&ev, nr, has_error ? error_code : 0);
	TEST_ASSERT_EQ(ev.common.arch.regs.rip, rip);
	if (nr == PF_VECTOR)
		TEST_ASSERT_EQ(ev.trap.address, 0x123456000);
	TEST_ASSERT_EQ(guest_read(vm, traps), before);
	reply_continue(&ev);
	wait_for(guest_read(vm, traps) == before + 1);
	TEST_ASSERT_EQ(guest_read(vm, result), nr);
	TEST_ASSERT_EQ(guest_read(vm, seen_flags), has_error ? error_code : 0);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), rip);
	if (nr == PF_VECTOR)
		TEST_ASSERT_EQ(guest_read(vm, injected_cr2), 0x123456000);
	assert_guest_runs(vm);
	assert_quiet();
}

KVM_ONE_VCPU_TEST(kvmi, inject_exception, guest_count)
{
	struct runner r;

	hook(vcpu->vm);
	start(&r, vcpu);
	test_inject(vcpu, &r, PF_VECTOR, 6, true);
	test_inject(vcpu, &r, UD_VECTOR, 77, false);
	test_inject(vcpu, &r, GP_VECTOR, 0x18, true);
	test_inject(vcpu, &r, DE_VECTOR, 1, false);
	test_inject(vcpu, &r, DB_VECTOR, 1, false);
	test_inject(vcpu, &r, SS_VECTOR, 0x10, true);
	/* No instruction has made them: the guest is where it was */
	test_inject(vcpu, &r, BP_VECTOR, 1, false);
	test_inject(vcpu, &r, BP_VECTOR, 1, false);
	test_inject(vcpu, &r, OF_VECTOR, 1, false);
	stop_guest(&r);
	unhook(vcpu->vm);
}

/* At an INT3, #BP is what it is from that */
KVM_ONE_VCPU_TEST(kvmi, inject_exception_int3, guest_break_once)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	assert_err(inject(0, BP_VECTOR, 0, 0), 0);
	reply_retry(&ev);
	get_trap(&ev, BP_VECTOR, 0);
	reply_continue(&ev);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, trap_rip), (u64)bp_next);
	stop_guest(&r);
	unhook(vm);
}

/* Something else is delivered: that is told, and the tool tries again */
KVM_ONE_VCPU_TEST(kvmi, inject_exception_other, guest_break_once)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	start_to_bp(&r, vcpu, &ev);
	vm_install_exception_handler(vm, UD_VECTOR, guest_on_injected);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	reply_continue(&ev);
	get_trap(&ev, BP_VECTOR, 0);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	assert_err(inject(0, UD_VECTOR, 0, 0), -KVM_EBUSY);
	reply_continue(&ev);
	/* In the #BP's handler, which has not begun */
	get_trap(&ev, UD_VECTOR, 0);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	reply_continue(&ev);
	wait_for(guest_read(vm, counter));
	TEST_ASSERT_EQ(guest_read(vm, traps), 2);
	stop_guest(&r);
	unhook(vm);
}

/* Ahead of what else there is to tell */
KVM_ONE_VCPU_TEST(kvmi, inject_exception_first, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	vm_install_exception_handler(vm, UD_VECTOR, guest_on_injected);
	start_to_pause(&r, vcpu, &ev);
	assert_err(pause_vcpu(0, 0), 0);
	assert_err(pause_vcpu(0, 0), 0);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	reply_continue(&ev);
	get_trap(&ev, UD_VECTOR, 0);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	reply_continue(&ev);
	get_event(&ev, KVMI_VCPU_EVENT_PAUSE, 0);
	reply_continue(&ev);
	wait_for(guest_read(vm, traps) == 1);
	stop_guest(&r);
	unhook(vm);
}

/* A halted guest gets it, too */
KVM_ONE_VCPU_TEST(kvmi, inject_exception_halted, guest_halt)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	vm_install_exception_handler(vm, UD_VECTOR, guest_on_injected);
	start_to_halt(&r, vcpu);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	get_trap(&ev, UD_VECTOR, 0);
	assert_halted(vm);
	reply_continue(&ev);
	join_done(&r);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
	TEST_ASSERT_EQ(guest_read(vm, result), UD_VECTOR);
	unhook(vm);
}

KVM_ONE_VCPU_TEST(kvmi, inject_exception_errors, guest_count)
{
	struct kvmi_vcpu_inject_exception req = { .nr = UD_VECTOR };
	static const u8 bad[] = { NMI_VECTOR, 9, 15, 20, 21, 22, 27, 28, 29,
				  30, 31, 32, 64, 255 };
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;
	int i;

	start_to_pause(&r, vcpu, &ev);
	req.padding1 = 1;
	assert_err(vcpu_command(KVMI_VCPU_INJECT_EXCEPTION, 0, &req),
		   -KVM_EINVAL);
	allow_event(vm, KVMI_VCPU_EVENT_TRAP, 0);
	assert_err(vcpu_command(KVMI_VCPU_INJECT_EXCEPTION, 0, &req),
		   -KVM_EPERM);
	allow_event(vm, KVMI_VCPU_EVENT_TRAP, 1);
	req.padding1 = 0;
	req.padding2 = 1;
	assert_err(vcpu_command(KVMI_VCPU_INJECT_EXCEPTION, 0, &req),
		   -KVM_EINVAL);
	assert_err(__vcpu_command(KVMI_VCPU_INJECT_EXCEPTION, 0, &req,
				  sizeof(req) - 1, NULL, 0), -KVM_EINVAL);
	for (i = 0; i < ARRAY_SIZE(bad); i++)
		assert_err(inject(0, bad[i], 0, 0), -KVM_EINVAL);

	if (host_has_singlestep()) {
		assert_err(control_singlestep(0, 1), 0);
		assert_err(inject(0, UD_VECTOR, 0, 0), -KVM_EBUSY);
		assert_err(control_singlestep(0, 0), 0);
	}

	vm_install_exception_handler(vm, UD_VECTOR, guest_on_injected);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	assert_err(inject(0, UD_VECTOR, 0, 0), -KVM_EBUSY);
	reply_continue(&ev);
	get_trap(&ev, UD_VECTOR, 0);
	reply_continue(&ev);
	wait_for(guest_read(vm, traps) == 1);
	assert_guest_runs(vm);
	assert_quiet();
	stop_guest(&r);
	unhook(vm);
}

/* The session ends before the exception has its turn */
KVM_ONE_VCPU_TEST(kvmi, inject_exception_tool_gone, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	vm_install_exception_handler(vm, UD_VECTOR, guest_on_injected);
	start_to_pause(&r, vcpu, &ev);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	unhook(vm);
	assert_guest_runs(vm);
	TEST_ASSERT_EQ(guest_read(vm, traps), 0);
	hook(vm);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	get_trap(&ev, UD_VECTOR, 0);
	reply_continue(&ev);
	wait_for(guest_read(vm, traps) == 1);
	stop_guest(&r);
	unhook(vm);
}

/* With the TRAP event open, it has been delivered */
KVM_ONE_VCPU_TEST(kvmi, event_trap_tool_gone, guest_count)
{
	struct kvm_vm *vm = vcpu->vm;
	struct event ev;
	struct runner r;

	vm_install_exception_handler(vm, UD_VECTOR, guest_on_injected);
	start_to_pause(&r, vcpu, &ev);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	reply_continue(&ev);
	get_trap(&ev, UD_VECTOR, 0);
	interrupt(&r);
	start(&r, vcpu);
	tool_close();
	wait_for(guest_read(vm, traps) == 1);
	stop_guest(&r);
	unhook(vm);
	TEST_ASSERT_EQ(guest_read(vm, traps), 1);
}

KVM_ONE_VCPU_TEST(kvmi, event_trap_crash, guest_count)
{
	struct event ev;
	struct runner r;

	start_to_pause(&r, vcpu, &ev);
	assert_err(inject(0, UD_VECTOR, 0, 0), 0);
	reply_continue(&ev);
	get_trap(&ev, UD_VECTOR, 0);
	reply_crash(&ev);
	join(&r);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_SYSTEM_EVENT);
	unhook(vcpu->vm);
}

/* A control group of its own for this process, or what is missing */
static const char *make_cgroup(char dir[], size_t size)
{
	char path[128];
	int fd;

	mkdir("/tmp", 0777);
	snprintf(dir, size, "/tmp/kvmi_cgroup.XXXXXX");
	if (!mkdtemp(dir))
		return "a folder";
	if (mount("none", dir, "cgroup2", 0, NULL))
		return "cgroup2";
	snprintf(path, sizeof(path), "%s/cgroup.subtree_control", dir);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "+memory", 7) != 7)
		return "the memory controller";
	close(fd);
	snprintf(dir + strlen(dir), size - strlen(dir), "/%d", getpid());
	if (mkdir(dir, 0777))
		return "a group";
	snprintf(path, sizeof(path), "%s/cgroup.procs", dir);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1)
		return "a place in the group";
	close(fd);
	return NULL;
}

static void leave_cgroup(char dir[])
{
	char path[128];
	int fd;

	snprintf(path, sizeof(path), "%s/../cgroup.procs", dir);
	fd = open(path, O_WRONLY);
	TEST_ASSERT(fd >= 0 && write(fd, "0", 1) == 1, "cgroup.procs");
	close(fd);
	rmdir(dir);
	*strrchr(dir, '/') = 0;
	umount2(dir, MNT_DETACH);
	rmdir(dir);
}

static void read_cgroup(const char *dir, const char *file, char buf[4096])
{
	char path[128];
	ssize_t ret;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", dir, file);
	fd = open(path, O_RDONLY);
	ret = read(fd, buf, 4095);
	TEST_ASSERT(ret > 0, "%s: %s", path, strerror(errno));
	buf[ret] = 0;
	close(fd);
}

/* Another process freezes this one and thaws it */
static pid_t freeze_soon(const char *dir)
{
	char path[128], buf[4096];
	pid_t pid;
	int fd, i;

	pid = fork();
	TEST_ASSERT(pid >= 0, "fork: %s", strerror(errno));
	if (pid)
		return pid;

	snprintf(path, sizeof(path), "%s/../cgroup.procs", dir);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1)
		_exit(2);
	snprintf(path, sizeof(path), "%s/cgroup.freeze", dir);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "1", 1) != 1)
		_exit(3);
	for (i = 0; i < AT_ONCE_MS; i++) {
		read_cgroup(dir, "cgroup.events", buf);
		if (strstr(buf, "frozen 1"))
			break;
		usleep(1000);
	}
	if (write(fd, "0", 1) != 1)
		_exit(4);
	_exit(i == AT_ONCE_MS);
}

/* As containers and the host's suspend do */
TEST_F(kvmi, signal_freezer)
{
	struct kvm_vcpu *vcpu = self->vcpu;
	struct kvm_vm *vm = vcpu->vm;
	const char *missing;
	struct runner r;
	struct event ev;
	char dir[64];
	int status;
	pid_t pid;

	missing = make_cgroup(dir, sizeof(dir));
	if (missing) {
		ksft_print_msg("can't get %s\n", missing);
		SKIP(return, "no cgroups here");
	}

	vcpu_arch_set_entry_point(vcpu, guest_count);
	start_to_pause(&r, vcpu, &ev);
	pid = freeze_soon(dir);
	join(&r);
	TEST_ASSERT_EQ(r.err, EINTR);
	TEST_ASSERT(waitpid(pid, &status, 0) == pid && !status,
		    "freezing fails with %#x", status);

	/* The event is open still */
	start(&r, vcpu);
	assert_guest_stands(vm);
	assert_quiet();
	reply_continue(&ev);
	assert_guest_runs(vm);
	stop_guest(&r);
	unhook(vm);
	leave_cgroup(dir);
}

static unsigned long kernel_memory(const char *dir)
{
	char buf[4096], *kernel;

	/* Small changes are only summed up every two seconds */
	usleep(2500 * 1000);
	read_cgroup(dir, "memory.stat", buf);
	kernel = strstr(buf, "\nkernel ");
	TEST_ASSERT(kernel, "memory.stat has no kernel");
	return strtoul(kernel + 8, NULL, 10);
}

/* Not all of it: it is counted in batches */
static void assert_more_memory(const char *dir, unsigned long before,
			       unsigned long more, const char *what)
{
	unsigned long after = kernel_memory(dir);

	TEST_ASSERT(after - before > more / 10 * 9,
		    "of %lu bytes for %s, the group sees %lu", more, what,
		    after - before);
}

#define SPARSE_GPA	0x100000000ull
#define SPARSE_SLOT	11
#define SPARSE_PAGES	(1u << 18)

/* What the tool makes KVM allocate is on the VM's account */
TEST_F(kvmi, memory_accounted)
{
	const unsigned int pages = 65536 / PAGE_SIZE;
	struct kvm_vm *vm = self->vcpu->vm;
	unsigned long before;
	static u8 buf[4096];
	const char *missing;
	unsigned int i;
	char dir[64];

	missing = make_cgroup(dir, sizeof(dir));
	if (missing) {
		ksft_print_msg("can't get %s\n", missing);
		SKIP(return, "no cgroups here");
	}

	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, EXTRA_GPA,
				    EXTRA_SLOT, pages, 0);
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_SHMEM, SPARSE_GPA,
				    SPARSE_SLOT, SPARSE_PAGES, 0);
	hook(vm);
	/* There, and mapped, already */
	for (i = 0; i < pages; i++)
		assert_err(write_physical(EXTRA_GPA + i * PAGE_SIZE, PAGE_SIZE,
					  memset(buf, 0, sizeof(buf))), 0);

	before = kernel_memory(dir);
	memset(buf, 0xcc, sizeof(buf));
	for (i = 0; i < pages; i++)
		assert_err(write_physical(EXTRA_GPA + i * PAGE_SIZE, PAGE_SIZE,
					  buf), 0);
	assert_more_memory(dir, before, 65536 * 32ul, "the journal");

	/* A node of 64 entries for every 1024 pages */
	before = kernel_memory(dir);
	for (i = 0; i < SPARSE_PAGES; i += 1024)
		assert_err(set_page_access(SPARSE_GPA + (u64)i * PAGE_SIZE, 0),
			   0);
	assert_more_memory(dir, before, SPARSE_PAGES / 1024 * 576ul,
			   "page restrictions");

	/* For a vCPU that doesn't run */
	before = kernel_memory(dir);
	for (i = 0; i < MAX_JOBS; i++)
		send_vcpu_msg(KVMI_VCPU_GET_INFO, 0, buf, sizeof(buf));
	get_version();
	assert_more_memory(dir, before, MAX_JOBS * sizeof(buf),
			   "commands that wait");

	unhook_full(vm);
	leave_cgroup(dir);
}

FIXTURE(kvmi_off) {
	struct kvm_vm *vm;
};

FIXTURE_SETUP(kvmi_off)
{
	if (introspection_on())
		SKIP(return, "kvm.introspection is on");
	self->vm = vm_create_barebones();
}

FIXTURE_TEARDOWN(kvmi_off)
{
	kvm_vm_free(self->vm);
}

TEST_F(kvmi_off, param_off_capability)
{
	TEST_ASSERT_EQ(kvm_check_cap(KVM_CAP_INTROSPECTION), 0);
	TEST_ASSERT_EQ(vm_check_cap(self->vm, KVM_CAP_INTROSPECTION), 0);
}

TEST_F(kvmi_off, param_off_hook)
{
	struct kvm_introspection_hook hook = {};
	int fds[2];

	make_sockets(fds);
	hook.fd = fds[0];
	assert_ioctl(self->vm, KVM_INTROSPECTION_HOOK, &hook, EPERM);
	/* Whatever the arguments are */
	hook.padding = 1;
	assert_ioctl(self->vm, KVM_INTROSPECTION_HOOK, &hook, EPERM);
	ASSERT_NE(0, ioctl(self->vm->fd, KVM_INTROSPECTION_HOOK, NULL));
	ASSERT_EQ(EPERM, errno);
}

TEST_F(kvmi_off, param_off_unhook)
{
	assert_ioctl(self->vm, KVM_INTROSPECTION_UNHOOK, NULL, EPERM);
}

TEST_F(kvmi_off, param_off_command)
{
	assert_allow(self->vm, KVM_INTROSPECTION_COMMAND, -1, 1, EPERM);
	assert_allow(self->vm, KVM_INTROSPECTION_COMMAND, -2, 2, EPERM);
}

TEST_F(kvmi_off, param_off_event)
{
	assert_allow(self->vm, KVM_INTROSPECTION_EVENT, -1, 1, EPERM);
	assert_allow(self->vm, KVM_INTROSPECTION_EVENT, -2, 2, EPERM);
}

TEST_F(kvmi_off, param_off_preunhook)
{
	assert_ioctl(self->vm, KVM_INTROSPECTION_PREUNHOOK, NULL, EPERM);
}

TEST_F(kvmi_off, param_off_status)
{
	ASSERT_NE(0, ioctl(self->vm->fd, KVM_INTROSPECTION_STATUS, NULL));
	ASSERT_EQ(EPERM, errno);
}

int main(int argc, char *argv[])
{
	struct sigaction sa = { .sa_handler = on_signal };

	/* KVM without introspection has no such parameter */
	__TEST_REQUIRE(!access("/sys/module/kvm/parameters/introspection",
			       R_OK), "KVM has no introspection");

	sigaction(SIGUSR1, &sa, NULL);
	return test_harness_run(argc, argv);
}
