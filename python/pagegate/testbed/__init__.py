"""A machine whose KVM has software-protected VMs, on any host that can run QEMU.

QEMU emulates the machine. The host's file system is its root, and a command runs in it as it would on the host:

    >>> from pagegate import testbed
    >>> testbed.run(["pytest", "-q", "tests/testbed"])          # doctest: +SKIP
    0

A boot takes ten to twenty seconds, and the machine is 20 to 30 times slower than the host, so do many things in one
boot.
"""

from pagegate.testbed.builder import build
from pagegate.testbed.kernel import KERNEL_VARIABLE, find_kernel
from pagegate.testbed.machine import run
from pagegate.testbed.selftests import Outcome, selftest
from pagegate.testbed.supervisor import TestbedTimeoutError

__all__ = ["KERNEL_VARIABLE", "Outcome", "TestbedTimeoutError", "build", "find_kernel", "run", "selftest"]
