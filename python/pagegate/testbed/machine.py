"""What the machine is, and running one command in it.

virtme-ng's `vng` starts QEMU with the host's file system as root. The command does not use vng's own streams: it has
virtio ports of its own, so that no output of the kernel or of vng mixes with its output, and its exit status cannot be
mistaken for vng's. `supervisor` starts all this and sees it to its end.
"""

import fnmatch
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagegate._core import number_of_bytes
from pagegate.errors import TestbedError
from pagegate.testbed.kernel import find_kernel
from pagegate.testbed.supervisor import Sink, Supervisor, Tail

DEFAULT_CPUS = 2
DEFAULT_MEMORY = "4G"

PASSED_ENVIRONMENT = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "COLUMNS", "LINES", "CI"),
    *("NO_COLOR", "FORCE_COLOR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PAGEGATE_*", "PYTEST_*", "PYTHON*", "HYPOTHESIS_*"),
    *("COVERAGE_*", "COV_*", "RUST_*", "RUSTUP_*", "CARGO_*"),
)
"""Names, with wildcards, of the caller's variables that the command sees."""

# virtme-ng mounts an overlay on each of the first, and an empty file system of the machine's own on each of the second.
_OVERLAID = tuple(map(Path, ("/etc", "/lib", "/home", "/opt", "/srv", "/usr", "/var", "/tmp")))  # noqa: S108
_HIDDEN = tuple(map(Path, ("/dev", "/proc", "/run", "/sys", "/var/cache", "/var/log", "/var/tmp")))  # noqa: S108

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._-]+")
_MOUNT_9P = "version=9p2000.L,trans=virtio,access=any,msize=512000"

# QEMU before 10.2 can lose an interrupt of a CPU that runs guests: on VMRUN and #VMEXIT it clears a flag in the CPU's
# word of pending interrupts without a lock, and with it what another thread, its timers', sets there meanwhile. If that
# was the interrupt in which the kernel programs its next one, the machine stands still. A periodic tick comes again.
# Where instructions are the clock, the thread that runs the CPU runs its timers, too.
_PERIODIC_TICK = ("nohz=off", "highres=off")


def run(  # noqa: PLR0913
    argv: Sequence[str | os.PathLike[str]],
    *,
    kernel: str | os.PathLike[str] | None = None,
    cpus: int | None = None,
    memory: int | str = DEFAULT_MEMORY,
    deterministic: bool = False,
    rw: Sequence[str | os.PathLike[str]] = (),
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    stdin: int | None = None,
    stdout: Sink | None = None,
    stderr: Sink | None = None,
) -> int:
    """Run a command in the machine and return its exit status, 128+n if signal n ended it.

    The command runs as root, in the caller's current directory, with the caller's variables that `PASSED_ENVIRONMENT`
    names and `PAGEGATE_TESTBED=1`. It sees the host's file system. What it writes there is gone when the machine ends,
    except below a directory of `rw`.

    Args:
        argv: the command and its arguments, which arrive exactly as they are.
        kernel: the kernel image; None looks for one as `find_kernel` does.
        cpus: how many CPUs the command has; None is 2, or 1 if `deterministic`.
        memory: the machine's memory: bytes, whole MiB of them, or text such as 512M or 4G.
        deterministic: the machine's clock counts instructions, one nanosecond each. Needs one CPU.
        rw: directories below which what the command writes is kept: it writes to the host's own.
        env: variables to set as well; they replace passed ones of the same name.
        timeout: seconds, boot included, until the machine is stopped.
        stdin: a file descriptor that the command reads; None is empty input.
        stdout: takes the command's standard output as it comes; None is this program's.
        stderr: takes the command's standard error as it comes; None is this program's.

    Raises:
        TestbedError: something that the machine needs is missing, or the machine died before the command ended.
        TestbedTimeoutError: `timeout` passed first.
        ValueError: an argument is out of range, or two do not go together.

    """
    command = [os.fspath(word) for word in argv]
    if not command:
        raise ValueError("argv is empty: name the command to run")
    if cpus is None:
        cpus = 1 if deterministic else DEFAULT_CPUS
    if cpus < 1:
        raise ValueError(f"cpus is {cpus}: a machine has at least 1")
    if deterministic and cpus != 1:
        raise ValueError(f"deterministic needs cpus=1, not {cpus}: only one CPU's instructions can be the clock")
    mebibytes, rest = divmod(number_of_bytes(memory, "memory"), 1 << 20)
    if mebibytes == 0 or rest:
        raise ValueError(f"memory is {memory!r}: it must be a positive multiple of 1 MiB, such as 512M or 4G")
    if timeout is not None and not timeout > 0:  # which NaN is not either
        raise ValueError(f"timeout is {timeout}: it must be above 0 seconds")
    machine = _Machine(
        command=command,
        kernel=find_kernel(kernel),
        cpus=cpus,
        memory=f"{mebibytes}M",
        deterministic=deterministic,
        writable=_writable_directories(rw),
        environment=_environment(os.environ, env or {}),
        tools=find_tools(),
    )
    out = stdout if stdout is not None else _own_stream("stdout")
    err = stderr if stderr is not None else _own_stream("stderr")
    with tempfile.TemporaryDirectory(prefix="pagegate-testbed-", dir=_plain_temporary_directory()) as name:
        directory = Path(name)
        machine.prepare(directory, with_stdin=stdin is not None)
        return Supervisor(machine.vng_arguments(directory), directory, stdin, out, err, timeout).wait()


