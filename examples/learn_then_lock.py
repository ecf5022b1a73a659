"""After the boot, only pages that the guest shared while it booted may become shared.

Against a guest that is taken over after it booted: drivers share their rings and bounce buffers early, and later there
is no reason to share other pages. The boot is trusted.

The boot is over when the guest has made no request for ``quiet`` seconds, or after ``requests`` requests. Only the
requests and their times decide this, so that the same requests get the same answers, live or from a trace.

    pagegate run -p examples/learn_then_lock.py -o requests=30 --guest explicit
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy


class Ranges:
    """A set of addresses, as ranges that do not touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> None:
        """Adds a range, and joins it with those that it overlaps or touches."""
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def cover(self, start: int, end: int) -> bool:
        """Whether the whole range is in the set."""
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]


@dataclass
class LearnThenLock(Policy):
    """Converts as asked during the boot; then shares only what was shared during the boot."""

    quiet: float = 2.0
    """Seconds without a request after which the boot is over."""
    requests: int = 10_000
    """Requests after which the boot is over in any case."""
    locked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Starts with nothing learned."""
        if not self.quiet > 0 or self.requests < 1:
            raise ValueError("quiet and requests must be above 0")
        self._shared = Ranges()
        self._count = 0
        self._last: int | None = None
        # Hooks are called on several vCPU threads.
        self._lock = threading.Lock()

    def memory_fault(self, fault: MemoryFault) -> Convert | Deny:
        """An implicit request. Pages that it shares during the boot are learned too."""
        return self._judge(fault.gpa, fault.size, fault.time, shares=not fault.private)

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """An explicit request. One that makes pages private counts as a request as well."""
        return self._judge(call.gpa, call.size, call.time, shares=call.to == "shared")

    def _judge(self, gpa: int, size: int, time: int, *, shares: bool) -> Convert | Deny:
        with self._lock:
            if not self.locked:
                rested = self._last is not None and time - self._last >= self.quiet * 1e9
                self.locked = rested or self._count >= self.requests
            if not self.locked:
                self._count += 1
                # Requests of several vCPUs do not come exactly in the order of their times.
                self._last = time if self._last is None else max(self._last, time)
                if shares:
                    self._shared.add(gpa, gpa + size)
                return Convert()
            return Convert() if not shares or self._shared.cover(gpa, gpa + size) else Deny()
