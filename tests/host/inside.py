# SPDX-License-Identifier: GPL-2.0-or-later
"""What scenarios need inside the AMD host: QMP, the guest, the tool, and a client that can misbehave.

Every wait has a bound, and who waits in vain is told for what.
"""
import contextlib
import hashlib
import hmac
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

BUILD = Path(os.environ.get("KVMI_BUILD", ""))     # host.py sets it
DIR = Path("/run/guest")
SOCKET = DIR / "tool.sock"
PATIENT_MS = 120000     # silence-timeout-ms where a hung tool is not what is tested: a slow machine's may look like one
# Kernel functions that nothing but the guest's own program calls, see guest/busy.c.
HOT = ("__x64_sys_getppid", "__x64_sys_sched_get_priority_max")




def patience(timeout):
    """Waits are written for a machine with nothing else to do; any other gets longer. Who passes does not notice."""
    return timeout + min(3 * timeout, 60)


class Late(AssertionError):
    pass


def now_us():
    return time.time_ns() // 1000


def wait_until(check, timeout, what, pause=0.05):
    """The first true value of check(); for what cannot be waited for by an event."""
    end = time.monotonic() + patience(timeout)
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > end:
            raise Late(f"waited {patience(timeout)} s in vain for {what}")
        time.sleep(pause)


class Lines:
    """Objects that arrive as JSON, one a line, on a pipe or socket; each gets "_at", when we read it (µs)."""

    def __init__(self, fd):
        self.fd = fd
        self.rest = b""
        self.ended = False

    def read(self, timeout):
        """What has come within the time, as a list; returns at the first arrival."""
        if self.ended or not select.select([self.fd], [], [], max(timeout, 0))[0]:
            return []
        try:
            data = os.read(self.fd, 1 << 16)
        except ConnectionResetError:
            data = b""
        at = now_us()
        self.ended = not data
        *lines, self.rest = (self.rest + data).split(b"\n")
        found = []
        for line in lines:
            if line.strip():
                found.append(json.loads(line))
                found[-1]["_at"] = at
        return found


class QMPError(Exception):
    pass


class QMP:
    """A QMP connection with out-of-band commands; events are kept in self.events, in order."""

    def __init__(self, path=DIR / "qmp", timeout=20):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        wait_until(lambda: self.connect(path), timeout, f"QMP on {path}")
        self.lines = Lines(self.sock.fileno())
        self.events = []
        self.replies = {}
        self.serial = 0
        self.greeting = None
        self.pump(lambda: self.greeting, timeout, "QMP's greeting")
        self.execute("qmp_capabilities", enable=["oob"])

    def connect(self, path):
        try:
            self.sock.connect(str(path))
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    def close(self):
        self.sock.close()

    def pump(self, check, timeout, what):
        """Take in what arrives until check() is true."""
        end = time.monotonic() + patience(timeout)
        while not check():
            left = end - time.monotonic()
            if left <= 0:
                raise Late(f"waited {patience(timeout)} s in vain for {what}")
            for m in self.lines.read(left):
                if "event" in m:
                    stamp = m["timestamp"]
                    m["us"] = stamp["seconds"] * 1000000 + stamp["microseconds"]
                    self.events.append(m)
                elif "QMP" in m:
                    self.greeting = m
                else:
                    self.replies[m.get("id")] = m
            if self.lines.ended and not check():
                raise Late(f"QMP hung up while we waited for {what}")
        return check()

    def send(self, command, oob=False, fds=(), **arguments):
        """Send without waiting, with files; returns the number to give to result()."""
        self.serial += 1
        message = {"exec-oob" if oob else "execute": command, "id": self.serial}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        socket.send_fds(self.sock, [json.dumps(message).encode() + b"\n"], fds)
        return self.serial

    def result(self, number, timeout=20, what="an answer"):
        reply = self.pump(lambda: self.replies.get(number), timeout, what)
        if "error" in reply:
            raise QMPError(reply["error"]["desc"])
        return reply["return"]

    def execute(self, command, timeout=20, oob=False, **arguments):
        return self.result(self.send(command, oob=oob, **arguments), timeout, f"the answer to {command}")

    def mark(self):
        """A place in the stream of events: pass it to event() to look only behind it."""
        return len(self.events)

    def event(self, name, since=0, timeout=20, **data):
        """The first event of that name (and with that data) behind the mark."""
        def find():
            for e in self.events[since:]:
                if e["event"] == name and all(e.get("data", {}).get(k) == v for k, v in data.items()):
                    return e
            return None
        wanted = f"{name} {data}" if data else name
        try:
            return self.pump(find, timeout, f"the event {wanted}")
        except Late as e:
            seen = [(x["event"], x.get("data")) for x in self.events[since:]]
            raise Late(f"{e}; seen instead: {seen}") from None


