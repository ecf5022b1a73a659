"""Testing policies and machines without KVM.

A policy, with requests made by the test:

    tester = PolicyTester(MyPolicy(), memory=16 << 20)
    assert tester.call(0x20_0000, 4096, to="shared") == Deny()
    assert tester.fault(0x30_0000) == Convert()
    assert tester.state(0x30_0000) == "shared"

A machine, with a hypervisor that replays a script: ``Vm(..., hypervisor=Fake([Step.doorbell(...)]))``.

pytest loads the fixtures ``policy_tester`` and ``fake_vm`` by itself, see ``pagegate.testing.plugin``.
"""

from pagegate._core import Fake, Reply, Step
from pagegate.testing.tester import PolicyTester

__all__ = ["Fake", "PolicyTester", "Reply", "Step"]
