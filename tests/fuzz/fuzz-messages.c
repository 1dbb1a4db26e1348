/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Feeds the library what a broken or hostile peer could send: a session as it
 * should be, with a few things changed here and there.
 *
 * fuzz-messages [ROUNDS [FIRST]]: without arguments a short run, the same each
 * time; by hand e.g. `fuzz-messages 10000000 $RANDOM'.  When something is found,
 * the round's number is printed: `fuzz-messages 1 NUMBER' repeats it.
 *
 * With clang's -fsanitize=fuzzer and -DKVMI_LIBFUZZER it is a libFuzzer target:
 * the choices are made by the input, and by what follows from a number always
 * the same when that has come to its end.
 */

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <kvmi/kvmi.h>
#include <linux/kvmi.h>

#include "chance.h"

#define ROUNDS 4000
#define MAX (128 * 1024)

static uint64_t state;
static const uint8_t *input;
static size_t input_left;
static unsigned long connected, finished, protocol;
static uint32_t seq, events;	/* the next numbers */
static uint8_t stream[MAX];
static size_t length;

/* Of the input if there is some left */
static uint32_t any(uint32_t below)
{
	size_t size = below <= 256 ? 1 : below <= 65536 ? 2 : 4;
	uint32_t value = 0;

	if (input_left >= size) {
		memcpy(&value, input, size);
		input += size;
		input_left -= size;
		return value % below;
	}

	return chance(&state, below);
}

static void put(const void *data, size_t size)
{
	if (!size || length + size > MAX)
		return;
	memcpy(stream + length, data, size);
	length += size;
}

static void put_zeros(size_t size)
{
	static const uint8_t zeros[8192];

	put(zeros, size);
}

static void hello(void)
{
	uint32_t size = any(8) ? 104 : 96 + any(64);

	put(&size, sizeof(size));
	put_zeros(size - sizeof(size));
}

static void message(unsigned int id, uint32_t seq, size_t size)
{
	struct kvmi_msg_hdr header = { .id = id, .seq = seq, .size = size };

	put(&header, sizeof(header));
}

/* error, then `size' bytes of which the first few are `data' */
static void reply(unsigned int id, int error, const void *data,
		  size_t data_size, size_t size)
{
	struct kvmi_error_code code = { .err = error };

	/* more than was asked for */
	if (!any(30))
		size += any(4000);
	message(id, seq++, sizeof(code) + (error ? 0 : size));
	put(&code, sizeof(code));
	if (!error) {
		put(data, data_size);
		put_zeros(size - data_size);
	}
}

static void event(void)
{
	static const uint8_t sizes[] = { 0, 0, 16, 24, 16, 24, 8, 24, 24, 8 };
	unsigned int kind = any(10), size = any(32) ? sizes[kind] : any(80);
	struct kvmi_event_hdr header = {
		.event = any(32) ? 2 * kind + 1 : any(65536),
	};
	struct kvmi_vcpu_event common = {
		.size = any(8) ? sizeof(common) : sizeof(common) + any(16),
		.vcpu = any(32) ? events % 1024 : any(65536),
	};

	events++;
	if (!any(10)) {
		header.event = any(4) ? KVMI_VM_EVENT_UNHOOK : any(8);
		message(KVMI_VM_EVENT, events, sizeof(header));
		put(&header, sizeof(header));
		return;
	}
	message(KVMI_VCPU_EVENT, events, sizeof(header) + common.size + size);
	put(&header, sizeof(header));
	put(&common, sizeof(common));
	put_zeros(common.size - sizeof(common) + size);
}

static void some_events(void)
{
	while (any(3))
		event();
}

static void spoil(void)
{
	static const uint32_t special[] = {
		0, 1, 7, 8, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 8184,
		8185, 0x7fffffff, 0x80000000, 0xffffffff,
	};
	unsigned int changes = any(12) ? 0 : 1 + any(4), from, size;

	while (changes-- && length > 8) {
		unsigned int at = any(length - 4);
		uint32_t value = special[any(15)];

		switch (any(6)) {
		case 0:
			stream[at] ^= 1 << any(8);
			break;
		case 1:
			stream[at] = any(256);
			break;
		case 2:
			memcpy(stream + at, &value, 4);
			break;
		case 3:
			memcpy(stream + at, &value, 2);
			break;
		case 4:		/* the end is missing, or a piece in between */
			size = any(4) ? any(32) : any(length - at);
			if (size > length - at)
				size = length - at;
			memmove(stream + at, stream + at + size,
				length - at - size);
			length -= size;
			break;
		case 5:		/* a piece comes twice */
			from = any(length);
			size = any(600);
			if (size > length - from)
				size = length - from;
			if (!size || length + size > MAX)
				break;
			memmove(stream + at + size, stream + at, length - at);
			memmove(stream + at, stream + from, size);
			length += size;
			break;
		}
	}
}

/* Sends what has been put, with a few things changed */
static void feed(int fd)
{
	spoil();
	/* fails when the library has had enough */
	(void)!send(fd, stream, length, MSG_DONTWAIT | MSG_NOSIGNAL);
	length = 0;
}

