"""A conversion is all or nothing: whichever call fails half-way, the map says what KVM enforces."""

from __future__ import annotations

import errno

import pytest
from pagegate import Convert, MemoryFault, PagegateError, Policy
from pagegate.testing import Step

from .conftest import BIT, WAYS, assert_one_truth, mapped

PAGE = 4096
PAGES = 64
MEMORY = PAGES * PAGE
PRIVATE, SHARED = 16, 0


# Pages 4-7, 12-15, 20-23 and 28-31 are private at first. The range asked for is 9-26, which has pages of both states.
def patchwork(vm) -> None:
    for page in range(4, 32, 8):
        vm.convert(page * PAGE, 4 * PAGE, to="private")


ALL_CALLS = ("set_attributes", "create_memslot", "delete_memslot", "discard")
CALLS = {
    ("attributes", None): ["set_attributes"],
    ("attributes", BIT): ["set_attributes", "create_memslot", "delete_memslot"],
    ("traps", BIT): ["set_attributes"],
    ("memslots", None): ["create_memslot", "delete_memslot"],
    ("memslots", BIT): ["create_memslot", "delete_memslot"],
}
FAILURES = [
    pytest.param(way, call, after, half, id=f"{way}-{call}-{after}{'-half' * half}")
    for way in WAYS
    for call in CALLS[way[:2]]
    for after in range(4)
    for half in ([False, True] if call == "set_attributes" else [False])
]


def needed(make, way, call):
    """How many such calls it takes to make pages 9-26 of that pattern private."""
    vm, fake = make([], way=way)
    patchwork(vm)
    calls = fake.calls(call)
    vm.convert(9 * PAGE, 18 * PAGE, to="private")
    return fake.calls(call) - calls


@pytest.mark.parametrize("initial", ["shared", "private"])
def test_initial_state_is_enforced(make, way, initial) -> None:
    vm, fake = make([], way=way, initial=initial)
    assert_one_truth(vm, fake)
    assert mapped(vm)[: PAGES - 6] == [initial] * (PAGES - 6)


@pytest.mark.parametrize("ask", [Step.hypercall, Step.doorbell], ids=["hypercall", "doorbell"])
@pytest.mark.parametrize(("way", "call", "after", "half_done"), FAILURES)
def test_a_failed_explicit_request_gets_the_errno_and_changes_nothing(make, way, call, after, half_done, ask) -> None:
    vm, fake = make([ask(9 * PAGE, 18, PRIVATE)], way=way)
    patchwork(vm)
    before, generation = mapped(vm), vm.attributes.generation
    vm.write(0x1000, b"kept")
    vm.write(9 * PAGE, b"kept too")
    discards = fake.calls("discard")
    fake.inject(call, errno.ENOMEM, after=after, half_done=half_done)
    report = vm.run(timeout=10)
    assert report.reason == "halt"
    answers = [reply.value for reply in fake.replies()]
    assert_one_truth(vm, fake)
    assert vm.read(0x1000, 4) == b"kept"
    if after >= needed(make, way, call):
        assert answers == [0]
        return
    assert answers == [errno.ENOMEM]
    assert (report.conversions, report.bytes_to_private, report.bytes_to_shared) == (0, 0, 0)
    assert mapped(vm) == before
    assert vm.attributes.generation == generation
    assert fake.calls("discard") == discards
    assert vm.read(9 * PAGE, 8) == b"kept too"


@pytest.mark.parametrize(("way", "call"), sorted({f.values[:2] for f in FAILURES}, key=str))
def test_a_request_that_failed_can_be_made_again(make, way, call) -> None:
    vm, fake = make([Step.doorbell(9 * PAGE, 18, to) for to in (PRIVATE, PRIVATE, SHARED, SHARED)], way=way)
    patchwork(vm)
    before = mapped(vm)
    fake.inject(call, errno.ENOMEM)
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [errno.ENOMEM, 0, 0, 0]
    assert mapped(vm) == [*before[:9], *["shared"] * 18, *before[27:]]
    assert_one_truth(vm, fake)


@pytest.mark.parametrize(("way", "call", "after", "half_done"), [f for f in FAILURES if f.values[2] == 0])
def test_a_failed_implicit_request_is_raised_and_changes_nothing(make, way, call, after, half_done) -> None:
    step = Step.memory_fault(8 * PAGE) if way.bit is None else Step.access(way.view(8 * PAGE, "private"))
    vm, fake = make([step], way=way)
    patchwork(vm)
    before = mapped(vm)
    fake.inject(call, errno.ENOMEM, after=after, half_done=half_done)
    with pytest.raises(PagegateError, match="ENOMEM") as caught:
        vm.run(timeout=10)
    assert (caught.value.vcpu, caught.value.gpa, caught.value.state) == (0, 8 * PAGE, "shared")
    assert mapped(vm) == before
    assert_one_truth(vm, fake)
    # The call does not fail any more, so now the same access is completed.
    assert vm.run(timeout=10).reason == "halt"
    assert vm.attributes.is_private(8 * PAGE) == (way.bit is not None)
    assert_one_truth(vm, fake)


