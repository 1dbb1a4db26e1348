/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The program kvmi: what it does without a VM */

#include <stdbool.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <glib.h>
#include <glib/gstdio.h>

static char *tool, *folder;

/* Returns the exit status; *out gets both outputs, the caller frees it */
static int run(char **out, const char *command, ...) G_GNUC_NULL_TERMINATED;

static int run(char **out, const char *command, ...)
{
	g_autoptr(GPtrArray) argv = g_ptr_array_new();
	g_autofree char *text = NULL, *errors = NULL;
	g_autoptr(GError) error = NULL;
	const char *argument;
	int status;
	va_list args;

	g_ptr_array_add(argv, tool);
	va_start(args, command);
	for (argument = command; argument; argument = va_arg(args, char *))
		g_ptr_array_add(argv, (char *)argument);
	va_end(args);
	g_ptr_array_add(argv, NULL);
	g_spawn_sync(NULL, (char **)argv->pdata, NULL, G_SPAWN_DEFAULT, NULL,
		     NULL, &text, &errors, &status, &error);
	g_assert_no_error(error);
	g_assert_true(WIFEXITED(status));
	if (out)
		*out = g_strconcat(text, errors, NULL);

	return WEXITSTATUS(status);
}

static void test_statuses(void)
{
	static const char *const commands[] = {
		"watch", "stat", "protect", "info", "read", "dump",
		"ps", "modules", "trace",
	};
	g_autofree char *socket = g_build_filename(folder, "socket", NULL);
	g_autofree char *file = g_build_filename(folder, "dump", NULL);
	g_autofree char *part = g_build_filename(folder, "dump.part", NULL);
	g_autofree char *text = NULL;
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(commands); i++) {
		g_autofree char *help = NULL, *none = NULL;

		g_assert_cmpint(run(&help, commands[i], "--help", NULL), ==, 0);
		g_assert_nonnull(strstr(help, "--socket"));
		/* complains, and does not wait */
		g_assert_cmpint(run(&none, commands[i], NULL), ==, 2);
		g_assert_cmpint(run(NULL, commands[i], "--nonsense", NULL), ==, 2);
	}
	g_assert_cmpint(run(NULL, "nothing", NULL), ==, 2);
	g_assert_cmpint(run(NULL, "doctor", "argument", NULL), ==, 2);
	g_assert_cmpint(run(NULL, "ps", "-s", socket, "-t", "1", NULL), ==, 3);
	g_assert_cmpint(run(NULL, "ps", "-s", "/nowhere/socket", NULL), ==, 1);
	g_assert_cmpint(run(NULL, "ps", "-s", "vsock:", NULL), ==, 1);
	g_assert_cmpint(run(NULL, "ps", "-s", "vsock:0", NULL), ==, 1);
	g_assert_cmpint(run(NULL, "ps", "-s", socket, "-m", "/nowhere", NULL),
			==, 1);
	g_assert_cmpint(run(NULL, "trace", "-s", socket, "-f", "x", "-c", "0",
			    NULL), ==, 2);
	g_assert_cmpint(run(NULL, "watch", "-s", socket, "--cr", "2", NULL),
			==, 2);
	g_assert_cmpint(run(NULL, "stat", "-s", socket, "-a", "x=q", NULL),
			==, 2);
	g_assert_cmpint(run(NULL, "watch", "-s", socket, "--syscall", "a b",
			    NULL), ==, 2);
	g_assert_cmpint(run(NULL, "dump", "-s", socket, "-r", "1,2", "file",
			    NULL), ==, 2);
	/* a dump that did not come about leaves what was there */
	g_assert_true(g_file_set_contents(file, "old", -1, NULL));
	g_assert_cmpint(run(NULL, "dump", "-s", socket, "-t", "1", file, NULL),
			==, 3);
	g_assert_true(g_file_get_contents(file, &text, NULL, NULL));
	g_assert_cmpstr(text, ==, "old");
	g_assert_false(g_file_test(part, G_FILE_TEST_EXISTS));
}

