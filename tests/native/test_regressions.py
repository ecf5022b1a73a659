"""Bugs on /dev/kvm that were fixed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
from pagegate import Deny
from pagegate.guests import Script

from tests.programs import passes

pytestmark = pytest.mark.kvm

PAGE = 4096
COUNTER = 0x40_0000
WORDS = 0x50_0000


def test_the_host_converts_while_the_only_vcpu_runs(make, in_background, expecting) -> None:
    vm = make(enforcement="memslots")
    script = expecting()
    begin = script.fill(WORDS, 4 * PAGE, 0x5A)
    wrong = script.expect(script.check(WORDS, 4 * PAGE, 0x5A))
    script.touch(WORDS, 16)
    script.add(COUNTER, 1)
    rounds = script.count()
    script.goto_unless(COUNTER + PAGE, 1, begin)  # until the host has converted often enough
    script.start(vm)
    run = in_background(vm, timeout=120.0)
    run.wait_until_in_progress()
    for i in range(2000):
        vm.convert(0x80_0000, PAGE, to=["private", "shared"][i % 2])
        if run.error is not None:
            break
    vm.write(COUNTER + PAGE, (1).to_bytes(8, "little"))
    assert run.join(within=60.0).reason == "halt"
    assert script.result(vm, wrong) == 0
    assert script.result(vm, rounds) == int.from_bytes(vm.read(COUNTER, 8), "little") > 0


ALL_BLOCKED = """
    import signal
    from pagegate import Vm

    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with Vm(1 << 20) as vm:
        vm.load(b"\\xeb\\xfe", at=0x1000)
        vm.vcpus[0].start(rip=0x1000)
        print(vm.run(timeout=0.5).reason)
"""


def test_a_run_times_out_when_its_caller_blocks_all_signals() -> None:
    arguments = [sys.executable, "-c", textwrap.dedent(ALL_BLOCKED)]
    # Without the kick the run never ends and has to be killed.
    child = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True)
    assert child.stdout == "timeout\n"


def test_one_vcpu_does_not_pass_a_barrier_for_two(make) -> None:
    vm = make()
    script = Script()
    script.barrier(COUNTER, 2)
    script.start(vm)
    assert vm.run(timeout=0.5).reason == "timeout"
    assert vm.read(COUNTER, 8) == (1).to_bytes(8, "little")


def test_a_barrier_keeps_two_vcpus_in_step(make) -> None:
    rounds = 20
    vm = make(vcpus=2)
    seen = []
    lock = threading.Lock()

    def look(_) -> None:
        with lock:
            seen.append(int.from_bytes(vm.read(COUNTER, 8), "little"))

    vm.on_io(0xE9, look)
    for vcpu in range(2):
        script = Script()
        begin = script.add(COUNTER, 1)
        script.barrier(COUNTER + PAGE, 2)
        script.out(0xE9, 1)  # both vCPUs have counted, and neither goes on before both are here
        script.barrier(COUNTER + 2 * PAGE, 2)
        script.loop(begin, rounds)
        script.start(vm, vcpu, at=0x1000 + vcpu * 0x10000)
    assert vm.run(timeout=60).reason == "halt"
    assert seen == [2 * count for count in range(1, rounds + 1) for _ in range(2)]


def test_an_instruction_that_crosses_into_the_other_view_is_a_request(make, recorder) -> None:
    shared_bit = 35
    policy = recorder(Deny())
    vm = make(enforcement="memslots", shared_bit=shared_bit, policy=policy)
    code = b"\x48\xb8" + bytes(range(1, 9)) + b"\xf4"  # mov rax, imm64; hlt
    vm.load(code, at=2 * PAGE - 4)
    vm.convert(2 * PAGE, PAGE, to="private")
    vm.vcpus[0].start(rip=2 * PAGE - 4)
    assert vm.run(timeout=20).reason == "denied"
    (fault,) = policy.requests
    assert (fault.gpa, fault.size, fault.private, fault.state) == (2 * PAGE, PAGE, False, "private")
    # The rest of the instruction, now in the view through which it is fetched.
    vm.convert(2 * PAGE, PAGE, to="shared")
    vm.write(2 * PAGE, code[4:])
    assert vm.run(timeout=20).reason == "halt"
    assert vm.vcpus[0].regs()["rax"] == int.from_bytes(range(1, 9), "little")
    assert len(policy.requests) == 1


def test_a_forked_child_that_exits_leaves_a_running_machine_alone(tmp_path) -> None:
    code = f"""
        import os, sys, threading, time
        from pagegate import Vm, devices
        vm = Vm(64 << 20, platform="pc")
        vm.add_device(devices.Vsock(5, {str(tmp_path / "vsock")!r}))
        vm.write(0x1000, bytes([0xE6, 0x10, 0xEB, 0xFC]))  # out 0x10, al; jmp to it
        count, reports = [0], []
        def out(io):
            count[0] += 1
        vm.on_io(0x10, out)
        vm.vcpus[0].start(mode="long", rip=0x1000)
        thread = threading.Thread(target=lambda: reports.append(vm.run(timeout=60)))
        thread.start()
        while not count[0]:
            time.sleep(0.01)
        for drops in (False, True):
            pid = os.fork()
            if pid == 0:
                if drops:
                    del vm
                sys.exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
            before, end = count[0], time.monotonic() + 10
            while count[0] == before and time.monotonic() < end:
                time.sleep(0.01)
            assert count[0] > before and os.path.exists({str(tmp_path / "vsock")!r})
        vm.stop()
        thread.join()
        assert reports[0].reason == "stopped"
        vm.close()
    """
    passes(code)
