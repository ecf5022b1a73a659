"""Chains of built-in policies: whatever their order, each bounds what is done."""

from __future__ import annotations

import errno
import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagegate import Convert, PolicyError, Vm
from pagegate.policies import Align, PingPong, Quota, RateLimit, Window
from pagegate.testing import PolicyTester, Step

from .conftest import TWO_VIEWS, WAYS, assert_one_truth, mapped

PAGE = 4096
MEMORY = 64 * PAGE
# A long-mode machine's page tables lie in the last pages and are shared.
USABLE = 58
WINDOW = range(16, 24)

NO_DECISIONS = [
    Convert(size=0),
    Convert(size=1),
    Convert(gpa=0x5001),
    Convert(gpa=0x5000, size=PAGE - 1),
    Convert(gpa=MEMORY),
    Convert(gpa=0x5000, size=MEMORY),
    Convert(gpa=(1 << 64) - PAGE, size=2 * PAGE),
]
WRAPS = {
    "align": lambda then: Align(16 * PAGE, then),
    "align-twice": lambda then: Align(2 * PAGE, Align(16 * PAGE, then)),
    "window": lambda then: Window([(WINDOW.start * PAGE, len(WINDOW) * PAGE)], then),
    "window-of-all": lambda then: Window([(0, MEMORY)], then),
    "align-window": lambda then: Align(16 * PAGE, Window([(0, 32 * PAGE)], then)),
    "window-align": lambda then: Window([(0, 32 * PAGE)], Align(16 * PAGE, then)),
    "quota-align": lambda then: Quota(0, Align(16 * PAGE, then)),
    "align-quota": lambda then: Align(16 * PAGE, Quota(0, then)),
    "ping-pong-align": lambda then: PingPong(3, 1.0, Align(16 * PAGE, then)),
    "rate-limit-align": lambda then: RateLimit(1e6, 9, Align(16 * PAGE, then)),
}


class Says:
    def __init__(self, answer) -> None:
        self.answer = answer

    def memory_fault(self, _):
        return self.answer

    map_gpa_range = memory_fault


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("answer", NO_DECISIONS, ids=repr)
def test_no_wrapper_makes_a_decision_of_what_is_none(make, way, answer, wrap) -> None:
    ways = [Step.hypercall(0x5000, 1, 0)]
    ways += [Step.access(way.view(0x5000, "shared"))] if way in TWO_VIEWS else []
    for step in ways:
        vm, fake = make([step], way=way, initial="private", policy=WRAPS[wrap](Says(answer)))
        before = vm.attributes.runs()
        with pytest.raises(PolicyError, match="Convert: range"):
            vm.run(timeout=10)
        assert (vm.attributes.runs(), fake.replies()) == (before, [])
        assert [(event.outcome, event.changed) for event in vm.events] == [("failed", 0)]
    with pytest.raises(PolicyError, match="Convert: range"):
        PolicyTester(WRAPS[wrap](Says(answer)), memory=MEMORY).call(0x5000, to="shared")


# Blocks of 16 pages reach past the window, and past what the quota leaves.
BOUNDS = {
    "window": (lambda then: Window([(WINDOW.start * PAGE, len(WINDOW) * PAGE)], then), WINDOW),
    "quota": (lambda then: Quota(16 * PAGE, then), range(17, 18)),
}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("align_is_outside", [False, True])
def test_widening_stays_inside_wherever_it_is_in_the_chain(make, way, bound, align_is_outside) -> None:
    limit, done = BOUNDS[bound]

    def chain():
        return Align(16 * PAGE, limit(None)) if align_is_outside else limit(Align(16 * PAGE))

    steps = [Step.hypercall(17 * PAGE, 1, 0)]
    steps += [Step.access(way.view(17 * PAGE, "shared"))] if way in TWO_VIEWS else []
    for step in steps:
        vm, fake = make([step], way=way, initial="private", policy=chain())
        report = vm.run(timeout=10)
        assert (report.reason, report.denied) == ("halt", 0)
        assert [page for page, state in enumerate(mapped(vm)[:USABLE]) if state == "shared"] == list(done)
        (event,) = vm.events
        decided = event.decision_gpa, event.decision_size
        assert decided == (event.done_gpa, event.done_size) == (done.start * PAGE, len(done) * PAGE)
        assert_one_truth(vm, fake)
    # To private there is no limit, so the whole block is converted.
    tester = PolicyTester(chain(), memory=MEMORY, initial="shared")
    assert tester.fault(17 * PAGE) == Convert(gpa=16 * PAGE, size=16 * PAGE)


def test_a_listener_that_refuses_the_widened_range_is_asked_for_the_page(make, way) -> None:
    class InUse:
        def prepare(self, change) -> bool:
            return not change.gpa <= 20 * PAGE < change.gpa + change.size

    vm, fake = make(
        [Step.hypercall(17 * PAGE, 1, 16), Step.hypercall(20 * PAGE, 1, 16)], way=way, policy=Align(16 * PAGE)
    )
    vm.add_listener(InUse())
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [0, errno.EAGAIN]
    assert [page for page, state in enumerate(mapped(vm)) if state == "private"] == [17]


spans = st.tuples(st.integers(0, USABLE - 1), st.integers(1, 12)).map(lambda at: (at[0], min(at[1], USABLE - at[0])))
links = st.one_of(
    st.integers(0, 5).map(lambda power: ("align", 1 << power)),
    st.lists(spans, min_size=1, max_size=3).map(lambda ranges: ("window", ranges)),
    st.integers(6, 40).map(lambda pages: ("quota", pages)),
)


def chain_of(described):
    policy = None
    for kind, value in described:
        if kind == "align":
            policy = Align(value * PAGE, policy)
        elif kind == "window":
            policy = Window([(first * PAGE, count * PAGE) for first, count in value], policy)
        else:
            policy = Quota(value * PAGE, policy)
    return policy


@pytest.mark.parametrize("way", WAYS, ids=str)
@settings(max_examples=40)
@given(described=st.lists(links, max_size=4), asked=st.lists(st.tuples(spans, st.sampled_from([0, 0, 16])), max_size=8))
def test_a_machine_keeps_to_any_chain(way, described, asked) -> None:
    fake = way.fake([Step.hypercall(first * PAGE, count, to) for (first, count), to in asked])
    with Vm(MEMORY, hypervisor=fake, policy=chain_of(described), initial="private", **way.arguments) as vm:
        vm.vcpus[0].start(mode="long", rip=0x1000)
        at_first = MEMORY - vm.attributes.private_bytes
        vm.run(timeout=10)
        shared = [page for page, state in enumerate(mapped(vm)[:USABLE]) if state == "shared"]
        for kind, value in described:
            if kind == "window":
                inside = set(itertools.chain.from_iterable(range(first, first + count) for first, count in value))
                assert set(shared) <= inside
            elif kind == "quota":
                assert MEMORY - vm.attributes.private_bytes <= max(value * PAGE, at_first)
        assert_one_truth(vm, fake)


def test_a_chain_has_an_end(make) -> None:
    policy = functools.reduce(lambda policy, _: Quota(1 << 30, policy), range(999), None)
    with pytest.raises(ValueError, match="1000 policies"):
        Quota(1 << 30, policy)
    vm, _ = make([Step.hypercall(0x1000, 1, 0)], way=WAYS[0], initial="private", policy=policy)
    assert vm.run(timeout=10).conversions == 1
