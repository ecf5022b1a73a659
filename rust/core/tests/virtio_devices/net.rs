//! The network card: at a socket, and at a tap where the test may make one.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::net::{Net, duplicate, open_tap, parse_address};
use pagegate_core::error::Error;
use pagegate_core::memory::address::State;

use crate::requests::{A_WHILE, Driver, PATIENCE, Part, Sent};

const RECEIVE: usize = 0;
const SEND: usize = 1;
const HEADER: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const ADDRESS: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const FRAME: usize = 1514;

fn card(link: impl Into<OwnedFd>) -> Driver {
    Driver::new(Arc::new(Net::new(link.into(), Some(ADDRESS)).unwrap()))
}

/// A card, and the program of the host at the other end of its socket.
fn network() -> (UnixDatagram, Driver) {
    let (host, link) = UnixDatagram::pair().unwrap();
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    (host, card(link))
}

fn frame(number: u8) -> Vec<u8> {
    (0..100).map(|i| i ^ number).collect()
}

fn packet(frame: &[u8]) -> Vec<u8> {
    [&HEADER, frame].concat()
}

/// The frame in the next buffer, which has to be this one.
fn receive(driver: &mut Driver, buffer: &Sent) -> Vec<u8> {
    let (head, written) = driver.wait(RECEIVE);
    assert_eq!(head, buffer.head);
    let packet = driver.read(buffer.gpas[0], written);
    let (header, frame) = packet.split_at(HEADER.len());
    assert_eq!(header, HEADER);
    frame.to_vec()
}

fn next_frame(host: &UnixDatagram) -> Vec<u8> {
    let mut bytes = vec![0; 128 << 10];
    let count = host.recv(&mut bytes).unwrap();
    bytes.truncate(count);
    bytes
}

#[test]
fn its_address() {
    let config = |mac| {
        let (_host, link) = UnixDatagram::pair().unwrap();
        let net = Net::new(link.into(), mac)?;
        let bytes = net.config().unwrap();
        assert_eq!(bytes[..6], net.mac());
        assert_eq!(bytes[6..], [1, 0, 0, 0, 0, 0], "the link is up");
        assert_eq!(net.features(), 1 << 5 | 1 << 16);
        Ok::<_, Error>(net.mac())
    };
    assert_eq!(config(Some(ADDRESS)).unwrap(), ADDRESS);
    let (one, other) = (config(None).unwrap(), config(None).unwrap());
    assert_ne!(one, other);
    assert_eq!([one[0] & 3, other[0] & 3], [2, 2]);
    assert!(config(Some([0; 6])).is_err());
    assert!(config(Some([1, 0, 0, 0, 0, 1])).is_err());
    assert_eq!(parse_address("52:54:00:12:34:56"), Some(ADDRESS));
    for wrong in [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "52:54:0:12:34:56",
        "+2:54:00:12:34:56",
        "525400123456",
    ] {
        assert_eq!(parse_address(wrong), None, "{wrong}");
    }
}

#[test]
fn what_is_no_link() {
    let (_host, stream) = UnixStream::pair().unwrap();
    assert!(Net::new(stream.into(), None).is_err());
    assert!(duplicate(-1).is_err());
    assert!(duplicate(1 << 20).is_err());
    let (_host, link) = UnixDatagram::pair().unwrap();
    assert_ne!(duplicate(link.as_raw_fd()).unwrap().as_raw_fd(), link.as_raw_fd());
    assert_eq!(open_tap("pagegate-none", false).unwrap_err().0, libc::ENODEV);
    for path in ["/dev/null", "/dev/net/tun", "/proc/self/exe"] {
        let Ok(file) = std::fs::File::open(path) else {
            continue;
        };
        let refused = Net::new(file.into(), None).map(drop);
        assert!(
            matches!(&refused, Err(Error::Invalid(why)) if why.contains("no queue of a tap")),
            "{path}: {refused:?}"
        );
    }
    for name in ["", "a name that is too long", "with\0zero"] {
        assert_eq!(open_tap(name, true).unwrap_err().0, libc::EINVAL, "{name}");
    }
}

