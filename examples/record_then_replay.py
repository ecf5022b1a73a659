"""Allows only the pages to become shared that became shared in a recorded run.

Against a guest that shares other pages than it did when it was trusted. Record such a run, make the policy of its
trace, replay the trace to see that the policy would refuse nothing of it, and then run guests under the policy.

    pagegate run -p examples/audit_log.py -o path=audit.jsonl --guest explicit --events good.parquet
    pagegate replay good.parquet -p examples/record_then_replay.py:learned -o trace=good.parquet
    pagegate run -p examples/record_then_replay.py:learned -o trace=good.parquet --guest explicit

Replaying another trace shows what the policy would refuse there, without running a guest. The policy runs in Rust.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - `pagegate run -o` looks the annotation up

from pagegate.policies import Builtin, Window
from pagegate.trace import read


def learned(trace: Path, slack: int = 0) -> Builtin:
    """A policy for what became shared in ``trace``, and ``slack`` bytes around it, a multiple of 4096."""
    return Window([(start, end - start) for start, end in shared(trace, slack)])


def shared(trace: Path, slack: int) -> list[tuple[int, int]]:
    """The ranges that became shared as (start, end), joined where they overlap or touch."""
    recorded = read(trace)
    done = {(event.done_gpa, event.done_size) for event in recorded if event.done_to == "shared" and event.done_size}
    joined: list[tuple[int, int]] = []
    for gpa, size in sorted(done):
        start, end = max(gpa - slack, 0), min(gpa + size + slack, recorded.memory)
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined
