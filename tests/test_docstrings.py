"""What help() says is what the stub says."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pagegate
import pytest
from pagegate import _core

STUB = ast.parse(Path(pagegate.__file__).with_name("_core.pyi").read_text())


def documented():
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            yield node.name, ast.get_docstring(node)
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and ast.get_docstring(member):
                    yield f"{node.name}.{member.name}", ast.get_docstring(member)
        elif isinstance(node, ast.FunctionDef):
            yield node.name, ast.get_docstring(node)


@pytest.mark.parametrize(("name", "doc"), list(documented()))
def test_the_same_words(name: str, doc: str | None) -> None:
    thing = _core
    for part in name.split("."):
        thing = inspect.getattr_static(thing, part)
    if isinstance(thing, staticmethod):
        thing = thing.__func__
    assert doc, "undocumented"
    assert inspect.cleandoc(thing.__doc__ or "") == doc
