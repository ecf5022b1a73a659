//! What the fake keeps in place of a kernel: memslots, attributes, and the calls that are to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use parking_lot::Mutex;

use crate::errno::Errno;

const PAGE_SIZE: u64 = 4096;

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallName {
    /// KVM_SET_MEMORY_ATTRIBUTES.
    SetAttributes,
    /// KVM_SET_USER_MEMORY_REGION2 with a size.
    CreateMemslot,
    /// The same without.
    DeleteMemslot,
    /// FALLOC_FL_PUNCH_HOLE.
    Discard,
    /// KVM_PRE_FAULT_MEMORY, which maps one page a call.
    PreFault,
}

const CALL_NAMES: usize = CallName::PreFault as usize + 1;

/// A call that is going to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// Which call.
    pub call: CallName,
    /// After this many that go well.
    pub after: u64,
    /// How it fails.
    pub errno: i32,
    /// It does its work on the first half of its range all the same.
    pub half_done: bool,
    /// Every later one fails too, not only this one.
    pub forever: bool,
}

/// What a call did before it failed.
pub(super) enum Entered {
    Done,
    Failed { errno: Errno, half_done: bool },
}

impl Entered {
    /// For calls that do all or nothing.
    pub(super) fn whole(self) -> Result<(), Errno> {
        match self {
            Entered::Done => Ok(()),
            Entered::Failed { errno, .. } => Err(errno),
        }
    }
}

/// A memslot: its guest-physical addresses, and whether a guest_memfd is bound to it.
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
    calls: [u64; CALL_NAMES],
    injections: Vec<Injection>,
}

impl Kernel {
    /// Makes calls fail, counted from now on.
    pub(super) fn inject(&self, injection: Injection) {
        let mut state = self.0.lock();
        let after = injection.after + state.calls[injection.call as usize];
        state.injections.push(Injection { after, ..injection });
    }

    /// Counts a call: whether it is to fail.
    pub(super) fn enter(&self, call: CallName) -> Entered {
        let mut state = self.0.lock();
        let number = state.calls[call as usize];
        state.calls[call as usize] += 1;
        let hit = |injection: &&Injection| {
            let now = injection.after == number || injection.forever && injection.after < number;
            injection.call == call && now
        };
        match state.injections.iter().find(hit) {
            Some(injection) => Entered::Failed {
                errno: Errno(injection.errno),
                half_done: injection.half_done,
            },
            None => Entered::Done,
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

    /// EINVAL for a number that is taken, EEXIST for addresses that are, as KVM has it.
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

    /// The slot at `gpa`: whether a guest_memfd is bound to it.
    pub(super) fn slot_at(&self, gpa: u64) -> Option<bool> {
        let state = self.0.lock();
        let slot = state.slots.values().find(|slot| slot.addresses.contains(&gpa));
        slot.map(|slot| slot.guest_memfd)
    }

    pub(super) fn slot_count(&self) -> usize {
        self.0.lock().slots.len()
    }
}
