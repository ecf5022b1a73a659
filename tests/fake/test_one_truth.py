"""For random requests, decisions and failures, the map, KVM and a naive model agree on every page."""

from __future__ import annotations

import dataclasses
import errno

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagegate import Convert, Deny, PagegateError, Retry, Vm
from pagegate.testing import Fake, Step

from .conftest import enforced, mapped

PAGE = 4096
PAGES = 24
# The other pages are for the page tables of mode "long", at the top of memory.
MEMORY = (PAGES + 8) * PAGE
MARK = 0x77
FAILING = {
    "attributes": ["set_attributes", "discard", "create_memslot", "delete_memslot"],
    "memslots": ["create_memslot", "delete_memslot", "discard"],
}


@dataclasses.dataclass
class Operation:
    kind: str  # hypercall, doorbell, access, fault, host
    page: int
    pages: int
    to: str
    decision: object
    failing: tuple[str, int, bool] | None


def decisions():
    ranges = st.tuples(st.none() | st.sampled_from(["private", "shared"]), spans())
    convert = st.builds(
        lambda to, span: Convert(to, span[0] * PAGE, span[1] * PAGE), ranges.map(lambda r: r[0]), spans()
    )
    return st.one_of(st.just(Convert()), convert, st.just(Deny(errno.EPERM)), st.just(Retry()))


def spans():
    return st.integers(0, PAGES - 1).flatmap(lambda page: st.tuples(st.just(page), st.integers(1, PAGES - page)))


@st.composite
def operations(draw, mode):
    page, pages = draw(spans())
    failing = None
    if draw(st.integers(0, 2)) == 0:
        call = draw(st.sampled_from(FAILING[mode]))
        failing = (call, draw(st.integers(0, 3)), draw(st.booleans()))
    return Operation(
        kind=draw(st.sampled_from(["hypercall", "doorbell", "access", "fault", "host"])),
        page=page,
        pages=pages,
        to=draw(st.sampled_from(["private", "shared"])),
        decision=draw(decisions()),
        failing=failing,
    )


