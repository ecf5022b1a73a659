"""A shell's completion of commands, policies and guests."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

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


GUEST = """
from pagegate import guests
1 / 0
number = 7
text = str(8)
class Kind: pass
def built(vcpu): return guests.Script()
def _own(): pass
one: object = guests.Script()
both = [built(0), built(1)]
other = built(2)
"""
BUILT_IN = ["Align", "Allow", "DenyAll", "ExplicitOnly", "PingPong", "Quota", "RateLimit", "Window"]
FILES = ["Al.py", "guest.py", "mine.py", "odd(name), really.py", "sub/"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text("1 / 0\nclass One: pass\nclass Two: pass\n")
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.py").write_text("")
    (tmp_path / "Al.py").write_text("")
    (tmp_path / "odd(name), really.py").write_text("class Odd: pass\n")
    (tmp_path / "guest.py").write_text(GUEST)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["pagegate", "re"], ["replay", "resume"]),
        (["pagegate", "trace", "s"], ["synth"]),
        (["pagegate", "run", "--guest", "t"], ["touch"]),
        (["pagegate", "run", "-p", "Quo"], ["Quota"]),
        (["pagegate", "run", "-p", ""], [*BUILT_IN, *FILES]),
        (["pagegate", "run", "-p", "Al"], ["Align", "Allow", "Al.py"]),
        (["pagegate", "run", "-p", "'Quota(8M, Al"], ["Quota(8M, Align", "Quota(8M, Allow", "Quota(8M, Al.py"]),
        (["pagegate", "run", "-p", "'Quota(8M,Align(2M,E"], ["Quota(8M,Align(2M,ExplicitOnly"]),
        (["pagegate", "run", "-p", "'Quota(8M,"], [f"Quota(8M,{each}" for each in (*BUILT_IN, *FILES)]),
        (["pagegate", "run", "-p", "'Quota(8M, "], [f"Quota(8M, {each}" for each in (*BUILT_IN, *FILES)]),
        (["pagegate", "run", "-p", "'Quota(8M, sub/o"], ["Quota(8M, sub/other.py"]),
        (["pagegate", "run", "-p", "'Quota(8M, mine.py:T"], ["Quota(8M, mine.py:Two"]),
        (["pagegate", "run", "-p", "'odd(name), really.py:"], ["odd(name), really.py:Odd"]),
        (
            ["pagegate", "run", "--guest", "guest.py:"],
            [f"guest.py:{each}" for each in ("built", "one", "both", "other")],
        ),
        (["pagegate", "run", "--guest", "guest.py:o"], ["guest.py:one", "guest.py:other"]),
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


def typed_in_bash(text, found, folder):
    """What an interactive bash has printed after this and two tabs, until that is there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.execvpe("bash", ["bash", "--norc", "-i"], {**os.environ, "PATH": path, "PS1": "$ ", "TERM": "dumb"})
    printed = ""

    def until(what, within):
        nonlocal printed
        end = time.monotonic() + within
        while time.monotonic() < end and not re.search(what, printed):
            if select.select([terminal], [], [], 0.1)[0]:
                printed += os.read(terminal, 1 << 16).decode()

    os.write(terminal, b'eval "$(_PAGEGATE_COMPLETE=bash_source pagegate)"; echo is${none}on\n')
    until("ison", 30)
    printed = ""
    os.write(terminal, text.encode() + b"\t\t")
    until(found, 20)
    os.write(terminal, b"\x03exit\n")
    os.close(terminal)
    os.waitpid(pid, 0)
    return printed.replace("\x07", "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("pagegate run -p mi", r"pagegate run -p mine\.py "),
        # Bash takes FILE:NAME for three words.
        ("pagegate run -p mine.py:T", r"pagegate run -p mine\.py:Two "),
        ("pagegate run -p mine.py:", r"\bOne +Two\b"),
        ("pagegate run --policy=Quo", r"pagegate run --policy=Quota "),
        ("pagegate boot vm", r"pagegate boot vmlinuz-6\.1 "),
        # A quoted word is one, with its blanks and colons.
        ("pagegate run -p 'Quota(8M, Ali", r"pagegate run -p 'Quota\(8M, Align'? "),
        ("pagegate run -p 'Quota(8M, ", r"\bAlign\b[^$]*\bmine\.py\b"),
        ("pagegate run -p 'Quota(8M, mine.py:T", r"pagegate run -p 'Quota\(8M, mine\.py:Two'? "),
        ("pagegate run -p ", r"\bAlign\b[^$]*\bmine\.py\b"),
        ("pagegate run --guest guest.py:bo", r"pagegate run --guest guest\.py:both "),
        ("pagegate run --guest to", r"pagegate run --guest touch "),
    ],
)
def test_an_interactive_bash(typed, found, folder) -> None:
    (folder / "vmlinuz-6.1").write_bytes(b"")
    assert re.search(found, typed_in_bash(typed, found, folder))
