"""The bundled guests of `pagegate run --guest NAME`, for trying a policy on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pagegate.demo import guest as demo_guest
from pagegate.guests import PAGE, Script

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagegate import Vm
    from pagegate.guests import Call

SHARED_BIT: Final = 35

_CODE = 0x1000
_AREAS = 8 << 20
_AREA = 32 * PAGE
"""Bytes of the area that a vCPU asks about. Each has its own, so that no two ask for the same pages."""
_ABOVE = 1 << 20
"""Bytes at the top of memory for page tables and stacks."""
_TOUCH_ROUNDS, _EXPLICIT_ROUNDS, _PINGPONG_ROUNDS = 4, 16, 64
_BUFFERS = 8


@dataclass(frozen=True)
class Guest:
    """A bundled guest, and the machine that it needs."""

    about: str
    script: Callable[[int, int, Call], Script]
    """Makes a vCPU's script, from its index, the shared bit's mask and how it makes explicit requests."""
    one_vcpu: bool = False
    shared_bit: int | None = None
    """The only shared bit that it runs with; ``None`` for any."""
    least: int = 0
    """Bytes of memory that it needs at least, however many vCPUs there are."""
    phases: tuple[str, ...] = ()
    """What it writes to the debug console: indices of these lines; text if there are none."""

    def needs(self, vcpus: int) -> int:
        """Bytes of memory that it needs with this many vCPUs."""
        return max(self.least, _AREAS + vcpus * _AREA + _ABOVE)

    def start(self, vm: Vm, call: Call) -> None:
        """Loads it into a machine and starts every vCPU."""
        shared = 0 if vm.shared_bit is None else 1 << vm.shared_bit
        at = _CODE
        for vcpu in vm.vcpus:
            end = self.script(vcpu.index, shared, call).start(vm, vcpu.index, at=at)
            at = -(-end // PAGE) * PAGE


def _touch(vcpu: int, shared: int, call: Call) -> Script:
    area, pages = _AREAS + vcpu * _AREA, _AREA // PAGE
    script = Script(call=call)
    script.touch(shared | area, pages)
    script.touch(area, pages)
    script.loop(0, _TOUCH_ROUNDS)
    return script


def _explicit(vcpu: int, shared: int, call: Call) -> Script:  # noqa: ARG001 - it makes explicit requests only
    area, size = _AREAS + vcpu * _AREA, _AREA // _BUFFERS
    script = Script(call=call)
    for buffer in range(area, area + _AREA, size):
        script.map(buffer, size, to="shared")
        script.map(buffer, size, to="private")
    script.loop(0, _EXPLICIT_ROUNDS)
    return script


def _pingpong(vcpu: int, shared: int, call: Call) -> Script:
    page = _AREAS + vcpu * _AREA
    script = Script(call=call)
    script.write(page, 1)
    script.write(shared | page, 2)
    script.loop(0, _PINGPONG_ROUNDS)
    return script


def _demo(vcpu: int, shared: int, call: Call) -> Script:  # noqa: ARG001 - it has one vCPU and one shared bit
    return demo_guest.build(call).script


GUESTS: Final[dict[str, Guest]] = {
    "demo": Guest(
        "the demo's guest: explicit, implicit and malformed requests",
        _demo,
        one_vcpu=True,
        shared_bit=demo_guest.SHARED_BIT,
        least=demo_guest.MEMORY,
        phases=demo_guest.PHASES,
    ),
    "touch": Guest(
        f"touches {_AREA // PAGE} pages in order, shared and then private, {_TOUCH_ROUNDS} times (implicit)", _touch
    ),
    "explicit": Guest(f"shares {_BUFFERS} buffers and takes them back, {_EXPLICIT_ROUNDS} times (explicit)", _explicit),
    "pingpong": Guest(
        f"writes to one page privately and shared in turn, {_PINGPONG_ROUNDS} times (implicit)", _pingpong
    ),
}
"""`pagegate run` starts them with private memory and with ``SHARED_BIT``, unless it is told otherwise."""
