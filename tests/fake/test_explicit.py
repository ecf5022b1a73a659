"""Explicit requests: which are malformed, and how the guest gets the answer."""

from __future__ import annotations

import errno
import itertools
import threading

import pagegate
import pytest
from pagegate import Deny, Retry, Stop
from pagegate.testing import Step

from .conftest import TWO_VIEWS

PAGE = 4096
ENCRYPTED = 16
CALLS = ("set_attributes", "create_memslot", "delete_memslot", "discard")
KVM_ENOSYS = 1000

MALFORMED = [
    pytest.param((0x2001, 1, ENCRYPTED), id="unaligned"),
    pytest.param((0x2800, 1, 0), id="half-page"),
    pytest.param((0x2000, 0, ENCRYPTED), id="no-pages"),
    pytest.param((0, 0, 0), id="nothing"),
    pytest.param((0x1000, 1 << 52, ENCRYPTED), id="2^52-pages"),
    pytest.param((0, 1 << 52, ENCRYPTED), id="2^52-pages-from-0"),
    pytest.param((0x1000, (1 << 52) + 1, ENCRYPTED), id="2^52+1-pages"),
    pytest.param((0x1000, (1 << 64) - 1, ENCRYPTED), id="most-pages"),
    pytest.param(((1 << 64) - PAGE, 1, ENCRYPTED), id="last-page"),
    pytest.param(((1 << 64) - PAGE, 2, ENCRYPTED), id="wraps"),
    pytest.param((64 * PAGE, 1, ENCRYPTED), id="just-outside"),
    pytest.param((63 * PAGE, 2, ENCRYPTED), id="half-outside"),
    pytest.param((0, 65, ENCRYPTED), id="one-too-many"),
    pytest.param((1 << 45, 1, ENCRYPTED), id="far-outside"),
    pytest.param((0x2000, 1, 3), id="hint-3"),
    pytest.param((0x2000, 1, ENCRYPTED | 7), id="hint-7"),
    pytest.param((0x2000, 1, ENCRYPTED | 15), id="hint-15"),
    pytest.param((0x2000, 1, 1 << 5), id="bit-5"),
    pytest.param((0x2000, 1, ENCRYPTED | 1 << 6), id="bit-6"),
    pytest.param((0x2000, 1, ENCRYPTED | 1 << 32), id="bit-32"),
    pytest.param((0x2000, 1, 1 << 63), id="bit-63"),
]


@pytest.fixture(params=["hypercall", "doorbell"])
def ask(request):
    return getattr(Step, request.param)


@pytest.mark.parametrize("registers", MALFORMED)
def test_malformed_requests_are_answered_without_the_policy(make, recorder, ask, way, registers) -> None:
    policy = recorder()
    vm, fake = make([ask(*registers)], policy=policy, way=way)
    before = [fake.calls(call) for call in CALLS]
    report = vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [errno.EINVAL]
    assert policy.requests == []
    assert [fake.calls(call) for call in CALLS] == before
    assert (report.reason, report.requests, report.malformed) == ("halt", 0, 1)
    assert vm.attributes.runs() == [(0, 64 * PAGE, "shared")]


@pytest.mark.parametrize("nr", [0, 1, 5, 11, 13, 1 << 32 | 12, (1 << 64) - 1])
def test_unknown_hypercalls_are_answered_as_kvm_does(make, recorder, ask, nr) -> None:
    policy = recorder()
    vm, fake = make([ask(0x2000, 1, ENCRYPTED, nr=nr)], policy=policy)
    assert vm.run(timeout=10).reason == "halt"
    assert [reply.value for reply in fake.replies()] == [-KVM_ENOSYS]
    assert policy.requests == []
    assert vm.attributes.private_bytes == 0


def test_well_formed_requests_are_done_and_answered_0(make, recorder, ask, way) -> None:
    policy = recorder()
    vm, fake = make([ask(0x2000, 3, ENCRYPTED | 1)], policy=policy, way=way)
    report = vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [0]
    (call,) = policy.requests
    assert isinstance(call, pagegate.MapGpaRange)
    assert (call.vcpu, call.gpa, call.size, call.to, call.state) == (0, 0x2000, 3 * PAGE, "private", "shared")
    assert (call.page_size, call.raw) == (2 << 20, ENCRYPTED | 1)
    assert (report.hypercalls, report.conversions, report.bytes_to_private) == (1, 1, 3 * PAGE)
    assert vm.attributes.runs(0, 6 * PAGE) == [
        (0, 0x2000, "shared"),
        (0x2000, 3 * PAGE, "private"),
        (0x5000, PAGE, "shared"),
    ]


@pytest.mark.parametrize(("hint", "size"), [(0, 4096), (1, 2 << 20), (2, 1 << 30)])
def test_page_size_hints_reach_the_policy(make, recorder, hint, size) -> None:
    policy = recorder()
    vm, _ = make([Step.hypercall(0x2000, 1, hint)], policy=policy)
    vm.run(timeout=10)
    assert policy.requests[0].page_size == size


