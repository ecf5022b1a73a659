"""Requests made by hand, the policy tester, and the fixtures."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pagegate import (
    Convert,
    Deny,
    Discard,
    MapGpaRange,
    MemoryFault,
    MemoryPoison,
    Policy,
    PolicyError,
    Region,
    Retry,
    Stop,
    Vm,
)
from pagegate.policies import Align, Allow, DenyAll, ExplicitOnly, PingPong, Quota, RateLimit, Window
from pagegate.testing import Fake, PolicyTester, Step

PAGE = 4096
MEMORY = 64 * PAGE


class Says(Policy):
    """Gives every request the same answer, and keeps the requests."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked = []

    def memory_fault(self, fault):
        self.asked.append(fault)
        return self.answer

    map_gpa_range = memory_poison = memory_fault


# ---- requests


def test_a_fault_has_the_fields_that_an_access_has() -> None:
    fault = MemoryFault(0x5000)
    assert (fault.gpa, fault.size, fault.vcpu, fault.private) == (0x5000, PAGE, 0, False)
    assert (fault.flags, fault.errno, fault.state) == (0, 14, "private")
    assert (fault.rip, fault.executed, fault.repeats, fault.time) == (0, False, 0, 0)
    assert MemoryFault(0x5000, rip=0x1002, executed=True).executed
    fault = MemoryFault(0x5000, private=True, vcpu=3, rip=0x1000, repeats=7, time=9)
    assert (fault.flags, fault.state, fault.vcpu, fault.rip, fault.repeats, fault.time) == (
        8,
        "shared",
        3,
        0x1000,
        7,
        9,
    )
    fault = MemoryFault(0, flags=24, state="shared", errno=5)
    assert (fault.flags, fault.state, fault.errno) == (24, "shared", 5)


def test_poison_is_a_fault_with_ehwpoison() -> None:
    poison = MemoryPoison(0x5000, private=True)
    assert isinstance(poison, MemoryFault)
    assert (poison.errno, poison.state, poison.flags) == (133, "private", 8)
    assert MemoryPoison(0x5000, state="private").state == "private"
    assert repr(poison).startswith("MemoryPoison(")


@pytest.mark.parametrize(
    ("to", "page_size", "raw", "state"),
    [("private", PAGE, 16, "shared"), ("shared", 2 << 20, 1, "private"), ("private", 1 << 30, 18, "shared")],
)
def test_a_call_has_the_fields_that_its_registers_say(to, page_size, raw, state) -> None:
    for given_raw in (None, raw):
        call = MapGpaRange(0x5000, 0x3000, to=to, page_size=page_size, raw=given_raw, vcpu=2, time=5)
        assert (call.gpa, call.size, call.to, call.page_size) == (0x5000, 0x3000, to, page_size)
        assert (call.raw, call.state, call.vcpu, call.time) == (raw, state, 2, 5)
    assert MapGpaRange(0, to=to, state="mixed").state == "mixed"
    assert MapGpaRange(0, to=to).size == PAGE


@pytest.mark.parametrize("kind", [MemoryFault, MemoryPoison])
@pytest.mark.parametrize(
    "fields",
    [
        {"gpa": 1},
        {"gpa": -PAGE},
        {"gpa": 1 << 64},
        {"gpa": (1 << 64) - PAGE},
        {"size": 0},
        {"size": 100},
        {"size": -PAGE},
        {"vcpu": -1},
        {"vcpu": 1 << 32},
        {"errno": 0},
        {"errno": -14},
        {"errno": 4096},
        {"errno": 1 << 40},
        {"flags": -1},
        {"state": "mixed"},
        {"state": "Private"},
        {"rip": 1 << 64},
        {"repeats": -1},
        {"time": -1},
    ],
)
def test_an_impossible_fault_is_refused(kind, fields) -> None:
    with pytest.raises(ValueError, match="must be"):
        kind(**{"gpa": 0, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"gpa": 4095},
        {"size": 0},
        {"size": 1},
        {"gpa": (1 << 64) - PAGE, "size": PAGE},
        {"to": "mixed"},
        {"to": ""},
        {"page_size": 8192},
        {"page_size": 0},
        {"raw": 0},
        {"raw": 17},
        {"raw": 48},
        {"state": "neither"},
        {"time": 1 << 64},
    ],
)
def test_an_impossible_call_is_refused(fields) -> None:
    with pytest.raises(ValueError, match="must be|contradicts"):
        MapGpaRange(**{"gpa": 0, "to": "private", **fields})


