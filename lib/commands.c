/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Each command of the protocol as a function */

#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define PAGE_SIZE 4096

/* Entries that fit a message of SET_PAGE_ACCESS, and messages on their way */
#define ACCESS_MAX ((KVMI_MAX_MSG_SIZE - \
		     sizeof(struct kvmi_vm_set_page_access)) / \
		    sizeof(struct kvmi_page_access_entry))
#define ACCESS_WINDOW 16

/* How often to ask whether QEMU has set the allow-lists by now */
#define ALLOW_POLL_MS 5

_Static_assert((int)KVMI_CMD_VCPU_SET_MSRS == (int)KVMI_VCPU_SET_MSRS, "ids");
_Static_assert((int)KVMI_CMD_VM_SET_PAGE_ACCESS == (int)KVMI_VM_SET_PAGE_ACCESS, "ids");
_Static_assert((int)KVMI_EV_SINGLESTEP == (int)KVMI_VCPU_EVENT_SINGLESTEP, "ids");
_Static_assert((int)KVMI_EV_BREAKPOINT == (int)KVMI_VCPU_EVENT_BREAKPOINT, "ids");
_Static_assert((int)KVMI_CMD_VM_GET_MAX_GFN == (int)KVMI_VM_GET_MAX_GFN, "ids");
_Static_assert(KVMI_PAGE_R == KVMI_PAGE_ACCESS_R &&
	       KVMI_PAGE_W == KVMI_PAGE_ACCESS_W &&
	       KVMI_PAGE_X == KVMI_PAGE_ACCESS_X, "access");
_Static_assert(KVMI_VM_WRITE_JOURNAL == KVMI_WRITE_JOURNAL &&
	       KVMI_VM_WRITE_KEEP == KVMI_WRITE_KEEP, "flags");
_Static_assert((int)KVMI_DESCRIPTOR_TR == KVMI_DESC_TR, "descriptors");
_Static_assert(sizeof(struct kvmi_vcpu_get_xsave_reply) == KVMI_XSAVE_SIZE,
	       "xsave");
_Static_assert(KVMI_ACTION_CRASH == KVMI_EVENT_ACTION_CRASH, "actions");

static enum kvmi_status no_vm(struct kvmi_error *err)
{
	return fail(err, KVMI_ERR_ARGUMENT, "no vm, or no place for the result");
}

static enum kvmi_status check_vcpu(const struct kvmi_vm *vm, unsigned int vcpu,
				   struct kvmi_error *err)
{
	if (!vm)
		return no_vm(err);
	if (vcpu > UINT16_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "there is no vCPU %u", vcpu);

	return KVMI_OK;
}

/* One vCPU, or KVMI_ALL_VCPUS */
static enum kvmi_status check_vcpus(const struct kvmi_vm *vm, unsigned int vcpu,
				    struct kvmi_error *err)
{
	return check_vcpu(vm, vcpu == KVMI_ALL_VCPUS ? 0 : vcpu, err);
}

/* A command to the VM: one structure, or nothing */
static enum kvmi_status vm_simple(struct kvmi_vm *vm, unsigned int id,
				  void *request, size_t request_size,
				  void *answer, size_t answer_size,
				  struct kvmi_error *err)
{
	const struct iovec part = { request, request_size };

	return vm_command(vm, id, &part, 1, answer, answer_size, answer_size,
			  err);
}

/* A command to a vCPU */
static enum kvmi_status vcpu_simple(struct kvmi_vm *vm, unsigned int vcpu,
				    unsigned int id, void *request,
				    size_t request_size, void *answer,
				    size_t answer_size, struct kvmi_error *err)
{
	struct kvmi_vcpu_hdr header = { .vcpu = vcpu };
	const struct iovec parts[] = {
		{ &header, sizeof(header) }, { request, request_size },
	};

	return vm_command(vm, id, parts, 2, answer, answer_size, answer_size,
			  err);
}

/* ------------------------------------------------------------------------
 * The start
 */

static enum kvmi_status wait_allowed(struct kvmi_vm *vm, uint64_t set,
				     bool events, int64_t deadline,
				     struct kvmi_error *err)
{
	unsigned int id;

