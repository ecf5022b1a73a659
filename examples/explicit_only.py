"""Only what the guest asks for in so many words is converted; a mere touch ends the run and names the instruction.

Against guest bugs: KVM reports an access to a page in the wrong state as if the guest wanted it converted, but a stray
pointer looks the same. A guest that always asks (KVM_HC_MAP_GPA_RANGE) never needs this kindness.

    pagegate run -p examples/explicit_only.py --guest explicit
"""

from __future__ import annotations

from dataclasses import dataclass

from pagegate import Deny, MemoryFault, Policy, Stop


@dataclass
class ExplicitOnly(Policy):
    """``pagegate.policies.ExplicitOnly`` in Python, with evidence."""

    evidence: bool = True
    """Say in the report's reason what was touched, and by which instruction; else the reason is "denied"."""

    def memory_fault(self, fault: MemoryFault) -> Deny | Stop:
        """Refuses."""
        if not self.evidence:
            return Deny()
        side = "private" if fault.private else "shared"
        return Stop(
            f"not asked for: vCPU {fault.vcpu} touched {fault.gpa:#x} as {side}, which is {fault.state}, "
            f"by the instruction at {fault.rip:#x}"
        )
