//! The fake's kernel state: memslots, attributes, eventfds of interrupts and doorbells, and which calls are to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::errno::Errno;
use crate::hypervisor::interrupts::Message;
use crate::hypervisor::vm::Controllers;

const PAGE_SIZE: u64 = 4096;

/// A system call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallName {
    /// KVM_SET_MEMORY_ATTRIBUTES.
    SetAttributes,
    /// KVM_SET_USER_MEMORY_REGION2 with a size: a new memslot.
    CreateMemslot,
    /// KVM_SET_USER_MEMORY_REGION2 with size 0.
    DeleteMemslot,
    /// FALLOC_FL_PUNCH_HOLE.
    Discard,
    /// KVM_PRE_FAULT_MEMORY. The fake's maps one page a call.
    PreFault,
    /// One that has no name here: those that create vCPUs, guest_memfds and interrupt controllers, or read and set a
    /// vCPU's state.
    Other,
    /// Whichever is the next.
    Any,
}

const CALL_NAMES: usize = CallName::Any as usize + 1;

/// Makes a system call fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// Which call.
    pub call: CallName,
    /// How many of them succeed first.
    pub after: u64,
    /// The errno that it fails with.
    pub errno: i32,
    /// Whether it does its work on the first half of its range before it fails. Of KVM_SET_MEMORY_ATTRIBUTES only.
    pub half_done: bool,
    /// Whether all later ones fail, too.
    pub forever: bool,
}

/// Whether a call is to fail.
pub(super) enum Fate {
    Succeed,
    Fail { errno: Errno, half_done: bool },
}

impl Fate {
    /// For calls that do all of their work or none.
    pub(super) fn all_or_nothing(self) -> Result<(), Errno> {
        match self {
            Fate::Succeed => Ok(()),
            Fate::Fail { errno, .. } => Err(errno),
        }
    }
}

/// A memslot: its guest-physical addresses, and whether it has a guest_memfd.
pub(super) struct Slot {
    pub addresses: Range<u64>,
    pub guest_memfd: bool,
}

#[derive(Default)]
pub(super) struct Kernel(Mutex<State>);

#[derive(Default)]
struct State {
    slots: BTreeMap<u32, Slot>,
    /// Pages that carry PRIVATE.
    private: BTreeSet<u64>,
    /// The irqfds, by interrupt number.
    interrupts: BTreeMap<u32, EventFd>,
    /// What each interrupt is that is no pin.
    messages: Vec<Option<Message>>,
    /// The ioeventfds, by address.
    doorbells: BTreeMap<u64, EventFd>,
    /// What was set last.
    controllers: Option<Controllers>,
    clock: kvm_clock_data,
    /// How many calls there were, by name.
    calls: [u64; CALL_NAMES],
    injections: Vec<Injection>,
}

impl Kernel {
    /// Makes calls fail; they are counted from now on.
    pub(super) fn inject(&self, injection: Injection) {
        let mut state = self.0.lock();
        let after = injection.after + state.calls[injection.call as usize];
        state.injections.push(Injection { after, ..injection });
    }

    /// Counts a call and says whether it is to fail.
    pub(super) fn count(&self, call: CallName) -> Fate {
        let mut state = self.0.lock();
        let numbers = [call, CallName::Any].map(|name| (name, state.calls[name as usize]));
        for (name, _) in numbers {
            state.calls[name as usize] += 1;
        }
        let hit = |injection: &&Injection| {
            let mut numbers = numbers.iter().filter(|(name, _)| *name == injection.call);
            numbers.any(|(_, number)| injection.after == *number || injection.forever && injection.after < *number)
        };
        match state.injections.iter().find(hit) {
            Some(injection) => Fate::Fail {
                errno: Errno(injection.errno),
                half_done: injection.half_done,
            },
            None => Fate::Succeed,
        }
    }

    pub(super) fn calls(&self, call: CallName) -> u64 {
        self.0.lock().calls[call as usize]
    }

