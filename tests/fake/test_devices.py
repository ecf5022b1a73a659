"""Port IO and MMIO: what handlers get, and what they must return."""

from __future__ import annotations

import pytest
from pagegate import DOORBELL_PORT, Io, PolicyError
from pagegate.testing import Step

from .conftest import TWO_VIEWS

PAGE = 4096
FAR = 1 << 30
MMIO = 6


def mmio_read(gpa, size):
    return Step.exit(MMIO, (gpa, 0, size))


def mmio_write(gpa, data):
    return Step.exit(MMIO, (gpa, int.from_bytes(data, "little"), len(data) | 1 << 32))


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (1, 4096), (4, 1024), (2, 7)], ids=str
)
def test_writes_keep_size_and_count(make, size, count) -> None:
    data = bytes(i % 251 for i in range(size * count))
    seen = []
    vm, _ = make([Step.io_write(0x1234, data, size=size)])
    vm.on_io(0x1234, seen.append)
    assert vm.run(timeout=10).reason == "halt"
    (io,) = seen
    assert isinstance(io, Io)
    assert (io.vcpu, io.port, io.write, io.size, io.count, io.data) == (0, 0x1234, True, size, count, data)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 4), (4, 3), (1, 4096)], ids=str)
def test_reads_are_answered_with_all_their_bytes(make, size, count) -> None:
    seen = []
    answer = bytes(i % 251 for i in range(size * count))

    def handler(io):
        seen.append((io.write, io.size, io.count, io.data))
        return answer

    vm, fake = make([Step.io_read(0x1234, size=size, count=count)])
    vm.on_io(0x1234, handler)
    vm.run(timeout=10)
    assert seen == [(False, size, count, b"")]
    assert fake.replies()[0].data == answer


def test_ports_without_a_handler_read_ones_and_ignore_writes(make) -> None:
    vm, fake = make([Step.io_write(0x99, b"abcd"), Step.io_read(0x99, size=4), Step.io_read(0x98, count=3)])
    assert vm.run(timeout=10).reason == "halt"
    assert [reply.data for reply in fake.replies()[1:]] == [b"\xff" * 4, b"\xff" * 3]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_any_bytes_answer_a_read(make, kind) -> None:
    vm, fake = make([Step.io_read(0x99, size=2)])
    vm.on_io(0x99, lambda io: kind(b"\x12\x34"))
    vm.run(timeout=10)
    assert fake.replies()[0].data == b"\x12\x34"


@pytest.mark.parametrize("answer", [b"", b"abc", b"abcde", None, 7, "abcd", [1, 2, 3, 4]], ids=repr)
def test_a_read_answered_wrongly_is_a_policy_error(make, answer) -> None:
    answers = [answer, b"good"]
    vm, fake = make([Step.io_read(0x99, size=4)])
    vm.on_io(0x99, lambda io: answers.pop(0))
    with pytest.raises(PolicyError, match="4 bytes"):
        vm.run(timeout=10)
    assert vm.run(timeout=10).reason == "halt"
    assert fake.replies()[0].data == b"good"


def test_the_result_of_a_handler_of_a_write_is_ignored(make) -> None:
    vm, _ = make([Step.io_write(0x99, b"a"), mmio_write(FAR, b"b")])
    vm.on_io(0x99, lambda io: "ignored")
    vm.on_mmio(FAR, PAGE, lambda mmio: b"ignored too")
    assert vm.run(timeout=10).reason == "halt"


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Odd])
@pytest.mark.parametrize(
    "step",
    [Step.io_write(0x99, b"abc"), Step.io_read(0x99), mmio_write(FAR, b"ab"), mmio_read(FAR, 4)],
    ids=["out", "in", "store", "load"],
)
def test_an_exception_of_a_handler_is_raised_once_and_the_access_repeated(make, error, step) -> None:
    seen = []
    raised = error("from the handler")

    def handler(access):
        seen.append((access.write, access.data, access.size))
        if len(seen) == 1:
            raise raised
        return bytes(access.size)

    vm, _ = make([step])
    vm.on_io(0x99, handler)
    vm.on_mmio(FAR, PAGE, handler)
    with pytest.raises(error) as caught:
        vm.run(timeout=10)
    assert caught.value is raised
    assert "vCPU 0" in raised.__notes__
    assert vm.run(timeout=10).reason == "halt"
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_handlers_get_the_size(make, size) -> None:
    data = bytes(range(0x11, 0x11 + size))
    seen = []
    vm, _ = make([mmio_write(FAR + 8, data), mmio_read(FAR + 16, size)])

    def handler(mmio):
        seen.append((mmio.vcpu, mmio.gpa, mmio.write, mmio.size, mmio.data))
        return bytes(size)

    vm.on_mmio(FAR, PAGE, handler)
    assert vm.run(timeout=10).reason == "halt"
    assert seen == [(0, FAR + 8, True, size, data), (0, FAR + 16, False, size, b"")]


