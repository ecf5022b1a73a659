"""What is around hooks: configure, running and done; hooks that want only some requests; asyncio."""

from __future__ import annotations

import asyncio
import functools
import gc
import signal
import threading
import types
import weakref

import pagegate
import pytest
from pagegate import Convert, Deny, Policy, PolicyError, Stop, Vm, only, policies
from pagegate.testing import Fake, PolicyTester, Step

PAGE = 4096
PRIVATE = 16


class Told(Policy):
    def __init__(self, answer=None) -> None:
        self.told: list[str] = []
        self.answer = answer or Convert()

    def map_gpa_range(self, call):
        self.told.append("asked")
        return self.answer

    def configure(self, vm) -> None:
        self.told.append(f"configure {vm.memory >> 20} {vm.running}")

    def running(self, vm) -> None:
        self.told.append(f"running {vm.running}")

    def done(self, report) -> None:
        self.told.append(f"done {report.reason}")


def machine(policy, *steps, **options):
    vm = Vm("1M", policy=policy, hypervisor=Fake(list(steps) or [Step.doorbell(0, 1, PRIVATE)]), **options)
    vm.vcpus[0].start(rip=0x1000)
    return vm


def test_a_policy_is_told_of_its_machine_and_of_each_run():
    policy = Told()
    with machine(policy) as vm:
        vm.run(timeout=10)
        vm.run(timeout=10)
    first = ["configure 1 True", "running True", "asked", "done halt"]
    assert policy.told == [*first, "running True", "done halt"], "the guest asks once"


def test_the_policy_at_the_end_of_a_chain_is_told_by_each_machine():
    policy = Told()
    chain = policies.Quota("1M", policies.Align(PAGE, policy))
    for _ in range(2):
        with machine(chain) as vm:
            vm.run(timeout=10)
    assert policy.told == ["configure 1 True", "running True", "asked", "done halt"] * 2


def test_a_policy_that_is_put_in_place_is_told_before_it_is_asked():
    first, second = Told(), Told()

    class Replaces(Policy):
        def map_gpa_range(self, call):
            vm.policy.replace(second)
            return Convert()

    with machine(first, Step.doorbell(0, 1, PRIVATE), Step.doorbell(PAGE, 1, PRIVATE)) as vm:
        vm.policy.replace(Replaces())
        vm.run(timeout=10)
    assert first.told == []
    assert second.told == ["configure 1 True", "asked", "done halt"]


@pytest.mark.parametrize("hook", ["configure", "running"])
def test_what_is_raised_before_a_run_is_raised_by_it_and_nothing_runs(hook):
    class Broken(Told):
        pass

    failing = [True]

    def fail(self, vm):
        if failing:
            raise ZeroDivisionError
        getattr(Told, hook)(self, vm)

    setattr(Broken, hook, fail)
    policy = Broken()
    with machine(policy) as vm:
        with pytest.raises(ZeroDivisionError):
            vm.run(timeout=10)
        assert "asked" not in policy.told
        assert vm.report is None
        failing.clear()
        vm.run(timeout=10)
        assert policy.told[-3:] == ["running True", "asked", "done halt"]
        assert policy.told.count("configure 1 True") == 1


def test_a_run_that_fails_is_done_too_and_has_a_report():
    class Fails(Told):
        def map_gpa_range(self, call):
            raise KeyError("why")

    policy = Fails()
    with machine(policy) as vm:
        with pytest.raises(KeyError, match="why"):
            vm.run(timeout=10)
        assert policy.told[-1] == "done failed"
        assert (vm.report.reason, vm.report.hypercalls) == ("failed", 1)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TimeoutError])
def test_a_run_that_a_signal_s_handler_ends_has_a_report(raised):
    """Ctrl-C is one: Python's own handler of SIGINT raises KeyboardInterrupt."""

    def handle(number, frame):
        raise raised

    policy = Told()
    before = signal.signal(signal.SIGALRM, handle)
    try:
        with machine(policy, *requests(0), Step.block()) as vm:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(raised):
                vm.run(timeout=10)
            assert (vm.report.reason, vm.report.hypercalls) == ("interrupted", 1)
            assert policy.told[-1] == "done interrupted"
            assert vm.run(timeout=0.1).reason == "halt"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_livelock_has_a_report():
    with machine(policies.Allow(), *[Step.memory_fault(0x5000, flags=0)] * 2000, initial="shared") as vm:
        with pytest.raises(pagegate.Livelock):
            vm.run(timeout=30)
        assert vm.report.reason == "livelock"


def test_done_that_raises_is_raised_unless_the_run_was():
    class Done(Told):
        def done(self, report):
            raise RuntimeError("done")

    with machine(Done()) as vm, pytest.raises(RuntimeError, match="done"):
        vm.run(timeout=10)

    class Both(Done):
        def map_gpa_range(self, call):
            raise KeyError("run")

    with machine(Both()) as vm, pytest.raises(KeyError, match="run") as raised:
        vm.run(timeout=10)
    assert "done() raised RuntimeError afterwards" in raised.value.__notes__

    class Exits(Both):
        def done(self, report):
            raise SystemExit(3)

    with machine(Exits()) as vm, pytest.raises(SystemExit):
        vm.run(timeout=10)


