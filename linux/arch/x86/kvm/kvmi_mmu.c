// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection on x86: what the guest may do with its memory
 */
#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>

#include "../../../virt/kvm/introspection/kvmi_int.h"
#include "x86.h"