/* What could not be written is said, and tells in the status */
static void test_full(void)
{
	static const char *const commands[] = {
		"--help", "--version", "read --help", "doctor", "doctor --json",
		"watch -s $S", "stat -s $S --json",
	};
	g_autofree char *socket = g_build_filename(folder, "socket", NULL);
	size_t i;

	g_setenv("S", socket, true);
	g_setenv("KVMI", tool, true);
	for (i = 0; i < G_N_ELEMENTS(commands); i++) {
		g_autofree char *script = g_strdup_printf(
			"exec \"$KVMI\" %s >/dev/full", commands[i]);
		char *argv[] = { "sh", "-c", script, NULL };
		g_autofree char *errors = NULL;
		int status;

		g_assert_true(g_spawn_sync(NULL, argv, NULL, G_SPAWN_SEARCH_PATH,
					   NULL, NULL, NULL, &errors, &status,
					   NULL));
		g_test_message("%s: %s", commands[i], errors);
		g_assert_true(WIFEXITED(status));
		g_assert_cmpint(WEXITSTATUS(status), ==, 1);
		g_assert_nonnull(strstr(errors, "standard output: "));
	}
}

/* ------------------------------------------------------------------------
 * doctor
 */

static char *path_of(const char *name)
{
	return g_build_filename(folder, "host", name, NULL);
}

static void put(const char *name, const char *text)
{
	g_autofree char *path = path_of(name);
	g_autofree char *parent = g_path_get_dirname(path);

	g_assert_cmpint(g_mkdir_with_parents(parent, 0755), ==, 0);
	g_assert_true(g_file_set_contents(path, text, -1, NULL));
	g_assert_cmpint(g_chmod(path, 0755), ==, 0);
}

static void drop(const char *name)
{
	g_autofree char *path = path_of(name);

	g_assert_cmpint(g_unlink(path), ==, 0);
}

/* A host where all is well */
static void good_host(void)
{
	put("proc/cpuinfo", "flags\t\t: fpu vme svm lm\n");
	put("sys/module/kvm/parameters/introspection", "Y\n");
	put("sys/module/kvm_amd/parameters/npt", "Y\n");
	put("sys/module/kvm_amd/parameters/nested", "0\n");
	put("sys/module/kvm_amd/parameters/sev", "N\n");
	put("sys/module/apparmor/parameters/enabled", "Y\n");
	put("dev/kvm", "");
	put("etc/libvirt/qemu.conf", "#cgroup_device_acl = [\n");
	put("etc/apparmor.d/abstractions/libvirt-qemu", "\n");
	put("etc/apparmor.d/local/abstractions/libvirt-qemu",
	    "  \"/tmp/kvmi-test.sock\" rw,\n");
	put("qemu", "#!/bin/sh\nprintf 'List:\\n  iothread\\n  kvmi\\n  rng\\n'\n");
}

/* Where the tool is to listen */
static const char *doctor_socket = "/tmp/kvmi-test.sock";

/* state NULL: the host is ready */
static void doctor(const char *check, const char *state, const char *cure)
{
	g_autofree char *root = path_of(""), *qemu = path_of("qemu");
	g_autofree char *out = NULL, *wanted = NULL;
	bool missing = !g_strcmp0(state, "missing");
	int status;

	status = run(&out, "doctor", "--json", "--root", root, "--qemu", qemu,
		     "--socket", doctor_socket, NULL);
	g_test_message("%s", out);
	g_assert_cmpint(status, ==, missing);
	g_assert_true(missing == !!strstr(out, "\"missing\""));
	if (!state)
		return;
	wanted = g_strdup_printf("\"check\":\"%s\",\"state\":\"%s\"", check,
				 state);
	g_assert_nonnull(strstr(out, wanted));
	if (cure)
		g_assert_nonnull(strstr(strstr(out, wanted), cure));
}

