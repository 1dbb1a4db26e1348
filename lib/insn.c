/* SPDX-License-Identifier: LGPL-2.1-or-later */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <capstone/capstone.h>

#include "insn.h"

struct insn_decoder {
	csh capstone;
	cs_insn *insn;
};

struct insn_decoder *insn_decoder_new(void)
{
	struct insn_decoder *decoder = calloc(1, sizeof(*decoder));

	if (!decoder)
		return NULL;
	if (cs_open(CS_ARCH_X86, CS_MODE_64, &decoder->capstone)) {
		free(decoder);
		return NULL;
	}
	cs_option(decoder->capstone, CS_OPT_DETAIL, CS_OPT_ON);
	decoder->insn = cs_malloc(decoder->capstone);
	if (!decoder->insn) {
		insn_decoder_free(decoder);
		return NULL;
	}

	return decoder;
}

void insn_decoder_free(struct insn_decoder *decoder)
{
	if (!decoder)
		return;
	if (decoder->insn)
		cs_free(decoder->insn, 1);
	cs_close(&decoder->capstone);
	free(decoder);
}

static bool is_endbr(const uint8_t *bytes, size_t size)
{
	return size >= 4 && bytes[0] == 0xf3 && bytes[1] == 0x0f &&
	       bytes[2] == 0x1e && (bytes[3] == 0xfa || bytes[3] == 0xfb);
}

static bool disassemble(struct insn_decoder *decoder, const uint8_t *bytes,
			size_t size, uint64_t address)
{
	return cs_disasm_iter(decoder->capstone, &bytes, &size, &address,
			      decoder->insn);
}

static bool in_group(const cs_insn *insn, uint8_t group)
{
	unsigned int i;

	for (i = 0; i < insn->detail->groups_count; i++)
		if (insn->detail->groups[i] == group)
			return true;

	return false;
}

/* Where the general-purpose register is in kvm_regs; NULL if it is none */
static __u64 *register_64(struct kvm_regs *regs, x86_reg reg)
{
	switch (reg) {
	case X86_REG_RAX: return &regs->rax;
	case X86_REG_RBX: return &regs->rbx;
	case X86_REG_RCX: return &regs->rcx;
	case X86_REG_RDX: return &regs->rdx;
	case X86_REG_RSI: return &regs->rsi;
	case X86_REG_RDI: return &regs->rdi;
	case X86_REG_RSP: return &regs->rsp;
	case X86_REG_RBP: return &regs->rbp;
	case X86_REG_R8: return &regs->r8;
	case X86_REG_R9: return &regs->r9;
	case X86_REG_R10: return &regs->r10;
	case X86_REG_R11: return &regs->r11;
	case X86_REG_R12: return &regs->r12;
	case X86_REG_R13: return &regs->r13;
	case X86_REG_R14: return &regs->r14;
	case X86_REG_R15: return &regs->r15;
	default: return NULL;
	}
}

static __u64 *register_32(struct kvm_regs *regs, x86_reg reg)
{
	switch (reg) {
	case X86_REG_EAX: return &regs->rax;
	case X86_REG_EBX: return &regs->rbx;
	case X86_REG_ECX: return &regs->rcx;
	case X86_REG_EDX: return &regs->rdx;
	case X86_REG_ESI: return &regs->rsi;
	case X86_REG_EDI: return &regs->rdi;
	case X86_REG_ESP: return &regs->rsp;
	case X86_REG_EBP: return &regs->rbp;
	case X86_REG_R8D: return &regs->r8;
	case X86_REG_R9D: return &regs->r9;
	case X86_REG_R10D: return &regs->r10;
	case X86_REG_R11D: return &regs->r11;
	case X86_REG_R12D: return &regs->r12;
	case X86_REG_R13D: return &regs->r13;
	case X86_REG_R14D: return &regs->r14;
	case X86_REG_R15D: return &regs->r15;
	default: return NULL;
	}
}

static bool is_gpr(x86_reg reg)
{
	struct kvm_regs regs;

	return register_64(&regs, reg) || register_32(&regs, reg);
}

