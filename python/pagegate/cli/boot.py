"""`pagegate boot`: boots Linux under a policy, with this terminal as its console."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pagegate import Vm, probe
from pagegate.cli.attached_run import Wanted, run_attached
from pagegate.cli.boot_devices import BootDevices, device_options
from pagegate.cli.boot_initrd import made_initrd
from pagegate.cli.deadline import Deadline
from pagegate.cli.linux_host import linux_host
from pagegate.cli.parameters import VCPUS, Seconds, Size, policy_options, policy_timeout_option, verbose_option
from pagegate.cli.policy_argument import made, policy_option
from pagegate.cli.recording import events_option, limit_option
from pagegate.cli.saving import save_options
from pagegate.errors import NotSupported

if TYPE_CHECKING:
    from pagegate.cli.saving import Saving
    from pagegate.loading.expression import Expression

_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


def _check_host() -> None:
    found = linux_host(probe())
    if found.enforcement is None:
        raise NotSupported(found.why)


@click.command(short_help="Boots Linux under a policy, in this terminal.")
@click.argument("kernel", type=_FILE)
@click.option("--initrd", type=_FILE, metavar="FILE", help="Its initial RAM disk. Default: see below.")
@click.option("--append", default="", metavar="TEXT", help="Its command line.")
@click.option("--memory", type=Size(), default="512M", show_default=True, help="Guest memory.")
@click.option("--vcpus", type=VCPUS, default=1, show_default=True)
@click.option(
    "--confidential",
    type=click.Choice(["sev", "none"]),
    default="sev",
    show_default=True,
    help="sev: the guest believes that it is a SEV guest, and asks for conversions; nothing is encrypted. none: an "
    "ordinary guest, all of it shared.",
)
@device_options
@policy_option()
@policy_options
@policy_timeout_option
@click.option("--enforcement", type=click.Choice(["auto", "traps", "memslots"]), default="auto", show_default=True)
@verbose_option
@events_option
@limit_option
@click.option("--timeout", type=Seconds(), help="End the run S seconds after it began to load the guest.")
@save_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; the console is standard error.")
@click.option("--debug-private", is_flag=True, help="Let the host read and write private pages.")
def boot(  # noqa: PLR0913 - one for each option
    *,
    kernel: Path,
    initrd: Path | None,
    append: str,
    memory: int,
    vcpus: int,
    confidential: str,
    given: BootDevices,
    policy: Expression | None,
    options: dict[str, str],
    policy_timeout: float | None,
    enforcement: str,
    verbose: bool,
    events: Path | None,
    events_limit: int,
    timeout: float | None,
    saving: Saving | None,
    as_json: bool,
    debug_private: bool,
) -> int:
    """Boots KERNEL, a bzImage (a distribution's vmlinuz) or an ELF vmlinux, and shows what it asked for.

    Its console is this terminal: every key goes to the guest, also Ctrl-C, and Ctrl-A x ends it (Ctrl-A ? lists more).
    console=ttyS0 and panic=-1 are added to its command line, unless --append has such words; with --console hvc0
    console=hvc0, too.

    With --disk and --append root=/dev/vda, but without --initrd, an initrd is made that loads the modules of the
    devices and of the root file system, and mounts that. The modules are looked for in lib/modules beside KERNEL and on
    this host.

    With --save DIR the guest is put aside in a folder, from which `pagegate resume DIR` goes on, as often as you like.

    Exit status: 0 the guest powered off, rebooted or halted, or --timeout was reached; 1 it or the policy ended badly,
    as by a kernel panic, or with --save before it was put aside; 2 usage; 3 this host cannot.
    """
    if policy_timeout is not None and policy is None:
        raise click.UsageError("--policy-timeout is for a policy: name one with -p")
    if enforcement == "traps" and confidential == "none":
        raise click.UsageError("--enforcement traps is for --confidential sev: all of an ordinary guest is shared")
    judge = made(policy, options)
    _check_host()
    deadline = Deadline(timeout)
    try:
        with deadline:
            vm = Vm(
                memory,
                vcpus=vcpus,
                policy=judge,
                enforcement=enforcement,
                platform="pc",
                confidential=None if confidential == "none" else confidential,
                debug_private=debug_private,
                policy_timeout=policy_timeout,
            )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    append = given.command_line(append)
    wanted = Wanted(
        policy,
        verbose=verbose,
        events=events,
        events_limit=events_limit,
        timeout=timeout,
        as_json=as_json,
        saving=saving,
    )
    with vm:
        with deadline, contextlib.ExitStack() as parts:
            no_initrd = ""
            if initrd is None:
                initrd, no_initrd = parts.enter_context(made_initrd(kernel, given, append))
            console = given.add_to(vm)
            try:
                vm.boot(kernel, initrd=initrd, append=append)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
        return run_attached(vm, console, wanted, deadline, no_initrd=no_initrd)
