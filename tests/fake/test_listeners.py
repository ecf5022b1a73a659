"""Listeners: what they are told of conversions, when, and what they may do."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from pagegate import Change, Convert, Listener, PagegateError, PolicyError, Vm
from pagegate.testing import Fake, Step

PAGE = 4096
MEMORY = 64 * PAGE


class Log(Listener):
    """Keeps what it is told, with what KVM enforced at that time."""

    def __init__(self, fake: Fake | None = None) -> None:
        self.fake = fake
        self.told: list[tuple[str, int, int, str]] = []
        self.initial: list[tuple[int, int, str]] = []
        self.enforced: list[bool] = []
        self.refuse = False

    def _log(self, what: str, change: Change) -> None:
        self.told.append((what, change.gpa, change.size, change.to))
        if self.fake is not None:
            self.enforced.append(self.fake.is_private(change.gpa))

    def prepare(self, change: Change) -> bool:
        self._log("prepare", change)
        return not self.refuse

    def committed(self, change: Change) -> None:
        if change.initial:
            self.initial.append((change.gpa, change.size, change.to))
        else:
            self._log("committed", change)

    def aborted(self, change: Change) -> None:
        self._log("aborted", change)


@pytest.fixture
def fake() -> Fake:
    return Fake([])


@pytest.fixture
def vm(fake: Fake):
    with Vm(MEMORY, hypervisor=fake) as vm:
        yield vm


def test_to_private_is_prepared_before_kvm_changes_anything(vm, fake) -> None:
    log = Log(fake)
    vm.add_listener(log)
    vm.convert(8 * PAGE, 2 * PAGE, to="private")
    assert log.told == [(what, 8 * PAGE, 2 * PAGE, "private") for what in ("prepare", "committed")]
    assert log.enforced == [False, True]


def test_to_shared_is_committed_after_it_is_done(vm, fake) -> None:
    vm.convert(8 * PAGE, PAGE, to="private")
    log = Log(fake)
    vm.add_listener(log)
    vm.convert(8 * PAGE, PAGE, to="shared")
    assert log.told == [("committed", 8 * PAGE, PAGE, "shared")]
    assert log.enforced == [False]


def test_only_pages_that_change_are_reported(vm) -> None:
    vm.convert(9 * PAGE, PAGE, to="private")
    log = Log()
    vm.add_listener(log)
    vm.convert(8 * PAGE, 4 * PAGE, to="private")
    runs = [(8 * PAGE, PAGE), (10 * PAGE, 2 * PAGE)]
    assert log.told == [(what, *run, "private") for what in ("prepare", "committed") for run in runs]
    log.told.clear()
    vm.convert(8 * PAGE, 4 * PAGE, to="private")
    assert log.told == []


def test_a_new_listener_gets_the_present_states_first(vm) -> None:
    vm.convert(8 * PAGE, PAGE, to="private")
    log = Log()
    vm.add_listener(log)
    assert log.initial == vm.attributes.runs()
    assert log.told == []


def test_no_change_is_lost_or_doubled_while_a_listener_joins(vm) -> None:
    stop = threading.Event()

    def flip() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            # The number of pages is odd, so that each one is made private and shared alternately.
            vm.convert((turn * 7 % 61) * PAGE, PAGE, to=["private", "shared"][turn % 2])

    threads = [threading.Thread(target=flip) for _ in range(2)]
    for thread in threads:
        thread.start()
    logs, end = [], time.monotonic() + 30
    for _ in range(50):
        log = Log()
        vm.add_listener(log)
        logs.append(log)
        # Add the next listener only while pages are being converted.
        while not log.told and time.monotonic() < end:
            time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    final = vm.attributes.runs()
    assert all(log.told for log in logs)
    for log in logs:
        pages = {}
        for gpa, size, state in log.initial:
            pages |= dict.fromkeys(range(gpa, gpa + size, PAGE), state)
        for what, gpa, size, state in log.told:
            if what == "committed":
                for page in range(gpa, gpa + size, PAGE):
                    assert pages[page] != state, "told twice"
                    pages[page] = state
        seen = dict(pages)
        for gpa, size, state in final:
            assert {seen[page] for page in range(gpa, gpa + size, PAGE)} == {state}, "something was lost"


def test_a_refusal_stops_the_conversion_and_aborts_the_others(vm, fake) -> None:
    first, second = Log(fake), Log(fake)
    second.refuse = True
    vm.add_listener(first)
    vm.add_listener(second)
    with pytest.raises(PagegateError, match="refused"):
        vm.convert(8 * PAGE, PAGE, to="private")
    assert [what for what, *_ in first.told] == ["prepare", "aborted"]
    assert [what for what, *_ in second.told] == ["prepare"]
    assert vm.attributes.runs() == [(0, MEMORY, "shared")]
    assert not fake.is_private(8 * PAGE)


def test_a_guest_that_a_listener_refuses_asks_again() -> None:
    fake = Fake([Step.doorbell(8 * PAGE, 1, 16)])
    with Vm(MEMORY, hypervisor=fake) as vm:
        log = Log()
        log.refuse = True
        vm.add_listener(log)
        vm.vcpus[0].start()
        assert vm.run(timeout=10).reason == "halt"
        assert [reply.value for reply in fake.replies()] == [11]


def test_a_failure_in_kvm_aborts_the_listeners(vm, fake) -> None:
    log = Log()
    vm.add_listener(log)
    fake.inject("set_attributes", 12)
    with pytest.raises(PagegateError, match="undone"):
        vm.convert(8 * PAGE, PAGE, to="private")
    assert [what for what, *_ in log.told] == ["prepare", "aborted"]


@pytest.mark.parametrize("method", ["prepare", "committed"])
def test_a_listener_that_raises_ends_the_run(method) -> None:
    class Raises:
        pass

    def boom(self, change) -> None:
        if not change.initial:
            raise ValueError(method)

    setattr(Raises, method, boom)
    fake = Fake([Step.doorbell(8 * PAGE, 1, 16)])
    with Vm(MEMORY, hypervisor=fake, policy=type("P", (), {"map_gpa_range": lambda self, call: Convert()})()) as vm:
        vm.add_listener(Raises())
        vm.vcpus[0].start()
        with pytest.raises(ValueError, match=method) as caught:
            vm.run(timeout=10)
        assert any("gpa 0x8000" in note for note in caught.value.__notes__)
        # The map still says what KVM enforces, although the listener failed.
        assert vm.attributes.is_private(8 * PAGE) is (method == "committed") is fake.is_private(8 * PAGE)


def test_a_listener_that_raises_while_joining_does_not_join(vm) -> None:
    class Raises:
        calls = 0

        def committed(self, change) -> None:
            self.calls += 1
            raise ValueError

    raises = Raises()
    with pytest.raises(ValueError):  # noqa: PT011
        vm.add_listener(raises)
    vm.convert(8 * PAGE, PAGE, to="private")
    assert raises.calls == 1


@pytest.mark.parametrize("use", ["read", "write", "convert", "load", "add_listener", "close"])
def test_a_listener_cannot_use_memory(vm, use) -> None:
    calls = {
        "read": lambda: vm.read(8 * PAGE, 8),
        "write": lambda: vm.write(8 * PAGE, b"x"),
        "convert": lambda: vm.convert(8 * PAGE, PAGE, to="shared"),
        "load": lambda: vm.load(b"x", at=8 * PAGE),
        "add_listener": lambda: vm.add_listener(Log()),
        "close": lambda: vm.close(),
    }

    class Curious:
        def committed(self, change) -> None:
            if not change.initial:
                calls[use]()

    vm.add_listener(Curious())
    with pytest.raises(PagegateError, match="listener"):
        vm.convert(8 * PAGE, PAGE, to="private")


def test_a_listener_that_left_is_not_called(vm) -> None:
    log = Log()
    vm.add_listener(log)
    vm.remove_listener(log)
    vm.convert(8 * PAGE, PAGE, to="private")
    assert log.told == []
    with pytest.raises(ValueError, match="no listener"):
        vm.remove_listener(log)


def test_a_listener_that_leaves_in_prepare_is_told_how_it_ends(vm, fake) -> None:
    class Leaves(Log):
        def prepare(self, change: Change) -> bool:
            vm.remove_listener(self)
            return super().prepare(change)

    for fails in (False, True):
        if fails:
            fake.inject("set_attributes", 12)
        log = Leaves()
        vm.add_listener(log)
        with contextlib.suppress(PagegateError):
            vm.convert(8 * PAGE, PAGE, to="private")
        assert [what for what, *_ in log.told] == ["prepare", "aborted" if fails else "committed"]
        vm.convert(8 * PAGE, PAGE, to="shared")
        assert len(log.told) == 2


class Slow(Log):
    """Takes its time in ``prepare``, until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def prepare(self, change: Change) -> bool:
        self.inside.set()
        assert self.go_on.wait(30)
        return super().prepare(change)


