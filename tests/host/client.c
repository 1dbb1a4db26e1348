// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A tool written for the older library: it includes its header, links with its
 * name, and knows nothing of what came later, UNHOOK above all.
 *
 * client SOCKET TEST [ADDRESS...]: waits for the VM, does one test, says what it
 * saw in lines "client: ...", ends with status 0 if all was well.  ADDRESS is
 * where a function of the guest's kernel lies in its physical memory.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NAME "client"
#include "older.h"

#define HITS 50
#define VCPUS_MAX 8
#define MSR_LSTAR 0xc0000082
#define MSR_EFER 0xc0000080

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static void *guest;
static unsigned int guests;

static void *ctx;
static unsigned int vcpus;
static unsigned long long addresses[8];
static unsigned int address_count;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);

	return time.tv_sec + time.tv_nsec / 1e9;
}

static int on_handshake(const struct kvmi_qemu2introspector *question,
			struct kvmi_introspector2qemu *answer, void *context)
{
	(void)context;
	check(question->struct_size >= 96);
	check(question->start_time > 0);
	check(!strcmp(question->name, "guest"));
	check(answer->struct_size == 24);

	return 0;
}

static int on_guest(void *dom, unsigned char (*uuid)[16], void *context)
{
	unsigned int version;

	(void)context;
	check((*uuid)[0] == 0x6b && (*uuid)[15] == 1);
	ok(kvmi_get_version(dom, &version));
	check(version >= 1);
	check(kvmi_connection_fd(dom) >= 0);
	pthread_mutex_lock(&lock);
	guest = dom;
	guests++;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);

	return 0;
}

static void *wait_guest(void)
{
	struct timespec end;
	void *dom;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += 60;
	pthread_mutex_lock(&lock);
	while (!guest)
		check(!pthread_cond_timedwait(&changed, &lock, &end));
	dom = guest;
	guest = NULL;
	pthread_mutex_unlock(&lock);
	ok(kvmi_get_vcpu_count(dom, &vcpus));
	check(vcpus >= 1 && vcpus <= VCPUS_MAX);

	return dom;
}

/* The next event, or NULL when seconds have gone by without one */
static struct kvmi_dom_event *next(void *dom, double seconds)
{
	struct kvmi_dom_event *event;

	errno = 0;
	if (kvmi_wait_event(dom, seconds * 1000)) {
		check(errno == ETIMEDOUT || errno == ENOTCONN);
		return NULL;
	}
	if (kvmi_pop_event(dom, &event)) {
		check(errno == EAGAIN);
		return NULL;
	}

	return event;
}

/* Answers as the older tools do, with all the bytes they had; frees the event */
static int answer(void *dom, struct kvmi_dom_event *event, int action)
{
	struct answer data;
	size_t size = make_answer(&data, event, action);
	int ret = kvmi_reply_event(dom, event->seq, &data, size);

	free(event);

	return ret;
}

static void let_go(void *dom, struct kvmi_dom_event *event)
{
	ok(answer(dom, event, KVMI_EVENT_ACTION_CONTINUE));
}

static void control(void *dom, int event, bool enable)
{
	unsigned int i;

	for (i = 0; i < vcpus; i++)
		ok(kvmi_control_events(dom, i, event, enable));
}

/* All vCPUs stand still; each has an event to be answered */
static void pause_all(void *dom, struct kvmi_dom_event **events)
{
	unsigned int left = vcpus;

	memset(events, 0, vcpus * sizeof(*events));
	ok(kvmi_pause_all_vcpus(dom, vcpus));
	while (left) {
		struct kvmi_dom_event *event = next(dom, 20);
		unsigned int vcpu;

		check(event);
		if (event->event.common.event != KVMI_EVENT_PAUSE_VCPU) {
			let_go(dom, event);
			continue;
		}
		vcpu = event->event.common.vcpu;
		check(vcpu < vcpus && !events[vcpu]);
		events[vcpu] = event;
		left--;
	}
}

static void resume_all(void *dom, struct kvmi_dom_event **events)
{
	unsigned int i;

	for (i = 0; i < vcpus; i++)
		let_go(dom, events[i]);
}

/* Lets go what is on its way still, until there is nothing for a while */
static void drain(void *dom)
{
	struct kvmi_dom_event *event;

	while ((event = next(dom, 0.3)))
		let_go(dom, event);
}

/* ------------------------------------------------------------------------ */

