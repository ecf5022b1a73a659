//! What the fuzz targets do with an input, a module for each. A failed check is a panic. `run` says whether the input was
//! accepted, that is, whether most of the code under test saw it.
//!
//! `fuzz/run` gives them inputs that libFuzzer makes up; the tests give them those of the corpus.
#![allow(clippy::missing_panics_doc)]

pub mod decode;
pub mod image;
pub mod kernel_file;
pub mod linux;
pub mod map_gpa_range;
pub mod page_map;
pub mod ranges;
pub mod trace;
pub mod virtio_block;
pub mod virtio_console;
pub mod virtio_net;
pub mod virtio_registers;
pub mod virtio_rng;
pub mod virtio_vsock;

#[path = "../../rust/core/tests/virtio/driver.rs"]
#[allow(dead_code)]
mod driver;
#[path = "../../rust/core/tests/virtio/rings.rs"]
#[allow(dead_code)]
mod rings;
mod virtio;
mod virtio_queue;