static void events_of(struct kvmi_vm *vm)
{
	struct kvmi_vm_event *event;
	unsigned int count = 0;

	while ((event = kvmi_vm_next_event(vm))) {
		struct kvmi_error err;

		check(event->data_size <= sizeof(event->data));
		check(event->vcpu < 8192);
		check(event->id <= 65535);
		/* the latter takes a number, so that the rest is answers to nothing */
		if (any(60))
			kvmi_vm_reply(vm, event, any(4), &err);
		else
			kvmi_vm_reply_with_registers(vm, event, any(3),
						     &event->state.regs, &err);
		/* if that was no answer, this is */
		kvmi_vm_reply(vm, event, KVMI_ACTION_CONTINUE, &err);
		kvmi_vm_event_free(event);
		count++;
	}
	/* one for each vCPU that there can be, and one UNHOOK */
	check(count <= 8193);
}

/* Each call gets what it waits for, if nothing goes wrong */
static void play(void)
{
	struct kvmi_get_version_reply version = {
		.version = 1, .max_msg_size = KVMI_MAX_MSG_SIZE,
		.features = { 1, 1, 1, 1, 1, 1, { 0 } },
	};
	struct kvmi_vm_get_info_reply info = { .vcpu_count = 4 };
	struct kvmi_vcpu_get_registers_reply regs_reply = { .mode = 8 };
	struct kvmi_page_access pages[2] = { { 0x1000, 5 }, { 0x2000, 1 } };
	static const uint32_t msrs[] = { 0x174, 0x175 };
	struct kvmi_registers registers;
	enum kvmi_status status, last;
	uint8_t bytes[8192];
	struct kvmi_error err;
	struct kvmi_vm *vm;
	uint64_t values[2];
	unsigned int count;
	int fds[2], size = 2 * MAX;

	seq = events = 1;
	length = 0;
	check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
	setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	vm = kvmi_vm_new(fds[0], NULL, 0, &err);
	check(vm);
	/* what comes is there already */
	kvmi_vm_set_timeout(vm, 2, NULL);

	hello();
	feed(fds[1]);
	kvmi_vm_wait_hello(vm, &err);
	reply(KVMI_GET_VERSION, 0, &version, sizeof(version),
	      sizeof(version));
	some_events();
	feed(fds[1]);
	status = kvmi_vm_connect(vm, 0, 0, &err);
	events_of(vm);
	connected += status == KVMI_OK;

	some_events();
	reply(KVMI_VM_GET_INFO, 0, &info, sizeof(info), sizeof(info));
	some_events();
	feed(fds[1]);
	if (kvmi_vm_get_vcpu_count(vm, &count, &err) == KVMI_OK)
		check(count <= 8192);
	events_of(vm);

	reply(KVMI_VM_READ_PHYSICAL, 0, NULL, 0, 4096);
	some_events();
	reply(KVMI_VM_READ_PHYSICAL, any(2) ? -KVM_ENOENT : 0, NULL, 0,
	      4096);
	feed(fds[1]);
	kvmi_vm_read_physical(vm, 0x1000, bytes, sizeof(bytes), &err);
	events_of(vm);

	regs_reply.msrs.nmsrs = 2;
	reply(KVMI_VCPU_GET_REGISTERS, 0, &regs_reply,
	      sizeof(regs_reply),
	      sizeof(regs_reply) + 2 * sizeof(struct kvm_msr_entry));
	feed(fds[1]);
	kvmi_vcpu_get_registers(vm, 0, &registers, msrs, values, 2, &err);

	reply(KVMI_VM_SET_PAGE_ACCESS, any(2) ? 0 : -KVM_EINVAL, NULL, 0,
	      0);
	some_events();
	feed(fds[1]);
	kvmi_vm_set_page_access(vm, pages, 2, &err);
	reply(KVMI_VCPU_GET_XSAVE, 0, NULL, 0, 4096);
	feed(fds[1]);
	kvmi_vcpu_get_xsave(vm, 0, bytes, &err);
	reply(KVMI_VCPU_TRANSLATE_GVA, 0, NULL, 0, 8);
	some_events();
	feed(fds[1]);
	finished += kvmi_vcpu_translate(vm, 0, 0x1000, values, &err) == KVMI_OK;
	shutdown(fds[1], SHUT_WR);

	/* it ends, and stays so */
	while ((status = kvmi_vm_process(vm, &err)) == KVMI_OK ||
	       status == KVMI_ERR_NOTHING)
		events_of(vm);
	check(status == KVMI_ERR_CLOSED || status == KVMI_ERR_PROTOCOL ||
	      status == KVMI_ERR_VERSION || status == KVMI_ERR_AUTH);
	protocol += status == KVMI_ERR_PROTOCOL;
	events_of(vm);
	last = kvmi_vm_check_event(vm, 1, &err);
	check(last == status && err.status == status && err.message[0]);
	kvmi_vm_close(vm);
	close(fds[1]);
}

static void start_round(unsigned long number)
{
	round_number = number;
	state = chance_of_round();
}

#ifdef KVMI_LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	input = data;
	input_left = size;
	start_round(1);
	play();

	return 0;
}
#else
int main(int argc, char **argv)
{
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 0) : ROUNDS;
	unsigned long first = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;

	for (unsigned long i = first; i < first + rounds; i++) {
		start_round(i);
		play();
	}
	printf("%lu rounds: %lu connected, %lu came to the end, %lu were stopped for what they sent\n",
	       rounds, connected, finished, protocol);
	/* a run in which nothing happens finds nothing */
	if (argc == 1)
		check(connected > rounds / 2 && finished > rounds / 20 &&
		      protocol > rounds / 20);

	return 0;
}
#endif
