"""`pagegate boot` on the fake hypervisor: its terminal, its output and its exit statuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from .boot_parts import SLOW, command, kernel, write_kernel
from .cli_parts import policy, program

__all__ = ["policy"]

KEYS = {"reason", "confidential", "enforcement", "vcpus", "requests", "explicit", "implicit", "conversions", "denied"}
KEYS |= {"bytes_to_private", "bytes_to_shared", "shared_bytes", "private_bytes", "seconds", "panic", "at", "by"}
KEYS |= {"malformed", "unpaged", "debug_private", "policy"}


@pytest.fixture
def image(tmp_path):
    return write_kernel(tmp_path)


@pytest.fixture
def replies(tmp_path, monkeypatch):
    """The file with what the guest has read."""
    path = tmp_path / "replies"
    monkeypatch.setenv("REPLIES", str(path))
    return path


def boot(*arguments, stdin=b"", columns=None, **guest):
    environment = {**os.environ} | ({} if columns is None else {"COLUMNS": str(columns)})
    done = subprocess.run(
        command(*arguments, **guest), input=stdin, capture_output=True, timeout=60, check=False, env=environment
    )
    return SimpleNamespace(status=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--memory", "63K"), "63K is no positive multiple of 4096"),
        (("--memory", "16M"), "needs at least 32 MiB"),
        (("--initrd", "/nonexistent"), "/nonexistent"),
        (("-o", "limit=1"), "name one with -p"),
        (("--policy-timeout", "1"), "name one with -p"),
        (("--enforcement", "traps", "--confidential", "none"), "is for --confidential sev"),
        (("--events", "/tmp/x.csv"), "x.csv"),
        (("--memory", "1073741824M"), "private_bit|memory"),
        (("--timeout", "0"), "--timeout"),
    ],
)
def test_a_usage_error_is_2(image, arguments, said):
    done = boot(image, *arguments)
    assert (done.status, done.out) == (2, "")
    assert re.search(said, done.err), done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (kernel()[:-100], "is cut off"),
        (b"070701" + bytes(1000), "is an initrd"),
        (b"\x1f\x8b" + bytes(1000), "compressed with gzip"),
        (b"hello", "is not a kernel"),
    ],
)
def test_a_foreign_or_truncated_image_is_2(image, content, said):
    image.write_bytes(content)
    done = boot(image)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert str(image) in done.err


def test_an_initrd_that_does_not_fit_is_2(image, tmp_path):
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(64 << 20)
    done = boot(image, "--initrd", initrd, "--memory", "64M")
    assert (done.status, done.out) == (2, "")
    assert "initrd" in done.err


@pytest.mark.parametrize(
    ("guest", "ended"),
    [
        ("powers off", "poweroff after .*: the guest powered off"),
        ("reboots", "reboot after .*: the guest rebooted"),
        ("halts", "halt after .*: every vCPU halted for good"),
    ],
)
def test_a_guest_that_ends_well_is_0(image, guest, ended):
    done = boot(image, guest=guest, says=b"hello\r\n")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("hello\r\n\n0 ")
    assert re.search(ended, done.out)


def test_a_timeout_is_0(image):
    done = boot(image, "--timeout", "3", guest="hangs", says=b"login: ")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("login: \n")
    assert "still running after 3 s (--timeout)" in " ".join(done.out.split())


def test_a_triple_fault_is_1(image):
    done = boot(image, guest="shuts down", says=b"x")
    assert done.status == 1
    assert done.err.startswith("pagegate: the guest shut down: an exception that it could not handle")
    assert "vCPU 0 at rip" in done.err
    assert re.search(r"\nat +vCPU 0 at rip", done.out)


@pytest.mark.parametrize("guest", ["reboots", "hangs", "shuts down"])
def test_a_panic_is_1_and_told_with_its_text(image, guest):
    says = b"[    1.5] Kernel panic - not syncing: VFS: Unable \x1b[2J to mount\r\n[    1.6] CPU: 0\r\n"
    says += b"Kernel panic - not syncing: a second one\r\n"
    done = boot(image, "--json", "--timeout", "3", guest=guest, says=says)
    assert done.status == 1
    assert json.loads(done.out)["panic"] == "VFS: Unable ?[2J to mount"
    assert done.err.endswith("pagegate: the guest's kernel panicked: VFS: Unable ?[2J to mount\n")
    assert "second" not in done.err.partition("pagegate: ")[2]


def test_a_guest_that_only_prints_a_panic_and_powers_off_is_0(image):
    done = boot(image, "--json", says=b"grep: Kernel panic - not syncing: x\n")
    assert done.status == 0
    assert json.loads(done.out)["panic"] is None


def test_json(image, policy):
    file = policy("class A(Policy):\n  def __init__(self, limit: int): pass\n")
    done = boot(image, "--json", "-p", f"{file}:A", "-o", "limit=1", "--memory", "64M", guest="asks", says=b"hello\n")
    assert (done.status, done.err) == (0, "hello\n")
    told = json.loads(done.out)
    assert set(told) >= KEYS
    counts = ("reason", "confidential", "requests", "explicit", "implicit", "conversions", "malformed", "unpaged")
    assert [told[key] for key in counts] == ["poweroff", "sev", 3, 2, 1, 3, 1, 0]
    assert told["policy"] == f"{file}:A"
    assert (told["bytes_to_shared"], told["bytes_to_private"]) == (4096 + (2 << 20), 4096)
    assert (told["shared_bytes"], told["private_bytes"]) == (2 << 20, 62 << 20)
    assert told["by"] == [
        {"kind": "explicit", "to": "shared", "symbol": None, "count": 2, "bytes": 4096 + (2 << 20)},
        {"kind": "implicit", "to": "private", "symbol": None, "count": 1, "bytes": 4096},
    ]
    assert told["hints"] == []


def test_json_of_an_ordinary_guest(image):
    done = boot(image, "--json", "--confidential", "none", "--debug-private", "--vcpus", "2", says=b"x")
    told = json.loads(done.out)
    keys = ("confidential", "enforcement", "vcpus", "debug_private", "policy", "private_bytes")
    assert [told[key] for key in keys] == ["none", "memslots", 2, True, "allow", 0]
    assert [hint for hint in told["hints"] if "no request" in hint] == []


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_summary_fits(image, columns):
    done = boot(image, "--memory", "64M", guest="asks", says=b"x\n", columns=columns)
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert [line for line in lines if line != line.rstrip()] == []
    text = " ".join(done.out.split())
    assert "asked 3 times: 1 implicit, 2 explicit and 1 malformed, which no policy saw" in text
    assert "decided 3 converted" in text
    assert "62 MiB private, 2 MiB shared" in text
    assert re.search(r"explicit +shared +2 MiB +1 +\?\n", done.out)
    strip = next(line for line in lines if line.startswith("0 "))
    assert re.fullmatch("0 [█▒░]+ 64 MiB", strip)
    assert len(strip) == min(columns, 64 + len("0  64 MiB"))


def test_the_table_has_15_rows_at_most(image):
    done = boot(image, guest="asks often", says=b"x")
    rows = done.out[done.out.index("asked     to") :].strip().splitlines()[1:]
    assert len(rows) == 15
    assert rows[-1].split() == ["others", "6", "in", "6", "more", "ways"]


def test_the_hole_below_4_gib_is_left_out_of_the_strip(image):
    done = boot(image, "--memory", "4G", "--confidential", "none", says=b"x")
    assert (done.status, done.err) == (0, "")
    assert f"0 {'░' * 64} 4096 MiB\n" in done.out


@pytest.mark.parametrize(
    ("guest", "says", "hints"),
    [
        ("powers off", b"x", ["made no request"]),
        ("touches", b"x", ["made no explicit request"]),
        ("asks", b"x", []),
        ("asks", b"", ["wrote nothing to its console"]),
    ],
)
def test_hints(image, guest, says, hints):
    found = json.loads(boot(image, "--json", guest=guest, says=says).out)["hints"]
    assert len(found) == len(hints)
    for hint, part in zip(found, hints, strict=True):
        assert part in hint
    assert all(hint[1:] in " ".join(boot(image, guest=guest, says=says).out.split()) for hint in found)


def test_a_policy_that_denies_a_touch_is_1(image, policy):
    file = policy("policy = policies.ExplicitOnly()\n")
    done = boot(image, "-p", file, guest="touches", says=b"x")
    assert done.status == 1
    assert "pagegate: the policy denied what the guest had touched (implicit, 0x100000 + 4 KiB to shared)" in done.err
    assert "1 denied" in done.out
    assert "made no" not in done.out


def test_a_policy_that_stops_is_1_whatever_its_reason(image, policy):
    file = policy("def map_gpa_range(call): return Stop('poweroff')\n")
    done = boot(image, "-p", file, guest="asks", says=b"x")
    assert done.status == 1
    assert "the policy stopped the run (explicit, 0x100000 + 4 KiB to shared): poweroff" in done.err


def test_a_hook_that_raises_is_1_with_notes(image, policy):
    file = policy("def map_gpa_range(call): raise KeyError('oops')\n")
    done = boot(image, "-p", file, guest="asks", says=b"before\n")
    assert (done.status, done.out.startswith("before\n")) == (1, True)
    assert "it could not go on, as the error says" in done.out
    assert "KeyError: 'oops'" in done.err
    assert "gpa 0x100000" in done.err


def test_a_call_that_takes_too_long_is_1_with_its_place(image, policy):
    file = policy("import time\ndef map_gpa_range(call):\n    while True: time.sleep(0.01)\n    return Convert()\n")
    done = boot(image, "-p", file, "--policy-timeout", "0.2", guest="asks", says=b"before\n")
    assert (done.status, done.out.startswith("before\n")) == (1, True)
    assert f'File "{file}", line 4, in map_gpa_range' in done.err
    assert "longer than policy_timeout" in done.err


def test_events(image, tmp_path):
    from pagegate import trace

    file = tmp_path / "events.parquet"
    assert boot(image, "--events", file, guest="asks", says=b"x").status == 0
    assert [event.kind for event in trace.read(file)] == ["explicit", "explicit", "implicit", "malformed"]


def test_what_is_piped_in_reaches_the_guest(image, policy, replies):
    done = boot(image, "-p", policy(SLOW), stdin=b"one\ntwo\x01x", guest="asks and reads", says=b"x")
    assert (done.status, done.err) == (0, "")
    assert replies.read_bytes() == b"one\ntwo\x01x"


def test_a_closed_stdin_and_dev_null_are_no_input(image, replies):
    for stdin in ("<&-", "</dev/null"):
        line = f'exec "$@" {stdin}'
        done = subprocess.run(
            ["sh", "-c", line, "sh", *command(image, guest="asks and reads", says=b"x\n")],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"x\n")
        assert replies.read_bytes() == b""


def test_a_closed_stdout_ends_the_run_quietly(image):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            command(image, guest="hangs", says=b"x"),
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_disk_is_told(image):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(image, guest="hangs", says=b"x"),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"pagegate: No space left on device\n")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_a_pipe(image, number, status):
    process = subprocess.Popen(
        command(image, guest="hangs", says=b"ready"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(5) == b"ready"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert b"Traceback" not in err


def test_run_names_boot(image, policy):
    file = policy("policy = policies.Allow()\n")
    done = subprocess.run(
        program("run", "-p", file, image),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"`pagegate boot {image}`" in done.stderr
