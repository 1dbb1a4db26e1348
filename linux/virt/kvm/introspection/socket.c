// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection: the socket to the tool, which is not trusted
 */
#include <linux/sched.h>
#include <linux/sched/vhost_task.h>
#include <linux/slab.h>
#include <linux/socket.h>
#include <net/sock.h>

#include "kvmi_int.h"
#include "trace.h"

/*
 * How long a message of which the socket has taken a part may keep a thread
 * that is wanted elsewhere.  A signal can't stop it there, or the stream
 * would be torn.
 */
#define KVMI_SEND_GRACE_MS 100

/* How long a tool may let the socket be full before the session ends */
#define KVMI_SEND_TIMEOUT_S 5

/* That make it worth while to read: something has come, or the tool has gone */
#define KVMI_POLL_EVENTS (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)

/* The first part of a reply */
struct kvmi_reply_head {
	struct kvmi_msg_hdr hdr;
	struct kvmi_error_code ec;
};

int kvmi_out_init(struct kvmi_out *out)
{
	out->size = 0;
	out->msg = kmalloc(KVMI_MSG_BUF_SIZE, GFP_KERNEL_ACCOUNT);
	return out->msg ? 0 : -ENOMEM;
}

/* Where the data of a command reply goes, at most KVMI_MAX_REPLY_SIZE bytes */
void *kvmi_out_reply(struct kvmi_out *out)
{
	return out->msg + sizeof(struct kvmi_reply_head);
}

void kvmi_out_reply_done(struct kvmi_out *out, const struct kvmi_msg_hdr *hdr,
			 int err, size_t size)
{
	struct kvmi_reply_head *head = out->msg;

	if (err)
		size = 0;

	head->hdr.id = hdr->id;
	head->hdr.seq = hdr->seq;
	head->hdr.size = sizeof(head->ec) + size;
	head->ec.err = err;
	head->ec.padding = 0;
	out->size = sizeof(*head) + size;
}

static u32 kvmi_end_reason(int err)
{
	switch (err) {
	case -EPROTO:
		return KVM_INTROSPECTION_END_PROTOCOL;
	case -ETIMEDOUT:
		return KVM_INTROSPECTION_END_UNREAD;
	default:
		return KVM_INTROSPECTION_END_CLOSED;
	}
}

static bool kvmi_interrupted(int err)
{
	return err == -EINTR || err == -ERESTARTSYS || err == -EAGAIN;
}

/*
 * Sends all of the message, or nothing of it (-EINTR: wanted elsewhere), or
 * the session is lost.  A tool that takes a little now and then doesn't read,
 * either.
 */
static int kvmi_sock_send(struct socket *sock, void *buf, size_t size,
			  unsigned int flags)
{
	unsigned long end = jiffies + KVMI_SEND_TIMEOUT_S * HZ;
	unsigned long give_up = 0;
	size_t sent = 0;
	int ret;

	while (sent < size) {
		struct kvec vec = {
			.iov_base = buf + sent,
			.iov_len = size - sent,
		};
		struct msghdr msg = { .msg_flags = MSG_NOSIGNAL | flags };

		ret = kernel_sendmsg(sock, &msg, &vec, 1, vec.iov_len);
		if (ret > 0) {
			sent += ret;
			if (time_after(jiffies, end))
				return -ETIMEDOUT;
			continue;
		}
		if (ret == -EAGAIN && !(flags & MSG_DONTWAIT))
			return -ETIMEDOUT;
		if (!kvmi_interrupted(ret))
			return ret ?: -EPIPE;
		if (!sent)
			return -EINTR;

		if (!give_up)
			give_up = jiffies + msecs_to_jiffies(KVMI_SEND_GRACE_MS);
		else if (time_after(jiffies, give_up))
			return -ETIMEDOUT;
		flags |= MSG_DONTWAIT;
		schedule_timeout_uninterruptible(1);
	}

	return 0;
}

