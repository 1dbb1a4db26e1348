/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Breakpoints and page restrictions as a set, with a simulated KVM that has
 * single-step.  More of the breakpoints: test-watch.c.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <glib.h>

#include <kvmi/hooks.h>

#include "sim.h"

#define ok(call) do { \
		struct kvmi_error err_ = { 0 }, *err = &err_; \
		enum kvmi_status status_ = (call); \
		if (status_ != KVMI_OK) \
			g_error("%s:%d: %s: %s", __FILE__, __LINE__, \
				kvmi_status_name(status_), err_.message); \
	} while (0)

#define CODE_GPA 0x3000
#define CODE_GVA 0xffffffff80002000

static const uint8_t code[] = {
	0x90,			/* 0: nop */
	0x0f, 0xa2,		/* 1: cpuid, which has to be stepped */
	0x55,			/* 3: push rbp */
	0xf4,			/* 4: hlt */
};

struct world {
	struct sim sim;		/* first */
	pthread_mutex_t lock;
	/* the vCPUs: where they are, what they wait for */
	atomic_uint hits_wanted;
	atomic_uint pf_wanted;		/* flags + 1 */
	atomic_int last_action;
	atomic_uint steps;
	unsigned int int3s_while_stepping;
	/* in place of what KVM does usually */
	bool (*special)(struct world *world);
	atomic_uint passed;		/* breakpoints that went to the guest */
	atomic_uint enabled[SIM_VCPUS];	/* events, as a set */

	struct kvmi_vm *vm;
	struct kvmi_hooks *hooks;
	unsigned int hits, pages, others, refused, retired, unhooks;
	unsigned int looks;
	enum kvmi_action page_action;
};

/* vCPU 1 comes to the code at the offset, or touches a page */
static void cause(struct sim *sim, struct world *world)
{
	unsigned int wanted = atomic_exchange(&world->hits_wanted, 0);

	if (wanted) {
		struct kvmi_vcpu_event_breakpoint data = {
			.gpa = CODE_GPA + wanted - 1, .insn_len = 1,
		};

		sim->regs[1].rip = CODE_GVA + wanted - 1;
		sim_event(sim, 1, KVMI_VCPU_EVENT_BREAKPOINT, &data,
			  sizeof(data));
	}
	wanted = atomic_exchange(&world->pf_wanted, 0);
	if (wanted) {
		struct kvmi_vcpu_event_pf data = {
			.gva = 5, .gpa = 0x5008, .access = 2,
			.flags = wanted - 1,
		};

		sim_event(sim, 1, KVMI_VCPU_EVENT_PF, &data, sizeof(data));
	}
}

/* Looks at a message before it is served */
static void note(struct world *world)
{
	struct kvmi_vcpu_event_reply reply;
	struct sim *sim = &world->sim;
	unsigned int vcpu = sim->last_body[0];

	if (sim->last.id == KVMI_VCPU_EVENT) {
		memcpy(&reply, sim->last_body + 8, sizeof(reply));
		if (reply.event == KVMI_VCPU_EVENT_BREAKPOINT &&
		    reply.action == KVMI_ACTION_CONTINUE)
			atomic_fetch_add(&world->passed, 1);
	}
	if (sim->last.id == KVMI_VCPU_CONTROL_EVENTS && vcpu < 2)
		atomic_fetch_or(&world->enabled[vcpu], 1u << sim->last_body[8]);
}

static void serve(struct sim *sim)
{
	struct world *world = (struct world *)sim;

	if (!sim_handshake(sim))
		return;
	while (sim_receive(sim)) {
		unsigned int replies = sim->replies;

		note(world);
		if (world->special && world->special(world))
			continue;
		sim_serve_one(sim);
		if (sim->replies != replies) {
			atomic_store(&world->last_action,
				     sim->last_reply.action);
			if (sim->stepping[1] && sim->last_vcpu == 1 &&
			    sim->last_reply.event !=
			    KVMI_VCPU_EVENT_SINGLESTEP) {
				struct kvmi_vcpu_event_singlestep data = { 0 };

				world->int3s_while_stepping =
					(sim->memory[CODE_GPA + 1] == 0xcc) +
					(sim->access[5] != 0);
				atomic_fetch_add(&world->steps, 1);
				sim_event(sim, 1, KVMI_VCPU_EVENT_SINGLESTEP,
					  &data, sizeof(data));
			}
		}
		if (sim->last.id == KVMI_VM_CHECK_EVENT)
			cause(sim, world);
	}
}

