"""`Vm.reset_to` without KVM: everything is as it was in the snapshot, however often, and what fails is said."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from pagegate import Convert, NotSupported, PagegateError, Vm, devices
from pagegate.testing import Fake, Step

from tests.modelled import saved

from .conftest import BIT, leaves_nothing
from .test_snapshot import Counting, failure, machine, machines, resumed, that_has_answered  # noqa: F401 - fixtures
from .test_virtio import AVAILABLE, DATA, PAGE, completed, kick, run_until

pytestmark = pytest.mark.userfault

RANDOM = os.urandom(64 * PAGE)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enforcement": "memslots"},
        {"enforcement": "memslots", "private_bit": BIT, "initial": "private", "memslots": 3},
        {"enforcement": "traps", "shared_bit": BIT},
    ],
)
def test_all_is_as_it_was(machine, resumed, tmp_path: Path, kwargs) -> None:  # noqa: F811
    vm = machine([], [], vcpus=2, debug_private=True, **kwargs)
    vm.convert(8 * PAGE, 8 * PAGE, to="private")
    vm.convert(40 * PAGE, 2 * PAGE, to="shared")
    vm.write(0, RANDOM)
    vm.vcpus[1].start(mode="long", rip=0x1000, rsp=0x8000, rbx=77)
    vm.snapshot(tmp_path / "saved")
    states, bytes_then, registers = vm.attributes.runs(), vm.read(0, 1 << 20), vm.vcpus[1].regs()
    again = resumed(tmp_path / "saved", [], [], debug_private=True, lazy=True)
    for _ in range(3):
        again.convert(0, 4 * PAGE, to="private")
        again.convert(10 * PAGE, 40 * PAGE, to="shared")
        again.write(20 * PAGE, b"other")
        again.write(500 * PAGE, b"elsewhere")
        again.vcpus[1].start(mode="protected", rip=0x3000)
        again.vcpus[0].start(mode="protected", rip=0x3000)
        again.reset_to(tmp_path / "saved")
        assert again.attributes.runs() == states
        assert again.memory_usage().missing > 0
        assert again.read(0, 1 << 20) == bytes_then
        assert again.read(500 * PAGE, 9) == bytes(9)
        assert again.vcpus[1].regs() == registers


def test_only_what_was_touched_is_read_again(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = machine(memory=64 << 20)
    vm.write(0, b"x" * (32 << 20))
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", lazy=True)
    for _ in range(3):
        again.write(5 << 20, b"y" * PAGE)
        assert len(again.working_set()) == 1
        again.reset_to(tmp_path / "saved")
        assert (again.working_set(), again.memory_usage().shared) == ([], 0)
        assert again.memory_usage().missing == 32 << 20
        assert again.read(5 << 20, PAGE) == b"x" * PAGE


@settings(max_examples=60, deadline=None)
@given(saved.programs(saved.of_the_host(64)))
def test_random_programs(tmp_path_factory, program) -> None:
    """Accesses, conversions, snapshots, resumes and resets against a model of bytes and states."""

    def resume(folder: Path, lazy: bool) -> Vm:
        return Vm.resume(folder, hypervisor=Fake([], private_memory=False), lazy=lazy, debug_private=True)

    vm = Vm(64 * PAGE, hypervisor=Fake(private_memory=False), shared_bit=BIT, debug_private=True)
    vm.write(0, RANDOM)
    model = saved.Model(RANDOM, ["shared"] * 64)
    saved.play(saved.Player(tmp_path_factory.mktemp("any"), vm, resume, model), program)


def resident() -> int:
    """This process's memory in bytes, with the pages of its machines that are present."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def test_ten_thousand_resets_lose_nothing_and_leave_nothing(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = machine(memory=len(RANDOM))
    vm.write(0, RANDOM)
    vm.snapshot(tmp_path / "saved")
    # Without a log, which would grow until it is full.
    again = resumed(tmp_path / "saved", lazy=True, events=0)

    def reset(times: int) -> None:
        for index in range(times):
            at = index % 63 * PAGE
            # What was written in the round before begins here.
            assert again.read(at, PAGE) == RANDOM[at : at + PAGE]
            again.write(at, b"x" * (PAGE + 8))
            if index % 500 == 0:
                again.write(0, bytes(len(RANDOM)))
            again.reset_to(tmp_path / "saved")
            if index % 500 == 0:
                assert again.read(0, len(RANDOM)) == RANDOM

    reset(600)
    before = resident()
    with leaves_nothing(5):
        reset(10_000)
    # Less than a hundred bytes for each.
    assert resident() - before < 1 << 20
    assert again.read(0, len(RANDOM)) == RANDOM


# ---- devices


