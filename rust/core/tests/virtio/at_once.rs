//! A disk's requests, of which several are carried out at a time.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use pagegate_core::error::Failure;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::listeners::{Change, Listener};
use parking_lot::{Condvar, Mutex};

use crate::block::{DATA, Disk, FLUSH, IN, OK, OUT};
use crate::driver::{Host, PATIENCE, Virtio, wait};
use crate::random::Random;
use crate::rings::{AVAILABLE, USED};
use crate::test_devices::{Judge, disk};

/// Requests that a disk carries out at a time.
const AT_ONCE: u16 = 8;
/// A page that a request waits for.
const HELD: u64 = DATA + 16 * PAGE_SIZE;

/// Holds a page for as long as the test wants, and refuses its conversion then.
#[derive(Default)]
struct Holds {
    /// Whether a page is held, and whether it is to be let go.
    now: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Listener for Holds {
    fn prepare(&self, _: &Change) -> Result<bool, Failure> {
        let mut now = self.now.lock();
        now.0 = true;
        self.changed.notify_all();
        self.changed.wait_while_for(&mut now, |now| !now.1, PATIENCE);
        Ok(false)
    }

    fn committed(&self, _: &Change) -> Result<(), Failure> {
        Ok(())
    }

    fn aborted(&self, _: &Change) -> Result<(), Failure> {
        Ok(())
    }
}

/// Runs `body` while [`HELD`] is held, until it says to let it go.
fn while_held(host: &Host, body: impl FnOnce(&dyn Fn())) {
    let holds = Arc::new(Holds::default());
    host.machine.add_listener(holds.clone()).unwrap();
    std::thread::scope(|scope| {
        let machine = &host.machine;
        scope.spawn(|| machine.convert(HELD, PAGE_SIZE, State::Private).unwrap_err());
        wait("the page is held", || holds.now.lock().0);
        let let_go = || {
            holds.now.lock().1 = true;
            holds.changed.notify_all();
        };
        body(&let_go);
        let_go();
    });
}

#[test]
fn one_that_waits_does_not_hold_up_others() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    while_held(&host, |let_go| {
        disk.offer(0, IN, 1, &[(HELD, 512)]);
        disk.device.kick(0);
        for (count, kind) in (1..).zip([IN, OUT, FLUSH, IN]) {
            let data: &[_] = if kind == FLUSH { &[] } else { &[(DATA, 512)] };
            disk.offer(4, kind, 2, data);
            disk.device.kick(0);
            disk.rings.wait(count);
            assert_eq!((disk.rings.entry(count - 1).0, disk.told(4)), (4, OK));
        }
        let_go();
        disk.rings.wait(5);
    });
    assert_eq!((disk.rings.entry(4), disk.told(0)), ((0, 513), OK));
    assert_eq!(host.read(HELD, 512), [1; 512]);
}

#[test]
fn the_others_wait_once_as_many_are_under_way() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    while_held(&host, |let_go| {
        for request in 0..AT_ONCE {
            disk.offer(request * 4, IN, request.into(), &[(HELD + u64::from(request) * 8, 512)]);
        }
        disk.offer(60, IN, 9, &[(DATA, 512)]);
        disk.device.kick(0);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(disk.rings.completed(), 0);
        let_go();
        disk.rings.wait(AT_ONCE + 1);
    });
    assert_eq!(host.read(DATA, 512), [9; 512]);
}

#[test]
fn a_reset_waits_for_those_under_way() {
    let host = Host::new(Judge::deny(), vec![disk(64).0]);
    let disk = Disk::new(&host);
    while_held(&host, |let_go| {
        for head in [0, 4] {
            disk.offer(head, IN, 1, &[(HELD, 512)]);
        }
        disk.device.kick(0);
        std::thread::sleep(Duration::from_millis(20));
        disk.device.set_status(0);
        for _ in 0..10 {
            assert_ne!(disk.device.status(), 0, "it still works on requests");
        }
        let_go();
        wait("the status reads 0", || disk.device.status() == 0);
        host.write(HELD, &[0; 512]);
    });
    assert_eq!(host.read(HELD, 512), [0; 512]);
    host.write(AVAILABLE, &[0; 4096]);
    host.write(USED, &[0; 4096]);
    assert_eq!(Disk::new(&host).ask(IN, 3, &[(HELD, 512)]), (OK, 513));
}

