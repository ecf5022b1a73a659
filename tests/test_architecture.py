"""Source files import only from their own room or from lower ones, and never in a circle.

The rooms and their order are those of docs/architecture.md. An import, called an arrow here, is a path in the code that
starts with ``crate``, ``super``, ``self`` or a child module, in a ``use`` or written out. Declaring a child is none.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "rust" / "core" / "src"
BINDING = ROOT / "rust" / "py"
BASELINE = ROOT / "rust" / "baseline" / "src"

# Lowest floor first; each name is a file or a folder. A file may import from lower floors, and within its own folder
# anything as long as there is no circle.
FLOORS = {
    CORE: [
        ["errno"],
        ["process"],
        ["clock"],
        ["allocation"],
        ["error"],
        ["input"],
        ["x86"],
        ["hypervisor"],
        ["memory"],
        ["policy"],
        ["events"],
        ["devices"],
        ["boot"],
        ["vcpu"],
        ["trace"],
        ["machine"],
        ["lib"],
    ],
    BINDING: [
        ["interpreter"],
        ["policy", "events", "devices", "baseline"],
        ["testing"],
        ["machine"],
        ["trace"],
        ["lib"],
    ],
}

LONGEST = 500

Module = tuple[str, ...]


def tokens(text: str) -> str:
    """The code without comments and the contents of strings."""
    text = re.sub(r'"(?:\\.|[^"\\])*"', '""', text)
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def module_of(root: Path, path: Path) -> Module:
    parts = path.relative_to(root).with_suffix("").parts
    if parts[-1] in ("mod", "lib"):
        parts = parts[:-1]
    return parts


def spread(tree: str) -> list[str]:
    """``a::{b, c::{d, e}}`` as ``a::b``, ``a::c::d``, ``a::c::e``."""
    start = tree.find("{")
    if start < 0:
        return [tree.strip()]
    head, depth, parts, part = tree[:start].strip(), 0, [], ""
    for char in tree[start + 1 : tree.rfind("}")]:
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    return [head + each for piece in [*parts, part] if piece.strip() for each in spread(piece.strip())]


def paths_in(code: str, children: set[str]) -> list[str]:
    """The paths that lead to other files; those that begin with a child module are relative to the file's own."""
    first = "|".join(["crate", "super", "self", *sorted(children)])
    found = []
    for use in re.findall(rf"\buse\s+((?:{first})\b[^;]*);", code):
        found += [path.split(" as ")[0].strip() for path in spread(re.sub(r"\s+", " ", use))]
    rest = re.sub(r"\buse\s+[^;]*;", "", code)
    found += re.findall(rf"(?<![\w:])(?:{first})(?:::\w+)+", rest)
    return found


def arrows(root: Path) -> dict[Path, set[Path]]:
    files = {path: module_of(root, path) for path in root.rglob("*.rs") if path.name != "tests.rs"}
    by_module = {module: path for path, module in files.items()}
    found: dict[Path, set[Path]] = {}
    for path, module in files.items():
        found[path] = set()
        children = {other[-1] for other in by_module if other and other[:-1] == module}
        for written in paths_in(tokens(path.read_text()), children):
            here, steps = module, written.split("::")
            if steps[0] == "crate":
                here, steps = (), steps[1:]
            while steps and steps[0] in ("super", "self"):
                here = here[:-1] if steps[0] == "super" else here
                steps = steps[1:]
            target = here
            while steps and (*target, steps[0]) in by_module:
                target, steps = (*target, steps[0]), steps[1:]
            # The module of a folder is its mod.rs.
            if by_module.get(target, path) != path:
                found[path].add(by_module[target])
    return found


def circles(graph: dict[Path, set[Path]]) -> list[list[Path]]:
    """Groups of files that all import each other, directly or not."""

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        todo = [start]
        while todo:
            for target in graph.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    reach = {path: reached(path) for path in graph}
    groups = {frozenset([path, *(other for other in reach[path] if path in reach[other])]) for path in graph}
    return [sorted(group) for group in groups if len(group) > 1]


def upwards(root: Path, graph: dict[Path, set[Path]]) -> list[str]:
    floor = {name: number for number, names in enumerate(FLOORS[root]) for name in names}
    room = {path: path.relative_to(root).with_suffix("").parts[0] for path in graph}
    return [
        f"{path.relative_to(root)} -> {target.relative_to(root)}"
        for path, targets in graph.items()
        for target in targets
        if room[path] != room[target] and floor[room[target]] >= floor[room[path]]
    ]


@pytest.mark.parametrize("root", [CORE, BINDING, BASELINE], ids=["core", "binding", "baseline"])
def test_no_circles(root: Path) -> None:
    graph = arrows(root)
    assert sum(map(len, graph.values())) > len(graph), "hardly any arrows were found"
    assert circles(graph) == []


@pytest.mark.parametrize("root", list(FLOORS), ids=["core", "binding"])
def test_arrows_point_downwards(root: Path) -> None:
    graph = arrows(root)
    rooms = {path.relative_to(root).with_suffix("").parts[0] for path in graph}
    assert rooms == {name for names in FLOORS[root] for name in names}, "a room without a floor"
    assert upwards(root, graph) == []


def test_the_core_does_not_know_python() -> None:
    for path in CORE.rglob("*.rs"):
        assert "pyo3" not in tokens(path.read_text()), path


def test_a_circle_and_an_upward_arrow_would_be_found(tmp_path: Path) -> None:
    for name, text in {
        "lib.rs": "mod memory; mod vcpu;",
        "memory/mod.rs": "pub mod map; pub mod states; pub use states::Held; pub struct Layout;",
        "memory/map.rs": "use super::states::{self, Held};",
        "memory/states.rs": "use super::Layout; fn f() { crate::memory::map::look(); } // use crate::vcpu::kick::Kick;",
        "vcpu/mod.rs": "pub mod kick;",
        "vcpu/kick.rs": "use crate::memory::{map::Map, states};",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = arrows(tmp_path)
    named = {path.relative_to(tmp_path).as_posix(): {t.relative_to(tmp_path).as_posix() for t in targets}
             for path, targets in graph.items()}  # fmt: skip
    assert named["vcpu/kick.rs"] == {"memory/map.rs", "memory/states.rs"}
    assert [[path.name for path in circle] for circle in circles(graph)] == [["map.rs", "mod.rs", "states.rs"]]
    FLOORS[tmp_path] = [["vcpu"], ["memory"], ["lib"]]
    try:
        assert sorted(upwards(tmp_path, graph)) == ["vcpu/kick.rs -> memory/map.rs", "vcpu/kick.rs -> memory/states.rs"]
    finally:
        del FLOORS[tmp_path]


def test_long_files_say_why() -> None:
    folders = ["rust", "python", "benches", "tests", "examples"]
    for folder in folders:
        for path in [*(ROOT / folder).rglob("*.rs"), *(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.pyi")]:
            lines = path.read_text().splitlines()
            if len(lines) > LONGEST:
                head = " ".join(lines[:12]).lower()
                assert "one file" in head, f"{path.relative_to(ROOT)} has {len(lines)} lines and does not say why"
