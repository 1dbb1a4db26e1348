# SPDX-License-Identifier: GPL-2.0-or-later
"""For the Intel host, which has nothing but what it is given: all the files that a scenario with a guest needs.

Compiling Python's modules would take longer there than all the rest, so they come compiled, in the archive in which Python looks first.
"""
import importlib._bootstrap_external as bootstrap
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import host

PYTHON = "/usr/bin/python3"


def libraries(programs):
    """The files that the dynamic linker loads for these."""
    found = set()
    for program in programs:
        out = subprocess.run(["ldd", program], stdout=subprocess.PIPE, check=True, timeout=60, env=dict(os.environ, LD_LIBRARY_PATH=str(host.BUILD / "lib"))).stdout.decode()
        found |= set(re.findall(r"(?:=> |^\t)(/\S+)", out, re.M))
    return found


def modules(script):
    """{name: file} of the modules that the script imports, and those Python itself does."""
    code = (f"import sys; sys.path.insert(0, {str(script.parent)!r}); import {script.stem}, encodings.utf_8, encodings.ascii, json; "
            "print(json.dumps({n: m.__spec__.origin for n, m in sys.modules.items() if m.__spec__ and m.__spec__.has_location}))")
    env = dict(os.environ, KVMI_BUILD=str(host.BUILD), PYTHONDONTWRITEBYTECODE="1")
    return json.loads(subprocess.run([PYTHON, "-I", "-S", "-c", code], stdout=subprocess.PIPE, check=True, timeout=60, env=env).stdout)


def archive(path, sources):
    with zipfile.ZipFile(path, "w") as z:
        for name, source in sources.items():
            code = compile(Path(source).read_bytes(), source, "exec", dont_inherit=True, optimize=0)
            place = name.replace(".", "/") + ("/__init__" if source.endswith("/__init__.py") else "") + ".pyc"
            z.writestr(place, bytes(bootstrap._code_to_hash_pyc(code, bytes(8), checked=False)))


def pack(script, folder):
    """(cpio entries, command, environment) to run a script of this folder in the Intel host"""
    found = modules(script)
    native = {n: f for n, f in found.items() if f.endswith(".so")}
    archive(folder / "modules.zip", {n: f for n, f in found.items() if f.endswith(".py")})
    build = [host.BUILD / p for p in ("qemu/bin/qemu-system-x86_64", "qemu/bin/qemu-img", "tools/kvmi")]
    firmware = [p for folder in ("/usr/share/seabios", "/usr/share/qemu") for p in Path(folder).glob("*.bin")
                if p.name in ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin")]
    programs = [PYTHON, *build, *native.values()]
    files = {*map(str, programs), *map(str, firmware), *libraries(programs), str(script), str(host.guest_image()),
             str(host.BUILD / "linux/vmlinuz"), str(host.BUILD / "linux/System.map")}
    entries = [host.file_entry(f, f, os.stat(f).st_mode & 0o777) for f in sorted(files)]
    entries.append(host.file_entry("modules.zip", folder / "modules.zip", 0o644))
    paths = ["/modules.zip", *sorted({str(Path(f).parent) for f in native.values()})]
    environment = {"PYTHONPATH": ":".join(paths), "PYTHONHOME": "/usr", "PYTHONDONTWRITEBYTECODE": "1", "KVMI_BUILD": str(host.BUILD)}
    return entries, [PYTHON, "-S", str(script)], environment


def run(script, name, timeout, folder):
    """The output of a scenario in the Intel host; HostError if it fails there."""
    entries, argv, environment = pack(script, folder)
    output = bytearray()
    with host.Host("intel", entries=entries, memory=1024) as h:
        h.start()
        status = h.run([*argv, name], timeout, output.extend, env=environment)
        trouble = h.trouble()
    text = output.decode(errors="replace")
    if status or trouble:
        raise host.HostError(f"{name}: status {status}\n{text}\n{trouble}")
    return text
