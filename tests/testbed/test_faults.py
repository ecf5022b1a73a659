"""KVM_EXIT_MEMORY_FAULT and other failures of KVM_RUN, from a real KVM."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
import time

import pytest
from pagegate import BadBacking, Convert, Deny, Discard, Livelock, Policy, Retry, Vm
from pagegate.guests import Script

from .conftest import LIBC, MIB, PAGE, descriptors, kernel, mapping

MEMORY = 64 * MIB
BIT = 35
SHARED = 1 << BIT
AT = 8 * MIB
PRIVATE_FLAG = 8
EHWPOISON = 133  # not in the errno module


class Recorder(Policy):
    def __init__(self, answer=None) -> None:
        self.answer = answer or Convert()
        self.faults: list = []
        self.poisons: list = []

    def memory_fault(self, fault):
        self.faults.append(fault)
        return self.answer

    def memory_poison(self, poison):
        self.poisons.append(poison)
        return Discard()


@pytest.mark.parametrize("enforcement", ["attributes", "traps"])
def test_private_access_to_a_shared_page(enforcement) -> None:
    policy = Recorder()
    with Vm(MEMORY, policy=policy, shared_bit=BIT, enforcement=enforcement) as vm:
        script = Script()
        word = script.read(AT + 8)
        script.start(vm)
        assert vm.run(timeout=60).reason == "halt"
        (fault,) = policy.faults
        expected = (AT, PAGE, PRIVATE_FLAG, errno.EFAULT, True, "shared")
        assert (fault.gpa, fault.size, fault.flags, fault.errno, fault.private, fault.state) == expected
        assert script.result(vm, word) == 0


@pytest.mark.parametrize("enforcement", ["attributes", "traps"])
def test_shared_access_to_a_private_page(enforcement) -> None:
    policy = Recorder()
    with Vm(MEMORY, policy=policy, shared_bit=BIT, enforcement=enforcement) as vm:
        vm.convert(AT, PAGE, to="private")
        script = Script()
        script.read(SHARED | AT)
        script.start(vm)
        assert vm.run(timeout=60).reason == "halt"
        (fault,) = policy.faults
        expected = (AT, PAGE, PRIVATE_FLAG, errno.EFAULT, False, "private")
        assert (fault.gpa, fault.size, fault.flags, fault.errno, fault.private, fault.state) == expected


@pytest.mark.parametrize("enforcement", ["attributes", "traps"])
def test_the_page_is_taken_away_while_the_vcpu_reads(enforcement) -> None:
    policy = Recorder(Deny())
    with Vm(MEMORY, policy=policy, shared_bit=BIT, enforcement=enforcement) as vm:
        vm.convert(AT, PAGE, to="private")
        rounds = 2 * AT
        script = Script()
        begin = script.add(SHARED | rounds, 1)
        script.touch(AT, 1 << 12, 0)
        script.loop(begin, 1 << 40)
        script.start(vm)

        def take_away() -> None:
            end = time.monotonic() + 50
            while int.from_bytes(vm.read(rounds, 8), "little") < 3:
                assert time.monotonic() < end, "the guest does not read"
                time.sleep(0.001)
            vm.convert(AT, PAGE, to="shared")

        thread = threading.Thread(target=take_away)
        thread.start()
        report = vm.run(timeout=60)
        thread.join()
        assert report.reason == "denied"
        (fault,) = policy.faults
        assert (fault.gpa, fault.size, fault.flags, fault.errno) == (AT, PAGE, PRIVATE_FLAG, errno.EFAULT)
        assert (fault.private, fault.state) == (True, "shared")


@pytest.mark.parametrize("enforcement", ["attributes", "traps"])
def test_shared_bit_ten_thousand_conversions(expecting, enforcement) -> None:
    policy = Recorder()
    pages, rounds = 4, 1250
    with Vm(MEMORY, policy=policy, shared_bit=BIT, enforcement=enforcement) as vm:
        script = expecting(shared_bit=BIT)
        begin = len(script)
        wrong = []

        def check(address: int, byte: int) -> None:
            wrong.append(script.expect(script.check(address, PAGE, byte)))

        for page in range(pages):
            gpa = AT + page * PAGE
            check(gpa, 0)  # private again: reads zeroes
            script.fill(gpa, PAGE, 0x50 + page)
            check(gpa, 0x50 + page)
            check(SHARED | gpa, 0)  # shared again: reads zeroes, not the private bytes
            script.fill(SHARED | gpa, PAGE, 0x60 + page)
        script.loop(begin, rounds)
        script.start(vm)
        report = vm.run(timeout=250)
        assert report.reason == "halt"
        assert [script.result(vm, operation) for operation in wrong] == [0] * len(wrong)
        assert (report.faults, report.conversions) == (2 * pages * rounds, 2 * pages * rounds)
        assert len(policy.faults) == 10_000
        assert {fault.private for fault in policy.faults} == {True, False}
        for page in range(pages):
            assert vm.read(AT + page * PAGE, PAGE) == bytes([0x60 + page]) * PAGE


@pytest.mark.skipif(kernel() < (6, 18), reason="before 6.18 no guest_memfd can be mapped, so none can be poisoned")
def test_poison_is_not_converted_and_a_discard_repairs_it() -> None:
    policy = Recorder()
    madv_hwpoison = 100
    caught: list[int] = []
    previous = signal.signal(signal.SIGBUS, lambda number, frame: caught.append(number))
    try:
        with Vm(MEMORY, policy=policy, enforcement="memslots") as vm:
            vm.convert(AT, 16 * PAGE, to="private")
            script = Script()
            script.fill(AT, 2 * PAGE, 0x77)
            script.out(0xE9, 1)
            word = script.read(AT)
            neighbour = script.check(AT + PAGE, PAGE, 0x77)
            poisoned: list[int] = []

            def poison(io) -> None:
                address = mapping("kvm-gmem") if descriptors("kvm-gmem") else mapping("guest_memfd")
                result = LIBC.madvise(address + AT, PAGE, madv_hwpoison)
                assert result == 0 or ctypes.get_errno() == errno.EBUSY
                poisoned.append(AT)

            vm.on_io(0xE9, poison)
            script.start(vm)
            report = vm.run(timeout=60)
            assert report.reason == "halt"
            assert poisoned == [AT]
            assert report.poisons == 1
            (found,) = policy.poisons
            assert (found.gpa, found.size, found.errno, found.state) == (AT, PAGE, EHWPOISON, "private")
            assert (report.conversions, report.faults, policy.faults) == (0, 0, [])
            assert script.result(vm, word) == 0
            assert script.result(vm, neighbour) == 0
            assert vm.attributes.runs(AT, 16 * PAGE) == [(AT, 16 * PAGE, "private")]
    finally:
        # None if the previous handler was not set from Python, such as faulthandler's.
        signal.signal(signal.SIGBUS, previous or signal.SIG_DFL)


def test_unmapped_host_memory_is_bad_backing() -> None:
    policy = Recorder()
    with Vm(MEMORY, policy=policy) as vm:
        script = Script()
        script.out(0xE9, 1)
        script.read(AT)
        prot_none, prot_rw = 0, 3
        where = mapping("memfd:pagegate-shared") + AT

        def protect(io) -> None:
            assert LIBC.mprotect(where, PAGE, prot_none) == 0

        vm.on_io(0xE9, protect)
        script.start(vm)
        with pytest.raises(BadBacking, match="slot 0") as caught:
            vm.run(timeout=60)
        assert caught.value.vcpu == 0
        assert LIBC.mprotect(where, PAGE, prot_rw) == 0
        assert policy.faults == []
        assert vm.attributes.runs() == [(0, MEMORY, "shared")]
        # The instruction was not executed: once the memory is accessible again, the guest goes on with it.
        assert vm.run(timeout=60).reason == "halt"


@pytest.mark.parametrize("answer", [Convert(), Retry()], ids=repr)
def test_a_page_that_keeps_faulting_is_a_livelock(answer) -> None:
    policy = Recorder(answer)
    with Vm(MEMORY, policy=policy) as vm:
        script = Script(call="hypercall")
        script.map(AT, PAGE, to="private")
        script.out(0xE9, 1)
        script.read(AT)

        def close_the_file(io) -> None:
            # Closes the last descriptor of the file, and puts another file under its number.
            (fd,) = descriptors("gmem") or descriptors("guest_memfd")
            nothing = os.open("/dev/null", os.O_RDWR)
            os.dup2(nothing, fd)
            os.close(nothing)

        vm.on_io(0xE9, close_the_file)
        script.start(vm)
        began = time.monotonic()
        with pytest.raises(Livelock) as caught:
            vm.run(timeout=120)
        assert time.monotonic() - began < 60
        error = caught.value
        assert (error.vcpu, error.gpa, error.state) == (0, AT, "private")
        assert error.rip
        assert f"rip {error.rip:#x}, {error.instruction}, cr2 {error.cr2:#x}: " in str(error)
        assert error.instruction.startswith("mov ")
        assert "explicit to private: converted" in str(error)
        idle = time.process_time()
        time.sleep(1)
        assert time.process_time() - idle < 0.5, "the CPU is not idle afterwards"
        assert policy.faults == [], "a page that is in the accessed state is not the policy's business"
