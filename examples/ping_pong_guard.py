"""Ends the run if a page is converted back and forth; the report's reason says which page, how often and how fast.

For guests in which two owners use a page in different states: two vCPUs of which one takes it for private, or a driver
that lost track of what it shared. The page loses its bytes with each conversion, so such a guest does no useful work.

    pagegate run -p examples/ping_pong_guard.py --guest pingpong
    pagegate run -p examples/ping_pong_guard.py:guard -o turns=100 -o seconds=0.5 --guest pingpong
"""

from __future__ import annotations

from pagegate.policies import Builtin, PingPong


def guard(turns: int = 16, seconds: float = 1.0) -> Builtin:
    """A policy that ends the run after more than ``turns`` changes of direction within ``seconds``."""
    return PingPong(turns, seconds)


policy = guard()
