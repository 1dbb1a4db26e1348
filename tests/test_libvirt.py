# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/libvirt_scenarios.py: the same as tests/test_scenarios.py, driven by Debian's libvirt."""
import pytest

import host
import libvirt_scenarios

pytestmark = pytest.mark.amd


# What is run without being asked for: the others take long
USUAL = ("libvirt_suspend_resume", "libvirt_enable_apparmor", "libvirt_capabilities")


def run_meanwhile(amd, name):
    host.libvirt_guest_image()
    # In a host of their own: the domain, which runs on after a scenario, and the guest of other tests would connect to the same tool
    return amd.run(["/usr/bin/python3", host.HERE / "libvirt_scenarios.py", name], libvirt_scenarios.SCENARIOS[name].timeout, kind="libvirt")


@pytest.mark.parametrize("name", [pytest.param(s, marks=() if s in USUAL else pytest.mark.long) for s in libvirt_scenarios.SCENARIOS])
def test_libvirt(meanwhile, name):
    print(meanwhile)
