//! From Arrow record batches to events. Another tool may have written them: the columns may be in any order and of any
//! type that holds the same values, and there may be others.
//!
//! A few bytes can stand for any number of values, or for one that is long and repeated. So values are looked up one by
//! one where they are, and nothing is cast but numbers to numbers.

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, RecordBatch};
use arrow_cast::cast;
use arrow_schema::{DataType, Schema, TimeUnit};
use arrow_select::take::take;

use super::columns::{COLUMNS, OF_DEVICES, Row, Source, Vocabulary};
use super::event::Event;

/// The most columns of a table, and values of a dictionary, of which the longest that is used has ten.
const MOST_COLUMNS: usize = 4096;
const MOST_VALUES: usize = 4096;

/// The indices of the columns that are read from a table with this schema, ascending.
///
/// # Errors
/// A sentence that names a column that is missing, or has a type that cannot be read.
pub fn wanted(schema: &Schema) -> Result<Vec<usize>, String> {
    if schema.fields().len() > MOST_COLUMNS {
        return Err(format!("there are more than {MOST_COLUMNS} columns"));
    }
    let mut indices = Vec::with_capacity(COLUMNS.len());
    for (at, (name, source)) in COLUMNS.iter().enumerate() {
        match schema.column_with_name(name) {
            Some((index, field)) if is_readable(field.data_type(), *source) => indices.push(index),
            Some((_, field)) => return Err(format!("column {name:?}: it has type {}", field.data_type())),
            None if is_optional(at) => {}
            None => return Err(format!("there is no column {name:?}")),
        }
    }
    indices.sort_unstable();
    Ok(indices)
}

/// Whether a table may lack the column at this index of [`COLUMNS`].
fn is_optional(at: usize) -> bool {
    at >= COLUMNS.len() - OF_DEVICES
}

fn is_readable(kind: &DataType, source: Source) -> bool {
    let value = match kind {
        DataType::Dictionary(_, value) => value,
        kind => kind,
    };
    match source {
        Source::Code(..) => matches!(value, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View),
        _ => value.is_numeric() || *value == DataType::Boolean || in_nanoseconds(value).is_some(),
    }
}

/// The type of nanoseconds that values of a type with a unit of time become. `None` for a type without one, and for one that
/// is no count of a single unit.
fn in_nanoseconds(kind: &DataType) -> Option<DataType> {
    match kind {
        DataType::Duration(_) => Some(DataType::Duration(TimeUnit::Nanosecond)),
        DataType::Timestamp(_, zone) => Some(DataType::Timestamp(TimeUnit::Nanosecond, zone.clone())),
        _ => None,
    }
}

/// The events of a batch whose columns are those of [`wanted`], or more. `first` is the number of its first row.
///
/// # Errors
/// A sentence that names the column and what is wrong with it.
pub fn events(batch: &RecordBatch, first: usize) -> Result<Vec<Event>, String> {
    let mut rows = vec![Row::default(); batch.num_rows()];
    for (at, (name, source)) in COLUMNS.iter().enumerate() {
        match batch.column_by_name(name) {
            Some(column) => read(column, *source, &mut rows).map_err(|what| format!("column {name:?}: {what}"))?,
            None if is_optional(at) => {}
            None => return Err(format!("there is no column {name:?}")),
        }
    }
    let event = |(at, row): (usize, &Row)| row.event().ok_or_else(|| format!("row {} makes no sense", first + at));
    rows.iter().enumerate().map(event).collect()
}

