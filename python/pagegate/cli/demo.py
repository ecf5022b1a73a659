"""`pagegate demo`: a bundled guest asks, a Python file judges, and you watch."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pagegate import Event, Report, Vm, guests, script
from pagegate.demo import guest as demo_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagegate import Io
    from pagegate.demo.guest import Guest

DEFAULT_POLICY = Path(demo_guest.__file__).with_name("policy.py")
_STRIP_CELLS = 64
_PACE_SECONDS = 0.4
_TIMEOUT_SECONDS = 60.0
_STYLE = {"converted": "green", "denied": "red", "stopped": "red", "failed": "red"}


def _size(size: int) -> str:
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"


def _nanoseconds(value: int) -> str:
    return f"{value / 1000:.1f} µs" if value < 10**6 else f"{value / 10**6:.2f} ms"


def strip(vm: Vm) -> Text:
    """All of memory on one line: private, shared and mixed parts."""
    cell = vm.memory // _STRIP_CELLS
    text = Text("0 ")
    for start in range(0, cell * _STRIP_CELLS, cell):
        state = vm.attributes.state(start, cell)
        text.append(*{"private": ("█", "magenta"), "shared": ("░", "cyan"), "mixed": ("▒", "yellow")}[state])
    return text.append(f" {_size(vm.memory)}")


def _legend() -> Text:
    legend = Text("  ")
    for mark, style, word in (("█", "magenta", "private"), ("░", "cyan", "shared"), ("▒", "yellow", "mixed")):
        legend.append(mark, style).append(f" {word}   ")
    return legend


def _how(event: Event) -> str:
    """What the policy made of the pages that were asked for, given that it converted others."""
    end, done_end = event.gpa + event.size, event.done_gpa + event.done_size
    if event.done_gpa <= event.gpa and end <= done_end:
        return "widened"
    return "narrowed" if event.gpa <= event.done_gpa and done_end <= end else "other pages"


def _line(event: Event) -> Text:
    """Asked, decided, done."""
    text = Text(f"  {event.kind:8} {event.gpa:#010x} + {_size(event.size):8} to {event.to:7} → ")
    text.append(event.outcome, _STYLE.get(event.outcome, "yellow"))
    if event.outcome == "denied" or event.errno:
        text.append(f", the guest finds errno {event.errno}")
    elif event.outcome == "converted" and (event.done_gpa, event.done_size) != (event.gpa, event.size):
        text.append(f" {event.done_gpa:#010x} + {_size(event.done_size)}", "yellow").append(f" ({_how(event)})")
    return text.append(f"  {_nanoseconds(event.latency)}", "dim")


@dataclass
class _Watch:
    """Prints what happens while it happens."""

    vm: Vm
    console: Console
    pace: float
    seen: int = 0
    paused: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def phase(self, io: Io) -> None:
        """The guest says what it does next. Waiting here is outside of every request, so it spoils no latency."""
        begin = time.monotonic()
        self.catch_up()
        if io.data[0] < len(demo_guest.PHASES):
            self.console.print(f"[bold]{io.data[0] + 1}. {demo_guest.PHASES[io.data[0]]}[/bold]", soft_wrap=True)
        time.sleep(self.pace)
        self.paused += time.monotonic() - begin

    def catch_up(self) -> None:
        """Prints the events since the last time."""
        with self.lock:
            for event in self.vm.events.since(self.seen):
                self.console.print(_line(event), soft_wrap=True)
                self.seen = event.sequence + 1


@contextmanager
def _live(watch: _Watch) -> Iterator[None]:
    def render() -> Text:
        return strip(watch.vm)

    if not watch.console.is_terminal or watch.console.quiet:
        yield
        return
    with Live(console=watch.console, get_renderable=render, refresh_per_second=12, transient=True):
        yield


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
class _Ran:
    """A run that is over, and what there is to say about it."""

    vm: Vm
    report: Report
    call: str
    seconds: float
    events: list[Event] = field(init=False)
    kinds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events = list(self.vm.events)
        self.kinds.update(event.kind for event in self.events)
        self.outcomes.update(event.outcome for event in self.events)

    @property
    def halted(self) -> bool:
        """Whether the guest came to its end; a policy's Stop may be called anything."""
        return self.report.reason == "halt" and not self.outcomes["stopped"]

    def ending(self) -> str:
        """Why the guest did not come to its end, in one sentence."""
        last = self.events[-1:]
        what = f" ({last[0].kind}, {last[0].gpa:#x}, to {last[0].to})" if last else ""
        reason = self.report.reason
        if self.outcomes["stopped"]:
            return f"the policy stopped the run at a request{what}: {reason}"
        return {
            "denied": f"the policy denied what the guest had touched{what}, so the guest could not go on",
            "livelock": f"the same fault came again and again{what}, so the run was ended",
            "timeout": f"the guest did not come to its end within {_TIMEOUT_SECONDS:.0f} s",
            "shutdown": "the guest shut down: it met an exception that it cannot handle",
            "stopped": "the run was stopped before the guest came to its end",
        }.get(reason, f"the run ended before the guest did: {reason}")


