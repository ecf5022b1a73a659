//! The disk: requests that are right, and those that are not.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use pagegate_core::devices::virtio::block::Block;

use crate::driver::{Host, Virtio};
use crate::random::Random;
use crate::rings::Rings;
use crate::test_devices::{Judge, disk};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;

pub const OK: u8 = 0;
pub const IO_ERROR: u8 = 1;
pub const UNSUPPORTED: u8 = 2;
/// What a driver leaves where the device is to write its status.
pub const UNTOLD: u8 = 0x5a;

/// Where requests have their headers and their status, and data is.
pub const HEADERS: u64 = 0x1_8000;
pub const STATUSES: u64 = 0x1_9000;
pub const DATA: u64 = 0x2_0000;
/// Where there is room for more than a MiB.
const LARGE: u64 = 0x8_0000;

/// A disk's driver.
pub struct Disk<'a> {
    pub host: &'a Host,
    pub device: Virtio<'a>,
    pub rings: Rings<'a>,
    pub requests: std::cell::Cell<u16>,
}

impl<'a> Disk<'a> {
    pub fn new(host: &'a Host) -> Self {
        let device = Virtio::find(host, 1);
        Self {
            host,
            rings: Rings::start(&device, 64),
            device,
            requests: Default::default(),
        }
    }

    /// Writes a request's chain, from descriptor `head` on.
    pub fn put(&self, head: u16, kind: u32, sector: u64, data: &[(u64, u32)]) {
        let (header, told) = (HEADERS + u64::from(head) * 16, STATUSES + u64::from(head));
        let words = [kind.into(), sector];
        self.host.write(header, &words.map(u64::to_le_bytes).concat());
        self.host.write(told, &[UNTOLD]);
        let mut buffers = vec![(header, 16, false)];
        buffers.extend(data.iter().map(|(gpa, len)| (*gpa, *len, kind != OUT)));
        buffers.push((told, 1, true));
        self.rings.chain(head, &buffers);
    }

    /// Writes a request's chain and offers it, without a kick.
    pub fn offer(&self, head: u16, kind: u32, sector: u64, data: &[(u64, u32)]) {
        self.put(head, kind, sector, data);
        self.rings.offer(head);
    }

    /// Offers the request, and returns its status and how many bytes the device says it wrote.
    pub fn run(&self, head: u16) -> (u8, u32) {
        let count = self.requests.get();
        self.rings.offer(head);
        self.device.kick(0);
        self.requests.set(count.wrapping_add(1));
        self.rings.wait(count.wrapping_add(1));
        let (id, written) = self.rings.entry(count);
        assert_eq!(id, u32::from(head));
        (self.told(head), written)
    }

    pub fn told(&self, head: u16) -> u8 {
        self.host.read(STATUSES + u64::from(head), 1)[0]
    }

    pub fn ask(&self, kind: u32, sector: u64, data: &[(u64, u32)]) -> (u8, u32) {
        self.put(0, kind, sector, data);
        self.run(0)
    }
}

#[test]
fn sectors_are_read_and_written() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    assert_eq!(disk.ask(IN, 3, &[(DATA, 1024)]), (OK, 1025));
    assert_eq!(host.read(DATA, 1024), [[3; 512], [4; 512]].concat());
    // In parts that are no sectors, across pages.
    assert_eq!(
        disk.ask(IN, 5, &[(DATA + 4000, 200), (DATA + 9000, 300), (DATA, 12)]),
        (OK, 513)
    );
    assert_eq!(host.read(DATA + 4000, 200), [5; 200]);
    assert_eq!(
        (host.read(DATA + 9000, 300), host.read(DATA, 12)),
        (vec![5; 300], vec![5; 12])
    );
    host.write(DATA, &[0xee; 512]);
    assert_eq!(disk.ask(OUT, 63, &[(DATA, 512)]), (OK, 1));
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 63 * 512).unwrap();
    assert_eq!(sector, [0xee; 512]);
    assert_eq!(disk.ask(FLUSH, 0, &[]), (OK, 1));
    assert!(host.events().is_empty());
}

