//! The report of a run.

use pagegate_core::machine::report::Report;
use pagegate_core::vcpu::asker::Whereabouts;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::interpreter::arguments;
use crate::interpreter::record::{self, Fields};
use crate::policy::device_access::PyDeviceAccess;

/// Time from exit to resume of a run's requests, in nanoseconds, to three digits.
///
/// 0 if there were no requests.
#[pyclass(name = "Latency", module = "pagegate", frozen, get_all, eq, from_py_object)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PyLatency {
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
}

#[pymethods]
impl PyLatency {
    #[new]
    #[pyo3(signature = (*, p50, p90, p99, max))]
    fn new(
        #[pyo3(from_py_with = arguments::integer::<arguments::named::p50, _>)] p50: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::p90, _>)] p90: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::p99, _>)] p99: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::max, _>)] max: u64,
    ) -> Self {
        Self { p50, p90, p99, max }
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["p50", "p90", "p99", "max"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["p50", "p90", "p99", "max"])
    }

    fn __repr__(&self) -> String {
        let Self { p50, p90, p99, max } = self;
        format!("Latency(p50={p50}, p90={p90}, p99={p99}, max={max})")
    }
}

/// Where a vCPU was when it ended a run.
///
/// After "shutdown" AMD's KVM has reset the vCPU, so that ``rip`` is 0xfff0 then.
#[pyclass(name = "Whereabouts", module = "pagegate", frozen, get_all, eq, from_py_object)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PyWhereabouts {
    /// Index of the vCPU.
    vcpu: u32,
    /// Its instruction pointer.
    rip: u64,
    /// CR2: the linear address of its last page fault.
    cr2: u64,
    /// The kernel's function, such as "clear_bss+0x1f"; ``None`` where it is not known.
    symbol: Option<String>,
    /// The instruction, if its bytes could be had.
    instruction: Option<String>,
}

impl From<Whereabouts> for PyWhereabouts {
    fn from(at: Whereabouts) -> Self {
        Self {
            vcpu: at.vcpu,
            rip: at.rip,
            cr2: at.cr2,
            symbol: at.symbol,
            instruction: at.instruction,
        }
    }
}

#[pymethods]
impl PyWhereabouts {
    #[new]
    #[pyo3(signature = (*, vcpu, rip, cr2, symbol = None, instruction = None))]
    fn new(
        #[pyo3(from_py_with = arguments::integer::<arguments::named::vcpu, _>)] vcpu: u32,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::rip, _>)] rip: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::cr2, _>)] cr2: u64,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::symbol>)] symbol: Option<String>,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::instruction>)] instruction: Option<String>,
    ) -> Self {
        Self {
            vcpu,
            rip,
            cr2,
            symbol,
            instruction,
        }
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["vcpu", "rip", "cr2", "symbol", "instruction"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["vcpu", "rip", "cr2", "symbol", "instruction"])
    }

    fn __str__(&self) -> String {
        let mut text = format!("vCPU {} at rip {:#x}", self.vcpu, self.rip);
        if let Some(symbol) = &self.symbol {
            text += &format!(" ({symbol})");
        }
        if let Some(instruction) = &self.instruction {
            text += &format!(", {instruction}");
        }
        text + &format!(", cr2 {:#x}", self.cr2)
    }

    fn __repr__(&self) -> String {
        format!("<pagegate.Whereabouts {}>", self.__str__())
    }
}

/// Of a [`PyReport`].
const FIELDS: [&str; 21] = [
    "reason",
    "requests",
    "conversions",
    "denied",
    "retries",
    "faults",
    "hypercalls",
    "poisons",
    "malformed",
    "malformed_dropped",
    "stale",
    "opened",
    "bytes_prefaulted",
    "bytes_to_private",
    "bytes_to_shared",
    "device_accesses",
    "first_device_access",
    "at",
    "debug_private",
    "latency",
    "seconds",
];