@pytest.mark.parametrize(("way", "call", "after", "half_done"), FAILURES)
def test_a_failed_host_conversion_changes_nothing(make, way, call, after, half_done) -> None:
    vm, fake = make([], way=way)
    patchwork(vm)
    before = mapped(vm)
    calls = fake.calls(call)
    fake.inject(call, errno.EBUSY, after=after, half_done=half_done)
    try:
        vm.convert(9 * PAGE, 18 * PAGE, to="private")
    except PagegateError as error:
        assert "EBUSY" in str(error)  # noqa: PT017
        assert "undone" in str(error)  # noqa: PT017
        assert mapped(vm) == before
    else:
        assert fake.calls(call) - calls <= after
        assert mapped(vm)[9:27] == ["private"] * 18
    assert_one_truth(vm, fake)


def test_chunks_done_before_the_failure_are_undone(make) -> None:
    # Three chunks of 2 MiB, and the third fails.
    memory = 8 << 20
    vm, fake = make([], memory=memory)
    vm.convert(5 << 20, PAGE, to="private")
    before = vm.attributes.runs()
    calls = fake.calls("set_attributes")
    fake.inject("set_attributes", errno.ENOMEM, after=2, half_done=True)
    with pytest.raises(PagegateError, match="ENOMEM"):
        vm.convert(0, 6 << 20, to="private")
    assert fake.calls("set_attributes") > calls + 3
    assert vm.attributes.runs() == before
    private = [gpa for gpa in range(0, memory, PAGE) if fake.is_private(gpa)]
    assert private == [5 << 20]


def test_large_conversions_are_cut_into_bounded_calls(make) -> None:
    vm, fake = make([], memory=64 << 20)
    calls = fake.calls("set_attributes")
    vm.convert(0, 32 << 20, to="private")
    assert fake.calls("set_attributes") - calls >= 8


# ---- the undo fails too


@pytest.mark.parametrize(("way", "call", "after", "half_done"), FAILURES)
def test_calls_that_keep_failing_are_undone_or_end_all_converting(make, way, call, after, half_done) -> None:
    vm, fake = make([], way=way)
    patchwork(vm)
    before, calls = mapped(vm), fake.calls(call)
    fake.inject(call, errno.EIO, after=after, half_done=half_done, forever=True)
    if after >= needed(make, way, call):
        vm.convert(9 * PAGE, 18 * PAGE, to="private")
        assert fake.calls(call) - calls <= after
        assert_one_truth(vm, fake)
        return
    with pytest.raises(PagegateError, match="EIO") as caught:
        vm.convert(9 * PAGE, 18 * PAGE, to="private")
    assert mapped(vm) == before
    if "undone" in str(caught.value):
        assert_one_truth(vm, fake)
        return
    # The undo failed too, so what KVM enforces is unknown and every later conversion is refused.
    made = [fake.calls(name) for name in ALL_CALLS]
    for gpa, to in [(44 * PAGE, "private"), (4 * PAGE, "shared")]:
        with pytest.raises(PagegateError, match="close"):
            vm.convert(gpa, PAGE, to=to)
    assert [fake.calls(name) for name in ALL_CALLS] == made


@pytest.mark.parametrize("kind", ["explicit", "implicit", "host"])
def test_undo_that_fails_is_an_error_with_both_errnos(make, kind) -> None:
    step = {"explicit": Step.hypercall(8 * PAGE, 1, PRIVATE), "implicit": Step.memory_fault(8 * PAGE)}.get(kind)
    vm, fake = make([step] if step else [], way=("memslots", None))
    vm.convert(30 * PAGE, PAGE, to="private")
    fake.inject("create_memslot", errno.ENOMEM, forever=True)
    convert = vm.run if step else lambda: vm.convert(8 * PAGE, PAGE, to="private")
    with pytest.raises(PagegateError, match="ENOMEM.*undo.*ENOMEM"):
        convert()
    assert not vm.attributes.is_private(8 * PAGE)
    with pytest.raises(PagegateError, match="unknown"):
        vm.convert(40 * PAGE, PAGE, to="private")
    with pytest.raises(PagegateError, match="unknown"):
        vm.convert(30 * PAGE, PAGE, to="shared")


