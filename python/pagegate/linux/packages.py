"""Packages of Debian and its relatives: which ones a name stands for, getting them through apt, unpacking them.

It needs no root: packages are downloaded and unpacked, not installed.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagegate.errors import NotSupported, TestbedError
from pagegate.testbed.apt import Apt, apt_for
from pagegate.testbed.builder import call
from pagegate.testbed.progress import Reporter

LARGEST = 4 << 30
"""Bytes that a package may have unpacked. A distribution's kernel with all its modules has less than 1 GiB."""

_MOST_PACKAGES = 16


@dataclass(frozen=True)
class Package:
    """A package in the version that apt would install."""

    name: str
    version: str


def open_apt(suite: str | None, otherwise: str) -> Apt:
    """Return how to call apt for this Debian suite, or None for what apt is set up for.

    Args:
        suite: as trixie-backports.
        otherwise: what the user can do without apt, for error messages.

    Raises:
        NotSupported: this host has no apt, or no archive that has the suite.

    """
    if any(shutil.which(program) is None for program in ("apt-get", "apt-cache", "dpkg-deb")):
        raise NotSupported(f"this host has no apt: {otherwise}")
    try:
        return apt_for(suite, otherwise)
    except TestbedError as error:
        raise NotSupported(str(error)) from error


def candidate(apt: Apt, name: str) -> Package | None:
    """Return the package of this name, or None if apt offers none.

    Raises:
        NotSupported: apt failed.

    """
    found = re.search(r"^ *Candidate: (\S+)", _output(apt, "apt-cache", "policy", name), re.MULTILINE)
    return None if found is None or found[1] == "(none)" else Package(name, found[1])


def with_dependencies(apt: Apt, package: Package, wanted: re.Pattern[str]) -> list[Package]:
    """Return this package and those that it depends on, directly or not, whose names match `wanted`.

    Raises:
        NotSupported: one of them is not offered, there are more than 16, or apt failed.

    """
    found = {package.name: package}
    todo = [package]
    while todo:
        one = todo.pop()
        for alternatives in _depends(_output(apt, "apt-cache", "show", f"{one.name}={one.version}")):
            names = [name for name in alternatives if wanted.fullmatch(name)]
            if not names or any(name in found for name in names):
                continue
            offered = next(filter(None, (candidate(apt, name) for name in names)), None)
            if offered is None:
                raise NotSupported(f"{apt.place} offers no {names[0]}, which {one.name} needs: run apt-get update")
            if len(found) == _MOST_PACKAGES:
                raise NotSupported(f"{package.name} needs more than {_MOST_PACKAGES} packages: name another one")
            found[offered.name] = offered
            todo.append(offered)
    return list(found.values())


def _depends(shown: str) -> list[list[str]]:
    """What the first stanza depends on: for each dependency the names of its alternatives."""
    stanza = re.split(r"\n\s*\n", shown.lstrip("\n"), maxsplit=1)[0]
    fields = re.findall(r"^(?:Pre-)?Depends:((?:.|\n[ \t])*)", stanza, re.MULTILINE)
    return [
        [re.split(r"[\s(:\[]", one.strip(), maxsplit=1)[0] for one in dependency.split("|")]
        for field in fields
        for dependency in field.split(",")
    ]


def download(apt: Apt, packages: Sequence[Package], directory: Path, report: Reporter) -> list[Path]:
    """Download these packages into an empty directory and return their files.

    While it runs there is a log beside the directory, with its name and .log.

    Raises:
        NotSupported: they cannot be downloaded.

    """
    words = [f"{package.name}={package.version}" for package in packages]
    described = _output(apt, "apt-get", "download", "--print-uris", *words)
    total = sum(int(size) for size in re.findall(r" (\d+) [A-Z0-9]+:[0-9a-f]+$", described, re.MULTILINE))
    report.stage(f"downloading {packages[0].name} {packages[0].version}", (total >> 20) or None, "MiB")

    def measure() -> None:
        with contextlib.suppress(FileNotFoundError):
            report.reach(sum(file.stat().st_size for file in directory.iterdir()) >> 20)

    command = ["apt-get", *apt.options, "--quiet", "download", *words]
    _call(f"{packages[0].name} cannot be downloaded", command, directory, measure)
    return sorted(directory.glob("*.deb"))


def unpack(deb: Path, directory: Path) -> None:
    """Unpack a package into a directory that exists.

    The files may still be links to anywhere: see `regular`. While it runs there is a log beside the directory, with
    its name and .log.

    Raises:
        NotSupported: this host has no dpkg-deb, or the package cannot be unpacked, as on a full disk.
        ValueError: the file is no package.

    """
    if shutil.which("dpkg-deb") is None:
        raise NotSupported(f"this host has no dpkg-deb to unpack {deb} with: install the package dpkg")
    with deb.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"{deb} is no Debian package: name a .deb file")
    # More than is allowed is cut off, and tar fails.
    script = 'dpkg-deb --fsys-tarfile "$1" | head -c "$2" | tar -x --no-same-owner --no-same-permissions -C "$3" -f -'
    command = ["bash", "-o", "pipefail", "-c", script, "bash", str(deb.absolute()), str(LARGEST), str(directory)]
    _call(f"{deb} cannot be unpacked", command, directory)


def regular(path: Path, root: Path) -> bool:
    """Whether this is a file or directory in `root`, and no link leads to it; an unpacked package may have any."""
    return (path.is_file() or path.is_dir()) and path.resolve() == root.resolve() / path.relative_to(root)


def _output(apt: Apt, program: str, *words: str) -> str:
    try:
        return apt.output(program, *words)
    except TestbedError as error:
        raise NotSupported(str(error)) from error


def _call(failure: str, command: Sequence[str], directory: Path, on_wait: Callable[[], None] | None = None) -> None:
    log = directory.with_name(f"{directory.name}.log")
    try:
        call(command, log, directory=directory, on_wait=on_wait)
    except TestbedError as error:
        # The first line names the log, which does not stay.
        raise NotSupported("\n".join([f"{failure}:", *str(error).splitlines()[1:]])) from error
    log.unlink()
