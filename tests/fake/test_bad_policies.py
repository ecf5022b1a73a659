"""Policies that hang, call everything from everywhere, fork, or drop their machine."""

from __future__ import annotations

import itertools
import queue
import threading
import time

import pytest
from pagegate import Convert, PagegateError, PolicyError, PolicyTimeoutError, Vm
from pagegate.testing import Fake, Step

from tests import programs

PAGE = 4096
AT = 8 * PAGE
ASKS = [Step.hypercall(AT, 1, 16), Step.hypercall(AT, 1, 0)]
FAULTS = [Step.memory_fault(AT)]
POISON = [Step.memory_fault(AT, errno=133)]


def seconds_of(run) -> tuple[BaseException, float]:
    begun = time.monotonic()
    with pytest.raises(PagegateError) as raised:
        run()
    return raised.value, time.monotonic() - begun


# ---- policy_timeout


class Hangs:
    """A policy, a handler and a listener that loop for ever; `busy` in Python, else in short sleeps."""

    def __init__(self, busy: bool) -> None:
        self.busy = busy

    def hang(self, *_: object) -> None:
        while True:
            if not self.busy:
                time.sleep(0.01)

    map_gpa_range = memory_fault = memory_poison = prepare = __call__ = hang

    def committed(self, change: object) -> None:
        pass


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("what", ["map_gpa_range", "memory_fault", "memory_poison", "handler", "listener"])
def test_a_call_that_does_not_return_gets_an_exception(make, what, busy) -> None:
    steps = {"memory_fault": FAULTS, "memory_poison": POISON, "handler": [Step.io_read(0x80)]}.get(what, ASKS)
    hangs = Hangs(busy)
    policy = hangs if what in ("map_gpa_range", "memory_fault", "memory_poison") else None
    vm, _ = make(steps, policy=policy, policy_timeout=0.1)
    if what == "handler":
        vm.on_io(0x80, hangs)
    if what == "listener":
        vm.add_listener(hangs)
    error, seconds = seconds_of(lambda: vm.run(timeout=20))
    assert isinstance(error, PolicyTimeoutError)
    assert "longer than policy_timeout" in str(error)
    assert any("vCPU 0" in note for note in error.__notes__)
    assert 0.1 <= seconds < 0.6
    assert not vm.running


class ClingsWhenLookedAt:
    """An answer that keeps the thread when a message is made of it."""

    def __repr__(self) -> str:
        while True:
            time.sleep(0.01)


class ClingsWhenDropped(bytes):
    def __del__(self) -> None:
        while True:
            time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("answer", [ClingsWhenLookedAt, ClingsWhenDropped])
@pytest.mark.parametrize("what", ["map_gpa_range", "memory_fault", "memory_poison", "handler", "listener"])
def test_what_is_done_with_an_answer_is_part_of_the_call(make, what, answer) -> None:
    class Answers:
        def map_gpa_range(self, *_: object) -> object:
            return answer()

        memory_fault = memory_poison = prepare = __call__ = map_gpa_range

        def committed(self, change: object) -> None:
            pass

    steps = {"memory_fault": FAULTS, "memory_poison": POISON, "handler": [Step.io_write(0x80, b"x")]}.get(what, ASKS)
    if answer is ClingsWhenLookedAt and what == "handler":
        steps = [Step.io_read(0x80)]
    policy = Answers() if what in ("map_gpa_range", "memory_fault", "memory_poison") else None
    vm, _ = make(steps, policy=policy, policy_timeout=0.1)
    if what == "handler":
        vm.on_io(0x80, Answers())
    if what == "listener":
        vm.add_listener(Answers())
    begun = time.monotonic()
    if answer is ClingsWhenDropped and what == "handler":
        # A finalizer's exception ends it, and goes no further.
        assert vm.run(timeout=20).reason == "halt"
    else:
        error, _ = seconds_of(lambda: vm.run(timeout=20))
        assert isinstance(error, PolicyTimeoutError) == (answer is ClingsWhenLookedAt)
    assert 0.1 <= time.monotonic() - begun < 0.9


def test_a_call_that_ends_in_time_gets_none(make) -> None:
    class Slow:
        def map_gpa_range(self, call: object) -> Convert:
            time.sleep(0.1)
            return Convert()

    vm, _ = make(ASKS * 5, policy=Slow(), policy_timeout=0.3)
    report = vm.run(timeout=20)
    assert (report.reason, report.conversions) == ("halt", 10)


def test_a_call_that_catches_it_gets_it_again(make) -> None:
    caught: list[float] = []

    class Stubborn:
        def map_gpa_range(self, call: object) -> Convert:
            while len(caught) < 3:
                try:
                    while True:
                        time.sleep(0.01)
                except PolicyTimeoutError:
                    caught.append(time.monotonic())
            return Convert()

    vm, _ = make(ASKS[:1], policy=Stubborn(), policy_timeout=0.1)
    assert vm.run(timeout=20).conversions == 1
    assert len(caught) == 3
    assert all(0.08 <= later - earlier < 0.5 for earlier, later in itertools.pairwise(caught))


