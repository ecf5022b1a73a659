"""CHANGELOG.md has the form of keepachangelog.com."""

from __future__ import annotations

import re
from pathlib import Path

import pagegate
import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.compile(r"## \[?(\d+\.\d+\.\d+)\]? - (\d{4}-\d{2}-\d{2})")
KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")


def problems(text):
    """What is not in the form, one sentence each."""
    lines = text.splitlines()
    found = [] if lines[0] == "# Changelog" else ["the title is no Changelog"]
    heads = [line for line in lines if line.startswith("## ")]
    if heads[:1] != ["## Unreleased"]:
        found.append("the first version is not Unreleased")
    dates = []
    for head in heads[1:]:
        if match := VERSION.fullmatch(head):
            dates.append(match[2])
        else:
            found.append(f"{head} is no version with a date")
    if dates != sorted(dates, reverse=True):
        found.append("the newest is not first")
    within: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("## "):
            within = []
        elif line.startswith("### "):
            kind = line.removeprefix("### ")
            found += [f"{kind} is no kind of change"] if kind not in KINDS else []
            found += [f"{kind} is twice in a version"] if kind in within else []
            within.append(kind)
        elif line.startswith("- ") and not within:
            found.append(f"{line} is under no kind of change")
        elif line.startswith("#") and not line.startswith("# "):
            found.append(f"{line} is no heading of a changelog")
        if line.startswith("### ") and before:
            found.append(f"no empty line before {line}")
    return found


def test_the_form():
    assert problems((ROOT / "CHANGELOG.md").read_text()) == []


def test_a_release_has_an_entry():
    text = (ROOT / "CHANGELOG.md").read_text()
    released = VERSION.findall(text)
    assert not released or released[0][0] == pagegate.__version__


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Changes\n\n## Unreleased\n", "title"),
        ("# Changelog\n\n## 0.1.0 - 2020-01-01\n", "not Unreleased"),
        ("# Changelog\n\n## Unreleased\n\n## 0.1\n", "no version with a date"),
        ("# Changelog\n\n## Unreleased\n\n## 0.1.0 - 2020-01-01\n\n## 0.2.0 - 2021-01-01\n", "newest"),
        ("# Changelog\n\n## Unreleased\n\n### New\n", "New is no kind"),
        ("# Changelog\n\n## Unreleased\n\n- a thing\n", "under no kind"),
        ("# Changelog\n\n## Unreleased\n\n### Added\n\n### Added\n", "twice"),
    ],
)
def test_another_form_would_be_found(text, said):
    assert any(said in problem for problem in problems(text))