	for (id = 0; id < 64; id++) {
		if (!(set & KVMI_SET(id)))
			continue;
		for (;;) {
			const char *name = events ? kvmi_event_name(id) :
						    kvmi_command_name(id);
			enum kvmi_status status = events ?
				kvmi_vm_check_event(vm, id, err) :
				kvmi_vm_check_command(vm, id, err);

			if (status == KVMI_OK)
				break;
			if (status == KVMI_ERR_NOT_FOUND)
				return fail(err, KVMI_ERR_UNKNOWN,
					    "this version of KVM lacks %s %s (%u)",
					    events ? "event" : "command",
					    name ? name : "?", id);
			if (status != KVMI_ERR_NOT_ALLOWED)
				return status;
			if (now_ms() >= deadline)
				return fail(err, status,
					    "%s %s is not allowed by QEMU; see the property %s of its kvmi object",
					    events ? "event" : "command",
					    name ? name : "?",
					    events ? "events" : "commands");
			poll(NULL, 0, ALLOW_POLL_MS);
		}
	}

	return KVMI_OK;
}

enum kvmi_status kvmi_vm_connect(struct kvmi_vm *vm, uint64_t commands,
				 uint64_t events, struct kvmi_error *err)
{
	struct kvmi_get_version_reply version;
	enum kvmi_status status;
	int64_t deadline;

	if (!vm)
		return no_vm(err);

	status = vm_answer_hello(vm, err);
	if (status != KVMI_OK)
		return status;

	status = vm_simple(vm, KVMI_GET_VERSION, NULL, 0, &version,
			   sizeof(version), err);
	if (status != KVMI_OK)
		return status;
	/* The version was 1 in all revisions; only newer ones tell the size */
	if (version.version < KVMI_VERSION || !version.max_msg_size)
		return vm_refuse(vm, KVMI_ERR_VERSION, err,
				 "KVM speaks an older introspection protocol (version %u, no message size): load this project's kvm modules; 'kvmi doctor' says how",
				 version.version);
	if (version.max_msg_size < KVMI_MAX_MSG_SIZE)
		return vm_refuse(vm, KVMI_ERR_VERSION, err,
				 "KVM takes messages of %u bytes only, not %d: load this project's kvm modules; 'kvmi doctor' says how",
				 version.max_msg_size, (int)KVMI_MAX_MSG_SIZE);
	pthread_mutex_lock(&vm->lock);
	vm->version = (struct kvmi_vm_version){
		.version = version.version,
		.max_message = version.max_msg_size,
		.singlestep = version.features.singlestep,
		.get_page_access = version.features.get_page_access,
		.get_max_gfn = version.features.get_max_gfn,
		.journal = version.features.journal,
		.set_sregs = version.features.set_sregs,
		.set_msrs = version.features.set_msrs,
	};
	deadline = now_ms() + vm->timeout;
	pthread_mutex_unlock(&vm->lock);

	status = wait_allowed(vm, commands, false, deadline, err);
	if (status == KVMI_OK)
		status = wait_allowed(vm, events, true, deadline, err);

	return status;
}

/* ------------------------------------------------------------------------
 * VM
 */

enum kvmi_status kvmi_vm_check_command(struct kvmi_vm *vm, unsigned int id,
				       struct kvmi_error *err)
{
	struct kvmi_vm_check_command request = { .id = id };

	if (!vm)
		return no_vm(err);
	if (id > UINT16_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "no command %u", id);

	return vm_simple(vm, KVMI_VM_CHECK_COMMAND, &request, sizeof(request),
			 NULL, 0, err);
}

enum kvmi_status kvmi_vm_check_event(struct kvmi_vm *vm, unsigned int id,
				     struct kvmi_error *err)
{
	struct kvmi_vm_check_event request = { .id = id };

	if (!vm)
		return no_vm(err);
	if (id > UINT16_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "no event %u", id);

	return vm_simple(vm, KVMI_VM_CHECK_EVENT, &request, sizeof(request),
			 NULL, 0, err);
}

enum kvmi_status kvmi_vm_get_vcpu_count(struct kvmi_vm *vm, unsigned int *count,
					struct kvmi_error *err)
{
	struct kvmi_vm_get_info_reply reply;
	enum kvmi_status status;

	if (!vm || !count)
		return no_vm(err);

	status = vm_simple(vm, KVMI_VM_GET_INFO, NULL, 0, &reply,
			   sizeof(reply), err);
	if (status != KVMI_OK)
		return status;
	if (reply.vcpu_count > MAX_VCPUS)
		return vm_break(vm, err, "%u vCPUs", reply.vcpu_count);
	*count = reply.vcpu_count;

	return KVMI_OK;
}

enum kvmi_status kvmi_vm_control_events(struct kvmi_vm *vm, unsigned int id,
					bool enable, struct kvmi_error *err)
{
	struct kvmi_vm_control_events request = { .event_id = id,
						  .enable = enable };

	if (!vm)
		return no_vm(err);
	if (id > UINT16_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "no event %u", id);

	return vm_simple(vm, KVMI_VM_CONTROL_EVENTS, &request, sizeof(request),
			 NULL, 0, err);
}

