/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Commands, and lists of them */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "compat.h"

/* For the PAUSE event of a vCPU that has been asked for it */
#define PAUSE_WAIT_MS 2000

/* What a batch holds at most before a part of it is carried out */
#define BATCH_BYTES (1 << 20)

/* The end of every request: events may have come in meanwhile */
static int done(struct dom *dom, enum kvmi_status status,
		const struct kvmi_error *err)
{
	int ret = result(dom, status, err);

	dom_look(dom);

	return ret;
}

static int command_id(int older)
{
	static const unsigned char ids[KVM_NUM_MESSAGES] = {
		[KVMI_GET_VERSION] = KVMI_CMD_GET_VERSION,
		[KVMI_CHECK_COMMAND] = KVMI_CMD_VM_CHECK_COMMAND,
		[KVMI_CHECK_EVENT] = KVMI_CMD_VM_CHECK_EVENT,
		[KVMI_GET_GUEST_INFO] = KVMI_CMD_VM_GET_INFO,
		[KVMI_GET_VCPU_INFO] = KVMI_CMD_VCPU_GET_INFO,
		[KVMI_PAUSE_VCPU] = KVMI_CMD_VM_PAUSE_VCPU,
		[KVMI_CONTROL_VM_EVENTS] = KVMI_CMD_VM_CONTROL_EVENTS,
		[KVMI_CONTROL_EVENTS] = KVMI_CMD_VCPU_CONTROL_EVENTS,
		[KVMI_CONTROL_CR] = KVMI_CMD_VCPU_CONTROL_CR,
		[KVMI_CONTROL_MSR] = KVMI_CMD_VCPU_CONTROL_MSR,
		[KVMI_GET_REGISTERS] = KVMI_CMD_VCPU_GET_REGISTERS,
		[KVMI_SET_REGISTERS] = KVMI_CMD_VCPU_SET_REGISTERS,
		[KVMI_GET_CPUID] = KVMI_CMD_VCPU_GET_CPUID,
		[KVMI_GET_XSAVE] = KVMI_CMD_VCPU_GET_XSAVE,
		[KVMI_READ_PHYSICAL] = KVMI_CMD_VM_READ_PHYSICAL,
		[KVMI_WRITE_PHYSICAL] = KVMI_CMD_VM_WRITE_PHYSICAL,
		[KVMI_INJECT_EXCEPTION] = KVMI_CMD_VCPU_INJECT_EXCEPTION,
		[KVMI_GET_PAGE_ACCESS] = KVMI_CMD_VM_GET_PAGE_ACCESS,
		[KVMI_SET_PAGE_ACCESS] = KVMI_CMD_VM_SET_PAGE_ACCESS,
		[KVMI_GET_MTRR_TYPE] = KVMI_CMD_VCPU_GET_MTRR_TYPE,
		[KVMI_GET_MAX_GFN] = KVMI_CMD_VM_GET_MAX_GFN,
		[KVMI_VCPU_TRANSLATE_GVA] = KVMI_CMD_VCPU_TRANSLATE_GVA,
		[KVMI_VCPU_GET_XCR] = KVMI_CMD_VCPU_GET_XCR,
		[KVMI_VCPU_SET_XSAVE] = KVMI_CMD_VCPU_SET_XSAVE,
		[KVMI_VCPU_CONTROL_SINGLESTEP] =
			KVMI_CMD_VCPU_CONTROL_SINGLESTEP,
	};

	return older < 0 || older >= KVM_NUM_MESSAGES ? 0 : ids[older];
}

int kvmi_get_version(void *context, unsigned int *version)
{
	struct dom *dom = context;

	*version = kvmi_vm_get_version(dom->vm)->version;

	return 0;
}

static int no_support(bool *supported)
{
	*supported = false;

	return 0;
}

int kvmi_spp_support(void *dom, bool *supported)
{
	(void)dom;
	return no_support(supported);
}

int kvmi_ve_support(void *dom, bool *supported)
{
	(void)dom;
	return no_support(supported);
}

int kvmi_vmfunc_support(void *dom, bool *supported)
{
	(void)dom;
	return no_support(supported);
}

