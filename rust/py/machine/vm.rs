//! The virtual machine.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagegate_core::boot::image::Image;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::{Config, ThreadWrapper};
use pagegate_core::memory::listeners::Listener;
use pagegate_core::trace::about::About;
use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::attributes::{PyAttributes, PyMemoryUsage};
use super::device_io::{Handler, forget_accesses};
use super::event_log::PyEvents;
use super::listener::PyListener;
use super::marks::PyMarks;
use super::parts::{Callbacks, OfVm, Parts, lock};
use super::policy_handle::PyPolicyHandle;
use super::report::PyReport;
use super::vcpu::PyVcpu;
use crate::interpreter::{arguments, attach, errors};
use crate::policy::hooks::forget_requests;
use crate::policy::judge::Judge;
use crate::testing::fake::PyFake;

/// A virtual machine in which a policy decides whether pages are converted.
///
/// ``memory``: bytes from gpa 0 on, a multiple of 4096. ``vcpus``: at least 1. ``policy``: any object with hooks, see
/// ``Policy``; ``None`` converts as asked. ``vm_type``: "auto", "default" or "sw-protected". ``enforcement``: "auto",
/// "attributes" (by KVM_SET_MEMORY_ATTRIBUTES, on hosts with private memory) or "memslots" (on any host).
/// ``shared_bit``: the address bit that selects a page's shared view, above all of memory and below 52; ``None`` for
/// one view of each page. ``initial``: the state of all pages at first. ``events``: how many requests the log keeps.
/// ``memslots``: memory is divided into this many equal parts, and no memslot crosses from one to the next.
/// ``hypervisor``: a ``pagegate.testing.Fake`` in place of /dev/kvm.
///
/// Raises KvmUnavailable, NotSupported, PolicyError, and ValueError for an argument out of range.
#[pyclass(name = "Vm", module = "pagegate", frozen, weakref)]
pub(crate) struct PyVm(pub(crate) Arc<Parts>);

/// Gives a vCPU thread one Python thread state for its whole life, if it may call Python.
fn around(enters_python: Arc<AtomicBool>) -> ThreadWrapper {
    Arc::new(move |body| match enters_python.load(Ordering::Relaxed) {
        true => attach::thread(body, |py| {
            forget_requests(py);
            forget_accesses(py);
        }),
        false => body(),
    })
}

/// `None` for no limit, and for one that is too long for a `Duration`.
fn timeout(seconds: Option<f64>) -> PyResult<Option<Duration>> {
    match seconds {
        Some(seconds) if seconds.is_nan() || seconds < 0.0 => {
            let message = format!("timeout is {seconds}: it must be a number of seconds, not negative");
            Err(PyValueError::new_err(message))
        }
        Some(seconds) => Ok(Duration::try_from_secs_f64(seconds).ok()),
        None => Ok(None),
    }
}