/*
 * Reads or writes all ops, cut at the borders of pages, as the protocol wants
 * it, with several parts on their way.  Answers come in the order of the
 * commands (one thread of KVM does them all), so waiting for the oldest loses
 * nothing.
 */
static enum kvmi_status memory_many(struct kvmi_vm *vm, bool write,
				    unsigned int flags,
				    struct kvmi_memory_op *ops, size_t count,
				    struct kvmi_error *err)
{
	struct part {
		struct pending *pending;
		size_t op;
		size_t size;
	} window[BATCH_WINDOW];
	unsigned int first = 0, used = 0, bytes = 0;
	enum kvmi_status result = KVMI_OK, fatal = KVMI_OK;
	size_t op = 0, done = 0, i;
	bool refill;

	if (!vm || (count && !ops))
		return no_vm(err);
	if (flags && flags != KVMI_WRITE_JOURNAL && flags != KVMI_WRITE_KEEP)
		return fail(err, KVMI_ERR_ARGUMENT, "no flags 0x%x", flags);
	if (flags && !vm->version.journal)
		return fail(err, KVMI_ERR_UNKNOWN,
			    "this version of KVM does not remember writes");
	for (i = 0; i < count; i++) {
		ops[i].status = KVMI_OK;
		if (!ops[i].size)
			continue;
		if (!ops[i].data || ops[i].gpa + ops[i].size < ops[i].gpa)
			return fail(err, KVMI_ERR_ARGUMENT,
				    "no data, or beyond the end of all addresses");
	}

	while (op < count || used) {
		struct kvmi_error local = { 0 };
		enum kvmi_status status;
		struct part *part;
		size_t size = 0;

		/*
		 * Not one by one, as answers come in: each message sent alone
		 * costs both sides a system call and a wake-up.
		 */
		refill = used <= BATCH_WINDOW / 2 && bytes <= BATCH_BYTES / 2;
		while (fatal == KVMI_OK && op < count && refill &&
		       used < BATCH_WINDOW && bytes < BATCH_BYTES) {
			/* both requests have the same layout */
			struct kvmi_vm_write_physical request = { 0 };
			uint64_t left_in_page;
			uint8_t *data;
			int parts_count;

			if (done == ops[op].size) {
				op++;
				done = 0;
				continue;
			}
			request.gpa = ops[op].gpa + done;
			left_in_page = PAGE_SIZE - request.gpa % PAGE_SIZE;
			size = ops[op].size - done;
			if (size > left_in_page)
				size = left_in_page;
			request.size = size;
			request.flags = flags;
			data = (uint8_t *)ops[op].data + done;

			const struct iovec parts[] = {
				{ &request, sizeof(request) }, { data, size },
			};

			parts_count = write ? 2 : 1;
			part = &window[(first + used) % BATCH_WINDOW];
			status = (used ? vm_start : vm_start_waiting)(
				vm, write ? KVMI_VM_WRITE_PHYSICAL :
					    KVMI_VM_READ_PHYSICAL,
				parts, parts_count, write ? NULL : data,
				write ? 0 : size, &part->pending, &local);
			/* other threads have the rest: first take what is ours */
			if (status == KVMI_ERR_LIMIT && used)
				break;
			if (status != KVMI_OK) {
				fatal = status;
				break;
			}
			part->op = op;
			part->size = size;
			used++;
			bytes += size;
			done += size;
		}
		if (fatal != KVMI_OK && result == KVMI_OK) {
			result = fatal;
			if (err)
				*err = local;
		}
		if (fatal != KVMI_OK)
			for (; op < count; op++)
				if (ops[op].status == KVMI_OK)
					ops[op].status = fatal;
		if (!used)
			break;

		part = &window[first];
		first = (first + 1) % BATCH_WINDOW;
		used--;
		bytes -= part->size;
		if (fatal != KVMI_OK) {
			if (ops[part->op].status == KVMI_OK)
				ops[part->op].status = fatal;
			vm_abandon(vm, part->pending);
			continue;
		}

		status = vm_wait(vm, part->pending, &size, &local);
		if (status == KVMI_OK && !write && size != part->size)
			status = vm_break(vm, &local,
					  "%zu instead of %zu bytes of memory",
					  size, part->size);
		if (status == KVMI_OK)
			continue;
		if (ops[part->op].status == KVMI_OK)
			ops[part->op].status = status;
		if (result == KVMI_OK) {
			result = status;
			if (err)
				*err = local;
		}
		/* What KVM says concerns this op only */
		if (status < KVMI_ERR_NOT_ALLOWED)
			fatal = status;
	}

