"""Measures the goals that hold on any machine: each is a ratio of two sides taken in turns in this one run, or bytes.

    python benches/anywhere.py [--json] [--build]

Without KVM: requests come from the fake hypervisor, which replays them and keeps slots and attributes in user space.
What it measures of the core alone is benches/figures.rs, built when it is older than its sources (``--build`` does
nothing else). Under an emulated CPU, which is some thirty times slower but may count instructions, the work is cut
down, and with one CPU the goal for two vCPUs is left out. Exit status: 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pagegate import Convert, Deny, MapGpaRange, Region, Stop, Vm, measure, policies, probe, workload
from pagegate.guests import hypercall_completes
from pagegate.testing import Fake, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "target" / "benches" / "figures"
PAGE = 4096
MEMORY = 1 << 30
AT = 0x10_0000
ANSWER = Convert()
PRIVATE, SHARED = 16, 0  # KVM_HC_MAP_GPA_RANGE's attributes, with 4 KiB as the hint


@dataclasses.dataclass
class Row:
    """One goal and what was measured."""

    name: str
    value: float
    goal: float | None
    better: str
    detail: str
    holds: float | None = None
    """What must not be missed on a noisy machine, where the goal itself may be."""

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


@dataclasses.dataclass
class Effort:
    """How much of everything: often and briefly, so that some rounds are undisturbed where others use the CPUs too."""

    rounds: int
    requests: int
    short: bool


def effort() -> Effort:
    emulated = "TCG" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return Effort(2, 2_000, short=True) if emulated else Effort(250, 5_000, short=False)


def taking_turns(rounds: int, **sides: Callable[[], float]) -> dict[str, float]:
    """The best of each side."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, side in sides.items():
            best[name] = min(best[name], side())
    return best


# ---- requests on the fake


def there_and_back(gpa: int) -> list[Step]:
    return [Step.hypercall(gpa, 1, PRIVATE), Step.hypercall(gpa, 1, SHARED)]


def machine(policy: object, scripts: list[list[Step]], cycles: int, events: int = 65536) -> Vm:
    fake = Fake(*scripts, cycles=cycles)
    vm = Vm(MEMORY, vcpus=len(scripts), policy=policy, hypervisor=fake, events=events)
    for vcpu in vm.vcpus:
        vcpu.start(mode="real")
    return vm


