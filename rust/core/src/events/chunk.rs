//! Room for some events, one column beside the other, written by one vCPU and read by anybody meanwhile.
//!
//! A row that was published never changes, so an Arrow array can lie over the rows of a column without a copy, while the
//! rows behind it are still being written.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;

use super::Event;
use super::columns::{BYTES, HALVES, Row, Source, WORDS};
use super::table;

pub(super) struct Chunk {
    rows: usize,
    /// Rows that are published.
    len: AtomicUsize,
    /// Column after column, `rows` values each.
    words: Box<[AtomicU64]>,
    halves: Box<[AtomicU32]>,
    bytes: Box<[AtomicU8]>,
}

fn zeroes<T: Default>(count: usize) -> Box<[T]> {
    std::iter::repeat_with(T::default).take(count).collect()
}

impl Chunk {
    pub(super) fn new(rows: usize) -> Self {
        Self {
            rows,
            len: AtomicUsize::new(0),
            words: zeroes(WORDS * rows),
            halves: zeroes(HALVES * rows),
            bytes: zeroes(BYTES * rows),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Adds a row; not from two threads at once. Whether there was room.
    #[inline]
    pub(super) fn push(&self, row: &Row) -> bool {
        let at = self.len.load(Ordering::Relaxed);
        if at >= self.rows {
            return false;
        }
        // Checked, each of these 28 stores costs three times as much.
        for (i, value) in row.words.into_iter().enumerate() {
            // SAFETY: `at < self.rows` and `i < WORDS`, and there are WORDS columns of `self.rows` values.
            unsafe { self.words.get_unchecked(i * self.rows + at) }.store(value, Ordering::Relaxed);
        }
        for (i, value) in row.halves.into_iter().enumerate() {
            // SAFETY: as above, with HALVES.
            unsafe { self.halves.get_unchecked(i * self.rows + at) }.store(value, Ordering::Relaxed);
        }
        for (i, value) in row.bytes.into_iter().enumerate() {
            // SAFETY: as above, with BYTES.
            unsafe { self.bytes.get_unchecked(i * self.rows + at) }.store(value, Ordering::Relaxed);
        }
        self.len.store(at + 1, Ordering::Release);
        true
    }

    /// Makes it as new, for who has the only reference.
    pub(super) fn clear(&mut self) {
        *self.len.get_mut() = 0;
    }

    /// The sequence number of a published row.
    pub(super) fn sequence(&self, at: usize) -> u64 {
        self.words[at].load(Ordering::Relaxed)
    }

    /// A published row.
    pub(super) fn event(&self, at: usize) -> Option<Event> {
        let column = |i: usize| i * self.rows + at;
        let row = Row {
            words: std::array::from_fn(|i| self.words[column(i)].load(Ordering::Relaxed)),
            halves: std::array::from_fn(|i| self.halves[column(i)].load(Ordering::Relaxed)),
            bytes: std::array::from_fn(|i| self.bytes[column(i)].load(Ordering::Relaxed)),
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
            Source::Word(i) => self.over(&self.words[i * self.rows..][from..to]),
            Source::Half(i) | Source::Signed(i) => self.over(&self.halves[i * self.rows..][from..to]),
            Source::Flag(i) | Source::Code(i, _) => self.over(&self.bytes[i * self.rows..][from..to]),
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
