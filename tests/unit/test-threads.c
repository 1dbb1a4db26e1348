/* SPDX-License-Identifier: GPL-2.0-or-later */
/* One handle, many threads.  Also built with -fsanitize=thread. */

#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <glib.h>

#include <kvmi/kvmi.h>

#include "sim.h"

#define WORKERS 4
#define ROUNDS 300

/* GLib's would do, but the sanitizer does not see into it */
struct queue {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct kvmi_vm_event *events[8];
	unsigned int count;
	bool end;
};

struct work {
	struct kvmi_vm *vm;
	unsigned int number;
	struct queue *queue;
};

static atomic_uint answered;

static void queue_init(struct queue *queue)
{
	memset(queue, 0, sizeof(*queue));
	pthread_mutex_init(&queue->lock, NULL);
	pthread_cond_init(&queue->changed, NULL);
}

static void queue_push(struct queue *queue, struct kvmi_vm_event *event)
{
	pthread_mutex_lock(&queue->lock);
	if (event)
		queue->events[queue->count++] = event;
	else
		queue->end = true;
	pthread_cond_broadcast(&queue->changed);
	pthread_mutex_unlock(&queue->lock);
}

static struct kvmi_vm_event *queue_pop(struct queue *queue)
{
	struct kvmi_vm_event *event = NULL;

	pthread_mutex_lock(&queue->lock);
	while (!queue->count && !queue->end)
		pthread_cond_wait(&queue->changed, &queue->lock);
	if (queue->count)
		event = queue->events[--queue->count];
	pthread_mutex_unlock(&queue->lock);

	return event;
}

static struct kvmi_vm *connect_vm(struct sim *sim)
{
	struct kvmi_vm *vm;

	sim_start(sim, sim->script);
	vm = kvmi_vm_new(sim->client_fd, NULL, 0, NULL);
	g_assert_nonnull(vm);
	kvmi_vm_set_timeout(vm, 20000, NULL);
	g_assert_cmpint(kvmi_vm_connect(vm, 0, 0, NULL), ==, KVMI_OK);

	return vm;
}

/* Each thread has a page of its own, and sees nobody else's answers */
static void *read_and_write(void *context)
{
	struct work *work = context;
	uint64_t page = (work->number + 1) * 4096;
	uint8_t out[4096], in[4096];
	struct kvmi_registers state;
	struct kvmi_error err;
	unsigned int i;

	for (i = 0; i < ROUNDS; i++) {
		memset(out, i + work->number, sizeof(out));
		g_assert_cmpint(kvmi_vm_write_physical(work->vm, page, out,
						       sizeof(out), &err),
				==, KVMI_OK);
		g_assert_cmpint(kvmi_vm_read_physical(work->vm, page, in,
						      sizeof(in), &err),
				==, KVMI_OK);
		g_assert_cmpmem(in, sizeof(in), out, sizeof(out));
		g_assert_cmpint(kvmi_vcpu_get_registers(work->vm,
							work->number % 3,
							&state, NULL, NULL, 0,
							&err), ==, KVMI_OK);
		g_assert_cmphex(state.sregs.cr3, ==, 0x1000 + work->number % 3);
	}

	return NULL;
}

/* Waits in the library until the end */
static void *take_events(void *context)
{
	struct work *work = context;
	struct kvmi_vm_event *event;
	enum kvmi_status status;
	struct kvmi_error err;

	while ((status = kvmi_vm_wait_event(work->vm, 20000, &event, &err)) ==
	       KVMI_OK)
		queue_push(work->queue, event);
	g_assert_cmpstr(kvmi_status_name(status), ==, "closed");

	return NULL;
}

/* Others answer what it takes */
static void *answer_events(void *context)
{
	struct work *work = context;
	struct kvmi_vm_event *event;
	struct kvmi_error err;

	while ((event = queue_pop(work->queue))) {
		struct kvm_regs regs = event->state.regs;

		regs.rax++;
		g_assert_cmpint(work->number % 2 ?
				kvmi_vm_reply(work->vm, event,
					      KVMI_ACTION_CONTINUE, &err) :
				kvmi_vm_reply_with_registers(work->vm, event,
							     KVMI_ACTION_CONTINUE,
							     &regs, &err),
				==, KVMI_OK);
		kvmi_vm_event_free(event);
		atomic_fetch_add(&answered, 1);
	}

	return NULL;
}