    pub(super) fn set_private(&self, gpa: u64, size: u64, private: bool) {
        let mut state = self.0.lock();
        for page in gpa / PAGE_SIZE..(gpa + size) / PAGE_SIZE {
            match private {
                true => state.private.insert(page),
                false => state.private.remove(&page),
            };
        }
    }

    pub(super) fn is_private(&self, gpa: u64) -> bool {
        self.0.lock().private.contains(&(gpa / PAGE_SIZE))
    }

    /// Fails as KVM does: EINVAL for a number that is in use, EEXIST for addresses that overlap another memslot.
    pub(super) fn create_slot(&self, id: u32, slot: Slot) -> Result<(), Errno> {
        let slots = &mut self.0.lock().slots;
        let overlaps =
            |other: &Slot| other.addresses.start < slot.addresses.end && slot.addresses.start < other.addresses.end;
        if slots.contains_key(&id) {
            return Err(Errno(libc::EINVAL));
        }
        if slots.values().any(overlaps) {
            return Err(Errno(libc::EEXIST));
        }
        slots.insert(id, slot);
        Ok(())
    }

    pub(super) fn delete_slot(&self, id: u32) -> Result<(), Errno> {
        let removed = self.0.lock().slots.remove(&id);
        removed.map(drop).ok_or(Errno(libc::EINVAL))
    }

    /// Whether the memslot at `gpa` has a guest_memfd; `None` where there is no memslot.
    pub(super) fn slot_at(&self, gpa: u64) -> Option<bool> {
        let state = self.0.lock();
        let slot = state.slots.values().find(|slot| slot.addresses.contains(&gpa));
        slot.map(|slot| slot.guest_memfd)
    }

    pub(super) fn slot_count(&self) -> usize {
        self.0.lock().slots.len()
    }

    pub(super) fn route_interrupt(&self, gsi: u32, event: EventFd) {
        self.0.lock().interrupts.insert(gsi, event);
    }

    pub(super) fn controllers(&self) -> Controllers {
        let set = self.0.lock().controllers.clone();
        set.unwrap_or_else(|| Controllers {
            chips: [kvm_irqchip::default(); 3],
            pit: kvm_pit_state2::default(),
        })
    }

    pub(super) fn set_controllers(&self, controllers: Controllers) {
        self.0.lock().controllers = Some(controllers);
    }

    pub(super) fn clock(&self) -> kvm_clock_data {
        self.0.lock().clock
    }

    pub(super) fn set_clock(&self, clock: kvm_clock_data) {
        self.0.lock().clock = clock;
    }

    /// How often an interrupt was raised since this was last asked.
    pub(super) fn raised(&self, gsi: u32) -> u64 {
        // The eventfd does not block: it cannot be read if it is 0.
        let read = |event: &EventFd| event.read().unwrap_or_default();
        self.0.lock().interrupts.get(&gsi).map_or(0, read)
    }

    pub(super) fn route_messages(&self, messages: &[Option<Message>]) {
        self.0.lock().messages = messages.to_vec();
    }

    pub(super) fn messages(&self) -> Vec<Option<Message>> {
        self.0.lock().messages.clone()
    }

    /// Fails as KVM does: EEXIST for an address that has a doorbell, ENOENT for one that does not have it.
    pub(super) fn set_doorbell(&self, gpa: u64, event: Option<EventFd>) -> Result<(), Errno> {
        let doorbells = &mut self.0.lock().doorbells;
        match event {
            Some(_) if doorbells.contains_key(&gpa) => return Err(Errno(libc::EEXIST)),
            Some(event) => drop(doorbells.insert(gpa, event)),
            None => drop(doorbells.remove(&gpa).ok_or(Errno(libc::ENOENT))?),
        }
        Ok(())
    }

    /// A store. Whether it was one to a doorbell, which has no exit.
    pub(super) fn ring_doorbell(&self, gpa: u64) -> bool {
        let state = self.0.lock();
        // A counter that is full has been rung.
        state.doorbells.get(&gpa).map(|event| event.write(1)).is_some()
    }

    /// The addresses of doorbells.
    pub(super) fn doorbells(&self) -> Vec<u64> {
        self.0.lock().doorbells.keys().copied().collect()
    }
}
