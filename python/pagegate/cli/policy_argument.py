"""The argument that names a policy on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class PolicyFile(click.ParamType[tuple[Path, str | None]]):
    """FILE, or FILE:NAME."""

    name = "FILE[:NAME]"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[Path, str | None]:
        """Splits file and name. A colon in the name of an existing file is no separator."""
        if isinstance(value, tuple):
            return value
        file, name = Path(value), None
        if not file.exists():
            before, colon, after = str(value).rpartition(":")
            if colon and after.isidentifier():
                file, name = Path(before), after
        if not file.exists():
            self.fail(f"there is no file {file}", param, ctx)
        if file.is_dir():
            self.fail(f"{file} is a directory", param, ctx)
        return file, name