fn read(column: &ArrayRef, source: Source, rows: &mut [Row]) -> Result<(), String> {
    if column.logical_null_count() > 0 {
        return Err("it has nulls".to_owned());
    }
    match source {
        Source::Word(i) => numbers::<UInt64Type>(column, rows, |row, value| row.words[i] = value),
        Source::Nanoseconds(i) => {
            numbers::<UInt64Type>(column, rows, |row, value| row.words[i] = value)?;
            // Arrow's durations are signed.
            match rows.iter().all(|row| i64::try_from(row.words[i]).is_ok()) {
                true => Ok(()),
                false => Err("it has a time of 2**63 nanoseconds or more".to_owned()),
            }
        }
        Source::Half(i) => numbers::<UInt32Type>(column, rows, |row, value| row.halves[i] = value),
        Source::Signed(i) => numbers::<Int32Type>(column, rows, |row, value| row.halves[i] = value as u32),
        Source::Flag(i) => numbers::<UInt8Type>(column, rows, |row, value| row.bytes[i] = value),
        Source::Code(i, vocabulary) => codes(column, vocabulary, rows, |row, code| row.bytes[i] = code),
    }
}

/// Puts the column's values, each of which must fit into the type, into the rows.
fn numbers<T: ArrowPrimitiveType>(
    column: &ArrayRef,
    rows: &mut [Row],
    put: impl Fn(&mut Row, T::Native),
) -> Result<(), String> {
    let plain = match column.as_any_dictionary_opt() {
        Some(dictionary) => &take(dictionary.values(), dictionary.keys(), None).map_err(|error| error.to_string())?,
        None => column,
    };
    let plain = match in_nanoseconds(plain.data_type()) {
        Some(nanoseconds) => &in_unit(plain, &nanoseconds)?,
        None => plain,
    };
    let cast = cast(plain, &T::DATA_TYPE).map_err(|error| error.to_string())?;
    if cast.logical_null_count() > 0 {
        return Err(format!("its values do not all fit into {}", T::DATA_TYPE));
    }
    for (row, value) in rows.iter_mut().zip(cast.as_primitive::<T>().values()) {
        put(row, *value);
    }
    Ok(())
}

/// Times in another unit, each of which must fit.
fn in_unit(times: &ArrayRef, kind: &DataType) -> Result<ArrayRef, String> {
    let cast = cast(times, kind).map_err(|error| error.to_string())?;
    match cast.logical_null_count() {
        0 => Ok(cast),
        _ => Err("its values in nanoseconds do not all fit into 64 bits".to_owned()),
    }
}

/// Puts the number of each of the column's names into the rows.
fn codes(
    column: &ArrayRef,
    vocabulary: Vocabulary,
    rows: &mut [Row],
    put: impl Fn(&mut Row, u8),
) -> Result<(), String> {
    let known = vocabulary.names();
    let code = |name: &str| known.iter().position(|known| *known == name).map(|code| code as u8);
    let unknown = |name: &str| {
        let start: String = name.chars().take(40).collect();
        format!("{start:?} is none of {}", known.join(", "))
    };
    let Some(dictionary) = column.as_any_dictionary_opt() else {
        for (at, row) in rows.iter_mut().enumerate() {
            let name = text(column, at);
            put(row, code(name).ok_or_else(|| unknown(name))?);
        }
        return Ok(());
    };
    let values = dictionary.values();
    if values.len() > MOST_VALUES {
        return Err(format!("its dictionary has {} values", values.len()));
    }
    let codes: Vec<Option<u8>> = (0..values.len()).map(|at| code(text(values, at))).collect();
    let missing = "a value is missing from its dictionary";
    let keys = cast(dictionary.keys(), &DataType::UInt64).map_err(|error| error.to_string())?;
    for (row, key) in rows.iter_mut().zip(keys.as_primitive::<UInt64Type>()) {
        let key = key.and_then(|key| usize::try_from(key).ok()).ok_or(missing)?;
        let code = codes.get(key).ok_or(missing)?;
        put(row, code.ok_or_else(|| unknown(text(values, key)))?);
    }
    Ok(())
}

/// A value of an array of texts, whose type [`is_readable`].
fn text(texts: &ArrayRef, at: usize) -> &str {
    match texts.data_type() {
        DataType::Utf8 => texts.as_string::<i32>().value(at),
        DataType::LargeUtf8 => texts.as_string::<i64>().value(at),
        _ => texts.as_string_view().value(at),
    }
}
