"""Ending a KVM_RUN that does not return by itself, and leaving no file or thread behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pagegate import Vm
from pagegate.guests import Script, hypercall_instruction

pytestmark = pytest.mark.kvm

PAGE = 4096
# 0.1 s is documented; the rest is for a busy host.
PROMPTLY = 0.5

LOOP = b"\xeb\xfe"
# A hypercall that never returns on some hosts. On the others the endless loop after it runs.
HYPERCALL = {"vmcall": b"\x0f\x01\xc1", "vmmcall": b"\x0f\x01\xd9"}
STARTED = b"\xe6\x80"  # out 0x80, al
INSIDE = 0x8000
COUNTED = b"\xf0\x48\xff\x04\x25" + INSIDE.to_bytes(4, "little")  # lock inc qword ptr [INSIDE]


@pytest.fixture(params=["loop", "hypercall"])
def endless(request):
    return LOOP if request.param == "loop" else HYPERCALL[hypercall_instruction()] + LOOP


def start(vm, code) -> None:
    """Starts all vCPUs; each increments the counter at INSIDE before it executes the code."""
    vm.load(COUNTED + code, at=0x1000)
    for vcpu in vm.vcpus:
        # MAP_GPA_RANGE of no pages, which KVM and pagegate both refuse.
        vcpu.start(rip=0x1000, rax=12, rbx=0, rcx=0, rdx=0)


def wait_until_inside(vm) -> None:
    """Waits until all vCPUs execute the guest's code."""
    end = time.monotonic() + 10
    while vm.read(INSIDE, 8) != len(vm.vcpus).to_bytes(8, "little"):
        assert time.monotonic() < end, "the guest does not begin"
        time.sleep(0.001)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_timeout_brings_every_vcpu_out(make, endless, vcpus) -> None:
    vm = make(vcpus=vcpus)
    start(vm, endless)
    for _ in range(3):
        begun = time.monotonic()
        report = vm.run(timeout=0.2)
        seconds = time.monotonic() - begun
        assert report.reason == "timeout"
        assert 0.2 <= seconds < 0.2 + PROMPTLY


@pytest.mark.parametrize("vcpus", [1, 2])
def test_stop_from_another_thread_brings_every_vcpu_out(make, in_background, endless, vcpus) -> None:
    vm = make(vcpus=vcpus)
    start(vm, endless)
    run = in_background(vm)
    wait_until_inside(vm)
    begun = time.monotonic()
    vm.stop()
    assert run.join().reason == "stopped"
    assert time.monotonic() - begun < PROMPTLY


def test_stop_at_any_moment_is_not_lost(make, in_background) -> None:
    vm = make(vcpus=2)
    start(vm, LOOP)
    for delay in range(40):
        run = in_background(vm)
        run.wait_until_in_progress()
        time.sleep(delay * 0.0002)
        begun = time.monotonic()
        vm.stop()
        assert run.join().reason == "stopped"
        assert time.monotonic() - begun < PROMPTLY


def test_a_script_whose_hypercall_never_returns_times_out_or_is_answered(make) -> None:
    vm = make()
    script = Script(call="hypercall")
    script.map(0x30_0000, PAGE, to="private")
    script.start(vm)
    report = vm.run(timeout=0.3)
    assert (report.reason, vm.attributes.is_private(0x30_0000)) in (("timeout", False), ("halt", True))
    # The machine can still be used.
    script = Script(call="doorbell")
    answer = script.map(0x30_0000, PAGE, to="private")
    script.start(vm)
    assert vm.run(timeout=10).reason == "halt"
    assert script.result(vm, answer) == 0


def test_the_host_converts_while_a_guest_loops(make, in_background, endless) -> None:
    # While slots are replaced every vCPU has to be out of the guest.
    vm = make(vcpus=2)
    start(vm, endless)
    run = in_background(vm)
    wait_until_inside(vm)
    for i in range(20):
        begun = time.monotonic()
        vm.convert(0x30_0000, PAGE, to=["private", "shared"][i % 2])
        assert time.monotonic() - begun < PROMPTLY
    vm.stop()
    assert run.join().reason == "stopped"


