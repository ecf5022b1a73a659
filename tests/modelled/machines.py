"""The machines that programs are played on: the fake hypervisor, and a guest on /dev/kvm."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Protocol

from pagegate import Vm
from pagegate.guests import _RECORD, Script
from pagegate.testing import Step

from tests.fake.conftest import Way, enforced
from tests.memory_parts import descriptor

from .program import ALL, BASE, GUEST, MEMORY, PAGE, Op, Program

if TYPE_CHECKING:
    from pagegate.testing import Fake

MARK = 0x77
"""The port that the guest writes to between its operations."""
AT = 64
"""Where in a page the guest reads and writes a word."""
WORD = 8
ENCRYPTED = 16
CODE = 0x1000


class Machine(Protocol):
    way: Way
    vm: Vm
    calls: tuple[str, ...]
    """How its guest can ask."""
    sweeps: bool
    """Whether its guest can do operations that are not in the program."""

    def do(self, op: Op | None, view: str) -> None:
        """Has the guest do this next, through this view of the page; then write to the port. None: halt."""

    def answer(self) -> int | None:
        """RAX after the guest has asked."""

    def word(self) -> int | None:
        """What the guest has read; None if that cannot be told."""

    def touched(self, page: int, view: str, value: int) -> None:
        """The guest has written this."""

    def side(self, state: str, page: int) -> bytes | None:
        """The bytes of a page on one side; None if the host cannot look."""

    def enforced(self, page: int) -> str | None:
        """The state that the kernel enforces; None if that cannot be told from outside."""

    def injected(self, call: str) -> int:
        """How many such calls were made."""

    def fail(self, call: str, code: int, *, after: int, half: bool) -> None:
        """Makes a call fail."""


def attributes(op: Op) -> int:
    return 3 if op.kind == "malformed" else ENCRYPTED * (op.to == "private")


class FakeMachine:
    """The fake executes a script that is made of the whole program, and the guest's words are written to the files."""

    calls = ("hypercall", "doorbell")
    sweeps = False

    def __init__(self, way: Way, program: Program, policy: Any) -> None:
        self.way = way
        steps = [Step.io_write(MARK, b"!")]
        for op in program.ops:
            if op.kind in GUEST:
                steps += [self.step(op), Step.io_write(MARK, b"!")]
        self.fake: Fake = way.fake(steps)
        self.vm = Vm(MEMORY, hypervisor=self.fake, policy=policy, initial=program.initial, **way.arguments)
        self.vm.vcpus[0].start(mode="long")
        self.shared = descriptor("pagegate-shared")
        # The fake discards only between the first and the last byte of a side that the host itself has used.
        for gpa in (ALL.start * PAGE, (ALL.stop - 1) * PAGE):
            self.vm.convert(gpa, PAGE, to="shared")
            self.vm.write(gpa, bytes(PAGE))
            self.vm.convert(gpa, PAGE, to=program.initial)

    def step(self, op: Op) -> Step:
        gpa = op.page * PAGE
        if op.kind in ("hypercall", "doorbell", "malformed"):
            ask = Step.hypercall if op.kind == "hypercall" else Step.doorbell
            return ask(gpa, op.pages, attributes(op))
        address = self.way.view(gpa, op.to)
        if op.kind == "fault":
            return Step.memory_fault(address, flags=8 * (op.to == "private"))
        return Step.access(address + AT, write=op.value != 0)

    def do(self, op: Op | None, view: str) -> None:
        """It is in the script."""

    def answer(self) -> int | None:
        return self.fake.replies()[-1].value

    def word(self) -> int | None:
        return None

    def touched(self, page: int, view: str, value: int) -> None:
        if view == "shared":
            os.pwrite(self.shared, bytes([value]) * WORD, page * PAGE + AT)

    def enforced(self, page: int) -> str | None:
        return enforced(self.vm, self.fake, page * PAGE)

    def side(self, state: str, page: int) -> bytes | None:
        return os.pread(self.shared, PAGE, page * PAGE) if state == "shared" else None

    def injected(self, call: str) -> int:
        return self.fake.calls(call)

    def fail(self, call: str, code: int, *, after: int, half: bool) -> None:
        self.fake.inject(call, code, after=after, half_done=half)


class KvmMachine:
    """A guest that executes one operation for ever, which is written anew each time."""

    sweeps = True

    def __init__(self, way: Way, program: Program, policy: Any, *, call: str, **more: Any) -> None:
        """`more`: for Vm."""
        self.way = way
        self.calls = (call,)
        arguments = dict(way.arguments, enforcement=way.enforcement, **more)
        self.vm = Vm(MEMORY, policy=policy, initial=program.initial, **arguments)
        self.script = Script(call=call)
        self.script.out(MARK, 1)
        self.operation = self.script.halt()
        self.script.loop(0, 1 << 40)
        self.script.start(self.vm, at=CODE)
        assert self.script.image(CODE)[1] + len(self.script) * _RECORD.size < BASE * PAGE

    def do(self, op: Op | None, view: str) -> None:
        script = Script(call=self.calls[0])
        if op is None:
            script.halt()
        elif op.kind == "touch":
            address = self.way.view(op.page * PAGE, view) + AT
            if op.value:
                script.write(address, int.from_bytes(bytes([op.value]) * WORD, "little"))
            else:
                script.read(address)
        else:
            script.map_raw(op.page * PAGE, op.pages, attributes(op))
        self.next(script)

    def next(self, script: Script) -> None:
        """Has the guest do a script's first operation next."""
        image, table = script.image(CODE)
        record = image[table - CODE : table - CODE + _RECORD.size]
        self.vm.write(table + self.operation * _RECORD.size, record)

    def answer(self) -> int | None:
        return self.script.result(self.vm, self.operation)

    def word(self) -> int | None:
        return self.script.result(self.vm, self.operation)

    def touched(self, page: int, view: str, value: int) -> None:
        """It has written it itself."""

    def enforced(self, page: int) -> str | None:
        return None  # The guest looks, at the end.

    def side(self, state: str, page: int) -> bytes | None:
        return None

    def injected(self, call: str) -> int:
        raise NotImplementedError(call)

    def fail(self, call: str, code: int, *, after: int, half: bool) -> None:
        raise NotImplementedError(call)
