"""Trace files that are damaged or made to do harm: no abort, no hang, and memory in proportion to their size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet
import pytest
from pagegate import policies, trace

from .hostile_files import (
    MULTIPLE,
    PAGE,
    SOME,
    compressed,
    long_names,
    parquet,
    parquet_metadata,
    read_alone,
    repeated,
    run,
    varint,
    with_arrow_schema,
)
from .trace_parts import FORMATS

EMPTY = b"\x16\x00\x19\x0c\x00"
"""The rest of a Parquet file's metadata: no rows, and no groups of them."""

MUTATES = """
    import random, time
    kind, seed, seconds = sys.argv[2], sys.argv[3], float(sys.argv[5])
    with open(sys.argv[4], "rb") as file:
        whole = file.read()
    choose, end, count, refused = random.Random(seed), time.monotonic() + seconds, 0, 0
    numbers = [0, 1, 0x7F, 0xFF, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 62) + 7, (1 << 64) - 1]
    while time.monotonic() < end:
        data = bytearray(whole)
        for _ in range(choose.choice((1, 1, 1, 2, 5))):
            # Most of a file is values, in which a change does not matter.
            near = choose.choice((len(data), 4000, 400))
            at = max(0, len(data) - 1 - choose.randrange(near)) if choose.random() < 0.7 else choose.randrange(near)
            at = min(at, len(data) - 1)
            match choose.randrange(6):
                case 0: data[at] ^= 1 << choose.randrange(8)
                case 1: data[at] = choose.choice((0, 0x15, 0x7F, 0x80, 0xFF, 0xFC))
                case 2: data[at : at + 8] = choose.choice(numbers).to_bytes(8, "little")
                case 3: data[at : at + 4] = (choose.choice(numbers) & 0xFFFFFFFF).to_bytes(4, "little")
                case 4: data[at : at + choose.randrange(64)] = choose.randbytes(choose.randrange(64))
                case 5: data[at : at + 5] = b"\\xff\\xff\\xff\\xff\\x0f"
        path = f"{sys.argv[4]}.mutated"
        with open(path, "wb") as file:
            file.write(data)
        count += 1
        try:
            found = trace.read(path)
            trace.replay(found, policies.Allow())
        except (OSError, ValueError):
            refused += 1
    print(json.dumps([count, refused]))
"""


@pytest.mark.parametrize("kind", [*FORMATS, "zstd.parquet", "zstd.arrow"])
def test_thousands_of_mutated_files(tmp_path, kind) -> None:
    file = tmp_path / f"trace.{kind}"
    made = trace.synthetic(60)
    table = pa.table(made)
    if kind == "zstd.parquet":
        pyarrow.parquet.write_table(table, file, compression="gzip", use_dictionary=["kind", "to"], row_group_size=20)
    elif kind == "zstd.arrow":
        with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
    else:
        made.write(file)
    count, refused = json.loads(run(MUTATES, kind, 1, file, 2, memory=SOME + MULTIPLE * file.stat().st_size))
    assert count > 100
    assert 0 < refused <= count


@pytest.mark.parametrize("kind", ["arrow", "arrows"])
def test_each_number_of_a_file_in_turn(tmp_path, kind) -> None:
    """Every eight bytes, among them each length and offset, become 2^40."""
    file = tmp_path / f"trace.{kind}"
    trace.synthetic(1).write(file)
    code = """
    with open(sys.argv[2], "rb") as file:
        whole = file.read()
    refused = 0
    for at in range(0, len(whole) - 7, 4):
        with open(sys.argv[2], "wb") as file:
            file.write(whole[:at] + (1 << 40).to_bytes(8, "little") + whole[at + 8 :])
        refused += isinstance(read(sys.argv[2])[0], str)
    print(refused)
    """
    assert int(run(code, file)) > 100


