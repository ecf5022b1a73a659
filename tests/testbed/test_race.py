"""A fault that reports a page's old state must not undo a conversion that came after it."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pagegate import Convert, Policy, Vm
from pagegate.guests import Script

from .conftest import MIB, PAGE, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY = 64 * MIB
AT = 8 * MIB
SPAN = 2 * MIB
SECONDS = float(os.environ.get("PAGEGATE_RACE_SECONDS", "15"))


class Counting(Policy):
    def __init__(self) -> None:
        self.faults = 0
        self.calls = 0

    def memory_fault(self, fault):
        self.faults += 1
        return Convert()

    def map_gpa_range(self, call):
        self.calls += 1
        return Convert()


@contextmanager
def interrupts() -> Iterator[None]:
    """Interrupts at any moment: the testbed's timer only ticks, but its host's answers about files come between."""
    end = threading.Event()

    def ask() -> None:
        while not end.is_set():
            os.stat(__file__)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_stale_fault_never_undoes_a_conversion(expecting) -> None:
    # On one CPU, a 6.12 kernel does not switch threads between its two reads of the attribute.
    races = kernel() >= (6, 18)
    policy = Counting()
    with Vm(MEMORY, vcpus=2, policy=policy) as vm:
        # One vCPU writes, converts and checks its own words; the other reads and writes other words of the same pages.
        converter = expecting(call="hypercall")
        begin = len(converter)
        results = []
        for to, byte in (("private", 0x31), ("shared", 0x32)):
            results.append(converter.expect(converter.map(AT, SPAN, to=to)))
            results.append(converter.expect(converter.check(AT, 64, 0)))
            converter.fill(AT, 64, byte)
            results.append(converter.expect(converter.check(AT, 64, byte)))
        converter.loop(begin, 1 << 40)
        other = Script()
        again = len(other)
        other.touch(AT + 128, 64, SPAN // 64)
        other.fill(AT + 1024, 64, 0x77)
        other.fill(AT + SPAN - 64, 64, 0x77)
        other.loop(again, 1 << 40)
        converter.start(vm, 0)
        other.start(vm, 1, at=MIB)
        stale = conversions = 0
        with interrupts():
            for _ in range(16 if races else 1):
                report = vm.run(timeout=SECONDS)
                assert report.reason == "timeout"
                stale += report.stale
                conversions += report.conversions
                if stale:
                    break
        # The first vCPU converted until the end, and every result was as expected.
        assert [converter.result(vm, operation) for operation in results] == [0] * len(results)
        assert stale > 0 or not races, "there was no race"
        assert policy.faults == 0, "each of them would have undone a conversion"
        assert conversions == policy.calls > 10
        last = "private" if policy.calls % 2 else "shared"
        assert vm.attributes.state(AT, SPAN) == last
        assert vm.attributes.private_bytes == (SPAN if last == "private" else 0)
        print(f"{conversions} conversions, {stale} stale faults, {PAGE} bytes a page")
