"""Policies as they are named on the command line: a file, a built-in policy, or built-in ones around others.

mine.py
mine.py:Policy
Quota(8M)
Quota(8M, Align(2M, mine.py:Policy))
Window(0x3000000+1M, 64M+2M, mine.py)
PingPong(limit=8, window=0.5)
"""

from __future__ import annotations

import difflib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagegate import policies
from pagegate._core import whole_number
from pagegate.errors import PolicyError
from pagegate.loading import options as _options
from pagegate.loading import policy_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pagegate._core import Builtin

_CALL = re.compile(r"([A-Za-z_]\w*)\s*\((.*)\)", re.DOTALL)
_KEYWORD = re.compile(r"([a-z_]+)\s*=\s*(.*)", re.DOTALL)
_THEN = "then"
_RANGES = "ranges"
BUILT_IN: dict[str, type[Builtin]] = {
    name: getattr(policies, name) for name in policies.__all__ if name != policies.Builtin.__name__
}
"""By the names that they have here."""


@dataclass(frozen=True)
class File:
    """A policy in a file."""

    path: Path
    name: str | None
    """Which object or class; ``None`` for the one that there is."""

    def make(self, options: Mapping[str, str]) -> object:
        """Loads it. Raises PolicyError."""
        return policy_file.load(self.path, self.name, options)

    @property
    def file(self) -> Path | None:
        """The file."""
        return self.path

    def __str__(self) -> str:
        """As it is written on the command line."""
        return f"{self.path}:{self.name}" if self.name else str(self.path)


@dataclass(frozen=True)
class Call:
    """A built-in policy."""

    kind: type[Builtin]
    arguments: dict[str, str]
    """As text, by name."""
    ranges: list[tuple[int, int]]
    then: File | Call | None
    text: str

    def make(self, options: Mapping[str, str]) -> object:
        """Makes it, and before that what it asks. Raises PolicyError, and ValueError for arguments out of range."""
        given: dict[str, object] = {}
        if self.then is not None:
            given[_THEN] = self.then.make(options)
        elif options:
            raise policy_file.Misnamed(f"{self.text} has no file that would take options ({', '.join(options)})")
        if self.ranges:
            given[_RANGES] = self.ranges
        try:
            make = _options.call(self.kind, self.arguments, given)
        except PolicyError as error:
            raise policy_file.Misnamed(str(error)) from None
        return make()

    @property
    def file(self) -> Path | None:
        """The file at the end of the chain, if there is one."""
        return None if self.then is None else self.then.file

    def __str__(self) -> str:
        """As it was written."""
        return self.text


Expression = File | Call


def parse(text: str) -> Expression:
    """Reads what names a policy. ValueError, with a sentence, for what does not."""
    text = text.strip()
    if not text:
        raise ValueError("it is empty: name a policy, as mine.py or Quota(8M)")
    # A file may have any name.
    if not Path(text).exists():
        if found := _CALL.fullmatch(text):
            return _call(found[1], _split(found[2]), text)
        if (name := text.partition("(")[0].strip()) in BUILT_IN and "(" in text:
            raise ValueError(f"the bracket that ends {name}( is missing in {text!r}")
        if text in BUILT_IN:
            return _call(text, [], text)
    return _file(text)


def _file(text: str) -> File:
    path, name = Path(text), None
    if not path.exists():
        before, colon, after = text.rpartition(":")
        if colon and after.isidentifier():
            path, name = Path(before), after
    if not path.exists():
        near = difflib.get_close_matches(text, BUILT_IN, n=1)
        meant = f"; did you mean {near[0]}?" if near else f", and no built-in policy: these are {', '.join(BUILT_IN)}"
        raise ValueError(f"there is no file {path}{meant}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory")
    return File(path, name)


def _call(name: str, written: list[str], text: str) -> Call:
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(BUILT_IN)}"
        raise ValueError(f"there is no built-in policy {name}: {meant}")
    kind = BUILT_IN[name]
    parameters = inspect.signature(kind).parameters
    positional = [each for each in parameters if each not in (_THEN, _RANGES)]
    arguments: dict[str, str] = {}
    ranges: list[tuple[int, int]] = []
    then: Expression | None = None
    for each in written:
        keyword = _KEYWORD.fullmatch(each)
        if then is not None:
            raise ValueError(f"{name}: {each!r} comes after the policy that it asks, which is the last argument")
        if keyword and keyword[1] in positional:
            key, value = keyword[1], keyword[2]
        elif _RANGES in parameters and (pair := _range(each)):
            ranges.append(pair)
            continue
        elif _is_number(each):
            key, value = next((one for one in positional if one not in arguments), ""), each
        elif _THEN in parameters:
            then = _asked(name, each)
            continue
        else:
            key, value = "", each
        if not key:
            raise ValueError(f"{name} does not take {value!r}: {_takes(name, positional)}")
        if key in arguments:
            raise ValueError(f"{name} has {key} twice")
        arguments[key] = value
    missing = [one for one in positional if one not in arguments and parameters[one].default is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"{name} needs {missing[0]}, as in {_example(name)}")
    if _RANGES in parameters and not ranges:
        raise ValueError(f"{name} needs a range of addresses, as in {_example(name)}")
    return Call(kind, arguments, ranges, then, text)


def _asked(name: str, text: str) -> Expression:
    """The policy that this one asks."""
    if text[0].isdigit() and "(" not in text and not Path(text.rpartition(":")[0] or text).exists():
        raise ValueError(f"{name}: {text} is no {_NUMBERS[name]}, as in {_example(name)}, and no file")
    return parse(text)


def _takes(name: str, positional: list[str]) -> str:
    """What it takes, where something else was given."""
    takes = ", ".join(positional)
    if _THEN not in inspect.signature(BUILT_IN[name]).parameters:
        return f"it takes {takes or 'no arguments'}"
    example = f"{_example(name)[:-1]}, mine.py)"
    return f"it takes {takes or 'ranges of addresses'}, and after that it may take a policy, as in {example}"


_NUMBERS = {
    "Align": "size",
    "PingPong": "number",
    "Quota": "size",
    "RateLimit": "number",
    "Window": "range of addresses",
}
"""What those that may take a policy take before it."""


def _example(name: str) -> str:
    return {
        "Align": "Align(2M)",
        "PingPong": "PingPong(8, 0.5)",
        "Quota": "Quota(8M)",
        "RateLimit": "RateLimit(100)",
        "Window": "Window(0x3000000+1M)",
    }[name]


def _split(text: str) -> list[str]:
    """The arguments between brackets, at the commas that are not in brackets of their own."""
    parts, depth, begin = [], 0, 0
    for at, each in enumerate(text):
        depth += {"(": 1, ")": -1}.get(each, 0)
        if depth < 0:
            raise ValueError(f"a bracket too many in {text!r}")
        if each == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    if depth:
        raise ValueError(f"a bracket is missing in {text!r}")
    parts.append(text[begin:].strip())
    if parts == [""]:
        return []
    if "" in parts:
        raise ValueError(f"an argument is missing in {text!r}")
    return parts


def _is_number(text: str) -> bool:
    try:
        whole_number(text)
    except ValueError:
        try:
            float(text)
        except ValueError:
            return False
    return True


def _range(text: str) -> tuple[int, int] | None:
    """A range of addresses, GPA+SIZE."""
    gpa, plus, size = text.partition("+")
    try:
        return (whole_number(gpa), whole_number(size)) if plus else None
    except ValueError:
        return None
