//! Rules against a model that keeps, for each kind of request and each page, which lesson it was taught last.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use pagegate_core::errno::Errno;
use pagegate_core::error::Failure;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::policy::decision::{Convert, Decision, Lesson, Region};
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::remember::{MOST, Remember};
use pagegate_core::policy::request::ExplicitRequest;
use proptest::prelude::*;

const PAGES: u64 = 16;
const MEMORY: u64 = 1 << 40;

fn range(page: u64, pages: u64) -> Range {
    Range::new(page * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

fn call(range: Range, to: State, time: u64) -> ExplicitRequest {
    ExplicitRequest {
        vcpu: 0,
        range,
        to,
        page_size: PAGE_SIZE,
        raw: 0,
        state: None,
        time,
        memory: MEMORY,
    }
}

fn region(range: Range) -> Region {
    Region {
        range,
        uses: None,
        nanoseconds: None,
    }
}

type Answer = (Decision, Option<Region>);

/// Answers what it is told to, and counts how often it was asked.
#[derive(Default)]
struct Teacher {
    answer: Mutex<Option<Answer>>,
    asked: AtomicU64,
    /// Whether it forgets everything while it is asked.
    forgets: Option<Weak<Remember<Teacher>>>,
}

impl Policy for Teacher {
    fn map_gpa_range(&self, _: &ExplicitRequest) -> Result<Decision, Failure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if let Some(rules) = self.forgets.as_ref().and_then(Weak::upgrade) {
            rules.forget(None);
        }
        let (decision, region) = self.answer.lock().unwrap().take().unwrap();
        Ok(match region {
            Some(region) => Decision::Remember(Box::new(Lesson { decision, region })),
            None => decision,
        })
    }
}

fn rules() -> Remember<Teacher> {
    Remember::new(Teacher::default())
}

fn asked(rules: &Remember<Teacher>) -> u64 {
    rules.policy().asked.load(Ordering::Relaxed)
}

/// The answer, and whether the teacher was asked.
fn ask(
    rules: &Remember<Teacher>,
    call: &ExplicitRequest,
    decision: Decision,
    remember: Option<Region>,
) -> (Result<Decision, Failure>, bool) {
    *rules.policy().answer.lock().unwrap() = Some((decision, remember));
    let before = asked(rules);
    let answer = rules.map_gpa_range(call);
    (answer, asked(rules) > before)
}

fn taught(rules: &Remember<Teacher>, call: &ExplicitRequest) -> Option<Decision> {
    let (answer, asked) = ask(rules, call, Decision::Stop("asked".to_owned()), None);
    (!asked).then(|| answer.unwrap())
}

#[derive(Clone, Debug)]
enum Step {
    Teach {
        at: (u64, u64),
        to: State,
        region: (u64, u64),
        uses: Option<u64>,
        seconds: Option<u64>,
    },
    Ask {
        at: (u64, u64),
        to: State,
    },
    Forget(Option<(u64, u64)>),
}

fn parts() -> impl Strategy<Value = (u64, u64)> {
    (0..PAGES).prop_flat_map(|page| (Just(page), 1..=PAGES - page))
}

fn states() -> impl Strategy<Value = State> {
    prop_oneof![Just(State::Private), Just(State::Shared)]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (parts(), states(), parts(), prop::option::of(1..4_u64), prop::option::of(1..20_u64))
            .prop_map(|(at, to, region, uses, seconds)| Step::Teach { at, to, region, uses, seconds }),
        5 => (parts(), states()).prop_map(|(at, to)| Step::Ask { at, to }),
        1 => prop::option::of(parts()).prop_map(Step::Forget),
    ]
}

struct Taught {
    errno: i32,
    left: u64,
    until: u64,
}

