"""The kernel for a guest: a distribution's package, got through apt or given as a file, unpacked into the cache."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagegate import bzimage
from pagegate.errors import NotSupported
from pagegate.linux import packages
from pagegate.linux.cache import cache_directory, workspace
from pagegate.testbed.progress import Reporter, Silent

NEEDED = ("CONFIG_AMD_MEM_ENCRYPT", "CONFIG_KVM_GUEST")
"""Options of a kernel without which it cannot convert its pages between private and shared."""

BRING = (
    "bring a bzImage, which every distribution has (/boot/vmlinuz-$(uname -r), or the vmlinuz of its cloud image); its "
    f"configuration must have {' and '.join(NEEDED)}"
)
"""What to do where no kernel can be got, for error messages."""

DEFAULTS = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic", "linux-image-kvm")
"""The packages that are looked for, the first of which apt offers is taken: Debian's, then Ubuntu's."""

# Ubuntu has the modules in a package of their own; newer Debian has the image and the configuration in others, too.
_PARTS = re.compile(r"linux-(image|binary|modules|base)-(?!extra-)\S+")

_LIBRARIES = ("lib", "usr/lib")
"""Where a package may have its directory `modules`."""

_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]{1,127}")
_RELEASE = re.compile(rb"[0-9][A-Za-z0-9.+_~-]{0,63}(?=[ \0])")
_LARGEST_CONFIG = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """A kernel with its modules."""

    image: Path
    """The bzImage."""

    release: str
    """As `uname -r` has it in the guest."""

    modules: Path | None
    """The directory of its modules, or None if it has none."""

    lacks: tuple[str, ...]
    """Those options of `NEEDED` that it is built without; empty also if its configuration is not known."""


def fetch(
    *,
    suite: str | None = None,
    package: str | None = None,
    debs: Sequence[Path] = (),
    update: bool = False,
    reporter: Reporter | None = None,
) -> Kernel:
    """Get a kernel into the cache, if it is not there yet.

    Args:
        suite: a Debian suite, as trixie-backports, to take the package from instead of those that apt is set up for.
        package: the package, or one that depends on it; None is the first of `DEFAULTS` that is offered.
        debs: package files to unpack, instead of what apt has: that of the kernel, and those of its modules if they are
            packages of their own.
        update: ask apt also if the cache has a kernel for this suite and package, since there may be a newer one.
        reporter: is told how far it is.

    Raises:
        NotSupported: this host has no apt, or apt cannot get the kernel.
        OSError: a file or the cache cannot be read or written.
        ValueError: the name is none of a package, or the packages are none of an x86 kernel.

    """
    report = reporter or Silent()
    if package is not None and not _NAME.fullmatch(package):
        raise ValueError(f"{package!r} is no package's name: write one as linux-image-cloud-amd64")
    if debs:
        if suite is not None or package is not None or update:
            raise ValueError("package files are taken as they are: suite, package and update are for apt")
        digest = _digest(debs)
        return _cached(f"deb_{digest}", lambda unfinished: _unpacked(debs, digest, unfinished, report), report)
    request = f"apt_{(suite or '').replace('/', '_')}_{package or ''}"
    return _cached(request, lambda unfinished: _from_apt(suite, package, unfinished, report), report, again=update)


def image_release(image: Path) -> str:
    """Return the release of an x86 kernel image, as 6.1.0-56-cloud-amd64.

    Raises:
        OSError: the image cannot be read.
        ValueError: it is no x86 kernel image.

    """
    if not image.is_file() and image.exists():
        raise ValueError(f"{image} is no file: name a bzImage")
    with image.open("rb") as file:
        said = bzimage.version(file.read(bzimage.START))
    text = None if said is None else _RELEASE.match(said)
    if text is None:
        raise ValueError(f"{image} is no x86 kernel image: name a bzImage")
    return text[0].decode("ascii")


def modules_of(image: Path) -> Path:
    """Return the directory of the modules of this kernel: around it, beside it, as in a package, or on this host.

    Raises:
        OSError: the image cannot be read.
        ValueError: it is no x86 kernel image, or its modules are not there.

    """
    release = image_release(image)
    above = image.absolute().parent
    places = [above] if above.name == release else []
    places += [root / lib / "modules" / release for root in (above, above.parent) for lib in _LIBRARIES]
    places.append(Path("/lib/modules") / release)
    for place in places:
        if place.is_dir():
            return place
    raise ValueError(
        f"the modules of {image} are not in lib/modules/{release} beside it nor in /lib/modules/{release}: name their "
        "directory with --modules-dir"
    )


def _digest(debs: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for deb in debs:
        if not deb.is_file() and deb.exists():
            raise ValueError(f"{deb} is no file: name a .deb file")
        with deb.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _cached(request: str, get: Callable[[Path], Path], report: Reporter, *, again: bool = False) -> Kernel:
    """The kernel that was got for this request; if there is none, or `again`, `get` gets it, and is given a place."""
    link = cache_directory() / "by-request" / request
    if not again and (link / "vmlinuz").is_file():
        return _kernel(link.resolve())
    with workspace(report) as unfinished:
        # Another process may have got it while this one waited.
        if again or not (link / "vmlinuz").is_file():
            directory = get(unfinished)
            link.parent.mkdir(exist_ok=True)
            (unfinished / "link").symlink_to(Path("..") / directory.name)
            (unfinished / "link").replace(link)
    return _kernel(link.resolve())


def _from_apt(suite: str | None, name: str | None, unfinished: Path, report: Reporter) -> Path:
    report.stage("asking apt for a kernel")
    apt = packages.open_apt(suite, BRING)
    for each in (name,) if name else DEFAULTS:
        chosen = packages.candidate(apt, each)
        if chosen is not None:
            break
    else:
        remedy = "run apt-get update as root, name a suite with --suite, or a package with --package"
        raise NotSupported(f"{apt.place} offers no {name or ' or '.join(DEFAULTS)}: {remedy}; or {BRING}")
    needed = packages.with_dependencies(apt, chosen, _PARTS)
    (unfinished / "debs").mkdir()
    debs = packages.download(apt, needed, unfinished / "debs", report)
    return _unpacked(debs, chosen.version.replace(":", "-"), unfinished, report)


def _unpacked(debs: Sequence[Path], tag: str, unfinished: Path, report: Reporter) -> Path:
    """Unpack the packages and put what is needed of them into the cache, in a directory named after release and tag."""
    tree, kernel = unfinished / "tree", unfinished / "kernel"
    tree.mkdir()
    kernel.mkdir()
    for deb in debs:
        report.stage(f"unpacking {deb.name}")
        packages.unpack(deb, tree)
    image, config = _image(tree, ", ".join(deb.name for deb in debs))
    # Ubuntu's can be read by root only.
    image.chmod(0o644)
    release = image_release(image)
    image.rename(kernel / "vmlinuz")
    if config.is_file() and packages.regular(config, tree):
        config.rename(kernel / "config")
    for lib in _LIBRARIES:
        modules = tree / lib / "modules" / release
        if modules.is_dir() and packages.regular(modules, tree):
            (kernel / "lib/modules").mkdir(parents=True)
            modules.rename(kernel / "lib/modules" / release)
            break
    _tidy(kernel)
    directory = cache_directory() / f"{release}_{tag}"
    if not (directory / "vmlinuz").is_file():
        # It may be there without its image, if the user removed that.
        shutil.rmtree(directory, ignore_errors=True)
        kernel.rename(directory)
    return directory


def _image(tree: Path, source: str) -> tuple[Path, Path]:
    """The image in an unpacked package, and where its configuration is if there is one."""
    images = [
        (image, image.with_name(image.name.replace("vmlinuz", "config", 1))) for image in tree.glob("boot/vmlinuz-*")
    ]
    for lib in _LIBRARIES:
        images += [(image, image.with_name("config")) for image in tree.glob(f"{lib}/modules/*/vmlinuz")]
    images = [(image, config) for image, config in images if image.is_file() and packages.regular(image, tree)]
    if len(images) != 1:
        found = "no kernel is in it" if not images else f"{len(images)} kernels are in it"
        raise ValueError(f"{source}: {found}; name the package of one kernel")
    return images[0]


def _tidy(directory: Path) -> None:
    """Let this user read all of it, and remove what is neither file nor directory, as links to the kernel's headers."""
    directory.chmod(0o755)
    for at, directories, files in os.walk(directory):
        for name in [*directories, *files]:
            path = Path(at, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                path.unlink()
            else:
                path.chmod(0o755 if path.is_dir() else 0o644)


def _kernel(directory: Path) -> Kernel:
    image = directory / "vmlinuz"
    release = image_release(image)
    modules = directory / "lib/modules" / release
    return Kernel(image, release, modules if modules.is_dir() else None, _lacking(directory / "config"))


def _lacking(config: Path) -> tuple[str, ...]:
    if not config.is_file():
        return ()
    with config.open(encoding="ascii", errors="replace") as file:
        lines = set(file.read(_LARGEST_CONFIG).splitlines())
    return tuple(option for option in NEEDED if f"{option}=y" not in lines)
