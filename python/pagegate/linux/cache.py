"""The cache of kernels and initrds for guests: where it is, and how something is put there in one step."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pagegate.errors import NotSupported, TestbedError
from pagegate.testbed import kernel as testbed_kernel
from pagegate.testbed.progress import Reporter

_PARTIAL = ".partial-"


def cache_directory() -> Path:
    """Return the cache's directory: `pagegate/guest` in $XDG_CACHE_HOME, by default in ~/.cache.

    Raises:
        NotSupported: this user has no home directory, and XDG_CACHE_HOME is not set.

    """
    try:
        return testbed_kernel.cache_directory().with_name("guest")
    except TestbedError as error:
        raise NotSupported(
            "there is no place for a guest's kernel and initrd, since this user has no home directory: "
            "set XDG_CACHE_HOME"
        ) from error


@contextlib.contextmanager
def workspace(report: Reporter) -> Iterator[Path]:
    """Make a directory in the cache for unfinished files; whatever is left in it is removed at the end.

    One process of this user has it at a time; others wait here. What a process that was killed has left is removed.

    Raises:
        OSError: the cache cannot be written.

    """
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.stage("waiting for another pagegate guest to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=_PARTIAL) as directory:
            yield Path(directory)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one step: at any time it is as before or complete. A device or pipe is written in place.

    Raises:
        OSError: it cannot be written; nothing is left behind.

    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    # A link stays a link, as with other programs that write a file.
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_PARTIAL)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
