/*
 * KVM introspection: HMP commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "monitor/hmp.h"
#include "monitor/monitor.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-kvmi.h"
#include "qobject/qdict.h"

static void print_names(Monitor *mon, const char *what, const strList *names)
{
    monitor_printf(mon, "%s:", what);
    for (; names; names = names->next) {
        monitor_printf(mon, " %s", names->value);
    }
    monitor_printf(mon, "\n");
}

static void print_time(Monitor *mon, const char *what, int64_t us)
{
    g_autoptr(GDateTime) time = g_date_time_new_from_unix_local(
        us / G_USEC_PER_SEC);
    g_autofree char *text = g_date_time_format(time, "%F %T");

    monitor_printf(mon, "%s %s", what, text);
}

void hmp_info_kvmi(Monitor *mon, const QDict *qdict)
{
    Error *err = NULL;
    KvmiInfo *info = qmp_query_kvmi(&err);

    if (hmp_handle_error(mon, err)) {
        return;
    }

    monitor_printf(mon, "%s: %s", info->id, KvmiState_str(info->state));
    print_time(mon, " since", info->since);
    monitor_printf(mon, "%s\n", info->detached ? ", tools are kept away by"
                                                 " kvmi-unhook" : "");
    monitor_printf(mon, "tool: %s (chardev %s), authentication: %s\n",
                   info->peer, info->chardev,
                   info->has_auth ? KvmiAuth_str(info->auth) : "none");
    monitor_printf(mon, "protocol: version %" PRIu32 "\n",
                   info->protocol_version);
    monitor_printf(mon, "timeouts: handshake %" PRIu32 " ms, unhook %" PRIu32
                   " ms, silence %" PRIu32 " ms\n",
                   info->handshake_timeout_ms, info->unhook_timeout_ms,
                   info->silence_timeout_ms);
    print_names(mon, "commands", info->commands);
    print_names(mon, "events", info->events);
    monitor_printf(mon, "sessions: %" PRIu64 "; ended clean %" PRIu64
                   ", forced %" PRIu64 ", not-subscribed %" PRIu64
                   ", disconnected %" PRIu64 "\n", info->sessions,
                   info->unhooks->clean, info->unhooks->forced,
                   info->unhooks->not_subscribed, info->unhooks->disconnected);
    if (info->last_unhook) {
        monitor_printf(mon, "last unhook: %s by %s after %" PRId64 " us",
                       KvmiOutcome_str(info->last_unhook->outcome),
                       KvmiAction_str(info->last_unhook->action),
                       info->last_unhook->duration);
        if (info->last_unhook->has_restored) {
            monitor_printf(mon, ", %" PRIu64 " bytes restored",
                           info->last_unhook->restored);
        }
        monitor_printf(mon, "\n");
    }
    if (info->last_error) {
        monitor_printf(mon, "last error: %s\n", info->last_error);
    }
    qapi_free_KvmiInfo(info);
}