/* Takes without waiting what the others take by waiting */
static void *peek(void *context)
{
	struct work *work = context;
	struct kvmi_vm_event *event;
	unsigned int i;

	for (i = 0; i < ROUNDS; i++) {
		event = kvmi_vm_next_event(work->vm);
		if (event)
			queue_push(work->queue, event);
		kvmi_vm_poll_events(work->vm);
		kvmi_vm_set_timeout(work->vm, 20000, NULL);
		g_usleep(50);
	}

	return NULL;
}

/* Starts commands that whoever comes first is told of */
static atomic_uint told;

static void on_told(struct kvmi_vm *vm, const struct kvmi_error *result,
		    void *context)
{
	uint8_t *data = context;

	(void)vm;
	g_assert_cmpint(result->status, ==, KVMI_OK);
	g_assert_cmphex(data[0], ==, 0);
	g_free(data);
	atomic_fetch_add(&told, 1);
}

static void *start_calls(void *context)
{
	struct work *work = context;
	uint8_t *mine = g_malloc(64);
	struct kvmi_error err;
	unsigned int i;

	for (i = 0; i < ROUNDS; i++) {
		uint8_t *theirs = g_malloc(64);
		struct kvmi_call *call;

		/* page 0 is nobody's */
		theirs[0] = mine[0] = 1;
		g_assert_cmpint(kvmi_vm_start_read_physical(work->vm, 0, theirs,
							    64, &call, &err),
				==, KVMI_OK);
		kvmi_call_then(call, on_told, theirs);
		g_assert_cmpint(kvmi_vm_start_read_physical(work->vm, 0, mine,
							    64, &call, &err),
				==, KVMI_OK);
		kvmi_vm_dispatch(work->vm);
		kvmi_vm_next_timeout(work->vm);
		g_assert_cmpint(kvmi_call_wait(call, &err), ==, KVMI_OK);
		g_assert_cmphex(mine[0], ==, 0);
	}
	g_free(mine);

	return NULL;
}

static void test_all_at_once(void)
{
	struct sim *sim = g_new0(struct sim, 1);
	struct kvmi_vm *vm = connect_vm(sim);
	struct queue queue;
	GThread *workers[WORKERS], *takers[2], *answerers[2], *peeker;
	GThread *starters[2];
	struct work work[WORKERS + 4];
	struct kvmi_error err;
	unsigned int i;

	queue_init(&queue);
	for (i = 0; i < G_N_ELEMENTS(work); i++)
		work[i] = (struct work){ .vm = vm, .number = i, .queue = &queue };
	for (i = 0; i < WORKERS; i++)
		workers[i] = g_thread_new("work", read_and_write, &work[i]);
	for (i = 0; i < 2; i++) {
		takers[i] = g_thread_new("take", take_events,
					 &work[WORKERS + i]);
		answerers[i] = g_thread_new("answer", answer_events,
					    &work[WORKERS + 2 + i]);
	}
	for (i = 0; i < 2; i++)
		starters[i] = g_thread_new("start", start_calls, &work[i]);
	peeker = g_thread_new("peek", peek, &work[0]);
	for (i = 0; i < ROUNDS; i++) {
		/* the same vCPU not before it has been answered */
		while (kvmi_vm_pause_vcpu(vm, i % 3, true, &err) != KVMI_OK)
			;
		while (atomic_load(&answered) <= i)
			g_usleep(100);
	}
	for (i = 0; i < WORKERS; i++)
		g_thread_join(workers[i]);
	g_thread_join(peeker);
	for (i = 0; i < 2; i++)
		g_thread_join(starters[i]);
	kvmi_vm_dispatch(vm);
	g_assert_cmpint(atomic_load(&told), ==, 2 * ROUNDS);
	queue_push(&queue, NULL);
	for (i = 0; i < 2; i++)
		g_thread_join(answerers[i]);
	g_assert_cmpint(atomic_load(&answered), ==, ROUNDS);

	/* gets the others out of it */
	kvmi_vm_shutdown(vm);
	for (i = 0; i < 2; i++)
		g_thread_join(takers[i]);
	g_assert_cmpint(kvmi_vm_check_event(vm, 1, &err), ==, KVMI_ERR_CLOSED);
	kvmi_vm_close(vm);
	sim_stop(sim);
	g_free(sim);
}

