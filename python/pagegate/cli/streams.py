"""Standard output and standard error, of which a reader that stalls does not keep a command from ending.

A pipe that nobody reads blocks whoever writes to it, and that may be a vCPU's thread, for which a run waits. So another
thread writes, and the one that has something to write waits for it: as long as it takes, but once the command is to end
only while the reader goes on reading. What is not written by then is dropped and counted.

O_NONBLOCK would need no thread, but it belongs to the open file, which other processes have, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import stat
import sys
import threading
import time
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from _typeshed import ReadableBuffer

_PATIENCE_SECONDS = 0.5
"""How long a reader may read nothing once the command is to end."""
_SLICE_SECONDS = 0.05
_PIECE = 4096
"""The most that is written at once: as much as a pipe takes when it has room at all."""


class _Piece:
    """Bytes that one call has to write."""

    def __init__(self, data: bytes) -> None:
        self.left = memoryview(data)
        self.error: OSError | None = None
        self.given_up = False
        self.done = threading.Lock()
        self.done.acquire()


class Stream(io.BufferedIOBase):
    """A file descriptor that is written to at once, without a buffer. Of use to any number of threads."""

    def __init__(self, descriptor: int, name: str) -> None:
        """The descriptor is not closed with this object. ``name``: as of other files."""
        self.name = name
        self._descriptor = descriptor
        self._process = os.getpid()
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        # A signal's handler or a finalizer may print while this thread has it.
        self._lock = threading.RLock()
        self._given = self._written = 0
        self._pieces: queue.SimpleQueue[_Piece] = queue.SimpleQueue()
        self._has_thread = False
        self._progress = 0.0
        self._ending: float | None = None

    @property
    def lost(self) -> int:
        """How many bytes were to be written and are not."""
        return self._given - self._written

    def hurry(self, at: float) -> None:
        """From this time on (of `time.monotonic`), a reader that reads nothing for half a second is given up."""
        self._ending = at if self._ending is None else min(self._ending, at)

    def write(self, data: ReadableBuffer, /) -> int:
        """Writes all of it, or gives up. Raises OSError."""
        piece = _Piece(bytes(data))
        size = len(piece.left)
        # A file has no reader to wait for, and the thread is not in a process that was forked.
        if self._is_file or os.getpid() != self._process:
            while piece.left:
                piece.left = piece.left[_write(self._descriptor, piece.left) :]
        else:
            self._hand(piece)
            if piece.error is not None:
                raise piece.error
        return size

    def _hand(self, piece: _Piece) -> None:
        with self._lock:
            self._given += len(piece.left)
            first, self._has_thread = not self._has_thread, True
        self._pieces.put(piece)
        if first:
            # A daemon: at the end it may be writing still.
            threading.Thread(target=self._work, name="standard output", daemon=True).start()
        while not piece.done.acquire(timeout=_SLICE_SECONDS):
            if self._ending is not None and time.monotonic() > max(self._ending, self._progress) + _PATIENCE_SECONDS:
                piece.given_up = True
                return

    def _work(self) -> None:
        while True:
            piece = self._pieces.get()
            self._progress = time.monotonic()
            try:
                while piece.left and not piece.given_up:
                    count = _write(self._descriptor, piece.left[:_PIECE])
                    piece.left = piece.left[count:]
                    self._written += count
                    self._progress = time.monotonic()
            except OSError as error:
                # What is not written for a reason that is told is not dropped.
                piece.error = error
                self._written += len(piece.left)
            piece.done.release()

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        """It is."""
        return True


def _write(descriptor: int, data: memoryview) -> int:
    while True:
        try:
            return os.write(descriptor, data)
        except BlockingIOError:  # whoever opened it has set O_NONBLOCK
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


def hurry(at: float | None = None) -> None:
    """From this time on (of `time.monotonic`; ``None``: now) what is written waits for no reader that has stalled."""
    for stream in _streams(sys.stdout, sys.stderr):
        stream.hurry(time.monotonic() if at is None else at)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """While it is entered, sys.stdout and sys.stderr are such streams. At the end, says what was dropped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _wrapped(sys.stdout), _wrapped(sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _say_what_is_lost()
        sys.stdout, sys.stderr = before


def _say_what_is_lost() -> None:
    lost = sum(stream.lost for stream in _streams(sys.stdout, sys.stderr))
    if lost:
        sys.stderr.write(f"pagegate: {lost} bytes of output are dropped: nobody read them\n")
        sys.stderr.flush()


def _streams(*files: TextIO | None) -> list[Stream]:
    buffers = [getattr(file, "buffer", None) for file in files]
    return [buffer for buffer in buffers if isinstance(buffer, Stream)]


def _wrapped(file: TextIO | None) -> TextIO:
    """The same for text. What is no file descriptor's stream, or closed, stays what it is."""
    if not isinstance(file, io.TextIOWrapper):
        return file  # type: ignore[return-value] # None is what Python itself sets
    try:
        file.flush()
        stream = Stream(file.fileno(), file.name)
    except (OSError, ValueError):
        return file
    return io.TextIOWrapper(
        cast("BinaryIO", stream),
        file.encoding,
        "replace",
        line_buffering=file.line_buffering,
        write_through=file.write_through,
    )
