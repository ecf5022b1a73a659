"""No more than so many bytes are shared at any time, and no single request may be for more than a part of them.

Against a guest that exposes itself bit by bit, and against one request that exposes all of it. It is for guests that
start out private. A conversion that would exceed the quota is refused with the pages locked, so that two vCPUs cannot
slip through together; that is why the counting is left to the core and not done in Python.

    pagegate run -p examples/shared_quota.py --guest demo
    pagegate run -p examples/shared_quota.py:quota -o max_shared=256K -o largest=64K --guest explicit
"""

from __future__ import annotations

from dataclasses import dataclass

from pagegate import Convert, Deny, MapGpaRange, Policy
from pagegate.policies import Builtin, Quota


@dataclass
class AtMost(Policy):
    """Refuses to share more than ``largest`` bytes at once. To take pages back is always right."""

    largest: int

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """Looks at the size alone."""
        return Deny() if call.to == "shared" and call.size > self.largest else Convert()


def quota(max_shared: int = 8 << 20, largest: int = 1 << 20) -> Builtin:
    """The policy for ``max_shared`` bytes in all and ``largest`` at once."""
    return Quota(max_shared, then=AtMost(largest))


policy = quota()