static void on_hit(struct kvmi_hook *hook, const struct kvmi_vm_event *event,
		   void *context)
{
	struct world *world = context;

	g_assert_true(kvmi_hook_cookie(hook) == world);
	g_assert_cmphex(event->state.regs.rip, ==, kvmi_hook_gva(hook));
	world->hits++;
}

static enum kvmi_action on_page(const struct kvmi_vm_event *event,
				void *context)
{
	struct world *world = context;

	g_assert_cmphex(event->pf.gpa, ==, 0x5008);
	world->pages++;

	return world->page_action;
}

static void on_event(struct kvmi_vm_event *event, void *context)
{
	struct world *world = context;

	world->others++;
	ok(kvmi_vm_reply(world->vm, event, KVMI_ACTION_CONTINUE, err));
	kvmi_vm_event_free(event);
}

static void on_problem(struct kvmi_hook *hook, enum kvmi_hook_problem kind,
		       const char *text, void *context)
{
	struct world *world = context;

	g_test_message("%s", text);
	g_assert_true(!hook == (kind == KVMI_HOOK_GENERAL));
	world->refused += kind == KVMI_HOOK_REFUSED;
	world->retired += kind == KVMI_HOOK_RETIRED;
}

static void connect_world(struct world *world)
{
	sim_start(&world->sim, serve);
	world->vm = kvmi_vm_new(world->sim.client_fd, NULL, 0, NULL);
	kvmi_vm_set_timeout(world->vm, 5000, NULL);
	ok(kvmi_vm_connect(world->vm, 0, 0, err));
}

static struct world *world_new(void)
{
	static const struct kvmi_hooks_callbacks callbacks = {
		.hit = on_hit, .page = on_page, .event = on_event,
		.problem = on_problem,
	};
	/* CR3 is 0x1000 */
	static const struct {
		uint32_t at, entry;
	} tables[] = {
		{ 0x1000 + 8 * 511, 0x8003 }, { 0x8000 + 8 * 510, 0x9003 },
		{ 0x9000, 0xa003 }, { 0xa000 + 8 * 2, CODE_GPA | 3 },
	};
	struct world *world = g_new0(struct world, 1);
	unsigned int i;

	for (i = 0; i < G_N_ELEMENTS(tables); i++)
		memcpy(world->sim.memory + tables[i].at, &tables[i].entry, 4);
	memcpy(world->sim.memory + CODE_GPA, code, sizeof(code));
	world->hooks = kvmi_hooks_new(&callbacks, world, NULL);
	g_assert_nonnull(world->hooks);
	connect_world(world);

	return world;
}

static void world_free(struct world *world)
{
	kvmi_hooks_detach(world->hooks);
	kvmi_vm_close(world->vm);
	sim_stop(&world->sim);
	kvmi_hooks_free(world->hooks);
	g_free(world);
}

static void disconnect(struct world *world)
{
	kvmi_vm_close(world->vm);
	sim_stop(&world->sim);
	memset(world->sim.stepping, 0, sizeof(world->sim.stepping));
}

/* Until all has been handled that comes of it */
static void dispatch(struct world *world)
{
	unsigned int i;

	/* sim.c causes it now */
	kvmi_vm_check_event(world->vm, 1, NULL);
	for (i = 0; i < 50; i++) {
		unsigned int rounds = 0;
		struct kvmi_error err;

		kvmi_vm_process(world->vm, &err);
		while (kvmi_hooks_dispatch(world->hooks))
			g_assert_cmpint(++rounds, <, 1000);
		g_usleep(1000);
	}
}

static struct kvmi_hook *add(struct world *world, unsigned int offset)
{
	struct kvmi_hook *hook;

	ok(kvmi_hooks_add(world->hooks, CODE_GVA + offset, CODE_GPA + offset,
			  world, &hook, err));

	return hook;
}

