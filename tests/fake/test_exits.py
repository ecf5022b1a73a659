"""What is done for each errno and each exit reason of KVM_RUN."""

from __future__ import annotations

import errno

import pagegate
import pytest
from pagegate import BadBacking, Deny, Livelock, PagegateError, PolicyError, Retry, Stop
from pagegate.testing import Step

PAGE = 4096
PRIVATE = 8
EHWPOISON = 133  # Python's errno module does not have it everywhere
HLT, IO, MMIO, MEMORY_FAULT = 5, 2, 6, 39
KVM_EXIT_INTR, FAIL_ENTRY, SYSTEM_EVENT = 10, 9, 24
CALLS = ("set_attributes", "create_memslot", "delete_memslot", "discard")


def changes(fake):
    return [fake.calls(call) for call in CALLS]


# ---- EINTR, EAGAIN, ENOMEM


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.ENOMEM])
def test_temporary_failures_are_tried_again(make, number) -> None:
    vm, _ = make([Step.fail(number)] * 20)
    assert vm.run(timeout=10).reason == "halt"


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.ENOMEM])
def test_exit_reason_is_ignored_after_a_temporary_failure(make, recorder, number) -> None:
    policy = recorder()
    vm, _ = make([Step.memory_fault(PAGE, errno=number)], policy=policy)
    assert vm.run(timeout=10).reason == "halt"
    assert policy.requests == []
    assert vm.attributes.private_bytes == 0


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_temporary_failures_are_bounded(make, number) -> None:
    vm, _ = make([Step.fail(number)], cycles=100_000)
    with pytest.raises(PagegateError, match=errno.errorcode[number]) as caught:
        vm.run(timeout=30)
    assert caught.value.vcpu == 0


def test_interruptions_are_not_bounded(make) -> None:
    vm, _ = make([Step.fail(errno.EINTR)], cycles=20_000)
    assert vm.run(timeout=30).reason == "halt"


def test_intr_exit_resumes(make) -> None:
    vm, _ = make([Step.exit(KVM_EXIT_INTR)])
    assert vm.run(timeout=10).reason == "halt"


# ---- EFAULT


def test_annotated_efault_is_an_implicit_request(make, recorder) -> None:
    policy = recorder()
    vm, _ = make([Step.memory_fault(3 * PAGE, flags=PRIVATE)], policy=policy)
    report = vm.run(timeout=10)
    (fault,) = policy.requests
    assert isinstance(fault, pagegate.MemoryFault)
    assert (fault.vcpu, fault.gpa, fault.size, fault.private) == (0, 3 * PAGE, PAGE, True)
    assert (fault.flags, fault.errno, fault.state, fault.repeats) == (PRIVATE, errno.EFAULT, "shared", 0)
    assert (report.reason, report.faults, report.conversions, report.bytes_to_private) == ("halt", 1, 1, PAGE)
    assert vm.attributes.is_private(3 * PAGE)
    assert vm.attributes.private_bytes == PAGE


def test_annotated_shared_access_makes_the_page_shared(make) -> None:
    vm, _ = make([Step.memory_fault(3 * PAGE, flags=0)])
    vm.convert(0x2000, 4 * PAGE, to="private")
    report = vm.run(timeout=10)
    assert report.bytes_to_shared == PAGE
    assert vm.attributes.runs(0x2000, 4 * PAGE) == [
        (0x2000, PAGE, "private"),
        (0x3000, PAGE, "shared"),
        (0x4000, 2 * PAGE, "private"),
    ]


def test_bare_efault_is_bad_backing_naming_slot_and_vcpu(make, recorder) -> None:
    policy = recorder()
    vm, fake = make([], [Step.fail(errno.EFAULT)], policy=policy)
    before = changes(fake)
    with pytest.raises(BadBacking, match=r"vCPU 1\b.*slot 0\b") as caught:
        vm.run(timeout=10)
    assert caught.value.vcpu == 1
    assert policy.requests == []
    assert changes(fake) == before


@pytest.mark.parametrize("reason", [0, HLT, IO, MMIO, 3, 0xFFFF_FFFE])
def test_efault_with_any_other_reason_is_bad_backing(make, reason) -> None:
    vm, _ = make([Step.exit(reason, (PRIVATE, PAGE, PAGE), errno=errno.EFAULT)])
    with pytest.raises(BadBacking):
        vm.run(timeout=10)
    assert vm.attributes.private_bytes == 0


@pytest.mark.parametrize("number", [errno.EFAULT, EHWPOISON])
def test_a_stale_memory_fault_in_kvm_run_is_ignored(make, recorder, number) -> None:
    policy = recorder()
    vm, _ = make([Step.memory_fault(PAGE), Step.fail(number)], policy=policy)
    with pytest.raises(PagegateError) as caught:
        vm.run(timeout=10)
    assert len(policy.requests) == 1
    assert isinstance(caught.value, BadBacking) == (number == errno.EFAULT)


