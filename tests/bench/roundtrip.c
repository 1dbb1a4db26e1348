/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What an event costs, of each kind that a tool has many of: the guest makes
 * one after the other, the tool answers at once.  And what a command costs, while
 * the vCPU waits with an event.  Beside each, a ping-pong of messages of the
 * same sizes between two threads on a socket pair, in alternating batches.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "guest.h"
#include "tool.h"

#define TIMEOUT_S 60

#define MAX_REPLY (sizeof(struct kvmi_msg_hdr) + sizeof(struct kvmi_error_code) + 4096)

struct event {
    struct kvmi_msg_hdr hdr;
    struct kvmi_event_hdr ev;
    struct kvmi_vcpu_event common;
    uint64_t data[3];
};

struct reply {
    struct kvmi_msg_hdr hdr;
    struct kvmi_vcpu_hdr vcpu;
    struct kvmi_vcpu_event_reply rpl;
    uint64_t new_val;
};

struct command {
    struct kvmi_msg_hdr hdr;
    union {
        struct kvmi_vm_read_physical read;
        struct {
            struct kvmi_vcpu_hdr vcpu;
            union {
                struct kvmi_vcpu_control_events events;
                struct kvmi_vcpu_control_cr cr;
                struct kvmi_vcpu_control_msr msr;
                struct kvmi_vcpu_control_singlestep step;
                struct kvmi_vcpu_get_registers get;
            };
        };
    };
};

#define VCPU_SIZE(field) (sizeof(struct kvmi_vcpu_hdr) + sizeof(((struct command *)0)->field))

#define SYSENTER_ESP 0x175

/* Real mode */
static const uint8_t breakpoint[] = { 0xcc, 0xeb, 0xfd };
/* 1: xor eax, 0x1000; mov cr3, eax; jmp 1b */
static const uint8_t cr3[] = { 0x66, 0x35, 0, 0x10, 0, 0, 0x0f, 0x22, 0xd8, 0xeb, 0xf5 };
/* mov ecx, SYSENTER_ESP; 1: inc eax; wrmsr; jmp 1b */
static const uint8_t msr[] = { 0x66, 0xb9, 0x75, 0x01, 0, 0, 0x66, 0x40, 0x0f, 0x30, 0xeb, 0xfa };
/* 1: mov byte [GUEST_CODE + 0x800], 1; jmp 1b */
static const uint8_t write_page[] = { 0xc6, 0x06, 0x00, 0x18, 0x01, 0xeb, 0xf9 };
static const uint8_t nops[] = { 0x90, 0xeb, 0xfd };

