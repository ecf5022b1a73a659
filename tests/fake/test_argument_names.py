"""Sizes as text. An argument of a wrong type is refused by a sentence that begins with the argument's name."""

from __future__ import annotations

import pytest
from pagegate import (
    Convert,
    Deny,
    MapGpaRange,
    MemoryFault,
    PolicyError,
    Region,
    Retry,
    Stop,
    Vm,
    devices,
    policies,
    trace,
)
from pagegate.guests import Script
from pagegate.testing import Fake, PolicyTester, Step

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def vm():
    with Vm("64M", platform="pc", hypervisor=Fake([Step.block()])) as vm:
        yield vm


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("65536", 1 << 16),
        ("0x10000", 1 << 16),
        ("0x1_0000", 1 << 16),
        ("64K", 1 << 16),
        ("64k", 1 << 16),
        ("64KB", 1 << 16),
        ("2MiB", 2 * MIB),
        (" 2 MiB ", 2 * MIB),
        ("0x40K", 1 << 16),
        ("1G", 1 << 30),
        ("1t", 1 << 40),
    ],
)
def test_sizes_as_text(text, number):
    assert repr(policies.Quota(text)) == f"Quota({number:#x})"
    assert Convert(gpa=text, size=text) == Convert(gpa=number, size=number)


def test_text_does_wherever_a_size_or_an_address_is_an_argument(vm) -> None:
    assert vm.memory == 64 * MIB
    assert vm.load(b"\xf4", "1M") == MIB
    vm.convert("2M", "8K", to="private")
    assert vm.attributes.is_private("2M")
    assert vm.attributes.state("2M", "8K") == "private"
    assert vm.attributes.runs("2M", "8K") == [(2 * MIB, 8192, "private")]
    vm.write("1M", b"x")
    assert vm.read("1MiB", "1K") == vm.read(MIB, 1024)
    vm.on_mmio("0xd0000000", "4K", print)
    assert Region("1M", "64K") == Region(MIB, 64 << 10)
    assert MemoryFault("1M", size="8K").size == 8192
    assert MapGpaRange("2M", "2M", to="private", page_size="2M").page_size == 2 * MIB
    assert repr(policies.Align("2M")) == repr(policies.Align(2 * MIB))
    assert (
        repr(policies.Window(["48M+1M", ("1M", "4K"), (0, PAGE)]))
        == "Window([(0x3000000, 0x100000), (0x100000, 0x1000), (0x0, 0x1000)])"
    )
    tester = PolicyTester(memory="16M")
    assert tester.call("1M", "2M", to="shared") == Convert()
    assert tester.state("1M", "2M") == "shared"
    assert trace.read(vm.events, memory="64M", initial="private").memory == 64 * MIB


def test_a_script_takes_sizes_as_text() -> None:
    def written(one, page, two) -> bytes:
        script = Script()
        script.fill(two, page, 1)
        script.map(two, page, to="private")
        script.touch(two, 4, page)
        script.barrier(one, 2)
        return script.image(one)[0]

    assert written("1M", "4K", "2M") == written(MIB, PAGE, 2 * MIB)


@pytest.mark.parametrize("text", ["", "64X", "M", "1.5M", "64MM", "6 4", "0x", "64iB", "\N{ARABIC-INDIC DIGIT SIX}4"])
def test_other_text_is_refused_by_one_sentence_that_names_the_argument(vm, text) -> None:
    form = "it must be a whole number, such as 64, 0x40, 64K, 64M or 1G"
    for name, call in {
        "memory": Vm,
        "max_shared": policies.Quota,
        "size": policies.Align,
        "gpa": lambda gpa: Region(gpa, PAGE),
        "n": lambda n: vm.read(0, n),
        "at": lambda at: vm.load(b"x", at),
        "address": Script().read,
        "a gpa in ranges": lambda gpa: policies.Window([(gpa, PAGE)]),
    }.items():
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole sentence is compared
            call(text)
        assert str(caught.value) == f"{name} is {text!r}: {form}"


@pytest.mark.parametrize("text", ["-1", "16777216T"])
def test_text_out_of_range(text) -> None:
    with pytest.raises(ValueError, match=f"max_shared is '{text}', which is out of range: it must be between 0 and"):
        policies.Quota(text)


