"""What a guest asks for while it runs: each request on a line, or now and then how many there were."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import chain, count
from typing import TYPE_CHECKING, Self

from rich.text import Text

from pagegate.cli.printing import counted
from pagegate.cli.summary import line
from pagegate.units import size

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from pagegate import Vm

_LOOK_SECONDS = 0.05
_NEWS_SECONDS = (1, 2, 3, 5, 10, 20, 30)
"""When news are told, and then again and again after as many as the last."""


class SoFar:
    """What the guest has asked for so far, on a line."""

    def __init__(self, vm: Vm) -> None:
        """From the oldest request in the log on."""
        self._vm = vm
        self._kinds: Counter[str] = Counter()
        self._next = 0
        self._last = ""

    def line(self) -> str:
        """The line."""
        for event in self._vm.events.since(self._next):
            self._kinds[event.kind] += 1
            self._next = max(self._next, event.sequence + 1)
            if event.kind in ("implicit", "explicit"):
                self._last = (
                    f"; the last: {event.kind}, {event.gpa:#x} + {size(event.size)} to {event.to}, {event.outcome}"
                )
        private = self._vm.attributes.private_bytes
        asked = f"{self._kinds['implicit']} implicit, {self._kinds['explicit']} explicit"
        if (unseen := self._vm.events.total - self._kinds.total()) > 0:
            asked += f", {unseen} that the log dropped"
        return f"{asked}; {size(self._vm.memory - private)} shared, {size(private)} private{self._last}"

    def news(self) -> str:
        """The line if there were requests since it was made; else nothing."""
        return self.line() if self._vm.events.total > self._next else ""


class Life:
    """While it is entered, a thread tells what the guest asks for."""

    def __init__(self, vm: Vm, say: Callable[[Text], None], *, each: bool, news: Callable[[], bool]) -> None:
        """``say`` prints a line. ``each``: every request; else the number of them, while ``news`` says that."""
        self._vm = vm
        self._say = say
        self._each = each
        self._news = news
        self._so_far = SoFar(vm)
        self._next = vm.events.total
        self._lock = threading.Lock()
        """For what has been told."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pagegate-life", daemon=True)

    def __enter__(self) -> Self:
        """Begins to tell."""
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tells the rest."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            if self._each:
                while not self._over.wait(_LOOK_SECONDS):
                    self.catch_up()
                self.catch_up()
            else:
                self._tell_news()
        except OSError:
            # Where this cannot be printed there is nobody to tell; the guest goes on.
            return

    def catch_up(self) -> None:
        """Tells each request that is not told yet: before something else is printed that came later.

        Waits for no more than a second, which is for what it has to print itself.
        """
        if not self._lock.acquire(timeout=1):
            return
        try:
            self._tell_each()
        finally:
            self._lock.release()

    def _tell_each(self) -> None:
        events = self._vm.events.since(self._next)
        if not events:
            return
        if missed := events[0].sequence - self._next:
            self._say(Text(f"  {counted(missed, 'request')} came faster than they could be shown", "yellow"))
        for event in events:
            self._say(line(event))
        self._next = events[-1].sequence + 1

    def _tell_news(self) -> None:
        begun = time.monotonic()
        for at in chain(_NEWS_SECONDS, count(2 * _NEWS_SECONDS[-1], _NEWS_SECONDS[-1])):
            if self._over.wait(max(0.0, begun + at - time.monotonic())):
                return
            if self._news():
                self._say(Text(f"{at} s: {self._so_far.news() or 'nothing new was asked for'}", "dim"))
