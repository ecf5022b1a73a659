//! Chains of built-in policies in any order, against what each of them promises.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pagegate_core::errno::Errno;
use pagegate_core::error::{Error, Failure};
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::views::Views;
use pagegate_core::policy::align::Align;
use pagegate_core::policy::decision::{Convert, Decision};
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::ping_pong::PingPong;
use pagegate_core::policy::quota::Quota;
use pagegate_core::policy::rate_limit::RateLimit;
use pagegate_core::policy::request::{ExplicitRequest, ImplicitRequest, Request};
use pagegate_core::policy::simple::{Allow, DenyAll, ExplicitOnly};
use pagegate_core::policy::trial::{Question, Trial};
use pagegate_core::policy::window::Window;
use parking_lot::Mutex;
use proptest::collection::vec;
use proptest::prelude::*;

const PAGES: u64 = 61;
const MEMORY: u64 = PAGES * PAGE_SIZE;

#[derive(Clone, Debug)]
enum Link {
    /// Blocks of this many pages.
    Align(u64),
    /// First pages and counts.
    Window(Vec<(u64, u64)>),
    /// Pages.
    Quota(u64),
    /// How many requests at once; then hardly any.
    RateLimit(u32),
    PingPong(usize),
}

#[derive(Clone, Debug)]
enum Last {
    Allow,
    DenyAll,
    ExplicitOnly,
    /// These answers in turn: gpa, size, state. Not all of them are decisions.
    Answers(Vec<(Option<u64>, Option<u64>, Option<State>)>),
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    first: u64,
    /// `None`: a fault.
    pages: Option<u64>,
    to: State,
}

impl Ask {
    fn range(&self) -> Range {
        pages(self.first, self.pages.unwrap_or(1))
    }

    fn question(&self) -> Question {
        let memory = Views::new(MEMORY, None, None);
        let (range, to) = (self.range(), self.to);
        match self.pages {
            Some(_) => Question::Explicit(ExplicitRequest {
                vcpu: 0,
                range,
                to,
                page_size: PAGE_SIZE,
                raw: 0,
                state: None,
                time: 0,
                memory,
            }),
            None => Question::Implicit(ImplicitRequest {
                vcpu: 0,
                range,
                access: to,
                flags: 0,
                errno: Errno(libc::EFAULT),
                state: to.other(),
                rip: 0,
                executed: false,
                repeats: 0,
                time: 0,
                memory,
            }),
        }
    }
}

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

/// Counts what it is asked, and notes the last answer.
struct Spy {
    then: Arc<dyn Policy>,
    asked: AtomicUsize,
    answer: Mutex<Option<Decision>>,
}

impl Spy {
    fn on(then: Arc<dyn Policy>) -> Arc<Self> {
        Arc::new(Self {
            then,
            asked: AtomicUsize::new(0),
            answer: Mutex::default(),
        })
    }

    fn noted(&self, answer: Result<Decision, Failure>) -> Result<Decision, Failure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.answer.lock().clone_from(&answer.as_ref().ok().cloned());
        answer
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Policy for Spy {
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        self.noted(self.then.memory_fault(fault))
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        self.noted(self.then.map_gpa_range(call))
    }

    fn converted(&self, request: Request<'_>, range: Range, to: State) {
        self.then.converted(request, range, to);
    }
}

type Answer = (Option<u64>, Option<u64>, Option<State>);

struct Answers(Mutex<Vec<Answer>>);

impl Answers {
    fn next(&self) -> Result<Decision, Failure> {
        let mut answers = self.0.lock();
        answers.rotate_left(1);
        let (gpa, size, to) = answers[0];
        Ok(Decision::Convert(Convert {
            to,
            gpa,
            size,
            ..Convert::default()
        }))
    }
}

impl Policy for Answers {
    fn memory_fault(&self, _: &ImplicitRequest) -> Result<Decision, Failure> {
        self.next()
    }

    fn map_gpa_range(&self, _: &ExplicitRequest) -> Result<Decision, Failure> {
        self.next()
    }
}

/// What a PingPong saw of a page: the state that was last asked for or converted to, and how often that changed.
type Turns = BTreeMap<u64, (State, usize)>;

/// Notes that these pages are to be in this state. Returns the most changes of one of them.
fn note(turns: &mut Turns, pages: std::ops::Range<u64>, state: State) -> usize {
    let mut most = 0;
    for page in pages {
        let (to, count) = turns.entry(page).or_insert((state, 0));
        *count += usize::from(*to != state);
        *to = state;
        most = most.max(*count);
    }
    most
}

/// A chain, with a spy on each policy, the last one first, and what each PingPong saw.
struct Chain {
    links: Vec<Link>,
    last: Last,
    spies: Vec<Arc<Spy>>,
    turns: Vec<Turns>,
    trial: Trial,
}

