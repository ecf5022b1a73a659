"""Policies that come with pagegate. They run in Rust: a request that only they judge never enters Python.

Each that takes ``then`` asks it, and changes or replaces its answer. ``then`` may be any policy, also a Python one; by
default it is ``Allow()``.

    Quota(8 << 20, then=Align(2 << 20, then=MyPolicy()))
"""

from pagegate._core import Align, Allow, Builtin, DenyAll, ExplicitOnly, PingPong, Quota, RateLimit, Window

__all__ = ["Align", "Allow", "Builtin", "DenyAll", "ExplicitOnly", "PingPong", "Quota", "RateLimit", "Window"]
