"""The command `pagegate testbed`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pagegate.cli.parameters import Seconds
from pagegate.cli.telling import tell
from pagegate.testbed import builder, machine, progress, selftests, supervisor, terminal

_COMMAND = f"{__name__}.command"

TIMED_OUT = 124
"""Exit status of a run that `--timeout` ended, as timeout(1) has it."""


class _TestbedGroup(click.Group):
    """A group that takes what follows `--` as a command to run in the machine, and never as one of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, command = args, None
        if "--" in args:
            at = args.index("--")
            own, command = args[:at], args[at + 1 :]
        ctx.meta[_COMMAND] = command
        # Without any argument, show the help.
        if not own and command is None:
            own = ["--help"]
        return super().parse_args(ctx, own)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"{args[0]!r} is no subcommand. To run it in the machine, write it after --", ctx)
        return super().resolve_command(ctx, args)


def _mapping(_ctx: click.Context, _param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for value in values:
        name, given, text = value.partition("=")
        if not given and name not in os.environ:
            raise click.BadParameter(f"{name} is not set here: write {name}=VALUE")
        pairs[name] = text if given else os.environ[name]
    return pairs


@click.group(
    "testbed",
    cls=_TestbedGroup,
    short_help="Runs COMMAND in a machine whose KVM has software-protected VMs.",
    invoke_without_command=True,
    subcommand_metavar="-- COMMAND...",
)
@click.option("--kernel", type=click.Path(path_type=Path), metavar="IMAGE", help="Boot this kernel.")
@click.option(
    "--cpus",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="How many CPUs COMMAND has. Default: 2, with --deterministic 1.",
)
@click.option(
    "--memory",
    default=machine.DEFAULT_MEMORY,
    show_default=True,
    metavar="M",
    help="The machine's memory, such as 512M or 4G.",
)
@click.option("--deterministic", is_flag=True, help="Let the machine's clock count instructions, one nanosecond each.")
@click.option(
    "--rw",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep what the command writes below DIR. May be repeated.",
)
@click.option(
    "--env",
    multiple=True,
    callback=_mapping,
    metavar="NAME[=VALUE]",
    help="Pass this environment variable, too. May be repeated.",
)
@click.option(
    "--timeout",
    type=Seconds(),
    metavar="SECONDS",
    help="Stop the machine after this time; exit status 124.",
)
@click.pass_context
def testbed(ctx: click.Context, /, **options: Any) -> None:
    """Runs COMMAND in a machine whose KVM has software-protected VMs.

    QEMU emulates the machine; it needs no KVM of this host. Its root is this host's file system. COMMAND runs there as
    root in the current directory. Its standard output and standard error arrive here as it writes them, and its exit
    status is this command's. At a terminal it has a terminal, too; Ctrl-] ends the machine. What it writes to files is
    lost when the machine ends, except below the directories of --rw. Booting takes 10 to 20 seconds, and the machine is
    20 to 30 times slower than the host.

    The kernel is that of --kernel, else of PAGEGATE_TESTBED_KERNEL, else the newest that `pagegate testbed build` has
    made.
    """
    command: list[str] | None = ctx.meta.get(_COMMAND)
    if ctx.invoked_subcommand is not None:
        stray = [name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if stray or command is not None:
            what = f"--{stray[0]}" if stray else "a COMMAND"
            raise click.UsageError(
                f"{what} does not go with {ctx.invoked_subcommand}: options of {ctx.invoked_subcommand} follow it", ctx
            )
        return
    if not command:
        raise click.UsageError("there is no COMMAND: write it after --", ctx)
    try:
        if terminal.is_ours():
            tell("pagegate: this terminal is the command's, once the machine has booted; Ctrl-] ends both")
            with terminal.raw():
                status = machine.run(terminal.command(sys.executable, command), stdin=0, **options)
        else:
            status = machine.run(command, stdin=_standard_input(), **options)
    except ValueError as error:
        raise click.UsageError(str(error), ctx) from error
    except supervisor.TestbedTimeoutError as error:
        tell(f"pagegate: {error}")
        status = TIMED_OUT
    ctx.exit(status)


def _standard_input() -> int | None:
    """Standard input's descriptor, or None if it is closed, or a terminal that another program uses."""
    # If it is closed, descriptor 0 may be another file.
    return None if sys.stdin is None or os.isatty(0) else 0


_suite = click.option(
    "--suite",
    metavar="SUITE",
    help="Take the source from this Debian suite, as trixie-backports. It need not be one of apt's own suites: it is "
    "fetched from the Debian archive that apt's sources name.",
)


@testbed.command("build", short_help="Builds the machine's kernel, if it is not built yet.")
@click.option(
    "--jobs",
    "-j",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="How many compilers run at once. Default: one for each CPU.",
)
@_suite
def _build(jobs: int | None, suite: str | None) -> None:
    """Builds the machine's kernel, if it is not built yet.

    The source is Debian's package linux-source: 7.3 if it is offered, else the newest. It is downloaded and unpacked,
    not installed, into pagegate/testbed in $XDG_CACHE_HOME or ~/.cache, where it takes 2 GB; the directory `sources`
    there may be deleted afterwards. An interrupted build resumes where it was. Prints the image's path.
    """
    with progress.reporter(sys.stderr) as reporter:
        image = builder.build(jobs, suite=suite, reporter=reporter)
    click.echo(image)


@testbed.command("selftest", short_help="Runs the kernel's own tests of private memory in the machine.")
@click.option("--kernel", type=click.Path(path_type=Path), metavar="IMAGE", help="Test this kernel.")
@click.option(
    "--cpus",
    type=click.IntRange(1, 4096),
    default=machine.DEFAULT_CPUS,
    show_default=True,
    metavar="N",
    help="How many CPUs the machine has.",
)
@click.option(
    "--memory",
    default=machine.DEFAULT_MEMORY,
    show_default=True,
    metavar="M",
    help="The machine's memory, such as 512M or 4G.",
)
@_suite
@click.pass_context
def _selftest(ctx: click.Context, /, kernel: Path | None, cpus: int, memory: str, suite: str | None) -> None:
    """Runs the kernel's own tests of private memory in the machine.

    They are built once, from the source of the kernel's series. Prints one line for each test; the exit status is 1 if
    one failed.
    """

    def show(outcome: selftests.Outcome) -> None:
        click.echo(f"{outcome.name:30} {outcome.result:8} {outcome.seconds:4} s")
        if outcome.output:
            click.echo("\n".join(f"    {line}" for line in outcome.output.splitlines()))

    try:
        with progress.reporter(sys.stderr) as reporter:
            outcomes = selftests.selftest(
                kernel, cpus=cpus, memory=memory, suite=suite, reporter=reporter, on_outcome=show
            )
    except ValueError as error:
        raise click.UsageError(str(error), ctx) from error
    ctx.exit(1 if any(outcome.result == "failed" for outcome in outcomes) else 0)