impl Chain {
    fn new(links: Vec<Link>, last: Last, initial: State) -> Self {
        let policy: Arc<dyn Policy> = match &last {
            Last::Allow => Arc::new(Allow),
            Last::DenyAll => Arc::new(DenyAll {
                errno: Errno(libc::EPERM),
            }),
            Last::ExplicitOnly => Arc::new(ExplicitOnly),
            Last::Answers(answers) => Arc::new(Answers(Mutex::new(answers.clone()))),
        };
        let mut spies = vec![Spy::on(policy)];
        for link in &links {
            let then: Arc<dyn Policy> = spies.last().unwrap().clone();
            let policy: Arc<dyn Policy> = match link {
                Link::Align(pages) => Arc::new(Align::new(pages * PAGE_SIZE, then).unwrap()),
                Link::Window(ranges) => Arc::new(Window {
                    ranges: ranges.iter().map(|(first, count)| pages(*first, *count)).collect(),
                    then,
                }),
                Link::Quota(pages) => Arc::new(Quota {
                    max_shared: pages * PAGE_SIZE,
                    then,
                }),
                Link::RateLimit(burst) => Arc::new(RateLimit::new(1e-9, *burst, then).unwrap()),
                Link::PingPong(limit) => Arc::new(PingPong::new(*limit, Duration::from_secs(1), then).unwrap()),
            };
            spies.push(Spy::on(policy));
        }
        let trial = Trial::new(spies.last().unwrap().clone(), MEMORY, initial).unwrap();
        Self {
            turns: vec![Turns::new(); links.len()],
            links,
            last,
            spies,
            trial,
        }
    }

    fn states(&self) -> Vec<State> {
        let page = |page: u64| self.trial.state(page * PAGE_SIZE, PAGE_SIZE).unwrap().unwrap();
        (0..PAGES).map(page).collect()
    }

    fn ask(&mut self, ask: Ask) {
        let before = self.states();
        let asked: Vec<usize> = self.spies.iter().map(|spy| spy.asked()).collect();
        let decided = self.trial.judge(&ask.question());
        let after = self.states();
        let reached: Vec<bool> = self
            .spies
            .iter()
            .zip(asked)
            .map(|(spy, asked)| spy.asked() > asked)
            .collect();
        let changed: Vec<u64> = (0..PAGES)
            .filter(|page| before[*page as usize] != after[*page as usize])
            .collect();
        let shared = after.iter().filter(|state| **state == State::Shared).count() as u64;
        let shares = changed.iter().any(|page| after[*page as usize] == State::Shared);
        for (i, link) in self.links.iter().enumerate() {
            match link {
                Link::Window(ranges) => {
                    let inside = |page: &u64| {
                        ranges
                            .iter()
                            .any(|(first, count)| (*first..first + count).contains(page))
                    };
                    assert!(!shares || changed.iter().all(inside), "{link:?} was left: {changed:?}");
                }
                Link::Quota(most) => assert!(!shares || shared <= *most, "{shared} are above {link:?}"),
                Link::RateLimit(burst) => assert!(self.spies[i].asked() <= *burst as usize, "more than {link:?}"),
                Link::PingPong(limit) if reached[i + 1] => {
                    let turns = &mut self.turns[i];
                    let most = note(turns, ask.first..ask.first + ask.pages.unwrap_or(1), ask.to);
                    if most > *limit {
                        let stopped = matches!(&decided, Ok(Decision::Stop(reason)) if reason.starts_with("ping-pong"));
                        assert!(stopped, "{most} times: {decided:?}");
                        turns.retain(|page, _| !ask.range().contains(page * PAGE_SIZE));
                    }
                }
                Link::PingPong(_) | Link::Align(_) => {}
            }
        }
        if let Ok(Decision::Convert(done)) = &decided {
            let to = done.to.unwrap_or(ask.to);
            let first = done.gpa.unwrap_or(ask.range().gpa()) / PAGE_SIZE;
            let count = done.size.unwrap_or(ask.range().size()) / PAGE_SIZE;
            for turns in &mut self.turns {
                note(turns, first..first + count, to);
            }
        }
        let first = self.spies[0].answer.lock().take().filter(|_| reached[0]);
        let Some(Decision::Convert(convert)) = first else {
            assert_eq!(changed, [0; 0], "it was not allowed: {decided:?}");
            assert!(!matches!(decided, Ok(Decision::Convert(_))), "{decided:?}");
            return;
        };
        let (gpa, size) = (
            convert.gpa.unwrap_or(ask.range().gpa()),
            convert.size.unwrap_or(ask.range().size()),
        );
        let Some(named) = Range::new(gpa, size).filter(|range| range.end() <= MEMORY) else {
            assert!(
                matches!(decided, Err(Error::Hook { .. })),
                "{gpa:#x} + {size:#x}: {decided:?}"
            );
            assert_eq!(changed, [0; 0]);
            return;
        };
        match decided.unwrap() {
            Decision::Convert(done) => self.check_extent(named, &done, ask, &after),
            Decision::Deny(_) => assert_eq!(changed, [0; 0]),
            other => panic!("{other:?}"),
        }
    }