/* Writing the lower half of a register clears the upper one */
static bool set_register(struct kvm_regs *regs, x86_reg reg, uint64_t value)
{
	__u64 *place = register_64(regs, reg);

	if (place) {
		*place = value;
		return true;
	}
	place = register_32(regs, reg);
	if (place) {
		*place = (uint32_t)value;
		return true;
	}

	return false;
}

static bool get_register(struct kvm_regs *regs, x86_reg reg, uint64_t *value)
{
	__u64 *place = register_64(regs, reg);

	if (place) {
		*value = *place;
		return true;
	}
	place = register_32(regs, reg);
	if (place) {
		*value = (uint32_t)*place;
		return true;
	}

	return false;
}

/* jcc: is it taken? -1 if insn is none */
static int condition(const cs_insn *insn, const struct kvm_regs *regs)
{
	bool cf = regs->rflags & RFLAGS_CF, pf = regs->rflags & RFLAGS_PF;
	bool zf = regs->rflags & RFLAGS_ZF, sf = regs->rflags & RFLAGS_SF;
	bool of = regs->rflags & RFLAGS_OF;

	switch (insn->id) {
	case X86_INS_JO: return of;
	case X86_INS_JNO: return !of;
	case X86_INS_JB: return cf;
	case X86_INS_JAE: return !cf;
	case X86_INS_JE: return zf;
	case X86_INS_JNE: return !zf;
	case X86_INS_JBE: return cf || zf;
	case X86_INS_JA: return !cf && !zf;
	case X86_INS_JS: return sf;
	case X86_INS_JNS: return !sf;
	case X86_INS_JP: return pf;
	case X86_INS_JNP: return !pf;
	case X86_INS_JL: return sf != of;
	case X86_INS_JGE: return sf == of;
	case X86_INS_JLE: return zf || sf != of;
	case X86_INS_JG: return !zf && sf == of;
	default: return -1;
	}
}

/* The few simple ones that functions begin with */
static bool can_emulate(const cs_insn *insn)
{
	const cs_x86 *x86 = &insn->detail->x86;
	const cs_x86_op *op = x86->operands;
	struct kvm_regs regs = { 0 };
	struct kvm_regs *r = &regs;

	/* 66 or 67 before a branch or a push mean something else */
	if (x86->prefix[2] && insn->id != X86_INS_NOP)
		return false;
	if (x86->prefix[3])
		return false;

	switch (insn->id) {
	case X86_INS_NOP:
	case X86_INS_PAUSE:
		return true;
	case X86_INS_PUSH:
		return op[0].type == X86_OP_REG && register_64(r, op[0].reg);
	case X86_INS_MOV:
		return x86->op_count == 2 && op[0].type == X86_OP_REG &&
		       is_gpr(op[0].reg) &&
		       (op[1].type == X86_OP_IMM ||
			(op[1].type == X86_OP_REG && is_gpr(op[1].reg)));
	case X86_INS_XOR:
		return op[0].type == X86_OP_REG && op[1].type == X86_OP_REG &&
		       op[0].reg == op[1].reg && is_gpr(op[0].reg);
	case X86_INS_JMP:
	case X86_INS_CALL:
		return op[0].type == X86_OP_IMM;
	default:
		return condition(insn, &regs) >= 0;
	}
}

static bool is_string_insn(unsigned int id)
{
	switch (id) {
	case X86_INS_MOVSB: case X86_INS_MOVSW: case X86_INS_MOVSQ:
	case X86_INS_STOSB: case X86_INS_STOSW: case X86_INS_STOSD:
	case X86_INS_STOSQ:
	case X86_INS_LODSB: case X86_INS_LODSW: case X86_INS_LODSD:
	case X86_INS_LODSQ:
	case X86_INS_SCASB: case X86_INS_SCASW: case X86_INS_SCASD:
	case X86_INS_SCASQ:
	case X86_INS_CMPSB: case X86_INS_CMPSW: case X86_INS_CMPSQ:
		return true;
	/* these are SSE instructions, too */
	case X86_INS_MOVSD: case X86_INS_CMPSD:
		return true;
	default:
		return false;
	}
}

