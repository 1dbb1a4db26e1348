/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * SHA-1 (FIPS 180-4), for the handshake of older QEMUs only: it hashes the
 * shared secret with it.
 */

#include <string.h>

#include "internal.h"

static uint32_t rotate(uint32_t value, unsigned int bits)
{
	return value << bits | value >> (32 - bits);
}

static void add_block(uint32_t hash[5], const uint8_t block[64])
{
	uint32_t a = hash[0], b = hash[1], c = hash[2], d = hash[3], e = hash[4];
	uint32_t w[80];
	int i;

	for (i = 0; i < 16; i++)
		w[i] = (uint32_t)block[4 * i] << 24 |
		       (uint32_t)block[4 * i + 1] << 16 |
		       (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
	for (; i < 80; i++)
		w[i] = rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);

	for (i = 0; i < 80; i++) {
		uint32_t f, k, next;

		if (i < 20) {
			f = (b & c) | (~b & d);
			k = 0x5a827999;
		} else if (i < 40) {
			f = b ^ c ^ d;
			k = 0x6ed9eba1;
		} else if (i < 60) {
			f = (b & c) | (b & d) | (c & d);
			k = 0x8f1bbcdc;
		} else {
			f = b ^ c ^ d;
			k = 0xca62c1d6;
		}
		next = rotate(a, 5) + f + e + k + w[i];
		e = d;
		d = c;
		c = rotate(b, 30);
		b = a;
		a = next;
	}

	hash[0] += a;
	hash[1] += b;
	hash[2] += c;
	hash[3] += d;
	hash[4] += e;
}

void sha1(const void *data, size_t size, uint8_t digest[SHA1_SIZE])
{
	uint32_t hash[5] = {
		0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0
	};
	const uint8_t *bytes = data;
	uint8_t tail[128] = { 0 };
	size_t left = size, tail_size;
	int i;

	for (; left >= 64; left -= 64, bytes += 64)
		add_block(hash, bytes);

	/* the rest, a one bit, zeroes, and the length in bits */
	if (left)
		memcpy(tail, bytes, left);
	tail[left] = 0x80;
	tail_size = left < 56 ? 64 : 128;
	for (i = 0; i < 8; i++)
		tail[tail_size - 1 - i] = (uint64_t)size * 8 >> (8 * i);
	add_block(hash, tail);
	if (tail_size == 128)
		add_block(hash, tail + 64);

	for (i = 0; i < SHA1_SIZE; i++)
		digest[i] = hash[i / 4] >> (24 - 8 * (i % 4));
}
