"""Accesses that KVM emulates under memslots: where they were made from, and those that write back what they read."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time

import pytest
from pagegate import Convert
from pagegate.guests import Script

pytestmark = pytest.mark.kvm

PAGE = 4096
DATA = 0x30_0000
CODE = 0x1000
TARGET = 0x3000
HLT = b"\xf4"
STORES = {
    "store": (b"\x89\x07", CODE + 2),  # mov [rdi], eax
    "store-with-prefix": (b"\x3e\x89\x07", CODE + 3),
    "push": (b"\x57", CODE + 1),  # push rdi
    "call": (b"\xff\xd6", TARGET),  # call rsi
}
LOADS = {
    "load": b"\x8b\x07",  # mov eax, [rdi]
    "pop": b"\x58",  # pop rax
    "add": b"\x83\x07\x01",  # add dword [rdi], 1
    "locked-add": b"\xf0\x83\x07\x01",
    "exchange": b"\x87\x07",  # xchg [rdi], eax
    "compare-and-exchange": b"\xf0\x0f\xb1\x37",  # lock cmpxchg [rdi], esi
}


def run(vm, code, *, rip=CODE):
    vm.load(code + HLT, at=CODE)
    vm.load(HLT, at=TARGET)
    vm.vcpus[0].start(mode="long", rip=rip, rdi=DATA, rsi=TARGET | 1 << vm.shared_bit, rsp=DATA + 0x800)
    return vm.run(timeout=20)


def asked_from(vm, policy):
    """Code is fetched through the shared view."""
    return [(fault.rip & ~(1 << vm.shared_bit), fault.executed) for fault in policy.requests]


@pytest.mark.parametrize("name", LOADS)
def test_a_load_is_asked_for_from_its_own_instruction(make, recorder, shared_bit, name) -> None:
    policy = recorder()
    vm = make(policy=policy, shared_bit=shared_bit)
    assert run(vm, LOADS[name]).reason == "halt"
    assert asked_from(vm, policy) == [(CODE, False)]


@pytest.mark.parametrize("name", STORES)
def test_a_store_says_whether_it_was_executed(make, recorder, shared_bit, name) -> None:
    code, behind = STORES[name]
    policy = recorder()
    vm = make(policy=policy, shared_bit=shared_bit)
    assert run(vm, code).reason == "halt"
    emulated = vm.enforcement == "memslots"
    assert asked_from(vm, policy) == [(behind if emulated else CODE, emulated)]


def test_nothing_tells_where_an_executed_store_began(make, shared_bit) -> None:
    """Why ``rip`` cannot be the store's own: two guests that differ in it and in nothing that can be read."""
    seen = []

    class Look:
        def memory_fault(self, fault):
            seen.append((fault.rip, repr(fault.regs), fault.regs.rflags, vm.read(CODE, 16), fault.gpa))
            return Convert()

    for rip in (CODE, CODE + 1):
        vm = make(policy=Look(), shared_bit=shared_bit)
        run(vm, b"\x3e\x89\x07", rip=rip)
    if vm.enforcement == "memslots":
        assert seen[0] == seen[1]
    else:
        assert seen[1][0] - seen[0][0] == 1


@pytest.mark.parametrize("wrong", [0, 1], ids=["first-wrong", "second-wrong"])
@pytest.mark.parametrize("to", ["private", "shared"])
def test_a_straddling_read_modify_write(make, shared_bit, to, wrong) -> None:
    vm = make(shared_bit=shared_bit)
    view = 0 if to == "private" else 1 << shared_bit
    at = DATA + PAGE - 2
    other = {"private": "shared", "shared": "private"}
    vm.convert(DATA, 2 * PAGE, to=to)
    vm.convert(DATA + wrong * PAGE, PAGE, to=other[to])
    # add dword [rdi], esi, twice; mov eax, [rdi]
    vm.load(b"\x01\x37\x01\x37\x8b\x07" + HLT, at=CODE)
    vm.vcpus[0].start(mode="long", rip=CODE, rdi=at | view, rsi=0x0201_0403)
    report = vm.run(timeout=20)
    assert (report.reason, report.faults) == ("halt", 1)
    assert vm.vcpus[0].regs()["rax"] == 0x0402_0806
    assert vm.attributes.state(DATA, 2 * PAGE) == to


