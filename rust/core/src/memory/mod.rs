//! Guest memory and the state of each of its pages: the records, their enforcement by KVM, and the way from one state to
//! the other.
//!
//! - [`address`], [`views`]: a page, a range of pages, and the addresses at which they appear
//! - [`backing`]: the host's side of it, a file for each state
//! - [`page_map`]: the state of each page; `page_states`: the map with its locks
//! - `enforcement`: KVM told about it, by attributes or by memslots
//! - [`conversion`]: one transaction from state to state, of [`guest_memory`]
//! - [`listeners`]: who is told of conversions

pub mod address;
pub mod backing;
pub mod conversion;
mod enforcement;
pub mod guest_memory;
pub mod listeners;
pub mod page_map;
mod page_states;
mod range_lock;
pub mod views;
