// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: the life of a session, and the ioctls that rule it
 */
#include <linux/bitmap.h>
#include <linux/moduleparam.h>
#include <linux/sched/vhost_task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>
#include <net/sock.h>

#include "kvmi_int.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

static bool __read_mostly enable_introspection;
module_param_named(introspection, enable_introspection, bool, 0444);

static const u16 kvmi_always_allowed[] = {
	KVMI_GET_VERSION,
	KVMI_VM_CHECK_COMMAND,
	KVMI_VM_CHECK_EVENT,
};

int kvmi_check_extension(void)
{
	return enable_introspection ? KVMI_VERSION : 0;
}

/* Made when the VM is hooked for the first time, freed with the VM */
static struct kvm_introspection *kvmi_get(struct kvm *kvm)
{
	struct kvm_introspection *kvmi = READ_ONCE(kvm->kvmi), *old;

	if (kvmi)
		return kvmi;

	kvmi = kzalloc(sizeof(*kvmi), GFP_KERNEL_ACCOUNT);
	if (!kvmi)
		return NULL;

	kvmi->kvm = kvm;
	mutex_init(&kvmi->lock);
	mutex_init(&kvmi->recv_lock);
	mutex_init(&kvmi->send_lock);
	spin_lock_init(&kvmi->waiters_lock);
	INIT_LIST_HEAD(&kvmi->waiters);
	xa_init_flags(&kvmi->page_access, XA_FLAGS_ACCOUNT);
	mutex_init(&kvmi->journal.lock);

	old = cmpxchg(&kvm->kvmi, NULL, kvmi);
	if (old) {
		kfree(kvmi);
		kvmi = old;
	}

	return kvmi;
}

/* Made when first needed, freed with the vCPU */
struct kvm_vcpu_introspection *kvmi_vcpu_get(struct kvm_vcpu *vcpu)
{
	struct kvm_vcpu_introspection *kv = READ_ONCE(vcpu->kvmi), *old;

	if (kv)
		return kv;

	kv = kzalloc(sizeof(*kv), GFP_KERNEL_ACCOUNT);
	if (!kv)
		return NULL;
	spin_lock_init(&kv->lock);
	INIT_LIST_HEAD(&kv->jobs);
	init_waitqueue_head(&kv->wq);
	INIT_LIST_HEAD(&kv->waiter);

	kv->reply = kmalloc(struct_size(kv->reply, body, KVMI_MAX_EVENT_REPLY),
			    GFP_KERNEL_ACCOUNT);
	if (!kv->reply || kvmi_out_init(&kv->out)) {
		kvmi_vcpu_free(kv);
		return NULL;
	}

	/* The vCPU's thread and the reader of the socket may both need it */
	old = cmpxchg(&vcpu->kvmi, NULL, kv);
	if (old) {
		kvmi_vcpu_free(kv);
		kv = old;
	}

	return kv;
}

void kvmi_vcpu_destroy(struct kvm_vcpu *vcpu)
{
	if (vcpu->kvmi)
		kvmi_vcpu_free(vcpu->kvmi);
	vcpu->kvmi = NULL;
}

/*
 * From here on no event is made and no command served.  The vCPUs notice,
 * let go of the events they wait with and undo their interceptions.
 */
void kvmi_session_end(struct kvm_introspection *kvmi, int session, u32 reason)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;

	if (!kvmi_session_alive(session) ||
	    atomic_cmpxchg(&kvmi->session, session, session + 1) != session)
		return;

	WRITE_ONCE(kvmi->end, reason);
	trace_kvmi_session_end(kvmi->kvm, reason);

	kvm_for_each_vcpu(i, vcpu, kvmi->kvm)
		kvmi_vcpu_wake(vcpu);

	/* Somebody who puts back what the tool has left in the guest */
	kvmi_receiver_wake(kvmi);
}

static void kvmi_reset_allowed_commands(struct kvm_introspection *kvmi)
{
	int i;

	bitmap_zero(kvmi->cmd_allow, KVMI_NUM_COMMANDS);
	for (i = 0; i < ARRAY_SIZE(kvmi_always_allowed); i++)
		set_bit(kvmi_always_allowed[i], kvmi->cmd_allow);
}

static bool kvmi_is_always_allowed(int id)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(kvmi_always_allowed); i++)
		if (kvmi_always_allowed[i] == id)
			return true;

	return false;
}

static const char *const kvmi_end_names[] = {
	[KVM_INTROSPECTION_END_UNHOOK] = "unhooked",
	[KVM_INTROSPECTION_END_CLOSED] = "the tool closed the socket",
	[KVM_INTROSPECTION_END_PROTOCOL] = "the tool broke the protocol",
	[KVM_INTROSPECTION_END_UNREAD] = "the tool didn't read",
	[KVM_INTROSPECTION_END_KILLED] = "killed",
};

