"""The summary of a run: its requests, how it ended, and its memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pagegate.cli import places
from pagegate.cli.printing import Pairs, counted, times
from pagegate.units import duration, size

if TYPE_CHECKING:
    from pagegate import Event, Report, Vm

_PAGE = 4096
_STRIP_CELLS = 64
_STYLE = {"converted": "green", "denied": "red", "stopped": "red", "failed": "red"}


def strip(vm: Vm, width: int) -> Text:
    """All of memory on one line of at most so many columns: private, shared and mixed. A hole in it is left out."""
    end = f" {size(vm.memory)}"
    pages = vm.memory // _PAGE
    cells = max(1, min(_STRIP_CELLS, pages, width - len("0 ") - len(end)))
    borders = [cell * pages // cells * _PAGE for cell in range(cells + 1)]
    text = Text("0 ")
    for first, last in pairwise(borders):
        state = _state(vm, first, last)
        text.append(*{"private": ("█", "magenta"), "shared": ("░", "cyan"), "mixed": ("▒", "yellow")}[state])
    return text.append(end)


def _state(vm: Vm, first: int, last: int) -> str:
    """The state of the bytes from the first to before the last of memory, counted without its hole."""
    states, before = set(), 0
    for gpa, count in vm.ram:
        start, end = max(first - before, 0), min(last - before, count)
        if start < end:
            states.add(vm.attributes.state(gpa + start, end - start))
        before += count
    return states.pop() if len(states) == 1 else "mixed"


def legend() -> Text:
    """What the marks of the strip mean."""
    legend = Text("  ")
    for mark, style, word in (("█", "magenta", "private"), ("░", "cyan", "shared"), ("▒", "yellow", "mixed")):
        legend.append(mark, style).append(f" {word}   ")
    legend.rstrip()
    return legend


def _how(event: Event) -> str:
    """How the pages that were converted differ from those that were asked for."""
    end, done_end = event.gpa + event.size, event.done_gpa + event.done_size
    if event.done_gpa <= event.gpa and end <= done_end:
        return "widened"
    return "narrowed" if event.gpa <= event.done_gpa and done_end <= end else "other pages"


def line(event: Event) -> Text:
    """One request on a line: what was asked for, and what came of it."""
    text = Text(f"  {event.kind:8} {event.gpa:#010x} + {size(event.size):8} to {event.to:7} → ")
    return text.append(outcome(event))


def outcome(event: Event) -> Text:
    """What came of a request, and how long that took."""
    text = Text(event.outcome, _STYLE.get(event.outcome, "yellow"))
    if event.outcome == "denied" or event.errno:
        text.append(f", errno {event.errno}")
    elif event.outcome == "converted" and (event.done_gpa, event.done_size) != (event.gpa, event.size):
        text.append(f" {event.done_gpa:#010x} + {size(event.done_size)}", "yellow").append(f" ({_how(event)})")
    # Only requests of a vCPU that a policy judges have a latency.
    return text if event.kind in _NOT_TIMED else text.append(f"  {duration(event.latency)}", "dim")


_NOT_TIMED = ("malformed", "unpaged", "device")
_DECIDED = {
    "converted": "converted",
    "denied": "denied",
    "retried": "to be tried again",
    "stopped": "stopped the run",
    "failed": "failed",
    "superseded": "superseded by another vCPU's",
    "discarded": "discarded",
}


@dataclass
class Ran:
    """A run that is over, with its requests counted."""

    vm: Vm
    report: Report
    seconds: float
    call: str | None = None
    """How the guest makes explicit requests, if that is known."""
    timeout: float | None = None
    interrupted: bool = False
    """Whether Ctrl-C ended it."""
    events: list[Event] = field(init=False)
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Counts the outcomes in the log."""
        self.events = list(self.vm.events)
        self.outcomes.update(event.outcome for event in self.events)

    @property
    def halted(self) -> bool:
        """Whether the guest halted, and not a policy whose ``Stop`` has "halt" as its reason."""
        return self.report.reason == "halt" and not self.outcomes["stopped"]

    def decided(self) -> str:
        """How often each decision was made."""
        return ", ".join(f"{self.outcomes[name]} {word}" for name, word in _DECIDED.items() if self.outcomes[name])

    def asked(self) -> str:
        """How often the policy was asked, and how. The log may have dropped some; the report has all."""
        report = self.report
        by = f" by {self.call}" if self.call else ""
        numbers = {
            "implicit": report.faults,
            f"explicit{by}": report.hypercalls,
            "for poisoned memory": report.poisons,
        }
        kinds = [f"{number} {kind}" for kind, number in numbers.items() if number]
        return f"{times(sum(numbers.values()))}: {', '.join(kinds)}" if kinds else "nothing"

    def latency(self) -> str:
        """The time of a request from exit to resume."""
        latency = self.report.latency
        return ", ".join(f"{name} {duration(getattr(latency, name))}" for name in ("p50", "p90", "p99", "max"))

    def ending(self) -> str:
        """Why the run ended before the guest halted, in one sentence."""
        last = self.events[-1:]
        what = f" ({last[0].kind}, {last[0].gpa:#x}, to {last[0].to})" if last else ""
        reason = self.report.reason
        if self.outcomes["stopped"]:
            return f"the policy stopped the run at a request{what}: {reason}"
        return {
            "denied": f"the policy denied what the guest had touched{what}, so the guest could not continue",
            "livelock": f"the same fault was repeated too often{what}, so the run was ended{self.of_no_use()}",
            "timeout": f"the guest did not halt within {self.timeout or 0:g} s",
            "shutdown": "the guest shut down: an exception that it cannot handle (triple fault)",
            "stopped": "Ctrl-C ended the run" if self.interrupted else "the run was stopped before the guest halted",
        }.get(reason, f"the run ended before the guest halted: {reason}")

    def of_no_use(self) -> str:
        """What the policy converted in place of what the last fault needs, if it did."""
        if not self.events or (last := self.events[-1]).outcome != "converted":
            return ""
        if last.done_gpa <= last.gpa < last.done_gpa + last.done_size and last.done_to == last.to:
            return ""
        done = f"{last.done_gpa:#x} + {size(last.done_size)} to {last.done_to}"
        return f": the policy converted {done}, which is not what the guest needs"


