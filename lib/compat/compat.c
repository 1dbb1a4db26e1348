/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Listening, connections, errors */

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "compat.h"

/* Connections that have not said yet what VM they are; more: the oldest goes */
#define WAITING_MAX 64
/* These, what ends the thread, and what the listener has */
#define FDS (WAITING_MAX + 2)
/* QEMU allows commands only after the handshake */
#define ALLOW_MS 1000
/*
 * For the first answer of KVM.  The thread does one after another, and some tools
 * wait for their VM for 10 s.
 */
#define CONNECT_MS 4000
/* A tool that calls nothing for that long is away */
#define AWAY_MS 200

_Static_assert(sizeof(struct kvmi_dom_event) == 8768, "layout");
_Static_assert(offsetof(struct kvmi_dom_event, buf) == 576, "layout");
_Static_assert(sizeof(struct kvmi_event) == 544, "layout");
_Static_assert(sizeof(struct kvmi_event_pf_reply) == 272, "layout");
_Static_assert(sizeof(struct kvmi_qemu2introspector) == 104, "layout");

struct waiting {
	struct kvmi_vm *vm;
	int64_t deadline;
};

struct listener {
	struct kvmi_listener *listener;
	kvmi_new_guest_cb accept_cb;
	kvmi_handshake_cb hsk_cb;
	void *cb_ctx;
	int stop_fd;
	pthread_t thread;

	struct waiting waiting[WAITING_MAX];
	size_t waiting_count;

	struct dom *doms;	/* with doms_lock */
	/* The thread's: those whose tool is away, and what it polls */
	struct dom **away;
	struct pollfd *fds;
	size_t capacity;	/* of away */

	pthread_mutex_t lock;
	struct kvmi_vm *connecting;	/* for kvmi_uninit() to cut short */
	bool stopping;
};

/*
 * State that belongs to no handle: the log function, as its setter wants it, and the
 * lists of VMs, since a VM may be closed when its listener is gone already.
 */
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;
static kvmi_log_cb log_cb;
static void *log_ctx;
static pthread_mutex_t doms_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t doms_changed = PTHREAD_COND_INITIALIZER;

/* What this thread says later, when nobody waits for it; the first of it */
static __thread struct {
	bool later;
	kvmi_log_level level;
	char text[512];
} held;

void complain(kvmi_log_level level, const char *format, ...)
{
	int saved = errno;
	kvmi_log_cb cb;
	char text[512];
	va_list args;
	void *ctx;

	pthread_mutex_lock(&log_lock);
	cb = log_cb;
	ctx = log_ctx;
	pthread_mutex_unlock(&log_lock);
	if (cb) {
		va_start(args, format);
		vsnprintf(text, sizeof(text), format, args);
		va_end(args);
		if (!held.later) {
			cb(level, text, ctx);
		} else if (!held.text[0]) {
			held.level = level;
			memcpy(held.text, text, sizeof(text));
		}
	}
	errno = saved;
}

void kvmi_set_log_cb(kvmi_log_cb cb, void *ctx)
{
	pthread_mutex_lock(&log_lock);
	log_cb = cb;
	log_ctx = ctx;
	pthread_mutex_unlock(&log_lock);
}

int fails(int number)
{
	errno = number;

	return -1;
}

static int errno_of(enum kvmi_status status, const struct kvmi_error *err)
{
	switch (status) {
	case KVMI_ERR_ARGUMENT: return EINVAL;
	case KVMI_ERR_SYSTEM: return err->sys_errno ? err->sys_errno : ENOMEM;
	case KVMI_ERR_TIMEOUT: return ETIMEDOUT;
	case KVMI_ERR_CLOSED: return ENOTCONN;
	case KVMI_ERR_LIMIT: return EBUSY;
	case KVMI_ERR_ANSWERED: return ENOENT;
	case KVMI_ERR_NOT_ALLOWED: return EPERM;
	case KVMI_ERR_NOT_FOUND: return ENOENT;
	case KVMI_ERR_NOT_STARTED: return EAGAIN;
	case KVMI_ERR_NO_MEMORY: return ENOMEM;
	case KVMI_ERR_BUSY: return EBUSY;
	case KVMI_ERR_INVALID: return EINVAL;
	case KVMI_ERR_NOT_SUPPORTED: return EOPNOTSUPP;
	case KVMI_ERR_UNKNOWN: return ENOSYS;
	case KVMI_ERR_TOO_MUCH: return E2BIG;
	default: return err->kvm_error == EFAULT ? EFAULT : EPROTO;
	}
}

