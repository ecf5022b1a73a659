"""A Linux guest whose run is over: how it ended, a summary, and the same for programs."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from pagegate.cli import asked, places
from pagegate.cli.printing import Pairs, counted, printable, times
from pagegate.cli.summary import Ran, legend, malformed, strip
from pagegate.units import size

if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

    from pagegate.console import Console

_LAST_OUTPUT = 64 << 10
_LONGEST_PANIC = 300
_PANIC = re.compile(rb"Kernel panic - not syncing: ([^\r\n]*)")
_GOOD = {
    "poweroff": "the guest powered off",
    "reboot": "the guest rebooted",
    "halt": "every vCPU halted for good",
}
_NOTHING_ASKED = (
    "the guest made no request: its kernel was built without CONFIG_AMD_MEM_ENCRYPT or CONFIG_KVM_GUEST and does not "
    "know that its memory is private, or it did not get that far"
)
_NOTHING_EXPLICIT = (
    "the guest made no explicit request: a kernel without CONFIG_KVM_GUEST makes none, and one without "
    "CONFIG_AMD_MEM_ENCRYPT touches its private memory as shared"
)
_NO_OUTPUT = "the guest wrote nothing to its console: --append earlyprintk=serial,ttyS0 shows how far it gets"
_NO_HVC0 = (
    "the guest wrote nothing to hvc0, which needs the module virtio_console: --console ttyS0 shows how far it gets"
)
_NO_ROOT = "Unable to mount root fs"
_DEBUG_PRIVATE = "private pages could be read and written by the host (--debug-private)"


@dataclass
class Booted:
    """How it went."""

    ran: Ran
    console: Console
    """The one that was this terminal."""
    _: KW_ONLY
    ended_by_key: bool
    """Whether the run was ended by Ctrl-A x."""
    no_initrd: str
    """Why the guest had no initrd; empty if it had one."""
    saved: Path | None = None
    """The folder that it was put aside in."""

    def __post_init__(self) -> None:
        """Counts who asked, and looks for a panic."""
        vm = self.ran.vm
        self.counts: Counter[asked.Asked] = asked.count(vm, self.ran.events)
        self.silent = not self.console.tail(1)
        # The kernel writes to the serial port also where a virtio console is the terminal.
        self.panic = None if self.ran.report.reason == "poweroff" else _panic(vm.console.tail(_LAST_OUTPUT))

    @property
    def _stopped_by_policy(self) -> bool:
        return bool(self.ran.outcomes["stopped"])

    @property
    def well(self) -> bool:
        """Whether the guest and the policy ended well, or the run as the user wanted: by --timeout or Ctrl-A x."""
        if self.panic is not None or self._stopped_by_policy:
            return False
        return self.ran.report.reason in (*_GOOD, "timeout") or self.ended_by_key or self.saved is not None

    def ending(self) -> str:
        """How the run ended, in one sentence."""
        reason = self.ran.report.reason
        if self.panic is not None:
            return f"the guest's kernel panicked: {self.panic}"
        if self._stopped_by_policy:
            return f"the policy stopped the run{self._last('stopped')}: {reason}"
        if self.ended_by_key:
            return "it was ended by Ctrl-A x"
        if self.ran.interrupted:
            return "it was ended by Ctrl-C"
        if self.saved is not None:
            return f"it was put aside in {self.saved}: pagegate resume {self.saved}"
        return {
            **_GOOD,
            "timeout": f"the guest was still running after {self.ran.timeout or 0:g} s (--timeout)",
            "shutdown": "the guest shut down: an exception that it could not handle (triple fault)",
            "denied": f"the policy denied what the guest had touched{self._last('denied')}, so it could not go on",
            "livelock": f"the same fault was repeated too often, so the run was ended{self.ran.of_no_use()}",
            "failed": "it could not go on, as the error says",
            "interrupted": "a signal ended it",
        }.get(reason, f"the run was ended: {reason}")

    def _last(self, outcome: str) -> str:
        """The last request with this outcome, in brackets."""
        for event in reversed(self.ran.events):
            if event.outcome == outcome:
                return f" ({event.kind}, {event.gpa:#x} + {size(event.size)} to {event.to})"
        return ""

    def complaint(self) -> str:
        """What to say on standard error of a run that did not end well."""
        # After a panic it is the place of the reboot, which says nothing.
        at = None if self.panic is not None else self.ran.report.at
        return self.ending() if at is None else f"{self.ending()}; {printable(str(at))}"

    def hints(self) -> list[str]:
        """What a user may want to know about a run like this, one sentence each."""
        ran, report = self.ran, self.ran.report
        found = []
        ended_by_policy = self._stopped_by_policy or report.reason == "denied"
        if ran.vm.confidential and not report.hypercalls and not ended_by_policy:
            found.append(_NOTHING_EXPLICIT if report.faults else _NOTHING_ASKED)
        if self.silent and not ended_by_policy:
            found.append(_NO_OUTPUT if self.console is ran.vm.console else _NO_HVC0)
        if self.panic is not None and _NO_ROOT in self.panic and self.no_initrd:
            found.append(self.no_initrd)
        if report.device_accesses:
            first = report.first_device_access
            told = f"devices were told {times(report.device_accesses)} to access what is not shared"
            found.append(told if first is None else f"{told}, {first.device} first, at {first.gpa:#x}")
        if dropped := ran.vm.events.dropped - report.malformed_dropped:
            older = counted(dropped, "older request")
            found.append(f"the log dropped {older}, which the table lacks: --events FILE keeps them")
        if report.debug_private:
            found.append(_DEBUG_PRIVATE)
        return found

    def summary(self, width: int) -> Group:
        """The summary as text, for so many columns."""
        ran, report, vm = self.ran, self.ran.report, self.ran.vm
        rows = Pairs()
        rows.add("asked", ran.asked())
        if report.malformed:
            rows.add("", malformed(report))
        if report.opened:
            opened = f"pages were opened {times(report.opened)} to a vCPU without paging, no policy asked"
            rows.add("unpaged", opened)
        if decided := ran.decided():
            rows.add("decided", decided)
        to_private, to_shared = size(report.bytes_to_private), size(report.bytes_to_shared)
        rows.add("done", f"{to_private} to private, {to_shared} to shared, by {vm.enforcement}")
        private = vm.attributes.private_bytes
        rows.add("now", f"{size(private)} private, {size(vm.memory - private)} shared")
        if report.requests:
            rows.add("latency", f"{ran.latency()} (from exit to resume)")
        rows.add("ended", Text(f"{report.reason} after {ran.seconds:.2f} s: {self.ending()}"))
        if self.panic is None and report.reason not in ("poweroff", "reboot"):
            for first, place in enumerate(places.lines(vm, report)):
                rows.add("" if first else "at", Text(place))
        parts: list[RenderableType] = [Text(), strip(vm, width), legend(), Text(), rows]
        if self.counts:
            parts += [Text(), asked.table(self.counts)]
        hints = [Text(f"{hint[0].upper()}{hint[1:]}.") for hint in self.hints()]
        return Group(*parts, *([Text(), *hints] if hints else []))

    def facts(self, policy: str) -> dict[str, Any]:
        """The same for JSON."""
        ran, report, vm = self.ran, self.ran.report, self.ran.vm
        private = vm.attributes.private_bytes
        at = report.at
        of_place = ("vcpu", "rip", "cr2", "symbol", "instruction")
        names = ("bytes_to_private", "bytes_to_shared", "debug_private")
        return {
            "reason": report.reason,
            "ended_well": self.well,
            "ended": self.ending(),
            "saved": None if self.saved is None else str(self.saved),
            "panic": self.panic,
            "at": None if at is None else {name: getattr(at, name) for name in of_place},
            "confidential": vm.confidential or "none",
            "enforcement": vm.enforcement,
            "policy": policy,
            "vcpus": len(vm.vcpus),
            "places": places.facts(vm),
            "memory": vm.memory,
            "requests": report.requests,
            "explicit": report.hypercalls,
            "implicit": report.faults,
            **{
                name: getattr(report, name)
                for name in ("conversions", "denied", "retries", "malformed", "malformed_dropped")
            },
            "unpaged": report.opened,
            "device_accesses": report.device_accesses,
            **{name: getattr(report, name) for name in names},
            "shared_bytes": vm.memory - private,
            "private_bytes": private,
            "by": asked.facts(self.counts),
            "log_dropped": vm.events.dropped,
            "hints": self.hints(),
            "seconds": ran.seconds,
        }


def _panic(output: bytes) -> str | None:
    """The text of the first panic in a guest's output: what follows are often others that it caused."""
    found = _PANIC.search(output)
    return None if found is None else printable(found[1][:_LONGEST_PANIC].decode(errors="replace")).strip()
