"""The example external_service, with the reference service and with services that misbehave."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from pagegate import Convert, Deny, PolicyError, Retry, Stop
from pagegate.guests import PAGE
from pagegate.testing import PolicyTester, Step

from .example_parts import EXAMPLES, MIB, example, module, under_the_demo

LIMIT = 0.3
"""What a service may take; and a busy host some more."""
SLACK = 2.0


@pytest.fixture
def where():
    # A socket's path has 107 bytes at most; pytest's own directories can be longer.
    directory = tempfile.mkdtemp(dir="/tmp")
    yield Path(directory) / "s"
    shutil.rmtree(directory)


@pytest.fixture
def asks(where):
    """Makes a policy that asks the service at this path."""
    policies = []

    def make(limit=LIMIT):
        policies.append(example("external_service", socket=where, limit=limit))
        return policies[-1]

    yield make
    for policy in policies:
        policy.close()


@pytest.fixture
def serve(where, asks):
    """Starts the reference service with a rule of the test."""
    services = []

    def make(rule=None):
        theirs = module(asks())
        service = theirs.Service(where, *([rule] if rule else []))
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        services.append((service, thread))
        return theirs

    yield make
    for service, thread in services:
        service.shutdown()
        service.server_close()
        thread.join(5)


@pytest.fixture
def misbehave(where):
    """Starts a service that calls a function of the test with each connection."""
    done = threading.Event()
    threads = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def make(behave):
        listener.bind(str(where))
        listener.listen()

        def one(connection):
            with connection, contextlib.suppress(OSError):
                behave(connection, done)

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threads.append(threading.Thread(target=one, args=(connection,)))
                    threads[-1].start()

        threads.append(threading.Thread(target=accept))
        threads[-1].start()

    yield make
    done.set()
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def says(*answers):
    """A service that answers the first request with the first of these, and so on."""

    def behave(connection, done):
        for answer in answers:
            connection.recv(4096)
            connection.sendall(answer)
        done.wait(10)

    return behave


def never(connection, done):
    done.wait(10)


def trickles(connection, done):
    """Sends a little of the answer at a time, and never all of it."""
    connection.recv(4096)
    for byte in b'{"id": 1, "decision": "convert"' + b" " * 200:
        connection.sendall(bytes([byte]))
        if done.wait(0.05):
            return


def hangs_up(connection, done):
    connection.recv(4096)


def hangs_up_at_once(connection, done):
    pass


def closes_half(connection, done):
    connection.shutdown(socket.SHUT_WR)
    done.wait(10)


def floods(connection, done):
    while not done.is_set():
        connection.sendall(b"x" * 65536)


def answers_late(connection, done):
    connection.recv(4096)
    done.wait(2 * LIMIT)
    connection.sendall(b'{"id": 1, "decision": "convert"}\n')
    done.wait(10)


CONVERT = b'{"id": 1, "decision": "convert"}\n'
HOSTILE = {
    "never": never,
    "trickles": trickles,
    "hangs_up": hangs_up,
    "hangs_up_at_once": hangs_up_at_once,
    "closes_half": closes_half,
    "floods": floods,
    "answers_late": answers_late,
    "garbage": says(b"\xff\xfe\x00 garbage\n"),
    "nothing": says(b"\n"),
    "deep": says(b"[" * 4000 + b"\n"),
    "long": says(b" " * 5000 + CONVERT),
    "unfinished": says(CONVERT[:-1]),
    "two": says(CONVERT + b"{}\n"),
    "array": says(b'["convert"]\n'),
    "null": says(b"null\n"),
    "no_id": says(b'{"decision": "convert"}\n'),
    "another_id": says(b'{"id": 2, "decision": "convert"}\n'),
    "text_id": says(b'{"id": "1", "decision": "convert"}\n'),
    "true_id": says(b'{"id": true, "decision": "convert"}\n'),
    "no_decision": says(b'{"id": 1}\n'),
    "another_decision": says(b'{"id": 1, "decision": "CONVERT"}\n'),
    "list_decision": says(b'{"id": 1, "decision": ["convert"]}\n'),
    "errno_0": says(b'{"id": 1, "decision": "deny", "errno": 0}\n'),
    "errno_huge": says(b'{"id": 1, "decision": "deny", "errno": 1e99}\n'),
    "errno_true": says(b'{"id": 1, "decision": "deny", "errno": true}\n'),
}


def within_the_limit(tester) -> None:
    for _ in range(2):  # the second time by a new connection
        before = time.monotonic()
        assert tester.call(PAGE, to="shared") == Deny(11)
        assert time.monotonic() - before < LIMIT + SLACK
    before = time.monotonic()
    decision = tester.fault(PAGE)
    assert time.monotonic() - before < LIMIT + SLACK
    assert isinstance(decision, Stop)
    assert decision.reason.startswith("external service: ")
    assert tester.shared_bytes == 0


@pytest.mark.parametrize("behave", HOSTILE.values(), ids=HOSTILE)
def test_a_service_that_misbehaves_converts_nothing(asks, misbehave, behave) -> None:
    misbehave(behave)
    within_the_limit(PolicyTester(asks()))


def test_no_service_converts_nothing(asks, where) -> None:
    within_the_limit(PolicyTester(asks()))
    # A service that has ended leaves its socket's file.
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(where))
    within_the_limit(PolicyTester(asks()))


def test_a_service_that_does_not_accept_converts_nothing(asks, where) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(where))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(where))
        within_the_limit(PolicyTester(asks()))


def test_a_late_answer_is_dropped(asks, misbehave) -> None:
    """The answer to the first request comes after its time limit; the second request must not take it for its own."""
    denied, sent = threading.Event(), threading.Event()

    def behave(connection, done):
        connection.recv(4096)
        if not sent.is_set() and denied.wait(10):
            try:
                connection.sendall(CONVERT)
            finally:
                sent.set()
        done.wait(10)

    misbehave(behave)
    tester = PolicyTester(asks())
    assert tester.call(0, to="shared") == Deny(11)
    denied.set()
    assert sent.wait(10)
    assert tester.call(0, to="shared") == Deny(11)


@pytest.mark.parametrize(
    ("answer", "decision"),
    [
        ({"decision": "convert"}, Convert()),
        ({"decision": "deny"}, Deny(22)),
        ({"decision": "deny", "errno": 11}, Deny(11)),
        ({"decision": "retry"}, Retry()),
        ({"decision": "stop", "reason": "enough"}, Stop("the service said: enough")),
    ],
)
def test_a_service_decides(asks, serve, answer, decision) -> None:
    asked = []

    def rule(request):
        asked.append(request)
        return answer

    serve(rule)
    tester = PolicyTester(asks(10.0))
    assert tester.call(PAGE, 2 * PAGE, to="shared", vcpu=1) == decision
    if decision == Convert():
        assert tester.fault(PAGE) == Convert()
        assert (asked[1]["kind"], asked[1]["to"], asked[1]["state"]) == ("implicit", "private", "shared")
    assert asked[0] == {
        "id": 1,
        "kind": "explicit",
        "vcpu": 1,
        "gpa": PAGE,
        "size": 2 * PAGE,
        "to": "shared",
        "state": "private",
        "time": 0,
    }


def test_a_connection_is_reused_and_replaced(asks, misbehave) -> None:
    made = []

    def behave(connection, done):
        made.append(connection)
        for number in (1, 2):
            connection.recv(4096)
            connection.sendall(CONVERT.replace(b"1", b"%d" % number))

    misbehave(behave)
    tester = PolicyTester(asks(10.0))
    decisions = [tester.call(0, to="shared") for _ in range(5)]
    # The service closes the connection after two requests. The third request fails, the fourth opens a new connection.
    assert decisions == [Convert(), Convert(), Deny(11), Convert(), Convert()]
    assert len(made) == 2


def test_vcpus_do_not_wait_for_each_other(asks, serve, fake_vm) -> None:
    both = threading.Barrier(2, timeout=10)

    def rule(request):
        both.wait()
        return {"decision": "convert"}

    serve(rule)
    scripts = [[Step.doorbell((vcpu * 8 + each) * PAGE, 1, 0) for each in range(8)] for vcpu in range(2)]
    vm = fake_vm(*scripts, policy=asks(10.0), initial="private")
    report = vm.run(timeout=20)
    assert (report.reason, report.conversions, report.denied) == ("halt", 16, 0)


def test_the_reference_service_refuses_what_its_rule_says(asks, serve) -> None:
    serve()
    tester = PolicyTester(asks(10.0))
    assert tester.call(16 * MIB, MIB, to="shared") == Convert()
    assert tester.call(20 * MIB, MIB + PAGE, to="shared") == Deny()
    assert tester.call(15 * MIB, to="shared") == Deny()
    assert tester.call(0, MIB, to="private") == Convert()


@pytest.mark.parametrize(
    "line", [b"garbage\n", b"[]\n", b"{}\n", b'{"id": 1, "to": "shared", "size": "x"}\n', b"x" * 9000]
)
def test_the_reference_service_hangs_up_on_nonsense(serve, where, line) -> None:
    serve()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(where))
        client.sendall(line)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


def test_the_reference_service_as_a_program(asks, where) -> None:
    program = [sys.executable, str(EXAMPLES / "external_service.py"), str(where)]
    service = subprocess.Popen(program)
    try:
        tester = PolicyTester(asks(10.0))
        end = time.monotonic() + 20
        while tester.call(32 * MIB, to="shared") != Convert():
            assert time.monotonic() < end, "the service did not come up"
            time.sleep(0.02)
        assert stat.S_IMODE(where.stat().st_mode) == 0o600
        assert tester.call(0, to="shared") == Deny()
    finally:
        service.kill()
        service.wait(10)
    assert tester.call(33 * MIB, to="shared") == Deny(11)
    assert subprocess.run(program[:2], capture_output=True, timeout=20).returncode == 1


def test_the_reference_service_does_not_replace_a_regular_file(asks, where) -> None:
    where.write_text("mine")
    with pytest.raises(OSError, match="in use"):
        module(asks()).Service(where)
    assert where.read_text() == "mine"


@pytest.mark.parametrize("limit", [0, -1, "nan", "inf"])
def test_invalid_limits_are_refused(where, limit) -> None:
    with pytest.raises(PolicyError, match="limit"):
        example("external_service", socket=where, limit=limit)


@pytest.mark.kvm
def test_the_service_under_a_guest(asks, serve) -> None:
    serve()
    report = under_the_demo(asks(10.0))
    assert (report.reason, report.denied > 0, report.conversions > 0) == ("halt", True, True)
