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

/// A virtual machine whose guest asks before a page changes hands.
///
/// ``memory``: bytes from gpa 0 on, a multiple of 4096. ``policy``: any object with hooks, see ``Policy``; ``None``
/// converts as asked. ``vm_type``: "auto", "default" or "sw-protected". ``enforcement``: "auto", "attributes" or
/// "memslots". ``shared_bit``: the address bit that selects a page's shared view. ``initial``: the state of all pages
/// at first. ``events``: how many the log keeps. ``memslots``: memory is laid out in this many equal parts.
/// ``hypervisor``: a ``pagegate.testing.Fake`` in place of /dev/kvm.
///
/// Raises KvmUnavailable, NotSupported, PolicyError, and ValueError for an argument out of range.
#[pyclass(name = "Vm", module = "pagegate", frozen, weakref)]
pub(crate) struct PyVm(pub(crate) Arc<Parts>);

/// One attach for the thread's whole life, so that each hook only switches to a thread state that is there already.
fn around(enters_python: Arc<AtomicBool>) -> ThreadWrapper {
    Arc::new(move |body| match enters_python.load(Ordering::Relaxed) {
        true => attach::thread(body, |py| {
            forget_requests(py);
            forget_accesses(py);
        }),
        false => body(),
    })
}

/// `None` for no limit, and for one that no clock reaches.
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

    #[getter]
    fn shared_bit(&self) -> Option<u32> {
        self.0.shared_bit
    }

    #[getter]
    fn enforcement(&self) -> &'static str {
        self.0.enforcement
    }

    #[getter]
    fn closed(&self) -> bool {
        lock(&self.0.machine).is_none()
    }

    #[getter]
    fn vcpus<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let count = slf.get().0.machine(slf.py())?.vcpu_count();
        let vcpu = |index| PyVcpu { vm: of_vm(slf), index };
        PyTuple::new(slf.py(), (0..count).map(vcpu).collect::<Vec<_>>())
    }

    #[getter]
    fn attributes(slf: &Bound<'_, Self>) -> PyAttributes {
        PyAttributes(of_vm(slf))
    }

    #[getter]
    fn policy(slf: &Bound<'_, Self>) -> PyPolicyHandle {
        PyPolicyHandle(of_vm(slf))
    }

    #[getter]
    fn events(slf: &Bound<'_, Self>) -> PyEvents {
        PyEvents(of_vm(slf))
    }

    /// Puts bytes, a raw file or an ELF file's segments into memory and returns the entry point.
    ///
    /// ``at`` is for what is no ELF file. Private pages that the image covers become shared first: KVM reads code
    /// through the shared side, and no host can fill the private one.
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

    /// Answers a port. For a read the handler returns ``size * count`` bytes, for a write its result is ignored.
    ///
    /// A port without a handler reads as ones. Raises ValueError for the doorbell and for a port that has a handler.
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

    /// Answers a range outside memory and its views; as ``on_io``.
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

    /// Tells an object the present state, and from then on of every conversion; see ``pagegate.Listener``.
    ///
    /// Nothing is lost or doubled in between. PolicyError for an object that is none.
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

    /// Tells it nothing more. ValueError for an object that is no listener of this machine.
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

    /// Runs every started vCPU, each in a thread of its own, until one ends the run or ``timeout`` seconds passed.
    ///
    /// The first exception of a hook is raised here, once, with notes that say where. ``timeout``, ``stop`` and Ctrl-C
    /// bring every vCPU out of the guest at once; a hook or handler that is running is Python code, which nothing can
    /// interrupt, so they wait until it returns.
    ///
    /// After "timeout", "stopped", "denied", "livelock", a Stop or an exception the run can be taken up again, and a
    /// request that nobody answered is asked again (after a Stop an explicit one finds EAGAIN). After "halt" it goes on
    /// behind the HLT; after "shutdown" the vCPU has to be started again.
    ///
    /// Raises BadBacking, Livelock, PolicyError, and PagegateError for what KVM reports and nobody can handle.
    #[pyo3(signature = (timeout = None))]
    fn run(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<PyReport> {
        let timeout = self::timeout(timeout)?;
        let machine = self.0.machine(py)?;
        let mut interrupt = || Python::attach(|py| py.check_signals()).map_err(errors::failure);
        let report = py.detach(|| machine.run(timeout, &mut interrupt));
        report.map(PyReport::from).map_err(|error| errors::raise(py, error))
    }

    /// Ends the run in progress as "stopped", from any thread; without one it does nothing.
    fn stop(&self, py: Python<'_>) {
        let machine = lock(&self.0.machine).clone();
        if let Some(machine) = machine {
            py.detach(|| machine.stop());
        }
    }

    /// ``n`` bytes of shared pages. PrivateMemoryError names the first private page.
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

    /// Writes to shared pages. PrivateMemoryError names the first private page; then nothing was written.
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

    /// Converts on the host's account: no policy is asked. What was in the pages is gone: they read as zeroes.
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

    /// Resident bytes of each side.
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

    /// Lets go of the machine, its memory and all descriptors. PagegateError while it runs.
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
        // A lock that is taken belongs to a call in progress, which refers to this object: it is no garbage.
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

/// As Python's own functions raise it: FileNotFoundError and its like, with the path.
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
