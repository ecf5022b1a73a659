"""Loads the examples as policies, for their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from pagegate import Vm
from pagegate.bundled import GUESTS, SHARED_BIT
from pagegate.script import load

EXAMPLES = Path(__file__).parents[1] / "examples"
MIB = 1 << 20
MEMORY = 64 * MIB


def example(name: str, function: str | None = None, **options):
    return load(EXAMPLES / f"{name}.py", function, {key: str(value) for key, value in options.items()})


def loaded(name: str):
    """An example that is no policy, as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module(policy):
    return sys.modules[type(policy).__module__]


def under_the_demo(policy):
    with Vm(MEMORY, policy=policy, shared_bit=SHARED_BIT, initial="private") as vm:
        GUESTS["demo"].start(vm, "doorbell")
        return vm.run(timeout=60)