def test_atomic_adds_lose_nothing_while_the_page_changes(make, shared_bit) -> None:
    class Keep:
        def memory_fault(self, fault):
            return Convert(discard=False)

    vm = make(vcpus=3, shared_bit=shared_bit, policy=Keep())
    # Enough for the vCPUs to take turns, of which the testbed has one CPU.
    rounds = 2_000_000 if os.environ.get("PAGEGATE_TESTBED") else 2000
    meeting = 0x50_0000 | 1 << shared_bit
    for vcpu in range(2):
        adds = Script()
        top = adds.add(DATA, 1)
        adds.add(DATA + 2048, 1)
        adds.loop(top, rounds)
        adds.barrier(meeting, 3)
        adds.start(vm, vcpu, at=CODE + vcpu * 0x10000)
    flips = Script()
    top = flips.read(DATA | 1 << shared_bit)
    flips.loop(top, rounds)
    flips.barrier(meeting, 3)
    sums = [flips.read(DATA), flips.read(DATA + 2048)]
    flips.start(vm, 2, at=CODE + 0x20000)
    report = vm.run(timeout=60)
    assert report.reason == "halt"
    assert report.faults > 2
    assert [flips.result(vm, value) for value in sums] == [2 * rounds] * 2


@pytest.mark.parametrize("end", ["stop", "timeout", "ctrl-c"])
def test_an_add_on_a_page_that_changes_for_ever_does_not_keep_a_run_from_ending(make, shared_bit, end) -> None:
    """One vCPU adds, a hostile one converts the page to and fro; neither ends by itself."""
    vm = make(vcpus=2, shared_bit=shared_bit, events=256)
    adds = Script()
    adds.loop(adds.add(DATA, 1), 1 << 40)
    adds.start(vm, 0, at=CODE)
    flips = Script()
    top = flips.read(DATA | 1 << shared_bit)
    flips.read(DATA)
    flips.loop(top, 1 << 40)
    flips.start(vm, 1, at=CODE + 0x10000)

    moment, told = 0.5, []
    ends = {"stop": vm.stop, "ctrl-c": lambda: signal.raise_signal(signal.SIGINT)}

    def tell() -> None:
        told.append(time.monotonic())
        ends[end]()

    for _ in range(5):  # the fastest of a few: other work may keep the processors busy
        told.clear()
        begun = time.monotonic()
        if end == "timeout":
            report = vm.run(timeout=moment)
            assert report.reason == "timeout"
            told.append(begun + moment)
        else:
            timer = threading.Timer(moment, tell)
            timer.start()
            try:
                assert vm.run(timeout=30).reason == "stopped"
            except KeyboardInterrupt:
                assert end == "ctrl-c"
            timer.join()
        took = time.monotonic() - told[0]
        if took < 0.1:
            break
    assert took < 0.1
    assert len(vm.events) <= 256
    assert vm.attributes.generation > 2
    begun = time.monotonic()
    vm.close()
    assert time.monotonic() - begun < 1


def test_only_what_was_read_is_taken_back(make, shared_bit) -> None:
    """A store after a load through the wrong view is another instruction, and what lies between is executed once."""
    vm = make(shared_bit=shared_bit)
    vm.write(0x38_0000, struct.pack("<Q", 0))
    # mov eax, [rdi]; inc qword [rbx]; mov [rdi], ecx; hlt
    vm.load(b"\x8b\x07\x48\xff\x03\x89\x0f" + HLT, at=CODE)
    vm.vcpus[0].start(mode="long", rip=CODE, rdi=DATA, rbx=0x38_0000 | 1 << shared_bit, rcx=7)
    assert vm.run(timeout=20).reason == "halt"
    assert vm.read(0x38_0000, 8) == struct.pack("<Q", 1)
