# SPDX-License-Identifier: GPL-2.0-or-later
"""What "ninja install" installs, in a folder of its own: programs are compiled with it as its users do it, and run."""
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import host
from test_python import sim  # noqa: F401 (a fixture)

pytestmark = pytest.mark.unit


class Installed:
    def __init__(self, root):
        self.root = root
        host.need(host.BUILD / "build.ninja", "build first")
        subprocess.run(["/usr/bin/python3", "-m", "mesonbuild.mesonmain", "install", "--no-rebuild", "--destdir", root], cwd=host.BUILD,
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, check=True)
        for pc in root.rglob("*.pc"):       # as if that had been the prefix
            pc.write_text(re.sub(r"^prefix=", f"prefix={root}", pc.read_text(), flags=re.M))
        # nothing of the build folder is to be found by accident
        self.env = {"PATH": os.environ["PATH"], "PKG_CONFIG_PATH": str(self.one("kvmi-2.pc").parent),
                    "LD_LIBRARY_PATH": str(self.one("libkvmi-2.so.0").parent)}

    def one(self, name):
        found = list(self.root.rglob(name))
        assert len(found) == 1, f"{name}: {found}"
        return found[0]

    def run(self, *argv, cwd=None, status=0):
        r = subprocess.run([str(a) for a in argv], cwd=cwd, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           timeout=60)
        assert r.returncode == status, f"{argv}: status {r.returncode}\n{r.stdout.decode()}"
        return r.stdout.decode()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("root"))


def test_install_example(installed, sim, tmp_path):  # noqa: F811
    """The first tool, compiled by the command in its head; it prints ten changes of CR3 and goes."""
    source = host.TOP / "examples/first-tool.c"
    command, = re.findall(r"^ \*\t(cc .*)$", source.read_text(), re.M)
    shutil.copy(source, tmp_path)
    installed.run("sh", "-ec", command.replace("cc ", "cc -Wall -Wextra -Werror ", 1), cwd=tmp_path)
    path = tmp_path / "socket"
    tool = subprocess.Popen([tmp_path / "first-tool", path], env=installed.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def until(check):
        end = time.monotonic() + 60
        while not check():
            assert tool.poll() is None and time.monotonic() < end, tool.stdout.read()
            time.sleep(0.01)

    try:
        until(path.exists)
        peer = sim.client_sim_new(str(path).encode())
        until(lambda: sim.client_sim_subscribed(peer))
        for n in range(10):
            sim.client_sim_event(peer, 7)       # of vCPU 1: CR
            until(lambda: sim.client_sim_replies(peer) == n + 1 or n == 9)
        said, _ = tool.communicate(timeout=60)
    finally:
        tool.kill()
    assert tool.returncode == 0 and said.count(b"vCPU 1: CR3 0x5 -> 0x6\n") == 10, said
    sim.client_sim_free(peer)


COMPAT = """
#include <stdio.h>
#include <libkvmi.h>

static int guest(void *dom, unsigned char (*uuid)[16], void *context)
{
	return !dom || !uuid || context;
}

int main(void)
{
	void *ctx = kvmi_init_unix_socket("socket", guest, NULL, NULL);
	struct kvmi_dom_event *event = NULL;

	printf("%d %zu\\n", KVMI_EVENT_BREAKPOINT, sizeof(event->event));
	kvmi_uninit(ctx);
	return !ctx;
}
"""

GLIB = """
#include <kvmi/hooks.h>
#include <kvmi/kvmi-glib.h>

int main(void)
{
	struct kvmi_hooks *hooks = kvmi_hooks_new(NULL, NULL, NULL);

	kvmi_hooks_free(hooks);
	return !hooks;
}
"""


@pytest.mark.parametrize("package, source", [("libkvmi", COMPAT), ("kvmi-2-glib", GLIB)], ids=["libkvmi", "glib"])
def test_install_compile(installed, tmp_path, package, source):
    (tmp_path / "program.c").write_text(source)
    installed.run("sh", "-ec", f"cc -Wall -Werror program.c $(pkg-config --cflags --libs {package}) -o program", cwd=tmp_path)
    installed.run(tmp_path / "program", cwd=tmp_path)


def test_install_client(installed, tmp_path):
    """A whole tool of the older library's."""
    installed.run("sh", "-ec", f"cc -D_GNU_SOURCE -pthread -Wall -Werror {host.HERE}/client.c $(pkg-config --cflags --libs libkvmi) -o client", cwd=tmp_path)


def test_install_tool(installed):
    assert re.fullmatch(r"kvmi \d+\.\d+\.\d+\n", installed.run(installed.one("kvmi.1").parents[3] / "bin/kvmi", "--version"))
    for name in ("libkvmi-2.7", "kvmi_vm_connect.3", "kvmi.bash"):
        installed.one(name)


def test_install_python(installed):
    module = Path(installed.one("kvmi.py"))
    said = installed.run("/usr/bin/python3", "-B", "-c", f"import sys; sys.path.insert(0, '{module.parent}'); import kvmi; print(kvmi.__file__, kvmi.Hooks())")
    assert str(module) in said and "Hooks" in said, said
