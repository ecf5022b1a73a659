//! Checks a Parquet file before the parquet crate reads it, because that asks for as much memory as the file says.

use std::io::{Read, copy, sink};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use flate2::bufread::MultiGzDecoder;
use parquet::basic::{Compression, Type};
use parquet::file::metadata::ColumnChunkMetaData;

use super::ipc;
use super::limits::Limits;
use super::parquet_shapes::{FILE_METADATA, PAGE_HEADER};
use super::thrift::{Value, Walker};

/// At both ends of a file.
pub(super) const MAGIC: &[u8] = b"PAR1";
/// The key of the Arrow schema in the metadata: an IPC message in base64.
const ARROW_SCHEMA: &[u8] = b"ARROW:schema";
/// The most columns, with the structs around them.
const COLUMNS: usize = 4096;
/// How deep columns may be nested.
const DEPTH: usize = 32;

// Of parquet.thrift.
const DICTIONARY_PAGE: i64 = 2;
const DELTA_LENGTH_BYTE_ARRAY: i64 = 6;
const DELTA_BYTE_ARRAY: i64 = 7;

/// The most bytes of a dictionary of texts: those of a trace are some short names. A reader repeats them for each row.
const DICTIONARY: i64 = 4096;
/// The fewest bytes of a value in a dictionary.
const VALUE: i64 = 4;

/// Checks the metadata at the end of a file.
pub(super) fn check_metadata(file: &[u8]) -> Result<(), String> {
    let cut_off = || "it is damaged or cut off: it has no end of a Parquet file".to_owned();
    let rest = file.strip_suffix(MAGIC).ok_or_else(cut_off)?;
    let (rest, length) = rest.split_last_chunk::<4>().ok_or_else(cut_off)?;
    let start = rest.len().checked_sub(u32::from_le_bytes(*length) as usize);
    let start = start.filter(|start| *start >= MAGIC.len()).ok_or_else(cut_off)?;
    let mut children = Vec::new();
    let mut is_schema = false;
    Walker { rest: &rest[start..] }.fields(FILE_METADATA, &mut |name, value| {
        match (name, value) {
            ("element", _) if children.len() == COLUMNS => return Err(format!("it has more than {COLUMNS} columns")),
            ("element", _) => children.push(0),
            ("children", Value::Number(count)) => {
                if let Some(last) = children.last_mut() {
                    *last = count;
                }
            }
            ("key", Value::Bytes(key)) => is_schema = key == ARROW_SCHEMA,
            ("value", Value::Bytes(value)) if is_schema => {
                let schema = BASE64_STANDARD.decode(value);
                ipc::check_schema(&schema.map_err(|error| format!("its schema is damaged: {error}"))?)?;
            }
            _ => {}
        }
        Ok(())
    })?;
    check_tree(&children)
}

/// Checks how many children each element of a schema has, in depth-first order. The reader calls itself for each child.
fn check_tree(children: &[i64]) -> Result<(), String> {
    let mut missing = vec![1];
    for count in children {
        while missing.last() == Some(&0) {
            missing.pop();
        }
        let parent = missing.last_mut().ok_or("its schema has more than one root")?;
        *parent -= 1;
        if !(0..=children.len() as i64).contains(count) {
            return Err(format!("its schema has an element with {count} children"));
        }
        if *count > 0 {
            missing.push(*count);
        }
        if missing.len() > DEPTH {
            return Err("its columns are nested too deeply".to_owned());
        }
    }
    match missing.iter().all(|missing| *missing == 0) {
        true => Ok(()),
        false => Err("its schema is cut off".to_owned()),
    }
}

/// What a page's header says.
#[derive(Default)]
struct Header {
    kind: i64,
    uncompressed: i64,
    compressed: i64,
    encoding: i64,
    /// Values of a dictionary.
    values: i64,
    /// Bytes at the beginning that are never compressed.
    levels: i64,
    is_not_compressed: bool,
}

impl Header {
    fn set(&mut self, name: &'static str, value: i64) {
        match name {
            "type" => self.kind = value,
            "uncompressed" => self.uncompressed = value,
            "compressed" => self.compressed = value,
            "encoding" => self.encoding = value,
            "dictionary" => self.values = value,
            "levels" => self.levels = self.levels.saturating_add(value),
            "is compressed" => self.is_not_compressed = value == 0,
            _ => {}
        }
    }
}

/// Checks the pages of a column. All columns together have `left` bytes, from which its bytes are taken.
pub(super) fn check_column(
    file: &[u8],
    column: &ColumnChunkMetaData,
    left: &mut usize,
    limits: &mut Limits,
) -> Result<(), String> {
    let outside = "a column lies outside of its file";
    let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
    let start = usize::try_from(start).map_err(|_| outside)?;
    let length = usize::try_from(column.compressed_size()).map_err(|_| outside)?;
    let mut pages = file.get(start..).and_then(|rest| rest.get(..length)).ok_or(outside)?;
    *left = left.checked_sub(length).ok_or("its columns overlap")?;
    while !pages.is_empty() {
        let (mut header, mut walker) = (Header::default(), Walker { rest: pages });
        walker.fields(PAGE_HEADER, &mut |name, value| {
            if let Value::Number(value) = value {
                header.set(name, value);
            }
            Ok(())
        })?;
        let data = usize::try_from(header.compressed).ok();
        let (data, rest) = data
            .and_then(|length| walker.rest.split_at_checked(length))
            .ok_or("a page lies outside of its column")?;
        limits.uncompressed(header.uncompressed)?;
        check_page(&header, data, column)?;
        pages = rest;
    }
    Ok(())
}

fn check_page(header: &Header, data: &[u8], column: &ColumnChunkMetaData) -> Result<(), String> {
    let is_text = column.column_type() == Type::BYTE_ARRAY;
    if column.column_type() == Type::FIXED_LEN_BYTE_ARRAY {
        return Err(format!(
            "column {} has values of a length of its own",
            column.column_path()
        ));
    }
    if is_text && matches!(header.encoding, DELTA_LENGTH_BYTE_ARRAY | DELTA_BYTE_ARRAY) {
        return Err("it has texts with a delta encoding: write them with a dictionary".to_owned());
    }
    if header.kind == DICTIONARY_PAGE {
        if header.values.saturating_mul(VALUE) > header.uncompressed {
            return Err(format!("a dictionary cannot have {} values", header.values));
        }
        if is_text && header.uncompressed > DICTIONARY {
            return Err(format!("a dictionary of texts has more than {DICTIONARY} bytes"));
        }
    }
    match column.compression() {
        // The others stop at the size that the header says.
        Compression::GZIP(_) if !header.is_not_compressed => {
            let outside = "a page's levels lie outside of it";
            let levels = usize::try_from(header.levels).map_err(|_| outside)?;
            let data = data.get(levels..).ok_or(outside)?;
            let most = header.uncompressed as u64;
            match copy(&mut MultiGzDecoder::new(data).take(most + 1), &mut sink()) {
                Ok(size) if size <= most => Ok(()),
                Ok(_) => Err("a page has more bytes than its header says".to_owned()),
                Err(error) => Err(format!("a page is damaged: {error}")),
            }
        }
        Compression::LZ4 => Err("it is compressed with Parquet's old LZ4: use LZ4_RAW, ZSTD or SNAPPY".to_owned()),
        _ => Ok(()),
    }
}
