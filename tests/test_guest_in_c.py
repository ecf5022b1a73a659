"""The guest in C of the examples: it is built as its text says, and runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pagegate
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "guest_in_c"
DENY = "from pagegate import Deny\ndef map_gpa_range(call): return Deny(11)\n"


def how_to_build():
    """The command in the text of the example."""
    text = (FOLDER / "buffer.c").read_text()
    command = re.search(r"\* +(cc .*?-o buffer buffer\.c)", text, re.DOTALL)[1]
    return " ".join(command.replace("\\", "").replace("*", "").split())


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("c")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    done = subprocess.run(
        [*shlex.split(how_to_build()), "-Werror"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "buffer"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pagegate", "run", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return json.loads(done.stdout), done.stderr


def test_the_header_has_pagegates_port():
    assert f"#define PAGEGATE_DOORBELL {pagegate.DOORBELL_PORT:#x}\n" in (FOLDER / "pagegate.h").read_text()


@pytest.mark.kvm
def test_it_shares_a_buffer_and_takes_a_page_back(buffer):
    told, said = run("--initial", "private", "--shared-bit", 35, "--vcpus", 1, buffer)
    assert said == "vCPU 0: shared\n"
    # The stack's page is asked for, too, by the first call.
    assert (told["reason"], told["hypercalls"], told["faults"]) == ("halt", 1, 2)
    states = {run["gpa"]: (run["size"], run["state"]) for run in told["map"]}
    assert states[0x801000] == (3 * 4096, "shared")


@pytest.mark.kvm
def test_a_refusal_is_its_answer(buffer, tmp_path):
    policy = tmp_path / "deny.py"
    policy.write_text(DENY)
    told, said = run("-p", policy, "--initial", "private", "--shared-bit", 35, buffer)
    assert said == "vCPU 0: refused with errno 11\n"
    assert (told["reason"], told["denied"]) == ("halt", 1)


@pytest.mark.kvm
def test_memory_above_the_first_gib_is_mapped(buffer, tmp_path):
    source = (buffer.parent / "buffer.c").read_text().replace("#define BUFFER 0x800000", "#define BUFFER 0x60000000")
    (buffer.parent / "buffer.c").write_text(source)
    command = how_to_build().replace("-o buffer", "-o high")
    subprocess.run(shlex.split(command), cwd=buffer.parent, check=True)
    told, said = run("--initial", "private", "--shared-bit", 35, "--memory", "2G", buffer.parent / "high")
    assert said == "vCPU 0: shared\n"
    assert {run["gpa"]: run["state"] for run in told["map"]}[0x60001000] == "shared"