#[test]
fn each_disk_has_an_id_of_its_own() {
    let ids = |disks: Vec<_>| {
        let host = Host::new(Judge::deny(), disks);
        let disk = Disk::new(&host);
        assert_eq!(disk.ask(GET_ID, 0, &[(DATA, 20)]), (OK, 21));
        let id = host.read(DATA, 20);
        assert_eq!(disk.ask(GET_ID, 0, &[(DATA + 100, 3)]), (OK, 4));
        assert_eq!(host.read(DATA + 100, 5), [&id[..3], &[0; 2]].concat());
        String::from_utf8(id).unwrap()
    };
    let (first, file) = disk(8);
    let first = ids(vec![first]);
    let inode = file.metadata().unwrap().ino();
    assert!(first.ends_with(&format!("{inode:012x}")), "{first}");
    let (other, _other_file) = disk(8);
    assert_ne!(first, ids(vec![other]));
    // The same file as another disk, later.
    assert_eq!(first, ids(vec![Arc::new(Block::new(file, true).unwrap())]));
}

/// More than a driver sends that heeds the disk's limits, so that none keeps a run from ending for long.
#[test]
fn a_request_of_all_that_a_queue_can_name() {
    const PART: u32 = 1 << 20;
    let (device, file) = disk(1);
    file.set_len(1 << 40).unwrap();
    device.config().unwrap();
    let host = Host::new(Judge::deny(), vec![device]);
    let device = Virtio::find(&host, 1);
    let rings = Rings::start(&device, 256);
    for (more, told) in [(0, OK), (512, IO_ERROR)] {
        host.write(HEADERS, &[0; 16]);
        host.write(STATUSES, &[UNTOLD]);
        let mut buffers = vec![(HEADERS, 16, false), (LARGE, PART + more, true)];
        buffers.extend([(LARGE, PART, true); 253]);
        buffers.push((STATUSES, 1, true));
        let before = rings.completed();
        rings.chain(0, &buffers);
        rings.offer(0);
        device.kick(0);
        rings.wait(before + 1);
        assert_eq!(host.read(STATUSES, 1), [told], "{more}");
    }
}

/// Data in parts of any size, in any order.
#[test]
fn data_in_many_parts() {
    let (device, file) = disk(256);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut below = |bound| random.below(bound);
    for turn in 0..300_u64 {
        let sectors = 1 + below(48);
        let (mut left, mut parts) = (sectors * 512, Vec::new());
        while left > 0 {
            let len = if parts.len() == 40 {
                left
            } else {
                1 + below(left.min(5000))
            };
            parts.push(len as u32);
            left -= len;
        }
        // Each in a place of its own, the last one first.
        let places: Vec<_> = (parts.iter().rev())
            .scan(DATA, |next, len| {
                let gpa = *next;
                *next += u64::from(*len) + below(9);
                Some((gpa, *len))
            })
            .collect();
        let places: Vec<_> = places.into_iter().rev().collect();
        let read_back = || places.iter().flat_map(|(gpa, len)| host.read(*gpa, *len as usize));
        let sector = below(256 - sectors);
        let mut on_disk = vec![0; sectors as usize * 512];
        if turn % 2 == 0 {
            file.read_exact_at(&mut on_disk, sector * 512).unwrap();
            assert_eq!(disk.ask(IN, sector, &places), (OK, sectors as u32 * 512 + 1));
        } else {
            places
                .iter()
                .for_each(|(gpa, len)| host.write(*gpa, &vec![turn as u8; *len as usize]));
            assert_eq!(disk.ask(OUT, sector, &places), (OK, 1));
            file.read_exact_at(&mut on_disk, sector * 512).unwrap();
        }
        assert!(read_back().eq(on_disk), "{turn}: {places:x?}");
    }
}

