"""Each example with the tester, on the fake hypervisor, and once with a guest on /dev/kvm."""

from __future__ import annotations

import json

import pytest
from pagegate import Convert, Deny, Discard, Policy, PolicyError, Region, Retry, Stop, Vm, trace
from pagegate.bundled import GUESTS, SHARED_BIT
from pagegate.guests import PAGE
from pagegate.policies import Quota
from pagegate.testing import Fake, PolicyTester, Step

from .example_parts import EXAMPLES, MEMORY, MIB, example, module, under_the_demo

ALONE = {
    "audit_log": "halt",
    "explicit_only": "not asked for: vCPU 0 touched 0x3000000",
    "learn_then_lock": "halt",
    "ping_pong_guard": "halt",
    "rate_limit": "halt",
    "shared_quota": "halt",
    "swiotlb_window": "halt",
}
"""Those that need nothing else, and how the demo's guest ends under them."""


def test_every_example_is_tested_and_says_how_to_run_it() -> None:
    # Those for Linux have tests of their own, and devices are tried with Linux.
    files = {file.stem for file in EXAMPLES.glob("*.py") if not file.stem.startswith(("linux_", "device_"))}
    assert files == {*ALONE, "external_service", "record_then_replay"}
    for file in files:
        source = (EXAMPLES / f"{file}.py").read_text()
        assert source.startswith('"""')
        assert f"pagegate run -p examples/{file}.py" in source
        assert "\nAgainst " in source or "\nFor " in source


@pytest.mark.parametrize("name", ALONE)
def test_an_example_under_the_fake(name, fake_vm) -> None:
    fake = Fake([Step.doorbell(24 * MIB, 1, 0), Step.doorbell(24 * MIB, 1, 16), Step.halt()])
    vm = fake_vm(hypervisor=fake, policy=example(name), initial="private")
    report = vm.run(timeout=10)
    assert (report.reason, report.hypercalls, report.conversions) == ("halt", 2, 2)
    assert [reply.value for reply in fake.replies()] == [0, 0]


@pytest.mark.kvm
@pytest.mark.parametrize("name", ALONE)
def test_an_example_under_a_guest(name, capfd) -> None:
    report = under_the_demo(example(name))
    assert report.reason.startswith(ALONE[name])
    assert report.conversions > 0


# ---- explicit_only


def test_explicit_only() -> None:
    tester = PolicyTester(example("explicit_only"))
    assert tester.fault(PAGE, vcpu=2, rip=0x1234) == Stop(
        "not asked for: vCPU 2 touched 0x1000 as shared, which is private, by the instruction at 0x1234"
    )
    assert tester.call(PAGE, to="shared") == Convert()
    assert "as private, which is shared" in tester.fault(PAGE).reason
    assert PolicyTester(example("explicit_only", evidence="no")).fault(0) == Deny()


# ---- the built-in ones


def test_swiotlb_window() -> None:
    tester = PolicyTester(example("swiotlb_window", "window", start="1M", size="64K"))
    assert tester.call(MIB, 64 << 10, to="shared") == Convert()
    assert tester.call(MIB - PAGE, 2 * PAGE, to="shared") == Deny()
    assert tester.fault(MIB + (64 << 10)) == Deny()
    assert tester.call(MIB, 64 << 10, to="private") == Convert()
    assert tester.shared_bytes == 0


def test_shared_quota() -> None:
    tester = PolicyTester(example("shared_quota", "quota", max_shared="8K", largest="4K"))
    assert tester.call(0, 2 * PAGE, to="shared") == Deny()
    assert [tester.fault(page * PAGE) for page in range(3)] == [Convert(), Convert(), Deny()]
    assert tester.call(0, MEMORY, to="private") == Convert()
    assert tester.call(5 * PAGE, to="shared") == Convert()
    assert tester.shared_bytes == PAGE


def test_rate_limit() -> None:
    tester = PolicyTester(example("rate_limit", "limit", per_second=10, burst=3))
    decisions = [tester.call(0, to="shared") for _ in range(5)]
    assert decisions == [Convert()] * 3 + [Deny(11)] * 2
    assert tester.fault(PAGE) == Retry()
    tester.advance(0.1)
    assert tester.fault(PAGE) == Convert()


def test_ping_pong_guard() -> None:
    tester = PolicyTester(example("ping_pong_guard", "guard", turns=3, seconds=1))
    *before, last = [tester.fault(0) for _ in range(5)]
    assert before == [Convert()] * 4
    assert last.reason.startswith("ping-pong: 0x0 changed direction 4 times")
    tester = PolicyTester(example("ping_pong_guard"))
    for _ in range(100):
        assert tester.fault(0) == Convert()
        tester.advance(0.5)


# ---- record_then_replay


