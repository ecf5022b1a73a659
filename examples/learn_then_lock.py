"""What the guest shares while it boots it may share later; everything else stays private from then on.

Against a guest that is taken over after it booted: drivers share their rings and bounce buffers early, and a guest at
work has no reason to share pages that it never shared before. It trusts the boot, and nothing after it.

The boot is over when the guest asked for nothing during ``quiet`` seconds, or after ``requests`` requests. Both go by
the requests and their times alone: the same requests get the same answers, live or from a trace.

    pagegate run -p examples/learn_then_lock.py -o requests=30 --guest explicit
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy


class Ranges:
    """Ranges of addresses, kept apart, so that their number is bounded by that of the requests they came from."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Takes a range in and joins it with those that it meets."""
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def cover(self, start: int, end: int) -> bool:
        """Whether all of it is inside one of them."""
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]


@dataclass
class LearnThenLock(Policy):
    """Converts while the guest boots, and only what it knows afterwards."""

    quiet: float = 2.0
    """Seconds without a request after which the boot is over."""
    requests: int = 10_000
    """Requests after which it is over in any case."""
    locked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Nothing is known yet."""
        if not self.quiet > 0 or self.requests < 1:
            raise ValueError("quiet and requests must be above 0")
        self._shared = Ranges()
        self._count = 0
        self._last: int | None = None
        # Every vCPU has a thread of its own.
        self._lock = threading.Lock()

    def memory_fault(self, fault: MemoryFault) -> Convert | Deny:
        """A touch teaches as much as a request does."""
        return self._judge(fault.gpa, fault.size, fault.time, shares=not fault.private)

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """Every request counts, also one that takes pages back."""
        return self._judge(call.gpa, call.size, call.time, shares=call.to == "shared")

    def _judge(self, gpa: int, size: int, time: int, *, shares: bool) -> Convert | Deny:
        with self._lock:
            if not self.locked:
                rested = self._last is not None and time - self._last >= self.quiet * 1e9
                self.locked = rested or self._count >= self.requests
            if not self.locked:
                self._count += 1
                # Those of several vCPUs come in an order that is not quite that of their times.
                self._last = time if self._last is None else max(self._last, time)
                if shares:
                    self._shared.add(gpa, gpa + size)
                return Convert()
            return Convert() if not shares or self._shared.cover(gpa, gpa + size) else Deny()
