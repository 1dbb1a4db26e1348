/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "sim.h"

void sim_send(struct sim *sim, const void *data, size_t size)
{
	const uint8_t *bytes = data;

	while (size) {
		size_t part = sim->piece && sim->piece < size ? sim->piece : size;
		ssize_t sent = send(sim->fd, bytes, part, MSG_NOSIGNAL);

		if (sent < 0)
			return;		/* the client has had enough */
		bytes += sent;
		size -= sent;
		if (sim->piece)
			g_usleep(50);
	}
}

void sim_message(struct sim *sim, unsigned int id, uint32_t seq,
		 const void *data, size_t size)
{
	struct kvmi_msg_hdr header = { .id = id, .size = size, .seq = seq };
	uint8_t message[sizeof(header) + 65536];

	memcpy(message, &header, sizeof(header));
	if (size)
		memcpy(message + sizeof(header), data, size);
	sim_send(sim, message, sizeof(header) + size);
}

void sim_answer(struct sim *sim, unsigned int id, uint32_t seq, int32_t error,
		const void *data, size_t size)
{
	struct kvmi_error_code code = { .err = error };
	uint8_t body[8192] = { 0 };

	memcpy(body, &code, sizeof(code));
	if (size)
		memcpy(body + sizeof(code), data, size);
	size += sizeof(code);
	sim_message(sim, id, seq, body,
		    sim->answer_size ? sim->answer_size : size);
}

void sim_event(struct sim *sim, unsigned int vcpu, unsigned int id,
	       const void *data, size_t size)
{
	struct kvmi_event_hdr header = { .event = id };
	struct kvmi_vcpu_event event = {
		.size = sizeof(event), .vcpu = vcpu, .padding = 0xdeadbeef,
	};
	uint8_t body[8192];

	event.arch.mode = 8;
	memset(event.arch.padding, 0xaa, sizeof(event.arch.padding));
	if (vcpu < SIM_VCPUS)
		event.arch.regs = sim->regs[vcpu];
	event.arch.sregs.cr0 = 0x80000001;	/* long mode */
	event.arch.sregs.efer = 0xd01;
	event.arch.sregs.cr3 = 0x1000 + vcpu;
	event.arch.msrs.lstar = 0xffffffff81e00080;
	memcpy(body, &header, sizeof(header));
	memcpy(body + sizeof(header), &event, sizeof(event));
	if (size)
		memcpy(body + sizeof(header) + sizeof(event), data, size);
	sim_message(sim, KVMI_VCPU_EVENT, ++sim->seq, body,
		    sizeof(header) + sizeof(event) + size);
}

void sim_unhook(struct sim *sim)
{
	struct kvmi_event_hdr header = { .event = KVMI_VM_EVENT_UNHOOK };

	sim_message(sim, KVMI_VM_EVENT, ++sim->seq, &header, sizeof(header));
}

