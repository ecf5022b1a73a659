"""A machine whose KVM has software-protected VMs, on any host that can run QEMU.

The machine is emulated, its root is the host's file system, and a command runs in it as if it ran here:

    >>> from pagegate import testbed
    >>> testbed.run(["pytest", "-q", "tests/testbed"])          # doctest: +SKIP
    0

A boot takes ten to twenty seconds, and the machine is 20 to 30 times slower than the host: give one boot many things
to do.
"""

from pagegate.testbed.builder import build
from pagegate.testbed.kernel import KERNEL_VARIABLE, find_kernel
from pagegate.testbed.machine import run
from pagegate.testbed.selftests import Outcome, selftest
from pagegate.testbed.supervisor import TestbedTimeoutError

__all__ = ["KERNEL_VARIABLE", "Outcome", "TestbedTimeoutError", "build", "find_kernel", "run", "selftest"]
