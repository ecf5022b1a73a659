//! Room for some events, one column beside the other, written by one vCPU and read by anybody meanwhile.
//!
//! A row that was published never changes, so an Arrow array can lie over the rows of a column without a copy, while the
//! rows behind it are still being written.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;

use super::columns::{BYTES, Cells, HALVES, Row, Source, WORDS, byte, word};
use super::event::Event;
use super::table;
use crate::memory::address::State;

/// Rows of a chunk: events that are dropped at once, and that memory is taken for at once.
pub(super) const ROWS: usize = 1024;

pub(super) struct Chunk {
    /// Rows that are published.
    len: AtomicUsize,
    columns: Box<Columns>,
}

/// Fixed sizes, so that a row's places are known without arithmetic on every column. Each column is longer than its rows
/// by a cache line: else those of one row would all meet in one set of the cache.
struct Columns {
    words: [[AtomicU64; ROWS + LINE / 8]; WORDS],
    halves: [[AtomicU32; ROWS + LINE / 4]; HALVES],
    bytes: [[AtomicU8; ROWS + LINE]; BYTES],
}

const LINE: usize = 64;

impl Columns {
    /// Memory that the kernel has zeroed need not be written once more.
    fn zeroes() -> Box<Self> {
        let layout = Layout::new::<Self>();
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: it was just allocated with this layout, and zeroes are valid for what it holds.
        unsafe { Box::from_raw(memory.cast()) }
    }
}

/// A row that is being written.
pub(super) struct Draft<'a> {
    columns: &'a Columns,
    at: usize,
}

impl Draft<'_> {
    /// What was asked for: the first page, and the state that it was to become.
    pub(super) fn wanted(&self) -> (u64, State) {
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
    pub(super) fn new() -> Self {
        Self {
            len: AtomicUsize::new(0),
            columns: Columns::zeroes(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// A row that is not published yet, to be written by one thread.
    #[inline]
    pub(super) fn row(&self, at: usize) -> Draft<'_> {
        debug_assert!(at >= self.len(), "a row that is published does not change");
        Draft {
            columns: &self.columns,
            // Which it is already; this way it need not be looked at once for each column.
            at: at % ROWS,
        }
    }

    /// Whoever finds the first `len` rows published finds what was written to them.
    #[inline]
    pub(super) fn publish(&self, len: usize) {
        self.len.store(len, Ordering::Release);
    }

    /// Makes it as new, for who has the only reference.
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

    /// The rows `[from, to)`, which are published, without a copy.
    pub(super) fn batch(self: &Arc<Self>, from: usize, to: usize) -> RecordBatch {
        assert!(
            from <= to && to <= self.len(),
            "rows that are not published may still change"
        );
        table::assemble(|source| self.column(source, from, to))
    }

    fn column(self: &Arc<Self>, source: Source, from: usize, to: usize) -> Buffer {
        match source {
            Source::Word(i) => self.over(&self.columns.words[i][from..to]),
            Source::Half(i) | Source::Signed(i) => self.over(&self.columns.halves[i][from..to]),
            Source::Flag(i) | Source::Code(i, _) => self.over(&self.columns.bytes[i][from..to]),
        }
    }

    /// A buffer over published values, which are a part of this chunk.
    fn over<T>(self: &Arc<Self>, values: &[T]) -> Buffer {
        let start = NonNull::from(values).cast();
        // SAFETY: the memory belongs to this chunk, which the buffer keeps alive. The values are published, and those
        // are written again only after `clear`, which takes the only reference there is.
        unsafe { Buffer::from_custom_allocation(start, size_of_val(values), self.clone()) }
    }
}
