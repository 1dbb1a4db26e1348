/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The older library's functions against a simulated KVM */

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <glib.h>
#include <glib/gstdio.h>

#include <linux/vm_sockets.h>
#include <libkvmi.h>

#include "client-sim.h"

/* These are in programs that nobody compiles anew */
#define AT(type, field, offset) \
	G_STATIC_ASSERT(offsetof(struct type, field) == offset)
G_STATIC_ASSERT(sizeof(struct kvmi_dom_event) == 8768);
AT(kvmi_dom_event, event.common, 8);
AT(kvmi_dom_event, event.cr, 552);
AT(kvmi_dom_event, buf, 576);
AT(kvmi_dom_event, seq, 8760);
G_STATIC_ASSERT(KVMI_MSG_SIZE == 8184);
G_STATIC_ASSERT(sizeof(struct kvmi_event) == 544);
AT(kvmi_event, vcpu, 2);
AT(kvmi_event, event, 4);
AT(kvmi_event, arch, 8);
G_STATIC_ASSERT(sizeof(struct kvmi_event_arch) == 536);
AT(kvmi_event_arch, view, 2);
AT(kvmi_event_arch, regs, 8);
AT(kvmi_event_arch, sregs, 152);
AT(kvmi_event_arch, msrs, 464);
AT(kvmi_event_arch, msrs.efer, 488);
AT(kvmi_event_arch, msrs.shadow_gs, 528);
G_STATIC_ASSERT(sizeof(struct kvmi_event_cr) == 24);
G_STATIC_ASSERT(sizeof(struct kvmi_event_msr) == 24);
G_STATIC_ASSERT(sizeof(struct kvmi_event_breakpoint) == 16);
G_STATIC_ASSERT(sizeof(struct kvmi_event_pf) == 24);
AT(kvmi_event_pf, access, 16);
AT(kvmi_event_pf, view, 18);
G_STATIC_ASSERT(sizeof(struct kvmi_event_trap) == 16);
AT(kvmi_event_trap, cr2, 8);
G_STATIC_ASSERT(sizeof(struct kvmi_event_descriptor) == 8);
G_STATIC_ASSERT(sizeof(struct kvmi_event_cpuid) == 16);
AT(kvmi_event_cpuid, insn_length, 8);
G_STATIC_ASSERT(sizeof(struct kvmi_event_singlestep) == 8);
G_STATIC_ASSERT(sizeof(struct kvmi_vcpu_hdr) == 8);
G_STATIC_ASSERT(sizeof(struct kvmi_event_reply) == 8);
G_STATIC_ASSERT(sizeof(struct kvmi_event_pf_reply) == 272);
AT(kvmi_event_pf_reply, ctx_data, 16);
G_STATIC_ASSERT(sizeof(struct kvmi_features) == 8);
G_STATIC_ASSERT(offsetof(struct kvmi_qemu2introspector, max_gpa) == 96);
AT(kvmi_qemu2introspector, start_time, 24);
AT(kvmi_qemu2introspector, name, 32);
G_STATIC_ASSERT(sizeof(struct kvmi_introspector2qemu) == 24);
G_STATIC_ASSERT(sizeof(struct kvmi_page_access_entry) == 16);
G_STATIC_ASSERT(KVMI_NUM_EVENTS == 14 && KVM_NUM_MESSAGES == 64);

#define ok(call) do { \
		errno = 0; \
		if (call) \
			g_error("%s:%d: errno %d", __FILE__, __LINE__, errno); \
	} while (0)
#define fails(call, number) do { \
		errno = 0; \
		g_assert_cmpint(call, ==, -1); \
		g_assert_cmpint(errno, ==, number); \
	} while (0)

struct tool {
	char *folder;
	char *path;
	void *ctx;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	void *dom;
	unsigned int doms;
	unsigned int handshakes;
	int refuse_handshake;
	int refuse_guest;
	atomic_uint complaints;
	void *busy;		/* a dom that the log function asks something */
};

static int on_handshake(const struct kvmi_qemu2introspector *question,
			struct kvmi_introspector2qemu *answer, void *context)
{
	struct tool *tool = context;

	g_assert_cmpint(question->struct_size, ==, 104);
	g_assert_cmpstr(question->name, ==, "a guest");
	g_assert_cmpint(question->start_time, ==, 1234567890);
	g_assert_cmphex(question->max_gpa, ==, CLIENT_SIM_MEMORY);
	g_assert_cmpint(answer->struct_size, ==, 24);
	memset(answer->cookie_hash, 0x5a, sizeof(answer->cookie_hash));
	tool->handshakes++;

	return tool->refuse_handshake;
}

static int on_guest(void *dom, unsigned char (*uuid)[16], void *context)
{
	struct tool *tool = context;
	unsigned int count;
	char name[64];

	g_assert_cmpint((*uuid)[15], ==, 16);
	kvmi_domain_name(dom, name, sizeof(name));
	g_assert_cmpstr(name, ==, "a guest");
	g_assert_cmpint(kvmi_get_starttime(dom), ==, 1234567890);
	g_assert_true(kvmi_domain_is_connected(dom));
	g_assert_cmpint(kvmi_connection_fd(dom), >=, 0);
	ok(kvmi_get_vcpu_count(dom, &count));
	g_assert_cmpint(count, ==, 3);

	pthread_mutex_lock(&tool->lock);
	tool->doms++;
	if (!tool->refuse_guest)
		tool->dom = dom;
	pthread_cond_broadcast(&tool->changed);
	pthread_mutex_unlock(&tool->lock);

	return tool->refuse_guest;
}

static void on_log(kvmi_log_level level, const char *text, void *context)
{
	struct tool *tool = context;

	g_assert_cmpint(level, >=, KVMI_LOG_LEVEL_WARNING);
	atomic_fetch_add(&tool->complaints, 1);
	g_test_message("said: %s", text);
	if (tool->busy) {
		kvmi_get_pending_events(tool->busy);
		kvmi_write_physical(tool->busy, 0x1000, "x", 1);
	}
}

