/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What it costs to take rights off many pages and to give them back, in time
 * and in memory of the host's kernel.  The pages are neighbours, or each is the
 * only one among 64.
 */
#include <stdio.h>

#include "guest.h"
#include "tool.h"

#define MEMORY_GPA  0x100000000ull
#define PER_MESSAGE 511
#define TIMEOUT_S   280

static void set_access(int tool, unsigned int first, unsigned int pages,
                       unsigned int step, uint8_t access)
{
    static struct {
        struct kvmi_vm_set_page_access req;
        struct kvmi_page_access_entry entries[PER_MESSAGE];
    } msg;

    msg.req.count = pages;
    for (unsigned int i = 0; i < pages; i++) {
        msg.entries[i].gpa = MEMORY_GPA + (first + i) * 4096ull * step;
        msg.entries[i].access = access;
    }
    command(tool, KVMI_VM_SET_PAGE_ACCESS, &msg,
            sizeof(msg.req) + pages * sizeof(msg.entries[0]));
}

static double set_all(int tool, unsigned int pages, unsigned int step,
                      uint8_t access)
{
    uint64_t start = now_ns();

    for (unsigned int i = 0; i < pages; i += PER_MESSAGE) {
        set_access(tool, i, pages - i < PER_MESSAGE ? pages - i : PER_MESSAGE,
                   step, access);
    }
    return pages / ((now_ns() - start) / 1e9);
}

/* What the nodes of all the kernel's radix trees take */
static double node_bytes(void)
{
    FILE *f = fopen("/proc/slabinfo", "r");
    unsigned long active, total, size;
    char line[256];

    if (!f) {
        err(1, "/proc/slabinfo");
    }
    while (fgets(line, sizeof(line), f)) {
        if (sscanf(line, "radix_tree_node %lu %lu %lu", &active, &total,
                   &size) == 3) {
            fclose(f);
            return (double)total * size;
        }
    }
    errx(1, "no radix_tree_node in /proc/slabinfo");
}

int main(int argc, char **argv)
{
    static const uint8_t code[] = { 0xf4 };
    unsigned int pages = argc > 1 ? atoi(argv[1]) : 1000000;
    unsigned int sparse = pages / 64;
    struct kvm_userspace_memory_region region = {
        .slot = 1,
        .guest_phys_addr = MEMORY_GPA,
        .memory_size = pages * 4096ull,
    };
    double before, take, give, bytes, sparse_take, sparse_bytes;
    struct guest g;
    void *mem;
    int tool;

    if (!sparse) {
        errx(2, "usage: page_access [PAGES]");
    }
    alarm(TIMEOUT_S);
    guest_create(&g, code, sizeof(code));
    mem = mmap(NULL, region.memory_size, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    region.userspace_addr = (uintptr_t)mem;
    if (mem == MAP_FAILED ||
        ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &region)) {
        err(1, "memory");
    }
    tool = tool_hook(&g);

    before = node_bytes();
    take = set_all(tool, pages, 1, KVMI_PAGE_ACCESS_R);
    bytes = node_bytes() - before;
    give = set_all(tool, pages, 1, KVMI_PAGE_ACCESS_R | KVMI_PAGE_ACCESS_W |
                                   KVMI_PAGE_ACCESS_X);

    sparse_take = set_all(tool, sparse, 64, KVMI_PAGE_ACCESS_R);
    sparse_bytes = node_bytes() - before;

    printf("{\"pages\": %u, \"take_per_s\": %.0f, \"give_per_s\": %.0f, "
           "\"bytes_per_page\": %.2f, \"sparse_pages\": %u, "
           "\"sparse_take_per_s\": %.0f, \"sparse_bytes_per_page\": %.2f}\n",
           pages, take, give, bytes / pages, sparse, sparse_take,
           sparse_bytes / sparse);
    return 0;
}
