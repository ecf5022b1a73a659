"""What the end of a run waits for, said where it takes long: a disk's file need not answer."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pagegate import Vm

_LOOK_SECONDS = 0.1
_PATIENCE_LOOKS = 10


class Waiting:
    """While it is entered, a thread says what the end of the run has waited for since a second."""

    def __init__(self, vm: Vm, say: Callable[[str], None]) -> None:
        """``say`` prints a line."""
        self._vm = vm
        self._say = say
        self.said = False
        """Whether something was said, which names Ctrl-C as the way out."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pagegate-waiting", daemon=True)

    def __enter__(self) -> Self:
        """Begins to look."""
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Looks no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(_LOOK_SECONDS):
            waits = self._vm.waits_for
            looks = looks + 1 if waits else 0
            if looks < _PATIENCE_LOOKS:
                continue
            what = " and ".join(f"the disk {device}'s {what}" for device, what in waits)
            self._say(f"waiting for {what} to end; Ctrl-C ends pagegate without it")
            self.said = True
            return
