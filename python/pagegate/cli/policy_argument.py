"""The argument that names a policy on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pagegate.loading.expression import BUILT_IN, Call, Expression, File, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LARGEST = 1 << 20
"""Bytes of a file that completion looks at for the names of policies."""


class PolicyName(click.ParamType[Expression]):
    """A file, a built-in policy, or built-in ones around others."""

    name = "POLICY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Expression:
        """Reads it."""
        if isinstance(value, File | Call):
            return value
        try:
            return parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG002
        """Files, the classes in a file, and the built-in policies."""
        file, colon, begun = incomplete.partition(":")
        if colon and Path(file).is_file():
            return [CompletionItem(f"{file}:{name}") for name in _classes(Path(file)) if name.startswith(begun)]
        built_in = [CompletionItem(each) for each in BUILT_IN if incomplete and each.startswith(incomplete)]
        return built_in or [CompletionItem(incomplete, type="file")]


def _classes(file: Path) -> list[str]:
    """The names of the classes in a file, which is not executed for that."""
    import ast  # noqa: PLC0415 - only when a shell asks

    try:
        with file.open("rb") as opened:
            tree = ast.parse(opened.read(_LARGEST))
    except (OSError, SyntaxError, ValueError):
        return []
    return [each.name for each in tree.body if isinstance(each, ast.ClassDef)]


def made(policy: Expression | None, options: Mapping[str, str]) -> object | None:
    """The policy that was named; ``None`` for none, which converts as asked."""
    if policy is None:
        if options:
            raise click.UsageError("-o is for a policy: name one with -p")
        return None
    try:
        return policy.make(options)
    except ValueError as error:
        raise click.UsageError(f"{policy}: {error}") from None


def written(policy: Expression | None) -> str:
    """What was named, as it is written on the command line."""
    return "allow" if policy is None else str(policy)


def policy_option(default: str = "everything is allowed") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option that names a policy, with what judges where it is not given."""
    return click.option(
        "-p",
        "--policy",
        "policy",
        type=PolicyName(),
        help="FILE[:NAME], or a built-in policy, or one around another: Quota(8M, Align(2M, mine.py:Policy)). "
        f"Default: {default}.",
    )
