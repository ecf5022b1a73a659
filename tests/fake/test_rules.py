from __future__ import annotations

import threading
import time

import pytest
from pagegate import Convert, Deny, Discard, Policy, PolicyError, Region, Retry, Stop, Vm, only, policies
from pagegate.testing import Fake, PolicyTester, Step

from .conftest import TWO_VIEWS

PAGE = 4096
SHARED, PRIVATE = 0, 1 << 4


class Teacher:
    """Gives each explicit request this answer, and keeps what it was asked."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked = []

    def map_gpa_range(self, call):
        self.asked.append((call.gpa, call.size, call.to))
        return self.answer(call) if callable(self.answer) else self.answer

    def memory_fault(self, fault):
        self.asked.append((fault.gpa, fault.size, "private" if fault.private else "shared"))
        return self.answer(fault) if callable(self.answer) else self.answer


def calls(*pages, to=SHARED):
    return [Step.doorbell(page * PAGE, 1, to) for page in pages]


def answers(fake) -> list:
    return [reply.value for reply in fake.replies()]


def test_a_region_is_asked_about_once(make, way) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, 4 * PAGE)))
    script = calls(8, 9, 11, 8) + calls(12, 7)
    vm, fake = make(script, policy=teacher, way=way, initial="private")
    report = vm.run(timeout=10)
    assert answers(fake) == [0] * 6
    assert [gpa // PAGE for gpa, _, _ in teacher.asked] == [8, 12, 7]
    assert (vm.policy.seen, vm.policy.spared) == (3, 3)
    assert (report.requests, report.conversions) == (6, 6)
    assert [vm.attributes.is_private(page * PAGE) for page in (7, 8, 9, 10, 11, 12)] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_a_rule_is_for_its_kind_only(make, way) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, 4 * PAGE)))
    accesses = [Step.access(way.view(8 * PAGE, state)) for state in ("shared", "private")]
    script = calls(8) + calls(8, to=PRIVATE) + accesses
    vm, _ = make(script + script, policy=teacher, way=way, initial="private")
    assert vm.run(timeout=10).reason == "halt"
    assert teacher.asked == [
        (8 * PAGE, PAGE, "shared"),
        (8 * PAGE, PAGE, "private"),
        (8 * PAGE, PAGE, "shared"),
        (8 * PAGE, PAGE, "private"),
    ]
    assert vm.policy.spared == 4


@pytest.mark.parametrize(
    ("answer", "errno"), [(lambda where: Deny(1, remember=where), 1), (lambda where: Retry(remember=where), 11)]
)
def test_refusals_are_remembered_too(make, answer, errno) -> None:
    teacher = Teacher(answer(Region(8 * PAGE, 4 * PAGE)))
    vm, fake = make(calls(8, 9, 10), policy=teacher, initial="private")
    vm.run(timeout=10)
    assert (answers(fake), len(teacher.asked), vm.policy.spared) == ([errno] * 3, 1, 2)


def test_uses(make) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, 4 * PAGE, uses=2)))
    vm, _ = make(calls(*[8] * 7), policy=teacher)
    vm.run(timeout=10)
    assert (len(teacher.asked), vm.policy.spared) == (3, 4)


def test_seconds(make) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, 4 * PAGE, seconds=0.2)))
    pause = Step.io_write(0x80, b"\0")
    vm, _ = make([*calls(8, 8), pause, *calls(8, 8)], policy=teacher)
    vm.on_io(0x80, lambda _: time.sleep(0.25))
    vm.run(timeout=10)
    assert (len(teacher.asked), vm.policy.spared) == (2, 2)


def test_forget(make) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, 8 * PAGE)))
    pause = Step.io_write(0x80, b"\0")
    forget = [lambda vm: vm.policy.forget(Region(9 * PAGE, PAGE)), lambda vm: vm.policy.forget()]
    vm, _ = make([*calls(8, 9), pause, *calls(8, 10, 9), pause, *calls(8)], policy=teacher)
    vm.on_io(0x80, lambda _: forget.pop(0)(vm))
    vm.run(timeout=10)
    assert [gpa // PAGE for gpa, _, _ in teacher.asked] == [8, 9, 8]
    assert vm.policy.spared == 3


def test_the_policies_around_it_are_still_asked(make) -> None:
    # A remembered decision replaces the call of the Python policy, not those of the chain around it.
    teacher = Teacher(Convert(remember=Region(8 * PAGE, 8 * PAGE)))
    quota = policies.Quota(8 * PAGE, then=teacher)
    vm, fake = make(calls(8, 9, 10, 11), policy=quota, initial="private")
    vm.run(timeout=10)
    # Six pages of page tables are shared from the start.
    assert answers(fake) == [0, 0, 22, 22]
    assert (len(teacher.asked), vm.policy.spared) == (1, 3)
    assert vm.policy.current is quota


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_other_pages(make, way) -> None:
    window = Region(8 * PAGE, 8 * PAGE)
    teacher = Teacher(Convert(gpa=window.gpa, size=window.size, remember=window))
    steps = [Step.access(way.view(page * PAGE, "shared")) for page in (10, 8, 15)]
    vm, _ = make([*steps, *calls(10, to=PRIVATE), *steps], policy=teacher, way=way, initial="private")
    assert vm.run(timeout=10).reason == "halt"
    assert vm.attributes.state(window.gpa, window.size) == "shared"
    assert [to for _, _, to in teacher.asked] == ["shared", "private"]


@pytest.mark.parametrize(
    "answer",
    [
        Convert(gpa=8 * PAGE, size=PAGE, remember=Region(8 * PAGE, 2 * PAGE)),
        Convert(size=2 * PAGE, remember=Region(7 * PAGE, PAGE)),
        Convert(remember=Region(1 << 30, PAGE)),
    ],
)
def test_an_impossible_rule_ends_the_run(make, answer) -> None:
    vm, _ = make(calls(8), policy=Teacher(answer), initial="private")
    with pytest.raises(PolicyError, match=r"remember|Region") as raised:
        vm.run(timeout=10)
    assert "0x8000" in str(raised.value)
    assert vm.attributes.is_private(8 * PAGE)


def test_poison_is_never_remembered(make) -> None:
    class Policy:
        def memory_poison(self, poison):
            return Retry(remember=Region(poison.gpa, PAGE))

    vm, _ = make([Step.memory_fault(8 * PAGE, errno=133)], policy=Policy())
    with pytest.raises(PolicyError, match="remember"):
        vm.run(timeout=10)


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_a_remembered_retry_is_no_endless_loop(make, way) -> None:
    teacher = Teacher(lambda fault: Retry(remember=Region(fault.gpa, PAGE)))
    vm, _ = make([Step.access(way.view(8 * PAGE, "shared"))], policy=teacher, way=way, initial="private")
    assert vm.run(timeout=30).reason == "livelock"
    assert len(teacher.asked) == 1


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((1, PAGE), {}),
        ((0, 0), {}),
        ((0, 100), {}),
        ((0, PAGE), {"uses": 0}),
        ((0, PAGE), {"uses": -1}),
        ((0, PAGE), {"seconds": 0}),
        ((0, PAGE), {"seconds": float("nan")}),
        ((2**64 - PAGE, PAGE * 2), {}),
    ],
)
def test_invalid_regions_are_refused(arguments, keywords) -> None:
    with pytest.raises(ValueError, match=r"."):
        Region(*arguments, **keywords)


def test_regions_are_values() -> None:
    region = Region(PAGE, 2 * PAGE, uses=3, seconds=1.5)
    assert (region.gpa, region.size, region.uses, region.seconds) == (PAGE, 2 * PAGE, 3, 1.5)
    assert region == Region(PAGE, 2 * PAGE, uses=3, seconds=1.5) != Region(PAGE, 2 * PAGE)
    assert repr(region) == "Region(0x1000, 0x2000, uses=3, seconds=1.5)"
    assert repr(Convert(remember=region)) == f"Convert(remember={region!r})"
    assert repr(Deny(1, remember=region)) == f"Deny(errno=1, remember={region!r})"
    assert Retry(remember=region).remember == region
    assert Convert().remember is None
    for decision in (Stop, Discard):
        with pytest.raises(TypeError):
            decision(remember=region)


def test_the_policy_in_place(make) -> None:
    first, second = Teacher(Deny()), Teacher(Convert())
    pause = Step.io_write(0x80, b"\0")
    vm, fake = make([*calls(8), pause, *calls(8)], policy=first, initial="private")
    assert vm.policy.current is first
    vm.on_io(0x80, lambda _: vm.policy.replace(second))
    vm.run(timeout=10)
    assert [answer for answer in answers(fake) if answer is not None] == [22, 0]
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert vm.policy.current is second


def test_a_policy_may_replace_itself(make) -> None:
    class Freeze:
        def map_gpa_range(self, call):
            vm.policy.replace(policies.DenyAll())
            return Convert()

    vm, _ = make(calls(8, 9), policy=Freeze(), initial="private")
    report = vm.run(timeout=10)
    assert (report.conversions, report.denied) == (1, 1)


def test_a_replacement_that_is_no_policy_is_refused(make) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, PAGE)))
    vm, _ = make(calls(8, 8), policy=teacher)
    for wrong in (object(), Teacher, None):
        with pytest.raises(PolicyError):
            vm.policy.replace(wrong)
    vm.run(timeout=10)
    assert vm.policy.current is teacher
    assert (vm.policy.seen, vm.policy.spared) == (1, 1)


def test_rules_of_a_replaced_policy_are_forgotten(make) -> None:
    teacher = Teacher(Convert(remember=Region(8 * PAGE, PAGE)))
    pause = Step.io_write(0x80, b"\0")
    vm, _ = make([*calls(8, 8), pause, *calls(8)], policy=teacher)
    vm.on_io(0x80, lambda _: vm.policy.replace(teacher))
    vm.run(timeout=10)
    assert len(teacher.asked) == 2


def test_replaced_under_load_every_request_is_decided_once(make) -> None:
    rounds = 40_000
    made = []

    def policy():
        made.append(Teacher(Convert()))
        return made[-1]

    scripts = [calls(*[8 + 8 * vcpu + turn % 4 for turn in range(rounds)]) for vcpu in range(2)]
    vm, _ = make(*scripts, policy=policy(), initial="private")
    done = threading.Event()

    def reload() -> None:
        while not done.is_set():
            vm.policy.replace(policy())
            time.sleep(0.001)

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        report = vm.run(timeout=60)
    finally:
        done.set()
        thread.join()
    assert (report.reason, report.requests) == ("halt", 2 * rounds)
    assert len(made) > 10
    assert sum(len(each.asked) for each in made) == 2 * rounds
    assert sum(1 for each in made if each.asked) > 5


# ---- what a hook does not want is not answered by its remembered decisions


@pytest.mark.parametrize(
    ("conditions", "wanted", "unwanted"),
    [
        ({"most": PAGE}, (0, 1), (0, 2)),
        ({"least": 2 * PAGE}, (0, 2), (0, 1)),
        ({"gpa": range(PAGE)}, (0, 1), (PAGE, 1)),
    ],
    ids=str,
)
def test_a_request_that_the_hook_does_not_want_is_converted_as_asked(conditions, wanted, unwanted):
    class Mine(Policy):
        @only(**conditions)
        def map_gpa_range(self, call):
            return Deny(9, remember=Region(0, 16 * PAGE))

    def step(request):
        gpa, pages = request
        return Step.doorbell(gpa, pages, 16)

    fake = Fake([step(wanted), step(unwanted), step(wanted)])
    with Vm("1M", policy=Mine(), hypervisor=fake) as vm:
        vm.vcpus[0].start(rip=0x1000)
        report = vm.run(timeout=10)
        assert answers(fake) == [9, 0, 9]
        assert (report.denied, report.conversions) == (2, 1)
        assert (vm.policy.seen, vm.policy.spared) == (1, 1)
    gpa, pages = unwanted
    tester = PolicyTester(Mine(), memory="1M", initial="shared")
    assert tester.call(wanted[0], wanted[1] * PAGE, to="private") == Deny(9)
    assert tester.call(gpa, pages * PAGE, to="private") == Convert()


def test_faults_of_another_vcpu_that_the_hook_does_not_want():
    class Mine(Policy):
        @only(vcpu=0)
        def memory_fault(self, fault):
            return Retry(remember=Region(0, 16 * PAGE))

    tester = PolicyTester(Mine(), memory="1M", initial="private")
    assert tester.fault(0, vcpu=0) == Retry()
    assert tester.fault(0, vcpu=1) == Convert()
