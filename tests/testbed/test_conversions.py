"""The checks of the kernel's private_mem_conversions_test, with our own guest and a policy."""

from __future__ import annotations

import os

import pytest
from pagegate import Convert, Policy, Vm
from pagegate.guests import Script

from .conftest import MIB, PAGE, descriptors

# One base in the first memslot, one in the second; the largest range ends before the next base.
MEMORY = 64 * MIB
RANGES = [(0, PAGE), (0, 2 * MIB), (PAGE, PAGE), (PAGE, 2 * MIB), (2 * MIB, PAGE)]
SPAN = 4 * MIB + PAGE
HOST, SHARED, PRIVATE, LATER = 0x11, 0x22, 0x33, 0x44


class Counting(Policy):
    def __init__(self, *, discard: bool) -> None:
        self.answer = Convert(discard=discard)
        self.faults: list[object] = []

    def map_gpa_range(self, call):
        return self.answer

    def memory_fault(self, fault):
        self.faults.append(fault)
        return Convert()


def shared_file(vm: Vm) -> int:
    (fd,) = descriptors("memfd:pagegate-shared")
    return fd


def conversion_guest(base: int, offset: int, size: int, *, discard: bool) -> tuple[Script, dict[int, int]]:
    """Converts to private and back, the whole range and every other page, between two neighbours.

    Returns the script, and what each result must be.
    """
    script = Script(call="hypercall")
    want: dict[int, int] = {}
    start, end = base + offset, base + offset + size
    neighbours = [gpa for gpa in (start - PAGE, end) if base <= gpa < base + SPAN]

    def check(gpa: int, length: int, byte: int) -> None:
        want[script.check(gpa, length, byte)] = 0

    script.fill(start, size, SHARED)
    for gpa in neighbours:
        script.fill(gpa, PAGE, LATER)
    want[script.map(start, size, to="private")] = 0
    script.fill(start, size, PRIVATE)
    check(start, size, PRIVATE)
    script.out(0xE9, 1)  # the host checks the bytes
    for gpa in neighbours:
        check(gpa, PAGE, LATER)
    if size > PAGE:
        odd = range(start + PAGE, min(end, start + 16 * PAGE), 2 * PAGE)
        for gpa in odd:
            want[script.map(gpa, PAGE, to="shared")] = 0
            check(gpa, PAGE, 0 if discard else SHARED)
            script.fill(gpa, PAGE, LATER)
            check(gpa - PAGE, PAGE, PRIVATE)
        script.out(0xE9, 2)
    want[script.map(start, size, to="shared")] = 0
    check(start, PAGE, 0 if discard else SHARED)
    script.fill(start, size, LATER)
    script.out(0xE9, 3)
    want[script.map(start, PAGE, to="private")] = 0
    check(start, PAGE, 0 if discard else PRIVATE)
    want[script.map(start, PAGE, to="shared")] = 0
    return script, want


@pytest.mark.parametrize("discard", [True, False], ids=["discard", "keep"])
@pytest.mark.parametrize("memslots", [1, 2])
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize(("offset", "size"), RANGES, ids=lambda value: hex(value))
def test_conversions(vcpus: int, memslots: int, offset: int, size: int, discard: bool) -> None:
    policy = Counting(discard=discard)
    with Vm(MEMORY, vcpus=vcpus, memslots=memslots, policy=policy) as vm:
        assert vm.enforcement == "attributes"
        bases = [8 * MIB + vcpu * 32 * MIB for vcpu in range(vcpus)]
        guests = []
        looks: list[tuple[int, int]] = []

        def look(io) -> None:
            start = bases[io.vcpu] + offset
            step = io.data[0]
            looks.append((io.vcpu, step))
            if step == 1:
                assert vm.attributes.state(start, size) == "private"
                # vm.read would refuse, so read the file as a VMM without that check would.
                held = os.pread(shared_file(vm), size, start)
                assert held == bytes([0 if discard else SHARED]) * size
            elif step == 2:
                pages = [vm.attributes.is_private(gpa) for gpa in range(start, start + 16 * PAGE, PAGE)]
                assert pages == [True, False] * 8
                assert vm.read(start + PAGE, PAGE) == bytes([LATER]) * PAGE
            else:
                assert vm.attributes.state(start, size) == "shared"
                assert vm.read(start, size) == bytes([LATER]) * size

        vm.on_io(0xE9, look)
        for vcpu, base in enumerate(bases):
            script, want = conversion_guest(base, offset, size, discard=discard)
            vm.write(base, bytes([HOST]) * SPAN)
            script.start(vm, vcpu, at=0x1000 + vcpu * MIB)
            guests.append((script, want))
        report = vm.run(timeout=60)
        assert report.reason == "halt"
        for script, want in guests:
            assert {operation: script.result(vm, operation) for operation in want} == want
        assert len(looks) == vcpus * (3 if size > PAGE else 2)
        assert not policy.faults, "nothing is implicit here"
        assert vm.attributes.runs() == [(0, MEMORY, "shared")]
        # Bytes that the guest did not touch are as the host wrote them.
        for base in bases:
            untouched = base + offset + size + PAGE
            if untouched < base + SPAN:
                assert vm.read(untouched, PAGE) == bytes([HOST]) * PAGE
