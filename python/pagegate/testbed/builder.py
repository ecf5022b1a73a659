"""Build the testbed's kernel from Debian's kernel source.

It needs no root: the source package is downloaded and unpacked, not installed. An interrupted build resumes, because
the unpacked source and the objects stay; only a finished image gets the name that `find_kernel` looks for.
"""
# Starting the host's tools, by the names that PATH resolves, is what this module does.
# ruff: noqa: S603, S607

import contextlib
import fcntl
import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from pagegate.errors import TestbedError
from pagegate.testbed.apt import ELSEWHERE, apt_for, choose_source
from pagegate.testbed.kernel import IMAGE, Source, cache_directory, cache_errors, fragment, kernel_directory, publish
from pagegate.testbed.progress import Reporter, Silent
from pagegate.testbed.supervisor import stopped_by_signals

_ABOUT_FILES = 95_000
_ABOUT_OBJECTS = 1_900
_LOG_LINES = 15

_PROGRAMS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "xz": "xz-utils",
    "tar": "tar",
}
_HEADERS = {"gelf.h": "libelf-dev", "openssl/ssl.h": "libssl-dev"}

# Without one of these the machine would not boot, or would lack what the testbed is for. Other options of the fragment
# do not exist in every release.
_NEEDED = (
    *("64BIT", "SMP", "PRINTK", "BINFMT_ELF", "BINFMT_SCRIPT", "MULTIUSER", "HIGH_RES_TIMERS", "X86_X2APIC"),
    *("TTY", "UNIX98_PTYS", "SERIAL_8250_CONSOLE", "VIRTIO_CONSOLE", "PCI", "ACPI", "VIRTIO_PCI", "MAGIC_SYSRQ"),
    *("DEVTMPFS", "DEVTMPFS_MOUNT", "PROC_FS", "SYSFS", "TMPFS", "SHMEM", "OVERLAY_FS", "FILE_LOCKING"),
    *("NET", "UNIX", "INET", "NET_9P", "NET_9P_VIRTIO", "9P_FS"),
    *("FUTEX", "EPOLL", "EVENTFD", "SIGNALFD", "TIMERFD", "POSIX_TIMERS", "MEMFD_CREATE", "USERFAULTFD"),
    *("KVM", "KVM_AMD", "KVM_SW_PROTECTED_VM", "MEMORY_FAILURE", "CGROUPS", "MEMCG"),
)


def build(jobs: int | None = None, *, suite: str | None = None, reporter: Reporter | None = None) -> Path:
    """Build the testbed's kernel, if it is not built yet, and return its image.

    Args:
        jobs: how many compilers run at once; None is one for each CPU.
        suite: a Debian suite, as trixie-backports, to take the source from instead of those that apt is set up for. It
            is fetched from a Debian archive that apt's sources name.
        reporter: is told how far the build is.

    Raises:
        TestbedError: a tool or the source is missing, or the build failed.

    """
    report = reporter or Silent()
    require_tools()
    with locked(report):
        source = choose_source(suite)
        directory = kernel_directory(source)
        if (directory / IMAGE).exists():
            return directory / IMAGE
        tree = unpacked_source(source, suite, report)
        objects = directory / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        log = directory / "build.log"
        make = ["make", "-C", str(tree), f"O={objects}", "ARCH=x86_64"]
        _configure(tree, objects, make, log, report)
        report.stage(f"compiling {source.package} {source.version}", _ABOUT_OBJECTS)
        counted = _Counter(report, re.compile(r"\s+(CC|AS|AR|LD|HOSTCC|HOSTLD|GEN)\s"))
        call([*make, f"-j{jobs or available_cpus()}", "bzImage"], log, on_line=counted, environment=_MAKE_ENVIRONMENT)
        image = publish(objects / "arch/x86/boot/bzImage", source)
        shutil.rmtree(objects)
        return image


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


# So that the image depends on the source and the configuration only, not on who builds it and when.
_MAKE_ENVIRONMENT = {
    "KBUILD_BUILD_USER": "pagegate",
    "KBUILD_BUILD_HOST": "testbed",
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_VERSION": "1",
}


def missing_packages() -> list[str]:
    """Return the packages, by their names in Debian and Ubuntu, that compiling a kernel needs and this host lacks."""
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    # Headers are looked for with gcc. Without it all of their packages are named; apt skips those that are installed.
    no_compiler = "gcc" in missing
    return missing + [package for header, package in _HEADERS.items() if no_compiler or not _has_header(header)]


def require_tools() -> None:
    """Check that this host has what building a kernel needs.

    Raises:
        TestbedError: it does not; the message names every package that is missing.

    """
    missing = missing_packages()
    if missing:
        raise TestbedError(f"building the kernel needs {_enumerated(missing)}: apt-get install {' '.join(missing)}")
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise TestbedError(
            "the kernel is built from Debian's package linux-source, and this host has no apt to get it with: "
            f"{ELSEWHERE}"
        )


def _has_header(header: str) -> bool:
    probe = subprocess.run(
        ["gcc", "-E", "-x", "c", "-"], input=f"#include <{header}>\n", text=True, capture_output=True, check=False
    )
    return probe.returncode == 0


