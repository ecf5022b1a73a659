"""`pagegate --version`: of pagegate, and of what it runs on."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import click

from pagegate import __version__, probe
from pagegate.cli.telling import tell

if TYPE_CHECKING:
    from collections.abc import Callable


def text() -> str:
    """The version, the kernel, what its KVM has, and how page states would be enforced."""
    host = probe()
    kvm = f"VM types {', '.join(host.vm_types)}" if host.vm_types else "not usable (`pagegate doctor` says why)"
    return "\n".join(
        [
            f"pagegate {__version__}",
            f"Python {platform.python_version()}, Linux {platform.release()}, {platform.machine()}",
            f"KVM: {kvm}",
            f"enforcement: {host.enforcement or 'none'}",
        ]
    )


def _print(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:  # noqa: FBT001 - as click calls it
    if wanted and not ctx.resilient_parsing:
        tell(text(), err=False)
        ctx.exit()


version_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print,
    help="Print the version, and those of Python, the kernel and its KVM.",
)
