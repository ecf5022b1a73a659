//! Writes a machine's events to a file while it runs.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use parking_lot::{Condvar, Mutex};

use super::about::About;
use super::data::TraceError;
use super::file::Output;
use crate::events::log::EventLog;
use crate::events::table;

/// How often events are taken from the log. In between, its rings keep them.
const POLL: Duration = Duration::from_millis(10);
/// Events are written to the file after this time at the latest.
const FLUSH_AFTER: Duration = Duration::from_secs(1);
/// Or as soon as there are this many.
const FLUSH_ROWS: u64 = 4096;

/// How many events were written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Events that are in the file.
    pub written: u64,
    /// Events that are not: the log dropped them before they were taken from it, or they are above the limit.
    pub lost: u64,
}

/// Writes every event from its start on, in a thread of its own. No vCPU waits for it.
pub struct Recorder {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<Result<Recorded, TraceError>>>,
}

/// Tells the thread to end.
#[derive(Default)]
struct Stop {
    wanted: Mutex<bool>,
    changed: Condvar,
}

impl Recorder {
    /// Creates or truncates the file and starts the thread. At most `limit` events are written, because a guest can
    /// make any number of requests. `failed` is called, once, if writing fails before [`finish`](Self::finish).
    ///
    /// # Errors
    /// Those of creating the file and the thread.
    pub fn start(
        log: Arc<EventLog>,
        about: &About,
        path: &Path,
        limit: u64,
        failed: impl FnOnce() + Send + 'static,
    ) -> Result<Self, TraceError> {
        let mut writing = Writing {
            next: about.first(),
            log,
            output: Output::create(path, about)?,
            limit,
            pending: Vec::new(),
            rows: 0,
            since: Instant::now(),
            recorded: Recorded::default(),
        };
        let stop = Arc::new(Stop::default());
        let thread_stop = stop.clone();
        let body = move || -> Result<Recorded, TraceError> {
            while !thread_stop.wait() {
                if let Err(error) = writing.take() {
                    failed();
                    return Err(error);
                }
            }
            writing.finish()
        };
        let thread = std::thread::Builder::new()
            .name("pagegate-recorder".to_owned())
            .spawn(body);
        let thread = thread.map_err(|source| TraceError::File {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Writes the events that there are and closes the file.
    ///
    /// # Errors
    /// The first failure to write. Events after it are not in the file.
    pub fn finish(mut self) -> Result<Recorded, TraceError> {
        match self.join() {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Recorded::default()),
        }
    }

    fn join(&mut self) -> Option<std::thread::Result<Result<Recorded, TraceError>>> {
        *self.stop.wanted.lock() = true;
        self.stop.changed.notify_all();
        Some(self.thread.take()?.join())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.join();
    }
}

impl Stop {
    /// Waits for [`POLL`], or until the thread is to end. Returns whether it is to end.
    fn wait(&self) -> bool {
        let mut wanted = self.wanted.lock();
        if !*wanted {
            self.changed.wait_for(&mut wanted, POLL);
        }
        *wanted
    }
}

struct Writing {
    log: Arc<EventLog>,
    /// The sequence number to go on with.
    next: u64,
    output: Output,
    limit: u64,
    /// Batches that are not in the file yet, and their rows.
    pending: Vec<RecordBatch>,
    rows: u64,
    /// When the oldest pending batch was taken.
    since: Instant,
    recorded: Recorded,
}

impl Writing {
    fn take(&mut self) -> Result<(), TraceError> {
        for batch in self.log.batches_since(self.next) {
            let Some(last) = table::last_sequence(&batch) else {
                continue;
            };
            let found = batch.num_rows() as u64;
            self.recorded.lost += last + 1 - self.next - found;
            self.next = last + 1;
            let kept = found.min(self.limit - self.recorded.written - self.rows);
            self.recorded.lost += found - kept;
            if self.rows == 0 {
                self.since = Instant::now();
            }
            if kept > 0 {
                self.pending.push(batch.slice(0, kept as usize));
                self.rows += kept;
            }
        }
        match self.rows >= FLUSH_ROWS || self.since.elapsed() >= FLUSH_AFTER {
            true => self.write(),
            false => Ok(()),
        }
    }

    fn write(&mut self) -> Result<(), TraceError> {
        for batch in self.pending.drain(..) {
            self.output.write(&batch)?;
            self.recorded.written += batch.num_rows() as u64;
        }
        self.rows = 0;
        Ok(())
    }

    fn finish(mut self) -> Result<Recorded, TraceError> {
        self.take()?;
        self.write()?;
        // Events that the log dropped after the last one that was taken.
        self.recorded.lost += self.log.total() - self.next;
        self.output.close()?;
        Ok(self.recorded)
    }
}
