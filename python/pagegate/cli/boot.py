"""`pagegate boot`: boots Linux under a policy, with this terminal as its console."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pagegate import Vm, probe
from pagegate.cli import symbols
from pagegate.cli.attached import Attached
from pagegate.cli.boot_devices import BootDevices, device_options
from pagegate.cli.boot_initrd import made_initrd
from pagegate.cli.booted import Booted
from pagegate.cli.deadline import Deadline
from pagegate.cli.interrupt import STATUS as INTERRUPTED
from pagegate.cli.interrupt import Interrupt
from pagegate.cli.life import Life
from pagegate.cli.linux_host import linux_host
from pagegate.cli.parameters import VCPUS, Seconds, Size, policy_options, policy_timeout_option, verbose_option
from pagegate.cli.policy_argument import made, policy_option, written
from pagegate.cli.printing import console as terminal_on
from pagegate.cli.printing import counted, put
from pagegate.cli.recording import Recording, events_option, limit_option
from pagegate.cli.summary import Ran, size
from pagegate.cli.telling import tell
from pagegate.errors import NotSupported

if TYPE_CHECKING:
    from pagegate import Report
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

    Exit status: 0 the guest powered off, rebooted or halted, or --timeout was reached; 1 it or the policy ended badly,
    as by a kernel panic; 2 usage; 3 this host cannot.
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
        with contextlib.ExitStack() as meanwhile:
            recording = meanwhile.enter_context(Recording(vm, events, events_limit, deadline))
            attached = meanwhile.enter_context(Attached(vm, console, err=as_json))
            at_terminal = terminal_on(err=True).is_terminal
            if at_terminal:
                attached.say(f"{written(policy)} judges {size(memory)}, {counted(vcpus, 'vCPU')}, by {vm.enforcement}")
            if verbose or at_terminal:
                say, silent = (lambda text: attached.say(text.plain)), (lambda: not console.tail(1))
                meanwhile.enter_context(Life(vm, say, each=verbose, news=silent))
            interrupt = meanwhile.enter_context(Interrupt(vm, deadline))
            report, failure = _run(vm, deadline.left())
        if attached.failure is not None:
            raise attached.failure
        ran = Ran(vm, report, report.seconds, timeout=timeout, interrupted=interrupt.reached)
        booted = Booted(ran, console, ended_by_key=attached.ended_by_key, no_initrd=no_initrd)
        if events is not None:
            symbols.write(vm, events)
        _tell(booted, written(policy) if as_json else None)
        if failure is not None:
            raise failure
    recording.check(interrupted=interrupt.reached)
    return _status(booted)


def _run(vm: Vm, timeout: float | None) -> tuple[Report, Exception | None]:
    """The report of a run, and what it raised. Where there is no report that is raised."""
    try:
        return vm.run(timeout=timeout), None
    except Exception as error:
        if vm.report is None:
            raise
        return vm.report, error


def _tell(booted: Booted, policy: str | None) -> None:
    """Prints the summary; for a program, if the policy is named."""
    if policy is not None:
        click.echo(json.dumps(booted.facts(policy)))
    else:
        out = terminal_on()
        put(out, booted.summary(out.width))


def _status(booted: Booted) -> int:
    if booted.ran.interrupted:
        tell("interrupted")
        return INTERRUPTED
    if not booted.well:
        tell(f"pagegate: {booted.complaint()}")
    return 0 if booted.well else 1
