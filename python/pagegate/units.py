"""Numbers of bytes and times as text."""

from __future__ import annotations

_MOST = (1 << 64) - 1
"""What the size of a malformed request is that asks for more."""


def size(count: int) -> str:
    """A number of bytes as text, with a unit if it is whole."""
    if count == _MOST:
        return "≥16 EiB"
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def duration(nanoseconds: int) -> str:
    """A time that is short as text."""
    return f"{nanoseconds / 1000:.1f} µs" if nanoseconds < 10**6 else f"{nanoseconds / 10**6:.2f} ms"