#[test]
fn frames_come_in_order_as_there_are_buffers() {
    let (host, mut driver) = network();
    for number in 0..5 {
        host.send(&frame(number)).unwrap();
    }
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.completed(RECEIVE), None);
    for number in 0..5 {
        let buffer = driver.send(RECEIVE, &[Part::Write(FRAME as u32 + 12)]);
        assert_eq!(receive(&mut driver, &buffer), frame(number));
    }
    let buffer = driver.send(RECEIVE, &[Part::Write(FRAME as u32 + 12)]);
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.completed(RECEIVE), None);
    host.send(&frame(9)).unwrap();
    assert_eq!(receive(&mut driver, &buffer), frame(9));
    driver.stop();
}

#[test]
fn frames_go_without_their_headers() {
    let (host, mut driver) = network();
    driver.put(SEND, &packet(&frame(1)));
    assert_eq!(next_frame(&host), frame(1));
    // A header that wants what was not offered, in a buffer of its own.
    let sent = driver.send(
        SEND,
        &[
            Part::Read(&[0xff; 12]),
            Part::Read(&frame(2)[..50]),
            Part::Read(&frame(2)[50..]),
        ],
    );
    assert_eq!(driver.wait(SEND), (sent.head, 0));
    assert_eq!(next_frame(&host), frame(2));
    driver.stop();
}

#[test]
fn packets_that_are_no_frames_are_lost() {
    let (host, mut driver) = network();
    for len in [0, 1, 11, 12] {
        driver.put(SEND, &vec![0; len]);
    }
    driver.put(SEND, &packet(&vec![7; 64 << 10]));
    let wrong = driver.send(SEND, &[Part::Write(100)]);
    assert_eq!(driver.wait(SEND), (wrong.head, 0));
    let whole = packet(&frame(3));
    driver.skip_to_end_of_page();
    let private = driver.add(SEND, &[Part::Read(&whole[..12]), Part::Read(&whole[12..])]);
    driver.host.convert(private.gpas[1], State::Private);
    driver.skip_to_next_page();
    driver.kick();
    assert_eq!(driver.wait(SEND), (private.head, 0));
    assert_eq!(driver.host.machine.events().total(), 1);
    driver.put(SEND, &packet(&frame(4)));
    assert_eq!(next_frame(&host), frame(4));
    driver.stop();
}

#[test]
fn frames_without_a_sound_buffer_are_lost() {
    let (host, mut driver) = network();
    host.send(&[]).unwrap();
    host.send(&vec![7; 64 << 10]).unwrap();
    host.send(&frame(1)).unwrap();
    let small = driver.send(RECEIVE, &[Part::Write(50)]);
    assert_eq!(driver.wait(RECEIVE), (small.head, 0));
    driver.skip_to_next_page();
    let private = driver.add(RECEIVE, &[Part::Write(2000)]);
    driver.host.convert(private.gpas[0], State::Private);
    driver.skip_to_next_page();
    let sound = driver.send(RECEIVE, &[Part::Write(2000)]);
    host.send(&frame(2)).unwrap();
    host.send(&frame(3)).unwrap();
    assert_eq!(driver.wait(RECEIVE), (private.head, 0));
    assert_eq!(receive(&mut driver, &sound), frame(3));
    driver.stop();
}

#[test]
fn a_host_that_does_not_read_loses_frames_and_the_guest_goes_on() {
    let (host, mut driver) = network();
    for number in 0..200 {
        driver.put(SEND, &packet(&vec![number; 5000]));
    }
    let mut count = 0;
    host.set_nonblocking(true).unwrap();
    while host.recv(&mut [0; 5000]).is_ok() {
        count += 1;
    }
    assert!(0 < count && count < 200, "{count}");
    // Nor does one that is gone hold it up.
    drop(host);
    driver.send(RECEIVE, &[Part::Write(2000)]);
    driver.put(SEND, &packet(&frame(1)));
    assert_eq!(driver.stop().reason, "stopped");
}