int kvmi_eptp_support(void *dom, bool *supported)
{
	(void)dom;
	return no_support(supported);
}

int kvmi_check_command(void *context, int id)
{
	struct dom *dom = context;
	struct kvmi_error err;
	int newer = command_id(id);

	if (!newer)
		return fails(ENOENT);

	return done(dom, kvmi_vm_check_command(dom->vm, newer, &err), &err);
}

int kvmi_check_event(void *context, int id)
{
	struct dom *dom = context;
	struct kvmi_error err;
	int newer = event_id(id);

	if (newer < 0)
		return fails(ENOENT);

	return done(dom, kvmi_vm_check_event(dom->vm, newer, &err), &err);
}

int kvmi_control_events(void *context, unsigned short vcpu, int id, bool enable)
{
	struct dom *dom = context;
	int newer = event_id(id);
	enum kvmi_status status;
	struct kvmi_error err;
	struct vcpu *v;

	if (newer < 0)
		return enable ? fails(EOPNOTSUPP) : 0;

	status = kvmi_vcpu_control_events(dom->vm, vcpu, newer, enable, &err);
	if (status == KVMI_OK) {
		dom_lock(dom);
		v = dom_vcpu(dom, vcpu);
		if (v && newer == KVMI_EV_TRAP)
			v->traps = enable;
		else if (v && newer == KVMI_EV_BREAKPOINT)
			v->breakpoints = enable;
		dom_unlock(dom);
	}

	return done(dom, status, &err);
}

int kvmi_control_vm_events(void *context, int id, bool enable)
{
	struct dom *dom = context;
	enum kvmi_status status = KVMI_OK;
	struct kvmi_error err;

	if (id != KVMI_EVENT_UNHOOK)
		return fails(event_id(id) < 0 ? ENOENT : EINVAL);

	/* it stays on: without the tool, the library answers */
	if (enable)
		status = kvmi_vm_control_events(dom->vm, KVMI_EV_UNHOOK, true,
						&err);
	if (status == KVMI_OK)
		atomic_store(&dom->wants_unhook, enable);

	return done(dom, status, &err);
}

int kvmi_control_cr(void *context, unsigned short vcpu, unsigned int cr,
		    bool enable)
{
	struct dom *dom = context;
	struct kvmi_error err;

	return done(dom, kvmi_vcpu_control_cr(dom->vm, vcpu, cr, enable, &err),
		    &err);
}

int kvmi_control_msr(void *context, unsigned short vcpu, unsigned int msr,
		     bool enable)
{
	struct dom *dom = context;
	struct kvmi_error err;

	return done(dom, kvmi_vcpu_control_msr(dom->vm, vcpu, msr, enable, &err),
		    &err);
}

int kvmi_control_singlestep(void *context, unsigned short vcpu, bool enable)
{
	enum kvmi_status status = KVMI_OK;
	struct dom *dom = context;
	struct kvmi_error err;
	struct vcpu *v;

	dom_lock(dom);
	v = dom_vcpu(dom, vcpu);
	/* a step that the library makes is to be finished */
	if (!v || !v->passing)
		status = kvmi_vcpu_control_singlestep(dom->vm, vcpu, enable,
						      &err);
	if (v && status == KVMI_OK)
		v->stepping = enable;
	dom_unlock(dom);

	return done(dom, status, &err);
}

int kvmi_translate_gva(void *context, unsigned short vcpu, __u64 gva,
		       __u64 *gpa)
{
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;
	uint64_t value = 0;

	status = kvmi_vcpu_translate(dom->vm, vcpu, gva, &value, &err);
	if (status == KVMI_ERR_UNMAPPED) {
		status = KVMI_OK;
		value = UINT64_MAX;
	}
	if (status == KVMI_OK)
		*gpa = value;

	return done(dom, status, &err);
}

/* KVMI_ERR_SYSTEM would be taken for the end of the connection */
static enum kvmi_status no_memory(struct kvmi_error *err)
{
	*err = (struct kvmi_error){
		.status = KVMI_ERR_NO_MEMORY, .message = "out of memory",
	};

