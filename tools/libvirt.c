/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * kvmi libvirt: gives a domain of libvirt the kvmi object, with all that belongs
 * to it on a Debian host, takes it away again, and tells how it is doing.
 */

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <grp.h>
#include <json-glib/json-glib.h>
#include <libvirt/libvirt-qemu.h>
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
#include <gio/gio.h>
#include <libxml/parser.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "apparmor.h"
#include "kvmi.h"
#include "libvirt-xml.h"
#include "output.h"

#define SOCKET_DIR "/run/kvmi"
#define ETC_DIR "/etc/kvmi"
#define KEY_DIR ETC_DIR "/keys"
/* What the tool and QEMU take for a key, bytes */
#define KEY_MAX 4096
#define TMPFILES "/etc/tmpfiles.d/kvmi.conf"
#define APPARMOR "/etc/apparmor.d/"
/* What each domain's profile includes */
#define DOMAIN_RULES "abstractions/libvirt-qemu"
/* How long a tool that is asked to leave keeps its chardev busy, at most */
#define LEAVE_S 20
/* Held by who changes a domain's setup: the files are those of all domains */
#define LOCK "/run/kvmi-libvirt.lock"
/* How long another one is waited for */
#define LOCK_S 60

static const char help[] =
"Usage: kvmi libvirt enable DOMAIN [OPTION]...\n"
"       kvmi libvirt disable DOMAIN\n"
"       kvmi libvirt status [--json] [DOMAIN]...\n"
"\n"
"enable gives a libvirt domain the kvmi object: in its XML and, if it is running,\n"
"in the running QEMU, too.  It makes the directory of the tool's socket, a secret\n"
"that the tool has to know, and the AppArmor rules; it says what it changes.\n"
"disable takes back all of that.  Both work while the domain is shut off.  They\n"
"have to run on the domain's host, as root.  DOMAIN is its name or its UUID.  UUID,\n"
"in paths, is that of the domain: AppArmor knows a domain's QEMU by it.\n"
"\n"
"Options of enable:\n"
"  -s, --socket PATH      where the tool listens\n"
"                         (default: " SOCKET_DIR "/libvirt-UUID.sock)\n"
"      --vsock CID:PORT   the tool listens there instead, in the VM with this CID\n"
"  -k, --key-file FILE    the secret is that in FILE, of which QEMU gets a copy,\n"
"                         " KEY_DIR "/libvirt-UUID.key\n"
"                         (default: a new one, unless it has one)\n"
"      --mutual           each side proves to the other that it has the secret (auth=hmac)\n"
"      --no-key           whoever listens on the socket is trusted\n"
"  -e, --emulator FILE    the QEMU with the kvmi object, if the domain's hasn't it\n"
"\n"
"status prints a line for each domain: its name; the state of the object (\"off\":\n"
"not enabled, \"restart\": enabled, but not in the running QEMU); where the tool\n"
"listens; how the last session ended.\n"
"  -j, --json             one JSON object a line, with all that QEMU tells\n"
"\n"
"  -c, --connect URI      libvirt's URI (default: qemu:///system)\n"
"  -h, --help             print this\n";

struct options {
	const char *uri, *socket, *vsock, *key_file, *emulator;
	bool no_key, mutual, json;
};

static void quiet(void *data, virErrorPtr error)
{
	(void)data;
	(void)error;		/* we print those that matter */
}

static void G_GNUC_PRINTF(1, 2) done(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	putchar('\n');
}

/* ---- QEMU's monitor ------------------------------------------------------ */

/* What the command returns, or NULL and why */
static JsonNode *monitor(virDomain *domain, JsonBuilder *command, GError **error)
{
	JsonNode *node = json_builder_get_root(command), *found = NULL;
	char *text = json_to_string(node, FALSE), *answer = NULL;
	JsonParser *parser = json_parser_new();

	json_node_unref(node);
	if (virDomainQemuMonitorCommand(domain, text, &answer, 0)) {
		g_set_error_literal(error, G_IO_ERROR, G_IO_ERROR_FAILED,
				    virGetLastErrorMessage());
	} else if (json_parser_load_from_data(parser, answer, -1, error) &&
		   JSON_NODE_HOLDS_OBJECT(json_parser_get_root(parser))) {
		JsonObject *root = json_node_get_object(json_parser_get_root(parser));
		JsonObject *failure = json_object_has_member(root, "error") ?
			json_object_get_object_member(root, "error") : NULL;

		if (json_object_has_member(root, "return"))
			found = json_node_copy(json_object_get_member(root, "return"));
		else
			g_set_error_literal(error, G_IO_ERROR, G_IO_ERROR_FAILED,
					    failure ? json_object_get_string_member(failure, "desc") :
						      "QEMU gave no answer");
	}
	free(answer);
	g_free(text);
	g_object_unref(parser);

	return found;
}

static void put(JsonBuilder *b, const char *name, const char *value)
{
	json_builder_set_member_name(b, name);
	json_builder_add_string_value(b, value);
}

static void open_member(JsonBuilder *b, const char *name)
{
	json_builder_set_member_name(b, name);
	json_builder_begin_object(b);
}

static JsonBuilder *start_command(const char *name)
{
	JsonBuilder *b = json_builder_new();

	json_builder_begin_object(b);
	put(b, "execute", name);
	open_member(b, "arguments");

	return b;
}

static gboolean run_command(virDomain *domain, JsonBuilder *b, GError **error)
{
	JsonNode *node;

	json_builder_end_object(b);
	json_builder_end_object(b);
	node = monitor(domain, b, error);
	g_object_unref(b);
	if (node)
		json_node_unref(node);

	return node != NULL;
}

static gboolean delete(virDomain *domain, const char *command, const char *id,
		       GError **error)
{
	JsonBuilder *b = start_command(command);

	put(b, "id", id);

	return run_command(domain, b, error);
}

/* What query-kvmi tells; NULL without an error if there is no such object, or
 * no such command in this QEMU */
static JsonNode *query(virDomain *domain, GError **error)
{
	JsonBuilder *b = json_builder_new();
	GError *local = NULL;
	JsonNode *node;

	json_builder_begin_object(b);
	put(b, "execute", "query-kvmi");
	json_builder_end_object(b);
	node = monitor(domain, b, &local);
	g_object_unref(b);
	if (local && strstr(local->message, "kvmi"))
		g_clear_error(&local);
	if (local)
		g_propagate_error(error, local);
	if (node && !JSON_NODE_HOLDS_OBJECT(node))
		g_clear_pointer(&node, json_node_unref);

	return node;
}

static const char *text_of(JsonObject *object, const char *name)
{
	return object && json_object_has_member(object, name) ?
	       json_object_get_string_member(object, name) : NULL;
}

