"""The command line: output and exit statuses."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from pagegate.demo import guest as demo_guest
from pagegate.demo import policy as demo_policy

IMPORTS = "from pagegate import *\n"


def pagegate(*arguments, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pagegate", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture
def judge(tmp_path):
    """Runs the demo with this policy."""

    def judge(text, *arguments, name="", **environment):
        path = tmp_path / "mine.py"
        path.write_text(IMPORTS + textwrap.dedent(text))
        return pagegate("demo", "-p", f"{path}{name}", *arguments, **environment)

    return judge


def test_it_runs_as_a_module():
    done = pagegate("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pagegate ")


def test_a_usage_error_is_2():
    assert pagegate("demo", "--policy", "/nonexistent:Mine").returncode == 2
    assert pagegate("demo", "-p", "/").returncode == 2


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("", (), "has several policies, name one:\n  mine.py:A\n  mine.py:B\n"),
        (":C", (), "mine.py has no C: there are A and B\n"),
        (":A", ("-o", "m=1"), "A has no option m: it takes n\n"),
        (":A", ("-o", "n=x"), "option n (int) cannot be 'x': "),
        (":B", ("-o", "n=1"), "B has no option n: it takes none\n"),
    ],
)
@pytest.mark.parametrize("command", [("run", "--guest", "demo"), ("boot", "/dev/null")])
def test_what_is_named_wrongly_is_a_usage_error(tmp_path, command, name, arguments, said):
    path = tmp_path / "mine.py"
    path.write_text(f"{IMPORTS}class A(Policy):\n  def __init__(self, n: int = 0): pass\nclass B(Policy): pass\n")
    done = pagegate(*command, "-p", f"{path}{name}", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_the_only_policy_of_a_file_is_named(tmp_path):
    path = tmp_path / "mine.py"
    for text, said in (("class A(Policy): pass\n", "there is A"), ("", "there is no policy at all")):
        path.write_text(IMPORTS + text)
        done = pagegate("demo", "-p", f"{path}:C")
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"Error: {path} has no C: {said}")


@pytest.mark.parametrize("command", ["demo", "resume", "boot", "run"])
def test_one_policy_is_taken(tmp_path, command):
    arguments = {"resume": (tmp_path,), "boot": ("/dev/null",), "run": ("--guest", "demo")}.get(command, ())
    done = pagegate(command, *arguments, "-p", "Allow", "-p", "DenyAll")
    assert done.returncode == 2
    assert "one policy judges, and 2 are given" in done.stderr


def test_the_bundled_policy_knows_the_guest_s_ring():
    assert demo_policy.RING.start == demo_guest._RING
    assert len(demo_policy.RING) == demo_guest._RING_PAGES * 4096


def test_a_file_that_fails_is_one_sentence(judge):
    done = judge("raise SystemExit(5)")
    assert done.returncode == 1
    assert re.fullmatch(r"pagegate: \S+mine.py, line 2, cannot be loaded: SystemExit: 5\n", done.stderr)


@pytest.mark.kvm
def test_the_demo_shows_both_kinds_allowed_denied_and_widened():
    done = pagegate("demo", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    events = told["events"]
    assert {event["kind"] for event in events} == {"implicit", "explicit", "malformed"}
    assert {event["outcome"] for event in events} == {"converted", "denied", "refused"}
    widened = [event for event in events if event["done_size"] > event["size"]]
    assert widened
    assert all(event["gpa"] in demo_policy.RING for event in widened)
    # Malformed ones are no requests.
    refused = told["outcomes"].pop("refused")
    assert sum(told["outcomes"].values()) == told["requests"] == len(events) - refused
    assert told["guest_failures"] == []


@pytest.mark.kvm
def test_the_counts_of_the_demo_add_up():
    done = pagegate("demo")
    assert (done.returncode, done.stderr) == (0, "")
    asked = re.search(r"asked +(\d+) times: (\d+) implicit, (\d+) explicit", done.stdout)
    decided = re.search(r"decided +(.*)", done.stdout)
    assert int(asked[1]) == int(asked[2]) + int(asked[3])
    assert int(asked[1]) == sum(int(number) for number in re.findall(r"\d+", decided[1]))


@pytest.mark.kvm
def test_widening_on_the_heap_loses_the_neighbours_bytes():
    """The bundled guest's checks find a policy that widens requests into pages that hold data."""
    from pagegate import Convert, Vm

    class Widen:
        def memory_fault(self, fault):
            return Convert() if fault.private else Convert(gpa=fault.gpa & ~0xFFFF, size=0x10000)

    guest = demo_guest.build("doorbell")
    with Vm(demo_guest.MEMORY, policy=Widen(), shared_bit=demo_guest.SHARED_BIT, initial="private") as vm:
        vm.on_io(demo_guest.PHASE_PORT, lambda io: None)
        guest.script.start(vm)
        assert vm.run(timeout=60.0).reason == "halt"
        failures = guest.failures(vm, bundled=True)
        assert guest.failures(vm, bundled=False) == []
    assert any("before the lone shared page" in failure for failure in failures)
    assert any("after the lone shared page" in failure for failure in failures)


