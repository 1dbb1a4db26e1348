// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: the commands to the VM, carried out by the receive thread
 */
#include "kvmi_int.h"

/*
 * A command's handler returns 0 or a negative KVM_E*; the request has at least
 * the size that the table below gives.  rpl has room for KVMI_MAX_REPLY_SIZE
 * bytes, is not initialised, and *rpl_size is 0.
 */
struct kvmi_vm_cmd {
	int (*handler)(struct kvm_introspection *kvmi, const void *req,
		       size_t req_size, void *rpl, size_t *rpl_size);
	size_t min_size;
};

static int kvmi_get_version(struct kvm_introspection *kvmi, const void *req,
			    size_t req_size, void *_rpl, size_t *rpl_size)
{
	struct kvmi_get_version_reply *rpl = _rpl;

	memset(rpl, 0, sizeof(*rpl));
	rpl->version = KVMI_VERSION;
	rpl->max_msg_size = KVMI_MAX_MSG_SIZE;
	rpl->features.get_page_access = 1;
	rpl->features.get_max_gfn = 1;
	rpl->features.journal = 1;
	rpl->features.set_sregs = 1;
	rpl->features.set_msrs = 1;
	rpl->features.singlestep = kvmi_arch_has_singlestep();

	*rpl_size = sizeof(*rpl);
	return 0;
}

static int kvmi_vm_check_command(struct kvm_introspection *kvmi,
				 const void *_req, size_t req_size,
				 void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_check_command *req = _req;

	if (req->padding1 || req->padding2)
		return -KVM_EINVAL;
	if (!kvmi_vm_command_known(req->id) &&
	    !kvmi_vcpu_command_known(req->id))
		return -KVM_ENOENT;
	if (!test_bit(req->id, kvmi->cmd_allow))
		return -KVM_EPERM;

	return 0;
}

static bool kvmi_vm_event_known(u16 id)
{
	return id == KVMI_VM_EVENT_UNHOOK;
}

static int kvmi_vm_check_event(struct kvm_introspection *kvmi,
			       const void *_req, size_t req_size,
			       void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_check_event *req = _req;

	if (req->padding1 || req->padding2)
		return -KVM_EINVAL;
	if (!kvmi_vm_event_known(req->id) && !kvmi_vcpu_event_known(req->id))
		return -KVM_ENOENT;
	if (!test_bit(req->id, kvmi->event_allow))
		return -KVM_EPERM;

	return 0;
}

static int kvmi_vm_get_info(struct kvm_introspection *kvmi, const void *req,
			    size_t req_size, void *_rpl, size_t *rpl_size)
{
	struct kvmi_vm_get_info_reply *rpl = _rpl;

	memset(rpl, 0, sizeof(*rpl));
	rpl->vcpu_count = atomic_read(&kvmi->kvm->online_vcpus);

	*rpl_size = sizeof(*rpl);
	return 0;
}

static int kvmi_vm_control_events(struct kvm_introspection *kvmi,
				  const void *_req, size_t req_size,
				  void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_control_events *req = _req;

	if (req->padding1 || req->padding2 || req->enable > 1)
		return -KVM_EINVAL;
	if (!kvmi_vm_event_known(req->event_id))
		return -KVM_EINVAL;
	if (!test_bit(req->event_id, kvmi->event_allow))
		return -KVM_EPERM;

	assign_bit(req->event_id, kvmi->vm_events, req->enable);
	return 0;
}

static bool kvmi_inside_page(u64 gpa, size_t size)
{
	return size && offset_in_page(gpa) + size <= PAGE_SIZE;
}

