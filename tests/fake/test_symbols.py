"""Reading a kernel's symbols may take long: Ctrl-C, the run's end and policy_timeout get out of it."""

from __future__ import annotations

import collections
import ctypes
import itertools
import operator
import signal
from typing import Any

import pytest
from pagegate import Convert, PagegateError, PolicyTimeoutError, Vm
from pagegate.testing import Fake, Step

from tests import boot_parts

libc = ctypes.CDLL(None)


def one_after_the_other(*calls: tuple[Any, ...]) -> None:
    """Calls functions with no Python code in between: there a signal or another thread's exception would be noticed."""
    collections.deque(itertools.starmap(operator.call, calls), maxlen=0)


def booted(tmp_path, policy=None, **kwargs) -> Vm:
    fake = Fake([Step.hypercall(0x20_0000, 1, 0)])
    pc = {"platform": "pc", "confidential": "sev", "enforcement": "traps"}
    vm = Vm(64 << 20, hypervisor=fake, policy=policy, **pc, **kwargs)
    vm.boot(boot_parts.write_kernel(tmp_path))
    return vm


def test_ctrl_c_between_runs(tmp_path) -> None:
    done: list[int] = []
    with booted(tmp_path) as vm:
        with pytest.raises(KeyboardInterrupt):
            one_after_the_other((getattr(libc, "raise"), signal.SIGINT), (vm.symbol, 0), (done.append, 1))
        assert not done
        # It is asked again.
        assert vm.symbol(0) is None


@pytest.mark.parametrize("name", ["symbol", "disassembly"])
def test_the_end_of_the_run(tmp_path, name) -> None:
    said: list[str] = []

    class Asks:
        def map_gpa_range(self, call: object) -> Convert:
            vm.stop()
            with pytest.raises(PagegateError) as raised:
                getattr(call, name)
            said.append(str(raised.value))
            return Convert()

    with booted(tmp_path, Asks()) as vm:
        assert vm.run(timeout=20).reason == "stopped"
        assert said == ["the run is ending: the kernel's symbols are not read any more"]
        assert vm.run(timeout=20).reason == "halt"


@pytest.mark.parametrize("name", ["symbol", "disassembly"])
def test_policy_timeout(tmp_path, name) -> None:
    done: list[int] = []

    class Asks:
        def map_gpa_range(self, call: object) -> Convert:
            one_after_the_other((libc.usleep, 400_000), (getattr, call, name), (done.append, 1))
            return Convert()

    with booted(tmp_path, Asks(), policy_timeout=0.1) as vm:
        with pytest.raises(PolicyTimeoutError, match="longer than policy_timeout"):
            vm.run(timeout=20)
        assert not done


def test_a_hook_that_asks_in_time_is_told(tmp_path) -> None:
    told: list[object] = []

    class Asks:
        def map_gpa_range(self, call: Any) -> Convert:
            told.append(call.symbol)
            return Convert()

    with booted(tmp_path, Asks(), policy_timeout=5.0) as vm:
        assert vm.run(timeout=0.2).conversions == 1
    assert told == [None]
