/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Names of things, and errors in words */

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

static const char *const command_names[] = {
	[KVMI_GET_VERSION] = "get-version",
	[KVMI_VM_CHECK_COMMAND] = "vm-check-command",
	[KVMI_VM_CHECK_EVENT] = "vm-check-event",
	[KVMI_VM_GET_INFO] = "vm-get-info",
	[KVMI_VM_CONTROL_EVENTS] = "vm-control-events",
	[KVMI_VM_READ_PHYSICAL] = "vm-read-physical",
	[KVMI_VM_WRITE_PHYSICAL] = "vm-write-physical",
	[KVMI_VM_PAUSE_VCPU] = "vm-pause-vcpu",
	[KVMI_VM_CONTROL_CLEANUP] = "vm-control-cleanup",
	[KVMI_VM_SET_PAGE_ACCESS] = "vm-set-page-access",
	[KVMI_VM_GET_PAGE_ACCESS] = "vm-get-page-access",
	[KVMI_VM_GET_MAX_GFN] = "vm-get-max-gfn",
	[KVMI_VCPU_GET_INFO] = "vcpu-get-info",
	[KVMI_VCPU_CONTROL_EVENTS] = "vcpu-control-events",
	[KVMI_VCPU_GET_REGISTERS] = "vcpu-get-registers",
	[KVMI_VCPU_SET_REGISTERS] = "vcpu-set-registers",
	[KVMI_VCPU_GET_CPUID] = "vcpu-get-cpuid",
	[KVMI_VCPU_CONTROL_CR] = "vcpu-control-cr",
	[KVMI_VCPU_INJECT_EXCEPTION] = "vcpu-inject-exception",
	[KVMI_VCPU_GET_XCR] = "vcpu-get-xcr",
	[KVMI_VCPU_GET_XSAVE] = "vcpu-get-xsave",
	[KVMI_VCPU_SET_XSAVE] = "vcpu-set-xsave",
	[KVMI_VCPU_GET_MTRR_TYPE] = "vcpu-get-mtrr-type",
	[KVMI_VCPU_CONTROL_MSR] = "vcpu-control-msr",
	[KVMI_VCPU_CONTROL_SINGLESTEP] = "vcpu-control-singlestep",
	[KVMI_VCPU_TRANSLATE_GVA] = "vcpu-translate-gva",
	[KVMI_VCPU_SET_SREGS] = "vcpu-set-sregs",
	[KVMI_VCPU_SET_MSRS] = "vcpu-set-msrs",
};

static const char *const event_names[] = {
	[KVMI_VM_EVENT_UNHOOK] = "unhook",
	[KVMI_VCPU_EVENT_PAUSE] = "pause",
	[KVMI_VCPU_EVENT_HYPERCALL] = "hypercall",
	[KVMI_VCPU_EVENT_BREAKPOINT] = "breakpoint",
	[KVMI_VCPU_EVENT_CR] = "cr",
	[KVMI_VCPU_EVENT_TRAP] = "trap",
	[KVMI_VCPU_EVENT_XSETBV] = "xsetbv",
	[KVMI_VCPU_EVENT_DESCRIPTOR] = "descriptor",
	[KVMI_VCPU_EVENT_MSR] = "msr",
	[KVMI_VCPU_EVENT_PF] = "pf",
	[KVMI_VCPU_EVENT_SINGLESTEP] = "singlestep",
};

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

const char *kvmi_command_name(unsigned int id)
{
	return id < COUNT(command_names) ? command_names[id] : NULL;
}

const char *kvmi_event_name(unsigned int id)
{
	return id < COUNT(event_names) ? event_names[id] : NULL;
}

const char *kvmi_status_name(enum kvmi_status status)
{
	switch (status) {
	case KVMI_OK: return "ok";
	case KVMI_ERR_ARGUMENT: return "argument";
	case KVMI_ERR_SYSTEM: return "system";
	case KVMI_ERR_TIMEOUT: return "timeout";
	case KVMI_ERR_CLOSED: return "closed";
	case KVMI_ERR_PROTOCOL: return "protocol";
	case KVMI_ERR_NOTHING: return "nothing";
	case KVMI_ERR_LIMIT: return "limit";
	case KVMI_ERR_UNMAPPED: return "unmapped";
	case KVMI_ERR_ANSWERED: return "answered";
	case KVMI_ERR_AUTH: return "auth";
	case KVMI_ERR_VERSION: return "version";
	case KVMI_ERR_NOT_ALLOWED: return "not-allowed";
	case KVMI_ERR_NOT_FOUND: return "not-found";
	case KVMI_ERR_NOT_STARTED: return "not-started";
	case KVMI_ERR_NO_MEMORY: return "no-memory";
	case KVMI_ERR_BUSY: return "busy";
	case KVMI_ERR_INVALID: return "invalid";
	case KVMI_ERR_NOT_SUPPORTED: return "not-supported";
	case KVMI_ERR_UNKNOWN: return "unknown";
	case KVMI_ERR_KVM: return "kvm";
	case KVMI_ERR_TOO_MUCH: return "too-much";
	}

	return "?";
}

