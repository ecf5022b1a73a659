"""The command line. Exit status: 0 done; 1 the guest or policy ended badly; 2 usage; 3 this host cannot."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

import click

from pagegate.cli import streams
from pagegate.cli.telling import fitting, tell
from pagegate.cli.version import version_option
from pagegate.errors import KvmUnavailable, NotSupported, PagegateError, PolicyTimeoutError, TestbedError
from pagegate.loading import policy_file

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMANDS = {
    "bench": "pagegate.cli.bench:bench",
    "boot": "pagegate.cli.boot:boot",
    "demo": "pagegate.cli.demo:demo",
    "doctor": "pagegate.cli.doctor:doctor",
    "events": "pagegate.cli.events:events",
    "guest": "pagegate.cli.guest:guest",
    "plot": "pagegate.cli.plot:plot",
    "replay": "pagegate.cli.replay:replay",
    "resume": "pagegate.cli.resume:resume",
    "run": "pagegate.cli.run:run",
    "testbed": "pagegate.testbed.command:testbed",
    "trace": "pagegate.cli.trace:trace",
}
_INTERRUPTED = 130


class _Commands(click.Group):
    """Imports a command only when it is used, so that `doctor` does not wait for what others import."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name].split(":")
        command = getattr(importlib.import_module(module), name)
        return fitting(command) if isinstance(command, click.Command) else None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def cli() -> None:
    """Runs guests with private memory on KVM under a policy that decides which pages are converted."""


def _terminated(number: int, _frame: object) -> None:
    """Raises SystemExit, so that files that are being written are closed properly."""
    streams.hurry()
    raise SystemExit(128 + number)


def _interrupted(_number: int, _frame: object) -> None:
    """As without this, but that a reader of the output which has stalled is not waited for."""
    streams.hurry()
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line and exits."""
    if "_PAGEGATE_COMPLETE" in os.environ:
        from pagegate.cli import completion  # noqa: F401, PLC0415 - registers itself, and only a shell asks for it
    signal.signal(signal.SIGTERM, _terminated)
    # A shell has it ignored in what runs in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    with streams.patient():
        status = _run()
    sys.exit(status)


def _run() -> int | str | None:
    try:
        try:
            return fitting(cli).main(prog_name="pagegate", standalone_mode=False) or 0
        finally:
            # An error of the interpreter's own flush at exit could not be reported.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - whatever ended the command is reported
        return _told(error)


def _told(error: BaseException) -> int | str | None:
    """Reports on stderr what ended the command, and returns the exit status."""
    try:
        if isinstance(error, click.ClickException):
            shown = io.StringIO()
            error.show(shown)
            tell(shown.getvalue().rstrip())
            return error.exit_code
        if isinstance(error, click.Abort | KeyboardInterrupt):
            tell("interrupted")
            return _INTERRUPTED
        hooks = policy_file.frames(traceback.extract_tb(error.__traceback__))
        if isinstance(error, SystemExit) and not hooks:
            return error.code
        # Where in the policy the call was is worth more than the message, which is always the same.
        if isinstance(error, PagegateError) and not (isinstance(error, PolicyTimeoutError) and hooks):
            _say(error, str(error))
            return 3 if isinstance(error, KvmUnavailable | NotSupported | TestbedError) else 1
        if isinstance(error, OSError) and not hooks:
            _tell_of_the_system(error)
        else:
            click.echo("".join(_traceback(error)), err=True, nl=False)
    except OSError:
        # stderr cannot be written either: the exit status is all there is.
        _abandon(2)
    return 1


def _say(error: BaseException, text: str) -> None:
    tell("\n".join([f"pagegate: {text}", *getattr(error, "__notes__", ())]))


def _tell_of_the_system(error: OSError) -> None:
    # Else the interpreter's flush at exit would fail too, and print its own message.
    _abandon(1)
    if error.errno == errno.EPIPE:
        return
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
    _say(error, f"{place}{error.strerror or error}")


def _abandon(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


def _traceback(error: BaseException) -> Iterator[str]:
    """The traceback with only the frames of policy files, or else the last one."""
    told = traceback.TracebackException.from_exception(error)
    pending = [told]
    while pending:
        one = pending.pop()
        frames = policy_file.frames(one.stack) or list(one.stack)[-1:]
        one.stack = traceback.StackSummary.from_list(frames)
        pending += [each for each in (one.__cause__, one.__context__) if each is not None]
    return told.format()
