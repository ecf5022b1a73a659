"""Random programs of a guest and the host with snapshots, resumes and resets, under traps and under memslots."""

from __future__ import annotations

import pytest

from tests.fake.conftest import Way
from tests.modelled.saved import search_on_kvm

pytestmark = pytest.mark.userfault

BIT = 35


@pytest.mark.parametrize("way", [Way("traps", BIT), Way("traps", BIT, "private"), Way("memslots", BIT)], ids=str)
@pytest.mark.timeout(600)
def test_the_model_agrees(way: Way, tmp_path_factory) -> None:
    search_on_kvm(way, lambda: tmp_path_factory.mktemp("any"), 14, call="hypercall")
