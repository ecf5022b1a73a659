"""`pagegate replay`: puts the requests of a trace to other policies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from pagegate.cli.parameters import Size, policy_options
from pagegate.cli.policy_argument import PolicyName, made
from pagegate.cli.printing import Rows, put, put_line
from pagegate.cli.printing import console as terminal_on
from pagegate.trace import read
from pagegate.trace import replay as replay_trace
from pagegate.units import size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pagegate import Event, guests
    from pagegate.loading.expression import Expression
    from pagegate.trace import Difference, Judged, Replay

_COUNTS = ("converted", "denied", "retried", "stopped", "discarded")
_MIB = 1 << 20
_KEPT = 100_000
"""Differences that are folded at most."""
_BYTES = {"bytes_to_private": "to private", "bytes_to_shared": "to shared", "peak_shared": "shared at most"}


@click.command(short_help="Puts recorded requests to another policy.")
@click.argument("events", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option(
    "-p",
    "--policy",
    "named",
    type=PolicyName(),
    multiple=True,
    help="A policy, as for `pagegate run`. Give several to compare them.",
)
@policy_options
@click.option("--memory", type=Size(), help="Guest memory, for a trace without this metadata.")
@click.option("--initial", type=click.Choice(["private", "shared"]), help="The state of all pages at first, likewise.")
@click.option(
    "--show",
    type=click.IntRange(0, (1 << 63) - 1),
    default=20,
    show_default=True,
    help="Differences to list; the same one for neighbouring pages counts once.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(  # noqa: PLR0913 - one for each option
    *,
    events: Path,
    named: tuple[Expression, ...],
    options: dict[str, str],
    memory: int | None,
    initial: guests.State | None,
    show: int,
    as_json: bool,
) -> int:
    """Puts the requests in EVENTS to another policy, in order and without KVM, and says what would differ.

    EVENTS is a file that `pagegate run --events` wrote, or any Parquet or Arrow IPC file with its columns. The requests
    are always the recorded ones: what the guest would have asked for after another decision is not known.
    """
    if not named:
        raise click.UsageError(
            "name a policy to put the requests to, as -p mine.py or -p 'Quota(8M)', or several to compare them; "
            f"`pagegate events {events}` shows what the trace has"
        )
    if options and len(named) > 1:
        raise click.UsageError("-o goes with one policy: with several, name functions that take no arguments")
    try:
        trace = read(events, memory=memory, initial=initial)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    judges = [made(each, options) for each in named]
    names = _names(named)
    found = replay_trace(trace, *judges, keep=show if as_json else _KEPT)
    if as_json:
        click.echo(json.dumps({**_facts(found, names), "truncated": trace.truncated}))
    else:
        _print(found, names, show, truncated=trace.truncated)
    return 0


def _names(named: tuple[Expression, ...]) -> list[str]:
    """Names for the policies: without the folder, unless two would be the same."""
    for short in (True, False):
        names = [_name(each, short=short) for each in named]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]


def _name(policy: Expression, *, short: bool) -> str:
    return str(policy).replace(str(policy.file), policy.file.name) if short and policy.file else str(policy)


def _judged(judged: Judged) -> dict[str, Any]:
    return {name: getattr(judged, name) for name in (*_COUNTS, *_BYTES, "ping_pongs", "ends", "differences")}


def _facts(found: Replay, names: list[str]) -> dict[str, Any]:
    return {
        "requests": found.requests,
        "missing": found.missing,
        "different": found.different,
        "recorded": _judged(found.recorded),
        "policies": [{"policy": name, **_judged(judged)} for name, judged in zip(names, found.policies, strict=True)],
        "differences": [
            {
                **{name: getattr(each.event, name) for name in ("sequence", "kind", "vcpu", "gpa", "size", "to")},
                "recorded": _recorded(each.event),
                "decisions": [repr(decision) for decision in each.decisions],
            }
            for each in found.differences
        ],
    }


def _recorded(event: Event) -> str:
    """The recorded decision, in the form of a decision's repr."""
    return {
        "convert": _converted(event),
        "deny": f"Deny(errno={event.decision_errno})",
        "retry": "Retry()",
        "discard": "Discard()",
        "stop": "Stop(...)",
    }.get(event.decision, "none, the policy failed")


