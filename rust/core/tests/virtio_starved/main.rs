//! Devices whose host side is shut down or has no room: they wait, and use no CPU meanwhile. A process of its own, because
//! limits and the CPU time are a process's.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, dead_code)]

#[path = "../virtio/driver.rs"]
mod driver;
#[path = "../virtio_devices/requests.rs"]
mod requests;
#[path = "../virtio/rings.rs"]
mod rings;
#[path = "../virtio_devices/vsock_guest.rs"]
mod vsock_guest;

use std::fs::File;
use std::io::Write;
use std::net::{Shutdown, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::net::Net;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use requests::{Driver, PATIENCE, Part};
use vsock_guest::{Guest, REQUEST, client};

const RECEIVE: usize = 0;
const SEND: usize = 1;
/// How long it is looked on, and the CPU time that may take.
const WATCHED: Duration = Duration::from_millis(500);
const IDLE: Duration = Duration::from_millis(100);

/// One test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The CPU time that this process uses while this thread sleeps.
fn cpu_time_of_a_while() -> Duration {
    let before = cpu_time();
    std::thread::sleep(WATCHED);
    cpu_time() - before
}

/// A card whose driver has given it buffers, and the card itself.
fn card(link: impl Into<OwnedFd>) -> (Driver, Arc<Net>) {
    let net = Arc::new(Net::new(link.into(), None).unwrap());
    let mut driver = Driver::new(net.clone());
    for _ in 0..4 {
        driver.send(RECEIVE, &[Part::Write(2048)]);
    }
    (driver, net)
}

fn wait_for_down(net: &Net) {
    let begun = Instant::now();
    while net.config().unwrap()[6] == 1 {
        assert!(begun.elapsed() < PATIENCE, "the link is still up");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_card_whose_socket_is_shut_down_waits_for_nothing_more() {
    let _alone = alone();
    for how in [Shutdown::Read, Shutdown::Both] {
        let (host, link) = UnixDatagram::pair().unwrap();
        let ours = link.try_clone().unwrap();
        let (mut driver, net) = card(link);
        assert_eq!(net.config().unwrap()[6], 1);
        host.send(&[1; 100]).unwrap();
        let (_, written) = driver.wait(RECEIVE);
        assert_eq!(written, 112, "a frame that came before");
        ours.shutdown(how).unwrap();
        wait_for_down(&net);
        let used = cpu_time_of_a_while();
        assert!(used < IDLE, "{how:?}: {used:?}");
        // The guest can still send, and is not heard where that is shut down, too.
        driver.put(SEND, &[0; 112]);
        driver.stop();
        driver.run();
        let used = cpu_time_of_a_while();
        assert!(used < IDLE, "in the next run, {how:?}: {used:?}");
        driver.stop();
    }
}

#[test]
fn an_empty_datagram_and_a_peer_that_has_closed_are_no_end() {
    let _alone = alone();
    let (one, other) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    one.connect(other.local_addr().unwrap()).unwrap();
    other.connect(one.local_addr().unwrap()).unwrap();
    let (mut driver, net) = card(one);
    other.send(&[]).unwrap();
    other.send(&[2; 60]).unwrap();
    assert_eq!(driver.wait(RECEIVE).1, 72);
    assert_eq!(net.config().unwrap()[6], 1);
    driver.stop();

    let (host, link) = UnixDatagram::pair().unwrap();
    let (mut driver, _net) = card(link);
    drop(host);
    driver.put(SEND, &[0; 112]);
    let used = cpu_time_of_a_while();
    assert!(used < IDLE, "{used:?}");
    driver.stop();
}

/// Has this process open no more descriptors until it is dropped.
struct Crowded(Rlimit);

impl Crowded {
    fn new() -> Self {
        let before = getrlimit(Resource::Nofile);
        // The lowest number that is free is the first that is not given any more.
        let lowest = File::open("/dev/null").unwrap();
        let current = Some(std::os::fd::AsRawFd::as_raw_fd(&lowest) as u64);
        drop(lowest);
        setrlimit(Resource::Nofile, Rlimit { current, ..before }).unwrap();
        Self(before)
    }
}

impl Drop for Crowded {
    fn drop(&mut self) {
        setrlimit(Resource::Nofile, self.0).unwrap();
    }
}

#[test]
fn a_program_that_finds_no_room_is_accepted_when_there_is_some() {
    let _alone = alone();
    let mut guest = Guest::new("crowded");
    let mut client = client(&guest.path);
    client.write_all(b"CONNECT 7\n").unwrap();
    let request = guest.receive();
    assert_eq!(request.op, REQUEST);
    // Made here, while there is room for them; only the device's end is missing.
    let crowded = {
        let waiting = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        );
        let waiting = waiting.unwrap();
        let crowded = Crowded::new();
        let address = rustix::net::SocketAddrUnix::new(&guest.path).unwrap();
        rustix::net::connect(&waiting, &address).unwrap();
        rustix::io::write(&waiting, b"CONNECT 8\n").unwrap();
        let used = cpu_time_of_a_while();
        assert!(used < IDLE, "{used:?}");
        (waiting, crowded)
    };
    let (waiting, limit) = crowded;
    drop(limit);
    // No stream ends, and the guest says nothing.
    let request = guest.receive();
    assert_eq!((request.op, request.dst.1), (REQUEST, 8));
    drop(waiting);
    guest.driver.stop();
}
