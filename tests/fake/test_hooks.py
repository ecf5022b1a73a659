"""What is accepted as a policy, and what happens when a hook fails."""

from __future__ import annotations

import functools
import types

import pagegate
import pytest
from pagegate import Convert, PagegateError, Policy, PolicyError, Stop, Vm
from pagegate.testing import Fake, PolicyTester, Step

from .conftest import BIT

PAGE = 4096
PRIVATE = 16


def machine(policy):
    return Vm(64 * PAGE, policy=policy, hypervisor=Fake([]))


# ---- objects that are refused as policies


class Misspelt:
    def memory_fault(self, fault):
        return Convert()

    def map_gpa_rnage(self, call):
        return Convert()


class MisspeltAlone(Policy):
    def memory_falt(self, fault):
        return Convert()


class CamelCase(Policy):
    def memoryFault(self, fault):  # noqa: N802
        return Convert()


class NoArgument:
    def memory_fault(self):
        return Convert()


class TwoArguments:
    def memory_fault(self, fault, more):
        return Convert()


class KeywordOnly:
    def memory_fault(self, *, fault):
        return Convert()


class Unrelated:
    def judge(self, fault):
        return Convert()


class Asynchronous:
    async def memory_fault(self, fault):
        return Convert()


class NotCallable:
    memory_fault = 5


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (Misspelt(), "map_gpa_rnage.*map_gpa_range"),
        (MisspeltAlone(), "memory_falt.*memory_fault"),
        (CamelCase(), "memoryFault.*memory_fault"),
        (NoArgument(), "memory_fault.*one argument"),
        (TwoArguments(), "memory_fault.*one argument"),
        (KeywordOnly(), "memory_fault.*one argument"),
        (Unrelated(), "memory_fault"),
        (object(), "memory_fault"),
        (5, "memory_fault"),
        (Asynchronous(), "async"),
        (NotCallable(), "callable"),
        (Misspelt, "class"),
        (Policy, "class"),
        (types.ModuleType("empty"), "module empty"),
    ],
    ids=lambda value: None if isinstance(value, str) else getattr(value, "__name__", type(value).__name__),
)
def test_an_object_that_is_no_policy_is_refused(policy, says) -> None:
    with pytest.raises(PolicyError, match=says):
        machine(policy)


def test_a_refused_policy_leaves_no_file_open(kvm_objects) -> None:
    before = kvm_objects()
    with pytest.raises(PolicyError):
        machine(object())
    assert kvm_objects() == before


# ---- objects that are accepted


def run_one(policy, step=None):
    with Vm(64 * PAGE, policy=policy, hypervisor=Fake([step or Step.memory_fault(PAGE)])) as vm:
        vm.vcpus[0].start()
        report = vm.run(timeout=10)
        return report, vm.attributes.private_bytes


def test_a_policy_without_hooks_has_the_defaults() -> None:
    report, private = run_one(Policy())
    assert (report.reason, report.conversions, private) == ("halt", 1, PAGE)


def test_missing_hooks_are_the_defaults() -> None:
    class OnlyExplicit:
        def map_gpa_range(self, call):
            return Stop("explicit")

    assert run_one(OnlyExplicit())[1] == PAGE
    assert run_one(OnlyExplicit(), Step.hypercall(PAGE, 1, PRIVATE))[0].reason == "explicit"


def test_any_callable_is_a_hook() -> None:
    class Attributes:
        memory_fault = staticmethod(lambda fault: Stop("lambda"))

        def __init__(self) -> None:
            self.map_gpa_range = functools.partial(lambda reason, call: Stop(reason), "partial")

    assert run_one(Attributes())[0].reason == "lambda"
    assert run_one(Attributes(), Step.doorbell(PAGE, 1, PRIVATE))[0].reason == "partial"


def test_hooks_with_defaults_and_varargs_are_accepted() -> None:
    class Roomy:
        def memory_fault(self, fault, reason="default"):
            return Stop(reason)

        def map_gpa_range(self, *calls):
            return Stop(str(len(calls)))

    assert run_one(Roomy())[0].reason == "default"
    assert run_one(Roomy(), Step.doorbell(PAGE, 1, PRIVATE))[0].reason == "1"