class Model:
    """The state of each page in a list, compared with the map and with KVM after each operation."""

    def __init__(self, mode: str, bit: int | None, plan: list[Operation]) -> None:
        self.bit, self.plan = bit, plan
        self.states = ["shared"] * (MEMORY // PAGE)
        self.current: Operation | None = None
        self.converting: tuple[int, int, str] | None = None
        self.injected: tuple[str, int] | None = None
        self.answered = 0
        steps = []
        for operation in plan:
            steps += [self.step(operation), Step.io_write(MARK, b"!")]
        self.fake = Fake([Step.io_write(MARK, b"!"), *steps], private_memory=mode == "attributes")
        self.vm = Vm(MEMORY, policy=self, hypervisor=self.fake, shared_bit=bit)
        assert self.vm.enforcement == mode
        self.vm.on_io(MARK, self.between)
        self.vm.vcpus[0].start(mode="long")

    def step(self, operation: Operation):
        gpa = operation.page * PAGE
        if operation.kind in ("hypercall", "doorbell"):
            return getattr(Step, operation.kind)(gpa, operation.pages, 16 * (operation.to == "private"))
        view = 0 if self.bit is None or operation.to == "private" else 1 << self.bit
        if operation.kind == "access":
            return Step.access(gpa | view)
        if operation.kind == "fault":
            return Step.memory_fault(gpa | view, flags=8 * (operation.to == "private"))
        return Step.io_write(0x80, b"host's turn")

    # ---- the policy

    def _decide(self, gpa: int, size: int, to: str):
        operation = self.current
        assert operation is not None
        decision = operation.decision
        implicit = operation.kind in ("access", "fault")
        if implicit and not isinstance(decision, Convert):
            decision = Convert()
        if operation.kind == "access" and not self._satisfies(decision, gpa, to):
            decision = Convert()  # otherwise the access would fault for ever
        if isinstance(decision, Convert):
            gpa = gpa if decision.gpa is None else decision.gpa
            size = size if decision.size is None else decision.size
            self.converting = (gpa // PAGE, size // PAGE, decision.to or to)
        return decision

    @staticmethod
    def _satisfies(decision, gpa: int, to: str) -> bool:
        if decision.gpa is None:
            return True
        return (decision.to or to) == to and decision.gpa <= gpa < decision.gpa + decision.size

    def memory_fault(self, fault):
        to = "private" if fault.private else "shared"
        assert self.states[fault.gpa // PAGE] == fault.state != to
        return self._decide(fault.gpa, fault.size, to)

    def map_gpa_range(self, call):
        states = set(self.states[call.gpa // PAGE : (call.gpa + call.size) // PAGE])
        assert call.state == (states.pop() if len(states) == 1 else "mixed")
        return self._decide(call.gpa, call.size, call.to)

    # ---- between operations

    def between(self, _io) -> None:
        """Called on the vCPU's thread when one operation is over and the next one begins."""
        if self.current is not None:
            self.settle(failed=None)
            self.compare()
        self.current = self.plan.pop(0) if self.plan else None
        if self.current is None:
            return
        if self.current.failing is not None and self.spent():
            call, after, half_done = self.current.failing
            self.injected = (call, self.fake.calls(call) + after)
            self.fake.inject(call, errno.ENOMEM, after=after, half_done=half_done)
        if self.current.kind == "host":
            span = (self.current.page, self.current.pages, self.current.to)
            self.converting = span
            try:
                self.vm.convert(span[0] * PAGE, span[1] * PAGE, to=span[2])
            except PagegateError as error:
                self.settle(failed=error)
            self.compare()
            if self.converting is not None:
                self.settle(failed=None)
                self.compare()

    def spent(self) -> bool:
        """Whether the injected failure has happened. Otherwise an undo could meet it, which another test is about."""
        return self.injected is None or self.fake.calls(self.injected[0]) > self.injected[1]

    def settle(self, failed: PagegateError | None) -> None:
        replies = self.fake.replies()
        answers = [reply.value for reply in replies[self.answered :] if reply.value is not None]
        kind = self.current.kind if self.current else ""
        self.answered = len(replies)
        converting, self.converting = self.converting, None
        if failed is not None:
            assert "ENOMEM" in str(failed)
            # The conversion was undone, unless it was the discard that failed.
            if "discarding" not in str(failed):
                return
        elif kind in ("hypercall", "doorbell"):
            (answer,) = answers
            if converting is None:
                assert answer in (errno.EPERM, errno.EAGAIN)
            else:
                assert answer in (0, errno.ENOMEM)
            if answer != 0:
                return
        if converting is not None:
            page, pages, to = converting
            self.states[page : page + pages] = [to] * pages

    def compare(self) -> None:
        runs = []
        for page, state in enumerate(self.states):
            if runs and runs[-1][2] == state:
                runs[-1][1] += PAGE
            else:
                runs.append([page * PAGE, PAGE, state])
        expected = [tuple(run) for run in runs]
        if self.converting is None:
            assert self.vm.attributes.runs() == expected
            assert self.vm.attributes.private_bytes == self.states.count("private") * PAGE
        for page, state in enumerate(mapped(self.vm)):
            assert enforced(self.vm, self.fake, page * PAGE) == state, f"page {page}"

    def run(self) -> None:
        with self.vm:
            for _ in range(200):
                try:
                    if self.vm.run(timeout=30).reason == "halt":
                        break
                except PagegateError as error:
                    self.settle(failed=error)
                    self.compare()
            else:
                raise AssertionError("the script does not end")
            assert self.plan == []
            self.compare()


def test_map_and_kvm_and_a_naive_model_agree(way) -> None:
    mode, bit = way

    @given(plan=st.lists(operations(mode), min_size=1, max_size=12))
    @settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
    def check(plan) -> None:
        Model(mode, bit, plan).run()

    check()
