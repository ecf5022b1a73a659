"""Answers of a hook that are certain to be wrong are refused when its file is loaded."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from pagegate import Convert, PolicyError
from pagegate.script import load

HEAD = "import pagegate\nfrom pagegate import Convert, Deny, Policy, Retry, Stop\n"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(HEAD + text)
        return path

    return write


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("True", "True, which is no decision: did you mean Convert()?"),
        ("False", "False, which is no decision: did you mean Deny()?"),
        ("'convert'", "'convert', which is no decision: did you mean Convert()?"),
        ("'denied'", "'denied', which is no decision: did you mean Deny()?"),
        ("None", "None, which is no decision: return Convert"),
        ("", "nothing, which is no decision: return Convert"),
        ("0", "0, which is no decision"),
        ("(Convert(), 1)", "(Convert(), 1), which is no decision"),
        ("Convert", "the class Convert, which is no decision: did you mean Convert()?"),
        ("Denny()", "Denny, which is not defined: did you mean Deny()?"),
        ("convert()", "convert, which is not defined: did you mean Convert"),
        ("Convrt", "Convrt, which is not defined: did you mean Convert"),
        ("call.gpa == 4096", "call.gpa == 4096, which is no decision"),
        ("Convert() if call.gpa else False", "False, which is no decision"),
    ],
)
def test_an_answer_that_is_no_decision(write, answer, said) -> None:
    text = f"def map_gpa_range(call):\n    if call.size > 5:\n        return Deny()\n    return {answer}\n"
    with pytest.raises(PolicyError, match=re.escape(f"mine.py: line 6: map_gpa_range returns {said}")):
        load(write(text))
    inside = "class Mine(Policy):\n" + "".join(
        f"    {line}\n" for line in text.replace("(call)", "(self, call)").splitlines()
    )
    with pytest.raises(PolicyError, match="line 7: map_gpa_range returns"):
        load(write(inside))


@pytest.mark.parametrize("body", ["pass", "...", "print(fault.gpa); x = 1", "'''What it does.'''", "if fault: x = 5"])
def test_a_hook_that_never_answers(write, body) -> None:
    with pytest.raises(PolicyError, match="line 3: memory_fault returns nothing, which is no decision"):
        load(
            write(
                f"def memory_fault(fault): {body}\n"
                if ";" in body or "if" not in body
                else f"def memory_fault(fault):\n    {body}\n"
            )
        )


def test_at_the_end_of_a_chain(write) -> None:
    inner = "class Mine(Policy):\n    def memory_fault(self, fault): return {}\n"
    inner += "policy = pagegate.policies.Quota(0, Mine())\n"
    load(write(inner.format("Convert()")))
    with pytest.raises(PolicyError, match="line 4: memory_fault returns True"):
        load(write(inner.format("True")))


def test_a_generator(write) -> None:
    with pytest.raises(PolicyError, match="memory_fault yields"):
        load(write("def memory_fault(fault):\n    yield Convert()\n"))


@pytest.mark.parametrize(
    "text",
    [
        "def memory_fault(fault): raise ValueError\n",
        "def memory_fault(fault): fail(fault)\ndef fail(fault): raise ValueError\n",
        "def memory_fault(fault):\n    answer = None\n    answer = Convert()\n    return answer\n",
        "def memory_fault(fault):\n    for _ in range(3):\n        if fault.gpa: return Convert()\n    assert False\n",
        "def memory_fault(fault):\n    def inner(): return True\n    return Convert() if inner() else Deny()\n",
        "def memory_fault(fault):\n    return pagegate.Convert()\n",
        "def memory_fault(fault):\n    return answer(fault)\ndef answer(fault): return Convert()\n",
        "memory_fault = lambda fault: Convert()\n",
        "def as_decision(hook):\n    def asked(fault): return Convert() if hook(fault) else Deny()\n    return asked\n"
        "@as_decision\ndef memory_fault(fault):\n    return True\n",
        "class Mine(Policy):\n    @staticmethod\n    def memory_fault(fault): return Convert()\n",
        "class Mine(Policy):\n    def map_gpa_range(self, call) -> 'Nowhere': return Convert()\n",
        "class Mine(Policy):\n    def __init__(self): self.memory_fault = self.other\n"
        "    def other(self, fault): return Convert()\n",
        "def memory_fault(fault, Denny=Deny): return Denny()\n",
    ],
)
def test_answers_that_may_be_right_are_loaded(write, text) -> None:
    load(write(text))


def test_the_guest_does_not_start(write, tmp_path) -> None:
    path = write("def map_gpa_range(call):\n    return 'yes'\n")
    command = [sys.executable, "-m", "pagegate", "run", "-p", str(path), "--guest", "explicit"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"pagegate: {path}: line 4: map_gpa_range returns 'yes', which is no decision: "
        "return Convert(), Deny(), Retry() or Stop(reason)\n"
    )


def test_a_rewritten_file_is_read_again(write) -> None:
    load(write("def map_gpa_range(call):\n    return Convert()\n"))
    with pytest.raises(PolicyError, match="line 4"):
        load(write("def map_gpa_range(call):\n    return 'convert'\n"))
    assert load(write("def map_gpa_range(call):\n    return Convert()\n")).map_gpa_range(None) == Convert()
