"""Many machines that go on from one snapshot of a booted Linux, all of them at the same time, in one process.

PAGEGATE_TEST_GUESTS   a folder with the kernels, as in test_linux.py
PAGEGATE_TEST_FORKS    how many machines; 10 by default. For a hundred give pytest -o faulthandler_timeout=1800
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pagegate import Vm, linux

from .conftest import MIB, PAGE
from .test_linux import MEMORY, SECONDS, kernels

pytestmark = pytest.mark.userfault

FORKS = int(os.environ.get("PAGEGATE_TEST_FORKS", "10"))
COMPARED = 10
"""So many machines' pages are compared with the snapshot, which takes seconds for each."""
COMMAND = """mount -t tmpfs tmpfs /tmp
(i=0; while :; do echo "count $i"; i=$((i+1)); sleep 0.2; done) &
while read -r what number; do
    [ "$what" != keep ] || echo "$number" >/tmp/number
    echo "has $(cat /tmp/number)"
done"""


def available() -> int:
    return number_in("/proc/meminfo", "MemAvailable:")


def resident() -> int:
    return number_in("/proc/self/status", "VmRSS:")


def number_in(path: str, name: str) -> int:
    [line] = [line for line in Path(path).read_text(encoding="ascii").splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10


class Snapshot:
    """The bytes of a snapshot's pages."""

    def __init__(self, saved: Path) -> None:
        self.files = {state: os.open(saved / f"{state}.memory", os.O_RDONLY) for state in ("shared", "private")}

    def unchanged(self, vm: Vm) -> tuple[int, int]:
        """Of the pages that came to a machine: how many there are, and how many have the same state and bytes still."""
        came = same = 0
        for touched in vm.working_set():
            for gpa in range(touched.gpa, touched.gpa + touched.size, PAGE):
                came += 1
                if vm.attributes.state(gpa) == touched.state:
                    same += vm.read(gpa, PAGE) == os.pread(self.files[touched.state], PAGE, gpa)
        return came, same

    def close(self) -> None:
        for file in self.files.values():
            os.close(file)


def ask(vm: Vm, text: str) -> int:
    """Has the guest answer with the number that it keeps, and then count on."""
    vm.console.write(f"{text}\n")
    answer = vm.console.expect(r"has (\d+)\r\n", timeout=SECONDS)
    vm.console.expect(r"count \d+\r\n", timeout=SECONDS)
    return int(answer[1])


@pytest.mark.timeout(SECONDS + 30 * FORKS)
@pytest.mark.parametrize("kernel", kernels()[:1])
def test_many_go_on_from_one_snapshot(kernel, tmp_path) -> None:
    initrd, saved = tmp_path / "initrd", tmp_path / "saved"
    initrd.write_bytes(linux.build(command=COMMAND))
    with Vm(MEMORY, platform="pc", confidential="sev", enforcement="traps", debug_private=True) as vm:
        vm.boot(kernel, initrd=initrd, append="quiet")
        vm.console.expect("count 1\r\n", timeout=SECONDS)
        vm.snapshot(saved)
        usage = vm.memory_usage()
    print(f"\nbooted: {(usage.shared + usage.private) / MIB:.1f} MiB")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each machine has ten or more descriptors.
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit[1], limit[1]))
    snapshot = Snapshot(saved)
    before, begun, descriptors = (available(), resident()), time.monotonic(), len(os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        stack.callback(snapshot.close)
        machines = [
            stack.enter_context(Vm.resume(saved, lazy=True, debug_private=True, events=1024)) for _ in range(FORKS)
        ]
        resumed = time.monotonic()
        descriptors = len(os.listdir("/proc/self/fd")) - descriptors
        for vm in machines:
            assert vm.console.expect(r"count \d+\r\n", timeout=SECONDS)[0] == b"count 2\r\n"
        counted = time.monotonic()
        for number, vm in enumerate(machines):
            assert ask(vm, f"keep {number}") == number
        kept = time.monotonic()
        # Each still has its own number, also while others run.
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, machines, ["tell"] * FORKS)) == list(range(FORKS))
        asked = time.monotonic()
        after = available(), resident()
        usages = [vm.memory_usage() for vm in machines]
        pages = [len(vm.working_set()) for vm in machines]
        found = [snapshot.unchanged(vm) for vm in machines[:COMPARED]]
    taken = [usage.shared + usage.private for usage in usages]
    came, same = sum(came for came, _ in found), sum(same for _, same in found)
    print(
        f"{FORKS} machines, seconds: {resumed - begun:.1f} to resume, {counted - resumed:.1f} until each had counted, "
        f"{kept - counted:.1f} to keep a number, {asked - kept:.1f} to tell it\n"
        f"each: {sum(taken) / FORKS / MIB:.2f} MiB ({min(taken) / MIB:.2f} to {max(taken) / MIB:.2f}), "
        f"{descriptors / FORKS:.1f} descriptors, {sum(pages) / FORKS:.0f} accesses to missing pages, with which "
        f"{came / len(found):.0f} pages came; {same / len(found):.0f} of them ({same / came:.0%}) are as they were\n"
        f"all: {(before[0] - after[0]) / MIB:.0f} MiB of the host's memory, {(after[1] - before[1]) / MIB:.0f} resident"
    )
    assert max(taken) < MEMORY // 10
    # All of what it had when it was put aside is 98 MiB.
    assert before[0] - after[0] < FORKS * (MEMORY // 4)