/* Called with send_lock held, which keeps the socket */
static int kvmi_send_locked(struct kvm_introspection *kvmi, void *buf,
			    size_t size, int session, unsigned int flags)
{
	int err;

	lockdep_assert_held(&kvmi->send_lock);

	if (!kvmi_session_alive(session) ||
	    atomic_read(&kvmi->session) != session)
		return -ENOTCONN;

	err = kvmi_sock_send(kvmi->sock, buf, size, flags);
	if (err != -EINTR)
		kvmi->stalled = 0;
	else if (!kvmi->stalled)
		kvmi->stalled = jiffies ?: 1;
	else if (time_after(jiffies, kvmi->stalled + KVMI_SEND_TIMEOUT_S * HZ))
		err = -ETIMEDOUT;

	if (err && err != -EINTR) {
		kvmi_session_end(kvmi, session, kvmi_end_reason(err));
		kernel_sock_shutdown(kvmi->sock, SHUT_RDWR);
	}

	return err;
}

static int kvmi_send_unhook_locked(struct kvm_introspection *kvmi)
{
	struct {
		struct kvmi_msg_hdr hdr;
		struct kvmi_event_hdr ev;
	} msg = {
		.hdr.id = KVMI_VM_EVENT,
		.hdr.size = sizeof(msg.ev),
		.hdr.seq = atomic64_inc_return(&kvmi->nr_events),
		.ev.event = KVMI_VM_EVENT_UNHOOK,
	};

	return kvmi_send_locked(kvmi, &msg, sizeof(msg),
				atomic_read(&kvmi->session), MSG_DONTWAIT);
}

/*
 * Whoever finds send_lock taken leaves the event to the holder, who looks for
 * it after every unlock.  When there is no room in the socket, the next sender
 * tries again, and so does who reads when there is some.
 */
static int kvmi_send_pending_unhook(struct kvm_introspection *kvmi)
{
	int err = 0;

	/* Orders the unlock, or the setting of the bit, before the test */
	smp_mb();

	while (test_bit(KVMI_UNHOOK_PENDING, &kvmi->flags) &&
	       mutex_trylock(&kvmi->send_lock)) {
		clear_bit(KVMI_WRITABLE, &kvmi->flags);
		/* Orders the clearing before the sending */
		smp_mb__after_atomic();

		if (test_bit(KVMI_UNHOOK_PENDING, &kvmi->flags)) {
			err = kvmi_send_unhook_locked(kvmi);
			if (err != -EINTR)
				clear_bit(KVMI_UNHOOK_PENDING, &kvmi->flags);
		}
		mutex_unlock(&kvmi->send_lock);

		/* As above */
		smp_mb();
		if (err == -EINTR && !test_bit(KVMI_WRITABLE, &kvmi->flags))
			break;
	}

	return err == -EINTR ? 0 : err;
}

/* Never sleeps for the tool: the caller is the device manager's main loop */
int kvmi_send_unhook(struct kvm_introspection *kvmi)
{
	int err;

	if (!kvmi_session_alive(atomic_read(&kvmi->session)))
		return -ENOTCONN;

	set_bit(KVMI_UNHOOK_PENDING, &kvmi->flags);
	err = kvmi_send_pending_unhook(kvmi);
	if (err)
		clear_bit(KVMI_UNHOOK_PENDING, &kvmi->flags);

	return err;
}

/*
 * Returns -EINTR, and keeps the message, if the thread is wanted elsewhere
 * before the socket takes it.  For whatever else goes wrong the session has
 * ended and the message is dropped.
 */
int kvmi_out_send(struct kvm_introspection *kvmi, struct kvmi_out *out,
		  int session)
{
	int err;

	if (!out->size)
		return 0;

	if (mutex_lock_interruptible(&kvmi->send_lock))
		return -EINTR;
	err = kvmi_send_locked(kvmi, out->msg, out->size, session, 0);
	mutex_unlock(&kvmi->send_lock);
	kvmi_send_pending_unhook(kvmi);

	if (err != -EINTR)
		out->size = 0;

	return err;
}

