"""What the host does with a range of guest memory, compared with the model; and a listener."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagegate import Listener, PagegateError, PrivateMemoryError

from .model import ListenerModel, Model, Wanted
from .program import PAGE, Op

if TYPE_CHECKING:
    from collections.abc import Callable

    from pagegate import Change, Vm

EDGE = 8
"""Bytes at both ends of a range that are not written, so that pages are written in part."""


class ListenerError(Exception):
    """A listener's."""


class Device(Listener):
    """Maps what is shared, and does once what its model says."""

    def __init__(self, tokens: tuple[tuple[int, str], ...]) -> None:
        self.mapped: set[int] = set()
        self.model = ListenerModel(tokens)

    def _takes(self, what: tuple[str, ...], change: Change) -> str:
        return self.model.takes(what, pages_of(change))

    def prepare(self, change: Change) -> bool:
        took = self._takes(("refuse", "prepare"), change)
        if took == "prepare":
            raise ListenerError
        if took:
            return False
        assert self.mapped.issuperset(pages_of(change))
        self.mapped.difference_update(pages_of(change))
        return True

    def committed(self, change: Change) -> None:
        if not change.initial and self._takes(("committed",), change):
            raise ListenerError
        if change.to == "shared":
            self.mapped.update(pages_of(change))
        else:
            self.mapped.difference_update(pages_of(change))

    def aborted(self, change: Change) -> None:
        self.mapped.update(pages_of(change))


def pages_of(change: Change) -> range:
    return range(change.gpa // PAGE, (change.gpa + change.size) // PAGE)


class Host:
    """Its operations. The model's page 0 is at `base`."""

    def __init__(self, vm: Vm, model: Model, met: Callable[[bool], str] | None = None, *, base: int = 0) -> None:
        """`met` says what an injected failure comes to: see `Player`."""
        self.vm, self.model, self.base = vm, model, base
        self.met = met

    def do(self, op: Op, *, ours: bool = True) -> None:
        """`ours`: the model knows the pages, which nobody else converts now."""
        {"convert": self.convert, "read": self.read, "write": self.write}[op.kind](op, ours=ours)

    def convert(self, op: Op, *, ours: bool) -> None:
        failure, said = "", "done"
        try:
            self.vm.convert(self.base + op.page * PAGE, op.pages * PAGE, to=op.to)
        except ListenerError:
            said = "listener"
        except PagegateError as error:
            said = "refused"
            if said not in str(error):
                if self.met is None or "ENOMEM" not in str(error):
                    raise
                failure = self.met("discarding" in str(error))
                said = "not discarded" if failure == "not discarded" else "undone"
        if ours:
            done = self.model.transaction(Wanted("convert", 0, op.page, op.pages, op.to), failure)
            assert done.what == said, (done, said)
        else:
            assert said == "done"

    def read(self, op: Op, *, ours: bool) -> None:
        data, refused = b"", ""
        try:
            data = self.vm.read(self.base + op.page * PAGE, op.pages * PAGE)
        except PrivateMemoryError as error:
            refused = str(error)
        if not ours:
            return
        self.check_refusal(op, refused)
        for page in range(op.page, op.page + op.pages if not refused else 0):
            if ("shared", page) not in self.model.unknown:
                at = (page - op.page) * PAGE
                assert data[at : at + PAGE] == self.model.bytes["shared"][page * PAGE : (page + 1) * PAGE], page

    def write(self, op: Op, *, ours: bool) -> None:
        first, data = op.page * PAGE + EDGE, bytes([op.value]) * (op.pages * PAGE - 2 * EDGE)
        refused = ""
        try:
            self.vm.write(self.base + first, data)
        except PrivateMemoryError as error:
            refused = str(error)
        if not ours:
            return
        self.check_refusal(op, refused)
        if not refused:
            self.model.bytes["shared"][first : first + len(data)] = data

    def check_refusal(self, op: Op, refused: str) -> None:
        """An access was refused if a page is private, and the error names the first such page."""
        private = [page for page in range(op.page, op.page + op.pages) if self.model.states[page] == "private"]
        assert bool(refused) == bool(private), (refused, private)
        if private:
            assert f"{self.base + private[0] * PAGE:#x}" in refused, (refused, private)