	return result;
}

enum kvmi_status kvmi_vm_read_many(struct kvmi_vm *vm,
				   struct kvmi_memory_op *ops, size_t count,
				   struct kvmi_error *err)
{
	return memory_many(vm, false, 0, ops, count, err);
}

enum kvmi_status kvmi_vm_write_many(struct kvmi_vm *vm,
				    struct kvmi_memory_op *ops, size_t count,
				    struct kvmi_error *err)
{
	return memory_many(vm, true, 0, ops, count, err);
}

enum kvmi_status kvmi_vm_read_physical(struct kvmi_vm *vm, uint64_t gpa,
				       void *data, size_t size,
				       struct kvmi_error *err)
{
	struct kvmi_memory_op op = { .gpa = gpa, .data = data, .size = size };

	if (size > UINT32_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "%zu bytes at once", size);

	return memory_many(vm, false, 0, &op, 1, err);
}

enum kvmi_status kvmi_vm_write_many_flags(struct kvmi_vm *vm,
					  struct kvmi_memory_op *ops,
					  size_t count, unsigned int flags,
					  struct kvmi_error *err)
{
	return memory_many(vm, true, flags, ops, count, err);
}

enum kvmi_status kvmi_vm_write_physical_flags(struct kvmi_vm *vm, uint64_t gpa,
					      const void *data, size_t size,
					      unsigned int flags,
					      struct kvmi_error *err)
{
	struct kvmi_memory_op op = { .gpa = gpa, .data = (void *)data,
				     .size = size };

	if (size > UINT32_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "%zu bytes at once", size);

	return memory_many(vm, true, flags, &op, 1, err);
}

enum kvmi_status kvmi_vm_write_physical(struct kvmi_vm *vm, uint64_t gpa,
					const void *data, size_t size,
					struct kvmi_error *err)
{
	return kvmi_vm_write_physical_flags(vm, gpa, data, size, 0, err);
}

/* One message of at most ACCESS_MAX entries */
static enum kvmi_status start_page_access(struct kvmi_vm *vm, bool wait,
					  const struct kvmi_page_access *pages,
					  size_t count, struct pending **pending,
					  struct kvmi_error *err)
{
	struct kvmi_vm_set_page_access request = { .count = count };
	struct kvmi_page_access_entry entries[ACCESS_MAX];
	const struct iovec parts[] = {
		{ &request, sizeof(request) },
		{ entries, count * sizeof(entries[0]) },
	};
	size_t i;

	for (i = 0; i < count; i++)
		entries[i] = (struct kvmi_page_access_entry){
			.gpa = pages[i].gpa, .access = pages[i].access,
		};

	return (wait ? vm_start_waiting : vm_start)(vm, KVMI_VM_SET_PAGE_ACCESS,
						    parts, 2, NULL, 0, pending,
						    err);
}

enum kvmi_status kvmi_vm_set_page_access(struct kvmi_vm *vm,
					 const struct kvmi_page_access *pages,
					 size_t count, struct kvmi_error *err)
{
	struct pending *window[ACCESS_WINDOW];
	enum kvmi_status result = KVMI_OK;
	size_t first = 0, used = 0, done = 0, i;
	bool failed = false, full;

	if (!vm || (count && !pages))
		return no_vm(err);
	for (i = 0; i < count; i++)
		if (pages[i].access & ~KVMI_PAGE_RWX)
			return fail(err, KVMI_ERR_ARGUMENT,
				    "0x%x is not a set of KVMI_PAGE_*",
				    pages[i].access);

	while (used || (done < count && !failed)) {
		enum kvmi_status status = KVMI_OK;
		struct kvmi_error local = { 0 };

		full = failed || done == count || used == ACCESS_WINDOW;
		if (!full) {
			size_t part = count - done;

			if (part > ACCESS_MAX)
				part = ACCESS_MAX;
			status = start_page_access(vm, !used, pages + done,
						   part,
						   &window[(first + used) %
							   ACCESS_WINDOW],
						   &local);
			/* other threads have the rest: take what is ours */
			full = status == KVMI_ERR_LIMIT && used;
			if (status == KVMI_OK)
				used++;
			if (!full)
				done += part;
		}
		if (full) {
			if (failed)
				vm_abandon(vm, window[first]);
			else
				status = vm_wait(vm, window[first], NULL,
						 &local);
			first = (first + 1) % ACCESS_WINDOW;
			used--;
		}
		if (status != KVMI_OK && status < KVMI_ERR_NOT_ALLOWED)
			failed = true;
		if (status != KVMI_OK && result == KVMI_OK) {
			result = status;
			if (err)
				*err = local;
		}
	}

	return result;
}

