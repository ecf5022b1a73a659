"""Listeners: what they are told of conversions, when, and what they may do."""

from __future__ import annotations

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


@pytest.mark.parametrize("use", ["read", "write", "convert", "load", "add_listener"])
def test_a_listener_cannot_use_memory(vm, use) -> None:
    calls = {
        "read": lambda: vm.read(8 * PAGE, 8),
        "write": lambda: vm.write(8 * PAGE, b"x"),
        "convert": lambda: vm.convert(8 * PAGE, PAGE, to="shared"),
        "load": lambda: vm.load(b"x", at=8 * PAGE),
        "add_listener": lambda: vm.add_listener(Log()),
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
