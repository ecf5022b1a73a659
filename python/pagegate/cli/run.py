"""`pagegate run`: runs an image, or a bundled guest, under a policy."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import click
from rich.console import Console as Terminal

from pagegate import Vm, guests
from pagegate.bundled import GUESTS, SHARED_BIT, Guest
from pagegate.cli.console import Console
from pagegate.cli.parameters import Size, policy_options
from pagegate.cli.policy_argument import PolicyFile
from pagegate.cli.summary import Ran, facts, size, summary
from pagegate.loading import policy_file
from pagegate.loading.watch import Changes, Watcher
from pagegate.trace import Recorder

_ENTRY = 0x1000


def _known(ctx: click.Context, param: click.Parameter, name: str | None) -> Guest | None:
    if name is None or name in GUESTS:
        return GUESTS[name] if name else None
    about = "\n".join(f"  {each:9} {guest.about}" for each, guest in GUESTS.items())
    raise click.BadParameter(f"there is no guest {name!r}; there are\n{about}", ctx, param)


def _check(guest: Guest, memory: int, vcpus: int, shared_bit: int) -> None:
    if guest.one_vcpu and vcpus > 1:
        raise click.UsageError("this guest runs on one vCPU: leave --vcpus out")
    if guest.shared_bit not in (None, shared_bit):
        raise click.UsageError(f"this guest is written for shared bit {guest.shared_bit}: leave --shared-bit out")
    if memory < guest.needs(vcpus):
        raise click.UsageError(f"this guest needs {size(guest.needs(vcpus))} of memory: raise --memory")


def _start_image(vm: Vm, image: Path) -> None:
    try:
        entry = vm.load(image, _ENTRY)
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=entry, rdi=vcpu.index)
    except (ValueError, IndexError) as error:
        raise click.UsageError(f"{image} cannot be started in {size(vm.memory)} of memory: {error}") from None


@click.command()
@click.argument("image", required=False, type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@click.option("-p", "--policy", "named", type=PolicyFile(), required=True, help="The policy file.")
@policy_options
@click.option("--guest", metavar="NAME", callback=_known, help=f"A bundled guest: {', '.join(GUESTS)}.")
@click.option("--memory", type=Size(), default="64M", show_default=True, help="Guest memory.")
@click.option("--vcpus", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--enforcement", type=click.Choice(["auto", "attributes", "memslots"]), default="auto", show_default=True)
@click.option(
    "--shared-bit",
    type=int,
    help=f"The address bit of a page's shared view. Default: none for an IMAGE, {SHARED_BIT} for a bundled guest.",
)
@click.option(
    "--initial",
    type=click.Choice(["private", "shared"]),
    help="The state of all pages at first. Default: shared for an IMAGE, private for a bundled guest.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="S", help="End the run after S seconds."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; the guest's output goes to stderr.")
@click.option("--watch", is_flag=True, help="Load the policy file again when it changes (not what it imports).")
@click.option(
    "--events",
    "events",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write every request to FILE as it runs: .parquet, .arrow (IPC file) or .arrows (IPC stream).",
)
@click.option(
    "--events-limit",
    type=click.IntRange(min=1),
    default=10_000_000,
    show_default=True,
    metavar="N",
    help="Write at most N requests to FILE; the others are only counted.",
)
def run(  # noqa: PLR0913 - one for each option
    *,
    image: Path | None,
    named: tuple[Path, str | None],
    options: dict[str, str],
    guest: Guest | None,
    memory: int,
    vcpus: int,
    enforcement: str,
    shared_bit: int | None,
    initial: guests.State | None,
    timeout: float | None,
    as_json: bool,
    watch: bool,
    events: Path | None,
    events_limit: int,
) -> int:
    """Runs IMAGE, or a bundled guest, under a policy.

    A raw IMAGE is loaded at 0x1000 and started there in long mode on every vCPU, with the vCPU's index in RDI; an ELF
    file is started at its entry. What the guest writes to ports 0xE9 and 0x3F8 is printed.
    """
    if (guest is None) == (image is None):
        raise click.UsageError("name either an IMAGE or a bundled guest (--guest NAME)")
    if guest is not None:
        shared_bit = SHARED_BIT if shared_bit is None else shared_bit
        _check(guest, memory, vcpus, shared_bit)
    file, name = named
    changes = Changes(file)
    judge = policy_file.load(file, name, options)
    call: guests.Call | None = None
    if guest is not None:
        call = "hypercall" if guests.hypercall_completes() else "doorbell"
    try:
        vm = Vm(
            memory,
            vcpus=vcpus,
            policy=judge,
            enforcement=enforcement,
            shared_bit=shared_bit,
            initial=initial or ("shared" if guest is None else "private"),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    console = Console(err=as_json, phases=guest.phases if guest else ())
    with vm:
        console.attach(vm)
        if guest is not None and call is not None:
            guest.start(vm, call)
        elif image is not None:
            _start_image(vm, image)
        recorder = _recorder(vm, events, events_limit)
        try:
            with Watcher(vm, changes, name, options, _say) if watch else nullcontext():
                report = vm.run(timeout=timeout)
        except BaseException:
            if (lost := _close(recorder, events)) is not None:
                _say(f"{events}: {lost.strerror}")
            raise
        unwritten = _close(recorder, events)
        console.end()
        ran = Ran(vm, report, report.seconds, call, timeout)
        if as_json:
            click.echo(json.dumps(facts(ran, f"{file}:{name}" if name else str(file))))
        else:
            Terminal(highlight=False).print(summary(ran))
    if unwritten is not None:
        raise unwritten
    # Reaching --timeout is no failure: the user asked for it.
    done = ran.halted or (report.reason == "timeout" and not ran.outcomes["stopped"])
    if not done:
        click.echo(f"pagegate: {ran.ending()}", err=True)
    return 0 if done else 1


def _recorder(vm: Vm, file: Path | None, limit: int) -> Recorder | None:
    try:
        return None if file is None else Recorder(vm, file, limit=limit)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _close(recorder: Recorder | None, file: Path | None) -> OSError | None:
    """Closes the recorder. Returns an error, which the caller reports after how the run ended."""
    if recorder is None:
        return None
    try:
        recorder.close()
    except OSError as error:
        return error
    if recorder.lost:
        _say(f"{recorder.lost} requests are not in {file}: above --events-limit, or too fast to be written")
    return None


def _say(text: str) -> None:
    click.echo(f"pagegate: {text}", err=True)
