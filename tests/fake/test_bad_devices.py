"""Devices in Python, and the hook ``device_access``, that do what they should not: the run ends, and no more."""

from __future__ import annotations

import threading
import time
from typing import ClassVar

import pytest
from pagegate import Convert, Deny, Discard, PagegateError, Policy, PolicyError, PolicyTimeoutError, Retry, Vm
from pagegate.testing import Fake, Step

from tests import programs

from .test_bad_policies import Odd
from .test_virtio import DATA, MEMORY, PAGE, Echo, answered, completed, echoed, kick, ready, register, run_until

WHERE = ["process", "write_config", "reset", "device_access"]
"""A device's methods, and the hook that is asked about a device."""
THEN = {"write_config": register(0x2000, 1), "reset": register(0x14, 0, 1)}


def machine(where: str, act, **kwargs) -> Vm:
    """A machine whose driver makes the device or the hook call `act`. The hook denies where that returns ``None``."""

    class Acts(Policy):
        def device_access(self, access):
            answer = act()
            return Deny() if answer is None else answer

    class Device(Echo):
        pass

    def process(self, queue):
        list(queue)
        return act()

    if where == "process":
        Device.process = process
    elif where != "device_access":
        setattr(Device, where, lambda self, *_: act())
    steps = [*ready(), *THEN.get(where, kick()), *[Step.block()] * 50]  # a conversion may end one
    policy = Acts() if where == "device_access" else None
    vm = Vm(MEMORY, hypervisor=Fake(steps), platform="pc", policy=policy, **kwargs)
    vm.add_device(Device())
    vm.vcpus[0].start(mode="protected")
    echoed(vm)
    if where == "device_access":
        vm.convert(DATA, PAGE, to="private")
    return vm


def site_of(where: str) -> str:
    """What a note of an exception says: a configuration space is written by a vCPU."""
    return "vCPU 0" if where == "write_config" else "device Device"


@pytest.fixture(params=WHERE)
def where(request) -> str:
    return request.param


# ---- exceptions, and answers that are none


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_is_raised_ends_the_run(where, error) -> None:
    raised = error("from inside")

    def act():
        raise raised

    with machine(where, act) as vm:
        with pytest.raises(error) as caught:
            vm.run(timeout=20)
        assert caught.value is raised
        assert any(site_of(where) in note for note in raised.__notes__)
        assert not vm.running


def test_recursion_is_an_error(where) -> None:
    def act():
        act()

    with machine(where, act) as vm, pytest.raises(RecursionError):
        vm.run(timeout=20)


class Nothing(Policy):
    def device_access(self, access):
        pass


def test_no_answer_ends_the_run() -> None:
    with machine("device_access", Deny) as vm:
        vm.policy.replace(Nothing())
        with pytest.raises(PolicyError, match="answered None"):
            vm.run(timeout=20)


async def later() -> None:
    pass


ANSWERS = [5, "deny", Odd(), Odd, Convert(), Convert(to="private"), Retry(), Discard(), True, b"", later]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_an_answer_that_is_none_ends_the_run(answer) -> None:
    with machine("device_access", lambda: answer) as vm:
        with pytest.raises((PolicyError, ZeroDivisionError)):
            vm.run(timeout=20)
        assert completed(vm) == [(0, 0)]
        assert vm.attributes.state(DATA) == "private"


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_what_a_device_returns_is_ignored(answer) -> None:
    with machine("process", lambda: answer) as vm:
        assert run_until(vm, lambda: bool(completed(vm))).reason == "stopped"
        assert completed(vm) == [(0, 0)]


# ---- policy_timeout


@pytest.mark.parametrize("busy", [True, False])
def test_a_call_that_does_not_return_gets_an_exception(where, busy) -> None:
    def act():
        while True:
            if not busy:
                time.sleep(0.01)

    with machine(where, act, policy_timeout=0.1) as vm:
        begun = time.monotonic()
        with pytest.raises(PolicyTimeoutError, match="longer than policy_timeout") as raised:
            vm.run(timeout=20)
        assert 0.1 <= time.monotonic() - begun < 1
        assert any(site_of(where) in note for note in raised.value.__notes__)
        assert not vm.running


def test_a_call_of_a_device_is_ended_after_the_vcpus_too() -> None:
    def act():
        while True:
            time.sleep(0.01)

    with machine("process", act, policy_timeout=0.4) as vm:
        begun = time.monotonic()
        assert vm.run(timeout=0.1).reason == "timeout"
        assert 0.3 <= time.monotonic() - begun < 2


def test_a_call_that_ends_in_time_gets_none(where) -> None:
    called = []
    with machine(where, lambda: called.append(time.sleep(0.2)), policy_timeout=0.5) as vm:
        assert run_until(vm, lambda: called).reason == "stopped"


class Clings:
    """An answer that keeps the thread when it is dropped."""

    dropped: ClassVar[list[float]] = []

    def __del__(self) -> None:
        begun = time.monotonic()
        try:
            while True:
                time.sleep(0.01)
        finally:
            self.dropped.append(time.monotonic() - begun)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_dropping_an_answer_is_part_of_the_call(where) -> None:
    Clings.dropped.clear()
    with machine(where, Clings, policy_timeout=0.1) as vm:
        if where == "device_access":
            with pytest.raises(PolicyError, match="no decision"):
                vm.run(timeout=20)
        else:
            assert run_until(vm, lambda: Clings.dropped).reason == "stopped"
    assert Clings.dropped
    assert all(0.08 <= seconds < 1 for seconds in Clings.dropped)


# ---- calls from inside


