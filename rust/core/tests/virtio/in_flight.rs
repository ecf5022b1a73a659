//! Pages that are converted while a device works on a request for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pagegate_core::error::Failure;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::listeners::{Change, Listener};

use crate::block::{DATA, Disk, IN, IO_ERROR, OK};
use crate::driver::{Host, PATIENCE, Virtio};
use crate::rings::Rings;
use crate::test_devices::{Gated, Judge, disk};

/// Where the data of the request is, and where the device writes how it went.
const ANSWER: u64 = 0x2_1000;

struct Guest<'a> {
    host: &'a Host,
    device: Virtio<'a>,
    rings: Rings<'a>,
}

/// A request that the device has taken.
fn taken<'a>(host: &'a Host, gated: &Gated) -> Guest<'a> {
    let device = Virtio::find(host, 1);
    let rings = Rings::start(&device, 16);
    rings.chain(0, &[(DATA, 4096, true), (ANSWER, 1, true)]);
    rings.offer(0);
    device.kick(0);
    gated.wait_until_taken(1);
    Guest { host, device, rings }
}

impl Guest<'_> {
    /// How the request went, and whether the data is there.
    fn outcome(&self, gated: &Gated) -> (u8, bool) {
        gated.allow(1);
        self.rings.wait(1);
        let data = self.host.read(DATA, 4096);
        assert!(data == [0; 4096] || data == [Gated::FILL; 4096]);
        (self.host.read(ANSWER, 1)[0], data[0] != 0)
    }
}

fn gated() -> (Arc<Gated>, Host) {
    let gated = Arc::new(Gated::default());
    let host = Host::new(Judge::deny(), vec![gated.clone()]);
    (gated, host)
}

#[test]
fn a_page_that_was_private_for_a_moment_is_not_written() {
    let (gated, host) = gated();
    let guest = taken(&host, &gated);
    host.convert(DATA, State::Private);
    host.convert(DATA, State::Shared);
    // The driver is told so: what tells it was not converted.
    assert_eq!(guest.outcome(&gated), (Gated::FAILED, false));
    let events = host.events();
    assert_eq!(
        (events.len(), events[0].gpa, events[0].state),
        (1, DATA, Some(State::Shared))
    );
    assert_eq!(events[0].device.unwrap().descriptor, Some(0));
    assert_eq!(guest.device.status(), 0xf);
}

#[test]
fn a_page_that_is_private_is_not_written() {
    let (gated, host) = gated();
    let guest = taken(&host, &gated);
    host.hide(DATA, PAGE_SIZE);
    gated.allow(1);
    guest.rings.wait(1);
    assert_eq!(host.read(ANSWER, 1), [Gated::FAILED]);
    assert_eq!(host.events()[0].state, Some(State::Private));
    host.check_hidden(DATA, PAGE_SIZE);
}

#[test]
fn other_pages_do_not_matter() {
    let (gated, host) = gated();
    let guest = taken(&host, &gated);
    for page in [DATA - PAGE_SIZE, DATA + 2 * PAGE_SIZE] {
        host.convert(page, State::Private);
        host.convert(page, State::Shared);
    }
    assert_eq!(guest.outcome(&gated), (Gated::DONE, true));
    assert!(host.events().is_empty());
}

#[test]
fn a_conversion_that_is_refused_takes_nothing_away() {
    struct Refuses;
    impl Listener for Refuses {
        fn prepare(&self, _: &Change) -> Result<bool, Failure> {
            Ok(false)
        }
        fn committed(&self, _: &Change) -> Result<(), Failure> {
            Ok(())
        }
        fn aborted(&self, _: &Change) -> Result<(), Failure> {
            Ok(())
        }
    }
    let (gated, host) = gated();
    let guest = taken(&host, &gated);
    host.machine.add_listener(Arc::new(Refuses)).unwrap();
    assert!(host.machine.convert(DATA, PAGE_SIZE, State::Private).is_err());
    assert_eq!(guest.outcome(&gated), (Gated::DONE, true));
}

#[test]
fn conversions_while_the_disk_is_busy() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    let over = AtomicBool::new(false);
    let (mut done, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = std::time::Instant::now();
            while !over.load(Ordering::SeqCst) && begun.elapsed() < PATIENCE {
                host.convert(DATA + PAGE_SIZE, State::Private);
                host.convert(DATA + PAGE_SIZE, State::Shared);
                std::thread::sleep(std::time::Duration::from_micros(300));
            }
        });
        // Its first and last part are in pages that stay shared.
        for _ in 0..1000 {
            let sector = 1 + done as u64 % 40;
            host.write(DATA, &[0xcc; 4096]);
            disk.put(0, IN, sector, &[(DATA, 3 * 4096)]);
            let told = disk.run(0);
            let right: Vec<u8> = (sector..sector + 8).flat_map(|sector| [sector as u8; 512]).collect();
            match told {
                (OK, 12289) => {
                    assert_eq!(host.read(DATA, 4096), right);
                    done += 1;
                }
                (IO_ERROR, 1) => failed += 1,
                other => panic!("{other:?}"),
            }
        }
        over.store(true, Ordering::SeqCst);
    });
    assert!(done > 0 && failed > 0, "{done} were done, {failed} failed");
    assert!(host.events().iter().all(|event| event.gpa & !0xfff == DATA + PAGE_SIZE));
    assert_eq!(disk.device.status(), 0xf);
}
