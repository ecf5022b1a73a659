"""The argument that names a policy on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pagegate.errors import PolicyError
from pagegate.loading.expression import BUILT_IN, Call, Expression, File, parse
from pagegate.loading.policy_file import Misnamed

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Mapping

_LARGEST = 1 << 20
"""Bytes of a file that completion looks at for the names of policies."""
_ARGUMENT = re.compile(r"[(,]\s*")
"""What is before an argument of a built-in policy."""


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
        """Files, the classes in a file, and the built-in policies, also as the last argument of a built-in one."""
        for word in dict.fromkeys((incomplete, _ARGUMENT.split(incomplete)[-1])):
            before = incomplete.removesuffix(word)
            file, colon, begun = word.partition(":")
            if colon and Path(file).is_file():
                found = [f"{file}:{name}" for name in _classes(Path(file)) if name.startswith(begun)]
                return [CompletionItem(f"{before}{each}") for each in found]
            found = [each for each in BUILT_IN if each.startswith(word)]
            # A shell that is given words looks for no files of its own, and none inside a word.
            if found or before:
                found += _files(word)
            if found:
                return [CompletionItem(f"{before}{each}") for each in found]
        return [CompletionItem(incomplete, type="file")]


def _files(begun: str) -> list[str]:
    """The Python files and the folders whose paths begin like this."""
    folder = begun[: begun.rfind("/") + 1]
    try:
        there = sorted(Path(folder or ".").iterdir())
    except OSError:
        return []
    shown = [each for each in there if not each.name.startswith((".", "__pycache__"))]
    names = [f"{folder}{each.name}/" if each.is_dir() else f"{folder}{each.name}" for each in shown]
    return [each for each in names if each.startswith(begun) and each.endswith(("/", ".py"))]


def _classes(file: Path) -> list[str]:
    """The names of the classes in a file."""
    import ast  # noqa: PLC0415 - only when a shell asks

    return [each.name for each in statements(file) if isinstance(each, ast.ClassDef)]


def statements(file: Path) -> list[ast.stmt]:
    """The statements of a Python file outside functions and classes, for completion, which does not execute it."""
    import ast  # noqa: PLC0415 - only when a shell asks

    try:
        with file.open("rb") as opened:
            return ast.parse(opened.read(_LARGEST)).body
    except (OSError, SyntaxError, ValueError):
        return []


def made(policy: Expression | None, options: Mapping[str, str]) -> object | None:
    """The policy that was named; ``None`` for none, which converts as asked."""
    if policy is None:
        if options:
            raise click.UsageError("-o is for a policy: name one with -p")
        return None
    try:
        return policy.make(options)
    except Misnamed as error:
        raise _Misnamed(str(error)) from None
    except ValueError as error:
        raise click.UsageError(f"{policy}: {error}") from None


class _Misnamed(click.UsageError, PolicyError):
    """Ends a command with the status of a usage error. For --watch, which goes on, it is a policy's error."""


def one(ctx: click.Context, param: click.Parameter, given: tuple[Expression, ...]) -> Expression | None:
    """The policy that was given, if any. Without this, click would take the last of several and say nothing."""
    if len(given) > 1:
        raise click.BadParameter(
            f"one policy judges, and {len(given)} are given: put a built-in one around another, as in "
            "-p 'Quota(8M, mine.py)'",
            ctx,
            param,
        )
    return given[0] if given else None


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
        multiple=True,
        callback=one,
        help="FILE[:NAME], or a built-in policy, or one around another: Quota(8M, Align(2M, mine.py:Policy)). "
        f"Default: {default}.",
    )
