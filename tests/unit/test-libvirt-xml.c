/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What "kvmi libvirt" does to the XML of domains of several shapes, and to files with
 * AppArmor's rules */

#include <glib.h>
#include <string.h>

#include "apparmor.h"
#include "libvirt-xml.h"

#define DEVICES \
"  <devices>\n" \
"    <emulator>/usr/bin/qemu-system-x86_64</emulator>\n" \
"    <disk type=\"file\" device=\"disk\">\n" \
"      <driver name=\"qemu\" type=\"qcow2\"/>\n" \
"      <source file=\"/var/lib/libvirt/images/a &amp; b.qcow2\"/>\n" \
"      <target dev=\"vda\" bus=\"virtio\"/>\n" \
"    </disk>\n" \
"  </devices>\n"
#define QEMU "xmlns:qemu=\"http://libvirt.org/schemas/domain/qemu/1.0\""

static const struct shape {
	const char *name;
	const char *xml;
} shapes[] = {
	{ "plain",
	  "<domain type=\"kvm\">\n  <name>guest</name>\n"
	  "  <!-- edited by hand -->\n" DEVICES "</domain>\n" },
	{ "metadata",
	  "<domain type=\"kvm\" id=\"7\">\n  <name>guest</name>\n  <metadata>\n"
	  "    <libosinfo:libosinfo xmlns:libosinfo=\"http://libosinfo.org/xmlns/libvirt/domain/1.0\">\n"
	  "      <libosinfo:os id=\"http://debian.org/debian/12\"/>\n"
	  "    </libosinfo:libosinfo>\n  </metadata>\n  <title>Grüße &lt;1&gt;</title>\n"
	  DEVICES
	  "  <seclabel type=\"dynamic\" model=\"apparmor\" relabel=\"yes\"/>\n</domain>\n" },
	{ "commandline",
	  "<domain " QEMU " type=\"kvm\">\n  <name>guest</name>\n" DEVICES
	  "  <qemu:commandline>\n    <qemu:arg value=\"-object\"/>\n"
	  "    <qemu:arg value=\"secret,id=other,data=x\"/>\n"
	  "    <qemu:arg value=\"-chardev\"/>\n"
	  "    <qemu:arg value=\"socket,id=other,path=/run/other,server=on\"/>\n"
	  "    <qemu:env name=\"A\" value=\"B\"/>\n  </qemu:commandline>\n</domain>\n" },
	{ "capabilities",
	  "<domain " QEMU " type=\"kvm\">\n  <name>guest</name>\n" DEVICES
	  "  <qemu:capabilities>\n    <qemu:del capability=\"blockdev\"/>\n"
	  "  </qemu:capabilities>\n</domain>\n" },
	{ "one line",
	  "<domain type=\"kvm\"><name>guest</name><devices>"
	  "<emulator>/usr/bin/kvm</emulator></devices></domain>\n" },
	{ "CDATA and entities",
	  "<domain type=\"kvm\">\n  <name>guest</name>\n"
	  "  <description><![CDATA[a <b> & c]]>&#10;second line</description>\n" DEVICES
	  "</domain>\n" },
};

static char *as_is(const char *xml)
{
	GError *error = NULL;
	char *text = domain_xml_disable(xml, &error);

	g_assert_no_error(error);

	return text;
}

