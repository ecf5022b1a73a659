"""The signal that stops vCPUs: nobody's handler is replaced, and after a run all is as before."""

from __future__ import annotations

import gc
import signal
import threading

import pytest
from pagegate import PagegateError, Vm
from pagegate.testing import Fake, Step

from tests.testbed_parts import wait_until

MEMORY = 1 << 20
FIRST = signal.SIGRTMIN + 9


def dispositions() -> dict[str, str]:
    """The signals that this process handles, and those that it ignores."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: fields[name].strip() for name in ("SigCgt", "SigIgn")}


def handled(number: int) -> bool:
    return bool(int(dispositions()["SigCgt"], 16) >> (number - 1) & 1)


def machine(*steps: Step) -> Vm:
    vm = Vm(MEMORY, hypervisor=Fake(list(steps)))
    vm.vcpus[0].start(mode="real")
    return vm


@pytest.fixture
def theirs():
    """Sets somebody else's handler; the numbers of the signals that came."""
    came: list[int] = []
    before = {}

    def theirs(number: int) -> list[int]:
        before[number] = signal.signal(number, lambda each, _frame: came.append(each))
        return came

    yield theirs
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_thousand_machines_leave_the_dispositions_as_they_were() -> None:
    before = dispositions()
    for turn in range(1000):
        vm = machine(*[Step.io_write(0x10, [1])] * (turn % 3))
        if turn % 4:
            assert vm.run(timeout=10).reason == "halt"
        if turn % 5:
            vm.close()
        del vm
        if turn % 100 == 0:
            assert dispositions() == before, turn
    gc.collect()
    assert dispositions() == before


def test_it_is_handled_while_any_machine_runs(in_background) -> None:
    before = dispositions()
    with machine(Step.block()) as first, machine(Step.block()) as second:
        runs = [in_background(vm) for vm in (first, second)]
        wait_until(lambda: first.running and second.running)
        wait_until(lambda: handled(FIRST))
        for vm, run in zip((first, second), runs, strict=True):
            assert handled(FIRST)
            vm.stop()
            assert run.join().reason == "stopped"
        assert dispositions() == before


def test_a_signal_that_somebody_handles_is_not_taken(theirs, in_background) -> None:
    came = theirs(FIRST)
    before = dispositions()
    with machine(Step.block()) as vm:
        run = in_background(vm)
        wait_until(lambda: handled(FIRST + 1))
        vm.stop()
        assert run.join().reason == "stopped"
    assert dispositions() == before
    signal.raise_signal(FIRST)
    assert came == [FIRST], "theirs is still there, and only this one came"


def test_an_ignored_signal_is_ignored_again() -> None:
    before = signal.signal(FIRST, signal.SIG_IGN)
    try:
        with machine(Step.block()) as vm:
            assert vm.run(timeout=0.2).reason == "timeout"
        signal.raise_signal(FIRST)
    finally:
        signal.signal(FIRST, before)


def test_without_a_free_signal_the_run_does_not_begin(theirs) -> None:
    for number in range(FIRST, signal.SIGRTMAX + 1):
        theirs(number)
    with machine() as vm:
        with pytest.raises(PagegateError, match=r"each real-time signal from SIGRTMIN\+9 on has a handler.*EBUSY"):
            vm.run(timeout=10)
        assert not vm.running
        signal.signal(signal.SIGRTMAX, signal.SIG_DFL)
        assert vm.run(timeout=10).reason == "halt"


def test_a_handler_that_is_replaced_during_a_run_stays(theirs, in_background) -> None:
    with machine(Step.block()) as vm, machine() as other:
        run = in_background(vm)
        wait_until(lambda: handled(FIRST))
        came = theirs(FIRST)
        with pytest.raises(PagegateError, match="somebody else has replaced the handler of their signal.*EBUSY"):
            other.run(timeout=10)
        vm.stop()
        assert run.join().reason == "stopped"
        assert other.run(timeout=10).reason == "halt"
    came.clear()
    signal.raise_signal(FIRST)
    assert came == [FIRST]


def test_machines_that_run_in_turn_are_all_stopped() -> None:
    """The last run to end puts the disposition back while another begins."""
    before = dispositions()

    def often() -> None:
        with machine(*[Step.block()] * 300) as vm:
            for _ in range(60):
                assert vm.run(timeout=0.003).reason == "timeout"

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dispositions() == before
