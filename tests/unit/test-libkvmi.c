/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The library against a simulated KVM, honest or not */

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include <glib.h>
#include <glib/gstdio.h>

#include <kvmi/kvmi.h>

#include "internal.h"
#include "sim.h"

#define ok(call) do { \
		struct kvmi_error err_ = { 0 }, *err = &err_; \
		enum kvmi_status status_ = (call); \
		if (status_ != KVMI_OK) \
			g_error("%s:%d: %s: %s", __FILE__, __LINE__, \
				kvmi_status_name(status_), err_.message); \
	} while (0)

/* The call fails so, and says so in all places */
#define fails(call, expected) do { \
		struct kvmi_error err_ = { 0 }, *err = &err_; \
		enum kvmi_status status_ = (call); \
		g_assert_cmpstr(kvmi_status_name(status_), ==, \
				kvmi_status_name(expected)); \
		g_assert_cmpint(err_.status, ==, expected); \
		g_assert_cmpint(strlen(err_.message), >, 0); \
	} while (0)

static struct sim *sim_new(void)
{
	return g_new0(struct sim, 1);
}

static struct kvmi_vm *open_vm(struct sim *sim)
{
	struct kvmi_error err;
	struct kvmi_vm *vm = kvmi_vm_new(sim->client_fd, NULL, 0, &err);

	g_assert_nonnull(vm);
	kvmi_vm_set_timeout(vm, 3000, NULL);

	return vm;
}

static struct kvmi_vm *connect_vm(struct sim *sim)
{
	struct kvmi_vm *vm;

	sim_start(sim, sim->script);
	vm = open_vm(sim);
	ok(kvmi_vm_connect(vm, 0, 0, err));

	return vm;
}

static void done(struct sim *sim, struct kvmi_vm *vm)
{
	kvmi_vm_close(vm);
	sim_stop(sim);
	g_free(sim);
}

/* ------------------------------------------------------------------------ */

static void test_sha1(void)
{
	static const struct {
		const char *text;
		const char *digest;
	} cases[] = {
		{ "", "da39a3ee5e6b4b0d3255bfef95601890afd80709" },
		{ "abc", "a9993e364706816aba3e25717850c26c9cd0d89d" },
		{ "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
		  "84983e441c3bd26ebaae4aa1f95129e5e54670f1" },
	};
	size_t i, length;

	for (i = 0; i < G_N_ELEMENTS(cases); i++) {
		uint8_t digest[SHA1_SIZE];
		char hex[41];
		int j;

		sha1(cases[i].text, strlen(cases[i].text), digest);
		for (j = 0; j < SHA1_SIZE; j++)
			sprintf(hex + 2 * j, "%02x", digest[j]);
		g_assert_cmpstr(hex, ==, cases[i].digest);
	}
	/* all lengths around the borders of blocks, against GLib's */
	for (length = 0; length < 200; length++) {
		g_autoptr(GChecksum) sum = g_checksum_new(G_CHECKSUM_SHA1);
		uint8_t data[200], digest[SHA1_SIZE], expected[SHA1_SIZE];
		gsize size = sizeof(expected);

		memset(data, (int)length, sizeof(data));
		g_checksum_update(sum, data, length);
		g_checksum_get_digest(sum, expected, &size);
		sha1(data, length, digest);
		g_assert_cmpmem(digest, SHA1_SIZE, expected, size);
	}
}

static void test_names(void)
{
	g_assert_cmpstr(kvmi_command_name(KVMI_CMD_VM_READ_PHYSICAL), ==,
			"vm-read-physical");
	g_assert_cmpstr(kvmi_command_name(KVMI_CMD_VCPU_TRANSLATE_GVA), ==,
			"vcpu-translate-gva");
	g_assert_null(kvmi_command_name(0));
	g_assert_null(kvmi_command_name(1));
	g_assert_null(kvmi_command_name(35));
	g_assert_null(kvmi_command_name(UINT32_MAX));
	g_assert_cmpstr(kvmi_event_name(KVMI_EV_BREAKPOINT), ==, "breakpoint");
	g_assert_cmpstr(kvmi_status_name(KVMI_ERR_VERSION), ==, "version");
	g_assert_null(kvmi_event_name(2));
	g_assert_cmpstr(kvmi_status_name((enum kvmi_status)12345), ==, "?");
}

/* ------------------------------------------------------------------------
 * Handshake
 */

static void check_hello(struct kvmi_vm *vm)
{
	const struct kvmi_vm_hello *hello = kvmi_vm_get_hello(vm);
	const struct kvmi_vm_version *version = kvmi_vm_get_version(vm);

	g_assert_cmpstr(hello->name, ==, "a guest");
	g_assert_cmpint(hello->uuid[15], ==, 16);
	g_assert_cmpint(hello->start_time, ==, 1234567890);
	g_assert_cmpint(version->version, ==, 1);
	g_assert_cmpint(version->max_message, ==, 8184);
	g_assert_true(version->singlestep);
}

static void test_handshake(void)
{
	static const unsigned int sizes[] = { 96, 100, 104, 112, 65536 };
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;

		sim->hello_size = sizes[i];
		vm = connect_vm(sim);
		check_hello(vm);
		g_assert_cmpint(kvmi_vm_get_hello(vm)->max_gpa, ==,
				(sizes[i] < 104 ? 0 : SIM_MEMORY));
		done(sim, vm);
	}
}

static void test_handshake_in_pieces(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm;

	sim->piece = 1;
	vm = connect_vm(sim);
	check_hello(vm);
	done(sim, vm);
}

static void test_handshake_key(void)
{
	struct sim *sim = sim_new();
	uint8_t digest[SHA1_SIZE];
	struct kvmi_vm *vm;

	sim_start(sim, NULL);
	vm = kvmi_vm_new(sim->client_fd, "secret", 6, NULL);
	ok(kvmi_vm_connect(vm, 0, 0, err));
	sha1("secret", 6, digest);
	g_assert_cmpmem(sim->cookie, 20, digest, 20);
	done(sim, vm);
}

/* The key is chosen when it is known who calls */
static void test_handshake_late_key(void)
{
	struct sim *sim = sim_new();
	uint8_t digest[SHA1_SIZE];
	struct kvmi_vm *vm;

	sim_start(sim, NULL);
	vm = kvmi_vm_new(sim->client_fd, "wrong", 5, NULL);
	ok(kvmi_vm_wait_hello(vm, err));
	ok(kvmi_vm_wait_hello(vm, err));
	g_assert_cmpstr(kvmi_vm_get_hello(vm)->name, ==, "a guest");
	fails(kvmi_vm_check_event(vm, 0, err), KVMI_ERR_ARGUMENT);
	sha1("secret", 6, digest);
	ok(kvmi_vm_set_key_hash(vm, digest, err));
	ok(kvmi_vm_connect(vm, 0, 0, err));
	g_assert_cmpmem(sim->cookie, 20, digest, 20);
	/* it makes no difference later on */
	ok(kvmi_vm_wait_hello(vm, err));
	kvmi_vm_shutdown(vm);
	fails(kvmi_vm_wait_hello(vm, err), KVMI_ERR_CLOSED);
	done(sim, vm);
}

static void test_hmac(void)
{
	uint8_t key[200], data[300];
	unsigned int length;

	/* against GLib's, around the borders of blocks */
	memset(key, 0x5a, sizeof(key));
	memset(data, 0xa5, sizeof(data));
	for (length = 0; length < 300; length++) {
		g_autoptr(GHmac) hmac = g_hmac_new(G_CHECKSUM_SHA256, key,
						   length % 200);
		struct iovec parts[] = { { data, length / 3 },
					 { data, length - length / 3 } };
		uint8_t digest[SHA256_SIZE], expected[SHA256_SIZE];
		gsize size = sizeof(expected);

		g_hmac_update(hmac, data, length);
		g_hmac_get_digest(hmac, expected, &size);
		hmac_sha256(key, length % 200, parts, 2, digest);
		g_assert_cmpmem(digest, SHA256_SIZE, expected, size);
		g_assert_true(same_digest(digest, expected));
		digest[length % SHA256_SIZE] ^= 1;
		g_assert_false(same_digest(digest, expected));
	}
}

/* Both sides prove that they know the secret */
static void test_handshake_mutual(void)
{
	static const uint8_t none[20];
	uint8_t nonce[32] = { 0 };
	unsigned int count, i;

	for (i = 0; i < 8; i++) {
		struct sim *sim = sim_new();
		enum kvmi_status status;
		struct kvmi_error err;
		struct kvmi_vm *vm;

		sim->secret = i == 4 ? NULL : "open sesame";
		sim->bad_proof = i == 5;
		sim->piece = i == 1;
		sim_start(sim, NULL);
		vm = kvmi_vm_new(sim->client_fd, NULL, 0, NULL);
		kvmi_vm_set_timeout(vm, 3000, NULL);
		fails(kvmi_vm_set_secret(vm, "", 0, err), KVMI_ERR_ARGUMENT);
		fails(kvmi_vm_set_secret(vm, nonce, KVMI_SECRET_MAX + 1, err),
		      KVMI_ERR_ARGUMENT);
		if (i < 6)
			ok(kvmi_vm_set_secret(vm, "open sesame", 11, err));
		else if (i == 6)
			ok(kvmi_vm_set_secret(vm, "open barley", 11, err));
		/* 7: a tool that does not know of it at all */
		status = kvmi_vm_connect(vm, 0, 0, &err);
		if (i < 4) {
			g_assert_cmpint(status, ==, KVMI_OK);
			g_assert_true(sim->good_proof);
			g_assert_cmpmem(sim->cookie, 20, none, 20);
			check_hello(vm);
			ok(kvmi_vm_get_vcpu_count(vm, &count, err));
			/* random, thus never the same */
			g_assert_cmpint(memcmp(nonce, sim->nonce, 32), !=, 0);
			memcpy(nonce, sim->nonce, 32);
		} else if (i == 4 || i == 5) {
			g_assert_cmpint(status, ==, KVMI_ERR_AUTH);
			g_assert_nonnull(strstr(err.message, i == 4 ?
						"auth=hmac" : "secret"));
			fails(kvmi_vm_get_vcpu_count(vm, &count, err),
			      KVMI_ERR_AUTH);
			g_assert_cmpint(sim->commands, ==, 0);
		} else if (i == 6) {
			g_assert_cmpint(status, ==, KVMI_ERR_CLOSED);
			g_assert_false(sim->good_proof);
		}
		if (i == 7) {
			g_assert_cmpint(status, ==, KVMI_ERR_AUTH);
			g_assert_nonnull(strstr(err.message, "set_secret"));
		}
		done(sim, vm);
	}
}

static void script_size(struct sim *sim)
{
	uint32_t size = sim->hello_size;

	sim_send(sim, &size, sizeof(size));
	sim_receive(sim);
}

static void test_handshake_bad_size(void)
{
	static const uint32_t sizes[] = { 0, 1, 95, 65537, UINT32_MAX };
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;

		sim->hello_size = sizes[i];
		sim_start(sim, script_size);
		vm = open_vm(sim);
		fails(kvmi_vm_connect(vm, 0, 0, err), KVMI_ERR_PROTOCOL);
		/* and it stays so */
		fails(kvmi_vm_connect(vm, 0, 0, err), KVMI_ERR_PROTOCOL);
		done(sim, vm);
	}
}

static void script_silent(struct sim *sim)
{
	sim_receive(sim);
}

static void test_handshake_timeout(void)
{
	struct sim *sim = sim_new();
	unsigned int count;
	struct kvmi_vm *vm;

	sim_start(sim, script_silent);
	vm = open_vm(sim);
	ok(kvmi_vm_set_timeout(vm, 50, err));
	fails(kvmi_vm_connect(vm, 0, 0, err), KVMI_ERR_TIMEOUT);
	fails(kvmi_vm_get_vcpu_count(vm, &count, err), KVMI_ERR_ARGUMENT);
	done(sim, vm);
}

/* The connection ends after so many bytes of the handshake */
static void script_cut(struct sim *sim)
{
	uint8_t hello[104] = { 104 };

	sim_send(sim, hello, sim->hello_size);
}

static void test_handshake_cut(void)
{
	static const unsigned int sizes[] = { 0, 1, 3, 4, 50, 103 };
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(sizes); i++) {
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;

		sim->hello_size = sizes[i];
		sim_start(sim, script_cut);
		vm = open_vm(sim);
		fails(kvmi_vm_connect(vm, 0, 0, err), KVMI_ERR_CLOSED);
		done(sim, vm);
	}
}

/* Goes on before it has been answered, until nobody takes it any more */
static void script_talkative(struct sim *sim)
{
	uint8_t bytes[1000] = { 104 };

	sim_send(sim, bytes, 104);
	while (send(sim->fd, bytes, sizeof(bytes), MSG_NOSIGNAL) > 0)
		;
}

