from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pagegate import Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def make() -> Iterator[Callable[..., Vm]]:
    """Makes machines on /dev/kvm, closed after the test."""
    vms: list[Vm] = []

    def make(memory: int = 16 << 20, **kwargs: Any) -> Vm:
        vms.append(Vm(memory, **kwargs))
        return vms[-1]

    yield make
    for vm in vms:
        vm.close()


# Above the memory of all machines here, and within the physical address width of every CPU.
SHARED_BIT = 35


@pytest.fixture
def shared_bit() -> int:
    return SHARED_BIT
