// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The older library as LibVMI's KVM driver uses it, which Debian does not have:
 * loaded by name, all functions or none; a thread that waits ten seconds at most
 * for the VM; events of each vCPU, PAUSE events that are kept until the VM is
 * resumed, answers as long as they were then, page access in pieces; all switched
 * off, closed and unloaded while the guest runs on.
 *
 * libvmi-like SOCKET run|paused ADDRESS...: says what it saw in lines "libvmi: ...",
 * ends with status 0 if all was well.  ADDRESS is where a hot function of the
 * guest's kernel lies in its physical memory.  "paused" pauses the VM and reads
 * its memory until the connection ends; then it waits for the VM to come back.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#define NAME "libvmi"
#include "older.h"

#define VCPUS_MAX 8
#define HITS 60
#define PIECE 128		/* pages in one kvmi_set_page_access() */
#define PAGES 300
#define CHANGES 5

/* Those without which it refuses to work, whether it uses them or not */
#define FUNCTIONS(F) \
	F(init_unix_socket) F(init_vsock) F(uninit) F(close) F(domain_close) \
	F(connection_fd) F(get_version) F(control_events) \
	F(control_vm_events) F(control_cr) F(control_msr) \
	F(control_singlestep) F(pause_all_vcpus) F(set_page_access) \
	F(get_tsc_speed) F(get_vcpu_count) F(inject_exception) \
	F(read_physical) F(write_physical) F(get_registers) F(set_registers) \
	F(reply_event) F(pop_event) F(wait_event) F(set_log_cb) \
	F(get_maximum_gfn) F(get_next_available_gfn) F(spp_support) \
	F(ve_support) F(vmfunc_support) F(eptp_support) F(create_ept_view) \
	F(destroy_ept_view) F(switch_ept_view) F(get_ept_view) \
	F(get_pending_events) F(change_gfn) F(alloc_gfn) F(free_gfn)

static struct {
	void *handle;
#define MEMBER(name) typeof(kvmi_##name) *name;
	FUNCTIONS(MEMBER)
} lib;

static const char *path;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t came = PTHREAD_COND_INITIALIZER;
static void *ctx, *dom;
static unsigned int guests;

static unsigned int vcpus, paused;
static unsigned long long memory_end;
static struct kvmi_dom_event *pause_events[VCPUS_MAX];

static unsigned long long addresses[8];
static unsigned char originals[8];
static unsigned int address_count;
static bool planted;

static unsigned int hits, steps, crs, msrs, faults;
static unsigned long long stepped[VCPUS_MAX];

/* ------------------------------------------------------------------------
 * To begin with
 */

static void load(void)
{
	/* by its bare name */
	lib.handle = dlopen("libkvmi.so", RTLD_NOW | RTLD_GLOBAL);
	if (!lib.handle) {
		tell("%s", dlerror());
		exit(1);
	}
#define LOOK_UP(name) check(lib.name = dlsym(lib.handle, "kvmi_" #name));
	FUNCTIONS(LOOK_UP)
}

static int on_guest(void *new, unsigned char (*uuid)[16], void *context)
{
	unsigned int version;

	check(context == &dom && (*uuid)[15] == 1);
	check(lib.connection_fd(new) >= 0);
	ok(lib.get_version(new, &version));
	pthread_mutex_lock(&lock);
	/* it has never heard of a VM that comes back: a new one takes the place */
	lib.domain_close(dom, true);
	dom = new;
	guests++;
	pthread_cond_signal(&came);
	pthread_mutex_unlock(&lock);

	return 0;
}

static bool wait_guest(unsigned int count, unsigned int seconds)
{
	struct timespec end;
	int result = 0;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += seconds;
	while (guests < count && !result)
		result = pthread_cond_timedwait(&came, &lock, &end);

	return !result;
}

