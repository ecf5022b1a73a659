"""The demo's policy. Copy it, change it, and run `pagegate demo -p FILE`."""

from pagegate import Convert, Deny, MapGpaRange, MemoryFault, Policy

KERNEL_END = 0x100_0000  # the guest's own code and data: never to be shared on request
RING = range(0x300_0000, 0x304_0000)  # the guest's device ring, where it never keeps anything private
CLUSTER = 64 << 10  # what is touched page by page there is shared by the cluster, to save exits


class KeepTheKernelPrivate(Policy):
    """Allows what a confidential guest needs, denies what would expose it, widens what would be slow."""

    def map_gpa_range(self, call: MapGpaRange) -> Convert | Deny:
        """Explicit: the guest asked. Sharing its kernel can only be a mistake, or somebody else's idea."""
        if call.to == "shared" and call.gpa < KERNEL_END:
            return Deny()
        return Convert()

    def memory_fault(self, fault: MemoryFault) -> Convert:
        """Implicit: the guest touched a page in the wrong state."""
        # A page that changes its state loses its bytes, and widening takes pages along that nobody asked about. So it
        # is done only where the guest keeps nothing private; elsewhere it would wipe out the neighbours' contents.
        if fault.private or fault.gpa not in RING:
            return Convert()
        return Convert(gpa=fault.gpa - fault.gpa % CLUSTER, size=CLUSTER)
