"""Guests without an assembler: scripts of memory accesses and requests that are executed in long mode.

script = Script()
script.fill(0x20_0000, 4096, 0x11)              # write
answer = script.map(0x20_0000, 4096, to="private")
script.start(vm)
vm.run(timeout=10.0)
assert script.result(vm, answer) == 0           # RAX
"""

from __future__ import annotations

import difflib
import struct
from pathlib import Path
from typing import Final, Literal, NoReturn, TypeAlias

from pagegate._core import Vm, number_of_bytes, probe, script_guest

PAGE: Final = 4096
_RECORD = struct.Struct("<Q3Q4Q")
_RESULT_OFFSET = 32
_WORD = 8
_ENCRYPTED = 1 << 4
_TRIAL_MEMORY = 1 << 20
_MOST = (1 << 64) - 1

_HALT, _FILL, _CHECK, _READ, _WRITE, _VMCALL, _VMMCALL, _DOORBELL = range(8)
_OUT, _IN, _LOOP, _BARRIER, _ADD, _TOUCH, _UNLESS, _COUNT, _DIRTY = range(8, 17)

Call: TypeAlias = Literal["hypercall", "doorbell"]
"""How a guest makes explicit requests: by hypercall, or by the doorbell where hypercalls do not complete."""


State: TypeAlias = Literal["private", "shared"]
"""The state of a page."""