/*
 * What must not be stepped over with the interrupts off and the other vCPUs
 * standing still.  NULL: nothing against it.
 */
static const char *reason_to_refuse(const cs_insn *insn)
{
	const cs_x86 *x86 = &insn->detail->x86;
	unsigned int i;

	switch (insn->id) {
	case X86_INS_CLI:
	case X86_INS_STI:
	case X86_INS_PUSHF: case X86_INS_PUSHFD: case X86_INS_PUSHFQ:
	case X86_INS_POPF: case X86_INS_POPFD: case X86_INS_POPFQ:
		return "it uses the interrupt flag";
	case X86_INS_SYSCALL: case X86_INS_SYSENTER:
	case X86_INS_SYSRET: case X86_INS_SYSEXIT:
	case X86_INS_SWAPGS:
	case X86_INS_LJMP: case X86_INS_LCALL: case X86_INS_RETF:
	case X86_INS_RETFQ:
	case X86_INS_RSM:
		return "it enters or leaves the kernel";
	case X86_INS_INT: case X86_INS_INT1: case X86_INS_INT3:
	case X86_INS_INTO:
	case X86_INS_DIV: case X86_INS_IDIV:
		return "it raises an exception, or may";
	case X86_INS_HLT: case X86_INS_MWAIT: case X86_INS_MONITOR:
		return "it waits";
	/* capstone's group of privileged instructions is not complete */
	case X86_INS_IN: case X86_INS_INSB: case X86_INS_INSW:
	case X86_INS_INSD:
	case X86_INS_OUT: case X86_INS_OUTSB: case X86_INS_OUTSW:
	case X86_INS_OUTSD:
	case X86_INS_RDMSR: case X86_INS_WRMSR: case X86_INS_RDPMC:
	case X86_INS_XSETBV:
	case X86_INS_LGDT: case X86_INS_LIDT: case X86_INS_LLDT:
	case X86_INS_LTR: case X86_INS_LMSW: case X86_INS_CLTS:
	case X86_INS_INVLPG: case X86_INS_INVPCID: case X86_INS_INVD:
	case X86_INS_WBINVD:
		return "it is a privileged instruction";
	case X86_INS_XBEGIN: case X86_INS_XEND: case X86_INS_XABORT:
	case X86_INS_ENTER:
		return "its effect is not known in advance";
	default:
		break;
	}
	/* the names of these in capstone depend on its version */
	if (!strncmp(insn->mnemonic, "ud", 2))
		return "it raises an exception, or may";
	if (in_group(insn, X86_GRP_INT) || in_group(insn, X86_GRP_IRET))
		return "it enters or leaves the kernel";
	if (in_group(insn, X86_GRP_PRIVILEGE) || in_group(insn, X86_GRP_VM))
		return "it is a privileged instruction";
	if ((x86->prefix[0] == 0xf2 || x86->prefix[0] == 0xf3) &&
	    is_string_insn(insn->id))
		return "it repeats";
	if (x86->addr_size != 8)
		return "it uses 32-bit addresses";

	for (i = 0; i < x86->op_count; i++) {
		const cs_x86_op *op = &x86->operands[i];

		if (op->type == X86_OP_REG && op->reg == X86_REG_SS)
			return "it holds off interrupts";
		if (op->type == X86_OP_REG &&
		    ((op->reg >= X86_REG_CR0 && op->reg <= X86_REG_CR15) ||
		     (op->reg >= X86_REG_DR0 && op->reg <= X86_REG_DR15)))
			return "it is a privileged instruction";
		if (op->type == X86_OP_MEM && op->mem.index != X86_REG_INVALID &&
		    !is_gpr(op->mem.index) && op->mem.index != X86_REG_RIZ)
			return "it gathers or scatters";
	}

	return NULL;
}

int insn_decode(struct insn_decoder *decoder, const uint8_t *bytes, size_t size,
		struct insn *insn)
{
	const cs_insn *decoded = decoder->insn;

