"""Looking up a policy's hooks and checking them, once, when the policy is put in place."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pagegate._core import Change, Convert, Deny, Discard, MapGpaRange, MemoryFault, MemoryPoison, Retry, Stop
from pagegate.errors import PolicyError

NAMES = ("memory_fault", "map_gpa_range", "memory_poison")
_LISTENER_NAMES = ("prepare", "committed", "aborted")

Decision = Convert | Deny | Discard | Retry | Stop
"""What a hook may return."""

Hook = Callable[[Any], Any]


class Policy:
    """The base class for policies. Override any hook; requests whose hook is not overridden never enter Python.

    A policy need not derive from this: any object with some of these methods is one, and so is a module with some of
    these functions. Hooks are called on vCPU threads, several at a time. An exception ends the run, and so does an
    answer that is no decision.
    """

    def memory_fault(self, fault: MemoryFault) -> Decision:
        """Judges an implicit request: an access to a page in the other state. Default: convert as asked."""
        return Convert()

    def map_gpa_range(self, call: MapGpaRange) -> Decision:
        """Judges an explicit request: a well-formed KVM_HC_MAP_GPA_RANGE. Default: convert as asked."""
        return Convert()

    def memory_poison(self, poison: MemoryPoison) -> Decision:
        """Judges an access to a poisoned page (EHWPOISON); not with ``Convert``. Default: ``Stop("poison")``."""
        return Stop("poison")


class Listener:
    """The base class for listeners. Any object with some of these methods is one.

    A listener is told of every conversion, the guest's and the host's, on the thread that converts and while the pages
    are locked: its methods must not convert, read or write guest memory. When it is added, ``committed`` is called with
    ``initial`` set for the present states. An exception in a method ends the run.
    """

    def prepare(self, change: Change) -> bool | None:
        """Pages are about to become private, and nothing has changed yet: stop using them.

        Return ``False`` to refuse: nothing is converted, and the guest tries again (an explicit request gets EAGAIN).
        """

    def committed(self, change: Change) -> None:
        """Pages were converted. Those that became shared can be used from now on."""

    def aborted(self, change: Change) -> None:
        """Pages that ``prepare`` was called for are not converted after all."""


def resolve(policy: object) -> tuple[Hook | None, Hook | None, Hook | None]:
    """The policy's hooks in the order of ``NAMES``, ``None`` for each that is left to the default.

    Raises PolicyError for a class in place of an object, an object without any hook, a name that is nearly a hook's,
    and a hook that cannot be called with one argument.
    """
    return _resolve(policy, NAMES, Policy)


def resolve_listener(listener: object) -> tuple[Hook | None, Hook | None, Hook | None]:
    """The listener's methods: prepare, committed, aborted. Raises PolicyError as ``resolve`` does."""
    return _resolve(listener, _LISTENER_NAMES, Listener)


def _resolve(owner: object, names: tuple[str, str, str], base: type) -> tuple[Hook | None, Hook | None, Hook | None]:
    kind = base.__name__.lower()
    if inspect.isclass(owner):
        raise PolicyError(f"{owner.__name__} is a class: pass an object, {owner.__name__}(...)")
    what = f"module {owner.__name__}" if isinstance(owner, ModuleType) else f"a {type(owner).__name__}"
    refuse_misspelt(owner, what, names)
    hooks = [_hook(owner, name, base, what) for name in names]
    if not any(hooks) and not isinstance(owner, base):
        raise PolicyError(f"{what} is no {kind}: it has none of the hooks {', '.join(names)}")
    first, second, third = hooks
    return first, second, third


def refuse_misspelt(owner: object, what: str, names: tuple[str, ...] = NAMES) -> None:
    """PolicyError for a function whose name is nearly a hook's."""
    for name in _own_functions(owner):
        if name in names or name.startswith("_"):
            continue
        if near := difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.8):
            raise PolicyError(f"{what} has {name}(), which is no hook: did you mean {near[0]}()?")


def _own_functions(owner: object) -> list[str]:
    """Names of the functions that may be misspelt hooks; not of those that a module imports."""
    if isinstance(owner, ModuleType):
        defined = inspect.getmembers(owner, inspect.isroutine)
        return [name for name, value in defined if getattr(value, "__module__", None) == owner.__name__]
    static = {name: inspect.getattr_static(owner, name, None) for name in dir(owner)}
    return [name for name, value in static.items() if callable(value) or isinstance(value, staticmethod | classmethod)]


def _hook(owner: object, name: str, base: type, what: str) -> Hook | None:
    hook = getattr(owner, name, None)
    if hook is None or getattr(hook, "__func__", None) is getattr(base, name):
        return None
    if not callable(hook):
        raise PolicyError(f"{name} of {what} is not callable")
    if inspect.iscoroutinefunction(hook):
        raise PolicyError(f"{name} of {what} is async: a hook answers at once")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some builtins have no signature: the first call tells
        return hook  # type: ignore[no-any-return]
    try:
        signature.bind(None)
    except TypeError:
        raise PolicyError(f"{name}{signature} of {what} must take exactly one argument") from None
    return hook  # type: ignore[no-any-return]
