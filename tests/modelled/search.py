"""Many programs, and a small one of the first that fails."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from .player import Player
from .program import Maker, Op, Program

if TYPE_CHECKING:
    from collections.abc import Callable

    from .machines import Machine

LENGTH = 40
"""Operations of a program at most."""
TRIES = 5
"""How often a program with two threads is tried, which may fail only sometimes."""


def seed() -> int:
    """$PAGEGATE_MODEL_SEED, the seed of the first program; 0 by default."""
    return int(os.environ.get("PAGEGATE_MODEL_SEED", "0"))


def search_on_the_fake(make: Callable[[Program, Any], Machine], operations: int, **abilities: Any) -> None:
    """Plays $PAGEGATE_MODEL_OPERATIONS, or so many by default."""
    wanted = int(os.environ.get("PAGEGATE_MODEL_OPERATIONS", str(operations)))
    search(make, lambda done: done >= wanted, **abilities)


def search_on_kvm(make: Callable[[Program, Any], Machine], operations: int, **abilities: Any) -> None:
    """Plays for $PAGEGATE_MODEL_SECONDS, or so many operations by default."""
    seconds = os.environ.get("PAGEGATE_MODEL_SECONDS")
    end = time.monotonic() + float(seconds or 0)
    search(make, lambda done: time.monotonic() >= end if seconds else done >= operations, failing=(), **abilities)


def search(make: Callable[[Program, Any], Machine], is_enough: Callable[[int], bool], **abilities: Any) -> None:
    """Plays programs until so many operations are enough. `abilities` are those of `Maker`."""
    done, number = 0, seed()
    while not is_enough(done):
        program = Maker(number, threads=True, **abilities).program(LENGTH)
        error = failure(program, make)
        if error is not None:
            small = shrunk(program, make)
            again = failure(small, make) or error
            raise AssertionError(f"PAGEGATE_MODEL_SEED={number}: {again!r}; with\n{small}") from again
        done += len(program.ops) + len(program.meanwhile)
        number += 1
    print(f"{done} operations in {number - seed()} programs")


def failure(program: Program, make: Callable[[Program, Any], Machine]) -> Exception | None:
    """What a program fails with."""
    for _ in range(TRIES if program.meanwhile else 1):
        try:
            Player(program, make).play()
        except Exception as error:  # noqa: BLE001
            return error
    return None


def shrunk(program: Program, make: Callable[[Program, Any], Machine]) -> Program:
    """A program that fails, too, and from which no operation and no detail can be left out."""
    for field in ("meanwhile", "ops"):
        size = max(1, len(getattr(program, field)) // 2)
        while size:
            at = 0
            while at < len(getattr(program, field)):
                ops: tuple[Op, ...] = getattr(program, field)
                smaller = program._replace(**{field: ops[:at] + ops[at + size :]})
                if failure(smaller, make) is not None:
                    program = smaller
                else:
                    at += size
            size //= 2
    for at, op in enumerate(program.ops):
        for plain in plainer(op):
            smaller = program._replace(ops=(*program.ops[:at], plain, *program.ops[at + 1 :]))
            if failure(smaller, make) is not None:
                program = smaller
                break
    return program


def plainer(op: Op) -> list[Op]:
    """The operation with less: one page, fewer tokens, a shorter policy."""
    found = [op._replace(pages=1)] if op.pages > 1 else []
    found += [op._replace(tokens=op.tokens[:at] + op.tokens[at + 1 :]) for at in range(len(op.tokens))]
    links = op.policy.links
    found += [op._replace(policy=op.policy._replace(links=links[:at] + links[at + 1 :])) for at in range(len(links))]
    if op.policy.rules:
        found.append(op._replace(policy=op.policy._replace(rules=())))
    return found
