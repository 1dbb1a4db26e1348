/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A KVM that says what it likes, when it likes, against a set of hooks that is
 * planted, changed and taken out meanwhile.  Each round has a number, and is the
 * same each time but for the moments at which threads run:
 *
 *	test-fuzz-hooks [ROUNDS [FIRST]]
 */
#include <string.h>

#include <kvmi/hooks.h>

#include "chance.h"
#include "sim.h"

#define ROUNDS 300
#define CODE_GPA 0x3000
#define CODE_GVA 0xffffffff80002000
#define VCPUS 4		/* of which KVM has SIM_VCPUS */

static const uint8_t code[] = {
	0x90, 0x0f, 0xa2, 0x55, 0x48, 0x89, 0xe5, 0xf4, 0x74, 0x02, 0x31, 0xc0,
	0xe8, 0xf0, 0xff, 0xff, 0xff, 0x0f, 0x01, 0xf9, 0x5d, 0xc3, 0xeb, 0xe8,
};

struct peer {
	struct sim sim;		/* first */
	uint64_t state;		/* of chance */
	bool honest;		/* keeps to the protocol, and does as it is told */
	bool open[VCPUS];
	unsigned int due[VCPUS];	/* PAUSE events */
};

static void send_event(struct peer *peer, unsigned int vcpu, unsigned int id)
{
	uint8_t data[24] = { 0 };
	struct kvmi_vcpu_event_breakpoint hit = { .insn_len = 1 };
	struct kvmi_vcpu_event_pf pf = {
		.gpa = 0x1000 * chance(&peer->state, 12), .access = 2,
		.flags = chance(&peer->state, 2) ? KVMI_PF_NOT_EMULATED : 0,
	};
	unsigned int at = chance(&peer->state, sizeof(code)), i;
	size_t size = 0;

	/* where it can be, most of the time */
	for (i = 0; i < sizeof(code); i++)
		if (peer->sim.memory[CODE_GPA + at] != 0xcc)
			at = (at + 1) % sizeof(code);
	if (id == KVMI_VCPU_EVENT_BREAKPOINT) {
		hit.gpa = chance(&peer->state, 10) ? CODE_GPA + at : UINT64_MAX;
		if (vcpu < SIM_VCPUS)
			peer->sim.regs[vcpu].rip = CODE_GVA + at;
		size = sizeof(hit);
		memcpy(data, &hit, size);
	} else if (id == KVMI_VCPU_EVENT_PF) {
		size = sizeof(pf);
		memcpy(data, &pf, size);
	} else if (id == KVMI_VCPU_EVENT_SINGLESTEP) {
		size = sizeof(struct kvmi_vcpu_event_singlestep);
	}
	sim_event(&peer->sim, vcpu, id, data, size);
	if (vcpu < VCPUS)
		peer->open[vcpu] = true;
}

static void some_event(struct peer *peer)
{
	static const unsigned int ids[] = {
		KVMI_VCPU_EVENT_BREAKPOINT, KVMI_VCPU_EVENT_BREAKPOINT,
		KVMI_VCPU_EVENT_PF, KVMI_VCPU_EVENT_PF,
		KVMI_VCPU_EVENT_SINGLESTEP, KVMI_VCPU_EVENT_PAUSE,
		KVMI_VCPU_EVENT_HYPERCALL,
	};
	unsigned int vcpu = chance(&peer->state, VCPUS);

	if (!peer->honest && !chance(&peer->state, 20))
		vcpu = 100 + chance(&peer->state, 200);
	if (vcpu >= VCPUS || !peer->open[vcpu] ||
	    (!peer->honest && !chance(&peer->state, 50)))
		send_event(peer, vcpu, ids[chance(&peer->state,
					       G_N_ELEMENTS(ids))]);
}