static void test_round_trip(gconstpointer data)
{
	const struct shape *shape = data;
	static const struct domain_setup setups[] = {
		{ .socket = (char *)"/run/kvmi/guest.sock", .key_file = (char *)"/etc/kvmi/keys/guest.key" },
		{ .socket = (char *)"/run/a,b=c/s", .key_file = NULL },
		{ .cid = (char *)"3", .port = (char *)"5000", .key_file = (char *)"/k", .mutual = TRUE,
		  .emulator = (char *)"/opt/other/qemu" },
		{ .socket = (char *)"/run/<&>.sock", .key_file = (char *)"/a,,b", .mutual = TRUE,
		  .emulator = (char *)"/opt/kvmi/bin/qemu-system-x86_64" },
	};
	char *before = as_is(shape->xml), *xml = g_strdup(before), *foreign;
	struct domain_setup found;
	GError *error = NULL;
	gboolean enabled;
	size_t i;

	g_assert_nonnull(strstr(before, "guest</name>"));
	/* one after the other: each takes the place of the one before */
	for (i = 0; i < G_N_ELEMENTS(setups); i++) {
		char *with = domain_xml_enable(xml, &setups[i], &error), *back;

		g_assert_no_error(error);
		g_assert_cmpstr(with, !=, xml);
		g_assert_true(domain_xml_read(with, &enabled, &found, &foreign, &error));
		g_assert_true(enabled);
		g_assert_null(foreign);
		g_assert_cmpstr(found.socket, ==, setups[i].socket);
		g_assert_cmpstr(found.cid, ==, setups[i].cid);
		g_assert_cmpstr(found.port, ==, setups[i].port);
		g_assert_cmpstr(found.key_file, ==, setups[i].key_file);
		g_assert_cmpint(found.mutual, ==, setups[i].mutual);
		if (setups[i].emulator)
			g_assert_cmpstr(found.emulator, ==, setups[i].emulator);
		domain_setup_clear(&found);

		back = domain_xml_disable(with, &error);
		g_assert_no_error(error);
		g_assert_cmpstr(back, ==, before);
		g_free(back);
		g_free(xml);
		xml = with;
	}
	g_free(xml);
	xml = domain_xml_disable(before, &error);
	g_assert_cmpstr(xml, ==, before);
	g_assert_true(domain_xml_read(xml, &enabled, &found, &foreign, &error));
	g_assert_false(enabled);
	domain_setup_clear(&found);
	g_free(xml);
	g_free(before);
}

static void test_arguments(void)
{
	struct domain_setup setup = { .socket = (char *)"/run/a,b.sock", .key_file = (char *)"/k" };
	char *xml = domain_xml_enable(shapes[0].xml, &setup, NULL);

	/* what QEMU will read */
	g_assert_nonnull(strstr(xml, "<qemu:commandline>\n    <qemu:arg value=\"-chardev\"/>\n"
				"    <qemu:arg value=\"socket,id=kvmi0-tool,path=/run/a,,b.sock,server=off,reconnect-ms=1000\"/>\n"
				"    <qemu:arg value=\"-object\"/>\n    <qemu:arg value=\"secret,id=kvmi0-key,file=/k\"/>\n"
				"    <qemu:arg value=\"-object\"/>\n    <qemu:arg value=\"kvmi,id=kvmi0,chardev=kvmi0-tool,key=kvmi0-key\"/>\n"
				"  </qemu:commandline>\n</domain>"));
	g_free(xml);

	setup.mutual = TRUE;
	xml = domain_xml_enable(shapes[0].xml, &setup, NULL);
	g_assert_nonnull(strstr(xml, ",key=kvmi0-key,auth=hmac\"/>"));
	g_free(xml);

	setup = (struct domain_setup){ .cid = (char *)"3", .port = (char *)"5000" };
	xml = domain_xml_enable(shapes[0].xml, &setup, NULL);
	g_assert_nonnull(strstr(xml, "\"socket,id=kvmi0-tool,cid=3,port=5000,server=off,reconnect-ms=1000\"/>"));
	g_free(xml);
}

/* Changes that were made while it was enabled stay */
static void test_changed_meanwhile(void)
{
	struct domain_setup setup = { .socket = (char *)"/run/s", .emulator = (char *)"/opt/qemu" };
	char *xml = domain_xml_enable(shapes[2].xml, &setup, NULL);
	GString *text = g_string_new(xml);
	char *back;

	g_string_replace(text, "<name>guest</name>", "<name>other</name>", 1);
	g_string_replace(text, "  </qemu:commandline>", "    <qemu:arg value=\"-S\"/>\n  </qemu:commandline>", 1);
	back = domain_xml_disable(text->str, NULL);
	g_assert_nonnull(strstr(back, "<name>other</name>"));
	g_assert_nonnull(strstr(back, "value=\"-S\""));
	g_assert_nonnull(strstr(back, "id=other,path=/run/other"));
	g_assert_nonnull(strstr(back, "<emulator>/usr/bin/qemu-system-x86_64</emulator>"));
	g_assert_null(strstr(back, "kvmi"));
	g_free(back);

	/* and so does another emulator, of whatever it took the place */
	g_string_replace(text, "<emulator>/opt/qemu<", "<emulator>/opt/newer<", 1);
	back = domain_xml_disable(text->str, NULL);
	g_assert_nonnull(strstr(back, "<emulator>/opt/newer</emulator>"));
	g_assert_null(strstr(back, "kvmi"));
	g_free(back);
	setup.emulator = (char *)"/opt/newer";
	back = domain_xml_enable(text->str, &setup, NULL);
	g_assert_nonnull(strstr(back, "<emulator>/opt/newer</emulator>"));
	g_assert_null(strstr(back, "<metadata>"));
	g_free(back);
	g_free(xml);
	g_string_free(text, TRUE);
}

