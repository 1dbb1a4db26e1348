/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef OUTPUT_H
#define OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Lines on standard output, from any thread.  They are written by a thread of
 * their own: a reader that does not read must not hold up a guest.  Lines that
 * may be lost are, once too many are waiting.
 */

struct line {
	char text[4096];
	size_t length;
	bool json;
	bool first;		/* no member so far */
};

/* CLOCK_REALTIME in microseconds */
int64_t now_us(void);

int output_start(void);
/* Waits (not for ever) until all is written; false, after having complained, if
 * something was lost or standard output failed */
bool output_end(void);
/* The same without that thread, for the end of main(): the exit status to end with */
int stdout_end(int result);
/* standard output failed: nobody is reading any more */
bool output_failed(void);
unsigned long output_dropped(void);
/* may be polled: becomes readable when output_failed() */
int output_fd(void);

/* One line; a newline is added */
void output_line(const char *text, size_t length, bool may_be_lost);

/* {"ts":TS,"event":"EVENT" ... */
void json_start(struct line *line, int64_t ts, const char *event);
void json_string(struct line *line, const char *name, const char *value);
void json_number(struct line *line, const char *name, int64_t value);
void json_hex(struct line *line, const char *name, uint64_t value);
void json_bool(struct line *line, const char *name, bool value);
void json_open(struct line *line, const char *name, char bracket);
void json_close(struct line *line, char bracket);
void json_end(struct line *line, bool may_be_lost);

/* For people; control characters are made visible.  ts 0: no time in front */
void human(int64_t ts, bool may_be_lost, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* what is wrong, on standard error */
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