static void *start(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&lock);
	ctx = lib.init_unix_socket(path, on_guest, NULL, &dom);
	check(ctx);
	if (!wait_guest(1, 10)) {
		/* as it does then: whatever is there is closed, NULL as well */
		pthread_mutex_unlock(&lock);
		lib.uninit(ctx);
		lib.domain_close(dom, true);
		tell("no VM within ten seconds");
		exit(1);
	}
	pthread_mutex_unlock(&lock);

	return NULL;
}

static void connect_vm(void)
{
	unsigned long long gfn;
	pthread_t thread;
	bool yes;

	check(!pthread_create(&thread, NULL, start, NULL));
	check(!pthread_join(thread, NULL));
	ok(lib.spp_support(dom, &yes));
	ok(lib.ve_support(dom, &yes));
	ok(lib.vmfunc_support(dom, &yes));
	ok(lib.eptp_support(dom, &yes));
	check(!yes);
	ok(lib.get_vcpu_count(dom, &vcpus));
	check(vcpus >= 1 && vcpus <= VCPUS_MAX);
	/* without this, it gives up */
	ok(lib.get_maximum_gfn(dom, &gfn));
	memory_end = gfn << 12;
	check(lib.get_next_available_gfn(dom, &gfn) == -1);
	ok(lib.get_tsc_speed(dom, &gfn));
}

/* ------------------------------------------------------------------------
 * Events
 */

static void reply(struct kvmi_dom_event *event, int action)
{
	struct answer data;
	size_t size = make_answer(&data, event, action);

	check(event->event.common.event != KVMI_EVENT_PF || size == 288);
	ok(lib.reply_event(dom, event->seq, &data, size));
	free(event);
}

static void on_breakpoint(struct kvmi_dom_event *event)
{
	unsigned int vcpu = event->event.common.vcpu, i;

	for (i = 0; i < address_count; i++)
		if (addresses[i] == event->event.breakpoint.gpa)
			break;
	check(i < address_count);
	hits++;
	/* if they are out already, there is nothing to be stepped over */
	if (planted) {
		stepped[vcpu] = addresses[i];
		ok(lib.write_physical(dom, addresses[i], &originals[i], 1));
		ok(lib.control_singlestep(dom, vcpu, true));
	}
	reply(event, KVMI_EVENT_ACTION_RETRY);
}

static void on_step(struct kvmi_dom_event *event)
{
	static const unsigned char int3 = 0xcc;
	unsigned int vcpu = event->event.common.vcpu;

	check(!event->event.ss.failed && stepped[vcpu]);
	steps++;
	if (planted)
		ok(lib.write_physical(dom, stepped[vcpu], &int3, 1));
	stepped[vcpu] = 0;
	ok(lib.control_singlestep(dom, vcpu, false));
	reply(event, KVMI_EVENT_ACTION_CONTINUE);
}

static void handle(struct kvmi_dom_event *event)
{
	unsigned int vcpu = event->event.common.vcpu;

	check(vcpu < vcpus && event->event.common.arch.view == 0);
	switch (event->event.common.event) {
	case KVMI_EVENT_PAUSE_VCPU:
		/* one for each pause, or the first would never be answered */
		check(!pause_events[vcpu]);
		pause_events[vcpu] = event;
		return;
	case KVMI_EVENT_BREAKPOINT:
		on_breakpoint(event);
		return;
	case KVMI_EVENT_SINGLESTEP:
		on_step(event);
		return;
	case KVMI_EVENT_CR:
		check(event->event.cr.cr == 3);
		crs++;
		break;
	case KVMI_EVENT_MSR:
		msrs++;
		break;
	case KVMI_EVENT_PF:
		check(event->event.page_fault.access == KVMI_PAGE_ACCESS_X);
		faults++;
		break;
	default:
		/* it has handlers for what it has asked for, and for nothing else */
		check(!"an event that nobody has asked for");
	}
	reply(event, KVMI_EVENT_ACTION_CONTINUE);
}

/* false: the connection has ended */
static bool listen_events(unsigned int ms)
{
	struct kvmi_dom_event *event;

	errno = 0;
	if (lib.wait_event(dom, ms) && errno != ETIMEDOUT)
		return false;
	while (lib.get_pending_events(dom)) {
		ok(lib.pop_event(dom, &event));
		handle(event);
	}

	return true;
}

