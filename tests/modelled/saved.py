"""Random programs of accesses, conversions, snapshots, resumes and resets, against one model of bytes and states."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pagegate import NotSupported, Vm
from pagegate.guests import Script

from .machines import MARK, WORD, KvmMachine
from .program import ALL, PAGE, Program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fake.conftest import Way

STATES = st.sampled_from(["private", "shared"])
SECONDS = 60


def of_the_host(pages: int) -> list[st.SearchStrategy[tuple[Any, ...]]]:
    """What the host does: a name, and the arguments of the method of `Player` of this name."""
    page, at = st.integers(0, pages - 1), st.integers(0, pages * PAGE - 40)
    return [
        st.tuples(st.just("convert"), page, st.integers(1, 9), STATES),
        st.tuples(st.just("write"), at, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("read"), at, st.integers(1, 40)),
        st.tuples(st.just("save")),
        st.tuples(st.just("reset"), st.integers(0, 9)),
        st.tuples(st.just("resume"), st.integers(0, 9), st.booleans()),
    ]


def of_the_guest(pages: int) -> list[st.SearchStrategy[tuple[Any, ...]]]:
    """What a guest does, through the view of a state."""
    page, word = st.integers(0, pages - 1), st.integers(0, pages * PAGE // WORD - 1)
    byte, few = st.integers(1, 255), st.integers(1, 9)
    return [
        st.tuples(st.just("ask"), page, few, STATES),
        st.tuples(st.just("load"), word, STATES),
        st.tuples(st.just("store"), word, STATES, byte),
        st.tuples(st.just("fill"), word, STATES, byte, few),
        st.tuples(st.just("check"), word, STATES, byte, few),
        st.tuples(st.just("touch"), page, STATES, few),
        st.tuples(st.just("dirty"), page, STATES, few),
    ]


class Model:
    """Each page's state, and the bytes on that side: the other side has zeroes."""

    def __init__(self, data: bytes, states: list[str]) -> None:
        self.data, self.states = bytearray(data), list(states)

    def copy(self) -> Model:
        return Model(self.data, self.states)

    def convert(self, pages: range, to: str) -> None:
        for page in pages:
            if self.states[page] != to:
                self.data[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
                self.states[page] = to

    def write(self, at: int, data: bytes) -> None:
        self.data[at : at + len(data)] = data


class Player:
    """What the host does with a machine, page 0 of whose model is at `base`, and with what it has put aside."""

    def __init__(self, folder: Path, vm: Vm, resume: Callable[[Path, bool], Vm], model: Model, base: int = 0) -> None:
        """Puts the machine aside, closes it, and resumes it lazily. `resume`: from a folder, lazily or not."""
        self.folder, self.make, self.base = folder, resume, base
        self.vm, self.model = vm, model
        self.saved: list[Model] = []
        self.save()
        self.resume(0, lazy=True)

    def do(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)

    def pages(self, first: int, count: int) -> range:
        """As many of them as there are."""
        return range(first, min(first + count, len(self.model.states)))

    def convert(self, page: int, count: int, to: Any) -> None:
        pages = self.pages(page, count)
        self.vm.convert(self.base + page * PAGE, len(pages) * PAGE, to=to)
        self.model.convert(pages, to)

    def write(self, at: int, data: bytes) -> None:
        self.vm.write(self.base + at, data)
        self.model.write(at, data)

    def read(self, at: int, size: int) -> None:
        assert self.vm.read(self.base + at, size) == self.model.data[at : at + size]

    def save(self) -> None:
        self.vm.snapshot(self.folder / str(len(self.saved)))
        self.saved.append(self.model.copy())

    def resume(self, number: int, lazy: bool) -> None:
        number %= len(self.saved)
        self.vm.close()
        self.vm, self.lazy = self.make(self.folder / str(number), lazy), lazy
        self.model = self.saved[number].copy()

    def reset(self, number: int) -> None:
        number %= len(self.saved)
        if self.lazy:
            self.vm.reset_to(self.folder / str(number))
            self.model = self.saved[number].copy()
        else:
            with pytest.raises(NotSupported):
                self.vm.reset_to(self.folder / str(number))

    def compare(self) -> None:
        """Everything, at the end."""
        pages = range(len(self.model.states))
        assert [self.vm.attributes.state(self.base + page * PAGE) for page in pages] == self.model.states
        assert self.vm.read(self.base, len(self.model.data)) == self.model.data


class GuestPlayer(Player):
    """With a guest on /dev/kvm, which executes one operation after the other, also across snapshots."""

    def __init__(self, folder: Path, way: Way, data: bytes, *, call: Any) -> None:
        self.way, self.call = way, call
        self.machine = KvmMachine(way, Program(()), None, call=call, debug_private=True)
        vm = self.machine.vm
        vm.write(ALL.start * PAGE, data)
        self.watch(vm)
        self.run()
        model = Model(data, ["shared"] * len(ALL))
        super().__init__(folder, vm, self.resumed, model, ALL.start * PAGE)

    def watch(self, vm: Vm) -> None:
        vm.on_io(MARK, lambda _io: vm.stop())
        self.machine.vm = vm

    def resumed(self, folder: Path, lazy: bool) -> Vm:
        vm = Vm.resume(folder, debug_private=True, lazy=lazy)
        self.watch(vm)
        return vm

    def execute(self, script: Script) -> int | None:
        """Has the guest do a script's first operation, and returns its result."""
        self.machine.next(script)
        self.run()
        return self.machine.word()

    def run(self) -> None:
        """Until the guest is between two operations."""
        report = self.machine.vm.run(timeout=SECONDS)
        assert report.reason == "stopped", report

    def access(self, pages: range, view: str) -> None:
        """What the guest's access through this view does to the pages' states."""
        if self.way.bit is not None:
            self.model.convert(pages, view)

    def at(self, word: int, view: str, words: int = 1) -> tuple[int, int, int]:
        """Where some words begin, how many of them are on that page, and their address in this view."""
        self.access(range(word * WORD // PAGE, word * WORD // PAGE + 1), view)
        words = min(words, (PAGE - word * WORD % PAGE) // WORD)
        return word * WORD, words, self.way.view(self.base + word * WORD, view)

    def ask(self, page: int, count: int, to: Any) -> None:
        pages = self.pages(page, count)
        script = Script(call=self.call)
        script.map(self.base + page * PAGE, len(pages) * PAGE, to=to)
        assert self.execute(script) == 0
        self.model.convert(pages, to)

    def load(self, word: int, view: str) -> None:
        at, _, address = self.at(word, view)
        script = Script()
        script.read(address)
        assert self.execute(script) == int.from_bytes(self.model.data[at : at + WORD], "little", signed=True)

    def store(self, word: int, view: str, byte: int) -> None:
        at, _, address = self.at(word, view)
        script = Script()
        script.write(address, int.from_bytes(bytes([byte]) * WORD, "little"))
        self.execute(script)
        self.model.write(at, bytes([byte]) * WORD)

    def fill(self, word: int, view: str, byte: int, words: int) -> None:
        at, words, address = self.at(word, view, words)
        script = Script()
        script.fill(address, words * WORD, byte)
        self.execute(script)
        self.model.write(at, bytes([byte]) * (words * WORD))

    def check(self, word: int, view: str, byte: int, words: int) -> None:
        at, words, address = self.at(word, view, words)
        script = Script()
        script.check(address, words * WORD, byte)
        seen = [self.model.data[at + WORD * word : at + WORD * (word + 1)] for word in range(words)]
        assert self.execute(script) == sum(word != bytes([byte]) * WORD for word in seen)

    def touch(self, page: int, view: str, count: int) -> None:
        self.access(self.pages(page, count), view)
        script = Script()
        script.touch(self.way.view(self.base + page * PAGE, view), len(self.pages(page, count)))
        self.execute(script)

    def dirty(self, page: int, view: str, count: int) -> None:
        pages = self.pages(page, count)
        self.access(pages, view)
        script = Script()
        script.dirty(self.way.view(self.base + page * PAGE, view), len(pages))
        self.execute(script)
        for left, each in zip(range(len(pages), 0, -1), pages, strict=True):
            self.model.write(each * PAGE, bytes([left]))


def programs(operations: list[st.SearchStrategy[tuple[Any, ...]]], *, least: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(st.one_of(operations), min_size=least, max_size=30)


def search_on_kvm(way: Way, folder: Callable[[], Path], number: int, *, call: str) -> None:
    """Plays $PAGEGATE_TEST_PROGRAMS of them, other ones each time, or so many, the same each time."""
    wanted = os.environ.get("PAGEGATE_TEST_PROGRAMS")
    data = random.Random(13).randbytes(len(ALL) * PAGE)
    operations = of_the_host(len(ALL)) + 2 * of_the_guest(len(ALL))

    @settings(max_examples=int(wanted or number), derandomize=not wanted, suppress_health_check=list(HealthCheck))
    @given(programs(operations, least=10))
    def search(program: list[tuple[Any, ...]]) -> None:
        play(GuestPlayer(folder(), way, data, call=call), program)

    search()


def play(player: Player, program: list[tuple[Any, ...]]) -> None:
    try:
        for operation in program:
            player.do(*operation)
        player.compare()
    finally:
        player.vm.close()
