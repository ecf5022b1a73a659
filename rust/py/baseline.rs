//! The bare loop around KVM's ioctls, which requests are measured against.

use std::path::PathBuf;
use std::time::Duration;

use pagegate_baseline::{Measured, Mode, Plan, Start, Work};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::interpreter::{arguments, sizes};

/// Runs a guest in a bare loop around KVM's ioctls: no policy, no checks, no page states, no records.
///
/// Each of ``vcpus`` is ``(gpa, image, rdi)``: where the image is loaded and entered in long mode, its bytes, and RDI.
/// The guest writes 1 to port ``marks`` where the measured part begins, and 2 where it ends. ``block``: bytes that are
/// converted for an implicit request, the aligned block around the page. ``work``: how much of each conversion is
/// carried out: "nothing", "enforce", "discard" or "all". ``enforcement``: "attributes", "traps" (with ``shared_bit``)
/// or "memslots". ``timeout``: seconds. ``pager``: the command of a process that calls ``serve_missing`` with two more
/// arguments, and has the bytes of memory, which is zeroes without one. The other arguments are as for ``Vm``; all
/// pages are shared at first.
///
/// Returns nanoseconds, requests and port IO exits of the measured part. Raises ValueError for arguments that do not
/// make a machine, OSError, and KeyboardInterrupt.
#[pyfunction]
#[pyo3(signature = (memory, vcpus, *, enforcement, marks, memslots = 1, shared_bit = None, doorbell = false, block = 4096,
                    work = "all", pager = None, timeout = None))]
#[expect(clippy::too_many_arguments, reason = "one keyword a setting")]
pub(crate) fn bare_loop(
    py: Python<'_>,
    #[pyo3(from_py_with = sizes::size::<arguments::named::memory, _>)] memory: u64,
    vcpus: Vec<(u64, Vec<u8>, u64)>,
    enforcement: &str,
    #[pyo3(from_py_with = arguments::integer::<arguments::named::marks, _>)] marks: u16,
    #[pyo3(from_py_with = arguments::integer::<arguments::named::memslots, _>)] memslots: u32,
    #[pyo3(from_py_with = arguments::optional::<arguments::named::shared_bit, _>)] shared_bit: Option<u32>,
    doorbell: bool,
    #[pyo3(from_py_with = sizes::size::<arguments::named::block, _>)] block: u64,
    work: &str,
    pager: Option<Vec<String>>,
    #[pyo3(from_py_with = arguments::timeout)] timeout: Option<Duration>,
) -> PyResult<(u64, u64, u64)> {
    let modes = [
        ("attributes", Mode::Attributes),
        ("traps", Mode::Traps),
        ("memslots", Mode::Memslots),
    ];
    let parts = [
        ("nothing", Work::Nothing),
        ("enforce", Work::Enforce),
        ("discard", Work::Discard),
        ("all", Work::All),
    ];
    let plan = Plan {
        memory,
        memslots: memslots.into(),
        mode: arguments::choose(enforcement, "enforcement", modes)?,
        shared_bit,
        doorbell,
        block,
        marks,
        vcpus: vcpus
            .into_iter()
            .map(|(at, image, argument)| Start { at, image, argument })
            .collect(),
        work: arguments::choose(work, "work", parts)?,
        pager: pager.unwrap_or_default(),
    };
    if !plan.is_sound() {
        return Err(PyValueError::new_err("the bare loop cannot run such a machine"));
    }
    let mut raised = None;
    let mut interrupt = || {
        raised = Python::attach(|py| py.check_signals()).err();
        raised.is_some()
    };
    let measured = py.detach(|| pagegate_baseline::run(&plan, timeout, &mut interrupt));
    match (measured, raised) {
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(PyOSError::new_err(format!("the bare loop: {error}"))),
        (
            Ok(Measured {
                time,
                requests,
                port_io,
            }),
            None,
        ) => Ok((time.as_nanos() as u64, requests, port_io)),
    }
}

/// Serves the userfaultfd that is the standard input, for ``size`` bytes of another process's memory at ``base``.
///
/// For each touch it copies a page of a file there. It does not return.
///
/// Raises OSError.
#[pyfunction]
pub(crate) fn serve_missing(py: Python<'_>, file: PathBuf, base: u64, size: u64) -> PyResult<()> {
    Ok(py.detach(|| pagegate_baseline::serve(base, size, &file))?)
}
