//! The core of pagegate: a virtual machine that stops at a gate whenever its guest asks for a page to change hands
//! between private and shared, or touches one that is in the wrong hands.
//!
//! The way of a request: [`hypervisor`] (exit), [`decode`], [`policy`], [`convert`], [`events`] (record), and resume,
//! one after the other in `run`.

pub mod attributes;
mod books;
pub mod boot;
mod clock;
mod control;
pub mod convert;
pub mod decode;
pub mod devices;
mod enforce;
pub mod errno;
pub mod error;
pub mod events;
pub mod explicit;
pub mod guests;
pub mod hypervisor;
pub mod image;
mod kick;
pub mod latency;
pub mod ledger;
pub mod listener;
pub mod machine;
pub mod memory;
pub mod model;
pub mod policies;
pub mod policy;
pub mod probe;
mod range_lock;
pub mod report;
pub mod rules;
pub mod run;
mod slots;
mod sys;
pub mod trace;
mod vcpu;
pub mod views;
mod world;

pub use enforce::Mode;
