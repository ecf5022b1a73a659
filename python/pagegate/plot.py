"""Plots of a trace: how much was shared when, where, how long requests took, and what was decided.

from pagegate import plot
plot.figure("boot.parquet").savefig("boot.png")

Needs matplotlib: ``pip install 'pagegate[plot]'``.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pagegate._core import read_trace

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes  # type: ignore[import-not-found, unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    from pagegate._core import Event, Trace

SUFFIXES: Final = (".png", ".svg", ".pdf", ".html")
"""Of the files that ``save`` writes."""
_COLOURS = {"private": "#8e44ad", "shared": "#16a085"}
_DECISIONS = {
    "convert": "#27ae60",
    "deny": "#c0392b",
    "retry": "#f39c12",
    "discard": "#7f8c8d",
    "stop": "#2c3e50",
    "none": "#bdc3c7",
}
_ASKED = ("implicit", "explicit", "poison")
_POINTS = 20_000
"""Points of a curve, and bars, at most: more cannot be told apart, and take long to draw."""
_BARS = 12
_SLOTS = 6
"""There is room for so many bars, so that two are not as thick as a plot."""
_MIB = 1 << 20
_INCHES = (12.0, 9.0)


def figure(source: object, *, symbols: Mapping[int, str] | None = None, title: str = "") -> Figure:
    """The plots of a trace as one matplotlib figure of four parts.

    ``source``: what ``trace.read`` takes. ``symbols``: functions of the guest's kernel by instruction pointer. Raises
    ImportError without matplotlib, and as ``trace.read`` does.
    """
    trace = read_trace(source)
    figure = _figure_class()(figsize=_INCHES, layout="constrained")
    ((states, places), (latencies, decisions)) = figure.subplots(2, 2)
    events = list(trace)
    begun = min((event.time for event in events), default=0)
    _draw_states(states, trace, events, begun)
    _draw_places(places, events, begun)
    places.set(xlim=states.get_xlim(), ylim=(0, trace.memory / _MIB))
    _draw_latencies(latencies, events)
    _draw_decisions(decisions, events, symbols or {})
    if title:
        figure.suptitle(title)
    return figure


def save(figure: Figure, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Writes a figure to a file that ends in .png, .svg, .pdf or .html, which has the plots in it.

    Raises OSError, and ValueError for another name.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if file.suffix != ".html":
        figure.savefig(file)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    # Without the prologue of a file.
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>svg{{max-width:100%;height:auto}}</style>'
    file.write_text(
        f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{svg}</body></html>\n", encoding="utf-8"
    )


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore] # noqa: PLC0415
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pagegate[plot]'") from error
    found: type[Figure] = Figure
    return found


def _thinned(rows: Sequence[Any]) -> Sequence[Any]:
    step = max(1, -(-len(rows) // _POINTS))
    return rows if step == 1 else [*rows[::step], rows[-1]]


def _draw_states(axes: Axes, trace: Trace, events: list[Event], begun: int) -> None:
    shared = trace.shared_bytes
    curve = [(0.0, shared)]
    for event in events:
        if event.changed:
            shared += event.changed if event.done_to == "shared" else -event.changed
            # Conversions by the host are not in a trace.
            shared = min(max(shared, 0), trace.memory)
            curve.append(((event.time - begun) / 1e9, shared))
    curve = list(_thinned(curve))
    times, bytes_shared = [time for time, _ in curve], [count / _MIB for _, count in curve]
    bytes_private = [trace.memory / _MIB - count for count in bytes_shared]
    axes.step(times, bytes_private, where="post", color=_COLOURS["private"], label="private")
    axes.step(times, bytes_shared, where="post", color=_COLOURS["shared"], label="shared")
    axes.set(xlabel="time in seconds", ylabel="MiB", ylim=(0, trace.memory / _MIB * 1.05))
    _name(axes, "Bytes private and shared")


def _draw_places(axes: Axes, events: list[Event], begun: int) -> None:
    # In the order of time, so that neither of the two hides the other.
    done = _thinned([event for event in events if event.changed])
    times = [(event.time - begun) / 1e9 for event in done]
    colours = [_COLOURS[event.done_to] for event in done]
    first = [event.done_gpa / _MIB for event in done]
    last = [(event.done_gpa + event.done_size) / _MIB for event in done]
    axes.vlines(times, first, last, colors=colours, linewidth=2)
    # Of a page the line would not be seen.
    axes.scatter(times, first, c=colours, s=5, marker="s", linewidths=0)
    for to, colour in _COLOURS.items():
        axes.plot([], [], "s", color=colour, label=f"to {to}")
    axes.set(xlabel="time in seconds", ylabel="gpa in MiB")
    _name(axes, "Conversions")


def _draw_latencies(axes: Axes, events: list[Event]) -> None:
    for kind in _ASKED:
        times = sorted(event.latency / 1000 for event in events if event.kind == kind)
        if times:
            part = [100 * (at + 1) / len(times) for at in range(len(times))]
            # From 0 on, which is all that there is to see of one request.
            curve = _thinned([(times[0], 0.0), *zip(times, part, strict=True)])
            axes.step([time for time, _ in curve], [each for _, each in curve], where="post", label=kind)
            axes.set_xscale("log", subs=[2, 5])
            axes.xaxis.set_major_formatter(_plain)
            axes.xaxis.set_minor_formatter(_plain)
    axes.set(xlabel="latency in µs", ylabel="requests that took no longer, in %", ylim=(0, 101))
    _name(axes, "Latency, exit to resume")


def _plain(value: float, _position: object) -> str:
    return f"{value:g}"


def _name(axes: Axes, title: str) -> None:
    """The title, and beside it what the colours mean, where it covers nothing."""
    axes.set_title(title, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            ncols=len(labels),
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.2,
            frameon=False,
            handlelength=1.2,
            columnspacing=1.2,
        )


def _draw_decisions(axes: Axes, events: list[Event], symbols: Mapping[int, str]) -> None:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        if event.kind in _ASKED:
            counts[symbols.get(event.rip, "").partition("+")[0] or f"({event.kind})"][event.decision] += 1
    ranked = sorted(counts.items(), key=lambda each: each[1].total())
    if len(ranked) > _BARS:
        rest = sum((each for _, each in ranked[: -_BARS + 1]), Counter[str]())
        ranked = [(f"{len(ranked) - _BARS + 1} others", rest), *ranked[-_BARS + 1 :]]
    names, left = [name for name, _ in ranked], [0] * len(ranked)
    for decision, colour in _DECISIONS.items():
        widths = [count[decision] for _, count in ranked]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=decision)
            left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set(xlabel="requests", ylim=(min(0, len(ranked) - _SLOTS) - 0.6, max(1, len(ranked)) - 0.4))
    _name(axes, "Requests by decision")
