/*
 * KVM introspection, where there is none
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-kvmi.h"

KvmiInfo *qmp_query_kvmi(Error **errp)
{
    error_set(errp, ERROR_CLASS_DEVICE_NOT_ACTIVE,
              "This QEMU is built without KVM introspection");
    return NULL;
}
