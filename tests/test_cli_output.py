"""What commands print: at terminals of several widths, in a pipe, under NO_COLOR, and at the end of any run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios

import pagegate
import pytest

from .boot_parts import command, write_kernel
from .cli_parts import image, policy, program

__all__ = ["image", "policy"]

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WORDS = (
    "implicit",
    "explicit",
    "converted",
    "denied",
    "private",
    "shared",
    "malformed",
    "resident",
    "latency",
    "asked",
)
FOREVER = b"\xeb\xfe"
DOORBELL = b"\x31\xdb\xb9\x01\x00\x00\x00\xba\x10\x00\x00\x00\xb8\x0c\x00\x00\x00\xe6" + bytes([pagegate.DOORBELL_PORT])
SAY = b"\xb0x\xe6\xe9"  # mov al, 'x'; out 0xe9, al


def at_terminal(width, arguments, *, interrupt_after=None, **environment):
    """Runs it at a terminal of this width. Returns the status and what was printed, with the escapes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        arguments,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**given, "TERM": "xterm-256color", **environment},
        start_new_session=True,
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # its last process has ended
            break
        printed += data
        if interrupt_after is not None and interrupt_after in printed:
            process.send_signal(signal.SIGINT)
            interrupt_after = None
    os.close(ours)
    return process.wait(timeout=60), printed.decode().replace("\r\n", "\n")


def run(*arguments, **options):
    done = subprocess.run(
        program(*arguments),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


def broken_words(text):
    """Words of a request's line or the summary that a line break is in."""
    joined = {f"{word[:at]}\n{word[at:]}" for word in WORDS for at in range(1, len(word))}
    return [word for word in joined if re.search(re.escape(word).replace(r"\n", r"\n *"), text)]


@pytest.mark.kvm
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("arguments", [("demo",), ("run", "-v", "--guest", "demo")], ids=["demo", "run"])
def test_it_fits_the_terminal(width, arguments, policy):
    status, printed = at_terminal(width, program(*arguments, *(["-p", policy()] if arguments[0] == "run" else [])))
    assert status == 0, printed
    plain = ESCAPE.sub("", printed)
    ours = [line for line in plain.splitlines() if re.match(r" *(explicit|implicit|asked|decided|0 [█░▒]|\d\. )", line)]
    assert len(ours) > 10
    assert max(map(len, ours)) <= width
    assert broken_words(plain) == []
    assert any(re.fullmatch(r"0 [█░▒]+ 64 MiB", line) for line in ours), "the strip is on one line"


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("demo",), ("run", "-v", "--guest", "touch"), ("doctor",)], ids=lambda a: a[0])
def test_no_color_means_plain(arguments, policy):
    given = program(*arguments, *(["-p", policy()] if arguments[0] == "run" else []))
    assert re.search(r"\x1b\[[0-9;]*m", at_terminal(80, given)[1])
    status, printed = at_terminal(80, given, NO_COLOR="1")
    assert status == 0
    assert not re.search(r"\x1b\[[0-9;]*m", printed)


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("demo",), ("run", "--guest", "demo"), ("doctor",)], ids=lambda a: a[0])
def test_a_pipe_gets_no_blanks_and_no_escapes(arguments, policy):
    status, out, _ = run(*arguments, *(["-p", policy()] if arguments[0] == "run" else []))
    assert status == 0
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    assert "\x1b" not in out


@pytest.mark.kvm
def test_each_request_is_printed_as_it_comes(policy):
    status, out, err = run("run", "-v", "-p", policy(), "--guest", "touch", "--json")
    assert status == 0
    told = json.loads(out)
    lines = [line for line in err.splitlines() if re.match(r"  implicit 0x\w+ \+ 4 KiB +to \w+ +→ converted  ", line)]
    assert len(lines) == told["requests"] > 200


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("demo",), ("run", "-v", "--guest", "demo")], ids=["demo", "run"])
def test_requests_stand_below_the_step_that_they_belong_to(policy, arguments):
    status, printed = at_terminal(200, program(*arguments, "-p", policy()))
    assert status == 0
    # The demo writes its strip again and again on one line.
    plain = ESCAPE.sub("", printed).replace("\r", "\n")
    steps = re.split(r"^(?=\d\. )", plain, flags=re.MULTILINE)
    below = {step[0]: re.findall(r"^  (\w+) (0x\w+)", step, flags=re.MULTILINE) for step in steps if step[0].isdigit()}
    assert below["1"] == []
    assert below["2"] == [("explicit", "0x01400000")]
    assert below["3"] == [("explicit", "0x00800000")]
    assert [kind for kind, _ in below["4"]] == ["malformed"]
    assert {kind for kind, _ in below["5"]} == {"implicit"}
    assert {gpa for _, gpa in below["6"]} == {"0x02814000"}


