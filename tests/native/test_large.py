"""Requests that take long: a run can end in the middle of one."""

from __future__ import annotations

import time

import pytest
from pagegate import Convert, Policy, Vm
from pagegate.guests import Script

pytestmark = pytest.mark.kvm

PAGE = 4096
MIB = 1 << 20
ENOUGH = 600


def alternate(vm: Vm, first: int, pages: int) -> None:
    for page in range(0, pages, 2):
        vm.convert(first + page * PAGE, PAGE, to="private")


def test_a_deadline_interrupts_a_request_over_many_slots(expecting) -> None:
    first, size, deadline = 8 * MIB, 2 * ENOUGH * PAGE, 0.05
    asked = []

    class Late(Policy):
        """Its first answer comes 5 ms before the deadline, too late for that many slots to be changed."""

        def map_gpa_range(self, call):
            asked.append(call)
            if len(asked) == 1:
                time.sleep(max(0.0, began + deadline - 0.005 - time.monotonic()))
            return Convert()

    with Vm(64 * MIB, enforcement="memslots", policy=Late()) as vm:
        vm.write(first, b"\x55" * size)
        began = time.monotonic()
        alternate(vm, first, 2 * ENOUGH)
        alternating = time.monotonic() - began
        script = expecting()
        answer = script.map(first, size, to="private")
        script.goto_unless(script.result_at(answer), 0, answer)
        script.out(0xE9, 1)
        script.start(vm)
        answered: list[int] = []
        vm.on_io(0xE9, lambda io: answered.append(script.result(vm, answer)))
        resident = vm.memory_usage().shared
        began = time.monotonic()
        report = vm.run(timeout=deadline)
        assert report.reason == "timeout"
        # It ends after a part of 64 slots, on a host that is busy with other things, too.
        assert report.seconds < 0.6 + alternating
        assert answered == []
        # The map has exactly what was converted: only pages that became private lost their shared bytes.
        private = vm.attributes.private_bytes
        assert ENOUGH * PAGE <= private <= size
        assert resident - vm.memory_usage().shared == private - ENOUGH * PAGE
        for gpa, length, state in vm.attributes.runs(first, size):
            assert state == "private" or vm.read(gpa, length) == b"\x55" * length
        # The guest got EAGAIN and asks again, unless it had been too slow to ask before the deadline.
        interrupted = len(asked)
        assert vm.run(timeout=30).reason == "halt"
        assert [event.outcome for event in vm.events] == ["retried"] * interrupted + ["converted"]
        assert answered == [0]
        assert vm.attributes.runs(first, size) == [(first, size, "private")]


def test_a_large_request_is_carried_out_completely() -> None:
    size = 1 << 30
    with Vm(size, shared_bit=35) as vm:
        script = Script()
        answer = script.map(16 * MIB, size - 32 * MIB, to="private")
        back = script.map(16 * MIB, size - 32 * MIB, to="shared")
        script.start(vm)
        report = vm.run(timeout=60)
        assert (report.reason, report.conversions) == ("halt", 2)
        assert (script.result(vm, answer), script.result(vm, back)) == (0, 0)
        assert report.bytes_to_private == report.bytes_to_shared == size - 32 * MIB
        assert vm.attributes.runs() == [(0, size, "shared")]


def test_one_slot_is_never_larger_than_a_gib() -> None:
    """With shadow page tables a slot takes KVM time in proportion to its size, and converting one page splits it."""
    with Vm(4 << 30, enforcement="memslots") as vm:
        vm.convert(2 << 30, PAGE, to="private")
        began = time.monotonic()
        for page in range(1, 9):
            vm.convert((2 << 30) + page * PAGE, PAGE, to="private")
        assert (time.monotonic() - began) / 8 < 0.1
        assert vm.attributes.private_bytes == 9 * PAGE
