/* SPDX-License-Identifier: GPL-2.0 */
#ifndef __KVMI_INT_H
#define __KVMI_INT_H

/*
 * KVM introspection
 *
 * A session begins with KVM_INTROSPECTION_HOOK and ends when the tool closes
 * its socket, when it breaks the protocol, or with KVM_INTROSPECTION_UNHOOK.
 * Whatever ends it, what belongs to it is only put away by UNHOOK, or with the
 * VM.  The structures below are made when first needed and live as long as
 * the VM and its vCPUs, so that nobody has to ask whether they are there
 * still; all that has to be asked is whether the session is.
 *
 * One thread at a time reads the socket: the thread of a vCPU that waits for an
 * event's reply, so that the reply finds it without a detour, or, when none
 * waits, the receive thread, which is a thread of the process that hooked the
 * VM.  The reader carries out the VM commands and queues the vCPU commands and
 * the event replies to the vCPUs, whose threads carry them out on their next
 * pass through KVM_RUN and send the replies themselves.  Nobody sleeps in
 * reading: KVMI_READABLE says that there is something to read, and whoever
 * stops reading before it has read all of it wakes another reader.
 *
 * kvm_introspection.session counts: odd while a session is alive, even
 * between two sessions.  What a vCPU did for a session is tagged with its
 * number; a vCPU that finds another number puts away what it has.
 *
 * Locks, in the order in which they nest:
 *
 * kvm_introspection.lock (mutex)
 *	HOOK, UNHOOK, and the other ioctls against these two.  Protects
 *	->receiver, ->wqh and the making of ->sock.
 *
 * kvm_introspection.recv_lock (mutex)
 *	The reader of the socket, until it has carried out what it has read.
 *	Protects ->in, ->in_size and ->out.  UNHOOK takes it to drop ->sock,
 *	so that nothing happens on behalf of the tool after it.
 *
 * kvm_introspection.send_lock (mutex)
 *	One message at a time on the socket, whole.  UNHOOK takes it to drop
 *	->sock.  Threads that hold it, or recv_lock, may sleep for as long as
 *	the tool doesn't read, but not after the socket has been shut down, so
 *	UNHOOK shuts down first; PREUNHOOK only tries the lock.
 *
 * kvmi_journal.lock (mutex)
 *	The tool's writes to the guest, and taking them back.
 *
 * kvm_vcpu_introspection.lock (spinlock)
 *	The queue of the vCPU, ->pauses, and of ->ev what decides whether a
 *	reply fits.
 *
 * kvm_introspection.waiters_lock (spinlock, within the socket's wait queue)
 *	The vCPUs that wait for a reply and will read it, and ->receiver, which
 *	reads when there are none, and whether it lives.
 *
 * What of kvm_vcpu_introspection no lock is named for belongs to the vCPU's
 * thread, i.e. vcpu->mutex protects it.
 */

#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>
#include <linux/llist.h>
#include <linux/mutex.h>
#include <linux/net.h>
#include <linux/poll.h>
#include <linux/spinlock.h>
#include <linux/uio.h>
#include <linux/wait.h>
#include <linux/xarray.h>
#include <asm/kvmi_host.h>
#include <uapi/linux/kvmi.h>

#define KVMI_NUM_COMMANDS KVMI_NEXT_VM_MESSAGE
#define KVMI_NUM_EVENTS   KVMI_NEXT_VCPU_EVENT

/* Most vCPU commands, event replies and pauses that may wait for one vCPU */
#define KVMI_MAX_JOBS   128
#define KVMI_MAX_PAUSES 1002

/* What an event says beyond the state of the vCPU */
#define KVMI_MAX_EVENT_DATA 24

/* The body of an event's reply: no event asks for more than a value */
#define KVMI_MAX_EVENT_REPLY (sizeof(struct kvmi_vcpu_hdr) + \
			      sizeof(struct kvmi_vcpu_event_reply) + \
			      sizeof(u64))

/* A message with its header */
#define KVMI_MSG_BUF_SIZE (sizeof(struct kvmi_msg_hdr) + KVMI_MAX_MSG_SIZE)

/* The data of a command reply */
#define KVMI_MAX_REPLY_SIZE \
	(KVMI_MAX_MSG_SIZE - sizeof(struct kvmi_error_code))

/* An outgoing message, kept until the socket has taken it */
struct kvmi_out {
	void *msg;		/* KVMI_MSG_BUF_SIZE bytes */
	size_t size;		/* 0: none */
};

/* Most bytes of the guest that are remembered to be put back */
#define KVMI_MAX_JOURNAL 65536

struct kvmi_journal {
	struct mutex lock;		/* all of it */
	struct hlist_head *heads;
	u64 key;			/* the tool can't choose the chains */
	unsigned int nr;
	unsigned int restored;		/* of the last session */
};

struct kvm_introspection {
	struct kvm *kvm;
	struct mutex lock;		/* HOOK, UNHOOK */
	struct mutex recv_lock;		/* one reader at a time */
	struct mutex send_lock;		/* one message at a time */
	struct socket *sock;
	struct vhost_task *receiver;
	bool receiver_killed;		/* written under waiters_lock, too */
	struct llist_node dead;
	u8 uuid[16];

