# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest's set-up: the emulated hosts as fixtures, and the order of the tests."""
import os
import sys
import threading
import warnings
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
    items.sort(key=lambda i: ("meanwhile" in i.fixturenames,
                              min((n for n, m in enumerate(ORDER) if i.get_closest_marker(m)), default=len(ORDER))))


def background(jobs):
    """Runs the functions one after the other in a thread, each for its Future."""
    for future, function, *args in jobs:
        try:
            future.set_result(function(*args))
        except BaseException as e:      # raised by result(); pytest.fail() is none of Exception
            future.set_exception(e)
    background_amd.close()


intel_result, intel_kvm_result, amd_result = Future(), Future(), Future()
meanwhile_results = {}


def pytest_collection_finish(session):
    # The hosts use one CPU or little more: some tests are run in a thread while pytest runs the others. The Intel host first, it is slow.
    if session.config.option.collectonly:
        return
    items = [i for i in session.items if not i.get_closest_marker("skip")]
    jobs = []
    results = {i.callspec.params["result"] for i in items if "result" in i.fixturenames}
    if "intel" in results:
        jobs.append((intel_result, selftest.run, "intel"))
    kvms = [i.callspec.params["intel_program"] for i in items if "intel_program" in i.fixturenames]
    if kvms:
        jobs.append((intel_kvm_result, kvm_selftests.run_on_intel, kvms))
    if "amd" in results:
        jobs.append((amd_result, selftest.run, "amd"))
    for i in items:
        if "meanwhile" in i.fixturenames:
            meanwhile_results[i.nodeid] = Future()
            jobs.append((meanwhile_results[i.nodeid], i.module.run_meanwhile, background_amd, *getattr(i, "callspec", NoParams).params.values()))
    threading.Thread(target=background, args=(jobs,), daemon=True).start()


class NoParams:
    params = {}


# None of them waits for ever: the hosts have their deadlines.

@pytest.fixture(scope="session")
def intel_selftest():
    return intel_result.result()


@pytest.fixture(scope="session")
def intel_kvm_selftests():
    return intel_kvm_result.result()


@pytest.fixture(scope="session")
def amd_selftest():
    return amd_result.result()


@pytest.fixture
def meanwhile(request):
    """What the test's module returned from run_meanwhile(host, *parameters), which ran in the thread."""
    return meanwhile_results[request.node.nodeid].result()


class AmdHost:
    """The AMD host that the tests share. One that failed is thrown away; the next test gets a new one."""

    def __init__(self):
        self.host = None

    def run(self, argv, timeout, again=False):
        """Runs the command; fails the test if it fails or if the host's kernel complained meanwhile. Returns the output."""
        output = bytearray()
        try:
            if not self.host:
                self.host = host.Host("amd")
                self.host.start()
            status = self.host.run(argv, timeout, output.extend, env={k: os.environ[k] for k in ("KVMI_LONG",) if k in os.environ})
            trouble = self.host.trouble()
        except host.EmulatorError as e:
            self.close()
            if again:
                pytest.fail(f"{output.decode(errors='replace')}\nthe second time, too: {e}", pytrace=False)
            warnings.warn(f"once more after {' '.join(map(str, argv[-2:]))}: {e}")
            return self.run(argv, timeout, again=True)
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


background_amd = AmdHost()


@pytest.fixture(scope="session")
def amd():
    h = AmdHost()
    yield h
    h.close()


@pytest.fixture(scope="session")
def debug_selftest():
    return selftest.run_debug()
