from __future__ import annotations

import collections
import functools
import gc
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import hypothesis
import pagegate
import pytest
from pagegate import Convert, Policy, Vm
from pagegate.guests import _RECORD, _RESULT_OFFSET, Script
from pagegate.testing import Fake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KVM_OBJECTS = ("kvm", "gmem", "guest_memfd", "memfd:")
FAILED = pytest.StashKey[bool]()

# A shell script starts background processes with SIGINT ignored, and programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("default")


@functools.cache
def why_no_page_can_be_missing() -> str:
    """Why this process cannot have machines with missing pages; nothing if it can."""

    class Zeroes:
        def missing(self, page: pagegate.MissingPage) -> bytes:
            return bytes(page.size)

    try:
        Vm(4096, hypervisor=Fake([], private_memory=False), pager=Zeroes()).close()
    except pagegate.NotSupported as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("userfault") is not None and (why := why_no_page_can_be_missing()):
        pytest.skip(why)
    if item.get_closest_marker("kvm") is None:
        return
    host = pagegate.probe()
    if host.enforcement is None:
        pytest.skip("; ".join(host.problems))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.failed
    return report


def open_objects() -> collections.Counter[str]:
    """Counts this process's open KVM and memory files by the target of their link in /proc/self/fd."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return collections.Counter(link for link in links if any(word in link for word in KVM_OBJECTS))


@pytest.fixture
def kvm_objects() -> Callable[[], collections.Counter[str]]:
    return open_objects


@pytest.fixture(autouse=True)
def _nothing_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    before = open_objects()
    yield
    left = open_objects() - before
    if left and not request.node.stash.get(FAILED, True):
        gc.collect()
        left = open_objects() - before
        assert not left, f"left open: {dict(left)}"


class Recorder(Policy):
    """Keeps every request, and gives the answers in turn; the last one is repeated. An answer may be a function."""

    def __init__(self, *answers: Any) -> None:
        self.requests: list[Any] = []
        self.answers = list(answers) or [Convert()]

    def _answer(self, request: Any) -> Any:
        self.requests.append(request)
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        return answer(request) if callable(answer) else answer

    def memory_fault(self, fault: pagegate.MemoryFault) -> Any:
        return self._answer(fault)

    def map_gpa_range(self, call: pagegate.MapGpaRange) -> Any:
        return self._answer(call)

    def memory_poison(self, poison: pagegate.MemoryPoison) -> Any:
        return self._answer(poison)


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


class Expecting(Script):
    """A script that halts at the first unexpected result: in a loop, the next round would overwrite it.

    It must be started at 0x1000, because it reads its own table of operations and results there.
    """

    def __init__(self, *, shared_bit: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._own_table = self.image()[1] | (0 if shared_bit is None else 1 << shared_bit)
        # Always jumps over the halt: the first word of the table is this operation's number, which is not 0.
        self.goto_unless(self._own_table, 0, 2)
        self._end = self.halt()

    def result_at(self, operation: int) -> int:
        """The address at which the guest finds an operation's result."""
        return self._own_table + operation * _RECORD.size + _RESULT_OFFSET

    def expect(self, operation: int, result: int = 0) -> int:
        """Halts here unless the operation's result is this. Returns the operation."""
        self.goto_unless(self.result_at(operation), result, self._end)
        return operation

    def start(self, vm: Vm, vcpu: int = 0) -> int:
        return super().start(vm, vcpu)


@pytest.fixture
def expecting() -> type[Expecting]:
    return Expecting


class Running:
    """A run in a thread of its own, with its report or error."""

    def __init__(self, vm: Vm, timeout: float | None = 30.0) -> None:
        self.report: pagegate.Report | None = None
        self.error: BaseException | None = None
        self._vm = vm
        self._timeout = timeout
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.report = self._vm.run(timeout=self._timeout)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def join(self, within: float = 10.0) -> pagegate.Report:
        """Returns its report, or raises its error. ``within`` is how many seconds it may still take."""
        self._thread.join(within)
        assert not self._thread.is_alive(), f"the run did not end within {within} s"
        if self.error is not None:
            raise self.error
        assert self.report is not None
        return self.report

    def wait_until_in_progress(self) -> None:
        """Returns once registers cannot be read, which is so while a vCPU thread runs."""
        end = time.monotonic() + 5.0
        while time.monotonic() < end:
            try:
                self._vm.vcpus[0].regs()
            except pagegate.PagegateError:
                return
            time.sleep(0.001)
        raise AssertionError("the run did not begin")


@pytest.fixture
def in_background() -> type[Running]:
    return Running
