"""The README's first block of code runs unchanged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"

pytestmark = pytest.mark.kvm


def test_the_first_block_runs(tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    file = tmp_path / "first.py"
    file.write_text(block.group(1))
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=120, check=True)
    report, touched, refused = done.stdout.splitlines()
    assert 'reason="halt", requests=2, conversions=1, denied=1' in report
    assert report.endswith("RAX: 22")
    assert 'kind="implicit", gpa=0x3000000' in touched
    assert 'outcome="converted"' in touched
    assert 'kind="explicit", gpa=0x800000' in refused
    assert 'outcome="denied"' in refused
