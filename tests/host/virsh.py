# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt in the AMD host: the daemons, virsh, and the domain that the libvirt scenarios share.

The daemons are Debian's, configured for a host without systemd and cgroups; QEMU runs as root, so that it can read the build
folder, but for one scenario. All of it lives in the host's scratch /etc, /run and /var.
"""
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import inside
from inside import BUILD, QMP, Guest, Late, QMPError, patience, wait_until

# There if libvirt isn't the machine's: where it is from
FROM = Path("/run/libvirt-from")
HOST_UUID = "6b766d69-0000-4000-8000-0000000000{:02x}"
# How long a hung tool is waited for here, s: users have 5
DEADLINE = 2


class VirshError(Exception):
    pass


class Job:
    """A virsh that runs meanwhile."""

    def __init__(self, argv, timeout):
        self.argv, self.timeout, self.begin = argv, patience(timeout), time.monotonic()
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def result(self):
        try:
            out, _ = self.process.communicate(timeout=max(self.begin + self.timeout - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
            raise Late(f"{' '.join(self.argv)} did not end within {self.timeout} s; it said: {out}") from None
        self.took = time.monotonic() - self.begin
        if self.process.returncode:
            raise VirshError(f"{' '.join(self.argv)}: {out.strip()}")
        return out


def use_libvirt(folder):
    """The libvirt in this folder in place of the machine's, from now on: this host's /usr is scratch."""
    if folder == "/" or FROM.exists():
        return
    # Drivers of another version would not load
    for old in ("/usr/lib/libvirt", "/usr/lib/x86_64-linux-gnu/libvirt", "/usr/share/libvirt"):
        shutil.rmtree(old)
    for part in ("bin", "sbin", "lib", "share/libvirt"):
        subprocess.run(["cp", "-a", f"{folder}/usr/{part}", os.path.dirname(f"/usr/{part}")], check=True, timeout=patience(120))
    FROM.write_text(folder)


class Libvirtd:
    """One host's libvirtd. A second one, for migration, lives in a mount namespace of its own, and so do the tools that its QEMUs
    connect to."""
    all = []

    def __init__(self, name="one", stock=False, security=None):
        """stock: QEMU runs as the user and in the name space that Debian has for it. security: the driver that is asked for by name."""
        self.name, self.stock, self.security = name, stock, security
        self.dir = Path("/run/libvirt-" + name)
        self.socket = inside.SOCKET         # where the tool listens
        self.uri = "qemu:///system"
        self.prefix = []
        if name != "one":
            self.uri = f"qemu+unix:///system?socket={self.dir}/run/libvirt-sock"
            self.socket = self.dir / "tool" / inside.SOCKET.name
        self.mark = len(self.log())
        self.all.append(self)

    def running(self):
        try:
            os.kill(int((self.dir / "libvirtd.pid").read_text()), 0)
            return True
        except (OSError, ValueError):
            return False

    def start(self):
        """Does nothing if it runs."""
        if self.running():
            return self
        self.dir.mkdir(parents=True, exist_ok=True)
        script = self.dir / "start"
        number = 1 if self.name == "one" else 2
        user = "" if self.stock else """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []"""
        if self.security:
            user += f'\nsecurity_driver = "{self.security}"'
        private = "" if self.name == "one" else f"""
            for d in /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt; do
                mkdir -p $d
                mount -t tmpfs tmpfs $d
            done
            mkdir -p {self.dir}/run /run/libvirt {self.dir}/tool {inside.DIR}
            mount --bind {self.dir}/run /run/libvirt
            mount --bind {self.dir}/tool {inside.DIR}
        """
        if self.name == "two":      # (those of the others listen where we do)
            private += f"""
            mkdir -p {self.dir}/kvmi /run/kvmi
            mount --bind {self.dir}/kvmi /run/kvmi
        """
        script.write_text(f"""set -eu
            hostname {self.name}
            # Debian's package libvirt-daemon-system makes them
            grep -q libvirt-qemu /etc/group || echo libvirt-qemu:x:64055: >>/etc/group
            grep -q libvirt-qemu /etc/passwd ||
                echo libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin >>/etc/passwd
            chmod 666 /dev/kvm
            {private}
            mkdir -p /etc/libvirt /run/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
            cat >/etc/libvirt/qemu.conf <<END{user}