def test_all_of_memory_can_be_asked_for(make, recorder, ask) -> None:
    policy = recorder(Deny(errno.EPERM))
    vm, fake = make([ask(0, 64, ENCRYPTED)], policy=policy)
    vm.run(timeout=10)
    assert policy.requests[0].size == 64 * PAGE
    assert fake.replies()[0].value == errno.EPERM


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_the_view_bit_is_stripped(make, recorder, ask, way) -> None:
    policy = recorder()
    vm, fake = make([ask(1 << 40 | 0x2000, 1, ENCRYPTED)], policy=policy, way=way)
    vm.run(timeout=10)
    assert policy.requests[0].gpa == 0x2000
    assert fake.replies()[0].value == 0
    assert vm.attributes.is_private(0x2000)


def test_a_request_that_changes_nothing_reaches_the_policy(make, recorder, ask, way) -> None:
    policy = recorder()
    vm, fake = make([ask(0x2000, 1, 0)], policy=policy, way=way)
    before = [fake.calls(call) for call in CALLS]
    report = vm.run(timeout=10)
    assert [(call.to, call.state) for call in policy.requests] == [("shared", "shared")]
    assert fake.replies()[0].value == 0
    assert (report.hypercalls, report.bytes_to_shared, report.bytes_to_private) == (1, 0, 0)
    assert [fake.calls(call) for call in CALLS] == before


def test_a_mixed_range_is_reported_as_mixed(make, recorder) -> None:
    policy = recorder()
    vm, _ = make([Step.hypercall(0x2000, 2, ENCRYPTED)], policy=policy)
    vm.convert(0x3000, PAGE, to="private")
    report = vm.run(timeout=10)
    assert policy.requests[0].state == "mixed"
    assert report.bytes_to_private == PAGE


@pytest.mark.parametrize(
    ("answer", "rax"),
    [
        (Deny(), errno.EINVAL),
        (Deny(errno.EPERM), errno.EPERM),
        (Deny(4095), 4095),
        (Retry(), errno.EAGAIN),
    ],
)
def test_the_errno_of_a_refusal_is_in_rax(make, recorder, ask, answer, rax) -> None:
    vm, fake = make([ask(0x2000, 1, ENCRYPTED), Step.io_write(0x80, b"x")], policy=recorder(answer))
    report = vm.run(timeout=10)
    assert fake.replies()[0].value == rax
    assert report.reason == "halt"
    assert (report.denied, report.retries) == ((0, 1) if answer == Retry() else (1, 0))
    assert report.conversions == 0
    assert vm.attributes.private_bytes == 0


def test_stop_ends_the_run_and_the_guest_gets_eagain(make, recorder, ask) -> None:
    vm, fake = make([ask(0x2000, 1, ENCRYPTED)], policy=recorder(Stop("enough")))
    assert vm.run(timeout=10).reason == "enough"
    assert vm.attributes.private_bytes == 0
    assert vm.run(timeout=10).reason == "halt"
    assert fake.replies()[0].value == errno.EAGAIN


def test_every_answer_is_written(make, recorder, ask) -> None:
    script = [
        ask(0x2000, 1, ENCRYPTED),
        ask(0x2001, 1, ENCRYPTED),
        ask(0x2000, 1, ENCRYPTED, nr=5),
        ask(0x2000, 1, 0),
        ask(0x2000, 1, 0),
    ]
    vm, fake = make(script, policy=recorder(pagegate.Convert(), Deny(errno.EBUSY), Retry()))
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [0, errno.EINVAL, -KVM_ENOSYS, errno.EBUSY, errno.EAGAIN]


def test_other_writes_to_the_doorbell_port_are_no_requests(make, recorder) -> None:
    policy = recorder()
    script = [Step.io_write(pagegate.DOORBELL_PORT, b"\x0c\x00", size=2), Step.io_read(pagegate.DOORBELL_PORT)]
    vm, _ = make(script, policy=policy)
    assert vm.run(timeout=10).reason == "halt"
    assert policy.requests == []


