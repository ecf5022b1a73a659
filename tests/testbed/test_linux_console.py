"""Linux's own driver of the virtio console, in a plain guest and in a software SEV guest.

The kernels are those of test_linux.py; their modules have to be beside them, in lib/modules.
"""

from __future__ import annotations

import hashlib
import random
import re

import pytest
from pagegate import Vm, devices, linux
from pagegate.linux.initramfs import STATUS

from .test_linux import MEMORY, SECONDS, kernels

MODULES = ["virtio_pci", "virtio_console"]
INPUT = 3000
LINES = 500
"""Linux hands over 16 bytes at a time, and spins until the device has taken them: with one CPU that takes a while."""
# One opening of the terminal for all of it: Linux drops input that was not read when it is closed.
COMMAND = f"""exec 0<>/dev/hvc0 1>&0
stty raw -echo
echo ready
read -r line
echo "got $line"
head -c {INPUT} | sha256sum
seq {LINES}"""


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("confidential", [None, "sev"])
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_input_and_output(kernel, confidential, tmp_path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(linux.build(command=COMMAND, modules=MODULES, kernel=kernel))
    with Vm(MEMORY, platform="pc", confidential=confidential, events=8192) as vm:
        device = devices.Console()
        vm.add_device(device)
        vm.boot(kernel, initrd=initrd, append="quiet")
        hvc0 = device.console
        hvc0.expect("ready\n", timeout=SECONDS)
        hvc0.write("hello, guest\n")
        hvc0.expect("got hello, guest\n", timeout=60)
        data = random.Random(13).randbytes(INPUT)
        hvc0.write(data)
        hvc0.expect(f"{hashlib.sha256(data).hexdigest()}  -\n", timeout=60)
        report = vm.run(timeout=60)
        assert report.reason == "poweroff"
        assert hvc0.read() == b"".join(b"%d\n" % line for line in range(1, LINES + 1))
        assert re.search(rf"{STATUS}0\r\n", vm.console.tail(4096).decode())
        assert not [event for event in vm.events if event.kind == "device"]
        assert vm.events.dropped == 0
