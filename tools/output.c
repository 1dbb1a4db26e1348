/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "kvmi.h"
#include "output.h"

/* Beyond the first, lines that may be lost are; beyond the second, all are */
#define SOFT_LIMIT (4 << 20)
#define HARD_LIMIT (16 << 20)
#define END_TIMEOUT_S 3

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static char *buffer;
static size_t used, capacity;
static bool writing, ending, failed, started;
static unsigned long dropped;
static pthread_t writer;
static int failed_fd = -1, failed_errno;

int64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);

	return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static bool write_all(const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(STDOUT_FILENO, data, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		data += done;
		size -= done;
	}

	return true;
}

static void *write_lines(void *unused)
{
	(void)unused;

	pthread_mutex_lock(&lock);
	while (!failed) {
		char *mine = buffer;
		size_t size = used;
		bool good;
		int error;

		if (!size) {
			if (ending)
				break;
			pthread_cond_wait(&changed, &lock);
			continue;
		}
		buffer = NULL;
		used = capacity = 0;
		writing = true;
		pthread_mutex_unlock(&lock);

		good = write_all(mine, size);
		error = errno;
		free(mine);

		pthread_mutex_lock(&lock);
		writing = false;
		if (!good) {
			failed = true;
			failed_errno = error;
			if (eventfd_write(failed_fd, 1))
				ending = true;
		}
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);

	return NULL;
}

int output_start(void)
{
	failed_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (failed_fd < 0)
		return -1;
	if (pthread_create(&writer, NULL, write_lines, NULL))
		return -1;
	started = true;

	return 0;
}

bool output_end(void)
{
	struct timespec deadline;
	bool good;
	int error;

	if (!started)
		return true;

	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += END_TIMEOUT_S;

	pthread_mutex_lock(&lock);
	ending = true;
	pthread_cond_broadcast(&changed);
	while ((used || writing) && !failed)
		if (pthread_cond_timedwait(&changed, &lock, &deadline))
			break;
	good = !used && !writing && !failed;
	error = failed ? failed_errno : 0;
	pthread_mutex_unlock(&lock);
	if (good)
		pthread_join(writer, NULL);
	else
		complain("standard output: %s", error ? strerror(error) :
			 "nobody reads it");

	return good;
}

int stdout_end(int result)
{
	errno = 0;
	if (!ferror(stdout) && !fflush(stdout))
		return result;
	/* the reason of a failure before is not known any more */
	complain("standard output: %s", errno ? strerror(errno) :
		 "not all could be written");

	return EXIT_PROBLEM;
}

bool output_failed(void)
{
	bool value;

	pthread_mutex_lock(&lock);
	value = failed;
	pthread_mutex_unlock(&lock);

	return value;
}

unsigned long output_dropped(void)
{
	unsigned long value;

	pthread_mutex_lock(&lock);
	value = dropped;
	pthread_mutex_unlock(&lock);

	return value;
}

int output_fd(void)
{
	return failed_fd;
}

void output_line(const char *text, size_t length, bool may_be_lost)
{
	if (!started) {
		/* commands that hold up no guest do without the thread */
		fwrite(text, 1, length, stdout);
		putchar('\n');
		return;
	}

	pthread_mutex_lock(&lock);
	if (failed || (may_be_lost && used > SOFT_LIMIT) || used > HARD_LIMIT)
		goto drop;
	if (capacity - used < length + 1) {
		size_t bigger = 2 * (used + length + 1) + 65536;
		char *moved = realloc(buffer, bigger);

		if (!moved)
			goto drop;
		buffer = moved;
		capacity = bigger;
	}
	memcpy(buffer + used, text, length);
	used += length;
	buffer[used++] = '\n';
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&lock);
	return;
drop:
	dropped++;
	pthread_mutex_unlock(&lock);
}

/* ------------------------------------------------------------------------
 * JSON
 */

static void add(struct line *line, const char *format, ...)
{
	size_t left = sizeof(line->text) - line->length;
	va_list args;
	int length;

	va_start(args, format);
	length = vsnprintf(line->text + line->length, left, format, args);
	va_end(args);
	/* Nothing we print comes near; if so, the line is cut visibly broken */
	if (length > 0)
		line->length += (size_t)length < left ? (size_t)length : left - 1;
}

static void add_string(struct line *line, const char *value)
{
	const unsigned char *at;

	add(line, "\"");
	for (at = (const unsigned char *)value; *at; at++) {
		/* not all that guests and people write is UTF-8 */
		if (*at == '"' || *at == '\\')
			add(line, "\\%c", *at);
		else if (*at < 0x20 || *at >= 0x7f)
			add(line, "\\u%04x", *at);
		else
			add(line, "%c", *at);
	}
	add(line, "\"");
}

static void add_name(struct line *line, const char *name)
{
	if (!line->first)
		add(line, ",");
	line->first = false;
	if (name) {
		add_string(line, name);
		add(line, ":");
	}
}

void json_start(struct line *line, int64_t ts, const char *event)
{
	line->length = 0;
	line->json = true;
	line->first = true;
	add(line, "{");
	if (ts)
		json_number(line, "ts", ts);
	if (event)
		json_string(line, "event", event);
}

void json_string(struct line *line, const char *name, const char *value)
{
	add_name(line, name);
	add_string(line, value);
}

void json_number(struct line *line, const char *name, int64_t value)
{
	add_name(line, name);
	add(line, "%" PRId64, value);
}

/* As a string: 64 bits are too many for the numbers of some readers */
void json_hex(struct line *line, const char *name, uint64_t value)
{
	add_name(line, name);
	add(line, "\"0x%" PRIx64 "\"", value);
}

void json_bool(struct line *line, const char *name, bool value)
{
	add_name(line, name);
	add(line, value ? "true" : "false");
}

void json_open(struct line *line, const char *name, char bracket)
{
	add_name(line, name);
	add(line, "%c", bracket);
	line->first = true;
}

void json_close(struct line *line, char bracket)
{
	add(line, "%c", bracket);
	line->first = false;
}

void json_end(struct line *line, bool may_be_lost)
{
	add(line, "}");
	output_line(line->text, line->length, may_be_lost);
}

/* ------------------------------------------------------------------------
 * Text
 */

/* What a guest chose (its name, its banner) must not steer the terminal */
static void make_harmless(char *text)
{
	for (; *text; text++)
		if ((unsigned char)*text < 0x20 || *text == 0x7f)
			*text = '?';
}

void human(int64_t ts, bool may_be_lost, const char *format, ...)
{
	char text[2048] = "";
	size_t length = 0;
	va_list args;

	if (ts) {
		time_t seconds = ts / 1000000;
		struct tm parts;

		localtime_r(&seconds, &parts);
		length = strftime(text, sizeof(text), "%H:%M:%S", &parts);
		length += snprintf(text + length, sizeof(text) - length,
				   ".%06d  ", (int)(ts % 1000000));
	}
	va_start(args, format);
	vsnprintf(text + length, sizeof(text) - length, format, args);
	va_end(args);
	make_harmless(text);
	output_line(text, strlen(text), may_be_lost);
}

void complain(const char *format, ...)
{
	char text[1024];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	make_harmless(text);
	fprintf(stderr, "kvmi: %s\n", text);
}
