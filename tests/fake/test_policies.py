"""The built-in policies, alone, chained, and around a Python policy."""

from __future__ import annotations

import sys
import sysconfig
import time

import pytest
from pagegate import Convert, Deny, Policy, policies
from pagegate.policies import Align, Allow, DenyAll, ExplicitOnly, PingPong, Quota, RateLimit, Window
from pagegate.testing import Step

from .conftest import TWO_VIEWS

PAGE = 4096
MEMORY = 64 * PAGE
PRIVATE, SHARED = 16, 0


class Python(Policy):
    def __init__(self, answer=None) -> None:
        self.answer = answer or Convert()
        self.requests = []

    def map_gpa_range(self, call):
        self.requests.append(call)
        return self.answer

    def memory_fault(self, fault):
        self.requests.append(fault)
        return self.answer


def explicit(make, policy, *requests, **kwargs):
    vm, fake = make([Step.doorbell(*request) for request in requests], policy=policy, **kwargs)
    report = vm.run(timeout=10)
    return vm, report, [reply.value for reply in fake.replies()]


def test_allow(make) -> None:
    vm, report, answers = explicit(make, Allow(), (8 * PAGE, 1, PRIVATE))
    assert (answers, report.conversions, vm.attributes.private_bytes) == ([0], 1, PAGE)


@pytest.mark.parametrize("errno", [22, 11, 4095])
def test_deny_all(make, errno) -> None:
    vm, report, answers = explicit(make, DenyAll(errno), (8 * PAGE, 1, PRIVATE))
    assert (answers, report.denied, vm.attributes.private_bytes) == ([errno], 1, 0)
    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=DenyAll())
    assert vm.run(timeout=10).reason == "denied"


def test_explicit_only(make) -> None:
    vm, report, answers = explicit(make, ExplicitOnly(), (8 * PAGE, 1, PRIVATE))
    assert (answers, report.conversions) == ([0], 1)
    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=ExplicitOnly())
    assert vm.run(timeout=10).reason == "denied"
    assert vm.attributes.private_bytes == 0


@pytest.mark.parametrize(
    ("asked", "done"),
    [
        ((9, 1), (8, 4)),
        ((8, 4), (8, 4)),
        ((7, 2), (4, 8)),
        ((61, 1), (60, 3)),  # cut off at the end of memory
    ],
)
def test_align_widens_to_blocks(make, asked, done) -> None:
    first, pages = asked
    vm, report, answers = explicit(
        make, Align(4 * PAGE), (first * PAGE, pages, PRIVATE), memory=63 * PAGE, memslots=32764
    )
    assert answers == [0]
    assert [run for run in vm.attributes.runs() if run[2] == "private"] == [(done[0] * PAGE, done[1] * PAGE, "private")]
    assert report.conversions == 1


def test_align_widens_the_decision_of_the_next_policy(make) -> None:
    python = Python(Convert(gpa=20 * PAGE, size=PAGE))
    vm, _, _ = explicit(make, Align(16 * PAGE, python), (8 * PAGE, 1, PRIVATE))
    assert vm.attributes.runs()[1] == (16 * PAGE, 16 * PAGE, "private")
    assert len(python.requests) == 1


def test_a_denial_is_never_widened(make) -> None:
    chain = Align(4 * PAGE, Quota(MEMORY, Window([(0, MEMORY)], Python(Deny(11)))))
    vm, _, answers = explicit(make, chain, (8 * PAGE, 1, PRIVATE))
    assert (answers, vm.attributes.private_bytes) == ([11], 0)


def test_quota_counts_what_is_shared(make) -> None:
    requests = [(8 * PAGE, 2, SHARED), (10 * PAGE, 1, SHARED), (9 * PAGE, 1, PRIVATE), (10 * PAGE, 1, SHARED)]
    # Six pages are shared already, for page tables and the like.
    vm, report, answers = explicit(make, Quota(8 * PAGE), *requests, initial="private")
    assert answers == [0, 22, 0, 0]
    assert vm.memory - vm.attributes.private_bytes == 8 * PAGE
    assert (report.denied, report.conversions) == (1, 3)


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_quota_ends_an_implicit_request(make, way) -> None:
    access = Step.access(way.view(8 * PAGE, "shared"))
    vm, _ = make([access], policy=Quota(6 * PAGE), initial="private", way=way)
    assert vm.run(timeout=10).reason == "denied"


