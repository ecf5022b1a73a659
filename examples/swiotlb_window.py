"""Lets pages become shared in one window only, where the guest keeps its bounce buffers (Linux: swiotlb).

Against a guest, or a driver in it, that shares anything else: a confidential guest needs to share only the buffers that
its devices use. Elsewhere an explicit request gets EINVAL, and an implicit one ends the run as "denied".

    pagegate run -p examples/swiotlb_window.py --guest demo
    pagegate run -p examples/swiotlb_window.py:window -o start=20M -o size=1M --guest demo
"""

from __future__ import annotations

from pagegate.policies import Builtin, Window


def window(start: int = 20 << 20, size: int = 32 << 20) -> Builtin:
    """A policy for a window of ``size`` bytes at ``start``. It runs in Rust."""
    return Window([(start, size)])


policy = window()
