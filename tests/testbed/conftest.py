"""Helpers of the tests with guest_memfd, which run inside the testbed, in one boot."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pagegate
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
PAGE = 4096

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.testbed)
    if "sw-protected" in pagegate.probe().vm_types:
        return
    reason = "this kernel has no software-protected VMs: run tests/in-testbed"
    if os.environ.get("PAGEGATE_TESTBED"):
        pytest.exit(f"in the testbed, yet {reason}", returncode=1)
    for item in mine:
        item.add_marker(pytest.mark.skip(reason=reason))


def kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int(minor)


def descriptors(word: str) -> list[int]:
    """This process's descriptors whose target has this word in its name."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if word in target:
            found.append(int(fd))
    return found


def mapping(word: str) -> int:
    """The address of the mapping of the file with this word in its name."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if word in line:
            return int(line.split("-")[0], 16)
    raise LookupError(word)


def vcpu_stats(fd: int) -> dict[str, int]:
    """KVM_GET_STATS_FD: the counters of one vCPU."""
    kvm_get_stats_fd = 0xAECE
    stats = LIBC.ioctl(fd, kvm_get_stats_fd, 0)
    assert stats >= 0, os.strerror(ctypes.get_errno())
    try:
        _, name_size, count, _, descriptors_at, data_at = struct.unpack("6I", os.pread(stats, 24, 0))
        found = {}
        for i in range(count):
            entry = os.pread(stats, 16 + name_size, descriptors_at + i * (16 + name_size))
            _, _, size, offset, _ = struct.unpack_from("<IhHII", entry)
            name = entry[16:].split(b"\0")[0].decode()
            if size == 1:
                (found[name],) = struct.unpack("<Q", os.pread(stats, 8, data_at + offset))
        return found
    finally:
        os.close(stats)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test no descriptor of a machine is left."""
    yield
    assert not descriptors("kvm"), "descriptors of KVM are left"
    assert not descriptors("memfd:"), "memory is left"
