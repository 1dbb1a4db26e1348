/* SPDX-License-Identifier: GPL-2.0-or-later */

#include <libxml/parser.h>
#include <libxml/tree.h>
#include <string.h>

#include "libvirt-xml.h"

#define QEMU_NS "http://libvirt.org/schemas/domain/qemu/1.0"
/* of the note in <metadata>; just a name */
#define KVMI_NS "https://kvmi.invalid/libvirt/1.0"
#define X(text) ((const xmlChar *)(text))

#define XML_ERROR g_quark_from_static_string("domain-xml")

void domain_setup_clear(struct domain_setup *setup)
{
	g_clear_pointer(&setup->socket, g_free);
	g_clear_pointer(&setup->cid, g_free);
	g_clear_pointer(&setup->port, g_free);
	g_clear_pointer(&setup->key_file, g_free);
	g_clear_pointer(&setup->emulator, g_free);
}

static xmlDoc *parse(const char *xml, const char *root, GError **error)
{
	xmlDoc *doc = xmlReadMemory(xml, strlen(xml), "domain.xml", NULL,
				    XML_PARSE_NONET | XML_PARSE_NOERROR |
				    XML_PARSE_NOWARNING);

	if (!doc || !xmlDocGetRootElement(doc) ||
	    !xmlStrEqual(xmlDocGetRootElement(doc)->name, X(root))) {
		g_set_error(error, XML_ERROR, 0, "this is not the XML of a %s",
			    root);
		xmlFreeDoc(doc);
		return NULL;
	}

	return doc;
}

static gboolean is(const xmlNode *node, const char *name, const char *ns)
{
	return node->type == XML_ELEMENT_NODE &&
	       xmlStrEqual(node->name, X(name)) &&
	       (ns ? node->ns && xmlStrEqual(node->ns->href, X(ns)) : !node->ns);
}

static xmlNode *child(xmlNode *parent, const char *name, const char *ns)
{
	xmlNode *node;

	for (node = parent ? parent->children : NULL; node; node = node->next)
		if (is(node, name, ns))
			return node;

	return NULL;
}

static xmlNode *next_arg(xmlNode *node)
{
	while (node && !is(node, "arg", QEMU_NS))
		node = node->next;

	return node;
}

static char *value_of(xmlNode *node, const char *name)
{
	xmlChar *value = node ? xmlGetNoNsProp(node, X(name)) : NULL;
	char *copy = g_strdup((const char *)value);

	xmlFree(value);

	return copy;
}

/* A node with the blanks in front of it, so that the lines stay in order */
static void remove_node(xmlNode *node)
{
	xmlNode *blank = node->prev;

	if (blank && xmlIsBlankNode(blank)) {
		xmlUnlinkNode(blank);
		xmlFreeNode(blank);
	}
	xmlUnlinkNode(node);
	xmlFreeNode(node);
}

static gboolean has_elements(xmlNode *parent)
{
	return xmlChildElementCount(parent) != 0;
}

/* As the last element of the parent, two blanks further in */
static xmlNode *append(xmlNode *parent, xmlNs *ns, const char *name)
{
	xmlNode *node = xmlNewDocNode(parent->doc, ns, X(name), NULL);
	xmlNode *last = xmlLastElementChild(parent), *up;
	GString *blank = g_string_new("\n");

	for (up = parent; up && up->type == XML_ELEMENT_NODE; up = up->parent)
		g_string_append(blank, "  ");
	if (last) {
		xmlNode *space = xmlNewDocText(parent->doc, X(blank->str));

		xmlAddNextSibling(last, space);
		xmlAddNextSibling(space, node);
	} else {
		xmlNodeSetContent(parent, NULL);
		xmlAddChild(parent, xmlNewDocText(parent->doc, X(blank->str)));
		xmlAddChild(parent, node);
		g_string_truncate(blank, blank->len - 2);
		xmlAddChild(parent, xmlNewDocText(parent->doc, X(blank->str)));
	}
	g_string_free(blank, TRUE);

	return node;
}

/* ---- QEMU's options ------------------------------------------------------ */

/* The value of name in "a,b=c,d=e", where ",," is a comma; NULL if it isn't
 * there.  name NULL: what has no name */
