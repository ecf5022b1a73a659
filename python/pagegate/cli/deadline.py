"""--timeout before a guest runs: its files may be pipes that nobody writes or reads, or as large as memory."""

from __future__ import annotations

import copy
import signal
import time
from typing import TYPE_CHECKING, NoReturn, Self

import click

from pagegate.cli import streams

if TYPE_CHECKING:
    from types import TracebackType


class Deadline:
    """A time limit that begins when it is made. While it is entered, reaching it ends the command with status 1.

    After it what is printed waits for no reader that has stalled.
    """

    def __init__(self, seconds: float | None) -> None:
        """``None`` for no limit."""
        self._seconds = seconds
        self._begin = time.monotonic()
        self._said = "the guest was not loaded"
        if seconds is not None:
            streams.hurry(self._begin + seconds)

    def left(self) -> float | None:
        """The seconds that are left; ``None`` for no limit."""
        return None if self._seconds is None else max(0.0, self._begin + self._seconds - time.monotonic())

    def end(self) -> None:
        """No time is left, whatever the limit was."""
        self._seconds = 0.0
        streams.hurry()

    def of(self, said: str) -> Self:
        """The same one, for something else that may take long. ``said``: what was not done in time, as a clause."""
        other = copy.copy(self)
        other._said = said  # noqa: SLF001
        return other

    def __enter__(self) -> Self:
        """Sets the alarm."""
        left = self.left()
        if left is not None:
            self._before = signal.signal(signal.SIGALRM, self._reached)
            # 0 would be no alarm.
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Takes the alarm back."""
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _reached(self, _number: int, _frame: object) -> NoReturn:
        raise click.ClickException(f"--timeout: {self._said} within {self._seconds:g} s")
