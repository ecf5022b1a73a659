from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from pagegate import Vm
from pagegate.testing import Fake

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = 64 * 4096
BIT = 40

Pair = tuple[Vm, Fake]
Make = Callable[..., Pair]


@contextlib.contextmanager
def leaves_nothing(seconds: float) -> Iterator[None]:
    """What is done inside leaves no descriptor and no thread, these seconds later at the latest."""

    def number() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    # What was there before may be about to end.
    time.sleep(0.2)
    before = number()
    yield
    end = time.monotonic() + seconds
    while number() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert number() == before


class Way(NamedTuple):
    """A way to enforce page states: the enforcement, and the address bit that selects a view, if there are two."""

    enforcement: str
    bit: int | None = None
    selects: str = "shared"

    @property
    def arguments(self) -> dict[str, Any]:
        """What Vm is given, on a fake from `fake`. Only "traps" has to be named: it is no fake's first choice."""
        bit = {} if self.bit is None else {f"{self.selects}_bit": self.bit}
        return bit | ({"enforcement": "traps"} if self.enforcement == "traps" else {})

    def fake(self, *scripts: list[Any], **kwargs: Any) -> Fake:
        return Fake(*scripts, private_memory=self.enforcement != "memslots", **kwargs)

    def view(self, gpa: int, state: str) -> int:
        """The address of `gpa` in the view of this state; `gpa` itself where there is one view."""
        return gpa if self.bit is None or state != self.selects else gpa | 1 << self.bit

    def __str__(self) -> str:
        return self.enforcement if self.bit is None else f"{self.enforcement}-{self.selects}-bit"


TWO_VIEWS = [
    Way(enforcement, BIT, selects)
    for enforcement in ("attributes", "traps", "memslots")
    for selects in ("shared", "private")
]
WAYS = [Way("attributes"), Way("memslots"), *TWO_VIEWS]

# What the fake KVM has for a page in each state: for its address in the private view the attribute (is it private?) and
# the slot, then the same for the shared view, if there are two. A slot is None if there is none, and True if it has a
# guest_memfd.
ENFORCED = {
    ("attributes", 1): {(True, True): "private", (False, True): "shared"},
    ("attributes", 2): {(True, True, True, False): "private", (True, None, False, False): "shared"},
    ("traps", 2): {(False, False, True, False): "private", (True, False, False, False): "shared"},
    ("memslots", 1): {(False, True): "private", (False, False): "shared"},
    ("memslots", 2): {(False, True, False, None): "private", (False, None, False, False): "shared"},
}


def way_of(vm: Vm) -> Way:
    if vm.private_bit is not None:
        return Way(vm.enforcement, vm.private_bit, "private")
    return Way(vm.enforcement, vm.shared_bit)


def enforced(vm: Vm, fake: Fake, gpa: int) -> Any:
    """The state that the fake KVM enforces for a page, or, if it is neither, the attributes and slots themselves."""
    way = way_of(vm)
    views = [gpa] if way.bit is None else [way.view(gpa, "private"), way.view(gpa, "shared")]
    found = tuple(fact for view in views for fact in (fake.is_private(view), fake.slot_at(view)))
    return ENFORCED[way.enforcement, len(views)].get(found, found)


def mapped(vm: Vm) -> list[str]:
    """Each page's state by the page map."""
    return [state for _, size, state in vm.attributes.runs() for _ in range(size // 4096)]


def assert_one_truth(vm: Vm, fake: Fake) -> None:
    """Checks that KVM enforces for every page the state in the map."""
    assert [enforced(vm, fake, gpa) for gpa in range(0, vm.memory, 4096)] == mapped(vm)


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes machines on the fake, with one vCPU for each script, each started."""
    vms: list[Vm] = []

    def make(
        *scripts: list[Any],
        way: tuple[Any, ...] = ("attributes",),
        memslots: int = 32764,
        cycles: int = 1,
        memory: int = MEMORY,
        **kwargs: Any,
    ) -> Pair:
        way = Way(*way)
        slots = kwargs.pop("divided", 1)
        fake = way.fake(*scripts, memslots=memslots, cycles=cycles)
        arguments = way.arguments | kwargs
        vm = Vm(memory, vcpus=max(1, len(scripts)), hypervisor=fake, memslots=slots, **arguments)
        vms.append(vm)
        assert vm.enforcement == way.enforcement
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=0x1000)
        return vm, fake

    yield make
    for vm in vms:
        vm.close()


def with_state(folder: Path, text: str) -> None:
    """Gives a snapshot another state, with its checksum, which is in what refuses it at first."""
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match="its checksum is") as raised:
        Vm.resume(folder, hypervisor=Fake([], private_memory=False))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["sums"]["state"] = int(str(raised.value).split("its checksum is ")[1][:16], 16)
    (folder / "manifest.json").write_text(json.dumps(manifest))
