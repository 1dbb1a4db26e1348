/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A connection: bytes in, bytes out, answers to their commands, events to
 * the queue.
 *
 * Whoever waits for something (pump()) both sends and receives, so that neither
 * side can wait for the other to read.  Nothing blocks in the socket but a recv()
 * when there is nothing to be sent, with a time limit (wait_input()).
 *
 * Functions without a prefix are called with the lock held; those with vm_ and
 * kvmi_ take it.
 */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#define DEFAULT_TIMEOUT_MS 5000

/* How long to wait for room in the socket before looking around */
#define FOLLOW_MS 10
/* Shorter waits are left to poll(), which is more exact than recv() */
#define RECEIVE_MS 100

_Static_assert(sizeof(struct wire_hello) == 104, "handshake");
_Static_assert(sizeof(struct wire_hello_answer) == 24, "handshake");
_Static_assert(sizeof(struct wire_hmac_answer) == 96, "handshake");
_Static_assert(sizeof(struct wire_hmac_proof) == 40, "handshake");
_Static_assert(sizeof(struct kvmi_vcpu_event) == 544, "events");

int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);

	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static enum kvmi_status copy_broken(const struct kvmi_vm *vm,
				    struct kvmi_error *err)
{
	if (err)
		*err = vm->broken;

	return vm->broken.status;
}

static bool has_output(const struct kvmi_vm *vm)
{
	return vm->output_start < vm->output_end;
}

/*
 * Who sleeps in poll() on kvmi_vm_fd() is to wake up when another thread has
 * received what it sleeps for, or has left something to be sent.  The socket
 * tells nothing of that.
 */
static void tell_pollers(struct kvmi_vm *vm, bool wake)
{
	bool ready = vm->first_event || vm->ended_calls || vm->unhook_due ||
		     vm->earlier_timeout;
	bool has_more = has_output(vm);
	struct epoll_event socket = { .events = has_more ? EPOLLIN | EPOLLOUT :
							   EPOLLIN };
	eventfd_t count;

	/* neither can fail: both are of our own making, the counter is 0 or 1 */
	if (ready && !vm->is_ready && wake) {
		eventfd_write(vm->ready_fd, 1);
		vm->is_ready = true;
	} else if (!ready && vm->is_ready) {
		eventfd_read(vm->ready_fd, &count);
		vm->is_ready = false;
	}
	if (has_more != vm->wants_room)
		epoll_ctl(vm->poll_fd, EPOLL_CTL_MOD, vm->fd, &socket);
	vm->wants_room = has_more;
}

void vm_lock(const struct kvmi_vm *vm)
{
	pthread_mutex_lock((pthread_mutex_t *)&vm->lock);
}

void vm_unlock(const struct kvmi_vm *vm)
{
	if (vm->is_polled)
		tell_pollers((struct kvmi_vm *)vm, true);
	pthread_mutex_unlock((pthread_mutex_t *)&vm->lock);
}

/* No more bytes in either direction; the fd stays for poll() until the end */
static void disconnect(struct kvmi_vm *vm)
{
	shutdown(vm->fd, SHUT_RDWR);
	vm->state = VM_BROKEN;
	vm->input_start = vm->input_end = 0;
	vm->output_start = vm->output_end = 0;
	pthread_cond_broadcast(&vm->changed);
}

static enum kvmi_status break_with(struct kvmi_vm *vm, struct kvmi_error *err,
				   const char *format, va_list args)
{
	char text[160];

	if (vm->state != VM_BROKEN) {
		vsnprintf(text, sizeof(text), format, args);
		fail(&vm->broken, KVMI_ERR_PROTOCOL, "protocol error: %s",
		     text);
		disconnect(vm);
	}

	return copy_broken(vm, err);
}

static enum kvmi_status breach(struct kvmi_vm *vm, struct kvmi_error *err,
			       const char *format, ...)
	__attribute__((format(printf, 3, 4)));

static enum kvmi_status breach(struct kvmi_vm *vm, struct kvmi_error *err,
			       const char *format, ...)
{
	enum kvmi_status status;
	va_list args;

	va_start(args, format);
	status = break_with(vm, err, format, args);
	va_end(args);

	return status;
}

enum kvmi_status vm_break(struct kvmi_vm *vm, struct kvmi_error *err,
			  const char *format, ...)
{
	enum kvmi_status status;
	va_list args;

	vm_lock(vm);
	va_start(args, format);
	status = break_with(vm, err, format, args);
	va_end(args);
	vm_unlock(vm);

	return status;
}

enum kvmi_status vm_refuse(struct kvmi_vm *vm, enum kvmi_status status,
			   struct kvmi_error *err, const char *format, ...)
{
	char text[sizeof(vm->broken.message)];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	vm_lock(vm);
	if (vm->state != VM_BROKEN) {
		fail(&vm->broken, status, "%s", text);
		disconnect(vm);
	}
	status = copy_broken(vm, err);
	vm_unlock(vm);

	return status;
}

static enum kvmi_status broken_by_system(struct kvmi_vm *vm,
					 struct kvmi_error *err, int number,
					 const char *what)
{
	fail_errno(&vm->broken, number, "%s", what);
	disconnect(vm);

	return copy_broken(vm, err);
}

static enum kvmi_status closed_by_peer(struct kvmi_vm *vm,
				       struct kvmi_error *err)
{
	if (vm->state == VM_HELLO)
		fail(&vm->broken, KVMI_ERR_CLOSED,
		     "the other side closed the connection before the handshake");
	else if (vm->state == VM_GREETED)
		fail(&vm->broken, KVMI_ERR_CLOSED,
		     "QEMU closed the connection before its handshake was answered (the tool was too slow, or the VM is going)");
	else if (!vm->version.version)
		fail(&vm->broken, KVMI_ERR_CLOSED,
		     "QEMU closed the connection after the handshake: wrong key, or KVM could not be hooked (QEMU's own messages say which)");
	else
		fail(&vm->broken, KVMI_ERR_CLOSED,
		     "QEMU or KVM closed the connection");
	disconnect(vm);

	return copy_broken(vm, err);
}

struct kvmi_vm *vm_new(int fd, const uint8_t cookie_hash[SHA1_SIZE],
		       struct kvmi_error *err)
{
	struct kvmi_vm *vm = calloc(1, sizeof(*vm));
	pthread_condattr_t attributes;

	if (vm)
		vm->input = malloc(INPUT_SIZE);
	if (!vm || !vm->input) {
		free(vm);
		fail_errno(err, ENOMEM, "a connection");
		return NULL;
	}

	pthread_mutex_init(&vm->lock, NULL);
	pthread_condattr_init(&attributes);
	pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
	pthread_cond_init(&vm->changed, &attributes);
	pthread_condattr_destroy(&attributes);
	vm->pid = getpid();
	vm->fd = vm->poll_fd = fd;
	vm->ready_fd = -1;
	vm->timeout = DEFAULT_TIMEOUT_MS;
	vm->state = VM_HELLO;
	vm->last_event = &vm->first_event;
	vm->last_call = &vm->first_call;
	memcpy(vm->cookie_hash, cookie_hash, SHA1_SIZE);

	return vm;
}