	/* Wakes a reader */
	poll_table pt;
	wait_queue_entry_t wait;
	wait_queue_head_t *wqh;
	spinlock_t waiters_lock;	/* waiters */
	struct list_head waiters;

	atomic_t session;

	/* Of this session, or the last; see KVM_INTROSPECTION_STATUS */
	u32 end;		/* written by who ends it */
	atomic64_t nr_events;	/* the lower half is the last one's seq */
	u64 nr_commands;	/* recv_lock */
	unsigned long heard;	/* recv_lock; when the tool spoke (jiffies) */
	unsigned long stalled;	/* send_lock; since when (jiffies), or 0 */

	/* Bits are set and read with atomic operations, by anybody */
	DECLARE_BITMAP(cmd_allow, KVMI_NUM_COMMANDS);
	DECLARE_BITMAP(event_allow, KVMI_NUM_EVENTS);
	DECLARE_BITMAP(vm_events, KVMI_NUM_EVENTS);
	struct xarray page_access;	/* see kvmi_mmu.c */
	struct kvmi_journal journal;
	unsigned long flags;
#define KVMI_UNHOOK_PENDING	0	/* the event waits for send_lock */
#define KVMI_READABLE		1	/* the socket should be read */
#define KVMI_WRITABLE		2	/* it has got room for that event */
	unsigned long no_cleanup;	/* see kvmi_cleanup_bit() */

	void *in;		/* KVMI_MSG_BUF_SIZE bytes */
	size_t in_size;		/* bytes that have arrived */
	bool drained;		/* the socket had no more than that */
	struct kvmi_out out;
};

/* A message that waits for a vCPU; the header is checked, the rest is not */
struct kvmi_job {
	struct list_head link;
	struct kvmi_msg_hdr hdr;
	u8 body[];		/* hdr.size bytes */
};

/* What the vCPU waits to be answered */
struct kvmi_event {
	/* Written under kvm_vcpu_introspection.lock */
	bool open;
	bool sent;
	bool answered;		/* the reply is in the queue */
	u16 id;
	u32 seq;
	unsigned long since;	/* jiffies; when it was sent */
	unsigned long ip;	/* linear; where the vCPU was */
	bool moved;		/* userspace has set other registers */

	size_t data_size;
	u64 data[KVMI_MAX_EVENT_DATA / sizeof(u64)];	/* as it is sent */
};

struct kvm_vcpu_introspection {
	spinlock_t lock;		/* the queue, pauses, ev */
	struct list_head jobs;
	unsigned int nr_jobs;
	struct kvmi_job *reply;		/* one of jobs while ev.answered */
	unsigned int pauses;
	struct kvmi_event ev;
	wait_queue_head_t wq;	/* the vCPU's thread waits for jobs */
	struct list_head waiter;	/* in kvm_introspection.waiters */

	int session;		/* whose the rest is */
	DECLARE_BITMAP(events, KVMI_NUM_EVENTS);
	bool regs_pending;
	struct kvm_regs regs;	/* to be set when the event is answered */
	struct kvmi_out out;
	struct kvmi_vcpu_arch arch;
};

static inline bool kvmi_session_alive(int session)
{
	return session & 1;
}

/*
 * The bit in no_cleanup of a session, and of the time up to the next one: a
 * vCPU may not have run since.
 */
static inline unsigned int kvmi_cleanup_bit(int session)
{
	return (session + 1u) / 2 % BITS_PER_LONG;
}

/* session.c */
void kvmi_session_end(struct kvm_introspection *kvmi, int session, u32 reason);
struct kvm_vcpu_introspection *kvmi_vcpu_get(struct kvm_vcpu *vcpu);

/* socket.c */
int kvmi_out_init(struct kvmi_out *out);
void *kvmi_out_reply(struct kvmi_out *out);
void kvmi_out_reply_done(struct kvmi_out *out, const struct kvmi_msg_hdr *hdr,
			 int err, size_t size);
int kvmi_out_send(struct kvm_introspection *kvmi, struct kvmi_out *out,
		  int session);
int kvmi_send_unhook(struct kvm_introspection *kvmi);
bool kvmi_may_receive(struct kvm_introspection *kvmi);
int kvmi_receive(struct kvm_introspection *kvmi,
		 const struct kvm_vcpu_introspection *kv);
void kvmi_discard(struct kvm_introspection *kvmi);
void kvmi_receive_pass_on(struct kvm_introspection *kvmi);
void kvmi_receiver_wake(struct kvm_introspection *kvmi);
bool kvmi_receiver(void *data);
void kvmi_listen(struct kvm_introspection *kvmi);
void kvmi_stop_listening(struct kvm_introspection *kvmi);

/* journal.c */
int kvmi_write_guest(struct kvm_introspection *kvmi, u64 gpa, const void *data,
		     size_t size, u16 flags, void *before);
