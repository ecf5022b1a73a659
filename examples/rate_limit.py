"""Limits how many requests a second are answered, and how many at once; above that the guest has to wait.

Against a guest that keeps its host busy: each conversion costs the host system calls, and other guests share that host.
Above the rate an explicit request gets EAGAIN, which tells the guest to ask again later. An implicit one makes its own
vCPU wait, and no other. The limit is a token bucket that is filled by the times of the requests.

    pagegate run -p examples/rate_limit.py --guest explicit
    pagegate run -p examples/rate_limit.py:limit -o per_second=50 -o burst=4 --guest touch --timeout 2
"""

from __future__ import annotations

from pagegate.policies import Builtin, RateLimit


def limit(per_second: float = 1000.0, burst: int = 64) -> Builtin:
    """A policy for ``per_second`` requests on average, and ``burst`` at once. It runs in Rust."""
    return RateLimit(per_second, burst)


policy = limit()