def test_conversions_of_pages_whose_enforcement_is_unknown_are_refused(make) -> None:
    # The map says shared, but KVM has no slot there: to answer that nothing needs to change would be wrong.
    vm, fake = make([Step.doorbell(8 * PAGE, 1, SHARED)], way=("memslots", None))
    fake.inject("create_memslot", errno.ENOMEM, forever=True)
    with pytest.raises(PagegateError, match="unknown"):
        vm.convert(8 * PAGE, PAGE, to="private")
    assert fake.slot_at(8 * PAGE) is None
    with pytest.raises(PagegateError, match="unknown"):
        vm.convert(8 * PAGE, PAGE, to="shared")
    with pytest.raises(PagegateError, match="unknown"):
        vm.run(timeout=10)


# ---- the discard


@pytest.mark.parametrize("kind", ["explicit", "implicit", "host"])
def test_a_failed_discard_is_an_error_after_the_conversion(make, way, kind) -> None:
    touch = Step.memory_fault(way.view(8 * PAGE, "private"))
    step = {"explicit": Step.hypercall(8 * PAGE, 1, PRIVATE), "implicit": touch}.get(kind)
    vm, fake = make([step] if step else [], way=way)
    fake.inject("discard", errno.EIO)
    convert = vm.run if step else lambda: vm.convert(8 * PAGE, PAGE, to="private")
    with pytest.raises(PagegateError, match="EIO"):
        convert()
    # The discard comes after the last step that can be undone, so the map and KVM both have the new state.
    assert vm.attributes.is_private(8 * PAGE)
    assert_one_truth(vm, fake)


def test_the_old_side_is_discarded_in_both_directions(make, way) -> None:
    vm, fake = make([], way=way)
    vm.write(8 * PAGE, b"\x55" * (2 * PAGE))
    shared = vm.memory_usage().shared
    vm.convert(8 * PAGE, 2 * PAGE, to="private")
    assert vm.memory_usage().shared == shared - 2 * PAGE
    vm.convert(8 * PAGE, 2 * PAGE, to="shared")
    assert fake.calls("discard") >= 2
    assert vm.read(8 * PAGE, 2 * PAGE) == bytes(2 * PAGE)


# ---- running out of slots


def test_running_out_of_slots_is_enospc_and_changes_nothing(make) -> None:
    script = [Step.doorbell(page * PAGE, 1, PRIVATE) for page in range(0, 40, 2)]
    vm, fake = make(script, way=("memslots", None), memslots=9)
    vm.run(timeout=10)
    answers = [reply.value for reply in fake.replies()]
    assert answers == [0] * answers.index(errno.ENOSPC) + [errno.ENOSPC] * (20 - answers.index(errno.ENOSPC))
    assert answers.count(0) >= 3
    assert mapped(vm).count("private") == answers.count(0)
    assert fake.slots <= 9
    assert_one_truth(vm, fake)


def test_running_out_of_slots_says_what_to_do(make) -> None:
    vm, fake = make([], way=("memslots", None), memslots=5)
    vm.convert(2 * PAGE, PAGE, to="private")
    vm.convert(6 * PAGE, PAGE, to="private")
    before = mapped(vm)
    with pytest.raises(PagegateError, match="memslots.*nothing was changed.*Align") as caught:
        vm.convert(10 * PAGE, PAGE, to="private")
    assert "0xa000" in str(caught.value)
    assert mapped(vm) == before
    assert_one_truth(vm, fake)
    # Conversions that need no more slots still work, and so do those that free some.
    vm.convert(3 * PAGE, PAGE, to="private")
    vm.convert(6 * PAGE, PAGE, to="shared")
    vm.convert(10 * PAGE, PAGE, to="private")
    assert_one_truth(vm, fake)


def test_implicit_requests_without_slots_raise(make) -> None:
    vm, fake = make([Step.access(10 * PAGE)], way=("memslots", 40), memslots=4)
    vm.convert(2 * PAGE, PAGE, to="private")
    before = mapped(vm)
    with pytest.raises(PagegateError, match="out of memslots"):
        vm.run(timeout=10)
    assert mapped(vm) == before
    assert_one_truth(vm, fake)


def test_attributes_with_a_shared_bit_run_out_of_slots_and_undo(make) -> None:
    vm, fake = make([Step.hypercall(10 * PAGE, 1, PRIVATE)], way=("attributes", 40), memslots=3)
    vm.convert(2 * PAGE, PAGE, to="private")
    vm.convert(6 * PAGE, PAGE, to="private")
    before = mapped(vm)
    vm.run(timeout=10)
    assert [reply.value for reply in fake.replies()] == [errno.ENOSPC]
    assert mapped(vm) == before
    assert_one_truth(vm, fake)


