/* SPDX-License-Identifier: GPL-2.0-or-later */
/* kvmi doctor: is this host ready? */

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvmi.h"
#include "output.h"

/* As the patch to linux/kvm.h has it */
#define KVM_CAP_INTROSPECTION 0x4b564d49
#define QEMU_TIMEOUT_MS 20000
#define FILE_MAX 65536
#define DOMAIN_RULES "/etc/apparmor.d/abstractions/libvirt-qemu"
#define LOCAL_RULES "/etc/apparmor.d/local/abstractions/libvirt-qemu"

static const char help[] =
"Usage: kvmi doctor [OPTION]...\n"
"\n"
"Tells whether VMs of this host can be introspected, what is missing, and the\n"
"command that cures it.  Changes nothing.  Ends with status 0 if nothing is\n"
"missing, else 1.\n"
"\n"
"Options:\n"
"  -s, --socket PATH      also: can a tool listen there, may QEMU connect?\n"
"  -Q, --qemu FILE        the QEMU that is to be used (default: the\n"
"                         qemu-system-x86_64 that is in $PATH)\n"
"  -j, --json             print one JSON object a line\n"
"  -h, --help             print this\n"
"\n"
"JSON: check, state (\"ok\", \"missing\", \"note\"), message, cure (if missing)\n";

struct doctor {
	const char *root;	/* for tests: where /proc, /sys... are */
	const char *socket;
	const char *qemu;
	bool json;
	unsigned int missing;
	const char *vendor;	/* of kvm's module: "kvm_amd"; NULL: not known */
};

enum state { OK, MISSING, NOTE };

/* cure: NULL, or a command or what else there is to do */
static void say(struct doctor *d, const char *check, enum state state,
		const char *cure, const char *format, ...)
	__attribute__((format(printf, 5, 6)));

static void say(struct doctor *d, const char *check, enum state state,
		const char *cure, const char *format, ...)
{
	static const char *const states[] = { "ok", "missing", "note" };
	struct line line;
	char text[512];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (state == MISSING)
		d->missing++;
	if (d->json) {
		json_start(&line, 0, NULL);
		json_string(&line, "check", check);
		json_string(&line, "state", states[state]);
		json_string(&line, "message", text);
		if (cure)
			json_string(&line, "cure", cure);
		json_end(&line, false);
		return;
	}
	human(0, false, "%-8s %s", states[state], text);
	if (cure)
		human(0, false, "         -> %s", cure);
}

static void path_of(const struct doctor *d, const char *path, char *full,
		    size_t size)
{
	snprintf(full, size, "%s%s", d->root, path);
}

static bool exists(const struct doctor *d, const char *path)
{
	char full[512];

	path_of(d, path, full, sizeof(full));

	return !access(full, F_OK);
}

/* The first FILE_MAX bytes; "" if it cannot be read.  The caller frees it. */
static char *contents(const struct doctor *d, const char *path)
{
	char full[512], *text = calloc(1, FILE_MAX + 1);
	ssize_t size;
	int fd;

	if (!text)
		abort();
	path_of(d, path, full, sizeof(full));
	fd = open(full, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		size = read(fd, text, FILE_MAX);
		text[size > 0 ? size : 0] = 0;
		close(fd);
	}

	return text;
}

/* A parameter that is Y or 1 */
static bool is_on(const struct doctor *d, const char *module,
		  const char *parameter)
{
	char path[256], *text;
	bool on;

	snprintf(path, sizeof(path), "/sys/module/%s/parameters/%s", module,
		 parameter);
	text = contents(d, path);
	on = text[0] == 'Y' || text[0] == '1';
	free(text);

	return on;
}

/* ------------------------------------------------------------------------
 * The kernel
 */

static void check_cpu(struct doctor *d)
{
	char *info = contents(d, "/proc/cpuinfo");

	if (strstr(info, " svm")) {
		d->vendor = "kvm_amd";
		say(d, "cpu", OK, NULL, "the CPU can virtualise (SVM)");
	} else if (strstr(info, " vmx")) {
		d->vendor = "kvm_intel";
		say(d, "cpu", OK, NULL, "the CPU can virtualise (VMX)");
	} else {
		say(d, "cpu", MISSING,
		    "switch it on in the firmware's set-up; in a VM: give it nested virtualisation",
		    "the CPU has neither VMX nor SVM");
	}
	free(info);
}

