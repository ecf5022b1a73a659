"""The modules beside a policy file: each policy has its own, and they are known, so that a change of one is seen.

They are loaded as modules of a package that stands for the policy's folder, under a name that no other policy has. An
``import`` in the policy or in one of them finds them there first, as Python does for what is beside a program.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pagegate._core import Builtin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import CodeType

_NEVER = sys.stdlib_module_names | {"pagegate"}
"""What is not taken from the folder, whatever lies there: it would break what others share."""


loaded: set[str] = set()
"""The files of all policies and their neighbours."""


class Loader(SourceFileLoader):
    """Compiles a file each time, as Python does with a main program, and has its imports look beside it first.

    A cached one would be taken as fresh for a file that was changed within the same second and kept its size.
    """

    def __init__(self, fullname: str, path: str, folder: Folder) -> None:
        """``folder``: where its imports look first."""
        super().__init__(fullname, path)
        self._folder = folder

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002, D102 - as importlib has it
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        """Executes it. ``__builtins__`` of a module is where its ``import`` statements find ``__import__``."""
        loaded.add(self.path)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._folder.importer}
        super().exec_module(module)


class Folder:
    """The folder of one policy, as the package of its neighbours."""

    def __init__(self, path: Path, package: str) -> None:
        """``package``: a name that no other module has."""
        self._path = path
        self._package = package

    @property
    def files(self) -> list[Path]:
        """The files of the neighbours that were imported."""
        modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{self._package}.")]
        return [Path(file) for module in modules if (file := getattr(module, "__file__", None)) is not None]

    def importer(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - as __import__ calls it
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        """``__import__`` for the policy and its neighbours."""
        first = name.partition(".")[0]
        if level or not self._has(first):
            return builtins.__import__(name, globals, locals, fromlist, level)
        self._make_package()
        found = importlib.import_module(f"{self._package}.{name}")
        if not fromlist:
            return sys.modules[f"{self._package}.{first}"]
        for each in fromlist:
            # ``from package import module``
            if each != "*" and hasattr(found, "__path__") and not hasattr(found, each):
                try:
                    importlib.import_module(f"{found.__name__}.{each}")
                except ModuleNotFoundError as error:
                    if error.name != f"{found.__name__}.{each}":
                        raise
        return found

    def forget(self) -> None:
        """Drops the neighbours: nobody else can find them."""
        for name in [each for each in sys.modules if each == self._package or each.startswith(f"{self._package}.")]:
            del sys.modules[name]

    def _has(self, name: str) -> bool:
        if name in _NEVER:
            return False
        return (self._path / f"{name}.py").is_file() or (self._path / name / "__init__.py").is_file()

    def _make_package(self) -> None:
        if self._package not in sys.modules:
            package = ModuleType(self._package)
            package.__path__ = [str(self._path)]
            sys.modules[self._package] = package


_PACKAGE = "_neighbours"
_folders: dict[str, Folder] = {}
"""By the name of the policy's module."""


class _Finder:
    """Finds neighbours, for ``sys.meta_path``."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, _target: object = None) -> ModuleSpec | None:
        """The module of this name, if it is one of a policy's folder."""
        folder = _folders.get(name.partition(f"{_PACKAGE}.")[0])
        spec = None if folder is None else PathFinder.find_spec(name, path)
        if folder is not None and spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = Loader(name, spec.loader.path, folder)
        return spec


sys.meta_path.insert(0, _Finder)


def of_module(name: str, file: str) -> Folder:
    """The folder of a policy that is about to be loaded from this file as a module of this name."""
    folder = _folders[name] = Folder(Path(file).parent, f"{name}{_PACKAGE}")
    return folder


def files(policy: object) -> list[Path]:
    """The files of the neighbours that this policy's module has imported so far."""
    hooks = policy.hooks if isinstance(policy, Builtin) else ()
    modules = {getattr(each, "__module__", None) for each in (policy, type(policy), *hooks)}
    modules.add(getattr(policy, "__name__", None))
    owners = {str(name).partition(_PACKAGE)[0] for name in modules}
    return [file for name in sorted(owners) if name in _folders for file in _folders[name].files]
