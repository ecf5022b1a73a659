"""The guest's serial console: `vm.console`."""

from __future__ import annotations

import re
import threading
import time

import pytest
from pagegate import Convert, PagegateError, Vm
from pagegate.console import ConsoleTimeout
from pagegate.testing import Fake, Step

from tests.boot_parts import POWER_OFF, READ, write_kernel
from tests.testbed_parts import wait_until

MEMORY = 64 << 20
INPUT_LIMIT = 64 << 10
KEPT = 1 << 20
ASK = Step.hypercall(0x10_0000, 1, 0)


def says(text: bytes) -> list[Step]:
    return [Step.io_write(0x3F8, [each]) for each in text]


@pytest.fixture
def booted(tmp_path):
    """Makes a machine with a kernel that takes these steps."""
    machines = []

    def booted(*steps, cycles=1, policy=None) -> Vm:
        fake = Fake(list(steps), cycles=cycles)
        vm = Vm(MEMORY, platform="pc", confidential="sev", policy=policy, hypervisor=fake)
        machines.append((vm, fake))
        vm.boot(write_kernel(tmp_path))
        return vm

    yield booted
    for vm, _ in machines:
        vm.close()


class Slow:
    """Takes its time for an explicit request."""

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds = seconds

    def map_gpa_range(self, call) -> Convert:
        time.sleep(self.seconds)
        return Convert()


def test_each_byte_is_read_once_and_the_tail_stays(booted) -> None:
    vm = booted(*says(b"hello\n"), POWER_OFF)
    assert vm.console.read(timeout=0) == b""
    assert vm.run(timeout=10).reason == "poweroff"
    assert repr(vm.console) == "<pagegate.Console: the last that the guest wrote is b'hello\\n'>"
    assert vm.console.read(2) == b"he"
    assert vm.console.read() == b"llo\n"
    assert vm.console.read(timeout=0.05) == b""
    assert (vm.console.tail(), vm.console.tail(3), vm.console.lost) == (b"hello\n", b"lo\n", 0)


def test_reading_ends_with_the_machine(booted) -> None:
    vm = booted(*says(b"hello"), POWER_OFF)
    vm.run(timeout=10)
    console = vm.console
    vm.close()
    assert (console.read(), console.read()) == (b"hello", b"")


def test_a_bare_machine_has_none() -> None:
    with Vm(MEMORY, hypervisor=Fake([])) as vm, pytest.raises(PagegateError, match="platform"):
        _ = vm.console


def test_expect_runs_the_guest_until_the_match(booted) -> None:
    vm = booted(*says(b"version 6.1\nlogin: "), Step.block())
    match = vm.console.expect(r"version (\S+)\n")
    assert match[1] == b"6.1"
    assert not vm.running
    assert vm.console.expect(re.compile(b"login: $"), timeout=10)[0] == b"login: "
    assert vm.console.read(timeout=0) == b""


def test_expect_finds_what_is_unread_without_a_run(booted) -> None:
    vm = booted(*says(b"one two"), POWER_OFF)
    vm.run(timeout=10)
    assert vm.console.expect(b"one", timeout=0)[0] == b"one"
    assert vm.console.read() == b" two"


def test_expect_while_the_guest_runs(booted, in_background) -> None:
    vm = booted(ASK, *says(b"ready"), Step.block(), policy=Slow())
    running = in_background(vm)
    wait_until(lambda: vm.running)
    assert vm.console.expect("ready", timeout=10)[0] == b"ready"
    vm.stop()
    assert running.join().reason == "stopped"


def test_what_was_expected_in_vain(booted) -> None:
    vm = booted(*says(b"no such luck"), Step.block())
    with pytest.raises(ConsoleTimeout, match=r"did not write b'login' within 0\.2 s.*\nno such luck") as raised:
        vm.console.expect("login", timeout=0.2)
    assert isinstance(raised.value, TimeoutError)
    assert raised.value.output == b"no such luck"
    assert vm.console.expect("luck")[0] == b"luck", "the output stays unread"


def test_a_guest_that_ends_before(booted) -> None:
    vm = booted(*says(b"bye"), POWER_OFF)
    with pytest.raises(ConsoleTimeout, match="before the run ended") as raised:
        vm.console.expect("login", timeout=30)
    assert raised.value.output == b"bye"
    assert raised.value.__notes__ == ["the guest's run ended: poweroff"]


def test_expect_raises_what_the_run_raises(booted) -> None:
    class Failing:
        def map_gpa_range(self, call) -> Convert:
            raise KeyError("oops")

    vm = booted(ASK, Step.block(), policy=Failing())
    with pytest.raises(KeyError, match="oops"):
        vm.console.expect("login", timeout=30)


def test_a_wrong_pattern_runs_nothing(booted) -> None:
    vm = booted(*says(b"x"), POWER_OFF)
    with pytest.raises(re.error):
        vm.console.expect("(")
    assert vm.console.tail() == b""


@pytest.mark.parametrize("timeout", [-1, float("nan"), -float("inf"), 10**400])
def test_a_timeout_that_is_none(booted, timeout) -> None:
    vm = booted(*says(b"x"), POWER_OFF)
    vm.run(timeout=10)
    with pytest.raises(ValueError, match=f"timeout is {timeout}: "):
        vm.console.read(timeout=timeout)
    with pytest.raises(ValueError, match=f"timeout is {timeout}: "):
        vm.console.expect("x", timeout=timeout)
    assert vm.console.read(timeout=1e300) == b"x", "nothing was read before"


def test_written_bytes_reach_the_guest() -> None:
    fake = Fake([*READ, POWER_OFF])
    with Vm(MEMORY, platform="pc", hypervisor=fake) as vm:
        vm.vcpus[0].start(mode="real")
        vm.console.write("ab")
        assert vm.console.write(b"c\r") == 2
        assert vm.run(timeout=10).reason == "poweroff"
        assert b"".join(reply.data for reply in fake.replies()).startswith(b"abc\r")
        assert vm.console.tail() == b"", "it is not echoed"


def test_input_that_is_not_read_is_bounded(booted, monkeypatch) -> None:
    vm = booted(Step.block())
    taken = 0
    while more := vm.console.offer(bytes(INPUT_LIMIT)):
        taken += more
    assert INPUT_LIMIT <= taken < INPUT_LIMIT + 100  # and what the port's own buffer takes
    now = iter(range(0, 10**6, 5))
    monkeypatch.setattr("pagegate.console.time.monotonic", lambda: next(now))
    with pytest.raises(PagegateError, match="does not read its console: 3 bytes of 3 are left"):
        vm.console.write("abc")


def test_output_that_is_not_read_is_bounded_and_counted(booted) -> None:
    line = b"x" * 1000 + b"\n"
    vm = booted(*says(line), cycles=1200)
    console = vm.console
    assert vm.run(timeout=60).reason == "halt"
    output = console.read()
    assert len(output) <= KEPT
    assert console.lost == 1200 * len(line) - len(output) > 0
    assert output.endswith(b"x\n")


def test_two_threads_get_each_byte_once(booted) -> None:
    text = bytes(range(65, 91)) * 200
    vm = booted(*says(text), POWER_OFF)
    vm.run(timeout=30)
    parts: list[bytes] = []

    def read() -> None:
        while data := vm.console.read(7, timeout=0.2):
            parts.append(data)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(b"".join(parts)) == sorted(text)
