"""Random programs of a guest on this host's /dev/kvm, against the model of tests/modelled. For long: tests/model."""

from __future__ import annotations

import pytest

from tests.fake.conftest import Way
from tests.modelled.machines import KvmMachine
from tests.modelled.search import search_on_kvm

BIT = 35
WAYS = [Way("memslots"), Way("memslots", BIT), Way("memslots", BIT, "private")]


@pytest.mark.kvm
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_model_agrees(way: Way) -> None:
    search_on_kvm(lambda program, policy: KvmMachine(way, program, policy, call="doorbell"), 1200, calls=("doorbell",))
