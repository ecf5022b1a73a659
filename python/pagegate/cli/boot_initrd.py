"""The initrd that `pagegate boot` makes where none is given: it loads the devices' modules and mounts the root."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pagegate.linux import initramfs, root
from pagegate.linux.kernel import modules_of
from pagegate.testbed import progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagegate.cli.boot_devices import BootDevices


@contextlib.contextmanager
def made_initrd(kernel: Path, given: BootDevices, append: str) -> Iterator[tuple[Path | None, str]]:
    """Makes an initrd for a guest whose root file system is on a disk, and yields its path while it is there.

    Yields None and the reason where none is made. click.UsageError where the kernel has no driver for a device.
    """
    if not given.disks or root.value(append, "root") is None:
        yield None, "there was no --initrd; for a root file system on a disk: --disk FILE --append root=/dev/vda"
        return
    try:
        directory = modules_of(kernel)
    except ValueError as error:
        yield None, f"there was no --initrd, and none could be made: {error}"
        return
    names = [*given.modules, root.value(append, "rootfstype") or root.FILE_SYSTEM]
    try:
        with progress.reporter(sys.stderr) as reporter:
            image = initramfs.build(root=True, modules=names, modules_directory=directory, reporter=reporter)
    except ValueError as error:
        raise click.UsageError(f"there is no --initrd, and none can be made: {error}") from None
    with tempfile.NamedTemporaryFile(prefix="pagegate-initrd-") as file:
        file.write(image)
        file.flush()
        yield Path(file.name), ""
