"""Limits how many bytes are shared at any time, and how many one explicit request may share.

Against a guest that exposes more and more of its memory, or much of it in one request. It is for guests that start out
private. The core counts the bytes, with the pages locked, so that requests of two vCPUs cannot exceed the quota
together; a count in Python could not do that.

    pagegate run -p examples/shared_quota.py --guest demo
    pagegate run -p examples/shared_quota.py:quota -o max_shared=256K -o largest=64K --guest explicit
"""

from __future__ import annotations

from dataclasses import dataclass

from pagegate import Convert, Deny, MapGpaRange, Policy
from pagegate.policies import Builtin, Quota


@dataclass
class AtMost(Policy):
    """Refuses to share more than ``largest`` bytes at once. Conversions to private are always allowed."""

    largest: int

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """Decides by the size."""
        return Deny() if call.to == "shared" and call.size > self.largest else Convert()


def quota(max_shared: int = 8 << 20, largest: int = 1 << 20) -> Builtin:
    """A policy for ``max_shared`` bytes in all and ``largest`` bytes at once."""
    return Quota(max_shared, then=AtMost(largest))


policy = quota()
