"""Virtio devices for machines with ``platform="pc"``: give one to ``Vm.add_device`` before ``Vm.boot``.

A device reaches the guest's shared pages only. What its driver names beyond them is not read or written: the request
fails, ``Policy.device_access`` is asked, and the log has an event of kind "device".
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pagegate._core import Block, BuiltinDevice, Console, DeviceQueue, DeviceRequest, Net, Rng, Vsock
from pagegate.errors import PolicyError
from pagegate.hooks import described

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Block", "BuiltinDevice", "Console", "Device", "DeviceQueue", "DeviceRequest", "Net", "Rng", "Vsock"]

_LARGEST_ID = 0x3F
"""PCI device IDs of virtio devices are 0x1040 to 0x107f."""
_LARGEST_QUEUE = 1024
_CONFIG_SIZE = 4096


class Device:
    """The base class for devices in Python. Any object with ``device_id``, ``queues`` and ``process`` is one.

    Attributes are read once, by ``Vm.add_device``, and ``config`` by ``Vm.refresh_device``, too. Besides its own
    features every device offers VERSION_1, ACCESS_PLATFORM, INDIRECT_DESC and EVENT_IDX. Methods are called on the
    device's own thread unless they say otherwise, and an exception ends the run.
    """

    device_id: int
    """Its type's number, as in the virtio specification: 2 for a disk, 4 for a source of entropy."""
    queues: Sequence[int]
    """The largest size of each of its queues: powers of two up to 1024; 64 queues at most."""
    features: int = 0
    """Feature bits that belong to its type."""
    config: bytes = b""
    """Its configuration space, 4096 bytes at most."""

    def __repr__(self) -> str:
        """The name of its class."""
        return described(self, "device")

    def process(self, queue: DeviceQueue) -> None:
        """There may be requests in ``queue``; iterate over it. It is called again when there are more."""
        raise NotImplementedError

    def write_config(self, written: tuple[int, bytes]) -> None:
        """The driver wrote to the configuration space: the offset and the bytes. Called on a vCPU's thread."""

    def reset(self) -> None:
        """The driver has reset the device."""

    def save(self) -> bytes:
        """What it has to know again in a machine that goes on from a snapshot. Called by ``Vm.snapshot``."""
        return b""

    def restore(self, state: bytes) -> None:
        """What ``save`` gave, for a device that ``Vm.resume`` was given."""


def _resolve(device: object) -> tuple[Any, ...]:
    """What the binding needs of a device. PolicyError for an object that is none."""
    if inspect.isclass(device):
        raise PolicyError(f"{device.__name__} is a class: pass an object, {device.__name__}(...)")
    kind = type(device).__name__
    missing = [name for name in ("device_id", "queues", "process") if not hasattr(device, name)]
    if missing:
        raise PolicyError(f"a {kind} is no device: it has no {missing[0]}")
    identifier = _number(device, "device_id", _LARGEST_ID)
    features = _number(device, "features", (1 << 64) - 1)
    queues = getattr(device, "queues", ())
    if not all(isinstance(size, int) and 0 < size <= _LARGEST_QUEUE for size in queues):
        raise PolicyError(f"queues of a {kind} is {queues!r}: it has a size for each queue, {_LARGEST_QUEUE} at most")
    names = ("process", "write_config", "reset", "save", "restore")
    process, *others = (_method(device, name) for name in names)
    if process is None:
        raise PolicyError(f"a {kind} is no device: it has no process() of its own")
    return identifier, features, list(queues), process, *others


def _config(device: object) -> bytes:
    """Its configuration space as it is now."""
    config = bytes(getattr(device, "config", b""))
    if len(config) > _CONFIG_SIZE:
        raise PolicyError(f"config of a {type(device).__name__} has {len(config)} bytes: there can be {_CONFIG_SIZE}")
    return config


def _number(device: object, name: str, most: int) -> int:
    value = getattr(device, name, 0)
    if not isinstance(value, int) or not 0 <= value <= most:
        raise PolicyError(f"{name} of a {type(device).__name__} is {value!r}: it is a number from 0 to {most}")
    return value


def _method(device: object, name: str) -> Callable[..., Any] | None:
    """The method, unless there is none but the base class's, which does nothing."""
    method = getattr(device, name, None)
    if method is None or getattr(method, "__func__", None) is getattr(Device, name):
        return None
    if not callable(method) or inspect.iscoroutinefunction(method):
        raise PolicyError(f"{name} of a {type(device).__name__} is no function that answers at once")
    return method  # type: ignore[no-any-return]