static int kvmi_queue_vcpu_message(struct kvm_introspection *kvmi,
				   const struct kvmi_msg_hdr *hdr,
				   const void *body)
{
	const struct kvmi_vcpu_hdr *vcpu_hdr = body;
	struct kvm_vcpu *vcpu;

	if (hdr->size < sizeof(*vcpu_hdr))
		return hdr->id == KVMI_VCPU_EVENT ? -EPROTO : -KVM_EINVAL;
	if (vcpu_hdr->padding1 || vcpu_hdr->padding2)
		return -KVM_EINVAL;

	vcpu = kvm_get_vcpu(kvmi->kvm, vcpu_hdr->vcpu);
	if (!vcpu)
		return -KVM_EINVAL;
	if (!kvmi_vcpu_get(vcpu))
		return -KVM_ENOMEM;
	if (!kvmi_arch_vcpu_started(vcpu) && !READ_ONCE(vcpu->kvmi->ev.open))
		return -KVM_EAGAIN;

	if (hdr->id == KVMI_VCPU_EVENT)
		return kvmi_vcpu_queue_reply(vcpu, hdr, body);

	return kvmi_vcpu_queue(vcpu, hdr, body);
}

/* Returns < 0 if the message must end the session */
static int kvmi_dispatch(struct kvm_introspection *kvmi)
{
	const struct kvmi_msg_hdr *hdr = kvmi->in;
	const void *body = hdr + 1;
	size_t rpl_size = 0;
	int ec;

	if (kvmi_vm_command_known(hdr->id)) {
		if (test_bit(hdr->id, kvmi->cmd_allow))
			ec = kvmi_vm_command(kvmi, hdr, body,
					     kvmi_out_reply(&kvmi->out),
					     &rpl_size);
		else
			ec = -KVM_EPERM;
	} else if (hdr->id == KVMI_VCPU_EVENT ||
		   kvmi_vcpu_command_known(hdr->id)) {
		if (hdr->id == KVMI_VCPU_EVENT ||
		    test_bit(hdr->id, kvmi->cmd_allow))
			ec = kvmi_queue_vcpu_message(kvmi, hdr, body);
		else
			ec = -KVM_EPERM;
		/* The vCPU's thread answers */
		if (!ec)
			return 0;
		if (ec == -EPROTO)
			return ec;
	} else {
		ec = -KVM_ENOSYS;
	}

	kvmi_out_reply_done(&kvmi->out, hdr, ec, rpl_size);
	return 0;
}

/*
 * Files that have come are closed by this thread's task work, and to close one
 * may sleep for as long as the tool likes (SO_LINGER), but for a signal.  So
 * this looks as if there were one until the work is done: the thread leaves
 * whatever it is in, does the work, and only then finds that there is none.
 */
static void kvmi_close_at_once(void)
{
	/* These have no such work */
	if (!(current->flags & PF_KTHREAD))
		set_thread_flag(TIF_SIGPENDING);
}

/*
 * The session has ended, and nothing more can come.  What the tool has sent
 * along must not be left to those who close the socket.
 */
void kvmi_discard(struct kvm_introspection *kvmi)
{
	struct msghdr msg = {};
	struct kvec vec = {
		.iov_base = kvmi->in,
		.iov_len = KVMI_MSG_BUF_SIZE,
	};

	lockdep_assert_held(&kvmi->recv_lock);

	/* Only these can carry files, and others may never run dry */
	if (kvmi->sock->ops->family != PF_UNIX)
		return;

	while (kernel_recvmsg(kvmi->sock, &msg, &vec, 1, vec.iov_len,
			      MSG_DONTWAIT) > 0)
		cond_resched();
	if (msg.msg_flags & MSG_CTRUNC)
		kvmi_close_at_once();
}

