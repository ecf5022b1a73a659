"""`pagegate guest`: gets a Linux kernel for a guest, and makes an initrd."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pagegate.cli.telling import tell
from pagegate.linux import initramfs, kernel
from pagegate.testbed import progress

_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.group(short_help="Gets a Linux kernel for a guest, and makes an initrd.")
def guest() -> None:
    """Gets a Linux kernel for a guest, and makes an initrd, for users who have none at hand.

    Any bzImage and initrd of your own will do as well. Both are kept in pagegate/guest in $XDG_CACHE_HOME or ~/.cache,
    and may be deleted there.
    """


@guest.command(short_help="Gets a distribution's kernel.")
@click.option(
    "--suite",
    metavar="SUITE",
    help="Take the package from this Debian suite, as trixie-backports. It need not be one of apt's own suites: it is "
    "fetched from the Debian archive that apt's sources name.",
)
@click.option(
    "--package",
    metavar="NAME",
    help=f"The package, or one that depends on it. Default: the first that apt offers of {', '.join(kernel.DEFAULTS)}.",
)
@click.option(
    "--deb",
    "debs",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Unpack this package instead. May be repeated, for modules that are a package of their own.",
)
@click.option("--update", is_flag=True, help="Ask apt for a newer one, though the cache has one.")
def fetch(*, suite: str | None, package: str | None, debs: tuple[Path, ...], update: bool) -> int:
    """Gets a distribution's kernel for virtual machines through apt, and prints the path of its vmlinuz.

    The package is downloaded and unpacked into the cache, not installed, so root is not needed. Its modules are in
    lib/modules beside the vmlinuz. The next time the path is printed at once: pagegate boot "$(pagegate guest fetch)".

    Where there is no apt, bring a bzImage; every distribution has one, as /boot/vmlinuz-$(uname -r).
    """
    try:
        with progress.reporter(sys.stderr) as reporter:
            got = kernel.fetch(suite=suite, package=package, debs=debs, update=update, reporter=reporter)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if got.lacks:
        tell(
            f"pagegate: {got.release} is built without {' and '.join(got.lacks)}: as a guest it does not convert its "
            "pages between private and shared"
        )
    click.echo(got.image)
    return 0


def _files(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {}
    for value in values:
        host, colon, path = value.rpartition(":")
        if not colon or not host or not path.startswith("/"):
            raise click.BadParameter(f"{value!r} is no HOST:GUEST, as data.bin:/root/data.bin", ctx, param)
        if path in files:
            raise click.BadParameter(f"{path} is given twice", ctx, param)
        files[path] = Path(host)
    return files


@guest.command("initramfs", short_help="Makes an initrd with busybox, modules and a script.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write it. Default: the cache, under a name made from its contents.",
)
@click.option(
    "--module",
    "modules",
    multiple=True,
    metavar="NAME",
    help="Load this module, as virtio_blk, and those that it needs. May be repeated.",
)
@click.option(
    "--kernel",
    "image",
    type=_FILE,
    metavar="VMLINUZ",
    help="The kernel that the modules are for; they are looked for in lib/modules beside it and on this host.",
)
@click.option(
    "--modules-dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The modules themselves: lib/modules/<release> of the kernel.",
)
@click.option("--script", type=_FILE, metavar="FILE", help="Run this script, or static program.")
@click.option("--exec", "command", metavar="COMMAND", help="Run this command.")
@click.option(
    "--root",
    is_flag=True,
    help="Mount the root file system that root= of the guest's command line names, and start its init.",
)
@click.option("--shell", is_flag=True, help="Run a shell on the console, which is the default.")
@click.option(
    "--file",
    "files",
    multiple=True,
    callback=_files,
    metavar="HOST:GUEST",
    help="Put this file there in the guest, as data.bin:/root/data.bin. May be repeated.",
)
@click.option("--busybox", type=_FILE, metavar="FILE", help="A static busybox. Default: this host's, or Debian's.")
@click.option("--uncompressed", is_flag=True, help="Do not compress it.")
def make_initramfs(  # noqa: PLR0913 - one for each option
    *,
    output: Path | None,
    modules: tuple[str, ...],
    image: Path | None,
    directory: Path | None,
    script: Path | None,
    command: str | None,
    root: bool,
    shell: bool,
    files: dict[str, Path | bytes],
    busybox: Path | None,
    uncompressed: bool,
) -> int:
    """Makes an initrd with busybox, modules and a script, and prints its path.

    The guest mounts /proc, /sys and /dev, loads the modules, and runs the script, the command or a shell. Then it
    prints "pagegate: exit status N" and powers off.

    With --root it goes on with the root file system of a disk. It obeys root=, rootfstype=, rootflags=, ro, rw,
    rootwait and init=. Name the modules of the disk and its file system: virtio_pci, virtio_blk and ext4, say.

    busybox has to be static. Where this host has none it is taken from the package busybox-static, which is downloaded,
    not installed.
    """
    if (script is not None) + (command is not None) + shell + root > 1:
        raise click.UsageError("--script, --exec, --root and --shell exclude each other")
    try:
        with progress.reporter(sys.stderr) as reporter:
            made = initramfs.build(
                command=command,
                script=None if script is None else initramfs.read_script(script),
                root=root,
                modules=modules,
                kernel=image,
                modules_directory=directory,
                files=files,
                busybox=busybox,
                compress=not uncompressed,
                reporter=reporter,
            )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(initramfs.write(made, output))
    return 0
