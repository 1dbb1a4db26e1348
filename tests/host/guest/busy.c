// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The test guest's userland: init and all of it.
 *
 * One thread per CPU calls two system calls whose kernel functions nothing else calls (so every breakpoint hit there
 * is ours and can be counted) and checks what they return (so a wrong step over a breakpoint shows). The first thread
 * tells five times a second how far it is: that is how a test sees that the guest is alive. Then it makes a child, so that the
 * kernel changes from one address space to another now and then. What a test wants the guest to do comes as a line on the
 * console: from a power off to writing to a disk, for which the drivers are in the initramfs.
 *
 * Under libvirt (tests/host/virsh.py) there are modules in the initramfs, and it does two things more that operators ask of
 * guests: the power button powers it off, and the agent's channel knows guest-suspend-ram.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <asm/ldt.h>
#include <cpuid.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/input.h>
#include <net/if.h>
#include <net/ethernet.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CALLS_PER_SECOND 100	/* per CPU and function */

static atomic_ulong calls, wrong;

static void *busy(void *cpu)
{
	struct timespec pause = { .tv_nsec = 1000000000 / CALLS_PER_SECOND };
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((long)cpu, &set);
	sched_setaffinity(0, sizeof(set), &set);
	for (;;) {
		long parent = syscall(SYS_getppid);
		long top = syscall(SYS_sched_get_priority_max, SCHED_FIFO);

		if (parent != 0 || top != 99)
			atomic_fetch_add(&wrong, 1);
		atomic_fetch_add(&calls, 1);
		nanosleep(&pause, NULL);
	}
	return NULL;
}

/* Where the kernel lies, in the kernel's own words: tests compare what the tool found out with this. */
static void tell_kernel_text(void)
{
	char line[256], name[128];
	unsigned long start, end, address;
	FILE *f = fopen("/proc/iomem", "r");

	while (f && fgets(line, sizeof(line), f))
		if (strstr(line, "Kernel code") && sscanf(line, " %lx-%lx", &start, &end) == 2)
			printf("guest: text-physical 0x%lx 0x%lx\n", start, end + 1);
	if (f)
		fclose(f);
	f = fopen("/proc/kallsyms", "r");
	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "%lx %*c %127s", &address, name) == 2 && !strcmp(name, "_text")) {
			printf("guest: text-virtual 0x%lx\n", address);
			break;
		}
	if (f)
		fclose(f);
}

static void load_module(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	if (syscall(SYS_finit_module, fd, "", 0) && errno != ENODEV)
		perror(path);
	close(fd);
}

static void *power_button(void *device)
{
	struct input_event event;
	int fd = open(device, O_RDONLY | O_CLOEXEC);

	while (fd >= 0 && read(fd, &event, sizeof(event)) == sizeof(event))
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			reboot(RB_POWER_OFF);
	return NULL;
}

/* As much of QEMU's guest agent as libvirt needs for "virsh dompmsuspend" */
static void *agent(void *device)
{
	FILE *port;
	char line[512];
	int fd;

	/* a port whose other end isn't open reads as ended */
	while ((fd = open(device, O_RDWR | O_CLOEXEC)) < 0)
		sleep(1);
	port = fdopen(fd, "r");
	for (;;) {
		char *id;

		if (!fgets(line, sizeof(line), port)) {
			clearerr(port);
			usleep(100000);
			continue;
		}
		id = strstr(line, "\"id\"");
		if (strstr(line, "guest-sync") && id && (id = strchr(id, ':'))) {
			dprintf(fd, "{\"return\": %llu}\n", strtoull(id + 1, NULL, 10));
		} else if (strstr(line, "guest-suspend-ram")) {
			int state = open("/sys/power/state", O_WRONLY | O_CLOEXEC);

			printf("guest: suspends to RAM\n");
			if (state < 0 || write(state, "mem", 3) != 3)
				perror("guest: /sys/power/state");
			else
				printf("guest: woke up\n");
			close(state);
		} else {
			dprintf(fd, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"not in this guest\"}}\n");
		}
	}
	return NULL;
}

static void write_file(const char *name, const char *text)
{
	int fd = open(name, O_WRONLY);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		printf("guest: %s: %s\n", name, strerror(errno));
	if (fd >= 0)
		close(fd);
}

/*
 * Not by iopl(): QEMU's TCG doesn't let userland near the ports once userspace has set the nested guest's TR, whose
 * descriptor then says "busy".
 */
static void out(unsigned int port, unsigned char value)
{
	int fd = open("/port", O_WRONLY | O_CLOEXEC);

	if (fd < 0 || pwrite(fd, &value, 1, port) != 1)
		perror("guest: /port");
	if (fd >= 0)
		close(fd);
}

