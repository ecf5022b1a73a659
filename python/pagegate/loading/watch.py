"""A policy file that is loaded anew when it changes, while the guest runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pagegate.errors import PolicyError
from pagegate.loading import policy_file

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

_INTERVAL_SECONDS = 0.1

_Stamp = tuple[int, int, int, int]


class _Handle(Protocol):
    def replace(self, policy: Any, /) -> object:
        """The policy from the next request on."""


class Machine(Protocol):
    """What can change its policy while it runs."""

    @property
    def policy(self) -> _Handle:
        """The policy in force."""


class Changes:
    """Tells whether a file is another than the last time. What it is when this is made counts as seen."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` need not be there."""
        self.path = Path(path)
        self._seen = self._looked_at = self._stamp()

    def found(self) -> bool:
        """Whether the file changed, and has not changed any more since the last look: who writes it may be half-way."""
        stamp, before = self._stamp(), self._looked_at
        self._looked_at = stamp
        # An editor that replaces the file may have taken the old one away first.
        if stamp is None or stamp != before or stamp == self._seen:
            return False
        self._seen = stamp
        return True

    def _stamp(self) -> _Stamp | None:
        """What differs when the file was written or another took its place; ``None`` while there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


class Watcher:
    """While entered, it looks ten times a second whether the file is another, and gives its policy to the machine.

    A file that cannot be loaded leaves the policy in force as it is. ``say`` is told of either in one line, on the
    watcher's thread. Only the file itself is watched, not what it imports.
    """

    def __init__(
        self,
        vm: Machine,
        file: Changes | str | os.PathLike[str],
        name: str | None,
        options: Mapping[str, str] | None,
        say: Callable[[str], None],
    ) -> None:
        """The present contents of a path count as loaded; with ``Changes``, what they were when that was made."""
        self._handle = vm.policy
        self._changes = file if isinstance(file, Changes) else Changes(file)
        self._path = self._changes.path
        self._name = name
        self._options = options
        self._say = say
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pagegate-watch", daemon=True)

    def __enter__(self) -> Self:
        """Starts looking."""
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Stops looking, and returns when no policy is being loaded any more."""
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL_SECONDS):
            if self._changes.found():
                self._reload()

    def _reload(self) -> None:
        try:
            self._handle.replace(policy_file.load(self._path, self._name, self._options))
        except PolicyError as error:
            self._say(f"{_one_line(error)}; the policy in force stays")
        except BaseException as error:  # noqa: BLE001 - the watch goes on, whatever the file does
            self._say(f"{self._path}: {type(error).__name__}: {_one_line(error)}; the policy in force stays")
        else:
            self._say(f"{self._path} was loaded again and judges from the next request on")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
