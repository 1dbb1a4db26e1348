/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <libkvmi.h>

int main()
{
	kvmi_dom_event event = {};

	event.event.page_fault.access = KVMI_PAGE_ACCESS_W;
	kvmi_domain_close(nullptr, true);

	return kvmi_remote_mapping_v2() || event.seq;
}