static void test_doctor(void)
{
	g_autofree char *text = NULL, *root = path_of("");

	good_host();
	doctor(NULL, NULL, NULL);

	put("proc/cpuinfo", "flags\t\t: fpu lm\n");
	doctor("cpu", "missing", "firmware");
	good_host();
	drop("sys/module/kvm/parameters/introspection");
	doctor("modules", "missing", "kvm-amd.ko");
	put("sys/module/kvm/parameters/introspection", "N\n");
	doctor("parameter", "missing", "options kvm introspection=1");
	good_host();
	put("sys/module/kvm_amd/parameters/npt", "0\n");
	doctor("paging", "missing", "npt=1");
	good_host();
	put("sys/module/kvm_amd/parameters/nested", "1\n");
	doctor("nested", "note", NULL);
	good_host();
	put("sys/module/kvm_amd/parameters/sev", "Y\n");
	doctor("sev", "note", NULL);
	good_host();
	put("sys/kernel/security/lockdown", "none [integrity] confidentiality\n");
	doctor("lockdown", "note", NULL);
	drop("sys/kernel/security/lockdown");
	drop("dev/kvm");
	doctor("device", "missing", NULL);
	good_host();
	put("qemu", "#!/bin/sh\nprintf 'List:\\n  iothread\\n  notkvmi\\n  kvmi-x\\n'\n");
	doctor("qemu", "missing", "--qemu");
	put("qemu", "#!/bin/sh\nprintf '  kvmi\\n'; exit 1\n");
	doctor("qemu", "missing", NULL);
	good_host();
	put("etc/libvirt/qemu.conf", "a = 1\ncgroup_device_acl = [\n"
	    "    \"/dev/null\",\n]\nb = \"/dev/kvm\"\n");
	doctor("cgroup", "missing", "cgroup_device_acl");
	put("etc/libvirt/qemu.conf", "a = 1\ncgroup_device_acl = [\n"
	    "    \"/dev/null\", \"/dev/kvm\",\n]\n");
	doctor("cgroup", "ok", NULL);
	put("etc/apparmor.d/local/abstractions/libvirt-qemu",
	    "# \"/tmp/kvmi-test.sock\" rw,\n/tmp/other rw,\n");
	doctor("apparmor", "missing", "kvmi libvirt enable");
	/* as kvmi libvirt enable writes it */
	put("etc/apparmor.d/local/abstractions/libvirt-qemu",
	    "  \"/tmp/@{profile_name}.sock\" rw, # kvmi libvirt, domain 1d5b7c2e-3f64-4a0e-9c1b-5a2f0d6e8b17\n");
	doctor("apparmor", "missing", "kvmi libvirt enable");
	doctor_socket = "/tmp/libvirt-1d5b7c2e-3f64-4a0e-9c1b-5a2f0d6e8b17.sock";
	doctor("apparmor", "ok", NULL);
	doctor_socket = "/tmp/libvirt-1d5b7c2e-3f64-4a0e-9c1b.sock";
	doctor("apparmor", "missing", NULL);
	doctor_socket = "/tmp/kvmi-test.sock";
	put("sys/module/apparmor/parameters/enabled", "N\n");
	doctor("apparmor", "ok", NULL);

	g_assert_cmpint(run(&text, "doctor", "--root", root, "--qemu",
			    "/nowhere/qemu", "--socket", "/nowhere/socket",
			    NULL), ==, 1);
	g_assert_nonnull(strstr(text, "mkdir -m 0755 -p /nowhere"));
	g_assert_nonnull(strstr(text, "/nowhere/qemu does not run"));
	g_assert_nonnull(strstr(text, "not ready"));
}

int main(int argc, char **argv)
{
	int result;

	g_test_init(&argc, &argv, NULL);
	if (argc > 1) {
		tool = g_strdup(argv[1]);
	} else {
		g_autofree char *self = g_file_read_link("/proc/self/exe", NULL);
		g_autofree char *here = g_path_get_dirname(self);

		tool = g_build_filename(here, "../../tools/kvmi", NULL);
	}
	folder = g_dir_make_tmp("kvmi-tool-XXXXXX", NULL);
	/* a tool that waits where it should not */
	alarm(110);

	g_test_add_func("/tool/statuses", test_statuses);
	g_test_add_func("/tool/full", test_full);
	g_test_add_func("/tool/doctor", test_doctor);
	result = g_test_run();

	{
		char *argv_rm[] = { "rm", "-rf", folder, NULL };

		g_spawn_sync(NULL, argv_rm, NULL, G_SPAWN_SEARCH_PATH, NULL,
			     NULL, NULL, NULL, NULL, NULL);
	}

	return result;
}
