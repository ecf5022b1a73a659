"""The newest of the stock kernels boots with memory on both sides of the hole below 4 GiB, and uses what is above.

PAGEGATE_TEST_GUESTS and the initrd are as in test_linux.py. Most of the memory is never touched, so the testbed's own
4 GiB are enough.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest
from pagegate import Vm, linux
from pagegate.linux.initramfs import STATUS
from pagegate.policies import Allow

from .conftest import MIB
from .test_linux import SECONDS, hashes, kernels

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30
MEMORY = 8 * GIB
BELOW_THE_HOLE = 3 * GIB
HIGHEST = 64 * MIB
KIB_AT_LEAST = 7 << 20
"""Of MemTotal: without the bounce buffers (512 MiB) and the kernel's array of pages (128 MiB)."""
COMMAND = """grep MemTotal /proc/meminfo
grep 'System RAM' /proc/iomem
dd if=/dev/urandom of=/data bs=1M count=4 2>/dev/null
sha256sum </data
cp /data /copy
sha256sum </copy"""


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(linux.build(command=COMMAND))
    return path


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_it_has_memory_above_four_gib(kernel, initrd) -> None:
    before = time.monotonic()
    vm = Vm(MEMORY, policy=Allow(), enforcement="traps", platform="pc", confidential="sev", debug_private=True)
    with vm:
        made = time.monotonic() - before
        assert vm.ram == [(0, BELOW_THE_HOLE), (4 * GIB, MEMORY - BELOW_THE_HOLE)]
        vm.boot(kernel, initrd=initrd, append="quiet")
        report = vm.run(timeout=SECONDS)
        output = vm.console.tail(1 << 20).decode(errors="replace")
        assert report.reason == "poweroff", output
        assert f"{STATUS}0\r\n" in output

        total = re.search(r"MemTotal: +(\d+) kB", output)
        assert total, output
        print(f"{kernel.name}: made in {made:.1f} s, ran {report.seconds:.0f} s, {total[0]}")
        assert KIB_AT_LEAST < int(total[1]) < MEMORY >> 10
        assert f"{4 * GIB:x}-{4 * GIB + MEMORY - BELOW_THE_HOLE - 1:x} : System RAM" in output
        assert len(set(hashes(output, 2))) == 1

        # Linux takes the highest memory first.
        highest = vm.read(sum(vm.ram[1]) - HIGHEST, HIGHEST)
        assert highest.count(0) < HIGHEST
        assert report.conversions == report.requests
        assert report.malformed == 0
