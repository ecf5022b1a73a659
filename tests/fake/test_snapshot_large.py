"""A snapshot's files that are larger than they can be: they take neither the machine's memory nor its time."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from pagegate import PagegateError, Vm
from pagegate.testing import Fake

from tests.programs import passes

from .conftest import with_state

if TYPE_CHECKING:
    from pathlib import Path

MEMORY = 16 << 20
LARGE = 48 << 20


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    with Vm(MEMORY, hypervisor=Fake([], private_memory=False)) as vm:
        vm.snapshot(tmp_path / "saved")
    return tmp_path / "saved"


def resume(folder: Path) -> None:
    Vm.resume(folder, hypervisor=Fake([], private_memory=False)).close()


def large(folder: Path, field: str, element: str) -> None:
    """A state with a list of many elements."""
    state = json.loads((folder / "state.json").read_bytes())
    (state if field == "policy" else state["vcpus"][0])[field] = "HERE"
    many = "[" + ",".join([element] * (LARGE // (len(element) + 1))) + "]"
    with_state(folder, json.dumps(state).replace('"HERE"', many))


@pytest.mark.parametrize(("field", "element"), [("policy", "null"), ("msrs", "[16,0]")])
def test_where_memory_is_short_that_is_an_error(saved, field, element) -> None:
    large(saved, field, element)
    passes(
        f"""
        import resource
        from pagegate import PagegateError, Vm
        from pagegate.testing import Fake
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + {3 * LARGE}, used + {3 * LARGE}))
        try:
            Vm.resume({str(saved)!r}, hypervisor=Fake([], private_memory=False))
            raise SystemExit("it was resumed")
        except PagegateError as error:
            assert str(error) == "cannot read a snapshot's state: ENOMEM", error
        """
    )


def test_more_msrs_than_there_are_are_damage(saved) -> None:
    large(saved, "msrs", "[16,0]")
    with pytest.raises(ValueError, match=r"a vCPU has \d+ MSRs: there are 1024 at most"):
        resume(saved)


def test_ctrl_c_ends_the_reading(saved) -> None:
    large(saved, "policy", "null")
    begun = time.monotonic()
    resume(saved)
    all_of_it = time.monotonic() - begun
    # While it is parsed, mostly.
    timer = threading.Timer(all_of_it / 2, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        resume(saved)
    assert time.monotonic() - begun < all_of_it * 0.8
    timer.join()


def test_states_of_pages_are_as_many_as_pages(saved) -> None:
    path = saved / "private.pages"
    os.truncate(path, 8 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"private\.pages: it has more than 512 bytes"):
        resume(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    with pytest.raises((ValueError, PagegateError)):
        resume(saved)