WRONG = {
    "memory is None: it must be an int, such as 64 << 20, or text such as 64M": lambda: Vm(None),
    "size is 1.5: it must be an int, such as 4096, or text such as 4K": lambda: policies.Align(1.5),
    'to is 1: it must be "private" or "shared"': lambda: Convert(to=1),
    "prefault is 'x': it must be True or False": lambda: Convert(prefault="x"),
    "discard is 'x': it must be True or False": lambda: Convert(discard="x"),
    "remember is 5: it must be a Region, or None": lambda: Deny(remember=5),
    "remember is 6: it must be a Region, or None": lambda: Retry(remember=6),
    "reason is 3: it must be text": lambda: Stop(3),
    "window is '1': it must be a number": lambda: policies.PingPong(4, "1"),
    "per_second is '1': it must be a number": lambda: policies.RateLimit("1"),
    "seconds is '1': it must be a number": lambda: Region(0, PAGE, seconds="1"),
    "private is 1: it must be True or False": lambda: MemoryFault(0, private=1),
    "state is 1: it must be text": lambda: MemoryFault(0, state=1),
    "vm_type is 1: it must be text": lambda: Vm(PAGE, vm_type=1),
    "enforcement is 1: it must be text": lambda: Vm(PAGE, enforcement=1),
    "platform is 1: it must be text": lambda: Vm(PAGE, platform=1),
    "confidential is True: it must be text": lambda: Vm(PAGE, confidential=True),
    'initial is 1: it must be "private" or "shared"': lambda: Vm(PAGE, initial=1),
    "hypervisor is 1: it must be a pagegate.testing.Fake, or None": lambda: Vm(PAGE, hypervisor=1),
    "policy_timeout is '5': it must be a number": lambda: Vm(PAGE, policy_timeout="5"),
    "path is 1: it must be a path": lambda: devices.Block(1),
    "mac is 1: it must be text": lambda: devices.Net("tap0", mac=1),
    "ranges is 5: it must be a range of addresses, such as range(": lambda: policies.Window(5),
    "ranges is '1M+4K': it must be a range of addresses": lambda: policies.Window("1M+4K"),
    "ranges is (0, 4096): it must be a range of addresses": lambda: policies.Window((0, 4096)),
    "memslots is '1': it must be an int": lambda: Fake(memslots="1"),
}


def test_a_window_of_ranges_as_python_has_them() -> None:
    assert repr(policies.Window(range(0x1000, 0x3000))) == "Window([(0x1000, 0x2000)])"
    mixed = policies.Window([range(1 << 40), range(0x1000, 0x2000), "1M+4K", (0, PAGE)])
    assert repr(mixed) == "Window([(0x0, 0x10000000000), (0x1000, 0x1000), (0x100000, 0x1000), (0x0, 0x1000)])"
    tester = PolicyTester(policies.Window(range(0x1000, 0x3000)), memory="1M")
    assert tester.call(0x2000, PAGE, to="shared") == Convert()
    assert tester.call(0x3000, PAGE, to="shared") == Deny()


@pytest.mark.parametrize(
    ("addresses", "said"),
    [
        (range(0x1000, 0x3000, PAGE), r"ranges has range\(4096, 12288, 4096\): its step must be 1"),
        (range(0x3000, 0x1000), r"ranges has range\(12288, 4096\): it is empty"),
        (range(-PAGE, PAGE), r"ranges has range\(-4096, 4096\): its addresses must be between 0 and"),
        (range(1 << 64, 1 << 65), "its addresses must be between 0 and 18446744073709551615"),
        (range(1, PAGE), "each of ranges must begin and end at a multiple of 4096, and not be empty"),
        ([(0, 0)], "each of ranges must begin and end at a multiple of 4096, and not be empty"),
    ],
)
def test_ranges_that_make_no_window(addresses, said) -> None:
    with pytest.raises(ValueError, match=said):
        policies.Window(addresses)


@pytest.mark.parametrize(("said", "call"), WRONG.items(), ids=WRONG.keys())
def test_the_message_itself_names_the_argument(said, call) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).startswith(said)


def test_so_do_those_of_methods(vm) -> None:
    for said, call in {
        'to is 1: it must be "private" or "shared"': lambda: vm.convert(0, PAGE, to=1),
        "data is 1: it must be bytes": lambda: vm.write(0, 1),
        "kernel is 1: it must be a path": lambda: vm.boot(1),
        "initrd is 1: it must be a path": lambda: vm.boot("vmlinuz", initrd=1),
        "append is 1: it must be text": lambda: vm.boot("vmlinuz", append=1),
        "name is 1: it must be text": lambda: vm.refresh_device(1),
        "region is 1: it must be a Region, or None": lambda: vm.policy.forget(1),
        "since is '1': it must be an int": lambda: vm.events.follow("1"),
        "interval is '1': it must be a number": lambda: vm.events.follow(interval="1"),
    }.items():
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value).startswith(said)


def test_a_policy_that_is_asked_next_is_named_too() -> None:

    with pytest.raises(PolicyError, match="^then: 5 is no policy"):
        policies.Quota("8M", 5)


def test_a_machine_without_a_vcpu() -> None:
    with pytest.raises(ValueError, match="^vcpus is 0: a machine needs at least one"):
        Vm("1M", vcpus=0, hypervisor=Fake([]))
