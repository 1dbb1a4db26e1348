# SPDX-License-Identifier: GPL-2.0-or-later
"""The library from Python, against the unit tests' simulator in this process."""
import ctypes
import os
import re
import resource
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
                                    ("subscribed", [ctypes.c_void_p], ctypes.c_bool), ("replies", [ctypes.c_void_p], ctypes.c_uint),
                                    ("wait_replies", [ctypes.c_void_p, ctypes.c_uint], None), ("access", [ctypes.c_void_p, ctypes.c_uint64], ctypes.c_uint)):
        function = getattr(lib, f"client_sim_{name}")
        function.argtypes, function.restype = arguments, result
    return lib


@pytest.fixture
def vm(kvmi, sim, tmp_path):
    path = tmp_path / "socket"
    with kvmi.Listener(path, key=b"a key") as listener:
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert listener.accept(timeout=0) is None and listener.accept(timeout=0.05) is None
        peer = sim.client_sim_new(str(path).encode())
        vm = listener.accept(timeout=10)
        vm.sim = peer
        vm.connect(commands=["vm-read-physical", 16], events=["cr", kvmi.EV_MSR])
        yield vm
        vm.close()
        sim.client_sim_free(peer)
    assert not path.exists()


def test_covers_the_library():
    """All functions of libkvmi-2, but one that only the older library needs."""
    functions = set(re.findall(r"^\s+kvmi_(\w+);", (host.TOP / "lib/libkvmi-2.map").read_text(), re.M))
    text = (host.TOP / "lib/python/kvmi.py").read_text()
    assert len(functions) > 80
    # some names are put together from the class's and the method's
    missing = {f for f in functions if not re.search(rf'"({f}|{f.split("_", 1)[1]})"|\b{f.split("_", 1)[1]}=', text)}
    assert missing == {"vm_set_key_hash", "listener_accept"}, missing