def module(source):
    made = types.ModuleType("some_policy")
    exec(source, made.__dict__)
    return made


def test_a_module_is_a_policy() -> None:
    policy = module("from pagegate import Stop\ndef memory_fault(fault):\n    return Stop('module')\n")
    assert run_one(policy)[0].reason == "module"


def test_a_module_may_import_the_names_of_requests() -> None:
    policy = module(
        "from pagegate import Convert, Deny, MapGpaRange, MemoryFault, MemoryPoison, Policy, Stop, policies\n"
        "def memory_fault(fault: MemoryFault) -> Stop:\n    return Stop('typed')\n"
    )
    assert run_one(policy)[0].reason == "typed"


def test_hooks_are_resolved_once() -> None:
    class Changing:
        def memory_fault(self, fault):
            return Stop("first")

    policy = Changing()
    with Vm(64 * PAGE, policy=policy, hypervisor=Fake([Step.memory_fault(PAGE)])) as vm:
        policy.memory_fault = lambda fault: Stop("second")
        vm.vcpus[0].start()
        assert vm.run(timeout=10).reason == "first"


# ---- answers that are no decisions


@pytest.mark.parametrize(
    "answer",
    [None, True, 0, "private", Convert, pagegate.Deny, (Convert(),), pagegate.PagegateError("returned"), ...],
    ids=repr,
)
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(Step.memory_fault(8 * PAGE), id="implicit"),
        pytest.param(Step.hypercall(8 * PAGE, 1, PRIVATE), id="explicit"),
        pytest.param(Step.memory_fault(8 * PAGE, errno=133), id="poison"),
    ],
)
def test_an_answer_that_is_no_decision_is_a_policy_error(make, recorder, answer, step) -> None:
    vm, _ = make([step], policy=recorder(lambda _: answer))
    with pytest.raises(PolicyError, match="no decision") as caught:
        vm.run(timeout=10)
    assert {"vCPU 0", "gpa 0x8000", "state shared"} <= set(caught.value.__notes__)
    assert vm.attributes.private_bytes == 0


def test_a_policy_error_has_its_site(make, recorder) -> None:
    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=recorder(lambda _: None))
    with pytest.raises(PolicyError) as caught:
        vm.run(timeout=10)
    assert (caught.value.vcpu, caught.value.gpa, caught.value.state) == (0, 8 * PAGE, "shared")


# ---- a hook that raises


class Odd(BaseException):
    pass


# Last: what the guest gets in the end, in RAX or as the word that an emulated load reads.
ASKED_AGAIN = [
    pytest.param(Step.hypercall(8 * PAGE, 2, PRIVATE), ("attributes", None), [0], id="hypercall"),
    pytest.param(Step.doorbell(8 * PAGE, 2, PRIVATE), ("attributes", None), [0], id="doorbell"),
    pytest.param(Step.access(8 * PAGE), ("memslots", BIT), [0], id="mmio"),
    pytest.param(Step.access(8 * PAGE, write=True), ("memslots", BIT), [], id="mmio-write"),
    pytest.param(Step.access(8 * PAGE), ("attributes", BIT), [], id="fault"),
    pytest.param(Step.access(8 * PAGE), ("traps", BIT), [], id="trap"),
    pytest.param(Step.access(8 * PAGE | 1 << BIT), ("traps", BIT, "private"), [], id="trap-private-bit"),
]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Odd, StopIteration])
@pytest.mark.parametrize(("step", "way", "replies"), ASKED_AGAIN)
def test_an_exception_of_a_hook_is_raised_once_and_the_request_repeated(
    make, recorder, error, step, way, replies
) -> None:
    raised = error("from the hook")

    def fail(_):
        raise raised

    policy = recorder(fail, Convert())
    vm, fake = make([step], policy=policy, way=way)
    calls = fake.calls("set_attributes")
    with pytest.raises(error) as caught:
        vm.run(timeout=10)
    assert caught.value is raised
    assert {"vCPU 0", "gpa 0x8000", "state shared"} <= set(raised.__notes__)
    assert len(raised.__notes__) == len(set(raised.__notes__))
    assert vm.attributes.private_bytes == 0
    assert fake.calls("set_attributes") == calls
    assert vm.read(8 * PAGE, 4) == bytes(4)
    # The machine can run again, and the first thing it does is to ask about the same request.
    report = vm.run(timeout=10)
    assert report.reason == "halt"
    assert len(policy.requests) == 2
    first, second = policy.requests
    assert (first.gpa, first.size, first.state) == (second.gpa, second.size, second.state)
    assert vm.attributes.is_private(8 * PAGE)
    values = [reply.value for reply in fake.replies() if reply.value is not None]
    assert values == replies


