//! The books of all memory, in parts that have their own locks: vCPUs that work on different parts do not meet, not even
//! at a counter.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{MappedMutexGuard, Mutex};

use crate::attributes::{self, AttributeMap, Range, Run, State};
use crate::books::Books;
use crate::range_lock::{RangeGuard, RangeLocks};

/// The parts, at most. As many as there are bits in [`Seen::stale`] or fewer; more make what is about all of memory
/// slower.
const PARTS: u64 = 16;
/// A part is at least a block of an [`AttributeMap`].
const SMALLEST: u64 = 2 << 20;

/// The state of each page, and how it got there.
pub struct Ledger {
    memory: u64,
    /// The logarithm of a part's bytes.
    shift: u32,
    parts: Vec<Part>,
    /// Bytes that are on their way to being shared, under a quota.
    reserved: Mutex<u64>,
}

/// Memory from a multiple of a part's size on, in addresses that begin there. Alone in its cache lines.
#[repr(align(128))]
struct Part {
    books: RangeLocks<Books>,
    /// The map's generation, for those who do not want to lock it.
    generation: AtomicU64,
    /// The map's private bytes, likewise.
    private_bytes: AtomicU64,
    /// Changes of the ledger that changed something here first.
    changes: AtomicU64,
}

/// A range that nobody else changes.
pub(crate) enum Held<'a> {
    /// It is in one part.
    One { _guard: RangeGuard<'a, Books> },
    /// It is in several.
    Several { _guards: Vec<RangeGuard<'a, Books>> },
}

/// The same of a range that lies in one part: its pages there.
pub(crate) struct HeldSpot<'a> {
    part: &'a Part,
    pages: Range,
    guard: RangeGuard<'a, Books>,
    /// Whether nothing changed since it was looked at.
    pub same: bool,
}

/// The state of a range's pages, if they agree, and what makes it cheap to have that again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    pub range: Range,
    pub uniform: Option<State>,
    pub spot: Option<Spot>,
}

/// A page that a vCPU faulted on.
pub(crate) struct Examined {
    pub state: State,
    /// Whether it changed after what the vCPU had seen. Exact as far as is remembered, else cautious.
    pub changed: bool,
    /// How often it changed since this vCPU began to watch it, which may be now.
    pub changes: u64,
    pub look: Look,
}

/// Where a range lies that is in one part, as most are, and the part's generation when it was looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    part: usize,
    pages: Range,
    generation: u64,
}

/// What a vCPU has seen of the parts' generations when it entered the guest. Of parts that it had nothing to do with
/// since, it may have seen less: then a change is taken for newer than it is, and it looks again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    generations: [u64; PARTS as usize],
    /// Parts that it has had to do with since.
    stale: u16,
}

/// The ledger as it was at some time.
#[derive(Clone)]
pub struct Snapshot {
    shift: u32,
    parts: Vec<attributes::Snapshot>,
    generation: u64,
}

impl Ledger {
    pub(crate) fn new(memory: u64, initial: State, vcpus: usize) -> Self {
        let part = memory.div_ceil(PARTS).next_power_of_two().max(SMALLEST);
        let starts = (0..memory.div_ceil(part)).map(|i| i * part);
        let parts = starts.map(|start| {
            let map = AttributeMap::new(part.min(memory - start), initial);
            Part {
                private_bytes: AtomicU64::new(map.private_bytes()),
                books: RangeLocks::new(Books::new(map, vcpus)),
                generation: AtomicU64::new(0),
                changes: AtomicU64::new(0),
            }
        });
        Self {
            memory,
            shift: part.trailing_zeros(),
            parts: parts.collect(),
            reserved: Mutex::new(0),
        }
    }

    /// The part that `gpa` is in, and its address there.
    #[inline]
    fn locate(&self, gpa: u64) -> (usize, u64) {
        ((gpa >> self.shift) as usize, gpa & ((1 << self.shift) - 1))
    }

    /// The part that all of a range is in, as a rule, and its pages there.
    #[inline]
    fn whole(&self, range: Range) -> Option<(usize, Range)> {
        let part = range.gpa() >> self.shift;
        let inside = (range.end() - 1) >> self.shift == part;
        inside.then(|| (part as usize, range.below(part << self.shift)))
    }

    /// Bytes of memory.
    pub fn size(&self) -> u64 {
        self.memory
    }

    /// The state of the page that holds `gpa`, which lies in memory.
    pub fn state(&self, gpa: u64) -> State {
        let (part, gpa) = self.locate(gpa);
        self.parts[part].books.data().map().state(gpa)
    }

