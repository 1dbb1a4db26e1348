/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the library costs beside the same thing done by hand, on this machine,
 * with the unit tests' simulator in KVM's place:
 *
 *	library events		events a second, and by bare system calls
 *	library vms N		memory of a VM; an event among N idle ones
 *	library unhook N	taking N breakpoints out
 *
 * Prints one JSON object.
 */
#include <err.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <kvmi/hooks.h>
#include <kvmi/kvmi.h>

#include "../unit/sim.h"

#define TIMEOUT_S 120
#define BATCHES 40
#define BATCH 2000

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

#define must(call) do { \
        struct kvmi_error e_, *error = &e_; \
        if ((call) != KVMI_OK) { \
            errx(1, "%s: %s", #call, e_.message); \
        } \
    } while (0)

static double now_ns(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * 1e9 + ts.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Noise only ever adds: the middle of the lower half */
static double lower_quartile(double *v, size_t n)
{
    qsort(v, n, sizeof(*v), compare);
    return v[n / 4];
}

/*
 * All threads on one CPU, and none drives another off it: what a batch takes is
 * all the work that both sides do, two changes of threads an event among it, and
 * the process's CPU time says so, whatever else the machine does.
 */
static void one_cpu(void)
{
    struct sched_param none = { 0 };
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(sched_getcpu(), &set);
    if (sched_setaffinity(0, sizeof(set), &set) ||
        sched_setscheduler(0, SCHED_BATCH, &none)) {
        err(1, "sched_setaffinity");
    }
}

/* A vCPU that does nothing but run into a breakpoint */
static void send_events(int fd)
{
    struct event ev = {
        .hdr = { .id = KVMI_VCPU_EVENT, .size = sizeof(ev) - sizeof(ev.hdr) },
        .ev = { .event = KVMI_VCPU_EVENT_BREAKPOINT },
        .common = { .size = sizeof(ev.common) },
        .bp = { .gpa = 0x1000, .insn_len = 1 },
    };
    struct reply rpl;

    do {
        ev.hdr.seq++;
        if (send(fd, &ev, sizeof(ev), MSG_NOSIGNAL) != sizeof(ev)) {
            return;
        }
    } while (recv(fd, &rpl, sizeof(rpl), MSG_WAITALL) == sizeof(rpl));
}

/* KVM, until it is told to send events */
static void serve(struct sim *sim)
{
    if (!sim_handshake(sim)) {
        return;
    }
    while (sim_receive(sim)) {
        sim_serve_one(sim);
        if (sim->last.id == KVMI_VM_CONTROL_EVENTS) {
            send_events(sim->fd);
            return;
        }
    }
}

static void serve_bare(struct sim *sim)
{
    send_events(sim->fd);
}

static double bare_batch(int fd)
{
    double start = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    uint8_t message[sizeof(struct kvmi_msg_hdr) + KVMI_MAX_MSG_SIZE];
    struct event *ev = (struct event *)message;

    for (int i = 0; i < BATCH; i++) {
        struct reply rpl = {
            .hdr = { .id = KVMI_VCPU_EVENT,
                     .size = sizeof(rpl) - sizeof(rpl.hdr) },
            .rpl = { .action = KVMI_EVENT_ACTION_RETRY,
                     .event = KVMI_VCPU_EVENT_BREAKPOINT },
        };
        struct pollfd p = { .fd = fd, .events = POLLIN };

        /* A tool has a deadline, and does not know which message comes */
        if (poll(&p, 1, 10000) != 1 ||
            recv(fd, message, sizeof(message), MSG_DONTWAIT) != sizeof(*ev)) {
            err(1, "recv");
        }
        rpl.hdr.seq = ev->hdr.seq;
        rpl.vcpu.vcpu = ev->common.vcpu;
        if (send(fd, &rpl, sizeof(rpl), MSG_NOSIGNAL) != sizeof(rpl)) {
            err(1, "send");
        }
    }
    return now_ns(CLOCK_PROCESS_CPUTIME_ID) - start;
}

static double library_batch(struct kvmi_vm *vm)
{
    double start = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    struct kvmi_vm_event *ev;

    for (int i = 0; i < BATCH; i++) {
        must(kvmi_vm_wait_event(vm, 10000, &ev, error));
        must(kvmi_vm_reply(vm, ev, KVMI_ACTION_RETRY, error));
        kvmi_vm_event_free(ev);
    }
    return now_ns(CLOCK_PROCESS_CPUTIME_ID) - start;
}

static struct kvmi_vm *connect_to(int fd)
{
    struct kvmi_error error;
    struct kvmi_vm *vm = kvmi_vm_new(fd, NULL, 0, &error);

    if (!vm) {
        errx(1, "%s", error.message);
    }
    must(kvmi_vm_connect(vm, 0, 0, error));
    return vm;
}

static void bench_events(void)
{
    static struct sim bare, sim;
    double by_hand[BATCHES], library[BATCHES];
    struct kvmi_vm *vm;

    one_cpu();
    sim_start(&bare, serve_bare);
    sim_start(&sim, serve);
    vm = connect_to(sim.client_fd);
    must(kvmi_vm_control_events(vm, KVMI_EV_UNHOOK, true, error));
    for (int i = 0; i < BATCHES; i++) {
        by_hand[i] = bare_batch(bare.client_fd);
        library[i] = library_batch(vm);
    }
    printf("{\"bare_per_s\": %.0f, \"library_per_s\": %.0f}\n",
           BATCH * 1e9 / lower_quartile(by_hand, BATCHES),
           BATCH * 1e9 / lower_quartile(library, BATCHES));
}

/* ---------------------------------------------------------------------- */

static long resident(void)
{
    long size, pages;
    FILE *file = fopen("/proc/self/statm", "r");

    if (!file || fscanf(file, "%ld %ld", &size, &pages) != 2) {
        err(1, "/proc/self/statm");
    }
    fclose(file);
    return pages * sysconf(_SC_PAGESIZE);
}

static double loop_batch(int epoll, struct kvmi_vm *vm)
{
    double start = now_ns(CLOCK_MONOTONIC);

    for (int got = 0; got < BATCH;) {
        struct epoll_event ready;
        struct kvmi_vm_event *ev;
        enum kvmi_status status;

        /* the first may have come along with an answer */
        while ((ev = kvmi_vm_next_event(vm))) {
            must(kvmi_vm_reply(vm, ev, KVMI_ACTION_RETRY, error));
            kvmi_vm_event_free(ev);
            got++;
        }
        if (epoll_wait(epoll, &ready, 1, 10000) != 1) {
            errx(1, "no event came");
        }
        vm = ready.data.ptr;
        status = kvmi_vm_process(vm, NULL);
        if (status != KVMI_OK && status != KVMI_ERR_NOTHING) {
            errx(1, "%s", kvmi_status_name(status));
        }
    }
    return now_ns(CLOCK_MONOTONIC) - start;
}

static void add(int epoll, struct kvmi_vm *vm)
{
    struct epoll_event event = { .events = EPOLLIN, .data.ptr = vm };

    if (epoll_ctl(epoll, EPOLL_CTL_ADD, kvmi_vm_fd(vm), &event)) {
        err(1, "epoll_ctl");
    }
}

static void bench_vms(unsigned int count)
{
    int alone = epoll_create1(0), among = epoll_create1(0);
    double one[BATCHES], many[BATCHES];
    struct rlimit files = { 0 };
    int (*fds)[2] = calloc(count, sizeof(*fds));
    struct kvmi_vm **vms = calloc(count, sizeof(*vms));
    long before, after;
    pid_t child;

    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    one_cpu();
    for (unsigned int i = 0; i < count; i++) {
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds[i])) {
            err(1, "socketpair");
        }
    }
    /* The others are a process of their own: it is our memory that counts */
    child = fork();
    if (child == 0) {
        struct sim *sims = calloc(count, sizeof(*sims));

        for (unsigned int i = 0; i < count; i++) {
            close(fds[i][1]);
            sims[i].script = serve;
            sim_run(&sims[i], fds[i][0]);
        }
        for (unsigned int i = 0; i < count; i++) {
            sim_stop(&sims[i]);
        }
        _exit(0);
    }
    for (unsigned int i = 0; i < count; i++) {
        close(fds[i][0]);
    }
    vms[0] = connect_to(fds[0][1]);
    must(kvmi_vm_control_events(vms[0], KVMI_EV_UNHOOK, true, error));
    add(alone, vms[0]);
    add(among, vms[0]);
    loop_batch(alone, vms[0]);
    before = resident();
    for (unsigned int i = 1; i < count; i++) {
        vms[i] = connect_to(fds[i][1]);
        add(among, vms[i]);
    }
    after = resident();
    for (int i = 0; i < BATCHES; i++) {
        one[i] = loop_batch(alone, vms[0]);
        many[i] = loop_batch(among, vms[0]);
    }
    printf("{\"vms\": %u, \"bytes_per_vm\": %.0f, \"alone_ns\": %.0f, "
           "\"among_ns\": %.0f}\n", count,
           (double)(after - before) / (count - 1),
           lower_quartile(one, BATCHES) / BATCH,
           lower_quartile(many, BATCHES) / BATCH);
    for (unsigned int i = 0; i < count; i++) {
        kvmi_vm_close(vms[i]);
    }
    waitpid(child, NULL, 0);
}