    /// Checks that a conversion of `named` was widened to whole blocks, or as far as it may be.
    fn check_extent(&self, named: Range, done: &Convert, ask: Ask, after: &[State]) {
        let to = done.to.unwrap_or(ask.to);
        let (gpa, size) = (
            done.gpa.unwrap_or(ask.range().gpa()),
            done.size.unwrap_or(ask.range().size()),
        );
        let block = self.links.iter().fold(1, |most, link| match link {
            Link::Align(pages) => most.max(*pages),
            _ => most,
        }) * PAGE_SIZE;
        let (mut start, mut end) = (named.gpa() / block * block, named.end().div_ceil(block) * block);
        end = end.min(MEMORY);
        let mut quota = false;
        for link in &self.links {
            match link {
                Link::Window(ranges) if to == State::Shared => {
                    let mut windows = ranges.iter().map(|(first, count)| pages(*first, *count));
                    let window = windows.find(|window| window.intersect(&named) == Some(named)).unwrap();
                    (start, end) = (start.max(window.gpa()), end.min(window.end()));
                }
                Link::Quota(_) => quota |= to == State::Shared,
                _ => {}
            }
        }
        let wide = (start, end - start);
        let is_as_named = quota && (gpa, size) == (named.gpa(), named.size());
        assert!(
            (gpa, size) == wide || is_as_named,
            "{gpa:#x} + {size:#x} is not {wide:x?}"
        );
        for page in gpa / PAGE_SIZE..(gpa + size) / PAGE_SIZE {
            assert_eq!(after[page as usize], to);
        }
    }
}

fn states() -> impl Strategy<Value = State> {
    prop_oneof![3 => Just(State::Shared), 1 => Just(State::Private)]
}

fn spans() -> impl Strategy<Value = (u64, u64)> {
    (0..PAGES).prop_flat_map(|first| (Just(first), 1..=(PAGES - first).min(24)))
}

fn links() -> impl Strategy<Value = Link> {
    prop_oneof![
        3 => (0..6_u32).prop_map(|power| Link::Align(1 << power)),
        3 => vec(spans(), 1..4).prop_map(Link::Window),
        2 => (0..PAGES + 2).prop_map(Link::Quota),
        1 => (1..8_u32).prop_map(Link::RateLimit),
        1 => (1..4_usize).prop_map(Link::PingPong),
    ]
}

fn answers() -> impl Strategy<Value = Answer> {
    let page = |page: u64| page * PAGE_SIZE;
    let gpa = prop_oneof![6 => (0..PAGES).prop_map(page), 1 => 0..2 * MEMORY, 1 => any::<u64>()];
    let size = prop_oneof![6 => (1..6_u64).prop_map(page), 1 => Just(0), 1 => Just(1), 1 => any::<u64>()];
    (
        prop::option::of(gpa),
        prop::option::of(size),
        prop::option::weighted(0.2, states()),
    )
}

fn lasts() -> impl Strategy<Value = Last> {
    prop_oneof![
        4 => Just(Last::Allow),
        1 => Just(Last::DenyAll),
        1 => Just(Last::ExplicitOnly),
        4 => vec(answers(), 1..6).prop_map(Last::Answers),
    ]
}

fn asks() -> impl Strategy<Value = Ask> {
    let explicit = (spans(), states()).prop_map(|((first, pages), to)| Ask {
        first,
        pages: Some(pages),
        to,
    });
    let implicit = (0..PAGES, states()).prop_map(|(first, to)| Ask { first, pages: None, to });
    prop_oneof![explicit, implicit]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn each_policy_of_a_chain_keeps_its_promise(
        links in vec(links(), 0..6),
        last in lasts(),
        initial in states(),
        asks in vec(asks(), 1..16),
    ) {
        let denies = |ask: &Ask| match last {
            Last::DenyAll => true,
            Last::ExplicitOnly => ask.pages.is_none(),
            Last::Allow | Last::Answers(_) => false,
        };
        let mut chain = Chain::new(links, last.clone(), initial);
        for ask in asks {
            let before = chain.states();
            chain.ask(ask);
            prop_assert!(!denies(&ask) || chain.states() == before, "{:?} let {ask:?} through", chain.last);
        }
    }
}
