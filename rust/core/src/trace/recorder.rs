//! Writes a machine's events to a file while it runs.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::about::About;
use super::data::TraceError;
use super::file::Output;
use super::sink::Stalled;
use crate::error::Failure;
use crate::events::log::EventLog;
use crate::events::table;
use crate::input::Watch;
use crate::process::Process;

/// How often events are taken from the log. In between, its rings keep them.
const POLL: Duration = Duration::from_millis(10);
/// Events are written to the file after this time at the latest.
const FLUSH_AFTER: Duration = Duration::from_secs(1);
/// Or as soon as there are this many.
const FLUSH_ROWS: u64 = 4096;

/// How often the watch is called while the thread is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long a reader may read nothing once the recorder is to hurry.
const PATIENCE: Duration = Duration::from_millis(500);

/// How many events were written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Events that are in the file.
    pub written: u64,
    /// Events that are not: the log dropped them before they were taken from it, or they are above the limit.
    pub lost: u64,
    /// Malformed requests among the lost.
    pub lost_malformed: u64,
}

/// How many malformed requests are written at most, beside the others: a guest makes them at little cost.
const MALFORMED_LIMIT: u64 = 1 << 16;

/// Writes every event from its start on, in a thread of its own. No vCPU waits for it.
pub struct Recorder {
    progress: Arc<Progress>,
    /// The process that has the thread.
    process: Process,
    thread: Option<JoinHandle<Result<Recorded, TraceError>>>,
}

/// How far the thread is, and what it is told.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The file is open, and its beginning written.
    open: bool,
    /// The thread is to end.
    wanted: bool,
    over: bool,
    /// From when on a reader that has stalled is not waited for.
    hurry: Option<Instant>,
}

impl Recorder {
    /// Creates or truncates the file and starts the thread. At most `limit` events are written, because a guest can
    /// make any number of requests, and beside them as many malformed requests, up to [`MALFORMED_LIMIT`]. `failed` is called, once, if writing fails before [`finish`](Self::finish). `watch`
    /// is called, again and again, while the reader of a pipe is waited for.
    ///
    /// # Errors
    /// Those of creating the file and the thread, and the watch's failure.
    pub fn start(
        log: Arc<EventLog>,
        about: &About,
        path: &Path,
        limit: u64,
        failed: impl FnOnce() + Send + 'static,
        watch: &mut Watch<'_>,
    ) -> Result<Self, TraceError> {
        let progress = Arc::new(Progress::default());
        let (of_thread, of_sink) = (progress.clone(), progress.clone());
        let (name, about) = (path.to_owned(), about.clone());
        let body = move || -> Result<Recorded, TraceError> {
            let _over = Over(&of_thread);
            let waiting = move |stalled| of_sink.goes_on(stalled);
            let mut writing = Writing {
                next: about.first(),
                malformed_before: log.malformed_before(about.first()),
                room: Room {
                    others: limit,
                    malformed: limit.min(MALFORMED_LIMIT),
                },
                malformed: 0,
                log,
                output: Output::create(&name, &about, Box::new(waiting))?,
                pending: Vec::new(),
                rows: 0,
                since: Instant::now(),
                recorded: Recorded::default(),
            };
            of_thread.set(|state| state.open = true);
            while !of_thread.is_wanted() {
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
        let mut recorder = Self {
            progress,
            process: Process::default(),
            thread: Some(thread),
        };
        let waited = recorder.progress.wait(|state| state.open || state.over, watch);
        if waited.is_err() || recorder.progress.state.lock().over {
            recorder.progress.set(|state| state.wanted = true);
            // Before it ended it may have written what there was.
            let recorded = recorder.join();
            waited.map_err(TraceError::Interrupted)?;
            recorded?;
        }
        Ok(recorder)
    }

    /// Writes the events that there are and closes the file. A pipe's reader is waited for as long as it reads; if it has
    /// stalled, until `watch` fails, which is called again and again, or until after `patience`.
    ///
    /// # Errors
    /// The first failure to write. Events after it are not in the file. Else the watch's failure.
    pub fn finish(mut self, patience: Option<Duration>, watch: &mut Watch<'_>) -> Result<Recorded, TraceError> {
        // In a child that was forked the thread's locks may be held by nobody.
        if self.process.is_present() {
            let hurry = patience.and_then(|patience| Instant::now().checked_add(patience));
            self.progress.set(|state| (state.wanted, state.hurry) = (true, hurry));
            self.progress
                .wait(|state| state.over, watch)
                .map_err(TraceError::Interrupted)?;
        }
        self.join()
    }

    /// Waits for the thread, which has been told to end.
    fn join(&mut self) -> Result<Recorded, TraceError> {
        let Some(thread) = self.thread.take() else {
            return Ok(Recorded::default());
        };
        if !self.process.is_present() {
            // The handle's thread is the parent's.
            std::mem::forget(thread);
            return Ok(Recorded::default());
        }
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if self.thread.is_some() && self.process.is_present() {
            let now = Some(Instant::now());
            self.progress.set(|state| (state.wanted, state.hurry) = (true, now));
        }
        let _ = self.join();
    }
}

/// The thread does no more, also after a panic.
struct Over<'a>(&'a Progress);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.set(|state| state.over = true);
    }
}

