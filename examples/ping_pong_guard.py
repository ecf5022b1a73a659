"""A page that is wanted in both states in turn ends the run, and the reason is the evidence.

Against two owners that fight over a page, such as two vCPUs of which one believes it private, or a driver that forgot
what it shared. Each turn costs the page its bytes, so such a guest does not work, it only looks busy.

    pagegate run -p examples/ping_pong_guard.py --guest pingpong
    pagegate run -p examples/ping_pong_guard.py:guard -o turns=100 -o seconds=0.5 --guest pingpong
"""

from __future__ import annotations

from pagegate.policies import Builtin, PingPong


def guard(turns: int = 16, seconds: float = 1.0) -> Builtin:
    """The policy that ends the run at more than ``turns`` changes of direction within ``seconds``."""
    return PingPong(turns, seconds)


policy = guard()