    /// The state of all pages of a range, if they agree. Where others change it meanwhile, of each part as it was then.
    pub fn uniform(&self, range: Range) -> Option<State> {
        if let Some((part, piece)) = self.whole(range) {
            return self.parts[part].books.data().map().uniform(piece);
        }
        let mut states =
            pieces(self.shift, range).map(|(part, piece)| self.parts[part].books.data().map().uniform(piece));
        let first = states.next()??;
        states.all(|state| state == Some(first)).then_some(first)
    }

    /// A look at a range, to be had again with the range held: see [`hold_spot`](Self::hold_spot).
    #[inline(always)]
    pub(crate) fn look_at(&self, range: Range) -> Look {
        let Some((part, pages)) = self.whole(range) else {
            return self.look_at_several(range);
        };
        let books = self.parts[part].books.data();
        let generation = books.map().generation();
        Look {
            range,
            uniform: books.map().uniform(pages),
            spot: Some(Spot {
                part,
                pages,
                generation,
            }),
        }
    }

    #[cold]
    fn look_at_several(&self, range: Range) -> Look {
        Look {
            range,
            uniform: self.uniform(range),
            spot: None,
        }
    }

    /// The fewest possible runs of a range, ascending.
    pub fn runs_in(&self, range: Range) -> Vec<Run> {
        if let Some((part, piece)) = self.whole(range) {
            let moved = range.gpa() - piece.gpa();
            let books = self.parts[part].books.data();
            return books.map().runs_in(piece).map(|run| moved_by(moved, run)).collect();
        }
        let mut runs: Vec<Run> = Vec::new();
        for (part, piece) in pieces(self.shift, range) {
            let books = self.parts[part].books.data();
            let more = books.map().runs_in(piece);
            append(&mut runs, more.map(|run| placed(self.shift, part, run)));
        }
        runs
    }

    /// Private bytes of a range.
    pub(crate) fn private_in(&self, range: Range) -> u64 {
        let private = |(part, piece): (usize, Range)| {
            let books = self.parts[part].books.data();
            let runs = books.map().runs_in(piece).filter(|run| run.state == State::Private);
            runs.map(|run| run.range.size()).sum::<u64>()
        };
        pieces(self.shift, range).map(private).sum()
    }

    /// Bytes that are private.
    pub fn private_bytes(&self) -> u64 {
        let bytes = |part: &Part| part.private_bytes.load(Ordering::Acquire);
        self.parts.iter().map(bytes).sum()
    }

    /// How many changes changed something.
    pub fn generation(&self) -> u64 {
        let changes = |part: &Part| part.changes.load(Ordering::Acquire);
        self.parts.iter().map(changes).sum()
    }

