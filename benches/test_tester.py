"""What it costs to ask a policy without a machine, beside a bare call of its hook."""

from __future__ import annotations

import pytest
from pagegate import Convert, MapGpaRange, policies
from pagegate.testing import PolicyTester

AT = 0x10_0000


class Plain:
    """Looks at nothing."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert:
        return Convert()


@pytest.mark.benchmark(group="a request without a machine")
@pytest.mark.parametrize("policy", [policies.Allow, Plain], ids=lambda policy: policy.__name__)
def test_call(benchmark, policy) -> None:
    tester = PolicyTester(policy())
    benchmark(tester.call, AT, 4096, to="shared")


@pytest.mark.benchmark(group="a request without a machine")
def test_fault(benchmark) -> None:
    tester = PolicyTester(policies.DenyAll())
    benchmark(tester.fault, AT)


@pytest.mark.benchmark(group="a request without a machine")
def test_ask_with_a_request_made_before(benchmark) -> None:
    tester = PolicyTester(Plain())
    benchmark(tester.ask, MapGpaRange(AT, to="shared"))


@pytest.mark.benchmark(group="a request without a machine")
def test_bare_call(benchmark) -> None:
    benchmark(Plain().map_gpa_range, MapGpaRange(AT, to="shared"))