	memset(insn, 0, sizeof(*insn));
	if (size > INSN_MAX)
		size = INSN_MAX;

	if (is_endbr(bytes, size)) {
		insn->length = 4;
		insn->kind = INSN_EMULATE;
		strcpy(insn->text, bytes[3] == 0xfa ? "endbr64" : "endbr32");
	} else {
		if (!disassemble(decoder, bytes, size, 0))
			return -1;
		insn->length = decoded->size;
		snprintf(insn->text, sizeof(insn->text), "%.16s%s%.30s",
			 decoded->mnemonic, decoded->op_str[0] ? " " : "",
			 decoded->op_str);
		if (can_emulate(decoded)) {
			insn->kind = INSN_EMULATE;
		} else {
			insn->why = reason_to_refuse(decoded);
			insn->kind = insn->why ? INSN_REFUSE : INSN_STEP;
		}
	}
	memcpy(insn->bytes, bytes, insn->length);

	return 0;
}

int insn_emulate(struct insn_decoder *decoder, const struct insn *insn,
		 struct kvm_regs *regs, const struct insn_memory *memory)
{
	const cs_insn *decoded = decoder->insn;
	const cs_x86_op *op;
	struct kvm_regs new = *regs;
	uint64_t value;
	int taken;

	if (insn->kind != INSN_EMULATE)
		return -1;

	new.rip += insn->length;
	new.rflags &= ~RFLAGS_RF;
	if (is_endbr(insn->bytes, insn->length)) {
		*regs = new;
		return 0;
	}

	if (!disassemble(decoder, insn->bytes, insn->length, regs->rip))
		return -1;
	op = decoded->detail->x86.operands;

	switch (decoded->id) {
	case X86_INS_NOP:
	case X86_INS_PAUSE:
		break;
	case X86_INS_PUSH:
		value = *register_64(regs, op[0].reg);
		new.rsp -= 8;
		if (memory->check(memory->context, new.rsp, 8, true) ||
		    memory->write(memory->context, new.rsp, &value, 8))
			return -1;
		break;
	case X86_INS_CALL:
		value = new.rip;
		new.rsp -= 8;
		if (memory->check(memory->context, new.rsp, 8, true) ||
		    memory->write(memory->context, new.rsp, &value, 8))
			return -1;
		new.rip = op[0].imm;
		break;
	case X86_INS_JMP:
		new.rip = op[0].imm;
		break;
	case X86_INS_MOV:
		value = op[1].imm;
		if (op[1].type == X86_OP_REG &&
		    !get_register(regs, op[1].reg, &value))
			return -1;
		if (!set_register(&new, op[0].reg, value))
			return -1;
		break;
	case X86_INS_XOR:
		/* with itself: AF is undefined, processors clear it */
		if (!set_register(&new, op[0].reg, 0))
			return -1;
		new.rflags &= ~(RFLAGS_CF | RFLAGS_OF | RFLAGS_SF | RFLAGS_AF);
		new.rflags |= RFLAGS_ZF | RFLAGS_PF;
		break;
	default:
		taken = condition(decoded, regs);
		if (taken < 0)
			return -1;
		if (taken)
			new.rip = op[0].imm;
		break;
	}

	*regs = new;

	return 0;
}

static bool effective_address(const cs_insn *insn, const x86_op_mem *mem,
			      const struct kvmi_registers *state,
			      uint64_t *address)
{
	struct kvm_regs regs = state->regs;
	uint64_t sum = mem->disp;
	const __u64 *place;

	if (mem->base == X86_REG_RIP) {
		sum += regs.rip + insn->size;
	} else if (mem->base != X86_REG_INVALID) {
		place = register_64(&regs, mem->base);
		if (!place)
			return false;
		sum += *place;
	}
	if (mem->index != X86_REG_INVALID && mem->index != X86_REG_RIZ) {
		place = register_64(&regs, mem->index);
		if (!place)
			return false;
		sum += *place * mem->scale;
	}
	if (mem->segment == X86_REG_FS)
		sum += state->sregs.fs.base;
	else if (mem->segment == X86_REG_GS)
		sum += state->sregs.gs.base;
	*address = sum;

	return true;
}

