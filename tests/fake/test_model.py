"""Random programs on the fake hypervisor, against the model of tests/modelled. For many of them: tests/model."""

from __future__ import annotations

from tests.modelled.machines import FakeMachine
from tests.modelled.search import search_on_the_fake

FAILING = {
    "attributes": ("set_attributes", "discard", "create_memslot", "delete_memslot"),
    "traps": ("set_attributes", "discard"),
    "memslots": ("create_memslot", "delete_memslot", "discard"),
}


def test_the_model_agrees(way) -> None:
    search_on_the_fake(
        lambda program, policy: FakeMachine(way, program, policy),
        2000,
        calls=FakeMachine.calls,
        failing=FAILING[way.enforcement],
    )