def test_small_files_of_many_requests(tmp_path) -> None:
    files = list(compressed(tmp_path))
    for file, (said, grown) in zip(files, read_alone(*files), strict=True):
        assert grown <= SOME + MULTIPLE * file.stat().st_size, (file, said, grown)
        # That without compression, and with as little as snappy's, is as large as a real one.
        if file.name != "snappy-False.parquet":
            assert "for a file of its size" in said or "a file of its size can have" in said, (file.name, said)


def test_a_real_file_of_many_requests_is_read(tmp_path) -> None:
    made = trace.synthetic(30_000)
    for kind in FORMATS:
        made.write(tmp_path / f"trace.{kind}")
    pyarrow.parquet.write_table(
        pa.table(made),
        tmp_path / "small.parquet",
        compression="zstd",
        compression_level=19,
        use_dictionary=False,
        column_encoding=dict.fromkeys(("sequence", "time", "latency"), "DELTA_BINARY_PACKED"),
    )
    for file in tmp_path.iterdir():
        ((said, grown),) = read_alone(file)
        assert said == 30_000
        assert grown <= SOME + MULTIPLE * file.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("names.arrows", long_names(20_000, 60_000), "Apparent size too large"),
        ("names.parquet", with_arrow_schema(long_names(20_000, 60_000)), "Apparent size too large"),
        ("groups.parquet", parquet(parquet_metadata([(b"", 0)], b"\x16\x00\x19\xfc" + varint(2**31 - 1))), "a list is"),
        ("children.parquet", parquet(parquet_metadata([(b"", 2**30)], EMPTY)), "1073741824 children"),
        ("deep.parquet", parquet(parquet_metadata([(b"x", 1)] * 4000 + [(b"x", 0)], EMPTY)), "nested too deeply"),
        ("wide.parquet", parquet(parquet_metadata([(b"", 5000)] + [(b"x", 0)] * 5000, EMPTY)), "4096 columns"),
        ("type.parquet", parquet(b"\x18\x02ab\x00"), "field 1 has type 8"),
        ("zeroes.parquet", parquet(b"\x15\x02\x49\xfc\xff\xff\xff\xff\x07"), "longer than its file"),
        ("end.parquet", b"PAR1\xff\xff\xff\x7fPAR1", "no end of a Parquet file"),
        ("end.arrow", b"ARROW1\0\0\xff\xff\xff\x7fARROW1", "no end of an Arrow IPC file"),
        ("long.arrows", b"\xff\xff\xff\xff\xff\xff\xff\x00", "it has no schema"),
        ("text.arrows", b"no trace at all", "it begins as no Parquet or Arrow IPC file does"),
    ],
)
def test_files_made_to_do_harm(tmp_path, name, content, why) -> None:
    (tmp_path / name).write_bytes(content)
    ((said, grown),) = read_alone(tmp_path / name)
    assert why in said
    assert str(tmp_path / name) in said
    assert grown <= SOME


def test_what_the_plain_schemas_of_these_files_would_give(tmp_path) -> None:
    """They are refused for their size, and not because they are malformed."""
    (tmp_path / "names.arrows").write_bytes(long_names(3, 10))
    (tmp_path / "names.parquet").write_bytes(with_arrow_schema(long_names(1, 10)))
    (tmp_path / "deep.parquet").write_bytes(parquet(parquet_metadata([(b"x", 1)] * 20 + [(b"x", 0)], EMPTY)))
    for said, _ in read_alone(*tmp_path.iterdir()):
        assert 'there is no column "sequence"' in said or "incompatible" in said.lower(), said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory", 1 << 52),
        ("memory", (16 << 40) + PAGE),
        ("memory", -PAGE),
        ("others", "0x0+0x1000 0x0+0x1000"),
        ("others", "0x0+0x3fff000 0x1000+0x1000"),
        ("others", "0xfffffffffffff000+0x2000"),
        ("others", " ".join(f"{each * 2 * PAGE:#x}+{PAGE:#x}" for each in range(4097))),
        ("first", 1 << 64),
    ],
)
def test_metadata_of_no_machine(tmp_path, key, value) -> None:
    table = pa.table(trace.synthetic(3))
    metadata = {**table.schema.metadata, f"pagegate.{key}".encode(): str(value).encode()}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "trace.parquet")
    ((said, grown),) = read_alone(tmp_path / "trace.parquet")
    assert f"the metadata's pagegate.{key} is not valid" in said
    assert grown <= SOME