static void __kvmi_unhook(struct kvm_introspection *kvmi, u32 reason)
{
	struct socket *sock = kvmi->sock;
	struct kvm_vcpu *vcpu;
	unsigned long i;

	lockdep_assert_held(&kvmi->lock);

	if (!sock)
		return;

	kvmi_session_end(kvmi, atomic_read(&kvmi->session), reason);
	kvmi_stop_listening(kvmi);
	/* Wakes whoever sleeps in the socket, and lets nobody sleep again */
	kernel_sock_shutdown(sock, SHUT_RDWR);

	/* Nobody waits for the tool now, so this doesn't either */
	mutex_lock(&kvmi->recv_lock);
	kvmi_discard(kvmi);
	mutex_lock(&kvmi->send_lock);
	kvmi->sock = NULL;
	mutex_unlock(&kvmi->send_lock);
	mutex_unlock(&kvmi->recv_lock);
	sockfd_put(sock);

	kvmi_journal_restore(kvmi, true);

	/* Without a session nothing was restricted; see kvmi_page_access() */
	xa_destroy(&kvmi->page_access);

	/* Nobody fills the queues any more; leave nothing to the next session */
	kvm_for_each_vcpu(i, vcpu, kvmi->kvm) {
		if (vcpu->kvmi)
			kvmi_vcpu_drop_queue(vcpu);
	}

	trace_kvmi_unhook(kvmi->kvm, kvmi->end, kvmi->journal.restored);
	pr_info_ratelimited("introspection of process %d ended: %s; %u bytes restored\n",
			    kvmi->kvm->userspace_pid,
			    kvmi_end_names[kvmi->end], kvmi->journal.restored);
}

/*
 * The process dies, and the receive thread with it, before or after those that
 * hold the VM's files.  The memory may outlive the process, and so would the VM
 * if its file were in flight in the socket.
 */
static void kvmi_receiver_killed(void *data)
{
	struct kvm_introspection *kvmi = data;

	mutex_lock(&kvmi->lock);
	__kvmi_unhook(kvmi, KVM_INTROSPECTION_END_KILLED);
	spin_lock_irq(&kvmi->waiters_lock);
	kvmi->receiver_killed = true;
	spin_unlock_irq(&kvmi->waiters_lock);
	mutex_unlock(&kvmi->lock);
}

/*
 * What one session leaves to the next, and the last one to the VM's end; *dead
 * is for the caller to stop, when it has let go of the lock.
 */
static int kvmi_prepare(struct kvm_introspection *kvmi,
			struct vhost_task **dead)
{
	struct vhost_task *receiver;

	lockdep_assert_held(&kvmi->lock);

	if (!kvmi->in)
		kvmi->in = kmalloc(KVMI_MSG_BUF_SIZE, GFP_KERNEL_ACCOUNT);
	if (!kvmi->in)
		return -ENOMEM;
	if (!kvmi->out.msg && kvmi_out_init(&kvmi->out))
		return -ENOMEM;
	if (kvmi->receiver && !kvmi->receiver_killed)
		return 0;

	/*
	 * A thread of this process: it sees the memory of the guest, it is
	 * accounted with the VM and it dies with it.  But for VMs of several
	 * processes that share their memory, when the one that hooked the VM
	 * dies: that ends the session (KVM_INTROSPECTION_END_KILLED), and who
	 * hooks the VM next makes another thread.
	 */
	receiver = vhost_task_create(kvmi_receiver, kvmi_receiver_killed, kvmi,
				     "kvmi-recv");
	if (IS_ERR_OR_NULL(receiver))
		return -ENOMEM;

	/* A vCPU may be about to wake the one that was killed */
	spin_lock_irq(&kvmi->waiters_lock);
	*dead = kvmi->receiver;
	kvmi->receiver = receiver;
	kvmi->receiver_killed = false;
	spin_unlock_irq(&kvmi->waiters_lock);

	vhost_task_start(receiver);
	return 0;
}

static int __kvmi_hook(struct kvm_introspection *kvmi,
		       const struct kvm_introspection_hook *hook,
		       struct vhost_task **dead)
{
	struct socket *sock;
	int err;

	lockdep_assert_held(&kvmi->lock);

	if (kvmi->sock)
		return -EEXIST;

	/* A message is a header and a body that are read one by one */
	sock = sockfd_lookup(hook->fd, &err);
	if (!sock)
		return -EINVAL;
	err = -EINVAL;
	if (sock->type != SOCK_STREAM)
		goto out_put_sock;

	err = kvmi_prepare(kvmi, dead);
	if (err)
		goto out_put_sock;

