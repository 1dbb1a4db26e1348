# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own tests of what our patches touch: run state, monitors, migration, watchdogs, and the kvmi object's unit test under valgrind."""
import os
import subprocess

import pytest

import host

pytestmark = [pytest.mark.unit, pytest.mark.long]

UNIT = ("test-aio", "test-bdrv-drain", "test-block-iothread", "test-char", "test-coroutine", "test-qmp-cmds", "test-qmp-event", "test-vmstate", "test-yank")
QTEST = ("cpu-plug-test", "machine-none-test", "migration-test", "pvpanic-test", "q35-test", "qmp-cmd-test", "qmp-test",
         "readconfig-test", "tco-test", "test-hmp", "wdt_ib700-test")
FOLDER = host.BUILD / "qemu/build"


def run(argv, timeout, **env):
    r = subprocess.run([str(a) for a in argv], cwd=FOLDER, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
                       env=dict(os.environ, **env))
    output = r.stdout.decode(errors="replace")
    print(output)
    assert r.returncode == 0, f"status {r.returncode}\n{output[-4000:]}"
    return output


@pytest.fixture(scope="module")
def built():
    host.need(FOLDER / "build.ninja", "build QEMU first")
    run(["ninja", *(f"tests/unit/{t}" for t in UNIT), *(f"tests/qtest/{t}" for t in QTEST)], 3600)


@pytest.mark.parametrize("name", UNIT)
def test_upstream_unit(built, name):
    assert "ok 1 " in run([f"tests/unit/{name}", "--tap", "-k"], 600)


@pytest.mark.parametrize("name", QTEST)
def test_upstream_qtest(built, name):
    # Not the one in the build folder: that looks for the firmware there
    found = run([f"tests/qtest/{name}", "--tap", "-k"], 3600, QTEST_QEMU_BINARY=str(host.BUILD / "qemu/bin/qemu-system-x86_64"),
                QTEST_QEMU_IMG=str(host.BUILD / "qemu/bin/qemu-img"))
    assert "ok 1 " in found and "not ok" not in found
    print(sum(line.startswith("ok ") and "# SKIP" not in line for line in found.splitlines()), "passed")


def test_upstream_valgrind():
    """The kvmi object's unit test: no bad memory access, nothing definitely lost."""
    run(["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite",
         host.BUILD / "qemu/tests/test-kvmi"], 900, G_SLICE="always-malloc")
