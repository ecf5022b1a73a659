"""Files that were made to do harm, and reading them in a process of its own with little memory."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet
from pagegate import trace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096
SOME = 64 << 20
MULTIPLE = 512
"""What reading a trace may take: this, and so many times the file's size."""

READS = """
    import json, re, resource, sys
    from pagegate import policies, trace

    def status(name):
        with open("/proc/self/status") as file:
            return int(re.search(name + r":\\s+(\\d+) kB", file.read())[1]) << 10

    def reset():
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + int(sys.argv[1]),) * 2)

    def read(path):
        reset()
        before = status("VmRSS")
        try:
            said = len(trace.read(path))
        except (OSError, ValueError) as error:
            said = str(error)
        return said, status("VmHWM") - before
"""
"""Defines ``read``, which gives the number of events, or the error's text, and by how much the process grew."""


def run(code: str, *arguments: object, memory: int = SOME, timeout: float = 60) -> str:
    """Runs Python code after ``READS``, with ``memory`` bytes of address space more than it has then."""
    whole = textwrap.dedent(READS) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", whole, str(memory), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


def read_alone(*files: Path) -> list[tuple[int | str, int]]:
    """What reading each file gives, and by how many bytes the process grew."""
    most = max(file.stat().st_size for file in files)
    told = run("print(json.dumps([read(path) for path in sys.argv[2:]]))", *files, memory=SOME + MULTIPLE * most)
    return [tuple(each) for each in json.loads(told)]


def repeated(rows: int, **columns: object) -> pa.Table:
    """One request again and again."""
    table = pa.table(trace.synthetic(1))
    values = {name: columns.get(name, table[name].to_pylist()[0]) for name in table.column_names}
    arrays = [
        pa.repeat(pa.scalar(value, "string" if isinstance(value, str) else table.schema.field(name).type), rows)
        for name, value in values.items()
    ]
    return pa.table(arrays, table.column_names).replace_schema_metadata(table.schema.metadata)


def compressed(folder: Path) -> Iterator[Path]:
    """Small files of many requests that are all the same."""
    table = repeated(200_000)
    for codec in ("zstd", "gzip", "snappy", "lz4"):
        for dictionary in (True, False):
            file = folder / f"{codec}-{dictionary}.parquet"
            pyarrow.parquet.write_table(table, file, compression=codec, use_dictionary=dictionary)
            yield file
    texts = [name for name in table.column_names if table.schema.field(name).type == pa.string()]
    for name in texts:
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    for codec in ("zstd", "lz4"):
        file = folder / f"{codec}.arrows"
        with pa.ipc.new_stream(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table)
        yield file
        file = folder / f"{codec}.arrow"
        with pa.ipc.new_file(file, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(table)
        yield file


def long_names(fields: int, length: int) -> bytes:
    """An IPC message with a schema whose fields all have the same long name, which is in it once."""
    # A flatbuffer: each table begins with the distance back to its vtable, which has the size of both and where each
    # member is; references are distances forward.
    message_vtable = struct.pack("<5H2x", 10, 12, 4, 6, 8)
    schema_vtable = struct.pack("<4H", 8, 12, 0, 4)
    type_vtable = struct.pack("<2H", 4, 4)
    field_vtable = struct.pack("<8H", 16, 20, 4, 0, 8, 12, 0, 16)
    head = 4
    message = head + len(message_vtable)
    schema = message + 12 + len(schema_vtable)
    vector = schema + 12
    field = vector + 4 + 4 * fields + len(field_vtable)
    kind = field + 20 + len(type_vtable)
    children = kind + 4
    name = children + 4
    parts = [struct.pack("<I", message), message_vtable]
    parts.append(struct.pack("<iHBxI", len(message_vtable), 4, 1, schema - (message + 8)))
    parts += [schema_vtable, struct.pack("<iII", len(schema_vtable), vector - (schema + 4), 0)]
    parts.append(struct.pack("<I", fields))
    parts += [struct.pack("<I", field - (vector + 4 + 4 * each)) for each in range(fields)]
    # 6: Bool, a type without members.
    parts += [field_vtable, struct.pack("<iIB3xII", len(field_vtable), name - (field + 4), 6, kind - (field + 12), 0)]
    parts[-1] = parts[-1][:16] + struct.pack("<I", children - (field + 16))
    parts += [type_vtable, struct.pack("<i", len(type_vtable)), struct.pack("<I", 0)]
    parts += [struct.pack("<I", length), b"n" * length + b"\0"]
    whole = b"".join(parts)
    whole += bytes(-len(whole) % 8)
    return b"\xff\xff\xff\xff" + struct.pack("<I", len(whole)) + whole


def varint(value: int) -> bytes:
    """A number in Thrift's compact protocol."""
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def parquet(metadata: bytes) -> bytes:
    """A Parquet file that has only this metadata."""
    return b"PAR1" + metadata + struct.pack("<I", len(metadata)) + b"PAR1"


def parquet_metadata(elements: list[tuple[bytes, int]], rest: bytes) -> bytes:
    """Metadata with these schema elements, names and numbers of children, and more fields after them."""
    parts = [b"\x15\x02\x19\xfc", varint(len(elements))]
    for name, children in elements:
        parts += [b"\x35\x02\x18", varint(len(name)), name, b"\x15", varint(children * 2), b"\x00"]
    return b"".join(parts) + rest


def with_arrow_schema(message: bytes) -> bytes:
    """A Parquet file whose Arrow schema is this message."""
    key, value = b"ARROW:schema", base64.b64encode(message)
    pair = b"\x18" + varint(len(key)) + key + b"\x18" + varint(len(value)) + value + b"\x00"
    return parquet(parquet_metadata([(b"", 1), (b"x", 0)], b"\x16\x00\x19\x0c\x19\x1c" + pair + b"\x00"))