static void check_modules(struct doctor *d)
{
	const char *vendor = d->vendor ? d->vendor : "kvm_intel or kvm_amd";
	const char *file = !d->vendor ? "kvm-VENDOR.ko" :
			   d->vendor[4] == 'a' ? "kvm-amd.ko" : "kvm-intel.ko";
	char cure[512];

	snprintf(cure, sizeof(cure),
		 "with all VMs off: modprobe -r kvm_amd kvm_intel kvm; modprobe -a irqbypass ccp; insmod kvm.ko introspection=1; insmod %s (those built from this project)",
		 file);
	if (!exists(d, "/sys/module/kvm")) {
		say(d, "modules", MISSING, cure, "kvm is not loaded");
		return;
	}
	if (!exists(d, "/sys/module/kvm_amd") &&
	    !exists(d, "/sys/module/kvm_intel"))
		say(d, "modules", MISSING, cure, "%s is not loaded", vendor);
	if (!exists(d, "/sys/module/kvm/parameters/introspection")) {
		say(d, "modules", MISSING, cure,
		    "the kvm that is loaded has no introspection: it is another");
		return;
	}
	say(d, "modules", OK, NULL, "kvm is loaded, and has introspection");
	if (is_on(d, "kvm", "introspection"))
		say(d, "parameter", OK, NULL, "introspection is on");
	else
		say(d, "parameter", MISSING,
		    "echo options kvm introspection=1 >/etc/modprobe.d/kvmi.conf; then, with all VMs off, load kvm again (kvm built in: kvm.introspection=1 on the kernel's command line)",
		    "introspection is off");
}

static void check_device(struct doctor *d)
{
	struct stat info;
	char path[512];
	int fd, version;

	path_of(d, "/dev/kvm", path, sizeof(path));
	if (access(path, F_OK)) {
		say(d, "device", MISSING, "see above: the modules",
		    "there is no /dev/kvm");
		return;
	}
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		say(d, "device", MISSING,
		    "usermod -aG kvm USER (and log in again), or run QEMU as root",
		    "/dev/kvm cannot be opened by this user: %s",
		    strerror(errno));
		return;
	}
	say(d, "device", OK, NULL, "/dev/kvm can be opened");
	if (!fstat(fd, &info) && S_ISCHR(info.st_mode) &&
	    is_on(d, "kvm", "introspection")) {
		version = ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_INTROSPECTION);
		if (version > 0)
			say(d, "kvm", OK, NULL,
			    "KVM speaks version %d of the protocol", version);
		else
			say(d, "kvm", MISSING,
			    "load kvm.ko and the vendor's module from the same build",
			    "KVM says that it has no introspection");
	}
	close(fd);
}

static void check_caveats(struct doctor *d)
{
	char *lockdown = contents(d, "/sys/kernel/security/lockdown");
	bool amd = exists(d, "/sys/module/kvm_amd");
	bool loaded = amd || exists(d, "/sys/module/kvm_intel");
	const char *module = amd ? "kvm_amd" : "kvm_intel";
	const char *paging = amd ? "npt" : "ept";
	char cure[128];

	if (strstr(lockdown, "[integrity]") ||
	    strstr(lockdown, "[confidentiality]"))
		say(d, "lockdown", NOTE, NULL,
		    "Secure Boot: the kernel loads signed modules only");
	free(lockdown);
	if (!loaded)
		return;
	if (!is_on(d, module, paging)) {
		snprintf(cure, sizeof(cure), "load %s with %s=1", module, paging);
		say(d, "paging", MISSING, cure,
		    "without %s there is no page access", paging);
	}
	if (is_on(d, module, "nested"))
		say(d, "nested", NOTE, NULL,
		    "nested virtualisation is on: guests of a guest are not looked into");
	if (amd && is_on(d, module, "sev"))
		say(d, "sev", NOTE, NULL,
		    "SEV is on: guests with encrypted memory cannot be introspected");
}

/* ------------------------------------------------------------------------
 * QEMU
 */

static bool find_qemu(char *path, size_t size)
{
	const char *at = getenv("PATH"), *end;

	for (; at && *at; at = *end ? end + 1 : end) {
		end = at + strcspn(at, ":");
		snprintf(path, size, "%.*s/qemu-system-x86_64", (int)(end - at),
			 at);
		if (!access(path, X_OK))
			return true;
	}

	return false;
}

