//! Guest memory, and the state of each of its pages: the page map, its enforcement by KVM, and conversions.
//!
//! - [`address`], [`views`]: pages, ranges of pages, and the addresses at which the guest sees them
//! - [`backing`]: the host's files, one for each side
//! - [`page_map`]: the state of each page; `page_states`: the page map with its locks, `range_lock` among them
//! - `enforcement`: makes KVM enforce states, by attributes, traps or memslots
//! - [`guest_memory`]: all of these together; [`conversion`]: its transaction from one state to the other
//! - [`missing`]: pages that have no bytes yet, and whoever gives them; `lazy`: memory with such pages
//! - `saved`: memory in files, for a snapshot
//! - `shared_pages`: pages that a device holds while it accesses them
//! - [`listeners`]: what is told of conversions, and the pages of which one has to be told (`range_set`); `unpaged`: accesses of vCPUs without paging

pub mod address;
pub mod backing;
pub mod conversion;
mod enforcement;
pub mod guest_memory;
mod lazy;
pub mod listeners;
pub mod missing;
mod open_pages;
pub mod page_map;
mod page_states;
mod range_lock;
mod range_set;
pub(crate) mod saved;
pub(crate) mod shared_pages;
mod unpaged;
pub mod views;

#[cfg(test)]
#[path = "../../tests/common/random.rs"]
mod random;
