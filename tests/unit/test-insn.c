/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Getting over breakpoints: what can be emulated, stepped, or not done */

#include <string.h>

#include <glib.h>

#include "insn.h"

#define STACK 0xffffc90000001000ULL
#define CODE 0xffffffff81000100ULL

static struct insn_decoder *decoder;

/* One writable page of stack, one read-only page of data */
#define DATA 0xffffffff82000000ULL

static uint8_t stack[4096];
static uint8_t data[4096];
static bool no_memory;

static uint8_t *place(uint64_t gva, size_t size, bool write)
{
	if (no_memory)
		return NULL;
	/* so that the end of all addresses is no trap */
	if (gva - STACK <= sizeof(stack) - size)
		return stack + (gva - STACK);
	if (!write && gva - DATA <= sizeof(data) - size)
		return data + (gva - DATA);

	return NULL;
}

static int read_memory(void *context, uint64_t gva, void *to, size_t size)
{
	uint8_t *from = place(gva, size, false);

	(void)context;
	if (!from)
		return -1;
	memcpy(to, from, size);

	return 0;
}

static int write_memory(void *context, uint64_t gva, const void *from,
			size_t size)
{
	uint8_t *to = place(gva, size, true);

	(void)context;
	if (!to)
		return -1;
	memcpy(to, from, size);

	return 0;
}

static int check_memory(void *context, uint64_t gva, size_t size, bool write)
{
	(void)context;

	return place(gva, size, write) ? 0 : -1;
}

static const struct insn_memory memory = {
	read_memory, write_memory, check_memory, NULL
};

static void decode(const char *bytes, size_t size, enum insn_kind kind,
		   struct insn *insn)
{
	uint8_t padded[INSN_MAX];

	memset(padded, 0x90, sizeof(padded));
	memcpy(padded, bytes, size);
	g_assert_cmpint(insn_decode(decoder, padded, sizeof(padded), insn), ==,
			0);
	g_test_message("%s", insn->text);
	g_assert_cmpint(insn->length, ==, size);
	g_assert_cmpint(insn->kind, ==, kind);
	g_assert_true((insn->kind == INSN_REFUSE) == (insn->why != NULL));
}

#define DECODE(bytes, kind, insn) decode(bytes, sizeof(bytes) - 1, kind, insn)

static struct kvm_regs start(void)
{
	struct kvm_regs regs;
	unsigned int i;

	for (i = 0; i < sizeof(regs) / 8; i++)
		((__u64 *)&regs)[i] = 0x1111111111111111ULL * i;
	regs.rip = CODE;
	regs.rsp = STACK + 0x800;
	regs.rflags = 0x246;

	return regs;
}

static struct kvm_regs emulate(const char *bytes, size_t size)
{
	struct kvm_regs regs = start();
	struct insn insn;

	decode(bytes, size, INSN_EMULATE, &insn);
	g_assert_cmpint(insn_emulate(decoder, &insn, &regs, &memory), ==, 0);

	return regs;
}

#define EMULATE(bytes) emulate(bytes, sizeof(bytes) - 1)

static void assert_only_rip(struct kvm_regs regs, uint64_t rip)
{
	struct kvm_regs expected = start();

	expected.rip = rip;
	g_assert_cmpmem(&regs, sizeof(regs), &expected, sizeof(expected));
}

static void test_nops(void)
{
	assert_only_rip(EMULATE("\xf3\x0f\x1e\xfa"), CODE + 4);	/* endbr64 */
	assert_only_rip(EMULATE("\xf3\x0f\x1e\xfb"), CODE + 4);
	assert_only_rip(EMULATE("\x90"), CODE + 1);
	assert_only_rip(EMULATE("\xf3\x90"), CODE + 2);		/* pause */
	assert_only_rip(EMULATE("\x66\x90"), CODE + 2);
	assert_only_rip(EMULATE("\x0f\x1f\x00"), CODE + 3);
	assert_only_rip(EMULATE("\x0f\x1f\x40\x00"), CODE + 4);
	assert_only_rip(EMULATE("\x0f\x1f\x44\x00\x00"), CODE + 5);
	assert_only_rip(EMULATE("\x66\x0f\x1f\x44\x00\x00"), CODE + 6);
	assert_only_rip(EMULATE("\x0f\x1f\x80\x00\x00\x00\x00"), CODE + 7);
	assert_only_rip(EMULATE("\x0f\x1f\x84\x00\x00\x00\x00\x00"), CODE + 8);
	assert_only_rip(EMULATE("\x66\x0f\x1f\x84\x00\x00\x00\x00\x00"),
			CODE + 9);
	assert_only_rip(EMULATE("\x66\x2e\x0f\x1f\x84\x00\x00\x00\x00\x00"),
			CODE + 10);
}

