"""Plays a program on a machine, and compares the machine with the model after each operation and at the end."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any

from pagegate import Convert, Deny, PagegateError, Retry, Stop, policies

from .host import Device, Host, ListenerError
from .machines import AT, MARK, WORD, Machine
from .model import COUNT, Expected, ListenerModel, Model, Rules
from .program import ALL, BOTH, GUEST, PAGE, THEIRS, Op, Policy, Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pagegate import Event, Report

SECONDS = 30
MOST_RUNS = 1000
ENDED_BY_POLICY = ("denied", "rule", "RuleError")


class RuleError(Exception):
    """A hook's."""


class RulePolicy:
    def __init__(self, rules: tuple[str, ...]) -> None:
        self.rules = Rules(rules)

    def memory_fault(self, fault: Any) -> Any:
        return self._answer("implicit", fault.gpa, fault.size, "private" if fault.private else "shared")

    def map_gpa_range(self, call: Any) -> Any:
        return self._answer("explicit", call.gpa, call.size, call.to)

    def _answer(self, kind: str, gpa: int, size: int, to: str) -> Any:
        wanted = self.rules.judge(kind, gpa // PAGE, size // PAGE, to)
        if wanted.decision == "deny":
            return Deny(wanted.errno)
        if wanted.decision == "retry":
            return Retry()
        if wanted.decision == "stop":
            return Stop("rule")
        if wanted.decision == "raise":
            raise RuleError
        return Convert(wanted.to, wanted.first * PAGE, wanted.count * PAGE, discard=not wanted.keep)


def policy_of(described: Policy) -> object | None:
    policy: object | None = RulePolicy(described.rules) if described.rules else None
    for kind, a, b in reversed(described.links):
        if kind == "align":
            policy = policies.Align(a * PAGE, policy)
        elif kind == "window":
            policy = policies.Window([(a * PAGE, b * PAGE)], policy)
        else:
            policy = policies.Quota(a * PAGE, policy)
    return policy or policies.Allow()


class Player:
    def __init__(self, program: Program, make: Callable[[Program, Any], Machine]) -> None:
        self.program = program
        self.machine = make(program, policy_of(Policy()))
        self.vm = self.machine.vm
        # The pages of the guest's code and page tables are shared, whatever the others are.
        states = [self.vm.attributes.state(page * PAGE) for page in range(COUNT)]
        assert states[ALL.start : ALL.stop] == [program.initial] * len(ALL)
        self.model = Model(states)
        self.host = Host(self.vm, self.model, self.met)
        self.devices: list[Device] = []
        self.todo: Iterator[Op] = iter(program.ops)
        self.rest = False
        """Whether the program is over, and the other thread, too."""
        self.current: Op | None = None
        self.ends: list[str] = []
        """How runs ended during the guest's operation."""
        self.failing: tuple[str, int] | None = None
        """A call that is to fail, and how many of the kind were to be made before."""
        self.sequence = 0
        self.other = threading.Thread(target=self.meanwhile)
        self.failed: BaseException | None = None
        """What the other thread failed with."""
        self.vm.on_io(MARK, self.between)

    def is_ours(self, page: int) -> bool:
        """Whether the model knows the page: no other thread converts it now."""
        return self.rest or not self.program.meanwhile or page < THEIRS.start

    def play(self) -> None:
        with self.vm:
            self.other.start()
            try:
                runs = 0
                while not self.run():
                    runs += 1
                    assert runs < MOST_RUNS, "it does not end"
            finally:
                self.other.join()
            self.come_to_rest()
            self.compare(range(COUNT))
            self.compare_bytes()

    def meanwhile(self) -> None:
        try:
            for op in self.program.meanwhile:
                self.do(op)
        except BaseException as error:  # noqa: BLE001
            self.failed = error

    def come_to_rest(self) -> None:
        """Waits for the other thread. The states that it and the guest left common pages in are those of the map."""
        self.other.join()
        if self.failed is not None:
            raise self.failed
        if self.program.meanwhile:
            for page in BOTH:
                self.model.states[page] = self.vm.attributes.state(page * PAGE)
        self.rest = True

    # ---- the guest, and the host between its operations

    def run(self) -> bool:
        """Runs until the guest halts (True), or the run ends for another reason, which is noted."""
        first = self.vm.events.total
        try:
            report = self.vm.run(timeout=SECONDS)
        except (RuleError, ListenerError) as error:
            self.ends.append(type(error).__name__)
        except PagegateError as error:
            if "ENOMEM" not in str(error):
                raise
            self.ends.append("ENOMEM")
        else:
            self.compare_report(report, self.vm.events.since(first))
            if report.reason == "halt":
                return True
            self.ends.append(report.reason)
        if self.ends[-1] in ENDED_BY_POLICY:
            self.vm.policy.replace(policy_of(Policy()))
        return False

    def between(self, _io: object) -> None:
        """On the vCPU's thread, when the guest's operation is over: what the host does, and the guest's next one."""
        if self.current is not None:
            self.settle(self.current)
            self.compare(near(self.current))
        self.current = self.next_of_guest()
        self.machine.do(self.current, self.view_of(self.current) if self.current else "")

    def next_of_guest(self) -> Op | None:
        """Does what the host does up to the guest's next operation."""
        for op in self.todo:
            if op.kind in GUEST:
                return op
            self.do(op)
            self.compare(near(op))
        if self.rest or not self.machine.sweeps:
            return None
        # The guest reads all pages, each through the view of its state, for which no request may come.
        self.come_to_rest()
        self.todo = iter([Op("touch", page, to=self.model.states[page]) for page in ALL])
        return next(self.todo)

    def view_of(self, op: Op) -> str:
        """The side that the guest's access to the page is to."""
        return op.to if self.machine.way.bit is not None else self.model.states[op.page]

    def settle(self, op: Op) -> None:
        """Compares what came of the guest's operation with what had to."""
        events = self.vm.events.since(self.sequence)
        self.sequence += len(events)
        ends, self.ends = self.ends, []
        if not all(map(self.is_ours, range(op.page, op.page + op.pages))):
            # Whoever came first; what a policy said of it has its effect all the same.
            if any(end in ENDED_BY_POLICY for end in ends):
                self.model.set_policy(Policy())
            return
        explicit = op.kind in ("hypercall", "doorbell")
        answer: int | None = None
        if op.kind == "malformed":
            (event,) = events
            told = (event.kind, event.gpa, event.size, event.outcome, event.errno)
            assert told == ("malformed", op.page * PAGE, op.pages * PAGE, "refused", errno.EINVAL), event
            answer, events = errno.EINVAL, []
        for event in events:
            failure = self.failure(event, ends)
            state = self.model.state_of(op.page, op.pages)
            expected = self.model.attempt("explicit" if explicit else "implicit", op.page, op.pages, op.to, failure)
            asked = (event.gpa, event.size, event.to, event.state)
            assert asked == (op.page * PAGE, op.pages * PAGE, op.to, state), event
            assert explicit or state != op.to, event
            assert said(event) == logged(expected), (event, expected)
            assert answer is None, event
            answer = expected.answer
            if expected.ends:
                assert ends.pop(0) == expected.ends
                if expected.ends in ENDED_BY_POLICY:
                    self.model.set_policy(Policy())
        assert ends == [], ends
        self.check_met()
        if op.kind in ("hypercall", "doorbell", "malformed"):
            assert self.machine.answer() == answer is not None, (self.machine.answer(), answer)
        elif op.kind == "touch":
            self.settle_touch(op)

    def settle_touch(self, op: Op) -> None:
        view = self.view_of(op)
        assert self.model.states[op.page] == view
        at = op.page * PAGE + AT
        if op.value:
            self.machine.touched(op.page, view, op.value)
            self.model.bytes[view][at : at + WORD] = bytes([op.value]) * WORD
            return
        word = self.machine.word()
        if word is not None and not (self.program.meanwhile and op.page in BOTH):
            assert word.to_bytes(WORD, "little", signed=True) == self.model.bytes[view][at : at + WORD], hex(word)

    # ---- failures of the fake

    def failure(self, event: Event, ends: list[str]) -> str:
        """How the injected failure shows in this request, as for `Model.transaction`; "" if it was not met here."""
        if event.outcome != "failed" or self.failing is None:
            return ""
        ended = bool(ends) and ends[0] == "ENOMEM"
        if event.errno != errno.ENOMEM and not ended:
            return ""
        return self.met(event.done_size > 0)

    def met(self, converted: bool) -> str:
        """The injected failure was met in a conversion that was carried out, or not: as for `Model.transaction`."""
        assert self.failing is not None
        call, before = self.failing
        assert self.machine.injected(call) > before, "nothing was to fail"
        self.failing = None
        if converted:
            assert call == "discard"
            return "not discarded"
        return "not cleaned" if call == "discard" else "undone"

    def check_met(self) -> None:
        if self.failing is not None:
            assert self.machine.injected(self.failing[0]) <= self.failing[1], "a failure was overlooked"

    # ---- the host

    def do(self, op: Op) -> None:
        """An operation of the host."""
        if op.kind == "join":
            device = Device(op.tokens)
            self.vm.add_listener(device)
            self.devices.append(device)
            self.model.listeners.append(ListenerModel(op.tokens))
        elif op.kind == "leave":
            if op.value < len(self.devices):
                self.vm.remove_listener(self.devices.pop(op.value))
                del self.model.listeners[op.value]
        elif op.kind == "policy":
            self.vm.policy.replace(policy_of(op.policy))
            self.model.set_policy(op.policy)
        elif op.kind == "fail":
            if self.failing is None:
                self.failing = (op.failing, self.machine.injected(op.failing) + op.value)
                self.machine.fail(op.failing, errno.ENOMEM, after=op.value, half=op.half)
        else:
            ours = all(map(self.is_ours, range(op.page, op.page + op.pages))) or op.page in THEIRS
            self.host.do(op, ours=ours)
            if ours:
                self.check_met()

    # ---- all of it

    def compare_report(self, report: Report, events: list[Event]) -> None:
        """The report says the same as the log, which is compared with the model row by row."""
        malformed = [event for event in events if event.kind == "malformed"]
        assert report.malformed == len(malformed)
        events = [event for event in events if event.kind != "malformed"]
        outcomes = [event.outcome for event in events]
        assert report.requests == report.faults + report.hypercalls == len(events)
        assert report.conversions == outcomes.count("converted")
        assert report.denied == outcomes.count("denied")
        for to, changed in (("private", report.bytes_to_private), ("shared", report.bytes_to_shared)):
            assert changed == sum(event.changed for event in events if event.done_to == to)

    def compare(self, pages: range) -> None:
        """The page map and what listeners were told are what the model says, and what KVM enforces for these pages.

        Not the last while the other thread converts: memslots of neighbours are divided and joined, and meanwhile, with
        every vCPU out of the guest, there is none.
        """
        known = COUNT if self.rest or not self.program.meanwhile else THEIRS.start
        states = self.model.states
        found = self.vm.attributes.runs(0, known * PAGE)
        assert [state for _, size, state in found for _ in range(size // PAGE)] == states[:known]
        for page in pages if known == COUNT else ():
            assert self.machine.enforced(page) in (states[page], None), f"page {page}"
        shared = {page for page in range(known) if states[page] == "shared"}
        for device in self.devices:
            # A copy: the other thread's conversions tell the listener of its pages meanwhile.
            mapped = {page for page in device.mapped.copy() if page < known}
            assert mapped == shared, "a listener was told otherwise"
        if self.rest:
            assert self.vm.attributes.private_bytes == states.count("private") * PAGE

    def compare_bytes(self) -> None:
        """The bytes of both sides, as far as the host can look at them."""
        for page in ALL:
            if self.program.meanwhile and page in BOTH:
                continue
            at = page * PAGE
            for state in ("private", "shared"):
                found = self.machine.side(state, page)
                if found is not None and (state, page) not in self.model.unknown:
                    assert found == self.model.bytes[state][at : at + PAGE], f"page {page}, {state}"


def near(op: Op) -> range:
    """The pages of an operation, and those to which it may have been widened."""
    return range(op.page // 8 * 8, min(COUNT, -(-(op.page + op.pages) // 8) * 8)) if op.page else range(0)


def said(event: Event) -> tuple[Any, ...]:
    converts = event.decision == "convert"
    decided = (event.decision_gpa, event.decision_size, event.decision_to) if converts else ()
    done = (event.done_gpa, event.done_size, event.done_to) if event.done_size else ()
    return event.decision, event.outcome, event.errno, decided, done, event.changed


def logged(expected: Expected) -> tuple[Any, ...]:
    whole = (expected.first * PAGE, expected.count * PAGE, expected.to)
    return (
        expected.decision,
        expected.outcome,
        expected.errno,
        whole if expected.decision == "convert" else (),
        whole if expected.done else (),
        expected.changed * PAGE,
    )
