"""Allows as many requests to share pages as one recorded boot made, of each kind and size, and no more.

Against a guest that is taken over once it runs: the boot has used up what was learned, so nothing more can be shared.
Addresses are not compared, because Linux is somewhere else each time (KASLR). Record a boot that you trust, including
its drivers, see that its own trace passes, and boot under the policy; `slack` is how many more of each may come.

    pagegate boot vmlinuz --initrd initrd --events good.parquet
    pagegate replay good.parquet -p examples/linux_learn_then_lock.py:learned -o trace=good.parquet
    pagegate boot vmlinuz --initrd initrd -p examples/linux_learn_then_lock.py:learned -o trace=good.parquet -o slack=4

Linux goes on after an explicit request was refused, but not with the page: a touch is an implicit request, which is one
too many as well and ends the run as "denied".
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path  # noqa: TC003 - `pagegate boot -o` looks the annotation up

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy
from pagegate.trace import read


class Lock(Policy):
    """Converts requests to share pages while there are some left of their kind and size."""

    def __init__(self, left: Counter[tuple[str, int]]) -> None:
        self.left = left
        """How many may still come, by kind and size in bytes."""
        # Hooks are called on several vCPU threads.
        self._lock = threading.Lock()

    def memory_fault(self, fault: MemoryFault) -> Convert | Deny:
        """An implicit request."""
        return Convert() if fault.private else self._take("implicit", fault.size)

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """An explicit request."""
        return Convert() if call.to == "private" else self._take("explicit", call.size)

    def _take(self, kind: str, size: int) -> Convert | Deny:
        with self._lock:
            if not self.left[kind, size]:
                return Deny()
            self.left[kind, size] -= 1
            return Convert()


def learned(trace: Path, slack: int = 0) -> Lock:
    """A policy for what became shared in ``trace``, and ``slack`` requests more of each kind and size in it."""
    counts = Counter((event.kind, event.size) for event in read(trace) if event.done_to == "shared")
    return Lock(Counter({shape: count + slack for shape, count in counts.items()}))
