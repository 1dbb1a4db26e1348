# SPDX-License-Identifier: GPL-2.0-or-later
"""The two emulated hosts of the tests: AMD (QEMU's TCG, SVM) and Intel (Bochs, VMX with EPT).

    with Host("amd") as h:
        status = h.run(["/path/to/program", "argument"], timeout=60)

The AMD host sees the root of this machine (read-only, with a scratch overlay), so a command is any program here.
The Intel host has nothing but busybox and the files named on the command line, which must be static binaries.
"""
import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
BUILD = Path(os.environ.get("KVMI_BUILD") or TOP / "build").resolve()
DEBUG_KERNEL = BUILD / "linux/debug/bzImage"

# What a healthy host kernel never says. Looked for from "kvmi-host: ready" on.
TROUBLE = re.compile(r"WARNING:|BUG:|\bOops\b|general protection fault|Call Trace|Kernel panic|kernel BUG at|KASAN|UBSAN"
                     r"|INFO: (rcu|task|possible|trying)|possible .* detected|suspicious RCU|soft lockup|hard LOCKUP")


class HostError(Exception):
    """The host did not do its job; says why, and ends with the tail of its console."""


class EmulatorError(HostError):
    """It is the emulator's fault: what was found is not what anything that runs in the host brings about."""


def need(path, what):
    if not Path(path).exists():
        raise HostError(f"{path} is missing: {what}")
    return Path(path)


def cpio(entries):
    """A "newc" archive of (name, mode, data) entries: what the kernel takes as an initramfs."""
    out = bytearray()

    def add(name, mode, data, ino):
        name = name.encode() + b"\0"
        fields = [ino, mode, 0, 0, 1, 0, len(data), 0, 0, 5 if stat.S_ISCHR(mode) else 0, 1 if stat.S_ISCHR(mode) else 0,
                  len(name), 0]
        out.extend(b"070701" + b"".join(b"%08x" % f for f in fields) + name)
        out.extend(bytes(-len(out) % 4) + data)
        out.extend(bytes(-len(out) % 4))

    made = set()
    ino = 0

    def parents(name):
        nonlocal ino
        up = os.path.dirname(name)
        if up and up not in made:
            parents(up)
            made.add(up)
            ino += 1
            add(up, stat.S_IFDIR | 0o755, b"", ino)

    for name, mode, data in entries:
        name = name.strip("/")
        if name in made:
            continue
        parents(name)
        made.add(name)
        ino += 1
        add(name, mode, data, ino)
    add("TRAILER!!!", 0, b"", 0)
    return bytes(out)


def file_entry(name, source, mode=0o755):
    return (name, stat.S_IFREG | mode, Path(source).read_bytes())


def dir_entry(name):
    return (name, stat.S_IFDIR | 0o755, b"")


BUSYBOX = "/bin/busybox"
# /dev/console must be there before devtmpfs is.
BASE = [dir_entry(d) for d in ("proc", "sys", "dev", "tmp", "run")] + [("dev/console", stat.S_IFCHR | 0o600, b"")]


def busybox_entries():
    need(BUSYBOX, "install the package busybox-static")
    return BASE + [file_entry("bin/busybox", BUSYBOX)]


def die_with_parent():
    """In the child before exec: leave the terminal's process group, and die if whoever started us does."""
    import ctypes
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# With ERMS or FSRM, Linux copies by REP MOVSB: the fastest way on hardware, but the emulator goes byte by byte, and takes several times as long
# as for words. Whatever goes through a socket or comes from a file would cost what it doesn't elsewhere.
CPU = "max,erms=off,fsrm=off"


