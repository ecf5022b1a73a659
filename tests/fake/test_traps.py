"""Enforcement by traps: both views have a memslot over host memory, and PRIVATE on the view that a page is not in."""

from __future__ import annotations

import errno

import pytest
from pagegate import Convert, PagegateError
from pagegate.testing import Step

from tests.memory_parts import write_side

from .conftest import BIT, MEMORY, Way, assert_one_truth, mapped, way_of

PAGE = 4096
AT = 8 * PAGE
TRAPS = [Way("traps", BIT, selects) for selects in ("shared", "private")]
OTHER = {"private": "shared", "shared": "private"}


@pytest.fixture(params=TRAPS, ids=str)
def way(request) -> Way:
    return request.param


def trapped(vm, fake, gpa) -> set[str]:
    """The views in which an access to this page is a memory fault."""
    return {state for state in OTHER if fake.is_private(way_of(vm).view(gpa, state))}


def test_both_views_have_their_memslot_for_good(make, way) -> None:
    vm, fake = make([], way=way)
    calls = [fake.calls(call) for call in ("create_memslot", "delete_memslot")]
    assert fake.slots == 2
    for page in range(0, 40, 2):
        vm.convert(page * PAGE, PAGE, to="private")
    vm.convert(0, 40 * PAGE, to="shared")
    assert fake.slots == 2
    assert [fake.calls(call) for call in ("create_memslot", "delete_memslot")] == calls
    assert_one_truth(vm, fake)


@pytest.mark.parametrize("to", ["private", "shared"])
def test_the_view_that_is_left_is_trapped_before_the_other_is_opened(make, way, to) -> None:
    vm, fake = make([], way=way, initial=OTHER[to])
    before = fake.calls("set_attributes")
    # The second call of the conversion fails, and so does every undo of the first.
    fake.inject("set_attributes", errno.EIO, after=1, forever=True)
    with pytest.raises(PagegateError, match="EIO.*undo.*EIO"):
        vm.convert(AT, PAGE, to=to)
    assert fake.calls("set_attributes") > before + 1
    assert trapped(vm, fake, AT) == {"private", "shared"}, "no view was ever open together with the other"


@pytest.mark.parametrize("to", ["private", "shared"])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("half_done", [False, True])
def test_each_call_that_fails_is_undone(make, way, to, after, half_done) -> None:
    vm, fake = make([], way=way, initial=OTHER[to])
    before, generation = mapped(vm), vm.attributes.generation
    fake.inject("set_attributes", errno.ENOMEM, after=after, half_done=half_done)
    with pytest.raises(PagegateError, match="ENOMEM.*undone"):
        vm.convert(AT, 4 * PAGE, to=to)
    assert trapped(vm, fake, AT) == trapped(vm, fake, AT + 3 * PAGE) == {to}
    assert (mapped(vm), vm.attributes.generation) == (before, generation)
    assert_one_truth(vm, fake)
    vm.convert(AT, 4 * PAGE, to=to)
    assert_one_truth(vm, fake)


def test_a_page_takes_two_calls(make, way) -> None:
    vm, fake = make([], way=way)
    calls = fake.calls("set_attributes")
    vm.convert(AT, PAGE, to="private")
    assert fake.calls("set_attributes") == calls + 2


@pytest.mark.parametrize("to", ["private", "shared"])
def test_an_access_to_the_other_view_is_executed_again(make, recorder, way, to) -> None:
    policy = recorder()
    vm, fake = make([Step.access(way.view(AT + 8, to), write=True)], way=way, policy=policy)
    vm.convert(AT, PAGE, to=OTHER[to])
    report = vm.run(timeout=10)
    assert (report.reason, report.faults, report.conversions) == ("halt", 1, 1)
    (fault,) = policy.requests
    assert (fault.gpa, fault.private, fault.state) == (AT, to == "private", OTHER[to])
    assert (fault.flags, fault.errno) == (8, errno.EFAULT), "KVM sets the flag for both views"
    assert vm.attributes.state(AT) == to
    assert_one_truth(vm, fake)


# ---- what KVM itself wrote to the side that a page is not in


@pytest.mark.parametrize("to", ["private", "shared"])
def test_leftovers_do_not_appear_when_the_page_comes_to_that_side(make, way, to) -> None:
    vm, _ = make([], way=way, debug_private=True)
    # The fake looks for bytes only where the machine itself has written.
    vm.convert(AT, 2 * PAGE, to=to)
    vm.write(AT, b"x" * 2 * PAGE)
    vm.convert(AT, 2 * PAGE, to=OTHER[to])
    write_side(to, AT, b"emulated")
    vm.convert(AT, 2 * PAGE, to=to)
    assert vm.read(AT, 2 * PAGE) == bytes(2 * PAGE)


@pytest.mark.parametrize("to", ["private", "shared"])
def test_pages_that_are_there_already_keep_their_bytes(make, way, to) -> None:
    vm, _ = make([], way=way, debug_private=True)
    vm.convert(AT, 2 * PAGE, to=to)
    vm.write(AT, b"x" * 2 * PAGE)
    vm.convert(AT, PAGE, to=OTHER[to])
    write_side(to, AT, b"emulated")
    vm.convert(AT, 2 * PAGE, to=to)
    assert vm.read(AT, 2 * PAGE) == bytes(PAGE) + b"x" * PAGE


@pytest.mark.parametrize("to", ["private", "shared"])
def test_bytes_that_were_kept_come_back(make, recorder, way, to) -> None:
    policy = recorder(Convert(discard=False))
    attributes = {"private": 16, "shared": 0}
    script = [Step.hypercall(AT, 1, attributes[state]) for state in (OTHER[to], to)]
    vm, _ = make(script, way=way, policy=policy, debug_private=True)
    vm.convert(AT, PAGE, to=to)
    vm.write(AT, b"kept")
    assert vm.run(timeout=10).conversions == 2
    assert vm.read(AT, 4) == b"kept"


# ---- machines that there are not


@pytest.mark.parametrize("initial", ["private", "shared"])
def test_all_of_memory_starts_in_its_state(make, way, initial) -> None:
    vm, fake = make([], way=way, initial=initial)
    assert trapped(vm, fake, AT) == {OTHER[initial]}
    assert vm.attributes.runs(0, MEMORY - 6 * PAGE) == [(0, MEMORY - 6 * PAGE, initial)]


def test_memory_is_given_in_bounded_calls(make, way) -> None:
    _, fake = make([], way=way, memory=64 << 20)
    assert fake.calls("set_attributes") >= 32