def test_the_traceback_leads_into_the_hook(make, recorder) -> None:
    def guilty(_):
        raise ValueError

    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=recorder(guilty))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        vm.run(timeout=10)
    assert caught.traceback[-1].name == "guilty"


def test_a_hook_that_raises_stops_the_other_vcpus(make, recorder) -> None:
    def fail(_):
        raise Odd

    vm, _ = make([Step.memory_fault(8 * PAGE)], [Step.block()], policy=recorder(fail))
    with pytest.raises(Odd):
        vm.run(timeout=20)


def test_of_several_failures_one_is_raised(make, recorder) -> None:
    def fail(call):
        raise ValueError(f"vCPU {call.vcpu}")

    scripts = [[Step.hypercall(page * PAGE, 1, PRIVATE)] for page in (8, 9, 10, 11)]
    policy = recorder(fail)
    vm, _ = make(*scripts, policy=policy)
    with pytest.raises(ValueError, match="vCPU") as caught:
        vm.run(timeout=10)
    assert caught.value.__notes__[0] == str(caught.value)
    assert vm.attributes.private_bytes == 0
    policy.answers = [Convert()]
    asked = len(policy.requests)
    assert vm.run(timeout=10).reason == "halt"
    # Requests whose hook failed and those that had not reached it are all asked about now, each once.
    assert vm.attributes.runs(8 * PAGE, 4 * PAGE) == [(8 * PAGE, 4 * PAGE, "private")]
    assert {call.vcpu for call in policy.requests[asked:]} == {0, 1, 2, 3}


def test_a_poison_hook_that_raises_is_raised(make, recorder) -> None:
    def fail(_):
        raise Odd

    vm, _ = make([Step.memory_fault(8 * PAGE, errno=133)], policy=recorder(fail))
    with pytest.raises(Odd) as caught:
        vm.run(timeout=10)
    assert "gpa 0x8000" in caught.value.__notes__


def test_exceptions_that_take_no_notes_are_raised(make, recorder) -> None:
    class Bare(Exception):
        def add_note(self, note):
            raise TypeError(note)

    def fail(_):
        raise Bare

    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=recorder(fail))
    with pytest.raises(Bare):
        vm.run(timeout=10)


# ---- what a hook may call


def test_run_from_inside_a_hook_is_refused(make, recorder) -> None:
    def again(_):
        with pytest.raises(PagegateError, match="running already"):
            vm.run()
        return Convert()

    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=recorder(again))
    assert vm.run(timeout=10).reason == "halt"
    assert vm.attributes.is_private(8 * PAGE)


def test_close_from_inside_a_hook_is_refused(make, recorder) -> None:
    def close(_):
        with pytest.raises(PagegateError, match="running"):
            vm.close()
        return Convert()

    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=recorder(close))
    assert vm.run(timeout=10).reason == "halt"


