"""Guests whose pages come from a pager, on this host's KVM."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from pagegate import PagegateError, Vm

pytestmark = pytest.mark.userfault

PAGE = 4096
# again: mov al, [rbx]; out 0xe9, al; add rbx, 0x1000; jmp again
READS = bytes.fromhex("8a03 e6e9 4881c300100000 ebf3")
CODE, DATA, SIZE = 0x1000, 0x20_0000, 4 << 20


class Pager:
    """The code, and pages that begin with their number."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def missing(self, page) -> bytes:
        self.asked.append((page.gpa, page.by))
        if page.gpa == CODE:
            return READS.ljust(PAGE, b"\xf4")
        return bytes([page.gpa // PAGE & 0xFF]).ljust(PAGE, b"\0")


def threads() -> list[str]:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return names


def start(vm: Vm) -> None:
    vm.vcpus[0].start(mode="long", rip=CODE, rsp=0x8000, rbx=DATA)


@pytest.mark.parametrize("kwargs", [{}, {"private_bit": 35}])
def test_a_guest_runs_on_pages_that_come(kwargs) -> None:
    pager, seen = Pager(), []
    with Vm(SIZE, enforcement="memslots", pager=pager, **kwargs) as vm:
        vm.on_io(0xE9, lambda io: (seen.append(io.data[0]), len(seen) < 64 or vm.stop()))
        start(vm)
        assert vm.run(timeout=60).reason == "stopped"
        assert seen == [(DATA // PAGE + page) & 0xFF for page in range(64)]
        gpas = [gpa for gpa, _ in pager.asked]
        assert len(set(gpas)) == len(gpas)
        assert {CODE, *(DATA + page * PAGE for page in range(64))} <= set(gpas)
        assert [(page.gpa, page.by) for page in vm.working_set()] == pager.asked
        assert dict(pager.asked)[DATA] in {"vcpu", "kvm"}
        came = [(event.gpa, event.vcpu) for event in vm.events if event.kind == "missing"]
        assert [gpa for gpa, _ in came] == gpas
        assert dict(came)[DATA] in {0, 0xFFFFFFFF}


def test_a_missing_page_that_is_converted_is_zeroes() -> None:
    pager, seen = Pager(), []
    with Vm(SIZE, enforcement="memslots", pager=pager, shared_bit=35) as vm:
        vm.on_io(0xE9, lambda io: (seen.append(io.data[0]), len(seen) < 8 or vm.stop()))
        # It loads through the private view, so that each page is converted first.
        start(vm)
        assert vm.run(timeout=60).conversions == 8
        assert seen == [0] * 8
        assert max(gpa for gpa, by in pager.asked if by != "host") == CODE


def test_vcpus_that_touch_the_same_pages_have_each_once() -> None:
    pager, seen, lock = Pager(), [], threading.Lock()

    def handler(io) -> None:
        with lock:
            seen.append(io.data[0])
        if len(seen) >= 200:
            vm.stop()

    with Vm(SIZE, vcpus=3, enforcement="memslots", pager=pager) as vm:
        vm.on_io(0xE9, handler)
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=CODE, rsp=0x8000, rbx=DATA)
        assert vm.run(timeout=60).reason == "stopped"
        gpas = [gpa for gpa, _ in pager.asked]
        assert len(set(gpas)) == len(gpas)
        assert set(seen) <= {(DATA // PAGE + page) & 0xFF for page in range(256)}


def test_what_it_raises_ends_the_run() -> None:
    class Fails(Pager):
        def missing(self, page):
            if page.gpa == DATA + 3 * PAGE:
                raise LookupError("lost")
            return super().missing(page)

    with Vm(SIZE, enforcement="memslots", pager=Fails()) as vm:
        seen: list[int] = []
        vm.on_io(0xE9, lambda io: seen.append(io.data[0]))
        start(vm)
        with pytest.raises(LookupError, match="lost") as raised:
            vm.run(timeout=60)
        assert raised.value.__notes__ == [f"pager of gpa {DATA + 3 * PAGE:#x}, which vCPU 0 touched"]
        assert seen == [0, 1, 2]


def test_the_timeout_holds_while_one_hangs() -> None:
    go_on = threading.Event()

    class Hangs(Pager):
        def missing(self, page):
            if page.gpa == DATA:
                go_on.wait(60)
            return super().missing(page)

    with Vm(SIZE, enforcement="memslots", pager=Hangs()) as vm:
        vm.on_io(0xE9, lambda _io: pytest.fail("the guest has read what has not come"))
        start(vm)
        begun = time.monotonic()
        assert vm.run(timeout=1).reason == "timeout"
        assert time.monotonic() - begun < 6
        # Where KVM emulates the load, it does not let go of it, and the machine is lost. Else the load is begun again.
        begun, said = time.monotonic(), ""
        try:
            vm.run(timeout=0.5)
        except PagegateError as error:
            said = str(error)
        assert not said or ("this machine is lost" in said and f"{DATA:#x}" in said)
        assert time.monotonic() - begun < 6
    go_on.set()
    end = time.monotonic() + 10
    while "pagegate-pager" in threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert "pagegate-pager" not in threads()


def test_the_timeout_holds_while_a_handler_waits_for_a_page() -> None:
    go_on = threading.Event()

    class Hangs(Pager):
        def missing(self, page):
            if page.gpa == DATA + 64 * PAGE:
                go_on.wait(60)
            return super().missing(page)

    with Vm(SIZE, enforcement="memslots", pager=Hangs()) as vm:
        vm.on_io(0xE9, lambda _io: vm.read(DATA + 64 * PAGE, 1))
        start(vm)
        begun = time.monotonic()
        with contextlib.suppress(PagegateError):
            vm.run(timeout=0.5)
        assert time.monotonic() - begun < 6
        go_on.set()


def test_a_pager_that_fails_after_the_run_fails_in_vain() -> None:
    class Late(Pager):
        def missing(self, page):
            if page.gpa == DATA and not any(gpa == DATA for gpa, _ in self.asked):
                self.asked.append((DATA, page.by))
                time.sleep(0.8)
                raise LookupError("late")
            return super().missing(page)

    with Vm(SIZE, enforcement="memslots", pager=Late()) as vm:
        start(vm)
        # Whether the vCPU could leave at once or had to wait, the run ends, by its timeout or by the pager's failure.
        with contextlib.suppress(LookupError):
            vm.run(timeout=0.3)
        time.sleep(1)
        seen: list[int] = []
        vm.on_io(0xE9, lambda io: (seen.append(io.data[0]), vm.stop()))
        said = ""
        try:
            vm.run(timeout=20)
        except PagegateError as error:
            said = str(error)
        assert seen == [0] or "this machine is lost" in said


def test_ctrl_c_ends_the_run_while_one_hangs() -> None:
    program = textwrap.dedent(
        """
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from tests.native.test_pager import DATA, SIZE, Pager, start
        from pagegate import Vm
        class Hangs(Pager):
            def missing(self, page):
                if page.gpa == DATA:
                    print("asked", flush=True)
                    time.sleep(60)
                return super().missing(page)
        with Vm(SIZE, enforcement="memslots", pager=Hangs()) as vm:
            start(vm)
            try:
                vm.run()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        print("closed", flush=True)
        """
    )
    root = __file__.rsplit("/tests/", 1)[0]
    process = subprocess.Popen([sys.executable, "-c", program, root], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"asked\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"interrupted\nclosed\n", 0)
    assert time.monotonic() - begun < 12
