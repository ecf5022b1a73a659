"""A small guest is put aside and goes on, on this host's KVM: what it counts goes on where it was."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest
from pagegate import PagegateError, Vm

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096
COUNT = 0x5000
# again: mov rax, [COUNT]; inc rax; mov [COUNT], rax; out 0xe9, al; jmp again
COUNTS = bytes.fromhex("488b042500500000 48ffc0 4889042500500000 e6e9 ebe9")


def outputs(vm: Vm, number: int) -> list[int]:
    """What a guest writes to port 0xe9 until it has written so often."""
    seen: list[int] = []

    def handler(io) -> None:
        seen.append(io.data[0])
        if len(seen) == number:
            vm.stop()

    vm.on_io(0xE9, handler)
    assert vm.run(timeout=60).reason == "stopped"
    return seen


@pytest.mark.parametrize("lazy", [False, pytest.param(True, marks=pytest.mark.userfault)], ids=["eager", "lazy"])
@pytest.mark.parametrize("kwargs", [{}, {"shared_bit": 35}, {"private_bit": 35, "memslots": 2}])
def test_what_it_counts_goes_on(tmp_path: Path, kwargs, lazy) -> None:
    with Vm("16M", enforcement="memslots", debug_private=True, **kwargs) as vm:
        vm.load(COUNTS, at=0x1000)
        vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000, rbx=0x1234, r15=99)
        assert outputs(vm, 5) == [1, 2, 3, 4, 5]
        vm.convert(0x80_0000, 4 * PAGE, to="private")
        vm.write(0x80_0000, b"private bytes")
        vm.snapshot(tmp_path / "saved")
        states, registers = vm.attributes.runs(), vm.vcpus[0].regs()
    for _ in range(3):
        with Vm.resume(tmp_path / "saved", debug_private=True, lazy=lazy) as again:
            assert again.attributes.runs() == states
            assert again.vcpus[0].regs() == registers
            assert again.read(0x80_0000, 13) == b"private bytes"
            assert outputs(again, 4) == [6, 7, 8, 9]
            assert again.vcpus[0].regs()["r15"] == 99


def test_another_process_goes_on(tmp_path: Path) -> None:
    with Vm("16M", enforcement="memslots") as vm:
        vm.load(COUNTS, at=0x1000)
        vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000)
        assert outputs(vm, 2) == [1, 2]
        vm.snapshot(tmp_path / "saved")
        program = textwrap.dedent(
            f"""
            from pagegate import Vm
            vm = Vm.resume({str(tmp_path / "saved")!r})
            vm.on_io(0xE9, lambda io: (print(io.data[0]), vm.stop()))
            print(vm.run(timeout=60).reason)
            """
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
        assert (done.stdout, done.stderr) == ("3\nstopped\n", "")
    # The first one was not disturbed.
    with Vm.resume(tmp_path / "saved") as again:
        assert outputs(again, 1) == [3]


@pytest.mark.userfault
def test_each_page_is_read_once_and_only_what_is_touched(tmp_path: Path) -> None:
    with Vm("64M", enforcement="memslots") as vm:
        vm.load(COUNTS, at=0x1000)
        vm.write("16M", b"z" * (32 << 20))
        vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000)
        assert outputs(vm, 1) == [1]
        vm.snapshot(tmp_path / "saved")
    with Vm.resume(tmp_path / "saved", lazy=True) as again:
        assert outputs(again, 3) == [2, 3, 4]
        pages = again.working_set()
        assert {page.by for page in pages} <= {"vcpu", "kvm", "host"}
        assert {page.vcpu for page in pages if page.by == "vcpu"} == {0}
        assert {0x1000, COUNT} <= {page.gpa for page in pages}
        assert len({page.gpa for page in pages}) == len(pages)
        assert again.memory_usage().missing >= 32 << 20


@pytest.mark.userfault
def test_a_page_that_cannot_be_had_ends_the_run(tmp_path: Path) -> None:
    # mov al, [0x400000]; out 0xe9, al; hlt
    reads = bytes.fromhex("8a042500004000 e6e9 f4")
    with Vm("16M", enforcement="memslots") as vm:
        vm.load(reads, at=0x1000)
        vm.write("4M", b"k" * PAGE)
        vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000)
        vm.snapshot(tmp_path / "saved")
    path = tmp_path / "saved" / "shared.memory"
    with Vm.resume(tmp_path / "saved", lazy=True) as again:
        again.on_io(0xE9, lambda io: pytest.fail(f"the guest has read {io.data!r}"))
        with path.open("r+b") as file:
            file.truncate(4 << 20)
        begun = time.monotonic()
        with pytest.raises(PagegateError, match=r"page 0x400000 has no bytes yet, vCPU 0 touched it") as raised:
            again.run(timeout=30)
        assert (raised.value.gpa, raised.value.vcpu, raised.value.report.reason) == (0x40_0000, 0, "failed")
        # Where KVM emulates the load, it does not let go of it, and the machine is lost.
        with pytest.raises(PagegateError, match="no bytes yet|this machine is lost"):
            again.run(timeout=30)
        with pytest.raises(PagegateError, match="no bytes yet|this machine is lost"):
            again.snapshot(tmp_path / "other")
        assert time.monotonic() - begun < 10


@pytest.mark.userfault
@pytest.mark.parametrize("kwargs", [{}, {"private_bit": 35}])
def test_it_is_put_back_again_and_again(tmp_path: Path, kwargs) -> None:
    with Vm("16M", enforcement="memslots", **kwargs) as vm:
        vm.load(COUNTS, at=0x1000)
        vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000)
        assert outputs(vm, 3) == [1, 2, 3]
        vm.snapshot(tmp_path / "saved")
    seen: list[int] = []
    with Vm.resume(tmp_path / "saved", lazy=True) as again:
        again.on_io(0xE9, lambda io: (seen.append(io.data[0]), len(seen) % 3 or again.stop()))
        for number in range(50):
            assert again.run(timeout=60).reason == "stopped"
            assert seen == [4, 5, 6] * (number + 1)
            again.convert(0x80_0000, PAGE, to="private")
            again.reset_to(tmp_path / "saved")
            assert not again.attributes.is_private(0x80_0000)