enum kvmi_status kvmi_vm_get_page_access(struct kvmi_vm *vm, uint64_t gpa,
					 uint8_t *access,
					 struct kvmi_error *err)
{
	struct kvmi_vm_get_page_access request = { .gpa = gpa };
	struct kvmi_vm_get_page_access_reply reply;
	enum kvmi_status status;

	if (!vm || !access)
		return no_vm(err);

	status = vm_simple(vm, KVMI_VM_GET_PAGE_ACCESS, &request,
			   sizeof(request), &reply, sizeof(reply), err);
	if (status == KVMI_OK)
		*access = reply.access;

	return status;
}

enum kvmi_status kvmi_vm_get_max_gfn(struct kvmi_vm *vm, uint64_t *gfn,
				     struct kvmi_error *err)
{
	struct kvmi_vm_get_max_gfn_reply reply;
	enum kvmi_status status;

	if (!vm || !gfn)
		return no_vm(err);

	status = vm_simple(vm, KVMI_VM_GET_MAX_GFN, NULL, 0, &reply,
			   sizeof(reply), err);
	if (status == KVMI_OK)
		*gfn = reply.gfn;

	return status;
}

enum kvmi_status vm_pause_vcpus(struct kvmi_vm *vm, const uint16_t *vcpus,
				size_t count, bool wait, int64_t deadline,
				enum kvmi_status *status,
				struct kvmi_error *err)
{
	enum kvmi_status result = KVMI_OK, fatal = KVMI_OK;
	struct pending *window[BATCH_WINDOW];
	size_t started = 0, finished = 0;

	if (!vm || (count && !vcpus))
		return no_vm(err);

	while (finished < count) {
		struct kvmi_error local = { 0 };
		enum kvmi_status one = KVMI_OK;

		while (fatal == KVMI_OK && started < count &&
		       started - finished < BATCH_WINDOW) {
			bool first = started == finished;
			struct kvmi_vm_pause_vcpu request = {
				.vcpu = vcpus[started], .wait = wait,
			};
			const struct iovec part = { &request, sizeof(request) };

			one = (first ? vm_start_waiting : vm_start)(
				vm, KVMI_VM_PAUSE_VCPU, &part, 1, NULL, 0,
				&window[started % BATCH_WINDOW], &local);
			/* other threads have the rest: take what is ours */
			if (one == KVMI_ERR_LIMIT && !first)
				break;
			if (one != KVMI_OK) {
				fatal = one;
				break;
			}
			started++;
		}
		if (finished >= started) {
			/* not asked: it will not send a PAUSE */
			one = fatal == KVMI_ERR_TIMEOUT ? KVMI_ERR_LIMIT :
							  fatal;
		} else if (fatal != KVMI_OK) {
			vm_abandon(vm, window[finished % BATCH_WINDOW]);
			one = fatal;
		} else {
			one = vm_wait_until(vm, window[finished % BATCH_WINDOW],
					    deadline, NULL, &local);
			if (one != KVMI_OK && one < KVMI_ERR_NOT_ALLOWED)
				fatal = one;
		}
		if (status)
			status[finished] = one;
		finished++;
		if (one != KVMI_OK && result == KVMI_OK) {
			result = one;
			if (err)
				*err = local;
		}
	}

	return result;
}

enum kvmi_status kvmi_vm_pause_vcpus(struct kvmi_vm *vm,
				     const uint16_t *vcpus, size_t count,
				     bool wait, enum kvmi_status *status,
				     struct kvmi_error *err)
{
	return vm_pause_vcpus(vm, vcpus, count, wait, INT64_MAX, status, err);
}

enum kvmi_status kvmi_vm_pause_vcpu(struct kvmi_vm *vm, unsigned int vcpu,
				    bool wait, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	uint16_t number = vcpu;

	if (status != KVMI_OK)
		return status;

	return kvmi_vm_pause_vcpus(vm, &number, 1, wait, NULL, err);
}

enum kvmi_status kvmi_vm_control_cleanup(struct kvmi_vm *vm, bool enable,
					 struct kvmi_error *err)
{
	struct kvmi_vm_control_cleanup request = { .enable = enable };

	if (!vm)
		return no_vm(err);

	return vm_simple(vm, KVMI_VM_CONTROL_CLEANUP, &request, sizeof(request),
			 NULL, 0, err);
}

/* ------------------------------------------------------------------------
 * vCPU
 */

