//! The page map against models that keep each page or each run in a plain list.

mod models;

mod map;
mod panics;
mod random_steps;
mod ranges;
