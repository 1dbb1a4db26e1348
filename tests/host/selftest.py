# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel selftest, run once in a host: what each of its cases said."""
import re
import shlex

import host

SOURCE = host.TOP / "linux/tools/testing/selftests/kvm/x86_64/kvmi_test.c"
BINARY = host.BUILD / "linux/selftest/kvmi_test"
TIMEOUT = {"amd": 400, "intel": 900, "debug": 1800}     # several times what an idle machine needs


def cases():
    """The cases as the source has them, so that one that vanished from the output is missed."""
    text = SOURCE.read_text() if SOURCE.exists() else ""
    found = re.findall(r"^(?:TEST\((\w+)\)|TEST_F(?:_TIMEOUT)?\(\w+,\s*(\w+)|KVM_ONE_VCPU_TEST\(\w+,\s*(\w+))", text, re.M)
    return [next(filter(None, names)) for names in found]


def parse(output):
    """{case: (verdict, text)} of a TAP output; verdict is "ok", "not ok" or "skip", the text what led to it."""
    results = {}
    start = 0
    for m in re.finditer(r"^(ok|not ok) \d+ (?:- )?(\S+)(.*)$", output, re.M):
        skip = re.search(r"# *SKIP", m[3], re.I)
        results[m[2].split(".")[-1]] = ("skip" if skip and m[1] == "ok" else m[1], output[start:m.end()].strip())
        start = m.end() + 1
    return results


class Result:
    """trouble: what was wrong with the host, empty if nothing was."""

    def __init__(self, status, output, trouble):
        self.status, self.output, self.trouble = status, output, trouble
        self.cases = parse(output)


# Some MiB of swap space for a case that wants its memory swapped out
SWAP = "{ [ -b /dev/ram0 ] || insmod $KVMI_BUILD/linux/stock/brd.ko rd_nr=1 rd_size=4096; } && busybox mkswap /dev/ram0 >/dev/null && busybox swapon /dev/ram0 || exit 100\n"

# Some cases are about KVM with the parameter off, and skip themselves otherwise: they get a run of their own, at the end.
SCRIPT = """\
{test}; on=$?
[ ! -f /run/vm-holder.pid ] || kill $(cat /run/vm-holder.pid)
for i in 1 2 3 4 5 6 7 8 9 10; do rmmod kvm-{vendor} && break; sleep 0.2; done 2>/dev/null
rmmod kvm && insmod $KVMI_MODULES/kvm.ko introspection=0 && insmod $KVMI_MODULES/kvm-{vendor}.ko || exit 100
{test} -f kvmi_off; off=$?
[ $on = 0 ] && exit $off
exit $on
"""


def run(vendor):
    output = bytearray()
    status = None
    try:
        test = host.need(BINARY, "build the selftest first")
        with host.Host(vendor, files=[test], threads="multi") as h:
            h.start()
            script = SCRIPT.format(test=shlex.quote(str(test)), vendor=vendor)
            status = h.run(["sh", "-c", (SWAP if vendor == "amd" else "") + script], TIMEOUT[vendor], output.extend)
            trouble = h.trouble()
            if trouble:
                trouble = f"the host's kernel complained:\n{trouble}"
    except host.HostError as e:
        trouble = str(e)
    return Result(status, output.decode(errors="replace"), trouble)


def run_debug():
    """On the AMD host with the debug kernel. That has KVM built in: the run with the parameter off takes another boot."""
    output = bytearray()
    statuses = []
    trouble = ""
    try:
        test = host.need(BINARY, "build the selftest first")
        kernel = host.need(host.DEBUG_KERNEL, "run scripts/build-debug-kernel")
        for kvm_args, options in (("introspection=1", ""), ("introspection=0", " -f kvmi_off")):
            with host.Host("amd", kernel=kernel, kvm_args=kvm_args, threads="multi") as h:
                h.start(300)
                statuses.append(h.run(["sh", "-c", SWAP + shlex.quote(str(test)) + options], TIMEOUT["debug"], output.extend))
                trouble += h.trouble() + h.leaks()
        if trouble:
            trouble = f"the host's kernel complained:\n{trouble}"
    except host.HostError as e:
        trouble = str(e)
    return Result(max(statuses, default=None), output.decode(errors="replace"), trouble)


# 500 sessions each time; the first fills the caches
STORM = """
objects() {{
    sync; echo 3 >/proc/sys/vm/drop_caches
    awk '/^kmalloc|^radix_tree_node|^task_struct|^sock_inode_cache|^skbuff_head_cache/ {{ n += $2 }} END {{ print n }}' /proc/slabinfo
    cut -f 1 /proc/sys/fs/file-nr
    cut -d / -f 2 /proc/loadavg | cut -d " " -f 1
}}
{test} -t unhook_storm >/dev/null || exit
before=$(objects)
i=0
while [ $i -lt {times} ]; do {test} -t unhook_storm >/dev/null || exit; i=$((i + 1)); done
echo $before $(objects)
"""


def storm(vendor, times, kernel=None):
    """[objects of the host's kernel, open files, tasks] before and after this many storms of sessions."""
    output = bytearray()
    test = host.need(BINARY, "build the selftest first")
    with host.Host(vendor, files=[test], **({"kernel": kernel} if kernel else {})) as h:
        h.start(300)
        status = h.run(["sh", "-c", STORM.format(test=shlex.quote(str(test)), times=times)], 1500, output.extend)
        trouble = h.trouble()
    if status or trouble:
        raise host.HostError(f"status {status}\n{output.decode(errors='replace')}\n{trouble}")
    numbers = [int(n) for n in output.split()[-6:]]
    return numbers[:3], numbers[3:]
