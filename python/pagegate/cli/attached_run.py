"""A Linux guest's run with this terminal as its console, from there to the summary: `pagegate boot` and `resume`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import click

from pagegate.cli import symbols
from pagegate.cli.attached import Attached
from pagegate.cli.booted import Booted
from pagegate.cli.interrupt import STATUS as INTERRUPTED
from pagegate.cli.interrupt import Interrupt
from pagegate.cli.life import Life
from pagegate.cli.policy_argument import written
from pagegate.cli.printing import console as terminal_on
from pagegate.cli.printing import counted, put
from pagegate.cli.recording import Recording
from pagegate.cli.summary import Ran
from pagegate.cli.telling import tell
from pagegate.cli.waiting import Waiting
from pagegate.units import size

if TYPE_CHECKING:
    from pathlib import Path

    from pagegate import Report, Vm
    from pagegate.cli.deadline import Deadline
    from pagegate.cli.saving import Saving
    from pagegate.console import Console
    from pagegate.loading.expression import Expression


@dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    policy: Expression | None
    _: KW_ONLY
    verbose: bool
    events: Path | None
    events_limit: int
    timeout: float | None
    as_json: bool
    saving: Saving | None


def run_attached(vm: Vm, console: Console, wanted: Wanted, deadline: Deadline, *, no_initrd: str = "") -> int:
    """Runs a machine until its guest or `deadline` ends it, tells how it went, and returns the exit status.

    ``console``: the one that is this terminal. ``no_initrd``: why the guest had no initrd; empty if it had one.
    """
    with contextlib.ExitStack() as meanwhile:
        recording = meanwhile.enter_context(Recording(vm, wanted.events, wanted.events_limit, deadline))
        attached = meanwhile.enter_context(Attached(vm, console, err=wanted.as_json))
        at_terminal = terminal_on(err=True).is_terminal
        if at_terminal:
            judges = f"{written(wanted.policy)} judges {size(vm.memory)}"
            attached.say(f"{judges}, {counted(len(vm.vcpus), 'vCPU')}, by {vm.enforcement}")
        if wanted.verbose or at_terminal:
            say, silent = (lambda text: attached.say(text.plain)), (lambda: not console.tail(1))
            meanwhile.enter_context(Life(vm, say, each=wanted.verbose, news=silent))
        waiting = meanwhile.enter_context(Waiting(vm, attached.say_waiting))
        interrupt = meanwhile.enter_context(Interrupt(vm, deadline, waiting))
        if wanted.saving is not None:
            meanwhile.enter_context(wanted.saving.watch(vm, console))
        report, failure = _run(vm, deadline.left())
    if attached.failure is not None:
        raise attached.failure
    saved = None
    if wanted.saving is not None and failure is None and not interrupt.reached and not attached.ended_by_key:
        saved = wanted.saving.save(vm, report)
    ran = Ran(vm, report, report.seconds, timeout=wanted.timeout, interrupted=interrupt.reached)
    booted = Booted(ran, console, ended_by_key=attached.ended_by_key, no_initrd=no_initrd, saved=saved)
    if wanted.events is not None:
        symbols.write(vm, wanted.events)
    _tell(booted, written(wanted.policy) if wanted.as_json else None)
    if failure is not None:
        raise failure
    recording.check(interrupted=interrupt.reached)
    return _status(booted, wanted.saving)


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


def _status(booted: Booted, saving: Saving | None) -> int:
    if booted.ran.interrupted:
        tell("interrupted")
        return INTERRUPTED
    if not booted.well:
        tell(f"pagegate: {booted.complaint()}")
        return 1
    if saving is not None and booted.saved is None:
        tell(f"pagegate: nothing was saved: {booted.ending()}")
        return 1
    return 0