def test_many_files(kvmi, tmp_path):
    """Descriptors above those that select() can take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this process may not have so many open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        with kvmi.Listener(tmp_path / "socket") as listener:
            assert listener.fileno() >= 1024 and listener.accept(timeout=0) is None
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_there(kvmi, vm):
    assert vm.hello.name == b"a guest" and bytes(vm.hello.uuid) == bytes(range(1, 17)) and vm.hello.max_gpa == 0x10000
    assert vm.version.version == 1 and vm.version.journal and vm.version.set_msrs
    assert (vm.get_vcpu_count(), vm.get_max_gfn(), vm.vcpu_get_tsc_speed(0), vm.vcpu_get_mtrr_type(0, 0)) == (3, 15, 2500000000, 6)
    assert vm.vcpu_get_cpuid(0, 7, 1).eax == 7
    assert vm.control_events(kvmi.EV_UNHOOK, True) is None
    hello, version = vm.hello, vm.version
    vm.close()
    # they are not the library's
    assert bytes(hello.uuid) == bytes(range(1, 17)) and hello.name == b"a guest" and version.version == 1


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


def test_many(kvmi, vm, sim):
    vm.write_many({0xffe: b"\x01\x02\x03", 0x2000: b"\x04"}, flags=kvmi.WRITE_JOURNAL)
    assert vm.read_many([(0xffe, 3), (1 << 40, 1), (0x2000, 1)]) == [b"\x01\x02\x03", None, b"\x04"]
    vm.write_physical(0x2000, b"\x05", flags=kvmi.WRITE_KEEP)
    with pytest.raises(kvmi.Error):
        vm.write_many({0x2000: b"\x06", 1 << 40: b"\x07"})
    assert vm.read_physical(0x2000, 1) == b"\x06"
    # the simulator answers a PAUSE with its event
    assert vm.pause_vcpus([0, 7, 1]) == [kvmi.OK, 37, kvmi.OK]
    pauses = sorted((e.id, e.vcpu) for e in (vm.next_event(), vm.next_event()))
    assert pauses == [(kvmi.EV_PAUSE, 0), (kvmi.EV_PAUSE, 1)] and vm.next_event() is None
    vm.vcpu_set_xsave(0, bytes(range(256)) * 16)
    assert vm.vcpu_get_xsave(0) == bytes(range(256)) * 16
    with pytest.raises(ValueError):
        vm.vcpu_set_xsave(0, b"")
    # the simulator's MSRs hold their numbers
    vm.vcpu_set_msrs(0, {3: 3, 4: 4})
    with pytest.raises(kvmi.Error) as e:
        vm.vcpu_set_msrs(0, {3: 3, 4: 5, 6: 6})
    assert e.value.done == 1
    vm.vcpu_control_events(kvmi.ALL_VCPUS, kvmi.EV_CR, True)


def test_calls(kvmi, vm, sim):
    got = []
    calls = [vm.start_write_physical(0x3000, b"abc"), vm.start_read_physical(0x3000, 3), vm.vcpu_start_get_registers(1),
             vm.vcpu_start_translate(0, 0x1234), vm.vcpu_start_control_events(0, kvmi.EV_CR, True), vm.start_command(2), vm.start_read_physical(1 << 40, 1)]
    for call in calls:
        call.then(lambda result, error: got.append(error.name if error else result))
    with pytest.raises(ValueError):
        calls[0].wait()
    del calls, call         # the library has them, and what they read into
    assert 0 < vm.next_timeout() <= 5000
    while len(got) < 7:
        vm.wait(10)
        vm.dispatch()
    assert vm.next_timeout() == -1
    assert got[:2] == [None, b"abc"] and got[2].sregs.cr3 == 0x1001 and got[3:5] == [0x234, None] and got[6] == "not-found"
    assert got[5][:4] == bytes([1, 0, 0, 0])        # GET_VERSION
    call = vm.start_read_physical(0x3000, 3)
    while not call.is_done():
        vm.wait(10)
    assert call.wait() == b"abc" and call.is_done()

    def fail(result, error):
        raise LookupError(result, error and error.name)
    vm.start_read_physical(0x3001, 1).then(fail)
    with pytest.raises(LookupError, match="b'b', None"):
        while not vm.dispatch():
            vm.wait(10)
    vm.start_read_physical(0x3001, 1).then(fail)
    vm.shutdown()
    with pytest.raises(LookupError, match="None, 'closed'"):
        vm.close()


def test_hooks(kvmi, vm, sim):
    memory, seen, fault = sim.client_sim_memory(vm.sim), [], []
    ctypes.memset(memory + 0x5000, 0x90, 16)        # NOPs

    def hit(hook, event):
        seen.append((hook.cookie, event.vcpu, event.breakpoint.gpa, event.state.regs.rip))
        if fault:
            raise fault.pop()

    hooks = kvmi.Hooks(hit=hit, page=lambda e: seen.append((e.id, e.pf.gpa)), event=lambda e: (seen.append(e.cr.new_value), e.reply(value=77)),
                       problem=lambda hook, kind, text: seen.append((hook.cookie, kind, text)), interrupted=lambda: False)
    hook, bad = hooks.add(0x4001, 0x5001, "ours"), hooks.add(0x4008, 0x5008, "bad")
    ctypes.memset(memory + 0x5008, 0x06, 1)         # no instruction at all
    with pytest.raises(kvmi.Error) as e:
        hooks.add(0x4001, 0x5001)
    assert e.value.status == kvmi.BUSY
    hooks.attach(vm)
    hooks.restrict(0x7123, kvmi.PAGE_R)
    assert sim.client_sim_access(vm.sim, 0x7000) == 1 and hooks.vcpus() == 2
    result = hooks.plant()
    assert (result.in_, result.wanted) == (1, 1) and hook.is_in and not bad.is_in and not hook.is_retired
    assert (hook.gva, hook.gpa, hook.original, hook.text) == (0x4001, 0x5001, 0x90, b"nop")
    assert seen.pop()[:2] == ("bad", kvmi.REFUSED)
    assert ctypes.string_at(memory + 0x5000, 3) == b"\x90\xcc\x90"

    def event(id, replies):
        sim.client_sim_event(vm.sim, id)
        while not seen:
            vm.wait(10)
            hooks.dispatch()
        hooks.dispatch()
        sim.client_sim_wait_replies(vm.sim, replies)
        return seen.pop()

    # two vCPUs were paused for planting
    rip = sim.client_sim_rip(vm.sim, 1)
    assert event(kvmi.EV_BREAKPOINT, 3) == ("ours", 1, 0x5001, rip)
    assert sim.client_sim_action(vm.sim) == kvmi.RETRY and sim.client_sim_rip(vm.sim, 1) == rip + 1
    assert event(kvmi.EV_CR, 4) == 6 and sim.client_sim_value(vm.sim) == 77
    hooks.restrict(0, kvmi.PAGE_X)      # the simulator's PF is at 14
    assert event(kvmi.EV_PF, 5) == (kvmi.EV_PF, 14) and sim.client_sim_action(vm.sim) == kvmi.CONTINUE

    fault.append(LookupError("in a callback"))
    with pytest.raises(LookupError, match="in a callback"):
        event(kvmi.EV_BREAKPOINT, 6)
    hooks.dispatch()
    assert not hooks.is_leaving()
    sim.client_sim_unhook(vm.sim)
    while not hooks.is_leaving():
        vm.wait(10)
        hooks.dispatch()
    assert hooks.is_asked_to_leave() and hooks.is_lost() is None
    result = hooks.take_out()
    assert (result.in_, result.left, result.verified) == (1, 0, True) and sim.client_sim_access(vm.sim, 0x7000) == 7
    assert ctypes.string_at(memory + 0x5000, 3) == b"\x90\x90\x90" and hooks.detach() == 0
    hooks.remove(bad)
    hooks.close()


def test_unhook(kvmi, vm, sim):
    told = []
    vm.on_unhook(lambda: told.append("unhook"))
    sim.client_sim_unhook(vm.sim)
    while not told:
        assert vm.wait_event(10) is None
    assert told == ["unhook"]


def test_hooks_run(kvmi, vm, sim):
    memory, seen = sim.client_sim_memory(vm.sim), []
    ctypes.memset(memory + 0x5000, 0x90, 16)

    def hit(hook, event):
        # there is one: now the VM is about to be left
        seen.append((hook.cookie, ctypes.string_at(memory + 0x5001, 1)))
        sim.client_sim_unhook(vm.sim)

    hooks = kvmi.Hooks(hit=hit)
    hooks.add(0x4001, 0x5001, "ours")
    sim.client_sim_event(vm.sim, kvmi.EV_BREAKPOINT)
    hooks.run(vm)
    assert seen == [("ours", b"\xcc")] and hooks.is_asked_to_leave()
    assert ctypes.string_at(memory + 0x5000, 3) == b"\x90\x90\x90"
    hooks.close()


def test_walker(kvmi, vm):
    with kvmi.Walker(vm) as walker, pytest.raises(kvmi.Error) as e:
        # the simulator has no tables
        walker.read(kvmi.paging_of(vm.vcpu_get_registers(0)), 0x1000, 1)
    assert e.value.status == kvmi.UNMAPPED


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
