//! From events to Arrow record batches, and back.

use std::sync::{Arc, LazyLock};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int8Type, Int32Type, UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{
    Array, ArrayRef, ArrowPrimitiveType, DictionaryArray, PrimitiveArray, RecordBatch, StringArray, UInt32Array,
};
use arrow_buffer::{Buffer, ScalarBuffer};
use arrow_cast::cast;
use arrow_schema::DataType;
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;

pub use super::columns::schema;
use super::columns::{COLUMNS, Row, Source, Vocabulary};
use super::event::Event;

/// The index of `sequence` in `COLUMNS`.
const SEQUENCE_COLUMN: usize = 0;

/// A batch whose columns have these values.
pub(super) fn assemble(values: impl Fn(Source) -> Buffer) -> RecordBatch {
    let columns = COLUMNS.iter().map(|(_, source)| array(*source, values(*source)));
    #[expect(clippy::expect_used, reason = "the schema is made of the same list")]
    RecordBatch::try_new(schema(), columns.collect()).expect("columns as in the schema")
}

fn array(source: Source, values: Buffer) -> ArrayRef {
    fn numbers<T: ArrowPrimitiveType>(values: Buffer) -> PrimitiveArray<T> {
        PrimitiveArray::new(ScalarBuffer::from(values), None)
    }
    match source {
        Source::Word(_) => Arc::new(numbers::<UInt64Type>(values)),
        Source::Half(_) => Arc::new(numbers::<UInt32Type>(values)),
        Source::Signed(_) => Arc::new(numbers::<Int32Type>(values)),
        Source::Flag(_) => Arc::new(numbers::<UInt8Type>(values)),
        Source::Code(_, vocabulary) => {
            let names = dictionary(vocabulary);
            #[expect(clippy::expect_used, reason = "only rows made of events come here")]
            Arc::new(DictionaryArray::<Int8Type>::try_new(numbers(values), names).expect("a number of a name"))
        }
    }
}

/// The names as an Arrow array. All batches have the same one, so that it is written to a file only once.
fn dictionary(vocabulary: Vocabulary) -> ArrayRef {
    static NAMES: LazyLock<[ArrayRef; 4]> =
        LazyLock::new(|| Vocabulary::ALL.map(|vocabulary| Arc::new(StringArray::from(vocabulary.names())) as ArrayRef));
    NAMES[vocabulary as usize].clone()
}

/// The rows of all batches in one, ordered by sequence number. The batches are [`assemble`]'s.
pub(super) fn merge(batches: &Vec<RecordBatch>) -> Option<RecordBatch> {
    let whole = concat_batches(&schema(), batches)
        .ok()
        .filter(|whole| whole.num_rows() > 0)?;
    let sequences = whole.column(SEQUENCE_COLUMN).as_primitive::<UInt64Type>().values();
    let mut order: Vec<u32> = (0..).take(whole.num_rows()).collect();
    order.sort_by_key(|row| sequences.get(*row as usize));
    take_record_batch(&whole, &UInt32Array::from(order)).ok()
}

/// The sequence number of the last row of a batch that [`assemble`] or [`merge`] made.
pub(crate) fn last_sequence(batch: &RecordBatch) -> Option<u64> {
    let sequences = batch.column(SEQUENCE_COLUMN).as_primitive::<UInt64Type>();
    sequences.values().last().copied()
}

/// A batch of these events.
pub fn batch(events: &[Event]) -> RecordBatch {
    let rows: Vec<Row> = events.iter().map(Row::from).collect();
    assemble(|source| match source {
        Source::Word(i) => rows.iter().map(|row| row.words[i]).collect(),
        Source::Half(i) | Source::Signed(i) => rows.iter().map(|row| row.halves[i]).collect(),
        Source::Flag(i) | Source::Code(i, _) => rows.iter().map(|row| row.bytes[i]).collect(),
    })
}

/// The events of a batch. Another tool may have written it: its columns may be in any order and of any type that holds
/// the same values, and there may be others.
///
/// # Errors
/// A sentence that names the column and what is wrong with it.
pub fn events(batch: &RecordBatch) -> Result<Vec<Event>, String> {
    let mut rows = vec![Row::default(); batch.num_rows()];
    for (name, source) in &COLUMNS {
        let column = batch
            .column_by_name(name)
            .ok_or_else(|| format!("there is no column {name:?}"))?;
        read(column, *source, &mut rows).map_err(|what| format!("column {name:?}: {what}"))?;
    }
    let event = |(at, row): (usize, &Row)| row.event().ok_or_else(|| format!("row {at} makes no sense"));
    rows.iter().enumerate().map(event).collect()
}

fn read(column: &ArrayRef, source: Source, rows: &mut [Row]) -> Result<(), String> {
    match source {
        Source::Word(i) => fill(rows, &numbers::<UInt64Type>(column)?, |row, value| row.words[i] = value),
        Source::Half(i) => fill(rows, &numbers::<UInt32Type>(column)?, |row, value| {
            row.halves[i] = value
        }),
        Source::Signed(i) => fill(rows, &numbers::<Int32Type>(column)?, |row, value| {
            row.halves[i] = value as u32;
        }),
        Source::Flag(i) => fill(rows, &numbers::<UInt8Type>(column)?, |row, value| row.bytes[i] = value),
        Source::Code(i, vocabulary) => {
            let (keys, codes) = coded(column, vocabulary)?;
            for (row, key) in rows.iter_mut().zip(keys.values()) {
                let code = usize::try_from(*key).ok().and_then(|key| codes.get(key));
                row.bytes[i] = *code.ok_or("a value is missing from its dictionary")?;
            }
        }
    }
    Ok(())
}

fn fill<T: ArrowPrimitiveType>(rows: &mut [Row], values: &PrimitiveArray<T>, put: impl Fn(&mut Row, T::Native)) {
    for (row, value) in rows.iter_mut().zip(values.values()) {
        put(row, *value);
    }
}

/// The column as type `to`, in which every value must fit.
fn cast_to(column: &ArrayRef, to: &DataType) -> Result<ArrayRef, String> {
    if column.logical_null_count() > 0 {
        return Err("it has nulls".to_owned());
    }
    let cast = cast(column, to).map_err(|error| error.to_string())?;
    match cast.logical_null_count() {
        0 => Ok(cast),
        _ => Err(format!("its values do not all fit into {to}")),
    }
}

fn numbers<T: ArrowPrimitiveType>(column: &ArrayRef) -> Result<PrimitiveArray<T>, String> {
    Ok(cast_to(column, &T::DATA_TYPE)?.as_primitive::<T>().clone())
}

/// The column's dictionary keys, and the number that each key stands for in the vocabulary.
fn coded(column: &ArrayRef, vocabulary: Vocabulary) -> Result<(PrimitiveArray<Int32Type>, Vec<u8>), String> {
    let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    let column = cast_to(column, &dictionary)?;
    let column = column.as_dictionary::<Int32Type>();
    let known = vocabulary.names();
    let code = |name: Option<&str>| {
        let name = name.unwrap_or_default();
        match known.iter().position(|known| *known == name) {
            Some(code) => Ok(code as u8),
            None => Err(format!("{name:?} is none of {}", known.join(", "))),
        }
    };
    let codes = column.values().as_string::<i32>().iter().map(code);
    Ok((column.keys().clone(), codes.collect::<Result<_, _>>()?))
}