struct kvmi_vm *kvmi_vm_new(int fd, const void *key, size_t key_size,
			    struct kvmi_error *err)
{
	uint8_t hash[SHA1_SIZE] = { 0 };
	int type = 0, flags;
	socklen_t size = sizeof(type);

	if (key_size && !key) {
		fail(err, KVMI_ERR_ARGUMENT, "no key");
		return NULL;
	}
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size)) {
		fail_errno(err, errno, "file descriptor %d", fd);
		return NULL;
	}
	if (type != SOCK_STREAM) {
		fail(err, KVMI_ERR_ARGUMENT, "not a stream socket");
		return NULL;
	}
	flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) ||
	    fcntl(fd, F_SETFD, FD_CLOEXEC)) {
		fail_errno(err, errno, "file descriptor %d", fd);
		return NULL;
	}
	if (key_size)
		sha1(key, key_size, hash);

	return vm_new(fd, hash, err);
}

/* ------------------------------------------------------------------------
 * Out
 */

/* Sends what the socket takes */
static enum kvmi_status send_some(struct kvmi_vm *vm, struct kvmi_error *err)
{
	while (vm->output_start < vm->output_end) {
		ssize_t sent = send(vm->fd, vm->output + vm->output_start,
				    vm->output_end - vm->output_start,
				    MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent > 0) {
			vm->output_start += sent;
			continue;
		}
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
			return KVMI_OK;
		if (sent < 0 && (errno == EPIPE || errno == ECONNRESET)) {
			/*
			 * There may be something left to be received; its end
			 * will tell that the connection is closed.
			 */
			break;
		}
		return broken_by_system(vm, err, errno, "sending");
	}
	vm->output_start = vm->output_end = 0;

	return KVMI_OK;
}

static enum kvmi_status append(struct kvmi_vm *vm, const void *data,
			       size_t size, struct kvmi_error *err)
{
	if (vm->output_capacity - vm->output_end < size && vm->output_start) {
		memmove(vm->output, vm->output + vm->output_start,
			vm->output_end - vm->output_start);
		vm->output_end -= vm->output_start;
		vm->output_start = 0;
	}
	if (vm->output_capacity - vm->output_end < size) {
		size_t capacity = 2 * (vm->output_end + size) + 4096;
		uint8_t *output = realloc(vm->output, capacity);

		if (!output)
			return broken_by_system(vm, err, ENOMEM, "sending");
		vm->output = output;
		vm->output_capacity = capacity;
	}
	if (size)
		memcpy(vm->output + vm->output_end, data, size);
	vm->output_end += size;

	return KVMI_OK;
}

/* Appends a message */
static enum kvmi_status send_message(struct kvmi_vm *vm, unsigned int id,
				     uint32_t seq, const struct iovec *parts,
				     int part_count, struct kvmi_error *err)
{
	struct kvmi_msg_hdr header = { .id = id, .seq = seq };
	enum kvmi_status status;
	size_t size = 0;
	int i;

	for (i = 0; i < part_count; i++)
		size += parts[i].iov_len;
	if (size > KVMI_MAX_MSG_SIZE)
		return fail(err, KVMI_ERR_ARGUMENT, "message too long");
	header.size = size;

	status = append(vm, &header, sizeof(header), err);
	for (i = 0; i < part_count && status == KVMI_OK; i++)
		status = append(vm, parts[i].iov_base, parts[i].iov_len, err);

	return status;
}

/* ------------------------------------------------------------------------
 * In
 */

static enum kvmi_status take_hello(struct kvmi_vm *vm, struct kvmi_error *err)
{
	struct wire_hello hello = { 0 };
	uint32_t size;

	size_t got = vm->input_end - vm->input_start;
	const uint8_t *input = vm->input + vm->input_start;

	if (got < sizeof(size))
		return KVMI_OK;
	memcpy(&size, input, sizeof(size));
	if (size < HELLO_MIN_SIZE || size > HELLO_MAX_SIZE)
		return breach(vm, err,
				"a handshake of %u bytes; is that QEMU's kvmi object?",
				size);
	if (got < size)
		return KVMI_OK;

	memcpy(&hello, input, size < sizeof(hello) ? size : sizeof(hello));
	memcpy(vm->hello_bytes, input, size < sizeof(vm->hello_bytes) ? size :
	       sizeof(vm->hello_bytes));
	vm->input_start += size;

	memcpy(vm->hello.uuid, hello.uuid, sizeof(vm->hello.uuid));
	vm->hello.start_time = hello.start_time;
	if (size >= sizeof(hello))
		vm->hello.max_gpa = hello.max_gpa;
	memcpy(vm->hello.name, hello.name, sizeof(vm->hello.name));
	vm->hello.name[sizeof(vm->hello.name) - 1] = 0;

	vm->state = VM_GREETED;

	return KVMI_OK;
}

/* QEMU's proof, if it comes: before all else that KVM says */
static enum kvmi_status take_proof(struct kvmi_vm *vm, struct kvmi_error *err)
{
	struct wire_hmac_proof proof;

	if (vm->input_end - vm->input_start < sizeof(proof))
		return KVMI_OK;
	memcpy(&proof, vm->input + vm->input_start, sizeof(proof));
	if (proof.struct_size != sizeof(proof) ||
	    !same_digest(proof.proof, vm->proof)) {
		fail(&vm->broken, KVMI_ERR_AUTH,
		     "the other side does not know the secret: it is not the QEMU it should be");
		disconnect(vm);
		return copy_broken(vm, err);
	}
	vm->input_start += sizeof(proof);
	vm->state = VM_RUNNING;

	return KVMI_OK;
}

static void queue_event(struct kvmi_vm *vm, struct queued_event *entry)
{
	entry->next = NULL;
	*vm->last_event = entry;
	vm->last_event = &entry->next;
}

static enum kvmi_status take_vm_event(struct kvmi_vm *vm,
				      const struct kvmi_msg_hdr *header,
				      const uint8_t *body,
				      struct kvmi_error *err)
{
	struct kvmi_event_hdr event;
	struct queued_event *entry;

	if (header->size < sizeof(event))
		return breach(vm, err, "an event of %u bytes", header->size);
	memcpy(&event, body, sizeof(event));

	/* Nobody waits for an answer: what is not known can be left out */
	if (event.event != KVMI_VM_EVENT_UNHOOK)
		return KVMI_OK;
	vm->unhook_came = true;
	if (vm->unhook)
		vm->unhook_due = !vm->unhook_told;
	if (vm->unhook || vm->unhook_queued)
		return KVMI_OK;

	entry = calloc(1, sizeof(*entry));
	if (!entry)
		return broken_by_system(vm, err, ENOMEM, "an event");
	entry->event.id = KVMI_EV_UNHOOK;
	entry->event.seq = header->seq;
	queue_event(vm, entry);
	vm->unhook_queued = true;

	return KVMI_OK;
}

static enum kvmi_status open_slot(struct kvmi_vm *vm, unsigned int vcpu,
				  struct kvmi_error *err)
{
	if (vcpu >= MAX_VCPUS)
		return breach(vm, err, "an event of vCPU %u", vcpu);

