/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a breakpoint event costs: the guest sits on an INT3, the tool answers
 * RETRY, so there is an event, a reply and a pass through the guest each
 * time.  Beside it, a ping-pong of messages of the same sizes between two
 * threads on a socket pair, in alternating batches.
 */
#include <pthread.h>
#include <stdio.h>
#include <sys/resource.h>

#include "guest.h"
#include "tool.h"

#define TIMEOUT_S 60

struct event {
    struct kvmi_msg_hdr hdr;
    struct kvmi_event_hdr ev;
    struct kvmi_vcpu_event common;
    struct kvmi_vcpu_event_breakpoint bp;
};

struct reply {
    struct kvmi_msg_hdr hdr;
    struct kvmi_vcpu_hdr vcpu;
    struct kvmi_vcpu_event_reply rpl;
};

static void *vcpu_thread(void *arg)
{
    struct guest *g = arg;

    guest_start(g, 0);
    /* Until the socket is cut and the guest's own #BP ends it */
    while (!ioctl(g->vcpu, KVM_RUN, 0)) {
        if (g->run->exit_reason != KVM_EXIT_INTR) {
            break;
        }
    }
    return NULL;
}

static uint64_t events_ns(int fd, unsigned int n)
{
    uint64_t start = now_ns();
    struct event ev;

    for (unsigned int i = 0; i < n; i++) {
        struct reply rpl = {
            .hdr = { .id = KVMI_VCPU_EVENT,
                     .size = sizeof(rpl) - sizeof(rpl.hdr) },
            .rpl = { .action = KVMI_EVENT_ACTION_RETRY,
                     .event = KVMI_VCPU_EVENT_BREAKPOINT },
        };

        read_all(fd, &ev, sizeof(ev));
        if (ev.ev.event != KVMI_VCPU_EVENT_BREAKPOINT) {
            errx(1, "event %u instead of BREAKPOINT", ev.ev.event);
        }
        rpl.hdr.seq = ev.hdr.seq;
        write_all(fd, &rpl, sizeof(rpl));
    }
    return now_ns() - start;
}

static void *pong_thread(void *arg)
{
    int fd = *(int *)arg;
    struct event ev = { };
    struct reply rpl;

    for (;;) {
        read_all(fd, &rpl, sizeof(rpl));
        write_all(fd, &ev, sizeof(ev));
    }
    return NULL;
}

static uint64_t pingpong_ns(int fd, unsigned int n)
{
    uint64_t start = now_ns();
    struct reply rpl = { };
    struct event ev;

    for (unsigned int i = 0; i < n; i++) {
        write_all(fd, &rpl, sizeof(rpl));
        read_all(fd, &ev, sizeof(ev));
    }
    return now_ns() - start;
}

static long switches(void)
{
    struct rusage ru;

    getrusage(RUSAGE_SELF, &ru);
    return ru.ru_nvcsw + ru.ru_nivcsw;
}

int main(int argc, char **argv)
{
    static const uint8_t code[] = { 0xcc, 0xeb, 0xfd, };
    unsigned int n = argc > 1 ? atoi(argv[1]) : 200;
    unsigned int batches = argc > 2 ? atoi(argv[2]) : 20;
    struct {
        struct kvmi_vcpu_hdr hdr;
        struct kvmi_vcpu_control_events ctl;
    } enable = { .ctl = { .event_id = KVMI_VCPU_EVENT_BREAKPOINT,
                          .enable = 1 } };
    long event_switches = 0, ping_switches = 0, before;
    uint64_t *event, *ping;
    pthread_t vcpu, pong;
    int tool, p[2];
    struct guest g;

    if (!n || !batches) {
        errx(2, "usage: roundtrip [EVENTS-PER-BATCH [BATCHES]]");
    }
    alarm(TIMEOUT_S);
    event = calloc(batches, sizeof(*event));
    ping = calloc(batches, sizeof(*ping));
    if (!event || !ping || socketpair(AF_UNIX, SOCK_STREAM, 0, p)) {
        err(1, "set-up");
    }

    guest_create(&g, code, sizeof(code));
    tool = tool_hook(&g);
    /* The command is carried out before the guest's first instruction */
    if (pthread_create(&pong, NULL, pong_thread, &p[0])) {
        errx(1, "pthread_create");
    }
    {
        struct {
            struct kvmi_msg_hdr hdr;
            __typeof__(enable) body;
        } msg = { .hdr = { .id = KVMI_VCPU_CONTROL_EVENTS,
                           .size = sizeof(enable) }, .body = enable };
        struct {
            struct kvmi_msg_hdr hdr;
            struct kvmi_error_code ec;
        } rpl;
        struct kvmi_vm_check_event check = { .id = KVMI_VM_EVENT_UNHOOK };

        write_all(tool, &msg, sizeof(msg));
        /* Its reply says that the one before has been queued */
        command(tool, KVMI_VM_CHECK_EVENT, &check, sizeof(check));
        if (pthread_create(&vcpu, NULL, vcpu_thread, &g)) {
            errx(1, "pthread_create");
        }
        read_all(tool, &rpl, sizeof(rpl));
        if (rpl.ec.err) {
            errx(1, "KVMI_VCPU_CONTROL_EVENTS: error %d", rpl.ec.err);
        }
    }

    for (unsigned int i = 0; i < batches; i++) {
        before = switches();
        event[i] = events_ns(tool, n);
        event_switches += switches() - before;

        before = switches();
        ping[i] = pingpong_ns(p[1], n);
        ping_switches += switches() - before;
    }

    printf("{\"event_ns\": %.1f, \"pingpong_ns\": %.1f, "
           "\"event_switches\": %.2f, \"pingpong_switches\": %.2f}\n",
           (double)lower_quartile(event, batches) / n,
           (double)lower_quartile(ping, batches) / n,
           (double)event_switches / batches / n,
           (double)ping_switches / batches / n);
    fflush(stdout);
    /* The vCPU waits for a reply; the kernel puts it all away */
    _exit(0);
}
