//! Guest memory, and the state of each of its pages: the page map, its enforcement by KVM, and conversions.
//!
//! - [`address`], [`views`]: pages, ranges of pages, and the addresses at which the guest sees them
//! - [`backing`]: the host's files, one for each side
//! - [`page_map`]: the state of each page; `page_states`: the page map with its locks, `range_lock` among them
//! - `enforcement`: makes KVM enforce states, by attributes or by memslots
//! - [`guest_memory`]: all of these together; [`conversion`]: its transaction from one state to the other
//! - [`listeners`]: what is told of conversions

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