	memcpy(kvmi->uuid, hook->uuid, sizeof(kvmi->uuid));
	kvmi_reset_allowed_commands(kvmi);
	bitmap_zero(kvmi->event_allow, KVMI_NUM_EVENTS);
	bitmap_zero(kvmi->vm_events, KVMI_NUM_EVENTS);
	kvmi->flags = 0;
	clear_bit(kvmi_cleanup_bit(atomic_read(&kvmi->session) + 1),
		  &kvmi->no_cleanup);
	kvmi->journal.restored = 0;
	kvmi->end = KVM_INTROSPECTION_END_NONE;
	atomic64_set(&kvmi->nr_events, 0);

	mutex_lock(&kvmi->recv_lock);
	mutex_lock(&kvmi->send_lock);
	kvmi->sock = sock;
	kvmi->stalled = 0;
	mutex_unlock(&kvmi->send_lock);
	kvmi->nr_commands = 0;
	kvmi->in_size = 0;
	kvmi->out.size = 0;
	mutex_unlock(&kvmi->recv_lock);

	trace_kvmi_hook(kvmi->kvm);
	atomic_inc(&kvmi->session);
	kvmi_listen(kvmi);
	return 0;

out_put_sock:
	sockfd_put(sock);
	return err;
}

static int kvmi_hook(struct kvm *kvm, const struct kvm_introspection_hook *hook)
{
	struct kvm_introspection *kvmi;
	struct vhost_task *dead = NULL;
	int err;

	if (hook->padding)
		return -EINVAL;

	kvmi = kvmi_get(kvm);
	if (!kvmi)
		return -ENOMEM;

	mutex_lock(&kvmi->lock);
	err = __kvmi_hook(kvmi, hook, &dead);
	mutex_unlock(&kvmi->lock);

	/* It dies with a lock of vhost_task's, which stopping it takes, too */
	if (dead)
		vhost_task_stop(dead);

	return err;
}

static int kvmi_unhook(struct kvm *kvm)
{
	struct kvm_introspection *kvmi = READ_ONCE(kvm->kvmi);
	u32 reason = KVM_INTROSPECTION_END_UNHOOK;

	if (!kvmi)
		return 0;

	mutex_lock(&kvmi->lock);
	/* Userspace may see that the tool has gone before the receiver does */
	if (kvmi->sock &&
	    READ_ONCE(kvmi->sock->sk->sk_shutdown) & RCV_SHUTDOWN)
		reason = KVM_INTROSPECTION_END_CLOSED;
	__kvmi_unhook(kvmi, reason);
	mutex_unlock(&kvmi->lock);

	return 0;
}

static void kvmi_free(struct kvm_introspection *kvmi)
{
	if (kvmi->receiver)
		vhost_task_stop(kvmi->receiver);
	kfree(kvmi->out.msg);
	kfree(kvmi->in);
	kfree(kvmi);
}

static LLIST_HEAD(kvmi_dead);

static void kvmi_free_dead(struct work_struct *work)
{
	struct kvm_introspection *kvmi, *next;

	llist_for_each_entry_safe(kvmi, next, llist_del_all(&kvmi_dead), dead)
		kvmi_free(kvmi);
}

static DECLARE_WORK(kvmi_dead_work, kvmi_free_dead);

void kvmi_vm_destroy(struct kvm *kvm)
{
	struct kvm_introspection *kvmi = kvm->kvmi;

	if (!kvmi)
		return;

	kvmi_unhook(kvm);

	/* From here on the receive thread doesn't look at the VM */
	mutex_lock(&kvmi->recv_lock);
	kvmi_journal_free(&kvmi->journal);
	clear_bit(KVMI_READABLE, &kvmi->flags);
	mutex_unlock(&kvmi->recv_lock);
	kvm->kvmi = NULL;

	/*
	 * If the VM's last file was one that came by a socket, this is a
	 * receive thread.  It can't wait for itself, nor for another one that
	 * may be about to wait for it.
	 */
	if (current->flags & PF_USER_WORKER) {
		llist_add(&kvmi->dead, &kvmi_dead);
		schedule_work(&kvmi_dead_work);
	} else {
		kvmi_free(kvmi);
	}
}

void kvmi_exit(void)
{
	flush_work(&kvmi_dead_work);
}

static int kvmi_preunhook(struct kvm_introspection *kvmi)
{
	int err = -ENOENT;

	lockdep_assert_held(&kvmi->lock);

	if (test_bit(KVMI_VM_EVENT_UNHOOK, kvmi->vm_events) &&
	    !kvmi_send_unhook(kvmi))
		err = 0;

	trace_kvmi_preunhook(kvmi->kvm, err);
	return err;
}

/*
 * For how long (in ms) a vCPU has waited for a tool that says nothing.  One
 * that keeps it waiting while it sends commands is at work.
 */
