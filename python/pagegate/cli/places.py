"""Where the vCPUs are when a run is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagegate.cli.printing import printable

if TYPE_CHECKING:
    from pagegate import Report, Vm

_MOST = 8
"""vCPUs that are listed one by one."""


def facts(vm: Vm) -> list[dict[str, Any]]:
    """Each vCPU's instruction pointer, and the kernel's function at it, for JSON. Between runs only."""
    found = []
    for vcpu in vm.vcpus:
        rip = vcpu.regs()["rip"]
        found.append({"vcpu": vcpu.index, "rip": rip, "symbol": vm.symbol(rip)})
    return found


def lines(vm: Vm, report: Report) -> list[str]:
    """The same as text. Of the vCPU that ended the run, what it was doing, too."""
    found = []
    for place in facts(vm)[:_MOST]:
        symbol = f" ({place['symbol']})" if place["symbol"] else ""
        text = f"vCPU {place['vcpu']} at rip {place['rip']:#x}{symbol}"
        if report.at is not None and report.at.vcpu == place["vcpu"]:
            text = str(report.at)
        found.append(printable(text))
    if report.at is not None and report.at.vcpu >= _MOST:
        found.append(printable(str(report.at)))
    if len(vm.vcpus) > _MOST:
        found.append(f"of {len(vm.vcpus)} vCPUs; --json has all")
    return found
