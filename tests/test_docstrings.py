"""The stub and the binding have the same docstrings, word for word.

They are written in the Rust sources. After a change there, ``python tests/test_docstrings.py`` prints what has to be
changed in the stub (in an environment with the extension built).
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pagegate
import pytest
from pagegate import _core

STUB = ast.parse(Path(pagegate.__file__).with_name("_core.pyi").read_text())
# Docstrings that classes have from Python itself.
INHERITED = {name: getattr(object, name).__doc__ for name in dir(object)} | {"__weakref__": None}
CONSTANTS = {"DOORBELL_PORT", "__version__", "LIVELOCK_BOUND"}


def in_stub() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = ast.get_docstring(node)
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = ast.get_docstring(member)
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_docstring(node)
    return found


def text(thing: Any) -> str | None:
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    doc = getattr(thing, "__doc__", None)
    return inspect.cleandoc(doc) if doc else None


def at_runtime() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, thing in vars(_core).items():
        if name.startswith("__") or name in CONSTANTS:
            continue
        found[name] = text(thing)
        if not isinstance(thing, type):
            continue
        for member, value in vars(thing).items():
            dunder = member.startswith("__")
            # Python gives special methods like __repr__ a docstring of its own.
            if member not in ("__doc__", "__module__") and not (dunder and not callable(value)):
                found[f"{name}.{member}"] = None if dunder else text(value)
    return found


STUBBED, RUNNING = in_stub(), at_runtime()


def differences() -> dict[str, tuple[str | None, str | None]]:
    names = {**RUNNING, **STUBBED}
    pairs = {name: (STUBBED.get(name), RUNNING.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and not name.endswith("__")}


@pytest.mark.parametrize("name", sorted({**RUNNING, **STUBBED}))
def test_stub_and_binding_have_the_same_docstring(name: str) -> None:
    if name.rsplit(".", maxsplit=1)[-1].startswith("__"):
        # Special methods are explained in the docstring of their class.
        assert STUBBED.get(name) is None
        return
    assert STUBBED.get(name) == RUNNING.get(name)


def test_every_class_and_function_has_a_docstring() -> None:
    bare = [name for name, doc in RUNNING.items() if "." not in name and not doc]
    assert bare == []


if __name__ == "__main__":
    for name, (stub, binding) in differences().items():
        print(f"{name}\n  stub:    {stub!r}\n  binding: {binding!r}")