	return err->status;
}

static enum kvmi_status pause_vcpus(struct dom *dom, const uint16_t *vcpus,
				    size_t count, bool wait,
				    struct kvmi_error *err)
{
	enum kvmi_status *each = calloc(count, sizeof(*each));
	enum kvmi_status status;
	size_t i;

	if (!each)
		return no_memory(err);
	for (i = 0; i < count; i++)
		dom_pause_asked(dom, vcpus[i], 1);
	status = kvmi_vm_pause_vcpus(dom->vm, vcpus, count, wait, each, err);
	for (i = 0; i < count; i++)
		if (each[i] != KVMI_OK && each[i] != KVMI_ERR_TIMEOUT)
			dom_pause_asked(dom, vcpus[i], -1);
	free(each);

	return status;
}

int kvmi_pause_all_vcpus(void *context, unsigned int count)
{
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;
	uint16_t *vcpus;
	unsigned int i;

	if (!count)
		return 0;
	if (count > UINT16_MAX)
		return fails(EINVAL);
	vcpus = calloc(count, sizeof(*vcpus));
	if (!vcpus)
		return -1;
	for (i = 0; i < count; i++)
		vcpus[i] = i;
	status = pause_vcpus(dom, vcpus, count, true, &err);
	free(vcpus);

	return done(dom, status, &err);
}

static enum kvmi_status page_access(struct dom *dom,
				    const struct kvmi_page_access *pages,
				    size_t count, struct kvmi_error *err)
{
	return kvmi_vm_set_page_access(dom->vm, pages, count, err);
}

/* NULL and errno: cannot be done */
static struct kvmi_page_access *make_pages(const unsigned long long *gpa,
					   const unsigned char *access,
					   unsigned short count,
					   unsigned short view)
{
	struct kvmi_page_access *pages;
	unsigned int i;

	if (view) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	pages = calloc(count + 1, sizeof(*pages));
	for (i = 0; pages && i < count; i++) {
		if (access[i] & ~KVMI_PAGE_RWX) {
			free(pages);
			errno = EINVAL;
			return NULL;
		}
		pages[i].gpa = gpa[i];
		pages[i].access = access[i];
	}

	return pages;
}

int kvmi_set_page_access(void *context, unsigned long long *gpa,
			 unsigned char *access, unsigned short count,
			 unsigned short view)
{
	struct kvmi_page_access *pages = make_pages(gpa, access, count, view);
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;

	if (!pages)
		return -1;
	status = page_access(dom, pages, count, &err);
	free(pages);

	return done(dom, status, &err);
}

int kvmi_get_vcpu_count(void *context, unsigned int *count)
{
	struct dom *dom = context;
	struct kvmi_error err;

	return done(dom, kvmi_vm_get_vcpu_count(dom->vm, count, &err), &err);
}

int kvmi_get_tsc_speed(void *context, unsigned long long *speed)
{
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;
	uint64_t hz;

	status = kvmi_vcpu_get_tsc_speed(dom->vm, 0, &hz, &err);
	if (status == KVMI_OK)
		*speed = hz;

	return done(dom, status, &err);
}

int kvmi_get_cpuid(void *context, unsigned short vcpu, unsigned int function,
		   unsigned int index, unsigned int *eax, unsigned int *ebx,
		   unsigned int *ecx, unsigned int *edx)
{
	struct dom *dom = context;
	struct kvmi_cpuid cpuid;
	enum kvmi_status status;
	struct kvmi_error err;

	status = kvmi_vcpu_get_cpuid(dom->vm, vcpu, function, index, &cpuid,
				     &err);
	if (status == KVMI_OK) {
		*eax = cpuid.eax;
		*ebx = cpuid.ebx;
		*ecx = cpuid.ecx;
		*edx = cpuid.edx;
	}

	return done(dom, status, &err);
}

int kvmi_get_mtrr_type(void *context, unsigned long long gpa,
		       unsigned char *type)
{
	struct dom *dom = context;
	struct kvmi_error err;

	return done(dom, kvmi_vcpu_get_mtrr_type(dom->vm, 0, gpa, type, &err),
		    &err);
}

