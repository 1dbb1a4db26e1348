/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "kvmi.h"
#include "output.h"

static const char help[] =
"Usage: kvmi COMMAND [OPTION]...\n"
"\n"
"Looks into virtual machines through KVM introspection.  QEMU connects to this\n"
"program's socket; start the VM with\n"
"\n"
"  -chardev socket,id=kvmi0-chr,path=PATH,server=off,reconnect-ms=1000\n"
"  -object kvmi,id=kvmi0,chardev=kvmi0-chr\n"
"\n"
"Either side may be started first.\n"
"\n"
"Commands that stay, with any number of VMs:\n"
"  watch    print calls of a guest kernel's functions, writes of CRs and MSRs...\n"
"  stat     print rates of events, and how long commands take\n"
"  protect  tell who writes to the code of running guest kernels\n"
"\n"
"Commands that look at one VM and go:\n"
"  info     print what a VM allows\n"
"  read     print memory\n"
"  dump     write memory to a file\n"
"  ps       list the processes of a Linux guest\n"
"  modules  list the modules of its kernel\n"
"  trace    print what a vCPU executes, step by step\n"
"\n"
"Others:\n"
"  doctor   tell whether this host is ready, and what is missing\n"
#ifdef WITH_LIBVIRT
"  libvirt  give a domain of libvirt the kvmi object, take it away, tell its state\n"
#endif
"\n"
"'kvmi COMMAND --help' tells about each.\n";

int parse_number(const char *text, uint64_t least, uint64_t most,
		 uint64_t *value)
{
	char *end;

	errno = 0;
	*value = strtoull(text, &end, 0);
	if (errno || *end || end == text || text[0] == '-' ||
	    *value < least || *value > most)
		return -1;

	return 0;
}

void format_uuid(const uint8_t uuid[16], char text[37])
{
	int i, at = 0;

	for (i = 0; i < 16; i++)
		at += sprintf(text + at, "%s%02x",
			      i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
			      uuid[i]);
}

/* A unix socket's path, or vsock:PORT */
static struct kvmi_listener *listen_on(const char *socket, unsigned int mode,
				       struct kvmi_error *err)
{
	uint64_t port;

	if (strncmp(socket, "vsock:", 6))
		return kvmi_listener_new_unix(socket, mode, err);
	if (parse_number(socket + 6, 1, UINT32_MAX - 1, &port)) {
		snprintf(err->message, sizeof(err->message),
			 "%s: vsock: wants a port, 1 to %u", socket,
			 UINT32_MAX - 1);
		return NULL;
	}

	return kvmi_listener_new_vsock(port, err);
}

struct kvmi_listener *start_listening(const struct where *where)
{
	const char *key_file = where->key_file;
	enum kvmi_status status = KVMI_OK;
	struct kvmi_listener *listener = NULL;
	struct kvmi_error err;
	uint8_t key[4097];
	ssize_t size = 0;

	if (!where->socket) {
		complain("--socket PATH is missing");
		return NULL;
	}
	if (where->mutual && !key_file) {
		complain("--mutual needs --key-file FILE");
		return NULL;
	}
	if (key_file) {
		int fd = open(key_file, O_RDONLY | O_CLOEXEC);

		if (fd >= 0) {
			size = read(fd, key, sizeof(key));
			close(fd);
		}
		if (fd < 0 || size < 0) {
			complain("%s: %s", key_file, strerror(errno));
			return NULL;
		}
		if (!size || size == sizeof(key)) {
			complain("%s: a key has 1 to %zu bytes", key_file,
				 sizeof(key) - 1);
			return NULL;
		}
	}

	listener = listen_on(where->socket, where->mode, &err);
	if (listener && where->mutual)
		status = kvmi_listener_set_secret(listener, key, size, &err);
	else if (listener && size)
		status = kvmi_listener_set_key(listener, key, size, &err);
	if (status != KVMI_OK) {
		kvmi_listener_free(listener);
		listener = NULL;
	}
	explicit_bzero(key, sizeof(key));
	if (!listener)
		complain("%s", err.message);

	return listener;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(int argc, char **argv);
	} commands[] = {
		{ "watch", watch_main },
		{ "stat", stat_main },
		{ "info", info_main },
		{ "read", read_main },
		{ "ps", ps_main },
		{ "modules", modules_main },
		{ "dump", dump_main },
		{ "doctor", doctor_main },
		{ "trace", trace_main },
		{ "protect", protect_main },
#ifdef WITH_LIBVIRT
		{ "libvirt", libvirt_main },
#endif
	};
	size_t i;

	/* a reader that goes away must not take us away from a guest */
	signal(SIGPIPE, SIG_IGN);

	if (argc < 2) {
		fputs(help, stderr);
		return EXIT_USAGE;
	}
	if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") ||
	    !strcmp(argv[1], "help")) {
		fputs(help, stdout);
		return stdout_end(EXIT_OK);
	}
	if (!strcmp(argv[1], "--version")) {
		puts("kvmi " KVMI_TOOL_VERSION);
		return stdout_end(EXIT_OK);
	}
	for (i = 0; i < sizeof(commands) / sizeof(commands[0]); i++)
		if (!strcmp(argv[1], commands[i].name))
			return stdout_end(commands[i].run(argc - 1, argv + 1));

#ifndef WITH_LIBVIRT
	if (!strcmp(argv[1], "libvirt")) {
		complain("this kvmi was built without libvirt: install libvirt-dev, libxml2-dev and libjson-glib-dev, then ./configure again");
		return EXIT_PROBLEM;
	}
#endif
	complain("there is no command %s; see kvmi --help", argv[1]);

	return EXIT_USAGE;
}
