"""Every block of code and every command of README and docs is run, or parsed where a comment before it says why.

A file's blocks run in their order, in one folder, which has the examples and a policy. A block with a title is a file.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from pagegate.cli import cli

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- parsed: (?P<why>[^\n]+) -->\n)?```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
POLICY = "from pagegate import policies\npolicy = policies.Allow()\n"
ALL_LANGUAGES = ("python", "sh", "text", "")


@dataclass
class Block:
    path: Path
    line: int
    info: str
    text: str
    why: str | None

    @property
    def language(self):
        return self.info.partition(" ")[0]

    @property
    def title(self):
        found = re.search(r'title="([^"]+)"', self.info)
        return found and found[1]

    def __str__(self):
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path):
    text = path.read_text()
    return [
        Block(path, text.count("\n", 0, found.start()) + 1, found["info"], found["text"], found["why"])
        for found in BLOCK.finditer(text)
    ]


EVERY = [block for path in FILES for block in blocks(path)]
RUN = [
    path for path in FILES if any(block.why is None and block.language in ("python", "sh") for block in blocks(path))
]


def needs(path):
    """The marks of the test of this file's blocks."""
    return [pytest.mark.userfault] if "lazy=True" in path.read_text() else []


@pytest.mark.kvm
@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=needs(path), id=path.relative_to(ROOT).as_posix()) for path in RUN]
)
def test_the_blocks_run(path, tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "mine.py").write_text(POLICY)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "EXAMPLES": str(ROOT / "examples"),
    }
    for block in blocks(path):
        if block.why is not None or block.language not in ("python", "sh"):
            continue
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        code = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-euc", block.text]
        done = subprocess.run(
            code, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("block", [block for block in EVERY if block.language in ("python", "sh")], ids=str)
def test_the_blocks_can_be_read(block):
    if block.language == "python":
        ast.parse(block.text)
        return
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for words in commands(block.text):
        parse(words)


def commands(text):
    """The arguments of each `pagegate` in it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
        words.whitespace_split = True
        words = [*words, ";"]
        for at, word in enumerate(words):
            if word == "pagegate":
                end = next(end for end in range(at, len(words)) if re.fullmatch(r"[|&;()]+|--", words[end]))
                yield words[at + 1 : end]


def parse(words):
    """Checks a command's name and options, as click does before it runs it."""
    group, path = cli, "pagegate"
    ctx = click.Context(cli, info_name=path, resilient_parsing=True)
    while isinstance(group, click.Group) and words:
        command = group.get_command(ctx, words[0])
        if command is None:
            assert words[0].startswith("-"), f"there is no command {path} {words[0]}"
            break
        group, path, words = command, f"{path} {words[0]}", words[1:]
        ctx = click.Context(group, info_name=path, parent=ctx, resilient_parsing=True)
    known = {name for each in group.get_params(ctx) for name in (*each.opts, *each.secondary_opts)}
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    assert [option for option in options if option not in known] == [], path


def test_a_wrong_command_would_be_found():
    parse(["run", "-p", "mine.py", "--guest", "touch"])
    for wrong in (["rum"], ["run", "--odd"], ["guest", "fetch", "--odd"]):
        with pytest.raises(AssertionError):
            parse(wrong)


def test_every_language_is_known():
    assert [str(block) for block in EVERY if block.language not in ALL_LANGUAGES] == []


def test_what_is_only_parsed_says_why():
    reasons = [block.why for block in EVERY if block.why is not None]
    assert all(len(why.split()) > 3 for why in reasons)
    assert len([block for block in EVERY if block.language in ("python", "sh") and block.why is None]) > 20


def test_ci_runs_the_command_for_the_tests():
    last = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert last in [block.text.strip() for block in blocks(ROOT / "README.md")]


def test_every_page_is_in_the_navigation():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in FILES[1:]}
    told = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert pages == told


def test_links_lead_somewhere():
    for path in [*FILES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_the_site_builds_strictly_and_without_a_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    # unshare gives it a network of its own, where that is allowed: then nothing is fetched.
    alone = ["unshare", "--map-root-user", "--net"]
    allowed = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
    done = subprocess.run(
        [*(alone if allowed else []), sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "python.html").read_text()
    import pagegate

    names = [name for name in pagegate.__all__ if name != "__version__" and not inspect.ismodule(vars(pagegate)[name])]
    names += [*pagegate.policies.__all__, *pagegate.devices.__all__, "Marks"]
    told = {each.rpartition(".")[2] for each in re.findall(r'id="pagegate\.([\w.]+)"', page)}
    assert sorted(set(names) - told) == []
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text()
    assert all(f"pagegate {name}" in commands for name in cli.list_commands(click.Context(cli)))
    assert not re.search(r'(?:src|href)="https?://(?!squidfunk)[^"]+\.(?:js|css|woff2?)"', page)


def test_the_reference_of_the_command_line_is_the_same_at_any_terminal() -> None:
    code = "import runpy; print(runpy.run_path('docs/hooks.py')['on_page_markdown']('<!-- the commands -->'))"
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": columns},
        ).stdout
        for columns in ("40", "80", "200")
    }
    assert len(made) == 1
    assert "Usage: pagegate testbed [OPTIONS] -- COMMAND..." in made.pop()
