"""Beginning and ending runs, closing machines, and garbage collection."""

from __future__ import annotations

import functools
import gc
import threading
import time
import weakref

import pagegate
import pytest
from pagegate import LIVELOCK_BOUND, Convert, Deny, PagegateError, Policy, PrivateMemoryError, Vm
from pagegate.testing import Fake, Step

from .conftest import assert_one_truth

PAGE = 4096
PRIVATE = 16
# 0.1 s is documented; the rest is for a busy host.
PROMPTLY = 0.4


# ---- ending a run


@pytest.mark.parametrize("vcpus", [1, 2])
def test_timeout_brings_every_vcpu_out(make, vcpus) -> None:
    vm, _ = make(*[[Step.block()]] * vcpus)
    begun = time.monotonic()
    report = vm.run(timeout=0.2)
    assert report.reason == "timeout"
    assert 0.2 <= time.monotonic() - begun < 0.2 + PROMPTLY
    assert 0.2 <= report.seconds < 0.2 + PROMPTLY


@pytest.mark.parametrize("vcpus", [1, 2])
def test_stop_from_another_thread_brings_every_vcpu_out(make, in_background, vcpus) -> None:
    vm, _ = make(*[[Step.block()]] * vcpus)
    run = in_background(vm)
    run.wait_until_in_progress()
    begun = time.monotonic()
    vm.stop()
    assert run.join().reason == "stopped"
    assert time.monotonic() - begun < PROMPTLY


def test_a_vcpu_in_hlt_rests_while_another_keeps_the_machine_running(make) -> None:
    written: list[bytes] = []
    rests = [Step.io_write(0x80, b"a"), Step.halt(), Step.io_write(0x80, b"b"), Step.halt()]
    vm, _ = make(rests, [Step.block(), Step.block(), Step.block(), Step.halt()])
    vm.on_io(0x80, lambda io: written.append(io.data))
    for _ in range(3):
        assert vm.run(timeout=0.1).reason == "timeout"
        assert written == [b"a"]
    assert vm.run(timeout=10).reason == "halt"
    assert written == [b"a"]
    # All have halted, so all go on.
    assert vm.run(timeout=10).reason == "halt"
    assert written == [b"a", b"b"]


def test_a_vcpu_in_hlt_runs_when_it_is_started_again(make) -> None:
    written: list[bytes] = []
    vm, _ = make([Step.halt(), Step.io_write(0x80, b"b")], [Step.block()] * 2)
    vm.on_io(0x80, lambda io: written.append(io.data))
    assert vm.run(timeout=0.1).reason == "timeout"
    vm.vcpus[0].start(rip=0x1000)
    assert vm.run(timeout=0.1).reason == "timeout"
    assert written == [b"b"]


def test_stop_reaches_vcpus_that_wait_to_try_again(make, in_background) -> None:
    # Faults on a page that is in the accessed state. After a few of them the vCPU waits before it tries again.
    faults = [Step.memory_fault(PAGE)] * (LIVELOCK_BOUND // 10)
    vm, _ = make([*faults, Step.io_write(0x80, b"!"), *faults * 8])
    vm.convert(PAGE, PAGE, to="private")
    waits = threading.Event()
    vm.on_io(0x80, lambda _: waits.set())
    run = in_background(vm)
    assert waits.wait(10)
    vm.stop()
    assert run.join(within=PROMPTLY).reason == "stopped"


def test_a_run_with_timeout_0_ends_at_once(make) -> None:
    vm, _ = make([Step.block()])
    assert vm.run(timeout=0).reason == "timeout"


@pytest.mark.parametrize("timeout", [-1, float("nan"), -0.001, -float("inf"), 10**400])
def test_invalid_timeouts_are_refused(make, timeout) -> None:
    vm, _ = make([])
    with pytest.raises(ValueError, match=f"timeout is {timeout}: "):
        vm.run(timeout=timeout)


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e9, 3600])
def test_long_timeouts_are_accepted(make, timeout) -> None:
    vm, _ = make([])
    assert vm.run(timeout=timeout).reason == "halt"


def test_stop_without_a_run_does_nothing(make) -> None:
    vm, _ = make([])
    vm.stop()
    assert vm.run(timeout=10).reason == "halt"


