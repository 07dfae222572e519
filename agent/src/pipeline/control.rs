//! The caller's side of a running job: what it wants to know, and when it wants it to stop.
//!
//! Owns: the counters, the stop, the loop in which the calling thread waits while others work.
//! Never: works itself. A crash here costs nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Error, Snapshot, Stage, Stop, Watch};

/// Between two questions to the caller whether to stop.
const POLL: Duration = Duration::from_millis(25);

/// Between two progress reports.
const REPORT: Duration = Duration::from_millis(200);

/// Counters of a job, in data bytes.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) total: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) durable: AtomicU64,
    pub(super) verified: AtomicU64,
    pub(super) resumed: AtomicU64,
}

/// Shared by all stages of one run.
pub(super) struct Control<'a> {
    watch: &'a dyn Watch,
    pub(super) counters: Counters,
    stopped: AtomicBool,
    stop: Mutex<Option<Stop>>,
    stage: Mutex<(Stage, Instant)>,
}

impl<'a> Control<'a> {
    pub(super) fn new(watch: &'a dyn Watch) -> Self {
        Self {
            watch,
            counters: Counters::default(),
            stopped: AtomicBool::new(false),
            stop: Mutex::new(None),
            stage: Mutex::new((Stage::Preparing, Instant::now())),
        }
    }

    /// Says which stage begins.
    pub(super) fn enter(&self, stage: Stage) {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner).0 = stage;
        self.report();
    }

    pub(super) fn log(&self, level: tracing::Level, text: &str) {
        let stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner).0;
        self.watch.log(level, stage, text);
    }

    /// Asks the caller whether to stop, and reports now and then. For the thread that runs the job.
    pub(super) fn poll(&self) {
        if !self.stopped()
            && let Some(stop) = self.watch.stop()
        {
            *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(stop);
            self.stopped.store(true, Ordering::Release);
        }
        let due = self.stage.lock().unwrap_or_else(PoisonError::into_inner).1.elapsed() >= REPORT;
        if due {
            self.report();
        }
    }

    /// Whether the caller wants to stop, as of the last poll. For all threads.
    pub(super) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// What the caller asked for.
    pub(super) fn stop(&self) -> Option<Stop> {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Polls, and fails when the caller wants to stop.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.poll();
        match self.stop() {
            Some(stop) => Err(stop.into()),
            None => Ok(()),
        }
    }

    /// Tells the caller where the job is.
    pub(super) fn report(&self) {
        let stage = {
            let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
            stage.1 = Instant::now();
            stage.0
        };
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        self.watch.progress(&Snapshot {
            stage,
            data_bytes: get(&counters.total),
            read: get(&counters.read),
            durable: get(&counters.durable),
            verified: get(&counters.verified),
            resumed: get(&counters.resumed),
        });
    }
}

/// Counts threads down to none.
pub(super) struct Crew {
    left: Mutex<usize>,
    gone: Condvar,
}

impl Crew {
    pub(super) fn new(threads: usize) -> Self {
        Self { left: Mutex::new(threads), gone: Condvar::new() }
    }

    /// Held by a thread of the crew; it leaves when this is dropped.
    pub(super) fn member(&self) -> Member<'_> {
        Member(self)
    }

    /// Waits until all have left and calls `tick` every 25 ms meanwhile.
    pub(super) fn wait(&self, mut tick: impl FnMut()) {
        loop {
            tick();
            let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
            let (left, _) = self.gone.wait_timeout_while(left, POLL, |left| *left > 0).unwrap_or_else(PoisonError::into_inner);
            if *left == 0 {
                return;
            }
        }
    }
}

/// A thread that has not left yet.
pub(super) struct Member<'a>(&'a Crew);

impl Drop for Member<'_> {
    fn drop(&mut self) {
        let mut left = self.0.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.saturating_sub(1);
        self.0.gone.notify_all();
    }
}
