"""`pagegate run`: runs an image, or a bundled guest, under a policy."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem
from rich.text import Text

from pagegate import Vm, bzimage, guests
from pagegate.bundled import GUESTS, SHARED_BIT, Guest
from pagegate.cli.console import Console
from pagegate.cli.deadline import Deadline
from pagegate.cli.interrupt import STATUS as INTERRUPTED
from pagegate.cli.interrupt import Interrupt
from pagegate.cli.life import Life
from pagegate.cli.parameters import VCPUS, Seconds, Size, policy_options, policy_timeout_option, verbose_option
from pagegate.cli.policy_argument import made, policy_option, statements, written
from pagegate.cli.printing import console as terminal_on
from pagegate.cli.printing import counted, put, put_line
from pagegate.cli.recording import Recording, events_option, limit_option
from pagegate.cli.summary import Ran, facts, summary
from pagegate.cli.telling import tell
from pagegate.guests import is_script
from pagegate.loading import guest_file
from pagegate.loading.policy_file import Misnamed
from pagegate.loading.watch import Changes, Watcher
from pagegate.units import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pagegate.loading.expression import Expression

_ENTRY = 0x1000


def _known(ctx: click.Context, param: click.Parameter, name: str | None) -> Guest | None:
    if name is None or name in GUESTS:
        return GUESTS[name] if name else None
    try:
        if guest := guest_file.load(name):
            return guest
    except Misnamed as error:
        raise click.BadParameter(str(error), ctx, param) from None
    about = "\n".join(f"  {each:9} {guest.about}" for each, guest in GUESTS.items())
    raise click.BadParameter(f"there is no guest {name!r}; name a file FILE.py, or one of\n{about}", ctx, param)


def _guests(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    file, colon, begun = incomplete.rpartition(":")
    if colon and file.endswith(".py"):
        return [CompletionItem(f"{file}:{name}") for name in _guests_in(Path(file)) if name.startswith(begun)]
    found = [CompletionItem(name, help=each.about) for name, each in GUESTS.items() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def _guests_in(file: Path) -> list[str]:
    """The names of what looks like a guest: a Script, a list of them, or a function that returns one."""
    import ast  # noqa: PLC0415 - only when a shell asks

    names: dict[str, None] = {}
    for each in statements(file):
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
            names[each.name] = None
        elif isinstance(each, ast.Assign | ast.AnnAssign) and each.value is not None:
            made = ast.unparse(each.value.func).rpartition(".")[2] if isinstance(each.value, ast.Call) else ""
            if made == "Script" or made in names or isinstance(each.value, ast.List | ast.ListComp | ast.Tuple):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                names |= {target.id: None for target in targets if isinstance(target, ast.Name)}
    return list(names)


def _check(guest: Guest, memory: int, vcpus: int, shared_bit: int) -> None:
    if guest.one_vcpu and vcpus > 1:
        raise click.UsageError("this guest runs on one vCPU: leave --vcpus out")
    if guest.shared_bit not in (None, shared_bit):
        raise click.UsageError(f"this guest is written for shared bit {guest.shared_bit}: leave --shared-bit out")
    if memory < guest.needs(vcpus):
        raise click.UsageError(f"this guest needs {size(guest.needs(vcpus))} of memory: raise --memory")


def _is_bzimage(image: Path) -> bool:
    if not image.is_file():  # what is read from a pipe is gone
        return False
    with image.open("rb") as file:
        return bzimage.is_bzimage(file.read(bzimage.START))


def _start_image(vm: Vm, image: Path) -> None:
    if is_script(image):
        raise click.UsageError(
            f"{image} is the image of a pagegate.guests.Script, which has to be told where its operations are: "
            "name the Python file that makes it, --guest FILE.py"
        )
    if image.is_file() and image.stat().st_size == 0:
        raise click.UsageError(f"{image} is empty")
    try:
        entry = vm.load(image, _ENTRY)
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=entry, rdi=vcpu.index)
    except (ValueError, IndexError) as error:
        raise click.UsageError(f"{image} cannot be started in {size(vm.memory)} of memory: {error}") from None


@click.command(short_help="Runs IMAGE, or another guest (--guest), under a policy.")
@click.argument("image", required=False, type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
@policy_option()
@policy_options
@policy_timeout_option
@click.option(
    "--guest",
    metavar="NAME|FILE.py[:NAME]",
    callback=_known,
    shell_complete=_guests,
    help=f"A bundled guest ({', '.join(GUESTS)}), or a pagegate.guests.Script in a Python file.",
)
@click.option("--memory", type=Size(), default="64M", show_default=True, help="Guest memory.")
@click.option("--vcpus", type=VCPUS, default=1, show_default=True)
@click.option("--enforcement", type=click.Choice(["auto", "attributes", "memslots"]), default="auto", show_default=True)
@click.option(
    "--shared-bit",
    type=click.IntRange(12, 51),
    help=f"The address bit of a page's shared view. Default: none for an IMAGE, {SHARED_BIT} for a bundled guest.",
)
@click.option(
    "--initial",
    type=click.Choice(["private", "shared"]),
    help="The state of all pages at first. Default: shared for an IMAGE, private for a bundled guest.",
)
@click.option("--timeout", type=Seconds(), help="End the run S seconds after it began to load the guest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; the guest's output goes to stderr.")
@click.option("--watch", is_flag=True, help="Load the policy again when its file changes, or a module beside it.")
@verbose_option
@events_option
@limit_option
def run(  # noqa: PLR0913 - one for each option
    *,
    image: Path | None,
    policy: Expression | None,
    options: dict[str, str],
    policy_timeout: float | None,
    guest: Guest | None,
    memory: int,
    vcpus: int,
    enforcement: str,
    shared_bit: int | None,
    initial: guests.State | None,
    timeout: float | None,
    as_json: bool,
    watch: bool,
    verbose: bool,
    events: Path | None,
    events_limit: int,
) -> int:
    """Runs IMAGE, or another guest (--guest), under a policy.

    A raw IMAGE is loaded at 0x1000 and started there in long mode on every vCPU, with the vCPU's index in RDI; an ELF
    file is started at its entry. What the guest writes to ports 0xE9 and 0x3F8 is printed; --policy-timeout holds for
    that, too.
    """
    if (guest is None) == (image is None):
        raise click.UsageError("name either an IMAGE or another guest, as --guest demo")
    if image is not None and image.suffix == ".py":
        raise click.UsageError(f"{image} is a Python file: name a policy with -p {image}, a guest with --guest {image}")
    if image is not None and _is_bzimage(image):
        raise click.UsageError(f"{image} is a Linux kernel (a bzImage): boot it with `pagegate boot {image}`")
    if guest is not None:
        shared_bit = SHARED_BIT if shared_bit is None else shared_bit
        _check(guest, memory, vcpus, shared_bit)
    changes = _watched(policy) if watch else Changes()
    judge = made(policy, options)
    call: guests.Call | None = None
    if guest is not None:
        call = "hypercall" if guests.hypercall_completes() else "doorbell"
    deadline = Deadline(timeout)
    try:
        with deadline:
            vm = Vm(
                memory,
                vcpus=vcpus,
                policy=judge,
                enforcement=enforcement,
                shared_bit=shared_bit,
                initial=initial or ("shared" if guest is None else "private"),
                policy_timeout=policy_timeout,
            )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    console = Console(err=as_json, phases=guest.phases if guest else ())
    with vm:
        console.attach(vm)
        with deadline:
            if guest is not None and call is not None:
                guest.start(vm, call)
            elif image is not None:
                _start_image(vm, image)
        told = terminal_on(err=True)
        if told.is_terminal and not as_json:
            who = f"{written(policy)} judges {size(memory)}, {counted(vcpus, 'vCPU')}, by {vm.enforcement}"
            put_line(told, Text(f"pagegate: {who}"))
        with _told_if_it_fails(vm, console, call, written(policy) if as_json else None), ExitStack() as meanwhile:
            recording = meanwhile.enter_context(Recording(vm, events, events_limit, deadline))
            if watch:
                again = partial(made, policy, options)
                meanwhile.enter_context(Watcher(vm, changes, again, _say, written(policy)))
            if verbose or told.is_terminal:
                life = meanwhile.enter_context(Life(vm, partial(put_line, told), each=verbose, news=lambda: True))
                if verbose and told.is_terminal:
                    console.before = life.catch_up
            interrupt = meanwhile.enter_context(Interrupt(vm, deadline))
            report = vm.run(timeout=deadline.left())
        console.end()
        ran = Ran(vm, report, report.seconds, call, timeout, interrupted=interrupt.reached)
        _tell(ran, written(policy) if as_json else None)
    recording.check(interrupted=interrupt.reached)
    return _status(ran)


@contextmanager
def _told_if_it_fails(vm: Vm, console: Console, call: guests.Call | None, policy: str | None) -> Iterator[None]:
    """Prints the summary of a run that raises, before what it raised is reported."""
    try:
        yield
    except Exception:
        if vm.report is not None:
            console.end()
            _tell(Ran(vm, vm.report, vm.report.seconds, call), policy)
        raise


def _tell(ran: Ran, policy: str | None) -> None:
    """Prints the summary; for a program, if the policy is named."""
    if policy is not None:
        click.echo(json.dumps(facts(ran, policy)))
    else:
        out = terminal_on()
        put(out, summary(ran, out.width))


def _status(ran: Ran) -> int:
    if ran.interrupted:
        tell("interrupted")
        return INTERRUPTED
    # Reaching --timeout is no failure: the user asked for it.
    if ran.halted or (ran.report.reason == "timeout" and not ran.outcomes["stopped"]):
        return 0
    tell(f"pagegate: {ran.ending()}")
    return 1


def _watched(policy: Expression | None) -> Changes:
    """The policy's file, as it is before it is loaded."""
    if policy is None or policy.file is None:
        raise click.UsageError("--watch is for a policy in a file: name one with -p")
    return Changes(policy.file)


def _say(text: str) -> None:
    tell(f"pagegate: {text}")