	if (vcpu >= vm->open_count) {
		size_t count = vcpu + 16;
		struct open_event *open = realloc(vm->open,
						  count * sizeof(*open));

		if (!open)
			return broken_by_system(vm, err, ENOMEM, "an event");
		memset(open + vm->open_count, 0,
		       (count - vm->open_count) * sizeof(*open));
		vm->open = open;
		vm->open_count = count;
	}

	return KVMI_OK;
}

/* What an event has at least; more may come with a later version of KVM */
static size_t event_data_size(unsigned int id)
{
	switch (id) {
	case KVMI_VCPU_EVENT_BREAKPOINT:
		return sizeof(struct kvmi_vcpu_event_breakpoint);
	case KVMI_VCPU_EVENT_CR:
		return sizeof(struct kvmi_vcpu_event_cr);
	case KVMI_VCPU_EVENT_MSR:
		return sizeof(struct kvmi_vcpu_event_msr);
	case KVMI_VCPU_EVENT_TRAP:
		return sizeof(struct kvmi_vcpu_event_trap);
	case KVMI_VCPU_EVENT_XSETBV:
		return sizeof(struct kvmi_vcpu_event_xsetbv);
	case KVMI_VCPU_EVENT_DESCRIPTOR:
		return sizeof(struct kvmi_vcpu_event_descriptor);
	case KVMI_VCPU_EVENT_PF:
		return sizeof(struct kvmi_vcpu_event_pf);
	case KVMI_VCPU_EVENT_SINGLESTEP:
		return sizeof(struct kvmi_vcpu_event_singlestep);
	default:
		return 0;
	}
}

static void take_event_data(struct kvmi_vm_event *event, const void *data,
			    size_t size)
{
	union {
		struct kvmi_vcpu_event_breakpoint breakpoint;
		struct kvmi_vcpu_event_cr cr;
		struct kvmi_vcpu_event_msr msr;
		struct kvmi_vcpu_event_trap trap;
		struct kvmi_vcpu_event_xsetbv xsetbv;
		struct kvmi_vcpu_event_descriptor descriptor;
		struct kvmi_vcpu_event_pf pf;
		struct kvmi_vcpu_event_singlestep singlestep;
		uint8_t bytes[sizeof(event->data)];
	} wire;

	memset(&wire, 0, sizeof(wire));
	if (size)
		memcpy(&wire, data, size);

	switch (event->id) {
	case KVMI_EV_BREAKPOINT:
		event->breakpoint.gpa = wire.breakpoint.gpa;
		event->breakpoint.insn_len = wire.breakpoint.insn_len;
		break;
	case KVMI_EV_CR:
		event->cr.cr = wire.cr.cr;
		event->cr.old_value = wire.cr.old_value;
		event->cr.new_value = wire.cr.new_value;
		break;
	case KVMI_EV_MSR:
		event->msr.msr = wire.msr.msr;
		event->msr.old_value = wire.msr.old_value;
		event->msr.new_value = wire.msr.new_value;
		break;
	case KVMI_EV_TRAP:
		event->trap.vector = wire.trap.nr;
		event->trap.error_code = wire.trap.error_code;
		event->trap.address = wire.trap.address;
		break;
	case KVMI_EV_XSETBV:
		event->xsetbv.xcr = wire.xsetbv.xcr;
		event->xsetbv.old_value = wire.xsetbv.old_value;
		event->xsetbv.new_value = wire.xsetbv.new_value;
		break;
	case KVMI_EV_DESCRIPTOR:
		event->descriptor.descriptor = wire.descriptor.descriptor;
		event->descriptor.write = wire.descriptor.write;
		break;
	case KVMI_EV_PF:
		event->pf.gva = wire.pf.gva;
		event->pf.gpa = wire.pf.gpa;
		event->pf.access = wire.pf.access;
		event->pf.not_emulated = wire.pf.flags & KVMI_PF_NOT_EMULATED;
		break;
	case KVMI_EV_SINGLESTEP:
		event->singlestep.failed = wire.singlestep.failed;
		break;
	default:
		memcpy(event->data, wire.bytes, sizeof(event->data));
	}
}

static enum kvmi_status take_vcpu_event(struct kvmi_vm *vm,
					const struct kvmi_msg_hdr *header,
					const uint8_t *body,
					struct kvmi_error *err)
{
	struct kvmi_vcpu_event common;
	struct kvmi_event_hdr event;
	struct queued_event *entry;
	enum kvmi_status status;
	const uint8_t *data;
	size_t size;

	if (header->size == sizeof(struct kvmi_error_code))
		return breach(vm, err,
				"KVM did not take the answer to an event");
	if (header->size < sizeof(event) + sizeof(common))
		return breach(vm, err, "an event of %u bytes", header->size);
	memcpy(&event, body, sizeof(event));
	memcpy(&common, body + sizeof(event), sizeof(common));
	if (common.size < sizeof(common) ||
	    sizeof(event) + common.size > header->size)
		return breach(vm, err, "an event with a head of %u bytes",
				common.size);
	data = body + sizeof(event) + common.size;
	size = header->size - sizeof(event) - common.size;
	if (size > sizeof(entry->event.data) ||
	    size < event_data_size(event.event))
		return breach(vm, err, "event %u with %zu bytes of data",
				event.event, size);

	status = open_slot(vm, common.vcpu, err);
	if (status != KVMI_OK)
		return status;
	if (vm->open[common.vcpu].open)
		return breach(vm, err, "two open events of vCPU %u",
				common.vcpu);

	entry = calloc(1, sizeof(*entry));
	if (!entry)
		return broken_by_system(vm, err, ENOMEM, "an event");
	entry->event.id = event.event;
	entry->event.seq = header->seq;
	entry->event.vcpu = common.vcpu;
	entry->event.data_size = size;
	entry->event.state.mode = common.arch.mode;
	entry->event.state.regs = common.arch.regs;
	entry->event.state.sregs = common.arch.sregs;
	entry->event.msrs = (struct kvmi_event_msrs){
		.sysenter_cs = common.arch.msrs.sysenter_cs,
		.sysenter_esp = common.arch.msrs.sysenter_esp,
		.sysenter_eip = common.arch.msrs.sysenter_eip,
		.efer = common.arch.msrs.efer,
		.star = common.arch.msrs.star,
		.lstar = common.arch.msrs.lstar,
		.cstar = common.arch.msrs.cstar,
		.pat = common.arch.msrs.pat,
		.shadow_gs = common.arch.msrs.shadow_gs,
	};
	take_event_data(&entry->event, data, size);

	vm->open[common.vcpu] = (struct open_event){
		.open = true, .id = event.event, .seq = header->seq,
	};
	if (event.event == KVMI_VCPU_EVENT_CR)
		vm->open[common.vcpu].value = entry->event.cr.new_value;
	else if (event.event == KVMI_VCPU_EVENT_MSR)
		vm->open[common.vcpu].value = entry->event.msr.new_value;
	queue_event(vm, entry);

	return KVMI_OK;
}

