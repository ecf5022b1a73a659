from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pagegate import Vm
from pagegate.testing import Fake

MEMORY = 64 * 4096
BIT = 40

Pair = tuple[Vm, Fake]
Make = Callable[..., Pair]

# Enforcement and shared bit: every way to enforce a page's state.
WAYS = [
    pytest.param(("attributes", None), id="attributes"),
    pytest.param(("attributes", BIT), id="attributes-shared-bit"),
    pytest.param(("memslots", None), id="memslots"),
    pytest.param(("memslots", BIT), id="memslots-shared-bit"),
]

# What the fake KVM has for a page in each state: for its gpa the attribute (is it private?) and the slot, then the same
# for its address in the shared view. A slot is None if there is none, and True if it has a guest_memfd.
ENFORCED = {
    ("attributes", None): {(True, True, False, None): "private", (False, True, False, None): "shared"},
    ("attributes", BIT): {(True, True, True, False): "private", (True, None, False, False): "shared"},
    ("memslots", None): {(False, True, False, None): "private", (False, False, False, None): "shared"},
    ("memslots", BIT): {(False, True, False, None): "private", (False, None, False, False): "shared"},
}


def enforced(vm: Vm, fake: Fake, gpa: int) -> Any:
    """The state that the fake KVM enforces for a page, or, if it is neither, the attributes and slots themselves."""
    view = gpa | 1 << BIT
    found = (fake.is_private(gpa), fake.slot_at(gpa), fake.is_private(view), fake.slot_at(view))
    return ENFORCED[vm.enforcement, vm.shared_bit].get(found, found)


def mapped(vm: Vm) -> list[str]:
    """Each page's state by the page map."""
    return [state for _, size, state in vm.attributes.runs() for _ in range(size // 4096)]


def assert_one_truth(vm: Vm, fake: Fake) -> None:
    """Checks that KVM enforces for every page the state in the map."""
    assert [enforced(vm, fake, gpa) for gpa in range(0, vm.memory, 4096)] == mapped(vm)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> tuple[str, int | None]:
    return request.param


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes machines on the fake, with one vCPU for each script, each started."""
    vms: list[Vm] = []

    def make(
        *scripts: list[Any],
        way: tuple[str, int | None] = ("attributes", None),
        memslots: int = 32764,
        cycles: int = 1,
        memory: int = MEMORY,
        **kwargs: Any,
    ) -> Pair:
        enforcement, shared_bit = way
        slots = kwargs.pop("divided", 1)
        # Without an enforcement the VM uses the one that the fake has.
        fake = Fake(*scripts, private_memory=enforcement == "attributes", memslots=memslots, cycles=cycles)
        vm = Vm(memory, vcpus=max(1, len(scripts)), hypervisor=fake, shared_bit=shared_bit, memslots=slots, **kwargs)
        vms.append(vm)
        assert vm.enforcement == enforcement
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=0x1000)
        return vm, fake

    yield make
    for vm in vms:
        vm.close()