# ---- coalescing


@pytest.mark.parametrize("order", ["up", "down", "odd-then-even"])
def test_neighbours_converted_one_by_one_share_a_slot(make, way, order) -> None:
    pages = list(range(128))
    if order == "down":
        pages.reverse()
    elif order == "odd-then-even":
        pages = pages[1::2] + pages[::2]
    vm, fake = make([], way=way, memory=512 * PAGE)
    at_first = fake.slots
    for page in pages[:64] if order != "odd-then-even" else pages:
        vm.convert((100 + page) * PAGE, PAGE, to="private")
    assert fake.slots - at_first <= 2  # at most three: shared, private, shared
    for page in pages:
        vm.convert((100 + page) * PAGE, PAGE, to="shared")
    assert fake.slots == at_first


def test_memory_divided_into_slots_keeps_its_borders(make) -> None:
    vm, fake = make([], way=("memslots", None), divided=4)
    assert fake.slots == 4
    vm.convert(8 * PAGE, 40 * PAGE, to="private")
    assert_one_truth(vm, fake)
    vm.convert(8 * PAGE, 40 * PAGE, to="shared")
    assert fake.slots == 4


# ---- ranges that the host converts


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(1, PAGE), (PAGE, 1), (PAGE, 0), (64 * PAGE, PAGE), (60 * PAGE, 5 * PAGE), ((1 << 64) - PAGE, 2 * PAGE)],
)
def test_host_conversions_are_validated(make, gpa, size) -> None:
    vm, fake = make([])
    calls = fake.calls("set_attributes")
    with pytest.raises(ValueError, match="range"):
        vm.convert(gpa, size, to="private")
    assert fake.calls("set_attributes") == calls
    assert vm.attributes.private_bytes == 0


def test_attributes_return_the_converted_states(make, way) -> None:
    vm, _ = make([], way=way)
    generation = vm.attributes.generation
    vm.convert(8 * PAGE, 4 * PAGE, to="private")
    assert vm.attributes.generation > generation
    assert vm.attributes.private_bytes == 4 * PAGE
    assert [vm.attributes.is_private(page * PAGE + 17) for page in (7, 8, 11, 12)] == [False, True, True, False]
    assert vm.attributes.runs() == [
        (0, 8 * PAGE, "shared"),
        (8 * PAGE, 4 * PAGE, "private"),
        (12 * PAGE, MEMORY - 12 * PAGE, "shared"),
    ]
    with pytest.raises(IndexError):
        vm.attributes.is_private(MEMORY)


def test_a_conversion_that_changes_nothing_makes_no_call(make, way) -> None:
    vm, fake = make([], way=way)
    generation = vm.attributes.generation
    calls = [fake.calls(call) for call in ALL_CALLS]
    vm.write(8 * PAGE, b"kept")
    vm.convert(0, MEMORY, to="shared")
    assert vm.attributes.generation == generation
    assert [fake.calls(call) for call in ALL_CALLS] == calls
    assert vm.read(8 * PAGE, 4) == b"kept"


def test_pages_already_in_the_wanted_state_keep_their_bytes(make, way) -> None:
    # Pages of the range that are shared already are not converted.
    vm, _ = make([], way=way)
    vm.write(8 * PAGE, b"kept")
    vm.convert(9 * PAGE, PAGE, to="private")
    vm.convert(8 * PAGE, 3 * PAGE, to="shared")
    assert vm.read(8 * PAGE, 4) == b"kept"
    assert vm.read(9 * PAGE, 4) == bytes(4)


def test_a_request_from_before_an_undone_change_is_superseded(make) -> None:
    # With one view, KVM reports the page's state at the time of the fault, which may be the one that was undone.
    page = 0x3000
    undone = []

    class Host(Policy):
        """During the first call, the host tries to make the page private, and fails."""

        def memory_fault(self, fault: MemoryFault) -> Convert:
            if not undone:
                fake.inject("set_attributes", errno.ENOMEM, half_done=True)
                with pytest.raises(PagegateError) as caught:
                    vm.convert(page, 2 * PAGE, to="private")
                undone.append(caught.value)
            return Convert()

    vm, fake = make([Step.memory_fault(page)], policy=Host())
    report = vm.run(timeout=10)
    assert (report.reason, len(undone)) == ("halt", 1)
    assert (report.faults, report.stale, report.conversions) == (1, 1, 0)
    assert [event.outcome for event in vm.events] == ["superseded"]
    assert vm.attributes.private_bytes == 0
