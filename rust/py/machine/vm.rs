//! The virtual machine. One file: PyO3 takes the methods of a class from one block.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pagegate_core::hypervisor::host::{EnforcementMode, VmType};
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::{Confidential, Config, Platform};
use pagegate_core::machine::snapshot::resume::Bytes;
use pagegate_core::memory::address::State;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use pyo3::{PyTraverseError, PyVisit};

use super::attributes::{PyAttributes, PyMemoryUsage};
use super::event_log::PyEvents;
use super::handlers;
use super::missing::{Given, PyTouchedPage};
use super::parts::{OfVm, Parts, held, lock, taken};
use super::policy_handle::PyPolicyHandle;
use super::report::PyReport;
use super::vcpu::PyVcpu;
use super::{image, linux, runs, snapshot};
use crate::devices::builtin;
use crate::interpreter::{arguments, attach, errors, sizes};
use crate::policy::judge::Judge;
use crate::testing::fake::PyFake;

/// A virtual machine in which a policy decides whether pages are converted.
///
/// ``memory``: bytes from gpa 0 on, a multiple of 4096. ``vcpus``: at least 1. ``policy``: any
/// object with hooks, see ``Policy``; ``None`` converts as asked. ``vm_type``: "auto", "default" or "sw-protected".
/// ``enforcement``: "auto", "attributes" (by KVM_SET_MEMORY_ATTRIBUTES, on hosts with private memory), "traps" (the
/// same on the view that a page is not in, with host memory on both sides) or "memslots" (on any host). ``shared_bit``:
/// the address bit that selects a page's shared view, above all of memory and below 52; ``private_bit``: the bit that
/// selects its private view instead; ``None`` for both: one view of each page. ``initial``: the state of all pages at
/// first, "shared" unless ``confidential`` is given. ``events``: how many requests the log keeps, 2**32 at most.
/// ``memslots``: memory is divided into this many equal parts, and no memslot crosses from one to the next.
/// ``hypervisor``: a ``pagegate.testing.Fake`` in place of /dev/kvm.
///
/// Where KVM shadows page tables, the memslots of each TiB take it seconds, and 2 GiB of the host's memory. Ctrl-C ends
/// the wait.
///
/// Sizes and addresses, here and in the methods, may be text, too: "64M", "2MiB", "0x1000".
///
/// ``platform``: "bare" (no interrupts; a HLT ends the vCPU) or "pc" (for Linux, see ``boot``; memory above 3 GiB
/// goes on at 4 GiB). ``confidential``: "sev" for a guest that believes in SEV, all of it private at first, with the
/// C-bit as ``private_bit``: nothing is encrypted, and the host is trusted. ``debug_private``: ``read`` and ``write``
/// reach private pages, too, unless they are in a guest_memfd that cannot be mapped; the report says so.
/// ``policy_timeout``: seconds that a call of a hook, handler or listener by a vCPU may take, looked at 40 times a
/// second. One that takes longer gets a PolicyTimeoutError as soon as it executes Python code, which ends the run.
///
/// ``pager``: no page has bytes at first, and each gets them from here when it is first touched: an object with a
/// method ``missing(page)`` that returns the bytes of the ``MissingPage``, or a file in which a page's offset is its
/// address. It needs userfaultfd(2), as ``Vm.resume(lazy=True)`` does.
///
/// Raises KvmUnavailable, NotSupported, PolicyError, and ValueError for an argument out of range.
#[pyclass(name = "Vm", module = "pagegate", frozen, weakref)]
pub(crate) struct PyVm(pub(crate) Arc<Parts>);

