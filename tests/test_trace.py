"""Traces as files and as tables, and recording them, without KVM."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time

import pagegate
import pyarrow as pa
import pyarrow.parquet
import pytest
from pagegate import policies, trace

from .trace_parts import FORMATS, MEMORY, PAGE, SHARED, StopAt, call, machine, recorded

# ---- files


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_holds_what_the_log_held(tmp_path, kind) -> None:
    file = tmp_path / f"trace.{kind}"
    events = recorded(file, [call(1), call(2, 3), call(1, 1, SHARED)], cycles=2000)
    read = trace.read(file)
    assert list(read) == events
    assert (len(read), read.memory, read[0], read[-1]) == (6000, MEMORY, events[0], events[-1])
    assert read[0] != events[1]
    with pytest.raises(IndexError):
        read[6000]


@pytest.mark.parametrize("kind", FORMATS)
def test_two_vcpus(tmp_path, kind) -> None:
    file = tmp_path / f"trace.{kind}"
    events = recorded(file, [call(1), call(1, 1, SHARED)], [call(9), call(9, 1, SHARED)], cycles=3000)
    assert list(trace.read(file)) == events
    assert [event.sequence for event in events] == list(range(12_000))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_empty_trace(tmp_path, kind) -> None:
    file = tmp_path / f"trace.{kind}"
    assert recorded(file, []) == []
    assert len(trace.read(file)) == 0
    assert trace.replay(file, policies.Allow()).requests == 0


def test_other_libraries_read_the_files(tmp_path) -> None:
    files = {kind: tmp_path / f"trace.{kind}" for kind in FORMATS}
    made = trace.synthetic(500)
    for file in files.values():
        made.write(file)
    tables = [
        pyarrow.parquet.read_table(files["parquet"]),
        pa.ipc.open_file(files["arrow"]).read_all(),
        pa.ipc.open_stream(files["arrows"]).read_all(),
    ]
    assert all(table.to_pylist() == pa.table(made).to_pylist() for table in tables)
    assert all(table.schema.metadata == pa.table(made).schema.metadata for table in tables)


def test_files_of_other_libraries_are_read(tmp_path) -> None:
    polars = pytest.importorskip("polars")
    duckdb = pytest.importorskip("duckdb")
    made = trace.synthetic(500)
    frame = polars.DataFrame(made)
    frame.write_parquet(tmp_path / "polars.parquet")
    frame.write_ipc(tmp_path / "polars.arrow", compression="zstd")
    frame.lazy().sort("latency").collect().write_parquet(tmp_path / "shuffled.parquet", compression="lz4")
    strings = frame.with_columns(polars.col("kind", "to").cast(polars.String)).select(reversed(frame.columns))
    strings.write_parquet(tmp_path / "strings.parquet", compression="gzip")
    # Its durations are of microseconds, and it writes them in a form of its own.
    columns = "* replace ((epoch_us(latency) * 1000)::ubigint as latency)"
    duckdb.sql(f"copy (select {columns} from frame) to '{tmp_path / 'duckdb.parquet'}'")
    for file in tmp_path.iterdir():
        read = list(trace.read(file, memory=made.memory, initial="private"))
        unit = 1000 if file.name == "duckdb.parquet" else 1
        rounded = [pagegate.Event(**{**event.asdict(), "latency": event.latency // unit * unit}) for event in made]
        assert read == rounded, file.name
    assert list(trace.read(frame, memory=made.memory, initial="private")) == list(made)
    some = trace.read(frame.filter(polars.col("kind") == "implicit"), memory=made.memory, initial="private")
    assert {event.kind for event in some} == {"implicit"}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_times_in_any_unit_are_nanoseconds(unit, suffix, tmp_path) -> None:
    per = {"s": 10**9, "ms": 10**6, "us": 1000, "ns": 1}[unit]
    made = pa.table(trace.synthetic(20))

    def replaced(latencies, name="latency", kind=None):
        column = pa.array(latencies, kind or pa.duration(unit))
        return made.set_column(made.schema.get_field_index(name), name, column)

    table = replaced(range(20))
    file = tmp_path / f"events.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    for source in (table, file):
        assert [event.latency for event in trace.read(source)] == [at * per for at in range(20)]
    times = trace.read(replaced(range(20), "time", pa.timestamp(unit)))
    assert [event.time for event in times] == [at * per for at in range(20)]
    if per > 1:
        with pytest.raises(ValueError, match=r'column "latency": .*do not all fit'):
            trace.read(replaced([2**63 // per + 1] * 20))


def test_a_time_of_day_is_no_latency() -> None:
    made = pa.table(trace.synthetic(2))
    table = made.set_column(made.schema.get_field_index("latency"), "latency", pa.array([1, 2], pa.time64("us")))
    with pytest.raises(ValueError, match='column "latency": it has type Time64'):
        trace.read(table)


def test_a_table_without_its_machine() -> None:
    table = pa.table(trace.synthetic(5)).replace_schema_metadata()
    with pytest.raises(ValueError, match="does not say how much memory .*: tell memory and initial to whoever"):
        trace.read(table)
    with pytest.raises(ValueError, match="initial goes with memory"):
        trace.read(table, initial="private")
    with pytest.raises(ValueError, match="multiple of 4096"):
        trace.read(table, memory=5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda table: table.drop(["gpa"]), 'no column "gpa"'),
        (
            lambda table: table.set_column(4, "gpa", pa.array([-1, 0, 0], pa.int64())),
            '"gpa": its values do not all fit',
        ),
        (lambda table: table.set_column(4, "gpa", pa.array([None, 0, 0], pa.uint64())), '"gpa": it has nulls'),
        (lambda table: table.set_column(3, "kind", pa.array(["implicit", "x", "poison"])), '"kind": "x" is none of'),
        (lambda table: table.set_column(6, "to", pa.array(["mixed"] * 3)), "row 0 makes no sense"),
        (lambda table: table.set_column(3, "kind", pa.array([1.5, 2.5, 3.5])), '"kind": it has type Float64'),
    ],
)
def test_tables_that_are_no_traces(change, why) -> None:
    with pytest.raises(ValueError, match=why):
        trace.read(change(pa.table(trace.synthetic(3))))


def test_objects_that_are_no_traces(tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        trace.read(tmp_path / "none.parquet")
    assert caught.value.filename == str(tmp_path / "none.parquet")
    with pytest.raises(TypeError, match="a path, a Trace, vm.events"):
        trace.read(5)
    (tmp_path / "text.parquet").write_text("no trace at all")
    with pytest.raises(ValueError, match="is no trace"):
        trace.read(tmp_path / "text.parquet")
    (tmp_path / "empty.arrow").touch()
    with pytest.raises(ValueError, match="is no trace"):
        trace.read(tmp_path / "empty.arrow")
    with pytest.raises(ValueError, match=r"must end in .parquet, .arrow \(IPC file\) or .arrows"):
        trace.synthetic(1).write(tmp_path / "trace.csv")


def test_damaged_parquet_is_an_error(tmp_path) -> None:
    file = tmp_path / "trace.parquet"
    trace.synthetic(200).write(file)
    whole = file.read_bytes()
    choose = random.Random(1)
    for _ in range(50):
        file.write_bytes(whole[: choose.randrange(len(whole))])
        with pytest.raises(ValueError, match="is no trace"):
            trace.read(file)
    # Some changed bytes are in values, where the change cannot be noticed.
    refused = 0
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[len(damaged) - 1 - choose.randrange(3000)] ^= choose.randrange(1, 256)
        file.write_bytes(damaged)
        try:
            trace.read(file)
        except (ValueError, OSError):
            refused += 1
    assert refused >= 40


def messages(stream: bytes) -> list[tuple[int, int, int]]:
    """Of each message of an Arrow stream where it begins and ends, and how many rows it has."""
    found, end, batches = [], 0, iter(pa.ipc.open_stream(stream))
    for message in pa.ipc.MessageReader.open_stream(stream):
        # Four bytes of ones, and how long what follows up to its body is.
        assert stream[end : end + 4] == b"\xff\xff\xff\xff"
        begin, end = end, end + 8 + int.from_bytes(stream[end + 4 : end + 8], "little") + message.body.size
        rows = next(batches).num_rows if message.type == "record batch" else 0
        found.append((begin, end, rows))
    return found


def test_a_stream_can_be_read_at_any_time(tmp_path) -> None:
    file = tmp_path / "trace.arrows"
    events = recorded(file, [call(1), call(1, 1, SHARED)], cycles=10_000)
    assert not trace.read(file).truncated
    whole = file.read_bytes()
    for length in (len(whole) - 8, len(whole) - 1000, len(whole) * 2 // 3):
        file.write_bytes(whole[:length])
        read = trace.read(file)
        assert read.truncated
        assert list(read) == events[: len(read)]
        assert len(read) == sum(rows for _, end, rows in messages(whole) if end <= length)


def test_a_stream_damaged_in_the_middle_is_an_error(tmp_path) -> None:
    file = tmp_path / "trace.arrows"
    recorded(file, [call(1), call(1, 1, SHARED)], cycles=10_000)
    whole = bytearray(file.read_bytes())
    begin, _, rows = messages(bytes(whole))[-1]
    assert rows
    whole[begin + 8 : begin + 200] = b"\xff" * 192
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="is no trace"):
        trace.read(file)


RECORDS = """
    import sys
    from pagegate import Vm, trace
    from pagegate.testing import Fake, Step

    steps = [Step.doorbell(0x1000, 1, 16), Step.doorbell(0x1000, 1, 0)]
    with Vm(0x40000, hypervisor=Fake(steps, cycles=10_000)) as vm, trace.Recorder(vm, sys.argv[1]) as recorder:
        vm.vcpus[0].start()
        print(vm.run(timeout=30).reason, vm.events.total, recorder.written, flush=True)
        sys.stdin.read()
