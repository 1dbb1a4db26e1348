# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest's set-up: the emulated hosts as fixtures, and the order of the tests."""
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "host"))
import host  # noqa: E402
import selftest  # noqa: E402

ORDER = ("unit", "amd", "intel")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: min((n for n, m in enumerate(ORDER) if i.get_closest_marker(m)), default=len(ORDER)))


class Background:
    """A function that runs while the other tests do; result() waits for it."""

    def __init__(self, function, *args):
        self.value = self.error = None
        self.thread = threading.Thread(target=self.work, args=(function, args), daemon=True)
        self.thread.start()

    def work(self, function, args):
        try:
            self.value = function(*args)
        except Exception as e:      # told to the test that asks for the result
            self.error = e

    def result(self):
        self.thread.join()          # the host has its own deadline
        if self.error:
            raise self.error
        return self.value


def pytest_collection_finish(session):
    # The Intel host is slow and uses one CPU: let it work while the AMD host's tests run.
    session.intel_selftest = None
    if not session.config.option.collectonly and any(i.get_closest_marker("intel") for i in session.items):
        session.intel_selftest = Background(selftest.run, "intel")


@pytest.fixture(scope="session")
def intel_selftest(request):
    return request.session.intel_selftest.result()


class AmdHost:
    """The AMD host that the tests share. One that failed is thrown away; the next test gets a new one."""

    def __init__(self):
        self.host = None

    def run(self, argv, timeout):
        """Runs the command; fails the test if it fails or if the host's kernel complained meanwhile. Returns the output."""
        output = bytearray()
        if not self.host:
            self.host = host.Host("amd").start()
        try:
            status = self.host.run(argv, timeout, output.extend)
            trouble = self.host.trouble()
        except host.HostError as e:
            self.close()
            pytest.fail(f"{output.decode(errors='replace')}\n{e}", pytrace=False)
        if trouble:
            self.close()
            pytest.fail(f"{output.decode(errors='replace')}\nthe host's kernel complained:\n{trouble}", pytrace=False)
        if status:
            pytest.fail(f"{output.decode(errors='replace')}\nstatus {status}" + (" (out of time)" if status in (124, 137) else ""), pytrace=False)
        return output.decode(errors="replace")

    def close(self):
        if self.host:
            self.host.close()
            self.host = None


@pytest.fixture(scope="session")
def amd():
    h = AmdHost()
    yield h
    h.close()


@pytest.fixture(scope="session")
def amd_selftest():
    return selftest.run("amd")
