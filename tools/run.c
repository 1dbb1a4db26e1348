/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "run.h"
#include "silent.h"

#define SESSIONS_MAX 256
#define VCPUS_MAX 4096
#define HANDSHAKE_TIMEOUT_MS 10000
/* Below QEMU's deadline for unhooking (5 s) */
#define COMMAND_TIMEOUT_MS 4000
#define KERNEL_POLL_MS 200
#define STOP_TIMEOUT_S 20

struct session {
	struct run_vm rv;
	bool unhook;		/* KVMI_EV_UNHOOK came */
	bool begun;
	char waiting_for[256];
};

/* ------------------------------------------------------------------------
 * Output
 */

void run_line(struct run_vm *rv, struct line *line, const char *event)
{
	json_start(line, now_us(), event);
	json_string(line, "vm", rv->label);
	json_string(line, "uuid", rv->uuid);
}

void run_registers(struct line *line, const struct kvm_regs *regs)
{
	const struct {
		const char *name;
		uint64_t value;
	} list[] = {
		{ "rax", regs->rax }, { "rbx", regs->rbx },
		{ "rcx", regs->rcx }, { "rdx", regs->rdx },
		{ "rsi", regs->rsi }, { "rdi", regs->rdi },
		{ "rsp", regs->rsp }, { "rbp", regs->rbp },
		{ "r8", regs->r8 }, { "r9", regs->r9 },
		{ "r10", regs->r10 }, { "r11", regs->r11 },
		{ "r12", regs->r12 }, { "r13", regs->r13 },
		{ "r14", regs->r14 }, { "r15", regs->r15 },
		{ "rip", regs->rip }, { "rflags", regs->rflags },
	};
	size_t i;

	json_open(line, "registers", '{');
	for (i = 0; i < sizeof(list) / sizeof(list[0]); i++)
		json_hex(line, list[i].name, list[i].value);
	json_close(line, '}');
}

void run_problem(struct run_vm *rv, const char *format, ...)
{
	struct line line;
	char text[512];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	atomic_store(&rv->run->problem, true);
	if (rv->run->one.json) {
		run_line(rv, &line, "problem");
		json_string(&line, "message", text);
		json_end(&line, false);
	}
	complain("%s: %s", rv->label, text);
}

/* ------------------------------------------------------------------------
 * One connection
 */

bool run_lost(struct run_vm *rv, enum kvmi_status status)
{
	if (status == KVMI_ERR_CLOSED || status == KVMI_ERR_PROTOCOL ||
	    status == KVMI_ERR_SYSTEM)
		rv->lost = true;

	return rv->lost;
}

bool run_leaving(const struct run_vm *rv)
{
	const struct session *s = (const struct session *)rv;

	return s->unhook || rv->lost || rv->failed ||
	       atomic_load(&rv->run->stopping);
}

bool run_events(struct run_vm *rv)
{
	struct session *s = (struct session *)rv;
	struct kvmi_vm_event *event;
	bool any = false;

	while ((event = kvmi_vm_next_event(rv->vm))) {
		any = true;
		if (event->id == KVMI_EV_UNHOOK)
			s->unhook = true;
		else if (rv->run->ops->event)
			rv->run->ops->event(rv, event);
		else
			kvmi_vm_reply(rv->vm, event, KVMI_ACTION_CONTINUE, NULL);
		kvmi_vm_event_free(event);
	}

	return any;
}

static bool is_interrupted(void *context)
{
	run_events(context);

	return run_leaving(context);
}

