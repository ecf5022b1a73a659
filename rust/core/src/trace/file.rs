//! Traces in files: Parquet, and both kinds of Arrow IPC.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{ArrowError, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;

use super::about::About;
use super::data::{Trace, TraceError};
use crate::events::event::Event;
use crate::events::table;

/// The most rows of a Parquet row group, which is kept in memory until it is complete, and of a batch.
const ROW_GROUP: usize = 128 * 1024;

/// The format of a trace file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Parquet. It can be read only after it was closed.
    Parquet,
    /// Arrow's IPC file format, also known as Feather. It can be read only after it was closed.
    IpcFile,
    /// Arrow's IPC stream format. It can be read at any time, also when its writer was killed.
    IpcStream,
}

impl Format {
    /// The format that the file's extension stands for.
    ///
    /// # Errors
    /// [`TraceError::Format`] for an unknown one.
    pub fn of(path: &Path) -> Result<Self, TraceError> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("parquet") => Ok(Format::Parquet),
            Some("arrow" | "feather") => Ok(Format::IpcFile),
            Some("arrows") => Ok(Format::IpcStream),
            _ => Err(TraceError::Format(path.display().to_string())),
        }
    }
}

enum Writer {
    Parquet(Box<ArrowWriter<BufWriter<File>>>),
    IpcFile(FileWriter<BufWriter<File>>),
    IpcStream(StreamWriter<BufWriter<File>>),
}

/// A trace file that is being written.
pub(super) struct Output {
    path: PathBuf,
    schema: SchemaRef,
    writer: Writer,
}

impl Output {
    /// Creates or truncates the file.
    pub(super) fn create(path: &Path, about: &About) -> Result<Self, TraceError> {
        let format = Format::of(path)?;
        let file = BufWriter::new(File::create(path).map_err(|error| failed(path, error))?);
        let schema = about.schema();
        let writer = match format {
            Format::Parquet => {
                let properties = WriterProperties::builder()
                    .set_compression(Compression::SNAPPY)
                    .set_max_row_group_row_count(Some(ROW_GROUP))
                    .build();
                let writer = ArrowWriter::try_new(file, schema.clone(), Some(properties));
                Writer::Parquet(Box::new(writer.map_err(|error| of_parquet(path, error))?))
            }
            Format::IpcFile => {
                Writer::IpcFile(FileWriter::try_new(file, &schema).map_err(|error| of_arrow(path, error))?)
            }
            Format::IpcStream => {
                let mut writer = StreamWriter::try_new(file, &schema).map_err(|error| of_arrow(path, error))?;
                writer.flush().map_err(|error| of_arrow(path, error))?;
                Writer::IpcStream(writer)
            }
        };
        Ok(Self {
            path: path.to_owned(),
            schema,
            writer,
        })
    }

    /// Adds a batch. To an IPC stream it is written at once, so it is in the file even if this process is killed.
    pub(super) fn write(&mut self, batch: &RecordBatch) -> Result<(), TraceError> {
        let batch = batch.clone().with_schema(self.schema.clone());
        let batch = batch.map_err(|error| of_arrow(&self.path, error))?;
        let written = match &mut self.writer {
            Writer::Parquet(writer) => return writer.write(&batch).map_err(|error| of_parquet(&self.path, error)),
            Writer::IpcFile(writer) => writer.write(&batch),
            Writer::IpcStream(writer) => writer.write(&batch).and_then(|()| writer.flush()),
        };
        written.map_err(|error| of_arrow(&self.path, error))
    }

    /// Writes the end of the file, such as Parquet's footer.
    pub(super) fn close(self) -> Result<(), TraceError> {
        let path = &self.path;
        let file = match self.writer {
            Writer::Parquet(writer) => writer.into_inner().map_err(|error| of_parquet(path, error))?,
            Writer::IpcFile(mut writer) => {
                writer.finish().map_err(|error| of_arrow(path, error))?;
                writer.into_inner().map_err(|error| of_arrow(path, error))?
            }
            Writer::IpcStream(mut writer) => {
                writer.finish().map_err(|error| of_arrow(path, error))?;
                writer.into_inner().map_err(|error| of_arrow(path, error))?
            }
        };
        let mut file = file;
        file.flush().map_err(|error| failed(path, error))
    }
}

impl Trace {
    /// Writes it to a file, in the format that the extension stands for.
    ///
    /// # Errors
    /// Those of creating and writing the file.
    pub fn write(&self, path: &Path) -> Result<(), TraceError> {
        let mut output = Output::create(path, &self.about)?;
        for part in self.events.chunks(ROW_GROUP) {
            output.write(&table::batch(part))?;
        }
        output.close()
    }

    /// Reads a file of any of the formats, whatever its name is. An IPC stream that ends in the middle is read up to
    /// there. `about` takes the place of the file's own metadata.
    ///
    /// # Errors
    /// Those of reading the file, and `Invalid` for one that is not a trace.
    pub fn read(path: &Path, about: Option<About>) -> Result<Self, TraceError> {
        // The readers panic on some damaged files.
        let read = std::panic::catch_unwind(|| Self::read_whole(path, about));
        read.unwrap_or_else(|_| {
            Err(TraceError::Invalid(format!(
                "{} is no trace: it is damaged",
                path.display()
            )))
        })
    }

