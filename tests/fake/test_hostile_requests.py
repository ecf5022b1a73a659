"""What a guest may put into the requests of devices in Python: the examples are tried, which others begin with."""

from __future__ import annotations

import resource
import threading
import time

import pytest
from pagegate import DeviceAccessError, Vm, devices
from pagegate.testing import Fake

from tests.example_parts import loaded

from .test_virtio import DATA, MEMORY, PAGE, WRITE, Echo, chain, completed, kick, make, ready, run_until  # noqa: F401

disks, liars = loaded("device_disk"), loaded("device_that_lies")
HUGE = 3 << 30
"""With as much again, virtio-queue takes no such chain, and the device stops."""
HEADER = 16


def header(kind: int) -> bytes:
    return kind.to_bytes(4, "little") + bytes(12)


CHAINS = [
    [(DATA, HEADER, 0)],
    [(DATA, HEADER, 0), (DATA, 512, 0)],
    [(DATA, HEADER - 1, 0), (DATA + PAGE, 1, WRITE)],
    [(DATA, HEADER, 0), (DATA, HUGE, 0), (DATA + PAGE, 1, WRITE)],
    [(DATA, HEADER, 0), (DATA, 80 << 20, 0), (DATA + PAGE, 1, WRITE)],
    [(DATA, HEADER, 0), (DATA + PAGE, HUGE, WRITE), (DATA + PAGE, 512, WRITE)],
    [(DATA + PAGE, HUGE, WRITE)],
    [(DATA + PAGE, 1, WRITE)],
]


@pytest.mark.parametrize("kind", [0, 1, 4, 99])
@pytest.mark.parametrize("parts", CHAINS, ids=range(len(CHAINS)))
@pytest.mark.parametrize(
    "device",
    [lambda: disks.Disk(bytearray(1 << 20)), *(lambda lie=lie: liars.Lying(lie, honest=0) for lie in liars.LIES)],
    ids=["disk", *liars.LIES],
)
def test_an_example_goes_on_whatever_a_request_is(make, device, parts, kind) -> None:  # noqa: F811
    def before(vm: Vm) -> None:
        vm.write(DATA, header(kind))
        chain(vm, *parts)

    vm = make(device(), [*ready(), *kick()], before=before)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = run_until(vm, lambda: completed(vm))
    assert report.reason == "stopped"
    assert completed(vm)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100 << 10


def test_too_much_to_read_at_once_fails_the_request(make) -> None:  # noqa: F811
    vm = make(Echo(), [*ready(), *kick()], before=lambda vm: chain(vm, (DATA, 80 << 20, 0), (DATA, 6, WRITE)))
    run_until(vm, lambda: completed(vm))
    assert completed(vm) == [(0, 0)]


@pytest.mark.parametrize("head", [8, 500, 0xFFFF, 1 << 16, (1 << 32) - 1])
def test_ids_that_are_no_descriptors(make, head) -> None:  # noqa: F811
    def lie(queue, request):
        queue.complete(head, 7)
        with pytest.raises(DeviceAccessError):
            request.read(1 << 40, 1)

    def before(vm: Vm) -> None:
        vm.write(DATA, b"abcdef")
        chain(vm, (DATA, 6, 0), (DATA + PAGE, 6, WRITE))

    vm = make(Echo(then=lie), [*ready(), *kick()], before=before)
    run_until(vm, lambda: len(completed(vm)) == 2)
    assert completed(vm) == [(head, 7), (0, 6)]


def test_a_device_can_be_added_while_a_listener_sleeps() -> None:
    class Sleeps:
        def prepare(self, change):
            sleeping.set()
            time.sleep(0.3)

    sleeping = threading.Event()
    with Vm(MEMORY, hypervisor=Fake([]), platform="pc") as vm:
        vm.add_listener(Sleeps())
        converting = threading.Thread(target=vm.convert, args=(0, PAGE), kwargs={"to": "private"})
        converting.start()
        assert sleeping.wait(10)
        vm.add_device(devices.Rng())
        converting.join()


def test_a_disk_is_in_one_machine_at_a_time(tmp_path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    readers = [devices.Block(image, read_only=True) for _ in range(2)]
    with pytest.raises(OSError, match="in use as a disk elsewhere"):
        devices.Block(image)
    del readers
    disk = devices.Block(image)
    for read_only in (True, False):
        with pytest.raises(OSError, match="in use as a disk elsewhere"):
            devices.Block(image, read_only=read_only)
    del disk
    devices.Block(image)


def test_a_path_that_has_no_room_for_a_port(tmp_path) -> None:
    folder = tmp_path / ("x" * (98 - len(str(tmp_path))))
    folder.mkdir()
    with pytest.raises(ValueError, match="too long"):
        devices.Vsock(3, folder / "v")
    assert not list(folder.iterdir())