static void test_basics(void *dom)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[2];
	} msrs = { .head.nmsrs = 2, .entries = { { .index = MSR_LSTAR },
						 { .index = MSR_EFER } } };
	struct kvmi_dom_event *events[VCPUS_MAX];
	unsigned int mode, eax, ebx, ecx, edx, i;
	unsigned char page[4096], again[4096];
	unsigned long long number;
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	unsigned char type;
	bool yes = true;
	char name[64];
	__u64 value;

	kvmi_domain_name(dom, name, sizeof(name));
	check(!strcmp(name, "guest"));
	check(kvmi_domain_is_connected(dom));
	check(kvmi_get_starttime(dom) > 0);
	ok(kvmi_eptp_support(dom, &yes));
	check(!yes);
	ok(kvmi_check_command(dom, KVMI_VCPU_CONTROL_SINGLESTEP));
	check(kvmi_check_command(dom, KVMI_SWITCH_EPT_VIEW) == -1 &&
	      errno == ENOENT);
	ok(kvmi_check_event(dom, KVMI_EVENT_BREAKPOINT));

	/* 256 MiB */
	ok(kvmi_get_maximum_gfn(dom, &number));
	check(number == 65536);
	ok(kvmi_get_tsc_speed(dom, &number));
	ok(kvmi_get_cpuid(dom, 0, 0, 0, &eax, &ebx, &ecx, &edx));
	check(eax >= 1 && ebx);
	ok(kvmi_get_mtrr_type(dom, 0x100000, &type));
	check(type <= 6);

	pause_all(dom, events);
	check(next(dom, 0.2) == NULL && errno == ETIMEDOUT);
	for (i = 0; i < vcpus; i++) {
		ok(kvmi_get_registers(dom, i, &regs, &sregs, &msrs.head, &mode));
		check(sregs.cr3 && sregs.cr3 ==
		      events[i]->event.common.arch.sregs.cr3);
		check(regs.rip == events[i]->event.common.arch.regs.rip);
		check(msrs.entries[0].data ==
		      events[i]->event.common.arch.msrs.lstar);
		check(msrs.entries[1].data & 0x400);	/* long mode */
		ok(kvmi_get_xcr(dom, i, 0, &value));
		check(value & 1);
		ok(kvmi_get_xsave(dom, i, page, sizeof(page)));
		ok(kvmi_set_xsave(dom, i, page, sizeof(page)));
		ok(kvmi_get_xsave(dom, i, again, sizeof(again)));
		check(!memcmp(page, again, 416));
		/* what is set is what the vCPU goes on with */
		ok(kvmi_set_registers(dom, i, &regs));
	}
	ok(kvmi_translate_gva(dom, 0, msrs.entries[0].data, &value));
	check(value < 256 << 20);
	ok(kvmi_read_physical(dom, value, page, 16));
	/* entry_SYSCALL_64 begins with swapgs, with or without endbr64 */
	tell("LSTAR %llx at %llx: %02x %02x %02x %02x %02x %02x %02x",
	     (unsigned long long)msrs.entries[0].data,
	     (unsigned long long)value, page[0], page[1], page[2], page[3],
	     page[4], page[5], page[6]);
	check(!memcmp(page, "\x0f\x01\xf8", 3) ||
	      !memcmp(page + 4, "\x0f\x01\xf8", 3));
	check(kvmi_read_physical(dom, 1ULL << 40, page, 8) == -1 &&
	      errno == ENOENT);

	/* a page goes out and comes back; the last of the memory is free */
	number = (256ULL << 20) - 4096;
	ok(kvmi_read_physical(dom, number, page, sizeof(page)));
	memset(again, 0xa5, sizeof(again));
	ok(kvmi_write_physical(dom, number, again, sizeof(again)));
	memset(again, 0, sizeof(again));
	ok(kvmi_read_physical(dom, number, again, sizeof(again)));
	check(again[0] == 0xa5 && again[4095] == 0xa5);
	ok(kvmi_write_physical(dom, number, page, sizeof(page)));
	resume_all(dom, events);
	tell("basics done");
}

/*
 * Breakpoints as the older tools do it: the byte is put back, the vCPU makes one
 * step, the INT3 is put in again.  count 0: until the connection ends.
 */
