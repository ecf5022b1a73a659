"""`pagegate resume`: a Linux guest goes on from where `pagegate boot --save` has put it aside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pagegate import Vm
from pagegate.cli.attached_run import Wanted, run_attached
from pagegate.cli.boot_devices import BootDevices, device_options
from pagegate.cli.deadline import Deadline
from pagegate.cli.parameters import Seconds, policy_options, policy_timeout_option, verbose_option
from pagegate.cli.policy_argument import made, policy_option
from pagegate.cli.recording import events_option, limit_option
from pagegate.cli.saving import save_options

if TYPE_CHECKING:
    from pagegate.cli.saving import Saving
    from pagegate.loading.expression import Expression

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Goes on with a guest that boot --save has put aside.")
@click.argument("folder", metavar="DIR", type=_FOLDER)
@device_options
@policy_option()
@policy_options
@policy_timeout_option
@verbose_option
@events_option
@limit_option
@click.option("--lazy", is_flag=True, help="Read a page when it is touched, so that the guest goes on at once.")
@click.option("--timeout", type=Seconds(), help="End the run S seconds after it began to read the snapshot.")
@save_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; the console is standard error.")
@click.option("--debug-private", is_flag=True, help="Let the host read and write private pages.")
def resume(  # noqa: PLR0913 - one for each option
    *,
    folder: Path,
    given: BootDevices,
    policy: Expression | None,
    options: dict[str, str],
    policy_timeout: float | None,
    verbose: bool,
    events: Path | None,
    events_limit: int,
    lazy: bool,
    timeout: float | None,
    saving: Saving | None,
    as_json: bool,
    debug_private: bool,
) -> int:
    """Goes on with the guest of the snapshot DIR, under a policy, with this terminal as its console.

    Memory, vCPUs and devices are as they were. The devices of `boot` have to be given again, disks with what they had
    then. DIR stays as it is: any number of guests may go on from it.

    With --lazy its files must stay until the guest has ended, and the checksums of memory are not checked.

    Exit status: as that of `pagegate boot`.
    """
    if policy_timeout is not None and policy is None:
        raise click.UsageError("--policy-timeout is for a policy: name one with -p")
    judge = made(policy, options)
    deadline = Deadline(timeout).of("the guest was not resumed")
    devices, hvc0 = given.all()
    try:
        with deadline:
            vm = Vm.resume(
                folder,
                policy=judge,
                devices=devices,
                debug_private=debug_private,
                policy_timeout=policy_timeout,
                lazy=lazy,
            )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
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
        if vm.platform != "pc":
            raise click.UsageError(f"{folder} has no Linux guest: Vm.resume goes on from it in a script")
        return run_attached(vm, vm.console if hvc0 is None else hvc0.console, wanted, deadline)
