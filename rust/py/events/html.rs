//! Tables of events for notebooks. How they look is decided in Python.

use pyo3::prelude::*;

use super::event::PyEvent;

/// The events as HTML.
pub(crate) fn events(py: Python<'_>, events: impl IntoIterator<Item = PyEvent>) -> PyResult<String> {
    let events: Vec<PyEvent> = events.into_iter().collect();
    py.import("pagegate.html")?
        .getattr("events")?
        .call1((events,))?
        .extract()
}
