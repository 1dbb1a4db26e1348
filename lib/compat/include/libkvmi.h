/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libkvmi: the older client library's functions, on top of libkvmi-2.
 *
 * For programs that exist; a new one has more from kvmi/kvmi.h.  Sources
 * compile against this header and binaries run with this library, which gives
 * them the older view of the protocol: its numbers, structures and errors.
 *
 * dom is a connected VM, ctx a listening socket, batch a list of commands.
 * Functions that return int return 0, or -1 with errno:
 *
 *	ENOTCONN	the connection has ended; so does every later call
 *	ETIMEDOUT	no answer within 15 s; kvmi_wait_event(): no event
 *	EPROTO		the other side broke the protocol
 *	ENOSYS		this KVM has nothing of the kind
 *	EPERM		QEMU does not allow it
 *	EINVAL, ENOENT, EAGAIN, EBUSY, ENOMEM, E2BIG, EOPNOTSUPP: KVM's
 *
 * What is different from the older library:
 *
 *  - Before a VM is paused, saved or migrated, KVM tells the tool to leave.  A
 *    tool that has not asked for this event by itself (kvmi_control_vm_events())
 *    does not see it.  The library takes out the INT3s that the tool wrote and
 *    has not replaced, answers the events that are open, and ends the
 *    connection: the tool's calls fail with ENOTCONN, the next connection comes
 *    when the VM runs again.  This is done within any call the tool makes, or
 *    by the thread of the ctx when the tool has called nothing for 200 ms: then
 *    kvmi_set_log_cb()'s function is called by that thread.  It cannot do so
 *    while a callback keeps it, nor after kvmi_uninit(): a tool that has called
 *    that, and then calls nothing for seconds, is cut off by QEMU, and KVM
 *    removes its INT3s.
 *  - linux/kvmi.h has what tools use: not the structures of the older wire that
 *    only the library needed (kvmi_control_*, kvmi_get_registers_reply,
 *    kvmi_mem_token and the like), nor the ioctls of mapped memory.
 *  - Views, VE, SPP, page conversion, CPUID events and mapped memory do not
 *    exist: these functions say so (ENOSYS, EOPNOTSUPP, MAP_FAILED) at once.
 *  - An event is answered once: a second answer gives ENOENT.
 *  - An access to a restricted page that KVM cannot emulate (AVX, ENDBR64, the
 *    delivery of an interrupt) gives a page fault event whose gva is all ones.
 *    CONTINUE lets the vCPU do it itself, in a single step during which the
 *    page is free for all vCPUs.
 *  - TRAP events are answered by the library unless they have been enabled.
 *  - kvmi_batch_commit() waits for the results, and returns the first error.
 *  - kvmi_init_unix_socket() replaces a socket, but no file of another kind.
 *
 * One thread is made for each ctx; it calls both callbacks.  Any function can
 * be called by any thread, except that a dom, ctx or batch must not be in use
 * when it is closed, and that kvmi_uninit() must not be called by a callback.
 * kvmi_domain_close() and kvmi_uninit() wait for that thread, seconds at most, if
 * it is just leaving a VM.
 */
#ifndef __LIBKVMI_H_INCLUDED__
#define __LIBKVMI_H_INCLUDED__

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/kvmi.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int kvmi_timeout_t;	/* ms; -1: without end */

#define KVMI_NOWAIT 0
#define KVMI_WAIT   150

struct kvmi_dom_event {
	void *next;		/* NULL */
	struct {
		struct kvmi_event common;
		union {
			struct kvmi_event_cr cr;
			struct kvmi_event_msr msr;
			struct kvmi_event_breakpoint breakpoint;
			struct kvmi_event_pf page_fault;
			struct kvmi_event_trap trap;
			struct kvmi_event_descriptor desc;
			struct kvmi_event_cpuid cpuid;
			struct kvmi_event_singlestep ss;
		};
	} event;
	unsigned char buf[KVMI_MSG_SIZE];
	unsigned int seq;	/* for kvmi_reply_event() */
};