/* What it prints for -object help.  -1: it does not run; else the length. */
static int ask_qemu(const char *qemu, char *text, size_t size)
{
	int64_t deadline = now_ms() + QEMU_TIMEOUT_MS;
	int ends[2], status, length = 0;
	bool ended = false;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC))
		return -1;
	child = fork();
	if (!child) {
		int null = open("/dev/null", O_RDWR);

		dup2(null, STDIN_FILENO);
		dup2(null, STDERR_FILENO);
		dup2(ends[1], STDOUT_FILENO);
		execl(qemu, qemu, "-object", "help", (char *)NULL);
		_exit(127);
	}
	close(ends[1]);
	while (child > 0 && !ended && now_ms() < deadline) {
		struct pollfd poll_fd = { .fd = ends[0], .events = POLLIN };
		ssize_t part;

		if (poll(&poll_fd, 1, 500) <= 0)
			continue;
		part = read(ends[0], text + length, size - 1 - length);
		ended = part <= 0;
		if (part > 0)
			length += part;
	}
	close(ends[0]);
	text[length] = 0;
	if (child < 0)
		return -1;
	if (!ended)
		kill(child, SIGKILL);
	if (waitpid(child, &status, 0) < 0 || !ended || status)
		return -1;

	return length;
}

static void check_qemu(struct doctor *d)
{
	static const char cure[] =
		"build this project's QEMU and name it by --qemu, for libvirt in the domain's <emulator>";
	char path[4096], text[16384], *at;

	if (d->qemu) {
		snprintf(path, sizeof(path), "%s", d->qemu);
	} else if (!find_qemu(path, sizeof(path))) {
		say(d, "qemu", MISSING, cure,
		    "there is no qemu-system-x86_64 in $PATH");
		return;
	}
	if (ask_qemu(path, text, sizeof(text)) < 0) {
		say(d, "qemu", MISSING, cure, "%s does not run", path);
		return;
	}
	for (at = text; (at = strstr(at, "kvmi")); at++)
		if (at > text && isspace((unsigned char)at[-1]) &&
		    (!at[4] || isspace((unsigned char)at[4])))
			break;
	if (at)
		say(d, "qemu", OK, NULL, "%s has the kvmi object", path);
	else
		say(d, "qemu", MISSING, cure, "%s has no kvmi object", path);
}

/* ------------------------------------------------------------------------
 * The socket and libvirt
 */

static void check_socket(struct doctor *d)
{
	char directory[4096], cure[4200], *slash;
	static const struct sockaddr_un address;
	struct stat info;

	if (d->socket[0] != '/') {
		say(d, "socket", MISSING, "give a path that begins with /",
		    "QEMU may run in another directory: %s", d->socket);
		return;
	}
	if (strlen(d->socket) >= sizeof(address.sun_path)) {
		say(d, "socket", MISSING, "choose a shorter one",
		    "the path of a socket has at most %zu bytes",
		    sizeof(address.sun_path) - 1);
		return;
	}
	snprintf(directory, sizeof(directory), "%s", d->socket);
	slash = strrchr(directory, '/');
	slash[slash == directory] = 0;
	if (stat(directory, &info) || !S_ISDIR(info.st_mode)) {
		snprintf(cure, sizeof(cure), "mkdir -m 0755 -p %s", directory);
		say(d, "socket", MISSING, cure, "there is no directory %s",
		    directory);
	} else if (access(directory, W_OK | X_OK)) {
		say(d, "socket", MISSING, "run the tool as the directory's owner",
		    "this user may not make a socket in %s", directory);
	} else if (!lstat(d->socket, &info) && !S_ISSOCK(info.st_mode)) {
		snprintf(cure, sizeof(cure), "rm %s", d->socket);
		say(d, "socket", MISSING, cure, "%s is there, and no socket",
		    d->socket);
	} else {
		say(d, "socket", OK, NULL, "a tool can listen on %s", d->socket);
	}
}

/* Does a line that is no comment have that in it? */
static bool has_line(const char *text, const char *wanted)
{
	while (*text) {
		const char *start = text + strspn(text, " \t");
		size_t length = strcspn(start, "\n");
		const char *found = strstr(start, wanted);

		if (*start != '#' && found && found < start + length)
			return true;
		text = start + length + (start[length] == '\n');
	}

	return false;
}