static unsigned int breakpoints(void *dom, unsigned int count)
{
	static const unsigned char int3 = 0xcc;
	unsigned long long stepped[VCPUS_MAX] = { 0 };
	unsigned char original[8];
	unsigned int hits = 0, i;
	bool seen[VCPUS_MAX] = { false };
	double end = now() + 100;

	control(dom, KVMI_EVENT_BREAKPOINT, true);
	control(dom, KVMI_EVENT_SINGLESTEP, true);
	for (i = 0; i < address_count; i++) {
		ok(kvmi_read_physical(dom, addresses[i], &original[i], 1));
		ok(kvmi_write_physical(dom, addresses[i], &int3, 1));
	}
	while (!count || hits < count) {
		struct kvmi_dom_event *event = next(dom, 20);
		unsigned int vcpu;

		if (!event && errno == ENOTCONN)
			return hits;
		check(event && now() < end);
		vcpu = event->event.common.vcpu;
		check(vcpu < vcpus);
		switch (event->event.common.event) {
		case KVMI_EVENT_BREAKPOINT:
			for (i = 0; i < address_count; i++)
				if (addresses[i] == event->event.breakpoint.gpa)
					break;
			check(i < address_count);
			seen[vcpu] = true;
			if (++hits == HITS)
				tell("%d hits", HITS);
			stepped[vcpu] = addresses[i];
			/* any of these can be the one that ends */
			if (kvmi_write_physical(dom, addresses[i], &original[i],
						1) ||
			    kvmi_control_singlestep(dom, vcpu, true) ||
			    answer(dom, event, KVMI_EVENT_ACTION_RETRY)) {
				check(errno == ENOTCONN && !count);
				return hits;
			}
			break;
		case KVMI_EVENT_SINGLESTEP:
			if (kvmi_write_physical(dom, stepped[vcpu], &int3, 1) ||
			    kvmi_control_singlestep(dom, vcpu, false) ||
			    answer(dom, event, KVMI_EVENT_ACTION_CONTINUE)) {
				check(errno == ENOTCONN && !count);
				return hits;
			}
			stepped[vcpu] = 0;
			break;
		default:
			check(!"another event");
		}
	}
	for (i = 0; i < vcpus; i++)
		check(seen[i]);

	/* out again, before the events are switched off */
	for (i = 0; i < address_count; i++)
		ok(kvmi_write_physical(dom, addresses[i], &original[i], 1));
	for (;;) {
		struct kvmi_dom_event *event = next(dom, 0.5);

		if (!event)
			break;
		if (event->event.common.event == KVMI_EVENT_SINGLESTEP)
			ok(kvmi_control_singlestep(dom, event->event.common.vcpu,
						   false));
		ok(answer(dom, event, event->event.common.event ==
			  KVMI_EVENT_BREAKPOINT ? KVMI_EVENT_ACTION_RETRY :
						  KVMI_EVENT_ACTION_CONTINUE));
	}
	control(dom, KVMI_EVENT_BREAKPOINT, false);

	return hits;
}

static void test_breakpoint(void *dom)
{
	tell("%u hits, the breakpoints are out", breakpoints(dom, 4 * HITS));
}

/* Writes of CR3 and of an MSR of the timer's */
static void test_registers(void *dom)
{
	static const unsigned int msrs[] = { 0x6e0, 0x838, 0x80b };
	unsigned int crs = 0, writes = 0, i, j;
	double end = now() + 100;

	control(dom, KVMI_EVENT_CR, true);
	control(dom, KVMI_EVENT_MSR, true);
	for (i = 0; i < vcpus; i++) {
		ok(kvmi_control_cr(dom, i, 3, true));
		for (j = 0; j < 3; j++)
			ok(kvmi_control_msr(dom, i, msrs[j], true));
	}
	while (crs < 5 || writes < 20) {
		struct kvmi_dom_event *event = next(dom, 20);

		check(event && now() < end);
		switch (event->event.common.event) {
		case KVMI_EVENT_CR:
			check(event->event.cr.cr == 3);
			check(event->event.cr.new_value !=
			      event->event.cr.old_value);
			check(event->event.cr.old_value ==
			      event->event.common.arch.sregs.cr3);
			crs++;
			break;
		case KVMI_EVENT_MSR:
			check(event->event.msr.msr == msrs[0] ||
			      event->event.msr.msr == msrs[1] ||
			      event->event.msr.msr == msrs[2]);
			writes++;
			break;
		default:
			check(!"another event");
		}
		let_go(dom, event);
	}
	for (i = 0; i < vcpus; i++) {
		ok(kvmi_control_cr(dom, i, 3, false));
		for (j = 0; j < 3; j++)
			ok(kvmi_control_msr(dom, i, msrs[j], false));
	}
	drain(dom);
	tell("%u writes of CR3, %u of MSRs", crs, writes);
}

