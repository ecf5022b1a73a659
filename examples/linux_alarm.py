"""Says so when Linux asks for a private page as shared after it has started /init; with `stop` the run ends there.

Against a process or driver that exposes memory which has been in use. Linux shares nearly all that it shares before
/init: `.bss..decrypted`, bounce buffers, the pools for atomic DMA. Whatever was private then can hold somebody's data.
A driver that is loaded later and allocates its own DMA buffers causes an alarm too: look at who asked.

    pagegate boot vmlinuz --initrd initrd -p examples/linux_alarm.py
    pagegate boot vmlinuz --initrd initrd -p examples/linux_alarm.py -o stop=yes

How it knows: right before /init Linux frees what it needed to boot, and the unused pages of `.bss..decrypted` with it
(mem_encrypt_free_decrypted_mem). That is the first time that it asks for pages that are shared to become private; the
reset of all memory, early in the boot, covers private pages as well. So no symbols are needed, and no console.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from pagegate import Convert, MapGpaRange, MemoryFault, Policy, Stop

PRINTED = 100
"""Alarms that are printed, so that a guest cannot fill a disk."""


@dataclass
class Alarm(Policy):
    """Converts as asked."""

    stop: bool = False
    """Whether an alarm ends the run."""
    armed: bool = field(default=False, init=False)
    """Whether /init runs, or is about to."""
    alarms: int = field(default=0, init=False)
    """How many there were."""

    def memory_fault(self, fault: MemoryFault) -> Convert | Stop:
        """A touch through the shared view."""
        return self._alarm(fault, "touched") if self.armed and not fault.private else Convert()

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Stop:
        """A request, or the sign that /init comes."""
        if call.to == "private":
            self.armed = self.armed or call.state == "shared"
            return Convert()
        return self._alarm(call, "asked for") if self.armed and call.state != "shared" else Convert()

    def _alarm(self, request: MemoryFault | MapGpaRange, how: str) -> Convert | Stop:
        self.alarms += 1
        # Requests of a trace have no symbol.
        who = getattr(request, "symbol", None) or "an unknown function"
        text = (
            f"{request.size} private bytes at {request.gpa:#x} were {how} as shared after /init, "
            f"by vCPU {request.vcpu} in {who}"
        )
        if self.alarms <= PRINTED:
            print(f"alarm: {text}", file=sys.stderr)
        return Stop(text) if self.stop else Convert()
