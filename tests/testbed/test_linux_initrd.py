"""The initrd that mounts a root file system (`pagegate guest initramfs --root`), on small disks with busybox."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from pagegate import Vm, devices, linux

from .conftest import MIB
from .test_linux import MEMORY, SECONDS, kernels

if TYPE_CHECKING:
    from pathlib import Path

MODULES = ["virtio_pci", "virtio_blk", "ext4"]
LABEL = "tiny"
INIT = """#!/bin/busybox sh
busybox mount -t proc proc /proc 2>/dev/null
busybox grep ' / ' /proc/mounts
echo "arguments: $*, process $$"
busybox [ -b /dev/vda ] && echo "there is /dev/vda"
busybox poweroff -f
"""


def disk(folder: Path) -> Path:
    """A disk with busybox and an init that tells how it was started."""
    files, path = folder / "files", folder / "disk.img"
    for directory in ("bin", "dev", "proc", "sys", "sbin"):
        (files / directory).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), files / "bin/busybox")
    (files / "sbin/mine").write_text(INIT)
    (files / "sbin/mine").chmod(0o755)
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", LABEL, "-d", str(files), str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("initrd") / "initrd"
    path.write_bytes(linux.build(root=True, modules=MODULES, kernel=kernels()[-1].values[0]))
    return path


def boot(kernel: Path, initrd: Path, folder: Path, append: str) -> tuple[str, str]:
    """How the run ended, and what the guest wrote."""
    with Vm(MEMORY, platform="pc") as vm:
        vm.add_device(devices.Block(disk(folder)))
        vm.boot(kernel, initrd=initrd, append=f"quiet {append}")
        reason = vm.run(timeout=SECONDS).reason
        return reason, vm.console.tail(1 << 16).decode(errors="replace").replace("\r\n", "\n")


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_it_obeys_the_command_line(kernel, initrd, tmp_path) -> None:
    words = f"root=LABEL={LABEL} rootfstype=ext4 rootflags=noatime rw init=/sbin/mine single"
    reason, output = boot(kernel, initrd, tmp_path, words)
    assert reason == "poweroff", output
    assert "/dev/vda / ext4 rw,noatime" in output
    assert "arguments: single, process 1\n" in output
    assert "there is /dev/vda\n" in output


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    ("append", "said"),
    [
        ("root=/dev/vda", "pagegate: there is no /sbin/init on /dev/vda\n"),
        ("root=/dev/vdb", "pagegate: there is no /dev/vdb; there are: vda"),
    ],
)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_it_says_why_it_cannot(kernel, initrd, append, said, tmp_path) -> None:
    reason, output = boot(kernel, initrd, tmp_path, append)
    assert said in output
    assert "Kernel panic - not syncing: Attempted to kill init!" in output
    assert reason == "reboot"
