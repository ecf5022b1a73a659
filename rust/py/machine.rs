//! The virtual machine.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagegate_core::attributes::{PAGE_SIZE, Range, State};
use pagegate_core::boot::{self, REGISTERS, SYSTEM_REGISTERS};
use pagegate_core::image::Image;
use pagegate_core::listener::Listener;
use pagegate_core::machine::{Config, Machine, ThreadWrapper};
use pagegate_core::trace::About;
use pyo3::exceptions::{PyIndexError, PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use crate::devices::{Handler, forget_accesses};
use crate::events::PyEvents;
use crate::gate::PyGate;
use crate::listener::PyListener;
use crate::marks::PyMarks;
use crate::policy::{Judge, PyPolicy, forget_requests};
use crate::report::PyReport;
use crate::testing::PyFake;
use crate::{attach, errors, names};

/// What Python objects a machine refers to, for the garbage collector.
struct Callbacks {
    judge: Judge,
    /// The judge as it was given.
    policy: Option<Py<PyAny>>,
    handlers: Vec<Arc<Handler>>,
    listeners: Vec<Arc<PyListener>>,
}

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
pub(crate) struct PyVm {
    machine: Mutex<Option<Arc<Machine>>>,
    callbacks: Mutex<Option<Callbacks>>,
    /// vCPU threads keep a Python thread state only where something may be called.
    enters_python: Arc<AtomicBool>,
    memory: u64,
    /// The memory as it was at first, for whoever reads the log later.
    about: About,
    shared_bit: Option<u32>,
    enforcement: &'static str,
}

/// No code that holds these locks can panic half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PyVm {
    pub(crate) fn machine(&self, py: Python<'_>) -> PyResult<Arc<Machine>> {
        let machine = lock(&self.machine).clone();
        machine.ok_or_else(|| errors::busy(py, "this machine is closed"))
    }

    pub(crate) fn about(&self) -> &About {
        &self.about
    }

    /// The policy as it was given.
    pub(crate) fn given(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let callbacks = lock(&self.callbacks);
        callbacks.as_ref()?.policy.as_ref().map(|policy| policy.clone_ref(py))
    }

    /// The Python policy at the end of the chain.
    pub(crate) fn hooks(&self) -> Option<Arc<PyPolicy>> {
        lock(&self.callbacks).as_ref()?.judge.hooks().cloned()
    }

    pub(crate) fn replace(&self, py: Python<'_>, policy: &Bound<'_, PyAny>) -> PyResult<()> {
        let judge = Judge::of(Some(policy))?;
        let machine = self.machine(py)?;
        if judge.enters_python {
            self.enters_python.store(true, Ordering::Relaxed);
        }
        let given = Some(policy.clone().unbind());
        let old = match lock(&self.callbacks).as_mut() {
            Some(callbacks) => {
                machine.replace_policy(judge.policy.clone());
                let judge = std::mem::replace(&mut callbacks.judge, judge);
                Some((judge, std::mem::replace(&mut callbacks.policy, given)))
            }
            None => None,
        };
        // Outside the lock: what it refers to may run Python code when it goes.
        drop(old);
        Ok(())
    }

    fn keep(&self, handler: &Arc<Handler>) {
        if let Some(callbacks) = lock(&self.callbacks).as_mut() {
            callbacks.handlers.push(handler.clone());
        }
        self.enters_python.store(true, Ordering::Relaxed);
    }
}

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
        #[pyo3(from_py_with = names::u64)] memory: u64,
        #[pyo3(from_py_with = names::u32)] vcpus: u32,
        policy: Option<&Bound<'_, PyAny>>,
        vm_type: &str,
        enforcement: &str,
        #[pyo3(from_py_with = names::optional_u32)] shared_bit: Option<u32>,
        initial: &str,
        #[pyo3(from_py_with = names::usize)] events: usize,
        #[pyo3(from_py_with = names::u32)] memslots: u32,
        hypervisor: Option<&PyFake>,
    ) -> PyResult<Self> {
        let judge = Judge::of(policy)?;
        let enters_python = Arc::new(AtomicBool::new(judge.enters_python));
        let config = Config {
            memory,
            vcpus,
            vm_type: names::vm_type(vm_type)?,
            enforcement: names::enforcement(enforcement)?,
            shared_bit,
            initial: names::state(initial, "initial")?,
            events,
            memslots,
            policy: judge.policy.clone(),
            around: Some(around(enters_python.clone())),
            fake: hypervisor.map(PyFake::vm),
        };
        let machine = py
            .detach(|| Machine::new(config))
            .map_err(|error| errors::raise(py, error))?;
        Ok(Self {
            memory,
            about: About::now(machine.gate()),
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
        })
    }

    /// Bytes of guest memory.
    #[getter]
    fn memory(&self) -> u64 {
        self.memory
    }

    #[getter]
    fn shared_bit(&self) -> Option<u32> {
        self.shared_bit
    }

    #[getter]
    fn enforcement(&self) -> &'static str {
        self.enforcement
    }

    #[getter]
    fn closed(&self) -> bool {
        lock(&self.machine).is_none()
    }

    #[getter]
    fn vcpus<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let count = slf.get().machine(slf.py())?.vcpu_count();
        let vcpu = |index| PyVcpu {
            vm: slf.clone().unbind(),
            index,
        };
        PyTuple::new(slf.py(), (0..count).map(vcpu).collect::<Vec<_>>())
    }

    #[getter]
    fn attributes(slf: &Bound<'_, Self>) -> PyAttributes {
        PyAttributes(slf.clone().unbind())
    }

    #[getter]
    fn policy(slf: &Bound<'_, Self>) -> PyGate {
        PyGate(slf.clone().unbind())
    }

    #[getter]
    fn events(slf: &Bound<'_, Self>) -> PyEvents {
        PyEvents(slf.clone().unbind())
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
        #[pyo3(from_py_with = names::u64)] at: u64,
    ) -> PyResult<u64> {
        let machine = self.machine(py)?;
        let load = |image: &Image<'_>| {
            py.detach(|| machine.load(image))
                .map_err(|error| errors::raise(py, error))
        };
        if let Ok(bytes) = names::bytes(image) {
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
        #[pyo3(from_py_with = names::u16)] port: u16,
        handler: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let machine = self.machine(py)?;
        if let Ok(marks) = handler.cast::<PyMarks>() {
            let added = machine.on_io(port, marks.get().0.clone());
            return added.map_err(|error| errors::raise(py, error));
        }
        let handler = callable(handler)?;
        machine
            .on_io(port, handler.clone())
            .map_err(|error| errors::raise(py, error))?;
        self.keep(&handler);
        Ok(())
    }

    /// Answers a range outside memory and its views; as ``on_io``.
    fn on_mmio(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::u64)] size: u64,
        handler: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let handler = callable(handler)?;
        let machine = self.machine(py)?;
        machine
            .on_mmio(gpa, size, handler.clone())
            .map_err(|error| errors::raise(py, error))?;
        self.keep(&handler);
        Ok(())
    }

    /// Tells an object the present state, and from then on of every conversion; see ``pagegate.Listener``.
    ///
    /// Nothing is lost or doubled in between. PolicyError for an object that is none.
    fn add_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        let machine = self.machine(py)?;
        let listener = Arc::new(PyListener::resolve(listener)?);
        let joined = py.detach(|| machine.add_listener(listener.clone()));
        joined.map_err(|error| errors::raise(py, error))?;
        if let Some(callbacks) = lock(&self.callbacks).as_mut() {
            callbacks.listeners.push(listener);
        }
        self.enters_python.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Tells it nothing more. ValueError for an object that is no listener of this machine.
    fn remove_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        let machine = self.machine(py)?;
        let known = {
            let mut callbacks = lock(&self.callbacks);
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
        let machine = self.machine(py)?;
        let mut interrupt = || Python::attach(|py| py.check_signals()).map_err(errors::failure);
        let report = py.detach(|| machine.run(timeout, &mut interrupt));
        report.map(PyReport::from).map_err(|error| errors::raise(py, error))
    }

    /// Ends the run in progress as "stopped", from any thread; without one it does nothing.
    fn stop(&self, py: Python<'_>) {
        let machine = lock(&self.machine).clone();
        if let Some(machine) = machine {
            py.detach(|| machine.stop());
        }
    }

    /// ``n`` bytes of shared pages. PrivateMemoryError names the first private page.
    fn read<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::usize)] n: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let machine = self.machine(py)?;
        if n as u64 > self.memory {
            let memory = self.memory;
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
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::bytes)] data: Vec<u8>,
    ) -> PyResult<()> {
        let machine = self.machine(py)?;
        py.detach(|| machine.write(gpa, &data))
            .map_err(|error| errors::raise(py, error))
    }

    /// Converts on the host's account: no policy is asked. What was in the pages is gone: they read as zeroes.
    #[pyo3(signature = (gpa, size, *, to))]
    fn convert(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::u64)] size: u64,
        to: &str,
    ) -> PyResult<()> {
        let to = names::state(to, "to")?;
        let machine = self.machine(py)?;
        py.detach(|| machine.convert(gpa, size, to))
            .map_err(|error| errors::raise(py, error))?;
        Ok(())
    }

    /// Resident bytes of each side.
    fn memory_usage(&self, py: Python<'_>) -> PyResult<PyMemoryUsage> {
        let machine = self.machine(py)?;
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
        let mut slot = lock(&self.machine);
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
        drop(lock(&self.callbacks).take());
        Ok(())
    }

    fn __enter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<Self>> {
        slf.get().machine(py)?;
        Ok(slf)
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let Self {
            memory, enforcement, ..
        } = self;
        let closed = if self.closed() { ", closed" } else { "" };
        format!("<pagegate.Vm memory={memory:#x} enforcement={enforcement:?}{closed}>")
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // A lock that is taken belongs to a call in progress, which refers to this object: it is no garbage.
        if let Ok(Some(callbacks)) = self.callbacks.try_lock().as_deref() {
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
        drop(lock(&self.machine).take());
        drop(lock(&self.callbacks).take());
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

/// One vCPU.
#[pyclass(name = "Vcpu", module = "pagegate", frozen)]
pub(crate) struct PyVcpu {
    vm: Py<PyVm>,
    #[pyo3(get)]
    index: usize,
}

#[pymethods]
impl PyVcpu {
    /// Sets all registers for the next run.
    ///
    /// Those not named are 0, but ``rsp`` in mode "long": it has a page for each vCPU, below the tables. Any general
    /// register can be named; cr0, cr2, cr3, cr4, cr8, efer, fs_base, gs_base; and segments, by selector.
    ///
    /// "real": 16 bits, segments at 0. "protected": 32 bits, flat segments, no paging. "long": 64 bits, ring 0, the
    /// first GiB and its shared views mapped to themselves by tables in the top six pages of memory, which become
    /// shared. There is no IDT: an exception ends the run as "shutdown".
    ///
    /// With a shared bit, ``rip`` is taken at the shared view where its page is shared: an instruction cannot be
    /// fetched from the view that its page is not in.
    ///
    /// Raises TypeError for a register that does not exist, ValueError for a value that does not fit, PagegateError
    /// while the vCPU runs.
    #[pyo3(signature = (*, mode = "long", **registers))]
    fn start(&self, py: Python<'_>, mode: &str, registers: Option<&Bound<'_, PyDict>>) -> PyResult<()> {
        let modes = [
            ("real", boot::Mode::Real),
            ("protected", boot::Mode::Protected),
            ("long", boot::Mode::Long),
        ];
        let mode = names::choose(mode, "mode", modes)?;
        let given: Vec<(String, u64)> = match registers {
            Some(registers) => registers.iter().map(register).collect::<PyResult<_>>()?,
            None => Vec::new(),
        };
        let machine = self.vm.get().machine(py)?;
        py.detach(|| machine.start(self.index, mode, &given))
            .map_err(|error| errors::raise(py, error))
    }

    /// The general registers by name, between runs.
    fn regs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let machine = self.vm.get().machine(py)?;
        let mut regs = machine.regs(self.index).map_err(|error| errors::raise(py, error))?;
        let dict = PyDict::new(py);
        for name in REGISTERS {
            dict.set_item(name, boot::register(&mut regs, name).copied())?;
        }
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        format!("<pagegate.Vcpu {}>", self.index)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}

fn register((name, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)) -> PyResult<(String, u64)> {
    let name: String = name.extract()?;
    let known: Vec<&str> = REGISTERS.into_iter().chain(SYSTEM_REGISTERS).collect();
    if !known.contains(&name.as_str()) {
        let known = known.join(", ");
        return Err(PyTypeError::new_err(format!(
            "there is no register {name:?}; there are {known}"
        )));
    }
    let value = names::u64(&value).map_err(|error| {
        // Which of the registers is not in the error of the value.
        let message = format!("{name}: {}", error.value(value.py()));
        match error.is_instance_of::<PyTypeError>(value.py()) {
            true => PyTypeError::new_err(message),
            false => PyValueError::new_err(message),
        }
    })?;
    Ok((name, value))
}

/// The state of every page: the only copy, since KVM has no ioctl to read attributes back.
#[pyclass(name = "Attributes", module = "pagegate", frozen)]
pub(crate) struct PyAttributes(Py<PyVm>);

impl PyAttributes {
    fn page(&self, gpa: u64) -> PyResult<u64> {
        let memory = self.0.get().memory;
        let mask = self.0.get().shared_bit.map_or(0, |bit| 1 << bit);
        let gpa = gpa & !mask;
        match gpa < memory {
            true => Ok(gpa),
            false => Err(PyIndexError::new_err(format!(
                "gpa {gpa:#x} lies outside the guest's {memory:#x} bytes"
            ))),
        }
    }
}

#[pymethods]
impl PyAttributes {
    /// Whether the page that holds ``gpa`` is private. IndexError outside memory.
    fn is_private(&self, py: Python<'_>, #[pyo3(from_py_with = names::u64)] gpa: u64) -> PyResult<bool> {
        let page = self.page(gpa)?;
        let machine = self.0.get().machine(py)?;
        Ok(machine.gate().with_map(|map| map.state(page)) == State::Private)
    }

    /// Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending, by default of all memory.
    #[pyo3(signature = (gpa = 0, size = None))]
    fn runs(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::optional_u64)] size: Option<u64>,
    ) -> PyResult<Vec<(u64, u64, &'static str)>> {
        let start = self.page(gpa)?;
        let size = size.unwrap_or(self.0.get().memory - start);
        let range = Range::new(start, size).filter(|range| range.end() <= self.0.get().memory);
        let range = range
            .ok_or_else(|| PyValueError::new_err(format!("{gpa:#x} + {size:#x} is no page-aligned part of memory")))?;
        let machine = self.0.get().machine(py)?;
        // From a snapshot, so that no vCPU waits for a long list.
        let snapshot = machine.gate().snapshot();
        let runs = snapshot.runs_in(range);
        Ok(runs
            .map(|run| (run.range.gpa(), run.range.size(), run.state.as_str()))
            .collect())
    }

    /// The state of a range of whole pages, by default of the page at ``gpa``.
    #[pyo3(signature = (gpa, size = None))]
    fn state(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::optional_u64)] size: Option<u64>,
    ) -> PyResult<&'static str> {
        let start = self.page(gpa)?;
        let machine = self.0.get().machine(py)?;
        let size = size.unwrap_or(PAGE_SIZE);
        let range =
            machine.gate().views().range(start, size).ok_or_else(|| {
                PyValueError::new_err(format!("{gpa:#x} + {size:#x} is no page-aligned part of memory"))
            })?;
        Ok(machine.gate().describe(range))
    }

    /// Bytes that are private.
    #[getter]
    fn private_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.get().machine(py)?.gate().with_map(|map| map.private_bytes()))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }

    /// Grows by one with every change.
    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.get().machine(py)?.gate().with_map(|map| map.generation()))
    }
}

/// Resident bytes of guest memory.
#[pyclass(name = "MemoryUsage", module = "pagegate", frozen, get_all)]
pub(crate) struct PyMemoryUsage {
    shared: u64,
    private: u64,
    /// Whether ``private`` was counted (cachestat(2), Linux 6.5 and later, left out of some small kernels).
    ///
    /// Where it could not be, it is the most that may be there: the bytes in state private.
    exact: bool,
}

#[pymethods]
impl PyMemoryUsage {
    fn __repr__(&self) -> String {
        let Self { shared, private, .. } = self;
        let exact = if self.exact { "True" } else { "False" };
        format!("MemoryUsage(shared={shared}, private={private}, exact={exact})")
    }
}