enum kvmi_status kvmi_vcpu_get_tsc_speed(struct kvmi_vm *vm, unsigned int vcpu,
					 uint64_t *hz, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_get_info_reply reply;

	if (status != KVMI_OK)
		return status;
	if (!hz)
		return no_vm(err);

	status = vcpu_simple(vm, vcpu, KVMI_VCPU_GET_INFO, NULL, 0, &reply,
			     sizeof(reply), err);
	if (status == KVMI_OK)
		*hz = reply.tsc_speed;

	return status;
}

/* The same for one vCPU, or for all that have started */
static enum kvmi_status vcpu_control(struct kvmi_vm *vm, unsigned int vcpu,
				     unsigned int id, void *request,
				     size_t size, struct kvmi_error *err)
{
	unsigned int count = 0, started = 0, i;
	struct kvmi_error local;
	enum kvmi_status status;

	if (vcpu != KVMI_ALL_VCPUS)
		return vcpu_simple(vm, vcpu, id, request, size, NULL, 0, err);

	status = kvmi_vm_get_vcpu_count(vm, &count, err);
	if (status != KVMI_OK)
		return status;
	for (i = 0; i < count; i++) {
		status = vcpu_simple(vm, i, id, request, size, NULL, 0, &local);
		if (status == KVMI_OK) {
			started++;
		} else if (status != KVMI_ERR_NOT_STARTED) {
			if (err)
				*err = local;
			return status;
		}
	}

	return started ? KVMI_OK : fail(err, KVMI_ERR_NOT_STARTED,
					"no vCPU has started yet");
}

enum kvmi_status kvmi_vcpu_control_events(struct kvmi_vm *vm, unsigned int vcpu,
					  unsigned int id, bool enable,
					  struct kvmi_error *err)
{
	struct kvmi_vcpu_control_events request = { .event_id = id,
						    .enable = enable };
	enum kvmi_status status = check_vcpus(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (id > UINT16_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "no event %u", id);

	return vcpu_control(vm, vcpu, KVMI_VCPU_CONTROL_EVENTS, &request,
			    sizeof(request), err);
}

enum kvmi_status kvmi_vcpu_control_cr(struct kvmi_vm *vm, unsigned int vcpu,
				      unsigned int cr, bool enable,
				      struct kvmi_error *err)
{
	struct kvmi_vcpu_control_cr request = { .cr = cr, .enable = enable };
	enum kvmi_status status = check_vcpus(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (cr != 0 && cr != 3 && cr != 4)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "CR%u cannot be watched: 0, 3 and 4 can", cr);

	return vcpu_control(vm, vcpu, KVMI_VCPU_CONTROL_CR, &request,
			    sizeof(request), err);
}

enum kvmi_status kvmi_vcpu_control_msr(struct kvmi_vm *vm, unsigned int vcpu,
				       uint32_t msr, bool enable,
				       struct kvmi_error *err)
{
	struct kvmi_vcpu_control_msr request = { .msr = msr, .enable = enable };
	enum kvmi_status status = check_vcpus(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;

	return vcpu_control(vm, vcpu, KVMI_VCPU_CONTROL_MSR, &request,
			    sizeof(request), err);
}

enum kvmi_status kvmi_vcpu_control_singlestep(struct kvmi_vm *vm,
					      unsigned int vcpu, bool enable,
					      struct kvmi_error *err)
{
	struct kvmi_vcpu_control_singlestep request = { .enable = enable };
	enum kvmi_status status = check_vcpu(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;

	return vcpu_simple(vm, vcpu, KVMI_VCPU_CONTROL_SINGLESTEP, &request,
			   sizeof(request), NULL, 0, err);
}

enum kvmi_status kvmi_vcpu_inject_exception(struct kvmi_vm *vm,
					    unsigned int vcpu,
					    unsigned int vector,
					    uint32_t error_code,
					    uint64_t address,
					    struct kvmi_error *err)
{
	struct kvmi_vcpu_inject_exception request = {
		.nr = vector, .error_code = error_code, .address = address,
	};
	enum kvmi_status status = check_vcpu(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (vector > 31)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "%u is not the vector of an exception", vector);

	return vcpu_simple(vm, vcpu, KVMI_VCPU_INJECT_EXCEPTION, &request,
			   sizeof(request), NULL, 0, err);
}

enum kvmi_status kvmi_vcpu_get_cpuid(struct kvmi_vm *vm, unsigned int vcpu,
				     uint32_t function, uint32_t index,
				     struct kvmi_cpuid *cpuid,
				     struct kvmi_error *err)
{
	struct kvmi_vcpu_get_cpuid request = { .function = function,
					       .index = index };
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_get_cpuid_reply reply;

	if (status != KVMI_OK)
		return status;
	if (!cpuid)
		return no_vm(err);