/* Is the object in the running QEMU, if there is one, that of enable? */
static gboolean is_ours(JsonNode *node)
{
	JsonObject *kvmi = json_node_get_object(node);

	return !g_strcmp0(text_of(kvmi, "id"), XML_OBJECT_ID) &&
	       !g_strcmp0(text_of(kvmi, "chardev"), XML_CHARDEV_ID);
}

/* Out of a running QEMU.  *found: ours was there.  What isn't ours stays */
static gboolean unplug(virDomain *domain, gboolean *found, GError **error)
{
	gint64 end = g_get_monotonic_time() + LEAVE_S * G_USEC_PER_SEC;
	GError *local = NULL;
	JsonNode *node = query(domain, &local);

	*found = node && is_ours(node);
	if (node)
		json_node_unref(node);
	if (local) {
		g_propagate_error(error, local);
		return FALSE;
	}
	/* An object that is on its way out isn't found any more */
	if (*found && !delete(domain, "object-del", XML_OBJECT_ID, &local) &&
	    !strstr(local->message, "not found")) {
		g_propagate_error(error, local);
		return FALSE;
	}
	g_clear_error(&local);
	/* busy until the tool has left */
	while (!delete(domain, "chardev-remove", XML_CHARDEV_ID, &local)) {
		if (strstr(local->message, "not found")) {
			g_clear_error(&local);
			break;
		}
		if (!strstr(local->message, "busy") || g_get_monotonic_time() > end) {
			g_propagate_error(error, local);
			return FALSE;
		}
		g_clear_error(&local);
		g_usleep(200000);
	}
	delete(domain, "object-del", XML_KEY_ID, NULL);

	return TRUE;
}

static gboolean plug(virDomain *domain, const struct domain_setup *setup, GError **error)
{
	GError *local = NULL;
	JsonNode *node = query(domain, &local);
	gboolean found;
	JsonBuilder *b;

	if (node && !is_ours(node))
		g_set_error(&local, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "it has a kvmi object already that isn't of kvmi libvirt: '%s'",
			    text_of(json_node_get_object(node), "id"));
	if (node)
		json_node_unref(node);
	if (local) {
		g_propagate_error(error, local);
		return FALSE;
	}
	if (!unplug(domain, &found, error))
		return FALSE;
	b = start_command("chardev-add");
	put(b, "id", XML_CHARDEV_ID);
	open_member(b, "backend");
	put(b, "type", "socket");
	open_member(b, "data");
	open_member(b, "addr");
	put(b, "type", setup->cid ? "vsock" : "unix");
	open_member(b, "data");
	if (setup->cid) {
		put(b, "cid", setup->cid);
		put(b, "port", setup->port);
	} else {
		put(b, "path", setup->socket);
	}
	json_builder_end_object(b);
	json_builder_end_object(b);
	json_builder_set_member_name(b, "server");
	json_builder_add_boolean_value(b, FALSE);
	json_builder_set_member_name(b, "reconnect-ms");
	json_builder_add_int_value(b, 1000);
	json_builder_end_object(b);
	json_builder_end_object(b);
	if (!run_command(domain, b, error))
		return FALSE;
	if (setup->key_file) {
		b = start_command("object-add");
		put(b, "qom-type", "secret");
		put(b, "id", XML_KEY_ID);
		put(b, "file", setup->key_file);
		if (!run_command(domain, b, error))
			goto undo;
	}
	b = start_command("object-add");
	put(b, "qom-type", "kvmi");
	put(b, "id", XML_OBJECT_ID);
	put(b, "chardev", XML_CHARDEV_ID);
	if (setup->key_file)
		put(b, "key", XML_KEY_ID);
	if (setup->mutual)
		put(b, "auth", "hmac");
	if (run_command(domain, b, error))
		return TRUE;
undo:
	unplug(domain, &found, NULL);

	return FALSE;
}

/* ---- the host's files ---------------------------------------------------- */

/* Runs it for not longer than 30 s; its output, or NULL if it failed */
static char *run(char **argv, char **errors)
{
	GPtrArray *words = g_ptr_array_new();
	char *out = NULL;
	int status;

	g_ptr_array_add(words, "timeout");
	g_ptr_array_add(words, "30");
	while (*argv)
		g_ptr_array_add(words, *argv++);
	g_ptr_array_add(words, NULL);
	if (!g_spawn_sync("/", (char **)words->pdata, NULL, G_SPAWN_SEARCH_PATH,
			  NULL, NULL, &out, errors, &status, NULL) ||
	    !g_spawn_check_wait_status(status, NULL))
		g_clear_pointer(&out, g_free);
	g_ptr_array_free(words, TRUE);

	return out;
}

/* By a new file, so that it is always complete */
static gboolean write_file(const char *path, const char *text, mode_t mode,
			   GError **error)
{
	return g_file_set_contents_full(path, text, strlen(text),
					G_FILE_SET_CONTENTS_CONSISTENT, mode, error);
}

static gboolean fail_errno(GError **error, const char *path)
{
	int number = errno;

	g_set_error(error, G_FILE_ERROR, g_file_error_from_errno(number), "%s: %s%s",
		    path, strerror(number), number == EACCES || number == EPERM ?
		    " (this has to be done as root)" : "");

	return FALSE;
}

/* The socket's folder: what the tool makes in it belongs to QEMU's group */
static gboolean make_socket_dir(const char *socket, gid_t group, GError **error)
{
	char *dir = g_path_get_dirname(socket), *line, *before = NULL;
	gboolean fine = TRUE;
	struct stat now;

	if (strcmp(dir, SOCKET_DIR)) {
		if (access(dir, F_OK))
			fine = fail_errno(error, dir);
		g_free(dir);
		return fine;
	}
	g_free(dir);
	line = g_strdup_printf("# kvmi libvirt: where introspection tools listen for QEMU\n"
			       "d " SOCKET_DIR " 2750 root %u -\n", group);
	if (mkdir(SOCKET_DIR, 0750) && errno != EEXIST) {
		fine = fail_errno(error, SOCKET_DIR);
	} else if (stat(SOCKET_DIR, &now) || now.st_gid != group ||
		   (now.st_mode & 07777) != 02750) {
		/* the group's bit goes when the owner changes */
		if (chown(SOCKET_DIR, 0, group) || chmod(SOCKET_DIR, 02750))
			fine = fail_errno(error, SOCKET_DIR);
		else
			done(SOCKET_DIR " is for root and the group %u of QEMU", group);
	}
	g_file_get_contents(TMPFILES, &before, NULL, NULL);
	if (fine && g_strcmp0(before, line) && !access("/etc/tmpfiles.d", F_OK)) {
		fine = write_file(TMPFILES, line, 0644, error);
		if (fine)
			done("wrote " TMPFILES ", which makes it again after a reboot");
	}
	g_free(before);
	g_free(line);

	return fine;
}