static bool receive_all(int fd, void *data, size_t size)
{
	uint8_t *bytes = data;

	while (size) {
		ssize_t got = recv(fd, bytes, size, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		bytes += got;
		size -= got;
	}

	return true;
}

bool sim_receive(struct sim *sim)
{
	struct kvmi_msg_hdr header;

	/* until the next comes, tests look at the last */
	if (!receive_all(sim->fd, &header, sizeof(header)))
		return false;
	sim->last = header;
	memset(sim->last_body, 0, sizeof(sim->last_body));
	g_assert_cmpuint(sim->last.size, <=, KVMI_MAX_MSG_SIZE);

	return receive_all(sim->fd, sim->last_body, sim->last.size);
}

static void sim_mac(struct sim *sim, const char *label, const uint8_t *hello,
		    const uint8_t *answer, size_t size, uint8_t mac[32])
{
	g_autoptr(GHmac) hmac = g_hmac_new(G_CHECKSUM_SHA256,
					   (const guchar *)sim->secret,
					   strlen(sim->secret));
	char padded[16] = { 0 };
	gsize length = 32;

	memcpy(padded, label, strlen(label));
	g_hmac_update(hmac, (const guchar *)padded, sizeof(padded));
	g_hmac_update(hmac, hello, 144);
	g_hmac_update(hmac, answer, size);
	g_hmac_get_digest(hmac, mac, &length);
}

/* The rest of the handshake with auth=hmac, as docs/interop/kvmi.rst has it */
static bool prove(struct sim *sim, const uint8_t *hello)
{
	uint8_t answer[96], mac[32], proof[40] = { 40 };
	uint32_t number;

	if (!receive_all(sim->fd, answer, sizeof(answer)))
		return false;
	memcpy(&number, answer, 4);
	g_assert_cmpuint(number, ==, 96);
	memcpy(&number, answer + 24, 4);
	g_assert_cmpuint(number, ==, 1);
	memcpy(sim->cookie, answer + 4, sizeof(sim->cookie));
	memcpy(sim->nonce, answer + 32, sizeof(sim->nonce));
	sim_mac(sim, "kvmi-hmac-tool", hello, answer, 64, mac);
	sim->good_proof = !memcmp(mac, answer + 64, 32);
	if (!sim->good_proof)
		return false;
	sim_mac(sim, "kvmi-hmac-qemu", hello, answer, 96, proof + 8);
	if (sim->bad_proof)
		proof[39] ^= 1;
	sim_send(sim, proof, sizeof(proof));

	return true;
}

bool sim_handshake(struct sim *sim)
{
	struct {
		uint32_t struct_size;
		uint8_t uuid[16];
		uint32_t padding;
		int64_t start_time;
		char name[64];
		uint64_t max_gpa;
	} hello = {
		.struct_size = 104,
		.uuid = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 },
		.start_time = 1234567890,
		.name = "a guest",
		.max_gpa = SIM_MEMORY,
	};
	struct {
		uint32_t struct_size;
		uint8_t cookie[20];
	} answer;
	uint8_t bytes[70000] = { 0 };

	G_STATIC_ASSERT(sizeof(hello) == 104);
	if (sim->hello_size)
		hello.struct_size = sim->hello_size;
	if (sim->secret)
		hello.struct_size = 144;
	memcpy(bytes, &hello, sizeof(hello));
	if (sim->secret) {
		bytes[104] = 1;
		memset(bytes + 112, 0x77, 32);
	}
	sim_send(sim, bytes, hello.struct_size);
	if (sim->secret)
		return prove(sim, bytes);
	if (!receive_all(sim->fd, &answer, sizeof(answer)))
		return false;
	g_assert_cmpuint(answer.struct_size, ==, sizeof(answer));
	memcpy(sim->cookie, answer.cookie, sizeof(sim->cookie));

	return true;
}

static void read_write(struct sim *sim)
{
	struct kvmi_vm_write_physical request;
	bool write = sim->last.id == KVMI_VM_WRITE_PHYSICAL;
	int32_t error = 0;

	memcpy(&request, sim->last_body, sizeof(request));
	g_assert_cmpuint(sim->last.size, ==, sizeof(request) +
			 (write ? request.size : 0));
	if (write) {
		sim->write_flags = request.flags;
		sim->writes++;
	}
	if (request.flags > (write && !sim->old ? 2 : 0) ||
	    request.padding2 || !request.size ||
	    request.gpa / 4096 != (request.gpa + request.size - 1) / 4096)
		error = -KVM_EINVAL;
	else if (request.gpa + request.size > SIM_MEMORY)
		error = -KVM_ENOENT;
	else if (write)
		memcpy(sim->memory + request.gpa,
		       sim->last_body + sizeof(request), request.size);
	sim_answer(sim, sim->last.id, sim->last.seq, error,
		   sim->memory + request.gpa,
		   error || write ? 0 : request.size);
}