int kvmi_get_xcr(void *context, unsigned short vcpu, __u8 xcr, __u64 *value)
{
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;
	uint64_t got;

	status = kvmi_vcpu_get_xcr(dom->vm, vcpu, xcr, &got, &err);
	if (status == KVMI_OK)
		*value = got;

	return done(dom, status, &err);
}

int kvmi_get_xsave(void *context, unsigned short vcpu, void *buffer,
		   size_t size)
{
	unsigned char xsave[KVMI_XSAVE_SIZE];
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;

	status = kvmi_vcpu_get_xsave(dom->vm, vcpu, xsave, &err);
	if (status == KVMI_OK) {
		size_t part = size < sizeof(xsave) ? size : sizeof(xsave);

		memcpy(buffer, xsave, part);
		memset((char *)buffer + part, 0, size - part);
	}

	return done(dom, status, &err);
}

int kvmi_set_xsave(void *context, unsigned short vcpu, const void *buffer,
		   size_t size)
{
	unsigned char xsave[KVMI_XSAVE_SIZE] = { 0 };
	struct dom *dom = context;
	struct kvmi_error err;

	if (size > sizeof(xsave))
		return fails(E2BIG);
	memcpy(xsave, buffer, size);

	return done(dom, kvmi_vcpu_set_xsave(dom->vm, vcpu, xsave, &err), &err);
}

int kvmi_inject_exception(void *context, unsigned short vcpu,
			  unsigned long long gva, unsigned int error,
			  unsigned char vector)
{
	struct dom *dom = context;
	struct kvmi_error err;

	return done(dom, kvmi_vcpu_inject_exception(dom->vm, vcpu, vector, error,
						    gva, &err), &err);
}

/* ------------------------------------------------------------------------
 * Memory.  The library remembers INT3s that the tool writes over something
 * else, to be able to take them out again.
 */

int kvmi_read_physical(void *context, unsigned long long gpa, void *buffer,
		       size_t size)
{
	struct dom *dom = context;
	struct kvmi_error err;

	return done(dom, kvmi_vm_read_physical(dom->vm, gpa, buffer, size, &err),
		    &err);
}

/* Where gpa is in the list, or would be */
static size_t find(const struct dom *dom, uint64_t gpa)
{
	size_t low = 0, high = dom->planted_count;

	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (dom->planted[middle].gpa < gpa)
			low = middle + 1;
		else
			high = middle;
	}

	return low;
}

static bool is_planted(const struct dom *dom, size_t at, uint64_t gpa)
{
	return at < dom->planted_count && dom->planted[at].gpa == gpa;
}

static bool make_room(struct dom *dom, size_t more)
{
	size_t capacity = dom->planted_count + more;
	struct planted *planted;

	if (capacity <= dom->planted_capacity)
		return true;
	capacity += capacity / 2 + 16;
	planted = realloc(dom->planted, capacity * sizeof(*planted));
	if (!planted)
		return false;
	dom->planted = planted;
	dom->planted_capacity = capacity;

	return true;
}

static void remember(struct dom *dom, uint64_t gpa, const uint8_t *old,
		     const uint8_t *new, size_t size)
{
	size_t i, at;

	for (i = 0; i < size; i++) {
		at = find(dom, gpa + i);
		if (is_planted(dom, at, gpa + i)) {
			if (new[i] == INT3)
				continue;
			dom->planted_count--;
			memmove(&dom->planted[at], &dom->planted[at + 1],
				(dom->planted_count - at) *
				sizeof(*dom->planted));
		} else if (new[i] == INT3 && old && old[i] != INT3) {
			memmove(&dom->planted[at + 1], &dom->planted[at],
				(dom->planted_count - at) *
				sizeof(*dom->planted));
			dom->planted[at] = (struct planted){ gpa + i, old[i] };
			dom->planted_count++;
		}
	}
}