static void listen_until(const unsigned int *count, unsigned int wanted)
{
	time_t end = time(NULL) + 100;

	while (*count < wanted) {
		check(listen_events(500));
		check(time(NULL) < end);
	}
}

static void switch_events(int id, bool enable)
{
	unsigned int i;

	for (i = 0; i < vcpus; i++)
		ok(lib.control_events(dom, i, id, enable));
}

/* ------------------------------------------------------------------------
 * Pausing
 */

static void pause_vm(void)
{
	if (!paused++)
		ok(lib.pause_all_vcpus(dom, vcpus));
}

static void resume_vm(void)
{
	unsigned int i;

	if (--paused)
		return;
	for (i = 0; i < vcpus; i++) {
		time_t end = time(NULL) + 60;

		while (!pause_events[i]) {
			check(listen_events(100));
			check(time(NULL) < end);
		}
		reply(pause_events[i], KVMI_EVENT_ACTION_CONTINUE);
		pause_events[i] = NULL;
	}
}

/* ------------------------------------------------------------------------
 * What is done with it
 */

static void read_memory(void)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[7];
	} few = { .head.nmsrs = 7, .entries = {
		{ .index = 0x174 }, { .index = 0x175 }, { .index = 0x176 },
		{ .index = 0xc0000080 }, { .index = 0xc0000081 },
		{ .index = 0xc0000082 }, { .index = 0xc0000083 } } };
	struct kvm_msrs none = { 0 };
	unsigned char page[4096], again[4096];
	struct kvm_sregs sregs;
	struct kvm_regs regs;
	unsigned int mode, i;

	pause_vm();
	pause_vm();
	for (i = 0; i < vcpus; i++) {
		ok(lib.get_registers(dom, i, &regs, &sregs, &few.head, &mode));
		check(mode == 8 && sregs.cr3 && few.entries[3].data & 0x400 &&
		      few.entries[5].data >> 63);
		ok(lib.get_registers(dom, i, &regs, &sregs, &none, &mode));
		ok(lib.set_registers(dom, i, &regs));
	}
	for (i = 0; i < address_count; i++) {
		unsigned long long start = addresses[i] & ~4095ULL;

		ok(lib.read_physical(dom, start, page, sizeof(page)));
		ok(lib.read_physical(dom, start, again, sizeof(again)));
		check(!memcmp(page, again, sizeof(page)));
		originals[i] = page[addresses[i] - start];
		check(originals[i] != 0xcc);
	}
	/* a hole is an error, at once */
	check(lib.read_physical(dom, memory_end, page, sizeof(page)) == -1);
	resume_vm();
	resume_vm();
	tell("memory and registers read, up to 0x%llx", memory_end);
}

static void break_in(void)
{
	static const unsigned char int3 = 0xcc;
	unsigned int i;

	switch_events(KVMI_EVENT_BREAKPOINT, true);
	pause_vm();
	for (i = 0; i < address_count; i++)
		ok(lib.write_physical(dom, addresses[i], &int3, 1));
	planted = true;
	resume_vm();
	listen_until(&hits, HITS);
	listen_until(&steps, HITS / 2);
	pause_vm();
	for (i = 0; i < address_count; i++)
		ok(lib.write_physical(dom, addresses[i], &originals[i], 1));
	planted = false;
	resume_vm();
	/* what is on its way */
	check(listen_events(500));
	switch_events(KVMI_EVENT_BREAKPOINT, false);
	for (i = 0; i < vcpus; i++)
		check(!stepped[i]);
	tell("%u hits, %u stepped over", hits, steps);
}

