"""Which function of a guest's kernel made each request of a recorded run: a small file beside the trace.

A trace has instruction pointers. What they mean is known as long as the machine is there, which the kernel was loaded
into.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from pagegate._core import _regular_file
from pagegate.cli.printing import printable

if TYPE_CHECKING:
    from pathlib import Path

    from pagegate import Vm

_LARGEST = 16 << 20
"""Bytes of such a file that are read."""


def beside(trace: Path) -> Path:
    """The file with the names, beside this trace."""
    return trace.with_name(f"{trace.name}.symbols.json")


def write(vm: Vm, trace: Path) -> None:
    """Writes the names for the requests in the machine's log, if any is known. Between runs. Raises OSError."""
    rips = {event.rip for event in vm.events if event.rip}
    names = {hex(rip): name for rip in sorted(rips) if (name := vm.symbol(rip)) is not None}
    if names:
        beside(trace).write_text(json.dumps(names, indent=0), encoding="utf-8")


def read(trace: Path) -> dict[int, str]:
    """The names by instruction pointer; none if there is no such file, or it is none: a pipe, or a larger one."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        told = json.loads(_regular_file(beside(trace), _LARGEST) or b"{}")
        return {int(rip, 16): printable(str(name)) for rip, name in told.items()}
    return {}