def hypercall_instruction() -> Literal["vmcall", "vmmcall"]:
    """The hypercall instruction of this CPU."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return "vmmcall" if "AuthenticAMD" in cpuinfo or "HygonGenuine" in cpuinfo else "vmcall"


class Script:
    """A list of operations for one vCPU. Each method appends one and returns its number, from 0.

    Addresses and sizes are ints, or text such as "2M". Addresses are linear ones, which mode "long" maps to the same
    guest-physical ones; with a shared bit, ``address | 1 << bit`` is the shared view. A word is 8 bytes. The script
    itself has to lie in shared memory.

    Raises TypeError and ValueError for arguments that an operation cannot have.
    """

    def __init__(self, *, call: Call = "doorbell") -> None:
        """``call``: how ``map`` and ``map_raw`` make requests, "doorbell" or "hypercall"."""
        if call not in ("hypercall", "doorbell"):
            raise ValueError(f'call is {call!r}: it must be "hypercall" or "doorbell"')
        if call == "doorbell":
            self._map = _DOORBELL
        else:
            self._map = {"vmcall": _VMCALL, "vmmcall": _VMMCALL}[hypercall_instruction()]
        self._operations: list[tuple[int, int, int, int]] = []
        self._barriers: dict[int, int] = {}
        self._targets: list[tuple[str, int, int]] = []
        self._table: int | None = None

    def __getattr__(self, name: str) -> NoReturn:
        """AttributeError that names the operation that is meant."""
        known = [each for each in vars(Script) if not each.startswith("_")]
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise AttributeError(f"a Script has no operation {name}: {meant}", name=name, obj=self)

    def __repr__(self) -> str:
        """How many operations it has."""
        started = "" if self._table is None else ", started"
        return f"<pagegate.guests.Script of {len(self)} operations{started}>"

    def __len__(self) -> int:
        """The number of operations, which is also the number of the next one."""
        return len(self._operations)

    def _append(self, operation: int, **words: int | str) -> int:
        """Appends an operation with up to three words, which are passed by the names that errors call them."""
        a, b, c = (*(_checked(name.rstrip("_"), word) for name, word in words.items()), 0, 0, 0)[:3]
        self._operations.append((operation, a, b, c))
        return len(self._operations) - 1

    def halt(self) -> int:
        """HLT, for good. There is one at the end of every script anyway."""
        return self._append(_HALT)

    def fill(self, address: int | str, size: int | str, byte: int) -> int:
        """Fills ``size`` bytes, a multiple of 8, with ``byte``."""
        return self._append(_FILL, address=address, size=_words(size), byte=_word(byte))

    def check(self, address: int | str, size: int | str, byte: int) -> int:
        """Compares ``size`` bytes, a multiple of 8, with ``byte``. Result: how many words differ."""
        return self._append(_CHECK, address=address, size=_words(size), byte=_word(byte))

    def read(self, address: int | str) -> int:
        """Reads a word. Result: the word."""
        return self._append(_READ, address=address)

    def write(self, address: int | str, word: int) -> int:
        """Writes a word."""
        return self._append(_WRITE, address=address, _=0, word=word)

    def map(self, gpa: int | str, size: int | str, *, to: State, page_size_hint: int = 0) -> int:
        """KVM_HC_MAP_GPA_RANGE on ``size`` bytes, a positive multiple of 4096. Result: RAX.

        ``page_size_hint``: 0 for 4096 bytes, 1 for 2 MiB, 2 for 1 GiB. For malformed requests use ``map_raw``.
        """
        if to not in ("private", "shared"):
            raise ValueError(f'to is {to!r}: it must be "private" or "shared"')
        size = _checked("size", size)
        if size == 0 or size % PAGE:
            raise ValueError(f"size is {size}: it must be a positive multiple of {PAGE}")
        # Bit 4 means private.
        _checked("page_size_hint", page_size_hint, _ENCRYPTED - 1)
        return self.map_raw(gpa, size // PAGE, _ENCRYPTED * (to == "private") | page_size_hint)

    def map_raw(self, gpa: int | str, pages: int, attributes: int) -> int:
        """KVM_HC_MAP_GPA_RANGE with any RBX, RCX and RDX. Result: RAX."""
        return self._append(self._map, gpa=gpa, pages=pages, attributes=attributes)

    def out(self, port: int, value: int, size: int = 1) -> int:
        """OUT of 1, 2 or 4 bytes."""
        return self._append(_OUT, port=_port(port), size=_access(size), value=value)

    def in_(self, port: int, size: int = 1) -> int:
        """IN of 1, 2 or 4 bytes. Result: what was read."""
        return self._append(_IN, port=_port(port), size=_access(size))

    def loop(self, to: int, times: int) -> int:
        """Goes back to operation ``to``, so that the operations from there on are executed ``times`` times in all."""
        if _checked("to", to) > len(self):
            raise ValueError(f"to is {to}: a loop goes back, and there are {len(self)} operations before it")
        return self._append(_LOOP, to=to, times=times, times_=times)

    def barrier(self, address: int | str, vcpus: int) -> int:
        """Waits until ``vcpus`` scripts have come here, each time anew. The word at ``address`` must be 0 at first.

        Each barrier of a script has a word of its own, else ValueError: it would find the other's count there.
        """
        address = _checked("address", address)
        if address in self._barriers:
            raise ValueError(
                f"address {address:#x} is operation {self._barriers[address]}'s, a barrier, too: take another"
            )
        self._barriers[address] = len(self)
        return self._append(_BARRIER, address=address, _=0, vcpus=vcpus)

    def add(self, address: int | str, word: int) -> int:
        """Adds to the word at ``address``, atomically. Result: the word before."""
        return self._append(_ADD, address=address, _=0, word=word)

    def touch(self, address: int | str, count: int, stride: int | str = PAGE) -> int:
        """Reads one byte at ``address`` and every ``stride`` bytes after it, ``count`` in all."""
        return self._append(_TOUCH, address=address, count=count, stride=stride)

    def goto_unless(self, address: int | str, word: int, to: int) -> int:
        """Goes to operation ``to`` unless the word at ``address`` is ``word``."""
        self._targets.append(("goto_unless", len(self), _checked("to", to)))
        return self._append(_UNLESS, to=to, address=address, word=word)

    def count(self) -> int:
        """Counts how often it is executed. Result: the count."""
        return self._append(_COUNT)

    def dirty(self, address: int | str, count: int, stride: int | str = PAGE) -> int:
        """Writes one byte at ``address`` and every ``stride`` bytes after it, ``count`` in all."""
        return self._append(_DIRTY, address=address, count=count, stride=stride)

    def image(self, at: int | str = 0x1000) -> tuple[bytes, int]:
        """The code and this script as one image, to be loaded and entered at gpa ``at``, and what RDI must be."""
        for name, operation, to in self._targets:
            if to > len(self):
                raise ValueError(
                    f"operation {operation}, {name}, goes to {to}: the last is {len(self)}, the end's halt"
                )
        code = script_guest()
        at = _checked("at", at)
        table = -(-(at + len(code)) // PAGE) * PAGE
        records = [_RECORD.pack(*operation, 0, 0, 0, 0) for operation in [*self._operations, (_HALT, 0, 0, 0)]]
        return code.ljust(table - at, b"\0") + b"".join(records), table

    def start(self, vm: Vm, vcpu: int = 0, *, at: int | str = 0x1000) -> int:
        """Loads code and script at gpa ``at`` and starts a vCPU there. Returns the gpa after the last byte."""
        _machine(vm)
        if _checked("vcpu", vcpu) >= (vcpus := len(vm.vcpus)):
            raise ValueError(f"vcpu is {vcpu}: the machine has {vcpus}, from 0 on")
        shared = 0 if vm.shared_bit is None else 1 << vm.shared_bit
        at = _checked("at", at)
        image, table = self.image(at)
        vm.load(image, at)
        vm.vcpus[vcpu].start(mode="long", rip=at | shared, rdi=table | shared)
        self._table = table
        return at + len(image)

    def result(self, vm: Vm, operation: int) -> int:
        """The result of an executed operation, as a signed integer. ValueError if the script was not started."""
        _machine(vm)
        if self._table is None:
            raise ValueError("the script was not started")
        at = self._table + operation * _RECORD.size + _RESULT_OFFSET
        return int.from_bytes(vm.read(at, _WORD), "little", signed=True)


def is_script(image: Path) -> bool:
    """Whether a file begins with the code of a script."""
    if not image.is_file():  # what is read from a pipe is gone
        return False
    code = script_guest()
    with image.open("rb") as file:
        return file.read(len(code)) == code


_SIZES = ("address", "at", "gpa", "size", "stride")
"""Arguments that may be text with a unit, too."""


def _checked(name: str, value: int | str, most: int = _MOST) -> int:
    if name in _SIZES and isinstance(value, str):
        return number_of_bytes(value, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}: it must be in 0..{most:#x}")
    return value


def _machine(vm: object) -> None:
    if not isinstance(vm, Vm):
        raise TypeError(f"vm is {vm!r}: it must be the Vm that runs the script")


def _port(port: int) -> int:
    return _checked("port", port, 0xFFFF)


def _access(size: int) -> int:
    if _checked("size", size) not in (1, 2, 4):
        raise ValueError(f"size is {size}: it must be 1, 2 or 4")
    return size


def _words(size: int | str) -> int:
    size = _checked("size", size)
    if size % _WORD:
        raise ValueError(f"size is {size}: it must be a multiple of {_WORD}")
    return size // _WORD


def _word(byte: int) -> int:
    return int.from_bytes(bytes([_checked("byte", byte, 0xFF)]) * _WORD, "little")


def hypercall_completes(timeout: float = 0.5) -> bool:
    """Whether a hypercall KVM_HC_MAP_GPA_RANGE completes on this host. Tries one for at most ``timeout`` seconds.

    It does not where KVM does not exit to user space for it (KVM_CAP_EXIT_HYPERCALL), and may not where KVM itself runs
    in an emulated or nested machine.
    """
    if not probe().exit_hypercall:
        return False
    script = Script(call="hypercall")
    script.map(0, PAGE, to="shared")
    with Vm(_TRIAL_MEMORY, events=0) as vm:
        script.start(vm, at=2 * PAGE)
        return vm.run(timeout=timeout).hypercalls == 1