static void test_foreign(void)
{
	static const char *const objects[] = {
		"kvmi,id=mine,chardev=c", "introspection,id=kvmi0,chardev=c", "id=mine,qom-type=kvmi,chardev=c",
		/* by hand, as docs/libvirt.md has it */
		"kvmi,id=kvmi0,chardev=tool", "kvmi,id=kvmi0", "kvmi,id=mine,chardev=kvmi0-tool",
		"{&quot;qom-type&quot;:&quot;kvmi&quot;,&quot;id&quot;:&quot;a&quot;}",
	};
	struct domain_setup setup = { .socket = (char *)"/run/s" }, found;
	gboolean enabled;
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(objects); i++) {
		char *xml = g_strdup_printf("<domain " QEMU "><devices/><qemu:commandline><qemu:arg value=\"-object\"/>"
					    "<qemu:arg value=\"%s\"/></qemu:commandline></domain>", objects[i]);
		char *foreign = NULL, *same = as_is(xml);
		GError *error = NULL;

		g_assert_null(domain_xml_enable(xml, &setup, &error));
		g_assert_nonnull(error);
		g_assert_nonnull(strstr(error->message, "virsh edit"));
		g_clear_error(&error);
		g_assert_true(domain_xml_read(xml, &enabled, &found, &foreign, NULL));
		g_assert_false(enabled);
		g_assert_nonnull(foreign);
		/* not ours to remove */
		g_assert_nonnull(strstr(same, "-object"));
		g_assert_cmpuint(strlen(same), >=, strlen(xml));
		g_free(same);
		g_free(foreign);
		g_free(xml);
	}
}

static void test_no_domain(void)
{
	static const char *const bad[] = { "", "<domain>", "<network/>", "<domain/> rest", "not XML" };
	struct domain_setup setup = { .socket = (char *)"/run/s" };
	GError *error = NULL;
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(bad); i++) {
		g_assert_null(domain_xml_enable(bad[i], &setup, &error));
		g_assert_nonnull(error);
		g_clear_error(&error);
		g_assert_null(domain_xml_disable(bad[i], &error));
		g_clear_error(&error);
	}
	setup.emulator = (char *)"/opt/qemu";
	g_assert_null(domain_xml_enable("<domain/>", &setup, &error));
	g_assert_nonnull(strstr(error->message, "<emulator>"));
	g_clear_error(&error);
}

static void test_not_kvm(void)
{
	struct domain_setup setup = { .socket = (char *)"/run/s" };
	GError *error = NULL;

	g_assert_null(domain_xml_enable("<domain type='qemu'><devices/></domain>", &setup, &error));
	g_assert_nonnull(strstr(error->message, "type='kvm'"));
	g_clear_error(&error);
}

static void test_capabilities(void)
{
	char *user = capabilities_xml_read(
		"<capabilities><host><cpu/><secmodel><model>apparmor</model><doi>0</doi></secmodel>"
		"<secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+106</baselabel>"
		"<baselabel type='qemu'>+1:+1</baselabel></secmodel></host></capabilities>");

	g_assert_cmpstr(user, ==, "+64055:+106");
	g_free(user);
	g_assert_null(capabilities_xml_read("<capabilities><host/></capabilities>"));
}

