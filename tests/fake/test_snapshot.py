"""`Vm.snapshot` and `Vm.resume` without KVM: what a folder has, and every way in which one is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pagegate import Convert, NotSupported, PagegateError, Stop, Vm, devices, policies
from pagegate.testing import Fake, Step

from tests.boot_parts import write_kernel
from tests.linux_parts import largest_file

from .conftest import BIT
from .test_virtio import AVAILABLE, DATA, PAGE, WRITE, Echo, answered, chain, completed, kick, ready, run_until

MEMORY = 16 << 20
if TYPE_CHECKING:
    from pathlib import Path

FILES = {"manifest.json", "state.json", "shared.memory", "private.memory", "private.pages"}


@pytest.fixture
def machines():
    """A list of machines, which are closed in the end."""
    made: list[Vm] = []
    yield made
    for vm in made:
        vm.close()


@pytest.fixture
def machine(machines):
    """Makes a machine on the fake."""

    def machine(*scripts, hypervisor=None, **kwargs):
        # Without attributes a guest_memfd can be mapped.
        private = kwargs.get("enforcement") == "traps" or kwargs.get("confidential") is not None
        fake = hypervisor or Fake(*map(list, scripts), private_memory=private)
        vm = Vm(kwargs.pop("memory", MEMORY), hypervisor=fake, **kwargs)
        machines.append(vm)
        return vm

    return machine


@pytest.fixture
def resumed(machines):
    """Resumes a machine on the fake."""

    def resumed(folder, *scripts, **kwargs):
        told = json.loads((folder / "manifest.json").read_bytes())
        fake = Fake(*map(list, scripts), private_memory=told["machine"]["enforcement"] == "traps")
        vm = Vm.resume(folder, hypervisor=fake, **kwargs)
        machines.append(vm)
        return vm

    return resumed


# ---- what comes back


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enforcement": "memslots"},
        {"enforcement": "memslots", "shared_bit": BIT},
        {"enforcement": "memslots", "private_bit": BIT, "initial": "private", "memslots": 3},
        {"enforcement": "traps", "shared_bit": BIT},
        {"platform": "pc", "confidential": "sev"},
        {"platform": "pc", "confidential": "sev", "memory": 4 << 30, "vcpus": 2},
    ],
)
def test_memory_and_states_come_back(machine, resumed, tmp_path: Path, kwargs) -> None:
    vm = machine(debug_private=True, **kwargs)
    vm.convert(2 * PAGE, 3 * PAGE, to="private")
    vm.convert(64 * PAGE, PAGE, to="shared")
    high = vm.ram[-1][0] + PAGE
    for gpa in (0, 3 * PAGE + 5, 64 * PAGE - 2, high):
        vm.write(gpa, os.urandom(100))
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", debug_private=True)
    assert again.attributes.runs() == vm.attributes.runs()
    for gpa, size in vm.ram:
        for at in range(gpa, min(gpa + size, gpa + MEMORY), 1 << 20):
            assert again.read(at, 1 << 20) == vm.read(at, 1 << 20)
    told = ("memory", "ram", "platform", "confidential", "enforcement", "shared_bit", "private_bit")
    assert [getattr(again, name) for name in told] == [getattr(vm, name) for name in told]
    assert len(again.vcpus) == len(vm.vcpus)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(1, 40), st.sampled_from(["private", "shared"])), max_size=12),
    st.lists(st.tuples(st.integers(0, 255 * PAGE), st.binary(min_size=1, max_size=2 * PAGE)), max_size=8),
)
def test_any_states_and_bytes_come_back(tmp_path_factory, conversions, writes) -> None:
    folder = tmp_path_factory.mktemp("any") / "saved"
    fakes = (Fake(private_memory=False) for _ in range(2))
    with Vm(256 * PAGE, hypervisor=next(fakes), shared_bit=BIT, debug_private=True) as vm:
        for page, pages, to in conversions:
            vm.convert(page * PAGE, min(pages, 256 - page) * PAGE, to=to)
        for gpa, data in writes:
            vm.write(gpa, data[: 256 * PAGE - gpa])
        vm.snapshot(folder)
        with Vm.resume(folder, hypervisor=next(fakes), debug_private=True) as again:
            assert again.attributes.runs() == vm.attributes.runs()
            assert again.read(0, 256 * PAGE) == vm.read(0, 256 * PAGE)


def test_registers_come_back_and_the_machine_goes_on(machine, resumed, tmp_path: Path) -> None:
    vm = machine([], [], vcpus=2)
    vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000, rbx=77)
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved", [Step.access(0x3000, write=True)], [])
    assert again.vcpus[0].regs() == vm.vcpus[0].regs()
    assert again.vcpus[0].sregs() == vm.vcpus[0].sregs()
    # The second one was not started, and is not now.
    assert again.run(timeout=20).reason == "halt"


def test_what_was_kept_on_the_old_side_is_kept(machine, resumed, tmp_path: Path) -> None:
    """A conversion with discard=False leaves the old side's bytes, and they are there after the way back."""

    class Keep:
        def memory_fault(self, _fault):
            return Convert(discard=False)

    vm = machine([Step.access(0x3000)], policy=Keep(), shared_bit=BIT, enforcement="memslots", debug_private=True)
    vm.write(0x3000, b"before")
    vm.vcpus[0].start(mode="long", rip=0x1000)
    assert vm.run(timeout=20).conversions == 1
    vm.snapshot(tmp_path / "saved")
    assert (tmp_path / "saved" / "shared.memory").read_bytes()[0x3000:0x3006] == b"before"
    assert resumed(tmp_path / "saved").attributes.is_private(0x3000)


