"""Guests from Python files, for `pagegate run --guest FILE.py[:NAME]`: a ``Script``, several, or a function."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagegate.bundled import Guest
from pagegate.errors import PagegateError
from pagegate.guests import Script
from pagegate.loading import policy_file

if TYPE_CHECKING:
    from pagegate.guests import Call

_NAMES = ("vcpu", "shared", "call")
_FORM = (
    "a Script, a list with one for each vCPU, or a function that returns a vCPU's Script and takes some of "
    f"{', '.join(_NAMES)}"
)


def load(text: str) -> Guest | None:
    """The guest that FILE.py or FILE.py:NAME has; ``None`` for what names no Python file.

    Raises PagegateError, and PolicyError for a file that cannot be executed.
    """
    file, colon, name = text.rpartition(":")
    if not (colon and name.isidentifier()):
        file, name = text, ""
    if not file.endswith(".py"):
        return None
    module = policy_file.execute(file)
    found = _chosen(vars(module), module.__name__, file, name)
    if isinstance(found, Script):
        return Guest(f"the script of {file}", lambda _vcpu, _shared, _call: found, one_vcpu=True)
    if isinstance(found, list | tuple) and found and all(isinstance(each, Script) for each in found):
        return Guest(f"the scripts of {file}", _one_each(list(found), file))
    if inspect.isroutine(found):
        return Guest(f"{found.__name__}() of {file}", _made_by(found, file))
    raise PagegateError(f"{file}: {name or 'script'} is {found!r}: a guest is {_FORM}")


def _chosen(there: dict[str, Any], module: str, file: str, name: str) -> Any:
    if name:
        if name not in there:
            raise policy_file.Misnamed(f"{file} has no {name}")
        return there[name]
    if "script" in there:
        return there["script"]
    scripts = {each: value for each, value in there.items() if isinstance(value, Script)}
    if len(scripts) == 1:
        return next(iter(scripts.values()))
    if scripts:
        lines = "".join(f"\n  {Path(file).name}:{each}" for each in scripts)
        raise policy_file.Misnamed(f"{file} has several guests, name one:{lines}")
    made_here = [each for each, value in there.items() if getattr(value, "__module__", None) == module]
    also = f"; it has {', '.join(made_here)}" if made_here else ""
    raise PagegateError(f"{file} has no guest, which is {_FORM}, named script{also}")


def _one_each(scripts: list[Script], file: str) -> Any:
    def script(vcpu: int, shared: int, call: Call) -> Script:  # noqa: ARG001 - they are made already
        if vcpu >= len(scripts):
            raise PagegateError(f"{file} has scripts for {len(scripts)} vCPUs: --vcpus {len(scripts)} is the most")
        return scripts[vcpu]

    return script


def _made_by(function: Any, file: str) -> Any:
    wanted = [each.name for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    if unknown := [each for each in wanted if each not in _NAMES]:
        raise PagegateError(f"{file}: {function.__name__}() wants {unknown[0]}, and is given {', '.join(_NAMES)}")
    takes = [each for each in inspect.signature(function).parameters if each in _NAMES]

    def script(vcpu: int, shared: int, call: Call) -> Script:
        given = {"vcpu": vcpu, "shared": shared, "call": call}
        made = function(**{each: given[each] for each in takes})
        if not isinstance(made, Script):
            raise PagegateError(f"{file}: {function.__name__}() returned {made!r}: a vCPU's guest is a Script")
        return made

    return script