static void get_registers(struct sim *sim, unsigned int vcpu)
{
	struct kvmi_vcpu_get_registers request;
	uint8_t buffer[8176] = { 0 };
	struct kvmi_vcpu_get_registers_reply *reply = (void *)buffer;
	unsigned int i;

	memcpy(&request, sim->last_body + 8, sizeof(request));
	g_assert_cmpuint(sim->last.size, ==, 16 + 4 * request.nmsrs);
	reply->mode = 8;
	reply->regs = sim->regs[vcpu];
	reply->sregs.cr0 = 0x80000001;
	reply->sregs.efer = 0xd01;
	reply->sregs.cr3 = 0x1000 + vcpu;
	reply->msrs.nmsrs = request.nmsrs;
	for (i = 0; i < request.nmsrs; i++) {
		uint32_t index;

		memcpy(&index, sim->last_body + 16 + 4 * i, sizeof(index));
		reply->msrs.entries[i].index = index;
		reply->msrs.entries[i].data = 0x100000000ULL + index;
	}
	sim_answer(sim, sim->last.id, sim->last.seq, 0, reply,
		   sizeof(*reply) + 16 * request.nmsrs);
}

static int32_t set_page_access(struct sim *sim)
{
	struct kvmi_vm_set_page_access request;
	int32_t error = 0;
	unsigned int i;

	memcpy(&request, sim->last_body, sizeof(request));
	g_assert_cmpuint(request.padding1, ==, 0);
	g_assert_cmpuint(request.padding2, ==, 0);
	g_assert_cmpuint(sim->last.size, ==,
			 sizeof(request) + 16 * request.count);
	sim->access_messages++;
	for (i = 0; i < request.count; i++) {
		struct kvmi_page_access_entry entry;

		memcpy(&entry, sim->last_body + sizeof(request) + 16 * i,
		       sizeof(entry));
		g_assert_cmpuint(entry.padding[0] | entry.padding[6], ==, 0);
		if (entry.gpa >= SIM_MEMORY)
			error = -KVM_EINVAL;
		else
			sim->access[entry.gpa / 4096] = 7 & ~entry.access;
	}

	return error;
}