def test_a_timed_out_run_goes_on_where_it_was(make, recorder) -> None:
    policy = recorder()
    vm, fake = make([Step.doorbell(PAGE, 1, PRIVATE), Step.block(), Step.doorbell(PAGE, 1, 0)], policy=policy)
    assert vm.run(timeout=0.1).reason == "timeout"
    assert vm.attributes.is_private(PAGE)
    assert vm.run(timeout=10).reason == "halt"
    assert [reply.value for reply in fake.replies()] == [0, 0]
    assert [call.to for call in policy.requests] == ["private", "shared"]


def test_the_run_ends_when_the_last_vcpu_halts(make) -> None:
    vm, fake = make([Step.halt()], [Step.fail(4)] * 50 + [Step.io_read(0x99)], [Step.halt()])
    assert vm.run(timeout=10).reason == "halt"
    assert len(fake.replies(1)) == 1


def test_one_triple_fault_ends_the_run_for_all(make) -> None:
    vm, _ = make([Step.block()], [Step.shutdown()])
    assert vm.run(timeout=20).reason == "shutdown"


def test_a_run_needs_a_started_vcpu() -> None:
    with (
        Vm(64 * PAGE, hypervisor=Fake([Step.block()])) as vm,
        pytest.raises(PagegateError, match="start"),
    ):
        vm.run(timeout=1)


def test_vcpus_that_were_not_started_do_not_run() -> None:
    fake = Fake([Step.block()], [Step.io_read(0x99)])
    with Vm(64 * PAGE, vcpus=2, hypervisor=fake) as vm:
        vm.vcpus[1].start()
        assert vm.run(timeout=10).reason == "halt"
        assert len(fake.replies(1)) == 1


# ---- one run at a time


def test_a_second_run_at_the_same_time_is_refused(make, in_background) -> None:
    vm, _ = make([Step.block()])
    run = in_background(vm)
    run.wait_until_in_progress()
    with pytest.raises(PagegateError, match="running already"):
        vm.run(timeout=1)
    with pytest.raises(PagegateError, match="running"):
        vm.vcpus[0].start()
    with pytest.raises(PagegateError, match="running"):
        vm.close()
    vm.stop()
    assert run.join().reason == "stopped"


def test_of_many_runs_at_once_only_one_at_a_time_runs(make) -> None:
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, 0)], cycles=200)
    outcomes = []

    def run() -> None:
        try:
            outcomes.append(vm.run(timeout=30).requests)
        except PagegateError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    requests = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(outcomes) == 8
    assert sum(requests) == 400
    assert all("running" in outcome for outcome in outcomes if isinstance(outcome, str))


def test_the_host_converts_and_reads_while_vcpus_run(make, in_background, way) -> None:
    flip = [Step.doorbell(8 * PAGE, 4, PRIVATE), Step.doorbell(8 * PAGE, 4, 0)]
    vm, fake = make(flip, flip, cycles=300, way=way)
    run = in_background(vm)
    for i in range(200):
        vm.convert((8 + i % 8) * PAGE, 2 * PAGE, to=["private", "shared"][i % 2])
        vm.write(20 * PAGE, bytes([i]))
        assert vm.read(20 * PAGE, 1) == bytes([i])
    assert run.join().reason == "halt"
    assert_one_truth(vm, fake)


def test_after_opposite_requests_of_two_vcpus_map_and_kvm_agree(make, way) -> None:
    to_private = [Step.doorbell(8 * PAGE, 16, PRIVATE)]
    to_shared = [Step.hypercall(8 * PAGE, 16, 0)]
    vm, fake = make(to_private, to_shared, cycles=500, way=way)
    report = vm.run(timeout=60)
    assert (report.reason, report.requests, report.conversions) == ("halt", 1000, 1000)
    assert report.bytes_to_private - report.bytes_to_shared == vm.attributes.private_bytes
    private = vm.attributes.is_private(8 * PAGE)
    assert vm.attributes.state(8 * PAGE, 16 * PAGE) == ("private" if private else "shared")
    assert_one_truth(vm, fake)


# ---- memory


def test_the_host_reads_and_writes_shared_memory(make, way) -> None:
    vm, _ = make([], way=way)
    data = bytes(i % 253 for i in range(3 * PAGE))
    vm.write(0x2800, data)
    assert vm.read(0x2800, len(data)) == data
    assert vm.read(0x27FF, 2) == b"\0" + data[:1]
    assert vm.read(0x2800, 0) == b""


