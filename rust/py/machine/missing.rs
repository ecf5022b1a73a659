//! Pages that have no bytes until they are touched, and the Python objects and files that give them.

use std::path::PathBuf;
use std::sync::Arc;

use pagegate_core::error::Failure;
use pagegate_core::memory::missing::Came;
use pagegate_core::memory::missing::pager::{FilePager, Given as CoreGiven, Pager, Wanted};
use pagegate_core::process::Process;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::interpreter::attach::attached;
use crate::interpreter::{arguments, call, errors};

/// A page that somebody touches and that has no bytes yet, as a pager's ``missing`` is told of it.
#[pyclass(name = "MissingPage", module = "pagegate", frozen, get_all)]
pub(crate) struct PyMissingPage {
    /// Its address, without the view's bit.
    gpa: u64,
    /// Bytes: 4096.
    size: u64,
    /// Its state: ``"private"`` or ``"shared"``.
    state: &'static str,
    /// Who touches it: ``"vcpu"``, ``"kvm"`` for itself, ``"device"``, or ``"host"``, by ``read`` for one.
    by: &'static str,
    /// The vCPU's index, if it is one.
    vcpu: Option<u32>,
    /// Address and size of the missing pages of its state around it, without a gap: at most the 2 MiB that it is in.
    ///
    /// An answer as long as that has the bytes of all of them.
    around: (u64, u64),
}

#[pymethods]
impl PyMissingPage {
    fn __repr__(&self) -> String {
        let Self {
            gpa, state, by, around, ..
        } = self;
        format!(
            "MissingPage(gpa={gpa:#x}, state={state:?}, by={by:?}, around=({:#x}, {:#x}))",
            around.0, around.1
        )
    }
}

/// A Python object that gives missing pages their bytes.
pub(crate) struct PyPager {
    object: Py<PyAny>,
    missing: Py<PyAny>,
}

impl PyPager {
    pub(super) fn object(&self) -> [&Py<PyAny>; 2] {
        [&self.object, &self.missing]
    }

    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.object)?;
        visit.call(&self.missing)
    }
}

impl Pager for PyPager {
    fn missing(&self, wanted: &Wanted, bytes: &mut Vec<u8>) -> Result<CoreGiven<'_>, Failure> {
        attached(|py| {
            let page = PyMissingPage {
                gpa: wanted.page.gpa(),
                size: wanted.page.size(),
                state: wanted.state.as_str(),
                by: wanted.by.as_str(),
                vcpu: wanted.by.vcpu(),
                around: (wanted.around.gpa(), wanted.around.size()),
            };
            let process = Process::default();
            let answer = call::call(self.missing.bind(py), Bound::new(py, page)?.as_any());
            if !process.is_present() {
                return Ok(CoreGiven::Forked);
            }
            let answer = answer?;
            let Ok(data) = arguments::bytes(&answer) else {
                let answer = call::repr(&answer)?;
                return Err(errors::policy_error(
                    py,
                    format!("a pager answered {answer}: it returns bytes"),
                ));
            };
            let pages = [wanted.page, wanted.around];
            let Some(pages) = pages.into_iter().find(|pages| pages.size() == data.len() as u64) else {
                return Err(errors::policy_error(
                    py,
                    format!(
                        "a pager answered with {} bytes: it returns the {} of the page, or the {} of the missing pages around it",
                        data.len(),
                        wanted.page.size(),
                        wanted.around.size()
                    ),
                ));
            };
            *bytes = data;
            Ok(CoreGiven::Bytes(pages))
        })
    }
}

/// What a machine was given as its pager.
pub(super) enum Given {
    Python(Arc<PyPager>),
    File(PathBuf),
}

impl Given {
    /// ``pager``: an object with a method ``missing``, or a file.
    pub(super) fn of(pager: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(path) = pager.extract::<PathBuf>() {
            return Ok(Given::File(path));
        }
        let missing = pager.getattr_opt("missing")?.filter(|missing| missing.is_callable());
        let Some(missing) = missing else {
            return Err(PyTypeError::new_err(format!(
                "pager is {}: it must be an object with a method missing(page), or the path of a file in which a page's offset is \
                 its address",
                call::repr(pager)?
            )));
        };
        Ok(Given::Python(Arc::new(PyPager {
            object: pager.clone().unbind(),
            missing: missing.unbind(),
        })))
    }

    /// For the core. A file has to have bytes for all of memory.
    pub(super) fn pager(&self, py: Python<'_>, memory_end: u64) -> PyResult<Arc<dyn Pager>> {
        match self {
            Given::Python(pager) => Ok(pager.clone()),
            Given::File(path) => {
                let pager = py.detach(|| FilePager::of_one(path, memory_end));
                Ok(Arc::new(pager.map_err(|error| errors::raise(py, error))?))
            }
        }
    }

    pub(super) fn python(self) -> Option<Arc<PyPager>> {
        match self {
            Given::Python(pager) => Some(pager),
            Given::File(_) => None,
        }
    }
}

/// A page that was missing until somebody touched it.
#[pyclass(name = "TouchedPage", module = "pagegate", frozen, get_all)]
pub(crate) struct PyTouchedPage {
    /// Its address, without the view's bit.
    gpa: u64,
    /// Its state then: ``"private"`` or ``"shared"``.
    state: &'static str,
    /// Who touched it first: ``"vcpu"``, ``"kvm"`` for itself, ``"device"``, or ``"host"``, by ``read`` for one.
    by: &'static str,
    /// The vCPU's index, if it was one.
    vcpu: Option<u32>,
    /// Bytes that came at once: its own, and those of missing pages around it.
    size: u64,
}

impl PyTouchedPage {
    pub(super) fn of(came: Came) -> Self {
        Self {
            gpa: came.gpa,
            state: came.state.as_str(),
            by: came.by.as_str(),
            vcpu: came.by.vcpu(),
            size: came.bytes,
        }
    }
}

#[pymethods]
impl PyTouchedPage {
    fn __repr__(&self) -> String {
        let Self {
            gpa, state, by, size, ..
        } = self;
        format!("TouchedPage(gpa={gpa:#x}, state={state:?}, by={by:?}, size={size})")
    }
}
