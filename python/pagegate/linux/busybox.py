"""A static busybox for an initrd: one that is named, this host's, or that of Debian's package, and its applets."""

import re
import shutil
import subprocess
from pathlib import Path

from pagegate.errors import NotSupported
from pagegate.linux import packages
from pagegate.linux.cache import cache_directory, workspace, write_whole
from pagegate.linux.elf import is_static
from pagegate.testbed.progress import Reporter

LARGEST = 64 << 20
"""Bytes that busybox may have."""

_BRING = "install the package busybox-static, or name a static busybox for x86-64 with --busybox"
_SECONDS = 20.0
_MOST_APPLETS = 2000
_APPLET = re.compile(r"(?:usr/)?s?bin/[A-Za-z0-9._\[+-]{1,64}")


def find_busybox(named: Path | None, reporter: Reporter) -> Path:
    """Return a static busybox for x86-64: the named one, else that in PATH, else that of the package busybox-static.

    The package's is kept in the cache. A busybox in PATH is passed over if it is not static.

    Raises:
        NotSupported: there is none, and it cannot be got through apt.
        OSError: the named one or the cache cannot be read or written.
        ValueError: the named one is no static program for x86-64.

    """
    if named is not None:
        if not is_static(_read(named)):
            raise ValueError(f"{named} needs a dynamic loader, which the initrd has not: {_BRING}")
        return named
    on_path = shutil.which("busybox")
    cached = cache_directory() / "busybox"
    for path in ([Path(on_path)] if on_path else []) + ([cached] if cached.is_file() else []):
        try:
            if is_static(_read(path)):
                return path
        except (OSError, ValueError):
            # Such as a script: there may be a better one.
            continue
    with workspace(reporter) as unfinished:
        reporter.stage("asking apt for busybox-static")
        apt = packages.open_apt(None, _BRING)
        package = packages.candidate(apt, "busybox-static")
        if package is None:
            raise NotSupported(f"apt offers no busybox-static: run apt-get update as root; or {_BRING}")
        (unfinished / "debs").mkdir()
        (unfinished / "tree").mkdir()
        for deb in packages.download(apt, [package], unfinished / "debs", reporter):
            packages.unpack(deb, unfinished / "tree")
        for directory in ("bin", "usr/bin"):
            program = unfinished / "tree" / directory / "busybox"
            if packages.regular(program, unfinished / "tree") and is_static(_read(program)):
                write_whole(cached, _read(program))
                cached.chmod(0o755)
                return cached
    raise NotSupported(f"apt's busybox-static has no static busybox: {_BRING}")


def contents(program: Path) -> tuple[bytes, list[str]]:
    """Return busybox itself and its applets, as bin/sh, which it is asked for.

    Raises:
        NotSupported: it does not run on this host.
        OSError: it cannot be read.
        ValueError: it is too large, or does not list its applets, as one that is no busybox.

    """
    data = _read(program)
    try:
        listed = subprocess.run(
            # By this name it is busybox, whatever its file is called.
            ["busybox", "--list-full"],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_SECONDS,
            executable=str(program.absolute()),
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{program} does not list its applets within {_SECONDS:.0f} s: {_BRING}") from error
    except OSError as error:
        raise NotSupported(f"{program} does not run on this host: {error.strerror}; {_BRING}") from error
    applets = listed.stdout.decode("ascii", errors="replace").split()
    if "sh" not in {applet.rpartition("/")[2] for applet in applets} or len(applets) > _MOST_APPLETS:
        raise ValueError(f"{program} does not list its applets, a shell among them: {_BRING}")
    return data, [applet for applet in applets if _APPLET.fullmatch(applet)]


def _read(path: Path) -> bytes:
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} is no file: {_BRING}")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST >> 20} MiB: {_BRING}")
    return data
