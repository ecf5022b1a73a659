//! Reading traces: files of any of the formats, which may be damaged or made to do harm, and tables.

use std::cell::Cell;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, UnwindSafe, catch_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::Once;

use arrow_array::RecordBatch;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder};

use super::about::About;
use super::data::{Trace, TraceError};
use super::limits::Limits;
use super::{ipc, parquet_check};
use crate::allocation::check_room;
use crate::errno::Errno;
use crate::events::event::Event;
use crate::events::import;
use crate::input::{Input, InputError, Watch};

/// The most bytes of a file: some 100 million events.
const LARGEST: u64 = 4 << 30;
/// The first bytes of a file, which show what it can be.
const HEAD: u64 = 8;
/// The most bytes of the first message of a stream, which has the schema.
const LONGEST_SCHEMA: u32 = 16 << 20;
/// How many rows are made into events at a time.
const ROWS: usize = 8192;
/// The most bytes that a row takes while it is made into an event.
const ROW: u64 = 1024;

impl Trace {
    /// Reads a file of any of the formats, whatever its name is. An IPC stream that ends in the middle is read up to
    /// there. `about` takes the place of the file's own metadata. `watch` is called between parts of the file.
    ///
    /// Takes at most 512 times the file's size and 64 MiB of memory, whatever the file says.
    ///
    /// # Errors
    /// Those of reading the file, ENOMEM among them, `Interrupted` for a failure of `watch`, and `Invalid` for what is not a trace.
    pub fn read(path: &Path, about: Option<About>, watch: &mut Watch<'_>) -> Result<Self, TraceError> {
        let invalid = |why: &str| TraceError::Invalid(format!("{} is no trace: {why}", path.display()));
        let failed = |error| match error {
            InputError::System(source) => TraceError::File {
                path: path.display().to_string(),
                source,
            },
            InputError::Interrupted(failure) => TraceError::Interrupted(failure),
            InputError::TooLarge(most) => invalid(&format!("it has more than {most} bytes")),
            InputError::Device => invalid("it is a character device"),
        };
        let mut input = Input::open(path).map_err(failed)?;
        // What is no trace is not read to the limit first: a pipe may have no end.
        let head = input.fill(HEAD, watch).map_err(failed)?;
        let format = format(head).ok_or_else(|| invalid("it begins as no Parquet or Arrow IPC file does"))?;
        let bytes = Bytes::from(input.whole(LARGEST, watch).map_err(failed)?);
        let mut reader = Reader {
            name: path.display().to_string(),
            events: Vec::new(),
            size: bytes.len() as u64,
            limits: Limits::of(bytes.len() as u64),
            truncated: false,
            watch,
        };
        let read = AssertUnwindSafe(|| {
            let schema = match format {
                Format::Parquet => reader.parquet(bytes)?,
                Format::IpcFile => reader.ipc_file(&bytes)?,
                Format::IpcStream => reader.ipc_stream(&bytes)?,
            };
            reader.finish(&schema, about)
        });
        quietly(read).unwrap_or_else(|| Err(invalid("it is damaged")))
    }

    /// Makes a trace of batches that were not read by [`Trace::read`].
    ///
    /// # Errors
    /// `Invalid` for batches that are not a trace, `Interrupted` for a failure of `watch`.
    pub fn collect(
        schema: SchemaRef,
        batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
        about: Option<About>,
        watch: &mut Watch<'_>,
    ) -> Result<Self, TraceError> {
        let mut reader = Reader {
            name: "this table".to_owned(),
            events: Vec::new(),
            size: 0,
            limits: Limits::none(),
            truncated: false,
            watch,
        };
        let damaged = reader.no_trace("it is damaged".to_owned());
        let read = AssertUnwindSafe(|| {
            import::wanted(&schema).map_err(|what| reader.no_trace(what))?;
            reader.take_all(batches.map(|batch| batch.map_err(|error| TraceError::Invalid(error.to_string()))))?;
            reader.finish(&schema, about)
        });
        quietly(read).unwrap_or(Err(damaged))
    }
}