#[test]
fn a_reset_drops_the_frame_that_waits() {
    let (host, mut driver) = network();
    host.send(&frame(1)).unwrap();
    std::thread::sleep(A_WHILE);
    driver.reset();
    std::thread::sleep(A_WHILE);
    driver.stop();
    assert_eq!(driver.completed(RECEIVE), None);
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// A tap with the address 10.213.N.1, unless this user may not make one.
fn tap(n: u8) -> Option<(String, OwnedFd)> {
    let name = format!("pg{}", std::process::id() % 1_000_000 * 10 + u32::from(n));
    let tap = match open_tap(&name, true) {
        Ok(tap) if Command::new("ip").arg("-V").status().is_ok() => tap,
        Ok(_) => return None,
        Err(errno) if [libc::EPERM, libc::ENOENT, libc::EACCES].contains(&errno.0) => return None,
        Err(errno) => panic!("{errno}"),
    };
    ip(&format!("address add 10.213.{n}.1/24 dev {name}"));
    ip(&format!("link set {name} up"));
    Some((name, tap))
}

/// The next frame of this type.
fn receive_kind(driver: &mut Driver, kind: [u8; 2]) -> Vec<u8> {
    loop {
        let buffer = driver.send(RECEIVE, &[Part::Write(FRAME as u32 + 12)]);
        let frame = receive(driver, &buffer);
        if frame[12..14] == kind {
            return frame;
        }
    }
}

#[test]
fn the_hosts_kernel_talks_to_the_guest_over_a_tap() {
    let Some((_, tap)) = tap(1) else {
        eprintln!("not tested: no tap can be made here");
        return;
    };
    let mut driver = card(tap);
    let socket = UdpSocket::bind("10.213.1.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.send_to(b"question", "10.213.1.2:7").unwrap();
    // Who has 10.213.1.2?
    let ask = receive_kind(&mut driver, [8, 6]);
    assert_eq!(ask[38..42], [10, 213, 1, 2]);
    let reply = [
        &ask[6..12],
        &ADDRESS,
        &ask[12..20],
        &[0, 2],
        &ADDRESS,
        &[10, 213, 1, 2],
        &ask[22..32],
    ]
    .concat();
    driver.put(SEND, &packet(&reply));
    let question = receive_kind(&mut driver, [8, 0]);
    assert_eq!(question[..6], ADDRESS);
    assert_eq!(question[42..50], *b"question");
    // The same, with the addresses and the ports changed round. Without a checksum of its own, and that of IP's header is
    // a sum.
    let answer = [
        &question[6..12],
        &question[..6],
        &question[12..26],
        &question[30..34],
        &question[26..30],
        &question[36..38],
        &question[34..36],
        &question[38..40],
        &[0, 0],
        b"answers!",
    ]
    .concat();
    driver.put(SEND, &packet(&answer));
    let mut bytes = [0; 100];
    assert_eq!(socket.recv(&mut bytes).unwrap(), 8);
    assert_eq!(&bytes[..8], b"answers!");
    driver.stop();
}

#[test]
fn a_tap_that_is_deleted_ends_the_run() {
    let Some((name, tap)) = tap(2) else {
        eprintln!("not tested: no tap can be made here");
        return;
    };
    let mut driver = card(tap);
    driver.put(SEND, &packet(&frame(1)));
    ip(&format!("link delete {name}"));
    // It may not look at its tap before, since it has a frame that there is no buffer for.
    driver.send(SEND, &[Part::Read(&packet(&frame(1)))]);
    let ended = driver.ended();
    assert!(
        matches!(&ended, Err(Error::Device { device, .. }) if &**device == "first"),
        "{ended:?}"
    );
}