#[pymethods]
impl PyVm {
    #[new]
    #[pyo3(signature = (memory, *, vcpus = 1, policy = None, vm_type = None, enforcement = None, shared_bit = None,
                        private_bit = None, initial = None, events = 65536, memslots = 1, hypervisor = None,
                        platform = Platform::Bare, confidential = None, debug_private = false, policy_timeout = None,
                        pager = None),
           text_signature = "(memory, *, vcpus=1, policy=None, vm_type='auto', enforcement='auto', shared_bit=None, \
                             private_bit=None, initial=None, events=65536, memslots=1, hypervisor=None, \
                             platform='bare', confidential=None, debug_private=False, policy_timeout=None, pager=None)")]
    #[expect(clippy::too_many_arguments, reason = "one keyword a setting")]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::memory, _>)] memory: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::vcpus, _>)] vcpus: u32,
        policy: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = arguments::vm_type)] vm_type: Option<VmType>,
        #[pyo3(from_py_with = arguments::enforcement)] enforcement: Option<EnforcementMode>,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::shared_bit, _>)] shared_bit: Option<u32>,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::private_bit, _>)] private_bit: Option<u32>,
        #[pyo3(from_py_with = arguments::optional_state::<arguments::named::initial>)] initial: Option<State>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::events, _>)] events: usize,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::memslots, _>)] memslots: u32,
        #[pyo3(from_py_with = fake)] hypervisor: Option<Py<PyFake>>,
        #[pyo3(from_py_with = arguments::platform)] platform: Platform,
        #[pyo3(from_py_with = arguments::confidential)] confidential: Option<Confidential>,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::debug_private>)] debug_private: bool,
        #[pyo3(from_py_with = arguments::optional_real::<arguments::named::policy_timeout>)] policy_timeout: Option<
            f64,
        >,
        pager: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let initial = match initial {
            Some(initial) => initial,
            None if confidential.is_some() => State::Private,
            None => State::Shared,
        };
        let judge = Judge::of(policy)?;
        let enters_python = Arc::new(AtomicBool::new(judge.enters_python || policy_timeout.is_some()));
        let overdue = runs::policy_timeout(policy_timeout)?;
        let config = Config {
            memory,
            vcpus,
            vm_type,
            enforcement,
            shared_bit,
            private_bit,
            initial,
            platform,
            confidential,
            debug_private,
            host_memory: pager.is_some(),
            pager: None,
            events,
            memslots,
            policy: judge.policy.clone(),
            around: Some(runs::around(enters_python.clone(), overdue.clone())),
            stack: runs::stack(py)?,
            hypervisor: hypervisor.map(|fake| fake.get().vm()),
        };
        let given = pager.map(Given::of).transpose()?;
        let pager = match &given {
            Some(given) => Some(given.pager(py, config.memory_end().map_err(|error| errors::raise(py, error))?)?),
            None => None,
        };
        let pager_in_python = given.and_then(Given::python);
        if pager_in_python.is_some() {
            enters_python.store(true, Ordering::Relaxed);
        }
        let config = Config { pager, ..config };
        let machine = py
            .detach(|| Machine::new_watched(config, &mut attach::check_signals))
            .map_err(|error| errors::raise(py, error))?;
        Ok(Self(Arc::new(Parts::of(
            machine,
            judge,
            policy,
            enters_python,
            overdue,
            pager_in_python,
        ))))
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

    /// The address bit that selects a page's private view; ``None`` if none does.
    #[getter]
    fn private_bit(&self) -> Option<u32> {
        self.0.private_bit
    }

    /// What is around the vCPUs: "bare" or "pc".
    #[getter]
    fn platform(&self) -> &'static str {
        self.0.platform
    }

    /// What the guest is made to believe: "sev"; ``None`` for an ordinary guest.
    #[getter]
    fn confidential(&self) -> Option<&'static str> {
        self.0.confidential
    }

    /// How page states are enforced.
    #[getter]
    fn enforcement(&self) -> &'static str {
        self.0.enforcement
    }

    /// Whether the machine is closed.
    #[getter]
    fn closed(&self) -> bool {
        self.0.closed()
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

    /// The log of requests. It is there after ``close``, too.
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
        #[pyo3(from_py_with = sizes::size::<arguments::named::at, _>)] at: u64,
    ) -> PyResult<u64> {
        image::load(py, &*self.0.machine(py)?, image, at)
    }

    /// Loads a Linux kernel, so that the next ``run`` boots it.
    ///
    /// ``kernel``: the path of a bzImage (a distribution's vmlinuz) or of an ELF vmlinux. ``initrd``: the path of its
    /// initial RAM disk. ``append``: its command line; console=ttyS0 and panic=-1 are added where it has no such word.
    /// All vCPUs are started. A confidential guest gets all of it in private memory.
    ///
    /// Raises OSError, ValueError that says what is wrong with a file or does not fit, PagegateError without
    /// ``platform="pc"``, if a kernel was booted already, or while the machine runs.
    #[pyo3(signature = (kernel, *, initrd = None, append = String::new()),
           text_signature = "($self, kernel, *, initrd=None, append='')")]
    fn boot(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::path_named::<arguments::named::kernel>)] kernel: PathBuf,
        #[pyo3(from_py_with = arguments::optional_path::<arguments::named::initrd>)] initrd: Option<PathBuf>,
        #[pyo3(from_py_with = arguments::text::<arguments::named::append>)] append: String,
    ) -> PyResult<()> {
        linux::boot(py, &*self.0.machine(py)?, &kernel, initrd.as_deref(), &append)
    }

    /// The guest's serial console, ttyS0. PagegateError without ``platform="pc"``.
    #[getter]
    fn console(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        linux::console(slf.as_any(), &slf.get().0)
    }

    /// The function of the booted kernel at an address, such as "set_memory_decrypted+0x1f".
    ///
    /// ``None`` outside of its text, for an image without symbols, and as long as the kernel has not got far enough to
    /// tell where KASLR has put it. PagegateError while it runs: a hook has ``request.symbol``.
    fn symbol(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::rip, _>)] rip: u64,
    ) -> PyResult<Option<String>> {
        let machine = self.0.machine(py)?;
        py.detach(|| machine.symbol(rip, &mut attach::check_signals))
            .map_err(|error| errors::raise(py, error))
    }

    /// The ranges of addresses that are memory, as ``(gpa, size)`` in bytes: one, or two around a hole.
    #[getter]
    fn ram(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        let ram = self.0.machine(py)?.memory().views().ram();
        Ok(ram.into_iter().map(|range| (range.gpa(), range.size())).collect())
    }

    /// Whether a run is in progress. It is from before ``configure`` of its policy is called.
    #[getter]
    fn running(&self) -> bool {
        held(&self.0.machine).is_some_and(|machine| machine.running())
    }

    /// What the end of the run in progress waits for: pairs of a device's name and "read", "write", "flush".
    ///
    /// Empty without a run that is to end. A disk's file answers when it likes: what the host has begun, only a signal
    /// that ends the process makes it give up, if anything does.
    #[getter]
    fn waits_for(&self, py: Python<'_>) -> Vec<(String, &'static str)> {
        let waits = held(&self.0.machine).map_or_else(Vec::new, |machine| py.detach(|| machine.waits_for()));
        waits
            .into_iter()
            .map(|(device, what)| (device.to_string(), what))
            .collect()
    }

    /// Sets the handler of a port. For a read it returns ``size * count`` bytes, for a write its result is ignored.
    ///
    /// Handlers are called on vCPU threads. A read answered with anything else ends the run with PolicyError. A port
    /// without a handler reads as ones. Raises ValueError for the doorbell and for a port that has a handler already.
    fn on_io(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::port, _>)] port: u16,
        handler: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        handlers::on_io(py, &self.0, port, handler)
    }

    /// Sets the handler of ``size`` bytes outside guest memory and its views; otherwise as ``on_io``.
    ///
    /// With two views it answers accesses through either: the bit in ``gpa`` that selects one is ignored.
    fn on_mmio(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        handler: Bound<'_, PyAny>,
    ) -> PyResult<()> {
        handlers::on_mmio(py, &self.0, gpa, size, handler)
    }

    /// Puts a virtio device on the PCI bus of a machine with ``platform="pc"``, before ``boot``.
    ///
    /// ``device``: one of ``pagegate.devices``, or an object of your own, see ``pagegate.devices.Device``. ``name``:
    /// what events and messages call it. It reaches shared pages only; see ``Policy.device_access``.
    /// ``log_accesses``: the log has an event "accessed" for each of its accesses to memory, those to a queue's rings,
    /// too. PagegateError without ``platform="pc"`` or after ``boot``, PolicyError for an object that is no device,
    /// ValueError for a 32nd.
    #[pyo3(signature = (device, *, name = None, log_accesses = false))]
    fn add_device(
        slf: &Bound<'_, Self>,
        device: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::name>)] name: Option<String>,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::log_accesses>)] log_accesses: bool,
    ) -> PyResult<()> {
        let parts = &slf.get().0;
        if let Some(device) = builtin::add(
            slf.as_any(),
            &*parts.machine(slf.py())?,
            device,
            name.as_deref(),
            log_accesses,
        )? {
            parts.keep_device(device);
        }
        Ok(())
    }

    /// Reads the configuration of a virtio device again, and tells its driver if it has changed.
    ///
    /// The size of a ``Block``'s file, or ``config`` of a device in Python. ``name``: as ``add_device`` was told; it
    /// stands for all devices that have it. At any time, also while the machine runs. ValueError if there is none,
    /// PagegateError for a disk of less than a sector, and what ``config`` raises.
    fn refresh_device(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::text::<arguments::named::name>)] name: String,
    ) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        let refreshed = py.detach(|| machine.refresh_device(&name));
        refreshed.map_err(|error| errors::raise(py, error))
    }

    /// Tells an object the present states, and from then on every conversion; see ``pagegate.Listener``.
    ///
    /// No conversion in between is missed or told twice. Raises PolicyError for an object that is no listener.
    fn add_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.add_listener(py, listener)
    }

    /// Stops telling an object of conversions.
    ///
    /// It waits for those under way, and after it nothing more is told. From inside of a listener it does not wait, and
    /// the conversion under way is still told to its end.
    ///
    /// ValueError if it is no listener of this machine.
    fn remove_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.remove_listener(py, listener)
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
    /// "halt" the guest continues after the HLT; after "shutdown" the vCPU has to be started again. A vCPU that
    /// halted rests, in further runs too, until all have halted or it is started again.
    ///
    /// A vCPU's thread is as one that Python started: it has that size of stack, and what ``threading.settrace`` was
    /// given traces its hooks. At the interpreter's end runs are stopped and waited for, two seconds at most; a call
    /// that has not returned then never does.
    ///
    /// Raises BadBacking, Livelock, PolicyError, PagegateError for an exit that cannot be handled or if no vCPU is
    /// started, and ValueError for a ``timeout`` that is negative or no number of seconds.
    #[pyo3(signature = (timeout = None))]
    fn run(
        slf: &Bound<'_, Self>,
        #[pyo3(from_py_with = arguments::timeout)] timeout: Option<Duration>,
    ) -> PyResult<Py<PyReport>> {
        runs::run(slf.as_any(), &slf.get().0, timeout)
    }

    /// The same for asyncio, in a thread: ``report = await vm.run_async()``. Cancelling it stops the run.
    #[pyo3(signature = (timeout = None))]
    fn run_async<'py>(slf: &Bound<'py, Self>, timeout: Option<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let run = slf.py().import("pagegate.asynchronous")?.getattr("run")?;
        run.call1((slf, timeout))
    }

    /// The report of the last run, also of one that raised.
    ///
    /// Its reason is then "livelock", "interrupted" if a signal's handler raised, as Ctrl-C does, or else "failed".
    ///
    /// ``None`` before the first one, and if ``configure`` or ``running`` of its policy raised.
    #[getter]
    fn report(&self, py: Python<'_>) -> Option<Py<PyReport>> {
        lock(&self.0.report).as_ref().map(|report| report.clone_ref(py))
    }

    /// Ends the run in progress as "stopped", from any thread, also while ``configure`` or ``running`` is called.
    ///
    /// Does nothing without one.
    fn stop(&self, py: Python<'_>) {
        if let Some(machine) = held(&self.0.machine) {
            py.detach(|| machine.stop());
        }
    }

    /// Reads ``n`` bytes of shared pages, and with ``debug_private`` of private ones.
    ///
    /// Raises PrivateMemoryError, which names the first private page, and ValueError outside memory.
    fn read<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::size::<arguments::named::n, _>)] n: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let machine = self.0.machine(py)?;
        if n as u64 > self.0.memory {
            let memory = self.0.memory;
            return Err(PyValueError::new_err(format!(
                "{n:#x} bytes are more than the guest's {memory:#x}"
            )));
        }
        PyBytes::new_with(py, n, |into| {
            let bring = || machine.bring(gpa, n as u64, &mut attach::check_signals);
            py.detach(|| bring().and_then(|()| machine.read(gpa, into)))
                .map_err(|error| errors::raise(py, error))
        })
    }

    /// Writes ``data`` to shared pages, and with ``debug_private`` to private ones.
    ///
    /// Raises PrivateMemoryError, which names the first private page, and ValueError outside memory; then nothing is
    /// written.
    fn write(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::bytes_named::<arguments::named::data>)] data: Vec<u8>,
    ) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        let bring = || machine.bring(gpa, data.len() as u64, &mut attach::check_signals);
        py.detach(|| bring().and_then(|()| machine.write(gpa, &data)))
            .map_err(|error| errors::raise(py, error))
    }

    /// Converts pages without asking the policy. They lose their bytes and read as zeroes.
    ///
    /// ``gpa`` and ``size``: bytes, multiples of 4096. Raises ValueError for what is no range of pages in memory,
    /// PagegateError if the kernel or a listener refuses, and what a listener raises. More than 256 MiB are converted
    /// in parts: if a later one fails, the message or a note says what was converted and stays so.
    #[pyo3(signature = (gpa, size, *, to))]
    fn convert(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        #[pyo3(from_py_with = arguments::state_named::<arguments::named::to>)] to: State,
    ) -> PyResult<()> {
        let machine = self.0.machine(py)?;
        py.detach(|| machine.convert(gpa, size, to))
            .map_err(|error| errors::raise(py, error))?;
        Ok(())
    }

    /// Puts the machine aside: writes all of it to a new folder, from which ``resume`` goes on.
    ///
    /// Between runs. ``folder``: a path that does not exist. It is there when all of it is written, and not before, and
    /// only its owner can read it, for it has all of the guest's memory, private pages included. Pages of zeroes take
    /// no room. It also has the states of pages, vCPUs, interrupt controllers, clock, devices and the booted kernel's
    /// file; neither disks nor the policy, the log and the console's text. The machine can run on.
    ///
    /// Raises FileExistsError and other OSErrors, NotSupported for private memory in a guest_memfd that the host cannot
    /// read and while a store of a vCPU is unanswered, PagegateError while the machine runs.
    fn snapshot(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        snapshot::save(py, &*self.0.machine(py)?, &folder)
    }

    /// Puts the machine back to a snapshot of it or of one that was made alike. Its next ``run`` goes on from there.
    ///
    /// Between runs, of a machine that was resumed lazily. What was touched since then is freed, and comes back from
    /// the folder when it is touched again. Page states and registers are put back; devices are reset and go on as they
    /// were then; disks keep their bytes. The policy, the log and the console stay; ``working_set`` begins anew.
    /// Checksums of memory are not checked.
    ///
    /// Raises as ``Vm.resume``, and then nothing has changed, NotSupported for a machine that was not resumed lazily,
    /// PagegateError while it runs or its pager hangs. After any other failure, such as a listener's, it cannot run
    /// before it was put back.
    fn reset_to(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        snapshot::reset(py, &*self.0.machine(py)?, &folder)
    }

    /// A machine that goes on from a snapshot: its next ``run`` continues where the guest was.
    ///
    /// ``folder``: as ``snapshot`` has written it. ``devices``: the devices of ``add_device``, of the same types and in
    /// the same order; a disk with what it had then. ``policy``, ``events``, ``debug_private``, ``policy_timeout`` and
    /// ``hypervisor``: as for ``Vm``. All else is as it was. Guests in other machines may go on from the same folder. A
    /// vsock's streams have ended, and its driver is told so.
    ///
    /// ``lazy``: the guest goes on at once, and each page is read from the folder when it is first touched: by a vCPU,
    /// a device, ``read`` or KVM itself. So the folder's files of memory have to stay as they are, and their checksums
    /// are not checked. It needs userfaultfd(2), which root has. ``pager``: as for ``Vm``, in place of the folder's
    /// files of memory; it is asked for every page, also for one of zeroes.
    ///
    /// Raises OSError, ValueError for a snapshot that is damaged, which names the file, and for other devices,
    /// NotSupported for a snapshot of another format or of a host with features that this one lacks, else as ``Vm``.
    #[staticmethod]
    #[pyo3(signature = (folder, *, policy = None, devices = None, events = 65536, debug_private = false,
                        policy_timeout = None, lazy = false, pager = None, hypervisor = None))]
    #[expect(clippy::too_many_arguments, reason = "one keyword a setting")]
    fn resume(
        py: Python<'_>,
        folder: PathBuf,
        policy: Option<&Bound<'_, PyAny>>,
        devices: Option<Vec<Bound<'_, PyAny>>>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::events, _>)] events: usize,
        debug_private: bool,
        policy_timeout: Option<f64>,
        lazy: bool,
        pager: Option<&Bound<'_, PyAny>>,
        hypervisor: Option<&PyFake>,
    ) -> PyResult<Py<Self>> {
        let opened = snapshot::open(py, &folder)?;
        let given = pager.map(Given::of).transpose()?;
        let judge = Judge::of(policy)?;
        let enters_python = Arc::new(AtomicBool::new(judge.enters_python || policy_timeout.is_some()));
        let overdue = runs::policy_timeout(policy_timeout)?;
        let config = opened
            .config(judge.policy.clone())
            .map_err(|error| errors::raise(py, error))?;
        let config = Config {
            debug_private,
            host_memory: lazy || given.is_some(),
            events,
            around: Some(runs::around(enters_python.clone(), overdue.clone())),
            stack: runs::stack(py)?,
            hypervisor: hypervisor.map(PyFake::vm),
            ..config
        };
        let machine = py
            .detach(|| Machine::new_watched(config, &mut attach::check_signals))
            .map_err(|error| errors::raise(py, error))?;
        let bytes = match &given {
            Some(given) => Bytes::From(given.pager(py, machine.memory().views().memory_end())?),
            None if lazy => Bytes::Lazily,
            None => Bytes::Now,
        };
        let pager = given.and_then(Given::python);
        if pager.is_some() {
            enters_python.store(true, Ordering::Relaxed);
        }
        let parts = Arc::new(Parts::of(machine, judge, policy, enters_python, overdue, pager));
        let vm = Bound::new(py, Self(parts.clone()))?;
        let resumed = snapshot::resume(vm.as_any(), &parts, opened, &devices.unwrap_or_default(), bytes);
        if resumed.is_err() {
            vm.get().close(py)?;
        }
        resumed.map(|()| vm.unbind())
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
            missing: machine.missing_bytes(),
        })
    }

    /// The pages that were missing until they were touched, in this order.
    ///
    /// By the guest, and by ``read``, ``snapshot`` and the like. Only ``lazy=True`` and ``pager=`` make pages missing.
    fn working_set(&self, py: Python<'_>) -> PyResult<Vec<PyTouchedPage>> {
        let machine = self.0.machine(py)?;
        let pages = py.detach(|| machine.working_set());
        Ok(pages.into_iter().map(PyTouchedPage::of).collect())
    }

    /// Frees the machine, its memory and all descriptors. PagegateError while it runs, and from a listener.
    ///
    /// ``events`` and ``report`` stay as long as this object.
    ///
    /// It waits for conversions under way, whose listeners are told to their end; after it none succeeds.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(machine) = held(&self.0.machine) else {
            return Ok(());
        };
        py.detach(|| machine.close())
            .map_err(|error| errors::raise(py, error))?;
        let ours = taken(&self.0.machine);
        py.detach(|| drop((machine, ours)));
        self.0.release(py);
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
        self.0.traverse(&visit)
    }

    fn __clear__(&self, py: Python<'_>) {
        drop(taken(&self.0.machine));
        self.0.release(py);
    }
}

fn of_vm(vm: &Bound<'_, PyVm>) -> OfVm {
    OfVm {
        parts: vm.get().0.clone(),
        vm: vm.clone().into_any().unbind(),
    }
}

/// What stands in for /dev/kvm.
fn fake(value: &Bound<'_, PyAny>) -> PyResult<Option<Py<PyFake>>> {
    arguments::extract::<arguments::named::hypervisor, _>(value, "a pagegate.testing.Fake, or None")
}
