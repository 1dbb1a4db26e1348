/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What tools for the older library have in common here; NAME is the tool's */
#ifndef OLDER_H
#define OLDER_H

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <libkvmi.h>

static void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void tell(const char *format, ...)
{
	va_list args;

	printf(NAME ": ");
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	printf("\n");
	fflush(stdout);
}

#define check(condition) do { \
		if (!(condition)) { \
			tell("line %d: %s (errno %d: %s)", __LINE__, \
			     #condition, errno, strerror(errno)); \
			exit(1); \
		} \
	} while (0)
#define ok(call) do { \
		errno = 0; \
		check((call) == 0); \
	} while (0)

static void on_log(kvmi_log_level level, const char *text, void *unused)
{
	(void)unused;
	tell("the library says (%d): %s", level, text);
}

/* An answer as long as it was then */
struct answer {
	struct kvmi_vcpu_hdr vcpu;
	struct kvmi_event_reply reply;
	union {
		struct kvmi_event_cr_reply cr;
		struct kvmi_event_msr_reply msr;
		struct kvmi_event_pf_reply pf;
	};
};

/* Returns its size.  What the guest wants to write is written. */
static size_t make_answer(struct answer *answer,
			  const struct kvmi_dom_event *event, int action)
{
	const size_t least = sizeof(answer->vcpu) + sizeof(answer->reply);
	int kind = event->event.common.event;

	memset(answer, 0, sizeof(*answer));
	answer->vcpu.vcpu = event->event.common.vcpu;
	answer->reply.action = action;
	answer->reply.event = kind;
	switch (kind) {
	case KVMI_EVENT_CR:
		answer->cr.new_val = event->event.cr.new_value;
		return least + sizeof(answer->cr);
	case KVMI_EVENT_MSR:
		answer->msr.new_val = event->event.msr.new_value;
		return least + sizeof(answer->msr);
	case KVMI_EVENT_PF:
		return least + sizeof(answer->pf);
	default:
		return least;
	}
}

#endif