/* Can QEMU's user get to what is in the socket's folder? */
static gboolean check_way(const char *socket, const char *title, uid_t user, gid_t group,
			  GError **error)
{
	struct passwd *entry = getpwuid(user);
	GPtrArray *dirs = g_ptr_array_new_with_free_func(g_free);
	char *dir = g_strdup(socket);
	gid_t groups[256] = { group };
	int count = G_N_ELEMENTS(groups), status = 0;
	guint i;
	pid_t child;

	do {
		char *up = g_path_get_dirname(dir);

		g_free(dir);
		dir = up;
		g_ptr_array_insert(dirs, 0, g_strdup(dir));
	} while (strcmp(dir, "/"));
	g_free(dir);
	if (!entry || getgrouplist(entry->pw_name, group, groups, &count) < 0)
		count = 1;
	/* By the kernel, which knows of ACLs, too */
	child = fork();
	if (!child) {
		if (setgroups(count, groups) || setresgid(group, group, group) ||
		    setresuid(user, user, user))
			_exit(0);
		for (i = 0; i < dirs->len && i < 255; i++)
			if (access(dirs->pdata[i], X_OK) && errno == EACCES)
				_exit(i + 1);
		_exit(0);
	}
	if (child > 0)
		waitpid(child, &status, 0);
	status = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
	if (status)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "the QEMU of %s runs as %u:%u, which may not search %s: give another place by --socket",
			    title, user, group, (char *)dirs->pdata[status - 1]);
	g_ptr_array_free(dirs, TRUE);

	return !status;
}

/* A folder of ours on the way to the keys: QEMU's user has to get through */
static gboolean make_key_dir(const char *dir, GError **error)
{
	struct stat now;

	if (mkdir(dir, 0711) && errno != EEXIST)
		return fail_errno(error, dir);
	if (stat(dir, &now) || ((now.st_mode & 0111) != 0111 &&
				chmod(dir, (now.st_mode & 07777) | 0111)))
		return fail_errno(error, dir);

	return TRUE;
}

/* What is at the path, a key; NULL without an error if there is nothing */
static char *read_key(const char *path, size_t *size, GError **error)
{
	char *text = g_malloc(KEY_MAX + 1);
	FILE *file = fopen(path, "re");

	*size = 0;
	if (!file && errno == ENOENT) {
		g_free(text);
		return NULL;
	}
	if (file)
		*size = fread(text, 1, KEY_MAX + 1, file);
	if (!file || ferror(file))
		fail_errno(error, path);
	else if (!*size || *size > KEY_MAX)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "%s: a key has 1 to %d bytes",
			    path, KEY_MAX);
	else
		goto out;
	explicit_bzero(text, KEY_MAX + 1);
	g_clear_pointer(&text, g_free);
out:
	if (file)
		fclose(file);

	return text;
}

static gboolean write_key(const char *path, const char *text, size_t size, uid_t user,
			  gid_t group, GError **error)
{
	if (!g_file_set_contents_full(path, text, size, G_FILE_SET_CONTENTS_CONSISTENT, 0400,
				      error))
		return FALSE;
	if (chown(path, user, group)) {
		fail_errno(error, path);
		unlink(path);
		return FALSE;
	}

	return TRUE;
}

static char *new_key(size_t *size, GError **error)
{
	unsigned char bytes[32];
	GString *text;
	size_t i;

	if (getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) {
		fail_errno(error, "getrandom");
		return NULL;
	}
	text = g_string_sized_new(2 * sizeof(bytes) + 1);
	for (i = 0; i < sizeof(bytes); i++)
		g_string_append_printf(text, "%02x", bytes[i]);
	explicit_bzero(bytes, sizeof(bytes));
	*size = text->len;

	return g_string_free(text, FALSE);
}

static void free_key(char *key, size_t size)
{
	if (key)
		explicit_bzero(key, size);
	g_free(key);
}

static char *default_key(const char *uuid)
{
	return g_strdup_printf(KEY_DIR "/libvirt-%s.key", uuid);
}

/* What was in its place, for who has to put it back; text NULL: nothing */
struct old_key {
	bool changed;
	char *text;
	size_t size;
};

/* QEMU's file with the secret: that of from, or the one that is there, or a new one */
static gboolean make_key(const char *path, const char *from, uid_t user, gid_t group,
			 struct old_key *old, GError **error)
{
	GError *local = NULL;
	char *key = NULL;
	struct stat now;
	gboolean fine;
	size_t size = 0;

	if (!make_key_dir(ETC_DIR, error) || !make_key_dir(KEY_DIR, error))
		return FALSE;
	old->text = read_key(path, &old->size, &local);
	if (!local && from) {
		key = read_key(from, &size, &local);
		if (!key && !local)
			g_set_error(&local, G_FILE_ERROR, G_FILE_ERROR_NOENT, "%s: %s", from,
				    strerror(ENOENT));
	} else if (!local && !old->text) {
		key = new_key(&size, &local);
	}
	if (local) {
		g_propagate_error(error, local);
		return FALSE;
	}
	if (!key || (old->text && size == old->size && !memcmp(key, old->text, size))) {
		fine = !stat(path, &now) &&
		       ((now.st_uid == user && (now.st_mode & 07777) == 0400) ||
			(!chown(path, user, group) && !chmod(path, 0400)));
		if (!fine)
			fail_errno(error, path);
		else
			done("the secret is that in %s", path);
	} else {
		old->changed = true;
		fine = write_key(path, key, size, user, group, error);
		if (fine && from)
			done("QEMU gets a copy of the secret in %s: %s", from, path);
		else if (fine)
			done("made a secret for the tool and QEMU: %s", path);
	}
	free_key(key, size);

	return fine;
}

/* The domain's own goes.  What its XML names may be another's: that of the domain of
 * which this one is a copy, or what somebody made by hand.  *found: there was one */
static gboolean remove_key(const char *uuid, gboolean *found, GError **error)
{
	char *path = default_key(uuid);
	gboolean fine = TRUE;

	if (!unlink(path)) {
		done("removed the secret %s", path);
		*found = TRUE;
	} else if (errno != ENOENT) {
		fine = fail_errno(error, path);
	}
	g_free(path);

	return fine;
}

/* AppArmor sees where symlinks lead to.  The last part need not be there yet */
static char *real_path(const char *path)
{
	char *real = realpath(path, NULL), *dir, *base, *result;

	if (real) {
		result = g_strdup(real);
		free(real);
		return result;
	}
	dir = g_path_get_dirname(path);
	base = g_path_get_basename(path);
	real = realpath(dir, NULL);
	result = real ? g_build_filename(real, base, NULL) : g_strdup(path);
	free(real);
	g_free(base);
	g_free(dir);

	return result;
}

