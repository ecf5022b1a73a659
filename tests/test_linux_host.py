"""Whether Linux boots on a host, and what `doctor` and `boot` say where it does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pagegate.cli import linux_host

from .boot_parts import write_kernel

needs_pvm = pytest.mark.skipif(not Path("/sys/module/kvm_pvm").exists(), reason="this host's KVM may boot Linux")


def pagegate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pagegate", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def host(**facts):
    found = {"enforcement": "memslots", "exit_hypercall": True, "problems": []}
    return SimpleNamespace(**{**found, **facts})


@pytest.mark.parametrize(
    ("facts", "completes", "module", "enforcement", "why"),
    [
        ({"enforcement": "attributes"}, True, False, "traps", "two views of each page"),
        ({}, True, False, "memslots", "no VMs with private memory"),
        ({"exit_hypercall": False}, False, False, "memslots", "no VMs with private memory"),
        ({}, False, False, None, "does not complete.*pagegate testbed -- pagegate boot"),
        ({}, True, True, None, "kvm_pvm.*pagegate testbed -- pagegate boot"),
        (
            {"enforcement": None, "problems": ["there is no /dev/kvm", "and more"]},
            True,
            False,
            None,
            "no /dev/kvm; and",
        ),
    ],
)
def test_what_a_linux_guest_gets(monkeypatch, tmp_path, facts, completes, module, enforcement, why):
    monkeypatch.setattr(linux_host, "_SOFTWARE_VIRTUALISED", tmp_path if module else tmp_path / "none")
    monkeypatch.setattr(linux_host.guests, "hypercall_completes", lambda timeout: completes)
    found = linux_host.linux_host(host(**facts))
    assert found.enforcement == enforcement
    assert re.search(why, found.why)


@needs_pvm
@pytest.mark.kvm
def test_boot_on_a_host_that_cannot_is_3(tmp_path):
    done = pagegate("boot", write_kernel(tmp_path))
    assert (done.returncode, done.stdout) == (3, "")
    assert "software-virtualised here (module kvm_pvm)" in done.stderr
    assert "`pagegate testbed -- pagegate boot KERNEL`" in done.stderr


@needs_pvm
@pytest.mark.kvm
def test_doctor_says_why_no_linux_boots():
    told = json.loads(pagegate("doctor", "--json").stdout)
    assert told["enforcement"] == "memslots"
    assert told["linux"]["enforcement"] is None
    assert "module kvm_pvm" in told["linux"]["why"]
    text = pagegate("doctor").stdout
    assert re.search(r"^for a Linux guest +none *$", text, re.MULTILINE)
    assert "! KVM is software-virtualised here" in text
    assert "`pagegate boot` runs here" not in text