def recorded(file, vm):
    with trace.Recorder(vm, file):
        vm.run(timeout=60)
    return file


def test_record_then_replay(tmp_path, fake_vm) -> None:
    pages = (4, 5, 9, 4)
    steps = [Step.doorbell(page * PAGE, 1, attributes) for page in pages for attributes in (0, 16)]
    file = recorded(tmp_path / "good.parquet", fake_vm([*steps, Step.doorbell(30 * PAGE, 1, 16)], initial="private"))
    tester = PolicyTester(example("record_then_replay", "learned", trace=file))
    assert [tester.call(page * PAGE, to="shared") for page in (3, 4, 5, 6, 9, 10, 30)] == [
        Deny(),
        Convert(),
        Convert(),
        Deny(),
        Convert(),
        Deny(),
        Deny(),
    ]
    assert tester.call(4 * PAGE, 2 * PAGE, to="shared") == Convert()
    assert tester.call(30 * PAGE, to="private") == Convert()
    tester = PolicyTester(example("record_then_replay", "learned", trace=file, slack="4K"))
    assert tester.call(3 * PAGE, 4 * PAGE, to="shared") == Convert()
    assert tester.fault(2 * PAGE) == Deny()
    assert trace.replay(file, example("record_then_replay", "learned", trace=file)).different == 0
    other = recorded(tmp_path / "other.arrow", fake_vm([Step.doorbell(20 * PAGE, 1, 0)], initial="private"))
    (difference,) = trace.replay(other, example("record_then_replay", "learned", trace=file)).differences
    assert (difference.event.gpa, difference.decisions) == (20 * PAGE, (Deny(),))


@pytest.mark.kvm
def test_record_then_replay_under_a_guest(tmp_path) -> None:
    file = tmp_path / "good.arrows"
    with Vm(MEMORY, shared_bit=SHARED_BIT, initial="private") as vm:
        GUESTS["touch"].start(vm, "doorbell")
        recorded(file, vm)
    policy = example("record_then_replay", "learned", trace=file)
    assert trace.replay(file, policy).different == 0
    for guest, reason in (("touch", "halt"), ("demo", "denied")):
        with Vm(MEMORY, policy=policy, shared_bit=SHARED_BIT, initial="private") as vm:
            GUESTS[guest].start(vm, "doorbell")
            assert vm.run(timeout=60).reason == reason


# ---- learn_then_lock


@pytest.fixture
def learned():
    tester = PolicyTester(example("learn_then_lock", quiet=1.0))
    assert tester.call(8 * PAGE, 4 * PAGE, to="shared") == Convert()
    assert tester.fault(20 * PAGE) == Convert()
    tester.advance(0.9)
    assert tester.call(8 * PAGE, 4 * PAGE, to="private") == Convert()
    return tester


def test_pages_shared_at_boot_may_be_shared_again(learned) -> None:
    learned.advance(1.0)
    assert learned.fault(9 * PAGE) == Convert()
    assert learned.call(8 * PAGE, 4 * PAGE, to="shared") == Convert()
    assert learned.call(20 * PAGE, to="private") == Convert()
    assert learned.call(20 * PAGE, to="shared") == Convert()


@pytest.mark.parametrize(("page", "pages"), [(0, 1), (7, 2), (11, 2), (8, 13), (21, 1), (0, 64)])
def test_other_pages_are_locked(learned, page, pages) -> None:
    learned.advance(1.0)
    for _ in range(2):
        assert learned.call(page * PAGE, pages * PAGE, to="shared") == Deny()
    assert learned.call(page * PAGE, pages * PAGE, to="private") == Convert()
    assert learned.fault(30 * PAGE) == Deny()


def test_the_boot_lasts_while_requests_come_and_ends_once(learned) -> None:
    for page in range(100, 110):
        learned.advance(0.99)
        assert learned.fault(page * PAGE) == Convert()
    learned.advance(1.0)
    assert [learned.fault(page * PAGE) for page in (200, 201)] == [Deny(), Deny()]


def test_the_boot_ends_after_so_many_requests() -> None:
    tester = PolicyTester(example("learn_then_lock", requests=3))
    decisions = [tester.fault(page * PAGE) for page in range(5)]
    assert decisions == [Convert()] * 3 + [Deny()] * 2
    tester.call(0, PAGE, to="private")
    assert tester.fault(0) == Convert()


@pytest.mark.parametrize("options", [{"quiet": 0}, {"quiet": -1}, {"quiet": "nan"}, {"requests": 0}])
def test_invalid_options_are_refused(options) -> None:
    with pytest.raises(PolicyError, match="must be above 0|it is no number"):
        example("learn_then_lock", **options)