static void prepare_vcpus(struct run_vm *rv)
{
	unsigned int count, i;
	struct kvmi_error err;
	enum kvmi_status status;

	if (!rv->run->ops->vcpu)
		return;
	status = kvmi_vm_get_vcpu_count(rv->vm, &count, &err);
	if (status != KVMI_OK) {
		if (!run_lost(rv, status))
			run_problem(rv, "%s", err.message);
		return;
	}
	if (count > VCPUS_MAX)
		count = VCPUS_MAX;
	if (count > rv->vcpu_count) {
		bool *done = realloc(rv->vcpu_done, count * sizeof(*done));

		if (!done) {
			run_problem(rv, "out of memory");
			return;
		}
		memset(done + rv->vcpu_count, 0,
		       (count - rv->vcpu_count) * sizeof(*done));
		rv->vcpu_done = done;
		rv->vcpu_count = count;
	}
	for (i = 0; i < count && !run_leaving(rv); i++) {
		if (rv->vcpu_done[i])
			continue;
		status = rv->run->ops->vcpu(rv, i, &err);
		if (status == KVMI_OK) {
			rv->vcpu_done[i] = true;
		} else if (status != KVMI_ERR_NOT_STARTED &&
			   !run_lost(rv, status)) {
			run_problem(rv, "vCPU %u: %s", i, err.message);
			rv->failed = true;
		}
		/* those that wait for an answer to an event */
		run_events(rv);
	}
}

/* How long to wait before the next try, in ms; 0: it is done */
static int try_to_begin(struct session *s)
{
	struct run_vm *rv = &s->rv;
	struct kvmi_error err;
	enum guest_result result = GUEST_FOUND;
	struct line line;
	char text[256];

	if (rv->run->ops->kernel)
		result = guest_find_kernel(&rv->guest, rv->vm, rv->run->one.map,
					   text, sizeof(text), &err);
	if (run_leaving(rv))
		return KERNEL_POLL_MS;
	if (result == GUEST_FAILED) {
		if (!run_lost(rv, err.status))
			run_problem(rv, "%s", err.message);
		rv->failed = true;
		return KERNEL_POLL_MS;
	}
	if (result == GUEST_UNKNOWN) {
		run_problem(rv, "%s", text);
		rv->failed = true;
		return KERNEL_POLL_MS;
	}
	if (result == GUEST_NOT_YET) {
		if (strcmp(text, s->waiting_for) && !rv->run->one.json)
			human(now_us(), false, "%s: waiting: %s", rv->label, text);
		strcpy(s->waiting_for, text);
		return KERNEL_POLL_MS;
	}

	prepare_vcpus(rv);
	if (run_leaving(rv))
		return KERNEL_POLL_MS;
	if (rv->run->one.json) {
		run_line(rv, &line, "ready");
		if (rv->run->ops->kernel) {
			json_string(&line, "kernel", rv->guest.banner);
			json_hex(&line, "offset", rv->guest.kaslr);
		}
		json_end(&line, false);
	}
	s->begun = true;
	if (!rv->run->ops->begin(rv))
		rv->failed = true;

	return 0;
}

static bool connect_to(struct run_vm *rv)
{
	const struct run_ops *ops = rv->run->ops;
	const struct kvmi_vm_hello *hello;
	struct kvmi_error err;
	enum kvmi_status status;
	struct line line;

	kvmi_vm_set_timeout(rv->vm, HANDSHAKE_TIMEOUT_MS, NULL);
	status = kvmi_vm_connect(rv->vm, ops->commands |
				 KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS) |
				 KVMI_SET(KVMI_CMD_VM_GET_INFO) |
				 (ops->kernel ? ONE_VM_KERNEL_COMMANDS : 0),
				 ops->events | KVMI_SET(KVMI_EV_UNHOOK), &err);
	kvmi_vm_set_timeout(rv->vm, COMMAND_TIMEOUT_MS, NULL);
	/* QEMU tries once in a while: it may have gone before we came */
	if (status == KVMI_ERR_CLOSED)
		return false;

	hello = kvmi_vm_get_hello(rv->vm);
	format_uuid(hello->uuid, rv->uuid);
	snprintf(rv->label, sizeof(rv->label), "%s",
		 hello->name[0] ? hello->name : rv->uuid);
	if (status == KVMI_OK)
		status = kvmi_vm_control_events(rv->vm, KVMI_EV_UNHOOK, true,
						&err);
	if (status != KVMI_OK) {
		run_problem(rv, "%s", err.message);
		return false;
	}
	if (rv->run->one.json) {
		run_line(rv, &line, "connected");
		json_number(&line, "start_time", hello->start_time);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: connected", rv->label);
	}

	return true;
}

