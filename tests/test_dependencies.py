"""docs/dependencies.md has a reason for each dependency."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = {"pagegate-core", "pagegate-baseline"}
TABLES = ("dependencies", "dev-dependencies", "build-dependencies")


def explained(name: str) -> bool:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    first, dash, _ = name.partition("-")
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None or (
        dash != "" and f"{first}-*" in text
    )


@pytest.mark.parametrize(
    "manifest", ["Cargo.toml", "rust/core/Cargo.toml", "rust/baseline/Cargo.toml", "fuzz/Cargo.toml"]
)
def test_each_crate_has_a_reason(manifest: str) -> None:
    told = tomllib.loads((ROOT / manifest).read_text())
    names = {name for table in TABLES for name in told.get(table, {})}
    assert names
    assert [name for name in sorted(names - OWN) if not explained(name)] == []


def test_each_python_package_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[<>=~!\[ ]", one)[0] for one in wanted}
    assert {"click", "pytest"} <= names
    assert [name for name in sorted(names) if not explained(name)] == []


def test_another_one_would_be_missed() -> None:
    assert not explained("tokio")
    assert not explained("superio")
    assert not explained("vm")


def test_the_wheels_that_contributing_names_are_those_that_are_built() -> None:
    built = re.search(r"versions=\(([\d. ]+)\)", (ROOT / "tests" / "wheels").read_text())
    named = re.search(
        r"manylinux2014 wheels for CPython ([\d., and]+) on x86-64", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert built
    assert named
    assert re.findall(r"3\.\d+", named[1]) == built[1].split()
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    assert oldest[1] == built[1].split()[0]
