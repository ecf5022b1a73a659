"""Loading a policy file again when it changes, while the guest runs."""

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
        """Puts another policy in place."""


class Machine(Protocol):
    """What a Watcher needs of a machine."""

    @property
    def policy(self) -> _Handle:
        """The policy in place."""


class Changes:
    """Tells whether a file has changed since the last time, or since this object was made."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path`` need not exist."""
        self.path = Path(path)
        self._seen = self._looked_at = self._stamp()

    def found(self) -> bool:
        """Whether the file changed, and stayed so since the last call: it may have been written half-way then."""
        stamp, before = self._stamp(), self._looked_at
        self._looked_at = stamp
        # A file that is missing is no change: editors may remove it before they write it again.
        if stamp is None or stamp != before or stamp == self._seen:
            return False
        self._seen = stamp
        return True

    def _stamp(self) -> _Stamp | None:
        """Differs after the file was written or replaced; ``None`` if there is no file."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


class Watcher:
    """A context manager that checks ten times a second if the file changed, and puts its policy in place.

    If the file cannot be loaded, the policy in place stays. Either way ``say`` is called with one line, on the
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
        """``file`` counts as loaded as it is now; with ``Changes``, as it was when that was made."""
        self._handle = vm.policy
        self._changes = file if isinstance(file, Changes) else Changes(file)
        self._path = self._changes.path
        self._name = name
        self._options = options
        self._say = say
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pagegate-watch", daemon=True)

    def __enter__(self) -> Self:
        """Starts to watch."""
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Stops to watch, and waits for a policy that is being loaded."""
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
        except BaseException as error:  # noqa: BLE001 - whatever the file raises, go on watching
            self._say(f"{self._path}: {type(error).__name__}: {_one_line(error)}; the policy in force stays")
        else:
            self._say(f"{self._path} was loaded again and judges from the next request on")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
