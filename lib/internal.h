/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef KVMI_INTERNAL_H
#define KVMI_INTERNAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <kvmi/kvmi.h>
#include <linux/kvmi.h>

/*
 * How much of a batch is on its way at once: commands, and bytes of them or of
 * their answers.  Enough to hide the latency, and not much more than the
 * buffers of a socket take.
 */
#define BATCH_WINDOW 256
#define BATCH_BYTES (128 * 1024)

/*
 * The same with those that timed out and whose answer may still come.  A power
 * of two: the number of a command tells its place.
 */
#define MAX_PENDING 512

/* KVM has fewer vCPUs than that */
#define MAX_VCPUS 8192

#define HELLO_MIN_SIZE 96	/* without max_gpa */
#define HELLO_MAX_SIZE 65536

#define SHA1_SIZE 20
#define SHA256_SIZE 32

#define INPUT_SIZE 65536

/* The handshake; see docs of QEMU's kvmi object.  Host byte order. */
struct wire_hello {
	uint32_t struct_size;
	uint8_t uuid[16];
	uint32_t padding;
	int64_t start_time;
	char name[64];
	uint64_t max_gpa;
};

struct wire_hello_answer {
	uint32_t struct_size;
	uint8_t cookie_hash[SHA1_SIZE];
};

/* What both have more with auth=hmac; see QEMU's docs/interop/kvmi.rst */
#define HELLO_HMAC_SIZE 144
#define AUTH_HMAC 1

struct wire_hmac_answer {
	uint32_t struct_size;	/* 96 */
	uint8_t cookie_hash[SHA1_SIZE];	/* 0 */
	uint32_t auth;
	uint32_t padding;
	uint8_t nonce[SHA256_SIZE];
	uint8_t proof[SHA256_SIZE];
};

struct wire_hmac_proof {
	uint32_t struct_size;
	uint32_t padding;
	uint8_t proof[SHA256_SIZE];
};

enum pending_state {
	PENDING_FREE = 0,
	PENDING_WAITING,
	PENDING_DONE,
	PENDING_ABANDONED,	/* nobody waits for the answer any more */
};

/* A command that was sent */
struct pending {
	enum pending_state state;
	uint16_t id;
	bool is_dispatched;	/* of kvmi_call_then() */
	uint32_t seq;
	int32_t error;		/* KVM's, positive */
	void *data;		/* what comes after kvmi_error_code goes here */
	size_t capacity;
	size_t size;		/* of what came, may be > capacity */
};

struct queued_event {
	struct kvmi_vm_event event;	/* first: the caller frees this */
	struct queued_event *next;
};

/* The event each vCPU waits for an answer to */
struct open_event {
	bool open;
	uint16_t id;
	uint32_t seq;
	uint64_t value;		/* CR, MSR: what the guest writes */
};

enum vm_state {
	VM_HELLO,		/* waiting for QEMU's part of the handshake */
	VM_GREETED,		/* it has come; ours is due */
	VM_PROVING,		/* ours has gone; QEMU has to prove who it is */
	VM_RUNNING,
	VM_BROKEN,		/* closed or failed: see broken */
};

struct kvmi_vm {
	pid_t pid;		/* that it was made in */
	int fd;			/* the socket */
	/* The rest of kvmi_vm_fd(), see tell_pollers(): with is_polled */
	int ready_fd;		/* an eventfd */
	int poll_fd;		/* an epoll of both; the socket without it */

	/*
	 * All below.  Of the threads that wait for something, one polls the
	 * socket, without the lock; the others wait for it to tell them that
	 * something has changed.
	 */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool polling;

	int timeout;		/* ms */
	enum vm_state state;
	struct kvmi_error broken;

	uint8_t cookie_hash[SHA1_SIZE];
	bool mutual;		/* nothing but auth=hmac will do */
	size_t secret_size;
	uint8_t secret[KVMI_SECRET_MAX];
	uint8_t hello_bytes[HELLO_HMAC_SIZE];
	uint8_t proof[SHA256_SIZE];	/* that QEMU has to send */
	struct kvmi_vm_hello hello;
	struct kvmi_vm_version version;

	uint32_t seq;
	struct pending pending[MAX_PENDING];

	/* bytes received, not looked at: input[input_start, input_end) */
	size_t input_start;
	size_t input_end;
	uint8_t *input;
	bool drained;		/* there was no more: asking at once is in vain */
	int64_t receive_ms;	/* SO_RCVTIMEO; 0: not set */

	/* bytes to be sent: output[output_start, output_end) */
	size_t output_start;
	size_t output_end;
	size_t output_capacity;
	uint8_t *output;

	struct queued_event *first_event;
	struct queued_event **last_event;
	bool unhook_queued;

	/* Of kvmi_vm_on_unhook() */
	kvmi_unhook unhook;
	void *unhook_context;
	bool unhook_came;	/* with such a function or without */
	bool unhook_due;	/* the function is to be called... */
	bool unhook_told;	/* ...and has been */

	struct open_event *open;
	size_t open_count;

	/* Of kvmi_call_then(), in that order */
	struct kvmi_call *first_call;
	struct kvmi_call **last_call;
	unsigned int ended_calls;	/* those whose answer is here */

