"""What it costs to look at a machine: its states, its events, and itself."""

from __future__ import annotations

import pytest
from pagegate import Vm
from pagegate.testing import Fake

MEMORY = 64 << 20


@pytest.mark.benchmark(group="states")
def test_the_state_of_a_page(benchmark, ran) -> None:
    attributes = ran.attributes
    benchmark(attributes.is_private, 0x4000)


@pytest.mark.benchmark(group="states")
def test_the_state_of_a_page_in_a_dictionary(benchmark) -> None:
    states = {page * 4096: page % 2 == 0 for page in range(20_000)}
    benchmark(states.get, 0x4000)


@pytest.mark.benchmark(group="states")
def test_the_state_of_a_range(benchmark, ran) -> None:
    attributes = ran.attributes
    benchmark(attributes.state, 0x200_0000, 0x20_0000)


@pytest.mark.benchmark(group="states")
def test_private_bytes(benchmark, ran) -> None:
    attributes = ran.attributes
    benchmark(lambda: attributes.private_bytes)


@pytest.mark.benchmark(group="20,000 runs")
def test_runs(benchmark, ran) -> None:
    assert len(benchmark(ran.attributes.runs)) == 20_000


@pytest.mark.benchmark(group="20,000 runs")
def test_as_many_tuples(benchmark) -> None:
    benchmark(lambda: [(page * 4096, 4096, "private" if page % 2 == 0 else "shared") for page in range(20_000)])


@pytest.mark.benchmark(group="10,000 events")
def test_events_are_iterated(benchmark, ran) -> None:
    assert benchmark(lambda: sum(1 for _ in ran.events)) == 10_000


@pytest.mark.benchmark(group="10,000 events")
def test_a_field_of_each_event(benchmark, ran) -> None:
    assert benchmark(lambda: sum(event.changed for event in ran.events)) == 10_000 * 4096


@pytest.mark.benchmark(group="10,000 events")
def test_the_same_of_a_list(benchmark) -> None:
    changed = [4096] * 10_000
    benchmark(lambda: sum(changed))


@pytest.mark.benchmark(group="a machine")
def test_a_machine_is_made_and_closed(benchmark) -> None:
    def make() -> None:
        Vm(MEMORY, hypervisor=Fake([])).close()

    benchmark(make)


@pytest.mark.benchmark(group="a machine")
def test_a_conversion_by_the_host(benchmark) -> None:
    vm = Vm(MEMORY, hypervisor=Fake([]))

    def there_and_back() -> None:
        vm.convert(0, 4096, to="private")
        vm.convert(0, 4096, to="shared")

    benchmark(there_and_back)
