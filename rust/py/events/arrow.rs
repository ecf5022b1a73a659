//! Record batches to and from Python, by the Arrow PyCapsule interface.

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, RecordBatchReader, StructArray};
use arrow_schema::{Field, SchemaRef};
use pagegate_core::trace::about::About;
use pagegate_core::trace::data::{Trace, TraceError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use pyo3_arrow::ffi::{ArrayIterator, to_schema_pycapsule, to_stream_pycapsule};
use pyo3_arrow::input::AnyRecordBatch;

use crate::interpreter::attach;

/// What ``__arrow_c_stream__`` returns.
pub(crate) fn stream<'py>(
    py: Python<'py>,
    schema: &SchemaRef,
    batches: impl Iterator<Item = RecordBatch> + Send + 'static,
    requested_schema: Option<Bound<'py, PyCapsule>>,
) -> PyResult<Bound<'py, PyCapsule>> {
    let field = Field::new_struct("", schema.fields().clone(), false).with_metadata(schema.metadata().clone());
    let arrays = batches.map(|batch| Ok(Arc::new(StructArray::from(batch)) as ArrayRef));
    let reader = ArrayIterator::new(arrays, Arc::new(field));
    Ok(to_stream_pycapsule(py, Box::new(reader), requested_schema)?)
}

/// What ``__arrow_c_schema__`` returns.
pub(crate) fn schema<'py>(py: Python<'py>, schema: &SchemaRef) -> PyResult<Bound<'py, PyCapsule>> {
    Ok(to_schema_pycapsule(py, schema.as_ref())?)
}

/// Reads a trace from an object that has ``__arrow_c_stream__`` or ``__arrow_c_array__``.
pub(crate) fn trace(table: &Bound<'_, PyAny>, about: Option<About>) -> PyResult<Result<Trace, TraceError>> {
    let reader: Box<dyn RecordBatchReader + Send> = table.extract::<AnyRecordBatch>()?.into_reader()?;
    // Not detached: the batches may be made by Python code.
    Ok(Trace::collect(
        reader.schema(),
        reader,
        about,
        &mut attach::check_signals,
    ))
}
