"""`Vm.resume(lazy=True)` without KVM: a page's bytes come when it is touched, once, and what fails is said."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagegate import NotSupported, PagegateError, PrivateMemoryError, Vm, devices
from pagegate.testing import Fake, Step

from .conftest import BIT, leaves_nothing
from .test_snapshot import FILES, MEMORY, Counting, _write_to, machine, machines, resumed, that_has_answered  # noqa: F401
from .test_virtio import AVAILABLE, DATA, DESCRIPTORS, PAGE, completed, kick, run_until

pytestmark = pytest.mark.userfault

NOBODY = 65534
RANDOM = os.urandom(1 << 20)


@pytest.fixture
def saved(machine, tmp_path: Path) -> Path:  # noqa: F811
    """A snapshot with a MiB of bytes at 1 MiB, of whose pages the 16th to the 31st are private."""
    vm = machine(enforcement="memslots", shared_bit=BIT, debug_private=True)
    vm.convert((1 << 20) + 16 * PAGE, 16 * PAGE, to="private")
    vm.write(1 << 20, RANDOM)
    vm.snapshot(tmp_path / "saved")
    return tmp_path / "saved"


def test_what_nobody_touches_is_not_read(saved, resumed) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True)
    assert (vm.memory_usage().missing, vm.memory_usage().shared, vm.working_set()) == (1 << 20, 0, [])
    assert vm.read(0, 4 * PAGE) == bytes(4 * PAGE)
    assert (vm.memory_usage().missing, vm.working_set()) == (1 << 20, [])
    assert vm.read((1 << 20) + 5, 100) == RANDOM[5:105]
    [page] = vm.working_set()
    assert (page.gpa, page.state, page.by, page.vcpu) == (1 << 20, "shared", "host", None)
    # With pages around it, as far as they are on the same side.
    assert page.size == 16 * PAGE
    assert vm.memory_usage().missing == (1 << 20) - page.size
    vm.read((1 << 20) + 3 * PAGE, PAGE)
    assert len(vm.working_set()) == 1


def test_the_seal_holds_without_asking(saved, resumed) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True)
    with pytest.raises(PrivateMemoryError):
        vm.read((1 << 20) + 16 * PAGE, 1)
    assert vm.working_set() == []


def test_a_page_that_is_discarded_is_zeroes_and_not_read(saved, resumed) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True, debug_private=True)
    vm.convert(1 << 20, 4 * PAGE, to="private")
    vm.convert((1 << 20) + 16 * PAGE, 2 * PAGE, to="shared")
    assert vm.memory_usage().missing == (1 << 20) - 6 * PAGE
    assert vm.read(1 << 20, 5 * PAGE) == bytes(4 * PAGE) + RANDOM[4 * PAGE : 5 * PAGE]
    assert (
        vm.read((1 << 20) + 15 * PAGE, 4 * PAGE)
        == RANDOM[15 * PAGE : 16 * PAGE] + bytes(2 * PAGE) + RANDOM[18 * PAGE : 19 * PAGE]
    )
    assert [(page.gpa - (1 << 20)) // PAGE for page in vm.working_set()] == [4, 18]


def test_a_write_keeps_the_rest_of_the_page(saved, resumed) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True)
    vm.write((1 << 20) + 10, b"mine")
    assert vm.read(1 << 20, PAGE) == RANDOM[:10] + b"mine" + RANDOM[14:PAGE]


def test_what_has_been_read_is_put_aside_with_what_has_not(saved, resumed, tmp_path) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True, debug_private=True)
    vm.write((1 << 20) + 40 * PAGE, b"new")
    vm.convert((1 << 20) + 50 * PAGE, PAGE, to="private")
    vm.snapshot(tmp_path / "second")
    expected = bytearray(RANDOM)
    expected[40 * PAGE : 40 * PAGE + 3] = b"new"
    expected[50 * PAGE : 51 * PAGE] = bytes(PAGE)
    for lazy in (True, False):
        again = resumed(tmp_path / "second", lazy=lazy, debug_private=True)
        assert again.read(1 << 20, 1 << 20) == expected
        assert again.read(0, 1 << 20) == bytes(1 << 20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8), st.sampled_from(["private", "shared"])), max_size=8),
    st.lists(st.tuples(st.integers(0, 64 * PAGE - 1), st.binary(min_size=1, max_size=2 * PAGE)), max_size=6),
    st.lists(
        st.one_of(
            st.tuples(st.just("convert"), st.integers(0, 63), st.sampled_from(["private", "shared"])),
            st.tuples(st.just("write"), st.integers(0, 64 * PAGE - 40), st.binary(min_size=1, max_size=40)),
            st.tuples(st.just("read"), st.integers(0, 64 * PAGE - 40), st.integers(1, 40)),
            st.tuples(st.just("again"), st.booleans(), st.none()),
        ),
        max_size=20,
    ),
)
def test_random_programs(tmp_path_factory, conversions, writes, program) -> None:
    """A machine that was resumed lazily, again and again, has the bytes and states of a model."""
    folder = tmp_path_factory.mktemp("any")
    with Vm(64 * PAGE, hypervisor=Fake(private_memory=False), shared_bit=BIT, debug_private=True) as vm:
        for page, pages, to in conversions:
            vm.convert(page * PAGE, min(pages, 64 - page) * PAGE, to=to)
        for gpa, data in writes:
            vm.write(gpa, data[: 64 * PAGE - gpa])
        vm.snapshot(folder / "0")
        model = bytearray(vm.read(0, 64 * PAGE))
        states = ["private" if vm.attributes.is_private(page * PAGE) else "shared" for page in range(64)]
    number = 0

    def again(lazy: bool) -> Vm:
        fake = Fake(private_memory=False)
        return Vm.resume(folder / str(number), hypervisor=fake, lazy=lazy, debug_private=True)

    vm = again(lazy=True)
    try:
        for what, at, value in program:
            if what == "convert":
                if states[at] != value:
                    model[at * PAGE : (at + 1) * PAGE] = bytes(PAGE)
                    states[at] = value
                vm.convert(at * PAGE, PAGE, to=value)
            elif what == "write":
                vm.write(at, value)
                model[at : at + len(value)] = value
            elif what == "read":
                assert vm.read(at, value) == model[at : at + value]
            else:
                number += 1
                vm.snapshot(folder / str(number))
                vm.close()
                vm = again(lazy=at)
        assert vm.read(0, 64 * PAGE) == model
        assert [vm.attributes.is_private(page * PAGE) for page in range(64)] == [state == "private" for state in states]
        assert vm.memory_usage().missing == 0
    finally:
        vm.close()


def test_threads_that_touch_the_same_page_have_it_read_once(saved, resumed) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True, debug_private=True)
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(vm.read(1 << 20, 1 << 20))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert read == [RANDOM] * 6
    assert sum(page.size for page in vm.working_set()) == 1 << 20


# ---- devices


def test_a_device_reads_a_missing_page(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = that_has_answered(machine)
    vm.write(DATA + 2 * PAGE, RANDOM)
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", [*kick(), Step.block()], devices=[Counting()], lazy=True)
    again.write(AVAILABLE + 2, b"\2\0\0\0\0\0")
    again.vcpus[0].regs()
    run_until(again, lambda: len(completed(again)) == 2)
    assert again.read(DATA + PAGE, 5) == b"hello"
    assert "device" in {page.by for page in again.working_set()}
    assert again.read(DATA + 2 * PAGE, 1 << 20) == RANDOM


def test_what_a_device_cannot_have_ends_the_run(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = that_has_answered(machine)
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", [*kick(), Step.block()], devices=[Counting()], lazy=True)
    again.read(DESCRIPTORS, 3 * PAGE)
    again.write(AVAILABLE + 2, b"\2\0\0\0\0\0")
    os.truncate(tmp_path / "saved" / "shared.memory", PAGE)
    with pytest.raises(
        PagegateError, match=rf"page {DATA:#x} has no bytes yet, a device touched it.*shared\.memory"
    ) as raised:
        again.run(timeout=30)
    assert raised.value.gpa == DATA


# ---- failures


def test_a_file_that_is_cut_off_is_named(saved, resumed) -> None:  # noqa: F811
    vm = resumed(saved, lazy=True)
    os.truncate(saved / "shared.memory", (1 << 20) + 34 * PAGE)
    # Without what was to be read ahead.
    assert vm.read((1 << 20) + 33 * PAGE, PAGE) == RANDOM[33 * PAGE : 34 * PAGE]
    with pytest.raises(
        PagegateError, match=rf"{(1 << 20) + 40 * PAGE:#x}.*the host touched it.*shared\.memory.*EIO"
    ) as raised:
        vm.read((1 << 20) + 40 * PAGE, 1)
    assert (raised.value.gpa, raised.value.vcpu) == ((1 << 20) + 40 * PAGE, None)
    # Others are there, and it is asked again.
    assert vm.read(1 << 20, PAGE) == RANDOM[:PAGE]
    with (saved / "shared.memory").open("r+b") as file:
        file.seek((1 << 20) + 32 * PAGE)
        file.write(RANDOM[32 * PAGE :])
        file.truncate(MEMORY)
    assert vm.read((1 << 20) + 40 * PAGE, PAGE) == RANDOM[40 * PAGE : 41 * PAGE]
    os.truncate(saved / "shared.memory", PAGE)
    with pytest.raises(PagegateError, match="no bytes yet"):
        vm.snapshot(saved.with_name("other"))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["saved"]


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("harm", ["cut", "remove", "longer", "pipe"])
def test_a_damaged_folder_is_refused(saved, resumed, name, harm) -> None:  # noqa: F811
    path = saved / name
    data = path.read_bytes()
    path.unlink()
    if harm == "pipe":
        os.mkfifo(path)
        threading.Timer(0.5, lambda: _write_to(path)).start()
    elif harm != "remove":
        path.write_bytes(data[:-1] if harm == "cut" else data + b"x")
    told = saved / "manifest.json"
    fake = Fake(private_memory=False)
    with pytest.raises((ValueError, OSError)) as raised:
        Vm.resume(saved, hypervisor=fake, lazy=True)
    assert str(saved) in (getattr(raised.value, "filename", None) or str(raised.value)), told


def test_without_the_right_to_userfaultfd_it_says_what_to_do(saved) -> None:
    everybody = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text(encoding="utf-8") == "1\n"
    if everybody or os.getuid() != 0:
        pytest.skip("needs root, to give its rights up, and a kernel that gives it to nobody else")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(saved, folder / "saved")
        for path in (folder / "saved", *(folder / "saved").iterdir()):
            os.chown(path, NOBODY, NOBODY)
        fake = Fake(private_memory=False)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(NotSupported, match=r"EPERM: be root, .*vm\.unprivileged_userfaultfd"):
                Vm.resume(folder / "saved", hypervisor=fake, lazy=True)
        finally:
            os.seteuid(0)


def test_a_thousand_machines_leave_nothing(saved) -> None:
    with Vm.resume(saved, hypervisor=Fake(private_memory=False), lazy=True):
        pass
    with leaves_nothing(10):
        for index in range(1000):
            vm = Vm.resume(saved, hypervisor=Fake(private_memory=False), lazy=True)
            if index % 2:
                vm.read(1 << 20, 2 * PAGE)
            if index % 3:
                vm.close()
            del vm


def test_a_disk_that_was_given_goes_on(machine, resumed, tmp_path: Path) -> None:  # noqa: F811
    vm = machine(platform="pc")
    vm.add_device(devices.Rng())
    vm.write(0x5000, b"one")
    vm.snapshot(tmp_path / "saved")
    first = resumed(tmp_path / "saved", devices=[devices.Rng()], lazy=True)
    second = resumed(tmp_path / "saved", devices=[devices.Rng()], lazy=True)
    first.write(0x5000, b"two")
    assert (first.read(0x5000, 3), second.read(0x5000, 3)) == (b"two", b"one")
