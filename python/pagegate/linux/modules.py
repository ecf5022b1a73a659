"""A kernel's modules: which files they are, and in which order named ones and what they need are loaded.

What a module needs is read from the module itself, because a package that is only unpacked has no modules.dep, which
depmod makes when it is installed. Where there is one, what it says is added, since it knows modules that were built
elsewhere.
"""

import difflib
import lzma
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from pagegate.errors import NotSupported
from pagegate.linux.elf import modinfo

LARGEST = 256 << 20
"""Bytes that a module may have."""

_XZ_MEMORY = 256 << 20
_MOST_FILES = 100_000
_LARGEST_LIST = 64 << 20
_FILE = re.compile(r"([A-Za-z0-9_-]{1,128})\.ko(\.xz|\.gz|\.zst)?")


@dataclass(frozen=True)
class Module:
    """A module to load."""

    name: str
    """With underscores, as lsmod has it."""

    data: bytes
    """The module, decompressed."""


def in_order(directory: Path, names: Iterable[str]) -> list[Module]:
    """Return the named modules and those that they need, each after what it needs.

    Those that are built into the kernel are left out.

    Args:
        directory: lib/modules/<release> of the kernel.
        names: as virtio_blk; hyphens are the same as underscores.

    Raises:
        NotSupported: zstd is needed to decompress a module, and this host has none.
        OSError: a file cannot be read.
        ValueError: there is no such module, or its file is none.

    """
    files = _files(directory)
    built_in = {_name(line) for line in _lines(directory / "modules.builtin")}
    listed = _listed(directory / "modules.dep")
    ordered: dict[str, Module] = {}
    entered: set[str] = set()

    # What is still to do, last first: a module's name and what asked for it, or a module whose needs are met.
    todo: list[tuple[str, str] | Module] = [(name.replace("-", "_"), "") for name in reversed(list(names))]
    while todo:
        one = todo.pop()
        if isinstance(one, Module):
            ordered[one.name] = one
            continue
        name, wanted_by = one
        if name in entered or name in built_in:
            continue
        if name not in files:
            raise ValueError(_unknown(name, wanted_by, directory, [*files, *built_in]))
        entered.add(name)
        module = Module(name, _decompressed(files[name]))
        try:
            facts = modinfo(module.data)
        except ValueError as error:
            raise ValueError(f"{files[name]}: {error}") from error
        needs = [need.replace("-", "_") for each in facts.get("depends", ()) for need in each.split(",") if need]
        needs += [need for need in listed.get(name, ()) if need not in needs]
        # What it would ask modprobe for; the name may be an alias of a module, or of none.
        needs += [need for need in _soft(facts.get("softdep", ())) if need in files and need not in needs]
        todo.append(module)
        todo += [(need, name) for need in reversed(needs)]
    return list(ordered.values())


def _unknown(name: str, wanted_by: str, directory: Path, known: list[str]) -> str:
    if wanted_by:
        return f"the module {wanted_by} needs {name}, which is not in {directory}"
    close = difflib.get_close_matches(name, known, 3)
    remedy = f"there is {', '.join(close)}" if close else "name one as virtio_blk, without .ko"
    return f"there is no module {name!r} in {directory}: {remedy}"


def _files(directory: Path) -> dict[str, Path]:
    """The modules' files by their names."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory: name lib/modules/<release> of the kernel")
    found: dict[str, Path] = {}
    for at, _, files in os.walk(directory):
        for file in files:
            if _FILE.fullmatch(file) and (path := Path(at, file)).is_file():
                found.setdefault(_name(file), path)
        if len(found) > _MOST_FILES:
            raise ValueError(f"{directory} has more than {_MOST_FILES} modules: name lib/modules/<release> of a kernel")
    return found


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        return []
    with file.open(encoding="ascii", errors="replace") as lines:
        return lines.read(_LARGEST_LIST).splitlines()


def _listed(file: Path) -> dict[str, list[str]]:
    """For each module in modules.dep what it needs; depmod lists first what is loaded last."""
    found: dict[str, list[str]] = {}
    for line in _lines(file):
        path, _, needs = line.partition(":")
        found[_name(path)] = [_name(need) for need in reversed(needs.split())]
    return found


def _soft(facts: Iterable[str]) -> list[str]:
    """The modules that are to be loaded before, of softdeps as `pre: a b post: c`."""
    found = []
    for fact in facts:
        before = False
        for word in fact.split():
            if word.endswith(":"):
                before = word == "pre:"
            elif before:
                found.append(word.replace("-", "_"))
    return found


def _decompressed(path: Path) -> bytes:
    with path.open("rb") as file:
        try:
            if path.suffix == ".zst":
                data = _zstd(path, file)
            else:
                packed = file.read(LARGEST + 1)
                if path.suffix == ".xz":
                    data = lzma.LZMADecompressor(memlimit=_XZ_MEMORY).decompress(packed, LARGEST + 1)
                elif path.suffix == ".gz":
                    data = zlib.decompressobj(wbits=31).decompress(packed, LARGEST + 1)
                else:
                    data = packed
        except (lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
    if len(data) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST >> 20} MiB")
    return data


def _zstd(path: Path, file: IO[bytes]) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        raise NotSupported(f"{path} is compressed with zstd, which this host does not have: install the package zstd")
    with subprocess.Popen(  # noqa: S603
        [program, "-dcq"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        data = cast("IO[bytes]", process.stdout).read(LARGEST + 1)
        if len(data) > LARGEST:
            process.kill()
    if process.returncode != 0 and len(data) <= LARGEST:
        raise ValueError(f"{path} cannot be decompressed: zstd failed")
    return data