/* Returns -EAGAIN if there is nothing more at the moment */
static int kvmi_fill(struct kvm_introspection *kvmi)
{
	struct msghdr msg = { .msg_flags = MSG_DONTWAIT };
	struct kvec vec = {
		.iov_base = kvmi->in + kvmi->in_size,
		.iov_len = KVMI_MSG_BUF_SIZE - kvmi->in_size,
	};
	size_t room = vec.iov_len;
	int ret;

	if (kvmi->drained)
		return -EAGAIN;

	ret = kernel_recvmsg(kvmi->sock, &msg, &vec, 1, room, MSG_DONTWAIT);
	if (ret <= 0)
		return ret ?: -EPIPE;

	/* Files, or other things that nobody has asked for */
	if (msg.msg_flags & MSG_CTRUNC) {
		kvmi_close_at_once();
		return -EPROTO;
	}

	/* For what comes from here on, the hang-up too, there is a wake-up */
	kvmi->drained = ret < room && !(vfs_poll(kvmi->sock->file, NULL) &
					KVMI_POLL_EVENTS);
	kvmi->in_size += ret;
	return 0;
}

/* Deals with one message; returns -EAGAIN if there is none, or not all of it */
static int kvmi_read(struct kvm_introspection *kvmi)
{
	const struct kvmi_msg_hdr *hdr = kvmi->in;
	size_t size;
	int err;

	for (;;) {
		size = sizeof(*hdr);
		if (kvmi->in_size >= size) {
			if (hdr->size > KVMI_MAX_MSG_SIZE)
				return -EPROTO;
			size += hdr->size;
			if (kvmi->in_size >= size)
				break;
		}
		err = kvmi_fill(kvmi);
		if (err)
			return err;
	}

	WRITE_ONCE(kvmi->nr_commands,
		   kvmi->nr_commands + (hdr->id != KVMI_VCPU_EVENT));
	WRITE_ONCE(kvmi->heard, jiffies);
	trace_kvmi_command(kvmi->kvm, hdr->id, hdr->seq, hdr->size);
	err = kvmi_dispatch(kvmi);

	kvmi->in_size -= size;
	memmove(kvmi->in, kvmi->in + size, kvmi->in_size);
	return err;
}

/*
 * Reads until there is nothing left (-EAGAIN), or, for a vCPU, until it has its
 * reply and there is more than that (0).
 */
static int kvmi_receive_locked(struct kvm_introspection *kvmi,
			       const struct kvm_vcpu_introspection *kv)
{
	int session = atomic_read(&kvmi->session);
	bool answered;
	int err;

	lockdep_assert_held(&kvmi->recv_lock);

	if (!kvmi_session_alive(session)) {
		kvmi_journal_restore(kvmi, false);
		return -EAGAIN;
	}

	kvmi_send_pending_unhook(kvmi);
	kvmi->drained = false;
	do {
		answered = kv && READ_ONCE(kv->ev.answered);
		err = kvmi_out_send(kvmi, &kvmi->out, session) ?:
		      kvmi_read(kvmi);
		/* A tool that goes on sending must not keep the thread */
		if (!err && signal_pending(current))
			err = -EINTR;
		cond_resched();
	} while (!err && !answered);

	if (err && !kvmi_interrupted(err)) {
		kvmi_session_end(kvmi, session, kvmi_end_reason(err));
		kernel_sock_shutdown(kvmi->sock, SHUT_RDWR);
		err = -EAGAIN;
	}

	return err;
}

bool kvmi_may_receive(struct kvm_introspection *kvmi)
{
	return test_bit(KVMI_READABLE, &kvmi->flags) &&
	       !mutex_is_locked(&kvmi->recv_lock);
}

/*
 * Becomes the reader of the socket if there is none.  A vCPU returns when it
 * has its reply.  Returns -EINTR if the thread is wanted elsewhere.
 */
int kvmi_receive(struct kvm_introspection *kvmi,
		 const struct kvm_vcpu_introspection *kv)
{
	int err = -EAGAIN;

	/* Whoever finds a reader leaves the rest to it, which looks again */
	while (err == -EAGAIN && test_bit(KVMI_READABLE, &kvmi->flags) &&
	       mutex_trylock(&kvmi->recv_lock)) {
		clear_bit(KVMI_READABLE, &kvmi->flags);
		/* Orders the clearing before the reading */
		smp_mb__after_atomic();

		err = kvmi_receive_locked(kvmi, kv);
		if (err != -EAGAIN)
			set_bit(KVMI_READABLE, &kvmi->flags);
		mutex_unlock(&kvmi->recv_lock);

		/* Orders the unlock before the test */
		smp_mb();
	}

	return err == -EINTR ? err : 0;
}

