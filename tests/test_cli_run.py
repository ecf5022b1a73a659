"""`pagegate run`: output and exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pagegate
import pytest

from .cli_parts import image, policy, program

__all__ = ["image", "policy"]

HELLO = b"".join(bytes([0xB0, each, 0xE6, 0xE9]) for each in b"hello") + b"\xf4"  # mov al, x; out 0xe9, al; hlt
SERIAL = b"\x66\xba\xf8\x03\xb0\x21\xee\xf4"  # mov dx, 0x3f8; mov al, '!'; out dx, al; hlt
FOREVER = b"\xeb\xfe"
DOORBELL = b"\x31\xdb\xb9\x01\x00\x00\x00\xba\x10\x00\x00\x00\xb8\x0c\x00\x00\x00\xe6" + bytes([pagegate.DOORBELL_PORT])


def command(*arguments):
    return program("run", *arguments)


def run(*arguments, stdout=subprocess.PIPE):
    return subprocess.run(
        command(*arguments), stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=100, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "either an IMAGE or another guest"),
        (
            ("--guest", "nobody"),
            "there is no guest 'nobody'; name a file FILE.py, or one of.*demo.*touch.*explicit.*pingpong",
        ),
        (("--guest", "touch", "/bin/true"), "either an IMAGE"),
        (("--guest", "touch", "--memory", "63K"), "63K is no positive multiple of 4096"),
        (("--guest", "touch", "--memory", "1M"), "raise --memory"),
        (("--guest", "demo", "--vcpus", "2"), "one vCPU"),
        (("--guest", "demo", "--shared-bit", "40"), "shared bit 35"),
        (("--guest", "touch", "--vcpus", "0"), "--vcpus"),
        (("--guest", "touch", "--timeout", "0"), "--timeout"),
        (("--guest", "touch", "-o", "limit"), "is no KEY=VALUE"),
        (("--guest", "touch", "-o", "a=1", "-o", "a=2"), "a is given twice"),
        (("/nonexistent",), "/nonexistent"),
    ],
)
def test_a_usage_error_is_2(policy, arguments, said):
    import re

    done = run("-p", policy(), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(said, done.stderr, re.DOTALL), done.stderr


def test_a_missing_policy_is_2():
    assert run("-p", "/nonexistent.py", "--guest", "touch").returncode == 2


@pytest.mark.parametrize(
    ("text", "options", "status", "said"),
    [
        ("class A(Policy):\n  def memory_falt(self, fault): pass\n", (), 1, "did you mean memory_fault"),
        ("class A(Policy):\n  def memory_fault(self): pass\n", (), 1, "exactly one argument"),
        ("class A(Policy):\n  def __init__(self, limit: int = 1): pass\n", ("-o", "limt=1"), 2, "did you mean limit"),
        ("class A(Policy):\n  def __init__(self, limit: int): pass\n", (), 2, "needs the option limit"),
    ],
)
def test_a_wrong_policy_is_one_sentence_before_the_guest(policy, text, options, status, said):
    done = run("-p", policy(text), "--guest", "touch", *options)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    # A usage error has two lines more, which name the help, and an empty one.
    assert done.stderr.count("\n") == (1 if status == 1 else 4)


@pytest.mark.kvm
@pytest.mark.parametrize(("guest", "vcpus"), [("demo", 1), ("touch", 2), ("explicit", 2), ("pingpong", 1)])
def test_a_bundled_guest_halts(policy, guest, vcpus):
    done = run("-p", policy(), "--guest", guest, "--vcpus", vcpus, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["reason"] == "halt"
    assert told["requests"] == told["faults"] + told["hypercalls"] > 0
    keys = ("conversions", "denied", "retries", "bytes_to_private", "bytes_to_shared", "seconds", "enforcement", "map")
    assert set(keys) < set(told)
    assert set(told["latency"]) == {"p50", "p90", "p99", "max"}


@pytest.mark.kvm
def test_an_image_prints_and_the_summary_follows(policy, image):
    done = run("-p", policy(), image(HELLO))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hello\n")
    assert "ended     halt" in done.stdout
    done = run("-p", policy(), image(SERIAL), "--json")
    assert (done.returncode, done.stderr) == (0, "!\n")
    assert json.loads(done.stdout)["reason"] == "halt"


@pytest.mark.kvm
def test_the_status_says_how_the_run_ended(policy, image):
    assert run("-p", policy(), image(FOREVER), "--timeout", "3").returncode == 0
    assert run("-p", policy(), image(b"\x0f\x0b")).returncode == 1
    done = run("-p", policy("policy = policies.ExplicitOnly()\n"), "--guest", "touch")
    assert done.returncode == 1
    assert "the policy denied" in done.stderr
    stopping = "def map_gpa_range(call): return Stop('timeout')\n"
    assert run("-p", policy(stopping), image(DOORBELL + b"\xf4")).returncode == 1


@pytest.mark.kvm
def test_a_call_that_takes_too_long_is_1_with_its_place(policy, image):
    file = policy("import time\ndef map_gpa_range(call):\n    while True: time.sleep(0.01)\n    return Convert()\n")
    done = run("-p", file, "--policy-timeout", "0.2", image(DOORBELL + b"\xf4"))
    assert (done.returncode, "ended     failed after" in done.stdout) == (1, True)
    assert f'File "{file}", line 4, in map_gpa_range' in done.stderr
    assert "longer than policy_timeout" in done.stderr
    slow = policy("import time\ndef map_gpa_range(call):\n    time.sleep(0.2)\n    return Convert()\n")
    assert run("-p", slow, "--policy-timeout", "60", image(DOORBELL + b"\xf4")).returncode == 0


@pytest.mark.kvm
def test_an_image_that_is_too_large_is_2(policy, image):
    done = run("-p", policy(), image(bytes(1 << 20)), "--memory", "1M")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
@pytest.mark.parametrize(("memory", "cells"), [("64K", 16), (str((64 << 20) + 4096), 64)])
def test_the_map_of_memory_of_any_size(policy, image, memory, cells):
    done = run("-p", policy(), "--memory", memory, image(HELLO))
    assert (done.returncode, done.stderr) == (0, "")
    strip = next(line for line in done.stdout.splitlines() if line.startswith("0 "))
    assert strip.split()[1] == "░" * cells


@pytest.mark.kvm
def test_ctrl_c_is_130(policy, image):
    process = subprocess.Popen(
        command("-p", policy(), image(HELLO[:-1] + FOREVER)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(5) == b"hello"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.strip()) == (130, b"interrupted")


@pytest.mark.kvm
def test_a_closed_pipe_is_quiet(policy, image):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = run("-p", policy(), image(HELLO), stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.kvm
def test_watch_changes_the_policy_in_a_run(policy, image):
    path = policy()

    def change(text):
        # By rename, so that the watcher never reads half a file.
        other = path.with_name("other.py")
        other.write_text("from pagegate import Stop\n" + text)
        other.replace(path)

    loop = b"\xeb" + bytes([256 - len(DOORBELL) - 2])
    process = subprocess.Popen(
        command("-p", path, "--watch", "--timeout", "60", image(HELLO[:-1] + DOORBELL + loop)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(5) == "hello"
    change("class\n")
    assert "the policy in force stays" in process.stderr.readline()
    change("from pagegate import Policy\nclass A(Policy): pass\nclass B(Policy): pass\n")
    told = process.stderr.readline()
    assert f"{path} has several policies, name one: {path.name}:A {path.name}:B; the policy in force stays" in told
    assert "UsageError" not in told
    change("def map_gpa_range(call): return Stop('changed')\n")
    assert "was loaded again" in process.stderr.readline()
    assert "changed" in process.communicate(timeout=30)[1]
    assert process.returncode == 1


NEW = "from pagegate.guests import Script\n"
SCRIPT = """
from pagegate.guests import Script
script = Script()
script.map(0x20_0000, 4096, to="private")
script.out(0xE9, ord("!"))
"""
EACH = """
from pagegate.guests import Script
def script(vcpu, shared):
    made = Script()
    made.touch(shared | 0x80_0000 + vcpu * 4096, 1)
    return made
