/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A first tool: shows the next ten times that the guest changes to another
 * address space, and leaves when it is done or asked to.
 *
 *	cc first-tool.c $(pkg-config --cflags --libs kvmi-2) -o first-tool
 *	./first-tool /run/kvmi.sock
 */
#include <stdio.h>
#include <kvmi/kvmi.h>

#define COMMANDS (KVMI_SET(KVMI_CMD_VM_GET_INFO) | KVMI_SET(KVMI_CMD_VCPU_CONTROL_EVENTS) | \
		  KVMI_SET(KVMI_CMD_VM_CONTROL_EVENTS) | KVMI_SET(KVMI_CMD_VCPU_CONTROL_CR))
#define EVENTS (KVMI_SET(KVMI_EV_UNHOOK) | KVMI_SET(KVMI_EV_CR))

static enum kvmi_status watch(struct kvmi_vm *vm, int left, struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;
	struct kvmi_vm_event *event;

	while (left-- && !status && !(status = kvmi_vm_wait_event(vm, 10000, &event, err))) {
		if (event->id == KVMI_EV_UNHOOK) {
			left = 0;	/* nothing to take out of the guest: just go */
		} else {
			printf("vCPU %u: CR3 0x%llx -> 0x%llx\n", event->vcpu, (unsigned long long)event->cr.old_value,
			       (unsigned long long)event->cr.new_value);
			status = kvmi_vm_reply(vm, event, KVMI_ACTION_CONTINUE, err);
		}
		kvmi_vm_event_free(event);
	}
	return status;
}

int main(int argc, char **argv)
{
	struct kvmi_error err;
	struct kvmi_vm *vm = NULL;
	struct kvmi_listener *listener = kvmi_listener_new_unix(argc > 1 ? argv[1] : NULL, 0, &err);
	bool failed = !listener || kvmi_listener_wait(listener, -1, &vm, &err) ||	/* QEMU connects to us */
		      kvmi_vm_connect(vm, COMMANDS, EVENTS, &err) ||
		      kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, true, &err) ||
		      kvmi_vcpu_control_events(vm, KVMI_ALL_VCPUS, KVMI_EV_CR, true, &err) ||
		      kvmi_vcpu_control_cr(vm, KVMI_ALL_VCPUS, 3, true, &err) || watch(vm, 10, &err);

	if (failed)
		fprintf(stderr, "first-tool: %s\n", err.message);
	kvmi_vm_close(vm);	/* KVM undoes what was asked for */
	kvmi_listener_free(listener);
	return failed;
}
