"""Writes every request and the decision about it to a log, as JSON lines. Another policy decides.

For a record of what the guest asked for that is kept when the machine is gone. A line is written before its decision
takes effect, and if it cannot be written the run ends, so no decision is missing from the log. For the same reason
``remember=`` is taken out of the decisions: requests that a remembered decision answers would not be logged.

    pagegate run -p examples/audit_log.py --guest demo
    pagegate run -p examples/audit_log.py -o path=audit.jsonl -o inner=examples/explicit_only.py --guest demo

Put built-in policies around it, ``Quota(8 << 20, AuditLog())``. They may then refuse what the log has as converted.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - `pagegate run -o` looks the annotation up
from typing import TYPE_CHECKING

from pagegate import (
    Convert,
    Deny,
    DeviceAccess,
    Discard,
    MapGpaRange,
    MemoryFault,
    MemoryPoison,
    Policy,
    PolicyError,
    Retry,
    Stop,
)
from pagegate.hooks import NAMES, resolve
from pagegate.policies import Builtin
from pagegate.script import load

if TYPE_CHECKING:
    from pagegate import Decision
    from pagegate.hooks import Hook


@dataclass
class AuditLog(Policy):
    """Asks ``inner``, and logs the request and the decision."""

    path: Path | None = None
    """The file to append to; ``None`` for standard error."""
    inner: str | Policy | None = None
    """The policy that decides, or its FILE[:NAME]; ``None`` converts as asked."""

    def __post_init__(self) -> None:
        """Opens the log, so that a path that cannot be written to is an error before the guest runs."""
        inner: object = self.inner
        if isinstance(inner, str):
            file, _, name = inner.partition(":")
            inner = load_policy(file, name)
        hooks: list[Hook | None] = [None] * len(NAMES) if inner is None else resolve(inner)
        self._fault, self._call, self._poison, self._device = hooks
        # Line by line: each is written to the file before write() returns.
        self._log = sys.stderr if self.path is None else self.path.open("a", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file, unless it is standard error."""
        if self.path is not None:
            self._log.close()

    def memory_fault(self, fault: MemoryFault) -> Decision:
        """An implicit request."""
        asked = "private" if fault.private else "shared"
        return self._audit(about("implicit", fault, to=asked, rip=hex(fault.rip)), fault, self._fault, Convert())

    def map_gpa_range(self, call: MapGpaRange) -> Decision:
        """An explicit request."""
        return self._audit(about("explicit", call, to=call.to), call, self._call, Convert())

    def memory_poison(self, poison: MemoryPoison) -> Decision:
        """A poisoned page."""
        about_it = about("poison", poison, rip=hex(poison.rip))
        return self._audit(about_it, poison, self._poison, Stop("poison"))

    def device_access(self, access: DeviceAccess) -> Decision:
        """A device's access to a page that is not shared."""
        about_it = {
            "time": time.monotonic_ns(),
            "kind": "device",
            "gpa": hex(access.gpa),
            "size": access.size,
            "state": access.state,
            "device": access.device,
            "queue": access.queue,
            "write": access.write,
        }
        return self._audit(about_it, access, self._device, Deny(errno.EACCES))

    def _audit(self, about: dict[str, object], request: object, hook: Hook | None, default: Decision) -> Decision:
        try:
            decision = default if hook is None else forgetful(hook(request))
        except BaseException as error:
            self._write({**about, "raised": repr(error)})
            raise
        self._write({**about, **described(decision)})
        return decision

    def _write(self, record: dict[str, object]) -> None:
        line = json.dumps(record) + "\n"
        with self._lock:
            self._log.write(line)
            self._log.flush()


def about(kind: str, request: MemoryFault | MapGpaRange, **more: str) -> dict[str, object]:
    """A request for JSON."""
    return {
        "time": request.time,
        "vcpu": request.vcpu,
        "kind": kind,
        "gpa": hex(request.gpa),
        "size": request.size,
        "state": request.state,
        **more,
    }


def load_policy(file: str, name: str) -> object:
    """The policy in a file, if Python can call its hooks."""
    policy = load(file, name or None)
    if isinstance(policy, Builtin):
        raise PolicyError(f"{file}: a built-in policy is asked by the core only: put it around AuditLog()")
    return policy


def forgetful(decision: Decision) -> Decision:
    """The same decision without ``remember``."""
    match decision:
        case Convert(remember=region) if region is not None:
            to, gpa, size = decision.to, decision.gpa, decision.size
            return Convert(to, gpa, size, prefault=decision.prefault, discard=decision.discard)
        case Deny(remember=region) if region is not None:
            return Deny(decision.errno)
        case Retry(remember=region) if region is not None:
            return Retry()
        case _:
            return decision


def described(decision: Decision) -> dict[str, object]:
    """A decision for JSON, without what is at its default."""
    match decision:
        case Convert():
            where = {"done_to": decision.to, "done_gpa": decision.gpa, "done_size": decision.size}
            return {"decision": "convert", **{key: value for key, value in where.items() if value is not None}}
        case Deny():
            return {"decision": "deny", "errno": decision.errno}
        case Stop():
            return {"decision": "stop", "reason": decision.reason}
        case Retry() | Discard():
            return {"decision": type(decision).__name__.lower()}
    # The core will not accept this; the log then says why the run ended.
    return {"decision": "none", "answer": repr(decision)}