static enum kvmi_status write_memory(struct dom *dom, uint64_t gpa,
				     const uint8_t *data, size_t size,
				     struct kvmi_error *err)
{
	enum kvmi_status status;
	uint8_t *old = NULL;
	size_t int3s = 0, i;

	for (i = 0; i < size; i++)
		int3s += data[i] == INT3;
	if (int3s) {
		old = malloc(size);
		if (!old || !make_room(dom, int3s)) {
			free(old);
			return no_memory(err);
		}
		status = kvmi_vm_read_physical(dom->vm, gpa, old, size, err);
		if (status != KVMI_OK) {
			free(old);
			return status;
		}
	}
	status = kvmi_vm_write_physical(dom->vm, gpa, data, size, err);
	/*
	 * A failure may have come after a part of it; the INT3s that have not
	 * been written will not be found there.
	 */
	if (status == KVMI_OK || int3s)
		remember(dom, gpa, old, data, size);
	free(old);

	return status;
}

int kvmi_write_physical(void *context, unsigned long long gpa,
			const void *buffer, size_t size)
{
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;

	pthread_mutex_lock(&dom->request);
	status = write_memory(dom, gpa, buffer, size, &err);
	pthread_mutex_unlock(&dom->request);

	return done(dom, status, &err);
}

/* ------------------------------------------------------------------------
 * Registers
 */

int kvmi_get_registers(void *context, unsigned short vcpu,
		       struct kvm_regs *regs, struct kvm_sregs *sregs,
		       struct kvm_msrs *msrs, unsigned int *mode)
{
	uint32_t numbers[KVMI_MSRS_MAX];
	uint64_t values[KVMI_MSRS_MAX];
	struct kvmi_registers state;
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;
	unsigned int i;

	if (msrs->nmsrs > KVMI_MSRS_MAX)
		return fails(E2BIG);
	for (i = 0; i < msrs->nmsrs; i++)
		numbers[i] = msrs->entries[i].index;
	status = kvmi_vcpu_get_registers(dom->vm, vcpu, &state, numbers, values,
					 msrs->nmsrs, &err);
	if (status == KVMI_OK) {
		for (i = 0; i < msrs->nmsrs; i++)
			msrs->entries[i].data = values[i];
		*regs = state.regs;
		*sregs = state.sregs;
		*mode = state.mode;
	}

	return done(dom, status, &err);
}

/* A vCPU whose PAUSE event is due takes registers only when that has come */
static bool awaits_pause(struct dom *dom, unsigned int vcpu)
{
	int tries = PAUSE_WAIT_MS / 10;
	bool due, open;

	do {
		dom_lock(dom);
		due = vcpu < dom->vcpu_count && dom->vcpus[vcpu].pauses_due;
		open = vcpu < dom->vcpu_count && dom->vcpus[vcpu].is_open;
		dom_unlock(dom);
		if (open || !due)
			return open;
		dom_wait(dom, 10);
	} while (--tries);

	return false;
}

static enum kvmi_status set_registers(struct dom *dom, unsigned int vcpu,
				      const struct kvm_regs *regs,
				      struct kvmi_error *err)
{
	enum kvmi_status status;

	status = kvmi_vcpu_set_registers(dom->vm, vcpu, regs, err);
	if (status == KVMI_ERR_NOT_SUPPORTED && awaits_pause(dom, vcpu))
		status = kvmi_vcpu_set_registers(dom->vm, vcpu, regs, err);

	return status;
}

int kvmi_set_registers(void *context, unsigned short vcpu,
		       const struct kvm_regs *regs)
{
	struct dom *dom = context;
	enum kvmi_status status;
	struct kvmi_error err;

	status = set_registers(dom, vcpu, regs, &err);

	return done(dom, status, &err);
}

int kvmi_get_maximum_gfn(void *context, unsigned long long *gfn)
{
	struct dom *dom = context;
	uint64_t end = kvmi_vm_get_hello(dom->vm)->max_gpa / 4096, last;
	enum kvmi_status status = KVMI_OK;
	struct kvmi_error err;

	/* one past the last */
	if (!end) {
		status = kvmi_vm_get_max_gfn(dom->vm, &last, &err);
		if (status == KVMI_OK)
			end = last + 1;
	}
	if (status == KVMI_OK)
		*gfn = end;

	return done(dom, status, &err);
}