class Host:
    def __init__(self, vendor, modules="kvmi", modules_dir=None, kernel=None, cpus=None, out=None, files=(), kvm_args="introspection=1",
                 icount=False, entries=(), memory=512, threads="single"):
        if vendor not in ("amd", "intel"):
            raise HostError(f"unknown host '{vendor}': amd or intel")
        self.vendor = vendor
        self.cpus = cpus or (2 if vendor == "amd" else 1)
        self.icount = icount        # AMD: the clock counts instructions (2 ns each), for measurements
        # AMD: TCG's threads. With "multi" the CPUs run in parallel, but code that one writes while another translates it may
        # be executed as it was before, for good: breakpoints are not hit, or hit when they are gone. Guests have died there, too, with
        # the registers of their host, for a reason that is not known; with "single" none has.
        self.threads = "single" if icount else os.environ.get("KVMI_TCG", threads)
        self.kernel = Path(kernel or BUILD / "linux/vmlinuz").resolve()
        self.stock = BUILD / "linux/stock"
        # A kernel of one's own comes with everything built in, unless there is a folder of modules for it too.
        self.builtin = bool(kernel) and not modules_dir
        self.modules = Path(modules_dir).resolve() if modules_dir else {"kvmi": BUILD / "linux/modules", "stock": self.stock}[modules]
        self.kvm_args = "" if modules == "stock" and not modules_dir else kvm_args
        self.files = [os.path.abspath(f) for f in files]
        self.entries, self.memory = list(entries), memory       # Intel: more of an initramfs, see cpio(); MiB
        self.dir = Path(tempfile.mkdtemp(prefix=f"kvmi-{vendor}-"))
        self.out = Path(out).resolve() if out else self.dir / "out"
        self.out.mkdir(parents=True, exist_ok=True)
        self.console = self.out / "console.log"
        self.process = None
        self.commands = 0
        self.log_seen = 0
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # --- starting -----------------------------------------------------------------------------------------------------

    def kvm_modules(self):
        """(name, file) of every module KVM needs; irqbypass and ccp are never ours."""
        if self.builtin:
            return []
        found = []
        for name in ("irqbypass", "ccp", "kvm", "kvm-amd") if self.vendor == "amd" else ("irqbypass", "kvm", "kvm-intel"):
            path = self.modules / f"{name}.ko"
            if not path.exists():
                path = self.stock / f"{name}.ko" if name in ("irqbypass", "ccp") else need(path, "build the modules first")
            found.append((name, path))
        return found

    def start(self, timeout=300):
        """Boot. The Intel host takes its one command with it on the ISO, so there it is run() that boots."""
        need(self.kernel, "build first, or point KVMI_BUILD to a build folder")
        if self.vendor == "amd":
            self.amd_boot()
            self.deadline = time.monotonic() + timeout
            self.await_ready()
        return self

    def await_ready(self):
        failed = self.wait_for(rb"\x1eready(.*)\n", None, f"the {self.vendor} host did not come up")[0].decode().split()
        if failed:
            raise self.error(f"the {self.vendor} host could not load {', '.join(failed)}")
        self.log_seen = max(self.console_text().find("kvmi-host: ready"), 0)

    def initramfs(self, extra):
        entries = busybox_entries() + [file_entry("init", HERE / "init"), file_entry("agent", HERE / "agent")]
        path = self.dir / "initramfs"
        path.write_bytes(cpio(entries + extra))
        return path

    def cmdline(self):
        kvm = " ".join(f"kvm.{a}" for a in self.kvm_args.split())      # for a kernel that has it built in
        if self.builtin:
            # KASAN takes good addresses for wild ones in an interrupt while identify_cpu() sets up LA57's CPU flag anew.
            kvm += " no5lvl"
        return (f"kvmi_host={self.vendor} {kvm} loglevel=5 mitigations=off panic=-1 tsc=reliable no_timer_check nowatchdog "
                "random.trust_cpu=1 audit=0 cryptomgr.notests 8250.nr_uarts=2" + (" apparmor=0" if self.vendor == "intel" else ""))

    def amd_boot(self):
        qemu = need(BUILD / "qemu/bin/qemu-system-x86_64", "build QEMU first")
        boot = [] if self.kernel != BUILD / "linux/vmlinuz" else ["netfs", "9pnet", "9pnet_virtio", "9p", "overlay"]
        initrd = self.initramfs([file_entry(f"boot-modules/{m}.ko", need(self.stock / f"{m}.ko", "build first")) for m in boot])
        share = self.dir / "share"
        modules = share / "modules"
        modules.mkdir(parents=True)
        for name, path in self.kvm_modules():
            shutil.copy(path, modules / f"{name}.ko")
        (modules / "kvm.args").write_text(self.kvm_args)
        (share / "env").write_text("export KVMI_MODULES=/run/kvmi-host/modules KVMI_OUT=/run/out\n"
                                   f"export KVMI_BUILD={shlex.quote(str(BUILD))}\n")
        fs = "local,security_model=none,path="
        clock = ["-icount", "shift=1,sleep=off"] if self.icount else []
        self.spawn([qemu, *clock, "-accel", f"tcg,thread={self.threads}", "-cpu", CPU, "-smp", str(self.cpus), "-m", "4096",
                    "-nodefaults", "-display", "none", "-no-reboot", "-kernel", self.kernel, "-initrd", initrd,
                    "-append", "console=ttyS0 " + self.cmdline(),
                    "-serial", f"file:{self.console}", "-serial", "stdio",
                    "-monitor", f"unix:{self.dir}/monitor,server=on,wait=off", "-d", "cpu_reset", "-D", self.dir / "resets",
                    "-virtfs", fs + "/,mount_tag=hostroot,readonly=on,multidevs=remap",
                    "-virtfs", fs + f"{share},mount_tag=share", "-virtfs", fs + f"{self.out},mount_tag=out"], stdin=subprocess.PIPE)
        self.reader = self.process.stdout.fileno()

    def intel_boot(self, script):
        bochs = need(BUILD / "bochs/bochs", "run scripts/build-bochs first")
        extra = [*self.entries, ("cmd.1", stat.S_IFREG | 0o755, script.encode())]
        extra += [file_entry(f"modules/{name}.ko", path, 0o644) for name, path in self.kvm_modules()]
        extra.append(("modules/kvm.args", stat.S_IFREG | 0o644, self.kvm_args.encode()))
        extra += [file_entry(f, f, os.stat(f).st_mode & 0o777) for f in self.files]
        iso = self.dir / "iso"
        iso.mkdir()
        shutil.move(self.initramfs(extra), iso / "initrd")
        shutil.copy(self.kernel, iso / "linux")
        shutil.copy(need("/usr/lib/ISOLINUX/isolinux.bin", "install the package isolinux"), iso)
        shutil.copy(need("/usr/lib/syslinux/modules/bios/ldlinux.c32", "install the package syslinux-common"), iso)
        (iso / "isolinux.cfg").write_text("default l\nprompt 0\nlabel l\n kernel /linux\n initrd /initrd\n append console=ttyS0,115200 nokaslr "
                                          f"lpj=1000000 tsc_early_khz=50000 clocksource=tsc lsm= {self.cmdline()}\n")
        subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", self.dir / "host.iso", "-b", "isolinux.bin", "-c", "boot.cat",
                        "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", iso],
                       check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        (self.dir / "bochsrc").write_text(f"""\
display_library: nogui
plugin_ctrl: unmapped=true, biosdev=true, speaker=false, extfpuirq=true, parallel=false
memory: guest={self.memory}, host={self.memory}
romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=broadwell_ult, count={self.cpus}, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=1
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path={self.dir}/host.iso, status=inserted
boot: cdrom
clock: sync=none, time0=local
com1: enabled=1, mode=file, dev={self.console}
com2: enabled=1, mode=file, dev={self.dir}/output
log: {self.dir}/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
mouse: enabled=0
""")
        output = open(self.dir / "output", "w+b")
        self.spawn([bochs, "-q", "-f", self.dir / "bochsrc"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.reader = output.fileno()
        self.output_file = output

    def spawn(self, argv, stdin, stdout=subprocess.PIPE):
        self.console.write_bytes(b"")
        self.errors = open(self.dir / "emulator.log", "w+b")
        self.process = subprocess.Popen([str(a) for a in argv], stdin=stdin, stdout=stdout, stderr=self.errors, cwd=self.dir,
                                        preexec_fn=die_with_parent)

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, argv, timeout, sink=None, cwd=None, env=None):
        """Run a command (a list of words) in the host, hand its output to sink(bytes) as it comes; returns its status."""
        self.commands += 1
        words = [str(a) for a in argv]
        lines = [f"export {k}={shlex.quote(v)}" for k, v in (env or {}).items()]
        if self.vendor == "intel":
            if self.process:
                raise HostError("the Intel host runs one command a boot")
            for i, w in enumerate(words):
                if os.path.isfile(w):
                    words[i] = os.path.abspath(w)
                    self.files.append(words[i])
            self.intel_boot("\n".join(lines + ["cd /", "exec " + shlex.join(words)]) + "\n")
            self.deadline = time.monotonic() + timeout
            self.await_ready()
        else:
            # A command that outstays its time is stopped inside, so that the host stays usable; past that, the host goes.
            lines += [f"cd {shlex.quote(str(cwd or os.getcwd()))}", f"exec timeout -k 5 {timeout:.0f} {shlex.join(words)}"]
            (self.dir / "share" / f"cmd.{self.commands}").write_text("\n".join(lines) + "\n")
            self.deadline = time.monotonic() + timeout + 15
            self.process.stdin.write(b"%d\n" % self.commands)
            self.process.stdin.flush()
        return int(self.wait_for(rb"\x1estatus (\d+)\n", sink, f"'{words[0]}' did not end within {timeout:.0f} s")[0])

    def wait_for(self, pattern, sink, late):
        """Read the command port up to the pattern; what comes before it goes to the sink."""
        pattern = re.compile(pattern)
        while True:
            m = pattern.search(self.buffer)
            mark = m.start() if m else self.buffer.find(b"\x1e")
            before = self.buffer[:mark] if mark >= 0 else self.buffer
            if before and sink:
                sink(before)
            if m:
                self.buffer = self.buffer[m.end():]
                return m.groups()
            self.buffer = self.buffer[len(before):]
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise self.error(late)
            data = self.read(left)
            if data is None:
                # Its pipe is closed a moment before it can be waited for
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(10)
                raise self.error(f"the emulator ended by itself, status {self.process.poll()}")
            self.buffer += data

    def read(self, left):
        """Some bytes of the command port; b"" if there were none for a while, None if there will be no more."""
        if self.vendor == "amd":
            if not select.select([self.reader], [], [], min(left, 1))[0]:
                return b""
            return os.read(self.reader, 65536) or None
        data = os.read(self.reader, 65536)     # a plain file that grows
        if data:
            return data
        if self.process.poll() is not None:
            return os.read(self.reader, 65536) or None
        time.sleep(0.1)
        return b""

    # --- ending -------------------------------------------------------------------------------------------------------

    def console_text(self):
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def trouble(self):
        """The lines with which the host's kernel complained since the last call, with what follows them; empty if it did not."""
        text = self.console_text()
        new = text[self.log_seen:]
        self.log_seen = len(text)
        m = TROUBLE.search(new)
        return new[new.rfind("\n", 0, m.start()) + 1:][:6000] if m else ""

    def leaks(self):
        """What kmemleak has found of KVM's; empty if there is nothing, or a kernel without it."""
        output = bytearray()
        # An object must be some seconds old
        self.run(["sh", "-c", "f=/sys/kernel/debug/kmemleak; [ -f $f ] || exit 0; sleep 6; echo scan >$f; sleep 6; echo scan >$f; cat $f"], 300, output.extend)
        found = output.decode(errors="replace").split("unreferenced object")[1:]
        return "".join(f"unreferenced object{o}" for o in found if "kvm" in o)[:6000]

    def error(self, what):
        tail = "\n".join(self.console_text().splitlines()[-40:])
        errors = (self.dir / "emulator.log").read_text(errors="replace")[:4000] if (self.dir / "emulator.log").exists() else ""
        if self.process.poll() is not None and (self.dir / "resets").exists():
            errors += "--- its last resets, with the CPU's state before ---\n" + (self.dir / "resets").read_text(errors="replace")[-6000:]
        broken = self.broken() if self.vendor == "amd" else ""
        return (EmulatorError if broken else HostError)(
            f"{what}{broken}\n--- the console's tail ---\n{tail}\n" + (f"--- the emulator's errors ---\n{errors}" if errors else ""))

    def broken(self):
        """What is wrong with the emulator; empty if nothing is. Nested guests that do odd things (tests/fuzz) get TCG there."""
        if self.process.poll() is not None:
            return "" if TROUBLE.search(self.console_text()[self.log_seen:]) else "; a crash, or a triple fault out of the blue"
        for rip, cr0 in re.findall(r"\bRIP=(\w{16}).*?\bCR0=(\w{8})", self.monitor("info registers -a"), re.S):
            if int(rip, 16) >> 47 and not int(cr0, 16) >> 31:
                return f"; TCG runs a CPU at {rip} with paging off (CR0 {cr0}), which is where a VMEXIT of its left it"
        return ""

    def monitor(self, command):
        """The answer of the AMD host's human monitor; empty if there is none."""
        answer = b""
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(20)
                s.connect(str(self.dir / "monitor"))
                s.sendall(command.encode() + b"\n")
                while answer.count(b"(qemu) ") < 2:
                    more = s.recv(65536)
                    if not more:
                        break
                    answer += more
        except OSError:
            pass
        return answer.decode(errors="replace")

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.errors.close()
            self.process = None
        shutil.rmtree(self.dir, ignore_errors=True)


def newer(source, result):
    return not result.exists() or result.stat().st_mtime < max(source.stat().st_mtime, (HERE / "host.py").stat().st_mtime)


image_lock = threading.RLock()


def guest_image():
    """The initramfs of the guest that runs in the AMD host: one program of ours, see guest/busy.c. Built when its source changed."""
    source, image = HERE / "guest/busy.c", BUILD / "host/guest.cpio"
    with image_lock:
        make_guest_image(source, image)
    return image


def make_guest_image(source, image):
    if newer(source, image):
        image.parent.mkdir(parents=True, exist_ok=True)
        busy = image.with_name("busy")
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-static", "-pthread", "-s", "-o", busy, source], check=True, timeout=60)
        new = image.with_name("guest.cpio.new")
        # one module for who lists modules, and those of disk and network, which it loads when it is told to use them
        modules = [file_entry(f"modules/{m}.ko", need(BUILD / f"linux/stock/{m}.ko", "build first"), 0o644)
                   for m in ("evdev", "virtio_mmio", "virtio_blk", "failover", "net_failover", "virtio_net")]
        new.write_bytes(cpio(BASE + [file_entry("init", busy), *modules]))
        new.rename(image)


def libvirt_guest_image():
    """The same with the module of a power button, which libvirt's guest has."""
    plain, image = guest_image(), BUILD / "host/libvirt-guest.cpio"
    if newer(plain, image):
        new = image.with_name("libvirt-guest.cpio.new")
        new.write_bytes(plain.read_bytes() + cpio([file_entry("modules/button.ko", need(BUILD / "linux/stock/button.ko", "build first"))]))
        new.rename(image)
    return image


def build_stock_qemu():
    subprocess.run([TOP / "scripts/build-qemu", "--stock", f"--build={BUILD}"], check=True, stdin=subprocess.DEVNULL, timeout=7200)


def fetch_libvirt(*options):
    """The folder with the files of libvirt 11, of which Debian 12 has only 9.0; / if this machine's libvirt is that one. --profiles: with
    AppArmor's profiles for this machine's libvirt."""
    command = [TOP / "scripts/fetch-libvirt", *options]
    config = BUILD / "config.sh"
    cache = re.search(r"^CACHE='(.+)'$", config.read_text(), re.M) if config.exists() else None
    if cache:
        command.append(f"--cache={cache[1]}")
    r = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)
    if r.returncode:
        raise HostError(r.stdout.strip())
    return Path(r.stdout.splitlines()[-1])
