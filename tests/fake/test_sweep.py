"""Every call that a machine makes of the kernel fails in turn, at every step and with every errno that it can give.

Afterwards the map, the fake KVM and the listeners agree, or the error says that what KVM enforces is unknown.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from pagegate import Convert, PagegateError, Vm
from pagegate.testing import Fake, Step

from tests import boot_parts

from .conftest import MEMORY, WAYS, Way, assert_one_truth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PAGE = 4096
AT = 8 * PAGE
ERRNOS = [errno.ENOMEM, errno.EINVAL, errno.EFAULT, errno.EEXIST, errno.EINTR, errno.EAGAIN, errno.ENOSPC, errno.E2BIG]
MOST_CALLS = 400


class Map:
    """A listener that keeps the states that it was told."""

    def __init__(self) -> None:
        self.pages: dict[int, str] = {}

    def prepare(self, change: object) -> bool:
        return True

    def committed(self, change) -> None:
        for page in range(change.gpa, change.gpa + change.size, PAGE):
            self.pages[page] = change.to

    def aborted(self, change: object) -> None:
        pass


class Widens:
    """A Python policy: what is touched becomes shared with its neighbours."""

    def memory_fault(self, fault) -> Convert:
        return Convert(gpa=fault.gpa & ~(4 * PAGE - 1), size=4 * PAGE)


def guest(way: Way) -> list[Step]:
    asks = [
        Step.hypercall(AT, 4, 16),
        Step.hypercall(AT + PAGE, 2, 0),
        Step.doorbell(AT, 8, 16),
        Step.hypercall(AT, 8, 0),
    ]
    if way.bit is None:
        return asks
    touches = [
        Step.access(way.view(AT, "private"), write=True),
        Step.access(way.view(AT, "shared")),
        Step.access(way.view(AT + 5 * PAGE, "private")),
    ]
    return [*asks, *touches]


def failing(
    work: Callable[[Fake], object], make: Callable[[], Fake], *, forever: bool = False
) -> Iterator[tuple[Fake, object, int, int]]:
    """Does the work with each of its calls failing in turn, `forever` with all later ones; yields what it came to."""
    fake = make()
    work(fake)
    total = fake.calls("any")
    assert 0 < total < MOST_CALLS
    for number in range(total):
        for code in ERRNOS if number % 4 == 0 else ERRNOS[:2]:
            fake = make()
            fake.inject("any", code, after=number, forever=forever)
            try:
                yield fake, work(fake), number, code
            except (PagegateError, OSError) as error:
                yield fake, error, number, code


def says_what_is_unknown(said: object) -> bool:
    return isinstance(said, PagegateError) and "is unknown" in str(said)


@pytest.mark.parametrize("forever", [False, True], ids=["one", "all-later-ones"])
@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_conversions_at_every_call(way: Way, listens: bool, forever: bool) -> None:
    def work(fake: Fake) -> object:
        nonlocal vm, listener
        vm = None
        vm = Vm(MEMORY, hypervisor=fake, policy=Widens(), **way.arguments)
        listener = Map()
        if listens:
            vm.add_listener(listener)
        vm.convert(AT + 16 * PAGE, 8 * PAGE, to="private")
        vm.convert(AT + 18 * PAGE, 2 * PAGE, to="shared")
        vm.load(b"code", at=0x1000)
        vm.vcpus[0].start(rip=0x1000)
        return vm.run(timeout=20)

    vm: Vm | None = None
    listener = Map()
    outcomes: set[str] = set()
    for fake, said, number, code in failing(work, lambda: way.fake(guest(way)), forever=forever):
        where = f"call {number}, {errno.errorcode[code]}: {said}"
        outcomes.add(type(said).__name__)
        if vm is None:
            assert isinstance(said, PagegateError | OSError), where
            assert errno.errorcode[code] in str(said), where
            continue
        if not says_what_is_unknown(said):
            assert_one_truth(vm, fake)
            if listens and listener.pages:
                runs = {page: to for gpa, size, to in vm.attributes.runs() for page in range(gpa, gpa + size, PAGE)}
                assert listener.pages == runs, where
        vm.close()
    assert "Report" in outcomes or "PagegateError" in outcomes


@pytest.mark.parametrize("confidential", [None, "sev"])
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
def test_a_boot_at_every_call(tmp_path: Path, confidential: str | None, enforcement: str) -> None:
    kernel = boot_parts.write_kernel(tmp_path)
    if confidential and enforcement == "memslots":
        pytest.skip("starts the vmlinux inside, which this kernel has not")
    steps = boot_parts.GUESTS["asks" if confidential else "powers off"]
    made = 0

    def work(fake: Fake) -> object:
        nonlocal made
        enforced = {"enforcement": enforcement} if confidential else {}
        with Vm(64 << 20, vcpus=2, platform="pc", confidential=confidential, hypervisor=fake, **enforced) as vm:
            made += 1
            vm.boot(kernel)
            return vm.run(timeout=20).reason

    for _, said, number, code in failing(work, lambda: Fake(steps, [], private_memory=enforcement == "traps")):
        assert said in ("poweroff", "timeout") or isinstance(said, PagegateError | OSError), f"call {number}: {said}"
        if isinstance(said, PagegateError):
            assert errno.errorcode[code] in str(said) or "refused" in str(said), f"call {number}: {said}"
    assert made > 10