static void follow(struct session *s)
{
	struct run_vm *rv = &s->rv;
	int64_t next_try = 0, next_second = 0, last_us = 0;

	while (!run_leaving(rv)) {
		struct pollfd poll_fds[2] = {
			{ .fd = kvmi_vm_fd(rv->vm) },
			{ .fd = rv->run->stop_fd, .events = POLLIN },
		};
		enum kvmi_status status;
		struct kvmi_error err;
		int64_t now, due;

		if (run_events(rv))
			continue;
		now = now_ms();
		if (!s->begun && now >= next_try) {
			next_try = now + try_to_begin(s);
			next_second = now_ms() + 1000;
			last_us = now_us();
			continue;
		}
		if (s->begun && now >= next_second) {
			prepare_vcpus(rv);
			if (rv->run->ops->second && !run_leaving(rv))
				rv->run->ops->second(rv, now_us() - last_us);
			last_us = now_us();
			next_second = now_ms() + 1000;
			continue;
		}
		due = (s->begun ? next_second : next_try) - now;
		poll_fds[0].events = kvmi_vm_poll_events(rv->vm);
		if (poll(poll_fds, 2, due < 0 ? 0 : due) < 0 && errno != EINTR)
			break;
		status = kvmi_vm_process(rv->vm, &err);
		if (status != KVMI_OK)
			run_lost(rv, status);
	}
}

static void finish(struct session *s)
{
	struct run_vm *rv = &s->rv;
	const char *reason;
	struct line line;

	run_events(rv);
	if (s->begun && !rv->lost) {
		rv->run->ops->end(rv);
		run_events(rv);
		if (!rv->lost)
			run_lost(rv, kvmi_vm_flush(rv->vm, NULL));
	}
	kvmi_vm_close(rv->vm);

	reason = s->unhook ? "unhook" : rv->lost ? "lost" :
		 rv->failed ? "problem" : "stop";
	if (rv->run->one.json) {
		run_line(rv, &line, "closed");
		json_string(&line, "reason", reason);
		json_end(&line, false);
	} else {
		human(now_us(), false, "%s: closed (%s)", rv->label,
		      s->unhook ? "the VM is about to be paused" :
		      rv->lost ? "the connection is gone" : reason);
	}
}

static void *run_session(void *context)
{
	struct session *s = context;
	struct run *run = s->rv.run;

	strcpy(s->rv.label, "?");
	s->rv.guest.interrupted = is_interrupted;
	s->rv.guest.context = &s->rv;
	if (connect_to(&s->rv)) {
		follow(s);
		finish(s);
	} else {
		kvmi_vm_close(s->rv.vm);
	}
	if (run->ops->free)
		run->ops->free(&s->rv);
	guest_forget(&s->rv.guest);
	free(s->rv.vcpu_done);
	free(s->rv.data);
	free(s);

	pthread_mutex_lock(&run->lock);
	run->sessions--;
	pthread_cond_broadcast(&run->changed);
	pthread_mutex_unlock(&run->lock);

	return NULL;
}

static void start_session(struct run *run, struct kvmi_vm *vm)
{
	struct session *s = calloc(1, sizeof(*s));
	pthread_t thread;
	bool room;

	pthread_mutex_lock(&run->lock);
	room = run->sessions < SESSIONS_MAX;
	if (room)
		run->sessions++;
	pthread_mutex_unlock(&run->lock);
	if (s && room) {
		s->rv.run = run;
		s->rv.vm = vm;
		s->rv.data = calloc(1, run->ops->data_size + 1);
		if (s->rv.data &&
		    !pthread_create(&thread, NULL, run_session, s)) {
			pthread_detach(thread);
			return;
		}
		free(s->rv.data);
	}
	complain(room ? "a connection was dropped: no memory for a thread" :
		 "a connection was dropped: there are %d already", SESSIONS_MAX);
	if (room) {
		pthread_mutex_lock(&run->lock);
		run->sessions--;
		pthread_mutex_unlock(&run->lock);
	}
	free(s);
	kvmi_vm_close(vm);
}