def _converted(event: Event) -> str:
    parts = [f'to="{event.decision_to}"'] if event.decision_to != event.to else []
    if event.decision_gpa != event.gpa:
        parts.append(f"gpa={event.decision_gpa:#x}")
    if event.decision_size != event.size:
        parts.append(f"size={event.decision_size:#x}")
    if event.decision_prefault:
        parts.append("prefault=True")
    if not event.decision_discard:
        parts.append("discard=False")
    return f"Convert({', '.join(parts)})"


def _print(found: Replay, names: list[str], show: int, *, truncated: bool) -> None:
    console = terminal_on()
    missing = f", and {found.missing} are missing from the trace" if found.missing else ""
    put_line(console, Text(f"{found.requests} requests{missing}; {found.different} would be decided otherwise"))
    if truncated:
        console.print("[yellow]the trace ends in the middle: its writer was killed[/yellow]")
    console.print()
    put(console, _table(found, names))
    told = _folded(found.differences)[:show]
    for each in told:
        console.print()
        put_line(console, Text(f"  {each.heading()}"))
        width = max(map(len, ("recorded", *names)))
        for name, decision in zip(("recorded", *names), each.decided, strict=True):
            put_line(console, Text(f"    {name:{width}}  {decision}"))
    if show and (more := found.different - sum(each.count for each in told)) > 0:
        console.print(f"\n  and {more} more (--show)")


@dataclass
class _Fold:
    """Differences one after the other that are the same, for pages that lie next to each other."""

    first: Event
    last: Event
    gpa: int
    end: int
    decided: list[str]
    """What was decided, as recorded and by each policy."""
    vcpus: set[int]
    count: int = 1

    def takes(self, event: Event, decided: list[str]) -> bool:
        """Adds one that is the same, and says whether it is."""
        end = event.gpa + event.size
        same = (event.kind, event.to, decided) == (self.first.kind, self.first.to, self.decided)
        if not same or event.gpa > self.end or end < self.gpa:
            return False
        self.last, self.count = event, self.count + 1
        self.gpa, self.end = min(self.gpa, event.gpa), max(self.end, end)
        self.vcpus.add(event.vcpu)
        return True

    def heading(self) -> str:
        """What was asked."""
        if self.count == 1:
            which = f"event {self.first.sequence}: vCPU {self.first.vcpu}"
        else:
            vcpus = ", ".join(map(str, sorted(self.vcpus)))
            which = f"{self.count} events, {self.first.sequence} to {self.last.sequence}: vCPU {vcpus}"
        return f"{which} {self.first.kind} {self.gpa:#x} + {size(self.end - self.gpa)} to {self.first.to}"


def _folded(differences: Iterable[Difference]) -> list[_Fold]:
    folds: list[_Fold] = []
    for each in differences:
        event, decided = each.event, [_recorded(each.event), *map(repr, each.decisions)]
        if not folds or not folds[-1].takes(event, decided):
            folds.append(_Fold(event, event, event.gpa, event.gpa + event.size, decided, {event.vcpu}))
    return folds


def _size(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB" if count >= 10 * _MIB else size(count)


def _table(found: Replay, names: list[str]) -> Rows:
    columns = [found.recorded, *found.policies]
    table = Rows("", "recorded", *names, right=range(1, len(columns) + 1))
    for name in _COUNTS:
        if any(getattr(judged, name) for judged in columns):
            table.add(name, *(str(getattr(judged, name)) for judged in columns))
    for name, what in _BYTES.items():
        table.add(what, *(_size(getattr(judged, name)) for judged in columns))
    table.add("ping-pongs", *(str(judged.ping_pongs) for judged in columns))
    ends = ("-" if judged.ends is None else f"event {judged.ends}" for judged in columns)
    table.add("would end the run", *ends)
    table.add("other than recorded", "", *(str(judged.differences) for judged in found.policies))
    return table
