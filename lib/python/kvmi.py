# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmi-2 for Python: a thin cover, by ctypes. kvmi/kvmi.h says what each function does; here

 - kvmi_vm_NAME() is VM.NAME(), kvmi_vcpu_NAME() is VM.vcpu_NAME(vcpu, ...);
 - a failure is an exception, kvmi.Error, with .status and the library's sentence;
 - what a function gives back through a pointer it returns; memory is bytes;
 - handles are closed by close(), or at the end of a "with".

    with kvmi.Listener("/run/kvmi.sock") as listener, listener.accept() as vm:
        vm.connect(commands=["vm-control-events", "vcpu-control-events", "vcpu-control-cr"], events=["unhook", "cr"])
        vm.control_events(kvmi.EV_UNHOOK, True)
        ...
        for event in vm.events(timeout=10):
            if event.id == kvmi.EV_UNHOOK:
                break       # take out what is in the guest, and go
            event.reply()

Threads: as kvmi/kvmi.h says, and no thread holds up another one (the interpreter's lock is not held in the library).
What is raised in a callback is raised again by the function that made the library call it. But a KeyboardInterrupt that comes just when
the library calls one is lost: have SIGINT set a flag, as examples/breakpoints.py does.
"""
import ctypes
import os
import select
import time
from ctypes import (CFUNCTYPE, POINTER, byref, c_bool, c_char, c_char_p, c_int, c_int64, c_short, c_size_t, c_uint, c_uint8, c_uint16, c_uint32,
                    c_uint64, c_void_p)

_lib = ctypes.CDLL(os.environ.get("LIBKVMI_2", "libkvmi-2.so.0"))

EV_UNHOOK, EV_PAUSE, EV_HYPERCALL, EV_BREAKPOINT, EV_CR, EV_TRAP, EV_XSETBV, EV_DESCRIPTOR, EV_MSR, EV_PF, EV_SINGLESTEP = 0, *range(1, 20, 2)
CONTINUE, RETRY, CRASH = range(3)
PAGE_R, PAGE_W, PAGE_X, PAGE_RWX = 1, 2, 4, 7
WRITE_JOURNAL, WRITE_KEEP = 1, 2
ALL_VCPUS = 0xffffffff
GENERAL, REFUSED, RETIRED = range(3)    # what a problem of Hooks is about
# those of kvmi_status that tools look for most
OK, SYSTEM, TIMEOUT, CLOSED, PROTOCOL, NOTHING, UNMAPPED, NOT_STARTED, BUSY = 0, 2, 3, 4, 5, 6, 8, 34, 36
XSAVE_SIZE = 4096


def _structure(name, /, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def _u64(names):
    return dict.fromkeys(names.split(), c_uint64)


_Error = _structure("_Error", status=c_int, sys_errno=c_int, kvm_error=c_int, reserved=c_int, message=c_char * 240)
Hello = _structure("Hello", uuid=c_uint8 * 16, start_time=c_int64, max_gpa=c_uint64, name=c_char * 64)
Version = _structure("Version", version=c_uint32, max_message=c_uint32, **dict.fromkeys("singlestep get_page_access get_max_gfn journal set_sregs set_msrs".split(), c_bool))
Regs = _structure("Regs", **_u64("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"))
Segment = _structure("Segment", base=c_uint64, limit=c_uint32, selector=c_uint16, **dict.fromkeys("type present dpl db s l g avl unusable padding".split(), c_uint8))
Table = _structure("Table", base=c_uint64, limit=c_uint16, padding=c_uint16 * 3)
Sregs = _structure("Sregs", **dict.fromkeys("cs ds es fs gs ss tr ldt".split(), Segment), gdt=Table, idt=Table,
                   **_u64("cr0 cr2 cr3 cr4 cr8 efer apic_base"), interrupt_bitmap=c_uint64 * 4)
Registers = _structure("Registers", mode=c_uint32, reserved=c_uint32, regs=Regs, sregs=Sregs)
Msrs = _structure("Msrs", **_u64("sysenter_cs sysenter_esp sysenter_eip efer star lstar cstar pat shadow_gs"))
Cpuid = _structure("Cpuid", **dict.fromkeys("eax ebx ecx edx".split(), c_uint32))
PageAccess = _structure("PageAccess", gpa=c_uint64, access=c_uint8)
Paging = _structure("Paging", cr3=c_uint64, levels=c_uint32, reserved=c_uint32)
Translation = _structure("Translation", gpa=c_uint64, page_size=c_uint64, **dict.fromkeys("writable user executable".split(), c_bool))
HooksResult = _structure("HooksResult", in_=c_size_t, wanted=c_size_t, left=c_size_t, held=c_bool, verified=c_bool)
_MemoryOp = _structure("_MemoryOp", gpa=c_uint64, data=c_char_p, size=c_uint32, status=c_int)


class _Data(ctypes.Union):
    _fields_ = [("breakpoint", _structure("Breakpoint", gpa=c_uint64, insn_len=c_uint8)),
                ("cr", _structure("Cr", cr=c_uint8, old_value=c_uint64, new_value=c_uint64)),
                ("msr", _structure("Msr", msr=c_uint32, old_value=c_uint64, new_value=c_uint64)),
                ("trap", _structure("Trap", vector=c_uint8, error_code=c_uint32, address=c_uint64)),
                ("xsetbv", _structure("Xsetbv", xcr=c_uint8, old_value=c_uint64, new_value=c_uint64)),
                ("descriptor", _structure("Descriptor", descriptor=c_uint8, write=c_bool)),
                ("pf", _structure("Pf", gva=c_uint64, gpa=c_uint64, access=c_uint8, not_emulated=c_bool)),
                ("singlestep", _structure("Singlestep", failed=c_bool)), ("data", c_uint8 * 64)]


class _Event(ctypes.Structure):
    _anonymous_ = ["of"]
    _fields_ = [("id", c_int), ("seq", c_uint32), ("vcpu", c_uint16), ("data_size", c_uint16), ("state", Registers), ("msrs", Msrs), ("of", _Data)]


class Error(Exception):
    """A failure: .status is one of kvmi_status, .name its name, .kvm_error and .sys_errno the numbers behind it."""

    def __init__(self, err):
        super().__init__(err.message.decode(errors="replace"))
        self.status, self.sys_errno, self.kvm_error = err.status, err.sys_errno, err.kvm_error
        self.name = _lib.kvmi_status_name(err.status).decode()


_KINDS = {"p": c_void_p, "s": c_char_p, "u": c_uint, "q": c_uint64, "b": c_bool, "z": c_size_t, "i": c_int}


def _function(name, kinds, result=c_int, error=True):
    """The library's function; kinds has a letter for each argument but the error."""
    function = getattr(_lib, "kvmi_" + name)
    function.argtypes = [_KINDS[k] for k in kinds] + [POINTER(_Error)] * error
    function.restype = result
    if not error:
        return function

    def call(*arguments):
        err = _Error()
        got = function(*arguments, byref(err))
        if got is None or result is c_int and got:
            raise Error(err)
        return got
    return call


_lib.kvmi_status_name.restype = c_char_p
_names = [_function(f"{what}_name", "u", c_char_p, False) for what in ("command", "event")]
_f = {name: _function(name, kinds) for name, kinds in {
    "listener_wait": "pip", "listener_set_key": "psz", "listener_set_secret": "psz", "vm_set_secret": "psz", "vm_connect": "pqq",
    "vm_wait_event": "pip", "vm_reply": "ppi", "vm_reply_with_value": "ppiq", "vm_reply_with_registers": "ppip", "vm_read_physical": "pqpz",
    "vm_write_physical": "pqsz", "vm_write_physical_flags": "pqszu", "vm_read_many": "ppz", "vm_write_many": "ppz", "vm_write_many_flags": "ppzu",
    "vm_pause_vcpus": "ppzbp", "vcpu_read_virtual": "puqpz", "vcpu_write_virtual": "puqsz", "vm_set_page_access": "ppz",
    "vcpu_set_registers": "pup", "vcpu_get_registers": "pupppz", "vcpu_get_xsave": "pup", "vcpu_set_xsave": "pus", "vcpu_set_sregs": "pup",
    "vcpu_set_msrs": "puppzp", "vm_start_read_physical": "pqpzp", "vm_start_write_physical": "pqszp", "vcpu_start_get_registers": "pupp",
    "vcpu_start_set_registers": "pupp", "vcpu_start_translate": "puqpp", "vcpu_start_control_events": "puubp", "vm_start_command": "puszpzpp",
    "call_wait": "p", "paging_of": "pp", "walker_translate": "ppqp", "walker_read": "ppqpz", "walker_write": "ppqsz", "hooks_add": "pqqpp",
    "hooks_remove": "pp", "hooks_restrict": "pqu", "hooks_attach": "pp", "hooks_look_for_vcpus": "p", "hooks_plant": "pp",
    "hooks_take_out": "pp", "hooks_run": "ppi", "vm_on_unhook": "ppp"}.items()}
_new_unix, _new_vsock = _function("listener_new_unix", "su", c_void_p), _function("listener_new_vsock", "u", c_void_p)
_new_vm = _function("vm_new", "isz", c_void_p)
_new_walker, _new_hooks = _function("walker_new", "pz", c_void_p), _function("hooks_new", "pp", c_void_p)
_event_free, _cancel = _function("vm_event_free", "p", None, False), _function("call_cancel", "p", None, False)
_call_then, _call_is_done = _function("call_then", "ppp", None, False), _function("call_is_done", "p", c_bool, False)


def _set(ids, names):
    """The set of commands or events that are given by name or number."""
    known = {names(i): i for i in range(64)}
    return sum({1 << (i if isinstance(i, int) else known[i.encode()]) for i in ids})


class _Handle:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        handle, self._as_parameter_ = getattr(self, "_as_parameter_", None), None
        if handle:
            self._free(handle)

    def fileno(self):
        return self._fd(self._as_parameter_)


class Listener(_Handle):
    """On a unix socket, or on a port of vsock."""
    _free, _fd = (_function("listener_" + n, "p", r, False) for n, r in (("free", None), ("fd", c_int)))

    def __init__(self, path=None, mode=0, port=None, key=b"", secret=b""):
        self._as_parameter_ = _new_unix(os.fsencode(path), mode) if port is None else _new_vsock(port)
        if key:
            _f["listener_set_key"](self, key, len(key))
        if secret:
            _f["listener_set_secret"](self, secret, len(secret))

    def accept(self, timeout=None):
        """The next VM; waits at most timeout seconds and returns None then."""
        vm, end = c_void_p(), None if timeout is None else time.monotonic() + timeout
        while True:
            left = -1 if end is None else max(end - time.monotonic(), 0)
            try:
                _f["listener_wait"](self, -1 if left < 0 else int(left * 1000), byref(vm))
                return VM(vm.value)
            except Error as e:
                if e.status != NOTHING:
                    raise
            # or a signal has come, whose handler has had its turn by now
            if left == 0:
                return None


class Event:
    """What came: its fields are those of struct kvmi_vm_event, as event.cr.new_value and event.state.regs.rip."""

    def __init__(self, vm, pointer, owned=True):
        # a copy: what is taken out of it may outlive it
        self.owned, self.vm, self.pointer, self._event = owned, vm, pointer, _Event.from_buffer_copy(ctypes.string_at(pointer, ctypes.sizeof(_Event)))

    def __getattr__(self, name):
        return getattr(self._event, name)

    def __del__(self):
        if self.owned:
            _event_free(self.pointer)

    def reply(self, action=CONTINUE, value=None, regs=None):
        if regs is not None:
            _f["vm_reply_with_registers"](self.vm, self.pointer, action, byref(regs))
        elif value is not None:
            _f["vm_reply_with_value"](self.vm, self.pointer, action, value)
        else:
            _f["vm_reply"](self.vm, self.pointer, action)


class _Callbacks:
    """Has functions called by the library, and raises later what they raise."""
    _failure = None

    def _guard(self, function):
        def call(*arguments):
            try:
                return function(*arguments)
            except BaseException as e:
                self._failure = self._failure or e
                return None
        return call

    def _raise(self):
        failure, self._failure = self._failure, None
        if failure:
            raise failure


class Call:
    """A command that is on its way: wait() for its result, or have a function called with it, or drop it."""

    def __init__(self, vm, name, *arguments, result=lambda: None):
        # arguments: among them is what the answer is written to
        self.vm, self._arguments, self._result, self._call = vm, arguments, result, c_void_p()
        _f[name](vm, *arguments, byref(self._call))

    def _take(self):
        """The call, which the library ends"""
        call, self._call = self._call, None
        if not call:
            raise ValueError("waited for already")
        return call

    def is_done(self):
        return not self._call or _call_is_done(self._call)

    def wait(self):
        _f["call_wait"](self._take())
        return self._result()

    def then(self, function):
        """VM.dispatch() will call function(result, error), or VM.close() at last; one of the two is None."""
        def done(_, error, __):
            self.vm._calls.discard(self)
            if error.contents.status:
                function(None, Error(error.contents))
            else:
                function(self._result(), None)
        call, self._done = self._take(), _DONE(self.vm._guard(done))
        self.vm._calls.add(self)
        _call_then(call, self._done, None)

    def __del__(self):
        if getattr(self, "_call", None) and self.vm._as_parameter_:
            _cancel(self._call)


_DONE = CFUNCTYPE(None, c_void_p, POINTER(_Error), c_void_p)
_UNHOOK = CFUNCTYPE(None, c_void_p, c_void_p)


class VM(_Handle, _Callbacks):
    _free, _fd = (_function("vm_" + n, "p", r, False) for n, r in (("close", None), ("fd", c_int)))
    # copies, which may outlive the VM
    hello = property(lambda self: self._as_parameter_ and Hello.from_buffer_copy(_get_hello(self).contents))
    version = property(lambda self: self._as_parameter_ and Version.from_buffer_copy(_get_version(self).contents))

    def __init__(self, handle):
        """A connection of Listener.accept(), or by VM.of_fd()."""
        self._as_parameter_, self._calls = handle, set()

    def close(self):
        super().close()
        self._raise()

    @classmethod
    def of_fd(cls, fd, key=b""):
        return cls(_new_vm(fd, key, len(key)))

    def set_secret(self, secret):
        _f["vm_set_secret"](self, secret, len(secret))

    def connect(self, commands=(), events=()):
        _f["vm_connect"](self, _set(commands, _names[0]), _set(events, _names[1]))

    def wait_event(self, timeout):
        """The next event within timeout seconds, or None."""
        pointer = c_void_p()
        try:
            _f["vm_wait_event"](self, int(timeout * 1000), byref(pointer))
        except Error as e:
            self._raise()
            if e.status == NOTHING:
                return None
            raise
        return Event(self, pointer.value)

    def on_unhook(self, function):
        """function() will be called once, by dispatch() or wait_event(), when UNHOOK comes, in place of an event."""
        callback = _UNHOOK(self._guard(lambda _, __: function()))
        _f["vm_on_unhook"](self, callback, None)
        self._unhook = callback         # kept, as long as the library may call it

    def next_event(self):
        """The oldest event that has been received, or None."""
        pointer = _next_event(self)
        return Event(self, pointer) if pointer else None

    def wait(self, timeout):
        """Waits at most timeout seconds until there is something to take or to send, and does so: for loops with next_event() or Hooks."""
        poll = select.poll()
        poll.register(self, _poll_events(self))
        poll.poll(timeout * 1000)
        self.process()

    def next_timeout(self):
        """In ms, as poll() wants it"""
        return _next_timeout(self)

    def dispatch(self):
        called = _dispatch(self)
        self._raise()
        return called

    def shutdown(self):
        _shutdown(self)

    def events(self, timeout):
        """Events, until none comes for timeout seconds."""
        return iter(lambda: self.wait_event(timeout), None)

    def _read(self, name, *arguments, size):
        data = ctypes.create_string_buffer(size)
        _f[name](self, *arguments, data, *[size] * (name != "vcpu_get_xsave"))
        return data.raw

    def read_physical(self, gpa, size):
        return self._read("vm_read_physical", gpa, size=size)

    def write_physical(self, gpa, data, flags=None):
        if flags is None:
            _f["vm_write_physical"](self, gpa, data, len(data))
        else:
            _f["vm_write_physical_flags"](self, gpa, data, len(data), flags)

    def read_many(self, ranges):
        """ranges: (gpa, size). A list of what is there, with None for those that cannot be read."""
        buffers = [ctypes.create_string_buffer(size) for _, size in ranges]
        ops = (_MemoryOp * len(buffers))(*((gpa, ctypes.addressof(b), len(b)) for (gpa, _), b in zip(ranges, buffers)))
        try:
            _f["vm_read_many"](self, ops, len(ops))
        except Error as e:
            if e.status in (SYSTEM, CLOSED, PROTOCOL):
                raise
        return [None if op.status else b.raw for op, b in zip(ops, buffers)]

    def write_many(self, data, flags=None):
        """data: bytes by gpa. All are tried; the first failure is raised."""
        ops = (_MemoryOp * len(data))(*((gpa, d, len(d)) for gpa, d in data.items()))
        if flags is None:
            _f["vm_write_many"](self, ops, len(ops))
        else:
            _f["vm_write_many_flags"](self, ops, len(ops), flags)

    def pause_vcpus(self, vcpus, wait=True):
        """The status of each, OK (0) or another"""
        statuses = (c_int * len(vcpus))()
        try:
            _f["vm_pause_vcpus"](self, (c_uint16 * len(vcpus))(*vcpus), len(vcpus), wait, statuses)
        except Error as e:
            if e.status in (SYSTEM, CLOSED, PROTOCOL):
                raise
        return list(statuses)

    def start_read_physical(self, gpa, size):
        data = ctypes.create_string_buffer(size)
        return Call(self, "vm_start_read_physical", gpa, data, size, result=lambda: data.raw)

    def start_write_physical(self, gpa, data):
        return Call(self, "vm_start_write_physical", gpa, data, len(data))

    def vcpu_start_get_registers(self, vcpu):
        state = Registers()
        return Call(self, "vcpu_start_get_registers", vcpu, byref(state), result=lambda: state)

    def vcpu_start_set_registers(self, vcpu, regs):
        return Call(self, "vcpu_start_set_registers", vcpu, byref(regs))

    def vcpu_start_translate(self, vcpu, gva):
        gpa = c_uint64()
        return Call(self, "vcpu_start_translate", vcpu, gva, byref(gpa), result=lambda: gpa.value)

    def vcpu_start_control_events(self, vcpu, id, enable):
        return Call(self, "vcpu_start_control_events", vcpu, id, enable)

    def start_command(self, id, body=b"", capacity=8184):
        """Any command, as linux/kvmi.h has it; the answer's bytes are the result."""
        answer, size = ctypes.create_string_buffer(capacity), c_size_t()
        return Call(self, "vm_start_command", id, body, len(body), answer, capacity, byref(size), result=lambda: answer.raw[:size.value])

    def vcpu_read_virtual(self, vcpu, gva, size):
        return self._read("vcpu_read_virtual", vcpu, gva, size=size)

    def vcpu_write_virtual(self, vcpu, gva, data):
        _f["vcpu_write_virtual"](self, vcpu, gva, data, len(data))

    def vcpu_get_registers(self, vcpu, msrs=()):
        """Registers; with msrs, (Registers, their values)"""
        state, numbers, values = Registers(), (c_uint32 * len(msrs))(*msrs), (c_uint64 * len(msrs))()
        _f["vcpu_get_registers"](self, vcpu, byref(state), numbers, values, len(msrs))
        return (state, list(values)) if msrs else state

    def vcpu_set_registers(self, vcpu, regs):
        _f["vcpu_set_registers"](self, vcpu, byref(regs))

    def vcpu_get_xsave(self, vcpu):
        return self._read("vcpu_get_xsave", vcpu, size=XSAVE_SIZE)

    def vcpu_set_xsave(self, vcpu, xsave):
        if len(xsave) != XSAVE_SIZE:
            raise ValueError(f"XSAVE_SIZE is {XSAVE_SIZE}")
        _f["vcpu_set_xsave"](self, vcpu, xsave)

    def vcpu_set_sregs(self, vcpu, sregs):
        _f["vcpu_set_sregs"](self, vcpu, byref(sregs))

    def vcpu_set_msrs(self, vcpu, msrs):
        """msrs: values by number. The exception for one that cannot be written has .done: how many have been before."""
        done = c_size_t()
        try:
            _f["vcpu_set_msrs"](self, vcpu, (c_uint32 * len(msrs))(*msrs), (c_uint64 * len(msrs))(*msrs.values()), len(msrs), byref(done))
        except Error as e:
            e.done = done.value
            raise

    def set_page_access(self, pages):
        """pages: access by gpa"""
        array = (PageAccess * len(pages))(*pages.items())
        _f["vm_set_page_access"](self, array, len(pages))


_get_hello, _get_version = _function("vm_get_hello", "p", POINTER(Hello), False), _function("vm_get_version", "p", POINTER(Version), False)
_next_event, _poll_events = _function("vm_next_event", "p", c_void_p, False), _function("vm_poll_events", "p", c_short, False)
_next_timeout, _dispatch = _function("vm_next_timeout", "p", c_int, False), _function("vm_dispatch", "p", c_uint, False)
_shutdown = _function("vm_shutdown", "p", None, False)


def _method(name, kinds, result):
    function = _function(name, "p" + kinds + ("p" if result else ""))

    def method(self, *arguments):
        if not result:
            function(self, *arguments)
            return None
        got = result()
        function(self, *arguments, byref(got))
        return got.value if hasattr(got, "value") else got
    method.__name__, method.__doc__ = name, f"kvmi_{name}()"
    setattr(VM, name.removeprefix("vm_"), method)


# Those that need nothing special: the kinds of their arguments, what they give back
for _name, (_arguments, _result) in {
        "vm_set_timeout": ("i", None), "vm_wait_hello": ("", None), "vm_process": ("", None), "vm_flush": ("", None), "vm_check_command": ("u", None), "vm_check_event": ("u", None),
        "vm_control_events": ("ub", None), "vm_control_cleanup": ("b", None), "vm_pause_vcpu": ("ub", None), "vm_get_vcpu_count": ("", c_uint),
        "vm_get_max_gfn": ("", c_uint64), "vm_get_page_access": ("q", c_uint8), "vcpu_control_events": ("uub", None), "vcpu_control_cr": ("uub", None),
        "vcpu_control_msr": ("uub", None), "vcpu_control_singlestep": ("ub", None), "vcpu_inject_exception": ("uuuq", None),
        "vcpu_get_tsc_speed": ("u", c_uint64), "vcpu_get_cpuid": ("uuu", Cpuid), "vcpu_get_xcr": ("uu", c_uint64),
        "vcpu_get_mtrr_type": ("uq", c_uint8), "vcpu_translate": ("uq", c_uint64)}.items():
    _method(_name, _arguments, _result)


def paging_of(state):
    """The page tables of a vCPU whose registers these are."""
    paging = Paging()
    _f["paging_of"](byref(state), byref(paging))
    return paging


class Walker(_Handle):
    """The guest's page tables, looked at from here; to be closed before its VM."""
    _free, _forget = (_function("walker_" + n, "p", None, False) for n in ("free", "forget"))

    def __init__(self, vm, cache_pages=256):
        self._as_parameter_ = _new_walker(vm, cache_pages)

    def forget(self):
        self._forget(self._as_parameter_)

    def translate(self, paging, gva):
        got = Translation()
        _f["walker_translate"](self, byref(paging), gva, byref(got))
        return got

    def read(self, paging, gva, size):
        data = ctypes.create_string_buffer(size)
        _f["walker_read"](self, byref(paging), gva, data, size)
        return data.raw

    def write(self, paging, gva, data):
        _f["walker_write"](self, byref(paging), gva, data, len(data))


# --- kvmi/hooks.h ---

_HOOKS_CALLBACKS = dict(hit=CFUNCTYPE(None, c_void_p, c_void_p, c_void_p), page=CFUNCTYPE(c_int, c_void_p, c_void_p),
                        event=CFUNCTYPE(None, c_void_p, c_void_p), problem=CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_void_p),
                        interrupted=CFUNCTYPE(c_bool, c_void_p))