@pytest.mark.kvm
@pytest.mark.parametrize(
    "text",
    [
        "policy = policies.Allow()",
        "policy = policies.Align(0x10000)",
        "def map_gpa_range(call): return Deny(11)",
        "class A(Policy): pass\nclass B(A):\n  def map_gpa_range(self, call): return Retry()",
    ],
)
def test_other_policies_are_not_judged_by_the_bundled_one_s_results(judge, text):
    done = judge(text)
    assert (done.returncode, done.stderr) == (0, "")
    assert "RAX" not in done.stdout


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("policy = policies.ExplicitOnly()", "pagegate: the policy denied what the guest had touched"),
        ("def map_gpa_range(call): return Stop('enough')", "pagegate: the policy stopped the run at a request.*enough"),
        ("def map_gpa_range(call): return Stop('halt')", "pagegate: the policy stopped the run at a request.*halt"),
        ("def memory_fault(fault): return Retry()", "pagegate: .*(same fault|livelock|again)"),
    ],
)
def test_other_ends_of_the_run_are_reported(judge, text, said):
    done = judge(text)
    assert done.returncode == 1
    assert re.match(said, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
@pytest.mark.parametrize("json_", [(), ("--json",)])
def test_an_exception_of_a_hook_shows_the_file_alone(judge, json_):
    done = judge(
        """
        import json
        def inner(): return json.loads("{")
        def map_gpa_range(call): return inner()
        """,
        *json_,
    )
    assert done.returncode == 1
    assert set(re.findall(r'File "(.*?)"', done.stderr)) == set(re.findall(r'"(/\S+mine.py)"', done.stderr))
    assert len(re.findall(r"mine.py", done.stderr)) == 2
    assert "JSONDecodeError" in done.stderr
    assert "vCPU 0" in done.stderr
    assert "click" not in done.stderr


@pytest.mark.kvm
@pytest.mark.parametrize("error", ["SystemExit(0)", "OSError(28, 'full')"])
def test_the_status_after_a_hook_that_exits_or_fails(judge, error):
    done = judge(f"def map_gpa_range(call): raise {error}")
    assert done.returncode == 1
    assert "mine.py" in done.stderr
    assert error.partition("(")[0] in done.stderr


@pytest.mark.kvm
def test_an_answer_that_is_no_decision_is_reported_with_its_notes(judge):
    done = judge("def map_gpa_range(call): return 7")
    assert done.returncode == 1
    assert done.stderr.startswith("pagegate: ")
    assert "Traceback" not in done.stderr


@pytest.mark.kvm
def test_ctrl_c_is_130(judge):
    assert judge("def map_gpa_range(call): raise KeyboardInterrupt").returncode == 130


@pytest.mark.kvm
def test_a_name_picks_one_of_several(judge):
    text = "class A(Policy): pass\nclass B(Policy):\n  def map_gpa_range(self, call): return Stop('it was B')\n"
    assert judge(text, name=":A").returncode == 0
    assert "it was B" in judge(text, name=":B").stderr


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("demo",), ("demo", "--json"), ("doctor",), ("--help",)])
def test_a_full_disk_is_one_sentence(arguments):
    with open("/dev/full", "w") as full:
        done = pagegate(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr == "pagegate: No space left on device\n"


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("demo",), ("demo", "--json"), ("doctor",), ("--help",)])
def test_a_closed_pipe_is_quiet(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = pagegate(*arguments, stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.kvm
def test_an_encoding_that_lacks_the_characters():
    done = pagegate("demo", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.kvm
def test_on_a_terminal_the_pauses_do_not_count(tmp_path):
    done = subprocess.run(
        ["script", "-qec", f"{sys.executable} -m pagegate demo", "/dev/null"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
    )
    assert done.returncode == 0
    ended = re.search(r"halt after (\d+\.\d+) s, the demo's pauses not counted", done.stdout)
    assert float(ended[1]) < 0.4 * len(demo_guest.PHASES)


def test_a_host_without_kvm_gets_its_problem_and_nothing_else(monkeypatch):
    doctor = importlib.import_module("pagegate.cli.doctor")
    host = SimpleNamespace(enforcement=None, problems=["there is no /dev/kvm: load kvm_amd"])
    monkeypatch.setattr(doctor, "probe", lambda: host)
    runner = CliRunner()
    with runner.isolation() as streams:
        assert doctor.doctor.main([], standalone_mode=False) == 3
        assert streams[0].getvalue().decode() == "! There is no /dev/kvm: load kvm_amd.\n"


def test_the_testbed_without_a_home(monkeypatch):
    from pathlib import Path

    from pagegate import TestbedError
    from pagegate.testbed import kernel

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(kernel.KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(TestbedError, match="set XDG_CACHE_HOME"):
        kernel.cache_directory()
    with pytest.raises(TestbedError, match="has no kernel"):
        kernel.find_kernel()


def test_the_testbed_s_cache_that_cannot_be_used(tmp_path, monkeypatch):
    from pagegate import TestbedError
    from pagegate.testbed import builder, kernel
    from pagegate.testbed.progress import Silent

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv(kernel.KERNEL_VARIABLE, raising=False)
    with pytest.raises(TestbedError, match="has no kernel"):
        kernel.find_kernel()
    with pytest.raises(TestbedError, match="set XDG_CACHE_HOME"), builder.locked(Silent()):
        pass

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(kernel.cache_directory()))

    monkeypatch.setattr("pathlib.Path.glob", refuse)
    with pytest.raises(TestbedError, match="has no kernel"):
        kernel.find_kernel()


def test_an_error_elsewhere_is_not_the_cache_s(tmp_path, monkeypatch):
    from pagegate.testbed import kernel

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError), kernel.cache_errors():
        (tmp_path / "other").read_text()


@pytest.mark.kvm
def test_conversions_are_named_narrowed_or_widened(judge):
    narrowed = judge("def map_gpa_range(call): return Convert(gpa=call.gpa, size=4096)")
    assert "(narrowed)" in narrowed.stdout
    assert "(widened)" not in narrowed.stdout
    failed = judge("def map_gpa_range(call): return 1 / 0")
    assert "→ failed  " in failed.stdout
    assert "(widened)" not in failed.stdout
