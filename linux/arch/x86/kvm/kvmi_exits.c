// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM introspection on x86: the instructions that it intercepts
 */
#include <linux/kvm_host.h>
#include <linux/kvmi_host.h>

#include "../../../virt/kvm/introspection/kvmi_int.h"
#include "x86.h"