static void assert_pushed(struct kvm_regs regs, uint64_t value)
{
	uint64_t found;

	g_assert_cmphex(regs.rsp, ==, STACK + 0x7f8);
	memcpy(&found, stack + 0x7f8, 8);
	g_assert_cmphex(found, ==, value);
}

static void test_push(void)
{
	struct kvm_regs regs;

	regs = EMULATE("\x55");			/* push rbp */
	assert_pushed(regs, start().rbp);
	g_assert_cmphex(regs.rip, ==, CODE + 1);
	regs = EMULATE("\x41\x57");		/* push r15 */
	assert_pushed(regs, start().r15);
	g_assert_cmphex(regs.rip, ==, CODE + 2);
	regs = EMULATE("\x54");			/* push rsp: the old one */
	assert_pushed(regs, STACK + 0x800);
	regs = EMULATE("\xe8\x10\x00\x00\x00");	/* call */
	assert_pushed(regs, CODE + 5);
	g_assert_cmphex(regs.rip, ==, CODE + 5 + 0x10);

	/* without a stack nothing changes */
	{
		struct insn insn;
		struct kvm_regs before = start();

		DECODE("\x55", INSN_EMULATE, &insn);
		regs = before;
		no_memory = true;
		g_assert_cmpint(insn_emulate(decoder, &insn, &regs, &memory),
				==, -1);
		no_memory = false;
		g_assert_cmpmem(&regs, sizeof(regs), &before, sizeof(before));
		regs.rsp = before.rsp = STACK;	/* below it: guard page */
		g_assert_cmpint(insn_emulate(decoder, &insn, &regs, &memory),
				==, -1);
		g_assert_cmphex(regs.rsp, ==, STACK);
	}
}

static void test_moves(void)
{
	struct kvm_regs regs;

	regs = EMULATE("\x48\x89\xe5");		/* mov rbp, rsp */
	g_assert_cmphex(regs.rbp, ==, STACK + 0x800);
	g_assert_cmphex(regs.rip, ==, CODE + 3);
	regs = EMULATE("\x48\x8b\xec");		/* the same */
	g_assert_cmphex(regs.rbp, ==, STACK + 0x800);
	regs = EMULATE("\x4d\x89\xc7");		/* mov r15, r8 */
	g_assert_cmphex(regs.r15, ==, start().r8);
	regs = EMULATE("\x89\xf8");		/* mov eax, edi */
	g_assert_cmphex(regs.rax, ==, start().rdi & 0xffffffff);
	regs = EMULATE("\x89\xff");		/* mov edi, edi */
	g_assert_cmphex(regs.rdi, ==, start().rdi & 0xffffffff);
	regs = EMULATE("\xb8\xff\xff\xff\xff");	/* mov eax, -1 */
	g_assert_cmphex(regs.rax, ==, 0xffffffff);
	regs = EMULATE("\x48\xc7\xc0\xff\xff\xff\xff");	/* mov rax, -1 */
	g_assert_cmphex(regs.rax, ==, UINT64_MAX);
	regs = EMULATE("\x31\xc0");		/* xor eax, eax */
	g_assert_cmphex(regs.rax, ==, 0);
	g_assert_cmphex(regs.rflags, ==, 0x246);
	regs = EMULATE("\x45\x31\xc0");		/* xor r8d, r8d */
	g_assert_cmphex(regs.r8, ==, 0);
}

static void test_branches(void)
{
	static const struct {
		uint8_t opcode;
		uint64_t flags;		/* one that makes it taken */
	} conditions[] = {
		{ 0x70, RFLAGS_OF }, { 0x72, RFLAGS_CF }, { 0x74, RFLAGS_ZF },
		{ 0x76, RFLAGS_CF }, { 0x76, RFLAGS_ZF }, { 0x78, RFLAGS_SF },
		{ 0x7a, RFLAGS_PF }, { 0x7c, RFLAGS_SF }, { 0x7c, RFLAGS_OF },
		{ 0x7e, RFLAGS_ZF }, { 0x7e, RFLAGS_SF },
	};
	size_t i;

	assert_only_rip(EMULATE("\xeb\x10"), CODE + 0x12);
	assert_only_rip(EMULATE("\xeb\xfe"), CODE);
	assert_only_rip(EMULATE("\xe9\xfb\xff\xff\xff"), CODE);

	for (i = 0; i < G_N_ELEMENTS(conditions); i++) {
		int opposite, set, wide;

		for (opposite = 0; opposite < 2; opposite++)
		for (set = 0; set < 2; set++)
		for (wide = 0; wide < 2; wide++) {
			uint8_t code = conditions[i].opcode + opposite;
			char narrow[2] = { code, 0x20 };
			char wider[6] = { 0x0f, code + 0x10, 0x20 };
			struct kvm_regs regs = start();
			unsigned int length = wide ? 6 : 2;
			struct insn insn;

			decode(wide ? wider : narrow, length, INSN_EMULATE,
			       &insn);
			regs.rflags = 2 | (set ? conditions[i].flags : 0);
			g_assert_cmpint(insn_emulate(decoder, &insn, &regs,
						     &memory), ==, 0);
			g_assert_cmphex(regs.rip, ==, CODE + length +
					(set != opposite ? 0x20 : 0));
		}
	}
}