static int kvmi_vm_read_physical(struct kvm_introspection *kvmi,
				 const void *_req, size_t req_size,
				 void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_read_physical *req = _req;
	struct kvm *kvm = kvmi->kvm;
	gfn_t gfn = gpa_to_gfn(req->gpa);
	int err, idx;

	if (req->padding1 || req->padding2 ||
	    !kvmi_inside_page(req->gpa, req->size))
		return -KVM_EINVAL;

	/* What is mapped here of a private page is not what the guest sees */
	if (kvm_mem_is_private(kvm, gfn))
		return -KVM_ENOENT;

	idx = srcu_read_lock(&kvm->srcu);
	err = kvm_read_guest_page(kvm, gfn, rpl, offset_in_page(req->gpa),
				  req->size);
	srcu_read_unlock(&kvm->srcu, idx);
	if (err)
		return -KVM_ENOENT;

	*rpl_size = req->size;
	return 0;
}

static int kvmi_vm_write_physical(struct kvm_introspection *kvmi,
				  const void *_req, size_t req_size,
				  void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_write_physical *req = _req;
	struct kvm *kvm = kvmi->kvm;
	int err, idx;

	if (req->flags & ~(KVMI_WRITE_JOURNAL | KVMI_WRITE_KEEP) ||
	    req->flags == (KVMI_WRITE_JOURNAL | KVMI_WRITE_KEEP) ||
	    req->padding2 || !kvmi_inside_page(req->gpa, req->size))
		return -KVM_EINVAL;
	if (req_size < struct_size(req, data, req->size))
		return -KVM_EINVAL;

	idx = srcu_read_lock(&kvm->srcu);
	/* There is no reply, so there is room for what is overwritten */
	err = kvmi_write_guest(kvmi, req->gpa, req->data, req->size,
			       req->flags, rpl);
	srcu_read_unlock(&kvm->srcu, idx);

	return err;
}

static int kvmi_vm_pause_vcpu(struct kvm_introspection *kvmi,
			      const void *_req, size_t req_size,
			      void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_pause_vcpu *req = _req;
	struct kvm_vcpu *vcpu;

	if (req->padding1 || req->padding2 || req->wait > 1)
		return -KVM_EINVAL;
	if (!test_bit(KVMI_VCPU_EVENT_PAUSE, kvmi->event_allow))
		return -KVM_EPERM;

	vcpu = kvm_get_vcpu(kvmi->kvm, req->vcpu);
	if (!vcpu)
		return -KVM_EINVAL;
	if (!kvmi_vcpu_get(vcpu))
		return -KVM_ENOMEM;

	return kvmi_vcpu_pause(vcpu, req->wait);
}

static int kvmi_vm_control_cleanup(struct kvm_introspection *kvmi,
				   const void *_req, size_t req_size,
				   void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_control_cleanup *req = _req;

	if (memchr_inv(req->padding, 0, sizeof(req->padding)) ||
	    req->enable > 1)
		return -KVM_EINVAL;

	assign_bit(kvmi_cleanup_bit(atomic_read(&kvmi->session)),
		   &kvmi->no_cleanup, !req->enable);
	return 0;
}

static int kvmi_vm_set_page_access(struct kvm_introspection *kvmi,
				   const void *_req, size_t req_size,
				   void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_set_page_access *req = _req;

	if (req->padding1 || req->padding2)
		return -KVM_EINVAL;
	if (req_size < struct_size(req, entries, req->count))
		return -KVM_EINVAL;

	return kvmi_arch_set_page_access(kvmi, req->entries, req->count);
}

static int kvmi_vm_get_page_access(struct kvm_introspection *kvmi,
				   const void *_req, size_t req_size,
				   void *_rpl, size_t *rpl_size)
{
	const struct kvmi_vm_get_page_access *req = _req;
	struct kvmi_vm_get_page_access_reply *rpl = _rpl;
	gfn_t gfn = gpa_to_gfn(req->gpa);
	bool visible;
	int idx;

	idx = srcu_read_lock(&kvmi->kvm->srcu);
	visible = kvm_is_visible_gfn(kvmi->kvm, gfn);
	srcu_read_unlock(&kvmi->kvm->srcu, idx);
	if (!visible)
		return -KVM_ENOENT;

	memset(rpl, 0, sizeof(*rpl));
	rpl->access = kvmi_arch_get_page_access(kvmi, gfn);

	*rpl_size = sizeof(*rpl);
	return 0;
}