#[pymethods]
impl PyVm {
    #[new]
    #[pyo3(signature = (memory, *, vcpus = 1, policy = None, vm_type = "auto", enforcement = "auto", shared_bit = None,
                        initial = "shared", events = 65536, memslots = 1, hypervisor = None))]
    #[expect(clippy::too_many_arguments, reason = "one keyword a setting")]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] memory: u64,
        #[pyo3(from_py_with = arguments::integer)] vcpus: u32,
        policy: Option<&Bound<'_, PyAny>>,
        vm_type: &str,
        enforcement: &str,
        #[pyo3(from_py_with = arguments::optional)] shared_bit: Option<u32>,
        initial: &str,
        #[pyo3(from_py_with = arguments::integer)] events: usize,
        #[pyo3(from_py_with = arguments::integer)] memslots: u32,
        hypervisor: Option<&PyFake>,
    ) -> PyResult<Self> {
        let judge = Judge::of(policy)?;
        let enters_python = Arc::new(AtomicBool::new(judge.enters_python));
        let config = Config {
            memory,
            vcpus,
            vm_type: arguments::vm_type(vm_type)?,
            enforcement: arguments::enforcement(enforcement)?,
            shared_bit,
            initial: arguments::state(initial, "initial")?,
            events,
            memslots,
            policy: judge.policy.clone(),
            around: Some(around(enters_python.clone())),
            hypervisor: hypervisor.map(PyFake::vm),
        };
        let machine = py
            .detach(|| Machine::new(config))
            .map_err(|error| errors::raise(py, error))?;
        Ok(Self(Arc::new(Parts {
            memory,
            about: About::now(machine.events(), machine.memory()),
            shared_bit,
            enforcement: machine.enforcement().as_str(),
            machine: Mutex::new(Some(Arc::new(machine))),
            callbacks: Mutex::new(Some(Callbacks {
                judge,
                policy: policy.map(|policy| policy.clone().unbind()),
                handlers: Vec::new(),
                listeners: Vec::new(),
            })),
            enters_python,
        })))
    }

    /// Bytes of guest memory.
    #[getter]
    fn memory(&self) -> u64 {
        self.0.memory
    }

    /// The address bit that selects a page's shared view; ``None`` if each page has one view.
    #[getter]
    fn shared_bit(&self) -> Option<u32> {
        self.0.shared_bit
    }

    /// How page states are enforced.
    #[getter]
    fn enforcement(&self) -> &'static str {
        self.0.enforcement
    }

    /// Whether the machine is closed.
    #[getter]
    fn closed(&self) -> bool {
        lock(&self.0.machine).is_none()
    }

    /// The vCPUs, by index.
    #[getter]
    fn vcpus<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let count = slf.get().0.machine(slf.py())?.vcpu_count();
        let vcpu = |index| PyVcpu { vm: of_vm(slf), index };
        PyTuple::new(slf.py(), (0..count).map(vcpu).collect::<Vec<_>>())
    }

    /// The state of every page.
    #[getter]
    fn attributes(slf: &Bound<'_, Self>) -> PyAttributes {
        PyAttributes(of_vm(slf))
    }

    /// The policy in place, to look at or replace.
    #[getter]
    fn policy(slf: &Bound<'_, Self>) -> PyPolicyHandle {
        PyPolicyHandle(of_vm(slf))
    }

    /// The log of requests.
    #[getter]
    fn events(slf: &Bound<'_, Self>) -> PyEvents {
        PyEvents(of_vm(slf))
    }

    /// Loads bytes, a raw file or an ELF file's segments into guest memory, and returns the entry point.
    ///
    /// ``image``: bytes, which are loaded as they are, or a path. ``at``: where they go, for what is no ELF file. Pages
    /// that the image covers become shared first: KVM reads code from the shared side, and the host cannot write to the
    /// private one. Raises OSError, ValueError for an image that does not fit or is malformed, PagegateError.
    #[pyo3(signature = (image, at = 0x1000))]
    fn load(
        &self,
        py: Python<'_>,
        image: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = arguments::integer)] at: u64,
    ) -> PyResult<u64> {
        let machine = self.0.machine(py)?;
        let load = |image: &Image<'_>| {
            py.detach(|| machine.load(image))
                .map_err(|error| errors::raise(py, error))
        };
        if let Ok(bytes) = arguments::bytes(image) {
            return load(&Image::raw(&bytes, at));
        }
        let path: PathBuf = image
            .extract()
            .map_err(|_| PyTypeError::new_err("image must be bytes-like, or the path of an ELF or raw file"))?;
        let bytes = std::fs::read(&path).map_err(|error| os_error(&error, &path))?;
        match Image::is_elf(&bytes) {
            true => load(&Image::elf(&bytes).map_err(|error| errors::raise(py, error))?),
            false => load(&Image::raw(&bytes, at)),
        }
    }

    /// Sets the handler of a port. For a read it returns ``size * count`` bytes, for a write its result is ignored.
    ///
    /// Handlers are called on vCPU threads. A read answered with anything else ends the run with PolicyError. A port
    /// without a handler reads as ones. Raises ValueError for the doorbell and for a port that has a handler already.
    fn on_io(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] port: u16,
        handler: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        if let Ok(marks) = handler.cast::<PyMarks>() {
            let added = machine.on_io(port, marks.get().0.clone());
            return added.map_err(|error| errors::raise(py, error));
        }
        let handler = callable(handler)?;
        machine
            .on_io(port, handler.clone())
            .map_err(|error| errors::raise(py, error))?;
        self.0.keep(&handler);
        Ok(())
    }

    /// Sets the handler of ``size`` bytes outside guest memory and its views; otherwise as ``on_io``.
    fn on_mmio(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer)] size: u64,
        handler: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let handler = callable(handler)?;
        let machine = self.0.machine(py)?;
        machine
            .on_mmio(gpa, size, handler.clone())
            .map_err(|error| errors::raise(py, error))?;
        self.0.keep(&handler);
        Ok(())
    }

    /// Tells an object the present states, and from then on every conversion; see ``pagegate.Listener``.
    ///
    /// No conversion in between is missed or told twice. Raises PolicyError for an object that is no listener.
    fn add_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        let listener = Arc::new(PyListener::resolve(listener)?);
        let joined = py.detach(|| machine.add_listener(listener.clone()));
        joined.map_err(|error| errors::raise(py, error))?;
        if let Some(callbacks) = lock(&self.0.callbacks).as_mut() {
            callbacks.listeners.push(listener);
        }
        self.0.enters_python.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Stops telling an object of conversions.
    ///
    /// It waits for those under way, and after it nothing more is told. From inside of a listener it does not wait, and
    /// the conversion under way is still told to its end.
    ///
    /// ValueError if it is no listener of this machine.
    fn remove_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        let known = {
            let mut callbacks = lock(&self.0.callbacks);
            let listeners = callbacks.as_mut().map(|callbacks| &mut callbacks.listeners);
            listeners.and_then(|listeners| {
                let at = listeners.iter().position(|known| known.is(listener))?;
                Some(listeners.remove(at))
            })
        };
        let Some(known) = known else {
            return Err(PyValueError::new_err("this object is no listener of this machine"));
        };
        let known: Arc<dyn Listener> = known;
        py.detach(|| machine.remove_listener(&known));
        Ok(())
    }

    /// Runs every started vCPU, each in its own thread, until one ends the run, all halt or ``timeout`` is over.
    ///
    /// ``timeout``: seconds, ``None`` for no limit. ``timeout``, ``stop`` and Ctrl-C bring every vCPU out of the guest
    /// at once. A hook or handler that is being called is not interrupted: the run ends after it returns. An exception
    /// that a hook raises ends the run and is raised here, with vCPU, gpa, state and rip as notes; if there are
    /// several, only the first.
    ///
    /// After "timeout", "stopped", "denied", "livelock", a Stop or an exception, ``run`` can be called again, and a
    /// request that was not answered is put to the policy again (after a Stop, an explicit one has got EAGAIN). After
    /// "halt" the guest continues after the HLT; after "shutdown" the vCPU has to be started again.
    ///
    /// Raises BadBacking, Livelock, PolicyError, PagegateError for an exit that cannot be handled or if no vCPU is
    /// started, and ValueError for a negative ``timeout``.
    #[pyo3(signature = (timeout = None))]
    fn run(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<PyReport> {
        let timeout = self::timeout(timeout)?;
        let machine = self.0.machine(py)?;
        let mut interrupt = || Python::attach(|py| py.check_signals()).map_err(errors::failure);
        let report = py.detach(|| machine.run(timeout, &mut interrupt));
        report.map(PyReport::from).map_err(|error| errors::raise(py, error))
    }

    /// Ends the run in progress as "stopped", from any thread. Does nothing if there is none.
    fn stop(&self, py: Python<'_>) {
        let machine = lock(&self.0.machine).clone();
        if let Some(machine) = machine {
            py.detach(|| machine.stop());
        }
    }

    /// Reads ``n`` bytes of shared pages.
    ///
    /// Raises PrivateMemoryError, which names the first private page, and ValueError outside memory.
    fn read<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer)] n: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let machine = self.0.machine(py)?;
        if n as u64 > self.0.memory {
            let memory = self.0.memory;
            return Err(PyValueError::new_err(format!(
                "{n:#x} bytes are more than the guest's {memory:#x}"
            )));
        }
        PyBytes::new_with(py, n, |into| {
            py.detach(|| machine.read(gpa, into))
                .map_err(|error| errors::raise(py, error))
        })
    }

    /// Writes ``data`` to shared pages.
    ///
    /// Raises PrivateMemoryError, which names the first private page, and ValueError outside memory; then nothing is
    /// written.
    fn write(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::bytes)] data: Vec<u8>,
    ) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        py.detach(|| machine.write(gpa, &data))
            .map_err(|error| errors::raise(py, error))
    }

    /// Converts pages without asking the policy. They lose their bytes and read as zeroes.
    ///
    /// ``gpa`` and ``size``: bytes, multiples of 4096. Raises ValueError for what is no range of pages in memory,
    /// PagegateError if the kernel or a listener refuses, and what a listener raises.
    #[pyo3(signature = (gpa, size, *, to))]
    fn convert(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer)] size: u64,
        to: &str,
    ) -> PyResult<()> {
        let to = arguments::state(to, "to")?;
        let machine = self.0.machine(py)?;
        py.detach(|| machine.convert(gpa, size, to))
            .map_err(|error| errors::raise(py, error))?;
        Ok(())
    }

    /// Resident bytes of guest memory, on each side.
    fn memory_usage(&self, py: Python<'_>) -> PyResult<PyMemoryUsage> {
        let machine = self.0.machine(py)?;
        let resident = py
            .detach(|| machine.resident())
            .map_err(|error| errors::raise(py, error))?;
        Ok(PyMemoryUsage {
            shared: resident.shared,
            private: resident.private,
            exact: resident.exact,
        })
    }

    /// Frees the machine, its memory and all descriptors. PagegateError while it runs.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let mut slot = lock(&self.0.machine);
        if slot.as_ref().is_some_and(|machine| machine.running()) {
            return Err(errors::busy(
                py,
                "the machine is running: call stop() and let run() return before close()",
            ));
        }
        let machine = slot.take();
        drop(slot);
        if let Some(machine) = machine {
            py.detach(|| {
                machine.clear_handlers();
                drop(machine);
            });
        }
        drop(lock(&self.0.callbacks).take());
        Ok(())
    }

    fn __enter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<Self>> {
        slf.get().0.machine(py)?;
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let Parts {
            memory, enforcement, ..
        } = self.0.as_ref();
        let closed = if self.closed() { ", closed" } else { "" };
        format!("<pagegate.Vm memory={memory:#x} enforcement={enforcement:?}{closed}>")
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // If the lock is taken, a call is in progress; it refers to this object, which therefore is no garbage.
        if let Ok(Some(callbacks)) = self.0.callbacks.try_lock().as_deref() {
            callbacks.judge.traverse(&visit)?;
            if let Some(policy) = &callbacks.policy {
                visit.call(policy)?;
            }
            for handler in &callbacks.handlers {
                visit.call(&handler.0)?;
            }
            for listener in &callbacks.listeners {
                listener.traverse(&visit)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        drop(lock(&self.0.machine).take());
        drop(lock(&self.0.callbacks).take());
    }
}

fn of_vm(vm: &Bound<'_, PyVm>) -> OfVm {
    OfVm {
        parts: vm.get().0.clone(),
        vm: vm.clone().into_any().unbind(),
    }
}

fn callable(handler: Bound<'_, PyAny>) -> PyResult<Arc<Handler>> {
    match handler.is_callable() {
        true => Ok(Arc::new(Handler(handler.unbind()))),
        false => Err(PyTypeError::new_err("the handler must be callable")),
    }
}

/// The OSError that Python's own functions would raise, such as FileNotFoundError, with the path.
fn os_error(error: &std::io::Error, path: &std::path::Path) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => {
            let text = error.to_string();
            let text = text.split(" (os error").next().unwrap_or_default().to_owned();
            PyOSError::new_err((errno, text, path.to_path_buf()))
        }
        None => PyOSError::new_err(error.to_string()),
    }
}
