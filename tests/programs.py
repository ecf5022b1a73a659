"""Python programs in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

SLOW = """
class Slow:
    closed = False
    flushed = 0
    def write(self, text):
        return os.write(1, text.encode())
    def flush(self):
        self.flushed += 1
        time.sleep({seconds} if self.flushed == 2 else 0)
"""
"""For a program's `parts`: as sys.stdout it sleeps while the interpreter is taken down. CPython flushes that before its
atexit functions, and again when it has begun to end."""


def run(code: str, parts: str = "", limit: float = 150) -> subprocess.CompletedProcess[str]:
    """Runs `parts`, then the indented `code`, for `limit` seconds at most."""
    program = parts + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=limit, check=False)


def passes(code: str, parts: str = "", status: int = 0, said: str = "") -> None:
    """The program ends with this status, says this and no more."""
    done = run(code, parts)
    assert (done.returncode, done.stdout, done.stderr) == (status, said, "")
