/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What an exit costs: a guest that does nothing but CPUID.  With a third
 * argument ("hooked") there is a tool, which has made the vCPU's acquaintance and
 * now sits there.
 *
 * Prints the lower quartile of nanoseconds per exit over the batches.  On a
 * host whose clock counts instructions (QEMU's -icount, Bochs) these are
 * instructions times a constant.
 */
#include <stdbool.h>
#include <stdio.h>

#include "guest.h"
#include "tool.h"

int main(int argc, char **argv)
{
    /* 1: cpuid; dec ebp; jnz 1b; hlt */
    static const uint8_t code[] = {
        0x0f, 0xa2, 0x66, 0x4d, 0x75, 0xfa, 0xf4,
    };
    unsigned int exits = argc > 1 ? atoi(argv[1]) : 2000;
    unsigned int batches = argc > 2 ? atoi(argv[2]) : 20;
    bool hooked = argc > 3 && !strcmp(argv[3], "hooked");
    struct guest g;
    uint64_t *ns;

    if (!exits || !batches) {
        errx(2, "usage: exit_cost [EXITS-PER-BATCH [BATCHES [hooked]]]");
    }
    ns = calloc(batches, sizeof(*ns));
    if (!ns) {
        err(1, "calloc");
    }

    guest_create(&g, code, sizeof(code));
    if (hooked) {
        struct {
            struct kvmi_msg_hdr hdr;
            struct kvmi_vcpu_hdr vcpu;
        } msg = { .hdr = { .id = KVMI_VCPU_GET_INFO, .size = sizeof(msg.vcpu) } };

        /* The vCPU carries it out in the first batch; nobody reads the reply */
        write_all(tool_hook(&g), &msg, sizeof(msg));
    }
    for (unsigned int i = 0; i < batches; i++) {
        uint64_t start;

        guest_start(&g, exits);
        start = now_ns();
        if (ioctl(g.vcpu, KVM_RUN, 0)) {
            err(1, "KVM_RUN");
        }
        ns[i] = now_ns() - start;
        if (g.run->exit_reason != KVM_EXIT_HLT) {
            errx(1, "the guest left with exit reason %u", g.run->exit_reason);
        }
    }

    printf("{\"ns_per_exit\": %.2f}\n",
           (double)lower_quartile(ns, batches) / exits);
    return 0;
}