def test_any_number_of_machines_go_on(machine, resumed, tmp_path: Path) -> None:
    vm = machine()
    vm.write(0x5000, b"one")
    vm.snapshot(tmp_path / "saved")
    first, second = resumed(tmp_path / "saved"), resumed(tmp_path / "saved")
    first.write(0x5000, b"two")
    assert (first.read(0x5000, 3), second.read(0x5000, 3), vm.read(0x5000, 3)) == (b"two", b"one", b"one")
    first.snapshot(tmp_path / "again")
    assert resumed(tmp_path / "again").read(0x5000, 3) == b"two"


# ---- the folder


def test_only_its_owner_can_read_it_and_zeroes_take_no_room(machine, tmp_path: Path) -> None:
    vm = machine(memory=1 << 30)
    vm.write(512 << 20, b"x")
    vm.snapshot(tmp_path / "saved")
    folder = tmp_path / "saved"
    assert {path.name for path in folder.iterdir()} == FILES
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 1 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_that_is_there_is_not_touched(machine, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    with pytest.raises(FileExistsError) as raised:
        machine().snapshot(tmp_path / "saved")
    assert raised.value.filename == str(tmp_path / "saved")
    with pytest.raises(FileNotFoundError):
        machine().snapshot(tmp_path / "missing" / "saved")
    with pytest.raises(ValueError, match="name"):
        machine().snapshot(tmp_path / "..")
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_full_disk_leaves_nothing(machine, tmp_path: Path) -> None:
    vm = machine()
    vm.write(0, os.urandom(1 << 20))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with largest_file(64 << 10), pytest.raises(OSError, match="large") as raised:
            vm.snapshot(tmp_path / "saved")
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert (raised.value.errno, list(tmp_path.iterdir())) == (errno.EFBIG, [])
    vm.snapshot(tmp_path / "saved")


def test_killed_while_it_is_written_it_is_not_there(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import os, sys
        from pagegate import Vm
        from pagegate.testing import Fake
        vm = Vm(1 << 30, hypervisor=Fake(private_memory=False))
        for at in range(0, 256 << 20, 1 << 20):
            vm.write(at, os.urandom(1 << 20))
        print("ready", flush=True)
        vm.snapshot({str(tmp_path / "saved")!r})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    end = time.monotonic() + 30
    while time.monotonic() < end and not any(tmp_path.glob(".saved.*/shared.memory")):
        time.sleep(0.001)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    process.stdout.close()
    assert [path.name[:7] for path in tmp_path.iterdir()] == [".saved."]
    with pytest.raises(FileNotFoundError):
        Vm.resume(tmp_path / "saved", hypervisor=Fake(private_memory=False))


def test_each_ioctl_may_fail(machine, machines, tmp_path: Path) -> None:
    vm = machine([], platform="pc")
    vm.snapshot(tmp_path / "saved")
    failures = []
    for after in range(40):
        fake = Fake([], private_memory=False)
        other = machine(hypervisor=fake, platform="pc")
        fake.inject("other", errno.EIO, after=after)
        failures.append(failure(lambda other=other: other.snapshot(tmp_path / "other")))
        # A single MSR that cannot be read is one that the vCPU does not have.
        if failures[-1] is None:
            (tmp_path / "other").rename(tmp_path / f"other{after}")
        assert not list(tmp_path.glob(".*"))
        fake = Fake([], private_memory=False)
        fake.inject("other", errno.EIO, after=after)
        failures.append(failure(lambda fake=fake: machines.append(Vm.resume(tmp_path / "saved", hypervisor=fake))))
    told = [str(error) for error in failures if error is not None]
    assert len(told) > 20
    assert all("EIO" in text or "errno 5" in text or "Input/output" in text for text in told), told
    # As many calls as each makes, and then none fails.
    assert failures[-2:] == [None, None]


def failure(call) -> PagegateError | None:
    try:
        call()
    except PagegateError as error:
        return error
    return None


# ---- what is refused


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "pipe", "folder", "longer"])
def test_a_damaged_file_is_named(machine, tmp_path: Path, name: str, harm: str) -> None:
    vm = machine(enforcement="memslots", shared_bit=BIT, debug_private=True)
    vm.convert(0, 16 * PAGE, to="private")
    vm.write(0, os.urandom(32 * PAGE))
    vm.snapshot(tmp_path / "saved")
    path = tmp_path / "saved" / name
    data = bytearray(path.read_bytes())
    at = next(at for at, byte in enumerate(data) if byte)
    path.unlink()
    if harm == "flip":
        data[at] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "longer":
        path.write_bytes(data + b"x")
    elif harm == "pipe":
        os.mkfifo(path)
    elif harm == "folder":
        path.mkdir()
    threading.Timer(0.5, lambda: harm == "pipe" and _write_to(path)).start()
    with pytest.raises((ValueError, OSError)) as raised:
        Vm.resume(tmp_path / "saved", hypervisor=Fake(private_memory=False))
    named = getattr(raised.value, "filename", None) or str(raised.value)
    assert str(tmp_path / "saved") in named


