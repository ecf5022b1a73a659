"""`Vm(debug_private=True)`: the host reads and writes private pages; the report and the events say so."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pagegate import PagegateError, PrivateMemoryError, trace
from pagegate.testing import Step

from .conftest import BIT, TWO_VIEWS, Way

PAGE = 4096
AT = 8 * PAGE
# The private side is host memory, or a guest_memfd that can be mapped.
REACHABLE = [Way("memslots"), *(way for way in TWO_VIEWS if way.enforcement != "attributes")]
# It is a guest_memfd that cannot be mapped.
UNREACHABLE = [Way("attributes"), *(way for way in TWO_VIEWS if way.enforcement == "attributes")]


@pytest.mark.parametrize("way", REACHABLE, ids=str)
def test_private_pages_are_read_and_written(make, way) -> None:
    vm, _ = make([], way=way, debug_private=True)
    vm.convert(AT, 2 * PAGE, to="private")
    vm.write(AT - 4, b"shared, then private")
    assert vm.read(AT - 4, 20) == b"shared, then private"
    assert vm.read(AT, 16) == b"ed, then private"
    vm.write(AT + 2 * PAGE - 2, b"back")
    assert vm.read(AT + 2 * PAGE, 2) == b"ck"
    assert vm.attributes.state(AT, 2 * PAGE) == "private", "looking converts nothing"


@pytest.mark.parametrize("way", REACHABLE, ids=str)
def test_a_conversion_discards_what_was_written(make, way) -> None:
    vm, _ = make([], way=way, debug_private=True)
    vm.convert(AT, PAGE, to="private")
    vm.write(AT, b"private")
    vm.convert(AT, PAGE, to="shared")
    assert vm.read(AT, 7) == bytes(7)
    vm.convert(AT, PAGE, to="private")
    assert vm.read(AT, 7) == bytes(7)


@pytest.mark.parametrize("debug", [True, False])
def test_the_report_says_so(make, way, debug) -> None:
    vm, _ = make([Step.halt()], way=way, debug_private=debug and way.enforcement != "attributes")
    assert vm.run(timeout=10).debug_private is (debug and way.enforcement != "attributes")


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "arrows"])
def test_the_events_and_their_traces_say_so(make, tmp_path, debug, suffix) -> None:
    vm, _ = make([Step.halt()], way=Way("memslots"), debug_private=debug)
    assert vm.events.debug_private is debug
    file = tmp_path / f"trace.{suffix}"
    with trace.Recorder(vm, file):
        vm.run(timeout=10)
    recorded = trace.read(file)
    assert recorded.debug_private is debug
    recorded.write(file)
    assert trace.read(file).debug_private is debug
    assert pa.schema(vm.events).metadata[b"pagegate.debug_private"] == str(debug).lower().encode()


@pytest.mark.parametrize("said", [b"", b"yes", None])
def test_a_trace_says_yes_or_no_or_nothing(make, tmp_path, said) -> None:
    vm, _ = make([], way=Way("memslots"), debug_private=True)
    table = pa.table(vm.events)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"pagegate.debug_private"}
    if said is not None:
        metadata[b"pagegate.debug_private"] = said
    file = tmp_path / "trace.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), file)
    if said is None:
        assert trace.read(file).debug_private is False, "as traces of earlier versions"
    else:
        with pytest.raises(ValueError, match="pagegate.debug_private"):
            trace.read(file)


def test_without_it_private_pages_are_refused(make, way) -> None:
    vm, _ = make([], way=way)
    vm.convert(AT, PAGE, to="private")
    for access in (lambda: vm.read(AT, 1), lambda: vm.write(AT, b"x"), lambda: vm.write(AT - 1, b"xy")):
        with pytest.raises(PrivateMemoryError, match="0x8000"):
            access()
    assert vm.read(AT - 1, 1) == b"\0", "nothing is written"


@pytest.mark.parametrize("way", UNREACHABLE, ids=str)
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_guest_memfd_that_cannot_be_mapped_is_an_error_that_says_so(make, way, access) -> None:
    vm, _ = make([], way=way, debug_private=True)
    vm.convert(AT, PAGE, to="private")
    with pytest.raises(PagegateError, match="0x8000.*guest_memfd"):
        vm.read(AT - 2, 4) if access == "read" else vm.write(AT - 2, b"abcd")
    assert vm.read(AT - 2, 2) == bytes(2), "nothing is written"


def test_the_guest_gets_what_was_written(make) -> None:
    # An access that KVM emulates is completed from the side of the page's state.
    vm, fake = make([Step.access(AT)], way=Way("memslots", BIT), debug_private=True)
    vm.convert(AT, PAGE, to="private")
    vm.write(AT, b"\x55" * 8)
    assert vm.run(timeout=10).requests == 0
    assert fake.replies() == [], "its slot is there, so that the access does not exit"
    assert vm.read(AT, 8) == b"\x55" * 8
