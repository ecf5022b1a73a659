//! The vsock device: what a guest's packets and the host's sockets do.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixListener;

use pagegate_core::devices::virtio::vsock::Vsock;
use pagegate_core::memory::address::State;

use crate::requests::Part;
use crate::vsock_guest::{
    BUFFER, CID, CREDIT_REQUEST, CREDIT_UPDATE, FROM_GUEST, Guest, HEADER, Packet, REQUEST, RESPONSE, RST, RW,
    SHUTDOWN, TO_GUEST, client, read_all, read_exactly, read_line,
};

/// Programs of the host that wait for the guest's answer at a time.
const MOST_UNANSWERED: usize = 64;

#[test]
fn a_guest_connects_and_both_sides_close() {
    let mut guest = Guest::new("guest-connects");
    let listening = guest.listen(52);
    let ports = (1000, 52);
    let mut host = guest.connect(ports, &listening);
    guest.send_data(ports, b"question");
    assert_eq!(read_exactly(&mut host, 8), b"question");
    host.write_all(b"answer").unwrap();
    let packet = guest.expect(ports, RW);
    assert_eq!((packet.data, packet.fwd_cnt), (b"answer".to_vec(), 8));
    // The guest has nothing more to say, and the host answers to that.
    guest.shut_down(ports, 2);
    assert_eq!(read_all(&mut host), b"");
    host.write_all(b"bye").unwrap();
    assert_eq!(guest.expect(ports, RW).data, b"bye");
    drop(host);
    assert_eq!(guest.expect(ports, SHUTDOWN).flags, 3);
    guest.send(ports, RST);
    // There is no such stream any more.
    guest.send_data(ports, b"late");
    guest.expect(ports, RST);
    guest.driver.stop();
}

#[test]
fn a_host_that_only_writes_no_more_is_told_from_one_that_has_closed() {
    let mut guest = Guest::new("half-closed");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    host.write_all(b"last").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect((5, 1), RW).data, b"last");
    assert_eq!(guest.expect((5, 1), SHUTDOWN).flags, 2);
    guest.send_data((5, 1), b"still heard");
    guest.shut_down((5, 1), 3);
    guest.expect((5, 1), RST);
    assert_eq!(read_all(&mut host), b"still heard");
    guest.driver.stop();
}

#[test]
fn a_program_of_the_host_connects() {
    let mut guest = Guest::new("host-connects");
    let (mut one, first) = guest.be_connected(22);
    let (mut other, second) = guest.be_connected(22);
    assert!(first >= 1 << 30 && second >= 1 << 30 && first != second);
    one.write_all(b"one").unwrap();
    assert_eq!(guest.expect((22, first), RW).data, b"one");
    other.write_all(b"other").unwrap();
    assert_eq!(guest.expect((22, second), RW).data, b"other");
    guest.send_data((22, second), b"to the other");
    assert_eq!(read_exactly(&mut other, 12), b"to the other");
    guest.send((22, first), RST);
    assert_eq!(read_all(&mut one), b"");
    guest.driver.stop();
}

#[test]
fn what_comes_after_the_line_belongs_to_the_stream() {
    let mut guest = Guest::new("at-once");
    let mut client = client(&guest.path);
    client.write_all(b"CONNECT 7\nat once").unwrap();
    let host = guest.receive().src.1;
    guest.send((7, host), RESPONSE);
    assert_eq!(guest.expect((7, host), RW).data, b"at once");
    assert_eq!(read_line(&mut client), format!("OK {host}\n"));
    guest.driver.stop();
}

#[test]
fn a_port_of_the_guest_that_nobody_listens_at() {
    let mut guest = Guest::new("refused");
    let mut client = client(&guest.path);
    client.write_all(b"CONNECT 7\n").unwrap();
    let host = guest.receive().src.1;
    guest.send((7, host), RST);
    assert_eq!(read_all(&mut client), b"");
    guest.driver.stop();
}

