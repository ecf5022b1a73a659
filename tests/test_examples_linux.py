"""The examples for Linux, asked what a boot asks. tests/testbed/test_linux_policies.py has real boots."""

from __future__ import annotations

from collections import Counter

import pytest
from pagegate import Convert, Deny, Stop, trace
from pagegate.guests import PAGE
from pagegate.testing import Fake, PolicyTester, Step

from .example_parts import EXAMPLES, MEMORY, MIB, example

BLOCK = 2 * MIB
BSS = range(8 * MIB, 10 * MIB)
CLOCK = 40 * MIB + 51 * PAGE
"""The page of the boot vCPU's clock, steal time and interrupt flags."""
SWIOTLB = 16 * MIB
POOLS = 4 * MIB


def clear_bss(tester: PolicyTester) -> None:
    for gpa in BSS[::PAGE]:
        assert tester.fault(gpa, private=False) == Convert()


def boot(tester: PolicyTester) -> None:
    """The requests of a boot up to /init, in Linux's order, with few bounce buffers and pages of pools."""
    clear_bss(tester)
    assert tester.call(0, 640 << 10, to="private") == Convert()
    tester.call(MIB, MEMORY - MIB, to="private")
    tester.call(BSS.start, len(BSS), to="shared")
    tester.fault(CLOCK, private=False)
    for _ in range(3):
        tester.call(CLOCK, to="shared")
    for gpa in range(SWIOTLB, SWIOTLB + 3 * BLOCK, BLOCK):
        tester.call(gpa, BLOCK, to="shared")
    for page in range(4):
        tester.call(POOLS + page * PAGE, to="shared")
    for gpa in BSS[3 * PAGE :: PAGE]:
        assert tester.call(gpa, to="private") == Convert()


def shared_after(policy: object) -> tuple[PolicyTester, int]:
    tester = PolicyTester(policy)
    boot(tester)
    return tester, tester.shared_bytes


def test_every_example_says_against_what_and_how_to_run_it() -> None:
    files = sorted(EXAMPLES.glob("linux_*.py"))
    assert len(files) == 5
    for file in files:
        source = file.read_text()
        assert source.startswith('"""')
        assert f"-p examples/{file.name}" in source
        assert "    pagegate boot vmlinuz " in source
        assert "\nAgainst " in source or "\nFor " in source


# ---- linux_bss_and_swiotlb


def test_only_what_the_boot_needs_is_shared(capsys) -> None:
    tester, shared = shared_after(example("linux_bss_and_swiotlb"))
    assert shared == 3 * PAGE + PAGE + 3 * BLOCK
    assert tester.state(POOLS, 4 * PAGE) == "private"
    assert tester.call(POOLS, to="shared") == tester.fault(POOLS) == Deny()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"refused: 4096 bytes at {POOLS:#x} to shared, asked for in an unknown function"


def test_the_bounce_buffers_are_one_range_of_bounded_size() -> None:
    tester = PolicyTester(example("linux_bss_and_swiotlb", swiotlb="4M"))
    assert tester.call(SWIOTLB, 3 * BLOCK, to="shared") == Deny()
    # Linux asks for what lies outside of whole 2 MiB blocks in smaller pieces.
    start, left = SWIOTLB - PAGE, BLOCK - PAGE
    for gpa, size in [(start, PAGE), (SWIOTLB, BLOCK), (SWIOTLB + BLOCK, left)]:
        assert tester.call(gpa, size, to="shared") == Convert()
        assert tester.call(start - PAGE, 2 * PAGE, to="shared") == Deny()
        assert tester.call(gpa + size + PAGE, PAGE, to="shared") == Deny()
    assert tester.call(SWIOTLB + BLOCK + left, PAGE, to="shared") == Deny()
    assert tester.shared_bytes == 4 * MIB
    assert tester.call(start, 4 * MIB, to="private") == Convert()
    assert tester.call(SWIOTLB, PAGE, to="shared") == Convert()


def test_one_page_a_vcpu_may_be_touched() -> None:
    tester = PolicyTester(example("linux_bss_and_swiotlb", vcpus=2))
    clear_bss(tester)
    assert tester.call(SWIOTLB, BLOCK, to="shared") == Convert()
    # Not yet known: it has to be touched first.
    assert tester.call(CLOCK, to="shared") == Deny()
    assert [tester.fault(CLOCK + page * BLOCK) for page in range(3)] == [Convert(), Convert(), Deny()]
    assert tester.call(CLOCK, to="shared") == Convert()
    assert tester.call(CLOCK, 2 * PAGE, to="shared") == Deny()
    assert tester.fault(CLOCK, private=True) == Convert()
    assert tester.call(BSS.start - PAGE, 2 * PAGE, to="shared") == Deny()
    assert tester.call(BSS.stop - PAGE, 2 * PAGE, to="shared") == Deny()


# ---- linux_widen_bss


def test_the_first_touch_converts_the_section() -> None:
    tester = PolicyTester(example("linux_widen_bss"))
    assert tester.fault(BSS.start) == Convert(size=BLOCK)
    assert tester.state(BSS.start, len(BSS)) == "shared"
    assert tester.shared_bytes == len(BSS)
    # Not at a block's start: no section begins here.
    assert tester.fault(CLOCK) == Convert()
    tester.call(0, 640 << 10, to="private")
    assert tester.fault(20 * MIB) == Convert()
    assert tester.shared_bytes == len(BSS) + 2 * PAGE
    assert tester.fault(BSS.start, private=True) == Convert()