def _write_to(path: Path) -> None:
    """Ends a wait for a pipe's writer."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda told: told.update(format=2), NotSupported, "format 2.*reads format 1"),
        (lambda told: told["machine"].update(platform="mac"), NotSupported, "platform is .mac."),
        (lambda told: told["machine"].update(enforcement="hope"), NotSupported, "enforcement is .hope."),
        (lambda told: told["machine"].update(memory=1 << 60), ValueError, "memory"),
        (lambda told: told["machine"].update(memory=8 << 20), ValueError, "damaged"),
        (lambda told: told["machine"].update(vcpus=2), ValueError, "damaged.*another machine"),
        (lambda told: told["machine"].update(platform="pc"), ValueError, "damaged.*another machine"),
        (lambda told: told.pop("sums") and None, ValueError, r"manifest\.json: it is damaged: missing field"),
    ],
)
def test_a_manifest_that_says_something_else(machine, tmp_path: Path, change, error, said) -> None:
    machine().snapshot(tmp_path / "saved")
    path = tmp_path / "saved" / "manifest.json"
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps(change(told) or told))
    with pytest.raises(error, match=said):
        Vm.resume(tmp_path / "saved", hypervisor=Fake(private_memory=False))


def test_no_snapshot_at_all(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json: it is damaged"):
        Vm.resume(tmp_path, hypervisor=Fake(private_memory=False))
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Vm.resume(tmp_path / "missing", hypervisor=Fake(private_memory=False))


def test_a_guest_memfd_cannot_be_put_aside(machine, tmp_path: Path) -> None:
    vm = machine(enforcement="attributes", hypervisor=Fake())
    with pytest.raises(NotSupported, match="guest_memfd that the host can neither read nor fill"):
        vm.snapshot(tmp_path / "saved")


def test_a_machine_that_runs_cannot(machine, tmp_path: Path) -> None:
    told = []

    class During:
        def map_gpa_range(self, _call):
            with pytest.raises(PagegateError, match="running") as raised:
                vm.snapshot(tmp_path / "saved")
            told.append(raised.value)
            return Convert()

    vm = machine([Step.hypercall(0x1000, 1, 16)], policy=During())
    vm.vcpus[0].start(mode="protected")
    vm.run(timeout=20)
    assert told
    vm.close()
    with pytest.raises(PagegateError, match="closed"):
        vm.snapshot(tmp_path / "saved")


def test_a_store_that_was_not_answered(machine, tmp_path: Path) -> None:
    class Refuse:
        def memory_fault(self, _fault):
            return Stop("no")

    vm = machine([Step.access(0x3000, write=True)], policy=Refuse(), shared_bit=BIT, enforcement="memslots")
    vm.vcpus[0].start(mode="long", rip=0x1000)
    assert vm.run(timeout=20).reason == "no"
    with pytest.raises(NotSupported, match="vCPU 0 waits for the answer to its store at 0x3000"):
        vm.snapshot(tmp_path / "saved")
    vm.policy.replace(policies.Allow())
    assert vm.run(timeout=20).reason == "halt"
    vm.snapshot(tmp_path / "saved")


# ---- devices


class Counting(Echo):
    """Counts its requests, also from machine to machine."""

    def __init__(self, count: int = 0):
        super().__init__()
        self.known = self.count = count

    def process(self, queue):
        super().process(queue)
        self.count = self.known + len(self.seen)

    def save(self):
        return str(self.count).encode()

    def restore(self, state):
        self.known = self.count = int(state)


def that_has_answered(machine) -> Vm:
    """A machine whose device has answered a request."""
    vm = machine([*ready(), *kick(), Step.block()], platform="pc")
    vm.add_device(Counting(), name="first")
    vm.vcpus[0].start(mode="protected")
    vm.write(DATA, b"hello")
    chain(vm, (DATA, 5, 0), (DATA + PAGE, 16, WRITE))
    run_until(vm, lambda: answered(vm))
    return vm


def test_a_device_goes_on_where_it_was(machine, resumed, tmp_path: Path) -> None:
    vm = that_has_answered(machine)
    assert (completed(vm), vm.read(DATA + PAGE, 5)) == ([(0, 5)], b"hello")
    vm.snapshot(tmp_path / "saved")
    device = Counting()
    again = resumed(tmp_path / "saved", [*kick(), Step.block()], devices=[device])
    assert device.count == 1
    again.write(DATA, b"again")
    again.write(AVAILABLE + 2, b"\2\0\0\0\0\0")
    run_until(again, lambda: len(completed(again)) == 2)
    assert (completed(again), again.read(DATA + PAGE, 5)) == ([(0, 5), (0, 5)], b"again")
    # Not a second time what was done before.
    assert (len(device.seen), device.count) == (1, 2)


def test_other_devices_are_refused(machine, tmp_path: Path) -> None:
    vm = machine(platform="pc")
    vm.add_device(devices.Rng())
    vm.add_device(Echo(), name="mine")
    vm.snapshot(tmp_path / "saved")
    with pytest.raises(ValueError, match="devices has 0, and the snapshot has 2: rng, mine"):
        Vm.resume(tmp_path / "saved", hypervisor=Fake(private_memory=False))
    with pytest.raises(ValueError, match="device rng: it is of type 42, not 4"):
        Vm.resume(tmp_path / "saved", hypervisor=Fake(), devices=[Echo(), devices.Rng()])


def test_nothing_else_is_done_meanwhile(machine, tmp_path: Path) -> None:
    told = []

    class Curious(Echo):
        def save(self):
            for call in (vm.run, vm.close, lambda: vm.snapshot(tmp_path / "other"), lambda: vm.add_device(Echo())):
                with pytest.raises(PagegateError, match="being put aside"):
                    call()
                told.append(call)
            vm.stop()
            return b""

    vm = machine([], platform="pc")
    vm.add_device(Curious())
    vm.vcpus[0].start(mode="protected")
    vm.snapshot(tmp_path / "saved")
    assert len(told) == 4
    # What stop() did then was nothing.
    assert vm.run(timeout=20).reason == "halt"


def test_what_a_device_raises(machine, tmp_path: Path) -> None:
    class Broken(Echo):
        def save(self):
            raise KeyError("not now")

    vm = machine(platform="pc")
    vm.add_device(Broken())
    with pytest.raises(KeyError, match="not now"):
        vm.snapshot(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_booted_kernel_keeps_its_file(machine, resumed, tmp_path: Path) -> None:
    vm = machine(platform="pc", memory=64 << 20)
    vm.boot(write_kernel(tmp_path))
    vm.snapshot(tmp_path / "saved")
    assert (tmp_path / "saved" / "kernel").read_bytes() == write_kernel(tmp_path).read_bytes()
    again = resumed(tmp_path / "saved")
    with pytest.raises(PagegateError, match="booted"):
        again.boot(write_kernel(tmp_path))


def test_nothing_is_left_of_many(tmp_path: Path) -> None:
    with Vm(MEMORY, hypervisor=Fake(private_memory=False)) as vm:
        vm.write(0x1000, b"x")
        vm.snapshot(tmp_path / "saved")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        Vm.resume(tmp_path / "saved", hypervisor=Fake(private_memory=False)).close()
        with pytest.raises(ValueError, match="devices has 1"):
            Vm.resume(tmp_path / "saved", hypervisor=Fake(), devices=[Echo()])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_trace_of_it_begins_with_the_states_that_were_put_aside(machine, resumed, tmp_path: Path) -> None:
    vm = machine(enforcement="memslots")
    vm.convert(4 * PAGE, 2 * PAGE, to="private")
    vm.snapshot(tmp_path / "saved")
    again = resumed(tmp_path / "saved")
    told = pa.table(again.events).schema.metadata
    assert told[b"pagegate.others"] == b"4000+2000" or b"4" in told[b"pagegate.others"], told