int result(struct dom *dom, enum kvmi_status status,
	   const struct kvmi_error *err)
{
	if (status == KVMI_OK)
		return 0;

	if (status == KVMI_ERR_CLOSED || status == KVMI_ERR_PROTOCOL ||
	    status == KVMI_ERR_SYSTEM || status == KVMI_ERR_TIMEOUT)
		atomic_store(&dom->disconnected, true);
	/* holes in the memory are found by trying; the end has been told of */
	if (status != KVMI_ERR_NOT_FOUND && !atomic_load(&dom->leaving))
		complain(KVMI_LOG_LEVEL_WARNING, "%s", err->message);

	return fails(errno_of(status, err));
}

/* ------------------------------------------------------------------------
 * A tool may be busy with something else while the VM is to be paused.  Then the
 * thread of the listener does what the tool's next call would do.
 */

static bool make_room(struct listener *l, size_t doms)
{
	struct pollfd *fds;
	struct dom **away;

	if (doms <= l->capacity)
		return true;
	doms += doms / 2 + 16;
	fds = realloc(l->fds, (doms + FDS) * sizeof(*fds));
	if (fds)
		l->fds = fds;
	away = fds ? realloc(l->away, doms * sizeof(*away)) : NULL;
	if (!away)
		return false;
	l->away = away;
	l->capacity = doms;

	return true;
}

static void begin_looking(struct listener *l, struct dom *dom)
{
	pthread_mutex_lock(&doms_lock);
	dom->listener = l;
	dom->next = l->doms;
	l->doms = dom;
	pthread_mutex_unlock(&doms_lock);
}

static void end_looking(struct dom *dom)
{
	struct dom **at;

	/* in a child there is no such thread, and who has the lock is unknown */
	if (dom->pid != getpid())
		return;
	pthread_mutex_lock(&doms_lock);
	if (dom->listener) {
		for (at = &dom->listener->doms; *at != dom; at = &(*at)->next)
			;
		*at = dom->next;
		dom->listener = NULL;
	}
	while (dom->looked_after)
		pthread_cond_wait(&doms_changed, &doms_lock);
	pthread_mutex_unlock(&doms_lock);
}

static bool is_away(struct dom *dom)
{
	return now_ms() - atomic_load(&dom->seen) >= AWAY_MS &&
	       !atomic_load(&dom->wants_unhook);
}

/*
 * Adds those to l->fds[*count] whose tool is away, and tells whether there are
 * others: nobody says when their tools stop calling.
 */
static bool poll_doms(struct listener *l, size_t *count)
{
	size_t doms = 0, away = 0;
	bool others = false;
	struct dom *dom;

	pthread_mutex_lock(&doms_lock);
	for (dom = l->doms; dom; dom = dom->next)
		doms++;
	if (!make_room(l, doms))
		others = true;
	for (dom = l->doms; dom; dom = dom->next) {
		if (dom->ended)
			continue;
		if (away == l->capacity || !is_away(dom)) {
			others = true;
			continue;
		}
		l->away[away++] = dom;
		l->fds[(*count)++] = (struct pollfd){
			.fd = kvmi_vm_fd(dom->vm), .events = POLLIN,
		};
	}
	pthread_mutex_unlock(&doms_lock);

	return others;
}