static struct tool *tool_new(void)
{
	struct tool *tool = g_new0(struct tool, 1);

	tool->folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	tool->path = g_build_filename(tool->folder, "socket", NULL);
	pthread_mutex_init(&tool->lock, NULL);
	pthread_cond_init(&tool->changed, NULL);
	kvmi_set_log_cb(on_log, tool);
	tool->ctx = kvmi_init_unix_socket(tool->path, on_guest, on_handshake,
					  tool);
	g_assert_nonnull(tool->ctx);

	return tool;
}

static void tool_free(struct tool *tool)
{
	kvmi_set_log_cb(NULL, NULL);
	g_unlink(tool->path);
	g_rmdir(tool->folder);
	g_free(tool->folder);
	g_free(tool->path);
	g_free(tool);
}

/* The VM that has come */
static void *wait_dom(struct tool *tool)
{
	void *dom;

	pthread_mutex_lock(&tool->lock);
	while (!tool->dom)
		pthread_cond_wait(&tool->changed, &tool->lock);
	dom = tool->dom;
	tool->dom = NULL;
	pthread_mutex_unlock(&tool->lock);

	return dom;
}

#ifndef __SANITIZE_THREAD__
static void wait_doms(struct tool *tool, unsigned int doms)
{
	pthread_mutex_lock(&tool->lock);
	while (tool->doms < doms)
		pthread_cond_wait(&tool->changed, &tool->lock);
	pthread_mutex_unlock(&tool->lock);
}

/* Waits for an event of that kind and takes it */
static struct kvmi_dom_event *next(void *dom, int kind)
{
	struct kvmi_dom_event *event;

	ok(kvmi_wait_event(dom, 5000));
	g_assert_cmpint(kvmi_get_pending_events(dom), >, 0);
	ok(kvmi_pop_event(dom, &event));
	g_assert_cmpint(event->event.common.event, ==, kind);
	g_assert_cmpint(event->event.common.size, ==, 544);
	g_assert_cmpint(event->event.common.arch.view, ==, 0);
	g_assert_null(event->next);
	g_assert_cmpmem(event->buf, 544, &event->event.common, 544);

	return event;
}

#endif

/* As the older tools build their answers */
static int answer(void *dom, const struct kvmi_dom_event *event, int action,
		  uint64_t value, size_t size)
{
	struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_event_reply reply;
		union {
			struct kvmi_event_cr_reply cr;
			struct kvmi_event_pf_reply pf;
		};
	} data = {
		.vcpu.vcpu = event->event.common.vcpu,
		.reply.action = action,
		.reply.event = event->event.common.event,
		.cr.new_val = value,
	};

	g_assert_cmpint(size, <=, sizeof(data));

	return kvmi_reply_event(dom, event->seq, &data, size);
}

/* ------------------------------------------------------------------------ */

#ifndef __SANITIZE_THREAD__
static void test_connect(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim, *others[100];
	uint8_t cookie[20];
	unsigned int i;
	void *dom;

	g_assert_null(kvmi_init_unix_socket(NULL, on_guest, NULL, NULL));
	g_assert_null(kvmi_init_unix_socket("", on_guest, NULL, NULL));
	g_assert_null(kvmi_init_unix_socket(tool->path, NULL, NULL, NULL));
	g_assert_null(kvmi_init_vsock(0, on_guest, NULL, NULL));

	/* refused by one callback, then by the other */
	tool->refuse_handshake = -1;
	sim = client_sim_new(tool->path);
	client_sim_free(sim);
	g_assert_cmpint(tool->handshakes, ==, 1);
	g_assert_cmpint(tool->doms, ==, 0);
	tool->refuse_handshake = 1;
	tool->refuse_guest = 1;
	sim = client_sim_new(tool->path);
	client_sim_free(sim);
	g_assert_cmpint(tool->doms, ==, 1);

	/* those that say nothing do not hold up the next */
	tool->refuse_guest = 0;
	sim = client_sim_new_silent(tool->path);
	for (i = 0; i < G_N_ELEMENTS(others); i++)
		others[i] = client_sim_new_silent(tool->path);
	{
		int64_t start = g_get_monotonic_time();
		struct client_sim *other = client_sim_new(tool->path);

		dom = wait_dom(tool);
		g_assert_cmpint(g_get_monotonic_time() - start, <,
				2 * G_USEC_PER_SEC);
		memset(cookie, 0x5a, sizeof(cookie));
		g_assert_cmpmem(client_sim_cookie(other), 20, cookie, 20);
		g_assert_true(client_sim_subscribed(other));
		kvmi_domain_close(dom, true);
		client_sim_free(other);
	}
	/* ... nor the end */
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	for (i = 0; i < G_N_ELEMENTS(others); i++)
		client_sim_free(others[i]);

	/* what is there is replaced, be it in use or not, unless it is a file */
	tool->ctx = kvmi_init_unix_socket(tool->path, on_guest, NULL, tool);
	dom = kvmi_init_unix_socket(tool->path, on_guest, NULL, tool);
	g_assert_nonnull(dom);
	kvmi_uninit(dom);
	kvmi_uninit(tool->ctx);
	g_unlink(tool->path);
	g_assert_true(g_file_set_contents(tool->path, "x", 1, NULL));
	g_assert_null(kvmi_init_unix_socket(tool->path, on_guest, NULL, tool));
	g_assert_cmpint(errno, !=, 0);
	g_assert_cmpint(tool->complaints, >, 0);
	tool_free(tool);
}