/* The kernel's half; a user address can fault at any time */
static bool is_kernel_address(uint64_t address)
{
	return address >> 56 == 0xff;
}

static bool usable(const struct insn_memory *memory, uint64_t address,
		   size_t size, bool write)
{
	return is_kernel_address(address) &&
	       is_kernel_address(address + size - 1) &&
	       !memory->check(memory->context, address, size, write);
}

int insn_next(struct insn_decoder *decoder, const struct insn *insn,
	      const struct kvmi_registers *state,
	      const struct insn_memory *memory, uint64_t next[2],
	      unsigned int *count, const char **why)
{
	const cs_insn *decoded = decoder->insn;
	struct kvm_regs regs = state->regs;
	const cs_x86_op *op;
	const cs_x86 *x86;
	const __u64 *place;
	uint64_t address;
	unsigned int i;

	*count = 1;
	next[0] = regs.rip + insn->length;
	*why = insn->why;
	if (insn->kind == INSN_REFUSE)
		return -1;
	if (is_endbr(insn->bytes, insn->length))
		return 0;

	*why = "it cannot be decoded";
	if (!disassemble(decoder, insn->bytes, insn->length, regs.rip))
		return -1;
	x86 = &decoded->detail->x86;
	op = x86->operands;

	/* It must not fault: the handler would find interrupts off */
	*why = "its memory is not accessible now";
	for (i = 0; i < x86->op_count; i++) {
		if (op[i].type != X86_OP_MEM || decoded->id == X86_INS_LEA ||
		    decoded->id == X86_INS_NOP ||
		    !strncmp(decoded->mnemonic, "prefetch", 8))
			continue;
		if (!effective_address(decoded, &op[i].mem, state, &address) ||
		    !usable(memory, address, op[i].size ? op[i].size : 1,
			    !(op[i].access & CS_AC_READ) ||
			    (op[i].access & CS_AC_WRITE)))
			return -1;
	}
	switch (decoded->id) {
	case X86_INS_PUSH:
	case X86_INS_CALL:
		if (!usable(memory, regs.rsp - 8, 8, true))
			return -1;
		break;
	case X86_INS_POP:
	case X86_INS_RET:
		if (!usable(memory, regs.rsp, 8, false))
			return -1;
		break;
	case X86_INS_LEAVE:
		if (!usable(memory, regs.rbp, 8, false))
			return -1;
		break;
	}

	*why = "where it goes is not known";
	switch (decoded->id) {
	case X86_INS_RET:
		if (memory->read(memory->context, regs.rsp, &next[0], 8))
			return -1;
		break;
	case X86_INS_JMP:
	case X86_INS_CALL:
		switch (op[0].type) {
		case X86_OP_IMM:
			next[0] = op[0].imm;
			break;
		case X86_OP_REG:
			place = register_64(&regs, op[0].reg);
			if (!place)
				return -1;
			next[0] = *place;
			break;
		case X86_OP_MEM:
			if (op[0].size != 8 ||
			    !effective_address(decoded, &op[0].mem, state,
					       &address) ||
			    memory->read(memory->context, address, &next[0], 8))
				return -1;
			break;
		default:
			return -1;
		}
		break;
	case X86_INS_JRCXZ: case X86_INS_JECXZ:
	case X86_INS_LOOP: case X86_INS_LOOPE: case X86_INS_LOOPNE:
		next[1] = op[0].imm;
		*count = 2;
		break;
	default:
		i = condition(decoded, &regs);
		if ((int)i >= 0) {
			next[1] = op[0].imm;
			*count = 2;
		} else if (in_group(decoded, X86_GRP_JUMP) ||
			   in_group(decoded, X86_GRP_CALL) ||
			   in_group(decoded, X86_GRP_RET)) {
			return -1;
		}
		break;
	}
	for (i = 0; i < *count; i++)
		if (!is_kernel_address(next[i]))
			return -1;
	if (*count == 2 && next[0] == next[1])
		*count = 1;

	*why = NULL;

	return 0;
}