def test_two_vcpus_together_do_not_exceed_a_quota(make) -> None:
    def script(first):
        return [Step.doorbell((first + i % 4) * PAGE, 1, SHARED if i % 2 else PRIVATE) for i in range(400)]

    most = 0

    class Listen:
        def committed(self, change) -> None:
            nonlocal most, shared
            shared += change.size if change.to == "shared" else -change.size
            most = max(most, shared)

    shared = -MEMORY  # a listener is told the present states first: private runs count down, the tables up
    vm, _ = make(script(8), script(20), policy=Quota(7 * PAGE), initial="private")
    shared = 0
    vm.add_listener(Listen())
    shared = most = vm.memory - vm.attributes.private_bytes
    vm.run(timeout=30)
    assert most == 7 * PAGE


def test_a_quota_refuses_nothing_within_its_limit(make) -> None:
    def script(page):
        return [Step.doorbell(page * PAGE, 1, [SHARED, PRIVATE][turn % 2]) for turn in range(3000)]

    # Six pages of tables and one for each vCPU are exactly what the quota allows, in any order.
    vm, _ = make(script(8), script(20), policy=Quota(8 * PAGE), initial="private")
    report = vm.run(timeout=30)
    assert (report.reason, report.denied, report.conversions) == ("halt", 0, 6000)


def test_window_is_for_sharing_only(make) -> None:
    window = Window([(16 * PAGE, 4 * PAGE), (32 * PAGE, PAGE)])
    requests = [
        (16 * PAGE, 4, SHARED),
        (19 * PAGE, 2, SHARED),
        (32 * PAGE, 1, SHARED),
        (33 * PAGE, 1, SHARED),
        (40 * PAGE, 1, PRIVATE),
    ]
    _, _, answers = explicit(make, window, *requests, initial="private")
    assert answers == [0, 22, 0, 22, 0]


def test_rate_limit(make) -> None:
    limit = RateLimit(0.001, burst=3)
    _, report, answers = explicit(make, limit, *[(8 * PAGE, 1, PRIVATE)] * 5)
    assert answers == [0, 0, 0, 11, 11]
    assert report.requests == 5


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_rate_limit_slows_implicit_requests_down(make, way) -> None:
    steps = [Step.access(way.view((8 + page) * PAGE, "private")) for page in range(10)]
    vm, _ = make(steps, policy=RateLimit(50.0, burst=1), way=way)
    began = time.monotonic()
    report = vm.run(timeout=30)
    took = time.monotonic() - began
    assert (report.reason, report.conversions) == ("halt", 10)
    assert took >= 9 / 50 * 0.9


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_rate_limit_does_not_delay_the_end_of_a_run(make, way) -> None:
    steps = [Step.access(way.view(page * PAGE, "private")) for page in (8, 9)]
    vm, _ = make(steps, policy=RateLimit(1e-6), way=way)
    began = time.monotonic()
    assert vm.run(timeout=0.2).reason == "timeout"
    assert time.monotonic() - began < 1


def test_ping_pong_says_why_it_stopped(make) -> None:
    flips = [(8 * PAGE, 1, [PRIVATE, SHARED][turn % 2]) for turn in range(20)]
    _, report, answers = explicit(make, PingPong(5, 10.0), *flips)
    assert report.reason.startswith("ping-pong: 0x8000 changed direction 6 times in ")
    assert "limit 5 in 10.000 s" in report.reason
    assert report.conversions == 6
    assert answers == [0] * 6 + [11]


def test_ping_pong_needs_the_same_page_and_a_short_time(make) -> None:
    around = [(page * PAGE, 1, PRIVATE if turn == 0 else SHARED) for turn in range(2) for page in range(1, 50)]
    assert explicit(make, PingPong(5, 10.0), *around)[1].reason == "halt"
    flips = [(8 * PAGE, 1, [PRIVATE, SHARED][turn % 2]) for turn in range(20)]
    assert explicit(make, PingPong(5, 0.0), *flips)[1].reason == "halt"


