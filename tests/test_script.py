"""Policies from files, and wrong operations that a guest's script refuses."""

from __future__ import annotations

import sys
import textwrap

import pytest
from pagegate import Deny, PolicyError, policies
from pagegate.guests import PAGE, Script
from pagegate.script import load


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


HOOK = "def memory_fault(self, fault): return Convert()"
TWO = f"""
    from pagegate import Convert, Policy
    class One(Policy):
        {HOOK}
    class Two(Policy):
        {HOOK}
    ready = Two()
    number = 7
"""


def test_a_dataclass_with_postponed_annotations_loads(write):
    policy = load(
        write("""
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import ClassVar
        from pagegate import Policy
        @dataclass
        class Mine(Policy):
            kept: ClassVar[int] = 1
            limit: int = 3
        """)
    )
    assert policy.limit == 3
    assert type(policy).__module__ in sys.modules


def test_neighbours_can_be_imported_and_the_path_is_left_as_it_was(write):
    write("LIMIT = 5\n", "neighbour_of_a_policy.py")
    before = list(sys.path)
    policy = load(write("import neighbour_of_a_policy as n\ndef memory_fault(fault): return n.LIMIT\n"))
    assert policy.memory_fault(None) == 5
    assert sys.path == before


def test_a_base_is_no_candidate(write):
    text = f"from pagegate import Convert, Policy\nclass Base(Policy):\n    {HOOK}\nclass Leaf(Base): pass\n"
    assert type(load(write(text))).__name__ == "Leaf"


def test_several_policies_are_named(write):
    with pytest.raises(PolicyError, match="several policies, name one:\n  mine.py:One\n  mine.py:Two"):
        load(write(TWO))


def test_a_name_picks_a_class_or_an_object(write):
    path = write(TWO)
    assert type(load(path, "One")).__name__ == "One"
    assert type(load(path, "ready")).__name__ == "Two"
    with pytest.raises(PolicyError, match="has no Three: there are One, Two and ready"):
        load(path, "Three")
    with pytest.raises(PolicyError, match="7 is no policy: it has none of the hooks"):
        load(path, "number")


@pytest.mark.parametrize("made", ["Two()", "Two", "policies.Quota(4096, Two())"])
def test_the_name_policy_in_a_file_is_the_policy(write, made):
    policy = load(write(textwrap.dedent(TWO) + f"from pagegate import policies\npolicy = {made}\n"))
    assert isinstance(policy, policies.Quota) == made.startswith("policies.Quota")
    assert isinstance(policy, policies.Quota) or type(policy).__name__ == "Two"


ANSWERS = "from pagegate import Deny\ndef memory_fault(fault): return Deny("


def test_a_file_needs_no_suffix(write):
    assert load(write(f"{ANSWERS}1)\n", "mine")).memory_fault(None) == Deny(1)


def test_a_changed_file_is_read_again(write):
    path = write(f"{ANSWERS}1)\n")
    assert load(path).memory_fault(None) == Deny(1)
    assert load(write(f"{ANSWERS}2)\n")).memory_fault(None) == Deny(2)
    assert not list(path.parent.glob("__pycache__/mine*"))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import sys\nsys.exit(4)\n", 2, "SystemExit: 4"),
        ("\n1 / 0\n", 2, "ZeroDivisionError"),
        ("\n\nfor\n", 3, "SyntaxError"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("from pagegate import Policy\nclass Mine(Policy):\n  def __init__(self): exit(1)\n", 3, "SystemExit: 1"),
        (
            "from pagegate import Policy\nclass Mine(Policy):\n  def __init__(self, a): pass\n",
            2,
            "Mine needs the option a: give",
        ),
    ],
)
def test_an_exception_of_a_file_names_its_line(write, text, line, said):
    path = write(text)
    modules = {name for name in sys.modules if name.startswith("_pagegate_policy")}
    with pytest.raises(PolicyError) as caught:
        load(path)
    assert f"{path}, line {line}" in str(caught.value)
    assert said in str(caught.value)
    if "class" not in text:
        assert {name for name in sys.modules if name.startswith("_pagegate_policy")} == modules


def test_ctrl_c_is_passed_on(write):
    with pytest.raises(KeyboardInterrupt):
        load(write("raise KeyboardInterrupt\n"))


def test_a_misspelt_hook_is_told_with_the_file(write):
    path = write("def memory_falt(fault): pass\ndef memory_fault(fault): pass\n")
    with pytest.raises(PolicyError, match="module mine has memory_falt") as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "_pagegate_policy" not in str(caught.value)


def test_the_only_hook_misspelt(write):
    with pytest.raises(PolicyError, match=r"has memory_fualt\(\), which is no hook: did you mean memory_fault\(\)\?"):
        load(write("def memory_fualt(fault): pass\n"))


@pytest.mark.parametrize("name", ["nothing.py", "."])
def test_paths_that_are_not_files(tmp_path, name):
    with pytest.raises(PolicyError, match="is no file"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("error", "do"),
    [
        (ValueError, lambda s: s.map(0, PAGE, to="Private")),
        (ValueError, lambda s: s.map(0, PAGE, to=None)),
        (ValueError, lambda s: s.map(0, 0, to="private")),
        (ValueError, lambda s: s.map(0, PAGE + 1, to="private")),
        (ValueError, lambda s: s.map(0, -PAGE, to="private")),
        (ValueError, lambda s: s.map(0, PAGE, to="shared", page_size_hint=16)),
        (ValueError, lambda s: s.map(-1, PAGE, to="private")),
        (TypeError, lambda s: s.map(0, 4096.0, to="private")),
        (TypeError, lambda s: s.map_raw(0, 1.0, 0)),
        (ValueError, lambda s: s.map_raw(0, 1 << 64, 0)),
        (ValueError, lambda s: s.fill(0, 12, 0)),
        (ValueError, lambda s: s.fill(0, 8, 256)),
        (ValueError, lambda s: s.check(0, 8, -1)),
        (TypeError, lambda s: s.check(0, 8, "a")),
        (ValueError, lambda s: s.read("zero")),
        (TypeError, lambda s: s.read(True)),
        (ValueError, lambda s: s.write(0, 1 << 64)),
        (ValueError, lambda s: s.out(0x10000, 0)),
        (ValueError, lambda s: s.in_(0x60, 3)),
        (ValueError, lambda s: s.loop(-1, 2)),
        (TypeError, lambda s: s.touch(0, 1, None)),
    ],
)
def test_a_wrong_operation_is_an_error_at_the_call(error, do):
    script = Script()
    with pytest.raises(error, match=r"must be|it must"):
        do(script)
    assert len(script) == 0


def test_the_largest_words_are_accepted():
    script = Script()
    script.write((1 << 64) - 1, (1 << 64) - 1)
    script.map_raw((1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1)
    assert len(script) == 2


def test_an_unknown_way_to_ask_is_refused():
    with pytest.raises(ValueError, match='"hypercall" or "doorbell"'):
        Script(call="vmcall")
