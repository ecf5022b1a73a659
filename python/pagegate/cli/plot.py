"""`pagegate plot`: draws a trace."""

from __future__ import annotations

from pathlib import Path

import click

from pagegate import plot as plots
from pagegate.cli import symbols
from pagegate.trace import read


@click.command(short_help="Draws a trace.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="OUT",
    help=f"The file to write: {', '.join(plots.SUFFIXES)}.",
)
def plot(*, file: Path, output: Path) -> int:
    """Draws the trace in FILE: bytes private and shared over time, conversions by address and time, latency, decisions.

    Needs matplotlib: pip install 'pagegate[plot]'.
    """
    if output.suffix not in plots.SUFFIXES:
        raise click.UsageError(f"{output} must end in one of {', '.join(plots.SUFFIXES)}")
    try:
        drawn = plots.figure(read(file), symbols=symbols.read(file), title=file.name)
    except ImportError as error:
        raise click.ClickException(str(error)) from None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    plots.save(drawn, output, title=file.name)
    return 0