static void pause_vcpu(struct peer *peer)
{
	struct sim *sim = &peer->sim;
	unsigned int vcpu = sim->last_body[0];

	if (vcpu >= VCPUS || peer->open[vcpu])
		peer->due[vcpu % VCPUS]++;
	else if (peer->honest || chance(&peer->state, 10))
		send_event(peer, vcpu, KVMI_VCPU_EVENT_PAUSE);
	sim_answer(sim, sim->last.id, sim->last.seq, 0, NULL, 0);
}

/* A vCPU goes on: to what was asked for, or to an INT3, if it is made a step */
static void answered(struct peer *peer)
{
	struct sim *sim = &peer->sim;
	unsigned int vcpu = sim->last_body[0];
	struct kvmi_vcpu_event_reply reply;

	memcpy(&reply, sim->last_body + 8, sizeof(reply));
	if (vcpu >= VCPUS)
		return;
	peer->open[vcpu] = false;
	if (peer->due[vcpu]) {
		peer->due[vcpu]--;
		send_event(peer, vcpu, KVMI_VCPU_EVENT_PAUSE);
	} else if (vcpu < SIM_VCPUS && sim->stepping[vcpu]) {
		send_event(peer, vcpu, chance(&peer->state, 4) ?
				       KVMI_VCPU_EVENT_SINGLESTEP :
				       KVMI_VCPU_EVENT_PF);
	} else if (reply.event == KVMI_VCPU_EVENT_BREAKPOINT &&
		   chance(&peer->state, 3)) {
		send_event(peer, vcpu, chance(&peer->state, 4) ?
				       KVMI_VCPU_EVENT_BREAKPOINT :
				       KVMI_VCPU_EVENT_PF);
	}
}

static void serve(struct sim *sim)
{
	static const int errors[] = { KVM_EPERM, KVM_ENOENT, KVM_EAGAIN,
				      KVM_EBUSY, KVM_EINVAL, KVM_EOPNOTSUPP };
	struct peer *peer = (struct peer *)sim;

	if (!sim_handshake(sim))
		return;
	while (sim_receive(sim)) {
		if (!chance(&peer->state, 3))
			some_event(peer);
		if (!chance(&peer->state, 200))
			sim_unhook(sim);
		if (!peer->honest && !chance(&peer->state, 500))
			return;
		if (sim->last.id == KVMI_VCPU_EVENT)
			answered(peer);
		else if (!peer->honest && !chance(&peer->state, 100))
			;	/* no answer */
		else if (!peer->honest && !chance(&peer->state, 15))
			sim_answer(sim, sim->last.id, sim->last.seq,
				   -errors[chance(&peer->state,
					       G_N_ELEMENTS(errors))], NULL, 0);
		else if (sim->last.id == KVMI_VM_PAUSE_VCPU)
			pause_vcpu(peer);
		else
			sim_serve_one(sim);
	}
}

/* ------------------------------------------------------------------------ */

struct tool {
	struct kvmi_vm *vm;
	uint64_t state;
	unsigned int hits, pages;
};

static void on_hit(struct kvmi_hook *hook, const struct kvmi_vm_event *event,
		   void *context)
{
	struct tool *tool = context;

	check(kvmi_hook_cookie(hook) == tool);
	check(event->id == KVMI_EV_BREAKPOINT);
	tool->hits++;
}

static enum kvmi_action on_page(const struct kvmi_vm_event *event,
				void *context)
{
	struct tool *tool = context;

	check(event->id == KVMI_EV_PF);
	tool->pages++;

	return chance(&tool->state, 4) ? KVMI_ACTION_CONTINUE : KVMI_ACTION_RETRY;
}

static void on_event(struct kvmi_vm_event *event, void *context)
{
	struct tool *tool = context;

	kvmi_vm_reply(tool->vm, event, KVMI_ACTION_CONTINUE, NULL);
	kvmi_vm_event_free(event);
}

static void one_thing(struct tool *tool, struct kvmi_hooks *hooks,
		      struct kvmi_hook **list, unsigned int *count)
{
	unsigned int at = chance(&tool->state, sizeof(code)), i;
	struct kvmi_hook *hook;