static char *option(const char *text, const char *name)
{
	GString *part = g_string_new(NULL);
	char *found = NULL;

	for (;; text++) {
		if (*text && !(text[0] == ',' && text[1] != ',')) {
			if (*text == ',')
				text++;
			g_string_append_c(part, *text);
			continue;
		}
		if (!name && !strchr(part->str, '=')) {
			found = g_strdup(part->str);
		} else if (name && g_str_has_prefix(part->str, name) &&
			   part->str[strlen(name)] == '=') {
			g_free(found);	/* the last one counts */
			found = g_strdup(part->str + strlen(name) + 1);
		}
		if (!*text || (!name && found))
			break;
		g_string_truncate(part, 0);
	}
	g_string_free(part, TRUE);

	return found;
}

static char *escape(const char *value)
{
	char **parts = g_strsplit(value, ",", -1);
	char *joined = g_strjoinv(",,", parts);

	g_strfreev(parts);

	return joined;
}

static gboolean option_is(const char *text, const char *name, const char *value)
{
	char *found = option(text, name);
	gboolean same = !g_strcmp0(found, value);

	g_free(found);

	return same;
}

/* "-object kvmi,id=kvmi0,..." and its like.  Somebody may have called an object
 * of his own kvmi0: the one whose chardev is ours is ours */
static gboolean ours(const char *opt, const char *value)
{
	if (!g_strcmp0(opt, "-chardev"))
		return option_is(value, "id", XML_CHARDEV_ID);
	if (!g_strcmp0(opt, "-object"))
		return option_is(value, "id", XML_KEY_ID) ||
		       (option_is(value, NULL, "kvmi") &&
			option_is(value, "id", XML_OBJECT_ID) &&
			option_is(value, "chardev", XML_CHARDEV_ID));

	return FALSE;
}

static gboolean introspects(const char *opt, const char *value)
{
	char *type;
	gboolean yes;

	if (g_strcmp0(opt, "-object"))
		return FALSE;
	if (value[0] == '{')
		return strstr(value, "\"kvmi\"") ||
		       strstr(value, "\"introspection\"");
	type = option(value, NULL);
	if (!type)
		type = option(value, "qom-type");
	yes = !g_strcmp0(type, "kvmi") || !g_strcmp0(type, "introspection");
	g_free(type);

	return yes;
}

/* ---- the domain ---------------------------------------------------------- */

/* Takes what is ours out of the document, and puts the emulator back, unless
 * somebody has set another one since */
static void strip(xmlNode *root)
{
	xmlNode *commandline = child(root, "commandline", QEMU_NS);
	xmlNode *metadata = child(root, "metadata", NULL);
	xmlNode *note = child(metadata, "setup", KVMI_NS);
	xmlNode *arg = next_arg(commandline ? commandline->children : NULL);
	gboolean changed = FALSE;

	while (arg) {
		xmlNode *with = next_arg(arg->next), *after;
		char *opt = value_of(arg, "value");
		char *value = value_of(with, "value");

		after = with;
		if (with && value && ours(opt, value)) {
			after = next_arg(with->next);
			remove_node(arg);
			remove_node(with);
			changed = TRUE;
		}
		g_free(opt);
		g_free(value);
		arg = after;
	}
	if (changed && !has_elements(commandline)) {
		xmlNs **ns;

		remove_node(commandline);
		/* only what stands in front of it uses the name space */
		for (ns = &root->nsDef; *ns; ns = &(*ns)->next) {
			xmlNs *old = *ns;

			if (!xmlStrEqual(old->href, X(QEMU_NS)))
				continue;
			if (child(root, "capabilities", QEMU_NS) ||
			    child(root, "deprecation", QEMU_NS) ||
			    child(root, "override", QEMU_NS))
				break;
			*ns = old->next;
			xmlFreeNs(old);
			break;
		}
	}
	if (note) {
		char *before = value_of(note, "emulator");
		char *set = value_of(note, "set");
		xmlNode *emulator = child(child(root, "devices", NULL),
					  "emulator", NULL);
		xmlChar *now = emulator ? xmlNodeGetContent(emulator) : NULL;

		if (before && set && xmlStrEqual(now, X(set))) {
			xmlNodeSetContent(emulator, NULL);
			xmlNodeAddContent(emulator, X(before));
		}
		xmlFree(now);
		g_free(set);
		g_free(before);
		remove_node(note);
		if (!has_elements(metadata))
			remove_node(metadata);
	}
}

