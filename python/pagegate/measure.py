"""Running a workload under a policy, and in the bare loop for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagegate import Vm
from pagegate._core import Marks, bare_loop
from pagegate.errors import PagegateError
from pagegate.policies import Align
from pagegate.workload import BEGIN, END, MARKS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pagegate import Report
    from pagegate.workload import Workload

_NANO = 1e9


@dataclass(frozen=True)
class Measured:
    """The measured part of a workload under a policy."""

    enforcement: str
    seconds: float
    latencies: list[int]
    """Nanoseconds from exit to resume of each measured request that the log still has, ascending."""
    report: Report
    """That of the whole run, including the warm-up."""


def under_policy(  # noqa: PLR0913 - one for each thing that is varied
    workload: Workload,
    policy: object,
    *,
    enforcement: str = "auto",
    events: int = 65536,
    pager: Path | None = None,
    prepare: Callable[[Vm], None] | None = None,
    timeout: float | None = None,
) -> Measured:
    """Runs a workload under a policy.

    An implicit request is always for one page, so for larger ones the policy is wrapped in ``Align``. ``pager``: as for
    ``Vm``. ``prepare`` is called with the machine before it runs. ``timeout``: seconds.

    Raises PagegateError if the guest does not halt, or does not make the requests that are to be measured.
    """
    if workload.pages > 1 and workload.kind == "implicit":
        policy = Align(workload.block, then=policy)
    marks = Marks()
    vm = Vm(
        workload.memory,
        vcpus=workload.vcpus,
        policy=policy,
        enforcement=enforcement,
        shared_bit=workload.shared_bit,
        memslots=workload.memslots,
        events=events,
        pager=pager,
    )
    with vm:
        shared = 0 if vm.shared_bit is None else 1 << vm.shared_bit
        for vcpu, (at, image, table) in zip(vm.vcpus, workload.images(), strict=True):
            vm.load(image, at)
            vcpu.start(mode="long", rip=at | shared, rdi=table | shared)
        vm.on_io(MARKS, marks)
        if prepare is not None:
            prepare(vm)
        report = vm.run(timeout=timeout)
        if report.reason != "halt":
            raise PagegateError(f"the guest did not halt: the run ended with {report.reason!r}")
        asked = workload.warm_up + workload.requests
        if report.requests != asked:
            raise PagegateError(
                f"the guest makes {asked} requests and {report.requests} reached the policy: this measures "
                "something else (does the policy return Retry(), or convert other pages than those asked for?)"
            )
        # The warm-up has the first sequence numbers: no vCPU begins before all have warmed up.
        latencies = sorted(event.latency for event in vm.events.since(workload.warm_up))
        return Measured(vm.enforcement, _between(marks, workload.vcpus), latencies, report)


def in_bare_loop(
    workload: Workload, *, enforcement: str, work: str = "all", timeout: float | None = None
) -> tuple[float, int]:
    """Runs a workload in the bare loop. Returns the seconds and the port IO exits of its measured part.

    ``work`` and ``timeout`` are those of ``bare_loop``. Raises PagegateError for another number of requests.
    """
    nanoseconds, requests, port_io = bare_loop(
        workload.memory,
        workload.images(),
        enforcement=enforcement,
        marks=MARKS,
        memslots=workload.memslots,
        shared_bit=workload.shared_bit,
        doorbell=workload.call == "doorbell",
        block=workload.block,
        work=work,
        timeout=timeout,
    )
    if requests != workload.requests:
        raise PagegateError(f"the bare loop answered {requests} requests in place of {workload.requests}")
    return nanoseconds / _NANO, port_io


def _between(marks: Marks, vcpus: int) -> float:
    """Seconds from when the first vCPU began to when the last one ended."""
    begins = [time for _, value, time in marks.written if value == BEGIN]
    ends = [time for _, value, time in marks.written if value == END]
    if len(begins) != vcpus or len(ends) != vcpus:
        raise PagegateError(f"{len(begins)} of {vcpus} vCPUs began and {len(ends)} ended")
    return (max(ends) - min(begins)) / _NANO
