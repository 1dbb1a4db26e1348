# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel selftest (linux/tools/testing/selftests/kvm/x86_64/kvmi_test.c) on both hosts: kvmi_CASE[amd], kvmi_CASE[intel]."""
import pytest

import selftest

on_both_hosts = pytest.mark.parametrize("result", [pytest.param(v, marks=getattr(pytest.mark, v)) for v in ("amd", "intel")],
                                        indirect=True)


@pytest.fixture
def result(request):
    return request.getfixturevalue(f"{request.param}_selftest")


def make(case):
    @on_both_hosts
    def test(result):
        verdict, text = result.cases.get(case, ("not in the output", "kvmi_whole shows all of it"))
        if verdict == "skip":
            pytest.skip(text.splitlines()[-1])
        if verdict != "ok":
            pytest.fail(f"{case}: {verdict}\n{text}", pytrace=False)
    return test


for name in selftest.cases():
    globals()[f"kvmi_{name}"] = make(name)


@on_both_hosts
def kvmi_whole(result):
    """The host, its kernel's log, the program's status, and that each case in the output is known from the source."""
    if result.trouble:
        pytest.fail(f"{result.output}\n{result.trouble}", pytrace=False)
    if result.status or set(result.cases) != set(selftest.cases()) or not result.cases:
        pytest.fail(f"status {result.status}, {len(result.cases)} results for {len(selftest.cases())} cases\n{result.output}", pytrace=False)
