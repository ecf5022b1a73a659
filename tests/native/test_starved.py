"""A host that is short of something, and machines by the thousand: one clear error, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
from pathlib import Path

import pytest
from pagegate import Convert, PagegateError, Vm
from pagegate.guests import Script
from pagegate.testing import Fake, Step

from tests import programs

kvm = pytest.mark.kvm
PAGE = 4096


# ---- short of something


@kvm
def test_no_descriptors_are_left() -> None:
    # Whatever step it is at which they run out, it says so, and gives back what it had.
    programs.passes(
        """
        import os, resource
        from pagegate import PagegateError, Vm
        before = len(os.listdir("/proc/self/fd"))
        first, errors = before, set()
        for limit in range(before, before + 40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
            try:
                with Vm(16 << 20, vcpus=2) as vm:
                    vm.vcpus[0].start(rip=0x1000)
                break
            except (PagegateError, OSError) as error:
                errors.add(str(error))
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            assert len(os.listdir("/proc/self/fd")) == before, limit
        else:
            raise AssertionError("it never worked")
        assert errors and all("EMFILE" in error or "Too many open files" in error for error in errors), errors
        """
    )


@kvm
def test_no_threads_can_be_made() -> None:
    programs.passes(
        """
        import os, resource, sys
        from pagegate import PagegateError, Vm
        vm = Vm(16 << 20, vcpus=4)
        vm.load(b"\\xf4", at=0x1000)
        for vcpu in vm.vcpus:
            vcpu.start(rip=0x1000)
        # Root may make threads whatever the limit is.
        os.setresuid(65534, 65534, 65534)
        used = sum(1 for _ in os.listdir("/proc/self/task"))
        resource.setrlimit(resource.RLIMIT_NPROC, (used, used))
        try:
            vm.run(timeout=10)
        except PagegateError as error:
            assert "start a vCPU thread" in str(error) and "EAGAIN" in str(error), error
        else:
            raise AssertionError("it ran")
        assert not vm.running
        resource.setrlimit(resource.RLIMIT_NPROC, (used, used))
        vm.close()
        """
    )


@kvm
@pytest.mark.parametrize("memory", [16 << 20, 1 << 30])
def test_no_address_space_is_left(memory: int) -> None:
    programs.passes(
        f"""
        import resource
        from pagegate import PagegateError, Vm
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * 4096
        # Too little for any of its maps of the guest's memory, and then a little more.
        for more in (1 << 20, {memory} // 2, {memory} + (1 << 20)):
            resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))
            try:
                Vm({memory}).close()
            except (PagegateError, MemoryError) as error:
                assert "ENOMEM" in str(error) or isinstance(error, MemoryError), error
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        Vm({memory}).close()
        """
    )


def test_no_memory_is_left_for_the_log() -> None:
    # The guest decides how much the log takes, so that it must not end the process: the log keeps fewer events.
    programs.passes(
        """
        import ctypes, resource
        from pagegate import Vm
        from pagegate.testing import Fake, Step
        # M_ARENA_MAX: one heap, which ends where the limit is.
        assert ctypes.CDLL(None).mallopt(-8, 1) == 1
        limited = []
        def limit(io):
            if not limited:
                limited.append(True)
                with open("/proc/self/statm") as statm:
                    now = int(statm.read().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (now, resource.RLIM_INFINITY))
        asks = [Step.hypercall(0x8000, 1, 16), Step.hypercall(0x8000, 1, 0)]
        fake = Fake([Step.io_write(0x77, b"!"), *asks], cycles=20_000)
        with Vm(64 * 4096, hypervisor=fake, events=1 << 20) as vm:
            vm.on_io(0x77, limit)
            vm.vcpus[0].start(rip=0x1000)
            report = vm.run(timeout=50)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            assert (report.reason, report.conversions) == ("halt", 40_000), report
            kept = [event.sequence for event in vm.events]
            assert kept == list(range(40_000 - len(kept), 40_000)), kept
            assert 0 < len(kept) < 40_000
            assert (vm.events.total, vm.events.dropped) == (40_000, 40_000 - len(kept))
        """
    )


@pytest.mark.parametrize("found", ["nothing", "no permission", "no KVM"])
def test_no_kvm_is_an_error_that_says_what_to_do(found: str, tmp_path: Path) -> None:
    # In a mount namespace of its own, with another /dev/kvm.
    if os.geteuid() != 0:
        pytest.skip("needs root, to make a mount namespace")
    program = f"""
        import ctypes, os, sys
        from pagegate import KvmUnavailable, Vm
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x20000) == 0
        assert libc.mount(b"none", b"/", None, 0x40000 | 0x4000, None) == 0
        found = {found!r}
        if found == "nothing":
            assert libc.mount(b"tmpfs", b"/dev", b"tmpfs", 0, None) == 0
        elif os.path.exists("/dev/kvm"):
            assert libc.mount({str(tmp_path / "kvm").encode()!r}, b"/dev/kvm", None, 0x1000, None) == 0
        else:
            sys.exit(77)
        if found == "no permission":
            os.setresuid(65534, 65534, 65534)
        try:
            Vm(16 << 20)
        except KvmUnavailable as error:
            print(error)
    """
    (tmp_path / "kvm").write_bytes(b"")
    (tmp_path / "kvm").chmod(0o600)
    done = programs.run(program)
    if done.returncode == 77:
        pytest.skip("there is no /dev/kvm to hide")
    assert (done.returncode, done.stderr) == (0, "")
    assert "/dev/kvm" in done.stdout
    remedy = {"nothing": "load", "no permission": "group", "no KVM": ""}[found]
    assert remedy in done.stdout, done.stdout


# ---- by the thousand


def left() -> tuple[int, int, list[object]]:
    """Descriptors, threads, and what is done on the signals that a program may care for."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGSEGV)]
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), signals


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


