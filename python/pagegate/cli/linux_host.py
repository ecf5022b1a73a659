"""Whether Linux can be booted on this host, and how its page states would be enforced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pagegate import guests

if TYPE_CHECKING:
    from pagegate import Host

REMEDY = "`pagegate testbed -- pagegate boot KERNEL` boots it in a machine whose KVM can"
_SOFTWARE_VIRTUALISED = Path("/sys/module/kvm_pvm")
_TRIAL_SECONDS = 5.0


@dataclass(frozen=True)
class LinuxHost:
    """What a Linux guest gets on this host."""

    enforcement: str | None
    """What "auto" selects for a guest with private memory; ``None`` if no Linux boots here."""
    why: str
    """Why it is this one, or why none and what to do about it: one sentence, without its first capital and its stop."""


def linux_host(host: Host) -> LinuxHost:
    """Says what a Linux guest gets on this host, whose offers ``host`` has. Tries one hypercall."""
    if host.enforcement is None:
        return LinuxHost(None, "; ".join(host.problems))
    if _SOFTWARE_VIRTUALISED.exists():
        why = "KVM is software-virtualised here (module kvm_pvm), where a hypercall never completes and no Linux boots"
        return LinuxHost(None, f"{why}; {REMEDY}")
    if host.exit_hypercall and not guests.hypercall_completes(_TRIAL_SECONDS):
        why = f"a hypercall does not complete within {_TRIAL_SECONDS:g} s on this host, and Linux makes some"
        return LinuxHost(None, f"{why}; {REMEDY}")
    if host.enforcement == "attributes":
        return LinuxHost("traps", "this host has VMs with private memory, and a Linux guest two views of each page")
    return LinuxHost("memslots", "this host has no VMs with private memory")
