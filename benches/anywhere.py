"""Measures the goals in time and bytes that hold on any machine, in several runs of two sides each.

    python benches/anywhere.py [--json] [--build]

No KVM is needed: requests come from the fake hypervisor, which replays them and keeps memslots and attributes in user
space; only a resumed guest's first instruction is executed by this host's KVM, if it has one. What is measured of
the page states alone is benches/figures.rs, built when it is older than its sources (``--build`` does nothing else).
Under an emulated CPU, which is some thirty times slower, the work is cut down. Exit status: 1 where a goal is missed
and benches/excused.toml does not excuse it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import goals
from goals import Row
from pagegate import Convert, Deny, MapGpaRange, Region, Stop, Vm, policies
from pagegate.testing import Fake, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "target" / "benches" / "figures"
PAGE = 4096
MEMORY = 1 << 30
AT = 0x10_0000
ANSWER = Convert()
PORT = 0xE9
OUT = bytes.fromhex("e6e9 f4")  # out 0xe9, al; hlt
PRIVATE, SHARED = 16, 0  # KVM_HC_MAP_GPA_RANGE's attributes, with 4 KiB as the hint
FEW, MANY = 1_000, 1_000_000
"""Conversions after which resident memory is compared."""
ON_FAKE, ON_NOTHING = "the fake hypervisor", "no hypervisor"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much of everything. Rounds are many and short, so that some are undisturbed where others use the CPUs too."""

    runs: int
    """Each gives one value of every row."""
    rounds: int
    """Of each run. Both sides take turns, and the best of each counts."""
    requests: int
    short: bool


def effort() -> Effort:
    emulated = "TCG" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return Effort(3, 2, 2_000, short=True) if emulated else Effort(7, 100, 5_000, short=False)


def taking_turns(plan: Effort, **sides: Callable[[], float]) -> list[dict[str, float]]:
    """For each run the best of each side."""
    runs = []
    for _ in range(plan.runs):
        best = dict.fromkeys(sides, float("inf"))
        for _ in range(plan.rounds):
            for name, side in sides.items():
                best[name] = min(best[name], side())
        runs.append(best)
    return runs


def middle(runs: list[dict[str, float]], side: str) -> float:
    return statistics.median(run[side] for run in runs)


# ---- requests on the fake


def machine(policy: object, script: list[Step], cycles: int, events: int = 65536) -> Vm:
    vm = Vm(MEMORY, policy=policy, hypervisor=Fake(script, cycles=cycles), events=events)
    vm.vcpus[0].start(mode="real")
    return vm


