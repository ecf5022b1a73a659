//! The policy in place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::hooks::Policy;

/// The policy that judges a machine's requests.
pub(crate) struct CurrentPolicy {
    policy: Mutex<Arc<dyn Policy>>,
    /// Grows when the policy is replaced.
    version: AtomicU64,
}

/// The policy that judged a vCPU's last request.
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

    /// For a vCPU that has judged nothing yet.
    pub(crate) fn known(&self) -> KnownPolicy {
        KnownPolicy {
            version: self.version.load(Ordering::Acquire),
            policy: self.policy.lock().clone(),
        }
    }

    /// Who judges a request that comes now, for a vCPU that knows who judged the last one. It stays even if it is
    /// replaced meanwhile.
    #[inline]
    pub(crate) fn get<'a>(&self, known: &'a mut KnownPolicy) -> &'a dyn Policy {
        // Acquire, and before the policy is read: a replacement that is counted is the one that is found.
        if known.version != self.version.load(Ordering::Acquire) {
            *known = self.known();
        }
        known.policy.as_ref()
    }

    /// Another policy judges every request that comes once this has returned; one that is being judged is answered by
    /// the old one, which is returned: what it refers to may run code of its own when it is dropped.
    pub(crate) fn replace(&self, policy: Arc<dyn Policy>) -> Arc<dyn Policy> {
        let old = std::mem::replace(&mut *self.policy.lock(), policy);
        self.version.fetch_add(1, Ordering::Release);
        old
    }
}
