"""Built-in policies. They run in Rust: a request that only they judge never enters Python.

Those with a parameter ``then`` form a chain: they pass requests on to that policy and check or change its decision.
``then`` may be any policy, also a Python one; the default is ``Allow()``.

    Quota(8 << 20, then=Align(2 << 20, then=MyPolicy()))
"""

from pagegate._core import Align, Allow, Builtin, DenyAll, ExplicitOnly, PingPong, Quota, RateLimit, Window

__all__ = ["Align", "Allow", "Builtin", "DenyAll", "ExplicitOnly", "PingPong", "Quota", "RateLimit", "Window"]