class Raises:
    def map_gpa_range(self, call: object) -> Convert:
        raise ZeroDivisionError

    def memory_fault(self, fault: object) -> Convert:
        raise ZeroDivisionError


# Each makes one machine, and drops it at another stage.
def bad_argument() -> None:
    with pytest.raises(ValueError, match="shared_bit"):
        Vm(64 * PAGE, hypervisor=Fake([]), shared_bit=3)


def never_run() -> None:
    Vm(64 * PAGE, hypervisor=Fake([Step.halt()]))


def closed() -> None:
    with Vm(64 * PAGE, hypervisor=Fake([Step.halt()])) as vm:
        vm.vcpus[0].start(rip=0x1000)
        vm.run(timeout=10)


def a_hook_raises() -> None:
    vm = Vm(64 * PAGE, hypervisor=Fake([Step.hypercall(0x8000, 1, 16)]), policy=Raises())
    vm.vcpus[0].start(rip=0x1000)
    with pytest.raises(ZeroDivisionError):
        vm.run(timeout=10)


def a_cycle() -> None:
    vm = Vm(64 * PAGE, hypervisor=Fake([Step.io_read(0x80)]))
    vm.on_io(0x80, lambda _: (vm.events, b"x")[1])
    vm.vcpus[0].start(rip=0x1000)
    vm.run(timeout=10)


def a_conversion_fails() -> None:
    fake = Fake([Step.hypercall(0x8000, 1, 16)])
    vm = Vm(64 * PAGE, hypervisor=fake)
    vm.vcpus[0].start(rip=0x1000)
    fake.inject("set_attributes", 12)
    vm.run(timeout=10)


def a_timeout() -> None:
    vm = Vm(64 * PAGE, vcpus=2, hypervisor=Fake([Step.block()], [Step.block()]))
    for vcpu in vm.vcpus:
        vcpu.start(rip=0x1000)
    vm.run(timeout=0.001)


STAGES = [bad_argument, never_run, closed, a_hook_raises, a_cycle, a_conversion_fails, a_timeout]


def many(stages: list[object], times: int) -> None:
    for number in range(times):
        stages[number % len(stages)]()  # type: ignore[operator]
    gc.collect()


def test_a_thousand_machines_on_the_fake_leave_nothing() -> None:
    many(STAGES, 100)
    before, memory = left(), resident()
    many(STAGES, 1000)
    assert left() == before
    assert resident() - memory < 16 << 20


@kvm
def test_machines_on_kvm_leave_nothing() -> None:
    def runs() -> None:
        with Vm(16 << 20) as vm:
            script = Script()
            script.write(0x20_0000, 1)
            script.start(vm)
            assert vm.run(timeout=30).reason == "halt"

    def converts_and_is_dropped() -> None:
        vm = Vm(16 << 20, vcpus=2)
        vm.convert(0x20_0000, 0x10_0000, to="private")
        vm.convert(0x20_0000, 0x8_0000, to="shared")

    def pc() -> None:
        with contextlib.suppress(PagegateError):
            Vm(64 << 20, platform="pc")

    def outside() -> None:
        with Vm(16 << 20) as vm, pytest.raises(ValueError, match="outside"):
            vm.load(b"x", at=16 << 20)

    stages: list[object] = [runs, converts_and_is_dropped, pc, outside]
    many(stages, 20)
    before, memory = left(), resident()
    many(stages, 200)
    assert left() == before
    assert resident() - memory < 16 << 20