/* Ends in every order, and in a child */
static void test_close(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	unsigned int count;
	int status;
	pid_t child;

	kvmi_uninit(NULL);
	kvmi_close(NULL);
	kvmi_domain_close(NULL, true);
	kvmi_batch_free(NULL);

	/* a child drops what it has, the parent keeps it */
	child = fork();
	if (!child) {
		kvmi_close(tool->ctx);
		kvmi_domain_close(dom, false);
		/* what the parent has is no leak */
		execlp("true", "true", NULL);
		_exit(1);
	}
	g_assert_cmpint(waitpid(child, &status, 0), ==, child);
	g_assert_cmpint(status, ==, 0);
	ok(kvmi_get_vcpu_count(dom, &count));

	kvmi_domain_close(dom, true);
	client_sim_free(sim);
	sim = client_sim_new(tool->path);
	dom = wait_dom(tool);
	kvmi_uninit(tool->ctx);
	ok(kvmi_get_vcpu_count(dom, &count));
	kvmi_domain_close(dom, false);
	client_sim_free(sim);

	/* the peer goes first */
	tool->ctx = kvmi_init_unix_socket(tool->path, on_guest, on_handshake,
					  tool);
	sim = client_sim_new(tool->path);
	dom = wait_dom(tool);
	client_sim_hang_up(sim);
	fails(kvmi_wait_event(dom, 5000), ENOTCONN);
	g_assert_false(kvmi_domain_is_connected(dom));
	fails(kvmi_get_vcpu_count(dom, &count), ENOTCONN);
	fails(kvmi_wait_event(dom, -1), ENOTCONN);
	kvmi_uninit(tool->ctx);
	kvmi_domain_close(dom, true);
	client_sim_free(sim);
	tool_free(tool);
}

static void test_requests(void)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[2];
	} msrs = { .head.nmsrs = 2, .entries = { { .index = 0xc0000082 },
						 { .index = 0x174 } } };
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	unsigned long long gpas[3] = { 0x1000, 0x2000, 0x3000 }, number;
	unsigned char access[3] = { 5, 0, 7 }, byte;
	unsigned int version, mode, eax, ebx, ecx, edx;
	unsigned char bytes[5000], back[5000];
	struct kvm_regs regs = { 0 };
	struct kvm_sregs sregs;
	unsigned short view;
	__u64 value;
	bool yes;
	int i;

	ok(kvmi_get_version(dom, &version));
	g_assert_cmpint(version, >=, 1);
	yes = true;
	ok(kvmi_spp_support(dom, &yes));
	g_assert_false(yes);
	yes = true;
	ok(kvmi_eptp_support(dom, &yes));
	g_assert_false(yes);
	yes = true;
	ok(kvmi_ve_support(dom, &yes));
	g_assert_false(yes);
	yes = true;
	ok(kvmi_vmfunc_support(dom, &yes));
	g_assert_false(yes);

	/* numbers are translated */
	ok(kvmi_check_command(dom, KVMI_SET_PAGE_ACCESS));
	g_assert_cmpint(client_sim_last(sim)[0], ==, 20);
	ok(kvmi_check_command(dom, KVMI_VCPU_CONTROL_SINGLESTEP));
	g_assert_cmpint(client_sim_last(sim)[0], ==, 27);
	fails(kvmi_check_command(dom, KVMI_CONTROL_VE), ENOENT);
	fails(kvmi_check_command(dom, -1), ENOENT);
	fails(kvmi_check_command(dom, 64), ENOENT);
	ok(kvmi_check_event(dom, KVMI_EVENT_PF));
	g_assert_cmpint(client_sim_last(sim)[0], ==, 17);
	fails(kvmi_check_event(dom, KVMI_EVENT_CPUID), ENOENT);
	ok(kvmi_control_events(dom, 1, KVMI_EVENT_MSR, true));
	g_assert_cmpint(client_sim_last(sim)[8], ==, 15);
	g_assert_cmpint(client_sim_last(sim)[10], ==, 1);
	fails(kvmi_control_events(dom, 1, KVMI_EVENT_CPUID, true), EOPNOTSUPP);
	ok(kvmi_control_events(dom, 1, KVMI_EVENT_CPUID, false));
	fails(kvmi_control_events(dom, 2, KVMI_EVENT_CR, true), EAGAIN);

	ok(kvmi_control_cr(dom, 1, 3, true));
	g_assert_cmpint(client_sim_last(sim)[8], ==, 3);
	g_assert_cmpint(client_sim_last(sim)[9], ==, 1);
	fails(kvmi_control_cr(dom, 1, 8, true), EINVAL);
	ok(kvmi_control_msr(dom, 1, 0xc0000080, true));
	ok(kvmi_control_singlestep(dom, 1, true));
	ok(kvmi_inject_exception(dom, 0, 0x1234, 2, 14));
	g_assert_cmpint(client_sim_last(sim)[8], ==, 14);
	g_assert_cmpint(client_sim_last(sim)[12], ==, 2);
	g_assert_cmphex(client_sim_last(sim)[16], ==, 0x34);

	ok(kvmi_translate_gva(dom, 0, 0x1234, &value));
	g_assert_cmphex(value, ==, 0x234);
	ok(kvmi_translate_gva(dom, 0, 0xffffffff81000000, &value));
	g_assert_cmphex(value, ==, UINT64_MAX);

	ok(kvmi_set_page_access(dom, gpas, access, 3, 0));
	g_assert_cmpint(client_sim_access(sim, 0x1000), ==, 5);
	g_assert_cmpint(client_sim_access(sim, 0x2000), ==, 0);
	g_assert_cmpint(client_sim_access(sim, 0x3000), ==, 7);
	fails(kvmi_set_page_access(dom, gpas, access, 3, 1), EOPNOTSUPP);
	access[1] = KVMI_PAGE_ACCESS_SVE;
	fails(kvmi_set_page_access(dom, gpas, access, 3, 0), EINVAL);

	ok(kvmi_get_tsc_speed(dom, &number));
	g_assert_cmpint(number, ==, 2500000000);
	ok(kvmi_get_cpuid(dom, 0, 1, 2, &eax, &ebx, &ecx, &edx));
	g_assert_cmpint(eax * 1000 + ebx * 100 + ecx * 10 + edx, ==, 1234);
	ok(kvmi_get_mtrr_type(dom, 0, &byte));
	g_assert_cmpint(byte, ==, 6);
	ok(kvmi_get_xcr(dom, 0, 0, &value));
	g_assert_cmpint(value, ==, 7);
	memset(bytes, 0x33, sizeof(bytes));
	ok(kvmi_set_xsave(dom, 0, bytes, 512));
	fails(kvmi_set_xsave(dom, 0, bytes, 5000), E2BIG);
	memset(back, 0xff, sizeof(back));
	ok(kvmi_get_xsave(dom, 0, back, sizeof(back)));
	for (i = 0; i < 5000; i++)
		g_assert_cmphex(back[i], ==, i < 512 ? 0x33 : 0);
	ok(kvmi_get_xsave(dom, 0, back, 8));

	ok(kvmi_write_physical(dom, 0x4ff0, bytes, 4096));
	ok(kvmi_read_physical(dom, 0x4ff0, back, 4096));
	g_assert_cmpmem(bytes, 4096, back, 4096);
	fails(kvmi_read_physical(dom, CLIENT_SIM_MEMORY, back, 8), ENOENT);
	ok(kvmi_get_maximum_gfn(dom, &number));
	g_assert_cmpint(number, ==, CLIENT_SIM_MEMORY / 4096);

	ok(kvmi_get_registers(dom, 1, &regs, &sregs, &msrs.head, &mode));
	g_assert_cmphex(sregs.cr3, ==, 0x1001);
	g_assert_cmpint(mode, ==, 8);
	g_assert_cmphex(msrs.entries[0].data, ==, 0x1c0000082);
	msrs.head.nmsrs = 0;
	ok(kvmi_get_registers(dom, 1, &regs, &sregs, &msrs.head, &mode));
	msrs.head.nmsrs = 482;
	fails(kvmi_get_registers(dom, 1, &regs, &sregs, &msrs.head, &mode),
	      E2BIG);
	regs.rip = 0x42;
	ok(kvmi_set_registers(dom, 1, &regs));

	/* there is nothing of the kind */
	fails(kvmi_get_next_available_gfn(dom, &number), ENOSYS);
	fails(kvmi_set_page_write_bitmap(dom, NULL, NULL, 0), ENOSYS);
	fails(kvmi_set_ve_info_page(dom, 0, 0), ENOSYS);
	fails(kvmi_disable_ve(dom, 0), ENOSYS);
	ok(kvmi_switch_ept_view(dom, 0, 0));
	fails(kvmi_switch_ept_view(dom, 0, 1), ENOSYS);
	ok(kvmi_get_ept_view(dom, 0, &view));
	g_assert_cmpint(view, ==, 0);
	fails(kvmi_control_ept_view(dom, 0, 0, true), ENOSYS);
	fails(kvmi_create_ept_view(dom, NULL), ENOSYS);
	fails(kvmi_destroy_ept_view(dom, 1), ENOSYS);
	fails(kvmi_set_ept_page_conv(dom, 0, 0, true), ENOSYS);
	fails(kvmi_get_ept_page_conv(dom, 0, 0, &yes), ENOSYS);
	fails(kvmi_change_gfn(dom, 0, 0, 1, 2), ENOSYS);
	fails(kvmi_alloc_gfn(dom, 1), ENOSYS);
	fails(kvmi_free_gfn(dom, 1), ENOSYS);
	fails(kvmi_shutdown_guest(dom), ENOSYS);
	ok(kvmi_memory_mapping(dom, false));
	fails(kvmi_memory_mapping(dom, true), ENOENT);
	g_assert_true(kvmi_map_physical_page(dom, 0) == MAP_FAILED);
	fails(kvmi_unmap_physical_page(dom, NULL), EINVAL);
	fails(kvmi_unmap_physical_page(dom, back), ENXIO);
	g_assert_false(kvmi_remote_mapping_v2());

	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

