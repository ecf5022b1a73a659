"""What tests of the command line have in common."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from .boot_parts import write_policy


def program(*arguments):
    """`pagegate` with these arguments."""
    return [sys.executable, "-m", "pagegate", *map(str, arguments)]


def pagegate(*arguments, cwd, status=0):
    """Runs it there. It ends with this status."""
    done = subprocess.run(program(*arguments), cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture
def policy(tmp_path):
    """Writes a policy's file."""
    return functools.partial(write_policy, tmp_path)


@pytest.fixture
def image(tmp_path):
    """Writes a raw image of this code."""

    def image(code):
        path = tmp_path / "image"
        path.write_bytes(code)
        return path

    return image
