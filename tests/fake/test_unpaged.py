"""In a guest with confidential="sev", accesses without paging are private: such pages are opened for a time."""

from __future__ import annotations

import errno

import pytest
from pagegate import Convert, PagegateError, Vm, policies, trace
from pagegate.testing import Fake, Step

from tests.boot_parts import C_BIT, write_kernel
from tests.memory_parts import seen_by_kvm

PAGE, MIB = 4096, 1 << 20
MEMORY = 64 * MIB
AT = 32 * MIB
PRIVATE, SHARED = 16, 0
PAGING, PROTECTION = 1 << 31, 1
BOUND = 256
SECRET = b"\xc5" * 8


class Asked:
    """Notes what it is asked, and converts."""

    def __init__(self) -> None:
        self.requests = []

    def look(self, request) -> Convert:
        self.requests.append(request)
        return Convert()

    memory_fault = map_gpa_range = look


@pytest.fixture(params=["traps", "memslots"])
def sev(request):
    """Makes a machine whose second vCPU has no paging and takes these steps. The first is not started."""
    machines = []

    def sev(*steps):
        fake = Fake([], list(steps))
        policy = Asked()
        vm = Vm(
            MEMORY,
            vcpus=2,
            platform="pc",
            confidential="sev",
            enforcement=request.param,
            policy=policy,
            hypervisor=fake,
            debug_private=True,
        )
        machines.append(vm)
        vm.vcpus[1].start(mode="real")
        vm.write(AT, SECRET)
        return vm, fake, policy

    yield sev
    for vm in machines:
        vm.close()


def opened(vm, fake, gpa=AT) -> bool:
    """Whether an access through the shared view of a page is let through by KVM."""
    return fake.slot_at(gpa) is not None and not fake.is_private(gpa)


def told(vm) -> list[tuple[str, int, int, str]]:
    return [(event.kind, event.gpa, event.size, event.outcome) for event in vm.events]


def with_paging(vm, **registers) -> None:
    """Sets the second vCPU's registers as they are once it has paging, with the C-bit in CR3."""
    registers = {"cr0": PAGING | PROTECTION, "cr3": C_BIT | 0x1000} | registers
    vm.vcpus[1].start(mode="protected", **registers)


def test_a_page_is_opened_without_asking_the_policy(sev) -> None:
    vm, fake, policy = sev(Step.access(AT))
    assert not opened(vm, fake)
    report = vm.run(timeout=10)
    assert report.reason == "halt"
    assert opened(vm, fake)
    assert not opened(vm, fake, AT + PAGE)
    assert told(vm) == [("unpaged", AT, PAGE, "opened")]
    assert policy.requests == []
    assert vm.attributes.private_bytes == MEMORY, "it stays private"
    assert not fake.is_private(AT | C_BIT)


def test_the_further_vcpus_of_a_booted_kernel_have_no_paging(tmp_path) -> None:
    policy = Asked()
    fake = Fake([Step.access(AT)], [Step.access(0x9_8000)])
    with Vm(MEMORY, vcpus=2, platform="pc", confidential="sev", policy=policy, hypervisor=fake) as vm:
        vm.boot(write_kernel(tmp_path))
        assert vm.run(timeout=10).reason == "halt"
        assert [(event.vcpu, event.kind) for event in sorted(vm.events, key=lambda event: event.vcpu)] == [
            (0, "implicit"),
            (1, "unpaged"),
        ]
        assert [fault.gpa for fault in policy.requests] == [AT]


def test_it_is_no_request(sev) -> None:
    vm, _, _ = sev(Step.access(AT), Step.access(AT + PAGE))
    report = vm.run(timeout=10)
    assert (report.requests, report.faults, report.conversions, report.bytes_to_shared) == (0, 0, 0, 0)
    assert (vm.policy.seen, vm.policy.spared) == (0, 0)
    assert report.latency.max == 0, "the latency is that of requests"


def test_the_event_says_who_and_what(sev) -> None:
    vm, _, _ = sev(Step.access(AT))
    vm.run(timeout=10)
    (event,) = vm.events
    assert (event.vcpu, event.to, event.state, event.errno) == (1, "private", "private", 0)
    assert (event.decision, event.changed, event.done_size, event.page_size, event.raw) == ("none", 0, 0, 0, 0)


def test_kvm_sees_the_private_bytes_through_the_shared_view(sev) -> None:
    vm, fake, _ = sev(Step.access(AT))
    if vm.enforcement == "traps":
        assert seen_by_kvm("shared", AT, 8) == bytes(8)
    vm.run(timeout=10)
    if vm.enforcement == "traps":
        assert seen_by_kvm("shared", AT, 8) == SECRET
        assert seen_by_kvm("shared", AT + PAGE, 8) == bytes(8)
    else:
        assert fake.replies(1)[0].data == SECRET