def summary(ran: Ran, width: int, note: str = "") -> Group:
    """The summary as text, for so many columns. ``note`` is added to the run's time."""
    vm, report = ran.vm, ran.report
    table = Pairs()
    table.add("asked", ran.asked())
    if report.malformed:
        table.add("", malformed(report))
    if decided := ran.decided():
        table.add("decided", decided)
    if dropped := vm.events.dropped - report.malformed_dropped:
        table.add("", f"and {counted(dropped, 'older request')}, which the log dropped")
    to_private, to_shared = size(report.bytes_to_private), size(report.bytes_to_shared)
    table.add("done", f"{to_private} to private, {to_shared} to shared, by {vm.enforcement}")
    usage = vm.memory_usage()
    at_most = "" if usage.exact else "at most "
    table.add("resident", f"{size(usage.shared)} shared, {at_most}{size(usage.private)} private")
    if report.requests:
        table.add("latency", f"{ran.latency()} (from exit to resume)")
    table.add("ended", Text(f"{report.reason} after {ran.seconds:.2f} s{note}"))
    for first, place in enumerate(places.lines(vm, report)):
        table.add("" if first else "at", Text(place))
    return Group(Text(), strip(vm, width), legend(), Text(), table)


def malformed(report: Report) -> str:
    """Says how many malformed requests there were, where there were some."""
    dropped = f" ({report.malformed_dropped} of them are not in the log)" if report.malformed_dropped else ""
    return f"and {report.malformed} malformed, which no policy saw{dropped}"


def event_facts(event: Event) -> dict[str, Any]:
    """A request, for JSON."""
    names = ("kind", "gpa", "size", "to", "outcome", "done_gpa", "done_size", "done_to", "errno", "latency")
    return {name: getattr(event, name) for name in names}


def facts(ran: Ran, policy: str) -> dict[str, Any]:
    """A run, for JSON."""
    vm, report = ran.vm, ran.report
    names = (
        "reason",
        "requests",
        "conversions",
        "denied",
        "retries",
        "faults",
        "hypercalls",
        "malformed",
        "malformed_dropped",
    )
    counts = ("bytes_to_private", "bytes_to_shared")
    usage = vm.memory_usage()
    return {
        "enforcement": vm.enforcement,
        **({"explicit_by": ran.call} if ran.call else {}),
        "policy": policy,
        **{name: getattr(report, name) for name in (*names, *counts)},
        "seconds": ran.seconds,
        "outcomes": dict(ran.outcomes),
        "latency": {name: getattr(report.latency, name) for name in ("p50", "p90", "p99", "max")},
        "resident": {"shared": usage.shared, "private": usage.private, "exact": usage.exact},
        "places": places.facts(vm),
        "map": [{"gpa": gpa, "size": size, "state": state} for gpa, size, state in vm.attributes.runs()],
    }