def swallow(sock):
    with sock, contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass


class Guest:
    """The virtual machine under test. It outlives the process that started it, so scenarios can share one."""

    cmdline = ("console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable clocksource=tsc cryptomgr.notests "
               "audit=0 apparmor=0 nowatchdog reboot=t")

    def __init__(self, folder=DIR, qemu=BUILD / "qemu/bin/qemu-system-x86_64", tool=SOCKET):
        self.dir, self.qemu, self.tool = folder, qemu, tool
        self.serial = folder / "serial"
        self.trace = folder / "trace"
        self.qmp = self.console = None

    @staticmethod
    def kvmi_options(**options):
        """The kvmi object the scenarios start with, as object-add takes it."""
        return {"qom_type": "kvmi", "id": "kvmi0", "chardev": "tool", "silence_timeout_ms": PATIENT_MS, **options}

    def start(self, kvmi=True, extra=(), vcpus=2, machine="microvm,pit=off,pic=off,rtc=on", alive=True):
        self.kill()
        subprocess.run(["rm", "-rf", self.dir], check=True)
        self.dir.mkdir(parents=True)
        # The disk is for snapshots, the guest doesn't use it
        subprocess.run([BUILD / "qemu/bin/qemu-img", "create", "-q", "-f", "qcow2", self.dir / "disk", "1M"], check=True, timeout=20)
        argv = [self.qemu, "-name", "guest", "-uuid", "6b766d69-0000-4000-8000-000000000001",
                "-M", machine, "-accel", "kvm", "-cpu", "host,svm=off", "-smp", str(vcpus), "-m", "256",
                "-nodefaults", "-display", "none", "-no-reboot", "-kernel", BUILD / "linux/vmlinuz",
                "-initrd", BUILD / "host/guest.cpio", "-append", self.cmdline,
                "-chardev", f"socket,id=console,path={self.dir}/console,server=on,wait=off,logfile={self.serial}", "-serial", "chardev:console",
                "-blockdev", f"qcow2,node-name=disk,file.driver=file,file.filename={self.dir}/disk",
                "-device", "pvpanic", "-device", "ib700",
                "-device", ("virtio-blk-device" if "microvm" in machine else "virtio-blk-pci") + ",drive=disk",
                "-qmp", f"unix:{self.dir}/qmp,server=on,wait=off", "-qmp", f"unix:{self.dir}/qmp2,server=on,wait=off",
                "-chardev", f"socket,id=hmp,path={self.dir}/hmp,server=on,wait=off", "-mon", "chardev=hmp,mode=readline",
                "-msg", "timestamp=on", "-D", self.trace, "-pidfile", self.dir / "pid",
                "-chardev", f"socket,id=tool,path={self.tool},server=off,reconnect-ms=100"]
        if kvmi:
            argv += ["-trace", "kvmi_*", "-trace", "stop_gate_*", "-trace", "vm_state_notify",
                     "-object", f"kvmi,id=kvmi0,chardev=tool,silence-timeout-ms={PATIENT_MS}"]
        with open(self.dir / "stderr", "wb") as errors:
            process = subprocess.Popen([str(a) for a in (*argv, *extra)], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
                                       start_new_session=True)
        # Not ours to wait for: the next scenario is another process.
        try:
            self.qmp = QMP(self.dir / "qmp")
        except (Late, OSError):
            raise AssertionError(f"QEMU did not start: status {process.poll()}, it said: {(self.dir / 'stderr').read_text()}") from None
        if alive:
            self.wait_alive(400)
        return self

    def hang_up(self):
        """Make room for another who wants to tell() the guest something: one at a time can."""
        if self.console:
            self.console.shutdown(socket.SHUT_RDWR)
            self.console.close()
            self.console = None

    def tell(self, command):
        """Have the guest itself do something, see guest/busy.c. It may be too late for it to tell that it has heard."""
        self.hang_up()
        # Open until the guest has read it: QEMU forgets what it has not read when we hang up
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(str(self.dir / "console"))
        self.console.sendall(command.encode() + b"\n")
        # and read from, or the guest's console comes to a standstill
        threading.Thread(target=swallow, args=(self.console.dup(),), daemon=True).start()

    def kill(self):
        try:
            pid = int((self.dir / "pid").read_text())
            if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes(), 20, "QEMU's death")
        except (FileNotFoundError, ProcessLookupError, ValueError):
            pass

    def output(self):
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def calls(self):
        """(calls, wrong) as the guest told last: system calls it made, and those that returned something wrong."""
        return self.told("calls N wrong N")

    def told(self, what):
        """The two numbers of the guest's last line of that kind"""
        found = re.findall(rf"guest: {what}\n".replace("N", r"(\d+)"), self.output())
        return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)

    def wrote(self):
        """(blocks written to the disk, failed), after tell("write")"""
        return self.told("wrote N failed N")

    def echoes(self):
        """(frames that came back from the network, that didn't), after tell("echo")"""
        return self.told("echoes N lost N")

    def wait_alive(self, timeout=30):
        """The guest goes on: its counter moves, twice, and nothing it called returned nonsense."""
        for _ in range(2):
            before = self.calls()[0]
            # Not only up: a guest that was just reset, or loaded from a snapshot, has yet to say that it counts from less
            wait_until(lambda: self.calls()[0] != before, timeout, "the guest's counter to move")
        calls, wrong = self.calls()
        assert wrong == 0, f"{wrong} of {calls} system calls returned a wrong value in the guest"

    def alive(self):
        """Is there a guest that a scenario can use?"""
        try:
            if self.qmp:
                self.qmp.close()
            self.qmp = QMP(self.dir / "qmp", timeout=3)
            if self.qmp.execute("query-status", timeout=5)["status"] != "running":
                return False
            self.wait_alive(10)
            return True
        except (AssertionError, OSError, QMPError):
            return False

    def cpus(self):
        """Where its CPUs are, and where a moment later: for who looks into why it does not go on."""
        try:
            self.qmp.close()
            self.qmp = QMP(self.dir / "qmp", timeout=3)
            said = []
            for _ in range(2):
                for line in ("info status", "info registers -a", "info lapic 0", "info lapic 1"):
                    said.append(self.qmp.execute("human-monitor-command", timeout=5, command_line=line))
                time.sleep(1)
        except (AttributeError, AssertionError, OSError, QMPError) as e:
            return f"nothing to be had: {e}"
        # Without the registers that nobody asks for
        return "\n".join(l for s in said for l in s.splitlines() if not re.match(r"(FPR|XMM|FCW|DR|[ELT].*=0000 0|GDT|IDT)", l))

    def ask(self, command, answer):
        """tell(), and wait for the answer; returns what it said from then on."""
        said = len(self.output())
        self.tell(command)
        wait_until(lambda: f"guest: {answer}\n" in self.output()[said:], 100, f"the guest to say '{answer}'")
        return self.output()[said:]

    def text(self):
        """Where the kernel's code lies: (physical start, end, virtual start), as the guest's kernel says."""
        out = self.output()
        start, end = re.findall(r"text-physical 0x(\w+) 0x(\w+)", out)[-1]       # the last boot counts
        return int(start, 16), int(end, 16), int(re.findall(r"text-virtual 0x(\w+)", out)[-1], 16)

    def dump(self, start, end):
        """The guest's memory from start to end (physical), by QEMU's pmemsave."""
        path = self.dir / "dump"
        self.qmp.execute("pmemsave", timeout=60, val=start, size=end - start, filename=str(path))
        data = path.read_bytes()
        path.unlink()
        assert len(data) == end - start
        return data

    def hmp(self, command, timeout=20):
        monitor = HMP(timeout)
        monitor.send(command)
        monitor.prompt(command)
        monitor.sock.close()


