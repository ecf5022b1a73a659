from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pagegate
import pytest
from pagegate import Vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# Above the memory of all machines here, and within the physical address width of every CPU.
SHARED_BIT = 35


def of_two_views() -> list[str]:
    """The enforcements that machines with two views are tested with."""
    return ["auto", "traps"] if "sw-protected" in pagegate.probe().vm_types else ["auto"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with two views run with every enforcement, and those with `bit` with one view, too."""
    if "bit" in metafunc.fixturenames:
        ways = [(None, "auto"), *((SHARED_BIT, enforcement) for enforcement in of_two_views())]
        ids = ["one-view", *(f"shared-bit-{enforcement}" for enforcement in of_two_views())]
        metafunc.parametrize(("bit", "enforcement"), ways, ids=ids, indirect=["enforcement"])
    elif "shared_bit" in metafunc.fixturenames:
        metafunc.parametrize("enforcement", of_two_views(), indirect=True)


@pytest.fixture
def enforcement(request: pytest.FixtureRequest) -> str:
    """That of machines with a shared bit."""
    return getattr(request, "param", "auto")


@pytest.fixture
def make(enforcement: str) -> Iterator[Callable[..., Vm]]:
    """Makes machines on /dev/kvm, closed after the test."""
    vms: list[Vm] = []

    def make(memory: int = 16 << 20, **kwargs: Any) -> Vm:
        if kwargs.get("shared_bit") is not None:
            kwargs.setdefault("enforcement", enforcement)
        vms.append(Vm(memory, **kwargs))
        return vms[-1]

    yield make
    for vm in vms:
        vm.close()


@pytest.fixture
def shared_bit(enforcement: str) -> int:  # so that a test with it is run with each
    return SHARED_BIT
