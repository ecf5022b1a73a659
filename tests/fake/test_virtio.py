"""Virtio devices in Python, with a driver made of port IO, which goes through the window in configuration space."""

from __future__ import annotations

import errno
import gc
import os
import struct
import threading
import time
import weakref

import pytest
from pagegate import Convert, DeviceAccessError, PagegateError, Policy, PolicyError, Report, Stop, Vm, devices
from pagegate.testing import Fake, Step

from tests.boot_parts import write_kernel

PAGE = 4096
MEMORY = 16 << 20
DESCRIPTORS, AVAILABLE, USED = 0x10_0000, 0x10_1000, 0x10_2000
DATA = 0x20_0000
SIZE = 8
WRITE, NEXT = 2, 1
FIRST_DEVICE = 1
WINDOW = 0x84
"""The window's capability: four others of 16 and 20 bytes come before it."""
NOTIFY = 0x3000
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8


def word(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def config(at: int, value: int) -> list[Step]:
    address = 1 << 31 | FIRST_DEVICE << 11 | at
    return [Step.io_write(0xCF8, word(address), size=4), Step.io_write(0xCFC, word(value), size=4)]


def register(at: int, value: int, size: int = 4) -> list[Step]:
    return [*config(WINDOW + 8, at), *config(WINDOW + 12, size), *config(WINDOW + 16, value)]


def ready(queue: int = 0) -> list[Step]:
    """Negotiates what every device offers but EVENT_IDX, and starts one queue."""
    return [
        *config(0x04, 6),
        *register(0x14, ACKNOWLEDGE | DRIVER, 1),
        *register(0x08, 1),
        *register(0x0C, 3),
        *register(0x14, ACKNOWLEDGE | DRIVER | FEATURES_OK, 1),
        *register(0x16, queue, 2),
        *register(0x18, SIZE, 2),
        *register(0x20, DESCRIPTORS),
        *register(0x28, AVAILABLE),
        *register(0x30, USED),
        *register(0x1C, 1, 2),
        *register(0x14, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, 1),
    ]


def kick(queue: int = 0) -> list[Step]:
    return register(NOTIFY + 4 * queue, queue, 2)


def chain(vm: Vm, *parts: tuple[int, int, int]) -> None:
    """Makes a request of descriptors 0 and up available: their gpa, size and flags."""
    for index, (gpa, size, flags) in enumerate(parts):
        more = NEXT if index + 1 < len(parts) else 0
        vm.write(DESCRIPTORS + 16 * index, struct.pack("<QIHH", gpa, size, flags | more, index + 1))
    vm.write(AVAILABLE, struct.pack("<HHH", 0, 1, 0))


def completed(vm: Vm) -> list[tuple[int, int]]:
    (count,) = struct.unpack("<xxH", vm.read(USED, 4))
    return [struct.unpack("<II", vm.read(USED + 4 + 8 * at, 8)) for at in range(count)]


def run_until(vm: Vm, so) -> Report:
    """Runs the machine until something is so, which the device's thread brings about, and stops it then."""

    def watch() -> None:
        end = time.monotonic() + 20
        while not so() and time.monotonic() < end:
            time.sleep(0.002)
        vm.stop()

    watching = threading.Thread(target=watch)
    watching.start()
    report = vm.run(timeout=60)
    watching.join()
    return report


def answered(vm: Vm) -> bool:
    """Whether the device has completed a request, and has looked whether there are more."""
    return bool(completed(vm)) and vm.read(USED, 2) == bytes(2)


class Echo:
    """Writes what it reads, and keeps what it saw."""

    device_id = 0x2A
    queues = (64, 16)
    features = 1 << 3
    config = b"hello"

    def __init__(self, *, then=None):
        self.seen, self.resets, self.written, self.then = [], 0, [], then

    def process(self, queue):
        for request in queue:
            self.seen.append((queue.index, queue.size, request.head, request.readable, request.writable))
            data = request.read()
            if self.then:
                self.then(queue, request)
            request.write(data)
            request.complete(len(data))

    def write_config(self, written):
        self.written.append(written)

    def reset(self):
        self.resets += 1


@pytest.fixture
def make():
    machines = []

    def make(device, steps=(), before=None, log_accesses=False, **kwargs):
        """A machine with the device, whose vCPU does these steps and then hangs; `before` prepares memory."""
        vm = Vm(MEMORY, hypervisor=Fake([*steps, Step.block()]), platform="pc", **kwargs)
        machines.append(vm)
        vm.add_device(device, log_accesses=log_accesses)
        vm.vcpus[0].start(mode="protected")
        if before:
            before(vm)
        return vm

    yield make
    for vm in machines:
        vm.close()


def echoed(vm):
    vm.write(DATA, b"abcdef")
    chain(vm, (DATA, 6, 0), (DATA + PAGE, 6, WRITE))


def test_a_request_is_read_and_written(make) -> None:
    device = Echo()
    vm = make(device, [*ready(), *kick()], before=echoed)
    report = run_until(vm, lambda: answered(vm))
    assert (report.reason, report.device_accesses, report.first_device_access) == ("stopped", 0, None)
    assert completed(vm) == [(0, 6)]
    assert vm.read(DATA + PAGE, 6) == b"abcdef"
    assert device.seen == [(0, SIZE, 0, [(DATA, 6)], [(DATA + PAGE, 6)])]


def test_accesses_are_logged_on_demand(make) -> None:
    vm = make(Echo(), [*ready(), *kick()], before=echoed, log_accesses=True, events=1000)
    report = run_until(vm, lambda: answered(vm))
    assert (report.device_accesses, report.requests) == (0, 0)
    events = list(vm.events)
    assert {(event.kind, event.outcome, event.decision, event.state) for event in events} == {
        ("device", "accessed", "none", "shared")
    }
    assert {(event.device, event.queue) for event in events} == {(1, 0)}
    buffers = [event for event in events if event.gpa >= DATA]
    assert [(event.gpa, event.size, event.write, event.descriptor) for event in buffers] == [
        *((DATA, 6, False, 0), (DATA + PAGE, 6, True, 0)),
    ]
    # The rings, and the descriptors.
    assert {event.gpa // PAGE * PAGE for event in events if event.gpa < DATA} == {DESCRIPTORS, AVAILABLE, USED}
    assert any(event.write for event in events if event.gpa // PAGE * PAGE == USED)
    assert not any(event.write for event in events if event.gpa < USED)


def test_accesses_that_are_logged_leave_the_requests(make) -> None:
    """A ring of their own has room for as many as each vCPU's has."""
    vm = make(Echo(), [*ready(), *kick()], before=echoed, log_accesses=True, events=4)
    run_until(vm, lambda: answered(vm))
    assert len(list(vm.events)) == 4 < vm.events.total


@pytest.mark.parametrize(("private", "write"), [(DATA, False), (DATA + PAGE, True)])
def test_a_private_page_is_neither_read_nor_written(make, private, write) -> None:
    device = Echo()

    def before(vm):
        echoed(vm)
        vm.convert(private, PAGE, to="private")

    vm = make(device, [*ready(), *kick()], before=before)
    report = run_until(vm, lambda: answered(vm))
    assert report.reason == "stopped"
    assert completed(vm) == [(0, 0)]
    assert report.device_accesses == 1
    access = report.first_device_access
    assert (access.device, access.number, access.queue, access.descriptor) == ("Echo", 1, 0, 0)
    assert (access.gpa, access.size, access.write, access.state) == (private, 6, write, "private")
    (event,) = [event for event in vm.events if event.kind == "device"]
    assert (event.device, event.queue, event.descriptor, event.write) == (1, 0, 0, write)
    assert (event.gpa, event.size, event.state, event.decision, event.outcome) == (
        *(private, 6, "private"),
        *("deny", "denied"),
    )
    assert event.errno == errno.EACCES
    vm.convert(private, PAGE, to="shared")
    assert vm.read(private, 6) == bytes(6)


def test_a_policy_can_end_the_run(make) -> None:
    asked = []

    class Strict(Policy):
        def device_access(self, access):
            asked.append(access)
            return Stop("a device touched a private page")

    def before(vm):
        echoed(vm)
        vm.convert(DATA, PAGE, to="private")

    vm = make(Echo(), [*ready(), *kick()], before=before, policy=Strict())
    assert vm.run(timeout=20).reason == "a device touched a private page"
    assert [access.gpa for access in asked] == [DATA]
    assert [event.outcome for event in vm.events] == ["stopped"]


@pytest.mark.parametrize("answer", ["raises", "converts"])
def test_a_policy_that_fails_ends_the_run(make, answer) -> None:
    class Broken(Policy):
        def device_access(self, access):
            if answer == "raises":
                raise ZeroDivisionError
            return Convert()

    def before(vm):
        echoed(vm)
        vm.convert(DATA, PAGE, to="private")

    vm = make(Echo(), [*ready(), *kick()], before=before, policy=Broken())
    with pytest.raises(ZeroDivisionError if answer == "raises" else PolicyError) as raised:
        vm.run(timeout=20)
    assert hex(DATA) in " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert completed(vm) == [(0, 0)]


def test_a_page_that_was_private_for_a_moment_fails_the_request(make) -> None:
    vms = []

    def flip(queue, request):
        for to in ("private", "shared"):
            vms[0].convert(DATA + PAGE, PAGE, to=to)

    vm = make(Echo(then=flip), [*ready(), *kick()], before=echoed)
    vms.append(vm)
    report = run_until(vm, lambda: answered(vm))
    assert completed(vm) == [(0, 0)]
    assert (report.first_device_access.gpa, report.first_device_access.state) == (DATA + PAGE, "shared")
    assert vm.read(DATA + PAGE, 6) == bytes(6)


def test_private_rings_stop_the_device_until_it_is_reset(make) -> None:
    device = Echo()

    def before(vm):
        echoed(vm)
        vm.convert(AVAILABLE, PAGE, to="private")

    vm = make(device, [*ready(), *kick(), Step.block(), *register(0x14, 0, 1)], before=before)
    report = run_until(vm, lambda: any(event.kind == "device" for event in vm.events))
    assert (device.seen, device.resets) == ([], 0)
    run_until(vm, lambda: device.resets)
    assert report.first_device_access.descriptor is None
    assert report.first_device_access.gpa in range(AVAILABLE, AVAILABLE + PAGE)
    assert (device.seen, device.resets) == ([], 1)


def test_an_exception_ends_the_run_and_the_guest_gets_its_request_back(make) -> None:
    def fail(queue, request):
        raise ZeroDivisionError

    vm = make(Echo(then=fail), [*ready(), *kick()], before=echoed)
    with pytest.raises(ZeroDivisionError) as raised:
        vm.run(timeout=20)
    assert "device Echo" in raised.value.__notes__
    assert completed(vm) == [(0, 0)]


def test_lies_are_told(make) -> None:
    def lie(queue, request):
        queue.complete(7, 0xFFFF_FFFF)

    vm = make(Echo(then=lie), [*ready(), *kick()], before=echoed)
    run_until(vm, lambda: answered(vm))
    assert completed(vm) == [(7, 0xFFFF_FFFF), (0, 6)]


def test_objects_of_a_turn_are_of_no_use_after_it(make) -> None:
    kept = []
    vm = make(Echo(then=lambda *both: kept.extend(both)), [*ready(), *kick()], before=echoed)
    run_until(vm, lambda: answered(vm))
    queue, request = kept
    for use in (lambda: next(queue), lambda: queue.complete(0, 0), request.read, request.complete):
        with pytest.raises(RuntimeError, match="in process"):
            use()
    assert (request.readable_size, request.writable_size, request.head) == (6, 6, 0)


def test_a_request_is_completed_once_and_bounded(make) -> None:
    found = {}

    def check(queue, request):
        for name, use in {
            "too much": lambda: request.read(0, 7),
            "behind": lambda: request.write(b"1234567"),
            "huge": lambda: request.read(0, 65 << 20),
        }.items():
            with pytest.raises(DeviceAccessError) as raised:
                use()
            found[name] = str(raised.value)
        assert request.read(2, 3) == b"cde"
        assert request.read(6) == b""

    vm = make(Echo(then=check), [*ready(), *kick()], before=echoed)
    run_until(vm, lambda: answered(vm))
    assert found.keys() == {"too much", "behind", "huge"}
    assert "64 MiB" in found["huge"]
    assert completed(vm) == [(0, 6)]


def test_the_configuration_space(make) -> None:
    device = Echo()
    vm = make(device, [*config(0x04, 6), *register(0x2000, int.from_bytes(b"HELL", "little")), *register(0x2004, 1, 1)])
    run_until(vm, lambda: len(device.written) == 2)
    assert device.written == [(0, b"HELL"), (4, b"\1")]


def test_a_configuration_is_read_again(make) -> None:
    """What its driver then sees: rust/core/tests/virtio/config_changes.rs."""
    device = Echo()
    vm = make(device)
    device.config = b"goodbye"
    vm.refresh_device("Echo")
    device.config = bytes(5000)
    with pytest.raises(PolicyError, match="config of a Echo has 5000 bytes"):
        vm.refresh_device("Echo")
    del device.config
    type(device).config = property(lambda _: 1 // 0)
    try:
        with pytest.raises(ZeroDivisionError):
            vm.refresh_device("Echo")
    finally:
        type(device).config = b"hello"
    with pytest.raises(ValueError, match="no device called echo"):
        vm.refresh_device("echo")


def test_a_disk_that_grows(make, tmp_path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(bytes(512))
    vm = make(devices.Block(file))
    file.write_bytes(bytes(1024))
    vm.refresh_device("disk")
    file.write_bytes(b"")
    with pytest.raises(PagegateError, match="device disk: a disk has at least one sector of 512 bytes"):
        vm.refresh_device("disk")
    vm.close()
    with pytest.raises(PagegateError, match="closed"):
        vm.refresh_device("disk")


@pytest.mark.parametrize("method", ["write_config", "reset"])
def test_an_exception_of_another_method_ends_the_run_too(make, method) -> None:
    """Without a kick, so that the device's ``process`` is not called afterwards."""

    def fails(self, *_):
        raise ZeroDivisionError(method)

    device = type("Failing", (Echo,), {method: fails})()
    written = register(0x2000, 1) if method == "write_config" else register(0x14, 0, 1)
    vm = make(device, [*ready(), *written])
    with pytest.raises(ZeroDivisionError, match=method):
        vm.run(timeout=5)


class Ok:
    device_id, queues = 4, (8,)

    def process(self, queue):
        pass


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"process": None}, "process"),
        ({"process": 1}, "process"),
        ({"device_id": -1}, "device_id"),
        ({"device_id": 64}, "device_id"),
        ({"device_id": "4"}, "device_id"),
        ({"queues": (0,)}, "queues"),
        ({"queues": (1 << 16,)}, "queues"),
        ({"features": 1 << 64}, "features"),
        ({"config": bytes(5000)}, "config"),
    ],
)
def test_an_object_that_is_no_device(make, attributes, why) -> None:
    vm = make(Ok())
    with pytest.raises(PolicyError, match=why):
        vm.add_device(type("Mine", (Ok,), attributes)())


def test_what_cannot_be_added(make, tmp_path) -> None:
    vm = make(Ok())
    for wrong, error in (
        (Ok, PolicyError),
        (object(), PolicyError),
        (type("Odd", (Ok,), {"queues": (3,)})(), ValueError),
    ):
        with pytest.raises(error):
            vm.add_device(wrong)
    rng = devices.Rng()
    vm.add_device(rng)
    with pytest.raises(ValueError, match="belongs to a machine"):
        vm.add_device(rng)
    for _ in range(29):
        vm.add_device(Ok())
    with pytest.raises(ValueError, match="31 devices"):
        vm.add_device(Ok())
    with Vm(MEMORY, hypervisor=Fake([])) as bare, pytest.raises(PagegateError, match="pc"):
        bare.add_device(Ok())
    with Vm(64 << 20, hypervisor=Fake([]), platform="pc") as booted:
        booted.boot(write_kernel(tmp_path))
        with pytest.raises(PagegateError, match="before boot"):
            booted.add_device(Ok())


def test_a_disk_needs_a_sector(tmp_path) -> None:
    file = tmp_path / "disk"
    with pytest.raises(FileNotFoundError):
        devices.Block(file)
    file.write_bytes(bytes(511))
    with pytest.raises(ValueError, match="512"):
        devices.Block(file)
    file.write_bytes(bytes(512))
    devices.Block(file, read_only=True)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_disk_is_a_file_or_a_block_device(tmp_path, read_only) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for other in (tmp_path, pipe, "/dev/zero"):
        with pytest.raises(ValueError, match="a file or a block device"):
            devices.Block(other, read_only=read_only)


def test_a_disk_is_closed_with_its_machine(make, tmp_path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(bytes(512))
    disk = devices.Block(file)
    vm = make(Echo())
    vm.add_device(disk)

    def opened() -> bool:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return str(file) in [os.readlink(link) for link in links if os.path.lexists(link)]

    assert opened()
    vm.close()
    assert not opened()
    with make(Echo()) as other, pytest.raises(ValueError, match="belongs to a machine"):
        other.add_device(disk)


def test_closing_a_machine_lets_go_of_its_devices(make) -> None:
    device = Echo()
    vm = make(device, [*ready(), *kick()], before=echoed)
    device.vm = vm
    run_until(vm, lambda: answered(vm))
    alive = weakref.ref(device)
    vm.close()
    del device
    gc.collect()
    assert alive() is None
