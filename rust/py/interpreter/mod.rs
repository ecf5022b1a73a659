//! What every class of the binding needs of the interpreter.

pub(crate) mod arguments;
pub(crate) mod attach;
pub(crate) mod errors;
pub(crate) mod fields;
pub(crate) mod reuse;