static void watch_registers(void)
{
	static const unsigned int list[] = { 0x6e0, 0x80b, 0x830, 0x838 };
	unsigned int i, j, on;

	for (on = 1;; on = 0) {
		for (i = 0; i < vcpus; i++) {
			ok(lib.control_cr(dom, i, 3, on));
			for (j = 0; j < 4; j++)
				ok(lib.control_msr(dom, i, list[j], on));
			/* those that there aren't are passed over */
			check(lib.control_msr(dom, i, 0x12345, on) == -1);
		}
		if (!on)
			break;
		listen_until(&crs, CHANGES);
		listen_until(&msrs, CHANGES);
	}
	tell("%u writes of CR3, %u of MSRs", crs, msrs);
}

/* Pages around the function that may not be executed */
static void restrict_pages(unsigned char access)
{
	unsigned long long start = (addresses[0] >> 12 << 12) - PAGES / 2 * 4096;
	unsigned long long gpas[PIECE];
	unsigned char rights[PIECE];
	unsigned int i, count = 0;

	memset(rights, access, sizeof(rights));
	for (i = 0; i < PAGES; i++) {
		gpas[count++] = start + i * 4096ULL;
		if (count == PIECE || i == PAGES - 1) {
			ok(lib.set_page_access(dom, gpas, rights, count, 0));
			count = 0;
		}
	}
}

static void watch_pages(void)
{
	restrict_pages(7 & ~KVMI_PAGE_ACCESS_X);
	listen_until(&faults, HITS);
	restrict_pages(7);
	tell("%u page faults", faults);
}

/* Until the VM is taken away; what it was about to answer is nobody's then */
static void stay_paused(void)
{
	unsigned char page[4096];
	unsigned int i;

	pause_vm();
	tell("paused");
	while (!lib.read_physical(dom, addresses[0] & ~4095ULL, page,
				  sizeof(page)))
		nanosleep(&(struct timespec){ .tv_nsec = 10000000 }, NULL);
	check(errno == ENOTCONN);
	check(!listen_events(0) && errno == ENOTCONN);
	tell("the connection has ended");
	for (i = 0; i < vcpus; i++) {
		free(pause_events[i]);
		pause_events[i] = NULL;
	}
	paused = 0;
	pthread_mutex_lock(&lock);
	check(wait_guest(2, 100));
	pthread_mutex_unlock(&lock);
	tell("the guest is back");
}

static unsigned int threads(void)
{
	DIR *dir = opendir("/proc/self/task");
	unsigned int count = 0;

	check(dir);
	while (readdir(dir))
		count++;
	closedir(dir);

	return count - 2;	/* "." and ".." */
}

int main(int argc, char **argv)
{
	static const int always[] = {
		KVMI_EVENT_CR, KVMI_EVENT_MSR, KVMI_EVENT_PF, KVMI_EVENT_SINGLESTEP
	};
	bool stay = argc > 2 && !strcmp(argv[2], "paused");
	size_t i;

	if (argc < 4 || argc > 3 + 8 || (!stay && strcmp(argv[2], "run"))) {
		fprintf(stderr, "usage: libvmi-like SOCKET run|paused ADDRESS...\n");
		return 2;
	}
	path = argv[1];
	for (i = 3; i < (size_t)argc; i++)
		addresses[address_count++] = strtoull(argv[i], NULL, 0);

	load();
	lib.set_log_cb(on_log, NULL);
	connect_vm();
	tell("hooked, %u vCPUs", vcpus);
	if (stay)
		stay_paused();
	for (i = 0; i < 4; i++)
		switch_events(always[i], true);
	read_memory();
	if (!stay) {
		break_in();
		watch_registers();
		watch_pages();
	}

	/* the end: all off, all closed, and the library is unmapped */
	for (i = 0; i < vcpus; i++)
		ok(lib.control_singlestep(dom, i, false));
	for (i = 0; i < 4; i++)
		switch_events(always[i], false);
	lib.domain_close(dom, true);
	lib.uninit(ctx);
	/* one that has been joined may be seen a moment longer */
	for (i = 0; i < 200 && threads() > 1; i++)
		usleep(10000);
	check(threads() == 1);
	check(!dlclose(lib.handle));
	check(!dlopen("libkvmi.so", RTLD_NOW | RTLD_NOLOAD));
	tell("unloaded");

	return 0;
}
