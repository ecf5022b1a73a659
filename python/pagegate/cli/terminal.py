"""The terminal as a guest's console: what is typed goes to the guest, and Ctrl-A is the way back."""

from __future__ import annotations

import os
import termios
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ESCAPE = 0x01
_IN, _LOCAL, _CHARACTERS = 0, 3, 6
"""Where `termios.tcgetattr` has the input flags, the local flags and the characters."""

HELP = (
    "Ctrl-A x ends the guest, Ctrl-A s shows its memory, Ctrl-A r shows its requests once a second or stops that, "
    "Ctrl-A Ctrl-A sends it a Ctrl-A"
)
"""What the keys do, as one sentence."""


def descriptor(stream: IO[str] | None) -> int | None:
    """A stream's file descriptor; ``None`` if it is closed or has none."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


def is_ours(file: int) -> bool:
    """Whether this descriptor is a terminal, and this process is in its foreground.

    A process in the background is stopped by the kernel when it reads from its terminal.
    """
    try:
        return os.isatty(file) and os.tcgetpgrp(file) == os.getpgrp()
    except OSError:
        return False


class Output:
    """A standard stream as it takes a guest's bytes: at once, and complete."""

    def __init__(self, stream: IO[str] | None) -> None:
        """``stream``: sys.stdout or sys.stderr; ``None``, which a closed one is, takes nothing."""
        self._stream = stream
        file = descriptor(stream)
        self.is_terminal = file is not None and os.isatty(file)
        """Whether it is a terminal."""

    def write(self, data: bytes) -> None:
        """Writes all of it. Raises OSError."""
        if self._stream is None:
            return
        self._stream.flush()
        if hasattr(self._stream, "buffer"):
            self._stream.buffer.write(data)
            self._stream.buffer.flush()
        else:  # somebody replaced it by one that takes only text
            self._stream.write(data.decode(errors="replace"))


class Raw:
    """A terminal that passes every key on at once, without echo, until it is restored.

    Output is still processed, so that what a policy prints begins each line at the left.
    """

    def __init__(self, file: int) -> None:
        """Sets the terminal at this descriptor. Raises termios.error."""
        self._file = file
        self._before = termios.tcgetattr(file)
        mode = termios.tcgetattr(file)
        mode[_IN] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.IXON)
        mode[_IN] &= ~(termios.INLCR | termios.IGNCR | termios.ICRNL)
        mode[_LOCAL] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        mode[_CHARACTERS][termios.VMIN], mode[_CHARACTERS][termios.VTIME] = 1, 0
        termios.tcsetattr(file, termios.TCSANOW, mode)

    def restore(self) -> None:
        """Sets the terminal as it was before. May be called again; does nothing if the terminal is gone."""
        try:
            termios.tcsetattr(self._file, termios.TCSANOW, self._before)
        except termios.error:
            return


class Keys:
    """Separates what is typed into bytes for the guest and commands: the letters after Ctrl-A."""

    def __init__(self) -> None:
        """Nothing is typed yet."""
        self._escaped = False

    def split(self, typed: bytes) -> Iterator[bytes | str]:
        """Yields, in order, bytes for the guest, and each command as a str of one character."""
        literal = bytearray()
        for key in typed:
            if not self._escaped and key != _ESCAPE:
                literal.append(key)
            elif not self._escaped:
                self._escaped = True
            else:
                self._escaped = False
                if key == _ESCAPE:
                    literal.append(key)
                    continue
                if literal:
                    yield bytes(literal)
                    literal.clear()
                yield chr(key)
        if literal:
            yield bytes(literal)