@dataclass(frozen=True)
class Tools:
    """The programs of the host that the machine needs."""

    vng: Path
    qemu: Path


def find_tools() -> Tools:
    """Find virtme-ng, QEMU and udev.

    Raises:
        TestbedError: one is missing; the message names its package.

    """
    # The link is not resolved: in a virtual environment the interpreter is a link into a directory without vng.
    beside = Path(sys.executable).parent / "vng"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vng")
    if found is None:
        raise TestbedError("the testbed needs virtme-ng: pip install 'pagegate[testbed]'")
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise TestbedError(
            "the testbed needs QEMU's qemu-system-x86_64: install the package qemu-system-x86 (Debian, Ubuntu) or "
            "qemu-system-x86-core (Fedora)"
        )
    if not _has_udev():
        raise TestbedError(
            "the testbed needs udev, which makes the ports for a command's output: install the package udev (Debian, "
            "Ubuntu)"
        )
    return Tools(vng=Path(found), qemu=Path(qemu))


def _has_udev() -> bool:
    daemons = ("/usr/lib/systemd/systemd-udevd", "/lib/systemd/systemd-udevd")
    return any(os.access(daemon, os.X_OK) for daemon in daemons) or shutil.which("udevd") is not None


def _environment(caller: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    passed = {
        name: value
        for name, value in caller.items()
        if _VARIABLE.fullmatch(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in PASSED_ENVIRONMENT)
    }
    for name in extra:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name for an environment variable")
    return {**passed, "PAGEGATE_TESTBED": "1", **extra}


def _writable_directories(rw: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    directories = {Path(path).resolve() for path in rw}
    for directory in directories:
        if not directory.is_dir():
            raise TestbedError(f"{directory} cannot be made writable in the testbed: it is no directory")
        if directory == Path("/"):
            raise TestbedError("the testbed's whole root cannot be writable: name a directory below it")
    # Shortest first: a mount would hide an earlier one below it.
    return tuple(sorted(directories, key=lambda path: (len(path.parts), path)))


def _plain_temporary_directory() -> str:
    """A directory that the machine sees and whose name needs no quoting anywhere between vng, its shell and QEMU."""
    directory = tempfile.gettempdir()
    if _PLAIN_PATH.fullmatch(directory) and not _is_below(Path(directory), _HIDDEN):
        return directory
    return "/tmp"  # noqa: S108


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _own_stream(name: str) -> Sink:
    stream = getattr(sys, name)
    if stream is None:
        # This program was started with the stream closed.
        return Tail()
    stream.flush()
    return stream.buffer if hasattr(stream, "buffer") else _TextSink(name)


class _TextSink:
    """Output for a `sys.stdout` that somebody replaced by one that takes only text."""

    def __init__(self, name: str) -> None:
        self._stream = getattr(sys, name)

    def write(self, data: bytes, /) -> object:
        return self._stream.write(data.decode(errors="replace"))

    def flush(self) -> object:
        return self._stream.flush()


@dataclass(frozen=True)
class _Machine:
    command: list[str]
    kernel: Path
    cpus: int
    memory: str
    deterministic: bool
    writable: tuple[Path, ...]
    environment: dict[str, str]
    tools: Tools

    def _all_cpus(self) -> int:
        """How many CPUs the machine has: one more than the command, if the command has several.

        The additional one is the first, on which no guest runs. Whenever any CPU restores its FPU's state, QEMU (7.2,
        and its development sources since) clears a flag in a word of the first CPU without a lock, and can thereby undo
        a change to another flag of that word: whether this CPU runs a guest. If that flag is wrong, the CPU takes
        interrupts while they are off, or translates the host's addresses by a guest's page tables, and the machine
        hangs or dies.
        """
        return self.cpus + 1 if self.cpus > 1 else 1

    def prepare(self, directory: Path, *, with_stdin: bool) -> None:
        """Put what the machine needs into the run's own directory."""
        (directory / "launch").write_bytes(os.fsencode(self.launch_script(with_stdin=with_stdin)))
        (directory / "kernel").symlink_to(self.kernel)
        for index, path in enumerate(self.writable):
            (directory / f"rw{index}").symlink_to(path)

    def vng_arguments(self, directory: Path) -> list[str]:
        """Return vng's command line.

        It names only paths in the run's own directory: vng passes most of its arguments through a shell without
        quoting them, and QEMU splits its options at commas.
        """
        qemu = ["-cpu", "max,+svm,+npt", "-pidfile", f"{directory}/pid", "-device", "virtio-serial-pci,id=pagegate"]
        for port, file in (("out", "out"), ("err", "err"), ("devout", "out"), ("deverr", "err"), ("status", "status")):
            qemu += ["-chardev", f"file,id=pagegate-{port},path={directory / file}"]
            qemu += ["-device", f"virtserialport,bus=pagegate.0,name=pagegate.{port},chardev=pagegate-{port}"]
        for index in range(len(self.writable)):
            export = f"local,path={directory}/rw{index},mount_tag=pagegate{index},security_model=none,multidevs=remap"
            qemu += ["-virtfs", export]
        if self.deterministic:
            qemu += ["-icount", "shift=0,sleep=off"]
        return [
            *(str(self.tools.vng), "--run", f"{directory}/kernel", "--name", "pagegate", "--user", "root", "--verbose"),
            *("--disable-kvm", "--force-9p", "--disable-microvm"),
            *("--cpus", str(self._all_cpus()), "--memory", self.memory),
            *([] if self.deterministic else [f"--append={option}" for option in _PERIODIC_TICK]),
            *("--qemu-opts=" + " ".join(qemu), "--exec", f"exec /bin/sh {directory}/launch"),
        ]

    def launch_script(self, *, with_stdin: bool) -> str:
        """Return the shell script that the machine runs: it mounts, runs the command and reports its status."""
        cwd = Path.cwd()
        if _is_below(cwd, _HIDDEN) and not _is_below(cwd, self.writable):
            raise TestbedError(
                f"the testbed has a {cwd} of its own, so the command cannot run there: change the directory, or make "
                "it writable with --rw"
            )
        lines = [
            "cd /",
            "exec 3>/dev/virtio-ports/pagegate.status",
            """fail() { echo "failed $*" >&3; exit 1; }""",
            """test -c /dev/kvm || fail "its kernel offers no /dev/kvm\"""",
            "ln -sfn /dev/virtio-ports/pagegate.devout /dev/stdout",
            "ln -sfn /dev/virtio-ports/pagegate.deverr /dev/stderr",
        ]
        if self._all_cpus() > self.cpus:
            # A kernel may be built for fewer CPUs; then the command gets all there are.
            lines.append(
                f"test $(grep -c ^processor /proc/cpuinfo) -le {self.cpus} || taskset -cp 1-{self.cpus} $$ >/dev/null "
                "|| fail the package util-linux is not installed"
            )
        for index, directory in enumerate(self._overlaid_directories(cwd)):
            where, layer = shlex.quote(str(directory)), f"/run/pagegate/{index}"
            # The lower directory is "." because a path in these options would need an escaping of its own.
            lines.append(
                f"mkdir -p {layer}/upper {layer}/work && (cd {where} && "
                f"mount -t overlay -o xino=off,lowerdir=.,upperdir={layer}/upper,workdir={layer}/work pagegate {where})"
            )
        for index, directory in enumerate(self.writable):
            where = shlex.quote(str(directory))
            lines.append(
                f"mkdir -p {where} && mount -t 9p -o {_MOUNT_9P} pagegate{index} {where} "
                f"|| fail cannot make {where} writable"
            )
        assignments = [f"{name}={value}" for name, value in self.environment.items()]
        call = ["env", "-i", *assignments, "/bin/sh", "-c", 'exec "$@"', "sh", *self.command]
        lines += [
            f"cd -- {shlex.quote(str(cwd))} || fail cannot enter {shlex.quote(str(cwd))}",
            "echo started >&3",
            # In a subshell, because a shell reports the signal that ended its child on its own standard error, and
            # that report must not come out as the command's.
            f"(exec {'' if with_stdin else '</dev/null'} 3>&-",
            "exec >/dev/virtio-ports/pagegate.out 2>/dev/virtio-ports/pagegate.err",
            f"exec {shlex.join(call)})",
            "echo exited $? >&3",
        ]
        return "\n".join(lines) + "\n"

    def _overlaid_directories(self, cwd: Path) -> list[Path]:
        """Directories that programs expect to write to and that would be read-only without an overlay."""
        chosen: list[Path] = []
        for directory in sorted({Path(self.environment.get("HOME", "")), cwd}):
            written = (*_OVERLAID, *_HIDDEN, *self.writable, *chosen)
            sensible = directory.is_absolute() and directory != Path("/") and directory.is_dir()
            if sensible and not _is_below(directory, written):
                chosen.append(directory)
        return chosen