def test_an_access_in_an_open_page_does_not_exit(sev) -> None:
    vm, _, _ = sev(Step.access(AT), Step.access(AT + 8, write=True), Step.access(AT))
    vm.run(timeout=10)
    assert told(vm) == [("unpaged", AT, PAGE, "opened")]


def test_under_memslots_the_first_mib_is_opened_at_once(sev) -> None:
    vm, fake, _ = sev(Step.access(0x9_8000), Step.access(0x1000), Step.access(MIB))
    vm.run(timeout=10)
    first = [(0x9_8000, PAGE), (0x1000, PAGE)] if vm.enforcement == "traps" else [(0, MIB)]
    assert told(vm) == [("unpaged", gpa, size, "opened") for gpa, size in [*first, (MIB, PAGE)]]
    assert opened(vm, fake, 0x9_8000)
    assert opened(vm, fake, MIB)
    assert not opened(vm, fake, MIB + PAGE)


def test_shared_pages_of_the_first_mib_stay_as_they_are(sev) -> None:
    vm, fake, _ = sev(Step.access(0x1000))
    vm.convert(0x8000, PAGE, to="shared")
    vm.write(0x8000, b"shared")
    vm.run(timeout=10)
    spans = [(0, 0x8000), (0x9000, MIB - 0x9000)] if vm.enforcement == "memslots" else [(0x1000, PAGE)]
    assert told(vm) == [("unpaged", gpa, size, "opened") for gpa, size in spans]
    assert vm.read(0x8000, 6) == b"shared"
    assert not opened(vm, fake, 0x8000 | C_BIT)


def test_it_is_closed_once_the_vcpu_has_paging(sev) -> None:
    vm, fake, _ = sev(Step.access(AT), Step.access(AT + PAGE), Step.halt(), Step.io_write(0x80, b"x"))
    vm.run(timeout=10)
    with_paging(vm)
    vm.run(timeout=10)
    assert told(vm)[2:] == [("unpaged", AT, PAGE, "closed"), ("unpaged", AT + PAGE, PAGE, "closed")]
    assert not opened(vm, fake)
    assert vm.attributes.private_bytes == MEMORY
    assert vm.read(AT, 8) == SECRET, "the private side has kept its bytes"
    if vm.enforcement == "traps":
        assert seen_by_kvm("shared", AT, 8) == bytes(8)


def test_it_stays_open_as_long_as_there_is_no_paging(sev) -> None:
    vm, fake, _ = sev(Step.access(AT), *[Step.io_write(0x80, b"x"), Step.io_read(0x81)] * 3)
    vm.run(timeout=10)
    assert opened(vm, fake)
    assert len(vm.events) == 1


def test_a_vcpu_in_a_long_stay_is_looked_at(sev) -> None:
    # It is kicked from time to time: it may have switched paging on without an exit.
    vm, fake, _ = sev(Step.access(AT), Step.halt(), Step.block(), Step.block())
    vm.run(timeout=10)
    with_paging(vm)
    assert vm.run(timeout=30).reason == "halt", "each block ends with a kick"
    assert told(vm)[-1] == ("unpaged", AT, PAGE, "closed")
    assert not opened(vm, fake)


@pytest.mark.parametrize("registers", [{}, {"cr3": 0x1000, "rip": 1 << 20}], ids=["paged", "tables-without-the-c-bit"])
def test_what_counts_as_paging(sev, registers) -> None:
    vm, _, policy = sev(Step.access(AT))
    with_paging(vm, **registers)
    vm.run(timeout=10)
    if registers:
        assert (told(vm), policy.requests) == ([("unpaged", AT, PAGE, "opened")], [])
    else:
        (fault,) = policy.requests
        assert (fault.gpa, fault.private, fault.state) == (AT, False, "private")


def test_the_private_view_is_never_opened(sev) -> None:
    vm, fake, policy = sev(Step.hypercall(AT, 1, SHARED), Step.access(AT | C_BIT))
    vm.run(timeout=10)
    assert [type(request).__name__ for request in policy.requests] == ["MapGpaRange", "MemoryFault"]
    assert not opened(vm, fake), "it is private again"


def test_a_machine_that_is_no_sev_guest_asks_its_policy() -> None:
    policy = Asked()
    fake = Fake([Step.access(AT)])
    with Vm(
        MEMORY,
        platform="pc",
        private_bit=40,
        initial="private",
        enforcement="traps",
        policy=policy,
        hypervisor=fake,
    ) as vm:
        vm.vcpus[0].start(mode="real")
        vm.run(timeout=10)
        assert [fault.gpa for fault in policy.requests] == [AT]


# ---- conversions of open pages


