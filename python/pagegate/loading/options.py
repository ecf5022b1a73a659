"""Options of a policy: text from the command line, converted to the types in the policy's signature."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import enum
import inspect
import math
import sys
import types
import typing
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pagegate._core import Builtin, whole_number
from pagegate.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NOTHING = inspect.Parameter.empty
_SETS_AND_LISTS: tuple[type, ...] = (list, set, frozenset)
_ABSTRACT = (collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
# The signatures of the built-in policies have names and no annotations.
_BUILTIN: dict[str, object] = {
    "burst": int,
    "errno": int,
    "limit": int,
    "max_shared": int,
    "per_second": float,
    "size": int,
    "window": float,
}


def call(
    made_by: Callable[..., object], options: Mapping[str, str], given: Mapping[str, object] | None = None
) -> Callable[[], object]:
    """Prepares the call that makes a policy with these options, and with what is ``given`` as it is.

    Raises PolicyError for an option that is unknown, missing, or has a value that its annotation does not allow.
    """
    name = getattr(made_by, "__name__", type(made_by).__name__)
    try:
        signature = inspect.signature(made_by)
    except (TypeError, ValueError):
        if options:
            raise PolicyError(f"{name} does not say what options it takes: derive a class with an __init__") from None
        return made_by
    own = {
        each.name: each
        for each in signature.parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    }
    others = next((each for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), None)
    for key in options:
        if key not in own and others is None:
            raise PolicyError(_unknown(key, name, list(own)))
    values = {key: _value(made_by, own.get(key, others), key, text) for key, text in options.items()} | dict(
        given or {}
    )
    for key, parameter in own.items():
        if key not in values and parameter.default is _NOTHING:
            kind = "" if parameter.annotation is _NOTHING else f" ({_written(parameter.annotation)})"
            raise PolicyError(
                f"{name} needs the option {key}{kind}: give it a value, -o {key}=VALUE, or a default in the file"
            )
    positional = [
        values.pop(key, parameter.default)
        for key, parameter in own.items()
        if parameter.kind is parameter.POSITIONAL_ONLY
    ]
    return lambda: made_by(*positional, **values)


def _unknown(key: str, name: str, known: list[str]) -> str:
    if not known:
        return f"{name} has no option {key}: it takes none"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"{name} has no option {key}: did you mean {near[0]}?"
    return f"{name} has no option {key}: it takes {', '.join(known)}"


def _written(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation).replace("pathlib.", "")


def _value(made_by: Callable[..., object], parameter: inspect.Parameter | None, key: str, text: str) -> Any:
    if parameter is None:
        return text
    annotation = _kind(made_by, parameter, key)
    try:
        return _converted(annotation, text)
    except _Unwritable as error:
        raise PolicyError(f"option {key} ({_written(annotation)}) cannot be given as text: {error}") from None
    except ValueError as error:
        raise PolicyError(f"option {key} ({_written(annotation)}) cannot be {text!r}: {error}") from None


def _kind(made_by: Callable[..., object], parameter: inspect.Parameter, key: str) -> Any:
    """The type of the value: its annotation, else the type of its default, else str."""
    annotation = parameter.annotation
    if annotation is not _NOTHING:
        annotation = _resolved(made_by, annotation, key)
    elif inspect.isclass(made_by) and issubclass(made_by, Builtin):
        annotation = _BUILTIN.get(key, Builtin)
    if annotation not in (_NOTHING, Any, object):
        return annotation
    default = parameter.default
    if default is _NOTHING or default is None:
        return str
    if isinstance(default, list | tuple) and default:
        return list[type(default[0])] if isinstance(default, list) else tuple[type(default[0]), ...]  # type: ignore[misc]
    return type(default)


def _resolved(made_by: Callable[..., object], annotation: object, key: str) -> Any:
    """The annotation, evaluated if it is a string."""
    if isinstance(annotation, dataclasses.InitVar):
        annotation = annotation.type

    def holder() -> None: ...

    holder.__annotations__ = {key: annotation}
    there: dict[str, Any] = {}
    owners = reversed(inspect.getmro(made_by)) if inspect.isclass(made_by) else (made_by,)
    for owner in owners:
        module = sys.modules.get(getattr(owner, "__module__", None) or "")
        there |= vars(module) if module is not None else {}
    try:
        found = typing.get_type_hints(holder, globalns=there)[key]
    except Exception as error:  # noqa: BLE001 - evaluating an annotation may raise anything
        raise PolicyError(
            f"option {key} has the annotation {_written(annotation)}, which cannot be resolved ({error}): "
            "import its names where the file runs, not under TYPE_CHECKING"
        ) from None
    return found.type if isinstance(found, dataclasses.InitVar) else found


class _Unwritable(Exception):
    """A value of this type cannot be given as text."""


def _converted(kind: Any, text: str) -> Any:  # noqa: PLR0911 - one line for each type
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(kind), text)
    if origin is typing.Literal:
        return _picked({str(value): value for value in typing.get_args(kind)}, text)
    if origin is typing.Final or hasattr(kind, "__supertype__") or hasattr(kind, "__value__"):
        inner = getattr(kind, "__supertype__", None) or getattr(kind, "__value__", None)
        return _converted(inner or typing.get_args(kind)[0], text)
    plain = origin or kind
    if plain is tuple or plain in _SETS_AND_LISTS or plain in _ABSTRACT:
        return _several(plain, typing.get_args(kind), text)
    if kind in (None, type(None)):
        return _picked({"none": None}, text.lower())
    if kind is bool:
        return _picked(_BOOLEANS, text.lower())
    if not inspect.isclass(kind):
        raise _Unwritable("make it in the file")
    if issubclass(kind, enum.Enum):
        members = {**{str(each.value): each for each in kind}, **kind.__members__}
        return members[text] if text in members else _picked(dict(kind.__members__), text)
    if issubclass(kind, PurePath):
        return Path(text)
    if kind in (str, Any, object):
        return text
    if kind is int:
        return whole_number(text)
    if kind is float:
        return _real(text)
    raise _Unwritable("make it in the file")


def _real(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ValueError("it is no number, such as 0.5 or 1e6")
    return number


def _picked(choices: Mapping[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(f"it is one of {', '.join(choices)}")
    return choices[text]


def _one_of(kinds: tuple[Any, ...], text: str) -> Any:
    """Converts to the first type of a union that takes the text; those that take any text are tried last."""
    refusals: list[Exception] = []
    for kind in sorted(kinds, key=lambda each: (each is str, inspect.isclass(each) and issubclass(each, PurePath))):
        try:
            return _converted(kind, text)
        except (ValueError, _Unwritable) as error:
            refusals.append(error)
    if all(isinstance(each, _Unwritable) for each in refusals):
        raise refusals[0]
    raise ValueError(", or ".join(dict.fromkeys(str(each) for each in refusals if isinstance(each, ValueError))))


def _several(kind: Any, inner: tuple[Any, ...], text: str) -> Any:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if kind is tuple and inner and inner[-1] is not ...:
        if len(parts) != len(inner):
            raise ValueError(f"it is {len(inner)} values with commas between")
        return tuple(_converted(each, part) for each, part in zip(inner, parts, strict=True))
    values = [_converted(inner[0] if inner else str, part) for part in parts]
    return kind(values) if kind in _SETS_AND_LISTS else tuple(values)