impl Progress {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
        self.changed.notify_all();
    }

    /// Waits for [`POLL`], or until the thread is to end. Returns whether it is to end.
    fn is_wanted(&self) -> bool {
        let mut state = self.state.lock();
        if !state.wanted {
            self.changed.wait_for(&mut state, POLL);
        }
        state.wanted
    }

    /// Waits until the thread has got there. Once the watch fails, the thread waits for no reader that has stalled.
    fn wait(&self, there: impl Fn(&State) -> bool, watch: &mut Watch<'_>) -> Result<(), Failure> {
        let mut failure = Ok(());
        let mut state = self.state.lock();
        while !there(&state) {
            self.changed.wait_for(&mut state, LOOK_AGAIN);
            if failure.is_ok() {
                failure = MutexGuard::unlocked(&mut state, &mut *watch);
                if failure.is_err() {
                    state.hurry = Some(Instant::now());
                }
            }
        }
        failure
    }

    /// Whether a reader is waited for which has read nothing for so long.
    fn goes_on(&self, stalled: Duration) -> Result<(), Failure> {
        let hurry = self.state.lock().hurry;
        match stalled >= PATIENCE && hurry.is_some_and(|hurry| hurry <= Instant::now()) {
            true => Err(Box::new(Stalled)),
            false => Ok(()),
        }
    }
}

/// How many more events are written.
struct Room {
    others: u64,
    malformed: u64,
}

impl Room {
    /// The batch without the rows for which there is no room.
    fn fit(&mut self, batch: RecordBatch) -> RecordBatch {
        let malformed = table::malformed(&batch);
        let others = batch.num_rows() as u64 - malformed;
        let kept = match (others <= self.others, malformed) {
            (true, malformed) if malformed <= self.malformed => batch,
            (_, 0) => batch.slice(0, self.others as usize),
            _ => table::first_rows(&batch, self.others, self.malformed),
        };
        self.others -= others.min(self.others);
        self.malformed -= malformed.min(self.malformed);
        kept
    }
}

struct Writing {
    log: Arc<EventLog>,
    /// The sequence number to go on with.
    next: u64,
    output: Output<'static>,
    /// How many malformed requests there were before the first event.
    malformed_before: u64,
    /// How many were taken to be written.
    malformed: u64,
    room: Room,
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
            let kept = self.room.fit(batch);
            let rows = kept.num_rows() as u64;
            self.recorded.lost += found - rows;
            self.malformed += table::malformed(&kept);
            if self.rows == 0 {
                self.since = Instant::now();
            }
            if rows > 0 {
                self.pending.push(kept);
                self.rows += rows;
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
        let malformed = self.log.malformed_total() - self.malformed_before;
        self.recorded.lost_malformed = malformed.saturating_sub(self.malformed).min(self.recorded.lost);
        self.output.close()?;
        Ok(self.recorded)
    }
}