static void add_rule(GString *rules, const char *profile, const char *path, const char *mode)
{
	char *real = path ? real_path(path) : NULL;
	char *quoted = real ? apparmor_path(real, profile) : NULL;
	char *line = quoted ? g_strdup_printf("  %s %s,\n", quoted, mode) : NULL;

	if (line && !strstr(rules->str, line))
		g_string_append(rules, line);
	g_free(line);
	g_free(quoted);
	g_free(real);
}

/* The lines of this domain in /etc/apparmor.d/local/NAME become these (NULL: none).
 * Returns 1 if that changed the file, 0 if not, -1 if it failed */
static int local_rules(const char *name, const char *uuid, const char *rules,
		       GError **error)
{
	char *path = g_strconcat(APPARMOR "local/", name, NULL);
	char *dir = g_path_get_dirname(path);
	char *before = NULL, *now;
	struct stat old;
	mode_t mode = 0644;
	int result = 0;

	if (g_file_get_contents(path, &before, NULL, NULL) && !stat(path, &old))
		mode = old.st_mode & 07777;
	now = apparmor_replace(before, uuid, rules);
	if (g_strcmp0(now, before)) {
		result = 1;
		if (g_mkdir_with_parents(dir, 0755)) {
			fail_errno(error, dir);
			result = -1;
		} else if (!now && unlink(path)) {
			fail_errno(error, path);
			result = -1;
		} else if (now && !write_file(path, now, mode, error)) {
			result = -1;
		} else {
			done("%s rules %s %s", rules ? "wrote AppArmor" : "removed AppArmor",
			     rules ? "to" : "from", path);
		}
	}
	g_free(before);
	g_free(now);
	g_free(dir);
	g_free(path);

	return result;
}

static gboolean parser(const char *action, const char *profile, GError **error)
{
	static const char *const usual[] = { "/usr/sbin/apparmor_parser", "/sbin/apparmor_parser" };
	char *program = g_find_program_in_path("apparmor_parser"), *out, *errors = NULL;
	char *argv[] = { program, (char *)action, (char *)profile, NULL };
	size_t i;

	/* not in the PATH of everybody who became root */
	for (i = 0; !argv[0] && i < G_N_ELEMENTS(usual); i++)
		if (!access(usual[i], X_OK))
			argv[0] = (char *)usual[i];
	/* Without it nobody loads a profile, either: libvirt's files are all that is there */
	if (!argv[0])
		return TRUE;
	out = run(argv, &errors);
	if (!out)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "apparmor_parser %s %s failed: %s", action, profile,
			    errors && *errors ? g_strchomp(errors) : "it could not be started");
	g_free(program);
	g_free(errors);
	g_free(out);

	return out != NULL;
}

/* Has the kernel this profile? */
static gboolean is_loaded(const char *name)
{
	char *loaded = NULL, *line = g_strdup_printf("%s (", name);
	gboolean there = g_file_get_contents("/sys/kernel/security/apparmor/profiles",
					     &loaded, NULL, NULL) &&
			 (g_str_has_prefix(loaded, line) ||
			  (strstr(loaded, line) && strstr(loaded, line)[-1] == '\n'));

	g_free(line);
	g_free(loaded);

	return there;
}

/* Whether the rules are such as AppArmor takes, in a profile like the domain's */
static gboolean check_rules(const char *name, GError **error)
{
	char *text = g_strdup_printf("#include <tunables/global>\n"
				     "profile %s flags=(attach_disconnected) {\n"
				     "  #include <" DOMAIN_RULES ">\n}\n", name);
	char *path = NULL;
	int fd = g_file_open_tmp("kvmi-XXXXXX", &path, error);
	gboolean fine = fd >= 0;

	if (fine) {
		close(fd);
		fine = write_file(path, text, 0600, error) && parser("-Q", path, error);
		unlink(path);
	}
	g_free(path);
	g_free(text);

	return fine;
}

/* Who starts QEMU: for an emulator in an unusual place a profile of theirs needs a rule */
static const char *const daemons[] = { "libvirtd", "virtqemud" };

/* A domain's rules, for what each domain's profile includes, the one place that there is
 * (see apparmor_path()), and for the daemons' profiles.  NULL: none */
struct rules {
	char *domain, *daemon[G_N_ELEMENTS(daemons)];
};

static void rules_clear(struct rules *rules)
{
	size_t i;

	g_clear_pointer(&rules->domain, g_free);
	for (i = 0; i < G_N_ELEMENTS(daemons); i++)
		g_clear_pointer(&rules->daemon[i], g_free);
}

/* Those that the setup needs */
static void make_rules(const char *uuid, const struct domain_setup *setup, struct rules *rules)
{
	char *name = g_strconcat("libvirt-", uuid, NULL);
	char *emulator = setup->emulator ? real_path(setup->emulator) : NULL;
	GString *text = g_string_new(NULL);
	size_t i;

	add_rule(text, name, setup->socket, "rw");
	add_rule(text, name, setup->key_file, "r");
	if (setup->cid)
		g_string_append(text, "  network vsock stream,\n");
	add_rule(text, name, emulator, "rmix");
	if (setup->socket && !strstr(setup->socket, name) && !access(APPARMOR DOMAIN_RULES, F_OK))
		done("AppArmor cannot keep other domains from %s: only from one with %s in its path",
		     setup->socket, name);
	rules->domain = g_string_free(text, FALSE);
	for (i = 0; i < G_N_ELEMENTS(daemons); i++) {
		if (!emulator || g_str_has_prefix(emulator, "/usr/bin/"))
			continue;
		text = g_string_new(NULL);
		add_rule(text, name, emulator, "PUx");
		rules->daemon[i] = g_string_free(text, FALSE);
	}
	g_free(emulator);
	g_free(name);
}

static char *lines_in(const char *name, const char *uuid)
{
	char *path = g_strconcat(APPARMOR "local/", name, NULL), *text = NULL, *lines = NULL;

	if (g_file_get_contents(path, &text, NULL, NULL))
		lines = apparmor_lines(text, uuid);
	g_free(text);
	g_free(path);

	return lines;
}

static char *daemon_profile(size_t i)
{
	return g_strconcat("usr.sbin.", daemons[i], NULL);
}

/* Those that it has */
static void read_rules(const char *uuid, struct rules *rules)
{
	size_t i;

	rules->domain = lines_in(DOMAIN_RULES, uuid);
	for (i = 0; i < G_N_ELEMENTS(daemons); i++) {
		char *base = daemon_profile(i);

		rules->daemon[i] = lines_in(base, uuid);
		g_free(base);
	}
}