class HMP:
    """A human monitor."""

    def __init__(self, timeout=20):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(patience(timeout))
        self.sock.connect(str(DIR / "hmp"))
        self.prompt("nothing yet")

    def send(self, command):
        self.sock.sendall(command.encode() + b"\n")

    def prompt(self, command):
        """Read up to the next prompt."""
        got = b""
        try:
            while not got.endswith(b"(qemu) "):
                got += self.sock.recv(4096)
        except TimeoutError:
            raise Late(f"HMP gave no prompt after '{command}' within {self.sock.gettimeout()} s, but {got}") from None


def symbols():
    """The symbols of the guest's kernel, without its KASLR offset."""
    found = {}
    for line in open(BUILD / "linux/System.map"):
        address, _, name = line.split()
        found.setdefault(name, int(address, 16))
    return found


class Tool:
    """A command of the tool that stays, `kvmi COMMAND --json`, and what it said so far."""

    def __init__(self, command, *options, system_map=True):
        argv = [str(BUILD / "tools/kvmi"), command, "--socket", str(SOCKET), "--json", *options]
        if system_map:
            argv += ["--system-map", str(BUILD / "linux/System.map")]
        env = dict(os.environ, LD_LIBRARY_PATH=str(BUILD / "lib"))
        self.errors = open("/run/watch.stderr", "w+")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors, env=env)
        self.lines = Lines(self.process.stdout.fileno())
        self.said = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()

    def pump(self, timeout=0):
        got = self.lines.read(timeout)
        self.said += got
        return got

    def mark(self):
        while self.pump():
            pass
        return len(self.said)

    def event(self, name, since=0, timeout=30, count=1, **data):
        """The count-th line of that event behind the mark."""
        end = time.monotonic() + patience(timeout)
        while True:
            found = [e for e in self.said[since:] if e.get("event") == name and all(e.get(k) == v for k, v in data.items())]
            if len(found) >= count:
                return found[count - 1]
            left = end - time.monotonic()
            if left <= 0 or self.lines.ended:
                self.errors.seek(0)
                kinds = [e.get("event") for e in self.said[since:] if e.get("event") != "hit"]
                raise Late(f"the tool did not say '{name}' {count} times within {patience(timeout)} s but {len(found)} times; status "
                           f"{self.process.poll()}, other things it said: {kinds}, on stderr: {self.errors.read()}")
            self.pump(left)

    def signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self.process.stdout.close()

    def finish(self, timeout=20):
        """Wait for its end and the rest of what it says; returns its status."""
        end = time.monotonic() + patience(timeout)
        while not self.lines.ended and time.monotonic() < end:
            self.pump(end - time.monotonic())
        return self.process.wait(max(end - time.monotonic(), 0.1))


