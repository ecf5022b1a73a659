"""Traces of guests on /dev/kvm are complete, and a replay of them makes the same decisions."""

from __future__ import annotations

from pathlib import Path

import pytest
from pagegate import Convert, Deny, Policy, Region, Stop, Vm, policies, trace
from pagegate.bundled import GUESTS
from pagegate.guests import PAGE, Script
from pagegate.script import load

pytestmark = pytest.mark.kvm

EXAMPLES = Path(__file__).parents[2] / "examples"
MEMORY = 64 << 20
MIB = 1 << 20

# Examples whose decisions depend only on the requests and their times. The others ask a service or need a trace.
PURE = {
    "audit_log": None,
    "explicit_only": None,
    "learn_then_lock": None,
    "ping_pong_guard": None,
    "rate_limit": ("limit", {"per_second": "300", "burst": "4"}),
    "shared_quota": ("quota", {"max_shared": "64K", "largest": "64K"}),
    "swiotlb_window": None,
}


def example(name, how):
    function, options = how or (None, {})
    return load(EXAMPLES / f"{name}.py", function, options)


@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("name", PURE)
def test_a_replay_of_an_example_decides_the_same(name, guest, shared_bit, enforcement, tmp_path, capfd) -> None:
    file = tmp_path / "trace.arrow"
    policy = example(name, PURE[name])
    with Vm(MEMORY, policy=policy, shared_bit=shared_bit, enforcement=enforcement, initial="private") as vm:
        GUESTS[guest].start(vm, "doorbell")
        with trace.Recorder(vm, file) as recorder:
            vm.run(timeout=3)
        assert recorder.lost == 0
        assert recorder.written == vm.events.total > 0
        runs = [(gpa, size) for gpa, size, state in vm.attributes.runs() if state == "shared"]
        last = vm.events.since(vm.events.total - 1)[0]
    found = trace.replay(file, example(name, PURE[name]))
    assert found.differences == ()
    judged = found.policies[0]
    # No policy sees what is malformed.
    asked = sum(event.kind != "malformed" for event in trace.read(file))
    assert (judged.differences, found.different, found.requests) == (0, 0, asked)
    assert judged == found.recorded or last.outcome in ("failed", "retried")
    assert sum(size for _, size in runs) <= judged.peak_shared


class Mine(Policy):
    """A policy that makes every kind of decision."""

    def map_gpa_range(self, call):
        if call.to == "shared" and call.gpa >= 16 * MIB:
            return Deny(11)
        return Convert(remember=Region(8 * MIB, MIB)) if call.size > PAGE else Convert()

    def memory_fault(self, fault):
        if fault.gpa >= 24 * MIB:
            return Stop("that far")
        start = fault.gpa & ~0xFFFF
        return Convert(gpa=start, size=0x10000) if fault.gpa % 0x10000 == 0 else Convert(discard=False)


def test_a_guest_under_a_policy_of_all_kinds(make, shared_bit, tmp_path) -> None:
    script = Script()
    for page in range(8 * MIB, 8 * MIB + 16 * PAGE, 2 * PAGE):
        script.map(page, 2 * PAGE, to="shared")
        script.map(page, PAGE, to="private")
    script.map(17 * MIB, PAGE, to="shared")
    script.touch(1 << shared_bit | 20 * MIB, 20)
    script.touch(20 * MIB + PAGE, 3)
    script.loop(0, 3)
    script.touch(1 << shared_bit | 25 * MIB, 1)
    vm = make(32 * MIB, policy=policies.Quota(2 * MIB, Mine()), shared_bit=shared_bit, initial="private")
    script.start(vm)
    with trace.Recorder(vm, tmp_path / "trace.parquet"):
        assert vm.run(timeout=30).reason == "that far"
    events = list(vm.events)
    assert {event.decision for event in events} == {"convert", "deny", "stop"}
    assert vm.policy.spared > 0
    assert list(trace.read(tmp_path / "trace.parquet")) == events
    found = trace.replay(tmp_path / "trace.parquet", policies.Quota(2 * MIB, Mine()), Mine(), policies.DenyAll())
    same, without_quota, deny = found.policies
    assert same == found.recorded
    assert same.peak_shared >= sum(size for _, size, state in vm.attributes.runs() if state == "shared")
    assert without_quota.differences == 0
    assert deny.converted == 0
    assert deny.denied == found.requests == len(events)
    assert found.recorded.ends == events[-1].sequence


def test_two_vcpus_under_a_policy_without_a_memory(make, shared_bit, tmp_path) -> None:
    policy = policies.Align(4 * PAGE, policies.Window([(8 * MIB, MIB)]))
    vm = make(MEMORY, vcpus=2, policy=policy, shared_bit=shared_bit, initial="private")
    GUESTS["touch"].start(vm, "doorbell")
    with trace.Recorder(vm, tmp_path / "trace.arrows") as recorder:
        assert vm.run(timeout=60).reason == "halt"
    assert recorder.lost == 0
    found = trace.replay(tmp_path / "trace.arrows", policy)
    assert found.requests == vm.events.total > 100
    assert found.different == 0
    assert {event.vcpu for event in trace.read(tmp_path / "trace.arrows")} == {0, 1}


def test_a_guest_that_crashes_leaves_its_trace(make, tmp_path) -> None:
    script = Script()
    script.map(MIB, PAGE, to="private")
    # No page table maps this address, and there is no IDT, so this is a triple fault.
    script.write(1 << 46, 1)
    vm = make()
    script.start(vm)
    with trace.Recorder(vm, tmp_path / "trace.parquet"):
        assert vm.run(timeout=30).reason == "shutdown"
    (event,) = trace.read(tmp_path / "trace.parquet")
    assert (event.gpa, event.outcome) == (MIB, "converted")
