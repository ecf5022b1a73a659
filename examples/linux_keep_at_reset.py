"""Lets the reset of all memory to private through without discarding what shared pages hold.

Against the loss of bytes in pages that are in use. When Linux finds that it runs under KVM it asks for each range of
its memory map (e820) to be private, whatever the pages are: a kernel that was started by kexec cannot know what the one
before it had shared. Then it asks for `.bss..decrypted` to be shared again, which it has been using. A conversion
discards the side that a page leaves, so its bytes are lost on the way, unless the policy says otherwise.

    pagegate boot vmlinuz -p examples/linux_keep_at_reset.py

The shared side of what the reset covers stays in memory, and is found again when the page becomes shared. Only this
request of a boot covers pages of both states: drivers ask for pages that all are in the same one.
"""

from __future__ import annotations

from pagegate import Convert, MapGpaRange, Policy


class KeepAtReset(Policy):
    """Keeps the old side for one kind of request, and converts all others as asked."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        """The reset covers pages of both states."""
        return Convert(discard=not (call.to == "private" and call.state == "mixed"))
