# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel tree's own selftests of KVM on our modules: a VM that nobody introspects is as on the stock ones.

On the AMD host one that fails on our modules runs on the stock ones, in another host: if it fails there too, that is
expected; if it doesn't, ours get a second try. Those that take long are skipped unless chosen by -k, or if KVMI_LONG=1
is in the environment.
"""
import os
import warnings

import pytest

import host
import kvm_selftests


def programs(*hosts):
    return [pytest.param(t, id=t.name) for t in kvm_selftests.selftests() if set(hosts) & set(t.hosts)]


@pytest.fixture(scope="session")
def run_on_amd():
    """A function that runs a selftest on our modules or on the stock ones."""
    kvm_selftests.build()
    hosts = {m: kvm_selftests.Amd(modules=m) for m in ("kvmi", "stock")}
    yield lambda modules, test: hosts[modules].run(test)
    for h in hosts.values():
        h.close()


@pytest.fixture(scope="session")
def debug_host():
    kvm_selftests.build()
    h = kvm_selftests.Amd(kernel=host.need(host.DEBUG_KERNEL, "run scripts/build-debug-kernel"))
    yield h
    h.close()


@pytest.mark.amd
@pytest.mark.parametrize("program", programs("amd", "amd-long"))
def test_kvm_selftest(run_on_amd, program, pytestconfig):
    if "amd" not in program.hosts and not os.environ.get("KVMI_LONG") and not pytestconfig.option.keyword:
        pytest.skip("takes long; KVMI_LONG=1 or its name makes it run")
    ours = run_on_amd("kvmi", program)
    if ours.verdict == "ok":
        return
    stock = run_on_amd("stock", program)
    if stock.verdict == ours.verdict == "skip":
        pytest.skip(f"skips itself on the stock modules too: {stock.output}")
    if stock.verdict != "ok":
        pytest.xfail(f"{ours}\nOn the stock modules:\n{stock}")
    # Some measure time, which a busy machine stretches
    if run_on_amd("kvmi", program).verdict == "ok":
        warnings.warn(f"{program.name} passed at the second try; the first said:\n{ours}")
        return
    pytest.fail(f"{ours}\nIt passes on the stock modules.", pytrace=False)


@pytest.mark.intel
@pytest.mark.parametrize("intel_program", programs("intel"))
def test_kvm_selftest_on_intel(intel_kvm_selftests, intel_program):
    result = intel_kvm_selftests[intel_program.name]
    if result.verdict != "ok":
        pytest.fail(f"{result}", pytrace=False)


@pytest.mark.debug
@pytest.mark.parametrize("program", programs("amd", "amd-long"))
def test_kvm_selftest_on_debug_kernel(debug_host, program):
    result = debug_host.run(program, factor=5)
    if result.verdict != "ok":
        pytest.fail(f"{result}", pytrace=False)
