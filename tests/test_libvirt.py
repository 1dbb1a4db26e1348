# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/libvirt_scenarios.py: the same as tests/test_scenarios.py, driven by Debian's libvirt. test_libvirt11 are the same with
libvirt 11 in place of Debian 12's 9.0."""
import os

import pytest

import host
import libvirt_scenarios
from test_gate import note, write_matrix

pytestmark = pytest.mark.amd


# What is run without being asked for: the others take long
USUAL = ("libvirt_suspend_resume", "libvirt_enable_files", "libvirt_enable_offline", "libvirt_enable_apparmor", "libvirt_capabilities")

HEAD = """| virsh | tool | outcome | waited for it, ms | in all, ms | without a tool, ms |
|---|---|---|--:|--:|--:|
"""


@pytest.fixture(scope="session")
def matrices():
    """{libvirt or libvirt11: {name of a scenario: its rows}}, which are left in build/host"""
    found = {"libvirt": {}, "libvirt11": {}}
    yield found
    for which, scenarios in found.items():
        write_matrix(f"{which}.md", HEAD, libvirt_scenarios.SCENARIOS, scenarios)


def run_meanwhile(amd, name):
    host.libvirt_guest_image()
    if os.environ.get("KVMI_LONG"):
        host.build_stock_qemu()
    later, name = name.startswith("libvirt11"), name.replace("libvirt11_", "libvirt_")
    options = ["--libvirt", host.fetch_libvirt()] if later else []
    if name == "libvirt_apparmor_driver" and not later:
        options = ["--profiles", host.fetch_libvirt("--profiles")]
    # In a host of their own: the domain, which runs on after a scenario, and the guest of other tests would connect to the same tool
    return amd.run(["/usr/bin/python3", host.HERE / "libvirt_scenarios.py", *options, name], libvirt_scenarios.SCENARIOS[name].timeout,
                   kind="libvirt11" if later else "libvirt")


@pytest.mark.parametrize("name", [pytest.param(s, marks=() if s in USUAL else pytest.mark.long) for s in libvirt_scenarios.SCENARIOS])
def test_libvirt(meanwhile, matrices, name):
    note(matrices["libvirt"], name, meanwhile)


@pytest.mark.long
@pytest.mark.parametrize("name", [s.replace("libvirt_", "libvirt11_") for s in libvirt_scenarios.SCENARIOS])
def test_libvirt11(meanwhile, matrices, name):
    note(matrices["libvirt11"], name.replace("libvirt11_", "libvirt_"), meanwhile)
