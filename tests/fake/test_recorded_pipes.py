"""A trace that is written to a pipe: its reader may never come, never read, or take its time."""

from __future__ import annotations

import _thread
import os
import threading
import time

import pytest
from pagegate import Vm, trace
from pagegate.testing import Fake, Step

MEMORY = 64 << 20
SOON = 2.0
"""Seconds in which a call ends that is to end: it waits half a second for the reader, and the machine may be busy."""


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "x.arrows"
    os.mkfifo(path)
    return path


@pytest.fixture
def many():
    """A machine whose requests take more than a pipe has room for."""
    with Vm(MEMORY, hypervisor=Fake([Step.hypercall(0x10_0000, 1, 0)], cycles=5000)) as vm:
        vm.vcpus[0].start(mode="real")
        yield vm


@pytest.fixture
def interrupt():
    """Ctrl-C after so many seconds, and when that was."""
    timers = []

    def interrupt(seconds=0.5) -> list[float]:
        at = []

        def press():
            at.append(time.monotonic())
            _thread.interrupt_main()

        timers.append(threading.Timer(seconds, press))
        timers[-1].start()
        return at

    yield interrupt
    for timer in timers:
        timer.cancel()
        timer.join()


@pytest.fixture
def unread(fifo):
    """The pipe, opened by a reader that does not read."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    yield fifo
    os.close(reader)


def test_waiting_for_a_reader_ends_with_ctrl_c(many, fifo, interrupt) -> None:
    before = threading.active_count()
    at = interrupt()
    with pytest.raises(KeyboardInterrupt):
        trace.Recorder(many, fifo)
    assert time.monotonic() - at[0] < SOON
    at = interrupt()
    with pytest.raises(KeyboardInterrupt):
        trace.synthetic(10).write(fifo)
    assert time.monotonic() - at[0] < SOON
    assert threading.active_count() <= before + 2


def test_closing_without_a_reader_that_reads_ends_with_ctrl_c(many, unread, interrupt) -> None:
    recorder = trace.Recorder(many, unread)
    assert many.run(timeout=60).reason == "halt"
    at = interrupt()
    with pytest.raises(KeyboardInterrupt):
        recorder.close()
    assert time.monotonic() - at[0] < SOON
    recorder.close()
    at = interrupt()
    with pytest.raises(KeyboardInterrupt):
        trace.synthetic(5000).write(unread)
    assert time.monotonic() - at[0] < SOON


def test_closing_has_a_timeout(many, unread) -> None:
    recorder = trace.Recorder(many, unread)
    many.run(timeout=60)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="nobody reads it") as raised:
        recorder.close(timeout=0.3)
    assert 0.3 <= time.monotonic() - begun < 0.3 + SOON
    assert (raised.value.filename, recorder.written) == (str(unread), 0)
    with pytest.raises(ValueError, match="timeout is -1"):
        recorder.close(timeout=-1)


@pytest.mark.parametrize("how", ["an exception", "dropped"])
def test_nobody_is_waited_for_at_the_end(many, unread, how) -> None:
    recorder = trace.Recorder(many, unread)
    many.run(timeout=60)
    begun = time.monotonic()
    if how == "dropped":
        del recorder
    else:
        with pytest.raises(TimeoutError, match="nobody reads it"):
            recorder.__exit__(KeyError, KeyError(), None)
    assert time.monotonic() - begun < SOON


def test_a_slow_reader_gets_everything(many, fifo, tmp_path) -> None:
    copy = tmp_path / "copy.arrows"

    def read() -> None:
        with fifo.open("rb", buffering=0) as pipe, copy.open("wb") as file:
            time.sleep(0.3)
            while part := pipe.read(16384):
                file.write(part)
                time.sleep(0.005)

    reader = threading.Thread(target=read)
    reader.start()
    recorder = trace.Recorder(many, fifo)
    many.run(timeout=60)
    recorder.close(timeout=0)
    reader.join()
    assert recorder.written == many.events.total == 5000
    assert len(trace.read(copy)) == 5000


def test_a_reader_that_has_gone_is_an_error(many, fifo) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    recorder = trace.Recorder(many, fifo)
    os.close(reader)
    many.run(timeout=60)
    with pytest.raises(BrokenPipeError):
        recorder.close()