    /// All of it at one moment.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let books: Vec<_> = self.parts.iter().map(|part| part.books.data()).collect();
        Snapshot {
            shift: self.shift,
            parts: books.iter().map(|books| books.map().snapshot()).collect(),
            generation: self.generation(),
        }
    }

    /// What to know of the pages that this vCPU faulted on when `generation` was their part's, as soon as nobody holds them.
    pub(crate) fn examine(&self, range: Range, generation: u64, vcpu: u32) -> Examined {
        let Some((part, pages)) = self.whole(range) else {
            let _held = self.hold(range);
            let (state, changed) = self.state_and_changed(range.gpa(), generation);
            return Examined {
                state,
                changed,
                changes: self.watch(vcpu, range.gpa()),
                look: self.look_at_several(range),
            };
        };
        let mut books = self.parts[part].books.look_when_free(pages);
        let uniform = books.map().uniform(pages);
        let spot = Spot {
            part,
            pages,
            generation: books.map().generation(),
        };
        Examined {
            state: uniform.unwrap_or_else(|| books.map().state(pages.gpa())),
            changed: books.changed_since(pages.gpa(), generation),
            changes: books.watch(vcpu, pages.gpa()),
            look: Look {
                range,
                uniform,
                spot: Some(spot),
            },
        }
    }

    /// Waits until nobody holds a part of `range`, and holds it. A thread that holds one must not ask for another.
    pub(crate) fn hold(&self, range: Range) -> Held<'_> {
        if let Some((part, pages)) = self.whole(range) {
            let _guard = self.parts[part].books.lock(pages);
            return Held::One { _guard };
        }
        // In ascending order, so that two who want each other's do not wait for ever.
        let pieces = pieces(self.shift, range);
        let guards = pieces.map(|(part, piece)| self.parts[part].books.lock(piece));
        let _guards = guards.collect();
        Held::Several { _guards }
    }

    /// The same for a range that was looked at, and the state of all of its pages, which was `uniform` then.
    #[inline(always)]
    pub(crate) fn hold_spot(&self, spot: &Spot, uniform: Option<State>) -> (HeldSpot<'_>, Option<State>) {
        let &Spot { pages, generation, .. } = spot;
        let part = &self.parts[spot.part];
        let (guard, books) = part.books.lock_and_look(pages);
        let same = books.map().generation() == generation;
        let uniform = match same {
            true => uniform,
            false => books.map().uniform(pages),
        };
        let held = HeldSpot {
            part,
            pages,
            guard,
            same,
        };
        (held, uniform)
    }

    /// Takes a change over: bytes whose state it changed. With `quota`, they were reserved if they are shared now.
    pub(crate) fn set(&self, range: Range, to: State, quota: bool) -> u64 {
        // Whoever reserves sees the bytes on one side or the other.
        let reserved = (quota && to == State::Shared).then(|| self.reserved.lock());
        let changed = self.change(range, to);
        if let Some(mut reserved) = reserved {
            *reserved -= changed;
        }
        changed
    }

    fn change(&self, range: Range, to: State) -> u64 {
        if let Some((part, piece)) = self.whole(range) {
            let part = &self.parts[part];
            return part.set(&mut part.books.data(), piece, to, true);
        }
        // All of them at one moment.
        let pieces = pieces(self.shift, range);
        let mut locked: Vec<(&Part, MappedMutexGuard<'_, Books>, Range)> = pieces
            .map(|(part, piece)| (&self.parts[part], self.parts[part].books.data(), piece))
            .collect();
        let mut changed = 0;
        for (part, books, piece) in &mut locked {
            changed += part.set(books, *piece, to, changed == 0);
        }
        changed
    }

    /// Takes note of a change that was undone: a fault from in between does not tell which state its vCPU meant.
    pub(crate) fn disturb(&self, range: Range) {
        for (part, piece) in pieces(self.shift, range) {
            let part = &self.parts[part];
            let mut books = part.books.data();
            books.disturb(piece);
            part.generation.store(books.map().generation(), Ordering::Release);
        }
    }

    /// Whether the page at `gpa` changed after `generation`, of its part. Exact as far as is remembered, else cautious.
    pub(crate) fn state_and_changed(&self, gpa: u64, generation: u64) -> (State, bool) {
        let (part, gpa) = self.locate(gpa);
        let books = self.parts[part].books.data();
        (books.map().state(gpa), books.changed_since(gpa, generation))
    }

    /// How often the page at `gpa` changed since this vCPU began to watch it, which may be now.
    pub(crate) fn watch(&self, vcpu: u32, gpa: u64) -> u64 {
        let (part, gpa) = self.locate(gpa);
        self.parts[part].books.data().watch(vcpu, gpa)
    }

    /// Makes room for so many more shared bytes, if then no more than `max` are shared.
    pub(crate) fn reserve(&self, bytes: u64, max: u64) -> bool {
        let mut reserved = self.reserved.lock();
        let shared = self.memory - self.private_bytes();
        let fits = shared.saturating_add(*reserved).saturating_add(bytes) <= max;
        if fits {
            *reserved += bytes;
        }
        fits
    }

    /// The reserved bytes will not be shared.
    pub(crate) fn release(&self, bytes: u64) {
        *self.reserved.lock() -= bytes;
    }

    /// What a vCPU sees that enters for the first time.
    pub(crate) fn look(&self) -> Seen {
        let mut seen = Seen {
            generations: [0; PARTS as usize],
            stale: u16::MAX,
        };
        self.look_again(&mut seen);
        seen
    }

    /// What a vCPU sees that enters again.
    pub(crate) fn look_again(&self, seen: &mut Seen) {
        while seen.stale != 0 {
            let part = seen.stale.trailing_zeros() as usize;
            seen.stale &= seen.stale - 1;
            if let Some(part_now) = self.parts.get(part) {
                seen.generations[part] = part_now.generation.load(Ordering::Acquire);
            }
        }
    }

    /// What it saw of the part that holds `gpa`, which it has to do with now.
    pub(crate) fn seen(&self, seen: &mut Seen, gpa: u64) -> u64 {
        let (part, _) = self.locate(gpa);
        seen.stale |= 1 << part;
        seen.generations[part]
    }

    /// It has to do with all of a range now.
    #[inline]
    pub(crate) fn touch(&self, seen: &mut Seen, look: &Look) {
        match &look.spot {
            Some(spot) => seen.stale |= 1 << spot.part,
            None => self.touch_several(seen, look.range),
        }
    }

    fn touch_several(&self, seen: &mut Seen, range: Range) {
        let (first, last) = (range.gpa() >> self.shift, (range.end() - 1) >> self.shift);
        seen.stale |= ((2_u32 << last) - (1_u32 << first)) as u16;
    }
}