static void test_breakpoints(void)
{
	struct world *world = world_new();
	struct kvmi_hooks_result result;
	struct kvmi_hook *nop, *cpuid, *other;
	struct kvmi_error err;
	uint8_t *memory = world->sim.memory + CODE_GPA;

	cpuid = add(world, 1);
	nop = add(world, 0);
	g_assert_cmpint(kvmi_hooks_add(world->hooks, 1, CODE_GPA, NULL, &other,
				       &err), ==, KVMI_ERR_BUSY);
	g_assert_true(other == nop);
	/* vCPU 2 has not started: that is no failure */
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	g_assert_cmpint(kvmi_hooks_vcpus(world->hooks), ==, 2);
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 2);
	g_assert_cmpint(result.wanted, ==, 2);
	g_assert_true(result.held);
	g_assert_cmphex(memory[0], ==, 0xcc);
	g_assert_cmphex(memory[1], ==, 0xcc);
	g_assert_true(kvmi_hook_is_in(nop));
	g_assert_cmphex(kvmi_hook_original(cpuid), ==, 0x0f);

	/* got over by setting registers */
	atomic_store(&world->hits_wanted, 1);
	dispatch(world);
	g_assert_cmpint(world->hits, ==, 1);
	g_assert_cmphex(world->sim.regs[1].rip, ==, CODE_GVA + 1);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_RETRY);
	g_assert_cmpint(atomic_load(&world->steps), ==, 0);

	/* another one, while it is planted */
	other = add(world, 3);
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 1);
	g_assert_cmphex(memory[3], ==, 0xcc);
	ok(kvmi_hooks_remove(world->hooks, other, err));
	g_assert_cmphex(memory[3], ==, 0x55);

	/* out, all in one go; in again after the next connection */
	sim_unhook(&world->sim);
	dispatch(world);
	g_assert_true(kvmi_hooks_is_asked_to_leave(world->hooks));
	g_assert_true(kvmi_hooks_is_leaving(world->hooks));
	ok(kvmi_hooks_take_out(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 2);
	g_assert_cmpint(result.left, ==, 0);
	g_assert_true(result.held);
	g_assert_true(result.verified);
	g_assert_cmpmem(memory, sizeof(code), code, sizeof(code));
	g_assert_cmpint(kvmi_hooks_detach(world->hooks), ==, 0);
	disconnect(world);

	connect_world(world);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	g_assert_false(kvmi_hooks_is_leaving(world->hooks));
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 2);
	g_assert_cmphex(memory[1], ==, 0xcc);

	/* lost: found again, with what was there before */
	disconnect(world);
	g_assert_cmpint(kvmi_hooks_detach(world->hooks), ==, 2);
	connect_world(world);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 2);
	ok(kvmi_hooks_take_out(world->hooks, &result, err));
	g_assert_cmpmem(memory, sizeof(code), code, sizeof(code));

	/* the guest's own INT3 is left alone, and its hits are the guest's */
	memory[0] = 0xcc;
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 1);
	g_assert_cmpint(world->refused, ==, 1);
	atomic_store(&world->hits_wanted, 1);
	dispatch(world);
	g_assert_cmpint(world->hits, ==, 1);
	g_assert_cmpint(kvmi_hooks_foreign(world->hooks), ==, 1);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_CONTINUE);
	ok(kvmi_hooks_take_out(world->hooks, &result, err));
	g_assert_cmphex(memory[0], ==, 0xcc);
	g_assert_cmphex(memory[1], ==, 0x0f);
	kvmi_hooks_detach(world->hooks);
	disconnect(world);
	kvmi_hooks_free(world->hooks);
	kvmi_hooks_free(NULL);
	g_free(world);
}

/* HLT cannot be told where it goes to: a single step */
static void test_step(void)
{
	struct world *world = world_new();
	struct kvmi_hooks_result result;
	uint8_t *memory = world->sim.memory + CODE_GPA;

	add(world, 4);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 1);
	atomic_store(&world->hits_wanted, 5);
	dispatch(world);
	g_assert_cmpint(world->hits, ==, 1);
	g_assert_cmpint(atomic_load(&world->steps), ==, 1);
	g_assert_cmpint(world->retired, ==, 0);
	g_assert_false(world->sim.stepping[1]);
	g_assert_cmphex(memory[4], ==, 0xcc);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_CONTINUE);
	ok(kvmi_hooks_take_out(world->hooks, &result, err));
	g_assert_cmphex(memory[4], ==, 0xf4);
	kvmi_hooks_detach(world->hooks);
	disconnect(world);

	/* without single-step it is refused */
	world->sim.no_singlestep = true;
	connect_world(world);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.in, ==, 0);
	g_assert_cmpint(world->refused, ==, 1);
	kvmi_hooks_detach(world->hooks);
	disconnect(world);
	kvmi_hooks_free(world->hooks);
	g_free(world);
}