static char *to_text(xmlDoc *doc)
{
	xmlChar *text = NULL;
	char *copy;
	int size;

	xmlDocDumpMemory(doc, &text, &size);
	copy = g_strndup((const char *)text, size);
	xmlFree(text);

	return copy;
}

static void add_arg(xmlNode *commandline, const char *value)
{
	xmlNewProp(append(commandline, commandline->ns, "arg"), X("value"),
		   X(value));
}

static void add_option(xmlNode *commandline, const char *name, char *value)
{
	add_arg(commandline, name);
	add_arg(commandline, value);
	g_free(value);
}

/* libvirt wants <metadata> anywhere, and has it near the top */
static void add_note(xmlNode *root, const char *emulator, const char *set)
{
	xmlNode *metadata = child(root, "metadata", NULL), *note;

	if (!metadata)
		metadata = append(root, NULL, "metadata");
	note = append(metadata, NULL, "setup");
	xmlSetNs(note, xmlNewNs(note, X(KVMI_NS), X("kvmi")));
	xmlNewProp(note, X("emulator"), X(emulator));
	xmlNewProp(note, X("set"), X(set));
}

static char *foreign_object(xmlNode *root)
{
	xmlNode *commandline = child(root, "commandline", QEMU_NS);
	xmlNode *arg = next_arg(commandline ? commandline->children : NULL);
	char *found = NULL;

	for (; arg && !found; arg = next_arg(arg->next)) {
		char *opt = value_of(arg, "value");
		char *value = value_of(next_arg(arg->next), "value");

		if (value && introspects(opt, value) && !ours(opt, value))
			found = g_strdup(value);
		g_free(opt);
		g_free(value);
	}

	return found;
}

char *domain_xml_enable(const char *xml, const struct domain_setup *setup,
			GError **error)
{
	xmlDoc *doc = parse(xml, "domain", error);
	xmlNode *root, *commandline, *emulator;
	char *path, *text, *now;
	xmlNs *ns;

	if (!doc)
		return NULL;
	root = xmlDocGetRootElement(doc);
	text = value_of(root, "type");
	if (text && strcmp(text, "kvm")) {
		g_set_error(error, XML_ERROR, 0,
			    "it is of the type '%s': only KVM has introspection (<domain type='kvm'>)",
			    text);
		g_free(text);
		xmlFreeDoc(doc);
		return NULL;
	}
	g_free(text);
	strip(root);
	text = foreign_object(root);
	if (text) {
		g_set_error(error, XML_ERROR, 0,
			    "it has a KVMI object already: -object %s. Remove it from <qemu:commandline> first (virsh edit)",
			    text);
		g_free(text);
		xmlFreeDoc(doc);
		return NULL;
	}

	emulator = child(child(root, "devices", NULL), "emulator", NULL);
	now = emulator ? (char *)xmlNodeGetContent(emulator) : NULL;
	if (setup->emulator && g_strcmp0(setup->emulator, now)) {
		if (!emulator) {
			g_set_error(error, XML_ERROR, 0, "it has no <emulator>");
			xmlFreeDoc(doc);
			return NULL;
		}
		add_note(root, now, setup->emulator);
		xmlNodeSetContent(emulator, NULL);
		xmlNodeAddContent(emulator, X(setup->emulator));
	}
	xmlFree(now);

	ns = xmlSearchNsByHref(doc, root, X(QEMU_NS));
	if (!ns)
		ns = xmlNewNs(root, X(QEMU_NS), X("qemu"));
	commandline = child(root, "commandline", QEMU_NS);
	if (!commandline)
		commandline = append(root, ns, "commandline");

	path = setup->socket ? escape(setup->socket) : NULL;
	add_option(commandline, "-chardev",
		   g_strdup_printf("socket,id=" XML_CHARDEV_ID ",%s%s%s%s,server=off,reconnect-ms=1000",
				   path ? "path=" : "cid=", path ? path : setup->cid,
				   path ? "" : ",port=", path ? "" : setup->port));
	g_free(path);
	if (setup->key_file) {
		path = escape(setup->key_file);
		add_option(commandline, "-object",
			   g_strdup_printf("secret,id=" XML_KEY_ID ",file=%s", path));
		g_free(path);
	}
	add_option(commandline, "-object",
		   g_strdup_printf("kvmi,id=" XML_OBJECT_ID ",chardev=" XML_CHARDEV_ID "%s%s",
				   setup->key_file ? ",key=" XML_KEY_ID : "",
				   setup->mutual ? ",auth=hmac" : ""));

	text = to_text(doc);
	xmlFreeDoc(doc);

	return text;
}

