"""The log: its contents, its bound, and that tables are made from its memory without a copy."""

from __future__ import annotations

from pathlib import Path

import pagegate
import pyarrow as pa
import pytest
from pagegate import Convert, Deny, Retry, Stop, Vm, policies, trace
from pagegate.testing import Fake, Step

from .conftest import TWO_VIEWS

PAGE = 4096
MEMORY = 1 << 20
PRIVATE, SHARED = 16, 0
COLUMNS = {name for name in vars(pagegate.Event) if not name.startswith("_")} - {"asdict"}
FLAGS = ("decision_prefault", "decision_discard", "write")


def table(source):
    return pa.table(source)


def rows(source):
    taken = table(source)
    at = taken.column_names.index("latency")
    # Without pandas Python has no type for nanoseconds.
    return taken.set_column(at, "latency", taken.column(at).cast(pa.int64())).to_pylist()


def facts(event):
    # The columns of devices are numbers, and 0 in other rows.
    return {name: 0 if (value := getattr(event, name)) is None else value for name in COLUMNS}


class ByAddress(pagegate.Policy):
    ANSWERS = (
        Convert(),
        Deny(11),
        Retry(),
        Convert(gpa=0x8000, size=4 * PAGE, prefault=True),
        Convert("shared", discard=False),
        Stop("enough"),
    )

    def map_gpa_range(self, call):
        return self.ANSWERS[call.gpa // PAGE]


def test_more_events_than_any_host_has_memory_for() -> None:
    for count in (2**63, 2**32 + 1):
        with pytest.raises(ValueError, match=f"events is {count}: it must be at most 4294967296"):
            Vm(1 << 20, events=count, hypervisor=Fake([]))
    with Vm(1 << 20, events=2**32, hypervisor=Fake([Step.hypercall(0, 1, 0)])) as vm:
        vm.vcpus[0].start(mode="real")
        vm.run(timeout=10)
        assert len(vm.events) == 1


def test_events_say_what_was_asked_decided_and_done(make) -> None:
    steps = [Step.doorbell(number * PAGE, 1, PRIVATE | 1) for number in range(6)]
    vm, _ = make(steps, policy=ByAddress())
    assert vm.run(timeout=10).reason == "enough"
    events = list(vm.events)
    assert [event.sequence for event in events] == list(range(6))
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert [(event.decision, event.outcome, event.errno) for event in events] == [
        ("convert", "converted", 0),
        ("deny", "denied", 11),
        ("retry", "retried", 11),
        ("convert", "converted", 0),
        ("convert", "converted", 0),
        ("stop", "stopped", 11),
    ]
    assert [event.decision_errno for event in events] == [0, 11, 0, 0, 0, 0]
    plain, denied, _, widened, other, _ = events
    assert (plain.page_size, plain.raw, plain.state, plain.flags, plain.rip) == (2 << 20, 17, "shared", 0, 0)
    assert (plain.decision_gpa, plain.decision_size, plain.decision_to) == (0, PAGE, "private")
    assert (plain.decision_discard, plain.decision_prefault, plain.changed) == (True, False, PAGE)
    assert (denied.decision_gpa, denied.decision_size, denied.decision_discard) == (0, 0, False)
    assert (widened.gpa, widened.decision_gpa, widened.decision_size) == (3 * PAGE, 0x8000, 4 * PAGE)
    assert (widened.done_gpa, widened.done_size, widened.decision_prefault) == (0x8000, 4 * PAGE, True)
    assert (other.to, other.decision_to, other.done_to) == ("private", "shared", "shared")
    assert (other.decision_discard, other.changed) == (False, 0)


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_the_event_of_a_fault_has_the_faults_fields(make, recorder, way) -> None:
    policy = recorder()
    vm, _ = make([Step.access(way.view(0x5000, "private"))], policy=policy, way=way)
    vm.run(timeout=10)
    (event,), (fault,) = vm.events, policy.requests
    told = (event.kind, event.gpa, event.to, event.state, event.flags, event.rip, event.repeats, event.time)
    assert told == ("implicit", 0x5000, "private", fault.state, fault.flags, fault.rip, fault.repeats, fault.time)
    assert (event.page_size, event.raw) == (0, 0)


def test_a_mixed_range(make) -> None:
    vm, _ = make([Step.doorbell(0, 1, PRIVATE), Step.doorbell(0, 2, PRIVATE)])
    vm.run(timeout=10)
    assert [(event.state, event.changed) for event in vm.events] == [("shared", PAGE), ("mixed", PAGE)]


def test_what_a_quota_refuses_was_denied(make) -> None:
    vm, _ = make([Step.doorbell(0, 1, SHARED)], initial="private", policy=policies.Quota(0))
    vm.run(timeout=10)
    (event,) = vm.events
    assert (event.decision, event.decision_errno, event.outcome, event.done_size) == ("deny", 22, "denied", 0)


def test_an_event_whose_hook_failed_has_no_decision(make) -> None:
    class Broken(pagegate.Policy):
        def map_gpa_range(self, call):
            raise ZeroDivisionError

    vm, _ = make([Step.doorbell(0, 1, PRIVATE)], policy=Broken())
    with pytest.raises(ZeroDivisionError):
        vm.run(timeout=10)
    (event,) = vm.events
    assert (event.decision, event.outcome, event.done_size) == ("none", "failed", 0)


def test_the_table_says_the_same_as_the_events(make) -> None:
    steps = [Step.doorbell(number % 5 * PAGE, 1 + number % 3, PRIVATE * (number % 2)) for number in range(50)]
    vm, _ = make(steps, policy=ByAddress())
    vm.run(timeout=10)
    vm.run(timeout=10)
    assert rows(vm.events) == [facts(event) for event in vm.events]
    assert table(vm.events).schema.metadata[b"pagegate.memory"] == str(vm.memory).encode()


@pytest.mark.parametrize("capacity", [1, 2, 3, 1000, 1023, 1024, 1025, 5000])
def test_exactly_the_newest_events_are_kept(make, capacity) -> None:
    cycles = 3000
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, SHARED)], cycles=cycles, events=capacity)
    vm.run(timeout=30)
    kept = list(range(2 * cycles))[-capacity:]
    assert [event.sequence for event in vm.events] == kept
    assert table(vm.events).column("sequence").to_pylist() == kept
    assert (len(vm.events), vm.events.total, vm.events.dropped) == (len(kept), 2 * cycles, 2 * cycles - len(kept))


