"""A request that is carried out in parts, a later of which fails: what was done stays, and everybody is told."""

from __future__ import annotations

import errno

import pytest
from pagegate import Convert, PagegateError
from pagegate.testing import Step

from .conftest import TWO_VIEWS, WAYS

PAGE = 4096
PART = 256 << 20
MEMORY = 2 * PART
PRIVATE = 16
ASK = Step.hypercall(0, MEMORY // PAGE, PRIVATE)
STAYS = r"\[0x0, 0x10000000\) has been converted and stays so, 0x10000000 bytes of it changed"


@pytest.fixture(params=WAYS, ids=str)
def call(request, make):
    """A way, a call that each part makes there, and how many of them the first part makes."""
    way = request.param
    name = "create_memslot" if way.enforcement == "memslots" else "set_attributes"
    vm, fake = make([], way=way, memory=MEMORY)
    before = fake.calls(name)
    vm.convert(0, PART, to="private")
    return way, name, fake.calls(name) - before


def states(vm) -> list[bool]:
    return [vm.attributes.is_private(gpa) for gpa in (0, PART - PAGE, PART, MEMORY - PAGE)]


def done(event) -> tuple[int, int, int]:
    return event.done_gpa, event.done_size, event.changed


def test_an_explicit_request_gets_eagain_and_then_the_rest(make, call) -> None:
    way, name, first = call
    vm, fake = make([ASK, ASK], way=way, memory=MEMORY)
    fake.inject(name, errno.ENOMEM, after=first)
    report = vm.run(timeout=30)
    assert [reply.value for reply in fake.replies()] == [errno.EAGAIN, 0]
    assert [(event.outcome, event.errno, *done(event)) for event in vm.events] == [
        ("retried", errno.EAGAIN, 0, PART, PART),
        ("converted", 0, 0, MEMORY, PART),
    ]
    assert (report.bytes_to_private, report.retries, report.conversions) == (MEMORY, 1, 1)
    assert states(vm) == [True] * 4


def test_a_guest_that_asks_again_in_vain_gets_the_errno(make, call) -> None:
    way, name, first = call
    vm, fake = make([ASK, Step.io_write(0x80, b"x"), ASK], way=way, memory=MEMORY)
    vm.on_io(0x80, lambda io: fake.inject(name, errno.ENOMEM))
    fake.inject(name, errno.ENOMEM, after=first)
    report = vm.run(timeout=30)
    assert [reply.value for reply in fake.replies() if reply.step != 1] == [errno.EAGAIN, errno.ENOMEM]
    assert [(event.outcome, *done(event)) for event in vm.events] == [("retried", 0, PART, PART), ("failed", 0, 0, 0)]
    assert report.bytes_to_private == PART
    assert states(vm) == [True, True, False, False]


def test_the_host_is_told_by_the_exception(make, call) -> None:
    way, name, first = call
    vm, fake = make([], way=way, memory=MEMORY)
    fake.inject(name, errno.ENOMEM, after=first)
    with pytest.raises(PagegateError, match=r"\[0x10000000, 0x20000000\) failed with .*undone; " + STAYS):
        vm.convert(0, MEMORY, to="private")
    assert vm.attributes.private_bytes == PART
    assert states(vm) == [True, True, False, False]


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_an_implicit_request_ends_the_run_with_what_was_done(make, recorder, way) -> None:
    name = "create_memslot" if way.enforcement == "memslots" else "set_attributes"
    counting, fake = make([], way=way, memory=MEMORY)
    before = fake.calls(name)
    counting.convert(0, PART, to="private")
    first = fake.calls(name) - before
    policy = recorder(Convert(gpa=0, size=MEMORY))
    vm, fake = make([Step.access(way.view(PAGE, "private"), write=False)], way=way, memory=MEMORY, policy=policy)
    fake.inject(name, errno.ENOMEM, after=first)
    with pytest.raises(PagegateError, match=STAYS):
        vm.run(timeout=30)
    assert [(event.outcome, *done(event)) for event in vm.events] == [("failed", 0, PART, PART)]
    assert vm.run(timeout=30).reason == "halt"
    assert len(policy.requests) == 1, "the page that was touched had been converted"


class Nth:
    """A listener that fails in the nth call of a method, or refuses."""

    def __init__(self, method: str, number: int, answer: Exception | bool) -> None:
        self.left, self.answer = number, answer
        setattr(self, method, self._call)

    def _call(self, change) -> bool:
        if change.initial:
            return True
        self.left -= 1
        if self.left:
            return True
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("method", "number", "size"), [("prepare", 2, PART), ("committed", 1, PART), ("committed", 2, MEMORY)]
)
def test_a_listener_that_fails_in_a_later_part(make, way, method, number, size) -> None:
    vm, fake = make([ASK], way=way, memory=MEMORY)
    vm.add_listener(Nth(method, number, ValueError("no")))
    with pytest.raises(ValueError, match="no") as caught:
        vm.run(timeout=30)
    assert f"[0x0, {size:#x}) has been converted and stays so, {size:#x} bytes of it changed" in caught.value.__notes__
    assert [(event.outcome, *done(event)) for event in vm.events] == [("failed", 0, size, size)]
    assert fake.replies() == []
    assert vm.attributes.private_bytes == size


def test_a_listener_of_the_host_that_fails_in_a_later_part(make, way) -> None:
    vm, _ = make([], way=way, memory=MEMORY)
    vm.add_listener(Nth("prepare", 2, ValueError("no")))
    with pytest.raises(ValueError, match="no") as caught:
        vm.convert(0, MEMORY, to="private")
    (note,) = caught.value.__notes__
    assert note.startswith("[0x0, 0x10000000) has been converted and stays so")


def test_a_listener_that_refuses_a_later_part(make, way) -> None:
    vm, fake = make([ASK], way=way, memory=MEMORY)
    vm.add_listener(Nth("prepare", 2, False))
    report = vm.run(timeout=30)
    assert [reply.value for reply in fake.replies()] == [errno.EAGAIN]
    assert [(event.outcome, *done(event)) for event in vm.events] == [("retried", 0, PART, PART)]
    assert (report.bytes_to_private, report.retries) == (PART, 1)


def test_a_discard_that_fails_is_recorded_as_done(make, way) -> None:
    vm, fake = make([Step.hypercall(8 * PAGE, 2, PRIVATE)], way=way)
    vm.write(8 * PAGE, b"x")
    fake.inject("discard", errno.EIO)
    with pytest.raises(PagegateError, match=r"discarding its old side failed .*; \[0x8000, 0xa000\) has been"):
        vm.run(timeout=10)
    assert [(event.outcome, *done(event)) for event in vm.events] == [("failed", 8 * PAGE, 2 * PAGE, 2 * PAGE)]
    assert vm.attributes.private_bytes == 2 * PAGE
