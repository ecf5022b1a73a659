"""So many conversions a second, and so many at once; a guest that wants more has to wait.

Against a guest that keeps its host busy: each conversion costs the host system calls, and other guests share that host.
Above the rate an explicit request finds EAGAIN, which tells the guest to back off and ask again. A touch just waits,
which slows down the vCPU that did it and nobody else. The bucket is filled by the time of the requests.

    pagegate run -p examples/rate_limit.py --guest explicit
    pagegate run -p examples/rate_limit.py:limit -o per_second=50 -o burst=4 --guest touch --timeout 2
"""

from __future__ import annotations

from pagegate.policies import Builtin, RateLimit


def limit(per_second: float = 1000.0, burst: int = 64) -> Builtin:
    """The policy for ``per_second`` requests on average, and ``burst`` in a row. It is judged in Rust."""
    return RateLimit(per_second, burst)


policy = limit()