@pytest.mark.parametrize("make", [lambda: MemoryFault(), lambda: MemoryFault(0, True), lambda: MapGpaRange(0)])
def test_missing_or_unexpected_arguments_are_a_type_error(make) -> None:
    with pytest.raises(TypeError):
        make()


@given(
    st.builds(
        MapGpaRange,
        st.integers(0, 1 << 40).map(lambda page: page * PAGE),
        st.integers(1, 1 << 20).map(lambda page: page * PAGE),
        to=st.sampled_from(["private", "shared"]),
        page_size=st.sampled_from([PAGE, 2 << 20, 1 << 30]),
        state=st.sampled_from(["private", "shared", "mixed"]),
        vcpu=st.integers(0, 255),
        time=st.integers(0, (1 << 64) - 1),
    )
)
def test_the_repr_of_a_call_makes_the_call(call) -> None:
    again = eval(repr(call), {"MapGpaRange": MapGpaRange})
    assert repr(again) == repr(call)


def test_the_repr_of_a_fault_makes_the_fault() -> None:
    for made in (MemoryFault(PAGE, private=True, time=5), MemoryPoison(PAGE, vcpu=1, rip=7)):
        assert repr(eval(repr(made))) == repr(made)


# ---- the tester


@pytest.mark.parametrize(
    "answer", [Convert(), Convert(prefault=True, discard=False), Deny(11), Retry(), Stop("enough"), Convert("private")]
)
@pytest.mark.parametrize("wrap", [lambda policy: policy, lambda policy: PingPong(9, 1.0, policy)])
def test_it_answers_as_the_policy_does(answer, wrap) -> None:
    policy = Says(answer)
    tester = PolicyTester(wrap(policy), memory=MEMORY)
    assert tester.call(PAGE, to="shared") == answer
    if answer != Convert("private"):
        tester = PolicyTester(wrap(policy), memory=MEMORY)
    assert tester.fault(PAGE) == answer
    call, fault = policy.asked
    assert (call.gpa, call.size, call.to, call.state) == (PAGE, PAGE, "shared", "private")
    assert (fault.gpa, fault.private, fault.state) == (PAGE, False, "private")


def test_missing_hooks_have_the_default() -> None:
    for policy in (None, Policy(), Allow()):
        tester = PolicyTester(policy)
        assert tester.fault(0) == tester.call(PAGE, to="shared") == Convert()
        assert tester.poison(0) == Stop("poison")
        assert tester.runs() == [(0, 2 * PAGE, "shared"), (2 * PAGE, (64 << 20) - 2 * PAGE, "private")]


@pytest.mark.parametrize("memory", [0, 1, 4097, (16 << 40) + 4096, 1 << 52])
def test_memory_is_a_number_of_pages_that_a_host_could_have(memory):
    with pytest.raises(ValueError, match="16 TiB"):
        PolicyTester(memory=memory)


def test_it_keeps_the_states() -> None:
    tester = PolicyTester(memory=MEMORY, initial="shared")
    assert (tester.shared_bytes, tester.runs()) == (MEMORY, [(0, MEMORY, "shared")])
    assert tester.call(8 * PAGE, 4 * PAGE, to="private") == Convert()
    assert tester.fault(9 * PAGE, private=False) == Convert()
    assert [tester.state(page * PAGE) for page in range(7, 13)] == [
        "shared",
        "private",
        "shared",
        "private",
        "private",
        "shared",
    ]
    assert tester.state(8 * PAGE, 2 * PAGE) == "mixed"
    assert tester.shared_bytes == MEMORY - 3 * PAGE