static const struct kind {
    const char *name;
    uint16_t event;             /* what is answered, or in which the vCPU waits */
    uint8_t action;
    uint8_t data;               /* how much the event has of its own */
    bool value;                 /* the reply says what is written */
    const uint8_t *code;
    size_t size;
    struct command control;     /* besides CONTROL_EVENTS */
    struct command command;     /* what is measured, if not the event */
    size_t reply;               /* the size of what it returns */
} kinds[] = {
    { .name = "BREAKPOINT", KVMI_VCPU_EVENT_BREAKPOINT, KVMI_EVENT_ACTION_RETRY,
      sizeof(struct kvmi_vcpu_event_breakpoint), false, breakpoint, sizeof(breakpoint) },
    { .name = "CR", KVMI_VCPU_EVENT_CR, KVMI_EVENT_ACTION_CONTINUE,
      sizeof(struct kvmi_vcpu_event_cr), true, cr3, sizeof(cr3),
      .control = { .hdr = { .id = KVMI_VCPU_CONTROL_CR, .size = VCPU_SIZE(cr) },
                   .cr = { .cr = 3, .enable = 1 } } },
    { .name = "MSR", KVMI_VCPU_EVENT_MSR, KVMI_EVENT_ACTION_CONTINUE,
      sizeof(struct kvmi_vcpu_event_msr), true, msr, sizeof(msr),
      .control = { .hdr = { .id = KVMI_VCPU_CONTROL_MSR, .size = VCPU_SIZE(msr) },
                   .msr = { .msr = SYSENTER_ESP, .enable = 1 } } },
    { .name = "PF", KVMI_VCPU_EVENT_PF, KVMI_EVENT_ACTION_CONTINUE,
      sizeof(struct kvmi_vcpu_event_pf), false, write_page, sizeof(write_page) },
    { .name = "SINGLESTEP", KVMI_VCPU_EVENT_SINGLESTEP, KVMI_EVENT_ACTION_CONTINUE,
      sizeof(struct kvmi_vcpu_event_singlestep), false, nops, sizeof(nops),
      .control = { .hdr = { .id = KVMI_VCPU_CONTROL_SINGLESTEP, .size = VCPU_SIZE(step) },
                   .step = { .enable = 1 } } },
    { .name = "READ_PHYSICAL", KVMI_VCPU_EVENT_BREAKPOINT, KVMI_EVENT_ACTION_RETRY,
      sizeof(struct kvmi_vcpu_event_breakpoint), false, breakpoint, sizeof(breakpoint),
      .command = { .hdr = { .id = KVMI_VM_READ_PHYSICAL,
                            .size = sizeof(struct kvmi_vm_read_physical) },
                   .read = { .gpa = GUEST_CODE, .size = 4096 } },
      .reply = 4096 },
    { .name = "GET_REGISTERS", KVMI_VCPU_EVENT_BREAKPOINT, KVMI_EVENT_ACTION_RETRY,
      sizeof(struct kvmi_vcpu_event_breakpoint), false, breakpoint, sizeof(breakpoint),
      .command = { .hdr = { .id = KVMI_VCPU_GET_REGISTERS, .size = VCPU_SIZE(get) } },
      .reply = sizeof(struct kvmi_vcpu_get_registers_reply) },
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

/* What there is to send, and to receive, in one round */
static size_t request_size(const struct kind *k)
{
    if (k->command.hdr.id) {
        return sizeof(k->command.hdr) + k->command.hdr.size;
    }
    return k->value ? sizeof(struct reply) : offsetof(struct reply, new_val);
}

static size_t answer_size(const struct kind *k)
{
    if (k->command.hdr.id) {
        return sizeof(struct kvmi_msg_hdr) + sizeof(struct kvmi_error_code) + k->reply;
    }
    return offsetof(struct event, data) + k->data;
}

static uint64_t events_ns(const struct kind *k, int fd, unsigned int n)
{
    uint64_t start = now_ns();
    struct event ev;

    for (unsigned int i = 0; i < n; i++) {
        struct reply rpl = {
            .hdr = { .id = KVMI_VCPU_EVENT,
                     .size = request_size(k) - sizeof(rpl.hdr) },
            .rpl = { .action = k->action, .event = k->event },
        };

        read_all(fd, &ev, answer_size(k));
        if (ev.ev.event != k->event) {
            errx(1, "event %u instead of %s", ev.ev.event, k->name);
        }
        rpl.hdr.seq = ev.hdr.seq;
        rpl.new_val = ev.data[2];
        write_all(fd, &rpl, request_size(k));
    }
    return now_ns() - start;
}

static uint64_t commands_ns(const struct kind *k, int fd, unsigned int n)
{
    uint64_t start = now_ns();
    struct {
        struct kvmi_msg_hdr hdr;
        struct kvmi_error_code ec;
        uint8_t data[4096];
    } rpl;

    for (unsigned int i = 0; i < n; i++) {
        write_all(fd, &k->command, request_size(k));
        read_all(fd, &rpl, answer_size(k));
        if (rpl.hdr.id != k->command.hdr.id || rpl.ec.err) {
            errx(1, "%s: error %d", k->name, rpl.ec.err);
        }
    }
    return now_ns() - start;
}

struct pong {
    const struct kind *kind;
    int fd;
};

static void *pong_thread(void *arg)
{
    static uint8_t buf[MAX_REPLY];
    struct pong *p = arg;

    for (;;) {
        read_all(p->fd, buf, request_size(p->kind));
        write_all(p->fd, buf, answer_size(p->kind));
    }
    return NULL;
}

static uint64_t pingpong_ns(const struct kind *k, int fd, unsigned int n)
{
    static uint8_t buf[MAX_REPLY];
    uint64_t start = now_ns();

    for (unsigned int i = 0; i < n; i++) {
        write_all(fd, buf, request_size(k));
        read_all(fd, buf, answer_size(k));
    }
    return now_ns() - start;
}

static long switches(void)
{
    struct rusage ru;

    getrusage(RUSAGE_SELF, &ru);
    return ru.ru_nvcsw + ru.ru_nivcsw;
}

/* Queued for the vCPU, which carries it out before the guest's first instruction */
static void send_control(int fd, const struct command *c)
{
    write_all(fd, c, sizeof(c->hdr) + c->hdr.size);
}

static void read_result(int fd, const struct command *c)
{
    struct {
        struct kvmi_msg_hdr hdr;
        struct kvmi_error_code ec;
    } rpl;

    read_all(fd, &rpl, sizeof(rpl));
    if (rpl.hdr.id != c->hdr.id || rpl.ec.err) {
        errx(1, "command %u: error %d", c->hdr.id, rpl.ec.err);
    }
}

static void restrict_page(int fd)
{
    struct {
        struct kvmi_vm_set_page_access set;
        struct kvmi_page_access_entry entry;
    } body = {
        .set = { .count = 1 },
        .entry = { .gpa = GUEST_CODE,
                   .access = KVMI_PAGE_ACCESS_R | KVMI_PAGE_ACCESS_X },
    };

    command(fd, KVMI_VM_SET_PAGE_ACCESS, &body, sizeof(body));
}

static void measure(const struct kind *k, unsigned int n, unsigned int batches)
{
    struct command enable = {
        .hdr = { .id = KVMI_VCPU_CONTROL_EVENTS, .size = VCPU_SIZE(events) },
        .events = { .event_id = k->event, .enable = 1 },
    };
    struct kvmi_vm_check_event check = { .id = KVMI_VM_EVENT_UNHOOK };
    long event_switches = 0, ping_switches = 0, before;
    uint64_t *event, *ping;
    pthread_t vcpu, pong;
    struct pong other = { .kind = k };
    struct guest g;
    struct event ev;
    int tool, p[2];

    alarm(TIMEOUT_S);
    event = calloc(batches, sizeof(*event));
    ping = calloc(batches, sizeof(*ping));
    if (!event || !ping || socketpair(AF_UNIX, SOCK_STREAM, 0, p)) {
        err(1, "set-up");
    }
    other.fd = p[0];

    guest_create(&g, k->code, k->size);
    tool = tool_hook(&g);
    if (pthread_create(&pong, NULL, pong_thread, &other)) {
        errx(1, "pthread_create");
    }
    if (k->event == KVMI_VCPU_EVENT_PF) {
        restrict_page(tool);
    }
    send_control(tool, &enable);
    if (k->control.hdr.id) {
        send_control(tool, &k->control);
    }
    /* Its reply says that those before have been queued */
    command(tool, KVMI_VM_CHECK_EVENT, &check, sizeof(check));
    if (pthread_create(&vcpu, NULL, vcpu_thread, &g)) {
        errx(1, "pthread_create");
    }
    read_result(tool, &enable);
    if (k->control.hdr.id) {
        read_result(tool, &k->control);
    }
    if (k->command.hdr.id) {
        read_all(tool, &ev, offsetof(struct event, data) + k->data);
    }

    for (unsigned int i = 0; i < batches; i++) {
        before = switches();
        event[i] = k->command.hdr.id ? commands_ns(k, tool, n) : events_ns(k, tool, n);
        event_switches += switches() - before;

        before = switches();
        ping[i] = pingpong_ns(k, p[1], n);
        ping_switches += switches() - before;
    }

    printf("{\"kind\": \"%s\", \"ns\": %.1f, \"pingpong_ns\": %.1f, "
           "\"switches\": %.2f, \"pingpong_switches\": %.2f}\n", k->name,
           (double)lower_quartile(event, batches) / n,
           (double)lower_quartile(ping, batches) / n,
           (double)event_switches / batches / n,
           (double)ping_switches / batches / n);
    fflush(stdout);
    /* The vCPU waits for a reply; the kernel puts it all away */
    _exit(0);
}

int main(int argc, char **argv)
{
    unsigned int n = argc > 1 ? atoi(argv[1]) : 200;
    unsigned int batches = argc > 2 ? atoi(argv[2]) : 20;

    if (!n || !batches) {
        errx(2, "usage: roundtrip [ROUNDS-PER-BATCH [BATCHES]]");
    }
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        int status;
        pid_t pid = fork();

        if (!pid) {
            measure(&kinds[i], n, batches);
        }
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status) {
            errx(1, "%s could not be measured", kinds[i].name);
        }
    }
    return 0;
}
