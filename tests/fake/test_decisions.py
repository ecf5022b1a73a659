"""What each decision of a policy does."""

from __future__ import annotations

import errno

import pagegate
import pytest
from pagegate import Convert, Deny, PolicyError, Retry, Stop
from pagegate.testing import Step

from .conftest import TWO_VIEWS, WAYS

PAGE = 4096
PRIVATE, SHARED = 16, 0


def private_pages(vm):
    private = [
        range(gpa // PAGE, (gpa + size) // PAGE) for gpa, size, state in vm.attributes.runs() if state == "private"
    ]
    return [page for pages in private for page in pages]


REQUESTS = [
    pytest.param(lambda page, way: Step.memory_fault(way.view(page * PAGE, "private")), id="implicit"),
    pytest.param(lambda page, way: Step.hypercall(page * PAGE, 4, PRIVATE), id="hypercall"),
    pytest.param(lambda page, way: Step.doorbell(page * PAGE, 4, PRIVATE), id="doorbell"),
]


@pytest.fixture(params=REQUESTS)
def to_private(request):
    """A step that asks for page 8 to be private; an explicit one asks for pages 8 to 11."""
    return lambda page, way=WAYS[0]: request.param(page, way)


# ---- Convert


def test_without_a_policy_every_request_is_converted(make, to_private) -> None:
    vm, _ = make([to_private(8)])
    report = vm.run(timeout=10)
    assert report.conversions == 1
    assert private_pages(vm) == ([8] if report.faults else [8, 9, 10, 11])


def test_a_narrower_range_is_converted(make, recorder) -> None:
    vm, fake = make([Step.hypercall(8 * PAGE, 4, PRIVATE)], policy=recorder(Convert(gpa=9 * PAGE, size=2 * PAGE)))
    report = vm.run(timeout=10)
    assert private_pages(vm) == [9, 10]
    assert report.bytes_to_private == 2 * PAGE
    assert fake.replies()[0].value == 0


def test_a_wider_range_is_converted(make, recorder, to_private, way) -> None:
    vm, _ = make([to_private(8, way)], policy=recorder(Convert(gpa=4 * PAGE, size=16 * PAGE)), way=way)
    report = vm.run(timeout=10)
    assert (report.reason, report.conversions, report.bytes_to_private) == ("halt", 1, 16 * PAGE)
    assert private_pages(vm) == list(range(4, 20))


def test_only_size_or_only_start_given(make, recorder) -> None:
    policy = recorder(Convert(size=PAGE), Convert(gpa=20 * PAGE))
    vm, _ = make([Step.doorbell(8 * PAGE, 4, PRIVATE)] * 2, policy=policy)
    vm.run(timeout=10)
    assert private_pages(vm) == [8, 20, 21, 22, 23]


def test_convert_to_another_state_than_asked(make, recorder, to_private) -> None:
    vm, _ = make([to_private(8)], policy=recorder(Convert(to="shared")))
    vm.convert(8 * PAGE, 4 * PAGE, to="private")
    before = vm.attributes.private_bytes
    report = vm.run(timeout=10)
    assert before == 4 * PAGE
    assert report.bytes_to_private == 0
    # The page is in the state of the access, so the policy is not asked.
    assert vm.attributes.private_bytes == (0 if report.requests else before)
    assert report.requests == report.hypercalls


def test_convert_of_other_pages_than_asked(make, recorder) -> None:
    vm, fake = make([Step.doorbell(8 * PAGE, 1, PRIVATE)], policy=recorder(Convert(gpa=30 * PAGE)))
    vm.run(timeout=10)
    assert private_pages(vm) == [30]
    assert fake.replies()[0].value == 0


@pytest.mark.parametrize(
    "answer",
    [
        Convert(gpa=64 * PAGE),
        Convert(gpa=1 << 45),
        Convert(gpa=(1 << 64) - PAGE, size=2 * PAGE),
        Convert(gpa=60 * PAGE, size=5 * PAGE),
        Convert(size=(1 << 64) - PAGE),
        Convert(size=0),
        Convert(size=100),
        Convert(gpa=0x1001),
    ],
)
def test_impossible_ranges_are_policy_errors(make, recorder, to_private, answer) -> None:
    vm, fake = make([to_private(8)], policy=recorder(answer))
    calls = fake.calls("set_attributes")
    with pytest.raises(PolicyError, match="vCPU 0") as caught:
        vm.run(timeout=10)
    assert (caught.value.vcpu, caught.value.gpa) == (0, 8 * PAGE)
    assert fake.calls("set_attributes") == calls
    assert vm.attributes.private_bytes == 0


# ---- Deny


def test_implicit_deny_ends_the_run(make, recorder) -> None:
    policy = recorder(Deny())
    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=policy)
    report = vm.run(timeout=10)
    assert (report.reason, report.denied, report.conversions, report.requests) == ("denied", 1, 0, 1)
    assert vm.attributes.private_bytes == 0


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_a_denied_access_asks_again_in_the_next_run(make, recorder, way) -> None:
    policy = recorder(Deny(), Deny(), Convert())
    vm, _ = make([Step.access(way.view(8 * PAGE, "private"), write=True)], policy=policy, way=way)
    assert [vm.run(timeout=10).reason for _ in range(3)] == ["denied", "denied", "halt"]
    assert [(fault.gpa, fault.private, fault.state) for fault in policy.requests] == [(8 * PAGE, True, "shared")] * 3
    assert private_pages(vm) == [8]


