"""Traces: recording the requests of a run, and replaying them to other policies.

with Vm(64 << 20, policy=MyPolicy()) as vm, trace.Recorder(vm, "boot.parquet"):
    ...
    vm.run(timeout=10.0)

found = trace.replay("boot.parquet", OtherPolicy())
print(found.policies[0], found.differences[:5])

``trace.read`` takes files, ``vm.events``, and any Arrow table with their columns, such as a filtered one.
"""

from pagegate._core import Difference, Judged, Recorder, Replay, Trace, replay
from pagegate._core import read_trace as read
from pagegate._core import synthetic_trace as synthetic

__all__ = ["Difference", "Judged", "Recorder", "Replay", "Trace", "read", "replay", "synthetic"]
