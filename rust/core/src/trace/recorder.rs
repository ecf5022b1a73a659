//! Writing a machine's events to a file while it runs.

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

/// How often the log is looked at. The ring holds what comes in between.
const POLL: Duration = Duration::from_millis(10);
/// Events are in the file after this time at the latest, or as soon as there are this many.
const PATIENCE: Duration = Duration::from_secs(1);
const ENOUGH: u64 = 4096;

/// What became of the events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Events that are in the file.
    pub written: u64,
    /// Events that gave way to newer ones before they could be written, and those above the limit.
    pub lost: u64,
}

/// Writes every event from its start on, in a thread of its own. No vCPU ever waits for it.
pub struct Recorder {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<Result<Recorded, TraceError>>>,
}

#[derive(Default)]
struct Stop {
    wanted: Mutex<bool>,
    changed: Condvar,
}

impl Recorder {
    /// Makes the file, or empties it, and begins. At most `limit` events are written: a guest can ask as often as it likes.
    /// `failed` is called, once, should something not be written.
    ///
    /// # Errors
    /// Those of making the file.
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
        let told = stop.clone();
        let body = move || -> Result<Recorded, TraceError> {
            while !told.wait() {
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

    /// Writes what there is and closes the file.
    ///
    /// # Errors
    /// The first thing that could not be written; what came after it is not in the file.
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
    /// Waits a little. Whether this is the end.
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
    next: u64,
    output: Output,
    limit: u64,
    /// Columns that are not in the file yet, and how many rows they have.
    pending: Vec<RecordBatch>,
    rows: u64,
    /// When the oldest of what is pending was found.
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
        match self.rows >= ENOUGH || self.since.elapsed() >= PATIENCE {
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
        // Those that were never seen, and gave way at the very end.
        self.recorded.lost += self.log.total() - self.next;
        self.output.close()?;
        Ok(self.recorded)
    }
}