@pytest.mark.kvm
def test_a_run_in_a_terminal_shows_that_it_lives(policy, image):
    status, printed = at_terminal(200, program("run", "-p", policy(), "--timeout", "2.5", image(FOREVER)))
    assert status == 0
    assert re.search(r"mine.py judges 64 MiB, 1 vCPU, by \w+\n", printed)
    assert "1 s: nothing new was asked for" in ESCAPE.sub("", printed)


@pytest.mark.kvm
def test_a_run_that_asks_for_nothing_has_no_empty_rows(policy, image):
    _, out, _ = run("run", "-p", policy(), image(b"\xf4"))
    rows = [line for line in out.splitlines() if re.match(r"[a-z]", line)]
    assert [row.split(maxsplit=1)[0] for row in rows] == ["asked", "done", "resident", "ended", "at"]
    assert rows[0].split() == ["asked", "nothing"]
    assert "1 times" not in run("run", "-p", policy(), image(DOORBELL + b"\xf4"))[1]


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("code", "text", "arguments", "status", "ended"),
    [
        (FOREVER, "", ("--timeout", "1"), 0, "timeout after"),
        (b"\x0f\x0b", "", (), 1, "shutdown after"),
        (DOORBELL + FOREVER, "def map_gpa_range(call): return Stop('enough')\n", (), 1, "enough after"),
    ],
)
def test_however_it_ends_the_summary_says_where_the_vcpus_were(policy, image, code, text, arguments, status, ended):
    text = text or "policy = policies.Allow()\n"
    got, out, err = run("run", "-p", policy(text), *arguments, image(code))
    assert (got, ended in out) == (status, True), (out, err)
    assert re.search(r"^at +vCPU 0 at rip 0x\w+", out, re.MULTILINE)


@pytest.mark.kvm
def test_after_ctrl_c_the_summary_follows(policy, image):
    given = program("run", "-p", policy(), "--vcpus", 2, image(SAY + DOORBELL + FOREVER))
    status, printed = at_terminal(80, given, interrupt_after=b"x")
    plain = ESCAPE.sub("", printed)
    assert status == 130, plain
    assert "stopped after" in plain
    assert re.search(r"^at +vCPU 0 at rip 0x10\w\w", plain, re.MULTILINE)
    assert re.search(r"^ +vCPU 1 at rip 0x10\w\w", plain, re.MULTILINE)
    assert plain.endswith("interrupted\n")


def test_ctrl_c_at_a_boot_in_a_pipe_is_followed_by_the_summary(tmp_path):
    process = subprocess.Popen(
        command(write_kernel(tmp_path), guest="hangs", says=b"ready"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.read(5) == b"ready"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"interrupted\n")
    assert b"it was ended by Ctrl-C" in out
    assert re.search(rb"^at +vCPU 0 at rip 0x", out, re.MULTILINE)


def test_a_boot_prints_each_request(tmp_path):
    done = subprocess.run(
        command(write_kernel(tmp_path), "-v", guest="asks"), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"pagegate:   (explicit|implicit)", done.stderr) == ["explicit", "explicit", "implicit"]
    assert "and 1 malformed, which no policy saw" in done.stdout


def test_the_version_names_what_it_runs_on():
    status, out, _ = run("--version")
    assert status == 0
    assert out.startswith(f"pagegate {pagegate.__version__}\n")
    host = pagegate.probe()
    assert f"enforcement: {host.enforcement or 'none'}\n" in out
    assert all(kind in out for kind in host.vm_types)
    assert os.uname().release in out
