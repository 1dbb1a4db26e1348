/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* SHA-256 (FIPS 180-4) and HMAC (RFC 2104), for the handshake */

#include <string.h>

#include "internal.h"

#define BLOCK 64

static const uint32_t k[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
	0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
	0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
	0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
	0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
	0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
	0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
	0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
	0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

struct sha256 {
	uint32_t hash[8];
	uint64_t size;
	uint8_t block[BLOCK];
};

static uint32_t rotate(uint32_t value, unsigned int bits)
{
	return value >> bits | value << (32 - bits);
}

static void add_block(uint32_t hash[8], const uint8_t *block)
{
	uint32_t w[64], v[8];
	int i;

	for (i = 0; i < 16; i++)
		w[i] = (uint32_t)block[4 * i] << 24 |
		       (uint32_t)block[4 * i + 1] << 16 |
		       (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
	for (; i < 64; i++) {
		uint32_t a = w[i - 15], b = w[i - 2];

		w[i] = w[i - 16] + w[i - 7] +
		       (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) +
		       (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
	}
	memcpy(v, hash, sizeof(v));
	for (i = 0; i < 64; i++) {
		uint32_t t1 = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^
				      rotate(v[4], 25)) +
			      ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
		uint32_t t2 = (rotate(v[0], 2) ^ rotate(v[0], 13) ^
			       rotate(v[0], 22)) +
			      ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));

		memmove(v + 1, v, 7 * sizeof(v[0]));
		v[4] += t1;
		v[0] = t1 + t2;
	}
	for (i = 0; i < 8; i++)
		hash[i] += v[i];
}

static void start(struct sha256 *s)
{
	*s = (struct sha256){ .hash = {
		0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
		0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
	} };
}

static void add(struct sha256 *s, const void *data, size_t size)
{
	const uint8_t *bytes = data;

	while (size) {
		size_t used = s->size % BLOCK, part = BLOCK - used;

		if (part > size)
			part = size;
		memcpy(s->block + used, bytes, part);
		s->size += part;
		bytes += part;
		size -= part;
		if (s->size % BLOCK == 0)
			add_block(s->hash, s->block);
	}
}

static void finish(struct sha256 *s, uint8_t digest[SHA256_SIZE])
{
	uint64_t bits = s->size * 8;
	uint8_t tail[8];
	int i;

	add(s, "\x80", 1);
	while (s->size % BLOCK != BLOCK - 8)
		add(s, "", 1);
	for (i = 0; i < 8; i++)
		tail[i] = bits >> (56 - 8 * i);
	add(s, tail, 8);
	for (i = 0; i < SHA256_SIZE; i++)
		digest[i] = s->hash[i / 4] >> (24 - 8 * (i % 4));
	explicit_bzero(s, sizeof(*s));
}

void hmac_sha256(const void *key, size_t key_size, const struct iovec *parts,
		 int part_count, uint8_t digest[SHA256_SIZE])
{
	uint8_t pad[BLOCK] = { 0 };
	struct sha256 s;
	int i;

	if (key_size > BLOCK) {
		start(&s);
		add(&s, key, key_size);
		finish(&s, pad);
	} else if (key_size) {
		memcpy(pad, key, key_size);
	}
	for (i = 0; i < BLOCK; i++)
		pad[i] ^= 0x36;
	start(&s);
	add(&s, pad, BLOCK);
	for (i = 0; i < part_count; i++)
		add(&s, parts[i].iov_base, parts[i].iov_len);
	finish(&s, digest);

	for (i = 0; i < BLOCK; i++)
		pad[i] ^= 0x36 ^ 0x5c;
	start(&s);
	add(&s, pad, BLOCK);
	add(&s, digest, SHA256_SIZE);
	finish(&s, digest);
	explicit_bzero(pad, sizeof(pad));
}

bool same_digest(const uint8_t *a, const uint8_t *b)
{
	uint8_t difference = 0;
	int i;

	/* takes as long wherever they differ */
	for (i = 0; i < SHA256_SIZE; i++)
		difference |= a[i] ^ b[i];

	return !difference;
}
