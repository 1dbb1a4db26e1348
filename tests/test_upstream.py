# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's own tests of what our patches touch: run state, monitors, migration, watchdogs, and the kvmi object's unit test under valgrind."""
import os
import subprocess

import pytest

import host

pytestmark = [pytest.mark.unit, pytest.mark.long]

UNIT = ("test-aio", "test-bdrv-drain", "test-block-iothread", "test-char", "test-coroutine", "test-qmp-cmds", "test-qmp-event", "test-vmstate", "test-yank")
QTEST = ("cpu-plug-test", "device-introspect-test", "machine-none-test", "migration-test", "pvpanic-test", "q35-test", "qmp-cmd-test", "qmp-test",
         "qom-test", "readconfig-test", "tco-test", "test-hmp", "wdt_ib700-test")
FAILOVER = "virtio-net-failover"
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


@pytest.fixture(scope="module")
def failover(built):
    """The test of who waits beside us in the state wait-unplug. QEMU builds it only with slirp, which it has behind its cards; a hub does it."""
    ours, like = f"tests/qtest/{FAILOVER}", "tests/qtest/migration-test"
    (FOLDER / f"{ours}.c").write_text((FOLDER / "../src" / f"{ours}.c").read_text().replace("-netdev user,", "-netdev hubport,hubid=0,"))
    commands = subprocess.run(["ninja", "-t", "commands", like], cwd=FOLDER, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
    for command in commands.splitlines():
        if f"{like}.p/migration-test.c.o" in command:
            run(["sh", "-c", command.replace(f"../src/{like}.c", f"{ours}.c").replace(f"{like}.p/migration-test.c.o", f"{ours}.c.o")
                 .replace(f"-o {like} ", f"-o {ours} ")], 300)


@pytest.mark.parametrize("name", (*QTEST, FAILOVER))
def test_upstream_qtest(built, failover, name):
    # Not the one in the build folder: that looks for the firmware there
    found = run([f"tests/qtest/{name}", "--tap", "-k"], 3600, QTEST_QEMU_BINARY=str(host.BUILD / "qemu/bin/qemu-system-x86_64"),
                QTEST_QEMU_IMG=str(host.BUILD / "qemu/bin/qemu-img"))
    assert "ok 1 " in found and "not ok" not in found
    print(sum(line.startswith("ok ") and "# SKIP" not in line for line in found.splitlines()), "passed")


def test_upstream_qapi_schema(built):
    """The generator takes what it should of the test schemas, and refuses the rest as it should."""
    assert "QAPI schema regression tests" in run(["pyvenv/bin/meson", "test", "--no-rebuild", "--suite", "qapi-schema"], 300)


def test_upstream_docs(tmp_path):
    """QEMU's documents, with our pages and QAPI's: Sphinx has nothing to complain of."""
    if subprocess.run(["/usr/bin/python3", "-c", "import sphinx, sphinx_rtd_theme"], stderr=subprocess.DEVNULL, timeout=60).returncode:
        pytest.skip("Sphinx is missing: apt install python3-sphinx python3-sphinx-rtd-theme")
    docs = (FOLDER / "../src/docs").resolve()
    run(["/usr/bin/python3", "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", docs, "-D", "version=10.0", "-D", "release=10.0",
         "-D", f"kerneldoc_srctree={docs.parent}", "-d", tmp_path / "doctrees", docs, tmp_path / "html"], 1800,
        SRCDIR=str(docs.parent), PYTHONDONTWRITEBYTECODE="1")
    for page, text in (("system/kvmi", "kvmi-unhook"), ("interop/kvmi", "kvmi-hmac-tool"), ("interop/qemu-qmp-ref", "query-kvmi")):
        assert text in (tmp_path / f"html/{page}.html").read_text(), page


def test_upstream_valgrind():
    """The kvmi object's unit test: no bad memory access, nothing definitely lost."""
    run(["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite", "--errors-for-leak-kinds=definite",
         host.BUILD / "qemu/tests/test-kvmi"], 900, G_SLICE="always-malloc")