/* What QEMU says of the VM; max_gpa is there if struct_size says so */
struct kvmi_qemu2introspector {
	uint32_t struct_size;
	unsigned char uuid[16];
	uint32_t padding;
	int64_t start_time;
	char name[64];
	uint64_t max_gpa;
};

struct kvmi_introspector2qemu {
	uint32_t struct_size;
	uint8_t cookie_hash[20];	/* SHA-1 of the key */
};

/* Returns 0, and keeps dom, or anything else: then dom is gone */
typedef int (*kvmi_new_guest_cb)(void *dom, unsigned char (*uuid)[16],
				 void *ctx);
/* May fill in cookie_hash; < 0 refuses the connection */
typedef int (*kvmi_handshake_cb)(const struct kvmi_qemu2introspector *,
				 struct kvmi_introspector2qemu *, void *ctx);

typedef enum {
	KVMI_LOG_LEVEL_DEBUG = 0,
	KVMI_LOG_LEVEL_INFO = 1,
	KVMI_LOG_LEVEL_WARNING = 2,
	KVMI_LOG_LEVEL_ERROR = 3
} kvmi_log_level;

typedef void (*kvmi_log_cb)(kvmi_log_level level, const char *s, void *ctx);

/* Listening; NULL on failure */
void *kvmi_init_unix_socket(const char *socket, kvmi_new_guest_cb accept_cb,
			    kvmi_handshake_cb hsk_cb, void *cb_ctx);
void *kvmi_init_vsock(unsigned int port, kvmi_new_guest_cb accept_cb,
		      kvmi_handshake_cb hsk_cb, void *cb_ctx);
/* Ends the thread; connections live on */
void kvmi_uninit(void *ctx);
/* In a child after fork(): closes its copy of the socket, and nothing else */
void kvmi_close(void *ctx);

/* Connections.  do_shutdown false: only close this process's file descriptor */
void kvmi_domain_close(void *dom, bool do_shutdown);
bool kvmi_domain_is_connected(const void *dom);
void kvmi_domain_name(const void *dom, char *dest, size_t dest_size);
int64_t kvmi_get_starttime(const void *dom);
int kvmi_connection_fd(const void *dom);
/* One for the process; NULL: none */
void kvmi_set_log_cb(kvmi_log_cb cb, void *ctx);

int kvmi_get_version(void *dom, unsigned int *version);
int kvmi_spp_support(void *dom, bool *supported);
int kvmi_ve_support(void *dom, bool *supported);
int kvmi_vmfunc_support(void *dom, bool *supported);
int kvmi_eptp_support(void *dom, bool *supported);
int kvmi_check_command(void *dom, int id);
int kvmi_check_event(void *dom, int id);
int kvmi_control_events(void *dom, unsigned short vcpu, int id, bool enable);
int kvmi_control_vm_events(void *dom, int id, bool enable);
int kvmi_control_cr(void *dom, unsigned short vcpu, unsigned int cr,
		    bool enable);
int kvmi_control_msr(void *dom, unsigned short vcpu, unsigned int msr,
		     bool enable);
int kvmi_control_singlestep(void *dom, unsigned short vcpu, bool enable);
int kvmi_translate_gva(void *dom, unsigned short vcpu, __u64 gva, __u64 *gpa);
int kvmi_pause_all_vcpus(void *dom, unsigned int count);
int kvmi_set_page_access(void *dom, unsigned long long *gpa,
			 unsigned char *access, unsigned short count,
			 unsigned short view);
int kvmi_set_page_write_bitmap(void *dom, __u64 *gpa, __u32 *bitmap,
			       unsigned short count);
int kvmi_get_vcpu_count(void *dom, unsigned int *count);
int kvmi_get_tsc_speed(void *dom, unsigned long long *speed);
int kvmi_get_cpuid(void *dom, unsigned short vcpu, unsigned int function,
		   unsigned int index, unsigned int *eax, unsigned int *ebx,
		   unsigned int *ecx, unsigned int *edx);
