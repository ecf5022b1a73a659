"""Modules beside a policy file: each policy has its own, and a change of one is seen."""

from __future__ import annotations

import os
import queue
import sys
import time
from types import SimpleNamespace

import pytest
from pagegate import Deny, script
from pagegate.loading import neighbours, policy_file
from pagegate.loading.watch import Changes, Watcher

MINE = """
import helper, json
from tools import sums
from tools.sums import deep as deeper
import tools.sums as again
from pagegate import Deny
def memory_fault(fault):
    import late
    return Deny(helper.NUMBER + sums.ONE + deeper() + again.ONE + late.NONE)
"""


@pytest.fixture
def folder(tmp_path):
    def folder(name, number=10):
        made = tmp_path / name
        (made / "tools").mkdir(parents=True)
        (made / "mine.py").write_text(MINE)
        (made / "helper.py").write_text(f"NUMBER = {number}\n")
        (made / "late.py").write_text("NONE = 0\n")
        (made / "json.py").write_text("1 / 0\n")
        (made / "tools" / "__init__.py").write_text("")
        (made / "tools" / "sums.py").write_text("from . import more\nONE = 1\ndef deep(): return more.TWO\n")
        (made / "tools" / "more.py").write_text("import helper\nTWO = 2\nassert helper.NUMBER\n")
        return made

    return folder


def test_two_policies_have_modules_of_their_own(folder):
    one, two = folder("one", 10), folder("two", 20)
    first, second, third = (script.load(each / "mine.py") for each in (one, two, one))
    assert [each.memory_fault(None) for each in (first, second, third)] == [Deny(14), Deny(24), Deny(14)]
    assert first.helper is not third.helper
    first.helper.NUMBER = 30
    assert (first.memory_fault(None), third.memory_fault(None)) == (Deny(34), Deny(14))
    assert "helper" not in sys.modules
    assert {file.name for file in neighbours.files(first)} == {
        "helper.py",
        "__init__.py",
        "sums.py",
        "more.py",
        "late.py",
    }


def test_a_neighbour_that_fails_is_told_with_its_line_and_that_of_the_import(folder):
    made = folder("one")
    (made / "helper.py").write_text("\n1 / 0\n")
    before = set(sys.modules)
    assert refusal(made / "mine.py") == (
        f"{made}/helper.py, line 2 (imported by mine.py, line 2), cannot be loaded: ZeroDivisionError: division by zero"
    )
    assert not {each for each in set(sys.modules) - before if "neighbours" in each}
    (made / "helper.py").write_text("import nowhere\n")
    assert "No module named 'nowhere'" in refusal(made / "mine.py")


@pytest.mark.parametrize(
    ("more", "mine", "said"),
    [
        (
            "def two(\n",
            "\nimport tools.sums\n",
            "tools/more.py, line 1 (imported by tools/sums.py, line 1, imported by mine.py, line 2), cannot be loaded: "
            "SyntaxError: '(' was never closed",
        ),
        (
            "def two():\n  return {}[2]\n",
            "from tools import more\n\nmore.two()\n",
            "tools/more.py, line 2 (called from mine.py, line 3), cannot be loaded: KeyError: 2",
        ),
        (
            "def two():\n  return {}[2]\n",
            "from tools import more\ndef policy():\n  return more.two()\n",
            "mine.py, line 3, has a policy that makes no policy: KeyError: 2 ({folder}/tools/more.py, line 2)",
        ),
    ],
)
def test_which_line_of_a_neighbour_failed(folder, more, mine, said):
    made = folder("one")
    (made / "tools" / "more.py").write_text(more)
    (made / "mine.py").write_text(mine)
    name = "policy" if "def policy" in mine else None
    assert refusal(made / "mine.py", name) == f"{made}/{said}".replace("{folder}", str(made))


def test_files_that_call_each_other_without_an_end(folder):
    made = folder("one")
    (made / "helper.py").write_text("def back(call): call(back)\n")
    (made / "mine.py").write_text("import helper\ndef on(back): back(on)\nhelper.back(on)\n")
    told = refusal(made / "mine.py")
    assert "called from helper.py, line 1" in told
    assert ", ..., called from mine.py, line 3), cannot be loaded: RecursionError: " in told
    assert told.count("called from") == 4


def refusal(path, name=None):
    with pytest.raises(policy_file.PolicyError) as caught:
        script.load(path, name)
    return str(caught.value)


def test_a_class_from_a_neighbour_is_a_policy_with_neighbours(tmp_path):
    text = "from pagegate import Deny, Policy\nclass Base(Policy):\n  def memory_fault(self, fault): return Deny(9)\n"
    (tmp_path / "parts.py").write_text(text)
    (tmp_path / "mine.py").write_text("from parts import *\npolicy = Base()\n")
    policy = script.load(tmp_path / "mine.py")
    assert policy.memory_fault(None) == Deny(9)
    assert [file.name for file in neighbours.files(policy)] == ["parts.py"]


def test_a_changed_neighbour_is_a_reason_to_load_again(folder):
    made = folder("one")
    path = made / "mine.py"
    policy = SimpleNamespace(current=script.load(path))
    replaced, said = queue.Queue(), queue.Queue()

    def replace(new):
        policy.current = new
        replaced.put(new)

    policy.replace = replace
    with Watcher(SimpleNamespace(policy=policy), Changes(path), lambda: script.load(path), said.put, "mine.py"):
        time.sleep(0.5)  # it learns of the neighbours
        _write(made / "helper.py", "NUMBER = 40\n")
        assert replaced.get(timeout=10).memory_fault(None) == Deny(44)
        assert said.get(timeout=10) == "mine.py was loaded again and judges from the next request on"
        _write(made / "tools" / "more.py", "TWO = 3\n")
        assert replaced.get(timeout=10).memory_fault(None) == Deny(45)
        said.get(timeout=10)
        _write(made / "tools" / "more.py", "TWO = THREE\n")
        assert said.get(timeout=10).startswith(f"{made}/tools/more.py, line 1 (imported by tools/sums.py, line 1, ")


def _write(path, text):
    other = path.with_suffix(".new")
    other.write_text(text)
    os.replace(other, path)