def test_the_next_call_does_not_get_the_exception_of_one_in_c(make) -> None:
    # The first call executes no Python code: it is a built-in function, which returns after the limit.
    calls: list[object] = []
    vm, _ = make([Step.io_write(0x80, b"x"), Step.io_write(0x81, b"x")], policy_timeout=0.1)
    gate: queue.SimpleQueue[None] = queue.SimpleQueue()
    threading.Timer(0.4, gate.put, [None]).start()
    # get(block=access): an access is true.
    vm.on_io(0x80, gate.get)
    vm.on_io(0x81, calls.append)
    assert vm.run(timeout=20).reason == "halt"
    assert len(calls) == 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300])
def test_a_limit_is_a_number_of_seconds(seconds) -> None:
    with pytest.raises(ValueError, match="policy_timeout"):
        Vm(64 * PAGE, hypervisor=Fake([]), policy_timeout=seconds)


# ---- a hook calls everything


def test_a_hook_calls_everything(make) -> None:
    said: dict[str, str] = {}

    class Everything:
        def map_gpa_range(self, call: object) -> Convert:
            calls = {
                "run": lambda: vm.run(timeout=1),
                "close": vm.close,
                "exit": lambda: vm.__exit__(None, None, None),
                "start": lambda: vm.vcpus[0].start(rip=0x1000),
                "regs": lambda: vm.vcpus[0].regs(),
                "load": lambda: vm.load(b"x", at=0x2000),
                "boot": lambda: vm.boot("/nonexistent"),
                "read": lambda: vm.read(0x2000, 1),
                "write": lambda: vm.write(0x2000, b"y"),
                "convert": lambda: vm.convert(0x10000, PAGE, to="private"),
                "replace": lambda: vm.policy.replace(vm.policy.current),
                "forget": vm.policy.forget,
                "events": lambda: list(vm.events),
                "runs": lambda: vm.attributes.runs(),
                "usage": vm.memory_usage,
                "on_io": lambda: vm.on_io(0x90, print),
                "on_mmio": lambda: vm.on_mmio(0x100_0000, PAGE, print),
                "add_listener": lambda: vm.add_listener(listener),
                "remove_listener": lambda: vm.remove_listener(listener),
                "symbol": lambda: vm.symbol(0),
                "ram": lambda: vm.ram,
                "console": lambda: vm.console,
                "another machine": another,
                "a thread": lambda: in_a_thread(lambda: vm.convert(0x12000, PAGE, to="private")),
                "stop": vm.stop,
            }
            for name, call_it in calls.items():
                try:
                    call_it()
                    said[name] = "done"
                except (PagegateError, OSError) as error:
                    said[name] = str(error)
            return Convert()

    class Listener:
        def committed(self, change: object) -> None:
            pass

    def another() -> None:
        with Vm(64 * PAGE, hypervisor=Fake([Step.halt()])) as other:
            other.vcpus[0].start(rip=0x1000)
            assert other.run(timeout=5).reason == "halt"

    def in_a_thread(body) -> None:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    listener = Listener()
    vm, _ = make(ASKS, policy=Everything())
    report = vm.run(timeout=20)
    assert (report.reason, report.conversions) == ("stopped", 1)
    refused = {name: why for name, why in said.items() if why != "done"}
    assert set(refused) == {"run", "close", "exit", "start", "regs", "boot", "symbol", "console"}
    assert all("running" in refused[name] for name in ("run", "close", "exit", "start", "regs"))
    assert vm.read(0x2000, 1) == b"y"
    assert vm.attributes.state(0x10000) == vm.attributes.state(0x12000) == "private"


def test_a_listener_calls_everything(make) -> None:
    said: dict[str, str] = {}

    class Listener:
        def committed(self, change) -> None:
            if change.initial:
                return
            calls = {
                "run": lambda: vm.run(timeout=1),
                "close": vm.close,
                "read": lambda: vm.read(0x2000, 1),
                "write": lambda: vm.write(0x2000, b"y"),
                "convert": lambda: vm.convert(0x10000, PAGE, to="private"),
                "load": lambda: vm.load(b"x", at=0x2000),
                "add_listener": lambda: vm.add_listener(Listener()),
                "remove_listener": lambda: vm.remove_listener(self),
                "runs": lambda: vm.attributes.runs(),
                "events": lambda: list(vm.events),
                "replace": lambda: vm.policy.replace(None),
                "stop": vm.stop,
            }
            for name, call_it in calls.items():
                try:
                    call_it()
                    said[name] = "done"
                except (PagegateError, OSError) as error:
                    said[name] = str(error)

    vm, _ = make(ASKS)
    vm.add_listener(Listener())
    report = vm.run(timeout=20)
    assert report.reason == "stopped"
    refused = {name for name, why in said.items() if why != "done"}
    assert {"run", "close", "read", "write", "convert", "load", "add_listener"} <= refused, said


# ---- in a process of its own


PARTS = "import os, sys, threading, time, gc\nfrom pagegate import *\nfrom pagegate.testing import Fake, Step\n"