static void test_handshake_talkative(void)
{
	struct sim *sim = sim_new();
	enum kvmi_status status;
	struct kvmi_error err;
	struct kvmi_vm *vm;

	sim_start(sim, script_talkative);
	vm = open_vm(sim);
	do {
		status = kvmi_vm_process(vm, &err);
	} while (status == KVMI_OK || status == KVMI_ERR_NOTHING);
	g_assert_cmpint(status, ==, KVMI_ERR_PROTOCOL);
	done(sim, vm);
}

static void script_refuse(struct sim *sim)
{
	sim_handshake(sim);
}

static void test_handshake_refused(void)
{
	struct sim *sim = sim_new();
	struct kvmi_error err;
	struct kvmi_vm *vm;

	sim_start(sim, script_refuse);
	vm = open_vm(sim);
	g_assert_cmpint(kvmi_vm_connect(vm, 0, 0, &err), ==, KVMI_ERR_CLOSED);
	g_assert_nonnull(strstr(err.message, "key"));
	done(sim, vm);
}

/* QEMU goes when it has said hello: the key has nothing to do with it */
static void script_hello(struct sim *sim)
{
	uint8_t bytes[104] = { 104 };

	sim_send(sim, bytes, sizeof(bytes));
}

static void test_handshake_gone(void)
{
	struct sim *sim = sim_new();
	struct kvmi_error err;
	struct kvmi_vm *vm;
	enum kvmi_status status;

	sim_start(sim, script_hello);
	vm = open_vm(sim);
	ok(kvmi_vm_wait_hello(vm, err));
	do {
		status = kvmi_vm_process(vm, &err);
	} while (status == KVMI_OK || status == KVMI_ERR_NOTHING);
	g_assert_cmpint(status, ==, KVMI_ERR_CLOSED);
	g_assert_null(strstr(err.message, "key"));
	done(sim, vm);
}

static void test_old_protocol(void)
{
	struct sim *sim = sim_new();
	struct kvmi_error err;
	struct kvmi_vm *vm;

	sim->max_message = UINT32_MAX;	/* 0, as v7 has padding there */
	sim_start(sim, NULL);
	vm = open_vm(sim);
	g_assert_cmpint(kvmi_vm_connect(vm, 0, 0, &err), ==, KVMI_ERR_VERSION);
	g_assert_nonnull(strstr(err.message, "older"));
	g_assert_nonnull(strstr(err.message, "kvmi doctor"));
	fails(kvmi_vm_check_event(vm, 1, err), KVMI_ERR_VERSION);
	done(sim, vm);
}

static void test_allowed(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm;

	sim->deny = 5;
	sim_start(sim, NULL);
	vm = open_vm(sim);
	ok(kvmi_vm_connect(vm, KVMI_SET(KVMI_CMD_VM_GET_INFO) |
			   KVMI_SET(KVMI_CMD_VM_READ_PHYSICAL),
			   KVMI_SET(KVMI_EV_UNHOOK), err));
	sim->deny = UINT32_MAX;
	ok(kvmi_vm_set_timeout(vm, 50, err));
	{
		struct kvmi_error err;

		g_assert_cmpint(kvmi_vm_connect(vm, 0,
						KVMI_SET(KVMI_EV_BREAKPOINT),
						&err), ==,
				KVMI_ERR_NOT_ALLOWED);
		g_assert_nonnull(strstr(err.message, "breakpoint"));
	}
	/* it can be used nevertheless */
	{
		unsigned int count;

		ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	}
	sim->deny = 0;
	fails(kvmi_vm_connect(vm, KVMI_SET(33), 0, err), KVMI_ERR_UNKNOWN);
	done(sim, vm);
}

/* ------------------------------------------------------------------------
 * Commands
 */

static void test_commands(void)
{
	static const uint32_t msrs[] = { 0xc0000082, 0x174 };
	struct sim *sim = sim_new();
	struct kvmi_registers state;
	struct kvm_regs regs = { .rax = 1, .rip = 2 };
	struct kvmi_vm *vm = connect_vm(sim);
	uint64_t values[2], hz, gpa;
	unsigned int count, before;

	sim->regs[1].rip = 0x123456789abcdef0;

	ok(kvmi_vm_check_command(vm, KVMI_CMD_VM_GET_INFO, err));
	fails(kvmi_vm_check_command(vm, 99, err), KVMI_ERR_NOT_FOUND);
	fails(kvmi_vm_check_command(vm, 65536, err), KVMI_ERR_ARGUMENT);
	ok(kvmi_vm_check_event(vm, KVMI_EV_PAUSE, err));
	fails(kvmi_vm_check_event(vm, 99, err), KVMI_ERR_NOT_FOUND);

	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpint(count, ==, SIM_VCPUS);

	ok(kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, true, err));
	g_assert_cmpint(sim->last_body[2], ==, 1);
	ok(kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, false, err));
	g_assert_cmpint(sim->last_body[2], ==, 0);
	fails(kvmi_vm_control_events(vm, KVMI_EV_CR, true, err),
	      KVMI_ERR_INVALID);

	ok(kvmi_vcpu_control_events(vm, 1, KVMI_EV_BREAKPOINT, true, err));
	g_assert_cmpint(sim->last_vcpu, ==, 1);
	g_assert_cmpint(sim->last_body[8], ==, KVMI_EV_BREAKPOINT);
	g_assert_cmpint(sim->last_body[10], ==, 1);
	fails(kvmi_vcpu_control_events(vm, 2, KVMI_EV_BREAKPOINT, true, err),
	      KVMI_ERR_NOT_STARTED);
	fails(kvmi_vcpu_control_events(vm, 3, KVMI_EV_BREAKPOINT, true, err),
	      KVMI_ERR_INVALID);
	fails(kvmi_vcpu_control_events(vm, 65536, KVMI_EV_CR, true, err),
	      KVMI_ERR_ARGUMENT);
	/* Those that have started; the last has not */
	before = sim->commands;
	ok(kvmi_vcpu_control_events(vm, KVMI_ALL_VCPUS, KVMI_EV_CR, true, err));
	g_assert_cmpint(sim->commands - before, ==, 1 + SIM_VCPUS);
	g_assert_cmpint(sim->last_vcpu, ==, 2);
	ok(kvmi_vcpu_control_cr(vm, KVMI_ALL_VCPUS, 3, true, err));
	ok(kvmi_vcpu_control_msr(vm, KVMI_ALL_VCPUS, 0x174, true, err));
	g_assert_cmpint(sim->last_vcpu, ==, SIM_VCPUS - 1);
	fails(kvmi_vcpu_control_cr(vm, KVMI_ALL_VCPUS, 5, true, err),
	      KVMI_ERR_ARGUMENT);
	fails(kvmi_vcpu_control_singlestep(vm, KVMI_ALL_VCPUS, true, err),
	      KVMI_ERR_ARGUMENT);

	ok(kvmi_vm_control_cleanup(vm, true, err));
	g_assert_cmpint(sim->last_body[0], ==, 1);

	ok(kvmi_vcpu_get_tsc_speed(vm, 0, &hz, err));
	g_assert_cmpint(hz, ==, 2500000000ULL);

	ok(kvmi_vcpu_get_registers(vm, 1, &state, msrs, values, 2, err));
	g_assert_cmphex(state.regs.rip, ==, 0x123456789abcdef0);
	g_assert_cmphex(state.sregs.cr3, ==, 0x1001);
	g_assert_cmpint(state.mode, ==, 8);
	g_assert_cmphex(values[0], ==, 0x1c0000082);
	g_assert_cmphex(values[1], ==, 0x100000174);
	ok(kvmi_vcpu_get_registers(vm, 0, &state, NULL, NULL, 0, err));
	{
		uint32_t many[KVMI_MSRS_MAX] = { 0 };
		uint64_t many_values[KVMI_MSRS_MAX];

		ok(kvmi_vcpu_get_registers(vm, 0, &state, many, many_values,
					   KVMI_MSRS_MAX, err));
		g_assert_cmphex(many_values[KVMI_MSRS_MAX - 1], ==,
				0x100000000);
		fails(kvmi_vcpu_get_registers(vm, 0, &state, many, many_values,
					      KVMI_MSRS_MAX + 1, err),
		      KVMI_ERR_ARGUMENT);
	}

	ok(kvmi_vcpu_set_registers(vm, 2, &regs, err));
	g_assert_cmpint(sim->regs[2].rip, ==, 2);

	ok(kvmi_vcpu_translate(vm, 0, 0x1234, &gpa, err));
	g_assert_cmphex(gpa, ==, 0x0234);
	fails(kvmi_vcpu_translate(vm, 0, 0xffffffff81000000, &gpa, err),
	      KVMI_ERR_UNMAPPED);

	fails(kvmi_vm_set_timeout(vm, 0, err), KVMI_ERR_ARGUMENT);
	fails(kvmi_vm_get_vcpu_count(NULL, &count, err), KVMI_ERR_ARGUMENT);
	fails(kvmi_vm_get_vcpu_count(vm, NULL, err), KVMI_ERR_ARGUMENT);
	/* err may be left out */
	g_assert_cmpint(kvmi_vm_check_event(vm, 99, NULL), ==,
			KVMI_ERR_NOT_FOUND);
	done(sim, vm);
}

