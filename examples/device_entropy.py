"""A source of entropy for the guest, in Python: a virtio device of ten lines.

For guests that should get bytes of your choice: a fixed seed, a bad source, none at all. Linux's driver is virtio_rng.

    python examples/device_entropy.py vmlinuz initrd
"""

from __future__ import annotations

import os
import sys

from pagegate import Vm, devices


class Entropy:
    """virtio-rng: one queue, whose requests are filled with random bytes."""

    device_id = 4
    queues = (64,)

    def process(self, queue: devices.DeviceQueue) -> None:
        """Fills what the driver asks for, 4 KiB of it at most."""
        for request in queue:
            data = os.urandom(min(request.writable_size, 4096))
            request.write(data)
            request.complete(len(data))


if __name__ == "__main__":
    with Vm(512 << 20, platform="pc", confidential="sev") as vm:
        vm.add_device(Entropy())
        vm.boot(sys.argv[1], initrd=sys.argv[2])
        print(vm.run(timeout=300))
        print(vm.console.read().decode(errors="replace"))
