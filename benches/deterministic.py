"""What a request and an exit cost, in instructions, each beside its baseline in the same boot.

It runs in the deterministic testbed, whose clock counts instructions:

    pagegate testbed --deterministic -- python benches/deterministic.py

Prints a JSON list of {"name", "value", "goal", "better", "detail"}, some with "holds"; a row without a goal is there to
be read.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import plain
from pagegate import Convert, Io, MapGpaRange, Policy, Region, Vm, guests, measure, policies, probe, workload
from pagegate.guests import PAGE, Script

if TYPE_CHECKING:
    from collections.abc import Callable

REQUESTS = 1024
EXITS = 4096
IMPLICIT = 256
SEQUENTIAL = 32 << 20
BLOCK = 2 << 20
PORT = 0x0F10
EVENTS = 1024
ROUNDS = 3 * EVENTS // 32
"""The log is full before anything is measured, and takes no more memory, as in any run that lasts."""

Row = dict[str, Any]


class Hook(Policy):
    """The least that a Python policy can do."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert()


class Learned(Policy):
    """Answers once for all."""

    def __init__(self, memory: int) -> None:
        self.region = Region(0, memory)

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert(remember=self.region)


def ratio(  # noqa: PLR0913 - one for each thing a row says
    name: str, goal: float | None, ours: float, theirs: float, what: str, *, holds: float | None = None
) -> Row:
    """``holds``: what must not get worse where the goal is out of reach; docs/performance.md says why it is."""
    return {
        "name": name,
        "value": round(ours / theirs, 4),
        "goal": goal,
        "holds": holds,
        "better": "lower",
        "detail": f"{ours:,.0f} and {theirs:,.0f} instructions {what}",
    }


def cost(name: str, instructions: float, detail: str) -> Row:
    """A part of one explicit request."""
    return {"name": name, "value": round(instructions), "goal": None, "better": "lower", "detail": detail}


def explicit(*, touch: bool) -> workload.Workload:
    return workload.make("explicit", REQUESTS, touch=touch, call="hypercall", rounds=ROUNDS)


def settle() -> None:
    """Lets the kernel finish with the machine before: on one CPU it would do so in the midst of the next."""
    time.sleep(1)


def policy_cost(load: workload.Workload, policy: object, events: int = EVENTS) -> float:
    settle()
    return measure.under_policy(load, policy, events=events).seconds * 1e9 / load.requests


def bare_cost(load: workload.Workload, work: str = "all") -> float:
    settle()
    return measure.in_bare_loop(load, enforcement="attributes", work=work)[0] * 1e9 / load.requests


def explicit_rows() -> list[Row]:
    load, untouched = explicit(touch=True), explicit(touch=False)
    each = "a request, the guest's use of the page included"
    bare, allow, hook = bare_cost(load), policy_cost(load, policies.Allow()), policy_cost(load, Hook())
    learned = policy_cost(load, Learned(load.memory))
    silent = policy_cost(load, policies.Allow(), 0)
    pure = plain.measure(load) * 1e9 / load.requests
    parts = {work: bare_cost(untouched, work) for work in ("nothing", "enforce", "discard", "all")}
    unused, hook_unused = policy_cost(untouched, policies.Allow()), policy_cost(untouched, Hook())
    pure_unused = plain.measure(untouched) * 1e9 / untouched.requests
    return [
        ratio("explicit, Allow()", 1.03, allow, bare, each),
        ratio("explicit, Python hook", 1.15, hook, bare, each),
        ratio("explicit, Python hook, against the pure-Python program", 0.42, hook, pure, each, holds=0.51),
        ratio("explicit, learned rule, against Allow()", 1.02, learned, allow, each),
        ratio("explicit, Allow(), events on against events off", 1.02, allow, silent, each),
        ratio("the same without use: Allow()", None, unused, parts["all"], "a request"),
        ratio("the same without use: Python hook", None, hook_unused, parts["all"], "a request"),
        ratio(
            "the same without use: Python hook, against the pure-Python program",
            0.42,
            hook_unused,
            pure_unused,
            "a request",
        ),
        cost("exit, reply and re-entry", parts["nothing"], "the bare loop that converts nothing"),
        cost("KVM_SET_MEMORY_ATTRIBUTES", parts["enforce"] - parts["nothing"], "more, if it sets the attribute"),
        cost("fallocate, punch a hole", parts["discard"] - parts["enforce"], "more, if it discards the stale side"),
        cost("lseek, SEEK_DATA, on every other request", parts["all"] - parts["discard"], "more, if it looks first"),
        cost("the guest's use of the page", bare - parts["all"], "more, if the guest writes to each page it gets"),
        cost("pagegate", allow - bare, "more, if it is pagegate under Allow()"),
        cost("the Python hook", hook - allow, "more, if the policy is one"),
    ]


