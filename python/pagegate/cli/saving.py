"""`--save` and `--save-when`: a machine that is put aside when the time is over, or when its console says so."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pagegate.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagegate import Report, Vm
    from pagegate.console import Console

_LOOKED_AT = 64 << 10
"""The last bytes of the console in which the words are looked for."""
_LOOK_SECONDS = 0.05
_MORE_SECONDS = 0.05
_TRIES = 40


@dataclass
class Saving:
    """Where a machine is put aside, and when."""

    folder: Path
    when: re.Pattern[bytes] | None
    _matched: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def watch(self, vm: Vm, console: Console) -> Iterator[None]:
        """While it is entered, the run ends when the console has a match."""
        if self.when is None:
            yield
            return
        wanted, over = self.when, threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_SECONDS):
                # Of what was written before there is a run, too: a machine that goes on has a new console.
                if wanted.search(console.tail(_LOOKED_AT)):
                    self._matched.set()
                    vm.stop()
                    return

        watching = threading.Thread(target=look, name="console words", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def save(self, vm: Vm, report: Report) -> Path | None:
        """Puts the machine aside, if its run ended for that. Returns the folder."""
        stopped = report.reason == "stopped" and self._matched.is_set()
        if not stopped and not (report.reason == "timeout" and self.when is None):
            return None
        for _ in range(_TRIES):
            try:
                vm.snapshot(self.folder)
            except NotSupported:
                # A store that is not answered yet. It is, if the guest goes on for a moment.
                if vm.run(timeout=_MORE_SECONDS).reason != "timeout":
                    raise
            else:
                return self.folder
        vm.snapshot(self.folder)
        return self.folder


def _when(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> re.Pattern[bytes] | None:
    try:
        return None if text is None else re.compile(text.encode(), re.MULTILINE)
    except re.error as error:
        raise click.BadParameter(f"{text!r} is no regular expression: {error}") from None


def save_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options. The command gets `saving`."""

    @click.option(
        "--save",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Put the guest aside in a new folder DIR when --timeout is over, for `pagegate resume DIR`. It has all of "
        "the guest's memory.",
    )
    @click.option(
        "--save-when",
        callback=_when,
        metavar="REGEX",
        help="Do so as soon as the console has a match, and not when --timeout is over.",
    )
    @functools.wraps(command)
    def with_options(*, save: Path | None, save_when: re.Pattern[bytes] | None, **others: Any) -> Any:
        if save is None and save_when is not None:
            raise click.UsageError("--save-when is for --save DIR")
        if save is not None and save_when is None and others.get("timeout") is None:
            raise click.UsageError("--save needs --timeout or --save-when, which say when")
        if save is not None and save.exists():
            raise click.BadParameter(f"{save} is there already", param_hint="'--save'")
        return command(saving=None if save is None else Saving(save, save_when), **others)

    return with_options