@pytest.mark.parametrize("fails", [False, True])
def test_close_waits_for_the_conversion_under_way(vm, fake, fails) -> None:
    slow, said = Slow(), []

    def convert(page: int) -> None:
        try:
            vm.convert(page * PAGE, PAGE, to="private")
            said.append(f"converted {page}")
        except PagegateError as error:
            said.append(f"{error}")

    def close() -> None:
        vm.close()
        said.append("closed")

    if fails:
        fake.inject("set_attributes", 12)
    vm.add_listener(slow)
    threads = [threading.Thread(target=convert, args=[8])]
    threads[0].start()
    assert slow.inside.wait(30)
    # The same page, so that this conversion waits for the first one, and is refused after close().
    threads += [threading.Thread(target=close), threading.Thread(target=convert, args=[8])]
    for thread in threads[1:]:
        thread.start()
        time.sleep(0.2)
    assert said == []
    assert not vm.closed
    slow.go_on.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [what for what, *_ in slow.told] == ["prepare", "aborted" if fails else "committed"]
    first = ["undone" in line if fails else line == "converted 8" for line in said]
    assert (sum(first), said.count("closed"), said.count("this machine is closed")) == (1, 1, 1), said
    with pytest.raises(PagegateError, match="closed"):
        vm.convert(9 * PAGE, PAGE, to="private")


