/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "kvmi.h"
#include "output.h"
#include "run.h"
#include "silent.h"
#include "watch.h"

#define MAX_SESSIONS 256
/* How long a session may take to leave its guest clean */
#define STOP_TIMEOUT_S 20

static const char help[] =
"Usage: kvmi watch --socket PATH [OPTION]...\n"
"\n"
"Waits for VMs (any number of them), puts breakpoints into their running Linux\n"
"kernels, asks for other events of their vCPUs, and prints and counts them.  When\n"
"a VM is going to be paused, saved or migrated, all breakpoints are taken out\n"
"first; everything is put back when the VM comes back.  Ctrl-C takes them out,\n"
"too; a second one ends at once and leaves them in.\n"
"\n"
"Options:\n"
"  -b, --break WHERE      SYMBOL, SYMBOL+OFFSET, or an address in the guest\n"
"                         (0x...); can be given many times.  It must be where an\n"
"                         instruction begins; that cannot be checked\n"
"  -f, --break-file FILE  one WHERE a line; # begins a comment\n"
"      --syscall NAME     the system call NAME (openat, ...): a breakpoint on its\n"
"                         function, a hit shows number and arguments; can be\n"
"                         given many times.  64-bit programs only\n"
"      --syscalls         all system calls, at the kernel's entry.  This is slow\n"
EVENTS_HELP
"  -n, --count N          end after N hits and events\n"
"      --show N           print the first N hits of each breakpoint and events of\n"
"                         each kind, then only numbers once a second (default: 5)\n"
"  -q, --quiet            print none of them, only the numbers at the end\n"
RUN_OPTIONS_HELP
"\n"
"JSON: every object has \"ts\" (microseconds since 1970), \"event\" and, but for the\n"
"first, \"vm\" and \"uuid\".  Addresses and registers are strings (\"0x...\").\n"
"  listening       socket\n"
"  connected       start_time, max_gpa\n"
"  ready           vcpus; kernel, offset (KASLR): missing if nothing asked for has\n"
"                  to do with symbols and there is no --system-map\n"
"  planted         breakpoints, pages: how many; duration_us\n"
"  hit             vcpu, symbol, address, hits, registers{}; of --syscall, too:\n"
"                  syscall{name (if known), number, arguments[6]}\n"
"  cr              cr, old, new          msr         msr, old, new\n"
"  pf              access, gva, gpa, symbol          xsetbv      xcr, old, new\n"
"  descriptor      register, write       hypercall\n"
"                  these have vcpu, rip, by (function at rip), cr3, user, too\n"
"  summary         interval_us, foreign, breakpoints[{symbol, hits, new}],\n"
"                  events[{event, count, new}]: each second\n"
"  notified        reason: \"unhook\" (the VM is going to be paused) or \"stop\"\n"
"  breakpoint-out  symbol, address, original (the byte put back)\n"
"                  or, when there are more than 16, only their count\n"
"  clean           breakpoints, verified, held, duration_us: the last one is out;\n"
"                  verified: memory was read to make sure (left out if taking out\n"
"                  took so long that QEMU's deadline is near); held: all vCPUs\n"
"                  stood still\n"
"  closed          reason: \"unhook\", \"stop\" or \"lost\"; hits, events; if lost,\n"
"                  detail and left: breakpoints that may still be in the guest\n"
"  problem         message\n";

enum {
	OPTION_SHOW = 256,
	OPTION_LINGER,
	OPTION_SPREAD,
	OPTION_SYSCALL,
	OPTION_SYSCALLS,
};

void watch_stop(struct watch *watch)
{
	atomic_store(&watch->stopping, true);
	if (eventfd_write(watch->stop_fd, 1))
		complain("eventfd: %s", strerror(errno));
}

/* ------------------------------------------------------------------------
 * Records
 */

static struct vm_record *record_new(struct watch *watch,
				    const struct kvmi_vm_hello *hello)
{
	struct vm_record *record = calloc(1, sizeof(*record));
	size_t i, count = watch->spec_count + watch->spread;

	if (!record)
		return NULL;
	record->breakpoints = calloc(count + 1, sizeof(struct breakpoint));
	if (!record->breakpoints || !session_make_hooks(record)) {
		free(record->breakpoints);
		free(record);
		return NULL;
	}
	record->breakpoint_count = count;
	for (i = 0; i < count; i++) {
		struct breakpoint *bp = &record->breakpoints[i];

		if (i < watch->spec_count) {
			bp->spec = watch->specs[i].where;
			bp->syscall = watch->specs[i].syscall;
		}
		snprintf(bp->name, sizeof(bp->name), "%s",
			 bp->spec ? bp->spec : "padding");
	}
	memcpy(record->uuid, hello->uuid, sizeof(record->uuid));
	memcpy(record->name, hello->name, sizeof(hello->name));
	if (record->name[0])
		strcpy(record->label, record->name);
	else
		snprintf(record->label, sizeof(record->label), "vm%u",
			 watch->record_count);

	return record;
}