	/* Those who poll poll_fd */
	bool is_polled;		/* there may be such: poll_fd is made */
	bool is_ready;		/* ready_fd is readable */
	bool wants_room;	/* poll_fd waits for room in the socket, too */
	int64_t asleep_until;	/* told by kvmi_vm_next_timeout() last; 0: awake */
	bool earlier_timeout;	/* they don't know of */
};

/* names.c */
enum kvmi_status fail(struct kvmi_error *err, enum kvmi_status status,
		      const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* Appends the text of errno */
enum kvmi_status fail_errno(struct kvmi_error *err, int number,
			    const char *format, ...)
	__attribute__((format(printf, 3, 4)));
enum kvmi_status no_memory(struct kvmi_error *err);
enum kvmi_status fail_kvm(struct kvmi_error *err, unsigned int command,
			  int kvm_error);
enum kvmi_status status_of_kvm(int kvm_error);

/* sha1.c */
void sha1(const void *data, size_t size, uint8_t digest[SHA1_SIZE]);

/* sha256.c */
void hmac_sha256(const void *key, size_t key_size, const struct iovec *parts,
		 int part_count, uint8_t digest[SHA256_SIZE]);
bool same_digest(const uint8_t *a, const uint8_t *b);

/* vm.c; all of these take the lock */
int64_t now_ms(void);
void vm_lock(const struct kvmi_vm *vm);
void vm_unlock(const struct kvmi_vm *vm);
struct kvmi_vm *vm_new(int fd, const uint8_t cookie_hash[SHA1_SIZE],
		       struct kvmi_error *err);

/*
 * Sends a command without waiting for the answer; parts is what follows
 * kvmi_msg_hdr.  data must stay valid until vm_wait() or vm_abandon().
 */
enum kvmi_status vm_start(struct kvmi_vm *vm, unsigned int id,
			  const struct iovec *parts, int part_count,
			  void *data, size_t capacity, struct pending **pending,
			  struct kvmi_error *err);
/* The same, but waits if too many are not answered; KVMI_ERR_LIMIT: in vain */
enum kvmi_status vm_start_waiting(struct kvmi_vm *vm, unsigned int id,
				  const struct iovec *parts, int part_count,
				  void *data, size_t capacity,
				  struct pending **pending,
				  struct kvmi_error *err);
/* Our part of the handshake, after QEMU's */
enum kvmi_status vm_answer_hello(struct kvmi_vm *vm, struct kvmi_error *err);
/* Sends what was started; waits for the answer and frees pending whatever happens */
enum kvmi_status vm_wait(struct kvmi_vm *vm, struct pending *pending,
			 size_t *size, struct kvmi_error *err);
/* The same, if the handle's timeout does not come first */
enum kvmi_status vm_wait_until(struct kvmi_vm *vm, struct pending *pending,
			       int64_t deadline, size_t *size,
			       struct kvmi_error *err);
void vm_abandon(struct kvmi_vm *vm, struct pending *pending);
/*
 * With the lock held, not waiting: whether it has come to an end, which is then
 * in err, and size; pending is free then.
 */
bool vm_has_ended(struct kvmi_vm *vm, struct pending *pending, int64_t deadline,
		  size_t *size, struct kvmi_error *err);
/* Sends what can be without waiting for the other side */
enum kvmi_status vm_push(struct kvmi_vm *vm, struct kvmi_error *err);
/* vm_start() and vm_wait(); the answer must have at least `least' bytes */
enum kvmi_status vm_command(struct kvmi_vm *vm, unsigned int id,
			    const struct iovec *parts, int part_count,
			    void *data, size_t capacity, size_t least,
			    struct kvmi_error *err);
/*
 * kvmi_vm_wait_event() that calls nobody.  Ends when UNHOOK has come, too, with
 * KVMI_ERR_NOTHING, unless the caller knows of it.
 */
enum kvmi_status vm_wait_event(struct kvmi_vm *vm, int ms, bool knows_of_unhook,
			       struct kvmi_vm_event **event,
			       struct kvmi_error *err);
bool vm_unhook_came(struct kvmi_vm *vm);
/* Calls the function of kvmi_vm_on_unhook() if it is due */
bool vm_tell_unhook(struct kvmi_vm *vm);
/* The vCPU waits for an answer */
bool vm_has_open_event(struct kvmi_vm *vm, unsigned int vcpu);
/* commands.c: kvmi_vm_pause_vcpus(), all of them before the deadline */
enum kvmi_status vm_pause_vcpus(struct kvmi_vm *vm, const uint16_t *vcpus,
				size_t count, bool wait, int64_t deadline,
				enum kvmi_status *status,
				struct kvmi_error *err);
/* Ends the connection for a reason that is no mistake of the peer's */
enum kvmi_status vm_refuse(struct kvmi_vm *vm, enum kvmi_status status,
			   struct kvmi_error *err, const char *format, ...)
	__attribute__((format(printf, 4, 5)));
/* Ends the connection because of what the peer sent */
enum kvmi_status vm_break(struct kvmi_vm *vm, struct kvmi_error *err,
			  const char *format, ...)
	__attribute__((format(printf, 3, 4)));
#endif
