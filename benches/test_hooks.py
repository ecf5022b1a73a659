"""What it costs to have Python judge: 10,000 times each, from the core and beside it from a loop."""

from __future__ import annotations

import pytest
from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Region, policies

AT = 0x10_0000
REQUESTS = 10_000


class Judge:
    """Looks at the request and answers."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        if call.to == "shared" and call.gpa < AT:
            return Deny()
        return Convert()


class Plain:
    """Looks at nothing."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert()


class Keeps:
    """Keeps what it was asked, so that each request is an object of its own."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        self.last = call
        return Convert()


class Learned:
    """Says once and for all that everything is to be converted."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert(remember=Region(0, 64 << 20))


HOOKS = [Judge, Plain, Keeps]


@pytest.mark.benchmark(group="10,000 requests")
@pytest.mark.parametrize("policy", [policies.Allow, *HOOKS, Learned], ids=lambda policy: policy.__name__)
def test_from_the_core(benchmark, requests, policy) -> None:
    run, setup = requests(policy())
    benchmark.pedantic(run, setup=setup, rounds=20)


@pytest.mark.benchmark(group="10,000 requests")
def test_from_the_core_around_built_in_policies(benchmark, requests) -> None:
    run, setup = requests(policies.Quota(64 << 20, policies.Align(4096, Judge())))
    benchmark.pedantic(run, setup=setup, rounds=20)


@pytest.mark.benchmark(group="10,000 bare calls")
@pytest.mark.parametrize("policy", HOOKS, ids=lambda policy: policy.__name__)
def test_from_a_loop(benchmark, policy) -> None:
    hook = policy().map_gpa_range
    calls = [MapGpaRange(AT, to="private"), MapGpaRange(AT, to="shared")] * (REQUESTS // 2)

    def loop() -> None:
        for call in calls:
            hook(call)

    benchmark.pedantic(loop, rounds=20)


@pytest.mark.benchmark(group="objects")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Convert(), id="Convert()"),
        pytest.param(lambda: Convert(gpa=AT, size=8192), id="Convert(gpa=, size=)"),
        pytest.param(lambda: Convert(remember=Region(AT, 4096)), id="Convert(remember=)"),
        pytest.param(lambda: Deny(), id="Deny()"),
        pytest.param(lambda: MapGpaRange(AT, to="private"), id="MapGpaRange()"),
        pytest.param(lambda: MemoryFault(AT), id="MemoryFault()"),
        pytest.param(lambda: object(), id="object()"),
    ],
)
def test_an_object(benchmark, make) -> None:
    benchmark(make)


@pytest.mark.benchmark(group="fields")
@pytest.mark.parametrize("name", ["gpa", "to", "state", "vcpu"])
def test_a_field(benchmark, name) -> None:
    benchmark(getattr, MapGpaRange(AT, to="private"), name)