class Watch(Tool):
    """`kvmi watch` with these breakpoints."""

    def __init__(self, *breaks, system_map=True, options=()):
        super().__init__("watch", *(o for b in breaks for o in ("--break", b)), *options, system_map=system_map)


def kvmi(command, *arguments, timeout=60, status=0, socket=True):
    """Runs a command of the tool that ends by itself; returns (what it printed, what it complained about)."""
    argv = [str(BUILD / "tools/kvmi"), command, *(["--socket", str(SOCKET)] if socket else []), *arguments]
    env = dict(os.environ, LD_LIBRARY_PATH=str(BUILD / "lib"))
    r = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, timeout=patience(timeout))
    out, errors = r.stdout.decode(), r.stderr.decode()
    assert r.returncode == status, f"kvmi {command} ended with status {r.returncode}: {errors}{out[-2000:]}"
    return out, errors


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


# The numbers of linux/kvmi.h that the client below uses
GET_VERSION, CHECK_COMMAND, VM_GET_INFO, VM_CONTROL_EVENTS, READ_PHYSICAL, WRITE_PHYSICAL, PAUSE_VCPU = 2, 4, 8, 10, 12, 14, 16
GET_REGISTERS = 7
EVENT_UNHOOK = 0
EPERM, EINVAL = -1, -22