static enum kvmi_status take_answer(struct kvmi_vm *vm,
				    const struct kvmi_msg_hdr *header,
				    const uint8_t *body, struct kvmi_error *err)
{
	struct kvmi_error_code code;
	struct pending *pending;
	const char *name = kvmi_command_name(header->id);
	size_t size;

	if (!name)
		name = "command";
	pending = &vm->pending[header->seq % MAX_PENDING];
	if ((pending->state != PENDING_WAITING &&
	     pending->state != PENDING_ABANDONED) ||
	    pending->seq != header->seq || pending->id != header->id)
		return breach(vm, err,
				"an answer to nothing (message %u, number %u)",
				header->id, header->seq);
	if (header->size < sizeof(code))
		return breach(vm, err, "%s: an answer of %u bytes", name,
				header->size);
	memcpy(&code, body, sizeof(code));
	if (code.err > 0 || code.err == INT32_MIN)
		return breach(vm, err, "%s: error %d", name, code.err);

	if (pending->state == PENDING_ABANDONED) {
		pending->state = PENDING_FREE;
		return KVMI_OK;
	}

	size = header->size - sizeof(code);
	pending->error = -code.err;
	pending->size = code.err ? 0 : size;
	if (size > pending->capacity)
		size = pending->capacity;
	if (!code.err && size)
		memcpy(pending->data, body + sizeof(code), size);
	pending->state = PENDING_DONE;
	if (pending->is_dispatched)
		vm->ended_calls++;

	return KVMI_OK;
}

static enum kvmi_status take_messages(struct kvmi_vm *vm,
				      struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;

	if (vm->state == VM_HELLO)
		status = take_hello(vm, err);
	if (status == KVMI_OK && vm->state == VM_PROVING)
		status = take_proof(vm, err);

	while (status == KVMI_OK && vm->state == VM_RUNNING) {
		const uint8_t *input = vm->input + vm->input_start;
		size_t got = vm->input_end - vm->input_start;
		struct kvmi_msg_hdr header;

		if (got < sizeof(header))
			break;
		memcpy(&header, input, sizeof(header));
		if (header.size > KVMI_MAX_MSG_SIZE)
			return breach(vm, err, "a message of %u bytes",
					header.size);
		if (got < sizeof(header) + header.size)
			break;

		input += sizeof(header);
		if (header.id == KVMI_VM_EVENT)
			status = take_vm_event(vm, &header, input, err);
		else if (header.id == KVMI_VCPU_EVENT)
			status = take_vcpu_event(vm, &header, input, err);
		else
			status = take_answer(vm, &header, input, err);
		if (status == KVMI_OK)
			vm->input_start += sizeof(header) + header.size;
	}

	return status;
}

/*
 * recv() that waits, without the lock: one system call where poll() makes two.
 * The time is set anew only if that in force is too long, or much too short.
 */
static ssize_t wait_input(struct kvmi_vm *vm, int64_t ms)
{
	size_t place = INPUT_SIZE - vm->input_end;
	uint8_t *input = vm->input + vm->input_end;
	ssize_t got;
	int error;

	if (ms > INT32_MAX)
		ms = INT32_MAX;
	if (vm->receive_ms > ms || vm->receive_ms < ms / 2) {
		struct timeval time = { ms / 1000, ms % 1000 * 1000 };

		if (setsockopt(vm->fd, SOL_SOCKET, SO_RCVTIMEO, &time,
			       sizeof(time)))
			return -1;
		vm->receive_ms = ms;
	}
	vm->polling = true;
	vm_unlock(vm);
	got = recv(vm->fd, input, place, 0);
	error = errno;
	vm_lock(vm);
	vm->polling = false;
	/* somebody else has to poll if we don't any more */
	pthread_cond_broadcast(&vm->changed);
	errno = error;

	return got;
}

/* KVMI_ERR_NOTHING if nothing could be received in that time (0: at once) */
static enum kvmi_status receive_some(struct kvmi_vm *vm, int64_t ms,
				     struct kvmi_error *err)
{
	ssize_t got;

	/* Move what is left to the front: a whole message always fits */
	if (vm->input_start) {
		memmove(vm->input, vm->input + vm->input_start,
			vm->input_end - vm->input_start);
		vm->input_end -= vm->input_start;
		vm->input_start = 0;
	}

	/* recv() of nothing would look like the end */
	if (vm->input_end == INPUT_SIZE)
		return breach(vm, err,
			      "%d bytes after a handshake that has not been answered",
			      INPUT_SIZE);

	if (ms) {
		got = wait_input(vm, ms);
		/* another thread has found out, or ended it */
		if (vm->state == VM_BROKEN)
			return copy_broken(vm, err);
		if (got < 0 && errno == EINTR)
			return KVMI_ERR_NOTHING;
	} else {
		do {
			got = recv(vm->fd, vm->input + vm->input_end,
				   INPUT_SIZE - vm->input_end, MSG_DONTWAIT);
		} while (got < 0 && errno == EINTR);
	}

	vm->drained = got < (ssize_t)(INPUT_SIZE - vm->input_end);
	if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
		return KVMI_ERR_NOTHING;
	if (got == 0 || (got < 0 && errno == ECONNRESET))
		return closed_by_peer(vm, err);
	if (got < 0)
		return broken_by_system(vm, err, errno, "receiving");

	vm->input_end += got;
	pthread_cond_broadcast(&vm->changed);

	return take_messages(vm, err);
}

/* ------------------------------------------------------------------------
 * Waiting
 */

static enum kvmi_status flush(struct kvmi_vm *vm, struct kvmi_error *err)
{
	if (vm->state == VM_BROKEN)
		return copy_broken(vm, err);

	return send_some(vm, err);
}

/* Without the lock; a failure of poll() will be seen by send() and recv() */
static void poll_socket(struct kvmi_vm *vm, short events, int64_t ms)
{
	struct pollfd poll_fd = { .fd = vm->fd, .events = events };

	vm_unlock(vm);
	poll(&poll_fd, 1, ms > INT32_MAX ? INT32_MAX : ms);
	vm_lock(vm);
}

/* Another thread polls: wait for it */
static void follow(struct kvmi_vm *vm, int64_t deadline)
{
	struct timespec until = { deadline / 1000, deadline % 1000 * 1000000 };

	/* it may not know that there is something to be sent */
	if (has_output(vm))
		poll_socket(vm, POLLOUT, FOLLOW_MS);
	else
		pthread_cond_timedwait(&vm->changed, &vm->lock, &until);
}

static enum kvmi_status push(struct kvmi_vm *vm, struct kvmi_error *err)
{
	enum kvmi_status status = flush(vm, err);
	int64_t deadline;

	if (status != KVMI_OK || !vm->polling || !has_output(vm))
		return status;

	/* the thread that polls does not know of what is left */
	deadline = now_ms() + vm->timeout;
	while (status == KVMI_OK && vm->polling && has_output(vm) &&
	       now_ms() < deadline) {
		poll_socket(vm, POLLOUT, FOLLOW_MS);
		status = flush(vm, err);
	}

	return status;
}

enum kvmi_status vm_push(struct kvmi_vm *vm, struct kvmi_error *err)
{
	enum kvmi_status status;

	vm_lock(vm);
	status = push(vm, err);
	vm_unlock(vm);

	return status;
}

/*
 * One round of sending and receiving, waiting at most until the deadline.
 * What the caller waits for may be there afterwards, or not.
 */
static enum kvmi_status pump(struct kvmi_vm *vm, int64_t deadline,
			     struct kvmi_error *err)
{
	enum kvmi_status status;
	int64_t left;

