"""A shell's completion of commands, policies and guests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def completed(words, cwd):
    """What bash would offer for the last of these words."""
    given = {"_PAGEGATE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "pagegate"],
        cwd=cwd,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return [line.partition(",")[2] or line for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text("1 / 0\nclass One: pass\nclass Two: pass\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pagegate", "re"], ["replay"]),
        (["pagegate", "trace", "s"], ["synth"]),
        (["pagegate", "run", "--guest", "t"], ["touch"]),
        (["pagegate", "run", "-p", "Quo"], ["Quota"]),
        (["pagegate", "run", "-p", "mine.py:"], ["mine.py:One", "mine.py:Two"]),
        (["pagegate", "boot", "--policy", "mine.py:T"], ["mine.py:Two"]),
        (["pagegate", "events", "x", "--outcome", "den"], ["denied"]),
        (["pagegate", "run", "--enf"], ["--enforcement"]),
    ],
)
def test_what_is_offered(folder, words, offered):
    assert completed(words, folder) == offered


def test_files_are_left_to_the_shell(folder):
    for words in (["pagegate", "run", "-p", "mi"], ["pagegate", "boot", "vm"], ["pagegate", "run", "--guest", "mi"]):
        given = {
            "_PAGEGATE_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "pagegate"], cwd=folder, env={**os.environ, **given}, capture_output=True, text=True
        )
        assert done.stdout == f"file,{words[-1]}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_how_it_is_switched_on(shell):
    done = subprocess.run(
        [sys.executable, "-m", "pagegate"],
        env={**os.environ, "_PAGEGATE_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_PAGEGATE_COMPLETE={shell}_complete" in done.stdout
