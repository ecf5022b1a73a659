"""`pagegate doctor`: what this host offers, what is missing and how to get it."""

from __future__ import annotations

import json
import platform
from typing import Any

import click
from rich.text import Text

from pagegate import Host, probe
from pagegate.cli.linux_host import LinuxHost, linux_host
from pagegate.cli.printing import Pairs, put, put_line
from pagegate.cli.printing import console as terminal_on

_PRIVATE = 8
_FLAGS = {1: "MMAP", 2: "INIT_SHARED"}


def _facts(host: Host, linux: LinuxHost) -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "vm_types": host.vm_types,
        "memory_attributes": host.memory_attributes,
        "guest_memfd": host.guest_memfd,
        "guest_memfd_flags": host.guest_memfd_flags,
        "exit_hypercall": host.exit_hypercall,
        "pre_fault": host.pre_fault,
        "max_vcpus": host.max_vcpus,
        "max_memslots": host.max_memslots,
        "enforcement": host.enforcement,
        "linux": {"enforcement": linux.enforcement, "why": linux.why},
        "problems": host.problems,
    }


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _table(host: Host, linux: LinuxHost) -> Pairs:
    flags = [name for bit, name in _FLAGS.items() if host.guest_memfd_flags & bit]
    table = Pairs()
    table.add("kernel", platform.release())
    table.add("VM types", ", ".join(host.vm_types))
    table.add("private attribute", _yes(host.memory_attributes & _PRIVATE))
    table.add("guest_memfd", _yes(host.guest_memfd) + (f" ({', '.join(flags)})" if flags else ""))
    table.add("KVM_HC_MAP_GPA_RANGE exits", _yes(host.exit_hypercall))
    table.add("KVM_PRE_FAULT_MEMORY", _yes(host.pre_fault))
    table.add("vCPUs, memslots", f"{host.max_vcpus}, {host.max_memslots}")
    table.add("enforcement here", Text(str(host.enforcement), "bold"))
    why = f" ({linux.why})" if linux.enforcement else ""
    table.add("for a Linux guest", Text(linux.enforcement or "none", "bold").append(why, "not bold"))
    return table


@click.command(short_help="Shows what this host offers and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(*, as_json: bool) -> int:
    """Shows what this host offers, what is missing and how to get it."""
    host = probe()
    linux = linux_host(host)
    usable = host.enforcement is not None
    if as_json:
        click.echo(json.dumps(_facts(host, linux), indent=2))
    else:
        console = terminal_on()
        if usable:
            put(console, _table(host, linux))
        no_linux = [linux.why] if usable and linux.enforcement is None else []
        for problem in [*host.problems, *no_linux]:
            put_line(console, Text.assemble(("!", "yellow"), f" {problem[0].upper()}{problem[1:]}."))
        if usable:
            console.print("[green]✓[/green] `pagegate demo` runs here.")
            if linux.enforcement is not None:
                console.print("[green]✓[/green] `pagegate boot` runs here.")
    return 0 if usable else 3
