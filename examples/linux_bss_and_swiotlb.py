"""Lets Linux share what its boot needs, and no other page.

Against a guest that shares more than its kernel must: `.bss..decrypted`, one page a vCPU for its clock and steal time,
and the bounce buffers of its devices (swiotlb). With one vCPU those are 2 MiB, 4 KiB and 64 MiB. The pools for atomic
DMA, 96 pages or more, are refused, and so is whatever is asked for later.

Linux 6.1 and 6.12 do not look at the answer: they write "DMA: preallocated 128 KiB GFP_KERNEL pool for atomic
allocations" though each page of it got EINVAL. The page stays private, and a driver that uses it makes an implicit
request. That is refused as well, and the run ends as "denied", at the function that touched the page.

    pagegate boot vmlinuz -p examples/linux_bss_and_swiotlb.py
    pagegate boot vmlinuz --memory 2G --vcpus 2 -p examples/linux_bss_and_swiotlb.py -o swiotlb=128M -o vcpus=2
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy

BLOCK = 2 << 20
"""Bytes: Linux aligns `.bss..decrypted` to it."""
PRINTED = 100
"""Lines at most, so that a guest cannot fill a disk: one for each function whose requests were refused."""


@dataclass
class BssAndSwiotlb(Policy):
    """Shares the block that is touched first, a page for each vCPU, and the range that is asked for first."""

    swiotlb: int = 64 << 20
    """Bytes of bounce buffers at most. Linux takes 64 MiB, or 6 % of memory where that is more: 128 MiB of 2 GiB."""
    vcpus: int = 1
    """Pages that may be shared by touching them, outside of `.bss..decrypted`."""

    def __post_init__(self) -> None:
        """Nothing is shared at first."""
        self._bss: range | None = None
        self._pages: set[int] = set()
        self._buffers = range(0)
        self._printed: set[str] = set()
        # Hooks are called on several vCPU threads.
        self._lock = threading.Lock()

    def memory_fault(self, fault: MemoryFault) -> Convert | Deny:
        """Linux clears `.bss..decrypted` before all else. It touches a vCPU's page before it asks for it."""
        if fault.private:
            return Convert()
        with self._lock:
            if self._bss is None:
                start = fault.gpa - fault.gpa % BLOCK
                self._bss = range(start, start + BLOCK)
            elif fault.gpa not in self._bss and len(self._pages) < self.vcpus:
                self._pages.add(fault.gpa)
            known = fault.gpa in self._bss or fault.gpa in self._pages
            return Convert() if known else self._refuse(fault)

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """The bounce buffers come first, piece after piece. All else has to be known from a touch."""
        if call.to == "private":
            return Convert()
        with self._lock:
            known = call.size == 4096 and call.gpa in self._pages
            in_bss = self._bss is not None and call.gpa in self._bss and call.gpa + call.size <= self._bss.stop
            return Convert() if known or in_bss or self._are_buffers(call) else self._refuse(call)

    def _are_buffers(self, call: MapGpaRange) -> bool:
        start, end = call.gpa, call.gpa + call.size
        if start >= self._buffers.start and end <= self._buffers.stop:
            return True
        buffers = range(self._buffers.start if self._buffers else start, end)
        if (self._buffers and start != self._buffers.stop) or len(buffers) > self.swiotlb:
            return False
        self._buffers = buffers
        return True

    def _refuse(self, request: MemoryFault | MapGpaRange) -> Deny:
        # Requests of a trace have no symbol.
        who = (getattr(request, "symbol", None) or "an unknown function").partition("+")[0]
        if who not in self._printed and len(self._printed) < PRINTED:
            self._printed.add(who)
            print(f"refused: {request.size} bytes at {request.gpa:#x} to shared, asked for in {who}", file=sys.stderr)
        return Deny()