static void look_after_dom(struct listener *l, struct dom *candidate)
{
	struct dom *dom;
	bool goes_on;

	pthread_mutex_lock(&doms_lock);
	for (dom = l->doms; dom && dom != candidate; dom = dom->next)
		;
	/* closed, or called meanwhile */
	if (!dom || !is_away(dom)) {
		pthread_mutex_unlock(&doms_lock);
		return;
	}
	dom->looked_after = true;
	pthread_mutex_unlock(&doms_lock);

	/*
	 * kvmi_domain_close() may wait for this, with a lock of the tool's that its
	 * log function wants as well.
	 */
	held.later = true;
	goes_on = dom_look_after(dom);
	held.later = false;

	pthread_mutex_lock(&doms_lock);
	dom->ended = !goes_on;
	/* what the tool has to take makes it readable until then: not all the time */
	atomic_store(&dom->seen, now_ms());
	dom->looked_after = false;
	pthread_cond_broadcast(&doms_changed);
	pthread_mutex_unlock(&doms_lock);
	if (held.text[0])
		complain(held.level, "%s", held.text);
	held.text[0] = 0;
}

/* ------------------------------------------------------------------------
 * The thread of a listener
 */

static bool handshake(struct listener *l, struct kvmi_vm *vm)
{
	const struct kvmi_vm_hello *hello = kvmi_vm_get_hello(vm);
	struct kvmi_introspector2qemu answer = {
		.struct_size = sizeof(answer),
	};
	struct kvmi_qemu2introspector question = {
		.struct_size = sizeof(question),
		.start_time = hello->start_time,
		.max_gpa = hello->max_gpa,
	};

	if (!l->hsk_cb)
		return true;
	if (!hello->max_gpa)
		question.struct_size -= sizeof(question.max_gpa);
	memcpy(question.uuid, hello->uuid, sizeof(question.uuid));
	memcpy(question.name, hello->name, sizeof(question.name));
	if (l->hsk_cb(&question, &answer, l->cb_ctx) < 0)
		return false;

	return kvmi_vm_set_key_hash(vm, answer.cookie_hash, NULL) == KVMI_OK;
}

/* A tool works without it, but not well */
static bool is_refused(enum kvmi_status status)
{
	return status == KVMI_ERR_NOT_ALLOWED || status == KVMI_ERR_UNKNOWN;
}

/* false: *dom is to be freed, if it has been made */
static bool connect_vm(struct kvmi_vm *vm, struct dom **dom)
{
	enum kvmi_status status;
	struct kvmi_error err;

	kvmi_vm_set_timeout(vm, CONNECT_MS, NULL);
	status = kvmi_vm_connect(vm, 0, 0, &err);
	if (status != KVMI_OK) {
		complain(KVMI_LOG_LEVEL_ERROR, "%s", err.message);
		return false;
	}

	/* The tool's first commands should not fail for want of patience */
	kvmi_vm_set_timeout(vm, ALLOW_MS, NULL);
	status = kvmi_vm_connect(vm, KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS),
				 KVMI_SET(KVMI_EV_UNHOOK), &err);
	if (status == KVMI_OK || is_refused(status)) {
		*dom = dom_new(vm, &status, &err);
		if (!*dom)
			return false;
	}
	if (status != KVMI_OK)
		complain(KVMI_LOG_LEVEL_ERROR,
			 "nobody will tell when this VM is to be paused: %s",
			 err.message);
	kvmi_vm_set_timeout(vm, TIMEOUT_MS, NULL);

	return status == KVMI_OK || is_refused(status);
}

/* Takes over vm */
static void greet(struct listener *l, struct kvmi_vm *vm)
{
	struct dom *dom = NULL;
	unsigned char uuid[16];
	bool good;

	memcpy(uuid, kvmi_vm_get_hello(vm)->uuid, sizeof(uuid));
	good = handshake(l, vm);
	if (good) {
		pthread_mutex_lock(&l->lock);
		l->connecting = vm;
		good = !l->stopping;
		pthread_mutex_unlock(&l->lock);

		good = good && connect_vm(vm, &dom);

		pthread_mutex_lock(&l->lock);
		l->connecting = NULL;
		pthread_mutex_unlock(&l->lock);
	}
	if (!good) {
		if (dom)
			dom_free(dom);
		else
			kvmi_vm_close(vm);
		return;
	}
	/* before the tool knows of it, and may close it */
	begin_looking(l, dom);
	if (l->accept_cb(dom, &uuid, l->cb_ctx))
		kvmi_domain_close(dom, true);
}