@pytest.mark.parametrize("access", ["read", "write"])
def test_private_memory_cannot_be_accessed_and_the_error_names_it(make, way, access) -> None:
    vm, _ = make([], way=way)
    vm.convert(9 * PAGE, 2 * PAGE, to="private")
    touch = {"read": lambda gpa, n: vm.read(gpa, n), "write": lambda gpa, n: vm.write(gpa, b"x" * n)}[access]
    for gpa, n in [(9 * PAGE - 1, 2), (8 * PAGE, 4 * PAGE), (9 * PAGE + 5, 1), (2 * PAGE, 40 * PAGE)]:
        with pytest.raises(PrivateMemoryError, match="0x9000.*convert") as caught:
            touch(gpa, n)
        assert (caught.value.gpa, caught.value.state) == (9 * PAGE, "private")
    with pytest.raises(PrivateMemoryError) as caught:
        touch(10 * PAGE + 5, 1)
    assert caught.value.gpa == 10 * PAGE
    touch(8 * PAGE, PAGE)
    touch(11 * PAGE, PAGE)


def test_a_refused_write_writes_nothing(make) -> None:
    vm, _ = make([])
    vm.convert(9 * PAGE, PAGE, to="private")
    with pytest.raises(PrivateMemoryError):
        vm.write(8 * PAGE, b"x" * (2 * PAGE))
    assert vm.read(8 * PAGE, PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("gpa", "n"), [(64 * PAGE, 1), (64 * PAGE - 1, 2), (0, 64 * PAGE + 1), ((1 << 64) - 1, 2), (1 << 50, 8)]
)
def test_accesses_past_the_end_of_memory_are_refused(make, gpa, n) -> None:
    vm, _ = make([])
    with pytest.raises(ValueError, match="0x40000"):
        vm.read(gpa, n)
    with pytest.raises(ValueError, match="0x40000"):
        vm.write(gpa, bytes(n))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"memory": 0}, "memory"),
        ({"memory": 100}, "memory"),
        ({"memory": 4097}, "memory"),
        ({"memory": 1 << 60}, "memory"),
        ({"vcpus": 0}, "vCPU"),
        ({"initial": "secret"}, "secret.*private"),
        ({"enforcement": "hope"}, "enforcement.*memslots"),
        ({"vm_type": "unheard-of"}, "vm_type.*default"),
        ({"shared_bit": 12}, "shared_bit=12.*0x40000"),
        ({"private_bit": 12}, "private_bit=12.*0x40000"),
        ({"private_bit": 52}, "private_bit=52.*bit 52"),
        ({"private_bit": 40, "shared_bit": 41}, "exclude each other"),
        ({"enforcement": "traps"}, "two views.*shared_bit or private_bit"),
        ({"platform": "mainframe"}, "platform.*mainframe.*bare.*pc"),
        ({"confidential": "tdx"}, "confidential.*tdx.*sev"),
        ({"confidential": "sev"}, "platform=.pc"),
        ({"confidential": "sev", "platform": "pc", "shared_bit": 40}, "private_bit, the C-bit"),
        ({"confidential": "sev", "platform": "pc", "initial": "shared"}, "private at first"),
        ({"confidential": "sev", "platform": "pc", "private_bit": 12}, "private_bit=12"),
        ({"shared_bit": 63}, "shared_bit"),
    ],
    ids=str,
)
def test_invalid_machines_are_refused(wrong, says) -> None:
    with pytest.raises(ValueError, match=says):
        Vm(wrong.pop("memory", 64 * PAGE), hypervisor=Fake([]), **wrong)


# ---- close


def test_close_is_for_good_and_may_be_repeated(make) -> None:
    vm, _ = make([])
    vm.close()
    vm.close()
    assert vm.closed
    for use in (
        lambda: vm.run(timeout=1),
        lambda: vm.read(0, 1),
        lambda: vm.write(0, b"x"),
        lambda: vm.convert(0, PAGE, to="private"),
        lambda: vm.memory_usage(),
        lambda: vm.vcpus,
        lambda: vm.attributes.runs(),
        lambda: vm.on_io(1, print),
    ):
        with pytest.raises(PagegateError, match="closed"):
            use()


