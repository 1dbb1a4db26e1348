/* SPDX-License-Identifier: LGPL-2.1-or-later */

#include <kvmi/kvmi-glib.h>

/* After a failure to accept a connection */
#define PAUSE_US 200000

struct vm_source {
	GSource source;
	struct kvmi_vm *vm;
	gpointer tag;
	/* what the connection said last; told once all events are out */
	struct kvmi_error err;
	struct kvmi_vm_event *next;
};

static gboolean has_event(struct vm_source *source)
{
	if (!source->next)
		source->next = kvmi_vm_next_event(source->vm);

	return source->next != NULL;
}

static gboolean vm_prepare(GSource *base, gint *timeout)
{
	struct vm_source *source = (struct vm_source *)base;
	short events = kvmi_vm_poll_events(source->vm);

	*timeout = kvmi_vm_next_timeout(source->vm);
	g_source_modify_unix_fd(base, source->tag, (GIOCondition)events);

	/* a call of another function may have brought some along */
	return has_event(source) || *timeout == 0;
}

static gboolean vm_check(GSource *base)
{
	struct vm_source *source = (struct vm_source *)base;

	return source->next || g_source_query_unix_fd(base, source->tag) ||
	       kvmi_vm_next_timeout(source->vm) == 0;
}

static gboolean vm_dispatch(GSource *base, GSourceFunc callback,
			    gpointer user_data)
{
	struct vm_source *source = (struct vm_source *)base;
	KvmiVmSourceFunc function = (KvmiVmSourceFunc)(void (*)(void))callback;
	enum kvmi_status status;

	if (!function)
		return G_SOURCE_REMOVE;
	status = kvmi_vm_process(source->vm, &source->err);
	kvmi_vm_dispatch(source->vm);
	/* not all at once: others have their turn */
	if (has_event(source)) {
		struct kvmi_vm_event *event = source->next;

		source->next = NULL;
		return function(source->vm, event, NULL, user_data);
	}
	if (status != KVMI_OK && status != KVMI_ERR_NOTHING) {
		function(source->vm, NULL, &source->err, user_data);
		return G_SOURCE_REMOVE;
	}

	return G_SOURCE_CONTINUE;
}

static void vm_finalize(GSource *base)
{
	kvmi_vm_event_free(((struct vm_source *)base)->next);
}

GSource *kvmi_vm_source_new(struct kvmi_vm *vm)
{
	static GSourceFuncs functions = {
		.prepare = vm_prepare, .check = vm_check,
		.dispatch = vm_dispatch, .finalize = vm_finalize,
	};
	struct vm_source *source;

	g_return_val_if_fail(vm, NULL);

	source = (struct vm_source *)g_source_new(&functions, sizeof(*source));
	source->vm = vm;
	source->tag = g_source_add_unix_fd(&source->source, kvmi_vm_fd(vm),
					   G_IO_IN);
	g_source_set_name(&source->source, "kvmi-vm");

	return &source->source;
}

struct listener_source {
	GSource source;
	struct kvmi_listener *listener;
	gpointer tag;
};

static gboolean listener_dispatch(GSource *base, GSourceFunc callback,
				  gpointer user_data)
{
	struct listener_source *source = (struct listener_source *)base;
	KvmiListenerSourceFunc function =
		(KvmiListenerSourceFunc)(void (*)(void))callback;
	struct kvmi_error err;
	struct kvmi_vm *vm;

	if (!function)
		return G_SOURCE_REMOVE;
	if (g_source_get_ready_time(base) >= 0) {
		g_source_set_ready_time(base, -1);
		g_source_modify_unix_fd(base, source->tag, G_IO_IN);
	}
	switch (kvmi_listener_accept(source->listener, &vm, &err)) {
	case KVMI_OK:
		return function(source->listener, vm, user_data);
	case KVMI_ERR_NOTHING:
		return G_SOURCE_CONTINUE;
	default:
		/*
		 * Out of descriptors or memory: that may pass, but until then
		 * the connection that waits would make us ready all the time.
		 */
		g_warning("%s", err.message);
		g_source_modify_unix_fd(base, source->tag, 0);
		g_source_set_ready_time(base,
					g_source_get_time(base) + PAUSE_US);
		return G_SOURCE_CONTINUE;
	}
}

GSource *kvmi_listener_source_new(struct kvmi_listener *listener)
{
	static GSourceFuncs functions = { .dispatch = listener_dispatch };
	struct listener_source *source;

	g_return_val_if_fail(listener, NULL);

	source = (struct listener_source *)g_source_new(&functions,
							sizeof(*source));
	source->listener = listener;
	source->tag = g_source_add_unix_fd(&source->source,
					   kvmi_listener_fd(listener), G_IO_IN);
	g_source_set_name(&source->source, "kvmi-listener");

	return &source->source;
}