/// More often than there is room for streams.
#[test]
fn a_program_that_does_not_wait_for_the_guests_answer() {
    let mut guest = Guest::new("hangs-up");
    // Small ones, for which there is room in memory.
    let offer = |guest: &mut Guest| guest.offer(HEADER as u32);
    for _ in 0..300 {
        let mut client = client(&guest.path);
        client.write_all(b"CONNECT 7\n").unwrap();
        offer(&mut guest);
        let request = guest.receive();
        assert_eq!((request.op, request.dst), (REQUEST, (CID.into(), 7)));
        drop(client);
        offer(&mut guest);
        guest.expect((7, request.src.1), RST);
    }
    // Nor for the guest to be asked, which has no buffer meanwhile.
    for _ in 0..300 {
        client(&guest.path).write_all(b"CONNECT 7\n").unwrap();
    }
    let mut client = client(&guest.path);
    client.write_all(b"CONNECT 8\n").unwrap();
    let host = loop {
        offer(&mut guest);
        let packet = guest.receive();
        if packet.dst == (CID.into(), 8) {
            break packet.src.1;
        }
    };
    guest.send((8, host), RESPONSE);
    assert_eq!(read_line(&mut client), format!("OK {host}\n"));
    guest.driver.stop();
}

#[test]
fn programs_that_the_guest_does_not_answer_are_few() {
    let mut guest = Guest::new("unanswered");
    let listening = guest.listen(52);
    let mut clients: Vec<_> = (0..MOST_UNANSWERED + 1).map(|_| client(&guest.path)).collect();
    clients
        .iter_mut()
        .for_each(|client| client.write_all(b"CONNECT 7\n").unwrap());
    let mut asked: Vec<u32> = (0..MOST_UNANSWERED).map(|_| guest.receive().src.1).collect();
    guest.expect_nothing();
    // The guest's own have room.
    guest.send((1000, 52), REQUEST);
    guest.expect((1000, 52), RESPONSE);
    drop(listening.accept());
    guest.expect((1000, 52), SHUTDOWN);
    guest.send((7, asked.remove(0)), RST);
    assert_eq!(guest.receive().op, REQUEST);
    guest.driver.stop();
}

#[test]
fn lines_that_say_no_port() {
    let mut guest = Guest::new("lines");
    for line in [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "GET / HTTP/1.1\n",
        &"x".repeat(100),
    ] {
        let mut client = client(&guest.path);
        // It may be closed before all of it is written.
        let _ = client.write_all(line.as_bytes());
        let end = client.read(&mut [0; 1]);
        assert!(
            matches!(end, Ok(0)) || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "{line}"
        );
    }
    guest.expect_nothing();
    guest.driver.stop();
}

#[test]
fn a_port_of_the_host_that_nobody_listens_at() {
    let mut guest = Guest::new("nobody");
    guest.send((9, 52), REQUEST);
    guest.expect((9, 52), RST);
    guest.driver.stop();
}

#[test]
fn the_guests_room_is_respected() {
    let mut guest = Guest::new("room");
    let listening = guest.listen(1);
    guest.room = 10;
    let mut host = guest.connect((5, 1), &listening);
    host.write_all(b"0123456789abcdefghij").unwrap();
    assert_eq!(guest.expect((5, 1), RW).data, b"0123456789");
    guest.expect((5, 1), CREDIT_REQUEST);
    guest.expect_nothing();
    guest.taken = 4;
    guest.send((5, 1), CREDIT_UPDATE);
    assert_eq!(guest.expect((5, 1), RW).data, b"abcd");
    guest.expect((5, 1), CREDIT_REQUEST);
    (guest.taken, guest.room) = (14, 100);
    guest.send((5, 1), CREDIT_UPDATE);
    assert_eq!(guest.expect((5, 1), RW).data, b"efghij");
    // More was taken than was sent: a guest that lies only harms itself.
    (guest.taken, guest.room) = (1000, 100);
    guest.send((5, 1), CREDIT_UPDATE);
    host.write_all(b"x").unwrap();
    guest.expect((5, 1), CREDIT_REQUEST);
    guest.driver.stop();
}

