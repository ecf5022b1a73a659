"""Listeners on a real VM, for the example of a device that maps shared pages."""

from __future__ import annotations

import os
import threading
import time

import pytest
from pagegate import Listener, Vm
from pagegate.guests import Script

from .conftest import MIB, PAGE, descriptors

MEMORY = 64 * MIB
AT = 8 * MIB


def shared_bytes(gpa: int, size: int) -> bytes:
    """Bytes of the shared side, as a device that has it mapped would read them."""
    (fd,) = descriptors("memfd:pagegate-shared")
    return os.pread(fd, size, gpa)


class Device(Listener):
    """Keeps the pages that it has mapped, and the bytes that were there when it unmapped them."""

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.let_go: list[bytes] = []
        self.doubled = 0
        self.refuse = False

    def prepare(self, change) -> bool:
        if self.refuse:
            return False
        # Nothing is discarded yet, so a device can still write its data back.
        self.let_go.append(shared_bytes(change.gpa, 8))
        self.mapped.difference_update(range(change.gpa, change.gpa + change.size, PAGE))
        return True

    def committed(self, change) -> None:
        if change.to == "shared":
            pages = set(range(change.gpa, change.gpa + change.size, PAGE))
            self.doubled += len(pages & self.mapped)
            self.mapped |= pages

    def aborted(self, change) -> None:
        self.mapped |= set(range(change.gpa, change.gpa + change.size, PAGE))


def shared_pages(vm: Vm) -> set[int]:
    return {
        page for gpa, size, state in vm.attributes.runs() if state == "shared" for page in range(gpa, gpa + size, PAGE)
    }


@pytest.mark.parametrize(("shared_bit", "enforcement"), [(None, "auto"), (35, "attributes"), (35, "traps")])
def test_a_device_never_has_a_private_page_mapped(shared_bit, enforcement) -> None:
    device = Device()
    with Vm(MEMORY, shared_bit=shared_bit, enforcement=enforcement) as vm:
        vm.add_listener(device)
        assert device.mapped == shared_pages(vm)
        view = 0 if shared_bit is None else 1 << shared_bit
        script = Script(call="hypercall")
        script.fill(view | AT, 4 * PAGE, 0x21)
        script.map(AT, 4 * PAGE, to="private")
        script.fill(AT, PAGE, 0x22)
        script.out(0xE9, 1)
        script.map(AT, 2 * PAGE, to="shared")
        script.start(vm)

        def look(io) -> None:
            assert device.let_go == [b"\x21" * 8]
            assert device.mapped == shared_pages(vm)

        vm.on_io(0xE9, look)
        assert vm.run(timeout=60).reason == "halt"
        assert device.mapped == shared_pages(vm)
        assert device.doubled == 0


def test_a_device_that_refuses_keeps_its_page() -> None:
    device = Device()
    with Vm(MEMORY) as vm:
        vm.add_listener(device)
        device.refuse = True
        script = Script(call="hypercall")
        script.fill(AT, PAGE, 0x21)
        answer = script.map(AT, PAGE, to="private")
        still = script.check(AT, PAGE, 0x21)
        script.start(vm)
        assert vm.run(timeout=60).reason == "halt"
        eagain = 11
        assert (script.result(vm, answer), script.result(vm, still)) == (eagain, 0)
        assert not vm.attributes.is_private(AT)


def test_a_listener_that_joins_while_the_guest_converts_misses_nothing() -> None:
    with Vm(MEMORY, vcpus=2) as vm:
        for vcpu in range(2):
            script = Script(call="hypercall")
            begin = len(script)
            for page in range(8):
                script.map(AT + (vcpu * 64 + page) * PAGE, PAGE, to="private")
            for page in range(8):
                script.map(AT + (vcpu * 64 + page) * PAGE, PAGE, to="shared")
            script.loop(begin, 1 << 40)
            script.start(vm, vcpu, at=0x1000 + vcpu * MIB)
        devices, end = [], time.monotonic() + 60

        def join() -> None:
            for _ in range(20):
                device = Device()
                vm.add_listener(device)
                devices.append(device)
                # Add the next listener only while pages are being converted.
                while not device.let_go and time.monotonic() < end:
                    time.sleep(0.001)
            vm.stop()

        thread = threading.Thread(target=join)
        thread.start()
        report = vm.run(timeout=120)
        thread.join()
        assert report.reason == "stopped"
        assert report.conversions > 20
        for device in devices:
            assert device.let_go
            assert device.mapped == shared_pages(vm)
            assert device.doubled == 0