def test_mmio_goes_to_the_handler_of_its_range(make) -> None:
    seen = []
    steps = [mmio_write(gpa, b"x") for gpa in (FAR, FAR + PAGE - 1, FAR + PAGE, FAR + 2 * PAGE, FAR - 1)]
    vm, _ = make(steps)
    vm.on_mmio(FAR, PAGE, lambda mmio: seen.append(("a", mmio.gpa)))
    vm.on_mmio(FAR + PAGE, PAGE, lambda mmio: seen.append(("b", mmio.gpa)))
    vm.run(timeout=10)
    assert seen == [("a", FAR), ("a", FAR + PAGE - 1), ("b", FAR + PAGE)]


def test_an_mmio_read_without_a_handler_reads_ones(make) -> None:
    vm, fake = make([Step.access(FAR)])
    vm.run(timeout=10)
    assert fake.replies()[0].data == b"\xff" * 8


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (0, PAGE),
        (63 * PAGE, PAGE),
        (63 * PAGE, 2 * PAGE),
        (FAR, 0),
        ((1 << 64) - PAGE, 2 * PAGE),
        (1 << 40, PAGE),
        ((1 << 40) - PAGE, 2 * PAGE),
    ],
)
@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_mmio_ranges_lie_outside_memory_and_its_views(make, way, gpa, size) -> None:
    vm, _ = make([], way=way)
    with pytest.raises(ValueError, match="MMIO"):
        vm.on_mmio(gpa, size, lambda _: None)


@pytest.mark.parametrize("registered", ["private", "shared"])
@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_a_device_is_reached_through_either_view(make, way, registered) -> None:
    seen = []
    views = [way.view(FAR + 8, state) for state in ("private", "shared")]
    vm, fake = make([step for gpa in views for step in (Step.access(gpa), mmio_write(gpa, b"x"))], way=way)

    def handler(mmio):
        seen.append((mmio.gpa, mmio.write))
        return bytes([len(seen)] * 8)

    vm.on_mmio(way.view(FAR, registered), PAGE, handler)
    with pytest.raises(ValueError, match="overlaps"):
        vm.on_mmio(FAR, PAGE, handler)
    with pytest.raises(ValueError, match="crosses"):
        vm.on_mmio((1 << way.bit) - PAGE, 2 * PAGE, handler)
    assert vm.run(timeout=10).faults == 0
    assert seen == [(FAR + 8, False), (FAR + 8, True)] * 2
    assert [fake.replies()[i].data for i in (0, 1)] == [bytes([1] * 8), bytes([3] * 8)]


@pytest.mark.parametrize(("gpa", "size"), [(FAR, PAGE), (FAR + 8, 8), (FAR - 8, 16), (FAR - PAGE, 3 * PAGE)])
def test_mmio_ranges_do_not_overlap(make, gpa, size) -> None:
    seen = []
    vm, _ = make([mmio_write(FAR + 8, b"x")])
    vm.on_mmio(FAR, PAGE, lambda mmio: seen.append("first"))
    with pytest.raises(ValueError, match="overlap"):
        vm.on_mmio(gpa, size, lambda mmio: seen.append("second"))
    vm.run(timeout=10)
    assert seen == ["first"]


def test_a_port_keeps_its_first_handler(make) -> None:
    seen = []
    vm, _ = make([Step.io_write(0x99, b"x")])
    vm.on_io(0x99, lambda io: seen.append("first"))
    with pytest.raises(ValueError, match="0x99"):
        vm.on_io(0x99, lambda io: seen.append("second"))
    vm.run(timeout=10)
    assert seen == ["first"]


def test_the_doorbells_port_is_reserved(make) -> None:
    vm, _ = make([])
    with pytest.raises(ValueError, match="doorbell"):
        vm.on_io(DOORBELL_PORT, lambda io: None)


def test_handlers_are_callable(make) -> None:
    vm, _ = make([])
    with pytest.raises(TypeError, match="callable"):
        vm.on_io(0x99, "no")
    with pytest.raises(TypeError, match="callable"):
        vm.on_mmio(FAR, PAGE, None)


@pytest.mark.parametrize("way", TWO_VIEWS, ids=str)
def test_a_handler_may_convert_and_read(make, way) -> None:
    def handler(io):
        vm.convert(8 * PAGE, PAGE, to="private")
        return vm.read(0x2000, 1)

    vm, fake = make([Step.io_read(0x99)], [Step.block()], way=way)
    vm.write(0x2000, b"!")
    vm.on_io(0x99, handler)
    vm.run(timeout=0.3)
    assert fake.replies()[0].data == b"!"
    assert vm.attributes.is_private(8 * PAGE)


def test_handlers_get_the_vcpu(make) -> None:
    seen = set()
    vm, _ = make([Step.io_write(0x99, b"x")], [Step.io_write(0x99, b"x")], [Step.io_write(0x99, b"x")])
    vm.on_io(0x99, lambda io: seen.add(io.vcpu))
    vm.run(timeout=10)
    assert seen == {0, 1, 2}
