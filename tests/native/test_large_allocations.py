"""What is large is asked for, so that an address space that is full is an error and not the process's end.

As in test_limits.py a limit is raised step by step. Here malloc gives up to 64 KiB whatever the limit is, and more only
as far as the limit allows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pagegate import trace

from tests import boot_parts, programs

from .test_limits import PARTS, folder

__all__ = ["folder"]

LARGE = (
    PARTS
    + """
from pagegate import Convert

# Up to 64 KiB comes from free pieces with others in between, and what is larger is mapped.
M_TOP_PAD, M_MMAP_THRESHOLD, PIECE = -2, -3, 65 << 10
for option, value in ((M_TOP_PAD, 0), (M_MMAP_THRESHOLD, 64 << 10), (M_MMAP_MAX, 1 << 16)):
    assert libc.mallopt(option, value) == 1
pieces = [libc.malloc(PIECE) for _ in range(3000)]
for piece in pieces[::2]:
    libc.free(piece)

def now():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * 4096

def limits(step=64 << 10):
    return range(now(), now() + (256 << 20), step)

def on_the_fake(steps=(), **kwargs):
    vm = Vm(16 << 20, hypervisor=Fake(list(steps)), shared_bit=35, **kwargs)
    vm.vcpus[0].start(mode="long", rip=0x1000)
    return vm

def fails_without_memory(call):
    # Calls it with no memory left, and then with memory.
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now(), before[1]))
    try:
        call()
        failed = False
    except MemoryError:
        failed = True
    except PagegateError as error:
        failed = "ENOMEM" in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert failed, "there was memory"
    return call()
"""
)
CAUSES = '"ENOMEM", "EAGAIN", "Cannot allocate memory", "Resource temporarily unavailable", "MemoryError"'


def test_a_run() -> None:
    programs.passes(
        f"""
        def work(make):
            with on_the_fake([Step.hypercall(0x8000, 1, 0)] * 3) as vm:
                assert vm.run(timeout=20).reason == "halt"
        found = walk(None, resource.RLIMIT_AS, limits)
        check(found, {CAUSES}, steps=3)
        assert any("count how long requests take" in error for error in found[0]), found
        """,
        LARGE,
    )


@pytest.mark.parametrize("how", ["gzip", "bz2", "xz", "lzma"])
def test_a_compressed_kernel(how: str) -> None:
    Path("vmlinuz").write_bytes(boot_parts.compressed_kernel(how))
    programs.passes(
        f"""
        def work(make):
            fake = Fake([], private_memory=False)
            pc = {{"platform": "pc", "confidential": "sev", "enforcement": "memslots"}}
            with Vm(64 << 20, hypervisor=fake, **pc) as vm:
                vm.boot("vmlinuz")
        found = walk(None, resource.RLIMIT_AS, limits)
        check(found, {CAUSES}, steps=2)
        assert any("cannot read the kernel" in error for error in found[0]), found
        """,
        LARGE,
    )


@pytest.mark.parametrize("name", ["trace.parquet", "trace.arrow", "trace.arrows"])
def test_a_trace(name: str) -> None:
    trace.synthetic(20_000).write(name)
    programs.passes(
        f"""
        def work(make):
            assert len(trace.read("{name}")) == 20_000
        found = walk(None, resource.RLIMIT_AS, lambda: limits(256 << 10))
        check(found, {CAUSES}, steps=1)
        """,
        LARGE,
    )


def test_a_generated_trace() -> None:
    programs.passes(
        """
        from pagegate import trace
        assert len(fails_without_memory(lambda: trace.synthetic(20_000))) == 20_000
        """,
        LARGE,
    )


def test_lists_as_long_as_the_guest_makes_them() -> None:
    programs.passes(
        """
        vm = Vm(96 << 20, hypervisor=Fake([]), shared_bit=35, debug_private=True, enforcement="traps")
        for gpa in range(0, 96 << 20, 8192):
            vm.convert(gpa, 4096, to="private")
        assert len(fails_without_memory(vm.attributes.runs)) == 96 << 8
        data = fails_without_memory(lambda: vm.read(0, 12 << 20))
        assert len(data) == 12 << 20
        fails_without_memory(lambda: vm.write(0, data))
        """,
        LARGE,
    )


def test_a_console_keeps_what_there_is_memory_for() -> None:
    programs.passes(
        """
        class Ends:
            def map_gpa_range(self, call):
                resource.setrlimit(resource.RLIMIT_AS, (now(), resource.getrlimit(resource.RLIMIT_AS)[1]))
                return Convert()
        wrote = [bytes([number % 251]) * 4096 for number in range(200)]
        steps = [Step.hypercall(0x20_0000, 1, 0), *(Step.io_write(0x3F8, text) for text in wrote)]
        pc = {"platform": "pc", "confidential": "sev", "enforcement": "traps"}
        with Vm(64 << 20, hypervisor=Fake([*steps, Step.io_write(0x600, [0x34])]), policy=Ends(), **pc) as vm:
            vm.boot("vmlinuz")
            assert vm.run(timeout=20).reason == "poweroff"
            least = vm.console.tail(1 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            kept = vm.console.tail(1 << 20)
            assert 32 << 10 <= len(kept) < 200 * 4096 and b"".join(wrote).endswith(kept), len(kept)
            assert 4096 <= len(least) and kept.endswith(least), len(least)
        """,
        LARGE,
    )