def test_other_objects_may_have_such_names_for_their_data():
    class Mine:
        running = False
        done = 0

        def map_gpa_range(self, call):
            return Convert()

    with machine(Mine()) as vm:
        assert vm.run(timeout=10).conversions == 1
    module = types.ModuleType("mine")
    exec("from logging import basicConfig as configure\ndef map_gpa_range(call): return None", module.__dict__)
    PolicyTester(module)
    with pytest.raises(PolicyError, match="done.* must take exactly one argument"):
        PolicyTester(type("Wrong", (Mine,), {"done": lambda self: None})())


def test_only_lifecycle_hooks_keep_requests_out_of_python():
    class Watches(Policy):
        def configure(self, vm):
            self.vm = vm

    with machine(Watches()) as vm:
        vm.run(timeout=10)
        assert vm.policy.seen == 0


def test_a_policy_that_keeps_its_machine_is_garbage_with_it():
    policy = Told()
    policy.configure = functools.partial(setattr, policy, "vm")
    vm = machine(policy)
    vm.run(timeout=10)
    gone = weakref.ref(vm)
    del vm, policy
    gc.collect()
    assert gone() is None


# ---- only()

REQUESTS = [(gpa, pages, to) for gpa in (0, 0x4000, 0x8000) for pages in (1, 4) for to in ("private", "shared")]


@pytest.mark.parametrize(
    ("conditions", "wants"),
    [
        ({}, lambda gpa, size, to: True),
        ({"to": "shared"}, lambda gpa, size, to: to == "shared"),
        ({"gpa": range(0x5000, 0x9000)}, lambda gpa, size, to: gpa < 0x9000 and gpa + size > 0x5000),
        ({"gpa": [range(0x1000), range(0x8000, 0x9000)]}, lambda gpa, size, to: gpa in (0, 0x8000)),
        ({"least": 2 * PAGE}, lambda gpa, size, to: size > PAGE),
        ({"most": PAGE}, lambda gpa, size, to: size == PAGE),
        ({"vcpu": 0}, lambda gpa, size, to: True),
        ({"vcpu": (1, 2)}, lambda gpa, size, to: False),
        ({"to": "private", "most": PAGE}, lambda gpa, size, to: to == "private" and size == PAGE),
    ],
    ids=str,
)
def test_a_hook_is_asked_only_what_it_wants(conditions, wants):
    class Mine(Policy):
        @only(**conditions)
        def map_gpa_range(self, call):
            return Deny(9)

    for gpa, pages, to in REQUESTS:
        tester = PolicyTester(Mine(), memory="1M", initial="shared" if to == "private" else "private")
        expected = Deny(9) if wants(gpa, pages * PAGE, to) else Convert()
        assert tester.call(gpa, pages * PAGE, to=to) == expected
    with machine(
        Mine(), *(Step.doorbell(gpa, pages, PRIVATE * (to == "private")) for gpa, pages, to in REQUESTS)
    ) as vm:
        report = vm.run(timeout=10)
        assert report.denied == vm.policy.seen == sum(wants(gpa, pages * PAGE, to) for gpa, pages, to in REQUESTS)


def test_a_fault_is_filtered_too():
    class Mine(Policy):
        @only(to="private")
        def memory_fault(self, fault):
            return Stop("asked")

    assert PolicyTester(Mine(), initial="private").fault(0) == Convert()
    assert PolicyTester(Mine(), initial="shared").fault(0) == Stop("asked")


@pytest.mark.parametrize(
    ("conditions", "kind", "said"),
    [
        ({"to": "odd"}, ValueError, "to is 'odd'"),
        (
            {"gpa": 0x1000},
            TypeError,
            r"gpa is 0x1000: it must be a range of addresses, such as range\(0x1000, 0x2000\)",
        ),
        ({"gpa": [3]}, TypeError, "it must be a range of addresses"),
        ({"gpa": range(1, 4096)}, ValueError, "multiples of 4096"),
        ({"gpa": range(4096, 0)}, ValueError, "the first lower"),
        ({"least": "4K"}, TypeError, "least is '4K': it must be an int"),
        ({"vcpu": -1}, ValueError, "vcpu is -1"),
        ({"least": 1 << 64}, ValueError, "least is 18446744073709551616: it must be between"),
        ({"vcpu": 1 << 32}, ValueError, "vcpu is 4294967296"),
        ({"gpa": range((1 << 64) + PAGE)}, ValueError, r"at most 2\*\*64"),
        ({"gpa": []}, ValueError, "gpa is empty"),
        ({"vcpu": set()}, ValueError, "vcpu is empty"),
        ({"most": 0}, ValueError, "no request is so small"),
        ({"least": 8192, "most": PAGE}, ValueError, "no request is so small"),
        ({"odd": 1}, TypeError, "odd"),
    ],
    ids=str,
)
def test_conditions_that_make_no_sense(conditions, kind, said):
    with pytest.raises(kind, match=said):
        only(**conditions)


