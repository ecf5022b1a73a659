"""Random programs of a guest in a software-protected VM, against the model of tests/modelled. For long: tests/model."""

from __future__ import annotations

import pytest

from tests.fake.conftest import Way
from tests.modelled.machines import KvmMachine
from tests.modelled.search import search_on_kvm

BIT = 35
WAYS = [
    Way("attributes"),
    Way("attributes", BIT),
    Way("attributes", BIT, "private"),
    Way("traps", BIT),
    Way("traps", BIT, "private"),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.timeout(600)
def test_the_model_agrees(way: Way) -> None:
    search_on_kvm(lambda program, policy: KvmMachine(way, program, policy, call="hypercall"), 200, calls=("hypercall",))
