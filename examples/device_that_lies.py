"""A disk that answers with what the specification forbids, to see what the guest's driver makes of it.

For people who harden drivers: in a confidential guest the host is not trusted, and this is the host. Choose the lie:

- ``length``: says that it wrote more than the request has room for
- ``id``: completes a request that was never made
- ``twice``: completes each request twice
- ``capacity``: fails all that is read, though it is within the capacity that it told
- ``content``: gives other bytes each time the same sector is read

    python examples/device_that_lies.py vmlinuz initrd length
"""

from __future__ import annotations

import os
import struct
import sys

from pagegate import Vm, devices

LIES = ("length", "id", "twice", "capacity", "content")
SECTORS = 16384
OK, IO_ERROR = b"\0", b"\1"
READ = 0


class Lying:
    """A disk of zeroes that is honest about its first requests, so that the driver finds it, and lies from then on."""

    device_id = 2
    queues = (128,)
    config = struct.pack("<Q", SECTORS)

    def __init__(self, lie: str, honest: int = 8) -> None:
        """``honest``: how many requests are answered truthfully."""
        if lie not in LIES:
            raise ValueError(f"{lie!r} is none of {', '.join(LIES)}")
        self.lie = lie
        self.honest = honest
        self.lies = 0

    def process(self, queue: devices.DeviceQueue) -> None:
        """Reads give zeroes, and writes are forgotten."""
        for request in queue:
            kind, _, _ = struct.unpack("<IIQ", request.read(0, 16))
            size = request.writable_size - 1 if kind == READ else 0
            if not 0 <= size <= SECTORS * 512:
                # Sizes are the guest's, which may be hostile, too.
                request.complete(0)
                continue
            if self.honest > 0:
                self.honest -= 1
                request.write(bytes(size) + OK)
                request.complete(size + 1)
            else:
                self.lies += 1
                self.answer(queue, request, size)

    def answer(self, queue: devices.DeviceQueue, request: devices.DeviceRequest, size: int) -> None:
        """Answers one request, of so many bytes to write besides the status, with the lie."""
        content = os.urandom(size) if self.lie == "content" else bytes(size)
        request.write(content + (IO_ERROR if self.lie == "capacity" else OK))
        if self.lie == "id":
            queue.complete(queue.size - 1, size + 1)
        if self.lie == "twice":
            queue.complete(request.head, size + 1)
        request.complete(0xFFFF_FFFF if self.lie == "length" else size + 1)


if __name__ == "__main__":
    kernel, initrd, lie = sys.argv[1:]
    disk = Lying(lie)
    with Vm(512 << 20, platform="pc", confidential="sev") as vm:
        vm.add_device(disk, name="liar")
        vm.boot(kernel, initrd=initrd)
        print(vm.run(timeout=300))
        print(vm.console.read().decode(errors="replace"))
    print(f"{disk.lies} lies")
