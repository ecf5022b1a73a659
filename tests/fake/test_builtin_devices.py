"""The built-in virtio devices as Python objects, and what is left of them when their machine is closed."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from pagegate import PagegateError, Vm, devices
from pagegate.console import ConsoleTimeout
from pagegate.testing import Fake, Step

MEMORY = 64 << 20


def pc(*, platform: str = "pc") -> Vm:
    return Vm(MEMORY, hypervisor=Fake([]), platform=platform)


def test_a_device_belongs_to_one_machine() -> None:
    device = devices.Console()
    with pc() as vm, pc() as other:
        vm.add_device(device)
        for machine in (vm, other):
            with pytest.raises(ValueError, match="make one for each"):
                machine.add_device(device)


def test_a_machine_that_takes_no_device_leaves_it_as_it_was() -> None:
    device = devices.Console()
    with pc(platform="bare") as bare, pytest.raises(PagegateError, match="pc"):
        bare.add_device(device)
    with pc() as vm:
        vm.add_device(device)


def test_a_console_before_and_after_its_machine() -> None:
    device = devices.Console()
    console = device.console
    assert console is device.console
    assert console.read(timeout=0) == b""
    assert console.offer(b"x" * (65 << 10)) == 64 << 10
    with pytest.raises(ConsoleTimeout):
        console.expect("login", timeout=1)
    with pc() as vm:
        vm.add_device(device)
        assert console.offer(b"x") == 0
    # Nothing can come any more, so there is nothing to wait for.
    assert console.read() == b""
    assert console.offer(b"x") == 0


def test_a_vsock_leaves_nothing_when_its_machine_is_closed(tmp_path) -> None:
    path = tmp_path / "vsock"
    before = set(os.listdir("/proc/self/fd"))
    device = devices.Vsock(3, path)
    with pc() as vm:
        vm.add_device(device)
        assert path.is_socket()
    assert not path.exists()
    assert set(os.listdir("/proc/self/fd")) == before


class Entropy:
    device_id, queues = 4, (8,)

    def process(self, queue):
        pass


def left() -> tuple[int, int, int]:
    """How many descriptors, threads and mappings of files this process has."""
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line or "eventfd" in line
    ]
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(mapped)


def test_nothing_is_left_of_machines_that_ran_with_every_device(tmp_path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))

    def run() -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with here, there, Vm(MEMORY, hypervisor=Fake([Step.block()] * 1000), platform="pc") as vm:
            every = (
                devices.Block(disk),
                devices.Console(),
                devices.Net(there),
                devices.Rng(),
                devices.Vsock(3, tmp_path / "vsock"),
                Entropy(),
            )
            for device in every:
                vm.add_device(device)
            vm.vcpus[0].start(mode="protected")
            threads = len(os.listdir("/proc/self/task"))
            seen = []

            def watch() -> None:
                while len(os.listdir("/proc/self/task")) < threads + len(every) + 2:
                    time.sleep(0.001)
                seen.append(True)
                vm.stop()

            watching = threading.Thread(target=watch)
            watching.start()
            assert vm.run(timeout=20).reason == "stopped"
            watching.join()
            assert seen
            # A thread that was waited for may be listed for a moment.
            end = time.monotonic() + 10
            while len(os.listdir("/proc/self/task")) != threads:
                assert time.monotonic() < end, "they end with the run"
                time.sleep(0.001)

    run()
    before = left()
    for _ in range(20):
        run()
    assert left() == before


def test_a_vsock_that_no_machine_got_leaves_nothing(tmp_path) -> None:
    devices.Vsock(3, tmp_path / "vsock")
    assert not list(tmp_path.iterdir())


def test_a_vsock_leaves_the_socket_that_another_one_made_there(tmp_path) -> None:
    path = tmp_path / "vsock"
    first = devices.Vsock(3, path)
    path.unlink()
    second = devices.Vsock(4, path)
    del first
    assert path.is_socket()
    del second
    assert not path.exists()


@pytest.mark.parametrize("cid", [-1, 0, 2, 0xFFFF_FFFF, 1 << 32])
def test_context_ids_that_are_no_guests(cid, tmp_path) -> None:
    with pytest.raises(ValueError, match="cid|context ID|4294967295"):
        devices.Vsock(cid, tmp_path / "vsock")
    assert not list(tmp_path.iterdir())


def test_a_path_that_exists_and_one_that_cannot(tmp_path) -> None:
    path = tmp_path / "vsock"
    path.write_text("something")
    with pytest.raises(OSError, match="in use") as raised:
        devices.Vsock(3, path)
    assert raised.value.filename == str(path)
    assert path.read_text() == "something"
    with pytest.raises(OSError, match="No such file"):
        devices.Vsock(3, tmp_path / "nowhere" / "vsock")


def test_a_socket_that_somebody_left(tmp_path) -> None:
    path = tmp_path / "vsock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
        left_over.listen()
        with pytest.raises(OSError, match="in use"):
            devices.Vsock(3, path)
    with pytest.raises(OSError, match="nobody listens at it: .* remove it") as raised:
        devices.Vsock(3, path)
    assert (raised.value.errno, raised.value.filename) == (errno.EADDRINUSE, str(path))
    path.unlink()
    devices.Vsock(3, path)


def test_a_network_card_leaves_nothing_when_its_machine_is_closed() -> None:
    before = set(os.listdir("/proc/self/fd"))
    host, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with host, pc() as vm:
        with end:
            card = devices.Net(end, mac="52:54:00:12:34:56")
        assert card.mac == "52:54:00:12:34:56"
        vm.add_device(card)
        assert devices.Net(host.fileno()).mac != card.mac
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("mac", "message"), [("", "write it as"), ("52-54-00-12-34-56", "write it as"), ("01:00:5e:00:00:01", "lowest bit")]
)
def test_addresses_that_are_not_one_cards(mac, message) -> None:
    host, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with host, end, pytest.raises(ValueError, match=message):
        devices.Net(end, mac=mac)


def test_what_is_no_link() -> None:
    host, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with host, end, pytest.raises(ValueError, match="datagram"):
        devices.Net(end)
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        devices.Net(-1)
    assert raised.value.filename == "descriptor -1"
    with Path("/dev/null").open() as null, pytest.raises(ValueError, match="no queue of a tap"):
        devices.Net(null)
    with pytest.raises(OSError, match="Invalid") as raised:
        devices.Net("a name that is too long")
    assert raised.value.filename == "a name that is too long"
    with pytest.raises(OSError, match="no such tap: make it by ip tuntap add pagegate-none mode tap") as raised:
        devices.Net("pagegate-none")
    assert (raised.value.errno, raised.value.filename) == (errno.ENODEV, "pagegate-none")


def made_tap() -> devices.Net | None:
    try:
        return devices.Net(f"pagegate{os.getpid() % 10**6}", create=True)
    except OSError:
        return None


def test_a_tap_that_is_made() -> None:
    card = made_tap()
    if card is None:
        pytest.skip("no tap can be made here")
    assert card.mac
    with pytest.raises(TypeError):
        devices.Net(None)  # type: ignore[arg-type]
