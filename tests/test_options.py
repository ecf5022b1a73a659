"""Options of a policy: text is turned into the types of the policy's signature."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from pagegate import PolicyError, _core, policies
from pagegate.script import load

TEXT = """
    {future}
    import enum
    from dataclasses import InitVar, dataclass, field
    from pathlib import Path
    from typing import *
    from pagegate import Convert, Policy, policies

    class Mode(enum.Enum):
        STRICT = "s"
        LOOSE = "l"

    class Mine(Policy):
        def __init__(self, limit: int = 1, rate: float = 1.0, on: bool = False, name: str = "", where: Path = Path(),
                     mode: Mode = Mode.STRICT, to: Literal["private", "shared"] = "shared", level: Literal[1, 2] = 1,
                     most: int | None = 3, old: Optional[float] = None, either: str | int = "", many: list[int] = (),
                     pair: tuple[int, str] = (0, ""), some: tuple[float, ...] = (), kinds: set[Mode] = frozenset(),
                     plain=5, texts=("a",), free=None, then: Policy | None = None):
            self.got = {{key: value for key, value in locals().items() if key not in ("self", "__class__")}}
"""


@pytest.fixture(params=["", "from __future__ import annotations"])
def mine(request, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(TEXT).format(future=request.param).lstrip())
    return path


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text("from pagegate import *\n" + textwrap.dedent(text))
        return path

    return write


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("limit", "64", 64),
        ("limit", "0x40", 64),
        ("limit", "64K", 64 << 10),
        ("limit", "1GiB", 1 << 30),
        ("limit", "-3", -3),
        ("rate", "0.5", 0.5),
        ("rate", "1e6", 1e6),
        ("on", "yes", True),
        ("on", "0", False),
        ("on", "TRUE", True),
        ("name", "a=b,c", "a=b,c"),
        ("where", "/tmp/x", Path("/tmp/x")),
        ("to", "private", "private"),
        ("level", "2", 2),
        ("most", "none", None),
        ("most", "8M", 8 << 20),
        ("old", "2", 2.0),
        ("either", "12", 12),
        ("either", "x", "x"),
        ("many", "1, 2,0x3", [1, 2, 3]),
        ("many", "", []),
        ("pair", "1,b", (1, "b")),
        ("some", "1,2.5", (1.0, 2.5)),
        ("plain", "1K", 1024),
        ("texts", "b,c", ("b", "c")),
        ("free", "12", "12"),
    ],
)
def test_a_value_is_what_its_annotation_or_default_says(mine, key, text, value):
    got = load(mine, "Mine", {key: text}).got[key]
    assert got == value
    assert type(got) is type(value) or isinstance(got, Path)


@pytest.mark.parametrize(("text", "name"), [("LOOSE", "LOOSE"), ("l", "LOOSE"), ("STRICT", "STRICT")])
def test_an_enumeration_is_picked_by_name_or_value(mine, text, name):
    assert load(mine, options={"mode": text}).got["mode"].name == name
    assert {each.name for each in load(mine, options={"kinds": text}).got["kinds"]} == {name}


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("limit", "many", r"option limit \(int\) cannot be 'many': .*64K"),
        ("limit", "", r"option limit \(int\) cannot be ''"),
        ("limit", "1_", r"option limit \(int\) cannot be '1_'"),
        ("rate", "fast", r"option rate \(float\) cannot be 'fast'"),
        ("on", "maybe", r"option on \(bool\) cannot be 'maybe': it is one of true"),
        ("mode", "x", r"option mode \(.*Mode.*\) cannot be 'x': it is one of STRICT, LOOSE"),
        ("to", "both", r"option to \(.*Literal.*\) cannot be 'both': it is one of private, shared"),
        ("most", "x", r"option most \(.*int.*None.*\) cannot be 'x'"),
        ("pair", "1", r"option pair .* cannot be '1': it is 2 values with commas"),
        ("many", "1,x", r"option many \(list\[int\]\) cannot be '1,x'"),
        ("then", "x", r"option then "),
        ("limitt", "1", r"Mine has no option limitt: did you mean limit\?"),
        ("zzz", "1", r"Mine has no option zzz: it takes limit, rate"),
    ],
)
def test_a_wrong_option_is_one_sentence(mine, key, text, said):
    with pytest.raises(PolicyError, match=said) as caught:
        load(mine, options={key: text})
    assert str(mine) in str(caught.value)
    assert "_pagegate_policy" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dataclass_s_fields_are_options(write):
    path = write(
        """
        from dataclasses import InitVar, dataclass, field
        @dataclass
        class Base(Policy):
            limit: int
            seen: list = field(default_factory=list, init=False)
        @dataclass
        class Mine(Base):
            twice: InitVar[int] = 1
            def __post_init__(self, twice): self.limit *= twice
        """
    )
    assert load(path, options={"limit": "4", "twice": "0x2"}).limit == 8
    with pytest.raises(PolicyError, match=r"Mine needs the option limit \(int\): give it a value, -o limit=VALUE"):
        load(path)
    with pytest.raises(PolicyError, match="no option seen"):
        load(path, options={"limit": "1", "seen": "2"})


def test_a_factory_s_parameters_are_options(write):
    path = write("def make(limit: int, /, *, errno=11): return policies.Quota(limit, policies.DenyAll(errno))\n")
    assert isinstance(load(path, "make", {"limit": "8M", "errno": "22"}), policies.Quota)
    with pytest.raises(PolicyError, match=r"make needs the option limit \(int\)"):
        load(path, "make")
    with pytest.raises(PolicyError, match="line 2, has a make that makes no policy: ValueError"):
        load(path, "make", {"limit": "8M", "errno": "0"})
    with pytest.raises(PolicyError, match="NoneType is no policy"):
        load(write("def make(): pass\n"), "make")


def test_arbitrary_keywords_are_text(write):
    path = write("class Mine(Policy):\n  def __init__(self, **rest): self.rest = rest\n")
    assert load(path, options={"a": "1"}).rest == {"a": "1"}


def test_a_built_in_policy_takes_options(write):
    path = write("from pagegate.policies import Quota, RateLimit\npolicy = Quota(8 << 20)\n")
    assert isinstance(load(path), policies.Quota)
    assert isinstance(load(path, "Quota", {"max_shared": "8M"}), policies.Quota)
    assert isinstance(load(path, "RateLimit", {"per_second": "10"}), policies.RateLimit)
    with pytest.raises(PolicyError, match="Quota that is made already and takes no options"):
        load(path, options={"max_shared": "1"})
    with pytest.raises(PolicyError, match="option then"):
        load(path, "Quota", {"max_shared": "1", "then": "x"})


def test_modules_and_hooks_take_no_options(write):
    path = write("def memory_fault(fault): return Convert()\n")
    with pytest.raises(PolicyError, match=r"module of functions and takes no options \(limit\): name a class"):
        load(path, options={"limit": "1"})
    with pytest.raises(PolicyError, match="memory_fault is a hook and not a policy"):
        load(path, "memory_fault")


def test_an_annotation_that_does_not_resolve(write):
    path = write('class Mine(Policy):\n  def __init__(self, a: "Nowhere" = None): pass\n')
    load(path)
    with pytest.raises(PolicyError, match="option a has the annotation Nowhere, which cannot be resolved"):
        load(path, options={"a": "1"})


@pytest.mark.parametrize("text", ["", "x", "1.5", "K", "0x", "1 2", "12Q", "0b2"])
def test_invalid_whole_numbers_are_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011
        _core.whole_number(text)
