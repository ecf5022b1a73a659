"""Looking up a policy's hooks and checking them, once, when the policy is put in place."""

from __future__ import annotations

import difflib
import errno
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pagegate._core import (
    Change,
    Convert,
    Deny,
    DeviceAccess,
    Discard,
    MapGpaRange,
    MemoryFault,
    MemoryPoison,
    Retry,
    Stop,
)
from pagegate.errors import PolicyError

if TYPE_CHECKING:
    from pagegate._core import Report, Vm

PAGE = 4096
NAMES = ("memory_fault", "map_gpa_range", "memory_poison", "device_access")
LIFECYCLE = ("configure", "running", "done")
_FILTERED = NAMES[:2]
_CONDITIONS = "_pagegate_only"
_END = 1 << 64
"""Addresses and sizes are below it."""
_LISTENER_NAMES = ("prepare", "committed", "aborted")

Decision = Convert | Deny | Discard | Retry | Stop
"""What a hook may return."""

Hook = Callable[[Any], Any]
_Hook = TypeVar("_Hook", bound=Callable[..., Any])
_Conditions = tuple[bool | None, list[tuple[int, int]], int, int | None, list[int]]


def described(owner: object, what: str) -> str:
    """The repr of an object whose class has none of its own, with the file's name if it was loaded from one."""
    kind = type(owner)
    module = kind.__module__
    if module.startswith("_pagegate_policy_"):
        module = inspect.getmodulename(getattr(sys.modules.get(module), "__file__", None) or "") or module
    return f"<{module}.{kind.__qualname__} {what}>"


class Policy:
    """The base class for policies. Override any hook; requests whose hook is not overridden never enter Python.

    A policy need not derive from this: any object with some of these methods is one, and so is a module with some of
    these functions. Hooks are called on vCPU threads, several at a time. An exception ends the run, and so does an
    answer that is no decision.
    """

    def __repr__(self) -> str:
        """The name of its class."""
        return described(self, "policy")

    def memory_fault(self, fault: MemoryFault) -> Decision:
        """Judges an implicit request: an access to a page in the other state. Default: convert as asked."""
        return Convert()

    def map_gpa_range(self, call: MapGpaRange) -> Decision:
        """Judges an explicit request: a well-formed KVM_HC_MAP_GPA_RANGE. Default: convert as asked."""
        return Convert()

    def memory_poison(self, poison: MemoryPoison) -> Decision:
        """Judges an access to a poisoned page (EHWPOISON); not with ``Convert``. Default: ``Stop("poison")``."""
        return Stop("poison")

    def device_access(self, access: DeviceAccess) -> Decision:
        """Judges a device's access to a page that is not shared, which is not carried out in any case.

        Called on a thread of the device; a disk, which carries out several requests at a time, has several. ``Deny``
        fails the device's request, whatever the errno; ``Stop`` ends the run, too. Default: ``Deny(EACCES)``.
        """
        return Deny(errno.EACCES)

    def configure(self, vm: Vm) -> None:
        """Is told of a machine that it is to judge: once, when the first run begins, before a request can come.

        Here a policy may look at the machine's size, and set handlers and listeners. Called by the thread that calls
        ``Vm.run``, as the other two are, or ``vm.policy.replace``. What it raises is raised there, and nothing runs.
        The run is in progress already: ``vm.stop()`` ends it, its timeout counts, ``run`` and ``close`` are refused.
        """

    def running(self, vm: Vm) -> None:
        """Is told that a run begins. What it raises is raised by ``Vm.run``, and nothing runs."""

    def done(self, report: Report) -> None:
        """Is told that a run is over, also one that raises: its reason is "livelock", "interrupted" or "failed" then.

        It is "interrupted" after Ctrl-C, and whatever else a signal's handler raised.

        The policy that is in place then is told, of each run that one's ``running`` was called for, unless that raised.
        """


class Listener:
    """The base class for listeners. Any object with some of these methods is one.

    A listener is told of every conversion, the guest's and the host's, on the thread that converts and while the pages
    are locked: its methods must not convert, read or write guest memory. When it is added, ``committed`` is called with
    ``initial`` set for the present states.

    An exception in a method ends the run. ``committed`` is then called with ``initial`` set for the state that those
    pages are in: at once, and if that fails too, at the beginning of the next run, which does not begin until it
    succeeds. So it must do no harm to be told twice.
    """

    def __repr__(self) -> str:
        """The name of its class."""
        return described(self, "listener")

    def prepare(self, change: Change) -> bool | None:
        """Pages are about to become private, and nothing has changed yet: stop using them.

        Return ``False`` to refuse: nothing is converted, and the guest tries again (an explicit request gets EAGAIN).
        """

    def committed(self, change: Change) -> None:
        """Pages were converted. Those that became shared can be used from now on."""

    def aborted(self, change: Change) -> None:
        """Pages that ``prepare`` was called for are not converted after all."""


