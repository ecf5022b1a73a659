//! Resets, ends of runs, and what is added when.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::queue::Queue;
use pagegate_core::devices::virtio::rng::Rng;
use pagegate_core::error::{Error, Failure};

use crate::block::{DATA, Disk, IN, OK};
use crate::driver::{Host, Virtio, status, wait};
use crate::rings::{AVAILABLE, Rings, USED};
use crate::test_devices::{Gated, Judge, Slow, disk};

#[test]
fn a_reset_reads_as_done_when_the_device_has_let_go() {
    let gated = Arc::new(Gated::default());
    let host = Host::new(Judge::deny(), vec![gated.clone()]);
    let device = Virtio::find(&host, 1);
    let rings = Rings::start(&device, 16);
    for head in [0, 2] {
        rings.chain(head, &[(DATA, 4096, true), (DATA + 4096, 1, true)]);
        rings.offer(head);
    }
    device.kick(0);
    gated.wait_until_taken(1);
    device.set_status(0);
    for _ in 0..10 {
        assert_ne!(device.status(), 0, "it still works on a request");
    }
    // Neither that nor anything else counts meanwhile.
    device.set_status(status::ACKNOWLEDGE | status::DRIVER);
    device.kick(0);
    gated.allow(2);
    wait("the status reads 0", || device.status() == 0);
    // From here on the memory is the guest's own.
    host.write(DATA, &[0; 4097]);
    host.write(USED, &[0; 4096]);
    device.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(
        (host.read(DATA, 4097), host.read(USED, 4096)),
        (vec![0; 4097], vec![0; 4096])
    );
    gated.wait_until_taken(1);
    host.write(AVAILABLE, &[0; 4096]);
    let rings = Rings::start(&device, 16);
    rings.chain(0, &[(DATA, 16, true), (DATA + 4096, 1, true)]);
    rings.offer(0);
    gated.allow(usize::MAX);
    device.kick(0);
    rings.wait(1);
    assert_eq!(host.read(DATA + 4096, 1), [Gated::DONE]);
}

fn busy(host: &Host) -> (Virtio<'_>, Rings<'_>) {
    let device = Virtio::find(host, 1);
    let rings = Rings::start(&device, Slow::QUEUE);
    rings.chain(0, &[(DATA, 16, true)]);
    for _ in 0..Slow::QUEUE {
        rings.offer(0);
    }
    device.kick(0);
    (device, rings)
}

/// How long all of a queue's requests would take.
fn whole_queue() -> Duration {
    Slow::EACH * u32::from(Slow::QUEUE)
}

#[test]
fn a_full_queue_does_not_keep_a_run_from_ending() {
    let slow = Arc::new(Slow::default());
    let mut host = Host::new(Judge::deny(), vec![slow.clone()]);
    busy(&host);
    wait("it is at work", || slow.done.load(Ordering::SeqCst) > 0);
    let (report, took) = host.stop();
    assert_eq!(report.unwrap().reason, "stopped");
    assert!(took < whole_queue() / 4, "it took {took:?}");
    let before = slow.done.load(Ordering::SeqCst);
    assert!(before < usize::from(Slow::QUEUE));
    std::thread::sleep(2 * Slow::EACH);
    assert_eq!(slow.done.load(Ordering::SeqCst), before, "between runs it does nothing");
    // The next run goes on with the rest, without another kick.
    host.begin();
    wait("all are done", || {
        slow.done.load(Ordering::SeqCst) == usize::from(Slow::QUEUE)
    });
}

#[test]
fn a_full_queue_does_not_keep_a_reset_waiting() {
    let slow = Arc::new(Slow::default());
    let host = Host::new(Judge::deny(), vec![slow.clone()]);
    let (device, rings) = busy(&host);
    wait("it is at work", || slow.done.load(Ordering::SeqCst) > 0);
    let begun = std::time::Instant::now();
    device.reset();
    assert!(begun.elapsed() < whole_queue() / 4, "it took {:?}", begun.elapsed());
    assert_eq!(slow.resets.load(Ordering::SeqCst), 1);
    let completed = rings.completed();
    std::thread::sleep(2 * Slow::EACH);
    assert_eq!(rings.completed(), completed);
}

#[test]
fn a_device_goes_on_with_the_next_run() {
    let mut host = Host::new(Judge::deny(), vec![disk(64).0]);
    for run in 1..=3 {
        {
            let device = Virtio::find(&host, 1);
            let disk = Disk::new(&host);
            assert_eq!(disk.ask(IN, run, &[(DATA, 512)]), (OK, 513));
            assert_eq!(device.status(), 0xf);
        }
        host.stop().0.unwrap();
        assert_eq!(host.read(DATA, 512), [run as u8; 512]);
        host.begin();
        Virtio::find(&host, 1).reset();
        host.write(AVAILABLE, &[0; 4096]);
        host.write(USED, &[0; 4096]);
    }
}

/// A device that cannot be.
struct Wrong {
    id: u16,
    queues: Vec<u16>,
}

impl Device for Wrong {
    fn id(&self) -> u16 {
        self.id
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn process(&self, _: &mut Vec<Queue>, _: usize) -> Result<(), Failure> {
        Ok(())
    }
}

#[test]
fn a_device_that_is_refused_leaves_the_bus_as_it_was() {
    let mut host = Host::resting(Judge::deny(), vec![]);
    let wrong = [
        (1, vec![3]),
        (1, vec![0]),
        (1, vec![2; 65]),
        (0x40, vec![8]),
        (u16::MAX, vec![8]),
    ];
    for (id, queues) in wrong {
        let shown = format!("{id:#x} {queues:?}");
        let added = host.machine.add_device("wrong", Arc::new(Wrong { id, queues }), false);
        assert!(matches!(added, Err(Error::Invalid(_))), "{shown}: {added:?}");
    }
    for _ in 1..32 {
        host.machine.add_device("rng", Arc::new(Rng), false).unwrap();
    }
    let full = host.machine.add_device("rng", Arc::new(Rng), false);
    assert!(matches!(full, Err(Error::Invalid(_))), "{full:?}");
    host.begin();
    let device = Virtio::find(&host, 31);
    let rings = Rings::start(&device, 8);
    rings.chain(0, &[(DATA, 16, true)]);
    rings.offer(0);
    device.kick(0);
    rings.wait(1);
    assert_eq!(rings.entry(0), (0, 16));
}

#[test]
fn no_device_is_added_while_the_machine_runs() {
    let host = Host::new(Judge::deny(), vec![disk(8).0]);
    let added = host.machine.add_device("late", Arc::new(Rng), false);
    assert!(matches!(added, Err(Error::Busy(_))), "{added:?}");
    assert_eq!(host.config(2, 0, 4), 0xffff_ffff);
}

#[test]
fn a_failing_device_ends_the_run_and_is_named() {
    struct Fails;
    impl Device for Fails {
        fn id(&self) -> u16 {
            42
        }
        fn queues(&self) -> &[u16] {
            &[16]
        }
        fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
            match queues[index].take() {
                Some(_) => Err("out of order".into()),
                None => Ok(()),
            }
        }
    }
    let mut host = Host::new(Judge::deny(), vec![Arc::new(Fails)]);
    {
        let device = Virtio::find(&host, 1);
        let rings = Rings::start(&device, 16);
        let doorbell = device.doorbell(0);
        rings.chain(0, &[(DATA, 16, true)]);
        rings.offer(0);
        host.last_store(doorbell, &[0; 2]);
    }
    let error = host.over().unwrap_err().to_string();
    assert_eq!(error, "device first: out of order");
}
