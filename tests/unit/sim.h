/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef SIM_H
#define SIM_H

#include <stdbool.h>
#include <stdint.h>

#include <glib.h>

#include <linux/kvmi.h>

/* The other side of the connection: what QEMU and KVM would say */

#ifndef SIM_MEMORY
#define SIM_MEMORY 0x10000
#endif
#define SIM_VCPUS 3

struct sim {
	int fd;			/* the simulator's end */
	int client_fd;		/* given to the library */
	GThread *thread;
	void (*script)(struct sim *sim);
	void *fake;		/* the script's */

	/* knobs for sim_serve() */
	unsigned int hello_size;	/* 0: 104 */
	uint32_t version, max_message;
	unsigned int deny;		/* so many CHECK_* get EPERM first */
	unsigned int piece;		/* send in pieces of so many bytes */
	int silent_id;			/* do not answer this command */
	int event_before;		/* an event before this answer */
	unsigned int answer_size;	/* cut (or stretch) answers to this */

	const char *secret;		/* auth=hmac */
	bool bad_proof;			/* of the simulator's */
	bool good_proof;		/* of the client's */
	uint8_t nonce[32];		/* the client's */
	bool no_singlestep;
	bool old;			/* a KVM without the later commands */
	uint16_t write_flags;		/* of the last write */
	unsigned int writes;
	uint8_t access[SIM_MEMORY / 4096];	/* what is taken off each page */
	unsigned int access_messages;
	bool stepping[SIM_VCPUS];
	uint8_t xsave[4096];
	uint64_t last_value;		/* of a reply to CR, MSR */

	uint8_t memory[SIM_MEMORY];
	struct kvm_regs regs[SIM_VCPUS];
	uint8_t cookie[20];
	uint32_t seq;			/* of events */
	int hang_up;		/* for scripts that wait to be told */
	unsigned int commands;
	unsigned int replies;
	struct kvmi_vcpu_event_reply last_reply;
	uint16_t last_vcpu;
	uint32_t last_seq;
	struct kvmi_msg_hdr last;	/* the last command */
	uint8_t last_body[8192];
};

/* script NULL: handshake, then sim_serve() until the client is gone */
void sim_start(struct sim *sim, void (*script)(struct sim *sim));
/* The same, connecting to a listener as QEMU does */
void sim_connect(struct sim *sim, const char *path);
/* The same, on a socket that is connected already */
void sim_run(struct sim *sim, int fd);
/* Waits for the script; the client must have closed its end */
void sim_stop(struct sim *sim);

void sim_send(struct sim *sim, const void *data, size_t size);
void sim_message(struct sim *sim, unsigned int id, uint32_t seq,
		 const void *data, size_t size);
void sim_answer(struct sim *sim, unsigned int id, uint32_t seq, int32_t error,
		const void *data, size_t size);
void sim_event(struct sim *sim, unsigned int vcpu, unsigned int id,
	       const void *data, size_t size);
void sim_unhook(struct sim *sim);
/* false: the client has closed its end */
bool sim_receive(struct sim *sim);
bool sim_handshake(struct sim *sim);
/* Answers the command in sim->last as KVM would */
void sim_serve_one(struct sim *sim);
void sim_serve(struct sim *sim);

#endif
