//! Objects that are nothing but their fields: as a dict, and for pickle.

use pyo3::PyClass;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// What ``__getnewargs_ex__`` returns: positional arguments, and keywords.
pub(crate) type State<'py> = (Bound<'py, PyTuple>, Bound<'py, PyDict>);

/// The fields with these names, for a class that is made from them by keyword.
pub(crate) fn state<'py>(object: &Bound<'py, PyAny>, names: &[&str]) -> PyResult<State<'py>> {
    let fields = PyDict::new(object.py());
    for name in names {
        fields.set_item(name, object.getattr(*name)?)?;
    }
    Ok((PyTuple::empty(object.py()), fields))
}

/// The fields by name; those of what is in them, too, which [`made`] takes back.
pub(crate) fn asdict<'py>(object: &Bound<'py, PyAny>, names: &[&str]) -> PyResult<Bound<'py, PyDict>> {
    let (_, fields) = state(object, names)?;
    for (name, value) in fields.copy()?.iter() {
        if value.hasattr("asdict")? {
            fields.set_item(name, value.call_method0("asdict")?)?;
        }
    }
    Ok(fields)
}

/// An object of a class `C`, given as it is or as its ``asdict``. `T`: that class, or an `Option` of it.
pub(crate) fn made<'py, C, T>(given: &Bound<'py, PyAny>) -> PyResult<T>
where
    C: PyClass,
    T: for<'a> FromPyObject<'a, 'py>,
{
    let object = match given.cast::<PyDict>() {
        Ok(fields) => C::type_object(given.py()).call((), Some(fields))?,
        Err(_) => given.clone(),
    };
    object.extract().map_err(Into::into)
}

/// The keywords of a class that is made from all of its fields.
pub(crate) struct Fields<'py>(Bound<'py, PyDict>);

impl<'py> Fields<'py> {
    /// TypeError for one that is missing, or that is none of these.
    pub(crate) fn of(py: Python<'py>, given: Option<Bound<'py, PyDict>>, names: &[&str]) -> PyResult<Self> {
        let given = given.unwrap_or_else(|| PyDict::new(py));
        for name in names {
            if !given.contains(name)? {
                return Err(PyTypeError::new_err(format!(
                    "the field {name} is missing: asdict() has all of them"
                )));
            }
        }
        match given.len() == names.len() {
            true => Ok(Self(given)),
            false => Err(PyTypeError::new_err(format!(
                "there are other fields than {}",
                names.join(", ")
            ))),
        }
    }

    /// The value of one of the names.
    pub(crate) fn get<T: for<'a> FromPyObject<'a, 'py>>(&self, name: &str) -> PyResult<T> {
        self.0.as_any().get_item(name)?.extract().map_err(Into::into)
    }

    /// The value of one of the names that has fields itself, see [`made`].
    pub(crate) fn made<C, T>(&self, name: &str) -> PyResult<T>
    where
        C: PyClass,
        T: for<'a> FromPyObject<'a, 'py>,
    {
        made::<C, T>(&self.0.as_any().get_item(name)?)
    }
}
