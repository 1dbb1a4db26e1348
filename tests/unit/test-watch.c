/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The program `kvmi watch' against a simulated VM: its vCPUs run a small
 * program, instruction by instruction, and say so if they find anything but
 * that program (or a breakpoint event that is answered properly).  And other
 * commands that want a VM.
 */

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <glib.h>
#include <glib/gstdio.h>

#include "sim.h"

#define MEMORY (8 << 20)
#define VCPUS 2

/* Where the kernel is linked to, where it is, where that is in memory */
#define LINKED 0xffffffff81000000ULL
#define MOVED 0x600000ULL
#define KERNEL (LINKED + MOVED)
#define KERNEL_GPA 0x200000
#define STACK 0xffffc90000000000ULL
#define STACK_GPA 0x10000

#define BANNER 0x1000
#define STATE 0x2000
#define ENTRY 0x3000
#define FUNCTION 0x4000
#define TEXT_END 0x100000
#define RODATA 0x120000
#define CONSTANT 0x120800
#define RODATA_END 0x130000

static const char *tool;

/* The program of the vCPUs: a loop at FUNCTION */
static const struct {
	uint8_t length;
	uint8_t bytes[8];
} program[] = {
#define LOOP 0
	{ 4, { 0xf3, 0x0f, 0x1e, 0xfa } },		/* endbr64 */
	{ 5, { 0x0f, 0x1f, 0x44, 0x00, 0x00 } },	/* nop */
#define PUSH 2
	{ 1, { 0x55 } },				/* push rbp */
	{ 3, { 0x48, 0x89, 0xe5 } },			/* mov rbp, rsp */
#define ADD 4
	{ 4, { 0x48, 0x83, 0xc3, 0x01 } },		/* add rbx, 1 */
#define TEST 5
	{ 3, { 0x48, 0x85, 0xdb } },			/* test rbx, rbx */
#define POP 6
	{ 1, { 0x5d } },				/* pop rbp */
#define JUMP 7
	{ 2, { 0xeb, 0 } },				/* jmp to the start */
};

enum { PROGRAM = G_N_ELEMENTS(program) };

static uint8_t code[64];
static unsigned int starts[PROGRAM + 1];

struct fake_vcpu {
	struct fake *fake;
	GThread *thread;
	unsigned int number;
	struct kvm_regs regs;
	bool events;		/* BREAKPOINT */
	bool cr_events, cr3, pf_events;
	bool touches;		/* it is to touch a page, in this way */
	struct kvmi_vcpu_event_pf touch;
	unsigned int pauses;
	uint32_t waiting;	/* event number, 0: none */
	int action;		/* of its answer, -1: not yet */
	bool has_new;
	struct kvm_regs new_regs;
	unsigned long instructions;
};

struct fake {
	struct sim *sim;	/* the connection, NULL: none */
	GMutex lock;		/* everything, and each instruction */
	GCond changed;
	uint8_t *memory;
	struct fake_vcpu vcpu[VCPUS];
	bool ending;
	bool subscribed;	/* UNHOOK */
	bool read_only;		/* the page of the stacks */
	uint8_t taken[RODATA_END / 4096];	/* from the kernel's pages */
};

static void put64(struct fake *fake, uint64_t gpa, uint64_t value)
{
	memcpy(fake->memory + gpa, &value, sizeof(value));
}

static struct fake *fake_new(void)
{
	struct fake *fake = g_new0(struct fake, 1);
	uint32_t running = 3;
	unsigned int i, at = 0;

	for (i = 0; i < PROGRAM; i++) {
		starts[i] = at;
		memcpy(code + at, program[i].bytes, program[i].length);
		at += program[i].length;
	}
	starts[PROGRAM] = at;
	code[at - 1] = -at;

	fake->memory = g_malloc0(MEMORY);
	g_mutex_init(&fake->lock);
	g_cond_init(&fake->changed);

	/* page tables: a large page for the kernel, a small one of stack */
	put64(fake, 0x1000 + 8 * 511, 0x2003);
	put64(fake, 0x2000 + 8 * 510, 0x3003);
	put64(fake, 0x3000 + 8 * (KERNEL >> 21 & 511), KERNEL_GPA | 0x83);
	put64(fake, 0x1000 + 8 * (STACK >> 39 & 511), 0x4003);
	put64(fake, 0x4000 + 8 * (STACK >> 30 & 511), 0x5003);
	put64(fake, 0x5000 + 8 * (STACK >> 21 & 511), 0x6003);
	put64(fake, 0x6000 + 8 * (STACK >> 12 & 511), STACK_GPA | 3);

	strcpy((char *)fake->memory + KERNEL_GPA + BANNER,
	       "Linux version 6.12.0-test (nobody@nowhere)\n");
	memcpy(fake->memory + KERNEL_GPA + STATE, &running, sizeof(running));
	memcpy(fake->memory + KERNEL_GPA + FUNCTION, code, at);

	for (i = 0; i < VCPUS; i++) {
		fake->vcpu[i].fake = fake;
		fake->vcpu[i].number = i;
		fake->vcpu[i].regs.rip = KERNEL + FUNCTION;
		fake->vcpu[i].regs.rsp = STACK + 0x400 * (i + 1);
		fake->vcpu[i].regs.rflags = 0x202;
	}

	return fake;
}

static uint64_t to_gpa(uint64_t gva)
{
	if (gva >= KERNEL && gva < KERNEL + (2 << 20))
		return gva - KERNEL + KERNEL_GPA;
	g_assert_cmphex(gva, >=, STACK);
	g_assert_cmphex(gva, <, STACK + 4096);

	return gva - STACK + STACK_GPA;
}

/* With the lock.  Sends an event and waits for its answer. */
static int event(struct fake_vcpu *v, unsigned int id)
{
	struct fake *fake = v->fake;
	struct kvmi_vcpu_event_breakpoint breakpoint = {
		.gpa = to_gpa(v->regs.rip), .insn_len = 1,
	};
	struct kvmi_vcpu_event_cr cr = { 3, { 0 }, 0x1000, 0x1000 };
	struct kvmi_vcpu_event_pf pf = {
		.gva = v->regs.rsp, .gpa = to_gpa(v->regs.rsp),
		.access = KVMI_PAGE_ACCESS_W,
	};
	const void *data = id == KVMI_VCPU_EVENT_CR ? (void *)&cr :
			   id == KVMI_VCPU_EVENT_PF ? (void *)&pf : &breakpoint;
	size_t size = id == KVMI_VCPU_EVENT_CR ? sizeof(cr) :
		      id == KVMI_VCPU_EVENT_PF ? sizeof(pf) :
		      id == KVMI_VCPU_EVENT_BREAKPOINT ? sizeof(breakpoint) : 0;

	if (id == KVMI_VCPU_EVENT_PF && v->touches)
		pf = v->touch;
	fake->sim->regs[v->number] = v->regs;
	v->action = -1;
	v->has_new = false;
	sim_event(fake->sim, v->number, id, data, size);
	v->waiting = fake->sim->seq;
	/* -2: the connection has ended */
	while (v->action == -1)
		g_cond_wait(&fake->changed, &fake->lock);
	v->waiting = 0;
	if (v->has_new)
		v->regs = v->new_regs;

	return v->action;
}

/* With the lock: what is at RIP, one instruction */
static void execute(struct fake_vcpu *v)
{
	struct kvm_regs *regs = &v->regs;
	uint64_t offset = regs->rip - KERNEL - FUNCTION;
	const uint8_t *here;
	unsigned int i;

	g_assert_cmphex(regs->rip, >=, KERNEL + FUNCTION);
	g_assert_cmphex(offset, <, starts[PROGRAM]);
	here = v->fake->memory + to_gpa(regs->rip);
	for (i = 0; starts[i] < offset; i++)
		;
	g_assert_cmpint(starts[i], ==, offset);

	if (*here == 0xcc) {
		int action;

		/* nobody would tell the tool: the guest would die of this */
		g_assert_true(v->events);
		action = event(v, KVMI_VCPU_EVENT_BREAKPOINT);
		g_assert_cmpint(action, ==, KVMI_EVENT_ACTION_RETRY);
		return;
	}
	/* breakpoints are first bytes; the rest has to be as it was */
	g_assert_cmpmem(here, program[i].length, code + offset,
			program[i].length);

	v->instructions++;
	regs->rip += program[i].length;
	switch (i) {
	case PUSH:
		regs->rsp -= 8;
		if (v->fake->read_only && v->pf_events)
			g_assert_cmpint(event(v, KVMI_VCPU_EVENT_PF), !=,
					KVMI_EVENT_ACTION_RETRY);
		put64(v->fake, to_gpa(regs->rsp), regs->rbp);
		break;
	case PUSH + 1:
		regs->rbp = regs->rsp;
		break;
	case ADD:
		regs->rbx++;
		break;
	case POP:
		g_assert_cmphex(regs->rbp, ==, regs->rsp);
		memcpy(&regs->rbp, v->fake->memory + to_gpa(regs->rsp), 8);
		regs->rsp += 8;
		break;
	case JUMP:
		regs->rip = KERNEL + FUNCTION;
		g_assert_cmphex(regs->rsp, ==, STACK + 0x400 * (v->number + 1));
		/* interrupts have to be on when nobody steps */
		g_assert_cmphex(regs->rflags & 0x200, ==, 0x200);
		/* here it changes to another address space, and back */
		if (v->cr_events && v->cr3)
			g_assert_cmpint(event(v, KVMI_VCPU_EVENT_CR), !=,
					KVMI_EVENT_ACTION_RETRY);
		break;
	}
}

static void *run_vcpu(void *context)
{
	struct fake_vcpu *v = context;
	struct fake *fake = v->fake;

	g_mutex_lock(&fake->lock);
	while (!fake->ending) {
		if (v->pauses) {
			int action;

			v->pauses--;
			action = event(v, KVMI_VCPU_EVENT_PAUSE);
			g_assert_cmpint(action, !=, KVMI_EVENT_ACTION_RETRY);
			continue;
		}
		if (v->touches && v->pf_events) {
			/* what KVM cannot do for the guest frees the page */
			if (v->touch.flags & KVMI_PF_NOT_EMULATED)
				fake->taken[(v->touch.gpa - KERNEL_GPA) / 4096] = 0;
			g_assert_cmpint(event(v, KVMI_VCPU_EVENT_PF), ==,
					KVMI_EVENT_ACTION_CONTINUE);
			v->touches = false;
			g_cond_broadcast(&fake->changed);
		}
		execute(v);
		g_mutex_unlock(&fake->lock);
		/* not so fast that the tool has no chance */
		g_usleep(g_random_int_range(0, 60));
		g_mutex_lock(&fake->lock);
	}
	g_mutex_unlock(&fake->lock);

	return NULL;
}

static void answer(struct fake *fake, int32_t error, const void *data,
		   size_t size)
{
	sim_answer(fake->sim, fake->sim->last.id, fake->sim->last.seq, error,
		   data, size);
}

/* With the lock */
static void serve(struct fake *fake)
{
	struct sim *sim = fake->sim;
	const uint8_t *body = sim->last_body;
	struct kvmi_vcpu_hdr header;
	struct fake_vcpu *v;

	memcpy(&header, body, sizeof(header));
	v = &fake->vcpu[header.vcpu % VCPUS];

	switch (sim->last.id) {
	case KVMI_VCPU_EVENT:
		g_assert_cmpint(sim->last.seq, ==, v->waiting);
		v->action = body[8];
		g_cond_broadcast(&fake->changed);
		return;
	case KVMI_VM_GET_INFO: {
		struct kvmi_vm_get_info_reply reply = { VCPUS, { 0 } };

		answer(fake, 0, &reply, sizeof(reply));
		return;
	}
	case KVMI_VM_READ_PHYSICAL:
	case KVMI_VM_WRITE_PHYSICAL: {
		struct kvmi_vm_write_physical request;
		bool write = sim->last.id == KVMI_VM_WRITE_PHYSICAL;

		memcpy(&request, body, sizeof(request));
		g_assert_cmphex(request.gpa + request.size, <=, MEMORY);
		if (write)
			memcpy(fake->memory + request.gpa,
			       body + sizeof(request), request.size);
		answer(fake, 0, fake->memory + request.gpa,
		       write ? 0 : request.size);
		return;
	}
	case KVMI_VM_PAUSE_VCPU: {
		struct kvmi_vm_pause_vcpu request;

		memcpy(&request, body, sizeof(request));
		g_assert_cmpint(request.vcpu, <, VCPUS);
		/* it notices before its next instruction */
		fake->vcpu[request.vcpu].pauses++;
		break;
	}
	case KVMI_VCPU_GET_REGISTERS: {
		struct kvmi_vcpu_get_registers_reply reply = { .mode = 8 };
		struct kvm_msr_entry msr = { .data = KERNEL + ENTRY };
		uint8_t both[sizeof(reply) + sizeof(msr)];

		reply.regs = v->regs;
		reply.sregs.cr0 = 0x80000011;
		reply.sregs.cr3 = 0x1000;
		reply.msrs.nmsrs = 1;
		memcpy(both, &reply, sizeof(reply));
		memcpy(both + sizeof(reply), &msr, sizeof(msr));
		answer(fake, 0, both, sizeof(both));
		return;
	}
	case KVMI_VCPU_SET_REGISTERS:
		if (!v->waiting) {
			answer(fake, -KVM_EOPNOTSUPP, NULL, 0);
			return;
		}
		memcpy(&v->new_regs, body + 8, sizeof(v->new_regs));
		v->has_new = true;
		break;
	case KVMI_VCPU_CONTROL_EVENTS:
		switch (body[8]) {
		case KVMI_VCPU_EVENT_BREAKPOINT:
			v->events = body[10];
			break;
		case KVMI_VCPU_EVENT_CR:
			v->cr_events = body[10];
			break;
		default:
			g_assert_cmpint(body[8], ==, KVMI_VCPU_EVENT_PF);
			v->pf_events = body[10];
		}
		break;
	case KVMI_VCPU_CONTROL_CR:
		g_assert_cmpint(body[8], ==, 3);
		v->cr3 = body[9];
		break;
	case KVMI_VM_SET_PAGE_ACCESS: {
		struct kvmi_vm_set_page_access request;
		struct kvmi_page_access_entry entry;
		unsigned int i;

		memcpy(&request, body, sizeof(request));
		for (i = 0; i < request.count; i++) {
			memcpy(&entry, body + sizeof(request) +
			       i * sizeof(entry), sizeof(entry));
			if (entry.gpa == STACK_GPA) {
				fake->read_only = !(entry.access &
						    KVMI_PAGE_ACCESS_W);
				continue;
			}
			g_assert_cmphex(entry.gpa, >=, KERNEL_GPA);
			g_assert_cmphex(entry.gpa, <, KERNEL_GPA + RODATA_END);
			fake->taken[(entry.gpa - KERNEL_GPA) / 4096] =
				7 & ~entry.access;
		}
		break;
	}
	case KVMI_VM_CONTROL_EVENTS:
		fake->subscribed = true;
		break;
	default:
		sim_serve_one(sim);
		return;
	}
	answer(fake, 0, NULL, 0);
}

/* One connection, from the handshake to its end */
static void serve_connection(struct sim *sim)
{
	struct fake *fake = sim->fake;
	unsigned int i;

	if (!sim_handshake(sim))
		return;
	g_mutex_lock(&fake->lock);
	fake->sim = sim;
	g_mutex_unlock(&fake->lock);

	while (sim_receive(sim)) {
		g_mutex_lock(&fake->lock);
		serve(fake);
		g_mutex_unlock(&fake->lock);
	}

	/* KVM forgets everything about it */
	g_mutex_lock(&fake->lock);
	for (i = 0; i < VCPUS; i++) {
		struct fake_vcpu *v = &fake->vcpu[i];

		v->pauses = 0;
		v->events = v->cr_events = v->cr3 = v->pf_events = false;
		if (v->waiting && v->action == -1)
			v->action = -2;
	}
	/* KVM would free it, but the tool has to do so while the guest runs */
	g_assert_false(fake->read_only);
	for (i = 0; i < G_N_ELEMENTS(fake->taken); i++)
		g_assert_cmpint(fake->taken[i], ==, 0);
	g_cond_broadcast(&fake->changed);
	fake->sim = NULL;
	g_mutex_unlock(&fake->lock);
}

static void assert_clean(struct fake *fake)
{
	g_mutex_lock(&fake->lock);
	g_assert_cmpmem(fake->memory + KERNEL_GPA + FUNCTION, starts[PROGRAM],
			code, starts[PROGRAM]);
	g_mutex_unlock(&fake->lock);
}

/* All vCPUs go on */
static void assert_alive(struct fake *fake)
{
	unsigned int i;

	for (i = 0; i < VCPUS; i++) {
		struct fake_vcpu *v = &fake->vcpu[i];
		unsigned long before;
		int tries = 20000;

		g_mutex_lock(&fake->lock);
		before = v->instructions;
		while (v->instructions < before + 100 && tries--) {
			g_mutex_unlock(&fake->lock);
			g_usleep(1000);
			g_mutex_lock(&fake->lock);
		}
		g_mutex_unlock(&fake->lock);
		g_assert_cmpint(tries, >, 0);
	}
}

/* ------------------------------------------------------------------------ */

struct run {
	const char *command;	/* NULL: watch */
	struct fake *fake;
	char *folder, *socket, *map;
	GPid pid;
	GIOChannel *output;
	char *line;		/* of the last expect() */
};

static void make_map(const char *path)
{
	GString *text = g_string_new("");
	unsigned int i;

	g_string_append_printf(text, "%llx T _stext\n%llx D linux_banner\n"
			       "%llx D system_state\n%llx T entry_SYSCALL_64\n"
			       "%llx t function\n%llx T _etext\n"
			       "%llx R __start_rodata\n%llx r constant\n"
			       "%llx R __end_rodata\n%llx B _end\n",
			       LINKED, LINKED + BANNER, LINKED + STATE,
			       LINKED + ENTRY, LINKED + FUNCTION,
			       LINKED + TEXT_END, LINKED + RODATA,
			       LINKED + CONSTANT, LINKED + RODATA_END,
			       LINKED + 0x140000);
	for (i = 0; i < 1000; i++)
		g_string_append_printf(text, "%llx t filler_%u\n",
				       LINKED + 0x10000 + 16 * i, i);
	g_assert_true(g_file_set_contents(path, text->str, -1, NULL));
	g_string_free(text, true);
}

/* The tool must not outlive a test that fails */
static void die_with_parent(void *unused)
{
	(void)unused;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
}

static void start(struct run *run, const char *const *breaks,
		  const char *const *options)
{
	GPtrArray *args = g_ptr_array_new();
	int output;
	unsigned int i;

	run->fake = fake_new();
	run->folder = g_dir_make_tmp("kvmi-XXXXXX", NULL);
	run->socket = g_build_filename(run->folder, "socket", NULL);
	run->map = g_build_filename(run->folder, "System.map", NULL);
	make_map(run->map);

	g_ptr_array_add(args, (char *)tool);
	g_ptr_array_add(args, run->command ? (char *)run->command : "watch");
	g_ptr_array_add(args, "--socket");
	g_ptr_array_add(args, run->socket);
	if (g_strcmp0(run->command, "info")) {
		g_ptr_array_add(args, "--json");
		g_ptr_array_add(args, "--system-map");
		g_ptr_array_add(args, run->map);
	}
	for (i = 0; breaks[i]; i++) {
		g_ptr_array_add(args, "--break");
		g_ptr_array_add(args, (char *)breaks[i]);
	}
	for (i = 0; options && options[i]; i++)
		g_ptr_array_add(args, (char *)options[i]);
	g_ptr_array_add(args, NULL);
	g_assert_true(g_spawn_async_with_pipes(NULL, (char **)args->pdata, NULL,
					       G_SPAWN_DO_NOT_REAP_CHILD,
					       die_with_parent, NULL, &run->pid,
					       NULL, &output, NULL, NULL));
	g_ptr_array_free(args, true);
	run->output = g_io_channel_unix_new(output);
	g_io_channel_set_encoding(run->output, NULL, NULL);

	for (i = 0; i < VCPUS; i++)
		run->fake->vcpu[i].thread = g_thread_new("vcpu", run_vcpu,
							 &run->fake->vcpu[i]);
}

/* Reads what the tool says up to that event; the number of hits until then */
static unsigned int expect(struct run *run, const char *event)
{
	g_autofree char *wanted = g_strdup_printf("\"event\":\"%s\"", event);
	unsigned int hits = 0;
	bool found = false;

	while (!found) {
		g_clear_pointer(&run->line, g_free);
		g_assert_cmpint(g_io_channel_read_line(run->output, &run->line,
						       NULL, NULL, NULL), ==,
				G_IO_STATUS_NORMAL);
		hits += strstr(run->line, "\"event\":\"hit\"") != NULL;
		if (strstr(run->line, "\"event\":\"problem\""))
			g_test_message("%s", run->line);
		found = strstr(run->line, wanted);
	}

	return hits;
}

static struct sim *connect_sim(struct run *run)
{
	struct sim *sim = g_new0(struct sim, 1);

	/* the fake vCPUs know few instructions, and no steps */
	sim->no_singlestep = true;

	sim->fake = run->fake;
	sim->script = serve_connection;
	sim_connect(sim, run->socket);

	return sim;
}

static void unhook(struct run *run)
{
	g_mutex_lock(&run->fake->lock);
	g_assert_true(run->fake->subscribed);
	sim_unhook(run->fake->sim);
	g_mutex_unlock(&run->fake->lock);
}

static void finish(struct run *run, int status)
{
	int wait_status;
	unsigned int i;

	g_assert_cmpint(waitpid(run->pid, &wait_status, 0), ==, run->pid);
	g_assert_true(WIFEXITED(wait_status));
	g_assert_cmpint(WEXITSTATUS(wait_status), ==, status);
	g_io_channel_unref(run->output);

	assert_alive(run->fake);
	g_mutex_lock(&run->fake->lock);
	run->fake->ending = true;
	g_mutex_unlock(&run->fake->lock);
	for (i = 0; i < VCPUS; i++)
		g_thread_join(run->fake->vcpu[i].thread);

	g_unlink(run->map);
	g_assert_cmpint(g_rmdir(run->folder), ==, 0);	/* no socket is left */
	g_free(run->line);
	g_free(run->folder);
	g_free(run->socket);
	g_free(run->map);
	g_free(run->fake->memory);
	g_mutex_clear(&run->fake->lock);
	g_cond_clear(&run->fake->changed);
	g_free(run->fake);
}

/* Planted, hit, out at UNHOOK; several times; then Ctrl-C */
static void watch(const char *const *breaks, unsigned int rounds)
{
	struct run run = { 0 };
	struct sim *sim;
	unsigned int i, hits;

	start(&run, breaks, NULL);
	expect(&run, "listening");
	for (i = 0; i < rounds; i++) {
		sim = connect_sim(&run);
		expect(&run, "planted");
		/* summaries come once a second */
		hits = expect(&run, "summary");
		g_assert_cmpint(hits, >, 0);
		unhook(&run);
		expect(&run, "clean");
		sim_stop(sim);		/* it has closed the connection */
		g_free(sim);
		assert_clean(run.fake);
		expect(&run, "closed");
		assert_alive(run.fake);
	}
	sim = connect_sim(&run);
	expect(&run, "summary");
	kill(run.pid, i % 2 ? SIGINT : SIGTERM);
	expect(&run, "clean");
	sim_stop(sim);
	g_free(sim);
	assert_clean(run.fake);
	finish(&run, 0);
}

static void test_entry(void)
{
	static const char *const breaks[] = { "function", NULL };

	watch(breaks, 2);
}

static void test_push(void)
{
	static const char *const breaks[] = { "function+9", NULL };

	watch(breaks, 1);
}

/* Each instruction of the program has one: emulated and stepped ones mixed */
static void test_all(void)
{
	static const char *const breaks[] = {
		"function", "function+4", "function+9", "function+10",
		"function+13", "function+17", "function+20", "function+21", NULL
	};

	watch(breaks, 2);
}

/* Only those that must be stepped: each vCPU is paused all the time */
static void test_stepped(void)
{
	static const char *const breaks[] = {
		"function+13", "function+17", "function+20", NULL
	};

	watch(breaks, 2);
}

/* Breakpoints, CR3 and a page at once, again after a stop; or without the former */
static void events(const char *const *breaks)
{
	static const char *const options[] = {
		"--cr", "3", "--access", "phys:0x10008,16=rx", NULL
	};
	struct run run = { 0 };
	struct sim *sim;
	unsigned int i;

	start(&run, breaks, options);
	expect(&run, "listening");
	for (i = 0; i < 2; i++) {
		sim = connect_sim(&run);
		expect(&run, "planted");
		expect(&run, "cr");
		expect(&run, "pf");
		if (breaks[0])
			g_assert_cmpint(expect(&run, "summary"), >, 0);
		if (i)
			kill(run.pid, SIGINT);
		else
			unhook(&run);
		expect(&run, "clean");
		sim_stop(sim);
		g_free(sim);
		assert_clean(run.fake);
		expect(&run, "closed");
		assert_alive(run.fake);
	}
	finish(&run, 0);
}

static void test_events(void)
{
	static const char *const breaks[] = {
		"function", "function+13", NULL
	};

	events(breaks);
}

static void test_events_alone(void)
{
	static const char *const none[] = { NULL };

	events(none);
}

static void touch(struct run *run, uint64_t gva, uint64_t gpa,
		  unsigned int access, unsigned int flags)
{
	struct fake_vcpu *v = &run->fake->vcpu[1];

	g_mutex_lock(&run->fake->lock);
	v->touch = (struct kvmi_vcpu_event_pf){
		.gva = gva, .gpa = gpa, .access = access, .flags = flags,
	};
	v->touches = true;
	while (v->touches)
		g_cond_wait(&run->fake->changed, &run->fake->lock);
	g_mutex_unlock(&run->fake->lock);
}

static unsigned int taken(struct run *run, unsigned int page)
{
	unsigned int value;

	g_mutex_lock(&run->fake->lock);
	value = run->fake->taken[page];
	g_mutex_unlock(&run->fake->lock);

	return value;
}

/* Who writes to code or constants, or executes the latter, is told of */
static void test_protect(void)
{
	static const char *const none[] = { NULL };
	const struct {
		uint64_t gva, offset;
		unsigned int access;
		const char *said;
	} cases[] = {
		{ KERNEL + CONSTANT, CONSTANT, KVMI_PAGE_ACCESS_W,
		  "\"access\":\"write\",\"area\":\"rodata\",\"address\":\"0xffffffff81720800\",\"symbol\":\"constant\"" },
		{ KERNEL + CONSTANT + 9, CONSTANT + 9, KVMI_PAGE_ACCESS_X,
		  "\"access\":\"execute\",\"area\":\"rodata\",\"address\":\"0xffffffff81720809\",\"symbol\":\"constant+0x9\"" },
		{ KERNEL + FUNCTION + 4, FUNCTION + 4, KVMI_PAGE_ACCESS_W,
		  "\"access\":\"write\",\"area\":\"text\",\"address\":\"0xffffffff81604004\",\"symbol\":\"function+0x4\"" },
		/* by another mapping of the same memory */
		{ 0xffff888000204000, FUNCTION, KVMI_PAGE_ACCESS_W,
		  "\"access\":\"write\",\"area\":\"text\",\"address\":\"0xffffffff81604000\",\"symbol\":\"function\"" },
	};
	struct run run = { .command = "protect" };
	struct sim *sim;
	size_t i;

	start(&run, none, NULL);
	expect(&run, "listening");
	sim = connect_sim(&run);
	expect(&run, "protected");
	g_assert_nonnull(strstr(run.line, "\"text\":256,\"rodata\":16,"));
	g_assert_cmpint(taken(&run, 0), ==, KVMI_PAGE_ACCESS_W);
	g_assert_cmpint(taken(&run, TEXT_END / 4096 - 1), ==,
			KVMI_PAGE_ACCESS_W);
	g_assert_cmpint(taken(&run, TEXT_END / 4096), ==, 0);
	g_assert_cmpint(taken(&run, RODATA / 4096), ==,
			KVMI_PAGE_ACCESS_W | KVMI_PAGE_ACCESS_X);
	for (i = 0; i < G_N_ELEMENTS(cases); i++) {
		touch(&run, cases[i].gva, KERNEL_GPA + cases[i].offset,
		      cases[i].access, 0);
		expect(&run, "violation");
		g_test_message("%s", run.line);
		g_assert_nonnull(strstr(run.line, cases[i].said));
		g_assert_nonnull(strstr(run.line, "\"vcpu\":1,"));
		g_assert_nonnull(strstr(run.line, "\"by\":\"function"));
	}

	/* what KVM cannot emulate: the page is restricted again after a while */
	touch(&run, KERNEL + CONSTANT, KERNEL_GPA + CONSTANT,
	      KVMI_PAGE_ACCESS_W, KVMI_PF_NOT_EMULATED);
	expect(&run, "violation");
	for (i = 0; i < 5000 && !taken(&run, RODATA / 4096); i++)
		g_usleep(1000);
	g_assert_cmpint(taken(&run, RODATA / 4096), !=, 0);

	unhook(&run);
	expect(&run, "clean");
	sim_stop(sim);
	g_free(sim);
	expect(&run, "closed");
	kill(run.pid, SIGINT);
	finish(&run, 0);
}

/* Says nothing, or only the beginning of a handshake */
static int connect_silent(struct run *run, bool begins)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	g_strlcpy(address.sun_path, run->socket, sizeof(address.sun_path));
	/* it may be there, and not listen yet */
	while (connect(fd, (struct sockaddr *)&address, sizeof(address))) {
		g_assert_cmpint(errno, ==, ECONNREFUSED);
		g_usleep(1000);
	}
	if (begins)
		g_assert_cmpint(send(fd, "\x68\0\0\0abcd", 8, 0), ==, 8);

	return fd;
}

/* Of those who say nothing, the last stay: and none hides a VM */
static void test_silent(void)
{
	static const char *const none[] = { NULL };
	static const char *const commands[] = { "watch", "stat", "info" };
	int fds[300];
	size_t i, j;

	for (i = 0; i < G_N_ELEMENTS(commands); i++) {
		struct run run = { .command = commands[i] };
		struct pollfd poll_fd = { .events = POLLIN };
		struct sim *sim;

		start(&run, none, NULL);
		while (!g_file_test(run.socket, G_FILE_TEST_EXISTS))
			g_usleep(1000);
		for (j = 0; j < G_N_ELEMENTS(fds); j++)
			fds[j] = connect_silent(&run, j % 2);
		sim = connect_sim(&run);
		if (strcmp(commands[i], "info")) {
			expect(&run, "ready");
			kill(run.pid, SIGINT);
			expect(&run, "closed");
		}
		finish(&run, 0);
		sim_stop(sim);
		g_free(sim);
		poll_fd.fd = fds[0];
		g_assert_cmpint(poll(&poll_fd, 1, 0), ==, 1);
		for (j = 0; j < G_N_ELEMENTS(fds); j++)
			close(fds[j]);
	}
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	if (argc > 1) {
		tool = argv[1];
	} else {
		g_autofree char *self = g_file_read_link("/proc/self/exe", NULL);
		g_autofree char *folder = g_path_get_dirname(self);

		tool = g_build_filename(folder, "../../tools/kvmi", NULL);
	}
	/* a tool that says nothing is waited for without a bound */
	alarm(110);

	g_test_add_func("/watch/entry", test_entry);
	g_test_add_func("/watch/push", test_push);
	g_test_add_func("/watch/stepped", test_stepped);
	g_test_add_func("/watch/all", test_all);
	g_test_add_func("/watch/events", test_events);
	g_test_add_func("/watch/events-alone", test_events_alone);
	g_test_add_func("/watch/silent", test_silent);
	g_test_add_func("/watch/protect", test_protect);

	return g_test_run();
}
