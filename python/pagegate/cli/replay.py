"""`pagegate replay`: puts the requests of a trace to other policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagegate.cli.parameters import Size, policy_options
from pagegate.cli.policy_argument import PolicyFile
from pagegate.cli.summary import size
from pagegate.loading import policy_file
from pagegate.trace import read
from pagegate.trace import replay as replay_trace

if TYPE_CHECKING:
    from pagegate import Event, guests
    from pagegate.trace import Difference, Judged, Replay

_COUNTS = ("converted", "denied", "retried", "stopped", "discarded")
_MIB = 1 << 20
_BYTES = {"bytes_to_private": "to private", "bytes_to_shared": "to shared", "peak_shared": "shared at most"}


@click.command(short_help="Puts recorded requests to another policy.")
@click.argument("events", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option(
    "-p",
    "--policy",
    "named",
    type=PolicyFile(),
    required=True,
    multiple=True,
    help="The policy file. Give several to compare them.",
)
@policy_options
@click.option("--memory", type=Size(), help="Guest memory, for a trace without this metadata.")
@click.option("--initial", type=click.Choice(["private", "shared"]), help="The state of all pages at first, likewise.")
@click.option("--show", type=click.IntRange(min=0), default=20, show_default=True, help="Differences to list.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay(  # noqa: PLR0913 - one for each option
    *,
    events: Path,
    named: tuple[tuple[Path, str | None], ...],
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
    if options and len(named) > 1:
        raise click.UsageError("-o goes with one policy: with several, name functions that take no arguments")
    try:
        trace = read(events, memory=memory, initial=initial)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    judges = [policy_file.load(file, name, options) for file, name in named]
    names = _names(named)
    found = replay_trace(trace, *judges, keep=show)
    if as_json:
        click.echo(json.dumps({**_facts(found, names), "truncated": trace.truncated}))
    else:
        _print(found, names, truncated=trace.truncated)
    return 0


def _names(named: tuple[tuple[Path, str | None], ...]) -> list[str]:
    """Names for the policies: without the folder, unless two would be the same."""
    for short in (True, False):
        names = [f"{file.name if short else file}{f':{name}' if name else ''}" for file, name in named]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]


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


def _print(found: Replay, names: list[str], *, truncated: bool) -> None:
    console = Console(highlight=False)
    missing = f", and {found.missing} are missing from the trace" if found.missing else ""
    console.print(f"{found.requests} requests{missing}; {found.different} would be decided otherwise")
    if truncated:
        console.print("[yellow]the trace ends in the middle: its writer was killed[/yellow]")
    console.print()
    console.print(_table(found, names))
    for each in found.differences:
        console.print(_line(each, names), soft_wrap=True)
    if found.different > len(found.differences) > 0:
        console.print(f"  and {found.different - len(found.differences)} more (--show)")


def _size(count: int) -> str:
    return f"{count / _MIB:,.1f} MiB" if count >= 10 * _MIB else size(count)


def _table(found: Replay, names: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column()
    columns = [found.recorded, *found.policies]
    for heading in ("recorded", *names):
        table.add_column(Text(heading, overflow="fold"), justify="right")
    for name in _COUNTS:
        if any(getattr(judged, name) for judged in columns):
            table.add_row(name, *(str(getattr(judged, name)) for judged in columns))
    for name, what in _BYTES.items():
        table.add_row(what, *(_size(getattr(judged, name)) for judged in columns))
    table.add_row("ping-pongs", *(str(judged.ping_pongs) for judged in columns))
    ends = ("-" if judged.ends is None else f"event {judged.ends}" for judged in columns)
    table.add_row("would end the run", *ends)
    table.add_row("other than recorded", "", *(str(judged.differences) for judged in found.policies))
    return table


def _line(each: Difference, names: list[str]) -> Text:
    event = each.event
    text = Text(f"\n  event {event.sequence}: vCPU {event.vcpu} {event.kind} {event.gpa:#x} + {size(event.size)} ")
    text.append(f"to {event.to}\n")
    width = max(map(len, ("recorded", *names)))
    decided = [("recorded", _recorded(event)), *zip(names, map(repr, each.decisions), strict=True)]
    text.append("\n".join(f"    {name:{width}}  {decision}" for name, decision in decided))
    return text
