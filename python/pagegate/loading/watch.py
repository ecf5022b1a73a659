"""Loading a policy file again when it changes, while the guest runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pagegate.errors import PolicyError
from pagegate.loading import neighbours

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

_INTERVAL_SECONDS = 0.1

_Stamp = tuple[int, int, int, int]


class _Handle(Protocol):
    @property
    def current(self) -> object | None:
        """The policy in place."""

    def replace(self, policy: Any, /) -> object:
        """Puts another policy in place."""


class Machine(Protocol):
    """What a Watcher needs of a machine."""

    @property
    def policy(self) -> _Handle:
        """The policy in place."""


class Changes:
    """Tells whether files have changed since the last time, or since they were added."""

    def __init__(self, *paths: str | os.PathLike[str]) -> None:
        """``paths`` need not exist."""
        self._seen: dict[Path, _Stamp | None] = {}
        self._looked_at: dict[Path, _Stamp | None] = {}
        self.add(paths)

    def add(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Looks at these, too, from now on."""
        for path in map(Path, paths):
            if path not in self._seen:
                self._seen[path] = self._looked_at[path] = _stamp(path)

    def found(self) -> bool:
        """Whether a file changed, and stayed so since the last call: it may have been written half-way then."""
        changed = False
        for path, seen in self._seen.items():
            stamp, before = _stamp(path), self._looked_at[path]
            self._looked_at[path] = stamp
            # A file that is missing is no change: editors may remove it before they write it again.
            if stamp is not None and stamp == before and stamp != seen:
                self._seen[path] = stamp
                changed = True
        return changed


def _stamp(path: Path) -> _Stamp | None:
    """Differs after the file was written or replaced; ``None`` if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


class Watcher:
    """A context manager that checks ten times a second if a policy's files changed, and puts the policy in place.

    These are the files it was told of, and the modules beside them that the policy imports. If the policy cannot be
    loaded, the one in place stays. Either way ``say`` is called with one line, on the watcher's thread.
    """

    def __init__(
        self,
        vm: Machine,
        changes: Changes,
        load: Callable[[], object],
        say: Callable[[str], None],
        name: str = "the policy",
    ) -> None:
        """``load`` makes the policy anew; ``name`` is what ``say`` calls it."""
        self._handle = vm.policy
        self._changes = changes
        self._load = load
        self._name = name
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
            # A hook may import a neighbour when it is called.
            self._changes.add(neighbours.files(self._handle.current))
            if self._changes.found():
                self._reload()

    def _reload(self) -> None:
        try:
            self._handle.replace(self._load())
        except PolicyError as error:
            self._say(f"{_one_line(error)}; the policy in force stays")
        except BaseException as error:  # noqa: BLE001 - whatever the file raises, go on watching
            self._say(f"{self._name}: {type(error).__name__}: {_one_line(error)}; the policy in force stays")
        else:
            self._say(f"{self._name} was loaded again and judges from the next request on")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
