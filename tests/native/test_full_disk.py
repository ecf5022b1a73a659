"""A disk that fills up: one error, an exit status, and no wait."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pagegate
import pytest

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 << 10
SECONDS = 100
"""The longest that a program may take: much is requested before a part of a Parquet file is written."""
FOREVER = (
    b"\xbb\x00\x00\x20\x00\xb9\x01\x00\x00\x00\xba\x10\x00\x00\x00"  # mov ebx, 0x200000; mov ecx, 1; mov edx, 16
    b"\xb8\x0c\x00\x00\x00\xe6" + bytes([pagegate.DOORBELL_PORT]) + b"\xeb\xe8"  # mov eax, 12; the doorbell; again
)


@pytest.fixture
def on_a_small_disk(tmp_path: Path):
    """Runs a program in a folder that is a disk of 64 KiB, in a mount namespace; returns it and its seconds."""
    folder = tmp_path / "disk"
    folder.mkdir()
    in_namespace = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-ec"]
    mount = f'mount -t tmpfs -o size={SIZE} tmpfs "{folder}"; cd "{folder}"'
    tried = subprocess.run([*in_namespace, mount], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no disk of its own can be mounted here: {tried.stderr.strip()}")

    def run(*arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
        command = [*in_namespace, f'{mount}; exec "$@"', "sh", sys.executable, *map(str, arguments)]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        return done, time.monotonic() - began

    return run


@pytest.mark.kvm
@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows"])
def test_the_events_of_a_run(on_a_small_disk, tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(FOREVER)
    policy = tmp_path / "policy.py"
    policy.write_text("from pagegate import policies\npolicy = policies.Allow()\n")
    file = f"events.{kind}"
    options = ("--memory", "16M", "--timeout", str(SECONDS), "--events", file, "--json")
    done, seconds = on_a_small_disk("-m", "pagegate", "run", "-p", policy, image, *options)
    assert (done.returncode, done.stderr) == (1, f"pagegate: {file}: No space left on device\n")
    # The guest would have gone on, but the run ended with the file. What it did is still said.
    assert '"reason": "stopped"' in done.stdout
    print(f"{kind}: {seconds:.1f} s")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows"])
def test_a_trace(on_a_small_disk, kind: str) -> None:
    # It is an error each time, and the trace can be written once there is room.
    done, _ = on_a_small_disk(
        "-c",
        f"""
import os
from pagegate import trace
made = trace.synthetic(20_000)
for _ in range(2):
    try:
        made.write("trace.{kind}")
    except OSError as error:
        print(error)
os.remove("trace.{kind}")
trace.synthetic(10).write("trace.{kind}")
assert len(trace.read("trace.{kind}")) == 10
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"[Errno 28] No space left on device: 'trace.{kind}'\n" * 2