static void test_events(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	struct kvmi_dom_event *event, *other;
	unsigned int i;

	fails(kvmi_wait_event(dom, 0), ETIMEDOUT);
	fails(kvmi_wait_event(dom, 30), ETIMEDOUT);
	g_assert_true(kvmi_domain_is_connected(dom));
	fails(kvmi_pop_event(dom, &event), EAGAIN);
	g_assert_null(event);

	client_sim_event(sim, 7);	/* CR */
	event = next(dom, KVMI_EVENT_CR);
	g_assert_cmpint(event->event.common.vcpu, ==, 1);
	g_assert_cmphex(event->event.common.arch.sregs.cr3, ==, 0x1001);
	g_assert_cmphex(event->event.common.arch.msrs.lstar, ==,
			0xffffffff81e00080);
	g_assert_cmpint(event->event.cr.cr, ==, 4);
	g_assert_cmpint(event->event.cr.old_value, ==, 5);
	g_assert_cmpint(event->event.cr.new_value, ==, 6);
	fails(answer(dom, event, 0, 0, 15), EINVAL);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 77, 24));
	fails(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 77, 24), ENOENT);
	client_sim_wait_replies(sim, 1);
	g_assert_cmpint(client_sim_value(sim), ==, 77);
	free(event);

	/* without a value: the guest's own */
	client_sim_event(sim, 15);	/* MSR */
	event = next(dom, KVMI_EVENT_MSR);
	g_assert_cmphex(event->event.msr.msr, ==, 0xc0000080);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	client_sim_wait_replies(sim, 2);
	g_assert_cmpint(client_sim_value(sim), ==, 8);
	free(event);

	/* the older answer has much that is not sent */
	client_sim_event(sim, 17);	/* PF */
	event = next(dom, KVMI_EVENT_PF);
	g_assert_cmphex(event->event.page_fault.gva, ==, 13);
	g_assert_cmphex(event->event.page_fault.gpa, ==, 14);
	g_assert_cmphex(event->event.page_fault.access, ==, 2);
	g_assert_cmphex(event->event.page_fault.view, ==, 0);
	ok(answer(dom, event, KVMI_EVENT_ACTION_RETRY, 0, 288));
	client_sim_wait_replies(sim, 3);
	g_assert_cmpint(client_sim_action(sim), ==, KVMI_EVENT_ACTION_RETRY);
	free(event);

	/* one that KVM cannot emulate: a step, of which the tool sees nothing */
	{
		unsigned long long gpa = 0x7000;
		unsigned char access = 3;

		ok(kvmi_set_page_access(dom, &gpa, &access, 1, 0));
		client_sim_event(sim, CLIENT_SIM_NOT_EMULATED);
		event = next(dom, KVMI_EVENT_PF);
		ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 288));
		free(event);
		client_sim_wait_replies(sim, 4);
		g_assert_true(client_sim_stepping(sim, 1));
		/* KVM frees the page */
		client_sim_free_page(sim, gpa);
		client_sim_event(sim, 19);
		fails(kvmi_wait_event(dom, 100), ETIMEDOUT);
		client_sim_wait_replies(sim, 5);
		g_assert_cmpint(client_sim_access(sim, gpa), ==, 3);
		g_assert_false(client_sim_stepping(sim, 1));

		/* while the tool makes steps of its own, it sees them all */
		ok(kvmi_control_singlestep(dom, 1, true));
		client_sim_event(sim, CLIENT_SIM_NOT_EMULATED);
		event = next(dom, KVMI_EVENT_PF);
		ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 288));
		free(event);
		client_sim_wait_replies(sim, 6);
		client_sim_free_page(sim, gpa);
		client_sim_event(sim, 19);
		event = next(dom, KVMI_EVENT_SINGLESTEP);
		g_assert_cmpint(client_sim_access(sim, gpa), ==, 3);
		g_assert_true(client_sim_stepping(sim, 1));
		ok(kvmi_control_singlestep(dom, 1, false));
		ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
		free(event);
	}

	client_sim_event(sim, 5);	/* BREAKPOINT; answered when it is gone */
	event = next(dom, KVMI_EVENT_BREAKPOINT);
	g_assert_cmphex(event->event.breakpoint.gpa, ==, 0x5001);
	g_assert_cmpint(event->event.breakpoint.insn_len, ==, 1);
	{
		struct kvmi_dom_event copy = *event;

		free(event);
		ok(answer(dom, &copy, KVMI_EVENT_ACTION_RETRY, 0, 16));
	}
	client_sim_wait_replies(sim, 8);

	client_sim_event(sim, 13);	/* DESCRIPTOR */
	event = next(dom, KVMI_EVENT_DESCRIPTOR);
	g_assert_cmpint(event->event.desc.descriptor, ==, KVMI_DESC_GDTR);
	g_assert_cmpint(event->event.desc.write, ==, 1);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	client_sim_event(sim, 19);	/* SINGLESTEP */
	event = next(dom, KVMI_EVENT_SINGLESTEP);
	g_assert_cmpint(event->event.ss.failed, ==, 1);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	client_sim_event(sim, 11);	/* XSETBV has no name in the union */
	event = next(dom, KVMI_EVENT_XSETBV);
	g_assert_cmpint(event->event.cr.new_value, ==, 12);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	client_sim_event(sim, 3);	/* HYPERCALL */
	event = next(dom, KVMI_EVENT_HYPERCALL);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	client_sim_wait_replies(sim, 12);

	/* TRAP: answered by the library, until it is asked for */
	client_sim_event(sim, 9);
	fails(kvmi_wait_event(dom, 100), ETIMEDOUT);
	client_sim_wait_replies(sim, 13);
	ok(kvmi_control_events(dom, 1, KVMI_EVENT_TRAP, true));
	client_sim_event(sim, 9);
	event = next(dom, KVMI_EVENT_TRAP);
	g_assert_cmpint(event->event.trap.vector, ==, 14);
	g_assert_cmpint(event->event.trap.cr2, ==, 10);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	/* what has no name at all is not left waiting */
	client_sim_event(sim, 0x1235);
	fails(kvmi_wait_event(dom, 100), ETIMEDOUT);
	client_sim_wait_replies(sim, 15);

	/* one PAUSE for each vCPU, and those only; in any order, in a batch */
	ok(kvmi_pause_all_vcpus(dom, 0));
	ok(kvmi_pause_all_vcpus(dom, 3));
	for (i = 0; kvmi_get_pending_events(dom) < 3 && i < 50; i++)
		kvmi_wait_event(dom, 10);
	g_assert_cmpint(kvmi_get_pending_events(dom), ==, 3);
	event = next(dom, KVMI_EVENT_PAUSE_VCPU);
	other = next(dom, KVMI_EVENT_PAUSE_VCPU);
	g_assert_cmpint(event->event.common.vcpu, ==, 0);
	g_assert_cmpint(other->event.common.vcpu, ==, 1);
	{
		struct {
			struct kvmi_vcpu_hdr vcpu;
			struct kvmi_event_reply reply;
		} data = { .vcpu.vcpu = 1, .reply.event = 10 };
		struct kvm_regs regs = { .rip = 0x1234 };
		unsigned long long gpa = 0x6000;
		unsigned char access = 1;
		void *batch = kvmi_batch_alloc(dom);
		size_t replies;

		ok(kvmi_batch_commit(batch));
		ok(kvmi_queue_page_access(batch, &gpa, &access, 1, 0));
		fails(kvmi_queue_page_access(batch, &gpa, &access, 1, 1),
		      EOPNOTSUPP);
		fails(kvmi_queue_spp_access(batch, NULL, NULL, 0, 0), ENOSYS);
		ok(kvmi_queue_registers(batch, 1, &regs));
		ok(kvmi_queue_reply_event(batch, other->seq, &data,
					  sizeof(data)));
		fails(kvmi_queue_reply_event(batch, other->seq, &data, 15),
		      EINVAL);
		ok(kvmi_queue_pause_vcpu(batch, 1));
		replies = client_sim_replies(sim);
		g_assert_cmpint(client_sim_access(sim, 0x6000), ==, 7);
		ok(kvmi_batch_commit(batch));
		g_assert_cmpint(client_sim_access(sim, 0x6000), ==, 1);
		g_assert_cmphex(client_sim_rip(sim, 1), ==, 0x1234);
		client_sim_wait_replies(sim, replies + 1);
		kvmi_batch_free(batch);

		/* the first error is reported, the rest is done */
		batch = kvmi_batch_alloc(dom);
		ok(kvmi_queue_reply_event(batch, 12345, &data, sizeof(data)));
		access = 3;
		ok(kvmi_queue_page_access(batch, &gpa, &access, 1, 0));
		fails(kvmi_batch_commit(batch), ENOENT);
		g_assert_cmpint(client_sim_access(sim, 0x6000), ==, 3);
		kvmi_batch_free(batch);

		/* not carried out at all */
		batch = kvmi_batch_alloc(dom);
		access = 7;
		ok(kvmi_queue_page_access(batch, &gpa, &access, 1, 0));
		kvmi_batch_free(batch);
		g_assert_cmpint(client_sim_access(sim, 0x6000), ==, 3);
	}
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	free(other);

	/* events that nobody takes are freed */
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* A batch beyond its limit is carried out in parts */
static void test_large_batch(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool), *batch = kvmi_batch_alloc(dom);
	unsigned long long gpas[500];
	unsigned char access[500];
	unsigned int i;

	for (i = 0; i < 500; i++) {
		gpas[i] = i % 4 * 4096;
		access[i] = 0;
	}
	for (i = 0; i < 1000; i++)
		ok(kvmi_queue_page_access(batch, gpas, access, 500, 0));
	g_assert_cmpint(client_sim_commands(sim), >, 500);
	ok(kvmi_batch_commit(batch));
	g_assert_cmpint(client_sim_commands(sim), >, 1000);
	kvmi_batch_free(batch);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/*
 * The tool knows nothing of UNHOOK: its breakpoints go, what the guest or the
 * tool has written since stays, hits are answered, and the connection ends.
 */
