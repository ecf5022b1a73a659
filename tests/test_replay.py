"""Replays of recorded and synthetic traces, without KVM."""

from __future__ import annotations

import pagegate
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagegate import Convert, Deny, Policy, PolicyError, Region, Retry, policies, trace
from pagegate.testing import Step

from .trace_parts import MEMORY, PAGE, PRIVATE, SHARED, StopAt, call, machine, recorded


class Naive:
    """A naive model of a policy's replay, page by page."""

    def __init__(self, initial_shared):
        self.shared = set(initial_shared)
        self.peak = len(self.shared)
        self.to_private = self.to_shared = self.ping_pongs = 0
        self.touched = set()

    def convert(self, gpa, size, to):
        pages = set(range(gpa // PAGE, (gpa + size) // PAGE))
        changed = {page for page in pages if (page in self.shared) != (to == "shared")}
        (self.shared.update if to == "shared" else self.shared.difference_update)(pages)
        if not changed:
            return
        if to == "shared":
            self.to_shared += len(changed) * PAGE
        else:
            self.to_private += len(changed) * PAGE
        self.peak = max(self.peak, len(self.shared))
        self.ping_pongs += bool(pages & self.touched)
        self.touched |= pages

    def facts(self):
        return self.to_private, self.to_shared, self.peak * PAGE, self.ping_pongs


def facts(judged):
    return judged.bytes_to_private, judged.bytes_to_shared, judged.peak_shared, judged.ping_pongs


PAGES = st.integers(0, 15)
CALLS = st.lists(st.tuples(PAGES, st.integers(1, 4), st.sampled_from([PRIVATE, SHARED])), max_size=40)
ANSWERS = st.sampled_from(
    [Convert(), Convert("shared"), Convert(size=PAGE), Convert(gpa=8 * PAGE, size=2 * PAGE), Deny(), Deny(5), Retry()]
)


class Scripted(Policy):
    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def map_gpa_range(self, call):
        self.asked.append((call.vcpu, call.gpa, call.size, call.to, call.page_size, call.raw, call.state, call.time))
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


@settings(max_examples=150)
@given(CALLS, st.lists(ANSWERS, min_size=1, max_size=5), st.lists(ANSWERS, min_size=1, max_size=5))
def test_a_replay_counts_as_a_naive_one_does(calls, then, now) -> None:
    live = Scripted(then)
    vm = machine([call(*each) for each in calls], policy=live)
    vm.run(timeout=30)
    read = trace.read(vm.events)
    vm.close()
    again, other = Scripted(then), Scripted(now)
    found = trace.replay(read, again, other)
    assert again.asked == other.asked == live.asked
    assert found.policies[0].differences == 0
    assert facts(found.policies[0]) == facts(found.recorded)
    naive, different = Naive(range(MEMORY // PAGE)), 0
    for number, (page, pages, to) in enumerate(calls):
        asked = page * PAGE, pages * PAGE, "private" if to == PRIVATE else "shared"
        effects = []
        for answers in (then, now):
            answer = answers[number % len(answers)]
            effect = answer
            if isinstance(answer, Convert):
                gpa = asked[0] if answer.gpa is None else answer.gpa
                effect = gpa, answer.size or asked[1], answer.to or asked[2]
            effects.append(effect)
        if isinstance(effects[1], tuple):
            naive.convert(*effects[1])
        different += effects[0] != effects[1]
    assert facts(found.policies[1]) == naive.facts()
    assert found.policies[1].differences == found.different == different
    assert len(found.differences) == min(different, 1000)


def test_a_difference_names_both(tmp_path) -> None:
    recorded(tmp_path / "t.arrow", [call(1), call(2), call(3)])

    class Picky(Policy):
        def map_gpa_range(self, call):
            return Deny() if call.gpa == 2 * PAGE else Convert()

    found = trace.replay(tmp_path / "t.arrow", Picky(), policies.DenyAll(11), keep=2)
    assert (found.requests, found.different, found.missing) == (3, 3, 0)
    first, second = found.differences
    assert (first.event.gpa, first.decisions) == (PAGE, (Convert(), Deny(11)))
    assert (second.event.gpa, second.decisions) == (2 * PAGE, (Deny(), Deny(11)))
    assert [judged.differences for judged in found.policies] == [1, 3]
    assert "Difference(Event(" in repr(first)


def test_requests_come_in_the_order_in_which_they_were_asked() -> None:
    table = pa.table(trace.synthetic(100))
    asked = pa.array([1000 - time for time in range(100)], pa.uint64())
    found = Scripted([Convert()])
    gpas = [event.gpa for event in trace.read(table) if event.kind == "explicit"]
    trace.replay(table.set_column(1, "time", asked), found)
    assert [each[1] for each in found.asked] == gpas[::-1]
    assert len(gpas) > 10


def test_where_the_run_would_have_ended() -> None:
    made = trace.synthetic(1000)
    implicit = next(event.sequence for event in made if event.kind == "implicit")
    explicit = next(event.sequence for event in made if event.kind == "explicit")
    found = trace.replay(made, policies.ExplicitOnly(), StopAt(0), policies.Allow())
    assert [judged.ends for judged in found.policies] == [implicit, explicit, None]
    assert found.recorded.ends is None


def test_remembered_decisions_in_a_replay() -> None:
    class Once(Policy):
        asked = 0

        def map_gpa_range(self, call):
            self.asked += 1
            return Convert(remember=Region(0, 1 << 30))

        def memory_fault(self, fault):
            self.asked += 1
            return Convert(remember=Region(0, 1 << 30))

    once = Once()
    assert trace.replay(trace.synthetic(1000), once).different == 0
    assert once.asked == 4


def test_a_policy_that_fails() -> None:
    class Broken(Policy):
        def map_gpa_range(self, call):
            return {}[call.gpa]

    class Wild(Policy):
        def map_gpa_range(self, call):
            return Convert(size=1 << 40)

    made = trace.synthetic(100)
    first = next(event for event in made if event.kind == "explicit")
    with pytest.raises(KeyError) as caught:
        trace.replay(made, policies.Allow(), Broken())
    assert f"event {first.sequence} of the trace, policy 2 of 2" in caught.value.__notes__
    assert f"gpa {first.gpa:#x}" in caught.value.__notes__
    with pytest.raises(PolicyError, match="is not a page-aligned") as caught:
        trace.replay(made, Wild())
    assert f"event {first.sequence} of the trace" in caught.value.__notes__
    with pytest.raises(PolicyError, match="did you mean map_gpa_range"):
        trace.replay(made, type("Slip", (), {"map_gpa_rang": print, "memory_fault": print})())


def test_poison() -> None:
    vm = machine([Step.memory_fault(PAGE, errno=133)], initial="private")
    assert vm.run(timeout=10).reason == "poison"
    seen = []

    class Frees(Policy):
        def memory_poison(self, poison):
            seen.append((poison.gpa, poison.errno, poison.state))
            return pagegate.Discard()

    found = trace.replay(vm.events, Frees())
    assert seen == [(PAGE, 133, "private")]
    assert (found.policies[0].discarded, found.recorded.stopped, found.recorded.ends) == (1, 1, 0)
    vm.close()


def test_conversions_by_the_host_are_taken_over() -> None:
    vm = machine([call(1), call(2, 4), call(2, 4)], policy=StopAt(1))
    vm.run(timeout=10)
    vm.convert(2 * PAGE, 4 * PAGE, to="private")
    vm.run(timeout=10)
    found = trace.replay(vm.events, StopAt(1))
    vm.close()
    # The last request found its pages private, so it changed nothing.
    assert found.different == 0
    assert found.policies[0].bytes_to_private == found.recorded.bytes_to_private == PAGE


def test_several_vcpus_on_the_same_pages() -> None:
    scripts = [[call(n % 3, 1 + n % 2, PRIVATE if (n + vcpu) % 2 else SHARED) for n in range(12)] for vcpu in range(3)]
    vm = machine(*scripts, cycles=300)
    report = vm.run(timeout=30)
    found = trace.replay(vm.events, policies.Allow())
    vm.close()
    recorded = found.recorded
    assert (recorded.bytes_to_private, recorded.bytes_to_shared) == (report.bytes_to_private, report.bytes_to_shared)
    # A request whose pages kept changing while the policy was asked ends with EAGAIN; the decision was to convert.
    assert (found.different, recorded.converted) == (0, report.conversions + report.retries)


def test_requests_outside_memory() -> None:
    with pytest.raises(ValueError, match="no page-aligned part of"):
        trace.replay(trace.read(trace.synthetic(10), memory=PAGE), policies.Allow())


def test_the_same_arguments_make_the_same_trace() -> None:
    def made(**kwargs):
        return list(trace.synthetic(2000, **kwargs))

    assert made(seed=7, vcpus=3) == made(seed=7, vcpus=3)
    assert made(seed=7) != made(seed=8)
    assert {event.vcpu for event in made(vcpus=3)} == {0, 1, 2}
    kinds = [event.kind for event in made()]
    assert 0.6 < kinds.count("explicit") / 2000 < 0.7
    # Each request finds the states that the ones before it left.
    assert trace.replay(trace.synthetic(2000), policies.Allow()).different == 0
    assert all(event.state != event.to and event.changed == event.size for event in made())


def test_a_million_requests() -> None:
    made = trace.synthetic()
    assert len(made) == 1_000_000
    quota = policies.Quota(64 << 20)
    found = trace.replay(made, policies.Allow(), quota, keep=0)
    assert found.policies[0] == found.recorded
    assert found.policies[1].peak_shared == 64 << 20 < found.recorded.peak_shared
    assert found.policies[1].denied == found.different > 0
