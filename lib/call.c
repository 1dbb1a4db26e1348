/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands whose answer is waited for later, or by somebody else */

#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define PAGE_SIZE 4096

struct kvmi_call {
	struct kvmi_vm *vm;
	struct pending *pending;
	unsigned int id, vcpu;
	uint64_t gva;		/* of TRANSLATE_GVA */

	/* the caller's; NULL, or what comes is to become of the answer */
	void *out;
	size_t out_size;
	size_t *answer_size;
	size_t least;		/* that an answer must have */
	/* out is of the size of least, and gets the answer as it is */
	enum kvmi_status (*decode)(struct kvmi_call *call,
				   struct kvmi_error *err);

	/* after kvmi_call_then() */
	struct kvmi_call *next;
	kvmi_done done;
	void *context;
	int64_t deadline;
	size_t size;
	struct kvmi_error result;

	uint8_t answer[];	/* out_size bytes, or those decode wants */
};

static enum kvmi_status start(struct kvmi_vm *vm, unsigned int id,
			      const struct iovec *parts, int part_count,
			      size_t capacity, const struct kvmi_call *template,
			      struct kvmi_call **result, struct kvmi_error *err)
{
	struct kvmi_call *call = malloc(sizeof(*call) + capacity);
	enum kvmi_status status;

	if (!call)
		return no_memory(err);
	*call = *template;
	call->vm = vm;
	call->id = id;
	status = vm_start(vm, id, parts, part_count, call->answer, capacity,
			  &call->pending, err);
	if (status != KVMI_OK) {
		free(call);
		return status;
	}
	status = vm_push(vm, err);
	if (status != KVMI_OK) {
		kvmi_call_cancel(call);
		return status;
	}
	*result = call;

	return KVMI_OK;
}

static enum kvmi_status bad(struct kvmi_error *err)
{
	return fail(err, KVMI_ERR_ARGUMENT,
		    "no vm, no such vCPU, or no place for the result");
}

static enum kvmi_status memory(struct kvmi_vm *vm, bool write, uint64_t gpa,
			       void *data, size_t size, struct kvmi_call **call,
			       struct kvmi_error *err)
{
	struct kvmi_vm_write_physical request = { .gpa = gpa, .size = size };
	struct kvmi_call template = { 0 };
	const struct iovec parts[] = {
		{ &request, sizeof(request) }, { data, size },
	};

	if (!vm || !data || !call)
		return bad(err);
	if (!size || size > PAGE_SIZE - gpa % PAGE_SIZE)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "%zu bytes at 0x%llx are not within a page", size,
			    (unsigned long long)gpa);
	if (write)
		return start(vm, KVMI_VM_WRITE_PHYSICAL, parts, 2, 0, &template,
			     call, err);

	template.out = data;
	template.out_size = template.least = size;

	return start(vm, KVMI_VM_READ_PHYSICAL, parts, 1, size, &template, call,
		     err);
}

enum kvmi_status kvmi_vm_start_read_physical(struct kvmi_vm *vm, uint64_t gpa,
					     void *data, size_t size,
					     struct kvmi_call **call,
					     struct kvmi_error *err)
{
	return memory(vm, false, gpa, data, size, call, err);
}

enum kvmi_status kvmi_vm_start_write_physical(struct kvmi_vm *vm, uint64_t gpa,
					      const void *data, size_t size,
					      struct kvmi_call **call,
					      struct kvmi_error *err)
{
	return memory(vm, true, gpa, (void *)data, size, call, err);
}

static enum kvmi_status vcpu_start(struct kvmi_vm *vm, unsigned int vcpu,
				   unsigned int id, void *request, size_t size,
				   size_t capacity, struct kvmi_call template,
				   struct kvmi_call **call,
				   struct kvmi_error *err)
{
	struct kvmi_vcpu_hdr header = { .vcpu = vcpu };
	const struct iovec parts[] = {
		{ &header, sizeof(header) }, { request, size },
	};

	if (!vm || !call || vcpu > UINT16_MAX)
		return bad(err);
	template.vcpu = vcpu;
	template.least = capacity;

	return start(vm, id, parts, 2, capacity, &template, call, err);
}

static enum kvmi_status decode_registers(struct kvmi_call *call,
					 struct kvmi_error *err)
{
	struct kvmi_vcpu_get_registers_reply reply;
	struct kvmi_registers *state = call->out;