def _enumerated(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def unpacked_source(source: Source, suite: str | None, report: Reporter) -> Path:
    """Return the directory of this source; download and unpack it first if it is not there.

    Raises:
        TestbedError: it cannot be downloaded or unpacked.

    """
    tree = cache_directory() / "sources" / source.name
    if tree.is_dir():
        return tree
    partial = tree.with_name(tree.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    package = _downloaded(source, suite, report)
    report.stage(f"unpacking {source.package} {source.version}", _ABOUT_FILES)
    archive = f"./usr/src/{source.package}.tar.xz"
    log = tree.with_name(tree.name + ".log")
    script = 'dpkg-deb --fsys-tarfile "$1" | tar -xO "$2" | xz -dc -T0 | tar -xv --strip-components=1 -C "$3"'
    command = ["bash", "-o", "pipefail", "-c", script, "bash", str(package), archive, str(partial)]
    call(command, log, on_line=_Counter(report, re.compile("")), keep_lines=False)
    partial.rename(tree)
    shutil.rmtree(package.parent)
    log.unlink()
    return tree


def _downloaded(source: Source, suite: str | None, report: Reporter) -> Path:
    directory = cache_directory() / "downloads" / source.name
    directory.mkdir(parents=True, exist_ok=True)
    finished = list(directory.glob("*.deb"))
    if finished:
        return finished[0]
    apt = apt_for(suite)
    with tempfile.TemporaryDirectory(dir=directory, prefix="partial-") as partial:
        wanted = f"{source.package}={source.version}"
        described = apt.output("apt-get", "download", "--print-uris", wanted)
        size = re.search(r" (\d+) SHA", described)
        total = int(size[1]) >> 20 if size else None
        report.stage(f"downloading {source.package} {source.version}", total, "MiB")

        def measure() -> None:
            with contextlib.suppress(FileNotFoundError):
                report.reach(sum(file.stat().st_size for file in Path(partial).iterdir()) >> 20)

        call(
            ["apt-get", *apt.options, "--quiet", "download", wanted],
            directory / "download.log",
            directory=Path(partial),
            on_wait=measure,
        )
        (package,) = Path(partial).glob("*.deb")
        return package.rename(directory / package.name)


def _configure(tree: Path, objects: Path, make: Sequence[str], log: Path, report: Reporter) -> None:
    ready = objects / ".configured"
    if ready.exists():
        return
    report.stage("configuring")
    wanted = objects / "kernel.fragment"
    wanted.write_text(fragment())
    call([*make, "tinyconfig"], log)
    call(
        [
            str(tree / "scripts/kconfig/merge_config.sh"),
            "-m",
            "-O",
            str(objects),
            str(objects / ".config"),
            str(wanted),
        ],
        log,
        directory=tree,
    )
    call([*make, "olddefconfig"], log)
    lost = lost_options((objects / ".config").read_text())
    if lost:
        raise TestbedError(
            f"the configuration of this kernel source does not grant {_enumerated(lost)}, without which the testbed "
            f"cannot work; {log} has the details"
        )
    ready.touch()


def lost_options(config: str) -> list[str]:
    """Return the options, as CONFIG_KVM, that the testbed needs and a finished configuration lacks."""
    granted = set(config.splitlines())
    return [f"CONFIG_{name}" for name in _NEEDED if f"CONFIG_{name}=y" not in granted]


class _Counter:
    """Counts the lines of a program's output that match, and reports them as steps."""

    def __init__(self, report: Reporter, pattern: re.Pattern[str]) -> None:
        self._report = report
        self._pattern = pattern
        self._count = 0

    def __call__(self, line: str) -> None:
        if self._pattern.match(line):
            self._count += 1
            self._report.reach(self._count)


@contextlib.contextmanager
def locked(report: Reporter) -> Iterator[None]:
    """Let only one build of this user run at a time; others wait here."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache_errors())
        cache_directory().mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((cache_directory() / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.stage("waiting for another build to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def call(  # noqa: PLR0913
    command: Sequence[str],
    log: Path,
    *,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    on_wait: Callable[[], None] | None = None,
    keep_lines: bool = True,
) -> None:
    """Run a program to its end, and append its output to the log.

    Args:
        command: the program and its arguments.
        log: the log file.
        directory: its working directory; None is this process's.
        environment: variables to set as well as this process's.
        on_line: is called with each line of output.
        on_wait: is called each half second without output.
        keep_lines: False writes only the last lines to the log.

    Raises:
        TestbedError: the program failed; the message ends with its last lines.

    """
    tail: list[str] = []
    # A group of its own, so that Ctrl-C goes to this process only, which then ends the whole group.
    process = subprocess.Popen(
        ["nice", "-n", "10", *command],
        cwd=directory,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        with stopped_by_signals(), log.open("a") as file, cast("IO[bytes]", process.stdout) as output:
            for line in _lines(output, on_wait):
                tail = [*tail[1 - _LOG_LINES :], line]
                if keep_lines:
                    print(line, file=file)
                if on_line is not None:
                    on_line(line)
            if not keep_lines:
                file.writelines(f"{line}\n" for line in tail)
        status = process.wait()
    except BaseException:
        # SIGTERM, on which make and the compilers remove files that are half written.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    if status != 0:
        raise TestbedError(
            "\n".join([f"{command[0]} failed with status {status}; {log} ends with:", *(f"  {line}" for line in tail)])
        )


def _lines(output: IO[bytes], on_wait: Callable[[], None] | None) -> Iterator[str]:
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if not selector.select(0.5):
                if on_wait is not None:
                    on_wait()
                continue
            data = os.read(output.fileno(), 65536)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
    if pending:
        yield pending.decode(errors="replace")