"""


def test_a_killed_recorder_leaves_a_stream_that_can_be_read(tmp_path) -> None:
    file = tmp_path / "trace.arrows"
    command = [sys.executable, "-c", textwrap.dedent(RECORDS), str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "halt 20000 0\n"
            # Events are written to the file within a second.
            end = time.monotonic() + 10
            while len(trace.read(file)) < 20_000:
                assert time.monotonic() < end, "events are not written while the recorder runs"
                time.sleep(0.02)
            assert child.poll() is None
        finally:
            child.kill()
        assert child.wait(10) == -signal.SIGKILL
    read = trace.read(file)
    assert (len(read), read.truncated) == (20_000, True)


# ---- recording


def test_what_the_log_dropped_is_counted(tmp_path) -> None:
    file = tmp_path / "trace.arrow"
    with machine([call(1), call(1, 1, SHARED)], cycles=200_000, events=8) as vm:
        with trace.Recorder(vm, file) as recorder:
            vm.run(timeout=60)
        assert recorder.lost > 0
        assert recorder.written + recorder.lost == vm.events.total == 400_000
        sequences = [event.sequence for event in trace.read(file)]
    assert len(sequences) == recorder.written
    assert sequences == sorted(set(sequences))
    assert sequences[-1] == 399_999
    found = trace.replay(file, policies.Allow())
    assert found.missing == recorder.lost


def test_a_recording_has_only_events_after_its_start(tmp_path) -> None:
    with machine([call(1), call(2), call(3)], policy=policies.Allow()) as vm:
        vm.policy.replace(StopAt(1))
        vm.run(timeout=10)
        with trace.Recorder(vm, tmp_path / "trace.arrow") as recorder:
            vm.run(timeout=10)
            recorder.close()
        recorder.close()
    events = list(trace.read(tmp_path / "trace.arrow"))
    assert [event.sequence for event in events] == [2]
    # The trace knows what had been converted before the recording.
    assert trace.read(tmp_path / "trace.arrow").shared_bytes == MEMORY - PAGE


def test_a_full_disk_is_reported_once(tmp_path) -> None:
    full = tmp_path / "trace.arrows"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught, machine([call(1)]) as vm:
        trace.Recorder(vm, full)
    assert caught.value.filename == str(full)
    for kind in ("parquet", "arrow"):
        full = tmp_path / f"trace.{kind}"
        full.symlink_to("/dev/full")
        with machine([call(1)], cycles=20_000) as vm:
            recorder = trace.Recorder(vm, full)
            vm.run(timeout=30)
            with pytest.raises(OSError, match="No space left on device"):
                recorder.close()
            recorder.close()


def test_a_recorder_of_a_closed_machine(tmp_path) -> None:
    vm = machine([call(1)])
    recorder = trace.Recorder(vm, tmp_path / "trace.arrow")
    vm.run(timeout=10)
    vm.close()
    recorder.close()
    assert len(trace.read(tmp_path / "trace.arrow")) == 1
    with pytest.raises(pagegate.PagegateError, match="closed"):
        trace.Recorder(vm, tmp_path / "other.arrow")


def test_a_disk_that_fills_up_ends_the_run(tmp_path) -> None:
    full = tmp_path / "trace.arrow"
    full.symlink_to("/dev/full")
    with machine([call(1), call(1, 1, SHARED)], cycles=1 << 40) as vm:
        recorder = trace.Recorder(vm, full)
        assert vm.run(timeout=60).reason == "stopped"
        with pytest.raises(OSError, match="No space left on device"):
            recorder.close()


def test_no_more_than_the_limit_is_written(tmp_path) -> None:
    file = tmp_path / "trace.arrow"
    with machine([call(1), call(1, 1, SHARED)], cycles=10_000) as vm:
        with trace.Recorder(vm, file, limit=7) as recorder:
            vm.run(timeout=60)
        assert (recorder.written, recorder.lost) == (7, 19_993)
    assert [event.sequence for event in trace.read(file)] == list(range(7))


def test_events_dropped_before_the_replay_are_counted_as_missing() -> None:
    vm = machine([call(1), call(1, 1, SHARED)], cycles=50, events=10)
    vm.run(timeout=10)
    found = trace.replay(vm.events, policies.Allow())
    vm.close()
    assert (found.requests, found.missing) == (10, 90)
