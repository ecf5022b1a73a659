"""A small guest is put aside and goes on, on this host's KVM: what it counts goes on where it was."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest
from pagegate import Vm

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


@pytest.mark.parametrize("kwargs", [{}, {"shared_bit": 35}, {"private_bit": 35, "memslots": 2}])
def test_what_it_counts_goes_on(tmp_path: Path, kwargs) -> None:
    with Vm("16M", enforcement="memslots", debug_private=True, **kwargs) as vm:
        vm.load(COUNTS, at=0x1000)
        vm.vcpus[0].start(mode="long", rip=0x1000, rsp=0x8000, rbx=0x1234, r15=99)
        assert outputs(vm, 5) == [1, 2, 3, 4, 5]
        vm.convert(0x80_0000, 4 * PAGE, to="private")
        vm.write(0x80_0000, b"private bytes")
        vm.snapshot(tmp_path / "saved")
        states, registers = vm.attributes.runs(), vm.vcpus[0].regs()
    for _ in range(3):
        with Vm.resume(tmp_path / "saved", debug_private=True) as again:
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
