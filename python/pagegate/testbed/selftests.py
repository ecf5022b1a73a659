"""The kernel's own tests of private memory, built from its source and run in the testbed.

They show whether the testbed's machine works: a failure of theirs is a fault of the kernel or of the emulation, not of
pagegate.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pagegate.errors import TestbedError
from pagegate.testbed.apt import choose_source
from pagegate.testbed.builder import available_cpus, call, locked, require_tools, unpacked_source
from pagegate.testbed.kernel import Source, cache_directory, find_kernel, image_release
from pagegate.testbed.machine import DEFAULT_CPUS, DEFAULT_MEMORY, run
from pagegate.testbed.progress import Reporter, Silent

TESTS = (
    "private_mem_conversions_test",
    "private_mem_kvm_exits_test",
    "guest_memfd_test",
    "set_memory_region_test",
    "pre_fault_memory_test",
)

TEST_LIMIT = 900
"""Seconds after which a test is killed and counts as failed."""

_SKIPPED = 4
"""Exit status of a test that this kernel or CPU does not support."""

_OUTPUT_LINES = 15
_COMPLETE = ".complete"

# What runs in the machine. It keeps each test's output to itself, and passes its last lines on if the test failed.
_SCRIPT = r"""
limit=$1 lines=$2
shift 2
for test; do
    name=${test##*/}
    begun=$(cut -d. -f1 /proc/uptime)
    timeout -s KILL "$limit" "$test" >/dev/shm/output 2>&1 </dev/null
    status=$?
    ended=$(cut -d. -f1 /proc/uptime)
    if [ $status -ne 0 ]; then tail -n "$lines" /dev/shm/output | sed 's/^/output /'; fi
    echo "ended $name $status $((ended - begun))"
done
"""


@dataclass(frozen=True)
class Outcome:
    """How one test ended.

    `seconds` is by the machine's clock; `output` is the last lines of a test that did not pass.
    """

    name: str
    result: Literal["passed", "failed", "skipped"]
    seconds: int
    output: str = ""


def selftest(  # noqa: PLR0913
    kernel: str | os.PathLike[str] | None = None,
    *,
    cpus: int = DEFAULT_CPUS,
    memory: int | str = DEFAULT_MEMORY,
    suite: str | None = None,
    reporter: Reporter | None = None,
    on_outcome: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Run the kernel's tests that `TESTS` names in one machine, and return how each ended.

    The tests are those of the kernel's own series, because others may test features that it does not have.

    Args:
        kernel: the kernel image; None looks for one as `find_kernel` does.
        cpus: how many CPUs the machine has.
        memory: the machine's memory, such as 512M or 4G.
        suite: a Debian suite to take the tests' source from instead of those that apt is set up for.
        reporter: is told how far building the tests is.
        on_outcome: is called as each test ends.

    Raises:
        TestbedError: the tests cannot be built, or the machine died.

    """
    report = reporter or Silent()
    image = find_kernel(kernel)
    major, minor, *_ = image_release(image)
    programs = _programs((major, minor), suite, report)
    report.stage(f"running the tests of Linux {major}.{minor} in the testbed")
    sink = _Outcomes(on_outcome)
    command = ["sh", "-c", _SCRIPT, "sh", str(TEST_LIMIT), str(_OUTPUT_LINES), *map(str, programs)]
    # Their directory is mounted because the cache may be in a place where the machine has a file system of its own.
    status = run(command, kernel=image, cpus=cpus, memory=memory, rw=[programs[0].parent], stdout=sink)
    if status != 0 or len(sink.outcomes) != len(programs):
        raise TestbedError(
            f"the tests' run ended with status {status} after {len(sink.outcomes)} of {len(programs)} tests"
        )
    return sink.outcomes


class _Outcomes:
    """Turns the output of `_SCRIPT` into outcomes."""

    def __init__(self, on_outcome: Callable[[Outcome], object] | None) -> None:
        self.outcomes: list[Outcome] = []
        self._on_outcome = on_outcome
        self._pending = b""
        self._output: list[str] = []

    def write(self, data: bytes, /) -> object:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            self._take(line.decode(errors="replace"))
        return len(data)

    def flush(self) -> object:
        return None

    def _take(self, line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "output":
            self._output.append(rest)
            return
        ended = re.fullmatch(r"(\S+) (\d+) (\d+)", rest)
        if kind != "ended" or ended is None:
            return
        status = int(ended[2])
        result: Literal["passed", "failed", "skipped"] = (
            "passed" if status == 0 else "skipped" if status == _SKIPPED else "failed"
        )
        if result == "failed":
            self._output.append(f"exit status {status}" if status != 137 else f"did not end within {TEST_LIMIT} s")
        outcome = Outcome(ended[1], result, int(ended[3]), "\n".join(self._output))
        self._output = []
        self.outcomes.append(outcome)
        if self._on_outcome is not None:
            self._on_outcome(outcome)


def _programs(series: tuple[int, int], suite: str | None, report: Reporter) -> list[Path]:
    """Return the built tests of this series; build them first if they are not in the cache."""
    package = f"linux-source-{series[0]}.{series[1]}"
    store = cache_directory() / "selftests"
    with locked(report):
        built = sorted(store.glob(f"{package}_*/{_COMPLETE}"), key=lambda path: path.stat().st_mtime)
        if built:
            return [built[-1].parent / name for name in TESTS]
        require_tools()
        source = _unpacked(package) or choose_source(suite, series)
        tree = unpacked_source(source, suite, report)
        directory = store / source.name
        directory.mkdir(parents=True, exist_ok=True)
        _compile(tree, directory, report)
        (directory / _COMPLETE).touch()
        return [directory / name for name in TESTS]


def _unpacked(package: str) -> Source | None:
    trees = [
        path
        for path in (cache_directory() / "sources").glob(f"{package}_*")
        if path.is_dir() and path.suffix != ".partial"
    ]
    trees.sort(key=lambda path: path.stat().st_mtime)
    return Source(package, trees[-1].name.removeprefix(f"{package}_")) if trees else None


def _compile(tree: Path, directory: Path, report: Reporter) -> None:
    report.stage("compiling the kernel's tests")
    headers, objects, log = directory / "headers", directory / "objects", directory / "build.log"
    for part in (headers, objects):
        part.mkdir(exist_ok=True)
    call(["make", "-C", str(tree), f"O={headers}", "ARCH=x86_64", "headers"], log)
    tests = tree / "tools/testing/selftests/kvm"
    # In which directory a test is depends on the series.
    sources = {path.stem: path.relative_to(tests) for path in tests.rglob("*_test.c")}
    missing = [name for name in TESTS if name not in sources]
    if missing:
        raise TestbedError(f"this kernel source has no {missing[0]}")
    targets = {name: objects / sources[name].with_suffix("") for name in TESTS}
    settings = [
        "ARCH=x86_64",
        f"OUTPUT={objects}",
        f"INSTALL_HDR_PATH={headers}/usr",
        f"KHDR_INCLUDES=-isystem {headers}/usr/include",
    ]
    call(["make", "-C", str(tests), *settings, f"-j{available_cpus()}", *map(str, targets.values())], log)
    for name, target in targets.items():
        target.replace(directory / name)