static void test_pages(void)
{
	struct world *world = world_new();
	struct kvmi_hooks_result result;

	ok(kvmi_hooks_restrict(world->hooks, 0x5123, KVMI_PAGE_R, err));
	ok(kvmi_hooks_restrict(world->hooks, 0x6123, 0, err));
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	g_assert_cmpint(world->sim.access[5], ==, 0);
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(world->sim.access[5], ==, 6);
	g_assert_cmpint(world->sim.access[6], ==, 7);
	/* at once */
	ok(kvmi_hooks_restrict(world->hooks, 0x6000, KVMI_PAGE_RWX, err));
	g_assert_cmpint(world->sim.access[6], ==, 0);

	/* KVM does it for the guest */
	atomic_store(&world->pf_wanted, 1);
	dispatch(world);
	g_assert_cmpint(world->pages, ==, 1);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_CONTINUE);
	g_assert_cmpint(atomic_load(&world->steps), ==, 0);
	/* or the tool has done something else */
	world->page_action = KVMI_ACTION_RETRY;
	atomic_store(&world->pf_wanted, 1);
	dispatch(world);
	g_assert_cmpint(world->pages, ==, 2);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_RETRY);

	/* KVM can't: one step, with the page free; then it is back */
	world->page_action = KVMI_ACTION_CONTINUE;
	world->int3s_while_stepping = 99;
	atomic_store(&world->pf_wanted, 1 + KVMI_PF_NOT_EMULATED);
	dispatch(world);
	g_assert_cmpint(world->pages, ==, 3);
	g_assert_cmpint(atomic_load(&world->steps), ==, 1);
	g_assert_cmpint(world->int3s_while_stepping, ==, 0);
	g_assert_cmpint(world->sim.access[5], ==, 6);
	g_assert_false(world->sim.stepping[1]);
	/* others' events are the tool's */
	g_assert_cmpint(world->others, ==, 0);
	ok(kvmi_vm_pause_vcpu(world->vm, 0, true, err));
	dispatch(world);
	g_assert_cmpint(world->others, ==, 1);

	ok(kvmi_hooks_take_out(world->hooks, &result, err));
	g_assert_cmpint(world->sim.access[5], ==, 0);
	kvmi_hooks_detach(world->hooks);
	disconnect(world);

	/* and back again */
	connect_world(world);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(world->sim.access[5], ==, 6);
	g_assert_cmpint(world->sim.access[6], ==, 0);
	kvmi_hooks_detach(world->hooks);
	disconnect(world);
	kvmi_hooks_free(world->hooks);
	g_free(world);
}

static void send_breakpoint(struct sim *sim, unsigned int offset)
{
	struct kvmi_vcpu_event_breakpoint data = {
		.gpa = CODE_GPA + offset, .insn_len = 1,
	};

	sim->regs[1].rip = CODE_GVA + offset;
	sim_event(sim, 1, KVMI_VCPU_EVENT_BREAKPOINT, &data, sizeof(data));
}

static void send_not_emulated(struct sim *sim)
{
	struct kvmi_vcpu_event_pf data = {
		.gpa = 0x5008, .access = 2, .flags = KVMI_PF_NOT_EMULATED,
	};

	sim_event(sim, 1, KVMI_VCPU_EVENT_PF, &data, sizeof(data));
}

/* A reply has come: is it this one, of vCPU 1? */
static bool is_reply(struct world *world, unsigned int event,
		     unsigned int action)
{
	struct sim *sim = &world->sim;
	struct kvmi_vcpu_event_reply reply;

	memcpy(&reply, sim->last_body + 8, sizeof(reply));

	return sim->last.id == KVMI_VCPU_EVENT && sim->last_body[0] == 1 &&
	       reply.event == event && reply.action == action;
}