def test_adjacent_and_overlapping_ranges_are_joined() -> None:
    ranges = module(example("learn_then_lock")).Ranges()
    told = set()
    # Ranges that are apart, touch, overlap, and contain one another, in every order.
    for start, end in [
        (8, 10),
        (2, 4),
        (4, 6),
        (20, 30),
        (22, 24),
        (9, 12),
        (5, 9),
        (40, 41),
        (1, 50),
        (60, 61),
        (0, 1),
    ]:
        ranges.add(start, end)
        told |= set(range(start, end))
        for first in range(64):
            for last in range(first + 1, 64):
                assert ranges.cover(first, last) == (set(range(first, last)) <= told), (first, last)


# ---- audit_log


@pytest.fixture
def audit(tmp_path):
    path = tmp_path / "audit.jsonl"
    policies = []

    def make(inner=None):
        kind = type(example("audit_log"))
        policies.append(kind(path, inner))
        return policies[-1], lambda: [json.loads(line) for line in path.read_text().splitlines()]

    yield make
    for policy in policies:
        policy.close()


def test_audit_log(audit) -> None:
    policy, lines = audit()
    tester = PolicyTester(policy)
    tester.call(PAGE, 2 * PAGE, to="shared", vcpu=1)
    tester.advance(1e-6)
    assert len(lines()) == 1
    tester.fault(PAGE, rip=0x1000)
    tester.poison(PAGE)
    call = {"time": 0, "vcpu": 1, "kind": "explicit", "gpa": "0x1000", "size": 8192, "state": "private", "to": "shared"}
    assert lines()[0] == {**call, "decision": "convert"}
    assert lines()[1] | {"vcpu": 0} == {
        "time": 1000,
        "vcpu": 0,
        "kind": "implicit",
        "gpa": "0x1000",
        "size": PAGE,
        "state": "shared",
        "to": "private",
        "rip": "0x1000",
        "decision": "convert",
    }
    assert lines()[2]["decision"] == "stop"


class Answers(Policy):
    def __init__(self, answer) -> None:
        self.answer = answer

    def memory_fault(self, fault):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    map_gpa_range = memory_poison = memory_fault


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        (Convert("private", PAGE, 2 * PAGE), {"done_to": "private", "done_gpa": PAGE, "done_size": 2 * PAGE}),
        (Deny(11), {"decision": "deny", "errno": 11}),
        (Retry(), {"decision": "retry"}),
        (Stop("why"), {"decision": "stop", "reason": "why"}),
    ],
)
def test_the_audit_log_records_the_inner_policys_decision(audit, answer, logged) -> None:
    policy, lines = audit(Answers(answer))
    tester = PolicyTester(policy)
    assert tester.fault(0) == tester.call(0, to="shared") == answer
    for line in lines():
        assert line.items() >= logged.items()
    policy, lines = audit(Answers(Discard()))
    assert PolicyTester(policy).poison(0) == Discard()
    assert lines()[-1]["decision"] == "discard"


@pytest.mark.parametrize("remembered", [Convert, Deny, Retry])
def test_every_request_is_logged_despite_remember(audit, remembered) -> None:
    policy, lines = audit(Answers(remembered(remember=Region(0, MEMORY))))
    tester = PolicyTester(policy)
    for _ in range(5):
        tester.call(0, to="shared")
    assert len(lines()) == 5


def test_the_audit_log_records_failures(audit) -> None:
    policy, lines = audit(Answers(KeyError("mine")))
    with pytest.raises(KeyError):
        PolicyTester(policy).fault(0)
    policy, lines = audit(Answers(None))
    with pytest.raises(PolicyError):
        PolicyTester(policy).fault(0)
    assert (lines()[0]["raised"], lines()[1]["decision"], lines()[1]["answer"]) == ("KeyError('mine')", "none", "None")


def test_nothing_is_converted_if_the_audit_log_cannot_be_written(audit) -> None:
    policy, _ = audit()
    policy.close()
    tester = PolicyTester(policy)
    with pytest.raises(ValueError, match="closed"):
        tester.fault(0)
    assert tester.shared_bytes == 0


def test_the_inner_policy_comes_from_a_file(tmp_path, capsys) -> None:
    policy = example("audit_log", inner=EXAMPLES / "explicit_only.py:ExplicitOnly")
    assert isinstance(PolicyTester(policy).fault(0), Stop)
    assert json.loads(capsys.readouterr().err)["decision"] == "stop"
    with pytest.raises(PolicyError, match="around AuditLog"):
        example("audit_log", inner=EXAMPLES / "shared_quota.py")
    with pytest.raises(PolicyError):
        example("audit_log", path=tmp_path / "no" / "such")
    tester = PolicyTester(Quota(0, example("audit_log")))
    assert tester.fault(0) == Deny(22)
