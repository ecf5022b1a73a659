//! Rings as no driver writes them. They cost the guest its own device, until it is reset.

use crate::block::{DATA, Disk, HEADERS, IN, IO_ERROR, OK, STATUSES};
use crate::driver::{Host, MEMORY, PAGES, Virtio, wait};
use crate::rings::{AVAILABLE, DESCRIPTORS, INDIRECT, NEXT, Rings, USED, WRITE, descriptor};
use crate::test_devices::{Judge, disk};

fn host() -> Host {
    Host::new(Judge::deny(), vec![disk(64).0])
}

/// Checks that the device needs a reset, does nothing until then, and works after it.
fn breaks(host: &Host, what: &str, make: impl Fn(&Disk<'_>)) {
    let disk = Disk::new(host);
    make(&disk);
    disk.device.kick(0);
    disk.device.wait_until_broken();
    let (completed, events) = (disk.rings.completed(), host.events().len());
    for _ in 0..3 {
        disk.device.kick(0);
    }
    assert_eq!(
        (disk.rings.completed(), host.events().len()),
        (completed, events),
        "{what}"
    );
    disk.device.reset();
    host.write(AVAILABLE, &[0; 4096]);
    host.write(USED, &[0; 4096]);
    let again = Disk::new(host);
    assert_eq!(again.ask(IN, 1, &[(DATA, 512)]), (OK, 513), "{what}");
    again.device.reset();
    host.write(AVAILABLE, &[0; 4096]);
    host.write(USED, &[0; 4096]);
}

#[test]
fn chains_that_make_no_sense() {
    let host = host();
    breaks(&host, "a loop of one", |disk| {
        disk.rings.put(0, HEADERS, 16, NEXT, 0);
        disk.rings.offer(0);
    });
    breaks(&host, "a loop of three", |disk| {
        for index in 0..3 {
            disk.rings.put(index, DATA, 512, NEXT | WRITE, (index + 1) % 3);
        }
        disk.rings.offer(1);
    });
    breaks(&host, "a next past the table", |disk| {
        disk.rings.put(0, HEADERS, 16, NEXT, 64);
        disk.rings.offer(0);
    });
    breaks(&host, "a head past the table", |disk| disk.rings.offer(64));
    breaks(&host, "a head far past the table", |disk| disk.rings.offer(0xffff));
    breaks(&host, "writable before readable", |disk| {
        disk.rings.chain(0, &[(STATUSES, 1, true), (HEADERS, 16, false)]);
        disk.rings.offer(0);
    });
    breaks(&host, "more than 4 GiB", |disk| {
        disk.rings
            .chain(0, &[(0, u32::MAX, true), (0, u32::MAX, true), (0, 512, true)]);
        disk.rings.offer(0);
    });
    assert!(host.events().is_empty(), "nothing of this is about private pages");
}

#[test]
fn indirect_tables_that_make_no_sense() {
    let host = host();
    let table = 0x3_0000;
    let offer = |disk: &Disk<'_>, len: u32, flags: u16| {
        disk.rings.put(0, table, len, flags, 1);
        disk.rings.offer(0);
    };
    let entries = |entries: &[[u8; 16]]| host.write(table, &entries.concat());
    for len in [0, 1, 15, 17, 16 * 0x1_0000, u32::MAX] {
        entries(&[descriptor(DATA, 512, WRITE, 0)]);
        breaks(&host, &format!("{len} bytes"), |disk| offer(disk, len, INDIRECT));
    }
    entries(&[descriptor(table, 16, INDIRECT, 0)]);
    breaks(&host, "nested", |disk| offer(disk, 16, INDIRECT));
    entries(&[descriptor(DATA, 512, NEXT | WRITE, 0)]);
    breaks(&host, "a loop", |disk| offer(disk, 16, INDIRECT));
    let long: Vec<_> = (1..=65).map(|next| descriptor(DATA, 16, NEXT | WRITE, next)).collect();
    entries(&long);
    breaks(&host, "longer than the queue", |disk| offer(disk, 65 * 16, INDIRECT));
    breaks(&host, "past the end of memory", |disk| {
        disk.rings.put(0, MEMORY - 16, 32, INDIRECT, 0);
        host.write(MEMORY - 16, &descriptor(DATA, 16, NEXT | WRITE, 1));
        disk.rings.offer(0);
    });
    // And one that is right.
    let disk = Disk::new(&host);
    disk.put(2, IN, 3, &[(DATA, 512)]);
    let right = [
        descriptor(HEADERS + 32, 16, NEXT, 1),
        descriptor(DATA, 512, NEXT | WRITE, 2),
        descriptor(STATUSES, 1, WRITE, 0),
    ];
    entries(&right);
    offer(&disk, 48, INDIRECT);
    disk.device.kick(0);
    disk.rings.wait(1);
    assert_eq!((disk.told(0), host.read(DATA, 512)), (OK, vec![3; 512]));
}

