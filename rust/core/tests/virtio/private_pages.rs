//! Private pages: no byte of one is read or written, and each access has an event that says who wanted what.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use pagegate_core::error::Error;
use pagegate_core::events::event::{ByDevice, Outcome};
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::decision::Decision;

use crate::block::{DATA, Disk, HEADERS, IN, IO_ERROR, OK, OUT, STATUSES, UNTOLD};
use crate::driver::{BIT, Host, SECRET, Virtio};
use crate::rings::{AVAILABLE, DESCRIPTORS, INDIRECT, NEXT, Rings, USED, USUAL_PLACE, WRITE, descriptor};
use crate::test_devices::{Judge, disk};

/// What the only event says: the queue's descriptor, the place, the size, and whether it was to write.
fn only_event(host: &Host) -> (Option<u16>, u64, u64, bool) {
    let events = host.events();
    let [event] = &events[..] else {
        panic!("{events:#x?}");
    };
    assert_eq!((event.outcome, event.errno), (Outcome::Denied, libc::EACCES));
    let device = event.device.unwrap();
    assert_eq!((device.number, device.queue), (1, 0));
    (device.descriptor, event.gpa, event.size, device.write)
}

#[test]
fn the_buffers_of_a_request() {
    // What is private, how the request is asked, and what the event says.
    let cases: [(u32, u64, (u64, u64)); 6] = [
        (IN, DATA, (DATA, 512)),
        (OUT, DATA, (DATA, 512)),
        // The end of it only.
        (IN, DATA + PAGE_SIZE - 256, (DATA + PAGE_SIZE, 256)),
        (OUT, DATA + PAGE_SIZE - 256, (DATA + PAGE_SIZE, 256)),
        // Through the private view: the page itself is shared.
        (IN, 1 << BIT | (DATA + 2 * PAGE_SIZE), (DATA + 2 * PAGE_SIZE, 512)),
        (OUT, 1 << BIT | (DATA + 2 * PAGE_SIZE), (DATA + 2 * PAGE_SIZE, 512)),
    ];
    for (kind, gpa, (first, size)) in cases {
        let (device, file) = disk(64);
        let host = Host::new(Judge::deny(), vec![device]);
        let disk = Disk::new(&host);
        let hidden = if first == DATA + 2 * PAGE_SIZE {
            DATA + 3 * PAGE_SIZE
        } else {
            first & !(PAGE_SIZE - 1)
        };
        host.hide(hidden, PAGE_SIZE);
        disk.put(4, kind, 7, &[(gpa, 512)]);
        assert_eq!(disk.run(4), (IO_ERROR, 1), "{kind} {gpa:#x}");
        assert_eq!(only_event(&host), (Some(4), first, size, kind == IN));
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, 7 * 512).unwrap();
        assert_eq!(sector, [7; 512], "nothing was written to the disk");
        host.check_hidden(hidden, PAGE_SIZE);
        assert_eq!(disk.ask(IN, 1, &[(DATA, 512)]), (OK, 513), "it goes on");
    }
}

#[test]
fn the_header_and_the_status() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    disk.put(0, IN, 1, &[(DATA, 512)]);
    disk.rings.put(0, 0x5_0000, 16, NEXT, 1);
    host.hide(0x5_0000, PAGE_SIZE);
    assert_eq!(disk.run(0), (IO_ERROR, 1));
    assert_eq!(only_event(&host), (Some(0), 0x5_0000, 16, false));
    // Where the status cannot be written, nothing else tells the driver.
    disk.put(0, IN, 1, &[(DATA, 512)]);
    disk.rings.put(2, 0x5_0fff, 1, WRITE, 0);
    disk.rings.offer(0);
    disk.device.kick(0);
    disk.device.wait_until_broken();
    assert_eq!((disk.rings.completed(), disk.told(0)), (1, UNTOLD));
    assert_eq!(host.events()[1].gpa, 0x5_0fff);
    host.check_hidden(0x5_0000, PAGE_SIZE);
}

