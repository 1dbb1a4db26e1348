# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel tree's own selftests of KVM that tests/kvm-selftests lists: they know nothing of introspection."""
import re
import shlex
import subprocess
from collections import namedtuple
from pathlib import Path

import host

LIST = host.TOP / "tests/kvm-selftests"
PROGRAMS = host.BUILD / "linux/selftest/kvm"
SKIP = 4        # KSFT_SKIP

Selftest = namedtuple("Selftest", "name hosts seconds argv")


class Outcome(namedtuple("Outcome", "status output trouble")):
    """trouble: what was wrong with the host, empty if nothing was."""

    @property
    def verdict(self):
        return "not ok" if self.trouble else {0: "ok", SKIP: "skip"}.get(self.status, "not ok")

    def __str__(self):
        late = " (out of time)" if self.status in (124, 137, 143) else ""
        return f"{self.output}\nstatus {self.status}{late}\n{self.trouble}"


def selftests():
    found = []
    for line in LIST.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            name = Path(words[2]).name
            known = sum(t.name.split(".")[0] == name for t in found)
            found.append(Selftest(f"{name}.{known + 1}" if known else name, words[0].split(","), int(words[1]),
                                  [str(PROGRAMS / name), *words[3:]]))
    return found


def build():
    r = subprocess.run([host.TOP / "scripts/build-linux", f"--build={host.BUILD}", "kvm-selftests"], stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    if r.returncode:
        raise host.HostError(r.stdout.decode(errors="replace"))


class Amd:
    """An AMD host of their own. One that failed is thrown away; the next one to run gets a new one."""

    def __init__(self, **options):
        self.options = options
        self.host = None

    def run(self, test, factor=1):
        output = bytearray()
        status = None
        try:
            if not self.host:
                self.host = host.Host("amd", **self.options)
                self.host.start(120 * factor)
            status = self.host.run(test.argv, test.seconds * factor, output.extend, cwd="/tmp")
            trouble = self.host.trouble()
            if trouble:
                trouble = f"the host's kernel complained:\n{trouble}"
        except (host.HostError, OSError) as e:
            trouble = str(e)
        if trouble or status in (124, 137):     # children of one that was killed may still run
            self.close()
        return Outcome(status, output.decode(errors="replace"), trouble)

    def close(self):
        if self.host:
            self.host.close()
            self.host = None


def run_on_intel(tests, **options):
    """{name: Outcome}; all in one boot, as that takes long. Trouble of the host is that of the last one that ran."""
    if not tests:
        return {}
    output = bytearray()
    try:
        build()
        script = "".join(f"timeout -k 5 {t.seconds} {shlex.join(t.argv)}; printf '\\n@@ %s %d\\n' {t.name} $?\n" for t in tests)
        with host.Host("intel", files={t.argv[0] for t in tests}, **options) as h:
            h.run(["sh", "-c", script], 120 + sum(t.seconds for t in tests), output.extend)
            trouble = h.trouble()
            if trouble:
                trouble = f"the host's kernel complained:\n{trouble}"
    except host.HostError as e:
        trouble = str(e)
    results = {}
    at = 0
    output = output.decode(errors="replace")
    for m in re.finditer(r"^@@ (\S+) (\d+)\n", output, re.M):
        results[m[1]] = Outcome(int(m[2]), output[at:m.start()], "")
        at = m.end()
    if trouble:
        blamed = next((t.name for t in tests if t.name not in results), tests[-1].name)
        results[blamed] = Outcome(None, output[at:], trouble)
        for t in tests:
            results.setdefault(t.name, Outcome(None, "", "did not run: the host failed before"))
    return results
