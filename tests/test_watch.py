"""A policy file that changes while the guest runs, with a stand-in for the machine."""

from __future__ import annotations

import os
import queue
from types import SimpleNamespace

import pytest
from pagegate import Deny, script
from pagegate.loading.watch import Changes, Watcher

TEXT = """from pagegate import Deny
class Mine:
  def __init__(self, n: int = 0): self.n = n
  def memory_fault(self, fault): return Deny({})
"""


@pytest.fixture
def watched(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TEXT.format(1))
    replaced, said = queue.Queue(), queue.Queue()
    vm = SimpleNamespace(policy=SimpleNamespace(replace=replaced.put, current=None))
    with Watcher(vm, Changes(path), lambda: script.load(path, "Mine", {"n": "7"}), said.put):
        yield path, replaced, said


def test_a_file_that_is_written_or_replaced_is_loaded(watched):
    path, replaced, said = watched
    path.write_text(TEXT.format(11))
    policy = replaced.get(timeout=10)
    assert (policy.memory_fault(None), policy.n) == (Deny(11), 7)
    assert "loaded again" in said.get(timeout=10)
    other = path.with_name("other")
    other.write_text(TEXT.format(222))
    other.replace(path)
    assert replaced.get(timeout=10).memory_fault(None) == Deny(222)
    path.unlink()
    path.write_text(TEXT.format(3333))
    assert replaced.get(timeout=10).memory_fault(None) == Deny(3333)


@pytest.mark.parametrize("text", ["for", "1 / 0", "raise SystemExit(3)", "raise KeyboardInterrupt", "Mine = 7"])
def test_a_file_that_fails_is_skipped_and_the_watch_goes_on(watched, text):
    path, replaced, said = watched
    path.write_text(text)
    line = said.get(timeout=10)
    assert "the policy in force stays" in line
    assert "\n" not in line
    assert replaced.empty()
    path.write_text(TEXT.format(44))
    assert replaced.get(timeout=10).memory_fault(None) == Deny(44)


def test_an_unchanged_file_is_not_loaded_again(watched):
    path, replaced, _ = watched
    os.utime(path, ns=(1, path.stat().st_mtime_ns))
    with pytest.raises(queue.Empty):
        replaced.get(timeout=0.4)
