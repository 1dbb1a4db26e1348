# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/fault.py: tools that fail, at each step of their life, in the AMD host; a few in the Intel host, and in
the AMD host with the debug kernel."""
import pytest

import fault
import host
import pack

HEAD = """| what happens to the guest | the tool was | how it failed | outcome | reason | took, ms | slowest QMP answer, ms |
|---|---|---|---|---|--:|--:|
"""


def rows_of(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()[2:]]


@pytest.fixture(scope="session")
def matrix():
    """{host: its rows}. A run of some of the tests leaves the others' rows as they are in build/host/faults-HOST.md."""
    found = {"amd": [], "intel": [], "debug": []}
    yield found
    for name, rows in found.items():
        path = host.BUILD / f"host/faults-{name}.md"
        ways = {r[0] for r in rows}
        old = [r for r in rows_of(path.read_text() if path.exists() else "") if r[0] not in ways]
        if rows:
            path.write_text(HEAD + "".join(f"| {' | '.join(r)} |\n" for r in old + rows))


def note(matrix, name, output):
    print(output)
    matrix[name] += [line.split("\t")[1:] for line in output.splitlines() if line.startswith("MATRIX\t")]


# What is not run without being asked for
ON_DEMAND = ("fault_savevm", "fault_quit")


def run_meanwhile(amd, name):
    host.guest_image()
    return amd.run(["/usr/bin/python3", host.HERE / "fault.py", name], fault.SCENARIOS[name].timeout)


@pytest.mark.amd
@pytest.mark.parametrize("name", [pytest.param(s, marks=pytest.mark.long if s in ON_DEMAND else ()) for s in fault.SCENARIOS])
def test_fault(meanwhile, matrix, name):
    note(matrix, "amd", meanwhile)


@pytest.mark.intel
@pytest.mark.long
@pytest.mark.parametrize("name", fault.SLOW)
def test_fault_intel(tmp_path, matrix, name):
    note(matrix, "intel", pack.run(host.HERE / "fault.py", name, fault.SLOW[name].timeout, tmp_path))


@pytest.mark.debug
@pytest.mark.long
@pytest.mark.parametrize("name", fault.SLOW)
def test_fault_debug(matrix, name):
    host.guest_image()
    output = bytearray()
    with host.Host("amd", kernel=host.need(host.DEBUG_KERNEL, "run scripts/build-debug-kernel")) as h:
        h.start(300)
        status = h.run(["/usr/bin/python3", host.HERE / "fault.py", name], fault.SLOW[name].timeout, output.extend)
        trouble = h.trouble() + h.leaks()
    note(matrix, "debug", output.decode(errors="replace"))
    assert not status and not trouble, f"status {status}\n{trouble}"