@pytest.mark.parametrize("answer", [Deny(), Retry(), Stop("no")])
def test_only_a_conversion_changes_them(answer) -> None:
    tester = PolicyTester(Says(answer), memory=MEMORY)
    tester.call(0, MEMORY, to="shared")
    tester.fault(0)
    assert tester.shared_bytes == 0


def test_an_access_in_the_pages_state_does_not_ask_the_policy() -> None:
    policy = Says(Convert())
    tester = PolicyTester(policy, memory=MEMORY)
    with pytest.raises(ValueError, match="is private already"):
        tester.fault(0, private=True)
    tester.call(0, to="shared")
    with pytest.raises(ValueError, match="is shared already"):
        tester.fault(0, private=False)
    with pytest.raises(ValueError, match="mixed"):
        tester.fault(0, size=2 * PAGE)
    assert len(policy.asked) == 1


@pytest.mark.parametrize(("gpa", "size"), [(MEMORY, PAGE), (0, MEMORY + PAGE), (1, PAGE), (0, 0), (1 << 63, PAGE)])
def test_a_malformed_request_does_not_ask_the_policy(gpa, size) -> None:
    policy = Says(Convert())
    tester = PolicyTester(policy, memory=MEMORY)
    for ask in (
        lambda: tester.call(gpa, size, to="shared"),
        lambda: tester.fault(gpa, size=size),
        lambda: tester.poison(gpa, size=size),
        lambda: tester.ask(MapGpaRange(gpa, size, to="shared")),
    ):
        with pytest.raises(ValueError, match="no page-aligned part|must be multiples"):
            ask()
    assert policy.asked == []


@pytest.mark.parametrize("memory", [0, -PAGE, 100, 1 << 60, 1 << 64])
def test_impossible_memory_is_refused(memory) -> None:
    with pytest.raises(ValueError, match="must be"):
        PolicyTester(memory=memory)


def test_fields_reach_the_policy() -> None:
    policy = Says(Retry())
    tester = PolicyTester(policy, memory=MEMORY)
    tester.fault(0, vcpu=3, rip=0x1234, repeats=5)
    tester.call(0, to="private", vcpu=2, page_size=2 << 20)
    tester.advance(1.5)
    tester.poison(0)
    fault, call, poison = policy.asked
    assert (fault.vcpu, fault.rip, fault.repeats, fault.time) == (3, 0x1234, 5, 0)
    assert (call.vcpu, call.page_size, call.raw, call.state) == (2, 2 << 20, 17, "private")
    assert (poison.errno, poison.private, poison.state, poison.time) == (133, True, "private", 1_500_000_000)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e12])
def test_time_goes_forward(seconds) -> None:
    tester = PolicyTester(memory=MEMORY)
    with pytest.raises(ValueError, match="seconds"):
        tester.advance(seconds)
    assert tester.time == 0


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (object(), "no policy"),
        (Says, "is a class"),
        (type("Slip", (), {"memory_falt": lambda self, fault: None})(), "did you mean memory_fault"),
        (type("Short", (), {"memory_fault": lambda self: None})(), "exactly one argument"),
    ],
)
def test_a_policy_is_validated_as_a_machine_does(policy, complaint) -> None:
    for make in (PolicyTester, lambda policy: Align(PAGE, policy), lambda policy: Vm(MEMORY, policy=policy)):
        with pytest.raises(PolicyError, match=complaint):
            make(policy)


