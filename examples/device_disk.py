"""A disk whose sectors are a Python object's: here a bytearray, and a record of who wrote what.

For guests whose writes you want to see, refuse or change. Linux's driver is virtio_blk; the disk is /dev/vda.

    python examples/device_disk.py vmlinuz initrd disk.img
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from pagegate import Vm, devices
from pagegate.errors import DeviceAccessError

SECTOR = 512
READ, WRITE, FLUSH = 0, 1, 4
OK, IO_ERROR, UNSUPPORTED = b"\0", b"\1", b"\2"


class Disk:
    """virtio-blk over the bytes of an object that can be sliced."""

    device_id = 2
    queues = (128,)
    features = 1 << 9
    """Writes can be flushed; here there is nothing to do."""

    def __init__(self, content: bytearray) -> None:
        """A disk of these bytes, of which a part of a sector at the end is cut off."""
        self.content = content
        self.config = struct.pack("<Q", len(content) // SECTOR)
        self.writes: list[tuple[int, int]] = []
        """First byte and size of each write."""

    def process(self, queue: devices.DeviceQueue) -> None:
        """Each request is a header, the data, and a byte that says how it went."""
        for request in queue:
            if request.writable_size == 0:
                # There is no place for the answer.
                request.complete(0)
                continue
            try:
                status, written = self.carry_out(request)
            except DeviceAccessError:
                status, written = IO_ERROR, 0
            request.write(status, request.writable_size - 1)
            request.complete(written + 1)

    def carry_out(self, request: devices.DeviceRequest) -> tuple[bytes, int]:
        """The status, and how many bytes were written before it."""
        kind, _, sector = struct.unpack("<IIQ", request.read(0, 16))
        start = sector * SECTOR
        if kind == READ:
            size = request.writable_size - 1
            if start + size > len(self.content):
                return IO_ERROR, 0
            request.write(bytes(self.content[start : start + size]))
            return OK, size
        if kind == WRITE:
            # Sizes are the guest's: they are looked at before anything is made of them.
            if start + request.readable_size - 16 > len(self.content):
                return IO_ERROR, 0
            data = request.read(16)
            self.content[start : start + len(data)] = data
            self.writes.append((start, len(data)))
            return OK, 0
        return (OK, 0) if kind == FLUSH else (UNSUPPORTED, 0)


if __name__ == "__main__":
    kernel, initrd, image = sys.argv[1:]
    disk = Disk(bytearray(Path(image).read_bytes()))
    with Vm(512 << 20, platform="pc", confidential="sev") as vm:
        vm.add_device(disk, name="disk")
        vm.boot(kernel, initrd=initrd)
        print(vm.run(timeout=300))
        print(vm.console.read().decode(errors="replace"))
    print(f"{len(disk.writes)} writes, of {sum(size for _, size in disk.writes)} bytes")