/* The CPUID, with a vCPU that nobody has heard of before */
static bool meet_a_stranger(struct world *world)
{
	struct sim *sim = &world->sim;

	if (sim->last.id == KVMI_VCPU_EVENT && sim->last_body[0] == 40)
		return true;
	if (!is_reply(world, KVMI_VCPU_EVENT_BREAKPOINT, KVMI_ACTION_RETRY) ||
	    sim->regs[1].rip != CODE_GVA + 1)
		return false;
	sim_event(sim, 40, KVMI_VCPU_EVENT_PAUSE, NULL, 0);
	send_breakpoint(sim, 3);

	return true;
}

static void test_new_vcpu(void)
{
	struct world *world = world_new();

	add(world, 1);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	world->special = meet_a_stranger;
	atomic_store(&world->hits_wanted, 2);
	dispatch(world);
	g_assert_cmpint(world->hits, ==, 1);
	g_assert_cmpint(world->retired, ==, 0);
	g_assert_cmpint(world->others, ==, 1);
	g_assert_cmphex(world->sim.memory[CODE_GPA + 1], ==, 0xcc);
	g_assert_cmphex(world->sim.memory[CODE_GPA + 3], ==, 0x55);
	world_free(world);
}

/* The CPUID once more, as if it wrote to a page that is not to be written */
static bool touch_a_page(struct world *world)
{
	struct sim *sim = &world->sim;

	if (is_reply(world, KVMI_VCPU_EVENT_PF, KVMI_ACTION_CONTINUE)) {
		sim->access[5] = 0;
		send_breakpoint(sim, 3);
		return true;
	}
	if (!is_reply(world, KVMI_VCPU_EVENT_BREAKPOINT, KVMI_ACTION_RETRY) ||
	    sim->regs[1].rip != CODE_GVA + 1)
		return false;
	send_not_emulated(sim);

	return true;
}

static void test_page_in_step(void)
{
	struct world *world = world_new();

	add(world, 1);
	ok(kvmi_hooks_restrict(world->hooks, 0x5123, KVMI_PAGE_R, err));
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	g_assert_cmpint(world->sim.access[5], ==, 6);
	world->special = touch_a_page;
	atomic_store(&world->hits_wanted, 2);
	dispatch(world);
	g_assert_cmpint(world->hits, ==, 1);
	g_assert_cmpint(world->pages, ==, 1);
	g_assert_cmpint(world->retired, ==, 0);
	g_assert_cmpint(world->sim.access[5], ==, 6);
	world_free(world);
}

static bool refuse_to_step(struct world *world)
{
	struct sim *sim = &world->sim;

	if (sim->last.id != KVMI_VCPU_CONTROL_SINGLESTEP)
		return false;
	sim_answer(sim, sim->last.id, sim->last.seq, -KVM_EBUSY, NULL, 0);

	return true;
}

/* A debugger has the single-step, for example: on it goes without */
static void test_no_step(void)
{
	struct world *world = world_new();

	ok(kvmi_hooks_restrict(world->hooks, 0x5123, KVMI_PAGE_R, err));
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	world->special = refuse_to_step;
	atomic_store(&world->last_action, -1);
	atomic_store(&world->pf_wanted, 1 + KVMI_PF_NOT_EMULATED);
	dispatch(world);
	g_assert_cmpint(world->pages, ==, 1);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_CONTINUE);
	g_assert_cmpint(world->sim.access[5], ==, 6);
	world_free(world);
}

/* The event of a step that was given up, and a tool that knows of no steps */
static bool step_late(struct world *world)
{
	struct kvmi_vcpu_event_singlestep data = { 0 };

	if (world->sim.last.id == KVMI_VM_CHECK_EVENT)
		sim_event(&world->sim, 1, KVMI_VCPU_EVENT_SINGLESTEP, &data,
			  sizeof(data));

	return false;
}

static void test_late_step(void)
{
	struct world *world = world_new();

	kvmi_hooks_free(world->hooks);
	world->hooks = kvmi_hooks_new(NULL, NULL, NULL);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	world->special = step_late;
	atomic_store(&world->last_action, -1);
	dispatch(world);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_CONTINUE);
	world_free(world);
}