CTRL_C = """
    import sys, threading, time
    from pagegate import Policy, Vm

    code, vcpus, policy = bytes.fromhex(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "python"
    with Vm(16 << 20, vcpus=vcpus, policy=Policy() if policy else None) as vm:
        def wait():
            while vm.read(0x8000, 8)[0] < vcpus:
                time.sleep(0.001)
            print("started", flush=True)

        threading.Thread(target=wait, daemon=True).start()
        vm.load(code, at=0x1000)
        for vcpu in vm.vcpus:
            vcpu.start(rip=0x1000, rax=12, rbx=0, rcx=0, rdx=0)
        try:
            vm.run()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            vm.run(timeout=0.05)
            print("usable", flush=True)
"""


@pytest.mark.parametrize("vcpus", [1, 2])
def test_ctrl_c_brings_every_vcpu_out(endless, vcpus) -> None:
    arguments = [sys.executable, "-c", textwrap.dedent(CTRL_C), (COUNTED + endless).hex(), str(vcpus), "python"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "started\n"
            begun = time.monotonic()
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert time.monotonic() - begun < PROMPTLY
            assert child.stdout.readline() == "usable\n"
            assert child.wait(10) == 0
        finally:
            child.kill()


# ---- files


def kvm_fds():
    links = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)}
    return {fd: link for fd, link in links.items() if any(word in link for word in ("kvm", "gmem", "memfd"))}


def _exists(fd) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_all_files_are_closed_on_exec(make) -> None:
    make(vcpus=2, initial="private")
    fds = kvm_fds()
    assert len(fds) >= 5  # the VM, two vCPUs, both sides of memory, and perhaps /dev/kvm
    assert {fd: fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds} == dict.fromkeys(fds, fcntl.FD_CLOEXEC)


def test_a_child_inherits_nothing(make) -> None:
    make(vcpus=2)
    code = """
        import os
        for fd in os.listdir("/proc/self/fd"):
            try:
                print(os.readlink(f"/proc/self/fd/{fd}"))
            except OSError:
                pass
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    child = subprocess.run(arguments, close_fds=False, capture_output=True, text=True, check=True)
    assert "/dev/null" in child.stdout or "pipe:" in child.stdout
    assert not [line for line in child.stdout.splitlines() if "kvm" in line or "memfd" in line or "gmem" in line]


def test_close_leaves_no_file_open() -> None:
    before = kvm_fds()
    vm = Vm(16 << 20, vcpus=2)
    start(vm, LOOP)
    vm.run(timeout=0.05)
    vm.convert(0x30_0000, PAGE, to="private")
    vcpus, attributes = vm.vcpus, vm.attributes
    assert len(kvm_fds()) > len(before)
    vm.close()
    assert kvm_fds() == before
    del vcpus, attributes


def test_machines_that_could_not_be_made_leave_no_file_open() -> None:
    before = kvm_fds()
    for wrong in ({"shared_bit": 51}, {"vcpus": 100_000}, {"vm_type": "tdx"}):
        with pytest.raises(Exception, match="."):
            Vm(16 << 20, **wrong)
    assert kvm_fds() == before


def vcpu_threads():
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append(Path(f"/proc/self/task/{task}/comm").read_text(encoding="ascii"))
    return [name for name in names if name.startswith("pagegate")]


def test_threads_end_with_the_run(make) -> None:
    vm = make(vcpus=2)
    seen = []
    vm.on_io(0x80, lambda _: seen.append(len(vcpu_threads())))
    vm.load(STARTED + LOOP, at=0x1000)
    for vcpu in vm.vcpus:
        vcpu.start(rip=0x1000)
    vm.run(timeout=0.2)
    assert max(seen) == 2
    # A thread that was joined stays in the list until the kernel has removed it.
    end = time.monotonic() + 1.0
    while vcpu_threads() and time.monotonic() < end:
        time.sleep(0.001)
    assert vcpu_threads() == []