	memcpy(&reply, call->answer, sizeof(reply));
	if (reply.msrs.nmsrs)
		return vm_break(call->vm, err, "%u instead of 0 MSRs",
				reply.msrs.nmsrs);
	*state = (struct kvmi_registers){
		.mode = reply.mode, .regs = reply.regs, .sregs = reply.sregs,
	};

	return KVMI_OK;
}

enum kvmi_status kvmi_vcpu_start_get_registers(struct kvmi_vm *vm,
					       unsigned int vcpu,
					       struct kvmi_registers *state,
					       struct kvmi_call **call,
					       struct kvmi_error *err)
{
	struct kvmi_vcpu_get_registers request = { 0 };

	if (!state)
		return bad(err);

	return vcpu_start(vm, vcpu, KVMI_VCPU_GET_REGISTERS, &request,
			  sizeof(request),
			  sizeof(struct kvmi_vcpu_get_registers_reply),
			  (struct kvmi_call){ .out = state,
					      .decode = decode_registers },
			  call, err);
}

enum kvmi_status kvmi_vcpu_start_set_registers(struct kvmi_vm *vm,
					       unsigned int vcpu,
					       const struct kvm_regs *regs,
					       struct kvmi_call **call,
					       struct kvmi_error *err)
{
	if (!regs)
		return bad(err);

	return vcpu_start(vm, vcpu, KVMI_VCPU_SET_REGISTERS, (void *)regs,
			  sizeof(*regs), 0, (struct kvmi_call){ 0 }, call, err);
}

static enum kvmi_status decode_gpa(struct kvmi_call *call,
				   struct kvmi_error *err)
{
	struct kvmi_vcpu_translate_gva_reply reply;

	memcpy(&reply, call->answer, sizeof(reply));
	if (reply.gpa == UINT64_MAX)
		return fail(err, KVMI_ERR_UNMAPPED,
			    "vCPU %u has nothing mapped at 0x%llx", call->vcpu,
			    (unsigned long long)call->gva);
	*(uint64_t *)call->out = reply.gpa;

	return KVMI_OK;
}

enum kvmi_status kvmi_vcpu_start_translate(struct kvmi_vm *vm,
					   unsigned int vcpu, uint64_t gva,
					   uint64_t *gpa,
					   struct kvmi_call **call,
					   struct kvmi_error *err)
{
	struct kvmi_vcpu_translate_gva request = { .gva = gva };

	if (!gpa)
		return bad(err);

	return vcpu_start(vm, vcpu, KVMI_VCPU_TRANSLATE_GVA, &request,
			  sizeof(request),
			  sizeof(struct kvmi_vcpu_translate_gva_reply),
			  (struct kvmi_call){ .out = gpa, .gva = gva,
					      .decode = decode_gpa },
			  call, err);
}

enum kvmi_status kvmi_vcpu_start_control_events(struct kvmi_vm *vm,
						unsigned int vcpu,
						unsigned int id, bool enable,
						struct kvmi_call **call,
						struct kvmi_error *err)
{
	struct kvmi_vcpu_control_events request = { .event_id = id,
						    .enable = enable };

	if (id > UINT16_MAX)
		return fail(err, KVMI_ERR_ARGUMENT, "no event %u", id);

	return vcpu_start(vm, vcpu, KVMI_VCPU_CONTROL_EVENTS, &request,
			  sizeof(request), 0, (struct kvmi_call){ 0 }, call,
			  err);
}

enum kvmi_status kvmi_vm_start_command(struct kvmi_vm *vm, unsigned int id,
				       const void *body, size_t size,
				       void *answer, size_t capacity,
				       size_t *answer_size,
				       struct kvmi_call **call,
				       struct kvmi_error *err)
{
	const struct kvmi_call template = {
		.out = answer, .out_size = capacity, .answer_size = answer_size,
	};
	const struct iovec part = { (void *)body, size };

