/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Connections and listeners in a GLib main loop.
 *
 * THREADS.  Sources can be made by any thread; their functions are called in the
 * thread that runs the main context that they are attached to.  Other threads may
 * use vm meanwhile, as kvmi/kvmi.h says.
 */
#ifndef KVMI_GLIB_H
#define KVMI_GLIB_H

#include <glib.h>
#include <kvmi/kvmi.h>

G_BEGIN_DECLS

/*
 * status KVMI_OK: event is the next one, to be answered by the callback, at once
 * or later, and freed by it.
 * Else the connection has ended, as err says, event is NULL, and this is the last
 * call.
 * Returns G_SOURCE_CONTINUE, or G_SOURCE_REMOVE for the end of the source.
 */
typedef gboolean (*KvmiVmSourceFunc)(struct kvmi_vm *vm,
				     struct kvmi_vm_event *event,
				     const struct kvmi_error *err,
				     gpointer user_data);

/*
 * Waits for events of vm, which has been connected and must outlive the source.
 * Set the callback by g_source_set_callback(source, G_SOURCE_FUNC(function), ...).
 * Answers of other threads that the socket did not take at once are sent from
 * here, too, but see kvmi_vm_flush().  The functions of kvmi_call_then() are called
 * from here as well.
 */
GSource *kvmi_vm_source_new(struct kvmi_vm *vm);

/* A VM has connected, and belongs to the callback; kvmi_vm_connect() is next. */
typedef gboolean (*KvmiListenerSourceFunc)(struct kvmi_listener *listener,
					   struct kvmi_vm *vm,
					   gpointer user_data);

/* Waits for VMs to connect to listener, which must outlive the source */
GSource *kvmi_listener_source_new(struct kvmi_listener *listener);

G_END_DECLS

#endif /* KVMI_GLIB_H */
