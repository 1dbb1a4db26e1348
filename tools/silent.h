/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SILENT_H
#define SILENT_H

#include <poll.h>
#include <stddef.h>

#include <kvmi/kvmi.h>

/*
 * A listener, and those that have connected and have said nothing so far: QEMU
 * connects while its VM is paused, too, but speaks when it runs.  On vsock, any VM
 * can connect.  None of them must keep others from being heard; if there are too
 * many, the oldest goes (a QEMU tries again).
 */
#define SILENT_MAX 64
#define SILENT_FDS (1 + SILENT_MAX)

struct silent {
	struct kvmi_listener *listener;
	struct kvmi_vm *list[SILENT_MAX];	/* the oldest first */
	size_t count;
};

/* For poll(): fills in fds[SILENT_FDS], returns how many */
nfds_t silent_fds(const struct silent *silent, struct pollfd *fds);
/*
 * After poll().  KVMI_OK: *vm, the caller's from now on, has sent its handshake.
 * KVMI_ERR_NOTHING: none has.  Else: a failure to accept one, which may pass.
 */
enum kvmi_status silent_take(struct silent *silent, const struct pollfd *fds,
			     struct kvmi_vm **vm, struct kvmi_error *err);
void silent_free(struct silent *silent);

#endif
