"""Checking the source of hooks for return values that are no decision, so that they are errors before the guest starts.

Only what is certainly wrong is refused. What a hook returns from a variable or a call is checked when it returns it.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import inspect
import textwrap
import types
from typing import TYPE_CHECKING

from pagegate._core import Builtin, Convert, Deny, Discard, Retry, Stop
from pagegate.errors import PolicyError
from pagegate.hooks import NAMES, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

_DECISIONS = {kind.__name__: kind for kind in (Convert, Deny, Discard, Retry, Stop)}
_MEANT = {"true": "Convert", "allow": "Convert", "ok": "Convert", "false": "Deny", "refuse": "Deny"}
"""Decisions to suggest for what people write instead. For other words the most similar name is suggested."""
_VALUES = (ast.Constant, ast.JoinedStr, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Compare, ast.ListComp, ast.Lambda)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)


def check(policy: object) -> None:
    """Checks the hooks of a policy, or of the Python policy at the end of a chain of built-in ones.

    PolicyError for a hook that returns what is no decision, or that never returns a value.
    """
    hooks = policy.hooks if isinstance(policy, Builtin) else resolve(policy)
    for name, hook in zip(NAMES, hooks, strict=True):
        function = getattr(hook, "__func__", hook)
        if isinstance(function, types.FunctionType):
            _check(name, function)


def _check(name: str, function: types.FunctionType) -> None:
    node = _text(function)
    if node is None:
        return
    if any(isinstance(each, ast.Yield | ast.YieldFrom) for each in _own(node)):
        raise PolicyError(f"{name} yields: a hook returns its answer")
    returns = [each for each in _own(node) if isinstance(each, ast.Return)]
    for each in returns:
        for value in _branches(each.value):
            if (wrong := _wrong(value, function)) is not None:
                line = function.__code__.co_firstlineno - 1 + each.lineno
                raise PolicyError(f"line {line}: {name} returns {wrong}")
    if not returns and not any(isinstance(each, ast.Raise) for each in _own(node)):
        # The last statement may call a function that always raises.
        last = node.body[-1]
        if not isinstance(last, ast.Expr) or isinstance(last.value, ast.Constant):
            line = function.__code__.co_firstlineno - 1 + node.lineno
            raise PolicyError(f"line {line}: {name} returns nothing, which is no decision: {_CHOICE}")


_CHOICE = "return Convert(), Deny(), Retry() or Stop(reason)"


def _text(function: types.FunctionType) -> ast.FunctionDef | None:
    """The function's definition; ``None`` for a lambda, and for a function that is in no file."""
    try:
        lines, _ = inspect.getsourcelines(function.__code__)
        (node,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, SyntaxError, TypeError, ValueError):
        return None
    return node if isinstance(node, ast.FunctionDef) and node.name == function.__code__.co_name else None


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions and classes defined in it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, _SCOPES):
            yield from _own(child)


def _branches(value: ast.expr | None) -> Iterator[ast.expr | None]:
    if isinstance(value, ast.IfExp):
        yield from _branches(value.body)
        yield from _branches(value.orelse)
    else:
        yield value


def _wrong(value: ast.expr | None, function: types.FunctionType) -> str | None:
    """What is wrong with a returned value; ``None`` if it may be a decision."""
    if value is None:
        return f"nothing, which is no decision: {_CHOICE}"
    if isinstance(value, _VALUES):
        text = ast.unparse(value)
        word = str(value.value) if isinstance(value, ast.Constant) else ""
        near = _near(word)
        return f"{text}, which is no decision: {f'did you mean {near}()?' if near else _CHOICE}"
    called = value.func if isinstance(value, ast.Call) else value
    if not isinstance(called, ast.Name) or not _is_global(called.id, function):
        return None
    there = function.__globals__.get(called.id)
    if called is value and isinstance(there, type) and there in _DECISIONS.values():
        return f"the class {called.id}, which is no decision: did you mean {called.id}()?"
    defined = called.id in function.__globals__ or hasattr(builtins, called.id)
    if not defined and (near := _near(called.id)):
        return f"{called.id}, which is not defined: did you mean {near}()?"
    return None


def _is_global(name: str, function: types.FunctionType) -> bool:
    code = function.__code__
    return name not in (*code.co_varnames, *code.co_freevars, *code.co_cellvars)


def _near(word: str) -> str | None:
    word = word.lower()
    if word in _MEANT:
        return _MEANT[word]
    lower = {name.lower(): name for name in _DECISIONS}
    near = difflib.get_close_matches(word, lower, n=1, cutoff=0.6)
    return lower[near[0]] if near else None