def _summary(ran: _Ran, *, paused: bool) -> Group:
    vm, report = ran.vm, ran.report
    table = Table(box=None, show_header=False, pad_edge=False)
    kinds = [f"{ran.kinds['implicit']} implicit", f"{ran.kinds['explicit']} explicit by {ran.call}"]
    if ran.kinds["poison"]:
        kinds.append(f"{ran.kinds['poison']} for poisoned memory")
    table.add_row("asked", f"{ran.kinds.total()} times: {', '.join(kinds)}")
    table.add_row("", f"and {report.malformed} malformed, which no policy saw")
    table.add_row(
        "decided", ", ".join(f"{ran.outcomes[name]} {word}" for name, word in _DECIDED.items() if ran.outcomes[name])
    )
    if vm.events.dropped:
        table.add_row("", f"and {vm.events.dropped} older requests, of which no record was kept")
    to_private, to_shared = _size(report.bytes_to_private), _size(report.bytes_to_shared)
    table.add_row("done", f"{to_private} to private, {to_shared} to shared, by {vm.enforcement}")
    usage = vm.memory_usage()
    at_most = "" if usage.exact else "at most "
    table.add_row("resident", f"{_size(usage.shared)} shared, {at_most}{_size(usage.private)} private")
    quantiles = ("p50", "p90", "p99", "max")
    latency = ", ".join(f"{name} {_nanoseconds(getattr(report.latency, name))}" for name in quantiles)
    table.add_row("latency", latency)
    pauses = ", the demo's pauses not counted" if paused else ""
    table.add_row("ended", Text(f"{report.reason} after {ran.seconds:.2f} s{pauses}"))
    return Group(Text(), strip(vm), _legend(), Text("  latency is from exit to resume\n", "dim"), table)


def _event(event: Event) -> dict[str, Any]:
    names = ("kind", "gpa", "size", "to", "outcome", "done_gpa", "done_size", "done_to", "errno", "latency")
    return {name: getattr(event, name) for name in names}


def _object(ran: _Ran, policy: str) -> dict[str, Any]:
    vm, report = ran.vm, ran.report
    names = ("reason", "requests", "conversions", "denied", "retries", "faults", "hypercalls", "malformed")
    counts = ("bytes_to_private", "bytes_to_shared")
    usage = vm.memory_usage()
    return {
        "enforcement": vm.enforcement,
        "explicit_by": ran.call,
        "policy": policy,
        **{name: getattr(report, name) for name in (*names, *counts)},
        "seconds": ran.seconds,
        "outcomes": dict(ran.outcomes),
        "latency": {name: getattr(report.latency, name) for name in ("p50", "p90", "p99", "max")},
        "resident": {"shared": usage.shared, "private": usage.private, "exact": usage.exact},
        "map": [{"gpa": gpa, "size": size, "state": state} for gpa, size, state in vm.attributes.runs()],
        "events": [_event(event) for event in ran.events],
        "guest_failures": ran.failures,
    }


def _run(vm: Vm, guest: Guest, watch: _Watch) -> Report:
    vm.on_io(demo_guest.PHASE_PORT, watch.phase)
    guest.script.start(vm)
    with _live(watch):
        try:
            return vm.run(timeout=_TIMEOUT_SECONDS)
        finally:
            watch.catch_up()


class _PolicyFile(click.ParamType[tuple[Path, str | None]]):
    """FILE, or FILE:NAME."""

    name = "FILE[:NAME]"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[Path, str | None]:
        if isinstance(value, tuple):
            return value
        file, name = Path(value), None
        if not file.exists():
            before, colon, after = str(value).rpartition(":")
            if colon and after.isidentifier():
                file, name = Path(before), after
        if not file.exists():
            self.fail(f"there is no file {file}", param, ctx)
        if file.is_dir():
            self.fail(f"{file} is a directory", param, ctx)
        return file, name


@click.command()
@click.option(
    "-p",
    "--policy",
    "named",
    type=_PolicyFile(),
    help="The Python file that judges, and which object or class in it. Default: the bundled file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def demo(*, named: tuple[Path, str | None] | None, as_json: bool) -> int:
    """A bundled guest asks for conversions in every way there is; a Python file judges them."""
    file, name = named or (DEFAULT_POLICY, None)
    policy = f"{file}:{name}" if name else str(file)
    judge = script.load(file, name)
    console = Console(highlight=False, quiet=as_json)
    call: guests.Call = "hypercall" if guests.hypercall_completes() else "doorbell"
    guest = demo_guest.build(call)
    with Vm(demo_guest.MEMORY, policy=judge, shared_bit=demo_guest.SHARED_BIT, initial="private") as vm:
        console.print(Text(f"policy {policy}"), soft_wrap=True)
        console.print(f"{_size(vm.memory)} of guest memory, states enforced by {vm.enforcement}\n")
        watch = _Watch(vm, console, pace=_PACE_SECONDS if console.is_terminal and not as_json else 0.0)
        report = _run(vm, guest, watch)
        ran = _Ran(vm, report, call, max(0.0, report.seconds - watch.paused))
        if ran.halted:
            ran.failures = guest.failures(vm, bundled=named is None)
        if as_json:
            click.echo(json.dumps(_object(ran, policy)))
        else:
            console.print(_summary(ran, paused=watch.pace > 0))
    for failure in ran.failures:
        click.echo(f"pagegate: the guest found {failure}", err=True)
    if not ran.halted:
        click.echo(f"pagegate: {ran.ending()}", err=True)
    return 0 if ran.halted and not ran.failures else 1
