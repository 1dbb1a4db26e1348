/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The device manager and the tool, as small as they can be */
#ifndef BENCH_TOOL_H
#define BENCH_TOOL_H

#include <poll.h>
#include <sys/socket.h>
#include <linux/kvmi.h>

#include "guest.h"

#ifndef KVM_INTROSPECTION_HOOK
struct kvm_introspection_hook {
    int32_t fd;
    uint32_t padding;
    uint8_t uuid[16];
};
struct kvm_introspection_feature {
    uint32_t allow;
    int32_t id;
};
#define KVM_INTROSPECTION_HOOK    _IOW(KVMIO, 0xc8, struct kvm_introspection_hook)
#define KVM_INTROSPECTION_UNHOOK  _IO(KVMIO, 0xc9)
#define KVM_INTROSPECTION_COMMAND _IOW(KVMIO, 0xca, struct kvm_introspection_feature)
#define KVM_INTROSPECTION_EVENT   _IOW(KVMIO, 0xcb, struct kvm_introspection_feature)
#endif

/*
 * Sleeps in poll(), as tools do: a recv() that sleeps is also woken when the
 * other side has read something, for nothing.
 */
static inline void read_all(int fd, void *buf, size_t size)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };

    if (poll(&p, 1, -1) != 1) {
        err(1, "poll");
    }
    if (recv(fd, buf, size, MSG_WAITALL) != (ssize_t)size) {
        err(1, "the socket was closed");
    }
}

static inline void write_all(int fd, const void *buf, size_t size)
{
    if (send(fd, buf, size, MSG_NOSIGNAL) != (ssize_t)size) {
        err(1, "the socket was closed");
    }
}

static inline void command(int fd, uint16_t id, const void *body, uint16_t size)
{
    struct {
        struct kvmi_msg_hdr hdr;
        uint8_t body[KVMI_MAX_MSG_SIZE];
    } msg;
    struct {
        struct kvmi_msg_hdr hdr;
        struct kvmi_error_code ec;
    } rpl;

    msg.hdr = (struct kvmi_msg_hdr) { .id = id, .size = size };
    memcpy(msg.body, body, size);
    write_all(fd, &msg, sizeof(msg.hdr) + size);
    read_all(fd, &rpl, sizeof(rpl));
    if (rpl.hdr.id != id || rpl.ec.err) {
        errx(1, "command %u: error %d", id, rpl.ec.err);
    }
}

/* Hooks the VM, with everything allowed; returns the tool's end */
static inline int tool_hook(struct guest *g)
{
    struct kvm_introspection_feature all = { .allow = 1, .id = -1 };
    struct kvm_introspection_hook hook = { };
    int s[2];

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, s)) {
        err(1, "socketpair");
    }
    hook.fd = s[0];
    if (ioctl(g->vm, KVM_INTROSPECTION_HOOK, &hook) ||
        ioctl(g->vm, KVM_INTROSPECTION_COMMAND, &all) ||
        ioctl(g->vm, KVM_INTROSPECTION_EVENT, &all)) {
        err(1, "KVM_INTROSPECTION_HOOK");
    }
    return s[1];
}

#endif
