from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pagegate import Vm
from pagegate.testing import Fake

MEMORY = 64 * 4096

Pair = tuple[Vm, Fake]
Make = Callable[..., Pair]

# enforcement and shared bit: every way to hold a page in its state
WAYS = [
    pytest.param(("attributes", None), id="attributes"),
    pytest.param(("attributes", 40), id="attributes-shared-bit"),
    pytest.param(("memslots", None), id="memslots"),
    pytest.param(("memslots", 40), id="memslots-shared-bit"),
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[str, int | None]:
    return request.param


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes machines on the fake, one vCPU a script, each started."""
    vms: list[Vm] = []

    def make(
        *scripts: list[Any],
        private_memory: bool = True,
        memslots: int = 32764,
        cycles: int = 1,
        memory: int = MEMORY,
        **kwargs: Any,
    ) -> Pair:
        way = kwargs.pop("way", None)
        if way is not None:
            kwargs["enforcement"], kwargs["shared_bit"] = way
            private_memory = way[0] == "attributes"
        slots = kwargs.pop("divided", 1)
        fake = Fake(*scripts, private_memory=private_memory, memslots=memslots, cycles=cycles)
        vm = Vm(memory, vcpus=max(1, len(scripts)), hypervisor=fake, memslots=slots, **kwargs)
        vms.append(vm)
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=0x1000)
        return vm, fake

    yield make
    for vm in vms:
        vm.close()