/* A thread that waits for events does not hold up one with a command */
static void test_not_held_up(void)
{
	struct sim *sim = g_new0(struct sim, 1);
	struct kvmi_vm *vm = connect_vm(sim);
	struct queue queue;
	struct work work = { .vm = vm, .queue = &queue };
	int64_t start = g_get_monotonic_time();
	struct kvmi_error err;
	GThread *taker;
	unsigned int i;

	queue_init(&queue);
	taker = g_thread_new("take", take_events, &work);

	for (i = 0; i < 100; i++)
		g_assert_cmpint(kvmi_vm_check_event(vm, 1, &err), ==, KVMI_OK);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 10 * G_USEC_PER_SEC);
	/* events that come with an answer wake the one that waits for them */
	g_assert_cmpint(kvmi_vm_pause_vcpu(vm, 1, true, &err), ==, KVMI_OK);
	kvmi_vm_event_free(queue_pop(&queue));
	kvmi_vm_shutdown(vm);
	g_thread_join(taker);
	kvmi_vm_close(vm);
	sim_stop(sim);
	g_free(sim);
}

/* One that gives up waiting leaves the polling to another */
static void script_slow(struct sim *sim)
{
	if (!sim_handshake(sim))
		return;
	while (sim_receive(sim)) {
		if (sim->last.id == KVMI_VM_GET_INFO)
			g_usleep(500000);
		sim_serve_one(sim);
	}
}

static void *count_vcpus(void *context)
{
	struct work *work = context;
	unsigned int count;

	/* the other polls by now */
	g_usleep(50000);
	g_assert_cmpint(kvmi_vm_get_vcpu_count(work->vm, &count, NULL), ==,
			KVMI_OK);

	return NULL;
}

static void test_poller_leaves(void)
{
	struct sim *sim = g_new0(struct sim, 1);
	int64_t start = g_get_monotonic_time();
	struct kvmi_vm_event *event;
	struct work work = { 0 };
	GThread *waiter;

	sim->script = script_slow;
	work.vm = connect_vm(sim);
	waiter = g_thread_new("wait", count_vcpus, &work);
	g_assert_null(kvmi_vm_next_event(work.vm));
	g_assert_cmpint(kvmi_vm_wait_event(work.vm, 200, &event, NULL), ==,
			KVMI_ERR_NOTHING);
	g_thread_join(waiter);
	/* 20 s is its own timeout */
	g_assert_cmpint(g_get_monotonic_time() - start, <, 10 * G_USEC_PER_SEC);
	kvmi_vm_close(work.vm);
	sim_stop(sim);
	g_free(sim);
}

/* An event loop does not take away what another thread waits for */
struct looping {
	struct kvmi_vm *vm;
	atomic_bool end;
};

static void *loop(void *context)
{
	struct looping *looping = context;

	while (!atomic_load(&looping->end)) {
		struct pollfd fd = { kvmi_vm_fd(looping->vm),
				     kvmi_vm_poll_events(looping->vm), 0 };

		poll(&fd, 1, 10);
		kvmi_vm_process(looping->vm, NULL);
		kvmi_vm_dispatch(looping->vm);
	}

	return NULL;
}

static void test_beside_a_loop(void)
{
	struct sim *sim = g_new0(struct sim, 1);
	struct looping looping = { .vm = connect_vm(sim) };
	int64_t start = g_get_monotonic_time();
	GThread *thread = g_thread_new("loop", loop, &looping);
	unsigned int i;

	for (i = 0; i < 2000; i++)
		g_assert_cmpint(kvmi_vm_check_event(looping.vm, 1, NULL), ==,
				KVMI_OK);
	/* 20 s is the timeout: none has waited for it */
	g_assert_cmpint(g_get_monotonic_time() - start, <, 15 * G_USEC_PER_SEC);
	atomic_store(&looping.end, true);
	g_thread_join(thread);
	kvmi_vm_close(looping.vm);
	sim_stop(sim);
	g_free(sim);
}

/*
 * Threads that sleep in poll() without an end in sight, while another receives
 * what they sleep for.
 */
#define FOR_EVER 60000

