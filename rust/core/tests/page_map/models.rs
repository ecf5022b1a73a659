//! Models of a page map: a plain list of pages, and a plain list of runs.

use pagegate_core::memory::address::*;

pub const BLOCK: u64 = 512;
pub const LEAF: u64 = 64 * BLOCK;
pub const BRANCH: u64 = 64 * LEAF;
pub const ROOT_WORD: u64 = 64 * BRANCH;
pub const TIB: u64 = 1 << 40;

/// The pages `[first, end)`.
pub fn pages(first: u64, end: u64) -> Range {
    Range::new(first * PAGE_SIZE, (end - first) * PAGE_SIZE).expect("a valid range")
}

pub fn run(first: u64, end: u64, state: State) -> Run {
    Run {
        range: pages(first, end),
        state,
    }
}

/// The first page of `range` and the first one past it.
pub fn span(range: Range) -> (u64, u64) {
    (range.gpa() / PAGE_SIZE, range.end() / PAGE_SIZE)
}

/// The pages from `first` on, in these states, as maximal runs.
fn collect(first: u64, states: &[State]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (page, state) in (first..).zip(states) {
        match runs.last_mut() {
            Some(last) if last.state == *state => {
                *last = run(last.range.gpa() / PAGE_SIZE, page + 1, *state);
            }
            _ => runs.push(run(page, page + 1, *state)),
        }
    }
    runs
}

/// One entry a page.
#[derive(Clone)]
pub struct PageList {
    pub states: Vec<State>,
    pub generation: u64,
    pub stamps: Vec<u64>,
}

impl PageList {
    pub fn new(pages: u64, initial: State) -> Self {
        Self {
            states: vec![initial; pages as usize],
            generation: 0,
            stamps: vec![0; pages.div_ceil(BLOCK) as usize],
        }
    }

    pub fn set(&mut self, range: Range, to: State) -> u64 {
        let (first, end) = span(range);
        let mut changed = 0;
        for page in first..end {
            if self.states[page as usize] != to {
                self.states[page as usize] = to;
                self.stamps[(page / BLOCK) as usize] = self.generation + 1;
                changed += PAGE_SIZE;
            }
        }
        self.generation += u64::from(changed > 0);
        changed
    }

    fn slice(&self, range: Range) -> &[State] {
        let (first, end) = span(range);
        &self.states[first as usize..end as usize]
    }

    pub fn uniform(&self, range: Range) -> Option<State> {
        let slice = self.slice(range);
        slice.iter().all(|state| *state == slice[0]).then(|| slice[0])
    }

    pub fn runs_in(&self, range: Range) -> Vec<Run> {
        collect(span(range).0, self.slice(range))
    }

    pub fn all(&self) -> Range {
        pages(0, self.states.len() as u64)
    }

    pub fn private_bytes(&self) -> u64 {
        self.states.iter().filter(|state| **state == State::Private).count() as u64 * PAGE_SIZE
    }
}

/// One entry a run, for memories of which a page list would be too long.
#[derive(Clone)]
pub struct RunList(pub Vec<Run>);

impl RunList {
    fn push(runs: &mut Vec<Run>, range: Option<Range>, state: State) {
        let Some(range) = range else { return };
        match runs.last_mut() {
            Some(last) if last.state == state && last.range.end() == range.gpa() => {
                let size = last.range.size() + range.size();
                last.range = Range::new(last.range.gpa(), size).expect("a valid range");
            }
            _ => runs.push(Run { range, state }),
        }
    }

    fn part(range: Range, from: u64, to: u64) -> Option<Range> {
        range.intersect(&Range::new(from, to.checked_sub(from)?)?)
    }

    pub fn set(&mut self, range: Range, to: State) -> u64 {
        let mut runs = Vec::new();
        let mut changed = 0;
        let size = self.0.last().map_or(0, |last| last.range.end());
        for old in &self.0 {
            Self::push(&mut runs, Self::part(old.range, 0, range.gpa()), old.state);
            let inside = old.range.intersect(&range);
            if old.state != to {
                changed += inside.map_or(0, |inside| inside.size());
            }
            Self::push(&mut runs, inside, to);
            Self::push(&mut runs, Self::part(old.range, range.end(), size), old.state);
        }
        self.0 = runs;
        changed
    }

    pub fn runs_in(&self, range: Range) -> Vec<Run> {
        let clip = |run: &Run| {
            Some(Run {
                range: run.range.intersect(&range)?,
                ..*run
            })
        };
        self.0.iter().filter_map(clip).collect()
    }

    pub fn uniform(&self, range: Range) -> Option<State> {
        let runs = self.runs_in(range);
        (runs.len() == 1).then(|| runs[0].state)
    }

    pub fn private_bytes(&self) -> u64 {
        let private = self.0.iter().filter(|run| run.state == State::Private);
        private.map(|run| run.range.size()).sum()
    }
}