/* Wakes the one that shall read: the last vCPU that began to wait */
void kvmi_receive_pass_on(struct kvm_introspection *kvmi)
{
	struct kvm_vcpu_introspection *kv;
	unsigned long flags;

	if (!test_bit(KVMI_READABLE, &kvmi->flags))
		return;

	spin_lock_irqsave(&kvmi->waiters_lock, flags);
	kv = list_first_entry_or_null(&kvmi->waiters,
				      struct kvm_vcpu_introspection, waiter);
	if (kv)
		wake_up(&kv->wq);
	else if (!kvmi->receiver_killed)
		vhost_task_wake(kvmi->receiver);
	spin_unlock_irqrestore(&kvmi->waiters_lock, flags);
}

/* Wakes the receive thread, whoever waits */
void kvmi_receiver_wake(struct kvm_introspection *kvmi)
{
	unsigned long flags;

	set_bit(KVMI_READABLE, &kvmi->flags);
	spin_lock_irqsave(&kvmi->waiters_lock, flags);
	if (!kvmi->receiver_killed)
		vhost_task_wake(kvmi->receiver);
	spin_unlock_irqrestore(&kvmi->waiters_lock, flags);
}

/* Something has happened to the socket; called with its wqh's lock held */
static int kvmi_socket_wake(wait_queue_entry_t *wait, unsigned int mode,
			    int sync, void *key)
{
	struct kvm_introspection *kvmi =
		container_of(wait, struct kvm_introspection, wait);
	__poll_t events = key_to_poll(key);
	bool room = events & EPOLLOUT &&
		    test_bit(KVMI_UNHOOK_PENDING, &kvmi->flags);

	if (events && !(events & KVMI_POLL_EVENTS) && !room)
		return 0;

	if (room)
		set_bit(KVMI_WRITABLE, &kvmi->flags);

	set_bit(KVMI_READABLE, &kvmi->flags);
	kvmi_receive_pass_on(kvmi);
	return 0;
}

static void kvmi_socket_queue_proc(struct file *file, wait_queue_head_t *wqh,
				   poll_table *pt)
{
	struct kvm_introspection *kvmi =
		container_of(pt, struct kvm_introspection, pt);

	if (WARN_ON_ONCE(kvmi->wqh))
		return;

	kvmi->wqh = wqh;
	add_wait_queue(wqh, &kvmi->wait);
}

void kvmi_listen(struct kvm_introspection *kvmi)
{
	lockdep_assert_held(&kvmi->lock);

	sock_set_sndtimeo(kvmi->sock->sk, KVMI_SEND_TIMEOUT_S);

	init_waitqueue_func_entry(&kvmi->wait, kvmi_socket_wake);
	init_poll_funcptr(&kvmi->pt, kvmi_socket_queue_proc);
	vfs_poll(kvmi->sock->file, &kvmi->pt);

	/* There may be something already */
	set_bit(KVMI_READABLE, &kvmi->flags);
	kvmi_receive_pass_on(kvmi);
}

void kvmi_stop_listening(struct kvm_introspection *kvmi)
{
	lockdep_assert_held(&kvmi->lock);

	if (kvmi->wqh)
		remove_wait_queue(kvmi->wqh, &kvmi->wait);
	kvmi->wqh = NULL;
}

/*
 * Called again and again by the receive thread, which sleeps when this
 * returns false and sees to its signals (to be frozen or killed with its
 * process) in between.
 */
bool kvmi_receiver(void *data)
{
	struct kvm_introspection *kvmi = data;

	if (!kvmi_may_receive(kvmi))
		return false;

	__set_current_state(TASK_RUNNING);
	kvmi_receive(kvmi, NULL);
	return true;
}