	switch (chance(&tool->state, 8)) {
	case 0:
		if (kvmi_hooks_add(hooks, CODE_GVA + at, CODE_GPA + at, tool,
				   &hook, NULL) == KVMI_OK)
			list[(*count)++] = hook;
		break;
	case 1:
		i = chance(&tool->state, *count + 1);
		if (i < *count && kvmi_hooks_remove(hooks, list[i], NULL) ==
				  KVMI_OK)
			list[i] = list[--*count];
		break;
	case 2:
		kvmi_hooks_plant(hooks, NULL, NULL);
		break;
	case 3:
		kvmi_hooks_restrict(hooks, 0x1000 * chance(&tool->state, 12),
				    chance(&tool->state, 8), NULL);
		break;
	case 4:
		kvmi_hooks_look_for_vcpus(hooks, NULL);
		break;
	default:
		kvmi_vm_check_event(tool->vm, 1, NULL);
		kvmi_vm_process(tool->vm, NULL);
		for (i = 0; i < 20 && kvmi_hooks_dispatch(hooks); i++)
			;
	}
}

static unsigned long hits, pages, clean;

static void play(void)
{
	static const struct {
		uint32_t at, entry;
	} tables[] = {
		{ 0x1000 + 8 * 511, 0x8003 }, { 0x8000 + 8 * 510, 0x9003 },
		{ 0x9000, 0xa003 }, { 0xa000 + 8 * 2, CODE_GPA | 3 },
	};
	struct kvmi_hooks_callbacks callbacks = {
		.hit = on_hit, .page = on_page, .event = on_event,
	};
	struct peer *peer = g_new0(struct peer, 1);
	struct tool tool = {
		.state = chance_of_round(),
	};
	struct kvmi_hook *list[sizeof(code)];
	struct kvmi_hooks_result result;
	unsigned int count = 0, i;
	struct kvmi_hooks *hooks;
	enum kvmi_status status;

	chance(&tool.state, 2);
	peer->state = tool.state ^ 0x5555;
	peer->honest = round_number % 2;
	for (i = 0; i < G_N_ELEMENTS(tables); i++)
		memcpy(peer->sim.memory + tables[i].at, &tables[i].entry, 4);
	memcpy(peer->sim.memory + CODE_GPA, code, sizeof(code));
	if (!chance(&tool.state, 3))
		callbacks.event = NULL;
	hooks = kvmi_hooks_new(&callbacks, &tool, NULL);
	sim_start(&peer->sim, serve);
	tool.vm = kvmi_vm_new(peer->sim.client_fd, NULL, 0, NULL);
	kvmi_vm_set_timeout(tool.vm, peer->honest ? 20000 : 20, NULL);
	if (kvmi_vm_connect(tool.vm, 0, 0, NULL) == KVMI_OK) {
		for (i = 0; i < 8; i++)
			one_thing(&tool, hooks, list, &count);
		kvmi_hooks_attach(hooks, tool.vm, NULL);
		for (i = 0; i < 40; i++)
			one_thing(&tool, hooks, list, &count);
		status = kvmi_hooks_take_out(hooks, &result, NULL);
		if (status == KVMI_OK && peer->honest) {
			check(!result.left);
			check(!memcmp(peer->sim.memory + CODE_GPA, code,
				      sizeof(code)));
			clean++;
		}
		kvmi_hooks_detach(hooks);
	}
	hits += tool.hits;
	pages += tool.pages;
	kvmi_vm_close(tool.vm);
	sim_stop(&peer->sim);
	kvmi_hooks_free(hooks);
	g_free(peer);
}

int main(int argc, char **argv)
{
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : ROUNDS;
	unsigned long first = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;

	for (round_number = first; round_number < first + rounds;
	     round_number++)
		play();
	printf("%lu rounds: %lu hits, %lu pages, all taken out in %lu\n",
	       rounds, hits, pages, clean);
	/* a run in which nothing happens finds nothing */
	if (argc == 1)
		check(hits > rounds && pages > rounds / 4 && clean > rounds / 4);

	return 0;
}
