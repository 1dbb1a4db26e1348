# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/libvirt_scenarios.py: the same as tests/test_scenarios.py, driven by Debian's libvirt."""
import pytest

import host
import libvirt_scenarios

pytestmark = pytest.mark.amd


@pytest.mark.parametrize("name", libvirt_scenarios.SCENARIOS)
def test_libvirt(amd, name):
    host.libvirt_guest_image()
    scenario = libvirt_scenarios.SCENARIOS[name]
    print(amd.run(["/usr/bin/python3", host.HERE / "libvirt_scenarios.py", name], scenario.timeout))
