/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What programs that feed the library nonsense have in common */
#ifndef CHANCE_H
#define CHANCE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static unsigned long round_number;

/* Of the address sanitizer; and what check() calls */
void __asan_on_error(void);
void __asan_on_error(void)
{
	fprintf(stderr, "in round %lu\n", round_number);
}

#define check(condition) do { \
		if (!(condition)) { \
			fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
			__asan_on_error(); \
			abort(); \
		} \
	} while (0)

/* To begin with; the same each time */
static inline uint64_t chance_of_round(void)
{
	return 88172645463325252ULL ^ round_number * 0x9e3779b97f4a7c15ULL;
}

/* xorshift* */
static inline uint32_t chance(uint64_t *state, uint32_t below)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;

	return (*state * 2685821657736338717ULL >> 32) % below;
}

#endif
