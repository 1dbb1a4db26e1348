# SPDX-License-Identifier: GPL-2.0-or-later
"""The unit tests in C, each program one test: those of the library and the tool, and QEMU's."""
import os
import re
import shutil
import subprocess

import pytest

import host

pytestmark = pytest.mark.unit


def programs():
    folder = host.BUILD / "tests/unit"
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and os.access(p, os.X_OK) and p.suffix != ".so"] if folder.is_dir() else []
    return [*found, *(host.BUILD / "qemu/tests" / name for name in ("test-kvmi", "test-kvmi-asan", "fuzz-kvmi"))]


@pytest.mark.parametrize("program", programs(), ids=lambda p: p.name)
def test_unit(program):
    host.need(program, "build first")
    env = dict(os.environ, LD_LIBRARY_PATH=str(host.BUILD / "lib"))
    # Slow: a thousand sessions, which must not leave a file open
    options = ["-m", "slow"] if program.name == "test-kvmi" else []
    r = subprocess.run([program, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, env=env)
    assert r.returncode == 0, f"status {r.returncode}\n{r.stdout.decode(errors='replace')}"


# What the sanitizers don't see: bytes that nobody has written go to the wire. Races they do see, see meson.build.
@pytest.mark.parametrize("name", ["test-libkvmi", "test-hooks", "test-compat", "test-glib"])
def test_valgrind(name):
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is missing: scripts/deps --install")
    program = host.need(host.BUILD / "tests/unit" / name, "build first")
    env = dict(os.environ, LD_LIBRARY_PATH=f"{host.BUILD}/lib:{host.BUILD}/lib/glib")
    r = subprocess.run(["valgrind", "--quiet", "--leak-check=full", "--errors-for-leak-kinds=definite", "--show-leak-kinds=definite",
                        "--error-exitcode=99", program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       timeout=240, env=env)
    assert r.returncode == 0, f"status {r.returncode}\n{r.stdout.decode(errors='replace')}"


# All that LibVMI's KVM driver asks the dynamic linker for; without one of them it refuses to work
LIBVMI = """init_unix_socket init_vsock uninit close domain_close connection_fd get_version control_events control_vm_events control_cr control_msr
control_singlestep pause_all_vcpus set_page_access get_tsc_speed get_vcpu_count inject_exception read_physical write_physical get_registers
set_registers reply_event pop_event wait_event set_log_cb get_maximum_gfn get_next_available_gfn spp_support ve_support vmfunc_support eptp_support
create_ept_view destroy_ept_view switch_ept_view get_ept_view get_pending_events change_gfn alloc_gfn free_gfn""".split()

LOAD_AS_LIBVMI = """
import ctypes, _ctypes, os, sys
path, socket, *names = sys.argv[1:]
lib = ctypes.CDLL(path, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
for name in names:
    assert ctypes.cast(getattr(lib, "kvmi_" + name), ctypes.c_void_p).value, name
tasks = lambda: len(os.listdir("/proc/self/task"))
guest = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 1)
lib.kvmi_init_unix_socket.restype = ctypes.c_void_p
listener = ctypes.c_void_p(lib.kvmi_init_unix_socket(socket.encode(), guest, None, None))
assert listener and tasks() == 2, tasks()
lib.kvmi_uninit(None), lib.kvmi_domain_close(None, True), lib.kvmi_uninit(listener)
assert tasks() == 1, "a thread is left, and its code is about to be unmapped"
_ctypes.dlclose(lib._handle)
"""


def test_compat_as_libvmi(tmp_path):
    """Found by its bare name and loaded as LibVMI does it, and unloaded with no thread left."""
    env = dict(os.environ, LD_LIBRARY_PATH=f"{host.BUILD}/lib/compat:{host.BUILD}/lib")
    subprocess.run(["/usr/bin/python3", "-c", LOAD_AS_LIBVMI, "libkvmi.so", tmp_path / "socket", *LIBVMI], env=env, timeout=60, check=True)


def abi_of(library, headers, out):
    """What programs see of it, as abidiff takes it: the types in the headers and no others."""
    folders = [arg for folder in headers for arg in ("--headers-dir", host.TOP / folder)]
    subprocess.run(["abidw", *folders, "--header-file", "/usr/include/x86_64-linux-gnu/asm/kvm.h", "--drop-private-types",
                    "--exported-interfaces-only", "--no-corpus-path", "--no-comp-dir-path", "--no-show-locs", "--no-write-default-sizes",
                    "--no-parameter-names", "--no-elf-needed", "--out-file", out, library], stdin=subprocess.DEVNULL, timeout=60, check=True)


@pytest.mark.parametrize("library, headers", [("lib/libkvmi-2", ["lib/include/kvmi"]), ("lib/glib/libkvmi-2-glib", ["lib/glib/kvmi"]),
                                              ("lib/compat/libkvmi", ["lib/compat/include"])], ids=["libkvmi-2", "libkvmi-2-glib", "libkvmi"])
def test_abi(library, headers):
    """What programs were linked against is still there and as it was; functions may be added."""
    if not shutil.which("abidiff"):
        pytest.skip("abidiff is missing: scripts/deps --install")
    name = library.rpartition("/")[2]
    was, now = host.TOP / f"tests/unit/{name}.abi", host.BUILD / f"{library}.abi"
    abi_of(host.need(host.BUILD / f"{library}.so", "build first"), headers, now)
    r = subprocess.run(["abidiff", "--no-added-syms", was, now], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    assert r.returncode == 0, f"{r.stdout.decode(errors='replace')}\nThis breaks programs. If it has to be: count the soversion up in lib/meson.build, cp {now} {was}"


def test_reference_has_all():
    """The library's manual: a page with a description for each function that is exported."""
    pages = host.need(host.BUILD / "lib/man3", "build first")
    functions = [f for m in ("lib/libkvmi-2.map", "lib/glib/kvmi-glib.map") for f in re.findall(r"^\s+(kvmi_\w+);", (host.TOP / m).read_text(), re.M)]
    assert len(functions) > 100
    for function in functions:
        text = (pages / f"{function}.3").read_text()
        if text.startswith(".so "):
            text = (pages.parent / text.split()[1]).read_text()
        assert re.search(rf"\b{function}\(", text) and re.search(r"^\.SH DESCRIPTION\n\S", text, re.M), f"{function}(3) says nothing:\n{text}"


def test_reference_wants_all(tmp_path):
    headers = [host.TOP / "lib/include/kvmi" / h for h in ("kvmi.h", "hooks.h")]
    maps = [host.TOP / "lib/libkvmi-2.map"]
    command = [host.TOP / "lib/man", "1", tmp_path]
    assert subprocess.run([*command, *headers, *maps], timeout=60).returncode == 0
    bad = tmp_path / "kvmi.h"
    bad.write_text(headers[0].read_text().replace("/* The oldest event, or NULL.  Neither receives nor waits. */\n", ""))
    r = subprocess.run([*command, bad, headers[1], *maps], stderr=subprocess.PIPE, timeout=60)
    assert r.returncode == 1 and b"nothing is said of kvmi_vm_next_event" in r.stderr, r.stderr
    r = subprocess.run([*command, headers[0], *maps], stderr=subprocess.PIPE, timeout=60)
    assert r.returncode == 1 and b"kvmi_hooks_new is exported, but in no header" in r.stderr, r.stderr


def test_first_tool_is_the_example():
    listing, = re.findall(r"^```c\n(.*?)^```$", (host.TOP / "docs/first-tool.md").read_text(), re.M | re.S)
    source = (host.TOP / "examples/first-tool.c").read_text()
    assert listing == source, "docs/first-tool.md has another examples/first-tool.c than is there"
    assert source.count("\n") <= 50


def of_the_tool():
    """Its commands, as it says itself."""
    tool = host.need(host.BUILD / "tools/kvmi", "build first")
    env = dict(os.environ, LD_LIBRARY_PATH=str(host.BUILD / "lib"))
    text = subprocess.run([tool, "--help"], stdout=subprocess.PIPE, env=env, timeout=60, check=True).stdout.decode()
    found = re.findall(r"^  ([a-z]+)  +\S", text, re.M)
    assert {"watch", "read", "doctor"} <= set(found), text
    return found


def test_tool_manual():
    """kvmi(1) has all that --help says of each command, and nothing that roff stumbles over."""
    if not shutil.which("groff"):
        pytest.skip("groff is missing: scripts/deps --install")
    page = host.need(host.BUILD / "tools/kvmi.1", "build first")
    r = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-P-cbou", "-rLL=120n", page], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE, timeout=60)
    assert r.returncode == 0 and not r.stderr, r.stderr.decode()
    text = r.stdout.decode().replace("\u2212", "-").replace("\u2010", "-")
    env = dict(os.environ, LD_LIBRARY_PATH=str(host.BUILD / "lib"))
    for command in of_the_tool():
        said = subprocess.run([host.BUILD / "tools/kvmi", command, "--help"], stdout=subprocess.PIPE, env=env, timeout=60, check=True).stdout.decode()
        section = text.split(f"\n{command.upper()}\n", 1)
        assert len(section) == 2, f"no section about {command}"
        lines = [line.strip() for line in re.split(r"\n(?=\S)", section[1])[0].splitlines()]
        missing = [line for line in said.splitlines() if line.strip() and line.strip() not in lines]
        assert not missing, f"{command}: {missing}"


def test_completion():
    script = host.need(host.BUILD / "tools/kvmi.bash", "build first")

    def complete(*words):
        # compopt wants a real completion to be going on
        command = 'compopt() { :; }; . "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _kvmi; printf "%s\\n" "${COMPREPLY[@]}"'
        r = subprocess.run(["bash", "-c", command, script, "kvmi", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, timeout=60, cwd=host.TOP, check=True)
        return r.stdout.decode().split()

    assert complete("") == [*of_the_tool(), "--help", "--version"]
    assert complete("wa") == ["watch"] and complete("nothing", "") == []
    assert complete("watch", "--sys") == ["--syscall", "--syscalls", "--system-map"]
    assert {"--cr", "--msr", "--access", "--break", "--socket"} <= set(complete("watch", "--"))
    assert complete("watch", "--cr", "") == ["0", "3", "4"]
    assert complete("dump", "--format", "") == ["elf", "raw"] == complete("dump", "-F", "") and complete("dump", "-F", "r") == ["raw"]
    assert complete("read", "-s", "READ") == ["README.md"] == complete("dump", "READ") and complete("read", "READ") == []
    if "libvirt" in of_the_tool():
        assert complete("libvirt", "") == ["enable", "disable", "status"] and complete("libvirt", "enable", "") == []


@pytest.mark.parametrize("ours, qemus", [("linux/include/uapi/linux/kvmi.h", "qemu/linux-headers/linux/kvmi.h"),
                                         ("linux/arch/x86/include/uapi/asm/kvmi.h", "qemu/linux-headers/asm-x86/kvmi.h")],
                         ids=["kvmi.h", "asm-kvmi.h"])
def test_qemu_has_the_kernels_header(ours, qemus):
    # QEMU keeps copies of the kernel's headers, as of all others
    assert (host.TOP / ours).read_bytes() == (host.TOP / qemus).read_bytes(), f"copy {ours} to {qemus}"


def test_the_documents_layouts_are_the_headers():
    r = subprocess.run([host.TOP / "scripts/kvmi-layout", "--check"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    assert r.returncode == 0, r.stderr.decode(errors="replace")