void sim_serve_one(struct sim *sim)
{
	uint8_t *body = sim->last_body;
	struct kvmi_vcpu_hdr vcpu;
	int32_t error = 0;

	sim->commands++;
	if (sim->last.id == sim->event_before) {
		struct kvmi_vcpu_event_breakpoint data = { .gpa = 0x42,
							   .insn_len = 1 };

		sim->event_before = 0;
		sim_event(sim, 1, KVMI_VCPU_EVENT_BREAKPOINT, &data,
			  sizeof(data));
	}
	if (sim->last.id == sim->silent_id)
		return;

	memcpy(&vcpu, body, sizeof(vcpu));
	if (sim->last.id & 1) {
		g_assert_cmpuint(sim->last.size, >=, sizeof(vcpu));
		g_assert_cmpuint(vcpu.padding1, ==, 0);
		g_assert_cmpuint(vcpu.padding2, ==, 0);
		if (vcpu.vcpu >= SIM_VCPUS) {
			sim_answer(sim, sim->last.id, sim->last.seq,
				   -KVM_EINVAL, NULL, 0);
			return;
		}
		sim->last_vcpu = vcpu.vcpu;
	}

	switch (sim->last.id) {
	case KVMI_VCPU_EVENT:
		memcpy(&sim->last_reply, body + sizeof(vcpu),
		       sizeof(sim->last_reply));
		if (sim->last_reply.event == KVMI_VCPU_EVENT_CR ||
		    sim->last_reply.event == KVMI_VCPU_EVENT_MSR) {
			g_assert_cmpuint(sim->last.size, ==, 24);
			memcpy(&sim->last_value, body + 16, 8);
		} else {
			g_assert_cmpuint(sim->last.size, ==, 16);
		}
		g_assert_cmpuint(sim->last_reply.padding1, ==, 0);
		g_assert_cmpuint(sim->last_reply.padding2, ==, 0);
		sim->last_seq = sim->last.seq;
		sim->replies++;
		sim->commands--;
		return;
	case KVMI_GET_VERSION: {
		struct kvmi_get_version_reply reply = {
			.version = sim->version ? sim->version : 1,
			.max_msg_size = sim->max_message == UINT32_MAX ? 0 :
				KVMI_MAX_MSG_SIZE,
			.features.singlestep = !sim->no_singlestep,
			.features.get_page_access = !sim->old,
			.features.get_max_gfn = !sim->old,
			.features.journal = !sim->old,
			.features.set_sregs = !sim->old,
			.features.set_msrs = !sim->old,
		};

		g_assert_cmpuint(sim->last.size, ==, 0);
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VM_CHECK_COMMAND:
	case KVMI_VM_CHECK_EVENT: {
		uint16_t id;

		memcpy(&id, body, sizeof(id));
		g_assert_cmpuint(sim->last.size, ==, 8);
		if (sim->deny) {
			sim->deny--;
			error = -KVM_EPERM;
		} else if (id >= 30) {
			error = -KVM_ENOENT;
		}
		break;
	}
	case KVMI_VM_GET_INFO: {
		struct kvmi_vm_get_info_reply reply = { SIM_VCPUS, { 0 } };

		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VM_READ_PHYSICAL:
	case KVMI_VM_WRITE_PHYSICAL:
		read_write(sim);
		return;
	case KVMI_VM_PAUSE_VCPU: {
		struct kvmi_vm_pause_vcpu request;

		memcpy(&request, body, sizeof(request));
		g_assert_cmpuint(sim->last.size, ==, sizeof(request));
		if (request.vcpu >= SIM_VCPUS)
			error = -KVM_EINVAL;
		else if (request.wait)	/* the event may come first */
			sim_event(sim, request.vcpu, KVMI_VCPU_EVENT_PAUSE,
				  NULL, 0);
		break;
	}
	case KVMI_VCPU_GET_INFO: {
		struct kvmi_vcpu_get_info_reply reply = { 2500000000ULL };

		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VCPU_GET_REGISTERS:
		get_registers(sim, vcpu.vcpu);
		return;
	case KVMI_VCPU_SET_REGISTERS:
		g_assert_cmpuint(sim->last.size, ==, 8 + 144);
		memcpy(&sim->regs[vcpu.vcpu], body + 8, 144);
		break;
	case KVMI_VCPU_TRANSLATE_GVA: {
		struct kvmi_vcpu_translate_gva_reply reply;
		uint64_t gva;

		/* pages are swapped in pairs */
		memcpy(&gva, body + 8, sizeof(gva));
		reply.gpa = gva >> 32 ? ~0ULL : gva ^ 0x1000;
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VM_CONTROL_EVENTS:
		g_assert_cmpuint(sim->last.size, ==, 8);
		if (body[0] != KVMI_VM_EVENT_UNHOOK)
			error = -KVM_EINVAL;
		break;
	case KVMI_VCPU_CONTROL_EVENTS:
		g_assert_cmpuint(sim->last.size, ==, 16);
		if (vcpu.vcpu == 2)
			error = -KVM_EAGAIN;
		break;
	case KVMI_VM_SET_PAGE_ACCESS:
		error = set_page_access(sim);
		break;
	case KVMI_VM_GET_PAGE_ACCESS: {
		struct kvmi_vm_get_page_access_reply reply = { 0 };
		uint64_t gpa;

		memcpy(&gpa, body, sizeof(gpa));
		if (sim->old || gpa >= SIM_MEMORY) {
			error = sim->old ? -KVM_ENOSYS : -KVM_ENOENT;
			break;
		}
		reply.access = 7 & ~sim->access[gpa / 4096];
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VM_GET_MAX_GFN: {
		struct kvmi_vm_get_max_gfn_reply reply = {
			SIM_MEMORY / 4096 - 1
		};

		if (sim->old) {
			error = -KVM_ENOSYS;
			break;
		}
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VCPU_GET_CPUID: {
		struct kvmi_vcpu_get_cpuid request;
		struct kvmi_vcpu_get_cpuid_reply reply;

		g_assert_cmpuint(sim->last.size, ==, 16);
		memcpy(&request, body + 8, sizeof(request));
		if (request.function == 99) {
			error = -KVM_ENOENT;
			break;
		}
		reply = (struct kvmi_vcpu_get_cpuid_reply){
			request.function, request.index, 3, 4
		};
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VCPU_GET_XCR:
	case KVMI_VCPU_GET_MTRR_TYPE: {
		uint64_t reply = sim->last.id == KVMI_VCPU_GET_XCR ? 7 : 6;

		g_assert_cmpuint(sim->last.size, ==, 16);
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VCPU_GET_XSAVE:
		g_assert_cmpuint(sim->last.size, ==, 8);
		sim_answer(sim, sim->last.id, sim->last.seq, 0, sim->xsave,
			   sizeof(sim->xsave));
		return;
	case KVMI_VCPU_SET_XSAVE:
		g_assert_cmpuint(sim->last.size, ==, 8 + sizeof(sim->xsave));
		memcpy(sim->xsave, body + 8, sizeof(sim->xsave));
		break;
	case KVMI_VCPU_SET_SREGS:
		g_assert_cmpuint(sim->last.size, ==, 8 + sizeof(struct kvm_sregs));
		if (body[8])
			error = -KVM_EINVAL;
		break;
	case KVMI_VCPU_SET_MSRS: {
		struct kvmi_vcpu_set_msrs_reply reply = { 0 };
		struct kvm_msr_entry entry;
		uint32_t count;

		memcpy(&count, body + 8, sizeof(count));
		g_assert_cmpuint(sim->last.size, ==, 16 + count * sizeof(entry));
		/* Number i has the value i; it can't have another */
		for (; reply.nmsrs < count; reply.nmsrs++) {
			memcpy(&entry, body + 16 + reply.nmsrs * sizeof(entry),
			       sizeof(entry));
			g_assert_cmphex(entry.reserved, ==, 0);
			if (entry.data != entry.index)
				break;
		}
		sim_answer(sim, sim->last.id, sim->last.seq, 0, &reply,
			   sizeof(reply));
		return;
	}
	case KVMI_VCPU_CONTROL_CR:
	case KVMI_VCPU_CONTROL_MSR:
		g_assert_cmpuint(sim->last.size, ==, 16);
		break;
	case KVMI_VCPU_CONTROL_SINGLESTEP:
		g_assert_cmpuint(sim->last.size, ==, 16);
		sim->stepping[vcpu.vcpu] = body[8];
		break;
	case KVMI_VCPU_INJECT_EXCEPTION:
		g_assert_cmpuint(sim->last.size, ==, 24);
		if (body[8] == 2)
			error = -KVM_EBUSY;
		break;
	case KVMI_VM_CONTROL_CLEANUP:
		g_assert_cmpuint(sim->last.size, ==, 8);
		break;
	default:
		error = -KVM_ENOSYS;
	}
	sim_answer(sim, sim->last.id, sim->last.seq, error, NULL, 0);
}

void sim_serve(struct sim *sim)
{
	while (sim_receive(sim))
		sim_serve_one(sim);
}

static void *run(void *context)
{
	struct sim *sim = context;

	if (sim->script)
		sim->script(sim);
	else if (sim_handshake(sim))
		sim_serve(sim);
	shutdown(sim->fd, SHUT_RDWR);

	return NULL;
}

void sim_start(struct sim *sim, void (*script)(struct sim *sim))
{
	int fds[2];

	g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds),
			==, 0);
	sim->fd = fds[0];
	sim->client_fd = fds[1];
	sim->script = script;
	sim->thread = g_thread_new("sim", run, sim);
}

void sim_connect(struct sim *sim, const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
	sim->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	g_assert_cmpint(connect(sim->fd, (struct sockaddr *)&address,
				sizeof(address)), ==, 0);
	sim->thread = g_thread_new("sim", run, sim);
}

void sim_run(struct sim *sim, int fd)
{
	sim->fd = fd;
	sim->thread = g_thread_new("sim", run, sim);
}

void sim_stop(struct sim *sim)
{
	g_thread_join(sim->thread);
	close(sim->fd);
}