"""


@pytest.mark.kvm
def test_a_script_runs_from_the_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SCRIPT)
    done = run("--guest", file)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("!\n")
    assert "asked     once: 1 explicit by" in done.stdout
    file.write_text(EACH)
    done = run("--guest", file, "--vcpus", 3, "--json")
    assert (done.returncode, json.loads(done.stdout)["faults"]) == (0, 3)
    file.write_text(SCRIPT + "other = script\nscript = [script, Script()]\n")
    assert json.loads(run("--guest", f"{file}:other", "--json").stdout)["requests"] == 1
    assert json.loads(run("--guest", file, "--vcpus", 2, "--json").stdout)["requests"] == 1


@pytest.mark.kvm
def test_the_image_of_a_script_is_refused_with_the_reason(image):
    from pagegate.guests import Script

    done = run(image(Script().image()[0]))
    assert done.returncode == 2
    assert "--guest FILE.py" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NEW + "Script().fil(0, 8, 1)\n", "a Script has no operation fil: did you mean fill?"),
        ("x = 1\n", "has no guest, which is a Script"),
        ("script = 3\n", "script is 3: a guest is a Script"),
        ("def script(cpu): pass\n", "script() wants cpu, and is given vcpu, shared, call"),
        (NEW + "a, b = Script(), Script()\n", "has several guests, name one:\n  mine.py:a\n  mine.py:b"),
        (SCRIPT + "script.barrier(64, 2)\nscript.barrier(64, 2)\n", "address 0x40 is operation 2's, a barrier, too"),
        (SCRIPT + "script.loop(7, 2)\n", "to is 7: a loop goes back"),
    ],
)  # fmt: skip
def test_a_wrong_script_is_told(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    done = run("--guest", file)
    # What is named wrongly is a usage error.
    assert done.returncode == (2 if "name one" in said else 1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_jump_to_no_operation_is_an_error():
    from pagegate.guests import Script

    script = Script()
    script.goto_unless(0x8000, 1, 5)
    with pytest.raises(ValueError, match="operation 0, goto_unless, goes to 5: the last is 1"):
        script.image()


@pytest.mark.kvm
def test_what_is_no_image_is_not_run(tmp_path):
    for name, said in ("empty", "empty is empty"), ("mine.py", "is a Python file: name a policy with -p"):
        (tmp_path / name).touch()
        done = run(tmp_path / name)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.kvm
def test_an_answer_that_does_not_help_the_guest_is_named(policy):
    useless = policy(
        "from pagegate import Convert, Policy\n\nclass P(Policy):\n    def memory_fault(self, fault):\n"
        "        return Convert(gpa=0x10_0000, size=4096)\n"
    )
    done = run("-p", useless, "--guest", "touch")
    assert done.returncode == 1
    assert "the policy converted 0x100000 + 4 KiB to shared, which is not what the guest needs" in done.stderr
