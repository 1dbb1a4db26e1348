/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef CLIENT_SIM_H
#define CLIENT_SIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * sim.h for tests that include the older linux/kvmi.h, with which the kernel's
 * cannot be included.
 */

#define CLIENT_SIM_MEMORY 0x10000

struct client_sim;

/* Connects to a listener, as QEMU does, and serves commands */
struct client_sim *client_sim_new(const char *path);
/* The same, on a socket that is connected */
struct client_sim *client_sim_new_on(int fd);
/* The same, but says nothing; nothing after the handshake */
struct client_sim *client_sim_new_silent(const char *path);
struct client_sim *client_sim_new_mute(const char *path);
/* Waits for the client to close its end */
void client_sim_free(struct client_sim *sim);
void client_sim_wait_end(struct client_sim *sim);
void client_sim_hang_up(struct client_sim *sim);

/* Sends one of vCPU 1's events (by the protocol's number), or UNHOOK */
#define CLIENT_SIM_NOT_EMULATED 100	/* a PF at 0x7123 */
#define CLIENT_SIM_NOWHERE 101		/* a BREAKPOINT without its gpa */
void client_sim_event(struct client_sim *sim, unsigned int id);
void client_sim_unhook(struct client_sim *sim);

const uint8_t *client_sim_cookie(struct client_sim *sim);
bool client_sim_subscribed(struct client_sim *sim);
const uint8_t *client_sim_last(struct client_sim *sim);	/* body of a command */
uint8_t *client_sim_memory(struct client_sim *sim);
unsigned int client_sim_access(struct client_sim *sim, uint64_t gpa);
void client_sim_free_page(struct client_sim *sim, uint64_t gpa);
bool client_sim_stepping(struct client_sim *sim, unsigned int vcpu);
uint64_t client_sim_rip(struct client_sim *sim, unsigned int vcpu);
unsigned int client_sim_commands(struct client_sim *sim);
unsigned int client_sim_replies(struct client_sim *sim);
void client_sim_wait_replies(struct client_sim *sim, unsigned int count);
uint64_t client_sim_value(struct client_sim *sim);
int client_sim_action(struct client_sim *sim);
int client_sim_breakpoint_action(struct client_sim *sim);

#endif
