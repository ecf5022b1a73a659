"""A run is claimed before its policy is told of it: what ends a run is heeded from then on, and no other one begins."""

from __future__ import annotations

import signal
import threading
import time

import pagegate
import pytest
from pagegate import Convert, PagegateError, Policy, Vm
from pagegate.testing import Fake, Step

from tests.programs import passes

MOMENTS = pytest.mark.parametrize("moment", ["configure", "running"])


def machine(policy, *steps):
    vm = Vm("1M", policy=policy, hypervisor=Fake(list(steps) or [Step.block()]))
    vm.vcpus[0].start(rip=0x1000)
    return vm


class During(Policy):
    """Calls a function while a run's policy is told of it."""

    def __init__(self, moment, call) -> None:
        setattr(self, moment, call)
        self.done_with: list[str] = []

    def map_gpa_range(self, call):
        return Convert()

    def done(self, report):
        self.done_with.append(report.reason)


def in_thread(call) -> list[BaseException | None]:
    ended: list[BaseException | None] = []

    def body() -> None:
        try:
            call()
            ended.append(None)
        except PagegateError as error:
            ended.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits"
    return ended


@MOMENTS
def test_a_stop_meanwhile_ends_the_run(moment):
    policy = During(moment, lambda vm: vm.stop())
    with machine(policy) as vm:
        assert vm.run(timeout=20).reason == "stopped"
        assert vm.report.reason == "stopped"
    assert policy.done_with == ["stopped"]


@MOMENTS
def test_the_time_that_it_takes_counts(moment):
    with machine(During(moment, lambda vm: time.sleep(0.4))) as vm:
        begun = time.monotonic()
        assert vm.run(timeout=0.2).reason == "timeout"
        assert time.monotonic() - begun < 10


@MOMENTS
def test_no_other_run_begins_and_the_machine_is_not_closed_meanwhile(moment):
    said: list[object] = []

    def attack(vm) -> None:
        said.append(vm.running)
        for call in (vm.run, vm.close):
            said.extend(in_thread(call))
            with pytest.raises(PagegateError, match="running"):
                call()

    with machine(During(moment, attack), Step.doorbell(0, 1, 16)) as vm:
        report = vm.run(timeout=20)
        assert (report.reason, report.requests) == ("halt", 1)
        assert not vm.running
    running, ran, closed = said
    assert running is True
    assert isinstance(ran, PagegateError)
    assert "running already" in str(ran)
    assert isinstance(closed, PagegateError)
    assert "stop()" in str(closed)


@MOMENTS
def test_what_it_raises_gives_the_claim_up(moment):
    failing = [True]

    def fail(vm) -> None:
        if failing:
            raise ZeroDivisionError

    with machine(During(moment, fail), Step.doorbell(0, 1, 16)) as vm:
        with pytest.raises(ZeroDivisionError):
            vm.run(timeout=20)
        assert not vm.running
        assert vm.report is None
        failing.clear()
        assert vm.run(timeout=20).reason == "halt"


@MOMENTS
def test_ctrl_c_meanwhile(moment):

    def interrupted(vm) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    with machine(During(moment, interrupted)) as vm:
        with pytest.raises(KeyboardInterrupt):
            vm.run(timeout=20)
        assert not vm.running


@MOMENTS
def test_a_policy_that_is_replaced_meanwhile(moment):
    """The new one judges; it is told that the run begins if it does so after that."""
    second = During("map_gpa_range", lambda call: Convert())
    told: list[str] = []
    second.running = lambda vm: told.append("running")
    with machine(During(moment, lambda vm: vm.policy.replace(second)), Step.doorbell(0, 1, 16)) as vm:
        vm.run(timeout=20)
        assert vm.policy.seen == 1
    assert told == (["running"] if moment == "configure" else [])
    assert second.done_with == ["halt"]


def test_a_handler_can_still_be_set_and_a_vcpu_started_in_configure():
    class Prepares(Policy):
        def configure(self, vm):
            vm.on_io(0x80, lambda io: None)
            vm.vcpus[0].start(rip=0x1000)
            vm.write(0x1000, b"\xf4")

    vm = Vm("1M", policy=Prepares(), hypervisor=Fake([Step.io_write(0x80, b"1")]))
    with vm:
        assert vm.run(timeout=20).reason == "halt"


def test_a_device_can_be_added_in_configure():
    class Prepares(Policy):
        def configure(self, vm):
            vm.add_device(pagegate.devices.Rng())

    with Vm("1M", platform="pc", policy=Prepares(), hypervisor=Fake([])) as vm:
        vm.vcpus[0].start(rip=0x1000)
        vm.run(timeout=0.2)


def test_a_run_that_is_refused_leaves_the_last_report():
    with machine(None, Step.doorbell(0, 1, 16), Step.block(), Step.block()) as vm:
        ran = threading.Thread(target=vm.run)
        vm.run(timeout=0.2)
        last = vm.report
        ran.start()
        while not vm.running:
            time.sleep(0.01)
        before = vm.report
        with pytest.raises(PagegateError, match="running already"):
            vm.run()
        assert vm.report is before
        assert last.reason == "timeout"
        vm.stop()
        ran.join(10)
        assert vm.report.reason == "stopped"


def test_where_a_run_is_seen_to_be_over_its_report_is_there():
    with machine(None, *[Step.doorbell(0, 1, 16), Step.doorbell(0, 1, 0)] * 50) as vm:
        for _ in range(20):
            before = vm.report
            run = threading.Thread(target=vm.run)
            run.start()
            while not vm.running and run.is_alive():
                pass
            while vm.running:
                pass
            assert vm.report is not before
            run.join(10)


def test_a_run_that_fails_before_a_vcpu_runs_has_a_report_and_done_is_told():
    policy = During("running", lambda vm: None)
    with Vm("1M", policy=policy, hypervisor=Fake([])) as vm:
        with pytest.raises(PagegateError, match="no vCPU is ready to run") as raised:
            vm.run(timeout=20)
        assert vm.report.reason == "failed"
        assert raised.value.report is vm.report
    assert policy.done_with == ["failed"]


def test_the_error_that_ends_a_run_has_its_report():
    with machine(None, Step.doorbell(0, 1, 16), Step.memory_fault(0x500000)) as vm:
        with pytest.raises(PagegateError) as raised:
            vm.run(timeout=20)
        report = raised.value.report
        assert (report.reason, report.conversions) == ("failed", 1)
        assert report is vm.report
    with pytest.raises(PagegateError) as raised:
        vm.run()
    assert raised.value.report is None, "it is no run's"


def test_the_interpreter_ends_while_a_policy_is_told():
    passes(
        """
import threading, time
from pagegate import Vm
from pagegate.testing import Fake, Step

told = threading.Event()

class Policy:
    def configure(self, vm):
        told.set()
        time.sleep(0.5)
    def map_gpa_range(self, call):
        raise SystemExit("asked")

vm = Vm(1 << 20, policy=Policy(), hypervisor=Fake([Step.hypercall(0x8000, 1, 16)], cycles=1000000))
vm.vcpus[0].start(rip=0x1000)
threading.Thread(target=vm.run, daemon=True).start()
assert told.wait(10)
"""
    )
