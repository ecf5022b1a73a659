"""The testbed's kernel: which image is booted, and the cache of the built ones.

The cache, `pagegate/testbed` in $XDG_CACHE_HOME or ~/.cache, holds

    <key>/bzImage, <key>/kernel.json     one finished kernel and what it was built from
    <key>/objects/                       what an unfinished build has compiled so far
    apt/<suite>/                         package lists of a suite that apt is not set up for
    downloads/<package>_<version>/       a source package, until it is unpacked
    sources/<package>_<version>/         an unpacked kernel source
    selftests/<package>_<version>/       the kernel's own tests, built from it

A key is a digest of all that a kernel depends on, so a changed configuration or a new source gets a new image.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pagegate import bzimage
from pagegate.errors import TestbedError

KERNEL_VARIABLE = "PAGEGATE_TESTBED_KERNEL"

IMAGE = "bzImage"
FACTS = "kernel.json"

_RECIPE = "1"
"""Raise it when a change to the build, other than one of the fragment, changes the image."""


@dataclass(frozen=True)
class Source:
    """A Debian package of the kernel's source."""

    package: str
    version: str

    @property
    def name(self) -> str:
        """The name of the source's directories in the cache."""
        return f"{self.package}_{self.version}".replace("/", "-").replace(":", "-")


def cache_directory() -> Path:
    """Return the directory of the testbed's kernels: `pagegate/testbed` in $XDG_CACHE_HOME, by default ~/.cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore a relative path.
    try:
        root = base if base.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise TestbedError(
            "the testbed has no place for its kernels, since this user has no home directory: set XDG_CACHE_HOME"
        ) from error
    return root / "pagegate" / "testbed"


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Turn an OSError about a path in the cache, or above it, into a TestbedError."""
    try:
        yield
    except OSError as error:
        cache = cache_directory()
        if not isinstance(error.filename, str | bytes | os.PathLike):
            raise
        at = Path(os.fsdecode(error.filename))
        # It may be a parent of the cache that cannot be entered or made.
        if not (at.is_relative_to(cache) or cache.is_relative_to(at)):
            raise
        raise TestbedError(
            f"the testbed cannot use its cache: {at}: {error.strerror}; set XDG_CACHE_HOME to a directory that can be "
            "written to"
        ) from error


def fragment() -> str:
    """Return the options that are set on top of `tinyconfig`."""
    return resources.files("pagegate.testbed").joinpath("kernel.fragment").read_text()


def kernel_directory(source: Source) -> Path:
    """Return the cache's directory for the kernel of this source with the present configuration."""
    parts = (_RECIPE, source.package, source.version, fragment())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_directory() / key


def publish(image: Path, source: Source) -> Path:
    """Put a finished image into the cache, in one step, and return its path there."""
    directory = kernel_directory(source)
    facts = {
        "package": source.package,
        "version": source.version,
        "release": image_release(image),
        "fragment": _digest(fragment()),
    }
    (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    partial, whole = directory / f".{IMAGE}.partial", directory / IMAGE
    with partial.open("wb") as file:
        file.write(image.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(whole)
    return whole


def find_kernel(kernel: str | os.PathLike[str] | None = None) -> Path:
    """Return the kernel image to boot: `kernel`, else $PAGEGATE_TESTBED_KERNEL, else the newest that `build` has made.

    Raises:
        TestbedError: there is none, or it is no x86 kernel image.

    """
    if kernel is not None:
        return _checked(Path(kernel).absolute(), "")
    named = os.environ.get(KERNEL_VARIABLE)
    if named:
        return _checked(Path(named).absolute(), f", named by {KERNEL_VARIABLE},")
    built = _newest_built()
    if built is None:
        raise TestbedError(
            "the testbed has no kernel: build one with pagegate testbed build (once; it takes half an hour or more), "
            f"or name an image with --kernel or {KERNEL_VARIABLE}, or set XDG_CACHE_HOME if there is one elsewhere"
        )
    return built


def image_release(image: Path) -> tuple[int, ...]:
    """Return the release of an x86 kernel image, as (7, 3, 4).

    Raises:
        OSError: the image cannot be read.
        ValueError: it is no x86 kernel image.

    """
    with image.open("rb") as file:
        said = bzimage.version(file.read(bzimage.START))
    if said is None:
        raise ValueError("no x86 kernel image")
    text = re.match(rb"[0-9]+(\.[0-9]+)+", said)
    if text is None:
        raise ValueError("a kernel image that does not tell its version")
    return tuple(int(part) for part in text[0].split(b"."))


def _checked(image: Path, origin: str) -> Path:
    # QEMU would start anything, and wait for ever.
    try:
        image_release(image)
    except OSError as error:
        raise TestbedError(f"the kernel image {image}{origin} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TestbedError(
            f"{image}{origin} is {error}: name a bzImage, as pagegate testbed build makes one"
        ) from error
    return image


def _newest_built() -> Path | None:
    found: list[tuple[list[int], float, Path]] = []
    wanted = _digest(fragment())
    try:
        images = list(cache_directory().glob(f"*/{IMAGE}"))
    except (OSError, TestbedError):
        # A cache that cannot be read has no kernel to offer.
        return None
    for image in images:
        try:
            facts = json.loads((image.parent / FACTS).read_text())
            if facts["fragment"] == wanted:
                found.append((facts["release"], image.stat().st_mtime, image))
        except (OSError, ValueError, KeyError, TypeError):
            # `publish` did not write this directory, or not all of it: skip it.
            continue
    return max(found)[2] if found else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
