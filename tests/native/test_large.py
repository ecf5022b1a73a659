"""Requests that take long: a run that ends does not wait for them."""

from __future__ import annotations

import time

import pytest
from pagegate import Vm
from pagegate.guests import Script

pytestmark = pytest.mark.kvm

PAGE = 4096
MIB = 1 << 20
ENOUGH = 600


def alternate(vm: Vm, first: int, pages: int) -> None:
    for page in range(0, pages, 2):
        vm.convert(first + page * PAGE, PAGE, to="private")


def test_a_deadline_interrupts_a_request_over_many_slots() -> None:
    with Vm(64 * MIB, enforcement="memslots", vm_type="default") as vm:
        alternate(vm, 8 * MIB, 2 * ENOUGH)
        script = Script()
        again = len(script)
        answer = script.map(8 * MIB, 2 * ENOUGH * PAGE, to="private")
        script.out(0xE9, 1)
        script.start(vm)
        asked: list[float] = []
        vm.on_io(0xE9, lambda io: asked.append(time.monotonic()))
        report = vm.run(timeout=0.02)
        assert report.reason == "timeout"
        assert report.seconds < 0.6
        # Whatever was done is in the map, nothing else is, and the guest asks again.
        private = vm.attributes.private_bytes
        assert ENOUGH * PAGE <= private <= 2 * ENOUGH * PAGE
        assert sum(size for _, size, state in vm.attributes.runs() if state == "private") == private
        assert vm.run(timeout=30).reason == "halt"
        eagain = 11
        assert script.result(vm, answer) in {0, eagain}
        assert again == 0


def test_a_large_request_is_carried_out_whole() -> None:
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
    """Where KVM shadows page tables a slot costs as much as it is large, and one page splits it."""
    with Vm(4 << 30, enforcement="memslots", vm_type="default") as vm:
        vm.convert(2 << 30, PAGE, to="private")
        began = time.monotonic()
        for page in range(1, 9):
            vm.convert((2 << 30) + page * PAGE, PAGE, to="private")
        assert (time.monotonic() - began) / 8 < 0.1
        assert vm.attributes.private_bytes == 9 * PAGE
