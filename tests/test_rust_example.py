"""The core without Python: its example runs a guest under a policy, and its documentation builds without a warning."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(shutil.which("cargo") is None, reason="there is no cargo"),
    pytest.mark.timeout(1500),  # it may have to compile the core
]


def cargo(*arguments, **environment):
    return subprocess.run(
        ["cargo", *arguments, "--offline", "--quiet"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )


@pytest.mark.kvm
def test_a_guest_under_a_policy_in_rust():
    done = cargo("run", "-p", "pagegate-core", "--example", "keep_the_kernel")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "halt: 2 requests",
        "0x800000 + 0x1000 to shared: denied",
        "0x2000000 + 0x1000 to shared: converted",
    ]


def test_the_documentation_builds_without_a_warning():
    done = cargo("doc", "-p", "pagegate-core", "--no-deps", RUSTDOCFLAGS="-D warnings")
    assert done.returncode == 0, done.stderr