#[test]
fn an_indirect_table() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    let table = 0x5_0000;
    // The second entry is in a private page.
    host.hide(table, PAGE_SIZE);
    host.write(table - 16, &descriptor(HEADERS, 16, NEXT, 1));
    host.write(table, &descriptor(DATA, 512, WRITE, 0));
    disk.rings.put(3, table - 16, 32, INDIRECT, 0);
    disk.rings.offer(3);
    disk.device.kick(0);
    disk.device.wait_until_broken();
    assert_eq!(only_event(&host), (Some(3), table, 16, false));
    assert_eq!((disk.rings.completed(), host.read(DATA, 512)), (0, vec![0; 512]));
}

/// A disk whose rings are where the test wants them, with one request that is not available yet.
fn with_rings(host: &Host, places: [u64; 3]) -> (Virtio<'_>, Rings<'_>) {
    let disk = Disk::new(host);
    disk.device.reset();
    let disk = Disk {
        rings: Rings::start_in(&disk.device, 64, places),
        ..disk
    };
    // Its first turn is over: it does not look for requests until the doorbell is rung.
    std::thread::sleep(Duration::from_millis(100));
    disk.put(0, IN, 1, &[(DATA, 512)]);
    (disk.device, disk.rings)
}

#[test]
fn rings_that_become_private() {
    for (part, place) in USUAL_PLACE.iter().enumerate() {
        let host = Host::new(Judge::deny(), vec![disk(64).0]);
        let (device, rings) = with_rings(&host, USUAL_PLACE);
        let doorbell = device.doorbell(0);
        host.hide(*place, PAGE_SIZE);
        if *place != AVAILABLE {
            rings.set_available(1);
        }
        host.store(doorbell, &[0; 2]);
        device.wait_until_broken();
        let (descriptor, gpa, _, write) = only_event(&host);
        assert_eq!((gpa & !(PAGE_SIZE - 1), write), (*place, *place == USED), "part {part}");
        assert_eq!(descriptor, (*place == DESCRIPTORS).then_some(0));
        for _ in 0..3 {
            host.store(doorbell, &[0; 2]);
        }
        assert_eq!(host.events().len(), 1, "it is not asked again and again");
        host.check_hidden(*place, PAGE_SIZE);
    }
}

#[test]
fn rings_in_both_kinds_of_pages() {
    // The index is in a shared page, and the entries after it in a private one.
    for places in [
        [DESCRIPTORS, 0x5_0000 - 4, USED],
        [DESCRIPTORS, AVAILABLE, 0x5_0000 - 4],
    ] {
        let host = Host::new(Judge::deny(), vec![disk(64).0]);
        let (device, rings) = with_rings(&host, places);
        let doorbell = device.doorbell(0);
        host.hide(0x5_0000, PAGE_SIZE);
        rings.set_available(1);
        host.store(doorbell, &[0; 2]);
        device.wait_until_broken();
        assert_eq!(only_event(&host).1, 0x5_0000);
        assert_eq!(rings.completed(), 0);
        host.check_hidden(0x5_0000, PAGE_SIZE);
    }
}

#[test]
fn rings_through_the_private_view() {
    for part in 0..3 {
        let host = Host::new(Judge::deny(), vec![disk(64).0]);
        let mut places = USUAL_PLACE;
        places[part] |= 1 << BIT;
        let device = Virtio::find(&host, 1);
        host.write(AVAILABLE, &[0, 0, 1, 0, 0, 0]);
        host.write(DESCRIPTORS, &descriptor(DATA, 512, WRITE, 0));
        device.negotiate(crate::driver::USUAL);
        device.set_up(0, 64, places);
        device.drive();
        device.wait_until_broken();
        assert_eq!(only_event(&host).1 & !(PAGE_SIZE - 1), USUAL_PLACE[part]);
        // After the flags, by which the driver is told not to notify.
        assert_eq!(host.read(USED + 2, 4094), [0; 4094]);
    }
}