/* Those that came with the whole protocol */
static void test_more_commands(void)
{
	struct kvmi_page_access pages[1200];
	static uint64_t values[KVMI_MSRS_MAX + 1];
	static uint32_t msrs[KVMI_MSRS_MAX + 1];
	uint8_t state[KVMI_XSAVE_SIZE], byte;
	struct kvm_sregs sregs;
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	const struct kvmi_vm_version *version = kvmi_vm_get_version(vm);
	struct kvmi_cpuid cpuid;
	uint64_t value;
	size_t i, count;

	g_assert_true(version->get_page_access);
	g_assert_true(version->get_max_gfn);
	g_assert_true(version->journal);
	g_assert_true(version->set_sregs);
	g_assert_true(version->set_msrs);

	ok(kvmi_vcpu_control_cr(vm, 1, 4, true, err));
	g_assert_cmpint(sim->last_body[8], ==, 4);
	g_assert_cmpint(sim->last_body[9], ==, 1);
	fails(kvmi_vcpu_control_cr(vm, 1, 2, true, err), KVMI_ERR_ARGUMENT);
	fails(kvmi_vcpu_control_cr(vm, 1, 256, true, err), KVMI_ERR_ARGUMENT);

	ok(kvmi_vcpu_control_msr(vm, 1, 0xc0000082, true, err));
	g_assert_cmpint(sim->last_body[8], ==, 1);
	g_assert_cmphex(sim->last_body[12], ==, 0x82);
	g_assert_cmphex(sim->last_body[15], ==, 0xc0);

	ok(kvmi_vcpu_control_singlestep(vm, 2, true, err));
	g_assert_cmpint(sim->last_body[8], ==, 1);
	ok(kvmi_vcpu_control_singlestep(vm, 2, false, err));
	g_assert_cmpint(sim->last_body[8], ==, 0);

	ok(kvmi_vcpu_inject_exception(vm, 0, 14, 6, 0x1122334455667788, err));
	g_assert_cmpint(sim->last_body[8], ==, 14);
	g_assert_cmpint(sim->last_body[12], ==, 6);
	g_assert_cmphex(sim->last_body[16], ==, 0x88);
	g_assert_cmphex(sim->last_body[23], ==, 0x11);
	fails(kvmi_vcpu_inject_exception(vm, 0, 2, 0, 0, err), KVMI_ERR_BUSY);
	fails(kvmi_vcpu_inject_exception(vm, 0, 256, 0, 0, err),
	      KVMI_ERR_ARGUMENT);

	ok(kvmi_vcpu_get_cpuid(vm, 0, 1, 2, &cpuid, err));
	g_assert_cmpint(cpuid.eax, ==, 1);
	g_assert_cmpint(cpuid.ebx, ==, 2);
	g_assert_cmpint(cpuid.ecx, ==, 3);
	g_assert_cmpint(cpuid.edx, ==, 4);
	fails(kvmi_vcpu_get_cpuid(vm, 0, 99, 0, &cpuid, err),
	      KVMI_ERR_NOT_FOUND);

	ok(kvmi_vcpu_get_xcr(vm, 0, 0, &value, err));
	g_assert_cmpint(value, ==, 7);
	fails(kvmi_vcpu_get_xcr(vm, 0, 1, &value, err), KVMI_ERR_ARGUMENT);
	ok(kvmi_vcpu_get_mtrr_type(vm, 0, 0x1000, &byte, err));
	g_assert_cmpint(byte, ==, 6);

	memset(state, 0x5a, sizeof(state));
	ok(kvmi_vcpu_set_xsave(vm, 0, state, err));
	memset(state, 0, sizeof(state));
	ok(kvmi_vcpu_get_xsave(vm, 0, state, err));
	g_assert_cmphex(state[0], ==, 0x5a);
	g_assert_cmphex(state[KVMI_XSAVE_SIZE - 1], ==, 0x5a);

	memset(&sregs, 0, sizeof(sregs));
	ok(kvmi_vcpu_set_sregs(vm, 0, &sregs, err));
	memset(&sregs, 1, sizeof(sregs));
	fails(kvmi_vcpu_set_sregs(vm, 0, &sregs, err), KVMI_ERR_INVALID);
	fails(kvmi_vcpu_set_sregs(vm, 0, NULL, err), KVMI_ERR_ARGUMENT);

	for (i = 0; i < KVMI_MSRS_MAX + 1; i++)
		values[i] = msrs[i] = i;
	ok(kvmi_vcpu_set_msrs(vm, 0, msrs, values, KVMI_MSRS_MAX, &count, err));
	g_assert_cmpint(count, ==, KVMI_MSRS_MAX);
	ok(kvmi_vcpu_set_msrs(vm, 0, msrs, values, 1, NULL, err));
	values[3] = 0x1234;
	fails(kvmi_vcpu_set_msrs(vm, 0, msrs, values, 5, &count, err),
	      KVMI_ERR_INVALID);
	g_assert_cmpint(count, ==, 3);
	fails(kvmi_vcpu_set_msrs(vm, 0, msrs, values, KVMI_MSRS_MAX + 1, &count,
				 err), KVMI_ERR_ARGUMENT);
	fails(kvmi_vcpu_set_msrs(vm, 0, msrs, values, 0, &count, err),
	      KVMI_ERR_ARGUMENT);

	ok(kvmi_vm_get_max_gfn(vm, &value, err));
	g_assert_cmpint(value, ==, SIM_MEMORY / 4096 - 1);

	/* more than fit a message; the last one of a page counts */
	for (i = 0; i < G_N_ELEMENTS(pages); i++)
		pages[i] = (struct kvmi_page_access){
			.gpa = i % 16 * 4096 + 5,
			.access = i / 16 == G_N_ELEMENTS(pages) / 16 - 1 ?
				  KVMI_PAGE_R | KVMI_PAGE_X : 0,
		};
	ok(kvmi_vm_set_page_access(vm, pages, G_N_ELEMENTS(pages), err));
	g_assert_cmpint(sim->access_messages, ==, 3);
	for (i = 0; i < 16; i++) {
		ok(kvmi_vm_get_page_access(vm, i * 4096, &byte, err));
		g_assert_cmphex(byte, ==, KVMI_PAGE_R | KVMI_PAGE_X);
	}
	/* one that fails does not keep the others back */
	pages[0] = (struct kvmi_page_access){ SIM_MEMORY, 7 };
	for (i = 1; i < G_N_ELEMENTS(pages); i++)
		pages[i].access = KVMI_PAGE_RWX;
	fails(kvmi_vm_set_page_access(vm, pages, G_N_ELEMENTS(pages), err),
	      KVMI_ERR_INVALID);
	for (i = 0; i < 16; i++)
		g_assert_cmphex(sim->access[i], ==, 0);
	pages[7].access = 8;
	fails(kvmi_vm_set_page_access(vm, pages, 8, err), KVMI_ERR_ARGUMENT);
	ok(kvmi_vm_set_page_access(vm, NULL, 0, err));
	fails(kvmi_vm_get_page_access(vm, SIM_MEMORY, &byte, err),
	      KVMI_ERR_NOT_FOUND);

	/* writes that KVM remembers */
	ok(kvmi_vm_write_physical(vm, 0, "abc", 3, err));
	g_assert_cmpint(sim->write_flags, ==, 0);
	ok(kvmi_vm_write_physical_flags(vm, 0, "abc", 3, KVMI_VM_WRITE_KEEP,
					err));
	g_assert_cmpint(sim->write_flags, ==, KVMI_VM_WRITE_KEEP);
	fails(kvmi_vm_write_physical_flags(vm, 0, "abc", 3, 3, err),
	      KVMI_ERR_ARGUMENT);
	done(sim, vm);

	/* a KVM that has none of this */
	sim = sim_new();
	sim->old = true;
	vm = connect_vm(sim);
	g_assert_false(kvmi_vm_get_version(vm)->journal);
	fails(kvmi_vm_write_physical_flags(vm, 0, "abc", 3,
					   KVMI_VM_WRITE_JOURNAL, err),
	      KVMI_ERR_UNKNOWN);
	fails(kvmi_vm_get_max_gfn(vm, &value, err), KVMI_ERR_UNKNOWN);
	fails(kvmi_vm_get_page_access(vm, 0, &byte, err), KVMI_ERR_UNKNOWN);
	ok(kvmi_vm_write_physical(vm, 0, "abc", 3, err));
	done(sim, vm);
}

static void test_memory(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	uint8_t data[0x3000], back[0x3000];
	unsigned int i, before;

	for (i = 0; i < sizeof(data); i++)
		data[i] = i * 7 + i / 256;

	/* four pages touched by three pages' worth of bytes */
	before = sim->commands;
	ok(kvmi_vm_write_physical(vm, 0xff0, data, sizeof(data), err));
	g_assert_cmpint(sim->commands - before, ==, 4);
	g_assert_cmpmem(sim->memory + 0xff0, sizeof(data), data, sizeof(data));
	ok(kvmi_vm_read_physical(vm, 0xff0, back, sizeof(back), err));
	g_assert_cmpmem(back, sizeof(back), data, sizeof(data));

	before = sim->commands;
	ok(kvmi_vm_read_physical(vm, 0, back, 0, err));
	g_assert_cmpint(sim->commands, ==, before);
	ok(kvmi_vm_read_physical(vm, SIM_MEMORY - 1, back, 1, err));
	fails(kvmi_vm_read_physical(vm, SIM_MEMORY - 1, back, 2, err),
	      KVMI_ERR_NOT_FOUND);
	fails(kvmi_vm_read_physical(vm, UINT64_MAX, back, 2, err),
	      KVMI_ERR_ARGUMENT);
	fails(kvmi_vm_write_physical(vm, 0, NULL, 2, err), KVMI_ERR_ARGUMENT);

	/* virtual: pages 2k and 2k + 1 are swapped */
	ok(kvmi_vcpu_write_virtual(vm, 1, 0x4ff8, data, 16, err));
	g_assert_cmpmem(sim->memory + 0x5ff8, 8, data, 8);
	g_assert_cmpmem(sim->memory + 0x4000, 8, data + 8, 8);
	ok(kvmi_vcpu_read_virtual(vm, 1, 0x4ff8, back, 16, err));
	g_assert_cmpmem(back, 16, data, 16);
	fails(kvmi_vcpu_read_virtual(vm, 1, UINT64_MAX, back, 2, err),
	      KVMI_ERR_ARGUMENT);
	done(sim, vm);
}

static void test_many(void)
{
	enum { COUNT = 10000 };
	struct kvmi_memory_op *ops = g_new0(struct kvmi_memory_op, COUNT);
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	uint8_t byte = 0xcc, *back = g_malloc0(COUNT);
	unsigned int i;

	for (i = 0; i < COUNT; i++)
		ops[i] = (struct kvmi_memory_op){ .gpa = i * 5, .size = 1,
						  .data = &byte };
	ok(kvmi_vm_write_many(vm, ops, COUNT, err));
	for (i = 0; i < COUNT; i++) {
		g_assert_cmpint(sim->memory[i * 5], ==, 0xcc);
		ops[i].data = &back[i];
	}
	ok(kvmi_vm_read_many(vm, ops, COUNT, err));
	for (i = 0; i < COUNT; i++)
		g_assert_cmpint(back[i], ==, 0xcc);

	/* failures in between concern their op only */
	ops[100].gpa = SIM_MEMORY;
	ops[200].gpa = SIM_MEMORY * 2;
	memset(back, 0, COUNT);
	fails(kvmi_vm_read_many(vm, ops, COUNT, err), KVMI_ERR_NOT_FOUND);
	for (i = 0; i < COUNT; i++) {
		bool bad = i == 100 || i == 200;

		g_assert_cmpint(ops[i].status, ==,
				(bad ? KVMI_ERR_NOT_FOUND : KVMI_OK));
		g_assert_cmpint(back[i], ==, (bad ? 0 : 0xcc));
	}
	ok(kvmi_vm_read_many(vm, NULL, 0, err));
	/* sizes of whole pages fill the socket's buffers both ways */
	{
		static uint8_t all[16][SIM_MEMORY];

		for (i = 0; i < 16; i++)
			ops[i] = (struct kvmi_memory_op){
				.size = SIM_MEMORY, .data = all[i] };
		ok(kvmi_vm_read_many(vm, ops, 16, err));
		ok(kvmi_vm_write_many(vm, ops, 16, err));
		g_assert_cmpmem(all[15], SIM_MEMORY, sim->memory, SIM_MEMORY);
	}
	g_free(ops);
	g_free(back);
	done(sim, vm);
}

/* Closes after so many commands */
static void script_close_after(struct sim *sim)
{
	unsigned int left = sim->hello_size;

	sim->hello_size = 0;
	if (!sim_handshake(sim))
		return;
	while (left-- && sim_receive(sim))
		sim_serve_one(sim);
}

static void test_many_cut(void)
{
	struct kvmi_memory_op ops[100];
	struct sim *sim = sim_new();
	uint8_t data[100];
	struct kvmi_vm *vm;
	unsigned int i;

	sim->hello_size = 51;		/* GET_VERSION and 50 reads */
	sim->script = script_close_after;
	vm = connect_vm(sim);
	for (i = 0; i < 100; i++)
		ops[i] = (struct kvmi_memory_op){ .size = 1, .data = &data[i] };
	fails(kvmi_vm_read_many(vm, ops, 100, err), KVMI_ERR_CLOSED);
	for (i = 0; i < 100; i++)
		g_assert_cmpint(ops[i].status, ==,
				(i < 50 ? KVMI_OK : KVMI_ERR_CLOSED));
	done(sim, vm);
}

static void test_errors(void)
{
	/* -2: with a new one each */
	static const struct {
		int32_t error;
		enum kvmi_status status;
	} cases[] = {
		{ KVM_EPERM, KVMI_ERR_NOT_ALLOWED },
		{ KVM_ENOENT, KVMI_ERR_NOT_FOUND },
		{ KVM_EAGAIN, KVMI_ERR_NOT_STARTED },
		{ KVM_ENOMEM, KVMI_ERR_NO_MEMORY },
		{ KVM_EBUSY, KVMI_ERR_BUSY },
		{ KVM_EINVAL, KVMI_ERR_INVALID },
		{ KVM_EOPNOTSUPP, KVMI_ERR_NOT_SUPPORTED },
		{ KVM_ENOSYS, KVMI_ERR_UNKNOWN },
		{ 4711, KVMI_ERR_KVM },
	};
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(cases); i++) {
		struct kvmi_error err;

		g_assert_cmpint(fail_kvm(&err, KVMI_VM_READ_PHYSICAL,
					 cases[i].error), ==, cases[i].status);
		g_assert_cmpint(err.kvm_error, ==, cases[i].error);
		g_assert_nonnull(strstr(err.message, "vm-read-physical"));
		g_assert_cmpint(fail_kvm(NULL, 77, cases[i].error), ==,
				cases[i].status);
	}
}

/* ------------------------------------------------------------------------
 * Page tables
 */

static void set_entry(struct sim *sim, uint64_t table, unsigned int index,
		      uint64_t entry)
{
	memcpy(sim->memory + table + 8 * index, &entry, sizeof(entry));
}

