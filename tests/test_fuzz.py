# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzer of tests/fuzz: a hostile tool and a hostile guest in the real kernel. See tests/fuzz/README.md."""
import pytest

import host

FUZZER = host.BUILD / "tests/fuzz/kvmi_fuzz"


@pytest.mark.amd
def test_fuzz(amd):
    print(amd.run([host.need(FUZZER, "build first"), "1", "80"], 200))


@pytest.mark.debug
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fuzz_on_debug_kernel(seed):
    output = bytearray()
    with host.Host("amd", kernel=host.need(host.DEBUG_KERNEL, "run scripts/build-debug-kernel")) as h:
        h.start(300)
        status = h.run([host.need(FUZZER, "build first"), str(seed), "180", "--bound", "90"], 800, output.extend)
        trouble = h.trouble()
    print(output.decode(errors="replace"))
    assert not trouble, f"the host's kernel complained:\n{trouble}"
    assert not status, f"status {status}"