class RawTool:
    """A client that speaks the protocol itself, so that it can do what a proper tool would not."""

    def __init__(self, listen=True):
        self.serial = 0
        self.sock = None
        self.server = socket.socket(socket.AF_UNIX)
        try:
            os.unlink(SOCKET)
        except FileNotFoundError:
            pass
        self.server.bind(str(SOCKET))
        self.server.listen(1)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
        self.server.close()

    def accept(self, timeout=20):
        """Wait for QEMU; takes in its half of the handshake."""
        self.server.settimeout(patience(timeout))
        self.sock, _ = self.server.accept()
        self.sock.settimeout(patience(timeout))
        size, = struct.unpack("=I", self.exactly(4))
        hello = self.exactly(size - 4)
        self.hello = struct.pack("=I", size) + hello
        self.uuid, self.name = hello[:16], hello[28:92].split(b"\0")[0].decode()
        self.start_time, = struct.unpack_from("=q", hello, 20)
        return self

    def forget(self):
        """Hang up on who waits to be accepted."""
        self.server.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.server.accept()[0].close()

    def answer(self, cookie=b""):
        self.sock.sendall(struct.pack("=I20s", 24, hashlib.sha1(cookie).digest()))
        return self

    def answer_hmac(self, key):
        """The tool's side of auth=hmac, see qemu/docs/interop/kvmi.rst; returns whether QEMU knows the key, too."""
        assert len(self.hello) == 144 and struct.unpack_from("=I", self.hello, 104) == (1,), self.hello
        answer = struct.pack("=I20sII", 96, b"", 1, 0) + os.urandom(32)
        answer += hmac.digest(key, b"kvmi-hmac-tool\0\0" + self.hello + answer, "sha256")
        self.sock.sendall(answer)
        size, _, proof = struct.unpack("=II32s", self.exactly(40))
        assert size == 40
        return hmac.compare_digest(proof, hmac.digest(key, b"kvmi-hmac-qemu\0\0" + self.hello + answer, "sha256"))

    def exactly(self, n):
        data = b""
        while len(data) < n:
            more = self.sock.recv(n - len(data))
            if not more:
                raise EOFError("QEMU or KVM closed the connection")
            data += more
        return data

    def message(self):
        ident, size, seq = struct.unpack("=HHI", self.exactly(8))
        return ident, seq, self.exactly(size)

    def command(self, ident, payload=b""):
        """(error, data) of a command; events that arrive meanwhile are dropped."""
        self.serial += 1
        self.sock.sendall(struct.pack("=HHI", ident, len(payload), self.serial) + payload)
        while True:
            got, seq, data = self.message()
            if (got, seq) == (ident, self.serial):
                return struct.unpack_from("=i", data)[0], data[8:]

    def subscribe_unhook(self):
        error, _ = self.command(VM_CONTROL_EVENTS, struct.pack("=HBBI", EVENT_UNHOOK, 1, 0, 0))
        assert error == 0, f"VM_CONTROL_EVENTS gave {error}"
        return self

    def await_unhook(self, timeout=20):
        self.sock.settimeout(patience(timeout))
        while True:
            ident, _, data = self.message()
            if ident == 0 and struct.unpack_from("=H", data)[0] == EVENT_UNHOOK:
                return

    def closed(self, timeout=20):
        """Has the other side hung up? Throws away what it sent before."""
        self.sock.settimeout(patience(timeout))
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    def close(self):
        if self.sock:
            self.sock.close()
            self.sock = None
