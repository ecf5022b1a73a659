"""What a second vCPU is worth: requests a second of two vCPUs on disjoint ranges, against one, on real KVM.

Both under Allow() and in the bare loop, in turns. KVM changes attributes and memslots under locks of the whole VM
(slots_lock above all), so that no program is twice as fast with two vCPUs. What pagegate loses is seen in what it gains
from the second vCPU against what the bare loop gains. This needs two CPUs, on this host or in the testbed:

    python benches/two_vcpus.py [--json] [--turns N] [--requests N] [--touch]
    pagegate testbed --cpus 2 --timeout 600 -- python benches/two_vcpus.py

Exit status: 3 where this host cannot measure it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import TYPE_CHECKING, Any

import goals
from pagegate import guests, measure, policies, probe, workload

if TYPE_CHECKING:
    from collections.abc import Callable

VCPUS = (1, 2)
EVENTS = 256
"""So few that the log is full before anything is measured: a log that grows gets memory from the kernel."""
ROUNDS = EVENTS // 32 + 1


def measured(requests: int, turns: int, enforcement: str, *, touch: bool) -> dict[str, list[float]]:
    """Requests a second by side, one for each turn. ``requests`` are those of each vCPU."""
    call: guests.Call = "hypercall" if guests.hypercall_completes() else "doorbell"

    def load(vcpus: int) -> workload.Workload:
        return workload.make("explicit", requests * vcpus, touch=touch, vcpus=vcpus, call=call, rounds=ROUNDS)

    def pagegate(load: workload.Workload) -> float:
        run = measure.under_policy(load, policies.Allow(), enforcement=enforcement, events=EVENTS)
        return load.requests / run.seconds

    def bare(load: workload.Workload) -> float:
        return load.requests / measure.in_bare_loop(load, enforcement=enforcement)[0]

    programs: dict[str, Callable[[workload.Workload], float]] = {"pagegate": pagegate, "bare": bare}
    rates: dict[str, list[float]] = {f"{name}_{vcpus}": [] for name in programs for vcpus in VCPUS}
    for _ in range(turns):
        # Side by side, so that what disturbs a turn disturbs both programs.
        for vcpus in VCPUS:
            for name, program in programs.items():
                rates[f"{name}_{vcpus}"].append(program(load(vcpus)))
    return rates


def with_gains(rates: dict[str, list[float]]) -> dict[str, list[float]]:
    """With what the second vCPU gains, turn by turn."""
    gains = {
        f"{name}_gain": [two / one for one, two in zip(rates[f"{name}_1"], rates[f"{name}_2"], strict=True)]
        for name in ("pagegate", "bare")
    }
    against = [ours / bare for ours, bare in zip(gains["pagegate_gain"], gains["bare_gain"], strict=True)]
    return {**rates, **gains, "gain_against_bare": against}


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


NAMES = {
    "pagegate_1": "Allow(), one vCPU, requests a second",
    "pagegate_2": "Allow(), two vCPUs, requests a second",
    "bare_1": "the bare loop, one vCPU, requests a second",
    "bare_2": "the bare loop, two vCPUs, requests a second",
    "pagegate_gain": "Allow(), two vCPUs against one",
    "bare_gain": "the bare loop, two vCPUs against one",
    "gain_against_bare": "Allow()'s gain against the bare loop's",
}


def title(told: dict[str, Any]) -> str:
    use = ", the pages used" if told["touch"] else ""
    return f"{told['enforcement']}, {told['requests']:,} requests of each vCPU{use}"


def table(told: dict[str, Any]) -> list[list[str]]:
    lines = [[title(told), "median", "spread", "turns"]]
    for key, name in NAMES.items():
        median, low, high = (goals.number(told[key][which]) for which in ("median", "low", "high"))
        lines.append([name, median, f"{low} to {high}", str(told["turns"])])
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--requests", type=int, default=1024, help="of each vCPU")
    parser.add_argument("--touch", action="store_true", help="the guest writes to each page after it was converted")
    arguments = parser.parse_args()
    host = probe()
    if host.enforcement is None:
        print(f"two_vcpus: {'; '.join(host.problems)}", file=sys.stderr)
        return 3
    if len(os.sched_getaffinity(0)) < 2:
        print("two_vcpus: this needs two CPUs", file=sys.stderr)
        return 3
    rates = measured(arguments.requests, arguments.turns, host.enforcement, touch=arguments.touch)
    told: dict[str, Any] = {
        "enforcement": host.enforcement,
        "requests": arguments.requests,
        "turns": arguments.turns,
        "touch": arguments.touch,
        **{key: summary(values) for key, values in with_gains(rates).items()},
    }
    print(json.dumps(told) if arguments.json else goals.markdown(table(told), aligned=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
