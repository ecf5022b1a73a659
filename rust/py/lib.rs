//! The binding: it translates between the core and Python, and decides nothing.

mod arrow;
mod attach;
mod bare;
mod decision;
mod devices;
mod errors;
mod events;
mod fields;
mod gate;
mod host;
mod listener;
mod machine;
mod marks;
mod names;
mod policies;
mod policy;
mod report;
mod request;
mod reuse;
mod testing;
mod trace;
mod trial;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::bare::bare_loop;
    #[pymodule_export]
    use crate::decision::{PyConvert, PyDeny, PyDiscard, PyRegion, PyRetry, PyStop};
    #[pymodule_export]
    use crate::devices::{PyIo, PyMmio};
    #[pymodule_export]
    use crate::events::{PyEvent, PyEvents};
    #[pymodule_export]
    use crate::gate::PyGate;
    #[pymodule_export]
    use crate::host::{PyHost, probe};
    #[pymodule_export]
    use crate::listener::PyChange;
    #[pymodule_export]
    use crate::machine::{PyAttributes, PyMemoryUsage, PyVcpu, PyVm};
    #[pymodule_export]
    use crate::marks::PyMarks;
    #[pymodule_export]
    use crate::policies::{
        PyAlign, PyAllow, PyBuiltin, PyDenyAll, PyExplicitOnly, PyPingPong, PyQuota, PyRateLimit, PyWindow,
    };
    #[pymodule_export]
    use crate::report::{PyLatency, PyReport};
    #[pymodule_export]
    use crate::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};
    #[pymodule_export]
    use crate::testing::{PyFake, PyReply, PyStep};
    #[pymodule_export]
    use crate::trace::{
        PyDifference, PyJudged, PyRecorder, PyReplay, PyTrace, PyTraceIterator, read_trace, replay, synthetic_trace,
    };
    #[pymodule_export]
    use crate::trial::PyTrial;

    #[pymodule_export]
    const DOORBELL_PORT: u16 = pagegate_core::explicit::DOORBELL_PORT;
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python packages give it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    const LIVELOCK_BOUND: u32 = pagegate_core::run::LIVELOCK_BOUND;

    /// The machine code that ``pagegate.guests.Script`` runs: position-independent, long mode.
    #[pyfunction]
    fn script_guest() -> &'static [u8] {
        pagegate_core::guests::script()
    }
}
