"""What mkdocs calls when it builds the site: the reference of the command line is made from the commands."""

from __future__ import annotations

import re

import click
from pagegate.cli import cli

_WIDTH = 100
_PLACE = "<!-- the commands -->"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([\w/.-]+)(?:#[\w-]*)?\)")
"""A link to a file of the checkout that is no page."""


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts the reference into the page that has a place for it, and names files that the site does not have."""
    markdown = _OUTSIDE.sub(lambda link: f"`{link[2]}`" if link[1] in link[2] else f"{link[1]} (`{link[2]}`)", markdown)
    return markdown.replace(_PLACE, "\n".join(_command(cli, ["pagegate"]))) if _PLACE in markdown else markdown


def _command(command: click.Command, path: list[str]) -> list[str]:
    """A command's section, and those of its subcommands."""
    # By default it is as wide as the terminal that the site is built at.
    ctx = click.Context(command, info_name=" ".join(path), terminal_width=_WIDTH)
    lines = [f"{'#' * (len(path) + 1)} {' '.join(path)}", "", "```text", ctx.get_usage(), "```", ""]
    if command.help:
        lines += [_paragraphs(command.help), ""]
    rows = [record for each in command.get_params(ctx) if (record := each.get_help_record(ctx)) is not None]
    if rows:
        lines += ["| option | |", "|---|---|", *(f"| `{_cell(name)}` | {_cell(about)} |" for name, about in rows), ""]
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            if (child := command.get_command(ctx, name)) is not None:
                lines += _command(child, [*path, name])
    return lines


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.replace("<", "&lt;").split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
