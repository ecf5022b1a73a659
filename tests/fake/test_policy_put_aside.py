"""What the built-in policies of a machine know is put aside with it, and comes back with it."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

import pytest
from pagegate import Convert, Policy, Region, Vm
from pagegate.policies import Align, PingPong, Quota, RateLimit
from pagegate.testing import Fake, Step

from .conftest import with_state

if TYPE_CHECKING:
    from pathlib import Path

PAGE, MEMORY, AT = 4096, 16 << 20, 0x40_0000
PRIVATE, SHARED = 16, 0
EAGAIN, DONE = errno.EAGAIN, 0


def asks(*attributes: int) -> list[Step]:
    return [*(Step.hypercall(AT, 1, to) for to in attributes), Step.halt()]


def run(vm: Vm) -> str:
    vm.vcpus[0].start(mode="long", rip=0x1000)
    return vm.run(timeout=30).reason


def saved(folder: Path, policy: object, *attributes: int) -> Path:
    """A machine that made these requests, put aside."""
    with Vm(MEMORY, hypervisor=Fake(asks(*attributes), private_memory=False), policy=policy) as vm:
        assert run(vm) == "halt"
        vm.snapshot(folder)
    return folder


def go_on(folder: Path, policy: object, *attributes: int) -> tuple[str, list[int | None]]:
    """Why the run ended, and the answers."""
    fake = Fake(asks(*attributes), private_memory=False)
    with Vm.resume(folder, hypervisor=fake, policy=policy) as vm:
        reason = run(vm)
    return reason, [reply.value for reply in fake.replies()]


def limited(burst: int = 3) -> object:
    return Quota(MEMORY, RateLimit(0.001, burst=burst, then=Align(PAGE)))


def test_a_rate_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", limited(), PRIVATE, SHARED)
    assert go_on(folder, limited(), PRIVATE, SHARED) == ("halt", [DONE, EAGAIN])
    # No more at once than the new one lets through, and nothing from a policy at another place of the chain.
    assert go_on(folder, limited(2), PRIVATE, SHARED) == ("halt", [DONE, EAGAIN])
    assert go_on(folder, RateLimit(0.001, burst=3), *[PRIVATE, SHARED] * 2) == ("halt", [DONE, DONE, DONE, EAGAIN])
    assert go_on(folder, None, *[PRIVATE, SHARED] * 2) == ("halt", [DONE] * 4)


def test_turns_are_counted_on(tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", PingPong(3, window=60), PRIVATE, SHARED, PRIVATE)
    reason, replies = go_on(folder, PingPong(3, window=60), SHARED, PRIVATE, SHARED)
    assert reason.startswith(f"ping-pong: {AT:#x} changed direction 4 times"), reason
    assert replies == [DONE, EAGAIN]
    # A shorter window has none of them in it.
    assert go_on(folder, PingPong(3, window=1e-6), SHARED, PRIVATE)[0] == "halt"


@pytest.mark.userfault
def test_a_reset_puts_back_what_they_know(tmp_path: Path) -> None:
    policy = PingPong(2, window=600)
    folder = saved(tmp_path / "saved", policy, PRIVATE)
    fake = Fake([step for _ in range(9) for step in (Step.hypercall(AT, 1, SHARED), Step.halt())], private_memory=False)
    with Vm.resume(folder, hypervisor=fake, policy=policy, lazy=True) as vm:
        for _ in range(9):
            assert run(vm) == "halt"
            vm.reset_to(folder)


@pytest.mark.userfault
def test_a_remembered_decision_is_asked_for_again(tmp_path: Path) -> None:
    class Learns(Policy):
        asked = 0

        def map_gpa_range(self, call) -> Convert:
            self.asked += 1
            return Convert(remember=Region(0, MEMORY))

    policy = Learns()
    folder = saved(tmp_path / "saved", policy, PRIVATE, SHARED, PRIVATE)
    assert policy.asked == 2
    steps = [step for _ in range(2) for step in asks(SHARED)]
    with Vm.resume(folder, hypervisor=Fake(steps, private_memory=False), policy=policy, lazy=True) as vm:
        assert run(vm) == "halt"
        assert policy.asked == 3
        vm.reset_to(folder)
        assert run(vm) == "halt"
        assert policy.asked == 4


@pytest.mark.parametrize(
    "known",
    [
        [{"Tokens": 1e300}],
        [{"Tokens": -1.0}],
        [{"Turns": [{"gpa": 1, "size": 2, "private": True, "ages": []}]}],
        [{"Turns": [{"gpa": AT, "size": PAGE, "private": True, "ages": [2**64 - 1] * 9}] * 1000}],
        [None] * 3000,
        [],
    ],
    ids=range(6),
)
@pytest.mark.parametrize(
    "make", [lambda: RateLimit(0.001, burst=3), lambda: PingPong(3, window=60)], ids=["rate", "turns"]
)
def test_what_nothing_can_know_is_nothing(tmp_path: Path, known, make) -> None:
    folder = saved(tmp_path / "saved", make(), PRIVATE)
    state = json.loads((folder / "state.json").read_bytes())
    assert len(state["policy"]) == 1
    state["policy"] = known
    with_state(folder, json.dumps(state))
    policy = make()
    reason, replies = go_on(folder, policy, *[SHARED, PRIVATE] * 2)
    if isinstance(policy, RateLimit):
        assert (reason, replies) == ("halt", [DONE, DONE, DONE, EAGAIN])
    else:
        # The first one was a turn where the page is known to have been private.
        assert replies == [DONE] * (4 if reason == "halt" else 3) + [EAGAIN] * (reason != "halt")
