"""How long a large conversion holds a vCPU that has nothing to do with it but its memory.

One vCPU touches a page of a range and writes to a port, over and over, while the host converts the range; the longest
time between two of its writes is how long it was held. Once for a 2 MiB chunk, once for all of memory, and once for all
of memory in a single KVM_SET_MEMORY_ATTRIBUTES. It takes a machine with two CPUs and private memory:

    pagegate testbed --cpus 2 -- python benches/large.py [MIB]
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pagegate import Vm, probe
from pagegate._core import Marks
from pagegate.guests import Script

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
CHUNK = 2 << 20
PORT = 0x0F00
ROUNDS = 4
KVM_SET_MEMORY_ATTRIBUTES = 0x4020AED2
PRIVATE = 1 << 3

libc = ctypes.CDLL(None, use_errno=True)


def vm_descriptor() -> int:
    """The machine's own descriptor, for the ioctl that it would never make."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if "kvm-vm" in str(entry.readlink()):
                return int(entry.name)
        except FileNotFoundError:
            continue
    raise LookupError("kvm-vm")


def at_once(fd: int, gpa: int, size: int, *, private: bool) -> None:
    arguments = struct.pack("<4Q", gpa, size, PRIVATE if private else 0, 0)
    if libc.ioctl(fd, ctypes.c_ulong(KVM_SET_MEMORY_ATTRIBUTES), arguments):
        raise OSError(ctypes.get_errno(), "KVM_SET_MEMORY_ATTRIBUTES")


def held(marks: Marks, begin: int, end: int) -> int:
    """The longest time between two marks, any of it in between ``begin`` and ``end``."""
    times = [at for _, _, at in marks.written]
    return max(b - a for a, b in itertools.pairwise(times) if b > begin and a < end)


def running(marks: Marks, since: int) -> None:
    """Returns when the vCPU has written since then."""
    while not marks.written or marks.written[-1][2] <= since:
        time.sleep(0.01)


def main(mib: int) -> None:
    memory = mib << 20
    start, size = memory // 4, memory // 2
    script = Script()
    # Both ends of whatever is converted.
    first = script.touch(start, 1)
    script.touch(start + size - PAGE, 1)
    script.out(PORT, 1)
    script.loop(first, 1 << 40)
    results: dict[str, list[tuple[int, int]]] = {}
    with Vm(memory, events=0) as vm:
        marks = Marks()
        vm.on_io(PORT, marks)
        script.start(vm)
        fd = vm_descriptor()
        runner = threading.Thread(target=vm.run)
        runner.start()

        def measured(what: str, convert: Callable[[], object]) -> None:
            running(marks, marks.now)
            begin = marks.now
            convert()
            end = marks.now
            running(marks, end)
            results.setdefault(what, []).append((held(marks, begin, end), end - begin))

        try:
            for _ in range(ROUNDS):
                measured("nothing", lambda: time.sleep(0.02))
                for to in ("private", "shared"):
                    measured("2 MiB", lambda to=to: vm.convert(start, CHUNK, to=to))
                for to in ("private", "shared"):
                    measured(f"{size >> 20} MiB", lambda to=to: vm.convert(start, size, to=to))
                for private in (True, False):
                    whole = lambda private=private: at_once(fd, start, size, private=private)  # noqa: E731
                    measured(f"{size >> 20} MiB in one ioctl", whole)
        finally:
            vm.stop()
            runner.join()
    for what, values in results.items():
        longest, took = (sorted(value[i] for value in values) for i in (0, 1))
        median, most = longest[len(longest) // 2] / 1e3, longest[-1] / 1e3
        all_of_it = took[len(took) // 2] / 1e3
        print(f"{what:20} held a vCPU {median:9,.0f} µs, at most {most:9,.0f} µs; took {all_of_it:9,.0f} µs")


if __name__ == "__main__":
    if probe().enforcement != "attributes":
        sys.exit("large: this kernel has no software-protected VMs: run this in the testbed")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