/* ------------------------------------------------------------------------
 * What there is not
 */

int kvmi_get_next_available_gfn(void *dom, unsigned long long *gfn)
{
	(void)dom, (void)gfn;
	return fails(ENOSYS);
}

int kvmi_set_page_write_bitmap(void *dom, __u64 *gpa, __u32 *bitmap,
			       unsigned short count)
{
	(void)dom, (void)gpa, (void)bitmap, (void)count;
	return fails(ENOSYS);
}

int kvmi_set_ve_info_page(void *dom, unsigned short vcpu,
			  unsigned long long gpa)
{
	(void)dom, (void)vcpu, (void)gpa;
	return fails(ENOSYS);
}

int kvmi_disable_ve(void *dom, unsigned short vcpu)
{
	(void)dom, (void)vcpu;
	return fails(ENOSYS);
}

/* There is one view, number 0 */
int kvmi_switch_ept_view(void *dom, unsigned short vcpu, unsigned short view)
{
	(void)dom, (void)vcpu;
	return view ? fails(ENOSYS) : 0;
}

int kvmi_get_ept_view(void *dom, unsigned short vcpu, unsigned short *view)
{
	(void)dom, (void)vcpu;
	*view = 0;

	return 0;
}

int kvmi_control_ept_view(void *dom, unsigned short vcpu, unsigned short view,
			  bool visible)
{
	(void)dom, (void)vcpu, (void)view, (void)visible;
	return fails(ENOSYS);
}

int kvmi_create_ept_view(void *dom, unsigned short *view)
{
	(void)dom, (void)view;
	return fails(ENOSYS);
}

int kvmi_destroy_ept_view(void *dom, unsigned short view)
{
	(void)dom, (void)view;
	return fails(ENOSYS);
}

int kvmi_set_ept_page_conv(void *dom, unsigned short index,
			   unsigned long long gpa, bool sve)
{
	(void)dom, (void)index, (void)gpa, (void)sve;
	return fails(ENOSYS);
}

int kvmi_get_ept_page_conv(void *dom, unsigned short index,
			   unsigned long long gpa, bool *sve)
{
	(void)dom, (void)index, (void)gpa, (void)sve;
	return fails(ENOSYS);
}

int kvmi_change_gfn(void *dom, unsigned short vcpu, unsigned short view,
		    __u64 old_gfn, __u64 new_gfn)
{
	(void)dom, (void)vcpu, (void)view, (void)old_gfn, (void)new_gfn;
	return fails(ENOSYS);
}

int kvmi_alloc_gfn(void *dom, __u64 gfn)
{
	(void)dom, (void)gfn;
	return fails(ENOSYS);
}

int kvmi_free_gfn(void *dom, __u64 gfn)
{
	(void)dom, (void)gfn;
	return fails(ENOSYS);
}

int kvmi_shutdown_guest(void *dom)
{
	(void)dom;
	return fails(ENOSYS);
}

int kvmi_memory_mapping(void *dom, bool enable)
{
	(void)dom;
	return enable ? fails(ENOENT) : 0;
}

void *kvmi_map_physical_page(void *dom, unsigned long long gpa)
{
	(void)dom, (void)gpa;
	errno = ENOSYS;

	return MAP_FAILED;
}

int kvmi_unmap_physical_page(void *dom, void *address)
{
	(void)dom;
	return fails(address ? ENXIO : EINVAL);
}

bool kvmi_remote_mapping_v2(void)
{
	return false;
}

/* ------------------------------------------------------------------------
 * Batches
 */

struct entry {
	struct entry *next;
	enum { REGISTERS, PAUSE, PAGES, REPLY } kind;
	uint16_t vcpu;
	unsigned int seq;
	size_t size;		/* of data, in bytes */
	uint64_t data[];
};

struct batch {
	struct dom *dom;
	struct entry *first;
	struct entry **last;
	size_t bytes;
	int error;		/* of what has been carried out early */
};

