# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/fault.py: tools that fail, at each step of their life, in the AMD host; a few in the Intel host, and in
the AMD host with the debug kernel."""
import pytest

import fault
import host
import pack

HEAD = """| what happens to the guest | the tool was | how it failed | outcome | took, ms | slowest QMP answer, ms |
|---|---|---|---|--:|--:|
"""


@pytest.fixture(scope="session")
def matrix():
    rows = []
    yield rows
    if rows:
        path = host.BUILD / "host/faults.md"
        path.write_text(HEAD + "".join(f"| {' | '.join(r)} |\n" for r in rows))


# What is run without being asked for
USUAL = ("fault_running", "fault_stop")


def run_meanwhile(amd, name):
    host.guest_image()
    return amd.run(["/usr/bin/python3", host.HERE / "fault.py", name], fault.SCENARIOS[name].timeout)


@pytest.mark.amd
@pytest.mark.parametrize("name", [pytest.param(s, marks=() if s in USUAL else pytest.mark.long) for s in fault.SCENARIOS])
def test_fault(meanwhile, matrix, name):
    print(meanwhile)
    matrix += [line.split("\t")[1:] for line in meanwhile.splitlines() if line.startswith("MATRIX\t")]


@pytest.mark.intel
@pytest.mark.long
@pytest.mark.parametrize("name", fault.INTEL)
def test_fault_intel(tmp_path, name):
    print(pack.run(host.HERE / "fault.py", name, fault.INTEL[name].timeout, tmp_path))


@pytest.mark.debug
@pytest.mark.long
@pytest.mark.parametrize("name", USUAL)
def test_fault_debug(name):
    host.guest_image()
    output = bytearray()
    with host.Host("amd", kernel=host.need(host.DEBUG_KERNEL, "run scripts/build-debug-kernel")) as h:
        h.start(300)
        status = h.run(["/usr/bin/python3", host.HERE / "fault.py", name], 4 * fault.SCENARIOS[name].timeout, output.extend)
        trouble = h.trouble()
    print(output.decode(errors="replace"))
    assert not status and not trouble, f"status {status}\n{trouble}"
