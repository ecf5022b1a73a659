//! The binding: it translates between the core and Python, and decides nothing.

mod baseline;
mod devices;
mod events;
mod interpreter;
mod machine;
mod policy;
mod testing;
mod trace;

use pyo3::prelude::*;

/// It does not need the GIL: what threads share has its own locks, or is an atomic.
#[pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::baseline::{bare_loop, serve_missing};
    #[pymodule_export]
    use crate::devices::builtin::{PyBlock, PyBuiltinDevice, PyConsole, PyNet, PyRng, PyVsock};
    #[pymodule_export]
    use crate::devices::console::PyConsolePort;
    #[pymodule_export]
    use crate::devices::request::{PyDeviceQueue, PyDeviceRequest};
    #[pymodule_export]
    use crate::events::event::{PyEvent, event_words};
    #[pymodule_export]
    use crate::machine::attributes::{PyAttributes, PyMemoryUsage};
    #[pymodule_export]
    use crate::machine::device_io::{PyIo, PyMmio};
    #[pymodule_export]
    use crate::machine::event_log::PyEvents;
    #[pymodule_export]
    use crate::machine::host::{PyHost, probe};
    #[pymodule_export]
    use crate::machine::listener::PyChange;
    #[pymodule_export]
    use crate::machine::marks::PyMarks;
    #[pymodule_export]
    use crate::machine::missing::{PyMissingPage, PyTouchedPage};
    #[pymodule_export]
    use crate::machine::policy_handle::PyPolicyHandle;
    #[pymodule_export]
    use crate::machine::report::{PyLatency, PyReport, PyWhereabouts};
    #[pymodule_export]
    use crate::machine::vcpu::PyVcpu;
    #[pymodule_export]
    use crate::machine::vm::PyVm;
    #[pymodule_export]
    use crate::policy::asker::PyRegisters;
    #[pymodule_export]
    use crate::policy::builtin::{
        PyAlign, PyAllow, PyDenyAll, PyExplicitOnly, PyPingPong, PyQuota, PyRateLimit, PyWindow,
    };
    #[pymodule_export]
    use crate::policy::decision::{PyConvert, PyDeny, PyDiscard, PyRegion, PyRetry, PyStop};
    #[pymodule_export]
    use crate::policy::device_access::PyDeviceAccess;
    #[pymodule_export]
    use crate::policy::judge::PyBuiltin;
    #[pymodule_export]
    use crate::policy::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};
    #[pymodule_export]
    use crate::testing::fake::{PyFake, PyReply, PyStep};
    #[pymodule_export]
    use crate::testing::trial::PyTrial;
    #[pymodule_export]
    use crate::trace::recorded::{PyTrace, PyTraceIterator, read_trace, synthetic_trace};
    #[pymodule_export]
    use crate::trace::recorder::PyRecorder;
    #[pymodule_export]
    use crate::trace::replay::{PyDifference, PyJudged, PyReplay, replay};

    #[pymodule_export]
    const DOORBELL_PORT: u16 = pagegate_core::hypervisor::hypercall::DOORBELL_PORT;
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python packages give it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    const LIVELOCK_BOUND: u32 = pagegate_core::vcpu::running::LIVELOCK_BOUND;

    #[pymodule_export]
    use crate::interpreter::arguments::timeout_seconds;
    #[pymodule_export]
    use crate::interpreter::ending::end;
    #[pymodule_export]
    use crate::interpreter::sizes::{number_of_bytes, whole_number};
    #[pymodule_export]
    use crate::machine::input::regular_file;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let atexit = module.py().import("atexit")?;
        atexit.call_method1("register", (module.getattr("_end")?,))?;
        Ok(())
    }

    /// The machine code that executes a ``pagegate.guests.Script``: long mode, position-independent.
    #[pyfunction]
    fn script_guest() -> &'static [u8] {
        pagegate_core::boot::script_guest::script()
    }
}
