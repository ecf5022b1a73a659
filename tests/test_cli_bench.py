"""`pagegate bench`: output and exit statuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pagegate import workload
from pagegate._core import bare_loop
from pagegate.guests import Script

from .cli_parts import policy, program

__all__ = ["policy"]

BENCHES = Path(__file__).parent.parent / "benches"

KEYS = {
    *("enforcement", "kind", "policy", "vcpus", "pages", "touch", "requests", "seconds", "ns_per_request"),
    *("requests_per_second", "bytes_per_second", "latency"),
}


def bench(*arguments):
    return subprocess.run(program("bench", *arguments), capture_output=True, text=True, timeout=100, check=False)


def measured(*arguments):
    done = bench("--json", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "nobody"), "there is no file nobody"),
        (("--requests", "0"), "--requests"),
        (("--pages", "0"), "--pages"),
        (("--vcpus", "0"), "--vcpus"),
        (("--kind", "both"), "--kind"),
        (("--kind", "implicit", "--pages", "3"), "power of two"),
        (("-o", "limit=3"), "--policy allow takes no -o"),
    ],
)
def test_a_usage_error_is_2(arguments, said):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--requests", "1", "--vcpus", "2"), "too few for 2 vCPUs"),
        (("--vcpus", 400, "--requests", 400), "does not fit"),
        (("--touch", "--pages", 1 << 18), "more than a GiB"),
        (("--kind", "implicit", "--pages", 1 << 18), "more than a GiB"),
    ],
)
def test_options_that_no_machine_can_have_are_a_usage_error(arguments, said):
    done = bench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.kvm
@pytest.mark.parametrize("kind", ["explicit", "implicit"])
@pytest.mark.parametrize("options", [(), ("--touch",), ("--pages", 4, "--touch"), ("--vcpus", 2)])
def test_the_numbers_are_one_measurement(kind, options):
    told = measured("--requests", 101, "--kind", kind, *options)
    assert set(told) == KEYS
    assert (told["kind"], told["policy"], told["requests"]) == (kind, "allow", 101)
    assert told["vcpus"] == (2 if "--vcpus" in options else 1)
    assert told["pages"] == (4 if "--pages" in options else 1)
    assert told["seconds"] > 0
    assert told["ns_per_request"] == pytest.approx(told["seconds"] * 1e9 / 101)
    assert told["requests_per_second"] == pytest.approx(101 / told["seconds"])
    assert told["bytes_per_second"] == pytest.approx(101 * 4096 * told["pages"] / told["seconds"])


@pytest.mark.kvm
def test_start_up_is_not_timed(policy):
    slow = policy(
        "import time\n"
        "class Slow(Policy):\n"
        "  def __init__(self): time.sleep(1.5)\n"
        "  def map_gpa_range(self, call):\n"
        "    if not hasattr(self, 'asked'): time.sleep(1.5)\n"
        "    self.asked = True\n"
        "    return Convert()\n"
    )
    assert measured("--requests", 1, "--policy", slow)["seconds"] < 1


@pytest.mark.kvm
@pytest.mark.parametrize(("kind", "options"), [("explicit", ()), ("implicit", ()), ("implicit", ("--pages", 2))])
def test_comparison_with_the_bare_loop(kind, options):
    told = measured("--requests", 100, "--kind", kind, "--compare", *options)
    assert set(told) == KEYS | {"bare", "ratio"}
    assert told["bare"]["ns_per_request"] == pytest.approx(told["bare"]["seconds"] * 1e9 / 100)
    assert told["ratio"] == pytest.approx(told["seconds"] / told["bare"]["seconds"])
    assert re.search(r"bare loop .* times as long under pagegate", bench("--requests", 100, "--compare").stdout)


@pytest.mark.kvm
def test_a_users_policy_is_asked(policy):
    file = policy(
        "from pathlib import Path\n"
        "class Mine(Policy):\n"
        "  def map_gpa_range(self, call):\n"
        f"    with open({str(policy('').with_suffix('.log'))!r}, 'a') as log: log.write('asked\\n')\n"
        "    return Convert()\n"
    )
    told = measured("--policy", f"{file}:Mine", "--requests", 40)
    assert told["policy"] == f"{file}:Mine"
    # All 16 buffers had been made private and shared once before the measurement.
    assert file.with_suffix(".log").read_text().count("asked") == 40 + 32


@pytest.mark.kvm
def test_a_policy_that_denies_is_measured(policy):
    file = policy("policy = policies.DenyAll()\n")
    done = bench("--json", "--policy", file, "--requests", 40)
    told = json.loads(done.stdout)
    assert (told["requests"], told["bytes_per_second"]) == (40, 0)
    assert done.stderr == "pagegate: 72 of 72 requests converted nothing\n"
    assert "and the bare loop converts for each" in bench("--compare", "--policy", file, "--requests", 40).stderr


@pytest.mark.kvm
def test_a_policy_gets_its_options(policy):
    file = policy("class Mine(Policy):\n  def __init__(self, grow: int):\n    assert grow == 3\n")
    assert measured("--policy", file, "-o", "grow=3", "--requests", 4)["requests"] == 4
    assert "-o grow=VALUE" in bench("--policy", file).stderr


@pytest.mark.kvm
def test_latencies_are_of_what_is_timed(policy):
    file = policy(
        "import time\n"
        "class Mine(Policy):\n"
        "  count = 0\n"
        "  def map_gpa_range(self, call):\n"
        "    self.count += 1\n"
        "    time.sleep({5: 0.5, 33: 0.1}.get(self.count, 0))\n"
        "    return Convert()\n"
    )
    told = measured("--policy", file, "--requests", 3)
    assert 0.1e9 <= told["latency"]["max"] < 0.5e9
    assert told["latency"]["p50"] <= told["latency"]["p90"] <= told["latency"]["p99"] <= told["latency"]["max"]


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class A(Policy):\n  def memory_fault(self, fault): return Deny()\n", "ended with 'denied'"),
        ("class A(Policy):\n  def memory_fault(self, fault): return Stop('enough')\n", "ended with 'enough'"),
        ("class A(Policy):\n  def memory_fault(self, fault): raise KeyError('mine')\n", "KeyError: 'mine'"),
        (
            "class A(Policy):\n  def memory_fault(self, fault): return Convert() if fault.repeats else Retry()\n",
            "measures something else",
        ),
    ],
)
def test_values_that_were_not_measured_have_no_number(policy, text, said):
    done = bench("--kind", "implicit", "--policy", policy(text), "--requests", 40)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr


@pytest.mark.kvm
def test_the_output_as_text():
    done = bench("--requests", 100, "--policy", "python", "--touch")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"100 explicit requests of 1 page, touched, 1 vCPU, (attributes|memslots), python\n", done.stdout)
    assert "µs" in done.stdout


def test_the_bare_loop_needs_two_views_for_traps():
    machine = {"memory": 8 << 20, "vcpus": [(0x1000, b"\xf4", 0)], "enforcement": "traps", "marks": 0x0F00}
    with pytest.raises(ValueError, match="cannot run such a machine"):
        bare_loop(**machine)


def test_a_host_without_kvm_is_3():
    code = (
        "import pagegate, types, sys\n"
        "from pagegate.cli import bench, main\n"
        "bench.probe = lambda: types.SimpleNamespace(enforcement=None, problems=['there is no /dev/kvm'])\n"
        "sys.argv = ['pagegate', 'bench']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "there is no /dev/kvm" in done.stderr


@pytest.mark.userfault
@pytest.mark.skipif(not os.access("/dev/kvm", os.W_OK), reason="no /dev/kvm")
def test_the_bare_loops_pages_come_from_a_process(tmp_path):
    script = Script()
    script.out(workload.MARKS, workload.BEGIN)
    script.dirty(0x20_0000, 40, 3 * 4096)
    script.out(workload.MARKS, workload.END)
    image, table = script.image()
    machine = {
        "memory": 8 << 20,
        "vcpus": [(0x1000, image, table)],
        "enforcement": "memslots",
        "marks": workload.MARKS,
        "timeout": 60,
    }
    file = tmp_path / "memory"
    file.write_bytes(bytes(8 << 20))
    served = [sys.executable, str(BENCHES / "handler.py"), str(file)]
    nanoseconds, requests, exits = bare_loop(**machine, pager=served)
    assert (nanoseconds > 0, requests, exits) == (True, 0, 0)
    with pytest.raises(OSError, match="the bare loop"):
        bare_loop(**machine, pager=[sys.executable, "-c", ""])
