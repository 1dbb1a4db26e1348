# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest's set-up: the emulated hosts as fixtures, and the order of the tests."""
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "host"))
import host  # noqa: E402
import selftest  # noqa: E402

ORDER = ("unit", "amd", "intel")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda i: min((n for n, m in enumerate(ORDER) if i.get_closest_marker(m)), default=len(ORDER)))


intel_result = Future()


def run_on_intel():
    try:
        intel_result.set_result(selftest.run("intel"))
    except Exception as e:      # raised by result()
        intel_result.set_exception(e)


def pytest_collection_finish(session):
    # The Intel host is slow and uses one CPU: let it work while the AMD host's tests run.
    if not session.config.option.collectonly and any(i.get_closest_marker("intel") for i in session.items):
        threading.Thread(target=run_on_intel, daemon=True).start()


@pytest.fixture(scope="session")
def intel_selftest():
    return intel_result.result()        # not for ever: the host has its deadline


class AmdHost:
    """The AMD host that the tests share. One that failed is thrown away; the next test gets a new one."""

    def __init__(self):
        self.host = None

    def run(self, argv, timeout):
        """Runs the command; fails the test if it fails or if the host's kernel complained meanwhile. Returns the output."""
        output = bytearray()
        try:
            if not self.host:
                self.host = host.Host("amd")
                self.host.start()
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
