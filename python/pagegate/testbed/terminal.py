"""The command in the machine at this terminal.

This terminal passes every key on, and the command has one of its own there, of the same size.
"""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

END_KEY = b"\x1d"
"""Ctrl-], which ends the machine."""

_IN_A_TERMINAL = (
    "import os, pty, sys; status = os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])); "
    "sys.exit(status if status >= 0 else 128 - status)"
)


def is_ours() -> bool:
    """Whether standard input and output are this process's terminal, and it is in the foreground there."""
    try:
        return os.isatty(0) and os.isatty(1) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


@contextlib.contextmanager
def raw() -> Iterator[None]:
    """Pass every key on at once, without echo, until the end."""
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def command(python: str, argv: Sequence[str]) -> list[str]:
    """Return what runs `argv` in a terminal of the size of this one, with its exit status, 128+n for signal n."""
    size = os.get_terminal_size(1)
    resized = f'stty rows {size.lines} columns {size.columns}; exec "$@"'
    return [python, "-c", _IN_A_TERMINAL, "/bin/sh", "-c", resized, "sh", *argv]