	status = vcpu_simple(vm, vcpu, KVMI_VCPU_GET_CPUID, &request,
			     sizeof(request), &reply, sizeof(reply), err);
	if (status == KVMI_OK)
		*cpuid = (struct kvmi_cpuid){ reply.eax, reply.ebx, reply.ecx,
					      reply.edx };

	return status;
}

enum kvmi_status kvmi_vcpu_get_xcr(struct kvmi_vm *vm, unsigned int vcpu,
				   unsigned int xcr, uint64_t *value,
				   struct kvmi_error *err)
{
	struct kvmi_vcpu_get_xcr request = { .xcr = xcr };
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_get_xcr_reply reply;

	if (status != KVMI_OK)
		return status;
	if (!value)
		return no_vm(err);
	if (xcr)
		return fail(err, KVMI_ERR_ARGUMENT, "there is no XCR%u", xcr);

	status = vcpu_simple(vm, vcpu, KVMI_VCPU_GET_XCR, &request,
			     sizeof(request), &reply, sizeof(reply), err);
	if (status == KVMI_OK)
		*value = reply.value;

	return status;
}

enum kvmi_status kvmi_vcpu_get_xsave(struct kvmi_vm *vm, unsigned int vcpu,
				     void *xsave, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (!xsave)
		return no_vm(err);

	return vcpu_simple(vm, vcpu, KVMI_VCPU_GET_XSAVE, NULL, 0, xsave,
			   KVMI_XSAVE_SIZE, err);
}

enum kvmi_status kvmi_vcpu_set_xsave(struct kvmi_vm *vm, unsigned int vcpu,
				     const void *xsave, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (!xsave)
		return fail(err, KVMI_ERR_ARGUMENT, "no state");

	return vcpu_simple(vm, vcpu, KVMI_VCPU_SET_XSAVE, (void *)xsave,
			   KVMI_XSAVE_SIZE, NULL, 0, err);
}

enum kvmi_status kvmi_vcpu_set_sregs(struct kvmi_vm *vm, unsigned int vcpu,
				     const struct kvm_sregs *sregs,
				     struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (!sregs)
		return fail(err, KVMI_ERR_ARGUMENT, "no registers");

	return vcpu_simple(vm, vcpu, KVMI_VCPU_SET_SREGS, (void *)sregs,
			   sizeof(*sregs), NULL, 0, err);
}

enum kvmi_status kvmi_vcpu_set_msrs(struct kvmi_vm *vm, unsigned int vcpu,
				    const uint32_t *msrs,
				    const uint64_t *values, size_t count,
				    size_t *done, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_hdr header = { .vcpu = vcpu };
	struct kvmi_vcpu_set_msrs request = { .nmsrs = count };
	struct kvmi_vcpu_set_msrs_reply reply;
	struct kvm_msr_entry entries[KVMI_MSRS_MAX] = { 0 };
	const struct iovec parts[] = {
		{ &header, sizeof(header) }, { &request, sizeof(request) },
		{ entries, count * sizeof(*entries) },
	};
	size_t i;

	if (status != KVMI_OK)
		return status;
	if (!msrs || !values || !count)
		return fail(err, KVMI_ERR_ARGUMENT, "no MSRs");
	if (count > KVMI_MSRS_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "%zu MSRs at once", count);

	for (i = 0; i < count; i++) {
		entries[i].index = msrs[i];
		entries[i].data = values[i];
	}
	status = vm_command(vm, KVMI_VCPU_SET_MSRS, parts, 3, &reply,
			    sizeof(reply), sizeof(reply), err);
	if (status != KVMI_OK)
		return status;
	if (reply.nmsrs > count)
		return vm_break(vm, err, "%u instead of %zu MSRs", reply.nmsrs,
				count);

	if (done)
		*done = reply.nmsrs;
	if (reply.nmsrs < count)
		return fail(err, KVMI_ERR_INVALID,
			    "the guest cannot write 0x%llx to MSR 0x%x",
			    (unsigned long long)values[reply.nmsrs],
			    msrs[reply.nmsrs]);

	return KVMI_OK;
}

enum kvmi_status kvmi_vcpu_get_mtrr_type(struct kvmi_vm *vm, unsigned int vcpu,
					 uint64_t gpa, uint8_t *type,
					 struct kvmi_error *err)
{
	struct kvmi_vcpu_get_mtrr_type request = { .gpa = gpa };
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_get_mtrr_type_reply reply;

	if (status != KVMI_OK)
		return status;
	if (!type)
		return no_vm(err);

	status = vcpu_simple(vm, vcpu, KVMI_VCPU_GET_MTRR_TYPE, &request,
			     sizeof(request), &reply, sizeof(reply), err);
	if (status == KVMI_OK)
		*type = reply.type;