	for (;;) {
		status = flush(vm, err);
		if (status != KVMI_OK)
			return status;
		left = deadline - now_ms();

		if (vm->polling) {
			if (left <= 0)
				break;
			follow(vm, deadline);
			return flush(vm, err);
		}
		if (vm->drained && left >= RECEIVE_MS && !has_output(vm)) {
			status = receive_some(vm, left, err);
			if (status != KVMI_ERR_NOTHING)
				return status;
			/* a signal, or the time was shorter: poll() for the rest */
			left = deadline - now_ms();
			if (vm->polling)
				continue;
		}
		if (vm->drained && left > 0) {
			vm->drained = false;
			vm->polling = true;
			poll_socket(vm, has_output(vm) ? POLLIN | POLLOUT :
							 POLLIN, left);
			vm->polling = false;
			/* somebody else has to poll if we don't any more */
			pthread_cond_broadcast(&vm->changed);
			status = flush(vm, err);
			if (status != KVMI_OK)
				return status;
		}
		status = receive_some(vm, 0, err);
		if (status != KVMI_ERR_NOTHING)
			return status;
		if (left <= 0)
			break;
	}

	return fail(err, KVMI_ERR_TIMEOUT, "no answer in time");
}

enum kvmi_status kvmi_vm_wait_hello(struct kvmi_vm *vm, struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;
	int64_t deadline;

	if (!vm)
		return fail(err, KVMI_ERR_ARGUMENT, "no vm");

	vm_lock(vm);
	deadline = now_ms() + vm->timeout;
	if (vm->state == VM_BROKEN)
		status = copy_broken(vm, err);
	while (status == KVMI_OK && vm->state == VM_HELLO)
		status = pump(vm, deadline, err);
	if (status == KVMI_ERR_TIMEOUT)
		fail(err, status,
		     "the other side did not send its handshake within %d ms",
		     vm->timeout);
	vm_unlock(vm);

	return status;
}

enum kvmi_status kvmi_vm_set_key_hash(struct kvmi_vm *vm,
				      const uint8_t hash[KVMI_KEY_HASH_SIZE],
				      struct kvmi_error *err)
{
	if (!vm || !hash)
		return fail(err, KVMI_ERR_ARGUMENT, "no vm or no hash");

	vm_lock(vm);
	memcpy(vm->cookie_hash, hash, SHA1_SIZE);
	vm_unlock(vm);

	return KVMI_OK;
}

enum kvmi_status kvmi_vm_set_secret(struct kvmi_vm *vm, const void *secret,
				    size_t size, struct kvmi_error *err)
{
	if (!vm || !secret || !size || size > KVMI_SECRET_MAX)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no vm, or a secret of %zu bytes: 1 to %d", size,
			    KVMI_SECRET_MAX);

	vm_lock(vm);
	memcpy(vm->secret, secret, size);
	vm->secret_size = size;
	vm->mutual = true;
	vm_unlock(vm);

	return KVMI_OK;
}

static bool asks_for_proof(const struct kvmi_vm *vm)
{
	uint32_t size, auth;

	memcpy(&size, vm->hello_bytes, sizeof(size));
	memcpy(&auth, vm->hello_bytes + sizeof(struct wire_hello), sizeof(auth));

	return size >= HELLO_HMAC_SIZE && auth == AUTH_HMAC;
}

/* Our answer with auth=hmac, and what QEMU's has to be */
static enum kvmi_status prove(struct kvmi_vm *vm, struct kvmi_error *err)
{
	static const char tool[16] = "kvmi-hmac-tool", qemu[16] = "kvmi-hmac-qemu";
	struct wire_hmac_answer answer = { .struct_size = sizeof(answer),
					   .auth = AUTH_HMAC };
	struct iovec parts[] = {
		{ (void *)tool, sizeof(tool) },
		{ vm->hello_bytes, sizeof(vm->hello_bytes) },
		{ &answer, offsetof(struct wire_hmac_answer, proof) },
	};
	enum kvmi_status status;

	if (!asks_for_proof(vm)) {
		fail(&vm->broken, KVMI_ERR_AUTH,
		     "the other side does not prove who it is: QEMU's kvmi object needs auth=hmac");
		disconnect(vm);
		return copy_broken(vm, err);
	}
	if (getrandom(answer.nonce, sizeof(answer.nonce), 0) !=
	    sizeof(answer.nonce))
		return broken_by_system(vm, err, errno, "random bytes");
	hmac_sha256(vm->secret, vm->secret_size, parts, 3, answer.proof);
	parts[0].iov_base = (void *)qemu;
	parts[2].iov_len = sizeof(answer);
	hmac_sha256(vm->secret, vm->secret_size, parts, 3, vm->proof);
	explicit_bzero(vm->secret, sizeof(vm->secret));

	status = append(vm, &answer, sizeof(answer), err);
	if (status == KVMI_OK)
		vm->state = VM_PROVING;

	return status;
}

enum kvmi_status vm_answer_hello(struct kvmi_vm *vm, struct kvmi_error *err)
{
	struct wire_hello_answer answer = { .struct_size = sizeof(answer) };
	enum kvmi_status status = kvmi_vm_wait_hello(vm, err);
	int64_t deadline;

	if (status != KVMI_OK)
		return status;

	vm_lock(vm);
	if (vm->state == VM_GREETED && vm->mutual) {
		status = prove(vm, err);
	} else if (vm->state == VM_GREETED && asks_for_proof(vm)) {
		/* it would hang up without a word */
		fail(&vm->broken, KVMI_ERR_AUTH,
		     "QEMU asks for auth=hmac: kvmi_vm_set_secret() or kvmi_listener_set_secret(), or --mutual with --key-file");
		disconnect(vm);
		status = copy_broken(vm, err);
	} else if (vm->state == VM_GREETED) {
		memcpy(answer.cookie_hash, vm->cookie_hash, SHA1_SIZE);
		status = append(vm, &answer, sizeof(answer), err);
		if (status == KVMI_OK)
			vm->state = VM_RUNNING;
	}
	deadline = now_ms() + vm->timeout;
	while (status == KVMI_OK && vm->state == VM_PROVING)
		status = pump(vm, deadline, err);
	if (status == KVMI_ERR_TIMEOUT)
		fail(err, status, "QEMU did not prove that it knows the secret within %d ms",
		     vm->timeout);
	vm_unlock(vm);

	return status;
}

/* The next number whose place is not taken; false: there is none */
static bool free_number(const struct kvmi_vm *vm, uint32_t *seq)
{
	unsigned int tries;

	for (tries = 1; tries <= MAX_PENDING; tries++) {
		*seq = vm->seq + tries;
		if (vm->pending[*seq % MAX_PENDING].state == PENDING_FREE)
			return true;
	}

	return false;
}

/*
 * Until a command can be started, or the time is up.  Others may have all
 * places, and free them when they take their answers: that tells nobody.
 */
static enum kvmi_status wait_for_place(struct kvmi_vm *vm,
				       struct kvmi_error *err)
{
	int64_t deadline = now_ms() + vm->timeout, now;
	enum kvmi_status status;
	struct kvmi_error local;
	uint32_t seq;

