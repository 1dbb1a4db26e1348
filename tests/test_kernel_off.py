# SPDX-License-Identifier: GPL-2.0-or-later
"""With CONFIG_KVM_INTROSPECTION off, KVM is upstream's: our patches leave no trace in the modules' code and data.

build/linux/off/upstream has the modules built from the sources as they come, build/linux/off/disabled those with our
patches and without the option; both by the same compiler against the same headers.
"""
import difflib
import re
import struct
import subprocess
from collections import namedtuple

import pytest

import host

pytestmark = pytest.mark.unit

SHF_ALLOC, SHF_EXECINSTR, SHF_STRINGS = 2, 4, 0x20
SHT_RELA, SHT_NOBITS, SHT_SYMTAB = 4, 8, 2

# Allocated sections that may differ, and why:
#   .modinfo                    the checksum of the source text ("srcversion")
#   .note.gnu.build-id          a checksum of everything, line numbers too
NOT_COMPARED = {".modinfo", ".note.gnu.build-id"}
# Hooks shift line numbers even if they compile to nothing. They are in these tables (size of an entry, offset and mask),
# and in messages of the fortified memcpy().
LINE_NUMBERS = {"__bug_table": (12, 8, 0xffff),         # struct bug_entry: line
                "__dyndbg": (56, 32, 0x3ffff)}          # struct _ddebug: lineno
LINE_IN_MESSAGE = re.compile(rb"( at \S+\.[ch]):\d+$")

Section = namedtuple("Section", "name kind flags data info")


class Module:
    """What a .ko has in its sections, with each relocation resolved to what it points to."""

    def __init__(self, path):
        elf = path.read_bytes()
        assert elf[:6] == b"\x7fELF\x02\x01", f"{path} is not an ELF file of 64 bits"
        offset, = struct.unpack_from("<Q", elf, 0x28)
        size, count, names = struct.unpack_from("<HHH", elf, 0x3a)
        headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]

        def string(data, at):
            return data[at:data.index(b"\0", at)].decode(errors="replace")

        def content(h):
            return bytes(h[5]) if h[1] == SHT_NOBITS else elf[h[4]:h[4] + h[5]]

        name_table = content(headers[names])
        self.all = [Section(string(name_table, h[0]), h[1], h[2], content(h), h[7]) for h in headers]
        table, = (i for i, s in enumerate(self.all) if s.kind == SHT_SYMTAB)
        symbol_names = self.all[headers[table][6]].data
        self.symbols = [(string(symbol_names, name), index, value)
                        for name, _, _, index, value, _ in struct.iter_unpack("<IBBHQQ", self.all[table].data)]
        self.relocations = {s.info: [self.target(*r) for r in struct.iter_unpack("<QQq", s.data)]
                            for s in self.all if s.kind == SHT_RELA}

    def target(self, offset, info, addend):
        """By place, because names of local symbols have numbers; strings by their text, because they are merged."""
        kind = info & 0xffffffff
        name, index, value = self.symbols[info >> 32]
        if not 0 < index < len(self.all):
            return offset, kind, name, addend
        section = self.all[index]
        if section.flags & SHF_STRINGS:
            start = value + addend
            return offset, kind, LINE_IN_MESSAGE.sub(rb"\1", section.data[start:section.data.index(b"\0", start)]), 0
        return offset, kind, section.name, value + addend

    def sections(self, wanted):
        """{name: (content, relocations)} of the sections whose flags are wanted."""
        found = {}
        for i, s in enumerate(self.all):
            if wanted(s.flags) and s.name not in NOT_COMPARED:
                assert s.name not in found, f"two sections are named {s.name}"
                found[s.name] = (without_lines(s), self.relocations.get(i, []))
        return found


def without_lines(section):
    if section.flags & SHF_STRINGS:
        return [LINE_IN_MESSAGE.sub(rb"\1", text) for text in section.data.split(b"\0") if text]
    if section.name not in LINE_NUMBERS:
        return section.data
    data = bytearray(section.data)
    size, offset, mask = LINE_NUMBERS[section.name]
    assert len(data) % size == 0, f"entries of {section.name} are not of {size} bytes"
    for at in range(offset, len(data), size):
        struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] & ~mask)
    return bytes(data)


def functions(path):
    """{name: instructions}, without the addresses."""
    text = subprocess.run(["objdump", "-dr", "--no-show-raw-insn", path], check=True, stdout=subprocess.PIPE, timeout=120).stdout.decode()
    found = {}
    for m in re.finditer(r"^[0-9a-f]+ <(?!__pfx_)(.*)>:\n((?:.+\n)*)", text, re.M):
        lines = re.sub(r"^\s*[0-9a-f]+:\s*", "", m[2], flags=re.M)
        lines = re.sub(r"\b[0-9a-f]+ (<)", r"\1", lines)
        lines = re.sub(r"^(R_X86_64_\w+\s+\.[\w.]+)\+0x[0-9a-f]+", r"\1", lines, flags=re.M)
        name = m[1]
        while name in found:    # static functions of several files
            name += "'"
        found[name] = lines.splitlines()
    return found


def explain(upstream, disabled):
    """Which functions differ, and how the first one does."""
    a, b = functions(upstream), functions(disabled)
    changed = [n for n in {**a, **b} if a.get(n) != b.get(n)]
    if not changed:
        return "no function by itself: their order does"
    diff = list(difflib.unified_diff(a.get(changed[0], []), b.get(changed[0], []), "upstream", "disabled", lineterm=""))
    return f"functions: {', '.join(changed[:20])}{', …' if len(changed) > 20 else ''}\n{changed[0]}:\n" + "\n".join(diff[:60])


@pytest.fixture(scope="module")
def modules():
    r = subprocess.run([host.TOP / "scripts/build-linux", f"--build={host.BUILD}", "off"], stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    assert r.returncode == 0, r.stdout.decode(errors="replace")
    return host.BUILD / "linux/off"


@pytest.mark.parametrize("name", ("kvm", "kvm-amd", "kvm-intel"))
@pytest.mark.parametrize("what", ("code", "data"))
def test_off(modules, name, what):
    paths = [modules / side / f"{name}.ko" for side in ("upstream", "disabled")]

    def wanted(flags):
        return flags & SHF_ALLOC and bool(flags & SHF_EXECINSTR) == (what == "code")

    a, b = (Module(p).sections(wanted) for p in paths)
    assert what == "data" or len(a[".text"][0]) > 100000 and len(a[".text"][1]) > 1000
    different = [n for n in sorted({**a, **b}) if a.get(n) != b.get(n)]
    if different:
        pytest.fail(f"without the option {name}.ko is not as upstream's ({paths[0]}, {paths[1]}) in {', '.join(different)}\n"
                    + (explain(*paths) if what == "code" else ""), pytrace=False)
