"""KVM's emulation accesses host memory whatever the page's state. String IO is always emulated."""

from __future__ import annotations

import pytest
from pagegate import PagegateError, Vm

from .conftest import MIB, PAGE

MEMORY = 64 * MIB
AT = 8 * MIB
BIT = 35
CODE = b"\xfc\xf3\x6c\xf4"  # cld; rep insb; hlt


def insb(vm: Vm, rdi: int, count: int) -> None:
    vm.load(CODE, at=0x1000)
    vm.vcpus[0].start(mode="long", rip=0x1000, rdi=rdi, rcx=count, rdx=0x71)
    vm.on_io(0x71, lambda io: b"A" * (io.size * io.count))


def test_emulated_writes_are_gone_when_the_page_becomes_shared() -> None:
    with Vm(MEMORY) as vm:
        vm.convert(AT, 2 * MIB, to="private")
        insb(vm, AT, 3 * PAGE)
        assert vm.run(timeout=60).reason == "halt"
        vm.convert(AT, 2 * MIB, to="shared")
        assert vm.read(AT, 4 * PAGE) == bytes(4 * PAGE)


def test_emulated_writes_to_shared_pages_stay() -> None:
    with Vm(MEMORY) as vm:
        vm.convert(AT, 4 * PAGE, to="private")
        vm.convert(AT + PAGE, PAGE, to="shared")
        vm.write(AT + PAGE, b"x" * PAGE)
        vm.convert(AT, 4 * PAGE, to="shared")
        assert vm.read(AT, 3 * PAGE) == bytes(PAGE) + b"x" * PAGE + bytes(PAGE)


def test_emulation_does_not_reach_the_private_view() -> None:
    with Vm(MEMORY, shared_bit=BIT) as vm:
        vm.convert(AT, PAGE, to="private")
        insb(vm, AT, 64)
        with pytest.raises(PagegateError, match="shared view"):
            vm.run(timeout=60)
        assert vm.memory_usage().shared < MIB
        vm.convert(AT, PAGE, to="shared")
        assert vm.read(AT, PAGE) == bytes(PAGE)


# ---- under traps, where both views have host memory


def traps() -> Vm:
    return Vm(MEMORY, shared_bit=BIT, enforcement="traps", debug_private=True)


@pytest.mark.parametrize(("state", "view"), [("private", 0), ("shared", 1 << BIT)])
def test_under_traps_emulation_reaches_either_view(state, view) -> None:
    with traps() as vm:
        vm.convert(AT, PAGE, to=state)
        insb(vm, AT | view, 64)
        report = vm.run(timeout=60)
        assert (report.reason, report.faults) == ("halt", 0)
        assert vm.read(AT, 65) == b"A" * 64 + b"\0"


@pytest.mark.parametrize(("to", "other", "view"), [("private", "shared", 0), ("shared", "private", 1 << BIT)])
def test_under_traps_emulated_writes_to_the_other_view_are_gone_when_the_page_comes_there(to, other, view) -> None:
    with traps() as vm:
        vm.convert(AT, 2 * MIB, to=other)
        insb(vm, AT | view, 3 * PAGE)
        assert vm.run(timeout=60).reason == "halt"
        vm.convert(AT, 2 * MIB, to=to)
        assert vm.read(AT, 4 * PAGE) == bytes(4 * PAGE)