@pytest.mark.parametrize("bits", [1, 2, 4, 16, PRIVATE | 1, 1 << 63])
def test_unknown_fault_flags_are_refused(make, recorder, bits) -> None:
    policy = recorder()
    vm, fake = make([Step.memory_fault(PAGE, flags=bits)], policy=policy)
    before = changes(fake)
    with pytest.raises(PagegateError, match="flags"):
        vm.run(timeout=10)
    assert policy.requests == []
    assert changes(fake) == before


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (64 * PAGE, PAGE),
        (1 << 51, PAGE),
        ((1 << 64) - PAGE, PAGE),
        (PAGE, 0),
        (PAGE, 100),
        (PAGE + 1, PAGE),
        (63 * PAGE, 2 * PAGE),
        (PAGE, (1 << 64) - PAGE),
    ],
)
@pytest.mark.parametrize("number", [errno.EFAULT, EHWPOISON])
def test_nonsense_fault_addresses_are_refused(make, recorder, gpa, size, number) -> None:
    policy = recorder()
    vm, fake = make([Step.memory_fault(gpa, size=size, errno=number)], policy=policy)
    before = changes(fake)
    with pytest.raises(PagegateError, match="vCPU 0"):
        vm.run(timeout=10)
    assert policy.requests == []
    assert changes(fake) == before


def test_memory_fault_without_an_error_is_no_request(make, recorder) -> None:
    policy = recorder()
    vm, _ = make([Step.exit(MEMORY_FAULT, (PRIVATE, PAGE, PAGE))], policy=policy)
    with pytest.raises(PagegateError, match="39"):
        vm.run(timeout=10)
    assert policy.requests == []
    assert vm.attributes.private_bytes == 0


# ---- EHWPOISON


def test_annotated_poison_reaches_the_policy_and_stops(make, recorder) -> None:
    policy = recorder(Stop("poison"))
    vm, fake = make([Step.memory_fault(PAGE, errno=EHWPOISON)], policy=policy)
    before = changes(fake)
    report = vm.run(timeout=10)
    (poison,) = policy.requests
    assert isinstance(poison, pagegate.MemoryPoison)
    assert (poison.gpa, poison.errno, poison.state, poison.private) == (PAGE, EHWPOISON, "shared", True)
    assert (report.reason, report.poisons, report.conversions) == ("poison", 1, 0)
    assert changes(fake) == before


def test_poison_stops_by_default(make) -> None:
    vm, _ = make([Step.memory_fault(PAGE, errno=EHWPOISON)])
    report = vm.run(timeout=10)
    assert (report.reason, report.conversions) == ("poison", 0)
    assert vm.attributes.private_bytes == 0


def test_poison_can_be_retried(make, recorder) -> None:
    vm, _ = make([Step.memory_fault(PAGE, errno=EHWPOISON)], policy=recorder(Retry()))
    assert vm.run(timeout=10).reason == "halt"


def test_retries_of_poison_are_bounded(make, recorder) -> None:
    policy = recorder(Retry())
    vm, _ = make([Step.memory_fault(PAGE, errno=EHWPOISON)], policy=policy, cycles=100_000)
    assert vm.run(timeout=30).reason == "livelock"
    assert len(policy.requests) <= pagegate.LIVELOCK_BOUND + 1


def test_poison_denied_stops(make, recorder) -> None:
    vm, _ = make([Step.memory_fault(PAGE, errno=EHWPOISON)], policy=recorder(Deny()))
    assert vm.run(timeout=10).reason == "denied"


def test_poison_cannot_be_converted(make, recorder) -> None:
    vm, fake = make([Step.memory_fault(PAGE, errno=EHWPOISON)], policy=recorder())
    before = changes(fake)
    with pytest.raises(PolicyError, match="poison"):
        vm.run(timeout=10)
    assert changes(fake) == before


def test_bare_poison_is_an_error(make, recorder) -> None:
    policy = recorder(Retry())
    vm, _ = make([Step.fail(EHWPOISON)], policy=policy)
    with pytest.raises(PagegateError, match=r"vCPU 0\b") as caught:
        vm.run(timeout=10)
    assert not isinstance(caught.value, BadBacking)
    assert policy.requests == []


# ---- everything else


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.EBUSY])
def test_other_errnos_end_the_run_by_name(make, number) -> None:
    vm, _ = make([Step.fail(number)])
    with pytest.raises(PagegateError, match=errno.errorcode[number]) as caught:
        vm.run(timeout=10)
    assert not isinstance(caught.value, BadBacking)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_a_memory_fault_with_another_errno_is_ignored(make, recorder, number) -> None:
    policy = recorder()
    vm, _ = make([Step.memory_fault(PAGE, errno=number)], policy=policy)
    with pytest.raises(PagegateError, match=errno.errorcode[number]):
        vm.run(timeout=10)
    assert policy.requests == []


@pytest.mark.parametrize("reason", [0, 1, 4, 7, 18, 26, 38, 40, 0xDEAD])
def test_unknown_exits_are_named(make, reason) -> None:
    vm, _ = make([Step.exit(reason)])
    with pytest.raises(PagegateError, match=f"exit reason {reason} ") as caught:
        vm.run(timeout=10)
    assert caught.value.vcpu == 0


def test_run_without_a_reason_is_an_error(make) -> None:
    vm, _ = make([Step.exit(0xFFFF_FFFF)])
    with pytest.raises(PagegateError):
        vm.run(timeout=10)