def request(policy: object, requests: int) -> float:
    """Nanoseconds of a request for one page."""
    script = [Step.hypercall(AT, 1, attributes) for attributes in (PRIVATE, SHARED)]
    with machine(policy, script, requests // 2) as vm:
        report = vm.run()
    if report.requests != requests:
        raise RuntimeError(f"{report.requests} requests in place of {requests}: {report}")
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
    """Does nothing, so that only the call is left."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return ANSWER


class Learned:
    """Has its first answer remembered for all of memory."""

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
    def measured(policy: Judge | Plain | Constant) -> tuple[list[float], str]:
        runs = taking_turns(
            plan,
            rust=lambda: request(policies.Allow(), plan.requests),
            python=lambda: request(policy, plan.requests),
            bare=lambda: bare(policy, plan.requests),
        )
        core = middle(runs, "python") - middle(runs, "rust")
        ratios = [(run["python"] - run["rust"]) / run["bare"] for run in runs]
        return ratios, f"{core:.0f} against {middle(runs, 'bare'):.0f} ns"

    ratios, times = measured(Judge())
    others = ", ".join(
        f"{what} {times} ({statistics.median(ratios):.2f})"
        for what, (ratios, times) in (
            ("one that only makes its answer", measured(Plain())),
            ("one that does nothing", measured(Constant())),
        )
    )
    yield Row(
        "a hook called from the core, against a bare call of it",
        2.5,
        ratios,
        ON_FAKE,
        f"{times}: a request with the hook less one with Allow(), against a call in a for loop, of a hook that looks "
        f"at the request and answers; {others}",
    )


def learned(plan: Effort) -> Iterator[Row]:
    runs = taking_turns(
        plan,
        # So many that the first request, which asks the hook, does not count.
        rule=lambda: request(Learned(), plan.requests * 4),
        allow=lambda: request(policies.Allow(), plan.requests * 4),
    )
    yield Row(
        "a request under a learned rule, against Allow()",
        # To look a rule up takes some 20 ns, and a request on the fake little more than ten times that.
        1.1,
        [run["rule"] / run["allow"] for run in runs],
        ON_FAKE,
        f"{middle(runs, 'rule'):.0f} against {middle(runs, 'allow'):.0f} ns a request",
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


def grown(events: int) -> tuple[int, int]:
    """This process's resident memory after a few conversions, and after many."""
    # All over memory.
    gpas = [page * (MEMORY // 512) for page in range(512)]
    script = [Step.hypercall(gpa, 1, attributes) for attributes in (PRIVATE, SHARED) for gpa in gpas]
    # The allocator grows in the first runs, however short they are: each has threads and counts of its own.
    first = [FEW * run // 8 for run in range(1, 9)]
    with machine(StopAt(*first, MANY), script, MANY // len(script) + 2, events) as vm:
        for _ in first:
            vm.run()
        before = resident()
        vm.run()
        return before, resident()


def memory(plan: Effort) -> Iterator[Row]:
    name = f"resident memory after {MANY:,} conversions, against after {FEW:,}"
    if plan.short:
        yield Row(name, 1.01, [], ON_FAKE, "an emulated CPU takes too long for it")
        return

    def in_a_process(events: int) -> tuple[int, int]:
        command = [sys.executable, __file__, "--grown", str(events)]
        before, now = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        return before, now

    # With a log that is full after the first thousand; how the default one fills is told beside it.
    runs = [in_a_process(FEW) for _ in range(plan.runs)]
    before, now = (statistics.median(run[i] for run in runs) / 2**20 for i in (0, 1))
    before_default, now_default = (value / 2**20 for value in in_a_process(65536))
    yield Row(
        name,
        1.01,
        [now / before for before, now in runs],
        ON_FAKE,
        f"{now:.2f} against {before:.2f} MiB of the whole process, events={FEW}; with the default of 65536 events, "
        f"which fill up in between, {now_default:.2f} against {before_default:.2f} MiB",
    )


# ---- machines that are put aside


def snapshots(plan: Effort) -> Iterator[Row]:
    size, touched, pages = 512 << 20, 100, random.Random(20261124)
    has_kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
    names = (
        "a machine resumed lazily to its guest's first instruction, against with all of its memory read first",
        f"reset_to after {touched} pages were touched, against resuming with all memory read first",
    )
    if plan.short:
        for name, goal in zip(names, (0.1, 0.02), strict=True):
            yield Row(name, goal, [], ON_FAKE, "an emulated CPU takes too long for it")
        return

    def hypervisor() -> Fake | None:
        return None if has_kvm else Fake([Step.io_write(PORT, b"x")], private_memory=False)

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "saved"
        with Vm(size, hypervisor=hypervisor(), enforcement="memslots") as vm:
            for at in range(2 << 20, size, 1 << 20):
                vm.write(at, pages.randbytes(1 << 20))
            vm.load(OUT, at=0x1000)
            vm.vcpus[0].start(mode="long", rip=0x1000)
            vm.snapshot(folder)

        def first_exit(*, lazy: bool) -> Vm:
            vm = Vm.resume(folder, hypervisor=hypervisor(), lazy=lazy)
            vm.on_io(PORT, lambda _: vm.stop())
            if vm.run(timeout=60).reason != "stopped":
                raise RuntimeError("the guest did not come to its first instruction")
            return vm

        def seconds(call: Callable[[], Vm | None]) -> float:
            begin = time.perf_counter()
            made = call()
            took = time.perf_counter() - begin
            if made is not None:
                made.close()
            return took

        again = Vm.resume(folder, hypervisor=hypervisor(), lazy=True)

        def reset() -> float:
            for page in pages.sample(range(size // PAGE), touched):
                again.write(page * PAGE, b"touched")
            return seconds(lambda: again.reset_to(folder))

        with again:
            runs = [
                {
                    "eager": seconds(lambda: first_exit(lazy=False)),
                    "lazy": min(seconds(lambda: first_exit(lazy=True)) for _ in range(5)),
                    "reset": min(reset() for _ in range(5)),
                }
                for _ in range(plan.runs)
            ]
    for name, side, goal in zip(names, ("lazy", "reset"), (0.1, 0.02), strict=True):
        yield Row(
            name,
            goal,
            [run[side] / run["eager"] for run in runs],
            "this host's KVM" if has_kvm else ON_FAKE,
            f"{middle(runs, side) * 1e3:.1f} against {middle(runs, 'eager') * 1e3:.0f} ms, {size >> 20} MiB, hardly "
            "any of it zeroes, and the files in the page cache",
        )


# ---- the bookkeeping of page states


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


def page_states(plan: Effort) -> Iterator[Row]:
    command = [str(figures_program()), *(["--short"] if plan.short else [])]
    runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(plan.runs)]
    spread = 64

    def by_size(what: str, count: int) -> list[float]:
        return [run[f"{what}_1t_{count}"] / run[f"{what}_1g_{count}"] for run in runs]

    for name, what in (
        ("a 4 KiB change", "change"),
        ("the state of a page", "query"),
        ("whether 2 MiB are mixed", "query_block"),
    ):
        others = ", ".join(
            f"{statistics.median(by_size(what, count)):.2f} for {count}" for count in (16, 256, 1024, 16384)
        )
        times = " against ".join(f"{middle(runs, f'{what}_{size}_{spread}'):.1f}" for size in ("1t", "1g"))
        yield Row(
            f"{name} at 1 TiB, against 1 GiB",
            1.3,
            by_size(what, spread),
            ON_NOTHING,
            f"{times} ns, {spread} pages at random all over memory; {others}: more than the caches hold, so that "
            "memory's own latency counts",
        )
    counted = middle(runs, "worst_case_counted") / 2**20
    how = "every other page of a block in each 128 MiB, as bad as all" if plan.short else "every other page"
    yield Row(
        "MiB for the states of 1 TiB with every other page private",
        64,
        [run["worst_case_resident"] / 2**20 for run in runs],
        ON_NOTHING,
        f"resident memory, {counted:.2f} by its own count; {how}",
    )


# ---- all of it


def measured() -> list[Row]:
    plan = effort()
    return [row for part in (memory, page_states, hooks, learned, snapshots) for row in part(plan)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the rows as JSON, and no verdicts")
    parser.add_argument("--build", action="store_true", help="only build what is measured in Rust, and print its path")
    parser.add_argument("--grown", type=int, metavar="EVENTS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        print(figures_program())
        return 0
    if arguments.grown is not None:
        print(json.dumps(grown(arguments.grown)))
        return 0
    rows = measured()
    if arguments.json:
        print(json.dumps(goals.told(rows)))
        return 0
    judged = goals.all_judged(rows, goals.excuses())
    print(goals.markdown(goals.repeated(judged), aligned=True))
    print(*goals.findings(judged), sep="\n")
    return 1 if any(row.fails for row in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
