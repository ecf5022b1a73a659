"""Converts explicit requests only; an implicit one ends the run, and the reason names the instruction.

For finding guest bugs: KVM reports every access to a page in the wrong state as if the guest wanted the page converted,
but a stray pointer causes the same exit. A guest that uses KVM_HC_MAP_GPA_RANGE needs no implicit conversions.

    pagegate run -p examples/explicit_only.py --guest explicit
"""

from __future__ import annotations

from dataclasses import dataclass

from pagegate import Deny, MemoryFault, Policy, Stop


@dataclass
class ExplicitOnly(Policy):
    """As ``pagegate.policies.ExplicitOnly``, in Python, with evidence in the report."""

    evidence: bool = True
    """Whether the report's reason names the page and the instruction; if not, it is "denied"."""

    def memory_fault(self, fault: MemoryFault) -> Deny | Stop:
        """Refuses every implicit request."""
        if not self.evidence:
            return Deny()
        side = "private" if fault.private else "shared"
        return Stop(
            f"not asked for: vCPU {fault.vcpu} touched {fault.gpa:#x} as {side}, which is {fault.state}, "
            f"by the instruction at {fault.rip:#x}"
        )
