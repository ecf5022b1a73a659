"""The options that write a run's requests to a file, and the recorder that does it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from pagegate.cli.telling import tell
from pagegate.trace import Recorder

if TYPE_CHECKING:
    from types import TracebackType

    from pagegate import Vm
    from pagegate.cli.deadline import Deadline


events_option = click.option(
    "--events",
    "events",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write every request to FILE as it runs: .parquet, .arrow (IPC file) or .arrows (IPC stream).",
)
limit_option = click.option(
    "--events-limit",
    type=click.IntRange(1, (1 << 64) - 1),
    default=10_000_000,
    show_default=True,
    metavar="N",
    help="Write at most N requests to FILE, and beside them 65536 malformed ones; the others are only counted.",
)


class Recording:
    """Records a machine's requests while it is entered; does nothing without a file.

    What is not in the file is said on standard error. If the run raises, so is an error of the file; otherwise the
    error is kept in ``failure``, for the caller to raise after saying how the run ended.
    """

    def __init__(self, vm: Vm, file: Path | None, limit: int, deadline: Deadline) -> None:
        """``limit``: requests in the file at most. ``deadline``: how long a pipe's reader is waited for.

        Raises OSError, click.UsageError for an unknown suffix, and click.ClickException at the deadline.
        """
        self.failure: OSError | None = None
        """Why the file is not complete."""
        self._file = file
        self._deadline = deadline
        try:
            with deadline.of(f"nobody opened {file}"):
                self._recorder = None if file is None else Recorder(vm, file, limit=limit)
        except ValueError as error:
            raise click.UsageError(str(error)) from None

    def __enter__(self) -> Self:
        """Records from the construction on; entering is only for the end."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the file."""
        if self._recorder is None:
            return
        try:
            self._recorder.close(timeout=self._deadline.left() if exc is None else 0)
        except OSError as error:
            self.failure = error
            if exc is not None:
                tell(f"pagegate: {self._file}: {error.strerror}")
            return
        malformed = self._recorder.lost_malformed
        if lost := self._recorder.lost - malformed:
            what = f"{lost} requests are not in {self._file}"
            tell(f"pagegate: {what}: above --events-limit, or too fast to be written")
        if malformed:
            what = f"{malformed} malformed requests are not in {self._file}"
            tell(f"pagegate: {what}: too many, or too fast to be written")

    def check(self, *, interrupted: bool) -> None:
        """Raises the file's error. After Ctrl-C, which decides the exit status, it is only said."""
        if self.failure is None:
            return
        if not interrupted:
            raise self.failure
        tell(f"pagegate: {self._file}: {self.failure.strerror}")
