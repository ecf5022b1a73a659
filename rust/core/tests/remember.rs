//! Remembered decisions, against a model that keeps, for each target state and each page, the last one that covers it.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use pagegate_core::errno::Errno;
use pagegate_core::error::Failure;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::views::Views;
use pagegate_core::policy::decision::{Convert, Decision, Region, RegionDecision};
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::remember::{MAX_PIECES, Remember};
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
        memory: Views::new(MEMORY, None, None),
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

/// A policy that gives the answer that the test set, and counts how often it was asked.
#[derive(Default)]
struct Scripted {
    answer: Mutex<Option<Answer>>,
    asked: AtomicU64,
    /// Whether it forgets everything while it is asked.
    forgets: Option<Weak<Remember<Scripted>>>,
}

impl Policy for Scripted {
    fn map_gpa_range(&self, _: &ExplicitRequest) -> Result<Decision, Failure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if let Some(rules) = self.forgets.as_ref().and_then(Weak::upgrade) {
            rules.forget(None);
        }
        let (decision, region) = self.answer.lock().unwrap().take().unwrap();
        Ok(match region {
            Some(region) => Decision::Remember(Box::new(RegionDecision { decision, region })),
            None => decision,
        })
    }
}

fn rules() -> Remember<Scripted> {
    Remember::new(Scripted::default())
}

fn asked(rules: &Remember<Scripted>) -> u64 {
    rules.policy().asked.load(Ordering::Relaxed)
}

/// The answer, and whether the policy inside was asked.
fn ask(
    rules: &Remember<Scripted>,
    call: &ExplicitRequest,
    decision: Decision,
    remember: Option<Region>,
) -> (Result<Decision, Failure>, bool) {
    *rules.policy().answer.lock().unwrap() = Some((decision, remember));
    let before = asked(rules);
    let answer = rules.map_gpa_range(call);
    (answer, asked(rules) > before)
}

fn remembered(rules: &Remember<Scripted>, call: &ExplicitRequest) -> Option<Decision> {
    let (answer, asked) = ask(rules, call, Decision::Stop("asked".to_owned()), None);
    (!asked).then(|| answer.unwrap())
}

#[derive(Clone, Debug)]
enum Step {
    Decide {
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
            .prop_map(|(at, to, region, uses, seconds)| Step::Decide { at, to, region, uses, seconds }),
        5 => (parts(), states()).prop_map(|(at, to)| Step::Ask { at, to }),
        1 => prop::option::of(parts()).prop_map(Step::Forget),
    ]
}

struct Rule {
    errno: i32,
    left: u64,
    until: u64,
}

proptest! {
    #[test]
    fn agrees_with_the_model(steps in prop::collection::vec(steps(), 1..60)) {
        let rules = rules();
        let mut made: Vec<Rule> = Vec::new();
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
                Step::Decide { at, to, region, uses, seconds } => (at, to, Some((region, uses, seconds))),
            };
            let asked_for: Vec<_> = (at.0..at.0 + at.1).map(|page| pages.get(&(to, page)).copied()).collect();
            let known = asked_for[0]
                .filter(|rule| asked_for.iter().all(|each| *each == Some(*rule)))
                .filter(|rule| made[*rule].left > 0 && time < made[*rule].until);
            let call = call(range(at.0, at.1), to, time);
            let errno = 1 + made.len() as i32;
            let remembered_in = remember.map(|(part, uses, nanoseconds)| Region {
                range: range(part.0, part.1),
                uses,
                nanoseconds,
            });
            let (answer, asked) = ask(&rules, &call, Decision::Deny(Errno(errno)), remembered_in);
            prop_assert_eq!(asked, known.is_none());
            let Some(known) = known else {
                seen += 1;
                prop_assert_eq!(answer.unwrap(), Decision::Deny(Errno(errno)));
                if let Some(((start, len), uses, nanoseconds)) = remember {
                    let until = nanoseconds.map_or(u64::MAX, |nanoseconds| time + nanoseconds);
                    for page in start..start + len {
                        pages.insert((to, page), made.len());
                    }
                    made.push(Rule { errno, left: uses.unwrap_or(u64::MAX), until });
                }
                continue;
            };
            spared += 1;
            made[known].left -= 1;
            prop_assert_eq!(answer.unwrap(), Decision::Deny(Errno(made[known].errno)));
        }
        prop_assert_eq!((asked(&rules), rules.spared()), (seen, spared));
    }
}

#[test]
fn a_decision_made_while_the_rules_are_forgotten_is_not_remembered() {
    let rules = Arc::new_cyclic(|rules| {
        Remember::new(Scripted {
            forgets: Some(rules.clone()),
            ..Scripted::default()
        })
    });
    let call = call(range(0, 1), State::Shared, 0);
    let (answer, _) = ask(&rules, &call, Decision::Retry, Some(region(range(0, 4))));
    assert_eq!(answer.unwrap(), Decision::Retry);
    assert_eq!(remembered(&rules, &call), None);
}

#[test]
fn a_guest_cannot_make_the_rules_grow_without_bound() {
    let rules = rules();
    let most = MAX_PIECES as u64;
    for page in 0..most + 100 {
        let call = call(range(2 * page, 1), State::Shared, page);
        let (_, asked) = ask(&rules, &call, Decision::Retry, Some(region(range(2 * page, 1))));
        assert!(asked);
    }
    let known = |page: u64| remembered(&rules, &call(range(2 * page, 1), State::Shared, 0)).is_some();
    assert!(!known(0) && !known(99), "the oldest are out");
    assert!((100..most + 100).all(known));
}

#[test]
fn a_rule_cut_into_many_pieces_leaves_room_for_others() {
    let rules = rules();
    let all = range(0, 4 * MAX_PIECES as u64);
    let _ = ask(
        &rules,
        &call(range(0, 1), State::Shared, 0),
        Decision::Retry,
        Some(region(all)),
    );
    // Each cuts the first rule in two once more, so that most of what is kept are its pieces.
    for page in 0..MAX_PIECES as u64 {
        rules.forget(Some(range(4 * page + 1, 1)));
        let call = call(range(4 * page + 1, 1), State::Shared, 0);
        let _ = ask(&rules, &call, Decision::Retry, Some(region(range(4 * page + 1, 1))));
    }
    let last = call(range(4 * (MAX_PIECES as u64 - 1) + 1, 1), State::Shared, 0);
    assert_eq!(remembered(&rules, &last), Some(Decision::Retry));
}

#[test]
fn a_remembered_conversion_is_of_the_same_pages_for_each_request() {
    let rules = rules();
    let wider = Convert {
        size: Some(8 * PAGE_SIZE),
        ..Convert::default()
    };
    let first = call(range(0, 1), State::Shared, 0);
    let (answer, _) = ask(
        &rules,
        &first,
        Decision::Convert(wider.clone()),
        Some(region(range(0, 8))),
    );
    assert_eq!(answer.unwrap(), Decision::Convert(wider.clone()));
    let whole = Convert { gpa: Some(0), ..wider };
    let later = call(range(5, 1), State::Shared, 0);
    assert_eq!(remembered(&rules, &later), Some(Decision::Convert(whole)));
}

#[test]
fn decisions_that_cannot_be_remembered_are_errors() {
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
        assert_eq!(remembered(&rules, &first), None);
    }
}
