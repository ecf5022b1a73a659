"""The initrd that `pagegate boot` makes for a root file system on a disk."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from pagegate.cli.boot_devices import BootDevices
from pagegate.cli.boot_initrd import made_initrd

from . import linux_parts as parts
from .boot_parts import command, write_kernel
from .testbed_parts import write_program

NAMES = ("virtio_pci", "virtio_blk", "ext4", "xfs")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The image of a kernel with modules beside it, and a busybox in PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(programs / "busybox", "").write_bytes(parts.busybox())
    monkeypatch.setenv("PATH", str(programs))
    directory = tmp_path / "lib/modules" / parts.RELEASE
    directory.mkdir(parents=True)
    for name in NAMES:
        (directory / f"{name}.ko").write_bytes(parts.module("depends="))
    (tmp_path / "boot").mkdir()
    image = tmp_path / "boot/vmlinuz"
    image.write_bytes(parts.image(parts.RELEASE))
    return image


def asked(*, disks=((Path("disk"), False),), rng=False) -> BootDevices:
    return BootDevices(disks, (), None, rng, "ttyS0")


def loaded(path: Path) -> list[str]:
    """The modules that the initrd loads."""
    init = parts.entries(gzip.decompress(path.read_bytes()))["init"].data.decode()
    assert "switch_root /sysroot" in init
    return [line.split()[1].partition(".")[0].rpartition("/")[2] for line in init.splitlines() if "insmod" in line]


@pytest.mark.parametrize(
    ("append", "file_system"),
    [
        ("root=/dev/vda", "ext4"),
        ("rootfstype=xfs root=LABEL=debian ro", "xfs"),
        ("root=/dev/vda -- rootfstype=xfs", "ext4"),
    ],
)
def test_it_loads_the_disks_modules_and_the_file_systems(kernel, append, file_system):
    with made_initrd(kernel, asked(), append) as (path, missing):
        assert (loaded(path), missing) == (["virtio_pci", "virtio_blk", file_system], "")
    assert not path.exists()


@pytest.mark.parametrize(
    ("given", "append"), [(asked(), "quiet"), (asked(), "quiet -- root=/dev/vda"), (asked(disks=()), "root=/dev/vda")]
)
def test_none_is_made_for_another_root(kernel, given, append):
    with made_initrd(kernel, given, append) as (path, missing):
        assert path is None
        assert "--disk FILE --append root=/dev/vda" in missing


def test_none_is_made_without_modules(kernel, tmp_path):
    (tmp_path / "lib").rename(tmp_path / "elsewhere")
    with made_initrd(kernel, asked(), "root=/dev/vda") as (path, missing):
        assert path is None
        assert f"are not in lib/modules/{parts.RELEASE} beside it" in missing


def test_a_device_without_a_driver_is_a_usage_error(kernel):
    with (
        pytest.raises(click.UsageError, match="no --initrd, and none can be made: there is no module 'virtio_rng'"),
        made_initrd(kernel, asked(rng=True), "root=/dev/vda"),
    ):
        pass


PANIC = b'Kernel panic - not syncing: VFS: Unable to mount root fs on "/dev/vda" or unknown-block(0,0)\r\n'


def boot(*arguments, says) -> SimpleNamespace:
    done = subprocess.run(
        command(*arguments, "--json", guest="reboots", says=says),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return SimpleNamespace(status=done.returncode, hints=json.loads(done.stdout)["hints"])


@pytest.mark.parametrize(
    ("disks", "missing"), [(0, "for a root file system on a disk: --disk FILE --append root=/dev/vda"), (1, "vmlinuz")]
)
def test_a_guest_that_has_no_root_is_told_what_is_missing(tmp_path, disks, missing):
    image, disk = write_kernel(tmp_path), tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    ran = boot(image, "--append", "root=/dev/vda", *["--disk", disk] * disks, says=PANIC)
    assert ran.status == 1
    (hint,) = [hint for hint in ran.hints if "no --initrd" in hint]
    assert missing in hint


def test_a_guest_with_an_initrd_is_not_told(tmp_path):
    image, initrd = write_kernel(tmp_path), tmp_path / "initrd"
    initrd.write_bytes(bytes(4096))
    assert not [hint for hint in boot(image, "--initrd", initrd, says=PANIC).hints if "initrd" in hint]