def only(
    *,
    to: Literal["private", "shared"] | None = None,
    gpa: range | Sequence[range] | None = None,
    least: int = PAGE,
    most: int | None = None,
    vcpu: int | Collection[int] | None = None,
) -> Callable[[_Hook], _Hook]:
    """Makes a hook one that is asked only about some requests; the others are converted as asked, without Python.

    For ``memory_fault`` and ``map_gpa_range``: the core itself looks whether a request meets all the conditions. One
    that does not is not answered by a remembered decision (``remember=``) either.

    ``to``: the state that is asked for. ``gpa``: some of its pages lie in this range of addresses, or in one of these;
    the ends are multiples of 4096. ``least`` and ``most``: its size in bytes. ``vcpu``: it is of this vCPU, or of one
    of these. Raises TypeError and ValueError for conditions that make no sense.

        class KeepTheKernelPrivate(Policy):
            @only(to="shared", gpa=range(0, 0x100_0000))
            def map_gpa_range(self, call):
                return Deny()
    """
    if to not in (None, "private", "shared"):
        raise ValueError(f'to is {to!r}: it must be "private" or "shared"')
    if isinstance(gpa, int):
        raise TypeError(f"gpa is {gpa:#x}: it must be a range of addresses, such as range({gpa:#x}, {gpa + PAGE:#x})")
    for name, several in (("gpa", gpa), ("vcpu", vcpu)):
        if isinstance(several, Sequence | Collection) and not isinstance(several, range) and not several:
            raise ValueError(f"{name} is empty, which no request meets")
    ranges = [gpa] if isinstance(gpa, range) else list(gpa or ())
    for each in ranges:
        if not isinstance(each, range):
            raise TypeError(f"gpa has {each!r}: it must be a range of addresses, such as range(0, 0x100_0000)")
        if each.step != 1 or not 0 <= each.start < each.stop <= _END or each.start % PAGE or each.stop % PAGE:
            raise ValueError(
                f"gpa has {each!r}: its ends must be multiples of {PAGE}, the first lower, the other at most 2**64"
            )
    vcpus = [vcpu] if isinstance(vcpu, int) else list(vcpu or ())
    for name, value, end in (
        ("least", least, _END),
        ("most", most, _END),
        *(("vcpu", each, 1 << 32) for each in vcpus),
    ):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} is {value!r}: it must be an int")
        if value is not None and not 0 <= value < end:
            raise ValueError(f"{name} is {value}: it must be between 0 and {end - 1}")
    if most is not None and most < max(least, PAGE):
        raise ValueError(f"most is {most} and least {least}: no request is so small")
    conditions = (
        None if to is None else to == "private",
        [(each.start, len(each)) for each in ranges],
        least,
        most,
        vcpus,
    )

    def marked(hook: _Hook) -> _Hook:
        setattr(hook, _CONDITIONS, conditions)
        return hook

    return marked


def resolve(policy: object) -> list[Hook | None]:
    """The policy's hooks in the order of ``NAMES``, ``None`` for each that is left to the default.

    Raises PolicyError for a class in place of an object, an object without any hook, a name that is nearly a hook's,
    and a hook that cannot be called with one argument.
    """
    return _resolve(policy, NAMES, Policy)


def resolve_all(policy: object) -> tuple[list[Hook | None], list[Hook | None], list[_Conditions | None]]:
    """What ``resolve`` returns, the hooks of ``LIFECYCLE`` likewise, and what ``only`` says of the first two."""
    judging, what = resolve(policy), _what(policy)
    # What is no function is a policy's own data, which may have such a name, and so may what a module imports.
    around = [callable(getattr(policy, name, None)) for name in LIFECYCLE]
    if isinstance(policy, ModuleType):
        own = _own_functions(policy)
        around = [there and name in own for there, name in zip(around, LIFECYCLE, strict=True)]
    lifecycle = [
        _hook(policy, name, Policy, what) if there else None for name, there in zip(LIFECYCLE, around, strict=True)
    ]
    for name, hook in zip(NAMES, judging, strict=True):
        if name not in _FILTERED and _conditions(hook):
            raise PolicyError(f"{name} of {what} has @only(), which is for {' and '.join(_FILTERED)}")
    return judging, lifecycle, [_conditions(hook) for hook in judging[: len(_FILTERED)]]


def _conditions(hook: Hook | None) -> _Conditions | None:
    function = getattr(hook, "__func__", hook)
    # Not getattr: a hook may be an object that has any attribute.
    found = getattr(function, "__dict__", {}).get(_CONDITIONS)
    return found if isinstance(found, tuple) else None


def resolve_listener(listener: object) -> list[Hook | None]:
    """The listener's methods: prepare, committed, aborted. Raises PolicyError as ``resolve`` does."""
    return _resolve(listener, _LISTENER_NAMES, Listener)


def _what(owner: object) -> str:
    if isinstance(owner, ModuleType):
        return f"module {owner.__name__}"
    if isinstance(owner, str | bytes | int | float):
        return f"{owner!r}"
    kind = type(owner).__name__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def _resolve(owner: object, names: tuple[str, ...], base: type) -> list[Hook | None]:
    kind = base.__name__.lower()
    if inspect.isclass(owner):
        raise PolicyError(f"{owner.__name__} is a class: pass an object, {owner.__name__}(...)")
    what = _what(owner)
    refuse_misspelt(owner, what, names)
    hooks = [_hook(owner, name, base, what) for name in names]
    if not any(hooks) and not isinstance(owner, base):
        raise PolicyError(
            f"{what} is no {kind}: it has none of the hooks {', '.join(names)}; "
            f"pass an object that has some of them, such as one of a class derived from pagegate.{base.__name__}"
        )
    return hooks


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
