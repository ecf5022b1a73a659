"""What benches/check accepts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "benches" / "goals.py"
SPEC = importlib.util.spec_from_file_location("goals", FILE)
goals = sys.modules["goals"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(goals)


def judged(value, excuse=None, goal=1.0):
    values = value if isinstance(value, list) else [value]
    return goals.judged(goals.Row("row", goal, values, "nothing", "some detail"), excuse)


def missed(limit):
    return goals.Excuse("missed", limit, "out of reach")


def noisy(limit):
    return goals.Excuse("noisy", limit, "others use the CPUs")


@pytest.mark.parametrize(
    ("value", "excuse", "verdict", "fails"),
    [
        (1.0, None, "met", False),
        (1.001, None, "missed", True),
        (1.1, missed(1.2), "missed, excused", False),
        (1.3, missed(1.2), "missed", True),
        (0.9, missed(1.2), "met", True),
        (1.1, noisy(1.2), "missed, excused", False),
        (1.3, noisy(1.2), "missed", True),
        (0.9, noisy(1.2), "met", False),
        (0.9, noisy(1.0), "stale excuse", True),
        ([], None, "not measured", True),
        ([], missed(1.2), "not measured", True),
    ],
)
def test_a_row_is_held_to_its_goal_or_to_what_excuses_it(value, excuse, verdict, fails):
    found = judged(value, excuse)
    assert (found.verdict, found.fails) == (verdict, fails)
    assert bool(found.said) == (fails or verdict != "met")


def test_an_excuse_is_told_with_its_reason():
    (said,) = goals.findings([judged(1.1, missed(1.2)), judged(0.9)])
    assert said == "benches: row: missed, excused: 1.100, the goal is 1: out of reach"
    (said,) = goals.findings([judged(1.1)])
    assert said.startswith("benches: FAILED: row: missed: 1.100, and the goal is 1")


def test_the_median_counts():
    assert judged([0.9, 0.95, 2.0]).verdict == "met"
    assert judged([0.9, 1.1, 1.2]).verdict == "missed"


def test_an_excuse_without_a_row_is_reported():
    rows = [goals.Row("one", 1.0, [1.0], "nothing", "")]
    assert goals.unknown(rows, {"one": missed(2.0), "two": missed(2.0)}) == ["two"]


def test_every_excuse_of_the_repository_has_a_reason():
    for excuse in goals.excuses().values():
        assert len(excuse.reason) > 20


@pytest.mark.parametrize(
    "text",
    [
        '[missed."a"]\nlimit = 1.5\n',
        '[missed."a"]\nreason = "some"\n',
        '[missed."a"]\nlimit = "1.5"\nreason = "some"\n',
        '[missed."a"]\nlimit = 1.5\nreason = " "\n',
        '[missed."a"]\nlimit = 1.5\nreason = "some"\nmore = 1\n',
        '[missed."a"]\nlimit = 1.5\nreason = "some"\n[noisy."a"]\nlimit = 1.5\nreason = "some"\n',
        '[holds."a"]\nlimit = 1.5\nreason = "some"\n',
    ],
)
def test_invalid_excuses_are_refused(tmp_path, text):
    file = tmp_path / "excused.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"excused\.toml"):
        goals.excuses(file)


def test_a_table_says_what_is_enforced_and_how_far_the_runs_spread():
    rows = [judged([1.1, 1.2, 1.3], noisy(1.5)), judged([])]
    _, _, first, second = goals.markdown(goals.repeated(rows)).splitlines()
    assert first == "| row | nothing | ≤ 1 | ≤ 1.5 | 1.200 | 1.100 to 1.300 | 3 | missed, excused | some detail |"
    assert second == "| row | nothing | ≤ 1 | ≤ 1 |  |  | 0 | not measured | some detail |"


def test_of_two_measurements_the_lower_counts():
    def rows(*values):
        return [goals.Row(name, 1.0, value, "nothing", str(value)) for name, value in zip("abcd", values, strict=True)]

    first, second = rows([1.1], [1.0], [], []), rows([1.0], [1.1], [1.2], [])
    assert goals.lower(first, second) == [second[0], first[1], second[2], first[3]]


def test_the_output_of_a_script_is_read():
    rows, figures = [goals.Row("a", 1.0, [1.0, 2.0], "nothing", "b")], [goals.Figure("c", 3.0, "d")]
    assert goals.heard(goals.told(rows, figures)) == (rows, figures)