/* A page with hot code may not be executed: each instruction is an event */
static void test_pages(void *dom)
{
	unsigned long long page = addresses[0] & ~4095ULL;
	unsigned char access = KVMI_PAGE_ACCESS_R | KVMI_PAGE_ACCESS_W;
	unsigned int faults = 0;
	double end = now() + 100;

	control(dom, KVMI_EVENT_PF, true);
	ok(kvmi_set_page_access(dom, &page, &access, 1, 0));
	while (faults < 40) {
		struct kvmi_dom_event *event = next(dom, 20);

		check(event && now() < end);
		check(event->event.common.event == KVMI_EVENT_PF);
		check((event->event.page_fault.gpa & ~4095ULL) == page);
		check(event->event.page_fault.access == KVMI_PAGE_ACCESS_X);
		check(event->event.page_fault.view == 0);
		faults++;
		let_go(dom, event);
	}
	access = 7;
	ok(kvmi_set_page_access(dom, &page, &access, 1, 0));
	drain(dom);
	control(dom, KVMI_EVENT_PF, false);
	check(kvmi_set_page_access(dom, &page, &access, 1, 3) == -1 &&
	      errno == EOPNOTSUPP);
	tell("%u page faults", faults);
}

/* vCPU 0, step by step */
static void test_step(void *dom)
{
	struct kvmi_dom_event *events[VCPUS_MAX];
	unsigned int steps = 0, moved = 0;
	unsigned long long rip;

	control(dom, KVMI_EVENT_SINGLESTEP, true);
	pause_all(dom, events);
	rip = events[0]->event.common.arch.regs.rip;
	ok(kvmi_control_singlestep(dom, 0, true));
	resume_all(dom, events);
	while (steps < 200) {
		struct kvmi_dom_event *event = next(dom, 20);

		check(event);
		check(event->event.common.event == KVMI_EVENT_SINGLESTEP);
		check(event->event.common.vcpu == 0);
		moved += event->event.common.arch.regs.rip != rip;
		rip = event->event.common.arch.regs.rip;
		if (++steps == 200)
			ok(kvmi_control_singlestep(dom, 0, false));
		let_go(dom, event);
	}
	check(!next(dom, 0.3));
	check(moved > 100);
	tell("%u steps, %u of them to another address", steps, moved);
}

/* Registers, page access and answers in one list */
static void test_batch(void *dom)
{
	unsigned long long page = addresses[0] & ~4095ULL;
	struct kvmi_dom_event *events[VCPUS_MAX];
	struct {
		struct kvmi_vcpu_hdr vcpu;
		struct kvmi_event_reply reply;
	} data;
	unsigned char access = 7;
	unsigned int i, round;

	for (round = 0; round < 20; round++) {
		void *batch = kvmi_batch_alloc(dom);

		check(batch);
		pause_all(dom, events);
		ok(kvmi_queue_page_access(batch, &page, &access, 1, 0));
		for (i = 0; i < vcpus; i++) {
			memset(&data, 0, sizeof(data));
			data.vcpu.vcpu = i;
			data.reply.event = KVMI_EVENT_PAUSE_VCPU;
			ok(kvmi_queue_registers(batch, i,
						&events[i]->event.common.arch.regs));
			ok(kvmi_queue_reply_event(batch, events[i]->seq, &data,
						  sizeof(data)));
		}
		/* and one for the next time */
		ok(kvmi_queue_pause_vcpu(batch, 0));
		ok(kvmi_batch_commit(batch));
		kvmi_batch_free(batch);
		for (i = 0; i < vcpus; i++)
			free(events[i]);
		events[0] = next(dom, 20);
		check(events[0] && events[0]->event.common.event ==
		      KVMI_EVENT_PAUSE_VCPU);
		let_go(dom, events[0]);
	}
	tell("20 batches");
}

/* Exceptions: TRAP events are the library's as long as nobody wants them */
static void test_inject(void *dom)
{
	struct kvmi_dom_event *events[VCPUS_MAX], *event;

	control(dom, KVMI_EVENT_TRAP, true);
	pause_all(dom, events);
	/*
	 * A #DB while the vCPU is in the kernel is taken for a stray one and
	 * survived.
	 */
	ok(kvmi_inject_exception(dom, 0, 0, 0, 1));
	resume_all(dom, events);
	event = next(dom, 20);
	check(event && event->event.common.event == KVMI_EVENT_TRAP);
	tell("trap %u", event->event.trap.vector);
	let_go(dom, event);
	drain(dom);
}

