"""`pagegate run --events`, `pagegate replay` and `pagegate trace`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from pagegate import trace

from .cli_parts import pagegate

ALLOW = "from pagegate.policies import Allow\npolicy = Allow()\n"
DENY_SHARED = """
from pagegate import Convert, Deny, Policy
class Mine(Policy):
    def __init__(self, limit: int = 0): self.limit = limit
    def map_gpa_range(self, call): return Deny() if call.to == "shared" and call.gpa >= self.limit else Convert()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "allow.py").write_text(ALLOW)
    (tmp_path / "mine.py").write_text(DENY_SHARED)
    trace.synthetic(1000).write(tmp_path / "some.parquet")
    return tmp_path


def test_a_synthetic_trace(folder) -> None:
    pagegate("trace", "synth", "new.arrow", "--requests", 1000, cwd=folder)
    assert list(trace.read(folder / "new.arrow")) == list(trace.read(folder / "some.parquet"))
    pagegate("trace", "synth", "new.arrow", "--requests", 10, "--seed", 1, "--vcpus", 4, cwd=folder)
    assert len(trace.read(folder / "new.arrow")) == 10
    assert "must end in .parquet" in pagegate("trace", "synth", "new.txt", cwd=folder, status=2).stderr
    assert "No such file or directory" in pagegate("trace", "synth", "no/new.arrow", cwd=folder, status=1).stderr


def test_the_same_policy(folder) -> None:
    told = pagegate("replay", "some.parquet", "-p", "allow.py", cwd=folder).stdout
    assert told.startswith("1000 requests; 0 would be decided otherwise")
    assert "recorded" in told
    assert "allow.py" in told


def test_another_policy(folder) -> None:
    told = pagegate("replay", "some.parquet", "-p", "mine.py", "--show", 2, cwd=folder).stdout
    assert "Deny(errno=22)" in told
    assert told.count("  event ") == 2
    assert "and 418 more (--show)" in told


def test_two_policies_and_json(folder) -> None:
    arguments = ("replay", "some.parquet", "-p", "allow.py", "-p", "mine.py:Mine", "--json", "--show", 3)
    told = json.loads(pagegate(*arguments, cwd=folder).stdout)
    assert (told["requests"], told["missing"]) == (1000, 0)
    allow, mine = told["policies"]
    assert (allow["policy"], mine["policy"]) == ("allow.py", "mine.py:Mine")
    assert allow["differences"] == 0 < mine["differences"] == told["different"]
    assert {**allow, "policy": None} == {**told["recorded"], "policy": None}
    assert mine["bytes_to_shared"] < allow["bytes_to_shared"]
    assert len(told["differences"]) == 3
    first = told["differences"][0]
    assert (first["recorded"], first["decisions"]) == ("Convert()", ["Convert()", "Deny(errno=22)"])


def test_the_same_file_twice(folder) -> None:
    told = pagegate("replay", "some.parquet", "-p", "allow.py", "-p", "allow.py", cwd=folder).stdout
    assert "1: allow.py" in told
    assert "2: allow.py" in told


def test_options(folder) -> None:
    arguments = ("replay", "some.parquet", "-p", "mine.py", "--json", "-o")
    assert json.loads(pagegate(*arguments, "limit=1G", cwd=folder).stdout)["different"] == 0
    assert "limti" in pagegate(*arguments, "limti=1G", cwd=folder, status=2).stderr
    refused = pagegate(*arguments, "limit=1G", "-p", "allow.py", cwd=folder, status=2)
    assert "-o goes with one policy" in refused.stderr


def test_files_that_cannot_be_replayed(folder) -> None:
    assert "is no trace" in pagegate("replay", "mine.py", "-p", "mine.py", cwd=folder, status=2).stderr
    assert "does not exist" in pagegate("replay", "none.arrow", "-p", "mine.py", cwd=folder, status=2).stderr
    assert "name a policy to put the requests to" in pagegate("replay", "some.parquet", cwd=folder, status=2).stderr
    (folder / "slip.py").write_text("def map_gpa_rang(call): ...\ndef memory_fault(fault): ...\n")
    assert (
        "did you mean map_gpa_range" in pagegate("replay", "some.parquet", "-p", "slip.py", cwd=folder, status=1).stderr
    )
    (folder / "broken.py").write_text("def map_gpa_range(call):\n    return {}[call.gpa]\n")
    failed = pagegate("replay", "some.parquet", "-p", "broken.py", cwd=folder, status=1).stderr
    assert "KeyError" in failed
    assert "of the trace" in failed