@pytest.mark.parametrize("ask", [Step.hypercall, Step.doorbell], ids=["hypercall", "doorbell"])
def test_a_conversion_to_shared_closes_it(sev, ask) -> None:
    vm, fake, policy = sev(Step.access(AT), ask(AT, 1, SHARED))
    report = vm.run(timeout=10)
    assert (report.reason, report.conversions, len(policy.requests)) == ("halt", 1, 1)
    assert not vm.attributes.is_private(AT)
    assert opened(vm, fake), "the shared view is the page's now"
    assert vm.read(AT, 8) == bytes(8)
    assert seen_by_kvm("shared", AT, 8) == bytes(8)
    # Private again, it is not open.
    vm.convert(AT, PAGE, to="private")
    assert not opened(vm, fake)
    assert vm.read(AT, 8) == bytes(8)


def test_a_conversion_of_more_pages_closes_all_that_are_open(sev) -> None:
    pages = [AT, AT + 3 * PAGE, AT + 7 * PAGE]
    vm, fake, _ = sev(*map(Step.access, [*pages, AT + 8 * PAGE]))
    vm.run(timeout=10)
    vm.convert(AT, 8 * PAGE, to="shared")
    vm.convert(AT, 8 * PAGE, to="private")
    assert [opened(vm, fake, gpa) for gpa in [*pages, AT + 8 * PAGE]] == [False, False, False, True]


def test_a_request_that_changes_nothing_leaves_it_open(sev) -> None:
    vm, fake, _ = sev(Step.access(AT), Step.hypercall(0, MEMORY // PAGE, PRIVATE))
    vm.run(timeout=10)
    assert opened(vm, fake)
    assert [reply.value for reply in fake.replies(1)][-1] == 0


def test_what_was_closed_is_opened_again(sev) -> None:
    steps = [Step.access(AT), Step.hypercall(AT, 1, SHARED), Step.hypercall(AT, 1, PRIVATE), Step.access(AT)]
    vm, fake, _ = sev(*steps)
    vm.run(timeout=10)
    assert [outcome for kind, *_, outcome in told(vm) if kind == "unpaged"] == ["opened", "closed", "opened"]
    assert opened(vm, fake)


# ---- bounds and failures


def test_at_most_256_are_open(sev) -> None:
    vm, fake, _ = sev(*(Step.access(AT + page * 2 * PAGE) for page in range(BOUND + 2)))
    assert vm.run(timeout=30).reason == "halt"
    are = [opened(vm, fake, AT + page * 2 * PAGE) for page in range(BOUND + 2)]
    assert are == [False, False] + [True] * BOUND, "the oldest are closed for further ones"
    assert [outcome for *_, outcome in told(vm)].count("opened") == BOUND + 2


def test_a_page_that_cannot_be_opened_ends_the_run(sev) -> None:
    vm, fake, _ = sev(Step.access(AT))
    fake.inject("set_attributes" if vm.enforcement == "traps" else "create_memslot", errno.ENOMEM)
    with pytest.raises(PagegateError, match="open a page to a vCPU without paging.*ENOMEM"):
        vm.run(timeout=10)
    assert not opened(vm, fake)
    assert told(vm) == []
    if vm.enforcement == "traps":
        assert seen_by_kvm("shared", AT, 8) == bytes(8)
    # The call does not fail any more.
    assert vm.run(timeout=10).reason == "halt"
    assert opened(vm, fake)


def test_closing_that_fails_is_the_errno_of_the_conversion(sev) -> None:
    vm, fake, _ = sev(Step.access(AT))
    vm.run(timeout=10)
    fake.inject("set_attributes" if vm.enforcement == "traps" else "delete_memslot", errno.ENOMEM)
    with pytest.raises(PagegateError, match="ENOMEM.*undone"):
        vm.convert(AT, PAGE, to="shared")
    assert vm.attributes.is_private(AT)
    assert vm.read(AT, 8) == SECRET
    vm.convert(AT, PAGE, to="shared")
    assert vm.read(AT, 8) == bytes(8)
    assert seen_by_kvm("shared", AT, 8) == bytes(8)


# ---- traces


def test_a_replay_leaves_these_events_out(sev) -> None:
    vm, _, _ = sev(Step.access(AT), Step.hypercall(AT, 1, SHARED), Step.access(AT + PAGE))
    vm.run(timeout=10)
    assert [event.kind for event in vm.events] == ["unpaged", "explicit", "unpaged", "unpaged"]
    replay = trace.replay(vm.events, policies.DenyAll())
    assert (replay.requests, replay.missing, replay.different) == (1, 0, 1)
    assert (replay.recorded.converted, replay.policies[0].denied) == (1, 1)
    assert replay.recorded.bytes_to_shared == PAGE


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrows"])
def test_they_are_recorded(sev, tmp_path, suffix) -> None:
    vm, _, _ = sev(Step.access(AT))
    path = tmp_path / f"trace.{suffix}"
    with trace.Recorder(vm, path):
        vm.run(timeout=10)
    assert list(trace.read(path)) == list(vm.events)
