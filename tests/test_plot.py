"""Plots of traces, from Python and from the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pagegate import plot, trace

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    path = tmp_path_factory.mktemp("plots") / "some.parquet"
    trace.synthetic(2000, vcpus=2).write(path)
    return path


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pagegate", "plot", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_parts_say_what_is_in_the_trace(some):
    read = trace.read(some)
    events = list(read)
    rips = {event.rip for event in events if event.rip}
    figure = plot.figure(read, symbols=dict.fromkeys(rips, "swiotlb_map+0x1f"))
    states, places, latencies, decisions = figure.axes
    private, shared = (line.get_ydata() for line in states.lines)
    assert all(
        one + other == pytest.approx(read.memory / (1 << 20)) for one, other in zip(private, shared, strict=True)
    )
    changed = sum(event.changed * (1 if event.done_to == "shared" else -1) for event in events)
    assert shared[-1] == pytest.approx((read.shared_bytes + changed) / (1 << 20))
    drawn = len(places.collections[0].get_segments())
    assert len(places.collections[1].get_offsets()) == drawn
    assert drawn == sum(event.changed > 0 for event in events)
    assert {line.get_label() for line in latencies.lines} == {"implicit", "explicit"}
    longest = {kind: max(event.latency for event in events if event.kind == kind) for kind in ("implicit", "explicit")}
    assert {line.get_label(): line.get_xdata()[-1] * 1000 for line in latencies.lines} == pytest.approx(longest)
    assert sum(bar.get_width() for bar in decisions.patches) == len(events)
    assert "swiotlb_map" in [text.get_text() for text in decisions.get_yticklabels()] or not rips


def test_axes_have_units_and_legends_cover_nothing(some):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot.figure(some)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("time in seconds", "MiB"),
        ("time in seconds", "gpa in MiB"),
        ("latency in µs", "requests that took no longer, in %"),
        ("requests", ""),
    ]
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        title = axes.title if axes.title.get_text() else axes._left_title
        assert legend.y0 >= axes.get_window_extent().y1
        assert not legend.overlaps(title.get_window_extent())
        # Written as they are read, not as powers.
        assert not any("$" in text.get_text() for text in axes.get_xticklabels(which="both"))


@pytest.mark.parametrize("requests", [0, 1])
def test_a_small_trace_is_drawn(requests, tmp_path):
    plot.save(plot.figure(trace.synthetic(requests)), tmp_path / "small.png")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.html", b"<!doctype html>")]
)
def test_the_command_writes_each_format(some, tmp_path, name, begins):
    done = command(some, "-o", tmp_path / name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / name).read_bytes().startswith(begins)
    if name == "a.html":
        text = (tmp_path / name).read_text()
        assert text.count("<svg") == 1
        assert "some.parquet" in text
        assert "<script" not in text


def test_another_suffix_and_a_file_that_is_no_trace_are_2(some, tmp_path):
    done = command(some, "-o", tmp_path / "a.jpeg")
    assert (done.returncode, "must end in one of .png" in done.stderr) == (2, True)
    (tmp_path / "no.parquet").write_bytes(b"no")
    assert command(tmp_path / "no.parquet", "-o", tmp_path / "a.png").returncode == 2


def test_without_matplotlib_it_says_how_to_get_it(some, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from pagegate.cli import main\n"
        f"sys.argv = ['pagegate', 'plot', {str(some)!r}, '-o', {str(tmp_path / 'a.png')!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pip install 'pagegate[plot]'" in done.stderr


def test_a_long_trace_is_thinned():
    read = trace.synthetic(60_000)
    figure = plot.figure(read)
    assert len(figure.axes[0].lines[0].get_xdata()) <= 20_001
    assert len(figure.axes[1].collections[0].get_segments()) <= 20_001