/* The console is slow: no more than is needed */
static void tell_process(const char *path)
{
	FILE *f = fopen(path, "r");
	int pid, parent;
	char name[64], state;

	if (f && fscanf(f, "%d (%63[^)]) %c %d", &pid, name, &state, &parent) == 4)
		printf("guest: process %d (%s) %c %d \n", pid, name, state, parent);
	if (f)
		fclose(f);
}

static void tell_lines(const char *what, const char *path, int length)
{
	char line[512];
	FILE *f = fopen(path, "r");

	while (f && fgets(line, sizeof(line), f))
		printf("guest: %s %.*s\n", what, length, line);
	if (f)
		fclose(f);
}

/* What ps and lsmod would say */
static void tell_processes(void)
{
	DIR *dir = opendir("/proc");
	struct dirent *entry;
	char path[300];

	while (dir && (entry = readdir(dir))) {
		if (entry->d_name[0] < '0' || entry->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "/proc/%s/stat", entry->d_name);
		tell_process(path);
	}
	if (dir)
		closedir(dir);
	tell_lines("module", "/proc/modules", 48);
	printf("guest: that was all\n");
}

static void load_virtio(const char *device)
{
	load_module("/modules/virtio_mmio.ko");
	load_module(device);
}

/* The largest disk; returns how many bytes it has */
static unsigned long long open_disk(int *fd)
{
	unsigned long long sectors, most = 0;
	unsigned int major, minor, found[2];

	*fd = -1;
	for (char name[] = "vda"; name[2] <= 'd'; name[2]++) {
		char path[64];
		FILE *f;

		snprintf(path, sizeof(path), "/sys/block/%s/size", name);
		f = fopen(path, "r");
		if (!f)
			continue;
		if (fscanf(f, "%llu", &sectors) != 1)
			sectors = 0;
		fclose(f);
		snprintf(path, sizeof(path), "/sys/block/%s/dev", name);
		f = fopen(path, "r");
		if (f && fscanf(f, "%u:%u", &major, &minor) == 2 && sectors > most) {
			most = sectors;
			found[0] = major;
			found[1] = minor;
		}
		if (f)
			fclose(f);
	}
	if (most && (!mknod("/disk", S_IFBLK | 0600, makedev(found[0], found[1])) || errno == EEXIST))
		*fd = open("/disk", O_WRONLY | O_DIRECT | O_CLOEXEC);
	return most * 512;
}

/* "write": a thread writes block after block to the disk, and goes on when one fails */
static atomic_ulong written, unwritten;
static atomic_int writing;

static void *write_disk(void *unused)
{
	static char block[4096] __attribute__((aligned(4096)));
	unsigned long long size, at = 0;
	int fd;

	(void)unused;
	load_virtio("/modules/virtio_blk.ko");
	size = open_disk(&fd);
	if (fd < 0) {
		printf("guest: has no disk: %s\n", strerror(errno));
		return NULL;
	}
	printf("guest: writes\n");
	for (writing = 1; ; at = (at + sizeof(block)) % size) {
		memset(block, at / sizeof(block), sizeof(block));
		if (pwrite(fd, block, sizeof(block), at) == sizeof(block))
			written++;
		else
			unwritten++;
	}
	return NULL;
}

/* "echo": a thread sends a frame on the network and waits for another one, over and over */
static atomic_ulong echoes, lost;
static atomic_int echoing;

static void *echo(void *unused)
{
	struct sockaddr_ll to = { .sll_family = AF_PACKET, .sll_halen = ETH_ALEN };
	unsigned char frame[64] = { [0 ... 5] = 0xff, [12] = 0x88, [13] = 0xb5 };	/* for experiments */
	struct ifreq interface = { .ifr_name = "eth0" };
	int fd;

	(void)unused;
	load_module("/modules/failover.ko");
	load_module("/modules/net_failover.ko");
	load_virtio("/modules/virtio_net.ko");
	fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(0x88b5));
	if (fd < 0 || ioctl(fd, SIOCGIFINDEX, &interface)) {
		printf("guest: has no network: %s\n", strerror(errno));
		return NULL;
	}
	to.sll_ifindex = interface.ifr_ifindex;
	interface.ifr_flags = IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &interface))
		perror("guest: eth0");
	printf("guest: echoes\n");
	for (echoing = 1; ;) {
		struct pollfd pfd = { .fd = fd, .events = POLLIN };
		unsigned char answer[64];

		if (sendto(fd, frame, sizeof(frame), 0, (struct sockaddr *)&to, sizeof(to)) == sizeof(frame) &&
		    poll(&pfd, 1, 1000) == 1 && read(fd, answer, sizeof(answer)) > 0)
			echoes++;
		else
			lost++;
		usleep(5000);
	}
	return NULL;
}

/* With "patch" the kernel rewrites its own code over and over, for a static key, until "be quiet" */
static atomic_int patching, hush;

static void patch_kernel(void)
{
	static int patched;

	if (patching || patched) {
		patched = !patched;
		write_file("/proc/sys/kernel/sched_schedstats", patched ? "1" : "0");
	}
	if (hush && !patching && !patched) {
		hush = 0;
		printf("guest: quiet\n");
	}
}