static void test_walker(void)
{
	struct kvmi_registers state = {
		.sregs = { .cr0 = 1ULL << 31, .efer = 1ULL << 10,
			   .cr3 = 0x1018 },
	};
	struct kvmi_paging four, five;
	struct kvmi_translation found;
	struct kvmi_walker *walker;
	struct kvmi_error err;
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	unsigned int cached, commands;
	uint8_t bytes[8192];

	/* 5 levels at 0x8000, the fourth of which is what 4 levels have */
	set_entry(sim, 0x8000, 0, 0x1000 | 7);
	set_entry(sim, 0x8000, 511, 0x1000 | 7);
	set_entry(sim, 0x8000, 256, 0x1000 | 0x87);
	set_entry(sim, 0x1000, 0, 0x2000 | 7);
	set_entry(sim, 0x1000, 511, 0x2000 | 3);	/* not for programs */
	set_entry(sim, 0x2000, 0, 0x3000 | 7);
	set_entry(sim, 0x2000, 1, 0x40000000 | 0x81);	/* 1 GiB, read-only */
	set_entry(sim, 0x2000, 2, 0x7fffffff000 | 7);	/* nowhere */
	set_entry(sim, 0x3000, 0, 0x4000 | 7);
	set_entry(sim, 0x3000, 1, 0x200000 | 0x1083 | 1ULL << 63);
	set_entry(sim, 0x4000, 0, 0x6000 | 7);
	set_entry(sim, 0x4000, 1, 0x5000 | 0x67);
	set_entry(sim, 0x4000, 3, 0x7000 | 6);		/* not present */

	ok(kvmi_paging_of(&state, &four, err));
	g_assert_cmpint(four.levels, ==, 4);
	state.sregs.cr4 = 1 << 12;
	state.sregs.cr3 = 0x8000;
	ok(kvmi_paging_of(&state, &five, err));
	g_assert_cmpint(five.levels, ==, 5);
	state.sregs.efer = 0;
	fails(kvmi_paging_of(&state, &five, err), KVMI_ERR_NOT_SUPPORTED);
	state.sregs.efer = 1 << 10;
	state.sregs.cr0 = 0;
	fails(kvmi_paging_of(&state, &five, err), KVMI_ERR_NOT_SUPPORTED);

	for (cached = 0; cached <= 16; cached += 4) {
		walker = kvmi_walker_new(vm, cached, &err);
		g_assert_nonnull(walker);

		ok(kvmi_walker_translate(walker, &four, 0x1234, &found, err));
		g_assert_cmphex(found.gpa, ==, 0x5234);
		g_assert_cmpint(found.page_size, ==, 4096);
		g_assert_true(found.writable && found.user && found.executable);
		ok(kvmi_walker_translate(walker, &five, 0x1234, &found, err));
		g_assert_cmphex(found.gpa, ==, 0x5234);
		/* the upper half */
		ok(kvmi_walker_translate(walker, &four, 0xffffff8000001234,
					 &found, err));
		g_assert_cmphex(found.gpa, ==, 0x5234);
		g_assert_false(found.user);
		ok(kvmi_walker_translate(walker, &five, 0xffffff8000001234,
					 &found, err));
		ok(kvmi_walker_translate(walker, &five, 0xff00000000001234,
					 &found, err));
		g_assert_true(found.user);
		/* large pages */
		ok(kvmi_walker_translate(walker, &four, 0x212345, &found, err));
		g_assert_cmphex(found.gpa, ==, 0x212345);
		g_assert_cmpint(found.page_size, ==, 2 << 20);
		g_assert_true(found.writable && !found.executable);
		ok(kvmi_walker_translate(walker, &four, 0x52345678, &found,
					 err));
		g_assert_cmphex(found.gpa, ==, 0x52345678);
		g_assert_cmpint(found.page_size, ==, 1 << 30);
		g_assert_false(found.writable);

		fails(kvmi_walker_translate(walker, &four, 0x3000, &found, err),
		      KVMI_ERR_UNMAPPED);
		fails(kvmi_walker_translate(walker, &four, 0x8000000000, &found,
					    err), KVMI_ERR_UNMAPPED);
		fails(kvmi_walker_translate(walker, &four, 0x80000000, &found,
					    err), KVMI_ERR_UNMAPPED);
		/* not canonical, though there is a table for these bits */
		fails(kvmi_walker_translate(walker, &four, 0x1000000001234,
					    &found, err), KVMI_ERR_UNMAPPED);
		fails(kvmi_walker_translate(walker, &four, 0xff00000000001234,
					    &found, err), KVMI_ERR_UNMAPPED);
		five.levels = 3;
		fails(kvmi_walker_translate(walker, &five, 0, &found, err),
		      KVMI_ERR_ARGUMENT);
		five.levels = 5;

		/* pages that are neighbours here are none there */
		memset(sim->memory + 0x5000, 0x55, 4096);
		memset(sim->memory + 0x6000, 0x66, 4096);
		ok(kvmi_walker_read(walker, &four, 0xff0, bytes, 32, err));
		g_assert_cmphex(bytes[15], ==, 0x66);
		g_assert_cmphex(bytes[16], ==, 0x55);
		memset(bytes, 0x77, sizeof(bytes));
		ok(kvmi_walker_write(walker, &four, 0xff0, bytes, 32, err));
		g_assert_cmphex(sim->memory[0x6fef], ==, 0x66);
		g_assert_cmphex(sim->memory[0x6ff0], ==, 0x77);
		g_assert_cmphex(sim->memory[0x500f], ==, 0x77);
		g_assert_cmphex(sim->memory[0x5010], ==, 0x55);
		fails(kvmi_walker_read(walker, &four, 0x1ff0, bytes, 32, err),
		      KVMI_ERR_UNMAPPED);
		fails(kvmi_walker_read(walker, &four, UINT64_MAX, bytes, 2, err),
		      KVMI_ERR_ARGUMENT);

		/* what was read is believed, until it is told */
		commands = sim->commands;
		ok(kvmi_walker_translate(walker, &four, 0x1234, &found, err));
		ok(kvmi_walker_translate(walker, &four, 0x1234, &found, err));
		g_assert_cmpint(sim->commands - commands, ==,
				cached < 8 ? sim->commands - commands : 0);
		if (!cached)
			g_assert_cmpint(sim->commands - commands, ==, 8);
		set_entry(sim, 0x4000, 1, 0x9000 | 7);
		ok(kvmi_walker_translate(walker, &four, 0x1234, &found, err));
		if (cached >= 8 || !cached)
			g_assert_cmphex(found.gpa, ==,
					cached ? 0x5234 : 0x9234);
		kvmi_walker_forget(walker);
		ok(kvmi_walker_translate(walker, &four, 0x1234, &found, err));
		g_assert_cmphex(found.gpa, ==, 0x9234);
		set_entry(sim, 0x4000, 1, 0x5000 | 7);
		kvmi_walker_free(walker);
	}
	kvmi_walker_free(NULL);
	kvmi_walker_forget(NULL);
	done(sim, vm);
}

/* ------------------------------------------------------------------------
 * Events
 */

static void test_events(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm_event *event, *other;
	struct kvm_regs regs;
	struct kvmi_vm *vm;
	unsigned int count;

	sim->event_before = KVMI_VM_GET_INFO;
	sim->regs[1].rip = 0x77;
	vm = connect_vm(sim);

	fails(kvmi_vm_wait_event(vm, 0, &event, err), KVMI_ERR_NOTHING);
	fails(kvmi_vm_wait_event(vm, 20, &event, err), KVMI_ERR_NOTHING);
	g_assert_null(kvmi_vm_next_event(vm));

	/* it comes while the library waits for something else */
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpint(count, ==, SIM_VCPUS);
	event = kvmi_vm_next_event(vm);
	g_assert_nonnull(event);
	g_assert_cmpint(event->id, ==, KVMI_EV_BREAKPOINT);
	g_assert_cmpint(event->vcpu, ==, 1);
	g_assert_cmpint(event->seq, ==, 1);
	g_assert_cmpint(event->state.mode, ==, 8);
	g_assert_cmphex(event->state.regs.rip, ==, 0x77);
	g_assert_cmphex(event->state.sregs.cr3, ==, 0x1001);
	g_assert_cmphex(event->msrs.lstar, ==, 0xffffffff81e00080);
	g_assert_cmphex(event->breakpoint.gpa, ==, 0x42);
	g_assert_cmpint(event->breakpoint.insn_len, ==, 1);
	g_assert_null(kvmi_vm_next_event(vm));

	/* answers */
	fails(kvmi_vm_reply(vm, event, 3, err), KVMI_ERR_ARGUMENT);
	ok(kvmi_vm_reply(vm, event, KVMI_ACTION_RETRY, err));
	fails(kvmi_vm_reply(vm, event, KVMI_ACTION_RETRY, err),
	      KVMI_ERR_ANSWERED);
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpint(sim->replies, ==, 1);
	g_assert_cmpint(sim->last_reply.action, ==, KVMI_ACTION_RETRY);
	g_assert_cmpint(sim->last_reply.event, ==, KVMI_EV_BREAKPOINT);
	g_assert_cmpint(sim->last_seq, ==, 1);
	kvmi_vm_event_free(event);

	/* PAUSE: several at once, answered in another order */
	{
		static const uint16_t vcpus[] = { 2, 0, 1 };
		enum kvmi_status status[3];

		ok(kvmi_vm_pause_vcpus(vm, vcpus, 3, true, status, err));
		g_assert_cmpint(status[2], ==, KVMI_OK);
	}
	event = kvmi_vm_next_event(vm);
	other = kvmi_vm_next_event(vm);
	g_assert_cmpint(event->id, ==, KVMI_EV_PAUSE);
	g_assert_cmpint(event->vcpu, ==, 2);
	g_assert_cmpint(other->vcpu, ==, 0);
	fails(kvmi_vm_reply(vm, event, KVMI_ACTION_RETRY, err),
	      KVMI_ERR_ARGUMENT);
	regs = other->state.regs;
	regs.rip = 0x99;
	ok(kvmi_vm_reply_with_registers(vm, other, KVMI_ACTION_CONTINUE, &regs,
					err));
	ok(kvmi_vm_reply(vm, event, KVMI_ACTION_CONTINUE, err));
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmphex(sim->regs[0].rip, ==, 0x99);
	g_assert_cmpint(sim->replies, ==, 3);
	kvmi_vm_event_free(event);
	kvmi_vm_event_free(other);
	fails(kvmi_vm_pause_vcpu(vm, SIM_VCPUS, false, err), KVMI_ERR_INVALID);
	kvmi_vm_event_free(NULL);
	/* one event is left in the queue: it must be freed by close */
	done(sim, vm);
}

/* One of each kind, with padding that is not zero */
static void script_kinds(struct sim *sim)
{
	struct kvmi_vcpu_event_cr cr = { 4, { 0xaa, 0xaa }, 5, 6 };
	struct kvmi_vcpu_event_msr msr = { 0xc0000080, 0xaaaa, 7, 8 };
	struct kvmi_vcpu_event_trap trap = { 14, 0xaa, 0xaaaa, 9, 10 };
	struct kvmi_vcpu_event_xsetbv xsetbv = { 0, { 0xaa }, 11, 12 };
	struct kvmi_vcpu_event_descriptor descriptor = { 2, 1, { 0xaa } };
	struct kvmi_vcpu_event_pf pf = { 13, 14, 2, KVMI_PF_NOT_EMULATED,
					 0xaaaa, 0xaaaa };
	struct kvmi_vcpu_event_singlestep step = { 1, { 0xaa } };
	uint64_t unknown[3] = { 15, 16, 17 };

#define ONE(id, data) do { \
		sim_event(sim, 1, id, &(data), sizeof(data)); \
		if (!sim_receive(sim)) \
			return; \
		sim_serve_one(sim); \
	} while (0)

	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	ONE(KVMI_VCPU_EVENT_CR, cr);
	ONE(KVMI_VCPU_EVENT_CR, cr);
	ONE(KVMI_VCPU_EVENT_MSR, msr);
	ONE(KVMI_VCPU_EVENT_TRAP, trap);
	ONE(KVMI_VCPU_EVENT_XSETBV, xsetbv);
	ONE(KVMI_VCPU_EVENT_DESCRIPTOR, descriptor);
	ONE(KVMI_VCPU_EVENT_PF, pf);
	pf.flags = 0;
	ONE(KVMI_VCPU_EVENT_PF, pf);
	ONE(KVMI_VCPU_EVENT_SINGLESTEP, step);
	sim_event(sim, 1, KVMI_VCPU_EVENT_HYPERCALL, NULL, 0);
	if (!sim_receive(sim))
		return;
	sim_serve_one(sim);
	/* of a later version of the protocol */
	ONE(0x1235, unknown);
	sim_serve(sim);
}

static void test_kinds(void)
{
	struct kvmi_vm_event *event;
	struct sim *sim = sim_new();
	struct kvmi_vm *vm;
	unsigned int count;
	uint64_t third;

	sim->script = script_kinds;
	vm = connect_vm(sim);

#define NEXT(kind) do { \
		ok(kvmi_vm_wait_event(vm, 3000, &event, err)); \
		g_assert_cmpint(event->id, ==, kind); \
		g_assert_cmphex(event->state.sregs.cr3, ==, 0x1001); \
	} while (0)