static void record_free(struct vm_record *record)
{
	guest_forget(&record->guest);
	kvmi_hooks_free(record->hooks);
	free(record->syscall_table);
	free(record->pages);
	free(record->breakpoints);
	free(record);
}

struct vm_record *record_take(struct watch *watch, struct kvmi_vm *vm)
{
	static const uint8_t none[16];
	const struct kvmi_vm_hello *hello = kvmi_vm_get_hello(vm);
	bool has_uuid = memcmp(hello->uuid, none, sizeof(none));
	struct vm_record *record;
	struct timespec end;
	bool busy;

	/* The last connection of the same VM may be about to end */
	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += 2;

	pthread_mutex_lock(&watch->lock);
	for (;;) {
		busy = false;
		for (record = watch->records; record; record = record->next) {
			if (memcmp(record->uuid, hello->uuid,
				   sizeof(record->uuid)) ||
			    strcmp(record->name, hello->name))
				continue;
			/* without a uuid, this is the best there is */
			if (!has_uuid &&
			    record->start_time != hello->start_time)
				continue;
			if (!record->active)
				break;
			busy = has_uuid;
		}
		if (record || !busy)
			break;
		if (pthread_cond_timedwait(&watch->changed, &watch->lock, &end))
			break;
	}
	if (!record && !busy) {
		record = record_new(watch, hello);
		if (record) {
			record->next = watch->records;
			watch->records = record;
			watch->record_count++;
		}
	}
	if (record)
		record->active = true;
	pthread_mutex_unlock(&watch->lock);

	return record;
}

void record_release(struct watch *watch, struct vm_record *record)
{
	pthread_mutex_lock(&watch->lock);
	record->active = false;
	pthread_cond_broadcast(&watch->changed);
	pthread_mutex_unlock(&watch->lock);
}

/* ------------------------------------------------------------------------
 * Threads
 */

struct start {
	struct watch *watch;
	struct kvmi_vm *vm;
};

static void *run_session(void *context)
{
	struct start start = *(struct start *)context;

	free(context);
	session_run(start.watch, start.vm);

	pthread_mutex_lock(&start.watch->lock);
	start.watch->sessions--;
	pthread_cond_broadcast(&start.watch->changed);
	pthread_mutex_unlock(&start.watch->lock);

	return NULL;
}

static void start_session(struct watch *watch, struct kvmi_vm *vm)
{
	struct start *start = malloc(sizeof(*start));
	pthread_t thread;
	bool room;

	pthread_mutex_lock(&watch->lock);
	room = watch->sessions < MAX_SESSIONS;
	if (room)
		watch->sessions++;
	pthread_mutex_unlock(&watch->lock);
	if (!room) {
		complain("more than %d connections", MAX_SESSIONS);
		goto failed;
	}

	if (start) {
		*start = (struct start){ watch, vm };
		if (!pthread_create(&thread, NULL, run_session, start)) {
			pthread_detach(thread);
			return;
		}
	}
	complain("a connection was dropped: no memory for a thread");
	pthread_mutex_lock(&watch->lock);
	watch->sessions--;
	pthread_mutex_unlock(&watch->lock);
failed:
	free(start);
	kvmi_vm_close(vm);
}

/* ------------------------------------------------------------------------
 * Options
 */

static int add_spec(struct watch *watch, const char *prefix, const char *text,
		    bool syscall)
{
	struct spec *specs = realloc(watch->specs, (watch->spec_count + 1) *
				     sizeof(*specs));
	char *where;

	if (!specs)
		return -1;
	watch->specs = specs;
	if (asprintf(&where, "%s%s", prefix, text) < 0)
		return -1;
	specs[watch->spec_count++] = (struct spec){ where, syscall };
	watch->syscalls |= syscall;

	return 0;
}

static int add_file(struct watch *watch, const char *path)
{
	FILE *file = strcmp(path, "-") ? fopen(path, "re") : stdin;
	size_t capacity = 0;
	char *line = NULL;
	int result = 0;

	if (!file) {
		complain("%s: %s", path, strerror(errno));
		return -1;
	}
	while (!result && getline(&line, &capacity, file) >= 0) {
		char *start = line + strspn(line, " \t\r\n");

		start[strcspn(start, "# \t\r\n")] = 0;
		if (*start)
			result = add_spec(watch, "", start, false);
	}
	if (result || ferror(file)) {
		complain("%s: cannot be read", path);
		result = -1;
	}
	free(line);
	if (file != stdin)
		fclose(file);

	return result;
}