impl HeldSpot<'_> {
    /// Takes a change of it over, and lets go of it: bytes whose state it changed.
    #[inline(always)]
    pub(crate) fn set(self, to: State) -> u64 {
        let Self { part, pages, guard, .. } = self;
        part.set(&mut guard.finish(), pages, to, true)
    }
}

impl Part {
    /// `first`: nothing was changed elsewhere by the same change.
    #[inline(always)]
    fn set(&self, books: &mut Books, piece: Range, to: State, first: bool) -> u64 {
        let changed = books.set(piece, to);
        if changed > 0 {
            // Nobody else writes these while the books are locked. Release: who finds a change counted enters a guest for
            // which KVM enforces it.
            self.generation.store(books.map().generation(), Ordering::Release);
            self.private_bytes.store(books.map().private_bytes(), Ordering::Release);
            if first {
                let changes = self.changes.load(Ordering::Relaxed);
                self.changes.store(changes + 1, Ordering::Release);
            }
        }
        changed
    }
}

impl Snapshot {
    /// The state of the page that holds `gpa`, which lies in memory.
    pub fn state(&self, gpa: u64) -> State {
        self.parts[(gpa >> self.shift) as usize].state(gpa & ((1 << self.shift) - 1))
    }

    /// Bytes of memory.
    pub fn size(&self) -> u64 {
        self.parts.iter().map(attributes::Snapshot::size).sum()
    }

    /// Bytes that are private.
    pub fn private_bytes(&self) -> u64 {
        self.parts.iter().map(attributes::Snapshot::private_bytes).sum()
    }

    /// How many changes had changed something.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All memory in ascending order, as the fewest possible runs.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let all = Range::new(0, self.size());
        all.into_iter().flat_map(|all| self.runs_in(all))
    }

    /// As [`runs`](Self::runs), of a range only; the first and the last run are cut to it.
    pub fn runs_in(&self, range: Range) -> impl Iterator<Item = Run> + '_ {
        let pieces = pieces(self.shift, range);
        let runs = pieces.flat_map(move |(part, piece)| {
            let runs = self.parts[part].runs_in(piece);
            runs.map(move |run| placed(self.shift, part, run))
        });
        let mut runs = runs.peekable();
        std::iter::from_fn(move || {
            let mut run = runs.next()?;
            while let Some(next) = runs.next_if(|next| next.state == run.state) {
                run.range = joined(run.range, next.range);
            }
            Some(run)
        })
    }
}

/// The parts that a range lies in, ascending, and its pages in each, in the part's addresses.
fn pieces(shift: u32, range: Range) -> impl Iterator<Item = (usize, Range)> {
    let size = 1 << shift;
    let mut left = Some(range);
    std::iter::from_fn(move || {
        let range = left?;
        let start = range.gpa() & (size - 1);
        let len = range.size().min(size - start);
        left = Range::new(range.gpa() + len, range.size() - len);
        Some(((range.gpa() >> shift) as usize, Range::new(start, len)?))
    })
}

/// A part's run in the addresses of the guest.
fn placed(shift: u32, part: usize, run: Run) -> Run {
    moved_by((part as u64) << shift, run)
}

fn moved_by(bytes: u64, run: Run) -> Run {
    Run {
        range: Range::new(run.range.gpa() + bytes, run.range.size()).unwrap_or(run.range),
        state: run.state,
    }
}

/// Two ranges of which the second begins where the first ends.
fn joined(first: Range, second: Range) -> Range {
    Range::new(first.gpa(), first.size() + second.size()).unwrap_or(first)
}

/// Appends runs of which the first may go on with the last one that is there.
fn append(runs: &mut Vec<Run>, more: impl Iterator<Item = Run>) {
    for run in more {
        match runs.last_mut() {
            Some(last) if last.state == run.state => last.range = joined(last.range, run.range),
            _ => runs.push(run),
        }
    }
}

#[cfg(test)]
mod tests;