def test_no_log_at_all(make) -> None:
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE)], cycles=10, events=0)
    vm.run(timeout=10)
    assert (len(vm.events), vm.events.total, vm.events.dropped) == (0, 10, 10)
    assert table(vm.events).num_rows == 0
    assert set(table(vm.events).column_names) == COLUMNS


def addresses(source):
    # Flags are bits in Arrow and bytes in the log.
    columns = [
        column
        for name, column in zip(table(source).column_names, table(source).columns, strict=True)
        if name not in FLAGS
    ]
    chunks = [chunk for column in columns for chunk in column.chunks]
    return [buffer.address for chunk in chunks for buffer in chunk.buffers() if buffer is not None]


def test_a_table_shares_the_logs_memory(make) -> None:
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, SHARED)], cycles=1500)
    vm.run(timeout=30)
    first = addresses(vm.events)
    assert first
    assert first == addresses(vm.events)


class StopAfter(pagegate.Policy):
    def __init__(self, requests):
        self.left = requests

    def map_gpa_range(self, call):
        self.left -= 1
        return Convert() if self.left >= 0 else Stop("for now")


def test_a_table_does_not_change(make) -> None:
    """The log reuses its memory in a later run, and the machine is closed, but the table does not change."""
    steps = [Step.doorbell(number * PAGE, 1, PRIVATE) for number in range(8)]
    vm, _ = make(steps, cycles=2000, events=2048, policy=StopAfter(700))
    vm.run(timeout=30)
    taken = table(vm.events)
    before = taken.to_pylist()
    vm.policy.replace(policies.Allow())
    vm.run(timeout=30)
    vm.close()
    assert taken.to_pylist() == before
    assert [row["sequence"] for row in before] == list(range(701))


def test_the_log_can_be_read_after_its_machine_is_closed() -> None:
    steps = [Step.doorbell(number * PAGE, 1, PRIVATE) for number in range(8)]
    with Vm(MEMORY, events=4, hypervisor=Fake([*steps, Step.doorbell(1, 1, PRIVATE)])) as vm:
        vm.vcpus[0].start(mode="real")
        vm.run(timeout=30)
        log = vm.events
        before = list(log), rows(log), repr(log)
    assert vm.closed
    for events in (log, vm.events):
        assert (list(events), rows(events), repr(events)) == before
        assert (events.total, events.dropped, len(events)) == (9, 4, 5)
        assert [event.gpa for event in events[:4]] == [number * PAGE for number in range(4, 8)]
        assert events[-1].kind == "malformed"
        assert [event.sequence for event in events.since(7)] == [7, 8]
        assert len(trace.read(events)) == 5
        assert "0x7000" in events._repr_html_()


def test_tables_taken_during_a_run_have_whole_rows(make, in_background) -> None:
    cycles = 20_000
    scripts = [[Step.doorbell((16 * vcpu + n) * PAGE, 1 + n % 4, PRIVATE) for n in range(12)] for vcpu in range(2)]
    vm, _ = make(*scripts, cycles=cycles, events=4096)
    run = in_background(vm, timeout=60)
    looks = 0
    while vm.events.total < 24 * cycles:
        taken = table(vm.events)
        for batch in taken.to_batches():
            found = batch.to_pydict()
            assert found["sequence"] == sorted(found["sequence"])
            assert found["gpa"] == found["decision_gpa"] == found["done_gpa"]
            assert found["size"] == [PAGE * (1 + gpa // PAGE % 16 % 4) for gpa in found["gpa"]]
            assert found["vcpu"] == [gpa // PAGE // 16 for gpa in found["gpa"]]
        looks += 1
        assert vm.events.total > max(taken.column("sequence").to_pylist(), default=-1)
    assert run.join(60).requests == 24 * cycles
    assert looks > 1


def resident():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) << 10


def test_the_log_does_not_grow(make, in_background) -> None:
    """Not even while tables are taken from it all the time."""
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE)], cycles=400_000, events=2048, initial="private")
    for _ in range(100):
        table(vm.events)
    before = resident()
    run = in_background(vm, timeout=60)
    while vm.events.total < 400_000:
        table(vm.events)
    run.join(60)
    # All events together take 50 MB.
    assert resident() - before < 16 << 20