static int parse_options(struct watch *watch, int argc, char **argv,
			 struct where *where)
{
	static const struct option options[] = {
		ONE_VM_SOCKET_OPTIONS, ONE_VM_MAP_OPTIONS, ONE_VM_JSON_OPTIONS,
		EVENTS_OPTIONS,
		{ "break", required_argument, NULL, 'b' },
		{ "break-file", required_argument, NULL, 'f' },
		/*
		 * For measurements: that many breakpoints in the padding
		 * between functions, which never runs.
		 */
		{ "break-spread", required_argument, NULL, OPTION_SPREAD },
		/* For tests: how slow to be when asked to leave, see linger() */
		{ "linger", required_argument, NULL, OPTION_LINGER },
		{ "syscall", required_argument, NULL, OPTION_SYSCALL },
		{ "syscalls", no_argument, NULL, OPTION_SYSCALLS },
		{ "count", required_argument, NULL, 'n' },
		{ "show", required_argument, NULL, OPTION_SHOW },
		{ "quiet", no_argument, NULL, 'q' },
		{ 0 },
	};
	struct one_vm one = { 0 };
	int option, result;
	uint64_t number;

	while ((option = getopt_long(argc, argv, "b:f:n:q" EVENTS_SHORT
				     ONE_VM_SOCKET ONE_VM_MAP ONE_VM_JSON,
				     options, NULL)) >= 0) {
		switch (option) {
		case 'b':
			if (!*optarg || add_spec(watch, "", optarg, false)) {
				complain("--break wants a symbol or an address");
				return EXIT_USAGE;
			}
			break;
		case 'f':
			if (add_file(watch, optarg))
				return EXIT_PROBLEM;
			break;
		case OPTION_SYSCALL:
			if (!*optarg || optarg[strspn(optarg, "abcdefghijklmnopqrstuvwxyz0123456789_")] ||
			    add_spec(watch, "__x64_sys_", optarg, true)) {
				complain("--syscall wants the name of a system call, as openat");
				return EXIT_USAGE;
			}
			break;
		case OPTION_SYSCALLS:
			if (add_spec(watch, "do_syscall_64", "", true)) {
				complain("out of memory");
				return EXIT_PROBLEM;
			}
			break;
		case OPTION_SPREAD:
			if (parse_number(optarg, 0, 100000, &number)) {
				complain("--break-spread wants a number");
				return EXIT_USAGE;
			}
			watch->spread = number;
			break;
		case OPTION_LINGER:
			watch->linger = optarg;
			break;
		case 'n':
			if (parse_number(optarg, 1, UINT64_MAX, &number)) {
				complain("--count wants a number above 0");
				return EXIT_USAGE;
			}
			watch->count = number;
			break;
		case OPTION_SHOW:
			if (parse_number(optarg, 0, UINT32_MAX, &number)) {
				complain("--show wants a number");
				return EXIT_USAGE;
			}
			watch->show_hits = number;
			break;
		case 'q':
			watch->quiet = true;
			break;
		default:
			if (!events_option(&watch->events, option, &result))
				result = one_vm_option(&one, option, help);
			if (result >= 0)
				return result;
		}
	}
	if (optind < argc) {
		complain("%s: no such argument; breakpoints are given by --break",
			 argv[optind]);
		return EXIT_USAGE;
	}
	result = one_vm_options_end(&one, "watch", 0, 0);
	watch->map = one.map;
	watch->json = one.json;
	*where = one.where;

	return result;
}

/* ------------------------------------------------------------------------ */

static void print_totals(struct watch *watch)
{
	struct vm_record *record;
	size_t i, quiet;

	if (watch->json)
		return;
	for (record = watch->records; record; record = record->next) {
		uint64_t total = 0;

		for (i = 0; i < EVENT_IDS; i++)
			if (events_want(&watch->events, i))
				human(0, false, "%s: %llu events of the kind %s",
				      record->label,
				      (unsigned long long)record->events[i].count,
				      kvmi_event_name(i));
		if (!record->breakpoint_count)
			continue;
		for (i = 0; i < record->breakpoint_count; i++)
			total += record->breakpoints[i].hits;
		human(0, false, "%s: %llu hits", record->label,
		      (unsigned long long)total);
		for (i = quiet = 0; i < record->breakpoint_count; i++) {
			const struct breakpoint *bp = &record->breakpoints[i];

			if (bp->hits || record->breakpoint_count <= 20)
				human(0, false, "  %12llu  %s",
				      (unsigned long long)bp->hits, bp->name);
			else
				quiet++;
		}
		if (quiet)
			human(0, false, "  %zu others were not hit", quiet);
	}
}