/* vCPU 1 is at the breakpoint when that is removed; and UNHOOK comes */
static bool hit_and_unhook(struct world *world)
{
	struct sim *sim = &world->sim;

	/* the PAUSE that was asked for comes after the answer to the hit */
	if (is_reply(world, KVMI_VCPU_EVENT_BREAKPOINT, KVMI_ACTION_RETRY)) {
		sim_event(sim, 1, KVMI_VCPU_EVENT_PAUSE, NULL, 0);
		return true;
	}
	if (sim->last.id != KVMI_VM_PAUSE_VCPU || sim->last_body[0] != 1)
		return false;
	sim_unhook(sim);
	send_breakpoint(sim, 3);
	sim_answer(sim, sim->last.id, sim->last.seq, 0, NULL, 0);

	return true;
}

static void test_remove_hit(void)
{
	struct world *world = world_new();
	struct kvmi_hook *hook = add(world, 3);

	add(world, 0);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	world->special = hit_and_unhook;
	ok(kvmi_hooks_remove(world->hooks, hook, err));
	world->special = NULL;
	g_assert_true(kvmi_hooks_is_leaving(world->hooks));
	ok(kvmi_hooks_take_out(world->hooks, NULL, err));
	g_assert_cmpint(atomic_load(&world->passed), ==, 0);
	world_free(world);
}

/* All commands are answered, but no vCPU stops */
static bool hang_on(struct world *world)
{
	struct sim *sim = &world->sim;

	if (sim->last.id != KVMI_VM_PAUSE_VCPU)
		return false;
	sim_answer(sim, sim->last.id, sim->last.seq, 0, NULL, 0);

	return true;
}

static void test_remove_busy(void)
{
	struct world *world = world_new();
	struct kvmi_hook *hook = add(world, 3);
	struct kvmi_hooks_result result;
	struct kvmi_error err;

	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	world->special = hang_on;
	g_assert_cmpint(kvmi_hooks_remove(world->hooks, hook, &err), ==,
			KVMI_ERR_BUSY);
	g_assert_cmphex(world->sim.memory[CODE_GPA + 3], ==, 0x55);
	/* it is not forgotten */
	world->special = NULL;
	atomic_store(&world->hits_wanted, 4);
	dispatch(world);
	g_assert_cmpint(atomic_load(&world->last_action), ==,
			KVMI_ACTION_RETRY);
	ok(kvmi_hooks_plant(world->hooks, &result, err));
	g_assert_cmpint(result.wanted, ==, 0);
	g_assert_cmphex(world->sim.memory[CODE_GPA + 3], ==, 0x55);
	world_free(world);
}

/* The tool has a function for UNHOOK, too: the hooks learn of it nevertheless */
static bool unhook_early(struct world *world)
{
	if (world->sim.last.id == KVMI_VM_PAUSE_VCPU)
		sim_unhook(&world->sim);

	return false;
}

static void on_unhook(struct kvmi_vm *vm, void *context)
{
	struct world *world = context;

	g_assert_true(vm == world->vm);
	world->unhooks++;
}

static void test_on_unhook(void)
{
	struct world *world = world_new();
	struct kvmi_hooks_result result;

	add(world, 3);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_vm_on_unhook(world->vm, on_unhook, world, err));
	world->special = unhook_early;
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	world->special = NULL;
	g_assert_true(kvmi_hooks_is_leaving(world->hooks));
	ok(kvmi_hooks_take_out(world->hooks, &result, err));
	g_assert_true(result.held);
	g_assert_cmphex(world->sim.memory[CODE_GPA + 3], ==, 0x55);
	/* not in the midst of this */
	g_assert_cmpint(world->unhooks, ==, 0);
	g_assert_cmpint(kvmi_vm_dispatch(world->vm), ==, 1);
	g_assert_cmpint(world->unhooks, ==, 1);
	world_free(world);
}

/* A hit when vCPUs are looked for the second time, and UNHOOK after it */
static bool live(struct world *world)
{
	struct sim *sim = &world->sim;

	if (sim->last.id == KVMI_VM_GET_INFO && ++world->looks == 2)
		send_breakpoint(sim, 3);
	if (is_reply(world, KVMI_VCPU_EVENT_BREAKPOINT, KVMI_ACTION_RETRY))
		sim_unhook(sim);

	return false;
}

/* It ends when vCPUs are looked for */
static bool die(struct world *world)
{
	if (world->sim.last.id == KVMI_VM_GET_INFO && ++world->looks == 2)
		shutdown(world->sim.fd, SHUT_RDWR);

	return false;
}