def test_a_table_without_its_machine(folder) -> None:
    polars = pytest.importorskip("polars")
    polars.read_parquet(folder / "some.parquet").write_parquet(folder / "bare.parquet")
    arguments = ("replay", "bare.parquet", "-p", "allow.py")
    assert "tell memory and initial" in pagegate(*arguments, cwd=folder, status=2).stderr
    told = pagegate(*arguments, "--memory", "1G", "--initial", "private", cwd=folder).stdout
    assert told == pagegate("replay", "some.parquet", "-p", "allow.py", cwd=folder).stdout


@pytest.mark.kvm
@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows"])
def test_record_and_replay(folder, kind) -> None:
    told = pagegate("run", "-p", "mine.py", "--guest", "explicit", "--events", f"e.{kind}", "--json", cwd=folder)
    ran = json.loads(told.stdout)
    found = json.loads(pagegate("replay", f"e.{kind}", "-p", "mine.py", "--json", cwd=folder).stdout)
    assert (found["requests"], found["different"]) == (ran["requests"], 0)
    assert found["recorded"]["denied"] == ran["denied"] > 0
    assert found["recorded"]["bytes_to_shared"] == ran["bytes_to_shared"]


@pytest.mark.kvm
def test_the_limit_of_a_trace(folder) -> None:
    run = ("run", "-p", "allow.py", "--guest", "explicit", "--events", "e.arrow", "--events-limit", 5)
    assert "requests are not in e.arrow: above --events-limit" in pagegate(*run, cwd=folder).stderr
    assert len(trace.read(folder / "e.arrow")) == 5


@pytest.mark.kvm
def test_the_trace_of_a_guest_that_crashed(folder) -> None:
    # out 0xe6, al with RAX = 12, RBX = 0x100000, RCX = 1, RDX = 16, and then an undefined instruction without an IDT
    code = "b80c000000bb00001000b901000000ba10000000e6e60f0b"
    (folder / "image.bin").write_bytes(bytes.fromhex(code))
    pagegate("run", "-p", "allow.py", "image.bin", "--events", "e.parquet", cwd=folder, status=1)
    (event,) = trace.read(folder / "e.parquet")
    assert (event.gpa, event.to, event.outcome) == (1 << 20, "private", "converted")


@pytest.mark.kvm
def test_where_events_cannot_be_written(folder) -> None:
    run = ("run", "-p", "allow.py", "--guest", "explicit", "--events")
    assert "must end in .parquet" in pagegate(*run, "e.csv", cwd=folder, status=2).stderr
    assert "no/e.arrow: No such file or directory" in pagegate(*run, "no/e.arrow", cwd=folder, status=1).stderr
    (folder / "full.arrow").symlink_to("/dev/full")
    failed = pagegate(*run, "full.arrow", cwd=folder, status=1)
    assert "full.arrow: No space left on device" in failed.stderr
    assert "asked" in failed.stdout
    (folder / "broken.py").write_text("def map_gpa_range(call):\n    return {}[call.gpa]\n")
    failed = pagegate("run", "-p", "broken.py", "--guest", "explicit", "--events", "full.arrow", cwd=folder, status=1)
    assert "KeyError" in failed.stderr
    assert "full.arrow: No space left on device" in failed.stderr


@pytest.mark.kvm
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_leaves_a_whole_trace(folder, number, status) -> None:
    # The same request, then out 0xe9, al with AL = '!', and an endless loop.
    (folder / "spin.bin").write_bytes(bytes.fromhex("b80c000000bb00001000b901000000ba10000000e6e6b021e6e9ebfe"))
    run = ["run", "-p", "allow.py", "spin.bin", "--events", "e.parquet", "--timeout", "60"]
    command = [sys.executable, "-m", "pagegate", *run]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(1) == b"!"
        process.send_signal(number)
        assert process.wait(20) == status
    assert len(trace.read(folder / "e.parquet")) == 1