def passes(code: str, status: int = 0, said: str = "") -> None:
    programs.passes(code, PARTS, status, said)


def test_a_hook_drops_its_machine() -> None:
    passes(
        """
        class Drops:
            def map_gpa_range(self, call):
                del globals()["vm"]
                gc.collect()
                return Convert()
        vm = Vm(64 * 4096, hypervisor=Fake([Step.hypercall(0x8000, 1, 16)]), policy=Drops())
        vm.vcpus[0].start(rip=0x1000)
        run = vm.run
        assert run(timeout=10).reason == "halt"
        del run
        gc.collect()
        """
    )


@pytest.mark.parametrize("how", ["os._exit(7)", "sys.exit(7)", "raise KeyboardInterrupt", "os.abort()"])
def test_a_hook_ends_the_process(how: str) -> None:
    passes(
        f"""
        class Ends:
            def map_gpa_range(self, call):
                {how}
        vm = Vm(64 * 4096, hypervisor=Fake([Step.hypercall(0x8000, 1, 16)]), policy=Ends())
        vm.vcpus[0].start(rip=0x1000)
        try:
            vm.run(timeout=10)
        except KeyboardInterrupt:
            sys.exit(5)
        """,
        status={"raise KeyboardInterrupt": 5, "os.abort()": -6}.get(how, 7),
    )


def test_a_hook_forks() -> None:
    # The child has only the thread of the hook. What it does there is its own; the parent's machine goes on.
    passes(
        """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on: there are other threads
        class Forks:
            def map_gpa_range(self, call):
                child = os.fork()
                if child == 0:
                    os._exit(3)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
                return Convert()
        vm = Vm(64 * 4096, hypervisor=Fake([Step.hypercall(0x8000, 1, 16)] * 3), policy=Forks())
        vm.vcpus[0].start(rip=0x1000)
        report = vm.run(timeout=10)
        assert (report.reason, report.requests) == ("halt", 3)
        vm.close()
        """
    )


class Odd:
    """An answer that raises when it is looked at."""

    def __repr__(self) -> str:
        raise ZeroDivisionError

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


def test_the_answer_to_a_wrong_answer_is_one_error(make) -> None:
    class Nonsense:
        def map_gpa_range(self, call: object) -> Odd:
            return Odd()

    vm, _ = make(ASKS, policy=Nonsense())
    with pytest.raises((PolicyError, ZeroDivisionError)):
        vm.run(timeout=10)
    assert vm.attributes.state(AT) == "shared"


def test_the_text_of_a_hooks_exception_is_the_programs_own(make) -> None:
    # It is not asked for: that would run the hook's code at the run's end, and lose a Ctrl-C that it meets there.
    said: list[str] = []

    class Refused(Exception):
        def __str__(self) -> str:
            said.append("asked")
            return "refused"

    class Refuses:
        def map_gpa_range(self, call: object) -> Convert:
            raise Refused

    class Listens:
        def prepare(self, change: object) -> None:
            raise Refused

        def committed(self, change: object) -> None:
            pass

    vm, _ = make(ASKS, policy=Refuses())
    with pytest.raises(Refused):
        vm.run(timeout=10)
    vm, _ = make(ASKS)
    vm.add_listener(Listens())
    with pytest.raises(Refused):
        vm.run(timeout=10)
    with pytest.raises(Refused):
        vm.convert(AT, PAGE, to="private")
    assert said == []


def test_a_call_that_waits_for_another_machine_ends_with_that(make) -> None:
    """It waits in C: the exception comes when the other machine's run is over."""
    inner, _ = make([Step.block()] * 1000)
    runs: list[str] = []

    class Nests:
        def map_gpa_range(self, call: object) -> Convert:
            try:
                runs.append(inner.run(timeout=1).reason)
            except BaseException as error:
                runs.append(type(error).__name__)
                raise
            return Convert()

    vm, _ = make(ASKS[:1], policy=Nests(), policy_timeout=0.1)
    error, seconds = seconds_of(lambda: vm.run(timeout=20))
    assert isinstance(error, PolicyTimeoutError)
    assert 1 <= seconds < 3
    assert not inner.running


def test_hooks_of_another_machine_that_catch_everything_do_not_see_this_one_s_timeout(make) -> None:
    """An exception for a call is raised in its own thread, and not in those of a machine that the call runs."""
    caught: list[BaseException] = []
    entered: list[int] = []

    class Catches:
        def map_gpa_range(self, call: object) -> Convert:
            entered.append(1)
            end = time.monotonic() + 0.6
            while time.monotonic() < end:
                try:
                    time.sleep(0.01)
                except BaseException as error:  # noqa: BLE001
                    caught.append(error)
            return Convert()

    inner, _ = make(ASKS[:1], policy=Catches())

    class Nests:
        def map_gpa_range(self, call: object) -> Convert:
            inner.run(timeout=20)
            return Convert()

    vm, _ = make(ASKS[:1], policy=Nests(), policy_timeout=0.1)
    error, _ = seconds_of(lambda: vm.run(timeout=20))
    assert isinstance(error, PolicyTimeoutError)
    assert (entered, caught) == ([1], [])
