# SPDX-License-Identifier: GPL-2.0-or-later
"""The unit tests in C, each program one test: those of the library and the tool, and QEMU's."""
import os
import subprocess

import pytest

import host

pytestmark = pytest.mark.unit


def programs():
    folder = host.BUILD / "tests/unit"
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and os.access(p, os.X_OK)] if folder.is_dir() else []
    return [*found, host.BUILD / "qemu/tests/test-kvmi", host.BUILD / "qemu/tests/fuzz-kvmi"]


@pytest.mark.parametrize("program", programs(), ids=lambda p: p.name)
def test_unit(program):
    host.need(program, "build first")
    env = dict(os.environ, LD_LIBRARY_PATH=str(host.BUILD / "lib"))
    r = subprocess.run([program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, env=env)
    assert r.returncode == 0, f"status {r.returncode}\n{r.stdout.decode(errors='replace')}"


@pytest.mark.parametrize("ours, qemus", [("linux/include/uapi/linux/kvmi.h", "qemu/linux-headers/linux/kvmi.h"),
                                         ("linux/arch/x86/include/uapi/asm/kvmi.h", "qemu/linux-headers/asm-x86/kvmi.h")],
                         ids=["kvmi.h", "asm-kvmi.h"])
def test_qemu_has_the_kernels_header(ours, qemus):
    # QEMU keeps copies of the kernel's headers, as of all others
    assert (host.TOP / ours).read_bytes() == (host.TOP / qemus).read_bytes(), f"copy {ours} to {qemus}"


def test_the_documents_layouts_are_the_headers():
    r = subprocess.run([host.TOP / "scripts/kvmi-layout", "--check"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert r.returncode == 0, r.stderr.decode(errors="replace")
