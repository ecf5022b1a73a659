"""Asking a policy without a machine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal

from pagegate._core import MapGpaRange, MemoryFault, MemoryPoison, Trial, number_of_bytes

if TYPE_CHECKING:
    from pagegate.guests import State
    from pagegate.hooks import Decision

_PAGE: Final = 4096
_MOST: Final = (1 << 64) - 1


class PolicyTester:
    """Asks a policy, Python or built-in, as a machine would, and keeps page states that its decisions change.

    The policy and its answers are checked as ``Vm`` checks them, so the same mistakes raise PolicyError. What a hook
    raises is raised here, with notes. Decisions with ``remember=`` are remembered. A wait, which only ``RateLimit``
    decides, is returned as ``Retry()``, and an exceeded quota as ``Deny(22)``.

    ``fields`` are those of ``MemoryFault``, ``MapGpaRange`` and ``MemoryPoison``; ``time`` and ``state`` are by default
    the tester's. Requests that a machine would not put to a policy raise ValueError.
    """

    def __init__(
        self, policy: object | None = None, *, memory: int | str = 64 << 20, initial: State = "private"
    ) -> None:
        """``policy`` and ``memory``: as for ``Vm``; ``None`` converts as asked. ``initial``: of all pages."""
        self.memory: Final = number_of_bytes(memory, "memory")
        self.time = 0
        """Nanoseconds: the time of the next request. Built-in policies use the times of requests, not a clock."""
        self._policy = policy
        self._trial = Trial(policy, memory, initial)

    def __repr__(self) -> str:
        """The policy, and how much it has let become shared."""
        asked = "no policy" if self._policy is None else repr(self._policy)
        return f"<pagegate.testing.PolicyTester of {asked}: {self.shared_bytes:#x} bytes of {self.memory:#x} shared>"

    def advance(self, seconds: float) -> None:
        """Adds to ``time``. ValueError for a negative number."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds is {seconds}: it must be a number, not negative")
        time = self.time + round(seconds * 1e9)
        if time > _MOST:
            raise ValueError(f"{seconds} seconds are more than a machine's clock holds")
        self.time = time

    def fault(self, gpa: int | str, *, private: bool | None = None, **fields: Any) -> Decision:
        """Asks about an implicit request: an access to the page at ``gpa``.

        ``private``: whether the access is to private memory; by default to the state that the page is not in.
        """
        state = self._whole(gpa, fields.get("size", _PAGE))
        if private is None:
            private = state == "shared"
        elif state == ("private" if private else "shared"):
            raise ValueError(
                f"the page at {number_of_bytes(gpa, 'gpa'):#x} is {state} already: such an access is no request"
            )
        fields = {"time": self.time, "state": state, **fields}
        return self.ask(MemoryFault(gpa, private=private, **fields))

    def call(self, gpa: int | str, size: int | str = _PAGE, *, to: State, **fields: Any) -> Decision:
        """Asks about an explicit request, KVM_HC_MAP_GPA_RANGE; ``size`` in bytes."""
        fields = {"time": self.time, "state": self.state(gpa, size), **fields}
        return self.ask(MapGpaRange(gpa, size, to=to, **fields))

    def poison(self, gpa: int | str, **fields: Any) -> Decision:
        """Asks about an access to a poisoned page, by default to the state that it is in."""
        state = self._whole(gpa, fields.get("size", _PAGE))
        fields = {"private": state == "private", "time": self.time, "state": state, **fields}
        return self.ask(MemoryPoison(gpa, **fields))

    def ask(self, request: MemoryFault | MapGpaRange) -> Decision:
        """Asks about this request as it is. Its ``state`` and ``time`` need not be those of the tester."""
        return self._trial.judge(request)

    def state(self, gpa: int | str, size: int | str = _PAGE) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages."""
        return self._trial.state(gpa, size)

    def runs(self) -> list[tuple[int, int, State]]:
        """Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending."""
        return self._trial.runs()

    @property
    def shared_bytes(self) -> int:
        """Bytes that are shared."""
        return self._trial.shared_bytes

    def _whole(self, gpa: int | str, size: int | str) -> State:
        state = self.state(gpa, size)
        if state == "mixed":
            gpa, size = number_of_bytes(gpa, "gpa"), number_of_bytes(size, "size")
            raise ValueError(f"{gpa:#x} + {size:#x} is mixed: KVM reports a fault for pages of one state")
        return state