/*
 * "provoke": a thread that does, over and over, what a guest otherwise does only at its start: calls the tool, and has the
 * kernel load LDTR.
 */
static atomic_int provoking;

/* The hypercall that KVM shows to a tool, see kvmi.rst */
static long call_tool(void)
{
	unsigned int eax, ebx, ecx, edx;
	long result = 34;	/* KVM_HC_XEN_HVM_OP, ..._GUEST_REQUEST_VM_EVENT */

	__cpuid(0, eax, ebx, ecx, edx);
	if (ebx == signature_INTEL_ebx)
		asm volatile("vmcall" : "+a"(result) : "D"(24), "S"(0) : "memory");
	else
		asm volatile("vmmcall" : "+a"(result) : "D"(24), "S"(0) : "memory");
	return result;
}

static void *provoke(void *unused)
{
	struct timespec pause = { .tv_nsec = 1000000000 / CALLS_PER_SECOND };
	struct user_desc segment = { .limit = 1, .seg_32bit = 1 };

	(void)unused;
	for (;;) {
		long result = call_tool();

		/* the tool's answer, or KVM's without a tool */
		if ((result != 0 && result != -EPERM) || syscall(SYS_modify_ldt, 1, &segment, sizeof(segment)))
			atomic_fetch_add(&wrong, 1);
		nanosleep(&pause, NULL);
	}
	return NULL;
}

static void start(void *(*function)(void *), const void *argument)
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, function, (void *)argument);
	if (errno)
		perror("guest: pthread_create");
}

/* What has to come from inside the guest */
static void *obey(void *unused)
{
	char line[64];

	(void)unused;
	while (fgets(line, sizeof(line), stdin)) {
		unsigned int port, value;

		line[strcspn(line, "\r\n")] = 0;
		printf("guest: told to %s\n", line);
		fflush(stdout);
		if (!strcmp(line, "reboot"))
			reboot(RB_AUTOBOOT);
		else if (!strcmp(line, "power off"))
			reboot(RB_POWER_OFF);
		else if (!strcmp(line, "suspend"))
			write_file("/sys/power/state", "mem");
		else if (sscanf(line, "wake up in %u", &value) == 1) {
			snprintf(line, sizeof(line), "+%u", value);
			write_file("/sys/class/rtc/rtc0/wakealarm", line);
			printf("guest: wakes up in %u s\n", value);
		}
		else if (!strcmp(line, "list processes"))
			tell_processes();
		else if (!strcmp(line, "patch"))
			patching = 1;
		else if (!strcmp(line, "be quiet")) {
			patching = 0;
			hush = 1;
		}
		else if (!strcmp(line, "call"))
			printf("guest: call returned %ld\n", call_tool());
		else if (!strcmp(line, "write"))
			start(write_disk, NULL);
		else if (!strcmp(line, "echo"))
			start(echo, NULL);
		else if (!strcmp(line, "provoke")) {
			if (!atomic_exchange(&provoking, 1))
				start(provoke, NULL);
			printf("guest: provokes\n");
		}
		else if (sscanf(line, "out %x %x", &port, &value) == 2)
			out(port, value);
		else
			printf("guest: can't %s\n", line);
		fflush(stdout);
	}
	return NULL;
}

static void be_operable(void)
{
	static const char *const modules[] = { "/modules/button.ko", "/modules/virtio_blk.ko" };
	static char devices[8][32];

	load_module("/modules/evdev.ko");
	if (access(modules[0], F_OK))
		return;
	mkdir("/dev", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	for (size_t i = 0; i < sizeof(modules) / sizeof(modules[0]); i++)
		load_module(modules[i]);
	for (int i = 0; i < 8; i++) {
		snprintf(devices[i], sizeof(devices[i]), "/dev/input/event%d", i);
		start(power_button, devices[i]);
	}
	start(agent, "/dev/vport0p1");
}

int main(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	mkdir("/proc", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mkdir("/sys", 0755);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mknod("/port", S_IFCHR | 0600, makedev(1, 4));
	tell_kernel_text();
	printf("guest: cpus %ld\n", cpus);
	be_operable();
	for (long cpu = 0; cpu < cpus; cpu++)
		start(busy, (void *)cpu);
	start(obey, NULL);
	for (;;) {
		struct timespec pause = { .tv_nsec = 200000000 };

		printf("guest: calls %lu wrong %lu\n", calls, wrong);
		if (writing)
			printf("guest: wrote %lu failed %lu\n", written, unwritten);
		if (echoing)
			printf("guest: echoes %lu lost %lu\n", echoes, lost);
		patch_kernel();
		fflush(stdout);
		if (!fork())
			_exit(0);
		while (wait(NULL) > 0)
			;
		nanosleep(&pause, NULL);
	}
}
