# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/fault.py: tools that fail, at each step of their life, in the AMD host."""
import pytest

import fault
import host

pytestmark = pytest.mark.amd

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


@pytest.mark.parametrize("name", [pytest.param(s, marks=() if s in USUAL else pytest.mark.long) for s in fault.SCENARIOS])
def test_fault(meanwhile, matrix, name):
    print(meanwhile)
    matrix += [line.split("\t")[1:] for line in meanwhile.splitlines() if line.startswith("MATRIX\t")]
