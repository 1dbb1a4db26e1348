# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/gate.py: every way in which a guest can stop, with every kind of tool, in the AMD host."""
import pytest

import gate
import host

pytestmark = pytest.mark.amd

HEAD = """| how the guest stops | tool | outcome | until unhooked, ms | in all, ms | slowest QMP answer, ms |
|---|---|---|--:|--:|--:|
"""


@pytest.fixture(scope="module")
def matrix():
    rows = []
    yield rows
    if rows:
        path = host.BUILD / "host/matrix.md"
        path.write_text(HEAD + "".join(f"| {' | '.join(r)} |\n" for r in rows))


@pytest.mark.parametrize("name", gate.SCENARIOS)
def test_gate(amd, matrix, name):
    host.guest_image()
    output = amd.run(["/usr/bin/python3", host.HERE / "gate.py", name], gate.SCENARIOS[name].timeout)
    print(output)
    matrix += [line.split("\t")[1:] for line in output.splitlines() if line.startswith("MATRIX\t")]
