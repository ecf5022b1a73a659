//! Kernel files: good ones are read, their payload is decompressed and their symbols are found; others are refused with
//! a reason, and damaged ones without a panic.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod compressed;
mod elf;
mod image;
mod kallsyms_model;

mod damage;
mod files;
mod payloads;
mod real;
mod stripped;
mod symtab;
mod watched;
