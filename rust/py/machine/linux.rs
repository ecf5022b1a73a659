//! Booting Linux, and its console.

use std::path::Path;

use pagegate_core::boot::kernel_file::KernelFile;
use pagegate_core::error::Error;
use pagegate_core::machine::assembly::Machine;
use pyo3::prelude::*;

use super::input;
use super::parts::Parts;
use crate::devices::console::PyConsolePort;
use crate::interpreter::{attach, errors};

/// Loads a kernel and an initrd from their files.
pub(super) fn boot(
    py: Python<'_>,
    machine: &Machine,
    kernel: &Path,
    initrd: Option<&Path>,
    append: &str,
) -> PyResult<()> {
    let bytes = input::read(py, kernel)?;
    let initrd = initrd.map(|path| input::read(py, path)).transpose()?;
    let named = |error| match error {
        Error::Invalid(why) => Error::Invalid(format!("{}: {why}", kernel.display())),
        other => other,
    };
    let load = || {
        machine.boot(
            KernelFile::parse(bytes).map_err(named)?,
            initrd.as_deref(),
            &command_line(append),
            &mut attach::check_signals,
        )
    };
    py.detach(load).map_err(|error| errors::raise(py, error))
}

/// The ``Console`` of a machine, made when it is first asked for.
pub(super) fn console(vm: &Bound<'_, PyAny>, parts: &Parts) -> PyResult<Py<PyAny>> {
    let py = vm.py();
    let make = || {
        let machine = parts.machine(py)?;
        let console = machine.console().map_err(|error| errors::raise(py, error))?;
        let port = PyConsolePort::new(console);
        let class = py.import("pagegate.console")?.getattr("Console")?;
        Ok::<_, PyErr>(class.call1((port, vm))?.unbind())
    };
    Ok(parts.console.get_or_try_init(py, make)?.clone_ref(py))
}

/// The kernel's command line with the words that a console and an end after a panic need. What comes after a word `--` is
/// not for the kernel, but for the first program.
fn command_line(append: &str) -> String {
    let mut ends = append.match_indices("--").map(|(at, _)| at);
    let is_word = |at: &usize| {
        let (before, after) = (&append[..*at], &append[*at + 2..]);
        let is_border = |next: Option<char>| next.is_none_or(char::is_whitespace);
        is_border(before.chars().next_back()) && is_border(after.chars().next())
    };
    let (given, rest) = append.split_at(ends.find(is_word).unwrap_or(append.len()));
    let mut line = given.trim().to_owned();
    for (key, word) in [("console=", "console=ttyS0"), ("panic=", "panic=-1")] {
        if !given.split_whitespace().any(|given| given.starts_with(key)) {
            line = format!("{line} {word}");
        }
    }
    format!("{} {rest}", line.trim()).trim().to_owned()
}