#[test]
fn the_end_of_a_run_waits_for_those_under_way() {
    let mut host = Host::new(Judge::deny(), vec![disk(64).0]);
    let machine = host.machine.clone();
    while_held(&host, |let_go| {
        let disk = Disk::new(&host);
        disk.offer(0, IN, 1, &[(HELD, 512)]);
        disk.device.kick(0);
        std::thread::sleep(Duration::from_millis(20));
        machine.stop();
        std::thread::sleep(Duration::from_millis(20));
        assert!(machine.running());
        let_go();
    });
    assert_eq!(host.over().unwrap().reason, "stopped");
    // Its driver is told so in the next run.
    assert_eq!(
        (host.read(HELD, 512), host.read(USED + 2, 2)),
        (vec![1; 512], vec![1, 0])
    );
    host.begin();
    assert_eq!(Virtio::find(&host, 1).status(), 0xf);
}

#[test]
fn those_that_had_no_room_are_carried_out_in_the_next_run() {
    let mut host = Host::new(Judge::deny(), vec![disk(64).0]);
    let machine = host.machine.clone();
    let more = AT_ONCE + 2;
    while_held(&host, |let_go| {
        let disk = Disk::new(&host);
        for request in 0..more {
            disk.offer(request * 4, IN, request.into(), &[(HELD + u64::from(request) * 8, 512)]);
        }
        disk.device.kick(0);
        std::thread::sleep(Duration::from_millis(50));
        machine.stop();
        std::thread::sleep(Duration::from_millis(20));
        let_go();
    });
    assert_eq!(host.over().unwrap().reason, "stopped");
    let completed = |host: &Host| u16::from(host.read(USED + 2, 1)[0]);
    assert_eq!(completed(&host), AT_ONCE);
    // Its driver has rung already, and does not do so again.
    host.begin();
    wait("they are carried out", || completed(&host) == more);
}

/// Reads, writes and flushes of any sectors, as many at once as the queue has room for, each sector in one of them at a time.
#[test]
fn many_at_once() {
    const SECTORS: u64 = 64;
    const REQUESTS: u16 = 16;
    let (device, file) = disk(SECTORS);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut model: Vec<u8> = (0..SECTORS as u8).collect();
    let mut completed = 0_u16;
    for turn in 0..100_u64 {
        let asked: Vec<(u32, u64)> = (0..u64::from(REQUESTS))
            .map(|at| {
                let kind = [IN, OUT, OUT, FLUSH][random.below(4) as usize];
                (kind, at * 4 + random.below(4))
            })
            .collect();
        for (head, (kind, sector)) in (0..).step_by(4).zip(&asked) {
            let place = DATA + u64::from(head) * 1024;
            let data: &[_] = if *kind == FLUSH { &[] } else { &[(place, 512)] };
            host.write(place, &[turn as u8; 512]);
            disk.offer(head, *kind, *sector, data);
            disk.device.kick(0);
        }
        completed = completed.wrapping_add(REQUESTS);
        disk.rings.wait(completed);
        let mut heads: Vec<u32> = (1..=REQUESTS)
            .map(|back| disk.rings.entry(completed.wrapping_sub(back)).0)
            .collect();
        heads.sort_unstable();
        assert!(
            heads.into_iter().eq((0..).step_by(4).take(REQUESTS.into())),
            "each once"
        );
        for (head, (kind, sector)) in (0..).step_by(4).zip(&asked) {
            assert_eq!(disk.told(head), OK, "{kind} {sector}");
            let place = DATA + u64::from(head) * 1024;
            match *kind {
                IN => assert_eq!(host.read(place, 512), [model[*sector as usize]; 512]),
                OUT => model[*sector as usize] = turn as u8,
                _ => {}
            }
        }
    }
    let mut on_disk = vec![0; SECTORS as usize * 512];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert!(
        on_disk
            .chunks(512)
            .zip(model)
            .all(|(sector, byte)| sector == [byte; 512])
    );
}