def test_a_denied_mmio_request_can_be_dropped_by_starting_afresh(make, recorder) -> None:
    vm, _ = make([Step.access(8 * PAGE)], policy=recorder(Deny()), way=("memslots", 40))
    assert vm.run(timeout=10).reason == "denied"
    vm.vcpus[0].start(mode="long", rip=0x1000)
    assert vm.run(timeout=10).reason == "halt"
    assert vm.attributes.private_bytes == 0


# ---- Retry


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_implicit_retry_counts_repeats(make, recorder, way) -> None:
    policy = recorder(*[Retry()] * 5, Convert())
    vm, _ = make([Step.access(way.view(8 * PAGE, "private"))], policy=policy, way=way)
    report = vm.run(timeout=10)
    assert [fault.repeats for fault in policy.requests] == [0, 1, 2, 3, 4, 5]
    assert (report.reason, report.retries, report.conversions) == ("halt", 5, 1)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_only_a_store_that_kvm_emulates_is_executed_before_it_is_asked_about(make, recorder, way, write) -> None:
    policy = recorder(Retry(), Convert())
    vm, _ = make([Step.access(way.view(8 * PAGE, "private"), write=write)], policy=policy, way=way)
    vm.run(timeout=10)
    assert [fault.executed for fault in policy.requests] == [write and way.enforcement == "memslots"] * 2
    assert f"executed={policy.requests[0].executed}" in repr(policy.requests[0])


def test_repeats_begin_anew_for_another_page(make, recorder) -> None:
    policy = recorder(Retry())
    vm, _ = make([Step.memory_fault(8 * PAGE), Step.memory_fault(8 * PAGE), Step.memory_fault(9 * PAGE)], policy=policy)
    vm.run(timeout=10)
    assert [fault.repeats for fault in policy.requests] == [0, 1, 0]


def test_repeats_begin_anew_after_a_change_of_the_page(make) -> None:
    class Flips:
        def __init__(self) -> None:
            self.repeats: list[int] = []

        def memory_fault(self, fault):
            self.repeats.append(fault.repeats)
            if len(self.repeats) == 2:
                vm.convert(8 * PAGE, PAGE, to="private")
                vm.convert(8 * PAGE, PAGE, to="shared")
            return Retry()

    policy = Flips()
    vm, _ = make([Step.memory_fault(8 * PAGE)] * 4, policy=policy)
    vm.run(timeout=10)
    assert policy.repeats == [0, 1, 0, 1]


def test_repeats_count_on_though_a_neighbour_changes(make) -> None:
    class Busy:
        def __init__(self) -> None:
            self.repeats: list[int] = []

        def memory_fault(self, fault):
            self.repeats.append(fault.repeats)
            vm.convert(30 * PAGE, PAGE, to=["private", "shared"][len(self.repeats) % 2])
            return Retry()

    policy = Busy()
    vm, _ = make([Step.memory_fault(8 * PAGE)] * 4, policy=policy)
    vm.run(timeout=10)
    assert policy.repeats == [0, 1, 2, 3]


@pytest.mark.parametrize("answer", [Retry(), Convert(to="shared"), Convert(gpa=30 * PAGE)], ids=repr)
@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_requests_that_are_never_carried_out_are_a_livelock(make, recorder, way, answer) -> None:
    policy = recorder(answer)
    vm, _ = make([Step.access(way.view(8 * PAGE, "private"))], policy=policy, way=way)
    assert vm.run(timeout=60).reason == "livelock"
    assert pagegate.LIVELOCK_BOUND - 1 <= len(policy.requests) <= pagegate.LIVELOCK_BOUND + 1
    assert policy.requests[-1].repeats == len(policy.requests) - 1
    assert not vm.attributes.is_private(8 * PAGE)


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_a_policy_that_converts_another_page_each_time_ends_as_a_livelock(make, way) -> None:
    class Elsewhere:
        def __init__(self) -> None:
            self.calls = 0

        def memory_fault(self, fault):
            self.calls += 1
            return Convert(gpa=30 * PAGE, to=["private", "shared"][self.calls % 2])

    policy = Elsewhere()
    vm, _ = make([Step.access(way.view(8 * PAGE, "private"))], policy=policy, way=way)
    assert vm.run(timeout=5).reason == "livelock"