/* The VM is paused while breakpoints are hit; the tool only sees the end */
static void test_unhook(void *dom)
{
	unsigned int hits, count;

	hits = breakpoints(dom, 0);
	check(!kvmi_domain_is_connected(dom));
	check(kvmi_get_vcpu_count(dom, &count) == -1 && errno == ENOTCONN);
	check(kvmi_wait_event(dom, 0) == -1 && errno == ENOTCONN);
	tell("the connection has ended after %u hits", hits);
	kvmi_domain_close(dom, true);

	/* it comes back when the VM runs */
	dom = wait_guest();
	tell("the guest is back");
	tell("%u hits once more", breakpoints(dom, HITS));
	kvmi_domain_close(dom, true);
}

static void wake_up(int unused)
{
	(void)unused;
}

/*
 * The VM is paused while the tool has breakpoints in it and is busy with something
 * else, until SIGUSR1 says that it may go on.
 */
static void test_idle(void *dom)
{
	static const unsigned char int3 = 0xcc;
	unsigned int i, count;
	double start = now();

	signal(SIGUSR1, wake_up);
	control(dom, KVMI_EVENT_BREAKPOINT, true);
	for (i = 0; i < address_count; i++)
		ok(kvmi_write_physical(dom, addresses[i], &int3, 1));
	tell("busy");
	sleep(60);
	tell("%.1f s later", now() - start);
	check(kvmi_get_vcpu_count(dom, &count) == -1 && errno == ENOTCONN);
	check(kvmi_wait_event(dom, 0) == -1 && errno == ENOTCONN);
	check(!kvmi_domain_is_connected(dom));
	tell("the connection has ended");
}

/* Ends with breakpoints in the guest, in every order */
static void test_close(void *dom, const char *socket)
{
	static const unsigned char int3 = 0xcc;
	unsigned int i, count;
	pid_t child;
	int status;

	control(dom, KVMI_EVENT_BREAKPOINT, true);
	ok(kvmi_write_physical(dom, addresses[0], &int3, 1));
	for (i = 0; i < 3; i++) {
		struct kvmi_dom_event *event = next(dom, 20);

		check(event && event->event.common.event ==
		      KVMI_EVENT_BREAKPOINT);
		/* not answered: the vCPU waits while all ends around it */
		free(event);
		if (i == 0)
			break;
	}
	kvmi_domain_close(dom, true);
	dom = wait_guest();
	tell("closed with an open event, and back");

	kvmi_uninit(ctx);
	ok(kvmi_get_vcpu_count(dom, &count));
	kvmi_domain_close(dom, true);
	ctx = kvmi_init_unix_socket(socket, on_guest, on_handshake, NULL);
	check(ctx);
	dom = wait_guest();
	tell("the listener first, and back");

	child = fork();
	if (!child) {
		kvmi_close(ctx);
		kvmi_domain_close(dom, false);
		_exit(0);
	}
	check(waitpid(child, &status, 0) == child && !status);
	ok(kvmi_get_vcpu_count(dom, &count));
	kvmi_domain_close(dom, false);
	dom = wait_guest();
	tell("without a shutdown, and back");
	kvmi_domain_close(dom, true);
}

int main(int argc, char **argv)
{
	const char *test;
	void *dom;
	int i;

	if (argc < 3 || argc > 3 + 8) {
		fprintf(stderr, "usage: client SOCKET TEST [ADDRESS...]\n");
		return 2;
	}
	test = argv[2];
	for (i = 3; i < argc; i++)
		addresses[address_count++] = strtoull(argv[i], NULL, 0);

	kvmi_set_log_cb(on_log, NULL);
	ctx = kvmi_init_unix_socket(argv[1], on_guest, on_handshake, NULL);
	check(ctx);
	dom = wait_guest();
	tell("hooked");
	if (!strcmp(test, "unhook")) {
		test_unhook(dom);
		dom = NULL;
	} else if (!strcmp(test, "close")) {
		test_close(dom, argv[1]);
		dom = NULL;
	} else {
		static const struct {
			const char *name;
			void (*run)(void *dom);
		} tests[] = {
			{ "basics", test_basics },
			{ "breakpoint", test_breakpoint },
			{ "registers", test_registers },
			{ "pages", test_pages },
			{ "step", test_step },
			{ "batch", test_batch },
			{ "inject", test_inject },
			{ "idle", test_idle },
		};
		size_t j;

		for (j = 0; j < sizeof(tests) / sizeof(tests[0]); j++)
			if (!strcmp(test, tests[j].name))
				break;
		check(j < sizeof(tests) / sizeof(tests[0]));
		tests[j].run(dom);
	}
	kvmi_domain_close(dom, true);
	kvmi_uninit(ctx);
	tell("done");

	return 0;
}
