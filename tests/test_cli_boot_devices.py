"""The devices of `pagegate boot`, on the fake hypervisor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from pagegate.cli.boot_devices import BootDevices
from pagegate.cli.booted import Booted

from .boot_parts import command, write_kernel


@pytest.fixture
def image(tmp_path):
    return write_kernel(tmp_path)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def boot(*arguments, **guest):
    done = subprocess.run(
        command(*arguments, **guest), stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


def asked(*, disks=(), nets=(), vsock=None, rng=False, console="ttyS0") -> BootDevices:
    return BootDevices(disks, nets, vsock, rng, console)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--disk", "/nonexistent"), "'--disk': there is no /nonexistent"),
        (("--disk", "/"), "'--disk': / is a folder"),
        (("--disk", "/dev/null"), "'--disk': a disk is a file or a block device"),
        (("--rng", "--net", "far-too-long-for-a-tap"), "'--net': far-too-long-for-a-tap: Invalid argument"),
        (("--net", "pagegate-none"), "'--net': pagegate-none: there is no such tap: make it by ip tuntap add"),
        (("--console", "tty1"), "'--console': 'tty1' is not one of 'ttyS0', 'hvc0'"),
        (("--vsock", "guest.vsock"), "'--vsock': 'guest.vsock' is no CID:PATH"),
        (("--vsock", "3:"), "'--vsock': '3:' is no CID:PATH"),
        (("--vsock", "²:x"), "'--vsock': '²:x' is no CID:PATH"),
        (("--vsock", "2:x"), "'--vsock': the context ID 2 is not from 3 to 4294967294"),
        (("--vsock", "4294967295:x"), "'--vsock': the context ID 4294967295 is not from 3"),
        (("--vsock", "3:/"), "'--vsock': / exists"),
        (("--vsock", "3:/nonexistent/x"), "'--vsock': /nonexistent/x: No such file or directory"),
        (("--vsock", "3:/tmp/" + 120 * "x"), "'--vsock': path must be shorter"),
    ],
)
def test_a_wrong_one_is_a_usage_error_that_names_the_option(image, arguments, said):
    done = boot(image, *arguments)
    assert (done.status, done.out) == (2, "")
    assert said in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_more_than_there_is_room_for_is_a_usage_error(image, disk):
    done = boot(image, *["--disk", f"{disk}:ro"] * 31, "--rng")
    assert (done.status, done.out) == (2, "")
    assert "Invalid value for '--rng': " in done.err


def test_a_disk_that_is_in_use_is_a_usage_error(image, disk):
    done = boot(image, "--disk", disk, "--disk", f"{disk}:ro")
    assert (done.status, done.out) == (2, "")
    assert f"'--disk': {disk}: it is in use as a disk elsewhere" in " ".join(done.err.split())


def test_all_of_them(image, disk, tmp_path):
    socket, other = tmp_path / "vsock", tmp_path / "other.img"
    other.write_bytes(disk.read_bytes())
    arguments = ("--disk", disk, "--disk", f"{other}:ro", "--rng", "--vsock", f"3:{socket}", "--console", "ttyS0")
    done = boot(image, *arguments, "--json", says=b"hello\n")
    assert (done.status, done.err) == (0, "hello\n")
    assert json.loads(done.out)["device_accesses"] == 0
    assert not socket.exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip") is None,
    reason="a tap is made by root, where the kernel has any",
)
def test_a_tap(image):
    tap = f"pagegate{os.getpid() % 10**6}"
    subprocess.run(["ip", "tuntap", "add", tap, "mode", "tap"], check=True)
    try:
        done = boot(image, "--net", tap)
    finally:
        subprocess.run(["ip", "link", "delete", tap], check=True)
    assert (done.status, done.err) == (0, "")


def test_with_hvc0_as_the_terminal_the_serial_port_is_not_shown(image):
    done = boot(image, "--console", "hvc0", "--json", guest="asks", says=b"hello\n")
    assert (done.status, done.err) == (0, "")
    (hint,) = json.loads(done.out)["hints"]
    assert hint.startswith("the guest wrote nothing to hvc0")


def test_a_panic_on_the_serial_port_is_seen_with_hvc0_as_the_terminal(image):
    done = boot(image, "--console", "hvc0", guest="reboots", says=b"Kernel panic - not syncing: no root\r\n")
    assert done.status == 1
    assert done.err == "pagegate: the guest's kernel panicked: no root\n"


@pytest.mark.parametrize(
    ("console", "append", "line"),
    [
        ("ttyS0", "quiet", "quiet"),
        ("hvc0", "", "console=ttyS0 console=hvc0"),
        ("hvc0", "quiet", "console=ttyS0 console=hvc0 quiet"),
        ("hvc0", "quiet console=tty0", "quiet console=tty0"),
        ("hvc0", "quiet -- console=tty0", "console=ttyS0 console=hvc0 quiet -- console=tty0"),
        ("hvc0", "x_console=tty0", "console=ttyS0 console=hvc0 x_console=tty0"),
    ],
)
def test_consoles_of_the_command_line(console, append, line):
    assert asked(console=console).command_line(append) == line


def test_modules():
    disks = ((Path("disk"), True),)
    assert asked().modules == []
    assert asked(rng=True).modules == ["virtio_pci", "virtio_rng"]
    everything = asked(disks=disks, nets=("tap0",), vsock=(3, Path("x")), rng=True, console="hvc0").modules
    needed = {"virtio_blk", "virtio_net", "virtio_rng", "vmw_vsock_virtio_transport", "virtio_console"}
    assert everything[0] == "virtio_pci"
    assert set(everything[1:]) == needed


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (SimpleNamespace(device="disk.img", gpa=0x1F000), "access what is not shared, disk.img first, at 0x1f000"),
        (None, "access what is not shared"),
    ],
)
def test_accesses_of_devices_to_what_is_not_shared_are_told(first, said):
    report = SimpleNamespace(
        reason="poweroff",
        hypercalls=1,
        debug_private=False,
        malformed_dropped=0,
        device_accesses=2,
        first_device_access=first,
    )
    console = SimpleNamespace(tail=lambda size: b"x")
    vm = SimpleNamespace(console=console, confidential="sev", events=SimpleNamespace(dropped=0))
    ran = SimpleNamespace(vm=vm, report=report, events=[], outcomes={"stopped": 0})
    booted = Booted(ran, console, ended_by_key=False, no_initrd="")
    assert booted.hints() == [f"devices were told 2 times to {said}"]