def port_io(port: int) -> workload.Workload:
    script = Script(call="hypercall")
    script.in_(port)
    script.loop(0, 64)
    script.out(workload.MARKS, workload.BEGIN)
    first = script.in_(port)
    script.loop(first, EXITS)
    script.out(workload.MARKS, workload.END)
    return workload.Workload(
        kind="explicit",
        pages=1,
        touch=False,
        requests=0,
        warm_up=0,
        memory=8 << 20,
        memslots=1,
        call="hypercall",
        scripts=(script,),
    )


def answer(io: Io) -> bytes:
    return b"\x2a"


def port_io_rows() -> list[Row]:
    def attach(vm: Vm) -> None:
        vm.on_io(PORT, answer)

    rust, python = port_io(workload.MARKS), port_io(PORT)
    # Twice each, and the better one counts: what a machine before left to the kernel may still fall into one.
    settle()
    measured = [measure.in_bare_loop(rust, enforcement="attributes") for _ in range(2)]
    if any(exits != EXITS for _, exits in measured):
        raise RuntimeError(f"{measured} exits in place of {EXITS}")

    def best(load: workload.Workload, prepare: Callable[[Vm], None] | None = None) -> float:
        runs = [measure.under_policy(load, policies.Allow(), prepare=prepare).seconds for _ in range(2)]
        return min(runs) * 1e9 / EXITS

    bare = min(seconds for seconds, _ in measured) * 1e9 / EXITS
    in_rust, in_python = best(rust), best(python, attach)
    return [
        ratio("port IO answered in Rust", 1.03, in_rust, bare, "an exit"),
        ratio("port IO answered by a Python handler", 1.6, in_python, bare, "an exit"),
    ]


def implicit_rows() -> list[Row]:
    load = workload.make("implicit", IMPLICIT, call="hypercall", rounds=ROUNDS)
    return [
        ratio("implicit, Allow()", 1.05, policy_cost(load, policies.Allow()), bare_cost(load), "a request"),
        sequential(),
    ]


def sequential() -> Row:
    """A guest that touches a stretch of memory in order, page by page."""

    def touched(pages: int) -> float:
        script = Script(call="hypercall")
        script.out(workload.MARKS, workload.BEGIN)
        script.touch(SEQUENTIAL, SEQUENTIAL // PAGE)
        script.out(workload.MARKS, workload.END)
        load = workload.Workload(
            kind="implicit",
            pages=pages,
            touch=False,
            requests=SEQUENTIAL // PAGE // pages,
            warm_up=0,
            memory=3 * SEQUENTIAL,
            memslots=1,
            call="hypercall",
            scripts=(script,),
        )
        return measure.under_policy(load, policies.Allow(), events=EVENTS).seconds * 1e9

    wide, narrow = touched(BLOCK // PAGE), touched(1)
    name = "implicit, 32 MiB in order, Align(2 MiB), against Allow()"
    return ratio(name, 0.1, wide, narrow, "for all of it")


def main() -> None:
    if "sw-protected" not in probe().vm_types or not guests.hypercall_completes():
        sys.exit("deterministic: this kernel has no software-protected VMs: run this in the testbed")
    print(json.dumps([*explicit_rows(), *port_io_rows(), *implicit_rows()]))


if __name__ == "__main__":
    main()
