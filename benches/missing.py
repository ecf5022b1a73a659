"""What a missing page costs that a guest touches, beside Firecracker's way: anonymous memory, whose userfaultfd another
process serves page by page from a file that it has mapped (rust/baseline/src/missing.rs, benches/handler.py)."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from goals import Row
from pagegate import measure, policies, workload
from pagegate._core import bare_loop
from pagegate.guests import PAGE, Script

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY = 64 << 20
TOUCHED = 512
"""Pages that the guest touches, from AT on."""
AT = 4 << 20
APART = 26 * PAGE
HANDLER = Path(__file__).parent / "handler.py"


def touching(stride: int) -> workload.Workload:
    """A guest that writes to pages so far apart."""
    script = Script(call="hypercall")
    # Its own pages come before what is measured.
    script.out(workload.MARKS, 0)
    script.out(workload.MARKS, workload.BEGIN)
    script.dirty(AT | 1 << workload.SHARED_BIT, TOUCHED, stride)
    script.out(workload.MARKS, workload.END)
    return workload.of_script(script, MEMORY, two_views=True)


def theirs(load: workload.Workload, file: Path) -> float:
    nanoseconds, _, _ = bare_loop(
        load.memory,
        load.images(),
        enforcement="memslots",
        marks=workload.MARKS,
        shared_bit=load.shared_bit,
        pager=[sys.executable, str(HANDLER), str(file)],
    )
    return nanoseconds / TOUCHED


def ours(load: workload.Workload, file: Path, enforcement: str) -> float:
    run = measure.under_policy(load, policies.Allow(), enforcement=enforcement, events=1024, pager=file)
    return run.seconds * 1e9 / TOUCHED


def rows(taking_turns: Callable[..., dict[str, float]]) -> list[Row]:
    # In a tmpfs: neither side waits for a disk, and no other file system comes on top.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "memory"
        file.write_bytes(b"\x5a" * MEMORY)
        found = []
        for name, stride in (("in order", PAGE), ("far apart", APART)):
            load = touching(stride)
            least = taking_turns(
                theirs=lambda load=load: theirs(load, file),
                traps=lambda load=load: ours(load, file, "traps"),
                memslots=lambda load=load: ours(load, file, "memslots"),
            )
            found += [
                Row(
                    f"a missing page, {name}, {side}, against Firecracker's way",
                    1.0,
                    [round(least[side] / least["theirs"], 4)],
                    "the testbed's KVM",
                    f"{least[side]:,.0f} and {least['theirs']:,.0f} instructions a page, {TOUCHED} pages",
                )
                for side in ("traps", "memslots")
            ]
        return found