static void set_error(struct kvmi_error *err, enum kvmi_status status,
		      const char *format, va_list args)
{
	memset(err, 0, sizeof(*err));
	err->status = status;
	vsnprintf(err->message, sizeof(err->message), format, args);
}

enum kvmi_status fail(struct kvmi_error *err, enum kvmi_status status,
		      const char *format, ...)
{
	va_list args;

	if (err) {
		va_start(args, format);
		set_error(err, status, format, args);
		va_end(args);
	}

	return status;
}

enum kvmi_status fail_errno(struct kvmi_error *err, int number,
			    const char *format, ...)
{
	char text[80] = "";
	size_t length;
	va_list args;

	if (err) {
		va_start(args, format);
		set_error(err, KVMI_ERR_SYSTEM, format, args);
		va_end(args);
		err->sys_errno = number;
		/* strerror() is not for threads */
#ifdef __GLIBC__
		snprintf(text, sizeof(text), "%s",
			 strerror_r(number, text, sizeof(text)));
#else
		strerror_r(number, text, sizeof(text));
#endif
		length = strlen(err->message);
		snprintf(err->message + length, sizeof(err->message) - length,
			 ": %s", text);
	}

	return KVMI_ERR_SYSTEM;
}

enum kvmi_status no_memory(struct kvmi_error *err)
{
	fail(err, KVMI_ERR_SYSTEM, "out of memory");
	if (err)
		err->sys_errno = ENOMEM;

	return KVMI_ERR_SYSTEM;
}

enum kvmi_status status_of_kvm(int kvm_error)
{
	switch (kvm_error) {
	case 0: return KVMI_OK;
	case KVM_EPERM: return KVMI_ERR_NOT_ALLOWED;
	case KVM_ENOENT: return KVMI_ERR_NOT_FOUND;
	case KVM_EAGAIN: return KVMI_ERR_NOT_STARTED;
	case KVM_ENOMEM: return KVMI_ERR_NO_MEMORY;
	case KVM_EBUSY: return KVMI_ERR_BUSY;
	case KVM_EINVAL: return KVMI_ERR_INVALID;
	case KVM_EOPNOTSUPP: return KVMI_ERR_NOT_SUPPORTED;
	case KVM_ENOSYS: return KVMI_ERR_UNKNOWN;
	case KVM_E2BIG: return KVMI_ERR_TOO_MUCH;
	default: return KVMI_ERR_KVM;
	}
}

enum kvmi_status fail_kvm(struct kvmi_error *err, unsigned int command,
			  int kvm_error)
{
	enum kvmi_status status = status_of_kvm(kvm_error);
	const char *name = kvmi_command_name(command), *why;

	if (!name)
		name = "command";

	switch (status) {
	case KVMI_OK:
		return KVMI_OK;
	case KVMI_ERR_NOT_ALLOWED:
		why = "not allowed (see the commands and events properties of QEMU's kvmi object)";
		if (command == KVMI_VCPU_CONTROL_MSR)
			why = "not allowed by QEMU: this command, or this MSR to the guest";
		break;
	case KVMI_ERR_NOT_FOUND:
		why = "KVM knows nothing of this kind";
		if (command == KVMI_VM_READ_PHYSICAL ||
		    command == KVMI_VM_WRITE_PHYSICAL ||
		    command == KVMI_VM_GET_PAGE_ACCESS)
			why = "the guest has no memory at this address";
		else if (command == KVMI_VCPU_GET_CPUID)
			why = "the guest has no such leaf";
		break;
	case KVMI_ERR_NOT_STARTED:
		why = "the guest has not started this vCPU yet";
		break;
	case KVMI_ERR_BUSY:
		why = "too much is waiting for this vCPU already";
		if (command == KVMI_VCPU_CONTROL_EVENTS ||
		    command == KVMI_VCPU_CONTROL_SINGLESTEP)
			why = "a debugger (QEMU's gdb stub) holds this vCPU";
		else if (command == KVMI_VCPU_INJECT_EXCEPTION)
			why = "the last exception has not been delivered yet, or the vCPU is single-stepped";
		break;
	case KVMI_ERR_INVALID:
		why = "KVM rejected the arguments";
		if (command == KVMI_VM_SET_PAGE_ACCESS)
			why = "the guest has no memory at one of the addresses";
		else if (command & 1)
			why = "KVM rejected the arguments, or there is no such vCPU";
		break;
	case KVMI_ERR_NOT_SUPPORTED:
		why = "not supported by this host";
		if (command == KVMI_VCPU_SET_REGISTERS)
			why = "this vCPU is not waiting for the answer to an event";
		break;
	case KVMI_ERR_UNKNOWN:
		why = "this version of KVM lacks it";
		break;
	case KVMI_ERR_NO_MEMORY:
		why = "the host is out of memory";
		break;
	case KVMI_ERR_TOO_MUCH:
		why = "KVM remembers no more of the writes (65536 bytes); take some breakpoints out";
		break;
	default:
		why = NULL;
	}
	if (why)
		fail(err, status, "%s: %s", name, why);
	else
		fail(err, status, "%s: KVM error %d", name, kvm_error);
	if (err)
		err->kvm_error = kvm_error;

	return status;
}