/* ------------------------------------------------------------------------
 * All of them
 */

void run_stop(struct run *run)
{
	atomic_store(&run->stopping, true);
	if (eventfd_write(run->stop_fd, 1))
		complain("eventfd: %s", strerror(errno));
}

static bool wait_for_sessions(struct run *run)
{
	struct timespec end;
	bool done;

	clock_gettime(CLOCK_REALTIME, &end);
	end.tv_sec += STOP_TIMEOUT_S;
	pthread_mutex_lock(&run->lock);
	while (run->sessions)
		if (pthread_cond_timedwait(&run->changed, &run->lock, &end))
			break;
	done = !run->sessions;
	pthread_mutex_unlock(&run->lock);

	return done;
}

static void listen_for_vms(struct run *run, struct silent *silent, int signal_fd)
{
	struct kvmi_error err;

	while (!atomic_load(&run->stopping)) {
		struct pollfd poll_fds[3 + SILENT_FDS] = {
			{ .fd = signal_fd, .events = POLLIN },
			{ .fd = run->stop_fd, .events = POLLIN },
			{ .fd = output_fd(), .events = POLLIN },
		};
		nfds_t count = 3 + silent_fds(silent, poll_fds + 3);
		struct kvmi_vm *vm;

		if (poll(poll_fds, count, -1) < 0 && errno != EINTR)
			break;
		if (poll_fds[0].revents)
			break;
		if (poll_fds[2].revents) {
			atomic_store(&run->problem, true);
			break;
		}
		switch (silent_take(silent, poll_fds + 3, &vm, &err)) {
		case KVMI_OK:
			start_session(run, vm);
			break;
		case KVMI_ERR_NOTHING:
			break;
		default:
			/* out of descriptors or memory: that may pass */
			complain("%s", err.message);
			poll(NULL, 0, 200);
		}
	}
	run_stop(run);
}

int run_main(struct run *run)
{
	struct silent silent = { 0 };
	int signal_fd;
	struct line line;
	sigset_t signals;

	pthread_mutex_init(&run->lock, NULL);
	pthread_cond_init(&run->changed, NULL);

	/* Before any thread starts: they all have them blocked */
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGHUP);
	pthread_sigmask(SIG_BLOCK, &signals, NULL);
	signal_fd = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	run->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (signal_fd < 0 || run->stop_fd < 0 || output_start()) {
		complain("cannot start: %s", strerror(errno));
		return EXIT_PROBLEM;
	}
	silent.listener = start_listening(&run->one.where);
	if (!silent.listener)
		return EXIT_PROBLEM;
	if (run->one.json) {
		json_start(&line, now_us(), "listening");
		json_string(&line, "socket", run->one.where.socket);
		json_end(&line, false);
	} else {
		human(now_us(), false, "waiting for VMs on %s",
		      run->one.where.socket);
	}

	listen_for_vms(run, &silent, signal_fd);
	silent_free(&silent);
	if (!wait_for_sessions(run)) {
		complain("some VMs did not answer in time; KVM undoes what is left in them");
		/* threads are still using everything */
		output_end();
		_exit(EXIT_PROBLEM);
	}
	if (output_dropped())
		complain("%lu lines of output were dropped because they were not read in time",
			 output_dropped());
	if (!output_end())
		atomic_store(&run->problem, true);
	close(signal_fd);
	close(run->stop_fd);
	symbols_free(run->one.map);

	return atomic_load(&run->problem) ? EXIT_PROBLEM : EXIT_OK;
}
