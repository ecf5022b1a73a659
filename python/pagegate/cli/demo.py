"""`pagegate demo`: a bundled guest under a Python policy; each request is shown as it comes."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.live import Live
from rich.text import Text

from pagegate import Vm, guests
from pagegate.cli import streams
from pagegate.cli.life import Life
from pagegate.cli.policy_argument import made, policy_option
from pagegate.cli.printing import console as terminal_on
from pagegate.cli.printing import put, put_line
from pagegate.cli.summary import Ran, event_facts, facts, strip, summary
from pagegate.cli.telling import tell
from pagegate.demo import guest as demo_guest
from pagegate.loading.expression import File
from pagegate.units import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from pagegate import Io, Report
    from pagegate.demo.guest import Guest
    from pagegate.loading.expression import Expression

DEFAULT_POLICY = Path(demo_guest.__file__).with_name("policy.py")
_PACE_SECONDS = 0.4
_TIMEOUT_SECONDS = 60.0


@dataclass
class _Phases:
    """Prints what the guest does next, with a pause, after the requests that came before."""

    console: Console
    life: Life
    pace: float
    paused: float = 0.0

    def next(self, io: Io) -> None:
        """The guest says what it does next. The pause here is between requests and adds to no latency."""
        begin = time.monotonic()
        self.life.catch_up()
        if io.data[0] < len(demo_guest.PHASES):
            put_line(self.console, Text(f"{io.data[0] + 1}. {demo_guest.PHASES[io.data[0]]}", "bold"))
        time.sleep(self.pace)
        self.paused += time.monotonic() - begin


@contextmanager
def _live(vm: Vm, console: Console) -> Iterator[None]:
    def render() -> Text:
        return strip(vm, console.width)

    if not console.is_terminal or console.quiet:
        yield
        return
    with Live(console=console, get_renderable=render, refresh_per_second=12, transient=True):
        yield


def _run(vm: Vm, guest: Guest, phases: _Phases) -> Report:
    vm.on_io(demo_guest.PHASE_PORT, phases.next)
    guest.script.start(vm)
    streams.hurry(time.monotonic() + _TIMEOUT_SECONDS)
    with _live(vm, phases.console):
        try:
            return vm.run(timeout=_TIMEOUT_SECONDS)
        finally:
            phases.life.catch_up()


@click.command(short_help="Runs a bundled guest under a Python policy.")
@policy_option("the bundled file")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")
def demo(*, policy: Expression | None, as_json: bool) -> int:
    """Runs a bundled guest that makes explicit, implicit and malformed requests; a Python file judges them.

    Without --policy it is the bundled file, which is a good one to copy.
    """
    asked = policy or File(DEFAULT_POLICY, None)
    judge = made(asked, {})
    console = terminal_on(quiet=as_json)
    call: guests.Call = "hypercall" if guests.hypercall_completes() else "doorbell"
    guest = demo_guest.build(call)
    with Vm(demo_guest.MEMORY, policy=judge, shared_bit=demo_guest.SHARED_BIT, initial="private") as vm:
        put_line(console, Text(f"policy {asked}"))
        console.print(f"{size(vm.memory)} of guest memory, states enforced by {vm.enforcement}\n")
        # It is not entered: a thread that prints takes the GIL from hooks, and requests would take milliseconds.
        life = Life(vm, partial(put_line, console), each=True, news=lambda: True)
        phases = _Phases(console, life, pace=_PACE_SECONDS if console.is_terminal and not as_json else 0.0)
        report = _run(vm, guest, phases)
        ran = Ran(vm, report, max(0.0, report.seconds - phases.paused), call, _TIMEOUT_SECONDS)
        failures = guest.failures(vm, bundled=policy is None) if ran.halted else []
        if as_json:
            events = [event_facts(event) for event in ran.events]
            click.echo(json.dumps({**facts(ran, str(asked)), "events": events, "guest_failures": failures}))
        else:
            note = ", the demo's pauses not counted" if phases.pace > 0 else ""
            put(console, summary(ran, console.width, note))
    for failure in failures:
        tell(f"pagegate: the guest found {failure}")
    if not ran.halted:
        tell(f"pagegate: {ran.ending()}")
    return 0 if ran.halted and not failures else 1
