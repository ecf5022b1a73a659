"""`pagegate events`: prints a trace, or sums it up."""

from __future__ import annotations

import csv
import fnmatch
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from pagegate._core import event_words, whole_number
from pagegate.cli import symbols
from pagegate.cli.parameters import Size
from pagegate.cli.printing import Rows, counted, put, put_line
from pagegate.cli.printing import console as terminal_on
from pagegate.cli.summary import outcome
from pagegate.cli.telling import tell
from pagegate.trace import read, synthetic
from pagegate.units import size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pagegate import Event, guests
    from pagegate.trace import Trace

_PAGE = 4096
_WORDS = event_words()
_KEYS = ("symbol", "page", "kind", "to", "size", "decision", "outcome", "vcpu")
_ROWS = 40


class _Span(click.ParamType[range]):
    """A range of numbers: N, N-M (both included), N- or N+LENGTH."""

    name = "N|N-M|N+LENGTH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> range:
        """Reads it."""
        if isinstance(value, range):
            return value
        first, plus, length = str(value).partition("+")
        begin, dash, last = str(value).partition("-")
        try:
            if plus:
                return range(whole_number(first), whole_number(first) + whole_number(length))
            if dash:
                return range(whole_number(begin), whole_number(last) + 1 if last else 1 << 64)
            return range(whole_number(begin), whole_number(begin) + 1)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@dataclass
class _Wanted:
    """Which events are wanted: those that every given condition holds for."""

    gpa: range | None
    size: range | None
    vcpu: range | None
    kind: tuple[str, ...]
    to: str | None
    decision: tuple[str, ...]
    outcome: tuple[str, ...]
    symbol: str | None

    def of(self, events: Iterable[Event], names: dict[int, str]) -> Iterator[Event]:
        """Those of these events."""
        return (each for each in events if self._is(each, names))

    def _is(self, event: Event, names: dict[int, str]) -> bool:
        return (
            (self.gpa is None or (event.gpa < self.gpa.stop and self.gpa.start < event.gpa + event.size))
            and (self.size is None or event.size in self.size)
            and (self.vcpu is None or event.vcpu in self.vcpu)
            and (not self.kind or event.kind in self.kind)
            and (self.to is None or event.to == self.to)
            and (not self.decision or event.decision in self.decision)
            and (not self.outcome or event.outcome in self.outcome)
            and (self.symbol is None or fnmatch.fnmatchcase(_function(event, names), self.symbol))
        )


@dataclass
class _Sum:
    """What events that have something in common add up to."""

    times: int = 0
    asked: int = 0
    changed: int = 0
    outcomes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    longest: int = 0

    def add(self, event: Event) -> None:
        """Counts one more."""
        self.times += 1
        self.asked += event.size
        self.changed += event.changed
        self.outcomes[event.outcome] += 1
        self.longest = max(self.longest, event.latency)