static void forget_waiting(struct listener *l, size_t i)
{
	memmove(&l->waiting[i], &l->waiting[i + 1],
		(--l->waiting_count - i) * sizeof(l->waiting[0]));
}

static void accept_one(struct listener *l)
{
	enum kvmi_status status;
	struct kvmi_error err;
	struct kvmi_vm *vm;

	status = kvmi_listener_accept(l->listener, &vm, &err);
	if (status != KVMI_OK) {
		if (status == KVMI_ERR_NOTHING)
			return;
		complain(KVMI_LOG_LEVEL_ERROR, "%s", err.message);
		/* out of file descriptors, for example: not as fast as can be */
		poll(NULL, 0, 100);
		return;
	}
	if (l->waiting_count == WAITING_MAX) {
		kvmi_vm_close(l->waiting[0].vm);
		forget_waiting(l, 0);
	}
	/* it is asked when there is something, never waited for */
	kvmi_vm_set_timeout(vm, 1, NULL);
	l->waiting[l->waiting_count++] = (struct waiting){
		vm, now_ms() + TIMEOUT_MS,
	};
}

/* Looks after one that has not said its name; false: it is gone from the list */
static bool look_after(struct listener *l, size_t i, bool readable)
{
	struct waiting waiting = l->waiting[i];
	enum kvmi_status status = KVMI_ERR_TIMEOUT;
	struct kvmi_error err;

	if (readable)
		status = kvmi_vm_wait_hello(waiting.vm, &err);
	if (status == KVMI_ERR_TIMEOUT && now_ms() < waiting.deadline)
		return true;

	forget_waiting(l, i);
	if (status == KVMI_OK) {
		greet(l, waiting.vm);
		return false;
	}
	if (status != KVMI_ERR_CLOSED && readable)
		complain(KVMI_LOG_LEVEL_ERROR, "%s", err.message);
	kvmi_vm_close(waiting.vm);

	return false;
}

static void *accept_thread(void *context)
{
	struct listener *l = context;
	struct pollfd *fds;

	for (;;) {
		size_t waiting = l->waiting_count, count = waiting + 2, i;
		bool others = poll_doms(l, &count);

		fds = l->fds;
		fds[0] = (struct pollfd){ .fd = l->stop_fd, .events = POLLIN };
		fds[1] = (struct pollfd){
			.fd = kvmi_listener_fd(l->listener), .events = POLLIN,
		};
		for (i = 0; i < waiting; i++)
			fds[i + 2] = (struct pollfd){
				.fd = kvmi_vm_fd(l->waiting[i].vm),
				.events = POLLIN,
			};
		if (poll(fds, count, others ? AWAY_MS : waiting ? 1000 : -1) < 0) {
			if (errno == EINTR)
				continue;
			complain(KVMI_LOG_LEVEL_ERROR, "poll: errno %d", errno);
			break;
		}
		if (fds[0].revents)
			break;
		for (i = waiting + 2; i < count; i++)
			if (fds[i].revents)
				look_after_dom(l, l->away[i - waiting - 2]);
		/* from the end: those that go don't move the others */
		for (i = waiting; i > 0; i--)
			look_after(l, i - 1, fds[i + 1].revents);
		if (fds[1].revents)
			accept_one(l);
	}
	while (l->waiting_count)
		kvmi_vm_close(l->waiting[--l->waiting_count].vm);

	return NULL;
}

/* ------------------------------------------------------------------------
 * For programs
 */

