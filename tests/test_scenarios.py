# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenarios of tests/host/scenarios.py: a real guest, our QEMU, our KVM and a tool, in the AMD host."""
import pytest

import host
import scenarios

pytestmark = pytest.mark.amd


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_scenario(amd, name):
    host.guest_image()
    scenario = scenarios.SCENARIOS[name]
    print(amd.run(["/usr/bin/python3", host.HERE / "scenarios.py", name], scenario.timeout))
    if not scenario.guest:
        amd.close()