@pytest.mark.parametrize("listener", [object(), Log, 7])
def test_an_object_that_is_no_listener_is_refused(vm, listener) -> None:
    with pytest.raises(PolicyError):
        vm.add_listener(listener)


def test_a_misspelt_method_is_refused(vm) -> None:
    class Misspelt:
        def commited(self, change) -> None: ...

        def prepare(self, change) -> None: ...

    with pytest.raises(PolicyError, match="committed"):
        vm.add_listener(Misspelt())


class Device(Listener):
    """A device model that maps what is shared, and fails in these of its calls, before it did anything or after."""

    def __init__(self, fails: set[int], *, late: bool) -> None:
        self.mapped: set[int] = set()
        self.fails = fails
        self.late = late
        self.calls = 0
        self.failed = 0

    def _call(self, change: Change, *, shared: bool) -> None:
        self.calls += 1
        fail = self.calls in self.fails
        self.failed += fail
        if fail and not self.late:
            raise ValueError(self.calls)
        pages = range(change.gpa, change.gpa + change.size, PAGE)
        self.mapped = self.mapped | set(pages) if shared else self.mapped - set(pages)
        if fail:
            raise ValueError(self.calls)

    def prepare(self, change: Change) -> None:
        self._call(change, shared=False)

    def committed(self, change: Change) -> None:
        self._call(change, shared=change.to == "shared")

    def aborted(self, change: Change) -> None:
        self._call(change, shared=True)


def shared_pages(vm) -> set[int]:
    runs = [(gpa, size) for gpa, size, state in vm.attributes.runs() if state == "shared"]
    return {page for gpa, size in runs for page in range(gpa, gpa + size, PAGE)}


STEPS = [
    (8 * PAGE, 4 * PAGE, "private"),
    (9 * PAGE, PAGE, "shared"),
    (8 * PAGE, 6 * PAGE, "shared"),
    (10 * PAGE, 2 * PAGE, "private"),
    (0, 16 * PAGE, "private"),
    (0, 16 * PAGE, "shared"),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kernel_fails", [None, 0, 3])
def test_a_device_maps_what_is_shared_whichever_call_fails(late, kernel_fails) -> None:
    failed = 0
    for first in range(2, 30):
        fake = Fake([])
        with Vm(MEMORY, hypervisor=fake) as vm:
            others = [Device(set(), late=False) for _ in range(2)]
            device = Device({first}, late=late)
            for listener in (others[0], device, others[1]):
                vm.add_listener(listener)
            if kernel_fails is not None:
                fake.inject("set_attributes", 12, after=kernel_fails)
            for gpa, size, to in STEPS:
                with contextlib.suppress(PagegateError, ValueError):
                    vm.convert(gpa, size, to=to)
                for listener in (device, *others):
                    assert listener.mapped == shared_pages(vm), (first, gpa, size, to)
        failed += device.failed
    assert failed > 5


@pytest.mark.parametrize("late", [False, True])
def test_a_listener_that_fails_again_is_told_before_the_next_run(late) -> None:
    fake = Fake([Step.doorbell(8 * PAGE, 1, 0)])
    with Vm(MEMORY, hypervisor=fake, initial="private") as vm:
        vm.vcpus[0].start()
        device = Device(set(), late=late)
        vm.add_listener(device)
        device.fails = {device.calls + 1, device.calls + 2, device.calls + 3}
        with pytest.raises(ValueError, match=str(device.calls + 1)):
            vm.run(timeout=10)
        assert not vm.attributes.is_private(8 * PAGE)
        with pytest.raises(ValueError, match=str(device.calls + 1)):
            vm.run(timeout=10)
        assert fake.replies() == []
        assert vm.run(timeout=10).reason == "halt"
        assert device.mapped == shared_pages(vm)
        assert [reply.value for reply in fake.replies()] == [0]


def test_a_listener_that_failed_is_told_the_state_that_the_pages_are_in_by_then() -> None:
    with Vm(MEMORY, hypervisor=Fake([Step.halt()])) as vm:
        vm.vcpus[0].start()
        device = Device(set(), late=False)
        vm.add_listener(device)
        vm.convert(8 * PAGE, 4 * PAGE, to="private")
        device.fails = {device.calls + 1, device.calls + 2}
        with pytest.raises(ValueError):  # noqa: PT011
            vm.convert(8 * PAGE, 4 * PAGE, to="shared")
        vm.convert(10 * PAGE, 1 * PAGE, to="private")
        vm.run(timeout=10)
        assert device.mapped == shared_pages(vm)
