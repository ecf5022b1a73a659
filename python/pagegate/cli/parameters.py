"""Arguments of more than one command."""

from __future__ import annotations

from typing import Any

import click

from pagegate.loading.options import integer

_PAGE = 4096


class Size(click.ParamType[int]):
    """A number of bytes, in whole pages."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads the number and its unit."""
        try:
            count = value if isinstance(value, int) else integer(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if count <= 0 or count % _PAGE:
            self.fail(f"{value} is no positive multiple of {_PAGE} bytes, such as 64M", param, ctx)
        return count


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
