"""Runs and their events for asyncio: ``Vm.run_async`` and ``Events.follow``."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pagegate._core import Event, Report, Vm

_AGAIN_SECONDS = 0.02


async def run(vm: Vm, timeout: float | None = None) -> Report:
    """Runs a machine in a thread, and returns its report or raises what the run raises.

    If this is cancelled, the run is stopped and waited for.
    """
    loop = asyncio.get_running_loop()
    # The error is a result, too: a future takes no StopIteration, which a hook may well raise.
    ended: asyncio.Future[tuple[Report | None, BaseException | None]] = loop.create_future()
    cancelled = threading.Event()

    def tell(report: Report | None, error: BaseException | None) -> None:
        if not ended.cancelled():
            ended.set_result((report, error))

    def body() -> None:
        report: Report | None = None
        failure: BaseException | None = None
        try:
            report = vm.run(0.0 if cancelled.is_set() else timeout)
        except BaseException as error:  # noqa: BLE001 - it is raised by whoever awaits
            failure = error
        loop.call_soon_threadsafe(tell, report, failure)

    thread = threading.Thread(target=body, name="pagegate-run", daemon=True)
    thread.start()
    try:
        report, error = await asyncio.shield(ended)
    except asyncio.CancelledError:
        cancelled.set()
        while thread.is_alive():
            # The run may not have begun yet.
            vm.stop()
            await asyncio.sleep(_AGAIN_SECONDS)
        raise
    if isinstance(error, StopIteration):
        # A coroutine cannot raise it.
        raise RuntimeError("the run raised StopIteration") from error  # noqa: TRY004
    if error is not None:
        raise error
    assert report is not None  # noqa: S101 - there is one or the other
    return report


async def follow(vm: Vm, end: Callable[[], int | None], since: int = 0, interval: float = 0.05) -> AsyncIterator[Event]:
    """Yields a machine's events from a sequence number on, until a run is over and all of its were given.

    ``end``: the number of the event after the run's last, ``None`` while it goes on or has not begun. ``interval``:
    seconds between two looks at the log.
    """
    while True:
        # Before the log is read: what the run has logged is in it then.
        over = end()
        for event in vm.events.since(since):
            if over is not None and event.sequence >= over:
                return
            since = event.sequence + 1
            yield event
        if over is not None:
            return
        await asyncio.sleep(interval)