#[test]
fn the_available_index_runs_away() {
    let host = host();
    for index in [65, 66, 0x8000, 0xffff] {
        breaks(&host, &format!("{index} at first"), |disk| {
            disk.rings.set_available(index)
        });
    }
    breaks(&host, "backwards", |disk| {
        disk.put(0, IN, 0, &[(DATA, 512)]);
        assert_eq!(disk.run(0).0, OK);
        disk.rings.set_available(0);
    });
}

#[test]
fn a_used_index_that_the_driver_changes_is_the_drivers_loss() {
    let host = host();
    let disk = Disk::new(&host);
    for count in 1..=3_u16 {
        disk.put(0, IN, 1, &[(DATA, 512)]);
        disk.rings.offer(0);
        host.write(USED + 2, &0x7777_u16.to_le_bytes());
        disk.device.kick(0);
        disk.rings.wait(count);
    }
    assert_eq!(disk.device.status(), 0xf);
}

#[test]
fn buffers_outside_of_memory_fail_their_request() {
    let host = host();
    let disk = Disk::new(&host);
    let outside = [
        MEMORY - 256,
        MEMORY,
        0xc000_0000,
        0xd000_0000,
        0xfec0_0000,
        1 << 39,
        (1 << 41) - 256,
        u64::MAX - 511,
        u64::MAX - 255,
    ];
    for gpa in outside {
        assert_eq!(disk.ask(IN, 1, &[(gpa, 512)]), (IO_ERROR, 1), "{gpa:#x}");
        assert_eq!(
            disk.ask(IN, 1, &[(DATA, 256), (gpa, 256)]),
            (
                if gpa == MEMORY - 256 { OK } else { IO_ERROR },
                if gpa == MEMORY - 256 { 513 } else { 1 }
            ),
            "{gpa:#x}"
        );
    }
    assert!(host.events().is_empty());
    assert_eq!(
        disk.ask(IN, 1, &[(MEMORY - 512, 512)]),
        (OK, 513),
        "the last bytes of memory"
    );
}

#[test]
fn buffers_without_bytes_are_nothing() {
    let host = host();
    let disk = Disk::new(&host);
    assert_eq!(disk.ask(IN, 1, &[(DATA, 0), (DATA, 512), (u64::MAX, 0)]), (OK, 513));
    assert_eq!(host.read(DATA, 512), [1; 512]);
    disk.rings.chain(0, &[(HEADERS, 16, false), (STATUSES, 0, true)]);
    disk.rings.offer(0);
    disk.device.kick(0);
    disk.device.wait_until_broken();
}

#[test]
fn rings_outside_of_memory() {
    let host = host();
    let outside = [MEMORY, 0xc000_0000, 1 << 41, u64::MAX - 0xfff];
    let places = outside.iter().flat_map(|place| (0..3).map(|part| (part, *place)));
    // With the index in the last bytes of memory, and the entries after it.
    for (part, place) in places.chain([(1, MEMORY - 4), (2, MEMORY - 4)]) {
        let mut at = [DESCRIPTORS, AVAILABLE, USED];
        at[part] = place;
        let device = Virtio::find(&host, 1);
        for available in [AVAILABLE, MEMORY - 4] {
            host.write(available, &[0, 0, 1, 0]);
        }
        host.write(DESCRIPTORS, &descriptor(DATA, 512, WRITE, 0));
        let _rings = Rings::start_at(&device, 64, at);
        device.wait_until_broken();
        device.reset();
    }
    assert!(host.events().is_empty());
}

#[test]
fn rings_that_are_not_aligned_are_not_used() {
    let host = host();
    for places in [
        [DESCRIPTORS + 8, AVAILABLE, USED],
        [DESCRIPTORS, AVAILABLE + 1, USED],
        [DESCRIPTORS, AVAILABLE, USED + 2],
    ] {
        let device = Virtio::find(&host, 1);
        host.write(AVAILABLE, &[0, 0, 1, 0, 0, 0]);
        let _rings = Rings::start_at(&device, 8, places);
        device.kick(0);
        device.reset();
        assert_eq!(host.read(USED, 4096), [0; 4096]);
    }
}

#[test]
fn many_kicks_are_few_turns() {
    let host = host();
    let disk = Disk::new(&host);
    disk.put(0, IN, 1, &[(DATA, 512)]);
    let doorbell = disk.device.doorbell(0);
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    for _ in 0..1 << 12 {
        host.store(doorbell, &[0; 2]);
    }
    assert!(threads() < 200);
    assert_eq!(disk.run(0), (OK, 513));
    assert_eq!(host.fake.doorbells(), [doorbell]);
    wait("nothing more", || disk.rings.completed() == 1);
    assert_eq!(PAGES * 4096, MEMORY);
}