int kvmi_get_mtrr_type(void *dom, unsigned long long gpa, unsigned char *type);
int kvmi_get_xcr(void *dom, unsigned short vcpu, __u8 xcr, __u64 *value);
int kvmi_get_xsave(void *dom, unsigned short vcpu, void *buffer, size_t size);
int kvmi_set_xsave(void *dom, unsigned short vcpu, const void *buffer,
		   size_t size);
int kvmi_inject_exception(void *dom, unsigned short vcpu,
			  unsigned long long gva, unsigned int error,
			  unsigned char vector);
int kvmi_read_physical(void *dom, unsigned long long gpa, void *buffer,
		       size_t size);
int kvmi_write_physical(void *dom, unsigned long long gpa, const void *buffer,
			size_t size);
int kvmi_get_registers(void *dom, unsigned short vcpu, struct kvm_regs *regs,
		       struct kvm_sregs *sregs, struct kvm_msrs *msrs,
		       unsigned int *mode);
int kvmi_set_registers(void *dom, unsigned short vcpu,
		       const struct kvm_regs *regs);
int kvmi_get_maximum_gfn(void *dom, unsigned long long *gfn);
int kvmi_get_next_available_gfn(void *dom, unsigned long long *gfn);
int kvmi_set_ve_info_page(void *dom, unsigned short vcpu,
			  unsigned long long gpa);
int kvmi_disable_ve(void *dom, unsigned short vcpu);
int kvmi_switch_ept_view(void *dom, unsigned short vcpu, unsigned short view);
int kvmi_get_ept_view(void *dom, unsigned short vcpu, unsigned short *view);
int kvmi_control_ept_view(void *dom, unsigned short vcpu, unsigned short view,
			  bool visible);
int kvmi_create_ept_view(void *dom, unsigned short *view);
int kvmi_destroy_ept_view(void *dom, unsigned short view);
int kvmi_set_ept_page_conv(void *dom, unsigned short index,
			   unsigned long long gpa, bool sve);
int kvmi_get_ept_page_conv(void *dom, unsigned short index,
			   unsigned long long gpa, bool *sve);
int kvmi_change_gfn(void *dom, unsigned short vcpu, unsigned short view,
		    __u64 old_gfn, __u64 new_gfn);
int kvmi_alloc_gfn(void *dom, __u64 gfn);
int kvmi_free_gfn(void *dom, __u64 gfn);
int kvmi_shutdown_guest(void *dom);

/* Events.  What kvmi_pop_event() gives is the caller's, for free(). */
int kvmi_wait_event(void *dom, kvmi_timeout_t ms);
int kvmi_pop_event(void *dom, struct kvmi_dom_event **event);
size_t kvmi_get_pending_events(void *dom);
int kvmi_reply_event(void *dom, unsigned int seq, const void *data,
		     size_t data_size);

/* Mapping of the guest's memory; there is none */
int kvmi_memory_mapping(void *dom, bool enable);
void *kvmi_map_physical_page(void *dom, unsigned long long gpa);
int kvmi_unmap_physical_page(void *dom, void *address);
bool kvmi_remote_mapping_v2(void);

/* Lists of commands, carried out in their order by kvmi_batch_commit() */
void *kvmi_batch_alloc(void *dom);
void kvmi_batch_free(void *batch);
int kvmi_queue_registers(void *batch, unsigned short vcpu,
			 const struct kvm_regs *regs);
int kvmi_queue_pause_vcpu(void *batch, unsigned short vcpu);
int kvmi_queue_page_access(void *batch, unsigned long long *gpa,
			   unsigned char *access, unsigned short count,
			   unsigned short view);
int kvmi_queue_spp_access(void *batch, __u64 *gpa, __u32 *bitmap, __u16 view,
			  __u16 count);
int kvmi_queue_reply_event(void *batch, unsigned int seq, const void *data,
			   size_t data_size);
int kvmi_batch_commit(void *batch);

#ifdef __cplusplus
}
#endif

#endif /* __LIBKVMI_H_INCLUDED__ */