char *domain_xml_disable(const char *xml, GError **error)
{
	xmlDoc *doc = parse(xml, "domain", error);
	char *text;

	if (!doc)
		return NULL;
	strip(xmlDocGetRootElement(doc));
	text = to_text(doc);
	xmlFreeDoc(doc);

	return text;
}

gboolean domain_xml_read(const char *xml, gboolean *enabled,
			 struct domain_setup *setup, char **foreign,
			 GError **error)
{
	xmlDoc *doc = parse(xml, "domain", error);
	xmlNode *root, *arg;

	memset(setup, 0, sizeof(*setup));
	*enabled = FALSE;
	*foreign = NULL;
	if (!doc)
		return FALSE;
	root = xmlDocGetRootElement(doc);
	*foreign = foreign_object(root);
	arg = child(child(root, "devices", NULL), "emulator", NULL);
	if (arg) {
		xmlChar *text = xmlNodeGetContent(arg);

		setup->emulator = g_strdup((char *)text);
		xmlFree(text);
	}
	arg = child(root, "commandline", QEMU_NS);
	for (arg = next_arg(arg ? arg->children : NULL); arg;
	     arg = next_arg(arg->next)) {
		char *opt = value_of(arg, "value");
		char *value = value_of(next_arg(arg->next), "value");

		if (value && ours(opt, value)) {
			if (!strcmp(opt, "-chardev")) {
				g_free(setup->socket);
				g_free(setup->cid);
				g_free(setup->port);
				setup->socket = option(value, "path");
				setup->cid = option(value, "cid");
				setup->port = option(value, "port");
			} else if (option_is(value, "id", XML_KEY_ID)) {
				g_free(setup->key_file);
				setup->key_file = option(value, "file");
			} else {
				setup->mutual = option_is(value, "auth", "hmac");
				*enabled = TRUE;
			}
		}
		g_free(opt);
		g_free(value);
	}
	xmlFreeDoc(doc);

	return TRUE;
}

char *capabilities_xml_read(const char *xml)
{
	xmlDoc *doc = parse(xml, "capabilities", NULL);
	char *user = NULL;
	xmlNode *model;

	if (!doc)
		return NULL;
	model = child(xmlDocGetRootElement(doc), "host", NULL);
	for (model = model ? model->children : NULL; model; model = model->next) {
		xmlNode *name, *label;
		xmlChar *text;

		if (!is(model, "secmodel", NULL))
			continue;
		name = child(model, "model", NULL);
		text = name ? xmlNodeGetContent(name) : NULL;
		if (xmlStrEqual(text, X("dac"))) {
			for (label = model->children; label; label = label->next) {
				char *type = is(label, "baselabel", NULL) ?
					     value_of(label, "type") : NULL;

				if (!g_strcmp0(type, "kvm") && !user) {
					xmlChar *content = xmlNodeGetContent(label);

					user = g_strdup((char *)content);
					xmlFree(content);
				}
				g_free(type);
			}
		}
		xmlFree(text);
	}
	xmlFreeDoc(doc);

	return user;
}

char *domain_xml_user(const char *xml)
{
	xmlDoc *doc = parse(xml, "domain", NULL);
	char *user = NULL;
	xmlNode *node;

	if (!doc)
		return NULL;
	node = xmlDocGetRootElement(doc)->children;
	for (; node && !user; node = node->next) {
		char *model = is(node, "seclabel", NULL) ? value_of(node, "model") : NULL;
		xmlNode *label = child(node, "label", NULL);

		if (!g_strcmp0(model, "dac") && label) {
			xmlChar *text = xmlNodeGetContent(label);

			user = g_strdup((char *)text);
			xmlFree(text);
		}
		g_free(model);
	}
	xmlFreeDoc(doc);

	return user;
}