	return status;
}

enum kvmi_status kvmi_vcpu_get_registers(struct kvmi_vm *vm, unsigned int vcpu,
					 struct kvmi_registers *state,
					 const uint32_t *msrs, uint64_t *values,
					 size_t count, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_get_registers request = { .nmsrs = count };
	struct kvmi_vcpu_get_registers_reply *reply;
	struct kvmi_vcpu_hdr header = { .vcpu = vcpu };
	const struct iovec parts[] = {
		{ &header, sizeof(header) }, { &request, sizeof(request) },
		{ (void *)msrs, count * sizeof(*msrs) },
	};
	size_t size, i;

	if (status != KVMI_OK)
		return status;
	if (!state || (count && (!msrs || !values)))
		return no_vm(err);
	if (count > KVMI_MSRS_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "%zu MSRs at once", count);

	size = sizeof(*reply) + count * sizeof(struct kvm_msr_entry);
	reply = malloc(size);
	if (!reply)
		return no_memory(err);

	status = vm_command(vm, KVMI_VCPU_GET_REGISTERS, parts, 3, reply, size,
			    size, err);
	if (status == KVMI_OK && reply->msrs.nmsrs != count)
		status = vm_break(vm, err, "%u instead of %zu MSRs",
				  reply->msrs.nmsrs, count);
	if (status == KVMI_OK) {
		memset(state, 0, sizeof(*state));
		state->mode = reply->mode;
		state->regs = reply->regs;
		state->sregs = reply->sregs;
		for (i = 0; i < count; i++)
			values[i] = reply->msrs.entries[i].data;
	}
	free(reply);

	return status;
}

enum kvmi_status kvmi_vcpu_set_registers(struct kvmi_vm *vm, unsigned int vcpu,
					 const struct kvm_regs *regs,
					 struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvm_regs copy;

	if (status != KVMI_OK)
		return status;
	if (!regs)
		return fail(err, KVMI_ERR_ARGUMENT, "no registers");
	copy = *regs;

	return vcpu_simple(vm, vcpu, KVMI_VCPU_SET_REGISTERS, &copy,
			   sizeof(copy), NULL, 0, err);
}

enum kvmi_status kvmi_vcpu_translate(struct kvmi_vm *vm, unsigned int vcpu,
				     uint64_t gva, uint64_t *gpa,
				     struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);
	struct kvmi_vcpu_translate_gva request = { .gva = gva };
	struct kvmi_vcpu_translate_gva_reply reply;

	if (status != KVMI_OK)
		return status;
	if (!gpa)
		return no_vm(err);

	status = vcpu_simple(vm, vcpu, KVMI_VCPU_TRANSLATE_GVA, &request,
			     sizeof(request), &reply, sizeof(reply), err);
	if (status != KVMI_OK)
		return status;
	if (reply.gpa == UINT64_MAX)
		return fail(err, KVMI_ERR_UNMAPPED,
			    "vCPU %u has nothing mapped at 0x%llx", vcpu,
			    (unsigned long long)gva);
	*gpa = reply.gpa;

	return KVMI_OK;
}

static enum kvmi_status virtual(struct kvmi_vm *vm, unsigned int vcpu,
				uint64_t gva, void *data, size_t size,
				bool write, struct kvmi_error *err)
{
	enum kvmi_status status = check_vcpu(vm, vcpu, err);

	if (status != KVMI_OK)
		return status;
	if (size && (!data || gva + (size - 1) < gva))
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no data, or beyond the end of all addresses");

	while (size && status == KVMI_OK) {
		struct kvmi_memory_op op = { .data = data };
		size_t part = PAGE_SIZE - gva % PAGE_SIZE;

		if (part > size)
			part = size;
		op.size = part;
		status = kvmi_vcpu_translate(vm, vcpu, gva, &op.gpa, err);
		if (status == KVMI_OK)
			status = memory_many(vm, write, 0, &op, 1, err);
		gva += part;
		data = (uint8_t *)data + part;
		size -= part;
	}

	return status;
}

enum kvmi_status kvmi_vcpu_read_virtual(struct kvmi_vm *vm, unsigned int vcpu,
					uint64_t gva, void *data, size_t size,
					struct kvmi_error *err)
{
	return virtual(vm, vcpu, gva, data, size, false, err);
}

enum kvmi_status kvmi_vcpu_write_virtual(struct kvmi_vm *vm, unsigned int vcpu,
					 uint64_t gva, const void *data,
					 size_t size, struct kvmi_error *err)
{
	return virtual(vm, vcpu, gva, (void *)data, size, true, err);
}
