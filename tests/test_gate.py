# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/gate.py: every way in which a guest can stop, with every kind of tool, in the AMD host; and a few in the
Intel host."""
import ast
import re

import pytest

import gate
import host
import pack

HEAD = """| how the guest stops | tool | outcome | until unhooked, ms | in all, ms | slowest QMP answer, ms |
|---|---|---|--:|--:|--:|
"""


def pairs(table):
    """The (way, tool) of each row of a table"""
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| ")]
    return {(row[1], row[2]) for row in rows[1:]}


def documented():
    text = (host.TOP / "docs/stopping.md").read_text()
    return pairs(text.partition("<!-- BEGIN host/matrix.md -->")[2].partition("<!-- END -->")[0])


@pytest.fixture(scope="session")
def matrix():
    """{name of a scenario: its rows}"""
    found = {}
    yield found
    table = write_matrix("matrix.md", HEAD, gate.SCENARIOS, found)
    if gate.LONG and found.keys() == gate.SCENARIOS.keys():
        stale = pairs(table) ^ documented()
        assert not stale, f"docs/stopping.md differs in these rows; scripts/refresh-tables puts that right: {sorted(stale)}"


@pytest.fixture(scope="session")
def matrix_intel():
    found = {}
    yield found
    write_matrix("matrix-intel.md", HEAD, gate.INTEL, found)


def write_matrix(file, head, scenarios, found):
    """Returns it."""
    rows = [row for name in scenarios for row in found.get(name, ())]
    table = head + "".join(f"| {' | '.join(r)} |\n" for r in rows)
    if rows:
        (host.BUILD / "host" / file).write_text(table)
    return table


def subclasses(of):
    return [of] + [c for sub in of.__subclasses__() for c in subclasses(sub)]


def recorded():
    """Patterns for the ways that gate.py's scenarios record by name"""
    for call in ast.walk(ast.parse((host.HERE / "gate.py").read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) in ("record", "record_end"):
            name = call.args[0]
            if isinstance(name, (ast.Constant, ast.JoinedStr)):
                yield "".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in getattr(name, "values", [name]))


@pytest.mark.unit
def test_table_of_stopping():
    """All ways and all tools are in the docs, and no others are. That each combination is shows when a long run ends, see matrix()."""
    table = documented()
    ways, tools = ({c.name for c in subclasses(of)} - {None} for of in (gate.Way, gate.Tool))
    patterns, told = {re.escape(way) for way in ways} | set(recorded()), {way for way, _ in table}
    missing = [p for p in patterns if not any(re.fullmatch(p, way) for way in told)]
    assert not missing, f"not in docs/stopping.md: {sorted(missing)}"
    stale = [way for way in told if not any(re.fullmatch(p, way) for p in patterns)]
    assert not stale, f"only in docs/stopping.md: {sorted(stale)}"
    assert tools == {tool for _, tool in table if not tool.startswith("raw")}


LONG = ("gate_migrate_start_time_live", "gate_migrate_stock", "gate_suspend_with_hung_tool", "gate_suspend_with_others",
        "gate_suspend_woken_by_clock")
# Those that take the most time, run while pytest runs the others
MEANWHILE = ("gate_migrate_to_file", "gate_cut", "gate_shutdown", "gate_end_of_qemu", "gate_reset", "gate_background_snapshot",
             "gate_disk_and_network", "gate_crash", "gate_suspend", "gate_suspend_with_tool")


def names(wanted):
    return [pytest.param(s, marks=pytest.mark.long if s in LONG else ()) for s in gate.SCENARIOS if wanted(s)]


def run_meanwhile(amd, name):
    host.guest_image()
    return amd.run(["/usr/bin/python3", host.HERE / "gate.py", name], gate.SCENARIOS[name].timeout)


def note(matrix, name, output):
    print(output)
    matrix[name] = [line.split("\t")[1:] for line in output.splitlines() if line.startswith("MATRIX\t")]


@pytest.mark.amd
@pytest.mark.parametrize("name", names(lambda s: s not in MEANWHILE))
def test_gate(amd, matrix, name):
    if name == "gate_migrate_stock":
        host.build_stock_qemu()
    note(matrix, name, run_meanwhile(amd, name))


@pytest.mark.amd
@pytest.mark.parametrize("name", names(lambda s: s in MEANWHILE))
def test_gate_meanwhile(meanwhile, matrix, name):
    note(matrix, name, meanwhile)


@pytest.mark.intel
@pytest.mark.parametrize("name", [pytest.param(s, marks=() if s == "intel_panic" else pytest.mark.long) for s in gate.INTEL])
def test_gate_intel(matrix_intel, tmp_path, name):
    note(matrix_intel, name, pack.run(host.HERE / "gate.py", name, gate.INTEL[name].timeout, tmp_path))
