"""A memory cgroup that is too small for what a guest uses: the process ends, the machine with it, and soon."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

from .conftest import LIBC, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT = 96 * MIB
"""Enough for Python, pagegate and a guest that uses little."""
SECONDS = 60
PARTS = """
import sys
from pagegate import Vm
from pagegate.guests import Script
from pathlib import Path
def limited(folder):
    Path(folder, "cgroup.procs").write_text("0")
"""


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A cgroup with this limit."""
    root = tmp_path / "cgroup"
    root.mkdir()
    if LIBC.mount(b"cgroup2", str(root).encode(), b"cgroup2", 0, None) != 0:
        pytest.skip(f"no cgroup2 can be mounted: {os.strerror(ctypes.get_errno())}")
    try:
        (root / "cgroup.subtree_control").write_text("+memory")
        folder = root / "pagegate"
        folder.mkdir()
        (folder / "memory.max").write_text(str(LIMIT))
        yield folder
        folder.rmdir()
    finally:
        assert LIBC.umount2(str(root).encode(), 0) == 0


@pytest.fixture
def in_group(group: Path) -> Callable[[str], tuple[int, str, float]]:
    """Runs a program in the cgroup; returns its status, what it said, and its seconds."""

    def run(code: str) -> tuple[int, str, float]:
        program = f"{PARTS}\nlimited({str(group)!r})\n{textwrap.dedent(code)}"
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        return done.returncode, done.stdout + done.stderr, time.monotonic() - began

    return run


@pytest.mark.parametrize("to", ["private", "shared"])
def test_a_guest_that_uses_more_ends_the_process(in_group, to: str) -> None:
    status, said, seconds = in_group(
        f"""
        with Vm(512 << 20) as vm:
            vm.convert(8 << 20, 256 << 20, to={to!r})
            script = Script(call="hypercall")
            script.dirty(8 << 20, 65536)
            script.start(vm)
            print(vm.run(timeout=50).reason)
        """
    )
    print(f"{to}: status {status} after {seconds:.1f} s: {said}")
    # The kernel's choice: no errno comes of it, and there is nothing that the process could do.
    assert (status, said) == (-signal.SIGKILL, "")


def test_a_guest_that_gives_back_what_it_uses_stays_within_it(in_group) -> None:
    # Ten times 24 MiB are made private, used, and made shared, which frees them.
    status, said, seconds = in_group(
        """
        with Vm(64 << 20) as vm:
            script = Script(call="hypercall")
            for _ in range(10):
                script.map(8 << 20, 24 << 20, to="private")
                script.dirty(8 << 20, 24 * 256)
                script.map(8 << 20, 24 << 20, to="shared")
            script.start(vm)
            report = vm.run(timeout=50)
            print(report.reason, report.conversions, vm.memory_usage().private)
        """
    )
    print(f"{seconds:.1f} s")
    assert (status, said) == (0, "halt 20 0\n")