_Callback = _structure("_Callback", **_HOOKS_CALLBACKS)


class Hook:
    """A breakpoint of Hooks, until Hooks.remove()"""

    def __init__(self, handle, cookie):
        self._as_parameter_, self.cookie = handle, cookie


for _name, _result in dict(gva=c_uint64, gpa=c_uint64, is_in=c_bool, is_retired=c_bool, original=c_uint8, text=c_char_p).items():
    setattr(Hook, _name, property(_function(f"hook_{_name}", "p", _result, False)))


class Hooks(_Handle, _Callbacks):
    """Breakpoints and page restrictions that come and go with the VM's life. Each of the functions may be left out:
    hit(hook, event), page(event) that returns an action (None: CONTINUE), event(event), problem(hook or None, kind, text), interrupted()."""
    _free = _function("hooks_free", "p", None, False)

    def __init__(self, hit=None, page=None, event=None, problem=None, interrupted=None):
        self.vm, self._hooks, self._as_parameter_ = None, {}, None
        functions = dict(
            hit=hit and (lambda hook, e, _: hit(self._hooks[hook], Event(self.vm, e, owned=False))),
            page=page and (lambda e, _: page(Event(self.vm, e, owned=False)) or CONTINUE),
            event=event and (lambda e, _: event(Event(self.vm, e))),
            problem=problem and (lambda hook, kind, text, _: problem(self._hooks.get(hook), kind, text.decode(errors="replace"))),
            interrupted=interrupted and (lambda _: bool(interrupted())))
        # kept, as long as the library may call them
        self._callbacks = _Callback(**{n: _HOOKS_CALLBACKS[n](self._guard(f)) for n, f in functions.items() if f})
        self._as_parameter_ = _new_hooks(byref(self._callbacks), None)

    def _do(self, name, *arguments):
        try:
            return _f["hooks_" + name](self, *arguments)
        finally:
            self._raise()

    def add(self, gva, gpa, cookie=None):
        hook = c_void_p()
        self._do("add", gva, gpa, None, byref(hook))
        self._hooks[hook.value] = Hook(hook.value, cookie)
        return self._hooks[hook.value]

    def remove(self, hook):
        self._do("remove", hook)
        del self._hooks[hook._as_parameter_]

    def restrict(self, gpa, access):
        self._do("restrict", gpa, access)

    def attach(self, vm):
        self.vm = vm
        self._do("attach", vm)

    def look_for_vcpus(self):
        self._do("look_for_vcpus")

    def set_paging(self, paging):
        _set_paging(self, byref(paging))

    def plant(self):
        result = HooksResult()
        self._do("plant", byref(result))
        return result

    def take_out(self):
        result = HooksResult()
        self._do("take_out", byref(result))
        return result

    def detach(self):
        self.vm = None
        return _detach(self)

    def run(self, vm, stop_fd=-1):
        """All of it for one connection: until UNHOOK comes (is_asked_to_leave()) or stop_fd can be read from."""
        self.vm = vm
        try:
            self._do("run", vm, stop_fd)
        finally:
            self.vm = None

    def __del__(self):
        if not self.vm:
            self.close()

    def is_lost(self):
        """The failure with which the connection has ended, or None"""
        err = _Error()
        return Error(err) if _hooks_is_lost(self, byref(err)) else None


_detach = _function("hooks_detach", "p", c_size_t, False)
_set_paging, _hooks_is_lost = _function("hooks_set_paging", "pp", None, False), _function("hooks_is_lost", "pp", c_bool, False)


def _hooks_method(name, result):
    function = _function("hooks_" + name, "p", result, False)

    def method(self):
        got = function(self)
        self._raise()
        return got
    method.__name__, method.__doc__ = name, f"kvmi_hooks_{name}()"
    setattr(Hooks, name, method)


for _name, _result in dict(forget=None, dispatch=c_bool, vcpus=c_uint, foreign=c_uint64, is_leaving=c_bool, is_asked_to_leave=c_bool).items():
    _hooks_method(_name, _result)
