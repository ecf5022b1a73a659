"""Machines whose runs are recorded, for the tests of traces and of replays."""

from __future__ import annotations

from pagegate import Convert, Policy, Stop, Vm, trace
from pagegate.testing import Fake, Step

PAGE = 4096
MEMORY = 64 * PAGE
PRIVATE, SHARED = 16, 0
FORMATS = ("parquet", "arrow", "arrows")


def machine(*scripts, policy=None, **kwargs):
    fake = kwargs.pop("fake", None) or Fake(*scripts, cycles=kwargs.pop("cycles", 1))
    vm = Vm(kwargs.pop("memory", MEMORY), vcpus=max(1, len(scripts)), hypervisor=fake, policy=policy, **kwargs)
    for vcpu in vm.vcpus:
        vcpu.start(mode="long", rip=0x1000)
    return vm


def recorded(path, *scripts, policy=None, **kwargs):
    with machine(*scripts, policy=policy, **kwargs) as vm:
        with trace.Recorder(vm, path) as recorder:
            vm.run(timeout=30)
        assert (recorder.written, recorder.lost) == (vm.events.total, 0)
        return list(vm.events)


def call(page, pages=1, to=PRIVATE):
    return Step.doorbell(page * PAGE, pages, to)


class StopAt(Policy):
    def __init__(self, number):
        self.left = number

    def map_gpa_range(self, call):
        self.left -= 1
        return Stop("for now") if self.left == -1 else Convert()
