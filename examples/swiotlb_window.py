"""Pages become shared in one window only, where the guest keeps its bounce buffers (Linux: swiotlb).

Against a guest, or a driver in it, that shares anything else: a confidential guest has no reason to share more than the
buffers through which its devices are served. Elsewhere an explicit request finds EINVAL, and a touch ends the run.

    pagegate run -p examples/swiotlb_window.py --guest demo
    pagegate run -p examples/swiotlb_window.py:window -o start=20M -o size=1M --guest demo
"""

from __future__ import annotations

from pagegate.policies import Builtin, Window


def window(start: int = 20 << 20, size: int = 32 << 20) -> Builtin:
    """The policy for a window of ``size`` bytes at ``start``. It is judged in Rust."""
    return Window([(start, size)])


policy = window()
