"""Policies as they are named on the command line."""

from __future__ import annotations

import re

import pytest
from pagegate import Convert, Deny, PolicyError
from pagegate.loading.expression import parse
from pagegate.testing import PolicyTester

MINE = """
from pagegate import Convert, Deny, Policy
class Mine(Policy):
    "Denies above a limit."
    def __init__(self, limit: int = 0): self.limit = limit
    def map_gpa_range(self, call): return Deny(5) if call.gpa >= self.limit else Convert()
class Other(Policy):
    pass
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "odd(name), really.py").write_text("from pagegate import policies\npolicy = policies.DenyAll(7)\n")


def asking(text, options=None):
    return PolicyTester(parse(text).make(options or {}), memory="1M")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Allow", "Allow()"),
        ("DenyAll()", "DenyAll(22)"),
        ("DenyAll(5)", "DenyAll(5)"),
        ("Quota(8M, Align(2M))", "Quota(0x800000, Align(0x200000))"),
        ("Quota( max_shared=8M , Allow )", "Quota(0x800000, Allow())"),
        ("Window(0x3000000+1M, Quota(1G))", "Window([(0x3000000, 0x100000)], Quota(0x40000000))"),
        ("Window(0x3000000+1M, 64M+4K)", "Window([(0x3000000, 0x100000), (0x4000000, 0x1000)])"),
        ("PingPong(limit=8, window=0.5)", "PingPong(8, 0.5)"),
        ("RateLimit(100, 4, ExplicitOnly)", "RateLimit(100, 4, ExplicitOnly())"),
    ],
)
def test_built_in_policies(text, shown):
    assert repr(parse(text).make({})) == shown
    assert str(parse(text)) == text
    assert parse(text).file is None


def test_a_file_at_the_end_of_a_chain(mine):
    told = asking("Quota(8K, Align(8K, mine.py:Mine))", {"limit": "64K"})
    assert told.call(0x2000, to="shared") == Convert(gpa=0x2000, size=0x2000)
    assert told.shared_bytes == 8192
    assert told.call(0x4000, to="shared") == Deny()
    assert told.call(0x10000, to="shared") == Deny(5)
    assert parse("Quota(8K, Align(8K, mine.py:Mine))").file.name == "mine.py"
    assert asking("odd(name), really.py").call(0, to="shared") == Deny(7)


def test_a_file_whose_name_begins_with_a_digit(mine, tmp_path):
    (tmp_path / "8Q").write_text("from pagegate import policies\npolicy = policies.DenyAll(7)\n")
    assert asking("Quota(8M, 8Q)").call(0, to="shared") == Deny(7)
    assert asking("Quota(8M, 8Q:policy)").call(0, to="shared") == Deny(7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Qota(8M)", "no built-in policy Qota: did you mean Quota?"),
        ("Quota", "Quota needs max_shared, as in Quota(8M)"),
        ("Quota(8X)", "Quota: 8X is no size, as in Quota(8M), and no file"),
        ("Window(1M+8Q)", "Window: 1M+8Q is no range of addresses, as in Window(0x3000000+1M), and no file"),
        ("RateLimit(1/s)", "RateLimit: 1/s is no number, as in RateLimit(100), and no file"),
        (" ", "it is empty: name a policy, as mine.py or Quota(8M)"),
        ("Quota(8M", "the bracket that ends Quota( is missing"),
        ("Quota(8M))", "a bracket too many"),
        ("Quota(8M, , Allow)", "an argument is missing"),
        ("Quota(8M, Allow, 3)", "comes after the policy that it asks"),
        (
            "Quota(8M, 9M)",
            "Quota does not take '9M': it takes max_shared, and after that it may take a policy, as in "
            "Quota(8M, mine.py)",
        ),
        (
            "Window(1M)",
            "Window does not take '1M': it takes ranges of addresses, and after that it may take a policy, as in "
            "Window(0x3000000+1M, mine.py)",
        ),
        ("DenyAll(1, 2)", "DenyAll does not take '2': it takes errno"),
        ("Quota(8M, max_shared=9M)", "max_shared twice"),
        ("Quota(8M, nowhere.py)", "no file nowhere.py"),
        ("Allow(mine.py)", "Allow does not take 'mine.py': it takes no arguments"),
        ("Window(Allow)", "Window needs a range of addresses"),
        ("alow", "did you mean Allow?"),
        ("/", "is a directory"),
    ],
)
def test_what_names_no_policy_is_told(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)


def test_what_a_policy_refuses_is_told(mine):
    with pytest.raises(ValueError, match="size must be a power of two"):
        parse("Align(3)").make({})
    with pytest.raises(ValueError, match="max_shared is -1"):
        parse("Quota(-1)").make({})
    with pytest.raises(PolicyError, match="no file that would take options"):
        parse("Quota(1M)").make({"limit": "1"})
    with pytest.raises(PolicyError) as caught:
        parse("mine.py").make({})
    assert str(caught.value).splitlines()[1:] == ["  mine.py:Mine  Denies above a limit.", "  mine.py:Other"]
