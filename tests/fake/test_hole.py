"""Memory above 3 GiB of a PC goes on at 4 GiB: what is in between is no memory."""

from __future__ import annotations

import errno

import pytest
from pagegate import Change, Convert, Listener, PagegateError, Policy, PolicyError, policies, trace
from pagegate.testing import Step

from .conftest import BIT, Way

PAGE = 4096
GIB = 1 << 30
MEMORY = 8 * GIB
HOLE, AGAIN, END = 3 * GIB, 4 * GIB, 9 * GIB
PRIVATE, SHARED = 16, 0
MMIO_ONES = b"\xff" * 8
# The fake notes each private page, so that traps take it a second here.
WAYS = [Way("memslots"), Way("memslots", BIT), Way("memslots", BIT, "private"), Way("traps", BIT, "private")]
SLOTS = WAYS[:3]


@pytest.fixture(params=WAYS, ids=str)
def way(request) -> Way:
    return request.param


@pytest.fixture
def pc(make):
    """Makes a PC with 8 GiB, whose vCPU takes these steps."""

    def pc(*steps, way=WAYS[0], **kwargs):
        return make(list(steps), way=way, memory=MEMORY, platform="pc", **kwargs)

    return pc


@pytest.fixture
def private_pc(pc):
    """The same, with all of it private but for the page tables in its last pages."""
    return lambda *steps, **kwargs: pc(*steps, initial="private", **kwargs)


def test_the_layout(pc, way) -> None:
    vm, fake = pc(way=way)
    assert vm.memory == MEMORY
    assert vm.ram == [(0, HOLE), (AGAIN, END - AGAIN)]
    assert vm.attributes.runs() == [(0, HOLE, "shared"), (AGAIN, END - AGAIN, "shared")]
    at = [way.view(gpa, "shared") for gpa in (HOLE - 1, HOLE, AGAIN - 1, AGAIN, END - 1, END)]
    assert [fake.slot_at(gpa) for gpa in at] == [False, None, None, False, False, None]
    assert not any(fake.is_private(gpa) for gpa in (HOLE, way.view(HOLE, "private"), way.view(HOLE, "shared")))


@pytest.mark.parametrize("memory", [PAGE * 16, HOLE])
def test_memory_below_the_hole_has_none(make, memory) -> None:
    vm, _ = make([], memory=memory, way=WAYS[0], platform="pc")
    assert vm.ram == [(0, memory)]


def test_a_page_more_goes_above_the_hole(make) -> None:
    vm, _ = make([], memory=HOLE + 8 * PAGE, way=WAYS[0], platform="pc")
    assert vm.ram == [(0, HOLE), (AGAIN, 8 * PAGE)]


def test_a_bare_machine_has_no_hole(make) -> None:
    vm, _ = make([], memory=MEMORY)
    assert vm.ram == [(0, MEMORY)]
    assert not vm.attributes.is_private(HOLE)


def test_the_hole_is_counted_neither_as_private_nor_as_shared(pc) -> None:
    vm, _ = pc()
    assert vm.attributes.private_bytes == 0
    for gpa, size in vm.ram:
        vm.convert(gpa, size, to="private")
    assert vm.attributes.private_bytes == MEMORY
    assert vm.attributes.runs(2 * GIB, 3 * GIB) == [(2 * GIB, GIB, "private"), (AGAIN, GIB, "private")]


@pytest.mark.parametrize("way", SLOTS, ids=str)
@pytest.mark.parametrize("gpa", [HOLE, HOLE + 5, AGAIN - 1, END])
def test_there_is_no_state_in_the_hole(pc, way, gpa) -> None:
    vm, _ = pc(way=way)
    for address in {gpa, way.view(gpa, "private"), way.view(gpa, "shared")}:
        with pytest.raises(IndexError, match=f"{address:#x}"):
            vm.attributes.is_private(address)
        with pytest.raises(IndexError, match=f"{address:#x}"):
            vm.attributes.state(address)


@pytest.mark.parametrize(
    ("gpa", "size"), [(HOLE - PAGE, 2 * PAGE), (HOLE, PAGE), (AGAIN - PAGE, 2 * PAGE), (0, END), (2 * GIB, 3 * GIB)]
)
def test_ranges_over_the_hole_are_refused(pc, gpa, size) -> None:
    vm, _ = pc()
    with pytest.raises(ValueError, match="range"):
        vm.convert(gpa, size, to="private")
    with pytest.raises((ValueError, IndexError)):
        vm.attributes.state(gpa, size)
    with pytest.raises(ValueError, match="do not lie"):
        vm.read(HOLE - 4, 8)
    with pytest.raises(ValueError, match="do not lie"):
        vm.write(AGAIN - 4, bytes(8))
    assert vm.attributes.private_bytes == 0


def test_both_ends_of_the_hole_are_memory(pc, way) -> None:
    vm, _ = pc(way=way)
    for gpa in (HOLE - 4, AGAIN, END - 4):
        vm.write(way.view(gpa, "shared"), b"here")
        assert vm.read(gpa, 4) == b"here"