	while (vm->state == VM_RUNNING && !free_number(vm, &seq)) {
		now = now_ms();
		if (now >= deadline)
			break;
		status = pump(vm, now + FOLLOW_MS < deadline ? now + FOLLOW_MS :
							       deadline, &local);
		if (status != KVMI_OK && status != KVMI_ERR_TIMEOUT) {
			if (err)
				*err = local;
			return status;
		}
	}

	return KVMI_OK;
}

static enum kvmi_status start(struct kvmi_vm *vm, unsigned int id,
			      const struct iovec *parts, int part_count,
			      void *data, size_t capacity,
			      struct pending **pending, struct kvmi_error *err)
{
	enum kvmi_status status;
	struct pending *slot;
	uint32_t seq;

	if (vm->state == VM_BROKEN)
		return copy_broken(vm, err);
	if (vm->state != VM_RUNNING)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no commands before kvmi_vm_connect()");
	if (!free_number(vm, &seq))
		return fail(err, KVMI_ERR_LIMIT,
			    "%d commands have not been answered; is the VM paused?",
			    MAX_PENDING);
	vm->seq = seq;
	slot = &vm->pending[seq % MAX_PENDING];

	status = send_message(vm, id, vm->seq, parts, part_count, err);
	if (status != KVMI_OK)
		return status;

	*slot = (struct pending){
		.state = PENDING_WAITING, .id = id, .seq = vm->seq,
		.data = data, .capacity = capacity,
	};
	*pending = slot;

	return KVMI_OK;
}

enum kvmi_status vm_start(struct kvmi_vm *vm, unsigned int id,
			  const struct iovec *parts, int part_count,
			  void *data, size_t capacity, struct pending **pending,
			  struct kvmi_error *err)
{
	enum kvmi_status status;

	vm_lock(vm);
	status = start(vm, id, parts, part_count, data, capacity, pending, err);
	vm_unlock(vm);

	return status;
}

enum kvmi_status vm_start_waiting(struct kvmi_vm *vm, unsigned int id,
				  const struct iovec *parts, int part_count,
				  void *data, size_t capacity,
				  struct pending **pending,
				  struct kvmi_error *err)
{
	enum kvmi_status status;

	vm_lock(vm);
	status = wait_for_place(vm, err);
	if (status == KVMI_OK)
		status = start(vm, id, parts, part_count, data, capacity,
			       pending, err);
	vm_unlock(vm);

	return status;
}

static void abandon(struct pending *pending)
{
	/* The caller's buffer must not be written to any more */
	pending->data = NULL;
	pending->capacity = 0;
	pending->state = pending->state == PENDING_WAITING ?
			 PENDING_ABANDONED : PENDING_FREE;
}

void vm_abandon(struct kvmi_vm *vm, struct pending *pending)
{
	vm_lock(vm);
	abandon(pending);
	vm_unlock(vm);
}

static enum kvmi_status too_late(int ms, unsigned int id,
				 struct kvmi_error *err)
{
	const char *name = kvmi_command_name(id);

	return fail(err, KVMI_ERR_TIMEOUT,
		    id & 1 ? "%s: no answer within %d ms; is the VM paused?" :
			     "%s: no answer within %d ms",
		    name ? name : "command", ms);
}

/* What the answer says */
static enum kvmi_status take_result(struct pending *pending, size_t *size,
				    struct kvmi_error *err)
{
	unsigned int id = pending->id;
	int kvm_error = pending->error;

	if (size)
		*size = pending->size;
	abandon(pending);

	return kvm_error ? fail_kvm(err, id, kvm_error) : KVMI_OK;
}

static enum kvmi_status wait_for(struct kvmi_vm *vm, struct pending *pending,
				 int ms, size_t *size, struct kvmi_error *err)
{
	int64_t deadline = now_ms() + ms;
	unsigned int id = pending->id;

	while (pending->state == PENDING_WAITING) {
		enum kvmi_status status = pump(vm, deadline, err);

		/* what came along with the bad news may be the answer */
		if (status != KVMI_OK && pending->state == PENDING_WAITING) {
			abandon(pending);
			return status == KVMI_ERR_TIMEOUT ?
			       too_late(ms, id, err) : status;
		}
	}

	return take_result(pending, size, err);
}

bool vm_has_ended(struct kvmi_vm *vm, struct pending *pending, int64_t deadline,
		  size_t *size, struct kvmi_error *err)
{
	*err = (struct kvmi_error){ .status = KVMI_OK };
	if (pending->state == PENDING_DONE) {
		take_result(pending, size, err);
		return true;
	}
	if (vm->state == VM_BROKEN)
		copy_broken(vm, err);
	else if (now_ms() >= deadline)
		too_late(vm->timeout, pending->id, err);
	else
		return false;
	abandon(pending);

	return true;
}

enum kvmi_status vm_wait_until(struct kvmi_vm *vm, struct pending *pending,
			       int64_t deadline, size_t *size,
			       struct kvmi_error *err)
{
	int64_t left = deadline - now_ms();
	enum kvmi_status status;

	vm_lock(vm);
	status = wait_for(vm, pending, left < 0 ? 0 : left < vm->timeout ?
			  left : vm->timeout, size, err);
	vm_unlock(vm);

	return status;
}

enum kvmi_status vm_wait(struct kvmi_vm *vm, struct pending *pending,
			 size_t *size, struct kvmi_error *err)
{
	return vm_wait_until(vm, pending, INT64_MAX, size, err);
}

enum kvmi_status vm_command(struct kvmi_vm *vm, unsigned int id,
			    const struct iovec *parts, int part_count,
			    void *data, size_t capacity, size_t least,
			    struct kvmi_error *err)
{
	struct pending *pending;
	enum kvmi_status status;
	size_t size;

	status = vm_start_waiting(vm, id, parts, part_count, data, capacity,
				  &pending, err);
	if (status == KVMI_OK)
		status = vm_wait(vm, pending, &size, err);
	if (status == KVMI_OK && size < least)
		return vm_break(vm, err,
				"%s: an answer of %zu instead of %zu bytes",
				kvmi_command_name(id), size, least);

	return status;
}

/* ------------------------------------------------------------------------
 * For users
 */

enum kvmi_status kvmi_vm_set_timeout(struct kvmi_vm *vm, int ms,
				     struct kvmi_error *err)
{
	if (!vm || ms <= 0)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "a timeout of %d ms, or no vm", ms);
	vm_lock(vm);
	vm->timeout = ms;
	vm_unlock(vm);

	return KVMI_OK;
}

static bool make_poll_fd(struct kvmi_vm *vm)
{
	struct epoll_event input = { .events = EPOLLIN };

	vm->ready_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (vm->ready_fd < 0)
		return false;
	vm->poll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (vm->poll_fd >= 0 &&
	    !epoll_ctl(vm->poll_fd, EPOLL_CTL_ADD, vm->fd, &input) &&
	    !epoll_ctl(vm->poll_fd, EPOLL_CTL_ADD, vm->ready_fd, &input))
		return true;
	if (vm->poll_fd >= 0)
		close(vm->poll_fd);
	close(vm->ready_fd);

	return false;
}

