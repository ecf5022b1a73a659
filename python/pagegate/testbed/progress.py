"""How a long build reports its progress: by bars on a terminal, elsewhere by a line every 20 seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_INTERVAL = 20.0
"""Seconds between two lines of the same stage where there is no terminal."""


class Reporter(Protocol):
    """Is told how far a build is."""

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        """A stage begins, of about `total` steps; what a step is, where the text does not say it."""

    def reach(self, done: int) -> None:
        """`done` steps of the stage are done."""


class Silent:
    """Shows nothing."""

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        """Show nothing."""

    def reach(self, done: int) -> None:
        """Show nothing."""


class PlainLines:
    """A line when a stage begins, and one every `PLAIN_INTERVAL` seconds."""

    def __init__(self, stream: TextIO) -> None:
        """Write to this stream."""
        self._stream = stream
        self._text = ""
        self._total: int | None = None
        self._unit = ""
        self._begun = self._said = 0.0

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        """Say that the stage begins."""
        self._text, self._total, self._unit = text, total, unit and f" {unit}"
        self._begun = self._said = time.monotonic()
        self._say(text)

    def reach(self, done: int) -> None:
        """Say how far the stage is, unless the last line is less than `PLAIN_INTERVAL` seconds old."""
        now = time.monotonic()
        if now - self._said < PLAIN_INTERVAL:
            return
        self._said = now
        # The total is an estimate, and "1203 of about 1200" would confuse.
        of = f" of about {self._total}" if self._total is not None and done <= self._total else ""
        self._say(f"{self._text}: {done}{of}{self._unit}, {now - self._begun:.0f} s")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Bars:
    """A bar for each stage."""

    def __init__(self, progress: "Progress") -> None:
        """Add the bars to this display."""
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, text: str, total: int | None = None, unit: str = "") -> None:
        """Complete the bar of the last stage, and begin another."""
        self.finish()
        self._task = self._progress.add_task(f"{text}, {unit}" if unit else text, total=total)

    def reach(self, done: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def finish(self) -> None:
        """Complete the bar."""
        if self._task is not None:
            done = self._progress.tasks[self._task].completed
            self._progress.update(self._task, total=max(done, 1), completed=max(done, 1))
            self._progress.stop_task(self._task)


@contextmanager
def reporter(stream: TextIO) -> Iterator[Reporter]:
    """A reporter on this stream, bars if it is a terminal."""
    if not stream.isatty():
        yield PlainLines(stream)
        return
    # Imported here because it takes seconds in an emulated machine, and only a build needs it.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        bars = Bars(progress)
        yield bars
        bars.finish()
