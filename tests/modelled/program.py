"""A program: what the guest and the host do one after the other, and what another thread of the host does meanwhile."""

from __future__ import annotations

import random
from typing import NamedTuple

PAGE = 4096
BASE = 16
"""The first page that programs use. Those before it hold the guest's code."""
PAGES = 32
MINE = range(BASE, BASE + 16)
"""With two threads: the pages that only the guest and its host operations use."""
THEIRS = range(BASE + 16, BASE + 24)
"""Those that only the other thread uses."""
BOTH = range(BASE + 24, BASE + PAGES)
"""Those that both use."""
ALL = range(BASE, BASE + PAGES)
MEMORY = 64 * PAGE
"""The page tables and the stack of mode "long" are at its top."""
RULES = ("allow", "allow", "allow", "deny", "narrow", "widen", "retry", "other", "far", "keep", "stop", "raise")


class Policy(NamedTuple):
    """Built-in policies, the outermost first, and what a Python policy says of a page: rules[page % 8]."""

    links: tuple[tuple[str, int, int], ...] = ()
    rules: tuple[str, ...] = ()


class Op(NamedTuple):
    """One operation. Those of the guest are "hypercall", "doorbell", "malformed", "touch" and "fault".

    Those of the host are "convert", "read", "write", "join", "leave", "policy" and "fail".
    """

    kind: str
    page: int = 0
    pages: int = 1
    to: str = "private"
    value: int = 0
    """What is written, 0 for a touch that reads; or the number of a listener to leave, or of calls before a failure."""
    tokens: tuple[tuple[int, str], ...] = ()
    """Of "join": what the new listener does once when it is called about a page: "refuse", "prepare", "committed".

    The last two are the methods that it fails in.
    """
    policy: Policy = Policy()
    failing: str = ""
    half: bool = False


GUEST = ("hypercall", "doorbell", "malformed", "touch", "fault")


class Program(NamedTuple):
    ops: tuple[Op, ...]
    meanwhile: tuple[Op, ...] = ()
    """What the other thread does."""
    initial: str = "shared"
    """The state of all pages at first."""

    def __str__(self) -> str:
        """As Python that makes it again, with only what differs from the defaults."""
        return f"Program({_ops(self.ops)}, {_ops(self.meanwhile)}, {self.initial!r})"


def _ops(ops: tuple[Op, ...]) -> str:
    return "(" + "".join(f"\n    {_op(op)}," for op in ops) + ")"


def _op(op: Op) -> str:
    defaults = Op(op.kind)
    named = [f"{name}={getattr(op, name)!r}" for name in Op._fields[1:] if getattr(op, name) != getattr(defaults, name)]
    return f"Op({', '.join([repr(op.kind), *named])})"


class Maker:
    """Makes programs. The same seed and abilities give the same program."""

    def __init__(self, seed: int, *, calls: tuple[str, ...], failing: tuple[str, ...], threads: bool) -> None:
        """`calls`: how the guest can ask. `failing`: the calls of the fake that can fail; none on /dev/kvm."""
        self.random = random.Random(seed)
        self.calls = calls
        self.failing = failing
        self.threads = threads and self.random.random() < 0.3

    def program(self, length: int) -> Program:
        count = self.random.randint(1, length)
        meanwhile = tuple(self.meanwhile() for _ in range(count)) if self.threads else ()
        return Program(tuple(self.op() for _ in range(count)), meanwhile, self.to())

    def span(self, pages: range) -> tuple[int, int]:
        first = self.random.choice(pages)
        return first, min(self.random.choice((1, 1, 1, 2, 3, 4, 8, 16)), pages.stop - first)

    def mine(self) -> range:
        if not self.threads:
            return ALL
        return MINE if self.random.random() < 0.8 else BOTH

    def to(self) -> str:
        return self.random.choice(("private", "shared"))

    def value(self) -> int:
        return self.random.randint(1, 255)

    def meanwhile(self) -> Op:
        kind = self.random.choice(("convert", "convert", "read", "write"))
        page, pages = self.span(THEIRS if self.random.random() < 0.7 else BOTH)
        return Op(kind, page, pages, self.to(), self.value())

    def op(self) -> Op:
        kinds = [
            *self.calls * 3,
            *["touch"] * 8,
            *["convert"] * 4,
            "read",
            "write",
            "write",
            "join",
            "leave",
            "policy",
            "policy",
        ]
        if self.failing:
            # Another thread could run into a failure that was meant for this one.
            kinds += ["malformed", "fault"] if self.threads else ["malformed", "fault", "fail", "fail"]
        kind = self.random.choice(kinds)
        if kind == "join":
            what = ("refuse", "refuse", "prepare", "committed")
            pages = MINE if self.threads else ALL
            count = self.random.randint(0, 3)
            return Op(kind, tokens=tuple((self.random.choice(pages), self.random.choice(what)) for _ in range(count)))
        if kind == "leave":
            return Op(kind, value=self.random.randrange(3))
        if kind == "policy":
            return Op(kind, policy=self.policy())
        if kind == "fail":
            call, after = self.random.choice(self.failing), self.random.randrange(4)
            return Op(kind, failing=call, value=after, half=self.random.random() < 0.5)
        page, pages = self.span(self.mine())
        if kind in ("touch", "fault"):
            pages = 1
        value = self.value() if kind != "touch" or self.random.random() < 0.5 else 0
        return Op(kind, page, pages, self.to(), value)

    def policy(self) -> Policy:
        links = []
        for _ in range(self.random.randrange(3)):
            kind = self.random.choice(("align", "window") if self.threads else ("align", "window", "quota"))
            if kind == "align":
                links.append((kind, self.random.choice((1, 2, 4, 8)), 0))
            elif kind == "window":
                links.append((kind, *self.span(MINE if self.threads else ALL)))
            else:
                links.append((kind, MEMORY // PAGE - self.random.randint(0, PAGES), 0))
        rules = tuple(self.random.choice(RULES) for _ in range(8)) if self.random.random() < 0.7 else ()
        return Policy(tuple(links), rules)
