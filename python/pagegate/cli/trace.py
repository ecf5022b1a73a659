"""`pagegate trace`: makes traces."""

from __future__ import annotations

from pathlib import Path

import click

from pagegate.cli.telling import tell
from pagegate.trace import synthetic


class _Trace(click.Group):
    """`pagegate trace FILE` was what `pagegate trace synth FILE` is now."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            tell("pagegate: `pagegate trace FILE` is `pagegate trace synth FILE` now")
            args = ["synth", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Trace, short_help="Makes traces.")
def trace() -> None:
    """Makes traces. `pagegate run --events FILE` records one, `pagegate events FILE` shows one."""


@trace.command(short_help="Writes a trace of generated requests.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--requests", type=click.IntRange(0, 100_000_000), default=1_000_000, show_default=True)
@click.option("--vcpus", type=click.IntRange(min=1, max=(1 << 32) - 1), default=1, show_default=True)
@click.option("--seed", type=click.IntRange(0, (1 << 64) - 1), default=0, show_default=True)
def synth(*, file: Path, requests: int, vcpus: int, seed: int) -> int:
    """Writes a trace of generated requests to FILE: .parquet, .arrow or .arrows.

    They are those of a busy guest of 1 GiB that starts out private: bounce buffers, rings, a few pages that it converts
    back and forth, and a balloon. The same arguments give the same trace.
    """
    made = synthetic(requests, seed=seed, vcpus=vcpus)
    try:
        made.write(file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    return 0