@pytest.mark.parametrize(
    ("reason", "word"), [pytest.param(FAIL_ENTRY, 0x8000_0021, id="fail-entry"), (SYSTEM_EVENT, 2)]
)
def test_fatal_exits_say_what_kvm_said(make, reason, word) -> None:
    vm, _ = make([Step.exit(reason, (word, 0, 0))])
    with pytest.raises(PagegateError, match=rf"(reason {word:#x}|event {word})$"):
        vm.run(timeout=10)


@pytest.mark.parametrize("suberror", [1, 2, 3, 77])
def test_internal_errors_are_raised(make, suberror) -> None:
    vm, _ = make([Step.internal_error(suberror)])
    with pytest.raises(PagegateError, match="emulate|internal error"):
        vm.run(timeout=10)


def test_halt_and_shutdown_are_reasons(make) -> None:
    assert make([Step.halt()])[0].run(timeout=10).reason == "halt"
    assert make([Step.shutdown()])[0].run(timeout=10).reason == "shutdown"


def test_a_shut_down_vcpu_has_to_be_started_again(make) -> None:
    vm, _ = make([Step.shutdown(), Step.io_write(0x80, b"x")])
    assert vm.run(timeout=10).reason == "shutdown"
    with pytest.raises(PagegateError, match="start"):
        vm.run(timeout=10)
    vm.vcpus[0].start(mode="long", rip=0x1000)
    assert vm.run(timeout=10).reason == "halt"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((1 | 3 << 8 | 0x80 << 16 | 1 << 32, 4096, 0), id="three-bytes"),
        pytest.param((1 | 1 << 8 | 0x80 << 16, 4096, 0), id="no-access"),
        pytest.param((1 | 4 << 8 | 0x80 << 16 | 0xFFFF_FFFF << 32, 4096, 0), id="count"),
        pytest.param((1 | 1 << 8 | 0x80 << 16 | 1 << 32, 1 << 40, 0), id="offset"),
        pytest.param((1 | 1 << 8 | 0x80 << 16 | 1 << 32, (1 << 64) - 1, 0), id="wrap"),
        pytest.param((1 | 1 << 8 | 0x80 << 16 | 1 << 32, 0, 0), id="header"),
    ],
)
def test_malformed_io_reaches_no_handler(make, words) -> None:
    seen = []
    vm, _ = make([Step.exit(IO, words)])
    vm.on_io(0x80, seen.append)
    with pytest.raises(PagegateError):
        vm.run(timeout=10)
    assert seen == []


@pytest.mark.parametrize("length", [0, 9, 0xFFFF_FFFF])
def test_malformed_mmio_reaches_no_handler(make, length) -> None:
    seen = []
    vm, _ = make([Step.exit(MMIO, (1 << 30, 0, length | 1 << 32))])
    vm.on_mmio(1 << 30, PAGE, seen.append)
    with pytest.raises(PagegateError):
        vm.run(timeout=10)
    assert seen == []


# ---- livelock


def test_a_fault_that_repeats_after_its_conversion_is_a_livelock(make, recorder) -> None:
    policy = recorder()
    vm, fake = make([Step.memory_fault(PAGE)], policy=policy, cycles=100_000)
    with pytest.raises(Livelock) as caught:
        vm.run(timeout=30)
    error = caught.value
    assert (error.vcpu, error.gpa, error.state) == (0, PAGE, "private")
    # Each step adds one to the fake's instruction pointer; it faulted LIVELOCK_BOUND times and a few more.
    assert isinstance(error.rip, int)
    assert 0 < error.rip - 0x1000 <= pagegate.LIVELOCK_BOUND + 2
    # Only the first fault was a request and converted; the others found the page in the accessed state.
    assert len(policy.requests) == 1
    assert "implicit to private: converted" in str(error)
    assert fake.calls("set_attributes") == 1


def test_livelock_history_is_about_its_page(make) -> None:
    script = [Step.doorbell(5 * PAGE, 1, 16), Step.doorbell(9 * PAGE, 1, 16)]
    script += [Step.memory_fault(9 * PAGE)] * (pagegate.LIVELOCK_BOUND + 10)
    vm, _ = make(script)
    with pytest.raises(Livelock) as caught:
        vm.run(timeout=30)
    assert str(caught.value).count("explicit to private") == 1


def test_fewer_repeats_are_no_livelock(make) -> None:
    vm, _ = make([Step.memory_fault(PAGE)] * 500)
    assert vm.run(timeout=30).reason == "halt"


def test_changing_neighbours_do_not_hide_a_livelock(make) -> None:
    # The same fault again and again, while another page of the same 2 MiB is converted all the time.
    flip = [Step.doorbell(9 * PAGE, 1, 16), Step.memory_fault(PAGE), Step.doorbell(9 * PAGE, 1, 0)]
    vm, _ = make([*flip, Step.memory_fault(PAGE)], cycles=2 * pagegate.LIVELOCK_BOUND)
    vm.convert(PAGE, PAGE, to="private")
    with pytest.raises(Livelock):
        vm.run(timeout=60)
