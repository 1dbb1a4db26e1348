/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Breakpoints on functions of the guest's kernel: says who comes to them, until Enter is pressed.  The VM can be paused,
 * saved and moved meanwhile: they go out before, and in again when it is back.
 *
 *	cc breakpoints.c $(pkg-config --cflags --libs kvmi-2) -o breakpoints
 *	./breakpoints /run/kvmi.sock ffffffff81123450 ...	addresses as in the guest's /proc/kallsyms
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <kvmi/hooks.h>

static void on_hit(struct kvmi_hook *hook, const struct kvmi_vm_event *event, void *context)
{
	(void)context;
	printf("vCPU %u: 0x%llx(0x%llx)\n", event->vcpu, (unsigned long long)kvmi_hook_gva(hook),
	       (unsigned long long)event->state.regs.rdi);
	fflush(stdout);
}

static void on_problem(struct kvmi_hook *hook, enum kvmi_hook_problem kind, const char *text, void *context)
{
	(void)kind, (void)context;
	fprintf(stderr, "breakpoints: 0x%llx: %s\n", hook ? (unsigned long long)kvmi_hook_gva(hook) : 0, text);
}

/* Once: as long as it is not booted anew, the guest's kernel stays where it is */
static enum kvmi_status add_all(struct kvmi_hooks *hooks, struct kvmi_vm *vm, char **addresses, struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;
	struct kvmi_hook *hook;
	uint64_t gva, gpa;

	for (; *addresses && !status; addresses++) {
		gva = strtoull(*addresses, NULL, 16);
		status = kvmi_vcpu_translate(vm, 0, gva, &gpa, err);
		if (!status)
			status = kvmi_hooks_add(hooks, gva, gpa, NULL, &hook, err);
	}
	return status;
}

int main(int argc, char **argv)
{
	struct kvmi_hooks_callbacks callbacks = { .hit = on_hit, .problem = on_problem };
	struct kvmi_error err;
	struct kvmi_hooks *hooks = kvmi_hooks_new(&callbacks, NULL, &err);
	struct kvmi_listener *listener = hooks ? kvmi_listener_new_unix(argc > 2 ? argv[1] : NULL, 0, &err) : NULL;
	struct pollfd fds[] = { { 0, POLLIN, 0 }, { -1, POLLIN, 0 } };
	bool added = false, failed = !listener;
	struct kvmi_vm *vm = NULL;

	while (!failed) {
		/* QEMU connects to us, and says something when the VM runs */
		fds[1].fd = vm ? kvmi_vm_fd(vm) : kvmi_listener_fd(listener);
		if (poll(fds, 2, -1) <= 0 || fds[0].revents)
			break;
		if (!vm) {
			failed = kvmi_listener_wait(listener, 1000, &vm, &err);
			continue;
		}
		failed = kvmi_vm_connect(vm, 0, KVMI_SET(KVMI_EV_BREAKPOINT), &err) ||
			 (!added && add_all(hooks, vm, argv + 2, &err)) || kvmi_hooks_run(hooks, vm, 0, &err);
		added = true;
		kvmi_vm_close(vm);
		vm = NULL;
	}
	kvmi_vm_close(vm);
	if (failed)
		fprintf(stderr, "breakpoints: %s\n", err.message);
	kvmi_listener_free(listener);
	kvmi_hooks_free(hooks);
	return failed;
}
