/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Connections in a GLib main loop */

#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <glib.h>
#include <glib/gstdio.h>

#include <kvmi/kvmi-glib.h>

#include "sim.h"

struct tool {
	GMainLoop *loop;
	struct kvmi_vm *vm;
	struct kvmi_vm_event *held;
	unsigned int events, ends, timeouts, told, unhooks;
	uint8_t data[16];
};

static gboolean on_event(struct kvmi_vm *vm, struct kvmi_vm_event *event,
			 const struct kvmi_error *err, gpointer context)
{
	struct tool *tool = context;

	g_assert_true(vm == tool->vm);
	if (!event) {
		g_assert_cmpint(err->status, ==, KVMI_ERR_CLOSED);
		tool->ends++;
		g_main_loop_quit(tool->loop);
		return G_SOURCE_REMOVE;
	}
	g_assert_cmpint(event->id, ==, KVMI_EV_PAUSE);
	tool->events++;
	/* the first is answered later than the others */
	if (!tool->held) {
		tool->held = event;
		return G_SOURCE_CONTINUE;
	}
	g_assert_cmpint(kvmi_vm_reply(vm, event, KVMI_ACTION_CONTINUE, NULL),
			==, KVMI_OK);
	kvmi_vm_event_free(event);
	if (tool->events == 3) {
		g_assert_cmpint(kvmi_vm_reply(vm, tool->held,
					      KVMI_ACTION_CONTINUE, NULL),
				==, KVMI_OK);
		kvmi_vm_event_free(tool->held);
	}

	return G_SOURCE_CONTINUE;
}

static void on_read(struct kvmi_vm *vm, const struct kvmi_error *result,
		    void *context)
{
	struct tool *tool = context;

	g_assert_true(vm == tool->vm);
	g_assert_cmpint(result->status, ==, KVMI_OK);
	g_assert_cmphex(tool->data[3], ==, 0x99);
	tool->told++;
}

static void on_unhook(struct kvmi_vm *vm, void *context)
{
	struct tool *tool = context;

	g_assert_true(vm == tool->vm);
	tool->unhooks++;
}

static gboolean on_vm(struct kvmi_listener *listener, struct kvmi_vm *vm,
		      gpointer context)
{
	static const uint16_t vcpus[] = { 0, 1, 2 };
	struct tool *tool = context;
	struct kvmi_call *call;
	GSource *source;

	g_assert_nonnull(listener);
	tool->vm = vm;
	g_assert_cmpint(kvmi_vm_connect(vm, 0, 0, NULL), ==, KVMI_OK);
	source = kvmi_vm_source_new(vm);
	g_source_set_callback(source, G_SOURCE_FUNC(on_event), tool, NULL);
	g_source_attach(source, NULL);
	g_source_unref(source);
	g_assert_cmpint(kvmi_vm_on_unhook(vm, on_unhook, tool, NULL), ==,
			KVMI_OK);
	/* whose answer is here when the loop is about to sleep */
	g_assert_cmpint(kvmi_vm_start_read_physical(vm, 0, tool->data, 16, &call,
						    NULL), ==, KVMI_OK);
	kvmi_call_then(call, on_read, tool);
	/* their events are in the queue when this returns */
	g_assert_cmpint(kvmi_vm_pause_vcpus(vm, vcpus, 3, true, NULL, NULL), ==,
			KVMI_OK);

	return G_SOURCE_REMOVE;
}

static gboolean on_timeout(gpointer context)
{
	struct tool *tool = context;

	/* the peer goes when all has been answered */
	tool->timeouts++;

	return G_SOURCE_CONTINUE;
}

static void serve(struct sim *sim)
{
	if (!sim_handshake(sim))
		return;
	while (sim->replies < 3 && sim_receive(sim))
		sim_serve_one(sim);
	sim_unhook(sim);
}