static void test_unhook(void)
{
	static const uint8_t int3 = 0xcc, nop = 0x90, data[] = "data\xccmore";
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	uint8_t before[CLIENT_SIM_MEMORY];
	struct kvmi_dom_event *event;
	unsigned int count, i;

	for (i = 0; i < CLIENT_SIM_MEMORY; i++)
		client_sim_memory(sim)[i] = i * 7;
	client_sim_memory(sim)[0x100] = 0xcc;		/* the guest's own */
	ok(kvmi_control_events(dom, 0, KVMI_EVENT_BREAKPOINT, true));
	ok(kvmi_control_events(dom, 1, KVMI_EVENT_BREAKPOINT, true));

	/* planted; moved by the tool itself; written over by the guest */
	memcpy(before, client_sim_memory(sim), sizeof(before));
	for (i = 0; i < 1000; i++)
		ok(kvmi_write_physical(dom, 0x5001 + 7 * i, &int3, 1));
	ok(kvmi_write_physical(dom, 0x100, &int3, 1));
	ok(kvmi_write_physical(dom, 0x200, &int3, 1));
	ok(kvmi_write_physical(dom, 0x200, &before[0x200], 1));
	ok(kvmi_write_physical(dom, 0x300, &int3, 1));
	ok(kvmi_write_physical(dom, 0x300, &int3, 1));
	ok(kvmi_write_physical(dom, 0x400, &int3, 1));
	ok(kvmi_write_physical(dom, 0x500, &nop, 1));
	ok(kvmi_write_physical(dom, 0x600, data, sizeof(data)));
	client_sim_memory(sim)[0x400] = 0x42;
	before[0x400] = 0x42;
	before[0x500] = nop;
	memcpy(before + 0x600, data, sizeof(data));
	before[0x604] = (uint8_t)(0x604 * 7);

	/* a hit that the tool is busy with, and one that it has not taken */
	client_sim_event(sim, 5);
	event = next(dom, KVMI_EVENT_BREAKPOINT);
	g_assert_cmpint(client_sim_memory(sim)[0x5001], ==, 0xcc);
	client_sim_unhook(sim);
	fails(kvmi_wait_event(dom, 5000), ENOTCONN);
	client_sim_wait_end(sim);
	g_assert_cmpint(client_sim_replies(sim), >=, 2);
	g_assert_cmpint(client_sim_breakpoint_action(sim), ==,
			KVMI_EVENT_ACTION_RETRY);
	g_assert_cmpmem(client_sim_memory(sim), CLIENT_SIM_MEMORY, before,
			sizeof(before));

	g_assert_false(kvmi_domain_is_connected(dom));
	fails(answer(dom, event, KVMI_EVENT_ACTION_RETRY, 0, 16), ENOTCONN);
	fails(kvmi_get_vcpu_count(dom, &count), ENOTCONN);
	fails(kvmi_write_physical(dom, 0, &int3, 1), ENOTCONN);
	free(event);
	fails(kvmi_pop_event(dom, &event), EAGAIN);
	client_sim_free(sim);

	/* it comes back, as a new VM for the tool */
	sim = client_sim_new(tool->path);
	wait_doms(tool, 2);
	kvmi_domain_close(dom, true);
	kvmi_domain_close(wait_dom(tool), true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* During a command; an INT3 of the guest's is left to the guest */
static void test_unhook_in_command(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	unsigned int version;

	client_sim_memory(sim)[0x5001] = 0xcc;
	client_sim_event(sim, 5);
	client_sim_unhook(sim);
	/* this is answered, and sees what came before */
	while (kvmi_domain_is_connected(dom)) {
		struct kvm_regs regs;
		struct kvm_sregs sregs;
		struct kvm_msrs msrs = { 0 };
		unsigned int mode;

		ok(kvmi_get_version(dom, &version));
		if (kvmi_get_registers(dom, 0, &regs, &sregs, &msrs, &mode))
			g_assert_cmpint(errno, ==, ENOTCONN);
	}
	client_sim_wait_end(sim);
	g_assert_cmpint(client_sim_breakpoint_action(sim), ==,
			KVMI_EVENT_ACTION_CONTINUE);
	fails(kvmi_wait_event(dom, 1000), ENOTCONN);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* A tool that has asked for it gets it, and does it all by itself */
static void test_unhook_wanted(void)
{
	static const uint8_t int3 = 0xcc;
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	struct kvmi_dom_event *event;
	unsigned int count, i;

	fails(kvmi_control_vm_events(dom, KVMI_EVENT_CR, true), EINVAL);
	fails(kvmi_control_vm_events(dom, KVMI_EVENT_CREATE_VCPU, true),
	      ENOENT);
	ok(kvmi_control_vm_events(dom, KVMI_EVENT_UNHOOK, true));
	ok(kvmi_write_physical(dom, 0x100, &int3, 1));
	/* once, however often it is sent, and if the tool does nothing for long */
	for (i = 0; i < 20; i++)
		client_sim_unhook(sim);
	g_usleep(500000);
	ok(kvmi_wait_event(dom, 5000));
	for (i = 0; i < 5; i++) {
		ok(kvmi_get_vcpu_count(dom, &count));
		client_sim_unhook(sim);
	}
	g_assert_cmpint(kvmi_get_pending_events(dom), ==, 1);
	ok(kvmi_pop_event(dom, &event));
	g_assert_cmpint(event->event.common.event, ==, KVMI_EVENT_UNHOOK);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
	free(event);
	ok(kvmi_get_vcpu_count(dom, &count));
	g_assert_cmpint(client_sim_memory(sim)[0x100], ==, 0xcc);
	g_assert_cmpint(client_sim_replies(sim), ==, 0);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* Where a breakpoint is can't be told always, for example if it is gone */
static void test_unhook_nowhere(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	struct kvmi_dom_event *event;

	client_sim_event(sim, CLIENT_SIM_NOWHERE);
	event = next(dom, KVMI_EVENT_BREAKPOINT);
	free(event);
	client_sim_unhook(sim);
	fails(kvmi_wait_event(dom, 5000), ENOTCONN);
	client_sim_wait_end(sim);
	g_assert_cmpint(client_sim_breakpoint_action(sim), ==,
			KVMI_EVENT_ACTION_RETRY);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* What is said is said when the library can be called again */
static void test_log(void)
{
	struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_event_reply reply;
		struct kvmi_event_pf_reply pf;
	} data = { .vcpu.vcpu = 1, .reply.event = KVMI_EVENT_PF,
		   .pf.ctx_size = 5 };
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	struct kvmi_dom_event *event;
	unsigned int i, count;

	tool->busy = dom;
	client_sim_event(sim, 7);	/* CR takes no RETRY */
	event = next(dom, KVMI_EVENT_CR);
	fails(answer(dom, event, KVMI_EVENT_ACTION_RETRY, 5, 24), EINVAL);
	g_assert_cmpint(atomic_load(&tool->complaints), ==, 1);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 5, 24));
	free(event);

	/* said once */
	for (i = 0; i < 2; i++) {
		client_sim_event(sim, 17);
		event = next(dom, KVMI_EVENT_PF);
		ok(kvmi_reply_event(dom, event->seq, &data, sizeof(data)));
		free(event);
		g_assert_cmpint(atomic_load(&tool->complaints), ==, 2);
	}

	client_sim_unhook(sim);
	fails(kvmi_wait_event(dom, 5000), ENOTCONN);
	count = atomic_load(&tool->complaints);
	g_assert_cmpint(count, >, 2);
	tool->busy = NULL;
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* A peer that goes no further does not hold up the next for long */
static void test_mute(void)
{
	struct tool *tool = tool_new();
	struct client_sim *mute = client_sim_new_mute(tool->path), *sim;
	gint64 start = g_get_monotonic_time();
	void *dom;

	g_usleep(50000);
	sim = client_sim_new(tool->path);
	dom = wait_dom(tool);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 10000000);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	client_sim_free(mute);
	tool_free(tool);
}

/* Other events are left to a tool that is away, and its poll() sees them */
static void test_away_event(void)
{
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	struct pollfd fd = { kvmi_connection_fd(dom), POLLIN, 0 };
	struct kvmi_dom_event *event;

	g_usleep(300000);
	g_assert_cmpint(poll(&fd, 1, 0), ==, 0);
	client_sim_event(sim, 7);
	g_usleep(700000);
	g_assert_cmpint(poll(&fd, 1, 0), ==, 1);
	event = next(dom, KVMI_EVENT_CR);
	g_assert_cmpint(poll(&fd, 1, 0), ==, 0);
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 5, 24));
	free(event);

	/* the end is noticed, too */
	client_sim_hang_up(sim);
	g_usleep(700000);
	g_assert_cmpint(poll(&fd, 1, 0), ==, 1);
	fails(kvmi_wait_event(dom, 1000), ENOTCONN);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

#ifndef __SANITIZE_ADDRESS__
/* Too little memory is no reason to take the connection for lost */
static void test_no_memory(void)
{
	const size_t size = 256 << 20;
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	uint8_t *data = mmap(NULL, size, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	g_autofree char *statm = NULL;
	struct rlimit limit, less;
	unsigned int count;

	data[0] = 0xcc;
	g_assert_true(g_file_get_contents("/proc/self/statm", &statm, NULL,
					  NULL));
	g_assert_cmpint(getrlimit(RLIMIT_AS, &limit), ==, 0);
	less = limit;
	less.rlim_cur = strtoull(statm, NULL, 10) * 4096 + size / 2;
	g_assert_cmpint(setrlimit(RLIMIT_AS, &less), ==, 0);
	fails(kvmi_write_physical(dom, 0, data, size), ENOMEM);
	g_assert_cmpint(setrlimit(RLIMIT_AS, &limit), ==, 0);
	g_assert_cmpint(atomic_load(&tool->complaints), ==, 1);
	g_assert_true(kvmi_domain_is_connected(dom));
	ok(kvmi_get_vcpu_count(dom, &count));
	munmap(data, size);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}
#endif

static void test_vsock(void)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_LOCAL,
	};
	struct tool *tool = tool_new();
	struct client_sim *sim;
	unsigned int port;
	void *ctx = NULL;
	int fd;

	for (port = 51010; !ctx && port < 51020; port++)
		ctx = kvmi_init_vsock(port, on_guest, on_handshake, tool);
	address.svm_port = port - 1;
	fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (!ctx || connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		g_test_skip("vsock has no loopback here");
		if (fd >= 0)
			close(fd);
	} else {
		sim = client_sim_new_on(fd);
		kvmi_domain_close(wait_dom(tool), true);
		client_sim_free(sim);
	}
	kvmi_uninit(ctx);
	kvmi_uninit(tool->ctx);
	tool_free(tool);
}

