"""What has to come of a program: a list of pages with a state and bytes on two sides, and the rules written out.

It knows nothing of KVM. Written to be obviously right, not to be fast.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from .program import MEMORY, PAGE, Policy

COUNT = MEMORY // PAGE


class Wanted(NamedTuple):
    """What a policy decides: "convert", "deny", "retry", "stop" or "raise", and the range for the first."""

    decision: str
    errno: int = 0
    first: int = 0
    count: int = 0
    to: str = ""
    keep: bool = False
    least: tuple[int, int] = (0, 0)
    max_shared: int | None = None


class Expected(NamedTuple):
    """What the log has to say of a request, what the guest gets in RAX (None: nothing yet), and how the run ends."""

    decision: str
    outcome: str
    errno: int = 0
    first: int = 0
    count: int = 0
    to: str = ""
    done: int = 0
    """Pages that were converted."""
    changed: int = 0
    """Pages whose state changed."""
    answer: int | None = None
    ends: str = ""


class Done(NamedTuple):
    """What came of a conversion: "done", "over quota", "refused", "listener", "undone" or "not discarded"."""

    what: str
    changed: int = 0


class ListenerModel:
    """The state of each page as the listener has been told it, and what it will still do."""

    def __init__(self, tokens: tuple[tuple[int, str], ...]) -> None:
        self.tokens = list(tokens)

    def takes(self, what: tuple[str, ...], pages: range) -> str:
        """Whether it does one of these now that it is called about these pages: the first that it has left."""
        for token in self.tokens:
            if token[0] in pages and token[1] in what:
                self.tokens.remove(token)
                return token[1]
        return ""


class Rules:
    """What a Python policy says: the same in the model and on the machine, which have one each."""

    def __init__(self, rules: tuple[str, ...]) -> None:
        self.rules = rules
        self.retried: set[tuple[int, str]] = set()

    def judge(self, kind: str, page: int, count: int, to: str) -> Wanted:
        rule = self.rules[page % len(self.rules)] if self.rules else "allow"
        explicit = kind == "explicit"
        if rule == "deny":
            return Wanted("deny", errno.EPERM)
        if rule in ("stop", "raise"):
            return Wanted(rule)
        if rule == "retry" and (page, to) not in self.retried:
            self.retried.add((page, to))
            return Wanted("retry")
        if rule == "narrow":
            count = 1
        elif rule == "widen":
            end = -(-(page + count) // 4) * 4
            page -= page % 4
            count = end - page
        elif rule == "far" and explicit:
            page, count = page ^ 4, 1
        elif rule == "other" and explicit:
            to = "shared" if to == "private" else "private"
        return Wanted("convert", 0, page, count, to, rule == "keep", (page, count))


class Model:
    def __init__(self, states: list[str]) -> None:
        self.states = states
        self.bytes = {"private": bytearray(MEMORY), "shared": bytearray(MEMORY)}
        self.unknown: set[tuple[str, int]] = set()
        """Pages whose bytes on a side could not be discarded."""
        self.listeners: list[ListenerModel] = []
        self.set_policy(Policy())

    def set_policy(self, policy: Policy) -> None:
        self.links = policy.links
        self.rules = Rules(policy.rules)

    # ---- conversions

    def convert(self, first: int, count: int, to: str, *, keep: bool = False, discarded: bool = True) -> int:
        """Carries it out; returns how many pages changed."""
        old = "shared" if to == "private" else "private"
        changed = 0
        for page in range(first, first + count):
            changed += self.states[page] != to
            self.states[page] = to
            if not keep and discarded:
                self.bytes[old][page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
                self.unknown.discard((old, page))
            elif not keep:
                self.unknown.add((old, page))
        return changed

    def changes(self, first: int, count: int, to: str) -> list[range]:
        """The runs of pages in the range that are in the other state."""
        runs: list[range] = []
        for page in range(first, first + count):
            if self.states[page] == to:
                continue
            if runs and runs[-1].stop == page:
                runs[-1] = range(runs[-1].start, page + 1)
            else:
                runs.append(range(page, page + 1))
        return runs

    def transaction(self, wanted: Wanted, failure: str = "") -> Done:
        """`failure`: the injected one, if it was met: "not cleaned" (which is before listeners are
        asked), "undone" or "not discarded".
        """
        first, count, to = wanted.first, wanted.count, wanted.to
        runs = self.changes(first, count, to)
        if wanted.max_shared is not None and to == "shared":
            shared = self.states.count("shared") + sum(len(run) for run in runs)
            if shared > wanted.max_shared:
                return Done("over quota")
        if not runs:
            return Done("done")
        if failure == "not cleaned":
            return Done("undone")
        if to == "private":
            for run in runs:
                for listener in self.listeners:
                    took = listener.takes(("refuse", "prepare"), run)
                    if took:
                        return Done("refused" if took == "refuse" else "listener")
        if failure == "undone":
            return Done("undone")
        changed = self.convert(first, count, to, keep=wanted.keep, discarded=failure != "not discarded")
        raised = False
        for run in runs:
            for listener in self.listeners:
                raised |= listener.takes(("committed",), run) != ""
        if failure:
            return Done("not discarded", changed)
        return Done("listener" if raised else "done", changed)

    # ---- requests

    def state_of(self, first: int, count: int) -> str:
        found = set(self.states[first : first + count])
        return found.pop() if len(found) == 1 else "mixed"

    def decide(self, kind: str, page: int, count: int, to: str) -> Wanted:
        wanted = self.rules.judge(kind, page, count, to)
        block, limit = 1, range(COUNT)
        max_shared = None
        if wanted.decision != "convert":
            return wanted
        first, end = wanted.first, wanted.first + wanted.count
        for link, a, b in reversed(self.links):
            if link == "align":
                block = max(block, a)
            elif link == "quota":
                max_shared = a if max_shared is None else min(max_shared, a)
            elif wanted.to == "shared":
                if not a <= first < end <= a + b:
                    return Wanted("deny", errno.EINVAL)
                limit = range(max(limit.start, a), min(limit.stop, a + b))
        first = max(first - first % block, limit.start)
        end = min(-(-end // block) * block, limit.stop)
        return wanted._replace(first=first, count=end - first, max_shared=max_shared)

    def attempt(self, kind: str, page: int, count: int, to: str, failure: str = "") -> Expected:
        """One request that reaches the policy. `failure` as for `transaction`."""
        explicit = kind == "explicit"
        wanted = self.decide(kind, page, count, to)
        again = errno.EAGAIN if explicit else 0
        if wanted.decision == "deny":
            answer, ends = (wanted.errno, "") if explicit else (None, "denied")
            return Expected("deny", "denied", wanted.errno, answer=answer, ends=ends)
        if wanted.decision == "retry":
            return Expected("retry", "retried", again, answer=again or None)
        if wanted.decision == "stop":
            return Expected("stop", "stopped", again, answer=again or None, ends="rule")
        if wanted.decision == "raise":
            return Expected("none", "failed", ends="RuleError")
        done = self.transaction(wanted, failure)
        if done.what in ("over quota", "refused") and wanted.least != (wanted.first, wanted.count):
            wanted = wanted._replace(first=wanted.least[0], count=wanted.least[1])
            done = self.transaction(wanted, failure)
        decided = Expected("convert", "failed", first=wanted.first, count=wanted.count, to=wanted.to)
        whole = decided._replace(done=wanted.count, changed=done.changed)
        if done.what == "done":
            return whole._replace(outcome="converted", answer=0)
        if done.what == "over quota":
            answer, ends = (errno.EINVAL, "") if explicit else (None, "denied")
            return Expected("deny", "denied", errno.EINVAL, answer=answer, ends=ends)
        if done.what == "refused" and not explicit:
            return decided._replace(outcome="retried")
        if done.what == "refused":
            return decided._replace(errno=errno.EAGAIN, answer=errno.EAGAIN)
        if done.what == "undone":
            code = errno.ENOMEM if explicit else 0
            return decided._replace(errno=code, answer=code or None, ends="" if explicit else "ENOMEM")
        ends = "ListenerError" if done.what == "listener" else "ENOMEM"
        return (whole if done.changed else decided)._replace(ends=ends)
