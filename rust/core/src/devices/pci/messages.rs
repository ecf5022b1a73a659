//! Interrupts that are messages: a number and an eventfd for each, and what each is at present.

use std::sync::Arc;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::errno::Errno;
use crate::hypervisor::interrupts::{Message, PINS};
use crate::hypervisor::vm::Hypervisor;

/// The most messages: KVM takes 4096 routes in all, and the pins have 40.
const MOST: usize = 4000;

/// All of a machine's.
pub(crate) struct Messages {
    hypervisor: Arc<dyn Hypervisor>,
    /// By number, from [`PINS`] on.
    routes: Mutex<Vec<Option<Message>>>,
}

/// One interrupt.
pub(crate) struct Line {
    index: usize,
    /// An irqfd: a write to it raises the interrupt.
    event: EventFd,
}

impl Line {
    pub(crate) fn raise(&self) {
        // It fails only if the eventfd's counter is full, and then the interrupt is pending already.
        let _ = self.event.write(1);
    }
}

impl Messages {
    pub(crate) fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self {
            hypervisor,
            routes: Mutex::default(),
        }
    }

    /// Interrupts that go nowhere yet.
    ///
    /// # Errors
    /// Those of eventfd(2) and KVM_IRQFD; ENOSPC if there are too many.
    pub(crate) fn lines(&self, count: usize) -> Result<Vec<Line>, Errno> {
        let mut routes = self.routes.lock();
        let first = routes.len();
        if first + count > MOST {
            return Err(Errno(libc::ENOSPC));
        }
        let line = |index| {
            let event = EventFd::new(EFD_NONBLOCK)?;
            self.hypervisor.route_interrupt(&event, PINS + index as u32)?;
            Ok(Line { index, event })
        };
        let lines = (first..first + count).map(line).collect::<Result<Vec<_>, Errno>>()?;
        routes.resize(first + count, None);
        Ok(lines)
    }

    /// What an interrupt is from now on.
    ///
    /// # Errors
    /// Those of KVM_SET_GSI_ROUTING.
    pub(crate) fn route(&self, line: &Line, message: Option<Message>) -> Result<(), Errno> {
        let mut routes = self.routes.lock();
        if routes[line.index] == message {
            return Ok(());
        }
        let before = std::mem::replace(&mut routes[line.index], message);
        let routed = self.hypervisor.route_messages(&routes);
        if routed.is_err() {
            routes[line.index] = before;
        }
        routed
    }
}