static int kvmi_vm_get_max_gfn(struct kvm_introspection *kvmi, const void *req,
			       size_t req_size, void *_rpl, size_t *rpl_size)
{
	struct kvmi_vm_get_max_gfn_reply *rpl = _rpl;
	struct kvm_memory_slot *slot;
	struct kvm_memslots *slots;
	int idx, bkt;

	rpl->gfn = 0;

	idx = srcu_read_lock(&kvmi->kvm->srcu);
	/* Read once: the loop takes its argument more than once. */
	slots = kvm_memslots(kvmi->kvm);
	kvm_for_each_memslot(slot, bkt, slots) {
		if (kvm_is_visible_memslot(slot))
			rpl->gfn = max_t(gfn_t, rpl->gfn,
					 slot->base_gfn + slot->npages - 1);
	}
	srcu_read_unlock(&kvmi->kvm->srcu, idx);

	*rpl_size = sizeof(*rpl);
	return 0;
}

#define KVMI_VM_CMD(_id, _handler, _size) \
	[_id] = { .handler = (_handler), .min_size = (_size) }

static const struct kvmi_vm_cmd kvmi_vm_cmds[] = {
	KVMI_VM_CMD(KVMI_GET_VERSION, kvmi_get_version, 0),
	KVMI_VM_CMD(KVMI_VM_CHECK_COMMAND, kvmi_vm_check_command,
		    sizeof(struct kvmi_vm_check_command)),
	KVMI_VM_CMD(KVMI_VM_CHECK_EVENT, kvmi_vm_check_event,
		    sizeof(struct kvmi_vm_check_event)),
	KVMI_VM_CMD(KVMI_VM_GET_INFO, kvmi_vm_get_info, 0),
	KVMI_VM_CMD(KVMI_VM_CONTROL_EVENTS, kvmi_vm_control_events,
		    sizeof(struct kvmi_vm_control_events)),
	KVMI_VM_CMD(KVMI_VM_READ_PHYSICAL, kvmi_vm_read_physical,
		    sizeof(struct kvmi_vm_read_physical)),
	KVMI_VM_CMD(KVMI_VM_WRITE_PHYSICAL, kvmi_vm_write_physical,
		    sizeof(struct kvmi_vm_write_physical)),
	KVMI_VM_CMD(KVMI_VM_PAUSE_VCPU, kvmi_vm_pause_vcpu,
		    sizeof(struct kvmi_vm_pause_vcpu)),
	KVMI_VM_CMD(KVMI_VM_CONTROL_CLEANUP, kvmi_vm_control_cleanup,
		    sizeof(struct kvmi_vm_control_cleanup)),
	KVMI_VM_CMD(KVMI_VM_SET_PAGE_ACCESS, kvmi_vm_set_page_access,
		    sizeof(struct kvmi_vm_set_page_access)),
	KVMI_VM_CMD(KVMI_VM_GET_PAGE_ACCESS, kvmi_vm_get_page_access,
		    sizeof(struct kvmi_vm_get_page_access)),
	KVMI_VM_CMD(KVMI_VM_GET_MAX_GFN, kvmi_vm_get_max_gfn, 0),
};

bool kvmi_vm_command_known(u16 id)
{
	return id < ARRAY_SIZE(kvmi_vm_cmds) && kvmi_vm_cmds[id].handler;
}

int kvmi_vm_command(struct kvm_introspection *kvmi,
		    const struct kvmi_msg_hdr *hdr, const void *req,
		    void *rpl, size_t *rpl_size)
{
	const struct kvmi_vm_cmd *cmd = &kvmi_vm_cmds[hdr->id];

	if (hdr->size < cmd->min_size)
		return -KVM_EINVAL;

	return cmd->handler(kvmi, req, hdr->size, rpl, rpl_size);
}
