"""The devices of `pagegate boot`: its options for them, and their place on the machine."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click

from pagegate import devices
from pagegate.cli.parameters import Disk, VsockAddress
from pagegate.linux import root

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pagegate import Vm
    from pagegate.console import Console

_MODULES = {"disk": "virtio_blk", "net": "virtio_net", "rng": "virtio_rng", "vsock": "vmw_vsock_virtio_transport"}
_HVC0 = "hvc0"


@dataclass(frozen=True)
class BootDevices:
    """What was asked for."""

    disks: tuple[tuple[Path, bool], ...]
    nets: tuple[str, ...]
    vsock: tuple[int, Path] | None
    rng: bool
    console: str

    def all(self) -> tuple[list[devices.BuiltinDevice], devices.Console | None]:
        """The devices in the order in which a machine has them, and the console among them if it is this terminal.

        click.BadParameter for one that cannot be had.
        """
        made: list[devices.BuiltinDevice] = []
        for path, read_only in self.disks:
            with _option("--disk"):
                made.append(devices.Block(path, read_only))
        for tap in self.nets:
            with _option("--net"):
                made.append(devices.Net(tap))
        if self.vsock is not None:
            with _option("--vsock"):
                made.append(devices.Vsock(*self.vsock))
        if self.rng:
            made.append(devices.Rng())
        hvc0 = devices.Console() if self.console == _HVC0 else None
        return (made, None) if hvc0 is None else ([*made, hvc0], hvc0)

    def add_to(self, vm: Vm) -> Console:
        """Puts them on the machine, and returns the console that is this terminal.

        click.BadParameter for one that cannot be had.
        """
        made, hvc0 = self.all()
        options = {devices.Block: "--disk", devices.Net: "--net", devices.Vsock: "--vsock", devices.Rng: "--rng"}
        for device, name in zip_longest(made, [*(path.name for path, _ in self.disks), *self.nets]):
            with _option(options.get(type(device), "--console")):
                vm.add_device(device, name=name)
        return vm.console if hvc0 is None else hvc0.console

    @property
    def modules(self) -> list[str]:
        """Linux's modules for them."""
        given = {"disk": self.disks, "net": self.nets, "rng": self.rng, "vsock": self.vsock is not None}
        names = [module for name, module in _MODULES.items() if given[name]]
        if self.console == _HVC0:
            names.append("virtio_console")
        return ["virtio_pci", *names] if names else []

    def command_line(self, append: str) -> str:
        """The guest's command line: with the consoles, unless it names one itself.

        The kernel writes to both, so that what it says before there is a driver of hvc0 is on ttyS0; the last one is
        /dev/console.
        """
        if self.console != _HVC0 or root.value(append, "console") is not None:
            return append
        return f"console=ttyS0 console={_HVC0} {append}".rstrip()


@contextlib.contextmanager
def _option(name: str) -> Iterator[None]:
    """Names the option whose device cannot be made."""
    try:
        yield
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"'{name}'") from None
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        raise click.BadParameter(f"{place}{error.strerror or error}", param_hint=f"'{name}'") from None


_OPTIONS = [
    click.option(
        "--disk",
        "disks",
        type=Disk(),
        multiple=True,
        metavar="FILE[:ro]",
        help="A disk, /dev/vda and so on: a raw image or a block device, with :ro one that cannot be written. May be "
        "repeated.",
    ),
    click.option(
        "--console",
        type=click.Choice(["ttyS0", _HVC0]),
        default="ttyS0",
        show_default=True,
        help="The console that is this terminal: the serial port, or a virtio console.",
    ),
    click.option(
        "--vsock",
        type=VsockAddress(),
        metavar="CID:PATH",
        help="Vsock: the guest's context ID, 3 or more, and the Unix socket that programs of the host connect to.",
    ),
    click.option(
        "--net",
        "nets",
        multiple=True,
        metavar="TAP",
        help="A network card, eth0 and so on, at this tap of the host. May be repeated.",
    ),
    click.option("--rng", is_flag=True, help="A source of entropy."),
]


def device_options(command: Callable[..., int]) -> Callable[..., int]:
    """The options of a command, which it gets as one argument, `given`."""

    @functools.wraps(command)
    def gathered(
        *,
        disks: tuple[tuple[Path, bool], ...],
        nets: tuple[str, ...],
        vsock: tuple[int, Path] | None,
        rng: bool,
        console: str,
        **others: Any,
    ) -> int:
        return command(given=BootDevices(disks, nets, vsock, rng, console), **others)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered
