// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The test guest's userland: init and all of it.
 *
 * One thread per CPU calls two system calls whose kernel functions nothing else calls (so every breakpoint hit there
 * is ours and can be counted) and checks what they return (so a wrong step over a breakpoint shows). The first thread
 * tells twice a second how far it is: that is how a test sees that the guest is alive. Then it makes a child, so that the kernel
 * changes from one address space to another now and then.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CALLS_PER_SECOND 250	/* per CPU and function */

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

int main(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	mkdir("/proc", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	tell_kernel_text();
	printf("guest: cpus %ld\n", cpus);
	for (long cpu = 0; cpu < cpus; cpu++) {
		pthread_t thread;

		errno = pthread_create(&thread, NULL, busy, (void *)cpu);
		if (errno)
			perror("guest: pthread_create");
	}
	for (;;) {
		struct timespec pause = { .tv_nsec = 500000000 };

		printf("guest: calls %lu wrong %lu\n", calls, wrong);
		fflush(stdout);
		if (!fork())
			_exit(0);
		while (wait(NULL) > 0)
			;
		nanosleep(&pause, NULL);
	}
}