#define DONE(action) do { \
		ok(kvmi_vm_reply(vm, event, action, err)); \
		kvmi_vm_event_free(event); \
	} while (0)

	/* the guest's own value, or another */
	NEXT(KVMI_EV_CR);
	g_assert_cmpint(event->cr.cr, ==, 4);
	g_assert_cmpint(event->cr.old_value, ==, 5);
	g_assert_cmpint(event->cr.new_value, ==, 6);
	fails(kvmi_vm_reply(vm, event, KVMI_ACTION_RETRY, err),
	      KVMI_ERR_ARGUMENT);
	/* what the tool does to its copy is of no account */
	event->cr.new_value = 999;
	DONE(KVMI_ACTION_CONTINUE);
	NEXT(KVMI_EV_CR);
	g_assert_cmphex(sim->last_value, ==, 6);
	ok(kvmi_vm_reply_with_value(vm, event, KVMI_ACTION_CONTINUE, 99, err));
	fails(kvmi_vm_reply_with_value(vm, event, KVMI_ACTION_CONTINUE, 99,
				       err), KVMI_ERR_ANSWERED);
	kvmi_vm_event_free(event);

	NEXT(KVMI_EV_MSR);
	g_assert_cmphex(sim->last_value, ==, 99);
	g_assert_cmphex(event->msr.msr, ==, 0xc0000080);
	g_assert_cmpint(event->msr.old_value, ==, 7);
	g_assert_cmpint(event->msr.new_value, ==, 8);
	DONE(KVMI_ACTION_CONTINUE);

	NEXT(KVMI_EV_TRAP);
	g_assert_cmphex(sim->last_value, ==, 8);
	g_assert_cmpint(event->trap.vector, ==, 14);
	g_assert_cmpint(event->trap.error_code, ==, 9);
	g_assert_cmpint(event->trap.address, ==, 10);
	fails(kvmi_vm_reply_with_value(vm, event, KVMI_ACTION_CONTINUE, 1, err),
	      KVMI_ERR_ARGUMENT);
	DONE(KVMI_ACTION_CONTINUE);

	NEXT(KVMI_EV_XSETBV);
	g_assert_cmpint(event->xsetbv.xcr, ==, 0);
	g_assert_cmpint(event->xsetbv.old_value, ==, 11);
	g_assert_cmpint(event->xsetbv.new_value, ==, 12);
	DONE(KVMI_ACTION_CONTINUE);

	NEXT(KVMI_EV_DESCRIPTOR);
	g_assert_cmpint(event->descriptor.descriptor, ==,
			KVMI_DESCRIPTOR_GDTR);
	g_assert_true(event->descriptor.write);
	DONE(KVMI_ACTION_RETRY);

	NEXT(KVMI_EV_PF);
	g_assert_cmpint(event->pf.gva, ==, 13);
	g_assert_cmpint(event->pf.gpa, ==, 14);
	g_assert_cmpint(event->pf.access, ==, KVMI_PAGE_W);
	g_assert_true(event->pf.not_emulated);
	DONE(KVMI_ACTION_RETRY);
	NEXT(KVMI_EV_PF);
	g_assert_false(event->pf.not_emulated);
	DONE(KVMI_ACTION_CONTINUE);

	NEXT(KVMI_EV_SINGLESTEP);
	g_assert_true(event->singlestep.failed);
	DONE(KVMI_ACTION_CONTINUE);
	NEXT(KVMI_EV_HYPERCALL);
	fails(kvmi_vm_reply(vm, event, KVMI_ACTION_RETRY, err),
	      KVMI_ERR_ARGUMENT);
	DONE(KVMI_ACTION_CONTINUE);

	NEXT(0x1235);
	g_assert_cmpint(event->data_size, ==, 24);
	memcpy(&third, event->data + 16, sizeof(third));
	g_assert_cmpint(third, ==, 17);
	DONE(KVMI_ACTION_CONTINUE);
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpint(sim->replies, ==, 11);
	done(sim, vm);
}

static void script_unhooks(struct sim *sim)
{
	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	/* more than once: still one event */
	sim_unhook(sim);
	sim_unhook(sim);
	sim_event(sim, 0, KVMI_VCPU_EVENT_PAUSE, NULL, 0);
}

static void test_unhook_and_end(void)
{
	struct kvmi_vm_event *event;
	struct sim *sim = sim_new();
	struct kvmi_error err;
	struct kvmi_vm *vm;
	enum kvmi_status status;

	sim->script = script_unhooks;
	vm = connect_vm(sim);

	/* the events are there, then the end */
	do {
		struct pollfd poll_fd = { .fd = kvmi_vm_fd(vm),
					  .events = kvmi_vm_poll_events(vm) };

		g_assert_cmpint(poll(&poll_fd, 1, 3000), ==, 1);
		status = kvmi_vm_process(vm, &err);
	} while (status == KVMI_OK);
	g_assert_cmpint(status, ==, KVMI_ERR_CLOSED);
	event = kvmi_vm_next_event(vm);
	g_assert_cmpint(event->id, ==, KVMI_EV_UNHOOK);
	fails(kvmi_vm_reply(vm, event, KVMI_ACTION_CONTINUE, err),
	      KVMI_ERR_CLOSED);
	kvmi_vm_event_free(event);
	ok(kvmi_vm_wait_event(vm, 0, &event, err));
	g_assert_cmpint(event->id, ==, KVMI_EV_PAUSE);
	kvmi_vm_event_free(event);
	fails(kvmi_vm_wait_event(vm, 0, &event, err), KVMI_ERR_CLOSED);
	done(sim, vm);
}

/* ------------------------------------------------------------------------
 * Hostile
 */

static unsigned int hostile;

static void script_hostile(struct sim *sim)
{
	struct kvmi_vcpu_event_breakpoint breakpoint = { 0 };
	struct kvmi_vcpu_event event = { .size = sizeof(event) };
	uint8_t body[9000] = { 0 };

	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	if (!sim_receive(sim))		/* VM_GET_INFO */
		return;

	body[0] = KVMI_VCPU_EVENT_BREAKPOINT;
	memcpy(body + 8, &event, sizeof(event));
	switch (hostile) {
	case 0:		/* too long */
		sim_message(sim, sim->last.id, sim->last.seq, body, 8185);
		break;
	case 1:		/* another number */
		sim_answer(sim, sim->last.id, sim->last.seq + 1, 0, body, 16);
		break;
	case 2:		/* another command */
		sim_answer(sim, sim->last.id + 2, sim->last.seq, 0, body, 16);
		break;
	case 3:		/* no error code */
		sim_message(sim, sim->last.id, sim->last.seq, body, 7);
		break;
	case 4:		/* too short */
		sim_answer(sim, sim->last.id, sim->last.seq, 0, body, 15);
		break;
	case 5:		/* a positive error */
		sim_answer(sim, sim->last.id, sim->last.seq, 1, NULL, 0);
		break;
	case 6:
		sim_answer(sim, sim->last.id, sim->last.seq, INT32_MIN, NULL, 0);
		break;
	case 7:		/* the same answer twice: the second is to nothing */
		sim_answer(sim, sim->last.id, sim->last.seq, 0, body + 600, 16);
		sim_answer(sim, sim->last.id, sim->last.seq, 0, body + 600, 16);
		sim_serve(sim);
		break;
	case 8:		/* events: cut in all kinds of places */
		sim_message(sim, KVMI_VM_EVENT, 1, body, 7);
		break;
	case 9:
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 7);
		break;
	case 10:
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 8);
		break;
	case 11:
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 551);
		break;
	case 12:	/* a breakpoint without data */
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 552);
		break;
	case 13:	/* the inner size beyond the outer one */
		event.size = 600;
		memcpy(body + 8, &event, sizeof(event));
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 568);
		break;
	case 14:	/* the inner size too small */
		event.size = 543;
		memcpy(body + 8, &event, sizeof(event));
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 568);
		break;
	case 15:	/* more data than any event has */
		sim_message(sim, KVMI_VCPU_EVENT, 1, body, 552 + 65);
		break;
	case 16:	/* impossible vCPU */
		sim_event(sim, 65535, KVMI_VCPU_EVENT_PAUSE, NULL, 0);
		break;
	case 17:	/* two events of a vCPU */
		sim_event(sim, 1, KVMI_VCPU_EVENT_BREAKPOINT, &breakpoint,
			  sizeof(breakpoint));
		sim_event(sim, 1, KVMI_VCPU_EVENT_PAUSE, NULL, 0);
		break;
	case 18: {	/* more vCPUs than there can be */
		uint32_t many[4] = { 1000000 };

		sim_answer(sim, sim->last.id, sim->last.seq, 0, many,
			   sizeof(many));
		break;
	}
	default: {	/* data that is too short for the event */
		static const struct {
			unsigned int id;
			size_t size;
		} cuts[] = {
			{ KVMI_VCPU_EVENT_CR, 23 },
			{ KVMI_VCPU_EVENT_MSR, 23 },
			{ KVMI_VCPU_EVENT_TRAP, 15 },
			{ KVMI_VCPU_EVENT_XSETBV, 23 },
			{ KVMI_VCPU_EVENT_DESCRIPTOR, 7 },
			{ KVMI_VCPU_EVENT_PF, 23 },
			{ KVMI_VCPU_EVENT_SINGLESTEP, 7 },
		};

		sim_event(sim, 0, cuts[hostile - 19].id, body + 600,
			  cuts[hostile - 19].size);
	}
	}
	sim_receive(sim);
}

#define HOSTILE 26

static void test_hostile(void)
{
	for (hostile = 0; hostile < HOSTILE; hostile++) {
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;
		unsigned int count;

		sim->script = script_hostile;
		vm = connect_vm(sim);
		if (hostile == 7) {
			ok(kvmi_vm_get_vcpu_count(vm, &count, err));
			fails(kvmi_vm_control_cleanup(vm, true, err),
			      KVMI_ERR_PROTOCOL);
		} else {
			g_test_message("case %u", hostile);
			fails(kvmi_vm_get_vcpu_count(vm, &count, err),
			      KVMI_ERR_PROTOCOL);
		}
		/* dead for good */
		fails(kvmi_vm_check_event(vm, 0, err), KVMI_ERR_PROTOCOL);
		fails(kvmi_vm_process(vm, err), KVMI_ERR_PROTOCOL);
		done(sim, vm);
	}
}

static void script_bad_registers(struct sim *sim)
{
	uint8_t body[472 + 16] = { 0 };

	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	if (!sim_receive(sim))
		return;
	body[464] = hostile;	/* nmsrs */
	sim_answer(sim, sim->last.id, sim->last.seq, 0, body,
		   hostile == 2 ? 487 : 488);
	sim_receive(sim);
}

static void test_bad_registers(void)
{
	for (hostile = 0; hostile < 3; hostile++) {
		static const uint32_t msr = 1;
		struct kvmi_registers state;
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;
		uint64_t value;

		sim->script = script_bad_registers;
		vm = connect_vm(sim);
		if (hostile == 1)
			ok(kvmi_vcpu_get_registers(vm, 0, &state, &msr, &value,
						   1, err));
		else
			fails(kvmi_vcpu_get_registers(vm, 0, &state, &msr,
						      &value, 1, err),
			      KVMI_ERR_PROTOCOL);
		done(sim, vm);
	}
}

static void test_bad_memory(void)
{
	unsigned int size;

	/* error code and one byte less or more than asked for */
	for (size = 8 + 15; size <= 8 + 17; size += 2) {
		struct sim *sim = sim_new();
		struct kvmi_vm *vm = connect_vm(sim);
		uint8_t data[16 + 1] = { 0 };

		sim->answer_size = size;
		fails(kvmi_vm_read_physical(vm, 0, data, 16, err),
		      KVMI_ERR_PROTOCOL);
		g_assert_cmpint(data[16], ==, 0);
		done(sim, vm);
	}
}

/* The connection ends at each byte of an answer */
static unsigned int cut_at;

static void script_cut_answer(struct sim *sim)
{
	struct kvmi_msg_hdr header = { .id = KVMI_VM_GET_INFO, .size = 24 };
	uint8_t message[32] = { 0 };

	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	if (!sim_receive(sim))
		return;
	header.seq = sim->last.seq;
	memcpy(message, &header, sizeof(header));
	sim_send(sim, message, cut_at);
}

static void test_cut_answer(void)
{
	for (cut_at = 0; cut_at <= 32; cut_at++) {
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;
		unsigned int count;

		sim->script = script_cut_answer;
		vm = connect_vm(sim);
		if (cut_at == 32)
			ok(kvmi_vm_get_vcpu_count(vm, &count, err));
		else
			fails(kvmi_vm_get_vcpu_count(vm, &count, err),
			      KVMI_ERR_CLOSED);
		done(sim, vm);
	}
}