static gboolean write_rules(const char *uuid, const struct rules *rules, GError **error)
{
	char *name = g_strconcat("libvirt-", uuid, NULL);
	char *profile = g_strconcat(APPARMOR "libvirt/", name, NULL);
	gboolean fine = TRUE;
	size_t i;

	/* libvirt's profiles aren't there, nor is what would include the rules */
	if (access(APPARMOR DOMAIN_RULES, F_OK))
		goto out;
	switch (local_rules(DOMAIN_RULES, uuid, rules->domain, error)) {
	case -1:
		fine = FALSE;
		break;
	case 1:
		/* While the domain is shut off, libvirt has parts of its profile away */
		fine = (!rules->domain || check_rules(name, error)) &&
		       (!is_loaded(name) || parser("-r", profile, error));
	}
	for (i = 0; fine && i < G_N_ELEMENTS(daemons); i++) {
		char *base = daemon_profile(i), *daemon = g_strconcat(APPARMOR, base, NULL);

		if (!access(daemon, F_OK)) {
			int changed = local_rules(base, uuid, rules->daemon[i], error);

			fine = changed >= 0 &&
			       (!changed ||
				parser(is_loaded(daemons[i]) ? "-r" : "-Q", daemon, error));
		}
		g_free(daemon);
		g_free(base);
	}
out:
	g_free(profile);
	g_free(name);

	return fine;
}

/* Whether the host's KVM lets a domain with the object start */
static gboolean host_introspects(GError **error)
{
	char *text = NULL;
	gboolean there = g_file_get_contents("/sys/module/kvm/parameters/introspection", &text,
					     NULL, NULL);
	gboolean yes = there && *text == 'Y';

	if (!yes)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "%s, so the domain could not start any more: see kvmi doctor", there ?
			    "introspection is turned off in the host's KVM" :
			    "the host's KVM has no introspection, or is not loaded");
	g_free(text);

	return yes;
}

/* What the emulator says of itself */
static char *ask(const char *emulator, const char *option, const char *value, GError **error)
{
	char *argv[] = { (char *)emulator, (char *)option, (char *)value, NULL };
	char *errors = NULL, *out = run(argv, &errors);

	if (!out)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "%s %s%s%s failed: %s", emulator,
			    option, value ? " " : "", value ? value : "",
			    errors ? g_strchomp(errors) : "");
	g_free(errors);

	return out;
}

static gboolean knows_kvmi(const char *emulator, gboolean vsock, GError **error)
{
	char *out = ask(emulator, "-object", "help", error);
	gboolean yes = out && strstr(out, "\n  kvmi\n");

	if (out && !yes)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "%s has no kvmi object: give the QEMU that has it by --emulator", emulator);
	g_free(out);
	if (!yes || !vsock)
		return yes;
	out = ask(emulator, "-help", NULL, error);
	yes = out && strstr(out, "cid=");
	if (out && !yes)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "%s cannot connect to a vsock by its command line (-chardev socket,cid=): give a newer QEMU by --emulator, or take --socket", emulator);
	g_free(out);

	return yes;
}

/* ---- enable, disable ----------------------------------------------------- */

/* Inactive XML if there is one: that is what the next start takes */
static char *get_xml(virDomain *domain)
{
	unsigned int flags = VIR_DOMAIN_XML_SECURE;

	if (virDomainIsPersistent(domain) == 1)
		flags |= VIR_DOMAIN_XML_INACTIVE;

	return virDomainGetXMLDesc(domain, flags);
}

/* xml in place of before */
static gboolean define(virDomain *domain, const char *before, const char *xml, GError **error)
{
	char *now = get_xml(domain);
	gboolean same = !g_strcmp0(now, before);
	virDomain *new;

	free(now);
	if (!same) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "the XML of %s was changed meanwhile: run this again",
			    virDomainGetName(domain));
		return FALSE;
	}
	new = virDomainDefineXMLFlags(virDomainGetConnect(domain), xml, 0);
	if (!new) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "libvirt does not take the changed XML: %s", virGetLastErrorMessage());
		return FALSE;
	}
	virDomainFree(new);

	return TRUE;
}

/* The domain's snapshots have an XML of their own: how many have the object in it, or
 * have it not */
static int snapshots(virDomain *domain, gboolean with)
{
	virDomainSnapshot **list = NULL;
	int count = virDomainListAllSnapshots(domain, &list, 0), i, found = 0;

	for (i = 0; i < count; i++) {
		char *xml = virDomainSnapshotGetXMLDesc(list[i], 0);

		found += with == (!xml || strstr(xml, XML_CHARDEV_ID));
		free(xml);
		virDomainSnapshotFree(list[i]);
	}
	free(list);

	return found;
}

/* Whether the object will come back with an XML that we don't change, and in what */
static gboolean kept_object(virDomain *domain, char **where)
{
	int count = snapshots(domain, TRUE);
	gboolean saved = FALSE;

	if (virDomainHasManagedSaveImage(domain, 0) == 1) {
		char *xml = virDomainManagedSaveGetXMLDesc(domain, 0);

		saved = !xml || strstr(xml, XML_CHARDEV_ID);
		free(xml);
	}
	if (where)
		*where = !count ? g_strdup("its managed save image") :
			 g_strdup_printf("%s%d snapshot%s", saved ? "its managed save image and " : "",
					 count, count == 1 ? "" : "s");

	return saved || count;
}

/* "+64055:+106", or names, as libvirt takes them: what might be either is a name */
static gboolean parse_owner(const char *label, uid_t *user, gid_t *group)
{
	char **parts = g_strsplit(label, ":", -1);
	gboolean fine = g_strv_length(parts) == 2;
	guint64 number;

	if (fine) {
		struct passwd *u = *parts[0] == '+' ? NULL : getpwnam(parts[0]);
		struct group *g = *parts[1] == '+' ? NULL : getgrnam(parts[1]);

		if (u)
			*user = u->pw_uid;
		else if (g_ascii_string_to_unsigned(parts[0] + (*parts[0] == '+'), 10, 0,
						    UINT32_MAX - 1, &number, NULL))
			*user = number;
		else
			fine = FALSE;
		if (g)
			*group = g->gr_gid;
		else if (g_ascii_string_to_unsigned(parts[1] + (*parts[1] == '+'), 10, 0,
						    UINT32_MAX - 1, &number, NULL))
			*group = number;
		else
			fine = FALSE;
	}
	g_strfreev(parts);

	return fine;
}

/* Whom QEMU runs as if the domain does not say; *user and *group are root's if the host
 * does not, either: without a DAC driver QEMU is who the daemon is */