int kvmi_vm_fd(const struct kvmi_vm *public)
{
	struct kvmi_vm *vm = (struct kvmi_vm *)public;
	int fd;

	if (!vm)
		return -1;

	/* who doesn't ask for it need not pay for it, the kernel's part either */
	vm_lock(vm);
	if (!vm->is_polled && vm->state != VM_BROKEN) {
		vm->is_polled = make_poll_fd(vm);
		if (!vm->is_polled) {
			/* the socket's end, which wakes up, tells why */
			vm->poll_fd = vm->fd;
			broken_by_system(vm, NULL, errno,
					 "an fd to poll (epoll, eventfd)");
		}
	}
	fd = vm->poll_fd;
	vm_unlock(vm);

	return fd;
}

short kvmi_vm_poll_events(const struct kvmi_vm *vm)
{
	/* that the socket has room again makes kvmi_vm_fd() readable */
	(void)vm;

	return POLLIN;
}

const struct kvmi_vm_hello *kvmi_vm_get_hello(const struct kvmi_vm *vm)
{
	return &vm->hello;
}

const struct kvmi_vm_version *kvmi_vm_get_version(const struct kvmi_vm *vm)
{
	return &vm->version;
}

void kvmi_vm_close(struct kvmi_vm *vm)
{
	struct queued_event *entry;
	bool is_ours;

	if (!vm)
		return;

	/*
	 * In a child of that process the connection is the parent's, and the
	 * lock may be held by a thread that there isn't.
	 */
	is_ours = vm->pid == getpid();

	/*
	 * An answer that is still here would turn into "continue", which puts
	 * a #BP into the guest.  What is received meanwhile does not matter.
	 */
	if (is_ours)
		kvmi_vm_flush(vm, NULL);

	/* Whoever is to be told of an answer learns that none will come */
	vm->unhook_due = false;
	if (is_ours && vm->first_call) {
		kvmi_vm_shutdown(vm);
		kvmi_vm_dispatch(vm);
	}

	if (vm->is_polled) {
		close(vm->poll_fd);
		close(vm->ready_fd);
	}
	close(vm->fd);
	while ((entry = vm->first_event)) {
		vm->first_event = entry->next;
		free(entry);
	}
	free(vm->open);
	free(vm->input);
	free(vm->output);
	if (is_ours) {
		pthread_cond_destroy(&vm->changed);
		pthread_mutex_destroy(&vm->lock);
	}
	explicit_bzero(vm, sizeof(*vm));
	free(vm);
}

/*
 * Another thread sleeps in poll(), for an answer perhaps.  What has come wakes it
 * up, but not if it is gone before it looks: so it is left to that thread.
 */
static enum kvmi_status leave_to_poller(struct kvmi_vm *vm)
{
	struct pollfd poll_fd = { .fd = vm->fd, .events = POLLIN };
	int64_t deadline = now_ms() + FOLLOW_MS;
	struct timespec until = { deadline / 1000, deadline % 1000 * 1000000 };

	if (poll(&poll_fd, 1, 0) <= 0)
		return KVMI_ERR_NOTHING;
	pthread_cond_timedwait(&vm->changed, &vm->lock, &until);

	return KVMI_OK;
}

enum kvmi_status kvmi_vm_process(struct kvmi_vm *vm, struct kvmi_error *err)
{
	enum kvmi_status status;
	int rounds = 16;	/* let other connections have their turn */

	if (!vm)
		return fail(err, KVMI_ERR_ARGUMENT, "no vm");

	vm_lock(vm);
	do {
		status = flush(vm, err);
		if (status == KVMI_OK)
			status = vm->polling ? leave_to_poller(vm) :
					       receive_some(vm, 0, err);
	} while (status == KVMI_OK && --rounds);
	if (status == KVMI_OK || status == KVMI_ERR_NOTHING)
		status = flush(vm, err);
	/*
	 * The caller will ask for the time again before it sleeps, and takes what
	 * has come: nobody has to be woken up for that.
	 */
	vm->earlier_timeout = false;
	vm->asleep_until = 0;
	if (vm->is_polled)
		tell_pollers(vm, false);
	pthread_mutex_unlock(&vm->lock);

	return status;
}

enum kvmi_status kvmi_vm_flush(struct kvmi_vm *vm, struct kvmi_error *err)
{
	enum kvmi_status status;
	int64_t deadline;

	if (!vm)
		return fail(err, KVMI_ERR_ARGUMENT, "no vm");

	vm_lock(vm);
	deadline = now_ms() + vm->timeout;
	status = flush(vm, err);
	while (status == KVMI_OK && has_output(vm))
		status = pump(vm, deadline, err);
	vm_unlock(vm);

	return status;
}

void kvmi_vm_shutdown(struct kvmi_vm *vm)
{
	if (!vm)
		return;
	vm_lock(vm);
	if (vm->state != VM_BROKEN) {
		fail(&vm->broken, KVMI_ERR_CLOSED,
		     "this side has shut the connection down");
		disconnect(vm);
	}
	vm_unlock(vm);
}

static struct kvmi_vm_event *next_event(struct kvmi_vm *vm)
{
	struct queued_event *entry = vm->first_event;

	if (!entry)
		return NULL;

	vm->first_event = entry->next;
	if (!vm->first_event)
		vm->last_event = &vm->first_event;
	if (entry->event.id == KVMI_EV_UNHOOK)
		vm->unhook_queued = false;

	return &entry->event;
}

struct kvmi_vm_event *kvmi_vm_next_event(struct kvmi_vm *vm)
{
	struct kvmi_vm_event *event;

	if (!vm)
		return NULL;
	vm_lock(vm);
	event = next_event(vm);
	vm_unlock(vm);

	return event;
}

void kvmi_vm_event_free(struct kvmi_vm_event *event)
{
	free(event);
}

/* Until there is an event, or *enough */
static enum kvmi_status wait_event(struct kvmi_vm *vm, int ms,
				   const bool *enough,
				   struct kvmi_vm_event **event,
				   struct kvmi_error *err)
{
	int64_t deadline = now_ms() + ms;
	enum kvmi_status status = KVMI_OK;

	*event = NULL;
	vm_lock(vm);
	while (!(enough && *enough) && !(*event = next_event(vm))) {
		status = pump(vm, deadline, err);
		/* what came before the end is there to be taken */
		if (status != KVMI_OK && !vm->first_event &&
		    !(enough && *enough))
			break;
	}
	if (*event)
		status = KVMI_OK;
	else if (status == KVMI_ERR_TIMEOUT || (enough && *enough))
		status = fail(err, KVMI_ERR_NOTHING, "no event");
	vm_unlock(vm);

	return status;
}

enum kvmi_status vm_wait_event(struct kvmi_vm *vm, int ms, bool knows_of_unhook,
			       struct kvmi_vm_event **event,
			       struct kvmi_error *err)
{
	return wait_event(vm, ms, knows_of_unhook ? NULL : &vm->unhook_came,
			  event, err);
}

enum kvmi_status kvmi_vm_wait_event(struct kvmi_vm *vm, int ms,
				    struct kvmi_vm_event **event,
				    struct kvmi_error *err)
{
	enum kvmi_status status;

	if (!vm || !event || ms < 0)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no vm, no event or a negative time");

	status = wait_event(vm, ms, &vm->unhook_due, event, err);
	if (status == KVMI_ERR_NOTHING && vm_tell_unhook(vm))
		fail(err, status,
		     "UNHOOK has come, and its function has been called");