def test_close_frees_the_memory_files_at_once(kvm_objects) -> None:
    before = kvm_objects()
    vm = Vm(64 * PAGE, hypervisor=Fake([]))
    attributes, vcpus, events = vm.attributes, vm.vcpus, vm.events
    assert kvm_objects() != before
    vm.close()
    assert kvm_objects() == before
    del attributes, vcpus, events


def test_with_closes_when_the_body_raises(kvm_objects) -> None:
    before = kvm_objects()
    with pytest.raises(ZeroDivisionError), Vm(64 * PAGE, hypervisor=Fake([])):
        _ = 1 / 0
    assert kvm_objects() == before


def test_dropping_a_machine_closes_it(kvm_objects) -> None:
    before = kvm_objects()
    vm = Vm(64 * PAGE, hypervisor=Fake([]))
    del vm
    gc.collect()
    assert kvm_objects() == before


def test_close_releases_policy_and_handlers(recorder) -> None:
    policy = recorder()

    def handler(access):
        return b""

    gone = [weakref.ref(policy), weakref.ref(handler)]
    vm = Vm(64 * PAGE, policy=policy, hypervisor=Fake([]))
    vm.on_io(0x99, handler)
    vm.on_mmio(1 << 30, PAGE, handler)
    vm.close()
    del policy, handler
    assert [ref() for ref in gone] == [None, None]


# ---- garbage collection


class Holder(Policy):
    def memory_fault(self, fault):
        return Deny()


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(lambda vm: vm, id="vm"),
        pytest.param(lambda vm: vm.run, id="bound-method"),
        pytest.param(lambda vm: vm.attributes, id="attributes"),
        pytest.param(lambda vm: vm.events, id="events"),
        pytest.param(lambda vm: vm.vcpus, id="vcpus"),
        pytest.param(lambda vm: vm.vcpus[0], id="vcpu"),
    ],
)
@pytest.mark.parametrize("ran", [False, True], ids=["new", "after-a-run"])
def test_a_policy_that_holds_its_machine_is_collected_with_it(kvm_objects, what, ran) -> None:
    before = kvm_objects()
    policy = Holder()
    vm = Vm(64 * PAGE, policy=policy, hypervisor=Fake([Step.memory_fault(PAGE)]))
    if ran:
        vm.vcpus[0].start()
        assert vm.run(timeout=10).reason == "denied"
    policy.held = what(vm)
    gone = [weakref.ref(vm), weakref.ref(policy)]
    del vm, policy
    gc.collect()
    alive = [ref() for ref in gone]
    try:
        assert alive == [None, None]
        assert kvm_objects() == before
    finally:
        if alive[0] is not None:
            alive[0].close()


@pytest.mark.parametrize("kind", ["io", "mmio"])
def test_a_handler_that_holds_its_machine_is_collected_with_it(kind) -> None:
    def answer(vm, access):
        return vm.read(0, 1)

    vm = Vm(64 * PAGE, hypervisor=Fake([]))
    handler = functools.partial(answer, vm)
    if kind == "io":
        vm.on_io(0x99, handler)
    else:
        vm.on_mmio(1 << 30, PAGE, handler)
    gone = [weakref.ref(vm), weakref.ref(handler)]
    del vm, handler
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_raised_exceptions_do_not_keep_the_machine(recorder) -> None:
    def fail(_):
        raise ValueError

    vm = Vm(64 * PAGE, policy=recorder(fail), hypervisor=Fake([Step.memory_fault(PAGE)]))
    vm.vcpus[0].start()
    with pytest.raises(ValueError):  # noqa: PT011
        vm.run(timeout=10)
    gone = weakref.ref(vm)
    del vm
    gc.collect()
    assert gone() is None


def test_many_machines_leave_nothing(kvm_objects) -> None:
    before = kvm_objects()
    for _ in range(50):
        with Vm(64 * PAGE, policy=Holder(), hypervisor=Fake([Step.memory_fault(PAGE)])) as vm:
            vm.vcpus[0].start()
            assert vm.run(timeout=10).reason == "denied"
    assert kvm_objects() == before


def test_requests_are_not_leaked(make) -> None:
    class Counts:
        def map_gpa_range(self, call):
            return Convert()

    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, 0)], policy=Counts(), cycles=500)
    vm.run(timeout=30)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, pagegate.MapGpaRange)]
