/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libkvmi-2: watch and change virtual machines through KVM introspection.
 *
 * A tool listens on a socket; QEMU (-object kvmi) connects to it, once for
 * each VM and again whenever the VM resumes:
 *
 *	listener = kvmi_listener_new_unix("/run/kvmi.sock", 0, &err);
 *	kvmi_listener_wait(listener, -1, &vm, &err);
 *	kvmi_vm_connect(vm, commands, events, &err);
 *	kvmi_vm_on_unhook(vm, leave, context, &err);
 *	kvmi_vcpu_control_events(vm, KVMI_ALL_VCPUS, KVMI_EV_CR, true, &err);
 *	for (;;) {
 *		struct kvmi_vm_event *ev;
 *
 *		kvmi_vm_wait_event(vm, 1000, &ev, &err);
 *		...
 *		kvmi_vm_reply(vm, ev, KVMI_ACTION_CONTINUE, &err);
 *		kvmi_vm_event_free(ev);
 *	}
 *
 * UNHOOK.  KVMI_EV_UNHOOK says that the VM is about to be paused, saved or
 * migrated.  Take out of the guest whatever was put into it, answer all open
 * events, then call kvmi_vm_close().  QEMU waits for this, but not for long
 * (5 s unless told otherwise).  The VM connects again when it runs again.
 * It comes as an event, or calls the function of kvmi_vm_on_unhook(); the hooks
 * of kvmi/hooks.h see to all of that by themselves.
 *
 * ERRORS.  Functions that can fail return a kvmi_status; KVMI_OK is 0.  The
 * last argument, which may be NULL, gets the same status, the numbers behind
 * it and a sentence for humans.  It is not touched on success.
 *
 * TIME.  All times are in milliseconds.  Nothing here waits for longer than
 * the handle's timeout (kvmi_vm_set_timeout(), 5000 at first) without the
 * other side making progress, unless a time is given.  Commands to a vCPU
 * (kvmi_vcpu_*) are answered by the thread of that vCPU, so they time out while
 * the VM is paused.  After KVMI_ERR_TIMEOUT the handle is still good: a late
 * answer is thrown away.
 *
 * UNITS.  Addresses and sizes are in bytes.  A gpa is a guest-physical
 * address, a gva is a virtual one.  vCPUs are counted from 0, in the order of
 * their creation; the number is not an APIC id.
 *
 * OWNERSHIP.  What a function hands out through a struct xxx ** belongs to
 * the caller, who gives it back to xxx_free() or xxx_close(); those take NULL.
 * Buffers given to a function are not used any more once it has returned.
 *
 * THREADS.  The library has no threads, no global state, installs no signal
 * handlers and never raises SIGPIPE.  Any function can be called by any number
 * of threads at once, on the same handle, too, with these exceptions:
 *  - kvmi_vm_connect() comes before all else (but kvmi_vm_shutdown()), and
 *    what kvmi_vm_get_hello() and kvmi_vm_get_version() point to is written by
 *    it (the former by kvmi_vm_wait_hello(), too);
 *  - xxx_free(), xxx_close(): nobody may be using the handle any more.  To get
 *    others out of it, call kvmi_vm_shutdown() and wait for them.
 *  - an event, and any other structure that belongs to the caller, is the
 *    caller's to protect.
 * An event can be answered by another thread than the one that received it.
 * While one thread waits, others are not held up.  Threads that wait for
 * events, or poll kvmi_vm_fd(), each get events of their own; none sleeps on one
 * that another thread has received.
 *
 * The peer is not trusted: all it sends is checked, and what it can make the
 * library store is bounded.  Events are stored at most one for each vCPU
 * (KVM never sends more before a reply) and one UNHOOK.
 */
#ifndef KVMI_KVMI_H
#define KVMI_KVMI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <asm/kvm.h>

