//! Writing traces to files: Parquet, and both kinds of Arrow IPC.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_ipc::writer::{FileWriter, StreamWriter};
use arrow_schema::{ArrowError, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;

use super::about::About;
use super::data::{Trace, TraceError};
use super::sink::{GivenUp, Sink, Stalled, Waiting};
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

enum Writer<'a> {
    Parquet(Box<ArrowWriter<BufWriter<Sink<'a>>>>),
    IpcFile(FileWriter<BufWriter<Sink<'a>>>),
    IpcStream(StreamWriter<BufWriter<Sink<'a>>>),
}

/// A trace file that is being written.
pub(super) struct Output<'a> {
    path: PathBuf,
    schema: SchemaRef,
    writer: Writer<'a>,
}

impl<'a> Output<'a> {
    /// Creates or truncates the file. A pipe's reader is waited for, here and when it is written to.
    pub(super) fn create(path: &Path, about: &About, waiting: Box<Waiting<'a>>) -> Result<Self, TraceError> {
        let format = Format::of(path)?;
        let file = BufWriter::new(Sink::create(path, waiting).map_err(|error| failed(path, error))?);
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
    /// Writes it to a file, in the format that the extension stands for. `waiting` is called while a pipe's reader is
    /// waited for.
    ///
    /// # Errors
    /// Those of creating and writing the file, and the failure of `waiting`.
    pub fn write(&self, path: &Path, waiting: &mut Waiting<'_>) -> Result<(), TraceError> {
        let mut output = Output::create(path, &self.about, Box::new(waiting))?;
        for part in self.events.chunks(ROW_GROUP) {
            output.write(&table::batch(part))?;
        }
        output.close()
    }

    /// As record batches.
    pub fn batches(&self) -> impl Iterator<Item = RecordBatch> {
        self.events.chunks(ROW_GROUP).map(table::batch)
    }
}

fn failed(path: &Path, source: std::io::Error) -> TraceError {
    let path = path.display().to_string();
    match source.downcast() {
        Ok(GivenUp(failure)) if failure.is::<Stalled>() => TraceError::Stalled(path),
        Ok(GivenUp(failure)) => TraceError::Interrupted(failure),
        Err(source) => TraceError::File { path, source },
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
