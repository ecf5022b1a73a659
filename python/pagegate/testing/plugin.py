"""Fixtures, which pytest loads if pagegate is installed. Nothing else in pagegate needs pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pagegate import Vm
    from pagegate.testing import Fake, PolicyTester, Step


@pytest.fixture
def policy_tester() -> type[PolicyTester]:
    """Makes ``PolicyTester``s: ``policy_tester(policy, memory=..., initial=...)``."""
    from pagegate.testing import PolicyTester  # noqa: PLC0415 - not for tests of other packages

    return PolicyTester


@pytest.fixture
def fake_vm() -> Iterator[Callable[..., Vm]]:
    """Makes machines on a ``Fake``: ``fake_vm(*scripts, policy=..., memory=..., hypervisor=...)``.

    A script is a list of steps for one vCPU; all vCPUs are started. Pass a ``Fake`` as ``hypervisor`` in place of
    scripts to look at it later; ``vcpus`` then says how many there are. Other arguments are those of ``Vm``. The
    machines are closed at the end of the test.
    """
    from pagegate import Vm  # noqa: PLC0415
    from pagegate.testing import Fake  # noqa: PLC0415

    vms: list[Vm] = []

    def make(
        *scripts: Sequence[Step],
        policy: object | None = None,
        memory: int = 64 << 20,
        hypervisor: Fake | None = None,
        **options: Any,
    ) -> Vm:
        if hypervisor is not None and scripts:
            raise TypeError("scripts go to the Fake that is given as hypervisor")
        fake = Fake(*scripts) if hypervisor is None else hypervisor
        options.setdefault("vcpus", max(1, len(scripts)))
        vm = Vm(memory, policy=policy, hypervisor=fake, **options)
        vms.append(vm)
        for vcpu in vm.vcpus:
            vcpu.start(mode="long", rip=0x1000)
        return vm

    yield make
    for vm in vms:
        vm.close()
