"""Messages and help of commands: lines that fit the terminal, broken between words. It waits for no import of rich."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

INDENT = 4
_UNIT = re.compile(r"(B|[KMGTE]iB|ns|µs|ms|s)\b")
_MOST_HELP = 80
"""Columns of a help text, which is hard to read if it is wider."""


def breaks(text: str, width: int, indent: int = INDENT) -> list[tuple[int, int]]:
    """Where the lines begin and end that a line becomes, of at most so many columns, all but the first indented.

    A word that is longer than a line stays whole.
    """
    found: list[tuple[int, int]] = []
    begin = 0
    while True:
        room = width - indent if found else width
        at = -1
        if len(text) - begin > room > 0:
            word = begin + len(text[begin:]) - len(text[begin:].lstrip())
            at = text.rfind(" ", word, begin + room + 1)
            # A unit stays with its number.
            while at > word and text[at - 1].isdigit() and _UNIT.match(text, at + 1):
                at = text.rfind(" ", word, at)
            at = at if at >= 0 else text.find(" ", max(word, begin + room))
        if at < 0:
            return [*found, (begin, len(text))]
        found.append((begin, begin + len(text[begin:at].rstrip())))
        begin = at + len(text[at:]) - len(text[at:].lstrip())


def width(*, err: bool) -> int | None:
    """The columns of the terminal that standard error or output is; ``None`` if it is none."""
    stream = sys.stderr if err else sys.stdout
    try:
        if stream is None or not stream.isatty():
            return None
        columns = os.environ.get("COLUMNS", "")
        return int(columns) if columns.isdigit() else os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def tell(text: str, *, err: bool = True) -> None:
    """Prints a message on standard error or output."""
    click.echo(folded(text, err=err), err=err)


def folded(text: str, *, err: bool) -> str:
    """A message as standard error or output gets it: whole lines if that is no terminal."""
    columns = width(err=err)
    if columns is None:
        return text
    return "\n".join(
        f"{' ' * INDENT if number else ''}{line[begin:end]}"
        for line in text.splitlines()
        for number, (begin, end) in enumerate(breaks(line, columns))
    )


class _Help(click.HelpFormatter):
    """click's own, but for terminals of fewer than 50 columns, too."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        narrow = min(col_max, self.width // 3)
        super().write_dl([(self._choices(term), about) for term, about in rows], narrow, col_spacing)

    def _choices(self, term: str) -> str:
        """A list of words to choose from, over several lines if it is too long for one."""
        indent = " " * (self.current_indent + INDENT)
        lines = [""]
        for word in term.replace("|", "|\n").splitlines():
            if lines[-1] and len(lines[-1]) + len(word) > self.width - len(indent):
                lines.append("")
            lines[-1] += word
        return f"\n{indent}".join(lines)


class _Context(click.Context):
    def make_formatter(self) -> click.HelpFormatter:
        # Without a terminal it is what $COLUMNS says, if anything.
        columns = width(err=False) or width(err=True) or shutil.get_terminal_size((_MOST_HELP, 24)).columns
        return _Help(width=min(columns, _MOST_HELP) if self.terminal_width is None else self.terminal_width)


def fitting(command: click.Command) -> click.Command:
    """The command, with its help and that of its subcommands as wide as the terminal."""
    command.context_class = _Context
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        fitting(child)
    return command