static int next(const char *bytes, size_t size, struct kvm_regs regs,
		uint64_t to[2], unsigned int *count)
{
	struct kvmi_registers state = { .mode = 8, .regs = regs };
	struct insn insn;
	const char *why;
	int result;

	state.sregs.gs.base = DATA;
	decode(bytes, size, INSN_STEP, &insn);
	result = insn_next(decoder, &insn, &state, &memory, to, count, &why);
	g_assert_true((result != 0) == (why != NULL));
	if (why)
		g_test_message("%s", why);

	return result;
}

#define NEXT(bytes) next(bytes, sizeof(bytes) - 1, regs, to, &count)

static void check_next(int result, unsigned int count, const uint64_t to[2],
		       uint64_t first, uint64_t second)
{
	g_assert_cmpint(result, ==, 0);
	g_assert_cmpint(count, ==, (second ? 2 : 1));
	g_assert_cmphex(to[0], ==, first);
	if (second)
		g_assert_cmphex(to[1], ==, second);
}

/* the call comes first: it sets count and to */
#define assert_next(call, count, to, first, second) do { \
		int result_ = (call); \
		check_next(result_, count, to, first, second); \
	} while (0)

static void test_next(void)
{
	struct kvm_regs regs = start();
	uint64_t to[2], target = CODE + 0x1000;
	unsigned int count;

	/* straight on */
	assert_next(NEXT("\x48\x83\xec\x10"), count, to, CODE + 4, 0);
	assert_next(NEXT("\x85\xff"), count, to, CODE + 2, 0);
	regs.rdi = DATA + 8;
	assert_next(NEXT("\x48\x8b\x07"), count, to, CODE + 3, 0);
	/* writing there would fault */
	g_assert_cmpint(NEXT("\x48\x89\x07"), ==, -1);
	regs.rdi = STACK + 8;
	assert_next(NEXT("\x48\x89\x07"), count, to, CODE + 3, 0);
	/* the last byte is on another page */
	regs.rdi = STACK + 4096 - 7;
	g_assert_cmpint(NEXT("\x48\x89\x07"), ==, -1);
	/* user space can fault at any time */
	regs.rdi = 0x400000;
	g_assert_cmpint(NEXT("\x48\x8b\x07"), ==, -1);
	/* lea does not access memory */
	assert_next(NEXT("\x48\x8d\x07"), count, to, CODE + 3, 0);
	/* mov rax, gs:[0x10]; base + index * 8 + disp */
	assert_next(NEXT("\x65\x48\x8b\x04\x25\x10\x00\x00\x00"), count, to,
		    CODE + 9, 0);
	regs.rax = DATA;
	regs.rbx = 4;
	assert_next(NEXT("\x48\x8b\x44\xd8\x10"), count, to, CODE + 5, 0);
	/* mov rax, [rip + x] */
	assert_next(NEXT("\x48\x8b\x05\xf9\xfe\xff\x00"), count, to, CODE + 7,
		    0);

	/* branches */
	memcpy(stack + 0x800, &target, 8);
	assert_next(NEXT("\xc3"), count, to, target, 0);
	assert_next(NEXT("\xc2\x08\x00"), count, to, target, 0);
	regs.rax = target;
	assert_next(NEXT("\xff\xe0"), count, to, target, 0);	/* jmp rax */
	assert_next(NEXT("\xff\xd0"), count, to, target, 0);	/* call rax */
	memcpy(data + 0x40, &target, 8);
	regs.rdi = DATA;
	assert_next(NEXT("\xff\x67\x40"), count, to, target, 0);
	assert_next(NEXT("\xff\x57\x40"), count, to, target, 0);
	assert_next(NEXT("\xe3\x20"), count, to, CODE + 2, CODE + 0x22);
	assert_next(NEXT("\xe2\x20"), count, to, CODE + 2, CODE + 0x22);
	/* to user space, never */
	regs.rax = 0x400000;
	g_assert_cmpint(NEXT("\xff\xe0"), ==, -1);
	no_memory = true;
	g_assert_cmpint(NEXT("\xc3"), ==, -1);
	no_memory = false;
	/* pop */
	assert_next(NEXT("\x5b"), count, to, CODE + 1, 0);
	regs.rsp = STACK + 4096;
	g_assert_cmpint(NEXT("\x5b"), ==, -1);
}

