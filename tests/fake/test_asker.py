"""What a hook can ask about the vCPU whose request it judges, and where a run ended."""

from __future__ import annotations

import threading
from typing import Any

import pagegate
import pytest
from pagegate import (
    Convert,
    Deny,
    Livelock,
    MapGpaRange,
    MemoryFault,
    MemoryPoison,
    Registers,
    Stop,
    Whereabouts,
    policies,
)
from pagegate.testing import PolicyTester, Step

from .conftest import TWO_VIEWS, Way

PAGE = 4096
AT, CODE = 8 * PAGE, 0x1000
PRIVATE = 16
VMCALL = b"\x0f\x01\xd9"
NAMES = [
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rip",
    "rflags",
]
ONLY_IN_THE_HOOK = "only in the hook"


class Looks:
    """Looks at the vCPU of every request, and keeps what it saw."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer or Convert()
        self.seen: list[Any] = []
        self.kept: list[Any] = []

    def look(self, request: Any) -> Any:
        self.seen.append((request.rip, request.regs, request.symbol, request.disassembly))
        self.kept.append(request)
        return self.answer

    memory_fault = map_gpa_range = memory_poison = look


REQUESTS = {
    "hypercall": Step.hypercall(AT, 1, PRIVATE),
    "doorbell": Step.doorbell(AT, 1, PRIVATE),
    "fault": Step.memory_fault(AT),
}


@pytest.fixture(params=REQUESTS)
def asks(request, make):
    """Makes a machine that asks once, at the instruction VMMCALL, at `CODE`."""

    def asks(policy, **registers):
        vm, _ = make([REQUESTS[request.param]], policy=policy)
        # The fake moves RIP by one for a step, and for this one before the exit.
        start(vm, rip=CODE - (request.param == "fault"), **registers)
        return vm

    return asks


def start(vm, rip=CODE, **registers) -> None:
    vm.load(VMCALL, at=CODE)
    vm.vcpus[0].start(mode="long", rip=rip, **registers)


def test_the_registers_are_those_of_the_exit(asks) -> None:
    policy = Looks()
    values = {name: 0x1111 * (index + 1) for index, name in enumerate(NAMES[4:16])}
    vm = asks(policy, **values)
    assert vm.run(timeout=10).reason == "halt"
    ((rip, regs, symbol, disassembly),) = policy.seen
    assert isinstance(regs, Registers)
    assert {name: getattr(regs, name) for name in values} == values
    assert (rip, regs.rip, regs.rflags) == (CODE, CODE, 2)
    assert (symbol, disassembly) == (None, "vmmcall")
    assert f"rip={CODE:#x}" in repr(regs)


def test_a_doorbells_registers_are_its_arguments(make) -> None:
    policy = Looks()
    vm, _ = make([Step.doorbell(AT, 3, PRIVATE)], policy=policy)
    vm.run(timeout=10)
    ((_, regs, _, _),) = policy.seen
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (12, AT, 3, PRIVATE)


def test_each_vcpu_has_its_own(make) -> None:
    policy = Looks()
    vm, _ = make([Step.hypercall(AT, 1, PRIVATE)], [Step.hypercall(2 * AT, 1, PRIVATE)], policy=policy)
    for index, vcpu in enumerate(vm.vcpus):
        vcpu.start(mode="long", rip=CODE + index, r15=index + 7)
    vm.run(timeout=10)
    assert {(request.vcpu, regs.r15) for request, (_, regs, *_) in zip(policy.kept, policy.seen, strict=True)} == {
        (0, 7),
        (1, 8),
    }


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_code_is_read_from_the_shared_view(make, way) -> None:
    policy = Looks()
    vm, _ = make([Step.access(way.view(AT, "private"))], way=way, policy=policy)
    start(vm)
    vm.run(timeout=10)
    ((rip, _, _, disassembly),) = policy.seen
    assert (rip, disassembly) == (way.view(CODE, "shared"), "vmmcall")


@pytest.mark.parametrize("way", [Way("attributes"), *TWO_VIEWS], ids=str)
def test_private_code_is_not_read(make, way) -> None:
    policy = Looks()
    vm, _ = make([Step.hypercall(AT, 1, PRIVATE)], way=way, policy=policy)
    start(vm)
    vm.convert(CODE, PAGE, to="private")
    vm.run(timeout=10)
    assert policy.seen[0][-1] is None


def test_an_instruction_at_the_border_of_private_memory(make) -> None:
    # The last byte of a shared page is a whole instruction, or the first byte of a longer one.
    for code, expected in ((b"\xf4", "hlt"), (b"\x0f", None)):
        policy = Looks()
        vm, _ = make([Step.hypercall(AT, 1, PRIVATE)], policy=policy)
        vm.write(2 * PAGE - 1, code)
        vm.convert(2 * PAGE, PAGE, to="private")
        vm.vcpus[0].start(mode="long", rip=2 * PAGE - 1)
        vm.run(timeout=10)
        assert policy.seen[0][-1] == expected


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("real", "mov ax, 1234h"), ("protected", "mov eax, 56781234h"), ("long", "mov eax, 56781234h")],
)
def test_the_mode_says_how_to_disassemble(make, mode, expected) -> None:
    policy = Looks()
    vm, _ = make([Step.hypercall(AT, 1, PRIVATE)], policy=policy)
    vm.write(CODE, b"\xb8\x34\x12\x78\x56")
    vm.vcpus[0].start(mode=mode, rip=CODE)
    vm.run(timeout=10)
    assert policy.seen[0][-1] == expected


# ---- only in the hook


def refuses(request) -> None:
    names = ["regs", "symbol", "disassembly"] + (["rip"] if isinstance(request, MapGpaRange) else [])
    for name in names:
        with pytest.raises(AttributeError, match=ONLY_IN_THE_HOOK):
            getattr(request, name)
        assert not hasattr(request, name)


def test_a_kept_request_tells_nothing(asks) -> None:
    policy = Looks()
    asks(policy).run(timeout=10)
    (request,) = policy.kept
    refuses(request)
    if isinstance(request, MemoryFault):
        assert request.rip == CODE, "a fault keeps its own"


def test_a_kept_request_tells_nothing_in_a_later_hook(make) -> None:
    checked = []

    class Keeps:
        def map_gpa_range(self, call):
            if checked:
                refuses(checked[0])
                assert call.rip == CODE + 1
            checked.append(call)
            return Convert()

    vm, _ = make([Step.hypercall(AT, 1, PRIVATE), Step.hypercall(AT, 1, 0)], policy=Keeps())
    assert vm.run(timeout=10).reason == "halt"
    assert len(checked) == 2


def test_another_thread_is_told_nothing(asks) -> None:
    errors: list[BaseException] = []

    def elsewhere(request) -> None:
        try:
            refuses(request)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    class Asks:
        def look(self, request):
            thread = threading.Thread(target=elsewhere, args=(request,))
            thread.start()
            thread.join()
            assert request.regs.rip == CODE
            return Convert()

        memory_fault = map_gpa_range = look

    assert asks(Asks()).run(timeout=10).reason == "halt"
    assert errors == []


def test_a_request_made_by_hand_has_no_vcpu() -> None:
    for request in (MemoryFault(0), MemoryPoison(0), MapGpaRange(0, to="shared")):
        refuses(request)


def test_a_request_made_by_hand_in_a_hook_has_no_vcpu_either(asks) -> None:
    class Asks:
        def look(self, request):
            refuses(MemoryFault(AT))
            assert request.regs.rip == CODE
            return Convert()

        memory_fault = map_gpa_range = look

    assert asks(Asks()).run(timeout=10).reason == "halt"


def test_a_trial_has_no_vcpu() -> None:
    class Asks:
        def map_gpa_range(self, call):
            refuses(call)
            return Convert()

    assert PolicyTester(Asks(), memory=64 * PAGE).call(AT, to="private") == Convert()


def test_a_hook_at_the_end_of_a_built_in_chain(asks) -> None:
    policy = Looks()
    chain = policies.Quota(1 << 30, policies.RateLimit(1e9, 1000, policies.Align(PAGE, policy)))
    asks(chain).run(timeout=10)
    ((rip, _, _, disassembly),) = policy.seen
    assert (rip, disassembly) == (CODE, "vmmcall")


def test_a_poisoned_page(make) -> None:
    policy = Looks(Stop("poisoned"))
    vm, _ = make([Step.memory_fault(AT, errno=133)], policy=policy)
    start(vm, rip=CODE - 1)
    report = vm.run(timeout=10)
    assert (report.reason, policy.seen[0][0], policy.seen[0][-1]) == ("poisoned", CODE, "vmmcall")
    refuses(policy.kept[0])


# ---- events


@pytest.mark.parametrize(("platform", "rip"), [("bare", 0), ("pc", CODE)])
def test_only_a_pc_logs_the_rip_of_explicit_requests(make, platform, rip) -> None:
    vm, _ = make([Step.hypercall(AT, 1, PRIVATE), Step.doorbell(AT, 1, 0)], way=Way("memslots"), platform=platform)
    vm.run(timeout=10)
    assert [event.rip for event in vm.events] == [rip, rip and rip + 1]


# ---- where a run ended


ENDS = {
    "shutdown": ([Step.shutdown()], None),
    "denied": ([Step.memory_fault(AT)], Deny()),
    "enough": ([Step.memory_fault(AT)], Stop("enough")),
    "asked enough": ([Step.hypercall(AT, 1, PRIVATE)], Stop("asked enough")),
    "poisoned": ([Step.memory_fault(AT, errno=133)], Stop("poisoned")),
}


@pytest.mark.parametrize("reason", ENDS)
def test_the_report_says_where_the_vcpu_was_that_ended_the_run(make, recorder, reason) -> None:
    steps, answer = ENDS[reason]
    vm, _ = make([Step.block()], steps, policy=recorder(answer))
    vm.load(VMCALL * 2, at=CODE)
    vm.vcpus[1].start(mode="long", rip=CODE, cr2=0xDEAD_0000)
    report = vm.run(timeout=30)
    assert report.reason == reason
    at = report.at
    assert isinstance(at, Whereabouts)
    assert (at.vcpu, at.cr2, at.symbol) == (1, 0xDEAD_0000, None)
    assert at.rip in (CODE, CODE + 1), "the fake's moves by one for a step"
    assert at.instruction is not None
    assert str(at) == f"vCPU 1 at rip {at.rip:#x}, {at.instruction}, cr2 0xdead0000"
    assert repr(at) == f"<pagegate.Whereabouts {at}>"


def test_a_livelock_says_where(make, recorder) -> None:
    vm, _ = make([Step.access(AT)], policy=recorder(Convert(to="shared")), way=Way("attributes", 40))
    report = vm.run(timeout=60)
    assert (report.reason, report.at.vcpu) == ("livelock", 0)


def test_a_livelock_error_says_the_same(make) -> None:
    steps = [Step.memory_fault(AT)] * (pagegate.LIVELOCK_BOUND + 1)
    vm, _ = make([Step.block()], steps)
    # The fake's instruction pointer moves by one for a step.
    vm.load(b"\x90" * (pagegate.LIVELOCK_BOUND + 16), at=CODE)
    vm.convert(AT, PAGE, to="private")
    vm.vcpus[1].start(mode="long", rip=CODE, cr2=0xDEAD_0000)
    with pytest.raises(Livelock) as caught:
        vm.run(timeout=30)
    error = caught.value
    assert (error.vcpu, error.gpa, error.state) == (1, AT, "private")
    assert (error.instruction, error.cr2, error.symbol) == ("nop", 0xDEAD_0000, None)
    assert f"rip {error.rip:#x}, nop, cr2 0xdead0000: the same private access" in str(error)


def test_other_ends_have_no_place(make, recorder) -> None:
    for steps, timeout, reason in (([], 10, "halt"), ([Step.block()], 0.05, "timeout")):
        vm, _ = make(steps)
        report = vm.run(timeout=timeout)
        assert (report.reason, report.at) == (reason, None)
    # Nor has a run after one that had.
    vm, _ = make([Step.memory_fault(AT)], policy=recorder(Deny()))
    assert vm.run(timeout=10).at is not None
    assert vm.run(timeout=10).at is None