/* ---------------------------------------------------------------------- */

static void bench_unhook(unsigned int count)
{
    static const struct kvmi_hooks_callbacks callbacks;
    static struct sim sim;
    struct kvmi_hooks_result result;
    struct kvmi_hooks *hooks;
    double cpu[9], all[9];
    struct kvmi_vm *vm;
    int n = sizeof(cpu) / sizeof(cpu[0]);

    /* spread over as much as a kernel's code takes: few share a page */
    unsigned int apart = SIM_MEMORY / count;

    if (apart < 2) {
        errx(2, "not more than %d breakpoints", SIM_MEMORY / 2);
    }
    memset(sim.memory, 0x90, sizeof(sim.memory));
    sim_start(&sim, NULL);
    vm = connect_to(sim.client_fd);
    hooks = kvmi_hooks_new(&callbacks, NULL, NULL);
    for (unsigned int i = 0; i < count; i++) {
        struct kvmi_hook *hook;

        /* the simulator's page tables swap pages in pairs */
        must(kvmi_hooks_add(hooks, (i * apart) ^ 0x1000, i * apart, NULL, &hook,
                            error));
    }
    /* one vCPU that has not started is not waited for */
    for (int i = 0; i < n; i++) {
        must(kvmi_hooks_attach(hooks, vm, error));
        must(kvmi_hooks_plant(hooks, &result, error));
        if (result.in != count || sim.memory[apart] != 0xcc) {
            errx(1, "%zu of %u planted", result.in, count);
        }
        sim_unhook(&sim);
        all[i] = now_ns(CLOCK_MONOTONIC);
        cpu[i] = now_ns(CLOCK_THREAD_CPUTIME_ID);
        kvmi_vm_process(vm, NULL);
        kvmi_hooks_dispatch(hooks);
        if (!kvmi_hooks_is_asked_to_leave(hooks)) {
            errx(1, "UNHOOK has not come");
        }
        must(kvmi_hooks_take_out(hooks, &result, error));
        cpu[i] = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu[i];
        all[i] = now_ns(CLOCK_MONOTONIC) - all[i];
        if (result.in != count || result.left || sim.memory[apart] != 0x90) {
            errx(1, "%zu of %u taken out", result.in - result.left, count);
        }
        /* the VM is paused, and goes on */
        kvmi_hooks_detach(hooks);
        kvmi_vm_close(vm);
        sim_stop(&sim);
        sim_start(&sim, NULL);
        vm = connect_to(sim.client_fd);
    }
    printf("{\"breakpoints\": %u, \"cpu_ns\": %.1f, \"all_ns\": %.1f}\n", count,
           lower_quartile(cpu, n) / count, lower_quartile(all, n) / count);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    unsigned int count = argc > 2 ? atoi(argv[2]) : 0;

    alarm(TIMEOUT_S);
    if (!strcmp(what, "events")) {
        bench_events();
    } else if (!strcmp(what, "vms") && count > 1) {
        bench_vms(count);
    } else if (!strcmp(what, "unhook") && count) {
        bench_unhook(count);
    } else {
        errx(2, "usage: library events | vms N | unhook N");
    }
    fflush(stdout);
    _exit(0);
}