/* Everything in pieces of each size */
static void test_pieces(void)
{
	unsigned int piece;

	for (piece = 1; piece < 600; piece += 37) {
		struct kvmi_vm_event *event;
		struct sim *sim = sim_new();
		struct kvmi_vm *vm;
		uint8_t data[5000];
		unsigned int count;

		sim->piece = piece;
		sim->event_before = KVMI_VM_GET_INFO;
		vm = connect_vm(sim);
		ok(kvmi_vm_get_vcpu_count(vm, &count, err));
		event = kvmi_vm_next_event(vm);
		g_assert_cmpint(event->breakpoint.gpa, ==, 0x42);
		kvmi_vm_event_free(event);
		if (piece > 100)
			ok(kvmi_vm_read_physical(vm, 0, data, sizeof(data), err));
		done(sim, vm);
	}
}

/* ------------------------------------------------------------------------
 * Time
 */

/* UNHOOK before each answer to CHECK_EVENT; an event, too, if it is of PF */
static void script_unhook(struct sim *sim)
{
	if (!sim_handshake(sim))
		return;
	while (sim_receive(sim)) {
		if (sim->last.id == KVMI_VM_CHECK_EVENT) {
			sim_unhook(sim);
			if (sim->last_body[0] == KVMI_EV_PF)
				sim_event(sim, 1, KVMI_VCPU_EVENT_PAUSE, NULL,
					  0);
		}
		sim_serve_one(sim);
	}
}

static void on_unhook(struct kvmi_vm *vm, void *context)
{
	unsigned int *told = context, count;

	/* functions can be called, those that wait as well */
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpint(kvmi_vm_dispatch(vm), ==, 0);
	(*told)++;
}

static void test_on_unhook(void)
{
	unsigned int told = 0, others = 0, round;
	struct kvmi_vm_event *event;
	struct kvmi_error err;
	struct pollfd fd;
	struct sim *sim;
	struct kvmi_vm *vm;

	/* it comes in the midst of something else, or while it is waited for */
	for (round = 0; round < 2; round++) {
		told = 0;
		sim = sim_new();
		sim->script = script_unhook;
		vm = connect_vm(sim);
		g_assert_cmpint(kvmi_vm_on_unhook(vm, NULL, NULL, &err), ==,
				KVMI_ERR_ARGUMENT);
		ok(kvmi_vm_on_unhook(vm, on_unhook, &others, err));
		ok(kvmi_vm_on_unhook(vm, on_unhook, &told, err));
		if (round) {
			struct kvmi_call *call;

			ok(kvmi_vm_start_command(vm, KVMI_VM_CHECK_EVENT,
						 "\1\0\0\0\0\0\0", 8, NULL, 0,
						 NULL, &call, err));
			kvmi_call_cancel(call);
		} else {
			ok(kvmi_vm_check_event(vm, 1, err));
		}
		g_assert_cmpint(told, ==, 0);
		g_assert_cmpint(kvmi_vm_wait_event(vm, 60000, &event, &err),
				==, KVMI_ERR_NOTHING);
		g_assert_null(event);
		g_assert_cmpint(told, ==, 1);
		/* once and for all */
		ok(kvmi_vm_check_event(vm, 1, err));
		g_assert_cmpint(kvmi_vm_wait_event(vm, 0, &event, &err), ==,
				KVMI_ERR_NOTHING);
		g_assert_cmpint(told, ==, 1);
		g_assert_cmpint(others, ==, 0);
		done(sim, vm);
	}

	/* an event that comes along is not lost */
	told = 0;
	sim = sim_new();
	sim->script = script_unhook;
	vm = connect_vm(sim);
	ok(kvmi_vm_on_unhook(vm, on_unhook, &told, err));
	ok(kvmi_vm_check_event(vm, KVMI_EV_PF, err));
	g_assert_cmpint(kvmi_vm_wait_event(vm, 60000, &event, &err), ==,
			KVMI_ERR_NOTHING);
	g_assert_cmpint(told, ==, 1);
	ok(kvmi_vm_wait_event(vm, 60000, &event, err));
	g_assert_cmpint(event->id, ==, KVMI_EV_PAUSE);
	kvmi_vm_event_free(event);
	done(sim, vm);

	/* who polls is woken up; it has come before there was a function */
	told = 0;
	sim = sim_new();
	sim->script = script_unhook;
	vm = connect_vm(sim);
	fd = (struct pollfd){ kvmi_vm_fd(vm), kvmi_vm_poll_events(vm), 0 };
	ok(kvmi_vm_check_event(vm, KVMI_EV_PF, err));
	g_assert_cmpint(kvmi_vm_next_timeout(vm), ==, -1);
	ok(kvmi_vm_on_unhook(vm, on_unhook, &told, err));
	event = kvmi_vm_next_event(vm);
	g_assert_cmpint(event->id, ==, KVMI_EV_PAUSE);
	kvmi_vm_event_free(event);
	g_assert_null(kvmi_vm_next_event(vm));
	g_assert_cmpint(poll(&fd, 1, 0), ==, 1);
	g_assert_cmpint(kvmi_vm_next_timeout(vm), ==, 0);
	kvmi_vm_process(vm, NULL);
	g_assert_cmpint(poll(&fd, 1, 0), ==, 1);
	g_assert_cmpint(told, ==, 0);
	g_assert_cmpint(kvmi_vm_dispatch(vm), ==, 1);
	g_assert_cmpint(told, ==, 1);
	g_assert_cmpint(poll(&fd, 1, 0), ==, 0);
	g_assert_cmpint(kvmi_vm_next_timeout(vm), ==, -1);
	done(sim, vm);

	/* nor is it called at the end */
	told = 0;
	sim = sim_new();
	sim->script = script_unhook;
	vm = connect_vm(sim);
	ok(kvmi_vm_on_unhook(vm, on_unhook, &told, err));
	ok(kvmi_vm_check_event(vm, 1, err));
	done(sim, vm);
	g_assert_cmpint(told, ==, 0);
}

/* A child closes what it has while threads of the parent are busy with it */
static void test_fork(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	struct kvmi_call *call;
	unsigned int count;
	uint8_t data;
	int status;
	pid_t child;

	/* left to be sent */
	pthread_mutex_lock(&vm->lock);
	vm->output[0] = 1;
	vm->output_end = 1;
	child = fork();
	if (!child) {
		alarm(5);
		kvmi_vm_close(vm);
		/* what the parent has is no leak */
		execlp("true", "true", NULL);
		_exit(1);
	}
	vm->output_end = 0;
	pthread_mutex_unlock(&vm->lock);
	g_assert_cmpint(waitpid(child, &status, 0), ==, child);
	g_assert_cmpint(status, ==, 0);
	/* nothing of it has arrived */
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	ok(kvmi_vm_start_read_physical(vm, 0, &data, 1, &call, err));
	ok(kvmi_call_wait(call, err));
	done(sim, vm);
}

static void script_late(struct sim *sim)
{
	struct kvmi_msg_hdr late;

	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	/* the first command is answered after the second */
	if (!sim_receive(sim))
		return;
	late = sim->last;
	if (!sim_receive(sim))
		return;
	sim_answer(sim, late.id, late.seq, 0, sim->memory, 16);
	sim_serve_one(sim);
	sim_serve(sim);
}

static void test_timeout(void)
{
	struct sim *sim = sim_new();
	uint8_t data[16] = { 1, 1, 1 }, untouched[16] = { 1, 1, 1 };
	struct kvmi_vm *vm;
	unsigned int count;

	sim->script = script_late;
	vm = connect_vm(sim);
	ok(kvmi_vm_set_timeout(vm, 50, err));
	fails(kvmi_vm_read_physical(vm, 0, data, 16, err), KVMI_ERR_TIMEOUT);
	ok(kvmi_vm_set_timeout(vm, 3000, err));
	/* the late answer goes nowhere, above all not into data */
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpmem(data, 16, untouched, 16);
	g_assert_cmpint(count, ==, SIM_VCPUS);
	done(sim, vm);
}

static void test_limit(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	unsigned int i, count;
	uint64_t hz;

	sim->silent_id = KVMI_VCPU_GET_INFO;
	ok(kvmi_vm_set_timeout(vm, 1, err));
	for (i = 0; i < MAX_PENDING; i++)
		fails(kvmi_vcpu_get_tsc_speed(vm, 0, &hz, err),
		      KVMI_ERR_TIMEOUT);
	fails(kvmi_vcpu_get_tsc_speed(vm, 0, &hz, err), KVMI_ERR_LIMIT);
	fails(kvmi_vm_get_vcpu_count(vm, &count, err), KVMI_ERR_LIMIT);
	done(sim, vm);
}

static gpointer take_answers(gpointer context)
{
	struct kvmi_call **calls = context;
	unsigned int i;

	g_usleep(50000);
	for (i = 0; i < MAX_PENDING; i++)
		ok(kvmi_call_wait(calls[i], err));

	return NULL;
}

/* All places are taken, by others who will give them back */
static void test_limit_of_others(void)
{
	static struct kvmi_memory_op ops[MAX_PENDING + 100];
	static uint8_t data[MAX_PENDING + 100];
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	struct kvmi_page_access page = { 0x5000, KVMI_PAGE_R };
	struct kvmi_call *calls[MAX_PENDING], *call;
	unsigned int i, round, count;
	uint16_t vcpu = 0;
	GThread *thread;

	for (i = 0; i < G_N_ELEMENTS(ops); i++)
		ops[i] = (struct kvmi_memory_op){ .gpa = i, .data = &data[i],
						  .size = 1 };
	for (round = 0; round < 4; round++) {
		for (i = 0; i < MAX_PENDING; i++)
			ok(kvmi_vm_start_read_physical(vm, 0, data, 1, &calls[i],
						       err));
		thread = g_thread_new("others", take_answers, calls);
		switch (round) {
		case 0:
			ok(kvmi_vm_get_vcpu_count(vm, &count, err));
			break;
		case 1:
			ok(kvmi_vm_read_many(vm, ops, G_N_ELEMENTS(ops), err));
			break;
		case 2:
			ok(kvmi_vm_set_page_access(vm, &page, 1, err));
			break;
		case 3:
			ok(kvmi_vm_pause_vcpus(vm, &vcpu, 1, false, NULL, err));
		}
		g_thread_join(thread);
	}

	/* Some are left: enough for all, by and by */
	for (i = 0; i < MAX_PENDING - 3; i++)
		ok(kvmi_vm_start_read_physical(vm, 0, data, 1, &calls[i], err));
	ok(kvmi_vm_read_many(vm, ops, G_N_ELEMENTS(ops), err));
	/* but these don't wait */
	for (; i < MAX_PENDING; i++)
		ok(kvmi_vm_start_read_physical(vm, 0, data, 1, &calls[i], err));
	fails(kvmi_vm_start_read_physical(vm, 0, data, 1, &call, err),
	      KVMI_ERR_LIMIT);
	take_answers(calls);
	done(sim, vm);
}

/* The event is answered though the registers could not be set */
static void test_limit_and_reply(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	struct kvmi_call *calls[MAX_PENDING];
	struct kvmi_vm_event *event;
	struct kvm_regs regs = { 0 };
	unsigned int i, count;
	uint8_t data;

	sim->event_before = KVMI_VM_GET_INFO;
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	event = kvmi_vm_next_event(vm);
	for (i = 0; i < MAX_PENDING; i++)
		ok(kvmi_vm_start_read_physical(vm, 0, &data, 1, &calls[i], err));
	ok(kvmi_vm_set_timeout(vm, 50, err));
	fails(kvmi_vm_reply_with_registers(vm, event, KVMI_ACTION_RETRY, &regs,
					   err), KVMI_ERR_LIMIT);
	fails(kvmi_vm_reply(vm, event, KVMI_ACTION_RETRY, err),
	      KVMI_ERR_ANSWERED);
	kvmi_vm_event_free(event);
	ok(kvmi_vm_set_timeout(vm, 3000, err));
	take_answers(calls);
	ok(kvmi_vm_get_vcpu_count(vm, &count, err));
	g_assert_cmpint(sim->replies, ==, 1);
	done(sim, vm);
}

/* Several commands that nobody answers take the time of one */
static void test_one_timeout(void)
{
	static struct kvmi_page_access pages[511 * 16];
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	enum kvmi_status status[300];
	uint16_t vcpus[300] = { 0 };
	gint64 start;
	unsigned int i;

	for (i = 0; i < G_N_ELEMENTS(pages); i++)
		pages[i] = (struct kvmi_page_access){ 0x1000, KVMI_PAGE_R };
	ok(kvmi_vm_set_timeout(vm, 500, err));
	sim->silent_id = KVMI_VM_PAUSE_VCPU;
	start = g_get_monotonic_time();
	fails(kvmi_vm_pause_vcpus(vm, vcpus, 300, true, status, err),
	      KVMI_ERR_TIMEOUT);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 4000 * 1000);
	g_assert_cmpint(status[0], ==, KVMI_ERR_TIMEOUT);
	g_assert_cmpint(status[255], ==, KVMI_ERR_TIMEOUT);
	/* these have not been asked */
	g_assert_cmpint(status[256], ==, KVMI_ERR_LIMIT);
	g_assert_cmpint(status[299], ==, KVMI_ERR_LIMIT);

	sim->silent_id = KVMI_VM_SET_PAGE_ACCESS;
	start = g_get_monotonic_time();
	fails(kvmi_vm_set_page_access(vm, pages, G_N_ELEMENTS(pages), err),
	      KVMI_ERR_TIMEOUT);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 4000 * 1000);
	done(sim, vm);
}

