//! Checks Arrow IPC, streams and files, before arrow-ipc reads it, because that asks for as much memory as it is told.

use arrow_ipc::convert::fb_to_schema;
use arrow_ipc::r#gen::File::root_as_footer_with_opts;
use arrow_ipc::r#gen::Message::root_as_message_with_opts;
use arrow_ipc::{Message, MessageHeader, RecordBatch};
use arrow_schema::Schema;
use flatbuffers::VerifierOptions;

use super::limits::Limits;

/// At both ends of a file; at the end the length of its footer is before it.
pub(super) const MAGIC: &[u8] = b"ARROW1";
/// Before the length of a message, since Arrow 0.15.
pub(super) const CONTINUATION: [u8; 4] = [0xff; 4];
/// Before each compressed buffer there is its size, or this if it is not compressed.
const NOT_COMPRESSED: i64 = -1;

/// A stream that was checked.
pub(super) struct Stream<'a> {
    /// Its messages that are complete.
    pub(super) bytes: &'a [u8],
    /// Whether it has no end mark.
    pub(super) truncated: bool,
    pub(super) schema: Schema,
}

/// Checks each message of a stream, up to the end mark or the first that is cut off.
pub(super) fn check_stream<'a>(bytes: &'a [u8], limits: &mut Limits) -> Result<Stream<'a>, String> {
    let (mut at, mut schema) = (0, None);
    let truncated = loop {
        let Some(header) = metadata(&bytes[at..])? else {
            break true;
        };
        let Some(header) = header else {
            break false;
        };
        let message = verified(header.bytes)?;
        let start = at + header.end;
        let Some(body) = part(&bytes[start..], 0, message.bodyLength())? else {
            break true;
        };
        match schema {
            None => schema = Some(schema_of(message)?),
            Some(_) => check_message(message, body, limits)?,
        }
        at = start + body.len();
    };
    Ok(Stream {
        bytes: &bytes[..at],
        truncated,
        schema: schema.ok_or("it has no schema")?,
    })
}

/// Checks each message that a file's footer names.
pub(super) fn check_file(file: &[u8], limits: &mut Limits) -> Result<Schema, String> {
    let cut_off = || "it is damaged or cut off: it has no end of an Arrow IPC file".to_owned();
    let rest = file.strip_suffix(MAGIC).ok_or_else(cut_off)?;
    let (rest, length) = rest.split_last_chunk::<4>().ok_or_else(cut_off)?;
    let length = usize::try_from(i32::from_le_bytes(*length)).map_err(|_| cut_off())?;
    let start = rest.len().checked_sub(length).ok_or_else(cut_off)?;
    let footer = root_as_footer_with_opts(&options(length), &rest[start..]);
    let footer = footer.map_err(|error| format!("its footer is damaged: {error}"))?;
    let mut left = file.len();
    let batches = footer.recordBatches().into_iter().flatten();
    for block in footer.dictionaries().into_iter().flatten().chain(batches) {
        let outside = "a message lies outside of its file";
        let header = part(file, block.offset(), block.metaDataLength().into())?.ok_or(outside)?;
        let end = block.offset().saturating_add(block.metaDataLength().into());
        let body = part(file, end, block.bodyLength())?.ok_or(outside)?;
        left = left
            .checked_sub(header.len() + body.len())
            .ok_or("its messages overlap")?;
        let start = if header.starts_with(&CONTINUATION) { 8 } else { 4 };
        check_message(verified(header.get(start..).ok_or(outside)?)?, body, limits)?;
    }
    Ok(fb_to_schema(footer.schema().ok_or("it has no schema")?))
}

/// Checks a schema as Parquet files have it: an IPC message without a body.
pub(super) fn check_schema(bytes: &[u8]) -> Result<(), String> {
    let message = match metadata(bytes) {
        Ok(Some(Some(header))) => header.bytes,
        _ => bytes,
    };
    schema_of(verified(message)?).map(drop)
}

/// The bytes of a message's metadata, and where they end.
struct Metadata<'a> {
    bytes: &'a [u8],
    end: usize,
}

/// The metadata at the start of `bytes`: `None` if it is cut off, `Some(None)` if there is an end mark.
fn metadata(bytes: &[u8]) -> Result<Option<Option<Metadata<'_>>>, String> {
    let start = if bytes.starts_with(&CONTINUATION) { 4 } else { 0 };
    let Some(length) = bytes[start..].first_chunk::<4>() else {
        return Ok(None);
    };
    let start = start + 4;
    match i32::from_le_bytes(*length) {
        0 => Ok(Some(None)),
        length => Ok(part(&bytes[start..], 0, length.into())?.map(|bytes| {
            Some(Metadata {
                end: start + bytes.len(),
                bytes,
            })
        })),
    }
}

/// The part of `bytes` that begins at `offset`; `None` if it is cut off.
fn part(bytes: &[u8], offset: i64, length: i64) -> Result<Option<&[u8]>, String> {
    let number = |value| usize::try_from(value).map_err(|_| format!("{value} is no length or offset"));
    let (offset, length) = (number(offset)?, number(length)?);
    Ok(bytes.get(offset..).and_then(|bytes| bytes.get(..length)))
}

/// A flatbuffer can refer to the same bytes again and again, and what is made of it copies them each time.
fn options(length: usize) -> VerifierOptions {
    VerifierOptions {
        max_apparent_size: length.saturating_mul(4),
        max_tables: length / 4,
        ..Default::default()
    }
}

fn verified(bytes: &[u8]) -> Result<Message<'_>, String> {
    root_as_message_with_opts(&options(bytes.len()), bytes).map_err(|error| format!("a message is damaged: {error}"))
}

fn schema_of(message: Message<'_>) -> Result<Schema, String> {
    Ok(fb_to_schema(message.header_as_schema().ok_or("it has no schema")?))
}

fn check_message(message: Message<'_>, body: &[u8], limits: &mut Limits) -> Result<(), String> {
    let batch = match message.header_type() {
        MessageHeader::RecordBatch => message.header_as_record_batch(),
        MessageHeader::DictionaryBatch => {
            // To add to a dictionary again and again would copy it each time.
            let dictionary = message.header_as_dictionary_batch();
            dictionary
                .filter(|dictionary| !dictionary.isDelta())
                .and_then(|dictionary| dictionary.data())
        }
        _ => None,
    };
    check_batch(
        batch.ok_or("there is a message that is neither rows nor a whole dictionary")?,
        body,
        limits,
    )
}

fn check_batch(batch: RecordBatch<'_>, body: &[u8], limits: &mut Limits) -> Result<(), String> {
    let mut left = body.len();
    for buffer in batch.buffers().into_iter().flatten() {
        let bytes = part(body, buffer.offset(), buffer.length())?.ok_or("a buffer lies outside of its message")?;
        left = left.checked_sub(bytes.len()).ok_or("the buffers of a batch overlap")?;
        if batch.compression().is_some()
            && let Some(size) = bytes.first_chunk::<8>()
            && i64::from_le_bytes(*size) != NOT_COMPRESSED
        {
            limits.uncompressed(i64::from_le_bytes(*size))?;
        }
    }
    Ok(())
}