static void test_refuse(void)
{
	struct insn insn;

	DECODE("\xfa", INSN_REFUSE, &insn);		/* cli */
	DECODE("\xfb", INSN_REFUSE, &insn);		/* sti */
	DECODE("\x9c", INSN_REFUSE, &insn);		/* pushfq */
	DECODE("\x9d", INSN_REFUSE, &insn);		/* popfq */
	DECODE("\xf4", INSN_REFUSE, &insn);		/* hlt */
	DECODE("\x48\xcf", INSN_REFUSE, &insn);		/* iretq */
	DECODE("\x48\x0f\x07", INSN_REFUSE, &insn);	/* sysretq */
	DECODE("\x0f\x05", INSN_REFUSE, &insn);		/* syscall */
	DECODE("\x0f\x01\xf8", INSN_REFUSE, &insn);	/* swapgs */
	DECODE("\x0f\x0b", INSN_REFUSE, &insn);		/* ud2 */
	DECODE("\xcc", INSN_REFUSE, &insn);		/* int3 */
	DECODE("\xcd\x80", INSN_REFUSE, &insn);		/* int 0x80 */
	DECODE("\x0f\x01\xc1", INSN_REFUSE, &insn);	/* vmcall */
	DECODE("\x0f\x01\xd9", INSN_REFUSE, &insn);	/* vmmcall */
	DECODE("\x0f\x22\xd8", INSN_REFUSE, &insn);	/* mov cr3, rax */
	DECODE("\x0f\x30", INSN_REFUSE, &insn);		/* wrmsr */
	DECODE("\xee", INSN_REFUSE, &insn);		/* out dx, al */
	DECODE("\x0f\x01\xc9", INSN_REFUSE, &insn);	/* mwait */
	DECODE("\xf3\x48\xa5", INSN_REFUSE, &insn);	/* rep movsq */
	DECODE("\xf3\xaa", INSN_REFUSE, &insn);		/* rep stosb */
	DECODE("\x48\xf7\xf1", INSN_REFUSE, &insn);	/* div rcx */
	DECODE("\x8e\xd0", INSN_REFUSE, &insn);		/* mov ss, eax */
	DECODE("\x67\x8b\x07", INSN_REFUSE, &insn);	/* mov eax, [edi] */
	DECODE("\xcb", INSN_REFUSE, &insn);		/* far return */
}

static void test_not_an_instruction(void)
{
	static const uint8_t nothing[INSN_MAX] = { 0x06 };
	static const uint8_t cut[] = { 0x48, 0x8b };
	struct insn insn;

	g_assert_cmpint(insn_decode(decoder, nothing, sizeof(nothing), &insn),
			==, -1);
	g_assert_cmpint(insn_decode(decoder, cut, sizeof(cut), &insn), ==, -1);
	g_assert_cmpint(insn_decode(decoder, cut, 0, &insn), ==, -1);
}

/* No sequence of bytes may do harm */
static void test_random(void)
{
	unsigned int i;

	for (i = 0; i < 200000; i++) {
		struct kvmi_registers state = { .mode = 8, .regs = start() };
		uint8_t bytes[INSN_MAX];
		struct insn insn;
		uint64_t to[2];
		unsigned int j, count;
		const char *why;

		for (j = 0; j < sizeof(bytes); j++)
			bytes[j] = g_test_rand_int();
		if (insn_decode(decoder, bytes, sizeof(bytes), &insn))
			continue;
		g_assert_cmpint(insn.length, >, 0);
		g_assert_cmpint(insn.length, <=, INSN_MAX);
		if (!insn_next(decoder, &insn, &state, &memory, to, &count,
			       &why))
			g_assert_cmphex(to[0] >> 56, ==, 0xff);
		insn_emulate(decoder, &insn, &state.regs, &memory);
	}
}

int main(int argc, char **argv)
{
	int result;

	g_test_init(&argc, &argv, NULL);
	decoder = insn_decoder_new();
	g_assert_nonnull(decoder);
	g_test_add_func("/insn/nops", test_nops);
	g_test_add_func("/insn/push", test_push);
	g_test_add_func("/insn/moves", test_moves);
	g_test_add_func("/insn/branches", test_branches);
	g_test_add_func("/insn/next", test_next);
	g_test_add_func("/insn/refuse", test_refuse);
	g_test_add_func("/insn/not-an-instruction", test_not_an_instruction);
	g_test_add_func("/insn/random", test_random);
	result = g_test_run();
	insn_decoder_free(decoder);

	return result;
}