    fn read_whole(path: &Path, about: Option<About>) -> Result<Self, TraceError> {
        let mut file = File::open(path).map_err(|error| failed(path, error))?;
        let (magic, tail) = ends(&mut file).map_err(|error| failed(path, error))?;
        let invalid = |error: ArrowError| TraceError::Invalid(format!("{} is no trace: {error}", path.display()));
        let mut reader = Reader {
            name: path.display().to_string(),
            events: Vec::new(),
            truncated: false,
        };
        let schema = if magic.starts_with(b"PAR1") {
            let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| invalid(error.into()))?;
            let schema = builder.schema().clone();
            let batches = builder.build().map_err(|error| invalid(error.into()))?;
            reader.take_all(batches.map(|batch| batch.map_err(invalid)))?;
            schema
        } else if magic.starts_with(b"ARROW1") {
            let batches = FileReader::try_new_buffered(file, None).map_err(invalid)?;
            let schema = batches.schema();
            reader.take_all(batches.map(|batch| batch.map_err(invalid)))?;
            schema
        } else {
            let batches = StreamReader::try_new_buffered(file, None).map_err(invalid)?;
            let schema = batches.schema();
            // Its writer may have been killed while it wrote a batch.
            let mut cut_off = false;
            let whole = batches.map_while(|batch| {
                cut_off = batch.as_ref().is_err_and(is_end);
                (!cut_off).then_some(batch)
            });
            reader.take_all(whole.map(|batch| batch.map_err(invalid)))?;
            reader.truncated = cut_off || tail != END_OF_STREAM;
            schema
        };
        reader.finish(&schema, about)
    }

    /// Makes a trace of batches that were not read by [`Trace::read`].
    ///
    /// # Errors
    /// `Invalid` for batches that are not a trace.
    pub fn collect(
        schema: SchemaRef,
        batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
        about: Option<About>,
    ) -> Result<Self, TraceError> {
        let mut reader = Reader {
            name: "this table".to_owned(),
            events: Vec::new(),
            truncated: false,
        };
        reader.take_all(batches.map(|batch| batch.map_err(|error| TraceError::Invalid(error.to_string()))))?;
        reader.finish(&schema, about)
    }

    /// As record batches.
    pub fn batches(&self) -> impl Iterator<Item = RecordBatch> {
        self.events.chunks(ROW_GROUP).map(table::batch)
    }
}

/// Collects the events of batches.
struct Reader {
    /// The file's name, for errors.
    name: String,
    events: Vec<Event>,
    truncated: bool,
}

impl Reader {
    fn take_all(&mut self, batches: impl Iterator<Item = Result<RecordBatch, TraceError>>) -> Result<(), TraceError> {
        for batch in batches {
            let events = table::events(&batch?);
            let no_trace = |what| TraceError::Invalid(format!("{} is no trace: {what}", self.name));
            self.events.append(&mut events.map_err(no_trace)?);
        }
        Ok(())
    }

    fn finish(self, schema: &Schema, given: Option<About>) -> Result<Trace, TraceError> {
        let Self {
            name,
            mut events,
            truncated,
        } = self;
        let own = About::of(schema).map_err(|what| TraceError::Invalid(format!("{name} is no trace: {what}")))?;
        let about = given.or(own).ok_or_else(|| {
            TraceError::Invalid(format!(
                "{name} does not say how much memory its guest had, nor in which state: tell memory and initial to whoever \
                 reads it"
            ))
        })?;
        // The batches of several vCPUs take turns, and a table may be sorted by another column.
        events.sort_by_key(|event| event.sequence);
        Ok(Trace {
            about,
            events,
            truncated,
        })
    }
}

/// The end mark of an IPC stream.
const END_OF_STREAM: [u8; 8] = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// The first and the last bytes of a file. Leaves its position at the beginning.
fn ends(file: &mut File) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut head, mut tail) = (Vec::new(), Vec::new());
    let len = file.metadata()?.len();
    Read::take(&mut *file, 6).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(len.saturating_sub(END_OF_STREAM.len() as u64)))?;
    file.read_to_end(&mut tail)?;
    file.rewind()?;
    Ok((head, tail))
}

/// Whether the error is an unexpected end of the file.
fn is_end(error: &ArrowError) -> bool {
    match error {
        ArrowError::IoError(_, source) => source.kind() == ErrorKind::UnexpectedEof,
        _ => false,
    }
}

fn failed(path: &Path, source: std::io::Error) -> TraceError {
    TraceError::File {
        path: path.display().to_string(),
        source,
    }
}

fn of_arrow(path: &Path, error: ArrowError) -> TraceError {
    match error {
        ArrowError::IoError(_, source) => failed(path, source),
        error => TraceError::Encoding {
            path: path.display().to_string(),
            what: error.to_string(),
        },
    }
}

fn of_parquet(path: &Path, error: ParquetError) -> TraceError {
    match error {
        ParquetError::External(source) => match source.downcast::<std::io::Error>() {
            Ok(source) => failed(path, *source),
            Err(error) => of_arrow(path, ArrowError::ExternalError(error)),
        },
        error => of_arrow(path, error.into()),
    }
}
