//! What panics: pages outside memory, and a size that is not a positive number of pages.

use pagegate_core::memory::{address::*, page_map::*};

use crate::models::pages;

fn map() -> AttributeMap {
    AttributeMap::new(3 * PAGE_SIZE, State::Shared)
}

#[test]
#[should_panic(expected = "gpa 0x3000 lies outside of memory, which ends at 0x3000")]
fn state_outside_memory() {
    map().state(0x3000);
}

#[test]
#[should_panic(expected = "range [0x2000, 0x4000) lies outside of memory")]
fn set_outside_memory() {
    map().set(pages(2, 4), State::Private);
}

#[test]
#[should_panic(expected = "range [0x3000, 0x4000) lies outside of memory")]
fn uniform_outside_memory() {
    map().uniform(pages(3, 4));
}

#[test]
#[should_panic(expected = "lies outside of memory")]
fn runs_in_outside_memory() {
    let _ = map().runs_in(pages(0, 4)).count();
}

#[test]
#[should_panic(expected = "lies outside of memory")]
fn changed_since_outside_memory() {
    map().changed_since(0x3000, 0);
}

#[test]
#[should_panic(expected = "memory size 0x0 is not a positive multiple")]
fn memory_of_no_bytes() {
    AttributeMap::new(0, State::Shared);
}

#[test]
#[should_panic(expected = "memory size 0x1001 is not a positive multiple")]
fn memory_of_part_of_a_page() {
    AttributeMap::new(0x1001, State::Shared);
}
