"""What notebooks show of reports, events, and page states: small tables, with what a guest wrote escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from pagegate.units import duration, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pagegate._core import Event, Report, Vm

_ROWS = 20
_RUNS = 200
_COLUMNS = ("sequence", "vcpu", "kind", "gpa", "size", "to", "decision", "outcome", "errno", "latency")
_COLOURS = {"private": "#8e44ad", "shared": "#16a085"}


def report(of: Report) -> str:
    """A report as a table of two columns."""
    facts = ((name, _written(name, value)) for name, value in of.asdict().items() if value is not None)
    return _table(("", ""), facts)


def events(of: Sequence[Event]) -> str:
    """The first and the last of these events."""
    shown: list[Event | None] = list(of)
    if len(of) > _ROWS:
        shown = [*of[: _ROWS // 2], None, *of[-_ROWS // 2 :]]
    rows = [
        ["…"] * len(_COLUMNS) if each is None else [_written(name, getattr(each, name)) for name in _COLUMNS]
        for each in shown
    ]
    return f"<p>{len(of)} events</p>{_table(_COLUMNS, rows)}"


def attributes(vm: Vm) -> str:
    """The states of all pages as a strip, each run as wide as it is large."""
    runs = vm.attributes.runs()
    parts = "".join(
        f'<span title="{gpa:#x} + {size:#x} {state}" style="display:inline-block;height:1.2em;'
        f'width:{100 * size / vm.memory:.4f}%;background:{_COLOURS[state]}"></span>'
        for gpa, size, state in runs[:_RUNS]
    )
    private = vm.attributes.private_bytes
    more = f", of which the first {_RUNS} are drawn" if len(runs) > _RUNS else ""
    return (
        f'<div style="width:100%;white-space:nowrap;font-size:0">{parts}</div>'
        f'<p><span style="color:{_COLOURS["private"]}">private</span> {private:,} bytes, '
        f'<span style="color:{_COLOURS["shared"]}">shared</span> {vm.memory - private:,} bytes, '
        f"in {len(runs)} runs{more}</p>"
    )


def _written(name: str, value: Any) -> str:
    if isinstance(value, dict):
        facts = {key: each for key, each in value.items() if each is not None}
        # All of a latency are latencies: its median, its largest.
        return ", ".join(f"{key} {_written(name if name == 'latency' else key, each)}" for key, each in facts.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(name, value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _number(name: str, value: int) -> str:
    if name in ("gpa", "rip", "cr2"):
        return hex(value)
    if name == "latency":
        return duration(value)
    return size(value) if name == "size" or name.startswith("bytes_") else f"{value:,}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(each)}</td>' for each in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