static gboolean host_user(virConnect *connection, uid_t *user, gid_t *group, GError **error)
{
	char *xml = virConnectGetCapabilities(connection);
	char *label = xml ? capabilities_xml_read(xml) : NULL;
	gboolean fine = xml != NULL;

	*user = 0;
	*group = 0;
	if (!xml) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "libvirt: %s", virGetLastErrorMessage());
	} else if (label && !parse_owner(label, user, group)) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "libvirt has QEMU run as '%s', whom this host does not know", label);
		fine = FALSE;
	}
	g_free(label);
	free(xml);

	return fine;
}

/* Whom this domain's QEMU runs as; unchanged if the XML does not say */
static gboolean domain_user(const char *xml, uid_t *user, gid_t *group, GError **error)
{
	char *label = domain_xml_user(xml);
	gboolean fine = !label || parse_owner(label, user, group);

	if (!fine)
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "its <seclabel model='dac'> has QEMU run as '%s', whom this host does not know",
			    label);
	g_free(label);

	return fine;
}

/* CID:PORT */
static gboolean read_vsock(const char *text, struct domain_setup *setup, GError **error)
{
	char **parts = g_strsplit(text, ":", -1);
	gboolean fine = g_strv_length(parts) == 2;
	guint64 cid, port;

	fine = fine && g_ascii_string_to_unsigned(parts[0], 10, 0, UINT32_MAX, &cid, NULL) &&
	       g_ascii_string_to_unsigned(parts[1], 10, 0, UINT32_MAX, &port, NULL);
	if (fine) {
		setup->cid = g_strdup_printf("%u", (unsigned int)cid);
		setup->port = g_strdup_printf("%u", (unsigned int)port);
	} else {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "--vsock wants CID:PORT, two numbers up to %u, not %s", UINT32_MAX, text);
	}
	g_strfreev(parts);

	return fine;
}

/* Is this path one that enable gives to another domain? */
static gboolean of_another(const char *path, const char *prefix, const char *uuid)
{
	char *theirs;
	gboolean yes;

	if (!path || !g_str_has_prefix(path, prefix))
		return FALSE;
	theirs = g_strndup(path + strlen(prefix), strlen(uuid));
	yes = g_uuid_string_is_valid(theirs) && strcmp(theirs, uuid);
	g_free(theirs);

	return yes;
}

/* Is the domain a copy of one that was enabled (virt-clone)?  Its XML names what is that
 * one's */
static gboolean is_copy(const struct domain_setup *setup, const char *uuid)
{
	return of_another(setup->socket, SOCKET_DIR "/libvirt-", uuid) ||
	       of_another(setup->key_file, KEY_DIR "/libvirt-", uuid);
}

/* Until the file is closed, which the end of this process does */
static gboolean lock_setup(GError **error)
{
	gint64 end = g_get_monotonic_time() + LOCK_S * G_USEC_PER_SEC;
	int fd = open(LOCK, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);

	if (fd < 0)
		return fail_errno(error, LOCK);
	while (flock(fd, LOCK_EX | LOCK_NB)) {
		if (errno != EWOULDBLOCK && errno != EINTR)
			return fail_errno(error, LOCK);
		if (g_get_monotonic_time() > end) {
			g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
				    "another kvmi libvirt has been at work for %d s (it holds " LOCK ")",
				    LOCK_S);
			return FALSE;
		}
		g_usleep(100000);
	}

	return TRUE;
}

static gboolean check_path(const char *what, const char *path, GError **error)
{
	struct sockaddr_un address;

	if (path[0] != '/' || strpbrk(path, "\n'\"") ||
	    strlen(path) >= sizeof(address.sun_path)) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED,
			    "%s wants an absolute path without quotes of less than %zu bytes, not %s",
			    what, sizeof(address.sun_path), path);
		return FALSE;
	}

	return TRUE;
}

static gboolean enable(virDomain *domain, const struct options *o, GError **error)
{
	gboolean active = virDomainIsActive(domain) == 1, enabled, fine = FALSE;
	gboolean undo = FALSE, undo_rules = FALSE, found;
	gboolean persistent = virDomainIsPersistent(domain) == 1;
	struct domain_setup setup = { 0 }, old = { 0 };
	char uuid[VIR_UUID_STRING_BUFLEN], *xml = NULL, *new = NULL, *foreign = NULL, *where;
	const char *title = virDomainGetName(domain);
	struct rules rules = { 0 }, rules_before = { 0 };
	struct old_key key = { 0 };
	GError *why = NULL;
	uid_t user = 0;
	gid_t group = 0, host_group;
	int count;

	virDomainGetUUIDString(domain, uuid);
	setup.socket = o->vsock ? NULL : o->socket ? g_strdup(o->socket) :
		       g_strdup_printf(SOCKET_DIR "/libvirt-%s.sock", uuid);
	setup.mutual = o->mutual;
	setup.key_file = o->no_key ? NULL : default_key(uuid);
	if ((setup.socket && !check_path("--socket", setup.socket, error)) ||
	    (o->vsock && !read_vsock(o->vsock, &setup, error)) || !host_introspects(error))
		goto out;

	xml = get_xml(domain);
	if (!xml) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "libvirt: %s", virGetLastErrorMessage());
		goto out;
	}
	if (!domain_xml_read(xml, &enabled, &old, &foreign, error))
		goto out;
	if (o->emulator || old.emulator) {
		const char *emulator = o->emulator ? o->emulator : old.emulator;

		if (!knows_kvmi(emulator, o->vsock != NULL, error))
			goto out;
		setup.emulator = g_strdup(emulator);
	}
	new = domain_xml_enable(xml, &setup, error);
	if (!new) {
		g_prefix_error(error, "%s: ", title);
		goto out;
	}
	if (!host_user(virDomainGetConnect(domain), &user, &group, error))
		goto out;
	host_group = group;
	if (!domain_user(xml, &user, &group, error)) {
		g_prefix_error(error, "%s: ", title);
		goto out;
	}
	/* The folder is for all domains */
	if (setup.socket && (!make_socket_dir(setup.socket, host_group, error) ||
			     !check_way(setup.socket, title, user, group, error)))
		goto out;
	if (enabled && is_copy(&old, uuid))
		done("the XML of %s had socket and secret of another domain, of which it may be a copy: it gets its own", title);
	undo = TRUE;
	if (setup.key_file && !make_key(setup.key_file, o->key_file, user, group, &key, error))
		goto out;
	read_rules(uuid, &rules_before);
	make_rules(uuid, &setup, &rules);
	undo_rules = TRUE;
	if (!write_rules(uuid, &rules, error))
		goto out;
	if (persistent) {
		if (!define(domain, xml, new, error))
			goto out;
		done("changed the XML of %s: the kvmi object is in <qemu:commandline>%s%s", title,
		     g_strcmp0(setup.emulator, old.emulator) ? ", <emulator> is " : "",
		     g_strcmp0(setup.emulator, old.emulator) ? setup.emulator : "");
		undo = FALSE;
	}
	if (!active && virDomainHasManagedSaveImage(domain, 0) == 1) {
		done("%s is shut off, and goes on from its managed save image as it was then: this takes effect when that is not used (virsh start --force-boot %s), or if you run it again after the start", title, title);
	} else if (!active) {
		done("%s is shut off: this takes effect when it is started", title);
	} else if (plug(domain, &setup, &why)) {
		done("%s is running: the object is in it already, no restart is needed%s", title,
		     persistent ? "" : "; it will be gone when the domain is shut off");
	} else if (persistent) {
		done("%s is running, and takes it only when it is shut down and started again: %s", title, why->message);
	} else {
		g_propagate_error(error, g_steal_pointer(&why));
		goto out;
	}
	undo = FALSE;
	count = snapshots(domain, FALSE);
	if (count)
		done("%s has %d snapshot%s without the object: run this again if you revert to one",
		     title, count, count == 1 ? "" : "s");
	/* no longer that of the XML */
	if (!setup.key_file && !kept_object(domain, NULL) && !remove_key(uuid, &found, error))
		goto out;
	where = setup.cid ? g_strdup_printf("vsock:%s", setup.port) :
			    g_strdup_printf("%s --mode 0660", setup.socket);
	done("Now start the tool: kvmi watch --socket %s%s%s%s", where,
	     setup.key_file ? " --key-file " : "", setup.key_file ? setup.key_file : "",
	     setup.mutual ? " --mutual" : "");
	g_free(where);
	fine = TRUE;
