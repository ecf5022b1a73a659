"""What the benches share: machines on the fake hypervisor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pagegate import Vm
from pagegate.testing import Fake, Step

if TYPE_CHECKING:
    from collections.abc import Callable

MEMORY = 64 << 20
AT = 0x10_0000
PRIVATE, SHARED = 16, 0
REQUESTS = 10_000


@pytest.fixture
def requests() -> Callable[..., Any]:
    """Makes what runs 10,000 requests for a page, and a new machine for each time."""

    def make(policy: object, **settings: Any) -> tuple[Callable[[Vm], None], Callable[[], tuple[tuple[Vm], dict]]]:
        script = [Step.hypercall(AT, 1, PRIVATE), Step.hypercall(AT, 1, SHARED)]

        def setup() -> tuple[tuple[Vm], dict]:
            vm = Vm(MEMORY, policy=policy, hypervisor=Fake(script, cycles=REQUESTS // 2), **settings)
            vm.vcpus[0].start(mode="real")
            return (vm,), {}

        def run(vm: Vm) -> None:
            vm.run()

        return run, setup

    return make


@pytest.fixture
def ran() -> Vm:
    """A machine with 10,000 events, and every other of its first 20,000 pages private."""
    script = [Step.hypercall(page * 4096, 1, PRIVATE) for page in range(0, 20_000, 2)]
    vm = Vm(128 << 20, hypervisor=Fake(script))
    vm.vcpus[0].start(mode="real")
    vm.run()
    return vm