def test_durations_and_flags_have_their_types(make) -> None:
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE)])
    vm.run(timeout=10)
    types = dict(zip(table(vm.events).column_names, table(vm.events).schema.types, strict=True))
    assert types["latency"] == pa.duration("ns")
    assert {types[name] for name in FLAGS} == {pa.bool_()}
    assert types["time"] == pa.uint64(), "a point in time of CLOCK_MONOTONIC"


def test_a_malformed_request_has_a_row_with_what_the_guest_gave(make, recorder) -> None:
    policy = recorder()
    steps = [
        Step.doorbell(1, 1, PRIVATE),
        Step.doorbell(0, 1 << 52, SHARED),
        Step.doorbell(0, 0, SHARED),
        Step.doorbell(PAGE, 1, 1 << 40 | PRIVATE),
        Step.doorbell(0, 1, 0, nr=99),
    ]
    vm, _ = make(steps, policy=policy)
    report = vm.run(timeout=10)
    assert (report.malformed, report.requests, policy.requests) == (5, 0, [])
    assert [(event.kind, event.decision, event.outcome, event.errno) for event in vm.events] == [
        ("malformed", "none", "refused", 22)
    ] * 4, "an unknown hypercall is no request"
    told = [(event.gpa, event.size, event.to, event.raw) for event in vm.events]
    assert told == [
        (1, PAGE, "private", PRIVATE),
        (0, (1 << 64) - 1, "shared", SHARED),
        (0, 0, "shared", SHARED),
        (PAGE, PAGE, "private", (1 << 32) - 1),
    ]
    assert (report.latency.max, [event.latency for event in vm.events]) == (0, [0] * 4)
    assert "malformed=5" in repr(report)
    found = pagegate.trace.replay(vm.events, policies.DenyAll())
    assert (found.requests, found.missing, found.different) == (0, 0, 0)


def test_events_by_index_and_slice(make) -> None:
    vm, _ = make([Step.doorbell(number * PAGE, 1, PRIVATE) for number in range(5)])
    vm.run(timeout=10)
    for events in (vm.events, pagegate.trace.read(vm.events)):
        every = list(events)
        assert [events[0], events[-1], events[4]] == [every[0], every[4], every[4]]
        for part in (slice(1, 3), slice(None, None, -2), slice(-2, None), slice(7, 9)):
            assert events[part] == every[part]
        for index in (5, -6):
            with pytest.raises(IndexError, match=f"there is no event {index}: there are 5"):
                events[index]
        with pytest.raises(TypeError, match="the index is 'x': it must be an int, such as 0"):
            events["x"]


def test_polars(make) -> None:
    polars = pytest.importorskip("polars")
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, SHARED)], cycles=5)
    vm.run(timeout=10)
    frame = polars.DataFrame(vm.events)
    assert set(frame.columns) == COLUMNS
    assert frame.group_by("to").agg(polars.col("changed").sum()).sort("changed", "to").rows() == [
        ("private", 5 * PAGE),
        ("shared", 5 * PAGE),
    ]


def test_pandas(make) -> None:
    pandas = pytest.importorskip("pandas")
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, SHARED)], cycles=5)
    vm.run(timeout=10)
    frame = pandas.DataFrame.from_arrow(vm.events)
    assert set(frame.columns) == COLUMNS
    assert frame.groupby("to", observed=True)["changed"].sum().to_dict() == {"private": 5 * PAGE, "shared": 5 * PAGE}


def test_duckdb(make) -> None:
    duckdb = pytest.importorskip("duckdb")
    vm, _ = make([Step.doorbell(PAGE, 1, PRIVATE), Step.doorbell(PAGE, 1, SHARED)], cycles=5)
    vm.run(timeout=10)
    events = vm.events  # noqa: F841 - by name, in the query
    found = duckdb.sql('select "to", sum(changed) from events group by all order by all').fetchall()
    assert found == [("private", 5 * PAGE), ("shared", 5 * PAGE)]


def test_the_times_of_one_vcpus_events_ascend(make) -> None:
    vm, _ = make([Step.doorbell(n * PAGE, 1, PRIVATE) for n in range(9)])
    vm.run(timeout=10)
    times = table(vm.events).column("time").to_pylist()
    assert times == sorted(times)
