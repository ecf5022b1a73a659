"""Linux's own drivers on pagegate's virtio devices, in ordinary guests and in software SEV guests.

PAGEGATE_TEST_GUESTS    a folder with the kernels, as in test_linux.py, and with their modules in lib/modules
PAGEGATE_TEST_MODULES   a folder with a module built for them, as in test_linux_module.py, where its seconds are, too
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from pagegate import Vm, devices, linux
from pagegate.linux.initramfs import STATUS

from tests.example_parts import loaded

from .conftest import MIB, PAGE
from .test_linux import SECONDS, kernels
from .test_linux_module import COUNTS, LASTS, module

if TYPE_CHECKING:
    from pathlib import Path

    from pagegate import Report

disks, entropy, liars = (loaded(name) for name in ("device_disk", "device_entropy", "device_that_lies"))
MEMORY = 256 * MIB
DATA = 64 * MIB
SEV = {"confidential": "sev", "enforcement": "traps"}
MODULES = ["virtio_pci", "virtio_blk", "virtio_rng"]


def initrd(kernel: Path, command: str, folder: Path, files=None) -> Path:
    path = folder / "initrd"
    path.write_bytes(linux.build(command=command, modules=MODULES, kernel=kernel, files=files))
    return path


def boot(vm: Vm, kernel: Path, command: str, folder: Path, files=None) -> tuple[Report, str]:
    """The report, and what the guest wrote until it powered off."""
    vm.boot(kernel, initrd=initrd(kernel, command, folder, files), append="quiet")
    report = vm.run(timeout=SECONDS)
    output = vm.console.tail(1 << 20).decode(errors="replace").replace("\r\n", "\n")
    assert report.reason == "poweroff", output
    assert "Kernel panic" not in output
    return report, output


def image(folder: Path) -> tuple[Path, str]:
    """A disk with ext4 that has a file of 64 MiB and room for another, and the file's SHA-256."""
    files, disk = folder / "files", folder / "disk.img"
    files.mkdir()
    with open("/dev/urandom", "rb") as source:
        data = source.read(DATA)
    (files / "data").write_bytes(data)
    with disk.open("wb") as file:
        file.truncate(3 * DATA)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(files), str(disk)], check=True)
    return disk, hashlib.sha256(data).hexdigest()


def file_on(disk: Path, name: str, folder: Path) -> bytes:
    copy = folder / "copy"
    subprocess.run(["debugfs", "-R", f"dump {name} {copy}", str(disk)], check=True, capture_output=True)
    return copy.read_bytes()


