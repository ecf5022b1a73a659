"""An initrd: busybox, named modules of the kernel, files, and what is run: a script, a shell, or a disk's own init.

It is an archive from which Linux makes its first file system, where it starts /init.
"""

import gzip
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pagegate.linux import busybox as busyboxes
from pagegate.linux.cache import cache_directory, write_whole
from pagegate.linux.cpio import LARGEST, Archive
from pagegate.linux.kernel import modules_of
from pagegate.linux.modules import Module, in_order
from pagegate.linux.root import SWITCH
from pagegate.testbed.progress import Reporter, Silent

STATUS = "pagegate: exit status "
"""What the guest prints at the end, with the exit status of the script or shell after it."""

_SCRIPT = "/script"
_DIRECTORIES = ("/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp", "/var")  # noqa: S108 - the guest's


def build(  # noqa: PLR0913
    *,
    command: str | None = None,
    script: bytes | None = None,
    root: bool = False,
    modules: Sequence[str] = (),
    kernel: Path | None = None,
    modules_directory: Path | None = None,
    files: Mapping[str, Path | bytes] | None = None,
    busybox: Path | None = None,
    compress: bool = True,
    reporter: Reporter | None = None,
) -> bytes:
    """Make an initrd and return it. The same arguments and files give the same bytes.

    Its /init mounts /proc, /sys and /dev, loads the modules, and runs the command, the script or, if there is neither,
    a shell on the console. Then it prints `STATUS` with the exit status, on a line, and powers off. With `root` it
    mounts the root file system that the kernel's command line names, and goes on with the init that is there.

    Args:
        command: is run by busybox's shell.
        script: a script, or a static program; one without "#!" is run by busybox's shell.
        root: obey these words of the command line: root=, a device, UUID= or LABEL=; rootfstype=, rootflags=, ro and
            rw; rootwait, without which a device is waited for for ten seconds; init=, by default /sbin/init.
        modules: the modules to load, as virtio_blk; those that they need are loaded before, and those that are built
            into the kernel are skipped.
        kernel: the image of the kernel that the modules are for; they are looked for beside it and on this host.
        modules_directory: lib/modules/<release> of the kernel, instead of its image.
        files: more files by their paths in the guest; a file of this host is executable there if its owner may execute
            it here, and bytes are not. They may take the place of applets.
        busybox: a static busybox for x86-64; None is this host's, else that of Debian's package.
        compress: with gzip, as quickly as possible.
        reporter: is told how far it is.

    Raises:
        NotSupported: there is no busybox, or no zstd to decompress a module with.
        OSError: a file cannot be read.
        ValueError: arguments that do not go together, a module that does not exist, or a file that is none.

    """
    if (command is not None) + (script is not None) + root > 1:
        raise ValueError("a command, a script and the init of a root file system exclude each other")
    loaded = _modules(modules, kernel, modules_directory)
    program, applets = busyboxes.contents(busyboxes.find_busybox(busybox, reporter or Silent()))

    archive = Archive()
    for directory in _DIRECTORIES:
        archive.directory(directory)
    # The kernel opens it for /init, before anything is mounted.
    archive.character_device("/dev/console", 5, 1)
    archive.file("/bin/busybox", program, executable=True)
    for module in loaded:
        archive.file(f"/lib/modules/{module.name}.ko", module.data)
    task = _then_power_off("setsid cttyhack sh")
    if root:
        task = SWITCH
    elif command is not None or script is not None:
        content = f"{command}\n".encode(errors="surrogateescape") if command is not None else script or b""
        archive.file(_SCRIPT, content, executable=True)
        itself = command is None and content.startswith((b"#!", b"\x7fELF"))
        task = _then_power_off(_SCRIPT if itself else f"sh {_SCRIPT}")
    archive.file("/init", _init([module.name for module in loaded], task).encode("ascii"), executable=True)
    for guest, source in (files or {}).items():
        data, executable = (source, False) if isinstance(source, bytes) else _host_file(source)
        archive.file(guest, data, executable=executable)
    for applet in applets:
        if f"/{applet}" not in archive:
            archive.symlink(f"/{applet}", "/bin/busybox")
    image = archive.to_bytes()
    return gzip.compress(image, compresslevel=1, mtime=0) if compress else image


def write(image: bytes, path: Path | None = None) -> Path:
    """Write an initrd in one step and return its path; None is the cache, under a name made from its contents.

    Raises:
        NotSupported: there is no place for a cache.
        OSError: it cannot be written; nothing is left behind.

    """
    if path is None:
        path = cache_directory() / f"initramfs_{hashlib.sha256(image).hexdigest()[:16]}.img"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, image)
    return path


def read_script(path: Path) -> bytes:
    """Return a script to pass to `build`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file, or too large.

    """
    return _host_file(path)[0]


def _modules(names: Sequence[str], kernel: Path | None, directory: Path | None) -> Sequence[Module]:
    if kernel is not None and directory is not None:
        raise ValueError("there is a kernel and a directory of modules: name one of them")
    if not names:
        return []
    if kernel is not None:
        directory = modules_of(kernel)
    if directory is None:
        raise ValueError(
            "modules are those of one kernel: name it with --kernel, or their directory with --modules-dir"
        )
    return in_order(directory, names)


def _then_power_off(task: str) -> str:
    return f'cd /root\n{task}\necho "{STATUS}$?"\npoweroff -f\n'


def _init(modules: Sequence[str], task: str) -> str:
    lines = [
        "#!/bin/busybox sh",
        "export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root",
        "mount -t proc proc /proc",
        "mount -t sysfs sysfs /sys",
        "mount -t devtmpfs devtmpfs /dev",
        "hostname pagegate",
        *(f"insmod /lib/modules/{name}.ko || echo 'pagegate: the module {name} cannot be loaded'" for name in modules),
        # A module may have brought the console that the command line names last, as hvc0.
        *(["(: <>/dev/console) 2>/dev/null && exec <>/dev/console >&0 2>&0"] if modules else []),
    ]
    return "\n".join([*lines, task])


def _host_file(path: Path) -> tuple[bytes, bool]:
    """The contents of a file, and whether it is executable."""
    if not path.is_file() and path.exists():
        raise ValueError(f"{path} is no file: only files can be put into the initrd")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
        executable = bool(os.fstat(file.fileno()).st_mode & 0o100)
    if len(data) > LARGEST:
        raise ValueError(f"{path} is larger than {LARGEST >> 20} MiB: use a disk")
    return data, executable
