//! A chunk: memory for a fixed number of events in columns. One vCPU writes it, and any thread may read it meanwhile.
//!
//! A published row does not change any more, so an Arrow array can use the published part of a column without a copy,
//! while the rows after it are still being written.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;

use super::columns::{BYTES, Cells, HALVES, Row, Source, WORDS, byte, word};
use super::event::Event;
use super::table;
use crate::memory::address::State;

/// Rows of a chunk, the unit in which the log allocates and reuses memory. Fewer under Miri, where tests that reuse chunks
/// would take minutes.
pub(super) const ROWS: usize = if cfg!(miri) { 64 } else { 1024 };

pub(super) struct Chunk {
    /// How many rows are published.
    len: AtomicUsize,
    columns: Box<Columns>,
}

/// Fixed sizes, so that the address of a value takes no arithmetic at run time. Each column has a cache line more than
/// its rows need: otherwise all values of a row would map to the same set of the cache.
struct Columns {
    words: [[AtomicU64; ROWS + LINE / 8]; WORDS],
    halves: [[AtomicU32; ROWS + LINE / 4]; HALVES],
    bytes: [[AtomicU8; ROWS + LINE]; BYTES],
}

const LINE: usize = 64;

impl Columns {
    /// All zero; `None` if there is no memory. `alloc_zeroed` gets zeroed pages from the kernel, which need not be written
    /// again.
    fn zeroes() -> Option<Box<Self>> {
        let layout = Layout::new::<Self>();
        // SAFETY: the layout's size is not zero.
        let memory = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        // SAFETY: it was just allocated with this layout, and atomics may be all zero.
        Some(unsafe { Box::from_raw(memory.cast().as_ptr()) })
    }
}

/// A row that is being written.
pub(super) struct Draft<'a> {
    columns: &'a Columns,
    at: usize,
}

impl Draft<'_> {
    /// What was asked for: the first gpa, and the state.
    pub(super) fn asked_for(&self) -> (u64, State) {
        let to = self.columns.bytes[byte::TO][self.at].load(Ordering::Relaxed);
        let to = if to == State::Private as u8 {
            State::Private
        } else {
            State::Shared
        };
        (self.columns.words[word::GPA][self.at].load(Ordering::Relaxed), to)
    }
}

impl Cells for Draft<'_> {
    #[inline]
    fn put_word(&mut self, column: usize, value: u64) {
        self.columns.words[column][self.at].store(value, Ordering::Relaxed);
    }

    #[inline]
    fn put_half(&mut self, column: usize, value: u32) {
        self.columns.halves[column][self.at].store(value, Ordering::Relaxed);
    }

    #[inline]
    fn put_byte(&mut self, column: usize, value: u8) {
        self.columns.bytes[column][self.at].store(value, Ordering::Relaxed);
    }
}

impl Chunk {
    /// `None` if there is no memory for it.
    pub(super) fn new() -> Option<Self> {
        Some(Self {
            len: AtomicUsize::new(0),
            columns: Columns::zeroes()?,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// A row that is not published yet, for the one thread that writes this chunk.
    #[inline]
    pub(super) fn row(&self, at: usize) -> Draft<'_> {
        debug_assert!(at >= self.len(), "a published row does not change");
        Draft {
            columns: &self.columns,
            // `at` is below ROWS already. This spares a bounds check for each column.
            at: at % ROWS,
        }
    }

    /// Publishes the first `len` rows. A thread that reads this `len` sees what was written to them.
    #[inline]
    pub(super) fn publish(&self, len: usize) {
        self.len.store(len, Ordering::Release);
    }

    /// Unpublishes all rows. Takes the only reference, so nothing reads them any more.
    pub(super) fn clear(&mut self) {
        *self.len.get_mut() = 0;
    }

    /// The sequence number of a published row.
    pub(super) fn sequence(&self, at: usize) -> u64 {
        self.columns.words[word::SEQUENCE][at].load(Ordering::Relaxed)
    }

    /// A published row.
    pub(super) fn event(&self, at: usize) -> Option<Event> {
        let row = Row {
            words: std::array::from_fn(|i| self.columns.words[i][at].load(Ordering::Relaxed)),
            halves: std::array::from_fn(|i| self.columns.halves[i][at].load(Ordering::Relaxed)),
            bytes: std::array::from_fn(|i| self.columns.bytes[i][at].load(Ordering::Relaxed)),
        };
        row.event()
    }

    /// The rows `[from, to)` without a copy. They must be published.
    pub(super) fn batch(self: &Arc<Self>, from: usize, to: usize) -> RecordBatch {
        assert!(from <= to && to <= self.len(), "unpublished rows may still change");
        table::assemble(|source| self.column(source, from, to))
    }

    fn column(self: &Arc<Self>, source: Source, from: usize, to: usize) -> Buffer {
        match source {
            Source::Word(i) | Source::Nanoseconds(i) => self.over(&self.columns.words[i][from..to]),
            Source::Half(i) | Source::Signed(i) => self.over(&self.columns.halves[i][from..to]),
            Source::Flag(i) | Source::Code(i, _) => self.over(&self.columns.bytes[i][from..to]),
        }
    }

    /// A buffer that uses published values of this chunk in place.
    fn over<T>(self: &Arc<Self>, values: &[T]) -> Buffer {
        let start = NonNull::from(values).cast();
        // SAFETY: the memory belongs to this chunk, which the buffer keeps alive. The values are published, so they are
        // written again only after `clear`, which takes the only reference.
        unsafe { Buffer::from_custom_allocation(start, size_of_val(values), self.clone()) }
    }
}
