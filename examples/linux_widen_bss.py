"""Converts all of `.bss..decrypted` at the first touch: 1 implicit request where Linux makes 512.

For boots that are to take fewer exits. A confidential Linux maps this section as shared from its first page table on,
and clears it before it can make an explicit request: 2 MiB, page after page, each a fault. Its pages hold nothing
before they are cleared, so they lose nothing. What is touched later is converted alone: its neighbours hold data.

    pagegate boot vmlinuz -p examples/linux_widen_bss.py
"""

from __future__ import annotations

from dataclasses import dataclass

from pagegate import Convert, MapGpaRange, MemoryFault, Policy

BLOCK = 2 << 20
"""Bytes. Linux aligns the section's start and its end to this."""


@dataclass
class WidenBss(Policy):
    """Widens implicit requests until the first explicit one, which comes after the section was cleared."""

    def __post_init__(self) -> None:
        """The guest has not asked for anything yet."""
        self._clearing = True

    def memory_fault(self, fault: MemoryFault) -> Convert:
        """Only the boot's vCPU runs while the section is cleared, so this needs no lock."""
        if self._clearing and not fault.private and fault.gpa % BLOCK == 0:
            return Convert(size=BLOCK)
        return Convert()

    def map_gpa_range(self, _call: MapGpaRange) -> Convert:
        """As asked."""
        self._clearing = False
        return Convert()