static void test_user(void)
{
	static const char *const none[] = {
		"<domain/>", "<domain><seclabel type='dynamic' model='dac' relabel='yes'/></domain>",
		"<domain><seclabel model='apparmor'><label>libvirt-1</label></seclabel></domain>",
		"<domain><devices><seclabel model='dac'><label>a:b</label></seclabel></devices></domain>",
	};
	char *user = domain_xml_user("<domain><seclabel type='dynamic' model='apparmor' relabel='yes'/>"
				     "<seclabel type='static' model='dac' relabel='no'>\n"
				     "<label>+1000:kvm</label></seclabel></domain>");
	size_t i;

	g_assert_cmpstr(user, ==, "+1000:kvm");
	g_free(user);
	for (i = 0; i < G_N_ELEMENTS(none); i++)
		g_assert_null(domain_xml_user(none[i]));
}

/* No path becomes more than one rule for that path */
static void test_apparmor_path(void)
{
	static const char *const paths[][2] = {
		{ "/run/kvmi/libvirt-1-2.sock", "\"/run/kvmi/@{profile_name}.sock\"" },
		{ "/run/libvirt-1-2/libvirt-1-2", "\"/run/@{profile_name}/@{profile_name}\"" },
		{ "/run/libvirt-1-3/a b,c", "\"/run/libvirt-1-3/a b,c\"" },
		{ "/a*b?[c]{d,e}^@{f}", "\"/a\\*b\\?\\[c\\]\\{d,e\\}\\^\\@\\{f\\}\"" },
		{ "/a\" rw, /** rwx,\\", "\"/a\\\" rw, /\\*\\* rwx,\\\\\"" },
	};
	size_t i;

	for (i = 0; i < G_N_ELEMENTS(paths); i++) {
		char *text = apparmor_path(paths[i][0], "libvirt-1-2");

		g_assert_cmpstr(text, ==, paths[i][1]);
		g_free(text);
	}
}

#define MARK " # kvmi libvirt, domain "

static void replaced(const char *before, const char *uuid, const char *rules, const char *after)
{
	char *text = apparmor_replace(before, uuid, rules);

	g_assert_cmpstr(text, ==, after);
	g_free(text);
}

static void test_apparmor_lines(void)
{
	static const char made[] = "# made by kvmi libvirt, which removes it with its last rule\n";
	static const char others[] = "  # mine\n\n  /x r,\n  /a r," MARK "b\n";
	char *with = g_strconcat(others, "  /s rw," MARK "a\n  /k r," MARK "a\n", NULL);
	char *lines = apparmor_lines(with, "a"), *text;

	g_assert_cmpstr(lines, ==, "  /s rw,\n  /k r,\n");
	g_free(lines);
	g_assert_null(apparmor_lines(with, "c"));
	/* other lines stay, and what goes can be put back */
	replaced(others, "a", "  /s rw,\n  /k r,\n", with);
	replaced(with, "a", NULL, others);
	replaced(with, "c", NULL, with);
	replaced(with, "a", "  /s rw,\n  /k r,\n", with);
	replaced("", "a", NULL, "");
	g_free(with);
	/* a file of ours comes with the first rule, and goes with the last one */
	replaced(NULL, "a", NULL, NULL);
	text = apparmor_replace(NULL, "a", "  /s rw,\n");
	g_assert_true(g_str_has_prefix(text, made));
	replaced(text, "a", NULL, NULL);
	g_free(text);
}

int main(int argc, char **argv)
{
	size_t i;

	g_test_init(&argc, &argv, NULL);
	for (i = 0; i < G_N_ELEMENTS(shapes); i++) {
		char *path = g_strconcat("/libvirt-xml/round-trip/", shapes[i].name, NULL);

		g_test_add_data_func(path, &shapes[i], test_round_trip);
		g_free(path);
	}
	g_test_add_func("/libvirt-xml/arguments", test_arguments);
	g_test_add_func("/libvirt-xml/changed-meanwhile", test_changed_meanwhile);
	g_test_add_func("/libvirt-xml/foreign", test_foreign);
	g_test_add_func("/libvirt-xml/no-domain", test_no_domain);
	g_test_add_func("/libvirt-xml/not-kvm", test_not_kvm);
	g_test_add_func("/libvirt-xml/capabilities", test_capabilities);
	g_test_add_func("/libvirt-xml/user", test_user);
	g_test_add_func("/libvirt-xml/apparmor-path", test_apparmor_path);
	g_test_add_func("/libvirt-xml/apparmor-lines", test_apparmor_lines);

	return g_test_run();
}
