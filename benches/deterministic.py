"""What a request and an exit cost, in instructions, each beside its baseline in the same boot.

It runs in the deterministic testbed, whose clock counts instructions:

    pagegate testbed --deterministic -- python benches/deterministic.py

Prints the rows and figures of benches/goals.py as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent))

import goals
import missing
import plain
from goals import Figure, Row
from pagegate import Convert, Io, MapGpaRange, Policy, Region, Vm, guests, measure, policies, probe, workload
from pagegate.guests import PAGE, Script

if TYPE_CHECKING:
    from collections.abc import Callable

REQUESTS = 1024
EXITS = 4096
IMPLICIT = 256
TURNS = 5
"""How often each side is measured. The least counts: what else the kernel has to do now and then comes on top."""
SEQUENTIAL = 32 << 20
BLOCK = 2 << 20
PORT = 0x0F10
EVENTS = 1024
ROUNDS = 3 * EVENTS // 32
"""Before anything is measured the log is full, as in any long run: a log that grows gets memory from the kernel."""


class Hook(Policy):
    """A Python policy that does as little as one can."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert()


class Learned(Policy):
    """Has its first answer remembered for all of memory."""

    def __init__(self, memory: int) -> None:
        self.region = Region(0, memory)

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert(remember=self.region)


def ratio(name: str, goal: float, ours: float, theirs: float, what: str) -> Row:
    detail = f"{ours:,.0f} and {theirs:,.0f} instructions {what}"
    return Row(name, goal, [round(ours / theirs, 4)], "the testbed's KVM", detail)


def explicit(*, touch: bool) -> workload.Workload:
    return workload.make("explicit", REQUESTS, touch=touch, call="hypercall", rounds=ROUNDS)


def settle(turn: int) -> None:
    """Lets the kernel finish with the machine before: on one CPU it would do so during the next measurement.

    Not equally long in each turn: what the kernel does every second or so would meet the same side again and again.
    """
    time.sleep(0.7 + 0.13 * turn)


def taking_turns(**sides: Callable[[], float]) -> dict[str, float]:
    """The least of each side."""
    least = dict.fromkeys(sides, float("inf"))
    for turn in range(TURNS):
        for name, side in sides.items():
            settle(turn)
            least[name] = min(least[name], side())
    return least


def policy_cost(
    load: workload.Workload, policy: object, events: int = EVENTS, enforcement: str = "attributes"
) -> float:
    run = measure.under_policy(load, policy, enforcement=enforcement, events=events)
    return run.seconds * 1e9 / load.requests


def bare_cost(load: workload.Workload, work: str = "all", enforcement: str = "attributes") -> float:
    return measure.in_bare_loop(load, enforcement=enforcement, work=work)[0] * 1e9 / load.requests


def pure_cost(load: workload.Workload) -> float:
    return plain.measure(load) * 1e9 / load.requests


def explicit_rows() -> tuple[list[Row], list[Figure]]:
    """Both where the guest writes to each page it gets, and where it does not use them."""
    used, unused = explicit(touch=True), explicit(touch=False)
    least = taking_turns(
        bare=lambda: bare_cost(used),
        allow=lambda: policy_cost(used, policies.Allow()),
        hook=lambda: policy_cost(used, Hook()),
        learned=lambda: policy_cost(used, Learned(used.memory)),
        silent=lambda: policy_cost(used, policies.Allow(), 0),
        pure=lambda: pure_cost(used),
        nothing=lambda: bare_cost(unused, "nothing"),
        enforce=lambda: bare_cost(unused, "enforce"),
        discard=lambda: bare_cost(unused, "discard"),
        bare_unused=lambda: bare_cost(unused),
        allow_unused=lambda: policy_cost(unused, policies.Allow()),
        hook_unused=lambda: policy_cost(unused, Hook()),
        pure_unused=lambda: pure_cost(unused),
    )

    def against(name: str, goal: float, ours: str, theirs: str) -> Row:
        what = "a request" if "unused" in ours else "a request, the guest's use of the page included"
        return ratio(name, goal, least[ours], least[theirs], what)

    rows = [
        against("explicit, Allow(), against the bare loop", 1.04, "allow", "bare"),
        against("explicit, Python hook, against the bare loop", 1.15, "hook", "bare"),
        against("explicit, Python hook, against the pure-Python program", 0.42, "hook", "pure"),
        against("explicit, learned rule, against Allow()", 1.02, "learned", "allow"),
        against("explicit, Allow(), events on against events off", 1.02, "allow", "silent"),
        against("explicit, pages not used, Allow(), against the bare loop", 1.08, "allow_unused", "bare_unused"),
        against("explicit, pages not used, Python hook, against the bare loop", 1.25, "hook_unused", "bare_unused"),
        against(
            "explicit, pages not used, Python hook, against the pure-Python program", 0.42, "hook_unused", "pure_unused"
        ),
    ]

    def part(name: str, more: str, less: str, what: str) -> Figure:
        return Figure(name, least[more] - least[less], what)

    figures = [
        Figure("exit, reply and re-entry", least["nothing"], "the bare loop that converts nothing"),
        part("KVM_SET_MEMORY_ATTRIBUTES", "enforce", "nothing", "more, if it sets the attribute"),
        part("fallocate, punch a hole", "discard", "enforce", "more, if it discards the old side"),
        part("lseek, SEEK_DATA, on every other request", "bare_unused", "discard", "more, if it looks first"),
        part("the guest's use of the page", "bare", "bare_unused", "more, if the guest writes to each page it gets"),
        part("pagegate", "allow", "bare", "more, if it is pagegate under Allow()"),
        part("the Python hook", "hook", "allow", "more, if the policy is one"),
    ]
    return rows, figures