	if (!vm || !call || (size && !body) || (capacity && !answer))
		return bad(err);
	/* What comes back for these is no answer */
	if (id > UINT16_MAX || id == KVMI_VM_EVENT || id == KVMI_VCPU_EVENT)
		return fail(err, KVMI_ERR_ARGUMENT, "%u is no command", id);
	if (capacity > KVMI_MAX_MSG_SIZE)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "%zu bytes: an answer has at most %d", capacity,
			    (int)KVMI_MAX_MSG_SIZE);

	return start(vm, id, &part, 1, capacity, &template, call, err);
}

/* ------------------------------------------------------------------------
 * The end
 */

/* A good answer of size bytes has come: to where the caller wants it */
static enum kvmi_status deliver(struct kvmi_call *call, size_t size,
				struct kvmi_error *err)
{
	const char *name = kvmi_command_name(call->id);

	if (size < call->least)
		return vm_break(call->vm, err,
				"%s: an answer of %zu instead of %zu bytes",
				name ? name : "command", size, call->least);
	if (call->answer_size)
		*call->answer_size = size;
	if (call->decode)
		return call->decode(call, err);
	if (size > call->out_size)
		size = call->out_size;
	if (size)
		memcpy(call->out, call->answer, size);

	return KVMI_OK;
}

bool kvmi_call_is_done(const struct kvmi_call *call)
{
	bool is_done;

	vm_lock(call->vm);
	is_done = call->pending->state == PENDING_DONE ||
		  call->vm->state == VM_BROKEN;
	vm_unlock(call->vm);

	return is_done;
}

enum kvmi_status kvmi_call_wait(struct kvmi_call *call, struct kvmi_error *err)
{
	enum kvmi_status status;
	size_t size;

	if (!call)
		return fail(err, KVMI_ERR_ARGUMENT, "no call");
	status = vm_wait(call->vm, call->pending, &size, err);
	if (status == KVMI_OK)
		status = deliver(call, size, err);
	free(call);

	return status;
}

void kvmi_call_cancel(struct kvmi_call *call)
{
	if (!call)
		return;
	vm_abandon(call->vm, call->pending);
	free(call);
}

void kvmi_call_then(struct kvmi_call *call, kvmi_done done, void *context)
{
	struct kvmi_vm *vm = call->vm;

	vm_lock(vm);
	call->done = done;
	call->context = context;
	call->deadline = now_ms() + vm->timeout;
	call->next = NULL;
	*vm->last_call = call;
	vm->last_call = &call->next;
	call->pending->is_dispatched = true;
	if (call->pending->state == PENDING_DONE)
		vm->ended_calls++;
	if (call->deadline < vm->asleep_until)
		vm->earlier_timeout = true;
	vm_unlock(vm);
}

unsigned int kvmi_vm_dispatch(struct kvmi_vm *vm)
{
	struct kvmi_call *ended = NULL, **last = &ended, **at, *call;
	unsigned int count = 0;

	if (!vm)
		return 0;

	vm_lock(vm);
	for (at = &vm->first_call; (call = *at);) {
		if (!vm_has_ended(vm, call->pending, call->deadline,
				  &call->size, &call->result)) {
			at = &call->next;
			continue;
		}
		*at = call->next;
		call->next = NULL;
		*last = call;
		last = &call->next;
	}
	vm->last_call = at;
	vm->ended_calls = 0;
	vm_unlock(vm);

	if (vm_tell_unhook(vm))
		count++;
	while ((call = ended)) {
		ended = call->next;
		if (call->result.status == KVMI_OK)
			deliver(call, call->size, &call->result);
		call->done(vm, &call->result, call->context);
		free(call);
		count++;
	}

	return count;
}

int kvmi_vm_next_timeout(const struct kvmi_vm *vm)
{
	struct kvmi_vm *changed = (struct kvmi_vm *)vm;
	const struct kvmi_call *call;
	int64_t first = INT64_MAX, left;

	if (!vm)
		return -1;

	vm_lock(vm);
	if (vm->unhook_due)
		first = 0;
	for (call = vm->first_call; call; call = call->next) {
		if (call->pending->state == PENDING_DONE ||
		    vm->state == VM_BROKEN)
			first = 0;
		else if (call->deadline < first)
			first = call->deadline;
	}
	/* for kvmi_call_then() of another thread */
	changed->asleep_until = first;
	vm_unlock(vm);
	if (first == INT64_MAX)
		return -1;
	left = first - now_ms();

	return left < 0 ? 0 : left > INT32_MAX ? INT32_MAX : left;
}