def request(policy: object, requests: int, *, events: int = 65536, vcpus: int = 1) -> float:
    """Nanoseconds of a request for one page; each vCPU has its own part of memory."""
    scripts = [there_and_back(AT + MEMORY // vcpus * vcpu) for vcpu in range(vcpus)]
    with machine(policy, scripts, requests // 2, events) as vm:
        report = vm.run()
    if report.requests != requests * vcpus:
        raise RuntimeError(f"{report.requests} requests in place of {requests * vcpus}: {report}")
    return report.seconds / report.requests * 1e9


class Judge:
    """Looks at the request and answers."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        if call.to == "shared" and call.gpa < AT:
            return Deny()
        return Convert()


class Plain:
    """Looks at nothing."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert()


class Constant:
    """Does nothing at all, so that nothing is left but the call."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return ANSWER


class Learned:
    """Says once and for all that everything is to be converted."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert(remember=Region(0, MEMORY))


def bare(policy: Judge | Plain | Constant, calls: int) -> float:
    """Nanoseconds of a call from a ``for`` loop, the loop included, with requests like the core's made before."""
    hook = policy.map_gpa_range
    requests = [MapGpaRange(AT, to="private"), MapGpaRange(AT, to="shared")] * (calls // 2)
    begin = time.perf_counter_ns()
    for call in requests:
        hook(call)
    return (time.perf_counter_ns() - begin) / calls


def hooks(plan: Effort) -> Iterator[Row]:
    def ratio(policy: Judge | Plain | Constant) -> tuple[float, float, float]:
        times = taking_turns(
            plan.rounds,
            rust=lambda: request(policies.Allow(), plan.requests),
            python=lambda: request(policy, plan.requests),
            bare=lambda: bare(policy, plan.requests),
        )
        core = times["python"] - times["rust"]
        return core, times["bare"], core / times["bare"]

    core, called, value = ratio(Judge())
    others = ", ".join(
        f"{what} {core:.0f} against {called:.0f} ns ({value:.2f})"
        for what, (core, called, value) in (
            ("one that only makes its answer", ratio(Plain())),
            ("one that does nothing", ratio(Constant())),
        )
    )
    yield Row(
        "a hook called from the core, against a bare call of it",
        value,
        2.5,
        "lower",
        f"{core:.0f} against {called:.0f} ns: a request with the hook less one with Allow(), against a call in a for "
        f"loop, of a hook that looks at the request and answers; {others}",
        holds=3.0,
    )


def events(plan: Effort) -> Iterator[Row]:
    times = taking_turns(
        plan.rounds * 2,
        # So few that the log is soon full: what it costs to get memory from the kernel is paid once.
        on=lambda: request(policies.Allow(), plan.requests, events=2048),
        off=lambda: request(policies.Allow(), plan.requests, events=0),
    )
    on, off = times["on"], times["off"]
    # Without the kernel's part a request on the fake is next to nothing, and the goal is for those of a machine.
    yield Row(
        "events on, against events off, on the fake",
        on / off,
        None,
        "lower",
        f"{on:.0f} against {off:.0f} ns a request, Allow(): {on - off:.0f} ns for an event",
    )
    if probe().enforcement is not None:
        yield on_this_host(plan)


def on_this_host(plan: Effort) -> Row:
    """The same by a guest on this host's KVM, by whichever enforcement it has."""
    call = "hypercall" if hypercall_completes() else "doorbell"
    load = workload.make("explicit", 400, call=call)

    def cost(kept: int) -> float:
        return measure.under_policy(load, policies.Allow(), events=kept).seconds * 1e9 / load.requests

    times = taking_turns(plan.rounds * 2, on=lambda: cost(65536), off=lambda: cost(0))
    on, off = times["on"], times["off"]
    detail = f"{on / 1e3:.1f} against {off / 1e3:.1f} µs a request, Allow()"
    return Row("events on, against events off, on this host's KVM", on / off, 1.02, "lower", detail, holds=1.5)


def learned(plan: Effort) -> Iterator[Row]:
    times = taking_turns(
        plan.rounds,
        # Enough that the one hook and the thread's first attaching do not count.
        rule=lambda: request(Learned(), plan.requests * 4),
        allow=lambda: request(policies.Allow(), plan.requests * 4),
    )
    rule, allow = times["rule"], times["allow"]
    yield Row(
        "a request under a learned rule, against Allow()",
        rule / allow,
        # Looking a rule up costs some 20 ns, and a request on the fake little more than ten times that.
        1.1,
        "lower",
        f"{rule:.0f} against {allow:.0f} ns a request",
        holds=1.25,
    )


def two_vcpus(plan: Effort) -> Iterator[Row]:
    if len(os.sched_getaffinity(0)) < 2:
        return
    times = taking_turns(
        plan.rounds * 3,
        # As above; and while the log fills, both would wait for the one address space that they get memory in.
        one=lambda: request(policies.Allow(), plan.requests * 4, events=2048),
        two=lambda: request(policies.Allow(), plan.requests * 4, events=4096, vcpus=2),
        one_unlogged=lambda: request(policies.Allow(), plan.requests * 4, events=0),
        two_unlogged=lambda: request(policies.Allow(), plan.requests * 4, events=0, vcpus=2),
    )
    one, two = 1e9 / times["one"], 1e9 / times["two"]
    unlogged = times["one_unlogged"] / times["two_unlogged"]
    yield Row(
        "two vCPUs on disjoint ranges, against one",
        two / one,
        1.8,
        "higher",
        f"{two / 1e6:.2f} against {one / 1e6:.2f} million requests a second, Allow(); {unlogged:.2f} "
        "with no events kept",
        holds=1.5,
    )


def resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


class StopAt:
    """Converts, and ends the run at each of these many conversions."""

    def __init__(self, *counts: int) -> None:
        self.counts = set(counts)
        self.seen = 0

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Stop:
        self.seen += 1
        return Stop("counted") if self.seen - 1 in self.counts else Convert()


def memory(plan: Effort) -> Iterator[Row]:
    if plan.short:
        return
    few, many = 1_000, 1_000_000

    def after(events: int) -> tuple[int, int]:
        # All over memory.
        gpas = [page * (MEMORY // 512) for page in range(512)]
        script = [step for attributes in (PRIVATE, SHARED) for step in (Step.hypercall(g, 1, attributes) for g in gpas)]
        with machine(StopAt(few // 2, few, many), [script], many // len(script) + 2, events) as vm:
            vm.run()  # threads and the like are there from now on
            vm.run()
            before = resident()
            vm.run()
            return before, resident()

    # With a log that is full after the first thousand; how it fills is told beside it.
    before, now = after(few)
    before_default, now_default = after(65536)
    yield Row(
        "resident memory after a million conversions, against after a thousand",
        now / before,
        1.01,
        "lower",
        f"{now / 2**20:.2f} against {before / 2**20:.2f} MiB of the whole process, events={few}; with the default of "
        f"65536 events, which fill up in between, {now_default / 2**20:.2f} against {before_default / 2**20:.2f} MiB",
        holds=1.05,
    )


# ---- the attribute map


def sources() -> Iterator[Path]:
    yield from (ROOT / "benches").glob("*.rs")
    yield from (ROOT / "rust" / "core").rglob("*.rs")
    yield from (ROOT / "Cargo.lock", ROOT / "Cargo.toml", ROOT / "rust" / "core" / "Cargo.toml")


def figures_program() -> Path:
    """The compiled benches/figures.rs."""
    if FIGURES.exists() and all(path.stat().st_mtime <= FIGURES.stat().st_mtime for path in sources()):
        return FIGURES
    command = ["cargo", "bench", "--package", "pagegate-core", "--bench", "figures", "--no-run", "--locked"]
    built = subprocess.run([*command, "--message-format=json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in built.stdout.splitlines()]
    made = [message["executable"] for message in messages if message.get("executable")]
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(made[-1], FIGURES)
    FIGURES.chmod(0o755)
    return FIGURES


def attributes(plan: Effort) -> Iterator[Row]:
    command = [figures_program(), *(["--short"] if plan.short else [])]
    figures = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    spread = 64

    def by_size(what: str, count: int) -> float:
        return figures[f"{what}_1t_{count}"] / figures[f"{what}_1g_{count}"]

    for name, whats in (("a 4 KiB change", ["change"]), ("a query", ["query", "query_block"])):
        what = max(whats, key=lambda what: by_size(what, spread))
        others = ", ".join(f"{by_size(what, count):.2f} for {count}" for count in (16, 256, 1024, 16384))
        yield Row(
            f"{name} at 1 TiB, against 1 GiB",
            by_size(what, spread),
            1.3,
            "lower",
            f"{figures[f'{what}_1t_{spread}']:.1f} against {figures[f'{what}_1g_{spread}']:.1f} ns, {spread} pages at "
            f"random all over memory; {others}: above what the caches hold, memory's own latency counts",
            holds=1.6,
        )
    mib = figures["worst_case_resident"] / 2**20
    how = "every other page of a block in each 128 MiB, as bad as all" if plan.short else "every other page"
    yield Row(
        "1 TiB with every other page private",
        mib,
        64,
        "lower",
        f"MiB of resident memory, {figures['worst_case_counted'] / 2**20:.2f} by its own count; {how}",
    )
    for name, what in (
        ("a change", "change"),
        ("the state of a page", "query"),
        ("whether 2 MiB are mixed", "query_block"),
        ("all runs", "run"),
    ):
        own, ranges, roaring = (figures[f"{what}_{name}"] for name in ("attributes", "rangemap", "roaring"))
        yield Row(
            f"{name}, every other page private, against the faster of rangemap and roaring",
            own / min(ranges, roaring),
            1.0,
            "lower",
            f"{own:.1f} ns, rangemap {ranges:.1f}, roaring {roaring:.1f}; rangemap in a smaller guest, to fit",
        )


# ---- all of it


def measured() -> list[Row]:
    plan = effort()
    # Memory first, before there is freed memory to grow into.
    parts = (memory, attributes, hooks, events, learned, two_vcpus)
    return [row for part in parts for row in part(plan)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a list of objects in place of a table")
    parser.add_argument("--build", action="store_true", help="only build what is measured in Rust, and print its path")
    arguments = parser.parse_args()
    if arguments.build:
        print(figures_program())
        return 0
    rows = measured()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        for row in rows:
            sign = "<=" if row.better == "lower" else ">="
            met = "      " if row.goal is None else "met   " if row.met else "MISSED"
            goal = "" if row.goal is None else f"{sign} {row.goal:g}"
            print(f"{met} {row.value:8.3f} {goal:8} {row.name}")
            print(textwrap.fill(row.detail, 110, initial_indent=" " * 7, subsequent_indent=" " * 7))
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