@pytest.mark.parametrize(
    "policy", [PingPong(5, 10.0, Align(16 * PAGE)), Align(16 * PAGE, PingPong(5, 10.0))], ids=["around", "inside"]
)
def test_ping_pong_of_pages_that_are_converted_together(make, policy) -> None:
    """Each of two neighbours is always asked for in the same state; their block changes its state each time."""
    flips = [((16 + turn % 2) * PAGE, 1, [PRIVATE, SHARED][turn % 2]) for turn in range(20)]
    _, report, answers = explicit(make, policy, *flips)
    assert report.reason.startswith("ping-pong: 0x10000 changed direction 6 times in ")
    assert answers.count(0) == 6
    _, report, _ = explicit(make, PingPong(5, 10.0), *flips)
    assert report.reason == "halt", "alone they do not disturb one another"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ping_pong_of_one_page_in_different_ranges(make, order) -> None:
    """Requests for different ranges that have one page in common."""
    ranges = [(8 * PAGE, 1, SHARED), (7 * PAGE, 3, PRIVATE)]
    flips = [ranges[i] for _ in range(20) for i in order]
    _, report, answers = explicit(make, PingPong(5, 10.0), *flips)
    assert report.reason.startswith("ping-pong: 0x8000 changed direction 6 times")
    assert len(answers) < 10
    # Each request leaves out the pages that the one before it had in common with it.
    creeping = [(7 * PAGE, 2, SHARED), (7 * PAGE, 1, SHARED), (8 * PAGE, 2, PRIVATE), (9 * PAGE, 1, PRIVATE)] * 20
    assert explicit(make, PingPong(5, 10.0), *creeping)[1].reason.startswith(
        "ping-pong: 0x8000 changed direction 6 times"
    )
    apart = [(8 * PAGE, 1, SHARED), (9 * PAGE, 1, PRIVATE)] * 20
    assert explicit(make, PingPong(5, 10.0), *apart)[1].reason == "halt"


def test_a_chain_ends_in_python(make) -> None:
    python = Python()
    chain = RateLimit(1e9, 1000, PingPong(1000, 1.0, Quota(MEMORY, Align(2 * PAGE, python))))
    vm, _, answers = explicit(make, chain, (9 * PAGE, 1, PRIVATE))
    assert (answers, len(python.requests)) == ([0], 1)
    assert vm.attributes.private_bytes == 2 * PAGE


def test_a_python_policy_that_fails_in_a_chain_stops_the_run(make) -> None:
    class Fails:
        def map_gpa_range(self, call):
            raise RuntimeError("no")

    vm, _ = make([Step.doorbell(8 * PAGE, 1, PRIVATE)], policy=Align(4 * PAGE, Fails()))
    with pytest.raises(RuntimeError, match="no") as caught:
        vm.run(timeout=10)
    assert "vCPU 0" in caught.value.__notes__
    assert vm.attributes.private_bytes == 0


@pytest.mark.parametrize(
    "make_wrong",
    [
        lambda: Align(100),
        lambda: Align(3 * PAGE),
        lambda: Window([(1, PAGE)]),
        lambda: Window([(PAGE, 0)]),
        lambda: RateLimit(0.0),
        lambda: RateLimit(float("nan")),
        lambda: RateLimit(1.0, 0),
        lambda: PingPong(0, 1.0),
        lambda: PingPong(1, -1.0),
        lambda: DenyAll(0),
        lambda: DenyAll(4096),
    ],
)
def test_wrong_arguments(make_wrong) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_wrong()


@pytest.mark.parametrize("name", policies.__all__)
def test_each_says_what_it_is_for(name) -> None:
    assert getattr(policies, name).__doc__


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="there is no GIL to wait for")
@pytest.mark.parametrize("python", [False, True], ids=["built in", "python"])
def test_a_chain_without_python_never_waits_for_the_interpreter(make, in_background, python) -> None:
    then = Python() if python else Allow()
    chain = RateLimit(1e9, 1_000_000, PingPong(65536, 0.0, Quota(MEMORY, Align(PAGE, then))))
    vm, _ = make([Step.doorbell(8 * PAGE, 1, to) for to in (PRIVATE, SHARED)], policy=chain, cycles=1 << 40)
    run = in_background(vm)
    while not vm.events.total:
        time.sleep(0.01)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        # From here on this thread does not release the GIL.
        before, end = vm.events.total, time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass
        judged = vm.events.total - before
    finally:
        sys.setswitchinterval(interval)
    vm.stop()
    assert run.join().reason == "stopped"
    # The counts are read without the GIL, and until this thread has it again hooks can be called.
    assert judged < 1000 if python else judged > 3000
