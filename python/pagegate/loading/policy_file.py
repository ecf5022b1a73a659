"""Loading a policy from a Python file."""

from __future__ import annotations

import inspect
import itertools
import linecache
import os
import stat
import sys
import traceback
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import TYPE_CHECKING

from pagegate._core import Builtin
from pagegate.errors import PolicyError
from pagegate.hooks import NAMES, Policy, refuse_misspelt
from pagegate.loading import answers, neighbours
from pagegate.loading import options as _options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

_OBJECT = "policy"
_LARGEST = 16 << 20
"""The most bytes of a file."""
_MODULE = "<module>"
"""What Python calls the code of a file that is outside functions."""
_STEPS = 4
"""How many steps of the way to a neighbour's line are told at most."""
_numbers = itertools.count()


class Misnamed(PolicyError):
    """A policy or guest that was named, or an option, is not in the file, which may itself be good."""


def load(
    path: str | os.PathLike[str],
    name: str | None = None,
    options: Mapping[str, str] | None = None,
) -> object:
    """Loads the policy in a Python file.

    With ``name`` it is the object of that name, an object of the class, or what the function returns. Without a name it
    is the object named ``policy``; else an object of the file's only class derived from ``Policy`` (base classes of
    other classes in the file are not counted); else the module itself, with hooks as functions.

    ``options`` are arguments for that class or function, as text. Each is converted to the type of its annotation, or
    else of its default.

    It can import modules beside it, and gets some of its own: another policy that imports the same file has another
    module. The file's directory is on ``sys.path``, too, while it is loaded.

    Raises PolicyError for a file that cannot be read or executed, that has no policy or several, for options that the
    policy does not take, and for hooks whose source returns what is no decision.
    """
    with _importable(path):
        module = execute(path)
        file = str(module.__file__)
        found = _chosen(module, file, name)
        policy = _policy(found, file, name, options or {})
    try:
        answers.check(policy)
    except PolicyError as error:
        raise PolicyError(f"{file}: {error}".replace(module.__name__, Path(file).stem)) from None
    return policy


def frames(stack: traceback.StackSummary) -> list[traceback.FrameSummary]:
    """The frames that are in a file that was loaded as a policy, or in a module beside one."""
    return [frame for frame in stack if frame.filename in neighbours.loaded]


class _Loader(neighbours.Loader):
    """Of the policy file itself, which may be a pipe, or a device without an end."""

    def get_data(self, path: str) -> bytes:
        """The bytes of the file."""
        with open(path, "rb") as file:  # noqa: PTH123 - as SourceFileLoader does
            data = file.read(_LARGEST + 1)
            is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        if len(data) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes, or no end")
        if not is_regular:
            # Whoever looks for its text would read it again, and what came through a pipe is gone.
            lines = data.decode(errors="replace").splitlines(keepends=True)
            linecache.cache[path] = (len(data), None, lines, path)
        return data


@contextmanager
def _importable(file: str | os.PathLike[str]) -> Iterator[None]:
    directory = str(Path(os.path.abspath(file)).parent)  # noqa: PTH100 - links not resolved
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        if directory in sys.path:
            sys.path.remove(directory)


def execute(path: str | os.PathLike[str]) -> ModuleType:
    """Executes a Python file as a module of its own, with modules beside it of its own. Raises PolicyError."""
    file = os.path.abspath(path)  # noqa: PTH100 - tracebacks have the path like this, links not resolved
    module_name = f"_pagegate_policy_{next(_numbers)}"
    if not Path(file).exists() or Path(file).is_dir():
        raise PolicyError(f"{file} is no file")
    folder = neighbours.of_module(module_name, file)
    loader = _Loader(module_name, file, folder)
    spec = spec_from_loader(module_name, loader)
    if spec is None:
        raise PolicyError(f"{file} is no Python file")
    spec.origin, spec.has_location = file, True
    module = module_from_spec(spec)
    # Dataclasses, enumerations and pickle look up the module of a class.
    sys.modules[module_name] = module
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        folder.forget()
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _refused(file, "cannot be loaded", error) from error
    return module


def _policy(found: object, file: str, name: str | None, options: Mapping[str, str]) -> object:
    """The object that was found, or what the class or function makes."""
    if inspect.isclass(found):
        return _made(found, file, options, f"has a {found.__name__} that cannot be made")
    if name in NAMES and inspect.isroutine(found):
        raise Misnamed(f"{file}: {name} is a hook and not a policy: leave the name out to have all of the file's hooks")
    if inspect.isroutine(found):
        return _made(found, file, options, f"has a {name} that makes no policy")
    if options:
        what = "a module of functions" if inspect.ismodule(found) else f"a {type(found).__name__} that is made already"
        raise Misnamed(
            f"{file}: its policy is {what} and takes no options ({', '.join(options)}): "
            "name a class or a function that makes a policy"
        )
    return found


