"""A limit of the process is raised step by step, until a machine can be made, started or booted, recorded and run.

Below that there is one clear error each time, after which nothing is left, and the same process goes on. The errors of
ioctls are in tests/fake/test_sweep.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import boot_parts, programs

if TYPE_CHECKING:
    from pathlib import Path

PARTS = """
import ctypes, os, resource, sys, time
from pagegate import PagegateError, Vm, trace
from pagegate.testing import Fake, Step

# What malloc gives comes from memory that the process has already, so that mmap is what fails.
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
for option, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
    assert libc.mallopt(option, value) == 1
libc.free(libc.malloc(64 << 20))

def bare():
    vm = Vm(16 << 20, vcpus=3, policy_timeout=5.0)
    vm.load(b"\\xf4", at=0x1000)
    for vcpu in vm.vcpus:
        vcpu.start(rip=0x1000)
    return vm

def booted():
    steps = [Step.hypercall(0x20_0000, 1, 0), Step.io_write(0x600, [0x34])]
    pc = {"platform": "pc", "confidential": "sev", "enforcement": "traps"}
    vm = Vm(64 << 20, vcpus=2, hypervisor=Fake(steps, []), policy_timeout=5.0, **pc)
    vm.boot("vmlinuz")
    return vm

def work(make):
    with make() as vm, trace.Recorder(vm, "events.arrow"):
        assert vm.run(timeout=20).reason in ("halt", "poweroff")

def threads():
    # KVM gives a process a thread of the kernel's when a vCPU of it first runs; it ends with the machine.
    found = 0
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as comm:
                found += not comm.read().startswith("kvm-")
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found

def left():
    return len(os.listdir("/proc/self/fd")), threads()

def is_left(before):
    # A thread that has been joined is still listed for a moment.
    end = time.monotonic() + 5
    while left() != before and time.monotonic() < end:
        time.sleep(0.001)
    return left() == before

def walk(make, limit, limits):
    '''Does the work under each of these limits, until it works; returns the errors, and the longest that one took.'''
    work(make)
    before, errors, longest = left(), set(), 0
    unlimited = resource.getrlimit(limit)
    for most in limits():
        began = time.monotonic()
        resource.setrlimit(limit, (most, unlimited[1]))
        try:
            work(make)
            return errors, longest
        except (PagegateError, OSError, MemoryError) as error:
            errors.add(str(error) or type(error).__name__)
        finally:
            resource.setrlimit(limit, unlimited)
        longest = max(longest, time.monotonic() - began)
        assert is_left(before), (most, left(), before)
    raise AssertionError(f"it never worked: {errors}")

def check(found, *causes, steps):
    errors, longest = found
    assert all(any(cause in error for cause in causes) for error in errors), errors
    assert len(errors) >= steps, errors
    assert longest < 10, longest
"""
MACHINES = [pytest.param("bare", marks=pytest.mark.kvm), "booted"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the programs run: anybody may write there."""
    boot_parts.write_kernel(tmp_path)
    (tmp_path / "events.arrow").write_bytes(b"")
    (tmp_path / "events.arrow").chmod(0o666)
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    # Python's own allocator would map memory.
    monkeypatch.setenv("PYTHONMALLOC", "malloc")


@pytest.mark.parametrize("machine", MACHINES)
def test_descriptors(machine: str) -> None:
    programs.passes(
        f"""
        found = walk({machine}, resource.RLIMIT_NOFILE, lambda: range(left()[0], left()[0] + 60))
        check(found, "EMFILE", "Too many open files", steps=3)
        """,
        PARTS,
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_address_space(machine: str) -> None:
    programs.passes(
        f"""
        def limits():
            with open("/proc/self/statm") as statm:
                now = int(statm.read().split()[0]) * 4096
            return range(now, now + (256 << 20), 128 << 10)
        found = walk({machine}, resource.RLIMIT_AS, limits)
        check(found, "ENOMEM", "EAGAIN", "Cannot allocate memory", "Resource temporarily unavailable", steps=3)
        """,
        PARTS,
    )


@pytest.mark.parametrize("machine", MACHINES)
def test_threads(machine: str) -> None:
    programs.passes(
        f"""
        work({machine})
        # Root may make threads whatever the limit is. The files of the interpreter and /dev/kvm are open by now.
        vm = {machine}()
        if os.geteuid() == 0:
            os.setresuid(65534, 65534, 65534)
        errors = set()
        for more in range(10):
            resource.setrlimit(resource.RLIMIT_NPROC, (left()[1] + more, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
            before = left()
            try:
                with trace.Recorder(vm, "events.arrow"):
                    assert vm.run(timeout=20).reason in ("halt", "poweroff")
                break
            except (PagegateError, OSError) as error:
                errors.add(str(error))
            assert is_left(before), (more, left(), before)
            assert not vm.running
        else:
            raise AssertionError(f"it never worked: {{errors}}")
        vm.close()
        check((errors, 0), "EAGAIN", "Resource temporarily unavailable", steps=2)
        """,
        PARTS,
    )
