"""The workloads of `pagegate bench` under the enforcement that most hosts do not have."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("options", [("--touch",), ("--pages", "4")])
def test_traps_beside_the_bare_loop(kind, options) -> None:
    command = [sys.executable, "-m", "pagegate", "bench", "--json", "--enforcement", "traps", "--compare"]
    command += ["--kind", kind, "--requests", "101", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    # Both sides check that the guest made this number of requests, and under a policy each converts.
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["enforcement"], told["kind"], told["requests"]) == ("traps", kind, 101)
    assert told["ratio"] == pytest.approx(told["seconds"] / told["bare"]["seconds"])