static unsigned int kvmi_silence(struct kvm_introspection *kvmi)
{
	unsigned long heard = READ_ONCE(kvmi->heard);
	unsigned long waiting = 0;
	struct kvm_vcpu *vcpu;
	unsigned long i;

	kvm_for_each_vcpu(i, vcpu, kvmi->kvm)
		waiting = max(waiting, kvmi_vcpu_waiting(vcpu));

	return jiffies_to_msecs(min(waiting, jiffies - heard));
}

static int kvmi_status(struct kvm *kvm, void __user *argp)
{
	struct kvm_introspection *kvmi = READ_ONCE(kvm->kvmi);
	struct kvm_introspection_status status = {};

	if (kvmi) {
		mutex_lock(&kvmi->lock);
		status.hooked =
			kvmi_session_alive(atomic_read(&kvmi->session));
		status.reason = READ_ONCE(kvmi->end);
		status.restored = READ_ONCE(kvmi->journal.restored);
		status.events = atomic64_read(&kvmi->nr_events);
		status.commands = READ_ONCE(kvmi->nr_commands);
		if (status.hooked)
			status.silence = kvmi_silence(kvmi);
		mutex_unlock(&kvmi->lock);
	}

	return copy_to_user(argp, &status, sizeof(status)) ? -EFAULT : 0;
}

static void kvmi_allow(unsigned long *bitmap, int size, int id, bool allow)
{
	if (id >= 0)
		assign_bit(id, bitmap, allow);
	else if (allow)
		bitmap_fill(bitmap, size);
	else
		bitmap_zero(bitmap, size);
}

static int kvmi_allow_command(struct kvm_introspection *kvmi,
			      const struct kvm_introspection_feature *feat)
{
	if (!feat->allow && kvmi_is_always_allowed(feat->id))
		return -EPERM;

	if (!feat->allow && feat->id == -1)
		kvmi_reset_allowed_commands(kvmi);
	else
		kvmi_allow(kvmi->cmd_allow, KVMI_NUM_COMMANDS, feat->id,
			   feat->allow);
	return 0;
}

static int kvmi_allow_event(struct kvm_introspection *kvmi,
			    const struct kvm_introspection_feature *feat)
{
	kvmi_allow(kvmi->event_allow, KVMI_NUM_EVENTS, feat->id, feat->allow);
	return 0;
}

static bool kvmi_feature_valid(const struct kvm_introspection_feature *feat,
			       int num)
{
	return feat->allow <= 1 && feat->id >= -1 && feat->id < num;
}

/* The ioctls that need a hooked VM */
static int kvmi_hooked_ioctl(struct kvm *kvm, unsigned int ioctl,
			     const struct kvm_introspection_feature *feat)
{
	struct kvm_introspection *kvmi = READ_ONCE(kvm->kvmi);
	int err = -EFAULT;

	if (!kvmi)
		return -EFAULT;

	mutex_lock(&kvmi->lock);
	if (kvmi->sock) {
		if (ioctl == KVM_INTROSPECTION_COMMAND)
			err = kvmi_allow_command(kvmi, feat);
		else if (ioctl == KVM_INTROSPECTION_EVENT)
			err = kvmi_allow_event(kvmi, feat);
		else
			err = kvmi_preunhook(kvmi);
	}
	mutex_unlock(&kvmi->lock);

	return err;
}

int kvmi_vm_ioctl(struct kvm *kvm, unsigned int ioctl, void __user *argp)
{
	struct kvm_introspection_feature feat;
	struct kvm_introspection_hook hook;
	int num;

	if (!enable_introspection)
		return -EPERM;

	switch (ioctl) {
	case KVM_INTROSPECTION_HOOK:
		if (copy_from_user(&hook, argp, sizeof(hook)))
			return -EFAULT;
		return kvmi_hook(kvm, &hook);
	case KVM_INTROSPECTION_UNHOOK:
		return kvmi_unhook(kvm);
	case KVM_INTROSPECTION_COMMAND:
	case KVM_INTROSPECTION_EVENT:
		if (copy_from_user(&feat, argp, sizeof(feat)))
			return -EFAULT;
		num = ioctl == KVM_INTROSPECTION_COMMAND ? KVMI_NUM_COMMANDS :
							   KVMI_NUM_EVENTS;
		if (!kvmi_feature_valid(&feat, num))
			return -EINVAL;
		return kvmi_hooked_ioctl(kvm, ioctl, &feat);
	case KVM_INTROSPECTION_PREUNHOOK:
		return kvmi_hooked_ioctl(kvm, ioctl, NULL);
	case KVM_INTROSPECTION_STATUS:
		return kvmi_status(kvm, argp);
	default:
		return -ENOTTY;
	}
}
