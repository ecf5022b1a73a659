"""A stock kernel converts pages while the host converts, reads and writes others, against the model of tests/modelled.

PAGEGATE_TEST_GUESTS is as in test_linux.py.
"""

from __future__ import annotations

import random
import threading

import pytest
from pagegate import Vm, linux
from pagegate.linux.initramfs import STATUS
from pagegate.policies import Allow

from tests.modelled.host import Device, Host
from tests.modelled.model import COUNT, Model
from tests.modelled.program import Op
from tests.modelled.search import seed

from .conftest import MIB, PAGE
from .test_linux import EXPLICIT, IMPLICIT, MEMORY, SECONDS, kernels

LINUX = MEMORY - 16 * MIB
"""Linux uses the memory below this, and the host a range above it."""
HOST = MEMORY - 8 * MIB
PAUSE = 0.02
"""Seconds between two operations of the host, so that Linux gets on."""


class Busy(threading.Thread):
    """The host, until it is told to end."""

    def __init__(self, vm: Vm) -> None:
        super().__init__()
        self.model = Model(["private"] * COUNT)
        self.end = threading.Event()
        self.done = 0
        self.failed: Exception | None = None
        self._host = Host(vm, self.model, base=HOST)
        self._random = random.Random(seed())

    def run(self) -> None:
        try:
            while not self.end.is_set():
                page = self._random.randrange(COUNT)
                pages = min(self._random.choice((1, 2, 3, 8)), COUNT - page)
                kind = self._random.choice(("convert", "convert", "read", "write"))
                to = self._random.choice(("private", "shared"))
                self._host.do(Op(kind, page, pages, to, self._random.randrange(1, 256)))
                self.done += 1
                # Under memslots every conversion keeps the vCPU out of the guest while slots change.
                self.end.wait(PAUSE)
        except Exception as error:  # noqa: BLE001
            self.failed = error


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("enforcement", ["traps", "memslots"])
@pytest.mark.parametrize("kernel", kernels())
def test_the_host_converts_while_linux_does(kernel, enforcement, tmp_path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(linux.build(command="echo booted"))
    with Vm(MEMORY, policy=Allow(), enforcement=enforcement, platform="pc", confidential="sev") as vm:
        device = Device(())
        vm.add_listener(device)
        vm.boot(kernel, initrd=initrd, append=f"quiet mem={LINUX // MIB}M")
        busy = Busy(vm)
        busy.start()
        try:
            report = vm.run(timeout=SECONDS)
        finally:
            busy.end.set()
            busy.join()
        assert busy.failed is None, busy.failed
        output = vm.console.tail(1 << 20).decode(errors="replace")
        assert report.reason == "poweroff", output
        assert f"{STATUS}0\r\n" in output
        print(f"{kernel.name}, {enforcement}: {report.requests} requests of Linux, {busy.done} operations of the host")
        assert report.requests >= (IMPLICIT + EXPLICIT) // 2
        assert report.conversions == report.requests
        assert busy.done >= 50

        runs = vm.attributes.runs()
        assert device.mapped == {
            page // PAGE for gpa, size, state in runs if state == "shared" for page in range(gpa, gpa + size, PAGE)
        }
        host = vm.attributes.runs(HOST, COUNT * PAGE)
        assert [state for _, size, state in host for _ in range(size // PAGE)] == busy.model.states
        assert vm.attributes.state(LINUX, HOST - LINUX) == "private"
        changed = sum(event.changed * (1 if event.done_to == "shared" else -1) for event in vm.events)
        ours = busy.model.states.count("shared") * PAGE
        assert vm.memory - vm.attributes.private_bytes == changed + ours