def port_io(port: int) -> workload.Workload:
    script = Script(call="hypercall")
    script.in_(port)
    script.loop(0, 64)
    script.out(workload.MARKS, workload.BEGIN)
    first = script.in_(port)
    script.loop(first, EXITS)
    script.out(workload.MARKS, workload.END)
    return workload.of_script(script, 8 << 20)


def answer(io: Io) -> bytes:
    return b"\x2a"


def port_io_rows() -> list[Row]:
    def attach(vm: Vm) -> None:
        vm.on_io(PORT, answer)

    rust, python = port_io(workload.MARKS), port_io(PORT)

    def bare() -> float:
        seconds, exits = measure.in_bare_loop(rust, enforcement="attributes")
        if exits != EXITS:
            raise RuntimeError(f"{exits} exits in place of {EXITS}")
        return seconds * 1e9 / EXITS

    def answered(load: workload.Workload, prepare: Callable[[Vm], None] | None = None) -> float:
        return measure.under_policy(load, policies.Allow(), prepare=prepare).seconds * 1e9 / EXITS

    least = taking_turns(bare=bare, rust=lambda: answered(rust), python=lambda: answered(python, attach))
    name = "port IO answered {}, against the bare loop"
    return [
        ratio(name.format("in Rust"), 1.03, least["rust"], least["bare"], "an exit"),
        ratio(name.format("by a Python handler"), 1.6, least["python"], least["bare"], "an exit"),
    ]


def implicit_rows() -> list[Row]:
    load = workload.make("implicit", IMPLICIT, call="hypercall", rounds=ROUNDS)
    allow = policies.Allow()
    least = taking_turns(
        bare=lambda: bare_cost(load),
        allow=lambda: policy_cost(load, allow),
        bare_traps=lambda: bare_cost(load, enforcement="traps"),
        allow_traps=lambda: policy_cost(load, allow, enforcement="traps"),
    )
    name = "implicit{}, Allow(), against the bare loop"
    return [
        ratio(name.format(""), 1.05, least["allow"], least["bare"], "a request"),
        ratio(name.format(", traps"), 1.05, least["allow_traps"], least["bare_traps"], "a request"),
        *sequential_rows(),
    ]


def sequential_rows() -> list[Row]:
    """A guest that touches 32 MiB in order, page by page."""

    def touched(pages: int, enforcement: str) -> float:
        script = Script(call="hypercall")
        script.out(workload.MARKS, workload.BEGIN)
        script.touch(SEQUENTIAL, SEQUENTIAL // PAGE)
        script.out(workload.MARKS, workload.END)
        requests = SEQUENTIAL // PAGE // pages
        load = workload.of_script(
            script, 3 * SEQUENTIAL, kind="implicit", pages=pages, requests=requests, two_views=True
        )
        run = measure.under_policy(load, policies.Allow(), enforcement=enforcement, events=EVENTS)
        return run.seconds * 1e9

    wide, narrow = (touched(pages, "attributes") for pages in (BLOCK // PAGE, 1))
    traps = touched(1, "traps") / (SEQUENTIAL // PAGE)
    name = "implicit{}, 32 MiB in order, {}"
    detail = f"with attributes and memslots {narrow / (SEQUENTIAL // PAGE):,.0f}"
    return [
        ratio(name.format("", "Align(2 MiB), against Allow()"), 0.1, wide, narrow, "for all of it"),
        Row(
            name.format(", traps", "Allow(), instructions a page"), 60_000, [round(traps)], "the testbed's KVM", detail
        ),
    ]


def main() -> None:
    if "sw-protected" not in probe().vm_types or not guests.hypercall_completes():
        sys.exit("deterministic: this kernel has no software-protected VMs: run this in the testbed")
    rows, figures = explicit_rows()
    rows += [*port_io_rows(), *implicit_rows(), *missing.rows(taking_turns)]
    print(json.dumps(goals.told(rows, figures)))


if __name__ == "__main__":
    main()
