//! From events to Arrow record batches.

use std::sync::{Arc, LazyLock};

use arrow_array::cast::AsArray;
use arrow_array::types::{DurationNanosecondType, Int8Type, Int32Type, UInt32Type, UInt64Type};
use arrow_array::{
    ArrayRef, ArrowPrimitiveType, BooleanArray, DictionaryArray, PrimitiveArray, RecordBatch, StringArray, UInt32Array,
};
use arrow_buffer::{BooleanBuffer, Buffer, ScalarBuffer};
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;

pub use super::columns::schema;
use super::columns::{COLUMNS, Row, Source, Vocabulary};
use super::event::{Event, Kind};

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
        Source::Nanoseconds(_) => Arc::new(numbers::<DurationNanosecondType>(values)),
        Source::Half(_) => Arc::new(numbers::<UInt32Type>(values)),
        Source::Signed(_) => Arc::new(numbers::<Int32Type>(values)),
        // Bits, which the log does not hold: a copy of an eighth of the bytes.
        Source::Flag(_) => {
            let bits = BooleanBuffer::collect_bool(values.len(), |at| values[at] != 0);
            Arc::new(BooleanArray::new(bits, None))
        }
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

/// How many of its rows are malformed requests.
pub(crate) fn malformed(batch: &RecordBatch) -> u64 {
    kinds(batch).filter(|kind| *kind == Kind::Malformed as i8).count() as u64
}

/// Its rows without those after so many malformed requests, and after so many others.
pub(crate) fn first_rows(batch: &RecordBatch, mut others: u64, mut malformed: u64) -> RecordBatch {
    let rows = kinds(batch).enumerate().filter_map(|(row, kind)| {
        let left = match kind == Kind::Malformed as i8 {
            true => &mut malformed,
            false => &mut others,
        };
        *left = left.checked_sub(1)?;
        u32::try_from(row).ok()
    });
    let rows = UInt32Array::from_iter_values(rows);
    take_record_batch(batch, &rows).unwrap_or_else(|_| batch.slice(0, 0))
}

fn kinds(batch: &RecordBatch) -> impl Iterator<Item = i8> {
    let kinds = batch
        .column_by_name("kind")
        .map(|column| column.as_dictionary::<Int8Type>().keys());
    kinds.into_iter().flat_map(|keys| keys.values().iter().copied())
}

/// A batch of these events.
pub fn batch(events: &[Event]) -> RecordBatch {
    let rows: Vec<Row> = events.iter().map(Row::from).collect();
    assemble(|source| match source {
        Source::Word(i) | Source::Nanoseconds(i) => rows.iter().map(|row| row.words[i]).collect(),
        Source::Half(i) | Source::Signed(i) => rows.iter().map(|row| row.halves[i]).collect(),
        Source::Flag(i) | Source::Code(i, _) => rows.iter().map(|row| row.bytes[i]).collect(),
    })
}