def test_a_device_is_as_it_was(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = that_has_answered(machine)
    vm.snapshot(tmp_path / "saved")
    device = Counting()
    steps = [step for _ in range(3) for step in (*kick(), Step.block())]
    again = resumed(tmp_path / "saved", steps, devices=[device], lazy=True)
    for _ in range(3):
        assert (device.count, completed(again)) == (1, [(0, 5)])
        again.write(DATA, b"again")
        again.write(AVAILABLE + 2, b"\2\0\0\0\0\0")
        run_until(again, lambda: len(completed(again)) == 2)
        assert again.read(DATA + PAGE, 5) == b"again"
        again.reset_to(tmp_path / "saved")
        device.seen.clear()
        assert again.read(DATA, 5) == b"hello"


# ---- what fails


def test_what_is_refused_changes_nothing(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = machine(enforcement="memslots", shared_bit=BIT, debug_private=True)
    vm.write(0, RANDOM)
    vm.snapshot(tmp_path / "saved")
    other = machine(memory=8 << 20, enforcement="memslots")
    other.snapshot(tmp_path / "other")
    again = resumed(tmp_path / "saved", lazy=True, debug_private=True)
    again.write(0, b"mine")
    with pytest.raises(ValueError, match="made with other parameters"):
        again.reset_to(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        again.reset_to(tmp_path / "nothing")
    for name in ("private.pages", "state.json", "shared.memory", "private.memory"):
        path = tmp_path / "saved" / name
        data = path.read_bytes()
        path.write_bytes(data + b"x")
        with pytest.raises(ValueError, match=str(tmp_path / "saved")):
            again.reset_to(tmp_path / "saved")
        path.write_bytes(data)
    assert again.read(0, 8) == b"mine" + RANDOM[4:8]
    with pytest.raises(NotSupported, match="only a machine that was resumed lazily"):
        vm.reset_to(tmp_path / "saved")


def test_each_ioctl_may_fail(machine, tmp_path: Path) -> None:  # noqa: F811
    vm = machine([], platform="pc")
    vm.write(0, RANDOM)
    vm.snapshot(tmp_path / "saved")
    fake = Fake([], private_memory=False)
    failed = 0
    with Vm.resume(tmp_path / "saved", hypervisor=fake, lazy=True) as again:
        for after in range(40):
            fake.inject("other", errno.EIO, after=after)
            said = failure(lambda: again.reset_to(tmp_path / "saved"))
            if said is not None and "CPUID" in str(said):
                assert again.read(0, len(RANDOM)) == RANDOM
            elif said is not None:
                failed += 1
                assert "EIO" in str(said)
                with pytest.raises(PagegateError, match="not put back to its snapshot"):
                    again.run(timeout=1)
        # The last of them come later than any call did.
        left = [failure(lambda: again.reset_to(tmp_path / "saved")) for _ in range(40)]
        assert left[-1] is None
        assert again.read(0, len(RANDOM)) == RANDOM
    assert failed > 10


def test_between_runs_only(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    told = []

    class During:
        def map_gpa_range(self, _call):
            with pytest.raises(PagegateError, match="running") as raised:
                again.reset_to(tmp_path / "saved")
            told.append(raised.value)
            return Convert()

    vm = machine([])
    vm.vcpus[0].start(mode="protected")
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", [Step.hypercall(0x1000, 1, 16)], policy=During(), lazy=True)
    again.run(timeout=20)
    assert told
    again.close()
    with pytest.raises(PagegateError, match="closed"):
        again.reset_to(tmp_path / "saved")


def test_a_machine_with_a_pager_of_its_own_is_not_put_back(machine, tmp_path: Path) -> None:  # noqa: F811
    class Pager:
        def missing(self, page):
            return b"p" * page.size

    machine().snapshot(tmp_path / "saved")
    fake = Fake([], private_memory=False)
    with (
        Vm.resume(tmp_path / "saved", hypervisor=fake, pager=Pager()) as again,
        pytest.raises(NotSupported, match="only a machine that was resumed lazily"),
    ):
        again.reset_to(tmp_path / "saved")


def test_a_device_of_another_type_is_refused_before_anything_changes(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    first, second = machine(platform="pc"), machine(platform="pc")
    first.add_device(devices.Rng())
    first.write(0, b"first")
    first.snapshot(tmp_path / "first")
    second.add_device(Counting())
    second.snapshot(tmp_path / "second")
    again = resumed(tmp_path / "first", devices=[devices.Rng()], lazy=True)
    again.write(0x1000, b"mine")
    with pytest.raises(ValueError, match="it is of type"):
        again.reset_to(tmp_path / "second")
    assert (again.read(0, 5), again.read(0x1000, 4)) == (b"first", b"mine")


def test_readers_and_writers_meanwhile(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = machine()
    vm.write(0, RANDOM)
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", lazy=True)
    stop, failed = threading.Event(), []

    def use(page: int) -> None:
        while not stop.is_set():
            try:
                again.write(page * PAGE, b"other")
                seen = again.read(page * PAGE, 2 * PAGE)
                if seen[5:] != RANDOM[page * PAGE + 5 : (page + 2) * PAGE] or seen[:5] not in (
                    b"other",
                    RANDOM[page * PAGE : page * PAGE + 5],
                ):
                    failed.append(page)
            except PagegateError as error:
                failed.append(error)

    # Each has pages of its own.
    threads = [threading.Thread(target=use, args=(4 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            again.reset_to(tmp_path / "saved")
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)
    again.reset_to(tmp_path / "saved")
    assert again.read(0, len(RANDOM)) == RANDOM