proptest! {
    #[test]
    fn as_the_model(steps in prop::collection::vec(steps(), 1..60)) {
        let rules = rules();
        let mut lessons: Vec<Taught> = Vec::new();
        let mut pages: HashMap<(State, u64), usize> = HashMap::new();
        let (mut seen, mut spared) = (0, 0);
        for (time, step) in steps.into_iter().enumerate() {
            let time = time as u64;
            let (at, to, remember) = match step {
                Step::Forget(part) => {
                    rules.forget(part.map(|(page, len)| range(page, len)));
                    pages.retain(|(_, page), _| {
                        part.is_some_and(|(start, len)| !(start..start + len).contains(page))
                    });
                    continue;
                }
                Step::Ask { at, to } => (at, to, None),
                Step::Teach { at, to, region, uses, seconds } => (at, to, Some((region, uses, seconds))),
            };
            let asked_for: Vec<_> = (at.0..at.0 + at.1).map(|page| pages.get(&(to, page)).copied()).collect();
            let known = asked_for[0]
                .filter(|lesson| asked_for.iter().all(|each| *each == Some(*lesson)))
                .filter(|lesson| lessons[*lesson].left > 0 && time < lessons[*lesson].until);
            let call = call(range(at.0, at.1), to, time);
            let errno = 1 + lessons.len() as i32;
            let lesson = remember.map(|(part, uses, nanoseconds)| Region {
                range: range(part.0, part.1),
                uses,
                nanoseconds,
            });
            let (answer, asked) = ask(&rules, &call, Decision::Deny(Errno(errno)), lesson);
            prop_assert_eq!(asked, known.is_none());
            let Some(known) = known else {
                seen += 1;
                prop_assert_eq!(answer.unwrap(), Decision::Deny(Errno(errno)));
                if let Some(((start, len), uses, nanoseconds)) = remember {
                    let until = nanoseconds.map_or(u64::MAX, |nanoseconds| time + nanoseconds);
                    for page in start..start + len {
                        pages.insert((to, page), lessons.len());
                    }
                    lessons.push(Taught { errno, left: uses.unwrap_or(u64::MAX), until });
                }
                continue;
            };
            spared += 1;
            lessons[known].left -= 1;
            prop_assert_eq!(answer.unwrap(), Decision::Deny(Errno(lessons[known].errno)));
        }
        prop_assert_eq!((asked(&rules), rules.spared()), (seen, spared));
    }
}

#[test]
fn what_is_asked_while_rules_are_forgotten_teaches_nothing() {
    let rules = Arc::new_cyclic(|rules| {
        Remember::new(Teacher {
            forgets: Some(rules.clone()),
            ..Teacher::default()
        })
    });
    let call = call(range(0, 1), State::Shared, 0);
    let (answer, _) = ask(&rules, &call, Decision::Retry, Some(region(range(0, 4))));
    assert_eq!(answer.unwrap(), Decision::Retry);
    assert_eq!(taught(&rules, &call), None);
}

#[test]
fn no_guest_makes_them_grow() {
    let rules = rules();
    let most = MOST as u64;
    for page in 0..most + 100 {
        let call = call(range(2 * page, 1), State::Shared, page);
        let (_, asked) = ask(&rules, &call, Decision::Retry, Some(region(range(2 * page, 1))));
        assert!(asked);
    }
    let known = |page: u64| taught(&rules, &call(range(2 * page, 1), State::Shared, 0)).is_some();
    assert!(!known(0) && !known(99), "the oldest are out");
    assert!((100..most + 100).all(known));
}

#[test]
fn one_rule_in_many_pieces_leaves_room() {
    let rules = rules();
    let all = range(0, 4 * MOST as u64);
    let _ = ask(
        &rules,
        &call(range(0, 1), State::Shared, 0),
        Decision::Retry,
        Some(region(all)),
    );
    // Each cuts a piece off the first one, whose pieces are then the most of all.
    for page in 0..MOST as u64 {
        rules.forget(Some(range(4 * page + 1, 1)));
        let call = call(range(4 * page + 1, 1), State::Shared, 0);
        let _ = ask(&rules, &call, Decision::Retry, Some(region(range(4 * page + 1, 1))));
    }
    let last = call(range(4 * (MOST as u64 - 1) + 1, 1), State::Shared, 0);
    assert_eq!(taught(&rules, &last), Some(Decision::Retry));
}

#[test]
fn other_pages_are_remembered_as_they_were() {
    let rules = rules();
    let wider = Convert {
        size: Some(8 * PAGE_SIZE),
        ..Convert::default()
    };
    let first = call(range(0, 1), State::Shared, 0);
    let (answer, _) = ask(&rules, &first, Decision::Convert(wider), Some(region(range(0, 8))));
    assert_eq!(answer.unwrap(), Decision::Convert(wider));
    let whole = Convert { gpa: Some(0), ..wider };
    let later = call(range(5, 1), State::Shared, 0);
    assert_eq!(taught(&rules, &later), Some(Decision::Convert(whole)));
}

#[test]
fn what_cannot_be_remembered() {
    let rules = rules();
    let first = call(range(0, 1), State::Shared, 0);
    let narrow = Convert {
        gpa: Some(0),
        ..Convert::default()
    };
    let beyond = region(Range::new(MEMORY, PAGE_SIZE).unwrap());
    let wrong = [
        (Decision::Convert(narrow), region(range(0, 2))),
        (Decision::Stop("enough".to_owned()), region(range(0, 1))),
        (Decision::Discard, region(range(0, 1))),
        (Decision::Retry, beyond),
    ];
    for (decision, region) in wrong {
        let (answer, _) = ask(&rules, &first, decision.clone(), Some(region));
        assert!(answer.is_err(), "{decision:?}");
        assert_eq!(taught(&rules, &first), None);
    }
}
