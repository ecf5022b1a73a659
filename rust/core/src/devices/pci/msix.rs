//! MSI-X: a device's interrupts, each with an address and data that the guest chooses.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::messages::{Line, Messages};
use crate::errno::Errno;
use crate::hypervisor::interrupts::Message;

/// Bytes of a table entry: address, data, and a word whose bit 0 masks it.
pub(crate) const ENTRY: u64 = 16;
const MASKED: u32 = 1;
/// Message control: MSI-X is on.
pub(crate) const ENABLE: u16 = 1 << 15;
/// Message control: all are masked.
pub(crate) const FUNCTION_MASK: u16 = 1 << 14;

/// The table and the pending bits, as a snapshot has them.
#[derive(Deserialize, Serialize)]
pub(crate) struct SavedMsix(Vec<([u32; 4], bool)>);

struct Vector {
    line: Line,
    /// The entry's four words.
    words: [u32; 4],
    /// Raised while it was masked.
    pending: bool,
}

/// The table, the pending bits, and message control.
pub(crate) struct Msix {
    messages: Arc<Messages>,
    vectors: Vec<Vector>,
    control: u16,
}

impl Msix {
    /// `count` vectors, all of them masked, as after a reset.
    pub(crate) fn new(messages: Arc<Messages>, count: usize) -> Result<Self, Errno> {
        let vector = |line| Vector {
            line,
            words: [0, 0, 0, MASKED],
            pending: false,
        };
        let vectors = messages.lines(count)?.into_iter().map(vector).collect();
        Ok(Self {
            messages,
            vectors,
            control: 0,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Raises an interrupt, or notes it where it is masked. There is none without MSI-X, and none of a number that the
    /// table does not have.
    pub(crate) fn raise(&mut self, vector: u16) {
        let control = self.control;
        let Some(vector) = self.vectors.get_mut(usize::from(vector)) else {
            return;
        };
        match (control & ENABLE != 0, is_open(control, vector)) {
            (true, true) => vector.line.raise(),
            (true, false) => vector.pending = true,
            (false, _) => {}
        }
    }

    /// Nothing that was raised while it was masked is raised any more.
    pub(crate) fn forget_pending(&mut self) {
        self.vectors.iter_mut().for_each(|vector| vector.pending = false);
    }

    /// Message control was written.
    pub(crate) fn set_control(&mut self, control: u16) -> Result<(), Errno> {
        self.control = control & (ENABLE | FUNCTION_MASK);
        (0..self.vectors.len()).try_for_each(|at| self.update(at))
    }

    pub(crate) fn save(&self) -> SavedMsix {
        let vectors = self.vectors.iter();
        SavedMsix(vectors.map(|vector| (vector.words, vector.pending)).collect())
    }

    /// Takes a table that was saved; message control is set after it. Returns whether there are as many vectors.
    pub(crate) fn restore(&mut self, saved: &SavedMsix) -> bool {
        for (vector, (words, pending)) in self.vectors.iter_mut().zip(&saved.0) {
            (vector.words, vector.pending) = (*words, *pending);
        }
        saved.0.len() == self.vectors.len()
    }

    /// Reads 4 or 8 aligned bytes of the table; else all ones.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        into.fill(0xff);
        if !is_natural(offset, into.len()) {
            return;
        }
        for (part, at) in into.chunks_mut(4).zip((offset / 4)..) {
            if let Some(vector) = self.vectors.get((at / 4) as usize) {
                part.copy_from_slice(&vector.words[at as usize % 4].to_le_bytes());
            }
        }
    }

    /// Writes 4 or 8 aligned bytes of the table; else nothing.
    pub(crate) fn write(&mut self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        if !is_natural(offset, from.len()) {
            return Ok(());
        }
        for (part, at) in from.as_chunks::<4>().0.iter().zip((offset / 4)..) {
            if let Some(vector) = self.vectors.get_mut((at / 4) as usize) {
                vector.words[at as usize % 4] = u32::from_le_bytes(*part);
            }
        }
        let at = (offset / ENTRY) as usize;
        if at < self.vectors.len() {
            self.update(at)
        } else {
            Ok(())
        }
    }

    /// Reads the pending bits.
    pub(crate) fn read_pending(&self, offset: u64, into: &mut [u8]) {
        for (byte, at) in into.iter_mut().zip(offset..) {
            let first = (at as usize).saturating_mul(8);
            let bits = self.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, vector)| byte | u8::from(vector.pending) << bit);
        }
    }

    /// Routes a vector as its entry says now. One that was raised while it was masked is raised as soon as it is not.
    fn update(&mut self, at: usize) -> Result<(), Errno> {
        let control = self.control;
        let vector = &mut self.vectors[at];
        if control & ENABLE == 0 || !is_open(control, vector) {
            return Ok(());
        }
        let [low, high, data, _] = vector.words;
        let message = Message {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        };
        self.messages.route(&vector.line, Some(message))?;
        if std::mem::take(&mut vector.pending) {
            vector.line.raise();
        }
        Ok(())
    }
}

fn is_open(control: u16, vector: &Vector) -> bool {
    control & FUNCTION_MASK == 0 && vector.words[3] & MASKED == 0
}

fn is_natural(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}
