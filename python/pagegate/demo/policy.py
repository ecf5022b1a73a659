"""The demo's policy. Copy it, change it, and run `pagegate demo -p FILE`."""

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy

KERNEL_END = 0x100_0000  # the guest's own code and data, which it never shares on purpose
RING = range(0x300_0000, 0x304_0000)  # the guest's device ring: nothing private is ever kept there
CLUSTER = 64 << 10  # the ring is shared in blocks of this size, to save exits


class KeepTheKernelPrivate(Policy):
    """Allows what a confidential guest needs, denies what would expose it, and widens to save exits."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """Explicit: the guest asked. A request to share its kernel is a bug or an attack."""
        if call.to == "shared" and call.gpa < KERNEL_END:
            return Deny()
        return Convert()

    def memory_fault(self, fault: MemoryFault) -> Convert:
        """Implicit: the guest touched a page in the wrong state."""
        # A page that changes state loses its bytes, and widening converts pages that nobody asked for. So it is done
        # only where the guest keeps nothing private; elsewhere the neighbouring pages would lose their contents.
        if fault.private or fault.gpa not in RING:
            return Convert()
        return Convert(gpa=fault.gpa - fault.gpa % CLUSTER, size=CLUSTER)
