"""`Vm(pager=...)`: what a pager is asked, what it may answer and do, and what becomes of one that fails or hangs."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest
from pagegate import MissingPage, NotSupported, PagegateError, PolicyError, Vm
from pagegate.testing import Fake, Step

from .conftest import BIT, leaves_nothing
from .test_virtio import DATA, PAGE, WRITE, Echo, chain, kick, ready

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.userfault

MEMORY = 4 << 20


def text(gpa: int) -> bytes:
    """What a page has."""
    return gpa.to_bytes(8, "little") * (PAGE // 8)


class Pager:
    """Gives a page, or all around it."""

    def __init__(self, *, around: bool = False) -> None:
        self.around, self.asked = around, []

    def missing(self, page: MissingPage) -> bytes:
        self.asked.append(page)
        gpa, size = page.around if self.around else (page.gpa, page.size)
        return b"".join(text(at) for at in range(gpa, gpa + size, PAGE))


@pytest.fixture
def machine():
    made: list[Vm] = []

    def machine(pager, **kwargs) -> Vm:
        fake = Fake([], private_memory=kwargs.get("enforcement") == "traps")
        made.append(Vm(MEMORY, hypervisor=fake, pager=pager, **kwargs))
        return made[-1]

    yield machine
    for vm in made:
        vm.close()


@pytest.mark.parametrize("kwargs", [{}, {"enforcement": "traps", "private_bit": BIT, "initial": "private"}])
def test_each_page_is_asked_for_once(machine, kwargs) -> None:
    pager = Pager()
    vm = machine(pager, debug_private=True, **kwargs)
    assert vm.memory_usage().missing == MEMORY
    assert vm.read(PAGE + 8, PAGE) == text(PAGE)[8:] + text(2 * PAGE)[:8]
    assert vm.read(PAGE, 2 * PAGE) == text(PAGE) + text(2 * PAGE)
    told = [(page.gpa, page.size, page.state, page.by, page.vcpu) for page in pager.asked]
    state = kwargs.get("initial", "shared")
    assert told == [(gpa, PAGE, state, "host", None) for gpa in (PAGE, 2 * PAGE)]
    # The block of 2 MiB without what is there.
    assert [page.around for page in pager.asked] == [(0, 2 << 20), (2 * PAGE, (2 << 20) - 2 * PAGE)]
    assert repr(
        pager.asked[0]
    ) == f"MissingPage(gpa=0x1000, state={state!r}, by='host', around=(0x0, 0x200000))".replace("'", '"')
    assert [page.gpa for page in vm.working_set()] == [PAGE, 2 * PAGE]
    events = [(event.kind, event.gpa, event.size, event.state, event.outcome, event.decision) for event in vm.events]
    assert events == [("missing", gpa, PAGE, state, "came", "none") for gpa in (PAGE, 2 * PAGE)]
    assert all(event.latency > 0 and event.vcpu == 0xFFFFFFFF for event in vm.events)


def test_an_answer_may_have_all_pages_around(machine) -> None:
    pager = Pager(around=True)
    vm = machine(pager, shared_bit=BIT, debug_private=True)
    vm.convert(16 * PAGE, PAGE, to="private")
    assert vm.read(0, 40 * PAGE) == b"".join(text(page * PAGE) if page != 16 else bytes(PAGE) for page in range(40))
    assert [page.around for page in pager.asked] == [(0, 16 * PAGE), (17 * PAGE, (2 << 20) - 17 * PAGE)]
    assert vm.memory_usage().missing == 2 << 20


def test_a_file_is_a_pager(machine, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"".join(text(gpa) for gpa in range(0, MEMORY, PAGE)))
    vm = machine(path)
    at = 3 << 20
    for page in (at, at + PAGE, at + 40 * PAGE, at + 39 * PAGE, at + 2 * PAGE):
        assert vm.read(page, PAGE) == text(page)
    # More comes with a page beside one that is there: memory is being read in that order.
    sizes = [(page.gpa, page.size) for page in vm.working_set()]
    assert sizes == [(at, PAGE), (at + PAGE, 16 * PAGE), (at + 40 * PAGE, PAGE), (at + 39 * PAGE, 16 * PAGE)]
    assert vm.read(at, 64 * PAGE) == b"".join(text(at + index * PAGE) for index in range(64))


def test_what_is_no_pager_is_refused(machine, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(PAGE))
    with pytest.raises(ValueError, match=r"short has 0x1000 bytes, and memory ends at 0x400000"):
        machine(tmp_path / "short")
    with pytest.raises(FileNotFoundError):
        machine(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no regular file"):
        machine("/dev/zero")
    with pytest.raises(TypeError, match=r"pager is 3: it must be an object with a method missing\(page\), or the path"):
        machine(3)


@pytest.mark.parametrize("bytes_like", [bytearray, memoryview])
def test_an_answer_may_be_any_bytes(machine, bytes_like) -> None:
    class Other(Pager):
        def missing(self, page):
            return bytes_like(super().missing(page))

    assert machine(Other()).read(0, PAGE) == text(0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", r"answered with 0 bytes: it returns the 4096 of the page, or the 2097152 of the missing pages around it"),
        (b"x" * 4095, "answered with 4095 bytes"),
        (b"x" * 8192, "answered with 8192 bytes"),
        (None, "a pager answered None: it returns bytes"),
        ("text", "a pager answered 'text': it returns bytes"),
    ],
)
def test_a_wrong_answer_is_an_error(machine, answer, said) -> None:
    class Wrong:
        def missing(self, _page):
            return answer

    vm = machine(Wrong())
    with pytest.raises(PolicyError, match=said):
        vm.read(0, 1)
    assert vm.memory_usage().missing == MEMORY


def test_what_it_raises_is_raised_and_it_is_asked_again(machine) -> None:
    class Fails(Pager):
        def missing(self, page):
            if not self.asked:
                self.asked.append(page)
                raise KeyError("not there")
            return super().missing(page)

    vm = machine(Fails())
    with pytest.raises(KeyError, match="not there") as raised:
        vm.read(PAGE, 1)
    assert raised.value.__notes__ == ["pager of gpa 0x1000, which the host touched"]
    assert vm.read(PAGE, PAGE) == text(PAGE)
    assert [(event.gpa, event.outcome) for event in vm.events] == [(PAGE, "failed"), (PAGE, "came")]


def test_it_must_not_touch_its_machine(machine, tmp_path: Path) -> None:
    said: list[str] = []

    class Curious(Pager):
        def missing(self, page):
            calls = [
                lambda: vm.read(0, 1),
                lambda: vm.write(0, b"x"),
                lambda: vm.convert(0, PAGE, to="private"),
                lambda: vm.snapshot(tmp_path / "saved"),
                lambda: vm.run(timeout=1),
                vm.close,
            ]
            for call in calls:
                with pytest.raises(PagegateError) as raised:
                    call()
                said.append(str(raised.value))
            return super().missing(page)

    vm = machine(Curious())
    assert vm.read(PAGE, PAGE) == text(PAGE)
    assert len(said) == 6
    assert all(text.startswith("a pager is called while somebody waits for its page") for text in said), said


def test_it_may_read_another_machine(machine) -> None:
    first = machine(Pager())

    class FromFirst:
        def missing(self, page):
            return first.read(page.gpa, page.size)

    assert machine(FromFirst()).read(7 * PAGE, PAGE) == text(7 * PAGE)


def test_a_page_that_is_discarded_while_it_is_asked_for_is_zeroes(machine) -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(Pager):
        def missing(self, page):
            asked.set()
            assert go_on.wait(20)
            return super().missing(page)

    # Who reads a page has locked it, so the conversion is of one that comes with it.
    vm = machine(Slow(around=True), shared_bit=BIT, debug_private=True)
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(vm.read(PAGE, PAGE)))
    thread.start()
    assert asked.wait(20)
    vm.convert(2 * PAGE, PAGE, to="private")
    go_on.set()
    thread.join(20)
    assert read == [text(PAGE)]
    assert vm.read(2 * PAGE, PAGE) == bytes(PAGE)
    assert [page.gpa for page in vm.working_set()] == [PAGE]


def test_ctrl_c_ends_the_wait_for_one_that_hangs() -> None:
    program = textwrap.dedent(
        """
        import time
        from pagegate import Vm
        from pagegate.testing import Fake, Step
        class Hangs:
            def missing(self, page):
                print("asked", flush=True)
                time.sleep(60)
        vm = Vm(1 << 20, hypervisor=Fake(private_memory=False), pager=Hangs())
        try:
            vm.read(0, 1)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        vm.close()
        print("closed", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"asked\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out == b"interrupted\nclosed\n"
    assert process.returncode == 0
    assert time.monotonic() - begun < 10


def test_the_interpreter_ends_while_one_is_called() -> None:
    program = textwrap.dedent(
        """
        import threading, time
        from pagegate import PagegateError, Vm
        from pagegate.testing import Fake, Step
        asked = threading.Event()
        class Hangs:
            def missing(self, page):
                asked.set()
                time.sleep(3)
                return bytes(4096)
        vm = Vm(1 << 20, hypervisor=Fake(private_memory=False), pager=Hangs())
        def reads():
            try:
                vm.read(0, 1)
            except PagegateError:
                pass
        threading.Thread(target=reads, daemon=True).start()
        asked.wait()
        print("ends", flush=True)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


def test_a_machine_and_its_pager_that_know_each_other_are_freed(kvm_objects) -> None:
    class Knows(Pager):
        vm = None

    before = kvm_objects()
    pager = Knows()
    pager.vm = Vm(MEMORY, hypervisor=Fake(private_memory=False), pager=pager)
    assert pager.vm.read(0, PAGE) == text(0)
    gone = weakref.ref(pager)
    del pager
    for _ in range(50):
        gc.collect()
        # Its thread ends a moment later.
        if gone() is None and kvm_objects() == before:
            break
        time.sleep(0.1)
    assert gone() is None


def test_many_machines_leave_nothing() -> None:
    pager = Pager()
    with Vm(MEMORY, hypervisor=Fake(private_memory=False), pager=pager):
        pass
    with leaves_nothing(10):
        for index in range(200):
            vm = Vm(MEMORY, hypervisor=Fake(private_memory=False), pager=pager)
            if index % 2:
                vm.read(index * PAGE, 1)
            if index % 3:
                vm.close()
            del vm
    assert sys.getrefcount(pager) < 20


def test_a_kernel_is_not_booted_past_it(tmp_path: Path) -> None:
    from tests.boot_parts import write_kernel

    with (
        Vm("256M", hypervisor=Fake([], private_memory=False), platform="pc", pager=Pager()) as vm,
        pytest.raises(NotSupported, match="put that aside before its first run"),
    ):
        vm.boot(write_kernel(tmp_path))


def test_a_snapshot_can_have_another_pager(machine, tmp_path: Path) -> None:
    with Vm(MEMORY, hypervisor=Fake([], private_memory=False), shared_bit=BIT, debug_private=True) as vm:
        vm.convert(0, 4 * PAGE, to="private")
        vm.write(0, b"x" * MEMORY)
        vm.snapshot(tmp_path / "saved")
    pager = Pager()
    with Vm.resume(
        tmp_path / "saved", hypervisor=Fake([], private_memory=False), debug_private=True, pager=pager
    ) as again:
        assert again.memory_usage().missing == MEMORY
        assert again.read(3 * PAGE, 2 * PAGE) == text(3 * PAGE) + text(4 * PAGE)
        assert {page.gpa: page.state for page in pager.asked} == {3 * PAGE: "private", 4 * PAGE: "shared"}
        assert re.match("MissingPage", repr(pager.asked[0]))


def test_a_child_that_was_forked_takes_nothing_from_its_parent(machine) -> None:
    vm = machine(Pager())
    assert vm.read(0, PAGE) == text(0)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            try:
                vm.read(PAGE, 1)
            except PagegateError as error:
                status = 0 if "forked from" in str(error) else 2
            vm.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert vm.read(PAGE, PAGE) == text(PAGE)


def test_what_it_raises_comes_out_of_load_and_start() -> None:
    class Fails:
        def missing(self, page):
            raise LookupError(hex(page.gpa))

    with Vm(MEMORY, hypervisor=Fake([], private_memory=False), pager=Fails()) as vm:
        with pytest.raises(LookupError, match="0x1000"):
            vm.load(b"code", at=0x1000)
        with pytest.raises(LookupError):
            vm.vcpus[0].start(mode="long")


def test_nobody_is_asked_after_the_end() -> None:
    class Slow(Pager):
        def missing(self, page):
            time.sleep(0.3)
            return super().missing(page)

    pager = Slow()
    vm = Vm(MEMORY, hypervisor=Fake([], private_memory=False), pager=pager)
    failed: list[Exception] = []

    def read(page: int) -> None:
        try:
            vm.read(page * PAGE, 1)
        except PagegateError as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(page,)) for page in range(20)]
    for thread in threads:
        thread.start()
    while not pager.asked:
        time.sleep(0.01)
    vm.close()
    for thread in threads:
        thread.join(20)
    asked = len(pager.asked)
    time.sleep(0.5)
    assert len(pager.asked) == asked <= 3
    assert all("closed" in str(error) for error in failed)


def test_a_pipe_is_no_pager(machine, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        machine(tmp_path / "pipe")


def test_a_request_of_a_guest_is_never_answered_without_its_bytes() -> None:
    """A device whose page does not come in time loses the machine, and the guest sees no wrong answer."""
    go_on = threading.Event()

    class Hangs(Pager):
        def missing(self, page):
            if page.gpa == DATA:
                go_on.wait(30)
                return bytes(page.size)
            return bytes(page.size)

    fake = Fake([*ready(), *kick(), Step.block()], private_memory=False)
    with Vm("16M", hypervisor=fake, platform="pc", pager=Hangs()) as vm:
        vm.add_device(Echo(), name="first")
        vm.vcpus[0].start(mode="protected")
        chain(vm, (DATA, 5, 0), (DATA + PAGE, 16, WRITE))
        begun = time.monotonic()
        assert vm.run(timeout=1).reason == "timeout"
        assert time.monotonic() - begun < 8
        with pytest.raises(
            PagegateError, match="this machine is lost: the run is ending, and the pager has not answered"
        ):
            vm.run(timeout=1)
        go_on.set()
