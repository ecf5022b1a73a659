"""How commands print: as wide as the terminal, plain under NO_COLOR, and without blanks at the end of a line."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from pagegate.cli.telling import INDENT, breaks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from rich.console import ConsoleOptions, RenderableType, RenderResult

_GAP = "  "
_LEAST = 24
"""The fewest columns that a text beside its name may have."""


def console(*, err: bool = False, quiet: bool = False) -> Console:
    """A console on standard output or error. rich itself keeps bold and dim under NO_COLOR."""
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(stderr=err, quiet=quiet, highlight=False, color_system=None if plain else "auto")


def put(on: Console, *parts: RenderableType) -> None:
    """Prints them one below the other. Lines of a file are whole, and have no blanks at the end."""
    if on.is_terminal or on.quiet:
        on.print(*parts, sep="\n")
        return
    with on.capture() as capture:
        on.print(*parts, sep="\n", crop=False)
    stream = sys.stderr if on.stderr else sys.stdout
    if stream is not None:
        stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def put_line(on: Console, text: Text) -> None:
    """Prints a line of a list: whole in a file; at a terminal it goes on indented, broken between words."""
    lines = broken(text, on.width) if on.is_terminal else [text]
    on.print(Text("\n").join(lines), soft_wrap=True)


def broken(text: Text, width: int, indent: int = INDENT) -> list[Text]:
    """The lines of at most so many columns that a line becomes, broken between words."""
    return [
        Text(" " * indent if number else "").append_text(text[begin:end])
        for number, (begin, end) in enumerate(breaks(text.plain, width, indent))
    ]


class Rows:
    """A table. Where it is wider than the terminal, its rows are broken between words."""

    def __init__(self, *headings: str, right: Collection[int] = ()) -> None:
        """``right``: the columns whose cells are flush right."""
        self._rows = [[Text(each) for each in headings]]
        self._right = right

    def add(self, *cells: str) -> None:
        """Adds a row."""
        self._rows.append([Text(each) for each in cells])

    def __rich_console__(self, on: Console, options: ConsoleOptions) -> RenderResult:
        """Its lines."""
        rows = [row for row in self._rows if any(row)]
        columns = [max(each.cell_len for each in column) for column in zip(*rows, strict=True)]
        fits = not _has_width(on) or sum(columns) + len(_GAP) * (len(columns) - 1) <= options.max_width
        for row in rows:
            cells = []
            for number, (cell, column) in enumerate(zip(row, columns, strict=True)):
                if fits:
                    cell.align("right" if number in self._right else "left", column)
                if fits or cell:
                    cells.append(cell)
            yield from _lines(Text(_GAP).join(cells), on, options, INDENT)


class Pairs:
    """What things are: a name and a text on each row."""

    def __init__(self) -> None:
        """Without a row."""
        self._rows: list[tuple[str, Text]] = []

    def add(self, name: str, about: str | Text) -> None:
        """Adds a row. Without a name it goes on with the one before."""
        self._rows.append((name, Text(about) if isinstance(about, str) else about))

    def __rich_console__(self, on: Console, options: ConsoleOptions) -> RenderResult:
        """Its lines: beside each other, or where that leaves little room, one after the other."""
        names = max(len(name) for name, _ in self._rows) + len(_GAP)
        beside = not _has_width(on) or options.max_width - names >= _LEAST
        for name, about in self._rows:
            begin = f"{name:{names}}" if beside else f"{name}{_GAP}" if name else " " * INDENT
            yield from _lines(Text(begin).append_text(about), on, options, names if beside else INDENT)


def _has_width(on: Console) -> bool:
    """Whether lines have to fit: at a terminal, and where the user says how wide they may be."""
    return on.is_terminal or bool(os.environ.get("COLUMNS"))


def _lines(text: Text, on: Console, options: ConsoleOptions, indent: int) -> Iterator[Text]:
    for each in broken(text, options.max_width, indent) if _has_width(on) else [text]:
        each.rstrip()
        each.no_wrap, each.overflow = True, "ignore"
        yield each


def times(count: int) -> str:
    """How often: "once", "2 times"."""
    return "once" if count == 1 else f"{count} times"


def counted(count: int, noun: str) -> str:
    """A number of things: "1 request", "2 requests"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def printable(text: str) -> str:
    """Text of a guest without what a terminal would take for commands."""
    return "".join(each if each.isprintable() else "?" for each in text)