static void test_run(void)
{
	struct world *world = world_new();
	uint8_t *memory = world->sim.memory + CODE_GPA;
	struct kvmi_error err;
	int fds[2];

	g_assert_cmpint(pipe(fds), ==, 0);
	add(world, 3);
	world->special = live;
	ok(kvmi_hooks_run(world->hooks, world->vm, fds[0], err));
	g_assert_cmpint(world->hits, ==, 1);
	g_assert_true(kvmi_hooks_is_asked_to_leave(world->hooks));
	g_assert_cmphex(memory[3], ==, 0x55);
	disconnect(world);

	world->looks = 0;
	world->special = die;
	connect_world(world);
	g_assert_cmpint(kvmi_hooks_run(world->hooks, world->vm, fds[0], &err),
			==, KVMI_ERR_CLOSED);
	g_assert_true(kvmi_hooks_is_lost(world->hooks, &err));
	disconnect(world);

	world->special = NULL;
	connect_world(world);
	g_assert_cmpint(write(fds[1], "x", 1), ==, 1);
	ok(kvmi_hooks_run(world->hooks, world->vm, fds[0], err));
	g_assert_false(kvmi_hooks_is_asked_to_leave(world->hooks));
	g_assert_cmphex(memory[3], ==, 0x55);
	close(fds[0]);
	close(fds[1]);
	world_free(world);
}

/* The first page when breakpoints are there already */
static void test_restrict_later(void)
{
	struct world *world = world_new();

	add(world, 3);
	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	g_assert_cmpint(kvmi_hooks_vcpus(world->hooks), ==, 2);
	g_assert_cmphex(atomic_load(&world->enabled[1]), ==,
			1 << KVMI_VCPU_EVENT_BREAKPOINT);
	ok(kvmi_hooks_restrict(world->hooks, 0x5000, KVMI_PAGE_R, err));
	g_assert_cmpint(world->sim.access[5], ==, 6);
	g_assert_cmphex(atomic_load(&world->enabled[0]), ==,
			1 << KVMI_VCPU_EVENT_BREAKPOINT |
			1 << KVMI_VCPU_EVENT_PF);
	g_assert_cmphex(atomic_load(&world->enabled[1]), ==,
			1 << KVMI_VCPU_EVENT_BREAKPOINT |
			1 << KVMI_VCPU_EVENT_PF);
	world_free(world);
}

/* A VM that doesn't answer, and a tool with much patience */
static void test_slow(void)
{
	struct world *world = world_new();
	struct kvmi_hook *hook = add(world, 3);
	struct kvmi_error err;
	gint64 start;

	ok(kvmi_hooks_attach(world->hooks, world->vm, err));
	ok(kvmi_hooks_plant(world->hooks, NULL, err));
	ok(kvmi_vm_set_timeout(world->vm, 60000, err));
	world->sim.silent_id = KVMI_VM_PAUSE_VCPU;
	start = g_get_monotonic_time();
	g_assert_cmpint(kvmi_hooks_remove(world->hooks, hook, &err), ==,
			KVMI_ERR_BUSY);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 20000000);

	/* when it is to be paused, QEMU waits no longer than 5 s for us */
	sim_unhook(&world->sim);
	start = g_get_monotonic_time();
	dispatch(world);
	kvmi_hooks_take_out(world->hooks, NULL, NULL);
	g_assert_cmpint(g_get_monotonic_time() - start, <, 4900000);
	world_free(world);
}

int main(int argc, char **argv)
{
	g_test_init(&argc, &argv, NULL);
	g_test_add_func("/hooks/breakpoints", test_breakpoints);
	g_test_add_func("/hooks/step", test_step);
	g_test_add_func("/hooks/pages", test_pages);
	g_test_add_func("/hooks/new-vcpu", test_new_vcpu);
	g_test_add_func("/hooks/page-in-step", test_page_in_step);
	g_test_add_func("/hooks/no-step", test_no_step);
	g_test_add_func("/hooks/late-step", test_late_step);
	g_test_add_func("/hooks/remove/hit", test_remove_hit);
	g_test_add_func("/hooks/remove/busy", test_remove_busy);
	g_test_add_func("/hooks/restrict-later", test_restrict_later);
	g_test_add_func("/hooks/slow", test_slow);
	g_test_add_func("/hooks/on-unhook", test_on_unhook);
	g_test_add_func("/hooks/run", test_run);

	return g_test_run();
}
