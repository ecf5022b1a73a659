"""Policies for Linux, under the boots of a stock kernel: the examples, and policies that end the run.

    PAGEGATE_TEST_GUESTS   a folder with kernels: files vmlinuz-*; the first is booted

Their initrd needs a static busybox, as test_linux.py says.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from pagegate import Convert, Policy, Report, Vm, linux, trace
from pagegate.policies import DenyAll
from pagegate.script import load

from .conftest import MIB, PAGE

MEMORY = 256 * MIB
SECONDS = 240
BSS_DECRYPTED = 2 * MIB
SWIOTLB = 64 * MIB
POOLS = 96
"""Pages of the three pools for atomic DMA."""
RESERVED = 64 * MIB
"""A page that Linux is told not to use. A process that reads it in /dev/mem touches it as shared."""
APPEND = f"quiet memmap=64K${RESERVED:#x}"
COMMAND = f"""dmesg | grep 'DMA: '
echo READY
read -r go
dd if=/dev/mem bs={PAGE} skip={RESERVED // PAGE} count=1 of=/dev/null
echo READ"""
READER = "copy_from_kernel_nofault"
"""The function of Linux that reads for /dev/mem."""
EXAMPLES = Path(__file__).parents[2] / "examples"
KERNELS = sorted(Path(os.environ.get("PAGEGATE_TEST_GUESTS") or os.devnull).glob("vmlinuz-*"))

pytestmark = [
    pytest.mark.timeout(SECONDS + 60),
    pytest.mark.skipif(not KERNELS, reason="$PAGEGATE_TEST_GUESTS names no folder of kernels"),
]


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(linux.build(command=COMMAND))
    return path


@pytest.fixture
def machine(initrd):
    """Makes machines with a kernel loaded, and closes them."""
    with contextlib.ExitStack() as opened:
        yield lambda policy: opened.enter_context(loaded(policy, initrd))


def loaded(policy: object, initrd: Path) -> Vm:
    vm = Vm(MEMORY, policy=policy, platform="pc", confidential="sev", enforcement="traps", events=8192)
    vm.boot(KERNELS[0], initrd=initrd, append=APPEND)
    return vm


def boot(vm: Vm) -> str:
    """Runs the machine until its /init waits for a line, and returns what was on its console."""
    match = vm.console.expect("READY", timeout=SECONDS)
    return match.string.decode(errors="replace")


def go_on(vm: Vm) -> Report:
    """Lets /init read the reserved page."""
    vm.console.write("\n")
    return vm.run(timeout=SECONDS)


def example(name: str, function: str | None = None, **options: object):
    return load(EXAMPLES / f"{name}.py", function, {key: str(value) for key, value in options.items()})


def function(symbol: str | None) -> str:
    return (symbol or "?").partition("+")[0]


class Alarmed(NamedTuple):
    boot: Path
    """The trace of the boot."""
    armed: bool
    alarms: list[int]
    """How many there were when /init waited, and after it went on."""
    report: Report
    printed: str


@pytest.fixture(scope="module")
def alarmed(initrd, tmp_path_factory) -> Alarmed:
    """A boot that is recorded, under the alarm."""
    file = tmp_path_factory.mktemp("trace") / "good.parquet"
    policy = example("linux_alarm", stop="yes")
    with loaded(policy, initrd) as vm, contextlib.redirect_stderr(io.StringIO()) as printed:
        with trace.Recorder(vm, file):
            boot(vm)
        armed, alarms = policy.armed, [policy.alarms]
        report = go_on(vm)
        return Alarmed(file, armed, [*alarms, policy.alarms], report, printed.getvalue())


def test_a_boot_causes_no_alarm_and_a_private_page_after_init_does(alarmed) -> None:
    assert (alarmed.armed, alarmed.alarms) == (True, [0, 1])
    report = alarmed.report
    assert report.reason == (
        f"4096 private bytes at {RESERVED:#x} were touched as shared after /init, by vCPU 0 in {report.at.symbol}"
    )
    assert function(report.at.symbol) == READER
    assert alarmed.printed == f"alarm: {report.reason}\n"


def test_what_one_boot_shared_is_all_that_the_next_may_share(alarmed, machine) -> None:
    policy = example("linux_learn_then_lock", "learned", trace=alarmed.boot)
    learned = dict(policy.left)
    assert learned["implicit", PAGE] == BSS_DECRYPTED // PAGE + 1
    assert learned["explicit", 2 * MIB] == (BSS_DECRYPTED + SWIOTLB) // (2 * MIB)
    assert trace.replay(alarmed.boot, example("linux_learn_then_lock", "learned", trace=alarmed.boot)).different == 0

    vm = machine(policy)
    boot(vm)
    # Not one request more or less, though everything is at another address.
    assert set(policy.left.values()) == {0}
    report = go_on(vm)
    assert (report.reason, report.denied, function(report.at.symbol)) == ("denied", 1, READER)
    assert vm.attributes.is_private(RESERVED)


def test_linux_does_not_look_at_the_answer_to_a_request_that_is_refused(machine, capsys) -> None:
    vm = machine(example("linux_bss_and_swiotlb"))
    console = boot(vm)
    denied = [event for event in vm.events if event.decision == "deny"]
    kinds = Counter((event.kind, event.to, event.size, event.errno) for event in denied)
    assert kinds == {("explicit", "shared", PAGE, 22): POOLS}
    who = {function(vm.symbol(event.rip)) for event in denied}
    assert len(who) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"refused: 4096 bytes at {denied[0].gpa:#x} to shared, asked for in {who.pop()}"
    assert all(vm.attributes.is_private(event.gpa) for event in denied)
    # It believes that it has the pools.
    assert "DMA: preallocated 128 KiB GFP_KERNEL pool for atomic allocations" in console
    assert SWIOTLB < MEMORY - vm.attributes.private_bytes < SWIOTLB + BSS_DECRYPTED

    report = go_on(vm)
    assert (report.reason, report.denied, function(report.at.symbol)) == ("denied", 1, READER)
    assert f"refused: 4096 bytes at {RESERVED:#x} to shared, asked for in {READER}" in capsys.readouterr().err


class WidenAndKeep(Policy):
    """Two examples: one judges the touches, the other the requests. What the first converts has bytes at the reset."""

    def __init__(self) -> None:
        self.widen, self.keep = example("linux_widen_bss"), example("linux_keep_at_reset")
        self.vm: Vm | None = None
        self.section = self.resets = 0

    def memory_fault(self, fault):
        self.section = self.section or fault.gpa
        return self.widen.memory_fault(fault)

    def map_gpa_range(self, call):
        self.widen.map_gpa_range(call)
        if call.state == "mixed":
            self.resets += 1
            self.vm.write(self.mark, b"in use")
        return self.keep.map_gpa_range(call)

    @property
    def mark(self) -> int:
        """In the page of the section that Linux keeps shared."""
        return self.section + PAGE - 6


def test_the_section_takes_one_fault_and_outlasts_the_reset(machine) -> None:
    policy = WidenAndKeep()
    vm = policy.vm = machine(policy)
    boot(vm)
    implicit = [event for event in vm.events if event.kind == "implicit"]
    assert len(implicit) <= 4
    assert (implicit[0].gpa, implicit[0].done_size) == (policy.section, BSS_DECRYPTED)
    assert {event.done_size for event in implicit[1:]} <= {PAGE}
    assert policy.resets == 1
    assert vm.read(policy.mark, 6) == b"in use"
    report = go_on(vm)
    assert report.reason == "poweroff"
    assert b"READ\r\n" in vm.console.tail()


def test_where_everything_is_refused_the_report_says_who_asked(machine) -> None:
    vm = machine(DenyAll())
    report = vm.run(timeout=SECONDS)
    assert (report.reason, report.requests, report.denied) == ("denied", 1, 1)
    (event,) = (event for event in vm.events if event.kind == "implicit")
    assert (event.decision, event.outcome) == ("deny", "denied")
    assert (report.at.rip, function(report.at.symbol)) == (event.rip, function(vm.symbol(event.rip)))
    # Linux 6.1 clears it in a loop of its own, 6.12 by memset.
    assert function(report.at.symbol) in {"clear_bss", "memset_orig"}
    assert vm.attributes.private_bytes == MEMORY


class RaisesAt(Policy):
    def __init__(self, request: int) -> None:
        self.left = request

    def memory_fault(self, fault):
        self.left -= 1
        if not self.left:
            self.last = fault.gpa, fault.rip, fault.symbol
            raise KeyError("mine")
        return Convert()


def test_what_a_hook_raises_says_where_the_guest_was(machine) -> None:
    policy = RaisesAt(300)
    vm = machine(policy)
    with pytest.raises(KeyError, match="mine") as raised:
        vm.run(timeout=SECONDS)
    gpa, rip, symbol = policy.last
    notes = raised.value.__notes__
    assert notes[:4] == ["vCPU 0", f"gpa {gpa:#x}", "state private", f"rip {rip:#x}"]
    assert function(symbol) in {"clear_bss", "memset_orig"}
    assert any(symbol in note for note in notes[4:])
    assert MEMORY - vm.attributes.private_bytes == 299 * PAGE
