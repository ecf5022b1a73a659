"""Explicit requests by hypercall: different sizes, and malformed ones."""

from __future__ import annotations

import errno

import pytest
from pagegate import Vm
from pagegate.guests import Call, Script

from .conftest import MIB, PAGE

MEMORY = 64 * MIB


def ask(vm: Vm, call: Call, gpa: int, pages: int, attributes: int) -> int:
    script = Script(call=call)
    rax = script.map_raw(gpa, pages, attributes)
    script.start(vm)
    assert vm.run(timeout=60).reason == "halt"
    return script.result(vm, rax)


@pytest.fixture(params=["hypercall", "doorbell"])
def call(request) -> Call:
    return request.param


def test_across_memslots(call) -> None:
    with Vm(MEMORY, memslots=4) as vm:
        assert ask(vm, call, 16 * MIB - PAGE, 2, 16) == 0
        assert vm.attributes.runs(15 * MIB, 2 * MIB)[1] == (16 * MIB - PAGE, 2 * PAGE, "private")
        assert ask(vm, call, 8 * MIB, 40 * MIB // PAGE, 16) == 0
        assert vm.attributes.private_bytes == 40 * MIB
        assert ask(vm, call, 8 * MIB, 40 * MIB // PAGE, 0) == 0
        assert vm.attributes.runs() == [(0, MEMORY, "shared")]


def test_two_mib(call) -> None:
    with Vm(MEMORY) as vm:
        assert ask(vm, call, 8 * MIB, 512, 16 | 1) == 0
        assert vm.attributes.runs(8 * MIB, 2 * MIB) == [(8 * MIB, 2 * MIB, "private")]


def test_the_whole_memory(call) -> None:
    with Vm(MEMORY, initial="private", memslots=2) as vm:
        assert vm.attributes.private_bytes == MEMORY
        assert ask(vm, call, 0, MEMORY // PAGE, 0) == 0
        assert vm.attributes.runs() == [(0, MEMORY, "shared")]


@pytest.mark.parametrize(
    ("gpa", "pages", "attributes"),
    [
        (0x1000, 1 << 52, 16),
        (0x1000, (1 << 52) - 1, 16),
        (0x1000, 1 << 40, 16),
        (0, MEMORY // PAGE + 1, 16),
        (MEMORY, 1, 16),
        (1 << 45, 1, 16),
        (8 * MIB, 1, 16 | 32),
        (8 * MIB, 1, 1 << 63),
        (8 * MIB, 1, 16 | 3),
        (8 * MIB, 1, 15),
        (8 * MIB + 8, 1, 16),
        (8 * MIB, 0, 16),
    ],
)
def test_malformed(call, gpa: int, pages: int, attributes: int) -> None:
    def judge(request) -> None:
        raise AssertionError(request)

    class Never:
        map_gpa_range = staticmethod(judge)
        memory_fault = staticmethod(judge)

    with Vm(MEMORY, policy=Never()) as vm:
        rax = ask(vm, call, gpa, pages, attributes)
        by_kvm = call == "hypercall" and (gpa % PAGE or pages == 0)
        # An errno from KVM itself is negative; from pagegate it is positive, as SNP and TDX guests expect.
        assert rax == (-errno.EINVAL if by_kvm else errno.EINVAL)
        assert vm.attributes.runs() == [(0, MEMORY, "shared")]
