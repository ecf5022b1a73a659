"""The rows that the benches measure, what each is held to, and their tables."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

EXCUSED = Path(__file__).resolve().parent / "excused.toml"


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure with a goal."""

    name: str
    goal: float
    """What the median is to be at most."""
    values: Sequence[float]
    """One of each run. Without any the row could not be measured."""
    on: str
    """What ran the requests."""
    detail: str
    """What was measured, or why it was not."""

    @property
    def value(self) -> float:
        return statistics.median(self.values)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure that claims nothing."""

    name: str
    value: float
    detail: str


@dataclasses.dataclass(frozen=True)
class Excuse:
    """Why a row may be past its goal, and how far."""

    kind: Literal["missed", "noisy"]
    limit: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Judged:
    """A row, and what became of it."""

    row: Row
    limit: float
    """What is enforced: the goal, if nothing excuses the row."""
    verdict: str
    said: str
    """What a check says of it, if anything."""
    fails: bool


def excuses(file: Path = EXCUSED) -> dict[str, Excuse]:
    """By the names of the rows.

    Raises ValueError for a file that says something else.
    """
    found: dict[str, Excuse] = {}
    text = tomllib.loads(file.read_text(encoding="utf-8"))
    kinds: tuple[Literal["missed", "noisy"], ...] = ("missed", "noisy")
    for kind in kinds:
        for name, about in text.pop(kind, {}).items():
            limit, reason = about.pop("limit", None), about.pop("reason", "")
            if not isinstance(limit, int | float) or not str(reason).strip() or about or name in found:
                raise ValueError(f"{file.name}: {name!r} needs one limit and one reason, and nothing else")
            found[name] = Excuse(kind, float(limit), str(reason))
    if text:
        raise ValueError(f"{file.name}: {', '.join(text)}: there are [missed] and [noisy]")
    return found


def judged(row: Row, excuse: Excuse | None) -> Judged:
    """A row beside its goal and its excuse."""
    limit = row.goal if excuse is None else excuse.limit
    if excuse is not None and excuse.limit <= row.goal:
        said = f"its limit of {limit:g} in {EXCUSED.name} is no wider than its goal"
        return Judged(row, limit, "stale excuse", said, fails=True)
    if not row.values:
        return Judged(row, limit, "not measured", f"not measured: {row.detail}", fails=True)
    value = number(row.value)
    if row.value <= row.goal:
        stale = excuse is not None and excuse.kind == "missed"
        said = f"meets its goal with {value}: the line in {EXCUSED.name} that excuses it has to go" if stale else ""
        return Judged(row, limit, "met", said, fails=stale)
    if excuse is None:
        return Judged(row, limit, "missed", f"missed: {value}, and the goal is {row.goal:g}", fails=True)
    if row.value <= limit:
        said = f"missed, excused: {value}, the goal is {row.goal:g}: {excuse.reason}"
        return Judged(row, limit, "missed, excused", said, fails=False)
    said = f"missed: {value}, the goal is {row.goal:g}, and no more than {limit:g} is excused"
    return Judged(row, limit, "missed", said, fails=True)


def all_judged(rows: Iterable[Row], excused: Mapping[str, Excuse]) -> list[Judged]:
    return [judged(row, excused.get(row.name)) for row in rows]


def lower(rows: Iterable[Row], again: Iterable[Row]) -> list[Row]:
    """Of each row the one with the lower figure, of two measurements."""
    known = {row.name: row for row in again}
    pairs = [(row, known.get(row.name, row)) for row in rows]
    return [min(pair, key=lambda row: row.value if row.values else math.inf) for pair in pairs]


def unknown(rows: Iterable[Row], excused: Mapping[str, Excuse]) -> list[str]:
    """The excuses of rows that do not exist."""
    names = {row.name for row in rows}
    return [name for name in excused if name not in names]


def findings(rows: Iterable[Judged]) -> list[str]:
    """What a check says."""
    said = [row for row in rows if row.said]
    return [f"benches: {'FAILED: ' if row.fails else ''}{row.row.name}: {row.said}" for row in said]


# ---- tables


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.4g}"


def bound(value: float) -> str:
    return f"≤ {value:g}"


def once(rows: Iterable[Judged]) -> list[list[str]]:
    """A table of rows that are the same in each run."""
    table = [["", "goal", "enforced", "measured", "verdict", ""]]
    for judged in rows:
        row = judged.row
        measured = number(row.value) if row.values else ""
        table.append([row.name, bound(row.goal), bound(judged.limit), measured, judged.verdict, row.detail])
    return table


def repeated(rows: Iterable[Judged]) -> list[list[str]]:
    """A table of rows that differ from run to run."""
    table = [["", "measured on", "goal", "enforced", "median", "spread", "runs", "verdict", ""]]
    for judged in rows:
        row = judged.row
        measured = ["", "", "0"]
        if row.values:
            spread = f"{number(min(row.values))} to {number(max(row.values))}"
            measured = [number(row.value), spread, str(len(row.values))]
        limits = [bound(row.goal), bound(judged.limit)]
        table.append([row.name, row.on, *limits, *measured, judged.verdict, row.detail])
    return table


def plain(figures: Iterable[Figure]) -> list[list[str]]:
    """A table of figures without goals."""
    return [["", "measured", ""], *([figure.name, number(figure.value), figure.detail] for figure in figures)]


def markdown(table: Sequence[Sequence[str]], *, aligned: bool = False) -> str:
    """A table in Markdown; ``aligned`` for a terminal."""
    widths = [max(len(line[column]) for line in table) if aligned else 0 for column in range(len(table[0]) - 1)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells, [*widths, 0], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if aligned else "---" for width in [*widths, 1])
    return "\n".join([line(table[0]), f"|{rule}|", *map(line, table[1:])])


# ---- as JSON


def told(rows: Iterable[Row], figures: Iterable[Figure] = ()) -> dict[str, Any]:
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "figures": [dataclasses.asdict(figure) for figure in figures],
    }


def heard(told: Mapping[str, Any]) -> tuple[list[Row], list[Figure]]:
    return [Row(**row) for row in told["rows"]], [Figure(**figure) for figure in told["figures"]]
