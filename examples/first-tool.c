/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A first tool: shows the next ten times that the guest changes to another
 * address space, and leaves when it is done or asked to.
 *
 *	cc first-tool.c $(pkg-config --cflags --libs kvmi-2) -o first-tool
 *	./first-tool /run/kvmi.sock
 */
#include <poll.h>
#include <stdio.h>

#include <kvmi/kvmi.h>

#define COMMANDS (KVMI_SET(KVMI_CMD_VM_GET_INFO) | \
		  KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS) | \
		  KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS) | \
		  KVMI_SET(KVMI_CMD_VCPU_CONTROL_CR))
#define EVENTS (KVMI_SET(KVMI_EV_UNHOOK) | KVMI_SET(KVMI_EV_CR))

static enum kvmi_status watch(struct kvmi_vm *vm, struct kvmi_error *err)
{
	enum kvmi_status status = kvmi_vm_connect(vm, COMMANDS, EVENTS, err);
	unsigned int vcpus = 0, left = 10, i;
	struct kvmi_vm_event *event;

	if (status == KVMI_OK)
		status = kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, true, err);
	if (status == KVMI_OK)
		status = kvmi_vm_get_vcpu_count(vm, &vcpus, err);
	for (i = 0; i < vcpus && status == KVMI_OK; i++) {
		status = kvmi_vcpu_control_events(vm, i, KVMI_EV_CR, true, err);
		if (status == KVMI_OK)
			status = kvmi_vcpu_control_cr(vm, i, 3, true, err);
	}
	while (left && status == KVMI_OK) {
		status = kvmi_vm_wait_event(vm, 10000, &event, err);
		if (status != KVMI_OK)
			break;
		if (event->id == KVMI_EV_UNHOOK)
			left = 0;	/* nothing to take out: just go */
		else
			status = kvmi_vm_reply(vm, event, KVMI_ACTION_CONTINUE,
					       err);
		if (event->id == KVMI_EV_CR) {
			printf("vCPU %u: CR3 0x%llx -> 0x%llx\n", event->vcpu,
			       (unsigned long long)event->cr.old_value,
			       (unsigned long long)event->cr.new_value);
			left--;
		}
		kvmi_vm_event_free(event);
	}

	return status;
}

int main(int argc, char **argv)
{
	struct kvmi_listener *listener = NULL;
	struct kvmi_vm *vm = NULL;
	struct kvmi_error err;
	enum kvmi_status status = KVMI_ERR_ARGUMENT;

	if (argc != 2) {
		fprintf(stderr, "usage: first-tool SOCKET\n");
		return 2;
	}
	listener = kvmi_listener_new_unix(argv[1], 0, &err);
	if (listener) {
		struct pollfd fd = { kvmi_listener_fd(listener), POLLIN, 0 };

		poll(&fd, 1, -1);	/* QEMU connects to us */
		status = kvmi_listener_accept(listener, &vm, &err);
	}
	if (status == KVMI_OK)
		status = watch(vm, &err);
	if (status != KVMI_OK)
		fprintf(stderr, "first-tool: %s\n", err.message);
	kvmi_vm_close(vm);	/* KVM undoes what was asked for */
	kvmi_listener_free(listener);

	return status != KVMI_OK;
}
