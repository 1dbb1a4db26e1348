# SPDX-License-Identifier: GPL-2.0-or-later
"""The library from Python, against the unit tests' simulator in this process."""
import ctypes
import os
import sys

import pytest

import host

pytestmark = pytest.mark.unit


@pytest.fixture
def kvmi(monkeypatch):
    monkeypatch.setenv("LIBKVMI_2", str(host.need(host.BUILD / "lib/libkvmi-2.so", "build first")))
    monkeypatch.syspath_prepend(host.TOP / "lib/python")
    import kvmi
    yield kvmi
    del sys.modules["kvmi"]


@pytest.fixture
def sim():
    lib = ctypes.CDLL(str(host.need(host.BUILD / "tests/unit/libclient-sim.so", "build first")))
    for name, arguments, result in (("new", [ctypes.c_char_p], ctypes.c_void_p), ("free", [ctypes.c_void_p], None),
                                    ("event", [ctypes.c_void_p, ctypes.c_uint], None), ("unhook", [ctypes.c_void_p], None),
                                    ("memory", [ctypes.c_void_p], ctypes.c_void_p), ("value", [ctypes.c_void_p], ctypes.c_uint64),
                                    ("action", [ctypes.c_void_p], ctypes.c_int), ("rip", [ctypes.c_void_p, ctypes.c_uint], ctypes.c_uint64),
                                    ("wait_replies", [ctypes.c_void_p, ctypes.c_uint], None), ("access", [ctypes.c_void_p, ctypes.c_uint64], ctypes.c_uint)):
        function = getattr(lib, f"client_sim_{name}")
        function.argtypes, function.restype = arguments, result
    return lib


@pytest.fixture
def vm(kvmi, sim, tmp_path):
    path = tmp_path / "socket"
    with kvmi.Listener(path, key=b"a key") as listener:
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert listener.accept(timeout=0) is None
        peer = sim.client_sim_new(str(path).encode())
        vm = listener.accept(timeout=10)
        vm.sim = peer
        vm.connect(commands=["vm-read-physical", 16], events=["cr", kvmi.EV_MSR])
        yield vm
        vm.close()
        sim.client_sim_free(peer)
    assert not path.exists()


def test_what_is_there(kvmi, vm):
    assert vm.hello.name == b"a guest" and bytes(vm.hello.uuid) == bytes(range(1, 17)) and vm.hello.max_gpa == 0x10000
    assert vm.version.version == 1 and vm.version.journal and vm.version.set_msrs
    assert (vm.get_vcpu_count(), vm.get_max_gfn(), vm.vcpu_get_tsc_speed(0), vm.vcpu_get_mtrr_type(0, 0)) == (3, 15, 2500000000, 6)
    assert vm.vcpu_get_cpuid(0, 7, 1).eax == 7
    assert vm.control_events(kvmi.EV_UNHOOK, True) is None


def test_memory(kvmi, vm, sim):
    vm.write_physical(0xffe, b"\x01\x00\x02\x03")
    assert ctypes.string_at(sim.client_sim_memory(vm.sim) + 0xffe, 4) == b"\x01\x00\x02\x03"
    assert vm.read_physical(0xffd, 6) == b"\x00\x01\x00\x02\x03\x00"
    # the simulator's tables swap pages in pairs
    assert vm.vcpu_translate(1, 0x1ffe) == 0xffe and vm.vcpu_read_virtual(1, 0x1ffe, 2) == b"\x01\x00"
    calls = [vm.start_read_physical(0x1000 * i, 4096) for i in range(4)]
    assert calls[0].wait()[-2:] + calls[1].wait()[:2] == b"\x01\x00\x02\x03"
    with pytest.raises(ValueError):
        calls[0].wait()
    del calls       # the others are cancelled
    vm.set_page_access({0x3000: kvmi.PAGE_R, 0x5000: kvmi.PAGE_R | kvmi.PAGE_X})
    assert [sim.client_sim_access(vm.sim, 4096 * i) for i in range(2, 6)] == [7, 1, 7, 5] and vm.get_page_access(0x5000) == 5


def test_failures(kvmi, vm):
    with pytest.raises(kvmi.Error, match="no memory at this address") as e:
        vm.read_physical(1 << 40, 1)
    assert (e.value.name, e.value.kvm_error) == ("not-found", 2)
    with pytest.raises(kvmi.Error) as e:
        vm.vcpu_translate(0, 1 << 40)
    assert e.value.status == kvmi.UNMAPPED
    with pytest.raises(KeyError):
        vm.connect(commands=["no-such-command"])
    with pytest.raises(kvmi.Error) as e:
        kvmi.Listener("/")
    assert e.value.name in ("argument", "system")
    vm.close()
    with pytest.raises(kvmi.Error):
        vm.get_vcpu_count()
    assert vm.hello is None


def test_events(kvmi, vm, sim):
    assert vm.wait_event(0) is None
    sim.client_sim_event(vm.sim, kvmi.EV_CR)
    event = vm.wait_event(10)
    assert (event.id, event.vcpu, event.cr.cr, event.cr.old_value, event.cr.new_value) == (kvmi.EV_CR, 1, 4, 5, 6)
    assert event.state.mode == 8 and event.state.sregs.cr3 == 0x1001 and event.state.sregs.efer == 0xd01
    assert event.msrs.lstar == 0xffffffff81e00080
    regs = event.state.regs
    event.reply(value=0x1234)
    sim.client_sim_wait_replies(vm.sim, 1)
    assert sim.client_sim_value(vm.sim) == 0x1234
    with pytest.raises(kvmi.Error) as e:
        event.reply()
    assert e.value.name == "answered"
    del event
    regs.rip = 0x777
    sim.client_sim_event(vm.sim, kvmi.EV_BREAKPOINT)
    event = next(vm.events(timeout=10))
    assert event.breakpoint.gpa == 0x5001 and event.breakpoint.insn_len == 1
    event.reply(kvmi.RETRY, regs=regs)
    sim.client_sim_wait_replies(vm.sim, 2)
    assert sim.client_sim_action(vm.sim) == kvmi.RETRY and sim.client_sim_rip(vm.sim, 1) == 0x777
    state, msrs = vm.vcpu_get_registers(1, msrs=[0x10, 0x20])
    assert state.regs.rip == 0x777 and msrs == [0x100000010, 0x100000020]
    sim.client_sim_unhook(vm.sim)
    assert [e.id for e in vm.events(timeout=0.2)] == [kvmi.EV_UNHOOK]