def _made(by: Callable[..., object], file: str, options: Mapping[str, str], failing: str) -> object:
    try:
        make = _options.call(by, options)
    except PolicyError as error:
        # The annotation of a class in the file has the name of the module, which means nothing to a user.
        text = str(error).replace(f"{getattr(by, '__module__', '')}.", "")
        raise Misnamed(f"{_place(file, _line_of(by))} {text}") from None
    try:
        return make()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _refused(file, failing, error, by) from error


def _line_of(by: Callable[..., object]) -> int | None:
    try:
        return inspect.getsourcelines(by)[1]
    except (OSError, TypeError):
        return None


def _place(file: str, line: int | None) -> str:
    return f"{file}:" if line is None else f"{file}, line {line}:"


def _refused(file: str, what: str, error: BaseException, by: Callable[..., object] | None = None) -> PolicyError:
    """A PolicyError for this error, with the innermost line of the policy's files that it came from."""
    files = _by_file(error)
    text = error.msg if isinstance(error, SyntaxError) and error.filename in neighbours.loaded else str(error)
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if by is not None:
        # It is the policy's file that has what cannot be made, wherever that failed.
        own = [lines[-1].lineno for path, lines in files if path == file]
        line = own[-1] if own else _line_of(by)
        place = file if line is None else f"{file}, line {line},"
        if files and files[-1][0] != file:
            said += f" ({files[-1][0]}, line {files[-1][1][-1].lineno})"
    else:
        place = _chain(file, files)
    refusal = PolicyError(f"{place} {what}: {said}")
    for note in getattr(error, "__notes__", ()):
        refusal.add_note(note)
    return refusal


def _by_file(error: BaseException) -> list[tuple[str, list[traceback.FrameSummary]]]:
    """The frames in the policy's file and its neighbours, the innermost last; those in a row of one file together."""
    found = frames(traceback.extract_tb(error.__traceback__))
    if isinstance(error, SyntaxError) and error.filename in neighbours.loaded:
        # Such a file has no frame: nothing of it was executed.
        found.append(traceback.FrameSummary(error.filename, error.lineno, _MODULE))
    return [(path, list(each)) for path, each in itertools.groupby(found, key=lambda frame: frame.filename)]


def _chain(file: str, files: list[tuple[str, list[traceback.FrameSummary]]]) -> str:
    """The innermost line, and how it was reached from the policy's file."""
    if not files:
        return file
    path, lines = files[-1]
    how = [
        f"{'imported by' if inner[0].name == _MODULE else 'called from'} "
        f"{os.path.relpath(outer_path, Path(file).parent)}, line {outer[-1].lineno}"
        for (outer_path, outer), (_, inner) in reversed(list(itertools.pairwise(files)))
    ]
    if len(how) > _STEPS:
        # Two files that call each other without an end do so a thousand times.
        how = [*how[: _STEPS - 1], "...", how[-1]]
    told = f" ({', '.join(how)})" if how else ""
    return f"{path}, line {lines[-1].lineno}{told},"


def _classes(module: ModuleType) -> dict[str, type]:
    own = {
        id(value): value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Policy) and value.__module__ == module.__name__
    }
    return {
        kind.__name__: kind
        for kind in own.values()
        if not any(other is not kind and issubclass(other, kind) for other in own.values())
    }


def _first_line(kind: type) -> str:
    about = (kind.__doc__ or "").strip().partition("\n")[0]
    return f"  {about}" if about and not about.startswith(f"{kind.__name__}(") else ""


def _there(names: list[str]) -> str:
    if not names:
        return "there is no policy at all"
    *others, last = names
    return f"there are {', '.join(others)} and {last}" if others else f"there is {last}"


def _can_be_one(value: object) -> bool:
    if inspect.ismodule(value) or inspect.isroutine(value):
        return False
    if inspect.isclass(value):
        return value not in {Policy, Builtin} and any(hasattr(value, name) for name in NAMES)
    return isinstance(value, Builtin | Policy) or any(hasattr(value, name) for name in NAMES)


def _chosen(module: ModuleType, file: str, name: str | None) -> object:
    there = vars(module)
    if name is not None:
        if name in there:
            return there[name]
        names = [each for each, value in there.items() if _can_be_one(value)]
        raise Misnamed(f"{file} has no {name}: {_there(names)}")
    if _can_be_one(there.get(_OBJECT)):
        return there[_OBJECT]
    classes = _classes(module)
    if len(classes) > 1:
        lines = "".join(f"\n  {Path(file).name}:{each}{_first_line(kind)}" for each, kind in classes.items())
        raise Misnamed(f"{file} has several policies, name one:{lines}")
    if classes:
        return next(iter(classes.values()))
    if not any(hasattr(module, each) for each in NAMES):
        refuse_misspelt(module, file)
        raise PolicyError(
            f"{file} has no policy: no class derived from pagegate.Policy, no object named {_OBJECT}, "
            f"and no function {', '.join(NAMES)}"
        )
    return module
