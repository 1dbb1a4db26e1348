# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest's set-up: the emulated hosts as fixtures, and the order of the tests."""
import os
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "host"))
import host  # noqa: E402
import kvm_selftests  # noqa: E402
import selftest  # noqa: E402

ORDER = ("unit", "amd", "intel", "debug")


def pytest_collection_modifyitems(config, items):
    if not os.environ.get("KVMI_LONG") and not config.option.keyword:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; KVMI_LONG=1 or its name makes it run"))
    items.sort(key=lambda i: min((n for n, m in enumerate(ORDER) if i.get_closest_marker(m)), default=len(ORDER)))


def background(jobs):
    """Runs the functions one after the other in a thread, each for its Future."""
    for future, function, *args in jobs:
        try:
            future.set_result(function(*args))
        except Exception as e:      # raised by result()
            future.set_exception(e)


intel_result, intel_kvm_result = Future(), Future()


def pytest_collection_finish(session):
    # The Intel host is slow and uses one CPU: let it work while the AMD host's tests run.
    items = [i for i in session.items if i.get_closest_marker("intel")]
    if session.config.option.collectonly or not items:
        return
    kvms = [i.callspec.params["intel_program"] for i in items if "intel_program" in i.fixturenames]
    jobs = [(intel_kvm_result, kvm_selftests.run_on_intel, kvms)] if kvms else []
    if len(items) > len(kvms):
        jobs.insert(0, (intel_result, selftest.run, "intel"))
    threading.Thread(target=background, args=(jobs,), daemon=True).start()


@pytest.fixture(scope="session")
def intel_selftest():
    return intel_result.result()        # not for ever: the host has its deadline


@pytest.fixture(scope="session")
def intel_kvm_selftests():
    return intel_kvm_result.result()


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


@pytest.fixture(scope="session")
def debug_selftest():
    return selftest.run_debug()
