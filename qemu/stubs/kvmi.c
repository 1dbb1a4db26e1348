/*
 * KVM introspection, where there is none
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-kvmi.h"

static void error_no_kvmi(Error **errp)
{
    error_set(errp, ERROR_CLASS_DEVICE_NOT_ACTIVE,
              "This QEMU is built without KVM introspection");
}

KvmiInfo *qmp_query_kvmi(Error **errp)
{
    error_no_kvmi(errp);
    return NULL;
}

void qmp_kvmi_unhook(bool has_deadline_ms, uint32_t deadline_ms, Error **errp)
{
    error_no_kvmi(errp);
}

void qmp_kvmi_hook(Error **errp)
{
    error_no_kvmi(errp);
}
