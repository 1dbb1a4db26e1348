/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>

#include "client-sim.h"
#include "sim.h"

G_STATIC_ASSERT(CLIENT_SIM_MEMORY == SIM_MEMORY);

struct client_sim {
	struct sim sim;		/* first */
	pthread_mutex_t lock;	/* what is sent is sent in one piece */
	bool subscribed;
	atomic_bool ended;
	atomic_uint replies, commands;
	atomic_int breakpoint_action;
};

static void serve(struct sim *sim)
{
	struct client_sim *client = (struct client_sim *)sim;

	if (!sim_handshake(sim))
		goto end;
	while (sim_receive(sim)) {
		unsigned int replies = sim->replies;

		if (sim->last.id == KVMI_VM_CONTROL_EVENTS)
			client->subscribed = sim->last_body[2];
		pthread_mutex_lock(&client->lock);
		sim_serve_one(sim);
		pthread_mutex_unlock(&client->lock);
		atomic_fetch_add(&client->commands, 1);
		if (sim->replies != replies) {
			if (sim->last_reply.event == KVMI_VCPU_EVENT_BREAKPOINT)
				atomic_store(&client->breakpoint_action,
					     sim->last_reply.action);
			atomic_store(&client->replies, sim->replies);
		}
	}
end:
	atomic_store(&client->ended, true);
}

static void serve_nothing(struct sim *sim)
{
	struct client_sim *client = (struct client_sim *)sim;
	char byte;

	/* the beginning of a handshake */
	sim_send(sim, "\x68\0\0\0abcd", 8);
	while (recv(sim->fd, &byte, 1, 0) > 0)
		;
	atomic_store(&client->ended, true);
}

static void serve_hello(struct sim *sim)
{
	struct client_sim *client = (struct client_sim *)sim;

	if (sim_handshake(sim))
		while (sim_receive(sim))
			;
	atomic_store(&client->ended, true);
}

/* path NULL: it is connected already */
static struct client_sim *start(const char *path, int fd,
				void (*script)(struct sim *))
{
	struct client_sim *client = g_new0(struct client_sim, 1);

	pthread_mutex_init(&client->lock, NULL);
	client->breakpoint_action = -1;
	client->sim.script = script;
	if (path)
		sim_connect(&client->sim, path);
	else
		sim_run(&client->sim, fd);

	return client;
}

struct client_sim *client_sim_new(const char *path)
{
	return start(path, -1, serve);
}

struct client_sim *client_sim_new_on(int fd)
{
	return start(NULL, fd, serve);
}

struct client_sim *client_sim_new_silent(const char *path)
{
	return start(path, -1, serve_nothing);
}

struct client_sim *client_sim_new_mute(const char *path)
{
	return start(path, -1, serve_hello);
}

void client_sim_free(struct client_sim *client)
{
	sim_stop(&client->sim);
	g_free(client);
}

void client_sim_wait_end(struct client_sim *client)
{
	while (!atomic_load(&client->ended))
		g_usleep(1000);
}

void client_sim_hang_up(struct client_sim *client)
{
	shutdown(client->sim.fd, SHUT_RDWR);
}

void client_sim_event(struct client_sim *client, unsigned int id)
{
	struct kvmi_vcpu_event_breakpoint breakpoint = { 0x5001, 1, { 0xaa } };
	struct kvmi_vcpu_event_cr cr = { 4, { 0xaa, 0xaa }, 5, 6 };
	struct kvmi_vcpu_event_msr msr = { 0xc0000080, 0xaaaa, 7, 8 };
	struct kvmi_vcpu_event_trap trap = { 14, 0xaa, 0xaaaa, 9, 10 };
	struct kvmi_vcpu_event_xsetbv xsetbv = { 0, { 0xaa }, 11, 12 };
	struct kvmi_vcpu_event_descriptor descriptor = { 2, 1, { 0xaa } };
	struct kvmi_vcpu_event_pf pf = { 13, 14, 2, 0, 0xaaaa, 0xaaaa };
	struct kvmi_vcpu_event_singlestep step = { 1, { 0xaa } };
	struct sim *sim = &client->sim;

	pthread_mutex_lock(&client->lock);
	if (id == CLIENT_SIM_NOT_EMULATED) {
		id = KVMI_VCPU_EVENT_PF;
		pf.gpa = 0x7123;
		pf.flags = KVMI_PF_NOT_EMULATED;
	}
	if (id == CLIENT_SIM_NOWHERE) {
		id = KVMI_VCPU_EVENT_BREAKPOINT;
		breakpoint.gpa = UINT64_MAX;
	}
	switch (id) {
#define ONE(number, data) \
	case number: \
		sim_event(sim, 1, id, &(data), sizeof(data)); \
		break
	ONE(KVMI_VCPU_EVENT_BREAKPOINT, breakpoint);
	ONE(KVMI_VCPU_EVENT_CR, cr);
	ONE(KVMI_VCPU_EVENT_MSR, msr);
	ONE(KVMI_VCPU_EVENT_TRAP, trap);
	ONE(KVMI_VCPU_EVENT_XSETBV, xsetbv);
	ONE(KVMI_VCPU_EVENT_DESCRIPTOR, descriptor);
	ONE(KVMI_VCPU_EVENT_PF, pf);
	ONE(KVMI_VCPU_EVENT_SINGLESTEP, step);
	default:
		sim_event(sim, 1, id, NULL, 0);
	}
	pthread_mutex_unlock(&client->lock);
}

void client_sim_unhook(struct client_sim *client)
{
	pthread_mutex_lock(&client->lock);
	sim_unhook(&client->sim);
	pthread_mutex_unlock(&client->lock);
}

const uint8_t *client_sim_cookie(struct client_sim *client)
{
	return client->sim.cookie;
}

bool client_sim_subscribed(struct client_sim *client)
{
	return client->subscribed;
}

const uint8_t *client_sim_last(struct client_sim *client)
{
	return client->sim.last_body;
}

uint8_t *client_sim_memory(struct client_sim *client)
{
	return client->sim.memory;
}

unsigned int client_sim_access(struct client_sim *client, uint64_t gpa)
{
	return 7 & ~client->sim.access[gpa / 4096];
}

void client_sim_free_page(struct client_sim *client, uint64_t gpa)
{
	client->sim.access[gpa / 4096] = 0;
}

bool client_sim_stepping(struct client_sim *client, unsigned int vcpu)
{
	return client->sim.stepping[vcpu];
}

uint64_t client_sim_rip(struct client_sim *client, unsigned int vcpu)
{
	return client->sim.regs[vcpu].rip;
}

unsigned int client_sim_commands(struct client_sim *client)
{
	return atomic_load(&client->commands);
}

unsigned int client_sim_replies(struct client_sim *client)
{
	return atomic_load(&client->replies);
}

void client_sim_wait_replies(struct client_sim *client, unsigned int count)
{
	while (atomic_load(&client->replies) < count)
		g_usleep(100);
}

uint64_t client_sim_value(struct client_sim *client)
{
	return client->sim.last_value;
}

int client_sim_action(struct client_sim *client)
{
	return client->sim.last_reply.action;
}

int client_sim_breakpoint_action(struct client_sim *client)
{
	return atomic_load(&client->breakpoint_action);
}
