"""The devices of `pagegate boot`: its options for them, and their place on the machine."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
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

    def add_to(self, vm: Vm) -> Console:
        """Puts them on the machine, and returns the console that is this terminal.

        click.BadParameter for one that cannot be had.
        """
        for path, read_only in self.disks:
            with _option("--disk"):
                vm.add_device(devices.Block(path, read_only), name=path.name)
        for tap in self.nets:
            with _option("--net"):
                vm.add_device(devices.Net(tap), name=tap)
        if self.vsock is not None:
            with _option("--vsock"):
                vm.add_device(devices.Vsock(*self.vsock))
        if self.rng:
            with _option("--rng"):
                vm.add_device(devices.Rng())
        if self.console != _HVC0:
            return vm.console
        with _option("--console"):
            hvc0 = devices.Console()
            vm.add_device(hvc0)
        return hvc0.console

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