void *kvmi_batch_alloc(void *dom)
{
	struct batch *batch = calloc(1, sizeof(*batch));

	if (!batch)
		return NULL;
	batch->dom = dom;
	batch->last = &batch->first;

	return batch;
}

static void empty(struct batch *batch)
{
	struct entry *entry;

	while ((entry = batch->first)) {
		batch->first = entry->next;
		free(entry);
	}
	batch->last = &batch->first;
	batch->bytes = 0;
}

void kvmi_batch_free(void *context)
{
	struct batch *batch = context;

	if (!batch)
		return;
	empty(batch);
	free(batch);
}

static int carry_out(struct dom *dom, const struct entry *entry)
{
	enum kvmi_status status = KVMI_OK;
	struct kvm_regs regs;
	struct kvmi_error err;

	switch (entry->kind) {
	case REGISTERS:
		memcpy(&regs, entry->data, sizeof(regs));
		status = set_registers(dom, entry->vcpu, &regs, &err);
		break;
	case PAUSE:
		status = pause_vcpus(dom, &entry->vcpu, 1, false, &err);
		break;
	case PAGES:
		status = page_access(dom, (const void *)entry->data,
				     entry->size /
				     sizeof(struct kvmi_page_access), &err);
		break;
	case REPLY:
		return kvmi_reply_event(dom, entry->seq, entry->data,
					entry->size);
	}

	return result(dom, status, &err);
}

/* Returns the first error, after having tried all */
static int carry_all_out(struct batch *batch)
{
	const struct entry *entry;
	int error = 0;

	for (entry = batch->first; entry; entry = entry->next)
		if (carry_out(batch->dom, entry) && !error)
			error = errno;
	dom_look(batch->dom);

	return error;
}

static int add(struct batch *batch, int kind, unsigned int vcpu,
	       unsigned int seq, const void *data, size_t size)
{
	struct entry *entry;

	if (size > BATCH_BYTES)
		return fails(E2BIG);
	if (batch->bytes + size > BATCH_BYTES) {
		int error = carry_all_out(batch);

		if (error && !batch->error)
			batch->error = error;
		empty(batch);
	}
	entry = malloc(sizeof(*entry) + size);
	if (!entry)
		return -1;
	*entry = (struct entry){ .kind = kind, .vcpu = vcpu, .seq = seq,
				 .size = size };
	if (size)
		memcpy(entry->data, data, size);
	*batch->last = entry;
	batch->last = &entry->next;
	batch->bytes += sizeof(*entry) + size;

	return 0;
}

int kvmi_queue_registers(void *batch, unsigned short vcpu,
			 const struct kvm_regs *regs)
{
	return add(batch, REGISTERS, vcpu, 0, regs, sizeof(*regs));
}

int kvmi_queue_pause_vcpu(void *batch, unsigned short vcpu)
{
	return add(batch, PAUSE, vcpu, 0, NULL, 0);
}

int kvmi_queue_page_access(void *batch, unsigned long long *gpa,
			   unsigned char *access, unsigned short count,
			   unsigned short view)
{
	struct kvmi_page_access *pages = make_pages(gpa, access, count, view);
	int ret;

	if (!pages)
		return -1;
	ret = add(batch, PAGES, 0, 0, pages, count * sizeof(*pages));
	free(pages);

	return ret;
}

int kvmi_queue_spp_access(void *batch, __u64 *gpa, __u32 *bitmap, __u16 view,
			  __u16 count)
{
	(void)batch, (void)gpa, (void)bitmap, (void)view, (void)count;
	return fails(ENOSYS);
}

int kvmi_queue_reply_event(void *batch, unsigned int seq, const void *data,
			   size_t data_size)
{
	if (!data || data_size < 16)
		return fails(EINVAL);

	return add(batch, REPLY, 0, seq, data, data_size);
}

int kvmi_batch_commit(void *context)
{
	struct batch *batch = context;
	int error = carry_all_out(batch);

	if (batch->error)
		error = batch->error;
	batch->error = 0;

	return error ? fails(error) : 0;
}