/* A peer that does not read: sending must not hang */
static void script_deaf(struct sim *sim)
{
	if (!sim_handshake(sim) || !sim_receive(sim))
		return;
	sim_serve_one(sim);
	while (!g_atomic_int_get(&sim->hang_up))
		g_usleep(1000);
	/* a cure; mute for ever */
	while (sim_receive(sim))
		g_atomic_int_inc(&sim->commands);
}

/* What could not be sent goes out of an event loop that only waits for input */
static void test_deaf_for_a_while(void)
{
	struct sim *sim = sim_new();
	uint8_t *data = g_malloc0(32 * 4096);
	struct pollfd poll_fd = { .events = POLLIN };
	unsigned int i, commands;
	struct kvmi_vm *vm;

	sim->script = script_deaf;
	vm = connect_vm(sim);
	poll_fd.fd = kvmi_vm_fd(vm);
	ok(kvmi_vm_set_timeout(vm, 100, err));
	for (i = 0; i < 3; i++)
		fails(kvmi_vm_write_physical(vm, 0, data, 32 * 4096, err),
		      KVMI_ERR_TIMEOUT);
	g_assert_cmpint(poll(&poll_fd, 1, 50), ==, 0);
	g_atomic_int_set(&sim->hang_up, 1);
	/* as long as there is something to be sent: no answer comes */
	for (i = 0; poll(&poll_fd, 1, 1000) == 1; i++) {
		enum kvmi_status status = kvmi_vm_process(vm, NULL);

		g_assert_true(status == KVMI_OK || status == KVMI_ERR_NOTHING);
	}
	g_assert_cmpint(i, >, 0);
	commands = g_atomic_int_get(&sim->commands);
	ok(kvmi_vm_flush(vm, err));
	g_usleep(100000);
	g_assert_cmpuint(g_atomic_int_get(&sim->commands), ==, commands);
	done(sim, vm);
	g_free(data);
}

/* An event loop is told, too, that there are no more file descriptors */
static void test_no_poll_fd(void)
{
	struct rlimit was, none;
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	struct pollfd poll_fd = { .events = POLLIN };
	struct kvmi_error err;
	int i;

	getrlimit(RLIMIT_NOFILE, &was);
	/* without any, and without the second */
	for (i = 0; i < 2; i++) {
		if (i)
			vm = connect_vm(sim = sim_new());
		none = (struct rlimit){ dup(0), was.rlim_max };
		close(none.rlim_cur);
		none.rlim_cur += i;
		g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &none), ==, 0);
		poll_fd.fd = kvmi_vm_fd(vm);
		g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &was), ==, 0);
		g_assert_cmpint(poll(&poll_fd, 1, 1000), ==, 1);
		g_assert_cmpint(kvmi_vm_process(vm, &err), ==, KVMI_ERR_SYSTEM);
		g_assert_cmpint(err.sys_errno, ==, EMFILE);
		done(sim, vm);
	}
}

static void test_deaf(void)
{
	struct sim *sim = sim_new();
	uint8_t *data = g_malloc0(32 * 4096);
	gint64 start = g_get_monotonic_time();
	struct kvmi_vm *vm;
	unsigned int i;

	sim->script = script_deaf;
	vm = connect_vm(sim);
	ok(kvmi_vm_set_timeout(vm, 100, err));
	for (i = 0; i < 3; i++)
		fails(kvmi_vm_write_physical(vm, 0, data, 32 * 4096, err),
		      KVMI_ERR_TIMEOUT);
	/* closing does not hang either */
	kvmi_vm_close(vm);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 5000000);
	g_atomic_int_set(&sim->hang_up, 1);
	sim_stop(sim);
	g_free(sim);
	g_free(data);
}

/* ------------------------------------------------------------------------
 * Listening
 */

/* vsock has a loopback where the module is there */
/* ------------------------------------------------------------------------
 * Commands whose answer is waited for later
 */

static void test_calls(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	struct kvmi_call *calls[8];
	struct kvmi_registers state[3];
	struct kvmi_vm_get_info_reply info;
	uint8_t in[4][4096], out[16] = { 1, 2, 3 };
	struct kvm_regs regs = { .rax = 0x1234 };
	uint64_t gpa[2] = { 0 };
	size_t size = 0;
	unsigned int i;

	/* ended in another order than started */
	ok(kvmi_vm_start_write_physical(vm, 0x2ff0, out, sizeof(out), &calls[0],
					err));
	memset(out, 0, sizeof(out));
	for (i = 0; i < 4; i++)
		ok(kvmi_vm_start_read_physical(vm, 0x1000 * i, in[i], 4096,
					       &calls[1 + i], err));
	for (i = 4; i > 0; i--)
		ok(kvmi_call_wait(calls[i], err));
	ok(kvmi_call_wait(calls[0], err));
	g_assert_cmpint(in[2][0xff2], ==, 3);
	g_assert_cmpmem(in, sizeof(in), sim->memory, sizeof(in));

	ok(kvmi_vcpu_start_set_registers(vm, 1, &regs, &calls[0], err));
	for (i = 0; i < 3; i++)
		ok(kvmi_vcpu_start_get_registers(vm, i, &state[i], &calls[1 + i],
						 err));
	ok(kvmi_vcpu_start_translate(vm, 0, 0x3123, &gpa[0], &calls[4], err));
	ok(kvmi_vcpu_start_translate(vm, 0, 1ULL << 40, &gpa[1], &calls[5], err));
	ok(kvmi_vcpu_start_control_events(vm, 2, KVMI_EV_CR, true, &calls[6],
					  err));
	ok(kvmi_vm_start_command(vm, KVMI_VM_GET_INFO, NULL, 0, &info,
				 sizeof(info), &size, &calls[7], err));
	for (i = 0; i < 5; i++)
		ok(kvmi_call_wait(calls[i], err));
	g_assert_cmphex(state[1].regs.rax, ==, 0x1234);
	g_assert_cmphex(state[2].sregs.cr3, ==, 0x1002);
	g_assert_cmphex(gpa[0], ==, 0x2123);
	/* each fails as it would have without start_ */
	fails(kvmi_call_wait(calls[5], err), KVMI_ERR_UNMAPPED);
	g_assert_cmphex(gpa[1], ==, 0);
	fails(kvmi_call_wait(calls[6], err), KVMI_ERR_NOT_STARTED);
	ok(kvmi_call_wait(calls[7], err));
	g_assert_cmpint(size, ==, sizeof(info));
	g_assert_cmpint(info.vcpu_count, ==, SIM_VCPUS);

	ok(kvmi_vm_start_read_physical(vm, SIM_MEMORY, in[0], 1, &calls[0], err));
	fails(kvmi_call_wait(calls[0], err), KVMI_ERR_NOT_FOUND);

	/* forgotten: nothing is written to any more */
	memset(in[0], 0x55, 4096);
	ok(kvmi_vm_start_read_physical(vm, 0, in[0], 4096, &calls[0], err));
	kvmi_call_cancel(calls[0]);
	ok(kvmi_vm_check_event(vm, 1, err));
	g_assert_cmphex(in[0][0], ==, 0x55);

	fails(kvmi_vm_start_read_physical(vm, 0xfff, in[0], 2, &calls[0], err),
	      KVMI_ERR_ARGUMENT);
	fails(kvmi_vm_start_read_physical(vm, 0, in[0], 0, &calls[0], err),
	      KVMI_ERR_ARGUMENT);
	fails(kvmi_vm_start_command(vm, KVMI_VCPU_EVENT, NULL, 0, NULL, 0, NULL,
				    &calls[0], err), KVMI_ERR_ARGUMENT);
	fails(kvmi_vm_start_command(vm, KVMI_VM_GET_INFO, NULL, 0, NULL, 1, NULL,
				    &calls[0], err), KVMI_ERR_ARGUMENT);
	fails(kvmi_vcpu_start_translate(vm, 70000, 0, gpa, &calls[0], err),
	      KVMI_ERR_ARGUMENT);
	fails(kvmi_call_wait(NULL, err), KVMI_ERR_ARGUMENT);
	done(sim, vm);
}

struct told {
	unsigned int count;
	enum kvmi_status status;
	unsigned int again;	/* start so many more */
	uint8_t data[64];
};

static void on_told(struct kvmi_vm *vm, const struct kvmi_error *result,
		    void *context)
{
	struct told *told = context;
	struct kvmi_call *call;

	told->count++;
	told->status = result->status;
	if (told->again) {
		told->again--;
		ok(kvmi_vm_start_read_physical(vm, 0, told->data, 64, &call, err));
		kvmi_call_then(call, on_told, told);
	}
}

/* As an event loop does it */
static void dispatch_until(struct kvmi_vm *vm, unsigned int *count,
			   unsigned int wanted)
{
	int64_t end = g_get_monotonic_time() + 10 * G_USEC_PER_SEC;

	while (*count < wanted) {
		struct pollfd fd = { kvmi_vm_fd(vm), kvmi_vm_poll_events(vm), 0 };

		g_assert_cmpint(g_get_monotonic_time(), <, end);
		poll(&fd, 1, kvmi_vm_next_timeout(vm));
		kvmi_vm_process(vm, NULL);
		kvmi_vm_dispatch(vm);
	}
}

static void test_calls_then(void)
{
	struct sim *sim = sim_new();
	struct kvmi_vm *vm = connect_vm(sim);
	struct told told = { .again = 9 };
	struct kvmi_call *call;
	unsigned int i;

	g_assert_cmpint(kvmi_vm_next_timeout(vm), ==, -1);
	g_assert_cmpint(kvmi_vm_dispatch(vm), ==, 0);
	sim->memory[63] = 0x77;
	ok(kvmi_vm_start_read_physical(vm, 0, told.data, 64, &call, err));
	kvmi_call_then(call, on_told, &told);
	g_assert_cmpint(kvmi_vm_next_timeout(vm), >, 0);
	dispatch_until(vm, &told.count, 10);
	g_assert_cmpint(told.status, ==, KVMI_OK);
	g_assert_cmphex(told.data[63], ==, 0x77);
	g_assert_cmpint(kvmi_vm_next_timeout(vm), ==, -1);

	/* The data comes with the function, and not before */
	memset(told.data, 0, sizeof(told.data));
	ok(kvmi_vm_start_read_physical(vm, 0, told.data, 64, &call, err));
	ok(kvmi_vm_check_event(vm, 1, err));
	g_assert_true(kvmi_call_is_done(call));
	g_assert_cmphex(told.data[63], ==, 0);
	kvmi_call_then(call, on_told, &told);
	g_assert_cmpint(kvmi_vm_next_timeout(vm), ==, 0);
	g_assert_cmpint(kvmi_vm_dispatch(vm), ==, 1);
	g_assert_cmphex(told.data[63], ==, 0x77);

	/* As many as there may be, and no more */
	told = (struct told){ 0 };
	for (i = 0; i < 2000; i++) {
		struct kvmi_error err;
		enum kvmi_status status = kvmi_vm_start_read_physical(
			vm, 64 * (i % 8), told.data, 64, &call, &err);

		if (status == KVMI_ERR_LIMIT)
			break;
		g_assert_cmpint(status, ==, KVMI_OK);
		kvmi_call_then(call, on_told, &told);
	}
	g_assert_cmpint(i, ==, MAX_PENDING);
	dispatch_until(vm, &told.count, MAX_PENDING);
	g_assert_cmpint(told.count, ==, MAX_PENDING);
	done(sim, vm);
}

