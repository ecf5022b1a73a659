"""A policy's requests without a guest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal

from pagegate._core import MapGpaRange, MemoryFault, MemoryPoison, Trial

if TYPE_CHECKING:
    from pagegate.guests import State
    from pagegate.hooks import Decision

_PAGE: Final = 4096
_MOST: Final = (1 << 64) - 1


class PolicyTester:
    """Asks a policy, Python or built in, what a machine would ask it, and keeps the states that would come of it.

    The policy is validated and its answers are read as ``Vm`` does, so the same mistakes raise PolicyError, and what a
    hook raises is raised here, with notes. What ``remember=`` taught is remembered. A decision to wait, which only
    built-in policies make, is a ``Retry()``; a quota that is exceeded is a ``Deny(22)``.

    ``fields`` are those of ``MemoryFault``, ``MapGpaRange`` and ``MemoryPoison``; ``time`` and ``state`` are by default
    the tester's own. Requests that a machine would not let through to any policy raise ValueError.
    """

    def __init__(self, policy: object | None = None, *, memory: int = 64 << 20, initial: State = "private") -> None:
        """``policy`` as for ``Vm``; ``None`` converts as asked."""
        self.memory: Final = memory
        self.time = 0
        """The time of the next request, in nanoseconds. Policies go by the time of a request, not by a clock."""
        self._trial = Trial(policy, memory, initial)

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds is {seconds}: it must be a number, not negative")
        time = self.time + round(seconds * 1e9)
        if time > _MOST:
            raise ValueError(f"{seconds} seconds are more than a machine's clock holds")
        self.time = time

    def fault(self, gpa: int, *, private: bool | None = None, **fields: Any) -> Decision:
        """An implicit request: an access to ``gpa``'s page, which is in the other state.

        ``private`` is the side that was accessed, by default the one that the page is not in.
        """
        state = self._whole(gpa, fields.get("size", _PAGE))
        if private is None:
            private = state == "shared"
        elif state == ("private" if private else "shared"):
            raise ValueError(f"the page at {gpa:#x} is {state} already: such an access is no request")
        fields = {"time": self.time, "state": state, **fields}
        return self.ask(MemoryFault(gpa, private=private, **fields))

    def call(self, gpa: int, size: int = _PAGE, *, to: State, **fields: Any) -> Decision:
        """An explicit request, KVM_HC_MAP_GPA_RANGE."""
        fields = {"time": self.time, "state": self.state(gpa, size), **fields}
        return self.ask(MapGpaRange(gpa, size, to=to, **fields))

    def poison(self, gpa: int, **fields: Any) -> Decision:
        """An access to a poisoned page, by default to the side that it is in."""
        state = self._whole(gpa, fields.get("size", _PAGE))
        fields = {"private": state == "private", "time": self.time, "state": state, **fields}
        return self.ask(MemoryPoison(gpa, **fields))

    def ask(self, request: MemoryFault | MapGpaRange) -> Decision:
        """A request as it is, whatever the page's state and the time are: a recorded one, or one of your own making."""
        return self._trial.judge(request)

    def state(self, gpa: int, size: int = _PAGE) -> Literal["private", "shared", "mixed"]:
        """The state of a range of whole pages."""
        return self._trial.state(gpa, size)

    def runs(self) -> list[tuple[int, int, State]]:
        """Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending."""
        return self._trial.runs()

    @property
    def shared_bytes(self) -> int:
        """Bytes that are shared."""
        return self._trial.shared_bytes

    def _whole(self, gpa: int, size: int) -> State:
        state = self.state(gpa, size)
        if state == "mixed":
            raise ValueError(f"{gpa:#x} + {size:#x} is mixed: KVM reports a fault for pages of one state")
        return state