def test_everything_is_called(where) -> None:
    said: dict[str, str] = {}

    def in_a_thread(body) -> None:
        thread = threading.Thread(target=body)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    def act():
        calls = {
            "run": lambda: vm.run(timeout=1),
            "close": vm.close,
            "exit": lambda: vm.__exit__(None, None, None),
            "start": lambda: vm.vcpus[0].start(mode="protected"),
            "boot": lambda: vm.boot("/nonexistent"),
            "add_device": lambda: vm.add_device(Echo()),
            "read": lambda: vm.read(0x2000, 1),
            "write": lambda: vm.write(0x2000, b"y"),
            "convert": lambda: vm.convert(0x30_0000, PAGE, to="private"),
            "a thread": lambda: in_a_thread(lambda: vm.convert(0x31_0000, PAGE, to="private")),
            "replace": lambda: vm.policy.replace(Nothing()),
            "events": lambda: list(vm.events),
            "usage": vm.memory_usage,
            "stop": vm.stop,
        }
        # A device may be asked once more while the run ends, and finds its vCPU at rest.
        for name, call_it in [] if said else calls.items():
            try:
                call_it()
                said[name] = "done"
            except (PagegateError, OSError) as error:
                said[name] = str(error)

    with machine(where, act) as vm:
        assert vm.run(timeout=20).reason == "stopped"
        refused = {name for name, why in said.items() if why != "done"}
        assert refused == {"run", "close", "exit", "start", "boot", "add_device"}, {
            name: said[name] for name in refused
        }
        assert vm.read(0x2000, 1) == b"y"
        assert vm.attributes.state(0x30_0000) == vm.attributes.state(0x31_0000) == "private"


def test_a_page_that_is_converted_under_the_device() -> None:
    """By its own policy, while it asks about another page of the same request."""

    def act():
        vm.convert(DATA + PAGE, PAGE, to="private")

    with machine("device_access", act) as vm:
        run_until(vm, lambda: answered(vm))
        assert completed(vm) == [(0, 0)]
        vm.convert(DATA + PAGE, PAGE, to="shared")
        assert vm.read(DATA + PAGE, 6) == bytes(6)


# ---- in a process of its own

PARTS = """
import gc, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork from 3.12 on: there are other threads
from tests.fake.test_bad_devices import machine
"""


def passes(code: str, where: str, status: int = 0, said: str = "", parts: str = "") -> None:
    programs.passes(code.replace("WHERE", repr(where)), PARTS + parts, status, said)


@pytest.mark.parametrize("how", ["os._exit(7)", "sys.exit(7)", "raise KeyboardInterrupt", "os.abort()"])
def test_it_ends_the_process(where, how) -> None:
    passes(
        f"""
        def act():
            {how}
        vm = machine(WHERE, act)
        try:
            vm.run(timeout=10)
        except KeyboardInterrupt:
            sys.exit(5)
        """,
        where,
        status={"raise KeyboardInterrupt": 5, "os.abort()": -6}.get(how, 7),
    )


def test_it_forks(where) -> None:
    passes(
        """
        def act():
            child = os.fork()
            if child == 0:
                os._exit(3)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
            vm.stop()
        vm = machine(WHERE, act)
        assert vm.run(timeout=10).reason == "stopped"
        vm.close()
        """,
        where,
    )


def test_it_drops_its_machine(where) -> None:
    passes(
        """
        def act():
            stop = vm.stop
            del globals()["vm"]
            gc.collect()
            stop()
        vm = machine(WHERE, act)
        run = vm.run
        assert run(timeout=10).reason == "stopped"
        del run
        gc.collect()
        """,
        where,
    )


@pytest.mark.parametrize(("seconds", "most"), [(0.2, 2), (1000, 4)], ids=["waited for", "left behind"])
def test_the_interpreter_ends_meanwhile(where, seconds, most) -> None:
    begun = time.monotonic()
    passes(
        f"""
        entered = threading.Event()
        def act():
            entered.set()
            time.sleep({seconds})
        vm = machine(WHERE, act)
        threading.Thread(target=vm.run, daemon=True).start()
        assert entered.wait(10)
        print("end of main")
        """,
        where,
        said="end of main\n",
    )
    assert time.monotonic() - begun < most + 4, "and the interpreter's start"


def test_the_interpreter_ends_with_a_call_that_returns_meanwhile(where) -> None:
    # The call returns after it was left behind, while the interpreter is taken down.
    passes(
        """
        entered = threading.Event()
        def act():
            entered.set()
            time.sleep(2.7)
        vm = machine(WHERE, act)
        threading.Thread(target=vm.run, daemon=True).start()
        assert entered.wait(10)
        sys.stdout = Slow()
        print("end of main")
        """,
        where,
        said="end of main\n",
        parts=programs.SLOW.format(seconds=1.5),
    )


# An exception that goes no further is dropped, too, with what its traceback refers to.
DROPPED = [*[(where, "return answer") for where in WHERE], ("process", "raise DeviceAccessError")]


@pytest.mark.parametrize(("where", "then"), DROPPED)
def test_the_interpreter_ends_while_an_answer_is_dropped(where, then) -> None:
    passes(
        f"""
        from pagegate import DeviceAccessError
        entered = threading.Event()
        class Answer:
            def __del__(self):
                entered.set()
                time.sleep(2.7)
        def act():
            answer = Answer()
            {then}
        vm = machine(WHERE, act)
        def body():
            try:
                vm.run()
            except Exception:
                pass
        threading.Thread(target=body, daemon=True).start()
        assert entered.wait(10)
        sys.stdout = Slow()
        print("end of main")
        """,
        where,
        said="end of main\n",
        parts=programs.SLOW.format(seconds=1.5),
    )