#[test]
fn a_policy_that_stops_ends_the_run_with_its_reason() {
    let judge = Judge::new(|access| Ok(Decision::Stop(format!("{access}"))));
    let mut host = Host::new(judge.clone(), vec![disk(64).0]);
    host.hide(DATA, PAGE_SIZE);
    {
        let disk = Disk::new(&host);
        let doorbell = disk.device.doorbell(0);
        // Those that are under way at the same time ask, too; no other is begun.
        for request in [0, 4, 8] {
            disk.put(request, OUT, 1, &[(DATA + 16, 512)]);
            disk.rings.offer(request);
        }
        host.last_store(doorbell, &[0; 2]);
    }
    let reason = |descriptor: u16| {
        format!(
            "device first (00:01.0), queue 0, descriptor {descriptor}: read of 512 bytes at gpa {:#x}, which is private",
            DATA + 16
        )
    };
    let mut runs = 0;
    while judge.asked.lock().len() < 3 {
        // A next run goes on with those that were left.
        if runs > 0 {
            host.begin();
        }
        let ended = host.over().unwrap().reason;
        assert!([0, 4, 8].map(reason).contains(&ended), "{ended}");
        runs += 1;
    }
    assert!(host.events().iter().all(|event| event.outcome == Outcome::Stopped));
    let asked = judge.asked.lock();
    let mut descriptors: Vec<_> = asked.iter().map(|access| access.descriptor).collect();
    descriptors.sort_unstable();
    assert_eq!(descriptors, [Some(0), Some(4), Some(8)]);
    for access in asked.iter() {
        assert_eq!(
            (&*access.device, access.number, access.state),
            ("first", 1, State::Private)
        );
    }
}

#[test]
fn a_policy_that_fails_ends_the_run_with_its_failure() {
    let judges = [
        Judge::new(|_| Err("no".into())),
        Judge::new(|_| Ok(Decision::as_asked())),
        Judge::new(|_| Ok(Decision::Retry)),
    ];
    for (judge, said) in judges.into_iter().zip(["no", "Deny or Stop", "Deny or Stop"]) {
        let mut host = Host::new(judge, vec![disk(64).0]);
        host.hide(DATA, PAGE_SIZE);
        {
            let disk = Disk::new(&host);
            let doorbell = disk.device.doorbell(0);
            disk.put(0, IN, 1, &[(DATA, 512)]);
            disk.rings.offer(0);
            host.last_store(doorbell, &[0; 2]);
        }
        match host.over() {
            Err(error @ Error::DeviceHook { .. }) => {
                let error = error.to_string();
                assert!(
                    error.contains("device first (00:01.0)") && error.contains(said),
                    "{error}"
                );
            }
            other => panic!("{other:?}"),
        }
        let by = ByDevice {
            number: 1,
            queue: 0,
            descriptor: Some(0),
            write: true,
        };
        assert_eq!(
            (host.events()[0].device, host.events()[0].outcome),
            (Some(by), Outcome::Failed)
        );
        host.check_hidden(DATA, PAGE_SIZE);
    }
}

#[test]
fn many_accesses_keep_the_last_events() {
    let judge = Judge::deny();
    let host = Host::new(judge.clone(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    host.hide(DATA, PAGE_SIZE);
    disk.put(0, OUT, 1, &[(DATA, 512)]);
    for turn in 1..=40 {
        (0..64).for_each(|_| disk.rings.offer(0));
        disk.device.kick(0);
        disk.rings.wait(turn * 64);
    }
    assert_eq!(judge.asked.lock().len(), 40 * 64);
    assert_eq!(host.events().len(), 1000);
    assert_eq!(host.read(STATUSES, 1), [IO_ERROR]);
    assert_eq!(host.read(DATA, 1), [SECRET]);
}
