/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef LIBVIRT_XML_H
#define LIBVIRT_XML_H

#include <glib.h>

/*
 * What "kvmi libvirt" changes in a domain's XML: a chardev, a secret and a kvmi
 * object in <qemu:commandline>, known by their ids; and, with another emulator,
 * a note in <metadata> of that and the one before.
 */

#define XML_OBJECT_ID "kvmi0"
#define XML_CHARDEV_ID "kvmi0-tool"
#define XML_KEY_ID "kvmi0-key"

struct domain_setup {
	char *socket;		/* NULL: on vsock */
	char *cid, *port;	/* of vsock */
	char *key_file;		/* NULL: no key */
	gboolean mutual;	/* with the key: auth=hmac */
	char *emulator;		/* the domain's, or the one to set; NULL: as is */
};

void domain_setup_clear(struct domain_setup *setup);

/* The XML with the setup in it, in place of one that was there */
char *domain_xml_enable(const char *xml, const struct domain_setup *setup,
			GError **error);
/* The XML as it was before; the same if nothing of ours is in it */
char *domain_xml_disable(const char *xml, GError **error);
/* Reads the setup back; *enabled says whether there is one.  *foreign: an
 * argument that makes a kvmi object that isn't ours, or NULL */
gboolean domain_xml_read(const char *xml, gboolean *enabled,
			 struct domain_setup *setup, char **foreign,
			 GError **error);

/* "+64055:+64055", whom QEMU runs as, from a host's capabilities; NULL if they
 * don't tell */
char *capabilities_xml_read(const char *xml);
/* The same for a domain that has somebody of its own, maybe by names; or NULL */
char *domain_xml_user(const char *xml);

#endif