#endif

/* One thread sleeps in the library, others work; then all are told the end */
static void *sleeper(void *dom)
{
	int ret;

	while (!(ret = kvmi_wait_event(dom, -1))) {
		struct kvmi_dom_event *event;

		if (kvmi_pop_event(dom, &event))
			continue;
		ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE, 0, 16));
		free(event);
	}
	g_assert_cmpint(errno, ==, ENOTCONN);

	return NULL;
}

static void test_threads(void)
{
	static const uint8_t int3 = 0xcc;
	struct tool *tool = tool_new();
	struct client_sim *sim = client_sim_new(tool->path);
	void *dom = wait_dom(tool);
	GThread *thread = g_thread_new("sleeper", sleeper, dom);
	unsigned int count, i;

	for (i = 0; i < 200; i++) {
		ok(kvmi_get_vcpu_count(dom, &count));
		ok(kvmi_pause_all_vcpus(dom, 1));
		client_sim_wait_replies(sim, i + 1);
		ok(kvmi_write_physical(dom, i, &int3, 1));
	}
	client_sim_unhook(sim);
	g_thread_join(thread);
	client_sim_wait_end(sim);
	for (i = 0; i < 200; i++)
		g_assert_cmphex(client_sim_memory(sim)[i], ==, 0);
	kvmi_domain_close(dom, true);
	kvmi_uninit(tool->ctx);
	client_sim_free(sim);
	tool_free(tool);
}

