"""What a recorded run shared may be shared, and nothing else: a policy that is made of a trace, and tried on it.

Against a guest that shares what it never shared while it was watched. Record a run that can be trusted, make the policy
of it, replay the same requests through it to see that none of them would be refused, and then enforce it.

    pagegate run -p examples/audit_log.py -o path=audit.jsonl --guest explicit --events good.parquet
    pagegate replay good.parquet -p examples/record_then_replay.py:learned -o trace=good.parquet
    pagegate run -p examples/record_then_replay.py:learned -o trace=good.parquet --guest explicit

Another trace shows what the policy would have refused there, with no guest at stake. It is judged in Rust.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - `pagegate run -o` looks the annotation up

from pagegate.policies import Builtin, Window
from pagegate.trace import read


def learned(trace: Path, slack: int = 0) -> Builtin:
    """The policy for what was shared in ``trace``, and ``slack`` bytes around it, a multiple of 4096."""
    return Window([(start, end - start) for start, end in shared(trace, slack)])


def shared(trace: Path, slack: int) -> list[tuple[int, int]]:
    """What became shared, as starts and ends, joined where they meet."""
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