cgroup_controllers = []
migration_port_min = {49132 + 20 * number}
migration_port_max = {49151 + 20 * number}
END
            cat >/etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
unix_sock_group = "root"
host_uuid = "{HOST_UUID.format(number)}"
log_filters = "3:*"
log_outputs = "1:file:{self.dir}/log"
END
            virtlogd -d -p {self.dir}/virtlogd.pid
            libvirtd -d -p {self.dir}/libvirtd.pid
        """)
        argv = ["sh", str(script)]
        if self.name != "one":
            argv = ["unshare", "-mu", "--propagation", "private", *argv]
        # Not pipes: the daemons keep what they inherit.
        with open(self.dir / "output", "w+") as output:
            r = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=patience(60))
            output.seek(0)
            assert r.returncode == 0, f"libvirtd did not start: {output.read()}"
        self.virsh("uri", timeout=60)
        assert self.version() == 11 or not FROM.exists(), f"libvirtd is {self.version()}, not that in {FROM.read_text()}"
        return self

    def version(self):
        # The daemon is of the same packages, and logs its own only with its first message
        return int(self.virsh("--version").partition(".")[0])

    def stop(self):
        for name in ("libvirtd", "virtlogd"):
            try:
                os.kill(int((self.dir / f"{name}.pid").read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                pass
        wait_until(lambda: not self.running(), 20, "libvirtd's end")

    def begin(self, *words, timeout=180):
        """Start a virsh; its result() has the output."""
        return Job(["virsh", "-c", self.uri, "-q", *(str(w) for w in words)], timeout)

    def virsh(self, *words, timeout=180):
        return self.begin(*words, timeout=timeout).result()

    def log(self):
        return (self.dir / "log").read_text(errors="replace") if (self.dir / "log").exists() else ""

    def news(self):
        """What has come to its log since this object was made."""
        return self.log()[self.mark:]


class Domain(Guest):
    """A domain with our QEMU and the kvmi object; what inside.Guest offers by its console and QMP works here, too."""

    def __init__(self, libvirtd, name="guest"):
        super().__init__()
        self.libvirtd, self.name = libvirtd, name
        self.dir = Path("/run/domains") / name
        self.serial = self.dir / "serial"
        self.trace = self.dir / "trace"
        self.disk = self.dir / "disk.qcow2"
        self.monitor = self.dir / "qmp"
        self.emulator, self.kernel, self.initrd = BUILD / "qemu/bin/qemu-system-x86_64", BUILD / "linux/vmlinuz", BUILD / "host/libvirt-guest.cpio"
        self.new = self.serial_text().rfind("guest: text-physical")     # what is before is of an earlier boot

    def serial_text(self):
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def output(self):
        out = self.serial_text()[max(self.new, 0):]
        return out[max(out.rfind("guest: text-physical"), 0):]

    def text(self):
        """Of the last boot."""
        out = self.serial_text()
        out = out[out.rfind("guest: text-physical"):]
        start, end = re.search(r"text-physical 0x(\w+) 0x(\w+)", out).groups()
        return int(start, 16), int(end, 16), int(re.search(r"text-virtual 0x(\w+)", out).group(1), 16)

    def another(self):
        """The guest boots again, or goes back in time, from now on."""
        self.new = len(self.serial_text())

    def xml(self, kvmi=True):
        arguments = ["-qmp", f"unix:{self.monitor},server=on,wait=off", "-D", f"{self.dir}/trace.%d", "-msg", "timestamp=on"]
        if kvmi:
            arguments += ["-trace", "kvmi_*", "-trace", "stop_gate_*",
                          "-chardev", f"socket,id=tool,path={inside.SOCKET},server=off,reconnect-ms=200", "-object", "kvmi,id=kvmi0,chardev=tool,"
                          f"silence-timeout-ms={inside.PATIENT_MS},unhook-timeout-ms={DEADLINE * 1000}"]
        return f"""<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{self.name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{self.kernel}</kernel>
    <initrd>{self.initrd}</initrd>
    <cmdline>{self.cmdline} pci=lastbus=16</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='host-passthrough'><feature policy='disable' name='svm'/></cpu>
  <on_reboot>restart</on_reboot>
  <pm><suspend-to-mem enabled='yes'/></pm>
  <devices>
    <emulator>{self.emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{self.disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{self.serial}' append='on'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='none'/>
  </devices>
  <qemu:commandline>
{chr(10).join(f"    <qemu:arg value='{a}'/>" for a in arguments)}
  </qemu:commandline>
</domain>
"""

    def virsh(self, command, *words, timeout=180):
        return self.libvirtd.virsh(command, self.name, *words, timeout=timeout)

    def begin(self, command, *words, timeout=180):
        return self.libvirtd.begin(command, self.name, *words, timeout=timeout)

    def state(self):
        return self.virsh("domstate").strip()

    def for_everybody(self):
        """For a QEMU that isn't root: what it needs, where it can read it."""
        self.dir.mkdir(parents=True, exist_ok=True)
        os.chown(self.dir, 64055, 64055)
        shutil.copy(self.emulator, "/usr/local/bin/qemu-kvmi")
        self.emulator = "/usr/local/bin/qemu-kvmi"
        self.kernel, self.initrd = (shutil.copy(f, self.dir) for f in (self.kernel, self.initrd))

    def create_disk(self, filled=0):
        """filled: MiB that have something in them"""
        subprocess.run([str(BUILD / "qemu/bin/qemu-img"), "create", "-q", "-f", "qcow2", str(self.disk), "64M"], check=True, timeout=patience(30))
        if filled:
            subprocess.run([str(BUILD / "qemu/bin/qemu-io"), "-c", f"write -q -P 0x5a 0 {filled}M", str(self.disk)], check=True, timeout=patience(60))

    def define(self, **options):
        self.dir.mkdir(parents=True, exist_ok=True)
        inside.DIR.mkdir(parents=True, exist_ok=True)       # for the tool's socket
        xml = self.dir / "xml"
        xml.write_text(self.xml(**options))
        self.libvirtd.virsh("define", xml)

    def start(self, **options):
        """A new domain, booted; nothing is left of an old one."""
        self.remove()
        self.define(**options)
        self.create_disk()
        self.boot()
        return self

    def boot(self):
        self.another()
        self.virsh("start")
        self.booted()

    def migrate(self, to, *options, timeout=180):
        """Starts a migration to the other libvirtd; moved() when it has succeeded."""
        # The QEMU there needs a monitor of its own: the old one takes its socket away when it ends.
        monitor = self.dir / f"qmp.{to.name}.{time.monotonic_ns()}"
        xml = self.dir / "migrate.xml"
        xml.write_text(self.virsh("dumpxml", "--migratable").replace(f"unix:{self.monitor},", f"unix:{monitor},"))
        self.going = to, monitor
        return self.begin("migrate", to.uri, "--unsafe", "--migrateuri", "tcp://127.0.0.1", "--xml", xml, *options, timeout=timeout)

    def moved(self, paused=False):
        self.libvirtd, self.monitor = self.going
        self.attach()
        if not paused:
            self.wait_alive(400)

    def rebooted(self):
        """In the same QEMU, after another()."""
        wait_until(lambda: "guest: text-physical" in self.output(), 400, "the guest to boot again")
        self.wait_alive(400)

    def booted(self):
        self.attach()
        self.wait_alive(400)

    def remove(self):
        """From where it is, and the files."""
        for words in (("destroy",), ("undefine", "--managed-save", "--snapshots-metadata")):
            try:
                self.virsh(*words)
            except VirshError:
                pass
        subprocess.run(["rm", "-rf", self.dir], check=True)

    def attach(self):
        """A QMP connection to the QEMU that runs now."""
        if self.qmp:
            self.qmp.close()
        self.qmp = QMP(self.monitor)
        self.trace = max(self.dir.glob("trace.*"), key=lambda p: p.stat().st_mtime, default=self.trace)

    def kill(self):
        self.remove()

    def alive(self):
        try:
            if self.state() != "running":
                return False
            self.attach()
            self.wait_alive(20)
            return True
        except (AssertionError, OSError, QMPError, VirshError):
            return False

    def dump(self, start, end):
        path = self.dir / "memory"
        self.qmp.execute("pmemsave", timeout=60, val=start, size=end - start, filename=str(path))
        data = path.read_bytes()
        path.unlink()
        return data