static void *listen_on(struct kvmi_listener *listener,
		       const struct kvmi_error *err, kvmi_new_guest_cb accept_cb,
		       kvmi_handshake_cb hsk_cb, void *cb_ctx)
{
	struct listener *l;
	int error;

	if (!listener) {
		complain(KVMI_LOG_LEVEL_ERROR, "%s", err->message);
		errno = errno_of(err->status, err);
		return NULL;
	}
	l = calloc(1, sizeof(*l));
	if (!l) {
		kvmi_listener_free(listener);
		return NULL;
	}
	l->listener = listener;
	l->accept_cb = accept_cb;
	l->hsk_cb = hsk_cb;
	l->cb_ctx = cb_ctx;
	pthread_mutex_init(&l->lock, NULL);
	l->stop_fd = eventfd(0, EFD_CLOEXEC);
	l->fds = malloc(FDS * sizeof(*l->fds));
	error = l->stop_fd < 0 ? errno : !l->fds ? ENOMEM :
		pthread_create(&l->thread, NULL, accept_thread, l);
	if (!error)
		return l;

	if (l->stop_fd >= 0)
		close(l->stop_fd);
	pthread_mutex_destroy(&l->lock);
	kvmi_listener_free(listener);
	free(l->fds);
	free(l);
	errno = error;

	return NULL;
}

void *kvmi_init_unix_socket(const char *socket, kvmi_new_guest_cb accept_cb,
			    kvmi_handshake_cb hsk_cb, void *cb_ctx)
{
	struct kvmi_error err;
	struct stat info;

	errno = 0;
	if (!socket || !*socket || !accept_cb)
		return NULL;
	/* in use or not, it is ours from now on: so it has always been */
	if (!lstat(socket, &info) && S_ISSOCK(info.st_mode))
		unlink(socket);

	return listen_on(kvmi_listener_new_unix(socket, 0777, &err), &err,
			 accept_cb, hsk_cb, cb_ctx);
}

void *kvmi_init_vsock(unsigned int port, kvmi_new_guest_cb accept_cb,
		      kvmi_handshake_cb hsk_cb, void *cb_ctx)
{
	struct kvmi_error err;

	errno = 0;
	if (!port || !accept_cb)
		return NULL;

	return listen_on(kvmi_listener_new_vsock(port, &err), &err, accept_cb,
			 hsk_cb, cb_ctx);
}

void kvmi_uninit(void *ctx)
{
	struct listener *l = ctx;
	struct dom *dom;

	if (!l)
		return;

	pthread_mutex_lock(&l->lock);
	l->stopping = true;
	kvmi_vm_shutdown(l->connecting);
	pthread_mutex_unlock(&l->lock);
	eventfd_write(l->stop_fd, 1);
	pthread_join(l->thread, NULL);
	pthread_mutex_lock(&doms_lock);
	for (dom = l->doms; dom; dom = dom->next)
		dom->listener = NULL;
	pthread_mutex_unlock(&doms_lock);

	kvmi_listener_free(l->listener);
	close(l->stop_fd);
	pthread_mutex_destroy(&l->lock);
	free(l->away);
	free(l->fds);
	free(l);
}

void kvmi_close(void *ctx)
{
	struct listener *l = ctx;

	if (l)
		close(kvmi_listener_fd(l->listener));
}

void kvmi_domain_close(void *context, bool do_shutdown)
{
	struct dom *dom = context;

	if (!dom)
		return;
	end_looking(dom);
	/* KVM does it by itself, unless it is an old one */
	if (do_shutdown && dom->planted_count &&
	    !kvmi_vm_get_version(dom->vm)->journal)
		dom_leave(dom);
	if (do_shutdown) {
		kvmi_vm_flush(dom->vm, NULL);
		kvmi_vm_shutdown(dom->vm);
	}
	dom_free(dom);
}

bool kvmi_domain_is_connected(const void *context)
{
	const struct dom *dom = context;

	return !atomic_load(&dom->disconnected);
}

void kvmi_domain_name(const void *context, char *dest, size_t dest_size)
{
	const struct dom *dom = context;

	snprintf(dest, dest_size, "%s", kvmi_vm_get_hello(dom->vm)->name);
}

int64_t kvmi_get_starttime(const void *context)
{
	const struct dom *dom = context;

	return kvmi_vm_get_hello(dom->vm)->start_time;
}

int kvmi_connection_fd(const void *context)
{
	const struct dom *dom = context;

	return kvmi_vm_fd(dom->vm);
}