/* Too late, cut off, closed: each is told so, once */
static void test_calls_end(void)
{
	struct sim *sim = sim_new();
	struct told told[4] = { 0 };
	struct kvmi_vm *vm;
	struct kvmi_call *call, *open;

	sim->silent_id = KVMI_VCPU_GET_INFO;
	vm = connect_vm(sim);
	kvmi_vm_set_timeout(vm, 100, NULL);
	ok(kvmi_vm_start_command(vm, KVMI_VCPU_GET_INFO, "\0\0\0\0\0\0\0", 8,
				 told[0].data, 8, NULL, &call, err));
	kvmi_call_then(call, on_told, &told[0]);
	dispatch_until(vm, &told[0].count, 1);
	g_assert_cmpint(told[0].status, ==, KVMI_ERR_TIMEOUT);
	kvmi_vm_set_timeout(vm, 3000, NULL);
	ok(kvmi_vm_check_event(vm, 1, err));

	ok(kvmi_vm_start_command(vm, KVMI_VCPU_GET_INFO, "\0\0\0\0\0\0\0", 8,
				 told[1].data, 8, NULL, &call, err));
	kvmi_call_then(call, on_told, &told[1]);
	ok(kvmi_vm_start_command(vm, KVMI_VCPU_GET_INFO, "\0\0\0\0\0\0\0", 8,
				 told[1].data, 8, NULL, &open, err));
	g_assert_false(kvmi_call_is_done(open));
	shutdown(sim->fd, SHUT_RDWR);
	dispatch_until(vm, &told[1].count, 1);
	g_assert_cmpint(told[1].status, ==, KVMI_ERR_CLOSED);
	g_assert_true(kvmi_call_is_done(open));
	fails(kvmi_call_wait(open, err), KVMI_ERR_CLOSED);
	fails(kvmi_vm_start_read_physical(vm, 0, told[2].data, 1, &call, err),
	      KVMI_ERR_CLOSED);
	done(sim, vm);
	g_assert_cmpint(told[0].count + told[1].count, ==, 2);

	sim = sim_new();
	sim->silent_id = KVMI_VCPU_GET_INFO;
	vm = connect_vm(sim);
	ok(kvmi_vm_start_command(vm, KVMI_VCPU_GET_INFO, "\0\0\0\0\0\0\0", 8,
				 told[3].data, 8, NULL, &call, err));
	kvmi_call_then(call, on_told, &told[3]);
	done(sim, vm);
	g_assert_cmpint(told[3].count, ==, 1);
	g_assert_cmpint(told[3].status, ==, KVMI_ERR_CLOSED);

	/* an answer that is too short ends the connection */
	sim = sim_new();
	vm = connect_vm(sim);
	sim->answer_size = 12;
	ok(kvmi_vm_start_read_physical(vm, 0, told[2].data, 64, &call, err));
	kvmi_call_then(call, on_told, &told[2]);
	dispatch_until(vm, &told[2].count, 1);
	g_assert_cmpint(told[2].status, ==, KVMI_ERR_PROTOCOL);
	done(sim, vm);
}

static void test_vsock(void)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_LOCAL,
	};
	struct kvmi_listener *listener = NULL;
	struct sim *sim;
	struct kvmi_error err;
	struct kvmi_vm *vm;
	unsigned int port;
	int fd;

	g_assert_null(kvmi_listener_new_vsock(0, &err));
	g_assert_cmpint(err.status, ==, KVMI_ERR_ARGUMENT);
	for (port = 51000; !listener && port < 51010; port++)
		listener = kvmi_listener_new_vsock(port, &err);
	if (!listener) {
		g_assert_cmpint(err.status, ==, KVMI_ERR_SYSTEM);
		g_test_skip(err.message);
		return;
	}
	fails(kvmi_listener_accept(listener, &vm, err), KVMI_ERR_NOTHING);
	address.svm_port = port - 1;
	fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		g_test_skip("vsock has no loopback here");
		close(fd);
		kvmi_listener_free(listener);
		return;
	}
	sim = sim_new();
	sim_run(sim, fd);
	ok(kvmi_listener_accept(listener, &vm, err));
	ok(kvmi_vm_connect(vm, 0, 0, err));
	check_hello(vm);
	kvmi_listener_free(listener);
	done(sim, vm);
}

/* Waits for QEMU, and for one that knows the secret */
static void test_listener_wait(void)
{
	g_autofree char *folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(folder, "socket", NULL);
	gint64 begin = g_get_monotonic_time();
	struct kvmi_listener *listener;
	struct kvmi_error err;
	struct kvmi_vm *vm;
	int i;

	listener = kvmi_listener_new_unix(path, 0, &err);
	g_assert_nonnull(listener);
	fails(kvmi_listener_wait(listener, 0, &vm, err), KVMI_ERR_NOTHING);
	fails(kvmi_listener_wait(listener, 100, &vm, err), KVMI_ERR_NOTHING);
	g_assert_cmpint(g_get_monotonic_time() - begin, >=, 95000);
	g_assert_null(vm);
	fails(kvmi_listener_wait(listener, 0, NULL, err), KVMI_ERR_ARGUMENT);
	fails(kvmi_listener_set_secret(listener, "", 0, err),
	      KVMI_ERR_ARGUMENT);
	fails(kvmi_listener_set_secret(listener, path, KVMI_SECRET_MAX + 1, err),
	      KVMI_ERR_ARGUMENT);
	ok(kvmi_listener_set_secret(listener, "open sesame", 11, err));

	for (i = 0; i < 2; i++) {
		struct sim *sim = sim_new();

		sim->secret = i ? NULL : "open sesame";
		sim_connect(sim, path);
		ok(kvmi_listener_wait(listener, -1, &vm, err));
		if (i) {
			fails(kvmi_vm_connect(vm, 0, 0, err), KVMI_ERR_AUTH);
		} else {
			ok(kvmi_vm_connect(vm, 0, 0, err));
			g_assert_true(sim->good_proof);
		}
		done(sim, vm);
	}
	kvmi_listener_free(listener);
	g_assert_cmpint(g_rmdir(folder), ==, 0);
}

static void test_listener(void)
{
	g_autofree char *folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(folder, "socket", NULL);
	g_autofree char *file = g_build_filename(folder, "file", NULL);
	struct kvmi_listener *listener, *second;
	struct kvmi_error err;
	struct kvmi_vm *vm[2], *none;
	uint8_t digest[SHA1_SIZE];
	struct sim *sim[2];
	char longer[200];
	struct stat info;
	int i;

	listener = kvmi_listener_new_unix(path, 0, &err);
	g_assert_nonnull(listener);
	g_assert_cmpint(stat(path, &info), ==, 0);
	g_assert_cmpint(info.st_mode & 0777, ==, 0600);
	fails(kvmi_listener_accept(listener, &none, err), KVMI_ERR_NOTHING);
	g_assert_null(none);
	ok(kvmi_listener_set_key(listener, "abc", 3, err));

	/* in use */
	g_assert_null(kvmi_listener_new_unix(path, 0, &err));
	g_assert_nonnull(strstr(err.message, "listening"));
	/* that was a connection, too; it ends before its handshake */
	ok(kvmi_listener_accept(listener, &vm[0], err));
	fails(kvmi_vm_connect(vm[0], 0, 0, err), KVMI_ERR_CLOSED);
	kvmi_vm_close(vm[0]);

	/* two VMs at once */
	for (i = 0; i < 2; i++) {
		sim[i] = sim_new();
		sim[i]->regs[0].rip = 100 + i;
		sim_connect(sim[i], path);
	}
	ok(kvmi_listener_accept(listener, &vm[0], err));
	ok(kvmi_listener_accept(listener, &vm[1], err));
	fails(kvmi_listener_accept(listener, &none, err), KVMI_ERR_NOTHING);
	/* the connections do not depend on the listener */
	kvmi_listener_free(listener);
	sha1("abc", 3, digest);
	for (i = 0; i < 2; i++)
		ok(kvmi_vm_connect(vm[i], 0, 0, err));
	for (i = 0; i < 2; i++) {
		struct kvmi_registers state;

		check_hello(vm[i]);
		g_assert_cmpmem(sim[i]->cookie, 20, digest, 20);
		ok(kvmi_vcpu_get_registers(vm[i], 0, &state, NULL, NULL, 0, err));
		g_assert_cmpint(state.regs.rip, ==, 100 + i);
	}
	for (i = 0; i < 2; i++)
		done(sim[i], vm[i]);
	g_assert_cmpint(stat(path, &info), ==, -1);

	/* left behind by a program that was killed */
	{
		struct sockaddr_un address = { .sun_family = AF_UNIX };
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

		g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
		g_assert_cmpint(bind(fd, (struct sockaddr *)&address,
				     sizeof(address)), ==, 0);
		close(fd);
	}
	listener = kvmi_listener_new_unix(path, 0660, &err);
	g_assert_nonnull(listener);
	g_assert_cmpint(stat(path, &info), ==, 0);
	g_assert_cmpint(info.st_mode & 0777, ==, 0660);

	/* somebody else's by now: not to be deleted */
	g_assert_cmpint(unlink(path), ==, 0);
	second = kvmi_listener_new_unix(path, 0, &err);
	g_assert_nonnull(second);
	kvmi_listener_free(listener);
	g_assert_cmpint(stat(path, &info), ==, 0);
	kvmi_listener_free(second);
	g_assert_cmpint(stat(path, &info), ==, -1);
	kvmi_listener_free(NULL);

	/* not a socket */
	g_assert_true(g_file_set_contents(file, "precious", -1, NULL));
	g_assert_null(kvmi_listener_new_unix(file, 0, &err));
	g_assert_nonnull(strstr(err.message, "not a socket"));
	g_assert_cmpint(stat(file, &info), ==, 0);
	g_assert_cmpint(info.st_size, ==, 8);

	memset(longer, 'x', sizeof(longer) - 1);
	longer[sizeof(longer) - 1] = 0;
	g_assert_null(kvmi_listener_new_unix(longer, 0, &err));
	g_assert_cmpint(err.status, ==, KVMI_ERR_ARGUMENT);
	g_assert_null(kvmi_listener_new_unix("", 0, &err));
	g_assert_null(kvmi_listener_new_unix("/nonexistent/x", 0, &err));
	g_assert_cmpint(err.sys_errno, ==, ENOENT);
	g_assert_null(kvmi_vm_new(-1, NULL, 0, &err));
	g_assert_cmpint(err.sys_errno, ==, EBADF);

	unlink(file);
	rmdir(folder);
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/lib/sha1", test_sha1);
	g_test_add_func("/lib/names", test_names);
	g_test_add_func("/lib/errors", test_errors);
	g_test_add_func("/lib/handshake/good", test_handshake);
	g_test_add_func("/lib/handshake/pieces", test_handshake_in_pieces);
	g_test_add_func("/lib/handshake/key", test_handshake_key);
	g_test_add_func("/lib/hmac", test_hmac);
	g_test_add_func("/lib/handshake/mutual", test_handshake_mutual);
	g_test_add_func("/lib/handshake/late-key", test_handshake_late_key);
	g_test_add_func("/lib/handshake/bad-size", test_handshake_bad_size);
	g_test_add_func("/lib/handshake/timeout", test_handshake_timeout);
	g_test_add_func("/lib/handshake/cut", test_handshake_cut);
	g_test_add_func("/lib/handshake/talkative", test_handshake_talkative);
	g_test_add_func("/lib/handshake/refused", test_handshake_refused);
	g_test_add_func("/lib/handshake/gone", test_handshake_gone);
	g_test_add_func("/lib/handshake/old-protocol", test_old_protocol);
	g_test_add_func("/lib/handshake/allowed", test_allowed);
	g_test_add_func("/lib/commands", test_commands);
	g_test_add_func("/lib/more-commands", test_more_commands);
	g_test_add_func("/lib/memory", test_memory);
	g_test_add_func("/lib/many", test_many);
	g_test_add_func("/lib/many-cut", test_many_cut);
	g_test_add_func("/lib/walker", test_walker);
	g_test_add_func("/lib/events", test_events);
	g_test_add_func("/lib/kinds", test_kinds);
	g_test_add_func("/lib/unhook-and-end", test_unhook_and_end);
	g_test_add_func("/lib/hostile/messages", test_hostile);
	g_test_add_func("/lib/hostile/registers", test_bad_registers);
	g_test_add_func("/lib/hostile/memory", test_bad_memory);
	g_test_add_func("/lib/hostile/cut", test_cut_answer);
	g_test_add_func("/lib/pieces", test_pieces);
	g_test_add_func("/lib/timeout", test_timeout);
	g_test_add_func("/lib/limit", test_limit);
	g_test_add_func("/lib/limit/others", test_limit_of_others);
	g_test_add_func("/lib/limit/reply", test_limit_and_reply);
	g_test_add_func("/lib/timeout/one", test_one_timeout);
	g_test_add_func("/lib/fork", test_fork);
	g_test_add_func("/lib/on-unhook", test_on_unhook);
	g_test_add_func("/lib/deaf", test_deaf);
	g_test_add_func("/lib/deaf-for-a-while", test_deaf_for_a_while);
	g_test_add_func("/lib/no-poll-fd", test_no_poll_fd);
	g_test_add_func("/lib/calls/wait", test_calls);
	g_test_add_func("/lib/calls/then", test_calls_then);
	g_test_add_func("/lib/calls/end", test_calls_end);
	g_test_add_func("/lib/vsock", test_vsock);
	g_test_add_func("/lib/listener", test_listener);
	g_test_add_func("/lib/listener/wait", test_listener_wait);

	return g_test_run();
}