out:
	if (undo) {
		/* The XML is still the one before: so shall be what it needs */
		if (undo_rules)
			write_rules(uuid, &rules_before, NULL);
		if (key.changed && !key.text)
			unlink(setup.key_file);
		else if (key.changed)
			write_key(setup.key_file, key.text, key.size, user, group, NULL);
	}
	free_key(key.text, key.size);
	g_clear_error(&why);
	rules_clear(&rules_before);
	rules_clear(&rules);
	domain_setup_clear(&setup);
	domain_setup_clear(&old);
	g_free(foreign);
	g_free(new);
	free(xml);

	return fine;
}

static gboolean disable(virDomain *domain, GError **error)
{
	gboolean active = virDomainIsActive(domain) == 1, enabled, found = FALSE, fine = FALSE;
	char uuid[VIR_UUID_STRING_BUFLEN], *xml, *new = NULL, *foreign = NULL, *kept = NULL;
	const char *title = virDomainGetName(domain);
	static const struct rules none;
	struct domain_setup old = { 0 };

	virDomainGetUUIDString(domain, uuid);
	xml = get_xml(domain);
	if (!xml) {
		g_set_error(error, G_IO_ERROR, G_IO_ERROR_FAILED, "libvirt: %s", virGetLastErrorMessage());
		return FALSE;
	}
	if (!domain_xml_read(xml, &enabled, &old, &foreign, error))
		goto out;
	/* First what can fail: run once more, this knows from the XML what to do */
	if (active) {
		if (!unplug(domain, &found, error)) {
			g_prefix_error(error, "%s still has the object, and its XML is unchanged: ", title);
			goto out;
		}
		if (found)
			done("the object is out of the running %s", title);
	}
	if (enabled && virDomainIsPersistent(domain) == 1) {
		new = domain_xml_disable(xml, error);
		if (!new || !define(domain, xml, new, error))
			goto out;
		done("the XML of %s is without the object", title);
		found = TRUE;
	}
	if (kept_object(domain, &kept)) {
		done("%s still has it in %s: the secret and the AppArmor rules stay for that.  When you no longer need it (virsh managedsave-remove, virsh snapshot-delete), run this again", title, kept);
		fine = TRUE;
		goto out;
	}
	if (!write_rules(uuid, &none, error) || !remove_key(uuid, &found, error))
		goto out;
	if (!found)
		done("%s was not enabled", title);
	fine = TRUE;
out:
	domain_setup_clear(&old);
	g_free(kept);
	g_free(foreign);
	g_free(new);
	free(xml);

	return fine;
}

/* ---- status -------------------------------------------------------------- */

/* A line; false if the domain could not be asked */
static gboolean print_status(virDomain *domain, gboolean json)
{
	gboolean active = virDomainIsActive(domain) == 1, enabled = FALSE, fine = TRUE;
	char *xml = get_xml(domain), *foreign = NULL;
	const char *name = virDomainGetName(domain);
	char uuid[VIR_UUID_STRING_BUFLEN];
	struct domain_setup setup = { 0 };
	JsonObject *kvmi = NULL;
	JsonNode *node = NULL;
	const char *problem = NULL, *state;
	GError *error = NULL;
	char *from;

	virDomainGetUUIDString(domain, uuid);
	if (!xml || !domain_xml_read(xml, &enabled, &setup, &foreign, &error))
		problem = error ? error->message : virGetLastErrorMessage();
	if (active && !problem) {
		node = query(domain, &error);
		if (node)
			kvmi = json_node_get_object(node);
		else if (error)
			problem = error->message;
	}
	state = problem ? "unknown" : kvmi ? text_of(kvmi, "state") :
		!enabled && !foreign ? "off" : active ? "restart" : "shut-off";
	from = setup.cid ? g_strdup_printf("vsock:%s:%s", setup.cid, setup.port) :
			   g_strdup(setup.socket);

	if (json) {
		JsonBuilder *b = json_builder_new();
		JsonNode *root;
		char *text;

		json_builder_begin_object(b);
		put(b, "domain", name);
		put(b, "uuid", uuid);
		put(b, "state", state);
		json_builder_set_member_name(b, "active");
		json_builder_add_boolean_value(b, active);
		json_builder_set_member_name(b, "enabled");
		json_builder_add_boolean_value(b, enabled || foreign);
		if (from)
			put(b, "socket", from);
		if (setup.key_file)
			put(b, "key-file", setup.key_file);
		if (setup.mutual)
			put(b, "auth", "hmac");
		if (problem)
			put(b, "problem", problem);
		if (node) {
			json_builder_set_member_name(b, "kvmi");
			json_builder_add_value(b, json_node_copy(node));
		}
		json_builder_end_object(b);
		root = json_builder_get_root(b);
		text = json_to_string(root, FALSE);
		puts(text);
		g_free(text);
		json_node_unref(root);
		g_object_unref(b);
	} else {
		JsonObject *last = kvmi && json_object_has_member(kvmi, "last-unhook") ?
			json_object_get_object_member(kvmi, "last-unhook") : NULL;
		const char *peer = text_of(kvmi, "peer");

		if (peer && *peer)
			printf("%-20s %-11s %s", name, state, peer);
		else
			printf("%-20s %-11s %s%s", name, state, setup.socket ? "unix:" : "",
			       from ? from : "-");
		if (last)
			printf("  last: %s, %s, %.1f ms", text_of(last, "action"), text_of(last, "outcome"),
			       json_object_get_int_member(last, "duration") / 1000.0);
		if (text_of(kvmi, "last-error"))
			printf("  error: %s", text_of(kvmi, "last-error"));
		if (problem)
			printf("  %s", problem);
		else if (is_copy(&setup, uuid))
			printf("  has the socket or the secret of another domain: run kvmi libvirt enable");
		putchar('\n');
	}
	fine = !problem;
	g_free(from);
	if (node)
		json_node_unref(node);
	g_clear_error(&error);
	domain_setup_clear(&setup);
	g_free(foreign);
	free(xml);

	return fine;
}

