"""Ctrl-C while a guest runs: the run ends, and what it did is told."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from pagegate import Vm
    from pagegate.cli.deadline import Deadline
    from pagegate.cli.waiting import Waiting

STATUS = 130
"""The exit status of a command that was interrupted."""


class Interrupt:
    """While it is entered, the first Ctrl-C in a run ends that run, so that it has a report.

    Another one, or one outside of a run, is as without this: a hook may be what does not return. If the end of the run
    waits for the host, which has been said, Ctrl-C ends the process: nothing else would.
    """

    def __init__(self, vm: Vm, deadline: Deadline, waiting: Waiting | None = None) -> None:
        """``vm``: the machine whose run is ended. ``deadline``: of the command, which is over then.

        ``waiting``: what says that the host is waited for, where the machine has devices.
        """
        self._vm = vm
        self._waiting = waiting
        self._deadline = deadline
        self.reached = False
        """Whether it was Ctrl-C that ended the run."""

    def __enter__(self) -> Self:
        """Takes the signal, if this is the thread that gets it and nobody ignores it."""
        mine = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGINT) if mine else None
        if callable(self._before):
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives it back."""
        if callable(self._before):
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None and self._waiting.said and self._vm.waits_for:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if (self.reached or not self._vm.running) and callable(self._before):
            self._before(number, frame)
            return
        self.reached = True
        self._deadline.end()
        self._vm.stop()