def test_sums_of_any_numbers() -> None:
    table = repeated(3, state="shared", to="private", done_to="private", changed=(1 << 64) - 1, outcome="converted")
    found = trace.replay(table, policies.Allow())
    assert found.recorded.bytes_to_private == (1 << 64) - 1
    assert found.requests == 3


def test_requests_all_over_memory() -> None:
    """Each takes page states of its own, however small the trace is."""
    count = 1 << 16
    table = repeated(count, state="private", to="shared")
    gpas = pa.array([each << 28 for each in range(count)], pa.uint64())
    sizes = pa.array([PAGE] * count, pa.uint64())
    for name, values in {"gpa": gpas, "size": sizes, "done_gpa": gpas, "done_size": sizes}.items():
        table = table.set_column(table.column_names.index(name), name, values)
    made = trace.read(table, memory=16 << 40, initial="private")
    with pytest.raises(ValueError, match="scattered over more memory than a replay can keep"):
        trace.replay(made, policies.Allow())
    near = trace.read(repeated(count), memory=16 << 40, initial="private")
    assert trace.replay(near, policies.Allow()).requests == count


def test_a_table_with_keys_outside_of_its_dictionary() -> None:
    table = pa.table(trace.synthetic(3))
    keys = pa.array([0, 100, 0], pa.int8())
    kinds = pa.DictionaryArray.from_arrays(keys, pa.array(["implicit"]), safe=False)
    with pytest.raises(ValueError, match="a value is missing from its dictionary"):
        trace.read(table.set_column(3, "kind", kinds))


def test_long_texts_are_not_repeated_for_each_row() -> None:
    table = repeated(100_000)
    keys = pa.array([0] * 100_000, pa.int32())
    long = pa.DictionaryArray.from_arrays(keys, pa.array(["k" * 10_000_000]))
    with pytest.raises(ValueError, match='column "kind": "kkk.* is none of implicit') as caught:
        trace.read(table.set_column(table.column_names.index("kind"), "kind", long))
    assert len(str(caught.value)) < 300


# ---- what is no file


WAITS = "import sys; from pagegate import trace; print('begins', flush=True); trace.read(sys.argv[1])"


def test_a_pipe_that_nobody_writes_can_be_interrupted(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", WAITS, tmp_path / "pipe"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "begins\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=10)
    assert "KeyboardInterrupt" in told


def test_a_trace_comes_through_a_pipe(tmp_path) -> None:
    made = trace.synthetic(20_000)
    made.write(tmp_path / "trace.parquet")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(
        target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "trace.parquet").read_bytes()), daemon=True
    )
    writer.start()
    assert list(trace.read(tmp_path / "pipe")) == list(made)
    writer.join(10)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/urandom"])
def test_devices_are_no_traces(device) -> None:
    with pytest.raises(ValueError, match=f"{device} is no trace"):
        trace.read(device)


def test_a_device_without_an_end_is_read_to_the_limit_of_memory(tmp_path) -> None:
    """It begins as a trace does. Where there is no memory for it, that is an error and no abort."""
    os.mkfifo(tmp_path / "pipe")
    code = """
    import threading
    def write():
        with open(sys.argv[2], "wb") as pipe:
            try:
                pipe.write(b"PAR1")
                while True:
                    pipe.write(bytes(1 << 20))
            except BrokenPipeError:
                pass
    threading.Thread(target=write, daemon=True).start()
    try:
        trace.read(sys.argv[2])
    except OSError as error:
        print(error.errno, error.filename)
    """
    assert run(code, tmp_path / "pipe", memory=200 << 20) == f"12 {tmp_path / 'pipe'}\n"
