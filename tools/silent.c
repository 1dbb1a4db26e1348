/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Connections of which nothing is known yet */

#include <string.h>

#include "kvmi.h"
#include "output.h"
#include "silent.h"

/* What the library has for a connection if nobody says otherwise */
#define TIMEOUT_MS 5000

static void drop(struct silent *silent, size_t i)
{
	memmove(&silent->list[i], &silent->list[i + 1],
		(--silent->count - i) * sizeof(silent->list[0]));
}

nfds_t silent_fds(const struct silent *silent, struct pollfd *fds)
{
	size_t i;

	fds[0] = (struct pollfd){ .fd = kvmi_listener_fd(silent->listener),
				  .events = POLLIN };
	for (i = 0; i < silent->count; i++)
		fds[i + 1] = (struct pollfd){
			.fd = kvmi_vm_fd(silent->list[i]), .events = POLLIN,
		};

	return silent->count + 1;
}

static enum kvmi_status accept_one(struct silent *silent, struct kvmi_error *err)
{
	enum kvmi_status status;
	struct kvmi_vm *vm;

	status = kvmi_listener_accept(silent->listener, &vm, err);
	if (status != KVMI_OK)
		return status;
	if (silent->count == SILENT_MAX) {
		kvmi_vm_close(silent->list[0]);
		drop(silent, 0);
	}
	/* it is asked when there is something, never waited for */
	kvmi_vm_set_timeout(vm, 1, NULL);
	silent->list[silent->count++] = vm;

	return KVMI_ERR_NOTHING;
}

enum kvmi_status silent_take(struct silent *silent, const struct pollfd *fds,
			     struct kvmi_vm **vm, struct kvmi_error *err)
{
	size_t i;

	/* from the end: those that go don't move the others */
	for (i = silent->count; i > 0; i--) {
		struct kvmi_vm *candidate = silent->list[i - 1];
		enum kvmi_status status;

		if (!fds[i].revents)
			continue;
		status = kvmi_vm_wait_hello(candidate, err);
		if (status == KVMI_ERR_TIMEOUT)
			continue;
		drop(silent, i - 1);
		if (status == KVMI_OK) {
			kvmi_vm_set_timeout(candidate, TIMEOUT_MS, NULL);
			*vm = candidate;
			return KVMI_OK;
		}
		/* a paused VM's QEMU may go without a word */
		if (status != KVMI_ERR_CLOSED)
			complain("%s", err->message);
		kvmi_vm_close(candidate);
	}

	return fds[0].revents ? accept_one(silent, err) : KVMI_ERR_NOTHING;
}

void silent_free(struct silent *silent)
{
	while (silent->count)
		kvmi_vm_close(silent->list[--silent->count]);
	kvmi_listener_free(silent->listener);
	silent->listener = NULL;
}