/* Does a rule name the socket?  As kvmi libvirt writes it, with the variable for the
 * profile's name in place of "libvirt-UUID", or word for word */
static bool has_rule(const char *rules, const char *socket)
{
	static const char form[] = "libvirt-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
	const char *name = strstr(socket, "libvirt-");
	char line[PATH_MAX];
	size_t i = strlen("libvirt-");

	if (has_line(rules, socket))
		return true;
	while (name && (form[i] == 'x' ? isxdigit(name[i]) : form[i] && form[i] == name[i]))
		i++;
	if (!name || form[i])
		return false;
	snprintf(line, sizeof(line), "%.*s@{profile_name}%s", (int)(name - socket), socket,
		 name + i);

	return has_line(rules, line);
}

static void check_libvirt(struct doctor *d)
{
	char *config, *enabled, *rules, *acl;
	char cure[1024];

	if (!exists(d, "/etc/libvirt")) {
		say(d, "libvirt", NOTE, NULL, "libvirt is not installed");
		return;
	}
	config = contents(d, "/etc/libvirt/qemu.conf");
	acl = has_line(config, "cgroup_device_acl") ?
	      strstr(config, "\ncgroup_device_acl") : NULL;
	if (acl && !memmem(acl, strcspn(acl, "]"), "\"/dev/kvm\"", 10))
		say(d, "cgroup", MISSING,
		    "add \"/dev/kvm\" to cgroup_device_acl in /etc/libvirt/qemu.conf; systemctl restart libvirtd",
		    "libvirt keeps its VMs from /dev/kvm");
	else
		say(d, "cgroup", OK, NULL, "libvirt lets its VMs have /dev/kvm");
	free(config);

	enabled = contents(d, "/sys/module/apparmor/parameters/enabled");
	if (enabled[0] != 'Y' || !exists(d, DOMAIN_RULES)) {
		say(d, "apparmor", OK, NULL, "AppArmor does not confine VMs");
	} else if (!d->socket) {
		say(d, "apparmor", NOTE, NULL,
		    "AppArmor confines libvirt's VMs: 'kvmi libvirt enable DOMAIN' lets one connect to the tool; --socket PATH checks it");
	} else {
		rules = contents(d, LOCAL_RULES);
		snprintf(cure, sizeof(cure),
			 "kvmi libvirt enable DOMAIN; or by hand: echo '  \"%s\" rw,' >>%s",
			 d->socket, LOCAL_RULES);
		if (has_rule(rules, d->socket))
			say(d, "apparmor", OK, NULL,
			    "AppArmor lets libvirt's VMs connect to %s",
			    d->socket);
		else
			say(d, "apparmor", MISSING, cure,
			    "AppArmor keeps libvirt's VMs from %s", d->socket);
		free(rules);
	}
	free(enabled);
}

/* ------------------------------------------------------------------------ */

int doctor_main(int argc, char **argv)
{
	enum { OPTION_ROOT = 256 };
	static const struct option options[] = {
		{ "socket", required_argument, NULL, 's' },
		{ "qemu", required_argument, NULL, 'Q' },
		{ "json", no_argument, NULL, 'j' },
		{ "help", no_argument, NULL, 'h' },
		/* for tests */
		{ "root", required_argument, NULL, OPTION_ROOT },
		{ 0 },
	};
	struct doctor d = { .root = "" };
	int option;

	while ((option = getopt_long(argc, argv, "s:Q:jh", options, NULL)) >= 0) {
		switch (option) {
		case 's':
			d.socket = optarg;
			break;
		case 'Q':
			d.qemu = optarg;
			break;
		case 'j':
			d.json = true;
			break;
		case OPTION_ROOT:
			d.root = optarg;
			break;
		case 'h':
			fputs(help, stdout);
			return EXIT_OK;
		default:
			return EXIT_USAGE;
		}
	}
	if (optind < argc) {
		complain("%s: no such argument; see kvmi doctor --help",
			 argv[optind]);
		return EXIT_USAGE;
	}

	check_cpu(&d);
	check_modules(&d);
	check_device(&d);
	check_caveats(&d);
	check_qemu(&d);
	if (d.socket)
		check_socket(&d);
	check_libvirt(&d);
	if (!d.json)
		human(0, false, d.missing ? "This host is not ready." :
		      "This host is ready.");

	return d.missing ? EXIT_PROBLEM : EXIT_OK;
}
