"""Bugs that were fixed and do not depend on the hypervisor."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from pagegate import Convert, Deny, Listener, PagegateError, Policy, PolicyError, Stop, Vm
from pagegate.testing import Fake, Step

PAGE = 4096
MEMORY = 64 * PAGE


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("ending", ["stop", "timeout"])
def test_a_run_that_is_ending_still_raises_an_interrupt(make, ending) -> None:
    handled = threading.Event()
    within = []

    def handler(*_) -> None:
        handled.set()
        raise InterruptError

    class Slow(Policy):
        def map_gpa_range(self, call):
            if ending == "stop":
                vm.stop()
            else:
                time.sleep(0.4)  # much longer than the timeout
            os.kill(os.getpid(), signal.SIGUSR1)
            within.append(handled.wait(10))
            return Convert()

    vm, _ = make([Step.doorbell(PAGE, 1, 16)], policy=Slow())
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(InterruptError):
            vm.run(timeout=0.05 if ending == "timeout" else 30)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert within == [True]
    # Nothing is left of the interrupt: the machine can run again.
    assert vm.run(timeout=10).reason == "halt"


class Answers(Listener):
    def __init__(self, answer) -> None:
        self.answer = answer

    def prepare(self, change):
        return self.answer


def convert_with(answer) -> tuple[Exception | None, bool]:
    """Converts to private with a listener that answers this: the error, and whether it was converted."""
    fake = Fake([])
    with Vm(MEMORY, hypervisor=fake) as vm:
        vm.add_listener(Answers(answer))
        error = None
        try:
            vm.convert(8 * PAGE, PAGE, to="private")
        except PagegateError as raised:
            error = raised
        assert fake.is_private(8 * PAGE) is vm.attributes.is_private(8 * PAGE)
        return error, vm.attributes.is_private(8 * PAGE)


@pytest.mark.parametrize("answer", [0, 1, "no", "", Deny(), Stop("x")], ids=repr)
def test_a_wrong_answer_of_a_listener_converts_nothing(answer) -> None:
    error, converted = convert_with(answer)
    assert isinstance(error, PolicyError)
    assert "listener answered" in str(error)
    assert not converted


@pytest.mark.parametrize("answer", [None, True])
def test_a_listener_allows_by_none_and_true(answer) -> None:
    assert convert_with(answer) == (None, True)


def test_a_listener_refuses_by_false() -> None:
    error, converted = convert_with(False)
    assert "refused" in str(error)
    assert not isinstance(error, PolicyError)
    assert not converted


def test_run_is_refused_inside_a_listener() -> None:
    # Made without the fixture, because closing it would hang if run() does.
    vm = Vm(MEMORY, hypervisor=Fake([Step.doorbell(PAGE, 1, 16)]))
    vm.vcpus[0].start()
    errors = []

    class Runs:
        def committed(self, change) -> None:
            if change.initial:
                return
            try:
                vm.run(timeout=0.2)
            except PagegateError as error:
                errors.append(str(error))

    vm.add_listener(Runs())
    thread = threading.Thread(target=vm.convert, args=(8 * PAGE, PAGE), kwargs={"to": "private"}, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "run() hangs"
    assert len(errors) == 1
    assert "listener" in errors[0]
    assert vm.attributes.is_private(8 * PAGE)
    vm.close()


def test_polling_the_events_misses_none(make, in_background) -> None:
    cycles = 20_000
    scripts = [[Step.doorbell(page * PAGE, 1, 16), Step.doorbell(page * PAGE, 1, 0)] for page in (2, 8)]
    vm, _ = make(*scripts, cycles=cycles, events=8 * cycles)
    run = in_background(vm, timeout=60.0)
    polled = []
    over = False
    while not over:
        over = run.report is not None or run.error is not None  # the loop's last round comes after the run
        polled += vm.events.since(polled[-1].sequence + 1 if polled else 0)
    assert run.join().reason == "halt"
    assert [event.sequence for event in polled] == list(range(4 * cycles))
    assert (vm.events.total, vm.events.dropped) == (4 * cycles, 0)
