"""Listeners that failed and are told again, before the next run at the latest, and what ends the run meanwhile."""

from __future__ import annotations

import _thread
import contextlib
import threading
import time

import pytest
from pagegate import Change, PagegateError, Vm
from pagegate.testing import Fake, Step

from .test_listeners import MEMORY, PAGE, Log, Slow


class FailsThenSlow(Log):
    """Fails as often as it is told to, so that it has to be told again before the next run, and takes its time then."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = 0
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def committed(self, change: Change) -> None:
        if self.fails:
            self.fails -= 1
            raise ValueError
        if not self.go_on.is_set():
            self.inside.set()
            assert self.go_on.wait(30)
        super().committed(change)


def test_a_listener_that_always_fails_is_told_each_page_once() -> None:
    with Vm(MEMORY, hypervisor=Fake([Step.halt()])) as vm:
        vm.vcpus[0].start()
        listener = FailsThenSlow()
        vm.add_listener(listener)
        listener.fails = rounds = 1000
        concerned = set()
        for turn in range(rounds // 4):
            # Pages that touch, overlap and are apart, up to three runs a time.
            gpa, size = turn % 7 * 3 * PAGE, (1 + turn % 4) * PAGE
            to = ["private", "shared"][turn % 2]
            concerned |= {p for p in range(gpa, gpa + size, PAGE) if vm.attributes.is_private(p) != (to == "private")}
            with contextlib.suppress(ValueError):
                vm.convert(gpa, size, to=to)
        # Each conversion that changes something tells it, and once more because it failed. It still has failures left.
        assert rounds / 8 < rounds - listener.fails < rounds
        listener.fails, listener.initial = 0, []
        assert vm.run(timeout=10).reason == "halt"
        told = [(page, to) for gpa, size, to in listener.initial for page in range(gpa, gpa + size, PAGE)]
        assert dict(told).keys() == concerned
        assert len(told) == len(concerned), "told twice"
        assert all((to == "private") == vm.attributes.is_private(page) for page, to in told)


def test_a_stop_is_not_lost_while_a_listener_is_told_before_the_run() -> None:
    fake = Fake([Step.doorbell(8 * PAGE, 1, 0)])
    with Vm(MEMORY, hypervisor=fake, initial="private") as vm:
        vm.vcpus[0].start()
        listener, said = FailsThenSlow(), []
        vm.add_listener(listener)
        listener.fails = 2
        with pytest.raises(ValueError):  # noqa: PT011
            vm.convert(4 * PAGE, PAGE, to="shared")
        listener.go_on.clear()
        run = threading.Thread(target=lambda: said.append(vm.run(timeout=30).reason))
        run.start()
        assert listener.inside.wait(30)
        assert vm.running
        with pytest.raises(PagegateError, match="running"):
            vm.run(timeout=1)
        with pytest.raises(PagegateError, match="running"):
            vm.close()
        vm.stop()
        listener.go_on.set()
        run.join(30)
        assert said == ["stopped"]
        assert not vm.running
        assert fake.replies() == []
        assert vm.run(timeout=10).reason == "halt"
        assert [reply.value for reply in fake.replies()] == [0]


@pytest.mark.parametrize("by", ["timeout", "stopped", "interrupt"])
def test_what_ends_a_run_ends_one_that_waits_for_pages(by) -> None:
    with Vm(MEMORY, hypervisor=Fake([Step.halt()])) as vm:
        vm.vcpus[0].start()
        failing, slow = FailsThenSlow(), Slow()
        vm.add_listener(failing)
        failing.fails = 2
        with pytest.raises(ValueError):  # noqa: PT011
            vm.convert(8 * PAGE, PAGE, to="private")
        vm.convert(8 * PAGE, PAGE, to="shared")
        vm.add_listener(slow)
        converting = threading.Thread(target=lambda: vm.convert(8 * PAGE, PAGE, to="private"))
        converting.start()
        assert slow.inside.wait(30)
        begun = time.monotonic()
        ends = {"stopped": vm.stop, "interrupt": _thread.interrupt_main}.get(by, lambda: None)
        timer = threading.Timer(0.3, ends)
        timer.start()
        try:
            if by == "interrupt":
                with pytest.raises(KeyboardInterrupt):
                    vm.run(timeout=20)
            else:
                assert vm.run(timeout=0.3 if by == "timeout" else 20).reason == by
            assert time.monotonic() - begun < 10
        finally:
            timer.join()
            slow.go_on.set()
            converting.join(30)
        assert vm.run(timeout=10).reason == "halt"
        assert failing.initial[-1] == (8 * PAGE, PAGE, "private")
