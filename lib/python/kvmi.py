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
Breakpoints that come and go with the VM's life (kvmi/hooks.h) are for C.
"""
import ctypes
import os
import select
from ctypes import POINTER, byref, c_bool, c_char, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

_lib = ctypes.CDLL(os.environ.get("LIBKVMI_2", "libkvmi-2.so.0"))

EV_UNHOOK, EV_PAUSE, EV_HYPERCALL, EV_BREAKPOINT, EV_CR, EV_TRAP, EV_XSETBV, EV_DESCRIPTOR, EV_MSR, EV_PF, EV_SINGLESTEP = 0, *range(1, 20, 2)
CONTINUE, RETRY, CRASH = range(3)
PAGE_R, PAGE_W, PAGE_X, PAGE_RWX = 1, 2, 4, 7
NOTHING, UNMAPPED, CLOSED = 6, 8, 4     # those of kvmi_status that tools look for most


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
    "listener_accept": "pp", "listener_set_key": "psz", "listener_set_secret": "psz", "vm_set_secret": "psz", "vm_wait_hello": "p", "vm_connect": "pqq", "vm_process": "p",
    "vm_wait_event": "pip", "vm_reply": "ppi", "vm_reply_with_value": "ppiq", "vm_reply_with_registers": "ppip", "vm_read_physical": "pqpz",
    "vm_write_physical": "pqsz", "vcpu_read_virtual": "puqpz", "vcpu_write_virtual": "puqsz", "vm_set_page_access": "ppz", "vcpu_set_registers": "pup",
    "vcpu_get_registers": "pupppz", "vm_start_read_physical": "pqpzp", "call_wait": "p"}.items()}
_new_unix, _new_vsock = _function("listener_new_unix", "su", c_void_p), _function("listener_new_vsock", "u", c_void_p)
_new_vm = _function("vm_new", "isz", c_void_p)
_event_free, _cancel = _function("vm_event_free", "p", None, False), _function("call_cancel", "p", None, False)


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
        if not select.select([self], [], [], timeout)[0]:
            return None
        vm = c_void_p()
        _f["listener_accept"](self, byref(vm))
        return VM(vm.value)


class Event:
    """What came: its fields are those of struct kvmi_vm_event, as event.cr.new_value and event.state.regs.rip."""

    def __init__(self, vm, pointer):
        # a copy: what is taken out of it may outlive it
        self.vm, self.pointer, self._event = vm, pointer, _Event.from_buffer_copy(ctypes.string_at(pointer, ctypes.sizeof(_Event)))

    def __getattr__(self, name):
        return getattr(self._event, name)

    def __del__(self):
        _event_free(self.pointer)

    def reply(self, action=CONTINUE, value=None, regs=None):
        if regs is not None:
            _f["vm_reply_with_registers"](self.vm, self.pointer, action, byref(regs))
        elif value is not None:
            _f["vm_reply_with_value"](self.vm, self.pointer, action, value)
        else:
            _f["vm_reply"](self.vm, self.pointer, action)


class Call:
    """A read that is on its way; wait() gives what it has read."""

    def __init__(self, vm, gpa, size):
        self.vm, self.data, self._call = vm, ctypes.create_string_buffer(size), c_void_p()
        _f["vm_start_read_physical"](vm, gpa, self.data, size, byref(self._call))

    def wait(self):
        call, self._call = self._call, None
        if not call:
            raise ValueError("waited for already")
        _f["call_wait"](call)
        return self.data.raw

    def __del__(self):
        if self._call and self.vm._as_parameter_:
            _cancel(self._call)


class VM(_Handle):
    _free, _fd = (_function("vm_" + n, "p", r, False) for n, r in (("close", None), ("fd", c_int)))
    hello = property(lambda self: self._as_parameter_ and _get_hello(self).contents)
    version = property(lambda self: self._as_parameter_ and _get_version(self).contents)

    def __init__(self, handle):
        """A connection of Listener.accept(), or by VM.of_fd()."""
        self._as_parameter_ = handle

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
            if e.status == NOTHING:
                return None
            raise
        return Event(self, pointer.value)

    def events(self, timeout):
        """Events, until none comes for timeout seconds."""
        return iter(lambda: self.wait_event(timeout), None)

    def _read(self, name, *arguments, size):
        data = ctypes.create_string_buffer(size)
        _f[name](self, *arguments, data, size)
        return data.raw

    def read_physical(self, gpa, size):
        return self._read("vm_read_physical", gpa, size=size)

    def start_read_physical(self, gpa, size):
        return Call(self, gpa, size)

    def write_physical(self, gpa, data):
        _f["vm_write_physical"](self, gpa, data, len(data))

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

    def set_page_access(self, pages):
        """pages: access by gpa"""
        array = (PageAccess * len(pages))(*pages.items())
        _f["vm_set_page_access"](self, array, len(pages))


_get_hello, _get_version = _function("vm_get_hello", "p", POINTER(Hello), False), _function("vm_get_version", "p", POINTER(Version), False)


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
        "vm_set_timeout": ("i", None), "vm_flush": ("", None), "vm_check_command": ("u", None), "vm_check_event": ("u", None),
        "vm_control_events": ("ub", None), "vm_control_cleanup": ("b", None), "vm_pause_vcpu": ("ub", None), "vm_get_vcpu_count": ("", c_uint),
        "vm_get_max_gfn": ("", c_uint64), "vm_get_page_access": ("q", c_uint8), "vcpu_control_events": ("uub", None), "vcpu_control_cr": ("uub", None),
        "vcpu_control_msr": ("uub", None), "vcpu_control_singlestep": ("ub", None), "vcpu_inject_exception": ("uuuq", None),
        "vcpu_get_tsc_speed": ("u", c_uint64), "vcpu_get_cpuid": ("uuu", Cpuid), "vcpu_get_xcr": ("uu", c_uint64),
        "vcpu_get_mtrr_type": ("uq", c_uint8), "vcpu_translate": ("uq", c_uint64)}.items():
    _method(_name, _arguments, _result)
