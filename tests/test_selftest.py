# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel selftest (linux/tools/testing/selftests/kvm/x86_64/kvmi_test.c) on both hosts: kvmi_CASE[amd], kvmi_CASE[intel].
And on the AMD host with the debug kernel: kvmi_CASE[debug]."""
import pytest

import selftest

on_all_hosts = pytest.mark.parametrize("result", [pytest.param(v, marks=getattr(pytest.mark, v)) for v in ("amd", "intel", "debug")],
                                       indirect=True)


@pytest.fixture
def result(request):
    return request.getfixturevalue(f"{request.param}_selftest")


def make(case):
    @on_all_hosts
    def test(result):
        verdict, text = result.cases.get(case, ("not in the output", "kvmi_whole shows all of it"))
        if verdict == "skip":
            pytest.skip(text.splitlines()[-1])
        if verdict != "ok":
            pytest.fail(f"{case}: {verdict}\n{text}", pytrace=False)
    return test


for name in selftest.cases():
    globals()[f"kvmi_{name}"] = make(name)


@on_all_hosts
def kvmi_whole(result):
    """The host, its kernel's log, the program's status, and that each case in the output is known from the source."""
    if result.trouble:
        pytest.fail(f"{result.output}\n{result.trouble}", pytrace=False)
    missing, unknown = set(selftest.cases()) - set(result.cases), set(result.cases) - set(selftest.cases())
    if missing or unknown or not result.cases or result.status:
        pytest.fail(f"{result.output}\nstatus {result.status}; cases of the source that are not in the output: {sorted(missing)}; "
                    f"the other way round: {sorted(unknown)}", pytrace=False)


@pytest.mark.long
@pytest.mark.parametrize("vendor", [pytest.param(v, marks=getattr(pytest.mark, v)) for v in ("amd", "intel")])
def test_storm(vendor):
    """After 10 000 sessions, the host's kernel has no object, open file or task for each of them."""
    before, after = selftest.storm(vendor, 20)
    print(f"objects of the kernel, open files, tasks: {before}, {after}")
    assert all(a - b < most for a, b, most in zip(after, before, (2000, 500, 50))), f"{before} before, {after} after"