#[test]
fn the_guest_is_told_of_the_hosts_room() {
    let mut guest = Guest::new("told");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    guest.send((5, 1), CREDIT_REQUEST);
    assert_eq!(guest.expect((5, 1), CREDIT_UPDATE).fwd_cnt, 0);
    guest.send_data((5, 1), &vec![1; BUFFER as usize / 2]);
    assert_eq!(read_exactly(&mut host, BUFFER as usize / 2).len(), BUFFER as usize / 2);
    assert_eq!(guest.expect((5, 1), CREDIT_UPDATE).fwd_cnt, BUFFER / 2);
    guest.driver.stop();
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for() {
    let mut guest = Guest::new("too-much");
    let listening = guest.listen(1);
    let _host = guest.connect((5, 1), &listening);
    // The socket takes some, and then the device's own buffer is full.
    let part = vec![7; 32 << 10];
    for _ in 0..32 {
        guest.send_data((5, 1), &part);
        guest.offer(4096);
    }
    let ops: Vec<u16> = (0..32)
        .map_while(|_| Some(guest.receive().op))
        .take_while(|op| *op != RST)
        .collect();
    assert!(ops.len() < 32 && ops.iter().all(|op| *op == CREDIT_UPDATE), "{ops:?}");
    guest.driver.stop();
}

#[test]
fn data_waits_for_a_host_that_does_not_read() {
    let mut guest = Guest::new("waits");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    let (mut sent, mut told) = (0, 0_u32);
    let mut data = Vec::new();
    // As far as the guest knows that there is room.
    loop {
        let part: Vec<u8> = (0..BUFFER / 4).map(|i| (i / 5 + sent) as u8).collect();
        if sent + part.len() as u32 - told > BUFFER {
            break;
        }
        guest.send_data((5, 1), &part);
        sent += part.len() as u32;
        data.extend(part);
        guest.send((5, 1), CREDIT_REQUEST);
        told = guest.expect((5, 1), CREDIT_UPDATE).fwd_cnt;
    }
    assert!(told > 0 && told < sent);
    guest.shut_down((5, 1), 3);
    guest.expect_nothing();
    assert_eq!(read_all(&mut host), data);
    guest.expect((5, 1), RST);
    guest.driver.stop();
}

#[test]
fn small_buffers_get_parts() {
    let mut guest = Guest::new("parts");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    for len in [10, 44, 50, 100] {
        guest.offer(len);
    }
    host.write_all(b"abcdefghijkl").unwrap();
    for useless in [10, 44] {
        let (_, written) = guest.driver.wait(TO_GUEST);
        assert_eq!((guest.buffers.pop_front().unwrap().1, written), (useless, 0));
    }
    assert_eq!(guest.expect((5, 1), RW).data, b"abcdef");
    assert_eq!(guest.expect((5, 1), RW).data, b"ghijkl");
    guest.driver.stop();
}

#[test]
fn packets_that_make_no_sense() {
    let mut guest = Guest::new("senseless");
    let listening = guest.listen(1);
    let ports = (5, 1);
    // Nothing that the guest can say of a stream that does not exist opens one.
    for op in [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xffff] {
        guest.send(ports, op);
        guest.expect(ports, RST);
    }
    guest.send(ports, RST);
    // Of another guest, to another host, of another kind, and too short for a header.
    let sound = guest.packet(ports, REQUEST);
    let of_another = Packet {
        src: (43, 5),
        ..sound.clone()
    };
    let to_another = Packet {
        dst: (3, 1),
        ..sound.clone()
    };
    let another_kind = Packet {
        kind: 2,
        ..sound.clone()
    };
    guest.driver.put(FROM_GUEST, &of_another.bytes());
    guest.driver.put(FROM_GUEST, &sound.bytes()[..43]);
    guest.expect_nothing();
    guest.driver.put(FROM_GUEST, &to_another.bytes());
    let refused = guest.receive();
    assert_eq!((refused.src, refused.op), ((3, 1), RST));
    guest.driver.put(FROM_GUEST, &another_kind.bytes());
    let refused = guest.receive();
    assert_eq!((refused.kind, refused.op), (2, RST));
    assert!(listening.listener.accept().is_err());

    // In a stream they end it.
    for wrong in [0, REQUEST, RESPONSE, 8] {
        let mut host = guest.connect(ports, &listening);
        guest.send(ports, wrong);
        guest.expect(ports, RST);
        assert_eq!(read_all(&mut host), b"");
    }
    // A length beyond the packet, and one beyond all.
    for len in [100_u32, u32::MAX] {
        let mut host = guest.connect(ports, &listening);
        let mut bytes = guest.packet(ports, RW).bytes();
        bytes[24..28].copy_from_slice(&len.to_le_bytes());
        bytes.extend([1; 50]);
        guest.driver.put(FROM_GUEST, &bytes);
        guest.expect(ports, RST);
        assert_eq!(read_all(&mut host), b"");
    }
    guest.driver.stop();
}

#[test]
fn private_pages() {
    let mut guest = Guest::new("private");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    // A packet for a private buffer goes into the next one.
    guest.driver.skip_to_next_page();
    let private = guest.driver.add(TO_GUEST, &[Part::Write(100)]);
    guest.driver.host.convert(private.gpas[0], State::Private);
    guest.driver.skip_to_next_page();
    guest.offer(100);
    host.write_all(b"whole").unwrap();
    assert_eq!(guest.driver.wait(TO_GUEST), (private.head, 0));
    assert_eq!(guest.expect((5, 1), RW).data, b"whole");
    // Data in a private page are not sent: the stream ends.
    let whole = Packet {
        data: b"secret".to_vec(),
        ..guest.packet((5, 1), RW)
    };
    let bytes = whole.bytes();
    let (header, data) = bytes.split_at(HEADER);
    guest.driver.skip_to_end_of_page();
    let sent = guest.driver.add(FROM_GUEST, &[Part::Read(header), Part::Read(data)]);
    guest.driver.host.convert(sent.gpas[1], State::Private);
    guest.driver.skip_to_next_page();
    guest.offer(100);
    assert_eq!(guest.driver.wait(FROM_GUEST), (sent.head, 0));
    guest.expect((5, 1), RST);
    assert_eq!(read_all(&mut host), b"");
    assert_eq!(guest.driver.host.machine.events().total(), 2);
    guest.driver.stop();
}

#[test]
fn a_guest_has_256_streams_at_most() {
    let mut guest = Guest::new("most");
    let listening = guest.listen(1);
    let mut hosts = Vec::new();
    for port in 0..256 {
        hosts.push(guest.connect((port, 1), &listening));
    }
    guest.send((256, 1), REQUEST);
    guest.expect((256, 1), RST);
    let mut client = client(&guest.path);
    client.write_all(b"CONNECT 7\n").unwrap();
    guest.expect_nothing();
    // One that ends makes room.
    guest.send((0, 1), RST);
    assert_eq!(guest.receive().op, REQUEST);
    guest.driver.stop();
}

#[test]
fn a_reset_and_the_end_close_everything() {
    let mut guest = Guest::new("reset");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    guest.driver.reset();
    assert_eq!(read_all(&mut host), b"");
    guest.driver.stop();
    assert!(guest.path.exists());
    let path = guest.path.clone();
    drop(guest);
    assert!(!path.exists());
}

#[test]
fn streams_outlive_a_run() {
    let mut guest = Guest::new("runs");
    let listening = guest.listen(1);
    let mut host = guest.connect((5, 1), &listening);
    guest.driver.stop();
    host.write_all(b"between").unwrap();
    guest.driver.run();
    assert_eq!(guest.expect((5, 1), RW).data, b"between");
    guest.send_data((5, 1), b"after");
    assert_eq!(read_exactly(&mut host, 5), b"after");
    guest.driver.stop();
}

#[test]
fn context_ids_that_are_no_guests() {
    let path = std::env::temp_dir().join(format!("pagegate-vsock-{}-cid", std::process::id()));
    for cid in [0, 1, 2, u32::MAX] {
        let listener = UnixListener::bind(&path).unwrap();
        assert!(Vsock::new(cid, listener, path.clone()).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