void kvmi_journal_restore(struct kvm_introspection *kvmi, bool last);
void kvmi_journal_free(struct kvmi_journal *journal);

/* vm.c */
bool kvmi_vm_command_known(u16 id);
int kvmi_vm_command(struct kvm_introspection *kvmi,
		    const struct kvmi_msg_hdr *hdr, const void *req,
		    void *rpl, size_t *rpl_size);

/* vcpu.c */
bool kvmi_vcpu_command_known(u16 id);
bool kvmi_vcpu_event_known(u16 id);
void kvmi_vcpu_wake(struct kvm_vcpu *vcpu);
int kvmi_vcpu_queue(struct kvm_vcpu *vcpu, const struct kvmi_msg_hdr *hdr,
		    const void *body);
int kvmi_vcpu_queue_reply(struct kvm_vcpu *vcpu,
			  const struct kvmi_msg_hdr *hdr, const void *body);
int kvmi_vcpu_pause(struct kvm_vcpu *vcpu, bool wait);
void kvmi_vcpu_drop_queue(struct kvm_vcpu *vcpu);
unsigned long kvmi_vcpu_waiting(struct kvm_vcpu *vcpu);
void kvmi_vcpu_free(struct kvm_vcpu_introspection *kv);
bool kvmi_vcpu_in_session(struct kvm_vcpu *vcpu);
bool kvmi_vcpu_raise(struct kvm_vcpu *vcpu, u16 id, const void *data,
		     size_t size);
bool kvmi_vcpu_ask(struct kvm_vcpu *vcpu, u16 id, const void *data,
		   size_t size);

/* arch */
bool kvmi_arch_vcpu_started(struct kvm_vcpu *vcpu);
void kvmi_arch_get_event_state(struct kvm_vcpu *vcpu,
			       struct kvmi_vcpu_event_arch *arch);
void kvmi_arch_set_regs(struct kvm_vcpu *vcpu, const struct kvm_regs *regs);
int kvmi_arch_control_bp(struct kvm_vcpu *vcpu, bool enable);
void kvmi_arch_cleanup(struct kvm_vcpu *vcpu);
unsigned long kvmi_arch_linear_ip(struct kvm_vcpu *vcpu);
int kvmi_arch_event_done(struct kvm_vcpu *vcpu, const struct kvmi_event *ev,
			 const void *rpl);
int kvmi_arch_replace_byte(u8 __user *ptr, u8 old, u8 new);
int kvmi_arch_set_page_access(struct kvm_introspection *kvmi,
			      const struct kvmi_page_access_entry *entries,
			      unsigned int count);
u8 kvmi_arch_get_page_access(struct kvm_introspection *kvmi, gfn_t gfn);

/* x86 */
int kvmi_pf_done(struct kvm_vcpu *vcpu, const struct kvmi_event *ev,
		 bool abandoned);
u64 kvmi_arch_tsc_speed(struct kvm_vcpu *vcpu);
int kvmi_arch_get_registers(struct kvm_vcpu *vcpu,
			    const struct kvmi_vcpu_get_registers *req,
			    size_t req_size,
			    struct kvmi_vcpu_get_registers_reply *rpl,
			    size_t *rpl_size);
u64 kvmi_arch_translate_gva(struct kvm_vcpu *vcpu, u64 gva);
int kvmi_arch_control_desc(struct kvm_vcpu *vcpu, bool enable);
void kvmi_arch_exits_cleanup(struct kvm_vcpu *vcpu);
int kvmi_arch_exits_event_done(struct kvm_vcpu *vcpu,
			       const struct kvmi_event *ev, const void *rpl);
void kvmi_arch_vcpu_free(struct kvmi_vcpu_arch *arch);

/* Handlers of commands, see struct kvmi_vcpu_cmd */
#define KVMI_ARCH_VCPU_CMD(name)					\
	int kvmi_arch_##name(struct kvm_vcpu *vcpu, const void *req,	\
			     size_t req_size, void *rpl, size_t *rpl_size)
KVMI_ARCH_VCPU_CMD(set_sregs);
KVMI_ARCH_VCPU_CMD(set_msrs);
KVMI_ARCH_VCPU_CMD(get_cpuid);
KVMI_ARCH_VCPU_CMD(get_xcr);
KVMI_ARCH_VCPU_CMD(get_xsave);
KVMI_ARCH_VCPU_CMD(set_xsave);
KVMI_ARCH_VCPU_CMD(get_mtrr_type);
KVMI_ARCH_VCPU_CMD(control_cr);
KVMI_ARCH_VCPU_CMD(control_msr);
bool kvmi_arch_has_singlestep(void);
int kvmi_arch_control_singlestep(struct kvm_vcpu *vcpu, bool enable);
void kvmi_arch_report_step(struct kvm_vcpu *vcpu);
int kvmi_arch_inject_exception(struct kvm_vcpu *vcpu,
			       const struct kvmi_vcpu_inject_exception *req);
bool kvmi_arch_exception_due(struct kvm_vcpu *vcpu);
void kvmi_arch_session_over(struct kvm_vcpu *vcpu);

#endif