/* By name, or by UUID */
static virDomain *find_domain(virConnect *connection, const char *name)
{
	virDomain *domain = virDomainLookupByName(connection, name);

	return domain ? domain : virDomainLookupByUUIDString(connection, name);
}

static int compare_names(const void *a, const void *b)
{
	return strcmp(virDomainGetName(*(virDomain **)a), virDomainGetName(*(virDomain **)b));
}

static int status_main(virConnect *connection, char **names, gboolean json)
{
	virDomain **domains = NULL;
	int count, i, result = EXIT_OK;

	if (*names) {
		for (; *names; names++) {
			virDomain *domain = find_domain(connection, *names);

			if (!domain || !print_status(domain, json)) {
				if (!domain)
					complain("libvirt knows no domain %s", *names);
				result = EXIT_PROBLEM;
			}
			if (domain)
				virDomainFree(domain);
		}
		return result;
	}
	count = virConnectListAllDomains(connection, &domains, 0);
	if (count < 0) {
		complain("libvirt: %s", virGetLastErrorMessage());
		return EXIT_PROBLEM;
	}
	/* in no order that would be the same with each version of libvirt */
	qsort(domains, count, sizeof(*domains), compare_names);
	for (i = 0; i < count; i++) {
		if (!print_status(domains[i], json))
			result = EXIT_PROBLEM;
		virDomainFree(domains[i]);
	}
	free(domains);

	return result;
}

/* Why the domains there can't be set up; NULL: they can */
static const char *unfit(const char *uri)
{
	const char *path = strstr(uri, "://");

	if (!path || path[3] != '/' || strncmp(uri, "qemu", 4))
		return "another host, or not QEMU: files have to be changed there, too; run this on it";
	if (g_str_has_prefix(path + 3, "/session"))
		return "the libvirt of a user, whose QEMU gets neither to the socket nor to the secret: define the domain in qemu:///system";

	return NULL;
}

int libvirt_main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "socket", required_argument, NULL, 's' },
		{ "vsock", required_argument, NULL, 'v' },
		{ "key-file", required_argument, NULL, 'k' },
		{ "no-key", no_argument, NULL, 'n' },
		{ "mutual", no_argument, NULL, 'm' },
		{ "emulator", required_argument, NULL, 'e' },
		{ "connect", required_argument, NULL, 'c' },
		{ "json", no_argument, NULL, 'j' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	struct options o = { .uri = "qemu:///system" };
	virConnect *connection;
	virDomain *domain;
	GError *error = NULL;
	gboolean fine, for_enable = FALSE;
	const char *command, *why = NULL;
	char *uri;
	int option, result = EXIT_PROBLEM;

	while ((option = getopt_long(argc, argv, "s:k:e:c:jh", options, NULL)) >= 0) {
		for_enable |= strchr("svknme", option) != NULL;
		switch (option) {
		case 's':
			o.socket = optarg;
			break;
		case 'v':
			o.vsock = optarg;
			break;
		case 'k':
			o.key_file = optarg;
			break;
		case 'n':
			o.no_key = true;
			break;
		case 'm':
			o.mutual = true;
			break;
		case 'e':
			o.emulator = optarg;
			break;
		case 'c':
			o.uri = optarg;
			break;
		case 'j':
			o.json = true;
			break;
		case 'h':
			fputs(help, stdout);
			return EXIT_OK;
		default:
			return EXIT_USAGE;
		}
	}
	command = argv[optind] ? argv[optind++] : "";
	if (strcmp(command, "enable") && strcmp(command, "disable") && strcmp(command, "status")) {
		complain("kvmi libvirt wants enable, disable or status; see kvmi libvirt --help");
		return EXIT_USAGE;
	}
	if (strcmp(command, "status") && argc - optind != 1) {
		complain("kvmi libvirt %s wants the name of one domain", command);
		return EXIT_USAGE;
	}
	if ((for_enable && strcmp(command, "enable")) || (o.json && strcmp(command, "status"))) {
		complain("--json is for status, and all options but that and --connect for enable");
		return EXIT_USAGE;
	}
	if ((o.socket && o.vsock) || (o.no_key && (o.key_file || o.mutual))) {
		complain("--socket and --vsock, or --no-key and --key-file or --mutual, exclude each other");
		return EXIT_USAGE;
	}

	/* What others have to read isn't for root alone */
	umask(022);
	virSetErrorFunc(NULL, quiet);
	if (strcmp(command, "status") && strstr(o.uri, "://"))
		why = unfit(o.uri);
	if (why) {
		complain("%s is %s", o.uri, why);
		return EXIT_PROBLEM;
	}
	connection = virConnectOpen(o.uri);
	if (!connection) {
		complain("libvirt: %s", virGetLastErrorMessage());
		return EXIT_PROBLEM;
	}
	/* What was given may be an alias of libvirt's configuration */
	uri = virConnectGetURI(connection);
	if (!strcmp(command, "status")) {
		result = status_main(connection, argv + optind, o.json);
	} else if (!uri || (why = unfit(uri))) {
		complain("%s is %s", o.uri, uri ? why : virGetLastErrorMessage());
	} else {
		domain = find_domain(connection, argv[optind]);
		if (!domain) {
			complain("libvirt knows no domain %s", argv[optind]);
		} else {
			fine = lock_setup(&error) &&
			       (!strcmp(command, "enable") ? enable(domain, &o, &error) :
							     disable(domain, &error));
			if (fine)
				result = EXIT_OK;
			else
				complain("%s", error->message);
			g_clear_error(&error);
			virDomainFree(domain);
		}
	}
	free(uri);
	virConnectClose(connection);
	xmlCleanupParser();

	return result;
}