static atomic_uint polled, overslept;

static void *poll_and_answer(void *context)
{
	struct kvmi_vm *vm = context;
	struct kvmi_vm_event *event;
	enum kvmi_status status;

	do {
		struct pollfd fd = { kvmi_vm_fd(vm), kvmi_vm_poll_events(vm), 0 };
		int timeout = kvmi_vm_next_timeout(vm);

		if (!poll(&fd, 1, timeout < 0 ? FOR_EVER : timeout) &&
		    timeout < 0)
			atomic_fetch_add(&overslept, 1);
		status = kvmi_vm_process(vm, NULL);
		while ((event = kvmi_vm_next_event(vm))) {
			g_assert_cmpint(kvmi_vm_reply(vm, event,
						      KVMI_ACTION_CONTINUE,
						      NULL), ==, KVMI_OK);
			kvmi_vm_event_free(event);
			atomic_fetch_add(&polled, 1);
		}
		kvmi_vm_dispatch(vm);
	} while (status == KVMI_OK || status == KVMI_ERR_NOTHING);
	g_assert_cmpstr(kvmi_status_name(status), ==, "closed");

	return NULL;
}

/* Waits for it, but not for ever */
static void reaches(atomic_uint *count, unsigned int wanted)
{
	int64_t end = g_get_monotonic_time() + 30 * G_USEC_PER_SEC;

	while (atomic_load(count) < wanted) {
		g_assert_cmpint(g_get_monotonic_time(), <, end);
		g_usleep(100);
	}
	g_assert_cmpint(atomic_load(count), ==, wanted);
}

static void on_ended(struct kvmi_vm *vm, const struct kvmi_error *result,
		     void *context)
{
	atomic_uint *status = context;

	(void)vm;
	atomic_store(status, result->status + 1000);
}

static atomic_uint unhooks;

static void on_unhook(struct kvmi_vm *vm, void *context)
{
	(void)vm, (void)context;
	atomic_fetch_add(&unhooks, 1);
}

/* Twice before the answer to CHECK_EVENT, which another thread waits for */
static void script_unhook(struct sim *sim)
{
	if (!sim_handshake(sim))
		return;
	while (sim_receive(sim)) {
		if (sim->last.id == KVMI_VM_CHECK_EVENT) {
			sim_unhook(sim);
			sim_unhook(sim);
		}
		sim_serve_one(sim);
	}
}

static void test_pollers(void)
{
	struct sim *sim = g_new0(struct sim, 1);
	int64_t start = g_get_monotonic_time();
	uint8_t data[64] = { 1 };
	struct kvmi_call *call;
	struct kvmi_error err;
	GThread *threads[3];
	atomic_uint status;
	unsigned int i, count;
	struct kvmi_vm *vm;

	sim->script = script_unhook;
	vm = connect_vm(sim);
	for (i = 0; i < G_N_ELEMENTS(threads); i++)
		threads[i] = g_thread_new("poll", poll_and_answer, vm);

	/* the event comes with the answer, which this thread waits for */
	for (i = 0; i < ROUNDS; i++) {
		g_assert_cmpint(kvmi_vm_pause_vcpu(vm, i % 3, true, &err), ==,
				KVMI_OK);
		reaches(&polled, i + 1);
	}

	/* so does the answer that they are to dispatch */
	for (i = 0; i < ROUNDS; i++) {
		atomic_store(&status, 0);
		g_assert_cmpint(kvmi_vm_start_read_physical(vm, 0, data, 64,
							    &call, &err),
				==, KVMI_OK);
		if (i % 2)
			kvmi_call_then(call, on_ended, &status);
		g_assert_cmpint(kvmi_vm_get_vcpu_count(vm, &count, &err), ==,
				KVMI_OK);
		if (i % 2 == 0)
			kvmi_call_then(call, on_ended, &status);
		reaches(&status, 1000 + KVMI_OK);
	}

	/* and UNHOOK: one of them is told of it */
	g_assert_cmpint(kvmi_vm_on_unhook(vm, on_unhook, NULL, &err), ==,
			KVMI_OK);
	g_assert_cmpint(kvmi_vm_check_event(vm, 1, &err), ==, KVMI_OK);
	reaches(&unhooks, 1);

	/* and an end that they didn't know of when they went to sleep */
	sim->silent_id = KVMI_VM_GET_INFO;
	kvmi_vm_set_timeout(vm, 200, NULL);
	atomic_store(&status, 0);
	g_assert_cmpint(kvmi_vm_start_command(vm, KVMI_VM_GET_INFO, NULL, 0,
					      NULL, 0, NULL, &call, &err), ==,
			KVMI_OK);
	g_usleep(100000);
	kvmi_call_then(call, on_ended, &status);
	reaches(&status, 1000 + KVMI_ERR_TIMEOUT);

	kvmi_vm_shutdown(vm);
	for (i = 0; i < G_N_ELEMENTS(threads); i++)
		g_thread_join(threads[i]);
	g_assert_cmpint(atomic_load(&overslept), ==, 0);
	g_assert_cmpint(g_get_monotonic_time() - start, <,
			FOR_EVER * 1000LL);
	kvmi_vm_close(vm);
	sim_stop(sim);
	g_free(sim);
}