@click.command(short_help="Prints a trace, or sums it up.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option("--gpa", type=_Span(), help="Only requests that have a page there, such as 0x3000000+1M.")
@click.option("--size", "sizes", type=_Span(), help="Only requests of so many bytes, such as 4K or 2M-.")
@click.option("--vcpu", type=_Span(), help="Only those of these vCPUs.")
@click.option("--kind", type=click.Choice(_WORDS["kind"]), multiple=True)
@click.option("--to", type=click.Choice(["private", "shared"]), help="Only those that ask for this state.")
@click.option("--decision", type=click.Choice(_WORDS["decision"]), multiple=True)
@click.option("--outcome", type=click.Choice(_WORDS["outcome"]), multiple=True)
@click.option(
    "--symbol", metavar="PATTERN", help="Only those of these functions of the guest's kernel, such as 'swiotlb*'."
)
@click.option(
    "--by",
    "keys",
    type=click.Choice(_KEYS),
    multiple=True,
    help="Print sums by this in place of events. Several nest. Of a request for several pages the first counts.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, all columns.")
@click.option("--jsonl", "as_jsonl", is_flag=True, help="Print one JSON object on each line, all columns.")
@click.option("--limit", type=click.IntRange(0), help=f"Rows at most. Default: all events, the {_ROWS} largest sums.")
@click.option("--memory", type=Size(), help="Guest memory, for a trace without this metadata.")
@click.option("--initial", type=click.Choice(["private", "shared"]), help="The state of all pages at first, likewise.")
def events(  # noqa: PLR0913 - one for each option
    *,
    file: Path,
    gpa: range | None,
    sizes: range | None,
    vcpu: range | None,
    kind: tuple[str, ...],
    to: str | None,
    decision: tuple[str, ...],
    outcome: tuple[str, ...],
    symbol: str | None,
    keys: tuple[str, ...],
    as_csv: bool,
    as_jsonl: bool,
    limit: int | None,
    memory: int | None,
    initial: guests.State | None,
) -> int:
    """Prints the events in FILE, which `pagegate run --events` wrote: one on a line, or sums of them.

    Options that choose events must all hold; of one that is given several times, one value must. Who asked (--symbol)
    is known of a Linux guest that `pagegate boot --events` recorded: FILE.symbols.json has the names.
    """
    if as_csv and as_jsonl:
        raise click.UsageError("name --csv or --jsonl, not both")
    form = "csv" if as_csv else "jsonl" if as_jsonl else None
    try:
        trace = read(file, memory=memory, initial=initial)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    names = symbols.read(file)
    wanted = _Wanted(gpa, sizes, vcpu, kind, to, decision, outcome, symbol)
    found = wanted.of(trace, names)
    if keys:
        _print_sums(found, keys, names, form, limit)
    else:
        _print_events(found, names, form, limit, trace)
    if trace.truncated:
        tell("pagegate: the trace ends in the middle: its writer was killed")
    return 0


def _function(event: Event, names: dict[int, str]) -> str:
    """The kernel's function that asked, without an offset; empty if it is not known."""
    return names.get(event.rip, "").partition("+")[0]


def _print_events(
    found: Iterator[Event], names: dict[int, str], form: str | None, limit: int | None, trace: Trace
) -> None:
    shown = found if limit is None else islice(found, limit)
    if form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(_columns())
        writer.writerows(_all_of(event, names).values() for event in shown)
    elif form == "jsonl":
        for event in shown:
            click.echo(json.dumps(_all_of(event, names)))
    else:
        lines = list(shown)
        # From the first event of the trace, whichever are chosen.
        _print_lines(lines, names, trace[0].time if lines else 0)
        more = sum(1 for _ in found)
        if more:
            put_line(terminal_on(), Text(f"and {counted(more, 'more event')} (--limit)"))
        elif not lines:
            tell(f"pagegate: none of the {counted(len(trace), 'event')} is chosen by these options")


def _columns() -> list[str]:
    """The names of all columns, which any event has."""
    return list(_all_of(synthetic(1)[0], {}))


def _all_of(event: Event, names: dict[int, str]) -> dict[str, Any]:
    return {**event.asdict(), "symbol": names.get(event.rip)}


def _print_lines(found: list[Event], names: dict[int, str], begun: int) -> None:
    """One line for each, which an ordinary request's is at 80 columns. ``begun``: the time that counts as 0."""
    if not found:
        return
    out = terminal_on()
    number = max(len("event"), len(str(found[-1].sequence)))
    seconds = max(8, len(f"{(found[-1].time - begun) / 1e9:.6f}"))
    who = max(len("vCPU"), *(len(str(event.device or "")) for event in found))
    kinds = max(8, *(len(event.kind) for event in found))
    kind, who_asked = f"{'kind':{kinds}}", f"{'vCPU':{who}}"
    heading = f"{'event':>{number}} {'seconds':>{seconds}} {who_asked} {kind} {'gpa':10} {'size':7} {'to':7} outcome"
    put_line(out, Text(heading, "dim"))
    for event in found:
        text = Text(f"{event.sequence:{number}} {(event.time - begun) / 1e9:{seconds}.6f} ")
        # Of a device's access there is no vCPU.
        text.append(f"{event.device or event.vcpu:>{who}} ")
        text.append(f"{event.kind:{kinds}} {event.gpa:#010x} {size(event.size):>7} {event.to:7} ").append(
            outcome(event)
        )
        if function := names.get(event.rip):
            text.append(f"  {function}")
        put_line(out, text)


def _key(event: Event, name: str, names: dict[int, str]) -> str:
    if name == "symbol":
        return _function(event, names) or "?"
    if name == "page":
        return f"{event.gpa // _PAGE * _PAGE:#x}"
    return size(event.size) if name == "size" else str(getattr(event, name))


def _print_sums(
    found: Iterator[Event], keys: tuple[str, ...], names: dict[int, str], form: str | None, limit: int | None
) -> None:
    sums: dict[tuple[str, ...], _Sum] = defaultdict(_Sum)
    for event in found:
        sums[tuple(_key(event, name, names) for name in keys)].add(event)
    ranked = sorted(sums.items(), key=lambda each: (-each[1].times, each[0]))
    shown = ranked[: limit if form or limit is not None else _ROWS]
    facts = [
        {
            **dict(zip(keys, key, strict=True)),
            "times": each.times,
            "asked": each.asked,
            "changed": each.changed,
            "longest": each.longest,
            "outcomes": dict(each.outcomes),
        }
        for key, each in shown
    ]
    if form == "jsonl":
        for row in facts:
            click.echo(json.dumps(row))
        return
    if form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow([*keys, "times", "asked", "changed", "longest"])
        writer.writerows([*key, each.times, each.asked, each.changed, each.longest] for key, each in shown)
        return
    numbers = range(len(keys), len(keys) + 3)
    headings = ["first page" if name == "page" else name for name in keys]
    table = Rows(*headings, "times", "asked for", "changed", "outcomes", right=numbers)
    for key, each in shown:
        outcomes = ", ".join(f"{count} {name}" for name, count in each.outcomes.items())
        table.add(*key, str(each.times), size(each.asked), size(each.changed), outcomes)
    out = terminal_on()
    put(out, table)
    if len(ranked) > len(shown):
        put_line(out, Text(f"and {len(ranked) - len(shown)} more rows (--limit)"))
