/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INSN_H
#define INSN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <kvmi/kvmi.h>

/*
 * What has to be known of an instruction to get over a breakpoint on it.
 * 64-bit kernel code only.
 */

#define INSN_MAX 15

#define RFLAGS_CF (1ULL << 0)
#define RFLAGS_PF (1ULL << 2)
#define RFLAGS_AF (1ULL << 4)
#define RFLAGS_ZF (1ULL << 6)
#define RFLAGS_SF (1ULL << 7)
#define RFLAGS_IF (1ULL << 9)
#define RFLAGS_OF (1ULL << 11)
#define RFLAGS_RF (1ULL << 16)

enum insn_kind {
	INSN_EMULATE,	/* its effect can be had by setting registers */
	INSN_STEP,	/* has to be executed by the vCPU */
	INSN_REFUSE,	/* neither is safe: see why */
};

struct insn {
	uint8_t bytes[INSN_MAX];
	uint8_t length;
	enum insn_kind kind;
	char text[48];		/* for humans */
	const char *why;	/* if refused */
};

/*
 * The guest's virtual memory, as the vCPU at hand sees it.  All return 0, or
 * -1 if it can't be done.
 */
struct insn_memory {
	int (*read)(void *context, uint64_t gva, void *data, size_t size);
	int (*write)(void *context, uint64_t gva, const void *data, size_t size);
	/* is it mapped (and writable) throughout? */
	int (*check)(void *context, uint64_t gva, size_t size, bool write);
	void *context;
};

struct insn_decoder;

/* One per thread.  NULL: out of memory. */
struct insn_decoder *insn_decoder_new(void);
void insn_decoder_free(struct insn_decoder *decoder);

/* -1 if this is no instruction (or not all of it) */
int insn_decode(struct insn_decoder *decoder, const uint8_t *bytes, size_t size,
		struct insn *insn);

/*
 * Does what the instruction at regs->rip does, for INSN_EMULATE.
 * -1: memory was not reachable; nothing has changed.
 */
int insn_emulate(struct insn_decoder *decoder, const struct insn *insn,
		 struct kvm_regs *regs, const struct insn_memory *memory);

/*
 * All the places where the vCPU can be after one step of an INSN_STEP (or
 * INSN_EMULATE) instruction, at most two.  -1, with the reason, if it cannot be
 * told or if the instruction could fault.
 */
int insn_next(struct insn_decoder *decoder, const struct insn *insn,
	      const struct kvmi_registers *state,
	      const struct insn_memory *memory, uint64_t next[2],
	      unsigned int *count, const char **why);

#endif
