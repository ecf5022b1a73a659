//! Walks through bytes in Thrift's compact protocol by the shapes that they must have, and copies nothing.
//!
//! The reader of the parquet crate takes the type of a field and the length of a list as given. What was walked through
//! here has the types that it expects, and as many elements in each list as the list says.

/// How deep unknown fields may be nested.
const DEPTH: u8 = 16;

/// The type of a value.
pub(super) enum Shape {
    Bool,
    Byte,
    I16,
    I32,
    I64,
    Double,
    Binary,
    List(&'static Shape),
    Struct(&'static [Field]),
}

/// A field of a struct.
pub(super) struct Field {
    pub(super) id: u8,
    pub(super) shape: Shape,
    /// Under what name the value is told; "" if it is not.
    pub(super) name: &'static str,
}

/// A value that is told.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Number(i64),
    Bytes(&'a [u8]),
    /// The beginning of a struct in a list.
    Begin,
}

/// What is called with each named value.
pub(super) type Told<'t, 'a> = dyn FnMut(&'static str, Value<'a>) -> Result<(), String> + 't;

mod wire {
    pub(super) const STOP: u8 = 0;
    pub(super) const TRUE: u8 = 1;
    pub(super) const FALSE: u8 = 2;
    pub(super) const BYTE: u8 = 3;
    pub(super) const I16: u8 = 4;
    pub(super) const I32: u8 = 5;
    pub(super) const I64: u8 = 6;
    pub(super) const DOUBLE: u8 = 7;
    pub(super) const BINARY: u8 = 8;
    pub(super) const LIST: u8 = 9;
    pub(super) const STRUCT: u8 = 12;
}

impl Shape {
    /// Whether a field of this shape can have this type on the wire.
    fn fits(&self, kind: u8) -> bool {
        let expected = match self {
            Shape::Bool => return matches!(kind, wire::TRUE | wire::FALSE),
            Shape::Byte => wire::BYTE,
            Shape::I16 => wire::I16,
            Shape::I32 => wire::I32,
            Shape::I64 => wire::I64,
            Shape::Double => wire::DOUBLE,
            Shape::Binary => wire::BINARY,
            Shape::List(_) => wire::LIST,
            Shape::Struct(_) => wire::STRUCT,
        };
        kind == expected
    }
}

/// The bytes that are left.
pub(super) struct Walker<'a> {
    pub(super) rest: &'a [u8],
}

impl<'a> Walker<'a> {
    /// Walks through a struct.
    pub(super) fn fields(&mut self, fields: &'static [Field], told: &mut Told<'_, 'a>) -> Result<(), String> {
        let mut id = 0;
        while let Some((next, kind)) = self.field(id)? {
            id = next;
            match fields.iter().find(|field| u16::from(field.id) == id) {
                Some(field) if !field.shape.fits(kind) => {
                    return Err(format!("its metadata is damaged: field {id} has type {kind}"));
                }
                // In a struct, the type is the value.
                Some(field) if matches!(field.shape, Shape::Bool) => {
                    if !field.name.is_empty() {
                        told(field.name, Value::Number((kind == wire::TRUE).into()))?;
                    }
                }
                Some(field) => self.value(&field.shape, field.name, told)?,
                None => self.skip(kind, DEPTH)?,
            }
        }
        Ok(())
    }

    /// The next field's id and type; `None` at the end of the struct.
    fn field(&mut self, last: u16) -> Result<Option<(u16, u8)>, String> {
        let byte = self.byte()?;
        match (byte >> 4, byte & 0xf) {
            (_, wire::STOP) => Ok(None),
            // Followed by the whole id, which no writer needs as long as ids are small.
            (0, _) => Err("its metadata is damaged: a field is out of order".to_owned()),
            (delta, kind) => Ok(Some((last + u16::from(delta), kind))),
        }
    }

    fn value(&mut self, shape: &'static Shape, name: &'static str, told: &mut Told<'_, 'a>) -> Result<(), String> {
        let value = match shape {
            Shape::Bool | Shape::Byte => Value::Number(self.byte()?.into()),
            Shape::I16 => Value::Number(self.number::<i16>()?.into()),
            Shape::I32 => Value::Number(self.number::<i32>()?.into()),
            Shape::I64 => Value::Number(self.number::<i64>()?),
            Shape::Double => Value::Bytes(self.bytes(8)?),
            Shape::Binary => Value::Bytes(self.binary()?),
            Shape::Struct(fields) => return self.fields(fields, told),
            Shape::List(of) => {
                let (kind, count) = self.list()?;
                if count > 0 && !of.fits(kind) {
                    return Err(format!("its metadata is damaged: a list has elements of type {kind}"));
                }
                for _ in 0..count {
                    if matches!(of, Shape::Struct(_)) && !name.is_empty() {
                        told(name, Value::Begin)?;
                    }
                    self.value(of, name, told)?;
                }
                return Ok(());
            }
        };
        match name {
            "" => Ok(()),
            name => told(name, value),
        }
    }

    fn skip(&mut self, kind: u8, depth: u8) -> Result<(), String> {
        let depth = depth.checked_sub(1).ok_or("its metadata is nested too deeply")?;
        match kind {
            wire::TRUE | wire::FALSE => {}
            wire::BYTE => drop(self.byte()?),
            wire::I16 | wire::I32 | wire::I64 => drop(self.varint()?),
            wire::DOUBLE => drop(self.bytes(8)?),
            wire::BINARY => drop(self.binary()?),
            wire::LIST => {
                let (kind, count) = self.list()?;
                // In a list they have a byte, which not every reader skips.
                if count > 0 && matches!(kind, wire::TRUE | wire::FALSE) {
                    return Err("its metadata has an unknown list of truth values".to_owned());
                }
                for _ in 0..count {
                    self.skip(kind, depth)?;
                }
            }
            wire::STRUCT => {
                let mut id = 0;
                while let Some((next, kind)) = self.field(id)? {
                    id = next;
                    self.skip(kind, depth)?;
                }
            }
            kind => return Err(format!("its metadata is damaged: there is a value of type {kind}")),
        }
        Ok(())
    }

    /// The type and the number of a list's elements. Each has at least one byte.
    fn list(&mut self) -> Result<(u8, usize), String> {
        let byte = self.byte()?;
        let count = match byte >> 4 {
            0xf => self.varint()?,
            count => count.into(),
        };
        match usize::try_from(count) {
            Ok(count) if count <= self.rest.len() => Ok((byte & 0xf, count)),
            _ => Err("its metadata is damaged: a list is longer than its file".to_owned()),
        }
    }

    fn number<T: TryFrom<i64>>(&mut self) -> Result<T, String> {
        let value = self.varint()?;
        let value = (value >> 1) as i64 ^ -((value & 1) as i64);
        T::try_from(value).map_err(|_| format!("its metadata is damaged: {value} is out of range"))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("its metadata is damaged: a number has too many bytes".to_owned())
    }

    fn binary(&mut self) -> Result<&'a [u8], String> {
        let length = self.varint()?;
        self.bytes(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.bytes(1)?[0])
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], String> {
        let cut_off = || "its metadata is cut off".to_owned();
        let (bytes, rest) = self.rest.split_at_checked(count).ok_or_else(cut_off)?;
        self.rest = rest;
        Ok(bytes)
    }
}
