/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef APPARMOR_H
#define APPARMOR_H

#include <glib.h>

/*
 * The text of the rules that "kvmi libvirt" writes: a line each, with the domain's
 * UUID behind it, in files that others write to, too.
 */

/* A path in a rule: quoted, and what would be a pattern isn't.  The profile's name
 * becomes the variable: every domain's profile gets to see the rule, and in all but
 * one it is of no use */
char *apparmor_path(const char *path, const char *profile);

/* The domain's rules in the file's text, a line each; NULL: it has none */
char *apparmor_lines(const char *text, const char *uuid);
/* The file's text (NULL: there is no such file) with these in their place (NULL:
 * none).  NULL: the file was made for the rules that now are gone */
char *apparmor_replace(const char *text, const char *uuid, const char *rules);

#endif