/* Each of them could have all places for commands; nobody goes without */
#define MANY 1000

static void *read_much(void *context)
{
	struct kvmi_memory_op *ops = g_new0(struct kvmi_memory_op, MANY);
	uint8_t *data = g_malloc0(MANY);
	struct kvmi_vm *vm = context;
	unsigned int i, round;

	for (i = 0; i < MANY; i++)
		ops[i] = (struct kvmi_memory_op){ .gpa = i, .size = 1,
						  .data = &data[i] };
	for (round = 0; round < 5; round++)
		g_assert_cmpint(kvmi_vm_read_many(vm, ops, MANY, NULL), ==,
				KVMI_OK);
	g_free(ops);
	g_free(data);

	return NULL;
}

static void test_many(void)
{
	struct sim *sim = g_new0(struct sim, 1);
	struct kvmi_vm *vm = connect_vm(sim);
	GThread *threads[WORKERS];
	unsigned int i, count;

	for (i = 0; i < WORKERS; i++)
		threads[i] = g_thread_new("read", read_much, vm);
	for (i = 0; i < 50; i++)
		g_assert_cmpint(kvmi_vm_get_vcpu_count(vm, &count, NULL), ==,
				KVMI_OK);
	for (i = 0; i < WORKERS; i++)
		g_thread_join(threads[i]);
	kvmi_vm_close(vm);
	sim_stop(sim);
	g_free(sim);
}

struct keys {
	struct kvmi_listener *listener;
	atomic_bool stop;
};

static gpointer change_keys(gpointer context)
{
	struct keys *keys = context;

	while (!atomic_load(&keys->stop)) {
		kvmi_listener_set_key(keys->listener, "a key", 5, NULL);
		kvmi_listener_set_secret(keys->listener, "a secret", 8, NULL);
	}

	return NULL;
}

/* The key changes while VMs come */
static void test_keys(void)
{
	g_autofree char *folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	g_autofree char *path = g_build_filename(folder, "socket", NULL);
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct keys keys = { 0 };
	GThread *thread;
	unsigned int i;

	keys.listener = kvmi_listener_new_unix(path, 0, NULL);
	g_assert_nonnull(keys.listener);
	g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
	thread = g_thread_new("keys", change_keys, &keys);
	for (i = 0; i < 100; i++) {
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		struct kvmi_vm *vm;

		g_assert_cmpint(connect(fd, (struct sockaddr *)&address,
					sizeof(address)), ==, 0);
		g_assert_cmpint(kvmi_listener_wait(keys.listener, 5000, &vm,
						   NULL), ==, KVMI_OK);
		kvmi_vm_close(vm);
		close(fd);
	}
	atomic_store(&keys.stop, true);
	g_thread_join(thread);
	kvmi_listener_free(keys.listener);
	rmdir(folder);
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/threads/all-at-once", test_all_at_once);
	g_test_add_func("/threads/poller-leaves", test_poller_leaves);
	g_test_add_func("/threads/not-held-up", test_not_held_up);
	g_test_add_func("/threads/beside-a-loop", test_beside_a_loop);

	g_test_add_func("/threads/pollers", test_pollers);
	g_test_add_func("/threads/keys", test_keys);
	g_test_add_func("/threads/many", test_many);

	return g_test_run();
}