/// 3 MiB, which are copied in several steps, from and to the same half MiB.
#[test]
fn large_requests() {
    const PART: usize = 512 << 10;
    let sectors = 6 * PART as u64 / 512;
    let (device, file) = disk(sectors);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    let parts = [(LARGE, PART as u32); 6];
    assert_eq!(disk.ask(IN, 0, &parts), (OK, 6 * PART as u32 + 1));
    let last = sectors - PART as u64 / 512..sectors;
    let read = host.read(LARGE, PART);
    assert!(
        read.chunks(512)
            .zip(last)
            .all(|(sector, number)| sector == [number as u8; 512])
    );
    host.write(LARGE, &[0xd5; PART]);
    assert_eq!(disk.ask(OUT, 0, &parts), (OK, 1));
    let mut on_disk = vec![0; 6 * PART];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert!(on_disk.iter().all(|byte| *byte == 0xd5));
}

#[test]
fn a_file_that_became_shorter_is_an_error() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    file.set_len(10 * 512 + 100).unwrap();
    assert_eq!(disk.ask(IN, 9, &[(DATA, 512)]), (OK, 513));
    assert_eq!(disk.ask(IN, 9, &[(DATA, 1024)]), (IO_ERROR, 1));
    assert_eq!(disk.ask(IN, 20, &[(DATA, 512)]), (IO_ERROR, 1));
}

#[test]
fn several_requests_are_in_flight() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    for request in 0..16 {
        disk.offer(
            request * 4,
            IN,
            request.into(),
            &[(DATA + u64::from(request) * 512, 512)],
        );
    }
    disk.device.kick(0);
    disk.rings.wait(16);
    let expected: Vec<u8> = (0..16).flat_map(|sector| [sector; 512]).collect();
    assert_eq!(host.read(DATA, 16 * 512), expected);
}

#[test]
fn wrong_requests_fail() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    type Wrong<'a> = (u32, u64, &'a [(u64, u32)]);
    let wrong: [Wrong<'_>; 9] = [
        (IN, 64, &[(DATA, 512)]),
        (IN, 63, &[(DATA, 1024)]),
        (IN, u64::MAX, &[(DATA, 512)]),
        (OUT, u64::MAX / 512 + 1, &[(DATA, 512)]),
        (OUT, 64, &[(DATA, 512)]),
        (IN, 0, &[(DATA, 511)]),
        (OUT, 0, &[(DATA, 513)]),
        (IN, 0, &[(DATA, (1 << 20) + 512)]),
        (OUT, 0, &[(DATA, 1 << 31)]),
    ];
    for (kind, sector, data) in wrong {
        assert_eq!(
            disk.ask(kind, sector, data),
            (IO_ERROR, 1),
            "{kind} {sector:#x} {data:x?}"
        );
    }
    for kind in [2, 3, 5, 11, 13, u32::MAX] {
        assert_eq!(disk.ask(kind, 0, &[(DATA, 512)]), (UNSUPPORTED, 1), "{kind}");
    }
    // No header, or not all of it.
    disk.rings.chain(0, &[(STATUSES, 1, true)]);
    assert_eq!(disk.run(0), (IO_ERROR, 1));
    disk.rings.chain(0, &[(HEADERS, 15, false), (STATUSES, 1, true)]);
    assert_eq!(disk.run(0), (IO_ERROR, 1));
    assert_eq!(disk.ask(IN, 0, &[]), (OK, 1), "no data is what it asked for");
    assert_eq!(file.metadata().unwrap().len(), 64 * 512);
    assert_eq!(disk.ask(IN, 1, &[(DATA, 512)]), (OK, 513), "it goes on");
    assert!(host.events().is_empty());
}

#[test]
fn a_request_that_cannot_be_answered_needs_a_reset() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    // Nothing that the device can write, so the driver would take what was there before for the status.
    disk.rings.chain(0, &[(HEADERS, 16, false), (DATA, 512, false)]);
    disk.rings.offer(0);
    disk.device.kick(0);
    disk.device.wait_until_broken();
    assert_eq!(disk.rings.completed(), 0);
    disk.device.reset();
    host.write(disk.rings.available, &[0; 4096]);
    assert_eq!(Disk::new(&host).device.status(), 0xf);
}
