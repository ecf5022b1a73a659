"""A stock kernel whose disk driver forgets to share the pages of its data: tests/guests/forget.

PAGEGATE_TEST_GUESTS    a folder with the kernels, as in test_linux.py, and with their modules in lib/modules
PAGEGATE_TEST_MODULES   a folder with the module built for them: files forget-RELEASE.ko
"""

from __future__ import annotations

import hashlib
import re

import pytest
from pagegate import Deny, Policy, Stop, Vm, devices
from pagegate.linux.initramfs import STATUS

from .conftest import MIB, PAGE
from .test_linux import SECONDS, kernels
from .test_linux_devices import MEMORY, SEV, boot, initrd
from .test_linux_module import module

HANDED = re.compile(r"forget: gpa=([0-9a-f]+) size=([0-9a-f]+)")
READ = "dd if=/dev/vda of=/dev/null bs=4k count=1 skip=8 iflag=direct 2>/dev/null"
COMMAND = f"""
insmod /forget.ko
{READ}; echo "read: $?"
dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null; echo "write: $?"
rmmod forget; insmod /forget.ko private_view=1
{READ}; echo "private view: $?"
rmmod forget
dd if=/dev/vda bs=64k count=1 iflag=direct 2>/dev/null | sha256sum
dmesg | grep forget:
"""


class Judge(Policy):
    """Answers each access of a device, and keeps it."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.accesses: list[tuple[str, int, int | None, int, bool]] = []

    def device_access(self, access):
        self.accesses.append((access.device, access.queue, access.descriptor, access.gpa, access.write))
        return self.answer


@pytest.fixture
def content(tmp_path) -> bytes:
    """What is on the disk."""
    content = hashlib.shake_256(b"disk").digest(4 * MIB)
    (tmp_path / "disk.img").write_bytes(content)
    return content


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
@pytest.mark.parametrize("kernel", kernels())
def test_a_private_page_is_an_io_error(kernel, enforcement, content, tmp_path) -> None:
    judge = Judge(Deny())
    disk = tmp_path / "disk.img"
    with Vm(MEMORY, policy=judge, platform="pc", confidential="sev", enforcement=enforcement) as vm:
        vm.add_device(devices.Rng())
        vm.add_device(devices.Block(disk), name="root")
        report, output = boot(vm, kernel, COMMAND, tmp_path, files={"/forget.ko": module(kernel, "forget")})
        events = [event for event in vm.events if event.kind == "device"]
        assert [vm.attributes.is_private(event.gpa) for event in events] == [True] * 3
    assert f"{STATUS}0\n" in output, output
    # Three times a page that the driver had not shared, and once more what it had.
    handed = [(int(gpa, 16), int(size, 16)) for gpa, size in HANDED.findall(output)]
    assert [(event.gpa, event.size) for event in events] == handed
    assert [size for _, size in handed] == [PAGE] * 3
    assert [event.write for event in events] == [True, False, True]
    for event in events:
        assert (event.device, event.queue, event.state, event.outcome) == (2, 0, "private", "denied")
    descriptors = [event.descriptor for event in events]
    assert judge.accesses == [
        ("root", 0, descriptor, event.gpa, event.write) for descriptor, event in zip(descriptors, events, strict=True)
    ]
    # The guest sees I/O errors, and goes on.
    assert re.findall(r"^(read|write|private view): 1$", output, re.MULTILINE) == ["read", "write", "private view"]
    assert len(re.findall(r"I/O error, dev vda", output)) == 3
    assert hashlib.sha256(content[: 64 << 10]).hexdigest() in output
    assert disk.read_bytes() == content
    assert report.device_accesses == 3
    first = report.first_device_access
    assert (first.device, first.queue, first.gpa) == ("root", 0, events[0].gpa)


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_a_private_page_ends_the_run(kernel, content, tmp_path) -> None:
    judge = Judge(Stop("the disk was handed a private page"))
    with Vm(MEMORY, policy=judge, platform="pc", **SEV) as vm:
        vm.add_device(devices.Block(tmp_path / "disk.img"), name="root")
        files = {"/forget.ko": module(kernel, "forget")}
        vm.boot(kernel, initrd=initrd(kernel, COMMAND, tmp_path, files), append="quiet")
        report = vm.run(timeout=SECONDS)
        (event,) = (event for event in vm.events if event.kind == "device")
        output = vm.console.tail(1 << 16).decode()
    assert report.reason == "the disk was handed a private page", output
    assert (event.device, event.queue, event.write, event.outcome) == (1, 0, True, "stopped")
    assert [access[3] for access in judge.accesses] == [event.gpa]
    assert "write: " not in output
