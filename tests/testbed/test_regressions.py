"""Bugs with guest_memfd that were fixed."""

from __future__ import annotations

import pytest
from pagegate import PagegateError, Vm

from .conftest import MIB, PAGE

MEMORY = 8 * MIB


def test_writing_cr8_does_not_end_the_run() -> None:
    with Vm(MEMORY) as vm:
        # mov eax, 5; mov cr8, rax; xor eax, eax; mov cr8, rax; mov eax, 7; hlt
        code = "b805000000 440f22c0 31c0 440f22c0 b807000000 f4"
        vm.load(bytes.fromhex(code), at=PAGE)
        vm.vcpus[0].start(rip=PAGE)
        assert vm.run(timeout=60).reason == "halt"
        assert vm.vcpus[0].regs()["rax"] == 7


def test_string_io_from_the_private_view_says_where_it_belongs(recorder) -> None:
    policy = recorder()
    with Vm(MEMORY, shared_bit=35, policy=policy) as vm:
        assert vm.enforcement == "attributes"
        out = []
        vm.on_io(0x55, lambda io: out.append(io.data))
        vm.write(4 * MIB, b"Z")
        vm.load(b"\xba\x55\x00\x00\x00\x6e\xf4", at=PAGE)  # mov edx, 0x55; outsb; hlt
        vm.vcpus[0].start(rip=PAGE, rsi=4 * MIB)
        with pytest.raises(PagegateError, match="operands belong in the shared view"):
            vm.run(timeout=60)
        assert (policy.requests, out) == ([], [])
        assert vm.attributes.runs() == [(0, MEMORY, "shared")]
        assert vm.read(4 * MIB, 1) == b"Z"
        # The same from the shared view.
        vm.vcpus[0].start(rip=PAGE, rsi=4 * MIB | 1 << 35)
        assert vm.run(timeout=60).reason == "halt"
        assert (policy.requests, out) == ([], [b"Z"])
