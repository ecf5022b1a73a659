"""The demo's guest. Its memory starts private; it makes explicit, implicit and malformed requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pagegate.guests import PAGE, Call, Script

if TYPE_CHECKING:
    from pagegate import Vm

MEMORY: Final = 64 << 20
SHARED_BIT: Final = 35
PHASE_PORT: Final = 0xE9

_MIB = 1 << 20
_SHARED = 1 << SHARED_BIT
_HEAP, _KERNEL, _WINDOW, _RING = 40 * _MIB, 8 * _MIB, 20 * _MIB, 48 * _MIB
_ROUNDS, _PINGPONG_PAGES, _RING_PAGES = 4, 2, 64
_LONE, _BEFORE, _AFTER = 20, 4, 11
"""A page of the heap that becomes shared, and how many pages of its 64 KiB block before and after it stay private."""
_EINVAL = 22

PHASES: Final = (
    "the guest fills private memory, which needs no request",
    "it asks to share a window for its devices (explicit), and writes to its shared view",
    "it asks to share its kernel (explicit)",
    "it asks for 2^52 pages (explicit, malformed), which reaches no policy",
    "it touches its device ring through the shared view, page by page, and writes to it (implicit)",
    "it touches one page amid its private heap through the shared view, and checks the neighbours (implicit)",
    "it touches eight pages of the window through their private view (implicit)",
    "it writes to pages through their private view and touches their shared view, in turn (implicit)",
    "it asks to take its window back (explicit)",
)


@dataclass
class Guest:
    """A script, and the results that its operations must have."""

    script: Script
    always: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Operations and their results under any policy."""
    bundled: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Operations and their results under the demo's own policy."""

    def failures(self, vm: Vm, *, bundled: bool) -> list[str]:
        """The results that are not as they must be, one sentence each."""
        expected = {**self.always, **(self.bundled if bundled else {})}
        found = {name: (self.script.result(vm, op), wanted) for name, (op, wanted) in expected.items()}
        return [f"{name}: {got}, not {wanted}" for name, (got, wanted) in found.items() if got != wanted]


def build(call: Call) -> Guest:
    """Makes the script. ``call``: how it makes explicit requests."""
    script = Script(call=call)
    guest = Guest(script)
    always, bundled = guest.always, guest.bundled
    phases = iter(range(len(PHASES)))

    def phase() -> None:
        script.out(PHASE_PORT, next(phases))

    phase()
    script.fill(_HEAP, 16 * PAGE, 0x11)
    always["words of its private memory that are wrong"] = script.check(_HEAP, 16 * PAGE, 0x11), 0
    phase()
    bundled["RAX for the window"] = script.map(_WINDOW, _MIB, to="shared"), 0
    script.fill(_SHARED | _WINDOW, 8 * PAGE, 0x22)
    phase()
    bundled["RAX for the kernel"] = script.map(_KERNEL, _MIB, to="shared"), _EINVAL
    phase()
    always["RAX for 2^52 pages"] = script.map_raw(_WINDOW, 1 << 52, 0), _EINVAL
    phase()
    script.touch(_SHARED | _RING, _RING_PAGES)
    script.fill(_SHARED | _RING, 4 * PAGE, 0x33)
    phase()
    lone = _HEAP + _LONE * PAGE
    script.fill(lone - _BEFORE * PAGE, (_BEFORE + 1 + _AFTER) * PAGE, 0x55)
    script.touch(_SHARED | lone, 1)
    before, after = lone - _BEFORE * PAGE, lone + PAGE
    bundled["words before the lone shared page that are wrong"] = script.check(before, _BEFORE * PAGE, 0x55), 0
    bundled["words after the lone shared page that are wrong"] = script.check(after, _AFTER * PAGE, 0x55), 0
    phase()
    script.touch(_WINDOW + 8 * PAGE, 8)
    phase()
    begin = len(script)
    script.fill(_HEAP + 32 * PAGE, _PINGPONG_PAGES * PAGE, 0x44)
    script.touch(_SHARED | _HEAP + 32 * PAGE, _PINGPONG_PAGES)
    script.loop(begin, _ROUNDS)
    phase()
    bundled["RAX for the window back"] = script.map(_WINDOW, _MIB, to="private"), 0
    bundled["words of its window that are not zero"] = script.check(_WINDOW, 16 * PAGE, 0), 0
    bundled["words of its private memory that are wrong at the end"] = script.check(_HEAP, 16 * PAGE, 0x11), 0
    return guest
