/* SPDX-License-Identifier: LGPL-2.1-or-later */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "internal.h"

struct kvmi_listener {
	int fd;
	pthread_mutex_t lock;	/* of the key and the secret */
	uint8_t cookie_hash[SHA1_SIZE];
	size_t secret_size;	/* 0: none */
	uint8_t secret[KVMI_SECRET_MAX];
	/* what is to be deleted at the end */
	dev_t device;
	ino_t inode;
	struct sockaddr_un address;	/* sun_path "": none */
};

/*
 * Makes place for the new socket.  Only a socket that refuses connections,
 * thus was left behind, is deleted.
 */
static enum kvmi_status remove_stale(const struct sockaddr_un *address,
				     struct kvmi_error *err)
{
	const char *path = address->sun_path;
	enum kvmi_status status = KVMI_OK;
	struct stat info;
	int fd;

	if (lstat(path, &info)) {
		if (errno == ENOENT)
			return KVMI_OK;
		return fail_errno(err, errno, "%s", path);
	}
	if (!S_ISSOCK(info.st_mode))
		return fail(err, KVMI_ERR_ARGUMENT,
			    "%s exists and is not a socket; not touching it",
			    path);

	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return fail_errno(err, errno, "socket");
	/* a full backlog (EAGAIN) is a sign of life, too */
	if (!connect(fd, (const struct sockaddr *)address, sizeof(*address)) ||
	    errno == EAGAIN)
		status = fail(err, KVMI_ERR_ARGUMENT,
			      "%s: another program is listening there", path);
	else if (errno != ECONNREFUSED)
		status = fail_errno(err, errno, "%s", path);
	else if (unlink(path) && errno != ENOENT)
		status = fail_errno(err, errno, "deleting the stale socket %s",
				    path);
	close(fd);

	return status;
}

struct kvmi_listener *kvmi_listener_new_unix(const char *path, unsigned int mode,
					     struct kvmi_error *err)
{
	struct kvmi_listener *listener;
	struct stat info;
	int error;

	if (!path || !*path || mode > 0777) {
		fail(err, KVMI_ERR_ARGUMENT, "no path, or a mode above 0777");
		return NULL;
	}
	if (!mode)
		mode = 0600;

	listener = calloc(1, sizeof(*listener));
	if (!listener) {
		fail_errno(err, ENOMEM, "listening");
		return NULL;
	}
	pthread_mutex_init(&listener->lock, NULL);
	listener->fd = -1;
	listener->address.sun_family = AF_UNIX;
	if (strlen(path) >= sizeof(listener->address.sun_path)) {
		fail(err, KVMI_ERR_ARGUMENT,
		     "the path of a unix socket has at most %zu bytes: %s",
		     sizeof(listener->address.sun_path) - 1, path);
		goto failed;
	}
	strcpy(listener->address.sun_path, path);

	if (remove_stale(&listener->address, err) != KVMI_OK)
		goto failed;

	listener->fd = socket(AF_UNIX,
			      SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (listener->fd < 0) {
		fail_errno(err, errno, "socket");
		goto failed;
	}
	/*
	 * On Linux this sets the mode the socket is born with (the umask may
	 * take more away), so that there is no moment in which it is open to
	 * others.
	 */
	if (fchmod(listener->fd, mode)) {
		fail_errno(err, errno, "fchmod of a socket");
		goto failed;
	}
	if (bind(listener->fd, (struct sockaddr *)&listener->address,
		 sizeof(listener->address))) {
		fail_errno(err, errno, "%s", path);
		goto failed;
	}
	if (lstat(path, &info) || chmod(path, mode) ||
	    listen(listener->fd, 128)) {
		error = errno;
		unlink(path);
		fail_errno(err, error, "%s", path);
		goto failed;
	}
	listener->device = info.st_dev;
	listener->inode = info.st_ino;

	return listener;

failed:
	if (listener->fd >= 0)
		close(listener->fd);
	free(listener);

	return NULL;
}

struct kvmi_listener *kvmi_listener_new_vsock(unsigned int port,
					      struct kvmi_error *err)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_port = port,
		.svm_cid = VMADDR_CID_ANY,
	};
	struct kvmi_listener *listener;

	if (!port || port == VMADDR_PORT_ANY) {
		fail(err, KVMI_ERR_ARGUMENT, "there is no port %u", port);
		return NULL;
	}
	listener = calloc(1, sizeof(*listener));
	if (!listener) {
		fail_errno(err, ENOMEM, "listening");
		return NULL;
	}
	pthread_mutex_init(&listener->lock, NULL);
	listener->fd = socket(AF_VSOCK,
			      SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (listener->fd < 0) {
		fail_errno(err, errno,
			   "a vsock socket (is the module vsock loaded?)");
	} else if (bind(listener->fd, (struct sockaddr *)&address,
			sizeof(address)) || listen(listener->fd, 128)) {
		fail_errno(err, errno, "vsock port %u", port);
		close(listener->fd);
	} else {
		return listener;
	}
	free(listener);

	return NULL;
}

