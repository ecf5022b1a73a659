//! The structs of parquet.thrift, as far as a file's metadata and the headers of its pages have them.

use super::thrift::{Field, Shape};

use Shape::{Binary, Bool, Byte, Double, I16, I32, I64, List, Struct};

const fn field(id: u8, shape: Shape) -> Field {
    Field { id, shape, name: "" }
}

const fn told(id: u8, shape: Shape, name: &'static str) -> Field {
    Field { id, shape, name }
}

const NOTHING: Shape = Struct(&[]);

pub(super) const FILE_METADATA: &[Field] = &[
    field(1, I32),
    told(2, List(&Struct(SCHEMA_ELEMENT)), "element"),
    field(3, I64),
    field(4, List(&Struct(ROW_GROUP))),
    field(5, List(&Struct(KEY_VALUE))),
    field(6, Binary),
    field(7, List(&Struct(&[field(1, NOTHING), field(2, NOTHING)]))),
    field(8, NOTHING),
    field(9, Binary),
];

const SCHEMA_ELEMENT: &[Field] = &[
    field(1, I32),
    field(2, I32),
    field(3, I32),
    field(4, Binary),
    told(5, I32, "children"),
    field(6, I32),
    field(7, I32),
    field(8, I32),
    field(9, I32),
    field(10, Struct(LOGICAL_TYPE)),
];

const LOGICAL_TYPE: &[Field] = &[
    field(1, NOTHING),
    field(2, NOTHING),
    field(3, NOTHING),
    field(4, NOTHING),
    field(5, Struct(&[field(1, I32), field(2, I32)])),
    field(6, NOTHING),
    field(7, Struct(TIME)),
    field(8, Struct(TIME)),
    field(10, Struct(&[field(1, Byte), field(2, Bool)])),
    field(11, NOTHING),
    field(12, NOTHING),
    field(13, NOTHING),
    field(14, NOTHING),
    field(15, NOTHING),
    field(16, Struct(&[field(1, Byte)])),
    field(17, Struct(&[field(1, Binary)])),
    field(18, Struct(&[field(1, Binary), field(2, I32)])),
];

const TIME: &[Field] = &[
    field(1, Bool),
    field(2, Struct(&[field(1, NOTHING), field(2, NOTHING), field(3, NOTHING)])),
];

const ROW_GROUP: &[Field] = &[
    field(1, List(&Struct(COLUMN_CHUNK))),
    field(2, I64),
    field(3, I64),
    field(4, List(&Struct(&[field(1, I32), field(2, Bool), field(3, Bool)]))),
    field(5, I64),
    field(6, I64),
    field(7, I16),
];

const COLUMN_CHUNK: &[Field] = &[
    field(1, Binary),
    field(2, I64),
    field(3, Struct(COLUMN_METADATA)),
    field(4, I64),
    field(5, I32),
    field(6, I64),
    field(7, I32),
    field(
        8,
        Struct(&[
            field(1, NOTHING),
            field(2, Struct(&[field(1, List(&Binary)), field(2, Binary)])),
        ]),
    ),
    field(9, Binary),
];

const COLUMN_METADATA: &[Field] = &[
    field(1, I32),
    field(2, List(&I32)),
    field(3, List(&Binary)),
    field(4, I32),
    field(5, I64),
    field(6, I64),
    field(7, I64),
    field(8, List(&Struct(KEY_VALUE))),
    field(9, I64),
    field(10, I64),
    field(11, I64),
    field(12, Struct(STATISTICS)),
    field(13, List(&Struct(&[field(1, I32), field(2, I32), field(3, I32)]))),
    field(14, I64),
    field(15, I32),
    field(16, Struct(&[field(1, I64), field(2, List(&I64)), field(3, List(&I64))])),
    field(17, Struct(&[field(1, Struct(BOX)), field(2, List(&I32))])),
];

const BOX: &[Field] = &[
    field(1, Double),
    field(2, Double),
    field(3, Double),
    field(4, Double),
    field(5, Double),
    field(6, Double),
    field(7, Double),
    field(8, Double),
];

const STATISTICS: &[Field] = &[
    field(1, Binary),
    field(2, Binary),
    field(3, I64),
    field(4, I64),
    field(5, Binary),
    field(6, Binary),
    field(7, Bool),
    field(8, Bool),
    field(9, I64),
];

const KEY_VALUE: &[Field] = &[told(1, Binary, "key"), told(2, Binary, "value")];

pub(super) const PAGE_HEADER: &[Field] = &[
    told(1, I32, "type"),
    told(2, I32, "uncompressed"),
    told(3, I32, "compressed"),
    field(4, I32),
    field(
        5,
        Struct(&[
            field(1, I32),
            told(2, I32, "encoding"),
            field(3, I32),
            field(4, I32),
            field(5, Struct(STATISTICS)),
        ]),
    ),
    field(6, NOTHING),
    field(
        7,
        Struct(&[told(1, I32, "dictionary"), told(2, I32, "encoding"), field(3, Bool)]),
    ),
    field(
        8,
        Struct(&[
            field(1, I32),
            field(2, I32),
            field(3, I32),
            told(4, I32, "encoding"),
            told(5, I32, "levels"),
            told(6, I32, "levels"),
            told(7, Bool, "is compressed"),
            field(8, Struct(STATISTICS)),
        ]),
    ),
];
