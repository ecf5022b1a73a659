"""Random programs of a guest and the host with snapshots, resumes and resets, on this host's KVM."""

from __future__ import annotations

import pytest

from tests.fake.conftest import Way
from tests.modelled.saved import search_on_kvm

pytestmark = [pytest.mark.kvm, pytest.mark.userfault]

BIT = 35


@pytest.mark.parametrize("way", [Way("memslots"), Way("memslots", BIT), Way("memslots", BIT, "private")], ids=str)
@pytest.mark.timeout(600)
def test_the_model_agrees(way: Way, tmp_path_factory) -> None:
    search_on_kvm(way, lambda: tmp_path_factory.mktemp("any"), 40, call="doorbell")