# ---- linux_keep_at_reset


@pytest.mark.parametrize(("policy", "found"), [("linux_keep_at_reset", b"in use"), (None, bytes(6))])
def test_what_is_in_use_outlasts_the_reset(fake_vm, policy, found) -> None:
    steps = [Step.doorbell(0, MEMORY // PAGE, 16), Step.doorbell(BSS.start, len(BSS) // PAGE, 0), Step.halt()]
    vm = fake_vm(hypervisor=Fake(steps), memory=MEMORY, policy=policy and example(policy), initial="private")
    vm.convert(BSS.start, len(BSS), to="shared")
    vm.write(BSS.start, b"in use")
    report = vm.run(timeout=10)
    assert (report.reason, report.conversions) == ("halt", 2)
    assert vm.read(BSS.start, 6) == found


def test_only_the_reset_keeps_bytes() -> None:
    tester = PolicyTester(example("linux_keep_at_reset"))
    tester.fault(BSS.start)
    assert tester.call(MIB, MEMORY - MIB, to="private") == Convert(discard=False)
    assert tester.call(MIB, MEMORY - MIB, to="private") == Convert()
    assert tester.call(BSS.start, to="shared") == Convert()
    assert tester.call(BSS.start, 2 * PAGE, to="shared") == Convert()
    assert tester.call(BSS.start, to="private") == Convert()


# ---- linux_learn_then_lock


@pytest.fixture
def recorded(tmp_path, fake_vm):
    """A trace of three pages that are shared one by one, and one request for two, all of which go back."""
    asked = [*((page, 1) for page in range(3)), (8, 2)]
    steps = [Step.doorbell(page * PAGE, pages, to) for to in (0, 16) for page, pages in asked]
    file = tmp_path / "good.parquet"
    vm = fake_vm([*steps, Step.halt()], initial="private")
    with trace.Recorder(vm, file):
        vm.run(timeout=10)
    return file


def test_as_many_of_each_size_as_were_learned(recorded) -> None:
    policy = example("linux_learn_then_lock", "learned", trace=recorded)
    assert policy.left == Counter({("explicit", PAGE): 3, ("explicit", 2 * PAGE): 1})
    tester = PolicyTester(policy)
    # Elsewhere than in the trace.
    assert [tester.call((20 + page) * PAGE, to="shared") for page in range(4)] == [Convert()] * 3 + [Deny()]
    assert [tester.call(page * PAGE, 2 * PAGE, to="shared") for page in (40, 42)] == [Convert(), Deny()]
    assert tester.fault(50 * PAGE) == tester.call(60 * PAGE, 3 * PAGE, to="shared") == Deny()
    assert tester.fault(20 * PAGE, private=True) == tester.call(0, MEMORY, to="private") == Convert()
    assert tester.shared_bytes == 0


def test_a_trace_passes_its_own_lock_and_slack_allows_more(recorded) -> None:
    assert trace.replay(recorded, example("linux_learn_then_lock", "learned", trace=recorded)).different == 0
    tester = PolicyTester(example("linux_learn_then_lock", "learned", trace=recorded, slack=1))
    assert [tester.call(page * PAGE, to="shared") for page in range(5)] == [Convert()] * 4 + [Deny()]
    assert tester.fault(50 * PAGE) == Deny()


# ---- linux_alarm


def test_the_alarm_is_armed_by_the_boot_s_end(capsys) -> None:
    policy = example("linux_alarm")
    tester = PolicyTester(policy)
    clear_bss(tester)
    tester.call(MIB, MEMORY - MIB, to="private")
    tester.call(BSS.start, len(BSS), to="shared")
    tester.fault(CLOCK)
    assert not policy.armed
    assert tester.call(BSS.stop - PAGE, to="private") == Convert()
    assert policy.armed
    assert tester.call(BSS.start, to="shared") == Convert()
    assert policy.alarms == 0
    assert tester.fault(MIB, vcpu=1) == tester.call(BSS.stop - 2 * PAGE, 2 * PAGE, to="shared") == Convert()
    assert capsys.readouterr().err.splitlines() == [
        "alarm: 4096 private bytes at 0x100000 were touched as shared after /init, by vCPU 1 in an unknown function",
        f"alarm: 8192 private bytes at {BSS.stop - 2 * PAGE:#x} were asked for as shared after /init, "
        "by vCPU 0 in an unknown function",
    ]
    assert tester.fault(MIB, private=True) == tester.call(2 * MIB, to="private") == Convert()
    assert policy.alarms == 2


def test_a_boot_causes_no_alarm_and_stop_ends_the_run() -> None:
    policy = example("linux_alarm", stop="yes")
    tester, _ = shared_after(policy)
    assert (policy.armed, policy.alarms) == (True, 0)
    stopped = tester.fault(MIB)
    assert isinstance(stopped, Stop)
    assert stopped.reason.startswith("4096 private bytes at 0x100000 were touched as shared after /init, by vCPU 0 ")
    assert tester.state(MIB) == "private"


def test_alarms_are_counted_and_a_bounded_number_is_printed(capsys) -> None:
    policy = example("linux_alarm")
    tester, _ = shared_after(policy)
    for page in range(150):
        tester.call(page * PAGE, to="shared")
    assert policy.alarms == 150
    assert len(capsys.readouterr().err.splitlines()) == 100
