"""How commands print: as wide as the terminal, plain under NO_COLOR, and without blanks at the end of a line."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_INDENT = 4


def console(*, err: bool = False, quiet: bool = False) -> Console:
    """A console on standard output or error. rich itself keeps bold and dim under NO_COLOR."""
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=err, quiet=quiet, highlight=False, color_system=None if plain else "auto")


def put(on: Console, *parts: RenderableType) -> None:
    """Prints them one below the other. A table's cells are filled up with blanks, which a file has no use for."""
    if on.is_terminal or on.quiet:
        on.print(*parts, sep="\n")
        return
    with on.capture() as capture:
        on.print(*parts, sep="\n")
    stream = sys.stderr if on.stderr else sys.stdout
    if stream is not None:
        stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def put_line(on: Console, text: Text) -> None:
    """Prints a line of a list: whole in a file; at a terminal it goes on indented, broken between words."""
    if on.is_terminal and text.cell_len > on.width > _INDENT:
        # The indent of the first line is part of the text, and of the others it is added.
        lines = text.wrap(on, on.width - _INDENT)
        for each in lines:
            each.rstrip()
        text = Text(f"\n{' ' * _INDENT}").join(lines)
    on.print(text, soft_wrap=True)


def times(count: int) -> str:
    """How often: "once", "2 times"."""
    return "once" if count == 1 else f"{count} times"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 request", "2 requests"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str) -> str:
    """Text of a guest without what a terminal would take for commands."""
    return "".join(each if each.isprintable() else "?" for each in text)