@pytest.mark.parametrize("way", SLOTS, ids=str)
@pytest.mark.parametrize("ask", [Step.hypercall, Step.doorbell], ids=["hypercall", "doorbell"])
@pytest.mark.parametrize(
    ("gpa", "pages"), [(HOLE, 1), (HOLE - PAGE, 2), (AGAIN - PAGE, 2), (2 * GIB, 3 * GIB // PAGE), (END, 1)]
)
def test_requests_over_the_hole_to_private_are_malformed(pc, recorder, way, ask, gpa, pages) -> None:
    policy = recorder()
    vm, fake = pc(ask(gpa, pages, PRIVATE), policy=policy, way=way)
    report = vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [errno.EINVAL]
    assert (policy.requests, report.malformed, report.requests) == ([], 1, 0)


def test_requests_next_to_the_hole_are_carried_out(pc, recorder, way) -> None:
    policy = recorder()
    ends = [(HOLE - PAGE, 1), (AGAIN, 1), (END - 8 * PAGE, 2)]
    vm, _ = pc(*(Step.hypercall(gpa, pages, PRIVATE) for gpa, pages in ends), policy=policy, way=way)
    assert vm.run(timeout=10).conversions == 3
    assert [(call.gpa, call.size) for call in policy.requests] == [(gpa, pages * PAGE) for gpa, pages in ends]
    assert vm.attributes.private_bytes == 4 * PAGE


def test_an_access_to_the_hole_is_a_device_access(pc, recorder, way) -> None:
    policy = recorder()
    addresses = {HOLE + 8, way.view(HOLE + 8, "private"), way.view(HOLE + 8, "shared")}
    vm, fake = pc(*map(Step.access, addresses), policy=policy, way=way)
    seen = []
    vm.on_mmio(HOLE + PAGE, PAGE, seen.append)
    assert vm.run(timeout=10).reason == "halt"
    assert [reply.data for reply in fake.replies()] == [MMIO_ONES] * len(addresses)
    assert (policy.requests, seen) == ([], [])


def test_devices_are_in_the_hole_and_not_over_its_edge(pc) -> None:
    vm, _ = pc(Step.access(HOLE, write=True))
    with pytest.raises(ValueError, match="overlaps guest memory"):
        vm.on_mmio(HOLE - PAGE, 2 * PAGE, print)
    with pytest.raises(ValueError, match="overlaps guest memory"):
        vm.on_mmio(AGAIN - PAGE, 2 * PAGE, print)
    seen = []
    vm.on_mmio(HOLE, PAGE, lambda mmio: seen.append(mmio.gpa))
    vm.run(timeout=10)
    assert seen == [HOLE]


def test_a_fault_in_the_hole_makes_no_sense(pc, recorder) -> None:
    policy = recorder()
    vm, _ = pc(Step.memory_fault(HOLE), policy=policy, way=Way("traps", BIT))
    with pytest.raises(PagegateError, match="outside the guest's memory"):
        vm.run(timeout=10)
    assert policy.requests == []


def test_listeners_are_not_told_of_the_hole(private_pc) -> None:
    class Log(Listener):
        def __init__(self) -> None:
            self.told: list[tuple[int, int, bool]] = []

        def committed(self, change: Change) -> None:
            self.told.append((change.gpa, change.size, change.initial))

    vm, _ = private_pc()
    tables = sum(size for _, size, state in vm.attributes.runs() if state == "shared")
    vm.convert(END - tables, tables, to="private")
    log = Log()
    vm.add_listener(log)
    assert log.told == [(0, HOLE, True), (AGAIN, END - AGAIN, True)]
    vm.convert(HOLE - PAGE, PAGE, to="shared")
    vm.convert(AGAIN, PAGE, to="shared")
    assert log.told[2:] == [(HOLE - PAGE, PAGE, False), (AGAIN, PAGE, False)]


def test_a_quota_does_not_count_the_hole(private_pc, way) -> None:
    pages = (HOLE - PAGE, AGAIN, END - 64 * PAGE)
    vm, fake = private_pc(*(Step.hypercall(gpa, 1, SHARED) for gpa in pages), way=way)
    # Page tables are shared from the start.
    most = vm.memory - vm.attributes.private_bytes + 2 * PAGE
    vm.policy.replace(policies.Quota(most))
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [0, 0, errno.EINVAL]
    assert vm.memory - vm.attributes.private_bytes == most


def test_a_replay_does_not_count_the_hole(private_pc) -> None:
    vm, _ = private_pc(Step.hypercall(END - 64 * PAGE, 1, SHARED), Step.hypercall(0, 1, SHARED))
    vm.run(timeout=10)
    # The page tables became shared by no request.
    replay = trace.replay(vm.events, policies.Quota(2 * PAGE))
    assert replay.recorded.peak_shared == 2 * PAGE
    assert (replay.policies[0].converted, replay.different) == (2, 0)


def test_align_widens_up_to_the_hole(pc) -> None:
    vm, fake = pc(Step.hypercall(5 * GIB // 2, 1, PRIVATE), policy=policies.Align(2 * GIB))
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [0]
    assert vm.attributes.runs(2 * GIB, 3 * GIB) == [(2 * GIB, GIB, "private"), (AGAIN, GIB, "shared")]


def test_a_decision_over_the_hole_is_a_policy_error(pc) -> None:
    class Wide(Policy):
        def map_gpa_range(self, call) -> Convert:
            return Convert(gpa=2 * GIB, size=3 * GIB)

    vm, _ = pc(Step.hypercall(2 * GIB, 1, PRIVATE), policy=Wide())
    with pytest.raises(PolicyError, match="0x80000000"):
        vm.run(timeout=10)
    assert vm.attributes.private_bytes == 0
