"""A stock kernel boots with no page present at first: each comes from a pager when it is touched.

PAGEGATE_TEST_GUESTS    a folder with the kernels, as in test_linux.py
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from pagegate import Vm, linux

from .test_linux import MEMORY, SECONDS, kernels

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.userfault

PAGE = 4096


class Folder:
    """The pages of a snapshot, one at a time."""

    def __init__(self, saved: Path) -> None:
        self.files = {state: (saved / f"{state}.memory").open("rb") for state in ("shared", "private")}
        self.asked: list[tuple[int, str, str]] = []

    def missing(self, page) -> bytes:
        self.asked.append((page.gpa, page.state, page.by))
        file = self.files[page.state]
        file.seek(page.gpa)
        return file.read(page.size)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def booted(kernel: Path, folder: Path, **how) -> Path:
    """A guest that was put aside before its first instruction."""
    initrd = folder / "initrd"
    initrd.write_bytes(linux.build(command="echo came up"))
    with Vm(MEMORY, platform="pc", **how) as vm:
        vm.boot(kernel, initrd=initrd, append="quiet")
        vm.snapshot(folder / "saved")
    return folder / "saved"


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("kernel", kernels()[:1])
def test_linux_boots_on_a_pager_in_python(kernel, tmp_path) -> None:
    saved = booted(kernel, tmp_path, enforcement="traps", private_bit=39)
    pager = Folder(saved)
    with contextlib.closing(pager), Vm.resume(saved, pager=pager, events=1 << 18) as vm:
        # All but what KVM may touch while it is given the vCPU's registers.
        assert vm.memory_usage().missing == MEMORY - len(pager.asked) * PAGE >= MEMORY - 8 * PAGE
        report = vm.run(timeout=SECONDS)
        output = vm.console.tail(1 << 20).decode(errors="replace")
        assert report.reason == "poweroff", output
        assert "came up" in output
        gpas = [(gpa, state) for gpa, state, _ in pager.asked]
        assert len(set(gpas)) == len(gpas)
        # Those that the guest touches, and no others: it has 65,536.
        assert 8000 < len(gpas) < 40000
        assert {by for *_, by in pager.asked} >= {"vcpu"}


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("kernel", kernels()[:1])
def test_linux_boots_on_the_folders_files(kernel, tmp_path) -> None:
    saved = booted(kernel, tmp_path, enforcement="traps", private_bit=39)
    with Vm.resume(saved, lazy=True) as vm:
        report = vm.run(timeout=SECONDS)
        assert report.reason == "poweroff", vm.console.tail(1 << 20).decode(errors="replace")
        assert b"came up" in vm.console.tail(1 << 20)
        pages = [page.gpa for page in vm.working_set()]
        assert len(set(pages)) == len(pages)