@pytest.mark.parametrize("answer", [None, True, "deny", Convert, 22])
def test_an_answer_is_validated_as_a_machine_does(answer) -> None:
    tester = PolicyTester(Says(answer), memory=MEMORY)
    with pytest.raises(PolicyError, match="no decision") as raised:
        tester.fault(PAGE, vcpu=3, rip=7)
    assert raised.value.__notes__ == ["vCPU 3", "gpa 0x1000", "state private", "rip 0x7"]
    with pytest.raises(PolicyError, match="no decision"):
        tester.call(PAGE, to="shared")


@pytest.mark.parametrize(
    "answer", [Convert(gpa=1), Convert(gpa=MEMORY), Convert(size=MEMORY + PAGE), Convert(size=0), Discard()]
)
def test_an_impossible_conversion_is_a_policy_error(answer) -> None:
    tester = PolicyTester(Says(answer), memory=MEMORY)
    with pytest.raises(PolicyError):
        tester.fault(0)
    with pytest.raises(PolicyError):
        tester.call(0, to="shared")
    assert tester.shared_bytes == 0


def test_poison_is_discarded_and_not_converted() -> None:
    assert PolicyTester(Says(Discard())).poison(0) == Discard()
    with pytest.raises(PolicyError, match="does not repair"):
        PolicyTester(Says(Convert())).poison(0)


def test_an_exception_of_a_hook_is_raised() -> None:
    class Breaks(Policy):
        def memory_fault(self, fault):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        PolicyTester(Quota(PAGE, Breaks())).fault(PAGE)
    assert "gpa 0x1000" in raised.value.__notes__


def test_quota_counts_what_would_be_shared() -> None:
    tester = PolicyTester(Quota(4 * PAGE), memory=MEMORY)
    assert tester.call(0, 3 * PAGE, to="shared") == Convert()
    assert tester.call(0, 5 * PAGE, to="shared") == Deny(22)
    assert tester.fault(8 * PAGE) == Convert()
    assert tester.fault(9 * PAGE) == Deny(22)
    assert tester.call(0, PAGE, to="private") == Convert()
    assert tester.fault(9 * PAGE) == Convert()
    assert tester.shared_bytes == 4 * PAGE


def test_window_align_and_explicit_only() -> None:
    tester = PolicyTester(Window([(8 * PAGE, 8 * PAGE)], Align(4 * PAGE)), memory=MEMORY)
    assert tester.fault(9 * PAGE) == Convert(gpa=8 * PAGE, size=4 * PAGE)
    assert tester.fault(PAGE) == Deny(22)
    assert tester.runs()[1] == (8 * PAGE, 4 * PAGE, "shared")
    tester = PolicyTester(ExplicitOnly())
    assert (tester.fault(0), tester.call(0, to="shared")) == (Deny(22), Convert())
    assert PolicyTester(DenyAll(13)).call(0, to="shared") == Deny(13)


def test_rates_go_by_the_testers_time() -> None:
    tester = PolicyTester(RateLimit(2.0, 2), memory=MEMORY)
    assert [tester.call(0, to="shared") for _ in range(3)] == [Convert(), Convert(), Deny(11)]
    assert tester.fault(PAGE) == Retry()
    tester.advance(0.5)
    assert tester.fault(PAGE) == Convert()
    assert tester.call(0, to="shared") == Deny(11)


def test_ping_pong_goes_by_the_testers_time() -> None:
    tester = PolicyTester(PingPong(2, 1.0), memory=MEMORY)
    for _ in range(10):
        assert tester.fault(0) == Convert()
        tester.advance(0.6)
    tester = PolicyTester(PingPong(2, 1.0), memory=MEMORY)
    decisions = [tester.fault(0) for _ in range(4)]
    assert decisions[:3] == [Convert()] * 3
    assert isinstance(decisions[3], Stop)
    assert "ping-pong: 0x0" in decisions[3].reason


def test_remembered_decisions_are_used() -> None:
    policy = Says(Deny(remember=Region(0, MEMORY, uses=2)))
    tester = PolicyTester(policy, memory=MEMORY)
    assert [tester.fault(0).errno for _ in range(4)] == [22] * 4
    assert len(policy.asked) == 2


