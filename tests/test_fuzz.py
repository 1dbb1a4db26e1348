# SPDX-License-Identifier: GPL-2.0-or-later
"""The fuzzers of tests/fuzz: a hostile tool and a hostile guest in the real kernel, and what parses others' bytes. See
tests/fuzz/README.md."""
import subprocess
import warnings

import pytest

import host

FUZZER = host.BUILD / "tests/fuzz/kvmi_fuzz"


def fuzz(seed, seconds, options=(), timeout=150, kernel=None, vendor="amd"):
    """Returns the output, and how the emulator failed, or stood still. That says nothing about us: another seed gets its chance then, and
    a third."""
    failures = []
    for attempt in range(3):
        output = bytearray()
        try:
            with host.Host(vendor, kernel=kernel, threads="multi", files=[FUZZER]) as h:
                h.start()
                status = h.run([host.need(FUZZER, "build first"), str(seed + 100 * attempt), str(seconds), *options], timeout, output.extend)
                trouble = h.trouble() + (h.leaks() if kernel else "")
        except host.HostError as e:
            print(output.decode(errors="replace"))
            # The fuzzer says by itself what is HUNG. If it doesn't, not even the host's timers run.
            if not isinstance(e, host.EmulatorError) and ("did not end" not in str(e) or b"HUNG" in output):
                raise
            failures.append(f"seed {seed + 100 * attempt}: {e}")
            continue
        text = output.decode(errors="replace")
        assert not trouble, f"{text}\nthe host's kernel complained:\n{trouble}"
        assert not status, f"{text}\nstatus {status}"
        return text, failures
    pytest.fail("\n".join(["the emulator failed three times", *failures]))


def tell(result):
    text, failures = result
    print(text)
    for failure in failures:
        warnings.warn(failure)


def run_meanwhile(_):
    return fuzz(1, 120, timeout=300)


@pytest.mark.amd
def test_fuzz(meanwhile):
    tell(meanwhile)


@pytest.mark.intel
@pytest.mark.long
def test_fuzz_intel():
    tell(fuzz(1, 120, ("--bound", "200"), 3000, vendor="intel"))


@pytest.mark.debug
@pytest.mark.parametrize("seed", [1, 2, 3], ids="seed{}".format)
def test_fuzz_on_debug_kernel(seed):
    tell(fuzz(seed, 180, ("--bound", "90"), 800, host.need(host.DEBUG_KERNEL, "run scripts/build-debug-kernel")))


@pytest.mark.unit
@pytest.mark.parametrize("target", ["messages", "handshake"])
def test_libfuzzer(target):
    """Both build, and find nothing in a short time. What they have learnt is not kept: each run begins with nothing."""
    r = subprocess.run([host.TOP / "tests/fuzz/libfuzzer", target, "-seed=1", "-runs=20000"], stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    text = r.stdout.decode(errors="replace")
    if r.returncode == 77:
        pytest.skip(text.strip())
    assert not r.returncode and "Done 20000 runs" in text, f"status {r.returncode}\n{text[-6000:]}"
