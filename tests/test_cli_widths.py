"""What commands print at terminals of 40, 80 and 200 columns: no line is longer, and no word is cut."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from click import Group
from pagegate import units
from pagegate.cli import cli
from pagegate.trace import synthetic

from .cli_parts import program
from .test_cli_output import ESCAPE, at_terminal, run

WIDTHS = [40, 80, 200]


def commands(group=cli, path=()):
    """The paths of all commands."""
    found = [path]
    for name in group.list_commands(None) if isinstance(group, Group) else ():
        found += commands(group.get_command(None, name), (*path, name))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("widths")
    synthetic(300).write(folder / "some.parquet")
    (folder / "mine.py").write_text(
        "from pagegate import Convert, Policy\n\n\nclass Mine(Policy):\n"
        "    def memory_fault(self, fault):\n        return Convert()\n"
    )
    return folder


def printed(width, arguments):
    """What it prints, with the lines at least one of whose words is longer than the terminal's left out."""
    _, text = at_terminal(width, program(*arguments))
    lines = ESCAPE.sub("", text).replace("\r", "\n").splitlines()
    assert lines
    return [line for line in lines if max(map(len, line.split()), default=0) + 4 <= width]


@pytest.mark.parametrize("path", commands(), ids=lambda path: " ".join(path) or "pagegate")
def test_help(path) -> None:
    def told(lines):
        # A line may end after a hyphen, and in a list of words to choose from.
        return re.sub(r"([-|])\n *", r"\1", "\n".join(lines)).split()

    everything = told(printed(200, (*path, "--help")))
    for width in WIDTHS:
        lines = printed(width, (*path, "--help"))
        assert max(map(len, lines)) <= width
        # Only a word that is longer than its column is broken.
        assert Counter(each for each in everything if len(each) <= width // 2) - Counter(told(lines)) == Counter()


MESSAGES = {
    "no image": ("run",),
    "no guest": ("run", "--guest", "nope"),
    "no policy": ("run", "-p", "nope.py", "--guest", "demo"),
    "a bracket": ("run", "-p", "Quota(8M", "--guest", "demo"),
    "a size": ("run", "--memory", "64X", "--guest", "demo"),
    "no kernel": ("boot", "nokernel"),
    "no trace": ("events", "mine.py"),
    "no option": ("replay", "some.parquet", "-p", "mine.py", "-o", "x=1"),
    "replay without a policy": ("replay", "some.parquet"),
    "a gif": ("plot", "some.parquet", "-o", "x.gif"),
    "no command": ("testbed", "ls"),
    "version": ("--version",),
}


@pytest.mark.parametrize("arguments", MESSAGES.values(), ids=MESSAGES.keys())
def test_messages(arguments, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for width in WIDTHS:
        assert max(map(len, printed(width, arguments))) <= width
    _, out, err = run(*arguments)
    assert [line for line in (out + err).splitlines() if line != line.rstrip()] == []
    # In a pipe each sentence is one line, so that it can be searched for.
    assert len((out + err).splitlines()) <= 9


TRACES = {
    "events": ("events", "some.parquet"),
    "sums": ("events", "some.parquet", "--by", "kind", "--by", "size", "--by", "outcome"),
    "pages": ("events", "some.parquet", "--by", "page"),
    "replay": ("replay", "some.parquet", "-p", "DenyAll()", "-p", "Quota(8M)"),
}


@pytest.mark.parametrize("arguments", TRACES.values(), ids=TRACES.keys())
def test_traces(arguments, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    _, out, _ = run(*arguments)
    assert [line for line in out.splitlines() if line != line.rstrip()] == []
    assert "…" not in out
    for width in WIDTHS:
        lines = printed(width, arguments)
        assert max(map(len, lines)) <= width
        told = ESCAPE.sub("", at_terminal(width, program(*arguments))[1])
        assert sorted(told.split()) == sorted(out.split()), "each word is there, and whole"
        if arguments[0] == "events":
            assert "" not in [line.strip() for line in lines], "there are no empty rows"


def test_a_request_is_one_line_at_80_columns(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    told = ESCAPE.sub("", at_terminal(80, program("events", "some.parquet"))[1]).splitlines()
    assert len(told) == 1 + 300
    assert max(map(len, told)) <= 80


@pytest.mark.kvm
@pytest.mark.parametrize("arguments", [("doctor",), ("bench", "--requests", "50")], ids=lambda a: a[0])
def test_tables(arguments) -> None:
    for width in WIDTHS:
        lines = printed(width, arguments)
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)


def test_what_a_new_user_meets(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert "name either an IMAGE or another guest, as --guest demo" in run("run", "-p", "mine.py")[2]
    assert "Default: the bundled file." in " ".join(run("demo", "--help")[1].split())
    assert "Default: everything is allowed." in " ".join(run("run", "--help")[1].split())


def test_the_size_of_a_request_for_everything() -> None:
    assert units.size((1 << 64) - 1) == "≥16 EiB"
    assert units.size(2 << 20) == "2 MiB"
