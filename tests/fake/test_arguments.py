"""The code of arguments: it runs in the thread that calls, and no lock is held."""

from __future__ import annotations

import sys
import threading

import pytest
from pagegate import Convert, Deny, MapGpaRange, MemoryFault, PagegateError, Region, Vm, devices, policies, trace
from pagegate.testing import Fake, PolicyTester, Step

MEMORY = 1 << 20
PAGE = 4096


class Listener:
    def committed(self, change) -> None:
        pass


def use(vm: Vm) -> None:
    """Takes each of the machine's locks."""
    vm.write(0x1000, vm.read(0x1000, 8))
    vm.convert(0x8000, PAGE, to="private")
    vm.convert(0x8000, PAGE, to="shared")
    listener = Listener()
    vm.add_listener(listener)
    vm.remove_listener(listener)
    vm.vcpus[0].regs()
    vm.policy.replace(policies.Allow())
    vm.stop()
    assert not vm.running
    assert vm.attributes.runs()
    assert vm.events.total == len(list(vm.events))
    assert vm.console.tail() == b""


class Uses:
    """A number, a path, or bytes, of which whoever asks waits until another thread has used the machine."""

    def __init__(self, vm: Vm, value: object) -> None:
        self.vm = vm
        self.value = value
        self.asked = 0
        self.thread: int | None = None

    def _use(self):
        self.asked += 1
        self.thread = threading.get_ident()
        thread = threading.Thread(target=use, args=(self.vm,), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "a lock is held"
        return self.value

    def __index__(self) -> int:
        return self._use()

    def __float__(self) -> float:
        return float(self._use())

    def __fspath__(self) -> str:
        return str(self._use())

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self._use())


CALLS = {
    "read": lambda vm, odd: vm.read(odd(0x1000), odd(8)),
    "write": lambda vm, odd: vm.write(odd(0x1000), b"x"),
    "convert": lambda vm, odd: vm.convert(odd(0), odd(PAGE), to="private"),
    "run": lambda vm, odd: vm.run(timeout=odd(0.01)),
    "load": lambda vm, odd: vm.load(b"x", odd(0x1000)),
    "load a file": lambda vm, odd: vm.load(odd(__file__)),
    "start": lambda vm, odd: vm.vcpus[0].start(mode="long", rip=odd(0x1000)),
    "on_io": lambda vm, odd: vm.on_io(odd(0x80), print),
    "on_mmio": lambda vm, odd: vm.on_mmio(odd(0x1000_0000), odd(PAGE), print),
    "is_private": lambda vm, odd: vm.attributes.is_private(odd(0)),
    "state": lambda vm, odd: vm.attributes.state(odd(0), odd(PAGE)),
    "runs": lambda vm, odd: vm.attributes.runs(odd(0), odd(PAGE)),
    "since": lambda vm, odd: vm.events.since(odd(0)),
    "forget": lambda vm, odd: vm.policy.forget(Region(odd(0), odd(PAGE), uses=odd(1), seconds=odd(1.0))),
    "console": lambda vm, odd: vm.console.read(4, timeout=odd(0.01)),
    "recorder": lambda vm, odd: trace.Recorder(vm, odd(PATH), limit=odd(5)).close(timeout=odd(1)),
    "another machine": lambda vm, odd: Vm(odd(MEMORY), vcpus=odd(1), events=odd(5), hypervisor=Fake([])).close(),
    "trace": lambda vm, odd: trace.synthetic(odd(5), seed=odd(1)).write(odd(PATH)),
    "vsock": lambda vm, odd: devices.Vsock(odd(7), odd(SOCKET)),
    "decisions": lambda vm, odd: (Deny(odd(5)), Convert(gpa=odd(0), size=odd(PAGE))),
    "policies": lambda vm, odd: policies.RateLimit(odd(5.0), odd(1), policies.Align(odd(PAGE))),
    "requests": lambda vm, odd: (MemoryFault(odd(0)), MapGpaRange(odd(0), odd(PAGE), to="shared")),
    "tester": lambda vm, odd: PolicyTester(policies.Allow(), memory=odd(MEMORY)).fault(odd(0)),
    "steps": lambda vm, odd: Step.hypercall(odd(0), odd(1), odd(0)),
}
if sys.version_info >= (3, 12):
    CALLS["bytes"] = lambda vm, odd: (vm.write(0x1000, odd(b"x")), vm.console.offer(odd(b"x")))
PATH = "x.arrows"
SOCKET = "vsock"


@pytest.fixture
def vm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Vm(MEMORY, platform="pc", hypervisor=Fake([Step.block()] * 100)) as vm:
        vm.vcpus[0].start(mode="real")
        yield vm


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_lock_is_held_while_an_argument_is_asked(vm, call) -> None:
    made: list[Uses] = []

    def odd(value: object) -> Uses:
        made.append(Uses(vm, value))
        return made[-1]

    call(vm, odd)
    assert made
    assert all(each.asked for each in made)
    assert {each.thread for each in made} == {threading.get_ident()}, "it runs in the thread that calls"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_an_argument_raises_is_raised(vm, call) -> None:
    class Raises:
        def __init__(self, value: object) -> None:
            pass

        def fails(self, *_: object) -> int:
            raise KeyError("mine")

        __index__ = __float__ = __fspath__ = __buffer__ = fails

    with pytest.raises(KeyError, match="mine"):
        call(vm, Raises)
    use(vm)


def test_an_argument_that_closes_the_machine(vm) -> None:
    """The call says so, and does nothing to what is not there any more."""

    class Closes:
        def __index__(self) -> int:
            vm.close()
            return 0x1000

    with pytest.raises(PagegateError, match="closed"):
        vm.read(Closes(), 8)
