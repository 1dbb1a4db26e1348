# SPDX-License-Identifier: GPL-2.0-or-later
"""pytest's set-up: the emulated hosts as fixtures, and the order of the tests."""
import os
import sys
import threading
import time
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
    if config.option.keyword:
        AmdHost.CHANCES = 0
    if not os.environ.get("KVMI_LONG") and not config.option.keyword:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long; KVMI_LONG=1 or its name makes it run"))
    items.sort(key=lambda i: ("meanwhile" in i.fixturenames,
                              min((n for n, m in enumerate(ORDER) if i.get_closest_marker(m)), default=len(ORDER))))


def background(jobs):
    """Runs the functions one after the other in a thread, each for its Future."""
    begin = time.monotonic()
    for future, function, *args in jobs:
        try:
            future.set_result(function(*args))
        except BaseException as e:      # raised by result(); pytest.fail() is none of Exception
            future.set_exception(e)
    background_amd.close()
    background_took.append(time.monotonic() - begin)


def pytest_terminal_summary(terminalreporter):
    if background_took:
        terminalreporter.write_line(f"in the background: {background_took[0]:.0f} s")


background_took = []
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
    """
    The AMD host that the tests share. One that failed is thrown away; the next test gets a new one.

    TCG has faults that nested guests meet once in many hours (qemu/patches has those that are understood). So in a run of all tests, as many as
    CHANCES get a second try, in a new host; who tries twice says so in pytest's summary. A test that is run by its name does not.
    """
    CHANCES = 5
    tried_twice = []

    def __init__(self):
        self.host = None
        self.kind = None

    def once(self, argv, timeout):
        """Runs the command; raises HostError if it fails or if the host's kernel complained meanwhile. Returns the output."""
        output = bytearray()

        def fail(what):
            raise host.HostError(f"{output.decode(errors='replace')}\n{what}")

        try:
            if not self.host:
                self.host = host.Host("amd")
                self.host.start()
            status = self.host.run(argv, timeout, output.extend, env={k: os.environ[k] for k in ("KVMI_LONG",) if k in os.environ})
            trouble = self.host.trouble()
        except host.HostError as e:
            fail(e)
        if trouble:
            fail(f"the host's kernel complained:\n{trouble}")
        if status:
            fail(f"status {status}" + (" (out of time)" if status in (124, 137) else ""))
        return output.decode(errors="replace")

    def run(self, argv, timeout, kind=None):
        """once(); fails the test if that fails. Each kind of command gets a host that has run no others."""
        if kind != self.kind:
            self.close()
            self.kind = kind
        try:
            return self.once(argv, timeout)
        except host.HostError as e:
            self.close()
            if len(self.tried_twice) >= self.CHANCES:
                pytest.fail(str(e), pytrace=False)
            self.tried_twice.append(argv[-1])
            first = str(e)
        try:
            output = self.once(argv, timeout)
        except host.HostError as e:
            self.close()
            pytest.fail(f"{e}\n--- the first time ---\n{first}", pytrace=False)
        said = first.partition("--- the guest's CPUs")[0][-3000:]
        warnings.warn(f"{argv[-1]} passed at the second try; the first said:\n{said}")
        return output

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