static void test_loop(void)
{
	g_autofree char *folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(folder, "socket", NULL);
	struct tool tool = { .loop = g_main_loop_new(NULL, FALSE) };
	struct kvmi_listener *listener;
	struct sim *sim = g_new0(struct sim, 1);
	GSource *source;
	guint timer;

	listener = kvmi_listener_new_unix(path, 0, NULL);
	g_assert_nonnull(listener);
	source = kvmi_listener_source_new(listener);
	g_source_set_callback(source, G_SOURCE_FUNC(on_vm), &tool, NULL);
	g_source_attach(source, NULL);
	timer = g_timeout_add(10, on_timeout, &tool);
	sim->script = serve;
	sim->memory[3] = 0x99;
	sim_connect(sim, path);
	g_main_loop_run(tool.loop);
	g_assert_cmpint(tool.events, ==, 3);
	g_assert_cmpint(tool.told, ==, 1);
	g_assert_cmpint(tool.unhooks, ==, 1);
	g_assert_cmpint(tool.ends, ==, 1);
	/* a source that is always ready would have starved this one */
	g_assert_true(g_source_is_destroyed(source));
	g_source_unref(source);
	g_source_remove(timer);
	kvmi_vm_close(tool.vm);
	sim_stop(sim);
	kvmi_listener_free(listener);
	g_main_loop_unref(tool.loop);
	g_free(sim);
	g_rmdir(folder);
}

static void count_warning(const gchar *domain, GLogLevelFlags level,
			  const gchar *text, gpointer context)
{
	unsigned int *warnings = context;

	(void)domain, (void)level;
	g_assert_nonnull(strstr(text, "Too many open files"));
	++*warnings;
}

static gboolean quit(gpointer loop)
{
	g_main_loop_quit(loop);

	return G_SOURCE_REMOVE;
}

static gboolean keep_vm(struct kvmi_listener *listener, struct kvmi_vm *vm,
			gpointer context)
{
	struct tool *tool = context;

	g_assert_nonnull(listener);
	tool->vm = vm;
	g_main_loop_quit(tool->loop);

	return G_SOURCE_CONTINUE;
}

/* No file descriptors left: said now and then, and over when there are some */
static void test_no_fds(void)
{
	g_autofree char *folder = NULL, *path = NULL;
	struct tool tool = { };
	struct sim *sim;
	struct kvmi_listener *listener;
	unsigned int warnings = 0;
	struct rlimit limit, few;
	GLogLevelFlags fatal;
	GSource *source;
	guint handler;

	/* its accept() takes the connection before it fails */
	if (g_getenv("LD_PRELOAD") &&
	    strstr(g_getenv("LD_PRELOAD"), "vgpreload")) {
		g_test_skip("valgrind");
		return;
	}
	folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	path = g_build_filename(folder, "socket", NULL);
	tool.loop = g_main_loop_new(NULL, FALSE);
	sim = g_new0(struct sim, 1);
	listener = kvmi_listener_new_unix(path, 0, NULL);
	g_assert_nonnull(listener);
	source = kvmi_listener_source_new(listener);
	g_source_set_callback(source, G_SOURCE_FUNC(keep_vm), &tool, NULL);
	g_source_attach(source, NULL);
	sim_connect(sim, path);
	g_assert_cmpint(getrlimit(RLIMIT_NOFILE, &limit), ==, 0);
	few = limit;
	few.rlim_cur = dup(0);
	close(few.rlim_cur);
	g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &few), ==, 0);
	fatal = g_log_set_always_fatal(G_LOG_FATAL_MASK);
	handler = g_log_set_handler(NULL, G_LOG_LEVEL_WARNING, count_warning,
				    &warnings);
	g_timeout_add(500, quit, tool.loop);
	g_main_loop_run(tool.loop);
	g_assert_null(tool.vm);
	g_assert_cmpint(warnings, >, 0);
	g_assert_cmpint(warnings, <=, 4);

	g_assert_cmpint(setrlimit(RLIMIT_NOFILE, &limit), ==, 0);
	g_main_loop_run(tool.loop);
	g_assert_nonnull(tool.vm);
	g_log_remove_handler(NULL, handler);
	g_log_set_always_fatal(fatal);
	kvmi_vm_close(tool.vm);
	sim_stop(sim);
	g_source_destroy(source);
	g_source_unref(source);
	kvmi_listener_free(listener);
	g_main_loop_unref(tool.loop);
	g_free(sim);
	g_rmdir(folder);
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/glib/loop", test_loop);
	g_test_add_func("/glib/no-fds", test_no_fds);

	return g_test_run();
}
