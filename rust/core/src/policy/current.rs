//! The policy that is in place, which can be replaced while the guest runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::hooks::Policy;

/// The policy that judges a machine's requests, and its replacement.
pub(crate) struct CurrentPolicy {
    policy: Mutex<Arc<dyn Policy>>,
    /// Counts replacements, so that a [`KnownPolicy`] can tell whether it is out of date.
    version: AtomicU64,
}

/// The policy that a vCPU used for its last request.
pub(crate) struct KnownPolicy {
    version: u64,
    policy: Arc<dyn Policy>,
}

impl CurrentPolicy {
    pub(crate) fn new(policy: Arc<dyn Policy>) -> Self {
        Self {
            policy: Mutex::new(policy),
            version: AtomicU64::new(0),
        }
    }

    /// The present policy, for a vCPU to start with.
    pub(crate) fn known(&self) -> KnownPolicy {
        KnownPolicy {
            version: self.version.load(Ordering::Acquire),
            policy: self.policy.lock().clone(),
        }
    }

    /// The present policy, for somebody who seldom asks.
    pub(crate) fn present(&self) -> Arc<dyn Policy> {
        self.policy.lock().clone()
    }

    /// The policy for a request that comes now. `known` is the calling vCPU's own; it spares the lock while the policy
    /// stays the same, and keeps the policy alive if it is replaced meanwhile.
    #[inline]
    pub(crate) fn get<'a>(&self, known: &'a mut KnownPolicy) -> &'a dyn Policy {
        // Acquire, and before the policy is read: after a version that counts a replacement, that one or a later one is
        // read.
        if known.version != self.version.load(Ordering::Acquire) {
            *known = self.known();
        }
        known.policy.as_ref()
    }

    /// Replaces the policy. Requests that come after the return are put to the new one; a request that the old one is
    /// judging now gets its answer. Returns the old one, for the caller to drop without the lock: that may run Python
    /// code.
    pub(crate) fn replace(&self, policy: Arc<dyn Policy>) -> Arc<dyn Policy> {
        let old = std::mem::replace(&mut *self.policy.lock(), policy);
        self.version.fetch_add(1, Ordering::Release);
        old
    }
}
