//! A limit on the rate of requests.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::chain::Link;
use super::decision::Decision;
use super::hooks::Policy;
use super::knowledge::Knowledge;
use super::request::Request;
use crate::errno::Errno;
use crate::error::Failure;

/// Puts `per_second` requests a second on average to `then`, and at most `burst` at once: a token bucket for all vCPUs.
/// An explicit request above that gets EAGAIN in RAX; an implicit one waits, which delays its own vCPU only.
pub struct RateLimit {
    per_second: f64,
    burst: f64,
    bucket: Mutex<Bucket>,
    then: Arc<dyn Policy>,
}

struct Bucket {
    tokens: f64,
    /// When tokens were last added: the latest time of a request, in nanoseconds.
    filled: u64,
}

impl RateLimit {
    /// `per_second` is positive and finite, `burst` at least 1; else `None`.
    pub fn new(per_second: f64, burst: u32, then: Arc<dyn Policy>) -> Option<Self> {
        let valid = per_second.is_finite() && per_second > 0.0 && burst > 0;
        valid.then(|| Self {
            per_second,
            burst: burst.into(),
            bucket: Mutex::new(Bucket {
                tokens: burst.into(),
                filled: 0,
            }),
            then,
        })
    }

    /// Takes a token, or returns how long it takes until there is one.
    fn take(&self, now: u64) -> Result<(), Duration> {
        let mut bucket = self.bucket.lock();
        self.fill(&mut bucket, now);
        if bucket.tokens < 1.0 {
            let missing = (1.0 - bucket.tokens) / self.per_second;
            return Err(Duration::try_from_secs_f64(missing).unwrap_or(Duration::MAX));
        }
        bucket.tokens -= 1.0;
        Ok(())
    }

    fn fill(&self, bucket: &mut Bucket, now: u64) {
        // The requests of several vCPUs may arrive in another order than their times have.
        let now = now.max(bucket.filled);
        let filled = Duration::from_nanos(now - bucket.filled).as_secs_f64() * self.per_second;
        bucket.tokens = (bucket.tokens + filled).min(self.burst);
        bucket.filled = now;
    }
}

impl Link for RateLimit {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        match (self.take(request.time()), request) {
            (Ok(()), request) => self.then().judge(request),
            (Err(_), Request::Explicit(_)) => Ok(Decision::Deny(Errno(libc::EAGAIN))),
            (Err(wait), Request::Implicit(_)) => Ok(Decision::Wait(wait)),
        }
    }

    fn knowledge(&self, now: u64) -> Option<Knowledge> {
        let mut bucket = self.bucket.lock();
        self.fill(&mut bucket, now);
        Some(Knowledge::Tokens(bucket.tokens))
    }

    fn learn(&self, now: u64, knowledge: Option<&Knowledge>) {
        let tokens = match knowledge {
            Some(Knowledge::Tokens(tokens)) if (0.0..=self.burst).contains(tokens) => *tokens,
            _ => self.burst,
        };
        *self.bucket.lock() = Bucket { tokens, filled: now };
    }
}
