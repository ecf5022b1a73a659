//! `PingPong` against a count for each page.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::views::Views;
use pagegate_core::policy::decision::Decision;
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::ping_pong::PingPong;
use pagegate_core::policy::request::ExplicitRequest;
use pagegate_core::policy::simple::Allow;
use proptest::prelude::*;

const PAGES: u64 = 12;
const LIMIT: usize = 3;
/// In the model's unit of time.
const WINDOW: u64 = 20;

fn call(first: u64, pages: u64, to: State, time: u64) -> ExplicitRequest {
    ExplicitRequest {
        vcpu: 0,
        range: Range::new(first * PAGE_SIZE, pages * PAGE_SIZE).unwrap(),
        to,
        page_size: PAGE_SIZE,
        raw: 0,
        state: None,
        time,
        memory: Views::new(PAGES * PAGE_SIZE, None, None),
    }
}

/// What was asked for each page, and when that changed.
#[derive(Default)]
struct Model(HashMap<u64, (State, Vec<u64>)>);

impl Model {
    /// Whether this request is one change too many.
    fn ask(&mut self, pages: std::ops::Range<u64>, to: State, now: u64) -> bool {
        let mut over = false;
        for page in pages {
            let (last, turns) = self.0.entry(page).or_insert((to, Vec::new()));
            if *last != to {
                *last = to;
                turns.push(now);
            }
            turns.retain(|turn| now - turn <= WINDOW);
            over |= turns.len() > LIMIT;
        }
        over
    }
}

proptest! {
    #[test]
    fn it_stops_when_one_page_changed_too_often(
        requests in prop::collection::vec((0..PAGES, 1..PAGES, any::<bool>(), 0..8u64), 1..60),
    ) {
        let policy = PingPong::new(LIMIT, Duration::from_nanos(WINDOW), Arc::new(Allow)).unwrap();
        let (mut model, mut now) = (Model::default(), 0);
        for (first, pages, private, passed) in requests {
            now += passed;
            let pages = pages.min(PAGES - first);
            let to = if private { State::Private } else { State::Shared };
            let decision = policy.map_gpa_range(&call(first, pages, to, now)).unwrap();
            let over = model.ask(first..first + pages, to, now);
            prop_assert_eq!(matches!(decision, Decision::Stop(_)), over);
            if over {
                break;
            }
        }
    }
}
