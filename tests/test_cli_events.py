"""`pagegate events`, and `pagegate trace synth`."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import time

import pyarrow as pa
import pytest
from pagegate import Vm, trace
from pagegate.cli import symbols
from pagegate.testing import Fake, Step

from .cli_parts import pagegate, program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    trace.synthetic(400, vcpus=2).write(folder / "some.parquet")
    return folder


@pytest.fixture(scope="module")
def some(folder):
    return list(trace.read(folder / "some.parquet"))


def rows(folder, *arguments):
    told = pagegate("events", "some.parquet", "--jsonl", *arguments, cwd=folder).stdout
    return [json.loads(line) for line in told.splitlines()]


def test_events_as_lines(folder, some):
    told = pagegate("events", "some.parquet", cwd=folder).stdout.splitlines()
    assert told[0].split() == ["event", "seconds", "vCPU", "kind", "gpa", "size", "to", "outcome"]
    assert len(told) == 1 + len(some)
    assert re.match(
        r" +0 0\.000000 +\d (implicit|explicit) 0x\w+ +\d+ (K|M)iB (shared|private) +converted  \d", told[1]
    )
    assert len(pagegate("events", "some.parquet", "--limit", 3, cwd=folder).stdout.splitlines()) == 1 + 3 + 1


def test_time_counts_from_the_first_event_of_the_trace(folder, some):
    late = [event for event in some if event.kind == "implicit"][-1]
    told = pagegate("events", "some.parquet", "--gpa", hex(late.gpa), cwd=folder).stdout.splitlines()
    assert told[-1].split()[:2] == [str(late.sequence), f"{(late.time - some[0].time) / 1e9:.6f}"]


def test_columns_stay_in_line_for_every_kind(folder):
    with Vm("1M", hypervisor=Fake([Step.hypercall(0x1000, 1, 16), Step.hypercall(0x1000, 1 << 52, 16)])) as vm:
        vm.vcpus[0].start(mode="protected")
        with trace.Recorder(vm, folder / "kinds.parquet"):
            vm.run(timeout=10)
    heading, *lines = pagegate("events", "kinds.parquet", cwd=folder).stdout.splitlines()
    assert {line.index("0x") for line in lines} == {heading.index("gpa")}


def test_what_is_left_out_and_what_is_not_found_is_said(folder, some):
    assert (
        f"and {len(some) - 3} more events (--limit)"
        in pagegate("events", "some.parquet", "--limit", 3, cwd=folder).stdout
    )
    nothing = pagegate("events", "some.parquet", "--size", "1G", cwd=folder)
    assert (nothing.stdout, nothing.stderr) == ("", "pagegate: none of the 400 events is chosen by these options\n")
    heading = pagegate("events", "some.parquet", "--csv", "--size", "1G", cwd=folder).stdout
    assert heading.strip().split(",") == [*some[0].asdict(), "symbol"]


def test_sums_are_all_given_to_programs_unless_limited(folder, some):
    pages = {event.gpa for event in some}
    assert len(pages) > 40
    for arguments, count in ([], len(pages)), (["--limit", 40], 40), (["--limit", 2], 2):
        assert len(rows(folder, "--by", "page", *arguments)) == count


def test_all_columns_for_programs(folder, some):
    assert rows(folder) == [{**event.asdict(), "symbol": None} for event in some]
    table = list(csv.DictReader(io.StringIO(pagegate("events", "some.parquet", "--csv", cwd=folder).stdout)))
    assert [int(row["gpa"]) for row in table] == [event.gpa for event in some]
    assert set(table[0]) == {*some[0].asdict(), "symbol"}


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        (("--kind", "implicit"), lambda e: e.kind == "implicit"),
        (("--kind", "implicit", "--kind", "explicit"), lambda e: True),
        (("--to", "private"), lambda e: e.to == "private"),
        (("--vcpu", "1"), lambda e: e.vcpu == 1),
        (("--size", "256K"), lambda e: e.size == 256 << 10),
        (("--size", "64K-"), lambda e: e.size >= 64 << 10),
        (("--size", "4K-8K"), lambda e: 4096 <= e.size <= 8192),
        (("--gpa", "512M+256M"), lambda e: e.gpa < 768 << 20 and e.gpa + e.size > 512 << 20),
        (("--decision", "deny"), lambda e: False),
        (("--outcome", "converted", "--kind", "explicit"), lambda e: e.kind == "explicit"),
    ],
)
def test_only_some(folder, some, arguments, holds):
    expected = [event.sequence for event in some if holds(event)]
    assert [row["sequence"] for row in rows(folder, *arguments)] == expected


def test_sums_add_up(folder, some):
    for keys in (("kind",), ("kind", "to"), ("page",), ("size",), ("vcpu",)):
        told = rows(folder, *(part for key in keys for part in ("--by", key)))
        assert sum(row["times"] for row in told) == len(some)
        assert sum(row["asked"] for row in told) == sum(event.size for event in some)
    kinds = {row["kind"]: row for row in rows(folder, "--by", "kind")}
    implicit = [event for event in some if event.kind == "implicit"]
    assert kinds["implicit"]["times"] == len(implicit)
    assert kinds["implicit"]["longest"] == max(event.latency for event in implicit)
    told = pagegate("events", "some.parquet", "--by", "kind", "--by", "to", cwd=folder).stdout
    assert re.match(r"kind +to +times +asked for +changed +outcomes\n", told)
    arguments = ("events", "some.parquet", "--by", "kind", "--by", "to", "--limit", 2)
    assert "and 2 more rows (--limit)" in pagegate(*arguments, cwd=folder).stdout


def test_functions_of_the_kernel(folder, some):
    rip = next(event.rip for event in some if event.rip)
    beside = symbols.beside(folder / "some.parquet")
    beside.write_text(json.dumps({hex(rip): "swiotlb_map+0x1f"}))
    try:
        found = rows(folder, "--symbol", "swiotlb*")
        assert [row["sequence"] for row in found] == [event.sequence for event in some if event.rip == rip]
        assert found[0]["symbol"] == "swiotlb_map+0x1f"
        told = {row["symbol"]: row["times"] for row in rows(folder, "--by", "symbol")}
        assert told["swiotlb_map"] == len(found)
        beside.write_text("{no json")
        assert rows(folder, "--symbol", "swiotlb*") == []
    finally:
        beside.unlink()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpa", "x"), "'x' is no whole number"),
        (("--kind", "odd"), "'odd' is not one of"),
        (("--by", "odd"), "'odd' is not one of"),
        (("--csv", "--jsonl"), "name --csv or --jsonl, not both"),
    ],
)
def test_a_usage_error_is_2(folder, arguments, said):
    assert said in pagegate("events", "some.parquet", *arguments, cwd=folder, status=2).stderr


def test_a_file_that_is_no_trace_is_2(folder):
    (folder / "none.parquet").write_bytes(b"PAR1 not")
    assert "none.parquet" in pagegate("events", "none.parquet", cwd=folder, status=2).stderr


def test_ctrl_c_ends_the_making_of_a_trace(folder):
    making = program("trace", "synth", "large.arrows", "--requests", 100_000_000)
    with subprocess.Popen(making, cwd=folder, stderr=subprocess.PIPE) as process:
        time.sleep(1.5)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1].endswith(b"interrupted\n")
    # All of it would take a minute.
    assert time.monotonic() - begun < 15
    assert process.returncode == 130
    assert not (folder / "large.arrows").exists()


def test_the_old_form_of_trace_works_and_says_so(folder):
    new = pagegate("trace", "synth", "new.arrow", "--requests", 10, cwd=folder)
    assert new.stderr == ""
    old = pagegate("trace", "--requests", 10, "old.arrow", cwd=folder)
    assert old.stderr == "pagegate: `pagegate trace FILE` is `pagegate trace synth FILE` now\n"
    assert list(trace.read(folder / "new.arrow")) == list(trace.read(folder / "old.arrow"))


def test_replay_folds_what_is_the_same_for_neighbouring_pages(folder):
    event = trace.synthetic(1)[0].asdict()
    pages = [
        {
            **event,
            **dict.fromkeys(("sequence", "time"), number),
            **dict.fromkeys(("gpa", "decision_gpa", "done_gpa"), 0x10_0000 + number * 4096),
            **dict.fromkeys(("size", "decision_size", "done_size", "changed"), 4096),
            "kind": "implicit",
            "page_size": 0,
            "raw": 0,
            "to": "shared",
            "state": "private",
            "vcpu": number % 2,
            "decision_to": "shared",
            "done_to": "shared",
            "write": False,
            **dict.fromkeys(("device", "queue", "descriptor"), 0),
        }
        for number in (*range(20), *range(40, 42))
    ]
    schema = pa.schema(trace.synthetic(1))
    table = pa.Table.from_pylist(pages, schema=schema)
    trace.read(table).write(folder / "pages.parquet")
    told = pagegate("replay", "pages.parquet", "-p", "DenyAll", cwd=folder).stdout
    assert "20 events, 0 to 19: vCPU 0, 1 implicit 0x100000 + 80 KiB to shared" in told
    assert "2 events, 40 to 41: vCPU 0, 1 implicit 0x128000 + 8 KiB to shared" in told
    assert told.count("Deny(errno=22)") == 2
    assert "and 2 more (--show)" in pagegate("replay", "pages.parquet", "-p", "DenyAll", "--show", 1, cwd=folder).stdout


def test_replay_without_a_policy_says_what_to_do(folder):
    told = pagegate("replay", "some.parquet", cwd=folder, status=2).stderr
    assert "name a policy to put the requests to" in told
    assert "`pagegate events some.parquet`" in told


def test_a_file_of_names_that_is_a_pipe_a_device_or_too_large_is_none(folder, tmp_path, some):
    file = tmp_path / "some.parquet"
    file.write_bytes((folder / "some.parquet").read_bytes())
    names = symbols.beside(file)
    plain = pagegate("events", file, "--jsonl", cwd=folder).stdout
    for make in (
        lambda: os.mkfifo(names),
        lambda: names.symlink_to("/dev/zero"),
        names.mkdir,
        lambda: names.write_text("[3]"),
        lambda: names.write_text('{"0x1": "a"'),
        lambda: (names.touch(), os.truncate(names, 1 << 40)),
    ):
        make()
        assert pagegate("events", file, "--jsonl", cwd=folder).stdout == plain
        names.rmdir() if names.is_dir() else names.unlink()
    names.write_text(json.dumps({hex(some[0].rip): "start"}))
    assert json.loads(pagegate("events", file, "--jsonl", cwd=folder).stdout.splitlines()[0])["symbol"] == "start"