@pytest.mark.parametrize("view", ["shared", "private"])
@pytest.mark.parametrize(
    ("gpa", "pages"), [(64 * PAGE, 1), (0xFEC0_0000, 1), (0x8000_0000, 0x6000_0000 // PAGE), ((1 << 39) - PAGE, 1)]
)
def test_sharing_what_is_no_memory_does_nothing(make, recorder, way, view, gpa, pages) -> None:
    policy = recorder()
    at = way.view(gpa, view)
    vm, fake = make([Step.hypercall(at, pages, to) for to in (0, ENCRYPTED, 3)], way=way, policy=policy)
    before, calls = vm.attributes.runs(), [fake.calls(call) for call in CALLS]
    report = vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [0, errno.EINVAL, errno.EINVAL]
    assert (policy.requests, report.requests, report.malformed) == ([], 0, 2)
    told = [(event.kind, event.gpa, event.size, event.outcome, event.errno, event.latency) for event in vm.events]
    assert told == [("malformed", at, pages * PAGE, "refused", errno.EINVAL, 0)] * 2
    assert (vm.attributes.runs(), [fake.calls(call) for call in CALLS]) == (before, calls)


@pytest.mark.parametrize(("gpa", "pages"), [(63 * PAGE, 2), (64 * PAGE, (1 << 40) // PAGE), (1 << 52, 1)])
def test_sharing_memory_and_something_else_is_malformed(make, recorder, gpa, pages) -> None:
    policy = recorder()
    vm, fake = make([Step.hypercall(gpa, pages, 0)], way=TWO_VIEWS[0], policy=policy)
    vm.run(timeout=10)
    assert ([reply.value for reply in fake.replies()], policy.requests) == ([errno.EINVAL], [])


class OnlyWhatIsShared(pagegate.Policy):
    """Allows only what is shared already. During the first call, the host converts some of the pages."""

    def __init__(self, *meanwhile: tuple[int, int]) -> None:
        self.vm: pagegate.Vm | None = None
        self.states: list[str] = []
        self.meanwhile = meanwhile

    def map_gpa_range(self, call: pagegate.MapGpaRange) -> pagegate.Convert | Deny:
        self.states.append(call.state)
        answer = pagegate.Convert() if call.state == "shared" else Deny(errno.EPERM)
        if len(self.states) == 1:
            for gpa, size in self.meanwhile:
                self.vm.convert(gpa, size, to="private")
        return answer


@pytest.mark.parametrize("blocks", [1, 4])
def test_the_policy_is_asked_again_if_the_pages_changed_meanwhile(make, ask, blocks) -> None:
    hook = OnlyWhatIsShared((0x2000, PAGE))
    policy = hook if blocks == 1 else pagegate.policies.Align(blocks * PAGE, then=hook)
    vm, fake = make([ask(0x2000, 1, 0)], policy=policy)
    hook.vm = vm
    report = vm.run(timeout=10)
    assert hook.states == ["shared", "private"]
    assert [reply.value for reply in fake.replies()] == [errno.EPERM]
    assert [(event.state, event.outcome) for event in vm.events] == [("private", "denied")]
    assert (report.hypercalls, report.stale, report.denied, report.conversions) == (1, 0, 1, 0)
    assert vm.attributes.is_private(0x2000)


@pytest.mark.parametrize("told", list(itertools.product(("shared", "private"), repeat=3)), ids="-".join)
def test_the_policy_is_asked_again_whatever_it_was_told(make, way, told) -> None:
    # Pages 2 to 4 are in these states when the policy is asked first, and in any others while it decides.
    for now, to in itertools.product(itertools.product(("shared", "private"), repeat=3), ("shared", "private")):
        states = []

        def convert(states) -> None:
            for page, state in enumerate(states, 2):
                vm.convert(page * PAGE, PAGE, to=state)  # noqa: B023

        class Meanwhile:
            def map_gpa_range(self, call) -> pagegate.Convert:
                states.append(call.state)  # noqa: B023
                if len(states) == 1:  # noqa: B023
                    convert(now)  # noqa: B023
                return pagegate.Convert()

        vm, fake = make([Step.hypercall(2 * PAGE, 3, ENCRYPTED * (to == "private"))], way=way, policy=Meanwhile())
        convert(told)
        vm.run(timeout=10)
        asked = [told] if now == told else [told, now]
        assert states == [pages[0] if len(set(pages)) == 1 else "mixed" for pages in asked]
        assert fake.replies()[0].value == 0
        assert [event.state for event in vm.events] == states[-1:]
        assert vm.attributes.is_private(2 * PAGE) is (to == "private")


def test_pages_of_the_request_that_are_not_converted_count_too(make) -> None:
    states = []

    class First:
        def map_gpa_range(self, call) -> pagegate.Convert:
            states.append(call.state)
            if len(states) == 1:
                vm.convert(3 * PAGE, PAGE, to="private")
            return pagegate.Convert(size=PAGE)

    vm, _ = make([Step.hypercall(2 * PAGE, 2, ENCRYPTED)], policy=First())
    vm.run(timeout=10)
    assert states == ["shared", "mixed"]


def test_a_large_range_whose_last_page_changed_meanwhile(make, ask) -> None:
    large = 512 << 20
    hook = OnlyWhatIsShared((large - PAGE, PAGE))
    vm, fake = make([ask(0, large // PAGE, 0)], policy=hook, memory=large)
    hook.vm = vm
    vm.run(timeout=10)
    assert hook.states == ["shared", "mixed"]
    assert [reply.value for reply in fake.replies()] == [errno.EPERM]
    assert vm.attributes.is_private(large - PAGE)


def test_a_large_range_is_converted_up_to_the_first_part_that_changed(make, ask) -> None:
    # The request takes two transactions, and a page of the second changes while the first is carried out.
    large = 512 << 20

    class Changes:
        def committed(self, change) -> None:
            if change.size == large // 2:
                other = threading.Thread(target=vm.convert, args=(large - PAGE, PAGE), kwargs={"to": "private"})
                other.start()
                other.join()

    vm, fake = make([ask(0, large // PAGE, ENCRYPTED)], memory=large)
    vm.add_listener(Changes())
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [errno.EAGAIN]
    (event,) = vm.events
    assert (event.outcome, event.done_size, event.changed) == ("retried", large // 2, large // 2)
    assert vm.attributes.private_bytes == large // 2 + PAGE