thread_local! {
    /// Whether a panic of this thread is expected.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Calls what may panic, as the readers of the formats do on some damaged files; `None` if it does. The panic is not
/// reported, which would be of no use to anybody and takes memory for a backtrace.
fn quietly<T>(body: impl FnOnce() -> T + UnwindSafe) -> Option<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                report(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(body);
    QUIET.set(false);
    result.ok()
}

enum Format {
    Parquet,
    IpcFile,
    IpcStream,
}

/// What a file with these first bytes can be.
fn format(head: &[u8]) -> Option<Format> {
    if head.starts_with(parquet_check::MAGIC) {
        return Some(Format::Parquet);
    }
    if head.starts_with(ipc::MAGIC) {
        return Some(Format::IpcFile);
    }
    // The length of the first message follows, or from before Arrow 0.15 is there itself.
    let head = head.strip_prefix(&ipc::CONTINUATION).unwrap_or(head);
    let length = u32::from_le_bytes(*head.first_chunk::<4>()?);
    (1..=LONGEST_SCHEMA).contains(&length).then_some(Format::IpcStream)
}

/// Collects the events of batches.
struct Reader<'w, 'f> {
    /// The file's name, for errors.
    name: String,
    events: Vec<Event>,
    /// Bytes of the file; 0 for what is in memory already.
    size: u64,
    limits: Limits,
    truncated: bool,
    watch: &'w mut Watch<'f>,
}

impl Reader<'_, '_> {
    fn parquet(&mut self, file: Bytes) -> Result<SchemaRef, TraceError> {
        let name = self.name.clone();
        let invalid = |why: String| no_trace(&name, why);
        parquet_check::check_metadata(&file).map_err(invalid)?;
        let metadata = ArrowReaderMetadata::load(&file, Default::default());
        let metadata = metadata.map_err(|error| invalid(error.to_string()))?;
        let wanted = import::wanted(metadata.schema()).map_err(invalid)?;
        let columns = metadata.metadata().file_metadata().schema_descr_ptr();
        let mut left = file.len();
        let groups = metadata.metadata().row_groups().iter();
        for (leaf, column) in groups.flat_map(|group| group.columns().iter().enumerate()) {
            if wanted.contains(&columns.get_column_root_idx(leaf)) {
                (self.watch)().map_err(TraceError::Interrupted)?;
                parquet_check::check_column(&file, column, &mut left, &mut self.limits).map_err(invalid)?;
            }
        }
        let schema = metadata.schema().clone();
        let mask = ProjectionMask::roots(&columns, wanted.iter().copied());
        let batches = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata)
            .with_projection(mask)
            .build()
            .map_err(|error| invalid(error.to_string()))?;
        self.take_all(batches.map(|batch| batch.map_err(|error| invalid(error.to_string()))))?;
        Ok(schema)
    }

    fn ipc_file(&mut self, file: &[u8]) -> Result<SchemaRef, TraceError> {
        let name = self.name.clone();
        let invalid = |why: String| no_trace(&name, why);
        let schema = ipc::check_file(file, &mut self.limits).map_err(invalid)?;
        let wanted = import::wanted(&schema).map_err(invalid)?;
        let batches = FileReader::try_new(Cursor::new(file), Some(wanted));
        let batches = batches.map_err(|error| invalid(error.to_string()))?;
        self.take_all(batches.map(|batch| batch.map_err(|error| invalid(error.to_string()))))?;
        Ok(schema.into())
    }

    fn ipc_stream(&mut self, bytes: &[u8]) -> Result<SchemaRef, TraceError> {
        let name = self.name.clone();
        let invalid = |why: String| no_trace(&name, why);
        let stream = ipc::check_stream(bytes, &mut self.limits).map_err(invalid)?;
        let wanted = import::wanted(&stream.schema).map_err(invalid)?;
        let batches = StreamReader::try_new(Cursor::new(stream.bytes), Some(wanted));
        let batches = batches.map_err(|error| invalid(error.to_string()))?;
        self.truncated = stream.truncated;
        self.take_all(batches.map(|batch| batch.map_err(|error| invalid(error.to_string()))))?;
        Ok(stream.schema.into())
    }

    fn take_all(&mut self, batches: impl Iterator<Item = Result<RecordBatch, TraceError>>) -> Result<(), TraceError> {
        // The formats' readers, which copy what is not compressed, end the process where there is no memory.
        self.check_room(self.size + self.limits.taken())?;
        for batch in batches {
            let batch = batch?;
            let rows = batch.num_rows();
            let taken = self.limits.events(rows as u64);
            taken.map_err(|what| self.no_trace(what))?;
            for start in (0..rows).step_by(ROWS) {
                (self.watch)().map_err(TraceError::Interrupted)?;
                let part = batch.slice(start, ROWS.min(rows - start));
                self.check_room(part.num_rows() as u64 * ROW)?;
                let events = import::events(&part, self.events.len());
                let mut events = events.map_err(|what| self.no_trace(what))?;
                let room = self.events.try_reserve(events.len()).map_err(|_| Errno(libc::ENOMEM));
                room.map_err(|errno| self.no_memory(errno))?;
                self.events.append(&mut events);
            }
        }
        Ok(())
    }

    fn no_trace(&self, what: String) -> TraceError {
        no_trace(&self.name, what)
    }

    /// Checks that there is memory for so many bytes.
    fn check_room(&self, bytes: u64) -> Result<(), TraceError> {
        check_room(bytes).map_err(|errno| self.no_memory(errno))
    }

    fn no_memory(&self, errno: Errno) -> TraceError {
        TraceError::File {
            path: self.name.clone(),
            source: errno.into(),
        }
    }

    fn finish(&mut self, schema: &Schema, given: Option<About>) -> Result<Trace, TraceError> {
        let name = &self.name;
        let own = About::of(schema).map_err(|what| no_trace(name, what))?;
        let about = given.or(own).ok_or_else(|| {
            TraceError::Invalid(format!(
                "{name} does not say how much memory its guest had, nor in which state: tell memory and initial to whoever \
                 reads it"
            ))
        })?;
        let mut events = std::mem::take(&mut self.events);
        // Sorting takes as much again at most.
        self.check_room((events.len() * size_of::<Event>()) as u64)?;
        // The batches of several vCPUs take turns, and a table may be sorted by another column.
        events.sort_by_key(|event| event.sequence);
        Ok(Trace {
            about,
            events,
            truncated: self.truncated,
        })
    }
}

fn no_trace(name: &str, what: String) -> TraceError {
    TraceError::Invalid(format!("{name} is no trace: {what}"))
}