enum kvmi_status kvmi_listener_set_key(struct kvmi_listener *listener,
				       const void *key, size_t size,
				       struct kvmi_error *err)
{
	uint8_t hash[SHA1_SIZE] = { 0 };

	if (!listener || (size && !key))
		return fail(err, KVMI_ERR_ARGUMENT, "no listener or no key");

	if (size)
		sha1(key, size, hash);
	pthread_mutex_lock(&listener->lock);
	memcpy(listener->cookie_hash, hash, sizeof(hash));
	pthread_mutex_unlock(&listener->lock);

	return KVMI_OK;
}

enum kvmi_status kvmi_listener_set_secret(struct kvmi_listener *listener,
					  const void *secret, size_t size,
					  struct kvmi_error *err)
{
	if (!listener || !secret || !size || size > KVMI_SECRET_MAX)
		return fail(err, KVMI_ERR_ARGUMENT,
			    "no listener, or a secret of %zu bytes: 1 to %d",
			    size, KVMI_SECRET_MAX);

	pthread_mutex_lock(&listener->lock);
	memcpy(listener->secret, secret, size);
	listener->secret_size = size;
	pthread_mutex_unlock(&listener->lock);

	return KVMI_OK;
}

int kvmi_listener_fd(const struct kvmi_listener *listener)
{
	return listener ? listener->fd : -1;
}

enum kvmi_status kvmi_listener_accept(struct kvmi_listener *listener,
				      struct kvmi_vm **vm,
				      struct kvmi_error *err)
{
	enum kvmi_status status = KVMI_OK;
	int fd;

	if (!listener || !vm)
		return fail(err, KVMI_ERR_ARGUMENT, "no listener or no vm");
	*vm = NULL;

	do {
		fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC);
	} while (fd < 0 && errno == EINTR);
	if (fd < 0) {
		if (errno == EAGAIN || errno == EWOULDBLOCK ||
		    errno == ECONNABORTED)
			return fail(err, KVMI_ERR_NOTHING,
				    "nobody is connecting");
		return fail_errno(err, errno, "accept");
	}

	pthread_mutex_lock(&listener->lock);
	*vm = vm_new(fd, listener->cookie_hash, err);
	if (*vm && listener->secret_size)
		status = kvmi_vm_set_secret(*vm, listener->secret,
					    listener->secret_size, err);
	pthread_mutex_unlock(&listener->lock);
	if (!*vm) {
		close(fd);
		return KVMI_ERR_SYSTEM;
	}

	return status;
}

enum kvmi_status kvmi_listener_wait(struct kvmi_listener *listener, int ms,
				    struct kvmi_vm **vm, struct kvmi_error *err)
{
	int64_t left = -1, deadline = now_ms() + ms;
	enum kvmi_status status;
	struct pollfd poll_fd;

	/* who came may be gone, or another thread's by now: wait on */
	while ((status = kvmi_listener_accept(listener, vm, err)) ==
	       KVMI_ERR_NOTHING) {
		if (ms >= 0)
			left = deadline - now_ms();
		if (ms >= 0 && left <= 0)
			break;
		poll_fd = (struct pollfd){ .fd = listener->fd,
					   .events = POLLIN };
		if (poll(&poll_fd, 1, left) >= 0)
			continue;
		if (errno != EINTR)
			return fail_errno(err, errno, "poll");
		return fail(err, KVMI_ERR_NOTHING,
			    "nobody has connected before a signal came");
	}

	return status;
}

void kvmi_listener_free(struct kvmi_listener *listener)
{
	struct stat info;

	if (!listener)
		return;

	if (listener->address.sun_path[0] &&
	    !lstat(listener->address.sun_path, &info) &&
	    info.st_dev == listener->device && info.st_ino == listener->inode)
		unlink(listener->address.sun_path);
	close(listener->fd);
	pthread_mutex_destroy(&listener->lock);
	explicit_bzero(listener, sizeof(*listener));
	free(listener);
}
