"""Linux's own driver of the network card, in a plain guest and in a software SEV guest.

The kernels are those of test_linux.py; their modules have to be beside them, in lib/modules. The testbed's kernel has
no taps, so the other host on the network is this test: it answers to ARP and ping, and pings the guest.
"""

from __future__ import annotations

import random
import re
import socket
import struct

import pytest
from pagegate import Vm, devices, linux

from .test_linux import MEMORY, SECONDS, kernels, running_to_power_off

MODULES = ["virtio_pci", "virtio_net"]
GUEST_MAC, HOST_MAC = "52:54:00:12:34:56", bytes.fromhex("525400123457")
GUEST, HOST = socket.inet_aton("10.213.0.2"), socket.inet_aton("10.213.0.1")
ARP, IP = 0x0806, 0x0800
ECHO_REPLY, ECHO_REQUEST = 0, 8
PINGS = 20
SIZE = 1400
COMMAND = f"""cat /sys/class/net/eth0/address
ip address add 10.213.0.2/24 dev eth0
ip link set eth0 up
ping -c {PINGS} -s {SIZE} -i 0.1 10.213.0.1
echo pinged
read -r go"""


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo(kind: int, rest: bytes) -> bytes:
    """An ICMP message from the host to the guest, in an IP packet; `rest` is what comes after its checksum."""
    message = bytearray(struct.pack("!BBH", kind, 0, 0) + rest)
    message[2:4] = struct.pack("!H", checksum(message))
    header = bytearray(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(message), 1, 0, 64, 1, 0, HOST, GUEST))
    header[10:12] = struct.pack("!H", checksum(header))
    return bytes(header + message)


class Host:
    """The other host."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self.answered = 0
        self.replies: list[bytes] = []
        self._guest = bytes.fromhex(GUEST_MAC.replace(":", ""))

    def send(self, kind: int, data: bytes) -> None:
        self._link.send(self._guest + HOST_MAC + struct.pack("!H", kind) + data)

    def ping(self, data: bytes) -> None:
        """Asks the guest for these bytes, and waits until it has answered."""
        wanted = len(self.replies) + 1
        self.send(IP, echo(ECHO_REQUEST, data))
        while len(self.replies) < wanted:
            self.answer()

    def answer(self) -> None:
        """Takes one frame of the guest, and answers it if it is for this host."""
        frame = self._link.recv(1 << 16)
        assert frame[6:12] == self._guest
        (kind,) = struct.unpack_from("!H", frame, 12)
        data = frame[14:]
        if kind == ARP and data[6:8] == b"\0\1" and data[24:28] == HOST:
            self.send(ARP, data[:6] + b"\0\2" + HOST_MAC + HOST + data[8:18])
        if kind == IP and data[16:20] == HOST and data[9] == 1:
            (length,) = struct.unpack_from("!H", data, 2)
            message = data[20:length]
            assert checksum(message) == 0
            if message[0] == ECHO_REQUEST:
                self.answered += 1
                self.send(IP, echo(ECHO_REPLY, message[4:]))
            elif message[0] == ECHO_REPLY:
                self.replies.append(message[4:])


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("confidential", [None, "sev"])
@pytest.mark.parametrize("kernel", kernels()[-1:])
def test_pings_in_both_directions(kernel, confidential, tmp_path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(linux.build(command=COMMAND, modules=MODULES, kernel=kernel))
    link, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    link.settimeout(SECONDS)
    with link, Vm(MEMORY, platform="pc", confidential=confidential, events=8192) as vm:
        with end:
            vm.add_device(devices.Net(end, mac=GUEST_MAC))
        vm.boot(kernel, initrd=initrd, append="quiet")
        with running_to_power_off(vm):
            host = Host(link)
            while host.answered < PINGS:
                host.answer()
            vm.console.expect("pinged", timeout=60)
            source = random.Random(13)
            data = [struct.pack("!HH", 13, number) + source.randbytes(SIZE) for number in range(PINGS)]
            for sent in data:
                host.ping(sent)
            assert host.replies == data
            vm.console.write("\n")
        output = vm.console.tail(1 << 16).decode()
        assert f"{GUEST_MAC}\r\n" in output
        assert re.search(rf"{PINGS} packets transmitted, {PINGS} packets received", output), output
        assert not [event for event in vm.events if event.kind == "device"]
