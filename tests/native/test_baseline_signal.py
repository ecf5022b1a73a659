"""The bare loop's signal is one that nobody handles, and is given back."""

from __future__ import annotations

from tests.programs import passes


def test_a_handler_of_somebody_else_stays():
    """The threads inherit a mask that blocks it, and are brought out of an endless loop all the same."""
    passes(
        """
import signal, re
from pagegate._core import bare_loop

taken = []
for number in range(signal.SIGRTMIN + 9, signal.SIGRTMIN + 12):
    signal.signal(number, lambda number, frame: taken.append(number))

def caught():
    mask = re.search(r"SigCgt:.(.*)", open("/proc/self/status").read())[1]
    return int(mask, 16) >> signal.SIGRTMIN - 1  # the C library has those below for itself

before = caught()
signal.pthread_sigmask(signal.SIG_BLOCK, range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
endless = b"\\xeb\\xfe"
for _ in range(2):
    try:
        bare_loop(1 << 20, [(0x1000, endless, 0)], enforcement="memslots", marks=0xF4, timeout=0.2)
    except OSError as error:
        assert "timed out" in str(error)
        continue
    raise AssertionError("it ended")
signal.pthread_sigmask(signal.SIG_UNBLOCK, range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
assert caught() == before
for number in range(signal.SIGRTMIN + 9, signal.SIGRTMIN + 12):
    signal.raise_signal(number)
assert taken == list(range(signal.SIGRTMIN + 9, signal.SIGRTMIN + 12)), taken
"""
    )
