//! What all of the binding needs: arguments, errors, attaching threads, request objects that are reused.

pub(crate) mod arguments;
pub(crate) mod attach;
pub(crate) mod call;
pub(crate) mod ending;
pub(crate) mod errors;
pub(crate) mod fields;
pub(crate) mod judged;
pub(crate) mod overdue;
pub(crate) mod record;
pub(crate) mod reuse;
pub(crate) mod sizes;