def test_a_policy_may_look_at_its_tester() -> None:
    seen = []

    class Looks(Policy):
        def memory_fault(self, fault):
            seen.append((tester.state(fault.gpa), tester.shared_bytes))
            return Convert()

    tester = PolicyTester(Looks(), memory=MEMORY)
    tester.fault(0)
    tester.fault(PAGE)
    assert seen == [("private", 0), ("private", PAGE)]


def test_a_tester_and_its_policy_are_collected_together() -> None:
    class Keeps(Policy):
        tester = None

        def memory_fault(self, fault):
            return Convert()

    policy = Keeps()
    policy.tester = PolicyTester(Quota(PAGE, policy), memory=MEMORY)
    gone = weakref.ref(policy)
    del policy
    gc.collect()
    assert gone() is None


requests = st.lists(
    st.tuples(
        st.integers(0, 63),
        st.integers(1, 8),
        st.sampled_from(["private", "shared"]),
    ).filter(lambda request: request[0] + request[1] <= 64),
    max_size=20,
)


@given(requests, st.integers(0, 64), st.sampled_from([PAGE, 4 * PAGE]))
def test_it_decides_as_a_machine_does(requests, quota, block) -> None:
    """With explicit requests, since the fake's vCPUs make those in any state of the pages."""

    def policy():
        return Quota(quota * PAGE, Window([(0, 48 * PAGE)], Align(block)))

    tester = PolicyTester(policy(), memory=MEMORY, initial="shared")
    fake = Fake([Step.doorbell(page * PAGE, pages, 16 * (to == "private")) for page, pages, to in requests])
    with Vm(MEMORY, policy=policy(), hypervisor=fake, initial="shared") as vm:
        vm.vcpus[0].start(mode="real", rip=0x1000)
        vm.run(timeout=10)
        runs = vm.attributes.runs()
    said = [tester.call(page * PAGE, pages * PAGE, to=to) for page, pages, to in requests]
    assert [reply.value for reply in fake.replies()] == [getattr(each, "errno", 0) for each in said]
    assert tester.runs() == runs


# ---- fixtures


def test_policy_tester(policy_tester) -> None:
    assert policy_tester is PolicyTester


def test_fake_vm(fake_vm, recorder) -> None:
    policy = recorder()
    vm = fake_vm([Step.doorbell(0, 1, 16)], [Step.doorbell(PAGE, 1, 16)], policy=policy, memory=MEMORY)
    assert (len(vm.vcpus), vm.memory) == (2, MEMORY)
    assert vm.run(timeout=10).conversions == 2
    assert {request.vcpu for request in policy.requests} == {0, 1}


def test_fake_vm_takes_a_fake_to_keep(fake_vm) -> None:
    fake = Fake([Step.doorbell(0, 1, 16)], private_memory=False)
    vm = fake_vm(hypervisor=fake, policy=DenyAll(11), memory=MEMORY, shared_bit=40)
    vm.run(timeout=10)
    assert ([reply.value for reply in fake.replies()], vm.enforcement) == ([11], "memslots")
    with pytest.raises(TypeError):
        fake_vm([], hypervisor=fake)


def test_pytest_finds_the_fixtures_and_closes_the_machines(tmp_path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from pagegate import Convert\n"
        "from pagegate.testing import Step\n"
        "vms = []\n"
        "def test_one(policy_tester, fake_vm):\n"
        "    assert policy_tester().fault(0) == Convert()\n"
        "    vms.append(fake_vm([Step.halt()], memory=1 << 20))\n"
        "    assert vms[0].run().reason == 'halt'\n"
        "def test_two():\n"
        "    assert vms[0].closed\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout


def test_the_package_does_not_need_pytest() -> None:
    code = "import sys, pagegate.testing, pagegate.script, pagegate.cli; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
