"""Unmodified kernels of distributions, booted as software SEV guests.

    PAGEGATE_TEST_GUESTS   a folder with the kernels: files vmlinuz-*

Their initrd needs a static busybox, which has to be on this host or in the cache already (`pagegate guest initramfs`).
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pagegate import Vm, linux
from pagegate.linux.initramfs import STATUS
from pagegate.policies import Allow

from .conftest import MIB, PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY = 256 * MIB
SECONDS = 240
BSS_DECRYPTED = 2 * MIB
"""What Linux shares at first by touching it, page by page."""
IMPLICIT = BSS_DECRYPTED // PAGE + 1
EXPLICIT = 642
"""With one vCPU: 643 in Linux 6.1, 641 in 6.12."""
GIVE = 8
OF_A_VCPU = 8
"""Requests that a further vCPU makes at most: for its clock, steal time and interrupt flags."""
SHARED_AT_LEAST = 64 * MIB
"""The bounce buffers (swiotlb)."""
DATA = 4 * MIB
CHILDREN = 3
COMMAND = f"""dmesg | grep 'Memory Encryption'
echo "processors: $(grep -c ^processor /proc/cpuinfo)"
mount -t tmpfs tmpfs /tmp
dd if=/dev/urandom of=/tmp/data bs={DATA} count=1 iflag=fullblock 2>/dev/null
sha256sum </tmp/data
for child in $(seq {CHILDREN}); do
    (cp /tmp/data /tmp/$child; sha256sum </tmp/$child >/tmp/$child.sum) &
done
wait
cat /tmp/*.sum
sha256sum </tmp/data"""


def kernels() -> list[object]:
    folder = os.environ.get("PAGEGATE_TEST_GUESTS")
    if not folder:
        return [pytest.param(Path(), marks=pytest.mark.skip(reason="$PAGEGATE_TEST_GUESTS names no folder of kernels"))]
    return [
        pytest.param(path, id=path.name.removeprefix("vmlinuz-")) for path in sorted(Path(folder).glob("vmlinuz-*"))
    ]


@contextmanager
def running_to_power_off(vm: Vm) -> Iterator[None]:
    """The guest runs in another thread meanwhile. Then its command has to end, with status 0, and it powers off."""
    reports = []
    runner = threading.Thread(target=lambda: reports.append(vm.run(timeout=SECONDS)))
    runner.start()
    try:
        yield
    except BaseException:
        vm.stop()
        raise
    finally:
        runner.join()
    output = vm.console.tail(1 << 16).decode()
    assert [report.reason for report in reports] == ["poweroff"], output
    assert f"{STATUS}0\r\n" in output


def hashes(output: str, count: int) -> list[str]:
    """The SHA-256 sums in a guest's output, so many, none of them of an empty or a cleared file."""
    found = re.findall(r"^([0-9a-f]{64})  -\r$", output, re.MULTILINE)
    assert len(found) == count, output
    assert not {hashlib.sha256(bytes(size)).hexdigest() for size in (0, DATA)} & set(found)
    return found


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(linux.build(command=COMMAND))
    return path


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
@pytest.mark.parametrize("kernel", kernels())
def test_a_stock_kernel_boots_and_asks(kernel, enforcement, vcpus, initrd) -> None:
    vm = Vm(
        MEMORY, vcpus=vcpus, policy=Allow(), enforcement=enforcement, platform="pc", confidential="sev", events=8192
    )
    with vm:
        vm.boot(kernel, initrd=initrd, append="quiet")
        report = vm.run(timeout=SECONDS)
        output = vm.console.tail(1 << 20).decode(errors="replace")
        assert report.reason == "poweroff", output
        assert "Memory Encryption Features active: AMD SEV" in output
        assert f"processors: {vcpus}\r\n" in output
        assert f"{STATUS}0\r\n" in output
        assert "Kernel panic" not in output
        # What it wrote to memory is still there, also after processes have copied it at the same time.
        assert len(set(hashes(output, CHILDREN + 2))) == 1

        more = GIVE + OF_A_VCPU * (vcpus - 1)
        print(f"{kernel.name}, {enforcement}, {vcpus}: {report.faults} implicit, {report.hypercalls} explicit")
        assert abs(report.faults - IMPLICIT) <= more
        assert abs(report.hypercalls - EXPLICIT) <= more
        assert report.conversions == report.requests
        assert (report.malformed, report.denied, vm.events.dropped) == (0, 0, 0)
        assert SHARED_AT_LEAST <= vm.memory - vm.attributes.private_bytes < 2 * SHARED_AT_LEAST

        who = Counter[str]()
        for event in vm.events:
            if event.kind == "implicit":
                who[(vm.symbol(event.rip) or "?").partition("+")[0]] += 1
        # Linux 6.1 clears it in a loop of its own, 6.12 by memset.
        assert who["clear_bss"] + who["memset_orig"] == BSS_DECRYPTED // PAGE, who