	return status;
}

bool vm_unhook_came(struct kvmi_vm *vm)
{
	bool came;

	vm_lock(vm);
	came = vm->unhook_came;
	vm_unlock(vm);

	return came;
}

bool vm_tell_unhook(struct kvmi_vm *vm)
{
	kvmi_unhook function = NULL;
	void *context = NULL;

	vm_lock(vm);
	if (vm->unhook_due) {
		function = vm->unhook;
		context = vm->unhook_context;
		vm->unhook_due = false;
		vm->unhook_told = true;
	}
	vm_unlock(vm);
	if (function)
		function(vm, context);

	return function;
}

/* One that came before there was a function for it */
static bool unqueue_unhook(struct kvmi_vm *vm)
{
	struct queued_event **at = &vm->first_event, *entry;

	while ((entry = *at) && entry->event.id != KVMI_EV_UNHOOK)
		at = &entry->next;
	if (!entry)
		return false;
	*at = entry->next;
	if (!*at)
		vm->last_event = at;
	vm->unhook_queued = false;
	free(entry);

	return true;
}

enum kvmi_status kvmi_vm_on_unhook(struct kvmi_vm *vm, kvmi_unhook function,
				   void *context, struct kvmi_error *err)
{
	enum kvmi_status status;

	if (!vm || !function)
		return fail(err, KVMI_ERR_ARGUMENT, "no vm or no function");

	vm_lock(vm);
	vm->unhook = function;
	vm->unhook_context = context;
	if (unqueue_unhook(vm))
		vm->unhook_due = !vm->unhook_told;
	vm_unlock(vm);
	status = kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, true, err);
	if (status != KVMI_OK) {
		vm_lock(vm);
		vm->unhook = NULL;
		vm->unhook_due = false;
		vm_unlock(vm);
	}

	return status;
}

bool vm_has_open_event(struct kvmi_vm *vm, unsigned int vcpu)
{
	bool open;

	vm_lock(vm);
	open = vcpu < vm->open_count && vm->open[vcpu].open;
	vm_unlock(vm);

	return open;
}

static bool has_value(unsigned int id)
{
	return id == KVMI_EV_CR || id == KVMI_EV_MSR;
}

/* value: NULL, or what is to be written (CR, MSR) */
static enum kvmi_status queue_reply(struct kvmi_vm *vm,
				    const struct kvmi_vm_event *event,
				    enum kvmi_action action,
				    const uint64_t *value,
				    struct kvmi_error *err)
{
	struct kvmi_vcpu_event_reply reply = { .action = action,
					       .event = event->id };
	struct kvmi_vcpu_hdr vcpu = { .vcpu = event->vcpu };
	struct open_event *open = &vm->open[event->vcpu];
	uint64_t new_value = value ? *value : open->value;
	const struct iovec parts[] = {
		{ &vcpu, sizeof(vcpu) }, { &reply, sizeof(reply) },
		{ &new_value, sizeof(new_value) },
	};

	open->open = false;

	return send_message(vm, KVMI_VCPU_EVENT, event->seq, parts,
			    has_value(event->id) ? 3 : 2, err);
}

static enum kvmi_status check_reply(struct kvmi_vm *vm,
				    const struct kvmi_vm_event *event,
				    enum kvmi_action action,
				    struct kvmi_error *err)
{
	if (vm->state == VM_BROKEN)
		return copy_broken(vm, err);

	/* KVM ends the connection at once if these rules are broken */
	if (event->id == KVMI_EV_UNHOOK)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "UNHOOK is not answered, but by closing the connection");
	if (action != KVMI_ACTION_CONTINUE && action != KVMI_ACTION_CRASH &&
	    !(action == KVMI_ACTION_RETRY &&
	      (event->id == KVMI_EV_BREAKPOINT ||
	       event->id == KVMI_EV_DESCRIPTOR || event->id == KVMI_EV_PF)))
		return fail(err, KVMI_ERR_ARGUMENT,
			    "event %u does not take action %u", event->id,
			    action);

	if (event->vcpu >= vm->open_count || !vm->open[event->vcpu].open ||
	    vm->open[event->vcpu].seq != event->seq ||
	    vm->open[event->vcpu].id != event->id)
		return fail(err, KVMI_ERR_ANSWERED,
			    "vCPU %u does not wait for an answer to event number %u",
			    event->vcpu, event->seq);

	return KVMI_OK;
}

static enum kvmi_status reply(struct kvmi_vm *vm,
			      const struct kvmi_vm_event *event,
			      enum kvmi_action action, const uint64_t *value,
			      struct kvmi_error *err)
{
	enum kvmi_status status;

	if (!vm || !event)
		return fail(err, KVMI_ERR_ARGUMENT, "no vm or no event");

	vm_lock(vm);
	status = check_reply(vm, event, action, err);
	if (status == KVMI_OK)
		status = queue_reply(vm, event, action, value, err);
	if (status == KVMI_OK)
		status = push(vm, err);
	vm_unlock(vm);

	return status;
}

enum kvmi_status kvmi_vm_reply(struct kvmi_vm *vm,
			       const struct kvmi_vm_event *event,
			       enum kvmi_action action, struct kvmi_error *err)
{
	return reply(vm, event, action, NULL, err);
}

enum kvmi_status kvmi_vm_reply_with_value(struct kvmi_vm *vm,
					  const struct kvmi_vm_event *event,
					  enum kvmi_action action,
					  uint64_t value,
					  struct kvmi_error *err)
{
	if (event && !has_value(event->id))
		return fail(err, KVMI_ERR_ARGUMENT,
			    "the answer to event %u has no value", event->id);

	return reply(vm, event, action, &value, err);
}

enum kvmi_status kvmi_vm_reply_with_registers(struct kvmi_vm *vm,
					      const struct kvmi_vm_event *event,
					      enum kvmi_action action,
					      const struct kvm_regs *regs,
					      struct kvmi_error *err)
{
	struct kvmi_vcpu_hdr vcpu = { 0 };
	enum kvmi_status status, answered;
	struct kvm_regs copy;
	const struct iovec parts[] = {
		{ &vcpu, sizeof(vcpu) }, { &copy, sizeof(copy) },
	};
	struct pending *pending = NULL;

	if (!vm || !event || !regs)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no vm, no event or no registers");

	vcpu.vcpu = event->vcpu;
	copy = *regs;
	vm_lock(vm);
	/* before the check: this lets others have the lock */
	wait_for_place(vm, NULL);
	status = check_reply(vm, event, action, err);
	if (status == KVMI_OK) {
		status = start(vm, KVMI_VCPU_SET_REGISTERS, parts, 2, NULL, 0,
			       &pending, err);
		answered = queue_reply(vm, event, action, NULL,
				       status == KVMI_OK ? err : NULL);
		if (answered == KVMI_OK)
			answered = push(vm, status == KVMI_OK ? err : NULL);
		if (status == KVMI_OK && answered == KVMI_OK)
			status = wait_for(vm, pending, vm->timeout, NULL, err);
		else if (status == KVMI_OK) {
			abandon(pending);
			status = answered;
		}
	}
	vm_unlock(vm);

	return status;
}