@pytest.mark.parametrize("step", [Step.memory_fault(8 * PAGE), Step.doorbell(8 * PAGE, 1, PRIVATE)], ids=repr)
def test_stop_from_inside_a_hook_ends_the_run_after_its_answer(make, recorder, step) -> None:
    def stop(_):
        vm.stop()
        return Convert()

    vm, _ = make([step, Step.block()], policy=recorder(stop))
    assert vm.run(timeout=20).reason == "stopped"
    assert vm.attributes.is_private(8 * PAGE)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_hook_may_read_write_and_convert(make, recorder, way, vcpus) -> None:
    def busy(call):
        vm.write(20 * PAGE, b"hello")
        vm.convert(30 * PAGE, PAGE, to="private")
        vm.convert(call.gpa, PAGE, to="private")
        assert vm.read(20 * PAGE, 5) == b"hello"
        assert vm.attributes.is_private(call.gpa)
        assert vm.memory_usage().shared > 0
        return Convert()

    script = [Step.doorbell(8 * PAGE, 1, PRIVATE)]
    vm, fake = make(script, *[[Step.block()]] * (vcpus - 1), policy=recorder(busy), way=way)
    report = vm.run(timeout=0.3 if vcpus == 2 else 10)
    assert report.reason in ("halt", "timeout")
    assert fake.replies()[0].value == 0
    assert report.bytes_to_private == 0
    assert vm.attributes.private_bytes == 2 * PAGE


def test_registers_cannot_be_read_inside_a_hook(make, recorder) -> None:
    def look(_):
        with pytest.raises(PagegateError, match="running"):
            vm.vcpus[0].regs()
        with pytest.raises(PagegateError, match="running"):
            vm.vcpus[0].start()
        return Convert()

    vm, _ = make([Step.memory_fault(8 * PAGE)], policy=recorder(look))
    assert vm.run(timeout=10).reason == "halt"


def test_requests_are_frozen_and_have_a_repr(make, recorder) -> None:
    policy = recorder()
    vm, _ = make([Step.memory_fault(8 * PAGE), Step.hypercall(8 * PAGE, 1, 0)], policy=policy)
    vm.run(timeout=10)
    fault, call = policy.requests
    for request in (fault, call):
        with pytest.raises(AttributeError):
            request.gpa = 0
        assert "gpa=0x8000" in repr(request)


# ---- request objects are reused unless a hook keeps them


def asking(pages):
    return [step for page in pages for step in (Step.doorbell(page * PAGE, 1, PRIVATE), Step.memory_fault(page * PAGE))]


def seen(request):
    return type(request).__name__, request.gpa, request.state, repr(request)


def test_requests_that_a_hook_keeps_stay_as_they_were(make, recorder) -> None:
    kept, told = [], []

    def keep(request):
        kept.append(request)
        told.append(seen(request))
        return Convert(to="shared")

    pages = range(8, 16)
    vm, _ = make(asking(pages), policy=recorder(keep))
    assert vm.run(timeout=10).reason == "halt"
    assert [gpa for _, gpa, _, _ in told] == [page * PAGE for page in pages for _ in range(2)]
    assert [seen(request) for request in kept] == told
    assert len(set(map(id, kept))) == len(kept)


def test_a_request_that_is_kept_only_sometimes_is_not_overwritten(make, recorder) -> None:
    kept, told = [], []

    def judge(request):
        if len(told) % 3 == 0:
            kept.append((request, seen(request)))
        told.append(seen(request))
        return Convert(to="shared")

    pages = range(8, 24)
    vm, _ = make(asking(pages), policy=recorder(judge))
    assert vm.run(timeout=10).reason == "halt"
    assert [gpa for _, gpa, _, _ in told] == [page * PAGE for page in pages for _ in range(2)]
    assert all(seen(request) == then for request, then in kept)


def test_a_hook_that_calls_another_policy_keeps_its_own_request() -> None:
    class Outer:
        def map_gpa_range(self, call):
            if call.gpa < 32 * PAGE:
                PolicyTester(self).call(call.gpa + 32 * PAGE, PAGE, to="shared")
            seen.append(call.gpa)
            return Convert()

    seen: list[int] = []
    tester = PolicyTester(Outer(), memory=64 * PAGE)
    for page in (1, 2, 3):
        tester.call(page * PAGE, PAGE, to="shared")
    assert seen == [gpa * PAGE for page in (1, 2, 3) for gpa in (page + 32, page)]