#ifdef __cplusplus
extern "C" {
#endif

enum kvmi_status {
	KVMI_OK = 0,

	/* Found on this side */
	KVMI_ERR_ARGUMENT = 1,	/* the caller made a mistake; nothing was sent */
	KVMI_ERR_SYSTEM = 2,	/* a system call failed: see sys_errno */
	KVMI_ERR_TIMEOUT = 3,	/* no answer in time */
	KVMI_ERR_CLOSED = 4,	/* the other side closed the connection */
	KVMI_ERR_PROTOCOL = 5,	/* the other side broke the protocol; the
				   connection has been shut down */
	KVMI_ERR_NOTHING = 6,	/* nothing there: no connection, no event */
	KVMI_ERR_LIMIT = 7,	/* too many commands without an answer */
	KVMI_ERR_UNMAPPED = 8,	/* no such virtual address in the guest */
	KVMI_ERR_ANSWERED = 9,	/* this event has been answered already */
	KVMI_ERR_AUTH = 10,	/* the other side does not know the secret, or
				   has not been asked to, or asks for what we
				   don't have; the connection has been shut
				   down */
	KVMI_ERR_VERSION = 11,	/* KVM speaks another version of the protocol;
				   the connection has been shut down */

	/* Said by KVM: see kvm_error */
	KVMI_ERR_NOT_ALLOWED = 32,	/* QEMU does not allow it */
	KVMI_ERR_NOT_FOUND = 33,	/* no such memory, command or event */
	KVMI_ERR_NOT_STARTED = 34,	/* the guest has not started that vCPU */
	KVMI_ERR_NO_MEMORY = 35,
	KVMI_ERR_BUSY = 36,
	KVMI_ERR_INVALID = 37,		/* KVM rejected the arguments */
	KVMI_ERR_NOT_SUPPORTED = 38,
	KVMI_ERR_UNKNOWN = 39,		/* this KVM has no such command */
	KVMI_ERR_KVM = 40,		/* any other */
	KVMI_ERR_TOO_MUCH = 41,		/* more than KVM remembers */
};

struct kvmi_error {
	enum kvmi_status status;
	int sys_errno;		/* of a failed system call, else 0 */
	int kvm_error;		/* KVM_E* of linux/kvm_para.h, else 0 */
	int reserved;
	char message[240];	/* one line, no full stop, always terminated */
};

/* "timeout", "not-allowed", ...; never NULL */
const char *kvmi_status_name(enum kvmi_status status);

/* Commands, as QEMU's allow-list knows them.  The numbers are the protocol's. */
enum kvmi_command {
	KVMI_CMD_GET_VERSION = 2,
	KVMI_CMD_VM_CHECK_COMMAND = 4,
	KVMI_CMD_VM_CHECK_EVENT = 6,
	KVMI_CMD_VM_GET_INFO = 8,
	KVMI_CMD_VM_CONTROL_EVENTS = 10,
	KVMI_CMD_VM_READ_PHYSICAL = 12,
	KVMI_CMD_VM_WRITE_PHYSICAL = 14,
	KVMI_CMD_VM_PAUSE_VCPU = 16,
	KVMI_CMD_VM_CONTROL_CLEANUP = 18,
	KVMI_CMD_VM_SET_PAGE_ACCESS = 20,
	KVMI_CMD_VM_GET_PAGE_ACCESS = 32,
	KVMI_CMD_VM_GET_MAX_GFN = 34,
	KVMI_CMD_VCPU_GET_INFO = 3,
	KVMI_CMD_VCPU_CONTROL_EVENTS = 5,
	KVMI_CMD_VCPU_GET_REGISTERS = 7,
	KVMI_CMD_VCPU_SET_REGISTERS = 9,
	KVMI_CMD_VCPU_GET_CPUID = 11,
	KVMI_CMD_VCPU_CONTROL_CR = 13,
	KVMI_CMD_VCPU_INJECT_EXCEPTION = 15,
	KVMI_CMD_VCPU_GET_XCR = 17,
	KVMI_CMD_VCPU_GET_XSAVE = 19,
	KVMI_CMD_VCPU_SET_XSAVE = 21,
	KVMI_CMD_VCPU_GET_MTRR_TYPE = 23,
	KVMI_CMD_VCPU_CONTROL_MSR = 25,
	KVMI_CMD_VCPU_CONTROL_SINGLESTEP = 27,
	KVMI_CMD_VCPU_TRANSLATE_GVA = 29,
	KVMI_CMD_VCPU_SET_SREGS = 31,
	KVMI_CMD_VCPU_SET_MSRS = 33,
};

enum kvmi_event_id {
	KVMI_EV_UNHOOK = 0,	/* the only one of the VM, not of a vCPU */
	KVMI_EV_PAUSE = 1,
	KVMI_EV_HYPERCALL = 3,
	KVMI_EV_BREAKPOINT = 5,
	KVMI_EV_CR = 7,
	KVMI_EV_TRAP = 9,
	KVMI_EV_XSETBV = 11,
	KVMI_EV_DESCRIPTOR = 13,
	KVMI_EV_MSR = 15,
	KVMI_EV_PF = 17,
	KVMI_EV_SINGLESTEP = 19,
};

/* For the sets of kvmi_vm_connect() */
#define KVMI_SET(id) (UINT64_C(1) << (id))

/* "vm-read-physical", "breakpoint", ...; NULL if there is no such */
const char *kvmi_command_name(unsigned int id);
const char *kvmi_event_name(unsigned int id);

/* ------------------------------------------------------------------------
 * Listening
 */

struct kvmi_listener;
struct kvmi_vm;

/*
 * Listens on a unix socket.  A socket nobody listens on any more is replaced;
 * one that is in use, or a path that is anything but a socket, is an error.
 * mode holds the permission bits of the new socket; 0 means 0600.
 * Returns NULL on failure.
 */
struct kvmi_listener *kvmi_listener_new_unix(const char *path, unsigned int mode,
					     struct kvmi_error *err);

/*
 * Listens on a port of vsock, for VMs whose QEMU runs inside of a VM; port > 0.
 * Returns NULL on failure.
 */
struct kvmi_listener *kvmi_listener_new_vsock(unsigned int port,
					      struct kvmi_error *err);

/*
 * The secret that QEMU's key= property names.  The answer to every later
 * handshake has its SHA-1 hash, as QEMU's older handshake wants it.
 * size 0: no secret (as at first).
 */
enum kvmi_status kvmi_listener_set_key(struct kvmi_listener *listener,
				       const void *key, size_t size,
				       struct kvmi_error *err);

/*
 * kvmi_vm_set_secret() with each connection: only with QEMUs that know the secret
 * (auth=hmac).  1...KVMI_SECRET_MAX bytes.
 */
enum kvmi_status kvmi_listener_set_secret(struct kvmi_listener *listener,
					  const void *secret, size_t size,
					  struct kvmi_error *err);

/* To be polled for POLLIN.  Belongs to the listener. */
int kvmi_listener_fd(const struct kvmi_listener *listener);

/*
 * Takes a connection.  Does not wait: KVMI_ERR_NOTHING if there is none.
 * Nothing was received from the peer yet: kvmi_vm_connect() comes next.
 */
enum kvmi_status kvmi_listener_accept(struct kvmi_listener *listener,
				      struct kvmi_vm **vm,
				      struct kvmi_error *err);

/*
 * The same, and waits at most ms (negative: for ever) until there is one.
 * KVMI_ERR_NOTHING: there was none, or the thread has handled a signal.
 */
enum kvmi_status kvmi_listener_wait(struct kvmi_listener *listener, int ms,
				    struct kvmi_vm **vm, struct kvmi_error *err);

/* Also deletes the socket, if it is still the one that was made here.
 * Connections live on. */
void kvmi_listener_free(struct kvmi_listener *listener);

/* ------------------------------------------------------------------------
 * Connections
 */

/*
 * The same for a stream socket that comes from elsewhere; key as above.
 * The handle owns fd from then on (not on failure).
 */
struct kvmi_vm *kvmi_vm_new(int fd, const void *key, size_t key_size,
			    struct kvmi_error *err);

/*
 * Closes the connection; KVM stops sending events and lets all vCPUs go on.
 * After fork() it is the one function that a child may call: it closes what the
 * child has, and leaves the connection to the parent.
 */
void kvmi_vm_close(struct kvmi_vm *vm);

/*
 * Ends the connection, but not the handle: whoever waits in a call of it, in
 * any thread, gets KVMI_ERR_CLOSED, and so do all later calls.  Answers that
 * have not been sent are lost: see kvmi_vm_flush().
 */
void kvmi_vm_shutdown(struct kvmi_vm *vm);

/* ms > 0: how long a call may wait without any progress */
enum kvmi_status kvmi_vm_set_timeout(struct kvmi_vm *vm, int ms,
				     struct kvmi_error *err);

/*
 * Optional, before kvmi_vm_connect(): waits for what QEMU says of the VM (see
 * kvmi_vm_get_hello()), and does not answer it yet.  For who wants to choose
 * the key by the VM's name.
 */
enum kvmi_status kvmi_vm_wait_hello(struct kvmi_vm *vm, struct kvmi_error *err);

/* The SHA-1 hash of the key, in place of the listener's */
#define KVMI_KEY_HASH_SIZE 20

enum kvmi_status kvmi_vm_set_key_hash(struct kvmi_vm *vm,
				      const uint8_t hash[KVMI_KEY_HASH_SIZE],
				      struct kvmi_error *err);

/*
 * Before kvmi_vm_connect(): both sides have to prove that they know the secret,
 * which is not sent (auth=hmac of QEMU's kvmi object, whose key= it is).
 * kvmi_vm_connect() then fails with KVMI_ERR_AUTH if the other side does not ask
 * for it or cannot, as it does if QEMU asks for it and there is no secret.
 * size: 1...KVMI_SECRET_MAX bytes.
 */
#define KVMI_SECRET_MAX 1024

enum kvmi_status kvmi_vm_set_secret(struct kvmi_vm *vm, const void *secret,
				    size_t size, struct kvmi_error *err);

/*
 * Waits for the handshake and answers it, checks the version of the protocol, then waits
 * until all of the given commands and events are allowed: QEMU allows them
 * only after the handshake.  Both are sets of KVMI_SET(id).
 * KVMI_ERR_NOT_ALLOWED names the first that is still not allowed at the end
 * of the timeout; the handle can be used nevertheless.
 */
enum kvmi_status kvmi_vm_connect(struct kvmi_vm *vm, uint64_t commands,
				 uint64_t events, struct kvmi_error *err);

/* What QEMU said in the handshake */
struct kvmi_vm_hello {
	uint8_t uuid[16];
	int64_t start_time;	/* Unix time of the last start or reset, in s */
	uint64_t max_gpa;	/* end of the guest's memory; 0: not told */
	char name[64];		/* terminated; "" if the VM has none */
};

/* What KVM said of itself */
struct kvmi_vm_version {
	uint32_t version;
	uint32_t max_message;	/* in bytes, without the header */
	bool singlestep;	/* kvmi_vcpu_control_singlestep() */
	bool get_page_access;	/* kvmi_vm_get_page_access() */
	bool get_max_gfn;	/* kvmi_vm_get_max_gfn() */
	bool journal;		/* KVM takes INT3s that were left behind out of
				   the guest; KVMI_VM_WRITE_* */
	bool set_sregs;		/* kvmi_vcpu_set_sregs() */
	bool set_msrs;		/* kvmi_vcpu_set_msrs() */
};

/* Both are zero before kvmi_vm_connect() (or kvmi_vm_wait_hello()).  They live as long as vm. */
const struct kvmi_vm_hello *kvmi_vm_get_hello(const struct kvmi_vm *vm);
const struct kvmi_vm_version *kvmi_vm_get_version(const struct kvmi_vm *vm);

/* ------------------------------------------------------------------------
 * Events
 */

enum kvmi_action {
	KVMI_ACTION_CONTINUE = 0, /* as if the event had not been asked for */
	KVMI_ACTION_RETRY = 1,	/* not what the event was about: run on from
				   RIP; BREAKPOINT, PF and DESCRIPTOR only */
	KVMI_ACTION_CRASH = 2,	/* stop the VM */
};

/* State of a vCPU */
struct kvmi_registers {
	uint32_t mode;		/* width of the running code: 2, 4 or 8 bytes */
	uint32_t reserved;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
};

/* MSRs that come with each event */
struct kvmi_event_msrs {
	uint64_t sysenter_cs;
	uint64_t sysenter_esp;
	uint64_t sysenter_eip;
	uint64_t efer;
	uint64_t star;
	uint64_t lstar;
	uint64_t cstar;
	uint64_t pat;
	uint64_t shadow_gs;
};

/* What comes with each kind of event; there is nothing for the others. */

struct kvmi_ev_breakpoint {
	uint64_t gpa;		/* of the INT3; all ones: not known */
	uint8_t insn_len;
};

/* The guest is about to write new_value to CR0, CR3 or CR4 */
struct kvmi_ev_cr {
	uint8_t cr;
	uint64_t old_value;
	uint64_t new_value;
};

/* The guest is about to write new_value to the MSR */
struct kvmi_ev_msr {
	uint32_t msr;
	uint64_t old_value;	/* 0 if it cannot be read */
	uint64_t new_value;
};

/* An exception is about to be delivered: the injected one, or another */
struct kvmi_ev_trap {
	uint8_t vector;
	uint32_t error_code;
	uint64_t address;	/* CR2 */
};

/* The guest has changed XCR0 */
struct kvmi_ev_xsetbv {
	uint8_t xcr;		/* 0 */
	uint64_t old_value;
	uint64_t new_value;
};

/* The guest is about to load or store the register of a descriptor table */
enum kvmi_descriptor {
	KVMI_DESCRIPTOR_IDTR = 1,
	KVMI_DESCRIPTOR_GDTR = 2,
	KVMI_DESCRIPTOR_LDTR = 3,
	KVMI_DESCRIPTOR_TR = 4,
};

struct kvmi_ev_descriptor {
	uint8_t descriptor;	/* KVMI_DESCRIPTOR_* */
	bool write;		/* it is loaded */
};

/*
 * The guest is about to do what kvmi_vm_set_page_access() took off it.
 * CONTINUE lets this access pass, RETRY runs the instruction again: free the
 * page before, or move RIP.
 * not_emulated: KVM cannot do this one access in the guest's place, so that
 * CONTINUE takes the restriction off the page for good.
 */
struct kvmi_ev_pf {
	uint64_t gva;		/* all ones: not known */
	uint64_t gpa;
	uint8_t access;		/* one of KVMI_PAGE_* */
	bool not_emulated;
};

struct kvmi_ev_singlestep {
	bool failed;		/* no step was made */
};

/* Only the library makes these: later versions may append fields. */
struct kvmi_vm_event {
	enum kvmi_event_id id;
	uint32_t seq;
	uint16_t vcpu;		/* the rest is 0 in KVMI_EV_UNHOOK */
	uint16_t data_size;	/* of the data as it came, in bytes */
	struct kvmi_registers state;
	struct kvmi_event_msrs msrs;
	union {
		struct kvmi_ev_breakpoint breakpoint;
		struct kvmi_ev_cr cr;
		struct kvmi_ev_msr msr;
		struct kvmi_ev_trap trap;
		struct kvmi_ev_xsetbv xsetbv;
		struct kvmi_ev_descriptor descriptor;
		struct kvmi_ev_pf pf;
		struct kvmi_ev_singlestep singlestep;
		uint8_t data[64];	/* of events without a type here: as on
					   the wire */
	};
};

/*
 * For event loops: poll kvmi_vm_fd() for kvmi_vm_poll_events() (POLLIN), with
 * the timeout of kvmi_vm_next_timeout() if there are calls, then call
 * kvmi_vm_process(), then kvmi_vm_next_event() until it returns NULL (and
 * kvmi_vm_dispatch(), if there are calls or a function for UNHOOK).
 * The fd is not the socket, but readable (as poll() has it, not "edge triggered")
 * while something has come, can be sent, or was received by another function
 * or thread and has not been taken: several threads can poll the same vm, and
 * others call functions of it.  It is the library's: read nothing from it.
 */
int kvmi_vm_fd(const struct kvmi_vm *vm);
short kvmi_vm_poll_events(const struct kvmi_vm *vm);

/*
 * Receives and sends what can be without waiting.  KVMI_ERR_CLOSED and other
 * failures do not empty the queue.
 */
enum kvmi_status kvmi_vm_process(struct kvmi_vm *vm, struct kvmi_error *err);

/*
 * Sends what could not be sent at once, if there is such: answers to events,
 * when KVM is slow to read.  kvmi_vm_process() does it by and by, in whatever
 * thread polls; this is for programs where none does.  kvmi_vm_close() does it
 * as well.
 */
enum kvmi_status kvmi_vm_flush(struct kvmi_vm *vm, struct kvmi_error *err);

/* The oldest event, or NULL.  Neither receives nor waits. */
struct kvmi_vm_event *kvmi_vm_next_event(struct kvmi_vm *vm);

/*
 * All in one: waits at most ms (0: not at all) for an event.
 * KVMI_ERR_NOTHING: none came, or the function of kvmi_vm_on_unhook() has been
 * called.
 */
enum kvmi_status kvmi_vm_wait_event(struct kvmi_vm *vm, int ms,
				    struct kvmi_vm_event **event,
				    struct kvmi_error *err);

/* May call any function but kvmi_vm_close(); kvmi_vm_shutdown(), for example */
typedef void (*kvmi_unhook)(struct kvmi_vm *vm, void *context);

/*
 * The VM is about to be left: enables KVMI_EV_UNHOOK, and has function() called
 * once when it comes, in place of an event.  It is called by kvmi_vm_dispatch()
 * or kvmi_vm_wait_event(), in the thread that calls them, whichever thread has
 * received it: that one is woken up; if there are several, the first of them
 * calls it.  A later kvmi_vm_on_unhook() replaces the function.  It is not
 * called by kvmi_vm_close(), nor in another function that waits, the
 * kvmi_hooks_*() included.
 */
enum kvmi_status kvmi_vm_on_unhook(struct kvmi_vm *vm, kvmi_unhook function,
				   void *context, struct kvmi_error *err);

/* Does not answer it */
void kvmi_vm_event_free(struct kvmi_vm_event *event);

/*
 * Answers an event, which its vCPU is waiting for; in any order, once.
 * UNHOOK has no answer.  CR and MSR: the guest's own new value is written.
 * Does not wait for KVM.
 */
enum kvmi_status kvmi_vm_reply(struct kvmi_vm *vm,
			       const struct kvmi_vm_event *event,
			       enum kvmi_action action, struct kvmi_error *err);

/*
 * The same for CR and MSR, with the value that is to be written; old_value of
 * the event refuses the write.  The guest gets a #GP for a value that cannot be.
 */
enum kvmi_status kvmi_vm_reply_with_value(struct kvmi_vm *vm,
					  const struct kvmi_vm_event *event,
					  enum kvmi_action action,
					  uint64_t value,
					  struct kvmi_error *err);

/*
 * kvmi_vcpu_set_registers() and kvmi_vm_reply() in one go: the vCPU runs on
 * after one message to KVM instead of after three.
 * If setting the registers fails, the event has been answered all the same.
 */
enum kvmi_status kvmi_vm_reply_with_registers(struct kvmi_vm *vm,
					      const struct kvmi_vm_event *event,
					      enum kvmi_action action,
					      const struct kvm_regs *regs,
					      struct kvmi_error *err);

/* ------------------------------------------------------------------------
 * Commands to the VM
 */

/* KVMI_ERR_NOT_FOUND: no such; KVMI_ERR_NOT_ALLOWED: not allowed by QEMU */
enum kvmi_status kvmi_vm_check_command(struct kvmi_vm *vm, unsigned int id,
				       struct kvmi_error *err);
enum kvmi_status kvmi_vm_check_event(struct kvmi_vm *vm, unsigned int id,
				     struct kvmi_error *err);

/* Of all that were created, started or not: they are 0...count - 1 */
enum kvmi_status kvmi_vm_get_vcpu_count(struct kvmi_vm *vm, unsigned int *count,
					struct kvmi_error *err);

/* Events of the VM: KVMI_EV_UNHOOK */
enum kvmi_status kvmi_vm_control_events(struct kvmi_vm *vm, unsigned int id,
					bool enable, struct kvmi_error *err);

/*
 * Any address and size.  KVMI_ERR_NOT_FOUND if there is no memory at a part of
 * it: those before it may have been written (or read) by then.
 */
enum kvmi_status kvmi_vm_read_physical(struct kvmi_vm *vm, uint64_t gpa,
				       void *data, size_t size,
				       struct kvmi_error *err);
enum kvmi_status kvmi_vm_write_physical(struct kvmi_vm *vm, uint64_t gpa,
					const void *data, size_t size,
					struct kvmi_error *err);

/*
 * The same, and what KVM is to do with it when the connection ends, by whatever
 * way.  flags is one of
 *   0				take out INT3s that are still there
 *   KVMI_VM_WRITE_JOURNAL	put back all bytes that have not changed since
 *   KVMI_VM_WRITE_KEEP		leave all as it is, INT3s too
 * KVM remembers 65536 bytes of a VM, KVMI_ERR_TOO_MUCH says that there is no
 * place left and that nothing was written.  KVMI_ERR_UNKNOWN if flags are not
 * 0 and KVM has no journal (see kvmi_vm_version).
 */
#define KVMI_VM_WRITE_JOURNAL 1
#define KVMI_VM_WRITE_KEEP 2

enum kvmi_status kvmi_vm_write_physical_flags(struct kvmi_vm *vm, uint64_t gpa,
					      const void *data, size_t size,
					      unsigned int flags,
					      struct kvmi_error *err);

/*
 * Many at a time: a good number is on its way at once, in the given order.
 * Each op gets its status; all are tried unless the connection fails, and
 * those that were not tried then hold that failure.
 * Returns the first failure.
 */
struct kvmi_memory_op {
	uint64_t gpa;
	void *data;		/* not written to by kvmi_vm_write_many() */
	uint32_t size;
	enum kvmi_status status;
};

enum kvmi_status kvmi_vm_read_many(struct kvmi_vm *vm,
				   struct kvmi_memory_op *ops, size_t count,
				   struct kvmi_error *err);
enum kvmi_status kvmi_vm_write_many(struct kvmi_vm *vm,
				    struct kvmi_memory_op *ops, size_t count,
				    struct kvmi_error *err);
/* flags as for kvmi_vm_write_physical_flags() */
enum kvmi_status kvmi_vm_write_many_flags(struct kvmi_vm *vm,
					  struct kvmi_memory_op *ops,
					  size_t count, unsigned int flags,
					  struct kvmi_error *err);

/*
 * What the guest may do with a page of 4096 bytes without notice; anything else
 * gives a KVMI_EV_PF.  KVMI_PAGE_RWX frees the page.
 */
#define KVMI_PAGE_R 1
#define KVMI_PAGE_W 2
#define KVMI_PAGE_X 4
#define KVMI_PAGE_RWX 7

struct kvmi_page_access {
	uint64_t gpa;		/* of any byte in the page */
	uint8_t access;		/* KVMI_PAGE_* */
};

/*
 * Any number of pages.  All are tried unless the connection fails; returns the
 * first failure (KVMI_ERR_INVALID: no memory there), and does not tell which
 * page it was about.  All restrictions end with the connection.
 */
enum kvmi_status kvmi_vm_set_page_access(struct kvmi_vm *vm,
					 const struct kvmi_page_access *pages,
					 size_t count, struct kvmi_error *err);
/* KVMI_ERR_UNKNOWN: this KVM cannot tell (see kvmi_vm_version) */
enum kvmi_status kvmi_vm_get_page_access(struct kvmi_vm *vm, uint64_t gpa,
					 uint8_t *access,
					 struct kvmi_error *err);

/*
 * The number of the last page of 4096 bytes that is memory.
 * KVMI_ERR_UNKNOWN: this KVM cannot tell (see kvmi_vm_version)
 */
enum kvmi_status kvmi_vm_get_max_gfn(struct kvmi_vm *vm, uint64_t *gfn,
				     struct kvmi_error *err);

/*
 * Asks a vCPU to send one KVMI_EV_PAUSE, which holds it until it is answered.
 * wait: return only when it runs no guest code any more.  Its event can come
 * before or after that.  A vCPU that waits for the answer to another event
 * sends its PAUSE after it.
 */
enum kvmi_status kvmi_vm_pause_vcpu(struct kvmi_vm *vm, unsigned int vcpu,
				    bool wait, struct kvmi_error *err);

/*
 * The same for several, all asked before the first answer is waited for; the
 * first that does not come in time ends the waiting.  status (NULL or count
 * elements) gets the result of each.  KVMI_ERR_TIMEOUT: it was asked, its PAUSE
 * can still come.  KVMI_ERR_LIMIT: it was not asked, because of those before.
 */
enum kvmi_status kvmi_vm_pause_vcpus(struct kvmi_vm *vm,
				     const uint16_t *vcpus, size_t count,
				     bool wait, enum kvmi_status *status,
				     struct kvmi_error *err);

/* Whether KVM undoes interceptions when the connection ends (default: yes) */
enum kvmi_status kvmi_vm_control_cleanup(struct kvmi_vm *vm, bool enable,
					 struct kvmi_error *err);

/* ------------------------------------------------------------------------
 * Commands to a vCPU
 */

/* In Hz; 0 if the host cannot scale the time-stamp counter */
enum kvmi_status kvmi_vcpu_get_tsc_speed(struct kvmi_vm *vm, unsigned int vcpu,
					 uint64_t *hz, struct kvmi_error *err);

/*
 * In place of the number of a vCPU, for kvmi_vcpu_control_events(),
 * kvmi_vcpu_control_cr() and kvmi_vcpu_control_msr(): all that have started; to
 * be called again for those that start later.  Needs KVMI_CMD_VM_GET_INFO.  Ends
 * with the first failure; KVMI_ERR_NOT_STARTED: none has started.
 */
#define KVMI_ALL_VCPUS 0xffffffffu

/*
 * All events but UNHOOK, PAUSE, TRAP and (see kvmi_vcpu_control_singlestep())
 * SINGLESTEP have to be enabled; doing so twice is no error.
 * KVMI_ERR_BUSY: BREAKPOINT, and a debugger uses QEMU's gdb stub.
 * KVMI_ERR_NOT_SUPPORTED: DESCRIPTOR, and the CPU can't.
 */
enum kvmi_status kvmi_vcpu_control_events(struct kvmi_vm *vm, unsigned int vcpu,
					  unsigned int id, bool enable,
					  struct kvmi_error *err);

/*
 * Whether writes of CR0, CR3 or CR4 (cr: 0, 3, 4) give KVMI_EV_CR.  That event
 * must be enabled as well.
 */
enum kvmi_status kvmi_vcpu_control_cr(struct kvmi_vm *vm, unsigned int vcpu,
				      unsigned int cr, bool enable,
				      struct kvmi_error *err);

/*
 * Whether writes of an MSR give KVMI_EV_MSR.  That event must be enabled as
 * well.  KVMI_ERR_INVALID: KVM intercepts 0...0x1fff and 0xc0000000...
 * 0xc0001fff only.  KVMI_ERR_NOT_ALLOWED can also mean that QEMU denies the
 * guest this MSR.
 */
enum kvmi_status kvmi_vcpu_control_msr(struct kvmi_vm *vm, unsigned int vcpu,
				       uint32_t msr, bool enable,
				       struct kvmi_error *err);

/*
 * One KVMI_EV_SINGLESTEP after each instruction.  Interrupts are held back
 * meanwhile.  KVMI_ERR_NOT_SUPPORTED: the CPU can't (see kvmi_vm_version);
 * KVMI_ERR_BUSY: a debugger does it already.
 */
enum kvmi_status kvmi_vcpu_control_singlestep(struct kvmi_vm *vm,
					      unsigned int vcpu, bool enable,
					      struct kvmi_error *err);

/*
 * Delivers an exception in place of the instruction at RIP.  A KVMI_EV_TRAP
 * follows, which says what was delivered: something else may have been on its
 * way.  address: CR2, for vector 14.  error_code counts for vectors that have
 * one.  KVMI_ERR_BUSY: the TRAP of an earlier one has not been sent yet, the
 * vCPU is single-stepped, or runs a guest of the guest.
 */
enum kvmi_status kvmi_vcpu_inject_exception(struct kvmi_vm *vm,
					    unsigned int vcpu,
					    unsigned int vector,
					    uint32_t error_code,
					    uint64_t address,
					    struct kvmi_error *err);

/* What CPUID tells the guest; KVMI_ERR_NOT_FOUND: no such leaf */
struct kvmi_cpuid {
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
};

enum kvmi_status kvmi_vcpu_get_cpuid(struct kvmi_vm *vm, unsigned int vcpu,
				     uint32_t function, uint32_t index,
				     struct kvmi_cpuid *cpuid,
				     struct kvmi_error *err);

/* XCR0 (xcr 0) is the only one there is */
enum kvmi_status kvmi_vcpu_get_xcr(struct kvmi_vm *vm, unsigned int vcpu,
				   unsigned int xcr, uint64_t *value,
				   struct kvmi_error *err);

/*
 * The state of FPU, SSE, AVX..., as KVM_GET_XSAVE has it: always
 * KVMI_XSAVE_SIZE bytes.  Setting works at once, or fails and changes nothing.
 * KVMI_ERR_NOT_SUPPORTED: the guest's is larger than that, or encrypted.
 */
#define KVMI_XSAVE_SIZE 4096

enum kvmi_status kvmi_vcpu_get_xsave(struct kvmi_vm *vm, unsigned int vcpu,
				     void *xsave, struct kvmi_error *err);
enum kvmi_status kvmi_vcpu_set_xsave(struct kvmi_vm *vm, unsigned int vcpu,
				     const void *xsave, struct kvmi_error *err);

/*
 * Writes CR0, CR2, CR3, CR4, CR8, the segments and descriptor tables, at once,
 * whether an event is open or not; no event comes of it.  efer, apic_base and
 * interrupt_bitmap must be what the vCPU has.
 * KVMI_ERR_INVALID: they aren't, or the guest itself could not load these
 * values; nothing has changed.  KVMI_ERR_BUSY: a nested guest runs.
 */
enum kvmi_status kvmi_vcpu_set_sregs(struct kvmi_vm *vm, unsigned int vcpu,
				     const struct kvm_sregs *sregs,
				     struct kvmi_error *err);

/*
 * Writes MSRs in turn, each as the guest's WRMSR would, but without an event.
 * KVMI_ERR_INVALID: the guest could not write one of them; done (may be NULL)
 * says how many before it have been written.  At most KVMI_MSRS_MAX.
 */
enum kvmi_status kvmi_vcpu_set_msrs(struct kvmi_vm *vm, unsigned int vcpu,
				    const uint32_t *msrs,
				    const uint64_t *values, size_t count,
				    size_t *done, struct kvmi_error *err);

/* How the guest's MTRRs have memory cached: 0 UC, 1 WC, 4 WT, 5 WP, 6 WB */
enum kvmi_status kvmi_vcpu_get_mtrr_type(struct kvmi_vm *vm, unsigned int vcpu,
					 uint64_t gpa, uint8_t *type,
					 struct kvmi_error *err);

/*
 * msrs holds the numbers of count MSRs, values gets theirs; count at most
 * KVMI_MSRS_MAX.  One that cannot be read fails the whole.
 */
#define KVMI_MSRS_MAX 481

enum kvmi_status kvmi_vcpu_get_registers(struct kvmi_vm *vm, unsigned int vcpu,
					 struct kvmi_registers *state,
					 const uint32_t *msrs, uint64_t *values,
					 size_t count, struct kvmi_error *err);

/*
 * Only while the vCPU waits for the answer to an event, else
 * KVMI_ERR_NOT_SUPPORTED.  Takes effect with the answer.
 */
enum kvmi_status kvmi_vcpu_set_registers(struct kvmi_vm *vm, unsigned int vcpu,
					 const struct kvm_regs *regs,
					 struct kvmi_error *err);

/*
 * Through the page tables the vCPU uses now; KVMI_ERR_UNMAPPED if they have
 * nothing there.
 */
enum kvmi_status kvmi_vcpu_translate(struct kvmi_vm *vm, unsigned int vcpu,
				     uint64_t gva, uint64_t *gpa,
				     struct kvmi_error *err);

/*
 * Any address and size; no permissions are checked.  Pages before the one
 * that fails have been read (or written) then.
 */
enum kvmi_status kvmi_vcpu_read_virtual(struct kvmi_vm *vm, unsigned int vcpu,
					uint64_t gva, void *data, size_t size,
					struct kvmi_error *err);
enum kvmi_status kvmi_vcpu_write_virtual(struct kvmi_vm *vm, unsigned int vcpu,
					 uint64_t gva, const void *data,
					 size_t size, struct kvmi_error *err);

/* ------------------------------------------------------------------------
 * Commands whose answer is not waited for
 *
 * kvmi_vm_start_*() and kvmi_vcpu_start_*() send a command, without waiting,
 * and hand out a call: what will become of it.  Many can be on their way (512,
 * together with other commands; then KVMI_ERR_LIMIT), and those of different
 * vCPUs are answered in any order.  KVM itself keeps 128 for each vCPU: more
 * than that for one that has no time for them end with KVMI_ERR_BUSY.  Each call is ended once, by any thread, by
 * one of
 *   kvmi_call_wait()	waits for the answer
 *   kvmi_call_then()	has a function called when it is there
 *   kvmi_call_cancel()	forgets it; what was sent is carried out all the same
 * before its vm is closed.  What an answer is to be put into must stay valid
 * until then, and is written to by kvmi_call_wait(), or by kvmi_vm_dispatch()
 * just before it calls the function, never behind the caller's back.
 * If the connection ends, so do all calls, with its failure.
 */

struct kvmi_call;

/*
 * Within one page of 4096 bytes; nothing of data is used any more once writing has
 * been started.
 */
enum kvmi_status kvmi_vm_start_read_physical(struct kvmi_vm *vm, uint64_t gpa,
					     void *data, size_t size,
					     struct kvmi_call **call,
					     struct kvmi_error *err);
enum kvmi_status kvmi_vm_start_write_physical(struct kvmi_vm *vm, uint64_t gpa,
					      const void *data, size_t size,
					      struct kvmi_call **call,
					      struct kvmi_error *err);

/* As the functions without start_ in their names; no MSRs */
enum kvmi_status kvmi_vcpu_start_get_registers(struct kvmi_vm *vm,
					       unsigned int vcpu,
					       struct kvmi_registers *state,
					       struct kvmi_call **call,
					       struct kvmi_error *err);
enum kvmi_status kvmi_vcpu_start_set_registers(struct kvmi_vm *vm,
					       unsigned int vcpu,
					       const struct kvm_regs *regs,
					       struct kvmi_call **call,
					       struct kvmi_error *err);
enum kvmi_status kvmi_vcpu_start_translate(struct kvmi_vm *vm,
					   unsigned int vcpu, uint64_t gva,
					   uint64_t *gpa,
					   struct kvmi_call **call,
					   struct kvmi_error *err);
enum kvmi_status kvmi_vcpu_start_control_events(struct kvmi_vm *vm,
						unsigned int vcpu,
						unsigned int id, bool enable,
						struct kvmi_call **call,
						struct kvmi_error *err);

/*
 * Any other command, a later KVM's too, in the form that linux/kvmi.h of the
 * kernel gives it: body is what follows struct kvmi_msg_hdr, answer gets what
 * follows struct kvmi_error_code: at most capacity bytes, and answer_size (may
 * be NULL) says how many there were.  KVM ends the connection if body has not
 * the size it should have.
 */
enum kvmi_status kvmi_vm_start_command(struct kvmi_vm *vm, unsigned int id,
				       const void *body, size_t size,
				       void *answer, size_t capacity,
				       size_t *answer_size,
				       struct kvmi_call **call,
				       struct kvmi_error *err);

/* The answer is there, or will never be: kvmi_call_wait() would not wait */
bool kvmi_call_is_done(const struct kvmi_call *call);

/*
 * Waits for the answer, and frees the call whatever happens: returns what the
 * function without start_ in its name would have returned.
 */
enum kvmi_status kvmi_call_wait(struct kvmi_call *call, struct kvmi_error *err);

/* Frees the call */
void kvmi_call_cancel(struct kvmi_call *call);

/*
 * result->status is KVMI_OK or the failure: KVMI_ERR_TIMEOUT if there is no answer
 * within the handle's timeout after kvmi_call_then().  May call any function,
 * kvmi_vm_start_*() as well, but kvmi_vm_close().
 */
typedef void (*kvmi_done)(struct kvmi_vm *vm, const struct kvmi_error *result,
			  void *context);

/*
 * done() will be called once, by kvmi_vm_dispatch(), or at last by
 * kvmi_vm_close().  The call is the library's from now on.
 */
void kvmi_call_then(struct kvmi_call *call, kvmi_done done, void *context);

/*
 * Calls the functions of all calls that have come to an end, and that of
 * kvmi_vm_on_unhook(), in the caller's thread; neither receives nor waits, so
 * kvmi_vm_process() comes before it.
 * Returns how many it has called.
 */
unsigned int kvmi_vm_dispatch(struct kvmi_vm *vm);

/*
 * For poll(): in how many ms kvmi_vm_dispatch() is to be called at the latest,
 * whether something comes or not; -1: there is nothing to wait for.  A call of
 * another thread that ends earlier wakes up who polls kvmi_vm_fd(): ask again
 * before each poll().
 */
int kvmi_vm_next_timeout(const struct kvmi_vm *vm);

/* ------------------------------------------------------------------------
 * The guest's page tables
 *
 * Looked at from here, without a vCPU: works while the VM is paused, too, and
 * for address spaces that no vCPU uses at the moment.
 */

struct kvmi_paging {
	uint64_t cr3;		/* bits that are no address don't matter */
	uint32_t levels;	/* 4 or 5 */
	uint32_t reserved;
};

/*
 * As a vCPU in this state uses them.  KVMI_ERR_NOT_SUPPORTED: not in long mode
 * (real mode, 32-bit and PAE tables are left to kvmi_vcpu_translate()).
 */
enum kvmi_status kvmi_paging_of(const struct kvmi_registers *state,
				struct kvmi_paging *paging,
				struct kvmi_error *err);

struct kvmi_translation {
	uint64_t gpa;
	uint64_t page_size;	/* 4096, 2 MiB or 1 GiB */
	bool writable;		/* at all levels */
	bool user;		/* at all levels: by programs, too */
	bool executable;
};

/*
 * Keeps at most cache_pages pages of tables (4 KiB each) that it has read, 0:
 * none.  The guest changes its tables at any time: what was read is believed
 * until kvmi_walker_forget().  A walker is to be freed before its vm is closed.
 * Threads may share it.  Returns NULL on failure.
 */
struct kvmi_walker;

struct kvmi_walker *kvmi_walker_new(struct kvmi_vm *vm, size_t cache_pages,
				    struct kvmi_error *err);
void kvmi_walker_free(struct kvmi_walker *walker);
void kvmi_walker_forget(struct kvmi_walker *walker);

/* KVMI_ERR_UNMAPPED: there is nothing at this address */
enum kvmi_status kvmi_walker_translate(struct kvmi_walker *walker,
				       const struct kvmi_paging *paging,
				       uint64_t gva,
				       struct kvmi_translation *translation,
				       struct kvmi_error *err);

/*
 * Any address and size, whatever the rights.  Pages before one that fails have
 * been read (or written) then.
 */
enum kvmi_status kvmi_walker_read(struct kvmi_walker *walker,
				  const struct kvmi_paging *paging,
				  uint64_t gva, void *data, size_t size,
				  struct kvmi_error *err);
enum kvmi_status kvmi_walker_write(struct kvmi_walker *walker,
				   const struct kvmi_paging *paging,
				   uint64_t gva, const void *data, size_t size,
				   struct kvmi_error *err);

#ifdef __cplusplus
}
#endif

#endif /* KVMI_KVMI_H */