def test_other_hooks_have_no_conditions():
    class Mine(Policy):
        @only(to="shared")
        def memory_poison(self, poison):
            return Stop("poison")

    with pytest.raises(PolicyError, match=r"memory_poison of a Mine has @only\(\)"):
        PolicyTester(Mine())


# ---- asyncio


def test_await_a_run_and_follow_its_events():
    async def main():
        with machine(Told(), *(Step.doorbell(n * PAGE, 1, PRIVATE) for n in range(50))) as vm:

            async def watch():
                return [event.sequence async for event in vm.events.follow(interval=0.001)]

            watching = asyncio.create_task(watch())
            report = await vm.run_async(timeout=10)
            return report, await asyncio.wait_for(watching, 10)

    report, seen = asyncio.run(main())
    assert (report.reason, report.requests) == ("halt", 50)
    assert seen == list(range(50))


def requests(*pages):
    return [Step.doorbell(page * PAGE, 1, PRIVATE) for page in pages]


def test_following_ends_with_the_run_and_gives_nothing_of_the_next():
    async def main():
        steps = [*requests(0, 1), Step.block(), *requests(2, 3)]
        with machine(Told(), *steps) as vm:
            first = asyncio.create_task(vm.run_async(timeout=10))
            while vm.events.total < 2:
                await asyncio.sleep(0.001)
            follow = vm.events.follow(interval=0.001)
            seen = [(await anext(follow)).sequence]
            vm.stop()
            await first
            assert (await vm.run_async(timeout=10)).requests == 2
            seen += [event.sequence async for event in follow]
            return seen, [event.sequence async for event in vm.events.follow()]

    seen, all_of_them = asyncio.run(main())
    assert seen == [0, 1]
    assert all_of_them == [0, 1, 2, 3], "asked after it was over: what is kept, up to the end of the last run"


def test_following_goes_on_while_a_next_run_is_in_progress():
    """It gives what is left of its own run, and ends."""

    async def main():
        with machine(Told(), *requests(0, 1), Step.block(), *requests(2), Step.block()) as vm:
            first = asyncio.create_task(vm.run_async(timeout=10))
            while vm.events.total < 2:
                await asyncio.sleep(0.001)
            follow = vm.events.follow()
            vm.stop()
            await first
            second = asyncio.create_task(vm.run_async(timeout=10))
            while vm.events.total < 3:
                await asyncio.sleep(0.001)
            seen = await asyncio.wait_for(collected(follow), 5)
            vm.stop()
            await second
            return seen

    async def collected(events):
        return [event.sequence async for event in events]

    assert asyncio.run(main()) == [0, 1]


def test_following_the_log_of_a_machine_that_is_closed():
    async def main(vm):
        return [event.sequence async for event in vm.events.follow()]

    with machine(Told(), *requests(0, 1), Step.block(), *requests(2)) as vm:
        vm.run(timeout=0.2)
        vm.run(timeout=10)
    assert asyncio.run(main(vm)) == [0, 1, 2]


def test_following_does_not_wait_for_a_run_once_the_machine_is_closed():
    async def main():
        with machine(Told()) as vm:
            following = asyncio.ensure_future(anext(vm.events.follow(interval=0.001), None))
            await asyncio.sleep(0.05)
            assert not following.done()
        return await asyncio.wait_for(following, 10)

    assert asyncio.run(main()) is None


@pytest.mark.parametrize("hook", ["configure", "running"])
def test_following_does_not_wait_for_a_run_that_failed_before_it_was_asked(hook):
    policy = Told()

    def fail(vm):
        raise ZeroDivisionError

    setattr(policy, hook, fail)

    async def main():
        with machine(policy) as vm:
            with pytest.raises(ZeroDivisionError):
                await vm.run_async(timeout=10)
            return [event async for event in vm.events.follow()]

    assert asyncio.run(asyncio.wait_for(main(), 10)) == []


def test_what_a_run_raises_is_raised_where_it_is_awaited():
    class Broken(Policy):
        def map_gpa_range(self, call):
            raise ZeroDivisionError

    async def main():
        with machine(Broken()) as vm:
            await vm.run_async()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())


def test_a_hook_that_runs_out_of_an_iterator_ends_what_awaits_it():
    class Exhausted(Policy):
        def map_gpa_range(self, call):
            return next(iter(()))

    async def main():
        with machine(Exhausted()) as vm:
            await asyncio.wait_for(vm.run_async(), 10)

    with pytest.raises(RuntimeError, match="StopIteration") as raised:
        asyncio.run(main())
    assert isinstance(raised.value.__cause__, StopIteration)


def test_a_run_that_is_cancelled_is_stopped():
    entered = threading.Event()

    class Waits(Policy):
        def map_gpa_range(self, call):
            entered.set()
            return Convert()

    async def main():
        with machine(Waits(), Step.doorbell(0, 1, PRIVATE), Step.block()) as vm:
            task = asyncio.create_task(vm.run_async())
            while not entered.is_set():
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not vm.running
            return vm.report

    assert asyncio.run(main()).reason == "stopped"
