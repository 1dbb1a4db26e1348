/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <string.h>

#include "apparmor.h"

/* in a file that wasn't there before */
static const char made[] = "# made by kvmi libvirt, which removes it with its last rule\n";

char *apparmor_path(const char *path, const char *profile)
{
	GString *text = g_string_new("\"");

	while (*path) {
		if (g_str_has_prefix(path, profile)) {
			g_string_append(text, "@{profile_name}");
			path += strlen(profile);
			continue;
		}
		if (strchr("\"\\*?[]{}^@", *path))
			g_string_append_c(text, '\\');
		g_string_append_c(text, *path++);
	}
	g_string_append_c(text, '"');

	return g_string_free(text, FALSE);
}

/* What is behind each of the domain's rules */
static char *mark_of(const char *uuid)
{
	return g_strdup_printf(" # kvmi libvirt, domain %s", uuid);
}

char *apparmor_lines(const char *text, const char *uuid)
{
	char **lines = g_strsplit(text, "\n", -1), **line, *mark = mark_of(uuid);
	GString *found = g_string_new(NULL);

	for (line = lines; *line; line++)
		if (g_str_has_suffix(*line, mark))
			g_string_append_printf(found, "%.*s\n", (int)(strlen(*line) - strlen(mark)),
					       *line);
	g_free(mark);
	g_strfreev(lines);

	return g_string_free(found, found->len == 0);
}

char *apparmor_replace(const char *text, const char *uuid, const char *rules)
{
	char **lines = g_strsplit(text ? text : "", "\n", -1), **line, *mark = mark_of(uuid);
	GString *now = g_string_new(text || !rules ? NULL : made);
	gboolean empty;

	for (line = lines; *line; line++)
		if (!g_str_has_suffix(*line, mark) && (line[1] || **line))
			g_string_append_printf(now, "%s\n", *line);
	g_strfreev(lines);
	lines = g_strsplit(rules ? rules : "", "\n", -1);
	for (line = lines; *line; line++)
		if (**line)
			g_string_append_printf(now, "%s%s\n", *line, mark);
	g_strfreev(lines);
	g_free(mark);
	empty = text ? !strcmp(now->str, made) : !now->len;

	return g_string_free(now, empty);
}
