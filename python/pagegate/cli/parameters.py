"""Arguments of more than one command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from pagegate._core import whole_number

_PAGE = 4096
_MOST_MEMORY = 16 << 40
_MOST_SECONDS = 1e9
"""Some thirty years."""
_FIRST_CID, _LAST_CID = 3, (1 << 32) - 2
"""Context IDs that a guest may have."""
_MOST_VCPUS = 4096
"""KVM's own limit."""


class Size(click.ParamType[int]):
    """A number of bytes, in whole pages."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the number and its unit."""
        try:
            count = value if isinstance(value, int) else whole_number(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if count <= 0 or count % _PAGE:
            self.fail(f"{value} is no positive multiple of {_PAGE} bytes, such as 64M", param, ctx)
        if count > _MOST_MEMORY:
            self.fail(f"{value} is more than 16 TiB", param, ctx)
        return count


class Seconds(click.ParamType[float]):
    """A time in seconds. click's own range takes NaN, which is neither in a range nor outside."""

    name = "S"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Reads the number."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds <= _MOST_SECONDS:
            self.fail(f"{value} is no number of seconds, above 0 and at most {_MOST_SECONDS:.0f}", param, ctx)
        return seconds


class Disk(click.ParamType[tuple[Path, bool]]):
    """A file, and whether it is only read: FILE or FILE:ro."""

    name = "FILE[:ro]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, bool]:
        """Splits it. A file whose name ends in ":ro" is written with ":ro" after that."""
        if isinstance(value, tuple):
            return value
        path = Path(value.removesuffix(":ro"))
        if not path.exists():
            self.fail(f"there is no {path}", param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a folder: a disk is a file or a block device", param, ctx)
        return path, value.endswith(":ro")


class VsockAddress(click.ParamType[tuple[int, Path]]):
    """A guest's context ID, and the Unix socket for the host's side: CID:PATH."""

    name = "CID:PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, Path]:
        """Splits it."""
        if isinstance(value, tuple):
            return value
        cid, _, path = value.partition(":")
        if not (cid.isascii() and cid.isdigit() and path):
            self.fail(f"{value!r} is no CID:PATH, as 3:guest.vsock", param, ctx)
        if not _FIRST_CID <= int(cid) <= _LAST_CID:
            self.fail(f"the context ID {cid} is not from {_FIRST_CID} to {_LAST_CID}", param, ctx)
        if Path(path).exists():
            self.fail(f"{path} exists: name a socket that is not there yet", param, ctx)
        return int(cid), Path(path)


VCPUS = click.IntRange(1, _MOST_VCPUS)


def _key_values(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    given: dict[str, str] = {}
    for value in values:
        key, equals, text = value.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is no KEY=VALUE", ctx, param)
        if key in given:
            raise click.BadParameter(f"{key} is given twice", ctx, param)
        given[key] = text
    return given


policy_options = click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_key_values,
    help="An argument for the policy's class or function.",
)

policy_timeout_option = click.option(
    "--policy-timeout",
    type=Seconds(),
    help="End the run when a call of the policy takes longer than S seconds.",
)

verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Print each request on standard error as it comes, with what became of it."
)