# ---- Stop


def test_stop_ends_the_run_with_its_reason(make, recorder, to_private) -> None:
    vm, _ = make([to_private(8)], policy=recorder(Stop("that will do")))
    report = vm.run(timeout=10)
    assert (report.reason, report.conversions, report.requests) == ("that will do", 0, 1)
    assert vm.attributes.private_bytes == 0


def test_stop_ends_every_vcpu(make, recorder) -> None:
    vm, _ = make([Step.memory_fault(8 * PAGE)], [Step.block()], policy=recorder(Stop("all")))
    assert vm.run(timeout=20).reason == "all"


# ---- decisions as values


def test_decisions_are_values() -> None:
    assert Convert() == Convert(to=None, gpa=None, size=None)
    assert Convert("private", 0x1000, 0x2000) != Convert("private", 0x1000, 0x1000)
    assert hash(Deny(errno.EPERM)) == hash(Deny(errno.EPERM))
    assert len({Retry(), Retry(), Stop("a"), Stop("a"), Stop("b")}) == 3
    assert (Deny().errno, Stop("x").reason, Convert("shared").to) == (errno.EINVAL, "x", "shared")
    assert eval(repr(Convert("private", 0x1000, 0x2000))) == Convert("private", 0x1000, 0x2000)


@pytest.mark.parametrize("number", [0, -1, 4096])
def test_deny_takes_a_positive_errno(number) -> None:
    with pytest.raises(ValueError, match="errno"):
        Deny(number)


def test_convert_takes_a_state() -> None:
    with pytest.raises(ValueError, match="private"):
        Convert("secret")


@pytest.mark.parametrize("decision", [Convert(), Deny(), Stop("x")], ids=repr)
def test_decisions_are_frozen(decision) -> None:
    with pytest.raises(AttributeError):
        decision.errno = 1


# ---- what is recorded


def test_the_report_counts_what_happened(make, recorder) -> None:
    script = [
        Step.doorbell(8 * PAGE, 4, PRIVATE),
        Step.doorbell(8 * PAGE, 2, SHARED),
        Step.memory_fault(20 * PAGE),
        Step.hypercall(0, 1, SHARED),
        Step.doorbell(8 * PAGE, 0, SHARED),
        Step.hypercall(0, 1, SHARED),
    ]
    vm, _ = make(script, policy=recorder(Convert(), Convert(), Convert(), Deny(), Retry()))
    report = vm.run(timeout=10)
    assert (report.requests, report.faults, report.hypercalls, report.malformed) == (5, 1, 4, 1)
    assert (report.conversions, report.denied, report.retries) == (3, 1, 1)
    assert (report.bytes_to_private, report.bytes_to_shared) == (5 * PAGE, 2 * PAGE)
    latency = report.latency
    assert 0 < latency.p50 <= latency.p90 <= latency.p99 <= latency.max
    assert report.seconds >= latency.max / 1e9
    assert vm.run(timeout=10).requests == 0


def test_events_say_the_same_as_the_report(make, recorder) -> None:
    script = [Step.doorbell(8 * PAGE, 4, PRIVATE), Step.memory_fault(20 * PAGE), Step.hypercall(0, 1, SHARED)]
    vm, _ = make(script, policy=recorder(Convert(gpa=9 * PAGE, size=PAGE), Convert(), Deny(errno.EPERM)))
    vm.run(timeout=10)
    told = [(event.kind, event.gpa, event.size, event.to, event.outcome, event.errno) for event in vm.events]
    assert told == [
        ("explicit", 8 * PAGE, 4 * PAGE, "private", "converted", 0),
        ("implicit", 20 * PAGE, PAGE, "private", "converted", 0),
        ("explicit", 0, PAGE, "shared", "denied", errno.EPERM),
    ]
    first = next(iter(vm.events))
    assert (first.done_gpa, first.done_size, first.done_to, first.changed) == (9 * PAGE, PAGE, "private", PAGE)


def test_the_event_log_is_bounded(make) -> None:
    vm, _ = make([Step.doorbell(8 * PAGE, 1, PRIVATE), Step.doorbell(8 * PAGE, 1, SHARED)], cycles=100, events=16)
    assert vm.run(timeout=20).requests == 200
    assert len(vm.events) <= 16
    assert vm.events.total == 200
    assert vm.events.dropped == 200 - len(vm.events)
    assert [event.sequence for event in vm.events][-1] == 199