/// What a run did, and why it ended.
///
/// One can be made from all of its fields, as ``asdict`` gives them; TypeError if they are not these.
#[pyclass(name = "Report", module = "pagegate", frozen, get_all)]
pub(crate) struct PyReport {
    /// Why it ended.
    ///
    /// "halt", "shutdown", "reboot", "poweroff", "timeout", "stopped", "denied", "livelock", or a Stop's reason.
    /// Of a run that raised: "livelock", "interrupted" or "failed".
    reason: String,
    /// Requests that reached the policy: ``faults + hypercalls``.
    ///
    /// Poisoned pages are not among them.
    requests: u64,
    /// Requests that ended in a conversion, including those whose pages were in that state already.
    conversions: u64,
    /// Requests that the policy refused.
    denied: u64,
    /// Requests that the guest had to make again.
    retries: u64,
    /// Implicit requests that reached the policy.
    faults: u64,
    /// Explicit requests that reached the policy, by hypercall or doorbell.
    hypercalls: u64,
    /// Accesses to poisoned pages.
    poisons: u64,
    /// Explicit requests that were refused without asking the policy, and unknown hypercalls.
    malformed: u64,
    /// Malformed requests that the log dropped during the run to keep newer ones.
    malformed_dropped: u64,
    /// Spurious faults: another vCPU had converted the page meanwhile, so the guest was just resumed.
    stale: u64,
    /// How often pages were opened to a vCPU without paging, in a software SEV guest.
    opened: u64,
    /// Bytes that KVM mapped before the guest touched them, for ``Convert(prefault=True)``.
    bytes_prefaulted: u64,
    /// Bytes that became private; those that were already are not counted.
    bytes_to_private: u64,
    /// Bytes that became shared; those that were already are not counted.
    bytes_to_shared: u64,
    /// Accesses of devices to what is not shared, each refused.
    device_accesses: u64,
    /// The first of them; ``None`` if there were none.
    first_device_access: Option<Py<PyDeviceAccess>>,
    /// Where the vCPU was that ended the run: after "shutdown", "denied", "livelock" and a Stop; else ``None``.
    at: Option<PyWhereabouts>,
    /// Whether the host could read and write private pages, as ``Vm(debug_private=True)`` allows.
    debug_private: bool,
    /// Time from exit to resume of its requests.
    latency: PyLatency,
    /// How long the run took.
    seconds: f64,
}

impl PyReport {
    pub(super) fn of(py: Python<'_>, report: Report) -> PyResult<Self> {
        let tally = report.tally;
        let latency = &tally.latency;
        let access = report.device_access.as_ref().map(PyDeviceAccess::from);
        Ok(Self {
            reason: report.reason,
            requests: tally.requests(),
            conversions: tally.conversions,
            denied: tally.denied,
            retries: tally.retries,
            faults: tally.faults,
            hypercalls: tally.hypercalls,
            poisons: tally.poisons,
            malformed: tally.malformed,
            malformed_dropped: report.malformed_dropped,
            stale: tally.stale,
            opened: tally.opened,
            bytes_prefaulted: tally.bytes_prefaulted,
            bytes_to_private: tally.bytes_to_private,
            bytes_to_shared: tally.bytes_to_shared,
            device_accesses: report.device_accesses,
            first_device_access: access.map(|access| Py::new(py, access)).transpose()?,
            at: report.at.map(PyWhereabouts::from),
            debug_private: report.debug_private,
            latency: PyLatency {
                p50: latency.at(0.5),
                p90: latency.at(0.9),
                p99: latency.at(0.99),
                max: latency.max(),
            },
            seconds: report.duration.as_secs_f64(),
        })
    }
}

#[pymethods]
impl PyReport {
    #[new]
    #[pyo3(signature = (**fields))]
    fn new(py: Python<'_>, fields: Option<Bound<'_, PyDict>>) -> PyResult<Self> {
        let fields = Fields::of(py, fields, &FIELDS)?;
        Ok(Self {
            reason: fields.get("reason")?,
            requests: fields.get("requests")?,
            conversions: fields.get("conversions")?,
            denied: fields.get("denied")?,
            retries: fields.get("retries")?,
            faults: fields.get("faults")?,
            hypercalls: fields.get("hypercalls")?,
            poisons: fields.get("poisons")?,
            malformed: fields.get("malformed")?,
            malformed_dropped: fields.get("malformed_dropped")?,
            stale: fields.get("stale")?,
            opened: fields.get("opened")?,
            bytes_prefaulted: fields.get("bytes_prefaulted")?,
            bytes_to_private: fields.get("bytes_to_private")?,
            bytes_to_shared: fields.get("bytes_to_shared")?,
            device_accesses: fields.get("device_accesses")?,
            first_device_access: fields.made::<PyDeviceAccess, _>("first_device_access")?,
            at: fields.made::<PyWhereabouts, _>("at")?,
            debug_private: fields.get("debug_private")?,
            latency: fields.made::<PyLatency, _>("latency")?,
            seconds: fields.get("seconds")?,
        })
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        match other.cast::<Self>() {
            Ok(other) => Self::asdict(slf)?.eq(Self::asdict(other)?),
            Err(_) => Ok(false),
        }
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &FIELDS)
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &FIELDS)
    }

    fn _repr_html_(slf: &Bound<'_, Self>) -> PyResult<String> {
        slf.py()
            .import("pagegate.html")?
            .getattr("report")?
            .call1((slf,))?
            .extract()
    }

    fn __repr__(&self) -> String {
        let Self {
            reason,
            requests,
            conversions,
            denied,
            retries,
            malformed,
            seconds,
            ..
        } = self;
        let malformed = match malformed {
            0 => String::new(),
            count => format!(", malformed={count}"),
        };
        format!(
            "Report(reason={reason:?}, requests={requests}, conversions={conversions}, denied={denied}, \
             retries={retries}{malformed}, seconds={seconds:.6})"
        )
    }
}