static void free_watch(struct watch *watch)
{
	struct vm_record *record;
	size_t i;

	while ((record = watch->records)) {
		watch->records = record->next;
		record_free(record);
	}
	for (i = 0; i < watch->spec_count; i++)
		free(watch->specs[i].where);
	free(watch->specs);
	symbols_free(watch->map);
}

/* Until all sessions have ended.  false: some did not in time. */
static bool wait_for_sessions(struct watch *watch, int signal_fd)
{
	struct timespec end;
	bool done;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += STOP_TIMEOUT_S;

	pthread_mutex_lock(&watch->lock);
	while (watch->sessions) {
		struct signalfd_siginfo info;
		struct timespec slice, now;

		clock_gettime(CLOCK_REALTIME, &now);
		if (now.tv_sec >= end.tv_sec)
			break;
		slice = now;
		slice.tv_nsec += 100000000;
		if (slice.tv_nsec >= 1000000000) {
			slice.tv_sec++;
			slice.tv_nsec -= 1000000000;
		}
		pthread_cond_timedwait(&watch->changed, &watch->lock, &slice);
		if (read(signal_fd, &info, sizeof(info)) == sizeof(info)) {
			complain("ended by force; breakpoints may be left in guests");
			_exit(128 + info.ssi_signo);
		}
	}
	done = !watch->sessions;
	pthread_mutex_unlock(&watch->lock);

	return done;
}

static int listen_and_watch(struct watch *watch, struct silent *silent,
			    int signal_fd)
{
	struct kvmi_error err;

	while (!atomic_load(&watch->stopping)) {
		struct pollfd poll_fds[3 + SILENT_FDS] = {
			{ .fd = signal_fd, .events = POLLIN },
			{ .fd = watch->stop_fd, .events = POLLIN },
			{ .fd = output_fd(), .events = POLLIN },
		};
		nfds_t count = 3 + silent_fds(silent, poll_fds + 3);
		struct signalfd_siginfo info;
		struct kvmi_vm *vm;

		if (poll(poll_fds, count, -1) < 0 && errno != EINTR) {
			complain("poll: %s", strerror(errno));
			atomic_store(&watch->problem, true);
			break;
		}
		if (poll_fds[0].revents &&
		    read(signal_fd, &info, sizeof(info)) == sizeof(info))
			break;
		if (poll_fds[2].revents) {
			atomic_store(&watch->problem, true);
			break;
		}
		switch (silent_take(silent, poll_fds + 3, &vm, &err)) {
		case KVMI_OK:
			start_session(watch, vm);
			break;
		case KVMI_ERR_NOTHING:
			break;
		default:
			/* out of descriptors or memory: that may pass */
			complain("%s", err.message);
			poll(NULL, 0, 200);
		}
	}
	watch_stop(watch);
	silent_free(silent);

	if (!wait_for_sessions(watch, signal_fd)) {
		complain("some VMs did not answer; breakpoints may be left in guests");
		return -1;
	}

	return 0;
}

int watch_main(int argc, char **argv)
{
	struct watch watch = {
		.show_hits = 5,
		.lock = PTHREAD_MUTEX_INITIALIZER,
		.changed = PTHREAD_COND_INITIALIZER,
		.stop_fd = -1,
	};
	struct silent silent = { 0 };
	int result, signal_fd = -1;
	struct where where = { 0 };
	sigset_t signals;

	result = parse_options(&watch, argc, argv, &where);
	if (result >= 0)
		goto out;
	result = EXIT_PROBLEM;

	/* Before any thread starts: they all have them blocked */
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGHUP);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	watch.stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (signal_fd < 0 || watch.stop_fd < 0 || output_start()) {
		complain("cannot start: %s", strerror(errno));
		goto out;
	}

	silent.listener = start_listening(&where);
	if (!silent.listener)
		goto out;
	if (watch.json) {
		struct line line;

		json_start(&line, now_us(), "listening");
		json_string(&line, "socket", where.socket);
		json_end(&line, false);
	} else {
		human(now_us(), false, "waiting for VMs on %s", where.socket);
	}

	if (listen_and_watch(&watch, &silent, signal_fd)) {
		/* threads are still using everything */
		output_end();
		fflush(stderr);
		_exit(EXIT_PROBLEM);
	}
	print_totals(&watch);
	if (output_dropped())
		complain("%lu lines of output were dropped because they were not read in time",
			 output_dropped());
	if (!output_end())
		atomic_store(&watch.problem, true);
	result = atomic_load(&watch.problem) ? EXIT_PROBLEM : EXIT_OK;
out:
	if (signal_fd >= 0)
		close(signal_fd);
	if (watch.stop_fd >= 0)
		close(watch.stop_fd);
	free_watch(&watch);

	return result;
}
