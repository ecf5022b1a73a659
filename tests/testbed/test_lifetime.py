"""Memory after a machine is closed, and KVM_PRE_FAULT_MEMORY."""

from __future__ import annotations

import ctypes
import os

import pytest
from pagegate import Convert, Vm, probe
from pagegate.guests import Script

from .conftest import LIBC, MIB, PAGE, descriptors, vcpu_stats

MEMORY = 64 * MIB
AT = 8 * MIB
PUNCH_KEEPING_SIZE = 3


def unevictable() -> int:
    """Bytes of unevictable memory, to which guest_memfd pages belong."""
    with open("/proc/meminfo") as meminfo:
        return next(int(line.split()[1]) * 1024 for line in meminfo if line.startswith("Unevictable:"))


def private_guest(vm: Vm, size: int) -> None:
    script = Script(call="hypercall")
    script.map(AT, size, to="private")
    script.fill(AT, size, 0x42)
    script.start(vm)
    assert vm.run(timeout=60).reason == "halt"


def test_guest_memfd_outlives_the_vm() -> None:
    vm = Vm(MEMORY)
    private_guest(vm, 4 * MIB)
    (fd,) = descriptors("gmem") or descriptors("guest_memfd")
    assert not os.get_inheritable(fd)
    mine = os.dup(fd)
    vm.close()
    try:
        assert LIBC.fallocate(mine, PUNCH_KEEPING_SIZE, 0, 32 * MIB) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(mine)
    assert descriptors("kvm") == []


def test_no_memory_is_left_after_close() -> None:
    before = unevictable()
    with Vm(MEMORY) as vm:
        private_guest(vm, 32 * MIB)
        assert unevictable() - before > 30 * MIB
    assert unevictable() - before < MIB
    assert descriptors("memfd:") == []


def test_memory_does_not_double() -> None:
    size = 32 * MIB
    with Vm(MEMORY) as vm:
        base_line = unevictable()
        vm.write(AT, b"\x5a" * size)
        assert vm.memory_usage().shared >= size
        script = Script(call="hypercall")
        script.map(AT, size, to="private")
        script.fill(AT, size, 0x42)
        script.out(0xE9, 1)
        script.map(AT, size, to="shared")
        script.fill(AT, size, 0x43)
        seen = []

        def look(io) -> None:
            seen.append((vm.memory_usage().shared, unevictable() - base_line))

        vm.on_io(0xE9, look)
        script.start(vm)
        assert vm.run(timeout=120).reason == "halt"
        seen.append((vm.memory_usage().shared, unevictable() - base_line))
        for shared, private in seen:
            # The kernel counts unevictable pages in batches per CPU, so a few may be missing.
            assert size * 0.95 <= shared + private <= size * 1.05
        assert vm.read(AT, size) == b"\x43" * size


@pytest.mark.parametrize("prefault", [True, False])
def test_prefault_saves_the_first_faults(prefault: bool) -> None:
    if not probe().pre_fault:
        pytest.skip("this kernel has no KVM_PRE_FAULT_MEMORY")

    class Judge:
        def map_gpa_range(self, call):
            return Convert(prefault=prefault)

    with Vm(MEMORY, policy=Judge()) as vm:
        script = Script(call="hypercall")
        answer = script.map(AT, 2 * MIB, to="private")
        script.start(vm)
        report = vm.run(timeout=60)
        assert script.result(vm, answer) == 0, "the answer is written after KVM wrote its union"
        assert report.bytes_prefaulted == (2 * MIB if prefault else 0)
        (fd,) = descriptors("kvm-vcpu")
        script = Script()
        script.touch(AT, 512)
        wrong = script.check(AT, 2 * MIB, 0)
        script.start(vm)
        before = vcpu_stats(fd)
        assert vm.run(timeout=60).reason == "halt"
        after = vcpu_stats(fd)
        assert script.result(vm, wrong) == 0
        faults = after["pf_taken"] - before["pf_taken"]
        assert faults < 32 if prefault else faults >= 512


@pytest.mark.parametrize("enforcement", ["attributes", "traps"])
def test_prefault_goes_on_where_a_page_cannot_be_mapped(enforcement) -> None:
    if not probe().pre_fault:
        pytest.skip("this kernel has no KVM_PRE_FAULT_MEMORY")

    class Judge:
        def memory_fault(self, fault):
            return Convert(prefault=True, gpa=AT, size=2 * MIB)

    with Vm(MEMORY, policy=Judge(), shared_bit=35, enforcement=enforcement) as vm:
        script = Script()
        script.write(AT, 7)
        word = script.read(AT)
        script.write((1 << 35) | AT, 9)
        other = script.read((1 << 35) | AT)
        script.start(vm)
        report = vm.run(timeout=60)
        assert (report.reason, report.conversions) == ("halt", 2)
        assert (script.result(vm, word), script.result(vm, other)) == (7, 9)
        assert vm.read(AT, 8) == (9).to_bytes(8, "little")
        assert PAGE <= report.bytes_prefaulted <= 4 * MIB


def test_punching_without_converting_gives_zeroes() -> None:
    with Vm(MEMORY) as vm:
        script = Script(call="hypercall")
        script.map(AT, 4 * PAGE, to="private")
        script.fill(AT, 4 * PAGE, 0x42)
        script.out(0xE9, 1)
        zeroes = script.check(AT + PAGE, 2 * PAGE, 0)
        kept = [script.check(AT, PAGE, 0x42), script.check(AT + 3 * PAGE, PAGE, 0x42)]

        def punch(io) -> None:
            (fd,) = descriptors("gmem") or descriptors("guest_memfd")
            assert LIBC.fallocate(fd, PUNCH_KEEPING_SIZE, AT + PAGE, 2 * PAGE) == 0

        vm.on_io(0xE9, punch)
        script.start(vm)
        assert vm.run(timeout=60).reason == "halt"
        assert [script.result(vm, operation) for operation in (zeroes, *kept)] == [0, 0, 0]
        assert vm.attributes.state(AT, 4 * PAGE) == "private"