/* UNHOOK while the tool is busy elsewhere: the library's own thread leaves */
static void test_away(void)
{
	static const uint8_t int3 = 0xcc;
	struct tool *tool = tool_new();
	unsigned int count, i;

	for (i = 0; i < 4; i++) {
		struct client_sim *sim = client_sim_new(tool->path);
		void *dom = wait_dom(tool);

		ok(kvmi_control_events(dom, 1, KVMI_EVENT_BREAKPOINT, true));
		ok(kvmi_write_physical(dom, 0x5001, &int3, 1));
		if (i % 2)
			client_sim_event(sim, 5);
		client_sim_unhook(sim);
		client_sim_wait_end(sim);
		g_assert_cmphex(client_sim_memory(sim)[0x5001], ==, 0);
		if (i % 2)
			g_assert_cmpint(client_sim_breakpoint_action(sim), ==,
					KVMI_EVENT_ACTION_RETRY);
		fails(kvmi_get_vcpu_count(dom, &count), ENOTCONN);
		g_assert_false(kvmi_domain_is_connected(dom));
		kvmi_domain_close(dom, true);
		client_sim_free(sim);
	}
	kvmi_uninit(tool->ctx);
	tool_free(tool);
}

/* It is closed before, while, and after the library looks after it */
static void test_away_close(void)
{
	struct tool *tool = tool_new();
	unsigned int i;

	for (i = 0; i < 12; i++) {
		struct client_sim *sim = client_sim_new(tool->path);
		void *dom = wait_dom(tool);

		ok(kvmi_control_events(dom, 1, KVMI_EVENT_BREAKPOINT, true));
		if (i % 3)
			client_sim_unhook(sim);
		g_usleep(150000 + 20000 * i);
		if (i == 11)
			kvmi_uninit(tool->ctx);
		kvmi_domain_close(dom, i % 2);
		client_sim_free(sim);
	}
	tool_free(tool);
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/compat/threads", test_threads);
	g_test_add_func("/compat/away", test_away);
	g_test_add_func("/compat/away-close", test_away_close);
#ifndef __SANITIZE_THREAD__
	/* the others look into the simulated peer, and that from outside */
	g_test_add_func("/compat/connect", test_connect);
	g_test_add_func("/compat/close", test_close);
	g_test_add_func("/compat/requests", test_requests);
	g_test_add_func("/compat/events", test_events);
	g_test_add_func("/compat/large-batch", test_large_batch);
	g_test_add_func("/compat/unhook", test_unhook);
	g_test_add_func("/compat/unhook-in-command", test_unhook_in_command);
	g_test_add_func("/compat/unhook-wanted", test_unhook_wanted);
	g_test_add_func("/compat/unhook-nowhere", test_unhook_nowhere);
	g_test_add_func("/compat/log", test_log);
	g_test_add_func("/compat/mute", test_mute);
	g_test_add_func("/compat/away-event", test_away_event);
#ifndef __SANITIZE_ADDRESS__
	g_test_add_func("/compat/no-memory", test_no_memory);
#endif
	g_test_add_func("/compat/vsock", test_vsock);
#endif

	return g_test_run();
}
