//! Writing a machine's events to a file while it runs.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::file::Output;
use super::{About, TraceError};
use crate::events::{self, Event, EventLog};

/// How often the log is looked at. The ring holds what comes in between.
const POLL: Duration = Duration::from_millis(10);
/// Events are in the file after this time at the latest, or as soon as there are as many as a batch holds at most.
const PATIENCE: Duration = Duration::from_secs(1);
const BATCH: usize = 4096;

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
    pending: Vec<Event>,
    /// When the oldest of what is pending was found.
    since: Instant,
    recorded: Recorded,
}

impl Writing {
    fn take(&mut self) -> Result<(), TraceError> {
        let mut events = self.log.since(self.next);
        if let Some(last) = events.last() {
            self.recorded.lost += last.sequence + 1 - self.next - events.len() as u64;
            self.next = last.sequence + 1;
            let room = self.limit - self.recorded.written - self.pending.len() as u64;
            let kept = events.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            self.recorded.lost += (events.len() - kept) as u64;
            events.truncate(kept);
            if self.pending.is_empty() {
                self.since = Instant::now();
            }
            self.pending.append(&mut events);
        }
        match self.pending.len() >= BATCH || self.since.elapsed() >= PATIENCE {
            true => self.write(),
            false => Ok(()),
        }
    }

    fn write(&mut self) -> Result<(), TraceError> {
        for part in self.pending.chunks(BATCH) {
            self.output.write(&events::batch(part))?;
            self.recorded.written += part.len() as u64;
        }
        self.pending.clear();
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