def check_accesses(vm: Vm) -> None:
    """By the log alone: each page that a device accessed was shared then.

    An event's number says when. A device's access is numbered while its pages are held, and a request of the only vCPU
    before that goes on.
    """
    # All pages begin in one state.
    shared = set() if vm.confidential else set(range(MEMORY // PAGE))
    pages, accesses = set(), Counter()
    for event in vm.events:
        if event.kind == "device":
            assert (event.outcome, event.state) == ("accessed", "shared"), event
            touched = range(event.gpa // PAGE, (event.gpa + event.size - 1) // PAGE + 1)
            assert shared.issuperset(touched), event
            pages.update(touched)
            accesses[event.device, event.write] += event.size
        elif event.outcome == "converted":
            converted = range(event.done_gpa // PAGE, (event.done_gpa + event.done_size) // PAGE)
            change = shared.update if event.done_to == "shared" else shared.difference_update
            change(converted)
    print(f"{len(pages)} pages of {len(shared)} shared ones; bytes {dict(accesses)}")
    # What was read twice and written once.
    assert accesses[1, True] >= 2 * DATA
    assert accesses[1, False] >= DATA
    assert accesses[2, True] >= 32


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("how", [{}, SEV, {"confidential": "sev", "enforcement": "memslots"}], ids=str)
@pytest.mark.parametrize("kernel", kernels())
def test_an_ext4_disk_is_read_and_written(kernel, how, tmp_path) -> None:
    disk, sha256 = image(tmp_path)
    command = f"""
    mkdir /mnt && mount -t ext4 /dev/vda /mnt
    sha256sum </mnt/data
    dd if=/mnt/data of=/mnt/copy bs=1M count={DATA // MIB} 2>/dev/null
    umount /mnt && mount -t ext4 /dev/vda /mnt && sha256sum </mnt/copy && umount /mnt
    dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum
    """
    with Vm(MEMORY, platform="pc", events=1 << 20, **how) as vm:
        vm.add_device(devices.Block(disk), name="disk", log_accesses=True)
        vm.add_device(devices.Rng(), log_accesses=True)
        report, output = boot(vm, kernel, command, tmp_path)
        assert f"{STATUS}0\n" in output, output
        first, second, random = re.findall(r"^([0-9a-f]{64})  -$", output, re.MULTILINE)
        assert first == second == sha256
        assert random not in {hashlib.sha256(bytes(32)).hexdigest(), hashlib.sha256(b"").hexdigest()}
        assert report.device_accesses == 0
        assert vm.events.dropped == 0
        check_accesses(vm)
    assert hashlib.sha256(file_on(disk, "/copy", tmp_path)).hexdigest() == sha256


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_devices_in_python_touch_what_is_shared_then(kernel, tmp_path) -> None:
    with Vm(MEMORY, platform="pc", events=1 << 14, **SEV) as vm:
        touched = []

        class Watched(disks.Disk):
            def process(self, queue) -> None:
                for request in queue:
                    now = time.monotonic_ns()
                    touched.extend((now, gpa, size) for gpa, size in request.readable + request.writable)
                    private = [gpa for gpa, _ in request.readable + request.writable if vm.attributes.is_private(gpa)]
                    assert not private
                    status, written = self.carry_out(request)
                    request.write(status, request.writable_size - 1)
                    request.complete(written + 1)

        disk = Watched(bytearray(8 * MIB))
        vm.add_device(disk)
        vm.add_device(entropy.Entropy())
        command = """
        dd if=/dev/hwrng of=/dev/vda bs=4k count=16 2>/dev/null && sync
        dd if=/dev/vda bs=4k count=16 iflag=direct 2>/dev/null | sha256sum
        """
        _, output = boot(vm, kernel, command, tmp_path)
        (sum_,) = re.findall(r"^([0-9a-f]{64})  -$", output, re.MULTILINE)
        assert sum_ == hashlib.sha256(disk.content[: 16 * PAGE]).hexdigest()
        assert bytes(16 * PAGE) != disk.content[: 16 * PAGE]
        assert disk.writes
        # By the log alone: each page was shared when the device touched it, for all that is shared was once converted.
        assert vm.events.dropped == 0
        states = sorted((event.time, event.done_gpa, event.done_size, event.done_to) for event in vm.events)
        for when, gpa, _ in touched:
            last = [to for time_, start, size, to in states if time_ <= when and start <= gpa < start + size]
            assert last[-1:] == ["shared"], hex(gpa)


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_a_page_that_becomes_private_is_an_io_error_in_the_guest(kernel, tmp_path) -> None:
    """Linux's driver asks for data, and the page that it is to be put in becomes private before the disk gets to it."""
    with Vm(MEMORY, platform="pc", **SEV) as vm:
        taken = []

        class Late(disks.Disk):
            features = disks.Disk.features | 1 << 2

            def __init__(self, content: bytearray) -> None:
                super().__init__(content)
                # Requests of up to 64 parts.
                self.config += struct.pack("<II", 0, 64)

            def carry_out(self, request) -> tuple[bytes, int]:
                data = request.writable[:-1]
                if len(taken) < 1 and sum(size for _, size in data) == 64 * 1024:
                    # In the middle, so that neither the header nor the status is in the same page.
                    gpa, size = data[len(data) // 2]
                    page = (gpa + size // 2) // PAGE * PAGE
                    vm.convert(page, PAGE, to="private")
                    taken.append((page, request.head))
                return super().carry_out(request)

        content = bytearray(b"\x5a" * (8 * MIB))
        vm.add_device(Late(content), name="root disk")
        command = """
        dd if=/dev/vda of=/tmp/first bs=64k count=1 skip=2 iflag=direct 2>/dev/null; echo first: $?
        dd if=/dev/vda bs=64k count=1 skip=2 iflag=direct 2>/dev/null | sha256sum
        """
        _, output = boot(vm, kernel, f"mkdir -p /tmp\n{command}", tmp_path)
        ((page, head),) = taken
        (event,) = (event for event in vm.events if event.kind == "device")
        assert (event.device, event.queue, event.descriptor) == (1, 0, head)
        assert page <= event.gpa < page + PAGE
        assert (event.write, event.state, event.outcome) == (True, "private", "denied")
        assert "first: 1\n" in output
        assert "I/O error" in output
        assert hashlib.sha256(content[: 64 * 1024]).hexdigest() in output


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_a_driver_survives_lies(kernel, tmp_path) -> None:
    """Linux's driver is not hung nor broken by a disk that lies; what it made of each lie is printed."""
    lying = {lie: liars.Lying(lie) for lie in liars.LIES}
    reads = "\n".join(
        f"(dd if=/dev/vd{letter} of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null; echo {lie}: $?) &"
        for lie, letter in zip(liars.LIES, "abcde", strict=False)
    )
    with Vm(MEMORY, platform="pc", **SEV) as vm:
        for lie, liar in lying.items():
            vm.add_device(liar, name=lie)
        # What the kernel says of one disk would be in the midst of the line about another one.
        _, output = boot(vm, kernel, f"dmesg -n 1\n{reads}\nsleep 5; dmesg | tail -n 20; true", tmp_path)
    print(output)
    assert f"{STATUS}0\n" in output
    assert all(liar.lies for liar in lying.values())
    answers = dict(re.findall(r"^(\w+): (\d+)$", output, re.MULTILINE))
    # The driver does not look at the length, and cannot know that the content is another.
    assert answers["length"] == answers["content"] == "0"
    assert answers["capacity"] != "0"


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_a_disk_grows_while_the_guest_runs(kernel, tmp_path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(8 * MIB))
    command = """
    cat /sys/block/vda/size; echo ready; read go
    for turn in $(seq 100); do [ $(cat /sys/block/vda/size) = 16384 ] || sleep 0.1; done
    cat /sys/block/vda/size
    dd if=/dev/vda bs=1M skip=12 count=1 2>/dev/null | sha256sum
    """
    with Vm(MEMORY, platform="pc", **SEV) as vm:
        vm.add_device(devices.Block(disk), name="disk")
        vm.boot(kernel, initrd=initrd(kernel, command, tmp_path), append="quiet")

        vm.console.expect("ready", timeout=SECONDS)

        def grow() -> None:
            while not vm.running:
                time.sleep(0.01)
            with disk.open("r+b") as file:
                file.seek(12 * MIB)
                file.write(b"x" * 4 * MIB)
            vm.refresh_device("disk")
            vm.console.write("go\n")

        growing = threading.Thread(target=grow)
        growing.start()
        report = vm.run(timeout=SECONDS)
        growing.join()
        output = vm.console.tail(1 << 20).decode(errors="replace").replace("\r\n", "\n")
    assert report.reason == "poweroff", output
    assert output.index("16384\nready") < output.rindex("32768\n")
    assert hashlib.sha256(b"x" * MIB).hexdigest() in output


@pytest.mark.timeout(SECONDS + LASTS + 120)
@pytest.mark.parametrize("kernel", kernels()[-1:])
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
def test_vcpus_convert_while_the_disk_is_busy(kernel, enforcement, tmp_path) -> None:
    """tests/guests/convert converts pages on both vCPUs, and a file is written, read and compared meanwhile."""
    disk, sha256 = image(tmp_path)
    command = f"""
    mkdir /mnt && mount -t ext4 /dev/vda /mnt
    (insmod /convert.ko seconds={LASTS}; echo "$?" >/ended) &
    while [ ! -e /ended ]; do
        echo 3 >/proc/sys/vm/drop_caches; sha256sum </mnt/data
        dd if=/mnt/data of=/mnt/copy bs=1M count={DATA // MIB} 2>/dev/null; sync
        echo 3 >/proc/sys/vm/drop_caches; sha256sum </mnt/copy
    done
    echo "ended: $(cat /ended)"; dmesg | grep workers=; umount /mnt
    """
    files = {"/convert.ko": module(kernel)}
    with Vm(MEMORY, vcpus=2, platform="pc", confidential="sev", enforcement=enforcement) as vm:
        vm.add_device(devices.Block(disk), name="disk")
        _, output = boot(vm, kernel, command, tmp_path, files=files)
        sums = re.findall(r"^([0-9a-f]{64})  -$", output, re.MULTILINE)
        counts = COUNTS.search(output)
        assert counts, output
        print(f"{enforcement}: {len(sums)} times 64 MiB, {counts[0]}")
        workers, asked, failed, _, _, lost = map(int, counts.groups())
        assert (workers, failed, lost) == (2, 0, 0)
        assert "ended: 0\n" in output
        assert asked > LASTS
        assert len(sums) >= 2
        assert set(sums) == {sha256}
    assert hashlib.sha256(file_on(disk, "copy", tmp_path)).hexdigest() == sha256
